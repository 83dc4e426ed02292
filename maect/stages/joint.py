"""MAE and NNCLR in one training: the encoder sees the visible patches of two augmented views.

The decoder reconstructs the others from them, and the head compares their pooled tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maect.models import pool
from maect.optim import parameter_groups
from maect.stages.contrastive import TuneTraining
from maect.stages.loop import Values
from maect.stages.mae import Reconstruction
from maect.streams import Stream


class JointTraining(TuneTraining):
    """Encoder and decoder by one optimizer, the head by another. Leaves all three."""

    def trained(self) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
        """Return groups and parameters of encoder and decoder."""
        groups, parameters = super().trained()
        masks = [Stream(self.job.seed, self.role, "mask", view) for view in (0, 1)]
        self.reconstruction = Reconstruction(self, masks)
        decoder = dict(self.reconstruction.decoder.named_parameters())
        groups += parameter_groups(decoder.items(), self.options.weight_decay)
        return groups, [*parameters, *decoder.values()]

    def features(self, epoch: int, ids: np.ndarray, frozen_blocks: int) -> Tensor:
        """Return pooled visible tokens [2, b, D] of both views of images `ids` [b]; keep what they
        add to the MAE's loss in `shares`."""
        crops = torch.cat(self.augment.batch(self.train, epoch, ids))  # [2b, C, S, S]
        latent, share = self.reconstruction.share_of_loss(crops, epoch, ids, (0, 1))
        self.shares.append(share)
        pooled = pool(latent, self.job.settings["pool"])
        return pooled.to(self.job.dtype).unflatten(0, (2, len(ids)))

    def backward(self, number: int, pooled: Tensor, gradient: Tensor) -> None:
        torch.autograd.backward([self.shares[number], pooled], [None, gradient])

    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        #: each piece's share of the MAE's loss
        self.shares: list[Tensor] = []
        values = super().gradients(epoch, indices)
        masked = self.group.gather(torch.stack([share.detach() for share in self.shares])).sum()
        return values | {"loss": masked + values["loss"], "mae_loss": masked}


training = JointTraining
