"""Which package may import which, read from the sources; what the light commands really import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "maect": {"ray", "bench", "reports", "polars"},
    "reports": {"ray", "torch", "torchvision", "timm", "bench", "maect"},
    "bench": {"timm", "torchvision", "sklearn"},
}
#: the only modules that import Ray
RAY = {"bench/run/cluster.py", "bench/run/tune.py"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_packages_keep_to_themselves(package: str):
    assert len(sources(package)) > 5
    broken = {
        str(path.relative_to(ROOT)): wrong
        for path in sources(package)
        if (wrong := imported(path) & FORBIDDEN[package])
    }
    assert broken == {}


def test_ray_is_imported_in_two_modules_only():
    users = {
        path.relative_to(ROOT).as_posix()
        for package in FORBIDDEN
        for path in sources(package)
        if "ray" in imported(path)
    }
    assert users == RAY


def test_no_file_is_longer_than_400_lines():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for package in FORBIDDEN
        for path in sources(package)
    }
    assert {path: length for path, length in lengths.items() if length > 400} == {}


HEAVY = ("torch", "torchvision", "timm", "sklearn", "ray")


def heavy_modules(script: str) -> list[str]:
    """What of the heavy packages is loaded at the end of a script in a fresh interpreter."""
    tail = f"import json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{script}\n{tail}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "suites/smoke.yaml"],
        ["plan", "suites/sweep_queue.yaml", "--json"],
        ["ls", "--help"],
        ["show", "--help"],
        ["report", "--help"],
        ["doctor", "--help"],
        ["doctor"],
    ],
    ids=" ".join,
)
def test_light_commands_import_neither_torch_nor_ray(arguments: list[str], tmp_path: Path):
    if "--help" not in arguments:
        arguments = [*arguments, "--store", str(tmp_path)]
    script = f"""
from bench.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
"""
    assert heavy_modules(script) == []


def test_what_the_planner_reads_imports_no_torch():
    modules = ["maect.settings", "maect.streams", "maect.flops", "maect.datasets", "maect.evals"]
    script = "\n".join(f"import {module}" for module in modules)
    script += "\nfrom maect import evals\nfor name in evals.names(): evals.get(name)"
    assert heavy_modules(script) == []


def test_this_test_would_see_torch():
    assert heavy_modules("import torch")[0] == "torch"
