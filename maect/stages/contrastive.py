"""What the tuning methods share: augmented views of the global batch through encoder and head.

Encoder features of all workers' pieces are gathered; head, batch statistics, loss and queue are
computed on the whole global batch by every worker alike, so they do not depend on how it was cut;
each worker then back-propagates its own pieces' share through the encoder. Head and loss are the
method's (`maect.methods`).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maect import methods
from maect.collapse import effective_rank
from maect.device import moved
from maect.finite import is_finite
from maect.models import VisionEncoder, initialize, pool
from maect.optim import adamw, freeze, layer_decay, parameter_groups, update_average
from maect.parallel import GradientSum
from maect.stages.job import Job, Output
from maect.stages.loop import Training, Values
from maect.streams import Stream


class ContrastiveTraining(Training):
    """Augmented views through the encoder, their features through the method's head."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.progress = 0.0
        self.head = self.method.head(self.encoder.dim, self.options)
        initialize(self.head, job.seed, "head")
        for average in self.method.averages:
            self.head.get_submodule(average).requires_grad_(False)
        self.follow(0.0)
        self.modules["head"] = self.head.to(job.device, job.dtype)
        #: the head's trained parameters by name (its averages are not trained)
        self.head_parameters = [(n, p) for n, p in self.head.named_parameters() if p.requires_grad]
        self.draws = Stream(job.seed, self.role, "neighbor")
        #: the average of the encoder whose features the loss asks for, and these of each piece
        self.teacher: VisionEncoder | None = None
        self.taught: list[Tensor] = []

    def step(self, number: int) -> Values:
        self.progress = number / self.steps
        return super().step(number)

    def features(self, epoch: int, ids: np.ndarray, frozen_blocks: int) -> Tensor:
        """Return features [V, b, D] of all views of a piece of images `ids` [b].

        Those through the teacher are kept in `taught`.
        """
        job, views = self.job, self.augment.batch(self.train, epoch, ids)
        large, local = torch.cat(views[:2]), views[2:]
        with job.autocast():
            found = self.read(self.encoder, large, frozen_blocks)
            if local:
                size = self.options.local_size
                small = F.interpolate(torch.cat(local), size, mode="bilinear", antialias=True)
                found = torch.cat([found, self.read(self.encoder, small, frozen_blocks)])
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.read(self.teacher, large, self.encoder.depth)
                self.taught.append(taught.to(job.dtype).unflatten(0, (2, len(ids))))
        return found.to(job.dtype).unflatten(0, (len(views), len(ids)))

    def read(self, encoder: VisionEncoder, images: Tensor, frozen_blocks: int) -> Tensor:
        """Return what the head sees of an encoder's tokens: [n, C, S, S] -> [n, ..., D]."""
        how = self.job.settings["pool"]
        if self.method.read is not None:
            return self.method.read(encoder, images, frozen_blocks, how, self.options)
        return pool(encoder(images, frozen_blocks=frozen_blocks), how)

    def gather(self, features: list[Tensor]) -> Tensor:
        """Return detached features of the global batch: pieces' [V, b, D] -> [V, B, D]."""
        local = torch.cat([piece.detach().transpose(0, 1) for piece in features])
        return self.group.gather(local).transpose(0, 1).contiguous()

    def head_gradients(self, features: Tensor, epoch: int, indices: np.ndarray) -> Values:
        """Back-propagate the head's loss on the global batch [V, B, D]; return what to log."""
        self.pooled = features.detach()[0]
        count = self.method.draws(self.options)
        draws = self.draws.uniform(epoch, indices, count).T.astype(np.float64)  # [n, B]
        # one copy to the device: ids, labels, and the draws' bits
        numbers = np.stack([indices, self.train.labels[indices], *draws.view(np.int64)])
        ids, labels, *bits = moved(numbers, self.job.device)
        for _, parameter in self.head_parameters:
            parameter.grad = None
        teacher = None
        if self.method.teacher:  # on a frozen encoder both are the same
            teacher = self.gather(self.taught) if self.taught else features.detach()[:2]
            self.taught.clear()
        drawn = torch.stack(bits).view(torch.float64) if bits else None
        views = methods.Views(features, teacher, ids, labels, drawn, self.progress)
        with self.job.autocast():
            values = self.method.loss(self.head, views, self.options)
        values["loss"].backward()
        # All workers computed the same gradient. Taking the first one's keeps their copies of
        # the head equal even where a device adds in no fixed order.
        self.group.broadcast([p.grad for _, p in self.head_parameters if p.grad is not None])
        return {name: value.detach() for name, value in values.items()}

    def follow(self, decay: float) -> None:
        """Move the head's averages, and the teacher, by `1 - decay` of the way."""
        for average, source in self.method.averages.items():
            follower, followed = (self.head.get_submodule(name) for name in (average, source))
            update_average(follower, followed, decay)
        if "teacher" in self.modules:
            update_average(self.modules["teacher"], self.encoder, decay)

    def after_step(self) -> None:
        super().after_step()
        decay = getattr(self.options, "target_ema", None)
        if decay is not None and self.method.teacher:  # to 1, as in BYOL and DINO
            decay = 1 - (1 - decay) * (1 + math.cos(math.pi * self.progress)) / 2
        if decay is not None:
            self.follow(decay)

    def watch(self) -> Values:
        """Return the effective rank of view 0's features: how far they are from collapse.

        Other signs, as neighbour accuracy and queue age, come with the head's loss.
        """
        features = self.pooled if self.pooled.ndim == 2 else self.pooled[:, -1]
        finite = is_finite(features)  # else the loss says so, and what to do
        return {"effective_rank": effective_rank(features) if finite else math.nan}


