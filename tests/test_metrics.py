"""`shmdomains.metrics`: what a scrape says, how long it takes, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pg_servers
import pytest
from helpers import xml
from killing import DEADLINE, Child, Pipe, Planted, until
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shmdomains import DomainDef, DomainList, DomainState, opening
from shmdomains.look.guests import Guests
from shmdomains.metrics import FAMILIES, DomainCollector
from shmdomains.metrics.families import Labels

MANY = 10_000


@pytest.fixture(params=["shm", "postgresql"])
def listed(request: pytest.FixtureRequest) -> Iterator[Any]:
    """An empty list of each store that is shipped."""
    if request.param == "shm":
        with DomainList(max_domains=MANY + 10) as doms:
            yield doms
        return
    pg_servers.need()
    with opening.open(request.getfixturevalue("pg_url")) as doms:
        yield doms


def scraped(text: bytes) -> dict[tuple[str, ...], float]:
    """The samples, by name and values of labels."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def scrape(collector: DomainCollector) -> dict[tuple[str, ...], float]:
    return scraped(collector.exposition())


def test_what_is_said_of_a_domain(listed: Any) -> None:
    made = listed.define(xml("web1", memory=2048, vcpus=4))
    collector = DomainCollector(listed)
    found = scrape(collector)
    assert found["libvirt_up",] == found["libvirt_domains",] == 1
    assert found["libvirt_domain_info_vstate", "web1"] == DomainState.SHUTOFF
    assert found["libvirt_domain_info_maximum_memory_bytes", "web1"] == 2048 * 1024
    assert found["libvirt_domain_info_virtual_cpus", "web1"] == 4
    [meta] = [key for key in found if key[0] == "libvirt_domain_info_meta"]
    assert (meta[1], meta[3]) == ("web1", str(made.uuid))
    assert ("shmdomains_domain_autostart", "web1") not in found
    with listed.get("web1") as dom:
        dom.activate()
        dom.definition = dom.definition.replace(memory=4096, current_memory=1024)
    found = scrape(collector)
    assert found["libvirt_domain_info_vstate", "web1"] == DomainState.RUNNING
    assert found["libvirt_domain_info_maximum_memory_bytes", "web1"] == 4096 * 1024
    assert found["libvirt_domain_info_memory_usage_bytes", "web1"] == 1024 * 1024
    assert found["shmdomains_domains", "running"] == 1
    assert found["shmdomains_domains", "shut off"] == 0


def test_a_domain_of_the_same_name_is_another_one(listed: Any) -> None:
    collector = DomainCollector(listed)
    for memory in (1024, 2048):
        listed.define(xml("web1", memory=memory))
        found = scrape(collector)
        assert found["libvirt_domain_info_maximum_memory_bytes", "web1"] == memory * 1024
        listed.undefine("web1")
        assert scrape(collector)["libvirt_domains",] == 0


def test_the_registry_says_the_same(listed: Any) -> None:
    hostile = 'a "quoted" \\ name'
    for name in ("web1", hostile):
        listed.define(xml(name))
    registry = CollectorRegistry()
    collector = DomainCollector(listed)
    registry.register(collector)
    ours, theirs = scrape(collector), scraped(generate_latest(registry))
    assert ours.keys() == theirs.keys()
    assert ("libvirt_domain_info_vstate", hostile) in ours
    changing = {("shmdomains_scrape_seconds",), ("shmdomains_committed_bytes",)}
    assert {k: v for k, v in ours.items() if k not in changing} == {
        k: v for k, v in theirs.items() if k not in changing
    }
    declared = {family.name for family in FAMILIES}
    assert {key[0] for key in ours} <= declared
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(DomainCollector(listed))


def test_labels_are_escaped() -> None:
    assert Labels(domain='a"\\\nb').text == r'{domain="a\"\\\nb"}'


def test_locks_and_jobs(listed: Any) -> None:
    listed.define(xml("web1"))
    collector = DomainCollector(listed)
    with listed.job("web1", "backup"), listed.get("web1"):
        found = scrape(collector)
    assert found["shmdomains_locks_held", "domain"] == 1
    assert found["shmdomains_locks_held", "job"] == found["shmdomains_jobs", "backup"] == 1
    assert found["shmdomains_locks_held_by_dead", "job"] == 0
    assert found["shmdomains_lock_longest_held_seconds", "domain"] >= 0
    found = scrape(collector)
    assert found["shmdomains_locks_held", "domain"] == 0
    assert ("shmdomains_jobs", "backup") not in found


