"""OCI images: fetched by skopeo from registries, layouts and archives."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ratoon import files
from ratoon.artifacts import Progress, build_once, run
from ratoon.engine.sources import blobs
from ratoon.engine.sources.config import read_config
from ratoon.engine.sources.disk import FILE_SYSTEM, make_disk
from ratoon.engine.sources.furnish import TEXTS
from ratoon.engine.sources.host_files import held
from ratoon.engine.sources.image import Image
from ratoon.engine.sources.layers import Layers
from ratoon.engine.sources.registry import RegistryName
from ratoon.engine.sources.remembered import recall, remember
from ratoon.errors import Corrupt, HostError, InvalidInput, NotFound, RatoonError, RegistryError
from ratoon.units import MIB

#: Those of skopeo's transports that are files of this host, and what of them tells a change.
LOCAL = {"oci": "index.json", "docker-archive": "", "oci-archive": ""}
#: What a fetch leaves free on the cache's file system.
RESERVE = 512 * MIB
#: What skopeo says of an image that is not there, of a file that holds none, and of credentials.
_ABSENT = ("manifest unknown", "name unknown", "not found", "no descriptor found")
_NO_ARCHIVE = ("loading tar component", "untarring file")
_REFUSED = ("unauthorized", "authentication required", "access to the resource is denied")
_MESSAGE = re.compile(r'level=fatal msg="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class OciImage:
    """One that skopeo can copy; `path` is where a local one lies."""

    name: str
    transport: str
    path: Path | None
    version: str
    plain_http: bool = False

    @classmethod
    def in_registry(cls, reference: str) -> OciImage:
        """InvalidInput: no image can be called that."""
        name = RegistryName.parse(reference.removeprefix("docker://"))
        return cls(str(name), "docker", None, f"//{name}", name.is_here)

    @classmethod
    def on_host(cls, reference: str) -> OciImage | None:
        """What is called `TRANSPORT:PATH[:REFERENCE]`; None: it is of another kind."""
        transport, colon, rest = reference.partition(":")
        if not colon or transport not in LOCAL:
            return None
        place, colon, version = rest.partition(":")
        if not place:
            raise InvalidInput(f"{reference} names no path")
        path = Path(place).absolute()
        return cls(f"{transport}:{path}{colon}{version}", transport, path, colon + version)

    def resolve(self, *, refresh: bool, roots: Sequence[Path] | None, progress: Progress) -> Image:
        """The image, fetched into the cache; see `resolve.resolve`."""
        key = blake3(self.name.encode()).hexdigest()[:24]
        with files.locked(blobs.directory() / f".{key}.lock"), self._held(roots) as path:
            stamp = self._stamp(path) if path else ""
            found = None if refresh else recall(self.name, stamp)
            if found and blobs.is_whole(found.digest):
                return found
            progress(f"fetching {self.name}")
            digest = self._fetch(path, blobs.directory() / f".{key}.tmp")
            image = Image(self.name, digest, read_config(self.name, digest))
            remember(image, stamp)
        return image

    def _stamp(self, path: Path) -> str:
        try:
            return str(files.Stamp.of(path / LOCAL[self.transport], with_ctime=True))
        except OSError as error:
            raise InvalidInput(f"{self.path} is no OCI layout: {error.strerror}") from None

    @contextmanager
    def _held(self, roots: Sequence[Path] | None) -> Iterator[Path | None]:
        if self.path is None:
            yield None
            return
        with held(self.path, roots, directory=self.transport == "oci") as path:
            yield path

    def _fetch(self, path: Path | None, room: Path) -> str:
        """Copy it into the cache, as far as it is not there; the digest of its manifest."""
        shutil.rmtree(room, ignore_errors=True)
        layout = room / "layout"
        layout.mkdir(parents=True)
        (layout / "blobs").symlink_to(blobs.directory() / "blobs")
        try:
            self._copy(path, layout, room)
            index = blobs.parse((layout / "index.json").read_bytes(), self.name)
            return str(index["manifests"][0]["digest"])
        finally:
            shutil.rmtree(room, ignore_errors=True)

    def _copy(self, path: Path | None, layout: Path, room: Path) -> None:
        free = os.statvfs(room).f_bavail * os.statvfs(room).f_frsize
        if not shutil.which("skopeo"):
            raise HostError("skopeo is not installed; `ratoon setup` says how to have it")
        # So that a blob without end does not fill the disk; and nothing goes on alone.
        limit = ["setpriv", "--pdeathsig=KILL", "prlimit", f"--fsize={max(free - RESERVE, MIB)}"]
        options = ["--tmpdir", str(room), "--override-os", "linux", "--override-arch", "amd64"]
        insecure = ["--src-tls-verify=false"] if self.plain_http else []
        copy = ["copy", "--quiet", "--dest-oci-accept-uncompressed-layers", *insecure]
        source = f"{self.transport}:{path or ''}{self.version}"
        try:
            run([*limit, "skopeo", *options, *copy, source, f"oci:{layout}:image"])
        except HostError as error:
            # The name by which a file is held says nothing to who named it.
            raise self._explain(str(error).replace(str(path), str(self.path))) from None

    def _explain(self, said: str) -> Exception:
        messages = _MESSAGE.findall(said)
        reason = messages[-1].replace('\\"', '"') if messages else said
        reason = reason[-1000:]
        low = reason.lower()
        if "file too large" in low or "no space left" in low:
            return HostError(f"image {self.name}: the cache's disk has no room for it: {reason}")
        if "digest" in low and ("not match" in low or "does not" in low or "expected" in low):
            return Corrupt(f"image {self.name} is not what its digests say: {reason}")
        if any(word in low for word in _ABSENT):
            return NotFound(f"no image {self.name}: {reason}")
        if self.path and any(word in low for word in _NO_ARCHIVE):
            return InvalidInput(f"{self.path} is no {self.transport}: {reason}")
        if not self.path and any(word in low for word in _REFUSED):
            reason += (
                f"; if you may have it, `skopeo login {self.name.partition('/')[0]}` as the user "
                "that the daemon runs as"
            )
        kind = HostError if self.path else RegistryError
        return kind(f"image {self.name} cannot be fetched: {reason}")

    def root_disk(
        self, image: Image, disk_bytes: int, roots: Sequence[Path] | None, progress: Progress
    ) -> Path:
        """See `resolve.root_disk`."""
        inputs = {
            "format": 4,
            "manifest": image.digest,
            "disk_bytes": disk_bytes,
            "file_system": FILE_SYSTEM,
            "texts": TEXTS,
        }

        def build(room: Path) -> None:
            progress(f"unpacking {self.name}")
            layers = Layers(self.name, disk_bytes)
            digests: list[str] = []
            try:
                for digest, diff_id in _layers(self.name, image.digest):
                    digests.append(digest)
                    found = layers.add(blobs.blob_path(digest), digest, whiteouts=True)
                    if f"sha256:{found}" != diff_id:
                        raise Corrupt(
                            f"image {self.name}: {digest} is not what the configuration says"
                        )
                make_disk(room, disk_bytes, self.name, layers.tree, layers.contents)
            except RatoonError as error:
                if damaged := blobs.remove_damaged(digests):
                    raise Corrupt(
                        f"image {self.name}: {', '.join(damaged)} was damaged in the cache, "
                        "and is removed; try again"
                    ) from error
                raise

        return build_once("root-images", inputs, build, progress) / "disk.qcow2"


def _layers(name: str, manifest: str) -> list[tuple[str, str]]:
    """The digests of an image's layers, as they are fetched and without their compression."""
    try:
        document = blobs.read_document(manifest)
        config = blobs.read_document(document["config"]["digest"])
        layers = [str(layer["digest"]) for layer in document["layers"]]
        return list(zip(layers, config["rootfs"]["diff_ids"], strict=True))
    except (KeyError, TypeError, ValueError):
        raise InvalidInput(f"image {name} has no layers: it is of another kind") from None
