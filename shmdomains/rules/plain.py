"""The rules over any `Store`, in Python: for stores without a native core.

What every such store needs stands here once: who holds what (per thread), lock order, nested
``with`` blocks, uncommitted changes, reading one's own writes. Shared memory has the same natively;
the conformance suite tests both.

A hold is one thread's lock of one domain; all handles of that domain in that thread share it.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import UUID
from weakref import ReferenceType, ref

from ..config.change import ConfigDirs
from ..deadline import Deadline
from ..errors import (
    AlreadyLocked,
    DomainExists,
    DomainNotLocked,
    DomainRemoved,
    ListClosed,
    ListNotLocked,
    LockOrder,
    LockTimeout,
    NotOwner,
    UncommittedChanges,
    WrongList,
)
from ..events import DomainEvent, EventType
from ..holder import LockHolder, this_host
from ..names import Uuid, check_name, parse_uuid
from ..states import DomainState
from ..xml.definition import DomainDef
from .domain import DomainRules
from .elect import end_elections
from .events import news_of_change, news_of_end, news_of_new
from .info import DomainInfo, reason_of
from .many import ManyRules
from .plain_mutex import PlainMutex
from .steps import settle
from .store import Changes, Filter, Identity, Key, NewDomain, News, Store
from .values import (
    checked_definition,
    checked_pid,
    checked_reason,
    checked_state,
    decode_data,
    encode_data,
    not_found,
    one_key,
)
from .work import Caller, Work

if TYPE_CHECKING:
    from typing_extensions import Self

R = TypeVar("R")

SLICE = 0.1
"""Seconds of sleep after which it is looked whether the list was closed."""


class _Hold(Generic[R]):
    """One lock of one domain: its committed state and the uncommitted changes."""

    __slots__ = ("changes", "depth", "handle", "info", "intends", "noted", "record")

    def __init__(self, record: R, info: DomainInfo) -> None:
        self.record = record
        self.info = info
        self.changes: Changes = {}
        self.noted: list[News] = []  # events of the next commit that its changes do not tell of
        self.depth = 0  # of ``with`` blocks
        self.intends = False  # the holder said what it is going to do
        self.handle: ReferenceType[PlainDomain[R]] | None = None  # that it was taken through

    def drop(self) -> None:
        """Roll back."""
        self.changes, self.noted = {}, []


class _Mine(threading.local):
    """What this thread holds of one list."""

    def __init__(self) -> None:
        self.list_held = False
        self.holds: dict[Any, _Hold[Any]] = {}
        self.mutexes: dict[str, int] = {}  # name -> id() of the handle that took it


class _Me(threading.local):
    """This thread's number as an owner. Below zero, where those of the core are not."""

    def __init__(self) -> None:
        self.number = -next(_numbers)


_numbers = itertools.count(1)
_me = _Me()


