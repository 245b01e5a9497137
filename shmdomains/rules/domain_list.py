"""The list of domains: assign, remove, define, load - libvirt's rules, over any store.

These are the rules of the patch "Locking on virDomainObjPtr objects" and of what libvirt learnt
after it: who must hold which lock, duplicates, live against next definition, persistence, config
directories. They call what `store.ListBase` names and know nothing of where records live.

How a rule undoes what it did when a later step fails:

- A change of a record that was there is not committed before the files that belong to it are in
  place; `_release_unseen` rolls it back.
- A change of files is made by `config`, which undoes it unless its `files.Commit` happened.
- A new record is committed as it is made. `_take_back` removes it, if nobody changed it since.
"""

from __future__ import annotations

import logging
import os
import uuid as uuid_module
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from ..config.change import ConfigDirs
from ..config.load import load_all
from ..config.report import LoadReport
from ..errors import (
    AlreadyLocked,
    DomainActive,
    DomainExists,
    DomainLocked,
    DomainRemoved,
    DomainTransient,
    InvalidName,
    LockTimeout,
    UncommittedChanges,
)
from ..names import Uuid, check_name, parse_uuid
from ..states import DomainState
from ..xml.definition import DomainDef, EncodedDef
from . import files
from .info import DomainInfo
from .store import D, Deadline, Filter, Identity, ListBase, LockedDomains
from .values import key_of, not_found

logger = logging.getLogger(__name__)

_SLICE = 0.05  # seconds: one lock slice
_SHUTOFF = DomainState.SHUTOFF


def _as_definition(definition: DomainDef | str | bytes) -> DomainDef:
    return definition if isinstance(definition, DomainDef) else DomainDef.from_xml(definition)


