"""NNCLR head: projector, predictor, neighbour queue and the target projector; MLPs of all heads.

NNCLR: Dwibedi et al. 2021 (arXiv 2104.14548); with a top-k neighbour draw and an EMA target
projector as in MAE-CT (arXiv 2304.10520). Everything here sees the *global* batch: negatives,
batch statistics and the queue do not depend on how the batch was cut.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maect.losses import nnclr_loss
from maect.optim import update_average
from maect.streams import generator

Positive = Literal["neighbor", "oracle", "no_queue", "no_swap"]


class NeighborQueue(nn.Module):
    """First-in, first-out queue of unit-norm embeddings; all of its state is in `state_dict`.

    Buffers: `embeddings` [Q, D], random of unit norm at the start; `ids` [Q] int64, the samples
    they came from, -1 for the random ones; `labels` [Q] int64, -1 where unknown; `pointer` [1],
    the row the next push writes first.
    """

    embeddings: Tensor
    ids: Tensor
    labels: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.empty(size, dim))
        self.register_buffer("ids", torch.empty(size, dtype=torch.int64))
        self.register_buffer("labels", torch.empty(size, dtype=torch.int64))
        self.register_buffer("pointer", torch.empty(1, dtype=torch.int64))
        self.reset(generator(0, "queue"))

    @torch.no_grad()
    def reset(self, random: np.random.Generator) -> None:
        """Start anew with embeddings drawn from `random`, of no sample and no label."""
        draws = random.standard_normal(tuple(self.embeddings.shape), dtype=np.float32)
        self.embeddings.copy_(F.normalize(torch.from_numpy(draws), dim=1))
        self.ids.fill_(-1)
        self.labels.fill_(-1)
        self.pointer.zero_()

    @torch.no_grad()
    def lookup(
        self,
        queries: Tensor,
        ids: Tensor,
        topk: int = 1,
        exclude_own: bool = True,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the `topk` most similar entries: queries [B, D] -> (indices, cosines) [B, k].

        Queries are L2-normalised here. With `exclude_own` an entry of the query's own id (`ids`
        [B]) gets similarity -1. With `labels` [B] entries of other (or unknown) labels get their
        similarity less 2, so that they come last. Most similar first; of equal similarities
        the lowest index comes first for `topk` 1, in `torch.topk`'s order for more.
        """
        with torch.autocast(queries.device.type, enabled=False):
            queries = F.normalize(queries.to(self.embeddings.dtype), dim=1)
            similarities = queries @ self.embeddings.T
        if labels is not None:
            similarities = similarities - 2.0 * (labels[:, None] != self.labels)
        if exclude_own:
            similarities = similarities.masked_fill(ids[:, None] == self.ids, -1.0)
        if topk == 1:
            cosines, indices = similarities.max(dim=1, keepdim=True)
        else:
            cosines, indices = similarities.topk(topk, dim=1)
        return indices, cosines

    def draw(
        self,
        queries: Tensor,
        ids: Tensor,
        draws: Tensor,
        topk: int,
        exclude_own: bool = True,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return a row of the queue for each query: one of its nearest `topk`, by `draws` [B] in
        [0, 1): rows [B].

        Where the queue holds fewer entries of a query's label, one of those. Other arguments are
        those of `lookup`.
        """
        indices, similarities = self.lookup(queries, ids, topk, exclude_own, labels)  # [B, k]
        count = torch.full_like(ids, topk)
        if labels is not None:
            count = (similarities > -1.0).sum(dim=1).clamp(min=1)
        rank = torch.minimum((draws.to(count.device).double() * count).long(), count - 1)
        return indices.gather(1, rank[:, None])[:, 0]

    @torch.no_grad()
    def push(self, embeddings: Tensor, ids: Tensor, labels: Tensor | None = None) -> None:
        """Write embeddings [B, D] (L2-normalised here) with their ids [B] over the oldest entries.

        Wraps around at the end. Of a batch larger than the queue the last rows stay.
        """
        size = len(self.embeddings)
        embeddings, ids = embeddings[-size:], ids[-size:]
        labels = torch.full_like(ids, -1) if labels is None else labels[-size:]
        rows = (self.pointer + torch.arange(len(ids), device=self.pointer.device)) % size
        self.embeddings[rows] = F.normalize(embeddings.to(self.embeddings.dtype), dim=1)
        self.ids[rows] = ids
        self.labels[rows] = labels
        self.pointer.copy_((self.pointer + len(ids)) % size)

    def age(self, indices: Tensor) -> Tensor:
        """Return how old the entries are, in entries written since: 1 (the newest) to Q."""
        return (self.pointer - 1 - indices) % len(self.embeddings) + 1


class HeadOutput(NamedTuple):
    """What one call of the head gives; tensors, so that reading them is the caller's choice.

    All but the loss are None where there is no queue.
    """

    #: scalar, symmetrised over the views
    loss: Tensor
    #: rows of the queue taken as the positives of both views, before the push: [2, B]
    indices: Tensor | None = None
    #: share of view 0's neighbours with the sample's label (what the published code logs)
    neighbor_accuracy: Tensor | None = None
    #: mean cosine between projections and their neighbours, both views
    neighbor_similarity: Tensor | None = None
    #: mean age of the neighbours as a share of the queue, both views, in (0, 1]
    queue_age: Tensor | None = None


def mlp(
    *sizes: int,
    norm: bool = True,
    last_norm: bool = False,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Return Linear-BN-activation for all `sizes` but the last one, then Linear: [B, i] -> [B, o].

    Linears have no biases. `last_norm` ends with a BN. Without `norm` there is no BN, and the
    Linears have biases.
    """
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(sizes), start=2):
        last = number == len(sizes)
        layers.append(nn.Linear(inputs, outputs, bias=not norm))
        layers += [nn.BatchNorm1d(outputs)] if norm and (last_norm or not last) else []
        layers += [] if last else [activation()]
    return nn.Sequential(*layers)


