"""A row of ``domains`` as a `DomainInfo`.

A list of ten thousand is a row each and nothing more: a value is decoded when it is asked for.
Definitions are decoded once for each version of a record: they are immutable, and the version
stands in the row.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from uuid import UUID

from ..rules.info import TAKEN_WITHOUT, Describe, DomainInfo, reason_of
from ..rules.values import decode_data
from ..rules.work import Work
from ..states import DomainState
from ..xml.definition import DomainDef
from .session import Row, big, integer, text

COLUMNS = (
    "d.record, d.uuid, d.name, d.id, d.state, d.reason, d.persistent, d.autostart, d.pid, "
    "d.started, d.host, d.version, d.defined, d.data, d.work"
)
WIDTH = 15
"""How many these are. A row with definitions has two more: ``typed`` and ``next_typed``."""
_VERSION, _DEFINED, _DATA, _WORK, _TYPED, _NEXT = range(11, 17)

Typed = tuple[bytes, bytes | None]
"""Definition and next definition, in MessagePack."""

Decoded = tuple[DomainDef, DomainDef | None]
Load = Callable[[int, int], Decoded]


class Definitions:
    """The definitions that were decoded last, by record and version, each with what it was decoded
    from: a failover to an asynchronous standby gives versions twice."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[int, int], tuple[Typed, Decoded]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, record: int, version: int) -> Decoded | None:
        kept = self._kept.get((record, version))
        return None if kept is None else kept[1]

    def decoded(self, record: int, version: int, typed: Typed) -> Decoded:
        kept = self._kept.get((record, version))
        if kept is not None and kept[0] == typed:
            return kept[1]
        live, successor = typed
        found = (
            DomainDef.decode(live),
            None if successor is None else DomainDef.decode(successor),
        )
        self.put(record, version, typed, found)
        return found

    def put(self, record: int, version: int, typed: Typed, found: Decoded) -> None:
        """Remember what a version of a record has."""
        with self._lock:
            self._kept[record, version] = typed, found
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)


class Source:
    """Where infos come from: how to say who holds a job, and how to get at definitions. One for
    each life of the server: what a version is in another one is not known."""

    def __init__(self, describe: Describe, load: Load, life: int) -> None:
        """`load` gives the definitions of a record and version that the caller has locked."""
        self.describe, self.load, self.life = describe, load, life
        self.definitions = Definitions()


