"""Hosts, servers and networks that stand still for longer than a lease, and the traps on the way: a
list on PostgreSQL, where a lock is a session's.

A lease is as short as may be, one second. What must end by itself after it is waited for with a
deadline; nothing here sleeps.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from killing import Child, Pipe, soon, until, xml
from pg_proxy import Proxy
from pg_servers import PATIENCE, Server, need

need()


from shmdomains import (  # noqa: E402
    AlreadyLocked,
    InDoubt,
    LockLost,
    LockTimeout,
    ShmDomainsError,
    Unavailable,
)
from shmdomains.postgres import PostgresDomainList  # noqa: E402
from shmdomains.postgres import session as sessions  # noqa: E402

LEASE = 1.0
SLACK = 5.0
"""Seconds that a busy machine may need more than a lease."""

Start = Callable[..., Child]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(max_connections="60") as one:
        yield one


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server) as one:
        yield one


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    return server.url(str(request.node.name), lease=LEASE)


@pytest.fixture
def doms(url: str) -> Iterator[PostgresDomainList]:
    """A list with ``a`` and ``b``; none of its locks is held after the test."""
    with PostgresDomainList.create(url) as one:
        for name in "ab":
            one.define(xml(name))
        yield one
        for name in "ab":
            with one.get(name, timeout=PATIENCE):
                pass
        with one.locked(PATIENCE):
            pass
        until(lambda: not held(one), "no lock is held")


@pytest.fixture
def far(proxy: Proxy, url: str, doms: PostgresDomainList) -> Iterator[PostgresDomainList]:
    """The same list through a network that can be parted."""
    with PostgresDomainList.attach(proxy.url(doms.info.name, lease=LEASE), host="far") as one:
        yield one


def held(doms: PostgresDomainList) -> list[Any]:
    return [one for one in doms.locks() if one.kind in ("domain", "list", "mutex")]


class Thread(threading.Thread):
    """Calls a function; `join` returns what it returned, or raised."""

    def __init__(self, call: Callable[..., Any], *values: Any) -> None:
        super().__init__(daemon=True)
        self._call, self._values = call, values
        self._result: Any = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call(*self._values)
        except ShmDomainsError as exc:
            self._result = exc.with_traceback(None)

    def end(self, timeout: float = PATIENCE) -> Any:
        self.join(timeout)
        assert not self.is_alive(), "a thread is stuck"
        return self._result


def waits(server: Server, count: int = 1) -> None:
    """Until so many sessions wait for an advisory lock."""
    look = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    until(lambda: server.psql(look) == str(count), "a wait", PATIENCE)


class Holder:
    """A thread that holds a domain with a change."""

    def __init__(self, doms: PostgresDomainList, name: str = "a") -> None:
        self.token = 0
        self._ready, self._go = threading.Event(), threading.Event()
        self._thread = Thread(self._hold, doms, name)
        assert self._ready.wait(PATIENCE)

    def _hold(self, doms: PostgresDomainList, name: str) -> str:
        with doms.get(name) as dom:
            dom.data = "held"
            self.token = dom.token
            self._ready.set()
            assert self._go.wait(PATIENCE)
        return "applied"

    def end(self) -> Any:
        """Let it commit; returns what came of it."""
        self._go.set()
        return self._thread.end()


# --- the server stands still ----------------------------------------------------------------------


def test_the_server_is_frozen(server: Server, doms: PostgresDomainList) -> None:
    """Longer than a lease, while workers hold, wait, commit and come: each is told in time, and
    goes on when it is thawed."""
    holder = Holder(doms)
    waiter = Thread(doms.get, "a")
    waits(server)
    ready, go = threading.Event(), threading.Event()

    def commit() -> None:
        with doms.get("b") as dom:
            dom.data = "doubtful"
            ready.set()
            assert go.wait(PATIENCE)
            dom.commit(1)

    committer = Thread(commit)
    assert ready.wait(PATIENCE)
    server.freeze()
    try:
        began = time.monotonic()
        go.set()
        comer = Thread(doms.peek, "a")
        for who, kind in ((waiter, Unavailable), (comer, Unavailable), (committer, InDoubt)):
            told = who.end()
            assert isinstance(told, kind), (who, told)
            assert doms._pool.address.shown in str(told)
        took = time.monotonic() - began
        assert LEASE < took < 4 * LEASE + 2 + SLACK, took
    finally:
        server.thaw()
    told = holder.end()
    assert told == "applied" or isinstance(told, LockLost), told
    with doms.get("a", timeout=PATIENCE) as dom:
        assert dom.data == ("held" if told == "applied" else None)
    with doms.get("b", timeout=PATIENCE) as dom:
        assert dom.data in (None, "doubtful")
        dom.data = "new"
    assert doms.peek("b").data == "new"


# --- a host stands still --------------------------------------------------------------------------


def work(pipe: Pipe, url: str) -> None:
    """Hold ``a``; when told to, commit a change. Says its token, and what came of it."""
    with PostgresDomainList.attach(url, host="stopped") as doms:
        dom = doms.get("a")
        pipe.say(dom.token)
        pipe.listen()
        dom.data = "stale"
        try:
            dom.unlock()
        except LockLost as exc:
            pipe.say(str(exc))
        else:
            pipe.say("applied")
        with doms.get("a", timeout=PATIENCE) as dom:
            pipe.say(dom.token)


def test_a_host_that_is_stopped(
    start: Start, url: str, doms: PostgresDomainList, server: Server
) -> None:
    """Its locks are free after a lease; it cannot harm anybody when it goes on."""
    child = start(work, url)
    token = child.hear(PATIENCE)
    child.signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(LockTimeout, match="stopped"):
        doms.get("a", timeout=0.1)
    with doms.get("a", timeout=PATIENCE) as dom:
        took = time.monotonic() - began
        assert took < LEASE + SLACK, took
        assert dom.previous_owner_died is not None and dom.previous_owner_died.host == "stopped"
        assert dom.token > token and dom.data is None
        dom.data = "ours"
        after = dom.token
    child.signal(signal.SIGCONT)
    assert "are lost" in child.ask(timeout=PATIENCE)
    assert child.hear(PATIENCE) > after
    assert doms.peek("a").data == "ours"


def wait_and_work(pipe: Pipe, url: str) -> None:
    with PostgresDomainList.attach(url, host="stopped") as doms:
        pipe.say()
        dom = doms.get("a", timeout=PATIENCE)
        pipe.say(dom.token)
        dom.data = "stale"
        try:
            dom.unlock()
        except LockLost as exc:
            pipe.say(str(exc))
        else:
            pipe.say("applied")


def test_a_host_that_is_stopped_while_it_waits(
    start: Start, url: str, doms: PostgresDomainList, server: Server
) -> None:
    """It gets the lock, nobody uses it, and a lease later the next one has it."""
    child = start(wait_and_work, url)
    with doms.get("a"):
        child.hear(PATIENCE)
        waits(server)
        child.signal(signal.SIGSTOP)
    with soon("the lock of a host that is stopped", LEASE + SLACK):
        dom = doms.get("a", timeout=PATIENCE)
    with dom:
        token = dom.token
        dom.data = "ours"
    child.signal(signal.SIGCONT)
    stale = child.hear(PATIENCE)
    assert (stale < token) == ("are lost" in child.hear(PATIENCE))
    assert stale < token and doms.peek("a").data == "ours"


# --- the network stands still ---------------------------------------------------------------------


def test_a_network_that_is_parted(
    server: Server, proxy: Proxy, doms: PostgresDomainList, far: PostgresDomainList
) -> None:
    """Longer than a lease: here all goes on, there everybody is told; healed, they work."""
    holder = Holder(far)
    mine = Holder(doms, "b")
    waiter = Thread(far.get, "b")
    waits(server)
    proxy.partition()
    began = time.monotonic()
    with doms.get("a", timeout=PATIENCE) as dom:
        took = time.monotonic() - began
        assert took < LEASE + SLACK, took
        assert dom.previous_owner_died is not None and dom.token > holder.token
        dom.data = "ours"
    comer = Thread(far.peek, "a")
    for who in (waiter, comer):
        told = who.end()
        assert isinstance(told, Unavailable), told
    told = holder.end()
    assert isinstance(told, (InDoubt, LockLost)), told
    assert mine.end() == "applied"
    with soon("the lock that was given to whoever is cut off", 2 * LEASE + SLACK):
        doms.get("b", timeout=PATIENCE).unlock()
    assert doms.peek("a").data == "ours"
    proxy.heal()
    with far.get("a", timeout=PATIENCE) as dom:
        assert dom.data == "ours"
        dom.data = "theirs"
    assert doms.peek("a").data == "theirs"


def test_a_network_that_is_healed_before_anybody_asks(
    proxy: Proxy, doms: PostgresDomainList, far: PostgresDomainList
) -> None:
    """What a holder sends after it was cut off for a lease changes nothing."""
    holder = Holder(far)
    proxy.partition()
    with doms.get("a", timeout=PATIENCE) as dom:
        dom.data = "ours"
    proxy.heal()
    told = holder.end()
    assert isinstance(told, LockLost), told
    assert doms.peek("a").data == "ours"


# --- traps ----------------------------------------------------------------------------------------


def test_the_locks_are_not_re_entrant(doms: PostgresDomainList, url: str) -> None:
    """PostgreSQL's are: a session that takes one twice must free it twice, and has it meanwhile."""
    dom, mutex = doms.get("a"), doms.mutex("m", 0)
    handle = doms._handle_of("a")
    for lock in (dom.lock, handle.lock, lambda: doms.get("a", timeout=0)):
        with pytest.raises(AlreadyLocked):
            lock()
    dom.unlock()
    with mutex, pytest.raises(AlreadyLocked):
        doms.mutex("m").lock(0)
    with doms.locked(), pytest.raises(AlreadyLocked):
        doms.lock()
    assert held(doms) == []
    with PostgresDomainList.attach(url) as again:
        with mutex, doms.locked(), doms.get("a"):
            for one in (doms, again):  # other owners of this process, and another list of it
                calls: list[Callable[[], Any]] = [
                    lambda one=one: one.get("a", timeout=0),
                    lambda one=one: one.lock(0),
                    lambda one=one: one.mutex("m").lock(0),
                ]
                for call in calls:
                    assert isinstance(told := Thread(call).end(), LockTimeout), told
        assert held(doms) == []


