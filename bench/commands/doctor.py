"""`doctor`: what a machine has and lacks for running suites, and how to get what is missing."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from bench import environment
from bench.commands import common, data
from bench.errors import OK, STAGE_FAILED
from bench.store import gpu_meter
from bench.store.place import open_store

Check = dict[str, Any]


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    common.store_argument(parser)
    common.json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print every check: what was found and, where something is missing, what to do."""
    checks = [_python(), *_packages(), _gpus(), *_store(options.store), *map(_data, data.rows())]
    print(json.dumps(checks, indent=1) if options.json else common.lines_of(map(_line, checks)))
    return OK if all(check["ok"] for check in checks) else STAGE_FAILED


def _line(check: Check) -> str:
    mark = "ok     " if check["ok"] else "missing"
    if check.get("optional") and not check["found_here"]:
        mark = "absent "
    line = f"{mark}  {check['name']}: {check['found']}"
    return line if not check.get("hint") else f"{line}; {check['hint']}"


def _check(name: str, here: bool, found: str, hint: str = "") -> Check:
    return {"name": name, "ok": here, "found": found, "hint": "" if here else hint}


def _optional(name: str, here: bool, found: str, hint: str = "") -> Check:
    """Return the check of what a suite may need, but whose absence is no fault."""
    return _check(name, here, found, hint) | {"ok": True, "optional": True, "found_here": here}


def _python() -> Check:
    found = environment.versions()["python"]
    ok = (3, 11) <= sys.version_info[:2] <= (3, 14)
    return _check("Python", ok, found, "use Python 3.11 to 3.14")


def _packages() -> list[Check]:
    found = {k: v for k, v in environment.versions().items() if k != "python"}
    hint = "install with: make install"
    return [_check(name, v != "not installed", v, hint) for name, v in found.items()]


def _gpus() -> Check:
    names = gpu_meter.names()
    processor = environment.processor()
    cpu = f"{processor['cores']} cores of {processor['cpu']}"
    if names:
        return _optional("GPU", True, f"{len(names)} × {names[0]} (NVML answers), {cpu}")
    return _optional("GPU", False, f"none (NVML finds no driver), {cpu}", "costs are in core-hours")


def _store(store: common.Place) -> list[Check]:
    if isinstance(store, Path):
        return [_disk(store)]
    return [_check("store", True, f"{open_store(store).name} answers")]


def _disk(store: Path) -> Check:
    place = Path(os.path.realpath(os.path.expanduser(store)))
    while not os.path.exists(place):
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    return _check("disk", free > 2, f"{free:.0f} GiB free for {store}", "choose another --store")


def _data(row: Check) -> Check:
    here = row["fingerprint"] is not None
    images = ", ".join(f"{count} {pool}" for pool, count in row["images"].items())
    found = f"{images}, fingerprint {row['fingerprint'][:12]}" if here else "not here"
    return _optional(f"data {row['name']}", here, found, row["hint"])
