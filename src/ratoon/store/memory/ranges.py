"""Runs: stretches of consecutive page numbers, moved by one system call each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def run_bounds(numbers: NDArray[np.uint64] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the runs of `numbers`, shape (n,), begin and end: int64, shape (runs + 1,).

    Run `i` is `numbers[bounds[i]:bounds[i + 1]]`, in which each number is its predecessor plus 1.
    """
    if not len(numbers):
        return np.zeros(1, np.int64)
    breaks = np.flatnonzero(numbers[1:] != numbers[:-1] + 1) + 1
    return np.concatenate(([0], breaks, [len(numbers)]))
