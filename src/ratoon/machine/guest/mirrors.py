"""Where Debian's packages are fetched from, by HTTP, whatever distribution this host is of.

Asked in this order, until one has the file:

1. the mirror that `RATOON_MIRROR` names;
2. those that this host's apt takes Debian from, as its sources say (sources.list(5));
3. Debian's own, `deb.debian.org`;
4. the archive of all that has ever been in Debian, `snapshot.debian.org`, as it was a day after the
   packages were chosen: from mirrors, versions go that a later one has taken the place of.

No apt is run, and no signature is looked at: what comes must have the digest that is asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from itertools import count
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ratoon.artifacts import Progress
from ratoon.errors import HostError, InvalidInput
from ratoon.version import __version__

#: The archive of security updates is one of its own, which mirrors have beside the other.
ARCHIVE, SECURITY = "debian", "debian-security"
DEBIAN = "http://deb.debian.org"
SNAPSHOT = "https://snapshot.debian.org/archive"
APT = Path("/etc/apt")
#: What guests are built of.
RELEASE = "bookworm"
#: Debian's releases have these names. A mirror has one pool of packages for all of them.
_SUITE = re.compile(
    r"(bookworm|trixie|forky|duke|sid|(old)*stable|testing|unstable)"
    r"(?P<security>-security|/updates)?(-updates|-backports|-proposed-updates)?/?"
)
#: Seconds that a server may be silent.
TIMEOUT = 20
#: How often one is asked that fails, and the seconds in between, each time as long again.
TRIES, PAUSE = 3, 0.5


def mirrors(archive: str, date: str) -> list[str]:
    """The addresses below which `archive` is, each once, in the order in which they are asked.

    `date`: of the state that `snapshot.debian.org` is asked for, as it writes it. InvalidInput:
    the environment names something else than a mirror.
    """
    found = [*_named(archive), *host_mirrors(archive)]
    return [*dict.fromkeys((*found, f"{DEBIAN}/{archive}", f"{SNAPSHOT}/{archive}/{date}"))]


def host_mirrors(archive: str, apt: Path = APT) -> list[str]:
    """Those that this host's apt takes Debian's `archive` from; none where it has no apt."""
    found = []
    for uri, suite in _sources(apt):
        known = _SUITE.fullmatch(suite)
        if known and (SECURITY if known["security"] else ARCHIVE) == archive:
            found.append(uri.rstrip("/"))
    return [*dict.fromkeys(each for each in found if urlsplit(each).scheme in ("http", "https"))]


def named_indexes(apt: Path = APT) -> list[str]:
    """The signed indexes of all that the environment and this host's apt name, whole suites first.

    Also of other distributions than Debian, and of whoever else has packages for this host.
    """
    found = [(address, RELEASE) for address in _named(ARCHIVE)]
    found += sorted(_sources(apt), key=lambda source: "-" in source[1])
    return [f"{address.rstrip('/')}/dists/{suite}/InRelease" for address, suite in found]


def fetch(
    path: str, *, sha256: str, size: int, addresses: Sequence[str], progress: Progress
) -> bytes:
    """The file that mirrors have at `path`, whole and verified. HostError: none of them has it.

    `addresses`: of the mirrors. `size` is in bytes; no more is taken from anybody.
    """
    troubles = []
    for address in addresses:
        found = _ask(f"{address}/{path}", sha256, size, progress)
        if isinstance(found, bytes):
            return found
        troubles.append(f"{address}: {found}")
        progress(f"{troubles[-1]}; going on without it")
    name = path.rpartition("/")[2]
    raise HostError(f"{name} could not be fetched; {'; '.join(troubles)}")


def _ask(url: str, sha256: str, size: int, progress: Progress) -> bytes | str:
    """What is there; or why it cannot be had, after as many tries as make sense."""
    for attempt in count(1):
        again = attempt < TRIES
        try:
            return _download(url, sha256, size)
        except HTTPError as error:
            error.close()
            trouble, again = f"HTTP {error.code}", again and error.code >= 500
        except URLError as error:
            trouble = getattr(error.reason, "strerror", None) or str(error.reason)
        except (OSError, HTTPException, EOFError) as error:
            trouble = str(error) or repr(error)
        if not again:
            return trouble
        progress(f"{url}: {trouble}; trying again")
        time.sleep(PAUSE * attempt)
    raise AssertionError


def _download(url: str, sha256: str, size: int) -> bytes:
    """EOFError: what comes is something else."""
    request = Request(url, headers={"User-Agent": f"ratoon/{__version__}"})
    with urlopen(request, timeout=TIMEOUT) as answer:
        content: bytes = answer.read(size + 1)
    if len(content) < size:
        raise EOFError(f"it broke off after {len(content)} of {size} bytes")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise EOFError(f"it has not the SHA-256 {sha256}")
    return content


def _named(archive: str) -> list[str]:
    """The mirror that the environment names; `archive` is there beside that of packages."""
    address = os.environ.get("RATOON_MIRROR", "").rstrip("/")
    if not address:
        return []
    if not re.fullmatch(rf"https?://.+/{ARCHIVE}", address):
        raise InvalidInput(
            f"RATOON_MIRROR is {address!r} and not the address of a mirror of Debian's, such as "
            f"{DEBIAN}/{ARCHIVE}"
        )
    return [address.removesuffix(ARCHIVE) + archive]


def _sources(apt: Path) -> Iterator[tuple[str, str]]:
    """Each address with each suite that is taken from it, as the files in `apt` say."""
    for path in (apt / "sources.list", *sorted(apt.glob("sources.list.d/*"))):
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue  # there is none, or not for us to read
        if path.suffix == ".list":
            yield from _one_line_sources(text)
        elif path.suffix == ".sources":
            yield from _deb822_sources(text)


def _one_line_sources(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        words = re.sub(r"\[[^]]*\]", "", line.partition("#")[0]).split()
        if len(words) >= 3 and words[0] == "deb":
            yield words[1], words[2]


def _deb822_sources(text: str) -> Iterator[tuple[str, str]]:
    for stanza in re.split(r"\n\s*\n", "\n".join(_without_comments(text))):
        # A line that begins with a space belongs to the field before it.
        unfolded = re.sub(r"\n[ \t]+", " ", stanza)
        fields = dict(re.findall(r"(?m)^([\w-]+):[ \t]*(.*)$", unfolded))
        fields = {name.lower(): value.split() for name, value in fields.items()}
        if "deb" in fields.get("types", []) and fields.get("enabled", ["yes"]) != ["no"]:
            for uri in fields.get("uris", []):
                yield from ((uri, suite) for suite in fields.get("suites", []))


def _without_comments(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if not line.startswith("#"))
