"""DINOv2's linear probe: a grid of learning rates, last blocks and tokens on fresh crops.

Source: Oquab et al. 2023 (arXiv 2304.07193), dinov2/eval/linear.py. Each classifier is a linear
layer, without batch norm, on the class tokens after the final norm of the last one or the last
four blocks, with or without the mean of the last block's patches. All learn from the same batches.
The best one is chosen on the selection split; there it is chosen on the test images.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pydantic import Field

from maect.evals.augmented_probe import EVALUATOR as AUGMENTED
from maect.evals.augmented_probe import AugmentedProbeSettings, fresh_crops
from maect.evals.base import EvalInput, EvalResult
from maect.evals.linear_probe import probe_metrics, run_probe
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


def read(x: Tensor, blocks: int, mean: bool) -> Tensor:
    """Return the class tokens of the last blocks, and the last mean: [B, K, 2D] of K blocks, D
    numbers of the class token, then D of the mean of the patches -> [B, (blocks + mean) D]."""
    import torch

    half = x.shape[2] // 2
    parts = [x[:, -blocks:, :half].flatten(1), x[:, -1, half:]]
    return torch.cat(parts if mean else parts[:1], dim=1)


def _compute(data: EvalInput, settings: Dinov2ProbeSettings) -> EvalResult:
    if data.train.x.ndim != 3 or data.train.x.shape[2] % 2:
        raise ValueError("it reads a list of blocks, class token and mean: pool 'both'")
    crops = fresh_crops(data, settings)
    counts = sorted({1, data.train.x.shape[1]})
    readings = [{"blocks": count, "mean": mean} for count in counts for mean in (False, True)]
    return run_probe(
        data, settings, crops, "augmented", batch_norm=False, readings=readings, read=read
    )


EVALUATOR = dataclasses.replace(
    AUGMENTED,
    name="probe_dinov2",
    label="linear probe (DINOv2)",
    settings=Dinov2ProbeSettings,
    metrics=lambda settings: probe_metrics("linear probe (DINOv2)"),
    compute=_compute,
    tokens={"block": [-4, -3, -2, -1], "pool": "both", "norm": True},
    joins_blocks=True,
    source="DINOv2, arXiv 2304.07193, eval/linear.py: 13 rates x 1 or 4 last blocks x with or "
    "without the mean of patches",
)
