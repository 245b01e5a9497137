"""libvirt's operations, on every store, with `TestDriver`: states, reasons, refusals, in virsh's words.

What a real virsh says on its test driver is asked of that, too, where it is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import EVERY_STORE, Party, Store, problems, thread_party, xml

from shmdomains import (
    AnyDomainList,
    DefinitionError,
    DomainActive,
    DomainExists,
    DomainInactive,
    DomainInfo,
    DomainList,
    DomainNotFound,
    DomainState,
    DomainStateError,
    DomainTransient,
    DriverError,
    JobTimeout,
    PausedReason,
    RunningReason,
    ShmDomainsError,
    ShutoffReason,
)
from shmdomains.drivers import Driver, Launched, Orphan, TestDriver

A = xml("web1", "11111111-1111-1111-1111-111111111111", memory=65536, vcpus=2, type="test")
B = xml("db1", "11112222-2222-2222-1111-111111111111", memory=65536, vcpus=2, type="test")
BIG = A.replace("65536", "131072")
SHUT = DomainState.SHUTOFF


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def store(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def driver(doms: Any) -> TestDriver:
    return TestDriver(doms, timeout=5)


def is_now(info: DomainInfo | None) -> tuple[str, str]:
    assert info is not None
    return info.state.words, getattr(info.reason, "name", str(info.reason))


# --- the words of virsh --------------------------------------------------------------------------

SCRIPT = """
define A
start web1
start web1: Domain is already active
domstate web1 --reason: running (booted)
suspend web1
suspend web1: internal error: domain 'web1' not running
domstate web1 --reason: paused (user)
reboot web1
domstate web1 --reason: running (booted)
resume web1: internal error: domain 'web1' not paused
suspend web1
resume web1
domstate web1 --reason: running (unpaused)
domrename web1 x: Requested operation is not valid: cannot rename active domain
setmem web1 999999 --live: invalid argument: cannot set memory higher than max memory
setmem web1 0 --live: memory in virDomainSetMemoryFlags must not be zero
setmem web1 32768 --live
setmaxmem web1 999999 --live: Requested operation is not valid: cannot resize the maximum memory on an active domain
setmaxmem web1 131072 --config
setvcpus web1 5 --live: invalid argument: requested cpu amount exceeds maximum (5 > 2)
setvcpus web1 1 --live
setvcpus web1 4 --maximum --config
setvcpus web1 8 --config: invalid argument: requested cpu amount exceeds maximum (8 > 4)
setvcpus web1 8 --live: invalid argument: requested cpu amount exceeds maximum (8 > 2)
reset web1
destroy web1
domstate web1 --reason: shut off (destroyed)
destroy web1: Requested operation is not valid: domain is not running
reboot web1: Requested operation is not valid: domain is not running
reset web1: Requested operation is not valid: domain is not running
shutdown web1: internal error: domain 'web1' not running
suspend web1: internal error: domain 'web1' not running
resume web1: internal error: domain 'web1' not paused
setmem web1 32768 --live: Requested operation is not valid: domain is not running
setmem web1 999999 --config: invalid argument: cannot set memory higher than max memory
setvcpus web1 1 --live: Requested operation is not valid: domain is not running
desc web1 --title new --live: Requested operation is not valid: domain is not running
desc web1 --title new
domrename web1 web1: Requested operation is not valid: Can't rename domain to itself
domrename web1 a/b: XML error: name a/b cannot contain '/'
define B
domrename web1 db1: Requested operation is not valid: domain with name 'db1' already exists
domrename web1 x
domrename x web1
start web1
shutdown web1
domstate web1 --reason: shut off (shutdown)
create A
domstate web1 --reason: running (booted)
create A: Requested operation is not valid: domain 'web1' is already active
undefine web1
setmem web1 32768 --config: Requested operation is not valid: transient domains do not have any persistent config
setvcpus web1 1 --config: Requested operation is not valid: transient domains do not have any persistent config
setmaxmem web1 32768 --config: Requested operation is not valid: transient domains do not have any persistent config
desc web1 --title new --config: Requested operation is not valid: transient domains do not have any persistent config
destroy web1
"""
LINES = [line.partition(": ")[::2] for line in SCRIPT.strip().splitlines()]
"""A command, and what it says if that is not done or not that it is done."""


def run(driver: Driver, command: str) -> str:
    """What a command says: the error, or the state."""
    name, key, *more = command.split()
    flags = {word[2:]: True for word in more if word in ("--live", "--config", "--maximum")}
    values = [word for word in more if not word.startswith("--")]
    operations: dict[str, Callable[[], Any]] = {
        "define": lambda: driver.define({"A": A, "B": B}[key]),
        "create": lambda: driver.create(A),
        "domrename": lambda: driver.rename(key, values[0]),
        "setmem": lambda: driver.set_memory(key, int(values[0]), **flags),
        "setmaxmem": lambda: driver.set_max_memory(key, int(values[0]), **flags),
        "setvcpus": lambda: driver.set_vcpus(key, int(values[0]), **flags),
        "desc": lambda: driver.set_title(key, values[0], **flags),
        "domstate": lambda: driver.get(key),
    }
    try:
        done = operations.get(name, lambda: getattr(driver, name)(key))()
    except ShmDomainsError as error:
        return f"{error.kind}: {error}".removeprefix(": ")
    if name != "domstate":
        return ""
    state, reason = is_now(done)
    return f"{state} ({reason.lower()})"


def test_the_words_are_virshs(driver: TestDriver) -> None:
    for command, words in LINES:
        assert run(driver, command) == words, command
    assert [info.name for info in driver.list()] == ["db1"]


@pytest.mark.skipif(shutil.which("virsh") is None, reason="virsh: apt install libvirt-clients")
def test_virsh_says_so_itself(tmp_path: Path) -> None:
    for name, text in (("A", A), ("B", B)):
        (tmp_path / name).write_text(text)
    script = "\n".join(f"echo @\n{command}" for command, _ in LINES)
    command = ["virsh", "-q", "-c", "test:///default"]
    done = subprocess.run(
        command, input=script, cwd=tmp_path, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    refused = iter(re.findall(r"^error: (?!Failed to |Unable to )(.*)$", done.stderr, re.M))
    states = iter(re.findall(r"^\w[\w ]* \(\w+\)$", done.stdout, re.M))
    for line, words in LINES:
        if words:
            assert next(states if line.startswith("domstate") else refused) == words, line
    assert [*refused, *states] == []
