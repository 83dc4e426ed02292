"""The board: a Ray actor between the driver, the worker groups and the trials of a search.

A module of its own, because the actor's process need not import torch.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.run.worker import Task


class Board:
    """Where the driver lays out stages and workers take them and tell how they go.

    Whoever waits for something is told at once: nobody needs to ask again and again.
    """

    def __init__(self) -> None:
        self.offers: list[tuple[Task, int]] = []
        self.taken: set[tuple[str, int]] = set()
        self.retired: set[int] = set()
        self.closed = False
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.ended: dict[str, str] = {}
        self._moved = asyncio.Condition()

    async def _move(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    async def _until(self, given: Callable[[], bool], patience_s: float | None = None) -> None:
        async with self._moved:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait_for(given), patience_s)

    async def offer(self, offers: list[tuple[Task, int]], retired: set[int]) -> None:
        """Replace what is on offer, the most pressing first, each with the number of its try.

        What was taken once is not given out again under the same number: the driver may not have
        heard of it yet. Groups in `retired` get nothing more.
        """
        self.offers = [
            (task, number) for task, number in offers if (task.key, number) not in self.taken
        ]
        self.retired = retired
        await self._move()

    async def take(self, group: int, patience_s: float) -> Task | None:
        """The next stage for a group, waited for; None where it should end."""

        def dismissed() -> bool:
            return self.closed or group in self.retired

        await self._until(lambda: bool(self.offers) or dismissed(), patience_s)
        if dismissed() or not self.offers:
            return None
        task, number = self.offers.pop(0)
        self.taken.add((task.key, number))
        await self.report(task.key, {"state": "taken", "group": group})
        return task

    async def close(self) -> None:
        """Nothing more is given out; idle groups end at once."""
        self.closed = True
        await self._move()

    async def report(self, key: str, event: dict[str, Any]) -> None:
        self.events.append((key, event))
        if event["state"] != "step":  # those can wait
            await self._move()

    async def want(self, keys: list[str]) -> None:
        """A trial asks the driver to run these stages."""
        self.events.extend((key, {"state": "wanted"}) for key in keys)
        await self._move()

    async def settle(self, ended: dict[str, str]) -> None:
        """The driver tells how stages ended."""
        self.ended.update(ended)
        await self._move()

    async def outcomes(self, keys: list[str]) -> dict[str, str]:
        """How `keys` ended, waited for until all have or one has failed."""

        def known() -> dict[str, str]:
            return {key: self.ended[key] for key in keys if key in self.ended}

        await self._until(
            lambda: len(known()) == len(keys) or any(how != "complete" for how in known().values())
        )
        return known()

    async def drain(self, patience_s: float) -> list[tuple[str, dict[str, Any]]]:
        """What was reported since the last call, waited for if it is nothing but steps."""
        await self._until(lambda: any(e["state"] != "step" for _, e in self.events), patience_s)
        events, self.events = self.events, []
        return events
