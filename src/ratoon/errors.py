"""Every error that Ratoon raises on purpose, as one tree.

::

    RatoonError                    exit 1, HTTP 500
    ├── InvalidInput               exit 2, HTTP 400   a name, size or option that cannot be right
    ├── NotFound                   exit 3, HTTP 404   no such snapshot, sandbox, image
    ├── Conflict                   exit 4, HTTP 409   the store's state forbids it
    │   ├── AlreadyExists
    │   ├── InFlight                                  someone is making it at this moment
    │   ├── HasDependents
    │   └── Incompatible                              made by another QEMU, CPU or format version
    ├── Corrupt                    exit 5, HTTP 409   bytes are not what their digest says
    │   └── ChainMismatch                             a link names another parent than it has
    ├── CannotRestore              exit 1, HTTP 500   nothing is left to repair a file from
    ├── HostError                  exit 1, HTTP 500   the host lacks something: a program, space
    │   ├── ProgramFailed                             one of the host; the message has what it said
    │   ├── UnreadableDisk                            no ext4 file system, or a damaged one
    │   └── RegistryError          exit 1, HTTP 502   a registry of images does not do as it should
    ├── Overloaded                 exit 1, HTTP 503   no room for more sandboxes; try again later
    ├── Unreachable                exit 1, HTTP 502   no daemon answers, or no longer
    ├── Unauthorized               exit 1, HTTP 401   the daemon wants another token
    ├── MachineError               exit 1, HTTP 500   QEMU refused or failed
    │   ├── MachineDied                               the process is gone; carries its log's tail
    │   ├── OutOfDisk              exit 1, HTTP 507   the guest stands still until there is room
    │   └── BootTimeout
    └── GuestError                 exit 1, HTTP 500   the agent in the guest refused or failed
        ├── GuestTimeout                              the agent did not answer in time
        ├── NoPython           exit 1, HTTP 409   the guest has no Python to evaluate code with
        ├── CommandFailed                             a command that had to succeed did not
        ├── NotHealthy         exit 1, HTTP 409   a command that ended, or was not up in time
        ├── UnsafeArchive                             a tree that must not be let onto the host
        └── GuestFileError     exit 1, HTTP 400   a file in the guest; the message names it
            ├── GuestFileNotFound  exit 3, HTTP 404
            ├── GuestFileExists    exit 4, HTTP 409   also: a directory that is not empty
            ├── GuestNotADirectory exit 4, HTTP 409
            ├── GuestIsADirectory  exit 4, HTTP 409
            ├── GuestAccessDenied  exit 1, HTTP 403   also: a read-only file system
            └── GuestNoSpace       exit 1, HTTP 507   its own disk is full

The messages are for the person at the prompt: what failed, which thing, and what to do next.
`exit_code` and `http_status` are the only mapping to the outside; nothing else translates errors.
"""

from __future__ import annotations


class RatoonError(Exception):
    """Something failed that Ratoon can explain."""

    exit_code = 1
    http_status = 500
    #: The status with which a daemon said so, if one did.
    answered: int | None = None


class InvalidInput(RatoonError):
    exit_code = 2
    http_status = 400


class NotFound(RatoonError):
    exit_code = 3
    http_status = 404


class Conflict(RatoonError):
    exit_code = 4
    http_status = 409


class AlreadyExists(Conflict):
    pass


class InFlight(Conflict):
    pass


class HasDependents(Conflict):
    """Deleting it would be a surprise: `dependents` (tags) were made from it."""

    def __init__(self, tag: str, dependents: list[str]) -> None:
        self.tag = tag
        self.dependents = dependents
        names = ", ".join(dependents)
        super().__init__(
            f"snapshot {tag} has dependents: {names}; delete them with it (--cascade), "
            "or it alone (--force): they stay whole"
        )


class Incompatible(Conflict):
    pass


class Corrupt(RatoonError):
    exit_code = 5
    http_status = 409


class ChainMismatch(Corrupt):
    """A link is on another parent than its own: `expected` and `found` are memory roots."""

    def __init__(self, link: str, expected: str, found: str) -> None:
        self.expected = expected
        self.found = found
        super().__init__(
            f"chain link {link} must have memory root {expected}, but its layers give {found}: "
            "the chain does not fit together"
        )


class CannotRestore(RatoonError):
    """There is not enough left of a file to make it again."""


class HostError(RatoonError):
    pass


class ProgramFailed(HostError):
    """The message has the end of what it wrote from its second line on."""

    @classmethod
    def of(cls, name: str, status: int, written: bytes) -> ProgramFailed:
        said = written.decode(errors="replace").strip()[-2000:]
        return cls(f"{name} failed with exit code {status}:\n{said}")

    @property
    def said(self) -> str:
        return str(self).partition("\n")[2]


class UnreadableDisk(HostError):
    """What the guest made of its disk: the disk itself is what its digest says."""


class RegistryError(HostError):
    """It cannot be reached, refuses, or sends what it may not."""

    http_status = 502


class Overloaded(RatoonError):
    """Refused with the figures before anything was started; what runs is not affected."""

    http_status = 503


class Unreachable(RatoonError):
    """What was asked of the daemon may not have been done."""

    http_status = 502


class Unauthorized(RatoonError):
    http_status = 401


class MachineError(RatoonError):
    pass


class MachineDied(MachineError):
    """QEMU is gone. `log_tail` is the end of what it and the guest's console wrote.

    `cause` is why it died, where that is known and is not in the log.
    """

    def __init__(self, what: str, log_tail: str = "", cause: str | None = None) -> None:
        self.log_tail = log_tail
        self.cause = cause
        because = f": {cause}" if cause else ""
        tail = f"\n--- end of its log ---\n{log_tail}" if log_tail else ""
        super().__init__(f"{what}{because}{tail}")


class OutOfDisk(MachineError):
    """What the guest writes finds no room. Nothing is lost: with room it goes on where it was."""

    http_status = 507


class BootTimeout(MachineError):
    pass


class GuestError(RatoonError):
    """The agent said no, or nothing. `kind` is the short word it gave for programs, or empty."""

    def __init__(self, message: str, *, kind: str = "") -> None:
        self.kind = kind
        super().__init__(message)


class GuestTimeout(GuestError):
    pass


class NoPython(GuestError):
    http_status = 409


class CommandFailed(GuestError):
    """`status` is its exit code, as a shell gives it; with what it wrote, if that was kept."""

    def __init__(
        self, message: str, *, status: int | None = None, stdout: str = "", stderr: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.stdout = stdout
        self.stderr = stderr


class NotHealthy(GuestError):
    """It did not pass its health check; `status` is its exit code, if it has ended."""

    http_status = 409

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class UnsafeArchive(GuestError):
    """What a guest sent as files would have harmed the host; nothing of it was kept."""


class GuestFileError(GuestError):
    """What the guest's system said of a file; `kind` is the name of its errno, such as EBUSY."""

    http_status = 400


class GuestFileNotFound(GuestFileError):
    exit_code = 3
    http_status = 404


class GuestFileExists(GuestFileError):
    exit_code = 4
    http_status = 409


class GuestNotADirectory(GuestFileError):
    exit_code = 4
    http_status = 409


class GuestIsADirectory(GuestFileError):
    exit_code = 4
    http_status = 409


class GuestAccessDenied(GuestFileError):
    http_status = 403


class GuestNoSpace(GuestFileError):
    http_status = 507
