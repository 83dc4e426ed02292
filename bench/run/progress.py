"""What a person sees while a suite runs: live lines on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from bench.errors import written
from bench.plan.stage import Plan, Stage
from bench.run.mailbox import Stepped
from bench.store.record import Record
from reports.display import duration

#: seconds between two plain lines on one stage
PLAIN_EVERY_S = 10.0


@dataclass
class Display:
    """Shows stages as they begin, go on and end. `expected` gives the seconds still to go."""

    plan: Plan
    expected: Callable[[], float | None]
    #: it draws with escape codes, so what it is told goes through `written`
    console: Console = field(
        default_factory=lambda: Console(
            file=getattr(sys.stdout, "terminal", sys.stdout), highlight=False
        )
    )

    def __post_init__(self) -> None:
        self.live = self.console.is_terminal
        #: key of a running stage -> its bar, if it has one
        self.running: dict[str, TaskID | None] = {}
        #: key -> seconds that a stage in training still takes, and when that was last printed
        self.training: dict[str, float] = {}
        self._printed: dict[str, float] = {}
        self.total = len(self.plan.stages)
        self.ended = len(self.plan.with_status("cached"))
        self.began = time.monotonic()
        self._refreshed = self._said_s = 0.0
        self.bars = Progress(
            TextColumn("{task.description}", justify="left", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[detail]}"),
            console=self.console,
            auto_refresh=False,
        )
        self._live = Live(self.bars, console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> Display:
        if self.live:
            self.console.print()  # below the last word on Ray's start
            self._overall = self.bars.add_task("all stages", total=self.total, detail="")
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(written(line), markup=False, highlight=False, soft_wrap=True)

    def starting(self, seconds: float) -> None:
        """Ray is starting: said at first and then each ten seconds, on a terminal all along."""
        text = f"starting Ray ... {seconds:.0f} s" if seconds >= 1 else "starting Ray ..."
        if self.live:
            self.console.print(text, end="\r")
        elif seconds >= self._said_s:
            self._said_s = seconds + PLAIN_EVERY_S
            self.say(text)

    def begin(self, stage: Stage) -> None:
        """A worker has begun a stage."""
        self.running[stage.key] = None
        if self.live and stage.trains:
            bar = self.bars.add_task(written(stage.title), total=stage.steps, detail="")
            self.running[stage.key] = bar

    def step(self, stage: Stage, told: Stepped) -> None:
        """A training stage goes on."""
        if stage.key not in self.running:
            return
        now, bar = time.monotonic(), self.running[stage.key]
        images = (told.steps - told.step) * stage.settings["train"]["batch_size"]
        left_s = images / max(told.images_per_s, 1e-9)  # a stage may have resumed
        self.training[stage.key] = left_s
        detail = f"{told}, {duration(left_s)} left"
        if bar is not None:
            self.bars.update(bar, completed=told.step, detail=detail)
        if not self.live and now - self._printed.get(stage.key, 0.0) >= PLAIN_EVERY_S:
            self._printed[stage.key] = now
            self.say(f"  {stage.title}: {detail}")

    def end(self, stage: Stage, how: str, why: str | None = None) -> None:
        """A stage is complete, has failed or has lost its worker."""
        self.training.pop(stage.key, None)
        bar = self.running.pop(stage.key, None)
        if bar is not None:
            self.bars.remove_task(bar)
        if how == "stopped":
            self.say(f"  {stage.title}: {why}")
            return
        if how == "lost":
            self.say(f"  {stage.title}: its worker died; trying again ({why})")
            return
        self.ended += 1
        number = f"[{self.ended}/{self.total}]"
        if stage.record is not None and how == "complete":
            took = duration(stage.record.cost.wall_s or 0.0)
            self.say(f"{number} {stage.title}: {_result(stage.record)} in {took}")
        else:
            self.say(f"{number} {stage.title}: {how}: {why}")

    def refresh(self) -> None:
        """Draw the bars anew, four times a second at the most."""
        if not self.live or time.monotonic() - self._refreshed < 0.25:
            return
        self._refreshed = time.monotonic()
        left = self.expected()
        detail = f"{self.ended}/{self.total}, {duration(self._refreshed - self.began)} so far"
        if left is not None:
            detail += f", about {duration(left)} left"
        self.bars.update(self._overall, completed=self.ended, detail=detail)
        self._live.refresh()


def _result(record: Record) -> str:
    """Return the figure that a stage is known by."""
    metric = record.primary
    if metric is not None:
        return f"{metric.label} {metric.value:.1f} {metric.unit}"
    if "final_loss" in record.summary:
        return f"loss {record.summary['final_loss']:.4f}"
    return "complete"
