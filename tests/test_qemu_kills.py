"""Workers killed at any line while they start, end, stop real QEMUs, alone and in a storm.

At the end every record that says running has a QEMU that runs, every QEMU has a record, nobody is a
zombie, and the guests' directory has what the records say.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pg_servers
import psutil
import pytest
from helpers import SOAK, list_url
from killing import Child, Pipe, until
from qemu_guests import POWER_OFF, disagreements, files, guests, in_child, need, qemu_driver, xml

need()

import shmdomains  # noqa: E402
import shmdomains.drivers  # noqa: E402
from shmdomains import ShmDomainsError  # noqa: E402
from shmdomains.drivers.qemu import QemuDriver  # noqa: E402

DRIVERS = Path(shmdomains.drivers.__file__).parent
# A command line is made of nothing but values: to die there is to die before there is anything.
PLACES = tuple(
    str(DRIVERS / name) for name in ("base.py", "guests.py", "qemu/driver.py", "qemu/process.py")
)
LOOKS = ("scan", "_directory_of_process", "start_of", "directory_of", "start_time")
"""They only look, at every process of the machine; to die there is to die where they are called."""
STEP = 1 if SOAK else 12
"""Killed before each line, or before one of so many."""
ROUNDS = 200 if SOAK else 40


def powered_off(driver: QemuDriver) -> None:
    info = driver.create(xml(driver, POWER_OFF))
    until(lambda: driver.ended(info) is not None, "the power-off")


OPERATIONS: dict[str, tuple[Callable[[QemuDriver], Any], ...]] = {
    "start": (lambda d: d.define(xml(d)), lambda d: d.start("web1")),
    "create": (lambda d: None, lambda d: d.create(xml(d))),
    "suspend": (lambda d: d.create(xml(d)), lambda d: d.suspend("web1")),
    "set_vcpus": (lambda d: d.create(xml(d)), lambda d: d.set_vcpus("web1", 2)),
    "powered off": (powered_off, lambda d: d.look(d.get("web1"))),
    "destroy": (lambda d: (d.define(xml(d)), d.start("web1")), lambda d: d.destroy("web1")),
}
NEXT: list[Callable[[QemuDriver], Any]] = [
    lambda d: d.start("web1"),
    lambda d: d.destroy("web1"),
    lambda d: d.undefine("web1"),
    lambda d: d.resume("web1"),
]


def die_before(line: int) -> Callable[..., Any]:
    """A tracer that kills this process before so many lines of the drivers have been run."""
    left = line

    def trace(frame: Any, event: str, _argument: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PLACES) or frame.f_code.co_name in LOOKS:
            return None
        if event == "line":
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return trace

    return trace


def kill_before_each_line(pipe: Pipe, operation: str) -> None:
    before, call = OPERATIONS[operation]
    line = random.Random(operation).randrange(STEP)
    killed = 0
    while True:
        with qemu_driver() as driver:
            before(driver)

            def victim(driver: QemuDriver = driver, line: int = line) -> None:
                sys.settrace(die_before(line))
                call(driver)

            if in_child(victim) != -signal.SIGKILL:
                break
            if operation != "powered off":
                with suppress(ShmDomainsError):  # by what it found; that is right, too
                    NEXT[line // STEP % len(NEXT)](driver)
            driver.reconcile()
            assert disagreements(driver) == [], f"line {line}"
            assert driver.reconcile()[1:] == ([], [], [])
        killed += 1
        line += STEP
    pipe.say(killed)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_before_each_line(
    operation: str, start: Callable[..., Child], tried: Callable[[str, int], None]
) -> None:
    killed = start(kill_before_each_line, operation).hear(1200)
    assert killed
    tried("workers killed at work with QEMU", killed)


STORES = pytest.mark.parametrize("where", ["memory", "postgres"])


def place_of(where: str) -> str:
    if where != "postgres":
        return where
    if (missing := pg_servers.missing()) is not None:
        pytest.skip(f"no PostgreSQL: {missing}")
    return list_url()


# --- a storm ------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")


def work(driver: QemuDriver, done: int, seed: int) -> None:
    chance = random.Random(seed)
    calls = (driver.start, driver.suspend, driver.resume, driver.destroy)
    while True:
        with suppress(ShmDomainsError):  # another worker was faster
            chance.choice(calls)(chance.choice(NAMES))
        os.write(done, b".")


def storm(pipe: Pipe, where: str) -> None:
    chance = random.Random(15)
    workers: list[tuple[int, int]] = []

    def hire(number: int) -> None:
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                work(driver, theirs, number)
            finally:
                os._exit(1)
        os.close(theirs)
        workers.append((pid, ours))

    def dismiss(pid: int, pipe: int) -> None:
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(pipe)

    with ExitStack() as stack:
        doms = stack.enter_context(shmdomains.open(where)) if "://" in where else None
        driver = stack.enter_context(qemu_driver(doms))
        for name in NAMES:
            driver.define(xml(driver, name=name))
        for number in range(4):
            hire(number)
        try:
            for number in range(ROUNDS):
                victim = workers.pop(chance.randrange(4))
                assert os.read(victim[1], 1 << 16)  # it has done something
                select.select([victim[1]], [], [], chance.random() / 5)
                dismiss(*victim)
                hire(4 + number)
        finally:
            for worker in workers:
                dismiss(*worker)
        driver.reconcile()
        assert disagreements(driver) == [] and driver.doms.check().problems == []
        assert driver.reconcile()[1:] == ([], [], [])
        for info in driver.list(active=True):
            driver.destroy(info)
        assert guests(driver) == files(driver) == []
        assert psutil.Process().children(recursive=True) == []
    pipe.say()


@pytest.mark.soak
@pytest.mark.timeout(1800)
@STORES
def test_a_storm_of_workers_that_are_killed(
    start: Callable[..., Child], tried: Callable[[str, int], None], where: str
) -> None:
    start(storm, place_of(where)).hear(1800)
    tried("workers killed at work with QEMU", ROUNDS)
