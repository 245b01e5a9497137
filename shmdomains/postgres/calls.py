"""How the store asks the server, and what it makes of a refusal or a lost session.

- Whoever holds nothing asks again through another session, for a lease.
- Whoever holds something has lost it with the session: `LockLost`. Nothing of his is applied.
"""

from __future__ import annotations

import time

from ..errors import (
    ContractError,
    LockLost,
    LockOrder,
    SegmentFull,
    SegmentRefused,
    Unavailable,
)
from ..memory._core import core
from . import statements as ask
from .holders import Holders
from .pool import Pool, State
from .session import (
    Gone,
    Refused,
    Row,
    Statement,
    big,
    number,
    numbers,
)
from .statements import DOMAIN, LIST

_LONGEST = 1.0
"""Seconds of one statement that waits, before it asks anew and is the last one in the queue. While
it waits, the server cleans up nothing newer: with 30 s, a lock that others take again and again,
of another domain, became ten times as slow."""


_WAITED = 12
"""Where the first field is in the answer to a lock: whether it waited."""


class Calls:
    """The base of `store.PostgresStore`. It counts the locks of a session, and puts back what was
    locked for nobody."""

    def __init__(self, pool: Pool, events_max: int) -> None:
        self.pool = pool
        self._list = b"%d" % pool.list
        self.holders = Holders(pool)
        self.events_max = events_max
        self._mutexes: dict[str, int] = {}  # the numbers of names

    # --- asking ---

    def _wait(
        self, statement: Statement, values: list[bytes | None], timeout: float | None
    ) -> tuple[State, bytes]:
        """A statement that takes a lock, its last value being the milliseconds of its wait. Empty:
        it was not free in time. Asks again through a new session if nothing is held."""
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
            if statement is ask.LOCK:
                given.insert(2, number(session.life))
            if lost and statement is not ask.LOCK_LIST:
                given[-2] = numbers(lost)
            session.locks += 1
            session.longest = slice
            try:
                try:
                    [[answer]] = session.call(statement, given, waits=timeout != 0)
                finally:
                    session.longest = float("inf")
                assert answer is not None
                if answer[_WAITED]:
                    self.pool.counts.waited(time.monotonic() - began)
                return state, answer
            except Refused as exc:
                if exc.state == "55P03" and left is not None and left <= slice:
                    self.pool.counts.waited(time.monotonic() - began)
                    return state, b""
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

    def _state(self) -> State:
        state = self.pool.mine()
        if state is None or state.session is None:
            raise self.lost("its session is gone")
        return state
