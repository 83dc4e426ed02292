"""The mailbox as an object of this process: who waits is woken, and gets what is meant for it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from bench.run.mailbox import Alive, Ended, Mailbox, Stepped, Waiting

SHORT_S, LONG_S = 0.02, 30.0
ALIVE = Alive(1, "process 7 on here")
STEP = Stepped("a", 1, 2, 0, 0.5, 10.0)


def task(key: str) -> Any:
    return SimpleNamespace(key=key)


def test_a_group_that_waits_gets_what_is_left_for_it() -> None:
    async def meet() -> tuple[Any, Any, Any]:
        mailbox = Mailbox()
        one, two = (asyncio.create_task(mailbox.take(group)) for group in (1, 2))
        await asyncio.sleep(0)
        news = await mailbox.events(LONG_S)
        await mailbox.give(2, task("b"))
        await mailbox.give(1, task("a"))
        return await one, await two, news

    one, two, news = asyncio.run(meet())
    assert (one.key, two.key) == ("a", "b")
    assert news == [Waiting(1), Waiting(2)]


def test_what_was_left_before_is_there_when_asked_for() -> None:
    async def early() -> Any:
        mailbox = Mailbox()
        await mailbox.give(1, task("a"))
        return await mailbox.take(1)

    assert asyncio.run(early()).key == "a"


def test_a_group_is_sent_home_when_told_and_when_all_is_over() -> None:
    async def leave() -> list[Any]:
        mailbox = Mailbox()
        told = asyncio.create_task(mailbox.take(1))
        await asyncio.sleep(0)
        await mailbox.give(1, None)
        over = asyncio.create_task(mailbox.take(2))
        await asyncio.sleep(0)
        await mailbox.close()
        return [await told, await over, await mailbox.take(3)]

    assert asyncio.run(leave()) == [None, None, None]


def test_steps_and_signs_of_life_wake_nobody_and_are_told_with_the_next_news() -> None:
    async def steps() -> tuple[Any, Any]:
        mailbox = Mailbox()
        await mailbox.tell(STEP)
        await mailbox.tell(ALIVE)
        waiting = asyncio.create_task(mailbox.events(LONG_S))
        await asyncio.sleep(SHORT_S)
        early = waiting.done()
        await mailbox.tell(Ended("a"))
        return early, await waiting

    assert asyncio.run(steps()) == (False, [STEP, ALIVE, Ended("a")])


def test_a_trial_hears_when_all_its_stages_have_ended_or_one_has_failed() -> None:
    async def trial(*told: tuple[str, str]) -> dict[str, str]:
        mailbox = Mailbox()
        waiting = asyncio.create_task(mailbox.outcomes(["a", "b"]))
        for key, how in told:
            await asyncio.sleep(0)
            assert not waiting.done()
            await mailbox.settle(key, how)
        return await waiting

    good = {"a": "complete", "b": "complete"}
    assert asyncio.run(trial(("c", "complete"), *good.items())) == good
    failed = "its loss is not finite"
    assert asyncio.run(trial(("b", failed))) == {"b": failed}
