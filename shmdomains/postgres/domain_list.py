"""`PostgresDomainList`: the list of domains for more than one host, in a PostgreSQL database.

The rules are those of every list; `rules.plain` has them over a `Store`. What is here makes fewer
round trips of them (find, lock and read in one; commit and unlock in one), sleeps by what the
listener hears, and adds what belongs to this store: opening, hosts, tokens, who is attached.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID
from weakref import WeakValueDictionary, finalize, ref

import psycopg

from ..deadline import Deadline
from ..errors import (
    LockLost,
    SegmentExists,
    SegmentInUse,
    SegmentNotFound,
    SegmentRefused,
    Unavailable,
)
from ..events import DomainEvent
from ..job import Job
from ..lazy import LazyModule
from ..memory._core import core
from ..memory.callbacks import look_for_gevent
from ..memory.domain_list import AttachedProcess, ListInfo
from ..memory.held import LockInfo, Statistics, job_lock
from ..memory.invariants import CheckReport, HeldLock, RecoverReport, Repair
from ..names import Uuid
from ..rules.compare import compare
from ..rules.elect import Election
from ..rules.events import news_of_change
from ..rules.info import DomainInfo, jobs_of
from ..rules.plain import PlainDomain, PlainDomainList, _Hold
from ..rules.steps import settle_all
from ..rules.store import Filter, Identity, Key
from . import counts, invariants, schema, session
from .beginning import enter, sweep
from .domain import PostgresDomain, Stamp
from .elect import Candidate, leading
from .jobs import PostgresJob
from .mutex import PostgresMutex
from .pool import Pool, State, check_server
from .store import PostgresStore
from .url import Address, parse, this_host, without_password

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..memory import asking
else:
    asking = LazyModule("shmdomains.memory.asking")

_NO_NEWS = {"data", "work"}
"""Fields whose change is no event."""
_EMPTY = State()
_checked: set[tuple[str, int]] = set()
"""The servers that this process found to be what they say."""


class Held:
    """What owners of this process hold, of one kind, in place of what `plain` notes beside the
    locks: a session that was lost takes its locks along, and the note would stay."""

    def __init__(self, pool: Pool, kind: str) -> None:
        self._pool, self._kind = pool, kind

    def __contains__(self, key: object) -> bool:
        return any(key in getattr(state, self._kind) for state in list(self._pool.states.values()))

    def __setitem__(self, key: object, thread: int) -> None:
        """The owner's state has it."""

    def pop(self, key: object, default: object = None) -> object:
        """The owner's state has it no more."""
        return default


