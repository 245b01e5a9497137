"""Tasks that wait when something goes wrong: holders die, lists and loops are closed, calls are
given up, other threads end what a task holds. Nobody waits for a lock that is free, and none stays
locked.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
from killing import DEADLINE, Child, Pipe, Planted, xml

from shmdomains import DomainList, ListClosed, aio
from shmdomains.config.change import LOCK_NAME
from shmdomains.memory import asking, rooms
from shmdomains.memory._core import core
from shmdomains.rules import files
from shmdomains.rules.work import Step, Work

pytestmark = pytest.mark.usefixtures("nothing_left")

LONG = 10.0
DIED = 0x40000000  # what the kernel leaves in the mutex of a dead holder


@pytest.fixture
def doms() -> Iterator[DomainList]:
    with DomainList(max_domains=32) as doms:
        for name in "ab":
            doms.define(xml(name))
        yield doms


@pytest.fixture
def named(tmp_path: Path) -> Iterator[DomainList]:
    """For other processes, too."""
    with DomainList.create(path=tmp_path / "segment", max_domains=32) as doms:
        for name in "ab":
            doms.define(xml(name))
        yield doms


@pytest.fixture
def planted(named: DomainList) -> Iterator[Planted]:
    with Planted(str(named._path)) as planted:
        yield planted


async def use(doms: DomainList, name: str = "a") -> str:
    async with aio.wrap(doms).get(name):
        return "used"


async def waits(awaited: Awaitable[Any]) -> asyncio.Future[Any]:
    """Once it waits."""
    begun = asyncio.ensure_future(awaited)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not begun.done()
    return begun


def hold_job(pipe: Pipe, path: str) -> None:
    with DomainList.attach(path=path).job("a", "long"):
        pipe.say("held")
        pipe.listen()


def hold(pipe: Pipe, path: str) -> None:
    doms = DomainList.attach(path=path)
    with doms.get("a"):
        pipe.say("held")
        pipe.listen()
    pipe.say("free")
    pipe.listen()


def test_a_lock_that_was_put_down_again_is_not_marked(doms: DomainList) -> None:
    """A job takes the domain for a moment; a mark for waiters in the free mutex would lock it."""

    async def main() -> None:
        async with aio.wrap(doms).get("a"):
            job = await waits(begin())
        await asyncio.wait_for(job, LONG)

    async def begin() -> None:
        async with aio.wrap(doms).job("a", "x"):
            pass

    asyncio.run(main())
    with doms.get("a", timeout=0) as dom:
        assert dom.previous_owner_died is None
    assert doms.statistics.deaths == 0


def test_the_holder_of_a_job_dies(named: DomainList, start: Callable[..., Child]) -> None:
    child = start(hold_job, str(named._path))
    assert child.hear() == "held"

    async def begin() -> None:
        async with aio.wrap(named).job("a", "mine"):
            pass

    async def main() -> None:
        job = await waits(begin())
        child.kill()
        await asyncio.wait_for(job, LONG)

    asyncio.run(main())


def test_a_list_that_is_closed_ends_its_waits(doms: DomainList) -> None:
    async def main() -> None:
        async with aio.wrap(doms).get("a"):
            first, second = await waits(use(doms)), await waits(use(doms))
            doms.close()
            for one in (first, second):
                with pytest.raises(ListClosed):
                    await asyncio.wait_for(one, LONG)

    asyncio.run(main())


def test_a_wait_that_stops_no_loop_is_not_logged(
    doms: DomainList, caplog: pytest.LogCaptureFixture
) -> None:
    looks = []

    async def main() -> None:
        async with aio.wrap(doms).get("a"):
            waiting = await waits(use(doms))
            hub = rooms.hub_of(asyncio.get_running_loop())
            assert hub is not None
            [room] = hub.rooms.values()
            begun = room.looked
            while room.looked == begun:
                await asyncio.sleep(0.01)
            looks.append(room.turns[0].wait.look())
        await waiting

    with caplog.at_level(logging.WARNING, "shmdomains.wait"):
        asyncio.run(main())
    assert looks == [True]
    assert not caplog.records


def test_each_of_many_waits_is_looked_at(doms: DomainList) -> None:
    """A multiprocessing lock tells nobody that it is free."""
    with DomainList(max_domains=32, lock="multiprocessing") as many:
        for n in range(20):
            many.define(xml(f"d{n}"))
        held = {}
        with many.locked():
            for n in range(20):
                held[n] = many.find_by_name(f"d{n}")

        async def main() -> None:
            waiting = [await waits(use(many, f"d{n}")) for n in range(20)]
            hub = rooms.hub_of(asyncio.get_running_loop())
            assert hub is not None
            looked = {key: room.looked for key, room in hub.rooms.items()}
            while any(hub.rooms[key].looked == then for key, then in looked.items()):
                await asyncio.sleep(0.01)
            for one in waiting:
                one.cancel()
            await asyncio.wait(waiting)

        asyncio.run(asyncio.wait_for(main(), LONG))
        for dom in held.values():
            assert dom is not None
            dom.unlock()


def test_loops_in_turn(named: DomainList, start: Callable[..., Child]) -> None:
    child = start(hold, str(named._path))
    assert child.hear() == "held"
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    waiting = first.run_until_complete(waits(use(named)))

    async def other() -> None:
        async with aio.wrap(named).get("b"):
            waiting = await waits(use(named, "b"))
        await waiting

    second.run_until_complete(other())
    child.tell("go")
    assert child.hear() == "free"
    assert first.run_until_complete(asyncio.wait_for(waiting, LONG)) == "used"
    first.close()
    second.close()
    child.kill()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_closed_with_several_that_wait(doms: DomainList) -> None:
    loop = asyncio.new_event_loop()

    async def two() -> list[Any]:
        return [await waits(use(doms)), await waits(use(doms))]

    dom = doms.get("a")
    waiting = loop.run_until_complete(two())
    assert [lock.waiting for lock in doms.locks()] == [2]
    loop.close()
    assert [lock.waiting for lock in doms.locks()] == [0]

    async def after() -> None:
        async with aio.wrap(doms).get("b"):
            waiting = await waits(use(doms, "b"))
        assert await waiting == "used"

    asyncio.run(after())
    dom.unlock()
    for one in waiting:
        one._log_destroy_pending = False


def test_cancelled_while_a_job_ends(doms: DomainList) -> None:
    """Its domain is not free, and the end of it is not waited for."""
    begun, over = threading.Event(), threading.Event()
    held = threading.Event()

    def hold() -> None:
        begun.wait()
        with doms.get("a"):
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()

    async def job() -> None:
        async with aio.wrap(doms).job("a", "x"):
            begun.set()
            held.wait()

    async def main() -> None:
        ends = await waits(job())
        ends.cancel()
        await asyncio.wait([ends], timeout=LONG)
        assert ends.cancelled()

    try:
        with pytest.warns(ResourceWarning, match="dropped while it was held"):
            asyncio.run(main())
            gc.collect()
    finally:
        over.set()
        thread.join()


def test_whoever_holds_a_job_gets_a_thread(
    doms: DomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_pools", {})
    monkeypatch.setattr(asking, "_WORKERS", 2)
    waiters = aio.wrap(doms)

    async def main() -> None:
        async with waiters.job("a", "x"):
            others = [await waits(waiters.undefine("a", timeout=LONG)) for _ in range(2)]
            await waiters.define(xml("c"))
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run(main())
    assert "c" in doms


def test_a_call_is_given_up_before_its_thread_has_begun_it(
    doms: DomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, real, begun = threading.Event(), core.work_for, threading.Event()

    def late(*args: Any) -> Any:
        begun.set()
        begin.wait()
        return real(*args)

    monkeypatch.setattr(core, "work_for", late)

    async def main() -> None:
        call = await waits(aio.wrap(doms).define(xml("c")))
        begun.wait()
        call.cancel()
        await asyncio.sleep(0)
        begin.set()
        await asyncio.wait([call], timeout=LONG)
        assert call.cancelled()

    with doms.locked():
        asyncio.run(main())
    assert "c" not in doms


def test_a_loop_closed_while_a_thread_works_for_its_task(
    doms: DomainList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doms.load_all_configs(tmp_path)
    inside, go, over = threading.Event(), threading.Event(), threading.Event()
    save, work = files.save, core.work_for

    def slow(*args: Any, **kwargs: Any) -> None:
        inside.set()
        go.wait()
        save(*args, **kwargs)

    def work_for(*args: Any) -> Any:
        try:
            return work(*args)
        finally:
            over.set()

    monkeypatch.setattr(files, "save", slow)
    monkeypatch.setattr(core, "work_for", work_for)
    loop = asyncio.new_event_loop()

    async def begin() -> Any:
        async with aio.wrap(doms).get("b"):
            waiting = await waits(use(doms, "b"))
        await waiting
        call = await waits(aio.wrap(doms).define(xml("a")))
        inside.wait()
        return call

    call = loop.run_until_complete(begin())
    loop.close()
    go.set()
    over.wait()
    with doms.get("a", timeout=0) as dom:
        assert dom.previous_owner_died is None
    call._log_destroy_pending = False


@pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
def test_another_thread_ends_a_task_that_has_the_list(lock: Any) -> None:
    with DomainList(max_domains=8, lock=lock) as doms:
        found: list[Any] = []
        begun, over = threading.Event(), threading.Event()

        async def hold() -> None:
            async with aio.wrap(doms).locked():
                await asyncio.Event().wait()

        def run() -> None:
            loop = asyncio.new_event_loop()
            found.extend((loop, loop.run_until_complete(waits(hold()))))
            found[1]._log_destroy_pending = False
            begun.set()
            over.wait()

        thread = threading.Thread(target=run)
        thread.start()
        begun.wait()
        found.pop(0).close()
        found.clear()
        gc.collect()
        with doms.locked(timeout=0):
            pass
        over.set()
        thread.join()


def test_a_loop_that_another_thread_goes_on_with(doms: DomainList) -> None:
    loop = asyncio.new_event_loop()
    go = asyncio.Event()

    async def task() -> None:
        await use(doms, "b")
        await go.wait()
        await aio.wrap(doms).get("a")

    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(loop.run_until_complete(waits(task()))))
    thread.start()
    thread.join()
    go.set()
    with pytest.warns(ResourceWarning, match="still locked was dropped|a task ended while"):
        loop.run_until_complete(found[0])
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    doms.get("a", timeout=0).unlock()


def test_recover_leaves_what_other_tasks_hold(doms: DomainList) -> None:
    waiters = aio.wrap(doms)

    async def main(what: Any) -> list[str]:
        async with what:
            return [one.lock for one in await asyncio.create_task(recover())]

    async def recover() -> Any:
        return doms.recover(timeout=LONG).held

    assert asyncio.run(main(waiters.mutex("m"))) == ["mutex"]
    assert asyncio.run(main(waiters.get("a"))) == ["domain"]
    assert asyncio.run(main(waiters.locked())) == ["list"]


def test_a_wait_keeps_no_list(doms: DomainList) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:shmdomains")

    async def main(other: DomainList) -> None:
        async with aio.wrap(other).get("a"):
            waiting = await waits(use(other))
        await waiting

    before = mapped()
    other = DomainList(max_domains=8)
    other.define(xml("a"))
    asyncio.run(main(other))
    del other
    gc.collect()
    assert mapped() == before


def test_a_loop_closed_in_which_nobody_waited(doms: DomainList) -> None:
    loop = asyncio.new_event_loop()

    async def hold() -> None:
        async with aio.wrap(doms).get("a"):
            await asyncio.Event().wait()

    held = loop.run_until_complete(waits(hold()))
    with pytest.warns(ResourceWarning, match="still locked was dropped|a task ended while"):
        loop.close()
    doms.get("a", timeout=0).unlock()
    held._log_destroy_pending = False  # type: ignore[attr-defined]


def lock_directory(pipe: Pipe, directory: Path) -> None:
    with filelock.FileLock(directory / LOCK_NAME):
        pipe.say("locked")
        pipe.listen()
    pipe.rest()


@pytest.mark.parametrize("how", ["get", "job", "lock_many"])
def test_settling_does_not_stop_the_loop(
    doms: DomainList, tmp_path: Path, start: Callable[..., Child], how: str
) -> None:
    """What a dead process began with a domain and its file waits for the directory's lock."""
    doms.load_all_configs(tmp_path)
    dirs = doms._remembered()
    assert dirs is not None
    with doms.get("a") as dom:
        dom._commit_work(Work(Step.of("define", dirs, "a", defines=True)))
    child = start(lock_directory, tmp_path)
    assert child.hear() == "locked"

    async def take() -> None:
        waiters = aio.wrap(doms)
        block = {
            "get": lambda: waiters.get("a"),
            "job": lambda: waiters.job("a", "x"),
            "lock_many": lambda: waiters.lock_many(["a"]),
        }[how]()
        async with block:
            pass

    async def main() -> None:
        taken = await waits(take())
        child.tell("go on")
        await asyncio.wait_for(taken, LONG)

    asyncio.run(main())
    with doms.get("a", timeout=0) as dom:
        assert dom._work is None


