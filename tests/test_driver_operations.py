"""libvirt's operations on every store, with `TestDriver`: states, reasons, and virsh's words.

What a real virsh says on its test driver is asked of that, too, where it is installed.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import EVERY_STORE, xml

from shmdomains import (
    DefinitionError,
    DomainExists,
    DomainInfo,
    DomainList,
    DomainNotFound,
    DomainState,
    DomainTransient,
    SegmentFull,
    ShmDomainsError,
    ShutoffReason,
)
from shmdomains.drivers import Driver, TestDriver

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
domrename web1 x: INVALID: cannot rename active domain
setmem web1 999999 --live: invalid argument: cannot set memory higher than max memory
setmem web1 0 --live: memory in virDomainSetMemoryFlags must not be zero
setmem web1 32768 --live
setmaxmem web1 999999 --live: INVALID: cannot resize the maximum memory on an active domain
setmaxmem web1 131072 --config
setvcpus web1 5 --live: invalid argument: requested cpu amount exceeds maximum (5 > 2)
setvcpus web1 1 --live
setvcpus web1 4 --maximum --config
setvcpus web1 8 --config: invalid argument: requested cpu amount exceeds maximum (8 > 4)
setvcpus web1 8 --live: invalid argument: requested cpu amount exceeds maximum (8 > 2)
reset web1
destroy web1
domstate web1 --reason: shut off (destroyed)
destroy web1: INVALID: domain is not running
reboot web1: INVALID: domain is not running
reset web1: INVALID: domain is not running
shutdown web1: internal error: domain 'web1' not running
suspend web1: internal error: domain 'web1' not running
resume web1: internal error: domain 'web1' not paused
setmem web1 32768 --live: INVALID: domain is not running
setmem web1 999999 --config: invalid argument: cannot set memory higher than max memory
setvcpus web1 1 --live: INVALID: domain is not running
desc web1 --title new --live: INVALID: domain is not running
desc web1 --title new
domrename web1 web1: INVALID: Can't rename domain to itself
domrename web1 a/b: XML error: name a/b cannot contain '/'
define B
domrename web1 db1: INVALID: domain with name 'db1' already exists
domrename web1 x
domrename x web1
start web1
shutdown web1
domstate web1 --reason: shut off (shutdown)
create A
domstate web1 --reason: running (booted)
create A: INVALID: domain 'web1' is already active
undefine web1
setmem web1 32768 --config: INVALID: transient domains do not have any persistent config
setvcpus web1 1 --config: INVALID: transient domains do not have any persistent config
setmaxmem web1 32768 --config: INVALID: transient domains do not have any persistent config
desc web1 --title new --config: INVALID: transient domains do not have any persistent config
destroy web1
"""
INVALID = "Requested operation is not valid"
LINES = [
    line.replace("INVALID", INVALID).partition(": ")[::2] for line in SCRIPT.strip().splitlines()
]
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


NEEDS_VIRSH = pytest.mark.skipif(
    shutil.which("virsh") is None, reason="no virsh: apt install libvirt-clients"
)


