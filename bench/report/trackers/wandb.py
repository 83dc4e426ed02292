"""Weights & Biases: offline runs, which `wandb sync` uploads.

A run keeps its id whatever its results are; its folder is written anew where they have changed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # an export tells nobody

import wandb

from bench.report.trackers import TrackedRun


def write(runs: list[TrackedRun], to: Path) -> Iterator[TrackedRun]:
    """Write a folder for each run below `to`/wandb. Yield those that are new or changed."""
    to.mkdir(parents=True, exist_ok=True)
    for run in runs:
        there = [*(to / "wandb").glob(f"offline-run-*-{run.id}")]
        if any((folder / f"maect-{run.content}").exists() for folder in there):
            continue
        for folder in there:
            shutil.rmtree(folder)
        _add(run, to)
        yield run


def _add(run: TrackedRun, to: Path) -> None:
    """Write a run that is not there."""
    quiet = wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True,
        x_disable_stats=True, x_disable_meta=True,
    )  # fmt: skip
    opened = wandb.init(
        mode="offline", dir=str(to), id=run.id, name=run.title, group=run.row,
        project=f"{run.suite}-{run.profile}", settings=quiet, reinit="create_new",
        config={"row": run.row, "seed": run.seed, "settings": run.settings,
                "artifacts": run.artifacts},
    )  # fmt: skip
    for stage, columns in run.curves.items():
        opened.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        for values in zip(*columns.values(), strict=True):
            opened.log(dict(zip((f"{stage}/{name}" for name in columns), values, strict=True)))
    opened.summary.update(run.metrics)
    folder = Path(opened.dir).parent
    opened.finish()
    (folder / f"maect-{run.content}").touch()  # last: it is whole
