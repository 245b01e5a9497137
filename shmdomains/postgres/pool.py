"""The connections of one process to one list, and which owner has which.

An owner, a thread or a task, has a session of its own as long as it holds something, for the locks
are the session's. Whoever holds nothing borrows one for a call. So a process has as many
connections as owners that hold something at once, one for reads, and the listener's.

No connection crosses a fork: a child closes its copies, so that they do not outlive the parent, and
makes its own.
"""

from __future__ import annotations

import _thread
import os
import threading
import time
import warnings
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg

from ..errors import SegmentRefused, Unavailable
from ..memory import greenlets, holder
from ..memory._core import core
from ..memory.callbacks import when_over
from . import session, statements
from .counts import Counts
from .listener import Listener
from .session import Session, Statement, big, number
from .url import Address, without_password

if TYPE_CHECKING:
    from ..rules.plain import _Hold

_NO_TABLE = "42P01"
_IDLE = 8
"""Idle sessions that are kept."""

_ENTER = Statement("SELECT * FROM enter_session($1, $2, $3)", *("bigint", "int", "bigint"))
# What nobody needs after a crash waits for no disk and no standby: `_OFF`.
_OFF = "WITH off AS (SELECT set_config('synchronous_commit', 'off', true)) "
_USE = Statement(
    _OFF + "UPDATE sessions SET tid = $2, start = $3 FROM off WHERE session = $1",
    *("bigint", "int", "bigint"),
)
_OTHER = Statement(
    "SELECT pg_terminate_backend(a.pid) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid "
    "WHERE l.locktype = 'advisory' AND l.granted AND a.state = 'idle' AND l.objsubid = 1 "
    "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND l.classid = (lock_key(6, $1) >> 32)::int::oid "
    "AND l.objid = (lock_key(6, $1) & 4294967295)::bigint::oid",
    "bigint",
)
_WAIT = Statement("SELECT take(lock_key(6, $1), $2)", "bigint", "int")
# Written once more, so it waits for a synchronous standby: a commit whose session was ended while
# it waited for one is seen here, and a failover would lose it.
_DONE = Statement(
    "WITH receipt AS (UPDATE sessions SET done = done WHERE session = $1 RETURNING done) "
    "SELECT (SELECT done FROM receipt), pg_advisory_unlock(lock_key(6, $1))",
    "bigint",
)


class State:
    """What one owner holds of the list, and through which session."""

    __slots__ = ("asks", "holds", "list_held", "mutexes", "session", "start", "tid")

    def __init__(self) -> None:
        self.asks = False  # for a lock; what it gets is not in here yet
        self.list_held = False
        self.holds: dict[Any, _Hold[Any]] = {}
        self.mutexes: dict[str, int] = {}
        self.session: Session | None = None
        self.tid, self.start = 0, 0

    @property
    def is_empty(self) -> bool:
        return not (self.list_held or self.holds or self.mutexes)

    @property
    def count(self) -> int:
        return self.list_held + len(self.holds) + len(self.mutexes)


_all: weakref.WeakSet[Pool] = weakref.WeakSet()


