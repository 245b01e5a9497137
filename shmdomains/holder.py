"""Who holds a lock, as a value: process, thread, command line, since when, alive or not; and what
this host is called.

Every store describes a holder with it, and `LockTimeout` carries it. Finding the holder is the
store's business.
"""

from __future__ import annotations

import os
from functools import cache

import msgspec

HOST_VARIABLE = "SHMDOMAINS_HOST"


@cache
def this_host() -> str:
    """This machine's name (``gethostname``), or what ``$SHMDOMAINS_HOST`` says that it is; looked
    up once in a process."""
    return os.environ.get(HOST_VARIABLE) or os.uname().nodename


os.register_at_fork(after_in_child=this_host.cache_clear)


class LockHolder(msgspec.Struct, frozen=True):
    """A process and thread that hold, or held, a lock; an unknown value is ``None``.

    `started` is the thread's start in seconds since the epoch, `held_for` is in seconds, `command`
    is the process's command line, `alive` whether the thread runs, `operation` what it said that it
    locks for (``get(..., why="snapshot")``), `host` its host where a list has several. The process
    may have ended since this was found out.

    >>> print(LockHolder(pid=7, tid=7, started=None, held_for=2.5, alive=True, command="agent"))
    process 7 (agent) for 2.5 s
    """

    pid: int | None
    tid: int | None
    started: float | None
    held_for: float | None
    alive: bool
    command: str | None
    operation: str | None = None
    host: str | None = None

    @property
    def who(self) -> str:
        """The process, the thread unless it is the main one, and the host if it is known."""
        if self.pid is None:
            return "an unknown process" if self.tid is None else f"thread {self.tid}"
        words = [f"process {self.pid}"]
        if self.tid is not None and self.tid != self.pid:
            words.append(f"thread {self.tid}")
        return ", ".join(words) + (f" on {self.host}" if self.host else "")

    def __str__(self) -> str:
        text = self.who
        if self.pid is None:
            return text
        if self.command:
            text += f" ({self.command})"
        if self.held_for is not None:
            text += f" for {self.held_for:.1f} s"
        if self.operation:
            text += f", doing {self.operation!r}"
        return text + ("" if self.alive else "; it is dead")
