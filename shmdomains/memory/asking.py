"""How a task of asyncio waits: `ask` for a lock or a change, `work` for a call in another thread.

Nothing here blocks the loop's thread. `ask` calls a function that must not block (`core.attempt`).
If it would, the task stands in the queue of its lock (`rooms`), or sleeps until what it waits for
has changed, and then the function is called again and begins anew. `work` calls a function in
another thread, on behalf of the task: one that writes files, or settles what a dead process began.

A task that is cancelled while it waits leaves the queue. A call in another thread is told that it
is not wanted any more; it gives up at its next wait, or had happened.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from ..config import change
from ..rules.jobs import jobs_of_owner
from ..rules.tasks import wait_by
from . import rooms
from ._core import core
from .holder import ready_to_describe
from .rooms import Hub, Turn, add_hub, hub_of

T = TypeVar("T")
_LATE = 1.0
"""Seconds after which a call that no worker has begun gets a thread of its own."""
_WORKERS = 64
"""Threads for calls that write files, a process. Whoever holds a lock or a job gets one besides:
others may wait for that in all of these."""


# --- for a lock, or a change -----------------------------------------------------------------


class _Reader:
    """What the event loop calls when the inbox is readable. Only the loop keeps it: it goes when
    the loop is closed, and with it what the loop's tasks hold."""

    def __init__(self, hub: Hub, loop: asyncio.AbstractEventLoop) -> None:
        self._hub = hub
        self._of_loop = partial(_is_of, id(loop))
        self._pid = os.getpid()

    def __call__(self) -> None:
        self._hub.read()

    def __del__(self) -> None:
        if self._pid == os.getpid():
            self._hub.close()  # first: who is woken now could not run
            core.tasks_over(self._of_loop)


def _is_of(loop: int, task: Any) -> bool:
    return isinstance(task, asyncio.Future) and id(task.get_loop()) == loop


def _hub() -> Hub:
    """The hub of this thread's event loop."""
    loop = asyncio.get_running_loop()
    hub = hub_of(loop)
    if hub is None:
        hub = Hub(loop, loop.call_later, partial(_runs, loop))
        loop.add_reader(hub.inbox.fileno(), _Reader(hub, loop))
        add_hub(hub)
    return hub


def _runs(loop: asyncio.AbstractEventLoop) -> bool:
    return asyncio._get_running_loop() is loop


async def ask(function: Callable[..., T], *args: Any, within: float | None = None) -> T:
    """Call it again and again, each time when it may go on, until it comes to its end without
    waiting. It begins anew each time, but the seconds of `within` are those of all calls."""
    kwargs: dict[str, Any] = {}
    until = core.deadline(within)
    found = core.attempt(until, function, args, kwargs)
    if type(found) is not core.Blocked:
        return found  # type: ignore[no-any-return]
    return await ask_on(found, until, function, args, kwargs)


async def ask_on(
    blocked: core.Blocked, until: int, function: Callable[..., T], args: Any, kwargs: Any
) -> T:
    hub = _hub()
    loop = asyncio.get_running_loop()
    turn: Turn | None = None
    try:
        while True:
            woken: asyncio.Future[None] = loop.create_future()
            wake = partial(_wake, woken)
            settled: core.Blocked | None = None
            if turn is not None and (blocked.settles or blocked.sleeps):
                turn.leave()
                turn = None
            if blocked.settles:
                await work(blocked.settle, until)
                settled = blocked
            elif blocked.sleeps:
                sleep = hub.sleep(blocked, wake)
                try:
                    await _until(woken, until)
                finally:
                    sleep.end()
            else:
                if turn is not None and turn.is_for(blocked):
                    turn.wake = wake
                    turn.stay()
                else:
                    if turn is not None:
                        turn.leave()
                    turn = hub.enter(blocked, wake)
                await _until(woken, until)
            hub.trying = turn
            try:
                found = core.attempt(until, function, args, kwargs, settled)
            finally:
                hub.trying = None
            if type(found) is not core.Blocked:
                return found  # type: ignore[no-any-return]
            blocked = found
    finally:
        if turn is not None:
            turn.leave()


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


async def _until(woken: asyncio.Future[None], until: int) -> None:
    """Until it is woken, or the time is up."""
    if not until:
        await woken
        return
    timer = woken.get_loop().call_later(core.seconds_until(until), _wake, woken)
    try:
        await woken
    finally:
        timer.cancel()


