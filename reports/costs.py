"""What rows and the suite cost: devices held × wall time, shared stages counted once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reports.display import amount, plural, short, time_unit
from reports.facts import DONE, Facts, distinct
from reports.published import PUBLISHED
from reports.table import Cell, Column, Value

#: stages of tuning, whose cost over the MAE's is its overhead
_TUNING = ("head", "tune")

#: why a cost has no sum, the most telling first
_UNSUMMED = ("failed", "running", "interrupted", "pending", "pruned", "not measured")


def device_word(kinds: Iterable[str]) -> str:
    """ "GPU", "CPU", or "device" where both were held or nothing says which."""
    found = {kind for kind in kinds if kind}
    return {frozenset({"gpu"}): "GPU", frozenset({"cpu"}): "CPU"}.get(frozenset(found), "device")


def cost_cells(
    facts: Facts, variants: Sequence[str]
) -> tuple[list[Column], dict[tuple[str, str], Cell]]:
    """Columns `cost.own`, `cost.total` (device time) and `cost.wall`, training only, per seed."""
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
    return columns, hours


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
            reasons.append(f"seed {seed}: {unmeasured[0]['kind']} was not measured")
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

    def add(self, kind: str, hours: float | None, wall_s: float | None) -> None:
        self.count += 1
        self.wall_s += wall_s or 0.0
        if hours is None:
            self.unmeasured += 1
        else:
            self.hours[kind] += hours


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
class Ledger:
    lines: list[LedgerLine]
    total: LedgerLine
    #: what the same rows would have cost had nothing been shared, less the total
    saved: dict[str, float]
    overheads: list[Overhead]
    energy_kwh: float | None
    energy_reason: str | None
    models: list[str]
    sentences: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        found = {kind for line in [*self.lines, self.total] for kind in line.hours}
        return sorted(found, reverse=True)


def ledger(facts: Facts) -> Ledger:
    """The suite's costs: each distinct stage once; failed and superseded attempts apart."""
    spent = [row for row in facts.stages.values() if row["status"] in DONE]
    names = {"train": "Training", "evaluate": "Evaluation", "data": "Data"}
    groups = {group: LedgerLine(name) for group, name in names.items()}
    total = LedgerLine("Suite, each stage once")
    for row in spent:
        for line in (groups.setdefault(row["group"], LedgerLine(row["group"])), total):
            line.add(_word(row), row["device_hours"], row["wall_s"])
    saved: dict[str, float] = defaultdict(float)
    for row in spent:
        again = len(facts.users[row["key"]]) - 1
        saved[_word(row)] += again * (row["device_hours"] or 0.0)
    found = Ledger(
        [line for line in groups.values() if line.count] + _wasted(facts),
        total,
        {kind: hours for kind, hours in saved.items() if hours},
        overheads(facts),
        *_energy(spent),
        sorted({row["device_model"] for row in spent if row["device_model"]}),
    )
    found.sentences = [*_overhead_sentences(found.overheads)]
    return found


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
            kind = device_word([stage.get("device_kind") or _only_kind(facts)])
            line.add(kind, attempt["device_hours"], attempt["wall_s"])
    return list(lines.values())


def _current(stage: dict[str, Any], attempt: dict[str, Any]) -> bool:
    return stage.get("attempt") in (None, attempt["attempt"])


def _only_kind(facts: Facts) -> str:
    kinds = {row["device_kind"] for row in facts.stages.values() if row["device_kind"]}
    return kinds.pop() if len(kinds) == 1 else ""


def _energy(spent: list[dict[str, Any]]) -> tuple[float | None, str | None]:
    """Energy of all stages, or why it is blank; never a part of it passed off as the whole."""
    measured = [row["energy_kwh"] for row in spent if row["energy_kwh"] is not None]
    reasons = sorted(
        {r["energy_reason"] for r in spent if r["energy_kwh"] is None and r["energy_reason"]}
    )
    if measured and len(measured) == len(spent):
        return math.fsum(measured), None
    reason = "; ".join(short(r, 120) for r in reasons) or (
        "no stage is complete" if not spent else "not measured"
    )
    if measured:
        reason = (
            f"{amount(math.fsum(measured))} kWh over {len(measured)} of "
            f"{plural(len(spent), 'stage')}; the others: {reason}"
        )
    return None, reason


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
