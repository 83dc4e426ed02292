"""What rows and the suite cost: devices held × wall time, shared stages counted once."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import mul
from typing import Any

from reports.display import amount, plural, short, time_unit
from reports.facts import DONE, Facts, distinct
from reports.tables.model import Cell, Column, Value
from reports.tables.predictions import Prediction, predictions
from reports.tables.published import PUBLISHED

#: stages of tuning, whose cost over the MAE's is its overhead
_TUNING = ("head", "tune")


@dataclass(frozen=True)
class Quantity:
    """Something metered: its column in a view, that of the reason where it is blank, its words."""

    name: str
    reason: str
    label: str
    unit: str


ENERGY = Quantity("energy_kwh", "energy_reason", "Energy", "kWh")
UTILISATION = Quantity("utilisation_percent", "utilisation_reason", "GPU utilisation", "%")
MEMORY = Quantity("peak_memory_mib", "peak_memory_reason", "Peak memory", "MiB")
QUANTITIES = (ENERGY, UTILISATION, MEMORY)

#: why a cost has no sum, the most telling first
_UNSUMMED = ("failed", "running", "interrupted", "pending", "pruned", "not measured")


def device_word(kinds: Iterable[str]) -> str:
    """ "GPU", "CPU", or "device" where both were held or nothing says which."""
    found = {kind for kind in kinds if kind}
    return {frozenset({"gpu"}): "GPU", frozenset({"cpu"}): "CPU"}.get(frozenset(found), "device")


def cost_cells(
    facts: Facts, variants: Sequence[str]
) -> tuple[list[Column], dict[tuple[str, str], Cell]]:
    """Columns `cost.own`, `cost.total` (device time), `cost.wall` and, of GPUs, `cost.energy`.

    Training only, per seed.
    """
    rows = [row for variant in variants for row in facts.by_variant[variant]]
    kinds = {row["device_kind"] for row in rows if _spent(row)} or {r["device_kind"] for r in rows}
    hours: dict[tuple[str, str], Cell] = {}
    for variant in variants:
        own, chain = facts.training(variant, own=True), facts.training(variant)
        hours[variant, "cost.own"] = _sum_cell(own, "device_hours")
        hours[variant, "cost.total"] = _sum_cell(chain, "device_hours")
        hours[variant, "cost.wall"] = _sum_cell(chain, "wall_s", 1 / 3600)
    word = device_word(kinds)
    columns = []
    for column_id, label in (("own", "own"), ("total", "cumulative"), ("wall", "wall time")):
        known = [c.mean for (_, i), c in hours.items() if i == f"cost.{column_id}" and c.mean]
        shared = "cost.total" if column_id == "own" else f"cost.{column_id}"
        scale = max((c.mean or 0.0 for (_, i), c in hours.items() if i == shared), default=0.0)
        unit, factor = time_unit(scale)
        for variant in variants:
            hours[variant, f"cost.{column_id}"] = _scaled(
                hours[variant, f"cost.{column_id}"], factor
            )
        shown = unit if column_id == "wall" else f"{word}-{unit}"
        digits = _digits([value * factor for value in known])
        columns.append(
            Column(
                f"cost.{column_id}", label, shown, "cost", digits, "Training cost per seed", False
            )
        )
    if "gpu" in kinds:
        columns.append(_energy_column(facts, variants, hours))
    return columns, hours


def _energy_column(
    facts: Facts, variants: Sequence[str], cells: dict[tuple[str, str], Cell]
) -> Column:
    """Energy with ancestors; its cells go into `cells`."""
    unit, factor = "kWh", 1.0
    for variant in variants:
        cells[variant, "cost.energy"] = _sum_cell(facts.training(variant), "energy_kwh")
    known = [c.mean for (_, i), c in cells.items() if i == "cost.energy" and c.mean]
    if known and max(known) < 0.1:
        unit, factor = "Wh", 1000.0
    for variant in variants:
        cells[variant, "cost.energy"] = _scaled(cells[variant, "cost.energy"], factor)
    digits = _digits([value * factor for value in known])
    return Column("cost.energy", "energy", unit, "cost", digits, "Training cost per seed", False)


def _spent(row: dict[str, Any]) -> bool:
    return row["group"] == "train" and row["status"] in DONE


def _sum_cell(by_seed: dict[int, list[dict[str, Any]]], what: str, factor: float = 1.0) -> Cell:
    """Sum over a row's training stages of one seed, as a cell over distinct sets of stages."""
    if not by_seed:
        return Cell("none", reason="this row trains nothing")
    chains: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sums: dict[tuple[str, ...], float] = {}
    reasons: list[str] = []
    missing: set[str] = set()
    kinds: set[str] = set()
    for seed, rows in by_seed.items():
        stages = {row["key"]: row for row in rows}
        keys = tuple(stages)
        chains[keys].append(seed)
        if keys in sums:
            continue
        unfinished = [r for r in stages.values() if r["status"] not in DONE]
        unmeasured = [r for r in stages.values() if r[what] is None]
        if unfinished:
            missing |= {row["status"] for row in unfinished}
            reasons.append(f"seed {seed}: {unfinished[0]['kind']} {unfinished[0]['status']}")
        elif unmeasured:
            missing.add("not measured")
            why = unmeasured[0]["energy_reason"] if what == ENERGY.name else None
            said = f" ({short(why, 120)})" if why else ""
            reasons.append(f"seed {seed}: {unmeasured[0]['kind']} was not measured{said}")
        else:
            sums[keys] = math.fsum(row[what] for row in stages.values()) * factor
            kinds |= {str(row["device_kind"]) for row in stages.values()}
    values = tuple(Value(tuple(sorted(chains[k])), total, k) for k, total in sums.items())
    reason = "; ".join(reasons) or None
    if len(kinds) > 1:
        return Cell("mixed hardware", values, len(chains), "trained on CPU and GPU")
    if not values:
        # a chain that failed leaves the stages after it pending
        state = next(state for state in _UNSUMMED if state in missing)
        return Cell(state, planned=len(chains), reason=reason)
    state = "pruned" if missing == {"pruned"} else "short"
    return Cell("ok" if len(values) == len(chains) else state, values, len(chains), reason)


