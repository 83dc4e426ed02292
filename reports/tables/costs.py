"""What rows and the suite cost: devices held × wall time, shared stages counted once.

Without a GPU the devices are cores. What the processes themselves computed is CPU time, apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from reports.display import amount, device_word, duration, plural, short, time_unit
from reports.frames import DONE, SuiteView
from reports.tables.cells import gathered
from reports.tables.model import Cell, Column, Table
from reports.tables.published import PUBLISHED

_HOURS = pl.col("device_hours")


@dataclass(frozen=True)
class Quantity:
    """Something metered: its column in a view, that of the reason where it is blank, its words."""

    name: str
    reason: str | None
    label: str
    unit: str
    #: that of several stages or attempts
    together: pl.Expr

    def text(self, value: float) -> str:
        """Return a value with its unit."""
        return duration(value) if self.unit == "s" else f"{amount(value)} {self.unit}"

    def of(self, rows: pl.DataFrame) -> float:
        """Return the quantity of rows that all have it."""
        return float(rows.select(self.together).item())


_weights = _HOURS.fill_null(0.0)
_by_time = (pl.col("utilisation_percent") * _weights).sum() / _weights.sum().replace(0.0, 1.0)
CPU_TIME = Quantity("cpu_s", None, "CPU time", "s", pl.col("cpu_s").sum())
ENERGY = Quantity("energy_kwh", "energy_reason", "Energy", "kWh", pl.col("energy_kwh").sum())
UTILISATION = Quantity(
    "utilisation_percent", "utilisation_reason", "GPU utilisation", "%", _by_time
)
MEMORY = Quantity(
    "peak_memory_mib", "peak_memory_reason", "Peak memory", "MiB", pl.col("peak_memory_mib").max()
)
QUANTITIES = (CPU_TIME, ENERGY, UTILISATION, MEMORY)

#: column -> its label, what of a stage is summed, how much of it is an hour (or a kWh)
_COSTS = {
    "cost.own": ("own", "device_hours", 1),
    "cost.total": ("cumulative", "device_hours", 1),
    "cost.wall": ("wall time", "wall_s", 3600),
    "cost.cpu": ("CPU time", "cpu_s", 3600),
    "cost.energy": ("energy", "energy_kwh", 1),
}


def cost_cells(
    view: SuiteView, variants: Sequence[str]
) -> tuple[list[Column], dict[tuple[str, str], Cell]]:
    """Return the columns of what training costs per seed, and their cells by (variant, column).

    CPU time stands there without GPUs, energy with them. Own cost and wall time are left out where
    they repeat the cumulative cost in every row.
    """
    training = view.training.filter(pl.col("variant").is_in(variants))
    done = training.filter(pl.col("status").is_in(DONE))
    held = done if len(done) else view.distinct  # nothing trained yet: what evaluations held
    kinds = held["device_kind"].drop_nulls().unique().to_list()
    nothing = Cell("none", reason="this row trains nothing")
    summed = {}
    for column_id in _COSTS:
        if column_id != ("cost.cpu" if "gpu" in kinds else "cost.energy"):
            found = _sums(
                training.filter("own") if column_id == "cost.own" else training, column_id
            )
            summed[column_id] = [found.get(variant, nothing) for variant in variants]
    total = summed["cost.total"]
    device = device_word(kinds[0] if len(kinds) == 1 else None)
    columns: list[Column] = []
    cells: dict[tuple[str, str], Cell] = {}
    for column_id, sums in summed.items():
        if column_id in ("cost.own", "cost.wall") and all(map(_alike, sums, total)):
            continue
        top = max((cell.mean or 0.0 for cell in sums), default=0.0)
        if column_id == "cost.energy":
            unit, factor = ("Wh", 1000.0) if 0 < top < 0.1 else ("kWh", 1.0)
        elif column_id in ("cost.wall", "cost.cpu"):
            unit, factor = time_unit(top)
        else:  # own and cumulative device time in one unit
            unit, factor = time_unit(max((cell.mean or 0.0 for cell in total), default=0.0))
            unit = f"{device}-{unit}"
        digits = 0 if top * factor >= 100 else 1 if top * factor >= 10 else 2
        group = "Training cost per seed"
        columns.append(Column(column_id, _COSTS[column_id][0], unit, "cost", digits, group, False))
        for variant, cell in zip(variants, sums, strict=True):
            cells[variant, column_id] = cell.scaled(factor)
    return columns, cells


def _alike(one: Cell, other: Cell) -> bool:
    """Return whether a row has the same cost twice."""
    same = math.isclose(one.mean or 0.0, other.mean or 0.0, rel_tol=1e-6)
    return same and one.state == other.state


def _sums(training: pl.DataFrame, column_id: str) -> dict[str, Cell]:
    """Return variant -> the sum over its training stages of a seed, as a cell.

    Seeds that share all their stages count once.
    """
    _, name, hour = _COSTS[column_id]
    known, is_open = pl.col(name).is_not_null(), ~pl.col("status").is_in(DONE)
    told = pl.format(" ({})", "energy_reason") if name == ENERGY.name else pl.lit("")
    unmeasured = pl.struct(
        pl.lit("not measured").alias("status"),
        (pl.col("kind") + told.fill_null("")).alias("reason"),
    )
    chains = (
        training.group_by("variant", "seed", maintain_order=True)
        .agg(
            pl.col("key").alias("keys"),
            (pl.col(name).sum() / hour).alias("value"),
            pl.col("device_kind").unique().alias("kinds"),
            pl.coalesce(  # a stage that is open comes before one that was not measured
                pl.struct("status", pl.col("kind").alias("reason")).filter(is_open).first(),
                unmeasured.filter(~known).first(),
            ).alias("gap"),
        )
        .group_by("variant", "keys", maintain_order=True)
        .agg(pl.col("seed").sort().alias("seeds"), pl.exclude("seed").first())
        .with_columns(
            pl.col("gap").struct.field("status").fill_null("complete"),
            pl.col("gap").struct.field("reason"),
            pl.col("seeds").list.first().alias("seed"),
            column=pl.lit(column_id),
            uses=1,
            protocol=pl.lit(None, pl.String),
        )
    )
    done = chains.filter(pl.col("gap").is_null())
    mixed = done.group_by("variant").agg(pl.col("kinds").explode().n_unique())
    cells = {variant: cell for (variant, _), cell in gathered(chains, done).items()}
    for variant in mixed.filter(pl.col("kinds") > 1)["variant"].to_list():
        why = "trained on CPU and GPU"
        cells[variant] = replace(cells[variant], state="mixed hardware", reason=why)
    return cells


# ------------------------------------------------------------------------------ the suite's ledger


@dataclass
class LedgerLine:
    """Some stages or attempts together, a row each."""

    label: str
    rows: pl.DataFrame
    #: not part of the total above it
    apart: bool = False

    @property
    def hours(self) -> dict[str, float]:
        """Device-hours by kind of device: "GPU", "core", "device" where it is not known."""
        known = self.rows.drop_nulls("device_hours")
        sums = known.group_by("device_kind", maintain_order=True).agg(_HOURS.sum())
        return {device_word(kind): hours for kind, hours in sums.iter_rows()}

    @property
    def wall_s(self) -> float:
        """Seconds of wall time, added up."""
        return float(self.rows["wall_s"].sum())

    @property
    def unmeasured(self) -> int:
        """Stages or attempts without device time."""
        return self.rows["device_hours"].null_count()

    def measured(self, quantity: Quantity) -> tuple[float | None, str | None]:
        """Return the sum of the energy, mean utilisation over device time, or peak of memory.

        None, with the reason, unless all of the line was measured: never a part passed off as the
        whole.
        """
        known = self.rows.drop_nulls(quantity.name)
        if len(known) and len(known) == len(self.rows):
            return quantity.of(known), None
        no_gpu = pl.when(pl.col("device_kind") == "cpu").then(pl.lit("no GPU"))
        why = [pl.col(quantity.reason), no_gpu] if quantity.reason else []
        blank = self.rows.filter(pl.col(quantity.name).is_null())
        reasons = blank.select(
            pl.coalesce(*why, pl.lit("not measured")).unique().sort()
        ).to_series()
        reason = "; ".join(short(reason, 120) for reason in reasons) or "no stage is complete"
        if len(known):
            part = quantity.text(quantity.of(known))
            reason = f"{part} over {len(known)} of {len(self.rows)}; the others: {reason}"
        return None, reason


def integrated(row: dict[str, Any]) -> bool:
    """Return whether the energy of a stage or attempt is, in part at least, no counter's."""
    return row[ENERGY.name] is not None and row["energy_from"] not in (None, "counter")


