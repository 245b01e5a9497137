"""`multiprocessing.shared_memory`, `multiprocessing.Lock`s and msgpack, put together by hand.

Records of a fixed size lie in one shared memory: small fields as a struct, the driver's data and
the definition as msgpack, each in room of its own. Every process has its own dicts from keys to
records, which it brings up to date from a journal in the shared memory while it holds the list
lock, so finding is the patch's form. A record has a lock of its own up to `LOCKS` of them (each
maps a page, and a process can map 65,530); beyond that, records share them.
"""

from __future__ import annotations

import multiprocessing
import struct
from collections.abc import Iterable, Sequence
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import Lock
from typing import Any

import msgpack

from ..world import RUNNING, Made
from .base import Contestant, Row, pack_data, unpack_data

LOCKS = 16_384
RECORD = 6656
HEAD = struct.Struct("<q i i 16s i 64s i i")  # life, state, id, uuid, name, definition, data
LIFE = struct.Struct("<q")
STATE = struct.Struct("<i")  # and how many bytes a definition and the data have
AT_LIFE, AT_STATE, AT_DEFINITION, AT_DATA = 0, 8, 100, 104
DATA = HEAD.size  # where the data begins
DEFINITION = DATA + 2560
JOURNAL = 1 << 20  # entries that the journal holds; whoever is further behind reads all records


