"""`pytest --benchmark`, as a user calls it, and regressions planted to see it fail."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import pytest

ROOT = Path(__file__).parents[2]
GATE = "tests/benchmarks/test_gate.py"


def run_pytest(*arguments: str, checkout: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    return subprocess.run(
        command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=1800
    )


def git(checkout: Path, *arguments: str) -> None:
    named = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    subprocess.run(["git", "-C", str(checkout), *named, *arguments], check=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the last commit, to plant regressions in."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    folder = tmp_path_factory.mktemp("clone") / "clone"
    git(ROOT, "clone", "--quiet", "--shared", str(ROOT), str(folder))
    return folder


def plant(checkout: Path, file: str, old: str, new: str) -> None:
    """Put `new` in the place of `old`, which a file has once, in a commit."""
    path = checkout / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file}: {old}"
    path.write_text(text.replace(old, new))
    git(checkout, "commit", "--quiet", "--all", "--message", "a regression")


SLOWER = """
import time

_quick = MAETraining.step


def _slow(self, number):
    began = time.process_time()
    values = _quick(self, number)
    end = began + 1.15 * (time.process_time() - began)
    while time.process_time() < end:
        pass
    return values


MAETraining.step = _slow
"""


@pytest.mark.slow
def test_a_step_15_percent_slower_fails_against_the_commit_before(clone: Path) -> None:
    entry = "\ntraining = MAETraining\n"
    plant(clone, "maect/stages/mae.py", entry, f"{SLOWER}{entry}")
    chosen = "speed_against_base and digits and (mae or head)"
    done = run_pytest(GATE, "--benchmark-base", "HEAD~1", "-k", chosen, checkout=clone)
    assert done.returncode == 1, done.stdout
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "step-mae-digits takes 1.1" in done.stdout


@pytest.mark.slow
def test_a_queue_copied_twice_and_a_leak_of_100_kB_a_step_fail_by_their_memory(clone: Path) -> None:
    similar = "similarities = queries @ self.embeddings.T"
    copied = f"held = self.embeddings.clone()\n            {similar}"
    copied = copied.replace("self.embeddings.T", "held.clone().T")
    plant(clone, "maect/heads.py", similar, copied)
    after = "        self.after_step()\n        return values"
    leak = '        vars(self).setdefault("kept", []).append(torch.ones(25_000))\n'
    plant(clone, "maect/stages/loop.py", after, leak + after)
    chosen = "(memory_peak and (queue-top1 or eval-knn)) or (memory_is_flat and mae)"
    done = run_pytest(GATE, "--benchmark", "-k", chosen, checkout=clone)
    assert done.returncode == 1, done.stdout
    assert "queue-top1 holds" in done.stdout
    assert "something is kept of each step" in done.stdout
    assert "2 failed" in done.stdout and "passed" in done.stdout, done.stdout


Patched = Callable[[Any], Any]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "module", "name", "planted"),
    [
        ("MAE", "stages.mae", "mae_loss_per_image", lambda f: lambda *g: f(*g[:-1], False)),
        ("MAE", "stages.loop", "learning_rate", lambda f: lambda s, *g: f(max(s - 1, 0), *g)),
        ("NNCLR without MAE", "heads", "nnclr_loss", lambda f: lambda p, n, t: f(p, n, 2 * t)),
    ],
    ids=["a normalisation dropped", "a schedule off by one", "a wrong temperature"],
)
def test_a_wrong_method_fails_by_its_losses(
    row: str, module: str, name: str, planted: Patched, monkeypatch: Any, tmp_path: Path
) -> None:
    """Where the golden bits are this machine's, and where noise has to tell."""
    known = golden.read()
    right = golden.measure(tmp_path / "right", 1, only=row)
    for exact in (None, False):
        assert golden.judge(right, known, exact).fails == []
    monkeypatch.setattr(
        f"maect.{module}.{name}", planted(getattr(importlib.import_module(f"maect.{module}"), name))
    )
    wrong = golden.measure(tmp_path / "wrong", 1, only=row)
    for exact in (None, False):
        assert any("loss" in line for line in golden.judge(wrong, known, exact).fails)


def test_what_is_too_good_warns() -> None:
    known = golden.read()
    found = {name: list(values) for name, values in known["kept"].items()}
    assert golden.judge(found, known, False).fails == []
    for seed in range(golden.KEPT):
        found[f"MAE-CT probe, seed {seed}/accuracy"] = [99.0]
    verdict = golden.judge(found, known, False)
    assert verdict.fails == [] and len(verdict.warns) == 1
    assert verdict.warns[0].startswith("MAE-CT probe/accuracy: +")


def test_benchmarks_stay_out_without_the_flag():
    done = run_pytest("--collect-only", "-q", GATE)
    assert "test_speed" not in done.stdout
    done = run_pytest("--collect-only", "-q", "--benchmark", GATE)
    assert "test_speed[step-mae-digits]" in done.stdout
    assert "base" not in done.stdout


def test_a_base_that_is_no_commit_is_named():
    done = run_pytest("--benchmark-base", "no-such-branch", GATE)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--benchmark-base needs a commit of this repository" in done.stderr
    assert "Traceback" not in done.stderr
