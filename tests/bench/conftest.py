"""Fixtures of the suite runner's tests."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from bench_helpers import SMOKE, Bench, Done, run_bench, s3_environment, s3_server

from bench.cli import main
from bench.plan.planner import make_plan
from bench.plan.stage import Plan
from bench.store.store import Store
from bench.suite.load import load_suite


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """The command line in this process: for commands that start neither Ray nor torch."""

    def run(*arguments: object) -> Done:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    store = Store(tmp_path / "store")
    store.create()
    return store


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    """The plan of a suite over an empty store."""

    def plan(path: Path = SMOKE, *, store: Path | None = None, **options: object) -> Plan:
        suite = load_suite(path, **options)  # type: ignore[arg-type]
        return make_plan(suite, Store(store or tmp_path / "store"))

    return plan


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server on this machine."""
    with s3_server(tmp_path_factory.mktemp("s3") / "log.txt") as address:
        yield address


@pytest.fixture
def bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place in a bucket, for this process and those that it starts."""
    for name, value in s3_environment(s3, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    return f"s3://maect/{tmp_path.parent.name}-{tmp_path.name}"


@dataclass(frozen=True)
class Finished:
    """A store with a finished run of smoke.yaml."""

    store: Path
    done: Done


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One whole run of suites/smoke.yaml; tests read it and change copies only."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all processes of this test run
    store, told = folder / "smoke" / "store", folder / "smoke.json"
    with (folder / "smoke.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            told.write_text(json.dumps(asdict(run_bench("run", SMOKE, "--store", store))))
    return Finished(store, Done(**json.loads(told.read_text())))
