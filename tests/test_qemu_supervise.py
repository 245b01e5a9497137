"""What real QEMUs do by themselves, and whoever watches them.

Each end is told once, by its reason. A guest that halts is ended from outside, the others end as
soon as they run.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
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

from shmdomains import (  # noqa: E402
    DomainInfo,
    DomainState,
    EventType,
    PausedReason,
    RunningReason,
    ShmDomainsError,
)
from shmdomains.drivers.qemu import QemuDriver, monitor  # noqa: E402

PVPANIC = '<panic model="isa"/>'


@pytest.fixture
def driver() -> Iterator[QemuDriver]:
    with qemu_driver() as found:
        yield found


def acting(text: str, **actions: str) -> str:
    said = "".join(f"<{event}>{action}</{event}>" for event, action in actions.items())
    return text.replace("<devices>", f"{said}<devices>")


def state_of(driver: QemuDriver) -> str:
    info = driver.get("web1")
    return f"{info.state.words} ({getattr(info.reason, 'name', '').lower()})"


def stopped(events: Any) -> list[Any]:
    return [event.detail for event in events if event.type is EventType.STOPPED]


def kill(driver: QemuDriver, info: DomainInfo) -> None:
    os.kill(info.pid or 0, signal.SIGKILL)


def terminate(driver: QemuDriver, info: DomainInfo) -> None:
    os.kill(info.pid or 0, signal.SIGTERM)


def quit_it(driver: QemuDriver, info: DomainInfo) -> None:
    with suppress(ShmDomainsError):  # it may hang up before it answers
        driver.qmp(info, "quit")


def nothing(driver: QemuDriver, info: DomainInfo) -> None:
    """It ends by itself."""


ENDS: dict[str, tuple[bytes, dict[str, str], Callable[[QemuDriver, DomainInfo], None], str, str]]
ENDS = {
    "power-off": (POWER_OFF, {}, nothing, "shut off (shutdown)", "SHUTDOWN"),
    "panic": (PANIC, {}, nothing, "shut off (crashed)", "CRASHED"),
    "reset": (
        RESET,
        {"on_reboot": "destroy", "on_poweroff": "restart"},
        nothing,
        "shut off (shutdown)",
        "SHUTDOWN",
    ),
    "SIGKILL": (HALT, {}, kill, "shut off (crashed)", "CRASHED"),
    "SIGTERM": (HALT, {}, terminate, "shut off (shutdown)", "SHUTDOWN"),
    "quit": (HALT, {}, quit_it, "shut off (shutdown)", "SHUTDOWN"),
}


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
@pytest.mark.parametrize("how", ENDS)
def test_a_guest_that_ends(driver: QemuDriver, how: str, paused: bool) -> None:
    code, actions, end, wanted, detail = ENDS[how]
    driver.define(acting(xml(driver, code, more=PVPANIC), **actions))
    events = driver.doms.watch(timeout=0)
    with driver.supervise():
        info = driver.start("web1", paused=paused)
        if paused and end is nothing:
            driver.resume("web1")
        if end in (terminate, quit_it):  # only who listens knows
            until(lambda: listened(driver, info), "whoever listens")
        end(driver, info)
        until(lambda: not driver.get("web1").is_active, "the end in the record")
        assert state_of(driver) == wanted
    assert [one.name for one in stopped(events)] == [detail]
    assert guests(driver) == files(driver) == []


def test_one_that_begins_anew_is_watched_again(driver: QemuDriver) -> None:
    driver.define(acting(xml(driver, POWER_OFF), on_poweroff="restart"))
    events = driver.doms.watch(timeout=0)
    pids = set()
    with driver.supervise():
        info = driver.start("web1")
        for _ in range(3):
            pids.add(driver.get("web1").pid)
            before = driver.get("web1").pid
            until(lambda before=before: driver.get("web1").pid not in (None, before), "a new guest")
        driver.destroy("web1")
    assert len(pids) == 3 and [one.name for one in stopped(events)] == ["DESTROYED"]
    assert driver.get("web1").id != info.id and guests(driver) == files(driver) == []


def test_one_that_is_asked_to_reboot(driver: QemuDriver) -> None:
    """The first power-off is the reboot's, the second one is its own."""
    driver.define(xml(driver, POWER_OFF))
    info = driver.start("web1", paused=True)
    driver.reboot("web1")
    events = driver.doms.watch(timeout=0)
    with driver.supervise():
        driver.resume("web1")
        until(lambda: not driver.get("web1").is_active, "the second power-off")
    said = [(event.type.name, event.id) for event in events]
    assert said.count(("STOPPED", info.id)) == 1 and state_of(driver) == "shut off (shutdown)"


def test_one_that_stops_and_goes_on(driver: QemuDriver) -> None:
    """As if by somebody else's hand, and by its disk."""
    driver.define(xml(driver))
    info = driver.start("web1")
    with driver.supervise():
        driver.qmp(info, "stop")
        until(lambda: driver.get("web1").state is DomainState.PAUSED, "the pause")
        assert driver.get("web1").reason is PausedReason.UNKNOWN
        driver.qmp(info, "cont")
        until(lambda: driver.get("web1").state is DomainState.RUNNING, "the way on")
        assert driver.get("web1").reason is RunningReason.UNPAUSED
        driver.destroy("web1")


