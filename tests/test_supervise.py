"""Guests that do something by themselves, and the worker that watches them.

Most guests are `sleep`s; one driver says of guests that are no processes whatever the test wants.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pg_servers
import pytest
from helpers import DEADLINE, EVERY_STORE, SOAK, Store, list_url, xml
from killing import Child, Pipe, fork, until
from sleep_driver import SleepDriver, sleep_driver
from test_driver_operations import acting

import shmdomains
from shmdomains import (
    DomainInfo,
    DomainList,
    DomainState,
    DriverError,
    EventType,
    NoEvents,
    PausedReason,
    RunningReason,
    ShmDomainsError,
    ShutoffReason,
    StoppedDetail,
)
from shmdomains.drivers import Driver, Launched, TestDriver, supervision
from shmdomains.drivers.hooks import News

OFF = News(ShutoffReason.SHUTDOWN, "on_poweroff")
RESET = News(ShutoffReason.SHUTDOWN, "on_reboot")
PANIC = News(ShutoffReason.CRASHED, "on_crash")
LOOK = News()


@pytest.fixture(params=[one for one in EVERY_STORE if one.name != "dict"], ids=lambda one: one.name)
def store(request: pytest.FixtureRequest) -> Store:
    return request.param


def is_off(driver: Driver, name: str = "web1") -> bool:
    return driver.doms.peek(name=name) is None or not driver.get(name).is_active


# --- processes ----------------------------------------------------------------------------------


@pytest.fixture
def sleeps(doms: Any, tmp_path: Path) -> Iterator[SleepDriver]:
    with sleep_driver(doms, tmp_path) as driver:
        yield driver


def end(info: DomainInfo) -> None:
    assert info.pid is not None
    os.kill(info.pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(info.pid, 0)


def test_a_guest_whose_process_is_gone(sleeps: SleepDriver) -> None:
    """One that ran before anybody watched, one that was begun since, a transient one."""
    sleeps.define(xml("web1"))
    first = sleeps.start("web1")
    events = sleeps.doms.watch(timeout=0)
    with sleeps.supervise():
        for info in (first, sleeps.create(xml("web2"))):
            end(info)
            until(lambda name=info.name: is_off(sleeps, name), "the end in the record")
        info = sleeps.start("web1")
        assert info.id != first.id
        end(info)
        until(lambda: is_off(sleeps), "the end in the record")
    assert sleeps.get("web1").reason is ShutoffReason.CRASHED
    stopped = [event for event in events if event.type is EventType.STOPPED]
    assert [event.detail for event in stopped] == [StoppedDetail.CRASHED] * 3
    assert sleeps.disagreements() == [] and [info.name for info in sleeps.list()] == ["web1"]


def test_one_that_ended_while_nobody_watched(sleeps: SleepDriver) -> None:
    sleeps.define(xml("web1"))
    end(sleeps.start("web1"))
    with sleeps.supervise():
        until(lambda: is_off(sleeps), "the end in the record")


def test_one_that_is_destroyed_is_left_to_who_does_it(sleeps: SleepDriver) -> None:
    sleeps.define(xml("web1"))
    events = sleeps.doms.watch(timeout=0)
    with sleeps.supervise():
        for _ in range(20):
            sleeps.start("web1")
            sleeps.destroy("web1")
    stopped = [event.detail for event in events if event.type is EventType.STOPPED]
    assert stopped == [StoppedDetail.DESTROYED] * 20


def test_what_a_dead_worker_left_is_settled_without_anybody(
    start: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(a_start_that_is_cut_off).hear() == "FAILED"


class Stuck(TestDriver):
    pipe: Pipe

    def launch(self, info: DomainInfo) -> Launched:
        self.pipe.say("begun")
        self.pipe.rest()


def begin(pipe: Pipe, doms: DomainList) -> None:
    driver = Stuck(doms)
    driver.pipe = pipe
    driver.start("web1")


def a_start_that_is_cut_off(pipe: Pipe) -> None:
    doms = DomainList(max_domains=4)
    driver = TestDriver(doms)
    driver.define(xml("web1"))
    child = fork(begin, doms)
    assert child.hear() == "begun"
    with driver.supervise():
        child.close()
        until(lambda: is_off(driver), "the end of the start")
        reason: Any = driver.get("web1").reason
        pipe.say(reason.name)


# --- whatever a hypervisor says -----------------------------------------------------------------


class Told(TestDriver):
    """Its guests are the test's own process, as far as anybody can see, and say what the test
    says."""

    def __init__(self, doms: Any) -> None:
        super().__init__(doms, timeout=5)
        self.ends: dict[int, ShutoffReason] = {}
        self.states: dict[int, tuple[DomainState, int]] = {}
        self.ears: list[tuple[asyncio.AbstractEventLoop, asyncio.Queue[News]]] = []
        self.reboots = 0
        self.launches = 0
        self.pid = os.getpid()
        self.lives = True

    def launch(self, info: DomainInfo) -> Launched:
        self.launches += 1
        self.ends.clear()
        return Launched(self.pid, data={"number": self.launches})

    def alive(self, info: DomainInfo) -> bool:
        return self.lives

    def ended(self, info: DomainInfo) -> ShutoffReason | None:
        return self.ends.get(info.id)

    def seen(self, info: DomainInfo) -> tuple[DomainState, int] | None:
        return self.states.get(info.id)

    def finish_reboot(self, info: DomainInfo) -> bool:
        if not self.reboots:
            return False
        self.reboots -= 1
        self.ends.clear()
        return True

    async def news(self, info: DomainInfo) -> AsyncIterator[News]:
        queue: asyncio.Queue[News] = asyncio.Queue()
        self.ears.append((asyncio.get_running_loop(), queue))
        while True:
            yield await queue.get()

    def say(self, *news: News) -> None:
        until(lambda: self.ears, "whoever listens")
        loop, queue = self.ears[-1]
        for one in news:
            loop.call_soon_threadsafe(queue.put_nowait, one)


@pytest.fixture
def told(doms: Any) -> Told:
    return Told(doms)


ANSWERS = [
    ("on_poweroff", "destroy", OFF, (DomainState.SHUTOFF, ShutoffReason.SHUTDOWN)),
    ("on_poweroff", "restart", OFF, (DomainState.RUNNING, RunningReason.BOOTED)),
    ("on_reboot", "destroy", RESET, (DomainState.SHUTOFF, ShutoffReason.SHUTDOWN)),
    ("on_reboot", "restart", RESET, (DomainState.RUNNING, RunningReason.BOOTED)),
    ("on_crash", "destroy", PANIC, (DomainState.SHUTOFF, ShutoffReason.CRASHED)),
    ("on_crash", "restart", PANIC, (DomainState.RUNNING, RunningReason.BOOTED)),
    ("on_crash", "preserve", PANIC, (DomainState.CRASHED, 0)),
]


def state_of(driver: Driver, name: str = "web1") -> tuple[DomainState, int]:
    info = driver.get(name)
    return info.state, info.reason


@pytest.mark.parametrize(("event", "action", "news", "wanted"), ANSWERS)
def test_the_definition_has_the_answer(
    told: Told, event: str, action: str, news: News, wanted: tuple[DomainState, int]
) -> None:
    told.define(acting(event, action))
    info = told.start("web1")
    assert news.reason is not None
    told.ends[info.id] = news.reason
    with told.supervise():
        told.say(news, news)  # twice does no harm
        launches = 1 + (action == "restart")
        until(lambda: (told.launches, state_of(told)) == (launches, wanted), "the answer")
    assert (
        told.launches == launches and (told.get("web1").id == info.id) == told.get("web1").is_active
    )


def test_what_is_said_of_a_guest_that_is_there_no_more(told: Told) -> None:
    """The domain began anew, and kept its id: the old guest's end is not the new one's."""
    told.define(acting("on_poweroff", "restart"))
    old = told.start("web1")
    told.ends[old.id] = ShutoffReason.SHUTDOWN
    assert told.look(old, OFF).state is DomainState.RUNNING
    assert told.launches == 2
    for news in (OFF, PANIC, LOOK):
        assert told.look(old, news).state is DomainState.RUNNING
    assert told.launches == 2
    told.destroy("web1")
    assert told.look(old, OFF).state is DomainState.SHUTOFF and told.launches == 2


def test_the_end_of_an_older_guest_is_not_that_of_the_one_after_it(told: Told) -> None:
    """Which has ended, too, in another way, and waits for whoever heard that."""
    told.define(acting("on_poweroff", "restart"))
    old = told.start("web1")
    told.ends[old.id] = ShutoffReason.SHUTDOWN
    told.pid = os.getppid()
    new = told.look(old, OFF)
    assert new.id == old.id and new.pid != old.pid
    told.ends[old.id] = ShutoffReason.CRASHED
    assert told.look(old, OFF).state is DomainState.RUNNING and told.launches == 2
    assert told.look(new, PANIC).reason is ShutoffReason.CRASHED


def test_a_process_that_is_gone_is_left_to_who_hears_why(told: Told) -> None:
    """It went between two words: a stop, and why it ended."""
    told.define(xml("web1"))
    info = told.start("web1")
    with told.supervise():
        until(lambda: told.ears, "whoever listens")
        told.ends[info.id] = ShutoffReason.CRASHED  # as all who are gone
        told.lives = False
        told.say(LOOK, OFF)
        until(lambda: is_off(told), "the end")
    assert told.get("web1").reason is ShutoffReason.SHUTDOWN


def test_a_reboot_is_finished(told: Told) -> None:
    told.define(xml("web1"))
    info = told.start("web1")
    told.reboots = 1
    told.ends[info.id] = ShutoffReason.SHUTDOWN
    with told.supervise():
        told.say(OFF)
        until(lambda: not told.ends, "the reboot")
        told.ends[info.id] = ShutoffReason.SHUTDOWN
        told.say(OFF)
        until(lambda: is_off(told), "the power-off")
    assert told.launches == 1


def test_one_that_stops_and_goes_on(told: Told) -> None:
    told.define(xml("web1"))
    info = told.start("web1")
    stopped = DomainState.PAUSED, PausedReason.IOERROR
    with told.supervise():
        for state in (stopped, (DomainState.RUNNING, RunningReason.UNPAUSED)):
            told.states[info.id] = state
            told.say(LOOK)
            until(lambda state=state: state_of(told) == state, "the state")


def test_one_that_cannot_be_asked_is_asked_again(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "AGAIN", 0.01)
    told.define(xml("web1"))
    info = told.start("web1")
    answers = [DriverError("no answer"), DriverError("no answer"), RuntimeError("a mistake")]

    def ended(info: DomainInfo) -> ShutoffReason:
        if answers:
            raise answers.pop()
        return ShutoffReason.SHUTDOWN

    told.ended = ended  # type: ignore[method-assign]
    with told.supervise():
        told.say(OFF)
        until(lambda: is_off(told), "the end")
    assert not answers and info.is_active


def test_one_whose_end_the_driver_sees_late(
    sleeps: SleepDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is gone, and the driver finds it still, a few times."""
    sleeps.define(xml("web1"))
    info = sleeps.start("web1")
    end(info)
    late = iter([True] * 5)
    alive = sleeps.alive
    monkeypatch.setattr(sleeps, "alive", lambda info: next(late, False) or alive(info))
    with sleeps.supervise():
        until(lambda: is_off(sleeps), "the end in the record")
    assert next(late, None) is None


