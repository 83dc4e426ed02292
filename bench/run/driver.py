"""Running a plan: the loop between the scheduler's decisions, the store and the worker groups."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import environment
from bench.errors import INTERRUPTED, STAGE_FAILED, MachineError, UserError
from bench.plan import estimate, status
from bench.plan.stage import Plan, Stage
from bench.run import mailbox, recovery, scheduler, signals
from bench.run.progress import Display
from bench.run.scheduler import RunState
from bench.store.files import iso
from bench.store.record import Run, Status
from bench.store.store import Store
from maect.settings import DataSettings, ModelSettings
from reports.display import plural

if TYPE_CHECKING:
    from bench.run import tune

#: how long to wait for news, where nothing moves
QUIET_S = 0.8
#: seconds between two looks at what other runs on the same store do
LOOK_S = 3.0
#: what the first worker group takes to start, about
GROUP_START_S = 12.0


@dataclass(frozen=True)
class RunOptions:
    """How a run uses machines, and what it may spend."""

    #: workers that train a stage together; 0: no worker process
    workers: int = 1
    #: of a running Ray cluster
    address: str | None = None
    #: seconds to wait for devices; None: a while, where a node is lost, and not at the start
    wait_s: float | None = None
    #: hold no GPU, also where there are some
    cpu: bool = False
    #: tell of faults alone
    quiet: bool = False
    command: str = ""
    #: device-hours that the run may spend, by kind: "gpu", "cpu"
    max_hours: dict[str, float] = field(default_factory=dict)
    #: called when all is known of another seed, but for the last one
    on_seed: Callable[[], None] = lambda: None


class Interrupted(Exception):
    """A signal came, a budget is spent or Ray gave way; everything complete is in the store.

    Its text says which, `code` is the exit code.
    """

    def __init__(self, why: str, code: int) -> None:
        super().__init__(why)
        self.code = code


def execute(plan: Plan, store: Store, options: RunOptions) -> dict[str, str]:
    """Run what the plan lacks. Return the failed stages: key -> why.

    The caller drives a run of the store (`Leases.driving`). Stages at which other runs work are
    waited for.
    With nothing to run it starts no Ray and imports no torch. Raises `Interrupted` where the run
    ends before its stages, `UserError` where it cannot begin.
    """
    if all(stage.status in ("cached", "pruned") for stage in plan.stages.values()):
        return {}
    for stage in plan.with_status("pruned"):  # the search decides anew
        stage.status, stage.reason = "pending", None
    check_workers(plan, options.workers)
    check_weights(plan)
    with _recorded(plan, store, options) as run:
        try:
            with signals.noted():  # Ray swallows KeyboardInterrupt here and there
                state = _Driver(plan, store, options, run).run()
        except (KeyboardInterrupt, MachineError) as why:
            if not signals.received and isinstance(why, MachineError):
                raise Interrupted(str(why), STAGE_FAILED) from None
            # a signal to the whole group ends Ray as well
            raise Interrupted("interrupted", signals.code()) from None
        run.failed = state.failed
        if plan.suite.explores:
            run.search, run.pruned = status.search_identity(plan.suite), state.pruned
        run.status = "failed" if state.failed else "complete"
    signals.check()
    return state.failed


def check_workers(plan: Plan, workers: int) -> None:
    """Raise `UserError` unless every global batch falls into equal parts."""
    for stage in plan.stages.values() if workers else ():
        if not stage.trains:
            continue
        batch, shards = stage.settings["train"]["batch_size"], stage.settings["numerics"]["shards"]
        if batch % workers:
            raise UserError(
                f"--workers {workers}: the batch of {batch} of {stage.title} cannot be cut into "
                f"{workers} equal parts"
            )
        if shards > 1 and shards % workers:
            raise UserError(
                f"--workers {workers}: numerics.shards {shards} is not a multiple of it"
            )


def check_weights(plan: Plan) -> None:
    """Raise `UserError` unless released weights fit their rows' models."""
    starts: dict[Any, Stage] = {}
    for stage in plan.stages.values():
        if stage.status != "cached" and "weights" in stage.settings:
            model, size = stage.settings["model"], stage.settings["data"]["image_size"]
            channels = stage.settings.get("channels") or stage.data.channels
            use = size, channels, stage.kind, stage.settings.get("pool")
            path = stage.places.get("weights") or ""
            starts.setdefault((path, ModelSettings.parse(model), *use), stage)
    if not starts:
        return
    from maect.weights import CheckpointError, load_for  # imports torch

    for (path, model, size, channels, kind, pool), stage in starts.items():
        try:
            load_for(path, model, image_size=size, in_chans=channels, kind=kind, pool=pool)
        except CheckpointError as error:
            raise UserError(f"{stage.title}: {error}", file=plan.suite.path) from None


