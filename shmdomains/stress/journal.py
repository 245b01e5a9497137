"""Who is who in a stress run, and what its workers write down outside of the segment.

The segment under test cannot be its own witness. Each worker has a page in a second memfd, the
journal, that outlives it: an *intent* before it changes anything, an *acknowledgement* after the
package said that it was done. A worker is killed between any two instructions, so a page is valid
at each of them:

    intent         target and value first, then the word that says what is intended
    acknowledged   the counter, or the table of own domains, first; then the intent is cleared

So at most one operation of a killed worker is in doubt, and `settle` finds out which way it went:
the counters in a domain are kept per worker, and a dead worker's counter moves no more.

Nobody but worker `w` writes page `w`, and `settle` for it once it is dead. Nothing is written to
any file system, and everything is gone with the last process.
"""

from __future__ import annotations

import enum
import mmap
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import context as mp_context
from multiprocessing import reduction
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from ..errors import Busy, LockTimeout

if TYPE_CHECKING:
    from ..memory.domain import Domain
    from ..opening import AnyDomainList
    from ..rules.info import DomainInfo
    from ..xml.definition import DomainDef

OWN = 8  # domains that each worker may have defined at a time
LONG_WAIT_NS = 1_000_000
MAX_IDS = 50_000_000  # ids that a worker can note down; then it activates nothing any more


class Kind(enum.IntEnum):
    """What is measured: the rows of the table."""

    GET_UUID = 0
    GET_NAME = 1
    GET_ID = 2
    FIND_UUID = 3
    FIND_NAME = 4
    FIND_ID = 5
    ACTIVATE = 6
    DEACTIVATE = 7
    ASSIGN = 8
    ROLL_BACK = 9
    DEFINE = 10
    REMOVE = 11
    RENAME = 12
    VISIT = 13
    PEEK = 14
    SNAPSHOT = 15

    @property
    def label(self) -> str:
        return _LABELS[self]


_LABELS = {
    Kind.GET_UUID: "get by uuid, change",
    Kind.GET_NAME: "get by name, change",
    Kind.GET_ID: "get by id, change",
    Kind.FIND_UUID: "list lock, find by uuid, change",
    Kind.FIND_NAME: "list lock, find by name, change",
    Kind.FIND_ID: "list lock, find by id, change",
    Kind.ACTIVATE: "activate",
    Kind.DEACTIVATE: "deactivate",
    Kind.ASSIGN: "assign a definition",
    Kind.ROLL_BACK: "change and roll back",
    Kind.DEFINE: "define",
    Kind.REMOVE: "remove",
    Kind.RENAME: "rename",
    Kind.VISIT: "visit what others define",
    Kind.PEEK: "peek",
    Kind.SNAPSHOT: "snapshot",
}


class Intent(enum.IntEnum):
    """What a worker is about to change."""

    NOTHING = 0
    CHANGE = 1  # target: a domain; value: the worker's own count of changes after it
    DEFINE = 2  # target: a place in the table of own domains; value: serial number
    REMOVE = 3  # target: a place in that table
    RENAME = 4  # target: a place in that table; value: number of renames after it


class Wrong(Exception):
    """The promise of the package that was found broken: something is lost or torn."""


class Plan(msgspec.Struct, frozen=True):
    """The domains of a run by number, the same in every process.

    Targets 0 to ``len(loaded) - 1`` were loaded, those up to ``domains - 1`` are clones, and
    ``domains + place`` is what the asking worker defined itself. Names and UUIDs of clones are
    computed: nobody carries a table of a million.
    """

    tag: bytes  # 6 random bytes
    loaded: list[tuple[bytes, str]]
    domains: int
    workers: int
    separator: str
    lock_timeout: float
    hosts: int = 1
    url: str = ""  # of a list on a server
    server_dies: bool = False

    def uuid_of(self, target: int) -> bytes:
        """The UUID of a loaded domain or a clone."""
        if target < len(self.loaded):
            return self.loaded[target][0]
        return self.tag + b"\x40\x00\x80" + target.to_bytes(7, "big")

    def name_of(self, target: int) -> str:
        """The name of a loaded domain or a clone."""
        count = len(self.loaded)
        if target < count:
            return self.loaded[target][1]
        suffix = f"{self.separator}{target}"
        name = self.loaded[target % count][1].encode()[: 251 - len(suffix)]
        return name.decode("utf-8", "ignore") + suffix

    def own_uuid(self, worker: int, serial: int) -> bytes:
        return self.tag + b"\x40\x01\x80" + worker.to_bytes(2, "big") + serial.to_bytes(5, "big")

    def own_name(self, worker: int, serial: int, renames: int) -> str:
        return f"stress-{self.tag.hex()}-{worker}-{serial}" + (f"-{renames}" if renames else "")

    def number_of(self, uuid: bytes) -> int | None:
        """The target that a clone's UUID is of; ``None``: it is no clone's."""
        if uuid[:9] != self.tag + b"\x40\x00\x80":
            return None
        return int.from_bytes(uuid[9:], "big")


