"""Greenlets that wait when something goes wrong: a signal handler raises in the middle, the process
forks. Each runs in a process of its own, where gevent has patched everything.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from killing import Child, Pipe, until, xml

from shmdomains import DomainList

pytest.importorskip("gevent")
pytestmark = pytest.mark.usefixtures("nothing_left")

LONG = 10.0
KINDS = ["domain", "list", "mutex", "semaphore"]


def begin(kind: str = "domain") -> DomainList:
    from gevent import monkey

    monkey.patch_all()
    lock = "multiprocessing" if kind == "semaphore" else "robust"
    doms = DomainList(max_domains=32, lock=lock)
    doms.define(xml("a"))
    return doms


def lock_of(doms: DomainList, kind: str, timeout: float | None = None) -> Any:
    if kind == "list":
        return doms.locked(timeout)
    if kind == "mutex":
        return doms.mutex("m", timeout)
    return doms.get("a", timeout=timeout)


def take(doms: DomainList, kind: str, seconds: float) -> None:
    """As a greenlet, and keep it so long."""
    import gevent

    with lock_of(doms, kind, LONG):
        gevent.sleep(seconds)


def interrupted(there: Callable[..., Any], once: list[str]) -> Callable[..., Any]:
    """The same, and before it Ctrl-C, the first time."""

    def call(*args: Any) -> Any:
        if not once:
            once.append("interrupted")
            signal.raise_signal(signal.SIGINT)
        return there(*args)

    return call


def interrupt_waiter(pipe: Pipe, kind: str, where: str) -> None:
    import gevent

    from shmdomains.memory import rooms

    doms = begin(kind)
    holder = gevent.spawn(take, doms, kind, 0.01)
    gevent.sleep(0)
    once: list[str] = []
    of, name = {
        "entering": (rooms.Hub, "_tick_later"),
        "leaving": (rooms.Room, "leave"),
        "left": (rooms.Turn, "end"),
    }[where]
    setattr(of, name, interrupted(getattr(of, name), once))
    with pytest.raises(KeyboardInterrupt), lock_of(doms, kind, LONG):
        pass
    assert once
    holder.join(LONG)
    for waits in (gevent.spawn(take, doms, kind, 0.01), gevent.spawn(take, doms, kind, 0)):
        assert waits.join(LONG) is None and waits.successful()
    pipe.say("free")


@pytest.mark.parametrize("where", ["entering", "leaving", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_in_the_queue(start: Callable[..., Child], kind: str, where: str) -> None:
    """Nothing stays locked, and nobody stays in the queue who does not ask any more."""
    assert start(interrupt_waiter, kind, where).hear(2 * LONG) == "free"


def interrupt_holder(pipe: Pipe, kind: str) -> None:
    import gevent

    from shmdomains.memory import rooms

    doms = begin(kind)
    once: list[str] = []
    waiting = None
    with pytest.raises(KeyboardInterrupt):
        with lock_of(doms, kind):
            waiting = gevent.spawn(take, doms, kind, 0)
            gevent.sleep(0)
            rooms.Room.freed = interrupted(rooms.Room.freed, once)  # type: ignore[method-assign]
        waiting.join()  # at the latest
    assert once
    waiting.join(LONG)
    assert waiting.successful()
    pipe.say("free")


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_the_end(start: Callable[..., Child], kind: str) -> None:
    """What is being freed is freed, and Ctrl-C is not lost."""
    assert start(interrupt_holder, kind).hear(2 * LONG) == "free"


def fork_in_handler(pipe: Pipe, kind: str) -> None:
    import gevent

    from shmdomains.memory import rooms

    doms = begin(kind)
    seen: list[int] = []
    freed = rooms.Room.freed

    def freed_and_forked(self: rooms.Room, strangers: bool) -> None:
        freed(self, strangers)
        if child is None:
            signal.raise_signal(signal.SIGUSR1)
            if child:  # it goes on first
                assert os.waitpid(child, 0)[1] == 0
                seen.extend(one.holder.pid for one in doms.locks() if one.holder is not None)

    def fork(*_: object) -> None:
        nonlocal child
        child = os.fork()

    child: int | None = None
    signal.signal(signal.SIGUSR1, fork)
    with ExitStack() as rest:
        with lock_of(doms, kind):
            waiting = gevent.spawn(take, doms, kind, 0)
            gevent.sleep(0)
            rooms.Room.freed = freed_and_forked  # type: ignore[method-assign]
        if child == 0:
            rest.callback(os._exit, 0)
    assert seen == [os.getpid()]
    waiting.join(LONG)
    assert waiting.successful()
    pipe.say("free")


def test_a_handler_forks_at_the_end(start: Callable[..., Child]) -> None:
    """The child frees nothing of its parent's. (glibc frees no mutex of another process.)"""
    assert start(fork_in_handler, "semaphore").hear(2 * LONG) == "free"


def wait_in_child(pipe: Pipe) -> None:
    import gevent

    from shmdomains.memory import rooms

    doms = begin()
    gevent.joinall([gevent.spawn(take, doms, "domain", 0.001) for _ in range(2)])
    go = os.pipe()
    child = os.fork()
    if not child:
        rooms.SLICE = LONG
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
            take(doms, "domain", 0)
        os.write(go[1], b"!")
        began = time.monotonic()
        with doms.get("a", timeout=LONG / 2):
            os._exit(time.monotonic() - began > LONG / 4)
    with doms.get("a"):
        os.read(go[0], 1)
        until(lambda: any(lock.waiting for lock in doms.locks()), "the child waits")
    assert os.waitpid(child, 0)[1] == 0
    pipe.say("got it")


def test_a_child_of_a_greenlet(start: Callable[..., Child]) -> None:
    """It is told when a lock is free, as its parent was, and does not wait for a slice's end."""
    assert start(wait_in_child).hear(2 * LONG) == "got it"
