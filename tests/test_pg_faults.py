"""Servers and networks that fail in the midst of a call to a list on PostgreSQL.

Each call is run once to see what it does; then again and again, each time with another of its
requests failing. What the caller is told must agree with what is in the database, which is read
past the library; nothing is applied twice; no lock stays; and the next holder is told of a death
exactly when the last one did not let go.
"""

from __future__ import annotations

import re
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any, NamedTuple

import pytest
from helpers import SOAK
from killing import soon, until, xml
from pg_proxy import Proxy
from pg_servers import PATIENCE, Server, need

need()

import psycopg  # noqa: E402

from shmdomains import EventType, InDoubt, Job, LockLost, ShmDomainsError, Unavailable  # noqa: E402
from shmdomains.postgres import PostgresDomainList  # noqa: E402

A = "00000000-0000-0000-0000-00000000000a"
OURS = re.compile(rb"shmdomains\d+\0" if SOAK else rb"\0shmdomains\d+\0")
"""What a session asks, and no listener: a named statement is used or (in soak) prepared."""
CUTS = ("before", "passed", "answered", "partial")

Doms = Any
Steps = Generator[str, None, None]


# --- what is tried: each yields after each call, what is held then --------------------------------


def get(doms: Doms) -> Steps:
    dom = doms.get("a")
    yield "a"
    dom.unlock()
    yield ""


def commit(doms: Doms) -> Steps:
    dom = doms.get("a")
    yield "a"
    for number in (1, 2):
        dom.data = number
        dom.commit()
        yield "a"
    dom.unlock()
    yield ""


def commit_and_unlock(doms: Doms) -> Steps:
    dom = doms.get("a")
    yield "a"
    dom.data = 1
    dom.unlock()
    yield ""


def define(doms: Doms) -> Steps:
    doms.define(xml("new", B_UUID))
    yield ""


def redefine(doms: Doms) -> Steps:
    doms.define(xml("a", A, memory=2048))
    yield ""


def undefine(doms: Doms) -> Steps:
    doms.undefine("a")
    yield ""


def rename(doms: Doms) -> Steps:
    doms.rename("a", "z")
    yield ""


def activate(doms: Doms) -> Steps:
    dom = doms.get("a")
    yield "a"
    dom.activate(pid=1)
    yield "a"
    dom.unlock()
    yield ""


def mutex(doms: Doms) -> Steps:
    one = doms.mutex("m")
    one.lock()
    yield "m"
    one.unlock()
    yield ""


def list_lock(doms: Doms) -> Steps:
    doms.lock()
    yield "list"
    doms.unlock()
    yield ""


def job(doms: Doms) -> Steps:
    one = doms.job("a", "backup", Job.MODIFY, 5)
    one.__enter__()
    yield ""
    one.progress(1)
    yield ""
    one.end()
    yield ""


def read(doms: Doms) -> Steps:
    assert doms.peek("a").name == "a"
    yield ""
    assert len(doms.list()) == doms.count() == len(doms.snapshot()) == 1
    yield ""


B_UUID = "00000000-0000-0000-0000-00000000000b"
OPERATIONS = [
    *(get, commit, commit_and_unlock, define, redefine, undefine, rename, activate),
    *(mutex, list_lock, job, read),
]
WITHIN = (define, redefine, undefine, rename, job)


# --- the bench ------------------------------------------------------------------------------------


