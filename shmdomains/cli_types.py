"""What the commands are given: a segment, a domain, seconds, bytes; and how a shell completes them.

A domain is named as in virsh (virshLookupDomainInternal): a number is tried as an id, 36 characters
as a UUID, then anything as a name. Completion is click's; it takes no lock, never waits long and,
whatever goes wrong, offers nothing instead of printing an error into the command line.
"""

from __future__ import annotations

import math
import os
import re
import time
from typing import Any, NamedTuple

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from . import segment_file
from .domain_list import DomainInfo, DomainList, unlink
from .errors import DefinitionError, DomainNotFound
from .names import parse_uuid

SEGMENT_VARIABLE = "SHMDOMAINS_SEGMENT"
COMPLETE_VARIABLE = "_SHMDOMAINS_COMPLETE"

_NUMBER = re.compile(r"[ \t\n\v\f\r]*\+?([0-9]+)")
_MAX_ID = 2**31 - 1
_UUID_LENGTH = 36


# --- segment and domain ---------------------------------------------------------------------


class Target(NamedTuple):
    """The segment that a command is about: one of a name, or a file if there is a ``/`` in it."""

    text: str

    @property
    def _where(self) -> dict[str, Any]:
        return {"path": self.text} if "/" in self.text else {"name": self.text}

    def attach(self) -> DomainList:
        return DomainList.attach(**self._where)

    def open(self, **create: Any) -> DomainList:
        return DomainList.open(**self._where, **create)

    def unlink(self, force: bool) -> None:
        unlink(**self._where, force=force)


def find_domain(doms: DomainList, key: str) -> DomainInfo:
    """Return the domain that `key` names; takes no lock. Raises `DomainNotFound`, `Busy`."""
    info = _by_id(doms, key) or _by_uuid(doms, key) or doms.peek(name=key)
    if info is None:
        raise DomainNotFound(f"failed to get domain '{key}'")
    return info


def _by_id(doms: DomainList, key: str) -> DomainInfo | None:
    match = _NUMBER.fullmatch(key)
    # Twenty digits are more than an id has, and int() refuses thousands of them.
    if match is None or len(match[1]) > 20 or int(match[1]) > _MAX_ID:
        return None
    return doms.peek(id=int(match[1]))


def _by_uuid(doms: DomainList, key: str) -> DomainInfo | None:
    if len(os.fsencode(key)) != _UUID_LENGTH:
        return None
    try:
        uuid = parse_uuid(key)
    except DefinitionError:
        return None
    return doms.peek(uuid=uuid)


# --- seconds and bytes ----------------------------------------------------------------------


class Seconds(click.ParamType):
    """Seconds to wait, a fraction too; 0 tries once, ``inf`` (here ``None``) waits for ever."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | None:
        try:
            seconds = float(value)
        except ValueError:
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        if not seconds >= 0:
            self.fail(f"{value!r} is not 0 or more seconds", param, ctx)
        return None if math.isinf(seconds) else seconds


class Deadline:
    """One time-out over several waits."""

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout

    def left(self) -> float | None:
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)


class Bytes(click.ParamType):
    """A size in bytes, or with a unit as libvirt reads it: K and KiB are 1024, KB is 1000."""

    name = "bytes"
    _pattern = re.compile(r"([0-9]{1,20}) ?(?:([kmgt])(i?b)?|b|bytes)?", re.IGNORECASE)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        match = self._pattern.fullmatch(value)
        if match is None:
            self.fail(f"{value!r} is no size: bytes, or a number with K, M, G or T", param, ctx)
        number, unit, rest = match.groups()
        base = 1000 if (rest or "").lower() == "b" else 1024
        return int(number) * base ** (" kmgt".index(unit.lower()) if unit else 0)


# --- completion -----------------------------------------------------------------------------


def complete_segment(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    try:
        names = {found.name for found in segment_file.segments()}
    except Exception:  # an error message would land in the middle of the command line
        return []
    return _items(names, incomplete)


def complete_domain(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    try:
        target = Target(ctx.find_root().params.get("segment") or segment_file.DEFAULT_NAME)
        with target.attach() as doms:
            names = {info.name for info in doms.list(definitions=False)}
    except Exception:  # as above
        return []
    return _items(names, incomplete)


def _items(names: set[str], incomplete: str) -> list[CompletionItem[str]]:
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


class _QuotingBash(BashComplete):
    """click's bash completion, for names with blanks and other characters that bash reads."""

    _special = re.compile(r"""([\s!"#$&'()*;<=>?\[\\\]^`{|}~])""")

    def format_completion(self, item: CompletionItem[str]) -> str:
        if item.type != "plain" or self._inside_quotes():
            return super().format_completion(item)
        # The script reads each line with `read`, which takes one level of backslashes away.
        return f"{item.type},{self._special.sub(r'\\\\\1', item.value)}"

    @staticmethod
    def _inside_quotes() -> bool:
        words = os.environ.get("COMP_WORDS", "").split("\n")
        return words[-1].startswith(("'", '"'))


add_completion_class(_QuotingBash)
