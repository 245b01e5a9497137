"""What an adversary does to a list on PostgreSQL: schedules that must not break its promises.

A schedule is held where it hurts by what stands in for `Session.call`; nobody sleeps.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pg_servers
import pytest
from killing import until

pg_servers.need()

import psycopg  # noqa: E402

from shmdomains.errors import (  # noqa: E402
    DomainNotLocked,
    LockLost,
    LockTimeout,
    SegmentNotFound,
    Unavailable,
)
from shmdomains.postgres import PostgresDomainList  # noqa: E402
from shmdomains.postgres import pool as pools  # noqa: E402
from shmdomains.postgres import session as sessions  # noqa: E402
from shmdomains.postgres import statements as ask  # noqa: E402

XML = "<domain type='kvm'><name>{}</name><memory>1024</memory><os><type>hvm</type></os></domain>"


@pytest.fixture(scope="module")
def server() -> Iterator[pg_servers.Server]:
    with pg_servers.Server(max_connections="100") as one:
        yield one


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


@pytest.fixture
def doms(server: pg_servers.Server, name: str) -> Iterator[PostgresDomainList]:
    with PostgresDomainList.create(server.url(name, by="socket", lease=2)) as one:
        for domain in "abc":
            one.define(XML.format(domain))
        yield one


@pytest.fixture
def other(server: pg_servers.Server, name: str, doms: Any) -> Iterator[PostgresDomainList]:
    """The same list through other connections, as another host has it."""
    with PostgresDomainList.attach(server.url(name, by="socket", lease=2), host="other") as one:
        yield one


@pytest.fixture
def sql(server: pg_servers.Server) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(server.url(by="socket"), autocommit=True) as one:
        one.execute("SET search_path = shmdomains, pg_catalog")
        yield one


def on(
    monkeypatch: pytest.MonkeyPatch,
    doms: PostgresDomainList,
    statement: sessions.Statement,
    before: Callable[[sessions.Session], None] | None = None,
    after: Callable[[sessions.Session], None] | None = None,
) -> None:
    """Once, before or after this statement of this list is asked."""
    call = sessions.Session.call

    def hooked(self: sessions.Session, what: Any, values: Any = (), waits: bool = False) -> Any:
        if what is not statement or self not in doms._pool._all:
            return call(self, what, values, waits)
        monkeypatch.setattr(sessions.Session, "call", call)
        if before is not None:
            before(self)
        rows = call(self, what, values, waits)
        if after is not None:
            after(self)
        return rows

    monkeypatch.setattr(sessions.Session, "call", hooked)


def lose_answer(session: sessions.Session) -> None:
    """The server did it, and its answer never came."""
    raise session._end("the connection was cut", True)


def interrupt(_session: sessions.Session) -> None:
    raise KeyboardInterrupt


def holds(sql: psycopg.Connection[Any], doms: PostgresDomainList, name: str) -> Any:
    """owner and died of a domain's mark."""
    return sql.execute(
        "SELECT owner, died FROM domains WHERE list = %s AND name = %s",
        [doms._pool.list, name],
    ).fetchone()


def lockers(sql: psycopg.Connection[Any]) -> list[int]:
    """The backend of each lock of a domain, list or mutex that is held in this database."""
    rows = sql.execute(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND granted "
        "AND (classid::bigint >> 16) - 23808 BETWEEN 1 AND 3"
    )
    return [int(row[0]) for row in rows]


def unlocked(sql: psycopg.Connection[Any], doms: PostgresDomainList) -> None:
    """No lock is held, and no session with one was given back."""
    assert not {one.conn.info.backend_pid for one in doms._pool._idle} & {*lockers(sql)}
    until(lambda: not lockers(sql), "no lock is held")


# --- lost answers -----------------------------------------------------------------------------


