"""The linear probe on images of some of its classes: ImageNet-A and -R, which hold 200 of 1,000.

It learns all classes, and predicts among those of the reported images.
"""

from __future__ import annotations

from maect.evals.base import Evaluator
from maect.evals.linear_probe import ProbeSettings, derive, probe_metrics, run_probe, stored

EVALUATOR = Evaluator(
    name="probe_restricted",
    label="restricted probe",
    settings=ProbeSettings,
    metrics=lambda settings: probe_metrics("linear probe, classes of these images"),
    compute=lambda data, settings: run_probe(
        data, settings, stored(data), "cached", restricted=True
    ),
    derive=derive,
    uses_seed=True,
    chooses=lambda settings: True,
)
