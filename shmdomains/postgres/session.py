"""One connection to the server, and what is asked through it.

A session is the lease and the fence: the locks that its owner holds are the session's, and a commit
goes through the session that holds the lock. So there is nothing to renew and nothing to compare
between them; when the session ends, so do its locks, and nothing more of it is applied.

`Session.call` is one round trip: a prepared statement, everything in binary, by libpq's
asynchronous calls. It never uses libpq's pipeline mode, after which the server forgets its
idle_session_timeout. It waits in slices. In each of them Python's signal handlers run, and the
server is asked through another connection, the listener's, whether it is still there: a frozen one
goes on to acknowledge TCP.
"""

from __future__ import annotations

import os
import re
import select
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import psycopg
from psycopg import pq

from ..errors import ContractError, ShmDomainsError, Unavailable
from ..memory import greenlets
from ..memory._core import core
from .url import without_password

SLICE = 0.1
"""Seconds of a wait after which it is looked whether the server is still there."""
_SLICE = SLICE * 1000
_READ, _WRITE = 1, 2  # as gevent names them

_BAD = pq.ConnStatus.BAD
_TUPLES = pq.ExecStatus.TUPLES_OK
_COMMAND = pq.ExecStatus.COMMAND_OK
_SQLSTATE = pq.DiagnosticField.SQLSTATE
_PRIMARY = pq.DiagnosticField.MESSAGE_PRIMARY
_CONSTRAINT = pq.DiagnosticField.CONSTRAINT_NAME
_ENDS = ("57P01", "57P02", "57P03", "57P05", "25P03", "08")
"""SQLSTATEs, or their first letters, after which the session is gone."""
_NO_ROW = "08003"
"""The session's row is gone, so a commit would have no receipt."""


class Refused(ShmDomainsError):
    """The server refused a statement; `state` is the SQLSTATE. Never leaves this package."""

    def __init__(self, state: str, text: str, constraint: str | None) -> None:
        super().__init__(f"{text} ({state})")
        self.state, self.text, self.constraint = state, text, constraint


class Gone(ShmDomainsError):
    """The session ended, `asked` while a statement was under way. Never leaves this package."""

    def __init__(self, text: str, asked: bool) -> None:
        super().__init__(text)
        self.asked = asked


class Statement:
    """A statement with ``$1`` to ``$n``; `types` are PostgreSQL's types of its parameters."""

    __slots__ = ("formats", "name", "text")
    _count = 0

    def __init__(self, text: str, *types: str) -> None:
        Statement._count += 1
        self.name = b"shmdomains%d" % Statement._count
        self.text = re.sub(
            r"\$(\d+)", lambda at: f"{at[0]}::{types[int(at[1]) - 1]}", text
        ).encode()
        # In binary: as text, a value would end at its first NUL.
        self.formats = [int(type in ("bytea", "text")) for type in types]


Row = tuple[bytes | None, ...]


