"""Events: what a commit makes known, exactly once, in the order of commits, to whoever watches.

The same history is told to shared memory and to a store without a core, whose events the rules
derive in Python (`rules.events`): both say the same. What kills do to events is in
test_event_kills.py and in crash_driver.py.
"""

from __future__ import annotations

import gc
import json
import os
import random
import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from helpers import (
    DEADLINE,
    EVERY_STORE,
    STORES,
    Home,
    Party,
    Store,
    definition,
    with_events,
    xml,
)

from shmdomains import (
    CrashedReason,
    DomainEvent,
    DomainList,
    DomainState,
    EventsMissed,
    EventType,
    Job,
    ListClosed,
    NoEvents,
    PausedReason,
    RunningReason,
    ShutoffReason,
    StartedDetail,
    StoppedDetail,
    events,
)
from shmdomains.rules.watch import is_eventfd

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def doms(request: pytest.FixtureRequest) -> Iterator[Any]:
    store: Store = request.param
    doms = store.make()
    yield doms
    if not doms.closed:
        assert doms.check().problems == []
        doms.close()


def told(doms: Any, since: int = 0) -> list[str]:
    """What happened since, in words."""
    found = []
    for event in doms.watch(since=since, timeout=0):
        assert isinstance(event, DomainEvent), event
        found.append(f"{event.name} {event.id}: {event.words}")
    return found


# --- which events --------------------------------------------------------------------------------


def test_a_long_history(doms: Any, tmp_path: Path) -> None:
    """Define, redefine, start, pause, stop with each reason, rename, undefine, transient ones."""
    doms.load_all_configs(tmp_path)
    watch = doms.watch(timeout=0)

    def news() -> list[str]:
        return [f"{event.name} {event.id}: {event.words}" for event in watch]

    uuid = doms.define(xml("a")).uuid
    doms.define(xml("a", memory=2000))
    assert news() == ["a -1: Defined Added", "a -1: Defined Updated"]
    doms.set_autostart("a", True)
    doms.set_autostart("a", True)
    doms.rename("a", "b")
    assert news() == [
        "a -1: Autostart Enabled",
        "a -1: Undefined Renamed",
        "b -1: Defined Renamed",
    ]
    with doms.get("b") as dom:
        dom.data = {"no": "event"}
        dom.pid = 7
        dom.commit()
        dom.activate(pid=8, reason=RunningReason.RESTORED)
        dom.commit()
        dom.set_state(DomainState.PAUSED, PausedReason.IOERROR)
        dom.commit()
        dom.set_state(DomainState.RUNNING, RunningReason.UNPAUSED)
        dom.commit()
        dom.set_state(DomainState.BLOCKED)
        dom.commit()
        dom.set_state(DomainState.RUNNING, RunningReason.UNPAUSED)
        dom.commit()
        dom.set_state(DomainState.PMSUSPENDED)
        dom.commit()
        dom.set_state(DomainState.RUNNING, RunningReason.WAKEUP)
        dom.commit()
        dom.set_state(DomainState.SHUTDOWN, 1)
    assert news() == [
        "b 1: Started Restored",
        "b 1: Suspended I/O Error",
        "b 1: Resumed Unpaused",
        "b 1: PMSuspended Memory",
        "b 1: Started Event wakeup",
        "b 1: Shutdown Finished",
    ]
    doms.define(xml("b", uuid, memory=3000))
    doms.set_autostart("b", False)
    with doms.get("b") as dom:
        dom.deactivate(ShutoffReason.SHUTDOWN)
    assert news() == ["b 1: Defined Updated", "b 1: Autostart Disabled", "b 1: Stopped Shutdown"]
    for reason, words in zip(
        ShutoffReason,
        [
            "Shutdown",
            "Shutdown",
            "Destroyed",
            "Crashed",
            "Migrated",
            "Saved",
            "Failed",
            "Snapshot",
            "Failed",
        ],
        strict=True,
    ):
        with doms.get("b") as dom:
            id = dom.activate(state=DomainState.PAUSED, reason=PausedReason.USER)
            dom.commit()
            dom.deactivate(reason)
        assert news() == [
            f"b {id}: Started Booted",
            f"b {id}: Suspended Paused",
            f"b {id}: Stopped {words}",
        ]
    with doms.get("b") as dom:
        id = dom.activate()
        dom.commit()
        dom.set_state(DomainState.CRASHED, CrashedReason.PANICKED)
        dom.commit()
        dom.deactivate(ShutoffReason.CRASHED)
        dom.activate()
        dom.deactivate()
    assert news() == [
        f"b {id}: Started Booted",
        f"b {id}: Crashed Panicked",
        f"b {id}: Stopped Shutdown",
    ]
    doms.undefine("b")
    assert news() == ["b -1: Undefined Removed"]
    with doms.locked():
        dom = doms.assign_def(definition("t"))
    assert news() == []
    with dom:
        id = dom.activate()
        dom.persistent = True
        dom.autostart = True
    assert news() == [f"t {id}: Defined Added", f"t {id}: Started Booted",
                      f"t {id}: Autostart Enabled"]  # fmt: skip
    doms.undefine("t")
    with dom:
        dom.deactivate(ShutoffReason.DESTROYED)
    with doms.locked():
        doms.remove_inactive(dom)
    assert news() == [f"t {id}: Undefined Removed", f"t {id}: Autostart Disabled",
                      f"t {id}: Stopped Destroyed"]  # fmt: skip
    doms.define(xml("c"))
    doms.define(xml("d"))
    with doms.get("d") as dom:
        id = dom.activate()
    with doms.locked():
        doms.free()
    assert sorted(news()[3:]) == [
        "c -1: Undefined Removed",
        f"d {id}: Stopped Shutdown",
        f"d {id}: Undefined Removed",
    ]