def separator_for(names: list[str]) -> str:
    """What to put between a name and a number so that no clone is called like a loaded domain."""
    separator = "~"
    while any(re.search(re.escape(separator) + r"\d+$", name) for name in names):
        separator += "~"
    return separator


# --- the pages ------------------------------------------------------------------------------

_HEAD = 48
_BUCKETS = 320
_KINDS = len(Kind)
_WAITS = _HEAD
_HISTOGRAM = _WAITS + 2 * _KINDS
_OWN_TABLE = _HISTOGRAM + _KINDS * _BUCKETS
_WORDS = _OWN_TABLE + 2 * OWN
_TEXT_BYTES = 4096


class Word(enum.IntEnum):
    """The words at the beginning of a page."""

    INTENT = 0
    TARGET = 1
    VALUE = 2
    READY = 3  # incarnations that got to work
    STEPS = 4
    DOING = 5  # Kind + 1 of the operation that runs
    IDS = 6
    RECOVERIES = 7  # times that `previous_owner_died` said so
    SERIAL = 8  # the last one that was given to a domain of one's own
    READS = 9  # records looked at whole and found whole
    MISSES = 10
    TEXT = 11  # length of the failure's text
    IN_DOUBT = 12  # changes in flight when a worker or the server was killed: all, and
    KEPT = 13  # those that were kept
    IDS_BEFORE = 14  # IDS when the intent was noted
    LOST = 15  # operations that ended with LockLost,
    DOUBTED = 16  # with InDoubt,
    AWAY = 17  # with Unavailable


def bucket_of(ns: int) -> int:
    """The histogram bucket of a duration: eight to each power of two.

    >>> [bucket_of(ns) for ns in (0, 15, 16, 1000, 1 << 60)]
    [0, 15, 16, 63, 319]
    """
    shift = max(ns.bit_length() - 4, 0)
    return min(shift * 8 + (ns >> shift), _BUCKETS - 1)


def duration_of(bucket: int) -> float:
    """The middle of a bucket, in nanoseconds.

    >>> duration_of(bucket_of(1000))
    992.0
    """
    if bucket < 16:
        return float(bucket)
    shift = bucket // 8 - 1
    return (bucket - shift * 8 + 0.5) * (1 << shift)


class Page:
    """One worker's part of the journal."""

    def __init__(self, memory: memoryview, layout: _Layout) -> None:
        words, acked, ids, text = layout.parts(memory)
        self.words = words.cast("Q")
        self.acked = acked.cast("I")
        self.ids = ids.cast("I")
        self._text = text

    def intend(self, intent: Intent, target: int, value: int = 0) -> None:
        """Note what is about to be changed. The word that makes it count comes last."""
        words = self.words
        words[Word.TARGET] = target
        words[Word.VALUE] = value
        words[Word.IDS_BEFORE] = words[Word.IDS]
        words[Word.INTENT] = intent

    def forget_intent(self) -> None:
        """It is acknowledged, or nothing was done."""
        self.words[Word.INTENT] = Intent.NOTHING

    def own(self, place: int) -> tuple[int, int]:
        """(serial, renames) of a domain that the worker defined; serial 0: none."""
        at = _OWN_TABLE + 2 * place
        return self.words[at], self.words[at + 1]

    def set_own(self, place: int, serial: int, renames: int) -> None:
        at = _OWN_TABLE + 2 * place
        self.words[at + 1] = renames
        self.words[at] = serial

    def add(self, word: Word, amount: int = 1) -> None:
        self.words[word] += amount

    def note(self, kind: Kind, took: int, waited: int) -> None:
        """Enter one operation: its duration and what of it was waiting, in nanoseconds."""
        words = self.words
        words[_HISTOGRAM + kind * _BUCKETS + bucket_of(took)] += 1
        if waited > LONG_WAIT_NS:
            at = _WAITS + 2 * kind
            words[at] += 1
            words[at + 1] = max(words[at + 1], waited)

    def histogram(self, kind: Kind) -> list[int]:
        at = _HISTOGRAM + kind * _BUCKETS
        return self.words[at : at + _BUCKETS].tolist()

    def waits(self, kind: Kind) -> tuple[int, int]:
        """(number of long waits, the longest in nanoseconds)."""
        at = _WAITS + 2 * kind
        return self.words[at], self.words[at + 1]

    def log_id(self, id: int) -> bool:
        """Note an id that was given out. Returns whether there is room for more."""
        count = self.words[Word.IDS]
        self.ids[count] = id
        self.words[Word.IDS] = count + 1
        return count + 1 < len(self.ids)

    @property
    def text(self) -> str:
        """What the worker died of, in one line; empty if it did not say."""
        size = min(self.words[Word.TEXT], len(self._text))
        return bytes(self._text[:size]).decode("utf-8", "replace")

    @text.setter
    def text(self, text: str) -> None:
        raw = text.encode("utf-8", "replace")[: len(self._text)]
        self._text[: len(raw)] = raw
        self.words[Word.TEXT] = len(raw)

    @property
    def doing(self) -> str:
        """The operation that runs, in words."""
        number = self.words[Word.DOING]
        return Kind(number - 1).label if 0 < number <= _KINDS else "nothing"