class DomainListRules(ListBase[D]):
    """The rules, over whatever store the class is combined with."""

    # --- locks ---

    def _list_held(self, timeout: float | None) -> AbstractContextManager[object]:
        """Hold the list lock, unless this owner does already."""
        return nullcontext() if self.is_locked else self.locked(timeout)

    def lock_many(
        self, domains: Iterable[D | DomainInfo | Uuid | int], timeout: float | None = None
    ) -> LockedDomains[D]:
        """Lock several domains at once; the list lock is held while they are collected.

        `domains`: handles, `DomainInfo`s or keys, as `get` takes them. All or nothing: on an error
        (`LockTimeout`, `DomainNotFound`, `DomainRemoved`, `TooManyLocks`, `WrongList`) what was
        locked is unlocked again.

        >>> from shmdomains import DomainList
        >>> with DomainList().lock_many([]) as locked:
        ...     len(locked)
        0
        """
        deadline = self._deadline(timeout)
        wanted = list(domains)
        taken = self._empty()
        try:
            with self._list_held(deadline.left()):
                for one in wanted:
                    self._lock_one(one, taken, deadline)
        except BaseException:
            at = len(taken)
            while at:  # as at the end of the block: this allocates nothing
                at -= 1
                taken[at]._release_unseen()
            raise
        return taken

    def _lock_one(
        self, one: D | DomainInfo | Uuid | int, taken: LockedDomains[D], deadline: Deadline
    ) -> None:
        if isinstance(one, self._handle_type):
            self._need_ours(one)
            if one.is_locked:
                raise AlreadyLocked(f"domain {one.uuid} is asked for twice, or locked already")
            taken.append(one)
            one.lock(deadline.left())
            return
        dom = self.get(**key_of(one), timeout=deadline.left())
        try:
            taken.append(dom)
        except MemoryError:
            dom._release_unseen()
            raise

    @contextmanager
    def _held(self, domain: D | DomainInfo | Uuid | int, deadline: Deadline) -> Iterator[D]:
        """The handle, locked by its caller; or the domain with this key, locked meanwhile."""
        if isinstance(domain, self._handle_type):
            self._need_ours(domain)
            yield domain
            return
        dom = self.get(**key_of(domain), timeout=deadline.left())
        try:
            yield dom
        finally:
            dom._release_unseen()

    # --- assign, remove, rename: the list lock is the caller's ---

    def assign_def(
        self,
        definition: DomainDef | EncodedDef,
        persistent: bool | None = None,
        timeout: float | None = None,
    ) -> D:
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
            return self._make(definition, persistent, timeout)
        return self._redefine(known, definition, persistent, timeout)

    def _redefine(
        self,
        known: Identity,
        definition: DomainDef | EncodedDef,
        persistent: bool | None,
        timeout: float | None,
    ) -> D:
        found = self.find_by_uuid(known.uuid, timeout)
        if found is None:  # a signal handler of this thread removed it
            return self._make(definition, persistent, timeout)
        try:
            if isinstance(definition, EncodedDef):
                definition = definition.decoded()
            if definition.uuid is None:
                definition = definition.replace(uuid=known.uuid)
            if found.is_active:
                found.next_definition = definition
            else:
                found.definition = definition
            if persistent is not None:
                found.persistent = persistent
        except BaseException:
            found._release_unseen()
            raise
        return found

    def _known(self, definition: DomainDef | EncodedDef) -> Identity | None:
        """The domain that a definition is of; libvirt's rules (virDomainObjListAddLocked)."""
        uuid, name = definition.uuid, definition.name
        known = self._who_has(uuid, name)
        if known is None or uuid is None:
            return known
        if known.uuid != parse_uuid(uuid):
            raise DomainExists(f"domain '{known.name}' already exists with uuid {known.uuid}")
        if known.name != name:
            raise DomainExists(f"domain '{known.name}' is already defined with uuid {known.uuid}")
        return known

    def _make(
        self, definition: DomainDef | EncodedDef, persistent: bool | None, timeout: float | None
    ) -> D:
        uuid = definition.uuid
        if uuid is None:
            uuid = uuid_module.uuid4()
            if isinstance(definition, EncodedDef):
                definition = definition.decoded()
            definition = definition.replace(uuid=uuid)
        blob = definition.encode()
        made: list[D | None] = [None]
        try:
            return self._insert(
                uuid, definition.name, blob, _SHUTOFF, persistent or False, timeout, made
            )
        except BaseException:
            # A signal handler may raise as `_insert` returns. In a child that it forked the record
            # is its parent's, and not locked.
            if made[0] is not None and made[0].is_locked:
                self._remove(made[0])
            raise

    def _take_back(self, dom: D, made: object, timeout: float | None) -> None:
        """Undo `_make` or `_redefine` after a failure; `made` is the receipt of a new record.

        The domain is unlocked and as it was; a new one is removed, unless somebody else changed it
        while it was not locked.

        Without the comparison another process's `define` of the same domain, which waited for the
        lock, saved its file and returned, would be lost with the record. Waits for a slice at
        least, so that a moment's use of the list lock leaves no new domain behind. What cannot be
        taken back in time stays, transient if it has no file.
        """
        if made is None:
            dom._release_unseen()
            return
        deadline = self._deadline(None if timeout is None else max(timeout, _SLICE))
        if not self.is_locked:
            dom._release_unseen()  # the list lock comes first
        try:
            with self._list_held(deadline.left()):
                if not dom.is_locked:
                    dom.lock(deadline.left())
                if dom._receipt == made:
                    self._remove(dom, deadline.left())
        except DomainRemoved:
            pass
        except LockTimeout as exc:
            logger.warning("domain %s was not taken back, undefine it: %s", dom.uuid, exc)
        finally:
            dom._release_unseen()

    def remove_inactive(
        self, dom: D | DomainInfo | Uuid | int, timeout: float | None = None
    ) -> None:
        """Remove an inactive domain (virDomainRemoveInactive). List lock held, `dom` unlocked.

        `dom` may be a key, as `get` takes it. Waits until nobody holds the domain. Raises
        `DomainLocked` (this owner holds it: it would wait for itself), `DomainActive`,
        `DomainRemoved`, `DomainNotFound`, `ListNotLocked`, `LockTimeout`.
        """
        self._need_list_lock("remove_inactive")
        deadline = self._deadline(timeout)
        if not isinstance(dom, self._handle_type):
            with self._held(dom, deadline) as found:
                dom = found  # unlocked again, and nobody else can remove it
        self._need_ours(dom)
        if dom.is_locked:
            raise DomainLocked(
                f"this thread holds domain {dom.uuid}; unlock it first: remove_inactive waits "
                "until nobody holds it"
            )
        try:
            dom.lock(deadline.left())
            if dom.is_active:
                raise DomainActive(f"domain '{dom.name}' is running with id {dom.id}")
            self._remove(dom, deadline.left())
        finally:
            dom._release_unseen()

    def free(self, timeout: float | None = None) -> None:
        """Remove every domain, active ones too (virDomainObjListFree). List lock held.

        Takes and drops each domain's lock before it goes. Raises `DomainLocked` before anything is
        removed if this owner holds one of them, `LockTimeout` (what was removed by then is gone).
        """
        self._need_list_lock("free")
        deadline = self._deadline(timeout)
        doms = self._handles()
        held = next((dom for dom in doms if dom.is_locked), None)
        if held is not None:
            raise DomainLocked(f"this thread holds domain {held.uuid}; unlock it first")
        for dom in doms:
            try:
                dom.lock(deadline.left())
                self._remove(dom, deadline.left())
            finally:
                dom._release_unseen()

    def rename(
        self, dom: D | DomainInfo | Uuid | int, new_name: str, timeout: float | None = None
    ) -> None:
        """Rename an inactive domain (virDomainRename). Of a handle: list lock held, `dom` locked,
        nothing uncommitted. Of a key, as `get` takes it: both locks are taken here.

        Name and definitions change in one commit; if the list was loaded from a config directory
        and the domain is persistent, its file and autostart link follow, and a failure there leaves
        all as it was. Raises `InvalidName` (also for the name that it has), `DomainExists`,
        `DomainActive`, `UncommittedChanges`, `ConfigError`, `ListNotLocked`, `DomainNotLocked`,
        `DomainNotFound`, and `LockTimeout`.
        """
        deadline = self._deadline(timeout)
        if isinstance(dom, self._handle_type):
            self._need_list_lock("rename")
            self._need_ours(dom)
            return self._rename_held(dom, new_name, deadline)
        with self._list_held(deadline.left()), self._held(dom, deadline) as found:
            self._rename_held(found, new_name, deadline)

    def _rename_held(self, dom: D, new_name: str, deadline: Deadline) -> None:
        if dom.is_active:
            raise DomainActive(f"cannot rename active domain '{dom.name}'")
        if dom.changed:
            raise UncommittedChanges(f"commit or roll back domain '{dom.name}' before renaming it")
        old_name = dom.name
        check_name(new_name)
        if new_name == old_name:
            raise InvalidName(f"Can't rename domain '{old_name}' to itself")
        if self._who_has(None, new_name) is not None:
            raise DomainExists(f"domain with name '{new_name}' already exists")
        definition = dom.definition.replace(name=new_name)
        successor = dom.next_definition
        renamed = None if successor is None else successor.replace(name=new_name).encode()
        encoded = definition.encode()
        files.rename(
            self,
            dom,
            definition,
            deadline,
            lambda: self._rename(dom, new_name, encoded, renamed, deadline.left()),
        )

    # --- the whole of it: the list lock is taken here ---

    def define(
        self,
        definition: DomainDef | str | bytes,
        timeout: float | None = None,
        *,
        new: bool = False,
    ) -> DomainInfo:
        """Define a persistent domain, or redefine one, and save its config; returns its info.

        `definition` may be XML; without a uuid it redefines the domain of its name. `new` refuses a
        domain that is there (`DomainExists`). An active domain gets it as `next_definition`. No
        lock is needed; the list lock is taken. If the config file cannot be saved nothing is
        defined: the domain is as it was before, and a new one is removed, unless somebody else
        changed it meanwhile (virDomainDefineXML). What is raised after that is done - no memory for
        the info, a signal handler of yours - leaves it defined, in memory and on disk. Taking back
        may take a lock slice (50 ms) longer than `timeout`. A new domain's name may still have a
        former one's autostart link, which goes. Raises `DefinitionError`, `DomainExists`,
        `ConfigError`, `LockTimeout`, `SegmentFull`, `LockOrder`.
        """
        deadline = self._deadline(timeout)
        definition = _as_definition(definition)
        dom, made, commit = None, None, None
        try:
            with self._list_held(deadline.left()):
                dirs = self._remembered()
                # Where there are files a new domain is persistent with its file, and not before.
                persistent = True if dirs is None else None
                known = self._known(definition)
                if known is not None and new:
                    raise DomainExists(
                        f"domain '{known.name}' already exists with uuid {known.uuid}"
                    )
                if known is None:
                    dom = self._make(definition, persistent, deadline.left())
                    made = dom._receipt
                elif new:
                    raise DomainExists(
                        f"domain '{known.name}' already exists with uuid {known.uuid}"
                    )
                else:
                    dom = self._redefine(known, definition, persistent, deadline.left())
                was_persistent = dirs is not None and dom.persistent
                if dirs is not None:
                    dom.persistent = True
            commit = files.Commit(dom, lambda: dom.commit(deadline.left()))
            if dirs is None:
                commit()
            else:
                files.save(self, dom, dirs, deadline, commit, new=not was_persistent)
            left = deadline.left()
            info = self.peek(uuid=dom.uuid, timeout=None if left is None else max(left, _SLICE))
        except BaseException:
            # It is not locked in a child that a signal handler forked: there it is our parent's.
            if dom is not None and dom.is_locked and (commit is None or not commit.happened()):
                self._take_back(dom, made, deadline.left())
            raise
        finally:
            if dom is not None:
                dom._release_unseen()
        assert info is not None  # we held it
        return info

    def undefine(
        self,
        key: D | DomainInfo | Uuid | int | None = None,
        /,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Undefine a domain: its config file and autostart link go, and so does an inactive domain;
        an active one becomes transient (virDomainUndefine).

        Exactly one key, by position as `get` takes it or by keyword. No lock is needed; the list
        lock is taken. The file goes also where it is not named after the domain. A second file of
        the domain (a forgotten ``web1-backup.xml``), which the load reported as a failure, stays:
        the next load takes the domain from it. A worker killed after the file and before the record
        went leaves the domain without a file. Raises `DomainNotFound`, `DomainTransient` (an active
        domain that is not persistent), `ConfigError`, `LockTimeout`, `LockOrder`.
        """
        deadline = self._deadline(timeout)
        with self._list_held(deadline.left()):
            dom = self.get(key, uuid=uuid, name=name, id=id, timeout=deadline.left())
            try:
                self._undefine(dom, deadline)
            finally:
                dom._release_unseen()

    def _undefine(self, dom: D, deadline: Deadline) -> None:
        if dom.is_active and not dom.persistent:
            raise DomainTransient(f"domain '{dom.name}' is transient: cannot undefine it")
        files.delete(self, dom, deadline, lambda: self._forget(dom, deadline))

    def _forget(self, dom: D, deadline: Deadline) -> None:
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
        `autostart_dir` (default: ``autostart`` in `config_dir`) is a link to its file is set to
        autostart. The directories are remembered in the list: what any process defines, renames or
        undefines later reaches them, until `forget_configs`. A directory that cannot be read is
        `ConfigError`, and what was remembered stays. `progress(done, total)` is called as it goes
        on; `workers` processes parse, this one among them. `timeout` in seconds is for each wait:
        for a domain it is that file's failure, for the list lock it is `LockTimeout`.
        """
        autostart_dir = Path(config_dir, "autostart") if autostart_dir is None else autostart_dir
        dirs = ConfigDirs(Path(config_dir), Path(autostart_dir))

        def begin() -> None:
            with self.locked(timeout):
                self._remember(dirs)

        return load_all(self, dirs, progress, workers, timeout, begin)

    def forget_configs(self, timeout: float | None = None) -> None:
        """Forget the directories of `load_all_configs`: what is changed from now on, by whatever
        process, reaches no file. No lock is needed; the list lock is taken.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> report = doms.load_all_configs("/no/such/directory")
        >>> doms.forget_configs()
        >>> doms.info.config_dir is None
        True
        """
        with self._list_held(timeout):
            self._remember(None)

    def save_config(self, dom: D | DomainInfo | Uuid | int, timeout: float | None = None) -> None:
        """Write what the domain will be after its next start to the config directory
        (virDomainSaveConfig): its `next_definition`, else its definition. A handle's domain is
        locked by the caller; that of a key, as `get` takes it, here.

        Does nothing if the list was not loaded from a directory. Raises `ConfigError`; the file is
        then as it was before.
        """
        deadline = self._deadline(timeout)
        with self._held(dom, deadline) as held:
            files.save_config(self, held, deadline)

    def delete_config(self, dom: D | DomainInfo | Uuid | int, timeout: float | None = None) -> None:
        """Remove the domain's config file and autostart link (virDomainDeleteConfig). A handle's
        domain is locked by the caller; that of a key, as `get` takes it, here.

        Raises `ConfigError`.
        """
        deadline = self._deadline(timeout)
        with self._held(dom, deadline) as held:
            files.delete(self, held, deadline)

    def set_autostart(
        self, dom: D | DomainInfo | Uuid | int, enabled: bool, timeout: float | None = None
    ) -> None:
        """Start the domain with the host, or not: the record and the link on disk together
        (virDomainSetAutostart), committed. A handle's domain is locked by the caller; that of a
        key, as `get` takes it, here.

        Raises `DomainTransient`, `ConfigError`, `UncommittedChanges`.
        """
        deadline = self._deadline(timeout)
        with self._held(dom, deadline) as held:
            files.set_autostart(self, held, enabled, deadline)

    # --- listing ---

    def __getitem__(self, key: int | Uuid | D | DomainInfo) -> DomainInfo:
        """`peek` for a domain that is there: ``doms["web1"]``; else `DomainNotFound`, a `KeyError`.

        >>> from shmdomains import DomainList
        >>> DomainList()["web1"]
        Traceback (most recent call last):
        ...
        shmdomains.errors.DomainNotFound: no domain with matching name 'web1'
        """
        found = key_of(key)
        info = self.peek(**found)
        if info is None:
            raise not_found(**found)
        return info

    def list(
        self,
        active: bool | None = None,
        persistent: bool | None = None,
        autostart: bool | None = None,
        state: int | str | Iterable[int | str] | None = None,
        definitions: bool = True,
    ) -> list[DomainInfo]:
        """The domains that fit, as `DomainInfo`s; takes no lock (virConnectListAllDomains).

        Filters are combined with AND; `state` is one `DomainState` or several, any of which do;
        words are such, too (`DomainState.parse`).

        >>> from shmdomains import DomainList
        >>> DomainList().list(active=True)
        []
        """
        return self._scan(Filter.of(active, persistent, autostart, state), definitions)

    def count(
        self,
        active: bool | None = None,
        persistent: bool | None = None,
        autostart: bool | None = None,
        state: int | str | Iterable[int | str] | None = None,
    ) -> int:
        """How many domains fit; filters as in `list` (virDomainObjListNumOfDomains)."""
        return self._count(Filter.of(active, persistent, autostart, state))
