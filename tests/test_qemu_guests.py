"""Real QEMUs: started stopped, operated by any worker, found by whoever comes after a dead one.

The guests have no system. One halts, one powers off as soon as it runs: 512 bytes are enough.
Tests that fork run in a clean process.
"""

from __future__ import annotations

import ast
import asyncio
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import pg_servers
import psutil
import pytest
from helpers import list_url
from killing import until
from qemu_guests import (
    PANIC,
    POWER_OFF,
    PROGRAM,
    RESET,
    disagreements,
    files,
    forking,
    guests,
    in_child,
    need,
    qemu_driver,
    xml,
)

need()

from qemu.qmp import QMPError  # noqa: E402

from shmdomains import DomainDef, DomainList, DomainState, DriverError, ShutoffReason  # noqa: E402
from shmdomains.drivers import guests as guests_module  # noqa: E402
from shmdomains.drivers.qemu import QemuDriver, monitor, process  # noqa: E402
from shmdomains.drivers.qemu import driver as driver_module  # noqa: E402
from shmdomains.drivers.qemu.command import command  # noqa: E402

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def driver() -> Iterator[QemuDriver]:
    with qemu_driver() as found:
        yield found


@pytest.fixture
def place(driver: QemuDriver) -> Path:
    return driver.directory.parent


@pytest.fixture
def url() -> str:
    return list_url()


# --- operating ----------------------------------------------------------------------------------


def test_a_guest_is_made_stopped_and_operated_over_its_monitor(driver: QemuDriver) -> None:
    driver.define(xml(driver))
    info = driver.start("web1", paused=True)
    assert driver.status(info) == "prelaunch"  # it has not run an instruction
    assert info.state is DomainState.PAUSED and guests(driver) == [info.pid]
    assert info.data["monitor"] == driver.place(info).monitor
    assert info.data["started"] == process.start_time(info.pid or 0)
    driver.resume("web1")
    assert driver.status(info) == "running"
    driver.suspend("web1")
    assert driver.status(info) == "paused"
    driver.reset("web1")
    driver.resume("web1")
    assert driver.alive(info) and driver.ended(info) is None
    assert driver.destroy("web1").reason is ShutoffReason.DESTROYED
    assert guests(driver) == files(driver) == [] and not driver.alive(info)


@forking
def test_it_outlives_its_worker_and_any_other_operates_it(driver: QemuDriver) -> None:
    driver.define(xml(driver))

    def worker() -> None:
        driver.start("web1")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(worker) == -signal.SIGKILL
    info = driver.get("web1")
    assert info.state is DomainState.RUNNING and driver.status(info) == "running"
    assert in_child(lambda: driver.suspend("web1")) == 0
    assert driver.status(info) == "paused"
    assert in_child(lambda: driver.destroy("web1")) == 0
    assert guests(driver) == files(driver) == []


def test_a_worker_has_no_child_and_no_zombie(driver: QemuDriver) -> None:
    before = psutil.Process().children(recursive=True)
    driver.define(xml(driver))
    info = driver.start("web1")
    assert psutil.Process().children(recursive=True) == before
    assert os.getsid(info.pid or 0) != os.getsid(0)  # Ctrl-C in our terminal is not for it
    driver.destroy("web1")
    assert psutil.Process().children(recursive=True) == before


@forking
def test_a_process_that_is_init_reaps_it(driver: QemuDriver) -> None:
    def worker() -> None:
        assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
        info = driver.create(xml(driver))
        assert [child.pid for child in psutil.Process().children()] == [info.pid]
        driver.destroy(info)
        assert psutil.Process().children() == []

    assert in_child(worker) == 0


def test_a_guest_does_not_get_its_workers_environment(
    driver: QemuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "secret")
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    info = driver.create(xml(driver))
    seen = Path(f"/proc/{info.pid}/environ").read_bytes().split(b"\0")
    assert b"LC_ALL=C" in seen and b"TMPDIR=/var/tmp" in seen
    assert not any(b"secret" in one for one in seen)
    driver.destroy(info)


