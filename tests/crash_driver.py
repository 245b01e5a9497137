"""Kill a process at every store that an operation makes into a segment, and see what is left.

``crash_driver.py FOLDER``, run by test_crash_points.py in a clean process with the test build of
the core first on its path. It reads requests from its standard input and answers each with one line
of JSON. For one operation and each point n of it:

1. The bytes of a prepared segment are written to a file, a process is forked, attaches, does the
   operation, and is killed by the hook in crash_points.c before its n-th store.
2. Another process attaches. Before it repairs anything, what can be read without a lock is the old
   state or the new one, and not older than what the victim knew to be committed; uuid, name and id
   lead to these domains, and every key of a state that did not come about leads nowhere.
3. It takes every lock, and repairs. Every invariant holds, no state has changed, and the keys lead
   where they did.
4. The events are those of the commits that happened, each once and in their order: before the
   repair perhaps without the last commit's, after it with them. Whose death the next holder of a
   domain is told of, that is an event, once.
5. Everything works again, and then every cell of the heap is accounted for: what is in use is what
   the blobs that can be read need, and no garbage is left.

Then the same with a second death: a process that takes every lock, those of free slots included,
is killed at each point m of what it does, and another one comes.

An operation is a generator over an attached list. It yields where a change has been acknowledged
and more is to come; what is committed between two yields is committed by one store. With each goes
the number of points that it is known to have. It may rise; when it falls, stores bypass the hook,
or the operation does not do any more what it did.

With ``lock="multiprocessing"`` all of it holds, too: the semaphores are not in the segment, so each
death begins with fresh ones, and what it did to them is left as it is for who comes next.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import traceback
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shmdomains import (
    CheckReport,
    DomainDef,
    DomainList,
    DomainState,
    EventType,
    Job,
    LockTimeout,
)
from shmdomains.config import ConfigDirs
from shmdomains.memory import segment_file
from shmdomains.memory._core import core
from shmdomains.rules.values import encode_data
from shmdomains.rules.work import Begun, Caller, Work

DEADLINE = 10  # seconds; for what takes milliseconds
CELL = 64
SUM = 8  # bytes of the checksum in front of a blob
SMALL = 120  # bytes of data that lie in the record
UUIDS = [str(uuid.UUID(int=i + 1)) for i in range(2000)]


def definition(number: int, memory: int = 1000, size: int = 1, name: str = "") -> DomainDef:
    """Of domain `number`; `size` bytes of description make it larger."""
    return DomainDef.from_xml(
        f"<domain type='kvm'><name>{name or f'vm{number}'}</name><uuid>{UUIDS[number]}</uuid>"
        f"<description>{'x' * size}</description><memory>{memory}</memory>"
        "<os><type>hvm</type></os></domain>"
    )


# --- segments to begin with -----------------------------------------------------------------------


def nothing(doms: DomainList) -> None:
    """No segment at all."""


def empty(doms: DomainList) -> None:
    """No domain yet, no slot, no heap."""


def few(doms: DomainList) -> None:
    """Four domains and a free slot. vm1 is active; vm1 and vm3 have a next definition. There is a
    named lock."""
    doms.mutex("scheduler")
    for number in range(5):
        with doms.locked():
            dom = doms.assign_def(definition(number), True)
        with dom:
            if number < 4:
                dom.data = {"number": number, "text": "x" * 200}
            if number == 1:
                dom.activate(pid=11)
            if number in (1, 3):
                dom.next_definition = definition(number, 2000)
    doms.undefine(name="vm4")


def small_data(doms: DomainList) -> None:
    """As few, but all data lies in the record, vm3's was written twice, and vm2 has none."""
    few(doms)
    for number, data in ((0, {"count": 1}), (1, "y" * 118), (2, None), (3, "first"), (3, "second")):
        with doms.get(f"vm{number}") as dom:
            dom.data = data


def a_dead_holder(doms: DomainList) -> None:
    """Whose two jobs are on vm0."""
    few(doms)
    with doms.get("vm0") as dom:
        dead = Caller(1 << 21, 1 << 21, 1)
        begun = [Begun("gone", kind, 0, dead, None, 0.0) for kind in (Job.ASYNC, Job.QUERY)]
        dom._work = Work(jobs=tuple(begun))


def crowded(doms: DomainList, count: int = 256, active: bool = False) -> None:
    """As many domains as there are slots with memory."""
    one = definition(0)
    for number in range(count):
        with doms.locked():
            other = one.replace(name=f"vm{number}", uuid=uuid.UUID(UUIDS[number]))
            dom = doms.assign_def(other, True)
        with dom:
            if active:
                dom.activate()


def full_indexes(doms: DomainList) -> None:
    """Active domains, as many as the first table of each index takes."""
    crowded(doms, 512, True)


LARGE = (crowded, full_indexes)  # their recovery is long: a selection of its points will do


# --- operations -----------------------------------------------------------------------------------


Run = Callable[[Any], Iterator[None]]


