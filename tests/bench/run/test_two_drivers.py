"""Two runs beside each other on one store, one of them killed: each stage once, nothing left."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from bench_helpers import HASTY, SMOKE, artifacts, started, wait_for

from bench.store import bucket_leases
from bench.store.place import open_store
from bench.store.store import Store

pytestmark = pytest.mark.slow

#: of each kind of store
ROUNDS = 20 if os.environ.get("MAECT_SOAK") == "full" else 1
#: one run's stages, and another's: they share the MAE
FIRST, SECOND = "MAE-CT", "MAE*"


def statuses(store: Store) -> dict[str, list[str]]:
    """Title of a stage -> how its attempts ended."""
    states = [store.state(key) for key in store.stage_keys()]
    return {s.attempts[0].name: [a.status for a in s.attempts] for s in states if s.attempts}


def both_at_work(place: str) -> bool:
    """Whether two runs are there, and one of them has begun a stage."""
    store = open_store(place)
    return len(store.leases.drivers()) == 2 and bool(statuses(store))


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_two_runs_share_a_store_and_one_is_killed(
    kind: str,
    smoke,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """In a bucket as from two machines, each with a copy of its own.

    One round of each; with MAECT_SOAK=full twenty.
    """
    rng = random.Random(kind)
    url = request.getfixturevalue("bucket") if kind == "bucket" else None
    (tmp_path / "sitecustomize.py").write_text(HASTY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    for turn in range(ROUNDS):
        place = f"{url}/{turn}" if url else str(tmp_path / f"store-{turn}")
        line = ("run", SMOKE, "--seeds", 1, "--store", place, "--only")
        rows = [FIRST, SECOND] if rng.random() < 0.5 else [SECOND, FIRST]
        monkeypatch.setenv("MAECT_CACHE", str(tmp_path / f"victim-{turn}"))
        with started(*line, rows[0]) as victim:
            monkeypatch.setenv("MAECT_CACHE", str(tmp_path / f"other-{turn}"))
            with started(*line, rows[1]) as survivor:
                # a look takes a bucket some ten requests, of a server on the same cores
                wait_for(lambda: both_at_work(place), victim, survivor, every_s=0.3)  # noqa: B023
                time.sleep(rng.uniform(0.0, 12.0))
                below = psutil.Process(victim.pid).children(recursive=True)
                alive = victim.poll() is None
                victim.send_signal(signal.SIGKILL)
                if url:  # its whole machine
                    for process in below:
                        with suppress(psutil.NoSuchProcess):
                            process.kill()
                out, err = survivor.communicate(timeout=300)
        assert survivor.returncode == 0, (out, err)
        found = statuses(open_store(place))
        print(f"{kind} {turn}: {rows[0]} killed: {alive}; {found}")
        ends = {tuple(ends) for name, ends in found.items() if ends[-1] == "complete"}
        assert all(several.count("complete") == 1 for several in ends), found
        unfinished = [name for name, ends in found.items() if ends[-1] != "complete"]
        assert len(unfinished) <= 2, found  # what only the killed run wanted
        store = open_store(place)
        wanted = artifacts(store.root)
        assert wanted and wanted.items() <= artifacts(smoke.store).items()
        if url:  # of a run that was killed within five seconds of the other's end the next is told
            monkeypatch.setattr(bucket_leases, "LAPSES_S", 5.0)
            time.sleep(5.0)
        with store.leases.driving():
            pass
        assert store.leases._names("leases") + store.leases._names("drivers") == []
