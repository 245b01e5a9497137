"""Owners that are tasks of an event loop, for a list on PostgreSQL: what the contract between two
parties does not show. Calls are made in other threads, waits end at the server, the loop goes on.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any

import pg_servers
import pytest
from killing import DEADLINE, until, xml

pg_servers.need()

from shmdomains import AlreadyLocked, LockLost, LockOrder, LockTimeout, NotOwner, aio  # noqa: E402
from shmdomains.postgres import PostgresDomainList  # noqa: E402
from shmdomains.postgres import session as sessions  # noqa: E402
from shmdomains.postgres import statements as ask  # noqa: E402

pytestmark = pytest.mark.usefixtures("nothing_left")
MANY = 100


@pytest.fixture(scope="module")
def server() -> Iterator[pg_servers.Server]:
    with pg_servers.Server(max_connections=str(2 * MANY + 50)) as one:
        yield one


@pytest.fixture
def doms(server: pg_servers.Server, request: pytest.FixtureRequest) -> Iterator[Any]:
    url = server.url(request.node.name, by="socket", lease=5)
    with PostgresDomainList.create(url) as plain:
        for name in "abcd":
            plain.define(xml(name))
        yield aio.wrap(plain)


@pytest.fixture
def other(server: pg_servers.Server, doms: Any) -> Iterator[PostgresDomainList]:
    """The same list through other connections, as another host has it."""
    with PostgresDomainList.attach(doms._pool.address.url, host="other") as one:
        yield one


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """In a loop of its own. What hangs fails."""
    return asyncio.run(asyncio.wait_for(main, 3 * DEADLINE))


def taken(other: PostgresDomainList) -> list[str]:
    """What another host cannot have at once."""
    found = ["list"] * (not other.acquire(False))
    if other.is_locked:
        other.release()
    for info in other.snapshot():
        try:
            other.get(uuid=info.uuid, timeout=0).unlock()
        except LockTimeout:
            found.append(info.name)
        found += [f"job {job.operation}" for job in info.jobs]
    mutex = other.mutex("m")
    if mutex.try_lock():
        mutex.unlock()
    else:
        found.append("mutex")
    return found


def waits(server: pg_servers.Server) -> int:
    """How many sessions wait for a lock at the server."""
    sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    return int(server.psql(sql))


async def so(condition: Callable[[], object], what: str) -> None:
    """Until it is so; meanwhile the loop goes on."""
    await asyncio.to_thread(until, condition, what)


async def ended(task: asyncio.Task[Any]) -> Any:
    """What it raised, or its result; within a time that says that nothing keeps it."""
    await asyncio.wait([task], timeout=DEADLINE)
    assert task.done(), "it hangs"
    return task.exception() if not task.cancelled() else asyncio.CancelledError


def handle(doms: Any, name: str) -> Any:
    """Unlocked."""
    dom = doms.plain.get(name)
    dom.unlock()
    return dom


WAYS: dict[str, Callable[[Any], Any]] = {
    "get": lambda doms: doms.get("a"),
    "lookup": lambda doms: doms.lookup("a"),
    "handle": lambda doms: handle(doms, "a"),
    "locked": lambda doms: doms.locked(),
    "lock_many": lambda doms: doms.lock_many(["b", "a"]),
    "mutex": lambda doms: doms.mutex("m"),
    "job": lambda doms: doms.job("a", "backup"),
    "job of a handle": lambda doms: handle(doms, "a").job("backup"),
}


# --- they exclude each other ------------------------------------------------------------------


@pytest.mark.parametrize("what", WAYS)
def test_two_tasks_exclude_each_other_and_the_loop_goes_on(
    doms: Any, other: PostgresDomainList, what: str
) -> None:
    async def main() -> None:
        leave, inside, log = asyncio.Event(), asyncio.Event(), list[str]()
        first, second = WAYS[what](doms), WAYS[what](doms)

        async def one() -> None:
            async with first:
                inside.set()
                await leave.wait()
                log.append("first")

        async def two() -> None:
            await inside.wait()
            async with second:
                log.append("second")

        tasks = [asyncio.create_task(one()), asyncio.create_task(two())]
        await inside.wait()
        assert await asyncio.to_thread(taken, other)
        for _ in range(10):
            await asyncio.sleep(0.01)
        assert not log
        leave.set()
        await asyncio.gather(*tasks)
        assert log == ["first", "second"]

    run(main())
    assert taken(other) == []


def test_the_rules_hold_per_task(doms: Any) -> None:
    async def main() -> None:
        async with doms.get("a") as dom:
            with pytest.raises(AlreadyLocked):
                await doms.get("a")
            with pytest.raises(LockOrder):
                await doms.get("b")
            async with dom:
                dom.autostart = True
            assert dom.is_locked

            async def stranger() -> None:
                assert not dom.is_locked
                with pytest.raises(NotOwner):
                    dom.unlock()
                with pytest.raises(LockTimeout, match="held by"):
                    await doms.get("a", timeout=0)
                async with doms.get("b"):
                    pass

            await asyncio.create_task(stranger())
            assert not (await doms.peek("a")).autostart
            await aio.call(dom.commit)
            assert (await doms.peek("a")).autostart

    run(main())


def test_what_a_task_reads_of_its_domain_takes_no_round_trip(
    doms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, here = sessions.Session.call, threading.get_ident()

    def hooked(self: sessions.Session, *args: Any, **more: Any) -> Any:
        assert threading.get_ident() != here
        return call(self, *args, **more)

    async def main() -> None:
        doms._store._source.definitions.__init__()
        monkeypatch.setattr(sessions.Session, "call", hooked)
        async with doms.get("a") as dom:
            assert dom.definition.name == dom.name == "a"
            dom.autostart = True
        async with dom:
            assert dom.autostart
            assert dom.next_definition is None
        async with doms.lock_many(["a", "b"]) as held:
            assert [dom.definition.name for dom in held] == ["a", "b"]

    run(main())


def test_a_plain_wait_for_another_task_is_refused(doms: Any) -> None:
    """It would stop the thread for ever."""

    async def main() -> None:
        async with doms.mutex("m"), doms.locked():
            a = await doms.find_by_name("a")

            async def stranger() -> None:
                for wait in (
                    lambda: doms.plain.get("a"),
                    lambda: doms.plain.get("a", timeout=DEADLINE),
                    doms.plain.lock,
                    doms.plain.mutex("m").lock,
                ):
                    with pytest.raises(AlreadyLocked, match="wait with shmdomains"):
                        wait()
                with pytest.raises(LockTimeout):
                    doms.plain.get("a", timeout=0)
                doms.plain.get("b", timeout=DEADLINE).unlock()

            await asyncio.create_task(stranger())
            await aio.call(a.unlock)

    run(main())


def test_a_hundred_tasks_with_a_hundred_sessions(doms: Any, server: pg_servers.Server) -> None:
    """Each holds a domain of its own, all at once; then all of them want the same one."""
    for number in range(MANY):
        doms.plain.define(xml(f"vm{number}"))
    here = (
        "SELECT count(*), count(DISTINCT pid) FROM pg_locks "
        "WHERE locktype = 'advisory' AND (classid::bigint >> 16) - 23808 = 1"
    )

    async def main() -> None:
        all_hold, leave, count = asyncio.Event(), asyncio.Event(), 0

        async def task(number: int) -> None:
            nonlocal count
            async with doms.get(f"vm{number}", timeout=DEADLINE) as dom:
                count += 1
                if count == MANY:
                    all_hold.set()
                await leave.wait()
                dom.data = {"by": number}
            async with doms.get("a", timeout=DEADLINE) as dom:
                before = dom.data or 0
                await asyncio.sleep(0)
                dom.data = before + 1

        tasks = [asyncio.create_task(task(number)) for number in range(MANY)]
        await all_hold.wait()
        assert await asyncio.to_thread(server.psql, here) == f"{MANY}|{MANY}"
        leave.set()
        await asyncio.gather(*tasks)

    run(main())
    assert doms.plain.peek("a").data == MANY
    for number in range(MANY):
        assert doms.plain.peek(f"vm{number}").data == {"by": number}


# --- waits that end early ---------------------------------------------------------------------


@pytest.mark.parametrize("what", [one for one in WAYS if "job" not in one])
def test_a_cancelled_wait_ends_at_the_server(
    doms: Any, other: PostgresDomainList, server: pg_servers.Server, what: str
) -> None:
    """And the next one gets it."""

    async def main() -> None:
        leave, log = asyncio.Event(), list[str]()
        ways = {name: WAYS[what](doms) for name in ("first", "second", "third")}

        async def task(name: str) -> None:
            async with ways[name]:
                log.append(name)
                await leave.wait()

        first = asyncio.create_task(task("first"))
        await so(lambda: log, "the first has it")
        second, third = asyncio.create_task(task("second")), asyncio.create_task(task("third"))
        await so(lambda: waits(server) == 2, "both wait")
        second.cancel()
        assert await ended(second) is asyncio.CancelledError
        await so(lambda: waits(server) == 1, "the third waits, nobody else")
        assert log == ["first"]
        leave.set()
        await asyncio.gather(first, third)
        assert log == ["first", "third"]

    run(main())
    assert taken(other) == []


@pytest.mark.parametrize("what", WAYS)
def test_cancelled_when_it_has_just_got_it(
    doms: Any, other: PostgresDomainList, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's answer is there, and the task does not know yet."""
    got, go_on = threading.Event(), threading.Event()
    call = sessions.Session.call
    locks = (ask.LOCK, ask.LOCK_LIST, ask.LOCK_MUTEX)

    def hooked(self: sessions.Session, what: Any, *args: Any, **more: Any) -> Any:
        rows = call(self, what, *args, **more)
        if what in locks and self in doms._pool._all and not got.is_set():
            got.set()
            assert go_on.wait(DEADLINE)
        return rows

    async def main() -> None:
        way = WAYS[what](doms)
        monkeypatch.setattr(sessions.Session, "call", hooked)

        async def task() -> None:
            async with way:
                raise AssertionError("it was cancelled")

        one = asyncio.create_task(task())
        await so(got.is_set, "the lock")
        one.cancel()
        await asyncio.sleep(0)
        go_on.set()
        assert await ended(one) is asyncio.CancelledError
        assert await asyncio.to_thread(taken, other) == []

    run(main())


