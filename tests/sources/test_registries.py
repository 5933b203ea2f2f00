"""Images of a real registry: what is fetched, what is not fetched again, and what is refused."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path

import pytest
from disk_looks import DISK, Look

from oci_images import Layout, file, layer
from ratoon.engine.sources import blobs
from ratoon.engine.sources.registry import RegistryName
from ratoon.engine.sources.resolve import resolve, root_disk
from ratoon.errors import Corrupt, HostError, InvalidInput, NotFound, RegistryError
from ratoon.store.snapshot.image_config import ImageConfig
from registry_server import PASSWORD, USER, Registry, serving

pytest_plugins = ["image_fixtures"]

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.12-slim", "docker.io/library/python:3.12-slim"),
        ("someone/thing", "docker.io/someone/thing:latest"),
        ("docker.io/python", "docker.io/library/python:latest"),
        ("registry:5000/x:tag", "registry:5000/x:tag"),
        ("localhost/x", "localhost/x:latest"),
        ("ghcr.io/a/b/c", "ghcr.io/a/b/c:latest"),
        (f"registry:5000/x@{DIGEST}", f"registry:5000/x@{DIGEST}"),
        (f"python:3.12@{DIGEST}", f"docker.io/library/python@{DIGEST}"),
    ],
)
def test_names_are_those_of_docker(text: str, name: str) -> None:
    assert str(RegistryName.parse(text)) == name
    assert RegistryName.parse(name) == RegistryName.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "Python",
            "a b",
            "x:",
            "x@sha256:12",
            "/x",
            "x/",
            "a//b",
            "-x",
            "x:tag:tag",
            "--help",
        ),
        *("host:port/x", "x\n", "x\0", "ä", "x" * 600, "registry:5000/", "ho st/x", "a@b"),
    ],
)
def test_what_can_be_no_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be the name of an image"):
        resolve(text)


@pytest.mark.parametrize(
    ("host", "here"),
    [
        *(("localhost:5000", True), ("127.0.0.1:5000", True), ("127.9.9.9", True)),
        *(("registry:5000", False), ("10.0.0.1:5000", False), ("docker.io", False)),
        *(("localhost.example.org", False), ("127.0.0.1.example.org", False)),
    ],
)
def test_only_a_registry_of_this_host_may_be_without_tls(host: str, here: bool) -> None:
    assert RegistryName.parse(f"{host}/x").is_here is here


def test_no_layer_is_moved_twice(
    registry: Registry, cache: Path, tmp_path: Path, look: Look
) -> None:
    layout = Layout(tmp_path / "layout")
    shared = layer([file("shared", b"s" * 1000)])
    one = layout.add([shared, layer([file("one", b"1")])], ref="one")
    two = layout.add([shared, layer([file("two", b"2")])], ref="two")
    names = {ref: registry.push(layout.reference(ref), f"moved/{ref}:v1") for ref in ("one", "two")}
    shared_layer, own_layer = (each["digest"] for each in one["layers"])
    before = len(registry.sent_blobs())

    root = look(names["one"])
    assert sorted(path.name for path in root.iterdir() if path.is_file()) == ["one", "shared"]
    first = registry.sent_blobs()[before:]
    assert first.count(shared_layer) == first.count(own_layer) == 1

    again = resolve(names["one"], refresh=True)  # it is asked for once more, as a tag may move
    assert again == resolve(names["one"])
    root_disk(again, 2 * DISK)  # another disk of it
    root = look(names["two"])
    assert (root / "shared").read_bytes() == b"s" * 1000
    sent = registry.sent_blobs()[before:]
    assert sent.count(shared_layer) == sent.count(own_layer) == 1
    assert sent.count(two["layers"][1]["digest"]) == 1


def test_what_is_fetched_is_for_its_owner_alone(
    registry: Registry, cache: Path, tmp_path: Path
) -> None:
    """Not everybody on this host may have had what the registry gave."""
    layout = Layout(tmp_path / "layout")
    layout.add([layer([file("secret")])])
    disk = root_disk(resolve(registry.push(layout.reference(), "secret:v1")), DISK)
    assert stat.S_IMODE(disk.stat().st_mode) == 0o600
    assert stat.S_IMODE((cache / "oci").stat().st_mode) == 0o700


def test_a_tag_is_what_it_was_until_it_is_refreshed(
    registry: Registry, cache: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    for ref in ("old", "new"):
        layout.add([layer([file(ref)])], {"Env": [f"WHICH={ref}"]}, ref=ref)
    name = registry.push(layout.reference("old"), "moving:tag")
    old = resolve(name)
    registry.push(layout.reference("new"), "moving:tag")
    asked = len(registry.requests())
    assert resolve(name) == old
    assert len(registry.requests()) == asked
    new = resolve(name, refresh=True)
    assert (old.config.env, new.config.env) == ({"WHICH": "old"}, {"WHICH": "new"})
    assert resolve(name) == new
    pinned = resolve(f"{name.removesuffix(':tag')}@{old.digest}")
    assert (pinned.digest, pinned.config) == (old.digest, old.config)


def test_the_image_for_this_machine_is_chosen(
    registry: Registry, cache: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([layer([file("x")])], {"Cmd": ["x"]}, ref="ours")
    ours = registry.push(layout.reference("ours"), "platform:ours")
    described = json.loads((layout.path / "index.json").read_text())["manifests"][0]
    del described["annotations"]
    entries = [
        {**described, "platform": {"architecture": "amd64", "os": "linux"}},
    ]
    index = {"schemaVersion": 2, "manifests": entries}
    media = "application/vnd.oci.image.index.v1+json"
    layout.name(layout.blob(json.dumps(index).encode(), media), "all")
    pushed = registry.push(layout.reference("all"), "platform:all", "--all")
    assert resolve(pushed).config.command == ("x",)
    assert resolve(pushed).digest == resolve(ours).digest


def test_an_image_for_another_machine_is_refused(
    registry: Registry, cache: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([layer([file("x")])], ref="arm", platform=("arm64", "linux"))
    name = registry.push(layout.reference("arm"), "arm:latest")
    with pytest.raises(InvalidInput, match=r"is for linux/arm64; guests are linux/amd64"):
        resolve(name)


def test_what_is_not_there_is_named(registry: Registry, cache: Path) -> None:
    with pytest.raises(NotFound, match=rf"no image {registry.host}/absent:latest"):
        resolve(f"{registry.host}/absent")
    with pytest.raises(
        RegistryError, match=r"127\.0\.0\.1:1/x:latest cannot be fetched: .*refused"
    ):
        resolve("127.0.0.1:1/x")
    assert not list((cache / "oci").glob(".*.tmp"))


def test_credentials_are_those_of_the_usual_file(
    registry_program: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([layer([file("x")])], {"User": "nobody"})
    (tmp_path / "private").mkdir()
    auth = tmp_path / "auth.json"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(auth))
    with serving(registry_program, tmp_path / "private", private=True) as private:
        secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        auth.write_text("{}")
        name = f"{private.host}/hidden:latest"
        with pytest.raises(RegistryError, match=f"`skopeo login {private.host}` as the user"):
            resolve(name)
        auth.write_text(json.dumps({"auths": {private.host: {"auth": secret}}}))
        private.push(layout.reference(), "hidden:latest")
        assert resolve(name).config == ImageConfig(user="nobody")


def damage_sent(
    registry: Registry, name: str, layout: Layout, manifest: object, data: bytes
) -> str:
    """Push an image, then have the registry send `data` for its one layer; the image's name."""
    pushed = registry.push(layout.reference(), name)
    assert isinstance(manifest, dict)
    registry.blob(manifest["layers"][0]["digest"]).write_bytes(data)
    return pushed


