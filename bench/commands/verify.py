"""`verify`: whether a suite's table follows from what the store holds. It trusts no record's word.

Each record and artifact is checked against its checksum, each metric is derived again from the
stored per-image predictions, each printed cell from those, and stages that are chosen run again,
each from the stored artifacts of its inputs, to be compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from itertools import chain, product
from pathlib import Path

import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from bench.commands import common
from bench.commands.diff import values
from bench.environment import describe, use
from bench.errors import MISMATCH, OK, UserError, printable, reason
from bench.plan.stage import Plan, Stage
from bench.report.frames import build_view
from bench.store.files import read_json, regular
from bench.store.record import QUANTITIES, Record, Run, parsed
from bench.store.store import Store
from bench.suite.evaluations import Evaluation
from maect import evals
from maect.datasets.splits import selection_rows
from maect.files import digest
from reports.display import plural
from reports.frames import unequal
from reports.tables.build import build_tables
from reports.tables.model import number

#: of an environment, what bit for bit equality depends on
_BITS = ("torch", "numpy", "cpu", "isa", "device")
#: by which the clocks of two machines may differ
_SKEW = timedelta(minutes=10)


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    common.suite_arguments(parser, optional=True)
    again = "also run stages again and compare bit for bit: a kind or titles, e.g. 'MAE-CT *'"
    parser.add_argument("--rerun", metavar="GLOB", help=again)
    common.json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print what was verified and what does not fit. Return the exit code."""
    store = common.existing(options.store)
    plan = common.planned(options, store, keep_stale=True)
    if options.rerun is not None:
        use(plan.suite.isa)
    found = verify(plan, store, options.rerun)
    print(json.dumps(vars(found), indent=1) if options.json else _text(found, plan))
    for mismatch in found.mismatches:
        print(printable(f"mismatch: {mismatch}"), file=sys.stderr)
    return MISMATCH if found.mismatches else OK


@dataclass
class Verified:
    """What was looked at, and what does not fit; `mismatches` are sentences."""

    stages: int = 0
    records: int = 0
    files: int = 0
    bytes: int = 0
    #: files that are not in a bundle
    left_out: int = 0
    metrics: int = 0
    predictions: int = 0
    cells: int = 0
    rerun: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)

    def wrong(self, stage: Stage, problems: Iterable[str]) -> None:
        """Note sentences on what a stage left."""
        named = f"{stage.title} (key {stage.key[:10]})"
        self.mismatches += [f"{named}: {problem}" for problem in problems]


def verify(plan: Plan, store: Store, rerun: str | None = None) -> Verified:
    """Check everything that the plan's stages left; `rerun` is a pattern of stages to run again.

    The pattern is of a stage's title or kind. Raises `UserError` if it fits no stage that is in
    the store.
    """
    found = Verified()
    derived: dict[str, dict[str, float]] = {}
    runs = store.runs(found.mismatches)
    for stage in plan.stages.values():
        attempts = stage.state.attempts
        found.records += len(attempts)
        left = chain(_gone(stage, runs, store), stage.state.problems)
        found.wrong(stage, chain(left, *map(_cost, attempts)))
        record = stage.record or _damaged(stage, store)
        if record is None:
            continue
        found.stages += 1
        found.wrong(stage, chain(_identity(stage, record), store.damages(record)))
        for path in (store.artifact(record) / name for name in record.files):
            with suppress(OSError):
                found.bytes += regular(path).stat().st_size
                found.files += 1
        found.left_out += len(store.left_out(record))
        if stage.kind in evals.names():
            derived[stage.key], problems = _metrics(stage, record, store, found)
            found.wrong(stage, problems)
    if not found.stages:
        found.mismatches.append("no stage of this suite is in the store, so nothing was verified")
    _check_cells(plan, store, derived, found)
    if rerun is not None:
        _rerun(plan, store, rerun, found)
    return found


# ---------------------------------------------------------------------------------- what is stored


