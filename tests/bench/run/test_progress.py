"""What a run says of its progress: how long Ray takes to start, how long a stage still trains."""

from __future__ import annotations

import io
import math
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


def written(display: Display) -> str:
    file = display.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_start_of_ray_shows_its_seconds(display: Display):
    for tenths in range(0, 250, 2):
        display.starting(tenths / 10)
    lines = written(display).splitlines()
    assert lines == ["starting Ray ...", "starting Ray ... 10 s", "starting Ray ... 20 s"]


def test_a_terminal_shows_them_all_along(plan_of: Callable[..., Plan]):
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=100)
    display = Display(plan_of(seeds=1), lambda: None, console)
    for seconds in (0.0, 0.2, 1.2, 3.0):
        display.starting(seconds)
    assert written(display).endswith("starting Ray ... 1 s\rstarting Ray ... 3 s\r")


def test_what_is_left_of_a_resumed_stage_goes_by_its_pace(display: Display):
    """Not by the steps that another run took: those passed in no time."""
    stage = next(s for s in display.plan.stages.values() if s.title == "MAE, seed 0")
    assert (stage.steps, stage.settings["train"]["batch_size"]) == (40, 64)
    display.begin(stage)
    assert display.training == {}
    display.step(stage, Stepped(stage.key, 30, 40, 1, 0.5, 32.0))
    assert display.training == {stage.key: pytest.approx(10 * 64 / 32)}
    assert "30/40 epoch 1 loss 0.5000 32 images/s, 20.0 s left" in written(display)


def test_a_loss_that_was_not_read_yet_is_not_shown(display: Display):
    stage = next(s for s in display.plan.stages.values() if s.title == "MAE, seed 0")
    display.begin(stage)
    display.step(stage, Stepped(stage.key, 3, 40, 0, math.nan, 32.0))
    assert "3/40 epoch 0 32 images/s, " in written(display)
