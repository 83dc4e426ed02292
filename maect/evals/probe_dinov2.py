"""DINOv2's linear probe: a grid of learning rates, last blocks and tokens on fresh crops.

Source: Oquab et al. 2023 (arXiv 2304.07193), dinov2/eval/linear.py. Each classifier is a linear
layer, without batch norm, on the class tokens after the final norm of the last one or the last
four blocks, with or without the mean of the last block's patches. All learn from the same batches.
The best one is chosen on the selection split; there it is chosen on the test images.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from maect.evals.augmented_probe import AugmentedProbeSettings, fresh_crops
from maect.evals.base import EvalInput, EvalResult, Evaluator, Features
from maect.evals.linear_probe import Probes, derive, probe_metrics, run_probe
from maect.settings import Positive, Share

if TYPE_CHECKING:
    from torch import Tensor


class Dinov2ProbeSettings(AugmentedProbeSettings):
    """SGD with momentum and half a cosine without warm-up; 10 epochs of ImageNet, as there."""

    base_lrs: list[Positive] = Field(
        default=[1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1],
        min_length=1,
    )
    epochs: int = Field(default=10, gt=0)
    warmup: Share = 0.0


class Grid:
    """Classifiers of every rate on every reading of features x [B, K, 2D] of K blocks.

    D numbers of each block's class token, then D of the mean of its patches.
    """

    def __init__(self, dim: int, classes: int, lrs: list[float], *, blocks: int, **options: Any):
        self.half, self.device = dim // 2, options["device"]
        counts = sorted({1, blocks})
        self.candidates: list[dict[str, Any]] = [
            {"blocks": n, "mean": mean} for n in counts for mean in (False, True)
        ]
        self.probes = [
            Probes((c["blocks"] + c["mean"]) * self.half, classes, lrs, batch_norm=False, **options)
            for c in self.candidates
        ]

    def read(self, x: Tensor, blocks: int, mean: bool) -> Tensor:
        """Return the class tokens of the last blocks, and the last mean: [B, (blocks+mean) D]."""
        import torch

        parts = [x[:, -blocks:, : self.half].flatten(1)]
        parts += [x[:, -1, self.half :]] if mean else []
        return torch.cat(parts, dim=1).to(self.device)

    def step(self, x: Tensor, y: Tensor, factor: float) -> None:
        """As `Probes.step` for all classifiers."""
        for probes, candidate in zip(self.probes, self.candidates, strict=True):
            probes.step(self.read(x, **candidate), y, factor)

    def evaluate(self, split: Features, *, restricted: bool = False) -> tuple[Any, Any]:
        """As `Probes.evaluate` for all classifiers: classes [M, L], mean cross entropy [L]."""
        found = [
            probes.evaluate(Features(self.read(split.x, **candidate), split.y))
            for probes, candidate in zip(self.probes, self.candidates, strict=True)
        ]
        return np.concatenate([c for c, _ in found], 1), np.concatenate([loss for _, loss in found])


def _compute(data: EvalInput, settings: Dinov2ProbeSettings) -> EvalResult:
    assert data.images is not None
    if data.train.x.ndim != 3 or data.train.x.shape[2] % 2:
        raise ValueError("it reads a list of blocks, class token and mean: pool 'both'")
    crops = fresh_crops(data, settings, data.images.network().eval())
    make = partial(Grid, blocks=data.train.x.shape[1])
    return run_probe(data, settings, crops, "augmented", make=make)


EVALUATOR = Evaluator(
    name="probe_dinov2",
    label="linear probe (DINOv2)",
    settings=Dinov2ProbeSettings,
    metrics=lambda settings: probe_metrics("linear probe (DINOv2)"),
    compute=_compute,
    derive=derive,
    uses_seed=True,
    chooses=lambda settings: True,
    passes=lambda settings, images, classes: settings.epochs * images["train"],
    tokens={"block": [-4, -3, -2, -1], "pool": "both", "norm": True},
    joins_blocks=True,
    source="DINOv2, arXiv 2304.07193, eval/linear.py: 13 rates x 1 or 4 last blocks x with or "
    "without the mean of patches",
)
