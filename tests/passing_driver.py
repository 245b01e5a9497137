"""A program that gives a list, a handle or a named lock to workers, in each way that there is.

    python passing_driver.py START KIND [name]

It is a process of its own: it forks, has threads, and starts processes that stay. It prints what
came of it.
"""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import joblib
from helpers import xml
from joblib.externals import loky

from shmdomains import Domain, DomainList, LockKindMismatch, Mutex, SegmentNotFound

WORKERS = 2
TASKS = 20


def count(doms: DomainList, _: object = None) -> int:
    """A change of what the parent sees."""
    with doms.get("web1", timeout=30) as dom:
        dom.data = (dom.data or 0) + 1
    return os.getpid()


def count_by(dom: Domain, _: object = None) -> int:
    with dom:
        dom.data = (dom.data or 0) + 1
    return os.getpid()


def count_alone(two: tuple[Mutex, DomainList], _: object = None) -> int:
    mutex, doms = two
    with mutex:
        return count(doms)


_given: tuple[DomainList, ...]


def keep(*doms: DomainList) -> None:
    global _given
    _given = doms


def count_given(_: object = None) -> int:
    return count(_given[0])


def count_kept(kept: Any, _: object = None) -> int:
    """Of a worker that was given the list when it began, and gets it once more."""
    assert any(kept is one for one in _given)
    return count(kept)


class Late:
    """Something that is loaded when whoever pickled it has let it go."""

    def __init__(self, parts: Any) -> None:
        self.blob = pickle.dumps(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.blob,)


def made_here() -> tuple[int, Late]:
    doms = DomainList(max_domains=4)
    doms.define(xml("web1"))
    dom = doms.get("web1")
    dom.unlock()
    return os.getpid(), Late((doms, dom, (doms.mutex("m"), doms)))


def read(doms: DomainList) -> list[str]:
    return [info.name for info in doms]


def first(kept: Any) -> int:
    """Of no worker that was given nothing."""
    return os.getpid()


class Workers:
    """`WORKERS` of them, behind one way to have a function called with each number."""

    def __init__(self, start: str, kind: str, init: Any = None, given: Any = ()) -> None:
        context = multiprocessing.get_context(start)
        self.kind = kind
        self.pool: Any = None
        if kind == "Pool":
            self.pool = context.Pool(WORKERS, init, given)
        elif kind == "Executor":
            self.pool = concurrent.futures.ProcessPoolExecutor(WORKERS, context, init, given)
        elif kind == "loky":
            self.pool = loky.ProcessPoolExecutor(WORKERS, initializer=init, initargs=given)

    def map(self, function: Callable[[Any], Any], numbers: Iterable[Any]) -> list[Any]:
        if self.kind == "Pool":
            found: list[Any] = self.pool.map(function, numbers, chunksize=1)
            return found
        if self.kind == "joblib":
            return list(joblib.Parallel(WORKERS)(joblib.delayed(function)(n) for n in numbers))
        return [one.result() for one in [self.pool.submit(function, n) for n in numbers]]

    def end(self) -> None:
        if self.kind == "Pool":
            self.pool.close()
            self.pool.join()
        elif self.kind == "joblib":
            loky.get_reusable_executor().shutdown()
        else:
            self.pool.shutdown()


def again_of(doms: DomainList) -> DomainList:
    """Another list of this process on the same segment."""
    again = DomainList.__new__(DomainList)
    again._begin(doms.fileno())
    return again


# --- it arrives --------------------------------------------------------------------------------


def arrive(start: str, kind: str, name: str = "") -> None:
    """In tasks of workers that were there before the list; then to some that are given it."""
    workers = Workers(start, kind)
    workers.map(first, range(TASKS))
    doms = DomainList.create(name, max_domains=16) if name else DomainList(max_domains=16)
    doms.define(xml("web1"))
    dom = doms.get("web1")
    dom.unlock()
    tell("list", doms, workers.map(partial(count, doms), range(TASKS)))
    tell("handle", doms, workers.map(partial(count_by, dom), range(TASKS)))
    mutex = doms.mutex("m", timeout=30)
    tell("mutex", doms, workers.map(partial(count_alone, (mutex, doms)), range(TASKS)))
    lost(workers)
    locks(workers, multiprocessing.get_context(start))
    workers.end()
    if kind != "joblib":
        workers = Workers(start, kind, keep, (doms, again_of(doms)))
        tell("initargs", doms, workers.map(count_given, range(TASKS)))
        tell("and in tasks", doms, workers.map(partial(count_kept, doms), range(TASKS)))
        workers.end()
    print(doms.check().problems)
    if name:
        doms.unlink()


def tell(what: str, doms: DomainList, found: list[int]) -> None:
    """How many changes the tasks made, all of them in workers."""
    assert os.getpid() not in found
    with doms.get("web1") as dom:
        print(f"{what}: {dom.data}")
        dom.data = None


# --- it cannot ---------------------------------------------------------------------------------


def lost(workers: Workers) -> None:
    """What a worker has let go comes back, and is given to workers once more."""
    pid, parts = workers.map(call, [made_here])[0]
    for part, use in zip(parts, (count, count_by, count_alone), strict=True):
        for attempt in (use, lambda part, use=use: workers.map(use, [part])):
            try:
                attempt(part)
            except SegmentNotFound as exc:
                print(f"process {pid}, " in str(exc), "initargs" in str(exc))
    print(len(workers.map(first, range(TASKS))))  # they work on


def call(function: Callable[[], Any]) -> Any:
    return function()


def locks(workers: Workers, context: Any) -> None:
    """Of a list with multiprocessing locks, which do not travel."""
    with DomainList(max_domains=4, lock="multiprocessing", context=context) as doms:
        doms.define(xml("web1"))
        print(workers.map(read, [doms]))
        try:
            workers.map(count, [doms])
        except LockKindMismatch as exc:
            print("initargs" in str(exc))


# --- nothing is left ---------------------------------------------------------------------------


def resources() -> tuple[int, int, list[str], list[str]]:
    gc.collect()
    shared = [one for one in os.listdir("/dev/shm") if str(os.getpid()) in one]
    return len(os.listdir("/proc/self/fd")), threading.active_count(), shared, os.listdir()


def left() -> None:
    """In an empty folder: of 1,000 pickles that nobody loads, and of those that somebody does."""
    doms = DomainList(max_domains=16)
    doms.define(xml("web1"))
    parts = (doms, doms.get("web1"), doms.mutex("m"))
    parts[1].unlock()
    pickle.loads(pickle.dumps(parts))
    before = resources()
    pickles = [pickle.dumps(parts) for _ in range(1000)]
    print(resources() == before, len(set(pickles)))
    reader, writer = os.pipe()
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", "from passing_driver import load; load()"],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)],
    )
    with open(writer, "wb") as to:
        for blob in pickles:
            pickle.dump(blob, to)
    os.close(reader)
    print(os.waitpid(child, 0)[1], resources() == before)
    info = doms.peek("web1")
    print(info and info.data, len(doms.info.attached))


def load() -> None:
    """The other process's part: each arrives, and goes."""
    before = None
    while True:
        try:
            blob = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        doms, dom, mutex = pickle.loads(blob)
        count_by(dom), count_alone((mutex, doms))
        del doms, dom, mutex
        before = before or resources()
    assert resources() == before, (resources(), before)


def main(*arguments: str) -> None:
    if arguments:
        arrive(*arguments)
    else:
        left()


if __name__ == "__main__":
    # Under its own name: what the workers are given is looked up there.
    import passing_driver

    passing_driver.main(*sys.argv[1:])
