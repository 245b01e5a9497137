"""Export and import: a whole list as one stream, to move to a new layout version or a new host, or
its definitions as XML files.

A stream is a sequence of MessagePack objects: a header, one map per domain, and the number of
domains, so that truncation is noticed. Definitions are XML, so that any version of this library,
and any other program, can read them. Exporting takes no lock, and saves from a poisoned or damaged
segment whatever is readable; of other stores it takes what they hand out. Importing goes through
`assign_def`, so its rules hold: a domain that exists under another UUID is reported as a failure,
and the rest is imported.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, BinaryIO, NamedTuple, NoReturn, TypeVar
from uuid import UUID

import msgpack
import msgspec
from msgspec import Meta

from .errors import (
    Busy,
    ContractError,
    DefinitionError,
    InvalidName,
    SegmentCorrupt,
    SegmentError,
    SegmentFull,
    ShmDomainsError,
    Unavailable,
)
from .files import discard, sync_directory, temporary_name
from .memory.domain_list import DomainList
from .names import check_name
from .packing import pack
from .rules.values import decode_data, encode_data
from .states import DomainState
from .text import shortened, shown
from .xml.definition import DomainDef

if TYPE_CHECKING:
    from .opening import AnyDomainList
    from .rules.info import DomainInfo

FORMAT = "shmdomains-export"
VERSION = 1


class ImportReport(msgspec.Struct, frozen=True):
    """What `import_domains` did: the imported names, and (name, reason) of each failure."""

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
    host: str | None = None
    """Of an active domain, unless the list was of one host: then it is the importing one's."""


Value = TypeVar("Value")
Failed = Callable[[str, ShmDomainsError], object]
"""Called for what could not be exported: with the domain's name, or ``slot N``, and the error."""


def _raise(_name: str, exc: ShmDomainsError) -> NoReturn:
    raise exc


# --- salvage ----------------------------------------------------------------------------------


class _Salvaged(NamedTuple):
    """One record, parts of which may be damaged."""

    label: str
    info: DomainInfo
    blobs: list[bytes | None]
    damaged: list[bool]

    def definition(self) -> DomainDef:
        definition = self._decode(0, "definition")
        if definition is None:
            raise SegmentCorrupt("the definition is missing")
        return definition

    def next_definition(self) -> DomainDef | None:
        return self._decode(1, "next definition")

    def data(self) -> bytes | None:
        blob = self.blobs[2]
        try:
            if blob is not None:
                decode_data(blob)  # only to see whether it fails
        except (ValueError, TypeError, OverflowError) as exc:
            raise SegmentCorrupt(f"the driver's data is damaged: {exc}") from None
        if self.damaged[2]:
            raise SegmentCorrupt("the driver's data is damaged: not in the heap, or not as written")
        return blob

    def _decode(self, which: int, what: str) -> DomainDef | None:
        blob = self.blobs[which]
        if self.damaged[which]:
            raise SegmentCorrupt(f"the {what} is damaged: not in the heap, or not as written")
        try:
            return None if blob is None else DomainDef.decode(blob)
        except (ValueError, TypeError, OverflowError) as exc:
            raise SegmentCorrupt(f"the {what} is damaged: {exc}") from None


class _Whole(NamedTuple):
    """One record as its store hands it out."""

    label: str
    info: DomainInfo

    def definition(self) -> DomainDef:
        return self.info.definition

    def next_definition(self) -> DomainDef | None:
        return self.info.next_definition

    def data(self) -> bytes | None:
        data = self.info.data
        return None if data is None else encode_data(data)


def _salvage(doms: AnyDomainList, failed: Failed) -> Iterator[_Salvaged | _Whole]:
    if not isinstance(doms, DomainList):
        yield from (_Whole(info.name, info) for info in doms.snapshot())
        return
    for slot in range(doms._slots()):
        try:
            found = doms._salvage(slot)
        except Busy as exc:
            failed(f"slot {slot}", exc)
            continue
        if found is not None:
            yield _Salvaged(_name_of(found[0]) or f"slot {slot}", *found)


def _name_of(info: DomainInfo) -> str | None:
    try:
        return info.name
    except SegmentCorrupt:
        return None


# --- export -----------------------------------------------------------------------------------


