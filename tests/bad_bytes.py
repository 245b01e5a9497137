"""Damage one copy of a segment after the other, use all of the API on it, and judge every answer.

Runs in a child process that may be lost (test_bad_bytes.py watches it): it says which damage comes
next before it attaches, so that a crash or a hang names its bit. Of each damaged copy

- whatever is not an error of the library's own tree is a failure;
- an answer must be of the domain that was asked for: uuid, name, definition, next definition and
  data belong together and are what was stored. Where a domain is not found, or its state is
  another, `check` has to say that the segment is damaged;
- an event is what happened, in its order, under its number; where one is missed `check` says so;
- reading commits no memory: a look behind what is committed makes a page where a hole was, and
  would be SIGBUS where the file system is full.

Every wait has a time-out, a short one, because a flipped bit can make a lock that somebody holds.
"""

from __future__ import annotations

import gc
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

from killing import Pipe, xml

from shmdomains import (
    DomainDef,
    DomainEvent,
    DomainList,
    DomainState,
    EventsMissed,
    LockTimeout,
    ShmDomainsError,
)
from shmdomains.transfer import export_domains

PATIENCE = 0.01  # seconds, for every wait
ONE, TWO, THREE, LONG, IDLE, GONE, NEW, NEXT = (UUID(int=i) for i in (1, 2, 3, 4, 5, 6, 8, 9))
FRESH = ("fresh1", "fresh2", "fresh3")  # more than there are free slots
MUTEXES = ("scheduler", "migrations 1", "m" * 63)
LONG_NAME = "n" * 251  # fills its buffer to the last byte

Flip = tuple[int, int]
"""A byte of the file, and which of its bits."""

Damage = Flip | int | None
"""A flipped bit, or the size to which the file is cut; None: nothing."""


# --- the segment that is damaged -----------------------------------------------------------------


@cache
def definition(name: str, uuid: UUID, memory: int = 1024) -> DomainDef:
    return DomainDef.from_xml(xml(name, uuid, memory, title=f"the title of {name[:3]}"))


def fill(path: str, lock: Any = "robust", config: str | None = None) -> None:
    """Domains whose uuids and names are one bit apart, of every kind; one was renamed, one is gone.

    Sizes for which each index has a second table that was never committed. `config`: where the
    list remembers that its domains' files lie."""
    with DomainList.create(path=path, max_domains=600, max_bytes=4 << 20, lock=lock) as doms:
        if config is not None:
            doms.load_all_configs(config, Path(config, "autostart"))
        for lock_name in MUTEXES:
            with doms.mutex(lock_name, why="for a test"):
                pass
        for name, uuid in (("vm1", ONE), ("vm2", TWO), ("old", THREE), (LONG_NAME, LONG)):
            doms.define(definition(name, uuid))
        doms.define(definition("gone", GONE))
        with doms.locked():
            doms.assign_def(definition("idle", IDLE)).unlock()
            with doms.find_by_name("old") as dom:
                doms.rename(dom, "vm3")
        for count in (1, 2, 3):  # in the record, in one half after the other
            with doms.get(name="idle") as dom:
                dom.data = {"count": count, "seat": "é" * count}
        with doms.get(uuid=TWO) as dom:
            dom.activate(pid=7)
            dom.data = {"disks": ["vda", "vdb"] * 20}
        doms.define(definition("vm2", TWO, 2048))  # becomes its next definition
        for uuid in (THREE, LONG):
            with doms.get(uuid=uuid) as dom:
                dom.data = f"of {uuid}"
                dom.activate()
        with doms.get(uuid=ONE) as dom:
            doms.set_autostart(dom, True)
        doms.undefine(uuid=GONE)
        wait_for_somebody(doms)


def wait_for_somebody(doms: DomainList) -> None:
    """So that the table of the waiters has memory."""
    with doms.get(uuid=ONE), ThreadPoolExecutor(1) as other:
        wait = other.submit(doms.get, uuid=ONE, timeout=PATIENCE)
        assert isinstance(wait.exception(), LockTimeout)


