"""`doctor`: what a machine has and lacks for running suites, and how to get what is missing."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
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
    checks = list(_checks(options.store))
    print(json.dumps(checks, indent=1) if options.json else common.lines_of(map(_line, checks)))
    return OK if all(check["ok"] for check in checks) else STAGE_FAILED


def _line(check: Check) -> str:
    mark = "ok     " if check["ok"] else "missing"
    if check.get("optional") and not check["found_here"]:
        mark = "absent "
    line = f"{mark}  {check['name']}: {check['found']}"
    return line if not check.get("hint") else f"{line}; {check['hint']}"


def _check(name: str, here: bool, found: str, hint: str = "", *, optional: bool = False) -> Check:
    """Return a check; `optional` is what a suite may need, but whose absence is no fault."""
    told = {"name": name, "ok": here or optional, "found": found, "hint": "" if here else hint}
    return told | ({"optional": True, "found_here": here} if optional else {})


def _checks(store: common.Place) -> Iterator[Check]:
    """Yield every check: Python, packages, GPUs, the place of the store, data sets."""
    for name, version in environment.versions().items():
        if name == "python":
            fits = (3, 11) <= sys.version_info[:2] <= (3, 14)
            yield _check("Python", fits, version, "use Python 3.11 to 3.14")
        else:
            yield _check(name, version != "not installed", version, "install with: make install")
    gpus, processor = gpu_meter.names(), environment.processor()
    found = f"{len(gpus)} × {gpus[0]} (NVML answers)" if gpus else "none (NVML finds no driver)"
    found += f", {processor['cores']} cores of {processor['cpu']}"
    yield _check("GPU", bool(gpus), found, "costs are in core-hours", optional=True)
    if isinstance(store, Path):
        place = Path(os.path.realpath(os.path.expanduser(store)))
        while not os.path.exists(place):
            place = place.parent
        free = shutil.disk_usage(place).free / 2**30
        yield _check("disk", free > 2, f"{free:.0f} GiB free for {store}", "choose another --store")
    else:
        yield _check("store", True, f"{open_store(store).name} answers")
    for row in data.rows():
        here = row["fingerprint"] is not None
        images = ", ".join(f"{count} {pool}" for pool, count in row["images"].items())
        found = f"{images}, fingerprint {row['fingerprint'][:12]}" if here else "not here"
        yield _check(f"data {row['name']}", here, found, row["hint"], optional=True)