class Session:
    """A connection, used by one thread at a time.

    `number` is its row in ``sessions``; it is set by whoever makes it (`pool`).
    """

    def __init__(self, conn: psycopg.Connection[Any], lease: float) -> None:
        self.conn = conn
        self.number = 0
        self.life = 0
        """Where the tokens of this life of the server begin."""
        self.pid = os.getpid()
        self.lease = lease
        self.commits = 0
        self.locks = 0
        """How many locks it holds at most: counted before they are asked for, and no more after
        they are free."""
        self.longest = float("inf")
        """Seconds after which the server itself ends the wait of a statement for a lock."""
        self.used = time.monotonic()
        self.gone: str | None = None
        self.silent: Callable[[float], bool] = _never
        """Whether the server did not answer others for so many seconds."""
        self.user: tuple[int, int] | None = None
        """The native thread and its start that the row in ``sessions`` names."""
        self._pg = conn.pgconn
        self._pg.nonblocking = 1
        self._prepared: set[bytes] = set()
        self._lock = threading.Lock()
        self._busy_in = 0
        self._owed = False  # the server owes an answer
        self.later: list[Callable[[], None]] = []
        """What is done after the call that is under way."""
        self._result: pq.abc.PGresult | None = None
        self._poll = greenlets.real_poll()
        self._poll.register(self._pg.socket, select.POLLIN)

    # --- asking ---

    def call(
        self, statement: Statement, values: Sequence[bytes | None] = (), waits: bool = False
    ) -> list[Row]:
        """Ask, and return the rows, in binary. `waits`: the statement waits for a lock, so that it
        may take any time as long as the server answers others.

        Raises `Refused`; `Gone` when the session ended. What interrupts a statement that waits (a
        signal handler that raises; the cancellation of a task, seen after a slice) cancels it
        first; any other statement is waited for.
        """
        if self._busy_in == threading.get_ident():
            raise ContractError(
                "a signal handler asks the server while this thread waits for its answer; let "
                "another thread do it"
            )
        try:
            with self._lock:
                try:
                    self._busy_in = threading.get_ident()
                    if self.gone is not None:
                        raise Gone(self.gone, False)
                    return self._ask(statement, values, waits)
                finally:
                    self._busy_in = 0
                    self.used = time.monotonic()
        finally:
            while self.later:
                self.later.pop()()

    @property
    def asks(self) -> bool:
        """Whether the caller is in the midst of a call."""
        return self._busy_in == threading.get_ident()

    def _ask(self, statement: Statement, values: Sequence[bytes | None], waits: bool) -> list[Row]:
        pg, name = self._pg, statement.name
        try:
            if name not in self._prepared:
                self._owed = True
                pg.send_prepare(name, statement.text)
                self._prepared.add(name)  # whatever interrupts it now, it is waited for
                self._answer(False)
            self._owed = True
            pg.send_query_prepared(name, values, statement.formats or None, result_format=1)
            return self._answer(waits)
        except psycopg.Error as exc:
            raise self._end(str(exc), True) from None
        except (Gone, Refused):
            raise
        except BaseException:
            if self._owed:  # a signal handler raised between two lines of this
                with suppress(psycopg.Error, Gone, Refused):
                    self._answer(False)
            raise

    def _answer(self, waits: bool) -> list[Row]:
        interrupted: BaseException | None = None
        while True:
            try:
                result = self._read(waits)
                break
            except (psycopg.Error, Gone) as exc:
                if interrupted is None:
                    raise
                self._end(str(exc), True)
                raise interrupted from None
            except BaseException as exc:  # a signal handler raised
                if waits:
                    self._cancel()
                interrupted, waits = exc, False
        self._result, self._owed = None, False
        if interrupted is not None:
            raise interrupted
        if result.status in (_TUPLES, _COMMAND):
            columns = range(result.nfields)
            value = result.get_value
            return [tuple([value(row, at) for at in columns]) for row in range(result.ntuples)]
        raise self._error(result)

    def _read(self, waits: bool) -> pq.abc.PGresult:
        """The result of what was sent. Goes on where it was if it was interrupted."""
        pg, since = self._pg, time.monotonic()
        while pg.flush():
            self._wait_to_write(since)
        while True:
            while pg.is_busy():
                if self._readable():
                    pg.consume_input()
                else:
                    self._look(waits, since)
            result = pg.get_result()
            if result is not None:
                self._result = result
            elif self._result is not None:
                return self._result
            else:
                raise self._end("the server sent no answer", True)

    def _wait_to_write(self, since: float) -> None:
        socket = self._pg.socket
        self._poll.modify(socket, select.POLLIN | select.POLLOUT)
        try:
            if not self._readable(_WRITE):
                self._look(False, since)
        finally:
            self._poll.modify(socket, select.POLLIN)
        self._pg.consume_input()

    def _readable(self, more: int = 0) -> bool:
        """Wait a slice for the socket. A greenlet lets others run."""
        if not greenlets.can_switch():
            return bool(self._poll.poll(_SLICE))
        greenlets.wait_ready(self._pg.socket, _READ | more, SLICE)
        return bool(self._poll.poll(0))

    def _look(self, waits: bool, since: float) -> None:
        """After a slice without an answer."""
        if self.gone is not None:
            raise Gone(self.gone, True)
        if waits and core.is_given_up():
            raise core.WorkGivenUp
        waited = time.monotonic() - since
        if waited > self.lease and not waits:
            raise self._end(f"the server has not answered for {waited:.1f} s", True)
        if waits and waited > self.longest + self.lease:  # it has the lock, and waits to commit
            raise self._end(f"the server has not answered for {waited:.1f} s", True)
        if waits and waited > self.lease and self.silent(self.lease):
            raise self._end(f"the server has answered nobody for {self.lease:g} s", True)

    def _cancel(self) -> None:
        with suppress(psycopg.Error):  # then it ends by itself, or the session does
            self.conn.cancel_safe(timeout=self.lease)  # a frozen server takes it and says nothing

    def _error(self, result: pq.abc.PGresult) -> ShmDomainsError:
        state = (result.error_field(_SQLSTATE) or b"").decode()
        text = (result.error_field(_PRIMARY) or b"").decode(errors="replace")
        if state.startswith(_ENDS) or self._pg.status == _BAD:
            # What our functions say (`_NO_ROW`) is an answer: nothing was done.
            return self._end(text or "the connection was lost", state != _NO_ROW)
        constraint = result.error_field(_CONSTRAINT)
        return Refused(state, text, None if constraint is None else constraint.decode())

    def _end(self, why: str, asked: bool) -> Gone:
        if self.gone is None:
            self.gone = without_password(why) or "the connection was lost"
            self._close()
        return Gone(self.gone, asked)

    # --- its end ---

    def is_there(self) -> bool:
        """Whether the session goes on, as far as this side was told. Asks nobody."""
        if self.gone is not None:
            return False
        if not self._lock.acquire(blocking=False):
            return True  # somebody is asking just now, and will see
        try:
            if self._poll.poll(0):
                self._pg.consume_input()  # a farewell of the server's, or the end
                self._pg.is_busy()
                if self._pg.status == _BAD:
                    self._end("the server ended the session", False)
        except psycopg.Error as exc:
            self._end(str(exc), False)
        finally:
            self._lock.release()
        return self.gone is None

    def end(self, why: str) -> None:
        """Close it; its locks end with it."""
        self._end(why, False)

    def _close(self) -> None:
        with suppress(psycopg.Error):
            self._pg.finish()

    def ping(self) -> None:
        """Let the server hear of it, unless somebody is asking just now."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self.gone is None:
                self._pg.send_query(b"SELECT 1")
                self._answer(False)
                self.used = time.monotonic()
        except (psycopg.Error, Gone, Refused) as exc:
            self._end(str(exc), False)
        finally:
            self._lock.release()

    def forget(self) -> None:
        """In a child: the connection is its parent's. The child's copy of the descriptor would
        keep it, and so its locks, after the parent's death."""
        if self.gone is None:
            self.gone = "it belongs to the process that this one was forked from"
            forget(self.conn)


