"""CPU time and memory of the guests of this host: of their processes, as the kernel counts them.

A pid alone may be another process' by now. So a reading counts only if, after it, the process that
has this pid is the one that started when the record says.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar

from ..lazy import LazyModule
from ..memory.holder import is_running

if TYPE_CHECKING:
    import psutil
else:
    psutil = LazyModule("psutil")

K = TypeVar("K")


class Guests(Generic[K]):
    """The processes that were read last: psutil's objects are kept, which saves half the time."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], psutil.Process] = {}

    def read(
        self, guests: Iterable[tuple[K, int, int]]
    ) -> tuple[list[K], list[float], list[float]]:
        """Those that run, their CPU seconds and resident bytes. Of each is given what the caller
        calls it, its process, and when that started, in ticks since boot."""
        found: list[K] = []
        seconds: list[float] = []
        resident: list[float] = []
        before, self._kept = self._kept, {}
        for key, pid, started in guests:
            with suppress(OSError, psutil.Error):
                process = before.get((pid, started)) or psutil.Process(pid)
                with process.oneshot():
                    times = process.cpu_times()
                    memory = process.memory_info()
                if is_running(pid, started):
                    self._kept[pid, started] = process
                    found.append(key)
                    seconds.append(round(times.user + times.system, 2))
                    resident.append(memory.rss)
        return found, seconds, resident
