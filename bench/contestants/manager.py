"""A manager of `multiprocessing`: the domains live in its process, others reach it over a socket.

A class of its own is registered there, as the documentation shows under customized managers, so
that an operation is one round trip; with `manager.dict()` and `manager.Lock()` it would be three.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from multiprocessing import util
from multiprocessing.managers import BaseManager
from typing import Any

import psutil

from ..world import RUNNING, Made
from .base import Contestant, Row
from .in_process import Entry


class Domains:
    """What lives in the manager's process. Its lock guards the dicts, a domain's its fields."""

    def __init__(self) -> None:
        self.by_uuid: dict[bytes, Entry] = {}
        self.by_name: dict[str, Entry] = {}
        self.ids: dict[int, Entry] = {}

    def add(self, uuid: bytes, name: str, id: int, state: int, definition: Any) -> None:
        entry = Entry(uuid, name, id, state, definition)
        if self.by_uuid.setdefault(uuid, entry) is not entry:
            raise ValueError("exists")
        self.by_name[name] = entry
        if id >= 0:
            self.ids[id] = entry

    def state(self, uuid: bytes) -> int | None:
        entry = self.by_uuid.get(uuid)
        if entry is None:
            return None
        with entry.lock:
            return entry.state

    def state_by_id(self, id: int) -> int:
        with self.ids[id].lock:
            return self.ids[id].state

    def definition(self, name: str) -> Any:
        entry = self.by_name[name]
        with entry.lock:
            return entry.definition

    def set_state(self, uuid: bytes, state: int) -> None:
        entry = self.by_uuid[uuid]
        with entry.lock:
            entry.state = state

    def set_definition(self, uuid: bytes, definition: Any) -> None:
        entry = self.by_uuid[uuid]
        with entry.lock:
            entry.definition = definition

    def remove(self, uuid: bytes) -> None:
        entry = self.by_uuid[uuid]
        with entry.lock:
            del self.by_uuid[uuid], self.by_name[entry.name]

    def rows(self) -> list[Row]:
        return [(entry.id, entry.name, entry.state) for entry in list(self.by_uuid.values())]

    def data(self, uuid: bytes) -> Any:
        entry = self.by_uuid[uuid]
        with entry.lock:
            return entry.data

    def set_data(self, uuid: bytes, value: Any) -> None:
        entry = self.by_uuid[uuid]
        with entry.lock:
            entry.data = value

    def increment(self, uuid: bytes) -> None:
        entry = self.by_uuid[uuid]
        with entry.lock:
            entry.data = {**entry.data, "requests": entry.data["requests"] + 1}

    def lock(self, uuid: bytes) -> None:
        self.by_uuid[uuid].lock.acquire()

    def unlock(self, uuid: bytes) -> None:
        self.by_uuid[uuid].lock.release()

    def pid(self) -> int:
        return os.getpid()


_domains = Domains()


class _Manager(BaseManager):
    pass


_Manager.register(
    "domains", callable=lambda: _domains, exposed=[name for name in vars(Domains) if name[0] != "_"]
)


class Manager(Contestant):
    name = "multiprocessing.Manager"
    most = 10_000
    empty = 0

    def fill(self, domains: Iterable[Made], count: int) -> None:
        self.manager = _Manager(ctx=multiprocessing.get_context("fork"))
        self.manager.start()
        self.address, self.key = self.manager.address, multiprocessing.current_process().authkey
        self.attach()
        self.empty = self.footprint()
        for id, made in enumerate(domains, self.first_id):
            plain = self.prepare(made.definition)
            self.call("add", (made.uuid, made.name, id, RUNNING, plain))

    def attach(self) -> None:
        # What multiprocessing does in children that it forks itself: the connection of the parent
        # is forgotten, and kept from being closed with a good-bye.
        self.inherited = vars(self).get("proxy")
        if self.inherited is not None:
            util._run_after_forkers()  # type: ignore[attr-defined]
        client = _Manager(self.address, authkey=bytes(self.key))
        client.connect()
        self.proxy: Any = client.domains()  # type: ignore[attr-defined]
        self.call = self.proxy._callmethod

    def close(self) -> None:
        self.manager.shutdown()

    def read_state(self, uuids: Sequence[bytes]) -> int:
        call = self.call
        for uuid in uuids:
            state: int = call("state", (uuid,))
        return state

    def read_definition(self, names: Sequence[str]) -> Any:
        call = self.call
        for name in names:
            definition = call("definition", (name,))
        return definition

    def change_state(self, uuids: Sequence[bytes], state: int) -> None:
        call = self.call
        for uuid in uuids:
            call("set_state", (uuid, state))

    def replace(self, changes: Sequence[tuple[bytes, Any]]) -> None:
        call = self.call
        for change in changes:
            call("set_definition", change)

    def define(self, added: Sequence[tuple[bytes, str, Any]]) -> None:
        call = self.call
        for uuid, name, definition in added:
            call("add", (uuid, name, -1, 5, definition))

    def remove(self, uuids: Sequence[bytes]) -> None:
        call = self.call
        for uuid in uuids:
            call("remove", (uuid,))

    def by_id(self, ids: Sequence[int]) -> int:
        call = self.call
        for id in ids:
            state: int = call("state_by_id", (id,))
        return state

    def miss(self, uuids: Sequence[bytes]) -> None:
        call = self.call
        for uuid in uuids:
            assert call("state", (uuid,)) is None

    def rows(self) -> list[Row]:
        found: list[Row] = self.call("rows")
        return found

    def read_data(self, uuids: Sequence[bytes]) -> Any:
        call = self.call
        for uuid in uuids:
            value = call("data", (uuid,))
        return value

    def change_data(self, uuids: Sequence[bytes], value: Any) -> None:
        call = self.call
        for uuid in uuids:
            call("set_data", (uuid, value))

    def increment(self, uuids: Sequence[bytes]) -> None:
        call = self.call
        for uuid in uuids:
            call("increment", (uuid,))

    def hold(self, uuid: bytes) -> None:
        self.call("lock", (uuid,))

    def take(self, uuid: bytes) -> None:
        self.call("lock", (uuid,))
        self.call("unlock", (uuid,))

    def footprint(self) -> int:
        uss = int(psutil.Process(self.call("pid")).memory_full_info().uss)
        return uss - self.empty
