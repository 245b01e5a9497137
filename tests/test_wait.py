"""Waiting: nobody polls, and nobody misses what was committed.

What two parties see of each other's changes is in test_conformance.py, for every store and start
method. Here: what a wait needs and leaves, what runs in the middle of it, writers and waiters that
are killed, a thousand waiters, and that sleeping and not being waited for cost what they should.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import resource
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helpers import EVERY_STORE, SOAK, Store, thread_party
from killing import DEADLINE, Child, Pipe, Planted, asleep, soon, until, xml

from shmdomains import (
    DomainList,
    DomainLocked,
    DomainNotFound,
    DomainRemoved,
    DomainState,
    ListClosed,
    LockOrder,
    SegmentCorrupt,
    ShmDomainsError,
    UncommittedChanges,
    WaitTimeout,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

MASK = (1 << 48) - 1  # of a count, as layout.h has it
NEVER: Callable[[Any], object] = lambda _: False  # noqa: E731


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def every(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A list of every store, with the inactive domains `a` and `b`."""
    store: Store = request.param
    doms = store.make()
    doms.define(xml("a"))
    doms.define(xml("b"))
    yield doms
    if not doms.closed:
        assert held_of(doms) == []
        assert doms.check().problems == []
        doms.close()


def held_of(doms: Any) -> list[str]:
    """What somebody holds, as another thread finds it."""
    found: list[str] = []

    def look() -> None:
        if not doms.acquire(False):
            found.append("list")
            return
        doms.release()
        for info in doms.snapshot():
            dom = doms._handle_of(info)
            if dom.acquire(False):
                dom.release()
            else:
                found.append(info.name)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found


@contextmanager
def meanwhile(deed: Callable[[], Any], after: float = 0.03) -> Iterator[None]:
    """Somebody else does this in a moment, when who waits is asleep most probably."""
    timer = threading.Timer(after, deed)
    timer.start()
    yield
    timer.join()


def set_data(doms: Any, name: str, value: Any) -> None:
    with doms.get(name=name) as dom:
        dom.data = value


# --- what it returns and raises ----------------------------------------------------------------


def test_until_is_asked_at_once_and_after_each_change(every: Any) -> None:
    seen: list[Any] = []

    def answer(info: Any) -> bool:
        seen.append(info.data)
        if info.data != 3:  # so that each change is made when the one before was seen
            threading.Timer(0.01, set_data, (every, "a", (info.data or 0) + 1)).start()
        return bool(info.data == 3)

    info = every.wait("a", until=answer, timeout=DEADLINE)
    assert info.data == 3 and seen == [None, 1, 2, 3]
    assert every.wait("a", until=lambda info: info.data == 3, timeout=0).data == 3


def test_without_until_the_next_change_ends_it(every: Any) -> None:
    with meanwhile(lambda: set_data(every, "a", 1)):
        assert every.wait("a", timeout=DEADLINE).data == 1
    with meanwhile(lambda: every.undefine("a")):
        assert every.wait("a", timeout=DEADLINE) is None
    with pytest.raises(WaitTimeout):
        every.wait("b", timeout=0)


def test_keys_are_as_for_get(every: Any) -> None:
    info = every.peek(name="a")
    with every.get(name="a") as dom:
        number = dom.activate()
    for keys in (("a",), (info.uuid,), (info.uuid.bytes,), (info,), (dom,), (number,)):
        assert every.wait(*keys, until=bool, timeout=0).name == "a"
    for named in ({"name": "a"}, {"uuid": info.uuid}, {"uuid": str(info.uuid)}, {"id": number}):
        assert every.wait(**named, until=bool, timeout=0).name == "a"
    odd = "c7a5fdbd-edaf-9455-926a-d65c16db1809"  # a name in a UUID's form
    every.define(xml(odd))
    assert every.wait(name=odd, until=bool, timeout=0).name == odd
    with pytest.raises(DomainNotFound, match="no domain with matching name 'c'"):
        every.wait("c")
    with pytest.raises(DomainNotFound, match="no domain with matching uuid"):
        every.wait(odd)
    with pytest.raises(DomainNotFound, match="no domain with matching id 4711"):
        every.wait(id=4711)
    for wrong in (((), {}), (("a",), {"name": "a"})):
        with pytest.raises(TypeError, match="exactly one"):
            every.wait(*wrong[0], **wrong[1])
    with pytest.raises(ValueError, match="timeout is -1"):
        every.wait("a", timeout=-1)


