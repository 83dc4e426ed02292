"""Contrastive tuning: NNCLR with the encoder's upper blocks trained (arXiv 2304.10520)."""

from __future__ import annotations

import numpy as np

from maect.optim import adamw, freeze, layer_decay, parameter_groups
from maect.parallel import GradientSum
from maect.settings import TuneSettings
from maect.stages.contrastive import ContrastiveTraining
from maect.stages.job import Job, Output
from maect.stages.loop import Values, train


class TuneTraining(ContrastiveTraining[TuneSettings]):
    """The encoder's upper blocks and the head are trained, each by its own optimizer."""

    role = "tune"

    def __init__(self, job: Job) -> None:
        settings = TuneSettings.parse(job.settings["train"])
        super().__init__(job, settings, job.settings["head"])
        if "head" in job.inputs:
            self.head.load_state_dict(job.tensors("head", "head"))
        self.frozen = settings.frozen_blocks or 0
        freeze(self.encoder, self.frozen)
        encoder = dict(self.encoder.named_parameters())
        factors = layer_decay(encoder, self.encoder.depth, settings.layer_decay)
        encoder_groups = parameter_groups(encoder.items(), settings.weight_decay, factors)
        head_groups = parameter_groups(self.head_parameters, settings.head_weight_decay)
        self.optimizers = [
            adamw(encoder_groups, self.lr, settings.betas),
            adamw(head_groups, settings.head_lr or self.lr, settings.betas),
        ]
        self.sums = GradientSum(list(encoder.values()), self.group)
        chosen = settings.model_dump(include={"topk", "temperature", "exclude_own", "positive"})
        self.options = {**chosen, "use_target": True}

    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        self.sums.start()
        own = [self.features(epoch, indices[piece], self.frozen) for piece in self.pieces]
        features = self.gather(own).requires_grad_()  # [2, B, D]
        values = self.head_gradients(features, epoch, indices)
        assert features.grad is not None
        for piece, pooled in zip(self.pieces, own, strict=True):
            pooled.backward(features.grad[:, piece])
            self.sums.add()
        self.sums.finish()
        return values

    def after_step(self) -> None:
        super().after_step()
        self.head.update_target(self.settings.target_ema)


def run(job: Job) -> Output:
    """Return `encoder`, `head` and, where set, `encoder_ema`."""
    return train(TuneTraining(job))
