"""SimCLR (Chen et al. 2020, arXiv 2002.05709): the other view of an image among all views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from maect.methods.base import Method, Views
from maect.settings import Positive, TuningSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


class SimCLRSettings(TuningSettings):
    """NT-Xent on the outputs of a projector of two layers."""

    #: hidden units of the projector
    hidden_dim: PositiveInt = 2048
    #: width of the embeddings
    out_dim: PositiveInt = 128
    #: of the contrastive loss
    temperature: Positive = 0.1


def head(dim: int, options: Any) -> nn.Module:
    """Return the projector."""
    from torch import nn

    from maect.heads import mlp

    return nn.ModuleDict({"projector": mlp(dim, options.hidden_dim, options.out_dim)})


def nt_xent(one: Tensor, other: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the loss of two views [B, D] of a global batch, and the share of views whose nearest
    view is the other one of their image.

    Cross entropy over the cosines of each of the 2B views with all others, divided by the
    temperature (the paper's equation 1).
    """
    import torch
    import torch.nn.functional as F

    from maect.losses import full_precision, in_full

    with full_precision(one):
        z = F.normalize(in_full(torch.cat([one, other])), dim=1)  # [2B, D]
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        logits = (z @ z.T / temperature).masked_fill(own, -torch.inf)
        targets = torch.arange(len(z), device=z.device).roll(len(one))
        found = (logits.argmax(dim=1) == targets).float().mean()
        return F.cross_entropy(logits, targets), found


def loss(head: Any, views: Views, options: Any) -> dict[str, Tensor]:
    """Return the loss of both views and how often a view finds its other one."""
    one, other = (head["projector"](view) for view in views.features)
    value, found = nt_xent(one, other, options.temperature)
    return {"loss": value, "match_accuracy": found}


def head_flops(dim: int, options: Any) -> float:
    """Return FLOPs of the projector and of a view's similarities."""
    projector = dim * options.hidden_dim + options.hidden_dim * options.out_dim
    return 6.0 * (projector + 2 * options.batch_size * options.out_dim)


METHOD = Method("simclr", SimCLRSettings, head, loss, head_flops)
