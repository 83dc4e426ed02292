"""Running a plan: the driver's loop between scheduler, store and Ray."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from bench import environment
from bench.errors import UserError
from bench.plan import estimate, status
from bench.plan.stage import Plan, Stage
from bench.plan.status import assess
from bench.run import explore, recovery
from bench.run.budget import Spent
from bench.run.progress import Display
from bench.run.scheduler import Scheduler
from bench.run.worker import Task
from bench.store.store import Store, iso
from maect.settings import ModelSettings

#: between two looks: at least this, and this and more where nothing moves
LOOP_S, QUIET_S = 0.1, 0.8
#: between two looks at what has been spent of a budget
BUDGET_S = 1.0
#: evaluations of stored features for which a worker group is started
SHORT_A_GROUP = 8
#: how long the worker groups may take to end once there is nothing more to do
JOIN_S = 60.0


@dataclass(frozen=True)
class RunOptions:
    workers: int = 1
    address: str | None = None
    keep_stale: bool = False
    command: str = ""
    #: run through Ray Tune the rows that a search made
    tune: bool = False
    #: device-hours that the run may spend, by kind: "gpu", "cpu"
    max_hours: dict[str, float] = field(default_factory=dict)


class Interrupted(Exception):
    """The user pressed Ctrl-C, or a budget is spent; everything complete is in the store.

    Its text says which.
    """


def execute(plan: Plan, store: Store, options: RunOptions) -> dict[str, str]:
    """Run what the plan lacks; returns the failed stages with their reasons.

    With nothing to run it starts no Ray and imports no torch. Raises `Interrupted` after Ctrl-C and
    when the budget is spent.
    """
    if all(stage.status in ("cached", "pruned") for stage in plan.stages.values()):
        return {}
    status.reopen(plan)
    check_workers(plan, options.workers)
    check_weights(plan)
    scheduler = Scheduler(plan, store, options.keep_stale)
    with record_run(plan, store, options) as run:
        driver = _Driver(plan, store, options, scheduler, run)
        try:
            driver.run()
        except (KeyboardInterrupt, Interrupted) as reason:
            run["status"] = "interrupted"
            raise Interrupted(str(reason) or "interrupted") from None
        finally:
            driver.close(finished=scheduler.finished)
        run["failed"] = scheduler.failed
        if plan.suite.search is not None and plan.suite.search.explores:
            run |= {"search": status.identity(plan.suite), "pruned": scheduler.pruned}
        run["status"] = "failed" if scheduler.failed else "complete"
    return scheduler.failed


def check_workers(plan: Plan, workers: int) -> None:
    """Every global batch must fall into equal parts. Raises `UserError`."""
    for stage in plan.stages.values():
        if not stage.trains:
            continue
        batch, shards = stage.settings["train"]["batch_size"], stage.settings["numerics"]["shards"]
        if workers and batch % workers:
            raise UserError(
                f"--workers {workers}: the batch of {batch} of {stage.title} cannot be cut into "
                f"{workers} equal parts"
            )
        if workers and shards > 1 and shards % workers:
            raise UserError(
                f"--workers {workers}: numerics.shards {shards} is not a multiple of it"
            )


def check_weights(plan: Plan) -> None:
    """Released weights must fit their rows' models. Raises `UserError`."""
    starts = [s for s in plan.stages.values() if s.status != "cached" and "weights" in s.settings]
    if not starts:
        return
    from maect.weights import CheckpointError, load_for  # imports torch

    seen = set()
    for stage in starts:
        model = ModelSettings.parse(stage.settings["model"])
        path, size = stage.places["weights"] or "", stage.settings["data"]["image_size"]
        if (path, model, size) in seen:
            continue
        seen.add((path, model, size))
        try:
            load_for(path, model, image_size=size, in_chans=stage.data.channels)
        except CheckpointError as error:
            raise UserError(f"{stage.title}: {error}", file=plan.suite.path) from None


@contextmanager
def record_run(plan: Plan, store: Store, options: RunOptions) -> Iterator[dict[str, Any]]:
    """The run's own record, written at its start and at its end."""
    began = time.time()
    run: dict[str, Any] = {
        "id": f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(began))}-{os.getpid()}",
        "suite": plan.suite.name,
        "profile": plan.suite.profile,
        "command": options.command,
        "started": iso(began),
        "status": "running",
        "source": environment.commit(),
        "env": environment.describe(),
        "workers": options.workers,
        "cached": len(plan.with_status("cached")),
        "stages": len(plan.stages),
    }
    store.write_run(run)
    try:
        yield run
    except BaseException:
        if run["status"] == "running":
            run["status"] = "failed"
        raise
    finally:
        store.write_run(run | {"ended": iso(time.time()), "wall_s": time.time() - began})


