"""The encoder that a stage starts from, and how a stage describes the encoder it leaves."""

from __future__ import annotations

from typing import Any

from maect.files import sha256
from maect.models import Encoder, encoder_from
from maect.stages.job import Job


def encoder_of(job: Job, channels: int, *, averaged: bool = False) -> Encoder:
    """Return the encoder a stage starts from: its input's, released weights', or random.

    `averaged`: take the input's moving average where it has one. Raises
    `maect.weights.CheckpointError` for a file of weights other than the planned one.
    """
    encoder = encoder_from(
        job.model,
        job.data.image_size,
        channels,
        checkpoint_activations=job.numerics.checkpoint_activations,
        seed=job.settings.get("seed", 0),
    )
    if "encoder" in job.inputs:
        average = job.inputs["encoder"] / "encoder_ema.safetensors"
        name = "encoder_ema" if averaged and average.exists() else "encoder"
        encoder.load_state_dict(job.tensors("encoder", name))
    elif "weights" in job.settings:
        encoder.load_state_dict(_released(job, channels).state_dict())
    return encoder.to(job.device, job.dtype)


def _released(job: Job, channels: int) -> Encoder:
    """Return the encoder in the file of released weights, which must be the planned one."""
    from maect.weights import CheckpointError, load_for

    path, size = job.weights, job.data.image_size
    assert path is not None
    if sha256(path) != job.settings["weights"]:
        raise CheckpointError(f"{path} is not the file that was planned with: its checksum differs")
    return load_for(path, job.model, image_size=size, in_chans=channels)


def encoder_document(encoder: Encoder) -> dict[str, Any]:
    """Return the sizes of an encoder, to build it again from its file."""
    names = ("image_size", "patch_size", "in_chans", "dim", "depth", "heads", "mlp_ratio")
    return {"architecture": "vit"} | {name: getattr(encoder, name) for name in names}