def _scaled(cell: Cell, factor: float) -> Cell:
    values = tuple(Value(v.seeds, v.value * factor, v.keys) for v in cell.values)
    return Cell(cell.state, values, cell.planned, cell.reason)


def _digits(values: Sequence[float]) -> int:
    top = max(values, default=0.0)
    return 0 if top >= 100 else 1 if top >= 10 else 2


# ------------------------------------------------------------------------------ the suite's ledger


@dataclass
class LedgerLine:
    """Some stages or attempts together. `hours` by kind of device ("GPU", "CPU")."""

    label: str
    count: int = 0
    hours: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    wall_s: float = 0.0
    unmeasured: int = 0
    #: not part of the total above it
    apart: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """A stage or an attempt, as the view has it."""
        self.count += 1
        self.rows.append(row)
        self.wall_s += row["wall_s"] or 0.0
        if row["device_hours"] is None:
            self.unmeasured += 1
        else:
            self.hours[kind] += row["device_hours"]

    def measured(self, quantity: Quantity) -> tuple[float | None, str | None]:
        """Sum of the energy, mean utilisation over device time, largest peak of memory.

        None, with the reason, unless all of the line was measured: never a part passed off as the
        whole.
        """
        known = [row for row in self.rows if row[quantity.name] is not None]
        if known and len(known) == len(self.rows):
            return _together(quantity, known), None
        found = {_why_blank(row, quantity) for row in self.rows if row[quantity.name] is None}
        reason = "; ".join(sorted(found)) or "no stage is complete"
        if known:
            part = f"{amount(_together(quantity, known))} {quantity.unit}"
            reason = f"{part} over {len(known)} of {len(self.rows)}; the others: {reason}"
        return None, reason


