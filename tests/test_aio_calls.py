"""What a task calls through `shmdomains.aio`: with the list lock, with files, for jobs, to wait."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from killing import DEADLINE, Pipe, xml
from tasks import (
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
    DomainDef,
    DomainList,
    DomainNotFound,
    DomainNotLocked,
    DomainRemoved,
    Job,
    JobTimeout,
    ListNotLocked,
    LockOrder,
    LockTimeout,
    NotOwner,
    UncommittedChanges,
    WaitTimeout,
    aio,
)
from shmdomains.memory import asking
from shmdomains.memory.rooms import SLICE

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def doms(path: str) -> Iterator[Doms]:
    with new_list(path) as doms:
        yield doms


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
            with pytest.raises(ZeroDivisionError):
                async with doms.find_by_name("a") as dom:
                    dom.data = "not this"
                    raise ZeroDivisionError
            assert doms.peek("a").data is None
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


@pytest.mark.filterwarnings("error::ResourceWarning")
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


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.parametrize("what", ["get_many", "assign_defs"])
def test_many_are_locked_or_none(doms: Doms, start: Start, path: str, what: str) -> None:
    """Whatever ends the wait: the time, a cancellation, or the lock that was waited for."""
    holder, looker = start(hold, path, "c"), start(say_what_is_taken, path)
    assert holder.hear() == "held"
    wanted = [DomainDef.from_xml(xml(name)) for name in "nabc"]

    async def main() -> None:
        async def many(timeout: float | None = None) -> list[str]:
            block = (
                doms.get_many("abc", timeout)
                if what == "get_many"
                else doms.assign_defs(wanted, timeout=timeout)
            )
            async with block as found:
                for dom in found:
                    dom.data = "mine"
                return [dom.name for dom in found]

        with pytest.raises(LockTimeout, match="domain 'c'"):
            await many(timeout=2 * SLICE)
        assert looker.ask() == ["c"]
        task = asyncio.create_task(many())
        await queued(1)
        task.cancel()
        assert await ended(task) is asyncio.CancelledError
        assert looker.ask() == ["c"] and "n" not in doms
        task = asyncio.create_task(many())
        await queued(1)
        assert holder.ask("x") == "free"
        assert await task == list("abc" if what == "get_many" else "nabc")
        assert looker.ask() == []
        assert [doms.peek(name).data for name in "abc"] == ["mine"] * 3

    run(main())


def test_calls_that_change_and_unlock(doms: Doms, start: Start, path: str) -> None:
    """They wait without the loop's thread, and are cancelled in their wait."""
    holder = start(hold, path, "c")
    assert holder.hear() == "held"
    waits: list[Callable[[float | None], Awaitable[int]]] = [
        lambda timeout: doms.add("c", "requests", timeout=timeout),
        lambda timeout: doms.update_many({"c": {"data": {"requests": 1}}}, timeout),
        lambda timeout: doms.remove_many(iter("c"), timeout),
    ]

    async def main() -> None:
        assert await doms.add("a", "requests") == 1
        assert await doms.add(name="a", field="requests", by=2) == 3
        assert await doms.update_many([("a", {"pid": 7}), ("b", {"data": "mine"})]) == 2
        assert (doms.peek("a").pid, doms.peek("b").data) == (7, "mine")
        async with doms.locked():
            assert await doms.remove_many(["b"]) == 1
        assert await doms.remove_many(["a"]) == 1
        for wait in waits:
            with pytest.raises(LockTimeout, match="'c'"):
                await wait(2 * SLICE)
            task = asyncio.ensure_future(wait(None))
            await asyncio.sleep(0)
            task.cancel()
            assert await ended(task) is asyncio.CancelledError
        task = asyncio.ensure_future(doms.update_many({"c": {"data": {"requests": 1}}}))
        assert holder.ask("x") == "free"
        assert (await task, await doms.add("c", "requests")) == (1, 2)
        assert await doms.remove_many("c") == 1
        assert [row[0] for row in doms.table(("name",))] == ["d"]

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


def test_cancelled_before_the_other_thread_said_who_it_is(
    doms: Doms, start: Start, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does there has begun, and nobody can be told yet to give up: so it is told again."""
    holder = start(hold, path, "a")
    assert holder.hear() == "held"
    begun, go, there = threading.Event(), threading.Event(), asking._work_there

    def late(done: Any, *rest: Any) -> None:
        assert done.set_running_or_notify_cancel()
        begun.set()
        go.wait(DEADLINE)
        monkeypatch.setattr(done, "set_running_or_notify_cancel", lambda: True, raising=False)
        there(done, *rest)

    monkeypatch.setattr(asking, "_work_there", late)

    async def main() -> None:
        task = asyncio.create_task(doms.define(xml("a", memory=7)))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        assert await ended(task) is asyncio.CancelledError

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
