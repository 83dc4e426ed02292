"""MIM-Refiner (Alkin et al. 2024, arXiv 2402.10093): NNCLR heads on several of the upper blocks.

Each head has a queue of its own. Positives are swapped for their neighbours, negatives are not, and
all blocks are trained. The heads' projections themselves, no average, ask and fill the queues.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt, model_validator

from maect.methods.base import Method, Views
from maect.methods.nnclr import check_queue
from maect.settings import LocalViews, NonNegativeInt, Positive, Share, TuningSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


class RefinerSettings(LocalViews, TuningSettings):
    """One head on the last block after the final norm, and one on each of `blocks`."""

    frozen: Share | None = 0.0
    #: blocks of the further heads, counted from 0, before any norm; the default is of 24 blocks
    blocks: list[NonNegativeInt] = [16, 17, 18, 19, 20, 21, 22]
    #: what the further heads see of their blocks; null: as the model pools
    pool: Literal["cls", "mean"] | None = None
    #: hidden units of the projector
    hidden_dim: PositiveInt = 2048
    #: hidden units of the predictor
    predictor_dim: PositiveInt = 4096
    #: width of the embeddings
    out_dim: PositiveInt = 256
    #: embeddings in each head's queue; a multiple of batch_size
    queue_size: PositiveInt = 65536
    #: the positive is drawn from so many nearest neighbours
    topk: PositiveInt = 20
    #: of the contrastive loss
    temperature: Positive = 0.2
    #: weights of the further heads: 1; or 1 during the warm-up, then falling to 0 along half a
    #: cosine
    head_weights: Literal["constant", "decay"] = "constant"

    _queue = model_validator(mode="after")(check_queue)


def head(dim: int, options: Any) -> nn.Module:
    """Return the heads, that of the last block at the end."""
    from torch import nn

    from maect.heads import NeighborQueue, mlp

    hidden, out, gelu = options.hidden_dim, options.out_dim, nn.GELU
    found = nn.ModuleDict()
    for name in (*(f"block{index}" for index in options.blocks), "last"):
        parts = {
            "projector": mlp(dim, hidden, hidden, out, last_norm=True, activation=gelu),
            "predictor": mlp(out, options.predictor_dim, out, last_norm=True, activation=gelu),
            "queue": NeighborQueue(options.queue_size, out),
        }
        found[name] = nn.ModuleDict(parts)
    return found


def read(encoder: Any, images: Tensor, frozen: int, how: Any, options: Any) -> Tensor:
    """Return the pooled tokens that each head sees: [n, C, S, S] -> [n, K, D]."""
    import torch

    from maect.models import pool

    blocks = [*options.blocks, encoder.depth - 1]
    *others, last = encoder.features_by_depth(images, blocks, frozen_blocks=frozen)
    pooled = [pool(tokens, options.pool or how) for tokens in others]
    return torch.stack([*pooled, pool(encoder.norm(last), how)], dim=1)


def refiner_loss(own: Tensor, neighbors: Tensor, predicted: Tensor, temperature: float) -> Tensor:
    """Return the loss of one view's projections `own` [B, D] against another view's predictions.

    Cross entropy over their cosines divided by the temperature, a row an image; in the place of an
    image's own cosine stands that of its neighbour, a row of unit norm in `neighbors` [B, D].
    """
    import torch
    import torch.nn.functional as F

    from maect.losses import full_precision, in_full

    with full_precision(predicted):
        predicted = F.normalize(in_full(predicted), dim=1)
        negatives = F.normalize(in_full(own), dim=1) @ predicted.T  # [B, B]
        swapped = (neighbors.to(predicted.dtype) * predicted).sum(dim=1)
        same = torch.eye(len(predicted), dtype=torch.bool, device=predicted.device)
        logits = torch.where(same, swapped[:, None], negatives) / temperature
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def loss(heads: Any, views: Views, options: Any) -> dict[str, Tensor]:
    """Return the weighted sum over heads, each the mean over pairs of views; what the last head's
    neighbours are like. Queues move on."""
    import torch

    count, batch = views.features.shape[:2]
    assert views.draws is not None
    draws = views.draws.unflatten(0, (len(heads), 2))  # [K, 2, B]
    values, found = [], torch.zeros(())
    for place, (name, head) in enumerate(heads.items()):
        projected = head["projector"](views.features[:, :, place].flatten(0, 1))  # [V B, O]
        predicted = head["predictor"](projected).unflatten(0, (count, batch))
        keys, queue = projected.detach().unflatten(0, (count, batch)), head["queue"]
        terms = []
        for view in (0, 1):
            chosen = queue.draw(keys[view], views.ids, draws[place, view], options.topk)  # [B]
            near = queue.embeddings[chosen]
            terms += [
                refiner_loss(keys[view], near, predicted[other], options.temperature)
                for other in range(count)
                if other != view
            ]
            if name == "last" and not view:
                found = (queue.labels[chosen] == views.labels).float().mean()
        queue.push(keys[0], views.ids, views.labels)
        values.append(torch.stack(terms).mean())
    weight = weight_at(views.progress, options)
    value = values[-1] + sum(weight * other for other in values[:-1])
    return {"loss": value, "last_head_loss": values[-1], "neighbor_accuracy": found}


def weight_at(progress: float, options: Any) -> float:
    """Return the weight of the heads below the last one at a share of the steps."""
    if options.head_weights == "constant":
        return 1.0
    warm = options.warmup_steps / options.steps
    return (1 + math.cos(math.pi * max(0.0, progress - warm) / (1 - warm or 1.0))) / 2


def head_flops(dim: int, options: Any) -> float:
    """Return FLOPs of all heads: projector, predictor, similarities and queue."""
    hidden, out = options.hidden_dim, options.out_dim
    trained = dim * hidden + hidden**2 + hidden * out + 2 * out * options.predictor_dim
    trained += options.batch_size * out
    return 2.0 * (len(options.blocks) + 1) * (3 * trained + options.queue_size * out)


METHOD = Method(
    "refiner",
    RefinerSettings,
    head,
    loss,
    head_flops,
    read=read,
    draws=lambda options: 2 * (len(options.blocks) + 1),
)