def test_removal_is_asked_for_once(every: Any) -> None:
    seen: list[Any] = []
    with (
        meanwhile(lambda: every.undefine("a")),
        pytest.raises(DomainRemoved, match="cannot come any more"),
    ):
        every.wait("a", until=lambda info: seen.append(info), timeout=DEADLINE)
    assert [info and info.name for info in seen] == ["a", None]
    with meanwhile(lambda: every.undefine("b")):
        assert every.wait("b", until=lambda info: info is None, timeout=DEADLINE) is None


def test_a_domain_that_comes_back_is_another_one(every: Any) -> None:
    uuid = every.peek("a").uuid

    def replace() -> None:
        every.undefine("a")
        every.define(xml("a", uuid))

    with meanwhile(replace), pytest.raises(DomainRemoved):
        every.wait("a", until=NEVER, timeout=DEADLINE)


def test_the_domain_is_followed_and_not_the_key(every: Any) -> None:
    def rename() -> None:
        with every.locked(), every.get("a") as dom:
            every.rename(dom, "z")

    seen: list[str] = []

    def answer(info: Any) -> bool:
        seen.append(info.name)
        return bool(info.data == 1)

    with meanwhile(rename), meanwhile(lambda: set_data(every, "z", 1), 0.1):
        every.wait("a", until=answer, timeout=DEADLINE)
    assert seen == ["a", "z", "z"]


def test_a_time_out_says_what_the_domain_is(every: Any) -> None:
    with pytest.raises(
        WaitTimeout, match=r"waited 0.02 s in vain for domain 'a', which is shut of"
    ):
        every.wait("a", until=NEVER, timeout=0.02)
    with every.get("a") as dom:
        dom.activate(state=DomainState.PAUSED)
    with pytest.raises(TimeoutError, match=r"'a', which is paused$") as caught:
        every.wait("a", until=NEVER, timeout=0)
    assert isinstance(caught.value, ShmDomainsError)
    with pytest.raises(WaitTimeout, match="for any of 2 domains"):
        every.wait_any(until=NEVER, timeout=0.02)


def test_an_until_that_raises_ends_it(every: Any) -> None:
    def fail(_what: Any) -> bool:
        raise LookupError("no")

    for wait in (every.wait, lambda _, **more: every.wait_any(**more)):
        with pytest.raises(LookupError):
            wait("a", until=fail)
    assert held_of(every) == []
    with pytest.raises(LookupError), every.get("a") as dom:
        dom.wait(fail)
    assert held_of(every) == []


def test_a_clock_that_is_set_back_changes_nothing(
    every: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: -1e9)
    with soon("a wait of 20 ms"), pytest.raises(WaitTimeout):
        every.wait("a", until=NEVER, timeout=0.02)


# --- the whole list ----------------------------------------------------------------------------


def test_any_domain_is_looked_at_once_and_when_it_changed(every: Any) -> None:
    seen: list[tuple[str, Any]] = []

    def answer(info: Any) -> bool:
        seen.append((info.name, info.data))
        return bool(info.data)

    with meanwhile(lambda: set_data(every, "b", 5)):
        assert every.wait_any(until=answer, timeout=DEADLINE).name == "b"
    assert seen == [("a", None), ("b", None), ("b", 5)]


def test_any_may_be_one_that_does_not_exist_yet(every: Any) -> None:
    def change() -> None:
        every.undefine("a")  # of which nobody is told
        every.define(xml("c"))

    with meanwhile(change):
        info = every.wait_any(until=lambda info: info.name == "c", timeout=DEADLINE)
    assert info == every.peek("c")


