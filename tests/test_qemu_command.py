"""QEMU's command line, without QEMU: what a definition gets, and what is refused, element and line.

Nothing that a definition says may be ignored in silence: from two definitions that say nearly all
that the driver knows, each element and each attribute is taken away, and the command line changes,
or it is refused; what the table says is without effect is added, and it stays the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from lxml import etree

from shmdomains import DefinitionError, DomainDef, DomainList
from shmdomains.drivers.qemu import QemuDriver
from shmdomains.drivers.qemu.accepted import TAKEN, WITHOUT_EFFECT
from shmdomains.drivers.qemu.command import command
from shmdomains.drivers.qemu.words import Place

SAMPLES = Path(__file__).resolve().parent / "data" / "domains"
LIBVIRT = Path(
    os.environ.get("SHMDOMAINS_LIBVIRT_XML")
    or Path(__file__).resolve().parents[1].parent / "shared" / "libvirt-xml"
)
UUID_1 = UUID(int=1)
PLACE = Place("/run/guests/1-uuid", kvm=True)

PC = """<domain type="kvm">
  <name>web1</name>
  <memory unit="MiB">64</memory>
  <currentMemory unit="MiB">48</currentMemory>
  <vcpu current="2">4</vcpu>
  <os>
    <type arch="i686" machine="pc-i440fx-7.2">hvm</type>
    <boot dev="cdrom"/>
    <boot dev="hd"/>
    <boot dev="network"/>
    <bootmenu enable="yes" timeout="3000"/>
    <kernel>/boot/linux</kernel>
    <initrd>/boot/initrd</initrd>
    <cmdline>console=ttyS0,quiet</cmdline>
  </os>
  <features>
    <acpi/>
    <vmport state="off"/>
  </features>
  <cpu mode="custom">
    <model>qemu64</model>
    <feature name="vmx" policy="disable"/>
    <topology sockets="2" dies="1" cores="2" threads="1"/>
  </cpu>
  <clock offset="localtime">
    <timer name="rtc" tickpolicy="catchup"/>
    <timer name="pit" tickpolicy="delay"/>
    <timer name="hpet" present="no"/>
  </clock>
  <on_reboot>destroy</on_reboot>
  <pm>
    <suspend-to-mem enabled="no"/>
    <suspend-to-disk enabled="yes"/>
  </pm>
  <devices>
    <emulator>/opt/qemu</emulator>
    <disk type="block" device="disk">
      <driver name="qemu" type="raw" cache="none" io="native" discard="unmap"/>
      <source dev="/dev/vg/web1"/>
      <target dev="vda" bus="virtio"/>
      <serial>S1</serial>
      <shareable/>
    </disk>
    <disk type="file" device="disk">
      <driver name="qemu" type="qcow2"/>
      <source file="/srv/a,b.qcow2"/>
      <target dev="hdb" bus="ide"/>
    </disk>
    <disk device="cdrom">
      <target dev="hdc" bus="ide"/>
    </disk>
    <interface type="user">
      <mac address="52:54:00:12:34:56"/>
      <model type="virtio"/>
    </interface>
    <interface type="bridge">
      <source bridge="br0"/>
    </interface>
    <interface type="ethernet">
      <target dev="tap0" managed="no"/>
    </interface>
    <serial type="unix">
      <source mode="connect" path="/run/serial"/>
    </serial>
    <serial type="file">
      <source path="/var/log/serial" append="on"/>
      <target port="3"/>
    </serial>
    <channel type="unix">
      <source mode="bind" path="/run/agent"/>
      <target type="virtio" name="org.qemu.guest_agent.0"/>
    </channel>
    <graphics type="vnc" port="5901" autoport="no" keymap="de">
      <listen type="address" address="0.0.0.0"/>
    </graphics>
    <graphics type="vnc" socket="/run/vnc"/>
    <graphics type="vnc" listen="::1"/>
    <video>
      <model type="cirrus"/>
    </video>
    <input type="tablet" bus="usb"/>
    <input type="keyboard" bus="virtio"/>
    <memballoon model="virtio" autodeflate="on"/>
    <rng model="virtio">
      <backend model="random">/dev/random</backend>
    </rng>
    <panic model="isa"/>
  </devices>