@dataclass(frozen=True)
class Image:
    """The bytes of a file, what of it is committed, and what is not zero."""

    size: int
    committed: list[tuple[int, int]]
    parts: list[tuple[int, bytes]]

    @classmethod
    def of(cls, path: str, committed: list[tuple[int, int]]) -> Image:
        parts = []
        with open(path, "rb", buffering=0) as file:
            for start, end in committed:
                for at in range(start, end, 4096):
                    page = os.pread(file.fileno(), min(4096, end - at), at)
                    if any(page):
                        parts.append((at, page))
            return cls(os.fstat(file.fileno()).st_size, committed, parts)

    def write(self, path: Path, damage: Damage) -> None:
        with open(path, "x+b", buffering=0) as file:
            fd = file.fileno()
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, self.size)
            for start, end in self.committed:
                os.posix_fallocate(fd, start, end - start)
            for at, page in self.parts:
                os.pwrite(fd, page, at)
            if isinstance(damage, int):
                os.ftruncate(fd, damage)
            elif damage is not None:
                at, bit = damage
                (byte,) = os.pread(fd, 1, at)
                os.pwrite(fd, bytes([byte ^ 1 << bit]), at)


# --- what is known of a domain -------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A domain as it was stored."""

    name: str
    definition: DomainDef | None = None
    next_definition: DomainDef | None = None
    data: Any = None
    fields: tuple[Any, ...] | None = None  # id, state …; None: whatever they are

    @classmethod
    def of(cls, info: Any) -> Known:
        return cls(info.name, info.definition, info.next_definition, info.data, fields_of(info))


def fields_of(info: Any) -> tuple[Any, ...]:
    return info.id, info.state, info.reason, info.persistent, info.autostart, info.pid


# --- the judge -----------------------------------------------------------------------------------


@dataclass
class Trial:
    """What was asked of one damaged copy, and what was wrong with the answers."""

    doms: DomainList
    known: dict[UUID, list[Known]]  # what each domain may be; more than one after changes
    config: str | None
    events: dict[int, DomainEvent]  # all that happened, by number
    met: Counter[str]
    wrong: list[str] = field(default_factory=list)
    quiet: list[str] = field(default_factory=list)  # for `check` to say

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """The answer, or None where there was an error, which may only be one of ours."""
        try:
            return call()
        except ShmDomainsError as exc:
            self.met[type(exc).__name__] += 1
        except BaseException as exc:
            self.wrong.append(f"{what}: {exc!r}")
        return None

    def judge(self, what: str, found: Any, **key: Any) -> None:
        """`found`: a `DomainInfo`, or a `Domain` that is locked."""
        self.attempt(what, lambda: self._judge(what, found, key))

    def _judge(self, what: str, found: Any, key: dict[str, Any]) -> None:
        for name, value in key.items():
            if getattr(found, name) != value:
                self.wrong.append(f"{what}: {name} is {getattr(found, name)!r}, not {value!r}")
        uuid = found.uuid
        if uuid not in self.known:  # whether or not its name can still be read
            self.wrong.append(f"{what}: no domain ever had uuid {uuid}")
            return
        name = found.name
        versions = [one for one in self.known[uuid] if one.name == name]
        if not versions:
            self.wrong.append(f"{what}: no domain was ever {name!r} with uuid {uuid}")
            return
        for blob in ("definition", "next_definition", "data"):
            try:
                value = getattr(found, blob)
            except ShmDomainsError as exc:
                self.met[type(exc).__name__] += 1
                continue
            if all(value != getattr(one, blob) for one in versions):
                self.wrong.append(f"{what}: the {blob} of {name!r} is not what was stored")
        fields = fields_of(found)
        if all(one.fields not in (None, fields) for one in versions):
            self.quiet.append(f"{what}: {name!r} is {fields}, not {versions[-1].fields}")

    def expect(self, uuid: UUID, **changes: Any) -> None:
        """From now on it may also be this; which fields it has is no longer looked at."""
        now = self.known.setdefault(uuid, [])
        last = replace(now[-1], fields=None) if now else Known("")
        self.known[uuid] = [*(replace(one, fields=None) for one in now), replace(last, **changes)]


