"""libvirt itself through its Python binding, with its test driver: in process, and its daemon.

A definition is the XML, which libvirt parses, checks and writes; its finds take its own locks. A
change of state is a suspend or a resume. The driver's data is JSON in an element of the metadata,
where libvirt keeps what is an application's own; nothing locks a domain from its reading to its
writing, so nobody can count there. In process nothing is shared; the daemon is one of the
bench's own, on a private socket, without privileges and without any driver but the built-in test.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import psutil

from shmdomains import DomainDef

from ..world import PAUSED, Made
from .base import Contestant, Row, drop, lacks, memory_folder

INACTIVE = 2  # VIR_DOMAIN_XML_INACTIVE: what it will be, which is what a change replaces
ELEMENT, CURRENT = 2, 0  # VIR_DOMAIN_METADATA_ELEMENT, VIR_DOMAIN_AFFECT_CURRENT
SPACE = "https://example.org/driver"
MISSING = "libvirt's Python binding is not installed: apt install python3-libvirt, or pip install \
libvirt-python with libvirt-dev"


class LibvirtInProcess(Contestant):
    name = "libvirt in process"
    shared = False
    most = 10_000
    first_id = 2  # the test driver's own domain had 1

    @classmethod
    def missing(cls) -> str | None:
        return MISSING if lacks("libvirt-python", "libvirt") else None

    @classmethod
    def versions(cls) -> dict[str, str]:
        import libvirt

        number = libvirt.getVersion()
        return {"libvirt": f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"}

    def prepare(self, definition: DomainDef) -> str:
        return definition.replace(type="test").to_xml()

    def facts(self, definition: str) -> tuple[str, str]:
        parsed = DomainDef.from_xml(definition)
        return parsed.name, parsed.title or ""

    def fill(self, domains: Iterable[Made], count: int) -> None:
        self._connect("test:///default")
        for made in domains:
            self.connection.defineXML(self.prepare(made.definition)).create()

    def _connect(self, uri: str) -> None:
        import libvirt

        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        self.error = libvirt.libvirtError
        self.connection = libvirt.open(uri)
        for dom in self.connection.listAllDomains():
            if dom.name() == "test":
                dom.destroy()
                dom.undefine()

    def close(self) -> None:
        self.connection.close()

    def read_state(self, uuids: Sequence[bytes]) -> int:
        find = self.connection.lookupByUUID
        for uuid in uuids:
            state: int = find(uuid).state()[0]
        return state

    def read_definition(self, names: Sequence[str]) -> str:
        find = self.connection.lookupByName
        for name in names:
            definition: str = find(name).XMLDesc(INACTIVE)
        return definition

    def change_state(self, uuids: Sequence[bytes], state: int) -> None:
        find = self.connection.lookupByUUID
        if state == PAUSED:
            for uuid in uuids:
                find(uuid).suspend()
        else:
            for uuid in uuids:
                find(uuid).resume()

    def replace(self, changes: Sequence[tuple[bytes, str]]) -> None:
        define = self.connection.defineXML
        for _uuid, xml in changes:
            define(xml)

    def define(self, added: Sequence[tuple[bytes, str, str]]) -> None:
        define = self.connection.defineXML
        for _uuid, _name, xml in added:
            define(xml)

    def remove(self, uuids: Sequence[bytes]) -> None:
        find = self.connection.lookupByUUID
        for uuid in uuids:
            find(uuid).undefine()

    def read_data(self, uuids: Sequence[bytes]) -> Any:
        find, parse, decode = self.connection.lookupByUUID, ElementTree.fromstring, json.loads
        for uuid in uuids:
            value = decode(parse(find(uuid).metadata(ELEMENT, SPACE, CURRENT)).text or "")
        return value

    def change_data(self, uuids: Sequence[bytes], value: Any) -> None:
        find, encode = self.connection.lookupByUUID, json.dumps
        for uuid in uuids:
            element = f"<data>{escape(encode(value))}</data>"
            find(uuid).setMetadata(ELEMENT, element, "driver", SPACE, CURRENT)

    def by_id(self, ids: Sequence[int]) -> int:
        find = self.connection.lookupByID
        for id in ids:
            state: int = find(id).state()[0]
        return state

    def miss(self, uuids: Sequence[bytes]) -> None:
        find, error = self.connection.lookupByUUID, self.error
        for uuid in uuids:
            try:
                find(uuid)
            except error:
                continue
            raise AssertionError(uuid)

    def rows(self) -> list[Row]:
        return [(dom.ID(), dom.name(), dom.state()[0]) for dom in self.connection.listAllDomains()]


class LibvirtDaemon(LibvirtInProcess):
    name = "libvirt daemon"
    shared = True
    most = 1_000

    @classmethod
    def missing(cls) -> str | None:
        without = super().missing()
        if without is None and not Path("/usr/sbin/libvirtd").exists():
            return "libvirt's daemon is not installed: apt install libvirt-daemon"
        return without

    def fill(self, domains: Iterable[Made], count: int) -> None:
        self.folder = memory_folder()
        config = Path(self.folder, "libvirtd.conf")
        config.write_text(f'auth_unix_rw = "none"\nunix_sock_dir = "{self.folder}"\n')
        places = ["HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"]
        # An empty folder of drivers: it must not get near real machines.
        places.append("LIBVIRT_DRIVER_DIR")
        options: dict[str, Any] = {}
        if os.getuid() == 0:
            os.chmod(self.folder, 0o777)
            options["user"] = "nobody"
        self.daemon = subprocess.Popen(
            ["/usr/sbin/libvirtd", "-f", config, "-p", f"{self.folder}/pid"],
            env={**os.environ, **dict.fromkeys(places, self.folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **options,
        )
        self._wait()
        self.empty = psutil.Process(self.daemon.pid).memory_info().rss
        for made in domains:
            self.connection.defineXML(self.prepare(made.definition)).create()

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                return self.attach()
            except Exception:
                if time.monotonic() > deadline or self.daemon.poll() is not None:
                    raise
                time.sleep(0.02)

    def attach(self) -> None:
        # An inherited connection would say good-bye over a socket that is its parent's.
        self.inherited = vars(self).get("connection")
        self._connect(f"test+unix:///default?socket={self.folder}/libvirt-sock")

    def close(self) -> None:
        super().close()
        self.daemon.terminate()
        self.daemon.wait()
        drop(self.folder)

    def footprint(self) -> int:
        return int(psutil.Process(self.daemon.pid).memory_info().rss) - self.empty
