"""Colour histograms from frozen features: what contrastive tuning is meant to make encoders forget.

A ridge regression predicts each image's histogram of each colour. The paper tests "forgetting" so;
its exact protocol is not published, so this one is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, PositiveInt

from maect.evals.base import EvalInput, EvalResult, Evaluator, Metric, Predictions, each_image
from maect.evals.neighbors import standardized, statistics
from maect.settings import Positive, Settings

if TYPE_CHECKING:
    from torch import Tensor

#: images whose features are in double precision at a time
_ROWS = 2**17


class HistogramSettings(Settings):
    """Ridge regression on features standardised by the training images'."""

    #: equal bins of the values of each colour, from 0 to the largest
    bins: PositiveInt = 8
    #: the penalty is this times the number of training images; the selection split chooses
    l2: list[Positive] = Field(default=[1e-4, 1e-3, 1e-2, 1e-1, 1.0], min_length=1)


def histograms(pixels: Tensor, bins: int) -> Tensor:
    """Return the share of each image's pixels in each bin of each channel.

    pixels [B, C, H, W] in [0, 1] -> [B, C * bins] float64; each channel's shares sum to 1.
    """
    import torch

    place = (pixels * bins).floor().clamp(0, bins - 1)
    shares = [(place == number).double().mean((2, 3)) for number in range(bins)]
    return torch.stack(shares, dim=2).flatten(1)


def _targets(data: EvalInput, split: str, bins: int) -> Tensor:
    """Return the histograms of a split's images as evaluations see them: [N, C * bins]."""
    import torch

    images = data.images
    assert images is not None
    mean, std = (torch.tensor(v)[:, None, None] for v in (images.mean, images.std))

    def of(normalised: Tensor) -> Tensor:
        spread, offset = (v.to(normalised.device) for v in (std, mean))
        return histograms(normalised * spread + offset, bins)

    own = getattr(data, split)
    return each_image(images, split, np.arange(len(own.y)), of).to(own.x.device)


def _fitted(x: Tensor, found: tuple[Tensor, Tensor], y: Tensor, l2: list[float]) -> list[Tensor]:
    """Return a ridge regression for each penalty: x [N, D], which `found` standardises, on centred
    y [N, T] -> [D, T] each."""
    import torch

    gram, along = y.new_zeros(x.shape[1], x.shape[1]), y.new_zeros(x.shape[1], y.shape[1])
    for rows, targets in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
        own = standardized(rows, found)
        gram, along = gram + own.T @ own, along + own.T @ targets
    scale, vectors = torch.linalg.eigh(gram / len(x))
    along = vectors.T @ along / len(x)
    return [vectors @ (along / (scale + penalty)[:, None]) for penalty in l2]


def _derive(predictions: Predictions, labels: np.ndarray) -> dict[str, float]:
    """Return R2 over all bins, and the mean share of an image's pixels in wrong bins; percent.

    The labels say nothing of colours.
    """
    truth, found = predictions["histogram"], predictions["predicted"]
    around = ((truth - truth.mean(0)) ** 2).sum()
    explained = 1 - ((found - truth) ** 2).sum() / around if around else 0.0
    sums = truth.sum(1)  # one for each channel
    wrong = (np.abs(found - truth).sum(1) / (2 * sums)).mean()
    return {"r2": 100.0 * float(explained), "misplaced": 100.0 * float(wrong)}


def _compute(data: EvalInput, settings: HistogramSettings) -> EvalResult:
    import torch

    train, selection, test = (
        _targets(data, split, settings.bins) for split in ("train", "selection", "test")
    )
    offset, spread = train.mean(0), statistics(data.train.x)

    def regressed(x: Tensor, weight: Tensor) -> Tensor:
        parts = [standardized(rows, spread) @ weight + offset for rows in x.split(_ROWS)]
        return torch.cat(parts)

    weights = _fitted(data.train.x, spread, train - offset, settings.l2)
    errors = [
        float((regressed(data.selection.x, weight) - selection).square().mean())
        for weight in weights
    ]
    best = int(np.argmin(errors))
    predicted = regressed(data.test.x, weights[best]).cpu()
    predictions = {"histogram": test.cpu().numpy(), "predicted": predicted.numpy()}
    chosen = {"l2": settings.l2[best], "selection_error": errors}
    protocol: dict[str, Any] = {
        "target": "share of the pixels in each bin of each channel, images as evaluations see them",
        "choice": "l2 by squared error on the selection split, then the earlier one",
        "train_images": len(data.train.y),
    }
    return EvalResult(predictions, chosen, protocol)


EVALUATOR = Evaluator(
    name="histogram",
    label="colour histograms",
    settings=HistogramSettings,
    metrics=lambda settings: [
        Metric("r2", "colour histogram, R²", "%", True, primary=True),
        Metric("misplaced", "colour histogram, misplaced pixels", "%", False),
    ],
    compute=_compute,
    derive=_derive,
    uses_seed=False,
    chooses=True,
    passes=lambda settings, images, classes: 0.0,
)