class HandMade(Contestant):
    name = "shared_memory by hand"
    most = 100_000
    quick = 100_000

    def fill(self, domains: Iterable[Made], count: int) -> None:
        self.slots = count + 10_000
        self.base = 64 + 4 * JOURNAL
        self.memory = SharedMemory(create=True, size=self.base + self.slots * RECORD)
        assert self.memory.buf is not None
        self.buf: memoryview = self.memory.buf
        self.changes = self.buf[:8].cast("Q")
        self.used = self.buf[8:16].cast("Q")
        self.journal = self.buf[64 : self.base].cast("I")
        context = multiprocessing.get_context("fork")
        self.list_lock = context.Lock()
        self.locks: list[Lock] = [context.Lock() for _ in range(min(self.slots, LOCKS))]
        self.seen = 0
        self.by_uuid: dict[bytes, int] = {}
        self.by_name: dict[str, int] = {}
        self.ids: dict[int, int] = {}
        self.free: list[int] = []
        for id, made in enumerate(domains, self.first_id):
            packed = msgpack.packb(self.prepare(made.definition))
            self._insert(made.uuid, made.name, id, RUNNING, packed)
        self._follow()

    def close(self) -> None:
        for view in (self.changes, self.used, self.journal, self.buf):
            view.release()
        self.memory.close()
        self.memory.unlink()

    # --- records: list lock held ---

    def _insert(self, uuid: bytes, name: str, id: int, state: int, packed: bytes) -> None:
        if self.free:
            slot = self.free.pop()
        else:
            slot = self.used[0]
            self.used[0] += 1
        at = self.base + slot * RECORD
        text = name.encode()
        HEAD.pack_into(self.buf, at, 1, state, id, uuid, len(text), text, len(packed), 0)
        begin = at + DEFINITION
        self.buf[begin : begin + len(packed)] = packed
        self._note(slot)

    def _note(self, slot: int) -> None:
        self.journal[self.changes[0] % JOURNAL] = slot
        self.changes[0] += 1

    def _follow(self) -> None:
        changes = self.changes[0]
        if changes - self.seen > JOURNAL:
            slots: Iterable[int] = range(self.used[0])
        else:
            slots = [self.journal[number % JOURNAL] for number in range(self.seen, changes)]
        for slot in slots:
            at = self.base + slot * RECORD
            life, _state, id, uuid, size, name, *_ = HEAD.unpack_from(self.buf, at)
            text = name[:size].decode()
            if life:
                self.by_uuid[uuid] = self.by_name[text] = slot
                if id >= 0:
                    self.ids[id] = slot
            elif self.by_uuid.get(uuid) == slot:
                del self.by_uuid[uuid], self.by_name[text]
                self.ids.pop(id, None)
        self.seen = changes

    def _find(self, index: dict[Any, int], key: Any) -> tuple[Lock, int]:
        """The lock, held, and the place of the record."""
        with self.list_lock:
            if self.changes[0] != self.seen:
                self._follow()
            slot = index[key]
            lock = self.locks[slot % LOCKS]
            lock.acquire()
        return lock, self.base + slot * RECORD

    # --- operations ---

    def read_state(self, uuids: Sequence[bytes]) -> int:
        find, index, buf, unpack = self._find, self.by_uuid, self.buf, STATE.unpack_from
        for uuid in uuids:
            lock, at = find(index, uuid)
            state: int = unpack(buf, at + AT_STATE)[0]
            lock.release()
        return state

    def read_definition(self, names: Sequence[str]) -> Any:
        find, index, buf = self._find, self.by_name, self.buf
        size, begin, unpack = AT_DEFINITION, DEFINITION, msgpack.unpackb
        for name in names:
            lock, at = find(index, name)
            length = STATE.unpack_from(buf, at + size)[0]
            packed = bytes(buf[at + begin : at + begin + length])
            lock.release()
            definition = unpack(packed)
        return definition

    def change_state(self, uuids: Sequence[bytes], state: int) -> None:
        find, index, buf, pack = self._find, self.by_uuid, self.buf, STATE.pack_into
        for uuid in uuids:
            lock, at = find(index, uuid)
            pack(buf, at + AT_STATE, state)
            lock.release()

    def replace(self, changes: Sequence[tuple[bytes, Any]]) -> None:
        find, index, buf, begin = self._find, self.by_uuid, self.buf, DEFINITION
        for uuid, definition in changes:
            packed = msgpack.packb(definition)
            lock, at = find(index, uuid)
            buf[at + begin : at + begin + len(packed)] = packed
            STATE.pack_into(buf, at + AT_DEFINITION, len(packed))
            lock.release()

    def define(self, added: Sequence[tuple[bytes, str, Any]]) -> None:
        for uuid, name, definition in added:
            packed = msgpack.packb(definition)
            with self.list_lock:
                self._follow()
                if uuid in self.by_uuid or name in self.by_name:
                    raise ValueError("exists")
                self._insert(uuid, name, -1, 5, packed)
                self._follow()

    def remove(self, uuids: Sequence[bytes]) -> None:
        for uuid in uuids:
            with self.list_lock:
                self._follow()
                slot = self.by_uuid[uuid]
                with self.locks[slot % LOCKS]:
                    LIFE.pack_into(self.buf, self.base + slot * RECORD + AT_LIFE, 0)
                self._note(slot)
                self._follow()
                self.free.append(slot)

    def by_id(self, ids: Sequence[int]) -> int:
        find, index, buf, unpack = self._find, self.ids, self.buf, STATE.unpack_from
        for id in ids:
            lock, at = find(index, id)
            state: int = unpack(buf, at + AT_STATE)[0]
            lock.release()
        return state

    def miss(self, uuids: Sequence[bytes]) -> None:
        for uuid in uuids:
            with self.list_lock:
                if self.changes[0] != self.seen:
                    self._follow()
                assert uuid not in self.by_uuid

    def rows(self) -> list[Row]:
        found = []
        for slot in range(self.used[0]):
            with self.locks[slot % LOCKS]:
                head = HEAD.unpack_from(self.buf, self.base + slot * RECORD)
            if head[0]:
                found.append((head[2], head[5][: head[4]].decode(), head[1]))
        return found

    def read_data(self, uuids: Sequence[bytes]) -> Any:
        find, index, buf = self._find, self.by_uuid, self.buf
        size, begin, unpack = AT_DATA, DATA, unpack_data
        for uuid in uuids:
            lock, at = find(index, uuid)
            length = STATE.unpack_from(buf, at + size)[0]
            packed = bytes(buf[at + begin : at + begin + length])
            lock.release()
            value = unpack(packed)
        return value

    def change_data(self, uuids: Sequence[bytes], value: Any) -> None:
        find, index, buf = self._find, self.by_uuid, self.buf
        size, begin, pack = AT_DATA, DATA, pack_data
        for uuid in uuids:
            packed = pack(value)
            lock, at = find(index, uuid)
            buf[at + begin : at + begin + len(packed)] = packed
            STATE.pack_into(buf, at + size, len(packed))
            lock.release()

    def increment(self, uuids: Sequence[bytes]) -> None:
        find, index, buf = self._find, self.by_uuid, self.buf
        size, begin, pack, unpack = AT_DATA, DATA, pack_data, unpack_data
        for uuid in uuids:
            lock, at = find(index, uuid)
            start = at + begin
            value = unpack(buf[start : start + STATE.unpack_from(buf, at + size)[0]])
            value["requests"] += 1
            packed = pack(value)
            buf[start : start + len(packed)] = packed
            STATE.pack_into(buf, at + size, len(packed))
            lock.release()

    def hold(self, uuid: bytes) -> None:
        self._find(self.by_uuid, uuid)

    def take(self, uuid: bytes) -> None:
        with self.locks[self.by_uuid[uuid] % LOCKS]:
            pass

    def footprint(self) -> int:
        # What was touched of the shared memory, and the page that each lock maps.
        touched = self.base + self.used[0] * RECORD
        return touched + 4096 * len(self.locks)