def test_a_restart_in_one_commit(doms: Any) -> None:
    doms.define(xml("a"))
    with doms.get("a") as dom:
        first = dom.activate()
        dom.commit()
        dom.next_definition = definition("a", dom.uuid, memory=2000)
        dom.commit()
        dom.deactivate(ShutoffReason.DESTROYED)
        second = dom.activate()
    assert told(doms, since=3) == [f"a {first}: Stopped Shutdown", f"a {second}: Started Booted"]


def test_what_is_rolled_back_is_no_event(doms: Any) -> None:
    doms.define(xml("a"))
    with pytest.raises(InterruptedError), doms.get("a") as dom:
        dom.activate()
        dom._note(EventType.JOB_STARTED, 1)
        raise InterruptedError
    with doms.get("a") as dom:
        dom.activate()
        dom.rollback()
    with doms.get("a") as dom:
        dom._note(EventType.JOB_ENDED, Job.DESTROY)
        assert dom.changed
    assert told(doms) == ["a -1: Defined Added", "a -1: Job ended destroy"]


STATES = [state for state in DomainState if state is not DomainState.SHUTOFF]


def test_every_change_of_state_as_the_python_rules_say(tried: Callable[[str, int], None]) -> None:
    """From each state, active or not, to each state with each reason, running on or stopped. The
    reason before is the same, or one of two: a domain that starts up is paused with 11."""
    found = []
    for store in (STORES[0], EVERY_STORE[-1]):
        doms = store.make(room=4)
        doms.define(xml("a", UUID(int=1)))
        words = []
        with doms.get("a") as dom:
            for old, new, first, reason, ends in product(
                STATES, STATES, (None, 0, 11), range(16), (False, True)
            ):
                since = doms._event_count
                dom.activate(state=old, reason=reason if first is None else first)
                dom.commit()
                dom.set_state(new, reason)
                if ends:
                    dom._drop_id()
                dom.commit()
                if not ends:
                    dom.deactivate(reason)
                    dom.commit()
                words.append((old, new, first, reason, ends, *told(doms, since)))
        found.append(words)
        doms.close()
    assert found[0] == found[1]
    tried("changes of state whose events are told", len(found[0]))


@pytest.mark.parametrize("seed", range(6))
def test_any_history_as_the_python_rules_say(seed: int) -> None:
    histories = []
    for store in (STORES[0], EVERY_STORE[-1]):
        doms = store.make()
        chance = random.Random(seed)
        for _ in range(250):
            do_something(doms, chance)
        histories.append(told(doms))
        doms.close()
    assert len(histories[0]) > 100
    assert histories[0] == histories[1]


def do_something(doms: Any, chance: random.Random) -> None:
    name = chance.choice("abcd")
    info = doms.peek(name=name)
    if info is None or chance.random() < 0.1:
        if info is None and chance.random() < 0.3:
            with doms.locked():
                doms.assign_def(definition(name)).unlock()
        else:
            doms.define(xml(name, memory=chance.randrange(1000, 1003)))
        return
    what = chance.randrange(6)
    if what == 0 and (info.persistent or not info.is_active):
        doms.undefine(name)
    elif what == 1 and not info.is_active and doms.peek(name=name * 2) is None:
        doms.rename(name, name * 2)
        with doms.locked():
            doms.remove_inactive(name * 2)
    else:
        with doms.get(name) as dom:
            for _ in range(chance.randrange(1, 4)):
                change(dom, chance)
                if chance.random() < 0.5:
                    dom.commit()


