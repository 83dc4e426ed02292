"""Stages of smoke.yaml as jobs, without Ray: what the tests of training share."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from bench.plan.planner import Stage, make_plan
from bench.run.worker import run_stage
from bench.store.store import Store
from bench.suite.load import load_suite
from maect import methods
from maect.stages.job import Job, State
from maect.stages.loop import Training

SUITE = Path(__file__).parents[2] / "suites" / "smoke.yaml"
SUCCESSORS = SUITE.with_name("successors.yaml")
#: the stages of MAE-CT
TRAININGS = ("mae", "head", "tune")


def chain(store: Store, sets: Iterable[str] = (), variant: str = "MAE-CT_aug") -> list[Stage]:
    """MAE, head and tuning of seed 0."""
    plan = make_plan(load_suite(SUITE, seeds=1, sets=[*sets]), store)
    return next(row for row in plan.rows if row.variant.name == variant).chain


@cache
def successors() -> dict[str, Stage]:
    """The training stages of successors.yaml's smallest profile, by kind."""
    suite = load_suite(SUCCESSORS, profile="tiny", seeds=1)
    plan = make_plan(suite, None)
    return {stage.kind: stage for stage in plan.stages.values() if stage.trains}


def successor_kinds() -> list[str]:
    """All training stages but those of MAE-CT."""
    return sorted({*successors()} - {*TRAININGS})


def successor_stage(kind: str, steps: int, *, inputs: bool = False) -> Stage:
    """A stage of so many steps, without those before it unless `inputs`."""
    stage = copy.deepcopy(successors()[kind])
    stage.flops *= steps / (stage.steps or 1)
    stage.settings["train"]["steps"] = stage.steps = steps
    if not inputs:
        stage.inputs.clear()
    return stage


def trained_inputs(root: Path) -> dict[str, Path]:
    """Folders of an encoder and a head that were trained for a few steps."""
    store = Store(root)
    store.create()
    stages = chain(store, ["mae.steps=5", "head.steps=3"])
    for stage in stages[:2]:
        run_stage(stage, store, "test", lambda event: None)
    return {"encoder": store.fetch(stages[0].key), "head": store.fetch(stages[1].key)}


def job_of(stage: Stage, inputs: dict[str, Path], device: str = "cpu") -> Job:
    return Job(
        settings=stage.settings,
        inputs={name: inputs[name] for name in stage.inputs},
        data_root=Path(stage.places["data_root"] or ""),
        kind=stage.kind,
        device=torch.device(device),
    )


class CutOff(Exception):
    """Stands for the death of a process."""


class Cutting:
    """Keeps the state after `at` steps, then ends the training."""

    def __init__(self, at: int) -> None:
        self.at, self.kept, self.asked = at, None, 0

    def load(self) -> State | None:
        return None

    def due(self) -> bool:
        self.asked += 1
        return self.asked == self.at

    def save(self, state: State) -> None:
        self.kept = state
        raise CutOff


class Kept(Cutting):
    """Offers a kept state, and keeps nothing itself."""

    def __init__(self, state: State) -> None:
        super().__init__(at=-1)
        self.kept = state

    def load(self) -> State | None:
        return self.kept


def training_of(stage: Stage, inputs: dict[str, Path], device: str = "cpu") -> Training:
    """The stage, ready to take its steps."""
    entry = importlib.import_module(methods.get(stage.kind).entry)
    training: Training = entry.training(job_of(stage, inputs, device))
    return training
