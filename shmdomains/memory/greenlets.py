"""How a greenlet of gevent waits: its hub runs the others meanwhile.

The core asks before it would block: in a greenlet whose thread has a hub it calls `_switch`, then
tries again. A thread without a hub, as gevent's own pool has them, blocks as ever, and so does the
hub itself, which has nobody to switch to.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from weakref import ref

from ._core import core
from .rooms import Hub, Timer, Turn, add_hub, forget_hub, freed, hub_of, may_try

T = TypeVar("T")


def is_wanted() -> bool:
    """Whether gevent has patched `threading`: then this process's threads are greenlets."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def begin() -> None:
    """From here on greenlets wait without stopping their hub. Raises `ImportError`."""
    from gevent import hub  # noqa: F401  (an extra: only whoever has it comes here)

    global _begun
    if not _begun:
        _begun = True
        os.register_at_fork(after_in_child=_begin_in_child)
    core.tasks_with(freed=freed, may_try=may_try, can_switch=_can_switch, switch=_switch)


def _gevent_hub() -> Any:
    from gevent._hub_local import get_hub_if_exists

    return get_hub_if_exists()


def _can_switch() -> bool:
    hub = _gevent_hub()
    return hub is not None and hub is not sys.modules["greenlet"].getcurrent()


class _Timer:
    """A call that comes later, and whose timer lives until then."""

    def __init__(self, loop: Any, seconds: float, call: Callable[[], None]) -> None:
        self._timer = loop.timer(max(seconds, 0.0))
        self._call = call
        self._timer.start(self._ring)

    def _ring(self) -> None:
        self._timer.close()
        self._call()

    def cancel(self) -> None:
        self._call = _nothing  # a loop that was destroyed keeps its timers
        with suppress(ValueError):
            self._timer.stop()
            self._timer.close()


_begun = False


def _nothing() -> None:
    pass


# For each hub of gevent: its rooms, and what reads their inbox. gevent does not tell when it
# destroys a hub, so the next one that is made forgets it.
_hubs: list[tuple[Hub, Any]] = []


def _begin_in_child() -> None:
    """The parent's inboxes are closed here, and their numbers may become other files'."""
    for _, reader in _hubs:
        with suppress(ValueError):
            reader.stop()
    _hubs.clear()


def _forget_destroyed() -> None:
    for one in list(_hubs):
        hub = one[0]
        if hub.of.loop is None:
            with suppress(ValueError):  # another thread was faster
                _hubs.remove(one)
            hub.drop_timer()
            forget_hub(hub)


def _hub() -> Hub:
    """The rooms of this thread's hub."""
    of = _gevent_hub()
    hub = hub_of(of)
    if hub is None:
        _forget_destroyed()
        loop = of.loop

        def later(seconds: float, call: Callable[[], None]) -> Timer:
            return _Timer(loop, seconds, call)

        hub = Hub(of, later, lambda: True)
        # It does not keep the loop alive; while somebody waits, the timer of the slices does.
        reader = loop.io(hub.inbox.fileno(), 1, ref=False)
        known = ref(hub)  # a loop that was destroyed keeps what it would call

        def read() -> None:
            hub = known()
            if hub is not None:
                hub.read()

        reader.start(read)
        _hubs.append((hub, reader))
        add_hub(hub)
    return hub


class _Waiter:
    """A greenlet that sleeps in its hub until it is woken, once."""

    def __init__(self, of: Any) -> None:
        from gevent.hub import Waiter

        self._loop = of.loop
        self._waiter = Waiter(of)
        self._woken = False

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._loop.run_callback(self._waiter.switch, None)

    def sleep(self, seconds: float | None) -> None:
        timer = None if seconds is None else _Timer(self._loop, seconds, self.wake)
        try:
            self._waiter.get()
        finally:
            self._woken = True
            if timer is not None:
                timer.cancel()


def _switch(blocked: core.Blocked, seconds: float | None, turn: Turn | None) -> Turn | None:
    """Let others run until it may go on. `turn`: of the call before, for the same lock; the core
    leaves it when it has the lock, or gives up."""
    hub = _hub()
    waiter = _Waiter(hub.of)
    if blocked.sleeps:
        sleep = hub.sleep(blocked, waiter.wake)
        try:
            waiter.sleep(seconds)
        finally:
            sleep.end()
        return None
    hub.trying = None
    try:
        if turn is None:
            turn = hub.enter(blocked, waiter.wake)
        else:
            turn.wake = waiter.wake
            turn.stay()
        waiter.sleep(seconds)
        hub.trying = turn
        return turn
    except BaseException:
        if turn is not None:
            turn.leave()
        raise


# --- waits of other stores --------------------------------------------------------------------


def can_switch() -> bool:
    """Whether the caller is a greenlet that can let others run."""
    return _begun and _can_switch()


def real_poll() -> Any:
    """`select.poll`, also where gevent has patched it."""
    monkey = sys.modules.get("gevent.monkey")
    return (select.poll if monkey is None else monkey.get_original("select", "poll"))()


def sleep(seconds: float) -> None:
    """`time.sleep`; a greenlet lets others run."""
    if can_switch():
        _Waiter(_gevent_hub()).sleep(seconds)
    else:
        time.sleep(seconds)


def wait_ready(descriptor: int, events: int, seconds: float) -> None:
    """Let others run until a descriptor is readable (1), writable (2), or either (3); at most so
    long."""
    waiter = _Waiter(_gevent_hub())
    watcher = _gevent_hub().loop.io(descriptor, events)
    try:
        watcher.start(waiter.wake)
        waiter.sleep(seconds)
    finally:
        watcher.stop()
        watcher.close()


def wait_told(begin: Callable[[Callable[[], object]], object], seconds: float) -> None:
    """Let others run until what ``begin(wake)`` is given was called, in any thread; at most so
    long. The caller sees to it that it is not called afterwards."""
    waiter = _Waiter(_gevent_hub())
    told = _gevent_hub().loop.async_()
    try:
        told.start(waiter.wake)
        begin(told.send)
        waiter.sleep(seconds)
    finally:
        told.stop()
        _gevent_hub().loop.run_callback(told.close)


def elsewhere(function: Callable[[], T]) -> T:
    """Call it in a thread of gevent's pool, and let others run meanwhile."""
    found: T = _gevent_hub().threadpool.apply(function)
    return found
