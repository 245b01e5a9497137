"""`shmdomains.aio`: a list for asyncio. Tasks wait for domains, and their event loop goes on.

    doms = aio.wrap(DomainList.open("default"))
    async with doms.get("web1", timeout=5) as dom:
        dom.state = DomainState.PAUSED

A task holds what it locked, as a thread does elsewhere: two tasks of one thread exclude each
other, and each rule about who may wait for what counts by task. `dom` is a plain `Domain`. What may
have to wait is awaited; what never waits (`peek`, `list`, `snapshot`, a domain's attributes,
`commit`) is a plain call.

Nothing here blocks the loop's thread. For a lock or a change a task stands in a queue of its thread
and asks again when it is its turn (``memory/asking.py``, ``rooms.py``). What writes files
(`define`, `undefine`, `rename`, `load_all_configs`, ...) runs in another thread, on behalf of the
task.

Of a list on PostgreSQL everything takes a round trip and is awaited, `peek`, `list` and `info` too;
`call` is for what is a method of a domain: ``await aio.call(dom.commit)``. Each runs in another
thread on behalf of the task (``postgres/tasks.py``), and so does the end of an ``async with``
block.

A task that is cancelled while it waits holds nothing. One that ends, in whatever way, while it
holds something is rolled back and unlocked. So is every task of a loop that is closed.
"""

from __future__ import annotations

import os
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from .config import LoadReport
from .errors import LockTimeout, UncommittedChanges
from .events import DomainEvent, EventsMissed
from .job import Job
from .memory._core import core
from .memory.asking import ask, ask_on, work
from .memory.domain import Domain
from .memory.domain_list import DomainList, LockedDomains, Mutex
from .memory.rooms import SLICE
from .names import Uuid
from .rules.info import DomainInfo
from .rules.jobs import DomainJob
from .rules.store import Deadline, Filter
from .rules.values import not_found, one_key
from .rules.wait import any_change, in_vain, need_no_other_lock, removed
from .rules.watch import Watch
from .xml.definition import DomainDef, EncodedDef

if TYPE_CHECKING:
    from typing_extensions import Self

    from .postgres import PostgresDomain, PostgresDomainList
    from .postgres.tasks import AsyncPostgresDomainList

__all__ = ["AsyncDomainList", "AsyncWatch", "call", "wait_until", "wrap"]

T = TypeVar("T")
Key = Domain | DomainInfo | Uuid | int


