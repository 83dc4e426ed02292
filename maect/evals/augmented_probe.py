"""The published linear probe: the encoder runs on fresh crops in every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from maect.evals.base import IMAGES, EvalInput, Evaluator
from maect.evals.linear_probe import (
    Batch,
    ProbeSettings,
    batches,
    derive,
    probe_metrics,
    run_probe,
)
from maect.settings import ViewSettings

if TYPE_CHECKING:
    from torch import Tensor


class AugmentedProbeSettings(ProbeSettings):
    """The probe's settings, and what is done to the training images."""

    #: the published one is a random crop of 8 to 100 % of the area, and a flip
    view: ViewSettings = ViewSettings()


def fresh_crops(
    data: EvalInput,
    settings: AugmentedProbeSettings,
    network: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Batch]:
    """Yield all batches with `network` of fresh crops; by default it is what makes the features."""
    import torch

    images = data.images
    assert images is not None
    group, view, seen = images.group, settings.view, network or images.network().eval()
    dealt = (
        (epoch, rows[part])
        for epoch, rows in batches(data, settings)
        for part in group.dealt(len(rows), IMAGES)
    )
    images.expect_views(view, "probe", dealt)
    for epoch, rows in batches(data, settings):

        def features(part: slice, epoch: int = epoch, rows: np.ndarray = rows) -> Tensor:
            return seen(images.views(view, "probe", epoch, rows[part]))

        with torch.no_grad():
            found = torch.cat(list(group.shared(len(rows), IMAGES, features)))
        yield rows, found.to(data.train.y.device)


EVALUATOR = Evaluator(
    name="probe_augmented",
    label="augmented probe",
    settings=AugmentedProbeSettings,
    metrics=lambda settings: probe_metrics("augmented probe"),
    compute=lambda data, settings: run_probe(
        data, settings, fresh_crops(data, settings), "augmented"
    ),
    derive=derive,
    uses_seed=True,
    chooses=True,
    passes=lambda settings, images, classes: settings.epochs * images["train"],
)
