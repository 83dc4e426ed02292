"""The gate: `pytest --benchmark`. Speed, memory and quality, each against committed bounds.

- Speed: CPU time of each case of cases.py as a ratio to its reference, in turn with it. A case is
  too slow where the lower end of the 95 % bootstrap interval of the median ratio is above its
  bound: one that is above by chance passes.
- `--benchmark-base REV`: the same case by that commit's code, in pairs of processes in turn: three;
  while the interval has the bound in it, one more, and as many rounds again in each.
- Memory: the peak of each case, and training that holds no more after 500 steps than before.
- Quality: smoke.yaml's losses and metrics against the golden ones (golden.py).

thresholds.yaml has the bounds, and where they come from.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import cases
import golden
import numpy as np
import pytest
import yaml
from serve import Server, Unable

ROOT = Path(__file__).parents[2]
THRESHOLDS = yaml.safe_load(Path(__file__).with_name("thresholds.yaml").read_text())
#: seconds that the rounds of a case take, about, and their least and largest number
BUDGET_S, LEAST, MOST = 2.0, 7, 40
#: pairs of processes with the base: at first, and at the most
PAIRS, MOST_PAIRS = 3, 8
STEPS, SETTLED = 500, 100
DRAWS = 2000
#: measured by wall time, too coarse for pairs of processes
WALL = {"ray-run"}
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


def clock(name: str) -> Callable[[], float]:
    """Return what a case is timed by."""
    return time.perf_counter if name in WALL else time.process_time


def interval(ratios: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the median ratio, and its 95 % interval by a bootstrap.

    `ratios` has the rounds of each pair of processes, which may differ in number: pairs are drawn,
    then rounds of each.
    """
    draws = np.random.default_rng(0)
    each = [np.asarray(pair) for pair in ratios]
    drawn = np.stack([np.median(draws.choice(pair, (DRAWS, len(pair))), axis=1) for pair in each])
    pairs = draws.integers(0, len(each), (len(each), DRAWS))
    medians = np.median(drawn[pairs, np.arange(DRAWS)], axis=0)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(np.median([np.median(pair) for pair in each])), float(low), float(high)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    """Print a line, whatever pytest captures."""

    def said(line: str) -> None:
        with capsys.disabled():
            print(f"\n  {line}", end=" ")

    return said


# ---------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.benchmark(timer=clock(name), group=name.split("-")[0]))
        for name in cases.CASES
    ],
)
def test_speed(name: str, benchmark: Any, say: Any, tmp_path: Path) -> None:
    case, bound, now = (
        cases.build(name, tmp_path),
        THRESHOLDS["cases"][name]["reference"],
        clock(name),
    )
    theirs: list[float] = []

    def reference() -> None:
        began = now()
        case.reference()
        theirs.append(now() - began)

    rounds = 2
    if name not in WALL:
        began = now()
        case.ours()
        reference()
        rounds = min(MOST, max(LEAST, round(BUDGET_S / (now() - began))))
    benchmark.pedantic(case.ours, setup=reference, rounds=rounds)
    ours = benchmark.stats.stats.data
    found, low, high = interval([[a / b for a, b in zip(ours, theirs[-rounds:], strict=True)]])
    if name in WALL:  # too few for an interval
        found = low = min(ours) / min(theirs)
    benchmark.extra_info |= {"ratio": found, "low": low, "high": high, "bound": bound}
    say(f"{name}: {found:.2f} times its reference (bound {bound:.2f})")
    assert low <= bound, (
        f"{name} takes {found:.2f} times its reference, at least {low:.2f} (bound {bound:.2f}): "
        "something has become slower. `--benchmark-base REV` compares with another commit's code"
    )


@pytest.fixture(scope="module")
def pairs(benchmark_base: Path) -> Iterator[Callable[[int], tuple[Server, Server]]]:
    """Pairs of processes, with the base's code and with the code here; started when asked for."""
    started: list[tuple[Server, Server]] = []

    def pair(number: int) -> tuple[Server, Server]:
        while number >= len(started):
            started.append((Server(benchmark_base), Server(ROOT)))
        return started[number]

    yield pair
    for server in (server for pair in started for server in pair):
        server.close()