def _damaged(stage: Stage, store: Store) -> Record | None:
    """Return a complete record whose checksum does not fit, to say what was changed in it."""
    with suppress(OSError):
        for attempt in reversed(store.attempts(stage.key)) if stage.state.problems else ():
            with suppress(OSError, ValueError):
                path = store.attempt_folder(stage.key, attempt) / "record.json"
                record = parsed(read_json(path))
                if record.status == "complete":
                    return record
    return None


def _gone(stage: Stage, runs: list[Run], store: Store) -> Iterator[str]:
    """Yield which records that runs left are gone, and which runs of what is there."""
    folder = store.folder(stage.key) / "attempts"
    gone = {
        attempt
        for run in runs
        for attempt, status in run.attempts.get(stage.key, {}).items()
        if status != "running" and not os.path.lexists(folder / str(attempt) / "record.json")
    }
    there = {attempt.attempt: attempt.run for attempt in stage.state.attempts}
    gone |= {n for n in range(1, max(there, default=0)) if not os.path.lexists(folder / str(n))}
    if gone:
        numbers = ", ".join(map(str, sorted(gone)[:5])) + (", ..." if len(gone) > 5 else "")
        yield f"{plural(len(gone), 'record')} of it gone, of attempt {numbers}"
    for run_id in sorted({*there.values()} - {run.id for run in runs}):
        yield f"the record of the run {run_id} that made it is gone"


def _cost(attempt: Record) -> Iterator[str]:
    """Yield which times are impossible, and device-hours that are not devices × wall time."""
    if attempt.status == "running":
        return
    cost, said = attempt.cost, f"attempt {attempt.attempt} says"
    if attempt.ended is None or cost.wall_s is None or cost.device_hours is None:
        yield f"{said} that it ended, but not when or what it cost"
        return
    began, end = (datetime.fromisoformat(time) for time in (attempt.started, attempt.ended))
    took_s = (end - began).total_seconds()
    numbers = cost.model_dump(include={"wall_s", "device_hours", "cpu_s", *QUANTITIES})
    for name, value in numbers.items():
        if value is not None and value < 0:
            yield f"{said} {value} for {name}, which cannot be"
    if end > datetime.now(UTC) + _SKEW:
        yield f"{said} that it ended in the future, {attempt.ended}"
    if abs(began.timestamp() - attempt.started_s) > 0.01:  # written to the millisecond
        yield f"{said} two times at which it started"
    if abs(took_s - cost.wall_s) > 0.01:
        yield f"{said} {cost.wall_s} s, but took {took_s} s"
    hours = cost.devices * cost.wall_s / 3600
    if not math.isclose(cost.device_hours, hours, rel_tol=1e-9, abs_tol=1e-12):
        held = f"but held {cost.devices} for {cost.wall_s} s"
        yield f"{said} {cost.device_hours} device-hours, {held}"


def _identity(stage: Stage, record: Record) -> Iterator[str]:
    """Yield what in the record is not what its key, or its protocol's fingerprint, was made of, and
    which inputs it did not read as their records say that they were written."""
    if record.settings != stage.settings:
        yield "its settings are not those of its key"
    if record.data.fingerprint != stage.data.fingerprint:
        yield "its data are not those of its key"
    if record.protocol and digest(record.protocol, 16) != record.protocol_fingerprint:
        yield "its protocol's fingerprint is of another protocol"
    for name, source in stage.inputs.items():
        read = record.inputs.get(name)
        if source.record is None:
            yield f"its '{name}' is gone: {source.title}"
        elif read is None or read.files != source.record.file_hashes:
            yield f"it read another '{name}' than {source.title} left"