</domain>"""

Q35 = """<domain type="qemu">
  <name>web2</name>
  <memory>65536</memory>
  <os>
    <type arch="x86_64" machine="q35">hvm</type>
  </os>
  <cpu mode="maximum"/>
  <devices>
    <disk>
      <source file="/srv/a"/>
      <target dev="sda" bus="scsi"/>
      <boot order="2"/>
      <readonly/>
    </disk>
    <disk>
      <source file="/srv/b"/>
      <target dev="sdc" bus="sata"/>
    </disk>
    <interface type="user">
      <boot order="1"/>
    </interface>
    <console type="pty"/>
    <graphics type="vnc">
      <listen type="socket" socket="/run/vnc"/>
    </graphics>
    <memballoon model="none"/>
  </devices>
</domain>"""


def words(xml: str | bytes, place: Place = PLACE) -> list[str]:
    return command(DomainDef.from_xml(xml), UUID_1, place)


def after(found: list[str], option: str) -> list[str]:
    return [found[index + 1] for index, word in enumerate(found) if word == option]


def devices(found: list[str]) -> dict[str, dict[str, object]]:
    return {one["id"]: one for one in map(json.loads, after(found, "-device"))}


def test_the_whole_of_a_small_one() -> None:
    xml = "<domain type='kvm'><name>a</name><memory>4096</memory><os><type>hvm</type></os></domain>"
    assert words(xml) == [
        *("qemu-system-x86_64", "-name", "guest=a,debug-threads=on", "-uuid", str(UUID_1)),
        *("-S", "-no-shutdown", "-no-user-config", "-nodefaults", "-daemonize"),
        *("-pidfile", "/run/guests/1-uuid/pid", "-display", "none"),
        *("-machine", "pc,usb=off,acpi=off", "-accel", "kvm", "-m", "size=4096k"),
        *("-smp", "cpus=1,maxcpus=1", "-rtc", "base=utc", "-action", "panic=pause"),
        *("-chardev", "socket,id=monitor,path=/run/guests/1-uuid/monitor,server=on,wait=off"),
        *("-mon", "chardev=monitor,mode=control"),
        *("-chardev", "socket,id=events,path=/run/guests/1-uuid/events,server=on,wait=off"),
        *("-mon", "chardev=events,mode=control", "-boot", "strict=on"),
        *("-device", '{"driver": "virtio-balloon-pci", "id": "balloon0"}'),
    ]


def test_devices_and_their_order_at_boot() -> None:
    found = words(PC)
    by_id = devices(found)
    assert by_id["disk-vda"] == {
        "driver": "virtio-blk-pci",
        "id": "disk-vda",
        "bootindex": 2,
        "serial": "S1",
        "share-rw": True,
        "write-cache": "on",
        "drive": "image-vda",
    }
    assert by_id["disk-hdb"]["bus"] == "ide.0" and by_id["disk-hdb"]["unit"] == 1
    assert "bootindex" not in by_id["disk-hdb"]  # the first of its class has it
    assert by_id["disk-hdc"]["driver"] == "ide-cd" and by_id["disk-hdc"]["bootindex"] == 1
    assert "drive" not in by_id["disk-hdc"]  # empty
    assert by_id["card0"]["bootindex"] == 3
    first, second = map(json.loads, after(found, "-blockdev"))
    assert first == {
        "driver": "raw",
        "node-name": "image-vda",
        "read-only": False,
        "file": {
            "driver": "host_device",
            "filename": "/dev/vg/web1",
            "aio": "native",
            "discard": "unmap",
            "cache": {"direct": True, "no-flush": False},
        },
        "discard": "unmap",
        "cache": {"direct": True, "no-flush": False},
    }
    assert second["file"]["filename"] == "/srv/a,b.qcow2"
    assert after(found, "-vnc") == [
        "0.0.0.0:1,id=vnc0",
        "unix:/run/vnc,id=vnc1",
        "[::1]:0,to=999,id=vnc2",
    ]
    q35 = devices(words(Q35))
    assert (q35["disk-sda"]["bootindex"], q35["card0"]["bootindex"]) == (2, 1)
    assert q35["disk-sdc"]["bus"] == "ide.2" and q35["disk-sda"]["bus"] == "scsi0.0"


def test_a_value_is_never_another_option() -> None:
    """Commas, quotes, `=`: in names, paths, and what goes to QEMU as JSON."""
    nasty = "a,b=c,server=on\"'{}"
    xml = PC.replace(">web1", ">a,b").replace("/run/serial", "/r,path=x").replace("vg/web1", nasty)
    xml = xml.replace(f'"/dev/{nasty}"', "'/dev/" + nasty.replace("'", "&apos;") + "'")
    found = words(xml)
    assert "guest=a,,b,debug-threads=on" in found
    assert "socket,id=serial0,path=/r,,path=x" in found
    assert json.loads(after(found, "-blockdev")[0])["file"]["filename"] == "/dev/" + nasty


def test_kvm_where_it_is_usable() -> None:
    for kvm, kind, accel in ((True, "kvm", "kvm"), (False, "kvm", "tcg"), (True, "qemu", "tcg")):
        xml = PC.replace('type="kvm"', f'type="{kind}"')
        assert after(words(xml, PLACE._replace(kvm=kvm)), "-accel") == [accel]


def test_a_guest_without_an_address_has_the_same_one_at_each_start() -> None:
    first, again = devices(words(PC)), devices(words(PC))
    assert first["card1"]["mac"] == again["card1"]["mac"] != first["card2"]["mac"]
    assert re.fullmatch("52:54:00(:[0-9a-f]{2}){3}", str(first["card1"]["mac"]))


def test_a_socket_whose_name_is_too_long() -> None:
    with pytest.raises(DefinitionError, match="longer than a socket's name may be"):
        words(Q35, Place("/" + "x" * 100, kvm=False))


def test_each_list_has_a_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    found = []
    for name in ("one", "two", "another list with a name of more than 12"):
        with (
            DomainList.create(path=tmp_path / name) as doms,
            DomainList.attach(path=tmp_path / name) as again,
        ):
            found.append(QemuDriver(doms).directory)
            assert QemuDriver(again).directory == found[-1]
    assert [str(one)[:-8] for one in found] == [
        "/run/user/1000/shmdomains-qemu/one-",
        "/run/user/1000/shmdomains-qemu/two-",
        "/run/user/1000/shmdomains-qemu/another_list-",
    ]
    with DomainList() as doms:
        with pytest.raises(ValueError, match="this list has no name: say directory="):
            QemuDriver(doms)
        with pytest.raises(ValueError, match="guests is not absolute"):
            QemuDriver(doms, directory="guests")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with (
        DomainList.attach(path=tmp_path / "one") as doms,
        pytest.raises(ValueError, match="XDG_RUNTIME_DIR names no directory"),
    ):
        QemuDriver(doms)


def test_what_is_missing_is_said() -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'qemu' else find(name, *rest)\n"
        "import shmdomains.drivers.qemu"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: QemuDriver needs qemu.qmp: pip install 'shmdomains[qemu]'" in ended.stderr


# --- nothing is ignored -------------------------------------------------------------------------

DEFAULTS = {
    # What is said, and is what QEMU or the driver does without it.
    "PC": {
        "domain/currentMemory",  # QEMU's monitor is told, before the guest runs
        "domain/currentMemory@unit",
        "domain/os/type@arch=i686",  # it chooses the emulator, and here is one
        "domain/cpu@mode=custom",
        "domain/cpu/topology@dies=1",
        "domain/cpu/topology@threads=1",
        "domain/devices/disk@type=file",
        "domain/devices/disk@device=disk",
        "domain/devices/disk/driver@name=qemu",
        "domain/devices/disk/driver@type=raw",
        "domain/devices/disk/target@bus",
        "domain/devices/interface@type=user",
        "domain/devices/interface/target@managed=no",
        "domain/devices/channel/source@mode=bind",
        "domain/devices/graphics@autoport=no",
        "domain/devices/graphics/listen@type=address",
        "domain/devices/input@bus=usb",
        "domain/devices/panic@model=isa",
    },
    "Q35": {
        "domain/os/type@arch=x86_64",
        "domain/devices/interface@type=user",
        "domain/devices/disk/target@bus=scsi",
        "domain/devices/console@type=pty",
        "domain/devices/graphics/listen@type=socket",
    },
}


def path_of(element: etree._Element) -> str:
    tags = [str(element.tag), *(str(one.tag) for one in element.iterancestors())]
    return "/".join(reversed(tags))


def taken_away(xml: str) -> Iterator[tuple[str, str]]:
    """What is taken away, and the document without it: each element, each attribute."""
    for number, element in enumerate(etree.fromstring(xml).iter("*")):
        for attribute in (None, *element.attrib):
            root = etree.fromstring(xml)
            this = list(root.iter("*"))[number]
            path = path_of(this)
            if attribute is not None:
                path += f"@{attribute}={this.attrib.pop(str(attribute))}"
            elif this.getparent() is not None:
                this.getparent().remove(this)
            else:
                continue
            yield path, etree.tostring(root, encoding="unicode")


@pytest.mark.parametrize(("name", "xml"), [("PC", PC), ("Q35", Q35)])
def test_whatever_is_taken_away_is_missed(name: str, xml: str) -> None:
    whole, ignored = words(xml), set()
    for path, rest in taken_away(xml):
        try:
            found = words(rest)
        except DefinitionError:
            continue
        if found == whole:
            ignored.add(path)
    said = {one.partition("=")[0] for one in ignored} | ignored
    assert said >= DEFAULTS[name]  # none is listed that is missed
    assert {one for one in ignored if not {one, one.partition("=")[0]} & DEFAULTS[name]} == set()


def test_the_two_definitions_say_all_that_is_taken() -> None:
    said = set()
    for xml in (PC, Q35):
        for element in etree.fromstring(xml).iter("*"):
            said |= {path_of(element), *(f"{path_of(element)}@{one}" for one in element.attrib)}
    taken = set(TAKEN) | {f"{path}@{one}" for path in TAKEN for one in TAKEN[path]}
    # Said elsewhere: in `REFUSED` and below.
    elsewhere = re.compile(
        r"domain/(uuid|on_poweroff|on_crash|memory@unit|currentMemory@unit)"
        r"|domain/devices/(controller|serial/target|console/(source|target)|interface/link).*"
    )
    assert {one for one in taken - said if not elsewhere.fullmatch(one)} == set()


@pytest.mark.parametrize("place", sorted(WITHOUT_EFFECT))
def test_what_is_without_effect_changes_nothing(place: str) -> None:
    assert WITHOUT_EFFECT[place]
    path, _, attribute = place.partition("@")
    root = etree.fromstring(PC)
    parts = path.removesuffix("/*").split("/")[1:]
    element = root
    for part in parts:
        found = element.find(part)
        if found is None:
            found = etree.SubElement(element, part)
            if part == "console":
                found.set("type", "unix")
            if part == "controller":
                found.set("type", "pci")
        element = found
    if attribute:
        name, _, value = attribute.partition("=")
        element.set(name, value or "1")
    elif path.endswith("/*"):
        etree.SubElement(element, "anything").set("of", "it")
    assert words(etree.tostring(root)) == words(PC)


REFUSED = {
    # what is replaced, by what, and what is said
    "an element": ("<acpi/>", "<hyperv/>", "does not know <hyperv> here"),
    "an attribute": ('<boot dev="hd"/>', '<boot dev="hd" x="1"/>', "x='1' here"),
    "a value": ('"i686"', '"s390x"', "arch='s390x'; it knows x86_64, i686"),
    "a type": ('type="kvm"', 'type="xen"', "type='xen'; it knows kvm, qemu (<domain>"),
    "os": ("hvm<", "linux<", "the QEMU driver knows os type 'hvm' only"),
    "a machine": ("pc-i440fx-7.2", "microvm", "machine 'microvm'; it knows pc and q35 (<type>"),
    "a second one": ("<acpi/>", "<acpi/><acpi/>", "a second <acpi>; the QEMU driver takes one"),
    "a foreign one": ("<acpi/>", '<x xmlns="urn:x"/>', "does not know <{urn:x}x> here"),
    "in an empty one": ("<acpi/>", "<acpi><x/></acpi>", "does not know <x> here (<x>"),
    "topology": ('dies="1"', 'dies="2"', "has 8 vCPUs, the maximum is 4 (<topology>"),
    "a feature": ('name="vmx"', 'name="vmx=on,x"', "a feature has a name (<feature>"),
    "no model": ("<model>qemu64</model>", "", "features need a model (<cpu>"),
    "a model": ('mode="custom"', 'mode="host-model"', "a model is for mode 'custom' (<model>"),
    "a timer": ('"hpet" present', '"pit" present', "timer 'pit' cannot be left out (<timer>"),
    "a policy": ('"catchup"', '"discard"', "tickpolicy 'discard' of timer 'rtc' (<timer>"),
    "on_reboot": ("destroy</on_reboot", "preserve</on_reboot", "on_reboot 'preserve'"),
    "a target": ('"hdb"', '"vda"', "target 'vda' duplicated (<target>"),
    "a far one": ('dev="hdb"', 'dev="hde"', "target 'hde' is beyond the four of IDE (<target>"),
    "no name": ('dev="hdb"', 'dev="hd1"', "target 'hd1' is none like 'hda' (<target>"),
    "an id": ('dev="vda"', 'dev="vd,x"', "'vd,x' is no name of a disk (<target>"),
    "a bus": ('dev="hdc" bus="ide"', 'dev="xa"', "target 'xa' does not say its bus (<target>"),
    "cdrom": ('"hdc" bus="ide"', '"hdc" bus="virtio"', "does not support bus 'virtio' (<target>"),
    "no source": ('<source file="/srv/a,b.qcow2"/>', "", "a disk needs a source (<disk>"),
    "a source": (
        '<source dev="/dev/vg/web1"/>',
        '<source file="/a"/>',
        "no source of type",
    ),
    "native": ('cache="none" ', "", "native I/O needs either no disk cache or directsync cache"),
    "boot": ("<shareable/>", '<boot order="1"/>', "cannot be used together with os/boot elements"),
    "a card": ('<model type="virtio"/>', '<model type="x"/>', "network card 'x'; it knows virtio"),
    "a network": ('type="bridge"', 'type="network"', "type='network'; it knows user, ethernet"),
    "no bridge": ('<source bridge="br0"/>', "", "type 'bridge' needs a source (<interface>"),
    "a tap": ('type="ethernet"', 'type="user"', "a target is for type 'ethernet' (<target>"),
    "a serial": (
        'type="unix">\n      <source mode="c',
        'type="tcp">\n      <source mode="c',
        "'tcp'",
    ),
    "a console": ("<emulator>", '<console type="pty"/><emulator>', "a console is the first"),
    "a port": ('port="3"', 'port="x"', "port 'x' is no number (<target>"),
    "vnc": ('"5901"', '"80"', "port '80' is none of VNC's, from 5900 (<graphics>"),
    "spice": ('type="vnc" listen', 'type="spice" listen', "type='spice'; it knows vnc (<graphics>"),
    "a password": ('type="vnc" listen', 'type="vnc" passwd="x" listen', "passwd='x' here"),
    "listen": ('keymap="de"', 'listen="::1"', "listen' address '::1' does not match '0.0.0.0'"),
    "keymaps": ('listen="::1"', 'keymap="fr"', "the QEMU driver takes one keymap for all"),
    "a mouse": ('"tablet" bus="usb"', '"tablet" bus="ps2"', "ps2 bus does not support tablet"),
    "no balloon": ('"virtio" autodeflate="on"', '"none"', "less current memory than memory needs"),
    "scsi": ("<emulator>", '<controller type="scsi" model="lsi"/><emulator>', "controller 'lsi'"),
    "usb": ("<emulator>", '<controller type="usb" model="none"/><emulator>', "needs a USB contr"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_element_and_line(name: str) -> None:
    old, new, said = REFUSED[name]
    assert old in PC
    xml = PC.replace(old, new, 1)
    with pytest.raises(DefinitionError) as caught:
        words(xml)
    assert said in str(caught.value)
    element, line = caught.value.element, caught.value.line
    assert element and line and str(caught.value).endswith(f"(<{element}>, line {line})")
    assert f"<{element.rpartition('}')[2]}" in xml.splitlines()[line - 1]


def test_q35_has_no_ide() -> None:
    with pytest.raises(DefinitionError, match="IDE controllers are unsupported for this QEMU"):
        words(Q35.replace('dev="sdc" bus="sata"', 'dev="hda" bus="ide"'))


def test_a_link_that_is_down_and_a_boot_order_that_is_taken() -> None:
    with pytest.raises(DefinitionError, match="state='down'; it knows up"):
        words(Q35.replace('<boot order="1"/>', '<link state="down"/>'))
    with pytest.raises(DefinitionError, match="boot order '2' is taken or no order"):
        words(Q35.replace('<boot order="1"/>', '<boot order="2"/>'))


# --- definitions of others ----------------------------------------------------------------------


def judged(path: Path) -> str | None:
    """Why it is refused, with the place checked; ``None`` if it has a command line."""
    try:
        definition = DomainDef.from_xml(path.read_bytes())
    except DefinitionError as error:
        return f"unread: {error}"
    try:
        found = command(definition, definition.uuid or UUID_1, PLACE)
    except DefinitionError as error:
        assert str(error).endswith(f"(<{error.element}>, line {error.line})"), path.name
        return str(error)
    assert all(isinstance(word, str) and "\0" not in word for word in found)
    return None


def test_the_samples() -> None:
    accepted = {path.stem for path in SAMPLES.glob("*.xml") if judged(path) is None}
    assert accepted == {"db1-replica", "test-rig-200", "tiny", "データベース"}


def test_libvirts_own_files() -> None:
    files = sorted(LIBVIRT.glob("*.xml"))
    if not files:
        pytest.skip(f"libvirt's files are not in {LIBVIRT} (or set SHMDOMAINS_LIBVIRT_XML)")
    reasons = {path.name: judged(path) for path in files}
    assert len(reasons) == 259
    assert sum(reason is None for reason in reasons.values()) == 33
    assert sum((reason or "").startswith("unread") for reason in reasons.values()) == 3
