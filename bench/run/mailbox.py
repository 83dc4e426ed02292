"""The mailbox: a Ray actor between the driver, the worker groups and the trials of a search.

A module of its own, because the actor's process need not import torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

from bench.plan.stage import Stage


@dataclass(frozen=True)
class Waiting:
    """A group asks for a stage."""

    group: int


@dataclass(frozen=True)
class Began:
    """A worker has begun a stage."""

    key: str


@dataclass(frozen=True)
class Stepped:
    """How far a training stage is."""

    key: str
    step: int
    steps: int
    epoch: int
    #: NaN while none was read: a GPU is not asked after each step
    loss: float
    images_per_s: float

    def __str__(self) -> str:
        """Return "40/200 epoch 3 loss 0.6931 310 images/s"."""
        loss = "" if math.isnan(self.loss) else f" loss {self.loss:.4f}"
        return f"{self.step}/{self.steps} epoch {self.epoch}{loss} {self.images_per_s:.0f} images/s"


@dataclass(frozen=True)
class Ended:
    """A stage has left its record; `problem` says why it failed, if it did."""

    key: str
    problem: str | None = None
    #: number of the rung, from 1, at which it stopped; 0: it went on to its end
    rung: int = 0


@dataclass(frozen=True)
class Wanted:
    """A trial of a search asks for stages; of the last one as far as a rung unless that is 0."""

    keys: tuple[str, ...]
    rung: int = 0


@dataclass(frozen=True)
class Alive:
    """A worker of a group says that it lives, whatever it works on."""

    group: int
    #: "process 7 on a host"
    worker: str


@dataclass(frozen=True)
class GroupEnded:
    """A worker group is no more; `problem` says why, unless it was told to end."""

    group: int
    problem: str | None
    #: whether another group would end like it
    hopeless: bool = False


Event = Waiting | Began | Stepped | Ended | Wanted | Alive | GroupEnded
#: events that need not be heard at once
_CAN_WAIT = (Stepped, Alive)
#: how a worker leaves an event for the driver
Tell = Callable[[Event], None]


def at_rung(key: str, rung: int) -> str:
    """Return how a stage's way to a rung is named among what ends."""
    return f"{key}@{rung}"


class Mailbox:
    """Where the driver leaves stages for worker groups and reads what they say.

    Whoever waits for something is woken at once: nobody needs to ask again and again.
    """

    def __init__(self) -> None:
        #: group -> the stage left for it, or None where it shall end
        self._left: dict[int, Stage | None] = {}
        self._events: list[Event] = []
        #: key, or key and rung -> "complete", or why the stage did not complete
        self._ended: dict[str, str] = {}
        self._closed = False
        self._moved = asyncio.Condition()

    async def give(self, group: int, stage: Stage | None) -> None:
        """Leave a stage for a group; None ends the group."""
        self._left[group] = stage
        await self._wake()

    async def take(self, group: int) -> Stage | None:
        """Return the next stage for a group, waited for; None where the group shall end."""
        await self.tell(Waiting(group))
        await self._until(lambda: self._closed or group in self._left)
        return None if self._closed else self._left.pop(group)

    async def close(self) -> None:
        """End every group that waits or asks later."""
        self._closed = True
        await self._wake()

    async def tell(self, event: Event) -> None:
        """Leave an event for the driver."""
        self._events.append(event)
        await self._wake()

    async def events(self, patience_s: float) -> list[Event]:
        """Return what was told since the last call, waited for if nothing is urgent."""
        await self._until(
            lambda: any(not isinstance(event, _CAN_WAIT) for event in self._events), patience_s
        )
        found, self._events = self._events, []
        return found

    async def settle(self, key: str, how: str) -> None:
        """Tell the trials how a stage ended: "complete", or why not."""
        self._ended[key] = how
        await self._wake()

    async def outcomes(self, keys: list[str]) -> dict[str, str]:
        """Return how `keys` ended, waited for until all have or one has failed."""
        known: dict[str, str] = {}

        def enough() -> bool:
            known.update((key, self._ended[key]) for key in keys if key in self._ended)
            return len(known) == len(keys) or any(how != "complete" for how in known.values())

        await self._until(enough)
        return known

    async def _wake(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    async def _until(self, given: Callable[[], bool], patience_s: float | None = None) -> None:
        async with self._moved:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait_for(given), patience_s)
