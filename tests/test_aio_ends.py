"""Tasks, waits, loops and processes that end: what they leave.

What is said to be free is free for another process, too.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from killing import DEADLINE, Pipe, until, xml
from tasks import (
    LOCKS,
    LONG,
    NAMES,
    Doms,
    Start,
    ended,
    enter,
    handle,
    hold,
    new_list,
    queued,
    run,
    say_what_is_taken,
    taken,
)

from shmdomains import (
    Domain,
    DomainList,
    ListClosed,
    aio,
)
from shmdomains.memory.rooms import SLICE

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def doms(path: str) -> Iterator[Doms]:
    with new_list(path) as doms:
        yield doms


# --- a wait that ends early -------------------------------------------------------------------


@pytest.mark.parametrize("what", [one for one in LOCKS if "job" not in one])
def test_cancelled_while_it_waits(doms: Doms, what: str, start: Start, path: str) -> None:
    """It holds nothing, and the next one gets it."""

    async def main() -> None:
        leave, log = asyncio.Event(), list[str]()
        ways = {name: LOCKS[what](doms) for name in ("first", "second", "third")}

        async def task(name: str) -> None:
            async with ways[name]:
                log.append(name)
                await leave.wait()

        first = asyncio.create_task(task("first"))
        while not log:
            await asyncio.sleep(0)
        second, third = asyncio.create_task(task("second")), asyncio.create_task(task("third"))
        await queued(2)
        second.cancel()
        assert await ended(second) is asyncio.CancelledError
        assert log == ["first"]
        leave.set()
        await asyncio.gather(first, third)
        assert log == ["first", "third"]
        assert await asyncio.to_thread(start(say_what_is_taken, path).ask) == []

    run(main())


@pytest.mark.parametrize("what", ["get", "locked", "mutex", "lock_many"])
def test_cancelled_at_the_moment_it_is_woken(doms: Doms, what: str) -> None:
    """The lock is free, and it was told so: the one behind it must not be forgotten."""

    async def main() -> None:
        log = list[str]()

        async def task(name: str) -> None:
            async with LOCKS[what](doms):
                log.append(name)

        leave = asyncio.Event()

        async def first_one() -> None:
            async with LOCKS[what](doms):
                log.append("first")
                await leave.wait()
            second.cancel()  # its lock was freed just now, and it did not run yet

        first = asyncio.create_task(first_one())
        while not log:
            await asyncio.sleep(0)
        second, third = asyncio.create_task(task("second")), asyncio.create_task(task("third"))
        await queued(2)
        before = time.monotonic()
        leave.set()
        assert await ended(second) is asyncio.CancelledError
        await asyncio.gather(first, third)
        assert log == ["first", "third"]
        assert time.monotonic() - before < SLICE, "it was forgotten for a slice"

    run(main())


def test_cancelled_when_another_process_frees_it(doms: Doms, start: Start, path: str) -> None:
    holder = start(hold, path, "a")
    assert holder.hear() == "held"

    async def main() -> None:
        log = list[str]()
        second, third = (asyncio.create_task(enter(doms, "a", log)) for _ in range(2))
        await queued(2)
        assert holder.ask("x") == "free"  # the loop stands still meanwhile
        second.cancel()
        assert await ended(second) is asyncio.CancelledError
        await third
        assert log == ["in a", "out a"]

    run(main())


def test_asyncio_timeout(doms: Doms) -> None:
    async def main() -> None:
        async with doms.get("a"):

            async def other() -> None:
                with pytest.raises(TimeoutError):
                    if sys.version_info >= (3, 11):
                        async with asyncio.timeout(0.02), doms.get("a"):
                            pass
                    else:
                        try:
                            await asyncio.wait_for(enter(doms, "a", []), 0.02)
                        except asyncio.TimeoutError as exc:
                            raise TimeoutError from exc

            await asyncio.create_task(other())
            await queued(0)
        await enter(doms, "a", [])

    run(main())


def test_failed_or_cancelled_inside(doms: Doms, start: Start, path: str) -> None:
    """Rolled back, and unlocked: seen by another process."""
    looker = start(say_what_is_taken, path)

    async def main() -> None:
        entered = asyncio.Event()

        async def inside(way: Any, fail: bool) -> None:
            async with way as dom:
                dom.data = "not this"
                entered.set()
                if fail:
                    raise ZeroDivisionError
                await asyncio.sleep(LONG)

        for way in (lambda: doms.get("a"), lambda: handle(doms, "a")):
            for fail in (True, False):
                entered.clear()
                task = asyncio.create_task(inside(way(), fail))
                await entered.wait()
                task.cancel()
                await asyncio.wait([task])
                assert looker.ask() == []
                assert doms.peek("a").data is None

        async def many() -> None:
            async with doms.locked(), doms.lock_many(["a", "b"]) as both:
                for dom in both:
                    dom.data = "not this"
                entered.set()
                await asyncio.sleep(LONG)

        entered.clear()
        task = asyncio.create_task(many())
        await entered.wait()
        assert sorted(looker.ask()) == ["a", "b", "list"]
        task.cancel()
        await asyncio.wait([task])
        assert looker.ask() == []
        assert [doms.peek(name).data for name in "ab"] == [None, None]

    run(main())


def test_a_task_that_ends_while_it_holds(doms: Doms, start: Start, path: str) -> None:
    looker = start(say_what_is_taken, path)
    kept: list[Any] = []

    async def main() -> None:
        async def careless() -> None:
            mutex = doms.plain.mutex("m")
            mutex.lock()
            dom = await doms.get("a")
            dom.data = "not this"
            kept.extend([dom, mutex])  # so that nothing is unlocked because it is dropped

        async def careless_with_the_list() -> None:
            doms.plain.lock()

        for task in (careless, careless_with_the_list):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                await asyncio.create_task(task())
                await asyncio.sleep(0)
            assert {one.category for one in told} == {ResourceWarning}
            assert looker.ask() == []
        assert not kept[0].is_locked and not kept[1].is_locked
        assert doms.peek("a").data is None
        await enter(doms, "a", [])

    run(main())


def test_who_waits_for_a_task_that_ends_while_it_holds(doms: Doms) -> None:
    async def main() -> None:
        kept, log = list[Domain](), list[str]()

        async def careless() -> None:
            kept.append(await doms.get("a"))
            await queued(1)

        task = asyncio.create_task(careless())
        while not kept:
            await asyncio.sleep(0)
        await asyncio.gather(task, enter(doms, "a", log))
        assert log == ["in a", "out a"]

    with pytest.warns(ResourceWarning):
        run(main())


# --- a loop that is closed --------------------------------------------------------------------


async def hold_all(doms: Doms, entered: list[str]) -> list[asyncio.Task[Any]]:
    """Tasks that hold a domain, the list lock, a named lock and a job each, and one that waits."""

    async def keep(block: Any, name: str) -> None:
        async with block:
            entered.append(name)
            await asyncio.sleep(LONG)

    blocks: dict[str, Any] = {
        "a": doms.get("a"),
        "list": doms.locked(),
        "mutex": doms.mutex("m"),
        "job backup": doms.job("b", "backup"),
    }
    tasks = [asyncio.create_task(keep(block, name)) for name, block in blocks.items()]
    while len(entered) < len(blocks):
        await asyncio.sleep(0)
    return tasks


def test_asyncio_run_cancels(doms: Doms, start: Start, path: str) -> None:
    looker, entered = start(say_what_is_taken, path), list[str]()

    async def main() -> None:
        tasks = await hold_all(doms, entered)
        tasks.append(asyncio.create_task(enter(doms, "a", entered)))
        await queued(1)
        assert sorted(looker.ask()) == sorted(entered)
        kept.extend(tasks)

    kept: list[Any] = []
    asyncio.run(main())
    assert looker.ask() == []
    assert len(entered) == 4


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("who", "how"),
    [("one waits", "closed"), ("one waits", "dropped"), ("nobody waits", "dropped")],
)
def test_a_loop_that_ends_without_a_word(
    doms: Doms, start: Start, path: str, how: str, who: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The tasks are never run again. Whoever keeps them keeps nothing locked."""
    caplog.set_level(logging.CRITICAL, "asyncio")  # it complains of pending tasks
    looker, entered = start(say_what_is_taken, path), list[str]()
    kept: list[Any] = []

    def life() -> None:
        loop = asyncio.new_event_loop()
        tasks = loop.run_until_complete(hold_all(doms, entered))
        if who == "one waits":
            tasks.append(loop.create_task(enter(doms, "a", entered)))
            loop.run_until_complete(queued(1))
        assert sorted(looker.ask()) == sorted(entered)
        if how == "closed":
            kept.extend(tasks)
            loop.close()

    life()
    gc.collect()
    until(lambda: looker.ask() == [], "everything is free")
    assert len(entered) == 4
    kept.clear()
    gc.collect()
    assert looker.ask() == []