class Pool:
    """The connections of this process to the list with the number `list`."""

    def __init__(self, address: Address, conninfo: str, host: str, list_number: int) -> None:
        self.address = address
        self.list = list_number
        self.host = host
        self.place = place_of(host)
        self.patience = address.lease
        """Seconds for which a server that is away is waited for, where a call says nothing."""
        self.process = 0
        self.life = 0
        """Where the tokens begin of the server's life that was found last."""
        self._conninfo = conninfo
        self._lock = threading.RLock()  # a signal handler may use the list
        self._idle: list[Session] = []
        self._readers: list[Session] = []  # to a standby, idle
        self._all: set[Session] = set()
        self.states: dict[int, State] = {}
        self._listener: Listener | None = None
        self.counts = Counts()
        self.leaderships: set[Any] = set()
        """Of elections (`elect`): told when their lock is lost."""
        self.closed = False
        _all.add(self)

    # --- connections ---

    def connect(self) -> psycopg.Connection[Any]:
        """A connection, nobody's yet. Raises `Unavailable`."""
        name = f"shmdomains {self.address.list} on {self.host}"[:63]
        return session.connect(self._conninfo, self.address.lease, self.address.shown, name)

    def without_password(self, text: str) -> str:
        return without_password(text)

    @property
    def listener(self) -> Listener:
        """The listener; begun when it is first needed."""
        listener = self._listener
        if listener is None:
            with self._lock:
                if self._listener is None:
                    self._listener = Listener(self)
                listener = self._listener
        return listener

    def enter_process(self, conn: psycopg.Connection[Any]) -> None:
        """Make the row of this process, unless it is there, and hold its lock with `conn`."""
        with self._lock:
            if not self.process:
                self.process = self._enter(conn)
        conn.execute("SELECT pg_advisory_lock_shared(lock_key(7, %s))", [self.process])

    def _enter(self, conn: psycopg.Connection[Any]) -> int:
        pid = os.getpid()
        values = [self.list, self.host, self.place, pid, core.process_start(pid)]
        row = conn.execute(
            "INSERT INTO processes (list, host, place, pid, start, command) "
            "VALUES (%s, %s, %s, %s, %s, %s) RETURNING process",
            [*values, holder.command_of(pid)],
        ).fetchone()
        assert row is not None
        return int(row[0])

    def seen(self, conn: psycopg.Connection[Any]) -> None:
        """Let the server know that this process lives. While a standby does not answer, too: the
        thread that does this keeps up the sessions that hold locks."""
        conn.execute(
            _OFF + "UPDATE processes SET seen = clock_timestamp(), counts = %s FROM off "
            "WHERE process = %s",
            [self.counts.numbers, self.process],
        )

    def _make(self, conn: psycopg.Connection[Any] | None = None) -> Session:
        conn = conn or self.connect()
        try:
            with self._lock:
                if not self.process:
                    self.process = self._enter(conn)
            made = Session(conn, self.address.lease)
            made.silent = self._is_silent
            made.user = core.caller()[1:]
            [row] = made.call(_ENTER, [number(self.process), *map(number, made.user)])
            made.number, made.life = big(row[0]), big(row[1])
            self.life = made.life
        except (psycopg.Error, session.Gone, session.Refused) as exc:
            conn.close()
            if getattr(exc, "state", None) == "23503":  # a server that lost the process's row
                self.process = 0
                self.counts = Counts()  # whoever adds up has seen the old ones under the old number
            raise Unavailable(
                f"{self.address.shown} cannot be used: {without_password(str(exc))}"
            ) from None
        with self._lock:
            self._all.add(made)
        return made

    def _is_silent(self, seconds: float) -> bool:
        return self.listener.silent(seconds)

    def take(self, patience: float | None = None) -> Session:
        """A session for the caller alone, until `give`. Waits so long for a server that is away
        (default: a lease). Raises `Unavailable`."""
        while True:
            try:
                found = self._idle.pop()
            except IndexError:
                break
            if found.is_there():
                return found
            self._all.discard(found)
        end = time.monotonic() + (self.patience if patience is None else patience)
        pause = 0.02
        while True:
            if core.is_given_up():
                raise core.WorkGivenUp
            try:
                return self._make()
            except Unavailable:
                if time.monotonic() + pause > end:
                    raise
            greenlets.sleep(pause)
            pause = min(pause * 2, 0.5)

    def begin_with(self, conn: psycopg.Connection[Any]) -> None:
        """Keep a connection for the first call."""
        self.give(self._make(conn))

    def give(self, one: Session) -> None:
        """Give back a session that holds nothing. If it may hold something, for freeing that
        failed or was interrupted, it ends: its next owner would lock it once more."""
        if one.gone is not None or one.locks or self.closed or len(self._idle) >= _IDLE:
            one.end("it was closed")
            self._all.discard(one)
        else:
            self._idle.append(one)

    def ask(self, statement: Statement, values: list[bytes | None]) -> list[session.Row]:
        """Read, through the caller's session or a borrowed one. Raises `Unavailable`."""
        state = self.mine()
        if state is not None and state.session is not None:
            with suppress(session.Gone):
                return state.session.call(statement, values)
        end = time.monotonic() + self.patience
        while True:
            one = self.take(max(end - time.monotonic(), 0))
            try:
                rows = one.call(statement, values)
            except session.Gone as exc:
                self._all.discard(one)
                if time.monotonic() > end:
                    raise Unavailable(f"{self.address.shown} went away: {exc}") from None
                continue
            except BaseException:
                self.give(one)
                raise
            self.give(one)
            return rows

    def read(self, statement: Statement, values: list[bytes | None]) -> list[session.Row]:
        """`ask`, of a standby if that is wanted and the caller holds nothing: whoever does must
        not read what is old. Raises `Unavailable`."""
        if self.address.read == "primary" or self.mine() is not None:
            return self.ask(statement, values)
        end = time.monotonic() + self.patience
        while True:
            one = self._readers.pop() if self._readers else self._reader()
            try:
                rows = one.call(statement, values)
            except session.Gone as exc:
                self._all.discard(one)
                if time.monotonic() > end:
                    raise Unavailable(f"{self.address.shown} went away: {exc}") from None
                continue
            except session.Refused as exc:
                one.end("a read failed")
                self._all.discard(one)
                if exc.state == _NO_TABLE:  # a standby that is so far behind
                    return self.ask(statement, values)
                raise
            except BaseException:
                one.end("a read failed")
                self._all.discard(one)
                raise
            if self.closed or len(self._readers) >= _IDLE:
                one.end("it was closed")
                self._all.discard(one)
            else:
                self._readers.append(one)
            return rows

    def _reader(self) -> Session:
        """A session with a standby, or with the primary where there is none. It has no row."""
        name, lease = (
            f"shmdomains {self.address.list} reads on {self.host}"[:63],
            self.address.lease,
        )
        shown = self.address.shown
        conn = session.connect(self._conninfo, lease, shown, name, "prefer-standby")
        made = Session(conn, lease)
        with self._lock:
            self._all.add(made)
        return made

    # --- owners ---

    def mine(self) -> State | None:
        """What the caller holds; ``None``: nothing."""
        return self.states.get(core.owner())

    def begin(self, patience: float | None = None) -> State:
        """The caller's state, with a session, to ask for a lock. Raises `Unavailable`."""
        owner = core.owner()
        state = self.states.get(owner)
        if state is not None:
            state.asks = True
            if self.states.get(owner) is state:  # else a handle was dropped just now, the last one
                return state
        state = State()
        state.asks = True
        _, state.tid, state.start = core.caller()
        state.session = taken = self.take(patience)
        if taken.user != (state.tid, state.start):
            taken.user = (state.tid, state.start)
            try:
                taken.call(_USE, [number(taken.number), *map(number, taken.user)])
            except session.Gone:
                self._all.discard(taken)
                return self.begin(patience)
            except BaseException as exc:
                taken.user = None  # whom its row names now is not known
                self.give(taken)
                if isinstance(exc, session.Refused):
                    raise Unavailable(f"{self.address.shown}: {exc}") from None
                raise
        self.states[owner] = state
        _ = self.listener
        return state

    def beside(self, timeout: float | None) -> list[State]:
        """What others of this very thread hold, who cannot go on while the caller waits."""
        if timeout == 0 or len(self.states) == (core.owner() in self.states):
            return []
        tid, me = core.caller()[1], core.owner()
        if threading.get_native_id() != tid or greenlets.can_switch():
            return []  # a thread that works for a task; a greenlet, which lets others run
        return [one for owner, one in list(self.states.items()) if owner != me and one.tid == tid]

    def rest(self, state: State) -> None:
        """The caller may hold nothing any more: then its session is given back."""
        if state.asks or not state.is_empty or self.states.get(core.owner()) is not state:
            return
        del self.states[core.owner()]
        if state.session is not None:
            self.give(state.session)
        self._end_listener()

    def drop(self, state: State) -> None:
        """The caller's session is lost, and all that it held."""
        if self.states.get(core.owner()) is state:
            del self.states[core.owner()]
        for hold in state.holds.values():
            handle: Any = None if hold.handle is None else hold.handle()
            if handle is not None:
                handle._lost = True
        if state.session is not None:
            self.bury(state.session)
        self._end_listener()

    def keep(self, state: State) -> None:
        """The caller finds out by the next use of what he holds whether its session is lost."""
        self.states[core.owner()] = state

    def leave(self, owner: int) -> None:
        """A task is over: roll back and free what it held. Takes a thread, for the task's must not
        wait."""
        state = self.states.pop(owner, None)
        if state is None or state.session is None:
            return
        warnings.warn(
            f"a task ended while it held locks of {self.address.shown}; its changes are rolled "
            "back and they are freed: use 'async with'",
            ResourceWarning,
            stacklevel=1,
        )
        try:
            _thread.start_new_thread(self._free_all, (state.session,))
        except RuntimeError:  # no thread to be had
            self.bury(state.session)

    def _free_all(self, one: Session) -> None:
        try:
            for which, kind in one.call(statements.HELD):
                one.call(*statements.unlock(big(kind), big(which), one.number))
        except (session.Gone, session.Refused):
            self.bury(one)
        else:
            one.locks = 0
            self.give(one)
        self._end_listener()

    def bury(self, one: Session) -> None:
        """A session that is over."""
        one.end("a lock was lost")
        self._all.discard(one)

    def tend(self) -> None:
        """What the listener does for the sessions, about once a second."""
        for leadership in list(self.leaderships):
            leadership.look()
        now, third = time.monotonic(), self.address.lease / 3
        for owner, state in list(self.states.items()):
            if state.session is None:
                continue
            if not core.thread_runs(state.tid, state.start):
                if self.states.pop(owner, None) is not None:
                    state.session.end("its thread ended with a lock")
                    self._all.discard(state.session)
            elif now - state.session.used > third:
                state.session.ping()
        for one in list(self._idle):
            if now - one.used > third and one in self._idle:
                with suppress(ValueError):
                    self._idle.remove(one)
                    one.end("it was idle")
                    self._all.discard(one)

    # --- lost answers ---

    def done_by(self, lost: Session, patience: float) -> tuple[Session, int]:
        """A new session, and the number of the last commit of a lost one, which is over by then.
        Raises `Unavailable` if that is not known in time."""
        end = time.monotonic() + patience
        while True:
            left = max(end - time.monotonic(), 0)
            new = self.take(left)
            try:
                new.call(_OTHER, [number(lost.number)])
                wait = number(max(1, int(left * 1000)))
                new.call(_WAIT, [number(lost.number), wait], waits=True)
                [[done, _]] = new.call(_DONE, [number(lost.number)])
                return new, 0 if done is None else big(done)
            except session.Refused as exc:
                self.give(new)
                raise Unavailable(
                    f"{self.address.shown}: the lost session has not ended within "
                    f"{patience:g} s ({exc})"
                ) from None
            except session.Gone as exc:
                self._all.discard(new)
                if not left:
                    raise Unavailable(f"{self.address.shown} went away: {exc}") from None

    # --- its end, and fork ---

    def close(self) -> None:
        """End what holds nothing. Sessions with locks go on until they are unlocked."""
        self.closed = True
        self._end_listener()
        while self._idle or self._readers:
            one = (self._idle or self._readers).pop()
            one.end("the list was closed")
            self._all.discard(one)

    def _end_listener(self) -> None:
        """After `close`, unless it still lets the server hear of sessions with locks."""
        if self.closed and not self.states:
            listener, self._listener = self._listener, None
            if listener is not None:
                listener.stop()

    def forget_connection(self, conn: psycopg.Connection[Any]) -> None:
        session.forget(conn)

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        for one in [*self._all]:
            one.forget()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.forget()
        self._idle, self._readers, self._all = [], [], set()
        self.states, self.process = {}, 0
        self.counts = Counts()