def test_the_answer_to_a_commit_that_unlocks_one_of_two_is_lost(
    doms: PostgresDomainList, other: PostgresDomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit is applied; the other domain was lost with the session."""
    with doms.locked():
        a, b = doms.find_by_name("a"), doms.find_by_name("b")
    assert a is not None and b is not None
    a.autostart = True
    on(monkeypatch, doms, ask.COMMIT, after=lose_answer)
    a.unlock()
    assert other.get("a").autostart
    with other.get("b", timeout=5):
        b.autostart = True
        with pytest.raises(LockLost):
            b.commit()
    assert not other.peek("b").autostart


@pytest.mark.parametrize("unlock", [False, True], ids=["commit", "unlock"])
@pytest.mark.parametrize("happened", [False, True], ids=["not asked", "answer lost"])
def test_a_commit_of_data_whose_answer_is_lost_is_made_once(
    doms: PostgresDomainList, happened: bool, unlock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another statement than that of a commit of all."""
    with doms.get("a") as dom:
        dom.data = 1
    dom = doms.get("a")
    dom.data += 1
    if happened:
        on(monkeypatch, doms, ask.COMMIT_STATE, after=lose_answer)
    else:
        on(monkeypatch, doms, ask.COMMIT_STATE, before=lose_answer)
    if unlock:
        dom.unlock()
    else:
        dom.commit()
        assert doms.peek("a").data == 2
        dom.data += 1
        dom.unlock()
    with doms.get("a") as dom:
        assert dom.data == (2 if unlock else 3)
        assert dom.previous_owner_died is None


def test_somebody_had_the_domain_between_a_lost_answer_and_locking_it_again(
    doms: PostgresDomainList, other: PostgresDomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if he changed nothing in it: outside he may have."""
    dom = doms.get("a")
    dom.autostart = True

    def another(_session: sessions.Session) -> None:
        other.get("a", timeout=5).unlock()

    def cut(session: sessions.Session) -> None:
        on(monkeypatch, doms, ask.LOCK, before=another)
        lose_answer(session)

    on(monkeypatch, doms, ask.COMMIT, before=cut)
    with pytest.raises(LockLost):
        dom.commit()
    assert not other.peek("a").autostart


# --- what was not freed -----------------------------------------------------------------------


def test_freeing_that_was_cancelled_leaves_no_lock(
    doms: PostgresDomainList, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dom = doms.get("a")

    def refused(_session: sessions.Session) -> None:
        raise sessions.Refused("57014", "canceling statement due to user request", None)

    on(monkeypatch, doms, ask.UNLOCK, before=refused)
    with pytest.raises(Unavailable):
        dom.unlock()
    unlocked(sql, doms)


def test_interrupted_before_freeing_leaves_no_lock(
    doms: PostgresDomainList, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for statement, lock in [
        (ask.UNLOCK, lambda: doms.get("a")),
        (ask.UNLOCK_MUTEX, lambda: doms.mutex("m")),
        (ask.UNLOCK_LIST, lambda: doms),
    ]:
        one = lock()
        if statement is not ask.UNLOCK:
            one.lock()
        on(monkeypatch, doms, statement, before=interrupt)
        with pytest.raises(KeyboardInterrupt):
            one.unlock()
        unlocked(sql, doms)


def test_a_thread_that_is_refused_a_session_leaves_it_to_others(
    doms: PostgresDomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that another thread had is entered anew, and that was cancelled."""

    def refused(_session: sessions.Session) -> None:
        raise sessions.Refused("57014", "canceling statement due to user request", None)

    doms.get("a").unlock()
    failed: list[BaseException] = []

    def get() -> None:
        try:
            doms.get("a")
        except Unavailable as exc:
            failed.append(exc)

    on(monkeypatch, doms, pools._USE, before=refused)
    there = list(doms._pool._idle)
    thread = threading.Thread(target=get)
    thread.start()
    thread.join()
    assert failed
    assert list(doms._pool._idle) == there
    doms.get("a").unlock()


def test_locking_that_the_server_refuses_late_leaves_no_lock(
    doms: PostgresDomainList, sql: psycopg.Connection[Any]
) -> None:
    """An error does not undo the locking of an advisory lock."""
    sql.execute("BEGIN")
    sql.execute("SELECT FROM domains FOR UPDATE")
    failed: list[BaseException] = []

    def get() -> None:
        try:
            doms.get("a")
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=get)
    thread.start()
    waits = (
        "SELECT pg_cancel_backend(pid) FROM pg_locks WHERE NOT granted AND locktype <> 'advisory'"
    )

    def cancelled() -> object:
        sql.execute("SELECT pg_stat_clear_snapshot()")  # a transaction looks only once
        return sql.execute(waits).fetchone()

    until(cancelled, "a session that waits for the mark")
    thread.join()
    sql.execute("ROLLBACK")
    assert isinstance(failed[0], Unavailable)
    unlocked(sql, doms)


@pytest.mark.parametrize("what", ["domain", "list", "mutex"])
def test_interrupted_after_locking_leaves_no_lock(
    doms: PostgresDomainList,
    other: PostgresDomainList,
    sql: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """Between the answer and the line that notes it. Nobody died of it, either."""
    lock: dict[str, tuple[Any, Callable[[PostgresDomainList], Any]]] = {
        "domain": (ask.LOCK, lambda doms: doms.get("a", timeout=5)),
        "list": (ask.LOCK_LIST, lambda doms: doms.lock(5)),
        "mutex": (ask.LOCK_MUTEX, lambda doms: doms.mutex("m").lock(5)),
    }
    statement, take = lock[what]
    on(monkeypatch, doms, statement, after=interrupt)
    with pytest.raises(KeyboardInterrupt):
        take(doms)
    unlocked(sql, doms)
    if what == "domain":
        with other.get("a", timeout=5) as dom:
            assert dom.previous_owner_died is None


# --- interrupted commits ----------------------------------------------------------------------


def test_interrupted_in_a_commit_its_holder_reads_what_came_of_it(
    doms: PostgresDomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    with doms.get("a") as dom:
        dom.autostart = True
        on(monkeypatch, doms, ask.COMMIT, after=interrupt)
        with pytest.raises(KeyboardInterrupt):
            dom.commit()
        assert dom.autostart
        dom.persistent = True
        dom.data = 1
        dom.commit()
        assert dom.data == 1


def test_interrupted_in_a_commit_that_unlocks_the_next_holders_mark_stays(
    doms: PostgresDomainList,
    other: PostgresDomainList,
    sql: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dom = doms.get("a")
    dom.autostart = True
    taken = []

    def next_holder(_session: sessions.Session) -> None:
        taken.append(other.get("a", timeout=5))
        raise KeyboardInterrupt

    on(monkeypatch, doms, ask.COMMIT, after=next_holder)
    with pytest.raises(KeyboardInterrupt):
        dom.unlock()
    owner, _ = holds(sql, doms, "a")
    assert owner == other._pool.mine().session.number
    other._pool.mine().session.end("it is killed")
    assert taken[0].is_locked
    with doms.get("a", timeout=5) as dom:
        assert dom.previous_owner_died is not None


# --- handles that are dropped -----------------------------------------------------------------


def test_a_handle_dropped_after_the_session_was_lost_hides_nothing(
    doms: PostgresDomainList, other: PostgresDomainList
) -> None:
    """Changes to another domain must not vanish without an error."""
    with doms.locked():
        a, b = doms.find_by_name("a"), doms.find_by_name("b")
    assert a is not None and b is not None
    with pytest.raises(LockLost), b:
        b.autostart = True
        session = doms._pool.mine().session
        with psycopg.connect(doms._pool._conninfo, autocommit=True) as sql:
            backend = session.conn.info.backend_pid
            sql.execute("SELECT pg_terminate_backend(%s)", [backend])
        until(lambda: not session.is_there(), "the session's end")
        with pytest.warns(ResourceWarning):
            del a
    assert not other.peek("b").autostart


def test_a_handle_is_collected_in_the_midst_of_a_call(
    doms: PostgresDomainList, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may run anywhere."""
    knot: list[Any] = [doms.get("a")]
    knot.append(knot)
    read = sessions.Session._read
    gc.disable()
    del knot

    def collecting(self: sessions.Session, waits: bool) -> Any:
        monkeypatch.setattr(sessions.Session, "_read", read)
        with pytest.warns(ResourceWarning):
            gc.collect()
        return read(self, waits)

    monkeypatch.setattr(sessions.Session, "_read", collecting)
    try:
        with doms.get("b", timeout=0) as dom:
            assert dom.is_locked
            assert len(lockers(sql)) == 1
            assert list(doms._mine.holds) == [dom._record]
    finally:
        gc.enable()
    unlocked(sql, doms)
    doms.get("a", timeout=5).unlock()


def test_whoever_watches_a_list_that_is_removed_is_told(
    doms: PostgresDomainList, other: PostgresDomainList
) -> None:
    doms.unlink(force=True)
    with pytest.raises(SegmentNotFound):
        list(other.watch(since=0, timeout=1))


# --- tokens ---------------------------------------------------------------------------------------


def test_no_token_is_given_twice_when_the_server_crashes(server: pg_servers.Server) -> None:
    """One backend is killed, and the server starts anew without being started: what was not flushed
    is gone, the tokens too. Twice, with nothing flushed between."""
    with pg_servers.Server(wal_writer_delay="10s", wal_writer_flush_after="100GB") as one:
        one.psql("ALTER ROLE shmdomains SET lock_timeout = '1min'")
        with PostgresDomainList.create(one.url("tokens", by="socket")) as doms:
            doms.define(XML.format("a"))
            tokens = []
            for _ in range(3):
                for _ in range(3):
                    with doms.get("a", timeout=30) as dom:
                        tokens.append(dom.token)
                session = doms._pool._idle[-1]
                os.kill(session.conn.info.backend_pid, signal.SIGKILL)
                until(lambda: not session.is_there(), "the session's end")  # noqa: B023
            assert tokens == sorted(set(tokens))


def test_no_token_is_given_twice_when_a_domain_is_defined_anew(doms: PostgresDomainList) -> None:
    """Whoever held it before it was removed may still write outside, with the token he had."""
    with doms.get("a") as dom:
        uuid = dom.uuid
    tokens: list[int] = []
    for _ in range(3):
        for _ in range(3):
            with doms.get("a") as dom:
                tokens.append(dom.token)
        doms.undefine("a")
        doms.define(XML.format("a").replace("<memory>", f"<uuid>{uuid}</uuid><memory>"))
    assert tokens == sorted(set(tokens))


def test_a_key_is_guessed_wrong_once(
    doms: PostgresDomainList, other: PostgresDomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess takes the lock of the domain that had the key, so that others find it taken."""
    doms.get("a").unlock()
    other.rename("a", "x")
    other.rename("b", "a")
    guesses: list[Any] = []
    call = sessions.Session.call

    def hooked(self: sessions.Session, what: Any, values: Any = (), waits: bool = False) -> Any:
        if what is ask.LOCK:
            guesses.append(int(values[3]))
        return call(self, what, values, waits)

    monkeypatch.setattr(sessions.Session, "call", hooked)
    for _ in range(2):
        with doms.get("a") as dom:
            assert dom.name == "a"
    assert guesses[0] != guesses[1] == dom._record


def test_a_process_of_another_host_is_alive_after_the_server_was_away(
    server: pg_servers.Server, doms: PostgresDomainList, other: PostgresDomainList, sql: Any
) -> None:
    """Nobody could be heard of: all have a lease to come back."""
    caller = other._store.caller()
    other._pool.place = "another machine"
    with suppress(LockTimeout):
        other.close()
    until(lambda: not attached(sql, caller.start >> 40), "its locks are gone")
    # Not before: its listener may have told once more that it lives.
    sql.execute("UPDATE processes SET place = host, seen = seen - interval '1 hour'")
    assert not doms._store.lives(caller)
    sql.execute("UPDATE lives SET since = clock_timestamp() + interval '1 minute'")
    assert doms._store.lives(caller)


def attached(sql: psycopg.Connection[Any], process: int) -> bool:
    row = sql.execute(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted "
        "AND objid::bigint = %s AND (classid::bigint >> 16) - 23808 = 7",
        [process],
    ).fetchone()
    assert row is not None
    return bool(row[0])


def test_a_session_of_another_database_with_the_same_number_is_left_alone(
    server: pg_servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.psql("CREATE DATABASE twin OWNER shmdomains")
    url = server.url("one", by="socket")
    with PostgresDomainList.create(url.replace("/shmdomains?", "/twin?", 1)) as twin:
        twin.define(XML.format("a"))
        with twin.get("a"):
            theirs = twin._pool.mine().session
            with PostgresDomainList.create(url) as doms:
                doms.define(XML.format("a"))
                dom = doms.get("a")
                dom.autostart = True
                doms._pool.mine().session.number = theirs.number
                on(monkeypatch, doms, ask.COMMIT, after=lose_answer)
                with suppress(LockLost):
                    dom.unlock()
            assert theirs.is_there()


# --- processes and servers ------------------------------------------------------------------------


def test_ctrl_c_in_a_wait_for_a_server_that_is_frozen(sql: psycopg.Connection[Any]) -> None:
    with (
        pg_servers.Server() as one,
        PostgresDomainList.create(one.url("frozen", by="socket", lease=2)) as doms,
        PostgresDomainList.attach(one.url("frozen", by="socket", lease=2)) as other,
    ):
        doms.define(XML.format("a"))
        dom = other.get("a")
        interrupted = threading.Event()
        frozen = []

        def freeze() -> None:
            waits = "SELECT FROM pg_locks WHERE NOT granted"
            with psycopg.connect(one.url(by="socket"), autocommit=True) as watcher:
                until(lambda: watcher.execute(waits).rowcount, "a wait")
            one.freeze()
            os.kill(os.getpid(), signal.SIGINT)
            frozen.append(interrupted.wait(30))
            one.thaw()

        thread = threading.Thread(target=freeze)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            doms.get("a")
        interrupted.set()
        thread.join()
        assert frozen == [True]
        with suppress(LockLost):
            dom.unlock()


def test_a_fork_forgets_all_sessions_even_if_one_has_no_socket_any_more(
    doms: PostgresDomainList,
) -> None:
    with doms.locked(), doms.get("a"):
        pool = doms._pool
        pool._idle.append(pool._make())
        for one in pool._idle:
            one._pg.finish()
        pid = os.fork()
        if pid == 0:
            forgotten = not pool.states and not pool._idle and not pool._all
            os._exit(0 if forgotten else 1)
        assert os.waitpid(pid, 0)[1] == 0
        pool._idle.clear()


def test_a_domain_that_is_held_when_its_list_is_closed_stays_held(server: Any, name: str) -> None:
    doms = PostgresDomainList.create(server.url(name, by="socket", lease=1))
    doms.define(XML.format("a"))
    dom = doms.get("a")
    session = doms._pool.mine().session
    doms.close()
    begin = session.used
    until(lambda: session.used > begin + 2, "it is heard of for two leases more")
    dom.unlock()
    assert doms._pool._listener is None


def test_a_process_whose_row_is_gone_makes_a_new_one(
    doms: PostgresDomainList, sql: psycopg.Connection[Any]
) -> None:
    """As after a standby took over that was behind. A commit is not made without its receipt."""
    dom = doms.get("a")
    dom.autostart = True
    sql.execute("DELETE FROM processes WHERE process = %s", [doms._pool.process])
    with pytest.raises(LockLost, match="the session has no row"):
        dom.unlock()
    info = doms.peek("a")
    assert info is not None and not info.autostart
    with doms.get("a") as dom:
        dom.autostart = True
    info = doms.peek("a")
    assert info is not None and info.autostart


def test_two_named_locks_crossed_with_time_outs(
    doms: PostgresDomainList, other: PostgresDomainList
) -> None:
    """The server calls it a deadlock after a second; here both waits end by themselves."""
    held = threading.Barrier(2)
    errors: list[BaseException] = []

    def cross(doms: PostgresDomainList, first: str, second: str) -> None:
        with doms.mutex(first):
            held.wait(10)
            try:
                doms.mutex(second).lock(1.6)
            except BaseException as exc:
                errors.append(exc)
            held.wait(10)

    threads = [
        threading.Thread(target=cross, args=(doms, "one", "two")),
        threading.Thread(target=cross, args=(other, "two", "one")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(one) for one in errors] == [LockTimeout, LockTimeout]


def test_after_a_loss_nobody_is_said_to_hold_it(doms: PostgresDomainList) -> None:
    """Neither this thread, nor another one of this process."""
    dom = doms.get("a")
    [state] = doms._pool.states.values()
    assert state.session is not None
    state.session.end("a test ends it")
    dom.data = 1
    with pytest.raises(LockLost):
        dom.unlock()
    with pytest.raises(DomainNotLocked):
        dom.unlock()
    with doms.get("a") as again:
        assert again.data is None
