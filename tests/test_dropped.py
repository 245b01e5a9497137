"""Locked handles that another thread drops than the one that locked them.

The lock is free at once, whatever its thread does, and that thread's other locks are as safe as
before: the kernel marks them when it dies. Only where it is in code with robust mutexes of its own
is the lock left to it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import random
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import SOAK
from killing import (
    DEADLINE,
    OWNER_DIED,
    TESTS,
    Child,
    Nursery,
    Pipe,
    Planted,
    libc,
    list_op_pending,
    robust_list,
    until,
    xml,
)

from shmdomains import (
    DomainList,
    DomainNotLocked,
    ListNotLocked,
    LockTimeout,
    NotOwner,
)

NAMES = ["a", "b", "c"]
TURNS = 20_000 if SOAK else 1_500


@pytest.fixture
def doms(path: str) -> Iterator[DomainList]:
    with DomainList.create(path=path, max_domains=3000) as doms:
        for name in NAMES:
            doms.define(xml(name))
        yield doms


class Worker:
    """A thread of a pool: it waits in queue.get() for work, and does it."""

    def __init__(self) -> None:
        self._work: queue.Queue[Callable[[], Any] | None] = queue.Queue()
        self._done: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.tid = self.do(threading.get_native_id)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                done = work()
            except BaseException as exc:
                done = exc
            self._done.put(done)
            del work, done

    def begin(self, work: Callable[[], Any]) -> None:
        self._work.put(work)

    def end_of_work(self) -> Any:
        done = self._done.get(timeout=DEADLINE)
        if isinstance(done, BaseException):
            raise done
        return done

    def do(self, work: Callable[[], Any]) -> Any:
        self.begin(work)
        return self.end_of_work()

    def end(self) -> None:
        self._work.put(None)
        self._thread.join(DEADLINE)
        until(lambda: not os.path.exists(f"/proc/self/task/{self.tid}"), "the thread's end")


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.end()


@contextmanager
def warned() -> Iterator[list[str]]:
    """What the `ResourceWarning`s say that are given inside."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield texts
    assert all(one.category is ResourceWarning for one in said)
    texts.extend(str(one.message) for one in said)


def lock_into(box: list[Any], doms: DomainList, *names: str) -> Callable[[], None]:
    """Work: lock these, in this order."""

    def work() -> None:
        with doms.locked():
            box.extend(doms.find_by_name(name) for name in names)

    return work


def take(pipe: Pipe, path: str, name: str, timeout: float) -> None:
    """A child that locks a domain, or a named lock, and says what it saw of an earlier holder."""
    doms = DomainList.attach(path=path)
    try:
        with doms.mutex(name, timeout) if name == "m" else doms.get(name, timeout=timeout) as held:
            died = held.previous_owner_died
    except LockTimeout as exc:
        pipe.say(str(exc))
    else:
        pipe.say(None if died is None else died.tid)


