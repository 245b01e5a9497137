"""Elections: one worker of many does a job, and another one goes on when it dies.

Whoever holds a named lock of the list is the leader. Each candidate has a thread that waits for the
lock and then runs the job, so the lock's rules are the election's: there are never two leaders, and
the death of one, which frees the lock, wakes the next.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import ListClosed, LockTimeout, ShmDomainsError
from ..holder import LockHolder

if TYPE_CHECKING:
    from typing_extensions import Self

    from .store import MutexBase

logger = logging.getLogger(__name__)

LOOK = 0.05
"""Seconds after which a candidate that waits looks whether it was stopped: a lock's slice."""
LONGEST_PAUSE = 60.0
"""Seconds between two attempts of a worker whose `run` keeps failing, at most."""
PATIENCE = 1.0
"""Seconds that the end of the interpreter waits for jobs that were told to stop."""

_running: set[Election] = set()
"""Of this process."""


class Election:
    """This process's part in an election; `DomainList.elect` begins it.

    It goes on until `stop`, the end of its ``with`` block, or until the list is closed. After a
    fork it goes on in the parent; the child has no part in it.

    >>> from shmdomains import DomainList
    >>> with DomainList().elect("scheduler", lambda stop: stop.wait()) as election:
    ...     election.name, election.running
    ('scheduler', True)
    """

    def __init__(
        self,
        doms: Any,
        mutex: MutexBase,
        run: Callable[[threading.Event], object],
        retry_after: float,
    ) -> None:
        if not retry_after > 0:
            raise ValueError(f"retry_after is {retry_after!r}; it is a time in seconds above 0")
        self._doms, self._mutex, self._run = doms, mutex, run
        self._retry_after = retry_after
        self._stop = threading.Event()
        self._pid = os.getpid()
        self._leads = False
        self._died: Callable[[], LockHolder] | None = None
        self._thread = threading.Thread(
            target=self._contend, name=f"shmdomains-elect-{mutex.name}", daemon=True
        )
        try:
            self._thread.start()
        except BaseException:  # Ctrl-C, or there are too many threads
            self._stop.set()
            raise

    @property
    def name(self) -> str:
        """The name of the lock whose holder leads."""
        return self._mutex.name

    @property
    def leader(self) -> bool:
        """Whether this process leads now: its `run` is running."""
        return self._leads and self._pid == os.getpid()

    @property
    def running(self) -> bool:
        """Whether this process takes part: it leads, waits, or pauses after a failure."""
        return self._pid == os.getpid() and self._thread.is_alive()

    @property
    def previous_owner_died(self) -> LockHolder | None:
        """The leader that died before this process became the leader, if one did."""
        return None if self._died is None else self._died()

    def stop(self, timeout: float | None = None) -> None:
        """Take part no longer: tell `run` to stop, and wait until it has returned and the lock is
        free. Called by `run` itself, it does not wait.

        Raises `LockTimeout` if that takes longer than `timeout` seconds: then the lock is still
        held, until `run` returns.
        """
        if self._pid != os.getpid():
            return
        self._stop.set()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise LockTimeout(
                f"mutex {self.name!r} was not free within {timeout} s: run() was told to stop and "
                "has not returned",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        what = "leads" if self.leader else "waits" if self.running else "over"
        return f"<Election {self.name!r} {what}>"

    # --- the thread ---

    def _contend(self) -> None:
        pause = self._retry_after
        _running.add(self)
        try:
            while self._take():
                began = time.monotonic()
                if self._lead():
                    return
                if time.monotonic() - began > LONGEST_PAUSE:
                    pause = self._retry_after  # it had worked
                if self._stop.wait(pause):
                    return
                pause = min(2 * pause, LONGEST_PAUSE)
        except ListClosed:
            pass
        except ShmDomainsError:
            logger.exception("election %r is over for this process", self.name)
        finally:
            _running.discard(self)

    def _take(self) -> bool:
        """Wait for the lock; false once the election is stopped."""
        while not self._stop.is_set():
            if self._mutex.acquire(timeout=LOOK):
                return True
        return False

    def _lead(self) -> bool:
        """Run the job, the lock held. Whether it came to its end."""
        try:
            self._died = self._mutex._last_death()
            self._leads = True
            if not self._stop.is_set():
                self._run(self._stop)
        except SystemExit:
            return True
        except BaseException:
            logger.exception("the leader of election %r failed", self.name)
            return False
        finally:
            self._leads = False
            if self._mutex.is_locked:
                self._mutex.unlock()
        return True


def end_elections(doms: object) -> None:
    """Tell those of this list to stop; waits for none."""
    for one in list(_running):
        if one._doms is doms:
            one._stop.set()


def _end_all() -> None:
    """A job that was told to stop may leave its lock in order before its thread is ended."""
    mine = list(_running)
    end = time.monotonic() + PATIENCE
    for one in mine:
        one._stop.set()
    for one in mine:
        one._thread.join(max(end - time.monotonic(), 0))


atexit.register(_end_all)
os.register_at_fork(after_in_child=_running.clear)