@contextmanager
def _recorded(plan: Plan, store: Store, options: RunOptions) -> Iterator[Run]:
    """Write the run's own record at its start and at its end."""
    began, clock = time.time(), time.monotonic()
    assert store.leases.run is not None
    run = Run(
        id=store.leases.run,
        suite=plan.suite.name,
        profile=plan.suite.profile,
        command=options.command,
        started=iso(began),
        source=environment.commit(),
        env=environment.describe(),
        workers=options.workers,
        cached=len(plan.with_status("cached")),
        stages=len(plan.stages),
    )
    store.write_run(run)
    try:
        yield run
    except BaseException as why:
        stopped = isinstance(why, Interrupted) and why.code != STAGE_FAILED
        run.status = "interrupted" if stopped else "failed"
        raise
    finally:
        run.wall_s = time.monotonic() - clock
        run.ended = iso(began + run.wall_s)
        states = [stage.state for stage in plan.stages.values()]
        run.attempts = {state.key: state.statuses for state in states if state.attempts}
        store.write_run(run)


def spent(stages: Iterable[Stage], run_id: str, began: Mapping[str, float]) -> float:
    """Return the device-hours of a run's attempts at stages: failed, lost, unfinished ones too.

    They are counted as the ledger counts: devices held × wall time. `began` tells when the stages
    began, by the monotonic clock.
    """
    hours = 0.0
    for stage in stages:
        for attempt in stage.state.attempts:
            if attempt.run != run_id:
                continue
            cost, now = attempt.cost, time.monotonic()
            going = cost.devices * (now - began.get(stage.key, now)) / 3600
            hours += going if cost.device_hours is None else cost.device_hours
    return hours


