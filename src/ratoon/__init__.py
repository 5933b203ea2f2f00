"""Ratoon forks microVMs: snapshot once, fork in milliseconds, stack diff snapshots into chains."""

from ratoon.errors import CommandFailed, RatoonError
from ratoon.guest.commands import ExecResult
from ratoon.sandbox.branch import Branched
from ratoon.sandbox.engine import Built, Engine
from ratoon.sandbox.sandbox import Sandbox

__version__ = "0.1.0"

__all__ = [
    "Branched",
    "Built",
    "CommandFailed",
    "Engine",
    "ExecResult",
    "RatoonError",
    "Sandbox",
    "__version__",
]
