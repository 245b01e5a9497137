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
from .session import big

COLUMNS = (
    "d.record, d.uuid, d.id, d.reason, d.version, d.defined, d.started, d.state, d.persistent, "
    "d.autostart, d.name, d.pid, d.host, d.data, d.work"
)
"""What is read of a domain, as one composite value; those that can be null come last."""
WIDTH = 15
"""How many these are. With definitions there are two more: ``typed`` and ``next_typed``."""
(_RECORD, _UUID, _ID, _REASON, _VERSION, _DEFINED, _STARTED, _STATE, _PERSISTENT, _AUTOSTART) = (
    range(10)
)
_NAME, _PID, _HOST, _DATA, _WORK, _TYPED, _NEXT = range(10, 17)

# Each field comes with 8 bytes before it: its type and its size.
_HEAD = struct.Struct(">8xq8x16s8xi8xi8xq8xq8xq8xh8x?8x?")
_SIZE = struct.Struct(">4xi")
_FIRST = 4  # after the number of fields
LOCKED = struct.Struct(">4x8x?8xh8xq")
"""How the answer to a lock begins (the type ``locked``): whether it waited, 1, the token."""


def unpacked(packed: bytes, at: int = _FIRST) -> list[Any]:
    """The `COLUMNS` from there on, and what comes after them."""
    values = list(_HEAD.unpack_from(packed, at))
    at += _HEAD.size
    size_at, end = _SIZE.unpack_from, len(packed)
    while at < end:
        [size] = size_at(packed, at)
        at += 8
        if size < 0:
            values.append(None)
        else:
            values.append(packed[at : at + size])
            at += size
    values[_NAME] = values[_NAME].decode()
    if values[_PID] is not None:
        values[_PID] = int.from_bytes(values[_PID], "big", signed=True)
    if values[_HOST] is not None:
        values[_HOST] = values[_HOST].decode()
    return values


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

    __slots__ = ("_all", "_died", "_packed", "_source", "_token")

    _packed: bytes
    _all: list[Any] | None
    """The values of `COLUMNS`, perhaps with definitions, when one was asked for."""
    _source: Source | None
    _token: int
    _died: int | None

    @classmethod
    def of(cls, packed: bytes | None, source: Source | None) -> PostgresInfo:
        """From the `COLUMNS`, perhaps with definitions, as one value. Without a `source` they
        cannot be asked for, nor can `data` and `jobs`."""
        assert packed is not None
        made = object.__new__(cls)
        _put_packed(made, packed)
        _put_all(made, None)
        _put_source(made, source)
        _put_blobs(made, None)
        return made

    @classmethod
    def held(
        cls, values: list[Any], source: Source | None, token: int, died: int | None = None
    ) -> PostgresInfo:
        """What a holder read, or committed."""
        made = object.__new__(cls)
        _put_all(made, values)
        _put_source(made, source)
        _put_token(made, token)
        _put_died(made, died)
        _put_blobs(made, None)
        return made

    @classmethod
    def locked(cls, answer: bytes, source: Source | None) -> PostgresInfo:
        """From the answer to a lock that was got."""
        _, _, token = LOCKED.unpack_from(answer)
        values = unpacked(answer, LOCKED.size)
        died = values.pop()
        return cls.held(values, source, token, None if died is None else big(died))

    def _values(self) -> list[Any]:
        values = self._all
        if values is None:
            values = unpacked(self._packed)
            _put_all(self, values)
        return values

    # --- the columns ---

    @property
    def _record(self) -> int:
        return (self._all or self._values())[_RECORD]  # type: ignore[no-any-return]

    @property
    def uuid(self) -> UUID:  # type: ignore[override]
        return UUID(bytes=self._values()[_UUID])

    @property
    def name(self) -> str:  # type: ignore[override]
        return (self._all or self._values())[_NAME]  # type: ignore[no-any-return]

    @property
    def id(self) -> int:  # type: ignore[override]
        return (self._all or self._values())[_ID]  # type: ignore[no-any-return]

    @property
    def state(self) -> DomainState:  # type: ignore[override]
        return _STATES[(self._all or self._values())[_STATE]]

    @property
    def reason(self) -> int:  # type: ignore[override]
        return reason_of(self.state, self._values()[_REASON])

    @property
    def persistent(self) -> bool:  # type: ignore[override]
        return self._values()[_PERSISTENT]  # type: ignore[no-any-return]

    @property
    def autostart(self) -> bool:  # type: ignore[override]
        return self._values()[_AUTOSTART]  # type: ignore[no-any-return]

    @property
    def pid(self) -> int | None:  # type: ignore[override]
        return self._values()[_PID]  # type: ignore[no-any-return]

    @property
    def _started(self) -> int:  # type: ignore[override]
        return self._values()[_STARTED]  # type: ignore[no-any-return]

    @property
    def host(self) -> str | None:  # type: ignore[override]
        return self._values()[_HOST]  # type: ignore[no-any-return]

    @property
    def _version(self) -> int:
        return (self._all or self._values())[_VERSION]  # type: ignore[no-any-return]

    @property
    def _defined(self) -> int:
        """The version in which a definition last changed."""
        return self._values()[_DEFINED]  # type: ignore[no-any-return]

    @property
    def _work(self) -> Work | None:  # type: ignore[override]
        work = (self._all or self._values())[_WORK]
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
        packed = self._values()[_DATA]
        return None if packed is None else decode_data(packed)

    def _taken(self) -> tuple[DomainDef, DomainDef | None, Any]:
        found = self._blobs
        if found is None:
            found = (*self._definitions(), self.data)
            _put_blobs(self, found)
        return found

    def _definitions(self) -> tuple[DomainDef, DomainDef | None]:
        source, values = self._source, self._values()
        if source is None:
            raise AttributeError(TAKEN_WITHOUT)
        if len(values) == WIDTH:
            return source.load(self._record, self._defined)
        typed = values[_TYPED], values[_NEXT]
        return source.definitions.decoded(self._record, self._defined, typed)

    # --- for its holder ---

    def changed(self, changes: dict[str, Any]) -> PostgresInfo:
        """The state after its holder committed these changes, with no definitions in it."""
        values = self._values()[:WIDTH]
        for field, value in changes.items():
            place = _PLACES.get(field)
            if place is not None:
                values[place] = value
        values[_VERSION] += 1
        if "definition" in changes or "next_definition" in changes:
            values[_DEFINED] = values[_VERSION]
        return PostgresInfo.held(values, self._source, self._token, self._died)

    def locked_as(self, token: int) -> PostgresInfo:
        """The same, locked again."""
        return PostgresInfo.held(self._values(), self._source, token, self._died)


# `DomainInfo` refuses assignment; a slot's descriptor does not ask it.
_put_packed = PostgresInfo.__dict__["_packed"].__set__
_put_all = PostgresInfo.__dict__["_all"].__set__
_put_source = PostgresInfo.__dict__["_source"].__set__
_put_token = PostgresInfo.__dict__["_token"].__set__
_put_died = PostgresInfo.__dict__["_died"].__set__
_put_blobs = DomainInfo.__dict__["_blobs"].__set__

_STATES: dict[int, DomainState] = {int(state): state for state in DomainState}
_PLACES = {
    "name": _NAME,
    "id": _ID,
    "state": _STATE,
    "reason": _REASON,
    "persistent": _PERSISTENT,
    "autostart": _AUTOSTART,
    "pid": _PID,
    "started": _STARTED,
    "host": _HOST,
    "data": _DATA,
    "work": _WORK,
}


def new_values(
    record: int, uuid: UUID, name: str, state: int, persistent: bool, work: bytes | None
) -> list[Any]:
    """Of a domain that was just inserted."""
    first = [record, uuid.bytes, -1, 0, 1, 1, 0, state, persistent, False]
    return [*first, name, None, None, None, work]
