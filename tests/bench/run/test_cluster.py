"""Joining a running Ray cluster, and not joining one that is merely noted somewhere."""

from __future__ import annotations

import json
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from bench_helpers import (
    SMOKE,
    Bench,
    artifacts,
    completed,
    free_port,
    ray_processes,
    records,
    run_bench,
    running_cluster,
    started,
    wait_for,
)

from bench.errors import MachineError, UserError
from bench.run import driver
from bench.run.scheduler import Group, LoseGroup, Say, decide
from bench.store.store import Store


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:{closed}", "ray start --head"),
        ("ray://127.0.0.1:10001", "start it on a node of the cluster"),
        ("127.0.0.1:port", "no Ray cluster answers"),
        ("127.0.0.1:99999999", "no Ray cluster answers"),
        ("http://127.0.0.1:8265", "with --address auto or the HOST:6379"),
    ],
)
def test_an_address_where_no_cluster_answers(address: str, said: str, bench: Bench, tmp_path: Path):
    address = address.format(closed=free_port())
    done = bench("run", SMOKE, "--store", tmp_path / "store", "--address", address)
    assert (done.code, said in done.err, address in done.err) == (2, True, True), done


def test_an_address_left_over_in_the_environment_is_named(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    done = bench("run", SMOKE, "--store", tmp_path / "store")
    assert done.code == 2, done
    assert "(RAY_ADDRESS names it; unset it for a Ray of this run's own)" in done.err


LONG = "a folder whose name is far too long for the sockets of Ray, which have a limit of 107 bytes"


@pytest.mark.parametrize(
    ("variables", "chosen"),
    [
        ({}, "/tmp"),
        ({"TMPDIR": "{here}"}, "{here}"),
        ({"RAY_TMPDIR": "{here}", "TMPDIR": "/nowhere"}, "{here}"),
        ({"TMPDIR": f"{{here}}/{LONG}"}, "/tmp"),
        ({"TMPDIR": "{here}/missing"}, "/tmp"),
        ({"TMPDIR": ""}, "/tmp"),
    ],
)
def test_ray_gets_a_folder_that_is_short_enough(
    variables: dict[str, str], chosen: str, monkeypatch: pytest.MonkeyPatch
):
    from bench.run import cluster

    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as here:
        (Path(here) / LONG).mkdir()
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(here=here))
        found = Path(cluster._folder())
        assert found == Path(chosen.format(here=here), f"ray-{os.getuid()}", "ray")
        assert found.parent.stat().st_mode & 0o777 == 0o700
        monkeypatch.setattr(cluster, "LONGEST", cluster.SOCKET)
        with pytest.raises(UserError, match="set RAY_TMPDIR"):
            cluster._folder()


def test_nobody_else_reads_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from bench.run import cluster

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "to be put back")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    kept = tmp_path / ".ray" / "auth_token"
    kept.parent.mkdir()
    kept.write_text("secret")
    kept.chmod(0o644)
    cluster._guard_token(own=False)
    assert kept.stat().st_mode & 0o777 == 0o600
    assert "RAY_AUTH_TOKEN" not in os.environ
    cluster._guard_token(own=True)
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def refused() -> None:
    raise Exception("The current node timed out during startup.")


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (refused, "Ray could not start on this machine: The current node timed out"),
        (lambda: time.sleep(4), "Ray could not start on this machine: no answer within 1 s"),
    ],
    ids=["refused", "no answer"],
)
def test_ray_that_cannot_start(start, told, bench, tmp_path, monkeypatch: pytest.MonkeyPatch):
    from bench.run import cluster

    monkeypatch.setattr(cluster, "START_S", 1.0)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "this test's")
    tried = []
    monkeypatch.setattr(cluster.ray, "init", lambda *_, **__: (tried.append(1), start()))
    done = bench("run", SMOKE, "--store", tmp_path / "store", "--seeds", "1")
    assert (done.code, told in done.err) == (1, True), done
    assert len(tried) == (2 if start is refused else 1)
    assert "0 of 28 stages are complete and kept" in done.err
    assert "To continue: python -m bench run" in done.err
    (run,) = Store(tmp_path / "store").runs()
    assert run.status == "failed"


def quiet_cluster(monkeypatch: pytest.MonkeyPatch, answer: Exception) -> Any:
    """A cluster that was never started, whose mailbox answers with an exception."""
    from bench.run import cluster

    def get(*_: object, **__: object) -> None:
        raise answer

    monkeypatch.setattr(cluster.ray, "get", get)
    made = cluster.Cluster.__new__(cluster.Cluster)
    made._parts, made._looked, made._asked, made._silent_s = {}, 0.0, object(), 0.0
    made._joined, made._found_room = False, 1
    return made


