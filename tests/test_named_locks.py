"""Named locks: the contract between two parties, of every store and however they came to share it,
then what is told of a death, names, order, and storms."""

from __future__ import annotations

import gc
import mmap
import os
import pickle
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    A_MOMENT,
    EVERY_STORE,
    FEW_MUTEXES,
    SOAK,
    Home,
    Party,
    Store,
    thread_party,
    xml,
)
from killing import DEADLINE, Child, Pipe, Planted, hold_mutex, until
from test_conformance import IN_ONE_PROCESS, Pair, held_by, way_name

from shmdomains import (
    AlreadyLocked,
    DomainList,
    ListClosed,
    LockHolder,
    LockOrder,
    LockTimeout,
    MutexNotLocked,
    NotOwner,
    SegmentCorrupt,
    TooManyLocks,
    TooManyMutexes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

WAYS = [(store, start) for store in EVERY_STORE for start in store.starts]


@pytest.fixture(params=WAYS, ids=way_name)
def pair(
    request: pytest.FixtureRequest, home: Home, stranger: Party, segment_name: str
) -> Iterator[Pair]:
    pair = Pair(home, stranger, *request.param, segment_name)
    yield pair
    pair.end()


@pytest.fixture
def one(pair: Pair) -> Party:
    return pair.one


@pytest.fixture
def two(pair: Pair) -> Party:
    return pair.two


# --- two parties -------------------------------------------------------------------------------


def test_one_at_a_time(one: Party, two: Party) -> None:
    two.tell("m = doms.mutex('scheduler'); m.lock()")
    one.tell("m = doms.mutex('scheduler')")
    assert one.tell("m.try_lock(), m.acquire(False), m.acquire(timeout=0.01), m.is_locked") == (
        False,
        False,
        False,
        False,
    )
    for attempt in (
        "m.lock(0)",
        "m.lock(0.02)",
        "with doms.mutex('scheduler', timeout=0): pass",
        "with doms.mutex('scheduler', 0.02): pass",
    ):
        with pytest.raises(LockTimeout, match="mutex 'scheduler'") as caught:
            one.tell(attempt)
        held_by(two, caught.value)
    two.tell("m.unlock()")
    assert one.tell("with doms.mutex('scheduler', timeout=0) as held: seen = held.name\nseen")
    assert one.tell("m.is_locked") is False


def test_a_waiter_gets_it_when_it_is_released(one: Party, two: Party) -> None:
    two.tell("m = doms.mutex('scheduler'); m.acquire()")
    one.start("with doms.mutex('scheduler') as m: seen = m.is_locked\nseen")
    assert one.is_waiting()
    two.tell("m.release()")
    assert one.answer() is True


def test_other_names_are_other_locks(one: Party, two: Party) -> None:
    two.tell("m = doms.mutex('a'); m.lock()")
    assert one.tell("with doms.mutex('b', 0) as m: seen = m.name\nseen") == "b"
    two.tell("m.unlock()")


def test_whose_it_is(pair: Pair, one: Party, two: Party) -> None:
    two.tell("m = doms.mutex('a'); m.lock()")
    one.tell("m = doms.mutex('a')")
    error = NotOwner if pair.start in IN_ONE_PROCESS else MutexNotLocked
    for call in ("m.unlock()", "m.release()", "m.previous_owner_died"):
        with pytest.raises(error, match="mutex 'a'"):
            one.tell(call)
    assert two.tell("m.previous_owner_died") is None
    two.tell("m.unlock()")
    with pytest.raises(MutexNotLocked):
        two.tell("m.unlock()")


def test_it_does_not_hinder_list_and_domains(one: Party, two: Party) -> None:
    one.tell(f"doms.define({xml('web1')!r}).name")
    two.tell("m = doms.mutex('a'); m.lock(); dom = doms.get(name='web1'); dom.unlock()")
    two.tell("with doms.locked(), doms.find_by_name('web1'): pass")
    assert one.tell("with doms.get(name='web1', timeout=0) as dom: seen = dom.name\nseen")
    two.tell("m.unlock()")


def test_both_name_at_once(pair: Pair, one: Party, two: Party) -> None:
    """Each in another order; in the end there is one lock of each name."""
    names = [f"lock {i}" for i in range(40)]
    one.tell(FEW_MUTEXES)
    one.start(f"for name in {names}: doms.mutex(name)")
    two.tell(f"for name in {names[::-1]}: doms.mutex(name)")
    one.answer()
    with pytest.raises(TooManyMutexes, match="64"):
        one.tell("for i in range(25): doms.mutex(f'more {i}')")
    two.tell("held = [doms.mutex(f'lock {i}', 0) for i in range(40)]")
    two.tell("for m in held: m.lock(0)")
    assert one.tell(f"[doms.mutex(name).try_lock() for name in {names}]") == [False] * 40
    two.tell("for m in held: m.unlock()")


# --- one thread, every store -------------------------------------------------------------------


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def doms(request: pytest.FixtureRequest) -> Iterator[Any]:
    store: Store = request.param
    doms = store.make()
    doms.define(xml("web1"))
    yield doms
    if not doms.closed:
        assert doms.check().problems == []
        doms.close()


def test_it_is_not_recursive(doms: Any) -> None:
    mutex = doms.mutex("a")
    with mutex as held:
        assert held is mutex and mutex.is_locked
        for call in (mutex.lock, mutex.try_lock, doms.mutex("a").acquire, doms.mutex("a").lock):
            with pytest.raises(AlreadyLocked, match="mutex 'a'"):
                call()
        with pytest.raises(AlreadyLocked), mutex:
            pass
    assert not mutex.is_locked
    with doms.mutex("a", 0):
        pass


def test_every_handle_of_the_thread_stands_for_it(doms: Any) -> None:
    mutex, other = doms.mutex("a"), doms.mutex("a")
    mutex.lock()
    assert other.is_locked and other.previous_owner_died is None
    other.unlock()
    assert not mutex.is_locked


def test_a_block_whose_lock_was_released_in_it(doms: Any) -> None:
    with doms.mutex("a") as mutex:
        mutex.unlock()
    with pytest.raises(RuntimeError), doms.mutex("a", 0):
        raise RuntimeError
    with doms.mutex("a", 0):
        pass


def test_order(doms: Any) -> None:
    mutex = doms.mutex("a")
    with doms.locked():
        for wait in (None, 5):
            with pytest.raises(LockOrder, match="named locks come first"):
                mutex.lock(wait)
        mutex.lock(0)
        mutex.unlock()
    with doms.get(name="web1"):
        with pytest.raises(LockOrder), doms.mutex("a", timeout=1):
            pass
        assert mutex.try_lock()
        mutex.unlock()
    with mutex, doms.locked(), doms.find_by_name("web1"):
        pass
    with mutex, doms.get(name="web1"):
        pass


def test_a_second_one_needs_a_timeout(doms: Any) -> None:
    with doms.mutex("a"):
        with pytest.raises(LockOrder, match="give it a timeout"):
            doms.mutex("b").lock()
        with doms.mutex("b", timeout=1), doms.mutex("c", timeout=0):
            pass
    with doms.mutex("b"):
        pass


def test_names(doms: Any) -> None:
    for bad in ("", "x" * 64, "é" * 32):
        with pytest.raises(ValueError, match="1 to 63 bytes of UTF-8"):
            doms.mutex(bad)
    with pytest.raises(ValueError):
        doms.mutex("\ud800")
    with pytest.raises(TypeError, match="is a str"):
        doms.mutex(b"a")
    names = ["x" * 63, "é" * 31, "a\nb", "a", "a "]
    if hasattr(doms, "host"):
        with pytest.raises(ValueError, match="PostgreSQL keeps no name"):
            doms.mutex("\0")
    else:
        names += ["\0", "\0\0"]
    held = [doms.mutex(name) for name in names]
    assert [mutex.name for mutex in held] == names
    for mutex in held:
        mutex.lock(0)  # none of them is another one's
    for mutex in held:
        mutex.unlock()


def test_a_timeout_is_none_or_a_time(doms: Any) -> None:
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError):
            doms.mutex("a", bad)
        with pytest.raises(ValueError):
            doms.mutex("a").lock(bad)
    mutex = doms.mutex("a")
    assert mutex.acquire(timeout=-1)  # as multiprocessing has it
    mutex.release()


