"""A storm that ends quietly: workers use a list hard, most are killed, and the rest must finish.

One round. A list of few or of many domains, 4 to 8 workers (storm_worker.py), or processes with
some workers each (storm_tasks.py), that do a bit of everything, all on one CPU or on all CPUs. Then
blows: most are killed, at random instants or in one burst just after a wake-up, or at a store into
the segment (crash_points.c), some are stopped before it, and now and then new ones come for another
wave. Then no more kills: each survivor has a fixed
amount of work to do, in which nobody who is dead may hinder it. Only a storm that ends can show a
lost wake-up: as long as somebody comes to wait, it has those who were forgotten woken.

The proof. Whatever is found in the list must be what a worker asked for last or what it was told
last, nothing may be there that nobody asked for, all ways to find a domain must lead to the same,
the list must be sound, its heap accounted for, every lock free, and nothing left of the dead once
each domain was locked again.

`prove_storms` does rounds with their proof. `watch_storms` only looks whether the survivors finish:
with locks as they should not be (untimed_lock.c) they do not.
"""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from uuid import UUID

from killing import DEADLINE, Child, Pipe, asleep, fork, until, xml
from storm_tasks import work_in_tasks
from storm_worker import (
    OWN,
    Ledger,
    Shape,
    attach_and_work,
    counts_of,
    inherit_and_work,
    own_memory,
    own_name,
    own_uuid,
    padding,
    shared_name,
    shared_uuid,
    work,
)

from shmdomains import Domain, DomainInfo, DomainList, LockTimeout
from shmdomains.events import DefinedDetail, EventType, UndefinedDetail

CPUS = os.sched_getaffinity(0)
SILENCE = 0.5  # seconds; many times the slice of a wait


# --- a round --------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened in a round."""

    kills: int = 0
    stops: int = 0
    changes: int = 0  # of shared domains, acknowledged
    events: int = 0  # on PostgreSQL

    def __iadd__(self, other: Tally) -> Tally:
        for what, number in vars(other).items():
            setattr(self, what, getattr(self, what) + number)
        return self


def crowd(cpu: int) -> None:
    """This process and its children share one CPU, which whoever is woken gets when it is left."""
    os.sched_setaffinity(0, {cpu})
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def spread() -> None:
    os.sched_setaffinity(0, CPUS)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


Blow = tuple[Child, signal.Signals]

KILL = [signal.SIGKILL]
STOP_AND_KILL = [signal.SIGSTOP, signal.SIGKILL]
STOP_AND_GO_ON = [signal.SIGSTOP, signal.SIGCONT]
FATES = [KILL] * 4 + [STOP_AND_KILL, STOP_AND_GO_ON + KILL]
SCARES: list[list[signal.Signals]] = [[], [], [], STOP_AND_GO_ON]


