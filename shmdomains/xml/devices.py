"""The devices that a manager needs most, as typed values, and how they are read and written.

A definition keeps its whole document; these values are a view of part of it. Each kind is one
class and one table, `_TABLES`, that says where each field is in the element. Reading and writing
use the same table, so they cannot disagree.

Promises. Reading never refuses: a value of the wrong type is ``None``, since only a hypervisor's
driver can say what is wrong with a device. Writing a changed list (`update`) leaves the elements of
unchanged devices as they are, changes what differs in the element of the same device (each class
says what makes it the same), removes the elements of devices that are gone, and makes new elements
for new ones. What cannot be expressed in typed values is refused in advance (`check`), not dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ..errors import DefinitionError
from ..names import check_text
from ..packing import pack
from .document import (
    Children,
    Element,
    child,
    drop,
    drop_every,
    first_children,
    indent,
    make,
    make_child,
    put,
    set_attribute,
    set_text,
    text_of,
)


class DiskDef(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A disk, CD-ROM or floppy drive. The same disk is one with the same `target`.

    `source` is the file, device, directory, volume or network image, whichever `type` says;
    ``None`` for an empty drive. `format` and `driver` are the driver's type and name.

    >>> DiskDef("vda", source="/srv/web1.qcow2", format="qcow2", bus="virtio").type
    'file'
    """

    target: str | None
    source: str | None = None
    type: str = "file"
    device: str = "disk"
    bus: str | None = None
    driver: str | None = None
    format: str | None = None
    cache: str | None = None
    protocol: str | None = None
    pool: str | None = None
    serial: str | None = None
    boot_order: int | None = None
    readonly: bool = False
    shareable: bool = False


class InterfaceDef(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False
):
    """A network interface. The same interface is one with the same `mac`.

    `source` is the network, bridge or host device, whichever `type` says; `target` the name of the
    device on the host.

    >>> InterfaceDef("network", source="default", model="virtio").source
    'default'
    """

    type: str
    source: str | None = None
    mac: str | None = None
    model: str | None = None
    target: str | None = None
    link: str | None = None
    boot_order: int | None = None


class GraphicsDef(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False
):
    """A graphical console. The same one has the same `type` (vnc, spice, ...).

    `port` is -1 if the hypervisor chooses; `listen` is the address. A password stays in the
    document and is no field here, so that it is not logged by accident.

    >>> GraphicsDef("vnc", port=-1, autoport=True).autoport
    True
    """

    type: str | None
    port: int | None = None
    tls_port: int | None = None
    websocket: int | None = None
    autoport: bool | None = None
    listen: str | None = None
    socket: str | None = None


class HostdevDef(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False
):
    """A device of the host, passed through. The same one has the same `address` and `product`.

    `address` is ``0000:06:12.5`` for PCI, ``bus.device`` for USB, the UUID for a mediated device,
    ``adapter:bus:target:unit`` for SCSI (which is read, not written), the path or interface for
    containers; `product` is ``vendor:product`` for USB, as `lsusb` has it.

    >>> HostdevDef("pci", address="0000:06:12.5", managed=True).mode
    'subsystem'
    """

    type: str | None
    address: str | None = None
    product: str | None = None
    mode: str = "subsystem"
    managed: bool | None = None
    model: str | None = None


class ConsoleDef(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False
):
    """A text console. The same one has the same `target_type` and `target_port`.

    `source` is the path of the host's end: a terminal, pipe, file or socket.

    >>> ConsoleDef(target_type="serial", target_port=0).type
    'pty'
    """

    type: str = "pty"
    source: str | None = None
    target_type: str | None = None
    target_port: int | None = None


# --- where a field stands -------------------------------------------------------------------


