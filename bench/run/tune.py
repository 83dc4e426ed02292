"""Searches through Ray Tune: each trial is one cell of the search with one seed.

Tune decides which trial runs when; a trial asks the driver for its stages and waits for them. They
are stages like any other, run by the same worker groups and kept under their keys: what a cell
shares with others (the MAE, say) runs once, and a finished trial never runs again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from bench.plan.stage import Plan, Row
from bench.run import explore
from bench.store.store import Store

#: a resource that every cluster has once; trials hold a crumb of it, and so no core or GPU that
#: the worker groups need
_HEAD = {"node:__internal_head__": 0.001}
#: what a trial reports as its age
SEEDS = "seeds_done"
#: trials are light, waiting processes; more at once keep the worker groups busy
MAX_AT_ONCE = 8


@dataclass(frozen=True)
class Trial:
    """One cell with one seed; of a search that explores, with one seed after the other."""

    label: str
    #: setting -> name of its value
    parameters: dict[str, Any]
    #: for each seed the keys of what it lacks, and evaluation -> key
    seeds: list[tuple[list[str], dict[str, str]]]


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


def held(plan: Plan) -> set[str]:
    """Keys of the stages that wait until a trial asks for them."""
    return set(explore.of_cells(plan) if _explores(plan) else own_stages(plan))


def _explores(plan: Plan) -> bool:
    return plan.suite.search is not None and plan.suite.search.explores


def trials(plan: Plan) -> list[Trial]:
    """The cells that are not complete yet; of a search that explores, all."""
    own, found = own_stages(plan), []
    for index, row in enumerate(plan.rows):
        if row.variant.name not in plan.suite.cells or _explores(plan):
            continue
        todo = [s.key for s in row.stages() if own.get(s.key) == index and s.status != "cached"]
        if todo:
            parameters = _parameters(plan, row.variant.name) | {"seed": row.seed}
            found.append(Trial(row.variant.name, parameters, [(todo, _evaluations(row))]))
    for label in plan.suite.cells if _explores(plan) else []:
        rows = [row for row in plan.rows if row.variant.name == label]
        if rows:  # `--only` may leave it out
            seeds = [
                ([s.key for s in row.stages() if s.status != "cached"], _evaluations(row))
                for row in rows
            ]
            found.append(Trial(label, _parameters(plan, label), seeds))
    return found


def _parameters(plan: Plan, label: str) -> dict[str, Any]:
    return {path: choice.name for path, choice in plan.suite.cells[label].items()}


def _evaluations(row: Row) -> dict[str, str]:
    return {name: stage.key for name, stage in row.evaluations.items()}


def run_trial(config: dict[str, Any], trials: list[Trial], store: Store, board: Any) -> None:
    """One trial: ask for its stages, wait, report the evaluations' primary metrics.

    After each seed it reports their means so far; there ASHA may stop it.
    """
    trial = _trial(config, trials)
    values: dict[str, list[float]] = {}
    for number, (todo, evaluations) in enumerate(trial.seeds, 1):
        _wait_for(todo, board)
        for name, value in _metrics(evaluations, store).items():
            values.setdefault(name, []).append(value)
        means = {name: fmean(found) for name, found in values.items()}
        tune.report({SEEDS: number, **means})


def _trial(config: dict[str, Any], trials: list[Trial]) -> Trial:
    """The trial that Tune means: by its number, or by the settings that a searcher chose."""
    if "trial" in config:
        return trials[config["trial"]]
    return next(trial for trial in trials if trial.parameters == config["cell"])


def _wait_for(keys: list[str], board: Any) -> None:
    ray.get(board.want.remote(keys))
    states = ray.get(board.outcomes.remote(keys))
    failed = [state for state in states.values() if state != "complete"]
    if failed:
        raise RuntimeError(f"a stage of the trial ended: {failed[0]}")


def _metrics(evaluations: dict[str, str], store: Store) -> dict[str, float]:
    found = {}
    for name, key in evaluations.items():
        record = store.state(key).record
        for metric in record["metrics"] if record else []:
            if metric["primary"]:
                found[name] = metric["value"]
    return found


class Search(threading.Thread):
    """Runs the trials through a `Tuner`, beside the driver's loop."""

    def __init__(self, plan: Plan, wanted: int, store: Store, run_id: str, board: Any) -> None:
        super().__init__(daemon=True)
        assert plan.suite.search is not None
        self.plan, self.settings = plan, plan.suite.search
        self.todo = trials(plan)
        chosen = self.settings.method == "optuna"
        self.count = self.settings.samples or 1 if chosen else len(self.todo)
        self.at_once = min(self.count, max(MAX_AT_ONCE, wanted))
        self.store, self.run_id, self.board = store, run_id, board
        #: cell -> seeds that it came to
        self.seeds: dict[str, int] = {}
        self._failed: set[str] = set()
        self.problem: str | None = None

    def failed(self, labels: list[str]) -> str | None:
        """Why a stage that only these cells need cannot be had, if that is so."""
        failed = self._failed.issuperset(labels) or not self.settings.explores
        return "its trial ended early" if failed else None

    def run(self) -> None:
        try:
            results = self._tuner().fit()
            for index in range(len(results)):
                self._note(results[index])
        except Exception as error:  # the driver tells of it; the stages have records of their own
            self.problem = str(error) or repr(error)

    def _tuner(self) -> tune.Tuner:
        trainable = tune.with_parameters(
            run_trial, trials=self.todo, store=self.store, board=self.board
        )
        return tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([_HEAD])),
            param_space=self._space(),
            tune_config=self._config(),
            run_config=tune.RunConfig(
                name=f"{self.run_id}-tune", storage_path=str(self.store.root / "ray"), verbose=0
            ),
        )

    def _note(self, result: Any) -> None:
        label = _trial(result.config, self.todo).label
        if result.error is not None:
            self._failed.add(label)
        came_to = int((result.metrics or {}).get(SEEDS, 0))
        self.seeds[label] = max(came_to, self.seeds.get(label, 0))

    def _space(self) -> dict[str, Any]:
        if self.settings.method != "optuna":
            return {"trial": tune.grid_search(list(range(len(self.todo))))}
        axes: dict[str, dict[str, None]] = {}
        for trial in self.todo:
            for path, name in trial.parameters.items():
                axes.setdefault(path, {})[name] = None
        return {"cell": {path: tune.choice(list(names)) for path, names in axes.items()}}

    def _config(self) -> tune.TuneConfig:
        """How trials are chosen and stopped; a search that is to be reported runs every cell."""
        common: dict[str, Any] = {"max_concurrent_trials": self.at_once, "reuse_actors": True}
        if not self.settings.explores:
            return tune.TuneConfig(**common)
        variant = self.plan.suite.variants[self.todo[0].label]
        evaluation = variant.evaluations[self.settings.metric]
        primary = next(metric for metric in evaluation.metrics() if metric.primary)
        common |= {"metric": self.settings.metric}
        common |= {"mode": "max" if primary.higher_is_better else "min"}
        searcher = scheduler = None
        samples = 1
        if self.settings.method == "optuna":
            from ray.tune.search.optuna import OptunaSearch

            searcher, samples = OptunaSearch(seed=self.settings.seed), self.count
        if self.settings.asha:
            scheduler = ASHAScheduler(
                time_attr=SEEDS, max_t=max(len(trial.seeds) for trial in self.todo),
                grace_period=1, reduction_factor=self.settings.reduction,
            )  # fmt: skip
        return tune.TuneConfig(
            **common, search_alg=searcher, scheduler=scheduler, num_samples=samples
        )
