"""Faults of events harm nothing but events: the event lock's holder is stopped or dead, and bits of
what that lock protects are flipped.

Somebody holds the mutex behind the library's back, as a stopped holder would. What `check` says of
damage is in test_core_check.py; kills at random are in test_event_kills.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from killing import DEADLINE, Child, Pipe, Planted, hold, hold_mutex, sealed, soon, xml

from shmdomains import (
    DomainDef,
    DomainList,
    DomainState,
    EventType,
    LockOrder,
    LockTimeout,
    SegmentFull,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

SLICES = 0.5
"""Seconds: a few slices, of 50 ms each, and few beside one for each of many domains."""


@pytest.fixture
def doms(path: str) -> Iterator[DomainList]:
    with DomainList.create(path=path, max_domains=100, max_bytes=8 << 20) as doms:
        for name in "abc":
            doms.define(xml(name))
        yield doms


def told(doms: DomainList, since: int = 0) -> list[str]:
    return [f"{event.name}: {event.words}" for event in doms.watch(since=since, timeout=0)]


def toggle(doms: DomainList, name: str = "a") -> None:
    with doms.get(name) as dom:
        dom.autostart = not dom.autostart


def sound(doms: DomainList) -> None:
    report = doms.check()
    assert report, report.problems


# --- a signal handler forks in the wait for the event lock ---------------------------------------


def change(doms: DomainList) -> None:
    with doms.get("a") as dom:
        dom.definition = dom.definition.replace(memory=7777)
        dom.data = "new" * 100
        dom.autostart = True


def rename(doms: DomainList) -> None:
    with doms.locked(), doms.get("a") as dom:
        doms.rename(dom, "z")


DEEDS: dict[str, Callable[[DomainList], Any]] = {
    "change": change,
    "insert": lambda doms: doms.define(xml("d", memory=7777, title="new" * 100)),
    "rename": rename,
    "remove": lambda doms: doms.undefine("a"),
}


def do_and_fork(pipe: Pipe, path: str, deed: str) -> None:
    """The handler's child ends first, then the deed goes on."""

    def fork(*_: object) -> None:
        child = os.fork()
        if child:
            pipe.say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    doms, status, parent = DomainList.attach(path=path), 1, os.getpid()
    doms.peek("a"), doms.check()  # what is imported late is there
    signal.signal(signal.SIGUSR1, fork)
    try:
        DEEDS[deed](doms)
        pipe.say("done")
    except LockOrder:
        status = 0
        if os.getpid() == parent:
            raise
    finally:
        if os.getpid() != parent:
            os._exit(status)
    pipe.rest()


@pytest.mark.parametrize("deed", DEEDS)
def test_a_child_that_a_signal_handler_forks_leaves_its_parents_blobs(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str, deed: str
) -> None:
    mutex = planted.header("event_mutex")
    holder = start(hold_mutex, path, mutex)
    assert holder.hear() == 0
    writer = start(do_and_fork, path, deed)
    planted.await_waiter(mutex)
    writer.signal(signal.SIGUSR1)
    assert writer.hear() == 0
    assert holder.ask() == 0
    assert writer.hear() == "done"
    found = {info.name: info for info in doms}
    assert sorted(found) == {"change": ["a", "b", "c"], "insert": ["a", "b", "c", "d"],
                             "rename": ["b", "c", "z"], "remove": ["b", "c"]}[deed]  # fmt: skip
    if deed == "change":
        assert (found["a"].definition.memory, found["a"].data) == (7777, "new" * 100)
    elif deed == "insert":
        assert (found["d"].definition.memory, found["d"].definition.title) == (7777, "new" * 100)
    elif deed == "rename":
        assert found["z"].definition.name == "z"
    sound(doms)
    assert doms.check().counts["garbage"] == 0


# --- damaged words --------------------------------------------------------------------------------


def problems(doms: DomainList) -> set[str]:
    return {invariant for invariant, _ in doms.check().problems}


@pytest.mark.parametrize("bit", [0, 3, 35, 36, 63])
def test_a_damaged_count_is_made_anew(doms: DomainList, planted: Planted, bit: int) -> None:
    toggle(doms)
    count, known = doms._event_count, told(doms)
    planted.flip(planted.header("event_count"), bit, 8)
    assert problems(doms) == {"E1 events"}
    toggle(doms)
    assert planted.read(planted.header("event_count")) == sealed(count + 1)
    sound(doms)
    assert told(doms) == [*known, "a: Autostart Disabled"]


