"""Who held which lock and which job when, across processes, as a file that Perfetto opens.

The core has no tracing in its paths, which are too fast for it: a lock is taken and given back in
less time than a note of it would take. So locks are *sampled*, from outside: at each look whoever
holds or waits for one is noted, and looks that follow each other and see the same holding are one
span. A holding shorter than the interval is seen by chance, in proportion to its time; a span's
ends are late or early by one interval at most. Where a job begins is exact, for its record says it,
and so are events, for the list keeps them.

The format is Chrome's Trace Event format: ``X`` events for spans, ``i`` for the list's events,
times in microseconds since the first look.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ..events import DomainEvent
from ..memory.held import LockInfo

if TYPE_CHECKING:
    from ..opening import AnyDomainList

INTERVAL = 0.001
"""Seconds between two looks, if nobody says."""

_Key = tuple[Any, ...]


class _Span(NamedTuple):
    """A holding, or a wait, as far as it was seen."""

    name: str
    category: str
    pid: int
    tid: int
    begin: float
    end: float
    about: dict[str, Any]


class Tracer:
    """Looks at a list and keeps what it saw.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> tracer = Tracer(doms)
    >>> with doms.locked():
    ...     tracer.look()
    >>> [event["name"] for event in tracer.events() if event["ph"] == "X"]
    ['list lock']
    """

    def __init__(self, doms: AnyDomainList, interval: float = INTERVAL) -> None:
        self._doms, self._interval = doms, interval
        self._open: dict[_Key, _Span] = {}
        self._closed: list[_Span] = []
        self._commands: dict[int, str] = {}
        self._instants: list[dict[str, Any]] = []
        self._missed = 0
        self._looks = 0
        self._began = time.time()
        self._ended = self._began
        self._watch = doms.watch(timeout=0) if doms.info.events_max else ()

    def run(self, seconds: float, stop: threading.Event | None = None) -> None:
        """Look for so many seconds, or until `stop` is set; once in any case."""
        stop = stop or threading.Event()
        turn = now = time.monotonic()
        end = now + seconds
        while True:
            self.look()
            turn = max(turn + self._interval, now)
            if stop.wait(max(min(turn, end) - time.monotonic(), 0.0)):
                return
            now = time.monotonic()
            if now >= end:
                return

    def look(self) -> None:
        """One look at all locks and jobs. Takes none."""
        now = time.time()
        self._looks += 1
        self._ended = now
        before, self._open = self._open, {}
        for lock in self._doms.locks():
            for key, span in self._seen(lock, now):
                known = before.get(key)
                # A job that began since the last look is another one of the same holder.
                if known is not None and (lock.kind != "job" or span.begin <= known.end):
                    span = before.pop(key)._replace(end=now)
                self._open[key] = span
        self._closed += before.values()
        if self._looks % 64 == 0:  # before the ring has forgotten them
            self._read_events()

    def _seen(self, lock: LockInfo, now: float) -> Iterator[tuple[_Key, _Span]]:
        holder = lock.holder
        if holder is None or holder.pid is None:
            return
        tid = holder.tid or holder.pid
        self._commands.setdefault(holder.pid, holder.command or "")
        name = _name_of(lock)
        about: dict[str, Any] = {"waiting": lock.waiting, "alive": holder.alive}
        if holder.operation:
            about["operation"] = holder.operation
        if lock.uuid is not None:
            about["uuid"] = str(lock.uuid)
        begin = now
        if lock.kind == "job" and holder.held_for is not None:
            begin = now - holder.held_for  # as the record says
        key = lock.kind, lock.name, str(lock.uuid), holder.pid, tid, name
        yield key, _Span(name, lock.kind, holder.pid, tid, begin, now, about)

    def _read_events(self) -> None:
        for event in self._watch:
            if not isinstance(event, DomainEvent):
                self._missed += event.count
                continue
            self._instants.append(
                {
                    "name": f"{event.name}: {event.words}",
                    "cat": "event",
                    "ph": "i",
                    "s": "g",
                    "ts": self._micro(event.time),
                    "pid": 0,
                    "tid": 0,
                    "args": event.to_dict(),
                }
            )

    def _micro(self, moment: float) -> float:
        return round((moment - self._began) * 1e6, 1)

    # --- the file ---

    def events(self) -> list[dict[str, Any]]:
        """The trace's events, in order of time."""
        self._read_events()
        spans = [*self._closed, *self._open.values()]
        found = [self._complete(span) for span in spans] + self._instants
        return [*self._names(), *sorted(found, key=lambda event: float(event["ts"]))]

    def _complete(self, span: _Span) -> dict[str, Any]:
        return {
            "name": span.name,
            "cat": span.category,
            "ph": "X",
            "ts": self._micro(span.begin),
            "dur": round((span.end - span.begin) * 1e6, 1),
            "pid": span.pid,
            "tid": span.tid,
            "args": span.about,
        }

    def _names(self) -> Iterable[dict[str, Any]]:
        yield _named("process_name", 0, "events of the list")
        for pid, command in sorted(self._commands.items()):
            yield _named("process_name", pid, f"{pid} {command}".rstrip())

    def write(self, stream: IO[str], shown: str = "") -> int:
        """Write the trace; returns how many events it has."""
        events = self.events()
        seconds = self._ended - self._began
        json.dump(
            {
                "displayTimeUnit": "ms",
                "otherData": {
                    "list": shown,
                    "looks": self._looks,
                    "seconds": round(seconds, 3),
                    "events missed": self._missed,
                    "note": "locks are sampled: a holding shorter than the interval between two "
                    "looks is seen by chance; where a job begins, and events, are exact",
                },
                "traceEvents": events,
            },
            stream,
        )
        return len(events)


def _name_of(lock: LockInfo) -> str:
    if lock.kind == "job":
        operation = lock.holder.operation if lock.holder else None
        return f"job {operation or ''} on {lock.name}"
    return "list lock" if lock.kind == "list" else f"{lock.kind} {lock.name}"


def _named(what: str, pid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": 0, "ts": 0, "args": {"name": name}}