def test_definitions_with_all_devices_start(driver: QemuDriver, place: Path) -> None:
    empty = place / "b.img"
    empty.write_bytes(bytes(1 << 16))
    more = f"""
    <disk><driver name="qemu" type="raw" cache="none" discard="unmap"/>
      <source file="{empty}"/><target dev="sda" bus="scsi"/><serial>S,1</serial></disk>
    <disk device="cdrom"><target dev="CD" bus="BUS"/></disk>
    <interface type="user"><model type="virtio"/></interface>
    <interface type="user"><model type="e1000"/></interface>
    <serial type="unix"><source mode="bind" path="{place}/a,b"/></serial>
    <serial type="file"><source path="{place}/log" append="on"/></serial>
    <serial type="pty"/>
    <channel type="unix"><target type="virtio" name="org.qemu.guest_agent.0"/></channel>
    <graphics type="vnc" port="-1" autoport="yes"/>
    <graphics type="vnc"><listen type="socket" socket="{place}/vnc"/></graphics>
    <video><model type="cirrus"/></video>
    <input type="tablet" bus="usb"/> <input type="mouse" bus="virtio"/>
    <memballoon model="virtio" autodeflate="on"/>
    <rng model="virtio"><backend model="random">/dev/urandom</backend></rng>
    <panic model="isa"/>"""
    clock = """<clock offset="utc"><timer name="rtc" tickpolicy="catchup"/>
      <timer name="pit" tickpolicy="delay"/><timer name="hpet" present="no"/></clock>
      <pm><suspend-to-mem enabled="no"/></pm><devices>"""
    for machine, cd, bus in (("pc", "hdc", "ide"), ("q35", "sdc", "sata")):
        text = xml(driver, name=machine, more=more.replace("CD", cd).replace("BUS", bus))
        text = text.replace('"pc"', f'"{machine}"').replace("<devices>", clock)
        info = driver.create(text, paused=True)
        data = info.data
        assert len(data["vnc"]) == 2 and f"{place}/vnc" in data["vnc"]
        assert data["serial"]["serial0"] == f"{place}/a,b"
        assert data["serial"]["serial2"].startswith("/dev/pts/")
        driver.destroy(info)
    assert files(driver) == [] and len(driver.doms) == 0


def test_the_example_of_the_readme(driver: QemuDriver, place: Path) -> None:
    page = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    code = page.partition("### QEMU")[2].partition("```python\n")[2].partition("```")[0]
    seen = {"doms": driver.doms, "place": place, "xml": xml(driver)}
    for line in ast.parse(code).body:
        exec(ast.unparse(line), seen)
        if "query-status" in ast.unparse(line):
            assert eval(ast.unparse(line), seen) == "running"
        if "ended" in ast.unparse(line):
            assert eval(ast.unparse(line), seen) is None
    assert len(driver.doms) == 0 and sorted(place.glob("*-*")) == []


def test_memory_and_vcpus_of_a_running_guest(driver: QemuDriver) -> None:
    driver.define(xml(driver))
    info = driver.start("web1")
    assert driver.set_memory("web1", 8 << 10).definition.current_memory == 8 << 10
    assert driver.set_vcpus("web1", 2).definition.current_vcpus == 2
    used = [one for one in driver.qmp(info, "query-hotpluggable-cpus") if "qom-path" in one]
    assert len(used) == 2
    # A guest without a system does not even take the question.
    with pytest.raises(DriverError, match="unable to execute QEMU command 'device_del'"):
        driver.set_vcpus("web1", 1)
    assert driver.get("web1").definition.current_vcpus == 2
    driver.destroy("web1")
    driver.define(xml(driver, more='<memballoon model="none"/>'))
    driver.start("web1")
    with pytest.raises(DriverError, match="No balloon device has been activated"):
        driver.set_memory("web1", 8 << 10)
    driver.destroy("web1")