class _Slot:
    """One field's place in the element: its attribute, or that of its child `tag` if given.

    `_Table.read` reads it; `typed` converts the attribute, ``None`` if it is the field as it is.
    """

    __slots__ = ("attribute", "default", "tag")
    typed: Callable[[str], Any] | None = None

    def __init__(self, attribute: str, tag: str = "", default: Any = None) -> None:
        self.attribute, self.tag, self.default = attribute, tag, default

    def write(self, element: Element, device: Any, value: Any) -> None:
        if not self.tag:
            set_attribute(element, self.attribute, self.text(value))
            return
        if value is not None:
            set_attribute(make_child(element, self.tag), self.attribute, self.text(value))
            return
        node = child(element, self.tag)
        if node is None:
            return
        set_attribute(node, self.attribute, None)
        if not node.attrib and not len(node):
            drop_every(element, self.tag)

    def text(self, value: Any) -> str | None:
        return value  # type: ignore[no-any-return]


class _Number(_Slot):
    __slots__ = ()

    @staticmethod
    def typed(value: str) -> int | None:
        try:
            number = int(value)
        except ValueError:
            return None
        return number if -(2**31) <= number < 2**32 else None

    def text(self, value: int | None) -> str | None:
        return None if value is None else str(value)


class _YesNo(_Slot):
    __slots__ = ()

    @staticmethod
    def typed(value: str) -> bool | None:
        return {"yes": True, "no": False}.get(value)

    def text(self, value: bool | None) -> str | None:
        return None if value is None else "yes" if value else "no"


class _Elsewhere(_Slot):
    """A field that needs its own reader and writer. If the child `tag` is missing, it is
    `default`."""

    __slots__ = ()

    def read(self, element: Element, children: Children) -> Any:
        """The field, from the element and the first child of each tag."""
        raise NotImplementedError


class _Presence(_Elsewhere):
    """True if there is such a child."""

    __slots__ = ()

    def __init__(self, tag: str) -> None:
        super().__init__("", tag, default=False)

    def read(self, element: Element, children: Children) -> bool:
        return True

    def write(self, element: Element, device: Any, value: bool) -> None:
        if value:
            make_child(element, self.tag)
            return
        drop_every(element, self.tag)


class _Text(_Elsewhere):
    """The text of a child."""

    __slots__ = ()

    def read(self, element: Element, children: Children) -> str | None:
        return text_of(children[self.tag]) or None

    def write(self, element: Element, device: Any, value: str | None) -> None:
        if value is not None:
            set_text(make_child(element, self.tag), value)
            return
        drop_every(element, self.tag)


class _Source(_Elsewhere):
    """The attribute of ``<source>`` whose name depends on the device's type."""

    __slots__ = ("by_type",)

    def __init__(self, by_type: dict[str, str]) -> None:
        super().__init__("", "source")
        self.by_type = by_type

    def read(self, element: Element, children: Children) -> str | None:
        attribute = self.by_type.get(element.get("type") or "file")
        return (children["source"].get(attribute) or None) if attribute else None

    def write(self, element: Element, device: Any, value: str | None) -> None:
        node = child(element, "source")
        if node is not None:
            for attribute in set(self.by_type.values()):
                set_attribute(node, attribute, None)
        place = self.by_type.get(device.type)
        if value is not None and place:
            make_child(element, "source").set(place, value)
        elif node is not None and not node.attrib and not len(node):
            drop_every(element, "source")


class _Listen(_Elsewhere):
    """The address: an attribute, the first ``<listen>``, or both, which then must agree."""

    __slots__ = ()

    def read(self, element: Element, children: Children) -> str | None:
        node = children.get("listen")
        inner = node.get("address") if node is not None else None
        return inner or element.get("listen") or None

    def write(self, element: Element, device: Any, value: str | None) -> None:
        set_attribute(element, "listen", value)
        node = child(element, "listen")
        if node is None:
            return
        if value is None:
            drop_every(element, "listen")
            return
        node.attrib.clear()
        node.set("type", "address")
        node.set("address", value)