@dataclass(frozen=True)
class Operation:
    """What is done, on what, and what is known about it."""

    run: Run
    points: int
    on: Callable[[DomainList], None]
    # "attached"; "inherited": forked after the list was attached; "bare": gets the `Place`
    start: str
    # another operation, that yields between the commits of this one
    like: Run | None
    # how many locks it takes, for lists with multiprocessing locks; None: not tried with those
    locks: int | None
    # domains or cells by the hundred: a selection of the points will do
    large: bool

    @property
    def name(self) -> str:
        return self.run.__name__.replace("_", " ")


OPERATIONS: dict[str, Operation] = {}


def operation(
    points: int,
    on: Callable[[DomainList], None] = few,
    start: str = "attached",
    like: Run | None = None,
    locks: int | None = None,
    large: bool = False,
) -> Callable[[Run], Run]:
    def enter(run: Run) -> Run:
        one = Operation(run, points, on, start, like, locks, large)
        OPERATIONS[one.name] = one
        return run

    return enter


# Segments


@operation(points=8, on=nothing, start="bare")
def create(place: Place) -> Iterator[None]:
    place.create()
    yield


@operation(points=2, start="bare")
def attach_and_close(place: Place) -> Iterator[None]:
    place.attach().close()
    yield


@operation(points=1, start="inherited")
def first_use_after_a_fork(doms: DomainList) -> Iterator[None]:
    yield len(doms)


@operation(points=0)
def snapshot(doms: DomainList) -> Iterator[None]:
    doms.snapshot(), doms.list(active=True), doms.count(), doms.info, doms.check()
    doms.peek(name="vm0"), doms.peek(id=1), UUIDS[0] in doms, UUIDS[9] in doms
    doms.locks(), doms.statistics, doms.statistics_of_all()
    yield


@operation(points=17)
def settings(doms: DomainList) -> Iterator[None]:
    with doms.locked():
        doms._remember(ConfigDirs(Path("/larger" * 10)))
        yield
        doms._remember(ConfigDirs(Path("/small")))
        yield


# Locks


@operation(points=4, locks=1)
def list_lock(doms: DomainList) -> Iterator[None]:
    with doms.locked():
        yield


@operation(points=4, locks=1)
def domain_lock(doms: DomainList) -> Iterator[None]:
    with doms.get(name="vm0"):
        yield


@operation(points=24, locks=2)
def say_why(doms: DomainList) -> Iterator[None]:
    with doms.locked(why="to count them all, one by one"):
        pass
    with doms.get(name="vm0", why="a snapshot of a large disk"):
        yield


