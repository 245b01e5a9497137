"""Who holds which lock of a list, how many wait for it, and what its processes counted.

The core reads these from the segment, without a lock; here they become values, with what /proc says
of the holders. A holder may have gone by the time one looks at it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from uuid import UUID

import msgspec

from ..errors import SegmentCorrupt
from ..holder import LockHolder
from ..job import JobInfo
from ..rules.info import DomainInfo
from .holder import describe_holder
from .invariants import lock_text


class LockInfo(msgspec.Struct, frozen=True):
    """A lock that is held or waited for, as `DomainList.locks` gives it.

    `kind` is ``"list"``, ``"mutex"``, ``"domain"`` or ``"job"``; `name` is the mutex's or the
    domain's, `uuid` the domain's, ``None`` for a slot without one. `holder` is ``None`` where the
    lock is just changing hands; `LockHolder.alive` is false where it died and nobody has taken the
    lock since. `waiting` threads sleep for it, the first of them for `longest_wait` seconds.

    >>> print(LockInfo("domain", "web1", None, None, waiting=2, longest_wait=1.5))
    domain 'web1': held by nobody; 2 wait, the first for 1.5 s
    """

    kind: str
    name: str | None
    uuid: UUID | None
    holder: LockHolder | None
    waiting: int = 0
    longest_wait: float = 0.0

    def __str__(self) -> str:
        text = f"{lock_text(self.kind, self.name)}: held by {self.holder or 'nobody'}"
        if self.waiting:
            verb = "waits" if self.waiting == 1 else "wait"
            text += f"; {self.waiting} {verb}, the first for {self.longest_wait:.1f} s"
        return text


class Statistics(msgspec.Struct, frozen=True):
    """What processes counted since they attached to the list.

    `acquisitions` are the list, domain and named locks that were taken; `contended` the waits that
    slept, whether or not they got the lock; `waits[i]` those of them that took less than 2**i
    microseconds and not less than half of that (the last: all longer ones). `commits` are changes,
    new domains and removals; `deaths` the locks whose holder was found dead, `recoveries` the
    repairs made. `unlisted` waits found no room in the table that `DomainList.locks` reads.
    `processes` is how many were added up.

    >>> Statistics.of([(7, 1, 2, 0, 0, 0, (0, 1, 0)), (1, 1, 0, 0, 0, 0, (0, 0, 1))])
    Statistics(processes=2, acquisitions=8, contended=2, commits=2, recoveries=0, deaths=0,
    unlisted=0, waits=(0, 1, 1))
    """

    processes: int
    acquisitions: int
    contended: int
    commits: int
    recoveries: int
    deaths: int
    unlisted: int
    waits: tuple[int, ...]

    @classmethod
    def of(cls, counts: list[tuple[Any, ...]]) -> Statistics:
        """The sum of what the core read of each process."""
        *numbers, waits = zip(*counts, strict=True)
        acquisitions, contended, commits, recoveries, deaths, unlisted = map(sum, numbers)
        sizes = tuple(map(sum, zip(*waits, strict=True)))
        return cls(
            len(counts), acquisitions, contended, commits, recoveries, deaths, unlisted, sizes
        )


def job_locks(doms: Any) -> list[LockInfo]:
    """The jobs of all domains that are not damaged; those who wait for one are counted with the
    first of its domain."""
    waits = doms._waits_for_jobs()
    found = []
    for dom in doms._with_work():
        slot = dom._key[0]
        with suppress(SegmentCorrupt):
            info, _ = doms._look(dom)
            for job in () if info is None else info.jobs:
                waiting, longest = waits.pop(slot, (0, 0))
                found.append(job_lock(info, job, waiting, longest / 1e9))
    return found


def job_lock(
    info: DomainInfo, job: JobInfo, waiting: int = 0, longest_wait: float = 0.0
) -> LockInfo:
    """A job as a lock; its holder does what the job does, since the job began."""
    held = max(time.time() - job.since, 0.0)
    holder = msgspec.structs.replace(job.holder, operation=job.operation, held_for=held)
    return LockInfo("job", info.name, info.uuid, holder, waiting, longest_wait)


def as_locks(taken: Iterable[tuple[Any, ...]]) -> list[LockInfo]:
    """Return the locks that the core found; each process is looked up once."""
    commands: dict[int, str | None] = {}
    return [
        LockInfo(
            kind,
            name,
            uuid,
            None if holder is None else describe_holder(commands, *holder),
            waiting,
            longest / 1e9,
        )
        for kind, name, uuid, holder, waiting, longest in taken
    ]
