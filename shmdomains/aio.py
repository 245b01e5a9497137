"""`shmdomains.aio`: a list for asyncio. Tasks wait for domains, and their event loop goes on.

    doms = aio.wrap(DomainList.open("default"))
    async with doms.get("web1", timeout=5) as dom:
        dom.state = DomainState.PAUSED

A task holds what it locked, as a thread does elsewhere: two tasks of one thread exclude each
other, and each rule about who may wait for what counts by task. `dom` is a plain `Domain`. What may
have to wait is awaited; what never waits (`peek`, `list`, `snapshot`, a domain's attributes,
`commit`) is a plain call.

Nothing here blocks the loop's thread. For a lock or a change a task stands in a queue of its thread
(``memory/rooms.py``) and asks again when it is its turn. What writes files (`define`, `undefine`,
`rename`, `load_all_configs`, ...) runs in another thread, on behalf of the task.

A task that is cancelled while it waits holds nothing. One that ends, in whatever way, while it
holds something is rolled back and unlocked. So is every task of a loop that is closed.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .config import LoadReport, change
from .errors import LockTimeout, UncommittedChanges
from .events import DomainEvent, EventsMissed
from .job import Job
from .memory import rooms
from .memory._core import core
from .memory.domain import Domain
from .memory.domain_list import DomainList, LockedDomains, Mutex
from .memory.holder import ready_to_describe
from .memory.rooms import SLICE, Hub, Turn, add_hub, hub_of
from .names import Uuid
from .rules.info import DomainInfo
from .rules.jobs import DomainJob, jobs_of_owner
from .rules.store import Deadline, Filter
from .rules.tasks import wait_by
from .rules.values import not_found, one_key
from .rules.wait import any_change, in_vain, need_no_other_lock, removed
from .rules.watch import Watch
from .xml.definition import DomainDef, EncodedDef

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AsyncDomainList", "AsyncWatch", "wait_until", "wrap"]

T = TypeVar("T")
_LATE = 1.0
"""Seconds after which a call that no worker has begun gets a thread of its own."""
_WORKERS = 64
"""Threads for calls that write files, a process. Whoever holds a lock or a job gets one besides:
others may wait for that in all of these."""

Key = Domain | DomainInfo | Uuid | int


def wrap(doms: DomainList) -> AsyncDomainList:
    """The list, for the tasks of an event loop. It may be wrapped before the loop runs, and several
    times; close it as ever.

    >>> import asyncio
    >>> from shmdomains import DomainList, aio
    >>> async def main():
    ...     doms = aio.wrap(DomainList())
    ...     await doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...                       "<os><type>hvm</type></os></domain>")
    ...     async with doms.get("web1", timeout=5) as dom:
    ...         dom.data = {"console": "/dev/pts/3"}
    ...         await asyncio.sleep(0)
    ...     return doms.peek("web1").data["console"]
    >>> asyncio.run(main())
    '/dev/pts/3'
    """
    return AsyncDomainList(doms)


# --- how a task waits ------------------------------------------------------------------------


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


async def _ask(function: Callable[..., T], *args: Any, within: float | None = None) -> T:
    """Call it again and again, each time when it may go on, until it comes to its end without
    waiting. It begins anew each time, but the seconds of `within` are those of all calls."""
    kwargs: dict[str, Any] = {}
    until = core.deadline(within)
    found = core.attempt(until, function, args, kwargs)
    if type(found) is not core.Blocked:
        return found  # type: ignore[no-any-return]
    return await _ask_on(found, until, function, args, kwargs)


async def _ask_on(
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
                await _work(blocked.settle, until)
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


# --- what runs in another thread -------------------------------------------------------------

_pool: tuple[int, ThreadPoolExecutor] | None = None


def _workers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None or _pool[0] != os.getpid():
        _pool = (os.getpid(), ThreadPoolExecutor(_WORKERS, "shmdomains-aio"))
    return _pool[1]


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


async def _work(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call it in another thread, for this task."""
    done: Future[T] = Future()
    call, owner = _Call(), core.owner()
    work = partial(_work_there, done, call, owner, partial(function, *args, **kwargs))
    if core.holds_locks() or jobs_of_owner(owner):
        _begin_thread(work)
    else:
        _workers().submit(work)
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
        waiting.exception()
        raise cancelled
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


# --- what is awaited, or entered -------------------------------------------------------------


