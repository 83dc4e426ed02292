"""BYOL (Grill et al. 2020, arXiv 2006.07733): predict what a moving average says of the other view.

No negatives: a predictor, and a teacher that no gradient reaches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from maect.methods.base import Method, Views
from maect.settings import TeacherSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


class BYOLSettings(TeacherSettings):
    """Projector and predictor of two layers each."""

    #: hidden units of the projector
    hidden_dim: PositiveInt = 4096
    #: width of the embeddings
    out_dim: PositiveInt = 256


def head(dim: int, options: Any) -> nn.Module:
    """Return projector, predictor and the teacher's projector."""
    from torch import nn

    from maect.heads import mlp

    hidden, out = options.hidden_dim, options.out_dim
    return nn.ModuleDict(
        {
            "projector": mlp(dim, hidden, out),
            "predictor": mlp(out, hidden, out),
            "target_projector": mlp(dim, hidden, out),
        }
    )


def byol_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared distance of unit vectors [B, D]: 2 less twice the cosine (the
    paper's equation 2)."""
    import torch.nn.functional as F

    from maect.losses import full_precision, in_full

    with full_precision(predicted):
        return 2 - 2 * F.cosine_similarity(in_full(predicted), in_full(target), dim=1).mean()


def loss(head: Any, views: Views, options: Any) -> dict[str, Tensor]:
    """Return the loss, mean of both directions."""
    import torch

    assert views.teacher is not None
    predicted = [head["predictor"](head["projector"](view)) for view in views.features]
    with torch.no_grad():
        targets = [head["target_projector"](view) for view in views.teacher]
    both = [byol_loss(predicted[0], targets[1]), byol_loss(predicted[1], targets[0])]
    value = (both[0] + both[1]) / 2
    return {"loss": value, "cosine": 1 - value.detach() / 2}


def head_flops(dim: int, options: Any) -> float:
    """Return FLOPs of projector and predictor, trained, and the teacher's projector."""
    projector = options.hidden_dim * (dim + options.out_dim)
    return 2.0 * (4 * projector + 6 * options.hidden_dim * options.out_dim)


METHOD = Method(
    "byol",
    BYOLSettings,
    head,
    loss,
    head_flops,
    averages={"target_projector": "projector"},
    teacher=True,
)
