"""`data`: which data sets are here, getting them, checking them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.commands import common
from bench.errors import MISMATCH, OK, UserError, suggestion
from bench.suite.load import data_info
from bench.suite.schema import Suite
from maect.datasets import CATALOG, DataError, data_root, describe, prepare
from maect.settings import DataSettings


def rows(names: list[str] | None = None) -> list[dict[str, Any]]:
    """Return a row for each named set: what it is, and its fingerprint where it is here."""
    found = []
    for name in names or list(CATALOG):
        info = describe(DataSettings.parse({"name": name}), data_root())
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
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: ls and check, all")
    parser.add_argument("--from", dest="from_path", type=Path, help="files already at hand")
    common.json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """List, fetch or check data sets. Return the exit code."""
    for name in options.names:
        if name not in CATALOG:
            raise UserError(f"there is no data set '{name}'{suggestion(name, CATALOG)}")
    if options.action == "fetch":
        _fetch(options.names, options.from_path)
        return OK
    if options.action == "check":
        return OK if _check(options.names) else MISMATCH
    found = rows(options.names)
    print(json.dumps(found, indent=1) if options.json else "\n".join(map(_line, found)))
    return OK


def prepare_data(suite: Suite) -> bool:
    """Read the image folders and shards of a suite once; name what is broken, at every run.

    Return whether there was anything to read.
    """
    wanted = {v.row.data for v in suite.variants.values() if v.row.data.path is not None}
    missing = {settings for settings in wanted if data_info(settings).fingerprint is None}
    for settings in wanted:
        new = settings in missing
        info = prepare(settings, data_root(), print) if new else data_info(settings)
        for file, reason in info.broken:
            print(f"left out: {file}: {reason}")
        for kind, names in info.converted.items():
            print(f"converted to RGB: {len(names)} images that were {kind}")
    data_info.cache_clear()
    return bool(missing)


def _line(row: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {split}" for split, count in row["images"].items())
    shape = "×".join(map(str, row["shape"]))
    state = f"here, fingerprint {row['fingerprint'][:12]}" if row["fingerprint"] else row["hint"]
    return f"{row['name']:14} {shape:8} {row['classes']:4} classes, {counts}: {state}"


def _fetch(names: list[str], from_path: Path | None) -> None:
    from maect.datasets import fetch

    if not names:
        raise UserError("say which: python -m bench data fetch NAME; python -m bench data ls")
    if from_path is not None and len(names) > 1:
        raise UserError("--from goes with one data set at a time")
    for name in names:
        got = fetch.fetch(name, data_root(), from_path, print)
        print(f"{name}: here, from {got.source}")
        print(_line(rows([name])[0]))


def _check(names: list[str]) -> bool:
    from maect.datasets import fetch

    # one that is here and damaged has no fingerprint
    here = names or [row["name"] for row in rows() if Path(row["where"]).exists()]
    whole = True
    for name in here:
        try:
            print(f"{name}: ok, content {fetch.check(name, data_root())[:12]}")
        except DataError as error:
            whole = False
            print(f"{name}: {error}")
    return whole