def integrated(row: dict[str, Any]) -> bool:
    """Whether a stage's or attempt's energy is, in part at least, no reading of a counter."""
    return row[ENERGY.name] is not None and row["energy_from"] not in (None, "counter")


def _together(quantity: Quantity, rows: list[dict[str, Any]]) -> float:
    values = [row[quantity.name] for row in rows]
    if quantity is ENERGY:
        return math.fsum(values)
    if quantity is MEMORY:
        return float(max(values))
    hours = [row["device_hours"] or 0.0 for row in rows]
    return math.fsum(map(mul, values, hours)) / (math.fsum(hours) or 1.0)


def _why_blank(row: dict[str, Any], quantity: Quantity) -> str:
    if row[quantity.reason]:
        return short(row[quantity.reason], 120)
    return "no GPU" if row["device_kind"] == "cpu" else "not measured"


@dataclass
class Overhead:
    """Device time of head and tuning over that of the row's own MAE, in percent, per seed."""

    variant: str
    percent: list[float]
    mae_steps: int | None
    tune_steps: int | None

    @property
    def mean(self) -> float:
        return math.fsum(self.percent) / len(self.percent)


@dataclass
class Gpu:
    """One device by its UUID, and the time that attempts held it."""

    uuid: str
    model: str
    host: str
    attempts: int = 0
    hours: float = 0.0


@dataclass
class Ledger:
    lines: list[LedgerLine]
    total: LedgerLine
    #: what the same rows would have cost had nothing been shared, less the total
    saved: dict[str, float]
    overheads: list[Overhead]
    models: list[str]
    gpus: list[Gpu]
    predictions: list[Prediction]
    sentences: list[str]

    @property
    def kinds(self) -> list[str]:
        found = {kind for line in [*self.lines, self.total] for kind in line.hours}
        return sorted(found, reverse=True)


def ledger(facts: Facts) -> Ledger:
    """The suite's costs: each distinct stage once; failed and superseded attempts apart."""
    spent = [row for row in facts.stages.values() if row["status"] in DONE]
    groups = {"train": LedgerLine("Training"), "evaluate": LedgerLine("Evaluation")}
    total = LedgerLine("Suite, each stage once")
    for row in spent:
        for line in (groups[row["group"]], total):
            line.add(_word(row), row)
    saved: dict[str, float] = defaultdict(float)
    for row in spent:
        again = len(facts.users[row["key"]]) - 1
        saved[_word(row)] += again * (row["device_hours"] or 0.0)
    overhead = overheads(facts)
    return Ledger(
        [line for line in groups.values() if line.count] + _wasted(facts) + _given_up(facts, spent),
        total,
        {kind: hours for kind, hours in saved.items() if hours},
        overhead,
        sorted({row["device_model"] for row in spent if row["device_model"]}),
        _gpus(facts),
        predictions(facts),
        [*_overhead_sentences(overhead), *_integrated(spent)],
    )


def _integrated(spent: list[dict[str, Any]]) -> list[str]:
    count, known = sum(map(integrated, spent)), sum(r[ENERGY.name] is not None for r in spent)
    if not count:
        return []
    text = (
        f"Energy of {count} of {plural(known, 'stage')} is integrated from the power drawn, once a "
    )
    return [f"{text}second, as their devices have no counter of it."]


def _word(row: dict[str, Any]) -> str:
    return device_word([row["device_kind"]])


def _wasted(facts: Facts) -> list[LedgerLine]:
    """Attempts that no result rests on, by what became of them."""
    lines: dict[str, LedgerLine] = {}
    for key, attempts in facts.attempts.items():
        stage = facts.stages.get(key, {})
        for attempt in attempts:
            status = attempt["status"]
            if status == "running" or (status == "complete" and _current(stage, attempt)):
                continue
            label = "superseded" if status == "complete" else status
            line = lines.setdefault(label, LedgerLine(f"Attempts {label}", apart=True))
            known = attempt["device_kind"] or stage.get("device_kind") or _only_kind(facts)
            line.add(device_word([known]), attempt)
    return list(lines.values())


