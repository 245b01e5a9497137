"""`shmdomains.aio`: who excludes whom, and what errors say.

The tasks of a test run in one event loop. Who else is needed is another process. How tasks end
stands in test_aio_ends.py, what they call in test_aio_calls.py, and many of them in
test_aio_storms.py.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest
from killing import DEADLINE, xml
from tasks import (
    LOCKS,
    NAMES,
    Doms,
    Start,
    enter,
    hold,
    new_list,
    run,
    taken,
)

from shmdomains import (
    AlreadyLocked,
    Domain,
    DomainList,
    DomainNotFound,
    DomainNotLocked,
    Job,
    JobTimeout,
    ListNotLocked,
    LockOrder,
    LockTimeout,
    MutexNotLocked,
    NotOwner,
    TooManyLocks,
    aio,
)
from shmdomains.memory.rooms import SLICE

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def doms(path: str) -> Iterator[Doms]:
    with new_list(path) as doms:
        yield doms


# --- two tasks of one thread ------------------------------------------------------------------


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
                with pytest.raises(AlreadyLocked, match=r"wait with shmdomains\.aio in asyncio"):
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
