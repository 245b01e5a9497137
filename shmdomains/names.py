"""Rules for names, UUIDs and numbers.

The rules are libvirt's (observed on 9.0.0). They stand in one place, so a definition, a rename and
a lookup cannot disagree. In addition a name must fit into the file name ``NAME.xml``, so it is at
most 251 bytes long and is not ``.`` or ``..``.
"""

from __future__ import annotations

import re
from uuid import UUID

import msgspec

from .errors import DefinitionError, InvalidName
from .text import shortened, shown

Uuid = str | bytes | UUID
"""What callers may pass as a UUID; see `parse_uuid`."""

SUFFIX = ".xml"
"""The end of a config file's name, NAME.xml."""

MAX_NAME_BYTES = 251
"""255, the longest file name, less four for ``.xml``."""

# What XML 1.0 cannot carry, not even escaped; lone surrogates have no UTF-8 form either.
_NO_XML = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

# virUUIDParse: blanks around it; before each pair of digits any number of '-' and ' '. The blanks
# are stripped first: a pattern that matches them in two places takes quadratic time.
_BLANKS = " \t\n\v\f\r"
_UUID = re.compile(r"(?:[- ]*[0-9a-fA-F]{2}){16}")

# As strtoull: blanks before the number, none after it.
_NUMBER = re.compile(r"[ \t\n\v\f\r]*\+?([0-9]+)")


def check_text(what: str, text: str) -> str:
    """Return `text` if XML can carry it; `what` names it in the error.

    Raises `DefinitionError` for control characters and lone surrogates.

    >>> check_text("title", "Grüße")
    'Grüße'
    """
    bad = _NO_XML.search(text)
    if bad:
        raise DefinitionError(f"{what} contains {bad.group()!r}, which XML cannot carry", what)
    return text


def check_name(name: str) -> str:
    """Return `name` if a domain may have it: 1 to 251 bytes of UTF-8, a file name, one line.

    Blanks at either end are part of the name. Raises `InvalidName`, in libvirt's words where the
    rule is libvirt's (``virDomainDefParseIDs``, ``virDomainDefPostParseCheckFeatures``).

    >>> check_name("web 1")
    'web 1'
    >>> check_name("foo/bar")
    Traceback (most recent call last):
    ...
    shmdomains.errors.InvalidName: name foo/bar cannot contain '/'
    """
    if not isinstance(name, str):
        raise InvalidName(f"a name must be a str, not {type(name).__name__}", "name")
    if not name:
        raise InvalidName("missing name information", "name")
    if "\n" in name:
        raise InvalidName(f"invalid char in name: {shown(name)} contains a newline", "name")
    if "/" in name:
        raise InvalidName(f"name {shortened(name)} cannot contain '/'", "name")
    if name in (".", ".."):
        raise InvalidName(f"name {name} cannot be a file name", "name")
    bad = _NO_XML.search(name)
    if bad:
        raise InvalidName(f"invalid char in name: {bad.group()!r}", "name")
    size = len(name.encode())
    if size > MAX_NAME_BYTES:
        raise InvalidName(
            f"name {name[:20]}... has {size} bytes, more than the {MAX_NAME_BYTES} "
            "that leave room for .xml in a file name",
            "name",
        )
    return name


MAX_LOCK_NAME_BYTES = 63


def check_lock_name(name: str) -> str:
    """Return `name` if a named lock may have it: 1 to 63 bytes of UTF-8.

    >>> check_lock_name("")
    Traceback (most recent call last):
    ...
    ValueError: the name of a lock is 1 to 63 bytes of UTF-8, not 0
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a lock is a str, not {type(name).__name__}")
    size = len(name.encode())
    if not 1 <= size <= MAX_LOCK_NAME_BYTES:
        raise ValueError(
            f"the name of a lock is 1 to {MAX_LOCK_NAME_BYTES} bytes of UTF-8, not {size}"
        )
    return name


def parse_uuid(value: str | bytes | UUID) -> UUID:
    """Return `value` as a UUID: a `uuid.UUID`, text as libvirt reads it, or 16 raw bytes.

    Text is 32 hex digits of either case; ``-`` and spaces may stand before each pair, white space
    at both ends (``virUUIDParse``). Raises `DefinitionError` for everything else, including braces
    and ``urn:uuid:``, which libvirt refuses too.

    >>> parse_uuid(" C7A5FDBD edaf-9455-926a-d65c16db1809 ")
    UUID('c7a5fdbd-edaf-9455-926a-d65c16db1809')
    >>> parse_uuid("{c7a5fdbd-edaf-9455-926a-d65c16db1809}")
    Traceback (most recent call last):
    ...
    shmdomains.errors.DefinitionError: malformed uuid '{c7a5fdbd-edaf-9455-926a-d65c16db1809}'
    """
    if isinstance(value, UUID):
        return value
    if isinstance(value, str):
        digits = value.strip(_BLANKS)
        try:
            # Reads the two usual forms in a fifth of the time.
            return msgspec.convert(digits, UUID)
        except (msgspec.ValidationError, UnicodeError):
            if _UUID.fullmatch(digits):
                return UUID(hex=digits.replace(" ", ""))
        raise DefinitionError(f"malformed uuid {shown(value)}", "uuid")
    if isinstance(value, (bytes, bytearray, memoryview)):
        if len(value) == 16:
            return UUID(bytes=bytes(value))
        raise DefinitionError(f"malformed uuid: {len(value)} bytes instead of 16", "uuid")
    raise DefinitionError(
        f"malformed uuid: a uuid.UUID, str or 16 bytes, not {type(value).__name__}", "uuid"
    )


def parse_number(text: str, most: int) -> int | None:
    """Return `text` as a number from 0 to `most`, or ``None`` if it is not one.

    >>> parse_number(" +7", 10), parse_number("11", 10), parse_number("-1", 10)
    (7, None, None)
    """
    match = _NUMBER.fullmatch(text)
    # No number here has so many digits, and int() refuses thousands of them.
    if match is None or len(match[1]) > 25:
        return None
    number = int(match[1])
    return number if number <= most else None