def test_an_event_whose_writer_died(named: DomainList, planted: Planted) -> None:
    """It committed, and did not publish the event. Nobody else comes and takes the event lock."""
    count = named._event_count
    events = aio.wrap(named).watch(since=count)

    async def main() -> Any:
        waiting = await waits(events.__anext__())
        before = planted.read(planted.header("event_count"))
        with named.get("a") as dom:
            dom.autostart = True
        planted.write(planted.header("event_count"), before)
        planted.write(planted.header("event_mutex") + planted.at["mutex.__data.__lock"], DIED, 4)
        return await asyncio.wait_for(waiting, LONG)

    assert asyncio.run(main()).number == count + 1


def test_a_death_that_nobody_marked(named: DomainList, planted: Planted) -> None:
    """As after process_mrelease(): the mutex names a thread that does not run."""
    thread = threading.Thread(target=lambda: found.append(threading.get_native_id()))
    found: list[int] = []
    thread.start()
    thread.join()
    mutex = planted.slot(0, "mutex") + planted.at["mutex.__data.__lock"]

    async def main() -> str:
        return await asyncio.wait_for(use(named), LONG)

    planted.write(mutex, found[0], 4)
    assert asyncio.run(main()) == "used"
    assert named.statistics.deaths == 1


def test_a_call_is_given_up_that_waits_for_the_directory(
    doms: DomainList, tmp_path: Path, start: Callable[..., Child]
) -> None:
    doms.load_all_configs(tmp_path)
    child = start(lock_directory, tmp_path)
    assert child.hear() == "locked"

    async def main() -> None:
        call = await waits(aio.wrap(doms).define(xml("c")))
        while not doms.locks():
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.wait([call], timeout=LONG)
        assert call.cancelled()

    asyncio.run(main())
    assert "c" not in doms
    assert not doms.locks()


