"""One tree of exceptions.

Everything that shmdomains raises on purpose is a `ShmDomainsError`, so one ``except`` catches it
all. A class also derives from the built-in exception of the same meaning: `LockTimeout` is a
`TimeoutError`, `DomainNotFound` a `KeyError`, `DefinitionError` a `ValueError`. Messages name the
thing, the holder and what to do next.

`LockLost`, `InDoubt` and `Unavailable` are reserved for stores across a network; shared memory
never raises them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .holder import LockHolder
    from .job import JobInfo


INTERRUPTED = 130
"""The exit status of a command that Ctrl-C ended."""


class ShmDomainsError(Exception):
    """Base of every exception that this package raises on purpose.

    `kind` is libvirt's name for this kind of error, which virsh writes before the message; empty if
    libvirt has none. The drivers raise some with another one than the class's.
    """

    kind: str = ""


# --- who holds what -------------------------------------------------------------------------


class ContractError(ShmDomainsError):
    """The calling code broke a rule about locks."""


class ListNotLocked(ContractError):
    """The call needs the list lock, and this thread does not hold it."""


class DomainNotLocked(ContractError):
    """The call needs the domain's lock, and this thread does not hold it."""


class DomainLocked(ContractError):
    """This thread holds the domain, and the call would wait for it."""


class MutexNotLocked(ContractError):
    """The call needs the named lock, and this thread does not hold it."""


class AlreadyLocked(ContractError):
    """This thread holds the lock already; the locks are not recursive."""


class NotOwner(ContractError):
    """Another thread of this process holds the lock; only that thread may unlock it."""


class LockOrder(ContractError):
    """Waiting for this lock now could form a cycle; the order is list, then domain."""


class TooManyLocks(ContractError):
    """This thread holds 1,000 locks: the kernel releases only 2,048 locks of a dead thread."""


class WrongList(ContractError):
    """The domain belongs to another list."""


class UncommittedChanges(ContractError):
    """The call makes a commit of its own, and the domain has changes; commit or roll back first."""


# --- waiting --------------------------------------------------------------------------------


class LockTimeout(ShmDomainsError, TimeoutError):
    """A lock was not free in time. `holder` says who has it; ``None`` if that is not known."""

    def __init__(self, message: str, holder: LockHolder | None = None) -> None:
        super().__init__(message)
        self.holder = holder


class JobTimeout(LockTimeout):
    """Another job kept the domain until the time was up. `job` says which, `holder` whose."""

    kind = "Timed out during operation"

    def __init__(
        self, message: str, holder: LockHolder | None = None, job: JobInfo | None = None
    ) -> None:
        super().__init__(message, holder)
        self.job = job


class DomainBusy(JobTimeout):
    """A job excludes the call: removing, renaming or redefining the domain. `job` says which."""


class WaitTimeout(ShmDomainsError, TimeoutError):
    """What was waited for did not come in time. The message says what the domain is now."""


class Busy(ShmDomainsError, TimeoutError):
    """Writers kept a lock-free read from a consistent result until its time was up."""


# --- domains --------------------------------------------------------------------------------


class DomainNotFound(ShmDomainsError, KeyError):
    """No domain has this uuid, name or id."""

    kind = "Domain not found"

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


class DomainExists(ShmDomainsError):
    """Another domain has this name or this uuid."""

    kind = "operation failed"


class DomainRemoved(ShmDomainsError, LookupError):
    """The handle outlived its domain."""


class DomainStateError(ShmDomainsError):
    """The domain is in the wrong state for the call (VIR_ERR_OPERATION_INVALID)."""

    kind = "Requested operation is not valid"


class DomainActive(DomainStateError):
    """The call needs an inactive domain."""


class DomainInactive(DomainStateError):
    """The call needs an active domain."""


class DomainTransient(DomainStateError):
    """The call needs a persistent domain."""


class DefinitionError(ShmDomainsError, ValueError):
    """The definition is refused. `element` and `line` say where, if known."""

    kind = "XML error"

    def __init__(self, message: str, element: str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.element = element
        self.line = line


class InvalidName(DefinitionError):
    """The name cannot be a domain's: it is empty, too long, or no file name."""


class DriverError(ShmDomainsError):
    """A hypervisor could not do what its driver asked for, or the guest is gone."""

    kind = "internal error"


class ConfigError(ShmDomainsError, OSError):
    """A file in the config or autostart directory could not be read, written or removed."""


# --- the segment ----------------------------------------------------------------------------


class SegmentError(ShmDomainsError):
    """Base of errors about the whole segment."""


class ListClosed(SegmentError):
    """This `DomainList` was closed."""


class SegmentNotFound(SegmentError, FileNotFoundError):
    """No segment has this name."""


class SegmentExists(SegmentError, FileExistsError):
    """A segment of this name exists already."""


class SegmentInUse(SegmentError):
    """Others are attached to the segment."""


class SegmentMismatch(SegmentError):
    """The segment is of another layout, machine, boot, PID or time namespace, or has other options
    than `open` asks for."""


class SegmentRefused(SegmentError, PermissionError):
    """The segment's file is not ours, is a link, or has the wrong mode."""


class SegmentCorrupt(SegmentError):
    """The segment holds an impossible value."""


class SegmentPoisoned(SegmentError):
    """A repair failed earlier; the segment can only be read and exported."""


class SegmentFull(SegmentError, MemoryError):
    """No room for another domain, or no memory for its definition."""


class NoEvents(SegmentError):
    """The list keeps no events."""


class TooManyMutexes(SegmentError):
    """A list has 64 named locks, and their names are never given back."""


class DescriptorLost(SegmentError):
    """The call needs the segment's descriptor, which this process closed."""


class LockKindMismatch(SegmentError):
    """The call needs locks that this process did not inherit (``lock="multiprocessing"``)."""


# --- reserved for stores across a network ---------------------------------------------------


class LockLost(ShmDomainsError):
    """The store gave the lock to another holder. Never raised by shared memory."""


class InDoubt(ShmDomainsError):
    """The commit may or may not have happened. Never raised by shared memory."""


class Unavailable(ShmDomainsError):
    """The store cannot be reached. Never raised by shared memory."""