@operation(points=12, locks=1)
def wait_in_vain(doms: DomainList) -> Iterator[None]:
    """Another thread holds the domain, and does nothing meanwhile. The first waiter of a list: the
    table gets its memory."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with doms.get(name="vm0"):
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        doms.get(name="vm0", timeout=0.001)
    except LockTimeout:
        done.set()
    holder.join()
    yield


@operation(points=4)
def named_lock(doms: DomainList) -> Iterator[None]:
    with doms.mutex("scheduler"):
        yield


@operation(points=12)
def named_lock_with_a_reason(doms: DomainList) -> Iterator[None]:
    with doms.mutex("scheduler", why="rebalancing the hosts of rack 7"):
        yield


def dropped_here(lock: Callable[[], list[Any]], which: int) -> None:
    """Another thread takes the locks, this one drops a handle, the other one unlocks the rest."""
    box: list[Any] = []
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        box.extend(lock())
        held.set()
        done.wait()
        for handle in box:
            handle.unlock()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del box[which]
    done.set()
    holder.join()


@operation(points=11)
def drop_the_only_one(doms: DomainList) -> Iterator[None]:
    dropped_here(lambda: [doms.get(name="vm0")], 0)
    yield


@operation(points=23)
def drop_the_middle_one(doms: DomainList) -> Iterator[None]:
    def lock() -> list[Any]:
        with doms.locked():
            return [doms.find_by_name(f"vm{number}") for number in range(3)]

    dropped_here(lock, 1)
    yield


@operation(points=11)
def drop_a_named_lock(doms: DomainList) -> Iterator[None]:
    def lock() -> list[Any]:
        mutex = doms.mutex("scheduler")
        mutex.lock()
        return [mutex]

    dropped_here(lock, 0)
    yield


@operation(points=9)
def name_a_lock(doms: DomainList) -> Iterator[None]:
    doms.mutex("é" * 31)
    yield


@operation(points=16, locks=4)
def find_under_the_list_lock(doms: DomainList) -> Iterator[None]:
    with doms.locked():
        found = [doms.find_by_uuid(UUIDS[0]), doms.find_by_id(1), doms.find_by_name("vm2")]
        for dom in found:
            dom.unlock()
    yield


@operation(points=16, locks=4)
def lock_many(doms: DomainList) -> Iterator[None]:
    with doms.lock_many(UUIDS[:3]):
        yield


# Define


@operation(points=138)
def assign_new(doms: DomainList) -> Iterator[None]:
    with doms.locked():
        dom = doms.assign_def(definition(5, size=300), True)
        yield
    dom.unlock()


@operation(points=78, locks=2)
def assign_new_and_change(doms: DomainList) -> Iterator[None]:
    """One of the locks is that of a free slot, which is passed by if it stays locked."""
    with doms.locked():
        dom = doms.assign_def(definition(5))
    yield
    with dom:
        dom.data = [1, 2, 3]
        dom.persistent = True


@operation(points=68, on=empty)
def assign_the_first(doms: DomainList) -> Iterator[None]:
    """The first slots are committed, and the heap."""
    with doms.locked():
        doms.assign_def(definition(0), True).unlock()
    yield


@operation(points=69, on=crowded, large=True)
def assign_with_slot_growth(doms: DomainList) -> Iterator[None]:
    """There is no free slot, and no memory for another one."""
    with doms.locked():
        doms.assign_def(definition(1000), True).unlock()
    yield


@operation(points=1625, on=full_indexes, large=True)
def assign_with_index_growth(doms: DomainList) -> Iterator[None]:
    """Three indexes: uuid and name when it is defined, id when it is activated."""
    with doms.locked():
        dom = doms.assign_def(definition(1000), True)
    yield
    dom.activate()
    dom.unlock()


@operation(points=63)
def define(doms: DomainList) -> Iterator[None]:
    doms.define(definition(5))
    yield


@operation(points=59)
def assign_over_inactive(doms: DomainList) -> Iterator[None]:
    with doms.locked():
        dom = doms.assign_def(definition(0, 2000))
    dom.unlock()
    yield


@operation(points=585, large=True)
def assign_over_inactive_larger(doms: DomainList) -> Iterator[None]:
    """More cells than a word of the map has bits."""
    with doms.locked():
        dom = doms.assign_def(definition(0, 2000, size=2100))
    dom.unlock()
    yield


@operation(points=84)
def assign_over_active(doms: DomainList) -> Iterator[None]:
    with doms.locked():
        dom = doms.assign_def(definition(1, 3000, size=100))
    dom.unlock()
    yield


# Change


@operation(points=10, locks=1)
def change_fields(doms: DomainList) -> Iterator[None]:
    with doms.get(name="vm0") as dom:
        dom.set_state(DomainState.CRASHED, 1)
        dom.autostart = True
    yield


@operation(points=124)
def change_a_blob_to_a_larger_one(doms: DomainList) -> Iterator[None]:
    with doms.get(name="vm0") as dom:
        dom.data = "y" * 800
    yield


@operation(points=24)
def change_a_blob_to_a_smaller_one(doms: DomainList) -> Iterator[None]:
    with doms.get(name="vm0") as dom:
        dom.data = "y" * 130
    yield


@operation(points=50)
def change_a_blob_to_one_of_equal_size(doms: DomainList) -> Iterator[None]:
    with doms.get(name="vm0") as dom:
        dom.data = {"number": 9, "text": "y" * 200}
    yield


@operation(points=52, on=small_data, locks=1)
def change_small_data(doms: DomainList) -> Iterator[None]:
    """From one half into the other, back, and as many bytes as there is room for."""
    with doms.get(name="vm0") as dom:
        for data in ({"count": 2}, {"count": 3, "name": "é"}, "z" * (SMALL - 2)):
            dom.data = data
            dom.commit()
            yield


@operation(points=205, on=small_data)
def change_small_data_to_large(doms: DomainList) -> Iterator[None]:
    """By one byte, and back; then by way of none."""
    with doms.get(name="vm3") as dom:
        for size in (SMALL - 2, SMALL - 1, SMALL - 2):
            dom.data = "z" * size
            dom.commit()
            yield
        dom.data = None
        dom.commit()
        yield
        dom.data = "z" * 500
        dom.commit()
        yield
        dom.data = 1
    yield


@operation(points=37, on=small_data)
def give_small_data(doms: DomainList) -> Iterator[None]:
    """To one that has none, and take it away."""
    with doms.get(name="vm2") as dom:
        dom.data = [1, 2, 3]
        dom.commit()
        yield
        dom.data = None
        dom.commit()
        yield
        dom.data = [1, 2, 3, 4]
        dom.set_state(DomainState.CRASHED, 1)
    yield


@operation(points=81, on=small_data, locks=2)
def count_in_the_data(doms: Any) -> Iterator[None]:
    """In the record, where it is created, and until it grows out of it."""
    with doms.get(name="vm0") as dom:
        dom.add("count")
        dom.add("count", 500)
        dom.commit()
        yield
        dom.add("x" * 108)
        dom.commit()
        yield
    doms.add("vm2", "count", -1)
    yield
    doms.add("vm2", "count", 1 << 40)
    yield


@operation(points=17)
def clear_a_blob(doms: DomainList) -> Iterator[None]:
    with doms.get(name="vm0") as dom:
        dom.data = None
    yield


@operation(points=115)
def change_everything(doms: DomainList) -> Iterator[None]:
    with doms.get(name="vm0") as dom:
        dom.set_state(DomainState.SHUTOFF, 3)
        dom.definition = definition(0, 3000)
        dom.next_definition = definition(0, 4000)
        dom.data = [1] * 100
        dom.persistent = False
    yield


@operation(points=44)
def commit_mid_way(doms: DomainList) -> Iterator[None]:
    with doms.get(name="vm0") as dom:
        dom.data = "first" * 30
        dom.commit()
        yield
        dom.data = "second" * 30
        dom.autostart = True
        dom.commit()
        yield
        dom.data = "never"
        dom.rollback()


@operation(points=4)
def roll_back(doms: DomainList) -> Iterator[None]:
    try:
        with doms.get(name="vm0") as dom:
            dom.state = DomainState.CRASHED
            dom.data = "never"
            raise InterruptedError
    except InterruptedError:
        yield


@operation(points=10)
def set_autostart(doms: DomainList) -> Iterator[None]:
    with doms.get(name="vm0") as dom:
        doms.set_autostart(dom, True)
    yield


@operation(points=156)
def rename(doms: DomainList) -> Iterator[None]:
    with doms.locked(), doms.find_by_name("vm3") as dom:
        doms.rename(dom, "renamed to something long " * 5)
        yield


@operation(points=389, on=small_data)
def rename_with_small_data(doms: DomainList) -> Iterator[None]:
    """It makes way for the name; then it comes to lie where the name before was, and makes way
    once more."""
    with doms.locked(), doms.find_by_name("vm3") as dom:
        doms.rename(dom, "renamed to something long " * 5)
        yield
        dom.data = "third"
        dom.commit()
        yield
        doms.rename(dom, "vm3")
        yield


@operation(points=64, on=small_data)
def swap_with_small_data(doms: DomainList) -> Iterator[None]:
    """The definitions change places, the data goes from half to half, an id comes and goes."""
    with doms.get(name="vm1") as dom:
        dom.deactivate()
        dom.data = "first"
        dom.commit()
        yield
        dom.data = "second"
        dom.activate(pid=12)
        dom.commit()
        yield


@operation(points=15, locks=1)
def activate(doms: DomainList) -> Iterator[None]:
    with doms.get(name="vm0") as dom:
        dom.activate(pid=5)
    yield


@operation(points=21)
def deactivate(doms: DomainList) -> Iterator[None]:
    """The next definition becomes the live one."""
    with doms.get(name="vm1") as dom:
        dom.deactivate()
    yield


@operation(points=24)
def restart(doms: DomainList) -> Iterator[None]:
    """Another id in one commit."""
    with doms.get(name="vm1") as dom:
        dom.deactivate()
        dom.activate(pid=12)
    yield


# Jobs


@operation(points=180, locks=3)
def a_job(doms: DomainList) -> Iterator[None]:
    """It begins, says how far it is, and ends; a dead victim still has it."""
    with doms.job("vm0", "long work") as job:
        yield
        job.progress({"done": 1, "text": "x" * 500})
        yield
    yield


@operation(points=620)
def an_async_job(doms: DomainList) -> Iterator[None]:
    """With another one in it, and somebody who asks to end it."""
    with doms.job("vm1", "migrate", Job.ASYNC) as job:
        yield
        with doms.job("vm1", "step", Job.ASYNC_NESTED, why="y" * 200) as step:
            yield
            job.progress("x" * 300)
            yield
            step.progress(1)
            yield
            job._dom.abort_job()
            yield
        yield
    yield


@operation(points=105, on=a_dead_holder)
def a_job_in_a_dead_holders_place(doms: DomainList) -> Iterator[None]:
    with doms.job("vm0", "clean up", timeout=0) as job:
        assert job.previous_owner_died is not None
        yield
    yield


# Remove


@operation(points=73)
def deactivate_and_back(doms: DomainList) -> Iterator[None]:
    """The two definitions change places, and a next one comes into the other; then again."""
    with doms.get(name="vm1") as dom:
        dom.deactivate()
        dom.next_definition = definition(1, 4000)
        dom.commit()
        yield
        dom.activate()
        dom.deactivate()
    yield


@operation(points=32, locks=3)
def remove_inactive(doms: DomainList) -> Iterator[None]:
    with doms.get(name="vm0") as dom:
        pass
    with doms.locked():
        doms.remove_inactive(dom)
    yield


@operation(points=14)
def undefine_active(doms: DomainList) -> Iterator[None]:
    doms.undefine(name="vm1")
    yield


@operation(points=166, on=small_data)
def remove_with_small_data(doms: DomainList) -> Iterator[None]:
    """The next one gets the slot, no data, and then some."""
    with doms.locked():
        doms.remove_inactive(doms._handles()[0])
        yield
        dom = doms.assign_def(definition(5), True)
        yield
    with dom:
        dom.data = "first"
        dom.commit()
        yield
        dom.data = "second"
        dom.commit()
        yield
    doms.undefine(name="vm5")
    yield


def remove_one_by_one(doms: DomainList) -> Iterator[None]:
    for dom in doms._handles():
        with doms.locked(), dom:
            doms._remove(dom)
        yield


@operation(points=114, like=remove_one_by_one, locks=5)
def free(doms: DomainList) -> Iterator[None]:
    """Every domain, active ones too."""
    with doms.locked():
        doms.free()
    yield


# --- where the segment is -------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """The bytes of a segment, and which of its multiprocessing locks are taken."""

    size: int
    parts: tuple[tuple[int, bytes], ...]
    taken: tuple[int, ...] = ()


class Place:
    """A folder of its own for a segment that is written anew for each case."""

    def __init__(self, folder: Path, lock: str) -> None:
        folder.mkdir(0o700)
        self.folder, self.lock = folder, lock
        self.path = folder / "list.segment"
        self.locks: list[Any] = []  # of the list, then of the slots

    def create(self) -> DomainList:
        context = multiprocessing.get_context("fork")
        slots = 1000 if self.lock == "robust" else 8
        return DomainList.create(path=self.path, max_domains=slots, lock=self.lock, context=context)

    def attach(self) -> DomainList:
        doms = DomainList.__new__(DomainList)
        locks = (self.locks[0], self.locks[1:]) if self.locks else ()
        fd = segment_file.attach(self.path)
        doms._begin_file(fd, self.path, None, self.path, *locks)
        os.close(fd)
        return doms

    def prepare(self, fill: Callable[[DomainList], None]) -> Image | None:
        """A segment that `fill` filled, the same in every run."""
        if fill is nothing:
            return None
        self.create().close()
        with open(self.path, "r+b") as file:
            assert ctypes.PyDLL(core.__file__).sd_crash_settle_seed(file.fileno()) == 0
        self.write(self.read())
        with self.attach() as doms:
            fill(doms)
        return self.read()

    def read(self) -> Image:
        parts, end = [], 0
        with open(self.path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while True:
                try:
                    begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
                except OSError:  # no more of it
                    break
                end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
                parts.append((begin, os.pread(file.fileno(), end - begin, begin)))
        taken = [i for i, lock in enumerate(self.locks) if not lock.acquire(False)]
        for i, lock in enumerate(self.locks):
            if i not in taken:
                lock.release()
        return Image(size, tuple(parts), tuple(taken))

    def write(self, image: Image | None) -> None:
        for entry in self.folder.iterdir():
            entry.unlink()
        if image is None:
            return
        with open(self.path, "xb", buffering=0) as file:
            os.fchmod(file.fileno(), 0o600)
            os.ftruncate(file.fileno(), image.size)
            for at, part in image.parts:
                os.pwrite(file.fileno(), part, at)
        if self.lock == "multiprocessing":
            make = multiprocessing.get_context("fork").Lock
            self.locks = [make() for _ in range(9)]
            for i in image.taken:
                self.locks[i].acquire()


# --- what can be seen -----------------------------------------------------------------------------

State = dict[str, Any]  # uuid -> fields and blobs, and the settings, and what locks are named


def state_of(doms: DomainList) -> State:
    """All that is committed, read without a lock."""
    state: State = {
        str(info.uuid): (
            info.name,
            info.id,
            (info.state, info.reason, info.persistent, info.autostart, info.pid),
            info.definition.encode(),
            None if info.next_definition is None else info.next_definition.encode(),
            None if info.data is None else encode_data(info.data),
            jobs_of(info),
        )
        for info in doms.snapshot()
    }
    return {**state, "settings": doms._settings(), "mutexes": doms._mutex_names()}


def jobs_of(info: Any) -> tuple[Any, ...]:
    """What is the same in each run."""
    jobs = () if info._work is None else info._work.jobs
    return tuple(
        (job.operation, job.kind, job.progress, job.abort, len(job.replaced)) for job in jobs
    )


Happened = tuple[Any, ...]
Death = tuple[str, str]  # the domain's uuid, who died holding it


def events_of(doms: DomainList) -> tuple[list[Happened], list[Death]]:
    """All that happened, and who died holding which domain. Not by `watch`, which mends."""
    happened, died = [], []
    for event in map(doms._event, range(1, doms._event_count + 1)):
        assert event is not None
        if event.type is EventType.HOLDER_DIED:
            died.append((str(event.uuid), str(event.holder)))
        else:
            happened.append((event.type, event.detail, event.uuid, event.name, event.id))
    return happened, died


def domains_of(state: State | None) -> dict[str, Any]:
    no_domains = ("settings", "mutexes", "events")
    return {key: value for key, value in (state or {}).items() if key not in no_domains}


def with_events(doms: DomainList) -> State:
    return {**state_of(doms), "events": events_of(doms)[0]}


def fits(known: State | None, state: State) -> bool:
    """Whether it is this state, whatever is known of its events."""
    return known is not None and {**state, "events": known["events"]} == known


def cells_of(state: State) -> int:
    """The cells of the heap that this state needs, once small data is in the records."""
    blobs = [blob for one in domains_of(state).values() for blob in one[3:5]]
    data = [one[5] for one in domains_of(state).values()]
    return sum(map(cells, blobs)) + sum(cells(one) for one in data if one and len(one) > SMALL)


def cells_of_work(doms: DomainList) -> int:
    """Those of what is under way; its size differs from run to run."""
    works = [info._work for info in doms.snapshot()]
    return sum(cells(work.encode()) for work in works if work is not None)


def cells(blob: bytes | None) -> int:
    return 0 if blob is None else -(-(SUM + len(blob)) // CELL)


def difference(found: State | None, allowed: list[State | None]) -> str:
    def brief(state: State | None) -> object:
        if state is None:
            return "no segment"
        return {
            name: (*rest[:2], *(blob and zlib.crc32(blob) for blob in rest[2:5]), rest[5])
            for name, *rest in domains_of(state).values()
        }

    return f"{brief(found)} is none of {[brief(one) for one in allowed]}"


def hook(name: str) -> ctypes.c_long:
    return ctypes.c_long.in_dll(ctypes.PyDLL(core.__file__), name)


# --- processes ------------------------------------------------------------------------------------


@dataclass
class Found:
    """What came of it; `cases` deaths at one of `points`, `recoveries` second deaths."""

    points: int = 0
    cases: int = 0
    recoveries: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Found) -> None:
        self.cases += other.cases
        self.recoveries += other.recoveries
        self.failures += other.failures


def start(function: Callable[[], None]) -> int:
    """Run it in a process of its own; returns its number."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            signal.alarm(DEADLINE)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    """Wait for its end; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def nothing_more() -> None:
    """What a victim does before it begins: nothing."""