@dataclass
class Ledger:
    """What a suite cost."""

    lines: list[LedgerLine]
    total: LedgerLine
    #: what the same rows would have cost had nothing been shared, less the total
    saved: dict[str, float]
    #: see `overheads`
    overheads: list[dict[str, Any]]
    models: list[str]
    #: uuid, model, host of every GPU that an attempt held, how many did, and their hours
    gpus: list[dict[str, Any]]
    sentences: list[str]


def ledger(view: SuiteView) -> Ledger:
    """Return the suite's costs: each distinct stage once; failed and superseded attempts apart."""
    groups = [
        LedgerLine(label, view.done.filter(pl.col("group") == group))
        for group, label in (("train", "Training"), ("evaluate", "Evaluation"))
    ]
    again = pl.col("variants").list.len() - 1
    saved = LedgerLine("", view.done.with_columns(device_hours=again * _HOURS.fill_null(0.0)))
    overhead = overheads(view)
    return Ledger(
        [line for line in groups if len(line.rows)] + _wasted(view) + _given_up(view),
        LedgerLine("Suite, each stage once", view.done),
        {kind: hours for kind, hours in saved.hours.items() if hours},
        overhead,
        view.done["device_model"].drop_nulls().unique().sort().to_list(),
        _gpus(view),
        [*_overhead_sentences(overhead), *_sentences(view)],
    )


