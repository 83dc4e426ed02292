"""Does a suite's table follow from what the store holds? Nothing here trusts a record's word.

Each record and artifact is checked against its checksum, each metric is derived again from the
stored per-image predictions, each printed cell from those, and stages that are chosen run again,
each from the stored artifacts of its inputs, to be compared bit for bit.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from bench.environment import describe
from bench.errors import UserError
from bench.plan.identity import digest
from bench.plan.planner import TRAIN_KINDS, Plan, Stage
from bench.report.frames import build_view
from bench.store.store import Store, sha256
from bench.suite.evaluations import Evaluation, metric_rows
from maect import evals
from reports.facts import lookup
from reports.tables.build import build_tables
from reports.tables.model import number

#: of an environment, what bit for bit equality depends on
_BITS = ("torch", "numpy", "cpu", "isa", "device")


#: what reading a record raises that lacks or distorts what every record has
MALFORMED = (KeyError, TypeError, ValueError, AttributeError)


@dataclass
class Verified:
    """What was looked at, and what does not fit; `mismatches` are sentences."""

    stages: int = 0
    records: int = 0
    files: int = 0
    bytes: int = 0
    metrics: int = 0
    predictions: int = 0
    cells: int = 0
    rerun: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)

    def wrong(self, stage: Stage, what: str) -> None:
        self.mismatches.append(f"{stage.title} (key {stage.key[:10]}): {what}")


def verify(plan: Plan, store: Store, rerun: str | None = None) -> Verified:
    """Check everything that the plan's stages left; `rerun` is a pattern of stages to run again.

    The pattern is of a stage's title or kind. Raises `UserError` if it fits no stage that is in
    the store.
    """
    found = Verified()
    derived: dict[str, dict[str, float]] = {}
    records: dict[str, dict[str, Any]] = {}
    for stage in plan.stages.values():
        record = _record(stage, store, found)
        if record is None:
            continue
        records[stage.key] = record
        found.stages += 1
        with _well_formed(stage, found):
            _check_identity(stage, record, found)
            _check_files(stage, record, store, found)
            _check_inputs(stage, record, records, found)
            if stage.kind in evals.names():
                derived[stage.key] = _check_metrics(stage, record, store, found)
    if not found.stages:
        found.mismatches.append("no stage of this suite is in the store, so nothing was verified")
    try:
        _check_cells(plan, store, derived, found)
    except MALFORMED as error:
        found.mismatches.append(f"no table can be made of these records: {error}")
        if len(found.mismatches) == 1:  # they are as they should be; then it is our mistake
            raise
    if rerun is not None:
        _rerun(plan, store, rerun, found)
    return found


# ---------------------------------------------------------------------------------- what is stored


@contextmanager
def _well_formed(stage: Stage, found: Verified) -> Iterator[None]:
    """A record in which the checks do not find what every record has is itself a finding."""
    try:
        yield
    except MALFORMED as error:
        found.wrong(stage, f"its record is not as records are: {type(error).__name__} {error}")


def _record(stage: Stage, store: Store, found: Verified) -> dict[str, Any] | None:
    """The stage's newest complete record; a damaged one as far as it can be read, and reported."""
    found.records += len(stage.state.attempts)
    for problem in stage.state.problems:
        found.wrong(stage, problem)
    for attempt in stage.state.attempts:
        with _well_formed(stage, found):
            _check_cost(stage, attempt, found)
    if stage.record is not None or not stage.state.problems:
        return stage.record
    for path in sorted(store.folder(stage.key).glob("attempts/*/record.json"), reverse=True):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("status") == "complete":
            return record
    return None


def _check_cost(stage: Stage, attempt: dict[str, Any], found: Verified) -> None:
    """Device hours are devices held × wall time, from start to end, in every attempt."""
    cost = attempt["cost"]
    hours, wall = cost.get("device_hours"), cost.get("wall_s")
    if hours is None or wall is None:
        return
    began, ended = (datetime.fromisoformat(attempt[name]) for name in ("started", "ended"))
    took = (ended - began).total_seconds()
    if abs(took - wall) > 0.01:  # written to the millisecond
        found.wrong(stage, f"attempt {attempt['attempt']} says {wall} s, but took {took} s")
    if not math.isclose(hours, cost["devices"] * wall / 3600, rel_tol=1e-9, abs_tol=1e-12):
        found.wrong(
            stage,
            f"attempt {attempt['attempt']} says {hours} device-hours, but held {cost['devices']} "
            f"for {wall} s",
        )


