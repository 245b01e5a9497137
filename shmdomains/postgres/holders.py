"""Who holds a lock, or died with it: the process, its host, the thread, since when.

The locks are read from ``pg_locks``, where each names the backend of its session; the session's row
names the thread, and the process's row the host. A thread of this host is looked up in /proc; one
of another host lives as long as its session does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

from msgspec import structs

from ..holder import LockHolder
from ..memory import holder as local
from ..memory._core import core
from ..memory.held import LockInfo
from ..rules.work import Caller
from .session import Row, Statement, big, double, integer, number, text
from .statements import DOMAIN, LIST

MUTEX = 3
_KINDS = {DOMAIN: "domain", LIST: "list", MUTEX: "mutex"}

_START_BITS = 40
"""Of `Caller.start`: clock ticks since boot. Above them is the number of the process's row."""

_PEOPLE = "s.tid, s.start, p.pid, p.host, p.place, p.command"

_SESSION = Statement(
    f"SELECT {_PEOPLE} FROM sessions s JOIN processes p USING (process) WHERE s.session = $1",
    "bigint",
)
_PROCESS = Statement(
    "SELECT p.host, p.place, p.command, "
    # While the server was away nobody could be heard of.
    "greatest(p.seen, pg_postmaster_start_time(), (SELECT since FROM lives JOIN life USING (life)))"
    " > clock_timestamp() - make_interval(secs => $2) "
    "OR EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.objsubid = 1 "
    "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND l.classid = (lock_key(7, $1) >> 32)::int::oid "
    "AND l.objid = (lock_key(7, $1) & 4294967295)::bigint::oid) "
    "FROM processes p WHERE p.process = $1",
    *("bigint", "float8"),
)

# All locks of a list: kind, number, whether it is held, the seconds of a wait, who, since when.
_LOCKS = f"""
    SELECT kind, l.number, l.granted,
           coalesce(extract(epoch FROM clock_timestamp() - l.waitstart), 0)::float8,
           {_PEOPLE},
           coalesce(extract(epoch FROM clock_timestamp() - coalesce(
               d.since, m.since, CASE WHEN kind = 2 THEN s.list_since END)), -1)::float8,
           coalesce(d.name, m.name), d.uuid
    FROM (
        SELECT (classid::bigint >> 16) - 23808 AS kind,
               ((classid::bigint & 65535) << 32) | objid::bigint AS number,
               granted, waitstart, pid AS backend
        FROM pg_locks
        WHERE locktype = 'advisory' AND objsubid = 1
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND (classid::bigint >> 16) - 23808 BETWEEN 1 AND 3
    ) l
    LEFT JOIN domains d ON kind = 1 AND d.record = l.number
    LEFT JOIN mutexes m ON kind = 3 AND m.mutex = l.number
    LEFT JOIN LATERAL (
        SELECT * FROM sessions s WHERE s.backend = l.backend ORDER BY session DESC LIMIT 1
    ) s ON true
    LEFT JOIN processes p ON p.process = s.process
    WHERE CASE kind WHEN 1 THEN d.list = $1 WHEN 2 THEN l.number = $1 ELSE m.list = $1 END
"""
_ALL = Statement(_LOCKS + " ORDER BY kind DESC, l.number, l.granted DESC", "bigint")
_ONE = Statement(
    _LOCKS + " AND kind = $2 AND l.number = $3 AND l.granted LIMIT 1", "bigint", "bigint", "bigint"
)


