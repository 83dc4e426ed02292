"""Whether tables reproduce a reference: cell by cell the same digits, seed noise, or neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from reports.display import plural
from reports.frames import unequal
from reports.tables.model import Cell, Column, Comparison, Table
from reports.tables.statistics import ALPHA, judged, predicted

SAME, NOISE, DIFFERENT = "the same digits", "within seed noise", "not reproduced"
#: how a sentence says that one cell has a verdict, or several
_SAID = {SAME: ("has", "have"), NOISE: ("lies", "lie"), DIFFERENT: ("is", "are")}
#: what is told of an environment and explains no digit
_IDLE = {"host", "platform", "cores"}


@dataclass(frozen=True)
class Reference:
    """What tables are held against. Cells are by row and column; `what` says of which suite.

    The values were rounded to `decimals`; None if they were not.
    """

    name: str
    what: str
    cells: dict[tuple[str, str], Cell]
    environment: dict[str, Any]
    decimals: int | None = None


@dataclass(frozen=True)
class Held:
    """A cell that has a value here and in the reference; `test` is of the difference of means."""

    column: Column
    ours: Cell
    reference: Cell
    test: Comparison
    verdict: str


@dataclass(frozen=True)
class Against:
    """What was found; `environment` has what differs: (name, here, reference)."""

    reference: Reference
    cells: list[Held]
    only_here: list[tuple[str, str]]
    only_there: list[tuple[str, str]]
    environment: list[tuple[str, Any, Any]]

    @property
    def reproduced(self) -> bool:
        """Return whether there are cells to compare, and none is other than by seed noise."""
        return bool(self.cells) and all(one.verdict != DIFFERENT for one in self.cells)

    @property
    def sentence(self) -> str:
        """Return the result in a sentence."""
        if not self.cells:
            return (
                "nothing to compare yet: no cell of the reference has a value here "
                "(those of older code count with --keep-stale)."
            )
        counts = Counter(one.verdict for one in self.cells)
        said = [f"{n} {_SAID[v][n > 1]} {v}" for v in _SAID if (n := counts[v])]
        whole = "reproduced" if self.reproduced else "not reproduced"
        return f"{whole}: of {plural(len(self.cells), 'cell')} {', '.join(said)}."


def measured(tables: Iterable[Table]) -> dict[tuple[str, str], tuple[Column, Cell]]:
    """Return every cell of a metric once, by row and column, whether it has a value or not."""
    return {
        (row.variant, column.id): (column, table.cell(row, column))
        for table in tables
        for column in table.metrics
        for row in table.rows
    }


def hold(tables: Iterable[Table], environment: dict[str, Any], reference: Reference) -> Against:
    """Return how far tables reproduce a reference.

    A cell has the same digits if the values of all common seeds are equal after rounding. Another
    cell lies within seed noise unless `predicted` shows its mean outside, after Holm's correction
    over all such cells. A reference of one seed, or without spread, has no noise to lie within.
    """
    ours = {at: one for at, one in measured(tables).items() if one[1].valued}
    both = [at for at in ours if at in reference.cells]
    tests = {at: predicted(at[0], *ours[at], reference.cells[at]) for at in both}
    same = {at for at in both if _same(ours[at][1], reference.cells[at], reference.decimals)}
    tested = judged(tests[at] for at in both if at not in same)
    cells = []
    for at in both:
        test = tested.get(tests[at].what, tests[at])
        seen = test.p_holm is None or test.p_holm < ALPHA
        verdict = SAME if at in same else DIFFERENT if seen else NOISE
        cells.append(Held(*ours[at], reference.cells[at], test, verdict))
    return Against(
        reference,
        cells,
        only_here=[at for at in ours if at not in tests],
        only_there=[at for at in reference.cells if at not in tests],
        environment=[
            (name, here, there)
            for name, here, there in unequal(environment, reference.environment)
            if name in environment and name in reference.environment and name not in _IDLE
        ],
    )


def _same(ours: Cell, reference: Cell, decimals: int | None) -> bool:
    """Return whether there are common seeds, and their values are equal after rounding."""
    common = ours.by_seed.keys() & reference.by_seed.keys()
    pairs = [(ours.by_seed[seed], reference.by_seed[seed]) for seed in common]
    if decimals is not None:
        pairs = [(round(here, decimals), round(there, decimals)) for here, there in pairs]
    return bool(pairs) and all(here == there for here, there in pairs)
