"""What head initialisation and contrastive tuning share: NNCLR on the global batch.

Encoder features of all workers' pieces are gathered; head, batch statistics, loss and queue are
computed on the whole global batch by every worker alike, so they do not depend on how it was cut;
each worker then back-propagates its own pieces' share through the encoder.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maect.augment import Augment
from maect.collapse import effective_rank
from maect.heads import HeadOutput, NNCLRHead
from maect.models import initialize, pool
from maect.settings import AugmentSettings, ScheduleSettings, ViewSettings
from maect.stages.job import Job
from maect.stages.loop import Training, Values
from maect.streams import Stream


class ContrastiveTraining(Training):
    """Two augmented views through the encoder, their pooled features through an NNCLR head."""

    def __init__(self, job: Job, settings: ScheduleSettings, head_sizes: dict[str, int]) -> None:
        self.settings = settings
        super().__init__(job, job.split("train"))
        self.encoder = job.encoder(len(self.train.mean))
        self.head = NNCLRHead(self.encoder.dim, **head_sizes)
        initialize(self.head, job.seed, "head")
        self.head.to(job.device, job.dtype)
        view0, view1 = (ViewSettings.parse(view) for view in job.settings["views"])
        self.augment = Augment(
            AugmentSettings(view0=view0, view1=view1),
            image_size=job.data.image_size,
            mean=self.train.mean,
            std=self.train.std,
            seed=job.seed,
            role=self.role,
        )
        self.draws = Stream(job.seed, self.role, "neighbor")
        self.forward = torch.compile(self.encoder) if job.numerics.compile else self.encoder

    def head_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The head's trained parameters by name (its target projector is not trained)."""
        return [(name, p) for name, p in self.head.named_parameters() if p.requires_grad]

    def features(self, epoch: int, ids: np.ndarray, frozen_blocks: int) -> Tensor:
        """Pooled features of both views of a piece: [2, b, D]."""
        job = self.job
        images = self.train.batch(ids)
        views = [
            self.augment(images, epoch, ids, view=v, dtype=job.dtype, device=job.device)
            for v in (0, 1)
        ]
        with job.autocast():
            tokens = self.forward(torch.cat(views), frozen_blocks=frozen_blocks)
            pooled = pool(tokens, job.settings["pool"])
        return pooled.to(job.dtype).unflatten(0, (2, len(ids)))

    def gather(self, features: list[Tensor]) -> Tensor:
        """Detached features of the global batch: pieces' [2, b, D] -> [2, B, D]."""
        local = torch.cat([piece.detach().transpose(0, 1) for piece in features])
        return self.group.gather(local).transpose(0, 1).contiguous()

    def head_gradients(
        self, features: Tensor, epoch: int, indices: np.ndarray, options: dict[str, Any]
    ) -> Values:
        """Back-propagate the head's loss on the global batch [2, B, D]; what to log."""
        self.pooled = features.detach()[0]
        device = self.job.device
        draws = torch.from_numpy(self.draws.uniform(epoch, indices, 2).T.copy())
        for _, parameter in self.head_parameters():
            parameter.grad = None
        with self.job.autocast():
            output = self.head(
                features[0],
                features[1],
                torch.from_numpy(indices).to(device),
                draws=draws.to(device),
                labels=torch.from_numpy(self.train.labels[indices]).to(device),
                **options,
            )
        output.loss.backward()
        # All workers computed the same gradient. Taking the first one's keeps their copies of
        # the head equal even where a device adds in no fixed order.
        self.group.broadcast([p.grad for _, p in self.head_parameters() if p.grad is not None])
        return _logged(output)

    def watch(self) -> Values:
        """Effective rank of view 0's features in the global batch: how far they are from collapse.

        Neighbour accuracy and queue age, the other two signs, come with the head's loss.
        """
        finite = bool(torch.isfinite(self.pooled).all())  # else the loss says so, and what to do
        return {"effective_rank": effective_rank(self.pooled) if finite else math.nan}


def _logged(output: HeadOutput) -> Values:
    values: Values = {"loss": output.loss.detach()}
    for name in ("neighbor_accuracy", "neighbor_similarity", "queue_age"):
        value = getattr(output, name)
        if value is not None:
            values[name] = value
    return values
