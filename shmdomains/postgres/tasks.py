"""A list on PostgreSQL for the tasks of an event loop; see `shmdomains.aio`, whose calls these are.

What takes a round trip is done in another thread, on behalf of the task (``memory/asking.py``), and
so the end of an ``async with`` block is, too, which commits and unlocks. A task that is cancelled
while it waits for a lock has the wait cancelled at the server. What it got all the same is given
back before the cancellation goes on.

Whoever sleeps until something changes takes no thread: the listener wakes the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from ..deadline import check_timeout
from ..errors import LockTimeout, UncommittedChanges
from ..events import DomainEvent, EventsMissed
from ..memory import asking
from ..memory._core import core
from ..names import Uuid
from ..rules.info import DomainInfo
from ..rules.plain import PlainLockedDomains
from ..rules.values import not_found, one_key
from ..rules.wait import any_change, in_vain, need_no_other_lock, removed
from ..rules.watch import Watch
from . import pool
from .domain import PostgresDomain
from .domain_list import PostgresDomainList

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

_AT_ONCE = {"close", "host", "created", "closed", "is_locked"}
"""What takes no round trip."""

asking.also_hold.append(pool.holds)


class Awaited(Awaitable[T], Generic[T]):
    """What a call of an `AsyncPostgresDomainList` returns: await it for its result, or enter it
    with ``async with``."""

    __slots__ = ("_call", "_held", "_owner")

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._held: Any = None
        self._owner = 0

    def __await__(self) -> Generator[Any, None, T]:
        return asking.work_or_undo(self._result, _give_back).__await__()

    def _result(self) -> T:
        result = self._call()
        for dom in _locked(result):
            _ = dom.definition  # so that asking for it takes no round trip
        return result

    def _enter(self) -> tuple[Any, Any]:
        held: Any = self._result()
        return held, None if held is None else held.__enter__()

    async def __aenter__(self) -> Any:
        self._held, entered = await asking.work_or_undo(self._enter, _leave_entered)
        self._owner = core.owner()
        return entered

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        held, self._held = self._held, None
        if held is not None:
            await leave(self._owner, held.__exit__, kind, value, traceback)


class _Locked(Awaited[Any]):
    """The list lock, for ``async with``."""

    __slots__ = ("_doms",)

    def __init__(self, doms: AsyncPostgresDomainList, call: Callable[[], Any]) -> None:
        super().__init__(call)
        self._doms = doms

    async def __aenter__(self) -> AsyncPostgresDomainList:
        await super().__aenter__()
        return self._doms


async def leave(owner: int, exit: Callable[..., object], *exc: Any) -> None:
    """End a block that `owner` entered."""
    if exc[0] is not GeneratorExit:
        await asking.finish(exit, *exc)
    elif core.owner() == owner:  # its coroutine was closed, and may not wait
        exit(*exc)
    # else its task was dropped: then what it held is freed (`Pool.leave`)


def _locked(result: Any) -> list[PostgresDomain]:
    """The domains that a call locked."""
    found = result if isinstance(result, PlainLockedDomains) else [result]
    return [one for one in found if isinstance(one, PostgresDomain) and one.is_locked]


def _give_back(result: Any) -> None:
    """Nobody wants it any more."""
    for dom in reversed(_locked(result)):
        dom._release_unseen()


def _leave_entered(entered: tuple[Any, Any]) -> None:
    if entered[0] is not None:
        gone = core.WorkGivenUp()
        entered[0].__exit__(core.WorkGivenUp, gone, None)


class AsyncPostgresDomainList:
    """A `PostgresDomainList` for the tasks of an event loop; `shmdomains.aio.wrap` makes it.

    Arguments, results and errors of each call are those of the plain one. Every call is awaited, or
    entered if its result is for a ``with`` block: here `peek`, `list`, `check`, ``info`` take a
    round trip, too.
    """

    def __init__(self, plain: PostgresDomainList) -> None:
        self.plain = plain

    def locked(self, timeout: float | None = None, why: str | None = None) -> _Locked:
        """Hold the list lock for an ``async with`` block."""
        return _Locked(self, partial(self.plain.locked, timeout))

    @property
    def info(self) -> Awaited[Any]:
        """Counts, and who is attached, to be awaited."""
        return Awaited(lambda: self.plain.info)

    def mutex(
        self, name: str, timeout: float | None = None, *, why: str | None = None
    ) -> Awaited[Any]:
        """A named lock, for an ``async with`` block."""
        return Awaited(partial(self.plain.mutex, name, timeout, why=why))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.plain, name)
        if name.startswith("_") or name in _AT_ONCE:
            return found
        return lambda *args, **kwargs: Awaited(partial(found, *args, **kwargs))

    def __repr__(self) -> str:
        return f"<AsyncPostgresDomainList of {self.plain!r}>"

    # --- waiting ---

    async def wait(
        self,
        key: Any = None,
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
        dom = await asking.work(doms._handle_of, key, uuid=uuid, name=name, id=id)
        if dom is None:
            raise not_found(**one_key(key, uuid, name, id))
        if timeout != 0:
            doms._need_no_lock(dom)
        info, stamp = await asking.work(doms._look, dom)
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
        self, dom: Any, info: DomainInfo, stamp: Any, deadline: Any, timeout: float | None
    ) -> tuple[DomainInfo | None, object]:
        while True:
            left = deadline.left()
            if left == 0:
                raise in_vain(f"domain '{info.name}', which is {info.state.words}", timeout)
            await _sleep(self.plain, dom, stamp, left)
            found, now = await asking.work(self.plain._look, dom)
            if found is None or now != stamp:
                return found, now
            stamp = now

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
            stamp = await asking.work(doms._list_stamp)
            left = deadline.left()
            for info in await asking.work(doms._changed, marks):
                if until(info):
                    return info
            if left == 0:
                raise in_vain(f"any of {await self.count()} domains", timeout)
            told = partial(doms._pool.listener.has_changed, cast("int", stamp), None)
            await _told(doms, told, left)

    def watch(self, since: int | None = None, timeout: float | None = None) -> AsyncPostgresWatch:
        """The list's events, for ``async for``. It begins with the first one that is asked for;
        await it to have it begun, so that what happens from then on is told."""
        return AsyncPostgresWatch(self.plain, since, timeout)


class AsyncPostgresWatch(AsyncIterator[DomainEvent | EventsMissed]):
    """What `AsyncPostgresDomainList.watch` returns; see `shmdomains.DomainList.watch`. One task at
    a time uses it."""

    def __init__(self, doms: PostgresDomainList, since: int | None, timeout: float | None) -> None:
        check_timeout(timeout)
        self._doms, self._first, self.timeout = doms, since, timeout
        self._watch: Watch | None = None

    @property
    def since(self) -> int | None:
        """The number of the last event that was given out."""
        return self._first if self._watch is None else self._watch.since

    def __await__(self) -> Generator[Any, None, Self]:
        return self._begin().__await__()

    async def _begin(self) -> Self:
        if self._watch is None:
            self._watch = await asking.work(self._doms.watch, self._first, self.timeout)
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> DomainEvent | EventsMissed:
        await self._begin()
        doms, watch = self._doms, self._watch
        assert watch is not None
        deadline = doms._deadline(self.timeout)
        while True:
            found = await asking.work_or_undo(watch._take, _GoBack(watch))
            if found is not None:
                return found
            left = deadline.left()
            if not await asking.work(doms._sleep_on_events, watch.since, 0):
                if left == 0:
                    raise StopAsyncIteration
                await _told(doms, partial(doms._pool.listener.knows_more, watch.since), left)


class _GoBack:
    """Nobody got what a watch gave out last: it gives it out again."""

    def __init__(self, watch: Watch) -> None:
        self._watch, self._before = watch, (watch._since, watch._next)

    def __call__(self, _event: object) -> None:
        self._watch._since, self._watch._next = self._before


# --- sleeping ---------------------------------------------------------------------------------


async def _sleep(doms: PostgresDomainList, dom: Any, stamp: Any, left: float | None) -> None:
    """Until something is told of the domain since it was looked at, or the time is up."""
    listener = doms._pool.listener
    await _told(doms, partial(listener.has_changed, stamp.changes, dom._record), left)


async def _told(doms: PostgresDomainList, due: Callable[[], bool], left: float | None) -> None:
    loop = asyncio.get_running_loop()
    woken: asyncio.Future[None] = loop.create_future()
    listener = doms._pool.listener

    def wake() -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(_set, woken)

    listener.wake(due, wake)
    timer = None if left is None else loop.call_later(left, _set, woken)
    try:
        await woken
    finally:
        listener.wake_no_more(wake)
        if timer is not None:
            timer.cancel()
    doms._usable()


def _set(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


async def wait_until(
    dom: PostgresDomain, until: Callable[[Any], object], timeout: float | None = None
) -> None:
    """`Domain.wait` for a task; see `shmdomains.aio.wait_until`."""
    doms = cast("PostgresDomainList", dom._doms)
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
        await _sleep_unlocked(doms, cast("PostgresDomain", dom._holding), left, timeout)


async def _sleep_unlocked(
    doms: PostgresDomainList, dom: PostgresDomain, left: float | None, timeout: float | None
) -> None:
    block = dom._block
    _, stamp = await asking.work(doms._look, dom)
    await asking.finish(dom._release_unseen)
    await _sleep(doms, dom, stamp, left)
    patience = None if left is None else max(left, 0.1)

    def lock_again() -> None:
        dom._lock_again(block, patience)
        _ = dom.definition

    try:
        await asking.work_or_undo(lock_again, lambda _: dom._release_unseen())
    except LockTimeout as exc:
        raise await asking.work(dom._in_vain_and_unlocked, timeout, exc) from exc
