"""What several commands share: arguments of a suite, loading it, a store that must be there."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from bench.errors import UserError
from bench.store.store import Store
from bench.suite.schema import Suite


def suite_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the arguments that choose a suite, its rows and its settings; and the store."""
    parser.add_argument(
        "suite",
        type=Path,
        nargs="?" if optional else None,
        help="suite file, e.g. suites/paper_table.yaml",
    )
    parser.add_argument("--profile", help="scale of the suite; default: the suite's own")
    parser.add_argument("--seeds", type=count_from(1), metavar="N", help="run N seeds")
    parser.add_argument(
        "--only", default="*", metavar="GLOB", help="only rows whose name fits, e.g. 'MAE*'"
    )
    parser.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a setting, e.g. mae.steps=100; may be repeated",
    )
    parser.add_argument(
        "--keep-stale", action="store_true", help="keep results of older code, marked"
    )
    store_argument(parser)


def store_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that chooses the store."""
    parser.add_argument(
        "--store", type=Path, default=Path("store"), help="folder of results (default: store)"
    )


def count_from(least: int) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number of at least `least`."""

    def count(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            message = f"'{text}' is not a whole number of at least {least}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return count


def load(options: argparse.Namespace) -> Suite:
    """Return the suite that the arguments choose. Raises `UserError`."""
    from bench.suite.load import load_suite

    return load_suite(
        options.suite, profile=options.profile, seeds=options.seeds, sets=options.sets
    )


def existing(path: Path) -> Store:
    """Return the store in a folder. Raises `UserError` if there is none."""
    store = Store(path)
    if not store.root.is_dir():
        raise UserError(f"there is no store at {path}; a run makes one, --store names another")
    return store
