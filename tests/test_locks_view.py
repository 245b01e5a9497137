"""Who holds what: `why`, `locks`, slow waits in the log, `statistics`, and the command.

Of both kinds of lock, with holders and waiters in threads, children and killed children. A waiter
is known to sleep when `locks` lists it, so nothing here waits by the clock.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import Home, Party, Store
from killing import Child, Nursery, Pipe, Planted, driver, sealed, until
from shell import invoke

from shmdomains import DomainList, LockInfo, LockTimeout
from shmdomains.memory._core import core

pytestmark = pytest.mark.usefixtures("nothing_left")

LONG = "a snapshot of a very large disk, and then of another one: ü"  # the 55th byte cuts the ü


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def filled(doms: DomainList, xml: Any) -> DomainList:
    for name in ("vm0", "vm1", "vm2"):
        doms.define(xml(name))
    return doms


def made(store: Store) -> str:
    """An expression for a list of this kind, in a process that forks."""
    return store.create.replace("room", "64").replace("size", "None")


def lock_of(doms: DomainList, kind: str, name: str | None = None) -> LockInfo | None:
    found = [lock for lock in doms.locks() if (lock.kind, lock.name) == (kind, name)]
    assert len(found) <= 1
    return found[0] if found else None


def waiting(doms: DomainList, kind: str, name: str | None = None) -> int:
    lock = lock_of(doms, kind, name)
    return 0 if lock is None else lock.waiting


# --- why ------------------------------------------------------------------------------------------


def test_a_time_out_says_what_the_holder_does(filled: DomainList, other: Party) -> None:
    with filled.get(name="vm0", why="snapshot"):
        other.tell("""
            try:
                doms.get(name="vm0", timeout=0)
            except LockTimeout as exc:
                error = exc
        """)
        assert other.tell("error.holder.operation") == "snapshot"
        assert "doing 'snapshot'" in other.tell("str(error)")
    with filled.get(name="vm0"):
        assert other.tell("""
            try:
                doms.get(name="vm0", timeout=0)
            except LockTimeout as exc:
                error = exc
            error.holder.operation, "doing" in str(error)
        """) == (None, False)


def test_every_way_to_lock_says_why(filled: DomainList) -> None:
    def now(kind: str = "domain", name: str | None = "vm0") -> str | None:
        lock = lock_of(filled, kind, name)
        assert lock is not None and lock.holder is not None
        return lock.holder.operation

    with filled.get(name="vm0", why="get") as dom:
        assert now() == "get"
    with filled.lookup(name="vm0", why="lookup"):
        assert now() == "lookup"
    assert filled.lookup(name="nobody", why="lookup") is None
    dom.lock(why="lock")
    assert now() == "lock"
    dom.unlock()
    with filled.locked(why="locked"):
        assert now("list", None) == "locked"
        for find, key in (("find_by_name", "vm0"), ("find_by_uuid", dom.uuid)):
            with getattr(filled, find)(key, why=find):
                assert now() == find
    filled.lock(why="list")
    assert now("list", None) == "list"
    filled.unlock()
    with filled.locked(), dom:
        assert (now("list", None), now()) == (None, None)
    assert filled.locks() == []


def test_why_is_cut_at_a_character(filled: DomainList) -> None:
    with filled.get(name="vm0", why=LONG):
        lock = lock_of(filled, "domain", "vm0")
        assert lock is not None and lock.holder is not None
        assert lock.holder.operation == LONG.encode()[:55].decode(errors="ignore")
    for nothing in ("", "\0"):
        with filled.get(name="vm0", why=nothing):
            lock = lock_of(filled, "domain", "vm0")
            assert lock is not None and lock.holder is not None and lock.holder.operation is None


def test_why_is_text(filled: DomainList) -> None:
    dom = filled.get(name="vm0")
    dom.unlock()
    wrong: Any = 7
    for call in (
        lambda: filled.get(name="vm0", why=wrong),
        lambda: filled.lookup(name="vm0", why=wrong),
        lambda: filled.lock(why=wrong),
        lambda: dom.lock(why=wrong),
    ):
        with pytest.raises(TypeError, match="why is a str"):
            call()
    assert filled.locks() == []


# --- who holds, who waits -------------------------------------------------------------------------


def test_nobody(filled: DomainList) -> None:
    assert filled.locks() == []


def test_holder_and_waiters_in_other_threads(filled: DomainList) -> None:
    with filled.get(name="vm1") as dom, ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(filled.get, name="vm1", timeout=0.4) for _ in range(3)]
        until(lambda: waiting(filled, "domain", "vm1") == 3, "three wait")
        [lock] = filled.locks()
        assert (lock.kind, lock.name, lock.uuid) == ("domain", "vm1", dom.uuid)
        assert lock.holder is not None and lock.holder.alive
        assert (lock.holder.pid, lock.holder.tid) == (os.getpid(), threading.get_native_id())
        assert 0 < lock.longest_wait < 10
        assert "3 wait, the first for" in str(lock)
        assert all(isinstance(wait.exception(), LockTimeout) for wait in waits)
        assert waiting(filled, "domain", "vm1") == 0
    assert filled.locks() == []


def test_the_list_is_waited_for(filled: DomainList) -> None:
    with ThreadPoolExecutor(1) as pool:

        def take() -> None:
            with filled.locked(timeout=10):
                pass

        with filled.locked(why="look"):
            wait = pool.submit(take)
            until(lambda: waiting(filled, "list") == 1, "one waits")
        wait.result()
    assert filled.locks() == []


def test_somebody_who_was_killed(home: Home, store: Store) -> None:
    """The holder: shown dead or not at all, what it did is forgotten once somebody has the lock;
    a waiter: not shown."""
    home.party.do(f"context = multiprocessing.get_context('fork')\ndoms = {made(store)}")
    home.party.tell("""
        doms.define(xml("vm0"))
        def dies(ready):
            doms.lock(why="the list")
            dom = doms.find_by_name("vm0", why="a long backup")
            ready.send(None)
            signal.pause()
        def waits():
            doms.get(name="vm0")
        ours, theirs = multiprocessing.Pipe()
        holder = context.Process(target=dies, args=(theirs,))
        holder.start()
        ours.recv()
        waiter = context.Process(target=waits)
        waiter.start()
        def seen():
            return {lock.kind: lock for lock in doms.locks()}
        end = time.monotonic() + 10
        while seen()["domain"].waiting != 1:
            assert time.monotonic() < end
    """)
    assert home.party.tell("""
        found = seen()
        [(lock.holder.pid == holder.pid, lock.holder.alive, lock.holder.operation, lock.waiting)
         for lock in (found["list"], found["domain"])]
    """) == [(True, True, "the list", 0), (True, True, "a long backup", 1)]
    home.party.do("waiter.kill(), waiter.join()")
    assert home.party.tell("seen()['domain'].waiting") == 0
    assert home.party.tell("""
        holder.kill(), holder.join()
        [(lock.holder.pid == holder.pid, lock.holder.alive) for lock in doms.locks() if lock.holder]
    """) == [(True, False), (True, False)]
    assert home.party.tell("""
        with doms.locked(), doms.find_by_name("vm0") as dom:
            operations = [lock.holder.operation for lock in doms.locks()]
            died = dom.previous_owner_died.pid == holder.pid
        operations, died, doms.locks(), doms.statistics.deaths, doms.statistics.recoveries
    """) == ([None, None], True, [], 2, 2)
    home.party.do("doms.close()")


def test_jobs_and_those_who_wait_for_them(filled: DomainList) -> None:
    def take() -> None:
        with filled.job("vm1", "rename it", timeout=10):
            pass

    with ThreadPoolExecutor(1) as pool:
        with filled.job("vm1", "backup"):
            wait = pool.submit(take)
            until(lambda: waiting(filled, "job", "vm1") == 1, "one waits")
            [lock] = filled.locks()
            assert (lock.kind, lock.name, lock.uuid) == ("job", "vm1", filled["vm1"].uuid)
            assert lock.holder is not None and lock.holder.alive
            assert (lock.holder.operation, lock.holder.pid) == ("backup", os.getpid())
            assert lock.longest_wait > 0 and str(lock).startswith("a job of domain 'vm1': held by")
        wait.result()
    assert filled.locks() == []


def test_a_thread_sees_that_the_holder_of_a_job_died(home: Home, store: Store) -> None:
    """No commit tells of that death, so it has to look: also where no signal handler runs."""
    home.party.do(f"context = multiprocessing.get_context('fork')\ndoms = {made(store)}")
    home.party.tell("""
        from concurrent.futures import ThreadPoolExecutor
        doms.define(xml("vm0"))
        def dies(ready):
            with doms.job("vm0", "backup"):
                ready.send(None)
                signal.pause()
        def waits():
            with doms.job("vm0", "rename it") as job:
                return job.previous_owner_died.operation
        ours, theirs = multiprocessing.Pipe()
        holder = context.Process(target=dies, args=(theirs,))
        holder.start()
        ours.recv()
        pool = ThreadPoolExecutor(1)
        wait = pool.submit(waits)
        end = time.monotonic() + 10
        while [lock.waiting for lock in doms.locks()] != [1]:
            assert time.monotonic() < end
        holder.kill(), holder.join()
    """)
    assert home.party.tell("wait.result(10)") == "backup"
    home.party.do("pool.shutdown(); doms.close()")


def test_a_removed_domain_is_waited_for(filled: DomainList) -> None:
    """Until it is gone."""
    with ThreadPoolExecutor(1) as pool, filled.locked():
        dom = filled.find_by_name("vm2")
        wait = pool.submit(filled.lookup, name="vm2")
        until(lambda: waiting(filled, "domain", "vm2") == 1, "one waits")
        filled._remove(dom)
        assert wait.result() is None
    assert filled.locks() == []


# --- a storm --------------------------------------------------------------------------------------


def storm(pipe: Pipe, path: str, seed: int) -> None:
    dice = random.Random(seed)
    with DomainList.attach(path=path) as doms:
        pipe.say(os.getpid())
        while True:
            if dice.random() < 0.2:
                with suppress(LockTimeout), doms.locked(timeout=1, why=str(os.getpid())):
                    pass
            with (
                suppress(LockTimeout),
                doms.get(name=f"vm{dice.randrange(3)}", timeout=1, why=str(os.getpid())) as dom,
            ):
                dom.data = dice.random()


def test_a_storm_is_looked_at_all_the_time(
    nursery: Nursery, segment_dir: Path, xml: Any, tried: Any
) -> None:
    """Nobody is named who never held the lock, and nobody's purpose is another one's, as far as the
    look says who it was."""
    path = str(segment_dir / "storm")
    with DomainList.create(path=path, max_domains=8) as doms:
        for number in range(3):
            doms.define(xml(f"vm{number}"))
        workers: list[Child] = []
        pids = {os.getpid()}
        looks = seen = waited = 0
        for round in range(60):
            while len(workers) < 5:
                workers.append(nursery.start(storm, path, round * 10 + len(workers)))
                pids.add(workers[-1].hear())
            for _ in range(20):
                looks += 1
                for lock in doms.locks():
                    assert lock.kind in ("list", "domain")
                    assert lock.name in (None, "vm0", "vm1", "vm2")
                    assert 0 <= lock.waiting <= 5
                    waited += lock.waiting
                    if lock.holder is not None and lock.holder.pid is not None:
                        seen += 1
                        assert lock.holder.pid in pids, lock
                        # Eight bytes are one word, which is never torn.
                        assert lock.holder.operation in (None, str(lock.holder.pid)), lock
            workers.pop(0).close()
        nursery.clear()
        assert seen and waited
        tried("looks at who holds what in a storm", looks)
        assert doms.recover().held == [] and doms.locks() == []
        assert doms.check()


# --- slow waits -----------------------------------------------------------------------------------


@pytest.fixture
def slow_waits(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "shmdomains.wait")
    return caplog


def test_a_slow_wait_is_logged_once(
    filled: DomainList, slow_waits: pytest.LogCaptureFixture
) -> None:
    assert filled.slow_after == 5
    filled.slow_after = 0.01
    with ThreadPoolExecutor(1) as pool:
        with filled.get(name="vm0", why="backup"):
            # Several slices, after the first of which it is slow.
            wait = pool.submit(filled.get, name="vm0", timeout=0.4)
            assert isinstance(wait.exception(), LockTimeout)
        with filled.locked():
            wait = pool.submit(filled.lock, timeout=0.4)
            assert isinstance(wait.exception(), LockTimeout)
    first, second = slow_waits.messages
    assert first.startswith("domain 'vm0' was not free within 0.0")
    assert f"held by process {os.getpid()} (" in first and "doing 'backup'" in first
    assert second.startswith("the list lock was not free within 0.0")
    assert all(text.endswith("; still waiting") for text in (first, second))
    assert {(one.name, one.levelname) for one in slow_waits.records} == {
        ("shmdomains.wait", "WARNING")
    }


@pytest.mark.parametrize("after", [0, 100])
def test_a_wait_is_not_slow(
    filled: DomainList, slow_waits: pytest.LogCaptureFixture, after: float
) -> None:
    filled.slow_after = after
    with filled.get(name="vm0"), ThreadPoolExecutor(1) as pool:
        wait = pool.submit(filled.get, name="vm0", timeout=0.2)
        assert isinstance(wait.exception(), LockTimeout)
    assert slow_waits.messages == []


def test_slow_after_is_a_number_of_seconds(filled: DomainList) -> None:
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="slow_after is 0"):
            filled.slow_after = wrong


def test_what_a_log_handler_raises_ends_the_wait(filled: DomainList) -> None:
    """As what a signal handler raises there: the lock is not held, and nobody is listed."""

    class Refuses(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise KeyboardInterrupt

    refuses = Refuses()
    logging.getLogger("shmdomains.wait").addFilter(refuses)
    filled.slow_after = 0.01
    try:
        with filled.get(name="vm0"), ThreadPoolExecutor(1) as pool:
            wait = pool.submit(filled.get, name="vm0", timeout=10)
            assert isinstance(wait.exception(), KeyboardInterrupt)
            assert waiting(filled, "domain", "vm0") == 0
    finally:
        logging.getLogger("shmdomains.wait").removeFilter(refuses)
    assert filled.locks() == []


# --- statistics -----------------------------------------------------------------------------------


def test_what_is_counted(filled: DomainList) -> None:
    before = filled.statistics
    for number in range(10):
        with filled.get(name="vm0") as dom:
            dom.data = number
    with filled.get(name="vm0"):
        pass
    after = filled.statistics
    assert after.acquisitions - before.acquisitions == 11
    assert after.commits - before.commits == 10
    assert (after.contended, sum(after.waits), after.deaths) == (0, 0, 0)
    with filled.get(name="vm0"), ThreadPoolExecutor(1) as pool:
        wait = pool.submit(filled.get, name="vm0", timeout=0.1)
        assert isinstance(wait.exception(), LockTimeout)
    now = filled.statistics
    assert (now.contended, sum(now.waits)) == (1, 1)
    assert now.waits.index(1) in (17, 18, 19)  # 65 to 524 ms
    assert now.acquisitions == after.acquisitions + 1


def get_often(pipe: Pipe, path: str, times: int) -> None:
    with DomainList.attach(path=path) as doms:
        for _ in range(times):
            with doms.get(name="vm0") as dom:
                dom.data = times
        pipe.say()
        pipe.listen()


def test_what_the_living_counted_adds_up(nursery: Nursery, segment_dir: Path, xml: Any) -> None:
    path = str(segment_dir / "sums")
    with DomainList.create(path=path, max_domains=8) as doms:
        doms.define(xml("vm0"))
        before = doms.statistics_of_all()
        assert before.processes == 1
        workers = [nursery.start(get_often, path, 300) for _ in range(4)]
        for worker in workers:
            worker.hear()
        total = doms.statistics_of_all()
        assert total.processes == 5
        assert total.acquisitions - before.acquisitions == 4 * 300
        assert total.commits - before.commits == 4 * 300
        assert sum(total.waits) == total.contended
        # A dead one does not count, and whoever gets its place begins anew.
        workers[0].kill()
        left = doms.statistics_of_all()
        assert (left.processes, left.acquisitions) == (4, before.acquisitions + 3 * 300)
        # A place is free at once where somebody left in order.
        for _ in range(3):
            late = nursery.start(get_often, path, 7)
            late.hear()
            assert doms.statistics_of_all().acquisitions == left.acquisitions + 7
            late.tell()
            late.join()
    nursery.clear()


def test_a_forked_child_counts_for_itself(home: Home, store: Store) -> None:
    home.party.do(f"context = multiprocessing.get_context('fork')\ndoms = {made(store)}")
    home.party.do("doms.define(xml('vm0'))\nbefore = doms.statistics")
    assert home.party.tell("""
        def child(conn):
            new = doms.statistics
            for _ in range(5):
                with doms.get(name="vm0"):
                    pass
            conn.send((new.acquisitions, doms.statistics.acquisitions,
                       doms.statistics_of_all().processes))
        ours, theirs = multiprocessing.Pipe()
        process = context.Process(target=child, args=(theirs,))
        process.start()
        said = ours.recv()
        process.join()
        said
    """) == (0, 5, 2)
    assert home.party.tell("doms.statistics == before") is True
    home.party.do("doms.close()")


# --- the table of the waiters ---------------------------------------------------------------------


@pytest.fixture
def planted(segment_dir: Path, xml: Any) -> Iterator[tuple[DomainList, Planted]]:
    """A list whose table of waiters has memory."""
    if driver() is None:
        pytest.skip("no C compiler, so nobody says where the words of a segment lie")
    path = str(segment_dir / "list")
    with DomainList.create(path=path, max_domains=8) as doms:
        doms.define(xml("vm0"))
        give_up_waiting(doms)
        with Planted(path) as planted:
            yield doms, planted


def give_up_waiting(doms: DomainList) -> None:
    with doms.get(name="vm0"), ThreadPoolExecutor(1) as pool:
        wait = pool.submit(doms.get, name="vm0", timeout=0.06)
        assert isinstance(wait.exception(), LockTimeout)


def fill_table(planted: Planted, who: int) -> None:
    for place in range(planted.at["waiters.max"]):
        planted.leave_waiter(place, who, 1, 0)


def me() -> int:
    _, tid, start = core.caller()
    return tid | start << 22


def test_a_full_table_lists_no_more(planted: tuple[DomainList, Planted]) -> None:
    doms, words = planted
    most = words.at["waiters.max"]
    # As if all of it had been in use at once.
    os.posix_fallocate(words._fd, words.at["waiters"], most * words.at["waiter.size"])
    words.write(words.header("waiters_committed"), sealed(most))
    fill_table(words, me())
    before = doms.statistics
    assert waiting(doms, "domain", "vm0") == most
    give_up_waiting(doms)
    after = doms.statistics
    assert (after.unlisted, after.contended) == (before.unlisted + 1, before.contended + 1)
    fill_table(words, 77 << 22 | 1 << 21)  # nobody
    assert waiting(doms, "domain", "vm0") == 0
    with doms.get(name="vm0"), ThreadPoolExecutor(1) as pool:
        wait = pool.submit(doms.get, name="vm0", timeout=0.5)
        until(lambda: waiting(doms, "domain", "vm0") == 1, "it took a dead one's place")
        assert isinstance(wait.exception(), LockTimeout)
    assert doms.statistics.unlisted == after.unlisted


def test_a_damaged_watermark_is_made_anew(planted: tuple[DomainList, Planted]) -> None:
    doms, words = planted
    at = words.header("waiters_committed")
    words.write(at, words.read(at) ^ 1 << 40)
    assert doms.locks() == []
    with doms.get(name="vm0"), ThreadPoolExecutor(1) as pool:
        wait = pool.submit(doms.get, name="vm0", timeout=0.5)
        until(lambda: waiting(doms, "domain", "vm0") == 1, "it is listed")
        assert isinstance(wait.exception(), LockTimeout)


def test_a_waiter_whose_words_do_not_fit(planted: tuple[DomainList, Planted]) -> None:
    doms, words = planted
    words.leave_waiter(0, me(), os.getpid(), 0)
    assert waiting(doms, "domain", "vm0") == 1
    for field in ("who", "pid", "what", "since", "sum"):
        at = words.at["waiters"] + words.at[f"waiter.{field}"]
        for bit in range(64):
            words.write(at, words.read(at) ^ 1 << bit)
            assert doms.locks() == []
            words.write(at, words.read(at) ^ 1 << bit)
    assert waiting(doms, "domain", "vm0") == 1


# --- a stranger, the command ----------------------------------------------------------------------


def test_a_stranger_sees_a_list_of_the_other_kind(
    segment_dir: Path, stranger: Party, xml: Any
) -> None:
    path = str(segment_dir / "list")
    with DomainList.create(path=path, max_domains=4, lock="multiprocessing") as doms:
        doms.define(xml("vm0"))
        with doms.get(name="vm0", why="backup"):
            assert stranger.tell(f"""
                with DomainList.attach(path={path!r}) as doms:
                    [lock] = doms.locks()
                    found = lock.name, lock.holder.pid, lock.holder.operation
                found
            """) == ("vm0", os.getpid(), "backup")


def test_the_command(segment_dir: Path, xml: Any) -> None:
    with DomainList.create("seen", max_domains=4) as doms:
        doms.define(xml("vm0", uuid.UUID(int=7)))
        with doms.locked(why="count"), doms.find_by_name("vm0"):
            table = invoke("-s", "seen", "locks").stdout
            records = json.loads(invoke("-s", "seen", "locks", "--format", "json").stdout)
        assert "list lock" in table and "domain 'vm0'" in table and "count" in table
        assert f"process {os.getpid()}" in table
        assert [(one["lock"], one["domain"], one["waiting"]) for one in records] == [
            ("list", None, 0),
            ("domain", "vm0", 0),
        ]
        assert records[0]["holder"]["operation"] == "count"
        assert records[1]["uuid"] == str(uuid.UUID(int=7))
        assert invoke("-s", "seen", "locks", "--format", "json").stdout == "[]\n"


def test_named_locks_are_seen(filled: DomainList) -> None:
    with (
        filled.mutex("scheduler", why="rebalancing"),
        filled.get(name="vm0"),
        ThreadPoolExecutor(1) as pool,
    ):

        def fails() -> None:
            with filled.mutex("scheduler", timeout=0.4):
                pass

        filled.slow_after = 0.01
        wait = pool.submit(fails)
        until(lambda: waiting(filled, "mutex", "scheduler") == 1, "one waits")
        kinds = [(lock.kind, lock.name) for lock in filled.locks()]
        assert kinds == [("mutex", "scheduler"), ("domain", "vm0")]
        lock = lock_of(filled, "mutex", "scheduler")
        assert lock is not None and lock.holder is not None
        assert (lock.holder.pid, lock.holder.operation) == (os.getpid(), "rebalancing")
        assert "doing 'rebalancing'" in str(wait.exception())
    assert filled.locks() == []