_kept: list[Any] = []
"""Connections of parents: closing one would say goodbye to the server for the parent."""


def forget(conn: psycopg.Connection[Any]) -> None:
    """Put nothing in place of a parent's connection, in its child."""
    _kept.append(conn)
    with suppress(psycopg.Error):  # it has no socket any more
        socket = conn.pgconn.socket
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(nothing, socket, inheritable=False)
        os.close(nothing)


def _never(_seconds: float) -> bool:
    return False


def connect(
    conninfo: str, lease: float, shown: str, application: str, attributes: str = "read-write"
) -> psycopg.Connection[Any]:
    """A new connection, set up so that both sides notice the other's end within `lease` seconds.
    `attributes`: of several servers, which one (libpq's target_session_attrs). Raises
    `Unavailable`."""
    if greenlets.can_switch() and not greenlets.is_wanted():  # psycopg would block the hub
        return greenlets.elsewhere(
            lambda: _connect(conninfo, lease, shown, application, attributes)
        )
    return _connect(conninfo, lease, shown, application, attributes)


def _connect(
    conninfo: str, lease: float, shown: str, application: str, attributes: str
) -> psycopg.Connection[Any]:
    milliseconds = int(lease * 1000)
    try:
        conn = psycopg.connect(
            conninfo,
            autocommit=True,
            connect_timeout=max(2, int(lease)),
            application_name=application,
            tcp_user_timeout=milliseconds,
            keepalives_idle=max(1, int(lease / 3)),
            keepalives_interval=max(1, int(lease / 6)),
            keepalives_count=3,
            target_session_attrs=attributes,
        )
    except psycopg.Error as exc:
        raise Unavailable(f"{shown} cannot be reached: {without_password(str(exc))}") from None
    try:
        conn.execute(_SETTINGS, [str(milliseconds), str(max(1, int(lease / 3)))], prepare=False)
    except psycopg.Error as exc:
        conn.close()
        raise Unavailable(f"{shown} cannot be used: {without_password(str(exc))}") from None
    return conn


