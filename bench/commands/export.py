"""`export`: what a suite has in the store, as a file for others."""

from __future__ import annotations

import argparse

from bench.commands import common
from bench.errors import OK, short

#: formats of figures
DRAWN = ("pdf", "svg", "png")


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    common.suite_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    results = "the tables with every value by seed, as JSON; `report --against` reads it"
    what.add_argument("--results", action="store_true", help=results)
    figures = f"the report's figures at the size of a paper's column: {', '.join(DRAWN)}"
    what.add_argument("--figures", type=_formats, metavar="FORMATS", help=figures)
    to = "new file; of figures a folder"
    parser.add_argument("--to", type=common.path, required=True, metavar="PATH", help=to)


def _formats(text: str) -> list[str]:
    """Return the type of an argument that is a list of formats: "pdf,svg"."""
    found = list(dict.fromkeys(text.lower().split(",")))
    for name in found:
        if name not in DRAWN:
            message = f"'{short(name)}' is no format of figures: {', '.join(DRAWN)}"
            raise argparse.ArgumentTypeError(message)
    return found


def run(options: argparse.Namespace) -> int:
    """Write what is asked for. Return the exit code."""
    from bench.report.frames import build_view
    from bench.report.results import write_results
    from bench.report.write import write_figures
    from reports.display import plural

    store = common.existing(options.store)
    plan = common.planned(options, store, keep_stale=options.keep_stale)
    view = build_view(plan, store, options.command_line)
    if options.results:
        write_results(options.to, view)
        print(f"results: {options.to}")
    else:
        found = write_figures(view, options.figures, options.to)
        print(f"figures: {plural(len(found), 'file')} in {options.to}")
    return OK