def _check_identity(stage: Stage, record: dict[str, Any], found: Verified) -> None:
    """The record is of what its key was made of, and of the protocol that it names."""
    if record["settings"] != stage.settings:
        found.wrong(stage, "its settings are not those of its key")
    if lookup(record, "data", "fingerprint") != stage.data.fingerprint:
        found.wrong(stage, "its data are not those of its key")
    protocol = record.get("protocol")
    if protocol and digest(protocol, 16) != record["protocol_fingerprint"]:
        found.wrong(stage, "its protocol's fingerprint is of another protocol")


def _check_files(stage: Stage, record: dict[str, Any], store: Store, found: Verified) -> None:
    for name, entry in record.get("files", {}).items():
        path = store.folder(stage.key) / name
        if not path.is_file():
            found.wrong(stage, f"{name} is missing")
            continue
        found.files += 1
        found.bytes += path.stat().st_size
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            found.wrong(stage, f"{name} does not fit its checksum")


def _check_inputs(
    stage: Stage, record: dict[str, Any], records: dict[str, dict[str, Any]], found: Verified
) -> None:
    """A stage must have read what its inputs' records say was written."""
    for name, source in stage.inputs.items():
        if source.key in records:
            files = {f: e["sha256"] for f, e in records[source.key].get("files", {}).items()}
            if record["inputs"].get(name, {}).get("files") != files:
                found.wrong(stage, f"it read another '{name}' than {source.title} left")


def _check_metrics(
    stage: Stage, record: dict[str, Any], store: Store, found: Verified
) -> dict[str, float]:
    """The metrics as the predictions give them, each compared with the record's."""
    try:
        predictions = load_file(store.folder(stage.key) / "predictions.safetensors")
        labels = predictions.pop("labels")
        evaluation = Evaluation.of(stage.kind, stage.settings)
        values = evaluation.evaluator.derive(predictions, labels)
    except (OSError, SafetensorError, KeyError, ValueError, IndexError, TypeError) as error:
        found.wrong(stage, f"its predictions cannot be read: {error}")
        return {}
    found.predictions += len(labels)
    truth = _labels(stage, store)
    if truth is not None and not np.array_equal(labels, truth):
        found.wrong(stage, "its labels are not those of the features it evaluated")
    told = {metric["name"]: metric for metric in record.get("metrics", [])}
    if stage.reason is None:  # older code may have had other words
        names = (metric.name for metric in evaluation.metrics())
        for row in metric_rows(evaluation, dict.fromkeys(names, 0.0)):
            if told.get(row["name"], {}) | {"value": None} != row | {"value": None}:
                found.wrong(stage, f"metric {row['name']} is not in its record as it is defined")
    for name, metric in told.items():
        said = metric["value"]
        found.metrics += 1
        if name not in values:
            found.wrong(stage, f"metric {name} cannot be derived from its predictions")
        elif said != values[name] and not (_nan(said) and _nan(values[name])):
            found.wrong(
                stage, f"metric {name} is {said} in its record, {values[name]} by its predictions"
            )
    return values


def _nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _labels(stage: Stage, store: Store) -> np.ndarray | None:
    """Labels of the reported split as the features stage has them."""
    features = stage.inputs["features"]
    try:
        path = store.folder(features.key) / "features.safetensors"
        with safe_open(path, framework="numpy") as file:
            labels: np.ndarray = file.get_tensor(f"{stage.settings['split']}_y")
    except (OSError, SafetensorError, KeyError):
        return None  # told of as a file that is missing or damaged
    return labels


def _check_cells(
    plan: Plan, store: Store, derived: dict[str, dict[str, float]], found: Verified
) -> None:
    """Every printed cell once from the report's own data, once from the derived metrics."""
    view = build_view(plan, store, "")
    values = [
        derived.get(key, {}).get(metric, value)
        for key, metric, value in view.metrics.select("key", "metric", "value").iter_rows()
    ]
    printed = build_tables(view)
    view.metrics = view.metrics.with_columns(pl.Series("value", values, dtype=pl.Float64))
    for ours, theirs in zip(printed, build_tables(view), strict=True):
        for row in ours.rows:
            for column in (c for c in ours.columns if c.kind in ("metric", "delta")):
                before = number(ours.cell(row, column), column)
                after = number(theirs.cell(row, column), column)
                found.cells += bool(before)
                if before != after:
                    found.mismatches.append(
                        f"table '{ours.title}', {row.variant}, {column.label}: printed as "
                        f"'{before}', the predictions give '{after}'"
                    )


# --------------------------------------------------------------------------------------- run again


