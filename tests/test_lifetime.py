"""Lists that are closed, dropped or shared while somebody is in the middle of something."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killing import Child, Pipe, Planted, fork, hold_mutex

import shmdomains
from shmdomains import Domain, DomainDef, DomainList, ListClosed, SegmentCorrupt
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


# --- fork -----------------------------------------------------------------------------------------

KINDS = ["robust", "multiprocessing"]
NAMES = "abc"


def make(kind: str, path: str | None = None) -> DomainList:
    """A list of three domains; with a path others can hold its mutexes through the file."""
    room: dict[str, Any] = {"max_domains": 10, "lock": kind}
    doms = DomainList(**room) if path is None else DomainList.create(path=path, **room)
    for name in NAMES:
        doms.define(XML.format(name))
    return doms


def all_free(doms: DomainList, timeout: float = DEADLINE) -> None:
    with doms.locked(timeout):
        for name in NAMES:
            doms.find_by_name(name, timeout).unlock()
    report = doms.check()
    assert report, report.problems


def keep(pipe: Pipe, doms: DomainList, what: str) -> None:
    """Hold a domain or the list until told."""
    one = doms if what == "list" else doms.get(name=what, timeout=DEADLINE)
    if what == "list":
        doms.lock(DEADLINE)
    pipe.say("held")
    pipe.listen()
    one.unlock()
    pipe.say("free")


def take_all(pipe: Pipe, doms: DomainList) -> None:
    all_free(doms)
    pipe.say("free")


def get_it(doms: DomainList) -> None:
    with doms.get(name="a") as dom:
        dom.data = (dom.data or ()) + (os.getpid(),)


def lock_it(doms: DomainList) -> None:
    with doms.locked():
        get_it(doms)


def find_it(doms: DomainList) -> None:
    with doms.locked(), doms.find_by_name("a") as dom:
        dom.data = (dom.data or ()) + (os.getpid(),)


def assign_it(doms: DomainList) -> None:
    with doms.locked(), doms.assign_def(DomainDef.from_xml(XML.format("a"))) as dom:
        dom.data = (dom.data or ()) + (os.getpid(),)


def commit_it(doms: DomainList) -> None:
    with doms.get(name="a", timeout=0) as dom:
        dom.data = (dom.data or ()) + (os.getpid(),)
        dom.commit()


def unlock_it(doms: DomainList) -> None:
    with doms.get(name="a", timeout=0) as dom:
        dom.data = (dom.data or ()) + (os.getpid(),)


def activate_it(doms: DomainList) -> None:
    with doms.get(name="a", timeout=0) as dom:
        dom.data = (dom.data or ()) + (os.getpid(),)
        dom.activate()


def define_it(doms: DomainList) -> None:
    doms.define(XML.format("d"))
    with doms.get(name="a", timeout=0) as dom:
        dom.data = (dom.data or ()) + (os.getpid(),)


# What is held by somebody else, and who waits for it.
WAITS = [
    ("a", get_it),
    ("list", lock_it),
    ("a", find_it),
    ("a", assign_it),
    ("heap", commit_it),
    ("heap", unlock_it),
    ("heap", define_it),
    ("id", activate_it),
]


@pytest.fixture
def short_locks(tmp_path: Path) -> dict[str, int]:
    """Where the core's own short locks lie in a segment."""
    with DomainList.create(path=tmp_path / "sample"), Planted(tmp_path / "sample") as planted:
        return {name: planted.header(f"{name}_mutex") for name in ("heap", "id")}


