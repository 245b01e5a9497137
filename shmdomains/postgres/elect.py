"""Elections where the lock can be lost: the leader is told, and takes part again.

A leader whose session ended leads no longer, while its `run` still runs: the server was started
anew, or this host was cut off for a lease. So the event that `run` looks at is set then, too. And a
server that is away ends no election: whoever takes part tries again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..errors import LockLost, Unavailable
from .mutex import PostgresMutex
from .session import Session


class Leadership(threading.Event):
    """Set when the election is to stop, and when the lock is lost."""

    def __init__(self, stop: threading.Event, session: Session) -> None:
        super().__init__()
        self._ends, self.session = stop, session

    def is_set(self) -> bool:
        return super().is_set() or self._ends.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left = 0.1 if end is None else min(end - time.monotonic(), 0.1)
            if left <= 0:
                break
            super().wait(left)
        return self.is_set()

    def look(self) -> None:
        """Set it if the session has ended."""
        if not self.session.is_there():
            self.set()

    @property
    def is_lost(self) -> bool:
        """Whether the lock is lost, and the election goes on."""
        return super().is_set() and not self._ends.is_set()


class Candidate(PostgresMutex):
    """The named lock of an election."""

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """False also while the server is away."""
        try:
            return super().acquire(block, timeout)
        except (Unavailable, LockLost):
            time.sleep(min(timeout or 0.1, 0.1))
            return False

    def unlock(self) -> None:
        """Release it, unless it was lost."""
        with suppress(LockLost):
            super().unlock()


def leading(doms: Any, run: Callable[[threading.Event], object]) -> Callable[[Any], object]:
    """`run` for `rules.elect.Election`, with an event that tells of a lost lock, too."""

    def lead(stop: threading.Event) -> object:
        state = doms._pool.mine()
        if state is None or state.session is None:
            raise doms._store.lost("its session is gone")
        leadership = Leadership(stop, state.session)
        doms._pool.leaderships.add(leadership)
        try:
            result = run(leadership)
        finally:
            doms._pool.leaderships.discard(leadership)
        if leadership.is_lost:
            raise doms._store.lost(leadership.session.gone or "its session ended")
        return result

    return lead