class Trial:
    """One operation on one kind of list: a rehearsal, then a death at each point."""

    def __init__(self, what: Operation, place: Place, image: Image | None) -> None:
        self.what, self.place, self.image = what, place, image
        self.count, self.at = hook("sd_crash_count"), hook("sd_crash_at")
        self.found = Found()
        self.watched = False  # somebody watches the events of each death
        self.marks: list[int] = []  # how many stores were made when a change was acknowledged
        self.states: list[State | None] = []  # the first one, and those after each mark

    # What the victim does

    def perform(
        self,
        run: Run,
        point: int,
        told: Callable[[int, list[Any]], object],
        begin: Callable[[], None] = nothing_more,
        follow: Callable[[int], int] = ended,
    ) -> int:
        """Do it to the segment that is there, in a process that dies at `point`. If it does not, it
        tells how many points there were, and its marks. It calls `begin` just before it begins;
        `follow` is given its number, and returns what `ended` does."""
        inherited = self.place.attach() if self.what.start == "inherited" else None

        def act() -> None:
            subject: Any = self.place if inherited is None else inherited
            if self.what.start == "attached":
                subject = self.place.attach()
            marks = []
            self.count.value, self.at.value = 0, point
            begin()
            for _ in run(subject):
                if not point:
                    seen = with_events(subject) if self.what.start == "attached" else None
                    marks.append((self.count.value, seen))
            self.at.value = 0
            told(self.count.value, marks)

        code = follow(start(act))
        if inherited is not None:
            inherited.close()
        return code

    def rehearse(self) -> None:
        """How many points there are, and which states."""
        self.place.write(self.image)
        before = self.look()
        points, marks = self.tell(self.what.run)
        after = self.look()
        self.found.points = points
        if self.what.like is None:
            self.marks = [mark for mark, _ in marks]
        else:
            _, marks = self.tell(self.what.like)
        self.states = [before, *(after if seen is None else seen for _, seen in marks), after]

    def tell(self, run: Run) -> tuple[int, list[Any]]:
        self.place.write(self.image)
        with open(os.memfd_create("told"), "w+b") as file:

            def told(*what: object) -> None:
                pickle.dump(what, file)
                file.flush()

            assert self.perform(run, 0, told) == 0, "the operation fails when nobody is killed"
            file.seek(0)
            points, marks = pickle.load(file)
        return points, marks

    def look(self) -> State | None:
        if not self.place.path.exists():
            return None
        with self.place.attach() as doms:
            return with_events(doms)

    # The deaths

    def die_at(self, point: int, step: int) -> None:
        """A death at one point; with `step`, also one at each `step`-th point of the recovery."""
        self.second = 0
        self.watched = point % 2 == 0
        self.place.write(self.image)
        code = self.perform(self.what.run, point, lambda *_: None)
        assert code == -signal.SIGKILL, f"it ended with {code} instead of a SIGKILL"
        broken = self.place.read() if step and self.place.path.exists() else None
        done = sum(mark < point for mark in self.marks)
        allowed = self.states if self.what.like else self.states[done : done + 2]
        died = self.survive(allowed)
        if broken is None:
            return
        while True:
            self.second += step if self.second else 1
            self.place.write(broken)
            code = ended(start(self.recover_and_die))
            assert code in (0, -signal.SIGKILL), f"the recovery ended with {code}"
            again = self.survive(allowed)
            # With the other kind a recoverer may die in the first one's place.
            if self.place.lock == "robust":
                assert set(died) <= set(again), f"{died} died at first, and now only {again}"
            if code == 0:
                return
            self.found.recoveries += 1

    def recover_and_die(self) -> None:
        self.count.value, self.at.value = 0, self.second
        repair(self.place.attach())
        self.at.value = 0

    # What must hold afterwards

    def survive(self, allowed: list[State | None]) -> list[Death]:
        """Returns the deaths that are events."""
        if not self.place.path.exists():
            assert None in allowed, "the segment is gone"
            assert list(self.place.folder.iterdir()) == [], "something is left of it"
            self.place.create().close()
            return []
        with self.place.attach() as doms:
            state = state_of(doms)
            known = [i for i, one in enumerate(self.states) if one in allowed and fits(one, state)]
            assert known, difference(state, allowed)
            # The last commit's may be unpublished still.
            self.expect_events(doms, {*known, *(max(i - 1, 0) for i in known)})
            if self.watched:  # who watches publishes what is committed, and takes no other lock
                list(doms.watch(since=0, timeout=0))
                self.expect_events(doms, set(known))
            self.look_up(doms, state)
            told = self.take_every_lock(doms)
            died = self.expect_events(doms, set(known))
            assert set(told) <= set(died), f"{told} died, of which only {died} are events"
            assert_sound(doms.check())
            assert state_of(doms) == state, difference(state_of(doms), [state])
            self.look_up(doms, state)
            self.work(doms, state)
            self.take_jobs(doms, state)
        return died

    def take_jobs(self, doms: DomainList, state: State) -> None:
        """Whoever had a job is dead, so the next one has it at once, and is told of the dead."""
        for key, one in domains_of(state).items():
            if not one[6]:
                continue
            with doms.job(key, "after a death", Job.ASYNC, timeout=0, allow=[]) as job:
                told = [(died.operation, died.kind) for died in job.replaced[: len(one[6])]]
                assert set(told) == {(name, kind) for name, kind, *_ in one[6]}
                assert not any(died.holder.alive for died in job.replaced)
        assert all(info.jobs == () for info in doms.snapshot())
        expect_cells(doms, cells_of(state))

    def expect_events(self, doms: DomainList, known: set[int]) -> list[Death]:
        """Those of one of these states. Returns the deaths among them, each of which is there
        once."""
        happened, died = events_of(doms)
        expected = [one["events"] for i in known if (one := self.states[i]) is not None]
        assert happened in expected, f"{happened} are none of {expected}"
        assert len(set(died)) == len(died), f"{died} are told twice"
        return died

    def take_every_lock(self, doms: DomainList) -> list[Death]:
        """Returns who died holding which domain."""
        assert take(doms)
        told = []
        for dom in doms._handles():
            assert dom.try_lock()
            if dom.previous_owner_died is not None:
                told.append((str(dom.uuid), str(dom.previous_owner_died)))
            dom.unlock()
        for name in doms._mutex_names():
            assert take(doms.mutex(name))
        if doms._kind == "multiprocessing":
            doms.recover(0)  # free slots, too
        with doms.locked(0):
            held = doms.recover(0).held
            report = doms.check(0)
        assert not held, held
        assert_sound(report)
        if doms._kind == "robust":  # the core tidies free slots only if their locks are its own
            assert report.counts["garbage"] == 0, f"{report.counts['garbage']} blobs are garbage"
        return told

    def look_up(self, doms: DomainList, state: State) -> None:
        """The keys of this state lead to its domains, those of other states nowhere."""
        there: dict[str, set[Any]] = {"uuid": set(), "name": set(), "id": set()}
        for key, (name, id, *_) in domains_of(state).items():
            for what, value in (("uuid", key), ("name", name), ("id", id)):
                if value == -1:
                    continue
                there[what].add(value)
                info = doms.peek(**{what: value})
                assert info is not None and str(info.uuid) == key, f"{what} {value} leads astray"
                assert info.name == name and info.id == id
        for other in self.states:
            if other is state:
                continue
            for key, (name, id, *_) in domains_of(other).items():
                for what, value in (("uuid", key), ("name", name), ("id", id)):
                    if value not in there[what]:
                        assert doms.peek(**{what: value}) is None, f"{what} {value} still leads"

    def work(self, doms: DomainList, state: State) -> None:
        """Every kind of work goes on. The next commit to a slot, or insert into it, leaves no
        garbage; then the heap holds what the domains need, to the cell."""
        handles = doms._handles()
        for dom in dict.fromkeys(handles[:4] + handles[-4:]):
            with dom:
                dom.data = dom.data
        numbers = doms._statistics()
        extra = [definition(1900 + i) for i in range(numbers["slots"] - numbers["domains"] or 1)]
        added = []
        for one in extra:
            with doms.locked():
                added.append(doms.assign_def(one, timeout=DEADLINE))
            added[-1].unlock()
        with added[0] as dom:
            id = dom.activate()
            dom.commit()
            info = doms.peek(id=id)
            assert info is not None and info.uuid == dom.uuid
            assert id > max(one[1] for one in (*domains_of(state).values(), (0, 0)))
            dom.deactivate()
        expect_cells(doms, cells_of(state) + sum(cells(one.encode()) for one in extra))
        for dom in added:
            with doms.locked():
                doms.remove_inactive(dom)
        with doms.locked():
            doms._set_settings(doms._settings())
        expect_cells(doms, cells_of(state))
        assert state_of(doms) == state


