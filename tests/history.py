"""What workers did with a list of domains: recorded so that a SIGKILL loses nothing, and what it
says about each domain, the names and the ids.

Recording. Every worker appends to a file of its own, one `write` for each entry: *before* the call
what is going to be done, under the domain's lock and before the commit what is going to be
committed, and after the call how it ended. What a process has written stays when it is killed; an
entry cut short at the end of a file counts as not written. So of a killed worker's last operation
it is known what it may have committed, and since the dead commit nothing, when at the latest.

Meaning. `objects` splits the entries of all workers by object, each of which is checked alone:

- a domain: its record, or None. A change is a compare-and-swap of all that can be seen of it: what
  was seen under the lock is what was committed before, and nobody came in between. Each change
  writes a mark that no other has, so no state comes back.
- the names: which domain has which, for nothing may ever have two domains or two places. This is
  where it is decided whether a miss, a definition, a refusal or a renaming was right.
- the ids, which only ever rise.

What an operation that was refused, rolled back or late (`LockTimeout`) would have written must
never be seen. An error that nobody expects fits no state.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
from linear import Operation, State

from shmdomains import Domain, DomainDef, DomainInfo

# --- what can be seen of a domain -----------------------------------------------------------------


class Record(NamedTuple):
    name: str
    id: int
    state: str
    data: str | None
    definition: str
    next: str | None
    persistent: bool

    def __str__(self) -> str:
        kept = "persistent" if self.persistent else "transient"
        text = f"{self.name} id {self.id} {self.state} data {self.data} def {self.definition}"
        return f"{text} next {self.next} {kept}" if self.next else f"{text} {kept}"

    def changes(self, before: Record) -> str:
        pairs = zip(self._fields, before, self, strict=True)
        return ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)


def number_of(dom: Domain | DomainInfo) -> int:
    return dom.uuid.int - 1


def record_of(dom: Domain | DomainInfo) -> Record:
    """Of a locked domain with the changes that were made to it, or of a committed state."""
    successor = dom.next_definition
    return Record(
        dom.name,
        dom.id,
        dom.state.name,
        _mark(dom.data),
        _version(dom, dom.definition),
        None if successor is None else _version(dom, successor),
        dom.persistent,
    )


def _mark(data: Any) -> str | None:
    """Data are one mark, many times over, so that half of it is seen to be half."""
    if data is None:
        return None
    return str(data[0]) if len(set(data)) == 1 else f"torn: {data}"


def _version(dom: Domain | DomainInfo, definition: DomainDef) -> str:
    if (definition.name, definition.uuid) == (dom.name, dom.uuid):
        return str(definition.title)
    return f"torn: {definition.title} of {definition.name} {definition.uuid}"


# --- recording ------------------------------------------------------------------------------------


class Recorder:
    """A worker's file."""

    def __init__(self, folder: Path, who: str) -> None:
        self._fd = os.open(folder / who, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)

    def call(self, **what: Any) -> None:
        """Before the call."""
        self._write({"start": time.monotonic_ns(), **what})

    def will(self, **what: Any) -> None:
        """Before the commit."""
        self._write(what)

    def done(self, **what: Any) -> None:
        """After the call."""
        self._write({"end": time.monotonic_ns(), **what})

    def _write(self, what: dict[str, Any]) -> None:
        os.write(self._fd, msgpack.packb(what))


@dataclass
class Entry:
    """One operation as it was recorded. Without an outcome, its worker was killed in it."""

    who: str
    start: int
    do: str  # look, snapshot, change, rename, define, undefine or remove
    how: str  # the method
    end: int = 0
    by: str = "uuid"
    key: Any = None
    number: int | None = None  # the domain that is asked for, where that is known
    name: str = ""  # to define, or the new one
    version: str = ""
    persistent: bool | None = None
    since: int = 0  # when a handle that has outlived its domain was got
    seen: list[tuple[int, Record]] = field(default_factory=list)
    wrote: Record | None = None
    outcome: str | None = None

    def __post_init__(self) -> None:
        self.seen = [(number, Record(*record)) for number, record in self.seen]
        self.wrote = Record(*self.wrote) if self.wrote else None

    @property
    def call(self) -> str:
        what = f"{self.by}={self.key!r}" if self.key is not None else ""
        if self.do == "define":
            what = f"vm{self.number} {self.name}, {self.version}"
        elif self.name:
            what += f", {self.name}"
        return f"{self.how}({what})"

    @property
    def text(self) -> str:
        """For who reads a contradiction."""
        parts = [f"{self.call}: {self.outcome or 'killed'}"]
        parts += [f"vm{number} was {record}" for number, record in self.seen]
        if self.wrote and self.seen:
            parts.append(f"wrote {self.wrote.changes(self.seen[0][1])}")
        return "; ".join(parts)


