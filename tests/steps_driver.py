"""Kills rules that change a record and its files, and looks at both afterwards (test_steps.py).

`prove` kills a worker in a rule before each of its system calls and each of its commits, has the
next one come, and compares records and files. `storm` lets several workers define, undefine, rename
and set autostart until they are killed at random instants. Both run in a child of the nursery,
which forks the workers, so that they may inherit a list with multiprocessing locks.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from killing import Child, ChildDied, Pipe, fork, xml

from shmdomains import (
    ConfigError,
    Domain,
    DomainDef,
    DomainExists,
    DomainInfo,
    DomainList,
    DomainNotFound,
    DomainStateError,
    InvalidName,
)
from shmdomains.config import scan

WEB1, OTHER, NEW = UUID(int=1), UUID(int=2), UUID(int=3)

# --- what is killed -----------------------------------------------------------------------------


def nothing(doms: DomainList, folder: Path) -> None:
    """There is no web1."""


def defined(doms: DomainList, folder: Path) -> None:
    doms.define(xml("web1", WEB1))


def autostarted(doms: DomainList, folder: Path) -> None:
    defined(doms, folder)
    doms.set_autostart(WEB1, True)


def active(doms: DomainList, folder: Path) -> None:
    autostarted(doms, folder)
    with doms.get(WEB1) as dom:
        dom.activate(pid=os.getpid())
        dom.next_definition = dom.definition.replace(memory=1536)
        doms.save_config(dom)


def transient(doms: DomainList, folder: Path) -> None:
    with doms.locked():
        dom = doms.assign_def(DomainDef.from_xml(xml("web1", WEB1)))
    dom.activate(pid=os.getpid())
    dom.unlock()


def elsewhere(doms: DomainList, folder: Path) -> None:
    """Its file is not named after it."""
    (folder / "guest.xml").write_text(xml("web1", WEB1))
    (folder / "autostart" / "guest.xml").symlink_to(folder / "guest.xml")
    assert doms.load_all_configs(folder).failures == []


def armed(doms: DomainList, folder: Path) -> None:
    """There is no web1, but a link of its name."""
    (folder / "autostart" / "web1.xml").symlink_to(folder / "web1.xml")


def save(doms: DomainList) -> None:
    with doms.get(WEB1) as dom:
        dom.definition = dom.definition.replace(memory=2048)
        doms.save_config(dom)


def redefine(doms: DomainList) -> None:
    doms.define(xml("web1", WEB1, 2048))


def undefine(doms: DomainList) -> None:
    doms.undefine(WEB1)


def rename(doms: DomainList) -> None:
    doms.rename(WEB1, "web2")


def enable(doms: DomainList) -> None:
    doms.set_autostart(WEB1, True)


def disable(doms: DomainList) -> None:
    doms.set_autostart(WEB1, False)


RULES: dict[str, tuple[Callable[[DomainList, Path], None], Callable[[DomainList], None]]] = {
    "define": (nothing, redefine),
    "define over a stale link": (armed, redefine),
    "define a transient domain": (transient, redefine),
    "redefine": (autostarted, redefine),
    "redefine active": (active, redefine),
    "redefine elsewhere": (elsewhere, redefine),
    "save": (autostarted, save),
    "undefine": (autostarted, undefine),
    "undefine active": (active, undefine),
    "undefine elsewhere": (elsewhere, undefine),
    "rename": (defined, rename),
    "rename with autostart": (autostarted, rename),
    "rename elsewhere": (elsewhere, rename),
    "autostart": (defined, enable),
    "no autostart": (autostarted, disable),
    "no autostart elsewhere": (elsewhere, disable),
}

# --- who comes next -----------------------------------------------------------------------------


def get(doms: DomainList, folder: Path) -> None:
    with suppress(DomainNotFound):
        doms.get(WEB1).unlock()


def load(doms: DomainList, folder: Path) -> None:
    assert doms.load_all_configs(folder).failures == []


def recover(doms: DomainList, folder: Path) -> None:
    doms.recover()
    assert doms.recover().repairs == []


def define_again(doms: DomainList, folder: Path) -> None:
    info = doms.peek(WEB1)
    name = "web1" if info is None else info.name
    doms.define(xml(name, WEB1, 4096))
    assert loaded(folder)[WEB1][:2] == (name, 4096)


def undefine_again(doms: DomainList, folder: Path) -> None:
    with suppress(DomainNotFound, DomainStateError):
        doms.undefine(WEB1)
    assert WEB1 not in loaded(folder)


def rename_again(doms: DomainList, folder: Path) -> None:
    with suppress(DomainNotFound, DomainStateError):
        doms.rename(WEB1, "web9")


def autostart_again(doms: DomainList, folder: Path) -> None:
    with suppress(DomainNotFound, DomainStateError):
        doms.set_autostart(WEB1, True)
        assert loaded(folder)[WEB1][2]


def take_the_name(doms: DomainList, folder: Path) -> None:
    """Of a rename that was killed; the next holder of the other domain comes after that."""
    with suppress(DomainExists):
        doms.define(xml("web2", NEW))
    get(doms, folder)


NEXT = [
    get,
    load,
    recover,
    define_again,
    undefine_again,
    rename_again,
    autostart_again,
    take_the_name,
]


# --- what is there ------------------------------------------------------------------------------


def loaded(folder: Path) -> dict[UUID, tuple[str, int, bool]]:
    """Name, memory and autostart of each domain that a list without a past finds."""
    with DomainList(max_domains=20_000) as later:
        assert later.load_all_configs(folder).failures == []
        later.forget_configs()
        return {info.uuid: as_loaded(info) for info in later}


def as_loaded(info: DomainInfo) -> tuple[str, int, bool]:
    return info.name, (info.next_definition or info.definition).memory, info.autostart


def agree(doms: DomainList, folder: Path) -> None:
    """Exactly the files that the records say."""
    infos = doms.list(persistent=True)
    files = {path.stem: DomainDef.from_xml(path.read_text()) for path in scan(folder)}
    links = {path.stem: Path(os.readlink(path)) for path in scan(folder / "autostart")}
    if "guest" in files and "web1" not in files:  # not yet named after its domain
        files["web1"] = files.pop("guest")
        if "guest" in links:
            links["web1"] = links.pop("guest").with_stem("web1")
    said = {info.name: info.next_definition or info.definition for info in infos}
    assert {name: one.to_xml() for name, one in files.items()} == {
        name: one.to_xml() for name, one in said.items()
    }
    assert links == {info.name: folder / f"{info.name}.xml" for info in infos if info.autostart}
    assert loaded(folder) == {info.uuid: as_loaded(info) for info in infos}
    assert doms.check().problems == []
    assert doms._unfinished() == []


# --- deaths -------------------------------------------------------------------------------------

FILES = (
    "open close write fsync fchmod chmod mkdir stat lstat listdir readlink link symlink rename "
    "replace unlink"
)
CALLS: dict[Any, list[str]] = {
    os: FILES.split(),
    fcntl: ["flock"],
    Domain: ["lock", "commit", "_commit_work", "_release_unseen"],
    DomainList: ["_insert", "_remove", "_rename"],
}


class Counter:
    """Counts the calls from now on; dies before the `fatal` one."""

    def __init__(self, fatal: int, look: Callable[[], None] = lambda: None) -> None:
        self.seen = 0
        self._fatal, self._look, self._kill = fatal, look, os.kill
        for place, names in CALLS.items():
            for name in names:
                setattr(place, name, self._counted(getattr(place, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            self._look()
            if self.seen == self._fatal:
                self._kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call


def die_in_rule(pipe: Pipe, doms: DomainList, folder: Path, rule: str, fatal: int) -> None:
    exists = os.access  # which is not counted
    places = [str(folder / f"{name}.xml") for name in ("web1", "web2", "guest")]
    undefines = RULES[rule][1] is undefine

    def look() -> None:
        """Nobody ever sees it persistent without a file; `undefine` takes the file first."""
        info = doms.peek(WEB1)
        if info is None or not info.persistent or undefines:
            return
        if not any(exists(place, os.F_OK) for place in places):
            pipe.conn.send(("raised", "a persistent domain was seen, and no file of it"))
            os._exit(1)  # raising would hinder the rule in undoing its work

    counter = Counter(fatal, look)
    RULES[rule][1](doms)
    pipe.say(counter.seen)


def die_while_settling(pipe: Pipe, doms: DomainList, fatal: int) -> None:
    counter = Counter(fatal)
    doms.get(WEB1).unlock()
    pipe.say(counter.seen)


def outlived(child: Child) -> bool:
    """Whether it did not die."""
    try:
        child.hear()
    except ChildDied:
        return False
    finally:
        child.close()
    return True


def begin(folder: Path, rule: str, lock: Any) -> DomainList:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "autostart").mkdir(parents=True)
    doms = DomainList(max_domains=20, lock=lock)
    doms.load_all_configs(folder)
    doms.define(xml("other", OTHER))
    doms.set_autostart(OTHER, True)
    RULES[rule][0](doms, folder)
    return doms


def prove(pipe: Pipe, folder: Path, rule: str, lock: str, everyone: bool) -> None:
    """A death before each call of the rule, and the next one who comes: one after the other, or
    each of them for each death."""
    deaths = 0
    first = sorted(RULES).index(rule)
    for fatal in itertools.count(1):
        chosen = NEXT if everyone else [NEXT[(first + fatal) % len(NEXT)]]
        for come_next in chosen:
            with begin(folder, rule, lock) as doms:
                ended = outlived(fork(die_in_rule, doms, folder, rule, fatal))
                deaths += not ended
                try:
                    come_next(doms, folder)
                    if RULES[rule][0] is armed and WEB1 not in doms:
                        (folder / "autostart" / "web1.xml").unlink(missing_ok=True)
                    agree(doms, folder)
                except BaseException as exc:
                    what = f"{rule}: death {fatal}, then {come_next.__name__}"
                    raise AssertionError(what) from exc
        if ended:
            break
    pipe.say(deaths)


def prove_settling(pipe: Pipe, folder: Path, rule: str, stride: int) -> None:
    """A death in the rule, and one before each call of whoever settles it."""
    deaths = 0
    for fatal in itertools.count(1, stride):
        for second in itertools.count(1):
            with begin(folder, rule, "robust") as doms:
                ended = outlived(fork(die_in_rule, doms, folder, rule, fatal))
                if WEB1 not in doms:
                    break
                settled = outlived(fork(die_while_settling, doms, second))
                deaths += not settled
                get(doms, folder)
                agree(doms, folder)
            if settled:
                break
        if ended:
            break
    pipe.say(deaths)


# --- storms -------------------------------------------------------------------------------------

SHARED = [UUID(int=100 + number) for number in range(4)]
NAMES = [f"vm{number}" for number in range(6)]


class Ledger:
    """Of each worker's own domain: what it asks for, what it was told."""

    def __init__(self, workers: int) -> None:
        # Not struct.pack_into: it clears the bytes first, and a kill may come in between.
        self._memory = memoryview(mmap.mmap(-1, 16 * workers)).cast("q")

    def get(self, worker: int) -> tuple[int, int]:
        return self._memory[2 * worker], self._memory[2 * worker + 1]

    def ask(self, worker: int, state: int) -> None:
        self._memory[2 * worker] = state

    def told(self, worker: int, state: int) -> None:
        self._memory[2 * worker + 1] = state


