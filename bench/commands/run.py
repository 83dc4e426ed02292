"""`run` and `sweep`: run what a suite lacks, then print its table."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from contextlib import suppress

from bench.commands import common
from bench.commands.data import prepare_data
from bench.environment import use
from bench.errors import OK, STAGE_FAILED, MachineError, UserError
from bench.store.place import open_store
from bench.suite.schema import Suite


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run` and `sweep`."""
    common.suite_arguments(parser)
    add = parser.add_argument
    workers = "workers that train a stage together (default 1; 0: in this process, no Ray worker)"
    add("--workers", type=common.count_from(0), default=1, metavar="N", help=workers)
    address = "join a running Ray cluster (default: $RAY_ADDRESS, else a Ray of this run's own)"
    add("--address", default=os.environ.get("RAY_ADDRESS"), metavar="A", help=address)
    wait = "minutes to wait for a node with room, also at the start (default: 5, none at the start)"
    add("--wait", type=common.amount_of("minutes"), metavar="M", help=wait)
    cpu = "compute on the CPU and hold no GPU, also where there are some"
    add("--cpu", action="store_true", help=cpu)
    quiet = "print faults, the final table and the sentence on the result alone"
    add("--quiet", action="store_true", help=quiet)
    hours = common.amount_of("hours")
    for kind, device in (("gpu", "GPU"), ("cpu", "core")):
        limit = f"stop at H {device}-hours ({device}s held × wall time); the same command goes on"
        add(f"--max-{kind}-hours", type=hours, metavar="H", help=limit)


def _check_search(options: argparse.Namespace, suite: Suite, tune: bool) -> None:
    """Raise `UserError` where `run` and `sweep` are mixed up, or a search lacks its package."""
    if (suite.search is not None) != tune:
        declares, other = ("no search", "run") if tune else ("a search", "sweep")
        raise UserError(
            f"this suite declares {declares}; run: python -m bench {other} {options.suite}",
            file=options.suite,
        )
    chosen = suite.search is not None and suite.search.method == "optuna"
    if chosen and importlib.util.find_spec("optuna") is None:
        raise UserError(
            "method 'optuna' needs a package that is not here: pip install 'maect-bench[optuna]'",
            file=options.suite,
        )


def run(options: argparse.Namespace) -> int:
    """Run a suite, or with `sweep` the search that it declares. Return the exit code."""
    from bench.commands.plan import left, plan_summary
    from bench.plan.planner import make_plan
    from bench.plan.status import assess_all
    from bench.report.write import write_report
    from bench.run import recovery
    from bench.run.driver import Interrupted, RunOptions, execute

    tune = options.name == "sweep"
    suite = common.load(options)
    _check_search(options, suite, tune)
    use(suite.isa)
    if prepare_data(suite):
        suite = common.load(options)
    store = open_store(options.store)
    plan = make_plan(suite, None, keep_stale=options.keep_stale, only=options.only)
    if plan.unresolved:
        raise UserError(f"the data of profile '{suite.profile}' are not here: {plan.unresolved}")
    store.create()

    def show(*, final: bool = False) -> None:
        told = "text" if not options.quiet else "table" if final else "nothing"
        write_report(options.command_line, (plan, store), show=told)

    with store.leases.driving():
        store.close_runs()
        for line in recovery.take_over(plan, store):
            print(line)
        if not options.quiet:
            print(plan_summary(plan))
        hours = {"gpu": options.max_gpu_hours, "cpu": options.max_cpu_hours}
        run_options = RunOptions(
            workers=options.workers,
            address=options.address,
            cpu=options.cpu,
            wait_s=options.wait and 60 * options.wait,
            quiet=options.quiet,
            command=options.command_line,
            max_hours={kind: limit for kind, limit in hours.items() if limit is not None},
            on_seed=lambda: None if tune else show(),
        )
        try:
            failed = execute(plan, store, run_options)
        except (Interrupted, MachineError) as stopped:
            with suppress(MachineError):  # the store itself may be what gave way
                assess_all(plan, store)  # anew: a stage may have ended while the run stopped
            told = f"{stopped}: {left(plan)}. To continue: {options.command_line}"
            print(f"\n{told}", file=sys.stderr)
            return stopped.code if isinstance(stopped, Interrupted) else STAGE_FAILED
        show(final=True)
    for key, reason in failed.items():
        print(f"failed: {plan.stages[key].title}: {reason}", file=sys.stderr)
    return STAGE_FAILED if failed else OK
