"""Documents and blobs that nobody meant: refused with a plain error, or right; bounded either way.

Whatever bytes come as a definition, `DomainDef.from_xml` raises a `DefinitionError` or returns a
value that survives every way there and back; whatever MessagePack comes as a stored definition, as
a driver's data, as the settings of a list or as an export stream is a right value or the error that
stands in the docstring. No document or blob costs more memory than a fixed multiple of its size,
and none more time than a deadline that only a hang or a quadratic loop misses.

The work is done in a process of its own: its address space is limited, an answer that does not come
fails the test, and the seed of the document that did it is in the message. Documents are mutations
of the samples and, where they are, of libvirt's own test files; the seeds are fixed, `make soak`
takes more of them.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import resource
import socket
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from xml.parsers import expat

import msgpack
import msgspec
import pytest
from helpers import SOAK, Party, Process, xml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lxml import etree
from test_definition_libvirt import FOLDER

from shmdomains import (
    ConfigError,
    DefinitionError,
    DomainDef,
    DomainList,
    SegmentCorrupt,
    SegmentError,
)
from shmdomains.memory import settings as remembered
from shmdomains.rules.values import decode_data, encode_data
from shmdomains.transfer import export_domains, import_domains
from shmdomains.xml.devices import KINDS
from shmdomains.xml.document import MAX_BYTES

SAMPLES = sorted((Path(__file__).parent / "data" / "domains").glob("*.xml"))
MIB = 1 << 20
PER_BYTE = 64
"""Bytes of memory that one byte of a document may cost: what libxml2 makes of ``<a/>x``, and the
typed view of the most and smallest devices."""
LONGEST_ERROR = 1000
"""Characters. What is refused may be megabytes; a log should not get them."""


# --- a process with little room ----------------------------------------------------------------


@pytest.fixture(scope="module")
def _reader() -> Iterator[Party]:
    process = Process()
    try:
        process.party.tell("import test_fuzz_documents as fuzz")
        yield process.party
    finally:
        process.kill()
        process.party.conn.close()


@pytest.fixture
def reader(_reader: Party) -> Party:
    """Somebody who reads what may be dangerous. Lost with the test that loses it."""
    return _reader


def limited(room: int, work: Callable[[], Any]) -> Any:
    """Do the work in `room` bytes more of address space than there are in use."""
    page = os.sysconf("SC_PAGE_SIZE")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * page
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        return work()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- what must hold for a document -------------------------------------------------------------


def judge(document: str | bytes) -> bool:
    """Whether it is accepted; fails if it is neither refused in order nor a sound definition."""
    try:
        definition = DomainDef.from_xml(document)
    except DefinitionError as error:
        assert 0 < len(str(error)) <= LONGEST_ERROR, f"an error of {len(str(error))} characters"
        assert error.element is None or len(error.element) <= LONGEST_ERROR
        return False
    text = definition.to_xml()
    again = DomainDef.from_xml(text)
    assert again == definition and again.to_xml() == text
    # expat knows names of XML 1.0's fourth edition only.
    if text.isascii() or "name" not in text:
        assert top_level_text(text, "name") == definition.name
    assert hash(again) == hash(definition) and isinstance(repr(definition), str)
    try:
        blob = definition.encode()
    except DefinitionError:
        assert len(text) > 4 * MIB  # typed view and document together are more than a blob holds
    else:
        stored = DomainDef.decode(blob)
        assert stored == definition and stored.to_xml() == text
        assert pickle.loads(pickle.dumps(definition)) == definition
    return True


def judge_rewriting(dice: random.Random, document: str | bytes) -> None:
    """What `replace` writes into a document like this one is read back, and can be undone."""
    try:
        definition = DomainDef.from_xml(document)
    except DefinitionError:
        return
    there = definition.replace(
        name="other", memory=77, title="t", uuid="0" * 31 + "1", emulator="/e"
    )
    assert DomainDef.from_xml(there.to_xml()) == there != definition
    back = there.replace(
        name=definition.name, memory=definition.memory, title=definition.title,
        uuid=definition.uuid, emulator=definition.emulator, description=None,
        current_memory=definition.current_memory,
    )  # fmt: skip
    assert DomainDef.from_xml(back.to_xml()) == back
    for kind in KINDS:
        devices = list(getattr(back, kind))
        if devices:
            at = dice.randrange(len(devices))
            devices[at] = changed_device(dice, devices[at])
            judge_devices(back, kind, devices)


def changed_device(dice: random.Random, device: Any) -> Any:
    fields = dice.sample(device.__struct_fields__, dice.choice((1, 1, 2, 4)))
    return msgspec.structs.replace(device, **{field: dice.choice(FIELDS) for field in fields})


def judge_devices(definition: DomainDef, kind: str, devices: list[Any]) -> None:
    try:
        changed = definition.replace(**{kind: devices})
    except DefinitionError as error:
        assert len(str(error)) <= 100 * LONGEST_ERROR  # it shows the device
        return
    reread = DomainDef.from_xml(changed.to_xml())
    assert getattr(reread, kind) == getattr(changed, kind)
    assert reread == changed


def top_level_text(document: str, tag: str) -> str:
    """The text of the first child with this tag, as another parser than ours sees it."""
    found: list[str] = []
    path: list[str] = []
    seen = False

    def start(name: str, attributes: Any) -> None:
        path.append(name)

    def end(name: str) -> None:
        nonlocal seen
        seen = seen or path[1:] == [tag]
        path.pop()

    def characters(data: str) -> None:
        if path[1:2] == [tag] and not seen:
            found.append(data)

    parser = expat.ParserCreate("utf-8")
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = characters
    parser.Parse(document.encode(), True)
    return "".join(found)


# --- mutations ---------------------------------------------------------------------------------

NASTY = [
    "", " ", "0", "-1", "1" * 30, "9" * 5000, "0x" + "f" * 3000, "1e9", "18446744073709551615",
    "18446744073709551616", "9007199254740991", "9007199254740992", "4294967296", "2147483648",
    "\u0660\u0661", "\uff11", "1_0", "+5", "-0", "0x10", "NaN", "yes", "no", "a/b", "..", ".",
    "x" * 252, "\u00e9" * 126, "a\nb", "\t\n\r ", "&#10;", "&#0;", "&#xD800;", "&#x10FFFF;",
    "&amp;", "&lt;&gt;", "&nope;", "]]>", "<![CDATA[<x>]]>", "<!-- -->", "<?p i?>", "--", "\u202e",
    "\ufeff", "\U0001f600", "\u0301", "\ud800", "\x00", "\x01", "\x7f", "\x85", "\u2028", "\ufffe",
    "{u}x", "%s%n", "../../etc/passwd", "c7a5fdbd-edaf-9455-926a-d65c16db1809",
    "c7a5fdbdedaf9455926ad65c16db1809", "KiB", "b", "EiB", "kb", "' onload='", '"', "kvm", "xen",
    "network", "file", "pci", "usb", "0000:00:00.0", "destroy",
]  # fmt: skip
FIELDS = [None, None, None, "v", "vnc", "file", "network", "pci", "usb", 7, -1, True, "1.2", "u:p"]
SNIPPETS = [
    b"<!DOCTYPE domain>", b"<!DOCTYPE d [<!ENTITY e 'x'>]>", b"&e;", b"<?xml version='1.0'?>",
    b"<?xml version='1.1' encoding='utf-16'?>", b"<![CDATA[", b"]]>", b"<!--", b"-->", b"<a:b/>",
    b"<b xmlns:a='r'/>", b" xmlns='u:x'", b" xmlns:a='rel'", b"<name>", b"</domain>", b"<domain>",
    b"<vcpus/>", b"<metadata><x/></metadata>", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc0\x80",
    b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"<" * 50, b"&" * 50, b"\r", b"<a>" * 300,
]  # fmt: skip
ENCODINGS = [
    "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "latin-1",
    "cp037", "utf-7", "shift_jis", "iso2022_jp", "koi8-r", "hz", "gb18030", "cp1252",
]  # fmt: skip
NAMES = [*ENCODINGS, "ascii", "klingon", "utf-8x", "hex", "zlib", "rot13", "idna", "x" * 3000, ""]
_TOKENS = re.compile(rb"<[^<>]*>|[^<>]+|[<>]")


@cache
def corpus() -> list[bytes]:
    """The samples, and libvirt's own files where they are."""
    paths = [*SAMPLES, *sorted(FOLDER.glob("*.xml"))]
    return [path.read_bytes() for path in paths]


