"""`shmdomains.aio`: who excludes whom, what a wait that ends early leaves, and what errors say.

The tasks of a test run in one event loop. Who else is needed is another process, so that what is
said to be free is free for everybody. Many tasks and kills at random stand in test_aio_storms.py.
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
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from killing import DEADLINE, Child, Pipe, until, xml

from shmdomains import (
    AlreadyLocked,
    Domain,
    DomainDef,
    DomainList,
    DomainNotFound,
    DomainNotLocked,
    DomainRemoved,
    Job,
    JobTimeout,
    ListClosed,
    ListNotLocked,
    LockOrder,
    LockTimeout,
    MutexNotLocked,
    NotOwner,
    TooManyLocks,
    UncommittedChanges,
    WaitTimeout,
    aio,
)
from shmdomains.memory.rooms import SLICE, hub_here

pytestmark = pytest.mark.usefixtures("nothing_left")

Start = Callable[..., Child]
Doms = aio.AsyncDomainList
NAMES = "abcd"
LONG = 1000.0  # seconds; nobody waits that long


@pytest.fixture
def doms(path: str) -> Iterator[Doms]:
    """With the domains a to d. At the end everything is free, and sound."""
    with DomainList.create(path=path, max_domains=64) as plain:
        for name in NAMES:
            plain.define(xml(name))
        yield aio.wrap(plain)
        if not plain.closed:
            assert taken(plain) == []
            assert plain.check().problems == []


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """In a loop of its own. What hangs fails."""
    return asyncio.run(asyncio.wait_for(main, 3 * DEADLINE))


def taken(plain: DomainList) -> list[str]:
    """What the caller cannot have at once."""
    found = []
    if plain.acquire(False):
        plain.release()
    else:
        found.append("list")
    for info in plain.snapshot():
        try:
            plain.get(uuid=info.uuid, timeout=0).unlock()
        except LockTimeout:
            found.append(info.name)
        found += [f"job {job.operation}" for job in info.jobs]
    mutex = plain.mutex("m")
    if mutex.try_lock():
        mutex.unlock()
    else:
        found.append("mutex")
    return found


def say_what_is_taken(pipe: Pipe, path: str) -> None:
    doms = DomainList.attach(path=path)
    while True:
        pipe.listen()
        pipe.say(taken(doms))


def hold(pipe: Pipe, path: str, name: str) -> None:
    """Hold a domain, change it and leave it, as told."""
    doms = DomainList.attach(path=path)
    while True:
        with doms.get(name) as dom:
            pipe.say("held")
            dom.data = pipe.listen()
        pipe.say("free")
        pipe.listen()


async def queued(number: int) -> None:
    """Until so many tasks of this loop stand in a queue or sleep until something changes."""
    end = time.monotonic() + DEADLINE
    while True:
        hub = hub_here()
        turns = [] if hub is None else [turn for room in hub.rooms.values() for turn in room.turns]
        if hub is not None and len(turns) + len(hub._sleeps) == number:
            return
        assert time.monotonic() < end, f"{len(turns)} tasks wait, not {number}"
        await asyncio.sleep(0)


async def enter(doms: Doms, name: str, log: list[str], leave: asyncio.Event | None = None) -> None:
    async with doms.get(name) as dom:
        log.append(f"in {dom.name}")
        if leave is not None:
            await leave.wait()
    log.append(f"out {name}")


async def ended(task: asyncio.Task[Any]) -> Any:
    """What it raised, or its result; within a time that says that nothing keeps it."""
    await asyncio.wait([task], timeout=DEADLINE)
    assert task.done(), "it hangs"
    return task.exception() if not task.cancelled() else asyncio.CancelledError


# --- two tasks of one thread ------------------------------------------------------------------


LOCKS: dict[str, Callable[[Doms], Any]] = {
    "get": lambda doms: doms.get("a"),
    "lookup": lambda doms: doms.lookup("a"),
    "handle": lambda doms: next(dom for dom in doms.plain._handles() if dom.name == "a"),
    "locked": lambda doms: doms.locked(),
    "lock_many": lambda doms: doms.lock_many(["b", "a"]),
    "mutex": lambda doms: doms.mutex("m"),
    "job": lambda doms: doms.job("a", "backup"),
    "key of a job": lambda doms: doms.plain.job("a", "backup"),
}


def handle(doms: Doms, name: str) -> Domain:
    """Unlocked."""
    dom = doms.plain.get(name)
    dom.unlock()
    return dom


LOCKS["handle"] = lambda doms: handle(doms, "a")


@pytest.mark.parametrize("what", LOCKS)
def test_two_tasks_exclude_each_other_and_the_loop_goes_on(doms: Doms, what: str) -> None:
    async def main() -> None:
        inside = ticks = 0
        ways = [LOCKS[what](doms) for _ in range(3)]

        async def task(way: Any) -> None:
            nonlocal inside
            async with way:
                inside += 1
                assert inside == 1
                before = ticks
                while ticks < before + 5:
                    await asyncio.sleep(0.001)
                assert inside == 1
                inside -= 1

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.ensure_future(tick())
        await asyncio.gather(*map(task, ways))
        ticking.cancel()

    run(main())


@pytest.mark.parametrize("what", ["get", "locked", "mutex"])
def test_they_get_it_in_the_order_in_which_they_came(doms: Doms, what: str) -> None:
    async def main() -> None:
        order: list[int] = []

        async def task(number: int) -> None:
            async with LOCKS[what](doms):
                await asyncio.sleep(0)
                order.append(number)

        await asyncio.gather(*map(task, range(20)))
        assert order == list(range(20))

    run(main())


def test_two_domains_at_once(doms: Doms) -> None:
    """The tasks of a thread hold different domains at the same time: no `LockOrder`."""

    async def main() -> None:
        together = set[str]()
        full = asyncio.Event()

        async def task(name: str) -> None:
            async with doms.get(name) as dom:
                together.add(dom.name)
                if len(together) == len(NAMES):
                    full.set()
                await full.wait()

        await asyncio.gather(*map(task, NAMES))

    run(main())


def test_an_increment_across_awaits_is_never_lost(doms: Doms) -> None:
    async def main() -> None:
        async def add() -> None:
            for _ in range(10):
                async with doms.get("a") as dom:
                    before = dom.data or 0
                    await asyncio.sleep(0)
                    dom.data = before + 1

        await asyncio.gather(*(add() for _ in range(20)))

    run(main())
    assert doms.peek("a").data == 200


def test_awaited_without_a_block(doms: Doms) -> None:
    async def main() -> None:
        dom = await doms.get("a")
        assert dom.is_locked and isinstance(dom, Domain)
        dom.data = 1
        dom.unlock()
        assert await doms.lookup("nobody") is None
        async with doms.lookup("nobody") as none:
            assert none is None
        with pytest.raises(DomainNotFound):
            await doms.get("nobody")
        async with dom as same:
            assert same is dom and dom.data == 1

    run(main())


def test_blocks_within_blocks(doms: Doms) -> None:
    """Only the end of the outer block unlocks; an exception rolls back what there is until then."""

    async def main() -> None:
        async with doms.get("a") as dom:
            async with dom:
                dom.pid = 1
                async with dom:
                    await asyncio.sleep(0)
                assert dom.is_locked
            assert dom.is_locked
            dom.data = 1
        assert not dom.is_locked
        with pytest.raises(ZeroDivisionError):
            async with dom, dom:
                dom.data = 2
                raise ZeroDivisionError
        assert not dom.is_locked

    run(main())
    assert (doms.peek("a").data, doms.peek("a").pid) == (1, 1)


def test_a_task_and_its_thread_are_two(doms: Doms) -> None:
    plain = doms.plain.get("a")

    async def main() -> None:
        for wait in (doms.get("a", timeout=0), doms.get("a", timeout=SLICE)):
            with pytest.raises(LockTimeout):
                await wait
        with pytest.raises(DomainNotLocked, match="outside of its tasks"):
            _ = plain.data
        with pytest.raises(NotOwner, match="outside of its tasks"):
            plain.unlock()
        loop = asyncio.get_running_loop()
        loop.call_soon(plain_unlock)  # a callback belongs to the thread
        async with doms.get("a", timeout=DEADLINE):
            pass

    def plain_unlock() -> None:
        plain.unlock()

    run(main())


# --- errors, by owner -------------------------------------------------------------------------


def test_lock_twice(doms: Doms) -> None:
    async def main() -> None:
        async with doms.get("a") as dom:
            with pytest.raises(AlreadyLocked, match="this task holds"):
                await doms.get("a")
            with pytest.raises(AlreadyLocked, match="this task holds"):
                dom.lock()
            assert dom.is_locked
        async with doms.locked():
            with pytest.raises(AlreadyLocked, match="this task holds the list lock"):
                async with doms.locked():
                    pass
            assert doms.plain.is_locked
        async with doms.mutex("m"):
            with pytest.raises(AlreadyLocked, match="this task holds"):
                async with doms.mutex("m"):
                    pass
            assert doms.plain.mutex("m").is_locked
        async with doms.job("a", "backup"):
            with pytest.raises(AlreadyLocked, match="this task holds job 'backup'"):
                async with doms.job("a", "again", timeout=DEADLINE):
                    pass

    run(main())


def test_the_lock_rule_holds_per_task(doms: Doms) -> None:
    async def main() -> None:
        async with doms.get("a"):
            with pytest.raises(LockOrder, match="this task holds a domain"):
                await doms.get("b")
            with pytest.raises(LockOrder, match="this task holds a domain"):
                async with doms.locked():
                    pass
            with pytest.raises(LockOrder):
                async with doms.lock_many(["b", "c"]):
                    pass
            with pytest.raises(LockOrder):
                async with doms.job("b", "backup"):
                    pass
            for wait in (doms.wait("b"), doms.wait_any(until=lambda info: False)):
                with pytest.raises(LockOrder):
                    await wait
            async with doms.get("b", timeout=0):  # a try is always allowed
                pass
            other: list[str] = []
            await asyncio.create_task(enter(doms, "b", other))  # and to others all is
            assert other == ["in b", "out b"]
        async with doms.mutex("m"):
            with pytest.raises(LockOrder):
                async with doms.mutex("n"):
                    pass

    run(main())


def test_what_another_task_holds(doms: Doms) -> None:
    async def main() -> None:
        async with doms.mutex("m") as mutex, doms.get("a") as dom, doms.get("b", timeout=0):
            dom.data = 1

            async def other() -> None:
                assert not dom.is_locked and not mutex.is_locked
                with pytest.raises(DomainNotLocked, match="another task of this thread"):
                    _ = dom.data
                with pytest.raises(DomainNotLocked, match="another task of this thread"):
                    dom.commit()
                with pytest.raises(NotOwner, match="lock, use and unlock in one task"):
                    dom.unlock()
                with pytest.raises(NotOwner, match="lock, use and unlock in one task"):
                    mutex.unlock()
                with pytest.raises(AlreadyLocked, match="wait with shmdomains.aio in asyncio"):
                    doms.plain.get("a")
                with pytest.raises(LockTimeout, match="domain 'a' is locked; held by process"):
                    doms.plain.get("a", timeout=0)
                assert dom.try_lock() is False and mutex.try_lock() is False

            await asyncio.create_task(other())
            assert dom.data == 1
        async with doms.locked():

            async def third() -> None:
                assert not doms.plain.is_locked
                with pytest.raises(NotOwner, match="another task of this thread"):
                    doms.plain.unlock()
                with pytest.raises(ListNotLocked):
                    await doms.find_by_name("a")
                with pytest.raises(AlreadyLocked, match=r"shmdomains\.aio"):
                    doms.plain.lock()
                assert doms.plain.acquire(False) is False

            await asyncio.create_task(third())
        with pytest.raises(DomainNotLocked, match="not locked by this task"):
            _ = dom.data
        with pytest.raises(MutexNotLocked, match="this task does not hold"):
            mutex.unlock()

    run(main())


def test_a_job_of_another_task(doms: Doms) -> None:
    async def main() -> None:
        async with doms.job("a", "backup") as job:

            async def other() -> None:
                with pytest.raises(NotOwner, match="another thread's or task's"):
                    job.progress(1)
                with pytest.raises(JobTimeout, match="job 'backup'") as caught:
                    async with doms.job("a", "mine", timeout=2 * SLICE):
                        pass
                assert caught.value.holder is not None
                assert caught.value.holder.pid == os.getpid()
                with pytest.raises(NotOwner, match="this task does not have"):
                    async with doms.job("a", "nested", Job.ASYNC_NESTED):
                        pass

            await asyncio.create_task(other())
            job.progress(50)
        assert doms.peek("a").jobs == ()

    run(main())


@pytest.mark.slow
def test_too_many_locks(tmp_path: Path) -> None:
    """1,000 for a task, 2,000 for all tasks of a thread: the kernel frees 2,048 of a dead one."""
    with DomainList(max_domains=2100) as plain:
        for number in range(2100):
            plain.define(xml(f"d{number}"))
        doms = aio.wrap(plain)
        infos = plain.snapshot()

        async def main() -> None:
            leave, held = asyncio.Event(), list[int]()

            async def hog(part: int) -> None:
                async with doms.lock_many(infos[part * 990 : (part + 1) * 990]) as many:
                    held.append(len(many))
                    await leave.wait()

            with pytest.raises(TooManyLocks, match="this task holds 1000 locks"):
                async with doms.lock_many(infos[:1001]):
                    pass
            hogs = [asyncio.create_task(hog(part)) for part in range(2)]
            until_both = asyncio.create_task(asyncio.sleep(0))
            while len(held) < 2:
                await asyncio.sleep(0)
            await until_both
            with pytest.raises(TooManyLocks, match="the tasks of this thread hold 2000 locks"):
                async with doms.lock_many(infos[1980:2080]):
                    pass
            async with doms.lock_many(infos[1980:2000]):
                with pytest.raises(TooManyLocks, match="2000 locks"):
                    doms.plain.get(infos[2000], timeout=0)
            leave.set()
            await asyncio.gather(*hogs)
            async with doms.lock_many(infos[:1000]):
                pass

        run(main())
        assert taken(plain) == []


def test_a_time_out_names_the_holder_and_the_time_that_was_asked_for(
    doms: Doms, start: Start, path: str
) -> None:
    holder = start(hold, path, "a")
    assert holder.hear() == "held"

    async def main() -> None:
        async def second() -> None:  # it begins anew, again and again, as the first leaves
            with pytest.raises(LockTimeout, match=r"not free within 0\.3 s") as caught:
                await doms.get("a", timeout=0.3)
            assert_holder(caught.value)

        waits: list[Awaitable[Any]] = [
            doms.get("a", timeout=0.2),
            doms.lookup("a", timeout=0.2),
            many(doms.lock_many(["b", "a"], timeout=0.2)),
        ]
        other = asyncio.create_task(second())
        for wait in waits:
            before = time.monotonic()
            with pytest.raises(LockTimeout, match=r"not free within 0\.2 s") as caught:
                await wait
            assert time.monotonic() - before >= 0.2
            assert_holder(caught.value)
        async with doms.locked():
            with pytest.raises(LockTimeout, match=r"not free within 0\.1 s") as caught:
                await doms.find_by_name("a", 0.1)
            assert_holder(caught.value)
            with pytest.raises(LockTimeout, match="domain 'a'") as caught:
                await doms.remove_inactive(unlocked, 0.1)
            assert_holder(caught.value)
        with pytest.raises(LockTimeout, match="domain 'a' is locked") as caught:
            await doms.get("a", timeout=0)
        assert_holder(caught.value)
        await other
        for wrong in (doms.get, doms.find_by_name):
            with pytest.raises(ValueError, match="timeout is -1"):
                await wrong("a", timeout=-1)

    async def many(block: Any) -> None:
        async with block:
            pass

    def assert_holder(error: LockTimeout) -> None:
        assert "domain 'a'" in str(error) and f"process {holder.pid}" in str(error)
        assert error.holder is not None and error.holder.pid == holder.pid

    unlocked = next(dom for dom in doms.plain._handles() if dom.uuid == doms.peek("a").uuid)
    run(main())
    assert holder.ask("x") == "free"


def test_a_time_out_of_a_lock_that_a_task_holds(doms: Doms) -> None:
    async def main() -> None:
        async with doms.mutex("m", why="held up"), doms.get("a", why="a long story"):

            async def other() -> None:
                with pytest.raises(LockTimeout, match=r"0\.1 s; held by process .*a long story"):
                    await doms.get("a", timeout=0.1)
                with pytest.raises(LockTimeout, match=r"0\.1 s; held by process .*held up"):
                    async with doms.mutex("m", 0.1):
                        pass

            await asyncio.create_task(other())

    run(main())


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


# --- the list lock and what goes with it ------------------------------------------------------


def test_what_needs_the_list_lock(doms: Doms) -> None:
    async def main() -> None:
        uuid = doms.peek("a").uuid
        with doms.plain.get("b") as dom:
            number = dom.activate()
        async with doms.locked() as same:
            assert same is doms and doms.plain.is_locked
            for find in (doms.find_by_uuid(uuid), doms.find_by_name("a")):
                async with find as dom:
                    assert dom is not None and dom.name == "a"
            dom = await doms.find_by_id(number)
            assert dom is not None and dom.name == "b"
            dom.unlock()
            assert await doms.find_by_name("nobody") is None
            async with doms.assign_def(DomainDef.from_xml(xml("new", memory=5))) as dom:
                assert dom.definition.memory == 5
            async with doms.find_by_name("new") as dom:
                await doms.rename(dom, "newer")
                assert dom.name == "newer"
            await doms.remove_inactive(dom)
        assert doms.peek("newer") is None
        for call in (doms.find_by_name("a"), doms.assign_def(DomainDef.from_xml(xml("x")))):
            with pytest.raises(ListNotLocked):
                await call

    run(main())


def test_remove_and_rename_wait_for_the_holder(doms: Doms) -> None:
    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def holder() -> None:
            async with doms.get("a"):
                entered.set()
                await leave.wait()

        async def remover() -> None:
            async with doms.locked():
                await doms.remove_inactive(handle_)

        handle_ = handle(doms, "a")
        held = asyncio.create_task(holder())
        await entered.wait()
        removed = asyncio.create_task(remover())
        await queued(1)
        waits = [asyncio.create_task(enter(doms, "a", [])) for _ in range(3)]
        await queued(4)
        leave.set()
        await asyncio.gather(held, removed)
        for task in waits:
            assert isinstance(await ended(task), (DomainNotFound, type(None)))
        with pytest.raises(DomainRemoved):
            async with handle_:
                pass

    run(main())


def test_a_domain_that_is_removed_while_tasks_wait(doms: Doms) -> None:
    """Each gets it before its remover, or learns that it is gone."""

    async def main() -> None:
        async with doms.locked():
            dom = await doms.find_by_name("a")
            assert dom is not None

            async def by_handle() -> None:
                async with gone:
                    pass

            gone = next(one for one in doms.plain._handles() if one.uuid == dom.uuid)
            misses = [asyncio.create_task(doms_lookup(doms)), asyncio.create_task(by_handle())]
            misses.append(asyncio.create_task(doms.wait("a", until=lambda info: False)))
            await queued(3)
            dom.unlock()
            await doms.remove_inactive(dom)
        found = [await ended(task) for task in misses]
        assert found[0] is None
        assert found[1] is None or type(found[1]) is DomainRemoved
        assert type(found[2]) is DomainRemoved

    run(main())


async def doms_lookup(doms: Doms) -> None:
    async with doms.lookup("a") as dom:
        assert dom is None or dom.name == "a"


def test_lock_many(doms: Doms, start: Start, path: str) -> None:
    """All or nothing, whatever ends it."""
    holder, looker = start(hold, path, "c"), start(say_what_is_taken, path)
    assert holder.hear() == "held"

    async def main() -> None:
        async def many(timeout: float | None = None) -> list[str]:
            async with doms.lock_many(NAMES, timeout) as found:
                return [dom.name for dom in found]

        with pytest.raises(LockTimeout, match="domain 'c'"):
            await many(timeout=2 * SLICE)
        assert looker.ask() == ["c"]
        task = asyncio.create_task(many())
        await queued(1)
        assert set(looker.ask()) >= {"list", "a", "b", "c"}
        task.cancel()
        assert await ended(task) is asyncio.CancelledError
        assert looker.ask() == ["c"]
        task = asyncio.create_task(many())
        await queued(1)
        assert holder.ask("x") == "free"
        assert await task == list(NAMES)
        assert looker.ask() == []
        with pytest.raises(ZeroDivisionError):
            async with doms.lock_many(["a", "b"]) as found:
                for dom in found:
                    dom.data = "not this"
                raise ZeroDivisionError
        assert [doms.peek(name).data for name in "ab"] == [None, None]
        with pytest.raises(DomainNotFound):
            async with doms.lock_many(["a", "nobody"]):
                pass
        async with doms.locked(), doms.lock_many("ab"):
            assert doms.plain.is_locked

    run(main())


# --- files ------------------------------------------------------------------------------------


@pytest.fixture
def config_dir(doms: Doms, tmp_path: Path) -> Path:
    directory = tmp_path / "qemu"
    directory.mkdir()
    for name in ("x", "y"):
        (directory / f"{name}.xml").write_text(xml(name))
    return directory


def files(directory: Path) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.xml"))


def test_what_writes_files(doms: Doms, config_dir: Path) -> None:
    (config_dir / "autostart").mkdir()

    async def main() -> None:
        report = await doms.load_all_configs(config_dir, config_dir / "autostart")
        assert sorted(report.loaded) == ["x", "y"]
        for name in NAMES:
            await doms.save_config(name)
        info = await doms.define(xml("new"))
        assert info.name == "new" and info.persistent
        async with doms.locked(), doms.get("new") as dom:
            await doms.rename(dom, "newer")
            assert dom.name == "newer" and doms.plain.is_locked
        await doms.set_autostart("newer", True)
        assert (config_dir / "autostart" / "newer.xml").is_symlink()
        assert files(config_dir) == [*NAMES, "newer", "x", "y"]
        await doms.undefine("newer")
        await doms.undefine(name="x")
        assert files(config_dir) == [*NAMES, "y"]
        with pytest.raises(DomainNotFound):
            await doms.undefine("newer")
        with pytest.raises(LockOrder):
            async with doms.get("a"):
                await doms.define(xml("z"))
        async with doms.locked():
            await doms.define(xml("z"))
        with pytest.raises(LockTimeout):
            async with doms.get("a"):
                await asyncio.create_task(doms.define(xml("a"), timeout=SLICE))
        await doms.forget_configs()

    run(main())


def test_two_tasks_define_and_the_loop_goes_on(doms: Doms, config_dir: Path) -> None:
    async def main() -> None:
        await doms.load_all_configs(config_dir)
        async with doms.locked():
            tasks = [asyncio.create_task(doms.define(xml(f"n{number}"))) for number in range(5)]
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not any(task.done() for task in tasks)
        await asyncio.gather(*tasks)
        assert len(doms) == 11

    run(main())
    doms.plain.save_config("a")
    for name in NAMES[1:]:
        doms.plain.save_config(name)


@pytest.mark.parametrize("call", ["define", "undefine", "load_all_configs", "rename"])
def test_cancelled_in_the_middle(doms: Doms, config_dir: Path, call: str) -> None:
    """At each of many moments: it happened, with its file, or it did not; never half."""
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "define": lambda: doms.define(xml("new")),
        "undefine": lambda: doms.undefine("x"),
        "load_all_configs": lambda: doms.load_all_configs(config_dir),
        "rename": lambda: rename(),
    }

    async def rename() -> None:
        async with doms.locked(), doms.get("x") as dom:
            await doms.rename(dom, "xx")

    async def main() -> None:
        await doms.load_all_configs(config_dir)
        for name in NAMES:
            await doms.save_config(name)
        done = cancelled = 0
        for moment in range(60):
            for name in ("x", "new", "xx"):
                present = doms.peek(name) is not None
                if present != (name == "x"):
                    await (doms.define(xml(name)) if name == "x" else doms.undefine(name))
            task = asyncio.ensure_future(calls[call]())
            if moment % 3:
                await asyncio.sleep(moment * 0.00005)
            else:
                for _ in range(moment // 3):
                    await asyncio.sleep(0)
            task.cancel()
            try:
                await task
                done += 1
            except asyncio.CancelledError:
                cancelled += 1
            assert taken(doms.plain) == []
            assert doms.check().problems == []
            assert files(config_dir) == sorted(info.name for info in doms)
        assert cancelled > 10

    run(main())


@pytest.mark.parametrize("moment", range(12))
def test_a_cancelled_call_does_not_wait_for_its_lock(
    doms: Doms, start: Start, path: str, moment: int
) -> None:
    """However early it is cancelled: what it does elsewhere is told, and gives up."""
    holder = start(hold, path, "a")
    assert holder.hear() == "held"

    async def main() -> None:
        task = asyncio.create_task(doms.define(xml("a", memory=7)))
        for _ in range(moment):
            await asyncio.sleep(0)
        if moment > 8:
            await asyncio.sleep(0.02 * (moment - 8))
        task.cancel()
        before = time.monotonic()
        assert await ended(task) is asyncio.CancelledError
        assert time.monotonic() - before < DEADLINE / 2
        assert doms.plain.acquire(False)
        doms.plain.release()

    run(main())
    assert holder.ask("x") == "free"
    assert doms.peek("a").definition.memory == 1024


# --- jobs -------------------------------------------------------------------------------------


def test_jobs(doms: Doms) -> None:
    async def main() -> None:
        async with doms.get("a") as dom:
            async with dom.job("migrate", Job.ASYNC, timeout=1) as job:
                assert not dom.is_locked
                assert [one.operation for one in doms.peek("a").jobs] == ["migrate"]
                async with dom.job("step", Job.ASYNC_NESTED) as step:
                    step.progress("half")
                    assert len(doms.peek("a").jobs) == 2
                job.progress({"done": 1})
                await enter(doms, "a", [])  # it holds no lock
            assert dom.is_locked and doms.peek("a").jobs == ()
            dom.data = 1
            with pytest.raises(UncommittedChanges):
                async with dom.job("backup"):
                    pass
        assert doms.peek("a").data == 1
        with pytest.raises(ZeroDivisionError):
            async with doms.job("a", "backup"):
                raise ZeroDivisionError
        assert doms.peek("a").jobs == ()

    run(main())


def test_a_job_whose_domain_was_locked_and_that_is_cancelled(doms: Doms) -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def holder() -> None:
            async with doms.job("a", "first"):
                begun.set()
                await asyncio.sleep(LONG)

        first = asyncio.create_task(holder())
        await begun.wait()

        async def second(cancelled: list[bool]) -> None:
            async with doms.get("a") as dom:
                try:
                    async with dom.job("second"):
                        pass
                except asyncio.CancelledError:
                    cancelled.append(dom.is_locked)
                    raise

        told = list[bool]()
        waits = asyncio.create_task(second(told))
        await queued(1)
        with pytest.raises(JobTimeout, match="job 'first'"):
            async with doms.job("a", "third", timeout=SLICE):
                pass
        waits.cancel()
        assert await ended(waits) is asyncio.CancelledError
        assert told == [True]  # as after any other error in there
        first.cancel()
        assert await ended(first) is asyncio.CancelledError
        assert doms.peek("a").jobs == ()
        async with doms.job("a", "third", timeout=0):
            pass

    run(main())


def test_a_task_that_ends_with_a_job(doms: Doms) -> None:
    kept: list[Any] = []

    async def main() -> None:
        async def careless() -> None:
            job = doms.job("a", "backup")
            await job.__aenter__()
            kept.append(job)

        await asyncio.create_task(careless())
        async with doms.job("a", "next", timeout=DEADLINE):
            pass

    with pytest.warns(ResourceWarning, match="job 'backup'"):
        run(main())


def test_the_end_of_a_job_waits_for_a_domain_that_is_held(doms: Doms) -> None:
    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def holder() -> None:
            async with doms.get("a"):
                entered.set()
                await leave.wait()

        async def worker() -> None:
            async with doms.job("a", "backup"):
                held.append(asyncio.create_task(holder()))
                await entered.wait()

        held: list[asyncio.Task[None]] = []
        work = asyncio.create_task(worker())
        await entered.wait()
        await queued(1)
        leave.set()
        await asyncio.gather(work, *held)
        assert doms.peek("a").jobs == ()

    run(main())


def test_the_end_of_a_job_is_cancelled(doms: Doms, caplog: pytest.LogCaptureFixture) -> None:
    """It does not wait for long then; the job ends when the domain is free."""

    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def holder() -> None:
            async with doms.get("a"):
                entered.set()
                await leave.wait()

        async def worker() -> None:
            async with doms.job("a", "backup"):
                held.append(asyncio.create_task(holder()))
                await entered.wait()

        held: list[asyncio.Task[None]] = []
        work = asyncio.create_task(worker())
        await entered.wait()
        await queued(1)
        work.cancel()
        before = time.monotonic()
        assert await ended(work) is asyncio.CancelledError
        assert time.monotonic() - before < DEADLINE / 2
        leave.set()
        await held[0]
        async with doms.job("a", "next", timeout=DEADLINE):
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        run(main())


# --- waiting and watching ---------------------------------------------------------------------


def count_up(pipe: Pipe, path: str, turns: int) -> None:
    doms = DomainList.attach(path=path)
    pipe.listen()
    for _ in range(turns):
        with doms.get("a") as dom:
            dom.data = (dom.data or 0) + 1
    pipe.say("done")


def test_no_change_of_another_process_is_missed(doms: Doms, start: Start, path: str) -> None:
    """Each of many waits ends with the change that it waits for, and a watch tells each event."""
    writers = [start(count_up, path, 300) for _ in range(2)]
    for writer in writers:
        writer.tell()

    async def main() -> None:
        def reached(number: int) -> Callable[[Any], bool]:
            return lambda info: (info.data or 0) >= number

        waits = [
            doms.wait("a", until=reached(number), timeout=3 * DEADLINE)
            for number in range(1, 601, 7)
        ]
        waits += [
            doms.wait_any(until=reached(number), timeout=3 * DEADLINE)
            for number in range(1, 601, 60)
        ]
        waits.append(doms.wait("a", until=reached(600), timeout=3 * DEADLINE))
        await asyncio.gather(*waits)

    run(main())
    assert doms.peek("a").data == 600


def come_and_go(pipe: Pipe, path: str, name: str, turns: int) -> None:
    doms = DomainList.attach(path=path)
    pipe.listen()
    for _ in range(turns):
        with doms.get(name) as dom:
            dom.activate()
            dom.commit()
            dom.deactivate()
    pipe.say("done")


def test_a_watch_tells_every_event(doms: Doms, start: Start, path: str) -> None:
    others = [start(come_and_go, path, name, 50) for name in "ab"]

    async def main() -> None:
        told = list[Any]()

        async def watcher() -> None:
            async for event in doms.watch(timeout=3 * DEADLINE):
                told.append(event)
                if len(told) == 200:
                    break

        watching = [asyncio.create_task(watcher())]
        await queued(1)
        for other in others:
            other.tell()
        await asyncio.gather(*watching)
        numbers = [event.number for event in told]
        assert numbers == list(range(numbers[0], numbers[0] + 200))
        assert {event.name for event in told} == {"a", "b"}
        watch = doms.watch(timeout=2 * SLICE)
        assert [event async for event in watch] == []
        assert [event async for event in doms.watch(since=numbers[-3], timeout=0)] == told[-2:]

    run(main())


def test_waits_that_end_in_vain(doms: Doms) -> None:
    async def main() -> None:
        for wait in (
            doms.wait("a", timeout=0.1),
            doms.wait("a", until=lambda info: False, timeout=0),
            doms.wait_any(until=lambda info: False, timeout=0.1),
        ):
            with pytest.raises(WaitTimeout):
                await wait
        with pytest.raises(WaitTimeout, match=r"0\.1 s"):
            await doms.wait("a", timeout=0.1)
        with pytest.raises(DomainNotFound):
            await doms.wait("nobody")
        for wait in (doms.wait("a"), doms.wait_any(until=lambda info: False)):
            task = asyncio.create_task(wait)
            await queued(1)
            task.cancel()
            assert await ended(task) is asyncio.CancelledError
            await queued(0)

    run(main())


def test_wait_until(doms: Doms) -> None:
    async def main() -> None:
        async def waits(value: int) -> None:
            async with doms.get("a") as dom:
                await aio.wait_until(dom, lambda dom: dom.data == value, timeout=DEADLINE)
                assert dom.is_locked
                dom.data = value + 1

        tasks = [asyncio.create_task(waits(value)) for value in (3, 2, 1)]
        await queued(3)
        async with doms.get("a") as dom:
            dom.data = 1
        await asyncio.gather(*tasks)
        assert doms.peek("a").data == 4
        async with doms.get("a") as dom:
            with pytest.raises(WaitTimeout):
                await aio.wait_until(dom, lambda dom: False, timeout=0.05)
            assert dom.is_locked
            dom.data = 5
            with pytest.raises(UncommittedChanges):
                await aio.wait_until(dom, lambda dom: False, timeout=0.05)
        task = asyncio.create_task(waits(77))
        await queued(1)
        task.cancel()
        assert await ended(task) is asyncio.CancelledError
        task = asyncio.create_task(waits(77))
        await queued(1)
        await doms.undefine("a")
        assert isinstance(await ended(task), DomainRemoved)

    run(main())


def test_a_named_lock(doms: Doms) -> None:
    async def main() -> None:
        async with doms.mutex("m", timeout=1, why="to show") as held:
            assert held.is_locked and held.name == "m" and held.previous_owner_died is None
            async with doms.get("a"):
                pass
        with pytest.raises(ZeroDivisionError):
            async with doms.mutex("m"):
                raise ZeroDivisionError

    run(main())


# --- threads ----------------------------------------------------------------------------------


def test_what_is_locked_in_another_thread_cannot_be_used_here(doms: Doms) -> None:
    async def main() -> None:
        dom = await asyncio.to_thread(doms.plain.get, "a")
        with pytest.raises(DomainNotLocked, match=r"in asyncio use shmdomains\.aio"):
            _ = dom.data
        with pytest.raises(NotOwner, match=r"in asyncio use shmdomains\.aio"):
            dom.unlock()
        del dom
        async with doms.get("a", timeout=DEADLINE) as dom:

            def use() -> str:
                with pytest.raises(DomainNotLocked, match=r"in asyncio use shmdomains\.aio"):
                    _ = dom.data
                return "refused"

            assert await asyncio.to_thread(use) == "refused"
            assert dom.is_locked

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        run(main())


def test_a_plain_wait_that_stops_the_loop_is_logged_once(
    doms: Doms, start: Start, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    holder = start(hold, path, "a")
    assert holder.hear() == "held"

    async def main() -> None:
        threading.Timer(5 * SLICE, holder.tell, ["x"]).start()
        with doms.plain.get("a"):
            pass

    with caplog.at_level(logging.WARNING, "shmdomains.wait"):
        run(main())
    [told] = [record.getMessage() for record in caplog.records if record.name == "shmdomains.wait"]
    assert "event loop" in told and "use shmdomains.aio" in told and f"process {holder.pid}" in told
    assert holder.hear() == "free"