def repair(doms: DomainList) -> None:
    """Take the lock of every domain, then whatever else a death left locked."""
    with doms.locked(0):
        for dom in doms._handles():
            assert take(dom)
        doms.recover(0)
        report = doms.check(0)
    assert_sound(report)


def assert_sound(report: CheckReport) -> None:
    """Nothing is wrong or left open in the segment. These domains have no files: the directories
    that the list remembers are not there."""
    found = [one for one in report.problems + report.unsettled if one[0] != "config"]
    assert found == [], report


def take(lock: Any) -> bool:
    if not lock.acquire(False):
        return False
    lock.release()
    return True


def expect_cells(doms: DomainList, expected: int) -> None:
    report = doms.check()
    assert_sound(report)
    assert report.counts["garbage"] == 0, f"{report.counts['garbage']} blobs are garbage"
    used = report.counts["cells"] - cells_of_work(doms)
    assert used == expected, f"{used} cells are in use, the domains need {expected}"


# --- in parallel ----------------------------------------------------------------------------------


def spread(points: int, count: int) -> list[int]:
    """`count` of the numbers 1 to `points`, evenly."""
    return sorted({1 + (2 * i + 1) * points // (2 * count) for i in range(min(count, points))})


def run(trial: Trial, everything: bool, workers: int, number: int) -> None:
    """One worker's share of the deaths."""
    what, points = trial.what, trial.found.points
    if everything:
        first, second = spread(points, points), spread(points, 60 if what.large else points)
        step = 37 if what.on in LARGE else 1
    else:
        first = spread(points, 40 if what.large else points)
        first = sorted({*first, *range(1, min(points, 12) + 1)})
        second = spread(points, 1)
        step = 211 if what.on in LARGE else 1
    mine = [n for i, n in enumerate(second) if i % workers == number]
    mine += [n for i, n in enumerate(n for n in first if n not in second) if i % workers == number]
    for n in mine:
        signal.alarm(6 * DEADLINE)
        trial.found.cases += 1
        try:
            trial.die_at(n, step if n in second else 0)
        except Exception:
            again = f", then at {trial.second} of the recovery" if trial.second else ""
            trial.found.failures.append(f"killed at {n}{again}:\n{traceback.format_exc(limit=-3)}")
            if len(trial.found.failures) == 3:
                return


def in_parallel(work: Callable[[int, int], Found]) -> Found:
    """``work(workers, number)`` of as many processes as there are processors."""
    workers = len(os.sched_getaffinity(0))
    total = Found()
    results = [os.memfd_create("found") for _ in range(workers)]
    pids = []
    for number, result in enumerate(results):
        pids.append(os.fork())
        if not pids[-1]:
            try:
                os.write(result, pickle.dumps(work(workers, number)))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
    for pid, result in zip(pids, results, strict=True):
        os.waitpid(pid, 0)
        with open(result, "rb") as file:
            file.seek(0)
            content = file.read()
        total.add(pickle.loads(content) if content else Found(failures=["a worker died"]))
    return total


def share(folder: Path, what: Operation, image: Image | None, lock: str, everything: bool) -> Found:
    """A rehearsal, then the deaths, in parallel."""
    trial = Trial(what, Place(folder / "rehearsal", lock), image)
    trial.rehearse()

    def deaths(workers: int, number: int) -> Found:
        trial.place = Place(folder / str(number), lock)
        run(trial, everything, workers, number)
        return trial.found

    total = in_parallel(deaths)
    total.points = trial.found.points
    return total


Answer = Callable[[Path, Operation, "Image | None", str, Any], Any]


def serve(operations: dict[str, Operation], answer: Answer) -> None:
    """Each request is answered with one line of JSON: a dataclass that has `failures`."""
    home = Path(sys.argv[1])
    images: dict[tuple[str, str], Image | None] = {}
    for number, request in enumerate(sys.stdin):
        name, lock, how = json.loads(request)
        what = operations[name]
        folder = home / str(number)
        folder.mkdir()
        key = what.on.__name__, lock
        if key not in images:
            images[key] = Place(folder / "image", lock).prepare(what.on)
        gc.collect()
        gc.freeze()  # what is not looked at is not copied
        try:
            found = asdict(answer(folder, what, images[key], lock, how))
        except Exception:
            found = {"failures": [traceback.format_exc()]}
        shutil.rmtree(folder)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    serve(OPERATIONS, share)
