"""Is a difference real? Paired t-tests over seeds with Holm's correction, and their power.

The t distributions are integrals over the chi distribution of the estimated scale, so that a
report need not import scipy for a dozen numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from reports.tables.model import Cell, Column, Comparison, Row, Table, Value

ALPHA = 0.05
POWER = 0.8
#: seeds beyond which "the n that would settle it" is not named
MOST = 1000
SHUFFLES = 10_000


@lru_cache(maxsize=1)
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [-1, 1]."""
    return np.polynomial.legendre.leggauss(240)


@lru_cache(maxsize=512)
def _scale_density(df: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes s and weights f(s) ds of s = sqrt(chi2_df / df)."""
    nodes, weights = _nodes()
    spread = 12.0 / math.sqrt(2.0 * df)
    low, high = max(0.0, 1.0 - spread), 1.0 + spread
    s = 0.5 * (high - low) * nodes + 0.5 * (high + low)
    log_constant = math.log(2.0) + 0.5 * df * math.log(0.5 * df) - math.lgamma(0.5 * df)
    density = np.exp(log_constant + (df - 1) * np.log(s) - 0.5 * df * s * s)
    return s, 0.5 * (high - low) * weights * density


def t_cdf(t: float, df: int, noncentrality: float = 0.0) -> float:
    """P(T <= t) of Student's t with `df` degrees of freedom, noncentral where asked."""
    s, weights = _scale_density(df)
    arguments = (t * s - noncentrality) / math.sqrt(2.0)
    normal = [0.5 * math.erfc(-x) for x in arguments]
    return float(min(1.0, max(0.0, np.dot(weights, normal))))


def t_two_sided(t: float, df: int) -> float:
    """P(|T| >= |t|)."""
    if df == 1:  # Cauchy's; its far tail is no matter for quadrature
        return 2.0 / math.pi * math.atan2(1.0, abs(t))
    return min(1.0, 2.0 * t_cdf(-abs(t), df))


@lru_cache(maxsize=2048)
def t_critical(df: int, alpha: float = ALPHA) -> float:
    """Value that |T| exceeds with probability `alpha`."""
    return _solve(lambda t: -t_two_sided(t, df), -alpha)


def _solve(rising: object, target: float) -> float:
    """Where a rising function of a non-negative number reaches `target`, by bisection."""
    assert callable(rising)
    high = 1.0
    while rising(high) < target and high < 1e6:
        high *= 2.0
    low = 0.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return 0.5 * (low + high)


def power(n: int, effect: float, alpha: float = ALPHA) -> float:
    """Power of a paired two-sided t-test of n pairs; `effect` = true difference / sd."""
    critical, shift = t_critical(n - 1, alpha), abs(effect) * math.sqrt(n)
    return 1.0 - t_cdf(critical, n - 1, shift) + t_cdf(-critical, n - 1, shift)


@lru_cache(maxsize=256)
def detectable_effect(n: int, alpha: float = ALPHA) -> float:
    """Smallest true difference, in sd of the paired differences, found with 80 % power."""
    return _solve(lambda effect: power(n, effect, alpha), POWER)


def needed_pairs(effect: float, alpha: float = ALPHA, most: int = MOST) -> int | None:
    """Smallest n that finds a true difference of `effect` sd with 80 % power; None above `most`."""
    if effect == 0.0 or power(most, effect, alpha) < POWER:
        return None
    low, high = 1, 2  # power(low) < POWER <= power(high)
    while power(high, effect, alpha) < POWER:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, effect, alpha) >= POWER else (middle, high)
    return high


def shuffled_spread(values: Sequence[Sequence[float]]) -> float:
    """Share of shuffles whose means lie as far apart as those of `values` [cells, seeds].

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
    """Holm's step-down adjusted p-values, in the order given."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def paired(cell: Cell, baseline: Cell, row: Row, against: str, column: Column) -> Comparison | None:
    """Difference of two cells over their common seeds, untested by Holm; None without any."""
    ours, theirs = cell.by_seed, baseline.by_seed
    seeds = sorted(ours.keys() & theirs.keys())
    if not cell.valued or not baseline.valued or not seeds:
        return None
    if cell.fixed and baseline.fixed:
        seeds = seeds[:1]
    n = len(seeds)
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean = math.fsum(differences) / n
    sd = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1)) if n > 1 else None
    # equal differences up to rounding have no spread, and a t-test nothing to divide by
    if not sd or sd < 1e-9 * max(1.0, abs(mean)):
        return Comparison(
            row.variant, against, column.id, n, mean, sd, None, None, None, None, None, False
        )
    t = mean / (sd / math.sqrt(n))
    return Comparison(
        row.variant, against, column.id, n, mean, sd, t, t_two_sided(t, n - 1), None, None, None,
        False,
    )  # fmt: skip


def compare(table: Table, *, deltas: bool = False) -> None:
    """Compare each row with the table's baseline; mark what survives; add deltas if asked.

    Holm's correction is over all comparisons of the table: a reader picks from all of them. What
    n could show, and which n would settle it, is at the level of its first step, which suffices.
    """
    assert table.baseline is not None
    metrics = [column for column in table.columns if column.kind == "metric"]
    found = []
    for column in metrics:
        baseline = table.cells[table.baseline, column.id]
        for row in table.rows:
            if row.variant != table.baseline:
                cell = table.cell(row, column)
                found.append(paired(cell, baseline, row, table.baseline, column))
    comparisons = [c for c in found if c is not None]
    tested = [i for i, c in enumerate(comparisons) if c.p is not None]
    adjusted = holm([p for i in tested if (p := comparisons[i].p) is not None])
    direction = {column.id: 1 if column.higher_is_better else -1 for column in metrics}
    for i, p_holm in zip(tested, adjusted, strict=True):
        one, level = comparisons[i], ALPHA / len(tested)
        assert one.sd
        comparisons[i] = replace(
            one,
            p_holm=p_holm,
            survives=one.mean * direction[one.column] > 0 and p_holm < ALPHA,
            detectable=detectable_effect(one.n, level) * one.sd,
            needed=needed_pairs(abs(one.mean) / one.sd, level),
        )
    table.comparisons = comparisons
    for comparison in comparisons:
        table.update(
            comparison.variant, comparison.column, bold=comparison.survives, delta=comparison.mean
        )
    if deltas:
        _add_deltas(table)


def _add_deltas(table: Table) -> None:
    """A column of mean paired differences behind each metric."""
    columns: list[Column] = []
    for column in table.columns:
        columns.append(column)
        if column.kind != "metric":
            continue
        delta = replace(column, id=f"{column.id}.delta", label=f"Δ {table.baseline}", kind="delta")
        columns.append(delta)
        for row in table.rows:
            cell = table.cell(row, column)
            values = () if cell.delta is None else (Value((), cell.delta, cell.keys),)
            table.cells[row.variant, delta.id] = Cell("ok" if values else "none", values)
    table.columns = columns
