"""Whether a guest is at work though nobody has asked it for anything, as the host sees it.

Its processor time is QEMU's, and its network a counter of QEMU's: the guest is not woken. Even an
idle one does something now and then, so there is an allowance for each, which a guest that only
waits never uses up. Under emulation, which is dearer by far than KVM, one took 0.5 % of a
processor, and a server that looks around twenty times a second 2 %, with bursts of 65 ms.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from ratoon.errors import MachineError, RatoonError
from ratoon.machine.guest import commands
from ratoon.machine.guest.channel import Channel
from ratoon.machine.vmm.driver import PACKETS_WRAP, Machine

#: What may be used in each second, and at once on top of that: seconds of a processor, and packets.
PROCESSOR, PROCESSOR_AT_ONCE = 0.05, 0.25
PACKETS, PACKETS_AT_ONCE = 1.0, 10.0
#: Seconds between looks at what has to be asked for; an agent that does not answer for so long is
#: at work.
LEISURE = 5.0


class Allowance:
    """What may be used of something, of which a counter tells how much was used so far."""

    def __init__(self, per_second: float, at_once: float) -> None:
        self._per_second, self._at_once = per_second, at_once
        self._level = 0.0
        self._before: tuple[float, float] | None = None

    def is_used_up(self, counter: float, now: float, within: float) -> bool:
        """Whether more than that was used, as `counter` says at `now` (seconds).

        In less than `within` seconds, who uses more than what is for each of them has used it up.
        """
        before, self._before = self._before, (counter, now)
        if before is None:
            return False
        self._level += counter - before[0] - self._per_second * (now - before[1])
        at_once = min(self._at_once, self._per_second * within)
        self._level = min(max(self._level, 0.0), at_once)
        return self._level >= at_once


class Activity:
    """Of one machine, which is looked at from time to time."""

    def __init__(self, machine: Machine, channel: Channel) -> None:
        self._machine, self._channel = machine, channel
        self._processor = Allowance(PROCESSOR, PROCESSOR_AT_ONCE)
        self._packets = Allowance(PACKETS, PACKETS_AT_ONCE)
        self._packet_count = 0
        self._next_look = 0.0

    async def uses_something(self, within: float, *, online: bool) -> bool:
        """Whether it uses the processor or, where it is `online`, the network.

        It is asked more than once `within` so many seconds.
        """
        now = time.monotonic()
        with suppress(OSError):  # it is gone
            if self._processor.is_used_up(_processor_seconds(self._machine.pid), now, within):
                return True
        if not online or not self._is_time(now, within):
            return False
        try:
            packets = await self._machine.packets()
        except MachineError:
            return False
        self._packet_count += (packets - self._packet_count) % PACKETS_WRAP
        return self._packets.is_used_up(self._packet_count, now, within)

    async def runs_commands(self, within: float) -> bool:
        """Whether a command runs in it that was started from outside; asked as the other."""
        if not self._is_time(time.monotonic(), within):
            return False
        try:
            async with asyncio.timeout(LEISURE):
                found = await commands.processes(self._channel)
        except TimeoutError:
            return True
        except RatoonError:
            return False
        return any(each.exit_code is None for each in found)

    def _is_time(self, now: float, within: float) -> bool:
        if now < self._next_look:
            return False
        self._next_look = now + min(LEISURE, within / 4)
        return True


def _processor_seconds(pid: int) -> float:
    """What all threads of a process have used, to the nanosecond: clock_getcpuclockid(3)."""
    return time.clock_gettime_ns(~pid << 3 | 2) / 1e9
