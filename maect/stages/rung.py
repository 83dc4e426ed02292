"""An evaluation of the encoder that a training stage has when it stops before its end.

It comes after the stage's checkpoint is written and reads a copy of the weights, so the steps that
the stage takes later are the same as without it.
"""

from __future__ import annotations

from maect.stages.encoder import encoder_of
from maect.stages.evaluate import evaluate
from maect.stages.features import JobImages, extract
from maect.stages.job import Job, Output


def measure(stopped: Output, features: Job, evaluation: Job) -> dict[str, float]:
    """Return the values of an evaluation on the selection split, as if training were over.

    `features` and `evaluation` are the jobs that would follow, without their inputs. All workers
    compute features, the first one has the values.
    """
    channels = JobImages(features).channels
    encoder = encoder_of(features, channels)
    average = stopped.tensors.get("encoder_ema")
    encoder.load_state_dict(stopped.tensors["encoder"] if average is None else average)
    images = JobImages(features, encoder)
    # not the test split, at which a search must not look
    tensors = extract(images, ("train", "selection"))
    return {} if images.group.rank > 0 else evaluate(evaluation, tensors).values