class Holders:
    """Looks up who holds what of the list of a `Pool`, whose module imports this one."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._processes: dict[int, tuple[str, str, str | None]] = {}

    # --- threads that hold something without a lock: jobs, intentions ---

    def caller(self) -> Caller:
        """The caller, in numbers that mean something on every host."""
        pid, tid, start = core.caller()
        listener = self._pool.listener  # says from now on that this process lives
        if not self._pool.process:
            listener.listen()
        return Caller(pid, tid, self._pool.process << _START_BITS | start)

    def lives(self, caller: Caller) -> bool:
        """Whether the caller runs: of another host, whether the server hears of its process, or
        did so within a lease."""
        process, start = self._split(caller)
        if process == self._pool.process:
            return core.thread_runs(caller.tid, start)
        host = self._process(process)
        if host is None:
            return False
        if host[1] == self._pool.place:
            return core.thread_runs(caller.tid, start)
        rows = self._ask(_PROCESS, [number(process), b"%f" % self._pool.address.lease])
        return bool(rows) and rows[0][3] == b"\1"

    def describe(self, caller: Caller) -> LockHolder:
        process, start = self._split(caller)
        found = self._process(process)
        host, place, command = found or ("", "", None)
        alive = self.lives(caller)
        here = place == self._pool.place
        return LockHolder(
            pid=caller.pid,
            tid=caller.tid,
            started=local.process_started(start) if here else None,
            held_for=None,
            alive=alive,
            command=command if alive else None,
            host=host or None,
        )

    @staticmethod
    def _split(caller: Caller) -> tuple[int, int]:
        return caller.start >> _START_BITS, caller.start & ((1 << _START_BITS) - 1)

    def _process(self, process: int) -> tuple[str, str, str | None] | None:
        if process not in self._processes:
            rows = self._ask(_PROCESS, [number(process), b"0"])
            if not rows:
                return None
            host, place, command = rows[0][:3]
            self._processes[process] = (
                text(host),
                text(place),
                None if command is None else command.decode(),
            )
        return self._processes[process]

    # --- locks ---

    def of_session(self, session: int) -> LockHolder:
        """Who had a session that is over."""
        rows = self._ask(_SESSION, [number(session)])
        if not rows:
            return LockHolder(None, None, None, None, False, None)
        person = self._person(rows[0], None, False)
        if person.alive and person.tid is not None and _is_ending(person.tid):
            person = structs.replace(person, alive=False, command=None)
        return person

    def of_lock(self, kind: int, which: int) -> LockHolder | None:
        """Who holds a lock now."""
        rows = self._ask(_ONE, [number(self._pool.list), number(kind), number(which)])
        if not rows or rows[0][4] is None:
            return None
        return self._person(rows[0][4:10], double(rows[0][10]), True)

    def locks(self) -> list[LockInfo]:
        """All that are held or waited for."""
        found: dict[tuple[int, int], LockInfo] = {}
        for row in self._ask(_ALL, [number(self._pool.list)]):
            key = big(row[0]), big(row[1])
            held = row[2] == b"\1"
            info = found.get(key)
            if info is None:
                name, uuid = row[11], row[12]
                info = LockInfo(
                    _KINDS[key[0]],
                    None if name is None else name.decode(),
                    None if uuid is None else UUID(bytes=uuid),
                    None,
                )
            if held:
                person = None if row[4] is None else self._person(row[4:10], double(row[10]), True)
                info = LockInfo(info.kind, info.name, info.uuid, person)
            else:
                longest = max(info.longest_wait, double(row[3]))
                info = LockInfo(
                    info.kind, info.name, info.uuid, info.holder, info.waiting + 1, longest
                )
            found[key] = info
        return list(found.values())

    def _person(self, row: Row, held: float | None, there: bool) -> LockHolder:
        tid, start, pid = integer(row[0]), big(row[1]), integer(row[2])
        host, place = text(row[3]), text(row[4])
        here = place == self._pool.place
        alive = core.thread_runs(tid, start) if here else there
        return LockHolder(
            pid=pid,
            tid=tid,
            started=local.process_started(start) if here else None,
            held_for=None if held is None or held < 0 else held,
            alive=alive,
            command=(None if row[5] is None else row[5].decode()) if alive else None,
            host=host,
        )

    def _ask(self, statement: Statement, values: list[bytes | None]) -> list[Row]:
        rows: list[Row] = self._pool.ask(statement, values)
        return rows


_PF_EXITING = 4


def _is_ending(tid: int) -> bool:
    """Whether a thread of this host is on its way out: the kernel closes what it had open, and with
    it the session, before nobody finds it any more."""
    try:
        words = Path(f"/proc/{tid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    return bool(int(words[6]) & _PF_EXITING)
