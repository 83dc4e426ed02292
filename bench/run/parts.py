"""An evaluation in parts: each worker takes a share of the test images, none gets one twice.

Knows nothing of Ray; whoever has other workers hands in a `Spread`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.store.store import Store
from bench.suite.evaluations import Evaluation, eval_input, metric_rows
from maect import evals

if TYPE_CHECKING:
    import torch

    from bench.run.worker import Task
    from maect.stages.job import Job


@dataclass(frozen=True)
class Part:
    """The result of an evaluation for some of the test images, and the processor's time for it."""

    result: evals.EvalResult
    cpu_s: float
    host: str


#: (task, number of parts) starts all parts but the first elsewhere; what it returns waits for them
Spread = Callable[["Task", int], Callable[[], list[Part]]]


@dataclass
class Evaluated:
    """An evaluation's result in the form of a stage's output."""

    tensors: dict[str, dict[str, Any]]
    documents: dict[str, Any]
    curves: dict[str, list[float]]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    protocol: dict[str, Any]


def job_of(task: Task, store: Store, device: torch.device) -> Job:
    """A task as maect's stages take it."""
    from maect.stages.job import Job

    weights = task.places.get("weights")
    data_root = task.places["data_root"]
    assert data_root is not None
    return Job(
        settings=task.settings,
        inputs={name: store.folder(key) for name, key in task.inputs.items()},
        data_root=Path(data_root),
        data_path=task.places["data_path"],
        weights=Path(weights).expanduser() if weights else None,
        device=device,
    )


def run_all(
    task: Task, store: Store, device: Any, workers: int, spread: Spread | None
) -> list[Part]:
    """All parts in the order of their images: one for each worker, if there is a way to others."""
    shares = 1
    if spread is not None and evals.get(task.kind).shardable:
        shares = len(evals.cut(task.data["counts"][task.settings["split"]], workers))
    wait = spread(task, shares) if spread is not None and shares > 1 else list
    return [run_part(task, store, device, 0, shares), *wait()]


def run_part(task: Task, store: Store, device: Any, part: int, parts: int) -> Part:
    """Part `part` of `parts`; the features are on the CPU, the encoder on `device`."""
    from safetensors.torch import load_file

    from maect import datasets
    from maect.parallel import make_deterministic
    from maect.settings import DataSettings

    began = time.process_time()
    make_deterministic(task.settings["numerics"]["threads"])
    evaluation = Evaluation.of(task.kind, task.settings)
    images = None
    if evaluation.evaluator.needs_encoder:
        from maect.stages.features import JobImages

        job = job_of(task, store, device)
        job.prepare()
        images = JobImages(job, task.settings["split"])
    data = DataSettings(name=task.data["name"], path=task.places["data_path"])
    given = eval_input(
        load_file(_features(task, store)),
        task.settings["split"],
        datasets.low_shot(data, Path(task.places["data_root"] or "")),
        task.settings.get("seed", 0),
        images,
    )
    rows = evals.cut(len(given.test.y), parts)[part] if parts > 1 else evals.ALL_ROWS
    result = evaluation.evaluator.run(given, evaluation.settings, rows)
    return Part(result, time.process_time() - began, platform.node())


def join(task: Task, store: Store, parts: list[Part]) -> Evaluated:
    """What the stage leaves."""
    import torch
    from safetensors import safe_open

    evaluation, split = Evaluation.of(task.kind, task.settings), task.settings["split"]
    with safe_open(_features(task, store), framework="pt") as file:
        labels = file.get_tensor(f"{split}_y")
    results = [part.result for part in parts]
    result = evals.merge(evaluation.evaluator, results, labels.numpy())
    predictions = {name: torch.from_numpy(array) for name, array in result.predictions.items()}
    return Evaluated(
        tensors={"predictions": {**predictions, "labels": labels}},
        documents={},
        curves={},
        summary={"chosen": result.chosen, "notes": result.notes},
        metrics=metric_rows(evaluation, result.values),
        protocol={
            **result.protocol,
            **evaluation.tokens,
            "evaluation": task.kind,
            "data": task.data["fingerprint"],
            "split": split,
        },
    )


def _features(task: Task, store: Store) -> Path:
    """The file of features that the task reads."""
    return store.folder(task.inputs["features"]) / "features.safetensors"
