"""Features of all splits, as evaluations read them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maect.augment import evaluation_transform
from maect.datasets import Split
from maect.models import pool
from maect.stages.job import Job, Output

BATCH = 256
SPLITS = ("train", "selection", "test")


def run(job: Job) -> Output:
    """Leaves `features`: for each split x [N, D] float32 and y [N] int64.

    Raw pixels where the settings say `init: pixels`, in [0, 1] and flattened.
    """
    job.prepare()
    tensors: dict[str, Tensor] = {}
    for name in SPLITS:
        split = job.split(name)
        tensors[f"{name}_x"] = _split_features(job, split)
        tensors[f"{name}_y"] = torch.from_numpy(np.asarray(split.labels, dtype=np.int64))
    width = tensors["train_x"].shape[1]
    return Output(tensors={"features": tensors}, summary={"dim": width, "classes": split.classes})


def _split_features(job: Job, split: Split) -> Tensor:
    pixels = job.settings.get("init") == "pixels"
    channels = len(split.mean)
    encoder = None if pixels else job.encoder(channels, averaged=True).eval()
    rows = []
    with torch.inference_mode():
        for start in range(0, len(split), BATCH):
            ids = np.arange(start, min(start + BATCH, len(split)))
            images = evaluation_transform(
                split.batch(ids),
                image_size=job.data.image_size,
                mean=[0.0] * channels if pixels else split.mean,
                std=[1.0] * channels if pixels else split.std,
                dtype=job.dtype,
                device=job.device,
            )
            if encoder is None:
                rows.append(images.flatten(1).float().cpu())
                continue
            with job.autocast():
                features = pool(encoder.forward_features(images), job.settings["pool"])
            rows.append(features.float().cpu())
    return torch.cat(rows)
