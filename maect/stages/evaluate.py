"""An evaluation of stored features, on the device that its worker holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maect import datasets, evals
from maect.datasets import DataError, lists
from maect.datasets.splits import selection_rows
from maect.evals.base import labels_of
from maect.settings import DataSettings
from maect.stages.job import Job, Output


def run(job: Job) -> Output:
    """Leave `predictions` with the `labels` of the reported split; values and protocol."""
    job.prepare()
    return evaluate(job, job.tensors("features", "features"))


def evaluate(
    job: Job, features: Mapping[str, Tensor], images: evals.Images | None = None
) -> Output:
    """Return what an evaluation of the tensors of a features stage leaves.

    `images` are those behind the features, for an evaluation that asks for the encoder.
    """
    tokens = job.settings.get("tokens", {})
    evaluator = evals.get(job.kind)
    if isinstance(tokens.get("block"), list):
        evaluator = evals.at_blocks(evaluator, tokens["block"])
    split, settings = job.settings["split"], evaluator.settings.parse(job.settings["settings"])
    counts = {name[:-2]: len(y) for name, y in features.items() if name.endswith("_y")}
    evaluator.require_images(split, counts)
    # features of several blocks [N, K, D] go to the device block by block
    on_device = {n: t if t.ndim == 3 else t.to(job.device) for n, t in features.items()}
    labelled = _labelled(job) if "budgets" in job.settings["settings"] else {}
    given = eval_input(on_device, split, labelled, job.seed, images)
    result = evaluator.run(given, settings)
    draws = evaluator.by_draw(result.predictions, labels_of(given.test.y))
    predictions = {name: torch.from_numpy(array) for name, array in result.predictions.items()}
    return Output(
        tensors={"predictions": {**predictions, "labels": given.test.y.cpu()}},
        summary={
            "chosen": result.chosen,
            "notes": result.notes,
            **({"draws": draws} if draws else {}),
        },
        values=result.values,
        protocol={
            **result.protocol,
            **({"tokens": tokens} if tokens else {}),
            **({"lists": job.settings["lists"]} if "lists" in job.settings else {}),
            "evaluation": job.kind,
            "split": split if split == "test" else "selection, the half that chose nothing",
        },
    )


def _labelled(job: Job) -> dict[str, list[np.ndarray]]:
    """Return the labelled images by budget, rows of the train split. Raises DataError."""
    settings = job.settings
    data = DataSettings(
        name=job.data_name,  # type: ignore[arg-type]
        path=job.data_path,
        selection=settings.get("selection"),
        low_shot=job.lists,
        max_broken=1.0,  # checked when the features were made
    )
    if job.lists is not None and lists.checksum(job.lists) != settings["lists"]:
        raise DataError(f"the lists in {job.lists} are not those that were planned with")
    return datasets.low_shot(data, job.data_root)


def eval_input(
    tensors: Mapping[str, Tensor],
    reported: str,
    low_shot: Mapping[str, Any],
    seed: int,
    images: evals.Images | None = None,
) -> evals.EvalInput:
    """Return what an evaluation reads of a features stage's tensors; it reports on `reported`."""
    rows = selection_rows(reported, len(tensors["selection_y"]))
    splits = {
        name: evals.Features(
            *(tensors[f"{source}_{part}"][rows.get(name, slice(None))] for part in "xy")
        )
        for name, source in (("train", "train"), ("selection", "selection"), ("test", reported))
    }
    return evals.EvalInput(
        **splits,
        classes=max(int(split.y.max()) for split in splits.values() if len(split.y)) + 1,
        seed=seed,
        low_shot={budget: [draw.tolist() for draw in draws] for budget, draws in low_shot.items()},
        images=images,
    )