def asleep(tid: int) -> bool:
    with open(f"/proc/{tid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"


def word_of(planted: Planted, name: str) -> int:
    """The futex word of a domain's mutex."""
    return planted.read(planted.slot(NAMES.index(name), "mutex")) & 0xFFFFFFFF


def compiled(source: str, folder: Path) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "no C compiler"
    library = folder / f"{source}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, TESTS / source], check=True)
    return library


# --- whatever its thread does ---------------------------------------------------------------------


def idle(pipe: int) -> None:
    pass


def sleep(pipe: int) -> None:
    time.sleep(1)


def read_without_the_gil(pipe: int) -> None:
    libc.read(pipe, ctypes.create_string_buffer(1), 1)


@pytest.mark.parametrize("does", [idle, sleep, read_without_the_gil])
@pytest.mark.parametrize("what", ["domain", "mutex"])
def test_free_at_once_whatever_its_thread_does(
    start: Callable[..., Child],
    doms: DomainList,
    path: str,
    worker: Worker,
    does: Callable[[int], None],
    what: str,
) -> None:
    box: list[Any] = []
    begun = threading.Event()
    reads, writes = os.pipe()

    def work() -> None:
        if what == "domain":
            box.append(doms.get("a"))
            box[0].data = "uncommitted"
        else:
            box.append(doms.mutex("m"))
            box[0].lock()
        begun.set()
        does(reads)

    worker.begin(work)
    assert begun.wait(DEADLINE)
    with warned() as said:
        box.clear()
        gc.collect()
    assert len(said) == 1
    assert f"thread {worker.tid}" in said[0] and "is freed: lock, use and unlock" in said[0]
    assert "shmdomains.aio" in said[0]
    name = "a" if what == "domain" else "m"
    assert start(take, path, name, 0).hear() is None
    if what == "domain":
        with doms.get("a", timeout=0) as dom:
            assert dom.data is None and dom.previous_owner_died is None
    else:
        with doms.mutex("m", 0) as held:
            assert held.previous_owner_died is None
    os.write(writes, b"x")
    worker.end_of_work()
    os.close(reads), os.close(writes)
    assert doms.check().problems == []
    worker.do(lambda: doms.get("a", timeout=0).unlock())


def test_who_waits_is_woken(doms: DomainList, path: str, worker: Worker, tmp_path: Path) -> None:
    """One whose waits have no slices, so that it wakes by nothing else."""
    box: list[Any] = []
    worker.do(lambda: box.append(doms.get("a")))
    with Nursery(LD_PRELOAD=str(compiled("untimed_lock.c", tmp_path))) as untimed:
        child = untimed.start(take, path, "a", DEADLINE)
        until(lambda: any(one.name == "a" and one.waiting for one in doms.locks()), "the wait")
        until(lambda: asleep(child.pid), "the sleep")
        with warned():
            box.clear()
        assert child.hear() is None


@pytest.mark.parametrize("then", ["goes on waiting", "gets it in this slice"])
def test_a_thread_that_waits_for_another_lock_frees_it_after_its_slice(
    start: Callable[..., Child], doms: DomainList, path: str, worker: Worker, then: str
) -> None:
    box: list[Any] = []
    held = doms.get("b")

    def work() -> None:
        box.append(doms.mutex("m"))
        box[0].lock()
        doms.get("b", timeout=DEADLINE).unlock()

    worker.begin(work)
    until(lambda: any(one.name == "b" and one.waiting for one in doms.locks()), "the wait")
    with warned() as said:
        if then == "gets it in this slice":
            held.unlock()
        box.clear()
    assert len(said) == 1 and f"thread {worker.tid}" in said[0]
    if then == "goes on waiting":
        assert "is freed within 0.1 s, by that thread" in said[0]
    assert start(take, path, "m", DEADLINE / 2).hear() is None
    if then == "goes on waiting":
        held.unlock()
    worker.end_of_work()
    assert start(take, path, "m", 0).hear() is None


def test_a_signal_handler_of_the_holder_runs(doms: DomainList, worker: Worker) -> None:
    """Between two slices of its wait: nothing is under way in its list then."""
    box: list[Any] = [doms.mutex("m")]
    box[0].lock()
    seen: list[Any] = []
    gone = threading.Event()
    worker.do(lambda: box.append(doms.get("b")))

    def drop() -> None:
        with warned() as said:
            del box[0]
        seen.extend(said)
        with doms.mutex("m", 0):
            gone.set()

    def handler(number: int, frame: object) -> None:
        worker.begin(drop)
        assert gone.wait(DEADLINE)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGUSR1])
        timer.start()
        with pytest.raises(LockTimeout):
            doms.get("b", timeout=0.5)
        timer.join()
        worker.end_of_work()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(seen) == 1 and "is freed: lock" in seen[0]
    worker.do(lambda: box.pop().unlock())


def test_a_multiprocessing_lock_is_free_at_once(worker: Worker) -> None:
    with DomainList(max_domains=4, lock="multiprocessing") as doms:
        doms.define(xml("a"))
        box: list[Any] = []
        worker.do(lambda: box.append(doms.get("a")))
        with warned() as said:
            box.clear()
        assert len(said) == 1 and "the lock is freed: use 'with'" in said[0]
        doms.get("a", timeout=0).unlock()


def test_who_drops_counts_nothing(doms: DomainList, worker: Worker) -> None:
    """1,000 locks a thread: neither of the two has fewer afterwards."""
    for n in range(1000):
        doms.define(xml(f"n{n}"))
    names = [f"n{n}" for n in range(1000)]
    for _ in range(2):
        box: list[Any] = []
        worker.do(lock_into(box, doms, *names))
        with warned() as said:
            random.shuffle(box)
            box.clear()
        assert len(said) == 1000 and all("is freed: lock" in one for one in said)
    with doms.locked():
        held = [doms.find_by_name(name) for name in names]
    for dom in held:
        dom.unlock()


