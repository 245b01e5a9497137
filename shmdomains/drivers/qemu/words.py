"""What the parts of a command line are made with: the guest's place, words of QEMU's, values."""

from __future__ import annotations

import json
from typing import Any, NamedTuple
from uuid import UUID

from ...errors import DefinitionError
from ...names import parse_number
from ...xml import document
from ...xml.definition import DomainDef
from ...xml.document import Element

_SOCKET_MAX = 107  # bytes; sockaddr_un


class Place(NamedTuple):
    """Where a guest's sockets are, and what the host has."""

    directory: str
    kvm: bool

    @property
    def monitor(self) -> str:
        """The socket for commands; one client at a time."""
        return f"{self.directory}/monitor"

    @property
    def events(self) -> str:
        """The socket for whoever watches, so that the one for commands stays free."""
        return f"{self.directory}/events"

    def channel(self, number: int) -> str:
        return f"{self.directory}/channel{number}"

    @property
    def pidfile(self) -> str:
        return f"{self.directory}/pid"


class Words:
    """A command line that is being made."""

    def __init__(self, definition: DomainDef, root: Element, uuid: UUID, place: Place) -> None:
        self._def, self._root, self._uuid, self._place = definition, root, uuid, place
        self._q35 = "q35" in (definition.os.machine or "")
        self._words: list[str] = []
        self._made: set[str] = set()
        self._orders: set[int] = set()
        self._first_of_class: dict[str, int] = {}
        """``<os><boot>``: the place in the order that the first of a class of devices gets."""

    def _say(self, *words: str) -> None:
        self._words += words

    def _json(self, option: str, **properties: Any) -> None:
        kept = {
            name.replace("_", "-"): value for name, value in properties.items() if value is not None
        }
        self._say(option, json.dumps(kept, ensure_ascii=False))

    def _device(self, driver: str, **properties: Any) -> None:
        self._json("-device", driver=driver, **properties)

    def _once(self, driver: str, id: str) -> str:
        """A device that others need; made when the first of them is."""
        if id not in self._made:
            self._made.add(id)
            self._device(driver, id=id)
        return id

    def _element(self, tag: str) -> Element:
        found = self._root.find(tag)
        return self._root if found is None else found

    def _devices(self, tag: str) -> list[Element]:
        return list(self._root.iterfind(f"devices/{tag}"))

    def _socket(self, id: str, path: str) -> None:
        """A socket that QEMU listens on."""
        if len(path.encode()) > _SOCKET_MAX:
            text = f"{path} is longer than a socket's name may be, which is {_SOCKET_MAX} bytes"
            raise DefinitionError(text)
        self._say("-chardev", f"socket,id={id},path={comma(path)},server=on,wait=off")

    def _boot_index(self, element: Element, kind: str) -> int | None:
        """The device's own order, or that of its class, which the first of a class has."""
        own = element.find("boot")
        if own is None:
            return self._first_of_class.pop(kind, None)
        if self._root.find("os/boot") is not None:
            text = "per-device boot elements cannot be used together with os/boot elements"
            raise document.refusal(text, own)
        order = number_of(own, "order", 0)
        if order == 0 or order in self._orders:
            raise document.refusal(f"boot order '{own.get('order')}' is taken or no order", own)
        self._orders.add(order)
        return order


def comma(value: str) -> str:
    """A value among QEMU's options, where ``,`` ends one and ``,,`` is a comma."""
    return value.replace(",", ",,")


def there(element: Element | None) -> Element:
    assert element is not None
    return element


def number_of(element: Element, name: str, default: int) -> int:
    text = element.get(name)
    if text is None:
        return default
    number = parse_number(text, 2**31 - 1)
    if number is None:
        raise document.refusal(f"{name} '{text}' is no number", element)
    return number


def safe(name: str, element: Element) -> str:
    """A part of QEMU's ids, which have letters, digits and a few signs."""
    if not (name.isascii() and name.isalnum()) or len(name) > 20:
        raise document.refusal(f"'{name}' is no name of a disk", element)
    return name
