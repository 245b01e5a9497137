"""Export and import: a whole list as one stream, for the way to a new layout version or a new host.

A stream is a sequence of MessagePack objects: a header, one map a domain, and the number of
domains, so that a truncated one is noticed. Definitions are XML, so that any version of this
library, and any other program, can read it. Exporting takes no lock. Importing goes through
`assign_def` like everything else, so its rules hold: a domain that exists under another UUID is a
failure that is reported, and the rest goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Annotated, Any
from uuid import UUID

import msgpack
import msgspec
from msgspec import Meta

from .definition import DomainDef
from .domain import decode_data, encode_data
from .errors import ContractError, DefinitionError, SegmentError, SegmentFull, ShmDomainsError
from .names import shortened, shown
from .packing import pack
from .states import DomainState

if TYPE_CHECKING:
    from .domain import Domain
    from .domain_list import DomainInfo, DomainList

FORMAT = "shmdomains-export"
VERSION = 1


class ImportReport(msgspec.Struct, frozen=True):
    """What `import_domains` did: names that were imported, and (name, reason) of those not."""

    imported: list[str]
    failures: list[tuple[str, str]]


class _Entry(msgspec.Struct):
    uuid: Annotated[bytes, Meta(min_length=16, max_length=16)]
    name: str
    definition: str
    next_definition: str | None
    data: bytes | None
    persistent: bool
    autostart: bool
    active: bool
    state: DomainState
    reason: Annotated[int, Meta(ge=0, lt=1 << 16)]
    pid: Annotated[int, Meta(gt=0, lt=1 << 31)] | None


def export_domains(doms: DomainList, stream: IO[bytes]) -> int:
    """Write all domains to a binary stream; returns how many. Takes no lock; works on a poisoned
    segment too.

    >>> import io
    >>> from shmdomains import DomainList
    >>> stream = io.BytesIO()
    >>> export_domains(DomainList(), stream)
    0
    """
    stream.write(msgpack.packb({"format": FORMAT, "version": VERSION}))
    count = 0
    for info in doms.snapshot():
        stream.write(pack(_entry(info)))
        count += 1
    stream.write(msgpack.packb(count))
    return count


def _entry(info: DomainInfo) -> _Entry:
    successor = info.next_definition
    return _Entry(
        uuid=info.uuid.bytes,
        name=info.name,
        definition=info.definition.to_xml(),
        next_definition=None if successor is None else successor.to_xml(),
        data=None if info.data is None else encode_data(info.data),
        persistent=info.persistent,
        autostart=info.autostart,
        active=info.is_active,
        state=info.state,
        reason=int(info.reason),
        pid=info.pid,
    )


def import_domains(
    doms: DomainList, stream: IO[bytes], timeout: float | None = None
) -> ImportReport:
    """Assign every domain of an exported stream. No lock may be held; the list lock is taken.

    State, data, flags and the next definition come along; an active domain stays active and gets a
    new id. A domain that is active in the list already is left alone and reported; one that can not
    be imported whole is not imported at all. `timeout` in seconds is for each wait. Raises
    `DefinitionError` for a stream that is no export; `ContractError` and `SegmentError` but for
    `SegmentFull`, which is that domain's failure.
    """
    report = ImportReport([], [])
    for entry in _entries(stream):
        try:
            _import_one(doms, entry, timeout)
        except ContractError:
            raise
        except ShmDomainsError as exc:
            if isinstance(exc, SegmentError) and not isinstance(exc, SegmentFull):
                raise
            report.failures.append((entry.name, str(exc)))
        else:
            report.imported.append(entry.name)
    return report


def _import_one(doms: DomainList, entry: _Entry, timeout: float | None) -> None:
    # All of it is read before any of it is assigned.
    definition = _definition(entry, entry.definition)
    successor = entry.next_definition
    next_definition = None if successor is None else _definition(entry, successor)
    data = _data(entry)
    dom, existed = None, True
    try:
        with doms.locked(timeout):
            existed = doms._known(definition) is not None
            dom = doms.assign_def(definition, entry.persistent, timeout)
        with dom:
            if dom.is_active:
                dom.rollback()
                raise DefinitionError(f"domain '{entry.name}' is active; it was left as it is")
            _fill(dom, entry, next_definition, data)
    except BaseException:
        doms._take_back(dom, existed)
        raise


def _definition(entry: _Entry, xml: str) -> DomainDef:
    definition = DomainDef.from_xml(xml)
    if definition.name != entry.name or definition.uuid != UUID(bytes=entry.uuid):
        raise DefinitionError(f"the definition of domain '{entry.name}' is of another domain")
    return definition


def _data(entry: _Entry) -> Any:
    try:
        return None if entry.data is None else decode_data(entry.data)
    except (ValueError, TypeError) as exc:
        reason = shortened(str(exc), 200)
        raise DefinitionError(f"the data of domain '{entry.name}' is damaged: {reason}") from None


def _fill(dom: Domain, entry: _Entry, next_definition: DomainDef | None, data: Any) -> None:
    if entry.active:
        dom.activate(entry.pid)
    dom.set_state(entry.state, entry.reason)
    dom.autostart = entry.autostart
    dom.next_definition = next_definition
    dom.data = data


def _entries(stream: IO[bytes]) -> Iterator[_Entry]:
    # No entry holds a sequence, or more fields than this: what claims more is not believed.
    unpacker = msgpack.Unpacker(stream, max_buffer_size=64 << 20, max_array_len=64, max_map_len=64)
    try:
        header = next(unpacker, None)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise DefinitionError("this is no export of a list of domains")
        if header.get("version") != VERSION:
            version = shown(str(header.get("version")))
            raise DefinitionError(f"export version {version} is not {VERSION}, the one known here")
        count = 0
        for values in unpacker:
            if values == count and isinstance(values, int):
                return
            yield _checked(values)
            count += 1
        raise DefinitionError(f"the export is truncated after {count} domains")
    except (ValueError, msgpack.UnpackException) as exc:
        if isinstance(exc, DefinitionError):
            raise
        raise DefinitionError(f"the export is damaged: {shortened(str(exc), 200)}") from exc


def _checked(values: Any) -> _Entry:
    try:
        return msgspec.convert(values, _Entry)
    except msgspec.ValidationError as exc:
        raise DefinitionError(f"the export is damaged: {shortened(str(exc), 200)}") from exc
