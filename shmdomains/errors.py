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

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> try:
    ...     doms["nobody"]
    ... except ShmDomainsError as error:
    ...     print(type(error).__name__)
    DomainNotFound
    """

    kind: str = ""


# --- who holds what -------------------------------------------------------------------------


class ContractError(ShmDomainsError):
    """The calling code broke a rule about locks.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> try:
    ...     doms.unlock()
    ... except ContractError as error:
    ...     print(type(error).__name__)
    ListNotLocked
    """


class ListNotLocked(ContractError):
    """The call needs the list lock, and this thread does not hold it.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> doms.remove_inactive(None)
    Traceback (most recent call last):
    ...
    shmdomains.errors.ListNotLocked: ...
    """


class DomainNotLocked(ContractError):
    """The call needs the domain's lock, and this thread does not hold it.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.get("web1") as dom:
    ...     pass
    >>> dom.data = 1
    Traceback (most recent call last):
    ...
    shmdomains.errors.DomainNotLocked: ...
    """


class DomainLocked(ContractError):
    """This thread holds the domain, and the call would wait for it.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.get("web1"):
    ...     doms.wait("web1", until=lambda info: info.is_active)
    Traceback (most recent call last):
    ...
    shmdomains.errors.DomainLocked: ...
    """


class MutexNotLocked(ContractError):
    """The call needs the named lock, and this thread does not hold it.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> doms.mutex("backup").unlock()
    Traceback (most recent call last):
    ...
    shmdomains.errors.MutexNotLocked: ...
    """


class AlreadyLocked(ContractError):
    """This thread holds the lock already; the locks are not recursive.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> with doms.locked():
    ...     doms.lock()
    Traceback (most recent call last):
    ...
    shmdomains.errors.AlreadyLocked: ...
    """


class NotOwner(ContractError):
    """Another thread of this process holds the lock; only that thread may unlock it."""


class LockOrder(ContractError):
    """Waiting for this lock now could form a cycle; the order is list, then domain.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.get("web1"):
    ...     doms.lock()
    Traceback (most recent call last):
    ...
    shmdomains.errors.LockOrder: ...
    """


class TooManyLocks(ContractError):
    """This thread holds 1,000 locks: the kernel releases only 2,048 locks of a dead thread."""


class WrongList(ContractError):
    """The domain belongs to another list.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with DomainList().locked():
    ...     pass
    >>> other = DomainList()
    >>> with doms.get("web1") as dom:
    ...     other.set_autostart(dom, True)
    Traceback (most recent call last):
    ...
    shmdomains.errors.WrongList: ...
    """


class UncommittedChanges(ContractError):
    """The call makes a commit of its own, and the domain has changes; commit or roll back first.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.locked(), doms.get("web1") as dom:
    ...     dom.data = 1
    ...     doms.rename(dom, "web2")
    Traceback (most recent call last):
    ...
    shmdomains.errors.UncommittedChanges: ...
    """


# --- waiting --------------------------------------------------------------------------------


class LockTimeout(ShmDomainsError, TimeoutError):
    """A lock was not free in time. `holder` says who has it; ``None`` if that is not known.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> import threading
    >>> doms.lock()
    >>> def impatient():
    ...     try:
    ...         doms.lock(timeout=0.01)
    ...     except LockTimeout as error:
    ...         print(error.holder.alive)
    >>> thread = threading.Thread(target=impatient)
    >>> thread.start(); thread.join()
    True
    >>> doms.unlock()
    """

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
    """What was waited for did not come in time. The message says what the domain is now.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> doms.wait("web1", until=lambda info: info.is_active, timeout=0)
    Traceback (most recent call last):
    ...
    shmdomains.errors.WaitTimeout: ...
    """


class Busy(ShmDomainsError, TimeoutError):
    """Writers kept a lock-free read from a consistent result until its time was up."""


# --- domains --------------------------------------------------------------------------------


class DomainNotFound(ShmDomainsError, KeyError):
    """No domain has this uuid, name or id.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> doms["nobody"]
    Traceback (most recent call last):
    ...
    shmdomains.errors.DomainNotFound: ...
    """

    kind = "Domain not found"

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


class DomainExists(ShmDomainsError):
    """Another domain has this name or this uuid.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> doms.define(xml.replace("</name>",
    ...             "</name><uuid>11111111-2222-3333-4444-555555555555</uuid>"))
    Traceback (most recent call last):
    ...
    shmdomains.errors.DomainExists: ...
    """

    kind = "operation failed"


class DomainRemoved(ShmDomainsError, LookupError):
    """The handle outlived its domain.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.get("web1") as dom:
    ...     pass
    >>> doms.undefine("web1")
    >>> dom.lock()
    Traceback (most recent call last):
    ...
    shmdomains.errors.DomainRemoved: ...
    """


class DomainStateError(ShmDomainsError):
    """The domain is in the wrong state for the call (VIR_ERR_OPERATION_INVALID).

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.get("web1") as dom:
    ...     dom.deactivate()
    Traceback (most recent call last):
    ...
    shmdomains.errors.DomainInactive: ...
    """

    kind = "Requested operation is not valid"


class DomainActive(DomainStateError):
    """The call needs an inactive domain.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.get("web1") as dom:
    ...     id = dom.activate()
    ...     dom.activate()
    Traceback (most recent call last):
    ...
    shmdomains.errors.DomainActive: ...
    """


class DomainInactive(DomainStateError):
    """The call needs an active domain.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.get("web1") as dom:
    ...     dom.deactivate()
    Traceback (most recent call last):
    ...
    shmdomains.errors.DomainInactive: ...
    """


class DomainTransient(DomainStateError):
    """The call needs a persistent domain."""


class DefinitionError(ShmDomainsError, ValueError):
    """The definition is refused. `element` and `line` say where, if known.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> doms.define("<domain>")
    Traceback (most recent call last):
    ...
    shmdomains.errors.DefinitionError: ...
    """

    kind = "XML error"

    def __init__(self, message: str, element: str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.element = element
        self.line = line


class InvalidName(DefinitionError):
    """The name cannot be a domain's: it is empty, too long, or no file name.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.locked(), doms.get("web1") as dom:
    ...     doms.rename(dom, "a/b")
    Traceback (most recent call last):
    ...
    shmdomains.errors.InvalidName: ...
    """


class DriverError(ShmDomainsError):
    """A hypervisor could not do what its driver asked for, or the guest is gone.

    >>> from shmdomains.drivers.base import Driver
    >>> issubclass(DriverError, ShmDomainsError), DriverError.kind
    (True, 'internal error')
    """

    kind = "internal error"


class ConfigError(ShmDomainsError, OSError):
    """A file in the config or autostart directory could not be read, written or removed."""


# --- the segment ----------------------------------------------------------------------------


class SegmentError(ShmDomainsError):
    """Base of errors about the whole segment."""


class ListClosed(SegmentError):
    """This `DomainList` was closed.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> doms.close()
    >>> len(doms)
    Traceback (most recent call last):
    ...
    shmdomains.errors.ListClosed: ...
    """


class SegmentNotFound(SegmentError, FileNotFoundError):
    """No segment has this name.

    >>> from shmdomains import DomainList
    >>> DomainList.attach("nobody-made-it")
    Traceback (most recent call last):
    ...
    shmdomains.errors.SegmentNotFound: ...
    """


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
    """No room for another domain, or no memory for its definition.

    >>> from shmdomains import DomainList
    >>> doms = DomainList(max_domains=1)
    >>> xml = ("<domain type='kvm'><name>{}</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> for name in ("a", "b"):
    ...     info = doms.define(xml.format(name))
    Traceback (most recent call last):
    ...
    shmdomains.errors.SegmentFull: ...
    """


class NoEvents(SegmentError):
    """The list keeps no events.

    >>> from shmdomains import DomainList
    >>> DomainList(events=0).watch()
    Traceback (most recent call last):
    ...
    shmdomains.errors.NoEvents: ...
    """


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
