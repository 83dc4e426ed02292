"""Which stage runs next: pure state, no Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from bench_helpers import write_record

from bench.plan.stage import Plan, Stage
from bench.run.driver import RunOptions, _Driver
from bench.run.scheduler import MAX_LOST, Scheduler
from bench.store.store import Store
from maect.datasets import DataInfo

DATA = DataInfo("digits", (1, 8, 8), 10, {"train": 8}, "fingerprint", "here", (0.5,), (0.5,))
#: stage -> its inputs and its FLOPs
GRAPH: dict[str, tuple[list[str], float]] = {
    "mae": ([], 40.0),
    "long mae": ([], 90.0),
    "head": (["mae"], 20.0),
    "tune": (["mae", "head"], 40.0),
    "features": (["tune"], 1.0),
    "knn": (["features"], 0.0),
    "probe": (["features"], 2.0),
}


def make_stages() -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    for name, (inputs, flops) in GRAPH.items():
        stages[name] = Stage(
            kind=name.split()[-1],
            key=name.replace(" ", "-"),
            title=name,
            settings={},
            inputs={source: stages[source] for source in inputs},
            data=DATA,
            places={},
            code={"hash": "code", "modules": {}},
            flops=flops,
        )
    return stages


class Run:
    """A scheduler over the graph, driven by names."""

    def __init__(self, root: Path, cached: tuple[str, ...] = (), **options: Any) -> None:
        self.store = Store(root)
        self.store.create()
        self.stages = make_stages()
        for name in cached:
            write_record(self.store, self.stages[name])
            self.stages[name].status = "cached"
            self.stages[name].state = self.store.state(self.stages[name].key)
        self.ends: list[tuple[str, str]] = []
        plan = Plan(cast(Any, None), [], {s.key: s for s in self.stages.values()}, DATA)
        self.scheduler = Scheduler(plan, self.store, **options)
        self.scheduler.on_end = lambda stage, state: self.ends.append((stage.title, state))

    def ready(self) -> list[str]:
        return [stage.title for stage in self.scheduler.ready()]

    def begin(self, name: str) -> None:
        self.scheduler.begin(self.stages[name])

    def complete(self, name: str, content: bytes = b"weights") -> None:
        write_record(self.store, self.stages[name], content=content)
        self.scheduler.complete(self.stages[name])

    def fail(self, name: str) -> None:
        self.scheduler.fail(self.stages[name], "NaN")

    def lose(self, name: str) -> None:
        self.scheduler.lose(self.stages[name], "killed")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_the_longest_path_comes_first(run: Run):
    # 40 + 20 + 40 + 1 + 2 lie behind `mae`, more than the 90 of `long mae`
    assert run.ready() == ["mae", "long mae"]
    run.begin("mae")
    run.complete("mae")
    assert run.ready() == ["long mae", "head"]


def test_a_stage_waits_for_all_its_inputs(run: Run):
    run.begin("mae")
    assert run.ready() == ["long mae"]
    run.complete("mae")
    run.begin("head")
    assert run.ready() == ["long mae"]
    run.complete("head")
    assert run.ready() == ["long mae", "tune"]
    run.complete("tune")
    run.complete("features")
    assert run.ready() == ["probe", "knn", "long mae"]  # evaluations come before training


def test_a_run_ends_when_every_stage_has_ended(run: Run):
    order = []
    while not run.scheduler.finished:
        name = run.ready()[0]
        run.begin(name)
        order.append(name)
        run.complete(name)
    assert order == ["mae", "long mae", "head", "tune", "features", "probe", "knn"]
    assert run.ends == [(name, "complete") for name in order]
    assert run.ready() == []
    assert run.scheduler.left() == []


def test_a_failure_takes_its_descendants_only(run: Run):
    run.begin("mae")
    run.complete("mae")
    run.begin("head")
    run.fail("head")
    failed = run.scheduler.failed
    assert failed["head"] == "NaN"
    assert failed["tune"] == "its input failed: head"
    assert set(failed) == {"head", "tune", "features", "knn", "probe"}
    assert run.ready() == ["long mae"]
    assert not run.scheduler.finished
    run.complete("long mae")
    assert run.scheduler.finished
    assert [name for name, state in run.ends if state == "failed"] == [
        "head", "tune", "features", "knn", "probe"
    ]  # fmt: skip


def test_a_failed_evaluation_leaves_its_sisters_alone(tmp_path: Path):
    run = Run(tmp_path, cached=("mae", "long mae", "head", "tune", "features"))
    assert run.ready() == ["probe", "knn"]
    run.fail("probe")
    assert run.ready() == ["knn"]


def test_no_complete_record_is_a_failure(run: Run):
    run.begin("long mae")
    run.scheduler.complete(run.stages["long mae"])
    assert run.scheduler.failed == {"long-mae": "it left no complete record"}


def test_a_lost_worker_is_replaced_but_not_for_ever(run: Run):
    for time in range(1, MAX_LOST + 1):
        run.begin("mae")
        assert run.ready() == ["long mae"]
        run.lose("mae")
        assert run.ready() == ["mae", "long mae"]
        assert run.scheduler.lost["mae"] == time
        assert not run.scheduler.failed
    run.begin("mae")
    run.lose("mae")
    assert "its worker died 4 times: killed" in run.scheduler.failed["mae"]
    assert set(run.scheduler.failed) == {"mae", "head", "tune", "features", "knn", "probe"}


def test_a_loss_counts_for_its_own_stage(run: Run):
    for _ in range(MAX_LOST):
        run.lose("mae")
        run.lose("long mae")
    assert not run.scheduler.failed


def test_cached_stages_do_not_run(tmp_path: Path):
    run = Run(tmp_path, cached=("mae", "head"))
    assert run.ready() == ["long mae", "tune"]
    assert len(run.scheduler.left()) == 5


def test_equal_weights_again_spare_what_builds_on_them(tmp_path: Path):
    """`mae` was set aside and is made again with the same content: `head` is still good."""
    run = Run(tmp_path, cached=("mae", "head"))
    store, stages = run.store, run.stages
    store.set_aside(store.state("mae"), "damaged")
    for name in ("mae", "head"):
        stages[name].status = "pending"
    scheduler = Scheduler(run.scheduler.plan, store)
    assert [s.title for s in scheduler.ready()] == ["mae", "long mae"]
    write_record(store, stages["mae"])
    scheduler.complete(stages["mae"])
    assert [s.title for s in scheduler.ready()] == ["long mae", "tune"]


def test_other_weights_do_not_spare_it(tmp_path: Path):
    run = Run(tmp_path, cached=("mae", "head"))
    store, stages = run.store, run.stages
    store.set_aside(store.state("mae"), "damaged")
    for name in ("mae", "head"):
        stages[name].status = "pending"
    scheduler = Scheduler(run.scheduler.plan, store)
    write_record(store, stages["mae"], content=b"other weights")
    scheduler.complete(stages["mae"])
    assert [s.title for s in scheduler.ready()] == ["long mae", "head"]


def test_a_stage_given_to_a_group_that_has_died_is_tried_again(tmp_path: Path):
    """What a dead worker asked for in its life may still be answered."""
    run = Run(tmp_path)
    driver = _Driver(run.scheduler.plan, run.store, RunOptions(), run.scheduler, {"id": "run"})
    driver.groups = cast(Any, SimpleNamespace(gone={1}))
    driver._event(run.stages["mae"], {"state": "taken", "group": 2})
    driver._event(run.stages["long mae"], {"state": "taken", "group": 1})
    assert driver.group_of == {2: "mae"}
    assert run.scheduler.running == {"mae"}
    assert run.scheduler.lost == {"long-mae": 1}
    assert run.ready() == ["long mae"]