def collect_a_locked_list(pipe: Pipe) -> None:
    doms = DomainList(max_domains=4, lock="multiprocessing")
    doms.define(xml("a"))
    box: list[Any] = [doms, doms.get("a")]
    doms.box = box  # type: ignore[attr-defined]
    del doms, box
    gc.collect()
    pipe.say("done")


def test_the_collector_frees_a_locked_handle_with_its_list(start: Callable[..., Child]) -> None:
    """Of multiprocessing locks, which it may have cleared by then."""
    assert start(collect_a_locked_list).hear() == "done"


def test_many_who_sleep_do_not_hold_up_the_loop(doms: DomainList) -> None:
    """Each round wakes a few of them, and all have been woken before one is again."""
    dom = doms._handle_of("a")
    _, stamp = doms._look(dom)
    blocked = core.attempt(0, doms._sleep, (dom, stamp, None), {})
    rounds: list[Callable[[], None]] = []
    woken: list[int] = []

    class Timer:
        def cancel(self) -> None: ...

    def later(seconds: float, call: Callable[[], None]) -> Timer:
        rounds.append(call)
        return Timer()

    hub = rooms.Hub(object(), later, lambda: True)
    sleeps = [hub.sleep(blocked, lambda n=n: woken.append(n)) for n in range(100)]
    for sleep in sleeps:
        sleep.looked -= 2 * rooms.SLICE
    while len(woken) < len(sleeps):
        before = len(woken)
        rounds.pop()()
        assert not rounds[1:] and before < len(woken) <= before + 10
    assert sorted(woken) == list(range(100))
    hub.close()


