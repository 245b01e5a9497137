"""Lists that are closed, dropped or shared while somebody is in the middle of something."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import shmdomains
from shmdomains import Domain, DomainList, ListClosed, SegmentCorrupt
from shmdomains import domain as domain_module

XML = "<domain type='kvm'><name>{}</name><memory>1</memory><os><type>hvm</type></os></domain>"
DEADLINE = 20


def in_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive()


def filled(*names: str) -> DomainList:
    doms = DomainList(max_domains=20)
    for name in names:
        doms.define(XML.format(name))
    return doms


def test_who_holds_the_list_lock_gives_it_back_though_another_thread_closed_the_list(
    tmp_path: Path,
) -> None:
    doms = DomainList.create(path=tmp_path / "s")
    with doms.locked():
        in_thread(doms.close)
        assert doms.closed and doms.is_locked
    assert not doms.is_locked
    again = DomainList.attach(path=tmp_path / "s")
    again.lock(timeout=0)
    again.unlock()


def test_two_lists_of_one_segment_let_go_of_it_with_the_last_close(segment_dir: Path) -> None:
    first, second = DomainList.create("s"), DomainList.attach("s")
    first.close()
    with pytest.raises(shmdomains.SegmentInUse):
        shmdomains.unlink("s")
    second.close()
    shmdomains.unlink("s")
    assert not shmdomains.segments()


def test_a_locked_domain_outlives_the_close_of_its_list(segment_dir: Path) -> None:
    doms = DomainList.create("s")
    doms.define(XML.format("a"))
    dom = doms.get(name="a")
    doms.close()
    with pytest.raises(shmdomains.SegmentInUse):
        shmdomains.unlink("s")
    dom.pid = 7
    dom.unlock()
    with pytest.raises(ListClosed):
        dom.lock()
    again = DomainList.attach("s")
    assert again.peek(name="a").pid == 7
    again.close()
    del dom
    shmdomains.unlink("s")


@pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
def test_what_a_handler_raises_in_a_wait_is_not_lost_in_a_close(lock: str) -> None:
    doms = DomainList(max_domains=4, lock=lock)
    doms.define(XML.format("a"))
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with doms.get(name="a"):
            held.set()
            done.wait(DEADLINE)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(DEADLINE)

    def close_and_leave(*_: object) -> None:
        doms.close()
        raise SystemExit(3)

    before = signal.signal(signal.SIGALRM, close_and_leave)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(SystemExit):
            doms.get(name="a", timeout=DEADLINE)
    finally:
        signal.signal(signal.SIGALRM, before)
        done.set()
        holder.join(DEADLINE)
    assert doms.closed


def test_a_wait_ends_with_the_list(segment_dir: Path) -> None:
    doms = DomainList.create("s")
    doms.define(XML.format("a"))
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            doms.get(name="a", timeout=DEADLINE).unlock()
        except BaseException as exc:
            outcome.append(exc)

    dom = doms.get(name="a")
    waiter = threading.Thread(target=wait)
    waiter.start()
    while not _waits_for(waiter):
        os.sched_yield()
    doms.close()
    dom.unlock()
    waiter.join(DEADLINE)
    assert [type(exc) for exc in outcome] == [ListClosed]
    del dom
    shmdomains.unlink("s")


def _waits_for(thread: threading.Thread) -> bool:
    """It sleeps in the kernel: a futex, which in this test is the domain's."""
    status = Path(f"/proc/self/task/{thread.native_id}/wchan").read_text()
    return "futex" in status


def test_a_with_block_inside_of_lock_many_does_not_end_it() -> None:
    doms = filled("a", "b")
    with doms.lock_many(doms.list()) as (first, second):
        with first:
            first.pid = 1
        assert first.is_locked and first.changed
        second.pid = 2
    assert [info.pid for info in doms.list()] == [1, 2]
    assert not first.is_locked and not second.is_locked


def test_only_damage_is_called_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a signal handler raises while a value is decoded goes its way."""
    doms = filled("a")
    with doms.get(name="a") as dom:
        dom.data = {"k": 1}

    class Alarm(Exception):
        pass

    def raise_alarm(*_: object, **__: object) -> None:
        raise Alarm

    monkeypatch.setattr(domain_module.msgpack, "unpackb", raise_alarm)
    with doms.get(name="a") as dom, pytest.raises(Alarm):
        _ = dom.data

    def raise_damage(*_: object, **__: object) -> None:
        raise ValueError("no such byte")

    monkeypatch.setattr(domain_module.msgpack, "unpackb", raise_damage)
    with doms.get(name="a") as dom, pytest.raises(SegmentCorrupt, match="no such byte"):
        _ = dom.data


def test_handles_come_from_lists_only() -> None:
    for made in (Domain, shmdomains.DomainInfo):
        with pytest.raises(TypeError, match="come from a DomainList"):
            made()
    nowhere = Domain.__new__(Domain)
    for use in (nowhere.lock, nowhere.try_lock, nowhere.__enter__):
        with pytest.raises(ListClosed):
            use()
