"""How a list gets to another process in a pickle: alone, or with a handle or a named lock.

- Who has the segment already finds it by its identity: a forked child, or a worker that was given
  the list when it began.
- A child that is being spawned gets the descriptor, in multiprocessing's own way, and the locks of
  ``lock="multiprocessing"``, which travel in no other.
- Everybody else, such as the worker that a pool gives a task, opens the segment by its name or,
  without one, through the pickling process: ``/proc/PID/fd/NUMBER`` leads to a memfd, too. The
  kernel lets a process in there that may look into the other one (PTRACE_MODE_READ): the same
  user's, with no fewer capabilities, and the other one did not change its user since its `exec`.
  Yama's ptrace_scope and /proc's hidepid restrict other things. Nothing is opened before it is
  known to be the segment's file.

multiprocessing's way for tasks, `resource_sharer`, is not used. Each pickle would keep a copy of
the descriptor until somebody loads it, and can be loaded once: a pickle that is lost leaks, one
that is loaded twice fails. And it starts a thread, after which forking is no longer safe.

Loading never raises. It happens in a pool's loop, in the worker or in the thread that takes the
results, and an exception ends that: `multiprocessing.Pool` then waits for ever, an executor is
broken and nobody is told why. So what could not be reached arrives as `NotArrived`, and whatever it
is used for raises the reason, in the task, from where it gets to the caller.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NoReturn, final
from weakref import WeakKeyDictionary, WeakValueDictionary

from ..errors import (
    DescriptorLost,
    SegmentMismatch,
    SegmentNotFound,
    SegmentRefused,
    ShmDomainsError,
)
from ..lazy import LazyModule
from . import mp_locks, segment_file

if TYPE_CHECKING:
    import copy
    from multiprocessing import context as mp_context
    from multiprocessing import reduction
    from pathlib import Path

    Place = tuple[int, int | None, tuple[int, int]]
    """The pickling process, its descriptor, and the device and number of the file."""
else:
    copy = LazyModule("copy")
    mp_context = LazyModule("multiprocessing.context")
    reduction = LazyModule("multiprocessing.reduction")

lists: WeakValueDictionary[bytes, Any] = WeakValueDictionary()
"""By the segment's identity: the `DomainList`s of this process."""

_given: WeakKeyDictionary[Any, set[bytes]] = WeakKeyDictionary()
"""The segments that a child that is being spawned is given: its two lists on one become one."""

_WHAT_TO_DO = (
    "give the list to the workers when they begin (args of Process, initargs of a pool), or use "
    'one with a name: DomainList.open("name")'
)


def reduce(doms: Any) -> tuple[Any, ...]:
    """What `DomainList.__reduce__` returns."""
    identity = doms._identity
    fd = locks = None
    child = mp_context.get_spawning_popen()
    if child is not None:
        given = _given.setdefault(child, set())
        if identity not in given:
            mp_locks.need_to_be_passed_on(doms._locks[0])
            fd = reduction.DupFd(doms.fileno())
            locks = doms._locks
            given.add(identity)
    return restore, (type(doms), identity, doms._name, doms._path, fd, locks, _place_of(doms))


def _place_of(doms: Any) -> Place:
    try:
        number = doms.fileno()
    except DescriptorLost:
        return os.getpid(), None, doms._inode
    return os.getpid(), number, doms._inode


def restore(
    cls: Any,
    identity: bytes,
    name: str | None,
    path: Path | None,
    fd: Any,
    locks: Any,
    place: Place,
) -> Any:
    """The list of a pickle, or what stands for it."""
    number = None if fd is None else fd.detach()
    try:
        known = lists.get(identity)
        if known is not None and not known.closed:
            return known
        if number is not None:
            return _attach(cls, number, identity, name, path, locks)
        return _find(cls, identity, name, path, place)
    except (ShmDomainsError, OSError) as exc:
        return NotArrived(exc, (restore, (cls, identity, name, path, None, None, place)))
    finally:
        if number is not None:
            os.close(number)


