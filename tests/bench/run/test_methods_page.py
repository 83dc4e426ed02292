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

PAGE = (ROOT / "docs" / "methods.md").read_text()
METHOD, EVALUATION = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
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


@pytest.mark.slow
def test_a_method_of_ones_own_is_run_reported_and_verified(copy: Path, tmp_path: Path) -> None:
    found = {}
    for workers in (1, 2):
        store = tmp_path / str(workers)
        told = ("suites/mine.yaml", "--store", store, "--only", ONLY)
        bench(copy, "run", *told, "--workers", workers)
        _, record = stored(store, "Alignment tuning, seed 0")
        found[workers] = record["files"]
        assert "maect.methods.align" in record["code"]["modules"]
        assert "maect.methods.byol" not in record["code"]["modules"]
    assert found[1] == found[2]
    store = tmp_path / "1"
    curves = json.loads((Path(store) / "stages" / record["key"] / "curves.json").read_text())
    assert {"loss", "align", "uniform", "effective_rank"} <= curves.keys()
    told = ("suites/mine.yaml", "--store", store, "--only", ONLY)
    assert "class mean" in bench(copy, "report", "suites/mine.yaml", "--store", store)
    bench(copy, "verify", *told[:3], "--rerun", "Alignment tuning*")