def test_a_damaged_count_does_not_go_back(doms: DomainList, planted: Planted) -> None:
    """The last event has no entry, as where there is no memory for it: its domain knows it."""
    toggle(doms, "b")
    count = doms._event_count
    planted.write(planted.event(count, "number"), 0)
    planted.flip(planted.header("event_count"), 1, 8)
    toggle(doms)
    assert told(doms, count) == ["a: Autostart Enabled"]
    sound(doms)


@pytest.mark.parametrize("bit", [0, 8, 40])
def test_a_damaged_watermark_is_made_anew(doms: DomainList, planted: Planted, bit: int) -> None:
    known = told(doms)
    at = planted.header("ring_committed")
    before = planted.read(at)
    planted.flip(at, bit, 8)
    assert problems(doms) == {"E1 events"}
    toggle(doms)
    assert planted.read(at) == before
    sound(doms)
    assert told(doms) == [*known, "a: Autostart Enabled"]


def test_a_damaged_watermark_of_a_larger_ring(doms: DomainList, planted: Planted) -> None:
    """It begins again, and gets as far as the next event in as many steps as it takes."""
    for _ in range(600):
        toggle(doms)
    at, known = planted.header("ring_committed"), told(doms)
    before = planted.watermark(at)
    assert before > 512
    planted.flip(at, 9, 8)
    toggle(doms)
    assert planted.watermark(at) == before
    sound(doms)
    assert told(doms) == [*known, "a: Autostart Enabled"]


def test_what_is_not_published_is_no_event(doms: DomainList, planted: Planted) -> None:
    count = doms._event_count
    assert doms._event(count) is not None
    for number in (0, count + 1, count + 2**36, count + 2**56):
        assert doms._event(number) is None
    # Its entry is whole, and its commit may not have happened.
    with planted.changed(planted.header("event_count"), sealed(count - 1)):
        assert doms._event(count - 1) is not None
        assert doms._event(count) is None


EVERYTHING: dict[str, Callable[[DomainList], Any]] = {
    **DEEDS,
    "autostart": toggle,
    "start and stop": lambda doms: start_and_stop(doms),
    "job": lambda doms: with_a_job(doms),
    "recover": lambda doms: doms.recover(),
}


def start_and_stop(doms: DomainList) -> None:
    with doms.get("b") as dom:
        dom.activate(state=DomainState.PAUSED)
        dom.commit()
        dom.deactivate()


def with_a_job(doms: DomainList) -> None:
    with doms.job("b", "backup"):
        pass


@pytest.mark.parametrize("deed", EVERYTHING)
def test_a_damaged_event_lock_refuses_nothing(
    doms: DomainList, planted: Planted, deed: str
) -> None:
    """There are no events any more, and `check` says why."""
    count, known = doms._event_count, told(doms)
    kind = planted.header("event_mutex") + planted.at["mutex.__data.__kind"]
    planted.flip(kind, 2)
    EVERYTHING[deed](doms)
    report = doms.check()
    assert [(name, "events' lock" in text) for name, text in report.problems] == [("locks", True)]
    assert report.unsettled == []
    assert doms._event_count == count and told(doms) == known
    planted.flip(kind, 2)
    sound(doms)
    toggle(doms, "c")
    assert told(doms, count) == ["c: Autostart Enabled"]


