"""Parsing, editing and writing XML with lxml; nothing here knows libvirt.

Promises. Parsing is safe on hostile text. A document type declaration is refused before lxml sees
it, so no entity is ever expanded, no file opened, no network touched. Size, depth and text are
limited. Every refusal, lxml's own errors included, is a `DefinitionError` that names element and
line. Editing keeps the document's look: inserting or removing an element leaves the indentation of
its neighbours as it was.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ..errors import DefinitionError
from ..lazy import LazyModule
from ..text import shortened

if TYPE_CHECKING:
    from lxml import etree

    Element: TypeAlias = etree._Element
else:
    etree = LazyModule("lxml.etree")
    Element = Any

MAX_BYTES = 16 * 1024 * 1024
"""The largest document, and the largest blob that a record may hold."""

Children: TypeAlias = dict[object, Element]
_T = TypeVar("_T")

_OPTIONS: dict[str, Any] = {
    # The text is UTF-8 by then, whatever its declaration says.
    "encoding": "utf-8",
    "resolve_entities": False,
    "no_network": True,
    "load_dtd": False,
    "huge_tree": False,
    "strip_cdata": False,
    "collect_ids": False,
}
_ENCODING = re.compile(
    rb"(?:\xef\xbb\xbf)?<\?xml\s[^>]*?\bencoding\s*=\s*[\"']([A-Za-z][A-Za-z0-9._-]*)[\"']"
)
_DECLARATION = re.compile(r"\ufeff?(?:<\?xml\s[^>]*\?>\s*)?")
_WIDE = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"<\0\0\0", "utf-32-le"),
    (b"\0\0\0<", "utf-32-be"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"<\0", "utf-16-le"),
    (b"\0<", "utf-16-be"),
)
_WIDE_STARTS = tuple(start for start, _ in _WIDE)
# Python caches every codec name that it was ever asked for.
_LONGEST_CHARSET = 40
# Encodings only Python has; some take quadratic time.
_NO_CHARSETS = ("idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape")
_PROLOG = re.compile(r"\ufeff|\s+|<!--.*?-->|<\?.*?\?>", re.DOTALL)
# The position at the end of lxml's messages; ours say it in their own way.
_POSITION = re.compile(r"(?:, line \d+)?, column \d+$")


def parse(text: str | bytes) -> tuple[Element, str]:
    """Return the root element, and the document's text without its XML declaration.

    Bytes are decoded as their XML declaration says; the declaration of a `str` is ignored. Raises
    `DefinitionError` for XML that is not well-formed, for a document type declaration, and beyond
    the limits (16 MiB; lxml's 256 levels and 10 MB in one text). A `MemoryError` does not mean that
    the document is bad.

    >>> root, text = parse(b"<?xml version='1.0' encoding='latin-1'?><a>\\xe9</a>")
    >>> root.text, text
    ('é', '<a>é</a>')
    """
    known, data = (text, _encoded(text)) if isinstance(text, str) else _decoded(text)
    _refuse_doctype(known)
    parser = _parser()
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        if getattr(error, "code", None) == etree.ErrorTypes.ERR_NO_MEMORY:
            raise MemoryError(f"a document of {len(data)} bytes") from None
        raise _syntax_error(error, data) from None
    if len(data) <= _SMALL:
        _idle.append(parser)
    declaration = _DECLARATION.match(known)
    return root, known[declaration.end() :] if declaration else known


# Making a parser takes a tenth of the time of a usual document, so it is kept for the next one. A
# parser has a lock; one in use is not in the list, so no fork and no finaliser finds it locked. It
# keeps a log and memory as large as its last document needed, so only small ones are kept.
_idle: list[etree.XMLParser] = []
_SMALL = 64 * 1024


def _parser() -> etree.XMLParser:
    try:
        return _idle.pop()
    except IndexError:
        return etree.XMLParser(**_OPTIONS)


def _encoded(text: str) -> bytes:
    _refuse_size(len(text))  # in characters, before any bytes are made
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        message = f"a lone surrogate, which XML cannot carry (line {line})"
        raise DefinitionError(message, line=line) from None
    _refuse_size(len(data))
    return data


def _decoded(data: bytes) -> tuple[str, bytes]:
    """The decoded text, and the text in UTF-8. Python decodes it: if libxml2 did, an encoding could
    hide a document type."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"XML is str or bytes, not {type(data).__name__}")
    _refuse_size(memoryview(data).nbytes)
    data = bytes(data)
    encoding = _encoding(data)
    try:
        if encoding.lower() == "utf-8":
            return data.decode(), data
        if len(encoding) > _LONGEST_CHARSET or codecs.lookup(encoding).name in _NO_CHARSETS:
            raise LookupError
        text = data.decode(encoding)
    except LookupError:
        message = f"unknown encoding {shortened(encoding)!r} (<?xml>, line 1)"
        raise DefinitionError(message, "?xml", 1) from None
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        before = data[:start].decode(encoding, "ignore")
        _refuse_doctype(before)
        element, line = _innermost_open(before.encode()), before.count("\n") + 1
        where = f"<{element}>, line {line}" if element else f"line {line}"
        raise DefinitionError(f"not {encoding}: {error} ({where})", element, line) from None
    return text, _encoded(text)


def _encoding(data: bytes) -> str:
    if data.startswith(_WIDE_STARTS):
        return next(codec for start, codec in _WIDE if data.startswith(start))
    declared = _ENCODING.match(data)
    return declared.group(1).decode() if declared else "utf-8"


def _refuse_size(size: int) -> None:
    if size > MAX_BYTES:
        raise DefinitionError(f"the document has {size} bytes, more than {MAX_BYTES}")


def _refuse_doctype(text: str) -> None:
    if "<!DOCTYPE" not in text:
        return
    position = 0
    while item := _PROLOG.match(text, position):
        position = item.end()
    if text.startswith("<!DOCTYPE", position):
        line = text.count("\n", 0, position) + 1
        raise DefinitionError(
            f"a document type declaration, and so any entity, is refused (<!DOCTYPE>, line {line})",
            "!DOCTYPE",
            line,
        )


def _syntax_error(error: etree.XMLSyntaxError, data: bytes) -> DefinitionError:
    message = shortened(_POSITION.sub("", error.msg or "not well-formed").strip())
    element = _innermost_open(data)
    where = f"<{element}>, line {error.lineno}" if element else f"line {error.lineno}"
    return DefinitionError(f"{message} ({where})", element, error.lineno)


def syntax_error(data: bytes) -> tuple[str, int, int] | None:
    """What is wrong with a document in UTF-8, the line and the column, both from 1; or ``None``.

    >>> syntax_error(b"<a>\\n  <b</a>")
    ('error parsing attribute name', 2, 5)
    """
    try:
        etree.fromstring(data, etree.XMLParser(**_OPTIONS))
    except etree.XMLSyntaxError as error:
        line, column = error.position
        return _POSITION.sub("", error.msg or "not well-formed").strip(), line, column
    return None


class _OpenElements:
    """A parser target, which lxml calls instead of making a tree: a stack of the open elements."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def start(self, tag: str | bytes, attrib: Any) -> None:
        self.names.append(str(tag))

    def end(self, tag: str | bytes) -> None:
        self.names.pop()

    def data(self, data: str | bytes) -> None:
        pass

    def comment(self, text: str | bytes) -> None:
        pass

    def close(self) -> None:
        pass


def _innermost_open(data: bytes) -> str | None:
    """The element that the parser was in when it gave up."""
    opened = _OpenElements()
    parser = etree.XMLParser(target=opened, **_OPTIONS)
    try:
        parser.feed(data)
        parser.close()
    except etree.XMLSyntaxError:
        pass
    return shortened(opened.names[-1]) if opened.names else None


def serialise(root: Element) -> str:
    """The whole document as text, including comments outside the root."""
    return str(etree.tostring(root.getroottree(), encoding="unicode"))


def located(error: DefinitionError, element: Element) -> DefinitionError:
    """A copy of `error` that names the element and its line."""
    tag = shortened(str(element.tag))
    line: Any = element.sourceline or 1
    return type(error)(f"{error} (<{tag}>, line {line})", tag, line)


def refusal(message: str, element: Element) -> DefinitionError:
    """A `DefinitionError` about this element of a parsed document."""
    return located(DefinitionError(message), element)


def checked(rule: Callable[..., _T], element: Element, *said: str | None) -> _T:
    """Apply `rule` to texts of the element; its error gets the element's name and line."""
    try:
        return rule(*said)
    except DefinitionError as error:
        raise located(error, element) from None


def text_of(element: Element) -> str:
    """XPath's ``string(.)``: all text in the element, without comments.

    >>> text_of(parse("<name>a<!-- x -->b</name>")[0])
    'ab'
    """
    if not len(element):
        return element.text or ""
    return str(element.xpath("string(.)"))


def set_text(element: Element, text: str) -> None:
    """Replace the element's content by `text`."""
    for child in list(element):
        element.remove(child)
    element.text = text


def set_attribute(element: Element, name: str, value: str | None) -> None:
    """Set the attribute, or remove it if `value` is ``None``."""
    if value is not None:
        element.set(name, value)
    elif name in element.attrib:
        del element.attrib[name]


def first_children(element: Element) -> Children:
    """The first child of each tag."""
    found: Children = {}
    for child in element[:]:  # type: ignore[index]  # one call of lxml for all of them
        found.setdefault(child.tag, child)
    return found


def child(parent: Element, tag: str) -> Element | None:
    """The first child with this tag, or ``None``."""
    for found in parent:
        if found.tag == tag:
            return found
    return None


def make_child(parent: Element, tag: str, order: Iterable[str] = ()) -> Element:
    """The first child with this tag, made if there is none.

    `order` lists the tags that a new one comes after; without it, the new one is the last child.
    """
    found = child(parent, tag)
    if found is not None:
        return found
    new = parent.makeelement(tag)
    before = set(order)
    previous = None
    for sibling in parent:
        if not before or sibling.tag in before:
            previous = sibling
    put(parent, new, previous)
    return new


def put(parent: Element, new: Element, previous: Element | None) -> None:
    """Insert `new` into `parent` after `previous` (``None``: first), indented like the rest."""
    if previous is None:
        position, gap = 0, parent.text
    else:
        position = parent.index(previous) + 1
        gap = previous.tail if position < len(parent) else parent.text
    if gap is not None and gap.strip():
        gap = None
    if len(parent) == 0:
        gap = None
    if previous is not None and position == len(parent):
        new.tail, previous.tail = previous.tail, gap
    else:
        new.tail = gap
    parent.insert(position, new)


def drop(element: Element) -> None:
    """Remove the element from its parent; text after it stays, indentation is repaired."""
    parent = element.getparent()
    if parent is None:
        return
    tail, previous = element.tail, element.getprevious()
    last = element.getnext() is None
    if tail and (tail.strip() or last):
        before = (previous.tail if previous is not None else parent.text) or ""
        kept = tail if not before.strip() else before + tail
        if previous is None:
            parent.text = kept if tail.strip() or len(parent) > 1 else None
        else:
            previous.tail = kept
    element.tail = None
    parent.remove(element)


def drop_all(elements: Sequence[Element]) -> None:
    """`drop` several children of one parent, in order. Text between them moves only once: one by
    one, a document full of them would take quadratic time."""
    texts: list[str] = []
    for position, element in enumerate(elements):
        following = elements[position + 1] if position + 1 < len(elements) else None
        if element.tail and element.tail.strip():
            texts.append(element.tail)
            element.tail = None
        if following is None or element.getnext() is not following:
            element.tail = "".join([*texts, element.tail or ""]) or None
            texts.clear()
    for element in elements:
        drop(element)


def drop_every(parent: Element, tag: str) -> None:
    """Remove all children with this tag: only the first is read, and removing it alone would
    uncover a second one."""
    drop_all(list(parent.iterchildren(tag)))


def make(tag: str) -> Element:
    """A new element that is in no document yet."""
    return etree.Element(tag)


def indent(element: Element) -> None:
    """Indent the content of a new element to fit its place."""
    before, parent = element.getprevious(), element.getparent()
    gap = before.tail if before is not None else parent.text if parent is not None else "\n"
    if not gap or "\n" not in gap or not len(element):
        return
    tail = element.tail
    etree.indent(element, space="  ", level=len(gap.rpartition("\n")[2]) // 2)
    element.tail = tail


def canonical(root: Element) -> str:
    """Canonical XML of the element, without indentation; changes `root`."""
    for element in root.iter():
        if len(element) and element.text and not element.text.strip():
            element.text = None
        if element.tail and not element.tail.strip():
            element.tail = None
    try:
        return etree.tostring(root, method="c14n").decode()
    except etree.C14NError:
        # Canonical XML 1.0, all that libxml2 has, refuses a relative namespace name; 2.0 takes it.
        text = etree.tostring(root, encoding="unicode")
        return str(etree.canonicalize(text, with_comments=True))
