"""From plan and store to what `reports` draws: frames of stages, attempts and metrics."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import polars as pl
import yaml
from pydantic import TypeAdapter

from bench import environment
from bench.errors import reason
from bench.plan.planner import schedule
from bench.plan.stage import Plan, Row, Stage
from bench.plan.status import UNTRIED
from bench.store.record import Cost, Curves, Data, Failure, Record
from bench.store.store import Store
from bench.suite.evaluations import column_id
from bench.suite.search import setting_names
from maect.evals import Metric
from reports.frames import ATTEMPTS, FAILURES, METRICS, STAGES, SuiteView

#: how many unreadable files a note names
NOTED_FILES = 20
_CURVES = TypeAdapter(Curves)


def build_view(plan: Plan, store: Store, command: str) -> SuiteView:
    """Return everything that the report of a suite needs, read from the store alone."""
    suite, stages = plan.suite, plan.stages.values()
    if not store.in_use():
        for stage in stages:
            stage.state.attempts = [_ended(attempt) for attempt in stage.state.attempts]
    untried = _untried(plan)
    rows = [row for row in plan.rows if row.variant.name not in untried]
    statuses = _statuses(plan)
    problems = [problem for stage in stages for problem in stage.state.problems]
    runs, gallery = store.runs(problems), _gallery(plan, store, problems)
    shown = {stage.key: _shown_record(stage, statuses) for stage in stages}
    return SuiteView(
        suite=suite.name,
        title=suite.title,
        profile=suite.profile,
        scale=scale(plan),
        notes=suite.notes + _matched_notes(plan) + _search_note(plan) + _data_notes(plan),
        seeds=suite.seeds,
        variants=[name for name in suite.variants if name not in untried],
        tables=[table.resolved() for table in suite.tables],
        stages=_frame(_stage_rows(rows, plan, statuses), STAGES),
        attempts=_frame((a for stage in stages for a in _attempt_rows(stage)), ATTEMPTS),
        metrics=_frame((metric for row in rows for metric in _metric_rows(row)), METRICS),
        failures=_frame(_failure_rows(plan, statuses), FAILURES),
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
        named=_named(plan),
        columns=_column_heads(plan),
        model=_published_model(plan),
        problems=problems,
        gallery=gallery,
    )


def _frame(rows: Iterable[dict[str, Any]], schema: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=schema, orient="row")


def _ended(attempt: Record) -> Record:
    """Return an attempt of a run that is no more: what it calls running was lost."""
    if attempt.status != "running":
        return attempt
    error = Failure(kind="Lost", message="its run ended without a word (killed?)")
    return attempt.model_copy(update={"status": "lost", "error": error})


def _untried(plan: Plan) -> set[str]:
    """Return the cells that the search never came to; they are no rows of the report."""
    tried = {
        row.variant.name
        for row in plan.rows
        if any(s.status != "pruned" or s.reason != UNTRIED for s in row.evaluations.values())
    }
    return {row.variant.name for row in plan.rows} - tried


def _search_note(plan: Plan) -> list[str]:
    """Return what kind of search made the rows, in a sentence."""
    suite = plan.suite
    if suite.search is None:
        return []
    count, method = len(suite.cells), suite.search.method
    how = {
        "grid": "every combination",
        "each": "one setting changed at a time",
        "random": f"combinations drawn at random, seed {suite.search.seed}",
        "optuna": f"combinations chosen by Optuna (TPE, seed {suite.search.seed})",
    }[method]
    if not suite.search.explores:
        return [f"Search: {count} cells, {how}; every one of them is run to its end."]
    states: dict[str, Any] = {}
    for row in plan.rows:
        if row.variant.name in suite.cells:
            pruned = {s.reason for s in row.evaluations.values() if s.status == "pruned"}
            states.setdefault(row.variant.name, set()).update(pruned)
    left = Counter("untried" if UNTRIED in s else "stopped" if s else "" for s in states.values())
    text = f"Exploration: {how}, compared by {suite.search.metric} on the selection split"
    if suite.search.asha:
        text += ", seed after seed (ASHA)"
    text += f". {count - left['untried']} of {count} cells were tried, {left['stopped']} of them "
    text += "stopped early; their cost is in the ledger. Such figures choose settings: what is "
    text += "chosen is to be run with seeds of its own and reported on the test split."
    return [text]


def _named(plan: Plan) -> list[dict[str, Any]]:
    """Return the comparisons that the suite names, the primary one first."""
    suite = plan.suite
    primary = [] if suite.primary is None else [suite.primary.resolved() | {"primary": True}]
    return primary + [one.resolved() | {"primary": False} for one in suite.secondary]


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
    variant = max(plan.suite.variants.values(), key=lambda v: len(v.stages))
    row = variant.row
    model, size = row.model, row.data.image_size
    name = f"ViT-{model.size.capitalize()}" if model.size != "custom" else "ViT"
    devices = sorted({s.record.cost.device_model for s in plan.stages.values() if s.record})
    kinds = {s.record.cost.device_kind.upper() for s in plan.stages.values() if s.record}
    where = ", ".join(sorted(kinds)) or "not run yet"
    if devices:
        where += f" ({', '.join(devices)})"
    return (
        f"{row.data.name} at {size}×{size}, {name} of {_millions(_parameters(plan))} parameters "
        f"(patch {model.patch_size}, dim {model.dim}, depth {model.depth}), {where}"
    )


def _published_model(plan: Plan) -> str | None:
    """Return the encoder as published results name it; they are of 1,000 classes."""
    model = next(iter(plan.suite.variants.values())).row.model
    return f"vit_{model.size}_patch{model.patch_size}" if plan.data.classes == 1000 else None


def _parameters(plan: Plan) -> float:
    """Return parameters of the encoder, from its sizes."""
    row = max(plan.suite.variants.values(), key=lambda v: len(v.stages)).row
    model = row.model
    assert model.dim and model.depth
    hidden = int(model.dim * model.mlp_ratio)
    block = 4 * model.dim**2 + 2 * model.dim * hidden + 9 * model.dim + hidden
    patch = (plan.data.channels * model.patch_size**2 + 1) * model.dim
    return model.depth * block + patch + 3 * model.dim


def _millions(count: float) -> str:
    if count < 1e5:
        return f"{count / 1e3:.0f} k"
    return f"{count / 1e6:.1f} M" if count < 1e7 else f"{count / 1e6:.0f} M"


def _matched_notes(plan: Plan) -> list[str]:
    """Return how many steps each compute-matched row was given, and why."""
    notes = []
    for name, variant in plan.suite.variants.items():
        row = next((r for r in plan.rows if r.variant.name == name), None)
        if variant.match_compute is None or row is None:
            continue
        (stage,) = row.chain
        total = stage.steps or 0
        if stage.kind == "mae":
            base = schedule(variant, "mae", plan.data).steps
            text = f"an MAE trained from scratch for {total} steps, its own {base} and "
            text += f"{total - base} more, which cost as many FLOPs as the head and tuning stages"
        else:
            text = f"contrastive training without MAE for {total} steps, which cost as many FLOPs "
            text += "as all stages"
        notes.append(
            f"{name}: {text} of {variant.match_compute} (counted from the settings, rounded up)."
        )
    return notes


def _data_notes(plan: Plan) -> list[str]:
    """Return what is unusual about the images: left out, converted, missing, assumed."""
    notes, data = [], Data.of(plan.data)
    if data.broken:
        named = ", ".join(data.broken_files[:NOTED_FILES])
        more = data.broken - NOTED_FILES
        named += f" and {more} more" if more > 0 else ""
        notes.append(f"{data.broken} training images cannot be read and are left out: {named}.")
    if data.converted:
        kinds = ", ".join(f"{count} {kind}" for kind, count in data.converted.items())
        notes.append(f"Images converted to RGB: {kinds}.")
    return notes + [f"{note[0].upper()}{note[1:]}." for note in data.notes]


def _own(row: Row, chains: set[tuple[str, ...]]) -> set[str]:
    """The row's last stages: those past the longest of `chains` that is a part of its own."""
    own = tuple(stage.key for stage in row.chain)
    shared = next((n for n in range(len(own) - 1, 0, -1) if own[:n] in chains), 0)
    return set(own[shared:])


