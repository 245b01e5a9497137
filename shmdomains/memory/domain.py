"""`Domain`: libvirt's rules about one domain, on a record in shared memory.

`core.Record` is the record: its lock, its fields, its uncommitted changes. This module combines it
with the rules, and gives the core the Python objects that it needs.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from ..holder import LockHolder, this_host
from ..names import parse_uuid
from ..packing import ENCODER
from ..rules import info
from ..rules.domain import DomainRules
from ..rules.steps import settle
from ..rules.values import (
    added,
    checked_definition,
    decode_data,
    encode_data,
    key_of,
    not_found,
)
from ..rules.work import Caller, Work
from ..states import REASONS, DomainState
from ..xml.definition import DomainDef
from . import callbacks
from ._core import core
from .holder import holder_of
from .passing import restore_part


class Domain(core.Record, DomainRules):
    """A handle to a domain in shared memory (virDomainObj).

    Comes locked from `DomainList.get`, `lookup`, `find_by_*` and `assign_def`. Changes made under
    the lock are one transaction: `unlock` (or the end of the ``with`` block) commits them with one
    store; an exception in the block or the death of the worker rolls them back. A handle may be
    kept, pickled and locked again later; if its domain is gone, that raises `DomainRemoved`.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.get("web1") as dom:
    ...     id = dom.activate()
    ...     dom.data = "mine"
    >>> doms["web1"].data
    'mine'
    """

    __slots__ = ()

    @property
    def host(self) -> str:
        """This host: a segment is one machine's. Raises `DomainNotLocked`."""
        _ = self.is_active  # the error
        return this_host()

    def _take_id(self, timeout: float | None = None, host: str | None = None) -> int:
        if host is not None and host != this_host():
            raise ValueError(
                f"domain '{self.name}' cannot run on host {host!r}: a list in shared memory is of "
                f"one host, and this is {this_host()!r}"
            )
        return super()._take_id(timeout)

    def _caller(self) -> Caller:
        return Caller(*core.caller())

    def _describe(self, caller: Caller) -> LockHolder:
        return holder_of(caller.pid, caller.tid, caller.start)

    def _runs(self, caller: Caller) -> bool:
        return core.thread_runs(caller.tid, caller.start)

    def __reduce__(self) -> tuple[Any, ...]:
        return restore_part, (self._doms, "_handle", self._key, {})


def _encode_definition(dom: Domain, definition: DomainDef) -> bytes:
    # The core compares without making Python objects; only the rule makes the error.
    if not isinstance(definition, DomainDef) or not dom._is(definition.uuid, definition.name):
        checked_definition(definition, dom.uuid, dom.name)
    return definition.encode()


core.configure(
    states=list(DomainState),
    reasons=[{int(member): member for member in reasons} for reasons in REASONS],
    decode=[DomainDef.decode, DomainDef.decode, decode_data, Work.decode],
    encode_definition=_encode_definition,
    encode_data=encode_data,
    encode_into=ENCODER.encode_into,
    definition=DomainDef,
    added=added,
    encode_work=Work.encode,
    settle=settle,
    not_found=not_found,
    key_of=key_of,
    info=info,
    parse_uuid=parse_uuid,
    uuid_class=UUID,
    holders=callbacks,
)
