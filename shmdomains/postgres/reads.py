"""What the store reads, without a lock: the last committed state of each domain."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..rules.store import Filter, Key
from ..xml.definition import DomainDef
from . import statements as ask
from .calls import Calls
from .pool import Pool
from .records import PostgresInfo, Source
from .session import (
    Row,
    Statement,
    big,
    double,
    number,
    numbers,
)

UNKEPT = re.compile("[\0\ud800-\udfff]")
"""What a text in PostgreSQL cannot have in it."""


class Reads(Calls):
    """The part of `store.PostgresStore` that finds and reads."""

    def __init__(self, pool: Pool, events_max: int) -> None:
        super().__init__(pool, events_max)
        self._last = Source(self.holders.describe, self._load, pool.life)

    @property
    def _source(self) -> Source:
        """To be taken before what is read: the server may begin another life meanwhile."""
        if self._last.life != self.pool.life:
            self._last = Source(self.holders.describe, self._load, self.pool.life)
        return self._last

    def find(self, key: Key) -> int | None:
        info = self.peek(key)
        return None if info is None else info._record

    def peek(self, key: Key) -> PostgresInfo | None:
        """The committed state of the domain with this key."""
        if nobody_has(key):
            return None
        value = str(key.value).encode()
        return self._one(ask.BY[key.kind], [self._list, value])

    def glance(self, key: Key) -> PostgresInfo | None:
        """`peek`, perhaps at a standby."""
        if nobody_has(key):
            return None
        source = self._source
        rows = self._look_at(ask.BY[key.kind], [self._list, str(key.value).encode()])
        return PostgresInfo.of(rows[0][0], source) if rows else None

    def _one(self, statement: Statement, values: list[bytes | None]) -> PostgresInfo | None:
        source = self._source
        rows = self._read(statement, values)
        return PostgresInfo.of(rows[0][0], source) if rows else None

    def read(self, record: int) -> PostgresInfo | None:
        return self._one(ask.BY["record"], [self._list, number(record)])

    def some(self, records: Iterable[int]) -> list[PostgresInfo]:
        """The committed states of those that are there."""
        source = self._source
        rows = self._read(ask.SOME, [self._list, numbers(records)])
        return [PostgresInfo.of(row, source) for [row] in rows]

    def _all(self, text: str) -> list[Row]:
        return self._read(ask.whole(text, self.pool.list), [])

    def records(self) -> Iterable[int]:
        return [record for record, _ in self.handles()]

    def handles(self) -> list[tuple[int, bytes]]:
        """Each record and its uuid."""
        rows = self._all(ask.RECORDS)
        return [(big(row[0]), row[1] or b"") for row in rows]

    def identity(self, uuid: Any, name: str) -> PostgresInfo | None:
        """Who has this uuid or, if nobody has, this name; without definitions."""
        key = None if uuid is None else str(uuid).encode()
        rows = self._read(ask.IDENTITY, [self._list, key, name.encode()])
        return PostgresInfo.of(rows[0][0], None) if rows else None

    def _wanted(self, text: str, wanted: Filter, order: str = "") -> list[Row]:
        """The rows of those that match. What is not asked for is not in the text: the one plan
        that is kept is right for what is."""
        tests: list[str] = []
        types: list[str] = []
        values: list[bytes | None] = []
        if wanted.active is not None:
            tests.append("d.id <> -1" if wanted.active else "d.id = -1")
        if wanted.persistent is not None:
            tests.append("d.persistent" if wanted.persistent else "NOT d.persistent")
        if wanted.autostart is not None:
            tests.append("d.autostart" if wanted.autostart else "NOT d.autostart")
        if wanted.states is not None:
            types.append("smallint[]")
            tests.append(f"d.state = ANY (${len(types)})")
            values.append(numbers(map(int, wanted.states)))
        if wanted.host is not None:
            types.append("text")
            tests.append(f"d.host = ${len(types)}")
            kept = UNKEPT.search(wanted.host) is None  # else it is nobody's, as is ""
            values.append(wanted.host.encode() if kept else b"")
        text = " AND ".join([text, *tests]) + order
        return self._look_at(ask.whole(text, self.pool.list, *types), values)

    def scan(self, wanted: Filter, definitions: bool) -> list[PostgresInfo]:
        """The committed states of the domains that match, all of one moment."""
        text = ask.SCAN_ALL if definitions else ask.SCAN
        source = self._source if definitions else None
        rows = self._wanted(text, wanted, " ORDER BY d.record")
        return [PostgresInfo.of(row, source) for [row] in rows]

    def count(self, wanted: Filter) -> int:
        return big(self._wanted(ask.COUNT, wanted)[0][0])

    def behind(self) -> float:
        """See `PostgresDomainList.behind`."""
        return double(self._look_at(ask.BEHIND, [])[0][0])

    def with_work(self) -> list[PostgresInfo]:
        """Those in which something is under way, without definitions."""
        source = self._source
        return [PostgresInfo.of(row, source) for [row] in self._all(ask.WITH_WORK)]

    def versions(self) -> dict[int, int]:
        """The version of each record."""
        return {big(row[0]): big(row[1]) for row in self._all(ask.VERSIONS)}

    def _load(self, record: int, version: int) -> tuple[DomainDef, DomainDef | None]:
        """The definitions of a domain that the caller has locked."""
        found = self._source.definitions.get(record, version)
        if found is not None:
            return found
        rows = self._read(ask.TYPED, [number(record)])
        if not rows or rows[0][0] is None:
            raise self.lost(f"record {record} is gone")
        return self._source.definitions.decoded(record, version, (rows[0][0], rows[0][1]))


def nobody_has(key: Key) -> bool:
    if key.kind == "id":
        return not 0 <= int(str(key.value)) < 2**31
    return key.kind == "name" and UNKEPT.search(str(key.value)) is not None
