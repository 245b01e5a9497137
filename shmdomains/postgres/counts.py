"""What a process counts of a list: locks, waits, commits, deaths.

Each process tells the server with the signs of life of its listener, every third of a lease. So of
the others `all_counts` knows what was true then, and nothing of a process that has not waited or
locked for so long since it attached.
"""

from __future__ import annotations

import threading
from typing import Any

from ..memory.held import Statistics
from .session import Statement, big, number, text

_SIZES = 25
"""As many as in shared memory."""
_ACQUISITIONS, _CONTENDED, _COMMITS, _RECOVERIES, _DEATHS, _UNLISTED = range(6)

_OTHERS = Statement(
    "SELECT p.process, array_to_string(coalesce(p.counts, '{}'), ' ') FROM processes p "
    "WHERE p.list = $1 AND p.process <> $2 "
    "AND EXISTS (SELECT FROM pg_locks k WHERE k.locktype = 'advisory' AND k.objsubid = 1 "
    "AND k.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND k.classid = (lock_key(7, p.process) >> 32)::int::oid "
    "AND k.objid = (lock_key(7, p.process) & 4294967295)::bigint::oid)",
    *("bigint", "bigint"),
)


class Counts:
    """Six numbers, in the order of `Statistics`, and the waits by their length."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.numbers = [0] * (6 + _SIZES)

    def got(self, died: bool) -> None:
        with self._lock:
            self.numbers[_ACQUISITIONS] += 1
            self.numbers[_DEATHS] += died

    def waited(self, seconds: float) -> None:
        """For a lock that another held, whether or not it was got."""
        size = min(int(seconds * 1e6).bit_length(), _SIZES - 1)
        with self._lock:
            self.numbers[_CONTENDED] += 1
            self.numbers[6 + size] += 1

    def committed(self) -> None:
        with self._lock:
            self.numbers[_COMMITS] += 1

    def repaired(self, many: int) -> None:
        with self._lock:
            self.numbers[_RECOVERIES] += many


def statistics(counts: list[list[int]]) -> Statistics:
    """The sum; a process that has not said anything yet counts as one that did nothing.

    >>> statistics([[1] * 31, []]).processes, statistics([[1] * 31, []]).acquisitions
    (2, 1)
    """
    none = [0] * (6 + _SIZES)
    return Statistics.of([(*one[:6], tuple(one[6:])) for one in (said or none for said in counts)])


def all_counts(pool: Any) -> dict[int, list[int]]:
    """Those of this process, and those of the others that live, as they said last; by the number
    that the server gave each of them."""
    rows = pool.ask(_OTHERS, [number(pool.list), number(pool.process)])
    others = {big(row[0]): [int(one) for one in text(row[1]).split()] for row in rows}
    # Asking may have given this process another number, whose row says nothing yet.
    return {**others, pool.process: pool.counts.numbers}