@overload
def wrap(doms: DomainList) -> AsyncDomainList: ...
@overload
def wrap(doms: PostgresDomainList) -> AsyncPostgresDomainList: ...
def wrap(doms: DomainList | PostgresDomainList) -> AsyncDomainList | AsyncPostgresDomainList:
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
    if isinstance(doms, DomainList):
        return AsyncDomainList(doms)
    from .postgres.tasks import AsyncPostgresDomainList

    return AsyncPostgresDomainList(doms)


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
                yield from ask_on(
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
        await ask(self._doms.plain.lock, self._timeout, self._why, within=self._timeout)
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
        await ask(self._mutex.lock, self._timeout, within=self._timeout)
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
                await ask(doms.lock, self._timeout, within=deadline.left())
            try:
                for one in self._wanted:
                    left = deadline.left()
                    asked_for = _AskedFor(0 if left == 0 else self._timeout)
                    await ask(self._lock_one, one, asked_for, within=left)
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
    uses it.

    >>> import asyncio
    >>> from shmdomains import DomainList, aio
    >>> async def main():
    ...     return [event async for event in aio.wrap(DomainList()).watch(timeout=0)]
    >>> asyncio.run(main())
    []
    """

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
            if not await ask(doms._sleep_on_events, watch.since, timeout, within=timeout):
                raise StopAsyncIteration


# --- the list --------------------------------------------------------------------------------


class AsyncDomainList(core.AsyncSegment):
    """A `DomainList` for the tasks of an event loop; `wrap` makes it.

    Arguments, results and errors of each call are those of the plain one. Whatever else a
    `DomainList` has (`peek`, `list`, `snapshot`, `info`, `len()`, ...) never waits, and is here
    unchanged.

    >>> import asyncio
    >>> from shmdomains import DomainList, aio
    >>> async def main():
    ...     async with aio.wrap(DomainList()).locked() as doms:
    ...         return len(doms.plain)
    >>> asyncio.run(main())
    0
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

    def get_many(self, keys: Iterable[Key], timeout: float | None = None) -> _LockMany:
        """The domains with these keys, locked for an ``async with`` block."""
        wanted: list[Key] = [one.uuid if isinstance(one, Domain) else one for one in keys]
        return _LockMany(self.plain, wanted, timeout)

    async def add(
        self,
        key: Key | None = None,
        /,
        field: str | None = None,
        by: int = 1,
        timeout: float | None = None,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
    ) -> int:
        """Add to a named integer of a domain's data and commit it; returns the sum."""
        add = partial(self.plain.add, uuid=uuid, name=name, id=id)
        return await ask(add, key, field, by, timeout, within=timeout)

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

    def assign_defs(
        self,
        definitions: Iterable[DomainDef | EncodedDef],
        persistent: bool | None = None,
        timeout: float | None = None,
    ) -> _Acquire[LockedDomains]:
        """Add domains, or give them other definitions; all locked. The list lock is taken."""
        enter = cast("Callable[..., LockedDomains]", self.plain.assign_defs)
        return _Acquire(enter, (list(definitions), persistent, timeout), {}, timeout)

    async def remove_inactive(self, dom: Domain, timeout: float | None = None) -> None:
        """Remove a domain. List lock held by the task, `dom` not locked by it."""
        await ask(self.plain.remove_inactive, dom, timeout, within=timeout)

    async def update_many(
        self,
        changes: Mapping[Any, Mapping[str, Any]] | Iterable[tuple[Any, Mapping[str, Any]]],
        timeout: float | None = None,
    ) -> int:
        """Assign fields of several domains, each in a commit of its own; returns of how many."""
        given = dict(changes) if isinstance(changes, Mapping) else list(changes)
        return await work(self.plain.update_many, given, timeout)

    async def remove_many(self, domains: Iterable[Key], timeout: float | None = None) -> int:
        """Remove domains, each in a commit of its own; returns how many. The list lock is taken."""
        return await work(self.plain.remove_many, list(domains), timeout)

    async def define(
        self,
        definition: DomainDef | str | bytes,
        timeout: float | None = None,
        *,
        new: bool = False,
    ) -> DomainInfo:
        """Define a persistent domain, or redefine one, and save its config; returns its info."""
        return await work(self.plain.define, definition, timeout, new=new)

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
        await work(self.plain.undefine, key, **keys)

    async def rename(self, dom: Domain, name: str, timeout: float | None = None) -> None:
        """Rename an inactive domain. List lock held, and `dom` locked, by the task."""
        await work(self.plain.rename, dom, name, timeout)

    async def load_all_configs(
        self,
        config_dir: str | os.PathLike[str],
        autostart_dir: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        workers: int | None = None,
        timeout: float | None = None,
    ) -> LoadReport:
        """Load every ``*.xml`` of a directory. `progress` is called in another thread."""
        return await work(
            self.plain.load_all_configs, config_dir, autostart_dir, progress, workers, timeout
        )

    async def forget_configs(self, timeout: float | None = None) -> None:
        """Forget the directories of `load_all_configs`."""
        await work(self.plain.forget_configs, timeout)

    async def save_config(self, dom: Key, timeout: float | None = None) -> None:
        """Write the domain's config file. The task locks the domain of a handle."""
        await work(self.plain.save_config, dom, timeout)

    async def delete_config(self, dom: Key, timeout: float | None = None) -> None:
        """Remove the domain's config file and autostart link. The task locks the domain of a
        handle."""
        await work(self.plain.delete_config, dom, timeout)

    async def set_autostart(self, dom: Key, enabled: bool, timeout: float | None = None) -> None:
        """Set whether the domain starts with the host. The task locks the domain of a handle."""
        await work(self.plain.set_autostart, dom, enabled, timeout)

    async def free(self, timeout: float | None = None) -> None:
        """Remove all domains. List lock held by the task, no domain."""
        await ask(self.plain.free, timeout, within=timeout)

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
            await ask(doms._sleep, dom, stamp, left, within=left)
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
            # A slice at most: a writer may have died before it told.
            pause = SLICE if left is None else min(left, SLICE)
            await ask(doms._sleep_on_list, stamp, pause, within=pause)

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


async def call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a method of a plain list on PostgreSQL, or of one of its domains, in another thread, on
    behalf of this task: ``await aio.call(dom.commit)``. For what takes a round trip and has no
    other form for tasks."""
    return await work(function, *args, **kwargs)


@overload
async def wait_until(
    dom: Domain, until: Callable[[Domain], object], timeout: float | None = None
) -> None: ...
@overload
async def wait_until(
    dom: PostgresDomain, until: Callable[[PostgresDomain], object], timeout: float | None = None
) -> None: ...
async def wait_until(
    dom: Any, until: Callable[[Any], object], timeout: float | None = None
) -> None:
    """`Domain.wait` for a task: wait, with the domain locked, until ``until(dom)`` is true.

    Raises what `shmdomains.Domain.wait` raises.
    """
    if isinstance(dom, Domain):
        await _wait_until(dom, until, timeout)
    else:
        from .postgres import tasks

        await tasks.wait_until(dom, until, timeout)


async def _wait_until(
    dom: Domain, until: Callable[[Domain], object], timeout: float | None
) -> None:
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
    await ask(doms._sleep, dom, stamp, left, within=left)
    patience = None if left is None else max(left, SLICE)
    try:
        await ask(dom._lock_again, block, patience, within=patience)
    except LockTimeout as exc:
        raise dom._in_vain_and_unlocked(timeout, exc) from exc
