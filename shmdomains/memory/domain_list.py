"""`DomainList`: the list of domains in shared memory, on a segment with or without a name.

`core.Segment` is the mapped segment: locks, finding, reading, records. This module combines it with
libvirt's rules, and adds creating, attaching, pickling, who is attached, `check` and `recover`.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import msgspec

from ..config import ConfigDirs
from ..deadline import Deadline
from ..errors import (
    DescriptorLost,
    SegmentCorrupt,
    SegmentExists,
    SegmentInUse,
    SegmentMismatch,
    SegmentNotFound,
    ShmDomainsError,
)
from ..events import DomainEvent, EventType, detail_of
from ..holder import this_host
from ..lazy import LazyModule
from ..rules.compare import compare
from ..rules.elect import end_elections
from ..rules.info import DomainInfo
from ..rules.many import ManyRules
from ..rules.steps import settle_all
from ..rules.store import Filter
from . import holder, mp_locks, passing, segment_file, settings
from ._core import core
from .domain import Domain
from .held import LockInfo, Statistics, as_locks, job_locks
from .invariants import (
    INVARIANTS,
    CheckReport,
    HeldLock,
    RecoverReport,
    Repair,
    listing_invariants,
    unsettled,
)

if TYPE_CHECKING:
    from multiprocessing import context as mp_context

    from .. import table as tables
    from ..config import remembered
    from ..config.remembered import Receipt, Records
    from ..table import Table
else:
    remembered = LazyModule("shmdomains.config.remembered")
    tables = LazyModule("shmdomains.table")

logger = logging.getLogger(__name__)

DomainInfo.register(core.DomainInfo)
Sequence.register(core.Infos)
Mutex = core.Mutex

DEFAULT_EVENTS = 16_384
DEFAULT_MAX_DOMAINS = 65_536
DEFAULT_MAX_DOMAINS_MULTIPROCESSING = 1_024


class AttachedProcess(msgspec.Struct, frozen=True):
    """A process that is attached to a segment; `started` in seconds since the epoch.

    >>> from shmdomains import DomainList
    >>> [process.alive for process in DomainList().info.attached]
    [True]
    """

    pid: int
    started: float | None
    alive: bool
    command: str | None


class ListInfo(msgspec.Struct, frozen=True):
    """What `DomainList.info` says; sizes in bytes, times in seconds since the epoch.

    `poisoned` says which repair failed, where, who found it and when; ``None`` if none did.

    >>> from shmdomains import DomainList
    >>> info = DomainList(max_domains=10).info
    >>> info.lock, info.domains, info.max_domains
    ('robust', 0, 10)
    """

    name: str | None
    path: str | None
    lock: str
    domains: int
    active: int
    max_domains: int
    bytes_max: int
    bytes_committed: int
    events_max: int
    heap_used: int
    heap_free: int
    created: float
    creator: AttachedProcess
    attached: list[AttachedProcess]
    config_dir: str | None
    autostart_dir: str | None
    poisoned: str | None


class LockedDomains(core.Records[Domain]):
    """Domains locked by `DomainList.lock_many`, in the order asked for. The end of the ``with``
    block unlocks them: committed, or rolled back if the block raised.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.lock_many(["web1"]) as locked:
    ...     [dom.name for dom in locked]
    ['web1']
    """

    __slots__ = ()


def _as_numbers(wanted: Filter) -> tuple[int, int, int, int]:
    """The filter as the core takes it: -1 matches everything, each state is a bit."""
    flags = (wanted.active, wanted.persistent, wanted.autostart)
    active, persistent, autostart = (-1 if flag is None else int(bool(flag)) for flag in flags)
    if wanted.states is None:
        return active, persistent, autostart, 0xFFFFFFFF
    return active, persistent, autostart, sum(1 << state for state in wanted.states)


def _is_here(wanted: Filter) -> bool:
    """Whether the filter's host is this one, the host of every domain in shared memory."""
    return wanted.host is None or wanted.host == this_host()


