"""Whether a difference is real: paired t-tests over seeds with Holm's correction, their power."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from scipy import special

from reports.tables.model import Cell, Column, Comparison, Row, Table, Value

ALPHA = 0.05
POWER = 0.8
#: seeds beyond which "the n that would settle it" is not named
MOST = 1000
SHUFFLES = 10_000


def t_two_sided(t: float, df: int) -> float:
    """Return P(|T| >= |t|) of Student's t with `df` degrees of freedom."""
    return 2.0 * float(special.stdtr(df, -abs(t)))


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

    high = 1.0
    while power(n, high, alpha) < POWER:
        high *= 2.0
    return float(brentq(lambda effect: power(n, effect, alpha) - POWER, 0.0, high))


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
    """Return Holm's step-down adjusted p-values, in the order given."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    steps = np.minimum(1.0, np.arange(len(p), 0, -1) * p[order])
    adjusted[order] = np.maximum.accumulate(steps)
    return [float(value) for value in adjusted]


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
    t: float | None = None
    p: float | None = None
    # equal differences up to rounding have no spread, and a t-test nothing to divide by
    if sd and sd >= 1e-9 * max(1.0, abs(mean)):
        t = mean / (sd / math.sqrt(n))
        p = t_two_sided(t, n - 1)
    return Comparison(row.variant, against, column.id, n, mean, sd, t, p, None, None, None, False)


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
            state = "ok" if values else "none"
            table.cells[row.variant, delta.id] = Cell(state, values, cell.delta)
    table.columns = columns
