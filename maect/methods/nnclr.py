"""NNCLR as in MAE-CT (arXiv 2304.10520): a head on the frozen encoder, then contrastive tuning.

The head itself is `maect.heads.NNCLRHead`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt, model_validator

from maect.methods.base import Method, Views
from maect.settings import HeadStageSettings, Positive, Share, TuningSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

SHAPE = ("hidden_dim", "predictor_dim", "out_dim", "queue_size")


def check_queue(settings: Any) -> Any:
    """Return settings. Raises ValueError where a queue does not fit batch and top k."""
    queue, batch = settings.queue_size, settings.batch_size
    if queue % batch:
        near = max(1, round(queue / batch)) * batch
        message = f"queue_size {queue} is not a multiple of batch_size {batch}; write {near}"
        raise ValueError(message)
    if settings.topk > queue:
        raise ValueError(f"topk {settings.topk} is more than the queue of {queue} holds")
    return settings


class HeadSettings(HeadStageSettings):
    """NNCLR head on the frozen encoder. Its queue and shape are inherited by tuning."""

    #: hidden units of the projector
    hidden_dim: PositiveInt = 2048
    #: hidden units of the predictor
    predictor_dim: PositiveInt = 4096
    #: width of the embeddings
    out_dim: PositiveInt = 256
    #: embeddings in the neighbour queue; a multiple of batch_size
    queue_size: PositiveInt = 65536
    #: the positive is drawn from so many nearest neighbours
    topk: PositiveInt = 1
    #: of the contrastive loss
    temperature: Positive = 0.15

    _queue = model_validator(mode="after")(check_queue)


class TuneSettings(TuningSettings):
    """Contrastive tuning of the encoder's upper blocks with the NNCLR head."""

    #: moving average of the projector that writes and queries the queue
    target_ema: Share = 0.99
    #: the positive is drawn from so many nearest neighbours
    topk: PositiveInt = 20
    #: of the contrastive loss
    temperature: Positive = 0.15
    #: never take an earlier view of the same image for its neighbour
    exclude_own: bool = True
    #: what stands for the positive: a neighbour from the queue; an image of the same class (an
    #: upper bound); the other view's online projection (no queue: SimCLR-like); or the queue's
    #: neighbour of the same view without swapping views
    positive: Literal["neighbor", "oracle", "no_queue", "no_swap"] = "neighbor"


def head(dim: int, options: Any) -> nn.Module:
    """Return projector, predictor, queue and target projector."""
    from maect.heads import NNCLRHead

    return NNCLRHead(dim, **{name: getattr(options, name) for name in SHAPE})


def loss(head: Any, views: Views, options: Any) -> dict[str, Tensor]:
    """Return the symmetrised loss, and what tells of the neighbours. The queue moves on."""
    output = head(
        *views.features,
        views.ids,
        topk=options.topk,
        temperature=options.temperature,
        draws=views.draws,
        use_target=hasattr(options, "target_ema"),  # in tuning
        exclude_own=getattr(options, "exclude_own", True),
        positive=getattr(options, "positive", "neighbor"),
        labels=views.labels,
    )
    found = output._asdict() | {"indices": None}
    return {name: value for name, value in found.items() if value is not None}


def head_flops(dim: int, options: Any) -> float:
    """Return FLOPs of projector, predictor, similarities, target projector and queue."""
    projector = dim * options.hidden_dim + options.hidden_dim**2
    projector += options.hidden_dim * options.out_dim
    predictor = 2 * options.out_dim * options.predictor_dim
    queued = getattr(options, "positive", "neighbor") != "no_queue"
    queue = options.queue_size * options.out_dim if queued else 0
    logits = options.batch_size * options.out_dim
    trained = 3 * (projector + predictor + logits)
    return 2.0 * (trained + queue + (projector if hasattr(options, "target_ema") else 0))


_COMMON: dict[str, Any] = {
    "head": head,
    "loss": loss,
    "head_flops": head_flops,
    "averages": {"target_projector": "projector"},
    "draws": lambda options: 2,
}
METHODS = (
    Method("head", HeadSettings, part="head", **_COMMON),
    Method("tune", TuneSettings, starts_from="head", borrows=("head", SHAPE), **_COMMON),
)
