"""VICReg (Bardes et al. 2022, arXiv 2105.04906): views agree, features vary and do not repeat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from maect.methods.base import Method, Views
from maect.settings import NonNegative, TuningSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


class VICRegSettings(TuningSettings):
    """An expander of three layers, and the weights of the three terms."""

    #: hidden units of the projector
    hidden_dim: PositiveInt = 8192
    #: width of the embeddings
    out_dim: PositiveInt = 8192
    #: weight of the squared distance of the two views
    invariance: NonNegative = 25.0
    #: weight of the hinge on the standard deviations
    variance: NonNegative = 25.0
    #: weight of the squared covariances
    covariance: NonNegative = 1.0


def head(dim: int, options: Any) -> nn.Module:
    """Return the expander."""
    from torch import nn

    from maect.heads import mlp

    hidden = options.hidden_dim
    return nn.ModuleDict({"projector": mlp(dim, hidden, hidden, options.out_dim)})


def vicreg_terms(one: Tensor, other: Tensor) -> dict[str, Tensor]:
    """Return the unweighted terms of two views [B, D] of a global batch.

    `invariance`, their mean squared difference; `variance`, how far standard deviations are below
    1, mean of both views; `covariance`, the squares beside the diagonal of their covariance
    matrices over D, summed over both views (the paper's algorithm 1).
    """
    import torch
    import torch.nn.functional as F

    from maect.losses import full_precision, in_full

    with full_precision(one):
        views = [in_full(one), in_full(other)]
        centred = [view - view.mean(dim=0) for view in views]
        squares = [(z.T @ z / (len(z) - 1)).square() for z in centred]
        spreads = [torch.sqrt(z.square().sum(dim=0) / (len(z) - 1) + 1e-4) for z in centred]
        beside = [(s.sum() - s.diagonal().sum()) / len(s) for s in squares]
        short = [F.relu(1 - spread).mean() for spread in spreads]
        return {
            "invariance": F.mse_loss(views[0], views[1]),
            "variance": (short[0] + short[1]) / 2,
            "covariance": beside[0] + beside[1],
        }


def loss(head: Any, views: Views, options: Any) -> dict[str, Tensor]:
    """Return the weighted sum, and its terms."""
    terms = vicreg_terms(*(head["projector"](view) for view in views.features))
    value = sum(getattr(options, name) * term for name, term in terms.items())
    return {"loss": value, **terms}


def head_flops(dim: int, options: Any) -> float:
    """Return FLOPs of the expander and of a view's covariance matrix."""
    hidden, out = options.hidden_dim, options.out_dim
    return 6.0 * (dim * hidden + hidden**2 + hidden * out + out**2)


METHOD = Method("vicreg", VICRegSettings, head, loss, head_flops)
