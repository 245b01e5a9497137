"""A store of another kind: plain dicts and `threading` locks, behind the unedited rules.

It proves that the seam is one. The conformance suite, the state machine and the tests of config
directories run on it beside the two kinds of shared memory; what it cannot do (other processes, a
killed holder) stands in its entry in `helpers.STORES`.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

from shmdomains.config.change import ConfigDirs
from shmdomains.deadline import Deadline
from shmdomains.errors import SegmentFull, TooManyMutexes
from shmdomains.events import DomainEvent, detail_of
from shmdomains.holder import LockHolder
from shmdomains.memory import holder
from shmdomains.memory._core import core
from shmdomains.rules.compare import compare
from shmdomains.rules.info import DomainInfo
from shmdomains.rules.plain import PlainDomainList
from shmdomains.rules.store import Changes, Key, NewDomain, News
from shmdomains.rules.values import decode_data
from shmdomains.rules.work import Caller, Work

SLICE = 0.05  # seconds, of a sleep


class OwnedLock:
    """A lock that can say who holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: tuple[int, float] | None = None  # native thread id, since when

    def acquire(self, what: str, timeout: float | None) -> None:
        got = self._lock.acquire(timeout != 0, -1 if timeout in (None, 0) else timeout)
        if got:
            self._owner = threading.get_native_id(), time.monotonic()
            return
        tid, since = self._owner or (0, 0.0)
        raise holder.lock_timeout(what, timeout, tid, os.getpid(), 0, time.monotonic() - since)

    def release(self) -> None:
        self._owner = None
        self._lock.release()


class Record:
    """What is committed of one domain, under its lock."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.lock = OwnedLock()
        self.values = values
        self.commits = 0
        self.gone = False

    def info(self) -> DomainInfo:
        values = dict(self.values)  # one look: a commit replaces the dict
        data, work = values.pop("data"), values.pop("work")
        blobs = (
            values.pop("definition"),
            values.pop("next_definition"),
            None if data is None else decode_data(data),
        )
        return DomainInfo(
            **values,
            blobs=blobs,
            work=None if work is None else Work.decode(work),
            describe=describe,
        )


def describe(caller: Caller) -> LockHolder:
    return holder.holder_of(caller.pid, caller.tid, caller.start)


class DictStore:
    """`rules.store.Store`, in this process's memory. A record is named by a number."""

    def __init__(self, room: int, events: int) -> None:
        self._room = room
        self._list = OwnedLock()
        self._records: dict[int, Record] = {}
        self._numbers = itertools.count()
        self._ids = itertools.count(1)
        self._dirs: ConfigDirs | None = None
        self._driver: str | None = None
        self.events_max = events
        self._events: deque[DomainEvent] = deque(maxlen=events)
        self._count = 0
        self._happened = threading.Condition()
        self._changed = threading.Condition()
        self._changes = 0
        self._mutexes: dict[str, OwnedLock] = {}
        self._naming = threading.Lock()

    def lock_list(self, timeout: float | None) -> None:
        self._list.acquire("the list lock", timeout)

    def unlock_list(self) -> None:
        self._list.release()

    def find(self, key: Key) -> int | None:
        for number, record in list(self._records.items()):
            if record.values[key.kind] == key.value != -1:
                return number
        return None

    def read(self, record: int) -> DomainInfo | None:
        there = self._records.get(record)
        return None if there is None else there.info()

    def records(self) -> Iterable[int]:
        return list(self._records)

    def lock(self, record: int, timeout: float | None) -> DomainInfo | None:
        there = self._records.get(record)
        if there is None:
            return None
        there.lock.acquire(f"domain {there.values['name']!r}", timeout)
        if there.gone:
            there.lock.release()
            return None
        return there.info()

    def unlock(self, record: int, seen: bool) -> None:
        if record in self._records:
            self._records[record].lock.release()

    def insert(
        self, new: NewDomain, news: Sequence[News], timeout: float | None
    ) -> tuple[int, DomainInfo]:
        if len(self._records) == self._room:
            raise SegmentFull(f"define a domain: there is room for {self._room}")
        record = Record(
            {
                "id": -1,
                "pid": None,
                "host": None,
                "name": new.name,
                "uuid": new.uuid,
                "state": new.state,
                "reason": 0,
                "persistent": new.persistent,
                "autostart": False,
                "definition": new.definition,
                "next_definition": None,
                "started": 0,
                "data": None,
                "work": None if new.work is None else new.work.encode(),
            }
        )
        record.lock.acquire("a new domain", 0)
        number = next(self._numbers)
        self._records[number] = record
        self._announce(record, news)
        self._tell()
        return number, record.info()

    def commit(
        self, record: int, changes: Changes, news: Sequence[News], timeout: float | None
    ) -> DomainInfo:
        there = self._records[record]
        there.values = {**there.values, **changes}
        there.commits += 1
        self._announce(there, news)
        self._tell()
        return there.info()

    def remove(self, record: int, news: Sequence[News], timeout: float | None) -> None:
        there = self._records.pop(record)
        there.gone = True
        self._announce(there, news)
        there.lock.release()
        self._tell()

    def _announce(self, record: Record, news: Sequence[News]) -> None:
        if not self.events_max:
            return
        now, uuid = time.time(), record.values["uuid"]
        with self._happened:
            for one in news:
                self._count += 1
                event = (self._count, now, one.type, detail_of(one.type, one.detail), uuid)
                self._events.append(DomainEvent(*event, one.name, one.id))
            self._happened.notify_all()

    @property
    def event_count(self) -> int:
        return self._count

    def event(self, number: int) -> DomainEvent | None:
        with self._happened:
            behind = self._count - number
            return self._events[-1 - behind] if 0 <= behind < len(self._events) else None

    def sleep_on_events(self, count: int, timeout: float | None) -> bool:
        with self._happened:
            self._happened.wait_for(
                lambda: self._count > count, SLICE if timeout is None else min(timeout, SLICE)
            )
            return self._count > count

    def next_id(self, timeout: float | None) -> int:
        return next(self._ids)

    def receipt(self, record: int) -> object:
        there = self._records.get(record)
        return None if there is None else there.commits

    def _tell(self) -> None:
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def sleep(self, record: int, receipt: object, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.receipt(record) != receipt, timeout)

    def stamp(self) -> object:
        return self._changes

    def sleep_on_stamp(self, stamp: object, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._changes != stamp, timeout)

    def died(self, record: int) -> LockHolder | None:
        return None

    def name_mutex(self, name: str) -> None:
        with self._naming:
            if name not in self._mutexes and len(self._mutexes) == 64:
                raise TooManyMutexes(f"mutex {name!r}: there are 64 already, which is the limit")
            self._mutexes.setdefault(name, OwnedLock())

    def lock_mutex(self, name: str, timeout: float | None) -> None:
        self._mutexes[name].acquire(f"mutex {name!r}", timeout)

    def unlock_mutex(self, name: str, seen: bool) -> None:
        self._mutexes[name].release()

    def mutex_died(self, name: str) -> LockHolder | None:
        return None

    def started(self, pid: int) -> int:
        return core.process_start(pid)

    def runs(self, pid: int, started: int) -> bool:
        return core.process_runs(pid, started)

    def caller(self) -> Caller:
        return Caller(*core.caller())

    def describe(self, caller: Caller) -> LockHolder:
        return describe(caller)

    def lives(self, caller: Caller) -> bool:
        return core.thread_runs(caller.tid, caller.start)

    def remembered(self) -> ConfigDirs | None:
        return self._dirs

    def remember(self, dirs: ConfigDirs | None) -> None:
        self._dirs = dirs

    def driver(self) -> str | None:
        return self._driver

    def set_driver(self, name: str | None) -> None:
        self._driver = name


