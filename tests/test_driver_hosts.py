"""Drivers on a list of several hosts: each touches only what runs on its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pg_servers
import pytest
from helpers import list_url, xml

from shmdomains import DomainActive, DomainInfo, DomainState, DomainStateError, DriverError
from shmdomains.drivers import Driver, TestDriver

pytestmark = pytest.mark.skipif(
    pg_servers.missing() is not None, reason=f"no PostgreSQL: {pg_servers.missing()}"
)


class Blind(TestDriver):
    """No guest of the list lives, as far as this host can see."""

    def alive(self, info: DomainInfo) -> bool:
        return False


@pytest.fixture
def drivers() -> Iterator[tuple[Driver, Driver]]:
    """Of host a, and of host b."""
    from shmdomains.postgres import PostgresDomainList

    url = list_url()
    with (
        PostgresDomainList.create(url, host="a") as one,
        PostgresDomainList.attach(url, host="b") as two,
    ):
        yield TestDriver(one, timeout=5), Blind(two, timeout=5)
        assert not one.check().problems


OPERATIONS: dict[str, Callable[[Driver], object]] = {
    "suspend": lambda driver: driver.suspend("web1"),
    "shutdown": lambda driver: driver.shutdown("web1"),
    "reboot": lambda driver: driver.reboot("web1"),
    "reset": lambda driver: driver.reset("web1"),
    "destroy": lambda driver: driver.destroy("web1"),
    "stopped": lambda driver: driver.stopped("web1"),
    "set_memory": lambda driver: driver.set_memory("web1", 512),
    "undefine": lambda driver: driver.undefine("web1"),
    "start": lambda driver: driver.start("web1"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_runs_elsewhere_is_refused(drivers: tuple[Driver, Driver], operation: str) -> None:
    one, two = drivers
    one.define(xml("web1"))
    one.start("web1")
    before = one.get("web1")
    assert before.host == "a"
    with pytest.raises(DomainStateError, match="domain 'web1' runs on host 'a'; ask there"):
        OPERATIONS[operation](two)
    assert two.get("web1") == before


def test_what_runs_nowhere_starts_anywhere(drivers: tuple[Driver, Driver]) -> None:
    one, two = drivers
    one.define(xml("web1"))
    for driver, host in ((one, "a"), (two, "b")):
        assert driver.start("web1").host == host
        with pytest.raises(DomainActive, match="domain 'web1' is already active"):
            one.create(xml("web1"))
        assert driver.destroy("web1").host is None


def test_reconcile_leaves_other_hosts_alone(drivers: tuple[Driver, Driver]) -> None:
    one, two = drivers
    one.define(xml("web1"))
    before = one.start("web1").id
    two.create(xml("web2"))
    with one.doms.get("web1") as dom:
        dom.set_state(DomainState.PAUSED, 11)  # starting up, left by a dead worker
    assert [info.name for info in two.reconcile().ended] == ["web2"]
    assert two.get("web1").id == before
    assert [info.name for info in one.reconcile().settled] == ["web1"]
    assert not two.get("web1").is_active


def test_a_host_that_is_dead(
    drivers: tuple[Driver, Driver], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = drivers
    one.define(xml("web1"))
    one.start("web1")
    one.create(xml("tr1"))
    two.create(xml("web2"))
    with pytest.raises(DriverError, match="host 'b' is this one, and lives"):
        two.bury("b")
    with caplog.at_level(logging.INFO, "shmdomains.drivers"):
        assert sorted(info.name for info in two.bury("a")) == ["tr1", "web1"]
    tokens = [int(line.rpartition(" ")[2]) for line in caplog.messages if "by token" in line]
    assert len(tokens) == 2
    assert sorted(info.name for info in two.list()) == ["web1", "web2"]
    assert two.start("web1").host == "b"
    with two.doms.get("web1") as dom:
        assert dom.token > max(tokens)
    with pytest.raises(DomainStateError, match="runs on host 'b'"):
        one.destroy("web1")


def test_one_that_is_elsewhere_by_now_is_not_buried(
    drivers: tuple[Driver, Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was seen on the dead host, and ended before it was locked."""
    one, two = drivers
    one.define(xml("web1"))
    one.start("web1")
    seen = two.list(active=True, host="a")
    one.destroy("web1")
    two.start("web1")
    monkeypatch.setattr(two.doms, "list", lambda **_: seen)
    assert two.bury("a") == [] and two.get("web1").host == "b"


@pytest.mark.parametrize("driver", [TestDriver, Blind])
def test_a_list_that_reads_from_a_standby_is_refused(
    drivers: tuple[Driver, Driver], monkeypatch: pytest.MonkeyPatch, driver: type[Driver]
) -> None:
    monkeypatch.setattr(type(drivers[0].doms), "read", "standby")
    with pytest.raises(ValueError, match="open the list without read='standby'"):
        driver(drivers[0].doms)