def read(trial: Trial) -> None:
    """All that takes no lock."""
    doms = trial.doms
    for uuid, (one,) in list(trial.known.items()):
        assert one.fields is not None
        keys: list[dict[str, Any]] = [{"uuid": uuid}, {"name": one.name}]
        keys += [{"id": one.fields[0]}] if one.fields[0] >= 0 else []
        for key in keys:
            what = f"peek({key})"
            met = trial.met.total()
            info = trial.attempt(what, lambda key=key: doms.peek(**key, timeout=PATIENCE))
            if info is not None:
                trial.judge(what, info, **key)
            elif met == trial.met.total():
                trial.quiet.append(f"{what}: not found")
    for what, listed in (
        ("snapshot", lambda: doms.snapshot()),
        ("list", lambda: doms.list(active=True, state=list(DomainState))),
        ("list", lambda: doms.list(persistent=True, autostart=False)),
    ):
        infos = trial.attempt(what, listed) or []
        if what == "snapshot" and len(infos) != len(trial.known):
            trial.quiet.append(f"{what}: {len(infos)} domains")
        for info in infos:
            trial.judge(what, info)
    for info in trial.attempt("glance", lambda: doms.snapshot(definitions=False)) or []:
        trial.attempt("glance", lambda info=info: (repr(info), info.state, info.reason))
    about = trial.attempt("info", lambda: doms.info)
    if about is not None and about.config_dir != trial.config:
        trial.wrong.append(f"the config directory is {about.config_dir}, not {trial.config}")
    trial.attempt("watch", lambda: watch(trial))
    for lock in trial.attempt("locks", doms.locks) or []:
        # A damaged mutex is held by somebody; whoever waits is the one that was planted, or nobody.
        # Of a domain whose name or fields are damaged it has no name.
        if lock.waiting > 1 or (lock.waiting and lock.name not in ("vm1", None)):
            trial.wrong.append(f"locks: {lock}")
        if lock.uuid is not None:
            info = trial.attempt("locks", lambda lock=lock: doms.peek(uuid=lock.uuid))
            if info is not None:
                trial.judge("locks", info, name=lock.name)
    for count in ("statistics", "statistics of all"):
        of = doms.statistics_of_all if count.endswith("all") else lambda: doms.statistics
        trial.attempt(count, of)
    names = trial.attempt("names of locks", doms._mutex_names)
    if names is not None and names != list(MUTEXES):
        trial.quiet.append(f"the named locks are {names}")
    trial.attempt("length", lambda: (len(doms), repr(doms)))
    trial.attempt("count", lambda: (doms.count(), doms.count(active=True)))
    trial.attempt("contains", lambda: (ONE in doms, GONE in doms))
    trial.attempt("export", lambda: export_domains(doms, io.BytesIO()))


def watch(trial: Trial) -> None:
    last = 0
    for event in trial.doms.watch(since=0, timeout=0):
        if isinstance(event, EventsMissed):
            trial.quiet.append(f"watch: {event.count} events missed")
            last = event.number
            continue
        if event != trial.events.get(event.number, event) or event.number != last + 1:
            trial.wrong.append(f"watch: {event} is not what happened")
        last = event.number
    if last < len(trial.events):
        trial.quiet.append(f"watch: only {last} events")


def check(trial: Trial) -> bool:
    """Whether `check` is content."""
    met = trial.met.total()
    report = trial.attempt("check", lambda: trial.doms.check(timeout=PATIENCE))
    return report is not None and bool(report) and met == trial.met.total()


# --- changes -------------------------------------------------------------------------------------


def change(trial: Trial) -> None:
    """All that takes locks. What fails on the way is rolled back or was done; both may be seen."""
    for step in (mutexes, use_each, start_and_stop, rename, define, assign_and_remove, many, free):
        trial.attempt(step.__name__, lambda step=step: step(trial))
        if trial.doms.is_locked:
            trial.wrong.append(f"{step.__name__}: the list is still locked")
    for info in trial.attempt("snapshot", trial.doms.snapshot) or []:
        trial.judge("snapshot afterwards", info)
    trial.attempt("watch", lambda: watch(trial))


def mutexes(trial: Trial) -> None:
    """Each name leads to a lock of its own, and to no new one; nobody died holding it but, where
    the mutex itself is damaged, somebody who is not known."""
    doms = trial.doms
    held = []
    for name in MUTEXES:
        mutex = trial.attempt(f"mutex({name})", lambda name=name: doms.mutex(name, PATIENCE))
        if mutex is None or trial.attempt("lock", lambda m=mutex: (m.lock(PATIENCE), 1)) is None:
            continue
        held.append(mutex)
        died = trial.attempt("previous_owner_died", lambda m=mutex: m.previous_owner_died)
        if died is not None and died.tid is not None:
            trial.wrong.append(f"mutex {name}: {died} died holding it")
    for mutex in held:
        trial.attempt("unlock", mutex.unlock)
    names = trial.attempt("names", lambda: doms._mutex_names()) or []
    if set(names) - set(MUTEXES) or len(set(names)) != len(names):
        trial.wrong.append(f"the named locks are {names}")


def holding(trial: Trial, dom: Any, use: Callable[[Any], Any]) -> None:
    try:
        use(dom)
    finally:
        if dom.is_locked:
            dom.unlock(PATIENCE)


