"""Worker after worker and driver after driver killed: the end is that of a run left alone."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from bench_helpers import (
    SMOKE,
    artifacts,
    completed,
    fill_store,
    gone,
    measured,
    printed_metrics,
    records,
    run_bench,
    started,
    wait_for,
)

pytestmark = pytest.mark.slow

DRIVERS = 10 if os.environ.get("MAECT_SOAK") == "full" else 2
#: killed under each driver before it goes itself; a stage may lose three under one driver
WORKERS = 2
PATIENCE_S = 6.0
CHAIN = ("mae", "head", "tune")
CROSS = SMOKE.with_name("sweep_cross.yaml")


@dataclass
class Kills:
    """What was killed in one store, and what was seen to run there."""

    store: Path
    rng: random.Random
    #: (key, attempt) -> kind
    workers: dict[tuple[str, int], str] = field(default_factory=dict)
    drivers: int = 0
    seen: set[tuple[str, int]] = field(default_factory=set)
    below: list[psutil.Process] = field(default_factory=list)

    def running(self) -> dict[tuple[str, int], tuple[int, str]]:
        """Attempts that somebody works on: their process and kind."""
        found = {}
        for path in self.store.glob("stages/*/attempts/*/started.json"):
            if path.with_name("record.json").exists():
                continue
            start = json.loads(path.read_text())
            attempt = start["key"], start["attempt"]
            self.seen.add(attempt)
            if attempt not in self.workers and _works(start["pid"]):
                found[attempt] = start["pid"], start["kind"]
        return found

    def kill_worker(self, process: subprocess.Popen[str]) -> bool:
        """End a worker in the middle of a stage; False if the run ended before.

        For some seconds it waits for a kind of stage that was spared so far.
        """
        times, patience = Counter(self.workers.values()), None
        spared = min(times[kind] for kind in CHAIN)
        while process.poll() is None:
            if self.running():
                patience = patience or time.monotonic() + PATIENCE_S
                time.sleep(self.rng.uniform(0.0, 0.5))
            for attempt, (pid, kind) in self.running().items():
                if times[kind] > spared and time.monotonic() < (patience or 0.0):
                    continue
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.workers[attempt] = kind
                    return True
            time.sleep(0.02)
        return False

    def kill_driver(self, process: subprocess.Popen[str]) -> bool:
        end = time.monotonic() + self.rng.uniform(0.0, 4.0)
        while time.monotonic() < end:
            self.running()
            time.sleep(0.05)
        if process.poll() is not None:
            return False
        self.below += psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        self.drivers += 1
        return True


def _works(pid: int) -> bool:
    with suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline()).startswith("ray::")
    return False


def test_whatever_is_killed_the_end_is_the_same(smoke, tmp_path: Path):
    """4 workers and 2 drivers, the next driver started at once, while orphans may still live.

    With MAECT_SOAK=full 20 and 10.
    """
    rng = random.Random(20)
    rounds: list[Kills] = []
    while sum(kills.drivers for kills in rounds) < DRIVERS:
        kills = Kills(tmp_path / f"store-{len(rounds)}", rng)
        rounds.append(kills)
        arguments = ("run", SMOKE, "--store", kills.store)
        ended = False
        while not ended and sum(k.drivers for k in rounds) < DRIVERS:
            with started(*arguments) as process:
                done = [kills.kill_worker(process) for _ in range(WORKERS)]
                ended = not (all(done) and kills.kill_driver(process))
                assert process.poll() in (None, 0, -signal.SIGKILL), process.communicate()
        last = run_bench(*arguments)
        assert last.code == 0, last
        assert printed_metrics(last.out) == printed_metrics(smoke.done.out) != {}
        print(f"killed: {Counter(kills.workers.values())}, {kills.drivers} drivers")
        _as_if_left_alone(kills, smoke.store)
    kinds = Counter(kind for kills in rounds for kind in kills.workers.values())
    assert kinds.total() >= DRIVERS * WORKERS
    assert len(kinds) >= 2


def _as_if_left_alone(kills: Kills, alone: Path) -> None:
    assert artifacts(kills.store) == artifacts(alone)
    assert measured(kills.store) == measured(alone)
    attempts = records(kills.store)
    assert attempts.keys() == records(alone).keys()
    for key, several in attempts.items():
        # one result a stage, whatever else was tried on record
        assert [a["status"] for a in several] == ["lost"] * (len(several) - 1) + ["complete"]
        assert all(a["cost"]["wall_s"] >= 0 for a in several)
        assert all(re.search("worker died|killed", a["error"]["message"]) for a in several[:-1])
        folder = kills.store / "stages" / key
        begun = {int(p.parent.name) for p in folder.glob("attempts/*/started.json")}
        assert begun == {a["attempt"] for a in several}
        assert not (folder / "checkpoints").exists()
    status = {(a["key"], a["attempt"]): a["status"] for tries in attempts.values() for a in tries}
    assert kills.seen <= status.keys()
    # a worker may have ended its stage between the look at it and the shot
    survived = [attempt for attempt in kills.workers if status[attempt] == "complete"]
    assert len(survived) <= len(kills.workers) // 4
    runs = Counter(json.loads(p.read_text())["status"] for p in kills.store.glob("runs/*.json"))
    # a driver killed as it ended leaves the next one nothing to run
    assert runs["complete"] <= 1
    assert runs.total() - runs["complete"] == runs["lost"] <= kills.drivers
    assert gone(kills.below, 90) == []


def test_a_crossed_search_killed_half_way_ends_with_the_same_cells_and_runs_once(tmp_path: Path):
    killed = tmp_path / "killed"
    arguments = ("sweep", CROSS, "--profile", "tiny", "--seeds", "1", "--store", killed)
    alone = fill_store(tmp_path / "alone", suite=CROSS, profile="tiny").root
    with started(*arguments) as process:
        wait_for(lambda: len(list(killed.glob("stages/*/attempts/*/record.json"))) >= 17, process)
        below = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    # an orphan may still end its stage
    assert gone([p for p in below if not (p.is_running() and p.name().endswith("Agent"))]) == []
    before = completed(killed)
    assert len(before) < 34
    again = run_bench(*arguments)
    assert again.code == 0, again
    assert f"{len(before)} cached" in again.out
    assert "Ray Tune: " in again.out
    assert {key: record["attempt"] for key, record in before.items()}.items() <= {
        key: record["attempt"] for key, record in completed(killed).items()
    }.items()
    assert artifacts(killed) == artifacts(alone)
    assert measured(killed) == measured(alone)
    assert gone(below, 90) == []
    kinds = Counter(record["kind"] for record in completed(killed).values())
    assert kinds == {"mae": 2, "head": 8, "tune": 8, "features": 8, "knn": 8}
    html = (killed / "reports" / "sweep_cross-tiny.html").read_text(encoding="utf-8")
    assert "queue_size=128" in html
    ended = records(killed)
    once = run_bench(*arguments)
    assert once.code == 0, once
    assert "34 cached, 0 to run" in once.out
    assert "Ray" not in once.out.split("\n\n")[0]
    assert records(killed) == ended