class NNCLRHead(nn.Module):
    """NNCLR head on pooled features [B, dim]; names of its parts as in the published code.

    `target_projector` starts as a copy that shares no storage with `projector`, takes no
    gradient, and follows it by `update_target`. It is in `state_dict` like the rest: loading a
    checkpoint brings back the average itself, not a fresh copy of the online projector.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int = 2048,
        predictor_dim: int = 4096,
        out_dim: int = 256,
        queue_size: int = 65536,
    ) -> None:
        super().__init__()
        #: Linear-BN-ReLU, Linear-BN-ReLU, Linear-BN: [B, dim] -> [B, O]
        self.projector = mlp(dim, hidden_dim, hidden_dim, out_dim, last_norm=True)
        #: Linear-BN-ReLU-Linear: [B, O] -> [B, O]
        self.predictor = mlp(out_dim, predictor_dim, out_dim)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.queue = NeighborQueue(queue_size, out_dim)

    def forward(
        self,
        view0: Tensor,
        view1: Tensor,
        ids: Tensor,
        *,
        topk: int,
        temperature: float,
        draws: Tensor | None = None,
        use_target: bool = False,
        exclude_own: bool = True,
        positive: Positive = "neighbor",
        labels: Tensor | None = None,
    ) -> HeadOutput:
        """Return the loss of the global batch; then view 0's projections enter the queue.

        `view0`, `view1` [B, D] pooled features of the two views; `ids` [B] int64; `labels` [B]
        int64 (for diagnostics, and for `positive` "oracle"); `draws` [2, B] uniform in [0, 1), of
        each view's draw among the `topk` (not needed for 1). `use_target`: lookups and queue take
        the projections of the EMA target projector (tuning), else those of the online one (head
        stage).

        `positive`: "neighbor", the loss is `(L(pred_0, nn_1) + L(pred_1, nn_0)) / 2`; "no_swap",
        `(L(pred_0, nn_0) + L(pred_1, nn_1)) / 2`; "oracle", neighbours of the sample's own label
        only, while the queue holds any; "no_queue", in the place of nn_i stands view i's own
        online projection, through which gradient flows (the published ablation).

        Raises ValueError if draws or labels are needed and missing.
        """
        if positive == "oracle" and labels is None:
            raise ValueError("positive 'oracle' needs labels")

        # ---- each view passes the head by itself, so batch statistics are per view
        views = (view0, view1)
        projected = [self.projector(view) for view in views]  # 2 x [B, O]
        predicted = [self.predictor(projection) for projection in projected]  # 2 x [B, O]

        # ---- keys ask the queue, and view 0's enter it: no gradient
        with torch.no_grad():
            keys = [self.target_projector(view) for view in views] if use_target else projected
        keys = [key.detach() for key in keys]  # 2 x [B, O]

        # ---- positives: 2 x [B, O], rows of unit norm
        found = None
        if positive == "no_queue":
            positives = [F.normalize(projection, dim=1) for projection in projected]
        else:
            wanted = labels if positive == "oracle" else None
            if draws is None:
                if topk > 1:
                    raise ValueError(f"a draw among the top {topk} needs draws [2, B]")
                draws = torch.zeros(2, len(ids))
            pairs = zip(keys, draws, strict=True)
            rows = [self.queue.draw(k, ids, own, topk, exclude_own, wanted) for k, own in pairs]
            found = torch.stack(rows)  # [2, B]
            positives = [self.queue.embeddings[own] for own in found]

        # ---- loss: a view's predictions against the other view's positives
        if positive != "no_swap":
            positives.reverse()
        losses = [nnclr_loss(predicted[i], positives[i], temperature) for i in (0, 1)]
        loss = (losses[0] + losses[1]) / 2
        known = self._diagnosis(keys, found, labels) if found is not None else {}
        self.queue.push(keys[0], ids, labels)
        return HeadOutput(loss, found, **known)

    def update_target(self, momentum: float) -> None:
        """Move the target projector by `1 - momentum` of the way; call after the optimizer step."""
        update_average(self.target_projector, self.projector, momentum)

    def reset_target(self) -> None:
        """Make the target projector equal to the online one (start of training)."""
        self.update_target(0.0)

    @torch.no_grad()
    def _diagnosis(
        self, keys: list[Tensor], found: Tensor, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """Return what `HeadOutput` says of the neighbours `found` [2, B]."""
        queue, known = self.queue, {}
        if labels is not None:
            known["neighbor_accuracy"] = (queue.labels[found[0]] == labels).float().mean()
        cosines = [
            F.cosine_similarity(key.to(queue.embeddings.dtype), queue.embeddings[rows])
            for key, rows in zip(keys, found, strict=True)
        ]
        known["neighbor_similarity"] = torch.cat(cosines).mean()
        known["queue_age"] = queue.age(found).float().mean() / len(queue.embeddings)
        return known