def own_uuid(worker: int) -> UUID:
    return UUID(int=1000 + worker)


def own_name(worker: int, state: int) -> str:
    return f"own{worker}-{state % 2}"


def work(pipe: Pipe, doms: DomainList, ledger: Ledger, worker: int, seed: int) -> None:
    """Change domains until killed: some that others change too, and one of its own."""
    chance = random.Random(seed)
    pipe.say("ready")
    for turn in itertools.count(1):
        if chance.random() < 0.4:
            change_own(doms, ledger, worker, turn, chance)
            continue
        with suppress(DomainExists, DomainNotFound, DomainStateError, InvalidName):
            try:
                change_shared(doms, chance)
            except ConfigError as exc:
                if "it holds domain" not in str(exc):
                    raise


def change_shared(doms: DomainList, chance: random.Random) -> None:
    uuid, name = chance.choice(SHARED), chance.choice(NAMES)
    kind = chance.randrange(10)
    if kind < 4:
        doms.define(xml(name, uuid, chance.randrange(1, 100) * 1024))
    elif kind < 6:
        doms.undefine(uuid)
    elif kind < 8:
        doms.rename(uuid, name)
    elif kind < 9:
        doms.set_autostart(uuid, chance.random() < 0.6)
    else:
        with doms.get(uuid) as dom:
            if dom.is_active:
                dom.deactivate()
            elif dom.persistent:
                dom.activate()


