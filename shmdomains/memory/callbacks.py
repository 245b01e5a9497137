"""What the core calls in Python; `configure` gives it this module.

The core calls it when a wait timed out or is slow, when it reports a death, a failed repair or the
holder of a job, when a lock-free read has to be tried again, and before a wait for a named lock
that may be for ever; else never on a path that succeeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..holder import LockHolder, this_host
from ..lazy import LazyModule
from ..rules.jobs import end_jobs, jobs_of_owner
from ..rules.work import Caller
from .holder import (
    dead_holder,
    failed_repair,
    holder_of,
    lock_timeout,
    slow_wait,
    stops_loop,
)
from .passing import restore_part

if TYPE_CHECKING:
    from . import greenlets
else:
    greenlets = LazyModule("shmdomains.memory.greenlets")

__all__ = [
    "dead_holder",
    "describe",
    "failed_repair",
    "holds_job",
    "lock_timeout",
    "look_for_gevent",
    "owner_over",
    "pause",
    "restore_part",
    "slow_wait",
    "stops_loop",
    "this_host",
]


def describe(caller: Caller) -> LockHolder:
    """Who called once; it may have ended."""
    return holder_of(caller.pid, caller.tid, caller.start)


def holds_job(owner: int) -> bool:
    """Whether this owner holds a job."""
    return bool(jobs_of_owner(owner))


def pause() -> None:
    """Let writers finish before a lock-free read is tried again."""
    time.sleep(0.0002)


when_over: list[Callable[[int], object]] = [end_jobs]
"""Called with the number of a task that is over. What it held elsewhere ends, too."""


def owner_over(owner: int) -> None:
    """A task is over: what it holds beside the locks of shared memory ends."""
    for end in when_over:
        end(owner)


def look_for_gevent() -> None:
    """When a list is attached, or used first in a child: whether greenlets are this process's
    threads."""
    if greenlets.is_wanted():
        greenlets.begin()
