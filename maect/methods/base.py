"""What a training method takes and gives back. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from maect.settings import HeadStageSettings, LocalViews, ScheduleSettings, TuningSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


#: parts of a chain of training stages in order
PARTS = ("pretraining", "head", "tuning")


@dataclass(frozen=True)
class Views:
    """What a loss sees of a step: the global batch of B images, on every worker alike."""

    #: of V views [V, B, D]: the two large ones, then local ones; carries the gradient
    features: Tensor
    #: of the two large views through the teacher [2, B, D]; None: the method has none
    teacher: Tensor | None
    #: rows of the train split [B]
    ids: Tensor
    #: [B], for what is logged: a method that learns from them is no longer self-supervised
    labels: Tensor
    #: uniform in [0, 1), float64 [n, B], as many as the method's `draws` asks for
    draws: Tensor | None
    #: share of the steps taken, from 0 to 1
    progress: float


def _no_head(*_: Any) -> Any:
    raise NotImplementedError


@dataclass(frozen=True)
class Method:
    """One kind of training stage: what a module of `maect.methods` exposes as `METHOD`.

    `options` below are its settings with those that it borrows from another section, as attributes.
    """

    #: kind of its stage, and its section in a suite
    name: str
    settings: type[ScheduleSettings]
    #: (width D of the features, options) -> its networks, and in buffers what they remember
    head: Callable[[int, Any], nn.Module] = _no_head
    #: (head, views, options) -> "loss", and further scalars to log
    loss: Callable[[Any, Views, Any], dict[str, Tensor]] = _no_head
    #: (D, options) -> FLOPs of the head on one view of an image, backward pass included
    head_flops: Callable[[int, Any], float] = lambda dim, options: 0.0
    #: parts of the head that follow others as moving averages, without gradient: average -> source
    averages: Mapping[str, str] = field(default_factory=dict)
    #: whether the loss asks for the features of a teacher, an average of the encoder
    teacher: bool = False
    #: options -> random numbers that the loss takes for each image
    draws: Callable[[Any], int] = lambda options: 0
    #: (encoder, images [n, C, S, S], frozen blocks, pool, options) -> what the head sees
    #: [n, ..., D]; None: the pooled tokens after the final norm
    read: Callable[[Any, Tensor, int, str, Any], Tensor] | None = None
    #: pretraining comes first in a chain, then a head on the frozen encoder, then tuning
    part: Literal["pretraining", "head", "tuning"] = "tuning"
    #: the stage whose head this one goes on with
    starts_from: str = ""
    #: the section of a suite that tells more of its options, and which
    borrows: tuple[str, tuple[str, ...]] = ("", ())
    #: the pipeline that it always takes; empty: the row's
    pipeline: str = ""
    #: module whose `training(job)` makes the training ready (`maect.stages.loop.Training`)
    entry: str = "maect.stages.contrastive"
    #: its own module, filled in by the registry
    module: str = ""

    def initialised(self) -> Method:
        """Return the stage before a tuning stage: its head alone, on the frozen encoder.

        It takes the method's own settings from the section of the tuning stage.
        """
        common = {**TuningSettings.model_fields, **LocalViews.model_fields, "evaluate": None}
        own = tuple(name for name in self.settings.model_fields if name not in common)
        return replace(
            self,
            name=self.starts_from,
            settings=HeadStageSettings,
            part="head",
            starts_from="",
            borrows=(self.name, own),
        )


def options_of(train: ScheduleSettings, borrowed: Mapping[str, Any]) -> Any:
    """Return a stage's options: its settings and what it borrows, as attributes."""
    return SimpleNamespace(**{**borrowed, **train.model_dump()})
