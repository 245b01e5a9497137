"""Loading a config directory into a list: every file becomes a persistent domain.

`load_all` needs only two methods of the list. Source: virDomainObjListLoadAllConfigs.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias
from uuid import UUID

from ..deadline import check_timeout
from ..errors import ContractError, SegmentError, SegmentFull, ShmDomainsError
from ..lazy import LazyModule
from ..names import SUFFIX
from ..text import shown_path
from ..xml.definition import DomainDef, EncodedDef
from .change import ConfigDirs
from .parse import BATCH, ParsedFile, parse_file, parse_files, scan_all, scan_paths
from .report import LoadFailure, LoadReport

if TYPE_CHECKING:
    from . import remembered
    from .remembered import Known, Records, Remembered
else:
    remembered = LazyModule("shmdomains.config.remembered")

logger = logging.getLogger(__package__)

REPARSES = 3  # of a file that keeps being replaced while it is loaded

Progress = Callable[[int, int], object]


class _LockedDomain(Protocol):
    autostart: bool

    @property
    def uuid(self) -> UUID: ...
    @property
    def changed(self) -> bool: ...
    def commit(self, timeout: float | None = None) -> None: ...
    def _release_unseen(self) -> None: ...


class Store(Protocol):
    """What `load_all` needs of a list of domains; `DomainList` has it."""

    def locked(self, timeout: float | None = None) -> AbstractContextManager[object]: ...

    def assign_def(
        self,
        definition: DomainDef | EncodedDef,
        persistent: bool | None = None,
        timeout: float | None = None,
    ) -> _LockedDomain: ...


def load_all(
    store: Store,
    dirs: ConfigDirs,
    progress: Progress | None = None,
    workers: int | None = None,
    timeout: float | None = None,
    begin: Callable[[], object] = lambda: None,
    records: Records | None = None,
) -> LoadReport:
    """Load every config file as a persistent domain (virDomainObjListLoadAllConfigs).

    The caller holds no lock. `workers` processes, including this one, parse the files. The list
    lock is taken after that, for 64 files at a time, in sorted order. A file that was replaced
    since is parsed again, so its old content never overwrites another process's `save`. If there is
    an autostart directory, `autostart` is set from the domain's link. `progress` is called with
    (done, total), without a lock, first with 0.

    A bad file is logged as a warning and reported; the others are loaded. `timeout` in seconds is
    for each wait: too long a wait for a domain is that file's failure, for the list lock it is
    `LockTimeout`. A mistake in the use of locks (`ContractError`) is raised, and so is a closed or
    damaged segment. `begin` is called once the directory is listed, before anything is loaded: an
    error before that has changed nothing.

    With `records` a file is passed over that this list has loaded before, if neither the file nor
    its domain changed since (`remembered`). It counts as loaded.

    As in libvirt a file need not be named after its domain. If several files hold one domain (a
    forgotten ``web1-backup.xml``), the one named after it is loaded, else the first in order; the
    others are failures.
    """
    check_timeout(timeout)
    paths, skipped = scan_all(dirs.config_dir)
    for path in skipped:
        logger.warning("skipped: %s: its name begins with '.'", shown_path(path))
    memory = None if records is None else remembered.Remembered(dirs, records, len(paths))
    known = {} if memory is None else memory.unchanged(paths)
    rest = [path for path in paths if path not in known] if known else paths
    if memory is not None and rest:
        memory.begin()
    try:
        with closing(parse_files(rest, workers)) as parsed:
            begin()
            loader = _Loader(store, dirs, paths, timeout, memory)
            loader.load(_items(paths, known, parsed), progress)
    finally:
        if memory is not None:
            memory.end()
    _warn_of_dangling_links(dirs)
    return loader.report(skipped)


_Item: TypeAlias = "tuple[str, ParsedFile | Known]"
"""A path and what the file holds, or what it made when it was loaded before."""


def _items(
    paths: list[str], known: dict[str, Known], parsed: Iterator[ParsedFile]
) -> Iterator[_Item]:
    for path in paths:
        yield path, known.get(path) or next(parsed)


def _warn_of_dangling_links(dirs: ConfigDirs) -> None:
    """Warn of autostart links that lead to no file: they would start the next domain of that
    name."""
    if dirs.autostart_dir is None:
        return
    with suppress(OSError):
        for path in scan_paths(dirs.autostart_dir):
            if os.path.islink(path) and not os.path.exists(path):
                logger.warning(
                    "autostart link %s leads to no file: remove it, or it starts the next domain "
                    "of this name",
                    shown_path(path),
                )


class _Loader:
    def __init__(
        self,
        store: Store,
        dirs: ConfigDirs,
        paths: list[str],
        timeout: float | None,
        memory: Remembered | None,
    ) -> None:
        self._store = store
        self._dirs = dirs
        self._timeout = timeout
        self._memory = memory
        self._links = dirs.links()
        self._paths = set(paths)
        self._inside = os.path.join(dirs.config_dir, "")
        self._loaded: dict[str, str] = {}
        self._failures: list[LoadFailure] = []

    def load(self, items: Iterator[_Item], progress: Progress | None) -> None:
        done = 0
        if progress is not None:
            progress(done, len(self._paths))
        while batch := list(itertools.islice(items, BATCH)):
            self._load_batch(batch)
            done += len(batch)
            if progress is not None:
                progress(done, len(self._paths))
        self._tell_of_other_names()

    def report(self, skipped: list[Path]) -> LoadReport:
        failures = sorted(self._failures, key=lambda failure: failure.path)
        return LoadReport(list(self._loaded), failures, skipped)

    def _load_batch(self, batch: list[_Item]) -> None:
        if all(isinstance(item, remembered.Known) for _, item in batch):
            for path, known in batch:
                self._load_item(path, known)
            return
        for _ in range(1 + REPARSES):
            with self._store.locked(self._timeout):
                stale = [path for path, item in batch if not self._load_item(path, item)]
            if not stale:
                return
            batch = [(path, parse_file(path)) for path in stale]
        for path in stale:
            self._fail(LoadFailure(Path(path), None, "the file is being replaced again and again"))

    def _load_item(self, path: str, item: ParsedFile | Known) -> bool:
        """Assign one definition, list lock held; False if the file must be parsed again."""
        if isinstance(item, remembered.Known):
            if not self._conflicts(path, item.name):
                self._loaded[item.name] = path
            return True
        if isinstance(item.result, LoadFailure):
            self._fail(item.result)
            return True
        if self._conflicts(path, item.result.name):
            return True
        if item.is_stale():
            return False
        try:
            if not self._assign(item, item.result):
                return False
        except ContractError:
            raise
        except ShmDomainsError as exc:
            if isinstance(exc, SegmentError) and not isinstance(exc, SegmentFull):
                raise
            self._fail(LoadFailure(Path(item.path), getattr(exc, "line", None), str(exc)))
            return True
        self._loaded[item.result.name] = item.path
        return True

    def _assign(self, item: ParsedFile, definition: DomainDef | EncodedDef) -> bool:
        dom = self._store.assign_def(definition, persistent=True, timeout=self._timeout)
        try:
            # While we waited, the domain's holder may have saved another definition.
            if dom.changed and item.is_stale():
                return False
            self._set_autostart(dom, item.path)
            dom.commit(self._timeout)
            if self._memory is not None and item.stamp is not None:
                self._memory.loaded(
                    item.path, item.stamp, definition.name, dom.uuid.bytes, dom.autostart
                )
        finally:
            dom._release_unseen()
        return True

    def _set_autostart(self, dom: _LockedDomain, path: str) -> None:
        if self._dirs.autostart_dir is None:
            return
        if os.path.basename(path) not in self._links and not dom.autostart:
            return  # as it was when the links were listed; to look at each takes longer
        autostart = self._dirs.points_to(Path(path))
        if dom.autostart != autostart:
            dom.autostart = autostart

    def _conflicts(self, path: str, name: str) -> bool:
        """Whether another file is loaded for this domain; then this one is a failure."""
        own = self._own_path(name)
        if path != own and own in self._paths:
            reason = f"domain '{name}' has a file of its own, {name + SUFFIX}"
        elif name in self._loaded:
            reason = f"domain '{name}' was loaded from {shown_path(self._loaded[name])}"
        else:
            return False
        self._fail(LoadFailure(Path(path), None, reason))
        return True

    def _own_path(self, name: str) -> str:
        return self._inside + name + SUFFIX

    def _fail(self, failure: LoadFailure) -> None:
        logger.warning("not loaded: %s", failure)
        self._failures.append(failure)

    def _tell_of_other_names(self) -> None:
        others = [(p, name) for name, p in self._loaded.items() if p != self._own_path(name)]
        if others:
            path, name = others[0]
            logger.info(
                "%s not named after the domain (%s holds '%s'): its next change renames it",
                "1 file is" if len(others) == 1 else f"{len(others)} files are",
                shown_path(path),
                name,
            )
