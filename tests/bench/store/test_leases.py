"""Who works on what: several runs on one store, in a folder and in a bucket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from bench_helpers import SMOKE, Bench, environment, write_record

from bench.errors import MachineError, UserError
from bench.plan.planner import make_plan
from bench.run.worker import StageFailed, run_stage
from bench.store import bucket_leases
from bench.store.leases import Driver, Leases
from bench.store.place import open_store
from bench.store.store import Store
from bench.suite.load import load_suite

KEY = "k" * 20
#: drives a run of a store until it is killed, with a stage's lease
HOLD = """
import sys, time
from bench.store.place import open_store
store = open_store(sys.argv[1])
with store.leases.driving():
    store.leases.claim(sys.argv[2])
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["folder", "bucket"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Open one store, each time as if by another process."""
    bucket = request.param == "bucket"
    url = request.getfixturevalue("bucket") if bucket else str(tmp_path / "store")
    open_store(url).create()
    return lambda: open_store(url)


@pytest.fixture
def holder(opened: Callable[[], Store]) -> Iterator[subprocess.Popen[str]]:
    """A process that drives a run and has a stage's lease."""
    command = [sys.executable, "-c", HOLD, opened().name, KEY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def left(store: Store) -> list[str]:
    """What is left of leases and drivers."""
    leases = store.leases
    return [
        f"{folder}/{name}" for folder in ("leases", "drivers") for name in leases._names(folder)
    ]


def test_a_stage_has_one_lease_and_it_is_given_back(opened: Callable[[], Store]):
    one, other = opened(), opened()
    with one.leases.driving() as _, other.leases.driving():
        assert one.leases.claim(KEY) is None
        assert one.leases.claim(KEY) is None  # it has it
        found = other.leases.claim(KEY)
        assert found is not None and (found.run, found.pid) == (one.leases.run, os.getpid())
        assert other.leases.elsewhere() == {KEY: found}
        assert one.leases.elsewhere() == {}
        one.leases.release(KEY)
        assert other.leases.claim(KEY) is None
        one.leases.release(KEY)  # it is another's by now
        assert one.leases.elsewhere().keys() == {KEY}
    assert left(one) == []


def test_of_many_that_claim_at_once_one_gets_it(opened: Callable[[], Store]):
    with ExitStack() as stack:
        stores = [opened() for _ in range(4)]
        for store in stores:
            stack.enter_context(store.leases.driving())
        for turn in range(5):
            with ThreadPoolExecutor(len(stores)) as pool:
                claims = [pool.submit(store.leases.claim, f"{turn}{KEY}") for store in stores]
            found = [claim.result() for claim in claims]
            assert found.count(None) == 1 and len({d.run for d in found if d}) == 1


def test_a_killed_run_loses_its_leases_and_its_workers_publish_nothing(
    opened: Callable[[], Store], holder: subprocess.Popen[str]
):
    store = opened()
    (run,) = store.leases._names("drivers")
    assert store.leases.still_ours(KEY, run) and store.leases.drivers()[run].pid == holder.pid
    with store.leases.driving():
        assert store.leases.elsewhere()[KEY].run == run
        holder.send_signal(signal.SIGSTOP)
        assert store.leases.claim(KEY) is not None  # it may go on
        holder.kill()
        holder.wait()
        assert store.leases.elsewhere() == {}
        assert store.leases.claim(KEY) is None
        assert not opened().leases.still_ours(KEY, run)
    assert not opened().leases.still_ours(KEY, run)  # also when nobody has it any more
    assert left(store) == []


def test_several_bury_one_dead_run_and_one_takes_its_stage(
    opened: Callable[[], Store], holder: subprocess.Popen[str]
):
    holder.kill()
    holder.wait()
    barrier = threading.Barrier(3)

    def drive(store: Store) -> Driver | None:
        with store.leases.driving():
            barrier.wait()
            found = store.leases.claim(KEY)
            barrier.wait()
            return found

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(drive, [opened() for _ in range(3)]))
    assert found.count(None) == 1
    assert left(opened()) == []


def test_a_lease_that_is_none_is_nobodys(opened: Callable[[], Store]):
    store = opened()
    if isinstance(store.leases, bucket_leases.BucketLeases):
        store.leases.objects.put(f"leases/{KEY}", b"no lease")
    else:
        (store.root / "leases" / KEY).write_text("no lease")
    with store.leases.driving():
        assert store.leases.claim(KEY) is None
    assert left(store) == []


def test_some_commands_work_alone(opened: Callable[[], Store], bench: Bench):
    store = opened()
    told = rf"another run \(process {os.getpid()} on .*\) is using the store .*; wait for it"
    with store.leases.driving(), pytest.raises(UserError, match=told):
        opened().leases.driving(alone=True).__enter__()
    with (
        store.leases.driving(alone=True),
        pytest.raises(UserError, match=told),
        opened().leases.driving(),
    ):
        pass
    with store.leases.driving():  # reading goes on
        assert bench("plan", SMOKE, "--store", store.name).code == 0
        assert bench("report", SMOKE, "--store", store.name).code == 0


def test_an_attempt_is_published_under_its_lease_alone(opened: Callable[[], Store]):
    """An orphan ends after another run has taken its stage, or begins then."""
    store = opened()
    plan = make_plan(load_suite(SMOKE, seeds=1), store, only="raw pixels")
    stage = next(stage for stage in plan.stages.values() if stage.kind == "features")

    def orphan() -> None:
        with pytest.raises(StageFailed):
            run_stage(stage, opened(), "dead", lambda event: None, leased=True)

    orphan()
    assert store.state(stage.key).attempts == []
    complete = Leases.still_ours
    with store.leases.driving():
        assert store.leases.claim(stage.key) is None
        answers = iter([True])
        try:  # the lease is lost between its beginning and its end
            type(store.leases).still_ours = Leases.still_ours = lambda *_: next(answers, False)
            orphan()
        finally:
            Leases.still_ours = complete
            if type(store.leases) is not Leases:
                del type(store.leases).still_ours
        (attempt,) = opened().state(stage.key).attempts
        assert (attempt.status, attempt.files) == ("lost", {})
        assert not list(store.attempt_folder(stage.key, 1).glob("artifact/*"))
        run_stage(stage, store, str(store.leases.run), lambda event: None, leased=True)
    assert [a.status for a in opened().state(stage.key).attempts] == ["lost", "complete"]


# ------------------------------------------------------------------------------------- in a bucket


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> Store:
    """The same store, opened on another machine: one whose cache is empty."""
    monkeypatch.setenv("MAECT_CACHE", str(tmp_path / f"cache-{time.time_ns()}"))
    return open_store(url)


def test_on_another_machine_the_leases_of_a_killed_run_lapse(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = open_store(bucket)
    store.create()
    command = [sys.executable, "-c", HOLD, bucket, KEY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    process.kill()
    process.wait()
    other = elsewhere(monkeypatch, tmp_path, bucket)
    with other.leases.driving():
        found = other.leases.claim(KEY)
        assert found is not None and found.pid == process.pid
        monkeypatch.setattr(bucket_leases, "LAPSES_S", 1.0)
        time.sleep(1.5)
        assert other.leases.claim(KEY) is None


def test_a_driver_without_signs_of_life_hears_that_it_was_given_up(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bucket_leases, "BEAT_S", 2.5)
    store = open_store(bucket)
    store.create()
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(store.leases.driving())
        assert store.leases.claim(KEY) is None
        with monkeypatch.context() as patch:
            other = elsewhere(patch, tmp_path, bucket)
            second.enter_context(other.leases.driving())
            patch.setattr(bucket_leases, "LAPSES_S", 0.0)
            assert other.leases.claim(KEY) is None
        time.sleep(3.0)
        with pytest.raises(MachineError, match=r"another run took the store .* over"):
            store.leases.check_held()
        first.close()  # it gives nothing back that is no more its own
        assert other.leases.holder(KEY) == other.leases.run


def test_signs_of_life_are_given(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bucket_leases, "BEAT_S", 0.2)
    store = open_store(bucket)
    store.create()
    with store.leases.driving():
        time.sleep(1.0)
        (driver,) = open_store(bucket).leases.drivers().values()
        assert driver.beats > 1
        store.leases.check_held()
    assert left(store) == []


def test_an_artifact_is_its_attempts_own(store: Store):
    """Nobody overwrites what another attempt has written; what is replaced goes."""
    plan = make_plan(load_suite(SMOKE, seeds=1), store, only="MAE")
    stage = next(iter(plan.stages.values()))
    write_record(store, stage, content=b"first")
    open_one = write_record(store, stage, status="running")
    store.put_file(open_one, "artifact.bin", b"half")
    assert (store.fetch(stage.key) / "artifact.bin").read_bytes() == b"first"
    write_record(store, stage, content=b"second")
    assert (store.fetch(stage.key) / "artifact.bin").read_bytes() == b"second"
    assert sorted(path.parent.parent.name for path in store.root.rglob("artifact.bin")) == ["3"]
