"""`reconcile` and `supervise` on the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pg_servers
import pytest
from helpers import list_url, xml
from killing import until
from shell import environment, failure, invoke, out, read_json

from shmdomains import DomainList, DomainState, PausedReason, ShutoffReason
from shmdomains import opening as places
from shmdomains.drivers import Orphan, TestDriver


@pytest.fixture
def doms(segment_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DomainList]:
    """``a`` runs, ``b``'s guest is gone, ``c`` was left by a dead worker, and one has no record."""
    monkeypatch.setenv("SHMDOMAINS_DRIVER", "test")
    ended: list[Orphan] = []
    monkeypatch.setattr(TestDriver, "alive", lambda self, info: info.name != "b")
    lost = Orphan(4711, name="lost", what="a process")
    monkeypatch.setattr(TestDriver, "orphans", lambda self: [] if ended else [lost])
    monkeypatch.setattr(TestDriver, "end_orphan", lambda self, one: ended.append(one))
    with DomainList.open() as doms:
        driver = TestDriver(doms)
        for name in "abc":
            driver.define(xml(name))
            driver.start(name)
        with doms.get("c") as dom:
            dom.set_state(DomainState.PAUSED, PausedReason.STARTING_UP)
        yield doms


def test_reconcile(doms: DomainList) -> None:
    lines = [" ".join(line.split()) for line in out("reconcile")]
    assert [line for line in lines if not line.startswith("-")] == [
        "Name Found Now",
        "b its guest had ended shut off (crashed)",
        "c left by a dead worker shut off (failed)",
        "lost process 4711 without a record (a process) left",
        "1 guest running",
    ]
    assert "lost" in "".join(out("reconcile", "--kill-orphans"))
    assert out("reconcile") == ["1 guest running"]


def test_reconcile_as_json(doms: DomainList) -> None:
    found = read_json("reconcile", "--kill-orphans")
    assert [info["name"] for info in found["ended"]] == ["b"]
    assert found["settled"][0]["reason"] == "failed" and found["running"] == 1
    assert found["orphans"] == [
        {"pid": 4711, "uuid": None, "name": "lost", "what": "a process", "killed": True}
    ]


def test_what_does_not_go_together(doms: DomainList, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["--host", "h"], ["--host-is-dead"]):
        assert "go together" in invoke("reconcile", *words, status=2).stderr
    both = ["--host", "h", "--host-is-dead"]
    assert "--kill-orphans" in invoke("reconcile", *both, "--kill-orphans", status=2).stderr
    assert invoke("reconcile", *both, status=2).stderr == (
        "error: segment 'default' has one host, this one; --host is for lists of more\n"
    )
    monkeypatch.delenv("SHMDOMAINS_DRIVER")
    for command in ("reconcile", "supervise"):
        assert "needs a driver" in invoke(command, status=2).stderr


@pytest.mark.skipif(pg_servers.missing() is not None, reason=str(pg_servers.missing()))
def test_a_host_that_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    from shmdomains.postgres import PostgresDomainList

    monkeypatch.setenv("SHMDOMAINS_DRIVER", "test")
    url = list_url()
    with PostgresDomainList.create(url, host="dead") as doms:
        TestDriver(doms).create(xml("tr1"))
        TestDriver(doms).define(xml("web1"))
        TestDriver(doms).start("web1")
    with places.attach(url) as doms:
        here = doms.host
        words = ["-s", url, "reconcile", "--host-is-dead", "--host"]
        assert failure(*words, here) == f"host '{here}' is this one, and lives"
        assert sorted(out(*words, "dead")) == [
            "2 domains of host 'dead' marked",
            "Domain 'tr1' ran on 'dead': shut off (failed)",
            "Domain 'web1' ran on 'dead': shut off (failed)",
        ]
        assert read_json(*words, "dead") == {"host": "dead", "buried": []}
        assert [info.name for info in doms] == ["web1"] and not doms["web1"].is_active


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_supervise(doms: DomainList, number: int, status: int) -> None:
    """It watches until it is told to stop; what a dead worker left is settled meanwhile."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "shmdomains", "--driver", "test", "supervise"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(SHMDOMAINS_DIR=os.environ["SHMDOMAINS_DIR"]),
    ) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "Supervising the guests of segment 'default'\n"
            assert program.stdout.readline() == "This process watches them\n"
            until(lambda: not doms["c"].is_active, "the end of the start")
            program.send_signal(number)
            assert program.communicate(timeout=30) == ("", "") and program.returncode == status
        finally:
            program.kill()
    assert doms["c"].reason is ShutoffReason.FAILED
    assert [lock.holder for lock in doms.locks() if lock.name == "guests"] in ([], [None])
