"""A ``dict`` and ``threading.Lock``s: what one process would have. Not shared; the mark to stay
close to.

One lock for the list and one a domain, taken as the patch does: list lock, find, the domain's lock,
drop the list lock. What is in memory is the object itself: nothing is encoded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

from shmdomains import DomainDef

from ..world import RUNNING, Made
from .base import Contestant, Row


class Entry:
    __slots__ = ("data", "definition", "id", "lock", "name", "state", "uuid")

    def __init__(self, uuid: bytes, name: str, id: int, state: int, definition: DomainDef) -> None:
        self.lock = threading.Lock()
        self.uuid, self.name, self.id, self.state = uuid, name, id, state
        self.definition = definition
        self.data: Any = None


class InProcess(Contestant):
    name = "dict + threading.Lock"
    shared = False
    quick = 100_000

    def prepare(self, definition: DomainDef) -> DomainDef:
        return definition

    def facts(self, definition: DomainDef) -> tuple[str, str]:
        return definition.name, definition.title or ""

    def fill(self, domains: Iterable[Made], count: int) -> None:
        self.lock = threading.Lock()
        self.by_uuid: dict[bytes, Entry] = {}
        self.by_name: dict[str, Entry] = {}
        self.ids: dict[int, Entry] = {}
        for id, made in enumerate(domains, self.first_id):
            entry = Entry(made.uuid, made.name, id, RUNNING, made.definition)
            self.by_uuid[made.uuid] = self.by_name[made.name] = self.ids[id] = entry

    def close(self) -> None:
        del self.by_uuid, self.by_name, self.ids

    def read_state(self, uuids: Sequence[bytes]) -> int:
        lock, entries = self.lock, self.by_uuid
        for uuid in uuids:
            with lock:
                entry = entries[uuid]
                entry.lock.acquire()
            state = entry.state
            entry.lock.release()
        return state

    read_state_patch = read_state

    def read_definition(self, names: Sequence[str]) -> DomainDef:
        lock, entries = self.lock, self.by_name
        for name in names:
            with lock:
                entry = entries[name]
                entry.lock.acquire()
            definition = entry.definition
            entry.lock.release()
        return definition

    def change_state(self, uuids: Sequence[bytes], state: int) -> None:
        lock, entries = self.lock, self.by_uuid
        for uuid in uuids:
            with lock:
                entry = entries[uuid]
                entry.lock.acquire()
            entry.state = state
            entry.lock.release()

    def replace(self, changes: Sequence[tuple[bytes, DomainDef]]) -> None:
        lock, entries = self.lock, self.by_uuid
        for uuid, definition in changes:
            with lock:
                entry = entries[uuid]
                entry.lock.acquire()
            entry.definition = definition
            entry.lock.release()

    def define(self, added: Sequence[tuple[bytes, str, DomainDef]]) -> None:
        lock, by_uuid, by_name = self.lock, self.by_uuid, self.by_name
        for uuid, name, definition in added:
            with lock:
                if uuid in by_uuid or name in by_name:
                    raise ValueError("exists")
                by_uuid[uuid] = by_name[name] = Entry(uuid, name, -1, 5, definition)

    def remove(self, uuids: Sequence[bytes]) -> None:
        lock, by_uuid, by_name = self.lock, self.by_uuid, self.by_name
        for uuid in uuids:
            with lock:
                entry = by_uuid[uuid]
                with entry.lock:
                    del by_uuid[uuid], by_name[entry.name]

    def by_id(self, ids: Sequence[int]) -> int:
        lock, entries = self.lock, self.ids
        for id in ids:
            with lock:
                entry = entries[id]
                entry.lock.acquire()
            state = entry.state
            entry.lock.release()
        return state

    def miss(self, uuids: Sequence[bytes]) -> None:
        lock, entries = self.lock, self.by_uuid
        for uuid in uuids:
            with lock:
                assert entries.get(uuid) is None

    def rows(self) -> list[Row]:
        with self.lock:
            return [(entry.id, entry.name, entry.state) for entry in self.by_uuid.values()]

    def peek(self, uuids: Sequence[bytes]) -> int:
        entries = self.by_uuid
        for uuid in uuids:
            state = entries[uuid].state
        return state

    def read_data(self, uuids: Sequence[bytes]) -> Any:
        lock, entries = self.lock, self.by_uuid
        for uuid in uuids:
            with lock:
                entry = entries[uuid]
                entry.lock.acquire()
            value = entry.data
            entry.lock.release()
        return value

    def change_data(self, uuids: Sequence[bytes], value: Any) -> None:
        lock, entries = self.lock, self.by_uuid
        for uuid in uuids:
            with lock:
                entry = entries[uuid]
                entry.lock.acquire()
            entry.data = dict(value)  # one that nobody else counts in
            entry.lock.release()

    def increment(self, uuids: Sequence[bytes]) -> None:
        lock, entries = self.lock, self.by_uuid
        for uuid in uuids:
            with lock:
                entry = entries[uuid]
                entry.lock.acquire()
            entry.data["requests"] += 1
            entry.lock.release()