def test_the_sixty_fifth(doms: Any) -> None:
    exec(FEW_MUTEXES)
    for i in range(64):
        doms.mutex(f"lock {i}")
    with pytest.raises(TooManyMutexes, match="which is the limit"):
        doms.mutex("one more")
    with doms.mutex("lock 0", 0), doms.mutex("lock 63", 0):
        pass


def test_dropped_while_it_is_held(doms: Any) -> None:
    mutex = doms.mutex("a")
    mutex.lock()
    with pytest.warns(ResourceWarning, match="mutex 'a' was dropped"):
        del mutex
        gc.collect()
    with doms.mutex("a", 0):
        pass


def test_a_closed_list(doms: Any) -> None:
    mutex, held = doms.mutex("a"), doms.mutex("b")
    held.lock()
    doms.close()
    with pytest.raises(ListClosed):
        mutex.lock()
    with pytest.raises(ListClosed):
        doms.mutex("c")
    held.unlock()
    assert not held.is_locked


def test_closed_during_the_wait(doms: Any) -> None:
    mutex = doms.mutex("a")
    mutex.lock()
    with thread_party(doms=doms) as other:
        other.start("doms.mutex('a').lock()")
        assert other.is_waiting()
        doms.close()
        mutex.unlock()
        with pytest.raises(ListClosed):
            other.answer()


