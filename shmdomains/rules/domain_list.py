"""The list of domains: assign, remove, define, load - libvirt's rules, over any store.

These are the rules of the patch "Locking on virDomainObjPtr objects" and of later libvirt: who must
hold which lock, duplicates, live and next definition, persistence, config directories. They call
`store.ListBase` and do not know where records live.

How a rule undoes its work when a later step fails:

- A change of an existing record is committed only once its files are in place; `_release_unseen`
  rolls it back.
- `config` changes the files, and undoes that unless the `steps.Commit` happened. What a killed
  process did not undo, the domain's next holder settles (`steps`).
- A new record is committed as it is made. `_take_back` removes it, unless somebody changed it
  since.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import uuid as uuid_module
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from ..job import Job
from ..names import Uuid, check_name, parse_uuid
from ..states import DomainState
from ..xml.definition import DomainDef, EncodedDef
from . import busy, files, jobs, steps
from .elect import Election
from .info import DomainInfo
from .store import D, Deadline, Filter, Identity, LockedDomains
from .values import key_of, not_found, one_key
from .wait import WaitRules
from .watch import WatchRules
from .work import Step, Work

if TYPE_CHECKING:
    from ..config.remembered import Records

logger = logging.getLogger(__name__)

_SHUTOFF = DomainState.SHUTOFF
_DRIVER = re.compile("[A-Za-z0-9-]{1,63}")


def _as_definition(definition: DomainDef | str | bytes) -> DomainDef:
    return definition if isinstance(definition, DomainDef) else DomainDef.from_xml(definition)


def as_new(definition: DomainDef | EncodedDef) -> tuple[Uuid, str, bytes]:
    """Identity and definition of a new record; without a uuid it gets a random one."""
    uuid = definition.uuid
    if uuid is None:
        uuid = uuid_module.uuid4()
        if isinstance(definition, EncodedDef):
            definition = definition.decoded()
        definition = definition.replace(uuid=uuid)
    return uuid, definition.name, definition.encode()


def replace_definition(dom: D, definition: DomainDef | EncodedDef, persistent: bool | None) -> None:
    """Give a locked domain another definition, at once or for the next start, as part of its
    transaction."""
    if isinstance(definition, EncodedDef):
        definition = definition.decoded()
    if definition.uuid is None:
        definition = definition.replace(uuid=dom.uuid)
    if dom.is_active:
        dom.next_definition = definition
    else:
        dom.definition = definition
    if persistent is not None:
        dom.persistent = persistent


class DomainListRules(WaitRules[D], WatchRules[D]):
    """The rules, to be combined with a store."""

    # --- locks ---

    def _list_held(self, timeout: float | None) -> AbstractContextManager[object]:
        """Hold the list lock; nothing to do if this thread holds it already."""
        return nullcontext() if self.is_locked else self.locked(timeout)

    def lock_many(
        self, domains: Iterable[D | DomainInfo | Uuid | int], timeout: float | None = None
    ) -> LockedDomains[D]:
        """Lock several domains at once, holding the list lock meanwhile.

        `domains`: handles, `DomainInfo`s or keys, as `get` takes them. All or nothing: an error
        (`LockTimeout`, `DomainNotFound`, `DomainRemoved`, `TooManyLocks`, `WrongList`) unlocks
        those that were locked.

        >>> from shmdomains import DomainList
        >>> with DomainList().lock_many([]) as locked:
        ...     len(locked)
        0
        """
        return self._locked_together(list(domains), self._deadline(timeout), self._lock_all)

    def _locked_together(
        self,
        wanted: list[D | DomainInfo | Uuid | int],
        deadline: Deadline,
        lock_all: Callable[[list[D | DomainInfo | Uuid | int], LockedDomains[D], Deadline], object],
    ) -> LockedDomains[D]:
        """What `lock_all` locks, or none of it."""
        taken = self._empty()
        try:
            with self._list_held(deadline.left()):
                lock_all(wanted, taken, deadline)
        except BaseException:
            at = len(taken)
            while at:  # a loop that allocates nothing, as the end of the block does
                at -= 1
                taken[at]._release_unseen()
            raise
        return taken

    def _lock_all(
        self,
        wanted: list[D | DomainInfo | Uuid | int],
        taken: LockedDomains[D],
        deadline: Deadline,
    ) -> None:
        for one in wanted:
            self._lock_one(one, taken, deadline)

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
        """A handle that the caller has locked, or the domain with this key, locked for the
        block."""
        if isinstance(domain, self._handle_type):
            self._need_ours(domain)
            yield domain
            return
        dom = self.get(**key_of(domain), timeout=deadline.left())
        try:
            yield dom
        finally:
            dom._release_unseen()

    # --- what the list remembers ---

    @property
    def driver(self) -> str | None:
        """The name of the driver that runs the domains, on a list of several hosts those of this
        one. `shmdomains` commands that are told no other use it; nothing else is decided by it.

        Setting it takes the list lock. A name has letters, digits and ``-``, up to 63; ``None``
        forgets it.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> doms.driver = "qemu"
        >>> doms.driver
        'qemu'
        """
        return self._driver()

    @driver.setter
    def driver(self, name: str | None) -> None:
        if name is not None and not _DRIVER.fullmatch(name):
            raise InvalidName(f"driver {name!r}: a name has letters, digits and '-', up to 63")
        with self.locked():
            self._set_driver(name)

    # --- elections ---

    def elect(
        self,
        name: str,
        run: Callable[[threading.Event], object],
        *,
        retry_after: float = 1.0,
    ) -> Election:
        """Have ``run(stop)`` run in one worker of all that call this, and in another when it dies.

        A thread of this process waits for the named lock `name` (see `mutex`) and then calls
        `run`, which goes on until the `threading.Event` it is given is set: by `Election.stop`, by
        the end of a ``with`` block of the election, or when this list is closed.

        When `run` returns, this process takes part no longer. When it raises, that is logged, and
        this process takes part again after `retry_after` seconds, then after twice as many, up to a
        minute, so that the others come first. A fork takes no part: begin anew in the child. At
        the end of the interpreter `run` is told to stop and has a second.

        Raises what `mutex` raises.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> led = []
        >>> with doms.elect("scheduler", led.append) as election:
        ...     election._thread.join()
        >>> len(led), election.leader
        (1, False)
        """
        return Election(self, self.mutex(name), run, retry_after)

    # --- assign, remove, rename: the caller holds the list lock ---

    def assign_def(
        self,
        definition: DomainDef | EncodedDef,
        persistent: bool | None = None,
        timeout: float | None = None,
    ) -> D:
        """Enter a definition; returns its domain, locked (virDomainAssignDef). List lock held.

        A new domain is committed before it is returned, state SHUTOFF, with `persistent` as given
        (default: no); if the definition has no UUID it gets a random one. If a domain has this name
        and UUID already, the definition replaces that of an inactive domain, or the
        `next_definition` of an active one. This, and `persistent` unless ``None``, is part of the
        transaction.

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
        made: list[D | None] = [None]
        try:
            dom = self._assign_new(definition, persistent, timeout, made)
            if dom is not None:
                return dom
        except BaseException:
            self._unmake(made)
            raise
        known = self._known(definition)
        if known is None:
            return self._make(definition, persistent, timeout)
        return self._redefine(known, definition, persistent, timeout)

    def _assign_new(
        self,
        definition: DomainDef | EncodedDef,
        persistent: bool | None,
        timeout: float | None,
        made: list[D | None],
    ) -> D | None:
        """A native store's short way for a domain that is new."""
        self._need_list_lock("assign_def")
        return None

    def _unmake(self, made: list[D | None]) -> None:
        """A signal handler may raise as a new record is returned. If it forked, the child does not
        hold the record: that is its parent's."""
        if made[0] is not None and made[0].is_locked:
            self._remove(made[0])

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
            replace_definition(found, definition, persistent)
        except BaseException:
            found._release_unseen()
            raise
        return found

    def _known(self, definition: DomainDef | EncodedDef) -> Identity | None:
        """The domain that has this definition's identity, or ``None``; `DomainExists` if uuid and
        name disagree (virDomainObjListAddLocked)."""
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
        self,
        definition: DomainDef | EncodedDef,
        persistent: bool | None,
        timeout: float | None,
        step: Step | None = None,
    ) -> D:
        uuid, name, blob = as_new(definition)
        work = None if step is None else Work(step)
        made: list[D | None] = [None]
        try:
            return self._insert(
                uuid, name, blob, _SHUTOFF, persistent or False, timeout, made, work
            )
        except BaseException:
            self._unmake(made)
            raise

    def _take_back(self, dom: D, made: object, timeout: float | None) -> None:
        """Undo `_make` or `_redefine` after a failure; `made` is the receipt of a new record.

        Afterwards the domain is unlocked and as it was. A new one is removed, unless somebody else
        changed it while it was unlocked: another process may have waited for the lock, defined the
        same domain and saved its file. Removing the record would lose that.

        Waits for one lock slice at least, so that a briefly held list lock does not leave a new
        domain behind. What cannot be undone in time stays, transient if it has no file.
        """
        if made is None:
            dom._release_unseen()
            return
        deadline = self._deadline(None if timeout is None else max(timeout, steps.SLICE))
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
        `DomainLocked` (this thread holds it and would wait for itself), `DomainActive`,
        `DomainRemoved`, `DomainNotFound`, `ListNotLocked`, `LockTimeout`, and `DomainBusy` if a job
        of another thread excludes it: after `timeout` or, without one, at once.
        """
        self._need_list_lock("remove_inactive")
        deadline = self._deadline(timeout)
        if not isinstance(dom, self._handle_type):
            with self._held(dom, deadline) as found:
                dom = found  # unlocked again, and nobody else can remove it
        self._need_ours(dom)
        if dom.is_locked:
            raise DomainLocked(
                f"{self._this} holds domain {dom.uuid}; unlock it first: remove_inactive waits "
                "until nobody holds it"
            )
        while True:
            try:
                dom.lock(deadline.left())
                if dom.is_active:
                    raise DomainActive(f"domain '{dom.name}' is running with id {dom.id}")
                if dom._work is not None:
                    busy.check(dom)
                self._remove(dom, deadline.left())
                return
            except busy.Excluded:
                pass  # not kept: its traceback refers to this frame
            finally:
                dom._release_unseen()
            busy.wait(self, busy.Excluded(dom), deadline)

    def free(self, timeout: float | None = None) -> None:
        """Remove every domain, active ones too (virDomainObjListFree). List lock held.

        Takes each domain's lock before it removes the domain. Raises `DomainLocked` before anything
        is removed if this thread holds one of them, and `LockTimeout` (what was removed by then is
        gone), or `DomainBusy` as `remove_inactive` does.
        """
        self._need_list_lock("free")
        deadline = self._deadline(timeout)
        doms = self._handles()
        held = next((dom for dom in doms if dom.is_locked), None)
        if held is not None:
            raise DomainLocked(f"{self._this} holds domain {held.uuid}; unlock it first")
        for dom in doms:
            while True:
                try:
                    self._free(dom, deadline)
                    break
                except busy.Excluded as excluded:
                    busy.wait(self, excluded, deadline)

    def _free(self, dom: D, deadline: Deadline) -> None:
        try:
            dom.lock(deadline.left())
            busy.check(dom)
            self._remove(dom, deadline.left())
        finally:
            dom._release_unseen()

    def rename(
        self, dom: D | DomainInfo | Uuid | int, new_name: str, timeout: float | None = None
    ) -> None:
        """Rename an inactive domain (virDomainRename). With a handle: list lock held, `dom` locked,
        nothing uncommitted. With a key, as `get` takes it: this takes both locks.

        Name and definitions change in one commit. If the list was loaded from a config directory
        and the domain is persistent, its file and autostart link follow; a failure there leaves
        everything as it was. Raises `InvalidName` (also for its present name), `DomainExists`,
        `DomainActive`, `UncommittedChanges`, `ConfigError`, `ListNotLocked`, `DomainNotLocked`,
        `DomainNotFound`, `LockTimeout`, and `DomainBusy` if a job of another thread excludes it: at
        once with a handle, after `timeout` with a key.
        """
        deadline = self._deadline(timeout)
        if isinstance(dom, self._handle_type):
            self._need_list_lock("rename")
            self._need_ours(dom)
            while True:
                try:
                    return self._rename_held(dom, new_name, deadline)
                except busy.Excluded as excluded:
                    busy.wait(self, excluded, deadline)
        while True:
            try:
                return self._rename_found(dom, new_name, deadline)
            except busy.Excluded as excluded:
                busy.wait(self, excluded, deadline)

    def _rename_found(
        self, key: D | DomainInfo | Uuid | int, new_name: str, deadline: Deadline
    ) -> None:
        with self._list_held(deadline.left()), self._held(key, deadline) as found:
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
        busy.check(dom)
        dirs = self._remembered()
        if dirs is not None:
            steps.make_way(self, dirs, new_name)
        definition = dom.definition.replace(name=new_name)
        successor = dom.next_definition
        renamed = None if successor is None else successor.replace(name=new_name).encode()
        encoded = definition.encode()
        files.rename(
            self,
            dom,
            definition,
            deadline,
            lambda work: self._rename(dom, new_name, encoded, renamed, deadline.left(), work),
        )

    # --- define, undefine: these take the list lock ---

    def define(
        self,
        definition: DomainDef | str | bytes,
        timeout: float | None = None,
        *,
        new: bool = False,
    ) -> DomainInfo:
        """Define a persistent domain, or redefine one, and save its config; returns its info.

        `definition` may be XML; without a uuid it redefines the domain of its name. `new` refuses
        an existing domain (`DomainExists`). An active domain gets it as `next_definition`. No lock
        is needed; the list lock is taken.

        If the config file cannot be saved, nothing is defined: the domain is as it was before, and
        a new one is removed, unless somebody else changed it meanwhile (virDomainDefineXML). This
        may take a lock slice (50 ms) longer than `timeout`. An error after the commit - no memory
        for the info, a signal handler of yours - leaves the domain defined, in memory and on disk.
        If an autostart link of a former domain has a new domain's name, it is removed. Raises
        `DefinitionError`, `DomainExists`, `ConfigError`, `LockTimeout`, `SegmentFull`, `LockOrder`,
        and `DomainBusy` if a job of another thread excludes redefining it, after `timeout`.
        """
        deadline = self._deadline(timeout)
        wanted = _as_definition(definition)
        while True:
            try:
                return self._define(wanted, deadline, new)
            except busy.Excluded as excluded:
                busy.wait(self, excluded, deadline)

    def _define(self, definition: DomainDef, deadline: Deadline, new: bool) -> DomainInfo:
        dom, made, commit, step = None, None, None, None
        try:
            with self._list_held(deadline.left()):
                dirs = self._remembered()
                # With a config directory, a new domain becomes persistent only with its file.
                persistent = True if dirs is None else None
                known = self._known(definition)
                if known is not None and new:
                    raise DomainExists(
                        f"domain '{known.name}' already exists with uuid {known.uuid}"
                    )
                if known is None:
                    if dirs is not None:
                        steps.make_way(self, dirs, definition.name)
                        step = Step.of("define", dirs, definition.name, defines=True)
                    dom = self._make(definition, persistent, deadline.left(), step)
                    made = dom._receipt
                elif new:
                    raise DomainExists(
                        f"domain '{known.name}' already exists with uuid {known.uuid}"
                    )
                else:
                    dom = self._redefine(known, definition, persistent, deadline.left())
                    busy.check(dom)
                was_persistent = dirs is not None and dom.persistent
                if dirs is not None:
                    dom.persistent = True
            commit = files.commit_of(dom, deadline)
            if dirs is None:
                commit()
            else:
                files.save(self, dom, dirs, deadline, commit, step, new=not was_persistent)
            left = deadline.left()
            timeout = None if left is None else max(left, steps.SLICE)
            info = self.peek(uuid=dom.uuid, timeout=timeout)
        except BaseException:
            # If a signal handler forked, the child does not hold the domain: that is its parent's.
            if dom is not None and dom.is_locked and (commit is None or not commit.happened()):
                if made is not None:
                    made = dom._receipt  # the end of its step was a commit, too
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
        """Undefine a domain: remove its config file, its autostart link and, if it is inactive, the
        domain; an active one becomes transient (virDomainUndefine).

        Exactly one key, by position as `get` takes it or by keyword. No lock is needed; the list
        lock is taken. The file is removed even if it is not named after the domain. A second file
        of the domain (a forgotten ``web1-backup.xml``), which the load reported as a failure,
        stays: the next load takes the domain from it. Raises `DomainNotFound`, `DomainTransient`
        (an active domain that is not persistent), `ConfigError`, `LockTimeout`, `LockOrder`, and
        `DomainBusy` if a job of another thread excludes it, after `timeout`.
        """
        deadline = self._deadline(timeout)
        wanted = one_key(key, uuid, name, id)
        while True:
            try:
                return self._undefine_found(wanted, deadline)
            except busy.Excluded as excluded:
                busy.wait(self, excluded, deadline)

    def _undefine_found(self, key: dict[str, Any], deadline: Deadline) -> None:
        with self._list_held(deadline.left()):
            dom = self.get(**key, timeout=deadline.left())
            try:
                self._undefine(dom, deadline)
            finally:
                dom._release_unseen()

    def _undefine(self, dom: D, deadline: Deadline) -> None:
        if dom.is_active and not dom.persistent:
            raise DomainTransient(f"domain '{dom.name}' is transient: cannot undefine it")
        busy.check(dom)
        files.delete(self, dom, deadline, lambda work: self._forget(dom, work, deadline))

    def _forget(self, dom: D, work: Work | None, deadline: Deadline) -> None:
        if not dom.is_active:
            self._remove(dom, deadline.left())
            return
        dom.persistent = False
        dom.autostart = False
        dom._work = work
        dom.commit(deadline.left())

    # --- jobs ---

    def job(
        self,
        key: D | DomainInfo | Uuid | int,
        operation: str,
        kind: Job = Job.MODIFY,
        timeout: float | None = None,
        *,
        allow: Iterable[Job] | None = None,
        why: str | None = None,
    ) -> jobs.DomainJob:
        """`Domain.job` on the domain of a handle, or with this key, as `get` takes it.

        Raises `DomainNotFound`, too.

        >>> from shmdomains import DomainList
        >>> DomainList().job("web1", "backup")
        Traceback (most recent call last):
        ...
        shmdomains.errors.DomainNotFound: no domain with matching name 'web1'
        """
        dom: D | None
        if isinstance(key, self._handle_type):
            self._need_ours(key)
            dom = key
        else:
            dom = self._handle_of(key)
        if dom is None:
            raise not_found(**key_of(key))
        return jobs.DomainJob(dom, operation, kind, timeout, allow, why)

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

        No lock is needed; the list lock is taken per batch. A bad file is skipped, logged and
        reported; a missing directory is no error. A domain is set to autostart if ``NAME.xml`` in
        `autostart_dir` (default: ``autostart`` in `config_dir`) is a link to its file.

        The list remembers the directories: later changes by any process are saved there, until
        `forget_configs`. A directory that cannot be read is a `ConfigError`, and the remembered
        ones stay. `progress(done, total)` is called first and after each batch. `workers` is how
        many processes parse, including this one. `timeout` in seconds is for each wait: too long a
        wait for a domain is that file's failure, for the list lock it is `LockTimeout`.

        A list in shared memory passes over what it loaded before if neither the file nor its domain
        changed since: the domain counts as loaded, is not waited for, and there is no event. The
        memory of that is ``.loaded`` in `config_dir`, if there are 64 files or more.
        """
        autostart_dir = Path(config_dir, "autostart") if autostart_dir is None else autostart_dir
        dirs = ConfigDirs(Path(config_dir), Path(autostart_dir))
        steps.settle_all(self, timeout)

        def begin() -> None:
            with self.locked(timeout):
                self._remember(dirs)

        return load_all(self, dirs, progress, workers, timeout, begin, self._records())

    def _records(self) -> Records | None:
        """For a list that remembers what it loaded; ``None``: this one does not."""
        return None

    def forget_configs(self, timeout: float | None = None) -> None:
        """Forget the directories of `load_all_configs`: from now on no process's changes reach a
        file. No lock is needed; the list lock is taken.

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
        """Write the domain's `next_definition`, else its definition, to the config directory
        (virDomainSaveConfig). The caller locks the domain of a handle; that of a key, as `get`
        takes it, is locked here.

        What was changed and not committed is committed with the file. Does nothing if the list was
        not loaded from a directory. Raises `ConfigError`, and leaves the file as it was before.
        """
        deadline = self._deadline(timeout)
        with self._held(dom, deadline) as held:
            files.save_config(self, held, deadline)

    def delete_config(self, dom: D | DomainInfo | Uuid | int, timeout: float | None = None) -> None:
        """Remove the domain's config file and autostart link (virDomainDeleteConfig). The caller
        locks the domain of a handle; that of a key, as `get` takes it, is locked here.

        Raises `ConfigError`.
        """
        deadline = self._deadline(timeout)
        with self._held(dom, deadline) as held:
            files.delete(self, held, deadline)

    def set_autostart(
        self, dom: D | DomainInfo | Uuid | int, enabled: bool, timeout: float | None = None
    ) -> None:
        """Set whether the domain starts with the host: record and link together, committed
        (virDomainSetAutostart). The caller locks the domain of a handle; that of a key, as `get`
        takes it, is locked here.

        Raises `DomainTransient`, `ConfigError`, `UncommittedChanges`.
        """
        deadline = self._deadline(timeout)
        with self._held(dom, deadline) as held:
            files.set_autostart(self, held, enabled, deadline)

    # --- listing ---

    def __getitem__(self, key: int | Uuid | D | DomainInfo) -> DomainInfo:
        """`peek` that raises `DomainNotFound`, a `KeyError`: ``doms["web1"]``.

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
        host: str | None = None,
    ) -> Sequence[DomainInfo]:
        """The domains that match, as `DomainInfo`s; takes no lock (virConnectListAllDomains).

        Filters are combined with AND. `state` is one `DomainState`, or several combined with OR;
        each may also be in words (`DomainState.parse`). `host`: those that run there; in shared
        memory all are of this host.

        What is returned does not change. In shared memory it makes each info when it is looked at;
        ``list(doms.list())`` has all of them. `table` gives columns.

        >>> from shmdomains import DomainList
        >>> DomainList().list(active=True)
        []
        """
        return self._scan(Filter.of(active, persistent, autostart, state, host), definitions)

    def count(
        self,
        active: bool | None = None,
        persistent: bool | None = None,
        autostart: bool | None = None,
        state: int | str | Iterable[int | str] | None = None,
        host: str | None = None,
    ) -> int:
        """How many domains match; filters as in `list` (virDomainObjListNumOfDomains)."""
        return self._count(Filter.of(active, persistent, autostart, state, host))