class HeadTraining(ContrastiveTraining):
    """Only the head is trained; the encoder runs forward, without gradients."""

    trains_encoder = False

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.encoder.requires_grad_(False).eval()
        groups = parameter_groups(self.head_parameters, self.options.weight_decay)
        self.optimizers = [adamw(groups, self.lr, self.options.betas)]

    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        with torch.no_grad():
            own = [self.features(epoch, indices[p], self.encoder.depth) for p in self.pieces]
        return self.head_gradients(self.gather(own), epoch, indices)

    def output(self) -> Output:
        if not hasattr(self.options, "target_ema"):
            self.follow(0.0)  # tuning's averages start from what was trained
        output = super().output()
        if "encoder" in self.job.inputs:  # it lies there unchanged
            del output.tensors["encoder"], output.documents["encoder"]
        return output


class TuneTraining(ContrastiveTraining):
    """The encoder's upper blocks and the head are trained, each by its own optimizer."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        options = self.options
        if "head" in job.inputs:
            self.head.load_state_dict(job.tensors("head", "head"))
        freeze(self.encoder, options.frozen_blocks)
        if self.method.teacher:
            self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
            self.add("teacher", self.teacher)
        encoder_groups, parameters = self.trained()
        head_groups = parameter_groups(self.head_parameters, options.head_weight_decay)
        self.optimizers = [
            adamw(encoder_groups, self.lr, options.betas),
            adamw(head_groups, options.head_lr, options.betas),
        ]
        self.sums = GradientSum(parameters, self.group)

    def trained(self) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
        """Return the optimizer's groups of the encoder, and its parameters."""
        encoder = dict(self.encoder.named_parameters())
        factors = layer_decay(encoder, self.encoder.depth, self.options.layer_decay)
        groups = parameter_groups(encoder.items(), self.options.weight_decay, factors)
        return groups, list(encoder.values())

    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        self.sums.start()
        frozen = self.options.frozen_blocks
        own = [self.features(epoch, indices[piece], frozen) for piece in self.pieces]
        features = self.gather(own).requires_grad_()  # [V, B, D]
        values = self.head_gradients(features, epoch, indices)
        assert features.grad is not None
        for number, piece in enumerate(self.pieces):
            self.backward(number, own[number], features.grad[:, piece])
            self.sums.add()
        self.sums.finish()
        return values

    def backward(self, number: int, pooled: Tensor, gradient: Tensor) -> None:
        """Back-propagate the gradient of a piece's features through the encoder."""
        pooled.backward(gradient)

    def output(self) -> Output:
        output = super().output()
        teacher = output.tensors.pop("teacher", None)
        if teacher is not None and self.options.evaluate == "teacher":
            output.tensors["encoder_ema"] = teacher
        return output


def training(job: Job) -> ContrastiveTraining:
    """Return the training of a stage, ready to take its steps.

    It leaves `head`, and `encoder` where it was trained or no input holds it.
    """
    return HeadTraining(job) if methods.get(job.kind).part == "head" else TuneTraining(job)
