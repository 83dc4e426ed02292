"""`report`: render a suite's report from the store alone; it works while a run goes on."""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

from bench.commands import common
from bench.errors import MISMATCH, OK, UserError

FORMATS = ("latex", "markdown", "csv", "parquet", "json")


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    common.suite_arguments(parser, optional=True)
    common.json_argument(parser)
    add = parser.add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    exports = f"also write {', '.join(FORMATS)}; may be repeated"
    add("--export", choices=FORMATS, metavar="FORMAT", help=exports, **several)
    beside = "beside another store's; of two stores, the one's beside the other's"
    add("--compare", type=common.path, nargs="+", default=[], metavar="STORE", help=beside)
    add("--check", action="store_true", help="exit 3 if the table is not sound")
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
    from bench.report.write import extract, write_report
    from reports.tables.check import check

    if options.extract_suite is not None:
        print(extract(options.extract_suite), end="")
        return OK
    if options.suite is None:
        after = " --compare A B" if options.compare else ""
        raise UserError(f"say which suite: python -m bench report suites/paper_table.yaml{after}")
    stores = [common.existing(path) for path in [options.store, *options.compare][-2:]]
    if len(options.compare) > 2:
        raise UserError("--compare sets two stores side by side; name one or two")
    if len({store.root for store in stores}) < len(stores):
        raise UserError(f"--compare needs two stores; both are {stores[0].root}")
    kept = options.keep_stale or len(stores) > 1
    view = write_report(
        options.command_line,
        *((common.planned(options, store, keep_stale=kept), store) for store in stores),
        exports=options.export,
        as_json=options.json,
        output=options.output,
    )
    found = check(view) if options.check else []
    for problem in found:
        print(f"check: {problem}", file=sys.stderr)
    return MISMATCH if found else OK
