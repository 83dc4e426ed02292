"""What a report is made of: plain data that `bench` reads from the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import polars as pl

#: states of a stage whose output is there
DONE = ("complete", "stale")

#: what an attempt at a stage cost; what was not measured is null, with the reason
_COST: dict[str, Any] = {
    "wall_s": pl.Float64,
    "cpu_s": pl.Float64,  # that the processes computed
    "device_kind": pl.String,  # cpu | gpu
    "device_hours": pl.Float64,
    "energy_kwh": pl.Float64,
    "energy_reason": pl.String,
    "energy_from": pl.String,  # counter, power (integrated), or both joined by +
    "utilisation_percent": pl.Float64,
    "utilisation_reason": pl.String,
    "peak_memory_mib": pl.Float64,
    "peak_memory_reason": pl.String,
    "reserved_memory_mib": pl.Float64,  # the most that torch held of a GPU's
    "gpus": pl.String,  # JSON: [{uuid, model, host}, ...]; null where none was held
}
#: what stages and attempts both have
_TRIED: dict[str, Any] = {
    **dict.fromkeys(("key", "kind", "name", "status", "started", "ended"), pl.String),
    "attempt": pl.Int64,
    **_COST,
}

#: one row per (variant, seed, stage) of the plan, and name of an evaluation with several names;
#: a shared stage has the same key in each row.
#: `status` is complete, pending, running, failed, interrupted, stale or pruned
STAGES: dict[str, Any] = {
    **_TRIED,
    "group": pl.String,  # train | evaluate
    "variant": pl.String,
    "seed": pl.Int64,
    "own": pl.Boolean,  # among this row's own last stages, not its ancestors'
    "reason": pl.String,
    "steps": pl.Int64,
    "devices": pl.Float64,  # below 1 a share of a GPU
    "device_model": pl.String,
    "worker": pl.String,
    "code": pl.String,  # hash of the code that ran
    "torch": pl.String,
    "workers": pl.Int64,  # that ran it together
    "backend": pl.String,  # what carried their sums
    "shards": pl.Int64,  # logical shards of the batch
}

#: one row per attempt at any planned key, successful or not
ATTEMPTS: dict[str, Any] = {**_TRIED, "error": pl.String}

#: one row per (variant, seed, metric)
METRICS: dict[str, Any] = {
    **dict.fromkeys(("variant", "key", "evaluation", "column", "label"), pl.String),
    **dict.fromkeys(("metric", "unit", "protocol"), pl.String),
    "seed": pl.Int64,
    "value": pl.Float64,
    "higher_is_better": pl.Boolean,
    "primary": pl.Boolean,
    "along": pl.String,  # what it is one point along, e.g. "block"; empty where it is alone
    "at": pl.Float64,
    "series": pl.String,
}

#: one row per stage whose newest attempt did not complete, and that nothing replaced. `status` is
#: failed or interrupted, `error` a class, `rows` the variants that cannot be complete without it
FAILURES: dict[str, Any] = {
    **dict.fromkeys(("key", "name", "status", "error", "message", "log_tail"), pl.String),
    "rows": pl.List(pl.String),
}


@dataclass
class SuiteView:
    """One suite at one profile, as far as its store has it, and what all formats ask of it.

    Frames follow the schemas above.
    """

    suite: str
    title: str
    profile: str
    #: stands at the top of the page, e.g. "digits 8x8, ViT 0.1 M parameters, CPU"
    scale: str
    #: sentences that the suite wants printed
    notes: list[str]
    seeds: list[int]
    #: in row order
    variants: list[str]
    #: as declared in the suite: {title, rows: [variants] or null (all), columns: [ids, "cost"],
    #: baseline: variant or null, groups: {...} or null, digits: 1, published: bool}
    tables: list[dict[str, Any]]
    stages: pl.DataFrame
    attempts: pl.DataFrame
    #: key of a stage -> its newest complete record; else its newest one
    records: dict[str, dict[str, Any]]
    metrics: pl.DataFrame
    failures: pl.DataFrame
    #: key -> columns of its training log, e.g. {"step": [..], "loss": [..]}, thinned
    curves: dict[str, dict[str, list[float]]]
    #: commit, dirty, versions, hardware, data fingerprint, command, created
    provenance: dict[str, Any]
    #: the resolved suite as YAML text; embedded in the page
    resolved: str
    #: {started, ended, wall_s, status, command, reserved_hours} of each invocation
    runs: list[dict[str, Any]]
    #: corrupt records and artifacts: named, skipped, counted
    problems: list[str]
    #: column -> what it measures, as a row of METRICS has it; records go before it
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: row that a search made -> its settings by name
    cells: dict[str, dict[str, str]] = field(default_factory=dict)
    #: comparisons that the suite names before the run: {metric: a column, row, against, primary}
    named: list[dict[str, Any]] = field(default_factory=list)
    #: the published model that the suite trains by its size: vit_large_patch16 with 1,000 classes
    model: str | None = None
    #: what a gallery stage left: key, rows, seed, split, mask_ratio, norm_pix, summary, and its
    #: `arrays` by name (see `maect.stages.gallery`)
    gallery: dict[str, Any] | None = None
    #: what a search did without by stopping cells, a sentence
    spared: str | None = None

    @cached_property
    def distinct(self) -> pl.DataFrame:
        """Every stage once, in the plan's order, with the `variants` and `seeds` of its rows."""
        once = self.stages.unique(["key", "variant", "seed"], keep="first", maintain_order=True)
        return once.group_by("key", maintain_order=True).agg(
            pl.exclude("variant", "seed", "own").first(),
            pl.col("variant", "seed").first(),
            pl.col("variant").alias("variants"),
            pl.col("seed").alias("seeds"),
        )

    @cached_property
    def done(self) -> pl.DataFrame:
        """Stages whose output is there, each once."""
        return self.distinct.filter(pl.col("status").is_in(DONE))

    @cached_property
    def training(self) -> pl.DataFrame:
        """The training stages of all rows; `own` are each row's own last ones."""
        found = self.stages.filter(pl.col("group") == "train")
        return found.unique(["variant", "seed", "key"], keep="first", maintain_order=True)

    @cached_property
    def by_key(self) -> dict[str, dict[str, Any]]:
        """Rows of `distinct` by key, for what is printed of single stages."""
        return {row["key"]: row for row in self.distinct.iter_rows(named=True)}

    @cached_property
    def measures(self) -> dict[str, dict[str, Any]]:
        """Column id -> what it measures: label, unit, direction; as recorded, else as planned."""
        measured = self.metrics.unique("column", keep="first", maintain_order=True)
        return self.columns | {row["column"]: row for row in measured.iter_rows(named=True)}

    def record(self, key: str) -> dict[str, Any]:
        """Return the record behind a stage; empty where there is none."""
        return self.records.get(key, {})


def lookup(data: Any, *path: str) -> Any:
    """Return `data[path[0]][path[1]]...`, or None where a step is missing."""
    for name in path:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, by dotted path: {"mae": {"steps": 9}} -> {"mae.steps": 9}."""
    if not isinstance(data, dict):
        return {prefix: data}
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def unequal(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each name with other values before and after; None stands for a missing value."""
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            yield name, before.get(name), after.get(name)
