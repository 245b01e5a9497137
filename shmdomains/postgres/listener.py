"""The listener: one thread and one connection of each process that uses a list on PostgreSQL.

Every third of a lease it asks the server something. So the server knows that this process lives,
and whoever waits for a lock knows that the server does. It lets the server hear of the sessions
that hold locks and are idle, whose end a lease after they were last heard of is what frees the
locks of a host that is stopped or cut off. It ends the sessions of threads that ended with a lock.

It also listens for those of this process who sleep (`wait`, `watch`): once for all of them, from
the first one on. Every commit of the list is then told to it (``tell`` in ``migrations/0001.sql``).
What was told while it had no connection is not known, so after a new one everything may have
changed.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import psycopg

from ..errors import ListClosed, Unavailable
from ..memory import greenlets
from .session import Gone, Refused

logger = logging.getLogger(__name__)

_KEPT = 4096
"""How many changes are remembered one by one."""


class Listener:
    """The thread of a `Pool`, whose module imports this one, and what it heard."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._news = threading.Condition(threading.RLock())
        self._recent: deque[tuple[int, int]] = deque(maxlen=_KEPT)  # (changes, record)
        self._all_changed = 0
        self.changes = 0
        """Counts what was told, and each time that everything may have changed."""
        self.events = 0
        """The number of the last event that is known of."""
        self._told: list[str] = []
        self._wanted = self._listens = False
        self._sleepers: dict[Callable[[], object], Callable[[], bool]] = {}
        self._events_max = -1  # how many events are kept, once anybody waits for them
        self._failure: str | None = None
        self.answered = time.monotonic()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._over = False
        self._ended = False  # `_wake` is closed: its number may be another file's
        self._conn: psycopg.Connection[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="shmdomains-listener", daemon=True)
        self._thread.start()

    def silent(self, seconds: float) -> bool:
        """Whether the server has not answered for so long."""
        return time.monotonic() - self.answered > seconds

    def stop(self) -> None:
        """End the thread; whoever sleeps wakes up."""
        with self._news:
            self._over = True
            self.changes += 1
            self._tell()
            if not self._ended:
                os.eventfd_write(self._wake, 1)
        if self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def forget(self) -> None:
        """In a child, which has no such thread: its parent's connection is not this process's."""
        if self._conn is not None:
            self._pool.forget_connection(self._conn)
        with suppress(OSError):
            os.close(self._wake)

    # --- for those who sleep ---

    def listen(self) -> int:
        """Hear of every commit from now on; returns `changes`. Raises `Unavailable`, `ListClosed`.

        What is read after this call is not older than what was told by then.
        """
        if self._listens:
            return self.changes
        end = time.monotonic() + self._pool.patience
        with self._news:
            self._wanted = True
            if not self._ended:
                os.eventfd_write(self._wake, 1)
        while not self._sleep(self._does_listen, min(0.1, self._pool.patience)):
            if self._over:
                raise ListClosed("this DomainList is closed")
            if time.monotonic() > end:
                raise Unavailable(
                    f"{self._pool.address.shown} could not be listened to: "
                    f"{self._failure or 'it does not answer'}"
                )
        return self.changes

    def _does_listen(self) -> bool:
        return self._listens

    def follow(self, events_max: int) -> None:
        """Number new events, too, from now on: somebody waits for them."""
        if self._events_max < 0:
            self._events_max = events_max
            self._listens = False
        self.listen()

    def sleep(self, changes: int, record: int | None, timeout: float) -> bool:
        """Sleep until something was told since `changes`, of this record or (``None``) of any."""
        return self._sleep(partial(self.has_changed, changes, record), timeout)

    def _sleep(self, due: Callable[[], bool], timeout: float) -> bool:
        """Sleep until ``due()``, or the listener is stopped. A greenlet lets others run."""
        end = time.monotonic() + timeout
        with self._news:
            if due() or self._over:
                return due()
        if greenlets.can_switch():
            self._sleep_in_hub(due, timeout)
        with self._news:
            while not due() and not self._over:
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._news.wait(left)
            return due()

    def _sleep_in_hub(self, due: Callable[[], bool], timeout: float) -> None:
        wakes: list[Callable[[], object]] = []

        def begin(wake: Callable[[], object]) -> None:
            wakes.append(wake)
            self.wake(due, wake)

        try:
            greenlets.wait_told(begin, timeout)
        finally:
            for wake in wakes:
                self.wake_no_more(wake)

    def wake(self, due: Callable[[], bool], wake: Callable[[], object]) -> None:
        """Have `wake` called once, in another thread, when ``due()`` is true or the listener is
        stopped. `due` is asked now, and whenever something was told."""
        with self._news:
            self._sleepers[wake] = due
            self._wake_sleepers()

    def wake_no_more(self, wake: Callable[[], object]) -> None:
        with self._news:
            self._sleepers.pop(wake, None)

    def _tell(self) -> None:
        self._news.notify_all()
        self._wake_sleepers()

    def _wake_sleepers(self) -> None:
        for wake, due in list(self._sleepers.items()):
            if self._over or due():
                del self._sleepers[wake]
                wake()

    def has_changed(self, changes: int, record: int | None) -> bool:
        """Whether something was told since `changes`, of this record or (``None``) of any."""
        if self.changes == changes:
            return False
        told = None if record is None else self.since(changes)
        return told is None or record in told

    def since(self, changes: int) -> set[int] | None:
        """The records that were told since; ``None``: perhaps all."""
        with self._news:
            if self._all_changed > changes or (
                len(self._recent) == _KEPT and self._recent[0][0] > changes + 1
            ):
                return None
            return {record for at, record in self._recent if at > changes}

    def knows_more(self, count: int) -> bool:
        """Whether there are more than `count` events."""
        return self.events > count

    def sleep_on_events(self, count: int, timeout: float) -> bool:
        """Sleep until there are more than `count` events."""
        return self._sleep(partial(self.knows_more, count), timeout)

    # --- the thread ---

    def _run(self) -> None:
        wait = 0.05
        while not self._over:
            try:
                self._conn = self._pool.connect()
                self._begin(self._conn)
                wait = 0.05
                self._serve(self._conn)
            except (psycopg.Error, Unavailable, Refused, Gone) as exc:
                self._failure = self._pool.without_password(str(exc))
                if "FATAL:" in self._failure:  # it answers, if only that it has no connection left
                    self.answered = time.monotonic()
                logger.debug("listener: %s", self._failure)
            except Exception:
                logger.exception("the listener of %s failed, and goes on", self._pool.address.shown)
            finally:
                self._everything_changed(False)
                if self._conn is not None:
                    with suppress(psycopg.Error):
                        self._conn.close()
                    self._conn = None
            self._pause(wait)
            wait = min(wait * 2, self._pool.address.lease / 3)
        with self._news:
            self._ended = True
            os.close(self._wake)

    def _pause(self, seconds: float) -> None:
        if not self._over:
            self._pool.tend()
            select.select([self._wake], [], [], seconds)
            with suppress(BlockingIOError, OSError):
                os.eventfd_read(self._wake)

    def _begin(self, conn: psycopg.Connection[Any]) -> None:
        self._pool.enter_process(conn)
        # The gate may be held by a commit that waits for a standby. Meanwhile this thread keeps up
        # the sessions that hold locks, and tries again.
        sixth = max(1, int(self._pool.address.lease * 1000 / 6))
        conn.execute("SELECT set_config('lock_timeout', %s, false)", [str(sixth)])
        self.answered = time.monotonic()
        # What is told while psycopg waits for something else.
        conn.add_notify_handler(lambda one: self._told.append(one.payload))
        if self._wanted:
            self._listen(conn)

    def _listen(self, conn: psycopg.Connection[Any]) -> None:
        number = self._pool.list
        conn.execute(f"LISTEN shmdomains_{number:d}")
        conn.execute("SELECT pg_advisory_lock_shared(lock_key(5, %s))", [number])
        gate = "SELECT pg_advisory_lock(lock_key(4, %s)), pg_advisory_unlock(lock_key(4, %s))"
        conn.execute(gate, [number, number])
        self._number(conn)
        self._everything_changed(True)

    def _number(self, conn: psycopg.Connection[Any]) -> None:
        """Give new events their numbers."""
        if self._events_max < 0:
            return
        values = [self._pool.list, self._events_max]
        row = conn.execute("SELECT publish(%s, %s)", values).fetchone()
        with self._news:
            self.events = max(self.events, 0 if row is None or row[0] is None else int(row[0]))
            self._tell()

    def _everything_changed(self, listens: bool) -> None:
        with self._news:
            self._listens = listens
            self.changes += 1
            self._all_changed = self.changes
            self._recent.clear()
            self._tell()

    def _serve(self, conn: psycopg.Connection[Any]) -> None:
        pg, third = conn.pgconn, self._pool.address.lease / 3
        waiting = select.poll()
        waiting.register(pg.socket, select.POLLIN)
        waiting.register(self._wake, select.POLLIN)
        ask_at = time.monotonic() + third
        while not self._over:
            left = min(ask_at - time.monotonic(), 1.0)
            if left > 0:
                waiting.poll(left * 1000)
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            if self._over:
                return
            self._hear(conn)
            if self._wanted and not self._listens:
                self._listen(conn)
                self._hear(conn)
            self._pool.tend()
            if time.monotonic() >= ask_at:
                self._pool.seen(conn)
                self.answered = time.monotonic()
                ask_at = self.answered + third
                self._hear(conn)

    def _hear(self, conn: psycopg.Connection[Any]) -> None:
        pg = conn.pgconn
        pg.consume_input()
        while (one := pg.notifies()) is not None:
            self._told.append(one.extra.decode())
        while self._told:
            told, self._told = self._told, []
            with self._news:
                for record in told:
                    if record.isdecimal():  # anybody in the database may tell anything
                        self.changes += 1
                        self._recent.append((self.changes, int(record)))
                self._tell()
            self._number(conn)
