"""A clock that is set while a run goes on: dates move with it, durations and costs do not."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from bench_helpers import SMOKE, write_record

from bench.plan.planner import make_plan
from bench.plan.stage import Stage
from bench.plan.status import assess
from bench.run import driver
from bench.run.driver import RunOptions
from bench.run.recovery import close_running
from bench.run.worker import run_stage
from bench.store.record import Cost
from bench.store.store import Store
from bench.suite.load import load_suite

HOUR = 3600.0


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the wall clock by so many seconds; the monotonic one goes on."""
    real = time.time

    def change(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + seconds)

    return change


def pixels(store: Store) -> Stage:
    plan = make_plan(load_suite(SMOKE, seeds=1), store)
    return next(s for s in plan.stages.values() if s.title == "raw pixels features")


@pytest.mark.parametrize("by", [-HOUR, HOUR], ids=["back", "ahead"])
@pytest.mark.parametrize("ends", ["complete", "lost"])
def test_an_attempt_costs_what_it_took(
    by: float, ends: str, store: Store, set_clock: Callable[[float], None]
):
    stage, began = pixels(store), time.monotonic()

    if ends == "lost":
        write_record(store, stage, status="running", wall_s=0)
        set_clock(by)
        close_running(store, stage.key, "lost", "its worker died", time.monotonic() - began)
    else:
        run_stage(stage, store, "run", lambda event: set_clock(by))
    (attempt,) = store.state(stage.key).attempts
    assert attempt.status == ends
    assert attempt.cost.wall_s is not None
    assert 0 <= attempt.cost.wall_s <= time.monotonic() - began
    assert attempt.ended is not None
    assert attempt.started <= attempt.ended


@pytest.mark.parametrize("by", [-HOUR, HOUR], ids=["back", "ahead"])
def test_a_run_took_what_it_took(by: float, store: Store, set_clock: Callable[[float], None]):
    plan = make_plan(load_suite(SMOKE, seeds=1), store)
    with store.leases.driving(), driver._recorded(plan, store, RunOptions()):
        set_clock(by)
    (run,) = store.runs()
    assert run.wall_s is not None
    assert 0 <= run.wall_s < 60
    assert run.ended is not None
    assert run.started <= run.ended


@pytest.mark.parametrize("by", [-HOUR, HOUR], ids=["back", "ahead"])
def test_a_budget_is_spent_by_the_time_that_passes(
    by: float, store: Store, set_clock: Callable[[float], None]
):
    stage, began = pixels(store), time.monotonic() - 90.0
    held = Cost(devices=2, device_kind="cpu", device_model="a CPU")
    write_record(store, stage, status="running", run="this", wall_s=0, cost=held)
    set_clock(by)
    assess(stage, store)
    spent = driver.spent([stage], "this", {stage.key: began})
    assert spent == pytest.approx(2 * 90 / 3600, rel=0.05)
