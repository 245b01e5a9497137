"""`rules.store.Store` on PostgreSQL: each method is one round trip, unless it says otherwise.

What the server does in it stands in ``migrations/0001.sql``, what it is asked in `statements`. The
store is built of three parts, each on the one before: `calls` (asking, and lost sessions), `reads`,
`commits` (and lost answers). Here are locks, named locks, events and the rest.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from ..config.change import ConfigDirs
from ..errors import (
    AlreadyLocked,
    SegmentNotFound,
    TooManyMutexes,
)
from ..events import DomainEvent, EventType, detail_of
from ..holder import LockHolder
from ..memory import holder as local
from ..memory._core import core
from ..rules.store import Key
from ..rules.work import Caller
from . import statements as ask
from .commits import Commits
from .holders import MUTEX
from .pool import Pool
from .reads import UNKEPT, nobody_has
from .records import PostgresInfo
from .session import (
    Gone,
    Refused,
    Row,
    big,
    double,
    fields,
    integer,
    number,
    small,
    text,
    truth,
)
from .statements import DOMAIN, LIST

MOST_MUTEXES = 65_536
_EVENTS_AT_ONCE = 256
_OUTCOME = struct.Struct(">21xh")
_PLACES = 65_536
"""Records that are remembered by a key."""


class PostgresStore(Commits):
    """Records are numbers of rows; see `rules.store.Store`."""

    def __init__(self, pool: Pool, events_max: int) -> None:
        super().__init__(pool, events_max)
        self.most_mutexes = MOST_MUTEXES
        self._deaths: dict[str, int | None] = {}  # of a mutex that somebody here holds
        self._places: dict[tuple[str, bytes], int] = {}  # records by the keys that they had
        self._events: dict[int, DomainEvent] = {}  # read ahead

    # --- the list lock ---

    def lock_list(self, timeout: float | None) -> None:
        for neighbour in self.pool.beside(timeout):
            if neighbour.list_held:
                raise _stops(f"the list lock of {self._shown}")
        state, answer = self._wait(ask.LOCK_LIST, [], timeout)
        if not answer or fields(answer)[1] != b"\1":
            self._not_got(state)
            raise local.timed_out(
                "the list lock", timeout, self.holders.of_lock(LIST, self.pool.list)
            )
        self.pool.counts.got(False)

    def unlock_list(self) -> None:
        self._free(ask.UNLOCK_LIST, [self._list])

    # --- a domain's lock ---

    def lock(self, record: int, timeout: float | None) -> PostgresInfo | None:
        return self.lock_by(Key("record", record), timeout)

    def lock_by(self, key: Key, timeout: float | None) -> PostgresInfo | None:
        """Find by a key and lock; ``None``: there is no such domain."""
        if nobody_has(key):
            return None
        kind, value = key.kind, str(key.value).encode()
        for neighbour in self.pool.beside(timeout):
            for hold in neighbour.holds.values():
                held: Any = hold.record if kind == "record" else getattr(hold.info, kind)
                if held == key.value:
                    raise _stops(f"domain {hold.info.name!r}")
        keys = [value if kind == one else None for one in ("record", "uuid", "name", "id")]
        guess = self._guess(kind, value)
        keys = [guess, *keys, None]
        state, answer = self._wait(ask.LOCK, keys, timeout)
        outcome = _OUTCOME.unpack_from(answer)[0] if answer else 2
        if outcome == 1:
            info = PostgresInfo.locked(answer, self._source)
            self.pool.counts.got(info._died is not None)
            self._note(kind, value, info._record)
            return info
        self._not_got(state)
        if outcome == 0:
            return None
        raise self._too_late(key, timeout, answer)

    def _guess(self, kind: str, value: bytes) -> bytes | None:
        """The record that had this key last, unless the caller has it: his session would get the
        lock once more."""
        record = self._places.get((kind, value))
        state = self.pool.mine()
        if record is None or (state is not None and record in state.holds):
            return None
        return number(record)

    def _note(self, kind: str, value: bytes, record: int) -> None:
        """Whatever was guessed: another domain may have the key now, and a wrong guess takes the
        lock of the one that had it for a moment, in which others find it taken."""
        if kind == "record":
            return
        if len(self._places) >= _PLACES:
            self._places.clear()
        self._places[kind, value] = record

    def _too_late(self, key: Key, timeout: float | None, answer: bytes) -> Exception:
        info = self.read(big(fields(answer)[3])) if answer else self._peek_any(key)
        if info is None:
            return local.timed_out(f"domain {key.value!r}", timeout, None)
        name, record = info.name, info._record
        return local.timed_out(f"domain {name!r}", timeout, self.holders.of_lock(DOMAIN, record))

    def _peek_any(self, key: Key) -> PostgresInfo | None:
        if key.kind == "record":
            return self.read(int(str(key.value)))
        return self.peek(key)

    def unlock(self, record: int, seen: bool) -> None:
        state = self._state()
        assert state.session is not None
        values = [number(record), number(state.session.number), truth(seen)]
        try:
            state.session.call(ask.UNLOCK, values)
        except Gone as exc:
            if seen:
                self.pool.drop(state)  # else the next who uses what is left of it is told
            raise self.lost(str(exc)) from None
        except Refused as exc:
            raise self._refusal(exc) from None
        state.session.locks -= 1

    def died(self, record: int) -> LockHolder | None:
        state = self.pool.mine()
        hold = None if state is None else state.holds.get(record)
        died = None if hold is None else hold.info._died  # type: ignore[attr-defined]
        return None if died is None else self.holders.of_session(died)

    # --- waiting: see `domain_list`, which sleeps by the listener ---

    def receipt(self, record: int) -> int | None:
        rows = self._read(ask.VERSION, [self._list, number(record)])
        return big(rows[0][0]) if rows else None

    def sleep(self, record: int, receipt: object, timeout: float) -> bool:
        changes = self.pool.listener.listen()
        if self.receipt(record) != receipt:
            return True
        return self.pool.listener.sleep(changes, record, timeout)

    def stamp(self) -> object:
        return self.pool.listener.listen()

    def sleep_on_stamp(self, stamp: Any, timeout: float) -> bool:
        return self.pool.listener.sleep(stamp, None, timeout)

    # --- named locks ---

    def name_mutex(self, name: str) -> None:
        if name in self._mutexes:
            return
        if UNKEPT.search(name):
            raise ValueError(f"PostgreSQL keeps no name such as {name!r}")
        key = name.encode()
        rows = self._read(ask.MUTEX, [self._list, key])
        if not rows:
            self._read(ask.NAME_MUTEX, [self._list, key, number(self.most_mutexes)])
            rows = self._read(ask.MUTEX, [self._list, key])
        if not rows:
            raise TooManyMutexes(
                f"mutex {name!r}: there are {self.most_mutexes} already, which is the limit"
            )
        self._mutexes[name] = big(rows[0][0])

    def lock_mutex(self, name: str, timeout: float | None) -> None:
        mutex = self._mutexes[name]
        for neighbour in self.pool.beside(timeout):
            if name in neighbour.mutexes:
                raise _stops(f"mutex {name!r}")
        state, answer = self._wait(ask.LOCK_MUTEX, [number(mutex), None], timeout)
        row = fields(answer) if answer else ()
        if not row or small(row[1]) != 1:
            self._not_got(state)
            holder = self.holders.of_lock(MUTEX, mutex)
            raise local.timed_out(f"mutex {name!r}", timeout, holder)
        died = self._deaths[name] = None if row[2] is None else big(row[2])
        self.pool.counts.got(died is not None)

    def unlock_mutex(self, name: str, seen: bool) -> None:
        session = self._state().session
        assert session is not None
        values = [number(self._mutexes[name]), number(session.number), truth(seen)]
        self._free(ask.UNLOCK_MUTEX, values)

    def mutex_died(self, name: str) -> LockHolder | None:
        died = self._deaths.get(name)
        return None if died is None else self.holders.of_session(died)

    # --- processes ---

    def started(self, pid: int) -> int:
        return core.process_start(pid)

    def runs(self, pid: int, started: int) -> bool:
        return core.process_runs(pid, started)

    def caller(self) -> Caller:
        return self.holders.caller()

    def describe(self, caller: Caller) -> LockHolder:
        return self.holders.describe(caller)

    def lives(self, caller: Caller) -> bool:
        return self.holders.lives(caller)

    # --- events ---

    @property
    def event_count(self) -> int:
        [[count]] = self._read(ask.EVENT_COUNT, [self._list, number(self.events_max)])
        if count is None:
            raise SegmentNotFound(f"{self._shown} is gone")
        return big(count)

    def event(self, number_of: int) -> DomainEvent | None:
        found = self._events.pop(number_of, None)
        if found is not None:
            return found
        rows = self._read(ask.EVENTS, [self._list, number(number_of), number(_EVENTS_AT_ONCE)])
        events = [self._event(row) for row in rows]
        self._events = {one.number: one for one in events}
        return self._events.pop(number_of, None)

    def _event(self, row: Row) -> DomainEvent:
        type, who = EventType(small(row[2])), row[7]
        detail = detail_of(type, integer(row[3]))
        dead = None if who is None else self.holders.of_session(big(who))
        uuid, name, id = UUID(bytes=row[4]), text(row[5]), integer(row[6])
        return DomainEvent(big(row[0]), double(row[1]), type, detail, uuid, name, id, dead)

    def sleep_on_events(self, count: int, timeout: float | None) -> bool:
        listener = self.pool.listener
        listener.follow(self.events_max)
        return listener.sleep_on_events(count, 0.1 if timeout is None else min(timeout, 0.1))

    # --- config directories ---

    def remembered(self) -> ConfigDirs | None:
        config_dir, autostart_dir, _ = self._of_host()
        if config_dir is None:
            return None
        return ConfigDirs(
            Path(os.fsdecode(config_dir)),
            None if autostart_dir is None else Path(os.fsdecode(autostart_dir)),
        )

    def remember(self, dirs: ConfigDirs | None) -> None:
        paths = (None, None) if dirs is None else (dirs.config_dir, dirs.autostart_dir)
        bytes_of = [None if path is None else os.fsencode(path) for path in paths]
        self._held(ask.SET_DIRS, [self._list, self.pool.host.encode(), *bytes_of])

    def driver(self) -> str | None:
        driver = self._of_host()[2]
        return None if driver is None else driver.decode()

    def set_driver(self, name: str | None) -> None:
        driver = None if name is None else name.encode()
        self._held(ask.SET_DRIVER, [self._list, self.pool.host.encode(), driver])

    def _of_host(self) -> Sequence[bytes | None]:
        rows = self._read(ask.DIRS, [self._list, self.pool.host.encode()])
        return rows[0] if rows else (None, None, None)


def _stops(what: str) -> AlreadyLocked:
    return AlreadyLocked(
        f"{what} is held by another task of this thread, or by the thread itself outside of its "
        "tasks; a wait that blocks the thread would never end: wait with shmdomains.aio"
    )
