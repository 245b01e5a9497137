"""One look at a list: domains, rates, locks, jobs, guests, and what happened since the last look.

A `Looker` remembers what it saw last, for rates are differences. A look takes no lock: it costs a
listing of the domains and of the locks.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from ..events import DomainEvent
from ..holder import this_host
from ..memory.held import LockInfo
from ..rules.info import DomainInfo
from .guests import Guests

if TYPE_CHECKING:
    from ..memory.held import Statistics
    from ..opening import AnyDomainList

_COUNTED = {"locks": "acquisitions", "commits": "commits", "waits": "contended"}
"""What a rate is called, and the count that it is of."""
EVENTS = 200
"""So many of the last events are kept."""


class Row(NamedTuple):
    """A domain. `cpu` is in percent of one processor, `memory` in bytes, both of the guest's
    process and ``None`` if it has none here; `events` are those since the last look, a second."""

    name: str
    uuid: UUID
    id: int | None
    state: str
    cpu: float | None
    memory: int | None
    events: float
    job: str
    holder: str
    waiting: int


class Picture(NamedTuple):
    """What one look saw."""

    shown: str
    """Which list it is."""
    states: dict[str, int]
    """Domains by state."""
    rates: dict[str, float]
    """Locks, commits, waits and events, a second; empty at the first look."""
    processes: int
    deaths: int
    rows: list[Row]
    locks: list[LockInfo]
    """Those waited for first, then those that are held longest."""
    events: list[str]
    """The last ones, the newest first."""
    missed: int
    took: float
    """Seconds that the look took."""


class Looker:
    """Looks at a list, again and again. Not for several threads at once."""

    def __init__(self, doms: AnyDomainList, shown: str = "") -> None:
        self._doms: Any = doms
        self._shown = shown
        self._at = 0.0
        self._counted: dict[int, Statistics] = {}
        self._guests: Guests[tuple[UUID, int]] = Guests()
        self._seconds: dict[tuple[UUID, int], float] = {}
        """CPU time of the guests that were seen last."""
        self._starts: dict[tuple[int, int | None], int] = {}
        """When the guests' processes started, by the ids of domain and process."""
        self._recent: deque[str] = deque(maxlen=EVENTS)
        self._missed = 0
        info = doms.info
        self._watch = doms.watch(timeout=0) if info.events_max else ()

    def look(self) -> Picture:
        """Raises what reading the list raises."""
        began = time.monotonic()
        elapsed = began - self._at if self._at else 0.0
        told, count = self._told()
        infos = self._doms.list()
        locks = self._doms.locks()
        rates = self._rates(count, elapsed)
        counted = self._counted.values()
        rows = self._rows(infos, locks, told, elapsed)
        self._at = began
        return Picture(
            self._shown,
            dict(Counter(info.state.words for info in infos)),
            rates,
            len(counted),
            sum(one.deaths for one in counted),
            rows,
            sorted(locks, key=_importance),
            list(self._recent),
            self._missed,
            time.monotonic() - began,
        )

    def _rates(self, events: int, elapsed: float) -> dict[str, float]:
        before, self._counted = self._counted, self._doms._statistics_of_each()
        if not elapsed:
            return {}
        done = {"locks": 0, "commits": 0, "waits": 0, "events": events}
        for who, now in self._counted.items():
            # Who was not there before began at 0; a smaller number began anew.
            was = before.get(who)
            for name, field in _COUNTED.items():
                count, last = getattr(now, field), getattr(was, field, 0)
                done[name] += count - last if count >= last else count
        return {name: count / elapsed for name, count in done.items()}

    def _told(self) -> tuple[Counter[UUID], int]:
        """The events since the last look, by domain, and how many they were."""
        told: Counter[UUID] = Counter()
        count = 0
        for event in self._watch:
            if not isinstance(event, DomainEvent):
                self._missed += event.count
                count += event.count
                continue
            told[event.uuid] += 1
            count += 1
            moment = time.strftime("%H:%M:%S", time.localtime(event.time))
            self._recent.appendleft(f"{moment} {event.name}: {event.words}")
        return told, count

    def _rows(
        self,
        infos: Sequence[DomainInfo],
        locks: Sequence[LockInfo],
        told: Counter[UUID],
        elapsed: float,
    ) -> list[Row]:
        held = {lock.uuid: lock for lock in locks if lock.kind == "domain"}
        waits: Counter[UUID | None] = Counter()
        for lock in locks:
            waits[lock.uuid] += lock.waiting
        use = self._use(infos, elapsed)
        found = []
        for info in infos:
            cpu, memory = use.get(info.uuid, (None, None))
            owned = held.get(info.uuid)
            found.append(
                Row(
                    info.name,
                    info.uuid,
                    info.id if info.is_active else None,
                    info.state.words,
                    cpu,
                    memory,
                    told[info.uuid] / elapsed if elapsed else 0.0,
                    ", ".join(_job_text(job) for job in info.jobs),
                    "" if owned is None or owned.holder is None else owned.holder.who,
                    waits[info.uuid],
                )
            )
        return found

    def _learn(self, infos: Sequence[DomainInfo]) -> None:
        """A pid alone may be another process's by now. When it started never changes, and only
        another listing tells it, so that is asked for new guests alone."""
        if all((info.id, info.pid) in self._starts for info in infos if info.pid is not None):
            return
        marked, marks, _ = self._doms._marked()
        self._starts = {
            (info.id, info.pid): self._doms._about(info, mark)[1]
            for info, mark in zip(marked, marks, strict=True)
            if info.pid is not None
        }

    def _use(
        self, infos: Sequence[DomainInfo], elapsed: float
    ) -> dict[UUID, tuple[float | None, int]]:
        """Processor and memory of the guests' processes on this host. A process that was not seen
        before has no rate."""
        self._learn(infos)
        here = [info for info in infos if info.pid is not None and info.host == this_host()]
        guests = [
            ((info.uuid, info.pid), info.pid, started)
            for info in here
            if (started := self._starts.get((info.id, info.pid))) and info.pid is not None
        ]
        before = self._seconds
        found, seconds, resident = self._guests.read(guests)
        self._seconds = dict(zip(found, seconds, strict=True))
        use: dict[UUID, tuple[float | None, int]] = {}
        for guest, now, memory in zip(found, seconds, resident, strict=True):
            last = before.get(guest)
            is_known = last is not None and elapsed
            use[guest[0]] = (100 * (now - (last or 0)) / elapsed if is_known else None), int(memory)
        return use


def _job_text(job: Any) -> str:
    """A job with how far it is, where it says so as libvirt's do."""
    progress = job.progress if hasattr(job.progress, "get") else {}
    percent = progress.get("percent")
    if percent is None and progress.get("data_total"):
        percent = 100 * progress.get("data_processed", 0) / progress["data_total"]
    done = f" {percent:.0f}%" if isinstance(percent, (int, float)) else ""
    return f"{job.operation}{done}" + ("" if job.holder.alive else " (dead)")


def _importance(lock: LockInfo) -> tuple[int, float]:
    held = lock.holder.held_for if lock.holder is not None else 0.0
    return -lock.waiting, -(held or 0.0)
