"""Real QEMUs that end, stop and go on by themselves, and the worker that watches them.

How each end comes about is the guest's doing: it powers off, panics, resets; or somebody's from
outside: a signal, `quit`, SIGKILL.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import pg_servers
import psutil
import pytest
from helpers import DEADLINE, SOAK, list_url
from killing import Child, Pipe, fork, until
from qemu_guests import (
    HALT,
    PANIC,
    POWER_OFF,
    RESET,
    disagreements,
    files,
    guests,
    need,
    qemu_driver,
    xml,
)

need()

import shmdomains  # noqa: E402
from shmdomains import (  # noqa: E402
    DomainInfo,
    DomainList,
    DomainState,
    EventType,
    PausedReason,
    RunningReason,
    ShmDomainsError,
    ShutoffReason,
    StoppedDetail,
)
from shmdomains.drivers.qemu import QemuDriver, events  # noqa: E402


@pytest.fixture
def driver() -> Iterator[QemuDriver]:
    with qemu_driver() as driver:
        yield driver


def signalled(number: int) -> Callable[[QemuDriver, DomainInfo], None]:
    return lambda driver, info: os.kill(info.pid or 0, number)


def nothing(driver: QemuDriver, info: DomainInfo) -> None:
    """The guest does it."""


PANICS = '<panic model="isa"/>'
ENDS: dict[str, tuple[bytes, Callable[[QemuDriver, DomainInfo], Any], ShutoffReason]] = {
    "powers off": (POWER_OFF, nothing, ShutoffReason.SHUTDOWN),
    "panics": (PANIC, nothing, ShutoffReason.CRASHED),
    "resets": (RESET, nothing, ShutoffReason.SHUTDOWN),
    "is killed": (HALT, signalled(signal.SIGKILL), ShutoffReason.CRASHED),
    "is told to end": (HALT, signalled(signal.SIGTERM), ShutoffReason.SHUTDOWN),
    "quits": (HALT, lambda driver, info: driver.qmp(info, "quit"), ShutoffReason.SHUTDOWN),
}


def definition(driver: QemuDriver, code: bytes, name: str = "web1", more: str = "") -> str:
    """A reset ends it."""
    text = xml(driver, code, name, more=PANICS)
    return text.replace("<devices>", f"<on_reboot>destroy</on_reboot>{more}<devices>")


def is_off(driver: QemuDriver, name: str = "web1") -> bool:
    return not driver.get(name).is_active


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Counts the guests that somebody listens to."""
    count, follow = threading.Semaphore(0), events.follow

    async def counted(path: str) -> AsyncIterator[Any]:
        told = follow(path)
        yield await anext(told)
        count.release()
        async for news in told:
            yield news

    monkeypatch.setattr(events, "follow", counted)
    return count


@pytest.mark.parametrize("way", ENDS)
def test_one_that_ends_by_itself(
    driver: QemuDriver, followed: threading.Semaphore, way: str
) -> None:
    """Watched from its beginning; there when somebody begins to watch; ended before that."""
    code, act, reason = ENDS[way]
    watch = driver.doms.watch(timeout=0)
    driver.define(definition(driver, code))
    with driver.supervise():
        info = driver.start("web1", paused=True)
        assert followed.acquire(timeout=DEADLINE)
        act(driver, driver.resume("web1"))
        until(lambda: is_off(driver), "the end in the record")
        driver.start("web1", paused=True)
        assert followed.acquire(timeout=DEADLINE)
    with driver.supervise():
        assert followed.acquire(timeout=DEADLINE)
        act(driver, driver.resume("web1"))
        until(lambda: is_off(driver), "the end in the record")
    info = driver.start("web1")
    act(driver, info)
    until(lambda: driver.ended(info) is not None, "the end")
    with driver.supervise():
        until(lambda: is_off(driver), "the end in the record")
        stopped = [event.detail for event in watch if event.type is EventType.STOPPED]
    detail = StoppedDetail[reason.name]
    # Nobody heard why its process ended, but of one that is there it can be seen.
    alone = detail if code != HALT else StoppedDetail.CRASHED
    assert stopped == [detail, detail, alone]
    assert guests(driver) == files(driver) == []


def test_a_power_off_that_begins_anew(driver: QemuDriver) -> None:
    """Also of a guest that was asked to reboot, and one whose definition wants that."""
    driver.define(definition(driver, POWER_OFF, more="<on_poweroff>restart</on_poweroff>"))
    with driver.supervise():
        info = driver.start("web1")
        pids = {info.pid}
        until(
            lambda: pids.add(driver.get("web1").pid) or len(pids - {None}) > 3, "its fourth guest"
        )
        now = driver.get("web1")
        assert now.id == info.id
        driver.destroy("web1")
    assert guests(driver) == files(driver) == []
    driver.define(definition(driver, POWER_OFF).replace("destroy</on_reboot", "restart</on_reboot"))
    watch = driver.doms.watch(timeout=0)
    with driver.supervise():
        info = driver.start("web1", paused=True)
        driver.reboot("web1")  # it powers off as it would if it had a system
        driver.resume("web1")
        until(lambda: is_off(driver), "its second power-off")
    stopped = [event.detail for event in watch if event.type is EventType.STOPPED]
    assert stopped == [StoppedDetail.SHUTDOWN] and info.id > 0


