"""SIGTERM, SIGHUP and Ctrl-C at any moment of a run: its code, and the same end once resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from soak_helpers import cases, draw

from maect.files import sha256

ROOT = Path(__file__).parents[2]
CODES = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}
#: seconds that a run, and the end of an interrupted one, may take on a machine at work
RUN_S, END_S = 900.0, 60.0


@dataclass(frozen=True)
class Run:
    """A run that was left alone: how long it took and what it made."""

    seconds: float
    files: dict[str, str]


def artifacts(store: Path) -> dict[str, str]:
    """SHA-256 of every artifact file."""
    found = (p for p in (store / "stages").glob("*/*") if p.suffix in (".json", ".safetensors"))
    return {str(path.relative_to(store)): sha256(path) for path in found}


def start(store: Path) -> subprocess.Popen[str]:
    arguments = ["run", "suites/smoke.yaml", "--seeds", "1", "--store", str(store)]
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "MAECT_SOAK_STORE": str(store)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def left_over(store: Path, within_s: float) -> list[str]:
    """Processes that a run began and left behind."""
    end = time.monotonic() + within_s
    while True:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("MAECT_SOAK_STORE") == str(store):
                    found.append(f"{process.pid} {process.name()}")
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    store, began = tmp_path_factory.mktemp("alone") / "store", time.monotonic()
    with start(store) as process:
        out, err = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, (out, err)
    return Run(time.monotonic() - began, artifacts(store))


@pytest.mark.slow
@cases(30, few=1)
def test_a_signal_at_any_moment(case: int, alone: Run, tmp_path: Path):
    rng, store = draw("signals", case), tmp_path / "store"
    number = list(CODES)[case % len(CODES)]
    # a terminal and systemd tell the whole group, `kill` and Slurm the process alone
    send = os.killpg if number == signal.SIGINT or rng.random() < 0.5 else os.kill
    share = rng.uniform(0.02, 0.95)
    with start(store) as process:
        time.sleep(share * alone.seconds)
        if process.poll() is None:
            send(process.pid, number)
        out, err = process.communicate(timeout=END_S)
    told = f"{number.name} by {send.__name__} after {share:.0%}: {process.returncode}\n{out}\n{err}"
    if process.returncode == 0:  # it was faster than the one left alone
        assert "report: " in out, told
    else:
        assert process.returncode == CODES[number], told
        assert "To continue: " in err, told
    assert "Traceback" not in out + err, told
    assert "\x1b" not in out + err, told
    assert left_over(store, 10.0) == [], told
    with start(store) as process:
        out, err = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, (told, out, err)
    assert artifacts(store) == alone.files, told
    assert left_over(store, 10.0) == [], told
