"""CPU time and memory of the guests of this host: of their processes, as the kernel counts them.

A pid alone may be another process' by now. So a reading counts only if, after it, the process that
has this pid is the one that started when the record says.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from ..lazy import LazyModule
from ..memory.holder import is_running
from .families import Labels, Rows

if TYPE_CHECKING:
    import psutil
else:
    psutil = LazyModule("psutil")

Guest = tuple[Labels, int, int]
"""A domain's labels, its process, and when that started, in ticks since boot."""


class Guests:
    """The processes that were read last: psutil's objects are kept, which saves half the time."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], psutil.Process] = {}

    def read(self, guests: Iterable[Guest]) -> tuple[Rows, Rows]:
        """CPU seconds and resident bytes, of those that run."""
        found: list[Labels] = []
        seconds: list[float] = []
        resident: list[float] = []
        before, self._kept = self._kept, {}
        for labels, pid, started in guests:
            with suppress(OSError, psutil.Error):
                process = before.get((pid, started)) or psutil.Process(pid)
                with process.oneshot():
                    times = process.cpu_times()
                    memory = process.memory_info()
                if is_running(pid, started):
                    self._kept[pid, started] = process
                    found.append(labels)
                    seconds.append(round(times.user + times.system, 2))
                    resident.append(memory.rss)
        return (found, seconds), (found, resident)