class _ListenSocket(_Elsewhere):
    """A socket: an attribute, or in the first ``<listen>``."""

    __slots__ = ()

    def read(self, element: Element, children: Children) -> str | None:
        node = children.get("listen")
        inner = node.get("socket") if node is not None else None
        return inner or element.get("socket") or None

    def write(self, element: Element, device: Any, value: str | None) -> None:
        set_attribute(element, "socket", value)
        node = child(element, "listen")
        if node is not None and node.get("type") == "socket":
            drop_every(element, "listen")


class _ConsolePath(_Elsewhere):
    """The path in ``<source>``, or in the old ``tty`` attribute."""

    __slots__ = ()
    in_source = _Slot("path", "source")

    def read(self, element: Element, children: Children) -> str | None:
        node = children.get("source")
        inner = node.get("path") if node is not None else None
        return inner or element.get("tty") or None

    def write(self, element: Element, device: Any, value: str | None) -> None:
        set_attribute(element, "tty", None)
        self.in_source.write(element, device, value)


_PCI = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")
_USB = re.compile(r"(\d+)\.(\d+)")
_USB_ID = re.compile(r"([0-9a-f]{4}):([0-9a-f]{4})")
_CONTAINER = ("block", "char", "interface")


class _HostAddress(_Elsewhere):
    """The address of the host's device, in the usual form of its bus."""

    __slots__ = ()

    def read(self, element: Element, children: Children) -> str | None:
        inner = first_children(children["source"])
        for tag in _CONTAINER:
            if tag in inner:
                return text_of(inner[tag]) or None
        address = inner.get("address")
        if address is None:
            return None
        return _address_text(element.get("type"), address, inner.get("adapter"))

    def write(self, element: Element, device: Any, value: str | None) -> None:
        source = make_child(element, "source")
        drop_every(source, "address")
        attributes = _address_attributes(device.type, value) if value is not None else None
        for name, number in (attributes or {}).items():
            make_child(source, "address").set(name, number)


def _address_text(bus: str | None, address: Element, adapter: Element | None) -> str | None:
    get = address.get
    try:
        if bus == "pci":
            domain, number = int(get("domain") or "0", 0), int(get("bus") or "0", 0)
            slot, function = int(get("slot") or "0", 0), int(get("function") or "0", 0)
            return f"{domain:04x}:{number:02x}:{slot:02x}.{function:x}"
        if bus == "usb":
            return f"{int(get('bus') or '0', 0)}.{int(get('device') or '0', 0)}"
    except ValueError:
        return None
    if bus == "mdev":
        return get("uuid") or None
    if bus == "scsi" and adapter is not None:
        parts = (adapter.get("name"), get("bus"), get("target"), get("unit"))
        return ":".join(part or "0" for part in parts)
    return None


def _address_attributes(bus: str | None, text: str) -> dict[str, str] | None:
    if bus == "pci" and (match := _PCI.fullmatch(text)):
        names = ("domain", "bus", "slot", "function")
        return {name: "0x" + part for name, part in zip(names, match.groups(), strict=True)}
    if bus == "usb" and (match := _USB.fullmatch(text)):
        return {"bus": match.group(1), "device": match.group(2)}
    if bus == "mdev":
        return {"uuid": text}
    return None


class _UsbProduct(_Elsewhere):
    """``vendor:product`` of a USB device."""

    __slots__ = ()

    def read(self, element: Element, children: Children) -> str | None:
        if element.get("type") != "usb":
            return None
        inner = first_children(children["source"])
        if "vendor" not in inner or "product" not in inner:
            return None
        try:
            vendor, product = (int(inner[tag].get("id") or "", 0) for tag in ("vendor", "product"))
        except ValueError:
            return None
        return f"{vendor:04x}:{product:04x}"

    def write(self, element: Element, device: Any, value: str | None) -> None:
        match = _USB_ID.fullmatch(value or "")
        source = make_child(element, "source")
        if match:
            make_child(source, "vendor").set("id", "0x" + match.group(1))
            make_child(source, "product").set("id", "0x" + match.group(2))