def _metrics(
    stage: Stage, record: Record, store: Store, found: Verified
) -> tuple[dict[str, float], list[str]]:
    """Return the metrics that the predictions give, and how those of the record differ."""
    evaluation = Evaluation.of(stage.kind, stage.settings)
    try:
        predictions = load_file(regular(store.artifact(record) / "predictions.safetensors"))
        labels = predictions.pop("labels")
        values = evaluation.evaluator.derive(predictions, labels)
        draws = evaluation.evaluator.by_draw(predictions, labels)
        found.predictions += len(labels)
    except Exception as error:  # of a stranger's file anything can be wrong
        return {}, [f"its predictions cannot be read: {reason(error)}"]
    wrong = []
    truth = _labels(stage, store)
    if truth is not None and not np.array_equal(labels, truth):
        wrong.append("its labels are not those of the features it evaluated")
    if record.summary.get("draws", draws) != draws:
        wrong.append("its values by draw are not those of its predictions")
    told = {metric.name: metric for metric in record.metrics}
    # older code may have had other words
    for metric in evaluation.measured(defaultdict(float)) if stage.reason is None else ():
        said = told.get(metric.name)
        if said is None or replace(said, value=0.0) != metric:
            wrong.append(f"metric {metric.name} is not in its record as it is defined")
    for name, metric in told.items():
        found.metrics += 1
        value = values.get(name)
        if value is None:
            wrong.append(f"metric {name} cannot be derived from its predictions")
        elif not np.array_equal(metric.value, value, equal_nan=True):
            both = f"{metric.value} in its record, {value} by its predictions"
            wrong.append(f"metric {name} is {both}")
    return values, wrong


def _labels(stage: Stage, store: Store) -> np.ndarray | None:
    """Return labels of the reported images as the features stage has them."""
    features, split = stage.inputs["features"], stage.settings["split"]
    if features.record is None:
        return None
    try:
        path = regular(store.artifact(features.record) / "features.safetensors")
        with safe_open(path, framework="numpy") as file:
            labels: np.ndarray = file.get_tensor(f"{split}_y")
    except (OSError, SafetensorError, KeyError):
        return None  # told of as a file that is missing or damaged
    return labels[selection_rows(split, len(labels)).get("test", slice(None))]


def _check_cells(
    plan: Plan, store: Store, derived: dict[str, dict[str, float]], found: Verified
) -> None:
    """Compare each printed cell from the report's own data with that from derived metrics."""
    view = build_view(plan, store, "")
    values = [
        derived.get(key, {}).get(metric, value)
        for key, metric, value in view.metrics.select("key", "metric", "value").iter_rows()
    ]
    printed = build_tables(view)
    view.metrics = view.metrics.with_columns(pl.Series("value", values, dtype=pl.Float64))
    for ours, theirs in zip(printed, build_tables(view), strict=True):
        for row, column in product(ours.rows, ours.metrics):
            before, after = (number(table.cell(row, column), column) for table in (ours, theirs))
            found.cells += bool(before)
            if before != after:
                cell = f"table '{ours.title}', {row.variant}, {column.label}"
                given = f"printed as '{before}', the predictions give '{after}'"
                found.mismatches.append(f"{cell}: {given}")


# --------------------------------------------------------------------------------------- run again


def _rerun(plan: Plan, store: Store, pattern: str, found: Verified) -> None:
    chosen = [
        stage
        for stage in plan.stages.values()
        if stage.record and any(fnmatchcase(name, pattern) for name in (stage.title, stage.kind))
    ]
    if not chosen:
        kinds = ", ".join(sorted({s.kind for s in plan.stages.values()}))
        message = f"--rerun '{pattern}' fits no stage in the store; give a pattern of titles as "
        raise UserError(f"{message}'MAE-CT tuning*', or a kind: {kinds}")
    with tempfile.TemporaryDirectory(prefix="bench-verify-") as folder:
        for stage in chosen:
            _run_again(stage, store, _Scratch(Path(folder) / stage.key, store, stage.key), found)


class _Scratch(Store):
    """A new store of one stage; its inputs are read where they lie."""

    def __init__(self, root: Path, origin: Store, key: str) -> None:
        super().__init__(root)
        self.origin, self.key = origin, key

    def folder(self, key: str) -> Path:
        return super().folder(key) if key == self.key else self.origin.folder(key)


