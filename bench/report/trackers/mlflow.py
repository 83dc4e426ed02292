"""MLflow: a SQLite store with an experiment a suite; `mlflow ui --backend-store-uri` shows it.

A run that is there and has changed is deleted, as MLflow deletes (`mlflow gc`), and written anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # an export tells nobody
os.environ.setdefault("MLFLOW_DISABLE_AUTO_LOGGING", "true")

import sqlalchemy  # noqa: F401 (mlflow-skinny misses it only later)
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from bench.errors import require_writable
from bench.report.trackers import TrackedRun

#: what MLflow takes at a time, and of a text
_METRICS, _OTHERS, _TEXT = 1000, 100, 5000


def write(runs: list[TrackedRun], to: Path) -> Iterator[TrackedRun]:
    """Write the runs into the SQLite file `to`. Yield those that are new or changed."""
    for name in ("mlflow.store", "alembic"):  # which tell of each table
        logging.getLogger(name).setLevel(logging.WARNING)
    to.parent.mkdir(parents=True, exist_ok=True)
    require_writable(to)  # MLflow would try again and again
    client = MlflowClient(tracking_uri=f"sqlite:///{to.resolve()}")
    for run in runs:
        title = f"{run.suite}, profile {run.profile}"
        experiment = client.get_experiment_by_name(title)
        at = experiment.experiment_id if experiment else client.create_experiment(title)
        there = client.search_runs([at], f"tags.`maect.id` = '{run.id}'")
        if any(one.data.tags.get("maect.content") == run.content for one in there):
            continue
        for one in there:
            client.delete_run(one.info.run_id)
        _add(client, at, run)
        yield run


def _add(client: MlflowClient, experiment: str, run: TrackedRun) -> None:
    """Write a run that is not there."""
    start, end = (round(1000 * time_s) for time_s in (run.started_s, run.ended_s))
    told = {"maect.id": run.id, "maect.row": run.row, "maect.seed": str(run.seed)}
    told |= {f"artifact.{name}": place for name, place in run.artifacts.items()}
    number = client.create_run(experiment, start, run_name=run.title).info.run_id
    metrics = [Metric(name, value, end, step) for name, step, value in run.points()]
    metrics += [Metric(name, value, end, 0) for name, value in run.metrics.items()]
    for at in range(0, len(metrics), _METRICS):
        client.log_batch(number, metrics=metrics[at : at + _METRICS])
    params = [Param(name, str(value)[:_TEXT]) for name, value in run.settings.items()]
    tags = [RunTag(name, value[:_TEXT]) for name, value in told.items()]
    for at in range(0, max(len(params), len(tags)), _OTHERS):
        here = slice(at, at + _OTHERS)
        client.log_batch(number, params=params[here], tags=tags[here])
    client.set_terminated(number, "FINISHED", end)
    client.set_tag(number, "maect.content", run.content)  # last: it is whole
