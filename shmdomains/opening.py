"""A list of domains by its URL, whatever keeps it: shared memory, or PostgreSQL for several hosts.

What a store needs is imported when a URL names it. `AnyDomainList` is what all lists can do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from .memory.domain_list import DomainList, ListInfo
from .memory.domain_list import unlink as unlink_segment
from .rules.store import ListBase

if TYPE_CHECKING:
    from typing_extensions import Self

    from .config import LoadReport
    from .memory.held import LockInfo, Statistics
    from .memory.invariants import CheckReport, RecoverReport
    from .rules.elect import Election
    from .rules.info import DomainInfo
    from .rules.jobs import DomainJob
    from .rules.watch import Watch
    from .table import Table

SHARED_MEMORY = "shm"
FORMS = (
    "shm:NAME, shm:/path/of/a/segment, postgresql://HOST/DATABASE?list=NAME or "
    "postgresql+embedded:///path?list=NAME"
)


class AnyDomainList(ListBase[Any], Protocol):
    """What every list of domains can do, for type hints. `DomainList` has the arguments and what
    each method promises; a handle is `Any` here, for each store has a class of its own."""

    closed: bool

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[DomainInfo]: ...
    def __contains__(self, key: Any, /) -> bool: ...
    def __getitem__(self, key: Any, /) -> DomainInfo: ...
    def close(self) -> None: ...
    def unlink(self, force: bool = False) -> None: ...

    driver: str | None

    @property
    def created(self) -> bool: ...
    @property
    def info(self) -> ListInfo: ...
    def check(self, timeout: float | None = 10.0) -> CheckReport: ...
    def recover(self, timeout: float | None = 10.0) -> RecoverReport: ...
    def locks(self) -> list[LockInfo]: ...
    @property
    def statistics(self) -> Statistics: ...
    def statistics_of_all(self) -> Statistics: ...
    @property
    def _invariants(self) -> Sequence[str]:
        """The names of what `check` tests."""
        ...

    def lock(self, timeout: float | None = None) -> None: ...
    def unlock(self) -> None: ...
    def acquire(self, block: bool = True, timeout: float | None = None) -> bool: ...
    def release(self) -> None: ...
    def lookup(self, *args: Any, **kwargs: Any) -> Any: ...
    def find_by_name(self, name: str, timeout: float | None = None) -> Any: ...
    def find_by_id(self, id: int, timeout: float | None = None) -> Any: ...
    def lock_many(self, *args: Any, **kwargs: Any) -> Any: ...
    def get_many(self, *args: Any, **kwargs: Any) -> Any: ...
    def add(self, *args: Any, **kwargs: Any) -> int: ...
    def elect(self, *args: Any, **kwargs: Any) -> Election: ...
    def job(self, *args: Any, **kwargs: Any) -> DomainJob: ...

    def snapshot(self, definitions: bool = True) -> Sequence[DomainInfo]: ...
    def list(self, *args: Any, **kwargs: Any) -> Sequence[DomainInfo]: ...
    def table(self, *args: Any, **kwargs: Any) -> Table: ...
    def count(self, *args: Any, **kwargs: Any) -> int: ...
    def wait(self, *args: Any, **kwargs: Any) -> DomainInfo | None: ...
    def wait_any(self, *args: Any, **kwargs: Any) -> DomainInfo: ...
    def watch(self, since: int | None = None, timeout: float | None = None) -> Watch: ...
    def event_fd(self) -> int: ...

    def assign_def(self, *args: Any, **kwargs: Any) -> Any: ...
    def assign_defs(self, *args: Any, **kwargs: Any) -> Any: ...
    def update_many(self, *args: Any, **kwargs: Any) -> int: ...
    def remove_many(self, *args: Any, **kwargs: Any) -> int: ...
    def remove_inactive(self, dom: Any, timeout: float | None = None) -> None: ...
    def free(self, timeout: float | None = None) -> None: ...
    def rename(self, dom: Any, new_name: str, timeout: float | None = None) -> None: ...
    def define(self, *args: Any, **kwargs: Any) -> DomainInfo: ...
    def undefine(self, *args: Any, **kwargs: Any) -> None: ...
    def load_all_configs(self, *args: Any, **kwargs: Any) -> LoadReport: ...
    def forget_configs(self, timeout: float | None = None) -> None: ...
    def save_config(self, dom: Any, timeout: float | None = None) -> None: ...
    def delete_config(self, dom: Any, timeout: float | None = None) -> None: ...
    def set_autostart(self, dom: Any, enabled: bool, timeout: float | None = None) -> None: ...

    # For `transfer`.
    def _known(self, definition: Any) -> Any: ...
    def _take_back(self, dom: Any, made: object, timeout: float | None) -> None: ...


if TYPE_CHECKING:
    from .postgres import PostgresDomainList

    _ALL: tuple[type[AnyDomainList], ...] = (DomainList, PostgresDomainList)


def _postgres() -> Any:
    from .postgres import PostgresDomainList

    return PostgresDomainList


STORES: dict[str, Callable[[], Any]] = {
    "postgresql": _postgres,
    "postgres": _postgres,
    "postgresql+embedded": _postgres,
}
"""The class of lists of each scheme but shared memory's; it takes the whole URL."""