@pytest.mark.parametrize("how", ["power-off", "panic", "SIGKILL"])
def test_one_that_ended_while_nobody_watched(driver: QemuDriver, how: str) -> None:
    code, _, end, wanted, detail = ENDS[how]
    driver.define(xml(driver, code, more=PVPANIC))
    info = driver.start("web1")
    end(driver, info)
    until(lambda: driver.ended(info) is not None, "the end")
    events = driver.doms.watch(timeout=0)
    assert [one.name for one in driver.reconcile().ended] == ["web1"]
    assert state_of(driver) == wanted and [one.name for one in stopped(events)] == [detail]
    assert driver.reconcile()[1:] == ([], [], [])


def test_a_reconcile_obeys(driver: QemuDriver) -> None:
    driver.define(acting(xml(driver, POWER_OFF), on_poweroff="restart"))
    info = driver.start("web1")
    until(lambda: driver.ended(info) is not None, "the end")
    assert driver.reconcile().ended == []
    assert driver.get("web1").is_active and driver.get("web1").pid != info.pid
    driver.destroy("web1")


# --- its connection -----------------------------------------------------------------------------


def listened(driver: QemuDriver, info: DomainInfo) -> bool:
    """Whether somebody has the guest's events: QEMU greets one at a time."""
    with socket.socket(socket.AF_UNIX) as another:
        another.settimeout(0.2)
        another.connect(driver.place(info).events)
        try:
            return not another.recv(4096)
        except TimeoutError:
            return True


def test_a_connection_that_an_older_one_still_has(driver: QemuDriver) -> None:
    """Its end is seen without; when it is free it is taken."""
    for name in ("web1", "web2"):
        driver.define(xml(driver, name=name))
    one, two = driver.start("web1"), driver.start("web2")
    older = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    try:
        for connection, info in zip(older, (one, two), strict=True):
            connection.connect(driver.place(info).events)
            assert connection.recv(4096)
        with driver.supervise():
            kill(driver, one)
            until(lambda: not driver.get("web1").is_active, "the end in the record")
            older[1].close()
            until(lambda: listened(driver, two), "its turn")
            driver.qmp(two, "stop")
            until(lambda: driver.get("web2").state is DomainState.PAUSED, "the pause")
            driver.destroy("web2")
    finally:
        for connection in older:
            connection.close()


def test_a_qemu_that_is_frozen(driver: QemuDriver) -> None:
    """It answers nobody; the others are watched all the same, and it again when it wakes up."""
    driver.qmp_timeout = 0.2
    for name in ("web1", "web2"):
        driver.define(xml(driver, name=name))
    frozen, other = driver.start("web1"), driver.start("web2")
    os.kill(frozen.pid or 0, signal.SIGSTOP)
    with driver.supervise():
        kill(driver, other)
        until(lambda: not driver.get("web2").is_active, "the other's end")
        assert driver.get("web1").state is DomainState.RUNNING
        os.kill(frozen.pid or 0, signal.SIGCONT)
        until(lambda: listened(driver, frozen), "its turn")
        driver.qmp(frozen, "stop")
        until(lambda: driver.get("web1").state is DomainState.PAUSED, "the pause")
        os.kill(frozen.pid or 0, signal.SIGSTOP)
        kill(driver, frozen)
        until(lambda: not driver.get("web1").is_active, "its end")


def a_fork(pipe: Pipe) -> None:
    """A child of the process that supervises keeps nothing, and its end ends nothing."""
    with qemu_driver() as driver:
        for name in ("web1", "web2"):
            driver.define(xml(driver, name=name))
        one, two = driver.start("web1"), driver.start("web2")
        election = driver.supervise()
        until(lambda: listened(driver, one) and listened(driver, two), "whoever listens")
        lasting = fork(rest)
        assert lasting.hear() == "begun"
        fork(collect).hear()
        driver.qmp(one, "stop")
        until(lambda: driver.get("web1").state is DomainState.PAUSED, "the pause")
        election.stop()
        alone = [not listened(driver, info) for info in (one, two)]
        with driver.supervise():
            kill(driver, two)
            until(lambda: not driver.get("web2").is_active, "the end in the record")
        lasting.close()
        driver.destroy("web1")
        said = alone, disagreements(driver), files(driver)
    pipe.say(said)  # the test kills us when it has heard, and nothing is to be left by then


def collect(pipe: Pipe) -> None:
    """What a child's end does, to what it has of its parent's loop."""
    gc.collect()
    pipe.say()


def rest(pipe: Pipe) -> None:
    pipe.say("begun")
    pipe.rest()


def test_a_fork_of_the_one_that_watches(start: Callable[..., Child]) -> None:
    assert start(a_fork).hear() == ([True, True], [], [])


def test_the_list_is_closed_under_it(driver: QemuDriver) -> None:
    driver.define(xml(driver))
    info = driver.start("web1")
    election = driver.supervise()
    until(lambda: listened(driver, info), "whoever listens")
    driver.doms.close()
    until(lambda: not election.running, "its end")
    assert not listened(driver, info) and not monitor._open
