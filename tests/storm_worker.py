"""What the workers of a storm do, and what they write down of it (storm.py has the storms).

A bit of everything, again and again, until a worker is killed or has done what is to be done once
it is quiet. Each writes into a `Ledger`, shared and outside of the list, what it asks for and then
that it was acknowledged; and it looks at what it finds on its way: a record must be one commit's,
and hold what this worker was told.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from uuid import UUID

from killing import DEADLINE, Pipe, attach, libc, xml

from shmdomains import Domain, DomainInfo, DomainList, LockTimeout
from shmdomains.memory._core import core

QUIET_TURNS = 40
OWN = 3  # domains that a worker defines, renames and undefines; nobody else changes them
WAVES = [1] * 13 + [2] * 6 + [12]  # of workers that come and die, on one list
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Shape:
    """What a round looks like; `seed` decides all that stands in none of the fields."""

    seed: int
    domains: int
    workers: int
    doomed: int  # of the workers, in each wave
    waves: int
    lock: str
    crowded: bool  # all on one CPU: who is woken has to wait until somebody leaves it
    aimed: bool  # at the moment just after a wake-up
    strangers: bool  # they attach; else they inherit the list
    fused: bool = False  # killed at a store into the segment; needs the core with crash points
    tasks: int = 0  # of each process, each a worker (storm_tasks.py); 0: its only thread is it

    @classmethod
    def few(cls, seed: int, lock: str = "robust") -> Shape:
        """Most wait for each other all the time."""
        return cls._of(seed, lock, 1, 3, crowded=0.7, aimed=0.6)

    @classmethod
    def many(cls, seed: int, lock: str = "robust") -> Shape:
        """Most are in the middle of something."""
        least, most = {"robust": (150, 400), "postgres": (30, 60)}.get(lock, (60, 100))
        return cls._of(seed, lock, least, most, crowded=0.3, aimed=0.2)

    @classmethod
    def _of(
        cls, seed: int, lock: str, least: int, most: int, crowded: float, aimed: float
    ) -> Shape:
        chance = random.Random(seed)
        workers = chance.randint(4, 8)
        return cls(
            seed=seed,
            domains=chance.randint(least, most),
            workers=workers,
            doomed=workers - chance.randint(1, 2),
            waves=chance.choice(WAVES),
            lock=lock,
            crowded=chance.random() < crowded,
            aimed=chance.random() < aimed,
            strangers=lock != "multiprocessing" and chance.random() < 0.4,
        )

    @property
    def all_workers(self) -> int:
        return (self.workers + (self.waves - 1) * self.doomed) * (self.tasks or 1)

    @property
    def room(self) -> int:
        """As many domains as there can be, and no more."""
        return self.domains + self.all_workers * OWN

    @property
    def patience(self) -> float:
        """For one lock."""
        return 0.8 * DEADLINE


# --- what was asked for, and what was acknowledged ------------------------------------------------


class Ledger:
    """Two words for everything that one worker alone changes; shared by fork.

    A worker has a count for each domain, and a state for each of its own: 0, or the number of the
    turn that named it and of the turn that defined it. Beside them, for each worker, after how many
    stores it is to die.
    """

    def __init__(self, shape: Shape) -> None:
        self._columns = shape.domains + OWN
        size = shape.all_workers * self._columns
        shared = mmap.mmap(-1, 8 * (2 * size + 1 + shape.all_workers))
        self._asked = (ctypes.c_uint64 * size).from_buffer(shared)
        self._done = (ctypes.c_uint64 * size).from_buffer(shared, 8 * size)
        self._quiet = ctypes.c_uint64.from_buffer(shared, 16 * size)
        self.fuses = (ctypes.c_uint64 * shape.all_workers).from_buffer(shared, 16 * size + 8)

    def count(self, worker: int, domain: int) -> int:
        """The cell of a count."""
        return worker * self._columns + domain

    def own(self, worker: int, key: int) -> int:
        """The cell of a state."""
        return (worker + 1) * self._columns - OWN + key

    def ask(self, cell: int, after: int) -> None:
        self._asked[cell] = after

    def acknowledge(self, cell: int) -> None:
        self._done[cell] = self._asked[cell]

    def done(self, cell: int) -> int:
        return self._done[cell]

    def allowed(self, cell: int) -> set[int]:
        return {self._done[cell], self._asked[cell]}

    def counts(self, domain: int) -> list[set[int]]:
        """Of each worker: what its count may be."""
        rows = slice(domain, None, self._columns)
        return [set(pair) for pair in zip(self._done[rows], self._asked[rows], strict=True)]

    @property
    def total(self) -> int:
        """Counts that were acknowledged."""
        starts = range(0, len(self._done), self._columns)
        return sum(sum(self._done[start : start + self._columns - OWN]) for start in starts)

    @property
    def quiet(self) -> bool:
        return bool(self._quiet.value)

    def fall_quiet(self) -> None:
        self._quiet.value = 1


def shared_name(domain: int) -> str:
    return f"shared-{domain}"


def shared_uuid(domain: int) -> UUID:
    return UUID(int=1 << 64 | domain)


def own_uuid(worker: int, key: int) -> UUID:
    return UUID(int=2 << 64 | worker << 8 | key)


def own_name(worker: int, key: int, state: int) -> str:
    return f"own-{worker}-{key}-{state >> 32}"


def own_memory(state: int) -> int:
    return 1024 + (state & 0xFFFFFFFF)


def padding(counts: Iterable[int]) -> str:
    """So that a record's size changes with each commit, and with it its place in the heap; and
    some are so large that the commit takes a while, some so small that they are in the record."""
    total = sum(counts)
    return "x" * (total % 60 if total % 2 else total * 37 % 500 * (1 if total % 4 else 50))


def counts_of(view: Domain | DomainInfo) -> tuple[int, ...]:
    """The counts in a shared domain; what else is in there has to be of the same commit."""
    id, pad, counts = view.data
    assert view.id == id, f"torn: {view.name} has id {view.id}, its data was written with {id}"
    assert pad == padding(counts), f"torn: the data of {view.name} is of two commits"
    assert view.definition.name == view.name
    result: tuple[int, ...] = counts
    return result


# --- a worker -------------------------------------------------------------------------------------


class RolledBack(Exception):
    """To leave a `with` block with nothing committed."""


class Worker:
    """It does a bit of everything until it is killed, or has finished."""

    def __init__(self, doms: DomainList, shape: Shape, ledger: Ledger, number: int) -> None:
        self.doms, self.shape, self.ledger, self.number = doms, shape, ledger, number
        self.chance = random.Random(f"{shape.seed} {number}")
        self.patience = shape.patience
        self.turn = 0
        mix: list[tuple[int, Callable[[], None]]] = [
            (6, self.count_one),
            (3, self.count_under_the_list_lock),
            (3, self.count_two),
            (2, self.count_and_commit_part_way),
            (1, self.change_and_roll_back),
            (2, self.give_up_soon),
            (8, self.change_own),
            (2, self.look_at_one),
            (1, self.look_at_all),
        ]
        self.operations = [operation for _, operation in mix]
        self.weights = list(accumulate(weight for weight, _ in mix))

    def work(self) -> None:
        left = QUIET_TURNS
        while left:
            left -= self.ledger.quiet
            self.turn += 1
            self.light(self.number)
            [operation] = self.chance.choices(self.operations, cum_weights=self.weights)
            operation()

    def light(self, process: int) -> None:
        """Be killed after so many stores, if that is wanted by now."""
        stores = self.ledger.fuses[process]
        if stores:
            self.ledger.fuses[process] = 0
            points = ctypes.CDLL(core.__file__)
            made = ctypes.c_long.in_dll(points, "sd_crash_count").value
            ctypes.c_long.in_dll(points, "sd_crash_at").value = made + stores

    # Shared domains

    def choose(self) -> int:
        return self.chance.randrange(self.shape.domains)

    def add_one(self, dom: Domain, domain: int) -> None:
        """Add one to our count in a locked domain; start it or shut it down now and then."""
        counts = list(counts_of(dom))
        mine = self.ledger.done(self.ledger.count(self.number, domain))
        assert counts[self.number] == mine, f"{dom.name}: {counts[self.number]}, {mine} were told"
        counts[self.number] += 1
        if self.chance.random() < 0.3:
            self.toggle(dom)
        dom.data = [dom.id, padding(counts), counts]

    def ask_for_one(self, dom: Domain, domain: int) -> int:
        """The same, written down; returns what is to be acknowledged once it is committed."""
        cell = self.ledger.count(self.number, domain)
        self.ledger.ask(cell, self.ledger.done(cell) + 1)
        self.add_one(dom, domain)
        return cell

    def toggle(self, dom: Domain) -> None:
        if dom.is_active:
            dom.deactivate()
        else:
            dom.activate(pid=os.getpid(), timeout=self.patience)

    def get(self, domain: int, timeout: float) -> Domain:
        if self.chance.random() < 0.5:
            return self.doms.get(name=shared_name(domain), timeout=timeout)
        return self.doms.get(uuid=shared_uuid(domain), timeout=timeout)

    def count_one(self) -> None:
        domain = self.choose()
        with self.get(domain, self.patience) as dom:
            cell = self.ask_for_one(dom, domain)
        self.ledger.acknowledge(cell)

    def count_under_the_list_lock(self) -> None:
        """The patch's form."""
        domain = self.choose()
        with self.doms.locked(self.patience):
            dom = self.doms.find_by_name(shared_name(domain), self.patience)
        assert dom is not None, f"lost: {shared_name(domain)}"
        with dom:
            cell = self.ask_for_one(dom, domain)
        self.ledger.acknowledge(cell)

    def count_two(self) -> None:
        both = list({self.choose(), self.choose()})
        with self.doms.lock_many([shared_uuid(one) for one in both], self.patience) as locked:
            cells = [self.ask_for_one(*pair) for pair in zip(locked, both, strict=True)]
        for cell in cells:
            self.ledger.acknowledge(cell)

    def count_and_commit_part_way(self) -> None:
        domain = self.choose()
        with self.get(domain, self.patience) as dom:
            for _ in range(2):
                cell = self.ask_for_one(dom, domain)
                dom.commit(self.patience)
                self.ledger.acknowledge(cell)

    def change_and_roll_back(self) -> None:
        """Nobody asked for it, so it may not be there."""
        domain = self.choose()
        with suppress(RolledBack), self.get(domain, self.patience) as dom:
            self.add_one(dom, domain)
            raise RolledBack

    def give_up_soon(self) -> None:
        """A wait that ends early must leave nothing behind that the kernel would follow."""
        domain = self.choose()
        try:
            dom = self.get(domain, self.chance.random() * 0.001)
        except LockTimeout:
            return
        with dom:
            cell = self.ask_for_one(dom, domain)
        self.ledger.acknowledge(cell)

    # Domains of one's own

    def change_own(self) -> None:
        with self.change_of_own() as (key, before, after):
            self.apply(key, before, after)

    @contextmanager
    def change_of_own(self) -> Iterator[tuple[int, int, int]]:
        key = self.chance.randrange(OWN)
        cell = self.ledger.own(self.number, key)
        before = self.ledger.done(cell)
        after = self.plan(before)
        self.ledger.ask(cell, after)
        yield key, before, after
        self.ledger.acknowledge(cell)

    def plan(self, before: int) -> int:
        """Define, redefine, undefine or rename."""
        if not before:
            return self.turn << 32 | self.turn
        return self.chance.choice(
            [before & ~0xFFFFFFFF | self.turn, 0, self.turn << 32 | before & 0xFFFFFFFF]
        )

    def apply(self, key: int, before: int, after: int) -> None:
        which, name = own_uuid(self.number, key), own_name(self.number, key, after)
        if not after:
            self.doms.undefine(uuid=which, timeout=self.patience)
        elif not before or before >> 32 == after >> 32:
            self.doms.define(xml(name, which, own_memory(after)), self.patience)
        else:
            with self.doms.locked(self.patience):
                dom = self.doms.find_by_uuid(which, self.patience)
                assert dom is not None, f"lost: {own_name(self.number, key, before)}"
                with dom:
                    self.doms.rename(dom, name, self.patience)

    # Looking, without a lock

    def look_at_one(self) -> None:
        info = self.doms.peek(name=shared_name(self.choose()))
        assert info is not None
        counts_of(info)
        worker = self.chance.randrange(self.shape.all_workers)
        info = self.doms.peek(uuid=own_uuid(worker, self.chance.randrange(OWN)), timeout=None)
        assert info is None or info.definition.name == info.name

    def look_at_all(self) -> None:
        infos = {info.uuid: info for info in self.doms.snapshot()}
        for domain in range(min(self.shape.domains, 10)):
            counts_of(infos[shared_uuid(domain)])


def die_with_the_parent() -> None:
    """Also when one hangs in a lock: a failed round leaves no processes."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def work(pipe: Pipe, doms: DomainList, shape: Shape, ledger: Ledger, number: int) -> None:
    """The life of a worker. It says when it is ready, and how it ended unless it is killed."""
    worker = Worker(doms, shape, ledger, number)
    pipe.say("ready")
    worker.work()
    pipe.say("done")
    pipe.rest()


Work = Callable[..., None]


def inherit_and_work(pipe: Pipe, work: Work, doms: DomainList, *rest: Any) -> None:
    die_with_the_parent()
    pipe.listen()
    work(pipe, doms, *rest)


def attach_and_work(pipe: Pipe, work: Work, path: str, *rest: Any) -> None:
    die_with_the_parent()
    pipe.listen()
    work(pipe, attach(path), *rest)
