"""Stages of smoke.yaml as jobs, without Ray: what the tests of training share."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

from bench.plan.planner import Stage, make_plan
from bench.run.worker import run_stage
from bench.store.store import Store
from bench.suite.load import load_suite
from maect.stages.job import Job
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
    return {"encoder": store.folder(stages[0].key), "head": store.folder(stages[1].key)}


def job_of(stage: Stage, inputs: dict[str, Path]) -> Job:
    return Job(
        settings=stage.settings,
        inputs={name: inputs[name] for name in stage.inputs},
        data_root=Path(stage.places["data_root"] or ""),
    )


def training_of(stage: Stage, inputs: dict[str, Path]) -> Training:
    """The stage, ready to take its steps."""
    module = importlib.import_module(f"maect.stages.{stage.kind}")
    training: Training = getattr(module, TRAININGS[stage.kind])(job_of(stage, inputs))
    return training
