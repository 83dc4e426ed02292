"""MAE and NNCLR in one training: the encoder sees the visible patches of two augmented views.

The decoder reconstructs the others from them, and the head compares their pooled tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maect.device import moved
from maect.losses import mae_loss_per_image
from maect.models import build_decoder, compile_blocks, pool, random_masking
from maect.optim import parameter_groups
from maect.stages.contrastive import TuneTraining
from maect.stages.job import Job, Output
from maect.stages.loop import Values, train
from maect.streams import Stream


class JointTraining(TuneTraining):
    """Encoder and decoder by one optimizer, the head by another."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.masks = [Stream(job.seed, self.role, "mask", view) for view in (0, 1)]
        #: each piece's share of the MAE's loss
        self.shares: list[Tensor] = []

    def trained(self) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
        """Return groups and parameters of encoder and decoder."""
        groups, parameters = super().trained()
        job, size = self.job, self.job.data.image_size
        self.decoder = build_decoder(job.model, size, len(self.train.mean), seed=job.seed)
        self.modules["decoder"] = self.decoder.to(job.device, job.dtype)
        if job.numerics.compile:
            compile_blocks(self.decoder)
        decoder = dict(self.decoder.named_parameters())
        groups += parameter_groups(decoder.items(), self.settings.weight_decay)
        return groups, [*parameters, *decoder.values()]

    def features(self, epoch: int, ids: np.ndarray, frozen_blocks: int) -> Tensor:
        """Return pooled visible tokens [2, b, D] of both views of images `ids` [b]; keep what they
        add to the MAE's loss in `shares`."""
        job, settings = self.job, self.options
        images = self.augment.images(self.train, epoch, ids)
        crops = torch.cat(
            [
                self.augment(images, epoch, ids, view=v, dtype=job.dtype, device=job.device)
                for v in (0, 1)
            ]
        )  # [2b, C, S, S]
        patches = self.encoder.grid[0] * self.encoder.grid[1]
        noise = np.concatenate([mask.uniform(epoch, ids, patches) for mask in self.masks])
        keep, restore, mask = random_masking(moved(noise, job.device), settings.mask_ratio)
        with job.autocast():
            latent = self.encoder(crops, keep)
            predicted = self.decoder(latent, restore)
            pooled = pool(latent, job.settings["pool"])
        errors = mae_loss_per_image(
            predicted, crops, mask.to(job.dtype), self.encoder.patch_size, settings.norm_pix
        )
        # every image hides the same number of patches, so the global count is known
        total = 2 * settings.batch_size * (patches - keep.shape[1])
        self.shares.append(errors.sum() / total)
        return pooled.to(job.dtype).unflatten(0, (2, len(ids)))

    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        self.sums.start()
        self.shares.clear()
        own = [self.features(epoch, indices[piece], 0) for piece in self.pieces]
        features = self.gather(own).requires_grad_()  # [2, B, D]
        values = self.head_gradients(features, epoch, indices)
        assert features.grad is not None
        for piece, pooled, share in zip(self.pieces, own, self.shares, strict=True):
            torch.autograd.backward([share, pooled], [None, features.grad[:, piece]])
            self.sums.add()
        self.sums.finish()
        masked = self.group.gather(torch.stack([share.detach() for share in self.shares])).sum()
        return values | {"loss": masked + values["loss"], "mae_loss": masked}


training = JointTraining


def run(job: Job) -> Output:
    """Return `encoder`, `decoder`, `head` and, where set, `encoder_ema`."""
    return train(training(job))