class _Acquire(Awaitable[T], Generic[T]):
    """What finds with the list locked return: await it for the locked domain, or enter it with
    ``async with``, which unlocks. (`get` has its own: `core.Acquire`.)"""

    __slots__ = ("_args", "_function", "_held", "_kwargs", "_timeout")

    def __init__(
        self, function: Callable[..., T], args: Any, kwargs: Any, timeout: float | None
    ) -> None:
        self._function, self._args, self._kwargs = function, args, kwargs
        self._timeout = timeout
        self._held: Any = None

    def __await__(self) -> Generator[Any, None, T]:
        until = core.deadline(self._timeout)
        found = core.attempt(until, self._function, self._args, self._kwargs)
        if type(found) is core.Blocked:
            return (
                yield from _ask_on(
                    found, until, self._function, self._args, self._kwargs
                ).__await__()
            )
        return found  # type: ignore[no-any-return]

    async def __aenter__(self) -> T:
        held = await self
        self._held = held
        if held is not None:
            held.__enter__()  # type: ignore[attr-defined]
        return held

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.__exit__(kind, value, traceback)


class _Locked:
    """The list lock, for ``async with``."""

    __slots__ = ("_doms", "_timeout", "_why")

    def __init__(self, doms: AsyncDomainList, timeout: float | None, why: str | None) -> None:
        self._doms, self._timeout, self._why = doms, timeout, why

    async def __aenter__(self) -> AsyncDomainList:
        await _ask(self._doms.plain.lock, self._timeout, self._why, within=self._timeout)
        return self._doms

    async def __aexit__(self, *exc: object) -> None:
        if self._doms.plain.is_locked:
            self._doms.plain.unlock()


class _Mutex:
    """A named lock, for ``async with``."""

    __slots__ = ("_mutex", "_timeout")

    def __init__(self, mutex: Mutex, timeout: float | None) -> None:
        self._mutex, self._timeout = mutex, timeout

    async def __aenter__(self) -> Mutex:
        await _ask(self._mutex.lock, self._timeout, within=self._timeout)
        return self._mutex

    async def __aexit__(self, *exc: object) -> None:
        if self._mutex.is_locked:
            self._mutex.unlock()


