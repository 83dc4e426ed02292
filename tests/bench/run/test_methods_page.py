"""docs/methods.md: its examples, each one file and a line in a suite, do what the page says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench_helpers import ROOT, environment, stored

from bench.cli import main
from bench.store.store import Store

PAGE = (ROOT / "docs" / "methods.md").read_text()
METHOD, EVALUATION, ENCODER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(ROW,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
ONLY = "Alignment"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages with the page's two files, and its suite."""
    folder = tmp_path_factory.mktemp("sources")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("bench", "maect", "reports", "suites"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "maect" / "methods" / "align.py").write_text(METHOD)
    (folder / "maect" / "evals" / "prototype.py").write_text(EVALUATION)
    head = "suite: mine\nprofile: tiny\nprofiles_from: smoke.yaml\nseeds: [0]\n"
    head += "evaluate: [knn, prototype]\n"
    others = "  MAE: {stages: [mae]}\n  MAE-CT: {stages: [mae, head, tune]}\n"
    text = head + ROW.replace("variants:\n", f"variants:\n{others}")
    (folder / "suites" / "mine.yaml").write_text(text)
    return folder


def bench(folder: Path, *arguments: object) -> str:
    environ = environment() | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=folder,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_encoder_of_ones_own_is_evaluated(tmp_path: Path, capsys) -> None:
    subprocess.run([sys.executable, "-c", ENCODER], cwd=tmp_path, check=True, capture_output=True)
    data = ("--data", "digits", "--image-size", "32", "--evaluate", "knn")
    assert main(["eval", "--weights", str(tmp_path / "mine"), "--pool", "cls", *data]) == 0
    assert "ViT, dim 48, depth 2, 3 heads, patch 8" in capsys.readouterr().out


def test_a_method_of_ones_own_is_planned_and_costed(copy: Path, tmp_path: Path) -> None:
    plan = json.loads(bench(copy, "plan", "suites/mine.yaml", "--json", "--store", tmp_path))
    stages = {stage["title"]: stage for stage in plan["stages"]}
    assert {"Alignment head, seed 0", "Alignment prototype, seed 0"} <= stages.keys()
    tuning = stages["Alignment tuning, seed 0"]
    assert tuning["steps"] > 8  # for the FLOPs of MAE-CT
    own = [stages[f"{name}, seed 0"]["flops"] for name in ("MAE", "Alignment head")]
    wanted = sum(stages[f"{name}, seed 0"]["flops"] for name in ("MAE-CT head", "MAE-CT tuning"))
    spent = tuning["flops"] + own[1]
    assert wanted <= spent < wanted + tuning["flops"] / tuning["steps"]


@pytest.fixture(scope="module")
def ran(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the page's row, trained in one process."""
    store = tmp_path_factory.mktemp("store")
    bench(copy, "run", "suites/mine.yaml", "--store", store, "--only", ONLY, "--workers", 0)
    return store


@pytest.mark.slow
def test_a_method_of_ones_own_is_run_reported_and_verified(copy: Path, ran: Path) -> None:
    _, record = stored(ran, "Alignment tuning, seed 0")
    assert "maect.methods.align" in record["code"]["modules"]
    assert "maect.methods.byol" not in record["code"]["modules"]
    curves = json.loads((Store(ran).fetch(record["key"]) / "curves.json").read_text())
    assert {"loss", "align", "uniform", "effective_rank"} <= curves.keys()
    told = ("suites/mine.yaml", "--store", ran)
    assert "class mean" in bench(copy, "report", *told, "--only", ONLY)
    bench(copy, "verify", *told, "--only", ONLY, "--rerun", "Alignment tuning*")


@pytest.mark.slow
def test_a_method_of_ones_own_trains_the_same_bits_on_two_workers(
    copy: Path, ran: Path, tmp_path: Path
) -> None:
    bench(copy, "run", "suites/mine.yaml", "--store", tmp_path, "--only", ONLY, "--workers", 2)
    name = "Alignment tuning, seed 0"
    (_, one), (_, two) = stored(ran, name), stored(tmp_path, name)
    assert two["files"] == one["files"]