def export_domains(doms: AnyDomainList, stream: IO[bytes], failed: Failed = _raise) -> int:
    """Write all domains to a binary stream; returns how many. Takes no lock; works on a poisoned
    segment too.

    `failed` is called for each unreadable part, with the domain's name and the error. A domain
    whose definition is unreadable is left out; otherwise only the damaged part is. Without `failed`
    the error is raised.

    >>> import io
    >>> from shmdomains import DomainList
    >>> stream = io.BytesIO()
    >>> export_domains(DomainList(), stream)
    0
    """
    stream.write(msgpack.packb({"format": FORMAT, "version": VERSION}))
    spans_hosts, count = not isinstance(doms, DomainList), 0
    for one in _salvage(doms, failed):
        try:
            definition = one.definition()
        except SegmentCorrupt as exc:
            failed(one.label, exc)
            continue
        entry = _entry(one, definition, failed)
        if spans_hosts:
            entry.host = one.info.host
        stream.write(pack(entry))
        count += 1
    stream.write(msgpack.packb(count))
    return count


def _entry(one: _Salvaged | _Whole, definition: DomainDef, failed: Failed) -> _Entry:
    """Report and leave out damaged parts other than the definition."""

    def unless_damaged(read: Callable[[], Value], instead: Value) -> Value:
        try:
            return read()
        except SegmentCorrupt as exc:
            failed(one.label, exc)
            return instead

    info = one.info
    successor = unless_damaged(one.next_definition, None)
    fields = unless_damaged(lambda: _fields(info), _FIELDS_LOST)
    return _Entry(
        # The record's own uuid and name may be damaged.
        uuid=definition.uuid.bytes if definition.uuid else info.uuid.bytes,
        name=definition.name,
        definition=definition.to_xml(),
        next_definition=None if successor is None else successor.to_xml(),
        data=unless_damaged(one.data, None),
        **fields,
    )


def _fields(info: DomainInfo) -> dict[str, Any]:
    return {
        "persistent": info.persistent,
        "autostart": info.autostart,
        "active": info.is_active,
        "state": info.state,
        "reason": int(info.reason),
        "pid": info.pid,
    }


# Inactive: an import must not claim that a domain runs when nobody knows.
_FIELDS_LOST: dict[str, Any] = {
    "persistent": True,
    "autostart": False,
    "active": False,
    "state": DomainState.SHUTOFF,
    "reason": 0,
    "pid": None,
}


def export_xml(
    doms: AnyDomainList,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    failed: Failed = _raise,
) -> int:
    """Write the definition of every domain to DIRECTORY/NAME.xml; returns how many files.

    A next definition goes to DIRECTORY/next/NAME.xml, where it cannot collide with another domain
    and `load_all_configs` does not load it. Files have mode 0600, and each appears whole or not at
    all. An existing file is replaced only with `overwrite`.

    A definition whose name is no file name, or the name of another one, goes to UUID.xml, which is
    reported to `failed` as well. Takes no lock; works on a poisoned segment too. `failed` as in
    `export_domains`. Raises `OSError` for the directory.

    >>> from tempfile import TemporaryDirectory
    >>> from shmdomains import DomainList
    >>> with TemporaryDirectory() as directory:
    ...     export_xml(DomainList(), directory)
    0
    """
    folder = Path(directory)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    files = _XmlFiles(folder, overwrite, failed)
    successors = _XmlFiles(folder / "next", overwrite, failed)
    for one in _salvage(doms, failed):
        files.write(one, one.definition)
        successors.write(one, one.next_definition)
    return files.sync() + successors.sync()


class _XmlFiles:
    """One directory of an export, made with its first file."""

    def __init__(self, folder: Path, overwrite: bool, failed: Failed) -> None:
        self._folder, self._overwrite, self._failed = folder, overwrite, failed
        self._names: set[str] = set()

    def write(self, one: _Salvaged | _Whole, read: Callable[[], DomainDef | None]) -> None:
        try:
            definition = read()
            if definition is None:
                return
            path = self._folder / f"{self._name(one, definition)}.xml"
            data = definition.to_xml().encode()
        except SegmentCorrupt as exc:
            self._failed(one.label, exc)
            return
        self._folder.mkdir(mode=0o700, exist_ok=True)
        try:
            with new_file(path, self._overwrite) as stream:
                stream.write(data)
        except FileExistsError:
            self._failed(one.label, ShmDomainsError(f"{path} exists already and was left alone"))
        else:
            self._names.add(path.stem)

    def _name(self, one: _Salvaged | _Whole, definition: DomainDef) -> str:
        """The definition's own name: the record's may be damaged."""
        name = definition.name
        try:
            check_name(name)
        except InvalidName as exc:
            raise SegmentCorrupt(str(exc)) from None
        if name != one.label:
            why = f"its record has another name than its definition; it is in {name}.xml"
            self._failed(one.label, SegmentCorrupt(why))
        return name

    def sync(self) -> int:
        if self._names:
            sync_directory(self._folder)
        return len(self._names)