def read(folder: Path, deaths: dict[str, int]) -> list[Entry]:
    """What all workers have recorded; `deaths` says when at the latest the killed ones died."""
    return [entry for file in sorted(folder.iterdir()) for entry in _entries(file, deaths)]


def _entries(file: Path, deaths: dict[str, int]) -> Iterable[Entry]:
    unpacker = msgpack.Unpacker(strict_map_key=False)
    unpacker.feed(file.read_bytes())
    operations: list[dict[str, Any]] = []
    for what in unpacker:
        if "start" in what:
            operations.append({"end": deaths.get(file.name, 0)})
        operations[-1].update(what)
    for number, what in enumerate(operations, 1):
        killed_in = number == len(operations) and file.name in deaths
        assert "outcome" in what or killed_in, f"{file.name} did not record how {what} ended"
        yield Entry(file.name, **what)


# --- meaning --------------------------------------------------------------------------------------

Step = Callable[[State], Collection[State]]
Names = tuple["str | None", ...]  # of domain 0, 1, ...


class History(NamedTuple):
    """What was done to one object, which was `initial` before."""

    what: str
    operations: list[Operation]
    initial: State


def objects(entries: list[Entry], domains: int) -> list[History]:
    """Split what was recorded about a list that was empty at first, and had so many domains."""
    split = _Split()
    for entry in entries:
        if entry.outcome != "late":
            _MEANING[entry.do](split, entry)
    return [
        *(History(f"domain {n}", split.domains[n], None) for n in range(domains)),
        History("the names", split.names, (None,) * domains),
        History("the ids", split.ids, -1),
    ]


class _Split:
    def __init__(self) -> None:
        self.domains: dict[int, list[Operation]] = defaultdict(list)
        self.names: list[Operation] = []
        self.ids: list[Operation] = []

    def saw(self, entry: Entry, number: int, record: Record | None) -> None:
        text = f"{entry.call}: vm{number} {f'was {record}' if record else 'was not there'}"
        name = record and record.name
        self.read(self.domains[number], entry, lambda state: state == record, text)
        self.read(self.names, entry, lambda names: names[number] == name, text)

    def read(
        self, place: list[Operation], entry: Entry, fits: Callable[[Any], bool], text: str = ""
    ) -> None:
        """A killed worker's reads say nothing."""
        if entry.outcome is not None:
            start, text = entry.since or entry.start, text or entry.text
            step = lambda state: (state,) if fits(state) else ()  # noqa: E731
            place.append(Operation(entry.who, start, entry.end, step, text, reads=True))

    def write(self, place: list[Operation], entry: Entry, step: Callable[[Any], Any]) -> None:
        maybe = entry.outcome is None
        place.append(Operation(entry.who, entry.start, entry.end, step, entry.text, maybe=maybe))

    def nonsense(self, entry: Entry) -> None:
        """It fits no state of anything, if it ended at all."""
        self.read(self.names, entry, lambda names: False)


def _look(split: _Split, entry: Entry) -> None:
    key = entry.key
    if entry.outcome == "missing" and entry.by == "name":
        split.read(split.names, entry, lambda names: key not in names)
    elif entry.outcome == "missing" and entry.by == "id":
        gone = split.domains[_number(entry)]
        split.read(gone, entry, lambda record: record is None or record.id != key)
    elif entry.outcome in ("missing", "removed"):
        split.saw(entry, _number(entry), None)
    elif _is_asked_for(entry):
        for number, record in entry.seen:
            split.saw(entry, number, record)
    else:
        split.nonsense(entry)


def _is_asked_for(entry: Entry) -> bool:
    if entry.outcome is None:
        return True
    if entry.outcome not in ("done", "rolled back", "exists", "active") or not entry.seen:
        return False
    return _has_key(entry, *entry.seen[0])


def _has_key(entry: Entry, number: int, record: Record) -> bool:
    return entry.key == {"uuid": number, "name": record.name, "id": record.id}[entry.by]


def _number(entry: Entry) -> int:
    assert entry.number is not None, entry
    return entry.number


def _snapshot(split: _Split, entry: Entry) -> None:
    """Each record of it is one read. What is not in it was away for a moment at least: a domain
    that lives stays in its place. It may be twice in it, if it was defined again behind."""
    if entry.outcome != "done":
        split.nonsense(entry)
        return
    for number, record in entry.seen:
        split.saw(entry, number, record)
    for number in set(range(_number(entry))) - {number for number, _ in entry.seen}:
        split.saw(entry, number, None)


