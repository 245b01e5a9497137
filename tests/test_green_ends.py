"""Greenlets that wait, and how they end: in time, killed, or with their process."""

from __future__ import annotations

import gc
import os
import random
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from greens import (
    HOWS,
    LEAVES_NOTHING,
    LOCKS,
    LONG,
    Ticks,
    begin,
    keep,
    keep_later,
    play,
    queued,
    together,
)
from helpers import SOAK
from killing import DEADLINE, Pipe, soon, xml
from tasks import Start, hold, new_list, say_what_is_taken, taken

from shmdomains import (
    DomainList,
    JobTimeout,
    LockTimeout,
)
from shmdomains.memory.rooms import SLICE

pytestmark = LEAVES_NOTHING

Tried = Callable[[str, int], None]

WITH_TIMEOUT: dict[str, Callable[[DomainList, float], Any]] = {
    "get": lambda doms, timeout: doms.get("a", timeout=timeout),
    "locked": lambda doms, timeout: doms.locked(timeout).__enter__(),
    "mutex": lambda doms, timeout: doms.mutex("m").lock(timeout),
    "job": lambda doms, timeout: doms.job("a", "mine", timeout=timeout).__enter__(),
}


# --- whoever waits ----------------------------------------------------------------------------


def times_out(doms: DomainList, what: str) -> None:
    from gevent.event import Event

    leave, ticks = Event(), Ticks()
    holder = keep(doms, what, leave)

    def wait() -> None:
        before = ticks.count
        with pytest.raises(LockTimeout, match=r"for 0\.\d s|within 0\.05 s") as caught:
            WITH_TIMEOUT[what](doms, 0.05)
        assert isinstance(caught.value, JobTimeout) == (what == "job")
        assert caught.value.holder is not None and caught.value.holder.pid == os.getpid()
        assert f"process {os.getpid()}" in str(caught.value)
        assert ticks.count > before + 5

    together(wait)
    queued(0)
    assert not holder.ready()
    leave.set()
    holder.get()
    ticks.stop()


@pytest.mark.parametrize("what", WITH_TIMEOUT)
def test_a_timeout_names_the_holder(start: Start, path: str, what: str) -> None:
    play(start, path, "green", times_out, what)


def ended_while_waiting(doms: DomainList, what: str, end: str) -> list[str]:
    import gevent
    from gevent.event import Event

    leave, log = Event(), list[str]()
    holder = keep(doms, what, leave)

    def wait(name: str) -> None:
        with LOCKS[what](doms):
            log.append(name)

    def impatient() -> None:
        with gevent.Timeout(0.02, False):
            wait("impatient")

    first = gevent.spawn(impatient) if end == "timeout" else gevent.spawn(wait, "first")
    second = gevent.spawn(wait, "second")
    queued(2)
    if end == "kill":
        first.kill()
    elif end == "kill after the lock was freed":
        leave.set()
        holder.join()
        first.kill(block=False)
    first.join()
    leave.set()
    gevent.joinall([holder, second], raise_error=True)
    return log


@pytest.mark.parametrize("end", ["kill", "timeout", "kill after the lock was freed"])
@pytest.mark.parametrize("what", LOCKS)
def test_whoever_ends_while_it_waits_holds_nothing(
    start: Start, path: str, what: str, end: str
) -> None:
    log = play(start, path, "green", ended_while_waiting, what, end)
    assert log == ["second"] or (end.startswith("kill after") and log == ["first", "second"])


def waits_for_process(pipe: Pipe, path: str, what: str, how: str) -> None:
    """The hub goes on while another process has it."""
    import gevent

    begin(how)
    doms, ticks = DomainList.attach(path=path), Ticks()

    def wait() -> None:
        with LOCKS[what](doms):
            pass

    waiting = [gevent.spawn(wait) for _ in range(2)]
    queued(2)
    for _ in range(2):
        ticks.more()
        gevent.sleep(2 * SLICE)
    assert not any(one.ready() for one in waiting)
    pipe.say("waits")
    gevent.joinall(waiting, raise_error=True)
    ticks.stop()
    pipe.say(taken(doms))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("what", ["get", "lock_many"])
def test_a_wait_for_another_process(start: Start, path: str, how: str, what: str) -> None:
    with new_list(path):
        holder = start(hold, path, "a")
        assert holder.hear() == "held"
        waiter = start(waits_for_process, path, what, how)
        assert waiter.hear() == "waits"
        assert holder.ask("changed") == "free"
        assert waiter.hear() == []


# --- how greenlets end ------------------------------------------------------------------------


def killed_inside(doms: DomainList, what: str) -> None:
    import gevent
    from gevent.event import Event

    def run() -> None:
        with LOCKS[what](doms) as held:
            if what in ("get", "lookup", "handle"):
                held.data = "not this"
            gevent.sleep(LONG)

    holder = gevent.spawn(run)
    gevent.sleep(0)
    assert taken(doms) != []
    follower = keep_later(doms, what)
    queued(1)
    holder.kill()
    follower.get(timeout=DEADLINE)
    assert taken(doms) == [] and doms.peek("a").data is None
    inner = Event()
    keep(doms, what, inner).kill()
    assert taken(doms) == []


