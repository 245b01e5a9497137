"""The seam between the rules and a store.

Two layers, each a `typing.Protocol`:

- `ListBase` and `DomainBase` are what the rules call: locks, finding, reading, a handle with its
  uncommitted changes. Shared memory implements them natively, for speed.
- `Store` is what a store without a native core implements: a dozen methods about records. `plain`
  implements the first layer in Python over any `Store`.

Names that begin with ``_`` are for the rules; they share a class with the public methods. Every
`timeout` is in seconds: ``None`` waits for ever, 0 tries once, a negative one is a `ValueError`.
When it has passed, `LockTimeout` names the holder.

Lock order: named locks, list, domain, the config directory's filelock. A thread that holds a domain
waits for another only while it holds the list lock, so waits for domains cannot form a cycle. Of
named locks it waits for a second one only with a time-out.

A caller may die at any instruction. Its commits stay, its uncommitted changes are gone, its locks
are free, and the next holder of the domain sees `previous_owner_died`. If what is under way in a
domain (`_work`) has a step, the store calls `steps.settle` with the domain just locked, before it
hands the domain out; an error there unlocks it without consuming the notice of a death.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict, TypeVar
from uuid import UUID

from ..config.change import ConfigDirs
from ..events import DomainEvent, EventType
from ..holder import LockHolder
from ..names import Uuid
from ..states import DomainState
from ..xml.definition import DomainDef
from .info import DomainInfo
from .work import Caller, Work

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..table import Table


class Deadline(Protocol):
    """One time-out over the several waits of one call."""

    def left(self) -> float | None:
        """What the next wait may take: its `timeout`."""
        ...


class Identity(Protocol):
    """Which domain it is, as `DomainInfo` has it."""

    @property
    def uuid(self) -> UUID: ...
    @property
    def name(self) -> str: ...


class NewDomain(NamedTuple):
    """A new domain; it is inactive."""

    uuid: UUID
    name: str
    definition: DomainDef
    persistent: bool
    state: DomainState
    work: Work | None = None


class News(NamedTuple):
    """One event of a commit, before it has a number and a time (`rules.events`)."""

    type: EventType
    detail: int
    id: int
    name: str


class Filter(NamedTuple):
    """libvirt's virDomainObjMatchFilter: AND between the fields, OR within `states`; ``None``
    matches everything."""

    active: bool | None = None
    persistent: bool | None = None
    autostart: bool | None = None
    states: frozenset[DomainState] | None = None
    host: str | None = None

    @classmethod
    def of(
        cls,
        active: bool | None = None,
        persistent: bool | None = None,
        autostart: bool | None = None,
        state: int | str | Iterable[int | str] | None = None,
        host: str | None = None,
    ) -> Filter:
        """The filter for the arguments of `list`: one state or several, as numbers or in words.

        >>> Filter.of(state="shut off").states
        frozenset({<DomainState.SHUTOFF: 5>})
        """
        if state is None:
            return cls(active, persistent, autostart, host=host)
        states = [state] if isinstance(state, (int, str)) else state
        wanted = (DomainState.parse(s) if isinstance(s, str) else DomainState(s) for s in states)
        return cls(active, persistent, autostart, frozenset(wanted), host)

    def fits(self, info: DomainInfo) -> bool:
        """Whether the filter matches the domain."""
        return (
            self.active in (None, info.is_active)
            and self.persistent in (None, info.persistent)
            and self.autostart in (None, info.autostart)
            and (self.states is None or info.state in self.states)
            and self.host in (None, info.host)
        )


# --- the first layer: what the rules call --------------------------------------------------------


class DomainBase(Protocol):
    """A handle to one domain's record.

    The lock's holder may use any handle to the domain: handles share the uncommitted changes. Reads
    under the lock see these changes; nobody else does before the commit. A commit is all or
    nothing, even if its caller dies in it. Everything but `uuid`, `is_locked`, `lock` and
    `_receipt` needs the domain's lock, else `DomainNotLocked`.

    A store validates an assigned value (`values`) before it changes anything.
    """

    __slots__ = ()

    @property
    def uuid(self) -> UUID: ...
    @property
    def name(self) -> str: ...
    @property
    def id(self) -> int: ...
    @property
    def is_active(self) -> bool: ...
    @property
    def state(self) -> DomainState:
        """Assigning sets `reason` to 0, unknown."""

    @state.setter
    def state(self, value: int, /) -> None: ...
    @property
    def reason(self) -> int: ...
    @reason.setter
    def reason(self, value: int, /) -> None: ...
    @property
    def pid(self) -> int | None: ...
    @pid.setter
    def pid(self, value: int | None, /) -> None:
        """Also keeps when this process started."""

    @property
    def process_alive(self) -> bool:
        """Whether the process that was assigned to `pid` runs, and not a later one of its number.
        False for ``None``, and for a process that did not run when it was assigned."""

    @property
    def host(self) -> str | None:
        """Where it runs; ``None`` if it does not. A store of one host's domains has that host's
        name, whether they run or not."""

    @property
    def persistent(self) -> bool: ...
    @persistent.setter
    def persistent(self, value: bool, /) -> None: ...
    @property
    def autostart(self) -> bool: ...
    @autostart.setter
    def autostart(self, value: bool, /) -> None: ...
    @property
    def definition(self) -> DomainDef:
        """Assigning: `values.checked_definition`."""

    @definition.setter
    def definition(self, value: DomainDef, /) -> None: ...
    @property
    def next_definition(self) -> DomainDef | None: ...
    @next_definition.setter
    def next_definition(self, value: DomainDef | None, /) -> None: ...
    @property
    def data(self) -> Any: ...
    @data.setter
    def data(self, value: Any, /) -> None: ...
    def add(self, field: str, by: int = 1) -> int:
        """Add to an integer of the data, as part of the transaction (`values.added`)."""
        ...

    @property
    def is_locked(self) -> bool:
        """Whether the caller holds the domain."""

    @property
    def changed(self) -> bool:
        """Whether there are uncommitted changes."""

    @property
    def previous_owner_died(self) -> LockHolder | None: ...

    def lock(self, timeout: float | None = None) -> None:
        """Lock the domain, then raise `DomainRemoved` if it is gone. `AlreadyLocked` for its
        holder; `LockOrder` for whoever would wait with another domain held, but not the list."""

    def commit(self, timeout: float | None = None) -> None:
        """Commit all changes, or on an error roll all of them back."""

    def rollback(self) -> None: ...
    def unlock(self, timeout: float | None = None) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

    def _release_unseen(self) -> None:
        """Roll back and unlock without consuming the notice of a death. Does nothing if the caller
        does not hold the domain. For the ``finally`` of a rule."""

    @property
    def _receipt(self) -> object:
        """Differs from an earlier one if and only if a commit or the removal of this record took
        effect in between. Needs no lock, but is stable only under it."""

    def _take_id(self, timeout: float | None = None, host: str | None = None) -> int:
        """Give the domain an id, and this host or else this machine, as part of the transaction.
        Ids are unique while the list lives; gaps are allowed. `ValueError` for a host that the
        store cannot have."""

    def _drop_id(self) -> None:
        """Take the domain's id and host away, as part of the transaction."""

    @property
    def _work(self) -> Work | None:
        """What is under way in the domain."""

    @_work.setter
    def _work(self, value: Work | None, /) -> None: ...
    def _commit_work(
        self,
        work: Work | None,
        timeout: float | None = None,
        events: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """Commit this as what is under way, and nothing else: the other changes go on waiting,
        whatever comes of it. `events`: those of this commit, pairs of type and detail."""

    @property
    def _intends(self) -> bool:
        """Whether the domain's holder said in this hold what it intends. A clean unlock ends that
        with its commit (`Work.without_intention`); a ``with`` block that ends with an exception
        makes this false, so that the intention stays."""

    @_intends.setter
    def _intends(self, value: bool, /) -> None: ...
    def _note(self, type: int, detail: int = 0) -> None:
        """An event that the next commit is to have, beside those of its changes."""

    def _caller(self) -> Caller:
        """Who calls. Needs no lock."""

    def _describe(self, caller: Caller) -> LockHolder:
        """Who called, and whether it lives. Needs no lock."""

    def _runs(self, caller: Caller) -> bool:
        """Whether the thread that called lives. Needs no lock."""

    @property
    def _doms(self) -> ListBase[Any]:
        """The list that the handle came from. Needs no lock."""

    @property
    def _holding(self) -> DomainBase:
        """The handle through which the caller holds the domain."""

    @property
    def _block(self) -> Any:
        """What `_lock_again` needs to know before the lock is put down."""

    def _lock_again(self, block: Any, timeout: float | None = None) -> None:
        """As `lock`; then ``with`` blocks and `_intends` are as they were, unless another holder
        changed what was intended."""

    def _wait_for_change(self, timeout: float | None = None) -> bool:
        """Release the lock, sleep until the domain has changed or the time is up, and lock it
        again. Whether it changed.

        Nothing that was committed after the release is missed. The notice of a death is not
        consumed. ``with`` blocks, and their task, are as before; so is `_intends`, unless another
        holder changed what was intended. With no time left the lock is still waited for, a slice.

        `UncommittedChanges` leaves the domain locked. Any other error leaves it unlocked:
        `DomainRemoved`, `LockTimeout` (it could not be locked again), what a signal handler raises.
        """


class MutexBase(Protocol):
    """A handle to a named lock. To its holder every other handle to the same lock stands for it."""

    @property
    def name(self) -> str: ...
    @property
    def is_locked(self) -> bool:
        """Whether the caller holds it."""

    @property
    def previous_owner_died(self) -> LockHolder | None:
        """Only for its holder, else `MutexNotLocked`."""

    def _last_death(self) -> Callable[[], LockHolder] | None:
        """What describes `previous_owner_died` later, for that may take a moment."""

    def lock(self, timeout: float | None = None) -> None:
        """`AlreadyLocked` for its holder. `LockOrder` for whoever would wait with the list or a
        domain held, or without a time-out with another named lock of the list held."""

    def try_lock(self) -> bool: ...
    def unlock(self) -> None:
        """`MutexNotLocked`, or `NotOwner` if another thread of the process holds it."""

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool: ...
    def release(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...


D = TypeVar("D", bound=DomainBase)


class LockedDomains(Protocol[D]):
    """Domains for a ``with`` block, which commits and unlocks each, or rolls each back."""

    def append(self, dom: D, /) -> None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, at: int, /) -> D: ...
    def __iter__(self) -> Iterator[D]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...


class ListBase(Protocol[D]):
    """A list of domains as the rules see it: its lock, finding, reading, and records."""

    _handle_type: type[D]
    """The class of its handles."""

    @property
    def is_locked(self) -> bool:
        """Whether the caller holds the list lock."""
        ...

    def locked(self, timeout: float | None = None) -> AbstractContextManager[object]:
        """Hold the list lock for a ``with`` block. `AlreadyLocked`; `LockOrder` for whoever holds a
        domain of this list."""
        ...

    def mutex(
        self, name: str, timeout: float | None = None, *, why: str | None = None
    ) -> MutexBase:
        """The lock with this name, the same for every party of the list; `timeout` is for its
        ``with`` block. `TooManyMutexes` if the store gives no more names."""
        ...

    def get(
        self,
        key: D | DomainInfo | Uuid | int | None = None,
        /,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
        timeout: float | None = None,
    ) -> D:
        """The domain, locked; else `DomainNotFound` (`values.not_found`). Never waits for any other
        domain. If the domain found is gone or has another key once it is locked, it searches
        again."""
        ...

    def find_by_uuid(self, uuid: Uuid, timeout: float | None = None) -> D | None:
        """The domain, locked, or ``None``. List lock held."""
        ...

    def peek(
        self,
        key: D | DomainInfo | Uuid | int | None = None,
        /,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
        timeout: float | None = 1.0,
        definitions: bool | None = None,
    ) -> DomainInfo | None:
        """The committed state, or ``None``. Takes no lock and blocks nobody. `definitions`: with
        them, without, or, where that is faster, read when they are asked for."""
        ...

    def _deadline(self, timeout: float | None) -> Deadline: ...

    def _need_list_lock(self, what: str) -> None:
        """`ListNotLocked` unless the caller holds the list lock; `what` names the call."""
        ...

    @property
    def _owner(self) -> int:
        """A number for whoever calls, a thread or a task: the same as long as it runs, and nobody
        else's in this process and its children."""
        ...

    @property
    def _this(self) -> str:
        """What errors call whoever calls: "this thread"."""
        ...

    def _need_ours(self, dom: D) -> None:
        """`WrongList` for another list's handle."""
        ...

    def _who_has(self, uuid: Uuid | None, name: str) -> Identity | None:
        """The domain that has this uuid or, if none has, this name. List lock held, so the answer
        stays true. Waits for no domain."""
        ...

    def _insert(
        self,
        uuid: Uuid,
        name: str,
        definition: bytes,
        state: DomainState,
        persistent: bool,
        timeout: float | None,
        made: list[D | None],
        work: Work | None = None,
    ) -> D:
        """Insert a new, inactive domain, committed and locked. List lock held. `definition` is
        encoded because the loader already has it so. `made` is a list of one element; the handle
        is stored there before a signal handler can raise in the caller.

        `DomainExists` if uuid or name is taken. A dead caller leaves the whole domain or nothing.
        """
        ...

    def _remove(self, dom: D, timeout: float | None = None) -> None:
        """Remove a domain that the caller has locked, and free its lock. List lock held."""
        ...

    def _rename(
        self,
        dom: D,
        name: str,
        definition: bytes,
        next_definition: bytes | None,
        timeout: float | None = None,
        work: Work | None = None,
    ) -> None:
        """Change name, definitions and what is under way in one commit. List lock and domain held;
        the name is free."""
        ...

    def _handle_of(
        self,
        key: D | DomainInfo | Uuid | int | None = None,
        /,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
    ) -> D | None:
        """An unlocked handle to the domain that has this key now, or ``None``. Takes no lock."""
        ...

    def _holds_other(self, dom: D | None) -> bool:
        """Whether the caller holds a domain of this list other than this one."""
        ...

    def _look(self, dom: D) -> tuple[DomainInfo | None, object]:
        """The committed state, ``None`` once the domain is removed, and a stamp that is not newer:
        it differs from a later one if a commit or the removal took effect in between. Takes no
        lock."""
        ...

    def _sleep(self, dom: D, stamp: Any, timeout: float | None = None) -> bool:
        """Sleep until the stamp is old, or a slice is over, or the time is; then run signal
        handlers. (A thread that runs none may sleep on.) False: nothing has changed. True: it has,
        or may have. Takes no lock. `ListClosed` if the list was closed meanwhile.

        A writer that dies between its commit and telling of it costs the sleeper a slice."""
        ...

    def _list_stamp(self) -> Any:
        """A stamp of the whole list: commits, new domains and removals from now on make it old."""
        ...

    def _sleep_on_list(self, stamp: Any, timeout: float | None = None) -> bool:
        """`_sleep` until anything has changed. False does not mean that nothing has: a writer may
        have died before it told."""
        ...

    def _marks(self) -> Any:
        """What `_changed` needs to remember, empty."""
        ...

    def _changed(self, marks: Any) -> list[DomainInfo]:
        """The committed states of the domains that changed since the last call with these marks:
        of all of them at first. Takes no lock."""
        ...

    def _job_wait(self, dom: D, /) -> AbstractContextManager[object]:
        """For a ``with`` block in which the caller waits for a job of the domain. It shows the wait
        to others, and each `_sleep` in it ends after a slice: the job's holder may have died."""
        ...

    def _unfinished(self) -> Sequence[D]:
        """Unlocked handles to the domains whose committed work has a step. Takes no lock."""
        ...

    def _handles(self) -> Sequence[D]:
        """Unlocked handles to all domains."""
        ...

    def _empty(self) -> LockedDomains[D]:
        """An empty collection, for `lock_many`."""
        ...

    def _scan(self, wanted: Filter, definitions: bool) -> Sequence[DomainInfo]:
        """The committed states of the domains that match. Takes no lock."""
        ...

    def _count(self, wanted: Filter) -> int: ...
    def _table(self, columns: tuple[str, ...], wanted: Filter) -> Table:
        """Columns of the domains that match, of those in `table.COLUMNS`. Takes no lock."""
        ...

    @property
    def _events_max(self) -> int:
        """How many of the last events are kept; 0: none, ever."""
        ...

    @property
    def _event_count(self) -> int:
        """The number of the last event; 0: none yet. Numbers have no gaps."""
        ...

    def _event(self, number: int) -> DomainEvent | None:
        """``None``: it is not kept any more, or never was. Takes no lock."""
        ...

    def _sleep_on_events(self, count: int, timeout: float | None = None) -> bool:
        """Sleep until there are more than `count` events, or for a moment; whether there are."""
        ...

    def _remembered(self) -> ConfigDirs | None:
        """The directories that `_remember` was last called with, by any process."""
        ...

    def _remember(self, dirs: ConfigDirs | None) -> None:
        """List lock held. A dead caller leaves the old directories or the new ones."""
        ...

    def _driver(self) -> str | None:
        """The name that `_set_driver` was last called with, by any process."""
        ...

    def _set_driver(self, name: str | None) -> None:
        """List lock held. A dead caller leaves the old name or the new one."""
        ...


# --- the second layer: what a store without a native core implements -----------------------------

R = TypeVar("R")


class Key(NamedTuple):
    """One of the three keys of a domain."""

    kind: str
    """``"uuid"``, ``"name"`` or ``"id"``."""
    value: UUID | str | int


class Changes(TypedDict, total=False):
    """What a commit changes: the keys that are present."""

    id: int
    host: str | None
    """Changes with `id`, never alone."""
    pid: int | None
    state: DomainState
    reason: int
    name: str
    persistent: bool
    autostart: bool
    definition: DomainDef
    next_definition: DomainDef | None
    started: int
    """When the process `pid` started, as `Store.started` has it."""
    data: bytes | None
    """MessagePack (`values.encode_data`)."""
    work: bytes | None
    """`Work.encode`."""


class Store(Protocol[R]):
    """Records and their locks. `R` identifies a record: hashable, and never reused.

    `plain` checks ownership before it calls: it never asks for a lock that the caller has, nor for
    a change without the locks that the contract names.
    """

    def lock_list(self, timeout: float | None) -> None: ...
    def unlock_list(self) -> None: ...

    def find(self, key: Key) -> R | None:
        """The record with this committed key. No lock, no wait."""
        ...

    def read(self, record: R) -> DomainInfo | None:
        """The committed state, or ``None`` once it is removed. No lock, no wait."""
        ...

    def records(self) -> Iterable[R]:
        """All records. No lock, no wait."""
        ...

    def lock(self, record: R, timeout: float | None) -> DomainInfo | None:
        """Lock, then read. For a record that is gone: ``None``, and nothing is locked."""
        ...

    def unlock(self, record: R, seen: bool) -> None:
        """`seen` false keeps the notice of a death for the next holder. Does nothing if the record
        is gone."""
        ...

    def insert(
        self, new: NewDomain, news: Sequence[News], timeout: float | None
    ) -> tuple[R, DomainInfo]:
        """List held, uuid and name free. Returns the record, committed and locked, and its
        committed state. Here and below, `news` are the events of this commit: they are there if
        and only if it happened, and in the order of commits."""
        ...

    def commit(
        self, record: R, changes: Changes, news: Sequence[News], timeout: float | None
    ) -> DomainInfo:
        """Record locked; for a new name the list is held as well. All or nothing. Returns the
        committed state in the same call, so that an error never leaves the holder in doubt."""
        ...

    def remove(self, record: R, news: Sequence[News], timeout: float | None) -> None:
        """List held, record locked. Frees the record's lock."""
        ...

    def next_id(self, timeout: float | None) -> int:
        """Unique while the list lives; gaps are allowed."""
        ...

    def receipt(self, record: R) -> object:
        """See `DomainBase._receipt`."""
        ...

    def sleep(self, record: R, receipt: object, timeout: float) -> bool:
        """Sleep until the record's receipt is not this one any more, or for so long. False: it
        still is. No lock."""
        ...

    def stamp(self) -> object:
        """Changes with each commit, insert and remove."""
        ...

    def sleep_on_stamp(self, stamp: object, timeout: float) -> bool:
        """`sleep` until the stamp is not this one any more."""
        ...

    def died(self, record: R) -> LockHolder | None:
        """Who died holding the record since it was last unlocked with `seen`. Record locked."""
        ...

    def name_mutex(self, name: str) -> None:
        """From now on there is a named lock of this name; does nothing if there was. No wait.
        `TooManyMutexes`."""
        ...

    def lock_mutex(self, name: str, timeout: float | None) -> None: ...
    def unlock_mutex(self, name: str, seen: bool) -> None:
        """`seen` as for `unlock`."""
        ...

    def mutex_died(self, name: str) -> LockHolder | None:
        """As `died`, of a named lock that the caller holds."""
        ...

    def started(self, pid: int) -> int:
        """When the process started, in clock ticks since boot; 0: there is none."""
        ...

    def runs(self, pid: int, started: int) -> bool:
        """Whether the process runs that started then."""
        ...

    @property
    def events_max(self) -> int:
        """See `ListBase._events_max`; so the next three."""
        ...

    @property
    def event_count(self) -> int: ...
    def event(self, number: int) -> DomainEvent | None: ...
    def sleep_on_events(self, count: int, timeout: float | None) -> bool: ...

    def caller(self) -> Caller: ...
    def describe(self, caller: Caller) -> LockHolder: ...
    def lives(self, caller: Caller) -> bool: ...

    def remembered(self) -> ConfigDirs | None: ...
    def remember(self, dirs: ConfigDirs | None) -> None:
        """List held."""
        ...

    def driver(self) -> str | None: ...
    def set_driver(self, name: str | None) -> None: ...
