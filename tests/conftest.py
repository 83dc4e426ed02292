"""A full soak run (MAECT_SOAK=full) keeps what it found in docs/results/soak.json.

A test function is written once all its cases ran, in place of what the file said of it before; so
functions can run one by one, and those that were complete outlast an interruption.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from bench import environment
from bench.store.files import iso, write_json

#: test function -> how many cases ended how, and the seconds they took
ENDED: dict[str, Counter[str]] = defaultdict(Counter)


def function_of(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    ended = ENDED[function_of(report.nodeid)]
    ended["seconds"] += report.duration
    if report.when == "call" or not report.passed:  # a fixture that fails, a test that is skipped
        ended[report.outcome] += 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    outcome = yield
    name = function_of(item.nodeid)
    if nextitem is None or function_of(nextitem.nodeid) != name:
        marks = item.iter_markers("parametrize")
        if os.environ.get("MAECT_SOAK") == "full":
            keep(item.config, name, math.prod(len(mark.args[1]) for mark in marks))
    return outcome


def keep(config: pytest.Config, name: str, cases: int) -> None:
    """Write what became of a test function, unless some of its cases were left out."""
    ended = ENDED.pop(name)
    if sum(ended[outcome] for outcome in ("passed", "failed", "skipped")) < cases:
        return
    path = config.rootpath / "docs" / "results" / "soak.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[name] = {
        "cases": cases,
        "passed": ended["passed"],
        "failed": ended["failed"],
        "seconds": round(ended["seconds"], 1),
        "seed": os.environ.get("MAECT_SOAK_SEED", "0"),
        "date": iso(time.time()),
        **environment.commit(),
        "cpu": environment.processor()["cpu"],
        "versions": environment.versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(sorted(results.items())))
