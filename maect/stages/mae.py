"""MAE pretraining (He et al. 2022, arXiv 2111.06377)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maect.augment import Augment
from maect.losses import mae_loss_per_image
from maect.models import decoder_from, random_masking
from maect.optim import EncoderEMA, adamw, parameter_groups
from maect.parallel import GradientSum
from maect.settings import AugmentSettings, MAESettings, ViewSettings
from maect.stages.job import Job, Output, cpu_tensors, encoder_document
from maect.stages.loop import Training, Values, train
from maect.streams import Stream


class MAETraining(Training):
    """Encoder and decoder learn to reconstruct the masked patches."""

    role = "mae"

    def __init__(self, job: Job) -> None:
        self.mae = self.settings = settings = MAESettings.parse(job.settings["train"])
        super().__init__(job, job.split("train"))
        channels, size = len(self.train.mean), job.data.image_size
        self.encoder = job.encoder(channels)
        self.decoder = decoder_from(job.model, size, channels, seed=job.seed)
        self.decoder.to(job.device, job.dtype)
        if settings.encoder_ema:
            self.average = EncoderEMA(self.encoder, settings.encoder_ema)
        named = [
            *((f"encoder.{name}", p) for name, p in self.encoder.named_parameters()),
            *((f"decoder.{name}", p) for name, p in self.decoder.named_parameters()),
        ]
        peak = settings.lr or 0.0
        groups = parameter_groups(named, settings.weight_decay)
        self.optimizers = [(adamw(groups, peak, settings.betas), peak)]
        self.sums = GradientSum([p for _, p in named], self.group)
        self.augment = Augment(
            AugmentSettings(view0=ViewSettings.parse(job.settings["views"][0])),
            image_size=size,
            mean=self.train.mean,
            std=self.train.std,
            seed=job.seed,
            role=self.role,
        )
        self.masks = Stream(job.seed, self.role, "mask")
        self.forward = torch.compile(self.encoder) if job.numerics.compile else self.encoder

    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        self.sums.start()
        losses = []
        for piece in self.pieces:
            loss = self._share_of_loss(epoch, indices[piece])
            loss.backward()
            self.sums.add()
            losses.append(loss.detach())
        self.sums.finish()
        return {"loss": self.group.gather(torch.stack(losses)).sum()}

    def _share_of_loss(self, epoch: int, ids: np.ndarray) -> Tensor:
        """What these images add to the global batch's loss, a scalar."""
        job, settings = self.job, self.mae
        images = self.augment(
            self.train.batch(ids), epoch, ids, view=0, dtype=job.dtype, device=job.device
        )
        patches = self.encoder.grid[0] * self.encoder.grid[1]
        noise = torch.from_numpy(self.masks.uniform(epoch, ids, patches)).to(job.device)
        keep, restore, mask = random_masking(noise, settings.mask_ratio)
        with job.autocast():
            predicted = self.decoder(self.forward(images, keep), restore)
        errors = mae_loss_per_image(
            predicted, images, mask.to(job.dtype), self.encoder.patch_size, settings.norm_pix
        )
        # every image hides the same number of patches, so the global count is known
        return errors.sum() / (settings.batch_size * (patches - keep.shape[1]))

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update(self.encoder)

    def output(self) -> Output:
        output = Output(
            tensors={"encoder": cpu_tensors(self.encoder), "decoder": cpu_tensors(self.decoder)},
            documents={"encoder": encoder_document(self.encoder)},
        )
        if self.average is not None:
            output.tensors["encoder_ema"] = cpu_tensors(self.average.module)
        return output


def run(job: Job) -> Output:
    """Leaves `encoder`, `decoder` and, where set, `encoder_ema`."""
    return train(MAETraining(job))
