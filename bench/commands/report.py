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
    add("--compare", type=common.path, nargs="+", metavar="STORE", help=beside)
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
    from bench.report import write
    from reports.tables.check import check

    if options.extract_suite is not None:
        print(write.extract(options.extract_suite), end="")
        return OK
    if options.suite is None:
        after = " --compare A B" if options.compare else ""
        raise UserError(f"say which suite: python -m bench report suites/paper_table.yaml{after}")
    asked = {"exports": options.export, "as_json": options.json, "output": options.output}
    if options.compare is not None:
        if len(options.compare) > 2:
            raise UserError("--compare sets two stores side by side; name one or two")
        paths = [options.store, *options.compare][-2:]
        one, other = (common.existing(path) for path in paths)
        if one.root == other.root:
            raise UserError(f"--compare needs two stores; both are {one.root}")
        view = write.compare(
            common.load(options), (one, other), options.only, options.command_line, **asked
        )
    else:
        store = common.existing(options.store)
        plan = common.planned(options, store, keep_stale=options.keep_stale)
        view = write.write_report(plan, store, options.command_line, **asked)
    found = check(view) if options.check else []
    for problem in found:
        print(f"check: {problem}", file=sys.stderr)
    return MISMATCH if found else OK
