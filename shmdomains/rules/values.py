"""Validation of a domain's fields, the same for every store.

Pure functions: they take no lock and change nothing. A store calls them before it changes a
record, so a refused value leaves the record as it was. A native store may check numbers itself,
with the same limits and words.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from uuid import UUID

import msgpack

from ..errors import DefinitionError, DomainNotFound
from ..names import Uuid, parse_uuid
from ..states import DomainState
from ..xml.definition import DomainDef

MAX_PID = (1 << 31) - 1
MAX_REASON = 0xFFFF
MAX_HOST = 253  # bytes


def checked_state(state: int) -> DomainState:
    """Return the `DomainState`. Raises `ValueError` for any other number.

    >>> checked_state(1)
    <DomainState.RUNNING: 1>
    """
    return DomainState(operator.index(state))


def checked_reason(reason: int) -> int:
    """Return a reason's number, 0 to 65,535: drivers may have reasons of their own.

    >>> checked_reason(70000)
    Traceback (most recent call last):
    ...
    ValueError: a reason is a number from 0 to 65535, not 70000
    """
    number = operator.index(reason)
    if not 0 <= number <= MAX_REASON:
        raise ValueError(f"a reason is a number from 0 to {MAX_REASON}, not {reason!r}")
    return number


def checked_pid(pid: int | None) -> int | None:
    """Return a process id, or ``None``. Raises `ValueError` for a number out of range.

    >>> checked_pid(0)
    Traceback (most recent call last):
    ...
    ValueError: 0 is no process id
    """
    if pid is not None and not 0 < operator.index(pid) <= MAX_PID:
        raise ValueError(f"{pid!r} is no process id")
    return pid


def checked_host(host: str | None) -> str | None:
    """Return a host's name, or ``None``. Raises `TypeError`, or `ValueError` for what cannot be
    one.

    >>> checked_host("")
    Traceback (most recent call last):
    ...
    ValueError: '' is no name of a host
    """
    if host is None:
        return None
    if not isinstance(host, str):
        raise TypeError(f"a host is named by a str, not {type(host).__name__}")
    if not (host.isprintable() and 1 <= len(host.encode()) <= MAX_HOST):
        raise ValueError(f"{host!r} is no name of a host")
    return host


def checked_definition(definition: DomainDef, uuid: UUID, name: str) -> DomainDef:
    """Return the definition if the domain with this uuid and name may have it.

    Without this check domain ``a`` could take the definition of ``zzz``, and its document would
    have another name than its record. Raises `TypeError`, and `DefinitionError` for a definition of
    another domain.
    """
    if not isinstance(definition, DomainDef):
        raise TypeError(f"a definition is a DomainDef, not {type(definition).__name__}")
    if definition.uuid != uuid or definition.name != name:
        raise DefinitionError(
            f"the definition is of domain '{definition.name}' with uuid {definition.uuid}, the "
            f"record of domain '{name}' with uuid {uuid}; a name is changed by "
            "DomainList.rename(), a uuid never"
        )
    return definition


def encode_data(value: Any) -> bytes:
    """Return the MessagePack of a driver's data; a mapping proxy counts as its mapping.

    Raises `TypeError` for what MessagePack cannot carry, `ValueError` for a lone surrogate and for
    nesting deeper than about 500 levels.

    >>> encode_data({"vnc": 5901})
    b'\\x81\\xa3vnc\\xcd\\x17\\r'
    """
    try:
        packer = _SPARE.pop()
    except IndexError:
        packer = msgpack.Packer(default=_plain)
    encoded = bytes(packer.pack(value))
    if len(encoded) <= _KEPT:
        _SPARE.append(packer)
    return encoded


# Making a packer takes longer than packing a small value. None is used twice at once: the value may
# be of a class that calls this function again. One that failed, or grew large, is not kept.
_SPARE: list[msgpack.Packer] = []
_KEPT = 1 << 16


def decode_data(blob: bytes) -> Any:
    """Return a driver's data, read-only: mappings are proxies, sequences tuples.

    Raises `ValueError` or `TypeError` for what `encode_data` never made.

    >>> decode_data(encode_data([1, [2, 3]]))
    (1, (2, 3))
    """
    if len(blob) > _HARMLESS:
        unpacker = msgpack.Unpacker(max_buffer_size=len(blob))
        unpacker.feed(blob)
        try:
            unpacker.skip()
        except msgpack.UnpackException as exc:
            raise ValueError(f"not MessagePack: {exc}") from None
    return msgpack.unpackb(blob, use_list=False, object_hook=MappingProxyType, strict_map_key=False)


# Before version 1.2.3 msgpack allocates whatever length an array claims, at each level. Skipping
# over the value first allocates nothing and detects a false claim. A blob up to this size is not
# worth it: all its levels together can claim only a few MiB.
_HARMLESS = 1024


def _plain(value: Any) -> Any:
    if isinstance(value, MappingProxyType):
        return dict(value)
    if isinstance(value, int):
        raise TypeError("data can hold integers from -2^63 to 2^64 - 1, not this one")
    raise TypeError(f"data can hold what MessagePack can, not {type(value).__name__}")


MIN_COUNT, MAX_COUNT = -(1 << 63), (1 << 64) - 1
"""What an integer of MessagePack can be."""


def added(data: Any, field: str, by: int) -> tuple[dict[Any, Any], int]:
    """Return the data with `by` added to its integer `field`, and that integer; what is not there
    counts as 0.

    Raises `TypeError` for data without named values and for a value that is no integer, and
    `OverflowError` for a sum that MessagePack cannot carry.

    >>> added({"requests": 2, "vnc": 5901}, "requests", 1)
    ({'requests': 3, 'vnc': 5901}, 3)
    """
    if not isinstance(field, str):
        raise TypeError(f"an integer of the data is named by a str, not {type(field).__name__}")
    if isinstance(by, bool):
        raise TypeError(f"{by} cannot be added to {field!r}: it is no int")
    step = operator.index(by)
    if data is not None and not isinstance(data, Mapping):
        raise TypeError(f"the data has no {field!r}: it is no mapping, but {type(data).__name__}")
    before = 0 if data is None else data.get(field, 0)
    if type(before) is not int:
        raise TypeError(f"{field!r} of the data is no int, but {type(before).__name__}")
    value = before + step
    if not MIN_COUNT <= value <= MAX_COUNT:
        raise OverflowError(f"{field!r} would be {value}: data holds -2^63 to 2^64 - 1")
    return {**(data or {}), field: value}, value


def key_of(key: Any) -> dict[str, Any]:
    """Return the keyword argument that a positional key stands for, in virsh's order.

    An ``int`` is an id; a `uuid.UUID`, 16 bytes, or a string in a UUID's form is a uuid; any other
    string is a name. A handle or an info stands for its domain's uuid.

    >>> key_of(3), key_of("web1")
    ({'id': 3}, {'name': 'web1'})
    >>> key_of("c7a5fdbdedaf9455926ad65c16db1809")
    {'uuid': UUID('c7a5fdbd-edaf-9455-926a-d65c16db1809')}
    """
    if isinstance(key, int):
        return {"id": key}
    if isinstance(key, str):
        try:
            return {"uuid": parse_uuid(key)}
        except DefinitionError:
            return {"name": key}
    if isinstance(key, (UUID, bytes)):
        return {"uuid": parse_uuid(key)}
    uuid = getattr(key, "uuid", None)
    if uuid is None:
        raise TypeError(
            "a domain is named by its id (int), uuid (UUID, 16 bytes, str) or name (str), a handle "
            f"or a DomainInfo, not {type(key).__name__}"
        )
    return {"uuid": uuid}


def one_key(key: Any, uuid: Uuid | None, name: str | None, id: int | None) -> dict[str, Any]:
    """Return the one key that a call was given, by position (`key_of`) or by keyword.

    >>> one_key("web1", None, None, None), one_key(None, None, None, 3)
    ({'name': 'web1'}, {'id': 3})
    >>> one_key(None, None, None, None)
    Traceback (most recent call last):
    ...
    TypeError: give exactly one key: uuid=, name= or id=, or one by position: an int is ...
    """
    if name is not None and key is None and uuid is None and id is None:
        return {"name": name}  # most of them
    keys: list[dict[str, Any]] = [] if key is None else [key_of(key)]
    named = {"uuid": uuid, "name": name, "id": id}
    keys += [{field: value} for field, value in named.items() if value is not None]
    if len(keys) != 1:
        raise TypeError(
            "give exactly one key: uuid=, name= or id=, or one by position: an int is an id, a "
            "UUID or a string in its form a uuid, any other string a name"
        )
    return keys[0]


def not_found(
    uuid: Uuid | None = None, name: str | None = None, id: int | None = None
) -> DomainNotFound:
    """Return the error for a key that no domain has, worded as in virDomainObjListFindBy*.

    >>> not_found(name="web1")
    DomainNotFound("no domain with matching name 'web1'")
    """
    if uuid is not None:
        shown = UUID(bytes=uuid) if isinstance(uuid, bytes) else uuid
        return DomainNotFound(f"no domain with matching uuid '{shown}'")
    if name is not None:
        return DomainNotFound(f"no domain with matching name '{name}'")
    return DomainNotFound(f"no domain with matching id {id}")
