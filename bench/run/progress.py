"""What a person sees while a suite runs: live bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from bench.errors import written
from bench.plan.stage import Plan, Stage
from bench.run.mailbox import Stepped
from bench.store.record import Record
from reports import display
from reports.display import duration

#: what lies between two plain lines, whichever comes first: seconds, or a share of the stages
PLAIN_EVERY_S, PLAIN_SHARE = 15.0, 0.1
#: columns in which a bar has room beside all of its text
_WIDE = 100
#: stages in training that a plain line names
_NAMED = 4


class Display:
    """Shows stages as they begin, go on and end."""

    def __init__(
        self,
        plan: Plan,
        expected: Callable[[], float | None],
        console: Console | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        """`expected` gives the seconds still to go; `quiet` tells of faults alone."""
        self.plan, self.expected, self.quiet = plan, expected, quiet
        #: it draws with escape codes, so what it is told goes through `written`
        self.console = console or Console(
            file=getattr(sys.stdout, "terminal", sys.stdout), highlight=False
        )
        self.wide = self.console.width >= _WIDE
        self.live = self.console.is_terminal and not self.quiet
        #: key of a running stage -> its bar, which only those that train show
        self.running: dict[str, TaskID] = {}
        #: key -> seconds that a stage in training still takes, and in words how far it is
        self.training: dict[str, float] = {}
        self._far: dict[str, str] = {}
        #: what ended last, and what the last plain line told of: when, and how many had ended
        self._last, self._told_s, self._told_ended = "", time.monotonic(), 0
        self.total = len(self.plan.stages)
        self.ended = self._told_ended = len(self.plan.with_status("cached"))
        self.began = time.monotonic()
        self._refreshed = self._said_s = 0.0
        self.bars = Progress(
            TextColumn("{task.description}", justify="left", markup=False),
            BarColumn(bar_width=20 if self.wide else 8),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self.console,
            auto_refresh=False,
            transient=True,
            disable=not self.live,
        )
        self._overall = self.bars.add_task("all stages", total=self.total, detail="")

    def __enter__(self) -> Display:
        if self.live:
            self.console.print()  # below the last word on Ray's start
        self.bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bars.stop()
        if not self.live and self.ended > self._told_ended:
            self._tell()

    def say(self, line: str, *, fault: bool = False) -> None:
        """Print a line above the bars; where it is quiet, a fault alone."""
        if self.quiet and not fault:
            return
        for part in display.wrap(written(line), display.room(), "    "):
            self.console.print(part, markup=False, highlight=False, soft_wrap=True)

    def starting(self, seconds: float) -> None:
        """Ray is starting: said at first and then now and again, on a terminal all along."""
        text = f"starting Ray ... {seconds:.0f} s" if seconds >= 1 else "starting Ray ..."
        if self.live:
            self.console.print(text, end="\r")
        elif seconds >= self._said_s:
            self._said_s = seconds + PLAIN_EVERY_S
            self.say(text)

    def begin(self, stage: Stage) -> None:
        """A worker has begun a stage."""
        room = self.console.width - 32
        title = written(stage.title if self.wide else display.middle(stage.title, room))
        bar = self.bars.add_task(title, total=stage.steps, detail="", visible=stage.trains)
        self.running[stage.key] = bar

    def step(self, stage: Stage, told: Stepped) -> None:
        """A training stage goes on."""
        if stage.key not in self.running:
            return
        images = (told.steps - told.step) * stage.settings["train"]["batch_size"]
        left_s = images / max(told.images_per_s, 1e-9)  # a stage may have resumed
        self.training[stage.key] = left_s
        left = f"{duration(left_s)} left"
        self._far[stage.key] = f"  {stage.title}: {told}, {left}"
        detail = f"{told}, {left}" if self.wide else f"{told.step}/{told.steps}, {left}"
        self.bars.update(self.running[stage.key], completed=told.step, detail=detail)

    def end(self, stage: Stage, how: str, why: str | None = None) -> None:
        """A stage is complete, has failed or has lost its worker."""
        self.training.pop(stage.key, None)
        self._far.pop(stage.key, None)
        bar = self.running.pop(stage.key, None)
        if bar is not None:
            self.bars.remove_task(bar)
        if how == "stopped":
            self.say(f"  {stage.title}: {why}")
            return
        if how == "lost":
            self.say(f"  {stage.title}: its worker died; trying again ({why})", fault=True)
            return
        self.ended += 1
        number = f"[{self.ended}/{self.total}]"
        if stage.record is not None and how == "complete":
            took = duration(stage.record.cost.wall_s or 0.0)
            self._last = f"{stage.title}: {_result(stage.record)} in {took}"
            if self.live:
                self.say(f"{number} {self._last}")
        else:
            self.say(f"{number} {stage.title}: {how}: {why}", fault=True)

    def refresh(self) -> None:
        """Draw the bars anew, four times a second at the most; elsewhere tell how far the run is.

        A plain line comes each `PLAIN_EVERY_S` or `PLAIN_SHARE` of the stages.
        """
        now = time.monotonic()
        if self.live and now - self._refreshed >= 0.25:
            self._refreshed = now
            detail = f"{self.ended}/{self.total}, {self._so_far()}"
            self.bars.update(self._overall, completed=self.ended, detail=detail)
            self.bars.refresh()
        due = self.ended - self._told_ended >= PLAIN_SHARE * self.total
        if not self.live and (due or now - self._told_s >= PLAIN_EVERY_S):
            self._tell()

    def _so_far(self) -> str:
        left = self.expected()
        told = [] if left is None else [f"about {duration(left)} left"]
        if self.wide or not (told and self.live):
            told.insert(0, f"{duration(time.monotonic() - self.began)} so far")
        return ", ".join(told)

    def _tell(self) -> None:
        """Print how far the run is, what ended last and what trains."""
        self._told_s, self._told_ended = time.monotonic(), self.ended
        last = f"; {self._last}" if self._last else ""
        self._last, far = "", list(self._far.values())
        self.say(f"[{self.ended}/{self.total}] {self._so_far()}{last}")
        for line in far[:_NAMED]:
            self.say(line)
        if len(far) > _NAMED:
            self.say(f"  and {len(far) - _NAMED} more train")


def _result(record: Record) -> str:
    """Return the figure that a stage is known by."""
    metric = record.primary
    if metric is not None:
        return f"{metric.label} {metric.value:.1f} {metric.unit}"
    if "final_loss" in record.summary:
        return f"loss {record.summary['final_loss']:.4f}"
    return "complete"
