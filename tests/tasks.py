"""What the tests of `shmdomains.aio` share: a list, other processes, and how to tell who waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from killing import DEADLINE, Child, Pipe, xml

from shmdomains import (
    Domain,
    DomainDef,
    DomainList,
    LockTimeout,
    aio,
)
from shmdomains.memory.rooms import hub_of

Start = Callable[..., Child]
Doms = aio.AsyncDomainList
NAMES = "abcd"
LONG = 1000.0  # seconds; nobody waits that long


@contextmanager
def new_list(path: str) -> Iterator[Doms]:
    """With the domains a to d. At the end everything is free, and sound."""
    with DomainList.create(path=path, max_domains=64) as plain:
        for name in NAMES:
            plain.define(xml(name))
        yield aio.wrap(plain)
        if not plain.closed:
            assert taken(plain) == []
            assert plain.check().problems == []


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """In a loop of its own. What hangs fails."""
    return asyncio.run(asyncio.wait_for(main, 3 * DEADLINE))


def taken(plain: DomainList) -> list[str]:
    """What the caller cannot have at once."""
    found = []
    if plain.acquire(False):
        plain.release()
    else:
        found.append("list")
    for info in plain.snapshot():
        try:
            plain.get(uuid=info.uuid, timeout=0).unlock()
        except LockTimeout:
            found.append(info.name)
        found += [f"job {job.operation}" for job in info.jobs]
    mutex = plain.mutex("m")
    if mutex.try_lock():
        mutex.unlock()
    else:
        found.append("mutex")
    return found


def say_what_is_taken(pipe: Pipe, path: str) -> None:
    doms = DomainList.attach(path=path)
    while True:
        pipe.listen()
        pipe.say(taken(doms))


def hold(pipe: Pipe, path: str, name: str) -> None:
    """Hold a domain, change it and leave it, as told."""
    doms = DomainList.attach(path=path)
    while True:
        with doms.get(name) as dom:
            pipe.say("held")
            dom.data = pipe.listen()
        pipe.say("free")
        pipe.listen()


async def queued(number: int) -> None:
    """Until so many tasks of this loop stand in a queue or sleep until something changes."""
    end = time.monotonic() + DEADLINE
    while True:
        hub = hub_of(asyncio.get_running_loop())
        turns = [] if hub is None else [turn for room in hub.rooms.values() for turn in room.turns]
        if hub is not None and len(turns) + len(hub._sleeps) == number:
            return
        assert time.monotonic() < end, f"{len(turns)} tasks wait, not {number}"
        await asyncio.sleep(0)


async def enter(doms: Doms, name: str, log: list[str], leave: asyncio.Event | None = None) -> None:
    async with doms.get(name) as dom:
        log.append(f"in {dom.name}")
        if leave is not None:
            await leave.wait()
    log.append(f"out {name}")


async def ended(task: asyncio.Task[Any]) -> Any:
    """What it raised, or its result; within a time that says that nothing keeps it."""
    await asyncio.wait([task], timeout=DEADLINE)
    assert task.done(), "it hangs"
    return task.exception() if not task.cancelled() else asyncio.CancelledError


LOCKS: dict[str, Callable[[Doms], Any]] = {
    "get": lambda doms: doms.get("a"),
    "lookup": lambda doms: doms.lookup("a"),
    "handle": lambda doms: handle(doms, "a"),
    "locked": lambda doms: doms.locked(),
    "lock_many": lambda doms: doms.lock_many(["b", "a"]),
    "get_many": lambda doms: doms.get_many(["b", "a"]),
    "assign_defs": lambda doms: doms.assign_defs(
        [DomainDef.from_xml(xml("b")), DomainDef.from_xml(xml("a"))]
    ),
    "mutex": lambda doms: doms.mutex("m"),
    "job": lambda doms: doms.job("a", "backup"),
    "key of a job": lambda doms: doms.plain.job("a", "backup"),
}


def handle(doms: Doms, name: str) -> Domain:
    """Unlocked."""
    dom = doms.plain.get(name)
    dom.unlock()
    return dom