class _Driver:
    def __init__(
        self,
        plan: Plan,
        store: Store,
        options: RunOptions,
        scheduler: Scheduler,
        run: dict[str, Any],
    ) -> None:
        self.plan, self.store, self.options = plan, store, options
        self.scheduler, self.run_id = scheduler, run["id"]
        self.slots = 1
        self.display = Display(plan, self._expected)
        scheduler.on_end = self._ended
        #: Ray's reference of an evaluation -> its stage
        self.tasks: dict[Any, Stage] = {}
        self.group_of: dict[int, str] = {}
        self.spent = Spent(store, self.run_id)
        self._looked = 0.0
        #: stages held back until a trial of the search asks for them
        self.held: set[str] = set()
        self.search: Any = None

    def _expected(self) -> float | None:
        return estimate.remaining(self.plan, self.scheduler.left(), self.slots)

    def _ended(self, stage: Stage, state: str) -> None:
        if self.options.tune:
            self.board.settle.remote({stage.key: self.scheduler.failed.get(stage.key, state)})
        self.display.end(stage, state, self.scheduler.failed.get(stage.key))

    def run(self) -> None:
        self.display.say("starting Ray ...")
        from bench.run import cluster

        self.cluster = cluster
        threads = max(s.settings["numerics"]["threads"] for s in self.plan.stages.values())
        if cluster.start(self.options.address, self.options.workers * threads):
            self.display.say(f"{self.options.workers} workers share this machine's cores")
        self._look_again()
        self.layout = cluster.lay_out(self.options.workers, threads)
        self.slots = self.layout.slots
        self.limit = self._limit()
        self.board = cluster.board()
        self.groups = cluster.Groups(self.layout, self.store, self.run_id, self.board)
        if self.options.tune:
            from bench.run import tune

            self.held = tune.held(self.plan)
        with self.display:
            while not self.scheduler.finished:
                self._turn()
                self._check_budget()
                self.display.refresh()
                time.sleep(LOOP_S)
                for key, event in cluster.ray.get(self.board.drain.remote(QUIET_S)):
                    self._event(self.plan.stages[key], event)

    def _look_again(self) -> None:
        """Workers of a run killed just before this one may have ended a stage or begun another."""
        recovery.take_over(self.plan, self.store)
        for stage in self.scheduler.left():
            if stage.status == "pending":
                assess(stage, self.store, keep_stale=self.options.keep_stale)
                if stage.status == "cached":
                    self.scheduler.done.add(stage.key)

    def _turn(self) -> None:
        """One look at everything."""
        ray = self.cluster.ray
        self._reap_groups()
        self._reap_tasks()
        ready = [stage for stage in self.scheduler.ready() if stage.key not in self.held]
        for_groups = [stage for stage in ready if self._by_group(stage)]
        offers = [(Task.of(stage), self.scheduler.lost.get(stage.key, 0)) for stage in for_groups]
        retired = self.groups.gone | (self.groups.old() if self.tasks else set())
        ray.get(self.board.offer.remote(offers, retired))
        busy = len(self.groups.alive)
        idle = busy - len(self.group_of)
        # what only reads stored features mostly takes seconds, less than a group takes to start
        long = sum(stage.flops > 0 for stage in for_groups)
        wanted = long + ceil((len(for_groups) - long) / SHORT_A_GROUP)
        for _ in range(min(wanted - idle, self.slots - busy)):
            self.groups.start()
        for stage in ready:
            if not self._by_group(stage):
                self._evaluate(stage)
        if self.options.tune:
            self._tune()

    def _by_group(self, stage: Stage) -> bool:
        """Does a worker group run it, or a task?"""
        return stage.trains or self.layout.groups_evaluate

    def _limit(self) -> float | None:
        """Device-hours that the run may spend. Raises `UserError` for those of other devices."""
        limits = self.options.max_hours
        held, other = ("gpu", "cpu") if self.layout.gpu else ("cpu", "gpu")
        if held not in limits and limits:
            raise UserError(
                f"--max-{other}-hours: this run holds {held.upper()}s; write --max-{held}-hours"
            )
        return limits.get(held)

    def _check_budget(self) -> None:
        now = time.monotonic()
        if self.limit is None or now - self._looked < BUDGET_S or self.scheduler.finished:
            return
        self._looked = now
        spent = self.spent.hours(self.scheduler.begun, self.scheduler.running)
        if spent >= self.limit:
            unit = "GPU-hours" if self.layout.gpu else "CPU-hours"
            raise Interrupted(f"the budget of {self.limit:g} {unit} is spent ({spent:.4g})")

    def _tune(self) -> None:
        """Start the search once all that its cells share is done; notice its end."""
        from bench.run import tune

        if self.search is None:
            if all(stage.key in self.held for stage in self.scheduler.left()):
                self.search = tune.Search(
                    self.plan, 2 * self.slots, self.store, self.run_id, self.board
                )
                self.display.say(
                    f"Ray Tune: {self.search.count} trials, {self.search.at_once} at a time"
                )
                self.search.start()
        elif not self.search.is_alive():
            users = explore.of_cells(self.plan)
            for stage in [s for s in self.scheduler.left() if s.key in self.held]:
                labels = users[stage.key]
                why = self.search.problem or self.search.failed(labels)
                if why:
                    self.scheduler.fail(stage, why)
                elif stage.key not in self.scheduler.failed:
                    seeds = len(self.plan.suite.seeds)
                    why = explore.why_left_out(labels, self.search.seeds, seeds)
                    self.scheduler.prune(stage, why)
            if self.scheduler.pruned:
                self.display.say(f"the search leaves out {len(self.scheduler.pruned)} stages")

    def _event(self, stage: Stage, event: dict[str, Any]) -> None:
        match event["state"]:
            case "wanted":
                self.held.discard(stage.key)
            case "taken":
                self.scheduler.begin(stage)
                self.group_of[event["group"]] = stage.key
                if event["group"] in self.groups.gone:
                    self._release(event["group"], "its worker group had ended")
            case "complete" if self._by_group(stage):
                self._let_go(stage)
                self.scheduler.complete(stage)
            case "failed" if self._by_group(stage):
                self._let_go(stage)
                self.scheduler.fail(stage, event["message"])
            case _:
                self.display.event(stage, event)

    def _let_go(self, stage: Stage) -> None:
        self.group_of = {g: key for g, key in self.group_of.items() if key != stage.key}

    def _evaluate(self, stage: Stage) -> None:
        self.scheduler.begin(stage)
        task = self.cluster.evaluate.options(**self.layout.evaluation())
        reference = task.remote(
            Task.of(stage), self.store.root, self.run_id, self.board, self.layout
        )
        self.tasks[reference] = stage

    def _reap_tasks(self) -> None:
        ray = self.cluster.ray
        if not self.tasks:
            return
        ended, _ = ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=0)
        for reference in ended:
            stage = self.tasks.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                self._lost(stage, str(error).splitlines()[0])
                continue
            self._settle(stage)

    def _settle(self, stage: Stage) -> None:
        """An evaluation came back; its newest record says how."""
        newest = self.store.state(stage.key).attempts[-1]
        if newest["status"] == "failed":
            self.scheduler.fail(stage, newest["error"]["message"])
        else:
            self.scheduler.complete(stage)

    def _reap_groups(self) -> None:
        for group, problem in self.groups.reap():
            self._release(group, problem or "the worker group ended")

    def _release(self, group: int, why: str) -> None:
        """A group is no more: what nobody else holds is lost."""
        self.group_of.pop(group, None)
        held = {*self.group_of.values(), *(stage.key for stage in self.tasks.values())}
        for key in self.scheduler.running - held:
            self._lost(self.plan.stages[key], why)

    def _lost(self, stage: Stage, why: str) -> None:
        recovery.close_running(self.store, stage.key, "lost", f"its worker died: {why}")
        assess(stage, self.store, keep_stale=self.options.keep_stale)
        if stage.status == "cached":  # it had written its record, but not told
            self.scheduler.complete(stage)
            return
        self.display.end(stage, "lost", why)
        self.scheduler.lose(stage, why)

    def close(self, *, finished: bool) -> None:
        """Leave Ray and close the attempts that end with it."""
        threads = []
        if hasattr(self, "groups"):
            ray = self.cluster.ray
            with suppress(ray.exceptions.RayError):
                ray.get(self.board.close.remote())
                for reference in self.tasks:
                    ray.cancel(reference, force=True)
            threads = [thread for _, thread in self.groups.alive.values()]
            threads += [self.search] if self.search is not None else []
        try:
            self._close_attempts()
        finally:  # whether or not the store takes a record: who leaves Ray otherwise may crash
            if hasattr(self, "cluster"):
                self.cluster.stop(threads, JOIN_S if finished else 0.0)

    def _close_attempts(self) -> None:
        """End our workers and write the records that they can no longer write."""
        for key in self.plan.stages:
            for attempt in self.store.state(key).attempts:
                if attempt["status"] == "running" and attempt["env"]["host"] == platform.node():
                    recovery.kill(attempt["pid"])
            why, now = "the run was stopped", time.time()
            recovery.close_running(self.store, key, "interrupted", why, now)