def change(dom: Any, chance: random.Random) -> None:
    reason = chance.randrange(16)
    what = chance.randrange(8)
    if what == 0 and not dom.is_active:
        dom.activate(state=chance.choice(STATES), reason=reason)
    elif what == 1 and dom.is_active:
        dom.deactivate(reason)
    elif what == 2:
        dom.set_state(chance.choice(STATES), reason)
    elif what == 3:
        dom.persistent = chance.random() < 0.5
    elif what == 4:
        dom.autostart = chance.random() < 0.5
    elif what == 5:
        dom.definition = dom.definition.replace(memory=chance.randrange(1000, 2000))
    elif what == 6:
        dom.next_definition = chance.choice([None, dom.definition])
    else:
        dom.data = reason


def test_an_event_as_a_value(doms: Any) -> None:
    before = time.time()
    uuid = doms.define(xml("a")).uuid
    with doms.get("a") as dom:
        id = dom.activate()
    defined, started = doms.watch(since=0, timeout=0)
    assert started == DomainEvent(
        2, started.time, EventType.STARTED, StartedDetail.BOOTED, uuid, "a", id
    )
    assert before <= defined.time <= started.time <= time.time()
    assert json.loads(json.dumps(started.to_dict())) == {
        "number": 2, "time": started.time, "event": "lifecycle", "type": "started",
        "detail": "booted", "uuid": str(uuid), "name": "a", "id": id,
    }  # fmt: skip
    assert defined.to_dict()["id"] is None


def test_the_numbers_and_words_are_libvirts() -> None:
    libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not there to compare with")
    for type in EventType:
        if type < 100:
            assert getattr(libvirt, f"VIR_DOMAIN_EVENT_{type.name}") == type
            for detail in events.DETAILS[type]:
                name = f"VIR_DOMAIN_EVENT_{type.name}_{detail.name}"
                assert getattr(libvirt, name, detail) == detail


# --- watching ------------------------------------------------------------------------------------


def test_from_the_call_on(doms: Any) -> None:
    doms.define(xml("a"))
    watch = doms.watch(timeout=0)
    doms.define(xml("b"))
    assert [event.name for event in watch] == ["b"]
    assert list(watch) == []
    doms.define(xml("c"))
    assert [event.name for event in watch] == ["c"]  # it goes on
    assert watch.since == 3


def test_from_a_number_on(doms: Any) -> None:
    for name in "abc":
        doms.define(xml(name))
    assert [event.name for event in doms.watch(since=0, timeout=0)] == ["a", "b", "c"]
    assert [event.name for event in doms.watch(since=2, timeout=0)] == ["c"]
    assert list(doms.watch(since=3, timeout=0)) == []
    with pytest.raises(ValueError, match="since is 4, and the list's last event is number 3"):
        doms.watch(since=4)
    with pytest.raises(ValueError, match="counted from 1 on"):
        doms.watch(since=-1)
    with pytest.raises(ValueError, match="timeout is -1"):
        doms.watch(timeout=-1)


def test_a_time_out_is_for_each_event(doms: Any) -> None:
    watch = doms.watch(timeout=0.2)
    for _ in range(3):
        doms.define(xml("a"))
        assert next(watch).name == "a"
    began = time.monotonic()
    assert list(watch) == []
    assert 0.2 <= time.monotonic() - began < DEADLINE


def test_a_waiting_watch_is_woken(doms: Any) -> None:
    found: list[Any] = []
    watch = doms.watch()

    def follow() -> None:
        for event in watch:
            found.append(event.name)
            if event.name == "z":
                return

    thread = threading.Thread(target=follow)
    thread.start()
    for name in ("a", "b", "z"):
        doms.define(xml(name))
    thread.join(DEADLINE)
    assert found == ["a", "b", "z"]


def test_a_watch_of_a_closed_list(doms: Any) -> None:
    watch = doms.watch()
    doms.close()
    with pytest.raises(ListClosed):
        next(watch)


