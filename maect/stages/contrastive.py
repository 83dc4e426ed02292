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

from maect.collapse import effective_rank
from maect.device import moved
from maect.finite import is_finite
from maect.heads import HeadOutput, NNCLRHead
from maect.models import initialize, pool
from maect.stages.job import Job
from maect.stages.loop import S, Training, Values
from maect.streams import Stream


class ContrastiveTraining(Training[S]):
    """Two augmented views through the encoder, their pooled features through an NNCLR head."""

    #: keyword arguments of the head's forward pass, apart from the batch
    options: dict[str, Any]

    def __init__(self, job: Job, settings: S, head_sizes: dict[str, int]) -> None:
        super().__init__(job, settings)
        self.head = NNCLRHead(self.encoder.dim, **head_sizes)
        initialize(self.head, job.seed, "head")
        self.modules["head"] = self.head.to(job.device, job.dtype)
        #: the head's trained parameters by name (its target projector is not trained)
        self.head_parameters = [(n, p) for n, p in self.head.named_parameters() if p.requires_grad]
        self.draws = Stream(job.seed, self.role, "neighbor")

    def features(self, epoch: int, ids: np.ndarray, frozen_blocks: int) -> Tensor:
        """Return pooled features [2, b, D] of both views of a piece of images `ids` [b]."""
        job, images = self.job, self.augment.images(self.train, epoch, ids)
        views = [
            self.augment(images, epoch, ids, view=v, dtype=job.dtype, device=job.device)
            for v in (0, 1)
        ]
        with job.autocast():
            tokens = self.encoder(torch.cat(views), frozen_blocks=frozen_blocks)
            pooled = pool(tokens, job.settings["pool"])
        return pooled.to(job.dtype).unflatten(0, (2, len(ids)))

    def gather(self, features: list[Tensor]) -> Tensor:
        """Return detached features of the global batch: pieces' [2, b, D] -> [2, B, D]."""
        local = torch.cat([piece.detach().transpose(0, 1) for piece in features])
        return self.group.gather(local).transpose(0, 1).contiguous()

    def head_gradients(self, features: Tensor, epoch: int, indices: np.ndarray) -> Values:
        """Back-propagate the head's loss on the global batch [2, B, D]; return what to log."""
        self.pooled = features.detach()[0]
        draws = self.draws.uniform(epoch, indices, 2).T.astype(np.float64)  # [2, B]
        # one copy to the device: ids, labels, and the draws' bits
        numbers = np.stack([indices, self.train.labels[indices], *draws.view(np.int64)])
        ids, labels, *bits = moved(numbers, self.job.device)
        for _, parameter in self.head_parameters:
            parameter.grad = None
        with self.job.autocast():
            output: HeadOutput = self.head(
                features[0],
                features[1],
                ids,
                draws=torch.stack(bits).view(torch.float64),
                labels=labels,
                **self.options,
            )
        output.loss.backward()
        # All workers computed the same gradient. Taking the first one's keeps their copies of
        # the head equal even where a device adds in no fixed order.
        self.group.broadcast([p.grad for _, p in self.head_parameters if p.grad is not None])
        found = output._asdict() | {"loss": output.loss.detach(), "indices": None}
        return {name: value for name, value in found.items() if value is not None}

    def watch(self) -> Values:
        """Return the effective rank of view 0's features: how far they are from collapse.

        Neighbour accuracy and queue age, the other two signs, come with the head's loss.
        """
        finite = is_finite(self.pooled)  # else the loss says so, and what to do
        return {"effective_rank": effective_rank(self.pooled) if finite else math.nan}
