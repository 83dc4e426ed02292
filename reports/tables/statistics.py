"""Whether a difference is real: paired t-tests over seeds with Holm's correction, their power."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from scipy import special

from reports.tables.model import Cell, Column, Comparison

ALPHA = 0.05
POWER = 0.8
#: seeds beyond which "the n that would settle it" is not named
MOST = 1000
SHUFFLES = 10_000


def t_critical(df: int, alpha: float = ALPHA) -> float:
    """Return the value that |T| exceeds with probability `alpha`."""
    return -float(special.stdtrit(df, alpha / 2))


def power(n: int, effect: float, alpha: float = ALPHA) -> float:
    """Return the power of a paired two-sided t-test of n pairs.

    `effect` is the true difference over the standard deviation of the differences.
    """
    critical, shift = t_critical(n - 1, alpha), abs(effect) * math.sqrt(n)
    # not a number far out in a tail, where there is nothing
    below, above = np.nan_to_num(special.nctdtr(n - 1, shift, [-critical, critical]))
    return float(1.0 - above + below)


@lru_cache(maxsize=256)
def detectable_effect(n: int, alpha: float = ALPHA) -> float:
    """Return the smallest true difference, in sd of the differences, found with 80 % power."""
    from scipy.optimize import brentq  # takes a fifth of a second

    most = 2.0 * t_critical(n - 1, alpha)
    return float(brentq(lambda effect: power(n, effect, alpha) - POWER, 0.0, most))


def needed_pairs(effect: float, alpha: float = ALPHA) -> int | None:
    """Return the smallest n that finds `effect` sd with 80 % power; None above `MOST`."""
    n = bisect_left(range(MOST + 1), POWER, lo=2, key=lambda n: power(n, effect, alpha))
    return n if n <= MOST else None


def shuffled_spread(values: Sequence[Sequence[float]]) -> float:
    """Return the share of shuffles whose means lie as far apart as those of [cells, seeds].

    A permutation test: if the cells were alike, their values of one seed could be swapped.
    """
    data = np.asarray(values, dtype=float).T
    rng = np.random.default_rng(0)
    observed = float(np.var(data.mean(0))) * (1 - 1e-9)  # the same, added up in another order
    as_far = 0
    for _ in range(SHUFFLES // 1000):
        shuffled = rng.permuted(np.broadcast_to(data, (1000, *data.shape)), axis=2)
        as_far += int(np.count_nonzero(np.var(shuffled.mean(1), axis=1) >= observed))
    return (as_far + 1) / (SHUFFLES + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, in the order given."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    steps = np.minimum(1.0, np.arange(len(p), 0, -1) * p[order])
    adjusted[order] = np.maximum.accumulate(steps)
    return [float(value) for value in adjusted]


def paired(
    cells: dict[tuple[str, str], Cell], variant: str, baseline: str, column: Column
) -> Comparison | None:
    """Return the difference of two rows over their common seeds; None where it cannot be had.

    Where one row is the same for all seeds this is the one-sample test against its value.
    """
    ours, theirs = (cells.get((name, column.id), Cell("none")) for name in (variant, baseline))
    seeds = sorted(ours.by_seed.keys() & theirs.by_seed.keys())
    if not (ours.valued and theirs.valued and seeds) or ours.protocol != theirs.protocol:
        return None
    if ours.fixed and theirs.fixed:
        seeds = seeds[:1]
    n = len(seeds)
    differences = [ours.by_seed[seed] - theirs.by_seed[seed] for seed in seeds]
    mean = math.fsum(differences) / n
    sd = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1)) if n > 1 else None
    better = mean > 0 if column.higher_is_better else mean < 0
    constant = ours.fixed or theirs.fixed
    return _tested(Comparison(variant, baseline, column.id, n, mean, sd, better, constant))


def predicted(row: str, column: Column, ours: Cell, reference: Cell) -> Comparison:
    """Return how far our mean lies from that of other seeds, the reference's; both have values.

    `low` to `high` excludes 0 where our mean lies outside the 95 % prediction interval of the
    reference's seeds, by Student's t with their sd times sqrt(1/n_ref + 1/n_ours). `n` is n_ref,
    `sd` that error times sqrt(n_ref), as if these were the differences of pairs. No test where the
    reference has one seed or no spread.
    """
    assert ours.mean is not None and reference.mean is not None
    mean, n = ours.mean - reference.mean, reference.n
    sd = None if reference.sd is None else reference.sd * math.sqrt(1 + n / ours.n)
    better = mean > 0 if column.higher_is_better else mean < 0
    return _tested(Comparison(row, "reference", column.id, n, mean, sd, better, reference.fixed))


def _tested(found: Comparison) -> Comparison:
    """Return a difference with its t-test, where it allows one."""
    # equal differences up to rounding have no spread, and a t-test nothing to divide by
    if not found.sd or found.sd < 1e-9 * max(1.0, abs(found.mean)):
        return found
    error = found.sd / math.sqrt(found.n)
    p = 2.0 * float(special.stdtr(found.n - 1, -abs(found.mean / error)))
    reach = t_critical(found.n - 1) * error
    low, high = found.mean - reach, found.mean + reach
    return replace(found, t=found.mean / error, p=p, low=low, high=high)


def judged(comparisons: Iterable[Comparison]) -> dict[tuple[str, str, str], Comparison]:
    """Return comparisons with what their tests say, by what is compared; each is tested once.

    A primary comparison, which comes first, is tested by itself. All others are one family of
    Holm's correction, since a reader picks from all of them. What n could show, and which n would
    settle it, is at the level of its first step, which suffices.
    """
    found: dict[tuple[str, str, str], Comparison] = {}
    for one in comparisons:
        found.setdefault(one.what, one)
    family = [one for one in found.values() if one.p is not None and not one.primary]
    adjusted = dict(
        zip((one.what for one in family), holm([one.p or 0.0 for one in family]), strict=True)
    )
    for what, one in found.items():
        if one.p is None or one.sd is None:
            continue
        level, p = (ALPHA, one.p) if one.primary else (ALPHA / len(family), adjusted[what])
        found[what] = replace(
            one,
            p_holm=adjusted.get(what),
            family=len(family),
            survives=p < ALPHA and one.better,
            detectable=detectable_effect(one.n, level) * one.sd,
            needed=needed_pairs(abs(one.mean) / one.sd, level),
        )
    return found
