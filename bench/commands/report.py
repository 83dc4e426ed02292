"""`report`: render a suite's report from the store alone; it works while a run goes on."""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

from bench.commands import common
from bench.errors import MISMATCH, OK, UserError

#: of `reports.formats.exports.FORMATS`, named here so that --help is quick
FORMATS = ("latex", "latex-published", "markdown", "csv", "parquet", "json")


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    common.suite_arguments(parser, optional=True)
    common.json_argument(parser)
    add = parser.add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    exports = f"also write {', '.join(FORMATS)}; may be repeated"
    add("--export", choices=FORMATS, metavar="FORMAT", help=exports, **several)
    beside = "beside another store's; of two stores, the one's beside the other's"
    sides = parser.add_mutually_exclusive_group().add_argument
    sides("--compare", type=common.place, nargs="+", default=[], metavar="STORE", help=beside)
    against = "tell instead whether a file of `export --results`, or another store, is reproduced"
    sides("--against", type=common.place, metavar="FILE_OR_STORE", help=against)
    check = "say what was checked; exit 3 if the table is not sound, or not reproduced"
    add("--check", action="store_true", help=check)
    output = "where the page goes, exports beside it (default: the folder `reports` of the store)"
    add("--output", type=common.path, metavar="PATH", help=output)
    embedded = "print the suite that a report embeds, and nothing else"
    add("--extract-suite", type=common.path, metavar="FILE", help=embedded)


def run(options: argparse.Namespace) -> int:
    """Print the tables and write the page. Return the exit code."""
    # of a large store nearly all objects live to the end; to look for garbage among them again and
    # again would take a quarter of the time
    gc.disable()
    try:
        return _run(options)
    finally:
        gc.enable()


def _run(options: argparse.Namespace) -> int:
    from bench.report.write import extract, tell_against, write_report
    from reports.tables.check import check, checked

    if options.extract_suite is not None:
        print(extract(options.extract_suite), end="")
        return OK
    against, name = options.against, "--against" if options.against else "--compare"
    if against is not None and options.export:
        raise UserError("--against exports no tables; leave out --export")
    is_store = isinstance(against, str) or (
        against is not None and (against.is_dir() or against.suffix == ".tar")
    )
    beside = [against] if is_store else options.compare
    stores = [common.existing(path) for path in [options.store, *beside][-2:]]
    if len(beside) > 2:
        raise UserError("--compare sets two stores side by side; name one or two")
    if len({store.root for store in stores}) < len(stores):
        raise UserError(f"{name} needs two stores; both are {stores[0].name}")
    kept = options.keep_stale or len(stores) > 1
    sides = [(common.planned(options, store, keep_stale=kept), store) for store in stores]
    command, found = options.command_line, list[str]()
    if against is None:
        files: dict[str, Any] = {"exports": options.export, "output": options.output}
        view = write_report(command, *sides, show="json" if options.json else "text", **files)
    else:
        files = {"results": against, "output": options.output}
        view, held = tell_against(command, *sides, as_json=options.json, **files)
        found = [] if held.reproduced else [held.sentence]
    if not options.check:
        return OK
    found = found + check(view)
    for problem in found:
        print(f"check: {problem}", file=sys.stderr)
    if not found:
        print(f"check: passed. {checked(view)}", file=sys.stderr if options.json else sys.stdout)
    return MISMATCH if found else OK
