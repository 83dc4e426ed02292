"""MAE pretraining (He et al. 2022, arXiv 2111.06377)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maect.device import moved
from maect.losses import mae_loss_per_image
from maect.models import build_decoder, random_masking
from maect.optim import adamw, parameter_groups
from maect.parallel import GradientSum
from maect.stages.job import Job
from maect.stages.loop import Training, Values
from maect.streams import Stream


class Reconstruction:
    """The decoder of a training, and what its encoder and decoder lose on masked patches.

    `masks` are the random streams of the views' masks.
    """

    def __init__(self, training: Training, masks: Sequence[Stream]) -> None:
        job = training.job
        channels, size = len(training.train.mean), job.data.image_size
        self.training, self.masks = training, masks
        self.decoder = build_decoder(job.model, size, channels, seed=job.seed)
        training.add("decoder", self.decoder)

    def share_of_loss(
        self, crops: Tensor, epoch: int, ids: np.ndarray, views: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the encoder's tokens of the visible patches, and what crops add to the loss.

        `crops` [V b, C, S, S] are the `views` of images `ids` [b], one view after the other. Tokens
        are [V b, 1+n, D]; the scalar is their share of the global batch's loss.
        """
        job, options, encoder = self.training.job, self.training.options, self.training.encoder
        patches = encoder.grid[0] * encoder.grid[1]
        noise = np.concatenate([self.masks[view].uniform(epoch, ids, patches) for view in views])
        keep, restore, mask = random_masking(moved(noise, job.device), options.mask_ratio)
        with job.autocast():
            latent = encoder(crops, keep)
            predicted = self.decoder(latent, restore)  # [V b, N, P]
        errors = mae_loss_per_image(
            predicted, crops, mask.to(job.dtype), encoder.patch_size, options.norm_pix
        )  # [V b]
        # every image hides the same number of patches, so the global count is known
        total = options.views * options.batch_size
        return latent, errors.sum() / (total * (patches - keep.shape[1]))


class MAETraining(Training):
    """Encoder and decoder learn to reconstruct the masked patches. Leaves both."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.views = range(self.options.views)
        # the first view's stream keeps the name it had when there was one view
        purposes = [("mask", view) if view else ("mask",) for view in self.views]
        masks = [Stream(job.seed, self.role, *purpose) for purpose in purposes]
        self.reconstruction = Reconstruction(self, masks)
        named = [
            (f"{part}.{name}", parameter)
            for part in ("encoder", "decoder")
            for name, parameter in self.modules[part].named_parameters()
        ]
        groups = parameter_groups(named, self.options.weight_decay)
        self.optimizers = [adamw(groups, self.lr, self.options.betas)]
        self.sums = GradientSum([p for _, p in named], self.group, passes=len(self.views))

    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        share, losses = self.reconstruction.share_of_loss, []
        self.sums.start()
        for piece in self.pieces:
            ids = indices[piece]
            images = self.augment.images(self.train, epoch, ids)
            # view after view, so that the activations of one are held, and no crops beside them
            for view in self.views:
                loss = share(self.augment(images, epoch, ids, view), epoch, ids, [view])[1]
                loss.backward()
                losses.append(loss.detach())
            self.sums.add()
        self.sums.finish()
        return {"loss": self.group.gather(torch.stack(losses)).sum()}


training = MAETraining
