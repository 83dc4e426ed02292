"""The encoder that a stage starts from, and how a stage describes the encoder it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maect import hub
from maect.datasets import Split
from maect.files import sha256
from maect.models import Encoder, VisionEncoder, build_encoder
from maect.stages.job import Job


def encoder_of(job: Job, channels: int, *, averaged: bool = False) -> VisionEncoder:
    """Return the encoder a stage starts from: its input's, released weights', or random.

    `averaged`: take the input's moving average where it has one. Raises
    `maect.hub.CheckpointError` for a file of weights other than the planned one.
    """
    encoder: VisionEncoder
    if "encoder" in job.inputs:
        folder = job.inputs["encoder"]
        average = folder / "encoder_ema.safetensors"
        name = "encoder_ema" if averaged and average.exists() else "encoder"
        if hub.network(folder / f"{name}.safetensors"):  # not one of this project's
            encoder = _loaded(job, folder / f"{name}.safetensors", channels)
            encoder.notes = []  # told where it was first read
        else:
            encoder = _random(job, channels)
            encoder.load_state_dict(job.tensors("encoder", name))
    elif "weights" in job.settings:
        path = job.weights
        assert path is not None
        planned = job.settings["weights"], job.settings.get("network", {})
        if (sha256(path), hub.network(path)) != planned:
            raise hub.CheckpointError(
                f"{path} is not the file that was planned with: its checksum differs"
            )
        encoder = _loaded(job, path, channels)
    else:
        encoder = _random(job, channels)
    encoder.recompute(job.numerics.checkpoint_activations)
    return encoder.to(job.device, job.dtype)


def _random(job: Job, channels: int) -> Encoder:
    """Return an encoder with the job's initial weights."""
    size = job.data.image_size
    return build_encoder(job.model, image_size=size, in_chans=channels, seed=job.seed)


def _loaded(job: Job, path: Path, channels: int) -> VisionEncoder:
    """Return the encoder in a file, fit for the job. Raises CheckpointError."""
    from maect.weights import load_for

    size, kind, pool = job.data.image_size, job.kind, job.settings.get("pool")
    return load_for(path, job.model, image_size=size, in_chans=channels, kind=kind, pool=pool)


def usage_notes(encoder: VisionEncoder, pool: str | None, split: Split) -> list[str]:
    """Return an encoder's notes, and what its file states of its use that differs from this use:
    features pooled by `pool`, images normalised by the statistics of `split`."""
    used = {"pool": pool, "mean": list(split.mean), "std": list(split.std)}
    return encoder.notes + [
        f"{name} {used[name]} is used, its file says {value}"
        for name, value in encoder.stated.items()
        if used.get(name) not in (None, value)
    ]


def encoder_document(encoder: VisionEncoder, split: Split, pool: str | None) -> dict[str, Any]:
    """Return what it takes to build an encoder again from its file and to use it.

    Its sizes, how the images of `split` are prepared for evaluation (as timm calls it), and the
    features that are read, where the stage knows them.
    """
    names = ("image_size", "patch_size", "in_chans", "dim", "depth", "heads", "mlp_ratio")
    first = split.batch(np.arange(min(1, len(split))))
    whole = all(image.shape[1:] == encoder.image_size for image in first)
    return {
        "architecture": encoder.architecture,
        **({"model_args": encoder.model_args} if encoder.model_args else {}),
        **{name: getattr(encoder, name) for name in names},
        "mean": list(split.mean),
        "std": list(split.std),
        "interpolation": "bicubic",
        "crop_pct": 1.0 if whole else 224 / 256,
        **({} if pool is None else {"pool": pool}),
    }
