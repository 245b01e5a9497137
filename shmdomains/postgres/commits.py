"""What the store commits, and what becomes of a commit whose answer is lost.

A commit whose answer is lost may have happened. The session's row has the number of its last
commit. When the session is over, and so nothing can come of it any more, a new one reads that row,
locks the domain again, and tells `applied` from not. `InDoubt` if the server does not come back in
time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..errors import (
    DomainExists,
    InDoubt,
    SegmentFull,
    Unavailable,
)
from ..memory._core import core
from ..rules.store import Changes, NewDomain, News
from . import statements as ask
from .pool import State
from .reads import Reads
from .records import PostgresInfo, new_values
from .session import (
    Gone,
    Refused,
    Row,
    Session,
    Statement,
    big,
    fields,
    integer,
    number,
    numbers,
    small,
    truth,
)

_STATE = {"state", "reason", "data"}
_LIFE = 1 << 40
"""The tokens of one life of the server."""


class Commits(Reads):
    """The part of `store.PostgresStore` that changes records."""

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
        state = self._state()
        assert state.session is not None
        values = [
            number(state.session.life),
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
        record = big(row[0])
        values = new_values(record, new.uuid, new.name, new.state, new.persistent, work)
        known = new.definition, None
        self._source.definitions.put(record, 1, (known[0].encode(), None), known)
        return PostgresInfo.held(values, self._source, big(row[1]))

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
        statement, values = self._changed(info, changes, news, unlock)
        try:
            rows = self._commits(state, statement, values)
        except Gone as exc:
            info = self._settle(state, info, (statement, values), exc, timeout, unlock)
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
    ) -> tuple[Statement, list[bytes | None]]:
        get: Callable[..., Any] = changes.get
        first = [number(info._record), number(info._version)]
        last = [number(self.events_max), _news(news), truth(unlock)]
        state = [number(get("state", info.state)), number(get("reason", info.reason))]
        data = [truth("data" in changes), get("data")]
        if changes.keys() <= _STATE:
            return ask.COMMIT_STATE, [*first, *state, *data, *last]
        live, successor = get("definition"), get("next_definition")
        pid = get("pid", info.pid)
        host = get("host", info.host)
        return ask.COMMIT, [
            *first,
            str(get("name", info.name)).encode(),
            number(get("id", info.id)),
            *state,
            truth(get("persistent", info.persistent)),
            truth(get("autostart", info.autostart)),
            number(pid),
            number(get("started", info._started)),
            None if host is None else str(host).encode(),
            *data,
            truth("work" in changes),
            get("work"),
            truth("definition" in changes),
            None if live is None else live.encode(),
            None if live is None else live.to_xml().encode(),
            truth("next_definition" in changes),
            None if successor is None else successor.encode(),
            None if successor is None else successor.to_xml().encode(),
            *last,
        ]

    def _after(self, info: PostgresInfo, changes: Changes) -> PostgresInfo:
        after = info.changed(dict(changes))
        if "definition" in changes and "next_definition" in changes:
            known = live, successor = changes["definition"], changes["next_definition"]
            typed = live.encode(), None if successor is None else successor.encode()
            self._source.definitions.put(after._record, after._defined, typed, known)
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
        asked: tuple[Statement, list[bytes | None]],
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
            if again is not None:
                place = [number(info._record), number(session.number)]
                with suppress(Gone, Refused):  # else its end frees it
                    session.call(ask.UNLOCK, [*place, truth(False)])
            self.pool.drop(state)
            applied = f"; {what} is applied" if happened else ""
            raise self.lost(f"{exc}; somebody else had the domain meanwhile{applied}")
        info = info.locked_as(again._token)
        if happened:
            return info
        try:
            rows = self._commits(state, *asked)
        except Refused as second:
            raise self._refusal(second) from None
        except Gone as second:
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
        keys = [None, number(info._record), None, None, None]
        wait = number(int(self._patience(None) * 1000))
        given = None if lost is None else numbers([lost.number])
        place = [self._list, number(session.number), number(session.life)]
        values = [*place, *keys, given, wait]
        session.locks += 1
        [[answer]] = session.call(ask.LOCK, values, waits=True)
        assert answer is not None
        if small(fields(answer)[1]) != 1:
            session.locks -= 1
            return None
        return PostgresInfo.locked(answer, self._source)


def _news(news: Sequence[News]) -> bytes | None:
    if not news:
        return None
    return json.dumps([[int(one.type), one.detail, one.id, one.name] for one in news]).encode()


def _next_token(one: int, two: int) -> bool:
    """Whether nobody locked a domain between these two locks of it, or only in a life of the
    server that ended meanwhile."""
    return two == one + 1 or two % _LIFE == 0