def test_one_that_stops_and_goes_on(driver: QemuDriver) -> None:
    driver.define(definition(driver, HALT))
    info = driver.start("web1")
    with driver.supervise():
        for command, state in {
            "stop": (DomainState.PAUSED, PausedReason.UNKNOWN),
            "cont": (DomainState.RUNNING, RunningReason.UNPAUSED),
        }.items():
            driver.qmp(info, command)

            def is_so(state: tuple[DomainState, int] = state) -> bool:
                now = driver.get("web1")
                return (now.state, now.reason) == state

            until(is_so, "the state in the record")
        assert driver.suspend("web1").reason is PausedReason.USER
        assert driver.resume("web1").state is DomainState.RUNNING
        driver.destroy("web1")
    assert guests(driver) == files(driver) == []


def test_a_guest_that_does_not_answer_is_no_hindrance(driver: QemuDriver) -> None:
    """It is stopped, so it says nothing; that it is killed is seen all the same, and so is the end
    of others meanwhile."""
    for name in ("web1", "web2"):
        driver.define(definition(driver, HALT, name))
        driver.start(name)
    frozen, other = driver.get("web1"), driver.get("web2")
    os.kill(frozen.pid or 0, signal.SIGSTOP)
    with driver.supervise():
        os.kill(other.pid or 0, signal.SIGTERM)
        until(lambda: is_off(driver, "web2"), "the end of the other one")
        os.kill(frozen.pid or 0, signal.SIGKILL)
        until(lambda: is_off(driver), "the end of the frozen one")
    assert guests(driver) == files(driver) == []


# --- a storm ------------------------------------------------------------------------------------

NAMES = ("a", "b")
WORKERS = 3
ROUNDS = 200 if SOAK else 24


def work(pipe: Pipe, driver: QemuDriver, seed: float) -> None:
    chance = random.Random(seed)
    election = driver.supervise()
    pipe.say(election.name)
    calls = (driver.start, driver.suspend, driver.resume, driver.destroy)
    while True:
        with suppress(ShmDomainsError):  # another worker was faster
            chance.choice(calls)(chance.choice(NAMES))


def storm(pipe: Pipe, where: str) -> None:
    """`own` is ended by this process or by itself alone, in each of the ways, while workers are
    killed: every other time the one that watches."""
    chance = random.Random(15)
    doms = shmdomains.open(where) if "://" in where else DomainList(max_domains=8)
    workers: list[Child] = []
    wrong: list[Any] = []
    wanted: dict[int, tuple[ShutoffReason, bool]] = {}
    with qemu_driver(doms) as driver:
        for name in NAMES:
            driver.define(definition(driver, HALT, name))
        watch = doms.watch(timeout=0)
        for number in range(WORKERS + ROUNDS):
            workers.append(fork(work, driver, chance.random()))
            lock = workers[-1].hear()
            if number < WORKERS:
                continue
            code, act, reason = list(ENDS.values())[number % len(ENDS)]
            driver.define(definition(driver, code, "own"))
            info = driver.start("own")
            watching = [one.holder.pid for one in doms.locks() if one.name == lock and one.holder]
            victims = [one for one in workers if one.pid in watching] if number % 4 < 2 else []
            victim = chance.choice(victims or workers)
            if code != HALT and number % 2:
                victim.close()
            with suppress(ShmDomainsError):
                act(driver, info)
            until(lambda: is_off(driver, "own"), "the end of a guest in the record", DEADLINE)
            victim.close()
            workers.remove(victim)
            wanted[info.id] = reason, code != HALT
        for worker in workers:
            worker.close()
        driver.reconcile()
        wrong += [*disagreements(driver), *doms.check().problems]
        for info in driver.list(active=True):
            driver.destroy(info)
        wrong += guests(driver) + files(driver)
        # Killed workers are there, for `fork` waits for none.
        wrong += [one for one in psutil.Process().children() if "qemu" in one.name()]
        stopped: dict[int, list[Any]] = {}
        for event in watch:
            if event.type is EventType.STOPPED:
                stopped.setdefault(event.id, []).append(event.detail)
        wrong += [f"{id} was stopped {how}" for id, how in stopped.items() if len(how) != 1]
        for id, (reason, is_seen) in wanted.items():
            # Of a process that is gone somebody has to have heard why.
            may_be = {reason.name} if is_seen else {reason.name, "CRASHED"}
            if not {how.name for how in stopped.get(id, [])} <= may_be or id not in stopped:
                wrong.append(f"{id} ended {stopped.get(id)}, not {reason.name}")
    pipe.say(([str(one) for one in wrong], len(stopped)))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("where", ["memory", "postgres"])
def test_a_storm(
    start: Callable[..., Child], tried: Callable[[str, int], None], where: str
) -> None:
    if where == "postgres":
        if (missing := pg_servers.missing()) is not None:
            pytest.skip(f"no PostgreSQL: {missing}")
        where = list_url()
    wrong, stopped = start(storm, where).hear(1800)
    assert wrong == []
    tried("QEMUs that ended, while who watches them was killed", stopped)
    tried("supervising workers killed", ROUNDS)