def in_short(found: Ledger, tables: Sequence[Table]) -> str:
    """Return what the suite cost, and a seed of the rows of the primary comparison."""
    units = [(kind, hours, *time_unit(hours)) for kind, hours in found.total.hours.items()]
    total = [f"{amount(hours * factor)} {kind}-{unit}" for kind, hours, unit, factor in units]
    if not total:
        return ""
    text = f"{' and '.join(total)} for the whole suite, each stage once"
    energy, _ = found.total.measured(ENERGY)
    text += f", {ENERGY.text(energy)}" if energy is not None else ""
    named = [row for one in tables[0].named[:1] for row in (one.variant, one.baseline)]
    told: list[str] = []
    for table, column in ((t, c) for t in tables for c in t.columns if c.id == "cost.total"):
        cells = {row: table.cells.get((row, column.id), Cell("none")) for row in named}
        told = told or [
            f"{short(row)} {amount(cell.mean)} {column.unit}"
            for row, cell in cells.items()
            if cell.valued and cell.mean is not None
        ]
    return text + (f"; training of one seed: {', '.join(told)}" if told else "") + "."


def _sentences(view: SuiteView) -> Iterator[str]:
    """Yield what the figures leave out: cells stopped, devices held between attempts, readings."""
    if view.spared:
        yield view.spared
    told = [run.get("reserved_hours") for run in view.runs if run["status"] != "running"]
    hours = Counter[str]()
    for one in told:
        hours.update(one or {})
    if any(hours.values()):
        sums = " and ".join(f"{amount(more)} {device_word(kind)}-h" for kind, more in hours.items())
        silent = told.count(None)
        unknown = f" ({plural(silent, 'run')} did not tell)" if silent else ""
        yield (
            f"Worker groups held devices for another {sums}{unknown} outside attempts, while they "
            "started, waited and ended; no figure above has them."
        )
    known = view.done.drop_nulls(ENERGY.name)
    if count := len(known.filter(pl.col("energy_from") != "counter")):
        yield (
            f"Energy of {count} of {plural(len(known), 'stage')} is integrated from the power "
            "drawn, once a second, as their devices have no counter of it."
        )
    if len(known.filter(pl.col("device_model").str.contains("A100|H100"))):
        yield (
            "An A100 or H100 measures its power during a quarter of the time (arXiv 2312.02741), "
            "so its energy is exact for a steady load only."
        )


def _wasted(view: SuiteView) -> list[LedgerLine]:
    """Return the attempts that no result rests on, by what became of them."""
    kinds = view.distinct["device_kind"].drop_nulls().unique()
    only_kind = pl.lit(kinds[0] if len(kinds) == 1 else None)
    stages = view.distinct.select("key", pl.col("attempt").alias("current"), known="device_kind")
    current = pl.col("current").is_null() | (pl.col("current") == pl.col("attempt"))
    complete = pl.col("status") == "complete"
    wasted = (
        view.attempts.join(stages, on="key", how="left", maintain_order="left")
        .filter(~pl.col("status").is_in(["running", "continued"]) & ~(complete & current))
        .with_columns(
            pl.when(complete).then(pl.lit("superseded")).otherwise("status").alias("label"),
            pl.coalesce("device_kind", "known", only_kind).alias("device_kind"),
        )
    )
    return [
        LedgerLine(f"Attempts {label}", rows, apart=True)
        for (label,), rows in wasted.group_by("label", maintain_order=True)
    ]


