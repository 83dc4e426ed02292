"""Which process a run ends because a record names it: none but an orphan of its own store."""

from __future__ import annotations

import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from bench_helpers import taken_over, write_record

from bench import environment
from bench.plan.stage import Plan
from bench.store.store import Store

HERE = {"host": platform.node()}


@pytest.fixture
def begin() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process with a name of its own that does nothing."""
    processes = []

    def start(name: str = "ray::worker") -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen([name, "600"], executable=shutil.which("sleep")))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def take(plan: Plan, store: Store, pid: int, **told: Any) -> None:
    """Take over a store in which a killed run left an attempt at its first stage."""
    store.create()
    stage = next(iter(plan.stages.values()))
    said = {"env": HERE, "pid": pid, **told}
    write_record(store, stage, status="running", wall_s=0, **said)
    taken_over(plan, store)
    assert [attempt.status for attempt in store.state(stage.key).attempts] == ["lost"]


def test_the_next_run_ends_the_workers_of_a_killed_one(plan_of, store, begin):
    worker = begin()
    take(plan_of(), store, worker.pid, process_s=environment.begun_s(worker.pid))
    assert worker.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("another's", {}),
        ("ray::worker", {"process_s": None}),
        ("ray::worker", {"process_s": 1.5}),
        ("ray::worker", {"env": {"host": "elsewhere"}}),
        ("ray::worker", {"env": {}}),
    ],
    ids=["no worker", "no start", "another start", "another host", "no host"],
)
def test_a_process_that_does_not_fit_its_record_lives(name, told, plan_of, store, begin):
    victim = begin(name)
    take(plan_of(), store, victim.pid, **{"process_s": environment.begun_s(victim.pid)} | told)
    assert victim.poll() is None


def test_a_worker_of_a_run_that_goes_on_lives(plan_of, store):
    """Its store may have been copied meanwhile."""
    sleep = f"subprocess.Popen(['ray::worker', '600'], executable={shutil.which('sleep')!r})"
    script = f"import subprocess; p = {sleep}; print(p.pid, flush=True); p.wait()"
    raylet = ["raylet/raylet", "-c", script]
    with subprocess.Popen(raylet, executable=sys.executable, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        try:
            take(plan_of(), store, pid, process_s=environment.begun_s(pid))
            assert parent.poll() is None
        finally:
            subprocess.run(["kill", "-9", str(pid)], check=True)
            parent.kill()


@pytest.mark.parametrize("pid", [0, 1, 2**31, 2**52])  # others no record can hold
def test_a_number_that_is_no_process_of_ours_harms_nothing(pid: int, plan_of, store):
    take(plan_of(), store, pid, process_s=0.0)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")
