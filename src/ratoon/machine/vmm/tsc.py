"""The rate of the host's time stamp counter.

Under TCG the guest's TSC is the host's, and the kernel's own calibration against emulated timers
fails in one boot of four; it is told the rate instead (`tsc_early_khz`). A device state is bound to
the rate it was saved at.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import time
from functools import cache

from ratoon.errors import HostError

#: rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")

#: Two measurements of one host differ by a few parts per million, two rates by far more.
TOLERANCE = 1e-3


@cache
def host_tsc_khz() -> int:
    """Kilohertz, measured against the monotonic clock within 50 ms, once a process."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError as error:
        raise HostError(f"cannot map executable memory to read the TSC: {error}") from None
    page.write(_RDTSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    return round(statistics.median(_measure(rdtsc) for _ in range(5)))


def _measure(rdtsc: ctypes._CFunctionType) -> float:
    first_ns, first = _simultaneous(rdtsc)
    time.sleep(0.01)
    last_ns, last = _simultaneous(rdtsc)
    return float(last - first) * 1e6 / (last_ns - first_ns)


def _simultaneous(rdtsc: ctypes._CFunctionType) -> tuple[float, int]:
    """Both clocks at one moment: the TSC in the narrowest of some pairs of looks at the other.

    On a busy host a single pair is torn apart often enough to look like another rate.
    """
    clock = time.CLOCK_MONOTONIC_RAW
    looks = [
        (time.clock_gettime_ns(clock), rdtsc(), time.clock_gettime_ns(clock)) for _ in range(20)
    ]
    before, tsc, after = min(looks, key=lambda look: look[2] - look[0])
    return (before + after) / 2, tsc


def same_rate(one_khz: int, other_khz: int) -> bool:
    return abs(one_khz - other_khz) <= TOLERANCE * one_khz