def test_a_wait_is_seen_and_counted(listed: Any) -> None:
    listed.define(xml("web1"))
    collector = DomainCollector(listed)
    before = scrape(collector)["shmdomains_lock_wait_seconds_bucket", "+Inf"]
    dom = listed.get("web1")
    waiter = threading.Thread(target=lambda: listed.get("web1").unlock())
    waiter.start()
    until(lambda: scrape(collector)["shmdomains_lock_waiting", "domain"] == 1, "a waiter")
    assert scrape(collector)["shmdomains_lock_longest_wait_seconds", "domain"] > 0
    dom.unlock()
    waiter.join()
    found = scrape(collector)
    assert found["shmdomains_lock_wait_seconds_bucket", "+Inf"] == before + 1
    assert found["shmdomains_lock_wait_seconds_bucket", "1e-06"] == 0


def test_no_lock_is_taken(listed: Any) -> None:
    """Everything is locked, by others; and nothing is counted as taken."""
    listed.define(xml("web1"))
    collector = DomainCollector(listed)
    with listed.locked(), listed.get("web1"):
        before = listed.statistics.acquisitions
        found = scrape(collector)
        assert listed.statistics.acquisitions == before
    assert found["libvirt_up",] == 1 and found["shmdomains_locks_held", "list"] == 1


def commit_often(pipe: Pipe, path: str) -> None:
    with DomainList.attach(path=path) as doms:
        for number in range(50):
            with doms.get("web1") as dom:
                dom.data = number
        dom = doms.get("web1")
        pipe.say()
        pipe.rest()


def test_a_counter_does_not_fall_when_a_process_dies(
    start: Callable[..., Child], path: str
) -> None:
    with DomainList.create(path=path, max_domains=8) as doms:
        doms.define(xml("web1"))
        collector = DomainCollector(doms)
        worker = start(commit_often, path)
        worker.hear()
        before = scrape(collector)
        worker.kill()
        assert doms.statistics_of_all().commits < 50
        found = scrape(collector)
        assert found["shmdomains_commits_total",] == before["shmdomains_commits_total",] >= 50
        assert found["shmdomains_locks_held_by_dead", "domain"] == 1
        with doms.get("web1"):
            pass
        assert scrape(collector)["shmdomains_dead_holders_total",] == 1
        doms.unlink(force=True)


def test_a_counter_does_not_fall_when_a_process_attaches_again(
    start: Callable[..., Child], path: str
) -> None:
    """It keeps its number, but gets the place of one that left, and counts from nothing. Some of
    its counts are larger than before by the time of the scrape."""
    names = ("shmdomains_lock_acquisitions_total", "shmdomains_commits_total")
    with DomainList.create(path=path, max_domains=8) as doms:
        doms.define(xml("web1"))
        collector = DomainCollector(doms)
        leaver = start(attach_twice, path)
        leaver.hear()
        worker = start(attach_twice, path)
        worker.hear()
        found = scrape(collector)
        locks, commits = (found[name,] for name in names)
        leaver.ask()
        worker.ask()
        worker.ask()
        found = scrape(collector)
        assert [found[name,] for name in names] == [locks + 9, commits]
        worker.kill()
        doms.unlink(force=True)


def attach_twice(pipe: Pipe, path: str) -> None:
    """Commit five times; attach again, and lock more often, but change nothing."""
    with DomainList.attach(path=path) as doms:
        for number in range(5):
            with doms.get("web1") as dom:
                dom.data = number
        del dom  # else it keeps what is attached
        pipe.say()
        pipe.listen()
    pipe.say()
    pipe.listen()
    with DomainList.attach(path=path) as doms:
        for _ in range(9):
            doms.get("web1").unlock()
        pipe.say()
        pipe.rest()