def begin(pair: tuple[Server, Server], name: str, ends: ExitStack) -> float:
    """Build a case in both processes of a pair. Return the seconds that a round of both takes."""
    for side, server in enumerate(pair):
        try:
            server.ask("rounds", name)
        except Unable as error:
            if side:
                raise
            pytest.skip(f"the base cannot run it: {error}")
        ends.callback(server.ask)
    return float(pair[0].ask(1) + pair[1].ask(1))


def in_turn(pair: tuple[Server, Server], rounds: int) -> list[float]:
    """Return the ratio of each round: the time here to the base's."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for side in (0, 1) if number % 2 else (1, 0):
            taken[side].append(pair[side].ask(1))
    return [here / there for there, here in zip(*taken, strict=True)]


@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in WALL])
def test_speed_against_base(name: str, pairs: Any, say: Any) -> None:
    own = THRESHOLDS["cases"][name].get("base", THRESHOLDS["base"])
    ratios: list[list[float]] = [[] for _ in range(PAIRS)]
    with ExitStack() as ends:
        longest = max(begin(pairs(number), name, ends) for number in range(PAIRS))
        rounds = min(MOST, max(LEAST, round(BUDGET_S / PAIRS / longest)))
        while True:
            for number, found in enumerate(ratios):
                found += in_turn(pairs(number), rounds)
            middle, low, high = interval(ratios)
            if not low <= own <= high or len(ratios) == MOST_PAIRS:
                break
            begin(pairs(len(ratios)), name, ends)
            ratios.append([])
    by_pair = ", ".join(f"{median(pair):.2f}" for pair in ratios)
    say(f"{name}: {middle:.3f} times the base ({low:.3f} to {high:.3f}; bound {own:.2f})")
    assert low <= own, (
        f"{name} takes {middle:.2f} times as long as at the base, 95 % interval {low:.2f} to "
        f"{high:.2f}, bound {own:.2f}; by pair of processes {by_pair}"
    )
    if high > own:
        warnings.warn(f"{name}: too noisy to tell, {low:.2f} to {high:.2f}", stacklevel=1)


# --------------------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(ROOT) as found:
        yield found


@pytest.fixture(scope="module")
def base_server(benchmark_base: Path) -> Iterator[Server]:
    with Server(benchmark_base) as found:
        yield found


@needs_linux
@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in WALL])
def test_memory_peak(name: str, server: Server, say: Any) -> None:
    bound = THRESHOLDS["cases"][name]["peak_mib"]
    found = server.ask("peak", name)
    say(f"{name}: {found:.0f} MiB at the most (bound {bound})")
    assert found <= bound, f"{name} holds {found:.0f} MiB at the most; its bound is {bound} MiB"


@needs_linux
@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in WALL])
def test_memory_against_base(name: str, server: Server, base_server: Server, say: Any) -> None:
    factor, more = THRESHOLDS["memory_base"]
    try:
        there = base_server.ask("peak", name)
    except Unable as error:
        pytest.skip(f"the base cannot run it: {error}")
    found, bound = server.ask("peak", name), factor * there + more
    say(f"{name}: {found:.0f} MiB, the base {there:.0f} (bound {bound:.0f})")
    assert found <= bound, f"{name} holds {found:.0f} MiB at the most, the base {there:.0f}"


@needs_linux
@pytest.mark.parametrize("kind", cases.TRAININGS)
def test_memory_is_flat(kind: str, server: Server, say: Any) -> None:
    bound = THRESHOLDS["growth_mib"]
    found = server.ask("growth", kind, STEPS, SETTLED)
    say(f"{kind}: {found:+.1f} MiB from step {SETTLED} to {STEPS} (bound {bound})")
    assert found <= bound, (
        f"training '{kind}' holds {found:.0f} MiB more after {STEPS} steps than after {SETTLED} "
        f"(bound {bound}): something is kept of each step"
    )


# -------------------------------------------------------------------------------------- quality


def test_quality(say: Any, tmp_path: Path) -> None:
    found = golden.measure(tmp_path / "store", golden.KEPT)
    verdict = golden.judge(found, golden.read())
    how = "bit for bit" if verdict.exact else "within seed noise, another kind of environment"
    say(f"{verdict.compared} losses and metrics compared {how}: {len(verdict.fails)} differ")
    for line in verdict.warns:
        warnings.warn(f"suspiciously better: {line}", stacklevel=1)
    told = "\n".join(verdict.fails[:8])
    assert not verdict.fails, (
        f"{len(verdict.fails)} of {verdict.compared} differ, {how}. If that is meant: make golden"
        f"\n{told}"
    )