def test_a_thread_that_ends_takes_its_loop_with_it(doms: Doms) -> None:
    """Neither descriptors nor locks are left of threads that each ran a loop."""

    async def main() -> None:
        log = list[str]()
        await asyncio.gather(*(enter(doms, "a", log) for _ in range(3)))
        assert len(log) == 6

    def life() -> None:
        thread = threading.Thread(target=run, args=(main(),))
        thread.start()
        thread.join()

    life()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        life()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_loops_that_take_turns_in_a_thread(doms: Doms, start: Start, path: str) -> None:
    """Whoever waits in one goes on waiting while the other runs."""
    holder = start(hold, path, "a")
    assert holder.hear() == "held"
    one, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    log = list[str]()
    task = one.create_task(enter(doms, "a", log))
    one.run_until_complete(queued(1))

    async def crowd() -> None:
        await asyncio.gather(*(enter(doms, "b", []) for _ in range(3)))

    other.run_until_complete(crowd())
    assert holder.ask("x") == "free"
    one.run_until_complete(asyncio.wait_for(task, DEADLINE))
    assert log == ["in a", "out a"]
    one.run_until_complete(crowd())
    other.run_until_complete(crowd())
    other.close()
    one.close()


def test_a_list_that_is_closed_while_tasks_wait(
    doms: Doms, start: Start, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    holder = start(hold, path, "a")
    assert holder.hear() == "held"

    async def main() -> None:
        waits: list[Coroutine[Any, Any, Any]] = [
            enter(doms, "a", []),
            enter(doms, "a", []),
            doms.wait("b"),
            doms.wait_any(until=lambda info: False),
            anext_of(doms.watch()),
        ]
        tasks = [asyncio.create_task(one) for one in waits]
        await queued(5)
        doms.plain.close()
        for task in tasks:
            assert isinstance(await ended(task), ListClosed)
        with pytest.raises(ListClosed):
            await doms.get("a")

    run(main())
    assert [record for record in caplog.records if record.name == "asyncio"] == []


async def anext_of(watch: aio.AsyncWatch) -> Any:
    return await watch.__anext__()


# --- slices: what nobody tells of -------------------------------------------------------------


def test_after_each_slice_everybody_is_looked_after(start: Start) -> None:
    """Of semaphores nobody tells when they are free, so those who wait look after slices. However
    many locks are waited for, each has its turn."""
    with DomainList(max_domains=64, lock="multiprocessing") as plain:
        for number in range(40):
            plain.define(xml(f"d{number}"))
        doms = aio.wrap(plain)
        leave = [threading.Event() for _ in range(40)]
        there = threading.Event()

        def keep() -> None:
            with plain.lock_many([f"d{number}" for number in range(40)]) as many:
                there.set()
                for number in reversed(range(40)):
                    leave[number].wait()
                    many[number].unlock()

        thread = threading.Thread(target=keep)
        thread.start()
        there.wait()

        async def main() -> None:
            tasks = [asyncio.create_task(enter(doms, f"d{number}", [])) for number in range(40)]
            await queued(40)
            try:
                for number in reversed(range(40)):  # all others stay locked meanwhile
                    leave[number].set()
                    await asyncio.wait_for(asyncio.shield(tasks[number]), DEADLINE)
            finally:
                for event in leave:
                    event.set()

        run(main())
        thread.join()


@pytest.mark.parametrize("what", ["get", "locked", "mutex"])
def test_a_holder_elsewhere_dies_while_tasks_wait(
    doms: Doms, start: Start, path: str, what: str
) -> None:
    holder = start(hold_by, path, what)
    assert holder.hear() == "held"

    async def main() -> list[bool]:
        died = list[bool]()

        async def task() -> None:
            async with LOCKS[what](doms) as held:
                if what != "locked":
                    died.append(held.previous_owner_died is not None)
                if what == "get":
                    assert held.data is None
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(task()) for _ in range(3)]
        await queued(3)
        holder.kill()
        await asyncio.gather(*tasks)
        return died

    assert run(main()) == ([] if what == "locked" else [True, False, False])


