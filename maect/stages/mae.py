"""MAE pretraining (He et al. 2022, arXiv 2111.06377)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maect.augment import Images
from maect.device import moved
from maect.losses import mae_loss_per_image
from maect.models import build_decoder, compile_blocks, random_masking
from maect.optim import adamw, parameter_groups
from maect.parallel import GradientSum
from maect.settings import MAESettings
from maect.stages.job import Job, Output
from maect.stages.loop import Training, Values, train
from maect.streams import Stream


class MAETraining(Training[MAESettings]):
    """Encoder and decoder learn to reconstruct the masked patches."""

    role = "mae"

    def __init__(self, job: Job) -> None:
        super().__init__(job, MAESettings.parse(job.settings["train"]))
        channels, size = len(self.train.mean), job.data.image_size
        self.decoder = build_decoder(job.model, size, channels, seed=job.seed)
        self.modules["decoder"] = self.decoder.to(job.device, job.dtype)
        if job.numerics.compile:
            compile_blocks(self.decoder)
        named = [
            (f"{part}.{name}", parameter)
            for part in ("encoder", "decoder")
            for name, parameter in self.modules[part].named_parameters()
        ]
        groups = parameter_groups(named, self.settings.weight_decay)
        self.optimizers = [adamw(groups, self.lr, self.settings.betas)]
        parameters = [p for _, p in named]
        self.sums = GradientSum(parameters, self.group, passes=self.settings.views)
        # the first view's stream keeps the name it had when there was one view
        self.masks = [
            Stream(job.seed, self.role, "mask", *([view] if view else []))
            for view in range(self.settings.views)
        ]

    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        self.sums.start()
        losses = []
        for piece in self.pieces:
            ids = indices[piece]
            images = self.augment.images(self.train, epoch, ids)
            # view after view, so that the activations of one are held
            for view in range(self.settings.views):
                loss = self._share_of_loss(images, epoch, ids, view)
                loss.backward()
                losses.append(loss.detach())
            self.sums.add()
        self.sums.finish()
        return {"loss": self.group.gather(torch.stack(losses)).sum()}

    def _share_of_loss(self, images: Images, epoch: int, ids: np.ndarray, view: int) -> Tensor:
        """Return what one crop of images `ids` [b] adds to the global batch's loss, a scalar."""
        job, settings = self.job, self.settings
        crops = self.augment(
            images, epoch, ids, view=view, dtype=job.dtype, device=job.device
        )  # [b, C, S, S]
        patches = self.encoder.grid[0] * self.encoder.grid[1]
        noise = moved(self.masks[view].uniform(epoch, ids, patches), job.device)  # [b, N]
        keep, restore, mask = random_masking(noise, settings.mask_ratio)
        with job.autocast():
            predicted = self.decoder(self.encoder(crops, keep), restore)  # [b, N, P]
        errors = mae_loss_per_image(
            predicted, crops, mask.to(job.dtype), self.encoder.patch_size, settings.norm_pix
        )  # [b]
        # every image hides the same number of patches, so the global count is known
        total = settings.views * settings.batch_size
        return errors.sum() / (total * (patches - keep.shape[1]))


training = MAETraining


def run(job: Job) -> Output:
    """Return `encoder`, `decoder` and, where set, `encoder_ema`."""
    return train(training(job))
