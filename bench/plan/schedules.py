"""FLOPs of the training stages of a row, and schedules that cost as much as another row."""

from __future__ import annotations

import math
from typing import Any

from bench.suite.load import Variant
from maect import flops
from maect.datasets import DataInfo


def step_flops(variant: Variant, kind: str, train: Any, data: DataInfo) -> float:
    """One step of a training stage of a row, with the resolved settings `train`."""
    model, size = variant.row.model, variant.row.data.image_size
    if kind == "mae":
        return flops.mae_step(model, train, size, data.channels)
    if kind == "head":
        return flops.head_step(model, train, size, data.channels)
    return flops.tune_step(model, variant.row.head, train, size, data.channels)


def schedule(variant: Variant, kind: str, data: DataInfo, matched: Variant | None = None) -> Any:
    """Resolved settings of a training stage: told in steps and peak rates.

    With `matched` the only stage of a row is stretched, warm-up and decay with it, until it costs
    at least as many FLOPs as that row. An MAE takes its own steps and as many more as the head and
    tuning of `matched` cost; contrastive training without MAE takes what all stages of it cost.
    """
    images, settings = data.counts["train"], getattr(variant.row, kind)
    train = settings.resolve(images)
    if matched is None:
        return train
    own = train.steps if kind == "mae" else 0
    cost = 0.0
    for name in (n for n in matched.stages if n != "mae" or not own):
        other = schedule(matched, name, data)
        cost += other.steps * step_flops(matched, name, other, data)
    steps = own + math.ceil(cost / step_flops(variant, kind, train, data))
    return settings.model_copy(update={"steps": steps, "epochs": None}).resolve(images)