class Sql:
    """The database, past the library and the network."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._connect()

    def _connect(self) -> bool:
        try:
            self._conn = psycopg.connect(self._server.url(by="socket"), autocommit=True)
        except psycopg.OperationalError:
            return False
        self._conn.execute("SET search_path = shmdomains, pg_catalog")
        return True

    def execute(self, text: str, values: Sequence[Any] = ()) -> Any:
        return self._conn.execute(text, values)

    def again(self) -> None:
        """After a death of the server, which may not have ended this yet."""
        until(self._is_over, "the end of all sessions", PATIENCE)
        until(self._connect, "a server that is back", PATIENCE)

    def _is_over(self) -> bool:
        with suppress(psycopg.OperationalError):
            self._conn.execute("SELECT 1")
            return False
        return True

    def close(self) -> None:
        self._conn.close()


class Bench(NamedTuple):
    """A list, by way of a network that fails and past it."""

    server: Server
    proxy: Proxy
    doms: PostgresDomainList
    other: PostgresDomainList
    sql: Sql

    def reset(self) -> None:
        """One domain, ``a``, in its first version."""
        number = self.doms._pool.list
        for table in ("domains", "events"):
            self.sql.execute(f"DELETE FROM {table} WHERE list = %s", [number])
        idle = self.doms._pool._idle
        while idle:
            idle.pop().end("for the test")
        self.other.define(xml("a", A))
        self.sql.execute("DELETE FROM events WHERE list = %s", [number])

    def stored(self) -> list[Any]:
        """All that commits have done."""
        number = self.doms._pool.list
        domains = self.sql.execute(
            "SELECT name, uuid, id <> -1, state, persistent, pid, host, version, defined, data, "
            "work IS NULL, typed, next_typed FROM domains JOIN definitions USING (record) "
            "WHERE list = %s ORDER BY uuid",
            [number],
        ).fetchall()
        events = self.sql.execute(
            "SELECT type, detail, name FROM events WHERE list = %s AND type <> %s ORDER BY place",
            [number, EventType.HOLDER_DIED],
        ).fetchall()
        return [domains, events]

    def mark(self, name: str) -> bool:
        """Whether somebody died holding this domain."""
        row = self.sql.execute(
            "SELECT owner, died FROM domains WHERE list = %s AND name = %s",
            [self.doms._pool.list, name],
        ).fetchone()
        return row is not None and row != (None, None)

    def deaths(self) -> int:
        """How many were told by an event."""
        look = "SELECT count(*) FROM events WHERE list = %s AND type = %s"
        values = [self.doms._pool.list, EventType.HOLDER_DIED]
        return int(self.sql.execute(look, values).fetchone()[0])

    def settle(self) -> None:
        """Wait for the end of the sessions that were lost: the server goes on with what it was
        asked."""
        count = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 "
            "AND granted AND (classid::bigint >> 16) - 23808 = 6"
        )
        ours = [*self.doms._pool._all, *self.other._pool._all]

        def is_so() -> bool:
            return self.sql.execute(count).fetchone() == (sum(one.is_there() for one in ours),)

        until(is_so, "the end of sessions")

    def newest(self) -> int:
        """The backend that `doms` connected to last."""
        look = (
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE %s "
            "ORDER BY backend_start DESC LIMIT 1"
        )
        return int(self.sql.execute(look, ["%faults on here"]).fetchone()[0])

    def lockers(self) -> list[Any]:
        return self.sql.execute(
            "SELECT classid, objid, pid FROM pg_locks WHERE locktype = 'advisory' "
            "AND objsubid = 1 AND granted AND (classid::bigint >> 16) - 23808 BETWEEN 1 AND 3"
        ).fetchall()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    name = "faults"
    with (
        Server() as pg_server,
        Proxy(pg_server) as proxy,
        PostgresDomainList.create(proxy.url(name, lease=2), host="here") as doms,
        PostgresDomainList.attach(pg_server.url(name, lease=2), host="there") as other,
        closing(Sql(pg_server)) as sql,
    ):
        yield Bench(pg_server, proxy, doms, other, sql)


def tell(exc: ShmDomainsError) -> bool:
    """Whether the caller is told that what it asked for is applied all the same."""
    return "all the same" in str(exc) or "is applied" in str(exc)


@contextmanager
def in_a_thread(call: Callable[[], Any]) -> Iterator[list[Any]]:
    """Call it beside the block; what it returns is in the list when the block ends."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()))
    thread.start()
    yield result
    thread.join(PATIENCE)
    assert not thread.is_alive() and result


