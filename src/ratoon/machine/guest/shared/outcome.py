"""How code ended that was evaluated, as the interpreter tells the agent, and that the host."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def read_outcome(said: dict[str, Any]) -> dict[str, Any]:
    """All fields of an outcome, of one that may be anything; ValueError: it has no exit code.

    What is neither text nor a truth is as if it had not been said.
    """
    exit_code = said.get("exit_code")
    if type(exit_code) is not int or not 0 <= exit_code <= 255:
        raise ValueError("no exit code")
    texts = {name: said.get(name) for name in ("result", "reason")}
    return {
        "exit_code": exit_code,
        **{name: text if isinstance(text, str) else None for name, text in texts.items()},
        **{name: said.get(name) is True for name in ("timed_out", "state_lost", "truncated")},
    }
