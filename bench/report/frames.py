"""From plan and store to what `reports` draws: frames of stages, attempts and metrics."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import yaml
from pydantic import TypeAdapter

from bench import environment
from bench.errors import reason
from bench.plan import estimate
from bench.plan.stage import Plan, Row, Stage
from bench.plan.status import UNTRIED
from bench.store.record import Curves, Data, Failure, Record
from bench.store.store import Store
from bench.suite.evaluations import POOLS, column_id
from bench.suite.search import setting_names
from maect import methods
from maect.evals import Metric
from maect.settings import ModelSettings
from reports.frames import ATTEMPTS, FAILURES, METRICS, STAGES, SuiteView

#: how many unreadable files a note names
NOTED_FILES = 20
_CURVES = TypeAdapter(Curves)


def build_view(plan: Plan, store: Store, command: str) -> SuiteView:
    """Return everything that the report of a suite needs, read from the store alone."""
    suite, told = plan.suite, _tell(plan, store)
    untried = _untried(plan)
    rows = [row for row in plan.rows if row.variant.name not in untried]
    problems = [problem for stage in plan.stages.values() for problem in stage.state.problems]
    runs = store.runs(problems)
    metrics = _frame((metric for row in rows for metric in _metric_rows(row)), METRICS)
    columns, mixed = _columns(plan)
    # of a stage without a result, the newest attempt
    shown = {key: one.record or one.newest for key, one in told.items()}
    return SuiteView(
        suite=suite.name,
        title=suite.title,
        profile=suite.profile,
        scale=scale(plan),
        notes=[*suite.notes, *_notes(plan, told_apart=bool(mixed))],
        seeds=suite.seeds,
        variants=[name for name in suite.variants if name not in untried],
        tables=[table.resolved() for table in suite.tables],
        stages=_frame(_stage_rows(rows, plan, told), STAGES),
        attempts=_frame((row for one in told.values() for row in _attempt_rows(one)), ATTEMPTS),
        metrics=metrics.with_columns(
            pl.col("column").replace_strict(mixed, default=pl.col("label")).alias("label")
        ),
        failures=_frame(_failure_rows(plan, told), FAILURES),
        records={key: record.plain() for key, record in shown.items() if record is not None},
        curves=_curves(plan, store, problems),
        provenance=_provenance(plan, command),
        resolved=yaml.safe_dump(suite.resolved(), sort_keys=False, allow_unicode=True),
        runs=[
            run.model_dump()
            for run in runs
            if (run.suite, run.profile) == (suite.name, suite.profile)
        ],
        cells=_cells(plan),
        spared=estimate.spared(plan),
        columns=columns,
        gallery=_gallery(plan, store, problems),
        named=[
            one.resolved() | {"primary": one is suite.primary}
            for one in (suite.primary, *suite.secondary)
            if one is not None
        ],
        model=_published_model(plan),
        problems=problems,
    )


def _frame(rows: Iterable[dict[str, Any]], schema: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=schema, orient="row")


class _Told(NamedTuple):
    """A stage as the report tells of it."""

    stage: Stage
    status: str
    reason: str | None
    #: oldest first; of a run that is no more none is running
    attempts: list[Record]
    newest: Record | None
    #: the one behind its numbers, if it has one
    record: Record | None


def _tell(plan: Plan, store: Store) -> dict[str, _Told]:
    """Return every stage by its key."""
    at_work = {*store.leases.drivers(), store.leases.run}
    found: dict[str, _Told] = {}
    for key, stage in plan.stages.items():  # inputs first
        attempts = [one if one.run in at_work else _ended(one) for one in stage.state.attempts]
        status, reason = _status(stage, attempts)
        inputs = (found[source.key] for source in stage.inputs.values())
        lost = next((source for source in inputs if source.status == "failed"), None)
        if lost is not None and status == "pending":
            # of a chain the stage that failed itself is named
            own = f"its input failed: {lost.stage.title}"
            status, reason = "failed", own if lost.attempts else lost.reason
        newest = attempts[-1] if attempts else None
        record = stage.record if status in ("complete", "stale") else None
        found[key] = _Told(stage, status, reason, attempts, newest, record)
    return found


def _ended(attempt: Record) -> Record:
    """Return an attempt of a run that is no more: what it calls running was lost."""
    if attempt.status != "running":
        return attempt
    error = Failure(kind="Lost", message="its run ended without a word (killed?)")
    return attempt.model_copy(update={"status": "lost", "error": error})


def _status(stage: Stage, attempts: list[Record]) -> tuple[str, str | None]:
    """Return a stage's own status and its reason."""
    if stage.status == "stale" or (stage.status == "cached" and stage.reason):
        return "stale", stage.reason  # kept or not, its code is not today's
    if stage.status == "cached":
        return "complete", None
    as_planned = ("complete", "damaged", "stopped")
    if stage.status == "pruned" or not attempts or attempts[-1].status in as_planned:
        return stage.status, stage.reason
    newest = attempts[-1]
    status = "interrupted" if newest.status == "lost" else newest.status
    return status, newest.error.message if newest.error else None