class DomainList(core.Segment[Domain], ManyRules[Domain]):
    """The list of domains in shared memory (virDomainObjList).

    ``DomainList()`` lives in a memfd: shared with forked children, passed by pickling to spawned
    ones and in tasks, gone with the last process. `create`, `attach` and `open` use a segment with
    a name. Loading a pickle never raises: what stands for a list that cannot be reached does, when
    it is used.

    `max_domains` is the room in the list, `max_bytes` the limit of the whole segment (default:
    about 16 KiB a domain); memory is committed only as used. `events` is how many of the last
    events are kept for `watch`, at 320 bytes each: up to 16,777,216, made a power of two; 0: none;
    default 16,384, fewer if they would take more than a quarter of `max_bytes`. `lock` is
    ``"robust"`` or ``"multiprocessing"``; for the latter, `context` is the multiprocessing context
    that makes the locks, if not the default one.

    >>> doms = DomainList(max_domains=100)
    >>> len(doms)
    0
    >>> doms.close()
    """

    _name: str | None = None
    _path: Path | None = None
    _maker: int | None = None  # the pid of the process that made it
    _handle_type = Domain
    _deadline = core.Deadline
    _empty = LockedDomains
    _invariants = tuple(INVARIANTS)

    def __init__(
        self,
        *name: NoReturn,
        max_domains: int | None = None,
        max_bytes: int | None = None,
        events: int | None = None,
        lock: Literal["robust", "multiprocessing"] = "robust",
        context: mp_context.BaseContext | None = None,
    ) -> None:
        if name:
            raise TypeError(
                f"DomainList() has no name; DomainList.open({name[0]!r}) attaches to the segment "
                "of a name, or creates it; options are keywords"
            )
        max_domains = _checked_limit(max_domains, lock)
        fd = os.memfd_create("shmdomains", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            _format(fd, lock, max_domains, max_bytes, events)
            # Truncating it would kill whoever is attached (SIGBUS).
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            self._begin(fd, *mp_locks.make(lock, max_domains, context))
        finally:
            os.close(fd)
        self._maker = os.getpid()

    def _begin(self, fd: int, list_lock: Any = None, slot_locks: Any = None) -> None:
        self._attach(fd, Domain, list_lock, slot_locks)
        passing.lists[self._identity] = self

    @classmethod
    def create(
        cls,
        name: str | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        max_domains: int | None = None,
        max_bytes: int | None = None,
        events: int | None = None,
        lock: Literal["robust", "multiprocessing"] = "robust",
        context: mp_context.BaseContext | None = None,
        mode: int = 0o600,
        group: int | str | None = None,
        timeout: float | None = segment_file.PATIENCE,
    ) -> DomainList:
        """Create a segment with a name (default ``default``) or in a file of your choice.

        `mode` 0o660 with a `group` shares it with that group. `timeout` in seconds is for the
        directory's lock, which protects its names. Raises `SegmentExists`, `SegmentRefused`,
        `LockTimeout`, `SegmentFull` (no memory for it), and `OSError` when this process has no
        descriptor left, or not the address space for the segment's largest size.
        """
        file = segment_file.path_of(name, path)
        max_domains = _checked_limit(max_domains, lock)
        doms = cls.__new__(cls)
        locks = mp_locks.make(lock, max_domains, context)
        limit = max_domains

        def fill(fd: int) -> None:
            # Attach before it has a name: a failure here leaves no name behind.
            _format(fd, lock, limit, max_bytes, events)
            doms._begin_file(fd, file, name, path, *locks)

        try:
            os.close(segment_file.create(file, mode, group, fill, timeout))
        except BaseException:
            doms.close()
            raise
        doms._maker = os.getpid()
        return doms

    @classmethod
    def attach(
        cls,
        name: str | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        timeout: float | None = segment_file.PATIENCE,
    ) -> DomainList:
        """Attach to a segment by name or file.

        `timeout` in seconds is for the file's lock, which `unlink` holds for a moment. Raises
        `LockTimeout`, `SegmentNotFound`, `SegmentRefused` (not ours, a link, wrong mode),
        `SegmentMismatch` (another layout, boot or namespace), `SegmentCorrupt`, and `OSError`
        when this process has no descriptor left, or not the address space for the segment's largest
        size. Whoever did not inherit a list with multiprocessing locks can only read it.
        """
        file = segment_file.path_of(name, path)
        doms = cls.__new__(cls)
        fd = segment_file.attach(file, timeout)
        try:
            doms._begin_file(fd, file, name, path)
        finally:
            os.close(fd)
        return doms

    @classmethod
    def open(
        cls,
        name: str | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        max_domains: int | None = None,
        max_bytes: int | None = None,
        events: int | None = None,
        lock: Literal["robust", "multiprocessing"] | None = None,
        context: mp_context.BaseContext | None = None,
        mode: int | None = None,
        group: int | str | None = None,
        timeout: float | None = segment_file.PATIENCE,
    ) -> DomainList:
        """Attach to the segment, or create it if there is none. Whoever comes first creates it (see
        `created`); nobody sees it half made.

        The options are those of `create`. One that is given and differs from the existing segment
        is a `SegmentMismatch`, except `context`, which only says how locks are made; one that is
        left out accepts any. `timeout` in seconds is for all waits together. Other errors are those
        of `attach` and `create`.
        """
        deadline = Deadline(timeout)
        asked = {"max_domains": max_domains, "max_bytes": max_bytes, "lock": lock, "mode": mode}
        asked["events"] = None if events is None else _checked_events(events, None)
        _checked_limit(max_domains, lock or "robust")
        mode = 0o600 if mode is None else mode
        segment_file.check_mode(mode)
        if group is not None:
            asked["group"] = segment_file.gid_of(group)
        while True:
            with suppress(SegmentNotFound):
                doms = cls.attach(name, path=path, timeout=deadline.left())
                try:
                    doms._need_as_asked(asked)
                except BaseException:
                    doms.close()
                    raise
                return doms
            with suppress(SegmentExists):
                return cls.create(
                    name,
                    path=path,
                    max_domains=max_domains,
                    max_bytes=max_bytes,
                    events=events,
                    lock=lock or "robust",
                    context=context,
                    mode=mode,
                    group=group,
                    timeout=deadline.left(),
                )

    def _need_as_asked(self, asked: dict[str, Any]) -> None:
        numbers, status = self._statistics(), os.fstat(self.fileno())
        limit = asked["max_bytes"]
        if limit is not None and 0 <= limit - numbers["bytes_max"] < 3 * mmap.PAGESIZE:
            limit = numbers["bytes_max"]  # heap and map are whole pages, and the heap whole cells
        there = {
            "max_domains": numbers["max_domains"],
            "max_bytes": numbers["bytes_max"],
            "events": numbers["events"],
            "lock": self._kind,
            "mode": status.st_mode & 0o7777,
            "group": status.st_gid,
        }
        differ = [
            key
            for key, value in {**asked, "max_bytes": limit}.items()
            if value not in (None, there[key])
        ]
        if differ:
            raise SegmentMismatch(
                f"segment {self._path} is there with {_options(there, differ)}, and "
                f"{_options(asked, differ)} is asked for: ask for nothing to take it as it is, or "
                "unlink it"
            )

    def _begin_file(
        self,
        fd: int,
        file: Path,
        name: str | None,
        path: str | os.PathLike[str] | None,
        list_lock: Any = None,
        slot_locks: Any = None,
    ) -> None:
        try:
            self._begin(fd, list_lock, slot_locks)
        except ShmDomainsError as exc:
            raise type(exc)(f"segment {file}: {exc}") from None
        except OSError as exc:
            # Attaching takes a descriptor, and address space for the segment's largest size.
            raise OSError(exc.errno, f"not attached: {exc.strerror}", str(file)) from None
        self._path = file
        self._name = None if path is not None else name or segment_file.DEFAULT_NAME

    @property
    def created(self) -> bool:
        """Whether this process made the list: of all that `open` it, this one loads the configs.
        If it was killed before it did, ``info.config_dir`` is ``None``.

        >>> DomainList(max_domains=10).created
        True
        """
        return self._maker == os.getpid()

    def unlink(self, force: bool = False, timeout: float | None = segment_file.PATIENCE) -> None:
        """Remove the segment's name. Attached processes keep the segment, and so does this list.

        `timeout` in seconds is for the directory's lock, which protects its names. Raises
        `LockTimeout`, `SegmentInUse` while other processes are attached, unless `force`, and
        `SegmentNotFound` if the name is gone or another segment's.
        """
        if self._path is None:
            return
        others = [one for one in self.info.attached if one.alive and one.pid != os.getpid()]
        if others and not force:
            raise SegmentInUse(
                f"segment {self._path} is in use by process "
                f"{', '.join(str(one.pid) for one in others)}; force unlinks it all the same"
            )
        try:
            fd = self.fileno()
        except DescriptorLost:
            segment_file.unlink(self._path, force, self._inode, timeout)
        else:
            segment_file.unlink_attached(self._path, fd, force, timeout)

    def fileno(self) -> int:
        """The segment's descriptor, for a process that closes all others, as one that becomes a
        daemon does: ``DaemonContext(files_preserve=[doms])``.

        Without it the list works, but `shmdomains.unlink` in other processes does not see this one,
        and the list cannot be passed to a spawned child. Raises `DescriptorLost` if it was closed;
        attaching again by name gets one back.

        >>> doms = DomainList(max_domains=10)
        >>> kept = doms.fileno()
        >>> os.close(kept)
        >>> doms.fileno()
        Traceback (most recent call last):
            ...
        shmdomains.errors.DescriptorLost: this process closed the descriptor of this segment...
        """
        return self._fd

    def close(self) -> None:
        """Detach. The list lock is released if this thread holds it; locked domains stay locked
        until they are unlocked, and elections are told to stop. From now on everything else raises
        `ListClosed`."""
        end_elections(self)
        self._stop_events()
        self._close()

    def __enter__(self) -> DomainList:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def info(self) -> ListInfo:
        """Counts, bytes, creator and who is attached. Takes no lock."""
        numbers = self._statistics()
        dirs = self._remembered()
        return ListInfo(
            name=self._name,
            path=None if self._path is None else str(self._path),
            lock=self._kind,
            domains=numbers["domains"],
            active=numbers["active"],
            max_domains=numbers["max_domains"],
            bytes_max=numbers["bytes_max"],
            events_max=numbers["events"],
            bytes_committed=self._bytes_committed(numbers["bytes_committed"]),
            heap_used=numbers["heap_used"],
            heap_free=numbers["heap_max"] - numbers["heap_used"],
            created=numbers["created"],
            creator=_process(*numbers["creator"]),
            attached=[
                process for word in numbers["attached"] if (process := _process(*word)).alive
            ],
            config_dir=None if dirs is None else str(dirs.config_dir),
            autostart_dir=None
            if dirs is None or dirs.autostart_dir is None
            else str(dirs.autostart_dir),
            poisoned=numbers["poisoned"],
        )

    def _bytes_committed(self, by_watermarks: int) -> int:
        """The kernel's count: a little more than the watermarks' if a process died growing it."""
        try:
            return os.fstat(self.fileno()).st_blocks * 512
        except DescriptorLost:
            return by_watermarks

    @listing_invariants
    def check(self, timeout: float | None = 10.0) -> CheckReport:
        """Test every invariant of the segment; nobody waits for it longer than a lock slice.

        Most of it takes no lock. Whatever looks wrong, perhaps only because writers are at work, is
        tested again under the list, id or heap lock, for 40 ms at most each time. If the list was
        loaded from a config directory, every file is read. `timeout` in seconds is for all this
        together; what could not be tested in time is in `CheckReport.unsettled`. Taking a dead
        holder's lock repairs what it protects, as always.

        >>> bool(DomainList(max_domains=10).check())
        True

        The invariants, as in `shmdomains.INVARIANTS`; if nobody repairs one, export, unlink and
        create anew:
        """
        deadline = Deadline(timeout)
        problems, counts, open, longest = self._check(timeout)
        poisoned = self._statistics()["poisoned"]
        problems = [(name, poisoned if name == "poisoned" else text) for name, text in problems]
        try:
            self._remembered()
            differ, doubtful = compare(self, deadline)
        except SegmentCorrupt as exc:
            problems.append(("settings", str(exc)))
            differ, doubtful = [], ["the directory is not known"]
        problems += [("config", text) for text in differ]
        left_open = unsettled(open) + [("config", why) for why in doubtful]
        return CheckReport(problems, counts, left_open, longest)

    def recover(self, timeout: float | None = 10.0) -> RecoverReport:
        """Take each lock once, as its next holder would, so that all repairs are done now.

        This is never necessary: whoever takes a lock repairs what its dead holder left, the files
        of a domain included that a rule was killed in the middle of changing. It is for people who
        want to see what is repaired. `timeout` in seconds is for the waits for the list, id and
        heap lock together; a domain that somebody holds is left alone. A death reported here
        is still in `Domain.previous_owner_died` for the next holder.

        Raises `SegmentPoisoned` when a repair fails or has failed before; `LockOrder` if this
        thread holds a domain; `LockKindMismatch` if this process did not inherit the
        multiprocessing locks.

        >>> doms = DomainList(max_domains=10)
        >>> doms.recover()
        RecoverReport(repairs=[], held=[], freed=0)
        """
        repairs, held, freed = self._recover(timeout)
        settled = settle_all(self, 0)
        done = [Repair(*repair) for repair in repairs]
        done += [Repair("files", name, None) for name, left in settled if left is None]
        busy = [HeldLock(*lock) for lock in held]
        busy += [HeldLock("files", name, left.holder) for name, left in settled if left is not None]
        return RecoverReport(done, busy, freed)

    def locks(self) -> list[LockInfo]:
        """Every lock of the list that is held or waited for: by whom, since when, for what, how
        many wait and for how long.

        It only reads, and takes no lock, so it also answers when everything is stuck. A lock that
        changes hands meanwhile is shown with one of its holders, or not at all. Of a damaged
        domain no job is shown.

        >>> doms = DomainList(max_domains=10)
        >>> with doms.locked(why="count them"):
        ...     [lock] = doms.locks()
        >>> lock.kind, lock.holder.operation, lock.holder.pid == os.getpid(), lock.waiting
        ('list', 'count them', True, 0)
        >>> doms.locks()
        []
        """
        return [*as_locks(self._taken()), *job_locks(self)]

    @property
    def statistics(self) -> Statistics:
        """What this process counted since it attached: acquisitions, waits, commits, deaths.

        >>> doms = DomainList(max_domains=10)
        >>> for _ in range(3):
        ...     with doms.locked():
        ...         pass
        >>> doms.statistics.acquisitions, doms.statistics.contended
        (3, 0)
        """
        return Statistics.of([self._counts()])

    def statistics_of_all(self) -> Statistics:
        """The same, added up over the living processes that are attached; of the dead nothing is
        known. Takes no lock.

        >>> DomainList(max_domains=10).statistics_of_all().processes
        1
        """
        return Statistics.of([*self._all_counts().values()])

    def _statistics_of_each(self) -> dict[int, Statistics]:
        """The same, by a number that no other process gets."""
        return {who: Statistics.of([counts]) for who, counts in self._all_counts().items()}

    @staticmethod
    def _about(info: DomainInfo, mark: bytes) -> tuple[object, int]:
        """Of what `_marked` gave: what tells that the definition is another one, and when the
        process started, in ticks."""
        return mark[:24], int.from_bytes(mark[24:32], sys.byteorder)

    # --- for the rules: thin wrappers of the core's methods ---

    def _scan(self, wanted: Filter, definitions: bool) -> Sequence[DomainInfo]:
        return self._list(*_as_numbers(wanted), definitions) if _is_here(wanted) else []

    def _table(self, columns: tuple[str, ...], wanted: Filter) -> Table:
        if not _is_here(wanted):
            return tables.of_infos(columns, [])
        return tables.of_buffers(columns, *self._columns(*_as_numbers(wanted), columns))

    def _count(self, wanted: Filter) -> int:
        return self._count_all(*_as_numbers(wanted)) if _is_here(wanted) else 0

    def _event(self, number: int) -> DomainEvent | None:
        found = self._read_event(number)
        if found is None:
            return None
        number, nanoseconds, kind, detail, uuid, name, id, who, pid = found
        type = EventType(kind)
        dead = None
        if type is EventType.HOLDER_DIED:
            dead = holder.dead_in_event(who, pid)
        return DomainEvent(
            number, nanoseconds / 1e9, type, detail_of(type, detail), uuid, name or "", id, dead
        )

    def _remembered(self) -> ConfigDirs | None:
        return self._said().dirs

    def _remember(self, dirs: ConfigDirs | None) -> None:
        with suppress(SegmentCorrupt):  # then what it said is lost, and this mends it
            self._set_settings(settings.encode(self._said()._replace(dirs=dirs)))
            return
        self._set_settings(settings.encode(settings.Settings(dirs)))

    def _records(self) -> Records:
        def receipt(uuid: bytes) -> Receipt | None:
            dom = self._handle_of(uuid=uuid)
            return None if dom is None else dom._receipt

        return remembered.Records(self._identity, receipt)

    def _said(self) -> settings.Settings:
        return settings.decode(self._settings())

    def _driver(self) -> str | None:
        return self._said().driver

    def _set_driver(self, name: str | None) -> None:
        self._set_settings(settings.encode(self._said()._replace(driver=name)))

    def __repr__(self) -> str:
        if self.closed:
            return "<DomainList closed>"
        where = "memfd" if self._path is None else str(self._path)
        return f"<DomainList {where} domains={len(self)} lock={self._kind}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return passing.reduce(self)


def _process(pid: int, start_ticks: int) -> AttachedProcess:
    alive = holder.is_running(pid, start_ticks)
    return AttachedProcess(
        pid=pid,
        started=holder.process_started(start_ticks),
        alive=alive,
        command=holder.command_of(pid) if alive else None,
    )


def _checked_limit(max_domains: int | None, lock: str) -> int:
    if lock not in ("robust", "multiprocessing"):
        raise ValueError(f"lock is 'robust' or 'multiprocessing', not {lock!r}")
    if max_domains is None:
        robust = lock == "robust"
        return DEFAULT_MAX_DOMAINS if robust else DEFAULT_MAX_DOMAINS_MULTIPROCESSING
    if not 1 <= max_domains <= core.MAX_DOMAINS:
        raise ValueError(f"max_domains is 1 to {core.MAX_DOMAINS}, not {max_domains}")
    return max_domains


def _checked_events(events: int | None, max_bytes: int | None) -> int:
    """How many events are kept: 0, or a power of two."""
    if events is None:
        events = DEFAULT_EVENTS
        if max_bytes is not None:
            events = min(events, max_bytes // 4 // core.EVENT_BYTES)
            events = 1 << events.bit_length() - 1 if events >= core.MIN_EVENTS else 0
    if not 0 <= events <= core.MAX_EVENTS:
        raise ValueError(f"events is 0 (none) to {core.MAX_EVENTS}, not {events}")
    return 0 if events == 0 else max(core.MIN_EVENTS, 1 << (events - 1).bit_length())


def _options(values: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(
        f"{key}={values[key]:#o}" if key == "mode" else f"{key}={values[key]!r}" for key in keys
    )


_said: set[str] = set()


def _format(
    fd: int, lock: str, max_domains: int, max_bytes: int | None, events: int | None
) -> None:
    core.format_segment(fd, lock, max_domains, max_bytes, _checked_events(events, max_bytes))
    if "deaths" not in _said and not core.deaths_are_told():
        _said.add("deaths")
        logger.warning(
            "this kernel does not know robust futexes (get_robust_list: not implemented); whose "
            "holder died is found out by looking, so that a wait may take 50 ms longer"
        )


def unlink(
    name: str | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    force: bool = False,
    timeout: float | None = segment_file.PATIENCE,
) -> None:
    """Remove a segment's name. Raises `SegmentNotFound`, `SegmentInUse` unless `force`, and
    `LockTimeout` if the lock of its directory was not free within `timeout` seconds.

    >>> import os
    >>> from shmdomains import DomainList
    >>> doms = DomainList.create(f"example-{os.getpid()}")
    >>> doms.close()
    >>> unlink(f"example-{os.getpid()}")
    """
    segment_file.unlink(segment_file.path_of(name, path), force, timeout=timeout)
