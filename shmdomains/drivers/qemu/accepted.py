"""What a definition may say: `TAKEN` is what becomes part of the command line, `WITHOUT_EFFECT` is
what may be said and changes nothing, with the reason. Whatever is in neither is refused, with its
element and its line: a guest that lacks what its definition says is worse than one that does not
start.
"""

from __future__ import annotations

import re
from typing import Any

from ...text import shown
from ...xml import document
from ...xml.document import Element

Values = tuple[str, ...] | None
"""The values that an attribute may have; ``None``: any, or `command` judges it."""

_YES_NO = ("yes", "no")
_ON_OFF = ("on", "off")
_ANY: dict[str, Values] = {}
_CHARDEV: dict[str, dict[str, Values]] = {
    "": {"type": ("pty", "file", "unix", "null")},
    "/source": {"path": None, "append": _ON_OFF, "mode": ("bind", "connect")},
}
ACTIONS = ("destroy", "restart", "preserve", "rename-restart")

TAKEN: dict[str, dict[str, Values]] = {
    "domain": {"type": ("kvm", "qemu")},
    "domain/name": _ANY,
    "domain/uuid": _ANY,
    "domain/memory": {"unit": None},
    "domain/currentMemory": {"unit": None},
    "domain/vcpu": {"current": None},
    "domain/os": _ANY,
    "domain/os/type": {"arch": ("x86_64", "i686"), "machine": None},
    "domain/os/boot": {"dev": ("hd", "cdrom", "network")},
    "domain/os/bootmenu": {"enable": _YES_NO, "timeout": None},
    "domain/os/kernel": _ANY,
    "domain/os/initrd": _ANY,
    "domain/os/cmdline": _ANY,
    "domain/features": _ANY,
    "domain/features/acpi": _ANY,
    "domain/features/vmport": {"state": _ON_OFF},
    "domain/cpu": {"mode": ("custom", "host-model", "host-passthrough", "maximum")},
    "domain/cpu/model": _ANY,
    "domain/cpu/feature": {"name": None, "policy": ("force", "require", "disable", "forbid")},
    "domain/cpu/topology": {"sockets": None, "dies": None, "cores": None, "threads": None},
    "domain/clock": {"offset": ("utc", "localtime")},
    "domain/clock/timer": {
        "name": ("rtc", "pit", "hpet"),
        "tickpolicy": ("delay", "catchup", "discard"),
        "present": _YES_NO,
    },
    # What is done then is the driver's step: it sees how the guest ended.
    "domain/on_poweroff": _ANY,
    "domain/on_reboot": _ANY,
    "domain/on_crash": _ANY,
    "domain/pm": _ANY,
    "domain/pm/suspend-to-mem": {"enabled": _YES_NO},
    "domain/pm/suspend-to-disk": {"enabled": _YES_NO},
    "domain/devices": _ANY,
    "domain/devices/emulator": _ANY,
    "domain/devices/disk": {"type": ("file", "block"), "device": ("disk", "cdrom")},
    "domain/devices/disk/driver": {
        "name": ("qemu",),
        "type": ("raw", "qcow2", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc"),
        "cache": ("default", "none", "writethrough", "writeback", "directsync", "unsafe"),
        "io": ("native", "threads"),
        "discard": ("unmap", "ignore"),
    },
    "domain/devices/disk/source": {"file": None, "dev": None},
    "domain/devices/disk/target": {"dev": None, "bus": ("virtio", "ide", "scsi", "sata")},
    "domain/devices/disk/boot": {"order": None},
    "domain/devices/disk/serial": _ANY,
    "domain/devices/disk/readonly": _ANY,
    "domain/devices/disk/shareable": _ANY,
    "domain/devices/interface": {"type": ("user", "ethernet", "bridge")},
    "domain/devices/interface/mac": {"address": None},
    "domain/devices/interface/model": {"type": None},
    "domain/devices/interface/source": {"bridge": None},
    "domain/devices/interface/target": {"dev": None, "managed": ("no",)},
    "domain/devices/interface/boot": {"order": None},
    "domain/devices/interface/link": {"state": ("up",)},
    "domain/devices/serial": _CHARDEV[""],
    "domain/devices/serial/source": _CHARDEV["/source"],
    "domain/devices/serial/target": {"type": ("isa-serial",), "port": None},
    "domain/devices/serial/target/model": {"name": ("isa-serial",)},
    "domain/devices/console": _CHARDEV[""],
    "domain/devices/console/source": _CHARDEV["/source"],
    "domain/devices/console/target": {"type": ("serial",), "port": ("0",)},
    "domain/devices/channel": {"type": ("unix",)},
    "domain/devices/channel/source": {"path": None, "mode": ("bind",)},
    "domain/devices/channel/target": {"type": ("virtio",), "name": None},
    "domain/devices/graphics": {
        "type": ("vnc",),
        "port": None,
        "autoport": _YES_NO,
        "listen": None,
        "socket": None,
        "keymap": None,
    },
    "domain/devices/graphics/listen": {
        "type": ("address", "socket"),
        "address": None,
        "socket": None,
    },
    "domain/devices/video": _ANY,
    "domain/devices/video/model": {
        "type": ("vga", "cirrus", "virtio", "qxl", "bochs", "vmvga", "none")
    },
    "domain/devices/input": {
        "type": ("tablet", "mouse", "keyboard"),
        "bus": ("ps2", "usb", "virtio"),
    },
    "domain/devices/memballoon": {
        "model": ("virtio", "none"),
        "autodeflate": _ON_OFF,
    },
    "domain/devices/rng": {"model": ("virtio",)},
    "domain/devices/rng/backend": {"model": ("random",)},
    "domain/devices/panic": {"model": ("isa",)},
    "domain/devices/controller": {
        "type": ("pci", "usb", "ide", "sata", "scsi", "fdc", "virtio-serial"),
        "model": None,
    },
}
"""Each element that is taken, with the attributes that are, and the values that those may have."""

WITHOUT_EFFECT: dict[str, str] = {
    "domain@id": "the list gives the id",
    "domain/title": "for people",
    "domain/description": "for people",
    "domain/metadata/*": "for other programs",
    "domain/vcpu@placement=static": "the host's scheduler places them, as without it",
    "domain/cpu@check": "QEMU says itself what the host lacks",
    "domain/cpu@match=exact": "as without it",
    "domain/cpu@migratable": "guests are not migrated",
    "domain/cpu/model@fallback": "QEMU has no other model to fall back to",
    "domain/features/apic": "an x86 machine has one",
    "domain/features/pae": "an x86 machine has it",
    "domain/on_lockfailure": "there is no lock manager",
    "domain/devices/disk@snapshot": "there are no snapshots",
    "domain/devices/disk/backingStore": "QEMU reads the chain from the images",
    "domain/devices/disk/address/*": "QEMU chooses; the target's name says the place on a bus",
    "domain/devices/interface/address/*": "QEMU chooses",
    "domain/devices/interface/source@dev": "libvirt gives it no meaning for this type",
    "domain/devices/serial/address/*": "QEMU chooses",
    "domain/devices/channel/address/*": "QEMU chooses",
    "domain/devices/video/address/*": "QEMU chooses",
    "domain/devices/video/model@vram": "QEMU's own size is used",
    "domain/devices/video/model@ram": "QEMU's own size is used",
    "domain/devices/video/model@vgamem": "QEMU's own size is used",
    "domain/devices/video/model@heads=1": "as without it",
    "domain/devices/video/model@primary=yes": "as without it",
    "domain/devices/input/address/*": "QEMU chooses",
    "domain/devices/memballoon/address/*": "QEMU chooses",
    "domain/devices/rng/address/*": "QEMU chooses",
    "domain/devices/panic/address/*": "it has one only",
    "domain/devices/controller@index": "a bus that a device needs is made for it",
    "domain/devices/controller@ports": "a bus that a device needs is made for it",
    "domain/devices/controller/address/*": "QEMU chooses",
    "domain/devices/controller/master/*": "a bus that a device needs is made for it",
    "domain/devices/controller/model/*": "a bus that a device needs is made for it",
    "domain/devices/controller/target/*": "a bus that a device needs is made for it",
    "domain/devices/audio": "only type 'none', which is none",
    "domain/devices/audio@id": "only type 'none', which is none",
    "domain/devices/audio@type=none": "only type 'none', which is none",
    "domain/seclabel": "only type 'none', which is none",
    "domain/seclabel@type=none": "only type 'none', which is none",
    **{
        f"domain/devices/{device}/alias/*": "a name for people and libvirt"
        for device in (
            *("disk", "interface", "serial", "console", "graphics", "video", "input"),
            *("memballoon", "rng", "panic", "controller", "channel"),
        )
    },
}
"""An element, with ``/*`` all that is in it, too, or an attribute, with ``=`` one value of it; and
why it changes nothing."""

_NEEDED = {
    "domain/os/boot": "dev",
    "domain/clock/timer": "name",
    "domain/devices/channel": "type",
    "domain/devices/channel/target": "type",
    "domain/devices/graphics": "type",
    "domain/devices/input": "type",
    "domain/devices/memballoon": "model",
    "domain/devices/rng": "model",
    "domain/devices/rng/backend": "model",
    "domain/devices/controller": "type",
}
"""The attributes that libvirt has no default for, or one that the driver does not know."""
_REPEATED = re.compile(
    r"domain/os/boot|domain/cpu/feature|domain/clock/timer|domain/devices/[a-z]+"
    r"|domain/devices/graphics/listen"
)
_ONCE = ("domain/devices/emulator", "domain/devices/memballoon", "domain/devices/video")
_MACHINE = re.compile(r"pc|q35|pc-(?:i440fx-|q35-)?[0-9]+\.[0-9]+")


def check(root: Element) -> None:
    """Refuse the first thing that is in neither table."""
    _check(root, "domain")


def _check(element: Element, path: str) -> None:
    if f"{path}/*" in WITHOUT_EFFECT:
        return
    taken = TAKEN.get(path)
    if taken is None and path not in WITHOUT_EFFECT:
        raise document.refusal(f"the QEMU driver does not know <{element.tag}> here", element)
    for name, value in element.attrib.items():
        _check_attribute(element, path, str(name), str(value), taken or {})
    if path in _NEEDED and not element.get(_NEEDED[path]):
        raise document.refusal(f"<{element.tag}> needs a {_NEEDED[path]}", element)
    seen: set[str] = set()
    for child in element.iterchildren("*"):
        below = f"{path}/{child.tag}"
        once = below in _ONCE or not _REPEATED.fullmatch(below)
        if once and below in seen:
            raise document.refusal(f"a second <{child.tag}>; the QEMU driver takes one", child)
        seen.add(below)
        _check(child, below)


def _check_attribute(
    element: Element, path: str, name: str, value: str, taken: dict[str, Values]
) -> None:
    place = f"{path}@{name}"
    if place in WITHOUT_EFFECT or f"{place}={value}" in WITHOUT_EFFECT:
        return
    if name not in taken:
        text = f"the QEMU driver does not know {name}={shown(value)} here"
        raise document.refusal(text, element)
    values = taken[name]
    if values is not None and value not in values:
        text = f"the QEMU driver does not know {name}={shown(value)}; it knows {', '.join(values)}"
        raise document.refusal(text, element)


def machine_of(kind: Any) -> str:
    """The machine of ``<os><type>``; only those whose buses `command` knows."""
    machine = kind.get("machine") or "pc"
    if not _MACHINE.fullmatch(machine):
        raise document.refusal(
            f"the QEMU driver does not know machine {shown(machine)}; it knows pc and q35", kind
        )
    return str(machine)
