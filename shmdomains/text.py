"""Text for people: how errors, logs and reports show text from outside.

Promises. The result is short; a path or a quoted text cannot break a line or control a terminal.
"""

from __future__ import annotations

import os
from pathlib import Path


def shortened(text: str, most: int = 80) -> str:
    """The beginning of a text, for an error: refused text may be megabytes long.

    >>> shortened("a long text", 6)
    'a long...'
    """
    return text if len(text) <= most else text[:most] + "..."


def shown(text: str) -> str:
    """`shortened`, in quotes and on one line."""
    return repr(shortened(text))


def counted(number: int, noun: str) -> str:
    """
    >>> counted(1, "file"), counted(2, "file")
    ('1 file', '2 files')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(text: str) -> str:
    """Text from outside, with whatever could break a line or control a terminal as escapes.

    >>> print(one_line("Café\\n"))
    Café\\n
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown_path(path: str | Path) -> str:
    """A path on one line; a file name may hold any byte but ``/`` and NUL.

    >>> print(shown_path("web\\n1.xml"))
    web\\n1.xml
    """
    return one_line(os.fsencode(path).decode("utf-8", "backslashreplace"))
