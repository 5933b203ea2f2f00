"""The guest's kernel and initramfs, built from Debian packages.

The kernel is Debian's cloud kernel. The initramfs holds the drivers it needs before it can see a
disk, a static busybox for the first mounts, and a private Python with the agent.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from ratoon.artifacts import Progress, build_once, require_exec, run, silent
from ratoon.machine.guest import cpio, modules, packages

SOURCE = Path(__file__).parent
#: What the guest has of it: its agent, and what runs on both sides.
PARTS = ("agent", "shared")

#: What `packages.json` has, besides the kernel and what its modules take.
PYTHON_PACKAGES = (
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "libexpat1",
    "libffi8",
    "zlib1g",
    "busybox-static",
)
#: Places in a kernel's header: Documentation/arch/x86/boot.rst.
_MAGIC, _INITRD_ADDR_MAX = 0x202, 0x22C
_USUAL, _LOWER = (address.to_bytes(4, "little") for address in (0x7FFFFFFF, 0x7FFEFFFF))
LIBRARIES = ("libc.so.6", "libm.so.6", "libz.so.1", "libexpat.so.1", "libffi.so.8")


@dataclass(frozen=True)
class Guest:
    """What every guest boots from; digests are BLAKE3, hex."""

    kernel: Path
    kernel_digest: str
    initramfs: Path
    initramfs_digest: str


def build_guest(progress: Progress = silent, directory: Path | None = None) -> Guest:
    """The kernel and initramfs, from the cache or built now; the packages are fetched if need be.

    `directory`: where these are, and no mirror is asked (`ratoon setup --from`).
    """
    lock = packages.locked()
    files = [file for part in PARTS for file in sorted((SOURCE / part).iterdir()) if file.is_file()]
    inputs = {
        "format": 4,
        "packages": [package.model_dump() for package in lock.packages],
        "modules": modules.CHOICE,
        "agent": {
            str(file.relative_to(SOURCE)): blake3(file.read_bytes()).hexdigest() for file in files
        },
    }

    def build(target: Path) -> None:
        require_exec(target)  # the guest's Python compiles what it gets
        tree = packages.unpacked(lock, progress, directory)
        (kernel,) = (tree / "boot").glob("vmlinuz-*")
        shutil.copyfile(kernel, target / "vmlinuz")
        _spare_the_firmware(target / "vmlinuz")
        root = target / "root"
        _lay_out(tree, root)
        (target / "initramfs.cpio").write_bytes(cpio.archive(root))
        shutil.rmtree(root)
        for name in ("vmlinuz", "initramfs.cpio"):
            digest = blake3((target / name).read_bytes()).hexdigest()
            (target / f"{name}.b3").write_text(digest)

    built = build_once("guest", inputs, build, progress)
    return Guest(
        built / "vmlinuz",
        (built / "vmlinuz.b3").read_text(),
        built / "initramfs.cpio",
        (built / "initramfs.cpio.b3").read_text(),
    )


def with_kernel(guest: Guest, kernel: Path) -> Guest:
    """The same initramfs, with another kernel; what drivers it lacks, the kernel must have.

    The file is this machine's own: see `_spare_the_firmware`.
    """
    _spare_the_firmware(kernel)
    return replace(guest, kernel=kernel, kernel_digest=blake3(kernel.read_bytes()).hexdigest())


def _spare_the_firmware(kernel: Path) -> None:
    """Lower the address that a kernel's header lets an initramfs end at, which only loaders read.

    QEMU puts the initramfs at the end of the RAM, and its boot ROM moves it out of the way of what
    the firmware has there, unless it ends where the header says: with 2 GiB of RAM it does, and the
    ring of the disk and the ACPI tables would be overwritten.
    """
    with kernel.open("r+b") as file:
        header = file.read(_INITRD_ADDR_MAX + 4)
        if header[_MAGIC : _MAGIC + 4] == b"HdrS" and header[_INITRD_ADDR_MAX:] == _USUAL:
            os.pwrite(file.fileno(), _LOWER, _INITRD_ADDR_MAX)


def _lay_out(tree: Path, root: Path) -> None:
    """Fill `root` with what the initramfs holds, taken from the unpacked packages in `tree`."""
    for name in ("bin", "lib64", "ratoon", "lib/x86_64-linux-gnu"):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copy2(tree / "bin/busybox", root / "bin/busybox")
    (release,) = (tree / "lib/modules").iterdir()
    depmod = [*_loader(tree), "--argv0", "depmod", tree / "bin/kmod"]
    modules.lay_out_modules(release, root, depmod)
    _copy_python(tree, root)
    package = root / "ratoon/guest"
    for part in PARTS:
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(SOURCE / part, package / part, ignore=unwanted)
    (package / "__init__.py").touch()
    init = package / "agent/init.sh"
    init.chmod(0o755)
    init.rename(root / "init")
    _compile(tree, root)


def _copy_python(tree: Path, root: Path) -> None:
    """The interpreter, its libraries, and of the standard library what the agent imports."""
    (root / "usr/bin").mkdir(parents=True)
    shutil.copy2(tree / "usr/bin/python3.11", root / "usr/bin")
    multiarch = "lib/x86_64-linux-gnu"
    for library in LIBRARIES:
        found = (tree / multiarch / library, tree / "usr" / multiarch / library)
        source = next(path for path in found if path.exists())
        shutil.copy2(source, root / multiarch / library)  # the file, under the name of the link
    shutil.copy2(tree / multiarch / "ld-linux-x86-64.so.2", root / "lib64")
    script = (
        f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import guest.agent.__main__;"
        "print(*(getattr(m, '__file__', None) or '' for m in sys.modules.values()), sep='\\n')"
    )
    for file in run([*_python(tree), "-B", "-c", script]).decode().splitlines():
        if file.startswith(str(tree)):
            target = root / Path(file).relative_to(tree)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)


def _compile(tree: Path, root: Path) -> None:
    """Byte-compile beforehand: under emulation, start-up is slow enough.

    Of the standard library the source is left out, as it would stay in every guest's memory.
    """
    compileall = [*_python(tree), "-m", "compileall", "-q", "-s", root, "-p", "/"]
    compileall += ["--invalidation-mode", "unchecked-hash"]  # and not by the sources' times
    run([*compileall, root / "ratoon"])
    library = root / "usr/lib/python3.11"
    run([*compileall, "-b", library])
    for source in library.rglob("*.py"):
        source.unlink()


def _python(tree: Path) -> list[str | Path]:
    """How to run the guest's interpreter on the host."""
    return ["env", f"PYTHONHOME={tree / 'usr'}", *_loader(tree), tree / "usr/bin/python3.11", "-S"]


def _loader(tree: Path) -> list[str | Path]:
    """How to run a program of the unpacked packages in `tree` on the host."""
    libraries = tree / "lib/x86_64-linux-gnu"
    search = f"{libraries}:{tree / 'usr/lib/x86_64-linux-gnu'}"
    return [libraries / "ld-linux-x86-64.so.2", "--library-path", search]
