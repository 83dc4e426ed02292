"""What several commands share: arguments, loading a suite and its plan, a store that must exist."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UserError, nearest_file, printable, reason, short
from bench.store.bundle import Bundle
from bench.store.place import open_store
from bench.store.store import Store
from reports import display

if TYPE_CHECKING:
    from bench.plan.stage import Plan
    from bench.suite.schema import Suite

#: of a store: a folder, or the URL of a bucket and a prefix
Place = Path | str

#: where the suites lie that come with the package, in a checkout as in an installation
SUITES = Path(__file__).parents[2] / "suites"

#: characters of a key that are shown
SHOWN_KEY = 10


def suite_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the arguments that choose a suite, its rows, its settings and the store."""
    suite = "suite file, or the name of one that comes with the package, e.g. paper_table"
    parser.add_argument("suite", type=suite_file, nargs="?" if optional else None, help=suite)
    parser.add_argument("--profile", help="scale of the suite; default: the suite's own")
    parser.add_argument("--seeds", type=count_from(1), metavar="N", help="run N seeds")
    only = "only rows whose name fits, e.g. 'MAE*'"
    parser.add_argument("--only", default="*", metavar="GLOB", help=only)
    set_argument(parser, "override a setting, e.g. mae.steps=100; may be repeated")
    kept = "keep results of older code, marked"
    parser.add_argument("--keep-stale", action="store_true", help=kept)
    store_argument(parser)


def set_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """Add `--set PATH=VALUE`; `sets` holds all of them."""
    given: dict[str, Any] = {"action": "append", "default": [], "metavar": "PATH=VALUE"}
    parser.add_argument("--set", dest="sets", help=text, **given)


def store_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that chooses the store."""
    text = "folder of results (default: store), file of `export --bundle`, or URL of a bucket: "
    text += "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX"
    parser.add_argument("--store", type=place, default=Path("store"), help=text)


def json_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def path(text: str) -> Path:
    """Return the type of an argument that is a path: one that the system can look up."""
    expanded = os.path.expanduser(text)
    try:
        os.stat(expanded)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # each command tells what it misses
    except (OSError, ValueError) as error:  # a link that loops, a name that no file can have
        raise argparse.ArgumentTypeError(f"'{short(text)}': {reason(error)}") from None
    if not text or expanded.startswith("~"):
        message = "is no path" if not text else "there is no such home folder"
        raise argparse.ArgumentTypeError(f"'{short(text)}': {message}")
    return Path(expanded)


def suite_file(text: str) -> Path:
    """Return the type of an argument that is a suite: a file, or the name of one of the package's.

    A file or folder that has the very name goes before.
    """
    return _shipped(path(text))


def _shipped(given: Path) -> Path:
    named = SUITES / f"{given.name}.yaml"
    alone = given.parent == Path() and not given.suffix and not os.path.exists(given)
    return named if alone and os.path.isfile(named) else given


def place(text: str) -> Place:
    """Return the type of an argument that is a store's place: a path, or the URL of a bucket."""
    return text if "://" in text else path(text)


def count_from(least: int) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number of at least `least`."""
    return _number(int, lambda count: count >= least, f"a whole number of at least {least}")


def amount_of(unit: str) -> Callable[[str], float]:
    """Return the type of an argument that is a number of units above 0."""
    return _number(float, lambda amount: 0 < amount < 1e6, f"a number of {unit} above 0")


def _number(kind: type, fits: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        with suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"'{text}' is not {what}")

    return number


def load(options: argparse.Namespace) -> Suite:
    """Return the suite that the arguments choose. Raises `UserError`."""
    from bench.suite.load import load_suite

    return load_suite(
        options.suite, profile=options.profile, seeds=options.seeds, sets=options.sets
    )


def file_and_profile(text: str) -> tuple[Path, str | None]:
    """Return a suite's file and the profile that is named with it: `suites/smoke.yaml:tiny`."""
    file, _, profile = text.rpartition(":") if ".yaml:" in text else (text, "", "")
    return _shipped(Path(file)), profile or None


def planned(options: argparse.Namespace, store: Store, *, keep_stale: bool) -> Plan:
    """Return the plan of the suite that the arguments choose, with what a store has of it.

    Raises `UserError`, also where the data are not here: then no key is known.
    """
    from bench.plan.planner import make_plan

    if isinstance(store, Bundle):
        keep_stale |= _as_bundled(options, store)
    if options.suite is None:
        raise UserError(f"say which suite: python -m bench {options.name} suites/paper_table.yaml")
    plan = make_plan(load(options), store, keep_stale=keep_stale, only=options.only)
    if plan.unresolved:
        raise UserError(f"the data are not here, so no key is known: {plan.unresolved}")
    return plan


def _as_bundled(options: argparse.Namespace, bundle: Bundle) -> bool:
    """Choose a bundle's own suite, unless one is chosen. Return whether it has stale results."""
    from bench.suite.load import told_of

    told = bundle.told
    note = "the data are not here: their counts and their checksum are the bundle's word"
    told_of.update({s: replace(info, notes=(*info.notes, note)) for s, info in told.data})
    if options.suite is not None:
        return False
    options.suite = bundle.root / "suite" / told.suite
    options.profile = options.profile or told.profile
    options.seeds = options.seeds or told.seeds
    options.sets = [*told.sets, *options.sets]
    options.only = told.only if options.only == "*" else options.only
    return told.keep_stale


def lines_of(lines: Iterable[str]) -> str:
    """Return lines as one text, of whole words on a terminal; what it would act on is written out.

    A line that is indented goes on further in.
    """
    room = display.room()
    return "\n".join(
        part
        for line in map(printable, lines)
        for part in display.wrap(line, room, (len(line) - len(line.lstrip()) + 4) * " ")
    )


def existing(place: Place) -> Store:
    """Return the store at a place. Raises `UserError` if there is none."""
    store = open_store(place)
    if not store.exists():
        near = nearest_file(place) if isinstance(place, Path) else ""
        near = near or "; run a suite first, or give --store"
        raise UserError(f"there is no store at {store.name}{near}")
    return store