class _AskedFor:
    """The time-out that errors name: of several waits, for which `within` is what counts."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout

    def left(self) -> float | None:
        return self._timeout


class _LockMany:
    """Several domains, for ``async with``; the list lock is held while they are collected."""

    __slots__ = ("_doms", "_taken", "_timeout", "_wanted")

    def __init__(self, doms: DomainList, wanted: list[Key], timeout: float | None) -> None:
        self._doms, self._wanted, self._timeout = doms, wanted, timeout
        self._taken = doms._empty()

    async def __aenter__(self) -> LockedDomains:
        doms, taken = self._doms, self._taken
        deadline = doms._deadline(self._timeout)
        takes_list = not doms.is_locked
        try:
            if takes_list:
                await _ask(doms.lock, self._timeout, within=deadline.left())
            try:
                for one in self._wanted:
                    left = deadline.left()
                    asked_for = _AskedFor(0 if left == 0 else self._timeout)
                    await _ask(self._lock_one, one, asked_for, within=left)
            finally:
                if takes_list and doms.is_locked:
                    doms.unlock()
        except BaseException:
            for dom in reversed(taken):
                dom._release_unseen()
            raise
        return taken.__enter__()

    def _lock_one(self, one: Key, deadline: Deadline) -> None:
        before = len(self._taken)
        try:
            self._doms._lock_one(one, self._taken, deadline)
        except core.WouldBlock:
            del self._taken[before:]
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._taken.__exit__(kind, value, traceback)


class AsyncWatch(AsyncIterator[DomainEvent | EventsMissed]):
    """What `AsyncDomainList.watch` returns; see `shmdomains.DomainList.watch`. One task at a time
    uses it."""

    def __init__(self, doms: DomainList, watch: Watch) -> None:
        self._doms, self._watch = doms, watch

    @property
    def since(self) -> int:
        """The number of the last event that was given out."""
        return self._watch.since

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> DomainEvent | EventsMissed:
        doms, watch = self._doms, self._watch
        timeout = watch.timeout
        while True:
            found = watch._take()
            if found is not None:
                return found
            if timeout == 0:
                raise StopAsyncIteration
            if not await _ask(doms._sleep_on_events, watch.since, timeout, within=timeout):
                raise StopAsyncIteration


# --- the list --------------------------------------------------------------------------------


class AsyncDomainList(core.AsyncSegment):
    """A `DomainList` for the tasks of an event loop; `wrap` makes it.

    Arguments, results and errors of each call are those of the plain one. Whatever else a
    `DomainList` has (`peek`, `list`, `snapshot`, `info`, `len()`, ...) never waits, and is here
    unchanged.
    """

    __slots__ = ()

    plain: DomainList

    # --- locks ---

    def locked(self, timeout: float | None = None, why: str | None = None) -> _Locked:
        """Hold the list lock for an ``async with`` block."""
        return _Locked(self, timeout, why)

    def find_by_id(self, id: int, timeout: float | None = None) -> _Acquire[Domain | None]:
        """The active domain with this id, locked, or ``None``. List lock held by the task."""
        return _Acquire(self.plain.find_by_id, (id, timeout), {}, timeout)

    def find_by_uuid(self, uuid: Uuid, timeout: float | None = None) -> _Acquire[Domain | None]:
        """The domain with this UUID, locked, or ``None``. List lock held by the task."""
        return _Acquire(self.plain.find_by_uuid, (uuid, timeout), {}, timeout)

    def find_by_name(self, name: str, timeout: float | None = None) -> _Acquire[Domain | None]:
        """The domain with this name, locked, or ``None``. List lock held by the task."""
        return _Acquire(self.plain.find_by_name, (name, timeout), {}, timeout)

    def lock_many(self, domains: Iterable[Key], timeout: float | None = None) -> _LockMany:
        """Several domains, locked for an ``async with`` block."""
        return _LockMany(self.plain, list(domains), timeout)

    def mutex(self, name: str, timeout: float | None = None, *, why: str | None = None) -> _Mutex:
        """A named lock, for an ``async with`` block."""
        return _Mutex(self.plain.mutex(name, timeout, why=why), timeout)

    def job(
        self,
        key: Key,
        operation: str,
        kind: Job = Job.MODIFY,
        timeout: float | None = None,
        *,
        allow: Iterable[Job] | None = None,
        why: str | None = None,
    ) -> DomainJob:
        """A job, for an ``async with`` block; so is ``dom.job(...)`` of any domain."""
        return self.plain.job(key, operation, kind, timeout, allow=allow, why=why)

    # --- changes of the list ---

    def assign_def(
        self,
        definition: DomainDef | EncodedDef,
        persistent: bool | None = None,
        timeout: float | None = None,
    ) -> _Acquire[Domain]:
        """Add a domain, or give it another definition; locked. List lock held by the task."""
        return _Acquire(self.plain.assign_def, (definition, persistent, timeout), {}, timeout)

    async def remove_inactive(self, dom: Domain, timeout: float | None = None) -> None:
        """Remove a domain. List lock held by the task, `dom` not locked by it."""
        await _ask(self.plain.remove_inactive, dom, timeout, within=timeout)

    async def define(
        self,
        definition: DomainDef | str | bytes,
        timeout: float | None = None,
        *,
        new: bool = False,
    ) -> DomainInfo:
        """Define a persistent domain, or redefine one, and save its config; returns its info."""
        return await _work(self.plain.define, definition, timeout, new=new)

    async def undefine(
        self,
        key: Key | None = None,
        /,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Undefine a domain: its config, its autostart link and, if it is inactive, the domain."""
        keys = {"uuid": uuid, "name": name, "id": id, "timeout": timeout}
        await _work(self.plain.undefine, key, **keys)

    async def rename(self, dom: Domain, name: str, timeout: float | None = None) -> None:
        """Rename an inactive domain. List lock held, and `dom` locked, by the task."""
        await _work(self.plain.rename, dom, name, timeout)

    async def load_all_configs(
        self,
        config_dir: str | os.PathLike[str],
        autostart_dir: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        workers: int | None = None,
        timeout: float | None = None,
    ) -> LoadReport:
        """Load every ``*.xml`` of a directory. `progress` is called in another thread."""
        return await _work(
            self.plain.load_all_configs, config_dir, autostart_dir, progress, workers, timeout
        )

    async def forget_configs(self, timeout: float | None = None) -> None:
        """Forget the directories of `load_all_configs`."""
        await _work(self.plain.forget_configs, timeout)

    async def save_config(self, dom: Key, timeout: float | None = None) -> None:
        """Write the domain's config file. The task locks the domain of a handle."""
        await _work(self.plain.save_config, dom, timeout)

    async def delete_config(self, dom: Key, timeout: float | None = None) -> None:
        """Remove the domain's config file and autostart link. The task locks the domain of a
        handle."""
        await _work(self.plain.delete_config, dom, timeout)

    async def set_autostart(self, dom: Key, enabled: bool, timeout: float | None = None) -> None:
        """Set whether the domain starts with the host. The task locks the domain of a handle."""
        await _work(self.plain.set_autostart, dom, enabled, timeout)

    async def free(self, timeout: float | None = None) -> None:
        """Remove all domains. List lock held by the task, no domain."""
        await _ask(self.plain.free, timeout, within=timeout)

    # --- waiting ---

    async def wait(
        self,
        key: Key | None = None,
        /,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
        until: Callable[[DomainInfo | None], object] | None = None,
        timeout: float | None = None,
    ) -> DomainInfo | None:
        """Wait until a domain is what `until` says; returns its `DomainInfo`. Takes no lock."""
        doms = self.plain
        deadline = doms._deadline(timeout)
        dom = doms._handle_of(key, uuid=uuid, name=name, id=id)
        if dom is None:
            raise not_found(**one_key(key, uuid, name, id))
        if timeout != 0:
            doms._need_no_lock(dom)
        info, stamp = doms._look(dom)
        if until is None:
            until = any_change
            if info is not None:
                info, stamp = await self._next(dom, info, stamp, deadline, timeout)
        while not until(info):
            if info is None:
                raise removed(dom)
            info, stamp = await self._next(dom, info, stamp, deadline, timeout)
        return info

    async def _next(
        self,
        dom: Domain,
        info: DomainInfo,
        stamp: int,
        deadline: Deadline,
        timeout: float | None,
    ) -> tuple[DomainInfo | None, int]:
        doms = self.plain
        while True:
            left = deadline.left()
            if left == 0:
                raise in_vain(f"domain '{info.name}', which is {info.state.words}", timeout)
            await _ask(doms._sleep, dom, stamp, left, within=left)
            found, now = doms._look(dom)
            if found is None or now != stamp:
                return found, now

    async def wait_any(
        self, *, until: Callable[[DomainInfo], object], timeout: float | None = None
    ) -> DomainInfo:
        """Wait until some domain is what `until` says; returns its `DomainInfo`. Takes no lock."""
        doms = self.plain
        deadline = doms._deadline(timeout)
        if timeout != 0:
            doms._need_no_lock(None)
        marks = doms._marks()
        while True:
            stamp, left = doms._list_stamp(), deadline.left()
            for info in doms._changed(marks):
                if until(info):
                    return info
            if left == 0:
                raise in_vain(f"any of {doms._count(Filter())} domains", timeout)
            await _ask(doms._sleep_on_list, stamp, left, within=left)

    def watch(self, since: int | None = None, timeout: float | None = None) -> AsyncWatch:
        """The list's events, for ``async for``."""
        return AsyncWatch(self.plain, self.plain.watch(since, timeout))

    # --- what never waits ---

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def __len__(self) -> int:
        return len(self.plain)

    def __contains__(self, key: Key) -> bool:
        return key in self.plain

    def __iter__(self) -> Iterator[DomainInfo]:
        return iter(self.plain)

    def __repr__(self) -> str:
        return f"<AsyncDomainList of {self.plain!r}>"


