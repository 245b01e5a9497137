"""``shmdomains reconcile`` and ``shmdomains supervise``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pg_servers
import pytest
import qemu_guests
from helpers import DEADLINE, environment, list_url, xml
from killing import until
from shell import invoke

from shmdomains import DomainList, DomainState, PausedReason
from shmdomains.drivers import TestDriver


@pytest.fixture
def doms(segment_dir: Path) -> DomainList:
    return DomainList.create(max_domains=8)


def test_reconcile_says_what_it_found(doms: DomainList) -> None:
    driver = TestDriver(doms)
    driver.create(xml("web1"))
    driver.define(xml("web2"))
    with doms.get("web2") as dom:  # as a killed worker leaves it
        dom.activate(state=DomainState.PAUSED, reason=PausedReason.STARTING_UP)
    done = invoke("--driver", "test", "reconcile")
    assert done.exit_code == 0
    assert done.stdout == ("1 running\n'web2' shut off (failed): a killed worker had been at it\n")
    done = invoke("--driver", "test", "reconcile", "--format", "json")
    assert json.loads(done.stdout) == {"running": 1, "settled": [], "off": [], "orphans": []}


def test_orphans(segment_dir: Path) -> None:
    if (missing := qemu_guests.missing()) is not None:
        pytest.skip(missing)
    name = f"shmdomains-test-{os.getpid()}"
    with DomainList.create(name, max_domains=8) as doms:
        from shmdomains.drivers.qemu.driver import default_directory

        place = default_directory(doms)
        with qemu_guests.qemu_driver(doms) as driver:
            driver.directory = place
            driver.directory.parent.mkdir(mode=0o700, exist_ok=True)
            definition = qemu_guests.xml(driver)
            info = driver.create(definition)
            with doms.get("web1") as dom:
                dom.deactivate()
            with doms.locked():
                doms.remove_inactive(dom)
            words = ["-s", name, "--driver", "qemu", "reconcile"]
            said = f"process {info.pid} of domain {info.uuid}: a guest without a record"
            assert invoke(*words).stdout == f"0 running\n{said}\n"
            assert invoke(*words, "--kill-orphans").stdout == f"0 running\n{said}, ended\n"
            assert invoke(*words).stdout == "0 running\n"
            (place.parent / "web1.img").unlink()
            place.rmdir()


def test_what_does_not_belong_together(doms: DomainList) -> None:
    for words, said in {
        ("--host", "b"): "belong together",
        ("--host-is-dead",): "belong together",
        ("--host", "b", "--host-is-dead"): "for a list of several hosts, not for segment",
    }.items():
        assert said in invoke("--driver", "test", "reconcile", *words, status=2).stderr
    doms.driver = None
    for command in ("reconcile", "supervise"):
        assert "needs a driver" in invoke(command, status=2).stderr


def test_a_dead_host() -> None:
    if (missing := pg_servers.missing()) is not None:
        pytest.skip(f"no PostgreSQL: {missing}")
    from shmdomains.postgres import PostgresDomainList

    url = list_url()
    with PostgresDomainList.create(url, host="a") as doms:
        TestDriver(doms).create(xml("web1"))
        words = ["-s", url, "--driver", "test", "reconcile", "--host"]
        done = invoke(*words, "a", "--host-is-dead")
        assert done.stdout == "'web1' shut off (failed): its guest was gone\n", done.stderr
        assert invoke(*words, "a", "--host-is-dead").stdout == ""


def test_supervise(doms: DomainList) -> None:
    """It watches until it is told to end, and then ends in order."""
    command = [sys.executable, "-m", "shmdomains", "--driver", "test", "supervise"]
    for number, status in {signal.SIGINT: 130, signal.SIGTERM: 0}.items():
        with subprocess.Popen(
            command, env=environment(), stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            assert "Supervising default; end with Ctrl-C" in process.stderr.readline()
            until(lambda: any(one.name == "guests" for one in doms.locks()), "the leader")
            process.send_signal(number)
            assert process.wait(DEADLINE) == status
            assert process.stderr.read() == ""
