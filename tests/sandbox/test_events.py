"""What is told to whom: those who listen, and those who begin to while something is being made."""

from __future__ import annotations

from ratoon.engine.sandbox.events import Events, Listener


async def heard(events: Events, listener: Listener) -> list[str | None]:
    """The reasons of what was told so far."""
    events.tell("progress", reason="the end")
    reasons = []
    while (event := await listener.next()) and event.reason != "the end":
        reasons.append(event.reason)
    return reasons


async def test_who_comes_late_hears_the_last_progress_of_what_is_being_made() -> None:
    events = Events()
    with events.making("a") as tell_a, events.making("b") as tell_b, events.making("silent"):
        tell_a("a one")
        tell_a("a two")
        tell_b("b one")
        with events.listen() as listener:
            tell_b("b two")
            assert await heard(events, listener) == ["a two", "b one", "b two"]


async def test_of_what_has_ended_nobody_hears_any_more() -> None:
    events = Events()
    with events.making("a") as first, events.making("a") as second:
        second("second")
    with events.making("a") as third:
        first("too late")
        with events.listen() as listener:
            first("later still")
            assert await heard(events, listener) == []
            third("third")
            assert await heard(events, listener) == ["third"]
