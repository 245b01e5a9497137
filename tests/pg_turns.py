"""Workers take turns at a few locks on PostgreSQL, and write down what they are told of deaths.

`storm_of_turns` runs in a nursery's child: it starts workers of every start method, kills one after
the other at random moments, and lets the last ones finish. Each worker appends to a file of its
own, one `write` an entry, so nothing that it wrote is lost with it. `judge` puts all of them in one
row for each lock.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import msgpack
from killing import DEADLINE, Pipe, until

LOCKS = ["a", "b", "mutex"]
STARTS = ["fork", "spawn", "forkserver"]


@dataclass(frozen=True)
class Plan:
    url: str
    folder: Path
    seed: int
    workers: int
    kills: int
    turns: int  # of each worker that lives to take them


# --- a worker -------------------------------------------------------------------------------------


def take_turns(doms: Any, plan: Plan, number: int) -> None:
    file = os.open(plan.folder / str(number), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)

    def write(what: str, lock: str, died: int = 0) -> None:
        os.write(file, msgpack.packb((what, lock, os.getpid(), time.monotonic_ns(), died)))

    chance = random.Random(f"{plan.seed} {number}")
    for _ in range(plan.turns):
        which = chance.choice(LOCKS)
        write("want", which)
        lock: Any
        if which == "mutex":
            lock = doms.mutex(which, DEADLINE)
            lock.lock(DEADLINE)
        else:
            lock = doms.get(name=which, timeout=DEADLINE)
        died = lock.previous_owner_died
        write("got", which, 0 if died is None else died.pid)
        if which != "mutex":
            lock.data = lock.data + 1
        time.sleep(chance.random() * 0.01)  # the work: to die in
        write("leave", which)
        lock.unlock()
        write("left", which)


def storm_of_turns(pipe: Pipe, plan: Plan) -> None:
    """Says whom it killed."""
    from shmdomains.postgres import PostgresDomainList

    doms = PostgresDomainList.attach(plan.url)
    chance = random.Random(plan.seed)
    begun = 0
    working: list[Any] = []
    killed = []

    def at_work(worker: Any) -> bool:
        file = plan.folder / worker.name
        return file.exists() and file.stat().st_size > 0

    def hire() -> None:
        nonlocal begun
        context: Any = multiprocessing.get_context(STARTS[begun % len(STARTS)])
        worker = context.Process(target=take_turns, args=(doms, plan, begun), name=str(begun))
        worker.start()
        working.append(worker)
        begun += 1

    for _ in range(plan.workers):
        hire()
    while len(killed) < plan.kills:
        wait([worker.sentinel for worker in working], chance.random() * 0.06)
        worker = working.pop(chance.randrange(len(working)))
        until(partial(at_work, worker), "it is at work")
        worker.kill()
        worker.join(DEADLINE)
        if worker.exitcode:
            killed.append(worker.pid)
        hire()
    for worker in working:
        worker.join(6 * DEADLINE)
        assert worker.exitcode == 0, worker.exitcode
    pipe.say(killed)


# --- what is to be read in their files ------------------------------------------------------------


@dataclass
class Turn:
    lock: str
    pid: int
    wanted: int
    got: int | None = None
    told: int = 0
    last: int = 0
    end: str = "want"


def turns(folder: Path) -> Iterator[Turn]:
    for file in folder.iterdir():
        turn: Turn | None = None
        for what, lock, pid, at, died in msgpack.Unpacker(file.open("rb")):
            if what == "want":
                if turn is not None:
                    yield turn
                turn = Turn(lock, pid, at)
            assert turn is not None
            if what == "got":
                turn.got, turn.told = at, died
            turn.end, turn.last = what, at
        if turn is not None:
            yield turn


def judge(folder: Path, lock: str, killed: list[int], last_told: int) -> tuple[int, int]:
    """Each turn began after the one before it had let go or was dead, and was told of a death if
    and only if that one died with the lock. Returns how many turns there were, and how many were
    told. `last_told`: what was told to who took it at the end."""
    every = [turn for turn in turns(folder) if turn.lock == lock]
    # Killed with the lock, perhaps, before it could write so.
    unseen = {turn.pid: turn.wanted for turn in every if turn.got is None}
    assert set(unseen) <= set(killed)
    row = sorted((turn for turn in every if turn.got is not None), key=lambda turn: turn.got or 0)
    row.append(Turn(lock, 0, 1 << 62, 1 << 62, last_told, 1 << 62, "left"))
    told = 0
    for before, turn in itertools.pairwise(row):
        assert turn.got is not None and before.last != turn.last
        left_at = before.last if before.end == "got" else before.got
        assert left_at is not None and turn.got > left_at, f"{before} and {turn} had it at once"
        allowed = {"left": {0}, "leave": {0, before.pid}, "got": {before.pid}}[before.end]
        assert before.end == "left" or before.pid in killed
        wanted = unseen.get(turn.told)
        if wanted is not None and wanted < turn.got:
            del unseen[turn.told]  # each death is told once
        else:
            assert turn.told in allowed, f"{turn} after {before}"
        told += turn.told != 0
    return len(row) - 1, told