def test_a_guest(listed: Any) -> None:
    """This process is one, and so is one that ends."""
    guest = subprocess.Popen(["sleep", "60"])
    pids = {"web1": os.getpid(), "web2": 2**22 + 7, "web3": guest.pid}
    for name, pid in pids.items():
        listed.define(xml(name))
        with listed.get(name) as dom:
            dom.activate(pid=pid)
    collector = DomainCollector(listed)
    for names in ({"web1", "web3"}, {"web1"}):
        found = scrape(collector)
        of = {key[1] for key in found if key[0] == "libvirt_domain_memory_stats_rss_bytes"}
        assert of == names
        assert found["libvirt_domain_memory_stats_rss_bytes", "web1"] > 1_000_000
        assert found["libvirt_domain_info_cpu_time_seconds_total", "web1"] > 0.1
        guest.kill()
        guest.wait()


def test_a_pid_that_is_another_process_by_now_is_no_guest() -> None:
    labels = Labels(domain="web1")
    assert Guests().read([(labels, os.getpid(), 1)]) == ([], [], [])


def test_a_list_that_cannot_be_read_is_down(caplog: pytest.LogCaptureFixture) -> None:
    doms = DomainList(max_domains=8)
    collector = DomainCollector(doms)
    assert scrape(collector)["libvirt_up",] == 1
    doms.close()
    assert scrape(collector) == scrape(collector) == {("libvirt_up",): 0}
    assert len(caplog.messages) == 1 and "cannot be scraped" in caplog.messages[0]


@pytest.mark.parametrize("many", [4, 80])  # few definitions are read one by one
@pytest.mark.parametrize("damaged", ["definition", "extent", "fields", "name", "state"])
def test_a_damaged_domain_is_counted_and_the_others_are_there(
    path: str, damaged: str, many: int
) -> None:
    with DomainList.create(path=path, max_domains=100) as doms, Planted(path) as planted:
        for number in range(many):
            doms.define(xml(f"web{number}"))
        with doms.job("web2", "copy"), doms.job("web1", "backup", timeout=DEADLINE):
            bits = damage(doms, planted, damaged)
            for at, bit in bits:
                planted.flip(at, bit, 8)
            another = DomainList.attach(path=path)  # one that has not seen the definitions
            collector = DomainCollector(another)
            for _ in range(2):
                found = scrape(collector)
                assert found["libvirt_up",] == found["shmdomains_damaged_domains",] == 1
                there = {key[1] for key in found if key[0] == "libvirt_domain_info_vstate"}
                assert there == {f"web{number}" for number in range(many)} - {"web1"}
                assert found["shmdomains_jobs", "copy"] == 1
            for at, bit in bits:
                planted.flip(at, bit, 8)
        doms.unlink(force=True)


def damage(doms: Any, planted: Planted, what: str) -> list[tuple[int, int]]:
    """The bits that damage this of the second domain."""
    extent, status = planted.extent(1, 0), planted.copy(1, "status")
    if what == "state":  # an unknown one, and the bit of the checksum that goes with it
        for bit in range(51, 64):
            with planted.changed(status, planted.read(status) ^ 1 << bit ^ 1 << 3):
                if not doms._marked()[2]:
                    return [(status, 3), (status, bit)]
    cell = planted.read(extent) >> 25
    return {
        "definition": [(planted.at["heap"] + cell * 64 + 16, 1)],
        "extent": [(extent, 62)],
        "fields": [(status, 40)],
        "name": [(planted.name(1, buffer), 8) for buffer in range(2)],
    }[what]


@pytest.mark.slow
def test_of_ten_thousand_domains_only_those_that_changed_are_looked_at_anew(
    listed: Any, tried: Callable[[str, int], None]
) -> None:
    with listed.locked():
        for number in range(MANY):
            definition = DomainDef.from_xml(xml(f"vm{number}", uuid.uuid4()))
            listed.assign_def(definition).unlock()
    collector = DomainCollector(listed)
    first = timed(collector.exposition)  # decodes every definition
    best = min(timed(collector.exposition) for _ in range(9))
    assert scrape(collector)["libvirt_domains",] == MANY
    tried(f"us for a scrape of 10,000 domains ({type(listed).__name__})", int(best * 1e6))
    assert best < first / 2


def timed(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun
