"""Contrastive tuning: NNCLR with the encoder's upper blocks trained (arXiv 2304.10520)."""

from __future__ import annotations

import numpy as np

from maect.optim import EncoderEMA, adamw, freeze, layer_decay, parameter_groups
from maect.parallel import GradientSum
from maect.settings import TuneSettings
from maect.stages.contrastive import ContrastiveTraining
from maect.stages.job import Job, Output, cpu_tensors, encoder_document
from maect.stages.loop import Values, train


class TuneTraining(ContrastiveTraining):
    """The encoder's upper blocks and the head are trained, each by its own optimizer."""

    role = "tune"

    def __init__(self, job: Job) -> None:
        self.tune = settings = TuneSettings.parse(job.settings["train"])
        super().__init__(job, settings, job.settings["head"])
        if "head" in job.inputs:
            self.head.load_state_dict(job.tensors("head", "head"))
        if settings.encoder_ema:
            self.average = EncoderEMA(self.encoder, settings.encoder_ema)
        self.frozen = settings.frozen_blocks or 0
        freeze(self.encoder, self.frozen)
        names = [name for name, _ in self.encoder.named_parameters()]
        factors = layer_decay(names, self.encoder.depth, settings.layer_decay)
        encoder_groups = parameter_groups(
            self.encoder.named_parameters(), settings.weight_decay, factors
        )
        head_groups = parameter_groups(self.head_parameters(), settings.head_weight_decay)
        peak = settings.lr or 0.0
        head_peak = settings.head_lr or peak
        self.optimizers = [
            (adamw(encoder_groups, peak, settings.betas), peak),
            (adamw(head_groups, head_peak, settings.betas), head_peak),
        ]
        self.sums = GradientSum(list(self.encoder.parameters()), self.group)
        self.options = {
            "topk": settings.topk,
            "temperature": settings.temperature,
            "use_target": True,
            "exclude_own": settings.exclude_own,
            "positive": settings.positive,
        }

    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        self.sums.start()
        own = [self.features(epoch, indices[piece], self.frozen) for piece in self.pieces]
        features = self.gather(own).requires_grad_()
        values = self.head_gradients(features, epoch, indices, self.options)
        assert features.grad is not None
        for piece, pooled in zip(self.pieces, own, strict=True):
            pooled.backward(features.grad[:, piece])
            self.sums.add()
        self.sums.finish()
        return values

    def after_step(self) -> None:
        self.head.update_target(self.tune.target_ema)
        if self.average is not None:
            self.average.update(self.encoder)

    def output(self) -> Output:
        output = Output(
            tensors={"encoder": cpu_tensors(self.encoder), "head": cpu_tensors(self.head)},
            documents={"encoder": encoder_document(self.encoder)},
        )
        if self.average is not None:
            output.tensors["encoder_ema"] = cpu_tensors(self.average.module)
        return output


def run(job: Job) -> Output:
    """Leaves `encoder`, `head` and, where set, `encoder_ema`."""
    return train(TuneTraining(job))
