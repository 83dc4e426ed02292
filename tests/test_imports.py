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
#: the only modules that import Ray or hold a handle of Ray's
RAY = {"bench.run.cluster", "bench.run.tune"}
#: rooms of bench/ from the bottom up; a module imports from lower rooms and its own only
ROOMS = [
    {"errors", "environment"},
    {"suite", "store"},
    {"plan"},
    {"run", "report"},
    {"commands"},
    {"cli"},
    {"__main__"},
]


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a module; a package's is that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, typing_only: bool = True) -> set[str]:
    """Dotted names that a module imports anywhere in it.

    Each name is that of a module or of something in a module. With `typing_only` off, what stands
    under `if TYPE_CHECKING` is left out.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen: set[int] = set()
    if not typing_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                unseen.update(id(inner) for inner in ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def graph(*packages: str) -> dict[str, set[str]]:
    """Module -> the modules of these packages that it imports when it runs."""
    files = {name_of(path): path for package in packages for path in sources(package)}
    edges = {}
    for name, path in files.items():
        reached = {
            found if found in files else found.rpartition(".")[0]
            for found in imports(path, typing_only=False)
        }
        edges[name] = {other for other in reached if other in files and other != name}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """A circle of imports for each module that is reached from itself, shortest names first."""
    found = []
    for start in sorted(edges):
        trail = {start: [start]}
        pending = [start]
        while pending:
            here = pending.pop(0)
            for other in sorted(edges[here]):
                if other == start:
                    found.append([*trail[here], start])
                    pending.clear()
                    break
                if other not in trail:
                    trail[other] = [*trail[here], other]
                    pending.append(other)
    return found


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports of bench/ that do not lead to a lower room or stay in their own."""
    level = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    found = []
    for name, others in edges.items():
        for other in others:
            if "bench" in (name, other):
                continue
            ours, theirs = name.split(".")[1], other.split(".")[1]
            if ours != theirs and level[theirs] >= level[ours]:
                found.append(f"{name} -> {other}")
    return found


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_packages_keep_to_themselves(package: str):
    assert len(sources(package)) > 5
    broken = {
        name_of(path): wrong
        for path in sources(package)
        if (wrong := {name.split(".")[0] for name in imports(path)} & FORBIDDEN[package])
    }
    assert broken == {}


def test_the_rooms_of_bench_have_one_direction():
    assert upward(graph("bench")) == []


def test_no_circle_of_imports():
    edges = graph(*FORBIDDEN)
    # a package's own file hands names of its modules on; its modules do not use it for that
    faces = {name for name in edges if any(other.startswith(f"{name}.") for other in edges)}
    assert circles({name: others - faces for name, others in edges.items()}) == []


def test_this_test_would_see_a_wrong_direction_and_a_circle():
    assert upward({"bench.store.files": {"bench.plan.stage"}, "bench.plan.stage": set()})
    assert upward({"bench.suite.load": {"bench.store.files"}, "bench.store.files": set()})
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})[0] == ["a", "b", "c", "a"]


def test_ray_stays_in_two_modules():
    """Neither Ray itself nor calls on its handles (`.remote`) stand anywhere else."""
    users = set()
    for package in FORBIDDEN:
        for path in sources(package):
            calls = {
                n.attr for n in ast.walk(ast.parse(path.read_text())) if type(n) is ast.Attribute
            }
            if "remote" in calls or "ray" in {name.split(".")[0] for name in imports(path)}:
                users.add(name_of(path))
    assert users == RAY


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
        ["gc", "--help"],
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