# ------------------------------------------------------------------------- what is said of a suite


def _untried(plan: Plan) -> set[str]:
    """Return the cells that the search never came to; they are no rows of the report."""
    tried = {
        row.variant.name
        for row in plan.rows
        if any(s.status != "pruned" or s.reason != UNTRIED for s in row.evaluations.values())
    }
    return {row.variant.name for row in plan.rows} - tried


def _notes(plan: Plan, *, told_apart: bool) -> Iterator[str]:
    """Yield sentences on matched rows, the tokens of rows, the search and unusual images."""
    yield from _matched_notes(plan)
    if told_apart:
        rows: dict[str, list[str]] = defaultdict(list)
        for name, variant in plan.suite.variants.items():
            rows[POOLS[variant.row.model.pool]] += [name] * (variant.init != "pixels")
        told = "; ".join(f"{tokens}: {', '.join(names)}" for tokens, names in rows.items())
        yield f"Tokens by row, unless a column names its own: {told}."
    if plan.suite.search is not None:
        yield _search_note(plan)
    data = Data.of(plan.data)
    if data.broken:
        named = ", ".join(data.broken_files[:NOTED_FILES])
        if data.broken > NOTED_FILES:
            named += f" and {data.broken - NOTED_FILES} more"
        yield f"{data.broken} training images cannot be read and are left out: {named}."
    if data.converted:
        kinds = ", ".join(f"{count} {kind}" for kind, count in data.converted.items())
        yield f"Images converted to RGB: {kinds}."
    for note in data.notes:
        yield f"{note[0].upper()}{note[1:]}."


def _search_note(plan: Plan) -> str:
    """Return what kind of search made the rows, and which split they are compared on."""
    search, cells = plan.suite.search, plan.suite.cells
    assert search is not None
    how = {
        "grid": "every combination",
        "each": "one setting changed at a time",
        "random": f"combinations drawn at random, seed {search.seed}",
        "optuna": f"combinations chosen by Optuna (TPE, seed {search.seed})",
    }[search.method]
    if not search.explores:
        splits = {plan.suite.variants[label].row.report_on for label in cells}
        compared = "compared on the selection split, on which settings are chosen"
        if "test" in splits:
            compared = f"printed on the test split, so {len(cells)} cells were looked at there"
        return f"Search: {len(cells)} cells, {how}; every one is run to its end and {compared}."
    pruned = {
        row.variant.name
        for row in plan.rows
        if any(stage.status == "pruned" for stage in row.evaluations.values())
    }
    untried = _untried(plan)
    by = f"by {search.metric} on the selection split"
    if search.rungs:
        by += f" at {search.rungs} rungs within the last training stage of the first seed (ASHA)"
    else:
        by += ", seed after seed (ASHA)" if search.asha else ""
    return (
        f"Exploration: {how}, compared {by}. {len(cells) - len(untried)} of {len(cells)} cells "
        f"were tried, {len(pruned - untried)} of them stopped early; their cost is in the ledger. "
        "Such figures choose settings: what is chosen is to be run with seeds of its own and "
        "reported on the test split."
    )