class PostgresInfo(DomainInfo):
    """The committed state of one domain, from one row. See `DomainInfo`."""

    __slots__ = ("_died", "_row", "_source", "_token")

    _row: Row
    _source: Source | None
    _token: int
    _died: int | None

    @classmethod
    def of(
        cls, row: Row, source: Source | None, token: int = 0, died: int | None = None
    ) -> PostgresInfo:
        """From the `COLUMNS`, perhaps with definitions. Without a `source` they cannot be asked
        for, nor can `data` and `jobs`."""
        made = object.__new__(cls)
        _put_row(made, row)
        _put_source(made, source)
        _put_token(made, token)
        _put_died(made, died)
        _put_blobs(made, None)
        return made

    # --- the columns ---

    @property
    def _record(self) -> int:
        return big(self._row[0])

    @property
    def uuid(self) -> UUID:  # type: ignore[override]
        return UUID(bytes=self._row[1])

    @property
    def name(self) -> str:  # type: ignore[override]
        return text(self._row[2])

    @property
    def id(self) -> int:  # type: ignore[override]
        return integer(self._row[3])

    @property
    def state(self) -> DomainState:  # type: ignore[override]
        return _STATES[self._row[4]]

    @property
    def reason(self) -> int:  # type: ignore[override]
        return reason_of(self.state, integer(self._row[5]))

    @property
    def persistent(self) -> bool:  # type: ignore[override]
        return self._row[6] == b"\1"

    @property
    def autostart(self) -> bool:  # type: ignore[override]
        return self._row[7] == b"\1"

    @property
    def pid(self) -> int | None:  # type: ignore[override]
        pid = self._row[8]
        return None if pid is None else integer(pid)

    @property
    def _started(self) -> int:  # type: ignore[override]
        return big(self._row[9])

    @property
    def host(self) -> str | None:  # type: ignore[override]
        host = self._row[10]
        return None if host is None else host.decode()

    @property
    def _version(self) -> int:
        return big(self._row[_VERSION])

    @property
    def _defined(self) -> int:
        """The version in which a definition last changed."""
        return big(self._row[_DEFINED])

    @property
    def _work(self) -> Work | None:  # type: ignore[override]
        work = self._row[_WORK]
        return None if work is None else Work.decode(work)

    @property
    def _describe(self) -> Describe | None:  # type: ignore[override]
        return None if self._source is None else self._source.describe

    # --- the blobs ---

    @property
    def data(self) -> Any:
        """The driver's own data, or None."""
        if self._source is None:
            raise AttributeError(TAKEN_WITHOUT)
        packed = self._row[_DATA]
        return None if packed is None else decode_data(packed)

    def _taken(self) -> tuple[DomainDef, DomainDef | None, Any]:
        found = self._blobs
        if found is None:
            found = (*self._definitions(), self.data)
            _put_blobs(self, found)
        return found

    def _definitions(self) -> tuple[DomainDef, DomainDef | None]:
        source, row = self._source, self._row
        if source is None:
            raise AttributeError(TAKEN_WITHOUT)
        if len(row) == WIDTH:
            return source.load(self._record, self._defined)
        live = row[_TYPED]
        assert live is not None
        return source.definitions.decoded(self._record, self._defined, (live, row[_NEXT]))

    # --- for its holder ---

    def changed(self, changes: dict[str, Any]) -> PostgresInfo:
        """The state after its holder committed these changes, with no definitions in the row."""
        row = list(self._row[:WIDTH])
        for field, value in changes.items():
            if field in _ENCODED:
                place, encode = _ENCODED[field]
                row[place] = None if value is None else encode(value)
        row[_VERSION] = _big(self._version + 1)
        if "definition" in changes or "next_definition" in changes:
            row[_DEFINED] = row[_VERSION]
        return PostgresInfo.of(tuple(row), self._source, self._token, self._died)

    def locked_as(self, token: int) -> PostgresInfo:
        """The same, locked again."""
        return PostgresInfo.of(self._row, self._source, token, self._died)


# `DomainInfo` refuses assignment; a slot's descriptor does not ask it.
_put_row = PostgresInfo.__dict__["_row"].__set__
_put_source = PostgresInfo.__dict__["_source"].__set__
_put_token = PostgresInfo.__dict__["_token"].__set__
_put_died = PostgresInfo.__dict__["_died"].__set__
_put_blobs = DomainInfo.__dict__["_blobs"].__set__

_big = struct.Struct(">q").pack
_integer = struct.Struct(">i").pack
_small = struct.Struct(">h").pack


_STATES: dict[bytes | None, DomainState] = {_small(state): state for state in DomainState}


def _truth(value: bool) -> bytes:
    return b"\1" if value else b"\0"


_ENCODED: dict[str, tuple[int, Callable[[Any], bytes]]] = {
    "name": (2, str.encode),
    "id": (3, _integer),
    "state": (4, _small),
    "reason": (5, _integer),
    "persistent": (6, _truth),
    "autostart": (7, _truth),
    "pid": (8, _integer),
    "started": (9, _big),
    "host": (10, str.encode),
    "data": (_DATA, bytes),
    "work": (_WORK, bytes),
}


def new_row(
    record: bytes, uuid: UUID, name: str, state: int, persistent: bool, work: bytes | None
) -> Row:
    """The row of a domain that was just inserted."""
    one, zero, inactive = _big(1), _big(0), _integer(-1)
    first = (record, uuid.bytes, name.encode(), inactive, _small(state), _integer(0))
    flags = (_truth(persistent), _truth(False))
    return (*first, *flags, None, zero, None, one, one, None, work)
