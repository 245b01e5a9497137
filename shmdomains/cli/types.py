"""The arguments of the commands: a list, a domain, seconds, bytes; and their shell completion.

A domain is named as in virsh (virshLookupDomainInternal): a number is tried as an id, 36 characters
as a UUID, then anything as a name. Completion is click's. It takes no lock and never waits long; on
an error it offers nothing instead of printing into the command line.
"""

from __future__ import annotations

import errno
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from .. import opening
from ..errors import DefinitionError, DomainNotFound, ShmDomainsError
from ..memory import segment_file
from ..names import parse_number, parse_uuid
from ..rules.info import DomainInfo
from ..states import DomainState
from .tables import Failure, UsageFailure

if TYPE_CHECKING:
    from ..opening import AnyDomainList

SEGMENT_VARIABLE = "SHMDOMAINS_SEGMENT"
COMPLETE_VARIABLE = "_SHMDOMAINS_COMPLETE"

_MAX_ID = 2**31 - 1
_UUID_LENGTH = 36
_COMPLETION_TIMEOUT = 2.0


# --- list and domain ------------------------------------------------------------------------

_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]*://|(shm|postgres(ql)?([+]embedded)?):")


class Target(NamedTuple):
    """A command's list, by its URL."""

    url: str
    shown: str
    """As it was given, without a password."""
    in_shared_memory: bool
    driver: str | None = None
    """The driver that runs its domains (`driving`)."""

    @classmethod
    def of(cls, text: str) -> Target:
        """Of a URL, or of a segment: its name, or its file if there is a ``/`` in it.

        >>> Target.of("default").url, Target.of("shm:default").url
        ('shm:default', 'shm:default')
        """
        url = text if _URL.match(text) else f"{opening.SHARED_MEMORY}:{text}"
        with plainly():
            in_shared_memory = opening.is_shared_memory(url)
        return cls(url, text if in_shared_memory else opening.shown(url), in_shared_memory)

    @property
    def what(self) -> str:
        """What messages call it."""
        return f"{'segment' if self.in_shared_memory else 'list'} '{self.shown}'"

    def attach(self, **options: Any) -> AnyDomainList:
        with plainly():
            return opening.attach(self.url, **options)

    def remembered_driver(self) -> str | None:
        """The driver that the list remembers; ``None`` also if it cannot be asked, which the
        command itself will say."""
        try:
            with opening.attach(self.url) as doms:
                return doms.driver
        except (ShmDomainsError, OSError, ImportError, ValueError):
            return None

    def open(self, **options: Any) -> AnyDomainList:
        with plainly():
            return opening.open(self.url, **self._given(options))

    def create(self, **options: Any) -> AnyDomainList:
        with plainly():
            return opening.create(self.url, **self._given(options))

    def unlink(self, force: bool) -> None:
        with plainly():
            opening.unlink(self.url, force)

    def _given(self, options: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in options.items() if value is not None}
        if given and not self.in_shared_memory:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageFailure(f"{flags}: only for a segment in shared memory, not for {self.what}")
        return given


@contextmanager
def plainly() -> Iterator[None]:
    """What a user can cause with a URL, and an extra that is not installed: a line each."""
    try:
        yield
    except ImportError as exc:
        raise Failure(str(exc), exc) from None
    except ValueError as exc:
        if isinstance(exc, ShmDomainsError):
            raise
        raise click.UsageError(str(exc)) from None


def find_domain(doms: AnyDomainList, key: str, not_by: str | None = None) -> DomainInfo:
    """Return the domain that `key` names; takes no lock. Raises `DomainNotFound`, `Busy`.

    `not_by`: ``id``, ``uuid`` or ``name``, if the key is none of that kind.
    """
    for kind, look in (("id", _by_id), ("uuid", _by_uuid), ("name", _by_name)):
        if kind != not_by and (info := look(doms, key)) is not None:
            return info
    raise DomainNotFound(f"failed to get domain '{key}'")


@contextmanager
def found_domain(
    target: Target, key: str, not_by: str | None = None
) -> Iterator[tuple[AnyDomainList, DomainInfo]]:
    """The domain that `key` names. If it is removed during the block, the error names `key` too."""
    with target.attach() as doms:
        info = find_domain(doms, key, not_by)
        try:
            yield doms, info
        except DomainNotFound:
            raise DomainNotFound(f"failed to get domain '{key}': it was removed just now") from None


def _by_id(doms: AnyDomainList, key: str) -> DomainInfo | None:
    id = parse_number(key, _MAX_ID)
    return None if id is None else doms.peek(id=id, definitions=True)


def _by_name(doms: AnyDomainList, key: str) -> DomainInfo | None:
    return doms.peek(name=key, definitions=True)


def _by_uuid(doms: AnyDomainList, key: str) -> DomainInfo | None:
    if len(os.fsencode(key)) != _UUID_LENGTH:
        return None
    try:
        uuid = parse_uuid(key)
    except DefinitionError:
        return None
    return doms.peek(uuid=uuid, definitions=True)


# --- seconds and bytes ----------------------------------------------------------------------


