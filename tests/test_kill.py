"""Workers are SIGKILLed while they hold locks; who comes next has them soon, and whole records.

First one death at a time: each lock, alone and with others, before and after a commit, with
somebody waiting already or coming later; the recoverer dies as well; what a death in the middle of
a change leaves behind is planted where it cannot be hit by chance. Then the lists with
``lock="multiprocessing"``, where a waiter takes a dead holder's lock over. Deaths of many at random
are in test_storms.py.
"""

from __future__ import annotations

import os
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pg_servers
import pytest
from helpers import list_url
from killing import (
    DEADLINE,
    Child,
    Pipe,
    Planted,
    asleep,
    attach,
    counted,
    fork,
    hold,
    hold_in,
    hold_mutex,
    soon,
    until,
    xml,
)

from shmdomains import DomainDef, DomainList, LockTimeout, SegmentFull

NAMES = ["a", "b", "c"]


@pytest.fixture
def doms(path: str) -> Iterator[DomainList]:
    with DomainList.create(path=path, max_domains=20_000) as doms:
        for name in NAMES:
            doms.define(xml(name))
        yield doms


def sound(doms: DomainList) -> None:
    report = doms.check()
    assert report, report.problems


# --- one death ------------------------------------------------------------------------------------

HELD = {
    "list": ["list"],
    "domain": ["a"],
    "uncommitted": ["a", "change=1"],
    "committed": ["a", "change=1", "commit"],
    "mid-transaction": ["a", "change=1", "commit", "change=2"],
    "list and domain": ["list", "a", "change=1"],
    "several": ["list", "a", "b", "c", "change=1"],
    "several, committed": ["list", "a", "b", "c", "change=1", "commit", "change=2"],
    "new": ["list", "new=d"],
    "new, changed": ["list", "new=d", "change=1"],
    "new, committed": ["list", "a", "new=d", "change=1", "commit", "change=2"],
}


def held_by(steps: list[str]) -> list[str]:
    return [step.removeprefix("new=") for step in steps if step[:4] == "new=" or step in NAMES]


def committed_by(steps: list[str]) -> int | None:
    return 1 if "commit" in steps else None


def take_all(pipe: Pipe, path: str, names: list[str]) -> None:
    """Take the list lock and each of the domains; say who died and what is there."""
    doms = attach(path)
    pipe.say("ready")
    found = {}
    with doms.locked():
        for name in names:
            with doms.find_by_name(name) as dom:
                died = dom.previous_owner_died
                found[name] = (died and (died.pid, died.tid, died.alive), dom.data)
    pipe.say(found)
    pipe.rest()


@pytest.fixture(params=["segment", *(["postgres"] if pg_servers.missing() is None else [])])
def place(request: pytest.FixtureRequest, path: str) -> Iterator[tuple[Any, str]]:
    """A list with `NAMES` and where it is: a path, or a URL."""
    if request.param == "segment":
        with DomainList.create(path=path, max_domains=100) as doms:
            for name in NAMES:
                doms.define(xml(name))
            yield doms, path
        return
    from shmdomains.postgres import PostgresDomainList

    url = list_url()
    with PostgresDomainList.create(url) as doms:
        for name in NAMES:
            doms.define(xml(name))
        yield doms, url
        doms.unlink(force=True)


@pytest.mark.parametrize("when", ["waiting", "later"])
@pytest.mark.parametrize("steps", list(HELD.values()), ids=list(HELD))
def test_the_next_one_has_the_lock_and_a_whole_record(
    start: Callable[..., Child], place: tuple[Any, str], steps: list[str], when: str
) -> None:
    doms, path = place
    names = held_by(steps)
    holder = start(hold, path, *steps)
    pid = holder.hear()
    if when == "later":
        holder.kill()
    taker = start(take_all, path, names)
    assert taker.hear() == "ready"
    if when == "waiting":
        until(lambda: asleep(taker.pid), "it waits")
        holder.signal(signal.SIGKILL)
    with soon("the hand-over"):
        found = taker.hear()
    expected = ((pid, pid, False), committed_by(steps))
    assert found == dict.fromkeys(names, expected)
    # It was handed back in order, so it is nobody's death any more.
    for name in {*NAMES, *names}:
        with doms.get(name=name, timeout=DEADLINE) as dom:
            assert dom.previous_owner_died is None
            assert dom.data == (committed_by(steps) if name in names else None)
    sound(doms)