def open(url: str, **options: Any) -> AnyDomainList:
    """The list of domains at a URL; makes it if there is none.

    ``shm:NAME`` and ``shm:/path/of/a/segment`` are in shared memory; the options are those of
    `DomainList.open`. ``postgresql://user@host/database?list=NAME`` is on PostgreSQL, for several
    hosts, and ``postgresql+embedded:///path?list=NAME`` on a server of its own, which is started
    if need be; the options are those of `shmdomains.postgres.PostgresDomainList.open`. Raises
    `ValueError` for another URL, and what the store's `open` raises.

    >>> from shmdomains.opening import open
    >>> open("mysql://db1/vms")
    Traceback (most recent call last):
    ...
    ValueError: 'mysql:' is not where a list can be: shm:NAME, shm:/path/of/a/segment, ...
    """
    lists, where = _place(url)
    found: AnyDomainList = lists.open(**where, **options)
    return found


def attach(url: str, **options: Any) -> AnyDomainList:
    """The list at a URL. Raises `SegmentNotFound` if there is none."""
    lists, where = _place(url)
    found: AnyDomainList = lists.attach(**where, **options)
    return found


def create(url: str, **options: Any) -> AnyDomainList:
    """A new list at a URL. Raises `SegmentExists` if there is one."""
    lists, where = _place(url)
    made: AnyDomainList = lists.create(**where, **options)
    return made


def unlink(url: str, force: bool = False) -> None:
    """Remove the list at a URL. Raises `SegmentNotFound`, and `SegmentInUse` unless `force`."""
    if is_shared_memory(url):
        unlink_segment(force=force, **_segment(url))
        return
    with closing(attach(url)) as doms:
        doms.unlink(force)


def _place(url: str) -> tuple[Any, dict[str, Any]]:
    """The class of lists, and how it is told which one."""
    scheme = scheme_of(url)
    return (
        (DomainList, _segment(url)) if scheme == SHARED_MEMORY else (STORES[scheme](), {"url": url})
    )


def _segment(url: str) -> dict[str, Any]:
    text = url.removeprefix(f"{SHARED_MEMORY}:")
    return {"path": text} if "/" in text else {"name": text}


def scheme_of(url: str) -> str:
    """The scheme. Raises `ValueError` for one that names no store; the message has no more of the
    URL, which may hold a password.

    >>> scheme_of("postgresql+embedded:///srv/vms")
    'postgresql+embedded'
    """
    scheme, colon, rest = url.partition(":")
    if colon and ((scheme == SHARED_MEMORY and rest) or (scheme in STORES and rest[:2] == "//")):
        return scheme
    what = f"{scheme[:40] + colon!r}" if colon else "a name alone"
    raise ValueError(f"{what} is not where a list can be: {FORMS}")


def is_shared_memory(url: str) -> bool:
    return scheme_of(url) == SHARED_MEMORY


def shown(url: str) -> str:
    """A URL for people: a password is left out, and so is what only the connection needs.

    >>> shown("postgresql://anna:secret@db1/vms?sslmode=verify-full&list=blue&password=secret")
    'postgresql://anna@db1/vms?list=blue'
    """
    where, _, query = url.partition("?")
    where = re.sub(r"//([^/:@]*)[^/]*@", r"//\1@", where)
    names = [word for word in query.split("&") if word.startswith("list=")]
    return "?".join([where, *names[-1:]])


def beside(url: str, name: str) -> str:
    """The URL of another list in the same place.

    >>> beside("postgresql://db1/vms?list=blue&lease=5", "stress")
    'postgresql://db1/vms?lease=5&list=stress'
    """
    from urllib.parse import quote

    where, _, query = url.partition("?")
    words = [word for word in query.split("&") if word and not word.startswith("list=")]
    return f"{where}?{'&'.join([*words, 'list=' + quote(name, safe='')])}"
