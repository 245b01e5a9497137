"""One change of a domain's record and its config file.

The caller has locked the domain. If no directories are remembered, only the record changes.
`config` changes the files, and undoes that unless the `Commit` happened.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from ..config.change import ConfigDirs, Other
from ..config.parse import file_of, parse_file
from ..errors import DomainTransient, UncommittedChanges
from ..names import SUFFIX
from ..xml.definition import DomainDef
from .info import DomainInfo
from .store import D, Deadline, DomainBase, Filter, ListBase


class Commit:
    """The commit of one record; see `config.change.Commit`."""

    def __init__(self, dom: DomainBase, make: Callable[[], object]) -> None:
        self._dom = dom
        self._make = make
        self._before = dom._receipt

    def __call__(self) -> None:
        self._make()

    def happened(self) -> bool:
        return bool(self._dom._receipt != self._before)


class Owner:
    """Tells which files belong to this domain; see `config.change.Owner`.

    Nothing is remembered: the files on disk and the domains in the list decide, which every process
    sees alike. A file that cannot be parsed belongs to the domain it is named after.
    """

    def __init__(self, doms: ListBase[Any], dom: DomainBase, dirs: ConfigDirs) -> None:
        self._doms = doms
        self._dirs = dirs
        self._uuid, self._name, self._persistent = dom.uuid, dom.name, dom.persistent

    def find(self) -> Path | None:
        """A transient domain has none."""
        if not self._persistent:
            return None
        return self._file_of(self._name, self._uuid, {self._name})

    def other(self, path: Path) -> Other | None:
        found, place = _definition(path), path.name.removesuffix(SUFFIX)
        if found is None or found.uuid == self._uuid:
            return None
        if found.uuid is None and found.name in (place, self._name):
            return None
        known = self._known(found)
        if found.name != place:
            uuid = found.uuid if known is None else known.uuid
            taken = self._file_of(found.name, uuid, {found.name, place})
            return Other(found.name, path == taken and not found.name.startswith("."))
        if known is None or known.uuid == self._uuid or self._has_file(known):
            return None
        # A process died renaming it, before the record had the new name: this is its only file.
        return Other(known.name, False)

    def has_file(self) -> bool:
        """Whether NAME.xml holds this UUID."""
        found = _definition(self._dirs.config_file(self._name))
        return found is not None and found.uuid == self._uuid

    def _known(self, found: DomainDef) -> DomainInfo | None:
        infos = self._infos()
        by_uuid = next((info for info in infos if info.uuid == found.uuid), None)
        return by_uuid or next((info for info in infos if info.name == found.name), None)

    def _has_file(self, info: DomainInfo) -> bool:
        found = _definition(self._dirs.config_file(info.name))
        return found is not None and found.name == info.name and found.uuid in (None, info.uuid)

    def _file_of(self, name: str, uuid: UUID | None, to_read: set[str]) -> Path | None:
        others = {info.name for info in self._infos()}
        return file_of(self._dirs.config_dir, name, uuid, others - to_read)

    def _infos(self) -> list[DomainInfo]:
        return self._doms._scan(Filter(persistent=True), False)


def _definition(path: Path) -> DomainDef | None:
    found = parse_file(str(path)).result
    return found if isinstance(found, DomainDef) else None


def save(
    doms: ListBase[D],
    dom: D,
    dirs: ConfigDirs,
    deadline: Deadline,
    commit: Commit | None,
    new: bool = False,
) -> None:
    """Write the definition of the domain's next start; a `new` domain had no file before."""
    dirs.save(
        dom.next_definition or dom.definition,
        deadline.left(),
        commit,
        new=new,
        keep_link=dom.autostart,
        owner=Owner(doms, dom, dirs),
    )


def save_config(doms: ListBase[D], dom: D, deadline: Deadline) -> None:
    """`DomainListRules.save_config`."""
    dirs = doms._remembered()
    changed = dom.changed
    if dirs is None:
        return

    def note() -> None:
        dom.autostart = dom.autostart
        dom.commit(deadline.left())

    # A commit changes the receipt, so no other process takes back a domain whose file we saved.
    save(doms, dom, dirs, deadline, None if changed else Commit(dom, note))


def delete(
    doms: ListBase[D], dom: D, deadline: Deadline, make: Callable[[], object] | None = None
) -> None:
    """Remove the domain's file and link; `make` changes the record."""
    dirs = doms._remembered()
    name = dom.name
    commit = None if make is None else Commit(dom, make)
    if dirs is not None:
        dirs.delete(name, deadline.left(), commit, owner=Owner(doms, dom, dirs))
    elif commit is not None:
        commit()


def rename(
    doms: ListBase[D],
    dom: D,
    definition: DomainDef,
    deadline: Deadline,
    make: Callable[[], object],
) -> None:
    """Rename the domain's file and link after the new definition; `make` renames the record."""
    dirs = doms._remembered()
    commit = Commit(dom, make)
    owner = None if dirs is None else Owner(doms, dom, dirs)
    if dirs is None or owner is None:
        commit()
    elif dom.persistent:
        left, autostart = deadline.left(), dom.autostart
        dirs.rename(dom.name, definition, left, commit, autostart=autostart, owner=owner)
    elif owner.has_file():
        # A process died defining it, before the record was persistent. If the file stayed, a load
        # would find this UUID a second time, under the old name.
        dirs.delete(dom.name, deadline.left(), commit, owner=owner)
    else:
        commit()


def set_autostart(doms: ListBase[D], dom: D, enabled: bool, deadline: Deadline) -> None:
    """`DomainListRules.set_autostart`."""
    if not dom.persistent:
        raise DomainTransient(f"cannot set autostart for transient domain {dom.name!r}")
    if dom.changed:
        raise UncommittedChanges(f"commit or roll back domain '{dom.name}' first")
    dirs = doms._remembered()

    def change() -> None:
        dom.autostart = enabled
        dom.commit(deadline.left())

    commit = Commit(dom, change)
    try:
        if dirs is not None and (dirs.autostart_dir is not None or enabled):
            owner = Owner(doms, dom, dirs)
            dirs.set_autostart(dom.name, enabled, deadline.left(), commit, owner=owner)
        else:
            commit()
    except BaseException:
        dom.rollback()
        raise