def test_one_that_is_preserved_and_then_gone(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    told.define(acting("on_crash", "preserve"))
    info = told.start("web1")
    told.ends[info.id] = ShutoffReason.CRASHED
    for _ in range(2):
        assert told.look(info, PANIC).state is DomainState.CRASHED
    monkeypatch.setattr(told, "alive", lambda info: False)
    assert told.look(info).state is DomainState.SHUTOFF


class Remote(Told):
    """Its guests have no process of this host."""

    def launch(self, info: DomainInfo) -> Launched:
        return super().launch(info)._replace(pid=None)


def test_a_guest_without_a_process_is_heard(doms: Any) -> None:
    driver = Remote(doms)
    driver.define(xml("web1"))
    with driver.supervise():
        info = driver.start("web1")
        driver.ends[info.id] = ShutoffReason.SHUTDOWN
        driver.say(OFF)
        until(lambda: is_off(driver), "the end in the record")


def test_a_mistake_in_a_source_of_news_does_not_end_it(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "AGAIN", 0.01)
    news, mistakes = told.news, [RuntimeError("in it"), ValueError("before it")]

    def failing(info: DomainInfo) -> Any:
        if mistakes:
            raise mistakes.pop()
        return news(info)

    told.news = failing  # type: ignore[assignment]
    told.define(xml("web1"))
    info = told.start("web1")
    with told.supervise():
        until(lambda: told.ears, "whoever listens")
        told.ends[info.id] = ShutoffReason.SHUTDOWN
        told.say(OFF)
        until(lambda: is_off(told), "the end in the record")
    assert not mistakes


def test_without_descriptors_it_is_looked_at_now_and_then(
    sleeps: SleepDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(supervision.os, "pidfd_open", refused)
    monkeypatch.setattr(supervision, "SWEEP", 0.05)
    sleeps.define(xml("web1"))
    with sleeps.supervise():
        info = sleeps.start("web1")
        end(info)
        until(lambda: is_off(sleeps), "the end in the record")


def test_a_mistake_in_reading_does_not_end_it(
    sleeps: SleepDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "AGAIN", 0.01)
    mistakes = [RuntimeError("a"), RuntimeError("b")]
    peek = supervision._Watch._look_at_all

    def failing(self: Any) -> None:
        if mistakes:
            raise mistakes.pop()
        peek(self)

    monkeypatch.setattr(supervision._Watch, "_look_at_all", failing)
    sleeps.define(xml("web1"))
    end(sleeps.start("web1"))
    with sleeps.supervise():
        until(lambda: is_off(sleeps), "the end in the record")


def test_many_guests_have_no_thread_each(tmp_path: Path) -> None:
    before = threading.active_count()
    with DomainList(max_domains=256) as doms, sleep_driver(doms, tmp_path) as driver:
        infos = [driver.create(xml(f"g{number}")) for number in range(200)]
        with driver.supervise():
            for info in infos[:20]:
                end(info)
            until(lambda: len(doms) == 180, "their ends in the record")
            assert threading.active_count() - before <= supervision.THREADS + 3


def test_missed_events_are_no_missed_guests(sleeps: SleepDriver) -> None:
    """Whoever is told that events were missed looks at all."""
    seen: list[Any] = []
    watch = sleeps.doms.watch

    class Missed:
        def __init__(self) -> None:
            self.real = watch(timeout=0.05)

        def __iter__(self) -> Iterator[Any]:
            for event in self.real:
                seen.append(event)
                yield shmdomains.EventsMissed(1, event.number)

    sleeps.define(xml("web1"))
    term = supervision._Watch(sleeps)
    stop = threading.Event()
    term._events = Missed()
    sleeps.doms.watch = lambda **_: Missed()
    thread = threading.Thread(target=lambda: asyncio.run(term.run(stop)))
    thread.start()
    try:
        for _ in range(3):
            end(sleeps.start("web1"))
            until(lambda: is_off(sleeps), "the end in the record")
        assert seen
    finally:
        stop.set()
        thread.join(DEADLINE)
        del sleeps.doms.watch
    assert not thread.is_alive()


def test_a_list_without_events_cannot_be_watched() -> None:
    with DomainList(max_domains=4, events=0) as doms, pytest.raises(NoEvents):
        TestDriver(doms).supervise()


def test_the_list_is_closed_under_it(told: Told) -> None:
    election = told.supervise()
    until(lambda: election.leader, "the leader")
    told.doms.close()
    until(lambda: not election.running, "its end")


# --- storms -------------------------------------------------------------------------------------

NAMES = ["a", "b", "c"]
WORKERS = 3
ROUNDS = 100 if SOAK else 12


def work(pipe: Pipe, driver: SleepDriver, seed: float) -> None:
    """Take part in the supervision, and do what there is to do, until killed."""
    rng = random.Random(seed)
    election = driver.supervise()
    pipe.say(election.name)
    operations = [driver.start, driver.suspend, driver.resume, driver.destroy]
    while True:
        with suppress(ShmDomainsError):
            rng.choice(operations)(rng.choice(NAMES))


def storm(pipe: Pipe, where: str, seed: int) -> None:
    """Guests of `own` are ended by this process alone, and nobody else's hand is on them; those of
    the others by anybody. Each round a worker is killed, every other one the one that watches."""
    rng = random.Random(seed)
    doms = shmdomains.open(where) if "://" in where else DomainList(max_domains=8, lock=where)
    with tempfile.TemporaryDirectory() as place, sleep_driver(doms, Path(place)) as driver:
        for name in ["own", *NAMES]:
            driver.define(xml(name))
        events = doms.watch(timeout=0)
        ended: list[int] = []
        workers: list[Child] = []
        for number in range(WORKERS + ROUNDS):
            workers.append(fork(work, driver, rng.random()))
            lock = workers[-1].hear()
            if number < WORKERS:
                continue
            info = driver.start("own")
            ended.append(info.id)
            for other in driver.list(active=True):
                if other.name != "own" and other.pid and rng.random() < 0.5:
                    with suppress(ProcessLookupError):
                        os.kill(other.pid, signal.SIGKILL)
            watching = [one.holder.pid for one in doms.locks() if one.name == lock and one.holder]
            victims = [one for one in workers if one.pid in watching] if number % 2 else []
            victim = rng.choice(victims or workers)
            if rng.random() < 0.5:
                end(info)
                victim.close()
            else:
                victim.close()
                end(info)
            workers.remove(victim)
            until(lambda: is_off(driver, "own"), "the end of a guest in the record", DEADLINE)
        for worker in workers:
            worker.close()
        driver.reconcile()
        wrong = [*driver.disagreements(), *doms.check().problems]
        stopped: dict[int, list[Any]] = {}
        for event in events:
            if event.type is EventType.STOPPED:
                stopped.setdefault(event.id, []).append(event.detail)
        wrong += [f"{id} was stopped {how}" for id, how in stopped.items() if len(how) != 1]
        wrong += [id for id in ended if stopped[id] != [StoppedDetail.CRASHED]]
    pipe.say((wrong, len(stopped)))


@pytest.mark.parametrize("where", ["robust", "multiprocessing", "postgres"])
def test_a_storm(
    start: Callable[..., Child], tried: Callable[[str, int], None], where: str
) -> None:
    """Guests end, and those who watch them; each end gets into the record once, by its reason."""
    if where == "postgres":
        if (missing := pg_servers.missing()) is not None:
            pytest.skip(f"no PostgreSQL: {missing}")
        where = list_url()
    wrong, stopped = start(storm, where, 15).hear(30 * DEADLINE)
    assert wrong == []
    tried("guests that ended, while who watches them was killed", stopped)
    tried("supervising workers killed", ROUNDS)
