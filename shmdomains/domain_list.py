"""The list of domains: find, assign, remove, list - libvirt's rules over a store of records.

`DomainListRules` are the rules of the patch "Locking on virDomainObjPtr objects" and of what
libvirt learnt after it: who must hold which lock, duplicates, live against next definition,
persistence, config directories. They call a store - lock and unlock the list, find, create, commit,
remove, scan - and know nothing of where records live. `DomainList` puts them on the shared-memory
segment.

Lock order: list, domain, the config directory's filelock. A second domain is waited for only while
the list lock is held, so waits for domains can not form a cycle.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import uuid as uuid_module
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing import context as mp_context
from multiprocessing import reduction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

import msgspec

from . import config, holder, segment_file
from ._core import core
from .config import ConfigDirs, LoadReport
from .definition import DomainDef, EncodedDef
from .domain import Domain
from .errors import (
    AlreadyLocked,
    DescriptorLost,
    DomainActive,
    DomainExists,
    DomainLocked,
    DomainNotFound,
    DomainRemoved,
    DomainTransient,
    InvalidName,
    SegmentCorrupt,
    SegmentExists,
    SegmentFull,
    SegmentInUse,
    SegmentMismatch,
    SegmentNotFound,
    ShmDomainsError,
    UncommittedChanges,
)
from .invariants import CheckReport, HeldLock, RecoverReport, Repair, unsettled
from .names import check_name, parse_uuid
from .packing import pack
from .states import DomainState

if TYPE_CHECKING:
    from collections.abc import Callable

    Uuid = str | bytes | uuid_module.UUID
    _Store = core.Segment  # what the rules ask of a store, whichever it is
else:
    _Store = object

DomainInfo = core.Info
Deadline = core.Deadline

DEFAULT_MAX_DOMAINS = 65_536
DEFAULT_MAX_DOMAINS_MULTIPROCESSING = 1_024


class AttachedProcess(msgspec.Struct, frozen=True):
    """A process that is attached to a segment; `started` in seconds since the epoch."""

    pid: int
    started: float | None
    alive: bool
    command: str | None


class ListInfo(msgspec.Struct, frozen=True):
    """What `DomainList.info` says; sizes in bytes, times in seconds since the epoch.

    `poisoned` says which repair failed, where, and who found it when; ``None``: none did.
    """

    name: str | None
    path: str | None
    lock: str
    domains: int
    active: int
    max_domains: int
    bytes_max: int
    bytes_committed: int
    heap_used: int
    heap_free: int
    created: float
    creator: AttachedProcess
    attached: list[AttachedProcess]
    config_dir: str | None
    autostart_dir: str | None
    poisoned: str | None


class LockedDomains(core.Records):
    """Domains locked by `DomainList.lock_many`, in the order asked for; unlocks them at the end of
    a ``with`` block: committed, or rolled back if the block raised."""

    __slots__ = ()


class _Commit:
    """The commit of one record that a change of files belongs to; see `config.Commit`.

    A new record was committed as it was made: it counts once all of `make` is done.
    """

    def __init__(self, dom: Domain, make: Callable[[], object]) -> None:
        self._dom = dom
        self._make = make
        self._before = dom._stamp
        self._made = False

    def __call__(self) -> None:
        self._make()
        self._made = True

    def happened(self) -> bool:
        return self._made or self._dom._stamp != self._before


def _as_definition(definition: DomainDef | str | bytes) -> DomainDef:
    return definition if isinstance(definition, DomainDef) else DomainDef.from_xml(definition)


def _tri(value: bool | None) -> int:
    return -1 if value is None else int(bool(value))


def _state_mask(state: int | Iterable[int] | None) -> int:
    if state is None:
        return 0xFFFFFFFF
    states = [state] if isinstance(state, int) else list(state)
    return sum({1 << DomainState(one) for one in states})


def _encode_dirs(dirs: ConfigDirs) -> bytes:
    paths = (dirs.config_dir, dirs.autostart_dir)
    blob = pack([None if path is None else os.fsencode(path) for path in paths])
    # A flipped bit would be another path, and files would be made there.
    return zlib.crc32(blob).to_bytes(4, "big") + blob


def _decode_dirs(blob: bytes) -> ConfigDirs:
    if zlib.crc32(blob[4:]).to_bytes(4, "big") != blob[:4]:
        raise SegmentCorrupt("the config directory that the segment remembers is damaged")
    try:
        paths = msgspec.msgpack.decode(blob[4:], type=tuple[bytes, bytes | None])
    except msgspec.MsgspecError as exc:
        raise SegmentCorrupt(f"the segment remembers no config directory: {exc}") from None
    config_dir, autostart_dir = paths
    return ConfigDirs(
        Path(os.fsdecode(config_dir)),
        None if autostart_dir is None else Path(os.fsdecode(autostart_dir)),
    )


class DomainListRules(_Store):
    """The rules, over whatever store the class is combined with."""

    # --- locks ---

    def _list_held(self, timeout: float | None) -> AbstractContextManager[object]:
        """Hold the list lock, unless this thread does already."""
        return nullcontext() if self.is_locked else self.locked(timeout)

    def lock_many(
        self, domains: Iterable[Domain | core.Info | Uuid], timeout: float | None = None
    ) -> LockedDomains:
        """Lock several domains at once; the list lock is held while they are collected.

        `domains`: handles, `DomainInfo`s or UUIDs. All or nothing: on an error (`LockTimeout`,
        `DomainNotFound`, `DomainRemoved`, `TooManyLocks`, `WrongList`) what was locked is unlocked
        again.

        >>> from shmdomains import DomainList
        >>> with DomainList().lock_many([]) as locked:
        ...     len(locked)
        0
        """
        deadline = Deadline(timeout)
        wanted = list(domains)
        taken = LockedDomains()
        try:
            with self._list_held(deadline.left()):
                for one in wanted:
                    self._lock_one(one, taken, deadline)
        except BaseException:
            at = len(taken)
            while at:  # as at the end of the block: this allocates nothing
                at -= 1
                taken[at]._pass_on()
            raise
        return taken

    def _lock_one(
        self, one: Domain | core.Info | Uuid, taken: LockedDomains, deadline: Deadline
    ) -> None:
        if isinstance(one, Domain):
            self._need_ours(one)
            if one.is_locked:
                raise AlreadyLocked(f"domain {one.uuid} is asked for twice, or locked already")
            taken.append(one)
            one.lock(deadline.left())
            return
        uuid = one.uuid if isinstance(one, core.Info) else one
        dom = self.find_by_uuid(uuid, deadline.left())
        if dom is None:
            raise DomainNotFound(f"no domain with matching uuid '{parse_uuid(uuid)}'")
        try:
            taken.append(dom)
        except MemoryError:
            dom._pass_on()
            raise

    # --- assign, remove, rename: the list lock is the caller's ---

    def assign_def(
        self,
        definition: DomainDef | EncodedDef,
        persistent: bool | None = None,
        timeout: float | None = None,
    ) -> Domain:
        """Enter a definition; returns its domain, locked (virDomainAssignDef). List lock held.

        A new domain is committed before it is returned, state SHUTOFF, with `persistent` as given
        (default: no); without a UUID in the definition it gets a random one. Of a domain with this
        name and UUID, an inactive one has its definition replaced and an active one its
        `next_definition`; that, and `persistent` unless ``None``, belongs to the transaction.

        Raises `DomainExists` (same name with another UUID, or same UUID with another name),
        `ListNotLocked`, `LockTimeout`, `AlreadyLocked`, `SegmentFull`.

        >>> from shmdomains import DomainDef, DomainList
        >>> doms = DomainList()
        >>> web1 = DomainDef.from_xml("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                           "<os><type>hvm</type></os></domain>")
        >>> with doms.locked():
        ...     dom = doms.assign_def(web1, persistent=True)
        >>> with dom:
        ...     dom.name, dom.persistent, dom.definition.memory
        ('web1', True, 1024)
        """
        self._need_list_lock("assign_def")
        known = self._known(definition)
        if known is None:
            return self._make(definition, bool(persistent), timeout)
        if isinstance(definition, EncodedDef):
            definition = definition.decoded()
        if definition.uuid is None:
            definition = definition.replace(uuid=known.uuid)
        dom = self.find_by_uuid(known.uuid, timeout)
        if dom is None:  # removing needs the list lock, which is ours
            raise SegmentCorrupt(f"domain '{known.name}' is there and can not be found by its uuid")
        try:
            if dom.is_active:
                dom.next_definition = definition
            else:
                dom.definition = definition
            if persistent is not None:
                dom.persistent = persistent
        except BaseException:
            dom._pass_on()
            raise
        return dom

    def _make(
        self, definition: DomainDef | EncodedDef, persistent: bool, timeout: float | None
    ) -> Domain:
        uuid = definition.uuid
        if uuid is None:
            uuid = uuid_module.uuid4()
            if isinstance(definition, EncodedDef):
                definition = definition.decoded()
            definition = definition.replace(uuid=uuid)
        blob = definition.encode()
        try:
            return self._create(uuid, definition.name, blob, persistent, timeout)
        except DomainExists:
            raise  # it is not ours to take back
        except BaseException:
            self._take_back_made(uuid)
            raise

    def _known(self, definition: DomainDef | EncodedDef) -> core.Info | None:
        """The domain that a definition is of; libvirt's rules (virDomainObjListAddLocked)."""
        uuid, name = definition.uuid, definition.name
        if uuid is None:
            return self._glance(name=name)
        if self._is_new(uuid, name):
            return None
        known = self._glance(uuid=uuid)
        if known is not None and known.name != name:
            raise DomainExists(f"domain '{known.name}' is already defined with uuid {known.uuid}")
        namesake = self._glance(name=name) if known is None else None
        if namesake is not None:
            raise DomainExists(f"domain '{namesake.name}' already exists with uuid {namesake.uuid}")
        return known

    def remove_inactive(self, dom: Domain, timeout: float | None = None) -> None:
        """Remove an inactive domain (virDomainRemoveInactive). List lock held, `dom` unlocked.

        Waits until nobody holds the domain. Raises `DomainLocked` (this thread holds it: it would
        wait for itself), `DomainActive`, `DomainRemoved`, `ListNotLocked`, `LockTimeout`.
        """
        self._need_list_lock("remove_inactive")
        self._need_ours(dom)
        if dom.is_locked:
            raise DomainLocked(
                f"this thread holds domain {dom.uuid}; unlock it first: remove_inactive waits "
                "until nobody holds it"
            )
        deadline = Deadline(timeout)
        try:
            dom.lock(deadline.left())
            if dom.is_active:
                raise DomainActive(f"domain '{dom.name}' is running with id {dom.id}")
            self._remove(dom, deadline.left())
        finally:
            dom._pass_on()

    def free(self, timeout: float | None = None) -> None:
        """Remove every domain, active ones too (virDomainObjListFree). List lock held.

        Takes and drops each domain's lock before it goes. Raises `DomainLocked` before anything is
        removed if this thread holds one of them, `LockTimeout` (what was removed by then is gone).
        """
        self._need_list_lock("free")
        deadline = Deadline(timeout)
        doms = self._live_handles()
        held = next((dom for dom in doms if dom.is_locked), None)
        if held is not None:
            raise DomainLocked(f"this thread holds domain {held.uuid}; unlock it first")
        for dom in doms:
            try:
                dom.lock(deadline.left())
                self._remove(dom, deadline.left())
            finally:
                dom._pass_on()

    def rename(self, dom: Domain, new_name: str, timeout: float | None = None) -> None:
        """Rename an inactive domain (virDomainRename). List lock held, `dom` locked, nothing
        uncommitted.

        Name and definitions change in one commit; if the list was loaded from a config directory
        and the domain is persistent, its file and autostart link follow, and a failure there leaves
        all as it was. Raises `InvalidName` (also for the name that it has), `DomainExists`,
        `DomainActive`, `UncommittedChanges`, `ConfigError`, `ListNotLocked`, `DomainNotLocked`,
        and `LockTimeout` when the directory's filelock is not free within `timeout` seconds.
        """
        self._need_list_lock("rename")
        self._need_ours(dom)
        deadline = Deadline(timeout)
        if dom.is_active:
            raise DomainActive(f"cannot rename active domain '{dom.name}'")
        if dom.changed:
            raise UncommittedChanges(f"commit or roll back domain '{dom.name}' before renaming it")
        old_name = dom.name
        check_name(new_name)
        if new_name == old_name:
            raise InvalidName(f"Can't rename domain '{old_name}' to itself")
        if self._glance(name=new_name) is not None:
            raise DomainExists(f"domain with name '{new_name}' already exists")
        definition = dom.definition.replace(name=new_name)
        successor = dom.next_definition
        renamed = None if successor is None else successor.replace(name=new_name).encode()
        dirs = self._config_dirs()
        encoded = definition.encode()
        commit = _Commit(
            dom, lambda: self._rename(dom, new_name, encoded, renamed, deadline.left())
        )
        if dirs is None or not dom.persistent:
            commit()
        else:
            dirs.rename(old_name, definition, deadline.left(), commit)

    # --- the whole of it: the list lock is taken here ---

    def define(
        self, definition: DomainDef | str | bytes, timeout: float | None = None
    ) -> core.Info:
        """Define a persistent domain, or redefine one, and save its config; returns its info.

        `definition` may be XML. An active domain gets it as `next_definition`. No lock is needed;
        the list lock is taken. If the config file can not be saved nothing is defined: the domain
        is as it was before (virDomainDefineXML). What is raised after that is done - no memory for
        the info, a signal handler of yours - leaves it defined, in memory and on disk. Raises
        `DefinitionError`, `DomainExists`, `ConfigError`, `LockTimeout`, `SegmentFull`, `LockOrder`.
        """
        deadline = Deadline(timeout)
        definition = _as_definition(definition)
        dom, commit, existed = None, None, True
        try:
            with self._list_held(deadline.left()):
                existed = self._known(definition) is not None
                dom = self.assign_def(definition, True, deadline.left())
            commit = _Commit(dom, lambda: dom.commit(deadline.left()))
            self._save_and_commit(dom, commit, deadline)
            info = self.peek(uuid=dom.uuid, timeout=None)
        except BaseException:
            # It is not locked in a child that a signal handler forked: there it is our parent's.
            if dom is not None and dom.is_locked and (commit is None or not commit.happened()):
                self._take_back(dom, existed)
            raise
        finally:
            if dom is not None:
                dom._pass_on()
        assert info is not None  # we held it
        return info

    def _save_and_commit(self, dom: Domain, commit: _Commit, deadline: Deadline) -> None:
        dirs = self._config_dirs()
        if dirs is None:  # and no file says that a new domain is there for good
            dom.commit(deadline.left())
        else:
            dirs.save(dom.next_definition or dom.definition, deadline.left(), commit)

    def _take_back(self, dom: Domain, existed: bool) -> None:
        """Undo an `assign_def` after a failure: nobody holds the domain, it is as it was, and one
        that did not exist is removed, unless somebody made use of it meanwhile."""
        dom._pass_on()
        if existed:
            return
        with (
            suppress(DomainActive, DomainRemoved),
            self._list_held(None),
        ):
            self.remove_inactive(dom)

    def _take_back_made(self, uuid: uuid_module.UUID | bytes) -> None:
        """Undo a `_create` that failed, should a signal handler have raised as it returned. Nobody
        else can have made a domain of this UUID: we hold the list lock, but for a child that a
        handler forked."""
        dom = self.find_by_uuid(uuid) if self.is_locked else None
        if dom is not None:
            self._take_back(dom, False)

    def undefine(
        self,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Undefine a domain: its config file and autostart link go, and so does an inactive domain;
        an active one becomes transient (virDomainUndefine).

        Exactly one key. No lock is needed; the list lock is taken. Raises `DomainNotFound`,
        `DomainTransient` (an active domain that is not persistent), `ConfigError`, `LockTimeout`,
        `LockOrder`.
        """
        deadline = Deadline(timeout)
        with self._list_held(deadline.left()):
            dom = self.get(uuid=uuid, name=name, id=id, timeout=deadline.left())
            try:
                self._undefine(dom, deadline)
            finally:
                dom._pass_on()

    def _undefine(self, dom: Domain, deadline: Deadline) -> None:
        if dom.is_active and not dom.persistent:
            raise DomainTransient(f"domain '{dom.name}' is transient: cannot undefine it")
        dirs = self._config_dirs()
        commit = _Commit(dom, lambda: self._forget(dom, deadline))
        if dirs is None:
            commit()
        else:
            dirs.delete(dom.name, deadline.left(), commit)

    def _forget(self, dom: Domain, deadline: Deadline) -> None:
        if not dom.is_active:
            self._remove(dom, deadline.left())
            return
        dom.persistent = False
        dom.autostart = False
        dom.commit(deadline.left())

    # --- config directories ---

    def load_all_configs(
        self,
        config_dir: str | os.PathLike[str],
        autostart_dir: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        workers: int | None = None,
        timeout: float | None = None,
    ) -> LoadReport:
        """Load every ``*.xml`` of a directory as a persistent domain (virDomainLoadAllConfigs).

        No lock is needed; the list lock is taken per batch. A file that is wrong is skipped, logged
        and reported; a missing directory is no error. A domain whose ``NAME.xml`` in
        `autostart_dir` is a link to its file is set to autostart. The directories are remembered in
        the list: what any process defines, renames or undefines later reaches them.
        `progress(done, total)` is called as it goes on; `workers` processes parse, this one among
        them. `timeout` in seconds is for each wait: for a domain it is that file's failure, for the
        list lock it is `LockTimeout`.
        """
        dirs = ConfigDirs(Path(config_dir), None if autostart_dir is None else Path(autostart_dir))
        with self.locked(timeout):
            self._set_settings(_encode_dirs(dirs))
        return config.load_all(self, dirs, progress, workers, timeout)

    def _config_dirs(self) -> ConfigDirs | None:
        blob = self._settings()
        return _decode_dirs(blob) if blob else None

    def save_config(self, dom: Domain, timeout: float | None = None) -> None:
        """Write what the domain will be after its next start to the config directory
        (virDomainSaveConfig): its `next_definition`, else its definition. Domain locked.

        Does nothing if the list was not loaded from a directory. Raises `ConfigError`; the file is
        then as it was before.
        """
        self._need_ours(dom)
        dirs = self._config_dirs()
        definition = dom.next_definition or dom.definition
        if dirs is not None:
            dirs.save(definition, timeout)

    def delete_config(self, dom: Domain, timeout: float | None = None) -> None:
        """Remove the domain's config file and autostart link (virDomainDeleteConfig).

        Domain locked. Raises `ConfigError`.
        """
        self._need_ours(dom)
        dirs = self._config_dirs()
        name = dom.name
        if dirs is not None:
            dirs.delete(name, timeout)

    def set_autostart(self, dom: Domain, enabled: bool, timeout: float | None = None) -> None:
        """Start the domain with the host, or not: the record and the link on disk together
        (virDomainSetAutostart). Domain locked; committed.

        Raises `DomainTransient`, `ConfigError`, `UncommittedChanges`.
        """
        self._need_ours(dom)
        if not dom.persistent:
            raise DomainTransient("cannot set autostart for transient domain " + repr(dom.name))
        if dom.changed:
            raise UncommittedChanges(f"commit or roll back domain '{dom.name}' first")
        dirs = self._config_dirs()

        def change() -> None:
            dom.autostart = enabled
            dom.commit(timeout)

        commit = _Commit(dom, change)
        try:
            if dirs is not None and (dirs.autostart_dir is not None or enabled):
                dirs.set_autostart(dom.name, enabled, timeout, commit)
            else:
                commit()
        except BaseException:
            dom.rollback()
            raise

    # --- listing ---

    def list(
        self,
        active: bool | None = None,
        persistent: bool | None = None,
        autostart: bool | None = None,
        state: int | Iterable[int] | None = None,
        definitions: bool = True,
    ) -> list[core.Info]:
        """The domains that fit, as `DomainInfo`s; takes no lock (virConnectListAllDomains).

        Filters are combined with AND; `state` is one `DomainState` or several, any of which do.

        >>> from shmdomains import DomainList
        >>> DomainList().list(active=True)
        []
        """
        return self._list(
            _tri(active), _tri(persistent), _tri(autostart), _state_mask(state), definitions
        )

    def count(
        self,
        active: bool | None = None,
        persistent: bool | None = None,
        autostart: bool | None = None,
        state: int | Iterable[int] | None = None,
    ) -> int:
        """How many domains fit; filters as in `list` (virDomainObjListNumOfDomains)."""
        return self._count(_tri(active), _tri(persistent), _tri(autostart), _state_mask(state))


class DomainList(DomainListRules, core.Segment):
    """The list of domains in shared memory (virDomainObjList).

    ``DomainList()`` lives in a memfd: shared with forked children, passed by pickling to spawned
    ones, gone with the last process. `create`, `attach` and `open` use a segment with a name.

    `max_domains` is the room in the list, `max_bytes` the limit of the whole segment (default:
    about 16 KiB a domain); memory is committed only as used. `lock` is ``"robust"`` or
    ``"multiprocessing"``; `context` is the multiprocessing context that makes the locks of the
    latter, by default the default one.

    >>> doms = DomainList(max_domains=100)
    >>> len(doms)
    0
    >>> doms.close()
    """

    _name: str | None = None
    _path: Path | None = None

    def __init__(
        self,
        *,
        max_domains: int | None = None,
        max_bytes: int | None = None,
        lock: Literal["robust", "multiprocessing"] = "robust",
        context: mp_context.BaseContext | None = None,
    ) -> None:
        max_domains = _checked_limit(max_domains, lock)
        fd = os.memfd_create("shmdomains", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            core.format_segment(fd, lock, max_domains, max_bytes)
            # Nobody can truncate it under our feet.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            self._begin(fd, *_make_locks(lock, max_domains, context))
        finally:
            os.close(fd)

    def _begin(self, fd: int, list_lock: Any = None, slot_locks: Any = None) -> None:
        self._attach(fd, Domain, list_lock, slot_locks)
        _lists[self._identity] = self

    @classmethod
    def create(
        cls,
        name: str | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        max_domains: int | None = None,
        max_bytes: int | None = None,
        lock: Literal["robust", "multiprocessing"] = "robust",
        context: mp_context.BaseContext | None = None,
        mode: int = 0o600,
        group: int | str | None = None,
    ) -> DomainList:
        """Create a segment with a name (default ``default``) or in a file of your choice.

        `mode` 0o660 with a `group` shares it with that group. Raises `SegmentExists`,
        `SegmentRefused`, `SegmentFull` (no memory for it), and `OSError` when this process has no
        descriptor left, or no address space for the largest size.
        """
        file = segment_file.path_of(name, path)
        max_domains = _checked_limit(max_domains, lock)
        doms = cls.__new__(cls)
        locks = _make_locks(lock, max_domains, context)
        limit = max_domains

        def fill(fd: int) -> None:
            # Attached before it has a name: what fails here leaves none.
            core.format_segment(fd, lock, limit, max_bytes)
            doms._begin_file(fd, file, name, path, *locks)

        try:
            os.close(segment_file.create(file, mode, group, fill))
        except BaseException:
            doms.close()
            raise
        return doms

    @classmethod
    def attach(
        cls, name: str | None = None, *, path: str | os.PathLike[str] | None = None
    ) -> DomainList:
        """Attach to a segment by name or file.

        Raises `SegmentNotFound`, `SegmentRefused` (not ours, a link, wrong mode), `SegmentMismatch`
        (another layout, boot or PID namespace), `SegmentCorrupt`, and `OSError` when this process
        has no descriptor left, or no address space for the largest size. A list with
        multiprocessing locks can only be read by those who did not inherit it.
        """
        file = segment_file.path_of(name, path)
        doms = cls.__new__(cls)
        fd = segment_file.attach(file)
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
        **create: Any,
    ) -> DomainList:
        """Attach, or create with the options of `create` if there is none. Whoever comes first
        creates it; nobody sees it half made."""
        while True:
            with suppress(SegmentNotFound):
                return cls.attach(name, path=path)
            with suppress(SegmentExists):
                return cls.create(name, path=path, **create)

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
            # An attachment takes a descriptor, and address space for the largest size.
            raise OSError(exc.errno, f"not attached: {exc.strerror}", str(file)) from None
        self._path = file
        self._name = None if path is not None else name or segment_file.DEFAULT_NAME

    def unlink(self, force: bool = False) -> None:
        """Remove the segment's name; who is attached keeps it, like this list.

        Raises `SegmentInUse` while other processes are attached, unless `force`, and
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
            segment_file.unlink(self._path, force, self._inode)
        else:
            segment_file.unlink_attached(self._path, fd, force)

    def fileno(self) -> int:
        """The segment's descriptor, for whoever closes those that nobody asked to keep, as a
        process that becomes a daemon does: ``DaemonContext(files_preserve=[doms])``.

        Without it the list works, but `shmdomains.unlink` of others does not see this process, and
        the list can not be given to a child that is spawned. This raises `DescriptorLost` then;
        `attach` gets a named segment's back.

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
        until they are unlocked. Everything else raises `ListClosed` from now on."""
        self._close()

    def __enter__(self) -> DomainList:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def info(self) -> ListInfo:
        """Counts, bytes, creator and who is attached. Takes no lock."""
        numbers = self._statistics()
        dirs = self._config_dirs()
        return ListInfo(
            name=self._name,
            path=None if self._path is None else str(self._path),
            lock=self._kind,
            domains=numbers["domains"],
            active=numbers["active"],
            max_domains=numbers["max_domains"],
            bytes_max=numbers["bytes_max"],
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
        """What the kernel counts: a little more, after a grower died."""
        try:
            return os.fstat(self.fileno()).st_blocks * 512
        except DescriptorLost:
            return by_watermarks

    def check(self, timeout: float | None = 10.0) -> CheckReport:
        """Look at every invariant of the segment; nobody waits for it longer than a lock slice.

        Most of it takes no lock. What only looks wrong because writers are at work is looked at
        again under the list, id or heap lock, for 40 ms at most each time; `timeout` seconds are
        waited for these in all, and what they were not free for stands in `CheckReport.unsettled`.
        Whoever takes the lock of a dead holder repairs what it protects, and so does this.

        ==============  ================================================  ========================
        invariant       what it means                                     repaired, after a death,
                                                                          by the next holder of
        ==============  ================================================  ========================
        I1 identity     every domain has a UUID and a name                 nobody: export
        I2 extents      what a record names in the heap is there, once    nobody: export
        I2 map          the map of used space is what records name        the heap lock
        I3 fields       a record is whole, its state exists               nobody: export
        I4 ids          no id is in use that was not given out            nobody: export
        I5 index        UUID, name, id lead to their domain, no more      the list lock, the id lock
        I5 sequence     no index is being changed without its lock        the list lock, the id lock
        free list       every slot without a domain is on it, once        the list lock
        counts          domains, active domains, slots are counted right  the list lock, the id lock
        locks           every lock is of the kind that it was made as     nobody: export
        heap            its committed end lies within it                  nobody: export
        settings        the remembered config directories can be read     load_all_configs()
        poisoned        no repair has ever failed                         nobody: export
        ==============  ================================================  ========================

        `shmdomains.INVARIANTS` has the same for programs.

        >>> bool(DomainList(max_domains=10).check())
        True
        """
        problems, counts, open, longest = self._check(timeout)
        poisoned = self._statistics()["poisoned"]
        problems = [(name, poisoned if name == "poisoned" else text) for name, text in problems]
        try:
            self._config_dirs()
        except SegmentCorrupt as exc:
            problems.append(("settings", str(exc)))
        return CheckReport(problems, counts, unsettled(open), longest)

    def recover(self, timeout: float | None = 10.0) -> RecoverReport:
        """Take each lock once, as its next holder would, so that all repairs are done now.

        Nothing needs this: who takes a lock repairs what its dead holder left. It is for people who
        want to see it done, and what. The list, id and heap lock are waited for, `timeout` seconds
        in all; a domain that somebody holds is left alone. Who next locks a domain still learns
        from `Domain.previous_owner_died` what was told here.

        Raises `SegmentPoisoned` when a repair fails, or one did; `LockOrder` if this thread holds a
        domain; `LockKindMismatch` for who did not inherit a list of multiprocessing locks.

        >>> doms = DomainList(max_domains=10)
        >>> doms.recover()
        RecoverReport(repairs=[], held=[], freed=0)
        """
        repairs, held, freed = self._recover(timeout)
        return RecoverReport(
            [Repair(*repair) for repair in repairs], [HeldLock(*lock) for lock in held], freed
        )

    def __repr__(self) -> str:
        if self.closed:
            return "<DomainList closed>"
        where = "memfd" if self._path is None else str(self._path)
        return f"<DomainList {where} domains={len(self)} lock={self._kind}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # To a child that is being spawned goes the descriptor itself; to one that has the segment
        # already, or can find it by name, which one it is.
        fd = locks = None
        if mp_context.get_spawning_popen() is not None:
            fd = reduction.DupFd(self.fileno())
            locks = self._locks
        return _restore, (type(self), self._identity, self._name, self._path, fd, locks)


_lists: WeakValueDictionary[bytes, DomainList] = WeakValueDictionary()


def _restore(
    cls: type[DomainList],
    identity: bytes,
    name: str | None,
    path: Path | None,
    fd: Any,
    locks: Any,
) -> DomainList:
    known = _lists.get(identity)
    number = None if fd is None else fd.detach()
    if known is not None and not known.closed:
        if number is not None:
            os.close(number)
        return known
    doms = cls.__new__(cls)
    if number is None:
        if path is None:
            raise SegmentNotFound(
                "this list has no name and is not attached in this process; pass the DomainList "
                "itself to the process, as an argument of Process or initargs of a pool"
            )
        number = segment_file.attach(path)
    try:
        doms._begin(number, *(locks or ()))
    finally:
        os.close(number)
    doms._name, doms._path = name, path
    if doms._identity != identity:
        raise SegmentMismatch(f"segment {path} was created anew since this was pickled")
    return doms


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


def _make_locks(lock: str, count: int, context: mp_context.BaseContext | None) -> tuple[Any, Any]:
    if lock == "robust":
        return None, None
    room = _room_for_locks()
    if count + 1 > room:
        raise SegmentFull(
            f"max_domains={count} with lock='multiprocessing' needs {count + 1} locks, each of "
            f"which maps a page, and this process can map {room} more (vm.max_map_count); use "
            "fewer domains or lock='robust'"
        )
    make = (context or multiprocessing.get_context()).Lock
    return make(), [make() for _ in range(count)]


def _room_for_locks() -> int:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    with open("/proc/self/maps") as maps:
        used = sum(1 for _ in maps)
    return max(limit - used - 1000, 0)  # the program needs some for itself


def unlink(
    name: str | None = None, *, path: str | os.PathLike[str] | None = None, force: bool = False
) -> None:
    """Remove a segment's name. Raises `SegmentNotFound`, and `SegmentInUse` unless `force`."""
    segment_file.unlink(segment_file.path_of(name, path), force)