def use_each(trial: Trial) -> None:
    doms = trial.doms
    for number, uuid in enumerate(list(trial.known)):
        name = trial.known[uuid][0].name
        key: dict[str, Any] = {"uuid": uuid} if number % 2 else {"name": name}

        def use(dom: Any, key: dict[str, Any] = key, uuid: UUID = uuid) -> None:
            trial.judge(f"get({key})", dom, **key)
            for size in (300, 20):  # in the heap, and in the record
                value = {"by": os.getpid(), "more": "x" * size}
                trial.expect(uuid, data=value)
                dom.data = value
                dom.autostart = not dom.autostart
                dom.commit(PATIENCE)
                trial.judge(f"get({key}) and commit", dom, **key)
            value = {**value, "times": 1}
            trial.expect(uuid, data=value)
            dom.add("times")
            dom.commit(PATIENCE)
            trial.judge(f"get({key}) and count", dom, **key)

        def get(key: dict[str, Any] = key, use: Callable[[Any], None] = use) -> None:
            holding(trial, doms.get(**key, timeout=PATIENCE), use)

        trial.attempt(f"change {key}", get)


def start_and_stop(trial: Trial) -> None:
    doms = trial.doms

    def start(dom: Any) -> None:
        number = dom.activate(pid=9, timeout=PATIENCE)
        dom.commit(PATIENCE)
        info = doms.peek(id=number, timeout=PATIENCE)
        if info is None or info.uuid != ONE:
            trial.wrong.append(f"id {number} was given to {ONE} and leads to {info}")

    def stop(dom: Any) -> None:
        for one in list(trial.known[dom.uuid]):
            if one.next_definition is not None:
                trial.expect(
                    dom.uuid,
                    definition=one.next_definition,
                    next_definition=None,
                    data=trial.known[dom.uuid][-1].data,
                )
        dom.deactivate()
        dom.commit(PATIENCE)

    trial.expect(ONE)
    trial.attempt("start", lambda: holding(trial, doms.get(uuid=ONE, timeout=PATIENCE), start))
    trial.attempt("stop", lambda: holding(trial, doms.get(name="vm2", timeout=PATIENCE), stop))
    found = trial.attempt("lookup", lambda: doms.lookup(id=2, timeout=PATIENCE))
    if found is not None:
        trial.attempt(
            "lookup by id", lambda: holding(trial, found, lambda dom: trial.judge("id", dom, id=2))
        )


def rename(trial: Trial) -> None:
    doms = trial.doms
    with doms.locked(PATIENCE):
        dom = doms.find_by_name("idle", PATIENCE)
        if dom is None:
            return

        def use(dom: Any) -> None:
            trial.judge("find_by_name", dom, name="idle")
            named = dom.definition.replace(name="vm5")
            for one in list(trial.known[IDLE]):  # a change before may have been rolled back
                trial.expect(IDLE, name="vm5", definition=named, data=one.data)
            doms.rename(dom, "vm5", PATIENCE)
            trial.judge("rename", dom, name="vm5")

        holding(trial, dom, use)
    trial.attempt("peek", lambda: doms.peek(name="vm5", timeout=PATIENCE))


def define(trial: Trial) -> None:
    doms = trial.doms
    fresh = definition("vm8", NEW)
    trial.expect(NEW, name="vm8", definition=fresh)
    info = trial.attempt("define", lambda: doms.define(fresh, PATIENCE))
    if info is not None:
        trial.judge("define", info, uuid=NEW, name="vm8")
    again = definition("vm3", THREE, 8192)  # active: the next one
    trial.expect(THREE, next_definition=again)
    trial.expect(THREE, definition=again, next_definition=None)
    trial.attempt("define again", lambda: doms.define(again, PATIENCE))
    for uuid, name in ((NEW, "vm8"), (THREE, "vm3")):
        found = trial.attempt("peek", lambda uuid=uuid: doms.peek(uuid=uuid, timeout=PATIENCE))
        if found is not None:
            trial.judge("peek after define", found, uuid=uuid, name=name)
    trial.attempt("undefine", lambda: doms.undefine(name="vm8", timeout=PATIENCE))
    trial.attempt("undefine", lambda: doms.undefine(id=2, timeout=PATIENCE))


def assign_and_remove(trial: Trial) -> None:
    doms = trial.doms
    fresh = definition("vm9", NEXT)
    trial.expect(NEXT, name="vm9", definition=fresh)
    with doms.locked(PATIENCE):
        dom = doms.assign_def(fresh, True, PATIENCE)
        holding(trial, dom, lambda dom: trial.judge("assign_def", dom, uuid=NEXT, name="vm9"))
        doms.remove_inactive(dom, PATIENCE)
    trial.attempt("a stale handle", dom.try_lock)


