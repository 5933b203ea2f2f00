"""Scripts that are longer than the kernel lets an argument be."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from channel_on_host import Guest, guest_on_host

from ratoon.machine.guest import commands

#: An argument of the kernel's (MAX_ARG_STRLEN).
ARGUMENT = 128 * 1024


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    async with guest_on_host() as guest:
        yield guest


async def result_of(guest: Guest, *argv: str) -> tuple[int, str, str | None]:
    result = await commands.exec(guest.channel, [*argv], timeout=60)
    return result.exit_code, result.stdout.decode(errors="surrogateescape"), result.error


@pytest.mark.parametrize("shell", [("sh", "-c"), ("/bin/bash", "-ec"), ("dash", "-c")])
@pytest.mark.parametrize("filling", ["x", "€", "\udcff"])
async def test_a_script_of_megabytes(guest: Guest, shell: tuple[str, ...], filling: str) -> None:
    long = filling * 4 * ARGUMENT
    script = f'text=\'{long}\'\nprintf \'%s|\' "$0" "$@" "${{ratoon_script-}}" "$text"; exit 7'
    for others, named in ((), f"{shell[0]}|"), (("me", "1 2", "3"), "me|1 2|3|"):
        assert await result_of(guest, *shell, script, *others) == (7, f"{named}|{long}|", None)


async def test_who_takes_no_script_says_what_to_do(guest: Guest) -> None:
    for argv in (["echo", "x" * ARGUMENT], ["sh", "-c", "true", "x" * ARGUMENT]):
        code, out, error = await result_of(guest, *argv)
        assert (code, out) == (126, "")
        assert error is not None
        assert "too long (of one 128 KiB, of all 2 MiB): give it more in a file" in error
    assert (await result_of(guest, "sh", "-c", "x" * ARGUMENT * 20))[0] == 126
