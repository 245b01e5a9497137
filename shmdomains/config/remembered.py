"""What a list remembers of the files that it loaded, so that it does not load them again.

Loading a file again changes nothing if the file is as it was and its domain is as it was. For each
file of a config directory ``.loaded`` in it says what the file's stat was, which domain the list
made of it, and the receipt of that domain's record after the load's commit. A receipt differs from
every other one of its list: any commit since, a removal or a rename makes it old. So whatever
process changed file or domain, that file is loaded as if nothing were remembered.

Promises. A stat is remembered only if the file's last change is older than the load, by the clock
of its filesystem: a change in the same tick as another one leaves no trace. A new segment has
another identity, and a parser that was replaced another stamp: then nothing is remembered. The file
is replaced by a rename, so a load that is killed leaves the old one, which is as right as before.
Whatever is wrong with it, or a directory that nobody may write, costs time and nothing else.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..files import discard, temporary_name
from ..packing import pack
from ..xml import definition, devices, document
from .change import ConfigDirs
from .parse import Stamp, stamp_of

logger = logging.getLogger(__package__)

NAME = ".loaded"
WORTH = 64
"""Files; fewer are parsed before anybody notices, and their directory stays as it is."""

_MOST_BYTES = 256 << 20  # two million files

Receipt = tuple[int, int]


class Records(NamedTuple):
    """A list whose records tell whether they were changed."""

    identity: bytes
    """Random: no other list ever has it."""
    receipt: Callable[[bytes], Receipt | None]
    """Of the domain that has this uuid now: another one after each commit. Takes no lock."""


class Known(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """The domain that a file made, as the load left it."""

    name: str
    uuid: bytes
    receipt: Receipt
    autostart: bool


class _Content(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    parser: list[tuple[int, int]]
    identity: bytes
    files: dict[str, tuple[Stamp, Known]]


_DECODER = msgspec.msgpack.Decoder(_Content)


class Remembered:
    """The memory of one load: what stood there before, and what is to stand there afterwards."""

    def __init__(self, dirs: ConfigDirs, records: Records, count: int) -> None:
        self._dirs = dirs
        self._records = records
        self._path = dirs.config_dir / NAME
        self._parser = _parser() if count >= WORTH else []
        self._before = self._read() if self._parser else {}
        self._after: dict[str, tuple[Stamp, Known]] = {}
        self._made: Path | None = None
        self._began = 0

    def unchanged(self, paths: Iterable[str]) -> dict[str, Known]:
        """The files that a load would change nothing for.

        No lock is held: if a domain has its receipt now, it had it when its file was looked at.
        """
        if not self._before:
            return {}
        found: dict[str, Known] = {}
        before, receipt = self._before, self._records.receipt
        links, has_links = self._dirs.links(), self._dirs.autostart_dir is not None
        start = len(os.path.join(self._dirs.config_dir, ""))
        for path in paths:
            name = path[start:]
            entry = before.get(name)
            if entry is None:
                continue
            try:
                stamp = stamp_of(os.stat(path))
            except OSError:
                continue
            known = entry[1]
            if stamp != entry[0] or known.receipt != receipt(known.uuid):
                continue
            if has_links:
                autostart = name in links and self._dirs.points_to(Path(path))
                if autostart != known.autostart:
                    continue
            found[path] = known
            self._after[name] = entry
        return found

    def begin(self) -> None:
        """From now on files are read: what changes later is not remembered."""
        if not self._parser:
            return
        with suppress(OSError):
            path = temporary_name(self._dirs.config_dir)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._made = path
            try:
                self._began = os.fstat(fd).st_mtime_ns
            finally:
                os.close(fd)

    def loaded(self, path: str, stamp: Stamp, name: str, uuid: bytes, autostart: bool) -> None:
        """A file was loaded and committed, and its domain is still locked."""
        receipt, file_name = self._records.receipt(uuid), os.path.basename(path)
        if receipt is None or max(stamp[3:]) >= self._began:
            return
        with suppress(UnicodeEncodeError):  # a name that is no UTF-8 is parsed each time
            file_name.encode()
            self._after[file_name] = stamp, Known(name, uuid, receipt, autostart)

    def end(self) -> None:
        """Write what is to be remembered, if that is something else than before."""
        made, self._made = self._made, None
        if made is None:
            return
        try:
            if self._after != self._before:
                content = _Content(self._parser, self._records.identity, self._after)
                made.write_bytes(pack(content))
                os.rename(made, self._path)
        except OSError as exc:
            logger.debug("%s: not remembered what was loaded: %s", self._path, exc)
        finally:
            discard(made)

    def _read(self) -> dict[str, tuple[Stamp, Known]]:
        try:
            content = _DECODER.decode(_bytes_of(self._path))
        except (OSError, ValueError, msgspec.MsgspecError):
            return {}
        if content.parser != self._parser or content.identity != self._records.identity:
            return {}
        return content.files


def _bytes_of(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            return b""
        return file.read()


def _parser() -> list[tuple[int, int]]:
    """What tells one version of the parser from another; empty if nothing does."""
    try:
        found = [os.stat(module.__file__ or "") for module in (definition, devices, document)]
    except OSError:
        return []
    return [(status.st_size, status.st_mtime_ns) for status in found]