def hold_by(pipe: Pipe, path: str, what: str) -> None:
    doms = DomainList.attach(path=path)
    plain: dict[str, Callable[[], Any]] = {
        "get": lambda: doms.get("a"),
        "locked": doms.lock,
        "mutex": doms.mutex("m").lock,
    }
    got = plain[what]()
    if what == "get":
        got.data = "not this"
    pipe.say("held")
    pipe.rest()


def hold_in_tasks(pipe: Pipe, path: str) -> None:
    doms = aio.wrap(DomainList.attach(path=path))

    async def keep(block: Any, name: str) -> None:
        async with block as held:
            if name in NAMES:
                held.data = "not this"
            pipe.say(name)
            await asyncio.sleep(LONG)

    async def main() -> None:
        await asyncio.gather(
            *(keep(doms.get(name), name) for name in "ab"),
            keep(doms.mutex("m"), "m"),
            keep(doms.locked(), "list"),
            enter(doms, "a", []),
        )

    asyncio.run(main())


def test_a_process_is_killed_with_tasks_inside(doms: Doms, start: Start, path: str) -> None:
    victim = start(hold_in_tasks, path)
    assert [victim.hear() for _ in range(4)] == ["a", "b", "m", "list"]
    looker = start(say_what_is_taken, path)
    assert looker.ask() == ["list", "a", "b", "mutex"]
    victim.kill()
    for name in "ab":
        with doms.plain.get(name, timeout=DEADLINE) as dom:
            died = dom.previous_owner_died
            assert died is not None and died.pid == victim.pid and not died.alive
            assert dom.data is None
    with doms.plain.mutex("m", timeout=DEADLINE) as mutex:
        assert mutex.previous_owner_died is not None
        assert mutex.previous_owner_died.pid == victim.pid
    with doms.plain.locked(DEADLINE):
        pass
    assert looker.ask() == []