# --- shared memory -----------------------------------------------------------------------------


@pytest.fixture
def robust(segment_dir: Path) -> Iterator[DomainList]:
    doms = DomainList.create(path=segment_dir / "list.segment", max_domains=100)
    yield doms
    if not doms.closed:
        assert doms.check().problems == []
        doms.close()


@pytest.fixture
def where(robust: DomainList) -> str:
    assert robust.info.path is not None
    return robust.info.path


def hold(pipe: Pipe, path: str, *names: str, why: str | None = None) -> None:
    doms = DomainList.attach(path=path)
    held = [doms.mutex(name, DEADLINE, why=why) for name in names]
    for mutex in held:
        mutex.lock(DEADLINE)
    pipe.say(os.getpid())
    pipe.listen()
    for mutex in held:
        mutex.unlock()
    pipe.say("free")
    pipe.rest()


def test_whoever_comes_next_is_told_who_died(
    robust: DomainList, where: str, start: Callable[..., Child]
) -> None:
    child = start(hold, where, "scheduler")
    pid = child.hear()
    assert not robust.mutex("scheduler").try_lock()
    child.kill()
    # One who is not given the lock leaves the notice.
    report = robust.recover()
    assert [(one.lock, one.name, one.died.pid) for one in report.repairs if one.died] == [
        ("mutex", "scheduler", pid)
    ]
    assert str(report.repairs[0]) == (
        f"mutex 'scheduler': process {pid} died holding it; its next holder is told"
    )
    with robust.mutex("scheduler", 0) as held:
        died = held.previous_owner_died
        assert isinstance(died, LockHolder) and (died.pid, died.alive) == (pid, False)
    with robust.mutex("scheduler", 0) as held:
        assert held.previous_owner_died is None


def test_a_death_of_the_heir_keeps_the_notice(
    robust: DomainList, where: str, start: Callable[..., Child]
) -> None:
    for _ in range(2):
        child = start(hold, where, "a")
        pid = child.hear()
        child.kill()
    with robust.mutex("a", 0) as held:
        assert held.previous_owner_died is not None and held.previous_owner_died.pid == pid