def _given_up(view: SuiteView) -> list[LedgerLine]:
    """Return the complete stages that serve only rows that a search gave up: part of the total."""
    rows = view.distinct.filter(pl.col("status") == "pruned")["variants"].explode().unique()
    served = pl.col("variants").list.eval(pl.element().is_in(rows.to_list())).list.all()
    found = view.done.filter(served)
    if not len(rows) or not len(found):
        return []
    return [LedgerLine("Of the suite, for rows that the search gave up", found, apart=True)]


def _gpus(view: SuiteView) -> list[dict[str, Any]]:
    """Return every GPU that an attempt held, failed ones included, by host."""
    told = pl.List(pl.Struct({"uuid": pl.String, "model": pl.String, "host": pl.String}))
    return (
        view.attempts.select(pl.col("gpus").str.json_decode(told), "device_hours")
        .filter(pl.col("gpus").list.len() > 0)
        .with_columns(hours=pl.col("device_hours").fill_null(0.0) / pl.col("gpus").list.len())
        .explode("gpus")
        .unnest("gpus")
        .group_by("uuid")
        .agg(
            pl.col("model").first().fill_null("unknown model"),
            pl.col("host").first(),
            pl.len().alias("attempts"),
            pl.col("hours").sum(),
        )
        .sort("host", "uuid")
        .to_dicts()
    )


def overheads(view: SuiteView) -> list[dict[str, Any]]:
    """Return each row that tunes: `percent` is device time of head and tuning over its MAE's.

    The mean over `n` seeds whose stages are all complete; `mae_steps`, `tune_steps`.
    """
    mae = pl.col("kind") == "mae"
    tuned = ~mae & ~pl.col("kind").str.ends_with("head")
    hours, steps = pl.col("device_hours"), pl.col("steps")
    usable = pl.col("status").is_in(DONE) & hours.is_not_null()
    return (
        view.training.group_by("variant", "seed", maintain_order=True)
        .agg(
            hours.filter(mae).sum().alias("mae"),
            hours.filter(~mae).sum().alias("tuning"),
            steps.filter(mae).first().alias("mae_steps"),
            steps.filter(tuned).first().alias("tune_steps"),
            (usable.all() & tuned.any()).alias("usable"),
        )
        .filter(pl.col("usable") & (pl.col("mae") > 0))
        .group_by("variant", maintain_order=True)
        .agg(
            (100 * pl.col("tuning") / pl.col("mae")).mean().alias("percent"),
            pl.len().alias("n"),
            pl.col("mae_steps", "tune_steps").last(),
        )
        .to_dicts()
    )


def _overhead_sentences(found: list[dict[str, Any]]) -> list[str]:
    """Return what tuning adds to its MAE, by row or as a range, and why it is large where it is."""
    limit = PUBLISHED["cost"]["overhead_percent_at_most"]
    source = PUBLISHED["sources"][PUBLISHED["cost"]["overhead_source"]]
    published = f"published: at most {limit} % ({source})"
    sentences = [
        f"{short(o['variant'])}: head and tuning cost {amount(o['percent'])} % of the device time "
        f"of their MAE (n = {o['n']}); {published}."
        for o in found
    ]
    if len(found) > 3:
        means = sorted(o["percent"] for o in found)
        span = f"{amount(means[0])} to {amount(means[-1])} % of the device time of their MAE"
        sentences = [f"In {len(found)} rows head and tuning cost {span}; {published}."]
    large = [o for o in found if o["percent"] > limit and o["mae_steps"] and o["tune_steps"]]
    if large:
        one = large[0]
        sentences.append(
            "The share is large at small scale because the MAE is short: here "
            f"{one['mae_steps']:,} steps of MAE stand against {one['tune_steps']:,} of tuning, in "
            "the published runs 800 epochs against 20 to 80. A tuning step also costs more than an "
            "MAE step: the encoder sees two whole views instead of a quarter of one."
        )
    return sentences
