"""One domain: what may be done with it, whatever store holds its record.

`DomainRules` are libvirt's rules about a locked domain - active and inactive, live and next
definition - written against what a record offers: fields, `commit`, `rollback`. `Domain` puts them
on a record in shared memory; a store of another kind puts them on its own records.
"""

from __future__ import annotations

import operator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgpack

from .errors import DefinitionError, DomainActive, DomainInactive
from .memory import callbacks as holder
from .memory._core import core
from .names import parse_uuid
from .states import REASONS, DomainState, RunningReason, ShutoffReason
from .xml.definition import DomainDef

if TYPE_CHECKING:
    _Record = core.Record  # what the rules ask of a record, whoever keeps it
else:
    _Record = object


def encode_data(value: Any) -> bytes:
    """Return the MessagePack of a driver's data; a mapping proxy counts as the mapping.

    Raises `TypeError` for what MessagePack can not carry, `ValueError` for a text with a lone
    surrogate and for nesting that is deeper than 500 levels or so.
    """
    return bytes(msgpack.packb(value, default=_plain))


def decode_data(blob: bytes) -> Any:
    """Return a read-only view of a driver's data: mappings are proxies, sequences tuples.

    Raises `ValueError` or `TypeError` for what `encode_data` never made.
    """
    if len(blob) > _HARMLESS:
        unpacker = msgpack.Unpacker(max_buffer_size=len(blob))
        unpacker.feed(blob)
        try:
            unpacker.skip()
        except msgpack.UnpackException as exc:
            raise ValueError(f"not MessagePack: {exc}") from None
    return msgpack.unpackb(blob, use_list=False, object_hook=MappingProxyType, strict_map_key=False)


# Before version 1.2.3 msgpack allocates whatever length an array claims to have, at each level.
# Skipping over a value allocates nothing, and finds that claim out; where it would take longer than
# it helps, all levels together claim a few MiB.
_HARMLESS = 1024


def _checked_reason(reason: int) -> int:
    number = operator.index(reason)
    if not 0 <= number <= 0xFFFF:
        raise ValueError(f"a reason is a number from 0 to 65535, not {reason!r}")
    return number


def _plain(value: Any) -> Any:
    if isinstance(value, MappingProxyType):
        return dict(value)
    if isinstance(value, int):
        raise TypeError("data can hold integers from -2^63 to 2^64 - 1, not this one")
    raise TypeError(f"data can hold what MessagePack can, not {type(value).__name__}")


class DomainRules(_Record):
    """What may be done with a locked domain. Every method needs the domain's lock."""

    __slots__ = ()

    def set_state(self, state: DomainState, reason: int = 0) -> None:
        """Set state and reason together; part of the transaction.

        Raises `DomainNotLocked`. Source: virDomainObjSetState.
        """
        state, reason = DomainState(state), _checked_reason(reason)
        self.state = state
        self.reason = reason

    def activate(
        self,
        pid: int | None = None,
        *,
        state: DomainState = DomainState.RUNNING,
        reason: int = RunningReason.BOOTED,
        timeout: float | None = None,
    ) -> int:
        """Make the domain active; returns its id, which no other domain ever has or had.

        `pid` is the hypervisor's process, if there is one. Part of the transaction: others see it
        after `commit()` or `unlock()`; a rollback wastes the id. Raises `DomainActive`,
        `DomainNotLocked`, `SegmentFull` when every id was given out, and `LockTimeout` when the
        lock of the ids was not free within `timeout` seconds.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> info = doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                    "<os><type>hvm</type></os></domain>")
        >>> with doms.get(name="web1") as dom:
        ...     id = dom.activate(pid=4711)
        >>> doms.peek(id=id).name
        'web1'
        """
        if self.is_active:
            raise DomainActive(f"domain '{self.name}' is already running with id {self.id}")
        # All of it is checked before any of it is changed.
        state, reason = DomainState(state), _checked_reason(reason)
        if pid is not None and not 0 < operator.index(pid) < 1 << 31:
            raise ValueError(f"{pid!r} is no process id")
        id = self._take_id(timeout)
        self.pid = pid
        self.set_state(state, reason)
        return id

    def deactivate(self, reason: int = ShutoffReason.UNKNOWN) -> None:
        """Make the domain inactive: id -1, no pid, state SHUTOFF; `next_definition` becomes live.

        Part of the transaction. A transient domain stays until the driver removes it
        (`DomainList.remove_inactive`), as in the patch. Raises `DomainInactive`, `DomainNotLocked`.
        """
        if not self.is_active:
            raise DomainInactive(f"domain '{self.name}' is not running")
        reason = _checked_reason(reason)
        self._drop_id()
        self.pid = None
        self.set_state(DomainState.SHUTOFF, reason)
        successor = self.next_definition
        if successor is not None:
            self.definition = successor
            self.next_definition = None

    def _encode_definition(self, definition: DomainDef) -> bytes:
        if not isinstance(definition, DomainDef):
            raise TypeError(f"a definition is a DomainDef, not {type(definition).__name__}")
        if not self._is(definition.uuid, definition.name):
            raise DefinitionError(
                f"the definition is of domain '{definition.name}' with uuid {definition.uuid}, the "
                f"record of domain '{self.name}' with uuid {self.uuid}; a name is changed by "
                "DomainList.rename(), a uuid never"
            )
        return definition.encode()

    def _encode_data(self, value: Any) -> bytes:
        return encode_data(value)


class Domain(DomainRules, core.Record):
    """A handle to a domain in shared memory (virDomainObj).

    Comes locked from `DomainList.get`, `lookup`, `find_by_*` and `assign_def`. Changes made under
    the lock are one transaction: `unlock` (or the end of the ``with`` block) commits them with one
    store, an exception in the block or the death of the worker rolls them back. A handle may be
    kept, pickled and locked again later; it is `DomainRemoved` then if its domain is gone.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._segment, *self._key)


def _restore(doms: Any, slot: int, life: int, uuid: bytes) -> Any:
    return doms._handle(slot, life, uuid)


core.configure(
    states=list(DomainState),
    reasons=[{int(member): member for member in reasons} for reasons in REASONS],
    decode=[DomainDef.decode, DomainDef.decode, decode_data],
    parse_uuid=parse_uuid,
    uuid_class=UUID,
    holders=holder,
)