class _Driver:
    """Executes what the scheduler decides and tells it what happens."""

    def __init__(self, plan: Plan, store: Store, options: RunOptions, run: Run) -> None:
        """Start Ray or join it. Raises what `Cluster` raises."""
        self.plan, self.store, self.options, self.record = plan, store, options, run
        self.run_id = run.id
        self.state = RunState(plan.stages, width=max(options.workers, 1))
        self.display = Display(plan, self._expected, quiet=options.quiet)
        self.search: tune.Search | None = None
        self._groups = 0
        #: seconds that this process has listened: while it stands still itself, nobody is silent
        self._clock = 0.0
        #: key -> when its stage began, by the monotonic clock
        self._began: dict[str, float] = {}
        #: group -> when it was started, by the same clock, and the devices that it holds since
        self._held: dict[int, tuple[float, float]] = {}
        #: device-hours that ended groups held
        self._held_hours = 0.0
        #: seeds of which not all is known
        self._open_seeds = 0
        #: when it was last looked what other runs do, by the monotonic clock, and who was told of
        self._looked, self._told_of = -math.inf, set[str]()
        self.display.starting(0.0)
        from bench.run.cluster import Cluster  # imports Ray

        self.cluster = Cluster(
            options.address,
            options.workers,
            max(stage.settings["numerics"]["threads"] for stage in plan.stages.values()),
            self.display.starting,
            None if options.cpu else plan.suite.devices,
            options.wait_s,
        )

    def _expected(self) -> float | None:
        """Return the seconds that the run will still take, if that is known.

        What trains tells by its own pace, which holds after a resume too. While no group has
        started, that is waited for first.
        """
        going = self.display.training
        rest = [stage for stage in self.state.left() if stage.key not in going]
        left = estimate.remaining(
            self.plan, rest, self.state.capacity // self.state.width, sum(going.values())
        )
        groups = self.state.groups.values()
        if left is None or not groups or any(group.phase != "starting" for group in groups):
            return left
        return left + max(0.0, GROUP_START_S - self._clock)

    def run(self) -> RunState:
        """Decide, act and listen until every stage has ended. Return how each did."""
        try:
            self._run()
        finally:
            self.close()
        return self.state

    def _run(self) -> None:
        if self.cluster.shared:
            self.display.say(f"{self.options.workers} workers share this machine's cores")
        self.state.wait_s = self.cluster.wait_s
        self.cluster.check_room()
        self._check_data()
        if self.plan.suite.search is not None:
            from bench.run import tune

            self.state.held = set(tune.of_cells(self.plan))
        with self.display:
            while not self.state.finished:
                signals.check()
                self.store.leases.check_held()
                self._check_budget()
                self._look_at_nodes()
                self._look_at_others()
                self._act()
                self._tell_of_seeds()
                self.display.refresh()
                self._listen()
                self._look_at_search()

    def _check_data(self) -> None:
        """Raise `UserError` unless all nodes of the cluster have the data that are left to read."""
        wanted = {}
        for stage in self.state.left():
            if "data" in stage.settings:
                place = {"path": stage.places["data_path"], "stage": stage.places["data_stage"]}
                settings = DataSettings.parse(stage.settings["data"] | place)
                root = Path(str(stage.places["data_root"]))
                wanted[settings, root] = stage.data.fingerprint
        if lacking := self.cluster.lacking([(*which, known) for which, known in wanted.items()]):
            told = "; ".join(f"{node}: {why}" for node, why in lacking.items())
            raise UserError(f"the data are not on every node of the cluster: {told}")

    def _look_at_nodes(self) -> None:
        """Count the room anew, as nodes come and go.

        One group may always be started, without room too: it makes an autoscaler add a node.
        """
        self.state.room = self.cluster.room()
        self.state.capacity = max(self.state.room, self.state.width)

    def _look_at_others(self) -> None:
        """Learn which stages other runs work on, and what became of those that they left.

        Those who watch this run learn when it will end.
        """
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked, before = time.monotonic(), self.state.elsewhere
        if (left := self._expected()) is not None:
            self.record.expected = iso(time.time() + left)
            with suppress(UserError):  # a store that is full for a while ends no run
                self.store.write_run(self.record)
        there = self.store.leases.elsewhere()
        self.state.elsewhere = there.keys() & {stage.key for stage in self.state.left()}
        for stage in self.state.left():
            if stage.key in before - self.state.elsewhere:
                self._take_if_complete(stage)
        for driver in (there[key] for key in self.state.elsewhere):
            if driver.run not in self._told_of:
                self._told_of.add(driver.run)
                told = "works on stages of this one too: what it completes is taken from it"
                self.display.say(f"  another run ({driver}) {told}")

    def _claim(self, stage: Stage) -> bool:
        """Return whether a stage is this run's to work on: nobody else is at it, or was before."""
        if self.store.leases.claim(stage.key) is not None:
            self.state.elsewhere.add(stage.key)
            return False
        if self._take_if_complete(stage):
            return False
        if all(attempt.status != "running" for attempt in stage.state.attempts):
            return True
        recovery.close_running(self.store, stage.key, "lost", recovery.KILLED)
        return not self._take_if_complete(stage)

    def _assess(self, stage: Stage) -> None:
        status.assess(stage, self.store, keep_stale=self.plan.keep_stale)

    # ------------------------------------------------------------------------------------- actions

    def _act(self) -> None:
        """Do what the scheduler decides."""
        for action in scheduler.decide(self.state, self._clock):
            match action:
                case scheduler.StartGroup(width):
                    self._groups += 1
                    self.state.groups[self._groups] = scheduler.Group(width, since=self._clock)
                    self._held[self._groups] = time.monotonic(), self.cluster.devices(width)
                    self.cluster.start_group(self._groups, width, self.store, self.run_id)
                case scheduler.Give(_, key) if not self._claim(self.plan.stages[key]):
                    continue
                case scheduler.Give(group, key):
                    self.state.begin(group, key)
                    self.cluster.give(group, self.plan.stages[key])
                case scheduler.EndGroup(group):
                    self.state.groups[group].phase = "ending"
                    self.cluster.give(group, None)
                case scheduler.Say(line):
                    self.state.told = self._clock
                    self.display.say(line, fault=True)
                case scheduler.LoseGroup(group, reason):
                    self.cluster.end_group(group)
                    self._group_ended(group, reason)
                case scheduler.GiveUp(key, reason):
                    self._failed(key, reason)

    def _check_budget(self) -> None:
        """Raise `Interrupted` once the run's budget is spent, `UserError` if it is of devices that
        the run does not hold."""
        limits = self.options.max_hours
        held, other = ("gpu", "cpu") if self.cluster.gpus else ("cpu", "gpu")
        if not limits:
            return
        if held not in limits:
            raise UserError(
                f"--max-{other}-hours: this run holds {held.upper()}s; write --max-{held}-hours"
            )
        hours, apart = self._hours()
        if hours + apart >= limits[held]:
            unit = "GPU-hours" if self.cluster.gpus else "core-hours"
            told = f"the budget of {limits[held]:g} {unit} is spent ({hours + apart:.4g}, of it "
            told += f"{apart:.4g} while groups started, waited and ended)"
            raise Interrupted(told, INTERRUPTED)

    def _hours(self) -> tuple[float, float]:
        """Return the device-hours of this run's attempts, and what its groups held beside them."""
        begun = [self.plan.stages[key] for key in self.state.begun]
        hours, now = spent(begun, self.run_id, self._began), time.monotonic()
        held = sum(devices * (now - began) for began, devices in self._held.values()) / 3600
        return hours, max(0.0, self._held_hours + held - hours)

    def _tell_of_seeds(self) -> None:
        """Show the tables of the seeds of which all is known, now that the groups have work."""
        left = {stage.key for stage in self.state.left()}
        open_seeds = {r.seed for r in self.plan.rows if any(s.key in left for s in r.stages())}
        if open_seeds and len(open_seeds) < self._open_seeds:
            self.options.on_seed()
        self._open_seeds = len(open_seeds)

    # -------------------------------------------------------------------------------------- events

    def _listen(self) -> None:
        began = time.monotonic()
        events = self.cluster.events(QUIET_S)
        if events is not None:
            self._clock += min(time.monotonic() - began, 2 * QUIET_S)
        for event in events or ():
            self._hear(event)

    def _hear(self, event: mailbox.Event) -> None:
        match event:
            case mailbox.Waiting(group):
                self.state.wait(group, self._clock)
            case mailbox.Alive(group, worker):
                self.state.hear(group, worker, self._clock)
            case mailbox.Began(key):
                self._began[key] = time.monotonic()
                self._assess(self.plan.stages[key])
                self.display.begin(self.plan.stages[key])
            case mailbox.Stepped(key):
                self.display.step(self.plan.stages[key], event)
            case mailbox.Ended(key, None, 0):
                if not self._take_if_complete(self.plan.stages[key]):
                    why = self.plan.stages[key].reason
                    self._failed(key, why or "it left no complete record")
            case mailbox.Ended(key, None, rung):
                self._stopped(self.plan.stages[key], rung)
            case mailbox.Ended(key, str(problem)):
                self._failed(key, problem)
            case mailbox.Wanted(keys, rung):
                self.state.want(keys, rung)
            case mailbox.GroupEnded(group, problem, hopeless):
                self._group_ended(group, problem or "the worker group ended")
                if hopeless:
                    raise MachineError(problem)

    def _take_if_complete(self, stage: Stage) -> bool:
        """Take note of the complete record that the store has of a stage. Return whether it has."""
        if stage.key in self.state.done:
            return True
        self._assess(stage)
        if stage.status != "cached":
            return False
        self.state.complete(stage.key)
        self.store.leases.release(stage.key)
        self._ended(stage, "complete")
        for other in self.state.left():
            # what waited for its input may turn out to be cached after all
            waited = other.record is not None and other.status != "stale"
            if waited and other.key not in self.state.running and self.state.inputs_done(other):
                self._take_if_complete(other)
        return True

    def _stopped(self, stage: Stage, rung: int) -> None:
        """Take note that a stage has come to a rung, where it waits for the search."""
        self._assess(stage)
        self.store.leases.release(stage.key)
        self.state.stop(stage.key, rung)
        self.cluster.settle(mailbox.at_rung(stage.key, rung), "complete")
        self.display.end(stage, "stopped", stage.reason)

    def _failed(self, key: str, reason: str) -> None:
        """Take note of a failure and of what it takes with it, for the table too."""
        if key not in self.state.done:
            self._assess(self.plan.stages[key])
        self.store.leases.release(key)
        for other in self.state.fail(key, reason):
            self._ended(self.plan.stages[other], "failed")

    def _ended(self, stage: Stage, how: str) -> None:
        why = self.state.failed.get(stage.key)
        if self.plan.suite.search is not None:  # whose trials wait for it
            rungs = [mailbox.at_rung(stage.key, n) for n in range(1, len(stage.rungs) + 1)]
            for name in [stage.key, *rungs]:
                self.cluster.settle(name, why or how)
        self.display.end(stage, how, why)

    def _group_ended(self, group: int, why: str) -> None:
        """Look at what became of the stage that a group worked on; it may not have told."""
        key = self.state.lose(group, why)
        if group in self._held:
            began, devices = self._held.pop(group)
            self._held_hours += devices * (time.monotonic() - began) / 3600
        if key is None:
            return
        stage = self.plan.stages[key]
        self._close_running(stage, "lost", f"its worker died: {why}")
        if self._take_if_complete(stage):
            return
        newest = stage.state.attempts[-1] if stage.state.attempts else None
        if newest is not None and newest.status == "failed" and newest.run == self.run_id:
            self._failed(key, newest.error.message if newest.error else why)
        else:
            self.store.leases.release(key)
            self.display.end(stage, "lost", why)

    # -------------------------------------------------------------------------------------- search

    def _look_at_search(self) -> None:
        """Start the search once nothing else is left; settle what it never asked for at its end."""
        held, left = self.state.held, self.state.left()
        waiting = [stage for stage in left if stage.key in held]
        if waiting and self.search is None and waiting == left:
            from bench.run import tune

            at_once = 2 * (self.state.capacity // self.state.width)
            self.search = tune.Search(self.plan, at_once, self.store, self.run_id, self.cluster)
            told = f"{self.search.count} trials, {self.search.at_once} at a time"
            self.display.say(f"Ray Tune: {told}")
            self.search.start()
        if not waiting or self.search is None or self.search.is_alive():
            return
        for stage in waiting:
            why = self.search.why_failed(stage.key)
            if why:
                self._failed(stage.key, why)
            elif stage.key not in self.state.failed:
                stage.status, stage.reason = "pruned", self.search.why_left_out(stage.key)
                self.state.pruned[stage.key] = stage.reason
        held.clear()
        if self.state.pruned:
            told = f"the search leaves out {plural(len(self.state.pruned), 'stage')}"
            spared = estimate.spared(self.plan)
            self.display.say(f"{told}. {spared}" if spared else told)

    # -------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Leave Ray, and close the attempts that end with the run."""
        starting = any(group.phase == "starting" for group in self.state.groups.values())
        self.cluster.close(finished=self.state.finished and not starting, search=self.search)
        with suppress(MachineError):  # the store itself may be what gave way
            for stage in self.plan.stages.values():
                # what stopped at a rung has its end, and stays marked
                if stage.key in self.state.begun - self.state.pruned.keys():
                    self._close_running(stage, "interrupted", "the run was stopped")
        self.record.reserved_hours = {"gpu" if self.cluster.gpus else "cpu": self._hours()[1]}

    def _close_running(self, stage: Stage, status: Status, why: str) -> None:
        """Write the record of a stage's attempt in this run, at which nobody works any more."""
        began = self._began.get(stage.key)
        wall_s = None if began is None else time.monotonic() - began
        recovery.close_running(self.store, stage.key, status, why, wall_s, self.run_id)
        self._assess(stage)