def test_a_slow_reader_is_told_how_many_it_missed(doms: Any) -> None:
    few = with_events(doms, 64)
    watch = few.watch(timeout=0)
    uuid = few.define(xml("a")).uuid
    for number in range(99):
        few.define(xml("a", uuid, memory=1000 + number))
    missed, *rest = watch
    assert missed == EventsMissed(36, 36)
    assert [event.number for event in rest] == list(range(37, 101))
    few.define(xml("a", uuid))
    assert [event.number for event in watch] == [101]
    assert next(few.watch(since=30, timeout=0)) == EventsMissed(7, 37)
    assert next(iter(few.watch(since=37, timeout=0))).number == 38
    few.close()


def test_missed_while_it_reads(doms: Any) -> None:
    """The ring goes round between two events that it takes: what it has is not lost again."""
    few = with_events(doms, 64)
    uuid = few.define(xml("a")).uuid
    watch = few.watch(since=0, timeout=0)
    assert next(watch).number == 1
    for number in range(80):
        few.define(xml("a", uuid, memory=1000 + number))
    assert next(watch) == EventsMissed(16, 17)
    for number in range(80):
        few.define(xml("a", uuid, memory=1000 + number))
    assert next(watch).number == 18
    assert next(watch) == EventsMissed(161 - 64 - 18, 97)
    assert [event.number for event in watch] == list(range(98, 162))
    few.close()


def test_no_events() -> None:
    for store in (DomainList(events=0), EVERY_STORE[-1].make()):
        if not isinstance(store, DomainList):
            store._store.events_max = 0
        store.define(xml("a"))
        with store.get("a") as dom:
            dom.activate()
        assert store._event_count == 0
        for call in (store.watch, store.event_fd, lambda store=store: store.watch(since=0)):
            with pytest.raises(NoEvents, match="events=0"):
                call()
        assert store.check().problems == []
        store.close()


def test_two_lists_have_events_of_their_own() -> None:
    with DomainList() as one, DomainList() as other:
        one.define(xml("a"))
        other.define(xml("b"))
        other.define(xml("c"))
        assert [event.name for event in one.watch(since=0, timeout=0)] == ["a"]
        assert [event.name for event in other.watch(since=0, timeout=0)] == ["b", "c"]


# --- a descriptor --------------------------------------------------------------------------------


def readable(fd: int, seconds: float = DEADLINE) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


def test_a_descriptor_tells_of_events(doms: Any) -> None:
    doms.define(xml("a"))
    watch, fd = doms.watch(timeout=0), doms.event_fd()
    assert fd == doms.event_fd()
    assert not readable(fd, 0.1)
    for name in "bcd":
        doms.define(xml(name))
        found: list[str] = []
        while not found:  # once more than there are events, at most
            assert readable(fd)
            os.read(fd, 8)
            found += [event.name for event in watch]
        assert found == [name]


def test_the_list_closes_its_descriptor(doms: Any) -> None:
    fd = doms.event_fd()
    doms.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    assert "shmdomains-events" not in [one.name for one in threading.enumerate()]


def test_a_list_that_is_dropped_ends_its_thread() -> None:
    for store in EVERY_STORE:
        doms = store.make()
        fd = doms.event_fd()
        del doms
        gc.collect()
        for thread in threading.enumerate():
            if thread.name == "shmdomains-events":
                thread.join(DEADLINE)
        gc.collect()
        with pytest.raises(OSError):
            os.fstat(fd)


def test_a_descriptor_that_somebody_closed(tmp_path: Path) -> None:
    """Its number may be another file's: nothing is written to that, nor is it closed."""
    with DomainList() as doms:
        fd = doms.event_fd()
        with open(tmp_path / "file", "w+b") as file:
            os.dup2(file.fileno(), fd)
            doms.define(xml("a"))
            assert doms.event_fd() != fd
            doms.define(xml("b"))
            assert readable(doms.event_fd())
            doms.close()
            assert os.fstat(fd).st_ino == os.fstat(file.fileno()).st_ino
            assert file.read() == b""
            os.close(fd)


# --- other processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [store.name for store in STORES])
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_a_child_watches(home: Home, kind: str, start: str) -> None:
    one = home.party
    one.tell(f"doms = DomainList(max_domains=8, lock={kind!r}, "
             f"context=multiprocessing.get_context({start!r}))")  # fmt: skip
    one.tell(f"doms.define({xml('a')!r}).name")
    one.tell("fd = doms.event_fd()")
    two = home.begin(start, doms="doms")
    two.tell("watch = doms.watch(since=0)")
    assert two.tell("next(watch).name") == "a"
    two.start("next(watch).words")
    assert two.is_waiting()
    one.tell("with doms.get('a') as dom: dom.activate()")
    assert two.answer() == "Started Booted"
    # Its own descriptor, which it does not share with its parent.
    two.tell("import select; fd = doms.event_fd()")
    one.tell("with doms.get('a') as dom: dom.deactivate()")
    for party in (one, two):
        assert party.tell("import select; bool(select.select([fd], [], [], 10)[0])")
    assert two.tell(
        "os.read(fd, 8); [event.words for event in doms.watch(since=2, timeout=0)]"
    ) == ["Stopped Shutdown"]
    assert one.tell("bool(select.select([fd], [], [], 0)[0])")
    two.leave()
    one.tell("doms.close()")


