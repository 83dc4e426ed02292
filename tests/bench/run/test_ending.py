"""What a signal does to a command, whatever else runs in its process; without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from bench_helpers import ROOT, SMOKE, command, environment

CODES = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}
BEGIN = """
import signal, subprocess, sys, threading, time
from bench.run import signals
signals.catch()
"""
END = """
except KeyboardInterrupt:
    print("said how to go on", flush=True)
    signals.leave(signals.code())
"""
#: what a process may be doing when the signal comes
DOING = {
    "nothing": "    time.sleep(60)",
    "computing": "    while True: pass",
    "waiting for a thread": "    threading.Event().wait()",
    "amid code that must not be interrupted": (
        "    with signals.noted():\n        while True:\n            time.sleep(0.1)\n"
        "            signals.check()"
    ),
    "amid an import, which goes on to its end": (
        "    import os, pathlib, tempfile\n"
        "    folder = pathlib.Path(tempfile.mkdtemp())\n    sys.path.insert(0, str(folder))\n"
        "    (folder / 'slow.py').write_text('import os, time\\ntry: time.sleep(1)'\n"
        "        '\\nexcept KeyboardInterrupt: os._exit(66)')\n"
        "    import slow\n    time.sleep(60)"
    ),
    "after a library took the handlers": (
        "    for number in (1, 2, 15): signal.signal(number, lambda *_: sys.exit('aborted'))\n"
        "    time.sleep(60)"
    ),
}


def python(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("doing", DOING)
def test_a_signal_ends_a_command_with_its_own_code(number: signal.Signals, doing: str):
    script = f"{BEGIN}try:\n    print('here', flush=True)\n{DOING[doing]}{END}"
    with python(script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        time.sleep(0.1)
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (CODES[number], "said how to go on\n", "")


def test_nothing_started_from_here_outlives_it_or_inherits_blocked_signals():
    script = (
        f"{BEGIN}try:\n    child = subprocess.Popen(['sleep', '60'], preexec_fn=lambda: None)\n"
        f"    print(child.pid, flush=True)\n    time.sleep(60){END}"
    )
    with python(script) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        blocked = next(
            line.split()[1]
            for line in Path(f"/proc/{child.pid}/status").read_text().splitlines()
            if line.startswith("SigBlk")
        )
        together = os.getpgid(child.pid) == os.getpgid(process.pid)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 143
    assert not together  # what a terminal tells the group is for the run alone
    assert int(blocked, 16) == 0
    assert psutil.wait_procs([child], timeout=5)[1] == []


def test_a_signal_that_was_ignored_stays_so():
    """As under `nohup`."""
    script = (
        f"import signal\nsignal.signal(1, signal.SIG_IGN)\n{BEGIN}"
        f"try:\n    print('here', flush=True)\n    time.sleep(0.5)\n    print('done'){END}"
    )
    with python(script) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(process.pid, signal.SIGHUP)
        assert process.communicate(timeout=20)[0] == "done\n"
    assert process.returncode == 0


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("seconds", [0.25, 0.5, 0.8])
def test_a_command_that_has_hardly_begun(number: signal.Signals, seconds: float, tmp_path: Path):
    process = subprocess.Popen(
        command("run", SMOKE, "--store", tmp_path / "store"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 20
    blocked = 1 << (number - 1)  # from then on the signal is caught
    while not int(_status(process.pid, "SigBlk"), 16) & blocked and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(seconds)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == CODES[number], (out, err)
    assert "interrupted" in err
    assert "Traceback" not in err


def _status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(name))


def test_a_command_that_began_ray_ends_once_its_output_is_out(tmp_path: Path) -> None:
    """Python's own ending takes seconds there, or for ever."""
    script = (
        "import atexit, runpy, sys, time, types\n"
        "sys.modules['bench.run.cluster'] = types.ModuleType('as after a run')\n"
        "atexit.register(time.sleep, 600)\n"
        f"sys.argv = ['bench', 'ls', '--store', {str(tmp_path)!r}]\n"
        "print('what a command prints')\n"
        "runpy.run_module('bench', run_name='__main__')\n"
    )
    process = python(script)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "what a command prints\n"), err
    assert "there is no store" in err
