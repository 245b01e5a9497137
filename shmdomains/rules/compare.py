"""Whether the records and the config directory say the same: the invariant ``config`` of `check`.

All is looked at without a lock first. What differs may only be half-way, so each such domain is
locked, if that needs no wait, and looked at again: then its rule has ended, or was settled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from ..config.change import ConfigDirs
from ..config.parse import first_uuid, scan_paths
from ..deadline import Deadline as PlainDeadline
from ..errors import (
    AlreadyLocked,
    ConfigError,
    DomainNotFound,
    DomainRemoved,
    LockKindMismatch,
    LockTimeout,
)
from ..names import SUFFIX
from ..text import counted, shown_path
from .info import DomainInfo
from .owner import Owner, definition_in
from .store import Deadline, DomainBase, Filter, ListBase

SLICE = 0.05  # seconds
MOST = 20  # differences that are told


def compare(doms: ListBase[Any], deadline: Deadline) -> tuple[list[str], list[str]]:
    """What records and files differ in, and why there is no full verdict. Nobody is waited for, and
    a domain that somebody holds is left out. Once the deadline has passed, this ends, but it may
    take one lock slice."""
    time = deadline.left()
    deadline = PlainDeadline(None if time is None else max(time, SLICE))
    dirs = doms._remembered()
    if dirs is None:
        return [], []
    problems: list[str] = []
    try:
        for uuid, second in _suspects(doms, dirs, deadline):
            problems += _differences_of(doms, dirs, uuid, second)
    except ConfigError as exc:
        return problems, [str(exc)]
    except LockKindMismatch:
        return problems, ["records and files differ; who can lock the domains may look closer"]
    except _TooLate:
        return problems, ["there was no time to read every file"]
    if len(problems) > MOST:
        left = counted(len(problems) - MOST, "more domain")
        problems[MOST:] = [f"{left} differ from their files"]
    return problems, []


class _TooLate(Exception):
    pass


def _suspects(
    doms: ListBase[Any], dirs: ConfigDirs, deadline: Deadline
) -> Iterator[tuple[UUID, Path | None]]:
    """Domains that may differ, and a file that may be a second one of theirs."""
    infos = {info.name: info for info in doms._scan(Filter(), False)}
    by_uuid = {info.uuid: info for info in infos.values()}
    files, links = _names(dirs.config_dir), _names(dirs.autostart_dir)
    for name, info in infos.items():
        if deadline.left() == 0:
            raise _TooLate
        holds = name in files and _holds(dirs.config_file(name), info)
        starts = (name in links or info.autostart) and dirs.is_autostart(name)
        if holds != info.persistent or (info.persistent and starts != info.autostart):
            yield info.uuid, None
    for name in files - infos.keys():
        if deadline.left() == 0:
            raise _TooLate
        found = definition_in(dirs.config_file(name))
        if found is not None and found.name == name and found.uuid in by_uuid:
            yield found.uuid, dirs.config_file(name)


def _names(directory: Path | None) -> set[str]:
    if directory is None:
        return set()
    return {os.path.basename(path)[: -len(SUFFIX)] for path in scan_paths(directory)}


def _holds(path: Path, info: DomainInfo) -> bool:
    """Whether the file named after the domain holds it; what cannot be parsed is whose name it
    has."""
    if first_uuid(str(path)) == info.uuid:
        return True
    found = definition_in(path)
    if found is None:
        return info.persistent
    return found.uuid == info.uuid or (found.uuid is None and found.name == info.name)


def _differences_of(
    doms: ListBase[Any], dirs: ConfigDirs, uuid: UUID, second: Path | None
) -> list[str]:
    dom: DomainBase | None = None
    try:
        dom = doms.get(uuid=uuid, timeout=0)
        work = dom._work
        if work is not None and work.step is not None:
            return []  # it could not be settled, which is logged
        return list(_differences(doms, dirs, dom, second))
    except (LockTimeout, AlreadyLocked, DomainRemoved, DomainNotFound):
        return []
    finally:
        if dom is not None:
            dom._release_unseen()


def _differences(
    doms: ListBase[Any], dirs: ConfigDirs, dom: DomainBase, second: Path | None
) -> Iterator[str]:
    name, owner = dom.name, Owner(doms, dom, dirs)
    own = dirs.config_file(name)
    if second is not None:
        if second != own and owner.holds(second):
            yield f"{shown_path(second)} holds domain '{name}' a second time"
        return
    if not dom.persistent:
        if owner.holds(own):
            yield f"domain '{name}' is not persistent, and {shown_path(own)} holds it"
        return
    info = doms.peek(uuid=dom.uuid, definitions=True)
    assert info is not None  # we hold it
    file = own if os.path.lexists(own) and _holds(own, info) else owner.find()
    if file is None:
        yield f"domain '{name}' is persistent, and has no file in {shown_path(dirs.config_dir)}"
    elif dirs.autostart_dir is not None and dirs.points_to(file) != dom.autostart:
        there = "no autostart link leads" if dom.autostart else "an autostart link leads"
        flag = "is" if dom.autostart else "is not"
        yield f"domain '{name}' {flag} set to autostart, and {there} to {shown_path(file)}"
