"""shmdomains itself, with each of its two kinds of lock."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from shmdomains import DomainDef, DomainList, DomainState

from ..world import Made
from .base import Contestant, Row, drop, memory_folder


class Robust(Contestant):
    name = "shmdomains"
    most = 1_000_000
    quick = 100_000
    lock: Literal["robust", "multiprocessing"] = "robust"

    def prepare(self, definition: DomainDef) -> DomainDef:
        return definition

    def facts(self, definition: DomainDef) -> tuple[str, str]:
        return definition.name, definition.title or ""

    def fill(self, domains: Iterable[Made], count: int) -> None:
        self.folder = memory_folder()
        self.path = f"{self.folder}/list"
        self.doms = DomainList.create(
            path=self.path,
            max_domains=count + self._spare,
            lock=self.lock,
            context=multiprocessing.get_context("fork"),
        )
        assign = self.doms.assign_def
        for made in domains:
            with self.doms.locked():
                dom = assign(made.definition, True)
            dom.activate()
            dom.unlock()

    _spare = 10_000  # room for what `define` adds

    def close(self) -> None:
        self.doms.close()
        drop(self.folder)

    def read_state(self, uuids: Sequence[bytes]) -> int:
        get = self.doms.get
        for uuid in uuids:
            with get(uuid=uuid) as dom:
                state = dom.state
        return state

    def read_state_patch(self, uuids: Sequence[bytes]) -> int:
        lock, find, unlock = self.doms.lock, self.doms.find_by_uuid, self.doms.unlock
        for uuid in uuids:
            lock()
            dom = find(uuid)
            unlock()
            assert dom is not None
            state = dom.state
            dom.unlock()
        return state

    def read_definition(self, names: Sequence[str]) -> DomainDef:
        get = self.doms.get
        for name in names:
            with get(name=name) as dom:
                definition = dom.definition
        return definition

    def change_state(self, uuids: Sequence[bytes], state: int) -> None:
        get, new = self.doms.get, DomainState(state)
        for uuid in uuids:
            with get(uuid=uuid) as dom:
                dom.state = new

    def replace(self, changes: Sequence[tuple[bytes, DomainDef]]) -> None:
        get = self.doms.get
        for uuid, definition in changes:
            with get(uuid=uuid) as dom:
                dom.definition = definition

    def define(self, added: Sequence[tuple[bytes, str, DomainDef]]) -> None:
        lock, assign, unlock = self.doms.lock, self.doms.assign_def, self.doms.unlock
        for _uuid, _name, definition in added:
            lock()
            dom = assign(definition, True)
            unlock()
            dom.unlock()

    def remove(self, uuids: Sequence[bytes]) -> None:
        lock, find, unlock = self.doms.lock, self.doms.find_by_uuid, self.doms.unlock
        remove = self.doms.remove_inactive
        for uuid in uuids:
            lock()
            dom = find(uuid)
            assert dom is not None
            dom.unlock()
            remove(dom)
            unlock()

    def by_id(self, ids: Sequence[int]) -> int:
        get = self.doms.get
        for id in ids:
            with get(id=id) as dom:
                state = dom.state
        return state

    def miss(self, uuids: Sequence[bytes]) -> None:
        lookup = self.doms.lookup
        for uuid in uuids:
            assert lookup(uuid=uuid) is None

    def rows(self) -> list[Row]:
        return list(self.doms.table(("id", "name", "state")))

    def peek(self, uuids: Sequence[bytes]) -> int:
        peek = self.doms.peek
        for uuid in uuids:
            info = peek(uuid=uuid)
            assert info is not None
            state = info.state
        return state

    def read_data(self, uuids: Sequence[bytes]) -> Any:
        get = self.doms.get
        for uuid in uuids:
            with get(uuid=uuid) as dom:
                value = dom.data
        return value

    def change_data(self, uuids: Sequence[bytes], value: Any) -> None:
        get = self.doms.get
        for uuid in uuids:
            with get(uuid=uuid) as dom:
                dom.data = value

    def increment(self, uuids: Sequence[bytes]) -> None:
        get = self.doms.get
        for uuid in uuids:
            with get(uuid=uuid) as dom:
                data = dom.data
                dom.data = data | {"requests": data["requests"] + 1}

    def hold(self, uuid: bytes) -> None:
        self.held = self.doms.get(uuid=uuid)

    def take(self, uuid: bytes) -> None:
        self.doms.get(uuid=uuid).unlock()

    def footprint(self) -> int:
        return self.doms.info.bytes_committed


class Multiprocessing(Robust):
    name = "shmdomains, multiprocessing locks"
    lock = "multiprocessing"
    most = 10_000
    quick = 1_000
    _spare = 2_500
