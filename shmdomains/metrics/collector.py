"""`DomainCollector`: reads a list for Prometheus, without taking any of its locks.

A scrape is one listing, one look at the locks and one at the counts of the processes. The counts
are each process' own and go with it; so that a counter never falls, those of the dead are kept
here, as they were seen last.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ShmDomainsError
from ..memory.held import LockInfo, Statistics
from ..opening import AnyDomainList
from . import families as f
from .domains import Domains
from .families import Family, Labels, Rows, one, rows, written

if TYPE_CHECKING:
    from prometheus_client import Metric

_log = logging.getLogger("shmdomains.metrics")
_KINDS = {kind: Labels(kind=kind) for kind in ("list", "mutex", "domain", "job")}
_GONE_MAX = 1000

_all: weakref.WeakSet[DomainCollector] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for collector in list(_all):
        collector._lock = threading.Lock()  # its holder is a thread that the child does not have


os.register_at_fork(after_in_child=_after_fork_in_child)


class DomainCollector:
    """A list of domains, for a registry of `prometheus_client`.

    ``registry.register(DomainCollector(doms))``. Any process that has the list may do it; one is
    enough. A scrape takes no lock of the list. If the list cannot be read, ``libvirt_up`` is 0 and
    nothing else is there; the log says why. The client library takes 5 microseconds and more for
    each sample: for thousands of domains serve `exposition`, which says the same. Raises
    `ImportError` if `prometheus_client` is not there.

    >>> from shmdomains import DomainList
    >>> with DomainList(max_domains=10) as doms:
    ...     text = DomainCollector(doms).exposition().decode()
    >>> [line for line in text.splitlines() if line.startswith("libvirt_")]
    ['libvirt_up 1', 'libvirt_domains 0']
    """

    def __init__(self, doms: AnyDomainList) -> None:
        try:
            import prometheus_client.core as client
        except ImportError as exc:
            raise ImportError(
                f"metrics need prometheus_client ({exc}): pip install 'shmdomains[metrics]'"
            ) from exc
        self._client = client
        self._doms: Any = doms
        self._domains = Domains(doms)
        self._totals = _Totals()
        self._lock = threading.Lock()
        self.up: bool | None = None
        """Whether the last scrape could read the list; ``None`` before the first."""
        _all.add(self)

    def collect(self) -> Iterator[Metric]:
        """For a registry."""
        sample = self._client.Sample
        for family, (labels, values) in self._read():
            metric, name = _metric(self._client, family), family.name
            metric.samples = [
                sample(name, of.values, value) for of, value in zip(labels, values, strict=True)
            ]
            yield metric

    def describe(self) -> Iterator[Metric]:
        """For a registry, which asks for the names before it asks for values."""
        return (_metric(self._client, family) for family in f.FAMILIES)

    def exposition(self) -> bytes:
        """A scrape in Prometheus' text format, written at once."""
        return written(self._read())

    def _read(self) -> list[tuple[Family, Rows]]:
        with self._lock:
            begun = time.perf_counter()
            try:
                found = [*self._domains.read(), *self._of_list()]
                found += [*self._of_locks(), *self._totals.add(self._doms._statistics_of_each())]
            except (ShmDomainsError, OSError) as exc:
                if self.up is not False:
                    _log.warning("the list cannot be scraped: %s", exc)
                self.up = False
                return [(f.UP, one(0))]
            self.up = True
            seconds = time.perf_counter() - begun
            return [(f.UP, one(1)), *found, (f.SECONDS, one(round(seconds, 6)))]

    def _of_list(self) -> Iterator[tuple[Family, Rows]]:
        info = self._doms.info
        yield f.DOMAINS_MAX, one(info.max_domains)
        if info.bytes_max:  # PostgreSQL has no heap of ours
            yield f.HEAP_USED, one(info.heap_used)
            yield f.HEAP_FREE, one(info.heap_free)
        yield f.BYTES, one(info.bytes_committed)
        yield f.POISONED, one(int(info.poisoned is not None))
        yield f.ATTACHED, one(len(info.attached))

    def _of_locks(self) -> Iterator[tuple[Family, Rows]]:
        by_kind: dict[str, list[LockInfo]] = {kind: [] for kind in _KINDS}
        jobs: dict[str, list[float]] = defaultdict(list)
        for lock in self._doms.locks():
            by_kind[lock.kind].append(lock)
            holder = lock.holder
            if lock.kind == "job" and holder is not None and holder.alive:
                jobs[holder.operation or ""].append(holder.held_for or 0.0)
        kinds = [*_KINDS.values()]
        locks = [*by_kind.values()]
        holders = [[lock.holder for lock in some if lock.holder is not None] for some in locks]
        yield f.HELD, (kinds, [len(some) for some in holders])
        yield f.HELD_BY_DEAD, (kinds, [sum(not who.alive for who in some) for some in holders])
        yield f.WAITING, (kinds, [sum(lock.waiting for lock in some) for some in locks])
        longest = [max((lock.longest_wait for lock in some), default=0.0) for some in locks]
        yield f.LONGEST_WAIT, (kinds, longest)
        oldest = [max((who.held_for or 0.0 for who in some), default=0.0) for some in holders]
        yield f.LONGEST_HELD, (kinds, oldest)
        names = [Labels(operation=name) for name in jobs]
        yield f.JOBS, (names, [len(ages) for ages in jobs.values()])
        yield f.OLDEST_JOB, (names, [max(ages) for ages in jobs.values()])