@contextmanager
def new_file(path: Path, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A file of mode 0600 (definitions hold passwords) that gets its name when it is whole.

    It replaces whatever has the name, a link or another user's file, and never writes into that;
    without `overwrite` a taken name is `FileExistsError`.
    """
    temporary = temporary_name(path.parent)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as stream:
            os.fchmod(stream.fileno(), 0o600)  # whatever the umask
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if overwrite:
            os.rename(temporary, path)
        else:
            _name_anew(temporary, path)
    finally:
        discard(temporary)


def _name_anew(temporary: Path, path: Path) -> None:
    """Raises `FileExistsError` if the name is taken, even by a dangling link."""
    try:
        os.link(temporary, path)
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        # No hard links here: a memory stick, say, where nobody else writes meanwhile.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(temporary, path)


# --- import -----------------------------------------------------------------------------------


def import_domains(
    doms: AnyDomainList, stream: IO[bytes], timeout: float | None = None
) -> ImportReport:
    """Assign every domain of an exported stream. No lock may be held; the list lock is taken.

    State, data, flags and the next definition are imported too; an active domain stays active and
    gets a new id. It stays on its host, if the export was of a list that spans hosts; shared memory
    takes its own host's only. A domain that is active in the list already is left alone and
    reported; one that cannot be imported whole is not imported at all. `timeout` in seconds is for
    each wait. Raises `DefinitionError` for a stream that is no export, `ContractError`,
    `Unavailable`, and any `SegmentError` but `SegmentFull`, which is that domain's failure.
    """
    report = ImportReport([], [])
    for entry in _entries(stream):
        try:
            _import_one(doms, entry, timeout)
        except ContractError:
            raise
        except ShmDomainsError as exc:
            if isinstance(exc, (SegmentError, Unavailable)) and not isinstance(exc, SegmentFull):
                raise
            report.failures.append((entry.name, str(exc)))
        else:
            report.imported.append(entry.name)
    return report


def _import_one(doms: AnyDomainList, entry: _Entry, timeout: float | None) -> None:
    # Decode everything before assigning anything.
    definition = _definition(entry, entry.definition)
    successor = entry.next_definition
    next_definition = None if successor is None else _definition(entry, successor)
    data = _data(entry)
    dom, made = None, None
    try:
        with doms.locked(timeout):
            known = doms._known(definition)
            dom = doms.assign_def(definition, entry.persistent, timeout)
            made = dom._receipt if known is None else None
        try:
            if dom.is_active:
                raise DefinitionError(f"domain '{entry.name}' is active; it was left as it is")
            if entry.active:
                _activate(dom, entry, timeout)
            _fill(dom, entry, next_definition, data)
            dom.unlock(timeout)  # the end of a `with` block would wait for ever
        finally:
            dom._release_unseen()
    except BaseException:
        if dom is not None:
            doms._take_back(dom, made, timeout)
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


def _activate(dom: Any, entry: _Entry, timeout: float | None) -> None:
    try:
        dom.activate(entry.pid, host=entry.host, timeout=timeout)
    except ValueError as exc:  # another host's, or no name of a host
        raise DefinitionError(str(exc)) from None


def _fill(dom: Any, entry: _Entry, next_definition: DomainDef | None, data: Any) -> None:
    dom.set_state(entry.state, entry.reason)
    dom.autostart = entry.autostart
    dom.next_definition = next_definition
    dom.data = data


def _entries(stream: IO[bytes]) -> Iterator[_Entry]:
    # No entry holds a sequence, nor more fields than this; a larger claim is damage.
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
