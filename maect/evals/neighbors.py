"""Exact nearest neighbours by cosine, in blocks of bounded memory, on CPU or GPU.

The neighbours returned depend neither on block sizes nor on how a matrix product sums: float32
products only *screen*. A product is off by at most `_bound`, so every row within twice that of the
k-th best is kept, and what is kept is compared by products and sums in double precision, pair by
pair. Equal similarities are ordered by row, lower first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from maect.finite import require_finite

if TYPE_CHECKING:
    from torch import Tensor

#: queries and stored rows compared in one product, [65536, 256] at most, and numbers of these rows
QUERY_BLOCK = 256
TRAIN_BLOCK = 65536
TRAIN_NUMBERS = 2**24
#: stored rows per group of the first selection
GROUP = 25
#: numbers prepared at a time in double precision, and columns
ROW_NUMBERS = 2**20
COLUMNS = 32
#: numbers held at a time by the comparison in double precision
PAIR_NUMBERS = 2**22


def statistics(train: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased deviation + 1e-5 of each feature: [N, D] -> [D] float64 each.

    As in the published evaluation. A few columns at a time, so that no copy of all is made.
    """
    import torch

    scratch, found = train.new_empty(len(train) * COLUMNS, dtype=torch.float64), []
    for columns in train.split(COLUMNS, dim=1):
        block = scratch[: columns.numel()].view(columns.shape).copy_(columns)
        found.append((block.mean(0), block.std(0, correction=1)))
    return torch.cat([mean for mean, _ in found]), torch.cat([std for _, std in found]) + 1e-5


def standardized(x: Tensor, found: tuple[Tensor, Tensor]) -> Tensor:
    """Return rows less the mean, over the deviation, of `statistics`: [N, D] -> [N, D] float64."""
    mean, deviation = found
    return (x - mean).div_(deviation)


