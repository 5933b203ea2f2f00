"""`virsh save` and `virsh restore`, to compare with: the same guest in libvirt's hands.

libvirt runs within virsh (`qemu:///embed`, https://libvirt.org/drvqemu.html), in a directory of its
own: no daemon, and nothing of the host's libvirt is touched. What it does not know of the machine
(virtio-mmio, the agent's port) goes through it as QEMU's own arguments.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from ratoon.bench.peers import TIMEOUT, Guest
from ratoon.errors import RatoonError
from ratoon.machine.guest.channel import Channel
from ratoon.machine.vmm import command
from ratoon.machine.vmm.driver import Launch
from ratoon.machine.vmm.given_files import ByPath

_CONFIG = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
"""
#: libvirt looks up a user that Debian makes with its daemon alone, whatever the configuration says.
_USER = "libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin\n"
_GROUP = "libvirt-qemu:x:64055:\n"
_START = """\
mount --bind "$0/passwd" /etc/passwd
mount --bind "$0/group" /etc/group
exec setpriv --pdeathsig KILL -- virsh --quiet --connect "qemu:///embed?root=$0/root"
"""
_DONE = b"\ndone"
_DOMAIN = "peer"
#: The path of a socket is short.
_AGENT = Path(f"/tmp/ratoon-virsh-{os.getpid()}")
#: Options of QEMU that libvirt gives it by itself, and that have no value.
_ITS_FLAGS = {"-nodefaults", "-no-user-config"}
#: Those that have one.
_ITS_OPTIONS = {
    *("-name", "-display", "-sandbox", "-accel", "-smp", "-m", "-machine", "-object"),
    *("-mon", "-kernel", "-initrd", "-append"),
}


class Virsh:
    """A virsh that takes commands."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    @asynccontextmanager
    async def running(cls, room: Path) -> AsyncIterator[Virsh]:
        """In the new directory `room`; its guest ends with it."""
        (room / "root/etc").mkdir(parents=True)
        (room / "root/etc/qemu.conf").write_text(_CONFIG)
        (room / "passwd").write_text(Path("/etc/passwd").read_text() + _USER)
        (room / "group").write_text(Path("/etc/group").read_text() + _GROUP)
        process = await asyncio.create_subprocess_exec(
            *("unshare", "--mount", "sh", "-ec", _START, room),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is not for it: the guest is to be destroyed first
        )
        virsh = cls(process)
        try:
            await virsh.do("version")
            yield virsh
        finally:
            with suppress(RatoonError):
                await virsh.do(f"destroy {_DOMAIN}")
            process.kill()
            await process.wait()
            _AGENT.unlink(missing_ok=True)

    async def do(self, line: str) -> None:
        """RatoonError: it did not work, or took too long."""
        assert self._process.stdin
        assert self._process.stdout
        said = b""
        try:
            async with asyncio.timeout(TIMEOUT):
                self._process.stdin.write(f"{line}\necho done\n".encode())
                while _DONE not in said and (piece := await self._process.stdout.read(4096)):
                    said += piece
        except (TimeoutError, OSError) as error:
            raise RatoonError(f"virsh {line}: {error!r}, after {said.decode()}") from error
        if wrong := [each for each in said.decode().splitlines() if each.startswith("error:")]:
            raise RatoonError(f"virsh {line}: {'; '.join(wrong)}")
        if _DONE not in said:
            raise RatoonError(f"virsh {line}: it ended, saying {said.decode()}")


@dataclass(frozen=True)
class Domain:
    """A guest in the hands of `virsh`, in the directory of its `launch`."""

    virsh: Virsh
    launch: Launch

    @asynccontextmanager
    async def booted(self) -> AsyncIterator[Guest]:
        """Boot it. It is gone afterwards, if it was not saved."""
        document = self.launch.runtime / "domain.xml"
        document.write_text(self._document())
        await self.virsh.do(f"create {document}")
        async with self._guest() as guest:
            await guest.greet()
            yield guest

    async def save(self) -> None:
        """`virsh save`; the guest is gone then."""
        await self.virsh.do(f"save {_DOMAIN} {self._state}")
        shutil.copyfile(self.launch.overlay, self._saved_disk)

    def make_ready(self) -> None:
        """Put the disk back as it was saved: what comes back may write to it."""
        shutil.copyfile(self._saved_disk, self.launch.overlay)

    @asynccontextmanager
    async def restored(self) -> AsyncIterator[Guest]:
        """`virsh restore`. It is gone afterwards."""
        await self.virsh.do(f"restore {self._state}")
        async with self._guest() as guest:
            yield guest
        await self.virsh.do(f"destroy {_DOMAIN}")

    @property
    def _state(self) -> Path:
        return self.launch.runtime / "virsh-saved"

    @property
    def _saved_disk(self) -> Path:
        return self.launch.runtime / "virsh-disk.qcow2"

    @asynccontextmanager
    async def _guest(self) -> AsyncIterator[Guest]:
        channel = await Channel.connect(_AGENT, _DOMAIN)
        try:
            channel.begin()
            yield Guest(channel)
        finally:
            channel.close()

    def _document(self) -> str:
        launch, boot = self.launch, self.launch.boot
        assert boot
        kind = "kvm" if launch.hardware.accelerator == "kvm" else "qemu"
        arguments = "".join(f"<qemu:arg value={quoteattr(word)}/>" for word in self._arguments())
        return f"""\
<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{_DOMAIN}</name>
  <memory unit='bytes'>{launch.hardware.ram_bytes}</memory>
  <vcpu>{launch.hardware.vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{command.MACHINE}'>hvm</type>
    <kernel>{escape(str(boot.kernel))}</kernel>
    <initrd>{escape(str(boot.initramfs))}</initrd>
    <cmdline>{escape(boot.command_line)}</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>{shutil.which(command.BINARY)}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>{arguments}</qemu:commandline>
</domain>
"""

    def _arguments(self) -> list[str]:
        """Those of Ratoon's machines that libvirt does not give by itself."""
        words = iter(command.arguments(self.launch, ByPath(), qmp_fd=-1, agent_fd=-1))
        found: list[str] = []
        for word in words:
            if word in _ITS_FLAGS:
                continue
            value = next(words) if word != "-no-reboot" else None
            if word in _ITS_OPTIONS or (value and ("id=qmp," in value or "send-config" in value)):
                continue
            if value and "id=agent," in value:
                value = f"socket,id=agent,path={_AGENT},server=on,wait=off"
            found += [word, *([value] if value else [])]
        return found