def _cells(plan: Plan) -> dict[str, dict[str, str]]:
    """Settings of a search's rows by name: {"MAE-CT queue_size=128": {"queue_size": "128"}}."""
    cells = plan.suite.cells
    named = setting_names(dict.fromkeys(path for cell in cells.values() for path in cell))
    return {
        label: {named[path]: choice.name for path, choice in cell.items()}
        for label, cell in cells.items()
    }


def scale(plan: Plan) -> str:
    """Return what was trained on what, in one line."""
    row = max(plan.suite.variants.values(), key=lambda v: len(v.stages)).row
    model, size = row.model, row.data.image_size
    name = f"ViT-{model.size.capitalize()}" if model.size != "custom" else "ViT"
    costs = [s.record.cost for s in plan.stages.values() if s.record]
    where = ", ".join(sorted({cost.device_kind.upper() for cost in costs})) or "not run yet"
    if costs:
        where += f" ({', '.join(sorted({cost.device_model for cost in costs}))})"
    count = _parameters(model, plan.data.channels)
    told = f"{count / 1e3:.0f} k" if count < 1e5 else f"{count / 1e6:.{int(count < 1e7)}f} M"
    return (
        f"{row.data.name} at {size}×{size}, {name} of {told} parameters "
        f"(patch {model.patch_size}, dim {model.dim}, depth {model.depth}), {where}"
    )


def _published_model(plan: Plan) -> str | None:
    """Return the encoder as published results name it; they are of 1,000 classes."""
    model = next(iter(plan.suite.variants.values())).row.model
    return f"vit_{model.size}_patch{model.patch_size}" if plan.data.classes == 1000 else None


def _parameters(model: ModelSettings, channels: int) -> float:
    """Return parameters of the encoder, from its sizes."""
    assert model.dim and model.depth
    hidden = int(model.dim * model.mlp_ratio)
    block = 4 * model.dim**2 + 2 * model.dim * hidden + 9 * model.dim + hidden
    patch = (channels * model.patch_size**2 + 1) * model.dim
    return model.depth * block + patch + 3 * model.dim


def _matched_notes(plan: Plan) -> Iterator[str]:
    """Yield how many steps each compute-matched row was given, and why."""
    counted, tuned = "counted from the settings, rounded up", dict[str, list[str]]()
    for row in {row.variant.name: row for row in plan.rows}.values():
        name, other = row.variant.name, row.variant.match_compute
        if other is None:
            continue
        last = row.chain[-1]
        if len(row.chain) > 1:
            tuned.setdefault(other, []).append(f"{name} ({last.steps})")
            continue
        part = methods.get(last.kind).part
        own = "contrastive training without MAE" if part == "tuning" else part
        cost = f"as many FLOPs as all stages of {other}"
        yield f"{name}: {own} for {last.steps} steps: {cost} ({counted})."
    for other, rows in tuned.items():
        yield (
            f"Steps of the last stage of {', '.join(rows)}: with the stages before it as many "
            f"FLOPs as all stages of {other} ({counted})."
        )


# ------------------------------------------------------------------------------------------- frames


def _own(row: Row, chains: set[tuple[str, ...]]) -> set[str]:
    """The row's last stages: those past the longest of `chains` that is a part of its own."""
    own = tuple(stage.key for stage in row.chain)
    shared = next((n for n in range(len(own) - 1, 0, -1) if own[:n] in chains), 0)
    return set(own[shared:])


