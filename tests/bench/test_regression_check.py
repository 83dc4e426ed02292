"""`pytest --benchmark`, as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = "tests/benchmarks/test_training_steps.py"


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "bench"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_planted_slowdown_of_30_percent_fails_the_regression_check():
    check = ("--benchmark", STEPS, "-k", "mae")
    done = run_pytest(*check)
    assert done.returncode == 0, done.stdout
    done = run_pytest("-p", "planted_slowdown", *check)
    assert done.returncode == 1, done.stdout
    assert "something has become slower" in done.stdout


def test_benchmarks_stay_out_without_the_flag():
    done = run_pytest("--collect-only", "-q", STEPS)
    assert "test_a_step" not in done.stdout
    done = run_pytest("--collect-only", "-q", "--benchmark", STEPS)
    assert done.stdout.count("test_a_step") == 3
