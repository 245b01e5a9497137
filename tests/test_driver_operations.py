"""libvirt's operations on every store, with `TestDriver`: states, reasons, and virsh's words.

What a real virsh says on its test driver is asked of that, too, where it is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import EVERY_STORE, Party, Store, thread_party, xml

from shmdomains import (
    AnyDomainList,
    DefinitionError,
    DomainExists,
    DomainInactive,
    DomainInfo,
    DomainNotFound,
    DomainState,
    DomainTransient,
    DriverError,
    JobTimeout,
    PausedReason,
    RunningReason,
    SegmentFull,
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


def test_one_that_cannot_be_started_stops_no_other(
    doms: Any, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Failing(doms, "launch", "web1")
    for text in (A, B):
        driver.set_autostart(driver.define(text))
    assert [info.name for info in driver.autostart_all()] == ["db1"]
    assert "failed to autostart domain 'web1': launch failed" in caplog.text


# --- a hypervisor that fails ---------------------------------------------------------------------


class Failing(TestDriver):
    """One of its hooks fails, and it tells which were called."""

    def __init__(self, doms: Any, fails: str = "", name: str = "web1") -> None:
        super().__init__(doms, timeout=5)
        self.fails, self.victim = fails, name
        self.calls: list[str] = []

    def _call(self, hook: str, info: DomainInfo) -> None:
        self.calls.append(hook)
        locks = getattr(self.doms, "locks", list)()
        assert not self.doms.is_locked and not [one for one in locks if one.kind != "job"]
        assert [job.holder.alive for job in info.jobs] == [True]
        if hook == self.fails and info.name == self.victim:
            raise DriverError(f"{hook} failed")

    def launch(self, info: DomainInfo) -> Launched:
        assert is_now(info) == ("paused", "STARTING_UP")
        self._call("launch", info)
        return Launched(data={"launched": info.id})

    def go(self, info: DomainInfo) -> None:
        assert info.data["launched"] == info.id
        self._call("go", info)

    def pause(self, info: DomainInfo) -> None:
        self._call("pause", info)

    def unpause(self, info: DomainInfo) -> None:
        self._call("unpause", info)

    def kill(self, info: DomainInfo, graceful: bool = False) -> None:
        self._call("kill gracefully" if graceful else "kill", info)

    def ask_shutdown(self, info: DomainInfo) -> bool:
        self._call("ask_shutdown", info)
        return False

    def ask_reboot(self, info: DomainInfo) -> bool:
        self._call("ask_reboot", info)
        return False

    def reset_guest(self, info: DomainInfo) -> None:
        self._call("reset_guest", info)

    def set_guest_memory(self, info: DomainInfo, kib: int) -> None:
        self._call("set_guest_memory", info)

    def set_guest_vcpus(self, info: DomainInfo, count: int) -> None:
        self._call("set_guest_vcpus", info)


@pytest.mark.parametrize("hook", ["launch", "go"])
def test_a_start_that_fails_is_undone(doms: Any, hook: str) -> None:
    driver = Failing(doms, hook)
    driver.define(A)
    with pytest.raises(DriverError, match=f"^{hook} failed$") as caught:
        driver.start("web1")
    assert caught.value.kind == "internal error"
    assert driver.calls[-1] == "kill"
    assert is_now(driver.get("web1")) == ("shut off", "FAILED")
    driver.undefine("web1")
    with pytest.raises(DriverError):
        driver.create(A)
    assert driver.list() == []


HOOKS: dict[str, Callable[[Driver], object]] = {
    "pause": lambda driver: driver.suspend("web1"),
    "ask_shutdown": lambda driver: driver.shutdown("web1"),
    "ask_reboot": lambda driver: driver.reboot("web1"),
    "reset_guest": lambda driver: driver.reset("web1"),
    "kill": lambda driver: driver.destroy("web1"),
    "kill gracefully": lambda driver: driver.destroy("web1", graceful=True),
    "set_guest_memory": lambda driver: driver.set_memory("web1", 512),
    "set_guest_vcpus": lambda driver: driver.set_vcpus("web1", 1),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_nothing_is_committed_when_a_hook_fails(doms: Any, hook: str) -> None:
    driver = Failing(doms, hook)
    driver.define(A)
    driver.start("web1")
    before = driver.get("web1")
    with pytest.raises(DriverError, match=f"^{hook} failed$"):
        HOOKS[hook](driver)
    assert driver.get("web1") == before
    driver.fails = ""
    HOOKS[hook](driver)
    assert driver.calls[-1] == hook


def test_each_hook_is_called_once_with_no_lock_held(doms: Any) -> None:
    driver = Failing(doms)
    driver.define(A)
    driver.start("web1")
    driver.suspend("web1")
    driver.resume("web1")
    assert driver.shutdown("web1").is_active  # it was asked, and will say when it is off
    driver.stopped("web1")
    assert driver.calls == ["launch", "go", "pause", "unpause", "ask_shutdown", "kill"]


def test_a_definition_that_the_hypervisor_refuses(doms: Any) -> None:
    class Choosy(TestDriver):
        def check(self, definition: Any) -> None:
            if definition.type != "test":
                raise DefinitionError("unexpected domain type kvm, expecting test", "domain", 1)

    driver = Choosy(doms)
    for make in (driver.define, driver.create):
        with pytest.raises(DefinitionError, match="unexpected domain type kvm"):
            make(xml("web1"))
    assert driver.list() == []


def test_a_process_that_is_not_the_one_that_was_launched(doms: Any) -> None:
    class Late(TestDriver):
        def launch(self, info: DomainInfo) -> Launched:
            return Launched(os.getpid(), started=1)

    driver = Late(doms)
    with pytest.raises(DriverError, match="has ended already"):
        driver.create(A)
    assert driver.list() == []


# --- jobs and other workers ----------------------------------------------------------------------


def test_an_operation_waits_for_a_job_in_its_way(doms: Any, driver: Driver, other: Party) -> None:
    driver.define(A)
    driver.timeout = 0.1
    other.do("job = doms.job('web1', 'backup'); job.__enter__()")
    for operation in (driver.start, driver.undefine, driver.set_autostart):
        with pytest.raises(JobTimeout, match="held by monitor=backup") as caught:
            operation("web1")
        assert caught.value.kind == "Timed out during operation"
    other.do("job.__exit__(None, None, None)")
    assert driver.start("web1").is_active


def test_an_async_job_lets_destroy_in(doms: Any, driver: Driver, other: Party) -> None:
    driver.define(A)
    driver.start("web1")
    driver.timeout = 0.1
    other.do("job = doms.job('web1', 'backup', Job.ASYNC); job.__enter__()")
    with pytest.raises(JobTimeout):
        driver.suspend("web1")
    assert is_now(driver.destroy("web1")) == ("shut off", "DESTROYED")
    other.do("job.__exit__(None, None, None)")


def test_of_two_at_once_one_starts_it(doms: Any, store: Store) -> None:
    driver = TestDriver(doms, timeout=20)
    driver.define(A)
    start = (
        "from shmdomains.drivers import TestDriver\ntry: TestDriver(doms).start('web1'); n = 1\n"
    )
    start += "except DomainActive: n = 0\nn"
    with thread_party(doms=doms) as one, thread_party(doms=doms) as two:
        for _ in range(20):
            one.start(start)
            two.start(start)
            assert one.answer() + two.answer() == 1
            driver.destroy("web1")


def test_of_two_at_once_one_creates_it(doms: Any, store: Store) -> None:
    one_line = f"""
