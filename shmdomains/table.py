"""`shmdomains.table`: a list of domains by columns, which `DomainList.table` returns.

Each column is one buffer, which NumPy and Arrow read without a copy. There is no object for a
domain, so that a table of a million costs little more than its bytes. This module is imported with
the first table.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice, repeat
from typing import Any, Protocol, TypeAlias, overload
from uuid import UUID

from .states import DomainState

__all__ = ["COLUMNS", "Table", "Texts"]

UUID_SIZE = 16


Column: TypeAlias = "array[int] | memoryview | Texts"


class Texts(Sequence[str]):
    """Strings in one buffer, as Arrow has them: the string at `at` is the UTF-8 of
    ``data[offsets[at]:offsets[at + 1]]``.

    Arrow takes it with ``pyarrow.StringArray.from_buffers(len(texts), py_buffer(texts.offsets),
    py_buffer(texts.data))``.

    >>> from shmdomains.table import Texts
    >>> names = Texts.of(["web1", "db"])
    >>> names[1], list(names), names.data, names.offsets
    ('db', ['web1', 'db'], b'web1db', array('i', [0, 4, 6]))
    """

    __slots__ = ("data", "offsets")

    data: bytes
    """All strings, in UTF-8, one after the other."""
    offsets: array[int]
    """Where each begins, as C ``int``; one more says where the last one ends."""

    def __init__(self, offsets: array[int], data: bytes) -> None:
        self.offsets, self.data = offsets, data

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """The strings, encoded."""
        encoded = [text.encode() for text in texts]
        return cls(array("i", chain([0], accumulate(map(len, encoded)))), b"".join(encoded))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, at: int, /) -> str: ...
    @overload
    def __getitem__(self, at: slice, /) -> list[str]: ...
    def __getitem__(self, at: int | slice, /) -> str | list[str]:
        if isinstance(at, slice):
            return [self[one] for one in range(*at.indices(len(self)))]
        place = range(len(self))[at]
        return self.data[self.offsets[place] : self.offsets[place + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        whole = self.data.decode()
        if len(whole) == len(self.data):  # an offset is the same in characters
            return map(whole.__getitem__, self._slices())
        return map(bytes.decode, map(self.data.__getitem__, self._slices()))

    def _slices(self) -> Iterator[slice]:
        return map(slice, self.offsets, islice(self.offsets, 1, None))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Texts):
            return NotImplemented
        return self.data == other.data and self.offsets == other.offsets

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Texts: {len(self)}>"


class Table:
    """Domains by columns; `DomainList.table` makes it. ``table["id"]`` is a column, iteration gives
    rows.

    ``id``, ``pid``, ``state`` and ``reason`` are an `array.array` of C ``int``; `id` is -1 for an
    inactive domain, `pid` is -1 for none. ``persistent``, ``autostart`` and ``active`` are one of
    bytes, 0 or 1. ``name`` is a `Texts`, ``uuid`` a `memoryview` of 16 bytes a domain.

    In a row a uuid is its 16 bytes, which `get` takes as a key, and every number an ``int``.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> infos = [doms.define(xml), doms.define(xml.replace("web1", "web2"))]
    >>> table = doms.table(("id", "name", "persistent"))
    >>> len(table), table.columns, table["id"]
    (2, ('id', 'name', 'persistent'), array('i', [-1, -1]))
    >>> list(table)
    [(-1, 'web1', 1), (-1, 'web2', 1)]
    """

    __slots__ = ("_columns", "_count")

    def __init__(self, columns: Mapping[str, Column], count: int) -> None:
        """`count` is the number of rows, of each column."""
        self._columns, self._count = dict(columns), count

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in their order."""
        return tuple(self._columns)

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The rows, each a tuple with a value of every column, in their order."""
        if not self._columns:
            return repeat((), self._count)
        return zip(*(_values(column) for column in self._columns.values()), strict=True)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self.rows()

    def __getitem__(self, name: str) -> Any:
        try:
            return self._columns[name]
        except KeyError:
            raise KeyError(
                f"there is no column {name!r} in this table, which has {', '.join(self._columns)}"
            ) from None

    def __repr__(self) -> str:
        return f"<Table: {self._count} of {', '.join(self._columns)}>"


def uuid_column(raw: bytes | bytearray) -> memoryview:
    """The column of uuids that lie one after the other.

    >>> uuid_column(bytes(32)).shape, uuid_column(b"").shape
    ((2, 16), (0, 16))
    """
    count = len(raw) // UUID_SIZE
    if count:
        return memoryview(raw).cast("B", (count, UUID_SIZE))
    return memoryview(bytes(UUID_SIZE)).cast("B", (1, UUID_SIZE))[:0]  # what `cast` refuses


def checked_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """The names of columns. Raises `ValueError` for one that there is not, or that comes twice.

    >>> checked_columns(["id", "memory"])
    Traceback (most recent call last):
    ...
    ValueError: there is no column 'memory'; there are id, name, uuid, state, reason, ...
    """
    if isinstance(columns, str):
        raise TypeError(f"columns are several names, as in columns=({columns!r},)")
    names = tuple(columns)
    for name in names:
        if name not in COLUMNS:
            raise ValueError(f"there is no column {name!r}; there are {', '.join(COLUMNS)}")
        if names.count(name) > 1:
            raise ValueError(f"column {name!r} is asked for twice")
    return names


class Row(Protocol):
    """What a row is made of: a `DomainInfo`."""

    @property
    def is_active(self) -> bool: ...

    id: int
    name: str
    uuid: UUID
    state: DomainState
    reason: int
    persistent: bool
    autostart: bool
    pid: int | None


_FILL: dict[str, Callable[[Sequence[Row]], Column]] = {
    "id": lambda rows: array("i", [row.id for row in rows]),
    "name": lambda rows: Texts.of(row.name for row in rows),
    "uuid": lambda rows: uuid_column(b"".join(row.uuid.bytes for row in rows)),
    "state": lambda rows: array("i", [row.state for row in rows]),
    "reason": lambda rows: array("i", [row.reason for row in rows]),
    "persistent": lambda rows: array("B", [row.persistent for row in rows]),
    "autostart": lambda rows: array("B", [row.autostart for row in rows]),
    "pid": lambda rows: array("i", [-1 if row.pid is None else row.pid for row in rows]),
    "active": lambda rows: array("B", [row.is_active for row in rows]),
}


COLUMNS = tuple(_FILL)
"""The columns that there are."""


def of_infos(columns: Sequence[str], infos: Sequence[Row]) -> Table:
    """The table of these infos."""
    return Table({name: _FILL[name](infos) for name in columns}, len(infos))


def of_buffers(columns: Sequence[str], count: int, filled: Mapping[str, bytearray],
               texts: bytearray) -> Table:  # fmt: skip
    """The table of columns that a native store filled; of the names where each ends in `texts`."""
    return Table({name: _WRAP[name](filled[name], texts) for name in columns}, count)


def _numbers(code: str) -> Callable[[bytearray, bytearray], Column]:
    def wrap(filled: bytearray, _texts: bytearray) -> Column:
        column = array(code)
        column.frombytes(filled)
        return column

    return wrap


def _names(ends: bytearray, texts: bytearray) -> Column:
    offsets = array("i", [0])
    offsets.frombytes(ends)
    return Texts(offsets, bytes(texts))


_INTS, _BYTES = _numbers("i"), _numbers("B")
_WRAP: dict[str, Callable[[bytearray, bytearray], Column]] = {
    **dict.fromkeys(("id", "pid", "state", "reason"), _INTS),
    **dict.fromkeys(("persistent", "autostart", "active"), _BYTES),
    "uuid": lambda filled, _texts: uuid_column(filled),
    "name": _names,
}


def _values(column: Column) -> Iterable[object]:
    if not isinstance(column, memoryview):
        return column
    raw = column.tobytes()
    return (raw[at : at + UUID_SIZE] for at in range(0, len(raw), UUID_SIZE))