def _statuses(plan: Plan) -> dict[str, tuple[str, str | None]]:
    """Return status and reason of every stage as the report tells them."""
    found: dict[str, tuple[str, str | None]] = {}
    for stage in plan.stages.values():  # inputs first
        found[stage.key] = _status(stage)
        lost = next((s for s in stage.inputs.values() if found[s.key][0] == "failed"), None)
        if lost is not None and found[stage.key][0] == "pending":
            # of a chain the stage that failed itself is named
            own = f"its input failed: {lost.title}"
            found[stage.key] = "failed", own if lost.state.attempts else found[lost.key][1]
    return found


def _status(stage: Stage) -> tuple[str, str | None]:
    if stage.status == "stale" or (stage.status == "cached" and stage.reason):
        return "stale", stage.reason  # kept or not, its code is not today's
    if stage.status == "cached":
        return "complete", None
    newest = stage.state.attempts[-1] if stage.state.attempts else None
    if stage.status == "pruned" or newest is None or newest.status in ("complete", "damaged"):
        return stage.status, stage.reason
    status = "interrupted" if newest.status == "lost" else newest.status
    return status, newest.error.message if newest.error else None


def _shown_record(stage: Stage, statuses: dict[str, tuple[str, str | None]]) -> Record | None:
    """Return the record behind a stage's numbers; of a stage without any, its newest attempt's."""
    if statuses[stage.key][0] in ("complete", "stale"):
        return stage.record
    return stage.state.attempts[-1] if stage.state.attempts else None


