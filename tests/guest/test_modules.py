"""Which of the kernel's modules a guest gets, and how they lie there."""

from __future__ import annotations

import lzma
import zlib
from pathlib import Path

import pytest

from ratoon.machine.guest import modules

#: Stands in for depmod: writes what it makes, and what it was told.
DEPMOD = """
for name in modules.dep modules.devname modules.symbols modules.symbols.bin; do
    echo "$@" >"$2/lib/modules/$3/$name"
done
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a kernel with few modules: each says what it needs, and the last is nobody's."""
    monkeypatch.setattr(modules, "AT_BOOT", ("virtio_rng",))
    monkeypatch.setattr(modules, "FOR_VOLUMES", ("sunrpc", "nfs"))
    monkeypatch.setattr(modules, "ON_DEMAND", ("bridge",))
    release, root = tmp_path / "tree/lib/modules/6.1", tmp_path / "root"
    for name, needs in {
        "drivers/virtio-rng": "virtio",
        "drivers/virtio": "",
        "fs/nfs": "sunrpc",
        "net/sunrpc": "",
        "net/bridge/bridge": "stp,llc-core",
        "net/llc/llc-core": "",
        "net/stp": "llc-core",
        "net/netfilter/xt_mark": "",
        "net/netfilter/ipset/ip_set": "",
        "net/unwanted": "",
    }.items():
        path = release / f"kernel/{name}.ko"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"ELF\0depends=" + needs.encode() + b"\0name=x\0")
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        (release / name).write_text(name)
    (root / "bin").mkdir(parents=True)
    (root / "bin/busybox").write_text("busybox")
    modules.lay_out_modules(release, root, ["sh", "-c", DEPMOD, "depmod"])
    return root


def test_those_that_are_wanted_and_what_they_need(root: Path) -> None:
    there = root / "lib/modules/6.1"
    assert {str(path.relative_to(there / "kernel")) for path in there.rglob("*.xz")} == {
        *("drivers/virtio-rng.ko.xz", "drivers/virtio.ko.xz", "net/netfilter/xt_mark.ko.xz"),
        *("net/bridge/bridge.ko.xz", "net/llc/llc-core.ko.xz", "net/stp.ko.xz"),
    }
    assert lzma.decompress((there / "kernel/net/stp.ko.xz").read_bytes()).startswith(b"ELF")
    assert {path.name for path in there.iterdir()} == {
        *("kernel", "modprobe", "modules.builtin", "modules.dep")
    }
    assert (there / "modprobe").samefile(root / "bin/busybox")
    assert (there / "modules.dep").read_text() == f"-b {root} 6.1\n"


def test_those_of_init_and_of_the_agent(root: Path) -> None:
    assert (root / "modules/boot").read_text() == "virtio_rng\n"
    assert (root / "modules/volumes/order").read_text() == "sunrpc\nnfs\n"
    assert zlib.decompress((root / "modules/volumes/nfs").read_bytes()).startswith(b"ELF")