def _rerun(plan: Plan, store: Store, pattern: str, found: Verified) -> None:
    chosen = [
        stage
        for stage in plan.stages.values()
        if stage.record is not None
        and (fnmatchcase(stage.title, pattern) or fnmatchcase(stage.kind, pattern))
    ]
    if not chosen:
        kinds = ", ".join(sorted({s.kind for s in plan.stages.values()}))
        raise UserError(
            f"--rerun '{pattern}' fits no stage in the store; give a pattern of titles as "
            f"'MAE-CT tuning*', or a kind: {kinds}"
        )
    with tempfile.TemporaryDirectory(prefix="bench-verify-") as folder:
        scratch = Store(Path(folder))
        scratch.create()
        for stage in chosen:
            _run_again(stage, store, scratch, found)


def _run_again(stage: Stage, store: Store, scratch: Store, found: Verified) -> None:
    """One stage in this process, on the stored artifacts of its inputs."""
    from bench.run.worker import StageFailed, Task, run_task

    inner = Store(scratch.root / stage.key)
    inner.create()
    for source in stage.inputs.values():
        if not inner.folder(source.key).exists():
            inner.folder(source.key).symlink_to(store.folder(source.key))
    try:
        run_task(Task.of(stage), inner.root, "verify", lambda key, event: None)
    except StageFailed as error:
        found.wrong(stage, f"it failed when run again: {error}")
        return
    again = inner.state(stage.key).record
    assert again is not None and stage.record is not None
    found.rerun.append(stage.title)
    differences = list(_differences(stage, again, store, inner))
    if differences:
        why = _why_not(stage.record, again)
        found.wrong(stage, f"run again, {'; '.join(differences)}{why}")


def _differences(stage: Stage, again: dict[str, Any], store: Store, inner: Store) -> Iterator[str]:
    assert stage.record is not None
    before, after = stage.record["files"], again["files"]
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            yield f"{name} is there only {'before' if name in before else 'now'}"
        elif before[name]["sha256"] != after[name]["sha256"]:
            folders = (store.folder(stage.key), inner.folder(stage.key))
            yield f"{name} differs{_how_much(*(folder / name for folder in folders))}"
    values = {m["name"]: m["value"] for m in again["metrics"]}
    for metric in stage.record["metrics"]:
        value = values.get(metric["name"])
        if value != metric["value"]:
            yield f"{metric['name']} is {value}, it was {metric['value']}"


def _how_much(before: Path, after: Path) -> str:
    """In how many tensors, and by how much at the most."""
    if before.suffix != ".safetensors":
        return ""
    try:
        old, new = load_file(before), load_file(after)
    except (OSError, SafetensorError):
        return ""
    unequal = [n for n in old if n not in new or not np.array_equal(old[n], new[n])]
    gaps = [
        float(np.abs(old[n].astype(np.float64) - new[n].astype(np.float64)).max())
        for n in unequal
        if n in new and old[n].shape == new[n].shape and old[n].size
    ]
    most = f", by {max(gaps):.3g} at most" if gaps else ""
    return f" in {len(unequal)} of {len(old)} tensors{most}"


def _why_not(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What differs of the circumstances that bit for bit equality was promised for."""
    now = {**describe(), "device": after["env"].get("device")}
    changed = [name for name in _BITS if before["env"].get(name) != now.get(name)]
    workers, shards = before["env"].get("workers", 1), before["settings"]["numerics"]["shards"]
    if before["kind"] in TRAIN_KINDS and workers > 1 and shards == 1:
        changed.append(f"number of workers (was {workers}, numerics.shards is 1)")
    if before["code"]["hash"] != after["code"]["hash"]:
        changed.append("code")
    if not changed:
        return ""
    return f" (other {', '.join(changed)} than then, so equality is not promised)"


# -------------------------------------------------------------------------------------------- text


def text(found: Verified, plan: Plan) -> str:
    """What was verified, in a few lines."""
    name = f"{plan.suite.name}, profile {plan.suite.profile}"
    lines = [
        f"{name}: {found.stages} of {len(plan.stages)} stages are in the store",
        f"records    {found.records} attempts read, checksums and device-hours compared",
        f"artifacts  {found.files} files of {found.bytes / 2**20:.1f} MiB, SHA-256 compared",
        f"metrics    {found.metrics} derived again from {found.predictions} predictions",
        f"tables     {found.cells} printed numbers compared with what these metrics give",
    ]
    if found.rerun:
        lines.append(f"run again  {len(found.rerun)} stages: {', '.join(found.rerun)}")
    wrong = len(found.mismatches)
    lines.append(f"{wrong} do not fit" if wrong else "everything fits")
    return "\n".join(lines)
