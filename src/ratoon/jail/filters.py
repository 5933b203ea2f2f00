"""A filter for system calls that no program in a cell needs, for the kernel's seccomp(2).

QEMU has a filter of its own besides, which it lays on itself once it has read its command line.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct

from ratoon.syscalls import prctl

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
#: linux/filter.h: `struct sock_filter`, and its instructions: load a word, jump, return.
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
#: Where they lie in `struct seccomp_data`; of arguments, eight bytes each, the lower half.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_X86_64 = 0xC000003E
#: Numbers of calls from here on are those of the x32 ABI.
_X32 = 0x40000000

#: QEMU's own sockets, and those of its guest's network.
FAMILIES = (socket.AF_UNIX, socket.AF_INET)
#: Of fallocate(2): to lengthen, to punch holes, to zero. Others take room beyond the end of a file
#: and leave its size, which the limit for files does not see.
_FALLOCATE_MODES = (0, 0x03, 0x10)
_PROTOCOLS = (0, socket.IPPROTO_ICMP, socket.IPPROTO_TCP, socket.IPPROTO_UDP)
#: Calls that are allowed with these values of an argument alone: number, argument, values, error.
_ALLOWED_WITH = (
    (41, 0, FAMILIES, errno.EAFNOSUPPORT),  # socket
    (41, 2, _PROTOCOLS, errno.EPROTONOSUPPORT),
    (285, 1, _FALLOCATE_MODES, errno.EOPNOTSUPP),  # fallocate
)

#: They are answered as by a kernel that does not have them: what uses them has other ways.
DENIED = {
    **{"shmget": 29, "semget": 64, "msgget": 68, "ptrace": 101, "syslog": 103},
    **{"personality": 135, "ustat": 136, "sysfs": 139, "modify_ldt": 154, "_sysctl": 156},
    **{"acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167},
    **{"swapoff": 168, "reboot": 169, "iopl": 172, "ioperm": 173, "create_module": 174},
    **{"init_module": 175, "delete_module": 176, "quotactl": 179, "lookup_dcookie": 212},
    **{
        "remap_file_pages": 216,
        "mq_open": 240,
        "mbind": 237,
        "set_mempolicy": 238,
        "kexec_load": 246,
        "add_key": 248,
    },
    **{"request_key": 249, "keyctl": 250, "migrate_pages": 256, "unshare": 272},
    **{"move_pages": 279, "perf_event_open": 298, "fanotify_init": 300},
    **{"name_to_handle_at": 303, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308},
    **{"process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313},
    **{"kexec_file_load": 320, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425},
    **{"io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429},
    **{"fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438},
    **{"process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443},
    **{"landlock_create_ruleset": 444, "memfd_secret": 447, "process_mrelease": 448},
}


class _Program(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_calls() -> None:
    """Lay the filter on the calling thread and what it starts. It has no new privileges already."""
    code = compiled()
    program = _Program(len(code) // _INSTRUCTION.size, code)
    prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def compiled() -> bytes:
    """The filter's instructions. A jump says how many it leaves out: if it is so, if it is not."""
    denied = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_AT_LEAST, 0, 1, _X32),
        denied,
    ]
    for number in DENIED.values():
        code += (_JUMP_EQUAL, 0, 1, number), denied
    for number, argument, values, error in _ALLOWED_WITH:
        check = [
            (_LOAD, 0, 0, _ARGUMENTS + 8 * argument),
            *((_JUMP_EQUAL, len(values) - at, 0, value) for at, value in enumerate(values)),
            (_RETURN, 0, 0, _ERRNO | error),
            (_LOAD, 0, 0, _NUMBER),
        ]
        code += (_JUMP_EQUAL, 0, len(check), number), *check
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)
