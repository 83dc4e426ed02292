"""The published linear probe: the encoder runs on fresh crops in every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from maect.evals.base import EvalInput, EvalResult, Evaluator
from maect.evals.linear_probe import (
    ProbeSettings,
    TrainFeatures,
    batches,
    derive,
    probe_metrics,
    run_probe,
)
from maect.settings import ViewSettings

if TYPE_CHECKING:
    from torch import Tensor

#: images the encoder sees at a time
_IMAGES = 256


class AugmentedProbeSettings(ProbeSettings):
    """The probe's settings, and what is done to the training images."""

    #: the published one is a random crop of 8 to 100 % of the area, and a flip
    view: ViewSettings = ViewSettings()


def fresh_crops(
    data: EvalInput,
    settings: AugmentedProbeSettings,
    network: Callable[[Tensor], Tensor],
) -> TrainFeatures:
    """Return what gives `network` of fresh crops of the training images in every epoch."""
    import torch

    images = data.images
    assert images is not None
    group = images.group
    count, seed = len(data.train.y), data.seed

    def dealt() -> Iterator[tuple[int, np.ndarray]]:
        """Yield epoch and rows of what this worker computes."""
        for epoch in range(settings.epochs):
            for chosen in batches(settings, count, seed, epoch):
                for part in group.dealt(len(chosen), _IMAGES):
                    yield epoch, chosen[part]

    images.expect_views(settings.view, "probe", dealt())

    def fresh(epoch: int, chosen: np.ndarray) -> Tensor:
        def features(rows: slice) -> Tensor:
            return network(images.views(settings.view, "probe", epoch, chosen[rows]))

        with torch.no_grad():
            found = list(group.shared(len(chosen), _IMAGES, features))
        return torch.cat(found).to(data.train.y.device)

    return fresh


def _compute(data: EvalInput, settings: AugmentedProbeSettings) -> EvalResult:
    assert data.images is not None
    crops = fresh_crops(data, settings, data.images.network().eval())
    return run_probe(data, settings, crops, "augmented")


EVALUATOR = Evaluator(
    name="probe_augmented",
    label="augmented probe",
    settings=AugmentedProbeSettings,
    metrics=lambda settings: probe_metrics("augmented probe"),
    compute=_compute,
    derive=derive,
    uses_seed=True,
    chooses=lambda settings: True,
    passes=lambda settings, images, classes: settings.epochs * images["train"],
)
