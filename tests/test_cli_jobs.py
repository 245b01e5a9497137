"""The commands about jobs: what they print of a job, and of one whose holder is dead."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import DEADLINE, xml
from killing import until
from shell import WEB1, activate, failure, out, read_json

from shmdomains import DomainList, Job


@pytest.fixture
def doms(segment_dir: Path) -> Iterator[DomainList]:
    with DomainList.create() as doms:
        doms.define(xml("web1", WEB1))
        doms.define(xml("web2"))
        activate(doms, "web1")
        yield doms


def pairs(*args: object) -> dict[str, str]:
    lines = [line.partition(":") for line in out(*args)]
    assert all(line[:17].rstrip().endswith(":") for line in out(*args))
    return {label: value.strip() for label, _, value in lines}


def test_no_job(doms: DomainList) -> None:
    assert out("domjobinfo", "web1") == ["Job type:         None"]
    assert read_json("domjobinfo", "web1") == {"jobs": []}
    assert failure("domjobabort", "web1") == "no job is active on domain 'web1'"
    assert out("list", "--all", "--with-job", "--name") == []
    assert "failed to get domain 'no'" in failure("domjobinfo", "no")


def test_a_job_in_virshs_words(doms: DomainList) -> None:
    with doms.job("web1", "backup", Job.ASYNC, why="nightly") as job:
        job.progress(
            {
                "time_remaining": 1500,
                "memory_total": 3 << 30,
                "disk_processed": 100,
                "data_total": 1536,
                "phase": "copy\n",
            }
        )
        with doms.job("web1", "look", Job.QUERY, timeout=0):
            lines = out("domjobinfo", "web1")
            [both] = [[one["operation"] for one in read_json("domjobinfo", WEB1)["jobs"]]]
        assert both == ["backup", "look"]
        assert lines[:2] == ["Job type:         Bounded", "Operation:        backup"]
        found = pairs("domjobinfo", "web1")
        elapsed, unit = found.pop("Time elapsed").split()
        assert 0 <= int(elapsed) < 1000 * DEADLINE and unit == "ms"
        assert f"process {os.getpid()}" in found.pop("Holder")
        assert found == {
            "Job type": "Bounded",
            "Operation": "backup",
            "Time remaining": "1500         ms",
            "Data total": "1.500 KiB",
            "Memory total": "3.000 GiB",
            "File processed": "100.000 B",
            "phase": "copy\\n",
            "Kind": "async",
            "Why": "nightly",
        }
        job.progress(7)
        assert pairs("domjobinfo", "web1")["Progress"] == "7"
        assert pairs("domjobinfo", "web1")["Job type"] == "Unbounded"


def test_a_job_as_json(doms: DomainList) -> None:
    with doms.job("web1", "backup") as job:
        job.progress({"done": [1, 2]})
        [found] = read_json("domjobinfo", "web1")["jobs"]
        assert found["progress"] == {"done": [1, 2]}
        assert (found["kind"], found["since"]) == ("modify", job.since)
        assert (found["holder"]["pid"], found["holder"]["alive"]) == (os.getpid(), True)
        for odd in (b"\xff", {b"a": 1}, float("nan")):
            job.progress(odd)
            assert isinstance(read_json("domjobinfo", "web1")["jobs"][0]["progress"], str)
            assert pairs("domjobinfo", "web1")["Operation"] == "backup"


def test_list_with_job(doms: DomainList) -> None:
    with doms.job("web2", "backup"):
        assert out("list", "--all", "--with-job") == [
            " Id   Name   State      Job",
            "--------------------------------",
            " -    web2   shut off   backup",
        ]
        assert out("list", "--all", "--with-job", "--name") == ["web2"]
        [found] = read_json("list", "--all", "--with-job")
        assert (found["name"], found["jobs"][0]["operation"]) == ("web2", "backup")
        [found] = read_json("list", "--all", "--with-job", "--name")
        assert list(found) == ["name", "jobs"]
        assert out("list", "--with-job") == out("list", "--state-paused", "--with-job")
        assert len(out("list", "--all", "--with-job", "--title")) == 3


def test_abort(doms: DomainList) -> None:
    with doms.job("web1", "backup") as job:
        assert out("domjobabort", "web1") == []
        assert job.abort_requested
        assert pairs("domjobinfo", "web1")["Abort"] == "requested"
    with doms.job("web1", "start", Job.ASYNC, allow=[]):
        assert "does not allow to abort" in failure("domjobabort", "web1")


def test_a_dead_holders_job(doms: DomainList) -> None:
    kept: list[Any] = []

    def work() -> None:
        kept.append(doms.job("web1", "backup"))
        kept[0].__enter__()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(DEADLINE)
    until(lambda: not doms["web1"].jobs[0].holder.alive, "the end of the thread")
    found = pairs("domjobinfo", "web1")
    assert found["Job type"] == "Failed" and found["Holder"].endswith("it is dead")
    assert out("list", "--with-job")[-1].endswith("backup (its holder is dead)")
    assert failure("domjobabort", "web1") == "no job is active on domain 'web1'"
    with pytest.warns(ResourceWarning):
        kept.clear()


def test_a_rule_that_a_job_excludes(doms: DomainList) -> None:
    """One's own thread's job excludes nothing, so the commands run in another one."""
    with doms.job("web2", "backup"), ThreadPoolExecutor(1) as other:
        for command in (("undefine", "web2"), ("rename", "web2", "web3")):
            said = other.submit(failure, *command, "--timeout", 0.05).result(DEADLINE)
            assert "cannot acquire state change lock (held by monitor=backup)" in said
    assert out("undefine", "web2") == ["Domain 'web2' has been undefined"]
