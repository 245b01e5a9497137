"""Events while writers and watchers are killed: each commit's once, in its order, none without one.

A storm in a process of its own: writers start and stop a few domains and write down what was
acknowledged, watchers write down what they are told; both are killed again and again, and new ones
come, the watchers where the ones before them stopped. Then nobody is left but one watcher, and what
was told is compared with what was acknowledged and with the records.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import SOAK
from killing import DEADLINE, Child, Pipe, fork, until, xml

from shmdomains import DomainEvent, DomainList, EventType

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(300)]

NAMES = ("a", "b", "c")
LIFECYCLE = {EventType.STARTED: "+", EventType.STOPPED: "-"}


class Record:
    """Lines in a file to which several processes append, each with one write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o600)

    def add(self, *words: object) -> None:
        os.write(self._fd, (" ".join(map(str, words)) + "\n").encode())

    def last(self) -> int:
        """The number that the last line begins with; 0: there is none."""
        with open(self.path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 100, 0))
            lines = file.read().splitlines()
        return int(lines[-1].split()[0]) if lines else 0

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.path.read_text().splitlines()]


def write(pipe: Pipe, doms: DomainList, seed: int, acknowledged: Record) -> None:
    """Until it is killed."""
    chance = random.Random(seed)
    while True:
        name = chance.choice(NAMES)
        with doms.get(name, timeout=DEADLINE) as dom:
            if dom.is_active:
                what, id = "-", dom.id
                dom.deactivate()
            else:
                what, id = "+", dom.activate()
            if chance.random() < 0.3:
                dom.data = "x" * chance.randrange(300)
        acknowledged.add(what, id)


def follow(pipe: Pipe, doms: DomainList, since: int, told: Record) -> None:
    """Until it is killed."""
    for event in doms.watch(since=since):
        assert isinstance(event, DomainEvent), event
        who = (event.holder.pid or 0) if event.holder else 0
        told.add(event.number, int(event.type), event.name, event.id, who)


@dataclass
class Storm:
    doms: DomainList
    chance: random.Random
    acknowledged: Record
    told: Record
    writers: list[Child] = field(default_factory=list)
    watchers: list[Child] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)

    def writer(self) -> None:
        seed = self.chance.randrange(1 << 30)
        self.writers.append(fork(write, self.doms, seed, self.acknowledged))

    def watcher(self) -> None:
        self.watchers.append(fork(follow, self.doms, self.told.last(), self.told))

    def blow(self) -> None:
        """A little later somebody dies, and another one comes."""
        goal = self.doms._event_count + self.chance.randrange(1, 40)
        until(lambda: self.doms._event_count >= goal, "the writers go on")
        if self.chance.random() < 0.3:
            self.watchers.pop().close()
            self.watcher()
            return
        victim = self.writers.pop(self.chance.randrange(len(self.writers)))
        victim.close()
        self.killed.append(victim.pid)
        self.writer()

    def end(self) -> None:
        for child in self.writers:
            child.close()
            self.killed.append(child.pid)
        for name in NAMES:  # whose lock the last ones held
            self.doms.get(name, timeout=DEADLINE).unlock()
        newest = self.doms.watch().since
        until(lambda: self.told.last() >= newest, "the watcher is told everything", 60)
        for child in self.watchers:
            child.close()


def storm(pipe: Pipe, lock: Any, seed: int, blows: int, folder: str) -> None:
    one = Storm(
        DomainList(max_domains=8, lock=lock, events=1 << 20),  # none is missed
        random.Random(seed),
        Record(Path(folder, "acknowledged")),
        Record(Path(folder, "told")),
    )
    for name in NAMES:
        one.doms.define(xml(name))
    for _ in range(3):
        one.writer()
    one.watcher()
    for _ in range(blows):
        one.blow()
    one.end()
    prove(one)
    assert one.doms.check(), one.doms.check().problems
    pipe.say((len(one.killed), len(one.told.lines())))


def prove(one: Storm) -> None:
    told = [
        (int(number), EventType(int(type)), name, int(id), int(who))
        for number, type, name, id, who in one.told.lines()
    ]
    # Once, and in order, whichever watcher was told.
    assert [number for number, *_ in told] == list(range(1, len(told) + 1))
    active: dict[str, int] = {}
    happened = Counter[tuple[str, int]]()
    last = Counter[str]()  # of each domain: an id is taken before the commit that brings it
    for _, type, name, id, _ in told:
        if type not in LIFECYCLE:
            continue
        happened[LIFECYCLE[type], id] += 1
        if type is EventType.STARTED:
            assert name not in active and id > last[name], f"{name} is started again as {id}"
            active[name] = last[name] = id
        else:
            assert active.pop(name) == id
    # The records are what the events come to.
    assert active == {info.name: info.id for info in one.doms if info.is_active}
    # What was acknowledged is an event; what is an event and was not was the last of a dead one.
    acknowledged = {(what, int(id)) for what, id in one.acknowledged.lines()}
    assert set(happened.values()) <= {1}
    assert acknowledged <= happened.keys()
    assert len(happened) - len(acknowledged) <= len(one.killed)
    # Nobody died twice with one domain, and none but those who were killed.
    died = [(name, who) for _, type, name, _, who in told if type is EventType.HOLDER_DIED]
    assert len(set(died)) == len(died)
    assert {who for _, who in died if who} <= set(one.killed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(40 if SOAK else 3))
@pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
def test_a_storm(
    start: Callable[..., Child],
    tmp_path: Path,
    lock: str,
    seed: int,
    tried: Callable[[str, int], None],
) -> None:
    child = start(storm, lock, seed, 60 if lock == "robust" else 25, str(tmp_path))
    kills, events = child.hear(120)
    tried("kills of writers that are watched", kills)
    tried("events that were told through such kills", events)
    assert events > 100
