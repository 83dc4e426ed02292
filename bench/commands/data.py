"""`data`: which data sets are here, getting them, checking them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.commands import common
from bench.errors import MISMATCH, OK, UserError, printable, short, suggestion
from bench.suite.load import data_info
from bench.suite.schema import Suite
from maect import datasets
from maect.datasets import CATALOG, DataError, DataInfo, data_root, prepare
from maect.settings import DataSettings
from reports.display import plural


def rows(names: list[str] | None = None) -> list[dict[str, Any]]:
    """Return a row for each named set: what it is, and its fingerprint where it is here."""
    found = []
    for name in names or list(CATALOG):
        info = datasets.describe(settings_of(name), data_root())
        found.append(
            {
                "name": name,
                "images": info.counts,
                "shape": list(info.image_shape),
                "classes": info.classes,
                "fingerprint": info.fingerprint,
                "where": info.where,
                "hint": info.hint or "",
            }
        )
    return found


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("action", choices=["ls", "fetch", "check"])
    names = "default: ls and check, all; both also take a folder of images or shards"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--from", dest="from_path", type=common.path, help="files already at hand")
    common.json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """List, fetch or check data sets. Return the exit code."""
    if options.action == "fetch":
        _fetch(options.names, options.from_path)
        return OK
    for name in options.names:
        settings_of(name)
    if options.action == "check":
        return OK if _check(options.names) else MISMATCH
    found = rows(options.names)
    print(json.dumps(found, indent=1) if options.json else common.lines_of(map(_line, found)))
    return OK


def prepare_data(suite: Suite) -> bool:
    """Read the image folders and shards of a suite once; name what is broken, at every run.

    Return whether there was anything to read. Raises DataError, also where an evaluation lacks
    images, or published lists do not fit the images or lack a budget.
    """
    rows = suite.variants.values()
    read = [(v.row, one, one.data or v.row.data) for v in rows for one in v.evaluations.values()]
    every = {v.row.data for v in rows} | {settings for *_, settings in read}
    wanted = {settings for settings in every if settings.path is not None}
    missing = {settings for settings in wanted if data_info(settings).fingerprint is None}
    for settings in wanted:
        info = data_info(settings)
        if settings in missing:
            info = prepare(settings, data_root(), print)
        print("".join(f"{line}\n" for line in unusual_lines(info)), end="")
    data_info.cache_clear()
    budgets: dict[DataSettings, set[str]] = {}
    for row, one, settings in read:
        one.evaluator.require_images(row.report_on, data_info(settings).counts)
        own = {*getattr(one.settings, "budgets", ())} - {"100%"}  # which needs no list
        budgets[settings] = budgets.get(settings, set()) | own
    for settings, named in budgets.items():
        if settings.low_shot is not None and (lacking := named - {*datasets.low_shot(settings)}):
            raise DataError(
                f"{settings.low_shot} holds no list for {', '.join(sorted(lacking))}; leave these "
                f"budgets out"
            )
    return bool(missing)


def unusual_lines(info: DataInfo) -> list[str]:
    """Return lines on what of a set is left out, converted, missing or assumed."""
    return [
        *(f"left out: {file}: {reason}" for file, reason in info.broken),
        *(
            f"converted to RGB: {plural(len(n), 'image')} of {kind}"
            for kind, n in info.converted.items()
        ),
        *(f"note: {note}" for note in info.notes),
    ]


def settings_of(given: str, image_size: int = 224) -> DataSettings:
    """Return a named set, or the images in a folder, which says itself how it is read."""
    named = given in CATALOG
    if not named and not os.path.isdir(os.path.expanduser(given)):
        hint = suggestion(given, CATALOG)
        raise UserError(f"'{short(given)}' is neither a data set nor a folder{hint}")
    settings = {"name": given if named else datasets.kind_of(Path(given).expanduser())}
    try:
        path = {} if named else {"path": given}
        return DataSettings.parse({**settings, **path, "image_size": image_size})
    except ValidationError:
        message = f"the name of '{given}' is no UTF-8; give it a link with another name"
        raise UserError(message) from None


def _line(row: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {split}" for split, count in row["images"].items())
    shape = "×".join(map(str, row["shape"]))
    state = f"here, fingerprint {row['fingerprint'][:12]}" if row["fingerprint"] else row["hint"]
    return f"{printable(row['name']):14} {shape:8} {row['classes']:4} classes, {counts}: {state}"


def _fetch(names: list[str], from_path: Path | None) -> None:
    from maect.datasets import fetch

    if not names:
        raise UserError("say which: python -m bench data fetch NAME; python -m bench data ls")
    for name in names:
        if name not in CATALOG:
            raise UserError(f"there is no data set '{short(name)}'{suggestion(name, CATALOG)}")
    if from_path is not None and len(names) > 1:
        raise UserError("--from goes with one data set at a time")
    for name in names:
        print(f"{name}: here, from {fetch.fetch(name, data_root(), from_path, print)}")
        print(_line(rows([name])[0]))


def _check(names: list[str]) -> bool:
    from maect.datasets import fetch

    # one that is here and damaged has no fingerprint
    here = names or [row["name"] for row in rows() if Path(row["where"]).exists()]
    whole = True
    for name in here:
        try:
            if name in CATALOG:
                print(f"{name}: ok, content {fetch.check(name, data_root())[:12]}")
                continue
            info = prepare(settings_of(name), data_root(), print)
            print("\n".join([_line(rows([name])[0]), *unusual_lines(info)]))
        except DataError as error:
            whole = False
            print(f"{printable(name)}: {error}", file=sys.stderr)
    return whole
