"""Head initialisation: the NNCLR head learns on the frozen encoder's features."""

from __future__ import annotations

import numpy as np
import torch

from maect.optim import adamw, parameter_groups
from maect.settings import HeadSettings
from maect.stages.contrastive import ContrastiveTraining
from maect.stages.job import Job, Output, cpu_tensors, encoder_document
from maect.stages.loop import Values, train

SIZES = ("hidden_dim", "predictor_dim", "out_dim", "queue_size")


class HeadTraining(ContrastiveTraining):
    """Only the head is trained; the encoder runs forward, without gradients."""

    role = "head"

    def __init__(self, job: Job) -> None:
        settings = HeadSettings.parse(job.settings["train"])
        super().__init__(job, settings, {name: getattr(settings, name) for name in SIZES})
        self.encoder.requires_grad_(False).eval()
        peak = settings.lr or 0.0
        groups = parameter_groups(self.head_parameters(), settings.weight_decay)
        self.optimizers = [(adamw(groups, peak, settings.betas), peak)]
        self.options = {"topk": settings.topk, "temperature": settings.temperature}

    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        with torch.no_grad():
            own = [self.features(epoch, indices[p], self.encoder.depth) for p in self.pieces]
        return self.head_gradients(self.gather(own), epoch, indices, self.options)

    def after_step(self) -> None:
        pass  # no average: the encoder does not move, and the target projector is not used yet

    def output(self) -> Output:
        self.head.reset_target()  # tuning's target projector starts from the trained one
        output = Output(tensors={"head": cpu_tensors(self.head)})
        if "encoder" not in self.job.inputs:
            output.tensors["encoder"] = cpu_tensors(self.encoder)
            output.documents["encoder"] = encoder_document(self.encoder)
        return output


def run(job: Job) -> Output:
    """Leaves `head` (with its queue), and `encoder` where no input holds it."""
    return train(HeadTraining(job))
