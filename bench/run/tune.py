"""Searches through Ray Tune: each trial is one cell of the search.

Tune decides which trial runs when; a trial asks the driver for its stages and waits for them. They
are stages like any other, run by the same worker groups and kept under their keys: what a cell
shares with others (the MAE, say) runs once, and a finished trial never runs again.

A trial asks for all of its seeds at once, unless the search explores. Then cells compete on the
selection split, seed after seed: after each the search goes on with some and stops others. With
rungs they compete within the first seed's last training stage instead. It stops at a checkpoint at
each rung, so that no device waits for a decision, and goes on from there if its cell does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from bench.plan.stage import Plan, Row, Rung, Stage
from bench.plan.status import UNTRIED
from bench.run.cluster import Cluster
from bench.run.mailbox import Wanted, at_rung
from bench.store.store import Store
from bench.suite.schema import SearchSettings

#: a resource that every cluster has once; trials hold a crumb of it, and so no core or GPU that
#: the worker groups need
_HEAD = {"node:__internal_head__": 0.001}
#: what a trial reports as its age
STEPS = "steps_done"
#: trials are light, waiting processes; more at once keep the worker groups busy
MAX_AT_ONCE = 8


@dataclass(frozen=True)
class Trial:
    """One cell, in one step, or in one for each seed where the search explores."""

    label: str
    #: setting -> name of its value
    parameters: dict[str, Any]
    #: for each step the keys of what it lacks, and the evaluations: (name, key)
    steps: list[tuple[list[str], list[tuple[str, str]]]]
    #: the stage within which cells are compared before, and what that needs
    within: Stage | None = None
    before: list[str] = field(default_factory=list)


def of_cells(plan: Plan) -> dict[str, set[str]]:
    """Return key -> names of the cells that need it, of the stages that only cells need.

    These stages wait until a trial asks for them.
    """
    names: dict[str, set[str]] = {}
    for row in plan.rows:
        for stage in row.stages():
            names.setdefault(stage.key, set()).add(row.variant.name)
    return {key: labels for key, labels in names.items() if labels <= plan.suite.cells.keys()}


def trials(plan: Plan) -> list[Trial]:
    """Return a trial for each cell that is not complete yet; where a search explores, for all."""
    found = []
    for label, cell in plan.suite.cells.items():
        rows = [row for row in plan.rows if row.variant.name == label]  # `--only` may leave it out
        within = next((s for row in rows for s in row.chain if s.rungs), None)
        by_seed = plan.suite.explores and within is None
        steps = [_step([row]) for row in rows] if by_seed else [_step(rows)]
        if rows and (plan.suite.explores or steps[0][0]):
            parameters = {path: choice.name for path, choice in cell.items()}
            before = [stage.key for stage in rows[0].chain]
            found.append(Trial(label, parameters, steps, within, before))
    return found


def _step(rows: list[Row]) -> tuple[list[str], list[tuple[str, str]]]:
    todo = {s.key: None for row in rows for s in row.stages() if s.status != "cached"}
    return list(todo), [(n, stage.key) for row in rows for n, stage in row.evaluations.items()]


# --------------------------------------------------------------------------- in a trial's process


def run_trial(
    config: dict[str, Any],
    trials: list[Trial],
    store: Store,
    mailbox: Any,
    settings: SearchSettings,
) -> None:
    """Ask for a trial's stages, wait, and report the evaluations' primary metrics.

    After each rung it reports the one that the search goes by, after each step their means so far;
    there ASHA may stop it. Raises RuntimeError where a stage does not complete.
    """
    trial, values = _trial(config, trials), dict[str, list[float]]()
    stage = trial.within

    def wait_for(names: Iterable[str]) -> None:
        how = ray.get(mailbox.outcomes.remote([*names]))
        failed = [why for why in how.values() if why != "complete"]
        if failed:
            raise RuntimeError(f"a stage of the trial ended: {failed[0]}")

    for number, rung in enumerate(stage.rungs if stage else (), 1):
        assert stage is not None
        found = measured_at(store, stage, rung)
        if found is None and stage.status != "cached":
            mailbox.tell.remote(Wanted((*trial.before, stage.key), number))
            wait_for([at_rung(stage.key, number)])
            found = measured_at(store, stage, rung)
        if found is not None:
            tune.report({STEPS: age_at(number, settings), settings.metric: found})
    for number, (todo, evaluations) in enumerate(trial.steps, len(stage.rungs) + 1 if stage else 1):
        mailbox.tell.remote(Wanted(tuple(todo)))
        wait_for(todo)
        for name, key in evaluations:
            record = store.state(key).record
            if record is not None and record.primary is not None:
                values.setdefault(name, []).append(record.primary.value)
        age = age_at(number, settings) if stage else number
        tune.report({STEPS: age, **{name: fmean(found) for name, found in values.items()}})


def age_at(rung: int, settings: SearchSettings) -> float:
    """Return the age of a trial at a rung: 1 at the first one, where ASHA's milestones are too."""
    return settings.reduction ** (rung - 1)


