"""Head initialisation: the NNCLR head learns on the frozen encoder's features."""

from __future__ import annotations

import numpy as np
import torch

from maect.optim import adamw, parameter_groups
from maect.settings import HeadSettings
from maect.stages.contrastive import ContrastiveTraining
from maect.stages.job import Job, Output
from maect.stages.loop import Values, train

SIZES = {"hidden_dim", "predictor_dim", "out_dim", "queue_size"}


class HeadTraining(ContrastiveTraining[HeadSettings]):
    """Only the head is trained; the encoder runs forward, without gradients."""

    role = "head"
    trains_encoder = False

    def __init__(self, job: Job) -> None:
        settings = HeadSettings.parse(job.settings["train"])
        super().__init__(job, settings, settings.model_dump(include=SIZES))
        self.encoder.requires_grad_(False).eval()
        groups = parameter_groups(self.head_parameters, settings.weight_decay)
        self.optimizers = [adamw(groups, self.lr, settings.betas)]
        self.options = settings.model_dump(include={"topk", "temperature"})

    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        with torch.no_grad():
            own = [self.features(epoch, indices[p], self.encoder.depth) for p in self.pieces]
        return self.head_gradients(self.gather(own), epoch, indices)

    def output(self) -> Output:
        self.head.reset_target()  # tuning's target projector starts from the trained one
        output = super().output()
        if "encoder" in self.job.inputs:  # it lies there unchanged
            del output.tensors["encoder"], output.documents["encoder"]
        return output


def run(job: Job) -> Output:
    """Return `head` (with its queue), and `encoder` where no input holds it."""
    return train(HeadTraining(job))
