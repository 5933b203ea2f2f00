"""`run_alongside`: one thing is waited for, another watched, and neither runs on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ratoon.concurrency import run_alongside


class Actor:
    """A coroutine that says when it began and how it ended."""

    def __init__(self) -> None:
        self.ended: str | None = None

    async def play(self, *, after: float = 0, outcome: Any = None) -> Any:
        try:
            await asyncio.sleep(after)
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        self.ended = "done"
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


async def test_the_result_of_main_and_the_other_is_cancelled() -> None:
    other = Actor()
    assert await run_alongside(Actor().play(after=0.01, outcome=7), other.play(after=60)) == 7
    assert other.ended == "cancelled"


async def test_main_goes_on_when_the_other_ends_well() -> None:
    assert await run_alongside(Actor().play(after=0.05, outcome=7), Actor().play()) == 7


async def test_the_error_of_the_other_and_main_is_cancelled() -> None:
    main = Actor()
    with pytest.raises(KeyError):
        await run_alongside(main.play(after=60), Actor().play(outcome=KeyError()))
    assert main.ended == "cancelled"


async def test_the_error_of_main_and_the_other_is_cancelled() -> None:
    other = Actor()
    with pytest.raises(KeyError):
        await run_alongside(Actor().play(outcome=KeyError()), other.play(after=60))
    assert other.ended == "cancelled"


async def test_when_both_end_at_once_main_counts() -> None:
    assert await run_alongside(Actor().play(outcome=7), Actor().play(outcome=KeyError())) == 7
    with pytest.raises(IndexError):
        await run_alongside(Actor().play(outcome=IndexError()), Actor().play(outcome=KeyError()))


async def test_an_error_of_the_other_after_it_was_awaited_is_not_lost() -> None:
    with pytest.raises(KeyError):
        await run_alongside(Actor().play(after=0.05), Actor().play(after=0.01, outcome=KeyError()))


@pytest.mark.parametrize("other_after", [0, 60])
async def test_who_cancels_it_cancels_both(other_after: float) -> None:
    before = asyncio.all_tasks()
    main, other = Actor(), Actor()
    waiting = asyncio.create_task(run_alongside(main.play(after=60), other.play(after=other_after)))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert main.ended == "cancelled"
    assert other.ended == ("cancelled" if other_after else "done")
    assert asyncio.all_tasks() == before


async def test_they_have_ended_when_it_returns() -> None:
    ended = []

    async def slow_to_end() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.02)
            ended.append(True)

    await run_alongside(Actor().play(after=0.01), slow_to_end())
    assert ended