_DISK_SOURCES = {
    "file": "file",
    "block": "dev",
    "dir": "dir",
    "network": "name",
    "volume": "volume",
    "vhostuser": "path",
    "vhostvdpa": "dev",
}
_INTERFACE_SOURCES = {
    "network": "network",
    "bridge": "bridge",
    "direct": "dev",
    "internal": "name",
    "vhostuser": "path",
    "vdpa": "dev",
    "user": "dev",
    "server": "address",
    "client": "address",
    "mcast": "address",
    "udp": "address",
}


_Attribute = tuple[int, bytes, Callable[[str], Any] | None]
"""A field's index, its attribute (in the form that lxml takes fastest), and `_Slot.typed`."""
_Reader = tuple[int, Callable[[Element, Children], Any]]


_NOTHING: tuple[list[_Attribute], list[_Reader]] = ([], [])


class _Table:
    """A kind of device: its tag, its class, its fields' places, and what makes it the same."""

    def __init__(
        self,
        tag: str,
        cls: Callable[..., Any],
        key: Callable[[Any], object],
        slots: dict[str, _Slot],
    ) -> None:
        self.tag, self.cls, self.key, self.slots = tag, cls, key, slots
        self.defaults = [slot.default for slot in slots.values()]
        self.places: dict[object, tuple[list[_Attribute], list[_Reader]]] = {}
        for index, slot in enumerate(slots.values()):
            attributes, readers = self.places.setdefault(slot.tag, ([], []))
            if isinstance(slot, _Elsewhere):
                readers.append((index, slot.read))
            else:
                attributes.append((index, slot.attribute.encode(), slot.typed))
        self.decoder = msgspec.msgpack.Decoder(tuple[cls, ...])  # type: ignore[valid-type]

    def read(self, element: Element) -> Any:
        children = first_children(element)
        children[""] = element
        values = self.defaults.copy()
        # Not a method of the slots: a call for each field would take longer than all the rest.
        for tag, node in children.items():
            attributes, readers = self.places.get(tag, _NOTHING)
            for index, attribute, typed in attributes:
                value = node.get(attribute)
                if value:
                    values[index] = value if typed is None else typed(value)
            for index, read in readers:
                values[index] = read(element, children)
        return self.cls(*values)

    def write(self, element: Element, device: Any, fields: Sequence[str]) -> None:
        for field in fields:
            self.slots[field].write(element, device, getattr(device, field))


_TABLES: dict[str, _Table] = {
    # Each table lists the fields in the order of the class.
    "disks": _Table(
        "disk",
        DiskDef,
        lambda disk: disk.target,
        {
            "target": _Slot("dev", "target"),
            "source": _Source(_DISK_SOURCES),
            "type": _Slot("type", default="file"),
            "device": _Slot("device", default="disk"),
            "bus": _Slot("bus", "target"),
            "driver": _Slot("name", "driver"),
            "format": _Slot("type", "driver"),
            "cache": _Slot("cache", "driver"),
            "protocol": _Slot("protocol", "source"),
            "pool": _Slot("pool", "source"),
            "serial": _Text("", "serial"),
            "boot_order": _Number("order", "boot"),
            "readonly": _Presence("readonly"),
            "shareable": _Presence("shareable"),
        },
    ),
    "interfaces": _Table(
        "interface",
        InterfaceDef,
        lambda interface: interface.mac and interface.mac.lower(),
        {
            "type": _Slot("type", default="ethernet"),
            "source": _Source(_INTERFACE_SOURCES),
            "mac": _Slot("address", "mac"),
            "model": _Slot("type", "model"),
            "target": _Slot("dev", "target"),
            "link": _Slot("state", "link"),
            "boot_order": _Number("order", "boot"),
        },
    ),
    "graphics": _Table(
        "graphics",
        GraphicsDef,
        lambda graphics: graphics.type,
        {
            "type": _Slot("type"),
            "port": _Number("port"),
            "tls_port": _Number("tlsPort"),
            "websocket": _Number("websocket"),
            "autoport": _YesNo("autoport"),
            "listen": _Listen(""),
            "socket": _ListenSocket(""),
        },
    ),
    "hostdevs": _Table(
        "hostdev",
        HostdevDef,
        lambda hostdev: (
            (hostdev.address or hostdev.product)
            and (hostdev.mode, hostdev.type, hostdev.address, hostdev.product)
        ),
        {
            "type": _Slot("type"),
            "address": _HostAddress("", "source"),
            "product": _UsbProduct("", "source"),
            "mode": _Slot("mode", default="subsystem"),
            "managed": _YesNo("managed"),
            "model": _Slot("model"),
        },
    ),
    "consoles": _Table(
        "console",
        ConsoleDef,
        lambda console: (console.target_type, console.target_port),
        {
            "type": _Slot("type", default="pty"),
            "source": _ConsolePath(""),
            "target_type": _Slot("type", "target"),
            "target_port": _Number("port", "target"),
        },
    ),
}
KINDS = tuple(_TABLES)
"""The names of a definition's fields that are lists of devices."""