# --- what else it holds -------------------------------------------------------------------------


@pytest.mark.parametrize("dropped", ["a", "b", "c", "ab", "ba", "bc", "ca", "abc", "bca"])
def test_the_other_locks_of_its_thread_are_as_safe_as_before(
    start: Callable[..., Child], doms: DomainList, path: str, planted: Planted, dropped: str
) -> None:
    """Some of three are dropped, one is unlocked by its thread, and it ends with the rest."""
    for unlocked in ["", *sorted(set(NAMES) - set(dropped))]:
        worker = Worker()
        box: list[Any] = []
        worker.do(lock_into(box, doms, *NAMES))
        held = dict(zip(NAMES, box, strict=True))
        box.clear()
        with warned() as said:
            for name in dropped:
                del held[name]
        assert len(said) == len(dropped)
        assert [name for name in NAMES if not word_of(planted, name)] == sorted(dropped)
        assert len(worker.do(robust_list)) == len(held)
        if unlocked:
            worker.do(held.pop(unlocked).unlock)
            assert not word_of(planted, unlocked)
        # What was freed is there for this thread to lock again, after the others in its list.
        if not held:
            worker.do(lock_into(box, doms, *dropped))
            held.update(zip(dropped, box, strict=True))
            box.clear()
        assert len(worker.do(robust_list)) == len(held)
        rest = sorted(held)
        worker.end()
        marked = [name for name in NAMES if word_of(planted, name) & OWNER_DIED]
        assert marked == rest, "the kernel did not find them"
        for name in NAMES:
            found = start(take, path, name, DEADLINE).hear()
            assert found == (worker.tid if name in rest else None)
        held.clear()
    assert doms.check().problems == []


def drop_and_hold(pipe: Pipe, path: str, dropped: str) -> None:
    doms = DomainList.attach(path=path)
    worker = Worker()
    box: list[Any] = []
    worker.do(lock_into(box, doms, *NAMES))
    with warned():
        del box[NAMES.index(dropped)]
    pipe.say(worker.tid)
    pipe.rest()


@pytest.mark.parametrize("dropped", NAMES)
def test_a_process_that_is_killed_later(
    start: Callable[..., Child], doms: DomainList, path: str, dropped: str
) -> None:
    child = start(drop_and_hold, path, dropped)
    tid = child.hear()
    doms.get(dropped, timeout=0).unlock()
    child.kill()
    for name in NAMES:
        with doms.get(name, timeout=DEADLINE) as dom:
            died = dom.previous_owner_died
            assert (died and died.tid) == (None if name == dropped else tid)