def _run_again(stage: Stage, store: Store, scratch: Store, found: Verified) -> None:
    """Run one stage in this process, on the stored artifacts of its inputs, and compare."""
    from bench.run.worker import StageFailed, run_stage

    for name, source in stage.inputs.items():
        if source.record is None or any(store.damages(source.record)):
            return found.wrong(stage, [f"it cannot be run again: its '{name}' is damaged"])
        if store.left_out(source.record):
            return found.wrong(stage, [f"it cannot be run again: no bundle has its '{name}'"])
    scratch.create()
    try:
        on_cpu = stage.record is not None and stage.record.cost.device_kind == "cpu"
        run_stage(stage, scratch, "verify", lambda event: None, 0.0 if on_cpu else None)
    except StageFailed as error:
        return found.wrong(stage, [f"it failed when run again: {error}"])
    again = scratch.state(stage.key).record
    assert again is not None and stage.record is not None
    found.rerun.append(stage.title)
    folders = store.artifact(stage.record), scratch.artifact(again)
    differences = "; ".join(_differences(stage.record, again, *folders))
    if differences:
        why = _why_not(stage, stage.record, again)
        found.wrong(stage, [f"run again, {differences}{why}"])


def _differences(before: Record, after: Record, old: Path, new: Path) -> Iterator[str]:
    """Yield what differs between two records of a stage, whose files lie in `old` and `new`."""
    for name, was, now in sorted(unequal(before.file_hashes, after.file_hashes)):
        there = f"is there only {'before' if was else 'now'}"
        yield f"{name} {_how_much(old / name, new / name) if was and now else there}"
    for name, was, now in unequal(values(before), values(after)):
        yield f"{name} is {now}, it was {was}"


def _how_much(before: Path, after: Path) -> str:
    """Return that two files differ: in how many tensors, where both hold the same, by how much."""
    if before.suffix == ".safetensors":
        with suppress(OSError, SafetensorError, KeyError, ValueError):
            old, new = load_file(before), load_file(after)
            gaps = [np.abs(old[n].astype(float) - new[n]).max(initial=0.0) for n in old]
            changed = sum(gap != 0 for gap in gaps)
            return f"differs in {changed} of {len(old)} tensors, by {max(gaps):.3g} at most"
    return "differs"


def _why_not(stage: Stage, before: Record, after: Record) -> str:
    """Return what differs of the circumstances that bit for bit equality was promised for."""
    now = {**describe(), "device": after.env.get("device")}
    changed = [name for name in _BITS if before.env.get(name) != now.get(name)]
    workers, shards = before.env.get("workers", 1), before.settings["numerics"]["shards"]
    if stage.runs_encoder and workers > 1 and shards == 1:
        changed.append(f"number of workers (was {workers}, numerics.shards is 1)")
    changed += ["code"] * (before.code.hash != after.code.hash)
    other = f" (other {', '.join(changed)} than then, so equality is not promised)"
    return other if changed else ""


# -------------------------------------------------------------------------------------------- text


def _text(found: Verified, plan: Plan) -> str:
    """Return what was verified, in a few lines."""
    name = f"{plan.suite.name}, profile {plan.suite.profile}"
    lines = [
        f"{name}: {found.stages} of {len(plan.stages)} stages are in the store",
        f"records    {found.records} attempts read, checksums and device-hours compared",
        f"artifacts  {found.files} files of {found.bytes / 2**20:.1f} MiB, SHA-256 compared"
        + f"; {found.left_out} more are not in the bundle" * bool(found.left_out),
        f"metrics    {found.metrics} derived again from {found.predictions} predictions",
        f"tables     {found.cells} printed numbers compared with what these metrics give",
    ]
    if found.rerun:
        lines.append(f"run again  {plural(len(found.rerun), 'stage')}: {', '.join(found.rerun)}")
    wrong = len(found.mismatches)
    lines.append(f"{wrong} do not fit" if wrong else "everything fits")
    return common.lines_of(lines)
