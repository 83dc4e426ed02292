"""Searches that compare cells within a training stage, and stop them at a checkpoint there."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_helpers import SMOKE, completed, records, run_bench
from safetensors.torch import load_file

from bench.errors import UserError
from bench.plan.planner import make_plan
from bench.plan.stage import Plan
from bench.plan.status import search_identity
from bench.report.frames import build_view
from bench.run.scheduler import RunState
from bench.run.tune import measured_at, trials
from bench.run.worker import job_of, run_stage
from bench.store.record import Run
from bench.store.store import Store
from bench.suite.load import load_suite
from maect.stages.job import Output
from maect.stages.rung import measure
from reports.tables.costs import ledger

SUITE = """
suite: rungs
profile: tiny
profiles_from: {smoke}
seeds: [{seeds}]
evaluate: [knn]
variants:
  MAE-CT: {{stages: [mae, head, tune]}}
search:
  variant: MAE-CT
{stop}
  grid: {{tune.lr: [1e-2, 1e-3, 1e-5]}}
profiles:
  tiny: {{mae: {{steps: 20}}, tune: {{encoder_ema: 0.9}}}}
"""
STOP = "  asha: true\n  rungs: 2\n  reduction: 2"


def suite_of(tmp_path: Path, stop: str = STOP, seeds: str = "0") -> Path:
    path = tmp_path / "rungs.yaml"
    path.write_text(SUITE.format(smoke=SMOKE, stop=stop, seeds=seeds))
    return path


def run_here(plan: Plan, store: Store, kinds: str, until: int = 0, told: list | None = None):
    """Run stages of the first row in this process."""
    for stage in plan.rows[0].stages():
        if stage.kind in kinds.split():
            stage.until = until
            heard = [] if told is None else told
            run_stage(stage, store, "here", heard.append)


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Plan, Store]:
    """The store of a stage that stopped at both of its rungs."""
    store = Store(tmp_path / "store")
    store.create()
    plan = make_plan(load_suite(suite_of(tmp_path)), store)
    run_here(plan, store, "mae head")
    for until in (1, 2):
        run_here(plan, store, "tune", until)
    return make_plan(plan.suite, store), store


def test_a_stage_that_stops_at_rungs_ends_as_one_that_never_stops(stopped, tmp_path: Path):
    plan, store = stopped
    tune = plan.rows[0].chain[-1]
    assert [rung.step for rung in tune.rungs] == [5, 10]
    assert (tune.status, [a.status for a in tune.state.attempts]) == ("pending", ["stopped"] * 2)
    assert tune.reason is not None and tune.reason.startswith("stopped at step 10 of 20, k-NN")
    assert not list(store.folder(tune.key).glob("attempts/*/artifact"))
    assert {p.stem for p in store.checkpoints(tune.key).rglob("*.json")} == {"5", "10"}
    assert [measured_at(store, tune, rung) for rung in tune.rungs] == [
        attempt.primary.value for attempt in tune.state.attempts
    ]
    run_here(plan, store, "tune features knn")
    end = store.state(tune.key)
    assert end.record is not None
    assert end.record.summary["resumed_at"] == 10
    assert not store.checkpoints(tune.key).exists()
    # another store, in which the search never stops anything
    whole = Store(tmp_path / "whole")
    whole.create()
    straight = make_plan(load_suite(suite_of(tmp_path, "  method: grid")), whole)
    assert straight.rows[0].chain[-1].rungs == []
    run_here(straight, whole, "mae head tune features knn")
    for one, other in zip(plan.rows[0].stages(), straight.rows[0].stages(), strict=True):
        assert one.key == other.key
        mine, others = store.state(one.key).record, whole.state(one.key).record
        assert mine is not None and others is not None
        assert mine.file_hashes == others.file_hashes
        assert mine.metrics == others.metrics


def test_a_rung_measures_what_the_evaluations_would(stopped):
    """Of an encoder that has come to its end both are there."""
    plan, store = stopped
    run_here(plan, store, "tune features knn")
    row = plan.rows[0]
    knn, folder = row.evaluations["knn"], store.fetch(row.chain[-1].key)
    files = {name: load_file(folder / f"{name}.safetensors") for name in ("encoder", "encoder_ema")}
    alone = [replace(stage, inputs={}) for stage in (row.features, knn)]
    jobs = [job_of(stage, store, torch.device("cpu")) for stage in alone]
    record = store.state(knn.key).record
    assert record is not None
    told = {metric.name: metric.value for metric in record.metrics}
    assert measure(Output(tensors=files), *jobs) == told
    del files["encoder_ema"]
    assert measure(Output(tensors=files), *jobs) != told


def test_what_stopping_cost_and_spared_is_in_the_report(stopped):
    plan, store = stopped
    row = plan.rows[0]
    pruned = {s.key: "stopped at rung 2 of 2 by ASHA" for s in row.stages() if s.record is None}
    about = {"suite": "rungs", "profile": "tiny", "command": "", "started": "", "source": {}}
    counts = {"env": {}, "workers": 1, "stages": 9, "cached": 0}
    store.write_run(
        Run(id="1", search=search_identity(plan.suite), pruned=pruned, **about, **counts)
    )
    view = build_view(make_plan(plan.suite, store), store, "")
    told = ledger(view)
    lines = {line.label: line for line in told.lines}
    assert len(lines["Attempts stopped"].rows) == 2
    (spared,) = [text for text in told.sentences if "spared" in text]
    assert f"spared {row.chain[-1].flops / 2:.3g} FLOPs" in spared
    assert "2 rungs within the last training stage" in view.notes[-1]
    (stage,) = [s for s in view.stages.to_dicts() if s["key"] == row.chain[-1].key]
    assert (stage["status"], stage["reason"]) == ("pruned", "stopped at rung 2 of 2 by ASHA")
    # once it goes on to its end, all three attempts are what it cost
    run_here(plan, store, "tune")
    view = build_view(make_plan(plan.suite, store), store, "")
    assert "Attempts stopped" not in {line.label for line in ledger(view).lines}
    (stage,) = [s for s in view.stages.to_dicts() if s["key"] == row.chain[-1].key]
    attempts = store.state(stage["key"]).attempts
    assert stage["cpu_s"] == pytest.approx(sum(a.cost.cpu_s for a in attempts))


def test_a_stage_waits_at_a_rung_unless_a_trial_wants_more(tmp_path: Path):
    plan = make_plan(load_suite(suite_of(tmp_path)), None)
    *before, first = plan.rows[0].chain
    second = plan.rows[1].chain[-1]
    state = RunState(plan.stages, held={*plan.stages})
    for stage in (first, second):
        state.want([*(s.key for s in before), stage.key], 1)
    assert state.ready() == before[:1]
    state.done |= {stage.key for stage in before}
    assert {stage.key for stage in state.ready()} == {first.key, second.key}
    state.stop(first.key, 1)
    assert state.ready() == [second]
    state.want([first.key], 2)
    assert state.ready() == [second, first]  # the least far first
    assert state.stages[first.key].rung == first.rungs[1]
    state.want([second.key], 0)
    state.want([second.key], 1)  # another trial's wish does not stop it
    assert (first.rung, second.rung) == (first.rungs[1], None)
    state.stop(second.key, 1)
    assert state.ready() == [first, second]


def test_a_trial_knows_its_rungs_and_what_comes_before(tmp_path: Path):
    plan = make_plan(load_suite(suite_of(tmp_path, seeds="0, 1")), None)
    trial = trials(plan)[0]
    assert trial.within is plan.rows[0].chain[-1]
    assert trial.before == [stage.key for stage in plan.rows[0].chain]
    assert len(trial.steps) == 1  # then all seeds
    assert [copy.deepcopy(trial.within).rungs[0].step, plan.rows[1].chain[-1].rungs] == [5, []]


@pytest.mark.parametrize(
    ("stop", "says"),
    [
        ("  rungs: 2", "a grid that is reported runs every cell; add 'asha: true'"),
        ("  asha: true\n  rungs: 21", "rungs"),
        ("  asha: true\n  rungs: 5", "20 steps, too few for 5 rungs with reduction 2"),
        (f"{STOP}\n  metric: probe", "which 'evaluate' does not have"),
    ],
)
def test_rungs_that_cannot_be_are_told(stop: str, says: str, tmp_path: Path):
    path = suite_of(tmp_path, stop)
    with pytest.raises(UserError, match=r"rungs\.yaml") as told:
        make_plan(load_suite(path), None)
    assert says in str(told.value)


def test_cells_that_train_alike_or_not_at_all_have_no_rungs(tmp_path: Path):
    path = suite_of(tmp_path)
    text = path.read_text().replace("tune.lr: [1e-2, 1e-3, 1e-5]", "evaluations.knn.k: [[5], [7]]")
    path.write_text(text)
    with pytest.raises(UserError, match="trains like another cell"):
        make_plan(load_suite(path), None)
    path.write_text(text.replace("stages: [mae, head, tune]", "init: random"))
    with pytest.raises(UserError, match="has none; take rungs out"):
        load_suite(path)


@pytest.mark.slow
def test_a_sweep_with_rungs_stops_cells_which_a_grid_then_ends(tmp_path: Path):
    store = tmp_path / "store"
    done = run_bench("sweep", suite_of(tmp_path), "--store", store)
    assert done.code == 0, done
    tuned = [record for record in completed(store).values() if record["kind"] == "tune"]
    assert 1 <= len(tuned) < 3
    text = " ".join(done.out.split())
    assert f"3 of 3 cells were tried, {3 - len(tuned)} of them stopped early" in text
    assert "stopped at step 5 of 20, k-NN" in text
    assert "Stopping early spared" in text
    again = run_bench("plan", suite_of(tmp_path), "--store", store, "--json")
    assert {stage["status"] for stage in json.loads(again.out)["stages"]} == {"cached", "pruned"}
    done = run_bench("sweep", suite_of(tmp_path, "  method: grid"), "--store", store)
    assert done.code == 0, done
    tuned = [record for record in completed(store).values() if record["kind"] == "tune"]
    assert len(tuned) == 3
    assert {record["summary"]["resumed_at"] for record in tuned} <= {5, 10}
    statuses = [a["status"] for attempts in records(store).values() for a in attempts]
    assert {*statuses} == {"complete", "stopped"}
