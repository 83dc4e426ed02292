"""k-means: several runs side by side, on CPU or GPU, from greedy k-means++ starts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from maect.finite import require_finite
from maect.streams import generator

if TYPE_CHECKING:
    from torch import Tensor

#: numbers of a block of similarities of centres and images: on a CPU what its caches hold
_BLOCK, _GPU_BLOCK = 2**20, 2**27


class Clusters(NamedTuple):
    label: Tensor  # [R, N] int64
    inertia: Tensor  # [R] float64, sum of squared distances to the own centre
    center: Tensor  # [R, K, D] float32


def kmeans(
    x: Tensor,
    k: int,
    *,
    runs: int = 10,
    seed: int = 0,
    max_iterations: int = 300,
    tol: float = 1e-4,
) -> Clusters:
    """Lloyd's algorithm from `runs` starts: x [N, D].

    A run ends when no image changes its cluster, or when the centres' squared shift is at most
    `tol` times the mean variance of a feature (scikit-learn's rule). An empty cluster takes the
    image farthest from its centre. Equal distances: the lower cluster. ValueError if k is not in
    1..N or a distance is not finite.
    """
    import torch

    if not 1 <= k <= len(x):
        raise ValueError(f"k = {k} clusters of {len(x)} images")
    mean = x.double().mean(0)
    x = (x - mean).float()  # smaller numbers, smaller rounding errors
    norm = x.square().sum(1)
    allowed = tol * norm.mean().item() / x.shape[1]
    center = _starts(x, norm, k, runs, seed)
    label = torch.full((runs, len(x)), -1, device=x.device)
    active = torch.arange(runs, device=x.device)
    for _ in range(max_iterations):
        found, distance = _assign(x, norm, center[active])
        same = (found == label[active]).all(1)
        label[active] = found
        moved = _means(x, _filled(found, distance, k), k)
        shift = (moved - center[active]).square().sum((1, 2))
        center[active] = moved
        active = active[~(same | (shift <= allowed))]
        if not len(active):
            break
    label, _ = _assign(x, norm, center)
    inertia = [
        (x - own.index_select(0, index)).double().square().sum()
        for own, index in zip(center, label, strict=True)
    ]
    total = torch.stack(inertia)
    require_finite("the distances to the centres", total)
    return Clusters(label, total, (center + mean).float())


def _starts(x: Tensor, norm: Tensor, k: int, runs: int, seed: int) -> Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007, with the best of 2 + ln k tries at each
    centre): [N, D] -> [R, K, D]."""
    import torch

    tries = 2 + int(math.log(k))
    draws = generator(seed, "cluster", "start").random((k, runs, tries))
    uniform = torch.from_numpy(draws).to(x.device)
    chosen = (uniform[0, :, :1] * len(x)).long()  # [R, 1]
    nearest = _squared_distances(x, norm, chosen)[:, 0]  # [R, N], to the nearest centre so far
    centers = [chosen]
    for draw in uniform[1:]:
        mass = nearest.double().cumsum(1)
        candidate = torch.searchsorted(mass, draw * mass[:, -1:]).clamp_max(len(x) - 1)
        distance = torch.minimum(_squared_distances(x, norm, candidate), nearest[:, None])
        best = distance.sum(2, dtype=torch.float64).min(1, keepdim=True).indices  # [R, 1]
        nearest = distance.take_along_dim(best[:, :, None], 1)[:, 0]
        centers.append(candidate.gather(1, best))
    return x[torch.cat(centers, 1)]


def _squared_distances(x: Tensor, norm: Tensor, index: Tensor) -> Tensor:
    """From images `index` [R, T] to all: x [N, D] -> [R, T, N]."""
    rows = index.flatten()
    product = x.index_select(0, rows) @ x.T
    distance = norm.index_select(0, rows)[:, None] + norm - 2 * product
    return distance.clamp_min_(0).view(*index.shape, -1)


def _assign(x: Tensor, norm: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centre and squared distance: [N, D], [R, K, D] -> [R, N] each."""
    import torch

    runs, k, _ = center.shape
    flat = center.flatten(0, 1)
    half = flat.square().sum(1, keepdim=True) / 2
    label, distance = [], []
    size = max(256, (_BLOCK if x.device.type == "cpu" else _GPU_BLOCK) // len(flat))
    for rows, squared in zip(x.split(size), norm.split(size), strict=True):
        # the nearest centre has the largest x.c - |c|^2 / 2
        score, index = torch.addmm(half, flat, rows.T, beta=-1).view(runs, k, -1).max(1)
        label.append(index)
        distance.append(squared - 2 * score)
    return torch.cat(label, 1), torch.cat(distance, 1)


def _counts(label: Tensor, k: int) -> Tensor:
    """Return images of each cluster: [R, N] -> [R, K]."""
    ones = label.new_ones(()).expand_as(label)
    return label.new_zeros(len(label), k).scatter_add_(1, label, ones)


def _filled(label: Tensor, distance: Tensor, k: int) -> Tensor:
    """Return labels in which each empty cluster was given the farthest image that can be spared."""
    counts = _counts(label, k)
    if bool((counts > 0).all()):
        return label
    label = label.clone()
    for run in (counts == 0).any(1).nonzero().flatten().tolist():
        size, farthest = counts[run].tolist(), distance[run].argsort(descending=True, stable=True)
        candidates, own = iter(farthest.tolist()), label[run].tolist()
        for cluster in [c for c in range(k) if size[c] == 0]:
            image = next(i for i in candidates if size[own[i]] > 1)
            size[own[image]] -= 1
            label[run, image] = cluster
    return label


def _means(x: Tensor, label: Tensor, k: int) -> Tensor:
    """Return centres of clusters none of which is empty: [N, D], [R, N] -> [R, K, D].

    Sums run over images sorted by cluster, in the same order always, so that a GPU repeats them.
    """
    import torch
    from torch.nn import functional

    runs, n = label.shape
    slot = label + k * torch.arange(runs, device=label.device)[:, None]
    small = torch.int16 if runs * k < 2**15 else torch.int32  # sorts faster
    order = slot.flatten().to(small).argsort(stable=True) % n
    counts = _counts(label, k).flatten()
    offsets = counts.cumsum(0) - counts
    sums = functional.embedding_bag(order, x, offsets, mode="sum")
    return (sums / counts[:, None]).view(runs, k, -1)


def silhouettes(x: Tensor, label: Tensor, k: int) -> Tensor:
    """Return each image's silhouette: x [N, D], clusters [N] of `k` -> [N] float64.

    scikit-learn's `silhouette_samples`, on a device: (b - a) / max(a, b), a the mean distance to
    the others of the cluster, b that to the images of the nearest other one; 0 if it is alone.
    """
    import torch

    x, own = x.double(), label[:, None]
    member = (own == torch.arange(k, device=x.device)).double()  # [N, K]
    size, found = member.sum(0), []
    step = max(1, _GPU_BLOCK // len(x))
    for rows, mine in zip(x.split(step), own.split(step), strict=True):
        total = torch.cdist(rows, x) @ member  # [b, K]
        inside = total.gather(1, mine) / (size[mine] - 1).clamp_min(1)
        means = (total / size).masked_fill(size == 0, math.inf).scatter_(1, mine, math.inf)
        other = means.min(1, keepdim=True).values
        width = (other - inside) / torch.maximum(inside, other)
        found.append(width.nan_to_num(0.0).masked_fill(size[mine] == 1, 0.0)[:, 0])
    return torch.cat(found)