class PlainDomain(DomainRules, Generic[R]):
    """A handle to a domain of a `PlainDomainList`; see `DomainBase`."""

    __slots__ = ("__weakref__", "_list", "_locker", "_record", "_uuid")

    def __init__(self, doms: PlainDomainList[R], record: R, uuid: UUID) -> None:
        self._list = doms
        self._record = record
        self._uuid = uuid
        self._locker: _Hold[R] | None = None  # the hold taken through this handle

    def __del__(self) -> None:
        hold = self._list._mine.holds.get(self._record)
        if hold is None or hold is not self._locker:
            return
        self._list._give_back(hold, seen=False)
        warnings.warn(
            "a Domain that was still locked was dropped; its changes are rolled back and the lock "
            "is freed: use 'with'",
            ResourceWarning,
            stacklevel=1,
        )

    # --- the lock ---

    def _held(self) -> _Hold[R]:
        hold = self._list._mine.holds.get(self._record)
        if hold is None:
            raise DomainNotLocked(
                f"domain {self._uuid} is not locked by this thread: with dom: ..."
            )
        return hold

    @property
    def is_locked(self) -> bool:
        return self._record in self._list._mine.holds

    def lock(self, timeout: float | None = None) -> None:
        """Lock the domain; see `DomainBase.lock`."""
        deadline = Deadline(timeout)
        self._locker = self._list._take(self._record, timeout)
        if self._locker is not None:
            self._locker.handle = ref(self)
        else:
            raise DomainRemoved(f"domain {self._uuid} was removed; this handle outlived it")
        self._list._settle(self, deadline)

    def try_lock(self) -> bool:
        """Lock the domain if it is free. Allowed whatever this thread holds."""
        return self.acquire(block=False)

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """`lock` in the manner of `multiprocessing.Lock`."""
        try:
            self.lock(_as_timeout(block, timeout))
        except LockTimeout:
            return False
        return True

    def release(self) -> None:
        """`unlock` in the manner of `multiprocessing.Lock`."""
        self.unlock()

    def unlock(self, timeout: float | None = None) -> None:
        """Commit the changes and release the lock, even if the commit fails.

        Raises `DomainNotLocked`, or `NotOwner` in another thread.
        """
        deadline = Deadline(timeout)
        hold = self._list._mine.holds.get(self._record)
        if hold is None:
            if self._record in self._list._held_by:
                raise NotOwner(f"another thread of this process holds domain {self._uuid}")
            raise DomainNotLocked(f"domain {self._uuid} is not locked by this thread")
        try:
            work = self._work if hold.intends else None
            if work is not None:
                self._work = work.without_intention()
            self._list._commit(hold, deadline.left())
        finally:
            self._list._give_back(hold, seen=True)

    def _release_unseen(self) -> None:
        hold = self._list._mine.holds.get(self._record)
        if hold is not None:
            self._list._give_back(hold, seen=False)

    def __enter__(self) -> Self:
        if not self.is_locked:
            self.lock()
        self._held().depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        hold = self._list._mine.holds.get(self._record)
        if hold is None:
            return
        if kind is not None:
            hold.drop()
            hold.intends = False
        if hold.depth > 1:
            hold.depth -= 1  # an inner block; the outer one goes on
            return
        self.unlock()

    def commit(self, timeout: float | None = None) -> None:
        """Commit the changes so far and keep the lock."""
        self._list._commit(self._held(), timeout)

    def rollback(self) -> None:
        """Drop all changes since the last commit."""
        self._held().drop()

    @property
    def changed(self) -> bool:
        hold = self._held()
        return bool(hold.changes or hold.noted)

    @property
    def previous_owner_died(self) -> LockHolder | None:
        """Who died holding the domain since it was last unlocked normally, or None."""
        return self._list._store.died(self._held().record)

    # --- fields: as changed, else as committed ---

    @property
    def uuid(self) -> UUID:
        return self._uuid

    @property
    def name(self) -> str:
        return self._held().info.name

    def _value(self, field: str) -> Any:
        hold = self._held()
        return hold.changes[field] if field in hold.changes else getattr(hold.info, field)  # type: ignore[literal-required]

    def _change(self, field: str, check: Callable[[Any], Any], value: Any) -> None:
        self._held()
        checked = check(value)  # may run the caller's code, even an unlock
        self._held().changes[field] = checked  # type: ignore[literal-required]

    @property
    def id(self) -> int:
        return int(self._value("id"))

    @property
    def is_active(self) -> bool:
        return self.id != -1

    @property
    def state(self) -> DomainState:
        return DomainState(self._value("state"))

    @state.setter
    def state(self, value: int) -> None:
        self._change("state", checked_state, value)
        self._held().changes["reason"] = 0

    @property
    def reason(self) -> int:
        return reason_of(self.state, self._value("reason"))

    @reason.setter
    def reason(self, value: int) -> None:
        self._change("reason", checked_reason, value)

    @property
    def pid(self) -> int | None:
        pid: int | None = self._value("pid")
        return pid

    @pid.setter
    def pid(self, value: int | None) -> None:
        self._change("pid", checked_pid, value)
        self._held().changes["started"] = 0 if value is None else self._list._store.started(value)

    @property
    def process_alive(self) -> bool:
        """Whether the process that was assigned to `pid` runs, and not a later one of its number.
        False for ``None``, and for a process that did not run when it was assigned."""
        hold, pid = self._held(), self.pid
        started = hold.changes.get("started", hold.info._started)
        return pid is not None and started != 0 and self._list._store.runs(pid, started)

    @property
    def host(self) -> str | None:
        """The host where the domain runs; None if it is inactive."""
        host: str | None = self._value("host")
        return host

    @property
    def persistent(self) -> bool:
        return bool(self._value("persistent"))

    @persistent.setter
    def persistent(self, value: bool) -> None:
        self._held().changes["persistent"] = bool(value)

    @property
    def autostart(self) -> bool:
        return bool(self._value("autostart"))

    @autostart.setter
    def autostart(self, value: bool) -> None:
        self._held().changes["autostart"] = bool(value)

    @property
    def definition(self) -> DomainDef:
        definition: DomainDef = self._value("definition")
        return definition

    @definition.setter
    def definition(self, value: DomainDef) -> None:
        self._held().changes["definition"] = checked_definition(value, self._uuid, self.name)

    @property
    def next_definition(self) -> DomainDef | None:
        definition: DomainDef | None = self._value("next_definition")
        return definition

    @next_definition.setter
    def next_definition(self, value: DomainDef | None) -> None:
        if value is not None:
            value = checked_definition(value, self._uuid, self.name)
        self._held().changes["next_definition"] = value

    @property
    def data(self) -> Any:
        hold = self._held()
        if "data" not in hold.changes:
            return hold.info.data
        packed = hold.changes["data"]
        return None if packed is None else decode_data(packed)

    @data.setter
    def data(self, value: Any) -> None:
        hold = self._held()
        hold.changes["data"] = None if value is None else encode_data(value)

    # --- for the rules ---

    @property
    def _receipt(self) -> object:
        return self._list._store.receipt(self._record)

    def _take_id(self, timeout: float | None = None, host: str | None = None) -> int:
        hold = self._held()
        hold.changes["id"] = self._list._store.next_id(timeout)
        hold.changes["host"] = self._list._this_host() if host is None else host
        return hold.changes["id"]

    def _drop_id(self) -> None:
        self._held().changes.update({"id": -1, "host": None})

    @property
    def _work(self) -> Work | None:
        hold = self._held()
        if "work" not in hold.changes:
            return hold.info._work
        packed = hold.changes["work"]
        return None if packed is None else Work.decode(packed)

    @_work.setter
    def _work(self, value: Work | None) -> None:
        self._held().changes["work"] = None if value is None else value.encode()

    def _commit_work(
        self,
        work: Work | None,
        timeout: float | None = None,
        events: tuple[tuple[int, int], ...] = (),
    ) -> None:
        hold = self._held()
        changes, noted = hold.changes, hold.noted
        hold.changes = {"work": None if work is None else work.encode()}
        id, name = hold.info.id, hold.info.name
        hold.noted = [News(EventType(type), detail, id, name) for type, detail in events]
        try:
            self._list._commit(hold, timeout)
        finally:
            changes.pop("work", None)
            hold.changes, hold.noted = changes, noted

    @property
    def _intends(self) -> bool:
        return self._held().intends

    @_intends.setter
    def _intends(self, value: bool) -> None:
        self._held().intends = value

    def _note(self, type: int, detail: int = 0) -> None:
        self._held().noted.append(News(EventType(type), detail, self.id, self.name))

    def _caller(self) -> Caller:
        return self._list._store.caller()

    def _describe(self, caller: Caller) -> LockHolder:
        return self._list._store.describe(caller)

    def _runs(self, caller: Caller) -> bool:
        return self._list._store.lives(caller)

    @property
    def _doms(self) -> PlainDomainList[R]:
        return self._list

    @property
    def _holding(self) -> PlainDomain[R]:
        handle = self._held().handle
        return (None if handle is None else handle()) or self

    @property
    def _block(self) -> tuple[int, Any]:
        hold = self._held()
        return hold.depth, _intended(hold) if hold.intends else None

    def _lock_again(self, block: Any, timeout: float | None = None) -> None:
        depth, intended = block
        self.lock(timeout)
        hold = self._held()
        hold.depth = depth
        hold.intends = intended is not None and _intended(hold) == intended

    def _wait_for_change(self, timeout: float | None = None) -> bool:
        deadline = Deadline(timeout)
        doms, hold = self._list, self._held()
        if hold.changes:
            raise UncommittedChanges(f"domain '{self.name}' has changes")
        receipt, intended = self._receipt, _intended(hold) if hold.intends else None
        doms._give_back(hold, seen=False)
        while not (changed := doms._sleep(self, receipt, deadline.left())):
            if deadline.left() == 0:
                break
        left = deadline.left()
        again = doms._take(self._record, left if left is None else max(left, SLICE))
        if again is None:
            raise DomainRemoved(f"domain {self._uuid} was removed; this handle outlived it")
        doms._mine.holds[self._record] = hold  # so that it is still the handle's that locked it
        hold.info = again.info
        hold.intends = intended is not None and _intended(hold) == intended
        doms._settle(self, deadline)
        return changed

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PlainDomain):
            return NotImplemented
        return self._list is other._list and bool(self._record == other._record)

    def __hash__(self) -> int:
        return hash(self._record)

    def __reduce__(self) -> tuple[Any, ...]:
        return PlainDomain, (self._list, self._record, self._uuid)

    def __repr__(self) -> str:
        if not self.is_locked:
            return f"<Domain {self._uuid}>"
        return f"<Domain {self.name!r} {self._uuid} locked>"