def test_a_death_is_told_until_the_domain_is_handed_back(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    holder = start(hold, path, "a")
    pid = holder.hear()
    holder.kill()
    doms.peek(name="a")
    list(doms)
    with pytest.raises(LookupError), doms.get(name="a", timeout=DEADLINE) as dom:
        for _ in range(2):
            assert dom.previous_owner_died.pid == pid
            assert dom.previous_owner_died.started == pytest.approx(time.time(), abs=600)
            dom.data = 1
            dom.commit()
        assert "dead" in str(dom.previous_owner_died)
        raise LookupError
    with doms.get(name="a", timeout=0) as dom:
        assert dom.previous_owner_died is None
        assert dom.data == 1


def test_recoverers_that_die_hand_it_on(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    """Each repairs and dies before it hands back; the last death is the one that is told."""
    for number in range(6):
        holder = start(hold, path, "list", "a", f"change={number}", "commit", "change=99")
        pid = holder.hear()
        holder.kill()
    with soon("the last hand-over"), doms.locked(timeout=DEADLINE):
        dom = doms.find_by_name("a", timeout=DEADLINE)
        assert dom.previous_owner_died.pid == pid
        assert dom.data == 5
        dom.unlock()
    sound(doms)


def take_and_die(pipe: Pipe, path: str) -> None:
    doms = DomainList.attach(path=path)
    pipe.say("ready")
    doms.lock()
    pipe.say("locked")
    pipe.rest()


def test_recoverers_that_die_in_the_middle_of_the_repair(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    """With 5,000 domains a repair takes long enough to be hit by chance."""
    names = [f"x{i}" for i in range(5000)]
    for name in names:
        doms.define(xml(name))
    chance = random.Random(3)
    holder = start(hold, path, "list")
    holder.hear()
    holder.kill()
    for _ in range(25):
        victim = start(take_and_die, path)
        assert victim.hear() == "ready"
        victim.conn.poll(chance.random() * 0.002)
        victim.kill()
    with soon("the last repair"):
        doms.lock(timeout=DEADLINE)
    doms.unlock()
    sound(doms)
    assert len(doms) == 5003
    assert all(doms.lookup(name=name, timeout=0).unlock() is None for name in names[::50])


@pytest.mark.parametrize("which", ["id", "heap"])
def test_the_death_of_who_holds_a_short_lock(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str, which: str
) -> None:
    with doms.get(name="b") as dom:
        dom.activate()
        dom.data = "old"
    holder = start(hold_mutex, path, planted.header(f"{which}_mutex"))
    assert holder.hear() == 0
    holder.kill()
    with soon("the repair"), doms.get(name="a", timeout=DEADLINE) as dom:
        number = dom.activate()
        dom.data = "new"
        dom.commit(timeout=DEADLINE)
    assert doms.peek(id=number).name == "a"
    assert doms.peek(name="b").data == "old"
    sound(doms)


# --- what a death in the middle of a change leaves ------------------------------------------------


def test_half_an_insert(start: Callable[..., Child], doms: DomainList, planted: Planted) -> None:
    """The record is committed, the indexes, the free list and the count are not."""
    holder = start(hold, str(planted.path), "list", "new=d")
    holder.hear()
    planted.write(planted.header("list_seq"), planted.read(planted.header("list_seq")) | 1)
    for index in (0, 1):
        planted.write(planted.entry(index, 3), 0)
    planted.write(planted.header("live"), 3)
    planted.write(planted.header("free_head"), 4)
    holder.kill()
    with soon("the repair"):
        doms.get(name="d", timeout=DEADLINE).unlock()
    assert len(doms) == 4
    doms.define(xml("e"))
    assert [info.name for info in doms] == ["a", "b", "c", "d", "e"]
    sound(doms)


def test_half_a_removal(start: Callable[..., Child], doms: DomainList, planted: Planted) -> None:
    """The record is free, and the indexes still lead to it."""
    with doms.get(name="b") as dom:
        dom.data = "x" * 1000
        gone = dom.uuid
    holder = start(hold, str(planted.path), "list", "b")
    holder.hear()
    planted.write(planted.header("list_seq"), planted.read(planted.header("list_seq")) | 1)
    life = planted.slot(1, "life")
    planted.write(life, counted(planted.read(life) + 1))
    holder.kill()
    with soon("the repair"):
        assert doms.lookup(name="b", timeout=DEADLINE) is None
    assert gone not in doms
    assert len(doms) == 2
    doms.define(xml("b"))
    assert doms.peek(name="b").data is None
    assert doms.peek(name="b").uuid != gone
    sound(doms)


def test_half_a_rename(start: Callable[..., Child], doms: DomainList, planted: Planted) -> None:
    """The commit flips name and definition together; the index still has the old name."""
    old = planted.entry(1, 1)
    entry = planted.read(old)
    with doms.locked(), doms.find_by_name("b") as dom:
        doms.rename(dom, "renamed")
    holder = start(hold, str(planted.path), "list", "renamed")
    holder.hear()
    planted.write(planted.header("list_seq"), planted.read(planted.header("list_seq")) | 1)
    planted.write(planted.entry(1, 1), 0)
    planted.write(old, entry)
    holder.kill()
    with soon("the repair"):
        assert doms.lookup(name="b", timeout=DEADLINE) is None
        with doms.get(name="renamed", timeout=DEADLINE) as dom:
            assert dom.definition.name == "renamed"
    sound(doms)


@pytest.mark.parametrize("reader", ["peek", "contains", "get"])
def test_who_only_looks_need_not_wait_for_a_repair_by_others(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str, reader: str
) -> None:
    """A miss is in doubt while an index is odd: a reader asks the records, who wants to lock waits
    for the list; after a death either has it repaired."""
    holder = start(hold, path, "list")
    holder.hear()
    os.kill(holder.pid, signal.SIGSTOP)
    planted.write(planted.header("list_seq"), planted.read(planted.header("list_seq")) | 1)
    with doms.get(name="a", timeout=0):
        pass  # a hit is a hit
    assert doms.peek(name="b").name == "b"
    for index in (0, 1):  # as in the middle of an insert: committed, and not entered
        planted.write(planted.entry(index, 2), 0)
    with soon("a look in vain", 3):
        if reader == "get":
            with pytest.raises(LockTimeout):
                look_for(doms, reader, "nobody", 0.1)
        else:
            assert not look_for(doms, reader, "nobody", 0)
            assert look_for(doms, reader, "c", 0)
    holder.kill()
    with soon("the look", 3):
        assert not look_for(doms, reader, "nobody", 2)
        assert look_for(doms, reader, "c", 2)
    sound(doms)


def look_for(doms: DomainList, reader: str, name: str, timeout: float) -> bool:
    if reader == "peek":
        return doms.peek(name=name, timeout=timeout) is not None
    if reader == "contains":
        known = {info.name: info.uuid for info in doms}
        return known.get(name, uuid.UUID(int=7)) in doms
    dom = doms.lookup(name=name, timeout=timeout)
    if dom is not None:
        dom.unlock()
    return dom is not None


@pytest.mark.parametrize("grown", ["allocate", "free"])
def test_half_a_change_of_the_heap(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str, grown: str
) -> None:
    """A descriptor without its mark, or a mark without its descriptor; the counts are off, too."""
    with doms.get(name="b") as dom:
        dom.data = "x" * 5000
    used = doms.info.heap_used
    word = planted.at["map"]
    map_before = planted.read(word)
    committed_cells = planted.watermark(planted.header("heap_committed"))
    holder = start(hold_mutex, path, planted.header("heap_mutex"))
    holder.hear()
    if grown == "allocate":
        spare = planted.slot(2, "extent") + 8 * 4  # the driver's data, of which there is none
        planted.write(spare, (committed_cells - 4) << 25 | 200)
        planted.write(planted.slot(2, "dirty"), 1)
    else:
        planted.write(word, map_before | 1 << 60)
    planted.write(planted.header("heap_used"), 1)
    holder.kill()
    with soon("the repair"), doms.get(name="a", timeout=DEADLINE) as dom:
        dom.data = "y" * 200
    assert doms.peek(name="b").data == "x" * 5000
    sound(doms)
    # The garbage goes with the next commit there, and the space is accounted for.
    with doms.get(name="c") as dom:
        dom.data = "z" * 200
    with doms.get(name="c") as dom, doms.get(name="a", timeout=0) as other:
        dom.data = other.data = None
    sound(doms)
    assert doms.check().counts["garbage"] == 0
    assert doms.info.heap_used == used


def test_small_data_asks_for_no_lock_of_the_heap(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    """Whose holder is stopped. The large data that it replaced is freed once that has gone on, in
    whichever of its two places it lies."""
    used = doms.info.heap_used
    for commits in (1, 2, 3):
        with doms.get(name="b") as dom:
            dom.data = "x" * 5000
        holder = start(hold_mutex, path, planted.header("heap_mutex"))
        holder.hear()
        with soon("a change of small data"):
            for number in range(commits):
                with doms.get(name="b", timeout=0) as dom:
                    dom.data = {"count": number}
            with pytest.raises(LockTimeout), doms.get(name="a", timeout=0) as dom:
                dom.data = "y" * 200
                dom.commit(timeout=0)
        assert doms.peek(name="b").data == {"count": commits - 1}
        assert doms.info.heap_used > used
        holder.kill()
        with soon("the repair"), doms.get(name="b", timeout=DEADLINE) as dom:
            dom.autostart = not dom.autostart
        assert doms.peek(name="b").data == {"count": commits - 1}
        sound(doms)
        assert doms.check().counts["garbage"] == 0
        assert doms.info.heap_used == used


def test_the_garbage_in_free_slots_goes_when_the_list_is_repaired(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    """Nobody waits for a slot that somebody holds: its garbage stays, the others' goes."""
    for name in "bc":
        doms.undefine(name=name)
    used = doms.info.heap_used
    cell = planted.watermark(planted.header("heap_committed")) - 64
    for slot in (1, 2):
        planted.write(planted.slot(slot, "extent") + 8 * slot, (cell + slot) << 25 | 60)
    planted.write(planted.at["map"] + cell // 8, 0b110)
    planted.write(planted.header("heap_used"), used // 64 + 2)
    stale = start(hold_mutex, path, planted.slot(1, "mutex"))
    stale.hear()
    assert doms.check().counts["garbage"] == 2
    for left in (1, 0):
        holder = start(hold, path, "list")
        holder.hear()
        holder.kill()
        with soon("the repair"):
            doms.lock(timeout=DEADLINE)
        doms.unlock()
        sound(doms)
        assert doms.check().counts["garbage"] == left
        assert doms.info.heap_used == used + 64 * left
        if left:
            stale.kill()


def test_the_garbage_of_a_dead_holder_is_freed_by_the_next(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    """It died between allocating and committing; the next one commits nothing."""
    used = doms.info.heap_used
    holder = start(hold, path, "b")
    holder.hear()
    planted.leave_garbage(1)
    sound(doms)
    assert doms.check().counts["garbage"] == 1
    holder.kill()
    doms.get(name="b", timeout=DEADLINE).unlock()
    sound(doms)
    assert doms.check().counts["garbage"] == 0
    assert doms.info.heap_used == used


def test_half_a_change_of_the_ids(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    for name in ("a", "b"):
        with doms.get(name=name) as dom:
            dom.activate()
    holder = start(hold_mutex, path, planted.header("id_mutex"))
    holder.hear()
    planted.write(planted.header("id_seq"), planted.read(planted.header("id_seq")) | 1)
    planted.write(planted.entry(2, 0), 0)
    planted.write(planted.header("active"), 7)
    holder.kill()
    with soon("the repair"):
        assert doms.peek(id=1, timeout=5).name == "a"
        with doms.get(id=2, timeout=DEADLINE) as dom:
            dom.deactivate()
    assert doms.lookup(id=2, timeout=DEADLINE) is None
    assert doms.count(active=True) == doms.info.active == 1
    sound(doms)


# --- lock="multiprocessing" -----------------------------------------------------------------------


def inherited_list() -> DomainList:
    doms = DomainList(max_domains=20, lock="multiprocessing")
    for name in NAMES:
        doms.define(xml(name))
    return doms


def take_over(pipe: Pipe, steps: list[str], when: str) -> None:
    doms = inherited_list()
    names = [step for step in steps if step in NAMES]
    holder = fork(hold_in, doms, *steps)
    assert holder.hear() == holder.pid
    if when == "later":
        holder.kill()
    taker = fork(take_inherited, doms, names)
    assert taker.hear() == "ready"
    if when == "waiting":
        until(lambda: asleep(taker.pid), "it waits")
        holder.kill()
    with soon("the hand-over"):
        found = taker.hear()
    expected = ((holder.pid, False), 1 if "commit" in steps else None)
    assert found == dict.fromkeys(names, expected), (found, expected)
    for name in NAMES:
        with doms.get(name=name, timeout=DEADLINE) as dom:
            assert dom.previous_owner_died is None
    with doms.locked(timeout=DEADLINE):
        pass
    sound(doms)
    pipe.say("fine")


def take_inherited(pipe: Pipe, doms: DomainList, names: list[str]) -> None:
    pipe.say("ready")
    found = {}
    with doms.locked(timeout=DEADLINE):
        for name in names:
            with doms.find_by_name(name, timeout=DEADLINE) as dom:
                died = dom.previous_owner_died
                found[name] = (died and (died.pid, died.alive), dom.data)
    pipe.say(found)
    pipe.rest()


@pytest.mark.parametrize("when", ["waiting", "later"])
@pytest.mark.parametrize(
    "steps",
    [
        ["list"],
        ["a"],
        ["a", "change=1"],
        ["a", "change=1", "commit"],
        ["list", "a", "b", "change=1"],
        ["list", "a", "b", "c", "change=1", "commit"],
    ],
    ids="+".join,
)
def test_a_dead_holders_multiprocessing_lock_is_taken_over(
    start: Callable[..., Child], steps: list[str], when: str
) -> None:
    assert start(take_over, steps, when).hear(3 * DEADLINE) == "fine"


def count_inherited(pipe: Pipe, doms: DomainList, turns: int) -> None:
    pipe.say("ready")
    pipe.listen()
    for _ in range(turns):
        with doms.get(name="a", timeout=DEADLINE) as dom:
            before = dom.data or 0
            for _ in range(3000):  # so long that a second owner would be in between
                pass
            dom.data = before + 1
    pipe.say("done")
    pipe.rest()


def compete_for_the_dead(pipe: Pipe) -> None:
    """They find the holder dead at the same moment."""
    doms = inherited_list()
    for turn in range(25):
        holder = fork(hold_in, doms, "a")
        assert holder.hear() == holder.pid
        takers = [fork(count_inherited, doms, 3) for _ in range(4)]
        for taker in takers:
            assert taker.hear() == "ready"
        holder.kill()
        for taker in takers:
            taker.tell("go")
        for taker in takers:
            assert taker.hear() == "done"
        for child in (holder, *takers):
            child.close()
        assert doms.peek(name="a").data == 12 * (turn + 1)
    sound(doms)
    pipe.say("fine")


def test_only_one_takes_a_dead_holders_place(start: Callable[..., Child]) -> None:
    assert start(compete_for_the_dead).hear(3 * DEADLINE) == "fine"


def overtaken_waiter(pipe: Pipe) -> None:
    """The holder for whom somebody began to wait is not the one who died."""
    doms = inherited_list()
    first = fork(hold_in, doms, "a")
    assert first.hear() == first.pid
    waiter = fork(take_inherited, doms, ["a"])
    assert waiter.hear() == "ready"
    until(lambda: asleep(waiter.pid), "it waits")
    waiter.signal(signal.SIGSTOP)
    until(lambda: stopped(waiter.pid), "it is stopped")
    first.tell()
    assert first.hear() == "free"
    second = fork(hold_in, doms, "a")
    assert second.hear() == second.pid
    second.kill()
    waiter.signal(signal.SIGCONT)
    pipe.say((waiter.hear(), first.pid, second.pid))


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_the_dead_holder_is_named_not_an_earlier_one(start: Callable[..., Child]) -> None:
    found, _first, second = start(overtaken_waiter).hear(3 * DEADLINE)
    assert found == {"a": ((second, False), None)}


def live_holder(pipe: Pipe) -> None:
    doms = inherited_list()
    holder = fork(hold_in, doms, "a")
    assert holder.hear() == holder.pid
    holder.signal(signal.SIGSTOP)
    until(lambda: stopped(holder.pid), "it is stopped")
    with soon("the time-out", 3):
        try:
            doms.get(name="a", timeout=0.3)
        except LockTimeout as exc:
            assert exc.holder.pid == holder.pid
            assert exc.holder.alive
        else:
            raise AssertionError("the lock of a live holder was taken over")
    holder.signal(signal.SIGCONT)
    assert holder.ask() == "free"
    with doms.get(name="a", timeout=DEADLINE) as dom:
        assert dom.previous_owner_died is None
    pipe.say("fine")


def test_a_stopped_holder_is_not_dead(start: Callable[..., Child]) -> None:
    assert start(live_holder).hear(3 * DEADLINE) == "fine"


def test_a_stopped_holder_of_a_robust_lock_is_not_dead(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    holder = start(hold, path, "a")
    pid = holder.hear()
    holder.signal(signal.SIGSTOP)
    until(lambda: stopped(pid), "it is stopped")
    with soon("the time-out", 3), pytest.raises(LockTimeout) as failed:
        doms.get(name="a", timeout=0.3)
    assert failed.value.holder.pid == pid
    assert failed.value.holder.alive
    with doms.get(name="b", timeout=0):
        assert doms.peek(name="a").name == "a"  # nobody else is held up
    holder.signal(signal.SIGCONT)
    assert holder.ask() == "free"
    sound(doms)


def test_definitions_survive_their_definers(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    """Blobs written by a victim are read by others once they are committed, and never before."""
    holder = start(hold, path, "list", "new=d", "change=1", "commit", "change=2")
    holder.hear()
    assert doms.peek(name="d").definition == DomainDef.from_xml(xml("d", doms.peek(name="d").uuid))
    assert doms.peek(name="d").data == 1
    holder.kill()
    assert doms.peek(name="d").data == 1
    with doms.get(name="d", timeout=DEADLINE) as dom:
        assert dom.data == 1
        assert dom.persistent


# --- room ----------------------------------------------------------------------------------------


def leave_garbage(planted: Planted, slot: int, cells: int) -> None:
    """As a holder leaves it that dies between allocating and committing."""
    cell = planted.watermark(planted.header("heap_committed")) - cells & ~63
    planted.write(planted.slot(slot, "extent") + 8 * 4, cell << 25 | cells * 64)
    first = planted.at["map"] + cell // 8
    for word in range(first, first + cells // 8, 8):
        assert planted.read(word) == 0
        planted.write(word, (1 << 64) - 1)
    used = planted.header("heap_used")
    planted.write(used, planted.read(used) + cells)
    planted.write(planted.slot(slot, "dirty"), 1)


def want_room(pipe: Pipe, path: str, left: str, what: str, lock: Any) -> None:
    def change() -> None:
        if what == "define":
            doms.define(large.replace(name="new", uuid=None))
        elif what == "change":
            with doms.get(name="a", timeout=0) as dom:
                dom.data = "x" * 400_000
        else:
            with doms.locked(), doms.find_by_name("a", timeout=0) as dom:
                doms.rename(dom, "new")

    doms = DomainList.create(path=path, max_domains=40, max_bytes=3 << 20, lock=lock)
    large = DomainDef.from_xml(xml("a", title="x" * 200_000))
    for name in NAMES:
        doms.define(xml(name))
    if what == "rename":
        doms.define(large.replace(uuid=doms.peek(name="a").uuid))
    with doms.get(name="c") as dom:
        dom.data = "x" * 1_200_000
        dom.commit()
        dom.data = None
    holder = fork(hold_in, doms, "b")
    assert holder.hear() == holder.pid
    with Planted(path) as planted:
        leave_garbage(planted, 1, 8192)
    with pytest.raises(SegmentFull):
        for number in range(40):
            doms.define(xml(f"more{number}", title="x" * 100_000))
    for _ in range(2):
        with pytest.raises(SegmentFull):
            change()  # its holder lives
        assert doms.check().counts["garbage"] == 1
    if left == "dead":
        holder.kill()
    else:
        holder.tell("let go")
        assert holder.hear() == "free"
    with soon("the room"):
        change()
    assert doms.check().counts["garbage"] == 0
    sound(doms)
    with doms.get(name="b", timeout=DEADLINE) as dom:
        died = dom.previous_owner_died
        assert (died and died.pid) == (holder.pid if left == "dead" else None)
    pipe.say("fine")
    pipe.rest()


@pytest.mark.parametrize("what", ["define", "change", "rename"])
@pytest.mark.parametrize("left", ["dead", "put off"])
@pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
def test_room_that_only_the_dead_hold(
    start: Callable[..., Child], path: str, what: str, left: str, lock: str
) -> None:
    """What finds no room takes back garbage first: of the dead, and what was put off."""
    assert start(want_room, path, left, what, lock).hear(3 * DEADLINE) == "fine"