_READERS: dict[object, tuple[str, Callable[[Element], Any]]] = {
    table.tag: (kind, table.read) for kind, table in _TABLES.items()
}
"""By tag: the kind, and its reader."""


# --- reading --------------------------------------------------------------------------------


def read(containers: Sequence[Element]) -> dict[str, tuple[Any, ...]]:
    """The typed devices below these ``<devices>`` elements, by kind, in document order."""
    found: dict[str, list[Any]] = {}
    for container in containers:
        for element in container:
            reader = _READERS.get(element.tag)
            if reader is not None:
                kind, read_one = reader
                found.setdefault(kind, []).append(read_one(element))
    return {kind: tuple(devices) for kind, devices in found.items()}


# --- checking -------------------------------------------------------------------------------


def check(kind: str, wanted: Any, present: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """Return `wanted` as a tuple if it can be written into a document that has `present`.

    Raises `DefinitionError` for values of the wrong type, for two devices that would be the same
    one, and for what typed values cannot express (change the XML instead).
    """
    table = _TABLES[kind]
    devices = _typed(kind, table, wanted)
    _refuse_twins(kind, table, devices, present)
    for device, match in zip(devices, _matches(table, devices, present), strict=True):
        if match is not None and present[match] == device:
            continue
        base = None if match is None else present[match]
        unsaid = _unsaid(table, device, base)
        if unsaid:
            raise DefinitionError(
                f"{kind}: {unsaid}={getattr(device, unsaid)!r} of {device} cannot be written from "
                "typed values; change the XML and use DomainDef.from_xml",
                table.tag,
            )
    return devices


def _typed(kind: str, table: _Table, wanted: Any) -> tuple[Any, ...]:
    try:
        devices = tuple(wanted)
    except TypeError:
        raise DefinitionError(f"{kind} must be a tuple of {_name(table)}", table.tag) from None
    for device in devices:
        if type(device) is not table.cls:
            raise DefinitionError(
                f"{kind} must be {_name(table)} values, not {type(device).__name__}", table.tag
            )
        for field in table.slots:
            value = getattr(device, field)
            if isinstance(value, str):
                check_text(field, value)
    try:
        table.decoder.decode(pack(devices))
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        raise DefinitionError(f"{kind}: {error}", table.tag) from None
    return devices


def _name(table: _Table) -> str:
    return getattr(table.cls, "__name__", table.tag)


def _refuse_twins(
    kind: str, table: _Table, devices: tuple[Any, ...], present: tuple[Any, ...]
) -> None:
    keys = [table.key(device) for device in devices]
    if len(set(keys)) == len(keys):
        return
    before = [table.key(device) for device in present]
    for key in keys:
        if key is not None and keys.count(key) > max(1, before.count(key)):
            raise DefinitionError(f"{kind}: two of them are the same one, {key!r}", table.tag)


def _matches(table: _Table, devices: tuple[Any, ...], present: tuple[Any, ...]) -> list[int | None]:
    """For each device the index of its present one: an equal one, else the same one."""
    by_value: dict[Any, list[int]] = {}
    for index in reversed(range(len(present))):
        by_value.setdefault(present[index], []).append(index)
    matches: list[int | None] = []
    for device in devices:
        equal = by_value.get(device)
        matches.append(equal.pop() if equal else None)
    by_key: dict[object, list[int]] = {}
    for index in sorted((index for rest in by_value.values() for index in rest), reverse=True):
        by_key.setdefault(table.key(present[index]), []).append(index)
    for position, device in enumerate(devices):
        key = table.key(device)
        if matches[position] is None and key is not None:
            same = by_key.get(key)
            matches[position] = same.pop() if same else None
    return matches


def _unsaid(table: _Table, device: Any, base: Any) -> str | None:
    """The first field that differs from `base` and that a new element cannot express."""
    said = table.read(_new_element(table, device))
    rewritten = _SOURCE if base is not None and "type" in _changed(table, base, device) else ()
    for field in table.slots:
        value = getattr(device, field)
        if base is not None and getattr(base, field) == value and field not in rewritten:
            continue
        if getattr(said, field) != value:
            return field
    return None


_SOURCE = ("source", "protocol", "pool")
"""The fields in ``<source>`` whose place depends on the type."""


def _changed(table: _Table, base: Any, device: Any) -> list[str]:
    return [field for field in table.slots if getattr(base, field) != getattr(device, field)]


# --- writing --------------------------------------------------------------------------------


# The order in which libvirt writes attributes and children.
_FIRST = {
    field: position
    for position, field in enumerate(
        ("mode", "type", "device", "mac", "driver", "format", "cache", "protocol", "pool", "source")
    )
}


def _new_element(table: _Table, device: Any) -> Element:
    element = make(table.tag)
    fields = sorted(table.slots, key=lambda field: _FIRST.get(field, len(_FIRST)))
    table.write(element, device, [f for f in fields if getattr(device, f) is not None])
    return element


def update(root: Element, kind: str, wanted: tuple[Any, ...]) -> None:
    """Make the document's devices of this kind those that are wanted, in that order."""
    table = _TABLES[kind]
    containers = list(root.iterchildren("devices"))
    elements = [e for container in containers for e in container.iterchildren(table.tag)]
    present = tuple(table.read(element) for element in elements)
    matches = _matches(table, wanted, present)
    home = make_child(root, "devices") if not containers else containers[0]
    anchor = elements[0].getprevious() if elements else _last(home)
    for index in set(range(len(elements))) - set(matches):
        if elements[index] is anchor:
            anchor = anchor.getprevious()
        drop(elements[index])
    previous = None
    for device, match in zip(wanted, matches, strict=True):
        if match is None:
            element = _new_element(table, device)
        else:
            element = elements[match]
            _rewrite(table, element, device, _changed(table, present[match], device))
        _place(home, element, previous if previous is not None else anchor, previous is None)
        previous = element


def _last(container: Element) -> Element | None:
    return container[-1] if len(container) else None


def _rewrite(table: _Table, element: Element, device: Any, changed: list[str]) -> None:
    if "type" in changed and "source" in table.slots:
        # The rest of <source> belongs to the old type: hosts, secrets, adapters.
        drop_every(element, "source")
        changed = [f for f in table.slots if f in changed or f in _SOURCE]
    table.write(element, device, changed)
    # A value may be there twice, as <listen> and attribute. Removing one spelling may uncover
    # another, so read again.
    table.write(element, device, _changed(table, table.read(element), device))


def _place(home: Element, element: Element, previous: Element | None, first: bool) -> None:
    parent = None if previous is None else previous.getparent()
    if element.getparent() is None:
        put(home if parent is None else parent, element, previous)
        indent(element)
        return
    if first or previous is None or parent is None or _position(previous) < _position(element):
        return
    drop(element)
    put(parent, element, previous)


def _position(element: Element) -> list[int]:
    """The element's path from the root, as a list of indexes."""
    parent = element.getparent()
    return [] if parent is None else [*_position(parent), parent.index(element)]