def test_the_death_of_a_thread_frees_it_too(robust: DomainList) -> None:
    mutexes = []

    def lock() -> None:
        mutexes.append(robust.mutex("a"))
        mutexes[0].lock()

    thread = threading.Thread(target=lock)
    thread.start()
    thread.join()
    assert not mutexes[0].is_locked
    with robust.mutex("a", 1) as held:
        assert held.previous_owner_died is not None
        assert held.previous_owner_died.pid == os.getpid()


def test_a_holder_in_the_report(
    robust: DomainList, where: str, start: Callable[..., Child]
) -> None:
    child = start(hold, where, "a")
    pid = child.hear()
    [held] = robust.recover().held
    assert (held.lock, held.name) == ("mutex", "a") and held.holder and held.holder.pid == pid
    assert str(held).startswith("mutex 'a': held by process")
    assert child.ask() == "free"
    assert robust.recover().held == []


def test_why_it_is_held_and_no_longer(
    robust: DomainList, where: str, start: Callable[..., Child]
) -> None:
    reason = "é" * 40  # cut to 56 bytes

    def why() -> bytes:
        with Planted(where) as segment:
            at = segment.named(0, "why")
            return segment.read(at, 56).to_bytes(56, "little")

    mutex = robust.mutex("a", why=reason)
    with mutex:
        assert why().rstrip(b"\0").decode() == "é" * 28
    assert why()[:8] == bytes(8)
    child = start(hold_with_why, where)
    child.hear()
    assert why().rstrip(b"\0") == b"rebalancing"
    child.kill()
    with robust.mutex("a", 0):
        assert why()[:8] == bytes(8)


def hold_with_why(pipe: Pipe, path: str) -> None:
    hold(pipe, path, "a", why="rebalancing")


def test_a_forked_child_holds_nothing(robust: DomainList) -> None:
    mutex = robust.mutex("a")
    mutex.lock()
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            seen = [mutex.is_locked, robust.mutex("a").try_lock()]
            try:
                mutex.unlock()
            except MutexNotLocked:
                seen.append(True)
            del mutex
            gc.collect()
            os.write(write, pickle.dumps(seen))
        os._exit(0)
    os.waitpid(pid, 0)
    assert pickle.loads(os.read(read, 1000)) == [False, False, True]
    os.close(read), os.close(write)
    assert mutex.is_locked
    mutex.unlock()


def test_it_counts_among_the_locks_of_a_thread(segment_dir: Path) -> None:
    """The kernel frees 2,048 of a dead thread, in all lists together."""
    lists = [DomainList(max_domains=1) for _ in range(16)]
    held = []
    for doms in lists:
        for i in range(64):
            mutex = doms.mutex(f"lock {i}", 0)
            if len(held) == 1000:
                with pytest.raises(TooManyLocks, match="1000 locks"):
                    mutex.lock(0)
                break
            mutex.lock(0)
            held.append(mutex)
    for mutex in held:
        mutex.unlock()
    for doms in lists:
        doms.close()


def test_a_stranger_of_a_multiprocessing_list(
    segment_dir: Path, start: Callable[..., Child]
) -> None:
    path = str(segment_dir / "mp.segment")
    with DomainList.create(path=path, max_domains=8, lock="multiprocessing") as doms:
        child = start(hold, path, "a")
        pid = child.hear()
        with pytest.raises(LockTimeout) as caught:
            doms.mutex("a").lock(0)
        assert caught.value.holder is not None and caught.value.holder.pid == pid
        child.kill()
        with doms.mutex("a", 5) as held:
            assert held.previous_owner_died is not None
            assert held.previous_owner_died.pid == pid
        assert doms.check().problems == []


def test_dropped_in_another_thread(robust: DomainList) -> None:
    box = [robust.mutex("a")]
    box[0].lock()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
    assert [one.category for one in said] == [ResourceWarning]
    assert f"thread {threading.get_native_id()}, and is freed" in str(said[0].message)
    with thread_party(doms=robust) as other:
        assert other.tell("with doms.mutex('a', 0): pass\nTrue")


def test_it_can_be_passed_on(robust: DomainList) -> None:
    mutex = pickle.loads(pickle.dumps(robust.mutex("a", 5, why="work")))
    with mutex:
        assert pickle.loads(pickle.dumps(mutex)) is not mutex
        assert robust.mutex("a").is_locked