def fork_in_a_wait(
    pipe: Pipe, kind: str, path: str, held: str | int, wait: str, raising: bool
) -> None:
    doms = make(kind, path)
    if isinstance(held, int):
        holder = fork(hold_mutex, path, held)
        assert holder.hear() == 0
    else:
        holder = fork(keep, doms, held)
        assert holder.hear() == "held"
    ours, theirs = os.pipe()
    me, born = os.getpid(), []

    def multiply(*_: object) -> None:
        if not born:
            born.append(os.fork())
            if born[0]:
                holder.tell()
            elif raising:
                sys.exit()

    signal.signal(signal.SIGALRM, multiply)
    signal.setitimer(signal.ITIMER_REAL, 0.03)
    try:
        globals()[wait](doms)
        outcome = "done"
    except BaseException as exc:
        outcome = f"{type(exc).__name__}: {exc}"
    if os.getpid() != me:
        try:
            assert not doms.is_locked
            all_free(doms)
        except BaseException as exc:
            outcome += f" and then {exc!r}"
        os.write(theirs, outcome.encode())
        os._exit(0)
    os.close(theirs)
    others = os.read(ours, 4096).decode()
    os.waitpid(born[0], 0)
    pipe.say((outcome, others))
    assert doms.peek(name="a").data == (me,)
    with doms.get(name="a", timeout=DEADLINE) as dom:
        assert dom.previous_owner_died is None
    all_free(doms)
    pipe.say("fine")


@pytest.mark.parametrize("raising", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("held", "wait"), WAITS, ids=[wait.__name__ for _, wait in WAITS])
def test_a_handler_that_forks_in_the_middle_of_a_wait(
    start: Callable[..., Child],
    path: str,
    short_locks: dict[str, int],
    kind: str,
    held: str,
    wait: Callable[[DomainList], None],
    raising: bool,
) -> None:
    """The child comes out of the same wait. It holds nothing of what its parent holds, so there is
    nothing that it could go on with: it would commit what is its parent's, without a lock."""
    child = start(fork_in_a_wait, kind, path, short_locks.get(held, held), wait.__name__, raising)
    outcome, others = child.hear(2 * DEADLINE)
    assert outcome == "done"
    assert others.startswith("SystemExit" if raising else "LockOrder"), others
    assert raising or "a signal handler forked" in others
    assert "and then" not in others
    assert child.hear() == "fine"


def fork_beside_a_wait(pipe: Pipe, kind: str, path: str, what: str, gone: str) -> None:
    """Another thread forks while this one is in a slice."""
    doms = make(kind, path)
    holder = fork(keep, doms, what)
    assert holder.hear() == "held"
    waiting, said = threading.Event(), []

    def beget() -> None:
        assert waiting.wait(DEADLINE)
        while "futex" not in Path(f"/proc/self/task/{os.getpid()}/wchan").read_text():
            os.sched_yield()
        child = fork(globals()[gone], doms)
        said.append(child.hear())
        child.join()
        holder.tell()

    thread = threading.Thread(target=beget)
    thread.start()
    waiting.set()
    if what == "list":
        doms.lock(DEADLINE)
        doms.unlock()
    else:
        doms.get(name=what, timeout=DEADLINE).unlock()
    thread.join()
    assert said == ["fine"]
    all_free(doms)
    pipe.say("fine")


def child_that_works(pipe: Pipe, doms: DomainList) -> None:
    with doms.get(name="b", timeout=DEADLINE) as dom:
        dom.data = "child"
    grandchild = fork(child_that_looks, doms)
    assert grandchild.hear() == "fine"
    grandchild.join()
    pipe.say("fine")


def child_that_looks(pipe: Pipe, doms: DomainList) -> None:
    assert [info.name for info in doms] == [*NAMES]
    pipe.say("fine")


def child_that_goes(pipe: Pipe, doms: DomainList) -> None:
    pipe.say("fine")


def child_that_closes(pipe: Pipe, doms: DomainList) -> None:
    doms.close()
    pipe.say("fine")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["a", "list"])
@pytest.mark.parametrize(
    "gone", [child_that_works, child_that_looks, child_that_goes, child_that_closes]
)
def test_another_thread_forks_while_one_waits(
    start: Callable[..., Child], path: str, kind: str, what: str, gone: Callable[..., None]
) -> None:
    assert start(fork_beside_a_wait, kind, path, what, gone.__name__).hear(2 * DEADLINE) == "fine"