async def wait_until(
    dom: Domain, until: Callable[[Domain], object], timeout: float | None = None
) -> None:
    """`Domain.wait` for a task: wait, with the domain locked, until ``until(dom)`` is true.

    Raises what `shmdomains.Domain.wait` raises.
    """
    doms = dom._doms
    deadline = doms._deadline(timeout)
    while True:
        if dom.changed:
            raise UncommittedChanges(
                f"domain '{dom.name}' has changes that nobody would see while this waits: "
                "commit() or rollback() first"
            )
        need_no_other_lock(doms, dom)
        if until(dom):
            return
        left = deadline.left()
        if left == 0:
            raise in_vain(f"domain '{dom.name}', which is {dom.state.words}", timeout)
        await _sleep_unlocked(dom._holding, left, timeout)


async def _sleep_unlocked(dom: Any, left: float | None, timeout: float | None) -> None:
    doms, block = dom._doms, dom._block
    _, stamp = doms._look(dom)
    dom._release_unseen()
    await _ask(doms._sleep, dom, stamp, left, within=left)
    patience = None if left is None else max(left, SLICE)
    try:
        await _ask(dom._lock_again, block, patience, within=patience)
    except LockTimeout as exc:
        raise dom._in_vain_and_unlocked(timeout, exc) from exc


async def _find_later(acquire: core.Acquire[Any], blocked: core.Blocked) -> Any:
    return await _ask_on(blocked, acquire.until, acquire.find, (), {})


async def _enter_later(acquire: core.Acquire[Any], blocked: core.Blocked) -> Any:
    return acquire.enter(await _ask_on(blocked, acquire.until, acquire.find, (), {}))


def _begins() -> None:
    with suppress(OSError):  # no descriptor left: then when it waits
        _hub()


ready_to_describe()
rooms.begin()
wait_by(_ask)
core.tasks_enter_by(_enter_later, _find_later, _begins)
