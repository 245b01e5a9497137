"""sqlite3 of the standard library: WAL, synchronous off, on tmpfs.

One table with indexes on name and id. Reading takes no lock and sees one moment; a change is one
statement, or a transaction begun as a writer's, of which there is one at a time for all domains.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgpack

from ..world import RUNNING, Made
from .base import Contestant, Row, drop, memory_folder, pack_data, unpack_data

TABLE = """CREATE TABLE domains (uuid BLOB PRIMARY KEY, name TEXT UNIQUE NOT NULL,
    id INTEGER UNIQUE, state INTEGER NOT NULL, data BLOB, definition BLOB NOT NULL)"""
INSERT = "INSERT INTO domains VALUES (?, ?, ?, ?, NULL, ?)"
READ_DATA = "SELECT data FROM domains WHERE uuid=?"
CHANGE_DATA = "UPDATE domains SET data=? WHERE uuid=?"


class Sqlite(Contestant):
    name = "SQLite"

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"sqlite": sqlite3.sqlite_version}

    def fill(self, domains: Iterable[Made], count: int) -> None:
        self.folder = memory_folder()
        self.attach()
        execute = self.db.execute
        execute(TABLE)
        execute("BEGIN")
        for id, made in enumerate(domains, self.first_id):
            packed = msgpack.packb(self.prepare(made.definition))
            execute(INSERT, (made.uuid, made.name, id, RUNNING, packed))
        execute("COMMIT")

    def attach(self) -> None:
        self.db = sqlite3.connect(f"{self.folder}/domains", isolation_level=None, timeout=3600)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=OFF")

    def close(self) -> None:
        self.db.close()
        drop(self.folder)

    def read_state(self, uuids: Sequence[bytes]) -> int:
        execute = self.db.execute
        for uuid in uuids:
            found = execute("SELECT state FROM domains WHERE uuid=?", (uuid,)).fetchone()
            state: int = found[0]
        return state

    def read_definition(self, names: Sequence[str]) -> Any:
        execute, unpack = self.db.execute, msgpack.unpackb
        for name in names:
            found = execute("SELECT definition FROM domains WHERE name=?", (name,)).fetchone()
            definition = unpack(found[0])
        return definition

    def change_state(self, uuids: Sequence[bytes], state: int) -> None:
        execute = self.db.execute
        for uuid in uuids:
            execute("UPDATE domains SET state=? WHERE uuid=?", (state, uuid))

    def replace(self, changes: Sequence[tuple[bytes, Any]]) -> None:
        execute, pack = self.db.execute, msgpack.packb
        for uuid, definition in changes:
            execute("UPDATE domains SET definition=? WHERE uuid=?", (pack(definition), uuid))

    def define(self, added: Sequence[tuple[bytes, str, Any]]) -> None:
        execute, pack = self.db.execute, msgpack.packb
        for uuid, name, definition in added:
            execute(INSERT, (uuid, name, None, 5, pack(definition)))

    def remove(self, uuids: Sequence[bytes]) -> None:
        execute = self.db.execute
        for uuid in uuids:
            execute("DELETE FROM domains WHERE uuid=?", (uuid,))

    def by_id(self, ids: Sequence[int]) -> int:
        execute = self.db.execute
        for id in ids:
            state: int = execute("SELECT state FROM domains WHERE id=?", (id,)).fetchone()[0]
        return state

    def miss(self, uuids: Sequence[bytes]) -> None:
        execute = self.db.execute
        for uuid in uuids:
            assert execute("SELECT state FROM domains WHERE uuid=?", (uuid,)).fetchone() is None

    def rows(self) -> list[Row]:
        return self.db.execute("SELECT id, name, state FROM domains").fetchall()

    def read_data(self, uuids: Sequence[bytes]) -> Any:
        execute, unpack = self.db.execute, unpack_data
        for uuid in uuids:
            value = unpack(execute(READ_DATA, (uuid,)).fetchone()[0])
        return value

    def change_data(self, uuids: Sequence[bytes], value: Any) -> None:
        execute, pack = self.db.execute, pack_data
        for uuid in uuids:
            execute(CHANGE_DATA, (pack(value), uuid))

    def increment(self, uuids: Sequence[bytes]) -> None:
        execute, pack, unpack = self.db.execute, pack_data, unpack_data
        for uuid in uuids:
            execute("BEGIN IMMEDIATE")
            value = unpack(execute(READ_DATA, (uuid,)).fetchone()[0])
            value["requests"] += 1
            execute(CHANGE_DATA, (pack(value), uuid))
            execute("COMMIT")

    def hold(self, uuid: bytes) -> None:
        self.db.execute("BEGIN IMMEDIATE")

    def take(self, uuid: bytes) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        self.db.execute("ROLLBACK")

    def footprint(self) -> int:
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return sum(512 * file.stat().st_blocks for file in Path(self.folder).iterdir())
