"""A handle to a domain of a `PostgresDomainList`, whose module imports this one.

The rules of every handle, in fewer round trips: the end of a block commits and unlocks in one.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from ..errors import (
    LockLost,
)
from ..job import Job
from ..lazy import LazyModule
from ..rules.plain import PlainDomain, _Hold
from ..rules.tasks import ask
from .jobs import PostgresJob
from .records import PostgresInfo

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..memory import asking
else:
    asking = LazyModule("shmdomains.memory.asking")


class Stamp(int):
    """What a domain was when it was looked at: its version; 0: it is removed. `changes` is what the
    listener had heard before."""

    changes: int | None = None


class PostgresDomain(PlainDomain[int]):
    """A handle to a domain of a `PostgresDomainList`; see `shmdomains.Domain`."""

    __slots__ = ("_lost",)
    _list: Any
    _lost: bool
    """Whether the lock that was taken through this handle last was lost."""

    def _held(self) -> _Hold[int]:
        hold = self._list._mine.holds.get(self._record)
        if hold is None and getattr(self, "_lost", False):
            raise self._list._store.lost("that was found before")
        return hold or super()._held()

    def rollback(self) -> None:
        """Drop all changes since the last commit. If the lock was lost, they are dropped."""
        if self.is_locked or not getattr(self, "_lost", False):
            super().rollback()

    @property
    def token(self) -> int:
        """A number that rises with each lock of this domain, on all hosts. Give it to a system
        outside that can compare: it can then refuse a holder who lost the lock without knowing.
        Raises `DomainNotLocked`."""
        return read_by(self._held())._token

    def lock(self, timeout: float | None = None) -> None:
        """Lock the domain; see `DomainBase.lock`."""
        self._lost = False
        try:
            super().lock(timeout)
        except BaseException:
            self._list._store.put_back()
            raise

    def unlock(self, timeout: float | None = None) -> None:
        """Commit the changes and release the lock, in one round trip; released even if the commit
        fails. Raises `DomainNotLocked`, `NotOwner`, `LockLost`, `InDoubt`."""
        hold = self._list._mine.holds.get(self._record)
        if hold is None:
            super().unlock(timeout)
            return
        work = self._work if hold.intends else None
        if work is not None:
            self._work = work.without_intention()
        if not hold.changes and not hold.noted:
            self._list._give_back(hold, seen=True)
            return
        try:
            self._list._commit(hold, timeout, unlock=True)
        except BaseException:
            with suppress(LockLost):
                self._list._give_back(hold, seen=True)
            raise
        self._list._let_go(hold)

    def job(
        self,
        operation: str,
        kind: Job = Job.MODIFY,
        timeout: float | None = None,
        *,
        allow: Iterable[Job] | None = None,
        why: str | None = None,
    ) -> PostgresJob:
        """A job, for a ``with`` block; see `shmdomains.Domain.job`."""
        return PostgresJob(self, operation, kind, timeout, allow, why)

    async def __aenter__(self) -> Self:
        """As ``with``, in a task: locks in another thread (`shmdomains.aio`)."""
        ask()
        if not self.is_locked:
            await asking.work_or_undo(self._lock_and_read, PostgresDomain._release_unseen)
        return self.__enter__()

    def _lock_and_read(self) -> Self:
        self.lock()
        _ = self.definition  # so that asking for it takes no round trip
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        hold = self._list._mine.holds.get(self._record)
        if hold is None or hold.depth > 1 or kind is GeneratorExit:
            self.__exit__(kind, value, traceback)
        else:
            await asking.finish(self.__exit__, kind, value, traceback)

    @property
    def _receipt(self) -> object:
        hold = self._list._mine.holds.get(self._record)
        if hold is not None:
            return Stamp(read_by(hold)._version)
        return Stamp(self._list._store.receipt(self._record) or 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return PostgresDomain, (self._list, self._record, self._uuid)


def read_by(hold: _Hold[int]) -> PostgresInfo:
    """What its holder read, or committed last."""
    return cast("PostgresInfo", hold.info)
