"""What a run says of its progress: how long Ray takes to start, how long a stage still trains."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from bench.plan.stage import Plan
from bench.run.mailbox import Stepped
from bench.run.progress import Display


@pytest.fixture
def display(plan_of: Callable[..., Plan]) -> Display:
    """A display that writes into its console's file, as into a pipe."""
    plan = plan_of(seeds=1)
    return Display(plan, lambda: None, Console(file=io.StringIO(), highlight=False, width=100))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the time on by so many seconds; it stands still by itself."""
    now = [time.monotonic()]
    monkeypatch.setattr("bench.run.progress.time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def written(display: Display) -> str:
    file = display.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_start_of_ray_shows_its_seconds(display: Display):
    for tenths in range(0, 250, 2):
        display.starting(tenths / 10)
    lines = written(display).splitlines()
    assert lines == ["starting Ray ...", "starting Ray ... 15 s"]


def test_a_terminal_shows_them_all_along(plan_of: Callable[..., Plan]):
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=100)
    display = Display(plan_of(seeds=1), lambda: None, console)
    for seconds in (0.0, 0.2, 1.2, 3.0):
        display.starting(seconds)
    assert written(display).endswith("starting Ray ... 1 s\rstarting Ray ... 3 s\r")


def test_what_is_left_of_a_resumed_stage_goes_by_its_pace(display: Display, clock):
    """Not by the steps that another run took: those passed in no time."""
    stage = next(s for s in display.plan.stages.values() if s.title == "MAE, seed 0")
    assert (stage.steps, stage.settings["train"]["batch_size"]) == (40, 64)
    display.begin(stage)
    assert display.training == {}
    display.step(stage, Stepped(stage.key, 30, 40, 1, 0.5, 32.0))
    assert display.training == {stage.key: pytest.approx(10 * 64 / 32)}
    with display:
        clock(15)
        display.refresh()
    assert "  MAE, seed 0: 30/40 epoch 1 loss 0.5000 32 images/s, 20.0 s left\n" in written(display)


def test_plain_lines_come_each_15_s_or_tenth_of_the_run(display: Display, clock):
    stages = list(display.plan.stages.values())
    assert len(stages) == 28
    with display:
        for stage in stages[:7]:  # a tenth are 3 of them
            display.begin(stage)
            display.end(stage, "failed", "lost")
            display.refresh()
        told = written(display).count("\n")
        assert told == 7 + 2  # faults are told at once
        for _ in range(29):
            clock(1)
            display.step(stages[0], Stepped(stages[0].key, 3, 40, 0, math.nan, 32.0))
            display.refresh()
    assert written(display).count("\n") == told + 1
    assert all(len(line) < 60 for line in written(display).splitlines())


def test_a_quiet_run_tells_of_faults_alone(plan_of: Callable[..., Plan], clock):
    plan = plan_of(seeds=1)
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=100)
    display, stages = Display(plan, lambda: None, console, quiet=True), list(plan.stages.values())
    display.starting(20.0)
    with display:
        display.say("Ray Tune: 3 trials")
        display.begin(stages[0])
        clock(60)
        display.refresh()
        display.end(stages[0], "failed", "it went wrong")
    assert written(display) == f"[1/28] {stages[0].title}: failed: it went wrong\n"


def test_a_loss_that_was_not_read_yet_is_not_shown(display: Display, clock):
    stage = next(s for s in display.plan.stages.values() if s.title == "MAE, seed 0")
    display.begin(stage)
    display.step(stage, Stepped(stage.key, 3, 40, 0, math.nan, 32.0))
    clock(15)
    display.refresh()
    assert "3/40 epoch 0 32 images/s, " in written(display)