@pytest.mark.parametrize("kind", [store.name for store in STORES])
def test_a_stranger_watches(home: Home, stranger: Party, segment_name: str, kind: str) -> None:
    """Also the list whose locks it did not inherit: it reads only."""
    one = home.party
    one.tell(f"doms = DomainList.create({segment_name!r}, max_domains=8, lock={kind!r})")
    one.tell(f"doms.define({xml('a')!r}).name")
    stranger.tell(f"doms = DomainList.attach({segment_name!r})")
    stranger.tell("watch = doms.watch(since=0); fd = doms.event_fd()")
    assert stranger.tell("next(watch).words") == "Defined Added"
    stranger.start("next(watch).words")
    assert stranger.is_waiting()
    one.tell("with doms.get('a') as dom: dom.activate()")
    assert stranger.answer() == "Started Booted"
    assert stranger.tell("import select; bool(select.select([fd], [], [], 10)[0])")
    stranger.tell("doms.close()")
    stranger.tell("forget")
    one.tell("doms.unlink(); doms.close()")


def test_a_signal_handler_runs_while_one_waits(home: Home) -> None:
    one = home.party
    one.tell("doms = DomainList(max_domains=8)")
    one.tell("def stop(*_): raise InterruptedError('a signal')")
    one.tell("signal.signal(signal.SIGUSR1, stop); watch = doms.watch()")
    two = home.begin("thread", doms="doms")
    one.start("next(watch)")
    assert one.is_waiting()
    os.kill(one.pid, 10)
    with pytest.raises(InterruptedError, match="a signal"):
        one.answer()
    two.tell(f"doms.define({xml('a')!r}).name")
    assert one.tell("next(watch).name") == "a"
    two.leave()


def test_who_died_is_an_event(home: Home) -> None:
    one = home.party
    one.tell("doms = DomainList(max_domains=8)")
    one.tell(f"doms.define({xml('a')!r}).name")
    one.tell("with doms.get('a') as dom: dom.activate()")
    two = home.begin("fork", doms="doms")
    two.tell("dom = doms.get('a')\ndom.deactivate()")
    pid = two.pid
    os.kill(pid, 9)
    one.tell("[child.join() for child in multiprocessing.active_children()]; reap()")
    one.tell("doms.get('a').unlock()")
    died = one.tell("list(doms.watch(since=2, timeout=0))")
    assert [(event.type, event.name, event.id) for event in died] == [
        (EventType.HOLDER_DIED, "a", 1)
    ]
    holder = died[0].holder
    assert (holder.pid, holder.tid, holder.alive) == (pid, pid, False)
    assert died[0].words == f"Holder died process {pid}"
    assert died[0].to_dict()["holder"]["pid"] == pid
    one.tell("doms.get('a').unlock()")
    assert one.tell("doms.watch().since") == 3
    two.conn.close()


def test_the_words_of_details() -> None:
    assert [detail.words for detail in events.SuspendedDetail][2:] == [
        "I/O Error", "Watchdog", "Restored", "Snapshot", "API error", "Post-copy",
        "Post-copy Error",
    ]  # fmt: skip
    assert StoppedDetail.RECREATED.words == "Recreation"
    assert (
        DomainEvent(1, 0.0, EventType.STARTED, 99, UUID(int=1), "a", 1).words == "Started unknown"
    )


def test_threads_that_ask_at_once_get_one_descriptor() -> None:
    for _ in range(20):
        with DomainList(max_domains=4) as doms, ThreadPoolExecutor(4) as pool:
            at_once = threading.Barrier(4)

            def ask(doms: DomainList = doms, at_once: threading.Barrier = at_once) -> int:
                at_once.wait(DEADLINE)
                return doms.event_fd()

            numbers = {one.result() for one in [pool.submit(ask) for _ in range(4)]}
            assert doms.event_fd() in numbers
            open_now = [number for number in numbers if is_eventfd(number)]
            assert open_now == [doms.event_fd()]
