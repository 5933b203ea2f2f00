"""What a container runtime puts into the root file system of an image."""

from __future__ import annotations

from ratoon.engine.sources.merge import Tree
from ratoon.engine.sources.tar_stream import DIRECTORY, FILE, Inode

#: What is to be there, with nothing of another host; the guest's agent binds its own over them.
TEXTS = {
    "etc/hostname": "ratoon\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    "etc/machine-id": "",
    "etc/resolv.conf": "nameserver 10.0.2.3\n",
}
#: Of this one the image's own stays, where it has one: the agent adds to it.
KEPT = "etc/hosts"
#: What the guest mounts on or writes to; not through links, which lead elsewhere before the disk is
#: its root. With their modes, where the image has none. The last is where mke2fs has it anyway.
DIRECTORIES = {
    **{"proc": 0o555, "sys": 0o555, "dev": 0o755, "run": 0o755, "tmp": 0o1777},
    "lost+found": 0o700,
}


def furnish(tree: Tree) -> None:
    """Put it there, whatever else the image has of those names."""
    top = tree.root.children
    for name, mode in DIRECTORIES.items():
        there = top.get(name.encode())
        if there is None or there.kind != DIRECTORY:
            top[name.encode()] = Inode(DIRECTORY, mode=mode)
    etc = tree.find(b"etc")
    if etc is None or etc.kind != DIRECTORY:
        etc = top[b"etc"] = Inode(DIRECTORY)
    for name, text in TEXTS.items():
        there = tree.find(name.encode())
        if name != KEPT or there is None or there.kind != FILE:
            data = text.encode()
            own = Inode(FILE, mode=0o644, size=len(data), text=data)
            etc.children[name.removeprefix("etc/").encode()] = own