def restore_part(doms: Any, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What a pickle has beside its list: the handle or the named lock that a method of it makes."""
    try:
        return getattr(doms, method)(*args, **options)
    except (ShmDomainsError, OSError) as exc:
        return NotArrived(exc, (restore_part, (doms, method, args, options)))


def _find(cls: Any, identity: bytes, name: str | None, path: Path | None, place: Place) -> Any:
    if path is None:
        return _open(cls, _reopen(place), identity, None, None)
    try:
        return _open(cls, segment_file.attach(path), identity, name, path)
    except (SegmentNotFound, SegmentMismatch):
        # The name is gone, or another segment's. Whoever pickled this list may have it still.
        try:
            number = _reopen(place)
        except (ShmDomainsError, OSError):
            number = None
        if number is None:
            raise
        return _open(cls, number, identity, name, path)


def _open(cls: Any, number: int, identity: bytes, name: str | None, path: Path | None) -> Any:
    try:
        return _attach(cls, number, identity, name, path, None)
    finally:
        os.close(number)


def _attach(
    cls: Any,
    number: int,
    identity: bytes,
    name: str | None,
    path: Path | None,
    locks: Any,
) -> Any:
    doms = cls.__new__(cls)
    try:
        doms._attach(number, cls._handle_type, *(locks or ()))
    except ShmDomainsError:
        raise
    except OSError as exc:
        # Attaching takes a descriptor, and address space for the segment's largest size.
        raise OSError(exc.errno, f"not attached: {exc.strerror}", path and str(path)) from None
    if doms._identity != identity:
        doms.close()
        raise SegmentMismatch(f"segment {path} was created anew since this was pickled")
    doms._name, doms._path = name, path
    lists[identity] = doms
    return doms


def _reopen(place: Place) -> int:
    """A descriptor of its own for the file that a process has open."""
    pid, number, inode = place
    mine = os.getpid()
    if number is None:
        raise SegmentNotFound(
            f"this list did not get to process {mine}: process {pid}, which pickled it, had closed "
            f"its descriptor; {_WHAT_TO_DO}"
        )
    try:
        # This opens nothing: the number may be a pipe's or a terminal's by now.
        found = os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
    except PermissionError:
        raise SegmentRefused(
            f"this list did not get to process {mine}: it may not look into process {pid}, which "
            "pickled it, and is another user's, has changed its user, or may do more; "
            f"{_WHAT_TO_DO}"
        ) from None
    except (FileNotFoundError, ProcessLookupError):
        found = -1
    try:
        if found >= 0:
            status = os.fstat(found)
            if (status.st_dev, status.st_ino) == inode:
                return os.open(f"/proc/self/fd/{found}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        if found >= 0:
            os.close(found)
    reason = "which pickled it, has ended or closed it"
    if not os.path.exists("/proc/self/fd"):
        reason = "which pickled it, cannot be seen without /proc"
    raise SegmentNotFound(
        f"this list did not get to process {mine}: process {pid}, {reason}; {_WHAT_TO_DO}"
    )


@final
class NotArrived:
    """Stands for a list, a handle or a named lock that could not be reached where its pickle was
    loaded. Whatever it is used for raises why; `repr` tells it. It may be pickled: who can reach
    the list gets it."""

    __slots__ = ("_again", "_why")

    def __init__(self, why: Exception, again: tuple[Any, ...]) -> None:
        object.__setattr__(self, "_why", why)
        object.__setattr__(self, "_again", again)

    def _raise(self, *_: object) -> NoReturn:
        # A new one each time: a raised exception collects the frames of whoever raised it.
        raise copy.copy(self._why)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # asked by protocols, which take it for a no
        self._raise()

    __setattr__ = __delattr__ = _raise
    __enter__ = __exit__ = __len__ = __iter__ = __contains__ = __getitem__ = _raise

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again

    def __repr__(self) -> str:
        return f"<not arrived: {self._why}>"
