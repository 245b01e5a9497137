"""`DomainDef`: libvirt's domain XML as an immutable, typed value (``virDomainDef``).

A definition is its document plus a typed view of what a manager needs most. The view is made once,
when the XML is read. The document is kept as text, so everything else in it survives: metadata of
other programs, comments, elements of future libvirt versions.

Promises. `DomainDef.from_xml` refuses an invalid document by the rules, and mostly in the words, of
libvirt 9.0.0, with a `DefinitionError` that names element and line; what only a hypervisor's driver
can judge is accepted. `DomainDef.replace` checks by the same rules, so no definition is ever
invalid. A changed field is written into the document only when `DomainDef.to_xml` is called.
`DomainDef.encode` makes the blob for shared memory: MessagePack, with the typed view beside the
document's text, so that decoding parses no XML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple
from uuid import UUID

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from ..errors import DefinitionError
from ..names import check_name, check_text, parse_number, parse_uuid
from ..packing import pack
from ..text import shortened, shown
from . import devices, document
from .devices import ConsoleDef, DiskDef, GraphicsDef, HostdevDef, InterfaceDef
from .document import MAX_BYTES, Element

__all__ = [
    "ConsoleDef",
    "DiskDef",
    "DomainDef",
    "GraphicsDef",
    "HostdevDef",
    "InterfaceDef",
    "OSDef",
]

KiB = Annotated[int, Meta(ge=0, lt=2**53)]
Count = Annotated[int, Meta(ge=-1, lt=2**32)]


class OSDef(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """The guest's ``<os>``: `type` (``hvm``, ``linux``, ``exe``, ...), `arch`, `machine`.

    >>> OSDef("hvm", arch="x86_64", machine="q35").arch
    'x86_64'
    """

    type: str
    arch: str | None = None
    machine: str | None = None


class DomainDef(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    array_like=True,
    forbid_unknown_fields=True,
    tag="domain",
    tag_field="kind",
    eq=False,
    gc=False,
):
    """A domain's definition: immutable, typed, and with its whole document (``virDomainDef``).

    Made from XML with `from_xml`, or from values; both are checked by the same rules. `memory` and
    `current_memory` are in KiB. `current_memory` is `memory` if it is 0 or left out, as in libvirt,
    and never more. `current_vcpus` is `vcpus` if left out. A lifecycle action that the document
    does not name is ``None`` (the hypervisor's default). Two definitions are equal if they mean the
    same: indentation, the spelling of typed values and the ``id`` do not count.

    Raises `DefinitionError` for what libvirt would refuse. Values are hashable, can be pickled, and
    are safe to share between threads.

    >>> guest = DomainDef(name="web1", type="kvm", memory=2 << 20, os=OSDef("hvm"))
    >>> print(guest.replace(vcpus=4).to_xml())
    <domain type="kvm">
      <name>web1</name>
      <memory unit="KiB">2097152</memory>
      <currentMemory unit="KiB">2097152</currentMemory>
      <vcpu>4</vcpu>
      <os>
        <type>hvm</type>
      </os>
    </domain>
    """

    name: str
    type: str
    memory: KiB
    os: OSDef
    uuid: UUID | None = None
    title: str | None = None
    description: str | None = None
    current_memory: KiB = 0
    vcpus: Count = 1
    current_vcpus: Count = -1
    on_poweroff: str | None = None
    on_reboot: str | None = None
    on_crash: str | None = None
    on_lockfailure: str | None = None
    emulator: str | None = None
    disks: tuple[DiskDef, ...] = ()
    interfaces: tuple[InterfaceDef, ...] = ()
    graphics: tuple[GraphicsDef, ...] = ()
    hostdevs: tuple[HostdevDef, ...] = ()
    consoles: tuple[ConsoleDef, ...] = ()
    # The document, and the fields that are not yet written into it; one value, so that a thread
    # that renders it changes both at once. No document: made from values, no field is written yet.
    _source: tuple[str, tuple[str, ...]] = ("", ())

    def __post_init__(self) -> None:
        if self._source[0]:
            return
        given = {field: getattr(self, field) for field in _FIELDS}
        if self.current_vcpus == -1:
            given["current_vcpus"] = self.vcpus
        for field, value in _valid(given, None).items():
            force_setattr(self, field, value)

    @classmethod
    def from_xml(cls, text: str | bytes) -> DomainDef:
        """Read libvirt domain XML (``virDomainDefParseString``, as for an inactive domain).

        Bytes are decoded as their XML declaration says; the declaration of a `str` is ignored.
        ``id`` is ignored. Raises `DefinitionError`, naming element and line, for XML that is not
        well-formed, beyond lxml's limits (256 levels, 10 MB in one text), larger than 16 MiB or
        with a document type declaration, and for what libvirt refuses in name, uuid, title, memory,
        vcpu, os and actions. Reading takes time in proportion to the size, and at most 64 times the
        size in memory (if all of it is tags; usually 10 times).

        >>> DomainDef.from_xml('''<domain type="kvm">
        ...   <name>web1</name> <memory unit="GB">1</memory> <os><type>hvm</type></os>
        ... </domain>''').memory
        976563
        >>> DomainDef.from_xml("<domain type='kvm'><name>a/b</name></domain>")
        Traceback (most recent call last):
        ...
        shmdomains.errors.InvalidName: name a/b cannot contain '/' (<name>, line 1)
        """
        root, source = document.parse(text)
        if root.tag != "domain":
            found = shortened(str(root.tag))
            raise document.refusal(f"expecting root element of 'domain', not '{found}'", root)
        top = document.first_children(root)
        virt_type = root.get("type")
        if not virt_type:
            raise document.refusal("missing domain type attribute", root)
        if virt_type not in _TYPES:
            document.checked(_check_type, root, virt_type)
        name = top.get("name")
        if name is None:
            raise document.refusal("missing name information", root)
        checked_name = document.checked(check_name, name, document.text_of(name))
        uuid = _read_uuid(root, top)
        title = _read_text(top.get("title"))
        if title is not None:
            document.checked(_check_title, top["title"], title)
        containers = _containers(root, top)
        memory, current = _read_memory(root, top, containers)
        vcpus, current_vcpus = _read_vcpus(root, top)
        actions = [_read_action(top, event) for event in _ACTIONS]
        metadata = top.get("metadata")
        if metadata is not None and _sanitize_metadata(metadata):
            source = document.serialise(root)
        return cls(
            name=checked_name,
            type=virt_type,
            memory=memory,
            os=_read_os(root, top),
            uuid=uuid,
            title=title,
            description=_read_text(top.get("description")),
            current_memory=current,
            vcpus=vcpus,
            current_vcpus=current_vcpus,
            on_poweroff=actions[0],
            on_reboot=actions[1],
            on_crash=actions[2],
            on_lockfailure=actions[3],
            emulator=_read_emulator(containers),
            _source=(source, ()),
            **devices.read(containers),
        )

    def to_xml(self) -> str:
        """The document with all changes written into it, without an XML declaration.

        Unchanged parts stay as they were read; an unchanged document is identical. The result is
        cached.

        >>> xml = "<domain type='xen'><name>a</name><memory>9</memory><os><type>xen</type></os>"
        >>> changed = DomainDef.from_xml(xml + "<!-- mine --></domain>").replace(name="b")
        >>> changed.to_xml().partition("<memory>")[0]
        '<domain type="xen"><name>b</name>'
        >>> changed.to_xml().endswith("<!-- mine --></domain>")
        True
        """
        text, stale = self._source
        if text and not stale:
            return text
        if text:
            root, _ = document.parse(text)
        else:
            root, stale = document.make("domain"), _FIELDS
        for field in stale:
            self._write(root, field)
        if not text:
            document.indent(root)
        text = document.serialise(root)
        force_setattr(self, "_source", (text, ()))
        return text

    def _write(self, root: Element, field: str) -> None:
        writer = _WRITERS.get(field)
        if writer is None:
            raise DefinitionError(f"a blob with an unknown field {shown(field)}")
        try:
            writer(root, self)
        except ValueError as error:  # only a blob can hold what XML cannot carry
            raise DefinitionError(f"{field} cannot be written: {error}", field) from None

    def replace(self, **changes: Any) -> DomainDef:
        """A copy with these fields changed, checked by the rules of `from_xml`.

        `uuid` may be a `uuid.UUID`, text or 16 bytes. If `memory` changes, a `current_memory` that
        was equal stays equal; otherwise it is lowered only if it has to be. The same holds for
        `vcpus`, but fewer than are in use is refused. Counts of vCPUs replace a ``<vcpus>`` list.

        Lists of devices are replaced as a whole. The same device (see `DiskDef` and the others)
        keeps those parts of its XML that have no typed value, a new one has only its typed values,
        one that is not listed is removed. If typed values are not enough, change the XML and use
        `from_xml`.

        Raises `DefinitionError` for a bad value, `TypeError` for a field that does not exist.

        >>> guest = DomainDef(name="a", type="kvm", memory=1024, os=OSDef("hvm"))
        >>> guest.replace(disks=[DiskDef("vda", source="/srv/a.img")]).disks[0].source
        '/srv/a.img'
        >>> guest.replace(name="a/b")
        Traceback (most recent call last):
        ...
        shmdomains.errors.InvalidName: name a/b cannot contain '/' (<name>)
        """
        unknown = changes.keys() - set(_FIELDS)
        if unknown:
            raise TypeError(
                f"no such field: {', '.join(sorted(unknown))}; there are {', '.join(_FIELDS)}. "
                "For the rest of the document change the XML and use DomainDef.from_xml"
            )
        text, stale = self._source
        if any(field in devices.KINDS and field in stale for field in changes):
            # Devices are matched with the document's, so write the former change into it first.
            self.to_xml()
            text, stale = self._source
        new = _valid(_followed(self, changes), self)
        new = {field: value for field, value in new.items() if getattr(self, field) != value}
        if not new:
            return self
        if text:
            written = [*new]
            if "memory" in new and "current_memory" not in new:
                written.append("current_memory")  # the document may leave it to the memory
            stale = (*stale, *(field for field in written if field not in stale))
        return msgspec.structs.replace(self, **new, _source=(text, stale))

    def encode(self) -> bytes:
        """The blob for `decode`: MessagePack, 16 MiB at most.

        Raises `DefinitionError` if it is larger.

        >>> guest = DomainDef(name="a", type="kvm", memory=1024, os=OSDef("hvm"))
        >>> DomainDef.decode(guest.encode()) == guest
        True
        """
        blob = pack(self)
        if len(blob) > MAX_BYTES:
            raise DefinitionError(f"the definition has {len(blob)} bytes, more than {MAX_BYTES}")
        return blob

    @classmethod
    def decode(cls, blob: bytes | bytearray | memoryview) -> DomainDef:
        """The definition that `encode` made this blob of; keeps no reference to the blob.

        Raises `DefinitionError` for anything that is no such blob. The values in a well-formed blob
        are not validated again: they were when the definition was made.

        >>> DomainDef.decode(b"garbage")
        Traceback (most recent call last):
        ...
        shmdomains.errors.DefinitionError: not a definition: Expected `array`, got `int`
        """
        try:
            if len(blob) > MAX_BYTES:
                raise DefinitionError(f"a blob of {len(blob)} bytes, more than {MAX_BYTES}")
            return _DECODER.decode(blob)
        except DefinitionError:
            raise
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            raise DefinitionError(f"not a definition: {shortened(str(error), 200)}") from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DomainDef):
            return NotImplemented
        if self is other:
            return True
        if any(getattr(self, field) != getattr(other, field) for field in _FIELDS):
            return False
        if self._source == other._source:
            return True
        return _rest(self) == _rest(other)

    def __ne__(self, other: object) -> bool:
        # msgspec.Struct's own would compare by identity.
        return not self == other

    def __hash__(self) -> int:
        return hash((self.name, self.uuid, self.type, self.memory, self.vcpus, self.title))

    def __repr__(self) -> str:
        return (
            f"DomainDef(name={self.name!r}, uuid={str(self.uuid) if self.uuid else None!r}, "
            f"type={self.type!r}, memory={self.memory}, vcpus={self.vcpus}, "
            f"disks={len(self.disks)}, interfaces={len(self.interfaces)}, ...)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return DomainDef.decode, (self.encode(),)


class EncodedDef(NamedTuple):
    """A definition as its blob, with the name and UUID that a list needs to insert it.

    For whoever only passes definitions on: decoding and encoding one takes as long as inserting it.
    """

    name: str
    uuid: bytes | None
    blob: bytes

    @classmethod
    def of(cls, definition: DomainDef) -> EncodedDef:
        """Raises `DefinitionError` as `DomainDef.encode` does."""
        uuid = None if definition.uuid is None else definition.uuid.bytes
        return cls(definition.name, uuid, definition.encode())

    def encode(self) -> bytes:
        return self.blob

    def decoded(self) -> DomainDef:
        return DomainDef.decode(self.blob)


_FIELDS = tuple(field for field in DomainDef.__struct_fields__ if not field.startswith("_"))
_DECODER = msgspec.msgpack.Decoder(DomainDef)

# virDomainVirtType, with types that no driver runs any more: documents still have them.
_TYPES = frozenset(
    (
        *("none", "qemu", "kqemu", "kvm", "xen", "lxc", "uml", "openvz", "test", "vmware"),
        *("hyperv", "vbox", "phyp", "parallels", "bhyve", "vz", "hvf"),
    )
)
_LIFE = ("destroy", "restart", "rename-restart", "preserve")
_ACTIONS: dict[str, tuple[str, ...]] = {
    "on_poweroff": _LIFE,
    "on_reboot": _LIFE,
    "on_crash": (*_LIFE, "coredump-destroy", "coredump-restart"),
    "on_lockfailure": ("default", "poweroff", "restart", "pause", "ignore"),
}


# --- rules: text in, value out --------------------------------------------------------------

_MAX_BYTES_OF_MEMORY = 2**63 - 1
_SCALES = {"b": 1, "byte": 1, "bytes": 1}
for _power, _letter in enumerate("kmgtpe", 1):
    _SCALES[_letter] = _SCALES[_letter + "ib"] = 1024**_power
    _SCALES[_letter + "b"] = 1000**_power


def parse_memory(text: str, unit: str | None = None) -> int:
    """A size in KiB, rounded up (``virDomainParseMemory``, ``virScaleInteger``).

    The unit is KiB if none is given; ``k`` and ``KiB`` are 1024 bytes, ``KB`` 1000, and so on to
    ``E``; ``b``, ``byte``, ``bytes``; any case. Raises `DefinitionError` for an unknown unit, what
    is no number of at least 0, and 8 EiB or more.

    >>> parse_memory("1", "GB"), parse_memory("3", "mib"), parse_memory("1025", "bytes")
    (976563, 3072, 2)
    """
    value = parse_number(text, 2**64 - 1)
    if value is None:
        raise DefinitionError(f"Invalid value {shown(text)} for a memory size")
    scale = _SCALES.get((unit or "KiB").lower())
    if scale is None:
        raise DefinitionError(f"unknown suffix {shown(unit or '')}")
    if value * scale > _MAX_BYTES_OF_MEMORY:
        raise DefinitionError(f"value too large: {value}{unit or ''}")
    size = -(-value * scale // 1024)
    if size >= 2**53:
        raise DefinitionError(f"size value too large: {value}{unit or ''}")
    return size


def _check_type(virt_type: str) -> str:
    if virt_type not in _TYPES:
        raise DefinitionError(f"invalid domain type {shortened(virt_type)}")
    return virt_type


def _check_title(title: str) -> str:
    if "\n" in title:
        raise DefinitionError("Domain title can't contain newlines", "title")
    return title


def _check_action(event: str, action: str) -> str:
    if action in _ACTIONS[event]:
        return action
    raise DefinitionError(
        f"unknown {event} action: {shown(action)}; there are {', '.join(_ACTIONS[event])}", event
    )


# --- reading the document -------------------------------------------------------------------


def _containers(root: Element, top: document.Children) -> list[Element]:
    """All ``<devices>``. Usually no tag is there twice, and then this searches nothing."""
    if "devices" not in top:
        return []
    return [top["devices"]] if len(top) == len(root) else list(root.iterchildren("devices"))


def _read_text(element: Element | None) -> str | None:
    return None if element is None else document.text_of(element) or None


def _read_action(top: document.Children, event: str) -> str | None:
    action = _read_text(top.get(event))
    if action is None or action in _ACTIONS[event]:
        return action
    return document.checked(_check_action, top[event], event, action)


def _read_uuid(root: Element, top: document.Children) -> UUID | None:
    text = _read_text(top.get("uuid"))
    uuid = None if text is None else document.checked(parse_uuid, top["uuid"], text)
    if "sysinfo" not in top:
        return uuid
    # The guest reads the uuid in the firmware's tables, so libvirt wants both to be equal.
    for entry in _sysinfo_uuids(root):
        text = _read_text(entry)
        if text is None:
            continue
        other = document.checked(parse_uuid, entry, text)
        if uuid is not None and other != uuid:
            raise document.refusal("UUID mismatch between <uuid> and <sysinfo>", entry)
        uuid = other
    return uuid


def _sysinfo_uuids(root: Element) -> list[Element]:
    return list(root.iterfind("sysinfo[@type='smbios']/system/entry[@name='uuid']"))


def _read_memory(
    root: Element, top: document.Children, containers: list[Element]
) -> tuple[int, int]:
    memory = _read_size(top.get("memory"))
    current = _read_size(top.get("currentMemory"))
    if not memory:
        memory = _numa_memory(root, containers)
    if not memory:
        raise document.refusal(
            "Memory size must be specified via <memory> or in the <numa> configuration",
            top.get("memory", root),
        )
    return memory, min(current, memory) if current else memory


def _read_size(element: Element | None) -> int:
    text = _read_text(element)
    if element is None or text is None:
        return 0
    return document.checked(parse_memory, element, text, element.get("unit"))


def _numa_memory(root: Element, containers: list[Element]) -> int:
    """The sum of the NUMA cells, and of the memory modules if there are cells."""
    total = 0
    for cell in root.iterfind("cpu/numa/cell"):
        try:
            total += parse_memory(cell.get("memory") or "0", cell.get("unit"))
        except DefinitionError as error:
            raise document.located(error, cell) from None
    if not total:
        return 0
    for container in containers:
        for size in container.iterfind("memory/target/size"):
            total += _read_size(size)
    return total


def _read_vcpus(root: Element, top: document.Children) -> tuple[int, int]:
    element = top.get("vcpu")
    total = current = 1
    if element is not None:
        total = _read_count(element, document.text_of(element), "maximum vcpus count")
        if total == 0:
            raise document.refusal("invalid maximum number of vCPUs '0'", element)
        text = element.get("current")
        current = total if text is None else _read_count(element, text, "current vcpus count")
    if "vcpus" in top:
        listed = _listed_vcpus(top["vcpus"], total)
        current = current if listed is None else listed
    if current > total:
        raise document.refusal(
            f"maximum vCPU count must not be less than current vCPU count ({total} < {current})",
            root if element is None else element,
        )
    return total, current


def _read_count(element: Element, text: str, what: str) -> int:
    count = parse_number(text, 2**32 - 1)
    if count is None:
        raise document.refusal(f"{what} must be an integer, not {shown(text)}", element)
    return count


def _listed_vcpus(element: Element, total: int) -> int | None:
    """How many vCPUs the list enables; ``None`` if it is empty."""
    enabled: dict[int, bool] = {}
    for vcpu in element.iterchildren("vcpu"):
        number = _read_count(vcpu, vcpu.get("id") or "", "a vcpu's id")
        if number >= total:
            raise document.refusal(
                f"vcpu id '{number}' is out of range of maximum vcpu count", vcpu
            )
        word = vcpu.get("enabled")
        if word not in ("yes", "no"):
            raise document.refusal(
                f"Invalid value for attribute 'enabled' in element 'vcpu': {shown(word or '')}",
                vcpu,
            )
        enabled[number] = word == "yes"
    return sum(enabled.values()) if enabled else None


def _os_type(os: Element | None) -> Element | None:
    """The ``<type>`` of this ``<os>``, else of the next one that has any."""
    while os is not None:
        kind = document.child(os, "type")
        if kind is not None:
            return kind
        os = next(os.itersiblings("os"), None)
    return None


def _read_os(root: Element, top: document.Children) -> OSDef:
    kind = _os_type(top.get("os"))
    text = _read_text(kind)
    if kind is not None and text is not None:
        return OSDef(text, kind.get("arch") or None, kind.get("machine") or None)
    if _read_text(top.get("bootloader")) is not None:
        return OSDef("xen")
    raise document.refusal("an os <type> must be specified", top.get("os", root))


def _read_emulator(containers: Iterable[Element]) -> str | None:
    for container in containers:
        element = document.child(container, "emulator")
        if element is not None:
            return document.text_of(element) or None
    return None


def _sanitize_metadata(metadata: Element) -> bool:
    """Drop what libvirt drops (``virXMLNodeSanitizeNamespaces``); true if anything was."""
    seen: set[str] = set()
    unwanted = []
    for element in metadata.iterchildren("*"):
        namespace = element.tag[1:].partition("}")[0] if element.tag[0] == "{" else ""
        if namespace and namespace not in seen:
            seen.add(namespace)
        else:
            unwanted.append(element)
    document.drop_all(unwanted)
    return bool(unwanted)


# --- checking values ------------------------------------------------------------------------


def _followed(old: DomainDef, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes, and the changes of current memory and vCPUs that follow from them."""
    if "memory" in changes and "current_memory" not in changes:
        equal = old.current_memory == old.memory
        changes["current_memory"] = 0 if equal else old.current_memory
    if "current_memory" in changes and "memory" not in changes:
        changes["memory"] = old.memory
    if "vcpus" in changes and "current_vcpus" not in changes:
        equal = old.current_vcpus == old.vcpus
        changes["current_vcpus"] = changes["vcpus"] if equal else old.current_vcpus
    if "current_vcpus" in changes and "vcpus" not in changes:
        changes["vcpus"] = old.vcpus
    return changes


def _valid(values: dict[str, Any], old: DomainDef | None) -> dict[str, Any]:
    """The validated values, or a `DefinitionError` that names the field."""
    valid: dict[str, Any] = {}
    for field, value in values.items():
        if field in devices.KINDS:
            present = () if old is None else getattr(old, field)
            valid[field] = devices.check(field, value, present)
            continue
        try:
            valid[field] = _RULES[field](value)
        except DefinitionError as error:
            raise type(error)(f"{error} (<{field}>)", field) from None
    if "memory" in valid:
        valid["current_memory"] = min(valid["current_memory"] or valid["memory"], valid["memory"])
    if "vcpus" in valid and valid["current_vcpus"] > valid["vcpus"]:
        raise DefinitionError(
            "maximum vCPU count must not be less than current vCPU count "
            f"({valid['vcpus']} < {valid['current_vcpus']}) (<current_vcpus>)",
            "current_vcpus",
        )
    return valid


def _integer(low: int, limit: int, unit: str) -> Callable[[Any], int]:
    def rule(value: Any) -> int:
        if type(value) is not int:
            raise DefinitionError(f"must be an int ({unit}), not {type(value).__name__}")
        if not low <= value < limit:
            raise DefinitionError(f"{value} is not from {low} to {limit - 1} ({unit})")
        return value

    return rule


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise DefinitionError(f"must be a str, not {type(value).__name__}")
    if not value:
        raise DefinitionError("must not be empty")
    return check_text("it", value)


def _optional(value: Any) -> str | None:
    return None if value is None or value == "" else _string(value)


def _valid_os(value: Any) -> OSDef:
    if type(value) is not OSDef:
        raise DefinitionError(f"must be an OSDef, not {type(value).__name__}")
    return OSDef(_string(value.type), _optional(value.arch), _optional(value.machine))


def _valid_title(value: Any) -> str | None:
    title = _optional(value)
    return None if title is None else _check_title(title)


def _valid_action(event: str) -> Callable[[Any], str | None]:
    def rule(value: Any) -> str | None:
        action = _optional(value)
        return None if action is None else _check_action(event, action)

    return rule


_RULES: dict[str, Callable[[Any], Any]] = {
    "name": check_name,
    "uuid": lambda value: None if value is None or value == "" else parse_uuid(value),
    "title": _valid_title,
    "description": _optional,
    "type": lambda value: _check_type(_string(value)),
    "memory": _integer(1, 2**53, "KiB"),
    "current_memory": _integer(0, 2**53, "KiB"),
    "vcpus": _integer(1, 2**32, "vCPUs"),
    "current_vcpus": _integer(0, 2**32, "vCPUs"),
    "os": _valid_os,
    "emulator": _optional,
    **{event: _valid_action(event) for event in _ACTIONS},
}


# --- writing back ---------------------------------------------------------------------------

# For a new element: the elements that come before it in libvirt's order.
_ORDER = (
    "name",
    "uuid",
    "genid",
    "title",
    "description",
    "metadata",
    "maxMemory",
    "memory",
    "currentMemory",
    "blkiotune",
    "memtune",
    "memoryBacking",
    "vcpu",
    "vcpus",
    "iothreads",
    "iothreadids",
    "defaultiothread",
    "cputune",
    "numatune",
    "resource",
    "sysinfo",
    "bootloader",
    "bootloader_args",
    "os",
    "idmap",
    "features",
    "cpu",
    "clock",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "on_lockfailure",
    "pm",
    "perf",
    "devices",
)


def _made(root: Element, tag: str) -> Element:
    return document.make_child(root, tag, _ORDER[: _ORDER.index(tag)])


def _write_text(root: Element, tag: str, text: str | None) -> None:
    if text is not None:
        document.set_text(_made(root, tag), text)
        return
    document.drop_every(root, tag)


def _text_writer(tag: str) -> Callable[[Element, DomainDef], None]:
    return lambda root, definition: _write_text(root, tag, getattr(definition, tag))


def _write_uuid(root: Element, definition: DomainDef) -> None:
    text = None if definition.uuid is None else str(definition.uuid)
    _write_text(root, "uuid", text)
    for entry in _sysinfo_uuids(root):
        document.set_text(entry, text or "")


def _size_writer(field: str, tag: str) -> Callable[[Element, DomainDef], None]:
    def write(root: Element, definition: DomainDef) -> None:
        element = _made(root, tag)
        element.set("unit", "KiB")
        document.set_text(element, str(getattr(definition, field)))

    return write


def _write_vcpus(root: Element, definition: DomainDef) -> None:
    element = _made(root, "vcpu")
    total, current = definition.vcpus, definition.current_vcpus
    document.set_text(element, str(total))
    document.set_attribute(element, "current", None if current == total else str(current))
    # It says which vCPUs are enabled and would overrule the counts.
    _write_text(root, "vcpus", None)


def _write_os(root: Element, definition: DomainDef) -> None:
    found = next((os for os in root.iterchildren("os") if len(os) and _has_type(os)), None)
    kind = document.make_child(found if found is not None else _made(root, "os"), "type")
    document.set_text(kind, definition.os.type)
    document.set_attribute(kind, "arch", definition.os.arch)
    document.set_attribute(kind, "machine", definition.os.machine)


def _has_type(os: Element) -> bool:
    return document.child(os, "type") is not None


def _write_emulator(root: Element, definition: DomainDef) -> None:
    if definition.emulator is None:
        for container in root.iterchildren("devices"):
            document.drop_every(container, "emulator")
        return
    found = next(root.iterfind("devices/emulator"), None)
    if found is None:
        found = document.make("emulator")
        document.put(_made(root, "devices"), found, None)
    document.set_text(found, definition.emulator)


def _devices_writer(kind: str) -> Callable[[Element, DomainDef], None]:
    def write(root: Element, definition: DomainDef) -> None:
        wanted = getattr(definition, kind)
        if wanted or document.child(root, "devices") is not None:
            devices.update(root, kind, wanted)

    return write


_WRITERS: dict[str, Callable[[Element, DomainDef], None]] = {
    "name": _text_writer("name"),
    "uuid": _write_uuid,
    "title": _text_writer("title"),
    "description": _text_writer("description"),
    "type": lambda root, definition: root.set("type", definition.type),
    "memory": _size_writer("memory", "memory"),
    "current_memory": _size_writer("current_memory", "currentMemory"),
    "vcpus": _write_vcpus,
    "current_vcpus": _write_vcpus,
    "os": _write_os,
    "emulator": _write_emulator,
    **{event: _text_writer(event) for event in _ACTIONS},
    **{kind: _devices_writer(kind) for kind in devices.KINDS},
}


# --- comparing ------------------------------------------------------------------------------


def _rest(definition: DomainDef) -> str:
    """The document without the top level's typed values, in canonical form."""
    root, _ = document.parse(definition.to_xml())
    document.set_attribute(root, "type", None)
    document.set_attribute(root, "id", None)
    kind = next(root.iterfind("os/type"), None)
    for element in (
        *(document.child(root, tag) for tag in ("name", "uuid", "title", "description")),
        *(document.child(root, tag) for tag in ("memory", "currentMemory", "vcpu", "vcpus")),
        *(document.child(root, event) for event in _ACTIONS),
        next(root.iterfind("devices/emulator"), None),
        kind,
    ):
        _forget(element)
    for entry in _sysinfo_uuids(root):
        document.set_text(entry, "")
    for element in (document.child(root, "os"), document.child(root, "devices")):
        if element is not None and not len(element) and not element.attrib:
            document.drop(element)
    return document.canonical(root)


_TYPED_ATTRIBUTES = {
    "memory": ("unit",),
    "currentMemory": ("unit",),
    "vcpu": ("current",),
    "type": ("arch", "machine"),
}


def _forget(element: Element | None) -> None:
    """Remove the typed part of an element, and the element if nothing is left of it."""
    if element is None:
        return
    document.set_text(element, "")
    for attribute in _TYPED_ATTRIBUTES.get(str(element.tag), ()):
        document.set_attribute(element, attribute, None)
    if not element.attrib:
        document.drop(element)
