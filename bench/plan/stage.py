"""A stage and a plan: one unit of work with one output, and the DAG that a suite makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bench.store.calibration import Calibration
from bench.store.record import Code, Record
from bench.store.store import StageState
from bench.suite.schema import Suite, Variant
from maect import evals, methods
from maect.datasets import DataInfo
from maect.files import digest

#: kinds of stages that neither train nor evaluate, and what runs them
ENTRY = {"features": "maect.stages.features", "gallery": "maect.stages.gallery"}


@dataclass(frozen=True, eq=False)
class Rung:
    """A point within a training stage at which a search compares its cell with others."""

    #: steps taken
    step: int
    #: evaluation by whose first metric the cells are compared, with the features that it reads
    evaluation: Stage


@dataclass(eq=False)
class Stage:
    """One unit of work with one output."""

    kind: str
    key: str
    #: for people: "MAE-CT tuning, seed 0"
    title: str
    settings: dict[str, Any]
    inputs: dict[str, Stage]
    data: DataInfo
    #: where the data and, for released weights, the checkpoint lie; not part of the key
    places: dict[str, str | None]
    code: Code
    steps: int | None = None
    flops: float = 0.0
    state: StageState = field(default_factory=lambda: StageState(""))
    #: cached | stale | pending | pruned (a search left it out)
    status: str = "pending"
    reason: str | None = None
    #: where a search may stop it; no part of its identity, as they change no bit
    rungs: list[Rung] = field(default_factory=list)
    #: number of the rung, from 1, at which the stage stops; 0 or beyond the last: at its end
    until: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """Return what travels to a worker: all but what the store holds of the stage."""
        return vars(self) | {"state": StageState(self.key)}

    @cached_property
    def like(self) -> str:
        """Return what stages of equal steps have in common, whatever their length, learning rate
        and seed."""
        own, train = self.settings, self.settings.get("train", {})
        told = {name: own.get(name) for name in ("model", "numerics", "views", "settings", "pool")}
        told |= {name: train.get(name) for name in ("batch_size", "frozen_blocks", "queue_size")}
        told["image_size"] = own.get("data", {}).get("image_size")
        return digest([self.kind, told], 16)

    @property
    def trains(self) -> bool:
        """Return whether it is a training stage."""
        return self.kind in methods.names()

    @property
    def runs_encoder(self) -> bool:
        """Return whether the encoder runs over images, which several workers can share."""
        if self.trains or self.kind in ENTRY:
            return self.kind != "gallery"
        return evals.get(self.kind).needs_encoder

    @property
    def rung(self) -> Rung | None:
        """Return the rung at which the stage stops, or None where it goes on to its end."""
        return self.rungs[self.until - 1] if 0 < self.until <= len(self.rungs) else None

    def steps_at(self, name: str, attempt: Record | None) -> int:
        """Return a count of steps that an attempt's summary tells: `stopped_at`, `resumed_at`."""
        told = attempt.summary.get(name) if attempt else None
        return min(max(told, 0), self.steps or 0) if isinstance(told, int) else 0

    @property
    def record(self) -> Record | None:
        """Return the newest complete record, or None."""
        return self.state.record


@dataclass
class Row:
    """One variant with one seed."""

    variant: Variant
    seed: int
    chain: list[Stage]
    features: Stage
    evaluations: dict[str, Stage]
    #: pictures of the suite, kept with the second row that they show
    gallery: Stage | None = None

    def stages(self) -> Iterator[Stage]:
        """Yield the row's stages, each once, inputs before what needs them."""
        yield from self.chain
        sources = [stage.inputs["features"] for stage in self.evaluations.values()]
        yield from dict.fromkeys([self.features, *sources])
        yield from dict.fromkeys(self.evaluations.values())
        if self.gallery is not None:
            yield self.gallery


@dataclass
class Plan:
    """A suite's rows and their stages."""

    suite: Suite
    rows: list[Row]
    #: every stage once, inputs before what needs them
    stages: dict[str, Stage]
    data: DataInfo
    #: whether results of older code count
    keep_stale: bool = False
    #: what was measured where the store lies
    calibration: Calibration | None = None

    @property
    def unresolved(self) -> str | None:
        """Return why the keys are not final, or None where the data are at hand."""
        missing = (s.data for s in self.stages.values() if s.data.fingerprint is None)
        return next((data.hint for data in missing), None)

    def with_status(self, *statuses: str) -> list[Stage]:
        """Return the stages that have one of the statuses."""
        return [stage for stage in self.stages.values() if stage.status in statuses]


def entry_modules(kind: str) -> list[str]:
    """Return the modules that a kind of stage runs; the first one's `run` takes the job."""
    if kind in ENTRY:
        return [ENTRY[kind]]
    if kind in methods.names():
        method = methods.get(kind)
        return [method.entry, method.module]
    entry = "evaluate_encoder" if evals.get(kind).needs_encoder else "evaluate"
    return [f"maect.stages.{entry}", evals.code_of(kind)]
