"""Where things live: the store, the cache and the sockets, as the environment says.

Everything that Ratoon writes is below these three directories. The functions compute paths and make
none of them.
"""

from __future__ import annotations

import os
from pathlib import Path

from blake3 import blake3

from ratoon.errors import InvalidInput

#: `sun_path` holds 108 bytes, the closing NUL included (unix(7)).
_SOCKET_PATH_LIMIT = 107

#: The longest socket name below the runtime directory.
_LONGEST_SOCKET = "/sb-xxxxxxxx-xxxx/999999/volumes"


def home() -> Path:
    """The store: RATOON_HOME, else /var/lib/ratoon for root, else a place of the user's own."""
    return _directory("RATOON_HOME", "/var/lib/ratoon", "XDG_DATA_HOME", ".local/share")


def cache() -> Path:
    """Downloads and built images: RATOON_CACHE, else /var/cache/ratoon, else the user's own."""
    return _directory("RATOON_CACHE", "/var/cache/ratoon", "XDG_CACHE_HOME", ".cache")


def runtime(home: Path) -> Path:
    """The directory for the sockets of the store `home`; two stores never share one.

    RATOON_RUNTIME, else HASH-OF-HOME below /run/ratoon for root and below $XDG_RUNTIME_DIR/ratoon
    (without that, /tmp/ratoon-UID) for others. Who makes it in /tmp must check that they own it.
    InvalidInput: so long that a socket in it could not be bound.
    """
    if named := os.environ.get("RATOON_RUNTIME"):
        directory = Path(named).absolute()
    else:
        digest = blake3(os.fsencode(home.resolve())).hexdigest()[:8]
        directory = _runtime_parent() / digest
    excess = len(os.fsencode(directory)) + len(_LONGEST_SOCKET) - _SOCKET_PATH_LIMIT
    if excess > 0:
        raise InvalidInput(
            f"the runtime directory {directory} is {excess} bytes too long for the unix sockets "
            "in it; set RATOON_RUNTIME to a shorter path"
        )
    return directory


def daemon_socket(home: Path) -> Path:
    """Where the daemon of the store `home` listens."""
    return runtime(home) / "daemon.sock"


def daemon_lock(home: Path) -> Path:
    """What that daemon holds from before it listens until after it does; its number is in it."""
    return home / "daemon.lock"


def _directory(variable: str, for_root: str, xdg_variable: str, below_user: str) -> Path:
    if named := os.environ.get(variable):
        return Path(named).absolute()
    if os.geteuid() == 0:
        return Path(for_root)
    if xdg := os.environ.get(xdg_variable):
        return Path(xdg).absolute() / "ratoon"
    return Path.home() / below_user / "ratoon"


def _runtime_parent() -> Path:
    if os.geteuid() == 0:
        return Path("/run/ratoon")
    if xdg := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(xdg).absolute() / "ratoon"
    return Path(f"/tmp/ratoon-{os.geteuid()}")
