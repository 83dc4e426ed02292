"""The board as an object of this process: who waits is woken, nothing is given out twice."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from bench.run.mailbox import Board

SHORT_S, LONG_S = 0.02, 30.0


def task(key: str) -> Any:
    return SimpleNamespace(key=key)


def test_a_group_that_waits_gets_what_is_offered_then() -> None:
    async def meet() -> tuple[Any, Any]:
        board = Board()
        taken = asyncio.create_task(board.take(1, LONG_S))
        news = asyncio.create_task(board.drain(LONG_S))
        await asyncio.sleep(0)
        await board.offer([(task("a"), 0), (task("b"), 0)], set())
        return await taken, await news

    found, news = asyncio.run(meet())
    assert found.key == "a"
    assert news == [("a", {"state": "taken", "group": 1})]


def test_what_was_taken_is_not_given_out_again_but_for_another_try() -> None:
    async def twice() -> list[Any]:
        board = Board()
        found = []
        for number in (0, 0, 1):  # the driver had not heard of it; then its worker died
            await board.offer([(task("a"), number)], set())
            found.append(await board.take(1, SHORT_S))
        return found

    first, second, third = asyncio.run(twice())
    assert first is not None
    assert second is None
    assert third is not None


def test_a_group_is_sent_home_when_its_patience_ends_when_retired_and_when_all_is_over() -> None:
    async def leave() -> list[Any]:
        board = Board()
        found = [await board.take(1, SHORT_S)]
        waiting = asyncio.create_task(board.take(1, LONG_S))
        await asyncio.sleep(0)
        await board.offer([(task("a"), 0)], {1})
        found.append(await waiting)
        assert (await board.take(2, LONG_S)).key == "a"
        waiting = asyncio.create_task(board.take(2, LONG_S))
        await asyncio.sleep(0)
        await board.close()
        return [*found, await waiting]

    assert asyncio.run(leave()) == [None, None, None]


def test_steps_wake_nobody_and_are_told_with_the_next_news() -> None:
    async def steps() -> tuple[Any, Any]:
        board = Board()
        await board.report("a", {"state": "step"})
        waiting = asyncio.create_task(board.drain(LONG_S))
        await asyncio.sleep(SHORT_S)
        early = waiting.done()
        await board.report("a", {"state": "complete"})
        return early, [event["state"] for _, event in await waiting]

    assert asyncio.run(steps()) == (False, ["step", "complete"])


def test_a_trial_hears_when_all_its_stages_have_ended_or_one_has_failed() -> None:
    async def trial(*told: dict[str, str]) -> dict[str, str]:
        board = Board()
        await board.want(["a", "b"])
        waiting = asyncio.create_task(board.outcomes(["a", "b"]))
        for part in told:
            await asyncio.sleep(0)
            assert not waiting.done()
            await board.settle(part)
        return await waiting

    good = {"a": "complete", "b": "complete", "c": "complete"}
    assert asyncio.run(trial({"a": "complete"}, {"b": "complete", "c": "complete"})) == {
        key: good[key] for key in "ab"
    }
    assert asyncio.run(trial({"b": "its loss is not finite"})) == {"b": "its loss is not finite"}