@pytest.mark.parametrize("what", LOCKS)
def test_killed_inside(start: Start, path: str, what: str) -> None:
    """Rolled back, and unlocked; whoever waits gets it."""
    play(start, path, "green", killed_inside, what)


def ends_with_it(doms: DomainList, how_it_ends: str) -> list[str]:
    import gevent

    kept: list[Any] = []

    def run() -> None:
        kept.append(doms.mutex("m"))
        kept[-1].lock()
        if how_it_ends == "list":
            doms.lock()
        else:
            kept.append(doms.get("a"))
            kept[-1].data = "not this"
        if how_it_ends == "raises":
            gevent.getcurrent().parent.NOT_ERROR += (ZeroDivisionError,)
            raise ZeroDivisionError
        if how_it_ends == "killed":
            gevent.sleep(LONG)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        holder = gevent.spawn(run)
        gevent.sleep(0)
        waiting = keep_later(doms, "locked" if how_it_ends == "list" else "get")
        holder.kill() if how_it_ends == "killed" else holder.join()
        waiting.get(timeout=DEADLINE)
        assert taken(doms) == [] and doms.peek("a").data is None
        kept.clear()
        del holder
        gc.collect()
    return [str(one.message) for one in caught if one.category is ResourceWarning]


@pytest.mark.parametrize("end", ["returns", "raises", "killed", "list"])
def test_a_greenlet_that_ends_while_it_holds_something(start: Start, path: str, end: str) -> None:
    words = play(start, path, "green", ends_with_it, end)
    assert len(words) == 2
    for what in ("DomainList" if end == "list" else "domain 'a'", "'m'"):
        assert any(what in one for one in words), words


def jobs_given_up(doms: DomainList) -> None:
    import gevent
    from gevent.event import Event

    leave, ticks = Event(), Ticks()
    jobs = [gevent.spawn(with_a_job, doms, name) for name in "ab"]
    gevent.sleep(0)
    holder = keep(doms, "lock_many", leave)
    for one in jobs:
        one.kill(block=False)
    queued(2)  # each for its domain, to end its job
    for one in jobs:
        one.kill()
    ticks.more()
    assert [len(doms.peek(name).jobs) for name in "ab"] == [1, 1]
    leave.set()
    holder.get()
    with gevent.Timeout(DEADLINE):
        while doms.peek("a").jobs or doms.peek("b").jobs:
            ticks.more(1)
    ticks.stop()


def with_a_job(doms: DomainList, name: str) -> None:
    import gevent

    with doms.job(name, "backup"):
        gevent.sleep(LONG)


@pytest.mark.parametrize("how", HOWS)
def test_jobs_whose_end_is_given_up(start: Start, path: str, how: str) -> None:
    """They end once their domains are free, and the hub does not wait for that."""
    play(start, path, how, jobs_given_up)


def random_kills(doms: DomainList, seed: int, number: int) -> tuple[int, int]:
    """Each is killed at a moment of its own. What came to its end is counted once."""
    import gevent

    chance = random.Random(seed)
    done = {"a": 0, "b": 0}
    killed = 0

    def work(which: int) -> None:
        name = chance.choice("ab")
        if which == 0:
            with doms.lock_many(["a", "b"]) as both:
                gevent.sleep(0)
                for dom in both:
                    dom.data = (dom.data or 0) + 1
            name = "ab"
        elif which == 1:
            with doms.locked():
                gevent.sleep(0)
                with doms.find_by_name(name) as dom:
                    dom.data = (dom.data or 0) + 1
        elif which == 2:
            with doms.mutex("m"), doms.get(name, timeout=LONG) as dom:
                dom.data = (dom.data or 0) + 1
                gevent.sleep(0)
        elif which == 3:
            with doms.job(name, "backup"):
                gevent.sleep(0)
            return
        else:
            with doms.get(name) as dom:
                before = dom.data or 0
                gevent.sleep(chance.choice((0, 0, 0, 0.001)))
                dom.data = before + 1
        for one in name:
            done[one] += 1

    def one_of_them() -> None:
        nonlocal killed
        try:
            with gevent.Timeout(chance.choice((None, None, None, 0.002))):
                work(chance.randrange(7))
        except gevent.Timeout:
            killed += 1

    alive: list[Any] = []
    for _ in range(number):
        alive.append(gevent.spawn(one_of_them))
        if len(alive) > 20:
            victim = alive.pop(chance.randrange(len(alive)))
            if chance.random() < 0.8:
                victim.kill(block=chance.random() < 0.5)
            victim.join()
            killed += isinstance(victim.value, gevent.GreenletExit)
        if chance.random() < 0.3:
            gevent.sleep(0)
    gevent.joinall(alive, raise_error=True)
    assert taken(doms) == []
    assert {name: doms.peek(name).data for name in done} == done
    return sum(done.values()), killed


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("seed", range(4 if SOAK else 1))
def test_thousands_of_kills(start: Start, path: str, how: str, seed: int, tried: Tried) -> None:
    done, killed = play(start, path, how, random_kills, seed, 4000)
    assert done > 500 and killed > 500
    tried("greenlets that were killed at random", killed)