def test_vcpus_that_a_guest_does_not_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[dict[str, Any]] = [
        {"type": "cpu", "props": {"core-id": number}, "qom-path": path}
        for number, path in enumerate(("/machine/unattached/device[0]", "/machine/peripheral/a"))
    ]
    said: list[tuple[str, Any]] = []

    async def say(command: str, **arguments: Any) -> Any:
        said.append((command, arguments.get("id")))
        return places

    monkeypatch.setattr(driver_module, "_UNPLUG", 0.1)
    with pytest.raises(DriverError, match="vcpu unplug request timed out"):
        asyncio.run(driver_module._plug(say, 1))
    assert ("device_del", "a") in said
    said.clear()
    with pytest.raises(DriverError, match="a guest keeps the 1 vCPUs it began with"):
        asyncio.run(driver_module._plug(say, 0))
    assert said == [("query-hotpluggable-cpus", None)]
    asyncio.run(driver_module._plug(say, 2))  # nothing to do


def test_the_button_is_pressed(driver: QemuDriver) -> None:
    """A guest without ACPI does nothing when it is asked; that it was asked is an event."""
    driver.define(xml(driver))
    info = driver.start("web1")
    with socket.socket(socket.AF_UNIX) as events, events.makefile("rw") as lines:
        events.settimeout(10)
        events.connect(driver.place(info).events)
        json.loads(lines.readline())
        lines.write('{"execute": "qmp_capabilities"}\n')
        lines.flush()
        json.loads(lines.readline())
        assert driver.shutdown("web1").state is DomainState.RUNNING
        assert json.loads(lines.readline())["event"] == "POWERDOWN"
    driver.destroy("web1", graceful=True)


# --- how it ended -------------------------------------------------------------------------------


def test_a_guest_that_powers_off_waits_to_be_looked_at(driver: QemuDriver) -> None:
    driver.define(xml(driver, POWER_OFF))
    info = driver.start("web1")
    until(lambda: driver.ended(info) is not None, "the guest's end")
    assert driver.ended(info) is ShutoffReason.SHUTDOWN and driver.alive(info)
    driver.unpause(info)  # nothing to do
    assert driver.ended(info) is ShutoffReason.SHUTDOWN
    assert driver.stopped("web1").reason is ShutoffReason.SHUTDOWN
    assert guests(driver) == files(driver) == []


def test_a_reboot_is_a_power_off_and_a_new_beginning(driver: QemuDriver) -> None:
    driver.define(xml(driver, POWER_OFF))
    info = driver.start("web1", paused=True)
    driver.reboot("web1")
    driver.resume("web1")
    until(lambda: driver.ended(info) is not None, "the power-off")
    assert driver.finish_reboot(info)
    until(lambda: driver.ended(info) is not None, "the second one")
    assert not driver.finish_reboot(info)
    driver.stopped("web1")


def test_a_guest_that_panics_has_crashed(driver: QemuDriver) -> None:
    text = xml(driver, PANIC, more='<panic model="isa"/>')
    text = text.replace("<devices>", "<on_crash>preserve</on_crash><devices>")
    info = driver.create(text)
    until(lambda: driver.ended(info) is not None, "the panic")
    assert driver.ended(info) is ShutoffReason.CRASHED and driver.alive(info)
    assert driver.stopped(info, ShutoffReason.CRASHED).state is DomainState.CRASHED
    assert driver.alive(info)  # to be looked at
    driver.destroy(info)
    assert guests(driver) == files(driver) == []


def test_a_reset_by_the_guest_ends_it_if_the_definition_says_so(driver: QemuDriver) -> None:
    text = xml(driver, RESET).replace("<devices>", "<on_reboot>destroy</on_reboot><devices>")
    info = driver.create(text, paused=True)
    driver.reboot(info)
    driver.resume(info)
    until(lambda: driver.ended(info) is not None, "the guest's end")
    assert driver.ended(info) is ShutoffReason.SHUTDOWN and not driver.finish_reboot(info)
    driver.stopped(info)
    assert guests(driver) == files(driver) == []