class PostgresDomainList(PlainDomainList[int]):
    """The list of domains in a PostgreSQL database (virDomainObjList), for any number of hosts.

    Made by `open`, `attach` or `create` with a URL:
    ``postgresql://user@host/database?list=default``. Its methods are those of
    `shmdomains.DomainList`, and so are its rules. Beyond them it raises `Unavailable` (the server
    cannot be reached), `LockLost` (the session ended while it held a lock: nothing of what was not
    committed is applied) and `InDoubt` (the server went away and did not come back in time, with
    the answer to a commit).

    `host` is the name of this host, for whoever drives guests; default ``$SHMDOMAINS_HOST``, else
    the machine's name. A list may be passed to a forked or spawned child: it makes connections of
    its own.
    """

    _handle_type: Any = PostgresDomain
    _invariants = ("I1 identity", "I3 fields", "locks", "config")
    _store: PostgresStore

    def __init__(self, address: Address, conninfo: str, host: str, list_number: int, events: int):
        self._pool = Pool(address, conninfo, host, list_number)
        super().__init__(PostgresStore(self._pool, events))
        self._held_by: Any = Held(self._pool, "holds")
        self._mutex_held_by: Any = Held(self._pool, "mutexes")
        self.host = host
        finalize(self, self._pool.close).atexit = False  # a list that is dropped, too
        self._pid = os.getpid()
        self._maker: int | None = None

    # --- opening ---

    @classmethod
    def open(
        cls,
        url: str,
        *,
        host: str | None = None,
        lease: float | None = None,
        read: str | None = None,
        events: int | None = None,
        timeout: float | None = None,
    ) -> Self:
        """The list of a URL; it is made if there is none, and so is the schema. `lease`, in
        seconds: after it a host that is stopped or cut off has lost its locks. `read`: where reads
        without a lock go, ``"primary"`` or ``"standby"``. `events`: how many are kept. `timeout`:
        seconds for which a server that is away is waited for; ``None``: it is tried once.

        Raises `Unavailable`, `SegmentRefused` (no rights, or no real PostgreSQL >= 14),
        `SegmentMismatch` (a newer schema), `ValueError`.
        """
        return cls._begin(url, host, lease, read, events, timeout, may_make=True)

    @classmethod
    def attach(
        cls,
        url: str,
        *,
        host: str | None = None,
        lease: float | None = None,
        read: str | None = None,
        timeout: float | None = None,
    ) -> Self:
        """The list of a URL. Raises `SegmentNotFound` if there is none, and what `open` raises."""
        return cls._begin(url, host, lease, read, None, timeout, may_make=False)

    @classmethod
    def create(
        cls,
        url: str,
        *,
        host: str | None = None,
        lease: float | None = None,
        read: str | None = None,
        events: int | None = None,
        timeout: float | None = None,
    ) -> Self:
        """A new list. Raises `SegmentExists` if there is one, and what `open` raises."""
        doms = cls._begin(url, host, lease, read, events, timeout, may_make=True)
        if not doms.created:
            doms.close()
            raise SegmentExists(f"{doms._pool.address.shown} exists already")
        return doms

    @classmethod
    def _begin(
        cls,
        url: str,
        host: str | None,
        lease: float | None,
        read: str | None,
        events: int | None,
        timeout: float | None,
        may_make: bool,
    ) -> Self:
        look_for_gevent()
        address, name = parse(url, lease, read), this_host(host)
        deadline = Deadline(timeout or 0)
        while True:
            try:
                return cls._begin_once(address, name, events, may_make)
            except Unavailable:
                if not deadline.left():
                    raise
            time.sleep(0.05)

    @classmethod
    def _begin_once(cls, address: Address, name: str, events: int | None, may_make: bool) -> Self:
        conninfo = address.conninfo
        if address.embedded is not None:
            from . import embedded

            conninfo = embedded.server(address.embedded)
        conn = session.connect(conninfo, address.lease, address.shown, "shmdomains")
        try:
            if (conninfo, os.getpid()) not in _checked:
                with session.connect(conninfo, address.lease, address.shown, "shmdomains") as other:
                    check_server(conn, other, address.shown)
                _checked.add((conninfo, os.getpid()))
            if may_make or schema.version_of(conn):
                schema.ensure(conn, address.shown)
            number, kept, made = enter(conn, address, name, events, may_make)
            doms = cls(address, conninfo, name, number, kept)
            sweep(conn, number)
            doms._pool.begin_with(conn)
        except psycopg.OperationalError as exc:
            conn.close()
            why = without_password(str(exc))
            raise Unavailable(f"{address.shown} went away: {why}") from None
        except BaseException:
            conn.close()
            raise
        doms._maker = os.getpid() if made else None
        known = _lists.get((address.url, name))
        if known is None or known.closed:
            _lists[address.url, name] = doms
        return doms

    @property
    def created(self) -> bool:
        """Whether this process made the list: of all that `open` it, this one loads the configs."""
        return self._maker == os.getpid()

    def unlink(self, force: bool = False, timeout: float | None = 10.0) -> None:
        """Remove the list and all that is in it. Raises `SegmentInUse` while other processes are
        attached, unless `force`, and `SegmentNotFound` if it is gone."""
        deadline = Deadline(1.0 if timeout is None else min(timeout, 1.0))
        while (others := self._others()) and not force and deadline.left():
            time.sleep(0.02)  # the server may be about to see the end of one
        if others and not force:
            raise SegmentInUse(
                f"{self._pool.address.shown} is in use by process "
                f"{', '.join(str(one.pid) for one in others)}; force removes it all the same"
            )
        with self._pool.connect() as conn:
            try:
                with conn.transaction():
                    found = conn.execute("DELETE FROM lists WHERE list = %s", [self._pool.list])
                    conn.execute("DELETE FROM events WHERE list = %s", [self._pool.list])
            except psycopg.errors.InsufficientPrivilege as exc:
                why = exc.diag.message_primary
                raise SegmentRefused(f"{self._pool.address.shown}: {why}") from None
            if not found.rowcount:
                raise SegmentNotFound(f"{self._pool.address.shown} is gone")

    def _others(self) -> list[AttachedProcess]:
        return [one for one in self.info.attached if one.pid != os.getpid()]

    def close(self) -> None:
        """Close the list; from now on everything else raises `ListClosed`. Locked domains stay
        locked until they are unlocked."""
        if self.closed:
            return
        super().close()
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _usable(self) -> None:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            look_for_gevent()
        super()._usable()

    # --- owners ---

    @property
    def _mine(self) -> Any:
        return self._pool.states.get(core.owner()) or _EMPTY

    @_mine.setter
    def _mine(self, value: object) -> None:
        """`plain` keeps what a thread holds; here the owner's state does."""

    @property
    def _list_held_by(self) -> Any:
        """Not None if an owner of this process has the list lock; see `Held`."""
        return True if any(one.list_held for one in list(self._pool.states.values())) else None

    @_list_held_by.setter
    def _list_held_by(self, value: object) -> None:
        """The owner's state has it."""

    @property
    def _owner(self) -> int:
        return core.owner()

    @property
    def _this(self) -> str:
        return core.owner_words()

    def _this_host(self) -> str:
        return self.host

    def _need_living(self) -> None:
        """Raise `LockLost` if the session of the caller's locks has ended."""
        state = self._pool.mine()
        if state is not None and state.session is not None and state.session.gone is not None:
            why = state.session.gone
            self._lose(state)
            raise self._store.lost(why)

    def _lose(self, state: State) -> None:
        self._pool.drop(state)

    def lock(self, timeout: float | None = None) -> None:
        """Take the list lock; see `ListBase.locked`."""
        self._need_living()
        try:
            super().lock(timeout)
            self._mine.asks = False
        except BaseException:
            self._store.put_back()
            raise

    def unlock(self) -> None:
        """Release the list lock. Raises `ListNotLocked`, `NotOwner`, or `LockLost`."""
        state = self._mine
        try:
            super().unlock()
        finally:
            if state is not _EMPTY:
                state.list_held = False
                self._pool.rest(state)

    @contextmanager
    def _list_held(self, timeout: float | None) -> Iterator[None]:
        """Hold the list lock for a rule, unless the caller does. What the rule did under it went
        through the session that held it, so the end of that session takes none of it back. What
        else was held through it is found lost at its next use."""
        if self.is_locked:
            yield
            return
        self.lock(timeout)
        state = self._mine
        try:
            yield
        finally:
            if self.is_locked:
                with suppress(LockLost):
                    self.unlock()
                if not state.is_empty:
                    self._pool.keep(state)

    def mutex(
        self, name: str, timeout: float | None = None, *, why: str | None = None
    ) -> PostgresMutex:
        """A named lock, not yet locked; see `ListBase.mutex`."""
        return PostgresMutex(self, name, timeout)

    def job(
        self,
        key: Any,
        operation: str,
        kind: Job = Job.MODIFY,
        timeout: float | None = None,
        *,
        allow: Iterable[Job] | None = None,
        why: str | None = None,
    ) -> PostgresJob:
        """A job, for a ``with`` block; see `shmdomains.DomainList.job`."""
        allow = None if allow is None else list(allow)
        found = super().job(key, operation, kind, timeout, allow=allow, why=why)
        return PostgresJob(found._dom, operation, kind, timeout, allow, why)

    def elect(
        self,
        name: str,
        run: Callable[[threading.Event], object],
        *,
        retry_after: float = 1.0,
    ) -> Election:
        """Have ``run(stop)`` run in one worker of all hosts; see `shmdomains.DomainList.elect`.

        `stop` is also set when the lock is lost: the server went away, or this host was cut off
        for a lease. Then another worker may lead already; when `run` has returned, this one takes
        part again. `Election.stop` and the end of the election are noticed within 0.1 s.
        """
        return Election(self, Candidate(self, name, None), leading(self, run), retry_after)

    # --- domains: fewer round trips than `plain` makes ---

    def _find(self, key: Key, deadline: Deadline) -> PlainDomain[int] | None:
        self._need_living()
        state = self._mine
        timeout = deadline.left()
        if self._has_locked(state, key) or (state.holds and not state.list_held and timeout != 0):
            # `plain` says what is wrong, or finds that another domain has the key now.
            return super()._find(key, deadline)
        try:
            info = self._store.lock_by(key, timeout)
            if info is None:
                return None
            dom = self._handle(info._record, self._hold(info._record, info))
        except BaseException:
            self._store.put_back()
            raise
        self._settle(dom, deadline)
        return dom

    @staticmethod
    def _has_locked(state: State, key: Key) -> bool:
        return any(getattr(hold.info, key.kind) == key.value for hold in state.holds.values())

    def _handle(self, record: int, hold: _Hold[int]) -> PlainDomain[int]:
        dom = PostgresDomain(self, record, hold.info.uuid)
        dom._locker = hold
        hold.handle = ref(dom)
        return dom

    def _hold(self, record: int, info: DomainInfo) -> _Hold[int]:
        hold = super()._hold(record, info)
        self._mine.asks = False
        return hold

    def _take(self, record: int, timeout: float | None) -> _Hold[int] | None:
        self._need_living()
        try:
            return super()._take(record, timeout)
        except BaseException:
            self._store.put_back()
            raise

    def _give_back(self, hold: _Hold[int], seen: bool) -> None:
        state = self._mine
        session = state.session
        if session is not None and session.asks:  # a handle is dropped in the midst of a call
            session.later.append(lambda: self._give_back(hold, seen))
            return
        try:
            if session is not None and not session.is_there() and seen:
                why = session.gone
                self._lose(state)
                raise self._store.lost(why)
            self._store.unlock(hold.record, seen)
        except LockLost:
            if seen:
                raise
        finally:
            self._let_go(hold, state)

    def _let_go(self, hold: _Hold[int], state: Any = None) -> None:
        state = state or self._mine
        state.holds.pop(hold.record, None)
        if state is not _EMPTY:
            self._pool.rest(state)

    def _commit(self, hold: _Hold[int], timeout: float | None, unlock: bool = False) -> None:
        changes, noted = hold.changes, hold.noted
        hold.drop()
        if not changes and not noted:
            return
        news = list(noted)
        if not changes.keys() <= _NO_NEWS:
            news += news_of_change(hold.info, changes)
        hold.info = self._store.commit_and(hold.record, changes, news, timeout, unlock)

    def _remove(self, dom: PlainDomain[int], timeout: float | None = None) -> None:
        state = self._mine
        super()._remove(dom, timeout)
        if state is not _EMPTY:
            self._pool.rest(state)

    @property
    def read(self) -> str:
        """Where reads without a lock go: ``"primary"``, or ``"standby"``, whose answers may be
        old (see `behind`)."""
        return self._pool.address.read

    # --- reading ---

    def peek(
        self,
        key: Any = None,
        /,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
        timeout: float | None = 1.0,
        definitions: bool | None = None,
    ) -> DomainInfo | None:
        """The committed state of one domain, or None. Takes no lock. `definitions=False` leaves
        definitions and data out."""
        Deadline(timeout)
        self._usable()
        info = self._store.glance(self._key(key, uuid, name, id))
        return info._without_blobs() if info is not None and definitions is False else info

    def _scan(self, wanted: Filter, definitions: bool) -> list[DomainInfo]:
        self._usable()
        return list(self._store.scan(wanted, definitions))

    def _marked(self) -> tuple[list[DomainInfo], list[bytes], int]:
        """Infos without definitions, a mark of each, which is its row, and how many domains are
        damaged: the server would not give such."""
        self._usable()
        infos = self._store.scan(Filter(), False)
        return list(infos), [info._packed for info in infos], 0

    @staticmethod
    def _about(info: Any, mark: bytes) -> tuple[object, int]:
        """Of what `_marked` gave: what tells that the definition is another one, and when the
        process started, in ticks."""
        return (info._record, info._defined), info._started

    def _count(self, wanted: Filter) -> int:
        self._usable()
        return self._store.count(wanted)

    def _who_has(self, uuid: Uuid | None, name: str) -> Identity | None:
        self._usable()
        found = UUID(bytes=uuid) if isinstance(uuid, bytes) else uuid
        return self._store.identity(found, name)

    def _handles(self) -> list[PlainDomain[int]]:
        self._usable()
        found = self._store.handles()
        return [PostgresDomain(self, record, UUID(bytes=uuid)) for record, uuid in found]

    def _handle_of(self, *args: Any, **kwargs: Any) -> PlainDomain[int] | None:
        self._usable()
        key = args[0] if args else None
        keys = {one: kwargs.get(one) for one in ("uuid", "name", "id")}
        info = self._store.peek(self._key(key, **keys))
        return None if info is None else PostgresDomain(self, info._record, info.uuid)

    def _unfinished(self) -> list[PlainDomain[int]]:
        self._usable()
        found = [info for info in self._store.with_work() if info._work is not None]
        return [
            PostgresDomain(self, info._record, info.uuid)
            for info in found
            if info._work is not None and info._work.step is not None
        ]

    # --- sleeping ---

    def _look(self, dom: PlainDomain[int]) -> tuple[DomainInfo | None, object]:
        self._usable()
        changes = self._pool.listener.listen()
        info = self._store.read(dom._record)
        stamp = Stamp(0 if info is None else info._version)
        stamp.changes = changes
        return info, stamp

    def _sleep(self, dom: PlainDomain[int], stamp: Any, timeout: float | None = None) -> bool:
        self._usable()
        listener = self._pool.listener
        if stamp.changes is None:
            stamp.changes = listener.listen()
            if (self._store.receipt(dom._record) or 0) != stamp:
                return True
        told = listener.sleep(stamp.changes, dom._record, _slice(timeout))
        self._still_wanted()
        return told

    def _still_wanted(self) -> None:
        """After each slice of a sleep."""
        self._usable()
        if core.is_given_up():
            raise core.WorkGivenUp

    def _list_stamp(self) -> object:
        self._usable()
        return self._pool.listener.listen()

    def _sleep_on_list(self, stamp: Any, timeout: float | None = None) -> bool:
        told = self._pool.listener.sleep(stamp, None, _slice(timeout))
        self._still_wanted()
        return told

    def _marks(self) -> Any:
        return {}

    def _changed(self, marks: Any) -> list[DomainInfo]:
        self._usable()
        listener = self._pool.listener
        now = listener.listen()
        versions: dict[int, int] = marks.setdefault("versions", {})
        told = listener.since(marks["changes"]) if "changes" in marks else None
        if told is None:
            infos = self._store.scan(Filter(), True)
        else:
            infos = self._store.some(told) if told else []
        marks["changes"] = now
        found: list[DomainInfo] = []
        for info in infos:
            if versions.get(info._record) != info._version:
                versions[info._record] = info._version
                found.append(info)
        return found

    def _sleep_on_events(self, count: int, timeout: float | None = None) -> bool:
        self._usable()
        told = self._store.sleep_on_events(count, timeout)
        self._still_wanted()
        return told

    def _event(self, number: int) -> DomainEvent | None:
        self._usable()
        return self._store.event(number)

    # --- about the list ---

    @property
    def info(self) -> ListInfo:
        """Counts, and who is attached, on all hosts. Takes no lock."""
        self._usable()
        return invariants.list_info(self._pool, self._store, self._remembered())

    @property
    def behind(self) -> float:
        """Seconds by which what is read now (`peek`, `list`, iteration) may be old; 0 unless reads
        go to a standby (``read="standby"``). It is the age of the last commit that the standby has,
        by the clocks of the two servers, so it also grows while nobody commits."""
        self._usable()
        return self._store.behind()

    def locks(self) -> list[LockInfo]:
        """Every lock of the list that is held or waited for, and by whom, on all hosts. Takes no
        lock."""
        self._usable()
        found = self._store.holders.locks()
        for info in self._store.with_work():
            for job in jobs_of(info._work, info._describe):
                found.append(job_lock(info, job))
        return found

    @property
    def statistics(self) -> Statistics:
        """What this process counted since it opened the list, or since the server lost its row:
        acquisitions, waits, commits, deaths. A wait is from the request to the answer, the
        network's time with it."""
        return counts.statistics([self._pool.counts.numbers])

    def statistics_of_all(self) -> Statistics:
        """The same, added up over the living processes of all hosts: of the others what they told
        the server last, up to a third of a lease ago. Takes no lock."""
        self._usable()
        return counts.statistics([*counts.all_counts(self._pool).values()])

    def _statistics_of_each(self) -> dict[int, Statistics]:
        """The same, by the number that the server gave each process."""
        self._usable()
        return {who: counts.statistics([one]) for who, one in counts.all_counts(self._pool).items()}

    def check(self, timeout: float | None = 10.0) -> CheckReport:
        """Test what the database cannot enforce by itself: every domain has its definition, of its
        own name and UUID, and its lock's row; and this host's config directory says the same. What
        PostgreSQL guards (uniqueness, references) is not tested again."""
        deadline = Deadline(timeout)
        problems, counts = invariants.check(self._pool)
        differ, doubtful = compare(self, deadline)
        problems += [("config", text) for text in differ]
        return CheckReport(problems, counts, [("config", why) for why in doubtful])

    def recover(self, timeout: float | None = 10.0) -> RecoverReport:
        """Finish what rules that were killed had begun with files of this host. Locks need none of
        it: a dead holder's are free as soon as the server sees his connection end."""
        self._usable()
        settled = settle_all(self, 0)
        done = [Repair("files", name, None) for name, left in settled if left is None]
        busy = [HeldLock("files", name, left.holder) for name, left in settled if left is not None]
        self._pool.counts.repaired(len(done))
        return RecoverReport(done, busy, 0)

    def __repr__(self) -> str:
        return f"<PostgresDomainList {self._pool.address.shown}{' closed' * self.closed}>"

    def __reduce__(self) -> tuple[Any, ...]:
        address = self._pool.address
        return _opened, (address.url, self.host, address.lease, address.read)


def _slice(timeout: float | None) -> float:
    return 0.1 if timeout is None else min(timeout, 0.1)


_lists: WeakValueDictionary[tuple[str, str], PostgresDomainList] = WeakValueDictionary()


def _opened(url: str, host: str, lease: float, read: str) -> PostgresDomainList:
    """The list of a pickle: the same one for all handles of a process."""
    known = _lists.get((url, host))
    if known is not None and not known.closed:
        return known
    # Whoever begins a worker cannot tell it to try again.
    return PostgresDomainList.attach(url, host=host, lease=lease, read=read, timeout=lease)