# --- in another thread -----------------------------------------------------------------------

also_hold: list[Callable[[], bool]] = [core.holds_locks]
"""Each says whether whoever asks holds a lock."""

_pools: dict[str, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)


def _workers(name: str) -> ThreadPoolExecutor:
    pool = _pools.get(name)
    if pool is None:
        pool = _pools.setdefault(name, ThreadPoolExecutor(_WORKERS, name))
    return pool


class _Call:
    """What a task wants of another thread, as long as it wants it."""

    __slots__ = ("_worker", "begun", "unwanted")

    def __init__(self) -> None:
        self.begun = self.unwanted = False
        self._worker: core.Worker | None = None

    def begin(self, worker: core.Worker) -> None:
        """In the thread that does it."""
        self._worker = worker
        if self.unwanted:
            worker.give_up()

    def give_up(self) -> None:
        self.unwanted = True
        if self._worker is not None:
            self._worker.give_up()


_working = threading.local()  # `call`: what this thread does for a task


def _between_looks() -> bool:
    call = getattr(_working, "call", None)
    if call is not None and call.unwanted:
        raise core.WorkGivenUp
    return call is not None


change.between_looks = _between_looks


async def work(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call it in another thread, for this task."""
    return await work_or_undo(partial(function, *args, **kwargs), None)


async def work_or_undo(function: Callable[[], T], undo: Callable[[T], object] | None) -> T:
    """`work`. If it came to its end after the task was cancelled, `undo` is called with what it
    returned."""
    done: Future[T] = Future()
    call, owner = _Call(), core.owner()
    work = partial(_work_there, done, call, owner, function)
    if jobs_of_owner(owner) or any(held() for held in also_hold):
        _begin_thread(work)
    else:
        _workers("shmdomains-aio").submit(work)
    waiting = asyncio.wrap_future(done)
    cancelled: asyncio.CancelledError | None = None
    while not waiting.done():
        late = not call.begun and cancelled is None
        try:
            await asyncio.wait([waiting], timeout=_LATE if late else None)
            if late and not call.begun:  # perhaps all workers wait for what only this call ends
                with suppress(RuntimeError):
                    _begin_thread(work)
        except asyncio.CancelledError as exc:
            # It is rolled back, or had happened: only its thread knows.
            cancelled = exc
            call.give_up()
            if done.cancel():  # it was not begun
                raise
    if cancelled is not None:
        if waiting.exception() is None and undo is not None:
            await finish(undo, waiting.result())
        raise cancelled
    return waiting.result()


async def finish(function: Callable[..., T], *args: Any) -> T:
    """Call it in another thread, for this task, and wait for its end, also if the task is
    cancelled: for what frees a lock. It must not wait for another one."""
    done: Future[T] = Future()
    work = partial(_work_there, done, _Call(), core.owner(), partial(function, *args))
    _workers("shmdomains-aio-end").submit(work)
    waiting = asyncio.wrap_future(done)
    cancelled: asyncio.CancelledError | None = None
    while not waiting.done():
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled from waiting.exception()
    return waiting.result()


def _begin_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="shmdomains-aio", daemon=True).start()


def _work_there(done: Future[T], call: _Call, owner: int, function: Callable[[], T]) -> None:
    begun, call.begun = call.begun, True
    if begun or not done.set_running_or_notify_cancel():
        return
    call.begin(core.Worker())
    _working.call = call
    try:
        result = core.work_for(owner, function, (), {})
    except BaseException as exc:
        done.set_exception(exc)
    else:
        done.set_result(result)


# --- what the core and the rules are told ----------------------------------------------------


async def _find_later(acquire: core.Acquire[Any], blocked: core.Blocked) -> Any:
    return await ask_on(blocked, acquire.until, acquire.find, (), {})


async def _enter_later(acquire: core.Acquire[Any], blocked: core.Blocked) -> Any:
    return acquire.enter(await ask_on(blocked, acquire.until, acquire.find, (), {}))


def _begins() -> None:
    with suppress(OSError):  # no descriptor left: then when it waits
        _hub()


ready_to_describe()
rooms.begin()
wait_by(ask)
core.tasks_enter_by(_enter_later, _find_later, _begins)
