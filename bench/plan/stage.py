"""What a plan is made of: stages, the rows that share them, and the code that each kind runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.store.store import StageState
from bench.suite.load import Suite, Variant
from maect import evals
from maect.datasets import DataInfo
from maect.settings import TRAINING_STAGES

#: kinds of stages that are no evaluations, with the module that runs each
ENTRY = {
    "mae": "maect.stages.mae",
    "head": "maect.stages.head",
    "tune": "maect.stages.tune",
    "features": "maect.stages.features",
    "gallery": "maect.stages.gallery",
}
#: how many unreadable files a record names
NAMED_FILES = 100


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
    #: hash of the code that it runs, and of each module
    code: dict[str, Any]
    #: of a training stage
    steps: int | None = None
    #: of training and of each pass through the encoder; of evaluations of stored features 0
    flops: float = 0.0
    state: StageState = field(default_factory=lambda: StageState(""))
    #: cached | stale | pending | pruned (a search left it out)
    status: str = "pending"
    #: why it has this status, where there is more to say
    reason: str | None = None

    @property
    def trains(self) -> bool:
        """Return whether it is a training stage."""
        return self.kind in TRAINING_STAGES

    @property
    def runs_encoder(self) -> bool:
        """Return whether it runs an encoder over images, which all workers of a group share."""
        if self.kind in ENTRY:
            return self.kind != "gallery"
        return evals.get(self.kind).needs_encoder

    @property
    def record(self) -> Any:
        """Return its newest complete record, or None."""
        return self.state.record


@dataclass
class Row:
    """One variant with one seed."""

    variant: Variant
    seed: int
    chain: list[Stage]
    features: Stage
    #: features of other tokens that evaluations declare
    more_features: list[Stage]
    evaluations: dict[str, Stage]
    #: pictures of the suite, kept with the second row that they show
    gallery: Stage | None = None

    def stages(self) -> Iterator[Stage]:
        """Yield its stages, inputs before what needs them."""
        yield from self.chain
        yield self.features
        yield from self.more_features
        yield from self.evaluations.values()
        if self.gallery is not None:
            yield self.gallery


@dataclass
class Plan:
    """A suite unrolled into stages."""

    suite: Suite
    rows: list[Row]
    #: every stage once, inputs before what needs them
    stages: dict[str, Stage]
    data: DataInfo

    @property
    def unresolved(self) -> str | None:
        """Return why the keys are not final, where the data are not at hand; else None."""
        return self.data.hint if self.data.fingerprint is None else None

    def with_status(self, *statuses: str) -> list[Stage]:
        """Return the stages with one of the statuses, in the plan's order."""
        return [stage for stage in self.stages.values() if stage.status in statuses]


def entry_modules(kind: str) -> list[str]:
    """Return the names of the maect modules that a kind of stage starts from."""
    if kind in ENTRY:
        return [ENTRY[kind]]
    evaluator = evals.get(kind)
    # what makes the views of an evaluation that asks for the encoder makes the features too
    views = [ENTRY["features"]] if evaluator.needs_encoder else []
    return [evaluator.run.__module__, evals.at_blocks.__module__, *views]


def unusual(data: DataInfo) -> dict[str, Any]:
    """Return what was left out of a data set and what was converted: counts, first file names."""
    names = [f"{file}: {reason}" for file, reason in data.broken]
    return {
        "broken": len(names),
        "broken_files": names[:NAMED_FILES],
        "converted": {kind: len(files) for kind, files in data.converted.items()},
    }