def _failure_rows(plan: Plan, told: dict[str, _Told]) -> Iterator[dict[str, Any]]:
    """Yield the stages whose newest attempt came to nothing, with the rows that they cost."""
    for key, one in told.items():
        newest = one.newest
        if newest is not None and one.status in ("failed", "interrupted"):
            rows = [row.variant.name for row in plan.rows if one.stage in row.stages()]
            yield {
                "key": key,
                "name": one.stage.title,
                "status": one.status,
                "error": newest.error.kind if newest.error else None,
                "message": newest.error.message if newest.error else None,
                "log_tail": newest.log_tail,
                "rows": list(dict.fromkeys(rows)),
            }


def _stage_rows(rows: list[Row], plan: Plan, told: dict[str, _Told]) -> Iterator[dict[str, Any]]:
    """Yield a row for every variant, seed and name of an evaluation that a stage serves."""
    known = {key: _stage_row(one) for key, one in told.items()}
    chains = {tuple(stage.key for stage in row.chain) for row in plan.rows}
    for row in rows:
        own = _own(row, chains)
        # a suite may name one of maect's evaluations several times, also with equal settings
        names: dict[str, list[str]] = {}
        for name, stage in row.evaluations.items():
            names.setdefault(stage.key, []).append(name)
        for stage in row.stages():
            for name in names.get(stage.key, [stage.kind]):
                yield known[stage.key] | {
                    "kind": name,
                    "variant": row.variant.name,
                    "seed": row.seed,
                    "own": stage.key in own,
                }


def _stage_row(one: _Told) -> dict[str, Any]:
    stage, record = one.stage, one.record
    measured = {}
    if record is not None:
        measured = _measured(record)
        for name in ("device_hours", "wall_s", "cpu_s", "energy_kwh"):
            values = [getattr(part.cost, name) for part in [*_parts(one), record]]
            measured[name] = None if None in values else math.fsum(values)
        measured |= {name: record.env.get(name) for name in ("torch", "workers", "backend")}
        measured |= {"worker": f"{record.env['host']}:{record.pid}", "code": record.code.hash}
    return measured | {
        "key": stage.key,
        "name": stage.title,
        "group": "train" if stage.trains else "evaluate",
        "status": one.status,
        "reason": one.reason,
        "steps": stage.steps,
        "shards": stage.settings["numerics"]["shards"],
    }


def _parts(one: _Told) -> list[Record]:
    """Return the attempts that stopped at rungs on the way to a stage's complete one."""
    end = one.record
    if end is None or not one.stage.steps_at("resumed_at", end):
        return []
    mine = [part for part in one.attempts if part.attempt < end.attempt and part.code == end.code]
    return [part for part in mine if part.status == "stopped"]


def _attempt_rows(one: _Told) -> Iterator[dict[str, Any]]:
    parts = _parts(one)
    for attempt in one.attempts:
        yield _measured(attempt) | {
            "key": one.stage.key,
            "kind": one.stage.kind,
            "name": one.stage.title,
            "status": "continued" if attempt in parts else attempt.status,
            "error": attempt.error.message if attempt.error else None,
        }


def _measured(record: Record) -> dict[str, Any]:
    """Return when an attempt ran and what it cost; a frame takes the columns that it has."""
    cost = record.cost
    told = [{"uuid": gpu.uuid, "model": gpu.model, "host": gpu.host} for gpu in cost.gpus or []]
    times = {"attempt": record.attempt, "started": record.started, "ended": record.ended}
    gpus = {"gpus": None if cost.gpus is None else json.dumps(told)}
    return cost.model_dump(exclude={"gpus"}) | times | gpus


def _metric_rows(row: Row) -> Iterator[dict[str, Any]]:
    for name, stage in row.evaluations.items():
        if stage.record is None or stage.status != "cached":
            continue
        for metric in stage.record.metrics:
            yield _metric(name, metric) | {
                "column": column_id(name, metric.name, metric.primary),
                "variant": row.variant.name,
                "seed": row.seed,
                "key": stage.key,
                "protocol": stage.record.protocol_fingerprint,
            }


