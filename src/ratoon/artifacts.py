"""Things that are built once: downloads, the guest's kernel and initramfs, root images.

Each lives in a directory of the cache named after the digest of its inputs, together with those
inputs as readable JSON. Same inputs, same directory; a change of any input builds a new one and
leaves the old one alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from ratoon import files, paths
from ratoon.errors import HostError, ProgramFailed

Progress = Callable[[str], None]


def silent(message: str) -> None:
    """The Progress of those who want to hear nothing."""


def build_once(
    kind: str,
    inputs: Mapping[str, Any],
    build: Callable[[Path], None],
    progress: Progress = silent,
) -> Path:
    """The directory that `build(directory)` fills from `inputs`, made now if it is not there yet.

    Published atomically, under a lock: of many that ask at once, one builds and the others wait.
    """
    document = json.dumps(inputs, indent=2, sort_keys=True).encode()
    key = blake3(document).hexdigest()[:24]
    target = paths.cache() / kind / key
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    with files.locked(target.with_name(f".{key}.lock")):
        if target.is_dir():
            return target
        progress(f"building {kind}")
        staging = target.with_name(f".{key}.tmp")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(mode=0o755)
        try:
            build(staging)
            (staging / "inputs.json").write_bytes(document)
            files.fsync_tree(staging)
            staging.rename(target)
            files.fsync_path(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def require_exec(directory: Path) -> None:
    """HostError: programs in `directory`, which is of the cache, cannot be run."""
    if os.statvfs(directory).f_flag & os.ST_NOEXEC:
        raise HostError(
            f"no program can be run in {directory}, as its file system is mounted with `noexec`: "
            "set RATOON_CACHE to a directory elsewhere"
        )


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    stdin: bytes = b"",
    inherited: Collection[int] = (),
) -> bytes:
    """Run a host program and return its stdout. ProgramFailed; HostError: it is not there.

    `inherited`: descriptors that it has besides.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=cwd, input=stdin, capture_output=True, check=False, pass_fds=inherited
        )
    except FileNotFoundError:
        raise HostError(f"{name} is not installed; `ratoon setup` says how to have it") from None
    if done.returncode:
        raise ProgramFailed.of(name, done.returncode, done.stderr)
    return done.stdout