def test_the_dead_are_recovered_where_the_event_lock_is_damaged(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    victim = start(hold, path, "a")
    assert victim.hear() == victim.pid
    victim.kill()
    planted.flip(planted.header("event_mutex") + planted.at["mutex.__data.__kind"], 2)
    [repair] = doms.recover().repairs
    assert repair.died is not None and (repair.name, repair.died.pid) == ("a", victim.pid)


def test_who_watches_where_the_event_lock_is_damaged(doms: DomainList, planted: Planted) -> None:
    """It sleeps, and gets neither errors nor a verdict on what a dead writer left."""
    count = doms._event_count
    with (
        planted.changed(planted.header("event_count"), sealed(count - 1)),
        planted.changed(planted.header("event_mutex") + planted.at["mutex.__data.__kind"], 0, 4),
    ):
        report = doms.check()
        assert [name for name, _ in report.problems] == ["locks"]
        assert [name for name, _ in report.unsettled] == ["E1 events"]
        before = time.thread_time()
        assert not doms._sleep_on_events(count - 1, 1)
        assert list(doms.watch(since=count - 1, timeout=0.2)) == []
        assert time.thread_time() - before < 0.1  # it does not look again and again
    assert [event.number for event in doms.watch(since=count - 1, timeout=0)] == [count]


def test_a_domain_with_a_damaged_name_can_be_stopped(doms: DomainList, planted: Planted) -> None:
    with doms.get("b") as dom:
        id = dom.activate()
    count, at = doms._event_count, planted.name(1, 0)
    with planted.changed(at, planted.read(at) ^ 1 << 8):
        with doms.get(id=id) as dom:
            dom.deactivate()
        [event] = doms.watch(since=count, timeout=0)
        assert (event.type, event.id, event.name) == (EventType.STOPPED, id, "")  # type: ignore[union-attr]
    sound(doms)


# --- deaths ---------------------------------------------------------------------------------------


def test_the_event_of_a_death_outlives_who_made_it(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    """A recoverer is killed between `died_who` and `event_count`: it has not signed yet."""
    victim = start(hold, path, "a")
    assert victim.hear() == victim.pid
    victim.kill()
    recoverer = start(hold, path, "a")
    recoverer.hear()
    count = doms._event_count
    mutex = start(hold_mutex, path, planted.header("event_mutex"))
    assert mutex.hear() == 0
    recoverer.kill()
    mutex.kill()
    planted.write(planted.slot(0, "owner") + planted.at["owner.who"], 0)
    planted.write(planted.header("event_count"), sealed(count - 1))
    with doms.get("a", timeout=DEADLINE) as dom:
        assert dom.previous_owner_died.pid == victim.pid
    doms.recover()
    [event] = doms.watch(since=count - 1, timeout=0)
    assert event.type is EventType.HOLDER_DIED  # type: ignore[union-attr]
    assert event.holder.pid == victim.pid  # type: ignore[union-attr]
    sound(doms)


def many_dead(start: Callable[..., Child], doms: DomainList, path: str) -> list[str]:
    """Forty domains whose holder died."""
    names = [f"x{number}" for number in range(40)]
    for name in names:
        doms.define(xml(name))
    victim = start(hold, path, "list", *names)
    victim.hear()
    victim.kill()
    doms.lock(DEADLINE)
    doms.unlock()
    return names


def test_many_dead_where_the_event_locks_holder_is_stopped(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    names = many_dead(start, doms, path)
    holder = start(hold_mutex, path, planted.header("event_mutex"))
    assert holder.hear() == 0
    with soon("to recover", SLICES):
        report = doms.recover(timeout=0.1)
    assert [repair.name for repair in report.repairs] == names
    assert [lock.lock for lock in report.held] == ["event"]
    assert holder.ask() == 0
    sound(doms)


def test_room_where_the_event_locks_holder_is_stopped(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    """A commit that finds no room takes the locks of the dead, to free what they left."""
    many_dead(start, doms, path)
    holder = start(hold_mutex, path, planted.header("event_mutex"))
    assert holder.hear() == 0
    with doms.get("a") as dom:
        dom.data = "x" * (9 << 20)
        with soon("to look for room", SLICES), pytest.raises(SegmentFull):
            dom.commit(timeout=0.1)
    assert holder.ask() == 0
    sound(doms)


def test_commits_time_out_where_the_event_locks_holder_is_stopped(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    """As a whole: nothing is left of them, and nothing was told."""
    count, cells = doms._event_count, doms.check().counts["cells"]
    holder = start(hold_mutex, path, planted.header("event_mutex"))
    assert holder.hear() == 0
    with soon("the time-outs", 4):
        with doms.get("a") as dom:
            dom.activate()
            dom.definition = dom.definition.replace(title="x" * 1000)
            with pytest.raises(LockTimeout):
                dom.commit(timeout=0.1)
            dom.data = None  # no event: needs no event lock
            dom.commit(timeout=0)
        with doms.locked(), pytest.raises(LockTimeout):
            doms.assign_def(DomainDef.from_xml(xml("d", title="x" * 1000)), timeout=0.1)
    assert holder.ask() == 0
    assert doms._event_count == count and doms.check().counts["cells"] == cells
    sound(doms)