# --- with the domain locked --------------------------------------------------------------------


def test_the_lock_is_free_while_its_holder_waits(every: Any) -> None:
    with every.get("a") as dom:
        dom.data = 1
        dom.commit()
        with meanwhile(lambda: set_data(every, "a", 2)):
            assert dom.wait(lambda dom: dom.data == 2, timeout=DEADLINE) is None
        assert dom.is_locked and dom.data == 2
        assert held_of(every) == ["a"]
        dom.data = 3
    assert every.peek("a").data == 3


def test_blocks_go_on_after_it(every: Any) -> None:
    outer = every.get("a")
    other = every._handle_of("a")
    with outer, other, outer as dom:
        with meanwhile(lambda: set_data(every, "a", 2)):
            other.wait(lambda dom: dom.data == 2, timeout=DEADLINE)
        with outer:
            dom.data = 3
        assert held_of(every) == ["a"] and every.peek("a").data == 2
    assert not outer.is_locked and not other.is_locked
    assert every.peek("a").data == 3


def test_what_nobody_would_see_must_be_committed_first(every: Any) -> None:
    asked: list[Any] = []
    with pytest.raises(UncommittedChanges), every.get("a") as dom:
        dom.data = 1
        try:
            dom.wait(asked.append, timeout=0)
        finally:
            assert dom.is_locked and dom.data == 1 and not asked
    assert every.peek("a").data is None

    def change(dom: Any) -> None:
        dom.data = 1

    with pytest.raises(UncommittedChanges), every.get("a") as dom:
        dom.wait(change, timeout=DEADLINE)
    assert held_of(every) == []


def test_no_other_lock_is_kept_in_a_sleep(every: Any) -> None:
    with every.locked(), every.get("a") as dom:
        for wait in (
            lambda: dom.wait(NEVER, timeout=1),
            lambda: every.wait("b", timeout=1),
            lambda: every.wait_any(until=NEVER, timeout=1),
        ):
            with pytest.raises(LockOrder, match="this thread holds the list lock and would sleep"):
                wait()
        with pytest.raises(DomainLocked, match=r"use dom.wait\(\)"):
            every.wait("a", timeout=1)
    with every.lock_many(["a", "b"]) as (a, _):
        with pytest.raises(LockOrder, match="holds another domain"):
            a.wait(NEVER, timeout=1)
        assert a.is_locked
    with every.get("a"):
        for wait in (
            lambda: every.wait("b", timeout=1),
            lambda: every.wait_any(until=NEVER, timeout=1),
        ):
            with pytest.raises(LockOrder, match="holds a domain"):
                wait()
        # Asking once sleeps for nobody.
        assert every.wait("b", until=bool, timeout=0).name == "b"
        assert every.wait("a", until=bool, timeout=0).name == "a"
        assert every.wait_any(until=lambda info: info.name == "b", timeout=0).name == "b"


def test_removed_while_its_holder_waits(every: Any) -> None:
    with (
        pytest.raises(DomainRemoved),
        meanwhile(lambda: every.undefine("a")),
        every.get("a") as dom,
    ):
        try:
            dom.wait(NEVER, timeout=DEADLINE)
        finally:
            assert not dom.is_locked
    assert [info.name for info in every] == ["b"]


def test_a_time_out_leaves_it_locked_if_it_is_free(every: Any) -> None:
    for timeout in (0, 0.02):
        with every.get("a") as dom:
            with pytest.raises(WaitTimeout, match=r"'a', which is shut off$"):
                dom.wait(NEVER, timeout=timeout)
            assert dom.is_locked
            dom.data = timeout
        assert every.peek("a").data == timeout