# --- processes with greenlets -----------------------------------------------------------------


def fork_in_a_greenlet(doms: DomainList) -> None:
    import gevent
    import gevent.os

    def error(call: Callable[[], object]) -> str:
        try:
            call()
        except Exception as exc:
            return type(exc).__name__
        return "none"

    def run() -> None:
        with doms.mutex("m") as mutex, doms.job("b", "backup") as job, doms.locked():
            with doms.find_by_name("a") as dom:
                dom.data = 3
                waiting = keep_later(doms, "get")
                queued(1)
                child = gevent.os.fork()
                if not child:
                    status = 1
                    try:
                        assert error(dom.commit) == "DomainNotLocked"
                        assert error(doms.unlock) == "ListNotLocked"
                        assert error(mutex.unlock) == "MutexNotLocked"
                        assert error(lambda: job.progress(1)) == "NotOwner"
                        assert taken(doms) == ["list", "a", "job backup", "mutex"]
                        exclude_on(doms, "c")
                        status = 0
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(status)
                assert os.waitpid(child, 0)[1] == 0
                job.progress(1)
                dom.data = 4
            waiting.get(timeout=DEADLINE)

    together(run)
    assert doms.peek("a").data == 4


def exclude_on(doms: DomainList, name: str) -> None:
    import gevent

    def add() -> None:
        with doms.get(name) as dom:
            before = dom.data or 0
            gevent.sleep(0)
            dom.data = before + 1

    together(*[add] * 5)
    assert doms.peek(name).data == 5


@pytest.mark.parametrize("how", HOWS)
def test_fork_in_a_greenlet(start: Start, path: str, how: str) -> None:
    play(start, path, how, fork_in_a_greenlet)


def hold_in_greenlets(pipe: Pipe, path: str, how: str) -> None:
    import gevent

    begin(how)
    doms = DomainList.attach(path=path)

    def run(what: str) -> None:
        with {**LOCKS, "b": lambda doms: doms.get("b")}[what](doms) as held:
            if what in ("get", "b"):
                held.data = "not this"
            gevent.sleep(LONG)

    for what in ("get", "b", "mutex", "locked", "get"):
        gevent.spawn(run, what)
    queued(1)
    pipe.say("held")
    pipe.rest()


@pytest.mark.parametrize("how", HOWS)
def test_a_process_is_killed_with_greenlets_inside(start: Start, path: str, how: str) -> None:
    with new_list(path) as wrapped:
        doms = wrapped.plain
        victim = start(hold_in_greenlets, path, how)
        assert victim.hear() == "held"
        looker = start(say_what_is_taken, path)
        assert looker.ask() == ["list", "a", "b", "mutex"]
        victim.kill()
        for name in "ab":
            with doms.get(name, timeout=DEADLINE) as dom:
                died = dom.previous_owner_died
                assert died is not None and died.pid == victim.pid
                assert dom.data is None
        with doms.mutex("m", timeout=DEADLINE) as mutex:
            assert mutex.previous_owner_died is not None
        with doms.locked(DEADLINE):
            pass
        assert looker.ask() == []


GREENLETS, ROUNDS, DOMAINS = 50, 12, 10


def add_in_greenlets(pipe: Pipe, path: str, how: str, seed: int, rounds: int) -> None:
    """Says each increment of its own in its data: ``{who: count}``."""
    import gevent

    begin(how)
    doms, chance = DomainList.attach(path=path), random.Random(seed)

    def run() -> None:
        for _ in range(rounds):
            with doms.get(f"d{chance.randrange(DOMAINS)}") as dom:
                data = dict(dom.data or {})
                gevent.sleep(chance.choice((0, 0, 0, 0.001)))
                dom.data = {**data, seed: data.get(seed, 0) + 1}

    pipe.say("ready")
    together(*[run] * GREENLETS)
    pipe.say("done")
    pipe.rest()


def test_many_greenlets_of_two_processes(start: Start, path: str, tried: Tried) -> None:
    """While others, greenlets too, are killed inside."""
    with DomainList.create(path=path, max_domains=64) as doms:
        for number in range(DOMAINS):
            doms.define(xml(f"d{number}"))
        lasting = [
            start(add_in_greenlets, path, how, seed, ROUNDS) for seed, how in enumerate(HOWS)
        ]
        assert [one.hear() for one in lasting] == ["ready"] * 2
        for seed in range(10, 16):
            victim = start(add_in_greenlets, path, "green", seed, 1000)
            assert victim.hear() == "ready"
            with soon("an increment of the victim", 3 * DEADLINE):
                while not any(seed in (info.data or {}) for info in doms.snapshot()):
                    lasting[0].conn.poll(0.001)
            victim.kill()
        assert [one.hear(3 * DEADLINE) for one in lasting] == ["done"] * 2
        for who in range(2):
            found = sum((info.data or {}).get(who, 0) for info in doms.snapshot())
            assert found == GREENLETS * ROUNDS
        assert doms.check().problems == []
        tried("increments by greenlets of two processes", 2 * GREENLETS * ROUNDS)