def _intended(hold: _Hold[R]) -> object:
    work = hold.info._work
    return None if work is None else work.intended


class PlainLockedDomains(list[PlainDomain[R]]):
    """What `lock_many` returns: a ``with`` block commits and unlocks each, or rolls each back."""

    def __enter__(self) -> Self:
        for dom in self:
            dom.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        failure: BaseException | None = None
        for dom in reversed(self):
            try:
                dom.__exit__(kind, value, traceback)
            except BaseException as exc:
                failure = failure or exc
        if failure is not None:
            raise failure


class PlainDomainList(ManyRules[PlainDomain[R]], Generic[R]):
    """A list of domains over a `Store`; the public methods are `shmdomains.DomainList`'s."""

    _handle_type: type[PlainDomain[R]] = PlainDomain

    def __init__(self, store: Store[R]) -> None:
        self._store = store
        self._mine = _Mine()
        self._held_by: dict[R, int] = {}  # the holding thread, for `NotOwner`
        self._list_held_by: int | None = None
        self._mutex_held_by: dict[str, int] = {}
        self.closed = False

    def close(self) -> None:
        """Close the list; from now on everything else raises `ListClosed`."""
        self._stop_events()
        if self.is_locked:
            self.unlock()
        self.closed = True
        end_elections(self)

    def _usable(self) -> None:
        if self.closed:
            raise ListClosed("this DomainList is closed")

    # --- the list lock ---

    @property
    def _owner(self) -> int:
        return _me.number

    @property
    def _this(self) -> str:
        return "this thread"

    @property
    def is_locked(self) -> bool:
        return self._mine.list_held

    def lock(self, timeout: float | None = None) -> None:
        """Take the list lock; see `ListBase.locked`."""
        deadline = Deadline(timeout)
        self._usable()
        if self.is_locked:
            raise AlreadyLocked("this thread holds the list lock already")
        if self._mine.holds:
            raise LockOrder(
                "this thread holds a domain; the list lock comes first: unlock the domain, or take "
                "the list lock before it"
            )
        self._store.lock_list(deadline.left())
        self._mine.list_held, self._list_held_by = True, threading.get_ident()

    def unlock(self) -> None:
        """Release the list lock. Raises `ListNotLocked`, or `NotOwner` in another thread."""
        if not self.is_locked:
            self._usable()
            if self._list_held_by is not None:
                raise NotOwner("another thread of this process holds the list lock")
            raise ListNotLocked("this thread does not hold the list lock")
        self._list_held_by = None
        self._store.unlock_list()
        self._mine.list_held = False

    @contextmanager
    def locked(self, timeout: float | None = None) -> Iterator[Self]:
        """Hold the list lock for a ``with`` block."""
        self.lock(timeout)
        try:
            yield self
        finally:
            if self.is_locked:
                self.unlock()

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """`lock` in the manner of `multiprocessing.Lock`."""
        try:
            self.lock(_as_timeout(block, timeout))
        except LockTimeout:
            return False
        return True

    def release(self) -> None:
        """`unlock` in the manner of `multiprocessing.Lock`."""
        self.unlock()

    def mutex(
        self, name: str, timeout: float | None = None, *, why: str | None = None
    ) -> PlainMutex:
        """A named lock, not yet locked; see `ListBase.mutex`."""
        return PlainMutex(self, name, timeout)

    def _need_list_lock(self, what: str) -> None:
        self._usable()
        if not self.is_locked:
            raise ListNotLocked(f"{what} needs the list lock: with doms.locked(): ...")

    def _need_ours(self, dom: PlainDomain[R]) -> None:
        self._usable()
        if dom._list is not self:
            raise WrongList(
                f"domain {dom.uuid} is of another list; call the list that it came from"
            )

    # --- finding ---

    def _key(
        self,
        key: Uuid | int | DomainInfo | PlainDomain[R] | None,
        uuid: Uuid | None,
        name: str | None,
        id: int | None,
    ) -> Key:
        [(kind, value)] = one_key(key, uuid, name, id).items()
        if kind == "uuid":
            value = parse_uuid(value)
        elif kind == "name" and not isinstance(value, str):
            raise TypeError(f"a name is a str, not {type(value).__name__}")
        elif kind == "id" and not isinstance(value, int):
            raise TypeError(f"an id is an int, not {type(value).__name__}")
        return Key(kind, value)

    def lookup(
        self,
        key: Uuid | int | DomainInfo | PlainDomain[R] | None = None,
        /,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
        timeout: float | None = None,
    ) -> PlainDomain[R] | None:
        """Like `get`, but None when there is no such domain."""
        deadline = Deadline(timeout)
        self._usable()
        return self._find(self._key(key, uuid, name, id), deadline)

    def get(
        self,
        key: Uuid | int | DomainInfo | PlainDomain[R] | None = None,
        /,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
        timeout: float | None = None,
    ) -> PlainDomain[R]:
        """The domain with this key (`values.key_of`), locked; see `ListBase.get`."""
        dom = self.lookup(key, uuid=uuid, name=name, id=id, timeout=timeout)
        if dom is None:
            raise not_found(**one_key(key, uuid, name, id))
        return dom

    def find_by_uuid(self, uuid: Uuid, timeout: float | None = None) -> PlainDomain[R] | None:
        """The domain with this UUID, locked, or None. List lock held."""
        self._need_list_lock("find_by_uuid")
        return self.lookup(uuid=uuid, timeout=timeout)

    def find_by_name(self, name: str, timeout: float | None = None) -> PlainDomain[R] | None:
        """The domain with this name, locked, or None. List lock held."""
        self._need_list_lock("find_by_name")
        return self.lookup(name=name, timeout=timeout)

    def find_by_id(self, id: int, timeout: float | None = None) -> PlainDomain[R] | None:
        """The active domain with this id, locked, or None. List lock held."""
        self._need_list_lock("find_by_id")
        return self.lookup(id=id, timeout=timeout)

    def _find(self, key: Key, deadline: Deadline) -> PlainDomain[R] | None:
        while True:
            record = self._store.find(key)
            if record is None:
                return None
            hold = self._take(record, deadline.left())
            if hold is None:
                continue  # removed meanwhile; another domain may have the key now
            if getattr(hold.info, key.kind) == key.value:
                dom = self._handle(record, hold)
                self._settle(dom, deadline)
                return dom
            self._give_back(hold, seen=False)

    def _handle(self, record: R, hold: _Hold[R]) -> PlainDomain[R]:
        dom = PlainDomain(self, record, hold.info.uuid)
        dom._locker = hold
        hold.handle = ref(dom)
        return dom

    def _settle(self, dom: PlainDomain[R], deadline: Deadline) -> None:
        work = dom._held().info._work
        if work is None or work.step is None:
            return
        try:
            settle(self, dom, deadline.left())
        except BaseException:
            dom._release_unseen()
            raise

    def _take(self, record: R, timeout: float | None) -> _Hold[R] | None:
        """Lock a record; ``None`` when it is gone."""
        deadline = Deadline(timeout)
        self._usable()
        holds = self._mine.holds
        if record in holds:
            raise AlreadyLocked(f"this thread holds domain {holds[record].info.name!r} already")
        if holds and not self.is_locked and timeout != 0:
            raise LockOrder(
                "this thread holds a domain and would wait for another; take both with "
                "lock_many(), or hold the list lock, or use timeout=0"
            )
        info = self._store.lock(record, deadline.left())
        return None if info is None else self._hold(record, info)

    def _hold(self, record: R, info: DomainInfo) -> _Hold[R]:
        hold = self._mine.holds[record] = _Hold(record, info)
        self._held_by[record] = threading.get_ident()
        return hold

    def _give_back(self, hold: _Hold[R], seen: bool) -> None:
        self._held_by.pop(hold.record, None)  # before the next holder can enter itself
        self._store.unlock(hold.record, seen)
        del self._mine.holds[hold.record]  # not before: if unlocking fails it is still ours

    def _commit(self, hold: _Hold[R], timeout: float | None) -> None:
        deadline = Deadline(timeout)
        changes, noted = hold.changes, hold.noted
        hold.drop()
        if not changes and not noted:
            return
        news = [*noted, *news_of_change(hold.info, changes)]
        hold.info = self._store.commit(hold.record, changes, news, deadline.left())

    # --- reading ---

    def peek(
        self,
        key: Uuid | int | DomainInfo | PlainDomain[R] | None = None,
        /,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
        timeout: float | None = 1.0,
        definitions: bool | None = None,
    ) -> DomainInfo | None:
        """The committed state of one domain, or None. Takes no lock."""
        Deadline(timeout)
        self._usable()
        wanted = self._key(key, uuid, name, id)
        record = self._store.find(wanted)
        info = None if record is None else self._store.read(record)
        if info is None or getattr(info, wanted.kind) != wanted.value:
            return None
        return info._without_blobs() if definitions is False else info

    def snapshot(self, definitions: bool = True) -> list[DomainInfo]:
        """All domains, each as it was committed."""
        return self._scan(Filter(), definitions)

    def _scan(self, wanted: Filter, definitions: bool) -> list[DomainInfo]:
        self._usable()
        infos = (self._store.read(record) for record in self._store.records())
        return [
            info if definitions else info._without_blobs()
            for info in infos
            if info is not None and wanted.fits(info)
        ]

    def _count(self, wanted: Filter) -> int:
        return len(self._scan(wanted, True))

    def __len__(self) -> int:
        return self._count(Filter())

    def __contains__(self, key: Uuid | int | DomainInfo | PlainDomain[R]) -> bool:
        return self.peek(key) is not None

    def __iter__(self) -> Iterator[DomainInfo]:
        return iter(self.snapshot())

    # --- for the rules ---

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(timeout)

    def _this_host(self) -> str:
        """What `activate` enters as the host unless it is told another one."""
        return this_host()

    def _who_has(self, uuid: Uuid | None, name: str) -> Identity | None:
        found = None if uuid is None else self.peek(uuid=uuid)
        return found or self.peek(name=name)

    def _insert(
        self,
        uuid: Uuid,
        name: str,
        definition: bytes,
        state: DomainState,
        persistent: bool,
        timeout: float | None,
        made: list[PlainDomain[R] | None],
        work: Work | None = None,
    ) -> PlainDomain[R]:
        deadline = Deadline(timeout)
        self._need_list_lock("assign_def")
        uuid, name = parse_uuid(uuid), check_name(name)
        known = self._who_has(uuid, name)
        if known is not None:
            raise DomainExists(
                f"domain '{known.name}' was defined meanwhile with uuid {known.uuid}"
            )
        new = NewDomain(uuid, name, DomainDef.decode(definition), persistent, state, work)
        record, info = self._store.insert(new, news_of_new(name, persistent), deadline.left())
        made[0] = dom = self._handle(record, self._hold(record, info))
        return dom

    def _remove(self, dom: PlainDomain[R], timeout: float | None = None) -> None:
        self._need_list_lock("remove")
        self._need_ours(dom)
        hold = dom._held()
        self._store.remove(hold.record, news_of_end(hold.info), timeout)
        self._held_by.pop(hold.record, None)
        del self._mine.holds[hold.record]

    def _rename(
        self,
        dom: PlainDomain[R],
        name: str,
        definition: bytes,
        next_definition: bytes | None,
        timeout: float | None = None,
        work: Work | None = None,
    ) -> None:
        self._need_list_lock("rename")
        hold = dom._held()
        hold.changes = {"name": name, "definition": DomainDef.decode(definition)}
        hold.changes["work"] = None if work is None else work.encode()
        if next_definition is not None:
            hold.changes["next_definition"] = DomainDef.decode(next_definition)
        self._commit(hold, timeout)

    def _handles(self) -> list[PlainDomain[R]]:
        found = []
        for record in self._store.records():
            info = self._store.read(record)
            if info is not None:
                found.append(PlainDomain(self, record, info.uuid))
        return found

    def _handle_of(
        self,
        key: Uuid | int | DomainInfo | PlainDomain[R] | None = None,
        /,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
    ) -> PlainDomain[R] | None:
        self._usable()
        wanted = self._key(key, uuid, name, id)
        record = self._store.find(wanted)
        info = None if record is None else self._store.read(record)
        if record is None or info is None or getattr(info, wanted.kind) != wanted.value:
            return None
        return PlainDomain(self, record, info.uuid)

    def _holds_other(self, dom: PlainDomain[R] | None) -> bool:
        own = None if dom is None else dom._record
        return any(record != own for record in self._mine.holds)

    def _look(self, dom: PlainDomain[R]) -> tuple[DomainInfo | None, object]:
        self._usable()
        receipt = self._store.receipt(dom._record)
        return self._store.read(dom._record), receipt

    def _sleep(self, dom: PlainDomain[R], stamp: object, timeout: float | None = None) -> bool:
        changed = self._store.sleep(dom._record, stamp, _slice(timeout))
        self._usable()
        return changed

    def _list_stamp(self) -> object:
        self._usable()
        return self._store.stamp()

    def _sleep_on_list(self, stamp: object, timeout: float | None = None) -> bool:
        changed = self._store.sleep_on_stamp(stamp, _slice(timeout))
        self._usable()
        return changed

    def _marks(self) -> dict[R, object]:
        return {}

    def _changed(self, marks: dict[R, object]) -> list[DomainInfo]:
        self._usable()
        now = {record: self._store.receipt(record) for record in self._store.records()}
        found = [self._store.read(record) for record in now if marks.get(record) != now[record]]
        marks.clear()
        marks.update(now)
        return [info for info in found if info is not None]

    def _job_wait(self, dom: PlainDomain[R], /) -> AbstractContextManager[object]:
        return nullcontext()

    def _unfinished(self) -> list[PlainDomain[R]]:
        found = []
        for record in self._store.records():
            info = self._store.read(record)
            if info is not None and info._work is not None and info._work.step is not None:
                found.append(PlainDomain(self, record, info.uuid))
        return found

    def _empty(self) -> PlainLockedDomains[R]:
        return PlainLockedDomains()

    @property
    def _events_max(self) -> int:
        self._usable()
        return self._store.events_max

    @property
    def _event_count(self) -> int:
        self._usable()
        return self._store.event_count

    def _event(self, number: int) -> DomainEvent | None:
        self._usable()
        return self._store.event(number)

    def _sleep_on_events(self, count: int, timeout: float | None = None) -> bool:
        self._usable()
        return self._store.sleep_on_events(count, timeout)

    def _remembered(self) -> ConfigDirs | None:
        self._usable()
        return self._store.remembered()

    def _remember(self, dirs: ConfigDirs | None) -> None:
        self._need_list_lock("settings")
        self._store.remember(dirs)

    def _driver(self) -> str | None:
        self._usable()
        return self._store.driver()

    def _set_driver(self, name: str | None) -> None:
        self._need_list_lock("settings")
        self._store.set_driver(name)


def _slice(timeout: float | None) -> float:
    return SLICE if timeout is None else min(timeout, SLICE)


def _as_timeout(block: bool, timeout: float | None) -> float | None:
    return 0 if not block or (timeout is not None and timeout < 0) else timeout