class _Layout(msgspec.Struct, frozen=True):
    """Where the parts of a page lie. Sparse: what is never touched takes no memory."""

    targets: int
    ids: int

    def _sizes(self) -> tuple[int, int, int, int]:
        return _WORDS * 8, (self.targets + OWN) * 4, self.ids * 4, _TEXT_BYTES

    @property
    def size(self) -> int:
        return sum(_whole_pages(size) for size in self._sizes())

    def parts(self, memory: memoryview) -> Iterator[memoryview]:
        at = 0
        for size in self._sizes():
            yield memory[at : at + size]
            at += _whole_pages(size)


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


class Journal:
    """The pages of all workers, and the word that ends the run. Pickles to spawned children."""

    def __init__(self, workers: int, targets: int, seconds: float) -> None:
        ids = min(65_536 + int(seconds * 200_000), MAX_IDS)
        self._layout = _Layout(targets, ids)
        self._workers = workers
        self._fd = os.memfd_create("shmdomains-stress", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, mmap.PAGESIZE + workers * self._layout.size)
        self._map()

    def _map(self) -> None:
        memory = memoryview(mmap.mmap(self._fd, 0))
        self._control = memory[: mmap.PAGESIZE].cast("Q")
        begin, size = mmap.PAGESIZE, self._layout.size
        self.pages = [
            Page(memory[begin + w * size : begin + (w + 1) * size], self._layout)
            for w in range(self._workers)
        ]

    @property
    def stopped(self) -> bool:
        return bool(self._control[0])

    def stop(self) -> None:
        """Tell all workers to finish the operation that runs and end."""
        self._control[0] = 1

    def close(self) -> None:
        os.close(self._fd)

    def __reduce__(self) -> tuple[Any, ...]:
        assert mp_context.get_spawning_popen() is not None, "passed to Process only"
        return _restore, (reduction.DupFd(self._fd), self._workers, self._layout)


def _restore(fd: Any, workers: int, layout: _Layout) -> Journal:
    journal = Journal.__new__(Journal)
    journal._fd, journal._workers, journal._layout = fd.detach(), workers, layout
    journal._map()
    return journal


# --- what stands in a domain ----------------------------------------------------------------


class Mark(msgspec.Struct, frozen=True):
    """What the workers keep in a domain's `data`; all of it stands elsewhere in the record too.

    A commit that is torn anywhere - between the fields, the blobs and the name - shows as a
    contradiction.
    """

    count: int  # changes; the definition's description says it as well
    next: int  # what the next definition's description says; 0: there is none
    state: int
    reason: int
    id: int
    by: tuple[int, ...]  # changes by each worker


def description_of(count: int) -> str:
    return f"stress: changed {count} times"


def next_description_of(count: int) -> str:
    return f"stress: next definition, given at {count}"


def verify(record: Domain | DomainInfo, workers: int) -> Mark:
    """Return the record's mark; raise `Wrong` if the parts of the record contradict each other."""
    definition, data = record.definition, record.data
    name = record.name
    if definition.name != name or definition.uuid != record.uuid:
        raise Wrong(
            f"torn: domain {name!r} {record.uuid} has the definition of {definition.name!r} "
            f"{definition.uuid}"
        )
    id = record.id
    if data is None:
        if id != -1:
            raise Wrong(f"torn: domain {name!r} has id {id}, and no data")
        return Mark(0, 0, 5, 0, -1, (0,) * workers)
    try:
        mark = Mark(*data)
        total = sum(mark.by)
    except TypeError:
        raise Wrong(f"torn: domain {name!r} has the data {data!r}") from None
    found = _what_stands(record, definition)
    noted = (
        total,
        description_of(mark.count),
        next_description_of(mark.next) if mark.next else None,
        mark.state,
        mark.reason,
        mark.id,
    )
    if found != noted[1:] or total != mark.count or len(mark.by) != workers:
        raise Wrong(f"torn: domain {name!r} has the data {data!r}, but stands at {found}")
    return mark


