"""Searches through Ray Tune: each trial is one cell of the search with one seed.

Tune decides which trial runs when; a trial asks the driver for its stages and waits for them. They
are stages like any other, run by the same worker groups and kept under their keys: what a cell
shares with others (the MAE, say) runs once, and a finished trial never runs again.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from bench.plan import Plan
from bench.store import Store

#: a resource that every cluster has once; trials hold a crumb of it, and so no core or GPU that
#: the worker groups need
_HEAD = {"node:__internal_head__": 0.001}
_POLL_S = 0.2
#: trials are light, waiting processes; more at once keep the worker groups busy
MAX_AT_ONCE = 8


@dataclass(frozen=True)
class Trial:
    """One cell with one seed."""

    parameters: dict[str, Any]
    #: keys of the stages that belong to this trial alone
    stages: list[str]
    #: evaluation -> key
    evaluations: dict[str, str]


def own_stages(plan: Plan) -> dict[str, int]:
    """Keys of the stages that belong to one cell alone, with the index of its row."""
    uses: dict[str, list[int]] = {}
    for index, row in enumerate(plan.rows):
        for stage in row.stages():
            uses.setdefault(stage.key, []).append(index)
    cells = plan.suite.cells
    return {
        key: rows[0]
        for key, rows in uses.items()
        if len(rows) == 1 and plan.rows[rows[0]].variant.name in cells
    }


def trials(plan: Plan) -> list[Trial]:
    """The cells that are not complete yet."""
    own, found = own_stages(plan), []
    for index, row in enumerate(plan.rows):
        todo = [s.key for s in row.stages() if own.get(s.key) == index and s.status != "cached"]
        if todo:
            cell = plan.suite.cells[row.variant.name]
            parameters = {path: choice.name for path, choice in cell.items()} | {"seed": row.seed}
            evaluations = {name: stage.key for name, stage in row.evaluations.items()}
            found.append(Trial(parameters, todo, evaluations))
    return found


def run_trial(config: dict[str, Any], store: Store, board: Any) -> None:
    """One trial: ask for its stages, wait, report the evaluations' primary metrics."""
    trial: Trial = config["trial"]
    ray.get(board.want.remote(trial.stages))
    while True:
        states = ray.get(board.outcomes.remote(trial.stages))
        failed = [state for state in states.values() if state != "complete"]
        if failed:
            raise RuntimeError(f"a stage of the trial ended: {failed[0]}")
        if len(states) == len(trial.stages):
            break
        time.sleep(_POLL_S)
    tune.report(_metrics(trial, store))


def _metrics(trial: Trial, store: Store) -> dict[str, float]:
    found = {}
    for name, key in trial.evaluations.items():
        record = store.state(key).record
        for metric in record["metrics"] if record else []:
            if metric["primary"]:
                found[name] = metric["value"]
    return found


class Search(threading.Thread):
    """Runs the trials through a `Tuner`, beside the driver's loop."""

    def __init__(
        self, todo: list[Trial], at_once: int, store: Store, run_id: str, board: Any
    ) -> None:
        super().__init__(daemon=True)
        self.todo, self.at_once, self.store = todo, at_once, store
        self.run_id, self.board = run_id, board
        self.problem: str | None = None

    def run(self) -> None:
        trainable = tune.with_parameters(run_trial, store=self.store, board=self.board)
        tuner = tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([_HEAD])),
            param_space={"trial": tune.grid_search(self.todo)},
            tune_config=tune.TuneConfig(max_concurrent_trials=self.at_once, reuse_actors=True),
            run_config=tune.RunConfig(
                name=f"{self.run_id}-tune", storage_path=str(self.store.root / "ray"), verbose=0
            ),
        )
        try:
            tuner.fit()
        except Exception as error:  # the driver tells of it; the stages have records of their own
            self.problem = str(error) or repr(error)