from shmdomains.drivers import TestDriver
try: TestDriver(doms).create({A!r}); n = 1
except DomainActive: n = 0
n"""
    driver = TestDriver(doms, timeout=20)
    with thread_party(doms=doms) as one, thread_party(doms=doms) as two:
        for _ in range(20):
            one.start(one_line)
            two.start(one_line)
            assert one.answer() + two.answer() == 1
            driver.destroy("web1")
            assert driver.list() == []


def test_one_that_is_stopped_without_a_job(doms: Any) -> None:
    """Whoever takes no jobs can end a domain under an operation's hands: that is told."""

    class Interrupted(TestDriver):
        def pause(self, info: DomainInfo) -> None:
            with doms.get("web1") as dom:
                dom.deactivate()

    driver = Interrupted(doms)
    driver.define(A)
    driver.start("web1")
    with pytest.raises(DomainInactive, match="domain 'web1' was stopped meanwhile"):
        driver.suspend("web1")
    assert is_now(driver.get("web1")) == ("shut off", "UNKNOWN")


# --- reconcile -----------------------------------------------------------------------------------


class Mortal(TestDriver):
    """Some of its guests are gone, and some belong to nobody."""

    def __init__(self, doms: AnyDomainList) -> None:
        super().__init__(doms)
        self.gone: set[str] = set()
        self.strays: list[Orphan] = []

    def alive(self, info: DomainInfo) -> bool:
        return info.name not in self.gone

    def orphans(self) -> list[Orphan]:
        return self.strays[:]

    def end_orphan(self, orphan: Orphan) -> None:
        self.strays.remove(orphan)


def test_reconcile(doms: Any) -> None:
    driver = Mortal(doms)
    driver.create(acting("on_crash", "restart"))
    driver.create(xml("tr1"))
    driver.define(B)
    driver.start("db1")
    assert driver.reconcile() == (3, [], [], [])
    driver.gone = {"db1", "tr1"}
    running, ended, settled, orphans = driver.reconcile()
    assert (running, sorted(info.name for info in ended), settled, orphans) == (
        1,
        ["db1", "tr1"],
        [],
        [],
    )
    assert sorted(info.name for info in driver.list()) == ["db1", "web1"]
    assert is_now(driver.get("db1")) == ("shut off", "CRASHED")


def test_guests_without_a_record(doms: Any) -> None:
    driver = Mortal(doms)
    info = driver.create(A)
    known = Orphan(1, info.uuid)
    driver.define(B)
    strays = [Orphan(2, driver.get("db1").uuid), Orphan(3), Orphan(4, name="nobody")]
    driver.strays = [known, *strays]
    assert driver.reconcile().orphans == strays
    assert driver.strays == [known, *strays]
    assert driver.reconcile(kill_orphans=True).orphans == strays
    assert driver.strays == [known]


def test_a_domain_that_somebody_activated_and_left(doms: Any, driver: Driver) -> None:
    """A record that is starting up without a job is what a dead worker left."""
    driver.define(A)
    for end in (driver.reconcile, lambda: driver.start("web1"), lambda: driver.create(A)):
        with doms.get("web1") as dom:
            dom.activate(state=DomainState.PAUSED, reason=PausedReason.STARTING_UP)
        end()
        info = driver.get("web1")
        assert (info.state, info.reason) in [
            (SHUT, ShutoffReason.FAILED),
            (DomainState.RUNNING, RunningReason.BOOTED),
        ]
        if info.is_active:
            driver.destroy("web1")


def test_a_transient_record_that_never_ran(doms: Any, driver: Driver) -> None:
    """Of a worker that was killed in `create`."""
    for key in ("start", "undefine", "destroy"):
        with doms.locked():
            dom = doms.assign_def(driver._accepted(A))
        dom.unlock()
        with pytest.raises(DomainNotFound):
            getattr(driver, key)("web1")
        assert driver.list() == []
    with doms.locked():
        dom = doms.assign_def(driver._accepted(A))
    dom.unlock()
    assert driver.create(A).is_active
