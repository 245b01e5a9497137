"""Devices other than disks: network, consoles, graphics, and the small ones."""

from __future__ import annotations

import hashlib
from typing import Any
from uuid import UUID

from ...names import parse_number
from ...xml import document
from ...xml.document import Element
from .words import Words, comma, number_of, there

_CARDS = {
    "virtio": "virtio-net-pci",
    **{name: name for name in ("e1000", "e1000e", "rtl8139", "ne2k_pci", "pcnet", "vmxnet3")},
}
_VIDEOS = {
    "vga": "VGA",
    "cirrus": "cirrus-vga",
    "virtio": "virtio-vga",
    "qxl": "qxl-vga",
    "bochs": "bochs-display",
    "vmvga": "vmware-svga",
}


class Devices(Words):
    """The part of a command line that is about them."""

    def _small_devices(self) -> None:
        for number, element in enumerate(self._devices("input")):
            self._input(number, element)
        self._balloon()
        for number, element in enumerate(self._devices("rng")):
            self._rng(number, element)
        for number, _ in enumerate(self._devices("panic")):
            self._device("pvpanic", id=f"panic{number}")

    def _lines(self) -> None:
        """What connects the guest: interfaces, consoles, channels."""
        for number, element in enumerate(self._devices("interface")):
            self._interface(number, element)
        self._consoles()
        for number, element in enumerate(self._devices("channel")):
            self._channel(number, element)

    def _interface(self, number: int, element: Element) -> None:
        kind, id = element.get("type"), f"net{number}"
        target = element.find("target")
        tap = None if target is None else target.get("dev")
        source = element.find("source")
        bridge = None if source is None else source.get("bridge")
        if bridge and kind != "bridge":
            raise document.refusal("a bridge is for type 'bridge'", there(source))
        if tap and kind != "ethernet":
            raise document.refusal("a target is for type 'ethernet'", there(target))
        if kind == "bridge":
            if not bridge:
                raise document.refusal("type 'bridge' needs a source", element)
            self._say("-netdev", f"bridge,id={id},br={comma(bridge)}")
        elif kind == "ethernet":
            name = f",ifname={comma(tap)}" if tap else ""
            self._say("-netdev", f"tap,id={id}{name},script=no,downscript=no")
        else:
            self._say("-netdev", f"user,id={id}")
        model = element.find("model")
        card = "rtl8139" if model is None else model.get("type") or "rtl8139"
        if card not in _CARDS:
            text = (
                f"the QEMU driver does not know network card '{card}'; it knows {', '.join(_CARDS)}"
            )
            raise document.refusal(text, there(model))
        address = element.find("mac")
        mac = None if address is None else address.get("address")
        self._device(
            _CARDS[card],
            netdev=id,
            id=f"card{number}",
            mac=mac or mac_of(self._uuid, number),
            bootindex=self._boot_index(element, "network"),
        )

    def _consoles(self) -> None:
        serials = self._devices("serial")
        for place, console in enumerate(self._devices("console")):
            if place or (serials and not _says_the_same(console, serials[0])):
                raise document.refusal("a console is the first serial port, here", console)
        for number, element in enumerate(serials or self._devices("console")):
            self._chardev(element, f"serial{number}")
            target = element.find("target")
            port = number if target is None else number_of(target, "port", number)
            self._device("isa-serial", chardev=f"serial{number}", id=f"port{number}", index=port)

    def _chardev(self, element: Element, id: str) -> None:
        kind, source = element.get("type") or "pty", element.find("source")
        path = None if source is None else source.get("path")
        if kind in ("file", "unix") and not path:
            raise document.refusal(f"type '{kind}' needs a source with a path", element)
        if kind == "unix" and (source is None or source.get("mode") != "connect"):
            self._socket(id, path or "")
            return
        words = f"{'socket' if kind == 'unix' else kind},id={id}"
        if path:
            words += f",path={comma(path)}" if kind in ("unix", "file") else ""
        if kind == "file" and source is not None and source.get("append"):
            words += f",append={source.get('append')}"
        self._say("-chardev", words)

    def _channel(self, number: int, element: Element) -> None:
        """A channel to a program in the guest, such as its agent. A socket that is not said is
        in the guest's directory."""
        source, target = element.find("source"), element.find("target")
        name = None if target is None else target.get("name")
        if not name:
            raise document.refusal("a channel needs a target with a name", element)
        path = (None if source is None else source.get("path")) or self._place.channel(number)
        self._socket(f"channel{number}", path)
        bus = self._once("virtio-serial-pci", "virtio-serial0")
        device = {"chardev": f"channel{number}", "id": f"port-channel{number}"}
        self._device("virtserialport", bus=f"{bus}.0", name=name, **device)

    # --- graphics and small devices -------------------------------------------------------

    def _graphics_and_video(self) -> None:
        graphics = self._devices("graphics")
        for number, element in enumerate(graphics):
            self._say("-vnc", _vnc(element, number))
        keymaps = {element.get("keymap") for element in graphics} - {None}
        if len(keymaps) > 1:
            raise document.refusal("the QEMU driver takes one keymap for all", graphics[-1])
        for keymap in keymaps:
            self._say("-k", str(keymap))
        models = [video.find("model") for video in self._devices("video")]
        kinds = ["vga" if one is None else one.get("type") or "vga" for one in models]
        for kind in kinds or (["vga"] if graphics else []):
            if kind != "none":
                self._device(_VIDEOS[kind], id="video0")

    def _input(self, number: int, element: Element) -> None:
        kind = element.get("type")
        bus = element.get("bus") or ("usb" if kind == "tablet" else "ps2")
        if bus == "ps2":  # the machine has both
            if kind == "tablet":
                raise document.refusal("ps2 bus does not support tablet input device", element)
        elif bus == "virtio":
            self._device(f"virtio-{kind}-pci", id=f"input{number}")
        else:
            usb = self._once("qemu-xhci", "usb")
            driver = "usb-kbd" if kind == "keyboard" else f"usb-{kind}"
            self._device(driver, id=f"input{number}", bus=f"{usb}.0")

    def _balloon(self) -> None:
        element = self._root.find("devices/memballoon")
        if element is not None and element.get("model") == "none":
            if self._def.current_memory < self._def.memory:
                text = "less current memory than memory needs a memballoon"
                raise document.refusal(text, self._element("currentMemory"))
            return
        deflate = element is not None and element.get("autodeflate") == "on"
        self._device("virtio-balloon-pci", id="balloon0", deflate_on_oom=deflate or None)

    def _rng(self, number: int, element: Element) -> None:
        backend = element.find("backend")
        path = "" if backend is None else document.text_of(backend).strip()
        self._json(
            "-object",
            **{
                "qom-type": "rng-random",
                "id": f"random{number}",
                "filename": path or "/dev/urandom",
            },
        )
        self._device("virtio-rng-pci", rng=f"random{number}", id=f"rng{number}")


