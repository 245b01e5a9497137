"""What the tests with real QEMUs share: guests that need no system, and who is there."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from killing import Child, Pipe

from shmdomains import DomainList
from shmdomains.drivers.qemu import QemuDriver, process

PROGRAM = "qemu-system-x86_64"

HALT = bytes.fromhex("faf4ebfd")  # cli; hlt; and again
POWER_OFF = bytes.fromhex("ba0406 b80020 ef") + HALT  # what ACPI would write: 0x2000 to 0x604
PANIC = bytes.fromhex("ba0505 b001 ee") + HALT  # what pvpanic is told: 1 to 0x505
RESET = bytes.fromhex("b0fe e664") + HALT  # the keyboard controller pulls the line

XML = """<domain type="qemu"><name>{name}</name><memory unit="MiB">16</memory>
  <vcpu current="1">2</vcpu>
  <os><type arch="x86_64" machine="pc">hvm</type><boot dev="hd"/></os>
  <features><acpi/></features>
  <devices>
    <disk><source file="{disk}"/><target dev="vda" bus="virtio"/></disk>
    {more}
  </devices>
</domain>"""


def missing() -> str | None:
    """What a test with QEMU lacks here."""
    if shutil.which(PROGRAM) is None:
        return f"{PROGRAM} is not installed: apt install qemu-system-x86"
    return None


def need() -> None:
    """Skip the module where there is no QEMU."""
    if (text := missing()) is not None:
        pytest.skip(text, allow_module_level=True)


@contextmanager
def qemu_driver(doms: Any = None) -> Iterator[QemuDriver]:
    """A driver, of a list of its own unless one is given, whose guests are ended at the end. Not in
    pytest's own directory: a socket's name is short."""
    place = Path(tempfile.mkdtemp(prefix=f"shmdomains-test-{os.getpid()}-"))
    try:
        with DomainList(max_domains=16) as own:
            yield QemuDriver(own if doms is None else doms, directory=place / "guests")
    finally:
        for guest in process.scan(place / "guests"):
            process.end(guest, 0)
        shutil.rmtree(place)


def xml(driver: QemuDriver, code: bytes = HALT, name: str = "web1", more: str = "") -> str:
    disk = driver.directory.parent / f"{name}.img"
    disk.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))  # a cylinder at least
    return XML.format(name=name, disk=disk, more=more)


def guests(driver: QemuDriver) -> list[int]:
    return sorted(guest.pid for guest in process.scan(driver.directory))


def files(driver: QemuDriver) -> list[str]:
    return sorted(os.listdir(driver.directory)) if driver.directory.exists() else []


def disagreements(driver: QemuDriver) -> list[str]:
    """What records and guests do not agree on."""
    wrong = []
    active = driver.doms.list(active=True)
    for info in active:
        if not driver.alive(info):
            wrong.append(f"{info} has no guest")
        elif (said := driver.status(info)) != info.state.words:
            wrong.append(f"{info} has a guest that is {said}")
    if guests(driver) != sorted(info.pid or 0 for info in active):
        wrong.append(f"guests {guests(driver)}, records {active}")
    if files(driver) != sorted(Path(driver.place(info).directory).name for info in active):
        wrong.append(f"directories {files(driver)}, records {active}")
    wrong += [
        f"{info} is off and not defined" for info in driver.list(active=False, persistent=False)
    ]
    return wrong


_BODIES: dict[str, Callable[..., None]] = {}


def forking(test: Callable[..., None]) -> Callable[..., None]:
    """A test that forks, run in a clean process: pytest's has threads. `driver` and `monkeypatch`
    are made there, other arguments here."""
    wanted = inspect.signature(test).parameters
    made_there = ("driver", "monkeypatch")

    def wrapper(start: Callable[..., Child], **given: Any) -> None:
        start(_run_there, Path(inspect.getfile(test)).stem, test.__name__, given).hear(60)

    given = [one for name, one in wanted.items() if name not in made_there]
    begin = inspect.Parameter("start", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wrapper.__name__, wrapper.__doc__ = test.__name__, test.__doc__
    wrapper.__signature__ = inspect.Signature([begin, *given])  # type: ignore[attr-defined]
    _BODIES[test.__name__] = test
    return wrapper


def _run_there(pipe: Pipe, module: str, name: str, given: dict[str, Any]) -> None:
    importlib.import_module(module)
    body = _BODIES[name]
    wanted = inspect.signature(body).parameters
    with pytest.MonkeyPatch.context() as monkeypatch, ExitStack() as stack:
        if "monkeypatch" in wanted:
            given["monkeypatch"] = monkeypatch
        if "driver" in wanted:
            given["driver"] = stack.enter_context(qemu_driver())
        body(**given)
    pipe.say()


def in_child(call: Callable[[], Any]) -> int:
    """Run in a fork of ours; its exit status, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            call()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
