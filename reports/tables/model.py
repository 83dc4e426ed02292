"""A result table as data: what HTML, terminal, LaTeX, CSV and the rest are all written from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

from reports.display import fixed, mean_sd

#: states in which a cell has a value to show
VALUED = ("ok", "stale", "short", "pruned")


@dataclass(frozen=True)
class Value:
    """One measurement: of one seed, or of several where the stage does not depend on the seed."""

    seeds: tuple[int, ...]
    value: float
    #: keys of the stages behind it
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Paired difference of a row from another one in one column, over the seeds of both."""

    variant: str
    baseline: str
    column: str
    n: int
    #: mean and sd (n - 1) of the paired differences, in the column's unit
    mean: float
    sd: float | None
    #: whether the mean points to where the metric is better
    better: bool
    #: one of the rows is the same for all seeds, a constant
    constant: bool
    t: float | None = None
    p: float | None = None
    #: 95 % confidence interval of the mean by Student's t
    low: float | None = None
    high: float | None = None
    #: named by the suite before the run, and tested by itself
    primary: bool = False
    #: adjusted for all other tests of the report; None of the primary comparison
    p_holm: float | None = None
    #: how many these are
    family: int = 0
    #: smallest true difference that this n would show with 80 % power at 0.05 / tests
    detectable: float | None = None
    #: seeds that would show the difference seen, with the same power; None if more than 1,000
    needed: int | None = None
    #: better than the baseline, and its p, adjusted unless primary, is below 0.05
    survives: bool = False

    @property
    def what(self) -> tuple[str, str, str]:
        """Return what is compared, whichever table shows it."""
        return self.variant, self.baseline, self.column


@dataclass(frozen=True)
class Cell:
    """One number of a table, or the reason why there is none."""

    state: str
    values: tuple[Value, ...] = ()
    mean: float | None = None
    #: over seeds, with n - 1; None below two
    sd: float | None = None
    #: seeds (distinct stages) that the plan has
    planned: int = 0
    reason: str | None = None
    protocol: str | None = None
    #: the stage is the same for all seeds
    fixed: bool = False
    #: the difference from the baseline survives its test
    bold: bool = False
    #: over the draws of the labelled images, each the mean over seeds; None without several
    draws_sd: float | None = None
    #: ids of footnotes
    marks: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for value in self.values for key in value.keys))

    @property
    def by_seed(self) -> dict[int, float]:
        return {seed: v.value for v in self.values for seed in v.seeds}

    @property
    def valued(self) -> bool:
        return self.state in VALUED and bool(self.values)

    def scaled(self, factor: float) -> Cell:
        """Return the cell in another unit."""
        return replace(
            self,
            values=tuple(replace(value, value=value.value * factor) for value in self.values),
            mean=None if self.mean is None else self.mean * factor,
            sd=None if self.sd is None else self.sd * factor,
        )


@dataclass(frozen=True)
class Column:
    """`kind` is metric, published or cost."""

    id: str
    label: str
    unit: str
    kind: str
    digits: int = 1
    group: str | None = None
    higher_is_better: bool = True
    protocol: str | None = None


@dataclass(frozen=True)
class Row:
    variant: str
    group: str | None = None


@dataclass
class Table:
    """Rows × columns of cells, with what has to be said under them."""

    title: str
    rows: list[Row]
    columns: list[Column]
    cells: dict[tuple[str, str], Cell]
    baseline: str | None = None
    seeds: int = 0
    #: of each row with the baseline
    comparisons: list[Comparison] = field(default_factory=list)
    #: sentences above all tables, on the first one, and the comparisons that they tell; what others
    #: published for the rows and metrics of all tables
    headline: list[str] = field(default_factory=list)
    named: list[Comparison] = field(default_factory=list)
    published: Table | None = None
    #: mark -> text, in the order of the marks
    footnotes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    #: what stands over the names of the rows
    corner: str = ""
    #: the same cells of a search by its settings, a table a metric
    crossed: list[Table] = field(default_factory=list)
    #: in a table of these: (row, column) -> (row, column) of the table it was made from
    origins: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    @property
    def metrics(self) -> list[Column]:
        """Return the columns of measured metrics."""
        return [column for column in self.columns if column.kind == "metric"]

    def cell(self, row: Row, column: Column) -> Cell:
        return self.cells[row.variant, column.id]

    def row_groups(self) -> list[tuple[str | None, list[Row]]]:
        """Return consecutive rows of one group together."""
        return [(group, list(rows)) for group, rows in groupby(self.rows, lambda row: row.group)]

    def column_groups(self) -> list[tuple[str | None, list[Column]]]:
        """Return consecutive columns of one group together; one without a group stands alone."""
        numbered = enumerate(self.columns)
        parts = groupby(numbered, lambda at: at[0] if at[1].group is None else at[1].group)
        found = ([column for _, column in part] for _, part in parts)
        return [(columns[0].group, columns) for columns in found]


def each(tables: Iterable[Table]) -> Iterator[Table]:
    """All tables as they are printed: each with the same by the settings of a search; what is
    published comes last."""
    tables = list(tables)
    for table in tables:
        yield table
        yield from table.crossed
    yield from (table.published for table in tables if table.published)


def number(cell: Cell, column: Column) -> str:
    """Return the cell's number as every format prints it; empty where it has none."""
    if not cell.valued or cell.mean is None:
        return ""
    if column.kind == "metric":
        draws = "" if cell.draws_sd is None else f" [{fixed(cell.draws_sd, column.digits)}]"
        return mean_sd(cell.mean, cell.sd, column.digits) + draws
    return fixed(cell.mean, column.digits)


def remark(cell: Cell) -> str:
    """Return what stands beside the number, or instead of it: "2 of 3", "stale", "failed", "–"."""
    if cell.state == "ok":
        return ""
    if cell.state == "short":
        return f"{cell.n} of {cell.planned}"
    if cell.state == "pruned" and cell.n:
        return f"pruned, {cell.n} of {cell.planned}"
    if cell.state in ("none", "not planned"):
        return "–"
    return cell.state


def cell_text(cell: Cell, column: Column) -> str:
    """Return the number and remark on one line, for formats without markup."""
    mark = "".join(raised(mark) for mark in cell.marks)
    value, beside = number(cell, column), remark(cell)
    if value and beside:
        return f"{value}{mark} ({beside})"
    return f"{value or beside}{mark}"


def raised(mark: str) -> str:
    """Return a footnote's letter in superscript, without markup."""
    return dict(zip("abcdefghijklmnop", "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖ", strict=True)).get(mark, f"[{mark}]")


def remark_in_full(cell: Cell) -> str:
    """Return state and reason in words."""
    return cell.state + (f" ({cell.reason})" if cell.reason else "")


def full_label(column: Column) -> str:
    """The column's label where no header above it says what it belongs to."""
    return f"training cost, {column.label}" if column.kind == "cost" else column.label
