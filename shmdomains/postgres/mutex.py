"""Named locks of a `PostgresDomainList`, whose module imports this one."""

from __future__ import annotations

from typing import Any

from ..rules.plain_mutex import PlainMutex


class PostgresMutex(PlainMutex):
    """A handle to a named lock of a `PostgresDomainList`; see `shmdomains.Mutex`."""

    def lock(self, timeout: float | None = None) -> None:
        """Take it; see `MutexBase.lock`."""
        self._list._need_living()
        try:
            super().lock(timeout)
            self._list._mine.asks = False
        except BaseException:
            self._list._store.put_back()
            raise

    def _give_back(self, seen: bool) -> None:
        doms = self._list
        state = doms._mine
        try:
            doms._store.unlock_mutex(self.name, seen)
        finally:
            state.mutexes.pop(self.name, None)
            doms._pool.rest(state)

    def __reduce__(self) -> tuple[Any, ...]:
        return PostgresMutex, (self._list, self.name, self._timeout)