def test_what_is_read_is_not_older_than_the_lock(
    doms: PostgresDomainList, url: str, server: Server
) -> None:
    """The snapshot of a statement is older than what it waits for. Two increments are two."""

    def increment(doms: PostgresDomainList) -> None:
        with doms.get("a") as dom:
            dom.data = (dom.data or 0) + 1

    with PostgresDomainList.attach(url) as other:
        for number in range(1, 6):
            with doms.get("a") as dom:
                thread = Thread(increment, other)
                waits(server)
                dom.data = (dom.data or 0) + 1
            assert thread.end() is None
            assert doms.peek("a").data == 2 * number


SHOW = {
    "idle_session_timeout": "1s",
    "idle_in_transaction_session_timeout": "1s",
    "lock_timeout": "0",
    "statement_timeout": "0",
    "synchronous_commit": "on",
    "transaction_isolation": "read committed",
    "search_path": "shmdomains, pg_catalog",
}


def test_the_lease_is_in_force_on_every_session(
    doms: PostgresDomainList, far: PostgresDomainList, server: Server
) -> None:
    """Also after a wait, one that was in vain, and one that was interrupted."""
    mine = Holder(doms)
    with pytest.raises(LockTimeout):
        far.get("a", timeout=0.01)
    waiter = Thread(far.get, "a")
    waits(server)
    assert mine.end() == "applied"
    dropped = waiter.end()  # its session is idle now, with a lock
    far.get("b").unlock()
    doms.locks()
    seen = 0
    for pool in (doms._pool, far._pool):
        for one in [one for one in pool._all if one.gone is None]:
            for setting, value in SHOW.items():
                [[found]] = one.call(sessions.Statement(f"SHOW {setting}"))
                assert (found or b"").decode() == value, setting
            seen += 1
    assert seen >= 2
    del dropped


