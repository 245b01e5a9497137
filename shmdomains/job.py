"""Jobs: long work on a domain, which excludes other such work, and holds no lock.

The kinds, and what may run beside what, are libvirt's (``virDomainJob``, virDomainObjBeginJob). A
domain has at most one job of a normal kind, and at most one async job:

- A normal job excludes every other one, and the start of an async job.
- An async job excludes another async job, and those normal jobs that its mask does not have. The
  mask always has `Job.DESTROY`.
- `Job.ASYNC_NESTED` is a normal job of the async job's own holder; the mask does not count for it.

The numbers are libvirt's and stand in shared memory: a number never changes its meaning.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

import msgspec

from .holder import LockHolder


class Job(enum.IntEnum):
    """What kind of job it is (``virDomainJob``).

    >>> Job.MIGRATION_OP.value, Job.MIGRATION_OP.words
    (6, 'migration operation')
    """

    QUERY = 1
    """Changes nothing."""
    DESTROY = 2
    """Ends the domain; every async job allows it."""
    SUSPEND = 3
    """Stops its processors."""
    MODIFY = 4
    """May change it."""
    ABORT = 5
    """Ends the async job."""
    MIGRATION_OP = 6
    """Changes how it migrates."""
    MODIFY_MIGRATION_SAFE = 7
    """Changes only what a migration does not mind."""
    ASYNC = 8
    """A series of steps, beside which other jobs may run: migrate, save, dump, back up."""
    ASYNC_NESTED = 9
    """A step of the async job, by its holder."""

    @property
    def words(self) -> str:
        """The kind as libvirt's messages have it."""
        return self.name.lower().replace("_", " ").replace(" op", " operation")


ALLOWED = frozenset({Job.QUERY, Job.DESTROY, Job.ABORT})
"""What an async job allows unless it says otherwise (``VIR_JOB_DEFAULT_MASK``)."""

_NORMAL = frozenset(Job) - {Job.ASYNC, Job.ASYNC_NESTED}


def mask_of(allow: Iterable[Job] | None) -> int:
    """The mask for the kinds that an async job allows; ``None``: `ALLOWED`.

    >>> mask_of([]) == mask_of([Job.DESTROY]), kinds_of(mask_of(None)) == ALLOWED
    (True, True)
    """
    kinds = ALLOWED if allow is None else {Job(kind) for kind in allow} | {Job.DESTROY}
    if not kinds <= _NORMAL:
        raise ValueError("an async job can allow normal jobs only, no async ones")
    return sum(1 << (kind - 1) for kind in kinds)


def kinds_of(mask: int) -> frozenset[Job]:
    """The kinds that a mask allows."""
    return frozenset(kind for kind in _NORMAL if mask >> (kind - 1) & 1)


class JobInfo(msgspec.Struct, frozen=True):
    """A job as it was committed at one moment: what is done, since when (seconds since the epoch),
    by whom, and how far it is.

    `holder.alive` is of the moment when this was made. A dead holder's job excludes nobody; it
    stays until a job that it would have excluded takes its place. `allow` is ``None`` for all but
    an async job. `abort_requested` asks the holder to end it (`Domain.abort_job`).

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.job("web1", "backup"):
    ...     [(job.operation, job.holder.alive) for job in doms["web1"].jobs]
    [('backup', True)]
    """

    operation: str
    kind: Job
    why: str | None
    allow: frozenset[Job] | None
    holder: LockHolder
    since: float
    progress: Any
    abort_requested: bool

    def __reduce__(self) -> tuple[Any, ...]:
        values = msgspec.structs.asdict(self)
        return _restored, ({**values, "progress": _plain(self.progress)},)


def _restored(values: dict[str, Any]) -> JobInfo:
    return JobInfo(**{**values, "progress": _read_only(values["progress"])})


def _plain(value: Any) -> Any:
    """Mapping proxies cannot be pickled."""
    if isinstance(value, MappingProxyType):
        return {key: _plain(one) for key, one in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _read_only(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({key: _read_only(one) for key, one in value.items()})
    return tuple(map(_read_only, value)) if isinstance(value, tuple) else value
