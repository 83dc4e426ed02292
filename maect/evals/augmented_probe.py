"""The published linear probe: the encoder runs on fresh crops in every epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from maect.evals.base import EvalInput, EvalResult, Evaluator
from maect.evals.linear_probe import ProbeSettings, derive, probe_metrics, run_probe
from maect.settings import ViewSettings

if TYPE_CHECKING:
    from torch import Tensor

#: images the encoder sees at a time
_IMAGES = 256


class AugmentedProbeSettings(ProbeSettings):
    """The probe's settings, and what is done to the training images."""

    #: the published one is a random crop of 8 to 100 % of the area, and a flip
    view: ViewSettings = ViewSettings()


def _run(data: EvalInput, settings: AugmentedProbeSettings) -> EvalResult:
    import torch

    images = data.images
    if images is None:
        raise ValueError("the augmented probe needs the encoder; it was given cached features only")
    network = images.network().eval()

    def fresh(epoch: int, chosen: np.ndarray) -> Tensor:
        found = []
        for start in range(0, len(chosen), _IMAGES):
            some = chosen[start : start + _IMAGES]
            with torch.no_grad():
                found.append(network(images.views(settings.view, "probe", epoch, some)))
        return torch.cat(found).to(data.train.x.device)

    named = {"evaluation": "probe_augmented", "features": "augmented"}
    return run_probe(data, settings, fresh, named)


EVALUATOR = Evaluator(
    name="probe_augmented",
    label="augmented probe",
    settings=AugmentedProbeSettings,
    metrics=lambda settings: probe_metrics("augmented probe"),
    run=_run,
    derive=derive,
    uses_seed=True,
    passes=lambda settings, images, classes: settings.epochs * images["train"],
)
