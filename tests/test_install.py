"""The project installed, editable or from a wheel, and used in folders of any content."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "suites" / "smoke.yaml"
SWEEP = ROOT / "suites" / "sweep_queue.yaml"
PACKAGES = ("bench", "maect", "reports")

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module", params=["editable", "wheel"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of an environment with the project; dependencies are this one's."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_{request.param} as build; build('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    venv.create(folder / "environment")
    [found] = (folder / "environment" / "lib").glob("python*/site-packages")
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(found)
    (found / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return found


@pytest.fixture
def command(site: Path, tmp_path: Path) -> Command:
    """The installed command line, started in `tmp_path`."""
    environment = {name: value for name, value in os.environ.items() if name[:6] != "PYTHON"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [site.parents[2] / "bin" / "python", "-m", "bench", *map(str, arguments)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return run


def lay(folder: Path, *names: str) -> None:
    """Lay empty folders and Python files that must not be imported."""
    for name in names:
        path = folder / name
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text(f"raise RuntimeError({name!r})\n")


@pytest.mark.parametrize("site", ["wheel"], indirect=True)
def test_a_wheel_holds_every_file_of_the_packages(site: Path):
    for package in PACKAGES:
        held = {path.relative_to(site) for path in (site / package).rglob("*") if path.is_file()}
        there = (ROOT / package).rglob("*")
        assert held == {
            path.relative_to(ROOT)
            for path in there
            if path.is_file() and path.parent.name != "__pycache__"
        }


@pytest.mark.parametrize(
    "name",
    [
        "bench",
        "maect",
        "reports",
        "bench/run",
        "maect/__init__.py",
        "maect.py",
        "reports/__init__.py",
        "yaml.py",
        "polars/__init__.py",
        "shlex.py",
    ],
)
def test_what_is_installed_comes_before_the_working_directory(
    name: str, command: Command, tmp_path: Path
):
    lay(tmp_path, name)
    done = command("plan", SMOKE)
    assert done.returncode == 0 and "MAE-CT" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "arguments"),
    [
        ("wheel", ("run", SMOKE, "--seeds", 1, "--workers", 0, "--only", "MAE")),
        ("editable", ("sweep", SWEEP, "--profile", "tiny", "--seeds", 1, "--workers", 2)),
    ],
    indirect=["site"],
)
def test_workers_and_trials_find_the_installed_packages(
    arguments: tuple[object, ...], command: Command, tmp_path: Path
):
    lay(tmp_path, "bench", "maect/__init__.py", "reports/__init__.py")
    done = command(*arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.needs("make")
@pytest.mark.parametrize("minor", [10, 15])
def test_make_names_the_python_it_needs_before_it_makes_anything(minor: int, tmp_path: Path):
    other = tmp_path / "python"
    version = f"import sys; sys.version_info = (3, {minor}, 0); exec(sys.argv[1])"
    other.write_text(f'#!/bin/sh\n"{sys.executable}" -c "{version}" "$2"\n')
    other.chmod(0o755)
    made = tmp_path / "made"
    done = subprocess.run(
        ["make", "test", f"PYTHON={other}", f"VENV={made}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and not made.exists()
    assert "needs Python 3.11 to 3.14" in done.stderr
    assert "make test PYTHON=python3.12" in done.stderr


def test_the_supported_pythons_are_the_same_wherever_they_are_told():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.15"
    for name in ("README.md", "Makefile"):
        assert "Python 3.11 to 3.14" in (ROOT / name).read_text(encoding="utf-8")