def test_a_time_out_leaves_it_unlocked_if_somebody_keeps_it(every: Any) -> None:
    with thread_party(doms=every) as other, every.get("a") as dom:
        other.start("dom = doms.get('a', timeout=20)")  # it gets it once this one waits
        with pytest.raises(
            WaitTimeout, match=r"shut off and not locked any more \(.*'a'"
        ) as caught:
            dom.wait(NEVER, timeout=0.2)
        assert not dom.is_locked
        assert f"{os.getpid()}" in str(caught.value)
        other.answer()
        with pytest.raises(ShmDomainsError):
            dom.data = 1
        other.tell("dom.unlock(); del dom")


def test_it_needs_the_lock(every: Any) -> None:
    dom = every._handle_of("a")
    with pytest.raises(ShmDomainsError, match="is not locked by this thread"):
        dom.wait(NEVER)


def test_what_the_holder_intends_stays(every: Any) -> None:
    def look() -> None:
        with every.get("a") as dom:
            seen.append(dom.unfinished.name)
            dom.data = 1

    seen: list[str] = []
    with every.get("a") as dom:
        dom.intend("start")
        with meanwhile(look):
            dom.wait(lambda dom: dom.data, timeout=DEADLINE)
        assert dom.unfinished is None and seen == ["start"]
    with every.get("a") as dom:
        assert dom.unfinished is None

    def take_over() -> None:
        with every.get("a") as dom:
            dom.intend("stop")
            dom.data = 2
            dom.commit()
            raise KeyError

    def try_it() -> None:
        with pytest.raises(KeyError):
            take_over()

    with every.get("a") as dom:
        dom.intend("start")
        with meanwhile(try_it):
            dom.wait(lambda dom: dom.data == 2, timeout=DEADLINE)
        assert dom.unfinished.name == "stop"
    with every.get("a") as dom:
        assert dom.unfinished.name == "stop"


def test_a_task_is_still_known_after_it(doms: DomainList) -> None:
    doms.define(xml("a"))

    async def second() -> None:
        with pytest.raises(ShmDomainsError, match="another task of this thread"), doms.get("b"):
            pass

    async def enter() -> None:
        with dom:
            pass

    async def first() -> None:
        nonlocal dom
        dom = doms.get("a")
        with dom:
            with meanwhile(lambda: set_data(doms, "a", 1)):
                dom.wait(lambda dom: dom.data, timeout=DEADLINE)
            with pytest.raises(ShmDomainsError, match="another task of this thread"):
                await asyncio.create_task(enter())

    dom: Any
    asyncio.run(first())
    assert held_of(doms) == []


def hold_and_die(pipe: Pipe, path: str) -> None:
    dom = DomainList.attach(path=path).get("a")
    pipe.say(dom.is_locked)
    pipe.rest()


@pytest.fixture
def named(path: str) -> Iterator[DomainList]:
    with DomainList.create(path=path, max_domains=100) as doms:
        doms.define(xml("a"))
        doms.define(xml("b"))
        yield doms
        assert held_of(doms) == []
        assert doms.check().problems == []


def test_the_notice_of_a_death_is_not_used_up_by_it(
    start: Callable[..., Child], named: DomainList, path: str
) -> None:
    holder = start(hold_and_die, path)
    assert holder.hear()
    holder.kill()
    with named.get("a", timeout=DEADLINE) as dom:
        with pytest.raises(WaitTimeout):
            dom.wait(NEVER, timeout=0.01)
        assert dom.previous_owner_died.pid == holder.pid
    with named.get("a") as dom:
        assert dom.previous_owner_died is None


# --- what runs in the middle -------------------------------------------------------------------


class Bell(Exception):
    """Raised by a signal handler."""


@contextmanager
def handled(handler: Callable[[], Any], after: float = 0.02) -> Iterator[None]:
    """A signal handler that runs once, in a moment."""
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, after)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ring() -> None:
    raise Bell


def wait_locked(doms: Any) -> None:
    with doms.get("a") as dom:
        try:
            dom.wait(lambda dom: dom.data, timeout=DEADLINE)
        except Bell:
            assert not dom.is_locked
            raise


