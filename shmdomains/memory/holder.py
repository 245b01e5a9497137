"""Looks up who holds a lock: process, thread, command line, since when, alive or not.

The segment records thread numbers and start times. The rest is looked up here, when a wait timed
out or a death is reported, and never on a path that succeeds.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import LockTimeout
from ..holder import LockHolder
from ..lazy import LazyModule
from ._core import core

if TYPE_CHECKING:
    import psutil
else:
    psutil = LazyModule("psutil")

wait_logger = logging.getLogger("shmdomains.wait")
_TICKS = float(os.sysconf("SC_CLK_TCK"))
_TID_BITS = 22
_UNKNOWN = 1  # a holder died, nobody knows which


def ready_to_describe() -> None:
    """Have what describes a holder imported now, not in the middle of an event loop."""
    _ = psutil.Error


def process_started(start_ticks: int) -> float | None:
    """Convert clock ticks since boot to seconds since the epoch; 0 is unknown."""
    if not start_ticks:
        return None
    try:
        return psutil.boot_time() + start_ticks / _TICKS
    except OSError:  # no descriptor to read the boot time with
        return None


def is_running(pid: int, start_ticks: int) -> bool:
    """Whether the process with this pid and start still runs; a pid alone may be reused.

    True if it cannot be found out, for lack of descriptors: nobody is taken for dead by mistake.
    """
    return core.process_runs(pid, start_ticks)


def command_of(pid: int) -> str | None:
    """Return the process's command line, its name if that is empty, or ``None`` if it is gone."""
    try:
        process = psutil.Process(pid)
        command = " ".join(process.cmdline()) or process.name()
    except (OSError, ValueError, OverflowError):  # before psutil.Error: psutil may fail to import
        return None
    except psutil.Error:
        return None
    return command if len(command) <= 120 else command[:117] + "..."


def lock_timeout(
    what: str,
    timeout: float | None,
    tid: int,
    pid: int,
    start_ticks: int,
    held_for: float | None,
    dropped: bool = False,
    operation: str | None = None,
) -> LockTimeout:
    """Make the error for a wait that was too long. `tid` 0: the lock was free again by then.

    `dropped`: a thread other than the holder dropped the handle.
    """
    holder = describe_holder({}, tid, pid, start_ticks, held_for, operation) if tid else None
    error = timed_out(what, timeout, holder)
    if dropped and holder is not None and holder.alive:
        return LockTimeout(
            f"{error}; its handle was dropped in another thread, so it is free when this thread "
            "next locks something, or ends",
            holder,
        )
    return error


def timed_out(what: str, timeout: float | None, holder: LockHolder | None) -> LockTimeout:
    """Make the error for a wait that was too long, of a store that knows the holder."""
    waited = "is locked" if not timeout else f"was not free within {timeout:.3g} s"
    if holder is None:
        return LockTimeout(f"{what} {waited}; nobody is known to hold it now")
    return LockTimeout(f"{what} {waited}; held by {holder}", holder)


def describe_holder(
    commands: dict[int, str | None],
    tid: int,
    pid: int,
    start_ticks: int,
    held_for: float | None,
    operation: str | None,
) -> LockHolder:
    """Describe a thread that holds a lock, or died with it. `commands` remembers what was looked
    up."""
    start = start_ticks or core.process_start(tid)
    if pid and pid not in commands:
        commands[pid] = command_of(pid)
    return LockHolder(
        pid=pid or None,
        tid=tid,
        started=process_started(start),
        held_for=None if held_for is None else max(held_for, 0.0),
        alive=core.thread_runs(tid, start_ticks),
        command=commands[pid] if pid else None,
        operation=operation,
    )


def slow_wait(error: LockTimeout) -> None:
    """Log a wait that goes on; `error` is what it would end with if it timed out now."""
    wait_logger.warning("%s; still waiting", error)


def stops_loop(error: LockTimeout) -> None:
    """Log a wait that blocks the thread of an event loop, and goes on."""
    wait_logger.warning(
        "%s; still waiting, and the event loop of this thread with it: use shmdomains.aio", error
    )


def holder_of(pid: int, tid: int, start_ticks: int) -> LockHolder:
    """Describe a thread that held something once; it may have ended."""
    alive = core.thread_runs(tid, start_ticks)
    return LockHolder(
        pid=pid,
        tid=tid,
        started=process_started(start_ticks),
        held_for=None,
        alive=alive,
        command=command_of(pid) if alive else None,
    )


def dead_holder(tid: int, pid: int, start_ticks: int) -> LockHolder:
    """Describe a dead holder, whose command line is gone."""
    return LockHolder(
        pid=pid or None,
        tid=tid or None,
        started=process_started(start_ticks if tid else 0),
        held_for=None,
        alive=False,
        command=None,
    )


def dead_in_event(who: int, pid: int) -> LockHolder:
    """Describe a dead holder by the words that the segment has of it (``_core/layout.h``)."""
    tid, start = who & ((1 << _TID_BITS) - 1), who >> _TID_BITS
    return dead_holder(0 if who == _UNKNOWN else tid, pid, start)


def failed_repair(
    what: str | None, slot: int | None, tid: int, pid: int, start_ticks: int, when: float
) -> str:
    """Say which repair of a segment failed, where, and who found it. `when` 0: unknown."""
    text = f"a repair failed: {what or 'an unknown one'}"
    text += "" if slot is None else f", at slot {slot}"
    with suppress(ValueError, OverflowError, OSError):  # a damaged time may be out of range
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
        text += f", found by {dead_holder(tid, pid, start_ticks).who} at {at}" if when else ""
    return text