def change_own(
    doms: DomainList, ledger: Ledger, worker: int, turn: int, chance: random.Random
) -> None:
    """Its state: 0 undefined, else the memory, of which the last bit gives the name."""
    state, uuid = ledger.get(worker)[1], own_uuid(worker)
    if state and chance.random() < 0.3:
        wanted = 0
        ledger.ask(worker, wanted)
        doms.undefine(uuid)
    elif state and chance.random() < 0.4:
        wanted = state ^ 1
        ledger.ask(worker, wanted)
        doms.rename(uuid, own_name(worker, wanted))
    else:
        wanted = 1024 * turn + state % 2
        ledger.ask(worker, wanted)
        doms.define(xml(own_name(worker, wanted), uuid, 1024 * turn))
    ledger.told(worker, wanted)


def storm(pipe: Pipe, folder: Path, seeds: range) -> None:
    """Storm after storm; says how many were killed."""
    killed = 0
    for seed in seeds:
        chance = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "autostart").mkdir(parents=True)
        lock: Any = "multiprocessing" if seed % 4 == 3 else "robust"
        with DomainList(max_domains=50, lock=lock) as doms:
            doms.load_all_configs(folder)
            ledger, children = Ledger(12), []
            for wave in range(chance.choice([1, 1, 2, 3])):
                for worker in range(4 * wave, 4 * wave + chance.randrange(2, 5)):
                    children.append(fork(work, doms, ledger, worker, chance.random()))
                for child in children:
                    if not child.conn.closed:
                        child.hear()
                for child in children:
                    time.sleep(chance.random() * 0.02)  # the instant of the blow
                    assert child.is_alive(), child.hear()
                    child.close()
                    killed += 1
                children.clear()
            try:
                chance.choice([settle_each, recover, load])(doms, folder)
                agree(doms, folder)
                as_told(doms, ledger)
            except BaseException as exc:
                raise AssertionError(f"storm {seed}") from exc
    pipe.say(killed)