def many(trial: Trial) -> None:
    with trial.doms.lock_many([ONE, LONG], PATIENCE) as held:
        for dom, uuid in zip(held, (ONE, LONG), strict=True):
            trial.judge("lock_many", dom, uuid=uuid)
        one, _ = held
        trial.doms.set_autostart(one, False, PATIENCE)
        trial.doms.save_config(one, PATIENCE)


def free(trial: Trial) -> None:
    doms = trial.doms
    with doms.locked(PATIENCE):
        doms.free(PATIENCE)
    for info in doms.snapshot():
        trial.wrong.append(f"free: {info!r} is still there")
    trial.expect(THREE, next_definition=None, data=None)
    define(trial)


# --- the child -----------------------------------------------------------------------------------


def mappings(folder: str) -> int:
    with open("/proc/self/maps") as maps:
        return sum(folder in line for line in maps)


def repair(trial: Trial) -> None:
    """What a death brings about: each index and the map are rebuilt, and free slots used again."""
    doms = trial.doms
    trial.attempt("recover", lambda: doms.recover(PATIENCE))
    for name in FRESH:
        trial.attempt("define", lambda name=name: doms.define(xml(name), PATIENCE))
    for name in FRESH:
        trial.attempt("undefine", lambda name=name: doms.undefine(name=name, timeout=PATIENCE))


def repair_and_read(trial: Trial) -> None:
    """A repair may give up, but what is lost by it is never lost without a word."""
    repair(trial)
    read(trial)
    if check(trial):
        trial.wrong += [f"after a repair check says nothing of it: {one}" for one in trial.quiet]


class Bench:
    """Where copies are made, damaged and looked at.

    `dirty`: words of each copy that say that a repair was put off; then that is what happens."""

    def __init__(
        self,
        original: str,
        folder: str,
        committed: list[tuple[int, int]],
        dirty: Sequence[int] = (),
    ) -> None:
        self.image = Image.of(original, committed)
        self.dirty = dirty
        self.folder = Path(folder)
        self.met: Counter[str] = Counter()
        with DomainList.attach(path=original) as doms:
            self.config = doms.info.config_dir
            self.known = {info.uuid: [Known.of(info)] for info in doms.snapshot()}
            events = list(doms.watch(since=0, timeout=0))
        self.events = {one.number: one for one in events if isinstance(one, DomainEvent)}
        assert len(self.events) == len(events) > 10

    def try_out(self, damage: Damage) -> list[str]:
        """All that was wrong with the answers of a copy that is damaged like this."""
        path = self.folder / "damaged"
        self.image.write(path, damage)
        self.put_off_repairs(path)
        try:
            doms = DomainList.attach(path=path)
        except ShmDomainsError as exc:
            self.met[f"{type(exc).__name__} at attach"] += 1
            return []
        except BaseException as exc:
            return [f"attach: {exc!r}"]
        finally:
            path.unlink()
        if isinstance(damage, int):
            doms.close()
            return ["attached to a file of another size"]
        trial = Trial(doms, dict(self.known), self.config, self.events, self.met)
        try:
            (repair_and_read if self.dirty else self.use)(trial)
        finally:
            doms.close()
        return trial.wrong

    def put_off_repairs(self, path: Path) -> None:
        with open(path, "r+b", buffering=0) as file:
            for at in self.dirty:
                os.pwrite(file.fileno(), b"\1", at)

    def use(self, trial: Trial) -> None:
        blocks = os.fstat(trial.doms._fd).st_blocks
        read(trial)
        content = check(trial)
        grown = os.fstat(trial.doms._fd).st_blocks - blocks
        if grown:
            trial.wrong.append(f"reading touched {grown // 8} pages that are not committed")
        if content:
            trial.wrong += [f"check says nothing of it: {one}" for one in trial.quiet]
        change(trial)


def try_all(
    pipe: Pipe,
    original: str,
    folder: str,
    committed: list[tuple[int, int]],
    damages: list[Damage],
    dirty: Sequence[int],
) -> None:
    """A child: say the number of each damage, then what was wrong; in the end what was met."""
    bench = Bench(original, folder, committed, dirty)
    for number, damage in enumerate(damages):
        pipe.say(number)
        wrong = bench.try_out(damage)
        if wrong:
            pipe.say(wrong)
    gc.collect()
    pipe.say((dict(bench.met), mappings(folder)))
    pipe.rest()
