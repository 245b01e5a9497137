"""The plain API in greenlets (`shmdomains.green`): who excludes whom, which greenlets it is about,
and what they call. How they wait and end stands in test_green_ends.py.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from greens import (
    HOWS,
    LEAVES_NOTHING,
    LOCKS,
    LONG,
    Ticks,
    begin,
    exclude,
    keep,
    play,
    queued,
    together,
)
from killing import DEADLINE, Pipe, xml
from tasks import NAMES, Start, new_list, taken

from shmdomains import (
    AlreadyLocked,
    DomainDef,
    DomainList,
    DomainNotLocked,
    ListNotLocked,
    LockOrder,
    LockTimeout,
    MutexNotLocked,
    NotOwner,
    TooManyLocks,
    WaitTimeout,
    green,
)
from shmdomains.memory.rooms import SLICE

pytestmark = LEAVES_NOTHING

# --- who excludes whom ------------------------------------------------------------------------


@pytest.mark.parametrize("what", LOCKS)
@pytest.mark.parametrize("how", HOWS)
def test_two_greenlets_exclude_each_other_and_the_hub_goes_on(
    start: Start, path: str, how: str, what: str
) -> None:
    play(start, path, how, exclude, what)


def in_order(doms: DomainList, what: str) -> list[int]:
    import gevent

    order: list[int] = []

    def one(number: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(2):  # whoever frees it comes last
                with LOCKS[what](doms):
                    gevent.sleep(0)
                    order.append(number)

        return run

    together(*map(one, range(20)))
    return order


@pytest.mark.parametrize("what", ["get", "locked", "mutex"])
def test_they_get_it_in_the_order_in_which_they_came(start: Start, path: str, what: str) -> None:
    assert play(start, path, "green", in_order, what) == [*range(20)] * 2


def all_at_once(doms: DomainList) -> None:
    from gevent.event import Event

    inside, full = set[str](), Event()

    def one(name: str) -> Callable[[], None]:
        def run() -> None:
            with doms.get(name) as dom:
                inside.add(dom.name)
                if len(inside) == len(NAMES):
                    full.set()
                assert full.wait(DEADLINE)

        return run

    together(*map(one, NAMES))


@pytest.mark.parametrize("how", HOWS)
def test_different_domains_at_the_same_time(start: Start, path: str, how: str) -> None:
    play(start, path, how, all_at_once)


def errors_of_its_own(doms: DomainList) -> None:
    with doms.mutex("m"), pytest.raises(LockOrder):
        doms.mutex("n").lock()
    with doms.job("a", "backup"), pytest.raises(AlreadyLocked, match="this task holds job"):
        doms.job("a", "again", timeout=DEADLINE).__enter__()
    with doms.locked(), pytest.raises(AlreadyLocked, match="this task"):
        doms.lock()
    with doms.get("a") as dom:
        with pytest.raises(AlreadyLocked, match="this task"):
            dom.lock()
        for wait in (
            lambda: doms.get("b"),
            lambda: doms.lock(),
            lambda: doms.lock_many(["b", "c"]),
            lambda: doms.job("b", "x").__enter__(),
            lambda: doms.wait("b"),
        ):
            with pytest.raises(LockOrder):
                wait()
        doms.get("b", timeout=0).unlock()


def errors_of_another(doms: DomainList) -> None:
    def other() -> None:
        assert not dom.is_locked and not mutex.is_locked
        with pytest.raises(DomainNotLocked, match="another task of this thread"):
            _ = dom.data
        with pytest.raises(NotOwner, match="lock, use and unlock in one task"):
            dom.unlock()
        with pytest.raises(NotOwner, match="lock, use and unlock in one task"):
            mutex.unlock()
        with pytest.raises(NotOwner, match="another thread's or task's"):
            job.progress(1)
        with pytest.raises(LockTimeout, match="domain 'a' is locked; held by process"):
            doms.get("a", timeout=0)
        assert not dom.try_lock() and not mutex.try_lock()
        with doms.get("c"):  # to this one all is allowed
            pass

    def third() -> None:
        assert not doms.is_locked and not doms.acquire(False)
        with pytest.raises(NotOwner, match="another task of this thread"):
            doms.unlock()
        with pytest.raises(ListNotLocked):
            doms.find_by_name("a")

    def hold_them() -> None:
        nonlocal dom, mutex, job
        with doms.mutex("m") as mutex, doms.job("b", "backup") as job:
            with doms.get("a") as dom:
                dom.data = 1
                together(other)
                assert dom.data == 1
            with doms.locked():
                together(third)
        with pytest.raises(MutexNotLocked, match="this task"):
            mutex.unlock()

    dom = mutex = job = None  # type: Any
    together(hold_them)


@pytest.mark.parametrize("body", [errors_of_its_own, errors_of_another])
@pytest.mark.parametrize("how", HOWS)
def test_rules_hold_per_greenlet(
    start: Start, path: str, how: str, body: Callable[[DomainList], None]
) -> None:
    play(start, path, how, in_a_greenlet, body)


def in_a_greenlet(doms: DomainList, body: Callable[[DomainList], None]) -> None:
    together(lambda: body(doms))


def too_many(_: DomainList) -> None:
    from gevent.event import Event

    leave, full, held = Event(), Event(), list[int]()
    with DomainList(max_domains=2100) as doms:
        for number in range(2010):
            doms.define(xml(f"d{number}"))
        infos = doms.snapshot()

        def hog(part: int) -> Callable[[], None]:
            def run() -> None:
                with doms.lock_many(infos[part * 1000 : (part + 1) * 1000]) as many:
                    held.append(len(many))
                    if len(held) == 2:
                        full.set()
                    assert leave.wait(DEADLINE)

            return run

        def one_more() -> None:
            with pytest.raises(TooManyLocks, match="this task holds 1000 locks"):
                doms.lock_many(infos[:1001])
            assert full.wait(DEADLINE)
            with pytest.raises(TooManyLocks, match="the tasks of this thread hold 2000 locks"):
                doms.get(infos[2005])
            leave.set()

        together(one_more, hog(0), hog(1))
        assert held == [1000, 1000]


def test_too_many_locks(start: Start, path: str) -> None:
    play(start, path, "green", too_many)


# --- which greenlets --------------------------------------------------------------------------


def raw_greenlets(pipe: Pipe, path: str) -> None:
    """Those of no hub."""
    from greenlet import getcurrent, greenlet

    with new_list(path) as wrapped:
        doms = wrapped.plain

        def other() -> None:
            with doms.get("b") as dom:
                dom.data = 1
            with pytest.raises(AlreadyLocked, match=r"held by another task of this thread.*green"):
                doms.get("a")
            with pytest.raises(AlreadyLocked, match="never end"):
                doms.mutex("m").lock(LONG)
            with pytest.raises(LockTimeout):
                doms.get("a", timeout=0)

        def first() -> None:
            with doms.mutex("m"), doms.get("a") as dom:
                dom.data = 1
                greenlet(other).switch()
                getcurrent().parent.switch()
                dom.data = 2

        holder = greenlet(first)
        holder.switch()
        with pytest.raises(AlreadyLocked, match=r"shmdomains\.green"):
            doms.get("a")
        holder.switch()
        assert doms.peek("a").data == 2 and taken(doms) == []
    pipe.say("done")


def test_raw_greenlets(start: Start, path: str) -> None:
    """Each is an owner. A wait for another one would never end, and says so."""
    assert start(raw_greenlets, path).hear() == "done"


def patched_after_the_fork(pipe: Pipe, path: str) -> None:
    """As gunicorn does with --preload: attach, fork, patch."""
    with new_list(path) as doms, doms.plain.get("b"):
        child = os.fork()
        if not child:
            status = 1
            try:
                begin("patched")
                exclude(doms.plain, "get")
                with pytest.raises(LockTimeout):
                    doms.plain.get("b", timeout=SLICE)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    pipe.say("done")


def test_patched_after_the_fork(start: Start, path: str) -> None:
    assert start(patched_after_the_fork, path).hear() == "done"


def patched_too_late(pipe: Pipe, path: str) -> None:
    with new_list(path) as wrapped:
        begin("patched")
        green.patch()
        exclude(wrapped.plain, "get")
        green.patch()
        exclude(wrapped.plain, "locked")
    pipe.say("done")


def test_patched_after_attaching(start: Start, path: str) -> None:
    """Then it has to be said."""
    assert start(patched_too_late, path).hear() == "done"


def pool_threads(doms: DomainList) -> None:
    import gevent
    from gevent.event import Event

    pool, ticks, leave = gevent.get_hub().threadpool, Ticks(), Event()
    holder = keep(doms, "get", leave)

    def add() -> None:
        with doms.get("a") as dom:
            dom.data = (dom.data or 0) + 1

    async_results = [pool.spawn(add) for _ in range(4)]
    while [lock.waiting for lock in doms.locks()] != [4]:
        ticks.more(1)
    with pytest.raises(LockTimeout):
        pool.apply(lambda: doms.get("a", timeout=SLICE))
    leave.set()
    gevent.joinall([holder, *async_results], raise_error=True)
    calls = [lambda: pool.apply(add), add] * 20
    together(*calls)
    ticks.stop()
    assert doms.peek("a").data == 44


@pytest.mark.parametrize("how", HOWS)
def test_threads_of_the_pool_block_as_threads(start: Start, path: str, how: str) -> None:
    play(start, path, how, pool_threads)


@pytest.mark.parametrize("how", HOWS)
def test_hubs_of_two_threads(start: Start, path: str, how: str) -> None:
    play(start, path, how, two_hubs)


def two_hubs(doms: DomainList) -> None:
    import gevent
    from gevent import monkey

    real = monkey.get_original("threading", "Thread")

    def add() -> None:
        for _ in range(20):
            with doms.get("a") as dom:
                before = dom.data or 0
                gevent.sleep(0)
                dom.data = before + 1

    def run() -> None:
        together(*[add] * 5)
        gevent.get_hub().destroy(destroy_loop=True)

    if monkey.is_module_patched("threading"):
        results = [gevent.get_hub().threadpool.spawn(run) for _ in range(2)]
        together(*[add] * 5)
        gevent.joinall(results, raise_error=True)
    else:
        threads = [real(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        together(*[add] * 5)
        for thread in threads:
            while thread.is_alive():
                gevent.sleep(0.001)
    assert doms.peek("a").data == 300


def many_hubs(doms: DomainList) -> list[int]:
    import gevent

    counts = []

    def run() -> None:
        exclude(doms, "get")
        gevent.get_hub().destroy(destroy_loop=True)

    for _ in range(6):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        gc.collect()
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts


def test_hubs_that_are_destroyed(start: Start, path: str) -> None:
    """One of them at most is remembered, with its descriptor."""
    counts = play(start, path, "green", many_hubs)
    assert len(set(counts)) == 1, counts


def without_gevent(pipe: Pipe) -> None:
    sys.modules["gevent"] = None  # type: ignore[assignment]
    with pytest.raises(ImportError, match=r"pip install 'shmdomains\[gevent\]'"):
        green.patch()
    with DomainList(max_domains=4) as doms:
        doms.define(xml("a"))
    pipe.say("done")


def test_without_gevent(start: Start) -> None:
    assert start(without_gevent).hear() == "done"


# --- what they call ---------------------------------------------------------------------------


def waits_for_changes(doms: DomainList) -> None:
    import gevent

    ticks = Ticks()

    def wait_locked() -> Any:
        with doms.get("a") as dom:
            dom.wait(lambda dom: dom.data == 1, timeout=LONG)
            return dom.data

    def watched() -> Any:
        return next(iter(doms.watch(timeout=LONG))).name

    def in_vain() -> Any:
        with pytest.raises(WaitTimeout, match=r"waited 0\.5 s in vain for domain 'b'"):
            doms.wait("b", until=lambda info: info is None, timeout=0.5)
        return "in vain"

    calls: list[Callable[[], Any]] = [
        lambda: doms.wait("a", until=lambda info: info and info.data == 1, timeout=LONG).data,
        lambda: doms.wait_any(until=lambda info: info.data == 1, timeout=LONG).name,
        wait_locked,
        watched,
        in_vain,
    ]
    waiting = [gevent.spawn(call) for call in calls]
    queued(5)
    ticks.more()
    victim = gevent.spawn(calls[0])
    queued(6)
    victim.kill()
    queued(5)
    with doms.get("a") as dom:
        dom.data, dom.autostart = 1, True
    gevent.joinall(waiting, raise_error=True)
    assert [one.value for one in waiting] == [1, "a", 1, "a", "in vain"]
    ticks.stop()


@pytest.mark.parametrize("how", HOWS)
def test_waits_for_changes(start: Start, path: str, how: str) -> None:
    play(start, path, how, waits_for_changes)


def definitions(_: DomainList, directory: Path) -> tuple[list[str], list[str]]:
    import gevent
    from gevent.event import Event

    directory.joinpath("e.xml").write_text(xml("e"))
    ticks, leave = Ticks(), Event()
    with DomainList(max_domains=64) as doms:
        together(*[lambda: doms.load_all_configs(directory)] * 3)
        names = [*"ab", *(f"f{number}" for number in range(5))]
        together(*[lambda name=name: doms.define(xml(name)) for name in names])
        together(*[lambda name=name: doms.undefine(name) for name in names[2:]])
        with doms.locked():
            dom = doms.assign_def(DomainDef.from_xml(xml("g")))
            doms.rename(dom, "h")
            dom.unlock()
            doms.remove_inactive(dom)
        info = doms.peek("a")
        assert info is not None
        holder = keep(doms, "get", leave)
        changes = [
            gevent.spawn(doms.define, xml("a", info.uuid, 2048)),
            gevent.spawn(doms.undefine, "a"),
        ]
        queued(2)
        ticks.more()
        leave.set()
        gevent.joinall([holder, *changes], raise_error=True)
        ticks.stop()
        assert doms.check().problems == []
        return sorted(info.name for info in doms.snapshot()), sorted(
            file.name for file in directory.glob("*.xml")
        )


@pytest.mark.parametrize("how", HOWS)
def test_definitions_and_files(start: Start, path: str, how: str, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    assert play(start, path, how, definitions, tmp_path / "etc") == (["b", "e"], ["b.xml", "e.xml"])


def elections(doms: DomainList) -> None:
    import gevent

    leads: list[int] = []

    def job(number: int) -> Callable[[threading.Event], None]:
        def run(stop: threading.Event) -> None:
            leads.append(number)
            stop.wait()

        return run

    def until_led(number: int) -> None:
        with gevent.Timeout(DEADLINE):
            while len(leads) < number:
                gevent.sleep(0.001)

    both = [doms.elect("leader", job(number)) for number in range(2)]
    until_led(1)
    first = leads[0]
    gevent.sleep(2 * SLICE)
    assert leads == [first] and both[first].leader and not both[1 - first].leader
    both[first].stop()
    until_led(2)
    assert leads == [first, 1 - first]
    both[1 - first].stop()


@pytest.mark.parametrize("how", HOWS)
def test_an_election(start: Start, path: str, how: str) -> None:
    play(start, path, how, elections)