WAITS: dict[str, Callable[[Any], Any]] = {
    "wait": lambda doms: doms.wait("a", until=lambda info: info.data, timeout=DEADLINE),
    "wait any": lambda doms: doms.wait_any(until=lambda info: info.data, timeout=DEADLINE),
    "wait, locked": wait_locked,
}


@pytest.mark.parametrize("way", WAITS)
def test_a_signal_handler_may_end_it(every: Any, way: str) -> None:
    with soon("to be interrupted"), handled(ring), pytest.raises(Bell):
        WAITS[way](every)
    assert held_of(every) == []


@pytest.mark.parametrize("way", WAITS)
def test_a_signal_handler_may_bring_what_is_waited_for(every: Any, way: str) -> None:
    with soon("its own signal handler's change"), handled(lambda: set_data(every, "a", 1)):
        WAITS[way](every)
    assert held_of(every) == []


def test_a_signal_handler_that_keeps_the_domain(doms: DomainList) -> None:
    doms.define(xml("a"))
    kept: list[Any] = []

    def keep() -> None:
        kept.append(doms.get("a"))
        kept[0].data = 1
        kept[0].commit()

    with handled(keep), pytest.raises(ShmDomainsError):
        wait_locked(doms)
    del kept[:]
    assert held_of(doms) == []


def test_a_signal_handler_that_forks(doms: DomainList) -> None:
    """The child's wait ends with an error, the parent's goes on."""
    doms.define(xml("a"))
    children: list[int] = []

    def fork() -> None:
        pid = os.fork()
        if pid:
            children.append(pid)
            threading.Timer(0.05, set_data, (doms, "a", 1)).start()

    parent = os.getpid()
    status = 1
    try:
        with handled(fork):
            try:
                wait_locked(doms)
            except LockOrder:
                status = 0
    finally:
        if os.getpid() != parent:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0


@pytest.mark.parametrize("way", WAITS)
def test_a_list_that_is_closed_meanwhile(store: Store, way: str) -> None:
    doms = store.make()
    doms.define(xml("a"))
    with meanwhile(doms.close), soon("the end of a closed list"), pytest.raises(ListClosed):
        WAITS[way](doms)


def test_a_list_that_is_closed_while_other_threads_wait(store: Store) -> None:
    """Those who run no signal handlers."""
    doms = store.make()
    doms.define(xml("a"))
    with thread_party(doms=doms) as one, thread_party(doms=doms) as two:
        one.start("doms.wait('a', until=lambda info: False)")
        two.start("with doms.get('a') as dom: dom.wait(lambda dom: False)")
        assert one.is_waiting() and two.is_waiting()
        doms.close()
        for party in (one, two):
            with pytest.raises(ListClosed):
                party.answer()


# --- deaths ------------------------------------------------------------------------------------

FUTEX_WAKE = 1
SECCOMP_KILL, SECCOMP_ALLOW = 0x80000000, 0x7FFF0000


