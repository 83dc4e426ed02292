"""The store: whole files or none, damage found, one driver at a time."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_helpers import SMOKE, Bench, taken_over, write_record, write_run

from bench.errors import UserError
from bench.plan.planner import make_plan
from bench.plan.stage import Plan, Stage
from bench.plan.status import assess_all
from bench.run.driver import spent
from bench.run.recovery import close_running
from bench.store.files import write_atomic
from bench.store.record import Cost, Failure
from bench.store.store import Store
from bench.suite.load import load_suite
from maect.files import digest


@pytest.fixture
def plan(store: Store) -> Plan:
    return make_plan(load_suite(SMOKE, seeds=1), store)


@pytest.fixture
def mae(plan: Plan) -> Stage:
    return next(stage for stage in plan.stages.values() if stage.title == "MAE, seed 0")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------- writing


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(no space left on device\)"):
        write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_writer_killed_on_the_way_leaves_no_file(tmp_path: Path):
    """kill -9 between the bytes and the new name."""
    script = (
        "import os, signal, sys; from pathlib import Path;"
        "from bench.store.files import write_atomic;"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL);"
        "write_atomic(Path(sys.argv[1]) / 'file', b'x' * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "file").exists()


def test_attempts_are_numbered_and_kept(store: Store, mae: Stage):
    ends = {1: "failed", 2: "interrupted", 3: "complete"}
    for status in ends.values():
        write_record(store, mae, status=status)
    state = store.state(mae.key)
    assert [(a.attempt, a.status) for a in state.attempts] == [*ends.items()]
    assert state.record is not None
    assert state.record.attempt == 3
    assert state.problems == []


def test_an_attempt_without_a_record_is_running(store: Store, mae: Stage):
    write_record(store, mae, status="running")
    (attempt,) = store.state(mae.key).attempts
    assert attempt.status == "running"
    assert store.state(mae.key).record is None


# ----------------------------------------------------------------------------------------- damage


def record_path(store: Store, stage: Stage, attempt: int = 1) -> Path:
    return store.folder(stage.key) / "attempts" / str(attempt) / "record.json"


@pytest.mark.parametrize(
    "how", ["cut", "empty", "binary", "list", "edited", "other key", "no status"]
)
def test_a_corrupt_record_is_named_and_left_out(how: str, store: Store, mae: Stage, bench: Bench):
    write_record(store, mae)
    path = record_path(store, mae)
    text = path.read_text()
    record = json.loads(text)
    match how:
        case "cut":
            path.write_text(text[: len(text) // 2])
        case "empty":
            path.write_text("")
        case "binary":
            path.write_bytes(b"\xff\xfe\x00")
        case "list":
            path.write_text("[1, 2]")
        case "edited":
            path.write_text(text.replace('"wall_s": 1.0', '"wall_s": 0.1'))
        case "other key":
            record["key"] = "0" * 20
            record.pop("checksum")
            path.write_text(json.dumps(record | {"checksum": digest(record)}))
        case "no status":
            path.write_text("{}")
    assert path.read_text(errors="replace") != text
    state = store.state(mae.key)
    assert state.record is None
    assert state.attempts == []
    (problem,) = state.problems
    assert str(path.relative_to(store.root)) in problem
    listed = bench("ls", "--store", store.root)
    assert listed.code == 0
    assert "damaged" in listed.out
    shown = bench("show", mae.key, "--store", store.root)
    assert shown.code == 0
    assert "damaged" in shown.out
    planned = bench("plan", SMOKE, "--seeds", "1", "--store", store.root, "--json")
    statuses = {s["key"]: s["status"] for s in json.loads(planned.out)["stages"]}
    assert statuses[mae.key] == "pending"


def test_a_corrupt_record_does_not_hide_an_older_good_one(store: Store, mae: Stage):
    write_record(store, mae)
    write_record(store, mae)
    record_path(store, mae, 2).write_text("{")
    state = store.state(mae.key)
    assert state.record is not None
    assert state.record.attempt == 1
    assert len(state.problems) == 1


@pytest.mark.parametrize("how", ["flipped", "longer", "missing"])
def test_a_changed_artifact_is_found_set_aside_and_pending(
    how: str, store: Store, mae: Stage, plan: Plan
):
    write_record(store, mae, content=b"weights")
    artifact = store.fetch(mae.key) / "artifact.bin"
    match how:
        case "flipped":
            artifact.write_bytes(b"weighte")
        case "longer":
            artifact.write_bytes(b"weights ")
        case "missing":
            artifact.unlink()
    plan = make_plan(plan.suite, store)
    (line,) = taken_over(plan, store)
    assert line.startswith("MAE, seed 0: artifact.bin ")
    assert line.endswith("set aside, it is made again")
    assert not artifact.exists()
    kept = [path.read_bytes() for path in (store.root / "damaged").rglob("artifact.bin")]
    assert kept == ([] if how == "missing" else [b"weighte" if how == "flipped" else b"weights "])
    state = store.state(mae.key)
    assert state.record is None
    assert [a.status for a in state.attempts] == ["damaged"]
    assert make_plan(plan.suite, store).stages[mae.key].status == "pending"
    assert taken_over(make_plan(plan.suite, store), store) == []


def test_a_sound_store_has_no_damage(store: Store, mae: Stage, plan: Plan):
    write_record(store, mae)
    assert taken_over(make_plan(plan.suite, store), store) == []


# --------------------------------------------------------------------------- attempts that died


def test_an_abandoned_attempt_is_closed_with_its_cost(store: Store, mae: Stage):
    write_record(store, mae, status="running", wall_s=100.0)
    folder = record_path(store, mae).parent
    (folder / "log.txt").write_text("the last words\n")
    beat = time.time() - 40
    for path in folder.iterdir():
        os.utime(path, (beat, beat))
    close_running(store, mae.key, "lost", "its worker died")
    (attempt,) = store.state(mae.key).attempts
    assert attempt.status == "lost"
    assert attempt.error == Failure(kind="Lost", message="its worker died")
    assert attempt.cost.wall_s == pytest.approx(60, abs=2)
    assert attempt.cost.device_hours == pytest.approx(attempt.cost.wall_s / 3600)
    assert attempt.log_tail == "the last words\n"
    close_running(store, mae.key, "lost", "again")
    assert store.state(mae.key).attempts == [attempt]


def test_an_attempt_given_up_for_lost_cannot_be_closed_again(store: Store, mae: Stage):
    record = write_record(store, mae, status="running")
    close_running(store, mae.key, "lost", "its worker died")
    assert not store.close_attempt(record.model_copy(update={"status": "complete"}), time.time())
    (attempt,) = store.state(mae.key).attempts
    assert attempt.status == "lost"
    assert names(record_path(store, mae).parent) == ["record.json", "started.json"]


def test_a_run_that_ended_without_a_word_is_noted(store: Store):
    write_run(store, "a", status="running")
    write_run(store, "b")
    store.close_runs()
    assert [run.status for run in store.runs()] == ["lost", "complete"]


# ---------------------------------------------------------------------------- what a run has spent


def test_a_run_has_spent_what_its_attempts_held(store: Store, plan: Plan):
    mae, head, tune = stages = list(plan.stages.values())[:3]
    assert spent(stages, "this", {mae.key: 5.0}) == 0
    write_record(store, mae, run="another", wall_s=3600)
    write_record(store, mae, status="failed", run="this", wall_s=1800)
    write_record(store, head, run="this", wall_s=360)
    two = Cost(devices=2, device_kind="cpu", device_model="a CPU")
    write_record(store, tune, status="running", run="this", wall_s=900, cost=two)
    assess_all(plan, store)
    began = {tune.key: time.monotonic() - 900}
    assert spent(stages, "this", began) == pytest.approx(0.5 + 0.1 + 0.5, abs=1e-3)
    close_running(store, tune.key, "lost", "its worker died")
    assess_all(plan, store)
    assert spent(stages, "this", {}) == pytest.approx(1.1, abs=1e-3)


def test_a_run_with_nothing_to_do_reads_each_record_once(
    store: Store, plan: Plan, bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    for stage in plan.stages.values():
        write_record(store, stage)
    read, state = [], Store.state
    monkeypatch.setattr(Store, "state", lambda self, key: read.append(key) or state(self, key))
    assert bench("run", SMOKE, "--seeds", "1", "--store", store.root).code == 0
    assert sorted(read) == sorted(plan.stages)