def _change(split: _Split, entry: Entry) -> None:
    saw = entry.seen[0] if entry.seen else None
    wrote = entry.wrote
    if saw is None or wrote is None or entry.outcome not in (None, "done"):
        _look(split, entry)
        return
    if not _is_asked_for(entry):
        split.nonsense(entry)
    number, before = saw
    split.write(split.domains[number], entry, lambda s: (wrote,) if s == before else ())
    if wrote.name == before.name:
        split.read(split.names, entry, lambda names: names[number] == wrote.name)
    else:
        split.write(split.names, entry, lambda names: _renamed(names, number, before, wrote))
    if wrote.id not in (before.id, -1):
        split.write(split.ids, entry, lambda last: (wrote.id,) if last < wrote.id else ())


def _renamed(names: Names, number: int, before: Record, after: Record) -> Collection[Names]:
    fits = names[number] == before.name and after.name not in names
    return (_with(names, number, after.name),) if fits else ()


def _with(names: Names, number: int, name: str | None) -> Names:
    return (*names[:number], name, *names[number + 1 :])


def _rename(split: _Split, entry: Entry) -> None:
    if entry.outcome == "exists":
        split.read(split.names, entry, lambda names: entry.name in names)
    if entry.outcome in ("active", "done"):
        _, record = entry.seen[0]
        if (record.id == -1) == (entry.outcome == "active"):
            split.nonsense(entry)
    _change(split, entry)


def _define(split: _Split, entry: Entry) -> None:
    number, name = _number(entry), entry.name

    def refused(names: Names) -> bool:
        return names[number] != name and (names[number] is not None or name in names)

    def entered(names: Names) -> Collection[Names]:
        return () if refused(names) else (_with(names, number, name),)

    if entry.outcome == "exists":
        split.read(split.names, entry, refused)
    elif entry.outcome not in (None, "done"):
        split.nonsense(entry)
    else:
        split.write(split.domains[number], entry, lambda record: _defined(record, entry))
        split.write(split.names, entry, entered)


def _defined(record: Record | None, entry: Entry) -> Collection[Record]:
    version = entry.version
    if record is None:
        after = Record(entry.name, -1, "SHUTOFF", None, version, None, bool(entry.persistent))
    elif record.name != entry.name:
        return ()
    else:
        kept = record.persistent if entry.persistent is None else entry.persistent
        where = "definition" if record.id == -1 else "next"
        after = record._replace(persistent=kept, **{where: version})
    # What it became was seen before the domain was given back.
    return (after,) if not entry.seen or entry.seen[0] == (entry.number, after) else ()


def _undefine(split: _Split, entry: Entry) -> None:
    if entry.outcome == "missing":
        _look(split, entry)
        return
    if entry.number is None or entry.outcome not in (None, "done", "transient"):
        split.nonsense(entry)
        return
    number = entry.number

    def is_meant(record: Record | None) -> bool:
        return record is not None and _has_key(entry, number, record)

    def undefined(record: Record | None) -> Collection[Record | None]:
        if record is None or not is_meant(record):
            return ()
        if record.id == -1:
            return (None,)
        return (record._replace(persistent=False),) if record.persistent else ()

    def without(names: Names) -> Collection[Names]:
        """Only the domain's own history knows whether it was active, and stays."""
        return (_with(names, number, None), names) if names[number] is not None else ()

    if entry.outcome == "transient":
        split.read(
            split.domains[number],
            entry,
            lambda record: is_meant(record) and record.id != -1 and not record.persistent,
        )
        return
    split.write(split.domains[number], entry, undefined)
    split.write(split.names, entry, without)


def _remove(split: _Split, entry: Entry) -> None:
    number = _number(entry)
    domain = split.domains[number]
    if entry.outcome == "active":
        split.read(domain, entry, lambda record: record is not None and record.id != -1)
    elif entry.outcome in (None, "done"):
        split.write(domain, entry, lambda r: (None,) if r is not None and r.id == -1 else ())
        split.write(
            split.names, entry, lambda n: () if n[number] is None else (_with(n, number, None),)
        )
    else:
        split.nonsense(entry)


_MEANING: dict[str, Callable[[_Split, Entry], None]] = {
    "look": _look,
    "snapshot": _snapshot,
    "change": _change,
    "rename": _rename,
    "define": _define,
    "undefine": _undefine,
    "remove": _remove,
}
