"""Stages of smoke.yaml as jobs, without Ray: what the tests of training share."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.plan.planner import Stage, make_plan
from bench.run.worker import run_stage
from bench.store.store import Store
from bench.suite.load import load_suite
from maect.stages.job import Job, State
from maect.stages.loop import Training

SUITE = Path(__file__).parents[2] / "suites" / "smoke.yaml"
TRAININGS = {"mae": "MAETraining", "head": "HeadTraining", "tune": "TuneTraining"}


def chain(store: Store, sets: Iterable[str] = (), variant: str = "MAE-CT_aug") -> list[Stage]:
    """MAE, head and tuning of seed 0."""
    plan = make_plan(load_suite(SUITE, seeds=1, sets=[*sets]), store)
    return next(row for row in plan.rows if row.variant.name == variant).chain


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
    module = importlib.import_module(f"maect.stages.{stage.kind}")
    training: Training = getattr(module, TRAININGS[stage.kind])(job_of(stage, inputs, device))
    return training
