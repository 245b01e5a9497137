"""What the core calls in Python; `configure` gives it this module.

The core calls it when a wait timed out or is slow, when it reports a death, a failed repair or the
holder of a job, when a lock-free read has to be tried again, and before a wait for a named lock
that may be for ever; else never on a path that succeeds.
"""

from __future__ import annotations

import time

from ..holder import LockHolder
from ..rules.jobs import held_jobs
from ..rules.work import Caller
from .holder import dead_holder, failed_repair, holder_of, lock_timeout, slow_wait
from .passing import restore_part

__all__ = [
    "dead_holder",
    "describe",
    "failed_repair",
    "holds_job",
    "lock_timeout",
    "pause",
    "restore_part",
    "slow_wait",
]


def describe(caller: Caller) -> LockHolder:
    """Who called once; it may have ended."""
    return holder_of(caller.pid, caller.tid, caller.start)


def holds_job() -> bool:
    """Whether this thread holds a job."""
    return bool(held_jobs())


def pause() -> None:
    """Let writers finish before a lock-free read is tried again."""
    time.sleep(0.0002)
