"""Which config file belongs to which domain."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from ..config.change import ConfigDirs, Other
from ..config.parse import file_of, parse_file
from ..names import SUFFIX
from ..xml.definition import DomainDef
from .info import DomainInfo
from .store import DomainBase, Filter, ListBase


class Owner:
    """Tells which files belong to this domain; see `config.change.Owner`.

    The files on disk and the domains in the list decide, which every process sees alike. A file
    that cannot be parsed belongs to the domain it is named after.
    """

    def __init__(self, doms: ListBase[Any], dom: DomainBase, dirs: ConfigDirs) -> None:
        self._doms = doms
        self._dirs = dirs
        self._uuid, self._name, self._persistent = dom.uuid, dom.name, dom.persistent
        self._found: Path | None = None

    def find(self) -> Path | None:
        """A transient domain has none. What was found stays so while the domain is locked, unless
        somebody else removes the file."""
        if not self._persistent:
            return None
        if self._found is None or not os.path.lexists(self._found):
            self._found = self._file_of(self._name, self._uuid, {self._name})
        return self._found

    def other(self, path: Path) -> Other | None:
        found, place = definition_in(path), path.name.removesuffix(SUFFIX)
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

    def holds(self, path: Path) -> bool:
        """Whether the file holds this UUID."""
        found = definition_in(path)
        return found is not None and found.uuid == self._uuid

    def _known(self, found: DomainDef) -> DomainInfo | None:
        infos = self._infos()
        by_uuid = next((info for info in infos if info.uuid == found.uuid), None)
        return by_uuid or next((info for info in infos if info.name == found.name), None)

    def _has_file(self, info: DomainInfo) -> bool:
        found = definition_in(self._dirs.config_file(info.name))
        return found is not None and found.name == info.name and found.uuid in (None, info.uuid)

    def _file_of(self, name: str, uuid: UUID | None, to_read: set[str]) -> Path | None:
        others = {info.name for info in self._infos()}
        return file_of(self._dirs.config_dir, name, uuid, others - to_read)

    def _infos(self) -> Sequence[DomainInfo]:
        return self._doms._scan(Filter(persistent=True), False)


def definition_in(path: Path) -> DomainDef | None:
    """What a config file holds; ``None`` if it cannot be read."""
    found = parse_file(str(path)).result
    return found if isinstance(found, DomainDef) else None
