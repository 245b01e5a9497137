"""A worker is killed before any line of an operation: what does it leave, and who ends it?

The guests are processes. Before each line of the drivers' code that an operation runs, a worker is
killed there. The next operation of another worker, whichever it is, or `reconcile`, leaves record
and guest in agreement: a guest for each active record and a record for each guest, paused if that
says so, and no transient domain that does not run.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pg_servers
import pytest
from helpers import SOAK, list_url
from killing import DEADLINE, Child, ChildDied, Pipe, fork, xml
from sleep_driver import SleepDriver, sleep_driver

import shmdomains.drivers
from shmdomains import DomainInfo, DomainList, DriverError, Job, ShmDomainsError
from shmdomains.drivers import TestDriver
from shmdomains.drivers.hooks import News

pytestmark = pytest.mark.usefixtures("nothing_left")

KINDS = pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
STORES = pytest.mark.parametrize("where", ["robust", "multiprocessing", "postgres"])
DRIVERS = str(Path(shmdomains.drivers.__file__).parent)
HOOKS = {SleepDriver.launch.__code__, SleepDriver.kill.__code__}
UUID = "11111111-1111-1111-1111-111111111111"
VM = xml("vm", UUID)

RESTARTED = VM.replace("<os>", "<on_poweroff>restart</on_poweroff><os>")


def end_guest(driver: SleepDriver, info: DomainInfo) -> None:
    """As it ends by itself."""
    driver.end(info.uuid)


OPERATIONS: dict[str, tuple[Callable[[SleepDriver], Any], ...]] = {
    "start": (lambda d: d.define(VM), lambda d: d.start("vm")),
    "start paused": (lambda d: d.define(VM), lambda d: d.start("vm", paused=True)),
    "create": (lambda d: None, lambda d: d.create(VM)),
    "create over it": (lambda d: d.define(VM), lambda d: d.create(VM)),
    "destroy": (lambda d: (d.define(VM), d.start("vm")), lambda d: d.destroy("vm")),
    "destroy transient": (lambda d: d.create(VM), lambda d: d.destroy("vm")),
    "shutdown": (lambda d: (d.define(VM), d.start("vm")), lambda d: d.shutdown("vm")),
    "restart": (
        lambda d: d.create(VM.replace("<os>", "<on_crash>restart</on_crash><os>")),
        lambda d: d.stopped("vm", shmdomains.ShutoffReason.CRASHED),
    ),
    "suspend": (lambda d: d.create(VM), lambda d: d.suspend("vm")),
    "resume": (lambda d: d.create(VM, paused=True), lambda d: d.resume("vm")),
    "powered off": (
        lambda d: end_guest(d, d.create(VM)),
        lambda d: d.look(d.get("vm"), News(shmdomains.ShutoffReason.SHUTDOWN, "on_poweroff")),
    ),
    "begun anew": (
        lambda d: end_guest(d, d.create(RESTARTED)),
        lambda d: d.look(d.get("vm"), News(shmdomains.ShutoffReason.SHUTDOWN, "on_poweroff")),
    ),
    "undefine": (lambda d: (d.define(VM), d.start("vm")), lambda d: d.undefine("vm")),
    "set_memory": (lambda d: (d.define(VM), d.start("vm")), lambda d: d.set_memory("vm", 99)),
}
"""What is there before, and what the worker is killed in."""

BY_ITSELF = ("powered off", "begun anew")
"""Who died before he looked leaves a guest that ended by itself, which only another look finds."""

NEXT: dict[str, Callable[[SleepDriver], Any]] = {
    "reconcile": lambda d: d.reconcile(),
    "start": lambda d: d.start("vm"),
    "destroy": lambda d: d.destroy("vm"),
    "create": lambda d: d.create(VM),
    "suspend": lambda d: d.suspend("vm"),
    "resume": lambda d: d.resume("vm"),
    "undefine": lambda d: d.undefine("vm"),
    "set_memory": lambda d: d.set_memory("vm", 512),
}


def die_before(line: int) -> Callable[..., Any]:
    """A tracer that kills this process before so many lines of the drivers have been run."""
    left = line

    def trace(frame: Any, event: str, _argument: Any) -> Any:
        nonlocal left
        code = frame.f_code
        if not code.co_filename.startswith(DRIVERS) and code not in HOOKS:
            return None
        if event == "line":
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return trace

    return trace


def victim(pipe: Pipe, driver: SleepDriver, operation: str, line: int) -> None:
    sys.settrace(die_before(line))
    OPERATIONS[operation][1](driver)
    sys.settrace(None)
    pipe.say("done")


def killed(driver: SleepDriver, operation: str, line: int) -> bool:
    """Whether it was killed before this line; else it was done by then."""
    child = fork(victim, driver, operation, line)
    try:
        return bool(child.hear() != "done")
    except ChildDied:
        return True
    finally:
        child.close()


def place_of(where: str) -> str:
    """What `made` takes."""
    if where != "postgres":
        return where
    if (missing := pg_servers.missing()) is not None:
        pytest.skip(f"no PostgreSQL: {missing}")
    return list_url()


def made(where: Any) -> Any:
    """The list of a test in a clean process; one on PostgreSQL is emptied first."""
    if "://" not in where:
        return DomainList(max_domains=8, lock=where)
    doms = shmdomains.open(where)
    driver = TestDriver(doms)
    for info in doms.list():
        if info.is_active:
            driver.destroy(info)
        if info.persistent:
            driver.undefine(info)
    return doms


def every_line(pipe: Pipe, where: str, operation: str, following: list[str], step: int) -> None:
    wrong: list[Any] = []
    with tempfile.TemporaryDirectory() as place:
        for deaths, line in enumerate(range(0, 10000, step)):
            doms = made(where)
            with sleep_driver(doms, Path(place)) as driver:
                OPERATIONS[operation][0](driver)
                if not killed(driver, operation, line):
                    break
                name = following[deaths % len(following)]
                with suppress(ShmDomainsError):  # what it found may refuse it; that is right, too
                    NEXT[name](driver)
                wrong = [*driver.disagreements(), *doms.check().problems]
                wrong += [one for one in driver.reconcile()[1:] if one]
            doms.close()
            if wrong:
                break
    pipe.say(f"{operation}, line {line}, then {name}: {wrong}" if wrong else deaths)


@STORES
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_before_each_line(
    start: Callable[..., Child], tried: Callable[[str, int], None], where: str, operation: str
) -> None:
    deaths = 0
    step = 1 if SOAK else {"robust": 1, "multiprocessing": 3, "postgres": 7}[where]
    url = place_of(where)
    names = ["reconcile"] if operation in BY_ITSELF else list(NEXT)
    for following in [[name] for name in names] if SOAK else [names]:
        said = start(every_line, url, operation, following, step).hear(30 * DEADLINE)
        assert isinstance(said, int), said
        deaths += said
    assert deaths * step > 20
    tried("deaths of workers in drivers' operations", deaths)


def back_up(pipe: Pipe, doms: DomainList) -> None:
    with doms.job("vm", "backup", Job.ASYNC):
        pipe.say("begun")
        pipe.rest()


def a_dead_backup(pipe: Pipe, lock: Any) -> None:
    driver = TestDriver(DomainList(max_domains=4, lock=lock))
    driver.create(VM)
    child = fork(back_up, driver.doms)
    assert child.hear() == "begun"
    child.close()
    found = [driver.reconcile(), [job.operation for job in driver.get("vm").jobs]]
    driver.suspend("vm")
    pipe.say([*found, driver.get("vm").jobs])


@KINDS
def test_an_async_job_of_a_dead_worker_is_left_to_who_goes_on_with_it(
    start: Callable[..., Child], lock: str
) -> None:
    assert start(a_dead_backup, lock).hear() == [(1, [], [], []), ["backup"], ()]


class Deaf(TestDriver):
    """Its guests do not answer, but can be killed."""

    def unpause(self, info: DomainInfo) -> None:
        raise DriverError("no answer")


def suspend(pipe: Pipe, driver: Deaf) -> None:
    driver.pause = lambda info: pipe.say("begun") or pipe.rest()  # type: ignore[method-assign]
    driver.suspend("vm")


def a_deaf_guest(pipe: Pipe, lock: Any) -> None:
    driver = Deaf(DomainList(max_domains=4, lock=lock))
    driver.create(VM)
    child = fork(suspend, driver)
    assert child.hear() == "begun"
    child.close()
    pipe.say(driver.destroy("vm").state.words)


@KINDS
def test_a_guest_that_cannot_be_restored_can_be_destroyed(
    start: Callable[..., Child], lock: str
) -> None:
    assert start(a_deaf_guest, lock).hear() == "shut off"


# --- many workers at once ------------------------------------------------------------------------

NAMES = ["a", "b", "c"]
WORKERS = 4
ROUNDS = 200 if SOAK else 25


def work(pipe: Pipe, driver: SleepDriver, seed: int) -> None:
    """Do whatever there is to do with the domains, until killed."""
    rng = random.Random(seed)
    pipe.say("begun")
    operations: list[Callable[[str], Any]] = [
        *(driver.start, driver.suspend, driver.resume, driver.destroy, driver.shutdown),
        *(driver.undefine, lambda name: driver.define(xml(name))),
        *(lambda name: driver.create(xml(name)), lambda name: driver.set_memory(name, 99)),
    ]
    while True:
        with suppress(ShmDomainsError):
            rng.choice(operations)(rng.choice(NAMES))


def storm(pipe: Pipe, where: str, seed: int) -> None:
    rng = random.Random(seed)
    doms = made(where)
    with tempfile.TemporaryDirectory() as place, sleep_driver(doms, Path(place)) as driver:
        workers: list[Child] = []
        for number in range(WORKERS + ROUNDS):
            workers.append(fork(work, driver, rng.random()))
            assert workers[-1].hear() == "begun"
            if number >= WORKERS:
                workers[-1].conn.poll(rng.random() / 20)
                rng.shuffle(workers)
                workers.pop().close()
        for worker in workers:
            worker.close()
        found = driver.reconcile()
        wrong = [*driver.disagreements(), *doms.check().problems, *found.orphans]
    pipe.say(wrong)  # the test kills us when it has heard, and the guests have to be gone by then


@STORES
@pytest.mark.parametrize("seed", range(2))
def test_a_storm(
    start: Callable[..., Child], tried: Callable[[str, int], None], where: str, seed: int
) -> None:
    """A worker is killed anywhere in each round; in the end every record has its guest, and every
    guest its record."""
    assert start(storm, place_of(where), seed).hear(30 * DEADLINE) == []
    tried("workers killed in storms of drivers' operations", WORKERS + ROUNDS)
