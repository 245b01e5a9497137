"""Named locks over any `Store`, in Python; see `MutexBase`. Part of `plain`."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..deadline import Deadline, check_timeout
from ..errors import AlreadyLocked, LockOrder, LockTimeout, MutexNotLocked, NotOwner
from ..holder import LockHolder
from ..names import check_lock_name

if TYPE_CHECKING:
    from typing_extensions import Self


class PlainMutex:
    """A handle to a named lock of a `PlainDomainList`, `doms`, whose module imports this one."""

    _list: Any = None  # Ctrl-C may end it as it begins

    def __init__(self, doms: Any, name: str, timeout: float | None) -> None:
        self._list, self._timeout, self.name = doms, timeout, name
        check_timeout(timeout)
        doms._usable()
        doms._store.name_mutex(check_lock_name(name))

    def __del__(self) -> None:
        if self._list is None or self._list._mine.mutexes.get(self.name) != id(self):
            return
        self._give_back(seen=False)
        warnings.warn(
            f"{self._what} was dropped while it was locked, and is freed: use 'with'",
            ResourceWarning,
            stacklevel=1,
        )

    @property
    def _what(self) -> str:
        return f"mutex {self.name!r}"

    @property
    def is_locked(self) -> bool:
        return self.name in self._list._mine.mutexes

    @property
    def previous_owner_died(self) -> LockHolder | None:
        died = self._last_death()
        return None if died is None else died()

    def _last_death(self) -> Callable[[], LockHolder] | None:
        self._need_held()
        died: LockHolder | None = self._list._store.mutex_died(self.name)
        return None if died is None else lambda: died

    def lock(self, timeout: float | None = None) -> None:
        """Take it; see `MutexBase.lock`."""
        deadline, doms = Deadline(timeout), self._list
        doms._usable()
        if self.is_locked:
            raise AlreadyLocked(f"this thread holds {self._what} already")
        if timeout != 0 and (doms.is_locked or doms._mine.holds):
            raise LockOrder(
                f"this thread holds the list or a domain and would wait for {self._what}; named "
                "locks come first: take it before, or use timeout=0"
            )
        if timeout is None and doms._mine.mutexes:
            raise LockOrder(
                f"this thread holds a named lock and would wait for {self._what}, perhaps for "
                "ever; give it a timeout"
            )
        doms._store.lock_mutex(self.name, deadline.left())
        doms._mine.mutexes[self.name] = id(self)
        doms._mutex_held_by[self.name] = threading.get_ident()
        if doms.closed:
            self._give_back(seen=False)
            doms._usable()

    def unlock(self) -> None:
        """Release it. Raises `MutexNotLocked`, or `NotOwner` in another thread."""
        self._need_held()
        self._give_back(seen=True)

    def try_lock(self) -> bool:
        """Take it if it is free. Allowed whatever this thread holds."""
        return self.acquire(block=False)

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """`lock` in the manner of `multiprocessing.Lock`."""
        try:
            self.lock(0 if not block or (timeout is not None and timeout < 0) else timeout)
        except LockTimeout:
            return False
        return True

    def release(self) -> None:
        """`unlock` in the manner of `multiprocessing.Lock`."""
        self.unlock()

    def __enter__(self) -> Self:
        self.lock(self._timeout)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        if self.is_locked:
            self.unlock()

    def _need_held(self) -> None:
        if self.is_locked:
            return
        if self.name in self._list._mutex_held_by:
            raise NotOwner(f"another thread of this process holds {self._what}")
        raise MutexNotLocked(f"this thread does not hold {self._what}")

    def _give_back(self, seen: bool) -> None:
        self._list._mutex_held_by.pop(self.name, None)  # before the next holder enters itself
        self._list._store.unlock_mutex(self.name, seen)
        del self._list._mine.mutexes[self.name]

    def __repr__(self) -> str:
        return f"<Mutex {self.name!r}{' locked' if self.is_locked else ''}>"