def change_bytes(dice: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5, 20))):
        at, to = sorted(dice.randrange(len(out) + 1) for _ in range(2))
        to = min(to, at + dice.choice((1, 4, 100, len(out))))
        how = dice.randrange(7)
        if how == 0 and at < len(out):
            out[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            out[at:at] = dice.choice(SNIPPETS)
        elif how == 2:
            del out[at:to]
        elif how == 3:
            out[at:at] = out[at:to]
        elif how == 4:
            other = dice.choice(corpus())
            begin = dice.randrange(len(other))
            out[at:to] = other[begin : begin + dice.randrange(400)]
        elif how == 5:
            out[at:to] = dice.randbytes(to - at)[:2000]
        else:
            del out[at:]
        if not out:
            break
    return bytes(out)


def change_tokens(dice: random.Random, data: bytes) -> bytes:
    tokens = _TOKENS.findall(data)
    for _ in range(dice.choice((1, 1, 2, 4))):
        at, to = sorted(dice.randrange(len(tokens)) for _ in range(2))
        how = dice.randrange(6)
        if how == 0:
            del tokens[at : at + dice.choice((1, 2, to - at))]
        elif how == 1:
            tokens[at:at] = tokens[at : at + dice.choice((1, 3, 30))] * dice.choice((1, 2, 40))
        elif how == 2:
            tokens[at], tokens[to] = tokens[to], tokens[at]
        elif how == 3:
            tokens[at] = dice.choice(SNIPPETS)
        elif how == 4:
            tokens[at] = dice.choice(NASTY).encode("utf-8", "surrogatepass")
        else:
            tokens.insert(at, dice.choice(_TOKENS.findall(dice.choice(corpus()))))
        if not tokens:
            break
    return b"".join(tokens)


def change_tree(dice: random.Random, data: bytes) -> bytes:
    root = etree.fromstring(data)
    for _ in range(dice.choice((1, 2, 3, 8))):
        element = dice.choice(list(root.iter("*")))
        parent = element.getparent()
        how = dice.randrange(10)
        try:
            if how == 0 and parent is not None:
                parent.remove(element)
            elif how == 1 and parent is not None:
                for _ in range(dice.choice((1, 2, 50))):
                    parent.insert(dice.randrange(len(parent) + 1), pickled(element))
            elif how == 2:
                dice.choice(list(root.iter("*"))).append(pickled(element))
            elif how == 3:
                nest(dice, element)
            elif how == 4 and element.attrib:
                element.set(dice.choice(list(element.attrib)), dice.choice(NASTY))
            elif how == 5 and element.attrib:
                del element.attrib[dice.choice(list(element.attrib))]
            elif how == 6:
                element.text = dice.choice(NASTY)
            elif how == 7:
                element.tail = dice.choice(NASTY)
            elif how == 8:
                element.tag = dice.choice(["name", "memory", "devices", "disk", "x", "{u:1}y"])
            else:
                element.insert(0, etree.Comment("c") if dice.random() < 0.5 else etree.PI("p", "i"))
        except ValueError:
            continue  # what lxml itself would not write
    return etree.tostring(root, encoding="utf-8")


def pickled(element: Any) -> Any:
    return etree.fromstring(etree.tostring(element, with_tail=False))


def nest(dice: random.Random, element: Any) -> None:
    for _ in range(dice.choice((1, 10, 240, 300))):
        inner = etree.SubElement(element, element.tag)
        inner.text, element = element.text, inner


def change_encoding(dice: random.Random, data: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    name, encoding = dice.choice(NAMES), dice.choice(ENCODINGS)
    if dice.random() < 0.8:
        name = encoding
    text = re.sub(r"^\ufeff?<\?xml[^>]*\?>\s*", "", text)
    if dice.random() < 0.8:
        text = f"<?xml version='1.{dice.choice('0012')}' encoding='{name}'?>{text}"
    out = text.encode(encoding, "replace")
    start = dice.choice([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"\n"])
    return start + out[: len(out) - dice.choice((0, 0, 0, 1, 3))]


MUTATIONS = [change_bytes, change_tokens, change_tree, change_tree, change_encoding]


def mutant(seed: int) -> bytes:
    """The document of a seed."""
    dice = random.Random(seed)
    data = dice.choice(corpus())
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        try:
            data = dice.choice(MUTATIONS)(dice, data)
        except (etree.XMLSyntaxError, IndexError, ValueError):
            return data  # broken by an earlier mutation, which is what was wanted
        if not data:
            break
    return data[: 4 * MIB]


def judge_seeds(first: int, count: int) -> int:
    """Judge the documents of these seeds, as bytes and as text; how many were accepted."""
    accepted = 0
    for seed in range(first, first + count):
        document = mutant(seed)
        room = 64 * MIB + PER_BYTE * len(document)
        try:
            accepted += limited(room, lambda document=document: judge(document))
            judge_rewriting(random.Random(seed), document)
            judge(document.decode("utf-8", "surrogateescape"))
        except BaseException as exc:
            raise AssertionError(f"seed {seed}: {type(exc).__name__}: {exc}") from exc
    return accepted


@pytest.mark.soak
def test_mutated_documents(reader: Party, tried: Callable[[str, int], None]) -> None:
    step, count = 50, 30_000 if SOAK else 1_500
    accepted = sum(
        reader.tell(f"fuzz.judge_seeds({first}, {step})") for first in range(0, count, step)
    )
    assert count / 10 < accepted < count  # neither all noise nor all harmless
    tried("mutated documents, refused or sent there and back", count)


@pytest.mark.skipif(not FOLDER.is_dir(), reason="libvirt's files are not here")
def test_libvirts_own_documents_are_mutated_too() -> None:
    assert len(corpus()) > len(SAMPLES) + 200


# --- what is large, deep, or made to take long -------------------------------------------------


def document(extra: str = "", *, name: str = "n", memory: str = "1024") -> str:
    return (
        f"<domain type='kvm'><name>{name}</name><memory>{memory}</memory>"
        f"<os><type>hvm</type></os>{extra}</domain>"
    )


def devices(extra: str) -> str:
    return document(f"<devices>{extra}</devices>")


def numbered(pattern: str, count: int) -> str:
    return "".join(pattern.replace("#", str(number)) for number in range(count))


# Each makes a document of about `n` characters.
LARGE: dict[str, Callable[[int], str | bytes]] = {
    "elements": lambda n: document("<a/>x" * (n // 5)),
    "elements, broken at the end": lambda n: document("<a/>" * (n // 4)) + "<",
    "not UTF-8 at the end": lambda n: document("<a/>" * (n // 4)).encode() + b"\xff",
    "not UTF-8 at all": lambda n: b"<domain>" + b"\xff" * n,
    "lone surrogates": lambda n: "<domain>" + "\ud800" * (n // 3),
    "attributes": lambda n: document("<a" + numbered(" a#=''", n // 12) + "/>"),
    "namespaces": lambda n: document("<a" + numbered(" xmlns:n#='u'", n // 19) + "/>"),
    "comments": lambda n: document("<!---->" * (n // 7)),
    "instructions": lambda n: document("<?a?>" * (n // 5)),
    "character data": lambda n: document("<![CDATA[]]>" * (n // 12)),
    "character references": lambda n: document("&#65;" * (n // 5)),
    "unknown entities": lambda n: document("&a;" * (n // 3)),
    "never closed": lambda n: "<a>" * (n // 3),
    "a tag's name": lambda n: document(f"<{'a' * n}/>"),
    "the root's name": lambda n: f"<{'d' * 49_000} xmlns='{'u' * n}'/>",
    "a namespace's name": lambda n: f"<domain xmlns='{'u' * n}'/>",
    "comments before the root": lambda n: "<!---->" * (n // 7) + "<!DOCTYPE a><domain/>",
    "comments that do not end": lambda n: "<!--" * (n // 4) + "<!DOCTYPE",
    "instructions that do not end": lambda n: "<?a " * (n // 4) + "<!DOCTYPE",
    "a declaration that does not end": lambda n: "<?xml " + "?" * n,
    "encodings": lambda n: b"<?xml " + b"encoding " * (n // 9),
    "an encoding and blanks": lambda n: b"<?xml encoding" + b" " * n,
    "an encoding's name": lambda n: b"<?xml encoding='" + b"a" * n + b"'?><domain/>",
    "a name": lambda n: document(name="x" * n),
    "a name of lines": lambda n: document(name="\n" * n),
    "a name of folders": lambda n: document(name="a/" * (n // 2)),
    "a name in pieces": lambda n: document(name="x<!-- -->" * (n // 9)),
    "digits of memory": lambda n: document(memory="1" * n),
    "blanks before memory": lambda n: document(memory=" " * n),
    "a unit": lambda n: document(f"<memory unit='{'k' * n}'>1</memory>", memory=""),
    "a vcpu's state": lambda n: document(f"<vcpus><vcpu id='0' enabled='{'y' * n}'/></vcpus>"),
    "an action": lambda n: document(f"<on_crash>{'x' * n}</on_crash>"),
    "a uuid of blanks": lambda n: document(f"<uuid>{' ' * n}</uuid>"),
    "a uuid of dashes": lambda n: document(f"<uuid>{' -' * (n // 2)}</uuid>"),
    "a uuid of digits": lambda n: document(f"<uuid>{'0 ' * (n // 2)}</uuid>"),
    "a uuid with blanks around": lambda n: document(
        f"<uuid>{' ' * (n // 2)}{'1' * 32}{' ' * (n // 2)}</uuid>"
    ),
    "digits of an address": lambda n: devices(
        f"<hostdev type='pci'><source><address domain='0x{'f' * n}'/></source></hostdev>"
    ),
    "digits of a bus": lambda n: devices(
        f"<hostdev type='usb'><source><address bus='0x{'f' * n}'/></source></hostdev>"
    ),
    "digits of a port": lambda n: devices(f"<graphics type='vnc' port='{'1' * n}'/>"),
    "disks": lambda n: devices("<disk/>" * (n // 7)),
    "displays": lambda n: devices("<graphics type='vnc'/>" * (n // 22)),
    "vcpus": lambda n: document(
        "<vcpu>4000000</vcpu><vcpus>"
        + numbered("<vcpu id='#' enabled='no'/>", n // 32)
        + "</vcpus>"
    ),
    "cells": lambda n: document(
        "<cpu><numa>" + "<cell memory='1'/>" * (n // 18) + "</numa></cpu>", memory=""
    ),
    "firmware's uuids": lambda n: document(
        "<sysinfo type='smbios'><system>"
        + "<entry name='uuid'/>" * (n // 20)
        + "</system></sysinfo>"
    ),
    "metadata that goes": lambda n: document(f"<metadata>{'<a/>x' * (n // 5)}</metadata>"),
    "metadata that goes, in lines": lambda n: document(
        f"<metadata>\n{'  <a/>' * (n // 6)}</metadata>"
    ),
    "metadata after a keeper": lambda n: document(
        f"<metadata><k:k xmlns:k='u'/>{'<a/>x' * (n // 5)}</metadata>"
    ),
    "metadata of many": lambda n: document(
        "<metadata>" + numbered("<a xmlns='u:#'/>x", n // 21) + "</metadata>"
    ),
}


LARGER = {"metadata that goes", "metadata after a keeper"}
"""Where a megabyte shows what a fifth of it does not."""


def judge_large(what: str, size: int) -> bool:
    made = LARGE[what](size)
    return limited(64 * MIB + PER_BYTE * max(len(made), size), lambda: judge(made))


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("what", LARGE)
def test_large_documents_take_their_share_and_no_more(
    reader: Party, tried: Callable[[str, int], None], what: str
) -> None:
    """A loop in a loop would take minutes for these, and hours for the largest."""
    size = 8 * MIB if SOAK else MIB if what in LARGER else MIB // 5
    reader.start(f"fuzz.judge_large({what!r}, {size})")
    reader.answer(deadline=300 if SOAK else 20)
    tried("documents made to be slow or large", 1)


FORMS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "bytes": str.encode,
    "bytearray": lambda text: bytearray(text.encode()),
    "memoryview": lambda text: memoryview(text.encode()),
}


def read_100_megabytes(form: str) -> None:
    text = FORMS[form](document(f"<description>{'x' * (100 << 20)}</description>"))
    limited(16 * MIB, lambda: DomainDef.from_xml(text))


@pytest.mark.soak
@pytest.mark.parametrize("form", FORMS if SOAK else ["str", "memoryview"])
def test_a_hundred_megabytes_of_text(reader: Party, form: str) -> None:
    """The limit is named, and nothing is copied to find out."""
    with pytest.raises(DefinitionError, match=f"more than {MAX_BYTES}"):
        reader.tell(f"fuzz.read_100_megabytes({form!r})")


@pytest.mark.parametrize("size", [MAX_BYTES, MAX_BYTES + 1])
def test_the_limit_to_the_byte(size: int) -> None:
    unit = f"<a>{'x' * 1000}</a>"
    body = document(unit * (size // len(unit) - 1))
    whole = body + " " * (size - len(body))
    for form in (whole, whole.encode()):
        if size <= MAX_BYTES:
            assert DomainDef.from_xml(form).name == "n"
        else:
            with pytest.raises(DefinitionError, match="16777216"):
                DomainDef.from_xml(form)
    assert "16 MiB" in (DomainDef.from_xml.__doc__ or "")


@pytest.mark.parametrize("depth", [254, 255, 256, 1000, 1_000_000])
def test_nesting_is_limited(reader: Party, depth: int) -> None:
    nested = f"fuzz.document('<a>' * {depth} + '</a>' * {depth})"
    # It is made before the limit, which is for the reading.
    read = "lambda nested: fuzz.limited(64 << 20, lambda: fuzz.judge(nested))"
    assert reader.tell(f"({read})({nested})") is (depth < 256)


# --- entities, and whatever else would be fetched ----------------------------------------------


class Trap:
    """A file and a server that nobody may touch: opening the FIFO wakes its writer."""

    def __init__(self, folder: Path) -> None:
        self.fifo = folder / "secret"
        os.mkfifo(self.fifo)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setblocking(False)
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}/secret"

    def was_touched(self) -> bool:
        try:
            os.close(os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK))
            return True  # there is a reader
        except OSError:
            pass
        try:
            self.server.accept()[0].close()
            return True
        except BlockingIOError:
            return False


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    trap = Trap(tmp_path)
    yield trap
    trap.server.close()


FETCHING = {
    "entity": "<!DOCTYPE domain [<!ENTITY e SYSTEM '{}'>]>" + document(name="&e;"),
    "unused entity": "<!DOCTYPE domain [<!ENTITY e SYSTEM '{}'>]>" + document(),
    "parameter entity": "<!DOCTYPE domain [<!ENTITY % e SYSTEM '{}'> %e;]>" + document(),
    "external subset": "<!DOCTYPE domain SYSTEM '{}'>" + document(),
    "public subset": "<!DOCTYPE domain PUBLIC 'x' '{}'>" + document(),
    "in an attribute": "<!DOCTYPE d [<!ENTITY e SYSTEM '{}'>]><domain type='&e;'/>",
    "notation": "<!DOCTYPE d [<!NOTATION n SYSTEM '{0}'><!ENTITY e SYSTEM '{0}' NDATA n>]><d/>",
    "after comments": "<!-- a -->\n<?p i?>\n<!DOCTYPE d SYSTEM '{}'>" + document(),
}
HARMLESS = {
    "stylesheet": "<?xml-stylesheet type='text/xsl' href='{}'?>" + document(),
    "inclusion": document(
        "<xi:include xmlns:xi='http://www.w3.org/2001/XInclude' href='{}' parse='text'/>"
    ),
    "schema": document(
        "<metadata><a xmlns='u:1' xmlns:i='http://www.w3.org/2001/XMLSchema-instance'"
        " i:schemaLocation='u:1 {}'/></metadata>"
    ),
    "catalogue": "<?oasis-xml-catalog catalog='{}'?>" + document(),
    "a disk": devices("<disk type='file'><source file='{}'/><target dev='vda'/></disk>"),
}


@pytest.mark.parametrize("target", ["file", "url", "path", "passwd"])
@pytest.mark.parametrize("what", [*FETCHING, *HARMLESS])
def test_nothing_outside_of_the_document_is_read(
    reader: Party, trap: Trap, what: str, target: str
) -> None:
    place = {
        "file": f"file://{trap.fifo}",
        "url": trap.url,
        "path": str(trap.fifo),
        "passwd": "file:///etc/passwd",
    }[target]
    text = (FETCHING | HARMLESS)[what].format(place)
    for form in (text, text.encode(), text.encode("utf-16"), text.encode("utf-32")):
        if what in HARMLESS:
            assert reader.tell(f"DomainDef.from_xml({form!r}).name") == "n"
        else:
            with pytest.raises(DefinitionError, match="document type declaration") as caught:
                reader.tell(f"DomainDef.from_xml({form!r})")
            assert "root:" not in str(caught.value)
        assert not trap.was_touched()


def test_the_trap_is_one(trap: Trap) -> None:
    with socket.create_connection(trap.server.getsockname()):
        assert trap.was_touched()
    reading = os.open(trap.fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert trap.was_touched()
    os.close(reading)
    assert not trap.was_touched()


BOMBS = {
    "billion laughs": "<!DOCTYPE d [<!ENTITY e0 'ha'>"
    + "".join(f"<!ENTITY e{i + 1} '{f'&e{i};' * 10}'>" for i in range(9))
    + "]><domain type='kvm'><name>&e9;</name></domain>",
    "quadratic": f"<!DOCTYPE d [<!ENTITY e '{'x' * 50_000}'>]>" + document("&e;" * 50_000),
    "in parameters": "<!DOCTYPE d [<!ENTITY % p0 'ha'>"
    + "".join(f"<!ENTITY % p{i + 1} '{f'&#37;p{i};' * 10}'>" for i in range(9))
    + "%p9;]><domain/>",
    "recursive": "<!DOCTYPE d [<!ENTITY a '&b;'><!ENTITY b '&a;'>]><domain>&a;</domain>",
    "attributes": "<!DOCTYPE d [<!ATTLIST domain "
    + " ".join(f"a{i} CDATA 'x'" for i in range(50_000))
    + ">]><domain/>",
}


@pytest.mark.parametrize("what", BOMBS)
def test_entity_bombs_do_not_go_off(reader: Party, what: str) -> None:
    for form in ("{}", "{}.encode()", "{}.encode('utf-16')"):
        source = form.format(f"fuzz.BOMBS[{what!r}]")
        with pytest.raises(DefinitionError, match="document type declaration"):
            reader.tell(f"fuzz.limited(16 << 20, lambda: DomainDef.from_xml({source}))")


def test_a_name_of_a_charset_is_not_remembered(reader: Party) -> None:
    """Python's codecs keep every name that they ever looked for."""
    before = reader.tell("import encodings; len(encodings._cache)")
    for number in range(5):
        text = f"<?xml version='1.0' encoding='x{number}{'y' * 1000}'?><domain/>".encode()
        with pytest.raises(DefinitionError, match="unknown encoding 'x"):
            reader.tell(f"DomainDef.from_xml({text!r})")
    assert reader.tell("len(encodings._cache)") == before


def test_relative_names_of_namespaces_can_be_compared() -> None:
    """libxml2 has no canonical form of them."""
    first, second = (
        DomainDef.from_xml(document(f"<metadata><a:b xmlns:a='rel' c='{c}'/></metadata>"))
        for c in (1, 2)
    )
    changed = first.replace(title="t")
    assert DomainDef.from_xml(changed.to_xml()) == changed != second.replace(title="t")
    assert changed.replace(title=None) == first != second


# --- MessagePack: definitions ------------------------------------------------------------------

VALUES = [
    None, True, -1, 0, 2**31, 2**53, 2**63, -(2**63), 1.5, float("nan"), "", "x", "a/b", "\0",
    "\x01", "x" * 70_000, b"", b"\0" * 16, [], {}, [[]], {"a": 1}, [None] * 20,
    msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2), "c7a5fdbd-edaf-9455-926a-d65c16db1809",
    ["name"], ["nope"], ["disks"], "<domain/>", "<a", "<!DOCTYPE a SYSTEM 'file:///dev/null'><a/>",
    "</a>" * 9,
]  # fmt: skip
HEADERS = [
    b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9", b"\xdc", b"\xde", b"\xda", b"\xc5", b"\xc8",
    b"\xd9", b"\xc7",
]  # fmt: skip


def change_value(dice: random.Random, value: Any) -> Any:
    """The value with something else somewhere in it."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        return {**value, key: change_value(dice, value[key])}
    if isinstance(value, (list, tuple)) and value and dice.random() < 0.9:
        items = list(value)
        at = dice.randrange(len(items))
        how = dice.randrange(5)
        if how == 0:
            del items[at]
        elif how == 1:
            items.insert(at, dice.choice(VALUES))
        else:
            items[at] = change_value(dice, items[at])
        return items
    return dice.choice(VALUES)


def change_blob(dice: random.Random, blob: bytes) -> bytes:
    how = dice.randrange(6)
    if how < 3:
        value = msgpack.unpackb(blob, strict_map_key=False)
        for _ in range(dice.choice((1, 1, 3))):
            value = change_value(dice, value)
        return bytes(msgpack.packb(value))
    out = bytearray(blob)
    at = dice.randrange(len(out))
    if how == 3:
        out[at] = dice.randrange(256)
    elif how == 4:
        out[at:at] = dice.choice(HEADERS) + dice.choice((b"\xff" * 4, b"\0\xff\xff\xff", b"\0\0"))
    else:
        del out[at : at + dice.choice((1, 2, 50, len(out)))]
    return bytes(out)


def judge_blob(blob: bytes) -> bool:
    try:
        definition = DomainDef.decode(blob)
    except DefinitionError as error:
        assert len(str(error)) <= LONGEST_ERROR
        return False
    assert DomainDef.decode(definition.encode()).encode() == definition.encode()
    assert isinstance(repr(definition), str) and isinstance(hash(definition), int)
    # It is taken as it is; what its document or its changes say may be found out to be wrong.
    for use in (
        definition.to_xml,
        lambda: definition.replace(title="t").to_xml(),
        lambda: definition == definition.replace(description="d"),
    ):
        try:
            use()
        except DefinitionError as error:
            assert len(str(error)) <= 2 * LONGEST_ERROR
    return True


def blobs() -> list[bytes]:
    definitions = [DomainDef.from_xml(data) for data in corpus()[: len(SAMPLES)]]
    changed = [one.replace(title="t", memory=one.memory + 1, disks=[]) for one in definitions]
    return [one.encode() for one in (*definitions, *changed)]


def judge_blobs(first: int, count: int) -> int:
    bases = blobs()
    accepted = 0
    for seed in range(first, first + count):
        dice = random.Random(seed)
        blob = change_blob(dice, dice.choice(bases))
        room = 64 * MIB + PER_BYTE * len(blob)
        try:
            accepted += limited(room, lambda blob=blob: judge_blob(blob))
        except BaseException as exc:
            raise AssertionError(f"seed {seed}: {type(exc).__name__}: {exc}") from exc
    return accepted


@pytest.mark.soak
def test_mutated_definitions(reader: Party, tried: Callable[[str, int], None]) -> None:
    step, count = 500, 100_000 if SOAK else 1_500
    accepted = sum(
        reader.tell(f"fuzz.judge_blobs({first}, {step})") for first in range(0, count, step)
    )
    assert count / 20 < accepted < count
    tried("mutated definition blobs, refused or used", count)


# --- MessagePack: a driver's data --------------------------------------------------------------


def claims(header: bytes, depth: int, size: int) -> bytes:
    """A blob of about `size` bytes whose sequences or mappings claim to have as many items each."""
    key = b"\x00" if header == b"\xdf" else b""
    length = size // 2 if key else size
    return (header + struct.pack(">I", length) + key) * depth + b"\0" * size


DEEP: dict[str, bytes] = {
    "sequences": b"\x91" * 200_000,
    "mappings": b"\x81\xc0" * 200_000,
    "keys": b"\x81" * 200_000,
    "sequences that end": b"\x91" * 1000 + b"\xc0",
    "a claim": b"\xdd\xff\xff\xff\xff",
    "a text": b"\xdb\xff\xff\xff\xff",
    "bytes": b"\xc6\xff\xff\xff\xff",
    "an extension": b"\xc9\xff\xff\xff\xff\x05",
    "claims in claims": claims(b"\xdd", 300, MIB),
    "claims in mappings": claims(b"\xdf", 300, MIB),
    "small claims in claims": claims(b"\xdd", 150, 250),
}


def judge_data(blob: bytes) -> bool:
    """As the core reads it: these two are what it makes a `SegmentCorrupt` of."""
    try:
        value = decode_data(blob)
    except (ValueError, TypeError):
        return False
    try:
        again = encode_data(value)
    except ValueError:
        assert blob[:256].count(b"\x91") == 256  # deeper than a driver can have written it
        return True
    assert encode_data(decode_data(again)) == again
    return True


@pytest.mark.parametrize("what", DEEP)
def test_deep_data_and_long_claims(reader: Party, what: str) -> None:
    room = 32 * MIB + 16 * len(DEEP[what])
    reader.tell(f"fuzz.limited({room}, lambda: fuzz.judge_data(fuzz.DEEP[{what!r}]))")
    with pytest.raises(DefinitionError):
        reader.tell(f"fuzz.limited({room}, lambda: DomainDef.decode(fuzz.DEEP[{what!r}]))")
    stream = f"fuzz.io.BytesIO(fuzz.DEEP[{what!r}])"
    with pytest.raises(DefinitionError):
        reader.tell(
            f"doms = DomainList(max_domains=4)\n"
            f"fuzz.limited({room}, lambda: fuzz.import_domains(doms, {stream}))"
        )


def judge_datas(first: int, count: int) -> int:
    base = {"disks": ["vda", {"size": 5, "path": b"/srv"}], 7: None, (1, 2): [1.5, True, [[[]]]]}
    packed = bytes(msgpack.packb(base))
    accepted = 0
    for seed in range(first, first + count):
        dice = random.Random(seed)
        out = bytearray(packed)
        for _ in range(dice.choice((1, 2, 4))):
            out[dice.randrange(len(out))] = dice.randrange(256)
        accepted += limited(32 * MIB, lambda out=out: judge_data(bytes(out)))
    return accepted


@pytest.mark.soak
def test_mutated_data(reader: Party, tried: Callable[[str, int], None]) -> None:
    count = 200_000 if SOAK else 5_000
    accepted = sum(
        reader.tell(f"fuzz.judge_datas({first}, 5000)") for first in range(0, count, 5000)
    )
    assert count / 20 < accepted < count
    tried("mutated data blobs, refused or read", count)


atoms = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=9)
    | st.binary(max_size=9) | st.floats(allow_nan=False)
)  # fmt: skip
keys = atoms | st.tuples(atoms, atoms)
values = st.recursive(
    atoms,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


def frozen(value: Any) -> Any:
    """What is read back: sequences are tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(map(frozen, value))
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return value


@pytest.fixture(scope="module")
def web1() -> Iterator[DomainList]:
    """A list with one domain, kept over many examples."""
    with DomainList(max_domains=2) as doms:
        doms.define(xml("web1"))
        yield doms


@settings(derandomize=True, max_examples=2000 if SOAK else 80, deadline=None)
@given(values)
@pytest.mark.soak
def test_data_comes_back_and_travels(web1: DomainList, value: Any) -> None:
    with web1.get(name="web1") as dom:
        dom.data = value
    info = web1.peek(name="web1")
    assert info is not None and encode_data(info.data) == encode_data(frozen(value))
    assert info.data == frozen(value)
    stream = io.BytesIO()
    export_domains(web1, stream)
    stream.seek(0)
    with DomainList(max_domains=2) as other:
        report = import_domains(other, stream)
        assert (report.imported, report.failures) == (["web1"], [])
        arrived = other.peek(name="web1")
        assert arrived is not None and encode_data(arrived.data) == encode_data(info.data)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (object(), TypeError),
        ({1}, TypeError),
        (1 << 64, TypeError),
        (-(1 << 63) - 1, TypeError),
        ("\ud800", ValueError),
    ],
)
def test_data_that_messagepack_can_not_carry(
    web1: DomainList, value: Any, error: type[Exception]
) -> None:
    deep: Any = value
    for _ in range(3):
        deep = [deep]
    with web1.get(name="web1") as dom:
        dom.data = "before"
        for one in (value, deep, {"key": value}):
            with pytest.raises(error):
                dom.data = one
        assert dom.data == "before"
    assert web1.check().problems == []


def test_data_that_is_too_deep(web1: DomainList) -> None:
    value: Any = None
    for _ in range(5000):
        value = [value]
    with web1.get(name="web1") as dom, pytest.raises(ValueError):
        dom.data = value


# --- MessagePack: what stands in a segment -----------------------------------------------------


def judge_stored(first: int, count: int) -> int:
    """Blobs as a damaged heap has them: a right value or `SegmentCorrupt`, locked or not."""
    bases = blobs()[:20]
    accepted = 0
    with DomainList(max_domains=4) as doms:
        for seed in range(first, first + count):
            dice = random.Random(seed)
            blob = change_blob(dice, dice.choice(bases)) or b"\0"
            with doms.locked():
                dom = doms._insert(uuid.UUID(int=seed), f"vm{seed}", blob, 5, True, None, [None])
            info = doms.peek(name=f"vm{seed}")
            for one in (dom, info):
                try:
                    assert isinstance(one.definition, DomainDef)
                    accepted += 1
                except SegmentCorrupt as error:
                    assert "definition" in str(error)
            dom.unlock()
            with doms.locked():
                doms.remove_inactive(dom)
        assert doms.check().problems == []
    return accepted


def test_stored_blobs_that_are_damaged(reader: Party, tried: Callable[[str, int], None]) -> None:
    accepted = reader.tell("fuzz.judge_stored(0, 400)")
    assert 0 < accepted < 800
    tried("damaged blobs in a segment", 400)


@given(st.binary(max_size=60) | values.map(encode_data))
@settings(derandomize=True, max_examples=200)
def test_settings_that_are_damaged(blob: bytes) -> None:
    assume(blob)  # none is remembered
    with pytest.raises(SegmentCorrupt, match="config directory"):
        remembered.decode(blob)
    try:
        dirs, driver = remembered.decode(zlib.crc32(blob).to_bytes(4, "big") + blob)
    except (SegmentCorrupt, ConfigError) as error:
        assert "directory" in str(error)
    else:
        assert dirs is None or dirs.config_dir.is_absolute()
        assert driver is None or isinstance(driver, str)


# --- MessagePack: streams ----------------------------------------------------------------------


@cache
def exported() -> bytes:
    with DomainList(max_domains=8) as doms:
        for name in ("web1", "web2", "web3"):
            doms.define(xml(name, uuid.uuid5(uuid.NAMESPACE_DNS, name), description="d" * 50))
        with doms.get(name="web2") as dom:
            dom.activate(pid=77)
            dom.next_definition = dom.definition.replace(description="next")
            dom.data = {"disks": ["vda", b"\0"], (1, 2): None}
            dom.autostart = True
        stream = io.BytesIO()
        export_domains(doms, stream)
        return stream.getvalue()


def change_stream(dice: random.Random, stream: bytes) -> bytes:
    if dice.random() < 0.3:
        return change_bytes(dice, stream)
    objects = list(msgpack.Unpacker(io.BytesIO(stream), strict_map_key=False))
    for _ in range(dice.choice((1, 1, 2, 3))):
        at = dice.randrange(len(objects))
        how = dice.randrange(8)
        if how == 0:
            objects.insert(at, objects[dice.randrange(len(objects))])
        elif how == 1 and len(objects) > 1:
            del objects[at]
        elif how == 2 and isinstance(objects[at], dict) and objects[at].get("data"):
            objects[at] = {**objects[at], "data": dice.choice(list(DEEP.values()))}
        else:
            objects[at] = change_value(dice, objects[at])
    return b"".join(bytes(msgpack.packb(one)) for one in objects)


def judge_stream(stream: bytes) -> bool:
    whole = {"web1": None, "web2": {"disks": ("vda", b"\0"), (1, 2): None}, "web3": None}
    with DomainList(max_domains=8) as doms:
        report = None
        try:
            report = import_domains(doms, io.BytesIO(stream))
        except DefinitionError as error:
            assert len(str(error)) <= LONGEST_ERROR
        except SegmentError as error:
            raise AssertionError("a stream does not damage a segment") from error
        found = doms.snapshot()
        assert doms.check().problems == []
        for info in found:
            assert info.definition.name == info.name and info.definition.uuid == info.uuid
            assert info.next_definition is None or info.next_definition.name == info.name
            if stream == exported():
                assert info.data == whole[info.name]
            assert isinstance(encode_data(info.data), bytes)
        if report is not None:
            assert {info.name for info in found} == set(report.imported)  # none is half there
            assert all(reason for _, reason in report.failures)
        return report is not None


def judge_streams(first: int, count: int) -> int:
    assert judge_stream(exported())
    accepted = 0
    for seed in range(first, first + count):
        dice = random.Random(seed)
        stream = change_stream(dice, exported())
        room = 128 * MIB + 16 * len(stream)  # a list's mapping, which costs no memory, is in it
        try:
            accepted += limited(room + LIST, lambda stream=stream: judge_stream(stream))
        except BaseException as exc:
            raise AssertionError(f"seed {seed}: {type(exc).__name__}: {exc}") from exc
    return accepted


LIST = 1 << 28


@pytest.mark.soak
def test_mutated_streams(reader: Party, tried: Callable[[str, int], None]) -> None:
    step, count = 200, 40_000 if SOAK else 600
    accepted = sum(
        reader.tell(f"fuzz.judge_streams({first}, {step})") for first in range(0, count, step)
    )
    assert count / 100 < accepted < count
    tried("mutated export streams, refused or imported", count)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("uuid", b"short"), ("state", 99), ("state", -1), ("reason", -1), ("reason", 1 << 16),
        ("pid", 0), ("pid", -5), ("pid", 1 << 31), ("data", 5), ("name", None), ("active", 2),
    ],
)  # fmt: skip
def test_values_that_no_export_has(field: str, value: Any) -> None:
    header, entry, *_, count = msgpack.Unpacker(io.BytesIO(exported()), strict_map_key=False)
    entry[field] = value
    stream = io.BytesIO(b"".join(msgpack.packb(one) for one in (header, entry, 1)))
    with (
        DomainList(max_domains=4) as doms,
        pytest.raises(DefinitionError, match=rf"the export is damaged: .*{field}"),
    ):
        import_domains(doms, stream)
    assert count == 3


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81\x80\xc0", b"\x91", b"\xa1\xff", b"\x01\x02"])
def test_damaged_data_is_one_domains_failure(data: bytes) -> None:
    header, *entries, count = msgpack.Unpacker(io.BytesIO(exported()), strict_map_key=False)
    entries[1]["data"] = data
    stream = io.BytesIO(b"".join(msgpack.packb(one) for one in (header, *entries, count)))
    with DomainList(max_domains=4) as doms:
        report = import_domains(doms, stream)
        assert report.imported == ["web1", "web3"]
        [(name, reason)] = report.failures
        assert name == "web2" and "the data of domain 'web2' is damaged" in reason
        assert sorted(info.name for info in doms) == ["web1", "web3"]


def test_what_can_not_be_imported_whole_is_not_there() -> None:
    """A heap that has room for the definition and none for the data."""
    header, entry, *_ = msgpack.Unpacker(io.BytesIO(exported()), strict_map_key=False)
    entry["data"] = msgpack.packb(b"x" * (4 * MIB))
    stream = b"".join(msgpack.packb(one) for one in (header, entry, 1))
    with DomainList(max_domains=4, max_bytes=3 * MIB) as doms:
        for _ in range(2):
            report = import_domains(doms, io.BytesIO(stream))
            assert report.imported == [] and [name for name, _ in report.failures] == ["web1"]
            assert len(doms) == 0 and doms.check().problems == []
        assert len(import_domains(doms, io.BytesIO(exported())).imported) == 3
        # Of one that was there before, nothing changes.
        before = doms.peek(name="web1")
        assert len(import_domains(doms, io.BytesIO(stream)).failures) == 1
        after = doms.peek(name="web1")
        assert before is not None and after is not None
        assert (after.data, after.definition) == (before.data, before.definition)
