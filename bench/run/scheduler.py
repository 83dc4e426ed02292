"""Which stage runs next: the state of a run, without any Ray in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bench.plan.stage import Plan, Stage
from bench.plan.status import assess
from bench.store.store import Store

#: times a stage whose worker died is tried again in one run
MAX_LOST = 3


@dataclass
class Scheduler:
    """Walks a plan: what is ready, what runs, what failed and what that takes with it."""

    plan: Plan
    store: Store
    keep_stale: bool = False
    running: set[str] = field(default_factory=set)
    #: everything that this run has worked on
    begun: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    #: key -> why
    failed: dict[str, str] = field(default_factory=dict)
    #: keys that a search left out -> why
    pruned: dict[str, str] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    #: told of every stage whose end is known: complete, failed, skipped
    on_end: Callable[[Stage, str], None] = lambda stage, state: None

    def __post_init__(self) -> None:
        self.stages = self.plan.stages
        self.done.update(key for key, stage in self.stages.items() if stage.status == "cached")
        self._weight: dict[str, float] = {}

    @property
    def finished(self) -> bool:
        return len(self.done) + len(self.failed) + len(self.pruned) == len(self.stages)

    def left(self) -> list[Stage]:
        """Stages whose end is not known yet."""
        ended = self.done | self.failed.keys() | self.pruned.keys()
        return [stage for key, stage in self.stages.items() if key not in ended]

    def ready(self) -> list[Stage]:
        """Stages whose inputs are complete and that nobody runs, the most pressing first.

        Features and evaluations come before training: results show early, and a budget that ends
        has paid for them.
        """
        self._refresh()
        open_stages = [
            stage
            for stage in self.left()
            if stage.key not in self.running
            and all(source.key in self.done for source in stage.inputs.values())
        ]
        return sorted(open_stages, key=lambda stage: (stage.trains, -self.weight(stage)))

    def weight(self, stage: Stage) -> float:
        """FLOPs of the longest path from this stage on: what most delays the end."""
        if stage.key not in self._weight:
            after = [
                self.weight(other)
                for other in self.stages.values()
                if stage in other.inputs.values()
            ]
            self._weight[stage.key] = stage.flops + max(after, default=0.0)
        return self._weight[stage.key]

    def begin(self, stage: Stage) -> None:
        self.running.add(stage.key)
        self.begun.add(stage.key)

    def complete(self, stage: Stage) -> None:
        """Take note of a record that the store now holds."""
        self.running.discard(stage.key)
        assess(stage, self.store, keep_stale=self.keep_stale)
        if stage.status != "cached":
            self.fail(stage, stage.reason or "it left no complete record")
            return
        self.done.add(stage.key)
        self.on_end(stage, "complete")

    def fail(self, stage: Stage, reason: str) -> None:
        """A stage failed: what builds on it cannot run."""
        self.running.discard(stage.key)
        if stage.key in self.failed:
            return
        self.failed[stage.key] = reason
        self.on_end(stage, "failed")
        for other in self.stages.values():
            if stage in other.inputs.values() and other.key not in self.done:
                self.fail(other, f"its input failed: {stage.title}")

    def prune(self, stage: Stage, reason: str) -> None:
        """A search does without a stage."""
        self.pruned[stage.key] = reason
        stage.status, stage.reason = "pruned", reason

    def lose(self, stage: Stage, reason: str) -> None:
        """A stage's worker died; it is tried again, but not for ever."""
        self.running.discard(stage.key)
        self.lost[stage.key] = self.lost.get(stage.key, 0) + 1
        if self.lost[stage.key] > MAX_LOST:
            self.fail(stage, f"its worker died {self.lost[stage.key]} times: {reason}")

    def _refresh(self) -> None:
        """A stage that waited for its input may turn out to be cached after all."""
        for stage in self.left():
            if stage.record is None or stage.key in self.running or stage.status == "stale":
                continue
            if all(source.key in self.done for source in stage.inputs.values()):
                assess(stage, self.store, keep_stale=self.keep_stale)
                if stage.status == "cached":
                    self.done.add(stage.key)
                    self.on_end(stage, "complete")