def mac_of(uuid: UUID, number: int) -> str:
    """In QEMU's own range, the same at each start; without one every guest would have the same."""
    tail = hashlib.sha256(uuid.bytes + number.to_bytes(4, "big")).digest()[:3]
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in tail)


def _says_the_same(console: Element, serial: Element) -> bool:
    """Whether the console is the serial port, as libvirt writes it: with its type, maybe its
    source."""
    if (console.get("type") or "pty") != (serial.get("type") or "pty"):
        return False
    mine, its = console.find("source"), serial.find("source")
    return mine is None or (
        its is not None and sorted(mine.attrib.items()) == sorted(its.attrib.items())
    )


def _vnc(element: Element, number: int) -> str:
    listens = list(element.iterfind("listen"))
    if len(listens) > 1:
        raise document.refusal("a second <listen>; the QEMU driver takes one", listens[1])
    inner: Any = listens[0].attrib if listens else {}
    socket = inner.get("socket") or element.get("socket")
    for name in ("address", "socket"):
        outer = element.get("listen" if name == "address" else name)
        if outer and inner.get(name) and outer != inner.get(name):
            text = (
                f"graphics 'listen' {name} '{outer}' does not match '{inner.get(name)}' in <listen>"
            )
            raise document.refusal(text, element)
    if inner.get("type") == "socket" and not socket:
        raise document.refusal("a socket needs a path", element)
    words = f"unix:{comma(socket)}" if socket else _vnc_address(element, inner)
    words += f",id=vnc{number}"
    return words


def _vnc_address(element: Element, inner: Any) -> str:
    address = inner.get("address") or element.get("listen") or "127.0.0.1"
    if ":" in address:
        address = f"[{address}]"
    port = element.get("port")
    if port in (None, "-1") or element.get("autoport") == "yes":
        return f"{comma(address)}:0,to=999"
    number = parse_number(port or "", 65535)
    if number is None or number < 5900:
        raise document.refusal(f"port '{port}' is none of VNC's, from 5900", element)
    return f"{comma(address)}:{number - 5900}"
