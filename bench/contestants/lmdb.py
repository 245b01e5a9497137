"""LMDB on tmpfs, without syncing, with a writable map: the fastest that its documentation offers.

Small fields, the driver's data and definitions lie in databases of their own, so that a change of
one does not copy the others; names and ids lead to UUIDs. A read is a read transaction, which takes
no lock and sees one moment; a change is a write transaction, of which there is one at a time for
all domains.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import msgpack

from ..world import RUNNING, Made
from .base import Contestant, Row, drop, lacks, memory_folder, pack_data, unpack_data

FIELDS = struct.Struct("<ii")  # state, id; the name follows
ID = struct.Struct(">i")


class Lmdb(Contestant):
    name = "LMDB"
    quick = 100_000
    packages = ("lmdb",)

    @classmethod
    def missing(cls) -> str | None:
        return lacks("lmdb", "lmdb")

    def fill(self, domains: Iterable[Made], count: int) -> None:
        self.folder = memory_folder()
        self.size = 64_000_000 + 12_000 * count
        self._open()
        with self.env.begin(write=True) as txn:
            for id, made in enumerate(domains, self.first_id):
                self._put(txn, made.uuid, made.name, id, RUNNING, self.prepare(made.definition))

    def attach(self) -> None:
        self.env.close()  # only forgets what was inherited
        self._open()

    def _open(self) -> None:
        import lmdb

        self.env = lmdb.open(
            self.folder,
            map_size=self.size,
            max_dbs=5,
            sync=False,
            metasync=False,
            writemap=True,
            map_async=True,
        )
        self.fields = self.env.open_db(b"fields")
        self.data = self.env.open_db(b"data")
        self.definitions = self.env.open_db(b"definitions")
        self.names = self.env.open_db(b"names")
        self.ids = self.env.open_db(b"ids")

    def close(self) -> None:
        self.env.close()
        drop(self.folder)

    def _put(self, txn: Any, uuid: bytes, name: str, id: int, state: int, definition: Any) -> None:
        text = name.encode()
        if not txn.put(uuid, FIELDS.pack(state, id) + text, db=self.fields, overwrite=False):
            raise ValueError("exists")
        if not txn.put(text, uuid, db=self.names, overwrite=False):
            raise ValueError("exists")
        txn.put(uuid, msgpack.packb(definition), db=self.definitions)
        if id >= 0:
            txn.put(ID.pack(id), uuid, db=self.ids)

    def read_state(self, uuids: Sequence[bytes]) -> int:
        begin, fields, unpack = self.env.begin, self.fields, FIELDS.unpack_from
        for uuid in uuids:
            with begin(db=fields, buffers=True) as txn:
                state: int = unpack(txn.get(uuid))[0]
        return state

    def read_definition(self, names: Sequence[str]) -> Any:
        begin, definitions, unpack = self.env.begin, self.definitions, msgpack.unpackb
        for name in names:
            with begin(db=self.names, buffers=True) as txn:
                definition = unpack(txn.get(txn.get(name.encode()), db=definitions))
        return definition

    def change_state(self, uuids: Sequence[bytes], state: int) -> None:
        begin, fields, pack, unpack = self.env.begin, self.fields, FIELDS.pack, FIELDS.unpack_from
        size = FIELDS.size
        for uuid in uuids:
            with begin(db=fields, write=True) as txn:
                was = txn.get(uuid)
                txn.put(uuid, pack(state, unpack(was)[1]) + was[size:])

    def replace(self, changes: Sequence[tuple[bytes, Any]]) -> None:
        begin, definitions, pack = self.env.begin, self.definitions, msgpack.packb
        for uuid, definition in changes:
            packed = pack(definition)
            with begin(db=definitions, write=True) as txn:
                txn.put(uuid, packed)

    def define(self, added: Sequence[tuple[bytes, str, Any]]) -> None:
        for uuid, name, definition in added:
            with self.env.begin(write=True) as txn:
                self._put(txn, uuid, name, -1, 5, definition)

    def remove(self, uuids: Sequence[bytes]) -> None:
        for uuid in uuids:
            with self.env.begin(write=True) as txn:
                was = txn.pop(uuid, db=self.fields)
                txn.delete(was[FIELDS.size :], db=self.names)
                txn.delete(uuid, db=self.definitions)
                txn.delete(uuid, db=self.data)
                id = FIELDS.unpack_from(was)[1]
                if id >= 0:
                    txn.delete(ID.pack(id), db=self.ids)

    def by_id(self, ids: Sequence[int]) -> int:
        begin, index, fields = self.env.begin, self.ids, self.fields
        pack, unpack = ID.pack, FIELDS.unpack_from
        for id in ids:
            with begin(db=fields, buffers=True) as txn:
                state: int = unpack(txn.get(txn.get(pack(id), db=index)))[0]
        return state

    def miss(self, uuids: Sequence[bytes]) -> None:
        begin, fields = self.env.begin, self.fields
        for uuid in uuids:
            with begin(db=fields, buffers=True) as txn:
                assert txn.get(uuid) is None

    def rows(self) -> list[Row]:
        unpack, size = FIELDS.unpack_from, FIELDS.size
        with self.env.begin(db=self.fields) as txn:
            found = []
            for value in txn.cursor().iternext(keys=False):
                state, id = unpack(value)
                found.append((id, value[size:].decode(), state))
        return found

    def read_data(self, uuids: Sequence[bytes]) -> Any:
        begin, data, unpack = self.env.begin, self.data, unpack_data
        for uuid in uuids:
            with begin(db=data, buffers=True) as txn:
                value = unpack(txn.get(uuid))
        return value

    def change_data(self, uuids: Sequence[bytes], value: Any) -> None:
        begin, data, pack = self.env.begin, self.data, pack_data
        for uuid in uuids:
            packed = pack(value)
            with begin(db=data, write=True) as txn:
                txn.put(uuid, packed)

    def increment(self, uuids: Sequence[bytes]) -> None:
        begin, data, pack, unpack = self.env.begin, self.data, pack_data, unpack_data
        for uuid in uuids:
            with begin(db=data, write=True, buffers=True) as txn:
                value = unpack(txn.get(uuid))
                value["requests"] += 1
                txn.put(uuid, pack(value))

    def hold(self, uuid: bytes) -> None:
        self.held = self.env.begin(write=True)

    def take(self, uuid: bytes) -> None:
        self.env.begin(write=True).abort()

    def footprint(self) -> int:
        with self.env.begin() as txn:
            pages = sum(
                stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
                for stat in (
                    txn.stat(db)
                    for db in (self.fields, self.data, self.definitions, self.names, self.ids)
                )
            )
            return int(pages * self.env.stat()["psize"])
