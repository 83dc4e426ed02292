"""What experiment trackers are told of a suite: its rows and seeds, each as one of their runs.

There is a module for each; its `write(runs, to)` writes them to a place and yields those that are
new or changed, each once it is written. Each needs the extra of its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.errors import UserError, reason
from bench.plan.stage import Plan, Row
from bench.store.store import Store
from maect.files import digest
from reports.frames import SuiteView, flatten

Plain = str | int | float | bool


@dataclass(frozen=True)
class TrackedRun:
    """A row with a seed."""

    suite: str
    profile: str
    row: str
    seed: int
    #: seconds since the epoch
    started_s: float
    ended_s: float
    #: "tune.train.lr" -> value; lists as text
    settings: dict[str, Plain]
    #: "knn/accuracy_k10" -> value
    metrics: dict[str, float]
    #: stage -> column ("step", "loss", ...) -> values
    curves: dict[str, dict[str, list[float]]]
    #: "tune/encoder.safetensors" -> where it lies
    artifacts: dict[str, str]

    @property
    def title(self) -> str:
        """Return what people call it."""
        return f"{self.row}, seed {self.seed}"

    @cached_property
    def id(self) -> str:
        """Return what tells it from all other runs, whatever its results are."""
        return digest([self.suite, self.profile, self.row, self.seed], 16)

    @cached_property
    def content(self) -> str:
        """Return what is another where anything of it has changed."""
        return digest(asdict(self), 16)

    def points(self) -> Iterator[tuple[str, int, float]]:
        """Yield the points of all curves: ("tune/loss", step, value)."""
        for stage, columns in self.curves.items():
            for name, values in columns.items():
                if name != "step":
                    for step, value in zip(columns["step"], values, strict=True):
                        yield f"{stage}/{name}", int(step), float(value)


def write_tracker(
    tracker: str, to: Path, plan: Plan, store: Store, view: SuiteView
) -> tuple[int, int]:
    """Write a plan's rows and seeds for a tracker. Return how many they are and how many of them
    are new or changed.

    Raises `UserError` where the tracker is not installed, nothing has run, or `to` cannot be
    written.
    """
    try:
        write = import_module(f"bench.report.trackers.{tracker}").write
    except ModuleNotFoundError as error:
        missing = (error.name or tracker).partition(".")[0]
        needs = f"needs {missing}: pip install 'maect-bench[{tracker}]'"
        raise UserError(needs, file=f"--tracker {tracker}") from None
    runs = [run for row in plan.rows if (run := _tracked(row, view, store)) is not None]
    if not runs:
        raise UserError(f"nothing of suite {view.suite} is in the store yet; run it first")
    try:
        return len(runs), len([*write(runs, to)])
    except Exception as error:  # the libraries have errors of their own
        raise UserError(f"{to} cannot be written ({reason(error)}); name another: --to") from None


def _tracked(row: Row, view: SuiteView, store: Store) -> TrackedRun | None:
    """Return a row as trackers have it, or None where it has no result yet."""
    settings, artifacts = dict[str, Plain](), dict[str, str]()
    curves, metrics, spans = dict[str, Any](), dict[str, float](), list[tuple[float, float]]()
    named = {stage.key: name for name, stage in row.evaluations.items()}
    for stage in row.stages():
        record, name = stage.record, named.get(stage.key, stage.kind)
        if record is None or stage.status != "cached":
            continue
        settings |= dict(_flat(name, stage.settings))
        spans.append((record.started_s, record.started_s + (record.cost.wall_s or 0.0)))
        at = f"{store.name}/{store.artifact(record).relative_to(store.root)}"
        artifacts |= {f"{name}/{file}": f"{at}/{file}" for file in sorted(record.files)}
        if stage.key in view.curves:
            curves[name] = view.curves[stage.key]
        metrics |= {f"{name}/{metric.name}": metric.value for metric in record.metrics}
    if not spans:
        return None
    started, ended = zip(*spans, strict=True)
    whole = (view.suite, view.profile, row.variant.name, row.seed, min(started), max(ended))
    return TrackedRun(*whole, settings, metrics, curves, artifacts)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Plain]]:
    """Yield settings by their dotted paths; what is not set is left out."""
    for path, inner in flatten(value, name).items():
        if isinstance(inner, list) and any(isinstance(one, dict) for one in inner):
            for number, one in enumerate(inner):
                yield from _flat(f"{path}.{number}", one)
        elif inner is not None:
            yield path, inner if isinstance(inner, Plain) else ", ".join(map(str, inner))