def test_cancelled_inside_and_at_the_end(
    doms: Any, other: PostgresDomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside: rolled back. While it commits and unlocks: that is done."""
    at_the_end, go_on = threading.Event(), threading.Event()
    call = sessions.Session.call

    def hooked(self: sessions.Session, what: Any, *args: Any, **more: Any) -> Any:
        if what is ask.COMMIT and self in doms._pool._all:
            at_the_end.set()
            assert go_on.wait(DEADLINE)
        return call(self, what, *args, **more)

    async def main() -> None:
        entered = asyncio.Event()

        async def task(stays: bool) -> None:
            async with doms.get("a") as dom:
                dom.autostart = True
                entered.set()
                if stays:
                    await asyncio.Event().wait()

        inside = asyncio.create_task(task(True))
        await entered.wait()
        inside.cancel()
        assert await ended(inside) is asyncio.CancelledError
        assert taken(other) == []
        assert not other.peek("a").autostart

        monkeypatch.setattr(sessions.Session, "call", hooked)
        at_end = asyncio.create_task(task(False))
        await so(at_the_end.is_set, "the commit")
        at_end.cancel()
        await asyncio.sleep(0)
        assert not at_end.done()
        go_on.set()
        assert await ended(at_end) is asyncio.CancelledError
        assert taken(other) == []
        assert other.peek("a").autostart

    run(main())


def test_a_timeout_of_asyncio(doms: Any, other: PostgresDomainList) -> None:
    async def main() -> None:
        with other.get("a"):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(doms.get("a"), 0.2)
            with pytest.raises(LockTimeout, match="held by"):
                await doms.get("a", timeout=0.01)
        async with doms.get("a", timeout=DEADLINE):
            pass

    run(main())
    assert taken(other) == []


# --- a server that does not answer ------------------------------------------------------------


CALLS: dict[str, Callable[[Any], Any]] = {
    **{name: WAYS[name] for name in ("get", "locked", "lock_many", "mutex", "job")},
    "peek": lambda doms: doms.peek("a"),
    "list": lambda doms: doms.list(),
    "info": lambda doms: doms.info,
    "define": lambda doms: doms.define(xml("e")),
    "wait": lambda doms: doms.wait("a", until=bool, timeout=1),
    "watch": lambda doms: doms.watch(since=0).__anext__(),
    "end": None,  # type: ignore[dict-item]
}


@pytest.mark.parametrize("what", CALLS)
def test_the_loop_goes_on_while_the_server_is_frozen(
    doms: Any, server: pg_servers.Server, what: str
) -> None:
    async def main() -> None:
        frozen = False

        async def use() -> None:
            way = CALLS[what](doms)
            if what in WAYS:
                async with way:
                    pass
            else:
                await way

        async def end() -> None:
            async with doms.get("a") as dom:
                dom.autostart = True
                await so(lambda: frozen, "a frozen server")

        await doms.peek("a")  # there is a session
        if what == "end":
            one = asyncio.create_task(end())
            await so(lambda: doms._pool.states, "it holds it")
        server.freeze()
        frozen = True
        try:
            if what != "end":
                one = asyncio.create_task(use())
            for _ in range(50):
                await asyncio.sleep(0.005)
            assert not one.done()
        finally:
            server.thaw()
        await one

    run(main())


# --- tasks that end ---------------------------------------------------------------------------


def test_a_task_that_ends_while_it_holds(doms: Any, other: PostgresDomainList) -> None:
    """It is rolled back and all is freed, and nobody is said to have died."""

    async def main() -> None:
        async def task() -> None:
            await doms.mutex("m")
            mutex = doms.plain.mutex("m")
            await aio.call(mutex.lock)
            kept.append(mutex)
            await aio.call(doms.plain.lock)
            for name in "ab":
                dom = await doms.find_by_name(name)
                dom.autostart = True
                kept.append(dom)

        kept: list[Any] = []
        await asyncio.create_task(task())
        await so(lambda: taken(other) == [], "all is free")
        with other.get("a") as dom:
            assert not dom.autostart
            assert dom.previous_owner_died is None
        assert not kept[1].is_locked
        async with doms.get("b"):
            pass

    with pytest.warns(ResourceWarning, match="a task ended while it held locks"):
        run(main())


def test_a_task_that_ends_with_a_job(doms: Any, other: PostgresDomainList) -> None:
    async def main() -> None:
        async def task() -> None:
            kept.append(doms.plain.job("a", "backup"))
            await kept[0].__aenter__()

        kept: list[Any] = []
        await asyncio.create_task(task())
        await so(lambda: taken(other) == [], "the job is over")

    with pytest.warns(ResourceWarning, match="job 'backup' was dropped"):
        run(main())


def test_a_loop_that_ends_without_a_word(doms: Any, other: PostgresDomainList) -> None:
    async def hold() -> None:
        async with doms.get("a") as dom, doms.mutex("m"):
            dom.autostart = True
            raise AssertionError

    async def main() -> None:
        async with doms.mutex("m"), doms.get("a") as dom:
            dom.autostart = True
            entered.append(1)
            await asyncio.Event().wait()

    entered: list[int] = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(main())
    while not entered:
        loop.run_until_complete(asyncio.sleep(0.001))
    assert {*taken(other)} == {"a", "mutex"}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loop.close()
        gc.collect()
        until(lambda: taken(other) == [], "all is free")
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        del task, loop
        gc.collect()
    assert any("a task ended while it held locks" in str(one.message) for one in told)
    assert not other.peek("a").autostart


def test_the_session_of_a_task_ends(
    doms: Any, other: PostgresDomainList, server: pg_servers.Server
) -> None:
    """What it held is lost, and it is told; the other tasks go on."""

    async def main() -> None:
        with pytest.raises(LockLost):
            async with doms.get("a") as dom:
                dom.autostart = True
                backend = dom._list._mine.session.conn.info.backend_pid
                async with doms.get("b", timeout=0):
                    pass
                await asyncio.to_thread(server.psql, f"SELECT pg_terminate_backend({backend})")
                other.get("a", timeout=DEADLINE).unlock()
        async with doms.get("a") as dom:
            assert not dom.autostart

    run(main())


# --- sleeping ---------------------------------------------------------------------------------


def test_who_sleeps_takes_no_thread_and_misses_nothing(
    doms: Any, other: PostgresDomainList
) -> None:
    async def main() -> None:
        watch = await doms.watch()
        sleepers = [
            asyncio.create_task(doms.wait("a", until=lambda info: info.autostart, timeout=DEADLINE))
            for _ in range(3 * MANY)
        ]
        some = asyncio.create_task(
            doms.wait_any(until=lambda info: info.name == "a" and info.autostart, timeout=DEADLINE)
        )
        await so(lambda: len(doms._pool.listener._sleepers) == 3 * MANY + 1, "all sleep")
        assert threading.active_count() < 2 * MANY  # those that looked
        with other.get("a") as dom:
            dom.autostart = True
            dom.activate()
        for one in await asyncio.gather(*sleepers, some):
            assert one.autostart
        assert (await watch.__anext__()).name == "a"
        assert not doms._pool.listener._sleepers

    run(main())


def test_wait_until(doms: Any, other: PostgresDomainList) -> None:
    """With the domain locked; in between it is free."""

    async def main() -> None:
        async with doms.get("a") as dom:
            asked: list[Any] = []

            def is_up(dom: Any) -> bool:
                asked.append(threading.get_ident())
                return bool(dom.data == "up")

            def answer() -> None:
                with other.get("a", timeout=DEADLINE) as dom:
                    dom.data = "up"

            answering = asyncio.get_running_loop().run_in_executor(None, answer)
            await aio.wait_until(dom, is_up, timeout=DEADLINE)
            await answering
            assert dom.is_locked
            assert {*asked} == {threading.get_ident()}
            dom.autostart = True
        assert other.peek("a").autostart

    run(main())


def test_a_cancelled_watch_goes_on_where_it_was(
    doms: Any, other: PostgresDomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        watch = await doms.watch()
        asleep = asyncio.create_task(watch.__anext__())
        await so(lambda: doms._pool.listener._sleepers, "it sleeps")
        asleep.cancel()
        assert await ended(asleep) is asyncio.CancelledError
        with other.get("a") as dom:
            dom.activate()
        taking, go_on = threading.Event(), threading.Event()
        take = watch._watch._take

        def slow() -> Any:
            event = take()
            taking.set()
            assert go_on.wait(DEADLINE)
            return event

        watch._watch._take = slow
        lost = asyncio.create_task(watch.__anext__())
        await so(taking.is_set, "an event")
        lost.cancel()
        await asyncio.sleep(0)
        go_on.set()
        assert await ended(lost) is asyncio.CancelledError
        assert (await watch.__anext__()).words == "Started Booted"

    run(main())


def test_closed_while_tasks_wait(doms: Any) -> None:
    async def main() -> None:
        sleeper = asyncio.create_task(doms.wait("a", timeout=DEADLINE))
        await so(lambda: doms._pool.listener._sleepers, "it sleeps")
        with suppress(RuntimeError):
            doms.close()
        assert type(await ended(sleeper)).__name__ == "ListClosed"

    run(main())
