"""An evaluation that runs the encoder: on fresh crops, or training it."""

from __future__ import annotations

from maect.stages.evaluate import evaluate
from maect.stages.features import JobImages
from maect.stages.job import Job, Output


def run(job: Job) -> Output:
    """Leave `predictions` with the `labels` of the reported split; values and protocol."""
    job.prepare()
    images = JobImages(job).reporting(job.settings["split"])
    return evaluate(job, job.tensors("features", "features"), images)
