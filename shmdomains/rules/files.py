"""What libvirt's rules do with a domain's config file: a change of the record and its file in one.

Functions of a list and of one of its domains, which the caller has locked. Without remembered
directories only the record changes. `config` makes the change of files, and undoes it unless the
`Commit` that belongs to it happened.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.change import ConfigDirs, Find
from ..config.parse import file_of
from ..errors import DomainTransient, UncommittedChanges
from ..xml.definition import DomainDef
from .store import D, Deadline, DomainBase, Filter, ListBase


class Commit:
    """The commit of one record that a change of files belongs to; see `config.change.Commit`."""

    def __init__(self, dom: DomainBase, make: Callable[[], object]) -> None:
        self._dom = dom
        self._make = make
        self._before = dom._receipt

    def __call__(self) -> None:
        self._make()

    def happened(self) -> bool:
        return bool(self._dom._receipt != self._before)


def _finder(doms: ListBase[Any], dom: DomainBase, dirs: ConfigDirs) -> Find | None:
    """Finds the domain's file if it is not named after it. A transient domain has none.

    Where such files are is not remembered: it is told from what lies on the disk and who is in the
    list, which every process sees alike.
    """
    if not dom.persistent:
        return None
    uuid, name = dom.uuid, dom.name

    def find() -> Path | None:
        others = {info.name for info in doms._scan(Filter(persistent=True), False)}
        return file_of(dirs.config_dir, name, uuid, others - {name})

    return find


def save(
    doms: ListBase[D],
    dom: D,
    dirs: ConfigDirs,
    deadline: Deadline,
    commit: Commit | None,
    new: bool = False,
) -> None:
    """Write what the domain will be after its next start; a `new` one had no file before."""
    find = None if new else _finder(doms, dom, dirs)
    definition = dom.next_definition or dom.definition
    dirs.save(definition, deadline.left(), commit, new=new, find=find)


def save_config(doms: ListBase[D], dom: D, deadline: Deadline) -> None:
    """`DomainListRules.save_config`."""
    dirs = doms._remembered()
    changed = dom.changed
    if dirs is None:
        return

    def note() -> None:
        dom.autostart = dom.autostart
        dom.commit(deadline.left())

    # Noted in the record, so that nobody takes a domain back whose file somebody else saved.
    save(doms, dom, dirs, deadline, None if changed else Commit(dom, note))


def delete(
    doms: ListBase[D], dom: D, deadline: Deadline, make: Callable[[], object] | None = None
) -> None:
    """Remove the domain's file and link; `make` is what happens to the record meanwhile."""
    dirs = doms._remembered()
    name = dom.name
    commit = None if make is None else Commit(dom, make)
    if dirs is not None:
        dirs.delete(name, deadline.left(), commit, find=_finder(doms, dom, dirs))
    elif commit is not None:
        commit()


def rename(
    doms: ListBase[D],
    dom: D,
    definition: DomainDef,
    deadline: Deadline,
    make: Callable[[], object],
) -> None:
    """Give the domain's file and link the name of the new definition; `make` renames the record."""
    dirs = doms._remembered()
    commit = Commit(dom, make)
    if dirs is None or not dom.persistent:
        commit()
    else:
        find = _finder(doms, dom, dirs)
        dirs.rename(
            dom.name, definition, deadline.left(), commit, autostart=dom.autostart, find=find
        )


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
            find = _finder(doms, dom, dirs)
            dirs.set_autostart(dom.name, enabled, deadline.left(), commit, find=find)
        else:
            commit()
    except BaseException:
        dom.rollback()
        raise
