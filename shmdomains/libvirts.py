"""Definitions from a libvirt, and back to one (extra ``libvirt``).

What a libvirt and a list have in common is carried: names, UUIDs, definitions, autostart. What is
not is said, a line each: a guest runs where it was started, snapshots and saved memory belong to
the libvirt that made them. Nothing is overwritten, on either side: a domain that is there already
is reported, and the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import DriverError, ShmDomainsError
from .xml.definition import DomainDef

if TYPE_CHECKING:
    from .opening import AnyDomainList


class Carried(msgspec.Struct, frozen=True):
    """What came over: the names; what of them did not (name, what); and those that did not at all
    (name, why).

    >>> Carried(["web1"], [("web1", "1 snapshot")], []).names
    ['web1']
    """

    names: list[str]
    left: list[tuple[str, str]]
    failures: list[tuple[str, str]]


def from_libvirt(doms: AnyDomainList, uri: str, timeout: float | None = None) -> Carried:
    """Define the persistent domains of the libvirt at `uri`, with their autostart.

    They are shut off here, also those that run there. `timeout` in seconds is for each wait for a
    lock of the list. Raises `DriverError` if libvirt cannot be asked, and `ImportError` without
    libvirt-python.
    """
    carried = Carried([], [], [])
    with _connected(uri) as (libvirt, connection):
        for domain in sorted(connection.listAllDomains(0), key=lambda one: str(one.name())):
            name = str(domain.name())
            try:
                _take(libvirt, doms, domain, timeout)
            except (ShmDomainsError, libvirt.libvirtError) as error:
                carried.failures.append((name, str(error)))
                continue
            carried.names.append(name)
            carried.left.extend((name, what) for what in _left_there(libvirt, domain))
    return carried


def _take(libvirt: Any, doms: AnyDomainList, domain: Any, timeout: float | None) -> None:
    if not domain.isPersistent():
        raise DriverError("it is transient: when it stops there, nothing is left to define")
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
    definition = DomainDef.from_xml(domain.XMLDesc(flags))
    autostart = bool(domain.autostart())
    with doms.locked(timeout):
        for key in ({"uuid": definition.uuid}, {"name": definition.name}):
            found = doms.peek(**key, definitions=True)
            if found is not None:
                raise DriverError(f"the list has a domain '{found.name}' ({found.uuid}) already")
        with doms.assign_def(definition, persistent=True, timeout=timeout) as dom:
            doms.save_config(dom, timeout)
            if autostart:
                doms.set_autostart(dom, True, timeout)


def _left_there(libvirt: Any, domain: Any) -> Iterator[str]:
    if domain.isActive():
        yield "it runs there, and is shut off here"
    count = domain.snapshotNum()
    if count:
        yield f"{count} snapshot{'s' * (count > 1)}"
    if domain.hasManagedSaveImage():
        yield "the memory that was saved of it"
    try:
        count = len(domain.listAllCheckpoints())
    except libvirt.libvirtError:  # not every driver has them
        return
    if count:
        yield f"{count} checkpoint{'s' * (count > 1)}"


def to_libvirt(doms: AnyDomainList, uri: str) -> Carried:
    """Define the persistent domains of the list in the libvirt at `uri`, with their autostart.

    They are shut off there, also those that run here, and have the definition of their next start.
    Takes no lock. Raises `DriverError` if libvirt cannot be asked, and `ImportError` without
    libvirt-python.
    """
    carried = Carried([], [], [])
    with _connected(uri) as (libvirt, connection):
        for info in sorted(doms.snapshot(), key=lambda one: one.name):
            try:
                _give(libvirt, connection, info)
            except (ShmDomainsError, libvirt.libvirtError) as error:
                carried.failures.append((info.name, str(error)))
                continue
            carried.names.append(info.name)
            if info.is_active:
                carried.left.append((info.name, "it runs here, and is shut off there"))
            if info.data is not None:
                carried.left.append((info.name, "its driver's data"))
    return carried


def _give(libvirt: Any, connection: Any, info: Any) -> None:
    if not info.persistent:
        raise DriverError("it is transient: when it stops here, nothing is left to define")
    definition = info.next_definition or info.definition
    for find, key in (
        (connection.lookupByUUIDString, str(info.uuid)),
        (connection.lookupByName, info.name),
    ):
        try:
            found = find(key)
        except libvirt.libvirtError:
            continue
        raise DriverError(f"{connection.getURI()} has a domain '{found.name()}' already")
    domain = connection.defineXML(definition.to_xml())
    if info.autostart:
        domain.setAutostart(1)


@contextmanager
def _connected(uri: str) -> Iterator[tuple[Any, Any]]:
    try:
        import libvirt
    except ImportError:
        text = (
            "libvirt-python is missing: pip install 'shmdomains[libvirt]', which needs libvirt's "
            "headers (apt install libvirt-dev pkg-config)"
        )
        raise ImportError(text) from None
    libvirt.registerErrorHandler(_hush, None)
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise DriverError(f"{uri}: {error}") from None
    try:
        yield libvirt, connection
    finally:
        connection.close()


def _hush(_context: object, _error: object) -> None:
    """libvirt would print each error by itself; they are raised as well."""
