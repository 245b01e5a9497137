"""Hooks that fail, others' jobs, several workers at once, dead guests: what `Driver` makes of them.

On every store, with drivers whose guests are nothing but records.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers import DEADLINE, EVERY_STORE, Party, thread_party, xml
from killing import until
from test_driver_operations import A, B, acting, is_now

from shmdomains import (
    AnyDomainList,
    DefinitionError,
    DomainInactive,
    DomainInfo,
    DomainNotFound,
    DomainState,
    DriverError,
    Job,
    JobTimeout,
    PausedReason,
    RunningReason,
    ShutoffReason,
)
from shmdomains.drivers import Driver, Launched, Orphan, TestDriver

SHUT = DomainState.SHUTOFF


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def store(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def driver(doms: Any) -> TestDriver:
    return TestDriver(doms, timeout=5)


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


def test_one_that_cannot_be_started_stops_no_other(
    doms: Any, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Failing(doms, "launch", "web1")
    for text in (A, B):
        driver.set_autostart(driver.define(text))
    assert [info.name for info in driver.autostart_all()] == ["db1"]
    assert "failed to autostart domain 'web1': launch failed" in caplog.text


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


class Interrupted(TestDriver):
    """Ctrl-C comes in one of its hooks, when that is done."""

    def __init__(self, doms: Any) -> None:
        super().__init__(doms, timeout=5)
        self.guest = "gone"
        self.interrupted = ""

    def _do(self, hook: str, guest: str) -> None:
        self.guest = guest
        if hook == self.interrupted:
            self.interrupted = ""
            raise KeyboardInterrupt

    def launch(self, info: DomainInfo) -> Launched:
        self._do("launch", "paused")
        return Launched()

    def go(self, info: DomainInfo) -> None:
        self._do("go", "running")

    def pause(self, info: DomainInfo) -> None:
        self._do("pause", "paused")

    def unpause(self, info: DomainInfo) -> None:
        self._do("unpause", "running")

    def kill(self, info: DomainInfo, graceful: bool = False) -> None:
        self._do("kill", "gone")

    def alive(self, info: DomainInfo) -> bool:
        return self.guest != "gone"


@pytest.mark.parametrize("hook", ["launch", "go", "pause", "unpause", "kill"])
def test_an_interrupt_leaves_record_and_guest_in_agreement(doms: Any, hook: str) -> None:
    driver = Interrupted(doms)
    driver.define(A)
    words = {"shut off": "gone", "paused": "paused", "running": "running"}
    driver.interrupted = hook
    with pytest.raises(KeyboardInterrupt):
        for operation in (driver.start, driver.suspend, driver.resume, driver.destroy):
            operation("web1")
    assert driver.guest == words[driver.get("web1").state.words]
    assert driver.get("web1").jobs == ()


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


def test_of_two_at_once_one_starts_it(doms: Any) -> None:
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


def test_of_two_at_once_one_creates_it(doms: Any) -> None:
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


def test_one_that_is_gone_when_its_job_is_over(doms: Any, driver: Driver, other: Party) -> None:
    driver.create(A)
    other.do("job = doms.job('web1', 'destroy', Job.DESTROY); job.__enter__()")
    with thread_party(doms=doms, driver=driver) as waits:
        waits.start("driver.destroy('web1')")
        assert waits.is_waiting()
        other.do("with doms.get('web1') as dom: dom.deactivate()")
        other.do("with doms.locked(): doms.remove_inactive('web1')")
        other.do("job.__exit__(None, None, None)")
        with pytest.raises(DomainNotFound, match="was removed"):
            waits.answer()


def test_one_that_is_stopped_without_a_job(doms: Any) -> None:
    """Whoever takes no jobs can end a domain under an operation's hands: that is told."""

    class Robbed(TestDriver):
        def pause(self, info: DomainInfo) -> None:
            with doms.get("web1") as dom:
                dom.deactivate()

    driver = Robbed(doms)
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


def test_what_a_living_worker_is_at_is_left_to_it(doms: Any, other: Party) -> None:
    driver = Mortal(doms)
    driver.gone = {"web1"}
    driver.define(A)
    other.do("job = doms.job('web1', 'start'); job.__enter__()")
    with doms.get("web1") as dom:
        dom.activate(state=DomainState.PAUSED, reason=PausedReason.STARTING_UP)
    driver.timeout = 0
    assert driver.reconcile() == (1, [], [], [])
    other.do("job.__exit__(None, None, None)")
    assert [is_now(info) for info in driver.reconcile().settled] == [("shut off", "FAILED")]


def test_the_guest_of_a_domain_with_an_async_job_is_gone(doms: Any, other: Party) -> None:
    driver = Mortal(doms)
    driver.define(A)
    driver.start("web1")
    driver.gone = {"web1"}
    other.do("job = doms.job('web1', 'backup', Job.ASYNC); job.__enter__()")
    assert [is_now(info) for info in driver.reconcile().ended] == [("shut off", "CRASHED")]
    other.do("job.__exit__(None, None, None)")


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


def test_a_create_that_is_overtaken_makes_no_guest(doms: Any) -> None:
    """It had entered the record, and waited for a job whose holder ended it."""
    launched: list[DomainInfo] = []

    class Launching(TestDriver):
        def launch(self, info: DomainInfo) -> Launched:
            launched.append(info)
            return super().launch(info)

    driver = Launching(doms, timeout=DEADLINE)
    driver.define(xml("web1"))
    with ThreadPoolExecutor(1) as thread:
        with doms.get("web1") as dom, dom.job("destroy", Job.DESTROY):
            created = thread.submit(driver.create, xml("web1"))
            until(lambda: driver.get("web1").is_active, "its entry")
            with dom:
                dom.deactivate(ShutoffReason.DESTROYED)
        with pytest.raises(DomainInactive, match="domain 'web1' was stopped meanwhile"):
            created.result(DEADLINE)
    assert launched == [] and not driver.get("web1").is_active
