"""Guests that end by themselves, in every way, while those who watch them are killed.

Each end is told once, by its reason, whoever was killed when; at the end every record that says
running has a QEMU that answers, every QEMU has a record, nobody is a zombie, and nothing is left in
the guests' directory.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import psutil
import pytest
from helpers import DEADLINE, SOAK
from killing import Child, Pipe, fork, until
from qemu_guests import PANIC, POWER_OFF, disagreements, files, guests, need, qemu_driver, xml

need()

from test_qemu_kills import STORES, place_of  # noqa: E402

import shmdomains  # noqa: E402
from shmdomains import DomainInfo, EventType, ShmDomainsError  # noqa: E402
from shmdomains.drivers.qemu import QemuDriver  # noqa: E402

WORKERS = 3
ROUNDS = 100 if SOAK else 15
NAMES = ("a", "b")
PVPANIC = '<panic model="isa"/>'
OWN = {"off": "SHUTDOWN", "panics": "CRASHED", "killed": "CRASHED"}
"""Domains that end by themselves or by this process; how each is told."""


def work(pipe: Pipe, driver: QemuDriver, seed: float) -> None:
    """Take part in the supervision, and do what there is to do, until killed."""
    chance = random.Random(seed)
    election = driver.supervise()
    pipe.say(election.name)
    calls = (driver.start, driver.suspend, driver.resume, driver.destroy)
    while True:
        with suppress(ShmDomainsError):  # another worker was faster
            chance.choice(calls)(chance.choice(NAMES))


def dismiss(worker: Child) -> None:
    worker.close()
    with suppress(ChildProcessError):  # it has been, already
        os.waitpid(worker.pid, 0)


def is_off(driver: QemuDriver, name: str) -> bool:
    return not driver.get(name).is_active


def begin(driver: QemuDriver, name: str) -> DomainInfo:
    """It may end before `start` returns; who watches leaves it alone until then."""
    info = driver.start(name)
    if name == "killed":
        assert info.pid is not None
        os.kill(info.pid, signal.SIGKILL)
    return info


def storm(pipe: Pipe, where: str, seed: int) -> None:
    chance = random.Random(seed)
    wanted: dict[int, str] = {}
    with ExitStack() as stack:
        doms = stack.enter_context(shmdomains.open(where)) if "://" in where else None
        driver = stack.enter_context(qemu_driver(doms))
        for name, code in {"off": POWER_OFF, "panics": PANIC}.items():
            driver.define(xml(driver, code, name, PVPANIC))
        for name in ("killed", *NAMES):
            driver.define(xml(driver, name=name))
        events = driver.doms.watch(timeout=0)
        workers: list[Child] = []
        for number in range(WORKERS + ROUNDS):
            workers.append(fork(work, driver, chance.random()))
            lock = workers[-1].hear()
            if number < WORKERS:
                continue
            leaders = [
                one.holder.pid for one in driver.doms.locks() if one.name == lock and one.holder
            ]
            victims = [one for one in workers if one.pid in leaders] if number % 3 else []
            victim = chance.choice(victims or workers)
            names = list(OWN)
            chance.shuffle(names)
            dies = chance.randrange(len(names) + 1)
            for at, name in enumerate(names):
                if at == dies:
                    dismiss(victim)
                wanted[begin(driver, name).id] = OWN[name]
            dismiss(victim)
            workers.remove(victim)
            for info in driver.list(active=True):
                if info.name in NAMES and info.pid and chance.random() < 0.3:
                    with suppress(ProcessLookupError):
                        os.kill(info.pid, signal.SIGKILL)
            for name in names:
                until(lambda name=name: is_off(driver, name), f"the end of {name}", 2 * DEADLINE)
        for worker in workers:
            dismiss(worker)
        driver.reconcile()
        wrong: list[Any] = [*disagreements(driver), *driver.doms.check().problems]
        wrong += [one for one in driver.reconcile()[1:] if one]
        for info in driver.list(active=True):
            driver.destroy(info)
        wrong += [*guests(driver), *files(driver), *psutil.Process().children(recursive=True)]
        told: dict[int, list[str]] = {}
        for event in events:
            if event.type is EventType.STOPPED:
                told.setdefault(event.id, []).append(event.detail.name)
        wrong += [f"{id} was stopped {how}" for id, how in told.items() if len(how) != 1]
        wrong += [
            f"{id}: {told.get(id)}, not {how}"
            for id, how in wanted.items()
            if told.get(id) != [how]
        ]
    pipe.say((list(map(str, wrong)), len(told), len(wanted)))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@STORES
def test_guests_end_and_those_who_watch_them(
    start: Callable[..., Child], tried: Callable[[str, int], None], where: str
) -> None:
    wrong, told, by_themselves = start(storm, place_of(where), 15).hear(1800)
    assert wrong == [] and by_themselves == ROUNDS * len(OWN)
    tried("QEMUs that ended, while who watches them was killed", told)
    tried("supervising workers killed", ROUNDS)
