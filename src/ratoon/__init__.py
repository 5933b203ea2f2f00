"""Ratoon forks microVMs: snapshot once, fork in milliseconds, stack diff snapshots into chains.

::

    from ratoon import Sandbox

    with Sandbox.create("base") as sandbox:
        print(sandbox.commands.run("uname -a").stdout)

What is offered here is loaded when it is used: the command line starts without most of it.
"""

# Where things are. Each part sees what is below it (tests/test_structure.py); docs/architecture.md
# goes the way of one page, and of one request, through them.
#
#   cli/                 what a person types; verbs.py lists all verbs
#   bench/               how it is measured; `make demo`
#   client/              the library: aio/ by hand, sync/ made from it by scripts/make_sync.py
#   daemon/              the engine over HTTP: a module of routes for each subject
#   engine/              what is done
#     startup/             images that are run, and started a second time
#     sandbox/             bases, fork, branch, standby, reset; engine.py is the front door
#     sources/             where images come from
#   machine/             what runs
#     host/ volumes/       limits and admission; directories of the host
#     guest/ vmm/          the agent in the guest and how one talks to it; QEMU
#     network/             what a guest reaches
#   store/               what lies on disk
#     check/ pack/         is it sound; a chain in one file
#     snapshot/            manifest, staging, the store itself
#     memory/ disk/        pages, digests, images; qcow2, ext4
#   jail/                how programs are started that read what strangers have written
#   api/                 what the daemon answers and the client reads
#   errors.py            every error, its exit code and its HTTP status
#   files.py …           durable writes, locks; paths, units, documents, system calls

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ratoon.api.answers import EvalResult, SandboxInfo
    from ratoon.api.files import FileEvent, FileInfo
    from ratoon.api.snapshots import SnapshotInfo
    from ratoon.client.aio.client import AsyncClient, AsyncSandbox
    from ratoon.client.aio.commands import AsyncCommand
    from ratoon.client.output import CommandResult, Output
    from ratoon.client.sync.client import Client, Sandbox
    from ratoon.client.sync.commands import Command
    from ratoon.errors import CommandFailed, Conflict, NotFound, RatoonError, Unreachable
    from ratoon.version import __version__

__all__ = [
    "AsyncClient",
    "AsyncCommand",
    "AsyncSandbox",
    "Client",
    "Command",
    "CommandFailed",
    "CommandResult",
    "Conflict",
    "EvalResult",
    "FileEvent",
    "FileInfo",
    "NotFound",
    "Output",
    "RatoonError",
    "Sandbox",
    "SandboxInfo",
    "SnapshotInfo",
    "Unreachable",
    "__version__",
]

_HOMES = {
    **dict.fromkeys(("EvalResult", "SandboxInfo"), "api.answers"),
    **dict.fromkeys(("FileEvent", "FileInfo"), "api.files"),
    "SnapshotInfo": "api.snapshots",
    **dict.fromkeys(("AsyncClient", "AsyncSandbox"), "client.aio.client"),
    "AsyncCommand": "client.aio.commands",
    **dict.fromkeys(("Client", "Sandbox"), "client.sync.client"),
    "Command": "client.sync.commands",
    **dict.fromkeys(("CommandResult", "Output"), "client.output"),
    **dict.fromkeys(
        ("CommandFailed", "Conflict", "NotFound", "RatoonError", "Unreachable"), "errors"
    ),
    "__version__": "version",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"ratoon.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
