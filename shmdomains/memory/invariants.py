"""The invariants of a segment, and the reports of `DomainList.check` and `recover`.

The core tests the invariants (_core/check.c) and repairs what a dead process left (_core/locks.c,
_core/rebuild.c). This module has their names, what each means, who repairs it, and the reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import msgspec

from ..holder import LockHolder

P = ParamSpec("P")
R = TypeVar("R")

INVARIANTS: dict[str, str] = {
    "I1 identity": "A slot says for sure whether a domain lives in it, and each has a UUID and a "
    "name of 1 to 251 bytes. Nobody repairs it.",
    "I2 extents": "What a record names in the heap is there, and named once. Nobody repairs it.",
    "I2 map": "The map of used space, and its count, are what the records name. Rebuilt by the "
    "next holder of the heap lock after a death.",
    "I3 fields": "A record has a definition and a state that exists, and no part of it is newer "
    "than its last commit. Nobody repairs it.",
    "I4 ids": "No domain has an id that was not given out. Nobody repairs it.",
    "I5 index": "UUID, name and id of every domain lead to it, and nothing else is entered. "
    "Rebuilt by the next holder of the list lock (UUID, name) or the id lock after a death.",
    "I5 sequence": "Nobody is in the middle of changing an index without its lock. Ended by the "
    "next holder of the list or id lock after a death.",
    "E1 events": "Every event that is kept fits its checksum, and no domain names one that has not "
    "happened. Nobody repairs it: a damaged event counts as missed, and the ring is overwritten.",
    "free list": "Every slot without a domain is on it, once. Rebuilt by the next holder of the "
    "list lock after a death.",
    "counts": "The numbers of domains, active domains and slots are right. Rebuilt by the next "
    "holder of the list or id lock after a death.",
    "locks": "Every lock is of the kind that it was made as. Nobody repairs it.",
    "named locks": "Each has a name that no other one has, and a free one is signed by nobody. "
    "Nobody repairs a name; who next takes the lock signs it.",
    "heap": "The heap's end of committed memory lies within it. Nobody repairs it.",
    "settings": "The config directories that the list was loaded from can be read. Repaired by "
    "the next load_all_configs().",
    "config": "The config directory that the list was loaded from says what the records say: a "
    "persistent domain has its file, and its autostart link if it is set to autostart; no other "
    "one has a file, and none has a second one. Left out is what somebody holds. Of a killed rule "
    "the domain's next holder repairs it; of a person, whoever saves or undefines the domain.",
    "poisoned": "No repair has ever failed. Nobody repairs it: export, unlink, create anew.",
}
"""The invariants that `DomainList.check` tests: name, meaning and who repairs it.

>>> list(INVARIANTS)[:2]
['I1 identity', 'I2 extents']
"""


def listing_invariants(function: Callable[P, R]) -> Callable[P, R]:
    """Append `INVARIANTS` to a method's docstring."""
    lines = [(function.__doc__ or "").rstrip() + "\n"]
    for name, text in INVARIANTS.items():
        lines += [f"        {name}", *(f"            {part}" for part in text.split("\n"))]
    function.__doc__ = "\n".join(lines)
    return function


# The invariants without a verdict, by the core's number of what it left open: its sums, then the
# suspects of list, ids, heap, events.
_OPEN = (
    ("I5 index", "I5 sequence", "counts"),
    ("free list",),
    ("I5 index", "I5 sequence", "counts"),
    ("I2 map",),
    ("I2 extents", "I2 map"),
    ("I5 index",),
    ("I5 index",),
    ("I2 map",),
    ("E1 events",),
)


class CheckReport(msgspec.Struct, frozen=True):
    """What `DomainList.check` found; true if nothing is wrong.

    `problems` are pairs of an invariant's name and what contradicts it; `counts` says how much was
    tested. `unsettled` are pairs of an invariant and why there is no full verdict: no fault was
    found, but its lock was not free in time, or the list was too large to stop writers while it is
    counted. `longest_hold` is the longest time, in seconds, that the check held a lock; usually it
    needs none.

    >>> from shmdomains import DomainList
    >>> report = DomainList().check()
    >>> bool(report), report.problems
    (True, [])
    """

    problems: list[tuple[str, str]]
    counts: dict[str, int]
    unsettled: list[tuple[str, str]] = []
    longest_hold: float = 0.0

    def __bool__(self) -> bool:
        return not self.problems


def unsettled(open: Sequence[tuple[int, str]]) -> list[tuple[str, str]]:
    """Return `CheckReport.unsettled` for the core's numbers of what it left open.

    >>> unsettled([(4, "writers were at work")])
    [('I2 extents', 'writers were at work'), ('I2 map', 'writers were at work')]
    """
    return list(dict.fromkeys((name, why) for number, why in open for name in _OPEN[number]))


_REBUILT = {
    "list": "UUID and name index, free list and counts rebuilt",
    "id": "id index rebuilt",
    "event": "the last commit's events published, or dropped",
    "heap": "map of used space rebuilt",
    "mutex": "its next holder is told",
    "domain": "what its holder had not committed is rolled back",
    "files": "they are what its record says",
}


class Repair(msgspec.Struct, frozen=True):
    """One lock that `DomainList.recover` took over.

    `lock` is ``"list"``, ``"id"``, ``"event"``, ``"heap"``, ``"mutex"``, ``"domain"``, or
    ``"files"`` if a rule was killed between a record and its files; `name` is the named lock's or
    the domain's, ``None`` for an empty slot. `died` is the dead holder (of the core's own locks
    only the thread is known), ``None`` for files, and if this repair had been put off earlier.

    >>> print(Repair("domain", "web1", LockHolder(7, 7, None, None, False, None)))
    domain 'web1': process 7 died holding it; what its holder had not committed is rolled back
    """

    lock: str
    name: str | None
    died: LockHolder | None

    @property
    def what(self) -> str:
        """What was repaired."""
        return _REBUILT[self.lock]

    def __str__(self) -> str:
        why = "its repair had been put off"
        if self.lock == "files":
            why = "a rule that was killed had begun to change them"
        if self.died is not None:
            why = f"{self.died.who} died holding it"
        return f"{lock_text(self.lock, self.name)}: {why}; {self.what}"


class HeldLock(msgspec.Struct, frozen=True):
    """A lock that `DomainList.recover` left alone: its holder lives, or it was not free in time."""

    lock: str
    name: str | None
    holder: LockHolder | None

    def __str__(self) -> str:
        return f"{lock_text(self.lock, self.name)}: held by {self.holder or 'an unknown process'}"


class RecoverReport(msgspec.Struct, frozen=True):
    """What `DomainList.recover` did: repairs, locks that others hold, bytes of garbage freed.

    >>> from shmdomains import DomainList
    >>> DomainList().recover().repairs
    []
    """

    repairs: list[Repair]
    held: list[HeldLock]
    freed: int


def lock_text(lock: str, name: str | None) -> str:
    """Name a lock for people.

    >>> lock_text("id", None), lock_text("domain", "web1"), lock_text("domain", None)
    ('id lock', "domain 'web1'", 'a slot without a domain')
    """
    if lock == "files":
        return f"files of domain {name!r}"
    if lock == "mutex":
        return "a named lock with a damaged name" if name is None else f"mutex {name!r}"
    if lock == "job":
        return f"a job of domain {name!r}"
    if lock != "domain":
        return f"{lock} lock"
    return "a slot without a domain" if name is None else f"domain {name!r}"