def test_one_that_is_killed_has_crashed(driver: QemuDriver) -> None:
    driver.define(xml(driver))
    info = driver.start("web1")
    pidfd = os.pidfd_open(info.pid or 0)
    os.kill(info.pid or 0, signal.SIGKILL)
    assert select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)
    assert not driver.alive(info) and driver.ended(info) is ShutoffReason.CRASHED
    with pytest.raises(DriverError, match=r"monitor .* cannot be reached: Connection refused"):
        driver.status(info)
    [ended] = driver.reconcile().ended
    assert ended.reason is ShutoffReason.CRASHED and files(driver) == []


def test_one_that_does_not_start_leaves_nothing(driver: QemuDriver, place: Path) -> None:
    text = xml(driver)
    driver.define(text.replace("<devices>", "<devices><emulator>/no/qemu</emulator>"))
    with pytest.raises(DriverError, match="cannot execute /no/qemu: No such file or directory"):
        driver.start("web1")
    driver.define(text)
    (place / "web1.img").unlink()
    with pytest.raises(DriverError, match=r"ended with status 1 .* Could not open '.*web1.img'"):
        driver.start("web1")
    info = driver.get("web1")
    assert (info.state, info.reason) == (DomainState.SHUTOFF, ShutoffReason.FAILED)
    assert guests(driver) == files(driver) == []


def test_a_program_that_hangs_is_ended(driver: QemuDriver, place: Path) -> None:
    directory = process.directory_of(driver.directory, 1, UUID(int=1), "0000")
    before = psutil.Process().children()
    with pytest.raises(DriverError, match="QEMU did not start in time: it said nothing"):
        process.launch(directory, ["/bin/sleep", "60"], timeout=0.2)
    assert files(driver) == [] and psutil.Process().children() == before


# --- the monitor --------------------------------------------------------------------------------


def test_one_talks_and_the_others_wait(driver: QemuDriver) -> None:
    driver.define(xml(driver))
    info = driver.start("web1")
    with ThreadPoolExecutor(8) as threads:
        said = list(threads.map(lambda _: driver.status(info), range(40)))
    assert said == ["running"] * 40
    path = driver.place(info).monitor
    with socket.socket(socket.AF_UNIX) as another:
        another.connect(path)
        another.recv(4096)
        with pytest.raises(DriverError, match=r"did not answer within 0.2 s \(the greeting\)"):
            monitor.execute(path, "query-status", 0.2)
    assert monitor.execute(path, "query-status", 10)["running"]
    with pytest.raises(DriverError, match="unable to execute QEMU command 'nonsense'"):
        driver.qmp(info, "nonsense")
    driver.destroy("web1")