_lists: WeakValueDictionary[int, DictDomainList] = WeakValueDictionary()


class DictDomainList(PlainDomainList[int]):
    """The rules over a `DictStore`, with what the tests ask of a list besides."""

    def __init__(self, max_domains: int = 64, events: int = 16_384) -> None:
        super().__init__(DictStore(max_domains, events))
        _lists[id(self)] = self

    def check(self) -> SimpleNamespace:
        infos = self.snapshot()
        names, uuids = {info.name for info in infos}, {info.uuid for info in infos}
        ids = [info.id for info in infos if info.is_active]
        problems = []
        if not len(infos) == len(names) == len(uuids) or len(set(ids)) != len(ids):
            problems.append(("I1 identity", "two domains have one key"))
        for info in infos:
            if (info.definition.name, info.definition.uuid) != (info.name, info.uuid):
                problems.append(("I1 identity", f"'{info.name}' has another one's definition"))
        problems += [("config", text) for text in compare(self, Deadline(10))[0]]
        return SimpleNamespace(problems=problems)

    @property
    def info(self) -> SimpleNamespace:
        dirs = self._remembered()
        return SimpleNamespace(
            domains=len(self),
            heap_used=len(self),
            active=self.count(active=True),
            config_dir=None if dirs is None else str(dirs.config_dir),
            autostart_dir=None if dirs is None else str(dirs.autostart_dir),
        )

    def unlink(self) -> None:
        """It has no name."""

    def __enter__(self) -> DictDomainList:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _known, (id(self),)


def _known(number: int) -> DictDomainList:
    return _lists[number]