def test_a_mailbox_that_does_not_answer(monkeypatch: pytest.MonkeyPatch):
    from ray.exceptions import GetTimeoutError

    cluster = quiet_cluster(monkeypatch, GetTimeoutError())
    assert cluster.events(0.1) is None
    cluster._silent_s = 61.0
    with pytest.raises(MachineError, match="has not answered for 60 s"):
        cluster.events(0.1)


def test_a_mailbox_that_died(monkeypatch: pytest.MonkeyPatch):
    from ray.exceptions import ActorDiedError

    with pytest.raises(MachineError, match="mailbox process has died"):
        quiet_cluster(monkeypatch, ActorDiedError()).events(0.1)


def test_a_part_of_ray_where_nobody_listens_any_more(monkeypatch: pytest.MonkeyPatch):
    cluster = quiet_cluster(monkeypatch, AssertionError())
    cluster._parts = {"head process (GCS)": ("127.0.0.1", free_port())}
    with pytest.raises(MachineError, match=r"Ray's head process \(GCS\) has died"):
        cluster.events(0.1)


def test_time_that_the_run_stood_still_makes_nobody_silent(plan_of, tmp_path, monkeypatch):
    """Ctrl-Z, or a driver that checks a large file."""
    plan, now = plan_of(seeds=1), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def events(patience_s: float) -> list[Any]:
        now[0] += 3600.0
        return []

    cluster = SimpleNamespace(events=events)
    monkeypatch.setattr("bench.run.cluster.Cluster", lambda *_: cluster)
    run = SimpleNamespace(id="run")
    steered = driver._Driver(plan, Store(tmp_path / "store"), driver.RunOptions(), run)
    steered.state.groups[1] = Group(1, "working", heard={"it": 0.0})
    steered._listen()
    actions = decide(steered.state, steered._clock)
    assert not any(isinstance(action, Say | LoseGroup) for action in actions)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A Ray cluster of one node with two cores that asks for a token; its port."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with running_cluster("--include-dashboard=false") as port:
        yield port


def trains(stage: Path) -> bool:
    """Whether somebody is at a stage that trains."""
    attempts = list(stage.glob("attempts/*/started.json"))
    at_it = [a for a in attempts if not a.with_name("record.json").exists()]
    return any(json.loads(a.read_text())["kind"] == "mae" for a in at_it)


@pytest.mark.slow
def test_nodes_are_waited_for(smoke, tmp_path: Path):
    """A head without cores: without a node, and with one that is lost in training and replaced."""
    from ray.cluster_utils import Cluster

    store = tmp_path / "store"
    rows = ("--seeds", "1", "--only", "MAE, compute*")
    handler = signal.getsignal(signal.SIGTERM)
    there = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    signal.signal(signal.SIGTERM, handler)  # Ray set its own
    line = ("run", SMOKE, *rows, "--store", store, "--address", there.address)
    try:
        done = run_bench(*line, "--wait", "0.2")
        assert done.code == 1, done
        assert "waits for a node: Ray has room for 0 in all (starting, 1" in done.out
        assert "no worker group could start within 12 s" in done.err
        node = there.add_node(num_cpus=1)
        with started(*line) as run:
            wait_for(lambda: any(map(trains, store.glob("stages/*"))), run)
            there.remove_node(node, allow_graceful=False)
            lost = time.monotonic()
            assert any("Ray has room for 0 in all" in text for text in run.stdout or ())
            assert time.monotonic() - lost < 30  # ten seconds, and what Ray takes to notice
            there.add_node(num_cpus=1)
            _, err = run.communicate(timeout=240)
        assert run.returncode == 0, err
        assert artifacts(store).items() <= artifacts(smoke.store).items()
        assert len(completed(store)) == 4
        assert [r["status"] for r in chain.from_iterable(records(store).values())].count(
            "lost"
        ) == 1
    finally:
        there.shutdown()


@pytest.mark.slow
def test_a_running_cluster_is_joined_only_when_asked(smoke, cluster: int, tmp_path: Path):
    """Ray's own default would be to join whatever cluster is running on the machine."""
    joined, rows = tmp_path / "joined", ("--seeds", "1", "--only", "MAE-CT")
    with started("run", SMOKE, *rows, "--store", tmp_path / "alone") as run:
        wait_for(lambda: ray_processes(psutil.Process(run.pid)), run)
    done = run_bench("run", SMOKE, *rows, "--store", joined, "--address", f"127.0.0.1:{cluster}")
    assert done.code == 0, done
    assert artifacts(joined).items() <= artifacts(smoke.store).items()
    again = json.loads(run_bench("plan", SMOKE, *rows, "--store", joined, "--json").out)
    assert {stage["status"] for stage in again["stages"]} == {"cached"}