def _after_fork() -> None:
    for pool in list(_all):
        pool._after_fork()


def _task_over(owner: int) -> None:
    for pool in list(_all):
        pool.leave(owner)


def holds() -> bool:
    """Whether the caller holds a lock of any list."""
    owner = core.owner()
    return any(owner in pool.states for pool in list(_all))


os.register_at_fork(after_in_child=_after_fork)
when_over.append(_task_over)


def place_of(host: str) -> str:
    """Where a process number means something: the host, its boot, the PID namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{host} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{host} {os.getpid()}"  # nobody else's numbers can be looked up


def check_server(conn: psycopg.Connection[Any], other: psycopg.Connection[Any], shown: str) -> None:
    """Raise `SegmentRefused` for a server that cannot carry the store: too old, one that only looks
    like PostgreSQL, or behind a pooler that gives each transaction another session."""
    version = conn.info.server_version
    if version < 140000:
        raise SegmentRefused(f"{shown} is PostgreSQL {version // 10000}; it takes 14 or later")
    pid, key = "SELECT pg_backend_pid()", (23808 + 9) << 48
    # Twice in a row, for a pooler may take its sessions in turns.
    numbers = [one.execute(pid).fetchone() for one in (conn, conn, other, other, conn)]
    if not (numbers[0] == numbers[1] == numbers[4] != numbers[2] == numbers[3]):
        raise SegmentRefused(
            f"{shown} is behind a pooler (PgBouncer?) in transaction mode, where a lock has no "
            "session that it could belong to: connect to the server itself, or pool sessions"
        )
    key += int.from_bytes(os.urandom(5), "big")
    conn.execute("SELECT pg_advisory_lock(%s)", [key])
    row = other.execute("SELECT pg_try_advisory_lock(%s)", [key]).fetchone()
    conn.execute("SELECT pg_advisory_unlock(%s)", [key])
    if row is None or row[0]:
        other.execute("SELECT pg_advisory_unlock(%s)", [key])
        raise SegmentRefused(
            f"{shown} is no PostgreSQL: its advisory locks lock nothing ({_product(conn)})"
        )


def _product(conn: psycopg.Connection[Any]) -> str:
    row = conn.execute("SELECT version()").fetchone()
    return "unknown" if row is None else str(row[0])[:60]
