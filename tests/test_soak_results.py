"""What a full soak run keeps, and that any other run keeps nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

@pytest.mark.parametrize("case", range(3))
def test_a(case):
    assert case

@pytest.mark.parametrize("case", range(2))
def test_b(case):
    pass
"""


def test_only_whole_functions_of_a_full_run_are_kept(tmp_path: Path):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_mutated.py").write_text(TESTS)
    path = tmp_path / "docs/results/soak.json"

    def soak(*arguments: str, **environment: str) -> dict[str, dict[str, object]]:
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--rootdir", tmp_path, *arguments],
            cwd=tmp_path, env=os.environ | environment, capture_output=True, timeout=300,
        )  # fmt: skip
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    assert soak() == {}
    assert soak("test_mutated.py::test_a[0]", MAECT_SOAK="full") == {}
    first = soak(MAECT_SOAK="full", MAECT_SOAK_SEED="7")
    a, b = first["test_mutated.py::test_a"], first["test_mutated.py::test_b"]
    assert (a["cases"], a["passed"], a["failed"], a["seed"]) == (3, 2, 1, "7")
    assert (b["cases"], b["passed"], b["failed"], b["seed"]) == (2, 2, 0, "7")
    assert a["versions"]["python"] and a["cpu"] and a["commit"] and a["date"]  # type: ignore[index]
    second = soak("-k", "test_b", MAECT_SOAK="full")
    assert second["test_mutated.py::test_a"] == a
    assert second["test_mutated.py::test_b"]["seed"] == "0"
