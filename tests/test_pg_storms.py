"""Kill storms on PostgreSQL: those of test_storms.py, and what only this store can show.

storm.py says what a storm is, and what is proven after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pg_servers
import psutil
import pytest
from helpers import SOAK, list_url
from killing import DEADLINE, Child, Pipe, until, xml
from pg_turns import LOCKS, Plan, judge, storm_of_turns, turns
from storm import prove_storms
from storm_worker import Shape
from test_storms import rounds

pg_servers.need()

from shmdomains import LockTimeout  # noqa: E402
from shmdomains.postgres import PostgresDomainList  # noqa: E402

Tried = Callable[[str, int], None]
ROUNDS = 25 if SOAK else 6


@pytest.mark.soak
@pytest.mark.parametrize("part", range(8 if SOAK else 1))
@pytest.mark.parametrize("shape", [Shape.few, Shape.many], ids=["few", "many"])
def test_postgres_survivors_finish_and_nothing_is_lost(
    start: Callable[..., Child],
    tried: Tried,
    shape: Callable[[int, str], Shape],
    part: int,
) -> None:
    seeds = range(part * ROUNDS, (part + 1) * ROUNDS)
    total = rounds(
        start(prove_storms, list_url()), [shape(seed, "postgres") for seed in seeds], tried
    )
    tried("of those storms on PostgreSQL", ROUNDS)
    tried("changes acknowledged on PostgreSQL", total.changes)
    tried("events of storms on PostgreSQL, in one row", total.events)


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(20 if SOAK else 1))
def test_postgres_tells_each_death_once_and_nothing_else(
    start: Callable[..., Child], tmp_path: Path, tried: Tried, seed: int
) -> None:
    kills, turns_of_each = (60, 200) if SOAK else (25, 60)
    plan = Plan(list_url(), tmp_path, seed, workers=6, kills=kills, turns=turns_of_each)
    with PostgresDomainList.create(plan.url) as doms:
        for name in ("a", "b"):
            doms.define(xml(name))
            with doms.get(name=name) as dom:
                dom.data = 0
        killed = start(storm_of_turns, plan).hear(20 * DEADLINE)
        told = 0
        for lock in LOCKS:
            handle = doms.mutex(lock) if lock == "mutex" else doms.peek(name=lock)
            if lock == "mutex":
                with handle as mutex:
                    died = mutex.previous_owner_died
            else:
                with doms.get(handle, timeout=DEADLINE) as dom:
                    died, count = dom.previous_owner_died, dom.data
                mine = [turn.end for turn in turns(tmp_path) if turn.lock == lock]
                acknowledged, unknown = mine.count("left"), mine.count("leave")
                assert acknowledged <= count <= acknowledged + unknown
                tried("increments acknowledged on PostgreSQL, none lost or doubled", acknowledged)
            taken, deaths = judge(tmp_path, lock, killed, 0 if died is None else died.pid)
            tried("locks taken on PostgreSQL, each told of the death before it, if any", taken)
            told += deaths
        tried("deaths told to the next holder on PostgreSQL", told)
        tried("workers killed while they took turns on PostgreSQL", len(killed))
        until(lambda: not doms.locks(), "no lock stays")
        doms.unlink(force=True)


# --- a wait that ends in the instant of the grant -------------------------------------------------


def wait_a_little(pipe: Pipe, url: str) -> None:
    doms = PostgresDomainList.attach(url)
    pipe.say("ready")
    pipe.listen()
    try:
        doms.get(name="a", timeout=A_LITTLE).unlock()
        pipe.say("had it")
    except LockTimeout:
        pipe.say("late")
    pipe.rest()


A_LITTLE = 0.3
WAITING = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


@pytest.mark.parametrize("_", range(20 if SOAK else 3))
def test_a_wait_that_ends_as_postgres_grants_the_lock_leaves_none(
    start: Callable[..., Child], tried: Tried, _: int
) -> None:
    """The server's process is stopped while both happen. Then it said that the time was up, and its
    session had the lock, of which nobody knew."""
    url = list_url()
    with PostgresDomainList.create(url) as doms:
        doms.define(xml("a"))
        waiter = start(wait_a_little, url)
        assert waiter.hear() == "ready"
        with doms.get(name="a") as dom, doms._pool.connect() as conn:
            end = time.monotonic() + A_LITTLE
            waiter.tell()
            until(lambda: conn.execute(WAITING).fetchone(), "it waits")
            [(backend,)] = conn.execute(WAITING).fetchall()
            stopped = psutil.Process(backend)
            stopped.suspend()
            try:
                dom.unlock()
                until(lambda: time.monotonic() > end + 0.1, "its time is up")
            finally:
                stopped.resume()
        tried("waits on PostgreSQL that ended as the lock was granted", 1)
        assert waiter.hear() in ("late", "had it")
        assert doms.locks() == []
        with doms.get(name="a", timeout=0):
            pass
        waiter.close()
        doms.unlink(force=True)
