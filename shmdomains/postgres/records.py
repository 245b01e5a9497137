"""A row of ``domains`` as a `DomainInfo`.

Definitions are decoded when they are asked for, and each version once: they are immutable, and
their version stands in the row.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from uuid import UUID

from ..rules.info import _FIELDS, TAKEN_WITHOUT, Describe, DomainInfo
from ..rules.values import decode_data
from ..rules.work import Work
from ..states import DomainState
from ..xml.definition import DomainDef
from .session import Row, big, integer, small, text

COLUMNS = (
    "d.record, d.uuid, d.name, d.id, d.state, d.reason, d.persistent, d.autostart, d.pid, "
    "d.started, d.host, d.version, d.defined, d.data, d.work"
)
WIDTH = 15

Typed = tuple[bytes, bytes | None]
"""Definition and next definition, in MessagePack."""


class Definitions:
    """The definitions that were decoded last, by record and version."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[int, int], tuple[DomainDef, DomainDef | None]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, record: int, version: int) -> tuple[DomainDef, DomainDef | None] | None:
        return self._kept.get((record, version))

    def decoded(
        self, record: int, version: int, typed: Typed
    ) -> tuple[DomainDef, DomainDef | None]:
        found = self._kept.get((record, version))
        if found is not None:
            return found
        live, successor = typed
        found = (
            DomainDef.decode(live),
            None if successor is None else DomainDef.decode(successor),
        )
        with self._lock:
            self._kept[record, version] = found
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return found


Load = Callable[[int, int], tuple[DomainDef, DomainDef | None]]


class PostgresInfo(DomainInfo):
    """The committed state of one domain, from one row. See `DomainInfo`."""

    __slots__ = ("_data", "_defined", "_died", "_load", "_record", "_token", "_version")

    _record: int
    _version: int
    _defined: int
    _token: int
    _died: int | None
    _data: bytes | None
    _load: Load | None

    @classmethod
    def of(
        cls,
        row: Row,
        load: Load | None,
        describe: Describe,
        token: int = 0,
        died: int | None = None,
    ) -> PostgresInfo:
        """From the `COLUMNS`; `load` gives the definitions of a record and version, ``None`` if
        they were not asked for."""
        state, work, pid = DomainState(small(row[4])), row[14], row[8]
        made = cls(
            id=integer(row[3]),
            name=text(row[2]),
            uuid=UUID(bytes=row[1]),
            state=state,
            reason=integer(row[5]),
            persistent=row[6] == b"\1",
            autostart=row[7] == b"\1",
            pid=None if pid is None else integer(pid),
            blobs=None,
            work=None if work is None else Work.decode(work),
            started=big(row[9]),
            describe=describe,
            host=None if row[10] is None else text(row[10]),
        )
        put = object.__setattr__
        put(made, "_record", big(row[0]))
        put(made, "_version", big(row[11]))
        put(made, "_defined", big(row[12]))
        put(made, "_data", row[13])
        put(made, "_load", load)
        put(made, "_token", token)
        put(made, "_died", died)
        return made

    def changed(self, version: int, defined: int, **values: Any) -> PostgresInfo:
        """The state after a commit of its holder."""
        fields = {field: values.get(field, getattr(self, field)) for field in _FIELDS}
        work = values.get("work", self._work)
        made = PostgresInfo(
            **fields,
            blobs=None,
            work=work,
            started=values.get("started", self._started),
            describe=self._describe,
            host=values.get("host", self.host),
        )
        put = object.__setattr__
        put(made, "_data", values.get("data", self._data))
        put(made, "_version", version)
        put(made, "_defined", defined)
        for same in ("_record", "_load", "_token", "_died"):
            put(made, same, getattr(self, same))
        return made

    def _taken(self) -> tuple[DomainDef, DomainDef | None, Any]:
        if self._blobs is None:
            if self._load is None:
                raise AttributeError(TAKEN_WITHOUT)
            data = None if self._data is None else decode_data(self._data)
            blobs = (*self._load(self._record, self._defined), data)
            object.__setattr__(self, "_blobs", blobs)
            return blobs
        return self._blobs

    @property
    def data(self) -> Any:
        if self._load is None:
            raise AttributeError(TAKEN_WITHOUT)
        if self._blobs is None and self._data is None:
            return None
        return self._taken()[2] if self._blobs is not None else decode_data(self._data or b"\xc0")
