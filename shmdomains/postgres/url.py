"""Where a list on PostgreSQL is: the URL that a user gives, taken apart.

``postgresql://user@host/database?list=default`` is libpq's URL with three words more: `list`, the
name of the list; `lease`, in seconds; `read=standby`. ``postgresql+embedded:///path`` is a server
of its own, with its data in that folder. Everything else goes to libpq as it is.

A password is never shown: `Address.shown` is for messages.
"""

from __future__ import annotations

import os
import re
import socket
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from ..text import shown, shown_path

SCHEMES = ("postgresql", "postgres", "postgresql+embedded")
DEFAULT_LIST = "default"
DEFAULT_LEASE = 10.0
_MAX_NAME = 251

_FORM = "postgresql://user@host/database?list=NAME, or postgresql+embedded:///path?list=NAME"


class Address(NamedTuple):
    """A list, and how to reach it."""

    url: str
    """As it was given, for other processes."""
    conninfo: str
    """For libpq; empty for an embedded server, which says it when it runs."""
    embedded: str | None
    """The folder of an embedded server's data."""
    list: str
    lease: float
    """Seconds after which a host that is stopped or cut off has lost its locks."""
    read: str
    """Where reads without a lock go: ``"primary"`` or ``"standby"``."""
    shown: str
    """For people; without a password."""

    def __repr__(self) -> str:
        return f"Address({self.shown!r})"


def parse(url: str, lease: float | None = None, read: str | None = None) -> Address:
    """Take a URL apart; `lease` and `read` stand before what it says.

    Raises `ValueError` for what is no such URL.

    >>> parse("postgresql://anna:secret@db1/vms?list=blue&sslmode=verify-full").shown
    'postgresql://anna@db1/vms?list=blue'
    >>> parse("postgresql+embedded:///var/lib/vms").embedded
    '/var/lib/vms'
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"not the URL of a list on PostgreSQL; it looks like {_FORM}")
    _check_place(parts.netloc, parts.path)
    words = parse_qsl(parts.query, keep_blank_values=True)
    ours = {key: value for key, value in words if key in ("list", "lease", "read")}
    theirs = [(key, value) for key, value in words if key not in ours]
    name = checked_name(ours.get("list", DEFAULT_LIST))
    embedded = conninfo = None
    if parts.scheme == "postgresql+embedded":
        embedded = unquote(parts.path)
        if parts.netloc or not embedded.startswith("/") or theirs:
            raise ValueError(f"an embedded server is named by its folder alone: {_FORM}")
    else:
        query = urlencode(theirs, quote_via=quote)
        conninfo = f"postgresql://{parts.netloc}{parts.path}" + (f"?{query}" if query else "")
    return Address(
        url=url,
        conninfo=conninfo or "",
        embedded=embedded,
        list=name,
        lease=_checked_lease(ours.get("lease", DEFAULT_LEASE) if lease is None else lease),
        read=_checked_read(ours.get("read", "primary") if read is None else read),
        shown=_shown(parts.scheme, parts.netloc, parts.path, dict(theirs), name),
    )


def _check_place(netloc: str, path: str) -> None:
    """Refuse what libpq would take apart in another place: it would then quote a piece of the
    password in its message.

    >>> _check_place("anna:p@ss@db1", "/vms")
    Traceback (most recent call last):
    ...
    ValueError: a URL has a user, a password or a place that cannot be read: ...
    """
    hosts = netloc.rpartition("@")[2].split(",")
    if (
        netloc.count("@") > 1
        or "@" in path
        or re.search("%(?![0-9A-Fa-f]{2})|%00", netloc + path)
        or not all(re.fullmatch(r"(\[[^]]*\]|[^]:[]*)(:[0-9]*)?", host) for host in hosts)
    ):
        raise ValueError(
            "a URL has a user, a password or a place that cannot be read: in those @ : / ? # and % "
            f"are written %40 %3A %2F %3F %23 and %25; it looks like {_FORM}"
        )


def _shown(scheme: str, netloc: str, path: str, words: dict[str, str], name: str) -> str:
    user, at, host = netloc.rpartition("@")
    kept = [(key, words[key]) for key in ("host", "port", "dbname") if key in words]
    query = urlencode([*kept, ("list", name)], safe="/")
    return shown_path(f"{scheme}://{user.partition(':')[0]}{at}{host}{path}?{query}")


def checked_name(name: str) -> str:
    """A list's name. Raises `ValueError`."""
    if not 0 < len(name.encode()) <= _MAX_NAME or not name.isprintable():
        raise ValueError(f"a list's name has 1 to {_MAX_NAME} printable bytes, not {shown(name)}")
    return name


def _checked_lease(lease: str | float) -> float:
    try:
        seconds = float(lease)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:
        raise ValueError(f"a lease has 1 to 3600 seconds, not {lease!r}")
    return seconds


def _checked_read(read: str) -> str:
    if read not in ("primary", "standby"):
        raise ValueError(f"read is 'primary' or 'standby', not {read!r}")
    return read


def without_password(text: str) -> str:
    """A message of libpq's, with what looks like a password in it left out.

    >>> without_password("password=secret host=db1")
    'password=... host=db1'
    """
    text = re.sub(r"(?i)(password|passfile)\s*=\s*('[^']*'|\S+)", r"\1=...", text)
    return re.sub(r"(//[^:/@\s]*):[^@\s]*@", r"\1:...@", text).strip()


def this_host(host: str | None) -> str:
    """The name of this host: as given, else ``$SHMDOMAINS_HOST``, else the machine's own.

    >>> this_host("node7")
    'node7'
    """
    name = host or os.environ.get("SHMDOMAINS_HOST") or socket.gethostname()
    if not 0 < len(name.encode()) <= 253 or not name.isprintable():
        raise ValueError(f"a host's name has 1 to 253 printable bytes, not {shown(name)}")
    return name