def _metric(client: Any, family: Family) -> Metric:
    metric: Metric = client.Metric(family.base, family.help, family.kind)
    return metric


class _Totals:
    """The counts of all processes that were ever seen. What a process counted between the last
    scrape and its death is not known."""

    def __init__(self) -> None:
        self._seen: dict[int, Statistics] = {}
        self._gone: Statistics | None = None

    def add(self, now: dict[int, Statistics]) -> Iterator[tuple[Family, Rows]]:
        """Of what the living say now."""
        for who, counts in now.items():
            before = self._seen.pop(who, None)
            if before is not None and _fell(before, counts):  # it closed the list, and has it again
                self._leave(before)
            self._seen[who] = counts  # the longest gone come first
        while len(self._seen) > _GONE_MAX + len(now):
            self._leave(self._seen.pop(next(iter(self._seen))))
        total = _sum([*self._seen.values(), *([self._gone] if self._gone else [])])
        yield f.ACQUISITIONS, one(total.acquisitions)
        yield f.WAITS, rows(_buckets(total.waits))
        yield f.COMMITS, one(total.commits)
        yield f.RECOVERIES, one(total.recoveries)
        yield f.DEATHS, one(total.deaths)
        yield f.UNLISTED, one(total.unlisted)

    def _leave(self, counts: Statistics) -> None:
        self._gone = counts if self._gone is None else _sum([self._gone, counts])


def _fell(before: Statistics, now: Statistics) -> bool:
    """Whether any count is smaller: then all of them began anew."""
    old, new = (
        (o.acquisitions, o.contended, o.commits, o.recoveries, o.deaths, o.unlisted, *o.waits)
        for o in (before, now)
    )
    return any(is_now < was for was, is_now in zip(old, new, strict=True))


def _sum(counts: list[Statistics]) -> Statistics:
    return Statistics.of(
        [
            (o.acquisitions, o.contended, o.commits, o.recoveries, o.deaths, o.unlisted, o.waits)
            for o in counts
        ]
    )


_LE = [Labels(le=f"{2**i / 1e6:g}") for i in range(64)]
_INFINITE = Labels(le="+Inf")


def _buckets(waits: tuple[int, ...]) -> Iterator[tuple[Labels, float]]:
    """Cumulative; the last size has no upper end.

    >>> [(labels.values["le"], many) for labels, many in _buckets((0, 2, 1))]
    [('1e-06', 0), ('2e-06', 2), ('+Inf', 3)]
    """
    total = 0
    for labels, many in zip([*_LE[: len(waits) - 1], _INFINITE], waits, strict=True):
        total += many
        yield labels, total
