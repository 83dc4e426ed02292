"""Any evaluation on features of several encoder blocks at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from maect.evals.base import EvalInput, EvalResult, Evaluator, Features, Metric, Predictions


def at_blocks(evaluator: Evaluator, blocks: list[int]) -> Evaluator:
    """Return the evaluation that runs `evaluator` on features x [N, K, D] of each of K `blocks`.

    Its metrics, predictions, choices and notes end in the block's number: `accuracy_k10_block3`.
    The primary metric is the one of the last block listed. One that joins blocks stays as it is.
    """
    if evaluator.joins_blocks:
        return evaluator

    def metrics(settings: Any) -> list[Metric]:
        every = [
            dataclasses.replace(
                metric,
                name=f"{metric.name}_block{block}",
                label=f"{metric.label}, block {block}",
                primary=metric.primary and block == blocks[-1],
                along="block",
                at=float(block),
                series=metric.label,
            )
            for block in blocks
            for metric in evaluator.metrics(settings)
        ]
        return sorted(every, key=lambda metric: not metric.primary)

    def derive(predictions: Predictions, labels: np.ndarray) -> dict[str, float]:
        values: dict[str, float] = {}
        for block in blocks:
            end = f"_block{block}"
            own = {n.removesuffix(end): p for n, p in predictions.items() if n.endswith(end)}
            values |= _ending(evaluator.derive(own, labels), block)
        return values

    def compute(data: EvalInput, settings: Any) -> EvalResult:
        together = EvalResult({}, {}, {})
        for place, block in enumerate(blocks):
            result = evaluator.compute(_at(data, place), settings)
            together.predictions |= _ending(result.predictions, block)
            together.chosen |= _ending(result.chosen, block)
            together.notes += [f"block {block}: {note}" for note in result.notes]
            together.protocol = result.protocol
        return together

    passes = evaluator.passes
    return dataclasses.replace(
        evaluator,
        metrics=metrics,
        derive=derive,
        compute=compute,
        passes=passes and (lambda *given: len(blocks) * passes(*given)),
    )


def _ending(found: dict[str, Any], block: int) -> dict[str, Any]:
    return {f"{name}_block{block}": value for name, value in found.items()}


def _at(data: EvalInput, place: int) -> EvalInput:
    """Return the input with the features of the block at `place` of the list, on the labels'
    device: all blocks together may be more than it holds."""
    train, selection, test = (
        Features(split.x[:, place].contiguous().to(split.y.device), split.y)
        for split in (data.train, data.selection, data.test)
    )
    images = data.images and data.images.at(place)
    return dataclasses.replace(data, train=train, selection=selection, test=test, images=images)