def die_at_the_next_wake() -> None:
    """From now on this process is killed as it wakes whoever sleeps on a shared futex: after the
    commit, before anybody is told. (Python's own locks wake with FUTEX_PRIVATE_FLAG.)"""
    number = {"x86_64": 202, "aarch64": 98}[os.uname().machine]

    def instruction(code: int, yes: int, no: int, k: int) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    load, equal, give = 0x20, 0x15, 0x06
    program = b"".join(
        (
            instruction(load, 0, 0, 0),  # seccomp_data.nr
            instruction(equal, 0, 3, number),
            instruction(load, 0, 0, 16 + 8),  # its second argument
            instruction(equal, 0, 1, FUTEX_WAKE),
            instruction(give, 0, 0, SECCOMP_KILL),
            instruction(give, 0, 0, SECCOMP_ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    filter = ctypes.create_string_buffer(
        struct.pack("HP", len(program) // 8, ctypes.addressof(code))
    )
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert prctl(22, 2, ctypes.addressof(filter), 0, 0) == 0, os.strerror(ctypes.get_errno())


DEEDS: dict[str, Callable[[DomainList], Any]] = {
    "data": lambda doms: set_data(doms, "a", 1),
    "activate": lambda doms: activate(doms, "a"),
    "start paused": lambda doms: activate(doms, "a", DomainState.PAUSED),
    "rename": lambda doms: rename(doms, "a", "z"),
    "undefine": lambda doms: doms.undefine("a"),
    "define": lambda doms: doms.define(xml("c")),
}


def activate(doms: DomainList, name: str, state: DomainState = DomainState.RUNNING) -> None:
    with doms.get(name) as dom:
        dom.activate(state=state)


def rename(doms: DomainList, name: str, new: str) -> None:
    with doms.locked(), doms.get(name) as dom:
        doms.rename(dom, new)


def do_and_die(pipe: Pipe, path: str, deed: str, times: int) -> None:
    """Say how far it came. `times` 0: for ever."""
    doms = DomainList.attach(path=path)
    doms.peek("a"), doms.check()  # what is imported late is there
    die_at_the_next_wake()
    pipe.say("ready")
    pipe.listen()
    done = 0
    while done != times or not times:
        DEEDS[deed](doms)
        done += 1
    pipe.say(done)
    pipe.rest()


@pytest.mark.parametrize(
    ("deed", "way"),
    [(deed, "wait") for deed in DEEDS if deed != "define"]
    + [(deed, "any") for deed in DEEDS if deed != "undefine"],
)
def test_a_writer_that_dies_before_it_told_costs_a_slice(
    start: Callable[..., Child], named: DomainList, path: str, deed: str, way: str
) -> None:
    before = {info.name: info for info in named}

    def differs(info: Any) -> bool:
        return bool(info != before.get("a" if info is None else info.name))

    victim = start(do_and_die, path, deed, 1)
    assert victim.hear() == "ready"
    with thread_party(doms=named, differs=differs) as waiter:
        if way == "wait":
            waiter.start("doms.wait('a', until=differs, timeout=20)")
        else:
            waiter.start("doms.wait_any(until=differs, timeout=20)")
        with Planted(path) as planted:
            at = planted.slot(0, "waiting") if way == "wait" else planted.header("any_waiting")
            until(lambda: planted.read(at), "it waits")
        if way == "any":
            with pytest.raises(WaitTimeout):  # it wakes this one first, if the domain was there
                named.wait("a", until=NEVER, timeout=0.01)
        victim.tell()
        victim.join()
        began = time.monotonic()
        waiter.answer()
        assert time.monotonic() - began < 1  # a slice is 50 ms


@pytest.mark.parametrize(
    ("deed", "events"), [("define", 1), ("activate", 1), ("start paused", 2), ("rename", 2)]
)
def test_who_waits_for_the_next_event_is_woken_by_several(
    start: Callable[..., Child], named: DomainList, path: str, deed: str, events: int
) -> None:
    """Whoever sleeps has said that it waits for the number after the last."""
    victim = start(do_and_die, path, deed, 1)
    assert victim.hear() == "ready"
    count = named._event_count
    with Planted(path) as planted:
        planted.write(planted.header("event_waiting"), count + 1)
        victim.tell()
        victim.join()
        assert planted.watermark(planted.header("event_count")) == count + events
    named.recover()


def test_a_writer_without_a_waiter_makes_no_futex_call(
    start: Callable[..., Child], named: DomainList, path: str
) -> None:
    """It would be killed for it, and is as soon as somebody waits. That somebody has waited, and
    was killed or gave up, costs one call at most."""
    with pytest.raises(WaitTimeout):
        named.wait("a", until=NEVER, timeout=0.01)
    with pytest.raises(WaitTimeout):
        named.wait_any(until=NEVER, timeout=0.01)
    set_data(named, "a", 0)  # the one call
    writer = start(do_and_die, path, "data", 2000)
    assert writer.hear() == "ready"
    assert writer.ask() == 2000
    doomed = start(do_and_die, path, "data", 0)
    assert doomed.hear() == "ready"
    doomed.tell()
    assert named.wait("a", timeout=DEADLINE).data == 1
    with soon("the death of who makes a call"):
        while doomed.is_alive():
            named.wait("a", timeout=DEADLINE)


def wait_a_second(pipe: Pipe, path: str, way: str) -> None:
    doms = DomainList.attach(path=path)
    with pytest.raises(WaitTimeout):
        WAITS_FOR_NOTHING[way](doms, 0.001)  # what is imported late is there
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(WaitTimeout):
        WAITS_FOR_NOTHING[way](doms, 1)
    after = resource.getrusage(resource.RUSAGE_SELF)
    pipe.say((after.ru_nvcsw - before.ru_nvcsw, after.ru_utime - before.ru_utime))


def wait_locked_for_nothing(doms: DomainList, timeout: float) -> None:
    with doms.get("a") as dom:
        dom.wait(NEVER, timeout)


WAITS_FOR_NOTHING: dict[str, Callable[[DomainList, float], Any]] = {
    "wait": lambda doms, timeout: doms.wait("a", until=NEVER, timeout=timeout),
    "wait any": lambda doms, timeout: doms.wait_any(until=NEVER, timeout=timeout),
    "wait, locked": wait_locked_for_nothing,
}


@pytest.mark.parametrize("way", WAITS_FOR_NOTHING)
def test_who_waits_sleeps(
    start: Callable[..., Child], named: DomainList, path: str, way: str
) -> None:
    sleeps, worked = start(wait_a_second, path, way).hear(20)
    assert 1 <= sleeps <= 25, f"{sleeps} sleeps in a second"
    assert worked < 0.1


def follow(pipe: Pipe, path: str, last: int) -> None:
    """Say each value that is seen, up to the last."""
    doms = DomainList.attach(path=path)
    seen: list[int] = []

    def answer(info: Any) -> bool:
        seen.append(info.data)
        if len(seen) == 1:
            pipe.say("waits")
        return bool(info.data == last)

    doms.wait("a", until=answer, timeout=30)
    pipe.say(seen)
    pipe.rest()


def count_up(pipe: Pipe, path: str, last: int) -> None:
    """With others; says which values were its own."""
    doms = DomainList.attach(path=path)
    mine = []
    while True:
        with doms.get("a") as dom:
            if dom.data == last:
                break
            dom.data += 1
            mine.append(dom.data)
        if random.random() < 0.2:
            time.sleep(random.random() / 2000)  # so that waiters fall asleep in between
    pipe.say(mine)
    pipe.rest()


@pytest.mark.soak
def test_storms_with_waiters_that_are_killed(
    start: Callable[..., Child],
    named: DomainList,
    path: str,
    tried: Callable[[str, int], None],
) -> None:
    """Each value is seen or overwritten by a later one, and whoever is alive ends with the last."""
    rounds, last = (60, 1000) if SOAK else (5, 300)
    for number in range(rounds):
        rng = random.Random(number)
        set_data(named, "a", 0)
        waiters = [start(follow, path, last) for _ in range(10)]
        for waiter in waiters:
            assert waiter.hear() == "waits"
        writers = [start(count_up, path, last) for _ in range(3)]
        doomed, living = waiters[:5], waiters[5:]
        for waiter in doomed:
            time.sleep(rng.random() / 100)
            waiter.signal(signal.SIGKILL)
        values = sorted(value for writer in writers for value in writer.hear(30))
        assert values == list(range(1, last + 1))
        for waiter in living:
            seen = waiter.hear()
            assert seen == sorted(seen) and seen[-1] == last
        for child in (*waiters, *writers):
            child.kill()
        tried("waiters killed in a storm", len(doomed))


def wait_in_threads(pipe: Pipe, path: str, count: int) -> None:
    doms = DomainList.attach(path=path)
    ready = threading.Semaphore(0)
    found: list[Any] = []

    def answer(info: Any) -> bool:
        ready.release()
        return bool(info.data == 1)

    def wait() -> None:
        found.append(doms.wait("a", until=answer, timeout=60).data)

    threads = [threading.Thread(target=wait) for _ in range(count)]
    for thread in threads:
        thread.start()
    for _ in threads:
        ready.acquire()
    pipe.say("all wait")
    for thread in threads:
        thread.join()
    pipe.say(found)
    pipe.rest()


def test_a_thousand_waiters_on_one_domain(
    start: Callable[..., Child], named: DomainList, path: str
) -> None:
    crowds = [start(wait_in_threads, path, 250) for _ in range(4)]
    for crowd in crowds:
        assert crowd.hear(60) == "all wait"
    set_data(named, "a", 1)
    for crowd in crowds:
        assert crowd.hear(60) == [1] * 250


def wait_as_a_stranger(pipe: Pipe, path: str) -> None:
    doms = DomainList.attach(path=path)
    pipe.say("attached")
    pipe.say(doms.wait("a", until=lambda info: info.data == 1, timeout=20).data)
    pipe.say(doms.wait_any(until=lambda info: info.data == 2, timeout=20).name)
    pipe.rest()


def test_a_stranger_of_a_multiprocessing_list_may_wait(
    start: Callable[..., Child], path: str
) -> None:
    with DomainList.create(path=path, max_domains=10, lock="multiprocessing") as doms:
        doms.define(xml("a"))
        stranger = start(wait_as_a_stranger, path)
        assert stranger.hear() == "attached"
        until(lambda: asleep(stranger.pid), "it waits")
        set_data(doms, "a", 1)
        assert stranger.hear() == 1
        until(lambda: asleep(stranger.pid), "it waits")
        set_data(doms, "a", 2)
        assert stranger.hear() == "a"
        stranger.kill()


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_a_flipped_bit_in_what_waiters_say(named: DomainList, path: str, bit: int) -> None:
    """No wait misses a change for it, and writers stop making calls for nobody."""
    with Planted(path) as planted:
        for at in (
            planted.slot(0, "waiting"),
            planted.header("any_waiting"),
            planted.header("any_seq"),
        ):
            planted.flip(at, bit, 8)
            for wait in (named.wait, lambda _, **more: named.wait_any(**more)):
                value = random.random()
                with meanwhile(lambda value=value: set_data(named, "a", value)):  # type: ignore[misc]
                    wait("a", until=lambda info, value=value: info.data == value, timeout=DEADLINE)
            for _ in range(3):
                set_data(named, "a", 0)
            cur, seq = planted.slot(0, "cur"), planted.header("any_seq")
            assert planted.read(planted.slot(0, "waiting")) <= (planted.read(cur) & MASK) + 1
            assert planted.read(planted.header("any_waiting")) <= planted.read(seq) + 1


def test_a_damaged_domain_is_told_and_not_passed_over(named: DomainList, path: str) -> None:
    with Planted(path) as planted:
        at = planted.copy(0, "sum") if "fields.sum" in planted.at else planted.slot(0, "cur")
        with planted.changed(at, planted.read(at) ^ 1 << 3):
            for wait in (
                lambda: named.wait("a", until=lambda info: info.is_active, timeout=1),
                lambda: named.wait_any(until=lambda info: info.is_active, timeout=1),
            ):
                with pytest.raises(ShmDomainsError, match=r"damaged|holds a value"):
                    wait()


def test_what_changed_is_told_after_an_error(named: DomainList, path: str) -> None:
    """Whoever calls again has missed nothing."""
    named.define(xml("c"))
    marks = named._marks()
    assert [info.name for info in named._changed(marks)] == ["a", "b", "c"]
    large = "x" * 200  # in the heap
    for name in "abc":
        set_data(named, name, large)
    with Planted(path) as planted, planted.changed(planted.extent(1, 2), 1 << 62 | 1):
        for _ in range(2):
            with pytest.raises(SegmentCorrupt):
                named._changed(marks)
    told = {info.name: info.data for info in named._changed(marks)}
    assert told == dict.fromkeys("abc", large)
    assert named._changed(marks) == []
