"""What a run does next: a pure function from its state to actions. Knows neither Ray nor the store.

The driver keeps the state true, with what it hears from the workers, and executes the actions.

A worker group holds `width` workers. What runs the encoder goes to groups as wide as the run asks
for, everything else to groups of one worker. Where both kinds cannot stand side by side, a group
that has nothing to do makes way for the other kind.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bench.plan.stage import Stage

#: times that a stage whose worker died is tried again in one run
MAX_LOST = 3
#: evaluations of stored features for which one group is started; most take less than a start does
SHORT_A_GROUP = 8
#: seconds after which a group is ended that finds nothing to do
IDLE_S = 60.0
#: seconds that a run waits for a node where none has room for a group, unless it was told how
#: long; seconds until it says that it waits
WAIT_S, NO_ROOM_S = 300.0, 10.0
#: seconds without a sign of life of a group, by its phase: when that is said, when it is given up
PATIENCE_S = {
    "starting": (30.0, WAIT_S),
    "waiting": (15.0, 60.0),
    "working": (15.0, 60.0),
    "ending": (30.0, 60.0),
}


@dataclass
class Group:
    """A worker group. It starts, then waits for stages and works on them in turn."""

    #: workers, each with its devices
    width: int
    phase: Literal["starting", "waiting", "working", "ending"] = "starting"
    #: key of the stage that it works on
    stage: str | None = None
    #: when it was started, or began to wait, in seconds of the driver's clock
    since: float = 0.0
    #: worker -> when it last gave a sign of life
    heard: dict[str, float] = field(default_factory=dict)

    def last_sign(self) -> tuple[float, str]:
        """Return when the worker was last heard that has been silent longest, and its name."""
        signs = [(when, worker) for worker, when in self.heard.items()]
        if len(signs) < self.width:
            signs.append((self.since, "a worker that has yet to speak"))
        return min(signs)


@dataclass(frozen=True)
class StartGroup:
    """Start a worker group."""

    width: int


@dataclass(frozen=True)
class Give:
    """Give a stage to a group that waits."""

    group: int
    key: str


@dataclass(frozen=True)
class EndGroup:
    """End a group that waits."""

    group: int


@dataclass(frozen=True)
class Say:
    """Tell people what is waited for."""

    line: str


@dataclass(frozen=True)
class LoseGroup:
    """Count a group that gives no sign of life as lost."""

    group: int
    reason: str


@dataclass(frozen=True)
class GiveUp:
    """Count a stage as failed."""

    key: str
    reason: str


Action = StartGroup | Give | EndGroup | Say | LoseGroup | GiveUp


@dataclass
class RunState:
    """What is known of a run: how far each stage is, and what each worker group does."""

    #: inputs before what needs them
    stages: Mapping[str, Stage]
    #: workers of a group that runs the encoder
    width: int = 1
    #: workers that may be asked for together
    capacity: int = 1
    #: workers for whom the nodes that are alive have devices
    room: float = math.inf
    #: seconds that a group is waited for which has no room
    wait_s: float = WAIT_S
    done: set[str] = field(default_factory=set)
    #: key -> why
    failed: dict[str, str] = field(default_factory=dict)
    #: key -> why a search did without the stage
    pruned: dict[str, str] = field(default_factory=dict)
    #: everything that this run has worked on
    begun: set[str] = field(default_factory=set)
    #: key -> why its worker died, each time
    lost: dict[str, list[str]] = field(default_factory=dict)
    #: why groups ended before they asked for a stage, since the last one that did ask
    not_started: list[str] = field(default_factory=list)
    groups: dict[int, Group] = field(default_factory=dict)
    #: stages that wait until a trial of the search asks for them
    held: set[str] = field(default_factory=set)
    #: stages that other runs on the same store work on
    elsewhere: set[str] = field(default_factory=set)
    #: when a silence was last told of
    told: float = -math.inf

    def __post_init__(self) -> None:
        self.done |= {key for key, stage in self.stages.items() if stage.status == "cached"}
        #: FLOPs of a stage and of all that builds on it: what most delays the end. Rows of equal
        #: FLOPs have paths of one length, of which the one that branches has to begin first
        self._behind: dict[str, float] = {}
        below: dict[str, set[str]] = defaultdict(set)
        for stage in reversed(list(self.stages.values())):
            own = below[stage.key] | {stage.key}
            self._behind[stage.key] = sum(self.stages[key].flops for key in own)
            for source in stage.inputs.values():
                below[source.key] |= own

    @property
    def running(self) -> set[str]:
        """Keys of the stages that a group works on."""
        return {group.stage for group in self.groups.values() if group.stage is not None}

    @property
    def finished(self) -> bool:
        """Whether the end of every stage is known."""
        return len(self.done) + len(self.failed) + len(self.pruned) == len(self.stages)

    def left(self) -> list[Stage]:
        """Return the stages whose end is not known yet."""
        ended = self.done | self.failed.keys() | self.pruned.keys()
        return [stage for key, stage in self.stages.items() if key not in ended]

    def ready(self) -> list[Stage]:
        """Return the stages that can be given to a group, the most pressing first.

        Features and evaluations come before training: results show early, and a run that its
        budget ends has paid for them. Training goes seed by seed, so that a whole table of one seed
        is there early. Of stages on their way to a rung the least far come first,
        in an order as good as random, so that a search compares many cells before it goes on.
        """
        busy = self.running | self.held | self.elsewhere
        found = [s for s in self.left() if s.key not in busy and self.inputs_done(s)]

        def order(stage: Stage) -> tuple[bool, int, int, float, str]:
            if stage.rungs and stage.until:
                return stage.trains, stage.until, 0, -self._behind[stage.key], stage.key
            seed = stage.settings.get("seed", 0)
            return stage.trains, 0, seed, -self._behind[stage.key], ""

        return sorted(found, key=order)

    def inputs_done(self, stage: Stage) -> bool:
        """Return whether everything that a stage builds on is complete."""
        return all(source.key in self.done for source in stage.inputs.values())

    def width_for(self, stage: Stage) -> int:
        """Return how many workers the group has that takes a stage."""
        return self.width if stage.runs_encoder else 1

    # -------------------------------------------------------------------------------- what happens

    def wait(self, group: int, now: float) -> None:
        """A group asks for a stage."""
        if group in self.groups and self.groups[group].phase != "ending":
            self.groups[group].phase, self.groups[group].since = "waiting", now
            self.not_started.clear()

    def hear(self, group: int, worker: str, now: float) -> None:
        """A worker of a group gives a sign of life."""
        if group in self.groups:
            self.groups[group].heard[worker] = now

    def begin(self, group: int, key: str) -> None:
        """A stage was given to a group."""
        self.groups[group].phase, self.groups[group].stage = "working", key
        self.begun.add(key)

    def want(self, keys: Sequence[str], rung: int) -> None:
        """A trial asks for stages; of the last one as far as a rung, unless that is 0."""
        self.held -= {*keys}
        for key in keys:
            stage = self.stages[key]
            wanted = rung if rung and key == keys[-1] else len(stage.rungs) + 1
            stage.until = max(stage.until, wanted)  # another trial may want more

    def stop(self, key: str, rung: int) -> None:
        """A stage has come to a rung; unless more is wanted of it, it waits there."""
        self._release(key)
        if self.stages[key].until == rung:
            self.held.add(key)

    def complete(self, key: str) -> None:
        """A stage is complete."""
        self._release(key)
        self.done.add(key)

    def fail(self, key: str, reason: str) -> list[str]:
        """A stage failed, and what builds on it with it. Return the keys that newly failed."""
        self._release(key)
        if key in self.failed or key in self.done:
            return []
        self.failed[key] = reason
        found, why = [key], f"its input failed: {self.stages[key].title}"
        for other in self.stages.values():
            if self.stages[key] in other.inputs.values():
                found += self.fail(other.key, why)
        return found

    def lose(self, group: int, why: str) -> str | None:
        """Note that a group is no more. Return the key of the stage that it worked on."""
        gone = self.groups.pop(group, None)
        if gone is None:  # it was given up before
            return None
        if gone.phase == "starting":
            self.not_started.append(why)
        if gone.stage is not None:
            self.lost.setdefault(gone.stage, []).append(why)
        return gone.stage

    def _release(self, key: str) -> None:
        """The group that worked on a stage has yet to ask for another."""
        for group in self.groups.values():
            if group.stage == key:
                group.stage = None


def decide(state: RunState, now: float) -> list[Action]:
    """Return what is to be done next, in this order; `now` is the driver's clock in seconds."""
    left = state.left()
    if len(state.not_started) > MAX_LOST and not state.running:
        why = f"no worker group can be started: {state.not_started[-1]}"
        return [GiveUp(stage.key, why) for stage in left]
    for stage in left:
        if len(losses := state.lost.get(stage.key, [])) > MAX_LOST:
            return [GiveUp(stage.key, f"its worker died {len(losses)} times: {losses[-1]}")]
    if silent := _silent(state, now):
        return silent
    idle = {number: group for number, group in state.groups.items() if group.phase == "waiting"}
    actions: list[Action] = []
    waiting = []
    for stage in state.ready():
        width = state.width_for(stage)
        group = next((n for n, group in idle.items() if group.width == width), None)
        if group is None:
            waiting.append(stage)
        else:
            del idle[group]
            actions.append(Give(group, stage.key))
    actions += _groups(state, waiting, idle)
    given = {action.key for action in actions if isinstance(action, Give)}
    nothing_to_come = all(stage.key in state.running | given for stage in left)
    for number, waits in idle.items():
        if EndGroup(number) not in actions and (nothing_to_come or now - waits.since > IDLE_S):
            actions.append(EndGroup(number))
    return actions