class Run:
    """An operation that was run as far as it goes."""

    def __init__(self, steps: Steps) -> None:
        self.held, self.done = [""], 0
        self.error: ShmDomainsError | None = None
        try:
            for held in steps:
                self.held.append(held)
                self.done += 1
        except ShmDomainsError as exc:
            self.error = exc.with_traceback(None)
        finally:
            steps.close()


def stages(bench: Bench, operation: Callable[[Doms], Steps]) -> list[Any]:
    """What is in the database after each call, if nothing fails."""
    bench.reset()
    found = [bench.stored()]
    for _ in operation(bench.doms):
        found.append(bench.stored())
    return found


def judge(bench: Bench, run: Run, seen: list[Any], where: str, whole: bool) -> None:
    """What a run was told, against what is there. `whole`: it takes and frees locks within one
    call, which is not told if their session ends with them, after what it did with them."""
    bench.settle()
    now, error = bench.stored(), run.error
    what = f"{where}, after {run.done} calls: {error!r}"
    if error is None:
        assert now == seen[-1], what
    else:
        assert isinstance(error, LockLost), what
        assert now == seen[run.done + tell(error)], what
        assert bench.server.password not in str(error)
    before = bench.deaths()
    assert whole or not before, what  # else the next lock within the same call tells of it
    held = run.held[-1] if error else ""
    marked = {name for name, *_ in now[0] if bench.mark(name)}
    if held == "a" and where.startswith("before"):
        assert marked == {row[0] for row in now[0] if str(row[1]) == A}, what
    elif error is None and not whole:
        assert not marked, what
    told = len(marked)
    for name in [row[0] for row in now[0]]:
        for doms in (bench.other, bench.doms):
            with doms.get(name, timeout=PATIENCE) as dom:
                assert (dom.previous_owner_died is not None) == (name in marked), what
            marked.discard(name)
    assert bench.deaths() == max(before, told), what  # one request failed, so one death, told once
    with bench.other.mutex("m", PATIENCE) as one:
        assert one.previous_owner_died is None or held == "m", what
        assert one.previous_owner_died is not None or not (held == "m" and "before" in where), what
    with bench.other.locked(PATIENCE):
        pass
    assert bench.lockers() == [], what


@pytest.mark.soak
@pytest.mark.parametrize("where", CUTS if SOAK else CUTS[:3])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.__name__)
def test_cut_at_each_request(
    bench: Bench, operation: Callable[[Doms], Steps], where: str, tried: Callable[[str, int], None]
) -> None:
    seen = stages(bench, operation)
    for number in range(1, 100):
        bench.reset()
        fault = bench.proxy.fail(where, number, OURS)
        run = Run(operation(bench.doms))
        if bench.proxy.forget(fault):
            assert run.error is None
            break
        fault.wait()
        judge(bench, run, seen, f"{where} {number}", operation in WITHIN)
    tried("requests of a list on PostgreSQL that were cut", number - 1)
    assert number > 2


# --- the server dies ------------------------------------------------------------------------------


def die_whole(bench: Bench) -> None:
    bench.server.kill()


def die_at_the_top(bench: Bench) -> None:
    bench.server.kill_postmaster()


def die_one(bench: Bench) -> None:
    """One backend: the postmaster ends all the others and starts anew."""
    pid = bench.newest()
    [one] = [process for process in bench.server.processes() if process.pid == pid]
    one.kill()


DEATHS = [die_whole, die_at_the_top, die_one]


