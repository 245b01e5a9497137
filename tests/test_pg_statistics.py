"""What processes count of a list on PostgreSQL, and what they know of each other's."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import xml
from killing import Nursery, Pipe, until
from pg_servers import need

from shmdomains import LockLost, LockTimeout, opening

need()

from shmdomains.postgres import PostgresDomainList  # noqa: E402
from shmdomains.postgres.counts import Counts, all_counts  # noqa: E402


def test_what_is_counted(pg_url: str) -> None:
    with PostgresDomainList.open(pg_url) as doms:
        doms.define(xml("vm0"))
        before = doms.statistics
        for number in range(10):
            with doms.get(name="vm0") as dom:
                dom.data = number
        with doms.mutex("a"), doms.get(name="vm0"):
            pass
        with doms.locked():
            pass
        after = doms.statistics
        assert after.processes == 1
        assert after.acquisitions - before.acquisitions == 13
        assert after.commits - before.commits == 10
        assert (after.contended, sum(after.waits), after.deaths) == (0, 0, 0)
        with doms.mutex("a"), doms.get(name="vm0"), ThreadPoolExecutor(1) as pool:
            for wait in (
                pool.submit(doms.get, name="vm0", timeout=0.1),
                pool.submit(doms.mutex("a").lock, 0.1),
            ):
                assert isinstance(wait.exception(), LockTimeout)
        with doms.locked(), ThreadPoolExecutor(1) as pool:
            wait = pool.submit(doms.lock, 0.1)
            assert isinstance(wait.exception(), LockTimeout)
            assert isinstance(pool.submit(doms.lock, 0).exception(), LockTimeout)
        now = doms.statistics
        assert (now.contended, sum(now.waits)) == (3, 3)
        assert sum(now.waits[17:22]) == 3  # 65 ms to 2 s
        assert now.acquisitions == after.acquisitions + 3


def test_a_wait_that_got_the_lock(pg_url: str) -> None:
    with PostgresDomainList.open(pg_url) as doms, ThreadPoolExecutor(1) as pool:
        doms.define(xml("vm0"))

        def change() -> None:
            with doms.get(name="vm0") as dom:
                dom.data = 1

        dom = doms.get("vm0")
        wait = pool.submit(change)
        until(lambda: any(lock.waiting for lock in doms.locks()), "a waiter")
        before = doms.statistics
        dom.unlock()
        wait.result()
        now = doms.statistics
        assert (now.contended, now.acquisitions) == (1, before.acquisitions + 1)


def get_often(pipe: Pipe, url: str, times: int) -> None:
    with PostgresDomainList.attach(url) as doms:
        for _ in range(times):
            with doms.get(name="vm0") as dom:
                dom.data = times
        pipe.say()
        pipe.listen()
        dom = doms.get("vm0")
        pipe.say()
        pipe.listen()
        del dom


def test_what_the_living_told(pg_url: str, nursery: Nursery) -> None:
    url = f"{pg_url}&lease=1"  # so they tell it three times a second
    with PostgresDomainList.open(url) as doms:
        doms.define(xml("vm0"))
        before = doms.statistics_of_all()
        assert before.processes == 1 and before.commits == 1
        workers = [nursery.start(get_often, url, 20) for _ in range(2)]
        for worker in workers:
            worker.hear()
        until(lambda: doms.statistics_of_all().commits == 1 + 2 * 20, "what the others told")
        total = doms.statistics_of_all()
        assert total.processes == 3
        assert total.acquisitions == before.acquisitions + 2 * 20
        workers[0].tell()
        workers[0].hear()
        workers[0].kill()
        until(lambda: doms.statistics_of_all().processes == 2, "the end of a killed one")
        assert doms.statistics_of_all().commits == 1 + 20
        with doms.get("vm0"):
            pass
        assert doms.statistics.deaths == 1
    nursery.clear()


def test_a_forked_child_counts_for_itself(pg_url: str) -> None:
    with PostgresDomainList.open(pg_url) as doms:
        doms.define(xml("vm0"))
        before = doms.statistics
        reader, writer = os.pipe()
        if os.fork() == 0:
            with doms.get("vm0"):
                pass
            os.write(writer, b"%d" % doms.statistics.acquisitions)
            os._exit(0)
        os.close(writer)
        assert os.read(reader, 9) == b"1"
        os.close(reader)
        os.wait()
        assert doms.statistics == before


def test_a_process_that_got_a_new_row_counts_from_nothing(pg_url: str) -> None:
    """Who adds up has the old counts already, under the old number."""
    with PostgresDomainList.open(pg_url) as doms:
        doms.define(xml("vm0"))
        dom = doms.get("vm0")
        dom.autostart = True
        [(old, before)] = doms._statistics_of_each().items()
        with doms._pool.connect() as conn:
            conn.execute("DELETE FROM processes WHERE process = %s", [old])
        with pytest.raises(LockLost):
            dom.unlock()
        with doms.get("vm0") as dom:
            dom.autostart = True
        [(new, after)] = doms._statistics_of_each().items()
        assert new != old and before.commits > 0
        assert (after.acquisitions, after.commits) == (1, 1)


def test_what_this_process_counted_wins_over_its_row() -> None:
    """The number may be another one by the time of the answer."""

    def numeral(process: int) -> bytes:
        return process.to_bytes(8, "big")

    class Renumbered:
        list, process, counts = 1, 1, Counts()

        def ask(self, *args: object) -> list[list[bytes | None]]:
            self.process = 2
            return [[numeral(2), b""], [numeral(3), b"1 2"]]

    pool = Renumbered()
    pool.counts.got(False)
    assert all_counts(pool) == {2: pool.counts.numbers, 3: [1, 2]}


@pytest.mark.parametrize("url", ["shm:statistics", "postgresql"])
def test_any_list_has_them(url: str, pg_url: str, segment_dir: object) -> None:
    with opening.open(pg_url if url == "postgresql" else url) as doms:
        with doms.locked():
            pass
        assert doms.statistics.acquisitions == doms.statistics_of_all().acquisitions == 1