def seconds(value: str | float) -> float | None:
    """Read seconds to wait, perhaps a fraction; 0 tries once, ``inf`` (here ``None``) is for ever.

    >>> seconds("2.5"), seconds("inf")
    (2.5, None)
    """
    try:
        number = float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no number of seconds.") from None
    if not number >= 0:
        raise click.BadParameter(f"{value!r} is not 0 or more seconds.")
    return None if math.isinf(number) else number


_SIZE = re.compile(r"([0-9]{1,20}) ?(?:([kmgt])(i?b)?|b|bytes)?", re.IGNORECASE)


def size(value: str) -> int:
    """Read bytes, or a number with a unit as libvirt does: K and KiB are 1024, KB is 1000.

    >>> size("64M"), size("1 kB")
    (67108864, 1000)
    """
    match = _SIZE.fullmatch(value)
    if match is None:
        raise click.BadParameter(f"{value!r} is no size: bytes, or a number with K, M, G or T.")
    number, unit, rest = match.groups()
    base = 1000 if (rest or "").lower() == "b" else 1024
    return int(number) * int(base ** (" kmgt".index(unit.lower()) if unit else 0))


def file_mode(value: str) -> int:
    """Read permissions as `chmod` has them.

    >>> oct(file_mode("660"))
    '0o660'
    """
    if not re.fullmatch("[0-7]{3,4}", value):
        raise click.BadParameter(f"{value!r} is no mode: 600, or 660 for a group.")
    return int(value, 8)


def state(value: str) -> DomainState:
    """Read a domain's state, in libvirt's words or as `list` has it.

    >>> state("shut off") is state("shutoff")
    True
    """
    try:
        return DomainState.parse(value)
    except ValueError as exc:
        raise click.BadParameter(f"{exc}.") from None


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
        target = Target.of(ctx.find_root().params.get("segment") or segment_file.DEFAULT_NAME)
        if opening.scheme_of(target.url).endswith("+embedded"):
            return []  # it might start a server
        with target.attach(timeout=_COMPLETION_TIMEOUT) as doms:
            names = {info.name for info in doms.list(definitions=False)}
    except Exception:  # as above
        return []
    return _items(names, incomplete)


def complete_state(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    return _items({one.words for one in DomainState}, incomplete)


def _items(names: set[str], incomplete: str) -> list[CompletionItem[str]]:
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


class _QuotingBash(BashComplete):
    """click's bash completion, for names with blanks and other characters that bash reads."""

    _special = re.compile(r"""([\s!"#$&'()*;<=>?\[\\\]^`{|}~])""")

    def format_completion(self, item: CompletionItem[str]) -> str:
        if item.type != "plain" or self._inside_quotes():
            return super().format_completion(item)
        # The script reads each line with `read`, which removes one level of backslashes.
        quoted = self._special.sub(r"\\\\\1", item.value)
        return f"{item.type},{quoted}"

    @staticmethod
    def _inside_quotes() -> bool:
        words = os.environ.get("COMP_WORDS", "").split("\n")
        return words[-1].startswith(("'", '"'))


add_completion_class(_QuotingBash)


# --- options that several commands have -------------------------------------------------------

Command = TypeVar("Command", bound=Callable[..., Any])

format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="How to print it.",
)
timeout_option = click.option(
    "--timeout",
    type=seconds,
    default=10.0,
    show_default=True,
    help="How long to wait for locks; 0 tries once, inf waits for ever.",
)


def segment_argument(command: Command) -> Command:
    """The segment's name, or a list's URL, which may stand behind the command, too."""

    def take(ctx: click.Context, _param: click.Parameter, name: str | None) -> None:
        if name is None:
            return
        if ctx.find_root().get_parameter_source("segment") is ParameterSource.COMMANDLINE:
            raise click.UsageError("The segment is named twice.")
        ctx.obj = Target.of(name)._replace(driver=ctx.obj.driver)

    return click.argument(
        "name", required=False, expose_value=False, callback=take, shell_complete=complete_segment
    )(command)


def domain_argument(command: Command) -> Command:
    return click.argument("domain", shell_complete=complete_domain)(command)


def limit_options(command: Command) -> Command:
    room = click.option(
        "--max-domains", type=click.IntRange(min=1), help="Room for domains, in a new segment."
    )
    memory = click.option(
        "--max-bytes", type=size, help="Limit of memory, in a new segment: 500M, 4G."
    )
    return room(memory(command))


def flag(name: str, help: str) -> Callable[[Command], Command]:
    return click.option(f"--{name}", is_flag=True, help=help)


# --- files ------------------------------------------------------------------------------------


@contextmanager
def to_read(file: str) -> Iterator[BinaryIO]:
    """Open a file that a user named; ``-`` is standard input."""
    if file != "-":
        with open(file, "rb") as stream:
            yield stream
        return
    if sys.stdin is None:
        raise OSError(errno.EBADF, "it is closed")
    yield sys.stdin.buffer


def source_text(file: str) -> str:
    """Return a user's FILE argument as messages show it.

    >>> source_text("web1.xml"), source_text("-")
    ('web1.xml', 'standard input')
    """
    return "standard input" if file == "-" else file