def test_a_wait_is_interrupted_by_ctrl_c(
    robust: DomainList, where: str, start: Callable[..., Child]
) -> None:
    child = start(hold, where, "a")
    child.hear()
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), robust.mutex("a", 60):
        pass
    assert time.monotonic() - began < 10
    timer.join()
    assert not robust.mutex("a").is_locked
    child.ask()
    with robust.mutex("a", 1):
        pass


# --- names, and damage -------------------------------------------------------------------------


def taken(path: str) -> int:
    with Planted(path) as segment:
        return sum(segment.read(segment.named(i, "taken")) != 0 for i in range(64))


def name_all(pipe: Pipe, path: str, seed: int, names: list[str]) -> None:
    doms = DomainList.attach(path=path)
    order = random.Random(seed).sample(names, len(names))
    pipe.say("ready")
    pipe.listen()
    for name in order:
        doms.mutex(name)
    pipe.say(doms._mutex_names())
    pipe.rest()


def test_many_processes_give_the_same_new_names(
    robust: DomainList, where: str, start: Callable[..., Child]
) -> None:
    names: list[str] = []
    for turn in range(8):
        fresh = [f"{turn} {i}" for i in range(8)]
        names += fresh
        children = [start(name_all, where, 100 * turn + i, fresh) for i in range(12)]
        for child in children:
            assert child.hear() == "ready"
        for child in children:
            child.tell()
        for child in children:
            assert set(child.hear()) >= set(fresh)
            child.close()
        assert taken(where) == len(names)
        assert sorted(robust._mutex_names()) == sorted(names)


def name_one(pipe: Pipe, path: str) -> None:
    doms = DomainList.attach(path=path)
    pipe.say("ready")
    pipe.listen()
    doms.mutex("new")
    pipe.say("named")
    pipe.rest()


def test_whoever_waited_to_give_a_name_looks_again(
    robust: DomainList, where: str, start: Callable[..., Child]
) -> None:
    with Planted(where) as segment:
        holder = start(hold_mutex, where, segment.header("id_mutex"))
        assert holder.hear() == 0
        children = [start(name_one, where) for _ in range(4)]
        for child in children:
            assert child.hear() == "ready"
            child.tell()
        segment.await_waiter(segment.header("id_mutex"))
        for child in children:
            assert not child.conn.poll(A_MOMENT)
        assert holder.ask() == 0
        for child in children:
            assert child.hear() == "named"
    assert robust._mutex_names() == ["new"]
    assert taken(where) == 1


def test_a_damaged_name_is_nobodys_and_gets_no_second_place(robust: DomainList, where: str) -> None:
    for name in ("a", "b"):
        robust.mutex(name)
    with Planted(where) as segment:
        for at in (segment.named(0, "taken"), segment.named(0, "name")):
            with segment.changed(at, segment.read(at) ^ 1 << 13):
                assert [name for name, _ in robust.check().problems] == ["named locks"]
                with robust.mutex("b", 0):  # what can be read is found
                    pass
                for name in ("a", "new"):
                    with pytest.raises(SegmentCorrupt, match=name):
                        robust.mutex(name)
    assert robust._mutex_names() == ["a", "b"]


def test_check_sees_what_is_wrong(robust: DomainList, where: str) -> None:
    for name in ("a", "b"):
        robust.mutex(name)
    with Planted(where) as segment:

        def said(at: int, value: int, size: int = 8) -> list[str]:
            with segment.changed(at, value, size):
                return [f"{name}: {text}" for name, text in robust.check().problems]

        kind = segment.named(5, "mutex") + segment.at["mutex.__data.__kind"]
        assert said(kind, segment.read(kind, 4) ^ 1, 4) == [
            "locks: named lock at place 5: it is damaged"
        ]
        dead = 77 << 22 | 1
        assert said(segment.named(0, "owner") + segment.at["owner.who"], dead) == [
            "named locks: place 0: it is free, and signed by a thread that ended"
        ]
        assert said(segment.named(0, "taken"), 0) == [
            "named locks: place 0 has no name, and one after it has"
        ]
        copy = segment.read(segment.named(0, "name"))
        with segment.changed(segment.named(1, "name"), copy):
            taken = segment.read(segment.named(0, "taken"))
            assert said(segment.named(1, "taken"), taken) == [
                "named locks: places 0 and 1 have one name"
            ]