@pytest.mark.soak
@pytest.mark.parametrize("death", DEATHS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("where", ["stall", "mute"])
@pytest.mark.parametrize(
    "operation", OPERATIONS if SOAK else [commit_and_unlock], ids=lambda one: one.__name__
)
def test_the_server_dies_at_each_request(
    bench: Bench,
    operation: Callable[[Doms], Steps],
    where: str,
    death: Callable[[Bench], None],
    tried: Callable[[str, int], None],
) -> None:
    """It comes back at once, so the receipt decides."""
    seen = stages(bench, operation)
    for number in range(1, 100):
        bench.reset()
        fault = bench.proxy.fail(where, number, OURS)
        with in_a_thread(lambda: Run(operation(bench.doms))) as result:
            reached = fault.reached
            until(lambda on=reached, end=result: on.is_set() or end, "the request, or the end")
            if not (over := bench.proxy.forget(fault)):
                fault.wait()
                death(bench)
                bench.proxy.cut()  # nothing that was answered arrives
                if not bench.server.is_running:
                    bench.server.start()
        [run] = result
        if over:
            assert run.error is None
            break
        bench.sql.again()
        judge(bench, run, seen, f"{where} {number}", operation in WITHIN)
    tried("deaths of the server at a request of a list", number - 1)
    assert number > 2


class Away:
    """A thread that holds ``a`` with a change, by way of a network that loses its commit."""

    def __init__(self, bench: Bench, call: Callable[[Any], None]) -> None:
        self._bench, self._call = bench, call
        self.held = threading.Event()
        self.go = threading.Event()
        self.message = ""

    def run(self) -> Away:
        dom = self._bench.doms.get("a")
        dom.data = "new"
        self.held.set()
        assert self.go.wait(PATIENCE)
        with pytest.raises(InDoubt) as info:
            self._call(dom)
        self.message = "".join(traceback.format_exception(info.value))
        assert not dom.is_locked
        return self


@pytest.mark.parametrize("where", ["stall", "mute"])
@pytest.mark.parametrize(
    "call", [lambda dom: dom.commit(1), lambda dom: dom.unlock(1)], ids=["commit", "unlock"]
)
def test_in_doubt(bench: Bench, where: str, call: Callable[[Any], None]) -> None:
    """The server went with the answer, and did not come back in time."""
    bench.reset()
    away = Away(bench, call)
    with in_a_thread(away.run) as result:
        away.held.wait(PATIENCE)
        fault = bench.proxy.fail(where, 1, OURS)
        away.go.set()
        fault.wait()
        bench.server.kill()
        began = time.monotonic()
        bench.proxy.cut()
        until(lambda: result, "a word from whoever committed", PATIENCE)
        took = time.monotonic() - began
    assert 1 < took < 10, took
    shown = bench.doms._pool.address.shown
    for words in (shown, "the commit of domain 'a'", "is not known", "cannot be reached", "Look"):
        assert words in away.message, away.message
    assert bench.server.password not in away.message
    bench.server.start()
    bench.sql.again()
    assert bench.sql.execute("SELECT data IS NULL FROM domains").fetchall() == [(where == "stall",)]
    with bench.doms.get("a", timeout=PATIENCE) as dom:
        assert dom.data == (None if where == "stall" else "new")


def test_unavailable(bench: Bench) -> None:
    """Whoever holds nothing is told what was tried, too."""
    bench.reset()
    shown = bench.doms._pool.address.shown
    bench.server.kill()
    calls: list[Callable[[], object]] = [
        lambda: bench.doms.get("a", timeout=1),
        lambda: bench.doms.peek("a"),
        bench.doms.list,
        lambda: bench.doms.lock(1),
        lambda: bench.doms.mutex("m", 1).lock(1),
        lambda: bench.doms.define(xml("new"), timeout=1),
        lambda: PostgresDomainList.attach(bench.proxy.url("faults"), timeout=0),
    ]
    bench.doms._pool.patience = 1.0
    for call in calls:
        with pytest.raises(Unavailable) as info, soon("a word from who asked"):
            call()
        message = "".join(traceback.format_exception(info.value))
        assert shown in message, message
        assert "cannot be reached" in message or "went away" in message, message
        assert bench.server.password not in message
    bench.doms._pool.patience = 2.0
    bench.server.start()
    bench.sql.again()
    with bench.doms.get("a", timeout=PATIENCE) as dom:
        assert dom.previous_owner_died is None


def test_a_new_session_is_cut(bench: Bench) -> None:
    """At what it sets, and when it enters itself: another one is made."""
    for words in ("set_config", "enter_session"):
        for where in CUTS:
            bench.reset()
            fault = bench.proxy.fail(where, 1, words)
            with bench.doms.get("a") as dom:
                assert dom.previous_owner_died is None
            fault.wait()
            bench.settle()
