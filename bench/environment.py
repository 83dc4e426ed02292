"""Where something ran: versions, processor, commit. Needs neither torch nor Ray imported."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "timm", "ray", "numpy", "polars", "scikit-learn", "safetensors")


def _numpy_features() -> str:
    """Return numpy's names of what a processor has beyond AVX2, as its version has them."""
    numpy = tuple(map(int, version("numpy").split(".")[:2]))
    first = "X86_V4" if numpy >= (2, 4) else "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL"
    return f"{first} AVX512_ICL{' AVX512_SPR' if numpy >= (2, 3) else ''}"


#: variables with which the libraries compute with AVX2 on a machine that has more, too
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": _numpy_features(),
}
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
    """Return the CPU's model, vendor and instruction sets, and the cores this process may use."""
    told = dict[str, str]()
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        told = {name.strip(): value.strip() for name, _, value in pairs}
    flags = told.get("flags", told.get("Features", "")).split()
    return {
        "cpu": told.get("model name") or platform.processor() or platform.machine(),
        "vendor": told.get("vendor_id", ""),
        "isa": [name for name in _SETS if name in flags],
        "cores": len(os.sched_getaffinity(0)),
    }


def use(isa: str) -> None:
    """Make the libraries of this process, and of those it starts, compute with instructions `isa`.

    The libraries read the variables once, when they are loaded: a command that has loaded numpy
    with more than AVX2 begins anew. A variable that is set already stays;
    `maect.parallel.require_avx2` finds out whether the libraries comply.
    """
    missing = {} if isa == "native" else {k: v for k, v in AVX2.items() if k not in os.environ}
    os.environ.update(missing)
    own = sys.modules["__main__"].__spec__
    late = "numpy" in sys.modules and "avx512f" in processor()["isa"]  # else nothing is lost yet
    if missing and late and own is not None and own.name == "bench.__main__":
        os.execv(sys.executable, sys.orig_argv)


def processors(isa: str) -> str | None:
    """Return the class of processors that give the same bits under `isa` as this one does.

    None for `native`. MKL documents that it takes the branch of `MKL_CBWR` on Intel's processors
    only, so the vendor is part of the class; where there is no AVX2, the architecture is all.
    """
    if isa == "native":
        return None
    if "avx2" not in processor()["isa"]:
        return platform.machine()
    return f"avx2 {processor()['vendor']}"


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
    switches = {name: os.environ[name] for name in AVX2 if name in os.environ}
    here = {"platform": system, "host": platform.node(), "switches": switches}
    return {**versions(), **processor(), **here}
