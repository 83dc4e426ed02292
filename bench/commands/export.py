"""`export`: what a suite has in the store, as a file for others."""

from __future__ import annotations

import argparse

from bench.commands import common
from bench.errors import OK


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    common.suite_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    results = "the tables with every value by seed, as JSON; `report --against` reads it"
    what.add_argument("--results", action="store_true", help=results)
    parser.add_argument("--to", type=common.path, required=True, metavar="FILE", help="new file")


def run(options: argparse.Namespace) -> int:
    """Write what is asked for. Return the exit code."""
    from bench.report.frames import build_view
    from bench.report.results import write_results

    store = common.existing(options.store)
    plan = common.planned(options, store, keep_stale=options.keep_stale)
    write_results(options.to, build_view(plan, store, options.command_line))
    print(f"results: {options.to}")
    return OK
