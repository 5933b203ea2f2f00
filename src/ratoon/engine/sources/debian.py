"""The images `debian[:SUITE][+PACKAGE…]`: built here by mmdebstrap."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ratoon.artifacts import Progress, build_once, run
from ratoon.engine.sources import furnish
from ratoon.engine.sources.disk import FILE_SYSTEM
from ratoon.engine.sources.image import Image
from ratoon.engine.sources.remembered import recall, remember
from ratoon.errors import HostError, InvalidInput, NotFound
from ratoon.jail.user_namespace import free_ids
from ratoon.store.disk.flatten import from_raw
from ratoon.store.snapshot.image_config import ImageConfig

SUITE = "bookworm"
#: Those of which Debian 12's keyring has the keys.
SUITES = ("bullseye", "bookworm", "trixie")
PACKAGES = ("python3", "iproute2", "ca-certificates")
TEXTS = {name: text for name, text in furnish.TEXTS.items() if name != "etc/hosts"}

_REFERENCE = re.compile(r"debian(?::(?P<suite>[^+/@]*))?(?P<packages>(?:\+[^/@]*)?)")
#: Debian Policy, section 5.6.7.
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
#: Names may have a `+` in them, such as g++ and libstdc++6.
_SEPARATOR = re.compile(r"(?<!\+)\+(?=[a-z0-9])|\+(?=[a-z])")


@dataclass(frozen=True)
class Debian:
    """A Debian to be built: a suite, and packages besides those that every one has, sorted."""

    suite: str
    packages: tuple[str, ...]

    @classmethod
    def parse(cls, reference: str) -> Debian | None:
        """None: the reference is to an image of another kind.

        InvalidInput: no package can have such a name. NotFound: there is no such suite.
        """
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            return None
        suite = SUITE if match["suite"] is None else match["suite"]
        if suite not in SUITES:
            raise NotFound(
                f"no Debian suite {suite!r} to build {reference} from; there are: "
                f"{', '.join(SUITES)} (the image of a registry is docker.io/library/debian)"
            )
        _, *packages = _SEPARATOR.split(match["packages"]) if match["packages"] else [""]
        for name in packages or ["+"] * bool(match["packages"]):
            if not _PACKAGE.fullmatch(name):
                raise InvalidInput(f"{reference}: {name!r} cannot be the name of a package")
        return cls(suite, tuple(sorted({*packages} - {*PACKAGES})))

    @property
    def name(self) -> str:
        return "+".join((f"debian:{self.suite}", *self.packages))

    @property
    def inputs(self) -> dict[str, Any]:
        """What its root file system is made of."""
        return {"suite": self.suite, "packages": (*PACKAGES, *self.packages), "texts": TEXTS}

    @property
    def _original(self) -> str:
        """The digest of its first edition: the one of before any refresh."""
        return _digest(self.inputs)

    def resolve(self, *, refresh: bool, roots: Sequence[Path] | None, progress: Progress) -> Image:
        """See `resolve.resolve`. A refresh makes a new edition, of the packages there are now."""
        original = self._original
        if not refresh:
            return recall(self.name, original) or Image(self.name, original, ImageConfig())
        edition = _digest({"original": original, "unix_ns": time.time_ns()})
        image = Image(self.name, edition, ImageConfig())
        remember(image, original)
        return image

    def root_disk(
        self, image: Image, disk_bytes: int, roots: Sequence[Path] | None, progress: Progress
    ) -> Path:
        """See `resolve.root_disk`. NotFound: there is no such package."""
        edition = {} if image.digest == self._original else {"edition": image.digest}
        inputs = {
            "format": 1,
            **self.inputs,
            **edition,
            "disk_bytes": disk_bytes,
            "file_system": FILE_SYSTEM,
        }

        def build(directory: Path) -> None:
            if not free_ids():
                raise HostError(
                    f"the image {self.name} is made of files of several users, and there is one "
                    "here: `ratoon doctor` says how to have more. Images of registries, archives "
                    "and directories do without"
                )
            root, raw = directory / "root", directory / "disk.raw"
            progress(f"building the root image {self.name} with mmdebstrap (half a minute)")
            self._fill(root)
            raw.touch()
            os.truncate(raw, disk_bytes)
            run(["mke2fs", "-q", "-F", *FILE_SYSTEM, "-d", root, raw])
            from_raw(raw, directory / "disk.qcow2")
            raw.unlink()
            shutil.rmtree(root)

        return build_once("root-images", inputs, build, progress) / "disk.qcow2"

    def _fill(self, root: Path) -> None:
        include = ",".join((*PACKAGES, *self.packages))
        try:
            run(["mmdebstrap", "--variant=minbase", f"--include={include}", self.suite, root])
        except HostError as error:
            missing = re.search(r"Unable to locate package (\S+)", str(error))
            if missing is None:
                raise
            raise NotFound(f"Debian {self.suite} has no package {missing[1]}") from None
        for name, text in TEXTS.items():
            (root / name).unlink(missing_ok=True)  # mmdebstrap copies some from the host
            (root / name).write_text(text)
        for name in ("proc", "sys", "dev", "run", "tmp"):
            (root / name).mkdir(exist_ok=True)


def _digest(document: dict[str, Any]) -> str:
    return f"blake3:{blake3(json.dumps(document, sort_keys=True).encode()).hexdigest()}"
