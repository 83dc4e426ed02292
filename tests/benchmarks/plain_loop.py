"""What Ray costs: a suite's stages in a plain loop of processes, to compare with `bench run`.

    python tests/benchmarks/plain_loop.py suites/paper_table.yaml --store plain
    python -m bench run suites/paper_table.yaml --store ray

Both run the same stages with the same threads on as many processes, take the same order and leave
the same artifacts. The loop starts its processes once; it keeps no watch over them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from bench.plan.planner import Stage, make_plan
from bench.run.scheduler import Scheduler
from bench.run.worker import Task, run_task
from bench.store.store import Store
from bench.suite.load import load_suite


def _silent(key: str, event: dict[str, object]) -> None:
    """Nobody watches."""


def run(task: Task, root: Path) -> None:
    """One stage, in a process of the pool."""
    run_task(task, root, "plain-loop", _silent)


def loop(suite: Path, store: Store, processes: int, seeds: int | None) -> float:
    """Run all that the store lacks; returns seconds of wall time."""
    began = time.monotonic()
    store.create()
    plan = make_plan(load_suite(suite, seeds=seeds), store)
    scheduler = Scheduler(plan, store)
    going: dict[Future[None], Stage] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        while not scheduler.finished:
            for stage in scheduler.ready()[: processes - len(going)]:
                scheduler.begin(stage)
                going[pool.submit(run, Task.of(stage), store.root)] = stage
            for ended in wait(going, return_when=FIRST_COMPLETED).done:
                ended.result()
                scheduler.complete(going.pop(ended))
    return time.monotonic() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int)
    options = parser.parse_args()
    seconds = loop(options.suite, Store(options.store), options.processes, options.seeds)
    print(f"{seconds:.1f} s on {options.processes} processes")
