"""What the core calls in Python; `configure` gives it this module.

The core calls it when a wait timed out or is slow, when it reports a death, a failed repair or the
holder of a job, and when a lock-free read has to be tried again; never on a path that succeeds.
"""

from __future__ import annotations

import time

from ..holder import LockHolder
from ..rules.work import Caller
from .holder import dead_holder, failed_repair, holder_of, lock_timeout, slow_wait

__all__ = ["dead_holder", "describe", "failed_repair", "lock_timeout", "pause", "slow_wait"]


def describe(caller: Caller) -> LockHolder:
    """Who called once; it may have ended."""
    return holder_of(caller.pid, caller.tid, caller.start)


def pause() -> None:
    """Let writers finish before a lock-free read is tried again."""
    time.sleep(0.0002)