def _failure_rows(
    plan: Plan, statuses: dict[str, tuple[str, str | None]]
) -> Iterator[dict[str, Any]]:
    """Yield the stages whose newest attempt came to nothing, with the rows that they cost."""
    for stage in plan.stages.values():
        status, _ = statuses[stage.key]
        if status not in ("failed", "interrupted") or not stage.state.attempts:
            continue
        newest = stage.state.attempts[-1]
        rows = [row.variant.name for row in plan.rows if stage in row.stages()]
        yield {
            "key": stage.key,
            "name": stage.title,
            "status": status,
            "error": newest.error.kind if newest.error else None,
            "message": newest.error.message if newest.error else None,
            "log_tail": newest.log_tail,
            "rows": list(dict.fromkeys(rows)),
        }


def _stage_rows(
    rows: list[Row], plan: Plan, statuses: dict[str, tuple[str, str | None]]
) -> Iterator[dict[str, Any]]:
    """Yield a row for every variant and seed that a stage serves."""
    known = {key: _stage_row(stage, *statuses[key]) for key, stage in plan.stages.items()}
    chains = {tuple(stage.key for stage in row.chain) for row in plan.rows}
    for row in rows:
        own = _own(row, chains)
        # two evaluations of a suite may be the same one of maect on other tokens
        named = {stage.key: name for name, stage in row.evaluations.items()}
        for stage in row.stages():
            yield known[stage.key] | {
                "kind": named.get(stage.key, stage.kind),
                "variant": row.variant.name,
                "seed": row.seed,
                "own": stage.key in own,
            }


def _stage_row(stage: Stage, status: str, reason: str | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        "key": stage.key,
        "name": stage.title,
        "group": "train" if stage.trains else "evaluate",
        "status": status,
        "reason": reason,
        "steps": stage.steps,
        "shards": stage.settings["numerics"]["shards"],
    }
    record = stage.record if status in ("complete", "stale") else None
    if record is None:
        return dict.fromkeys(STAGES) | values
    values |= {
        "attempt": record.attempt,
        "started": record.started,
        "ended": record.ended,
        "worker": f"{record.env['host']}:{record.pid}",
        "code": record.code.hash,
        **{name: record.env.get(name) for name in ("torch", "workers", "backend")},
    }
    return _measured(record.cost, STAGES) | values


def _measured(cost: Cost, names: Iterable[str]) -> dict[str, Any]:
    """Return the columns of a record's cost."""
    found = {name: getattr(cost, name, None) for name in names}
    told = [{"uuid": gpu.uuid, "model": gpu.model, "host": gpu.host} for gpu in cost.gpus or []]
    return found | {"gpus": None if cost.gpus is None else json.dumps(told)}


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


def _column_heads(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return what each column measures, for tables whose cells are all still open."""
    return {
        column: _metric(name, metric)
        for variant in plan.suite.variants.values()
        for name, evaluation in variant.evaluations.items()
        for column, metric in evaluation.columns(name).items()
    }


def _attempt_rows(stage: Stage) -> Iterator[dict[str, Any]]:
    for attempt in stage.state.attempts:
        yield _measured(attempt.cost, ATTEMPTS) | {
            "key": stage.key,
            "kind": stage.kind,
            "name": stage.title,
            "attempt": attempt.attempt,
            "status": attempt.status,
            "started": attempt.started,
            "ended": attempt.ended,
            "error": attempt.error.message if attempt.error else None,
        }


def _curves(plan: Plan, store: Store, problems: list[str]) -> dict[str, Curves]:
    """Return the training curves of all stages; files that do not fit are named in `problems`."""
    curves = {}
    for stage in plan.stages.values():
        record = stage.record if stage.trains and stage.status == "cached" else None
        if record is not None and "curves.json" in record.files:
            with _told(problems, stage, "curves.json"):
                data = store.read(stage.key, record, "curves.json")
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

    with _told(problems, stage, "gallery.safetensors"):
        arrays = load(store.read(stage.key, stage.record, "gallery.safetensors"))
        told = {name: stage.settings[name] for name in ("seed", "split", "mask_ratio", "norm_pix")}
        rows, summary = list(plan.suite.gallery), stage.record.summary
        found = told | {"key": stage.key, "rows": rows, "summary": summary, "arrays": arrays}
        gallery(found)  # whether they are pictures shows when they are drawn
        return found
    return None


@contextmanager
def _told(problems: list[str], stage: Stage, name: str) -> Iterator[None]:
    """Name in `problems` a file of a stage that does not fit its record or holds something else."""
    try:
        yield
    except Exception as error:  # of a stranger's file anything can be wrong
        problems.append(f"stages/{stage.key}/{name} is damaged: {reason(error)}")


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
