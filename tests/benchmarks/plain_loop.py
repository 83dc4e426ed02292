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

from bench.plan.planner import make_plan
from bench.plan.stage import Stage
from bench.plan.status import assess
from bench.run.scheduler import RunState
from bench.run.worker import run_stage
from bench.store.store import Store
from bench.suite.load import load_suite


def run(stage: Stage, store: Store) -> None:
    """One stage, in a process of the pool; nobody watches."""
    run_stage(stage, store, "plain-loop", lambda event: None)


def loop(suite: Path, store: Store, processes: int, seeds: int | None) -> float:
    """Run all that the store lacks. Return the seconds of wall time."""
    began = time.monotonic()
    store.create()
    state = RunState(make_plan(load_suite(suite, seeds=seeds), store).stages)
    going: dict[Future[None], str] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        while not state.finished:
            ready = [stage for stage in state.ready() if stage.key not in going.values()]
            for stage in ready[: processes - len(going)]:
                going[pool.submit(run, stage, store)] = stage.key
            for ended in wait(going, return_when=FIRST_COMPLETED).done:
                ended.result()
                key = going.pop(ended)
                assess(state.stages[key], store)
                state.complete(key)
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