def _silent(state: RunState, now: float) -> list[Action]:
    """Return what is to be said and done about groups that give no sign of life."""
    actions: list[Action] = []
    crowded = state.room < sum(group.width for group in state.groups.values())
    for number, group in state.groups.items():
        starting = group.phase == "starting"
        if not starting and not group.heard:
            continue  # it was never to give one
        heard, worker = group.last_sign()
        say_s, lose_s = PATIENCE_S[group.phase]
        what = f"{worker} gives no sign of life"
        if starting and crowded:
            say_s, lose_s = NO_ROOM_S, state.wait_s
            what = f"a group of {group.width} worker(s) waits for a node: "
            what += f"Ray has room for {state.room:.0f} in all"
        elif starting:  # where there is room it takes what it takes
            lose_s = max(lose_s, state.wait_s)
            what = f"a group of {group.width} worker(s) has yet to start; are cores or GPUs free?"
        if now - heard > lose_s:
            if starting and not state.running:  # another would not start either
                why = f"no worker group could start within {lose_s:.0f} s"
                return [GiveUp(stage.key, why) for stage in state.left()]
            actions.append(LoseGroup(number, f"no sign of life for {lose_s:.0f} s"))
        elif now - heard > say_s and now - state.told > say_s:
            at = state.stages[group.stage].title if group.stage else group.phase
            told = f"  {what} ({at}, {now - heard:.0f} s; given up after {lose_s:.0f} s)"
            return [*actions, Say(told)]
    return actions


def _groups(state: RunState, waiting: list[Stage], idle: Mapping[int, Group]) -> list[Action]:
    """Return the groups to start for stages that wait, and those that must make way for them."""
    actions: list[Action] = []
    free = state.capacity - sum(group.width for group in state.groups.values())
    for width in sorted({state.width, 1}, reverse=True):
        mine = [stage for stage in waiting if state.width_for(stage) == width]
        long = sum(stage.flops > 0 for stage in mine)
        wanted = long + math.ceil((len(mine) - long) / SHORT_A_GROUP)
        wanted -= sum(g.phase == "starting" and g.width == width for g in state.groups.values())
        started = max(0, min(wanted, free // width))
        actions += [StartGroup(width)] * started
        free -= started * width
        if wanted > started:
            actions += [EndGroup(number) for number, g in idle.items() if g.width != width]
    return actions
