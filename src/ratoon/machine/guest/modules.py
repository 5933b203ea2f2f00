"""The kernel's modules that a guest has: a few are loaded at boot, the others when asked for.

They stay in the guest's memory, packed: what a container runtime, a firewall or a file system image
takes, and not all that there are. Those of volumes the agent loads itself, and knows a faster way.
"""

from __future__ import annotations

import lzma
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from ratoon.artifacts import run

#: What the guest cannot begin without.
AT_BOOT = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio_rng", "virtio_net")
#: What the agent loads itself, in this order, once there is a volume to be mounted.
FOR_VOLUMES = ("sunrpc", "grace", "lockd", "netfs", "fscache", "nfs_acl", "nfs", "nfsv3")
#: What the kernel, or somebody in a guest, may ask for; with all that these need.
ON_DEMAND = (
    # file systems and disks
    *("overlay", "fuse", "cuse", "loop", "squashfs", "isofs", "vfat", "autofs4", "binfmt_misc"),
    *("nls_ascii", "nls_cp437", "nls_iso8859_1", "nls_utf8", "zram"),
    # network devices, and what asks about sockets
    *("tun", "veth", "dummy", "bridge", "br_netfilter", "macvlan", "ipvlan", "8021q", "vxlan"),
    *("ifb", "wireguard", "tls", "tcp_bbr"),
    *("tcp_diag", "udp_diag", "raw_diag", "unix_diag", "netlink_diag", "af_packet_diag"),
    # queueing
    *("sch_fq", "sch_htb", "sch_netem", "sch_prio", "sch_tbf", "sch_ingress"),
    *("cls_u32", "cls_bpf", "cls_matchall", "act_mirred", "act_police"),
    *("algif_hash", "algif_skcipher"),
)
#: The same of directories: firewalls, but for sets of addresses, and for protocols of old.
FIREWALL = ("net/netfilter/*", "net/ipv4/netfilter/*", "net/ipv6/netfilter/*")
WITHOUT = (
    *("*/ipset/*", "*/ipvs/*", "*_set.ko", "*_ipvs.ko", "*_h323.ko", "*_sip.ko", "*_pptp.ko"),
    *("*_amanda.ko", "*_irc.ko", "*_netbios_ns.ko", "*_sane.ko", "*_snmp*.ko", "*_broadcast.ko"),
)
#: Of what `depmod` makes: what nobody reads, or systemd alone, to make nodes that are there.
UNREAD = (
    *("modules.builtin.modinfo", "modules.devname", "modules.order"),
    *("modules.symbols", "modules.symbols.bin"),
)
#: All that makes two guests of one kernel differ in their modules.
CHOICE = (AT_BOOT, FOR_VOLUMES, ON_DEMAND, FIREWALL, WITHOUT, UNREAD)
#: What `depmod` of Debian takes to run.
DEPMOD_PACKAGES = ("kmod", "libkmod2", "liblzma5", "libssl3", "libzstd1")

#: In a module's own section of facts (include/linux/moduleinfo.h).
_NEEDS = re.compile(rb"\0depends=([^\0]*)\0")
#: Readers hold a dictionary in memory, busybox as much as is said here.
_DICTIONARY = 1024 * 1024
#: What `depmod` reads.
_FACTS = ("modules.builtin", "modules.builtin.modinfo", "modules.order")


def lay_out_modules(release: Path, root: Path, depmod: Sequence[str | Path]) -> None:
    """Put what a guest has of the modules in `release` (lib/modules/…) into `root`.

    `modules` is for init and the agent. In `lib/modules/…` are those on demand, indexed for all
    that images have to load them; and a `modprobe`, for those without: busybox, which does as it
    is called. `depmod`: how to run it.
    """
    there = {_name(path): path for path in release.rglob("*.ko")}
    own, target = root / "modules", root / "lib/modules" / release.name
    (own / "volumes").mkdir(parents=True)
    (own / "boot").write_text(_lines(AT_BOOT))
    (own / "volumes/order").write_text(_lines(FOR_VOLUMES))
    for name in FOR_VOLUMES:
        (own / "volumes" / name).write_bytes(zlib.compress(there[name].read_bytes(), 9))
    for module in _on_demand(there, release / "kernel"):
        packed = target / module.relative_to(release).with_suffix(".ko.xz")
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.write_bytes(_pack(module.read_bytes()))
    (target / "modprobe").hardlink_to(root / "bin/busybox")
    for name in _FACTS:
        shutil.copy2(release / name, target)
    run([*depmod, "-b", root, release.name])
    for name in UNREAD:
        (target / name).unlink()


def _on_demand(there: Mapping[str, Path], kernel: Path) -> Iterable[Path]:
    """The modules' files, with those that they need; `there`: all, by name, below `kernel`."""
    found: dict[str, Path] = {}
    to_do = [*AT_BOOT, *ON_DEMAND, *(name for name in there if _is_firewall(there[name], kernel))]
    while to_do:
        name = to_do.pop()
        if name not in found:
            found[name] = there[name]
            needs = _NEEDS.search(there[name].read_bytes())
            to_do += filter(None, needs[1].decode().replace("-", "_").split(",") if needs else [])
    return found.values()


def _is_firewall(path: Path, kernel: Path) -> bool:
    name = str(path.relative_to(kernel))
    return any(fnmatch(name, each) for each in FIREWALL) and not any(
        fnmatch(name, each) for each in WITHOUT
    )


def _name(path: Path) -> str:
    """As the kernel calls it."""
    return path.stem.replace("-", "_")


def _lines(names: Iterable[str]) -> str:
    return "".join(f"{name}\n" for name in names)


def _pack(module: bytes) -> bytes:
    how = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": _DICTIONARY}
    return lzma.compress(module, check=lzma.CHECK_CRC32, filters=[how])