def test_fork_in_a_task(doms: Doms, start: Start, path: str) -> None:
    """The child owns nothing of what the task holds; the parent goes on."""
    parent = start(fork_in_a_task, path)
    told = parent.hear()
    assert told == {
        "domain": "DomainNotLocked",
        "list": "ListNotLocked",
        "mutex": "MutexNotLocked",
        "job": "NotOwner",
        "free": ["list", "a", "job backup", "mutex"],
    }
    assert parent.hear() == 4
    assert parent.hear() == []
    assert doms.peek("a").data == 4


def fork_in_a_task(pipe: Pipe, path: str) -> None:
    doms = aio.wrap(DomainList.attach(path=path))

    def error(call: Callable[[], object]) -> str:
        try:
            call()
        except Exception as exc:
            return type(exc).__name__
        return "none"

    async def main() -> None:
        async with doms.mutex("m") as mutex, doms.job("b", "backup") as job, doms.locked():
            dom = await doms.find_by_name("a")
            assert dom is not None
            async with dom:
                dom.data = 3
                waiting = asyncio.create_task(enter(doms, "a", []))
                await queued(1)
                child = os.fork()
                if not child:
                    told: dict[str, Any] = {
                        "domain": error(dom.commit),
                        "list": error(doms.plain.unlock),
                        "mutex": error(mutex.unlock),
                        "job": error(lambda: job.progress(1)),
                        "free": taken(doms.plain),
                    }
                    pipe.say(told)
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
                assert dom.data == 3 and dom.is_locked and mutex.is_locked and doms.is_locked
                job.progress(1)
                dom.data = 4
            await waiting
        pipe.say(doms.peek("a").data)
        pipe.say(taken(doms.plain))

    asyncio.run(main())