def test_a_session_without_a_sign_of_life_ends(
    doms: PostgresDomainList, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tends it, so the server ends it after a lease."""
    with PostgresDomainList.attach(url, host="silent") as silent:
        monkeypatch.setattr(silent._pool, "tend", lambda: None)
        holder = Holder(silent)
        with soon("its lock", LEASE + SLACK), doms.get("a", timeout=PATIENCE) as dom:
            assert dom.previous_owner_died is not None
        assert isinstance(holder.end(), LockLost)


def test_a_session_that_is_tended_lasts(doms: PostgresDomainList, url: str) -> None:
    """For several leases."""
    with PostgresDomainList.attach(url) as other:
        holder = Holder(other)
        with pytest.raises(LockTimeout):
            doms.get("a", timeout=3 * LEASE)
        assert holder.end() == "applied"
    assert doms.peek("a").data == "held"


def test_a_wait_is_probed_on_a_second_connection(
    doms: PostgresDomainList, far: PostgresDomainList, server: Server
) -> None:
    """It may last for several leases, as long as the server answers others."""
    holder = Holder(doms)
    waiter = Thread(far.get, "a")
    waits(server)
    listener, end = far._pool.listener, time.monotonic() + 2 * LEASE
    until(lambda: listener.answered > end, "signs of the server's life")
    assert waiter.is_alive()
    assert holder.end() == "applied"
    assert not isinstance(waiter.end(), ShmDomainsError)


# --- fork -----------------------------------------------------------------------------------------


def fork_and_wait(pipe: Pipe, url: str) -> None:
    """Hold ``a``, and fork. The parent then does nothing; its child answers for both."""
    with PostgresDomainList.attach(url) as doms:
        dom = doms.get("a")
        session = doms._pool.mine()
        assert session is not None
        if os.fork():
            signal.pause()
        assert doms._pool.mine() is None and not dom.is_locked
        pipe.say(os.getpid())
        while (asked := pipe.listen()) != "end":
            pipe.say((asked, doms.peek("a").name))
        os._exit(0)


def test_a_childs_copy_of_a_connection_keeps_no_lock(
    start: Start, server: Server, doms: PostgresDomainList
) -> None:
    """The parent is killed, and its child lives on. The lease has no part in it."""
    child = start(fork_and_wait, server.url(doms.info.name, lease=60))
    grandchild = child.hear(PATIENCE)
    child.kill()
    with soon("the lock of the dead"):
        dom = doms.get("a", timeout=PATIENCE)
    with dom:
        assert dom.previous_owner_died is not None and dom.previous_owner_died.pid == child.pid
    assert child.ask("there", PATIENCE) == ("there", "a") and grandchild != child.pid
    child.tell("end")


def fork_and_work(pipe: Pipe, url: str) -> None:
    """Parent and child use the list at once; says each one's backends, and the sum."""
    with PostgresDomainList.attach(url) as doms:
        dom = doms.get("a")
        dom.data = 1
        numbers = {one.conn.info.backend_pid for one in doms._pool._all}
        read, write = os.pipe()
        if not (pid := os.fork()):
            with suppress(LockTimeout):
                doms.get("a", timeout=0)
                os._exit(1)
            with doms.get("b") as other:
                other.data = "child"
            theirs = {one.conn.info.backend_pid for one in doms._pool._all}
            os.write(write, b"same" if theirs & numbers else b"apart")
            os._exit(0)
        said = os.read(read, 10).decode()
        _, status = os.waitpid(pid, 0)
        dom.unlock()
        pipe.say((said, status, doms.peek("a").data, doms.peek("b").data))


def test_no_connection_crosses_a_fork(start: Start, doms: PostgresDomainList, url: str) -> None:
    """The parent's goes on after the child's end."""
    child = start(fork_and_work, url)
    assert child.hear(PATIENCE) == ("apart", 0, 1, "child")
