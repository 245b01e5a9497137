"""Disks and CD-ROM drives: their images, and where they are in the guest."""

from __future__ import annotations

import json
from typing import Any

from ...xml import document
from ...xml.document import Element
from .words import Words, safe, there

_CACHES = {  # cache.direct, cache.no-flush, and the device's write-cache, as QEMU's manual has them
    "none": (True, False, True),
    "writethrough": (False, False, False),
    "writeback": (False, False, True),
    "directsync": (True, False, False),
    "unsafe": (False, True, True),
}
_DISK_PREFIXES = {"virtio": "vd", "scsi": "sd", "sata": "sd", "ide": "hd"}


class Disks(Words):
    """The part of a command line that is about disks."""

    def _disks(self) -> None:
        targets: set[str] = set()
        for element in self._devices("disk"):
            self._disk(element, targets)

    def _disk(self, element: Element, targets: set[str]) -> None:
        target = element.find("target")
        name = "" if target is None else target.get("dev") or ""
        if target is None or not name:
            raise document.refusal("a disk needs a target", element)
        if name in targets:
            raise document.refusal(f"target '{name}' duplicated", target)
        targets.add(name)
        cdrom = element.get("device") == "cdrom"
        bus = target.get("bus") or _bus_of(name, target)
        if cdrom and bus == "virtio":
            raise document.refusal("disk type of 'cdrom' does not support bus 'virtio'", target)
        serial = element.find("serial")
        properties: dict[str, Any] = {
            "id": f"disk-{safe(name, target)}",
            "bootindex": self._boot_index(element, "cdrom" if cdrom else "hd"),
            "serial": None if serial is None else document.text_of(serial).strip() or None,
        }
        if element.find("shareable") is not None:
            properties["share-rw"] = True
        node = self._image(element, name, bus, properties)
        if node:
            properties["drive"] = node
        kind = "cd" if cdrom else "hd"
        driver, place = self._where(bus, name, target, kind)
        self._device(driver, **place, **properties)

    def _where(self, bus: str, name: str, target: Element, kind: str) -> tuple[str, dict[str, Any]]:
        if bus == "virtio":
            return "virtio-blk-pci", {}
        index = _index_of(name, _DISK_PREFIXES[bus], target)
        if bus == "scsi":
            if index > 255:
                raise document.refusal(f"target '{name}' is beyond what a SCSI bus has", target)
            return f"scsi-{kind}", {
                "bus": f"{self._once('virtio-scsi-pci', 'scsi0')}.0",
                "scsi-id": index,
            }
        if bus == "ide":
            if self._q35:
                raise document.refusal(
                    "IDE controllers are unsupported for this QEMU binary or machine type", target
                )
            if index > 3:
                raise document.refusal(f"target '{name}' is beyond the four of IDE", target)
            return f"ide-{kind}", {"bus": f"ide.{index // 2}", "unit": index % 2}
        if index > 5:
            raise document.refusal(f"target '{name}' is beyond the six of SATA", target)
        bus_name = "ide" if self._q35 else self._once("ahci", "sata0")
        return f"ide-{kind}", {"bus": f"{bus_name}.{index}"}

    def _image(
        self, element: Element, name: str, bus: str, properties: dict[str, Any]
    ) -> str | None:
        """The image's nodes; ``None`` for an empty drive."""
        cdrom = element.get("device") == "cdrom"
        attribute = "dev" if element.get("type") == "block" else "file"
        source = element.find("source")
        if source is not None:
            for other in {"file", "dev"} - {attribute}:
                if other in source.attrib:
                    text = f"'{other}' is no source of type '{element.get('type') or 'file'}'"
                    raise document.refusal(text, source)
        path = None if source is None else source.get(attribute)
        if not path:
            if cdrom:
                return None
            raise document.refusal("a disk needs a source", element)
        driver = element.find("driver")
        said: Any = {} if driver is None else driver.attrib
        read_only = cdrom or element.find("readonly") is not None
        if read_only and bus in ("ide", "sata") and not cdrom:
            raise document.refusal("readonly ide disks are not supported", element)
        file: dict[str, Any] = {
            "driver": "host_device" if attribute == "dev" else "file",
            "filename": path,
        }
        if cdrom and attribute == "dev":
            file["driver"] = "host_cdrom"
        if said.get("io"):
            file["aio"] = said["io"]
        node: dict[str, Any] = {
            "driver": said.get("type") or "raw",  # never guessed: a guest could write a header
            "node-name": f"image-{safe(name, element)}",
            "read-only": read_only,
            "file": file,
        }
        if said.get("discard"):
            node["discard"] = file["discard"] = said["discard"]
        cache = said.get("cache")
        if said.get("io") == "native" and cache not in ("none", "directsync"):
            raise document.refusal(
                "native I/O needs either no disk cache or directsync cache mode", there(driver)
            )
        if cache and cache != "default":
            direct, no_flush, write_back = _CACHES[cache]
            node["cache"] = file["cache"] = {"direct": direct, "no-flush": no_flush}
            properties["write-cache"] = "on" if write_back else "off"
        self._say("-blockdev", json.dumps(node, ensure_ascii=False))
        return str(node["node-name"])


def _bus_of(name: str, target: Element) -> str:
    """What a target's name says, where no bus is said."""
    for prefix, bus in (("vd", "virtio"), ("sd", "scsi"), ("hd", "ide")):
        if name.startswith(prefix):
            return bus
    raise document.refusal(f"target '{name}' does not say its bus", target)


def _index_of(name: str, prefix: str, target: Element) -> int:
    """The number of a target: ``sda`` is 0, ``sdz`` 25, ``sdaa`` 26. Any prefix of disks will do,
    as in libvirt, where a target of another bus counts by its letters."""
    letters = name[2:]
    known = name.startswith(tuple({*_DISK_PREFIXES.values(), "xv", "ub"}))
    if not known or not (letters.isascii() and letters.isalpha() and letters.islower()):
        raise document.refusal(f"target '{name}' is none like '{prefix}a'", target)
    index = 0
    for letter in letters:
        index = index * 26 + ord(letter) - ord("a") + 1
    return index - 1