def settle_each(doms: DomainList, folder: Path) -> None:
    for info in doms:
        doms.get(info.uuid).unlock()


def as_told(doms: DomainList, ledger: Ledger) -> None:
    for worker in range(12):
        info = doms.peek(own_uuid(worker))
        found = None if info is None else (info.name, info.definition.memory)
        possible: list[Any] = [
            (own_name(worker, state), state & ~1) if state else None for state in ledger.get(worker)
        ]
        assert found in possible, f"worker {worker}: {found}, not of {possible}"


# --- readers ------------------------------------------------------------------------------------


def define_and_die(pipe: Pipe, doms: DomainList, first: int) -> None:
    for number in itertools.count(first):
        doms.define(xml(f"new{number}", UUID(int=number)))
        pipe.say()


def look_on(pipe: Pipe, doms: DomainList, folder: Path) -> None:
    """Without a lock, until told to end: what is persistent has its file."""
    pipe.say("ready")
    seen = 0
    while not pipe.conn.poll():
        for info in doms.list(persistent=True, definitions=False):
            assert (folder / f"{info.name}.xml").exists(), info
            seen += 1
    pipe.say(seen)


def watch(pipe: Pipe, folder: Path, rounds: int) -> None:
    """Who defines is killed again and again, while another one looks on."""
    chance = random.Random(rounds)
    with DomainList(max_domains=20_000) as doms:
        doms.load_all_configs(folder)
        reader = fork(look_on, doms, folder)
        reader.hear()
        for number in range(rounds):
            writer = fork(define_and_die, doms, 1 + 1000 * number)
            for _ in range(3):
                writer.hear()
            time.sleep(chance.random() * 0.01)  # the instant of the blow
            writer.close()
            for info in doms.list(persistent=False):
                doms.get(info.uuid).unlock()
        seen = reader.ask()
        reader.close()
        agree(doms, folder)
        assert len(doms) >= 3 * rounds
    pipe.say(seen)