def said_by_virsh(commands: list[str], place: Path) -> Iterator[tuple[str, str]]:
    """Each command, and what it says as `run` has it."""
    for name, text in (("A", A), ("B", B)):
        (place / name).write_text(text)
    script = "\n".join(f"{command}\necho @ --err" for command in commands)
    done = subprocess.run(
        ["virsh", "-q", "-c", "test:///default"],
        input=script,
        cwd=place,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    states = [said for said in done.stdout.split("virsh # ")[1:] if not said.startswith("echo ")]
    errors = done.stderr.split("error: @\n")
    for command, state, error in zip(commands, states, errors, strict=False):
        refused = re.findall(r"^error: (?!Failed to |Unable to )(.*)$", error, re.M)
        found = re.findall(r"^\w[\w ]* \(\w+\)$", state, re.M)
        yield command, [*refused, *(found if command.startswith("domstate") else []), ""][0]


@NEEDS_VIRSH
def test_virsh_says_so_itself(tmp_path: Path) -> None:
    commands = [command for command, _ in LINES]
    assert list(said_by_virsh(commands, tmp_path)) == LINES


COMMANDS = [
    *("start web1", "suspend web1", "resume web1", "reset web1", "reboot web1"),
    *("shutdown web1", "destroy web1", "define A", "create A", "undefine web1"),
    *("setmem web1 32768 --live", "setmem web1 99999 --live", "setmem web1 1024 --config"),
    *("setmem web1 99999 --config", "setmaxmem web1 131072 --config", "setvcpus web1 1 --live"),
    *("setmaxmem web1 512 --config", "setvcpus web1 3 --live", "setvcpus web1 2 --config"),
    *("setvcpus web1 3 --maximum --config", "setvcpus web1 3 --config", "domrename web1 web1"),
]


@NEEDS_VIRSH
@pytest.mark.parametrize("seed", range(4))
def test_any_history_as_virsh_has_it(
    tmp_path: Path, tried: Callable[[str, int], None], seed: int
) -> None:
    rng = random.Random(seed)
    driver = TestDriver(DomainList(max_domains=4))
    ours = []
    while len(ours) < 150:
        command = rng.choice(COMMANDS)
        words = run(driver, command)
        if "cannot undefine transient domain" in words:
            continue  # libvirt's test driver does it; its QEMU driver says this
        words = re.sub("^Domain not found: .*", "failed to get domain 'web1'", words)
        ours.append((command, words))
        if any(info.name == "web1" for info in driver.list()):
            ours.append(("domstate web1 --reason", run(driver, "domstate web1")))
    assert list(said_by_virsh([command for command, _ in ours], tmp_path)) == ours
    tried("commands whose words are compared with virsh's", len(ours))


# --- two definitions -----------------------------------------------------------------------------


def sizes(info: DomainInfo) -> tuple[Any, ...]:
    """Memory, current memory, vCPUs, current vCPUs: live, and of the next definition."""
    found = []
    for one in (info.definition, info.next_definition):
        found.append(
            one and (one.memory, one.current_memory, one.vcpus, one.current_vcpus, one.title)
        )
    return tuple(found)


FULL = (65536, 65536, 2, 2, None)


def test_define_over_an_active_domain_changes_the_next_definition_only(driver: Driver) -> None:
    driver.define(A)
    driver.start("web1")
    info = driver.define(BIG)
    assert sizes(info) == (FULL, (131072, 131072, 2, 2, None))
    assert sizes(driver.destroy("web1")) == ((131072, 131072, 2, 2, None), None)


def test_what_is_changed_live_is_gone_when_the_guest_stops(driver: Driver) -> None:
    driver.define(A)
    driver.start("web1")
    driver.set_memory("web1", 32768)
    driver.set_vcpus("web1", 1, live=True)
    info = driver.set_title("web1", "of this guest")
    assert sizes(info) == ((65536, 32768, 2, 1, "of this guest"), FULL)
    assert sizes(driver.shutdown("web1")) == (FULL, None)


def test_what_is_changed_in_the_config_begins_with_the_next_start(driver: Driver) -> None:
    driver.define(A)
    driver.start("web1")
    driver.set_memory("web1", 32768, config=True)
    driver.set_vcpus("web1", 1, config=True)
    driver.set_max_memory("web1", 49152, config=True)
    info = driver.set_title("web1", "later", config=True)
    assert sizes(info) == (FULL, (49152, 32768, 2, 1, "later"))
    driver.destroy("web1")
    assert sizes(driver.start("web1"))[0] == (49152, 32768, 2, 1, "later")


def test_both_at_once(driver: Driver) -> None:
    driver.define(A)
    driver.start("web1")
    info = driver.set_memory("web1", 1024, live=True, config=True)
    assert sizes(info) == ((65536, 1024, 2, 2, None),) * 2
    with pytest.raises(DefinitionError, match=r"exceeds maximum \(3 > 2\)"):
        driver.set_vcpus("web1", 3, live=True, config=True)
    driver.set_vcpus("web1", 3, config=True, maximum=True)
    with pytest.raises(DefinitionError, match=r"exceeds maximum \(3 > 2\)"):
        driver.set_vcpus("web1", 3, live=True, config=True)
    assert sizes(driver.get("web1"))[1] == (65536, 1024, 3, 2, None)


def test_an_inactive_domain_has_one_definition(driver: Driver) -> None:
    driver.define(A)
    assert sizes(driver.set_memory("web1", 1024)) == ((65536, 1024, 2, 2, None), None)
    assert sizes(driver.set_max_memory("web1", 512))[0] == (512, 512, 2, 2, None)
    assert sizes(driver.set_vcpus("web1", 1, maximum=True))[0] == (512, 512, 1, 1, None)
    assert driver.set_description("web1", "two\nlines").definition.description == "two\nlines"
    assert driver.set_title("web1", "").definition.title is None


def test_a_transient_domain_can_be_changed_live(driver: Driver) -> None:
    driver.create(A)
    assert sizes(driver.set_memory("web1", 1024)) == ((65536, 1024, 2, 2, None), None)


def test_a_title_of_two_lines_is_refused(driver: Driver) -> None:
    driver.define(A)
    with pytest.raises(DefinitionError, match="newlines"):
        driver.set_title("web1", "two\nlines")


def test_what_is_saved_is_the_config(doms: Any, driver: Driver, tmp_path: Path) -> None:
    doms.load_all_configs(tmp_path)
    saved = tmp_path / "web1.xml"
    driver.define(A)
    driver.start("web1")
    driver.set_title("web1", "of this guest")
    assert "of this guest" not in saved.read_text()
    driver.set_title("web1", "of the next", config=True)
    assert "of the next" in saved.read_text()
    driver.set_autostart("web1")
    driver.destroy("web1")
    driver.set_memory("web1", 4711)
    assert "4711" in saved.read_text()
    assert "of the next" in driver.create(A).next_definition.to_xml()  # type: ignore[union-attr]
    assert "4711" in saved.read_text()
    driver.undefine("web1")
    assert not saved.exists() and not (tmp_path / "autostart" / "web1.xml").is_symlink()


# --- transient -----------------------------------------------------------------------------------


def test_a_transient_domain_is_gone_when_it_stops(driver: Driver) -> None:
    ends: list[Callable[[], DomainInfo]] = [
        lambda: driver.destroy("web1"),
        lambda: driver.shutdown("web1"),
        lambda: driver.stopped("web1", ShutoffReason.CRASHED),
    ]
    for end in ends:
        assert not driver.create(A).persistent
        assert not end().is_active
        assert driver.list() == []
        with pytest.raises(DomainNotFound):
            driver.get("web1")


def test_undefine_of_an_active_domain_leaves_it_running(driver: Driver) -> None:
    driver.define(A)
    id = driver.start("web1").id
    driver.undefine("web1")
    info = driver.get(id)
    assert info.is_active and not info.persistent
    with pytest.raises(DomainTransient, match=r"^cannot undefine transient domain$"):
        driver.undefine("web1")
    with pytest.raises(DomainTransient, match=r"^cannot set autostart for transient domain$"):
        driver.set_autostart("web1")
    driver.shutdown(id)
    assert driver.list() == []


def test_define_makes_a_transient_domain_persistent(driver: Driver) -> None:
    driver.create(A)
    assert driver.define(BIG).persistent
    assert sizes(driver.destroy("web1")) == ((131072, 131072, 2, 2, None), None)


def test_create_over_an_inactive_persistent_domain_reverts_when_it_stops(driver: Driver) -> None:
    driver.define(BIG)
    info = driver.create(A)
    assert info.persistent and sizes(info) == (FULL, (131072, 131072, 2, 2, None))
    assert sizes(driver.destroy("web1")) == ((131072, 131072, 2, 2, None), None)


def test_who_has_this_name_or_uuid(driver: Driver) -> None:
    driver.define(A)
    for make in (driver.define, driver.create):
        with pytest.raises(DomainExists, match="domain 'web1' is already defined with uuid 1") as e:
            make(A.replace("web1", "other"))
        assert e.value.kind == "operation failed"
        with pytest.raises(DomainExists, match="domain 'web1' already exists with uuid 1"):
            make(A.replace("11111111-1", "99999999-1"))
    assert not driver.get("web1").is_active


def test_one_that_cannot_be_entered_leaves_nothing(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SegmentFull("the ids are used up")

    driver.define(B)
    monkeypatch.setattr("shmdomains.rules.domain.DomainRules.activate", full)
    for text in (A, B.replace("65536", "1024")):
        with pytest.raises(SegmentFull):
            driver.create(text)
    assert [sizes(info) for info in driver.list()] == [(FULL, None)]


# --- what the guest does -------------------------------------------------------------------------


def acting(event: str, action: str) -> str:
    return A.replace("<os>", f"<{event}>{action}</{event}><os>")


@pytest.mark.parametrize("action", ["destroy", "restart", "rename-restart", "preserve"])
def test_on_poweroff(driver: Driver, action: str) -> None:
    id = driver.create(acting("on_poweroff", action)).id
    info = driver.shutdown("web1")
    if "restart" in action:
        assert (info.id, *is_now(info)) == (id, "running", "BOOTED")
    else:
        assert is_now(info) == ("shut off", "SHUTDOWN") and driver.list() == []


@pytest.mark.parametrize("action", ["destroy", "restart", "rename-restart", "preserve"])
def test_on_reboot(driver: Driver, action: str) -> None:
    id = driver.create(acting("on_reboot", action)).id
    info = driver.reboot("web1")
    if "restart" in action:
        assert (info.id, *is_now(info)) == (id, "running", "BOOTED")
    else:
        assert is_now(info) == ("shut off", "SHUTDOWN") and driver.list() == []


@pytest.mark.parametrize(
    "action", ["destroy", "restart", "preserve", "coredump-destroy", "coredump-restart"]
)
def test_on_crash(driver: Driver, action: str) -> None:
    id = driver.create(acting("on_crash", action)).id
    info = driver.stopped("web1", ShutoffReason.CRASHED)
    if action == "preserve":
        assert (info.id, *is_now(info)) == (id, "crashed", "UNKNOWN")
        info = driver.destroy("web1")
        assert is_now(info) == ("shut off", "DESTROYED")
    elif "restart" in action:
        assert (info.id, *is_now(info)) == (id, "running", "BOOTED")
    else:
        assert is_now(info) == ("shut off", "CRASHED") and driver.list() == []


def test_the_usual_actions(driver: Driver) -> None:
    driver.define(A)
    driver.start("web1")
    assert is_now(driver.reboot("web1")) == ("running", "BOOTED")
    assert is_now(driver.stopped("web1", ShutoffReason.CRASHED)) == ("shut off", "CRASHED")
    driver.start("web1")
    assert is_now(driver.shutdown("web1")) == ("shut off", "SHUTDOWN")


def test_one_that_stopped_before_is_not_stopped_again(driver: Driver) -> None:
    driver.define(A)
    first = driver.start("web1").id
    driver.destroy("web1")
    assert is_now(driver.stopped("web1")) == ("shut off", "DESTROYED")
    second = driver.start("web1").id
    assert driver.stopped("web1", ShutoffReason.CRASHED, id=first).id == second
    assert driver.stopped("web1", ShutoffReason.FAILED, id=second).id == -1


# --- events --------------------------------------------------------------------------------------


def test_the_events_are_libvirts(doms: Any, driver: Driver) -> None:
    watch = doms.watch(timeout=0)
    driver.define(A)
    driver.start("web1")
    driver.suspend("web1")
    driver.resume("web1")
    driver.reboot("web1")
    driver.undefine("web1")
    driver.destroy("web1")
    driver.create(A, paused=True)
    driver.resume("web1")
    driver.shutdown("web1")
    assert [event.words for event in watch if event.type.event == "lifecycle"] == [
        *("Defined Added", "Started Booted", "Suspended Paused", "Resumed Unpaused"),
        *("Undefined Removed", "Stopped Destroyed"),
        *("Started Booted", "Suspended Paused", "Resumed Unpaused", "Stopped Shutdown"),
    ]


# --- autostart -----------------------------------------------------------------------------------


def test_autostart_all(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.define(A)
    driver.define(B)
    driver.define(xml("off"))
    for name in ("web1", "db1"):
        driver.set_autostart(name)
    driver.start("db1")
    assert [info.name for info in driver.autostart_all()] == ["web1"]
    assert driver.autostart_all() == []
    assert sorted(info.name for info in driver.list(active=True)) == ["db1", "web1"]
    assert not caplog.records
