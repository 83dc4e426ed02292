"""The project installed, editable or from a wheel, and used in folders of any content."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import maect

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "suites" / "smoke.yaml"
SWEEP = ROOT / "suites" / "sweep_queue.yaml"
PACKAGES = ("bench", "maect", "reports", "suites")

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
    pip = [sys.executable, "-m", "pip", "--python", folder / "environment/bin/python", "install"]
    offline = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *offline, next(folder.glob("*.whl"))], check=True)
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
    def files(root: Path) -> set[Path]:
        found = (path for name in PACKAGES for path in (root / name).rglob("*") if path.is_file())
        return {path.relative_to(root) for path in found if path.parent.name != "__pycache__"}

    assert files(site) == files(ROOT)


@pytest.mark.parametrize("site", ["wheel"], indirect=True)
def test_the_console_script_knows_its_version_and_suites_anywhere(site: Path, tmp_path: Path):
    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [site.parents[2] / "bin" / "maect-bench", *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    assert script("--version").stdout == f"maect-bench {maect.__version__}\n"
    planned = script("plan", "smoke")
    assert planned.returncode == 0 and "MAE-CT" in planned.stdout, planned.stderr
    wrong = script("plan", "smoek")
    assert wrong.returncode == 2 and "did you mean" in wrong.stderr and "smoke.yaml" in wrong.stderr
    assert "maect-bench plan" in script("plan", "--help").stdout


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


#: what a person would write: k-NN of an exported encoder, by timm alone
BY_TIMM = """
import sys
import maect, timm, torch
from PIL import Image
from maect.settings import DataSettings

model = timm.create_model("local-dir:encoder", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
settings = DataSettings(name="image_folder", path=sys.argv[1], image_size=16, selection=16)
found = []
for name in ("train", "test"):
    split = maect.datasets.load(settings, split=name)
    pixels = (split.batch([row])[0].permute(1, 2, 0).numpy() for row in range(len(split)))
    images = [Image.fromarray(one) for one in pixels]
    with torch.inference_mode():
        found += [model(torch.stack([transform(image) for image in images])), split.labels]
print(maect.evals.knn(*found, k=[10])[10])
"""


@pytest.mark.slow
@pytest.mark.parametrize("site", ["wheel"], indirect=True)
def test_from_a_wheel_to_an_encoder_in_timm_with_the_figure_of_the_table(
    site: Path, tmp_path: Path
):
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10)):
        for label in range(4):  # stripes of four directions, in noise
            place = tmp_path / "images" / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                y, x = np.mgrid[:16, :16] + random.integers(8)
                stripes = np.sin([x, y, x + y, x - y][label] * 0.8)[..., None]
                pixels = 128 + 60 * stripes + random.normal(0, 120, (16, 16, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(place / f"{number}.png")
    environment = {name: value for name, value in os.environ.items() if name[:6] != "PYTHON"}
    environment |= {"MAECT_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}

    def call(name: str, *arguments: str) -> str:
        done = subprocess.run(
            [site.parents[2] / "bin" / name, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    bench = partial(call, "maect-bench")
    bench("init", "mine.yaml", "--data", "images")
    chosen = ("mine.yaml", "--seeds", "1", "--only", "MAE-CT")
    short = [
        f"--set={stage}.steps={steps}" for stage, steps in (("mae", 60), ("head", 8), ("tune", 20))
    ]
    chosen = (*chosen, *short)
    bench("run", *chosen, "--workers", "0")
    bench("export", *chosen, "--results", "--to", "results.json")
    bench("export", *chosen, "--checkpoint", "MAE-CT", "--seed", "0", "--to", "encoder")
    [table] = json.loads((tmp_path / "results.json").read_text())["tables"]
    [printed] = table["rows"]["MAE-CT"]["knn"]["values"]
    assert float(call("python", "-c", BY_TIMM, "images")) == printed < 100
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert f"{printed:.1f}" in card and "16 selection" in card


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


def test_the_version_is_the_same_wherever_it_is_told():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "version"
    ]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert maect.__version__ == citation["version"] == version


def test_the_supported_pythons_are_the_same_wherever_they_are_told():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.15"
    for name in ("README.md", "Makefile"):
        assert "Python 3.11 to 3.14" in (ROOT / name).read_text(encoding="utf-8")