@pytest.mark.parametrize("how", ["truncated", "changed"])
def test_a_layer_that_is_not_what_its_digest_says_is_not_taken(
    how: str, registry: Registry, cache: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    manifest = layout.add([layer([file("data", how.encode() * 5000)])])
    digest = manifest["layers"][0]["digest"]
    data = layout.blob_path(digest).read_bytes()
    wrong = data[:-7] if how == "truncated" else data[:40] + b"?" + data[41:]
    name = damage_sent(registry, f"{how}:latest", layout, manifest, wrong)
    with pytest.raises((Corrupt, HostError), match=rf"{how}:latest"):
        resolve(name)
    assert not blobs.blob_path(digest).exists()
    registry.blob(digest).write_bytes(data)
    assert resolve(name).digest


@pytest.mark.parametrize("how", ["empty", "truncated", "changed"])
def test_a_layer_that_was_damaged_in_the_cache_is_removed_and_fetched_again(
    how: str, registry: Registry, cache: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    manifest = layout.add([layer([file("data", how.encode() * 5000)])])
    name = registry.push(layout.reference(), f"rotten-{how}:latest")
    image = resolve(name)
    blob = blobs.blob_path(manifest["layers"][0]["digest"])
    data = blob.read_bytes()
    blob.write_bytes(
        {"empty": b"", "truncated": data[:-7], "changed": data[:60] + b"?" + data[61:]}[how]
    )
    with pytest.raises(Corrupt, match=rf"{blob.name} was damaged in the cache"):
        root_disk(image, DISK)
    assert not blob.exists()
    assert root_disk(resolve(name), DISK).exists()


def test_a_manifest_that_was_damaged_in_the_cache_is_fetched_again(
    registry: Registry, cache: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([layer([file("x")])])
    name = registry.push(layout.reference(), "torn:latest")
    image = resolve(name)
    blobs.blob_path(image.digest).write_bytes(b"{}")
    with pytest.raises(Corrupt, match="try again"):
        root_disk(image, DISK)
    assert resolve(name) == image
    assert root_disk(image, DISK).exists()