def _metric(evaluation: str, metric: Metric) -> dict[str, Any]:
    """Return a metric's own fields as columns."""
    found = asdict(metric)
    return found | {"evaluation": evaluation, "metric": found.pop("name")}


def _columns(plan: Plan) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return what each column measures, for tables whose cells are all still open.

    Second come the labels of columns whose rows read different tokens, which say so.
    """
    columns: dict[str, dict[str, Any]] = {}
    pools = defaultdict(set)
    for variant in plan.suite.variants.values():
        for name, evaluation in variant.evaluations.items():
            for column, metric in evaluation.columns(name).items():
                columns[column] = _metric(name, metric)
                if variant.init != "pixels":
                    pools[column].add(POOLS[evaluation.pool or variant.row.model.pool])
    mixed = {}
    for column, tokens in pools.items():
        if len(tokens) > 1:
            words = [word for word in columns[column]["label"].split(", ") if word not in tokens]
            columns[column]["label"] = mixed[column] = ", ".join([*words, "tokens by row"])
    return columns, mixed


def _curves(plan: Plan, store: Store, problems: list[str]) -> dict[str, Curves]:
    """Return the training curves of all stages; files that do not fit are named in `problems`."""
    curves = {}
    for stage in plan.stages.values():
        record = stage.record if stage.trains and stage.status == "cached" else None
        if record is not None and "curves.json" in record.files:
            with _naming(problems, store.artifact(record) / "curves.json", store):
                data = store.read(record, "curves.json")
                found = _CURVES.validate_python(json.loads(data))
                lengths = {len(values) for values in found.values()}
                if len(lengths) != 1 or not all(map(math.isfinite, found["step"])):
                    raise ValueError("its columns do not fit each other")
                curves[stage.key] = found
    return curves


def _gallery(plan: Plan, store: Store, problems: list[str]) -> dict[str, Any] | None:
    """Return what the gallery stage left, if it is complete and fits; else `problems` names it."""
    stage = next((row.gallery for row in plan.rows if row.gallery is not None), None)
    if stage is None or stage.record is None or stage.status != "cached":
        return None
    from safetensors.numpy import load

    from reports.figures.gallery import gallery

    with _naming(problems, store.artifact(stage.record) / "gallery.safetensors", store):
        arrays = load(store.read(stage.record, "gallery.safetensors"))
        told = {name: stage.settings[name] for name in ("seed", "split", "mask_ratio", "norm_pix")}
        rows, summary = list(plan.suite.gallery), stage.record.summary
        found = told | {"key": stage.key, "rows": rows, "summary": summary, "arrays": arrays}
        gallery(found)  # whether they are pictures shows when they are drawn
        return found
    return None


@contextmanager
def _naming(problems: list[str], path: Path, store: Store) -> Iterator[None]:
    """Name in `problems` a file that does not fit its record or holds something else."""
    try:
        yield
    except Exception as error:  # of a stranger's file anything can be wrong
        problems.append(f"{path.relative_to(store.root)} is damaged: {reason(error)}")


def _provenance(plan: Plan, command: str) -> dict[str, Any]:
    """Where the numbers come from: of the records where there are any, else of this machine."""
    records = [s.record for s in plan.stages.values() if s.record is not None]
    env = records[-1].env if records else environment.describe()
    unusual = {"broken", "broken_files", "converted", "notes"}
    return {
        **environment.commit(),
        "command": command,
        "environment": env,
        "environments in these records": len({json.dumps(_versions(r.env)) for r in records}),
        "data": {
            "name": plan.data.name,
            "fingerprint": plan.data.fingerprint,
            "images": plan.data.counts,
            **Data.of(plan.data).model_dump(include=unusual, exclude_defaults=True),
        },
    }


def _versions(env: dict[str, Any]) -> dict[str, Any]:
    left_out = ("host", "device", "workers", "backend")
    return {k: v for k, v in sorted(env.items()) if k not in left_out}
