"""Any evaluation on features of several blocks at once: where does the representation sit?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from maect.evals.base import EvalInput, EvalResult, Evaluator, Features, Metric, Predictions


def at_blocks(evaluator: Evaluator, blocks: list[int]) -> Evaluator:
    """The evaluation run on features x [N, K, D] of each of K `blocks`.

    Its metrics, predictions, choices and notes end in the block's number: `accuracy_k10_block3`.
    The primary metric is the one of the last block listed.
    """

    def metrics(settings: Any) -> list[Metric]:
        every = [
            dataclasses.replace(
                metric,
                name=f"{metric.name}_block{block}",
                label=f"{metric.label}, block {block}",
                primary=metric.primary and block == blocks[-1],
            )
            for block in blocks
            for metric in evaluator.metrics(settings)
        ]
        return sorted(every, key=lambda metric: not metric.primary)

    def derive(predictions: Predictions, labels: np.ndarray) -> dict[str, float]:
        values: dict[str, float] = {}
        for block in blocks:
            end = f"_block{block}"
            own = {
                name.removesuffix(end): array
                for name, array in predictions.items()
                if name.endswith(end)
            }
            values |= _ending(evaluator.derive(own, labels), block)
        return values

    def run(data: EvalInput, settings: Any, rows: slice) -> EvalResult:
        values: dict[str, float] = {}
        predictions: Predictions = {}
        chosen: dict[str, Any] = {}
        notes: dict[str, None] = {}
        for place, block in enumerate(blocks):
            result = evaluator.run(_one(data, place), settings, rows)
            values |= _ending(result.values, block)
            predictions |= _ending(result.predictions, block)
            chosen |= _ending(result.chosen, block)
            notes |= {f"block {block}: {note}": None for note in result.notes}
        return EvalResult(values, predictions, chosen, result.protocol, list(notes))

    def passes(settings: Any, images: Mapping[str, int], classes: int) -> float:
        return len(blocks) * one(settings, images, classes) if one else 0.0

    one = evaluator.passes
    own = dataclasses.replace(evaluator, metrics=metrics, derive=derive, run=run)
    return dataclasses.replace(own, passes=passes) if one else own


def _ending(found: dict[str, Any], block: int) -> dict[str, Any]:
    return {f"{name}_block{block}": value for name, value in found.items()}


def _one(data: EvalInput, place: int) -> EvalInput:
    """The input with the features of one block."""

    def of(split: Features) -> Features:
        return Features(split.x[:, place].contiguous(), split.y)

    return dataclasses.replace(
        data,
        train=of(data.train),
        selection=of(data.selection),
        test=of(data.test),
        images=data.images and data.images.at(place),
    )