def measured_at(store: Store, stage: Stage, rung: Rung) -> float | None:
    """Return what a stage measured at a rung under its code; None, too, where it was past it."""
    for attempt in store.state(stage.key).attempts:
        told = (attempt.code.hash, attempt.summary.get("rung"), attempt.summary.get("stopped_at"))
        if told == (stage.code.hash, rung.evaluation.key, rung.step) and attempt.primary:
            return attempt.primary.value
    return None


def _trial(config: dict[str, Any], trials: list[Trial]) -> Trial:
    """Return the trial that Tune means: by its number, or by the settings a searcher chose."""
    if "trial" in config:
        return trials[config["trial"]]
    return next(trial for trial in trials if trial.parameters == config["cell"])


# ------------------------------------------------------------------------ in the driver's process


class Search(threading.Thread):
    """Runs the trials through a `Tuner`, beside the driver's loop."""

    def __init__(
        self, plan: Plan, wanted: int, store: Store, run_id: str, cluster: Cluster
    ) -> None:
        super().__init__(daemon=True)
        assert plan.suite.search is not None
        self.plan, self.settings = plan, plan.suite.search
        self.todo = trials(plan)
        chosen = self.settings.method == "optuna"
        self.count = self.settings.samples or 1 if chosen else len(self.todo)
        self.at_once = min(self.count, max(MAX_AT_ONCE, wanted))
        self.store, self.run_id, self.cluster = store, run_id, cluster
        self._users = of_cells(plan)
        #: cell -> seeds that it came to, or rungs
        self._seeds: dict[str, int] = {}
        self._failed: set[str] = set()
        self._problem: str | None = None

    def why_failed(self, key: str) -> str | None:
        """Return why a stage failed that the ended search never asked for; None if none did."""
        if self._problem is not None:
            return self._problem
        failed = self._failed.issuperset(self._users[key]) or not self.settings.explores
        return "its trial ended early" if failed else None

    def why_left_out(self, key: str) -> str:
        """Return why an exploring search did without a stage."""
        most = max((self._seeds.get(label, 0) for label in self._users[key]), default=0)
        if not most:
            return UNTRIED
        if self.settings.rungs:
            return f"stopped at rung {most} of {self.settings.rungs} by ASHA, others did better"
        return (
            f"stopped after {most} of {len(self.plan.suite.seeds)} seeds by ASHA, others did better"
        )

    def run(self) -> None:
        """Run all trials; what goes wrong is told by `why_failed`."""
        try:
            results = self._tuner().fit()
            for index in range(len(results)):
                result: Any = results[index]
                label = _trial(result.config, self.todo).label
                if result.error is not None:
                    self._failed.add(label)
                # its reports: one for each rung or seed
                came_to = int((result.metrics or {}).get("training_iteration", 0))
                self._seeds[label] = max(came_to, self._seeds.get(label, 0))
        except Exception as error:  # the driver tells of it; the stages have records of their own
            self._problem = str(error) or repr(error)

    def _tuner(self) -> tune.Tuner:
        given = {"trials": self.todo, "store": self.store, "mailbox": self.cluster.mailbox}
        trainable = tune.with_parameters(run_trial, settings=self.settings, **given)
        return tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([_HEAD])),
            param_space=self._space(),
            tune_config=self._config(),
            run_config=tune.RunConfig(
                name=f"{self.run_id}-tune", storage_path=str(self.store.root / "ray"), verbose=0
            ),
        )

    def _space(self) -> dict[str, Any]:
        """Return what Tune draws from: trials by number, or for Optuna the settings themselves."""
        if self.settings.method != "optuna":
            return {"trial": tune.grid_search(list(range(len(self.todo))))}
        axes: dict[str, dict[str, None]] = {}
        for trial in self.todo:
            for path, name in trial.parameters.items():
                axes.setdefault(path, {})[name] = None
        return {"cell": {path: tune.choice(list(names)) for path, names in axes.items()}}

    def _config(self) -> tune.TuneConfig:
        """Return how trials are chosen and stopped; those of a grid all run to their end."""
        common: dict[str, Any] = {"max_concurrent_trials": self.at_once, "reuse_actors": True}
        if not self.settings.explores:
            return tune.TuneConfig(**common)
        variant = self.plan.suite.variants[self.todo[0].label]
        evaluation = variant.evaluations[self.settings.metric]
        primary = next(metric for metric in evaluation.metrics() if metric.primary)
        searcher = scheduler = None
        samples = 1
        if self.settings.method == "optuna":
            from ray.tune.search.optuna import OptunaSearch

            searcher, samples = OptunaSearch(seed=self.settings.seed), self.count
        if self.settings.asha:
            rungs, seeds = self.settings.rungs, max(len(trial.steps) for trial in self.todo)
            end: Any = age_at(rungs + 1, self.settings) if rungs else seeds
            scheduler = ASHAScheduler(
                time_attr=STEPS,
                max_t=end,
                grace_period=1,
                reduction_factor=self.settings.reduction,
            )
        return tune.TuneConfig(
            **common,
            metric=self.settings.metric,
            mode="max" if primary.higher_is_better else "min",
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=samples,
        )
