"""Where something ran: versions, processor, commit. Needs neither torch nor Ray imported."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "timm", "ray", "numpy", "polars", "scikit-learn", "safetensors")
#: instruction sets that change which kernels a CPU runs, and so the last digits
_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve")


@cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@cache
def processor() -> dict[str, Any]:
    """Return the CPU model, its instruction sets and the cores this process may use."""
    model, flags = platform.processor() or platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            if name.strip() in ("flags", "Features"):
                flags = value
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    sets = [name for name in _SETS if name in flags.split()]
    return {"cpu": model, "isa": sets, "cores": cores or 1}


@cache
def commit() -> dict[str, Any]:
    """Return the git commit of the installed source and whether files differ from it."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": head or "unknown", "dirty": bool(changes)}


def begun_s(pid: int) -> float:
    """Return when a process began, in seconds since the machine did. Raises `psutil.Error`.

    No change of the clock moves that.
    """
    import psutil

    return round(psutil.Process(pid).create_time() - psutil.boot_time(), 2)


def describe() -> dict[str, Any]:
    """Return versions, processor, platform and host, as a record holds them."""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return {**versions(), **processor(), "platform": system, "host": platform.node()}
