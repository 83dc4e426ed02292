"""DINO (Caron et al. 2021, arXiv 2104.14294): sort views as a teacher sorts the other view.

The teacher is a moving average whose outputs are centred and sharpened, which keeps both from
collapsing. Small local crops go through the student alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from maect.methods.base import Method, Views
from maect.settings import LocalViews, Positive, Share, TeacherSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


class DINOSettings(LocalViews, TeacherSettings):
    """A projector of three layers without batch norm, and prototypes of unit norm."""

    #: hidden units of the projector
    hidden_dim: PositiveInt = 2048
    #: width of the bottleneck before the prototypes
    out_dim: PositiveInt = 256
    #: vectors that the projections are compared with
    prototypes: PositiveInt = 65536
    #: of the student's assignments
    temperature: Positive = 0.1
    #: of the teacher's assignments
    teacher_temperature: Positive = 0.04
    #: what of the centre stays after a step
    centre_ema: Share = 0.9
    #: share of the steps at the beginning in which the prototypes do not move
    frozen_prototypes: Share = 0.01
    evaluate: Literal["student", "teacher"] = "teacher"


def head(dim: int, options: Any) -> nn.Module:
    """Return projector and prototypes, those of the teacher, and the centre of its outputs."""
    import torch
    from torch import nn

    from maect.heads import mlp

    sizes = (dim, options.hidden_dim, options.hidden_dim, options.out_dim)
    parts: dict[str, nn.Module] = {}
    for prefix in ("", "target_"):
        parts[f"{prefix}projector"] = mlp(*sizes, norm=False, activation=nn.GELU)
        parts[f"{prefix}prototypes"] = nn.Linear(options.out_dim, options.prototypes, bias=False)
    found = nn.ModuleDict(parts)
    found.register_buffer("centre", torch.zeros(options.prototypes))
    return found


def dino_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    centre: Tensor,
    temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Return the mean cross entropy of V views [B, K] with what the teacher says of the first ones,
    but for a view with itself (the paper's algorithm 1)."""
    import torch

    targets = [((t - centre) / teacher_temperature).softmax(dim=1) for t in teacher]
    logs = [(s / temperature).log_softmax(dim=1) for s in student]
    pairs = [(t, s) for i, t in enumerate(targets) for j, s in enumerate(logs) if i != j]
    return torch.stack([-(t * s).sum(dim=1).mean() for t, s in pairs]).mean()


def loss(head: Any, views: Views, options: Any) -> dict[str, Tensor]:
    """Return the loss and the teacher's mean entropy, in nats. The centre moves on."""
    import torch
    import torch.nn.functional as F

    from maect.losses import full_precision, in_full

    def outputs(view: Tensor, prefix: str, weight: Tensor) -> Tensor:
        z = head[f"{prefix}projector"](view)  # [B, O]
        with full_precision(z):
            return F.linear(F.normalize(in_full(z), dim=1), F.normalize(weight, dim=1))  # [B, K]

    assert views.teacher is not None
    weight = head["prototypes"].weight
    if views.progress < options.frozen_prototypes:
        weight = weight.detach()
    student = [outputs(view, "", weight) for view in views.features]
    with torch.no_grad():
        target = head["target_prototypes"].weight
        teacher = [outputs(view, "target_", target) for view in views.teacher]
    told, sharp = options.temperature, options.teacher_temperature
    value = dino_loss(student, teacher, head.centre, told, sharp)
    with torch.no_grad():
        said = ((teacher[0] - head.centre) / sharp).softmax(dim=1)
        entropy = torch.special.entr(said).sum(dim=1).mean()
        middle = torch.cat(teacher).mean(dim=0)
        head.centre.mul_(options.centre_ema).add_(middle, alpha=1 - options.centre_ema)
    return {"loss": value, "teacher_entropy": entropy}


def head_flops(dim: int, options: Any) -> float:
    """Return FLOPs of projector and prototypes, trained, and the teacher's."""
    hidden, out = options.hidden_dim, options.out_dim
    return 8.0 * (dim * hidden + hidden**2 + hidden * out + out * options.prototypes)


METHOD = Method(
    "dino",
    DINOSettings,
    head,
    loss,
    head_flops,
    averages={"target_projector": "projector", "target_prototypes": "prototypes"},
    teacher=True,
)