def test_a_flipped_bit_makes_no_death(robust: DomainList, where: str) -> None:
    with robust.mutex("a") as held, Planted(where) as segment:
        for bit in range(64):
            flipped = segment.changed(segment.named(0, "died_who"), 1 << bit)
            with flipped, pytest.raises(SegmentCorrupt, match="who died"):
                _ = held.previous_owner_died
        assert held.previous_owner_died is None


# --- storms ------------------------------------------------------------------------------------

BEGUN, ENDED = 0, 1


def storm_worker(pipe: Pipe, path: str, counts: str, seed: int) -> None:
    """Take one of the locks again and again, and count under it in two steps: whoever finds half
    a step must have been told of a death."""
    doms = DomainList.attach(path=path)
    rng = random.Random(seed)
    with open(counts, "r+b") as file:
        # Not struct.pack_into: it clears the bytes first, and a kill may come in between.
        memory = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
    locks = [doms.mutex(f"lock {i}", DEADLINE) for i in range(3)]
    turns = 0
    last = False
    while not last:
        last = pipe.conn.poll()  # told to end: once more for each
        for number in range(3) if last else [rng.randrange(3)]:
            with locks[number] as held:
                at = 3 * number
                begun, ended = memory[at + BEGUN], memory[at + ENDED]
                if begun != ended:
                    assert begun == ended + 1, (
                        f"two were in it at once: {begun} begun, {ended} ended"
                    )
                    assert held.previous_owner_died is not None, "nobody was told of a death"
                    memory[at + ENDED] = begun
                memory[at + BEGUN] = begun + 1
                for _ in range(rng.randrange(200)):
                    assert memory[at + BEGUN] == begun + 1
                memory[at + ENDED] = begun + 1
            turns += 1
    pipe.say(turns)
    pipe.rest()


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["robust", "multiprocessing"])
def test_storms_end_quietly(
    segment_dir: Path,
    start: Callable[..., Child],
    tried: Callable[[str, int], None],
    kind: Any,
) -> None:
    """Holders and waiters are killed; those who are left all get each lock once more."""
    path, counts = str(segment_dir / "storm.segment"), segment_dir / "counts"
    rng = random.Random(kind)
    for seed in range(100 if SOAK else 8):
        counts.write_bytes(bytes(72))
        with DomainList.create(path=path, max_domains=8, lock=kind) as doms:
            workers = [start(storm_worker, path, str(counts), 1000 * seed + i) for i in range(10)]
            until(lambda: counts.read_bytes()[:8] != bytes(8), "the first turn")
            for victim in workers[:8]:
                time.sleep(rng.random() * 0.01)  # when the kill comes
                victim.kill()
            for survivor in workers[8:]:
                survivor.tell()
            turns = sum(survivor.hear() for survivor in workers[8:])
            for worker in workers:
                worker.close()
            assert turns >= 6
            assert doms.check().problems == []
            assert doms.recover().held == []
            doms.unlink()
        tried("storms over named locks that ended quietly", 1)
        tried("holders and waiters of named locks that were killed", 8)


def test_a_jobs_holder_waits_for_a_named_lock_with_a_timeout() -> None:
    """The other order is a named lock's holder who begins a job: they could wait for each other."""
    with DomainList(max_domains=4) as doms:
        doms.define(xml("web1"))
        with doms.job("web1", "backup"):
            with pytest.raises(LockOrder, match="holds a job"), doms.mutex("m"):
                pass
            with doms.mutex("m", timeout=1):
                pass
        with doms.mutex("m"), doms.job("web1", "backup"):
            pass