# The server's side of a lease, for this session. Only a server that waits looks at its socket.
_SETTINGS = """
SELECT set_config('search_path', 'shmdomains, pg_catalog', false),
       set_config('default_transaction_isolation', 'read committed', false),
       set_config('statement_timeout', '0', false),
       set_config('lock_timeout', '0', false),
       set_config('idle_in_transaction_session_timeout', lease, false),
       set_config('idle_session_timeout', lease, false),
       set_config('tcp_user_timeout', lease, false),
       set_config('tcp_keepalives_idle', third, false),
       set_config('tcp_keepalives_interval', third, false),
       set_config('tcp_keepalives_count', '2', false),
       set_config('client_connection_check_interval', '500', false),
       set_config('client_min_messages', 'error', false),
       set_config('timezone', 'UTC', false),
       set_config('bytea_output', 'hex', false),
       set_config('plan_cache_mode', 'force_generic_plan', false)
FROM (SELECT %s::text AS lease, %s::text AS third) AS given
"""


# --- values in binary -------------------------------------------------------------------------

_BIG, _INT, _SMALL = struct.Struct(">q"), struct.Struct(">i"), struct.Struct(">h")
_DOUBLE = struct.Struct(">d")


def big(value: bytes | None) -> int:
    """A bigint that is not null."""
    assert value is not None
    return int(_BIG.unpack(value)[0])


def integer(value: bytes | None) -> int:
    assert value is not None
    return int(_INT.unpack(value)[0])


def small(value: bytes | None) -> int:
    assert value is not None
    return int(_SMALL.unpack(value)[0])


def double(value: bytes | None) -> float:
    assert value is not None
    return float(_DOUBLE.unpack(value)[0])


def text(value: bytes | None) -> str:
    assert value is not None
    return value.decode()


def fields(value: bytes | None) -> Row:
    """The fields of a composite value."""
    assert value is not None
    found: list[bytes | None] = []
    [count], at, size_at = _INT.unpack_from(value), 4, _INT.unpack_from
    for _ in range(count):  # each with its type and its size
        [size] = size_at(value, at + 4)
        at += 8
        if size < 0:
            found.append(None)
        else:
            found.append(value[at : at + size])
            at += size
    return tuple(found)


def number(value: int | None) -> bytes | None:
    """A number as a parameter."""
    return None if value is None else b"%d" % value


def truth(value: bool) -> bytes:
    return b"t" if value else b"f"


def numbers(some: Iterable[int]) -> bytes:
    """A bigint[] as a parameter."""
    return ("{" + ",".join(map(str, some)) + "}").encode()
