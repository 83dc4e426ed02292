"""Evaluations from outside the package: found, run, and their source in the code hash."""

from __future__ import annotations

import py_compile
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench_helpers import ROOT, SMOKE, command, environment, measured

from maect.datasets import DataError
from maect.evals import outside

[DOCUMENTED] = re.findall(
    r"```python\n(# nearest_mean.py.*?)```",
    (ROOT / "docs/evaluation.md").read_text(encoding="utf-8"),
    re.DOTALL,
)

#: plans and runs the row of pixels in this process; prints status and code hash of the evaluation
RUN = """
import sys
from pathlib import Path
from bench.plan.planner import make_plan
from bench.run.worker import run_stage
from bench.store.store import Store
from bench.suite.load import load_suite

store = Store(Path(sys.argv[2]))
store.create()
plan = make_plan(load_suite(Path(sys.argv[1]), seeds=1), store, only="raw pixels")
stage = plan.rows[0].evaluations["nearest_mean"]
print(stage.status, *(name for name in stage.code.modules if not name.startswith("maect")))
for one in plan.stages.values():
    if one.status != "cached":
        run_stage(one, store, "run", lambda event: None)
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    text = SMOKE.read_text().replace("evaluate: [knn, probe]", "evaluate: [nearest_mean]")
    text = text.replace("columns: [knn, probe, cost]", "columns: [nearest_mean, cost]")
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    return path


def call(suite: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, suite, suite.parent / "store"],
        cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_the_documented_file_runs_and_its_source_is_in_the_code_hash(suite: Path, tmp_path: Path):
    file = tmp_path / "nearest_mean.py"
    file.write_text(DOCUMENTED)
    done = call(suite, MAECT_EVALS=str(file))
    assert done.stdout == "pending evaluation_nearest_mean\n", done.stderr
    assert 80 < measured(tmp_path / "store")["raw pixels nearest_mean/accuracy"] < 100
    file.write_text("# a comment changes nothing\n" + DOCUMENTED)
    assert call(suite, MAECT_EVALS=str(file)).stdout.startswith("cached")
    file.write_text(DOCUMENTED.replace("argmin", "argmax"))
    assert call(suite, MAECT_EVALS=str(file)).stdout.startswith("stale")


@pytest.mark.slow
def test_an_installed_module_is_found_by_its_entry_point_and_hashed_with_what_it_imports(
    suite: Path, tmp_path: Path
):
    package, about = tmp_path / "site" / "mine", tmp_path / "site" / "mine-1.dist-info"
    package.mkdir(parents=True)
    about.mkdir()
    (package / "__init__.py").touch()
    (package / "means.py").write_text(DOCUMENTED + "\nfrom mine import helper\n")
    (package / "helper.py").touch()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[maect.evals]\nmeans = mine.means\n")
    done = call(suite, PYTHONPATH=str(package.parent))
    assert done.stdout == "pending mine mine.helper mine.means\n", done.stderr


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("EVALUATR = 1", "is no evaluation: it has no EVALUATOR"),
        ("import nowhere", "cannot be loaded: ModuleNotFoundError: No module named 'nowhere'"),
        ("(", "cannot be loaded: SyntaxError"),
        (None, "cannot be loaded: FileNotFoundError"),
        (DOCUMENTED.replace('"nearest_mean"', '"byol_head"'), "cannot be called 'byol_head'"),
    ],
)
def test_what_is_no_evaluation_is_told(
    content: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("MAECT_EVALS", str(file))
    with pytest.raises(DataError, match=re.escape(told)):
        list(outside.modules())


def test_code_without_its_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "mine.py"
    file.write_text(DOCUMENTED)
    compiled = py_compile.compile(str(file), cfile=str(tmp_path / "mine.pyc"))
    monkeypatch.setenv("MAECT_EVALS", str(compiled))
    with pytest.raises(DataError, match="the source of 'nearest_mean' is not here"):
        list(outside.modules())


def test_a_name_that_is_taken_is_told_by_the_command_line(suite: Path, tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("from maect.evals.nearest import EVALUATOR")
    done = subprocess.run(
        command("plan", suite), cwd=ROOT, env=environment() | {"MAECT_EVALS": str(file)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "two evaluations are named 'knn'" in done.stderr
    assert "Traceback" not in done.stderr