def _given_up(facts: Facts, spent: list[dict[str, Any]]) -> list[LedgerLine]:
    """Complete stages that serve no row but those that a search gave up: a part of the total."""
    rows = {row["variant"] for row in facts.rows if row["status"] == "pruned"}
    line = LedgerLine("Of the suite, for rows that the search gave up", apart=True)
    for row in spent:
        if all(variant in rows for variant, _ in facts.users[row["key"]]):
            line.add(_word(row), row)
    return [line] if line.count else []


def _current(stage: dict[str, Any], attempt: dict[str, Any]) -> bool:
    return stage.get("attempt") in (None, attempt["attempt"])


def _only_kind(facts: Facts) -> str:
    kinds = {row["device_kind"] for row in facts.stages.values() if row["device_kind"]}
    return kinds.pop() if len(kinds) == 1 else ""


def _gpus(facts: Facts) -> list[Gpu]:
    """Every GPU that an attempt held, failed ones included, by host."""
    found: dict[str, Gpu] = {}
    for attempts in facts.attempts.values():
        for attempt in attempts:
            held = json.loads(attempt["gpus"] or "[]")
            for one in held:
                gpu = found.setdefault(
                    one["uuid"], Gpu(one["uuid"], one["model"] or "unknown model", one["host"])
                )
                gpu.attempts += 1
                gpu.hours += (attempt["device_hours"] or 0.0) / len(held)
    return sorted(found.values(), key=lambda gpu: (gpu.host, gpu.uuid))


def overheads(facts: Facts) -> list[Overhead]:
    """Tuning's overhead of each row that tunes, over seeds whose stages are all complete."""
    found = []
    for variant in facts.view.variants:
        percent, steps = [], {}
        for rows in facts.training(variant).values():
            stages = [group[0] for group in distinct(rows).values()]
            mae = [row for row in stages if row["kind"] == "mae"]
            tuning = [row for row in stages if row["kind"] in _TUNING]
            if not mae or not any(row["kind"] == "tune" for row in tuning):
                continue
            if any(
                row["status"] not in DONE or row["device_hours"] is None for row in mae + tuning
            ):
                continue
            base = math.fsum(row["device_hours"] for row in mae)
            if base > 0:
                percent.append(100 * math.fsum(r["device_hours"] for r in tuning) / base)
                steps = {row["kind"]: row["steps"] for row in stages}
        if percent:
            found.append(Overhead(variant, percent, steps.get("mae"), steps.get("tune")))
    return found


def _overhead_sentences(found: list[Overhead]) -> list[str]:
    """What tuning adds to its MAE, by row or as a range, and why it is large where it is."""
    limit = PUBLISHED["cost"]["overhead_percent_at_most"]
    source = PUBLISHED["sources"][PUBLISHED["cost"]["overhead_source"]]
    published = f"published: at most {limit} % ({source})"
    sentences = [
        f"{short(o.variant)}: head and tuning cost {amount(o.mean)} % of the device time of their "
        f"MAE (n = {len(o.percent)}); {published}."
        for o in found
    ]
    if len(found) > 3:
        means = sorted(o.mean for o in found)
        span = f"{amount(means[0])} to {amount(means[-1])} % of the device time of their MAE"
        sentences = [f"In {len(found)} rows head and tuning cost {span}; {published}."]
    large = [o for o in found if o.mean > limit and o.mae_steps and o.tune_steps]
    if large:
        one = large[0]
        sentences.append(
            "The share is large at small scale because the MAE is short: here "
            f"{one.mae_steps:,} steps of MAE stand against {one.tune_steps:,} of tuning, in the "
            "published runs 800 epochs against 20 to 80. A tuning step also costs more than an MAE "
            "step: the encoder sees two whole views instead of a quarter of one."
        )
    return sentences