def normalize_rows(x: Tensor, found: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Rows of unit L2 norm (zero rows stay zero), computed in float64: [N, D] -> [N, D] float32.

    `found`: first standardise by these `statistics`. Raises ValueError if a value is not finite.
    """
    import torch

    unit = torch.empty_like(x, dtype=torch.float32)
    step = max(1, ROW_NUMBERS // x.shape[1])
    for rows, out in zip(x.split(step), unit.split(step), strict=True):
        rows = rows.double() if found is None else standardized(rows, found)
        require_finite("the features", rows)
        out.copy_(rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12))
    return unit


def nearest(
    stored: Tensor,
    queries: Tensor,
    k: int,
    unit: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> tuple[Tensor, Tensor]:
    """Return the k stored rows most similar to each query, best first.

    stored [N, D], queries [Q, D] -> similarity [Q, k] float64, row [Q, k] int64, on the CPU. `unit`
    makes float32 rows of norm 1 of both; of the stored ones block by block, so that there is never
    a second copy of all. Raises ValueError if k is not in 1..N.
    """
    import torch

    if not 1 <= k <= len(stored):
        raise ValueError(f"k = {k} neighbours of {len(stored)} stored rows")
    best_s = torch.empty(len(queries), 0, dtype=torch.float64, device=stored.device)
    best_i = torch.empty(len(queries), 0, dtype=torch.int64, device=stored.device)
    queries, rows = unit(queries), min(TRAIN_BLOCK, TRAIN_NUMBERS // stored.shape[1])
    rows = rows // GROUP * GROUP or 1  # whole groups, which need no rows of zeros
    for start in range(0, len(stored), rows):
        count = min(rows, len(stored) - start)
        similarity, row = _nearest_in_chunk(
            unit(stored[start : start + rows]), queries, min(k, count)
        )
        # earlier rows come first, so that the stable sort keeps the lower row of a tie
        best_s, order = torch.cat([best_s, similarity], 1).sort(dim=1, descending=True, stable=True)
        best_s, order = best_s[:, :k], order[:, :k]
        best_i = torch.cat([best_i, row + start], 1).gather(1, order)
    return best_s.cpu(), best_i.cpu()


def _nearest_in_chunk(stored: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import torch

    n = len(stored)
    size = GROUP if n >= GROUP * max(k, GROUP) else 1
    if n % size:
        stored = torch.cat([stored, stored.new_zeros(-n % size, stored.shape[1])])
    scratch = stored.new_empty(len(stored) * QUERY_BLOCK)
    similarity = [stored.new_empty(0, k, dtype=torch.float64)]
    row = [stored.new_empty(0, k, dtype=torch.int64)]
    for block in queries.split(QUERY_BLOCK):
        candidates = _candidates(stored, block, scratch, n, size, k)
        step = max(1, PAIR_NUMBERS // (candidates.shape[1] * stored.shape[1]))
        for rows, query in zip(candidates.split(step), block.split(step), strict=True):
            best = _best_of(stored, n, query, rows, k)
            similarity.append(best[0])
            row.append(best[1])
    return torch.cat(similarity), torch.cat(row)


def _bound(dim: int) -> float:
    """Return the largest error of a float32 product of two rows of norm 1.

    Products and sums of D terms err by (D + 2) units (Higham 2002, section 3.1), doubled for the
    sake of unknown hardware; 1.02 covers norms that rounding raised above 1. Factors may be
    rounded to TF32 or bfloat16 where torch allows it.
    """
    import torch

    unit = {"highest": 2.0**-24, "high": 2.0**-10, "medium": 2.0**-8}
    return 1.02 * 2 * (dim + 2) * unit[torch.get_float32_matmul_precision()]


def _candidates(
    stored: Tensor, block: Tensor, scratch: Tensor, n: int, size: int, k: int
) -> Tensor:
    """Return rows that may be among the k nearest of a block's queries, some in excess: [B, c].

    `scratch` has room for the products of all rows with the block.
    """
    import torch

    (rows, dim), count = stored.shape, len(block)
    slack = 2 * _bound(dim)
    products = scratch[: rows * count].view(rows, count)
    torch.mm(stored, block.T, out=products)  # [rows, B]
    products[n:] = -float("inf")
    # k groups of rows reach the k-th best of the groups' maxima, so k rows do: a group that
    # stays below it by more than the slack holds no neighbour
    grouped = products.view(-1, size, count)
    group = _within(grouped.amax(1).T.contiguous(), k, slack)  # [B, groups kept]
    kept = grouped.permute(2, 0, 1).gather(1, group[:, :, None].expand(-1, -1, size))
    place = _within(kept.flatten(1), k, slack)
    return group.gather(1, place // size) * size + place % size


def _within(values: Tensor, k: int, slack: float) -> Tensor:
    """Places of the values of each row down to `slack` below its k-th best: [B, n] -> [B, c]."""
    guess = min(4 * k, values.shape[1])
    top = values.topk(guess, 1)
    threshold = top.values[:, k - 1 : k].double() - slack
    count = int((values >= threshold).sum(1).max())
    return top.indices[:, :count] if count <= guess else values.topk(count, 1).indices


def _best_of(
    stored: Tensor, n: int, queries: Tensor, candidates: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k best of [B, c] candidate rows by similarity in float64, then by row: [B, k] each."""
    pairs = _rows(stored, candidates)
    rough = (pairs @ queries[:, :, None]).squeeze(2)
    rough[candidates >= n] = -float("inf")
    place = _within(rough, k, 2 * _bound(stored.shape[1]))
    candidates = candidates.gather(1, place).sort(dim=1).values
    pairs = _rows(stored, candidates).double()
    similarity = pairs.mul_(queries[:, None]).sum(2)
    similarity[candidates >= n] = -float("inf")
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return similarity[:, :k], candidates.gather(1, order[:, :k])


def _rows(stored: Tensor, index: Tensor) -> Tensor:
    """`stored[index]`: [N, D], [B, c] -> [B, c, D]; index_select is the faster way."""
    return stored.index_select(0, index.flatten()).view(*index.shape, -1)