def test_one_way_in_that_several_tasks_use(doms: DomainList) -> None:
    """As they would use one `asyncio.Lock`: each leaves what it has entered itself."""

    async def main() -> None:
        way = aio.wrap(doms).get("a")
        entered, leave = asyncio.Event(), asyncio.Event()

        async def second() -> None:
            async with way as dom:
                entered.set()
                await leave.wait()
                assert dom.is_locked
            assert not dom.is_locked

        async with way as dom:
            other = asyncio.create_task(second())
            await asyncio.sleep(0)
            dom.unlock()
            await entered.wait()
        leave.set()
        await other

    asyncio.run(main())


def test_a_change_that_nobody_told_of(doms: DomainList, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its writer had died after the commit: no number says that the list has changed."""
    stamp = doms._list_stamp()
    change(doms, "b")  # which tells whoever came so far
    scan = doms._changed

    def scan_then_change(marks: bytearray) -> Any:
        found = scan(marks)
        monkeypatch.undo()
        change(doms, "a")
        return found

    monkeypatch.setattr(doms, "_list_stamp", lambda: stamp + 1)
    monkeypatch.setattr(doms, "_changed", scan_then_change)

    async def main() -> None:
        found = await aio.wrap(doms).wait_any(until=lambda info: info.name == "a" and info.pid == 7)
        assert found.name == "a"

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


def change(doms: DomainList, name: str) -> None:
    with doms.get(name) as dom:
        dom.pid = 7