def test_while_its_thread_ends(doms: DomainList, tried: Callable[[str, int], None]) -> None:
    """The last that a thread does is not done under the GIL."""
    for _ in range(TURNS // 5):
        box: list[Any] = []
        thread = threading.Thread(target=lambda box=box: box.append(doms.get("a")))
        thread.start()
        until(lambda box=box: box, "the lock")
        with warned() as said:
            box.clear()
        assert len(said) <= 1  # it has ended already, and its lock with it
        doms.get("a", timeout=DEADLINE).unlock()
        thread.join()
    tried("handles dropped while their thread ended", TURNS // 5)
    assert doms.check().problems == []


# --- robust mutexes that are not ours -----------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(compiled("foreign_robust.c", tmp_path_factory.mktemp("foreign"))))


def mutex_of(foreign: ctypes.CDLL) -> ctypes.Array[Any]:
    mutex = (ctypes.c_uint64 * 8)()
    assert foreign.make(mutex) == 0
    return mutex


def refused(said: list[str], worker: Worker) -> bool:
    return len(said) == 1 and "is freed when that thread next locks something, or ends" in said[0]


@pytest.mark.parametrize("where", ["before", "after", "waits"])
def test_a_foreign_robust_mutex_of_its_thread(
    start: Callable[..., Child],
    doms: DomainList,
    path: str,
    worker: Worker,
    foreign: ctypes.CDLL,
    where: str,
) -> None:
    """Then the lock is left to its thread, which frees it with its next call; who waits is told."""
    mutex = mutex_of(foreign)
    box: list[Any] = []
    waits: list[Any] = []
    steps = [lambda: libc.pthread_mutex_lock(mutex), lambda: box.append(doms.get("a"))]
    if where == "waits":
        libc.pthread_mutex_lock(mutex)
        steps = [lambda: box.append(doms.get("a"))]
    for step in steps if where != "after" else reversed(steps):
        assert not worker.do(step)
    if where == "waits":

        def wait() -> Any:
            waits.append(threading.get_native_id())
            return libc.pthread_mutex_lock(mutex)

        worker.begin(wait)
        until(lambda: waits, "the call")
        until(lambda: asleep(waits[0]), "the wait")
    with warned() as said:
        box.clear()
    assert refused(said, worker)
    text = start(take, path, "a", 0.1).hear()
    assert "its handle was dropped in another thread" in text
    if where == "waits":
        libc.pthread_mutex_unlock(mutex)
        assert worker.end_of_work() == 0
    worker.do(lambda: doms.get("b", timeout=0).unlock())
    assert start(take, path, "a", 0).hear() is None
    assert worker.do(lambda: len(robust_list())) == 1
    assert worker.do(lambda: libc.pthread_mutex_unlock(mutex)) == 0
    assert worker.do(lambda: (robust_list(), list_op_pending())) == ([], None)


@pytest.mark.parametrize("held", [["a"], ["b", "a"], ["a", "b"], ["b", "a", "c"]])
@pytest.mark.parametrize("idle", [0, 300])
def test_foreign_code_locks_at_the_same_instant(
    doms: DomainList,
    worker: Worker,
    foreign: ctypes.CDLL,
    tried: Callable[[str, int], None],
    held: list[str],
    idle: int,
) -> None:
    """Whether the lock is freed or left, the list of its thread is whole, and has what it holds."""
    one, two = mutex_of(foreign), mutex_of(foreign)
    at_once = 0
    for _ in range(TURNS // 8):
        begun, stop = ctypes.c_int(0), ctypes.c_int(0)
        box: list[Any] = []
        worker.do(lock_into(box, doms, *held))
        dropped = held.index("a")
        worker.begin(
            lambda begun=begun, stop=stop: foreign.busy(
                one, two, ctypes.byref(begun), ctypes.byref(stop), idle
            )
        )
        until(lambda begun=begun: begun.value, "foreign code")
        with warned() as said:
            del box[dropped]
        stop.value = 1
        worker.end_of_work()
        freed = not refused(said, worker)
        assert not freed or "is freed: lock" in said[0]
        at_once += freed
        assert len(worker.do(robust_list)) == len(held) - freed
        for dom in box:
            worker.do(dom.unlock)
        worker.do(lambda: doms.get("a", timeout=0).unlock())
        assert worker.do(robust_list) == []
        doms.get("a", timeout=0).unlock()
        box.clear()
    tried("handles dropped beside foreign robust mutexes, freed", at_once)
    tried("handles dropped beside foreign robust mutexes, left", TURNS // 8 - at_once)


# --- what it says instead -----------------------------------------------------------------------


def test_a_handle_in_another_thread_says_what_to_do(doms: DomainList, worker: Worker) -> None:
    """As after ``await asyncio.to_thread(doms.get, "a")``."""
    mutex = doms.mutex("m")
    worker.do(mutex.lock)
    worker.do(doms.lock)
    dom = worker.do(lambda: doms.find_by_name("a"))
    words = f"thread {worker.tid} of this process holds .*in one thread; in asyncio use shm"
    with pytest.raises(DomainNotLocked, match=words):
        _ = dom.state
    with pytest.raises(DomainNotLocked, match=words):
        dom.autostart = True
    with pytest.raises(DomainNotLocked, match=words):
        dom.commit()
    with pytest.raises(NotOwner, match=words):
        dom.unlock()
    with pytest.raises(NotOwner, match=words):
        mutex.unlock()
    with pytest.raises(NotOwner, match=words):
        doms.unlock()
    with pytest.raises(ListNotLocked):
        doms.find_by_name("a")
    for unlock in (doms.unlock, mutex.unlock, dom.unlock):
        worker.do(unlock)
    with pytest.raises(DomainNotLocked, match="not locked by this thread: with dom"):
        _ = dom.state
