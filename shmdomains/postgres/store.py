"""`rules.store.Store` on PostgreSQL: each method is one round trip, unless it says otherwise.

What the server does in it stands in ``migrations/0001.sql``. Here are the statements, their values,
and what becomes of an answer that did not come:

- Whoever holds nothing asks again through another session, for a lease.
- Whoever holds something has lost it with the session: `LockLost`. Nothing of his is applied.
- A commit whose answer is lost may have happened. The session's row has the number of its last
  commit. When the session is over, and so nothing can come of it any more, a new one reads that
  row, locks the domain again, and tells `applied` from not. `InDoubt` if the server does not come
  back in time.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from ..config.change import ConfigDirs
from ..errors import (
    AlreadyLocked,
    ContractError,
    DomainExists,
    InDoubt,
    LockLost,
    LockOrder,
    SegmentFull,
    SegmentRefused,
    TooManyMutexes,
    Unavailable,
)
from ..events import DomainEvent, EventType, detail_of
from ..holder import LockHolder
from ..memory import holder as local
from ..memory._core import core
from ..rules.store import Changes, Filter, Key, NewDomain, News
from ..rules.work import Caller
from ..xml.definition import DomainDef
from . import statements as ask
from .holders import MUTEX, Holders
from .pool import Pool, State
from .records import PostgresInfo, Source, new_row
from .session import (
    Gone,
    Refused,
    Row,
    Session,
    Statement,
    big,
    double,
    integer,
    number,
    small,
    text,
    truth,
)
from .statements import DOMAIN, LIST

MOST_MUTEXES = 65_536
_LONGEST = 30.0
"""Seconds of one statement that waits: while it does, the server cleans up nothing newer."""
_EVENTS_AT_ONCE = 256
_LIFE = 1 << 40
"""The tokens of one life of the server."""


class PostgresStore:
    """Records are numbers of rows; see `rules.store.Store`."""

    def __init__(self, pool: Pool, events_max: int) -> None:
        self.pool = pool
        self.holders = Holders(pool)
        self.events_max = events_max
        self._source = Source(self.holders.describe, self._load)
        self.most_mutexes = MOST_MUTEXES
        self._mutexes: dict[str, int] = {}
        self._deaths: dict[str, int | None] = {}  # of a mutex that somebody here holds
        self._events: dict[int, DomainEvent] = {}

    @property
    def _list(self) -> bytes:
        return b"%d" % self.pool.list

    # --- asking ---

    def _wait(
        self, statement: Statement, values: list[bytes | None], timeout: float | None
    ) -> tuple[State, list[Row]]:
        """A statement that takes a lock, its last value being the milliseconds of its wait. No
        rows: it was not free in time. Asks again through a new session if nothing is held."""
        began = time.monotonic()
        end = None if timeout is None else began + timeout
        patience = self.pool.patience
        give_up = began + patience
        lost: list[int] = []
        while True:
            state = self.pool.begin(patience if timeout is None else max(timeout, patience))
            session = state.session
            assert session is not None
            left = None if end is None else max(end - time.monotonic(), 0)
            slice = _LONGEST if left is None else min(left, _LONGEST)
            milliseconds = 0 if timeout == 0 else max(1, int(slice * 1000))
            given = [self._list, number(session.number), *values, number(milliseconds)]
            if lost and statement is not ask.LOCK_LIST:
                given[-2] = _numbers(lost)
            session.locks += 1
            try:
                rows = session.call(statement, given, waits=timeout != 0)
                if rows[0][-1] == b"\1":
                    self.pool.counts.waited(time.monotonic() - began)
                return state, rows
            except Refused as exc:
                if exc.state == "55P03" and left is not None and left <= slice:
                    self.pool.counts.waited(time.monotonic() - began)
                    return state, []
                if exc.state == "55P03" or (exc.state == "40P01" and left is not None):
                    session.locks -= 1  # a cycle of waits that end by themselves is none
                    continue
                self._put_back(state)  # an error does not undo the locking of an advisory lock
                raise self._refusal(exc) from None
            except ContractError:
                session.locks -= 1
                raise
            except Gone as exc:
                held = not state.is_empty
                self.pool.drop(state)
                if held:
                    raise self.lost(str(exc)) from None
                lost.append(session.number)
                if time.monotonic() > give_up:
                    raise Unavailable(f"{self._shown} went away: {exc}") from None
            except BaseException:
                self._put_back(state)
                raise

    def put_back(self) -> None:
        """After a call that was interrupted: what it locked, and no handle knows of."""
        state = self.pool.mine()
        if state is None or state.session is None:
            return
        for record, hold in list(state.holds.items()):
            if hold.handle is None:
                del state.holds[record]
        if state.session.locks != state.count:
            self._put_back(state)
        elif state.asks:
            state.asks = False
            self.pool.rest(state)

    def _put_back(self, state: State) -> None:
        session = state.session
        assert session is not None
        try:
            for which, kind in session.call(ask.HELD):
                if not self._is_mine(state, big(kind), big(which)):
                    session.call(*ask.unlock(big(kind), big(which), session.number))
            session.locks, state.asks = state.count, False
            self.pool.rest(state)
        except (Gone, Refused):
            self.pool.drop(state)
        except BaseException:
            self.pool.drop(state)
            raise

    def _not_got(self, state: State) -> None:
        """A lock was asked for and is not held."""
        assert state.session is not None
        state.session.locks -= 1
        state.asks = False
        self.pool.rest(state)

    def _is_mine(self, state: State, kind: int, which: int) -> bool:
        if kind == LIST:
            return which == self.pool.list and state.list_held
        if kind == DOMAIN:
            return which in state.holds
        return which in {self._mutexes.get(name) for name in state.mutexes}

    def _held(self, statement: Statement, values: list[bytes | None]) -> list[Row]:
        """A statement of a holder, through the session that holds the lock."""
        state = self.pool.mine()
        if state is None or state.session is None:
            raise self.lost("its session is gone")
        try:
            return state.session.call(statement, values)
        except Gone as exc:
            self.pool.drop(state)
            raise self.lost(str(exc)) from None
        except Refused as exc:
            raise self._refusal(exc) from None

    def _free(self, statement: Statement, values: list[bytes | None]) -> None:
        """Free a lock of the list's."""
        state = self._state()
        self._held(statement, values)
        assert state.session is not None
        state.session.locks -= 1

    def lost(self, why: str) -> LockLost:
        return LockLost(
            f"the locks that {core.owner_words()} held on {self._shown} are lost, and with them "
            f"what was not committed: {why}"
        )

    def _refusal(self, exc: Refused) -> Exception:
        if exc.state == "40P01":
            return LockOrder(f"{self._shown}: waits for locks of several lists form a cycle")
        if exc.state == "42501":
            return SegmentRefused(f"{self._shown}: {exc.text}")
        if exc.state.startswith("53"):
            return SegmentFull(f"{self._shown}: {exc.text}")
        return Unavailable(f"{self._shown}: {exc}")

    @property
    def _shown(self) -> str:
        return self.pool.address.shown

    def _look_at(self, statement: Statement, values: list[bytes | None]) -> list[Row]:
        """`_read`, perhaps of a standby."""
        try:
            return self.pool.read(statement, values)
        except Refused as exc:
            raise self._refusal(exc) from None

    def _read(self, statement: Statement, values: list[bytes | None]) -> list[Row]:
        try:
            return self.pool.ask(statement, values)
        except Refused as exc:
            raise self._refusal(exc) from None

    # --- the list lock ---

    def lock_list(self, timeout: float | None) -> None:
        for neighbour in self.pool.beside(timeout):
            if neighbour.list_held:
                raise _stops(f"the list lock of {self._shown}")
        state, rows = self._wait(ask.LOCK_LIST, [], timeout)
        if not rows or rows[0][0] != b"\1":
            self._not_got(state)
            raise local.timed_out(
                "the list lock", timeout, self.holders.of_lock(LIST, self.pool.list)
            )
        self.pool.counts.got(False)

    def unlock_list(self) -> None:
        self._free(ask.UNLOCK_LIST, [self._list])

    # --- finding and reading ---

    def find(self, key: Key) -> int | None:
        info = self.peek(key)
        return None if info is None else info._record

    def peek(self, key: Key) -> PostgresInfo | None:
        """The committed state of the domain with this key."""
        if _nobody_has(key):
            return None
        value = str(key.value).encode()
        return self._one(ask.BY[key.kind], [self._list, value])

    def glance(self, key: Key) -> PostgresInfo | None:
        """`peek`, perhaps at a standby."""
        if _nobody_has(key):
            return None
        rows = self._look_at(ask.BY[key.kind], [self._list, str(key.value).encode()])
        return self._info(rows[0]) if rows else None

    def _one(self, statement: Statement, values: list[bytes | None]) -> PostgresInfo | None:
        rows = self._read(statement, values)
        return self._info(rows[0]) if rows else None

    def _info(self, row: Row) -> PostgresInfo:
        return PostgresInfo.of(row, self._source)

    def read(self, record: int) -> PostgresInfo | None:
        return self._one(ask.BY["record"], [self._list, number(record)])

    def some(self, records: Iterable[int]) -> list[PostgresInfo]:
        """The committed states of those that are there."""
        rows = self._read(ask.SOME, [self._list, _numbers(records)])
        return [self._info(row) for row in rows]

    def records(self) -> Iterable[int]:
        return [record for record, _ in self.handles()]

    def handles(self) -> list[tuple[int, bytes]]:
        """Each record and its uuid."""
        rows = self._read(ask.RECORDS, [self._list])
        return [(big(row[0]), row[1] or b"") for row in rows]

    def identity(self, uuid: Any, name: str) -> PostgresInfo | None:
        """Who has this uuid or, if nobody has, this name; without definitions."""
        key = None if uuid is None else str(uuid).encode()
        rows = self._read(ask.IDENTITY, [self._list, key, name.encode()])
        return PostgresInfo.of(rows[0], None) if rows else None

    def _filter(self, wanted: Filter) -> list[bytes | None]:
        flags = (wanted.active, wanted.persistent, wanted.autostart)
        states = wanted.states
        host = wanted.host
        if host is not None and _UNKEPT.search(host):
            host = ""  # nobody's either
        return [
            self._list,
            *(None if flag is None else truth(flag) for flag in flags),
            None if states is None else ("{" + ",".join(map(str, map(int, states))) + "}").encode(),
            None if host is None else host.encode(),
        ]

    def scan(self, wanted: Filter, definitions: bool) -> list[PostgresInfo]:
        """The committed states of the domains that match, all of one moment."""
        rows = self._look_at(ask.SCAN_ALL if definitions else ask.SCAN, self._filter(wanted))
        source = self._source if definitions else None
        return [PostgresInfo.of(row, source) for row in rows]

    def count(self, wanted: Filter) -> int:
        return big(self._look_at(ask.COUNT, self._filter(wanted))[0][0])

    def behind(self) -> float:
        """See `PostgresDomainList.behind`."""
        return double(self._look_at(ask.BEHIND, [])[0][0])

    def with_work(self) -> list[PostgresInfo]:
        """Those in which something is under way, without definitions."""
        rows = self._read(ask.WITH_WORK, [self._list])
        return [PostgresInfo.of(row, self._source) for row in rows]

    def versions(self) -> dict[int, int]:
        """The version of each record."""
        return {big(row[0]): big(row[1]) for row in self._read(ask.VERSIONS, [self._list])}

    def _load(self, record: int, version: int) -> tuple[DomainDef, DomainDef | None]:
        """The definitions of a domain that the caller has locked."""
        found = self._source.definitions.get(record, version)
        if found is not None:
            return found
        rows = self._read(ask.TYPED, [number(record)])
        if not rows or rows[0][0] is None:
            raise self.lost(f"record {record} is gone")
        return self._source.definitions.decoded(record, version, (rows[0][0], rows[0][1]))

    # --- a domain's lock ---

    def lock(self, record: int, timeout: float | None) -> PostgresInfo | None:
        return self.lock_by(Key("record", record), timeout)

    def lock_by(self, key: Key, timeout: float | None) -> PostgresInfo | None:
        """Find by a key and lock; ``None``: there is no such domain."""
        if _nobody_has(key):
            return None
        kind, value = key.kind, str(key.value).encode()
        for neighbour in self.pool.beside(timeout):
            for hold in neighbour.holds.values():
                held: Any = hold.record if kind == "record" else getattr(hold.info, kind)
                if held == key.value:
                    raise _stops(f"domain {hold.info.name!r}")
        keys = [value if kind == one else None for one in ("record", "uuid", "name", "id")]
        keys.append(None)
        state, rows = self._wait(ask.LOCK, keys, timeout)
        outcome = small(rows[0][0]) if rows else 2
        if outcome == 1:
            row = rows[0]
            died = None if row[17] is None else big(row[17])
            self.pool.counts.got(died is not None)
            return PostgresInfo.of(row[1:16], self._source, big(row[16]), died)
        self._not_got(state)
        if outcome == 0:
            return None
        raise self._too_late(key, timeout, rows)

    def _too_late(self, key: Key, timeout: float | None, rows: list[Row]) -> Exception:
        if rows:
            record, name = big(rows[0][1]), None
        info = self.read(record) if rows else self._peek_any(key)
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

    # --- commits ---

    def _state(self) -> State:
        state = self.pool.mine()
        if state is None or state.session is None:
            raise self.lost("its session is gone")
        return state

    @staticmethod
    def _read_by(state: State, record: int) -> PostgresInfo:
        """What the holder read, or committed last."""
        info = state.holds[record].info
        assert isinstance(info, PostgresInfo)
        return info

    def insert(
        self, new: NewDomain, news: Sequence[News], timeout: float | None
    ) -> tuple[int, PostgresInfo]:
        definition = new.definition
        work = None if new.work is None else new.work.encode()
        values = [
            str(new.uuid).encode(),
            new.name.encode(),
            number(new.state),
            truth(new.persistent),
            definition.encode(),
            definition.to_xml().encode(),
            work,
            number(self.events_max),
            _news(news),
        ]
        state = self._state()
        assert state.session is not None
        state.session.locks += 1
        try:
            rows = self._commits(state, ask.INSERT, values)
        except Gone as exc:
            self._fell_through(state, exc, timeout, f"define domain {new.name!r}")
            raise self.lost(f"{exc}; domain {new.name!r} is defined all the same") from None
        except Refused as exc:
            state.session.locks -= 1  # the lock comes last in it
            raise self._refused_insert(exc, new) from None
        info = self._inserted(rows[0], new)
        return info._record, info

    def _inserted(self, row: Row, new: NewDomain) -> PostgresInfo:
        work = None if new.work is None else new.work.encode()
        assert row[0] is not None
        values = new_row(row[0], new.uuid, new.name, new.state, new.persistent, work)
        self._source.definitions.put(big(row[0]), 1, (new.definition, None))
        return PostgresInfo.of(values, self._source, big(row[1]))

    def _refused_insert(self, exc: Refused, new: NewDomain) -> Exception:
        if exc.constraint == "domains_uuid":
            return DomainExists(f"domain '{new.name}' already exists with uuid {new.uuid}")
        if exc.constraint == "domains_name":
            return DomainExists(f"domain with name '{new.name}' already exists")
        return self._refusal(exc)

    def commit(
        self, record: int, changes: Changes, news: Sequence[News], timeout: float | None
    ) -> PostgresInfo:
        return self.commit_and(record, changes, news, timeout, False)

    def commit_and(
        self,
        record: int,
        changes: Changes,
        news: Sequence[News],
        timeout: float | None,
        unlock: bool,
    ) -> PostgresInfo:
        """`commit`, and in the same round trip `unlock`."""
        state = self._state()
        info = self._read_by(state, record)
        values = self._changed(info, changes, news, unlock)
        try:
            rows = self._commits(
                state, ask.COMMIT, [number(record), number(info._version), *values]
            )
        except Gone as exc:
            info = self._settle(state, info, values, exc, timeout, unlock)
        except Refused as exc:
            if exc.constraint == "domains_name":
                name = changes.get("name", info.name)
                raise DomainExists(f"domain with name '{name}' already exists") from None
            raise self._refusal(exc) from None
        except BaseException:
            self._interrupted(state, info, changes)
            raise
        else:
            if rows[0][0] is None:
                raise self.lost(f"domain {info.name!r} was changed by somebody else")
        if unlock and state.session is not None:
            state.session.locks -= 1
        return self._after(info, changes)

    def _interrupted(self, state: State, info: PostgresInfo, changes: Changes) -> None:
        """A signal handler raised in a commit: what its holder reads is what came of it."""
        session = state.session
        assert session is not None
        try:
            rows = session.call(ask.VERSION, [self._list, number(info._record)])
        except BaseException:
            self.pool.drop(state)
            return
        if rows and big(rows[0][0]) != info._version:
            state.holds[info._record].info = self._after(info, changes)

    def _changed(
        self, info: PostgresInfo, changes: Changes, news: Sequence[News], unlock: bool
    ) -> list[bytes | None]:
        get: Callable[..., Any] = changes.get
        live, successor = get("definition"), get("next_definition")
        pid = get("pid", info.pid)
        host = get("host", info.host)
        return [
            str(get("name", info.name)).encode(),
            number(get("id", info.id)),
            number(get("state", info.state)),
            number(get("reason", info.reason)),
            truth(get("persistent", info.persistent)),
            truth(get("autostart", info.autostart)),
            number(pid),
            number(get("started", info._started)),
            None if host is None else str(host).encode(),
            truth("data" in changes),
            get("data"),
            truth("work" in changes),
            get("work"),
            truth("definition" in changes),
            None if live is None else live.encode(),
            None if live is None else live.to_xml().encode(),
            truth("next_definition" in changes),
            None if successor is None else successor.encode(),
            None if successor is None else successor.to_xml().encode(),
            number(self.events_max),
            _news(news),
            truth(unlock),
        ]

    def _after(self, info: PostgresInfo, changes: Changes) -> PostgresInfo:
        after = info.changed(dict(changes))
        if "definition" in changes and "next_definition" in changes:
            known = changes["definition"], changes["next_definition"]
            self._source.definitions.put(after._record, after._defined, known)
        return after

    def remove(self, record: int, news: Sequence[News], timeout: float | None) -> None:
        state = self._state()
        info = self._read_by(state, record)
        values = [number(record), number(info._version), number(self.events_max), _news(news)]
        try:
            rows = self._commits(state, ask.REMOVE, values)
        except Gone as exc:
            self._fell_through(state, exc, timeout, f"remove domain {info.name!r}")
            raise self.lost(f"{exc}; domain {info.name!r} is removed all the same") from None
        except Refused as exc:
            raise self._refusal(exc) from None
        if rows[0][0] != b"\1":
            raise self.lost(f"domain {info.name!r} was changed by somebody else")
        assert state.session is not None
        state.session.locks -= 1

    def _commits(self, state: State, statement: Statement, values: list[bytes | None]) -> list[Row]:
        session = state.session
        assert session is not None
        session.commits += 1
        place = [self._list, number(session.number), number(session.commits)]
        rows = session.call(statement, [*place, *values])
        self.pool.counts.committed()
        return rows

    def next_id(self, timeout: float | None) -> int:
        [[id]] = self._held(ask.NEXT_ID, [self._list])
        if id is None:
            raise SegmentFull(f"{self._shown}: every id up to 2147483647 was given out")
        return integer(id)

    # --- lost answers ---

    def _patience(self, timeout: float | None) -> float:
        """How long a server that owes an answer is waited for: its lost session may need a lease
        to end."""
        least = self.pool.address.lease
        return 3 * least if timeout is None else max(timeout, least)

    def _done_by(
        self, state: State, exc: Gone, timeout: float | None, what: str
    ) -> tuple[Session, bool]:
        """A new session, and whether the last commit of the lost one happened."""
        lost = state.session
        assert lost is not None
        if not exc.asked:
            self.pool.drop(state)
            raise self.lost(str(exc)) from None
        number_of = lost.commits
        try:
            session, done = self.pool.done_by(lost, self._patience(timeout))
        except Unavailable as gone:
            self.pool.drop(state)
            raise InDoubt(
                f"whether {core.owner_words()} did {what} is not known: {exc}; {gone}. Look when "
                "the server is back"
            ) from None
        return session, done >= number_of

    def _fell_through(self, state: State, exc: Gone, timeout: float | None, what: str) -> None:
        """After a lost answer: returns if it happened; `LockLost` if not."""
        session, happened = self._done_by(state, exc, timeout, what)
        self.pool.give(session)
        self.pool.drop(state)
        if not happened:
            raise self.lost(str(exc)) from None

    def _settle(
        self,
        state: State,
        info: PostgresInfo,
        values: list[bytes | None],
        exc: Gone,
        timeout: float | None,
        unlock: bool,
    ) -> PostgresInfo:
        """The state that was committed from, after a lost answer: the commit happened, or is made
        now. Its holder goes on with a new session if nobody else had the domain meanwhile."""
        what = f"the commit of domain {info.name!r}"
        session, happened = self._done_by(state, exc, timeout, what)
        alone = list(state.holds) == [info._record] and not (state.list_held or state.mutexes)
        if happened and unlock:
            self.pool.give(session)  # it has nothing of what else the lost one held
            return info
        if not alone:
            self.pool.give(session)
            self.pool.drop(state)
            applied = f"; {what} is applied" if happened else ""
            raise self.lost(f"{exc}{applied}")
        lost = state.session
        self._adopt(state, session)
        try:
            again = self._lock_again(session, info, lost)
        except (Gone, Refused) as second:
            self.pool.drop(state)
            raise self.lost(f"{exc}; {second}{' (it is applied)' if happened else ''}") from None
        expected = info._version + happened
        mine = again is not None and again._version == expected
        if again is None or not mine or not _next_token(info._token, again._token):
            with_lock = again is not None
            if with_lock:
                place = [number(info._record), number(session.number)]
                session.call(ask.UNLOCK, [*place, truth(False)])
            self.pool.drop(state)
            applied = f"; {what} is applied" if happened else ""
            raise self.lost(f"{exc}; somebody else had the domain meanwhile{applied}")
        info = info.locked_as(again._token)
        if happened:
            return info
        try:
            place = [number(info._record), number(info._version)]
            rows = self._commits(state, ask.COMMIT, [*place, *values])
        except (Gone, Refused) as second:
            self.pool.drop(state)
            raise InDoubt(f"{what} was tried twice: {exc}; {second}") from None
        if rows[0][0] is None:
            raise self.lost(f"domain {info.name!r} was changed by somebody else")
        return info

    def _adopt(self, state: State, session: Session) -> None:
        """Go on with another session; what the lost one held is lost."""
        lost, state.session = state.session, session
        if lost is not None:
            self.pool.bury(lost)

    def _lock_again(
        self, session: Session, info: PostgresInfo, lost: Session | None
    ) -> PostgresInfo | None:
        keys = [number(info._record), None, None, None]
        wait = number(int(self._patience(None) * 1000))
        given = None if lost is None else _numbers([lost.number])
        values = [self._list, number(session.number), *keys, given, wait]
        session.locks += 1
        [row] = session.call(ask.LOCK, values, waits=True)
        if small(row[0]) != 1:
            session.locks -= 1
            return None
        return PostgresInfo.of(row[1:16], self._source, big(row[16]))

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
        if _UNKEPT.search(name):
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
        state, rows = self._wait(ask.LOCK_MUTEX, [number(mutex), None], timeout)
        if not rows or small(rows[0][0]) != 1:
            self._not_got(state)
            holder = self.holders.of_lock(MUTEX, mutex)
            raise local.timed_out(f"mutex {name!r}", timeout, holder)
        died = self._deaths[name] = None if rows[0][1] is None else big(rows[0][1])
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
        return big(self._read(ask.EVENT_COUNT, [self._list, number(self.events_max)])[0][0])

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
        rows = self._read(ask.DIRS, [self._list, self.pool.host.encode()])
        if not rows:
            return None
        config_dir, autostart_dir = rows[0]
        assert config_dir is not None
        return ConfigDirs(
            Path(os.fsdecode(config_dir)),
            None if autostart_dir is None else Path(os.fsdecode(autostart_dir)),
        )

    def remember(self, dirs: ConfigDirs | None) -> None:
        host = self.pool.host.encode()
        if dirs is None:
            self._held(ask.NO_DIRS, [self._list, host])
            return
        autostart = dirs.autostart_dir
        paths = [
            os.fsencode(dirs.config_dir),
            None if autostart is None else os.fsencode(autostart),
        ]
        self._held(ask.SET_DIRS, [self._list, host, *paths])


_UNKEPT = re.compile("[\0\ud800-\udfff]")
"""What a text in PostgreSQL cannot have in it."""


def _nobody_has(key: Key) -> bool:
    if key.kind == "id":
        return not 0 <= int(str(key.value)) < 2**31
    return key.kind == "name" and _UNKEPT.search(str(key.value)) is not None


def _stops(what: str) -> AlreadyLocked:
    return AlreadyLocked(
        f"{what} is held by another task of this thread, or by the thread itself outside of its "
        "tasks; a wait that blocks the thread would never end: wait with shmdomains.aio"
    )


def _numbers(some: Iterable[int]) -> bytes:
    """A bigint[] as a parameter."""
    return ("{" + ",".join(map(str, some)) + "}").encode()


def _next_token(one: int, two: int) -> bool:
    """Whether nobody locked a domain between these two locks of it, or only in a life of the
    server that ended meanwhile."""
    return two == one + 1 or two % _LIFE == 0


def _news(news: Sequence[News]) -> bytes | None:
    if not news:
        return None
    return json.dumps([[int(one.type), one.detail, one.id, one.name] for one in news]).encode()