def _what_stands(record: Domain | DomainInfo, definition: DomainDef) -> tuple[object, ...]:
    successor = record.next_definition
    return (
        definition.description,
        None if successor is None else successor.description,
        int(record.state),
        int(record.reason),
        record.id,
    )


# --- after a death --------------------------------------------------------------------------


def settle(doms: AnyDomainList, journal: Journal, plan: Plan, worker: int, timeout: float) -> None:
    """Decide what a dead worker was about to do, from what is committed.

    Raises `Wrong` if it is neither the old nor the new state, `Busy` or `LockTimeout` if it cannot
    be read within `timeout` seconds.
    """
    page = journal.pages[worker]
    intent, target, value = page.words[: Word.VALUE + 1]
    if intent == Intent.NOTHING:
        return
    if plan.url:
        _wait_for_its_session(doms, page, plan, worker, timeout)
    if intent == Intent.CHANGE:
        _settle_change(doms, page, plan, worker, timeout)
    elif intent == Intent.DEFINE:
        info = patient_peek(doms, plan.own_uuid(worker, value), timeout)
        if info is not None:
            page.acked[plan.domains + target] = 0
            page.set_own(target, value, 0)
    else:
        serial, renames = page.own(target)
        info = None
        if serial:
            info = patient_peek(doms, plan.own_uuid(worker, serial), timeout)
        if intent == Intent.REMOVE and info is None:
            page.set_own(target, 0, 0)
        elif intent == Intent.RENAME:
            names = {plan.own_name(worker, serial, number): number for number in (renames, value)}
            if info is None or info.name not in names:
                raise Wrong(f"lost: worker {worker} died renaming domain {serial}; it is {info}")
            page.set_own(target, serial, names[info.name])
    page.forget_intent()


def _wait_for_its_session(
    doms: AnyDomainList, page: Page, plan: Plan, worker: int, timeout: float
) -> None:
    """A server may still be at a dead worker's last statement. It has the locks of what it does, so
    what is read after them is decided."""
    intent, target, value = page.words[: Word.VALUE + 1]
    if intent == Intent.CHANGE:
        uuid = _target_of_change(page, plan, worker)
    else:
        serial = value if intent == Intent.DEFINE else page.own(target)[0]
        uuid = plan.own_uuid(worker, serial)
    with doms.locked(timeout):
        dom = doms.find_by_uuid(uuid, timeout)
    if dom is not None:
        if dom.previous_owner_died is not None:
            page.add(Word.RECOVERIES)
        dom.unlock()


def _target_of_change(page: Page, plan: Plan, worker: int) -> bytes:
    target = page.words[Word.TARGET]
    if target < plan.domains:
        return plan.uuid_of(target)
    return plan.own_uuid(worker, page.own(target - plan.domains)[0])


def _settle_change(
    doms: AnyDomainList, page: Page, plan: Plan, worker: int, timeout: float
) -> None:
    target, value = page.words[Word.TARGET], page.words[Word.VALUE]
    uuid = _target_of_change(page, plan, worker)
    info = patient_peek(doms, uuid, timeout)
    if info is None:
        raise Wrong(f"lost: domain {UUID(bytes=uuid)}, which worker {worker} was changing")
    counted = verify(info, plan.workers).by[worker]
    if counted not in (value - 1, value):
        raise Wrong(
            f"lost: domain {info.name!r} has {counted} changes by worker {worker}, which died with "
            f"{value - 1} acknowledged and one in flight"
        )
    if page.acked[target] == value:  # it had come back; only the intent was not cleared yet
        if counted != value:
            raise Wrong(f"lost: an acknowledged change of {info.name!r} by worker {worker}")
        return
    if counted != value and plan.server_dies:
        # A server that is killed forgets ids that no commit used, and gives them again.
        page.words[Word.IDS] = page.words[Word.IDS_BEFORE]
    page.acked[target] = counted
    page.add(Word.IN_DOUBT)
    page.add(Word.KEPT, counted - (value - 1))


def patient_peek(doms: AnyDomainList, uuid: bytes, timeout: float) -> DomainInfo | None:
    """`peek`, with help for an index whose dead holder left it for the next one to repair."""
    end = time.monotonic() + timeout
    while True:
        try:
            return doms.peek(uuid=uuid, definitions=True)
        except Busy:
            if time.monotonic() >= end:
                raise
        with suppress(LockTimeout), doms.locked(1.0):
            pass
