"""MAE and NNCLR together, the comparison of MAE-CT (arXiv 2304.10520); see `maect.stages.joint`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from maect.methods.base import Method
from maect.methods.nnclr import SHAPE, TuneSettings, head, head_flops, loss
from maect.settings import NonNegative, Share


class JointSettings(TuneSettings):
    """Both losses on the visible patches of two views; the head's shape is the section `head`'s."""

    frozen: Share | None = 0.0
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    #: crops of each image in every step
    views: Literal[2] = 2
    #: share of the patches that the encoder does not see
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    #: normalise each target patch by its own mean and (unbiased) variance
    norm_pix: bool = True
    #: of NNCLR's loss, that of the MAE having 1
    contrastive_weight: NonNegative = 1.0


def weighted(head: Any, views: Any, options: Any) -> dict[str, Any]:
    """Return NNCLR's loss times its weight, and what it tells."""
    values = loss(head, views, options)
    values["nnclr_loss"] = values["loss"].detach()
    return values | {"loss": options.contrastive_weight * values["loss"]}


METHOD = Method(
    "joint",
    JointSettings,
    head,
    weighted,
    head_flops,
    averages={"target_projector": "projector"},
    draws=lambda options: 2,
    part="pretraining",
    borrows=("head", SHAPE),
    entry="maect.stages.joint",
)