def test_a_greeting_that_is_not_understood_is_asked_for_anew(
    driver: QemuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What QEMU tells as somebody connects may get among it."""
    info = driver.create(xml(driver))
    connect, refusals = monitor.Client.connect, [QMPError("no greeting")] * 2

    async def failing(self: monitor.Client, address: Any, ssl: Any = None) -> None:
        await connect(self, address, ssl)
        if refusals:
            raise refusals.pop()

    monkeypatch.setattr(monitor.Client, "connect", failing)
    assert driver.status(info) == "running" and refusals == []
    refusals += [QMPError("no greeting")] * 99
    with pytest.raises(DriverError, match="broke off at the greeting: no greeting"):
        driver.status(info)
    refusals.clear()
    driver.destroy(info)


@forking
def test_a_fork_in_a_conversation_does_not_keep_it_open(driver: QemuDriver) -> None:
    driver.define(xml(driver))
    info = driver.start("web1")
    path = driver.place(info).monitor
    talking, forked = threading.Event(), threading.Event()

    async def conversation(say: monitor.Say) -> Any:
        talking.set()
        await asyncio.to_thread(forked.wait, 10)
        return await say("query-status")

    with ThreadPoolExecutor(1) as thread:
        said = thread.submit(monitor.talk, path, conversation)
        assert talking.wait(10)
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        try:
            forked.set()
            assert said.result()["running"]
            assert monitor.execute(path, "query-status", 5)["running"]
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    driver.destroy("web1")


def test_from_a_thread_that_runs_a_loop(driver: QemuDriver) -> None:
    driver.define(xml(driver))

    async def main() -> str:
        return driver.status(driver.start("web1"))

    assert asyncio.run(main()) == "running"
    driver.destroy("web1")


# --- workers that die ---------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(call: Callable[..., Any]) -> Callable[..., None]:
    def wrapped(*args: Any, **kwargs: Any) -> None:
        call(*args, **kwargs)
        die()

    return wrapped


DEATHS: dict[str, tuple[Any, str, Any]] = {
    "with a directory": (process, "_locked", die),
    "with a lock": (process, "_spawn", die),
    "with a process": (subprocess.Popen, "wait", die),
    "with a guest": (process, "_daemon", die),
    "with its sockets": (QemuDriver, "launch", after(QemuDriver.launch)),
    "with a record": (QemuDriver, "go", die),
    "when it runs": (QemuDriver, "go", after(QemuDriver.go)),
}
NEXT: dict[str, Callable[[QemuDriver], Any]] = {
    "start": lambda driver: driver.start("web1"),
    "reconcile": lambda driver: driver.reconcile(),
    "undefine": lambda driver: driver.undefine("web1"),
    "define": lambda driver: driver.set_title("web1", "again"),
}


@pytest.mark.parametrize("next", NEXT)
@pytest.mark.parametrize("death", DEATHS)
@forking
def test_whoever_comes_next_ends_what_a_dead_worker_began(
    driver: QemuDriver, monkeypatch: pytest.MonkeyPatch, death: str, next: str
) -> None:
    driver.define(xml(driver))

    def worker() -> None:
        monkeypatch.setattr(*DEATHS[death])
        driver.start("web1")

    assert in_child(worker) == -signal.SIGKILL
    NEXT[next](driver)
    info = driver.doms.peek(name="web1")
    if next == "start":
        assert info is not None and info.state is DomainState.RUNNING
        assert guests(driver) == [info.pid] and len(files(driver)) == 1
        assert driver.status(info) == "running"
        driver.destroy("web1")
    else:
        assert info is None or not info.is_active
    assert guests(driver) == files(driver) == []


@forking
def test_a_vcpu_that_a_dead_worker_plugged_in_is_in_the_record(
    driver: QemuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(guests_module.logger, "error", lambda *words: said.append(words))
    driver.define(xml(driver))
    driver.start("web1")

    def worker() -> None:
        monkeypatch.setattr(QemuDriver, "set_guest_vcpus", after(QemuDriver.set_guest_vcpus))
        driver.set_vcpus("web1", 2)

    assert in_child(worker) == -signal.SIGKILL
    assert [info.name for info in driver.reconcile().settled] == ["web1"]
    info = driver.get("web1")
    assert (info.definition.current_vcpus, driver.guest_vcpus(info)) == (2, 2)
    assert info.next_definition is not None and info.next_definition.current_vcpus == 1
    assert said == []
    driver.destroy("web1")


@forking
def test_what_a_dead_worker_still_starts_is_waited_for(driver: QemuDriver) -> None:
    """Between a fork and QEMU's exec there is no QEMU to be found, but its lock."""
    place = driver.directory.parent
    slow = place / "slow"
    slow.write_text(f'#!/bin/sh\nread line < {place}/gate\nexec {PROGRAM} "$@"\n')
    slow.chmod(0o755)
    os.mkfifo(place / "gate")
    driver.define(xml(driver).replace("<devices>", f"<devices><emulator>{slow}</emulator>"))
    pid = os.fork()
    if pid == 0:
        try:
            driver.start("web1")
        finally:
            os._exit(1)
    with open(place / "gate", "w") as gate:  # the emulator reads: the worker waits for it
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        info = driver.get("web1")
        assert driver.alive(info)
        with ThreadPoolExecutor(1) as thread:
            ended = thread.submit(driver.reconcile)
            gate.write("go\n")
            gate.close()
            ended.result(30)
    assert guests(driver) == files(driver) == [] and not driver.get("web1").is_active


@pytest.mark.skipif(pg_servers.missing() is not None, reason=str(pg_servers.missing()))
@forking
def test_the_same_on_postgresql(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    from shmdomains.postgres import PostgresDomainList

    with PostgresDomainList.create(url) as doms, qemu_driver(doms) as driver:
        driver.define(xml(driver))

        def worker() -> None:
            with PostgresDomainList.attach(url) as mine:
                monkeypatch.setattr(*DEATHS["with a guest"])
                QemuDriver(mine, directory=driver.directory).start("web1")

        assert in_child(worker) == -signal.SIGKILL
        info = driver.start("web1")
        assert guests(driver) == [info.pid] and driver.status(info) == "running"
        assert disagreements(driver) == [] and driver.reconcile()[1:] == ([], [], [])
        driver.destroy("web1")
        assert guests(driver) == files(driver) == []


# --- who is who ---------------------------------------------------------------------------------


def test_guests_without_a_record_are_found_and_ended_if_asked(
    driver: QemuDriver, place: Path
) -> None:
    definition = DomainDef.from_xml(xml(driver, name="lost"))
    mine = driver.create(xml(driver))
    uuid = UUID(int=7)
    started = []
    for root in (driver.directory, place / "others"):
        directory = process.directory_of(root, 900, uuid, "0000")
        words = command(definition, uuid, driver.place(mine)._replace(directory=str(directory)))
        words = [word.replace("lost.img", "lost2.img") if started else word for word in words]
        shutil.copy(place / "lost.img", place / "lost2.img")
        started.append(process.launch(directory, words))
    lost, others = started
    try:
        [orphan] = driver.reconcile().orphans
        assert (orphan.pid, orphan.uuid) == (lost.pid, uuid) and "id 900" in orphan.what
        assert len(guests(driver)) == 2
        driver.reconcile(kill_orphans=True)
        assert guests(driver) == [mine.pid] and len(files(driver)) == 1
        assert process.runs(others.pid, others.started, others.directory)
    finally:
        assert process.end(others, 5)
    driver.destroy("web1")


def test_a_list_that_is_made_again_leaves_the_guests_of_the_old_one(driver: QemuDriver) -> None:
    text = xml(driver).replace("<memory", f"<uuid>{UUID(int=8)}</uuid><memory")
    old = driver.create(text)
    with DomainList() as doms:  # its ids begin with 1, too
        again = QemuDriver(doms, directory=driver.directory)
        with pytest.raises(DriverError, match='Failed to get "write" lock'):
            again.create(text)
        assert driver.status(old) == "running"
        assert [orphan.pid for orphan in again.reconcile().orphans] == [old.pid]
        again.reconcile(kill_orphans=True)
        new = again.create(text)
        assert new.uuid == old.uuid and guests(again) == [new.pid]
        again.destroy(new)


def test_a_directory_that_cannot_be_made(driver: QemuDriver, place: Path) -> None:
    (place / "guests").write_text("")
    driver.define(xml(driver))
    with pytest.raises(DriverError, match=r"cannot make .*/guests/1-.*: File exists"):
        driver.start("web1")
    assert not driver.get("web1").is_active
    (place / "guests").unlink()


def test_a_pid_that_is_somebody_elses_is_left_alone(driver: QemuDriver) -> None:
    driver.define(xml(driver))
    info = driver.start("web1")
    guest = process.scan(driver.directory)[0]
    later = guest._replace(started=guest.started + 1)
    assert not process.runs(*later[:2], guest.directory) and process.end(later, 0)
    assert driver.status(info) == "running"
    with subprocess.Popen(["sleep", "60"]) as stranger:
        started = process.start_time(stranger.pid) or 0
        there = guest._replace(pid=stranger.pid, started=started)
        assert process.end(there, 0) and stranger.poll() is None
        stranger.kill()
    driver.destroy("web1")