class Round:
    """One storm, in a process of its own."""

    def __init__(self, shape: Shape, path: str) -> None:
        self.shape, self.path = shape, path
        self.chance = random.Random(shape.seed)
        self.ledger = Ledger(shape)
        self.tally = Tally()
        self.begun: list[Child] = []
        self.living: list[Child] = []
        self.doms: Any = None
        crowd(self.chance.choice(sorted(CPUS))) if shape.crowded else spread()

    def begin(self) -> None:
        """The list and the first workers. Strangers are there before the list."""
        early = self.start(self.shape.workers) if self.shape.strangers else []
        self.doms = self.make()
        self.join(early or self.start(self.shape.workers))

    def make(self) -> Any:
        shape = self.shape
        doms: Any
        if shape.lock == "postgres":
            from shmdomains.postgres import PostgresDomainList

            doms = PostgresDomainList.create(self.path, events=1 << 20)
        elif shape.strangers:
            doms = DomainList.create(path=self.path, max_domains=shape.room)
        else:
            doms = DomainList(max_domains=shape.room, lock=shape.lock)
        nothing = [0] * shape.all_workers
        for domain in range(shape.domains):
            doms.define(xml(shared_name(domain), shared_uuid(domain)))
            with doms.get(uuid=shared_uuid(domain)) as dom:
                dom.data = [dom.id, padding(nothing), nothing]
        return doms

    def close(self) -> None:
        for child in self.begun:
            child.close()
        if self.shape.lock != "postgres":
            Path(self.path).unlink(missing_ok=True)
        elif self.doms is not None:
            self.doms.unlink(force=True)
            self.doms.close()

    def start(self, count: int) -> list[Child]:
        numbers = range(len(self.begun), len(self.begun) + count)
        life = work_in_tasks if self.shape.tasks else work
        if self.shape.strangers:
            given = [(attach_and_work, life, self.path)] * count
        else:
            given = [(inherit_and_work, life, self.doms)] * count
        children = [
            fork(*what, self.shape, self.ledger, number)
            for what, number in zip(given, numbers, strict=True)
        ]
        self.begun += children
        return children

    def join(self, workers: list[Child]) -> None:
        for worker in workers:
            worker.tell("the list is there")
        for worker in workers:
            assert worker.hear() == "ready"
        self.living += workers

    # Blows

    def rage(self) -> None:
        """Wave after wave; then it is quiet, and `living` are the survivors."""
        for wave in range(self.shape.waves):
            if wave:
                self.join(self.start(self.shape.doomed))
            doomed = self.chance.sample(self.living, self.shape.doomed)
            self.living = [child for child in self.living if child not in doomed]
            self.pause(0.01)
            if self.shape.fused:
                self.let_burn(doomed)
            elif self.shape.aimed:
                wanted = self.what_all_want()
                wanted.lock(DEADLINE)
                self.strike_after_a_wake_up(wanted, self.blows(doomed), doomed)
            else:
                self.strike(self.blows(doomed), self.chance.choice([0, 0.0002, 0.003]))
                bury(doomed)
        self.ledger.fall_quiet()

    def blows(self, doomed: list[Child]) -> list[Blow]:
        """Who is sent what, in this order. Some are stopped first, and then die or go on."""
        plans = [(child, [*self.chance.choice(FATES)]) for child in doomed]
        plans += [(child, [*self.chance.choice(SCARES)]) for child in self.living]
        order = []
        while plans := [plan for plan in plans if plan[1]]:
            child, rest = self.chance.choice(plans)
            order.append((child, rest.pop(0)))
        self.tally.kills += len(doomed)
        self.tally.stops += sum(blow == signal.SIGSTOP for _, blow in order)
        return order

    def strike(self, blows: list[Blow], longest: float = 0) -> None:
        """In one burst, or with pauses of up to so many seconds."""
        for child, blow in blows:
            child.signal(blow)
            if longest:
                self.pause(longest)

    def strike_after_a_wake_up(
        self, wanted: DomainList | Domain, blows: list[Blow], doomed: list[Child]
    ) -> None:
        """All wait for one lock, which is free for an instant and then ours again.

        So whoever was woken has to sleep again, and to leave word that somebody does. If it dies
        before that, and while we hold the lock, the next unlock wakes nobody.
        """
        workers = [*self.living, *doomed]
        until(lambda: all(asleep(child.pid) for child in workers), "all wait for one lock")
        early = self.chance.randrange(2)
        self.strike(blows[:early])
        wanted.unlock()
        with suppress(LockTimeout):  # somebody was faster
            wanted.lock(0)
        self.strike(blows[early:])
        bury(doomed)
        if wanted.is_locked:
            wanted.unlock()

    def let_burn(self, doomed: list[Child]) -> None:
        """They are killed in the middle of changes: at a store, mostly at one of the next."""
        for child in doomed:
            self.ledger.fuses[self.begun.index(child)] = int(10 ** (3 * self.chance.random()))
        for child in doomed:
            child.join()
        self.tally.kills += len(doomed)
        bury(doomed)

    def what_all_want(self) -> DomainList | Domain:
        """Everybody will wait for it soon."""
        domains = self.shape.domains
        if domains > 3 or self.chance.random() < 0.3:
            return self.doms
        wanted = shared_uuid(self.chance.randrange(domains))
        return next(dom for dom in self.doms._handles() if dom.uuid == wanted)

    def pause(self, longest: float) -> None:
        """Up to so many seconds; not at all when somebody has failed and says so."""
        wait([child.conn for child in self.living], self.chance.random() * longest)

    # The end

    def finish(self) -> None:
        """The survivors do what they have to do; then nobody is left."""
        assert {child.hear() for child in self.living} <= {"done"}
        bury(self.living)
        self.take_every_lock()

    def take_every_lock(self) -> None:
        """Nobody is alive, so each can be had at once; what the dead left goes with it."""
        if self.shape.lock == "postgres":
            until(lambda: not self.doms._others(), "the server has seen the ends of all")
        with self.doms.locked(timeout=0):
            pass
        for info in self.doms.snapshot():
            with self.doms.get(uuid=info.uuid, timeout=0):
                pass

    def prove(self) -> None:
        """What was acknowledged is there, what nobody asked for is not, and all of it is sound."""
        found = {info.uuid: info for info in self.doms.snapshot()}
        expected = set()
        for domain in range(self.shape.domains):
            info = self.the_same_everywhere(found, shared_uuid(domain))
            assert info is not None and info.name == shared_name(domain), f"lost: {domain}"
            pairs = zip(counts_of(info), self.ledger.counts(domain), strict=True)
            for worker, (count, allowed) in enumerate(pairs):
                assert count in allowed, f"{info.name}, worker {worker}: {count}, not {allowed}"
            expected.add(info.uuid)
        begun = len(self.begun) * (self.shape.tasks or 1)
        for worker, key in product(range(begun), range(OWN)):
            info = self.the_same_everywhere(found, own_uuid(worker, key))
            states = self.ledger.allowed(self.ledger.own(worker, key))
            allowed = {self.as_found(worker, key, state) for state in states}
            this = info and (info.name, info.definition.memory)
            assert this in allowed, f"worker {worker}, domain {key}: {this}, not {allowed}"
            expected.add(info and info.uuid)
        assert expected - {None} == set(found)
        self.tally.changes = self.ledger.total
        self.sound()

    def sound(self) -> None:
        report = self.doms.check()
        assert report, report.problems
        if self.shape.lock == "postgres":
            self.sound_on_postgres()
            return
        assert self.doms.info.heap_used == report.counts["cells"] * 64
        # What is left of who died while it inserted goes with the next insert there.
        for number in range(self.shape.room - len(self.doms)):
            self.doms.define(xml(f"filler-{number}"), DEADLINE)
        report = self.doms.check()
        assert report, report.problems
        assert report.counts["domains"] == self.shape.room
        assert report.counts["garbage"] == 0

    def sound_on_postgres(self) -> None:
        """No lock is left, and events are in one row, each of one domain at a time: none that runs
        is started, none that is undefined is renamed, and at the end they tell what is there."""
        assert self.doms.locks() == []
        events = list(self.doms.watch(since=0, timeout=0))
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        names: dict[UUID, str] = {}
        ids: dict[UUID, int] = {}
        given: set[int] = set()
        for event in events:
            known = names.get(event.uuid)
            if event.type == EventType.STARTED:
                assert known is not None and ids.get(event.uuid, -1) == -1, event
                assert event.id not in given, f"id {event.id} was given twice"
                given.add(event.id)
                ids[event.uuid] = event.id
            elif event.type == EventType.STOPPED:
                assert ids.pop(event.uuid) != -1, event
            elif event.type == EventType.UNDEFINED and event.detail == UndefinedDetail.REMOVED:
                assert names.pop(event.uuid) == event.name, event
            elif event.type == EventType.DEFINED and event.detail == DefinedDetail.ADDED:
                assert known is None, event
                names[event.uuid] = event.name
            elif event.type == EventType.DEFINED:
                assert known is not None, event
                names[event.uuid] = event.name
        infos = self.doms.snapshot()
        assert names == {info.uuid: info.name for info in infos}
        assert ids == {info.uuid: info.id for info in infos if info.is_active}
        self.tally.events = len(events)

    def the_same_everywhere(self, found: dict[UUID, DomainInfo], which: UUID) -> DomainInfo | None:
        """By UUID, by name, by id and in the list of all."""
        info = self.doms.peek(uuid=which, timeout=DEADLINE)
        assert (info is None) == (which not in found), f"{which} is not where it should be"
        if info is not None:
            assert info.definition.name == info.name == found[which].name
            assert self.doms.peek(name=info.name).uuid == which
            assert info.id == -1 or self.doms.peek(id=info.id).uuid == which
        return info

    def as_found(self, worker: int, key: int, state: int) -> tuple[str, int] | None:
        return (own_name(worker, key, state), own_memory(state)) if state else None

    def hangs(self) -> bool:
        """Whether survivors are left who sleep and are never woken: not once in `SILENCE`. The
        timed waits of the core end many times meanwhile."""
        waiting = self.living
        while waiting := [child for child in waiting if not child.conn.poll()]:
            before = [switches(child.pid) for child in waiting]
            spoke = wait([child.conn for child in waiting], SILENCE)
            still = before == [switches(child.pid) for child in waiting]
            if not spoke and still and all(asleep(child.pid) for child in waiting):
                return True
        return False


def bury(children: list[Child]) -> None:
    """Kill those who are not dead yet; none may have failed before that."""
    for child in children:
        child.kill()
        with suppress(EOFError, ConnectionResetError):
            while child.conn.poll():
                kind, message = child.conn.recv()
                assert kind == "said", f"process {child.pid} raised\n{message}"
        child.close()


def switches(pid: int) -> int:
    """How often the process has begun to sleep."""
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("voluntary_ctxt_switches")]
    return int(line.split()[1])


# --- those who make storms ------------------------------------------------------------------------


def prove_storms(pipe: Pipe, path: str) -> None:
    """Round after round, as told: the storm, the survivors' work and the proof."""
    while True:
        storm = Round(pipe.listen(), path)
        try:
            storm.begin()
            storm.rage()
            storm.finish()
            storm.prove()
        finally:
            storm.close()
        pipe.say(storm.tally)


def watch_storms(pipe: Pipe, path: str) -> None:
    """The same storms; says only whether the survivors hang."""
    while True:
        storm = Round(pipe.listen(), path)
        try:
            storm.begin()
            storm.rage()
            hung = storm.hangs()
            bury(storm.living)
        finally:
            storm.close()
        pipe.say(hung)
