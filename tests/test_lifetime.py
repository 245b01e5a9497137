"""Lists that are closed, dropped or shared while somebody is in the middle of something."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import SOAK, Process, environment
from killing import Child, Pipe, Planted, fork, hold_mutex, libc, until

import shmdomains
from shmdomains import (
    Domain,
    DomainDef,
    DomainList,
    ListClosed,
    LockTimeout,
    SegmentCorrupt,
    SegmentFull,
    SegmentInUse,
    ShmDomainsError,
)
from shmdomains.memory._core import core
from shmdomains.rules import values

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
        dom.data = {"k": [1]}

    class Alarm(Exception):
        pass

    def raise_alarm(*_: object, **__: object) -> None:
        raise Alarm

    monkeypatch.setattr(values.msgpack, "unpackb", raise_alarm)
    with doms.get(name="a") as dom, pytest.raises(Alarm):
        _ = dom.data

    def raise_damage(*_: object, **__: object) -> None:
        raise ValueError("no such byte")

    monkeypatch.setattr(values.msgpack, "unpackb", raise_damage)
    with doms.get(name="a") as dom, pytest.raises(SegmentCorrupt, match="no such byte"):
        _ = dom.data


def test_handles_come_from_lists_only() -> None:
    for made in (Domain, core.DomainInfo):
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


LARGE = ("x" * 200,)
"""Of data that lies in the heap."""


def get_it(doms: DomainList) -> None:
    with doms.get(name="a") as dom:
        dom.data = (dom.data or LARGE) + (os.getpid(),)


def lock_it(doms: DomainList) -> None:
    with doms.locked():
        get_it(doms)


def find_it(doms: DomainList) -> None:
    with doms.locked(), doms.find_by_name("a") as dom:
        dom.data = (dom.data or LARGE) + (os.getpid(),)


def assign_it(doms: DomainList) -> None:
    with doms.locked(), doms.assign_def(DomainDef.from_xml(XML.format("a"))) as dom:
        dom.data = (dom.data or LARGE) + (os.getpid(),)


def commit_it(doms: DomainList) -> None:
    with doms.get(name="a", timeout=0) as dom:
        dom.data = (dom.data or LARGE) + (os.getpid(),)
        dom.commit()


def unlock_it(doms: DomainList) -> None:
    with doms.get(name="a", timeout=0) as dom:
        dom.data = (dom.data or LARGE) + (os.getpid(),)


def activate_it(doms: DomainList) -> None:
    with doms.get(name="a", timeout=0) as dom:
        dom.data = (dom.data or LARGE) + (os.getpid(),)
        dom.activate()


def define_it(doms: DomainList) -> None:
    doms.define(XML.format("d"))
    # By now the child that was forked in the wait may hold it for a moment.
    with doms.get(name="a", timeout=DEADLINE) as dom:
        dom.data = (dom.data or LARGE) + (os.getpid(),)


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
    assert doms.peek(name="a").data == (*LARGE, me)
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


# --- the end of a process -------------------------------------------------------------------------

# Two lists at once, one of each kind, and a watcher, forked before anything is held, that waits for
# the end of this process and says what it then finds.
LIFE = """
import asyncio, atexit, gc, json, os, signal, subprocess, sys, threading, time, weakref
from contextlib import suppress
from shmdomains import DomainDef, DomainList, ShmDomainsError

XML = "<domain type='kvm'><name>{{}}</name><memory>1</memory><os><type>hvm</type></os></domain>"
lists = [DomainList.create(path=sys.argv[1], max_domains=10),
         DomainList(max_domains=10, lock="multiprocessing")]
for doms in lists:
    for name in "abc":
        doms.define(XML.format(name))
ended, mine = os.pipe()
me = os.getpid()

def look(doms):
    with doms.locked(10):
        found = [doms.find_by_name(name, 10) for name in "abc"]
    told = [[dom.data, dom.previous_owner_died and dom.previous_owner_died.pid] for dom in found]
    for dom in found:
        dom.unlock()
    return told, doms.check().problems

if not os.fork():
    os.close(mine)
    os.read(ended, 1)
    try:
        print(json.dumps([me, *map(look, lists)]), flush=True)
    except BaseException as exc:
        print(json.dumps(repr(exc)), flush=True)
    os._exit(0)
os.close(ended)

held = []

def take():
    for doms in lists:
        doms.lock(10)
        held.append(doms.find_by_name("a", 10))
        held[-1].data = "uncommitted"

def work(text="committed"):
    for doms in lists:
        with doms.get(name="b", timeout=10) as dom:
            dom.data = text
        doms.define(XML.format("x"))
        doms.undefine(name="x")

def in_thread(target, daemon=True):
    begun = threading.Event()
    thread = threading.Thread(target=target, args=[begun], daemon=daemon)
    thread.start()
    assert begun.wait(10)
    return thread

{}
"""

# Name: how it ends, its exit status, what is then in the domains "a" and "b", what it says.
ENDS: dict[str, tuple[str, int, Any, Any, str]] = {
    "os._exit": ("take(); os._exit(7)", 7, None, None, ""),
    "os._exit of a thread": (
        """
def leave():
    take()
    os._exit(7)
threading.Thread(target=leave).start()
time.sleep(1)
lists[0].lock()
""",
        7,
        None,
        None,
        "",
    ),
    "os.abort": ("take(); os.abort()", -signal.SIGABRT, None, None, ""),
    "SIGTERM": ("take(); os.kill(me, signal.SIGTERM)", -signal.SIGTERM, None, None, ""),
    "exec": ("take(); os.execv(sys.executable, [sys.executable, '-c', ''])", 0, None, None, ""),
    "exception": ("take(); raise RuntimeError('end')", 1, None, None, "RuntimeError: end"),
    "exception in a block": (
        "with lists[0].get(name='a') as dom:\n    dom.data = 1\n    raise RuntimeError('end')",
        1,
        None,
        None,
        "RuntimeError: end",
    ),
    "sys.exit in a block": (
        "with lists[0].locked(), lists[1].get(name='a') as dom:\n    dom.data = 1\n    sys.exit(3)",
        3,
        None,
        None,
        "",
    ),
    "handles alive": ("take()", 0, None, None, ""),
    "handles in a cycle": (
        """
class Knot:
    pass
knot = Knot()
knot.itself, knot.held = knot, held
take()
del held, knot
""",
        0,
        None,
        None,
        "",
    ),
    "handles kept by the interpreter": (
        "take(); sys.held = held; lists.clear()",
        0,
        None,
        None,
        "",
    ),
    "__del__ that works": (
        """
class Late:
    def __init__(self):
        self.work, self.take = work, take
    def __del__(self):
        self.work("late")
late = Late()
""",
        0,
        None,
        "late",
        "",
    ),
    "weakref.finalize": ("weakref.finalize(take, work, 'late'); del take", 0, None, "late", ""),
    "atexit": (
        """
def late():
    for dom in held:
        dom.data = "late"
        dom.unlock()
    for doms in lists:
        doms.unlock()
    work("late")
atexit.register(late)
take()
""",
        0,
        "late",
        "late",
        "",
    ),
    "atexit closes while threads wait": (
        """
def wait(begun, use):
    begun.set()
    use()
def close():
    for doms in lists:
        doms.close()
atexit.register(close)
take()
for doms in lists:
    in_thread(lambda begun, doms=doms: wait(begun, lambda: doms.get(name="a")))
    in_thread(lambda begun, doms=doms: wait(begun, lambda: doms.lock()))
""",
        0,
        None,
        None,
        "",
    ),
    "a daemon thread holds": (
        """
def hold(begun):
    take()
    begun.set()
    while True:
        time.sleep(1)
in_thread(hold)
""",
        0,
        None,
        None,
        "",
    ),
    "daemon threads work": (
        """
def go_on(begun):
    begun.set()
    while True:
        with suppress(ShmDomainsError):
            work()
for _ in range(4):
    in_thread(go_on)
time.sleep(0.05)
""",
        0,
        None,
        "committed",
        "",
    ),
    "another thread goes on": (
        """
def go_on(begun):
    begun.set()
    time.sleep(0.05)
    work("late")
in_thread(go_on, daemon=False)
""",
        0,
        None,
        "late",
        "",
    ),
    "a thread died holding": (
        """
threading.excepthook = lambda what: None
def die(begun):
    begun.set()
    take()
    raise RuntimeError
in_thread(die).join()
for doms in lists:
    with doms.locked(10), doms.find_by_name("a", 10) as dom:
        assert dom.previous_owner_died.pid == me and dom.data is None
        dom.data = "saved"
""",
        0,
        "saved",
        None,
        "",
    ),
    "signals all the way": (
        """
def handle(*_):
    with suppress(ShmDomainsError):
        for doms in lists:
            doms.get(name="b", timeout=0).unlock()
            doms.snapshot()
signal.signal(signal.SIGURG, handle)  # which is ignored once Python takes its handlers away
for _ in range(20000):
    weakref.finalize(gc, lambda: None)
take()
pidfd = os.pidfd_open(me)
if not os.fork():
    os.close(mine)
    while os.getppid() == me:
        signal.pidfd_send_signal(pidfd, signal.SIGURG)
        time.sleep(0.001)
    os._exit(0)
""",
        0,
        None,
        None,
        "",
    ),
    "an interrupted wait": (
        """
with lists[0].get(name="a") as dom:
    def wait(begun):
        begun.set()
        with suppress(ShmDomainsError):
            lists[0].get(name="a", timeout=0.2)
    waiter = in_thread(wait)
    dom.data = 1
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    waiter.join()
""",
        -signal.SIGINT,
        None,
        None,
        "KeyboardInterrupt",
    ),
    "blocks of generators": (
        """
class never:
    def __await__(self):
        yield
def block(doms):
    with doms.locked(), doms.find_by_name("a") as dom:
        dom.data = "uncommitted"
        yield dom
async def task(doms):
    with doms.get(name="b") as dom:
        dom.data = "uncommitted"
        await never()
async def stream(doms):
    with doms.get(name="c") as dom:
        dom.data = "uncommitted"
        yield dom
suspended = []
for doms in lists:
    suspended += [block(doms), task(doms), stream(doms)]
    next(suspended[-3])
    suspended[-2].send(None)
    with suppress(StopIteration):
        suspended[-1].__anext__().send(None)
""",
        0,
        None,
        None,
        "",
    ),
    "a program that was started goes on": (
        """
take()
goes_on = [sys.executable, "-c", "import sys; sys.stdin.read()"]
started = subprocess.Popen(goes_on, stdin=subprocess.PIPE, close_fds=False)
os.posix_spawn(sys.executable, goes_on, os.environ)
os._exit(0)
""",
        0,
        None,
        None,
        "",
    ),
    "a child ends first, as its parent will": (
        """
take()
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    for doms, dom in zip(lists, held):
        assert doms.is_locked and dom.is_locked
        dom.data = "kept"
        dom.unlock()
""",
        0,
        "kept",
        None,
        "",
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_a_process(tmp_path: Path, end: str) -> None:
    """Whatever it held, of two lists of either kind, the next can have at once; what it had
    committed is there, what it had not is not; and it neither hangs nor complains."""
    code, status, of_a, of_b, complaint = ENDS[end]
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", LIFE.format(code), str(tmp_path / "s")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
    )
    assert done.returncode == status, done.stderr
    said = [line for line in done.stderr.splitlines() if "ResourceWarning" not in line]
    assert bool(said) == bool(complaint), done.stderr
    assert re.search(complaint, done.stderr)
    assert status < 0 or not re.search("Exception ignored|Fatal", done.stderr)
    pid, *found = json.loads(done.stdout)
    for domains, problems in found:
        assert problems == []
        assert [data for data, _ in domains] in ([of_a, of_b, None], [of_a, of_b or None, None])
        assert {died for _, died in domains} <= {None, pid}


def leave_it_locked(how: str) -> None:
    """A task of a pool that never comes back, or comes back and leaves its lock behind."""
    dom = _inherited.get(name="a", timeout=DEADLINE)
    dom.data = "uncommitted"
    if how == "os._exit":
        os._exit(0)
    _left.append(dom)


_inherited: DomainList
_left: list[Domain] = []


def enter_pool(doms: DomainList) -> None:
    global _inherited
    _inherited = doms


def use_pool(pipe: Pipe, kind: str, way: str, how: str) -> None:
    context = multiprocessing.get_context(way)
    doms = DomainList(max_domains=4, lock=kind, context=context)
    doms.define(XML.format("a"))
    with context.Pool(1, enter_pool, [doms]) as pool:
        pid = pool.apply_async(os.getpid).get(DEADLINE)
        task = pool.apply_async(leave_it_locked, [how])
        if how == "os._exit":
            assert pool.apply_async(os.getpid).get(DEADLINE) != pid  # another in its place
        else:
            task.get(DEADLINE)
            pool.close()
            pool.join()
        with doms.get(name="a", timeout=DEADLINE) as dom:
            died = dom.previous_owner_died
            assert dom.data is None
    # An interpreter that ends frees what is dropped at its end.
    assert died.pid == pid if how == "os._exit" or died else way == "spawn"
    doms.close()
    pipe.say("fine")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("how", ["os._exit", "returns"])
def test_the_end_of_a_pools_worker(
    start: Callable[..., Child], kind: str, way: str, how: str
) -> None:
    assert start(use_pool, kind, way, how).hear(3 * DEADLINE) == "fine"


def children_that_do_nothing(pipe: Pipe, path: str, kind: str) -> None:
    doms = make(kind, path)
    dom = doms.get(name="a")
    dom.data = "kept"
    for end in (os._exit, exit_by_the_end_of_main):
        child = os.fork()
        if not child:
            end(0)
        assert os.waitpid(child, 0)[1] == 0
    pipe.say("they are gone")
    pipe.listen()
    assert dom.is_locked
    dom.unlock()
    pipe.say(doms.peek(name="a").data)
    pipe.listen()
    doms.close()
    del doms, dom
    pipe.say("closed")
    pipe.listen()


def exit_by_the_end_of_main(status: int) -> None:
    """All that an interpreter does at its end, in a child that was forked."""
    ctypes.pythonapi.Py_Exit(status)


@pytest.mark.parametrize("kind", KINDS)
def test_children_that_never_use_a_list_take_nothing_from_their_parent(
    start: Callable[..., Child], path: str, kind: str
) -> None:
    parent = start(children_that_do_nothing, path, kind)
    assert parent.hear() == "they are gone"
    with pytest.raises(SegmentInUse):
        shmdomains.unlink(path=path)
    with DomainList.attach(path=path) as doms:
        assert parent.pid in [one.pid for one in doms.info.attached]
        assert doms.peek(name="a").data is None
        assert parent.ask() == "kept"
    assert parent.ask() == "closed"
    shmdomains.unlink(path=path)


def starts_programs(pipe: Pipe, path: str, kind: str) -> None:
    doms = make(kind, path)
    dom = doms.get(name="a")
    dom.data = "uncommitted"
    command = [sys.executable, "-c", "import os; os.write(1, b'.'); os.read(0, 1)"]
    stdin, gate = os.pipe()
    said, stdout = os.pipe()
    streams = [(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)]
    kept = f"printf . >&{stdout}; read x <&{stdin}"
    for fd in (stdin, stdout):
        os.set_inheritable(fd, True)
    programs = [
        subprocess.Popen(command, stdin=stdin, stdout=stdout, close_fds=False).pid,
        subprocess.Popen(command, stdin=stdin, stdout=stdout).pid,
        os.posix_spawn(sys.executable, command, os.environ, file_actions=streams),
        os.spawnv(os.P_NOWAIT, "/bin/sh", ["sh", "-c", kept]),
    ]
    running = b""
    while len(running) < len(programs):
        running += os.read(said, 1)
    opened = [os.readlink(f"/proc/{pid}/fd/{fd}") for pid in programs for fd in descriptors(pid)]
    inode = os.stat(path).st_ino
    ours = [name for name in opened if "memfd" in name or name == path or f"#{inode} " in name]
    assert ours == []
    pipe.say("started")
    pipe.listen()
    del dom
    doms.close()
    pipe.say("closed")
    pipe.listen()
    os.close(gate)
    os.close(stdin)
    for pid in programs:
        os.waitpid(pid, 0)
    pipe.say("ended")


def descriptors(pid: int | str = "self") -> list[str]:
    return sorted(os.listdir(f"/proc/{pid}/fd"), key=int)


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_that_is_started_has_nothing_of_the_list(
    start: Callable[..., Child], path: str, kind: str
) -> None:
    parent = start(starts_programs, path, kind)
    assert parent.hear() == "started"
    with pytest.raises(SegmentInUse):
        shmdomains.unlink(path=path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert parent.ask() == "closed"
    shmdomains.unlink(path=path)  # though all four still run
    assert parent.ask() == "ended"


# --- the end of a thread --------------------------------------------------------------------------


def end_thread(how: str, doms: DomainList, box: list[Any]) -> None:
    """Take the list and two domains, change them, and end."""
    doms.lock()
    for name in "ab":
        box.append(doms.find_by_name(name))
        box[-1].data = "uncommitted"
    if how == "drops":
        box.clear()
    if how == "raises":
        raise RuntimeError
    if how == "sys.exit":
        sys.exit()
    if how == "in a block":
        with suppress(ShmDomainsError), doms.get(name="c", timeout=0), doms.lock_many([]):
            raise RuntimeError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["returns", "raises", "sys.exit", "drops", "in a block"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_end_of_a_thread_that_holds_the_list_and_domains(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda what: None)
    doms = make(kind)
    box: list[Any] = []
    in_thread(lambda: end_thread(how, doms, box))
    with doms.locked(DEADLINE):
        for name in "ab":
            with doms.find_by_name(name, DEADLINE) as dom:
                died = dom.previous_owner_died
                assert died is None if how == "drops" else died.pid == os.getpid()
                assert dom.data is None
    assert not any(dom.is_locked for dom in box)
    all_free(doms)
    with doms.lock_many(doms.list()):  # and nothing of it is counted as ours
        pass
    doms.close()


# --- blocks that nobody goes on with --------------------------------------------------------------


def block(doms: DomainList) -> Iterator[Domain]:
    with doms.get(name="a") as dom:
        dom.data = "uncommitted"
        yield dom


class Never:
    def __await__(self) -> Iterator[None]:
        yield


async def task(doms: DomainList) -> None:
    with doms.locked(), doms.find_by_name("a") as dom:
        dom.data = "uncommitted"
        await Never()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suspended", [block, task])
@pytest.mark.parametrize("by", ["its own thread", "another thread"])
def test_a_suspended_block_that_is_dropped(
    kind: str, suspended: Callable[[DomainList], Any], by: str
) -> None:
    """Its end runs where it is dropped; there it is the block of another thread, which frees the
    lock itself. Nothing is committed."""
    doms = make(kind)
    box = [suspended(doms)]
    box[0].send(None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        box.clear() if by == "its own thread" else in_thread(box.clear)
        gc.collect()
    assert [one.category for one in said] == [ResourceWarning] * (by == "another thread")
    if doms.is_locked:  # only its own thread can leave it
        doms.unlock()
    with doms.get(name="b", timeout=0):
        pass
    in_thread(lambda: all_free(doms))
    with doms.get(name="a", timeout=0) as dom:
        assert dom.data is None and dom.previous_owner_died is None
    doms.close()


@pytest.mark.parametrize("kind", KINDS)
def test_handles_in_a_cycle_are_collected_by_whoever_collects(kind: str) -> None:
    doms = make(kind)
    knot: list[Any] = [doms.get(name="a")]
    knot.append(knot)
    knot[0].data = "uncommitted"
    del knot
    with pytest.warns(ResourceWarning, match="still locked"):
        in_thread(gc.collect)
    with doms.get(name="b", timeout=0):
        pass
    in_thread(lambda: all_free(doms))
    assert doms.peek(name="a").data is None
    doms.close()


class Mute(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_whose_end_fails_is_left(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit at the end of the block fails, while another exception is on its way or not."""
    doms = DomainList(max_domains=4, max_bytes=3 << 20, lock=kind)
    for name in NAMES:
        doms.define(XML.format(name))
    too_much = "x" * (4 << 20)
    with pytest.raises(SegmentFull), doms.get(name="a") as dom:
        dom.pid, dom.data = 7, too_much
    with pytest.raises(Mute), doms.get(name="b") as dom:
        dom.data = too_much
        raise Mute
    with pytest.raises(SegmentFull), doms.lock_many(doms.list()) as (first, second, third):
        first.pid, second.data, third.pid = 1, too_much, 3
    assert [info.pid for info in doms.list()] == [1, None, 3]
    all_free(doms)
    doms.close()


# --- again and again ------------------------------------------------------------------------------


def attach_and_close(path: str) -> None:
    DomainList.attach(path=path).close()


def attach_and_drop(path: str) -> None:
    DomainList.attach(path=path)


def open_in_a_block(path: str) -> None:
    with DomainList.open(path=path) as doms:
        doms.peek(name="a")


def attach_twice(path: str) -> None:
    with DomainList.attach(path=path) as one, DomainList.attach(path=path) as two:
        one.get(name="a").unlock()
        two.get(name="a").unlock()


def close_before_the_handle(path: str) -> None:
    doms = DomainList.attach(path=path)
    with doms.get(name="a") as dom:
        doms.close()
        dom.pid = 7


def unpickle(path: str) -> None:
    global _pickled
    if not _pickled:
        doms = DomainList.attach(path=path)
        dom = doms.get(name="a")
        dom.unlock()
        _pickled = pickle.dumps((doms, dom))
    doms, dom = pickle.loads(_pickled)
    with dom:
        dom.pid = None


_pickled = b""


def create_and_unlink(path: str) -> None:
    with DomainList.create(path=path + ".new", max_domains=4) as doms:
        doms.define(XML.format("a"))
        doms.unlink()


def create_unnamed(path: str) -> None:
    doms = DomainList(max_domains=4)
    doms.define(XML.format("a"))
    doms.get(name="a").unlock()


def create_with_locks(path: str) -> None:
    with DomainList(max_domains=4, lock="multiprocessing") as doms:
        doms.define(XML.format("a"))
        doms.get(name="a").unlock()


def attach_in_a_thread(path: str) -> None:
    thread = threading.Thread(target=open_in_a_block, args=[path])
    thread.start()
    thread.join()


def fail_to_attach(path: str) -> None:
    for wrong in ("no such file", __file__):
        with suppress(ShmDomainsError):
            DomainList.attach(path=wrong)


def attach_in_a_child(path: str) -> None:
    if not (child := os.fork()):
        open_in_a_block(path)
        os._exit(0)
    os.waitpid(child, 0)


def use_in_a_child(path: str) -> None:
    global _kept_open
    _kept_open = _kept_open or DomainList.attach(path=path)
    if not (child := os.fork()):
        _kept_open.get(name="a").unlock()
        os._exit(0)
    os.waitpid(child, 0)


_kept_open: DomainList | None = None

# How often. To create a list takes milliseconds, and so does a child; in `make soak` there are more
# of them than the table of who is attached has entries.
WAYS: dict[Callable[[str], None], int] = {
    attach_and_close: 10_000 if SOAK else 1_000,
    attach_and_drop: 10_000 if SOAK else 1_000,
    open_in_a_block: 10_000 if SOAK else 1_000,
    attach_twice: 10_000 if SOAK else 1_000,
    close_before_the_handle: 10_000 if SOAK else 1_000,
    unpickle: 10_000 if SOAK else 1_000,
    attach_in_a_thread: 10_000 if SOAK else 1_000,
    fail_to_attach: 10_000 if SOAK else 1_000,
    attach_in_a_child: 4_200 if SOAK else 150,
    use_in_a_child: 4_200 if SOAK else 150,
    create_and_unlink: 2_000 if SOAK else 150,
    create_unnamed: 2_000 if SOAK else 150,
    create_with_locks: 2_000 if SOAK else 150,
}


class Mallinfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h: what is in use is `hblkhd` + `uordblks`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for names in ("arena ordblks smblks hblks hblkhd", "usmblks fsmblks uordblks fordblks keep")
        for name in names.split()
    ]


def belongings() -> dict[str, int]:
    """What a leak would make more of."""
    gc.collect()
    mallinfo = libc.mallinfo2
    mallinfo.restype = Mallinfo
    now = mallinfo()
    return {
        "bytes of malloc": now.hblkhd + now.uordblks,
        "blocks of Python": sys.getallocatedblocks(),
        "descriptors": len(descriptors()),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "threads": len(os.listdir("/proc/self/task")),
    }


def go_round(pipe: Pipe, path: str, way: str, cycles: int) -> None:
    gc.disable()
    once = globals()[way]
    for number in range(100_000):
        sys.intern(f"a string {number}")  # Python's table of them has its final size from now on
    for _ in range(50):
        once(path)
    before = belongings()
    before = belongings()  # the first look has costs of its own
    for _ in range(cycles):
        once(path)
    after = belongings()
    pipe.say({name: after[name] - before[name] for name in before})
    if _kept_open is not None:
        _kept_open.close()
    pipe.say(f"now attached no more, after {way}")
    pipe.listen()


@pytest.mark.soak
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_attached_again_and_again(
    start: Callable[..., Child],
    segment_dir: Path,
    way: Callable[[str], None],
    tried: Callable[[str, int], None],
) -> None:
    """Memory, descriptors and mappings are what they were, but for caches of Python's: its type
    cache keeps some of the names that pickle makes, 40 to 150 of them however often it is asked."""
    cycles = WAYS[way]
    path = str(segment_dir / "s")
    with DomainList.create(path=path, max_domains=10) as doms:
        doms.define(XML.format("a"))
        child = start(go_round, path, way.__name__, cycles)
        more = child.hear(20 * DEADLINE)
        assert doms.check()
        child.hear()
        assert [one.pid for one in doms.info.attached] == [os.getpid()]
    assert more["bytes of malloc"] < 4096 + 8 * cycles, more
    assert more["blocks of Python"] < min(cycles, 250), more
    assert more["descriptors"] == more["threads"] == 0, more
    assert more["mappings"] < 50, more  # those of malloc for threads, eight a processor
    tried("attached and detached again", cycles)


NO_SUCH_PROCESS = 1 << 22 | 0x3FFFF0  # started one tick after the boot


def test_a_table_full_of_the_dead_has_room_for_the_next(path: str) -> None:
    """The entries of the killed stay until somebody needs their place."""
    with DomainList.create(path=path, max_domains=4), Planted(path) as planted:
        table, size = planted.at["attached"], planted.at["attached.max"]
        for place in range(table, table + 8 * size, 8):
            if not planted.read(place):
                planted.write(place, NO_SUCH_PROCESS)
        ours = Process()
        try:
            attach = f"doms = DomainList.attach(path={path!r}); "
            attach += "[one.pid for one in doms.info.attached]"
            assert sorted(ours.party.tell(attach)) == sorted([os.getpid(), ours.party.pid])
            ours.party.tell("doms.close(); del doms")
        finally:
            ours.end()


# --- two lists, and many locks --------------------------------------------------------------------


def hold_both(pipe: Pipe, path: str, lists: list[DomainList]) -> None:
    held = []
    for doms in lists:
        doms.lock()
        held.append(doms.find_by_name("a"))
        held[-1].data = "uncommitted"
        held.append(doms.find_by_name("b"))
    pipe.say("held")
    pipe.rest()


def two_lists(pipe: Pipe, path: str, kinds: list[str]) -> None:
    lists = [make(kind) for kind in kinds]
    holder = fork(hold_both, path, lists)
    assert holder.hear() == "held"
    for doms in lists:
        for take in (
            lambda doms=doms: doms.lock(0),
            lambda doms=doms: doms.get(name="b", timeout=0),
        ):
            with pytest.raises(LockTimeout):
                take()
    holder.kill()
    first, second = lists
    # The order of locks is each list's own.
    with (
        first.locked(DEADLINE),
        first.find_by_name("a", DEADLINE) as one,
        second.locked(DEADLINE),
        second.find_by_name("a", DEADLINE) as other,
    ):
        assert one.previous_owner_died.pid == other.previous_owner_died.pid == holder.pid
        assert one.data is other.data is None
        one.data, other.data = 1, 2
    assert (first.peek(name="a").data, second.peek(name="a").data) == (1, 2)
    for doms in lists:
        all_free(doms)
    first.close()
    with second.get(name="b"):
        pass
    pipe.say("fine")


@pytest.mark.parametrize("kinds", [[a, b] for a in KINDS for b in KINDS], ids="-".join)
def test_two_lists_at_once_and_their_holder_is_killed(
    start: Callable[..., Child], path: str, kinds: list[str]
) -> None:
    assert start(two_lists, path, kinds).hear(2 * DEADLINE) == "fine"


def fill(doms: DomainList, count: int) -> None:
    sample = DomainDef.from_xml(XML.format("x"))
    with doms.locked():
        for number in range(count):
            doms.assign_def(sample.replace(name=f"x{number}"), True).unlock()


def many_locks(pipe: Pipe, kind: str) -> None:
    lists = [DomainList(max_domains=1100, lock=kind), DomainList(max_domains=1100)]
    for doms in lists:
        fill(doms, 1100)
    held = fork(hold_a_thousand, lists)
    assert held.hear() == "TooManyLocks"
    held.kill()
    for doms, count in zip(lists, (600, 400), strict=True):
        with doms.lock_many(doms.list()[:count], DEADLINE) as locked:
            died = [dom.previous_owner_died for dom in locked]
            assert [one and one.pid for one in died] == [held.pid] * count
        assert doms.check()
    pipe.say("fine")


def hold_a_thousand(pipe: Pipe, lists: list[DomainList]) -> None:
    """It is a thread's limit, whichever list they are of."""
    first, second = lists
    with first.locked(), second.locked():
        held = [first.find_by_name(f"x{n}") for n in range(600)]
        held += [second.find_by_name(f"x{n}") for n in range(400)]
        outcomes = set()
        for doms in lists:
            for use in (
                lambda doms=doms: doms.find_by_name("x700", timeout=0),
                lambda doms=doms: doms.get(name="x700", timeout=0),
                lambda doms=doms: doms.assign_def(DomainDef.from_xml(XML.format("new"))),
            ):
                try:
                    use()
                except ShmDomainsError as exc:
                    outcomes.add(type(exc).__name__)
                else:
                    outcomes.add("taken")
    pipe.say(*outcomes)
    pipe.rest()


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_locks_of_two_lists_are_a_threads_limit(
    start: Callable[..., Child], kind: str
) -> None:
    assert start(many_locks, kind).hear(4 * DEADLINE) == "fine"


def free_until_it_waits(pipe: Pipe, doms: DomainList) -> None:
    pipe.say("begins")
    with doms.locked():
        doms.free()
    pipe.say("done")


def lock_in_batches(pipe: Pipe, doms: DomainList) -> None:
    infos = doms.list()
    for begin in range(0, len(infos), 1000):
        many = doms.lock_many(infos[begin : begin + 1000])
        for dom in many:
            dom.data = "uncommitted"
        if begin + 1000 < len(infos):
            for dom in many:
                dom.unlock()
    pipe.say("holds the last")
    pipe.rest()


def three_thousand(pipe: Pipe, kind: str) -> None:
    doms = DomainList(max_domains=3001, lock=kind)
    fill(doms, 3000)
    batches = fork(lock_in_batches, doms)
    assert batches.hear(2 * DEADLINE) == "holds the last"
    batches.kill()
    found = [info.data for info in doms.list()]
    assert found == ["uncommitted"] * 2000 + [None] * 1000  # the first were unlocked in order
    # Somebody holds one in the middle, and who frees them all dies while it waits for it.
    holder = fork(keep, doms, "x1700")
    assert holder.hear() == "held"
    freer = fork(free_until_it_waits, doms)
    assert freer.hear() == "begins"
    until(lambda: len(doms) == 1300, "it came to the one that is held")
    freer.kill()
    assert doms.check(DEADLINE)
    holder.tell()
    assert holder.hear() == "free"
    with doms.locked(DEADLINE):
        assert doms.find_by_name("x1699") is None
        doms.free(DEADLINE)
    assert len(doms) == 0 and doms.info.heap_used == 0
    report = doms.check()
    assert report, report.problems
    pipe.say("fine")


@pytest.mark.parametrize("kind", KINDS)
def test_three_thousand_are_locked_and_freed_in_batches_by_who_is_killed(
    start: Callable[..., Child], kind: str
) -> None:
    assert start(three_thousand, kind).hear(6 * DEADLINE) == "fine"


# --- what an ended thread held --------------------------------------------------------------------


def keep_handle(doms: DomainList, box: list[Any]) -> None:
    box.append(doms.get(name="a"))


def keep_list(doms: DomainList, box: list[Any]) -> None:
    doms.lock()


def lose_handle(doms: DomainList, box: list[Any]) -> None:
    """Another thread drops it, and this one ends without another call."""
    box.append(doms.get(name="a"))
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hold", [keep_handle, keep_list, lose_handle])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_thread_that_ended_holding_does_not_keep_the_segment_in_use(
    segment_dir: Path, kind: str, hold: Callable[[DomainList, list[Any]], None]
) -> None:
    path = segment_dir / "s"
    doms = make(kind, str(path))
    box: list[Any] = []
    ended: list[int] = []

    def live(doms: DomainList) -> None:
        hold(doms, box)
        ended.append(threading.get_native_id())

    thread = threading.Thread(target=live, args=[doms])
    thread.start()
    thread.join(DEADLINE)
    until(lambda: str(ended[0]) not in os.listdir("/proc/self/task"), "the thread is gone")
    doms.close()
    box.clear()
    del doms
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
    shmdomains.unlink(path=path)


def test_a_segment_kept_for_a_thread_goes_with_the_next_attach(segment_dir: Path) -> None:
    doms, end = make("robust", str(segment_dir / "s")), threading.Event()
    taken = threading.Event()
    box = [doms]

    def live() -> None:
        box[0].lock()
        taken.set()
        end.wait(DEADLINE)

    thread = threading.Thread(target=live)
    thread.start()
    assert taken.wait(DEADLINE)
    box.clear()
    del doms
    gc.collect()
    with pytest.raises(SegmentInUse):
        shmdomains.unlink(path=segment_dir / "s")
    end.set()
    thread.join()
    until(lambda: str(thread.native_id) not in os.listdir("/proc/self/task"), "the thread is gone")
    DomainList(max_domains=1).close()
    shmdomains.unlink(path=segment_dir / "s")


def test_a_python_that_was_made_to_run_without_its_lock_is_refused() -> None:
    code = "import sys; sys._is_gil_enabled = lambda: {}; import shmdomains"
    for enabled in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", code.format(enabled)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert (done.returncode == 0) == enabled, done.stderr
        assert enabled or "ImportError: shmdomains needs the global interpreter" in done.stderr


# --- handles that die and come back ---------------------------------------------------------------


def spares_of(doms: DomainList, count: int = 140) -> None:
    """As many dead handles wait for the next look-up as are ever kept."""
    dom = unlocked(doms)
    handles = [pickle.loads(pickle.dumps(dom)) for _ in range(count)]
    del dom, handles


class Plain(Domain):
    __slots__ = ()


class Sized(Domain):
    __slots__ = ("more",)
    more: Any


class Open(Domain):
    more: Any  # it has a __dict__


ended: list[str] = []
saved: list[Domain] = []


class Ending(Domain):
    __slots__ = ()

    def __del__(self) -> None:
        ended.append("Ending")


class Returning(Domain):
    __slots__ = ()

    def __del__(self) -> None:
        saved.append(self)


CLASSES = [Domain, Plain, Sized, Open, Ending, Returning]


def references(doms: DomainList) -> list[int]:
    spares_of(doms)
    gc.collect()
    return [sys.getrefcount(kind) for kind in CLASSES]


def unlocked(doms: DomainList) -> Domain:
    dom = doms.get(name="a", timeout=0)
    dom.unlock()
    return dom


def test_each_handle_has_one_reference_to_its_class() -> None:
    doms = filled("a")
    before = references(doms)
    for _ in range(2000):
        unlocked(doms)
    assert references(doms) == before
    for _ in range(50):
        for kind in CLASSES[1:]:
            made = kind.__new__(kind)
            if isinstance(made, Sized | Open):
                made.more = [made, unlocked(doms)]
            weak = weakref.ref(made)
            del made
            saved.clear()
        gc.collect()
        assert weak() is None
    del kind
    assert len(ended) == 50
    ended.clear()
    assert references(doms) == before


def test_a_handle_that_is_given_another_class_dies_as_one_of_that() -> None:
    doms = filled("a")
    before = references(doms)
    for _ in range(50):
        for pid, kind in enumerate((Plain, Ending, Returning), 3):
            dom = unlocked(doms)
            dom.__class__ = kind
            with dom:
                dom.pid = pid
            del dom
        back = saved.pop()
        assert type(back) is Returning and gc.is_tracked(back) and not back.is_locked
        back.__class__ = Domain
        with back:
            assert back.pid == 5
        del back
    del kind
    assert len(ended) == 50 and not saved
    ended.clear()
    assert references(doms) == before
    assert doms.peek(name="a").pid == 5


def keep_it(dom: Domain) -> None:
    saved.append(dom)


def change_it(dom: Domain) -> None:
    dom.__class__ = Plain


def look_up_again(dom: Domain) -> None:
    if not ended:  # it runs for that handle, too
        ended.append("looks")
        unlocked(dom._doms)
        ended.clear()


@pytest.mark.parametrize(
    "finalizer", [keep_it, change_it, look_up_again], ids=lambda one: one.__name__
)
def test_a_finalizer_that_is_given_to_domains_for_a_while(
    finalizer: Callable[[Domain], None],
) -> None:
    doms = filled("a")
    before = references(doms)
    for _ in range(50):
        dom = unlocked(doms)
        Domain.__del__ = finalizer  # type: ignore[attr-defined]
        try:
            del dom
        finally:
            del Domain.__del__  # type: ignore[attr-defined]
        assert finalizer is not keep_it or len(saved) == 1
        while saved:
            assert gc.is_tracked(saved[0])
            with saved.pop() as dom:
                assert dom.name == "a"
            del dom
    assert references(doms) == before


def test_an_error_is_the_same_after_a_list_went_with_its_last_handle() -> None:
    """Python code runs in the middle of it: a finalizer, and a callback, of the list."""

    class Ended(DomainList):
        def __del__(self) -> None:
            with suppress(KeyError):
                raise KeyError("of the list")
            heard.extend([unlocked(doms).uuid])

    doms = filled("a")
    heard: list[Any] = []
    for _ in range(20):
        goes = Ended(max_domains=2)
        goes.define(XML.format("a"))
        handles = [unlocked(goes)]
        weak = weakref.ref(goes, lambda _: heard.append(unlocked(doms)))
        del goes
        with pytest.raises(ValueError, match="of the call") as raised:
            try:
                raise ValueError("of the block")
            except ValueError:
                print(handles.pop(), exec("raise ValueError('of the call')"))
        assert str(raised.value.__context__) == "of the block"
        assert weak() is None and len(heard) == 2
        heard.clear()


def test_a_handle_takes_its_list_and_the_handles_that_it_kept_along() -> None:
    """More than are kept for the next look-ups die in the middle of the death of one."""

    class Keeping(DomainList):
        kept: list[Domain]

    doms = filled("a")
    before = references(doms)
    for _ in range(20):
        goes = Keeping(max_domains=2)
        goes.define(XML.format("a"))
        goes.kept = [unlocked(doms) for _ in range(140)]
        dom, weak = unlocked(goes), weakref.ref(goes)
        del goes
        assert weak() is not None
        del dom
        assert weak() is None
        handles = [unlocked(doms) for _ in range(140)]
        assert len({id(dom) for dom in handles}) == 140
        del handles
    assert references(doms) == before


def test_a_handle_keeps_nothing_of_a_hold_that_ended_with_its_thread() -> None:
    gone: list[str] = []

    class Known(DomainDef):
        def __del__(self) -> None:
            gone.append(self.name)

    doms = filled("a")
    sample = doms.peek(name="a").definition
    kept: list[Domain] = []

    def hold() -> None:
        dom = doms.get(name="a", timeout=0)
        fields = {name: getattr(sample, name) for name in sample.__struct_fields__}
        dom.definition = Known(**fields)
        kept.append(dom)

    spares_of(doms)
    thread = threading.Thread(target=hold)
    thread.start()
    thread.join(DEADLINE)
    until(lambda: str(thread.native_id) not in os.listdir("/proc/self/task"), "the thread is gone")
    dom = kept.pop()
    with dom:
        assert not dom.changed and dom.definition == sample
    del dom
    assert gone == ["a"]


def test_a_handle_that_is_being_made_leads_nowhere() -> None:
    """While its domain is waited for, the collector's lists show it to everybody."""
    doms = filled("a", "b")
    held, done = threading.Event(), threading.Event()
    outcomes: list[object] = []

    def hold() -> None:
        with doms.get(name="a"):
            held.set()
            done.wait(DEADLINE)

    def look(*_: object) -> None:
        for one in gc.get_objects():
            if type(one) is Domain and one._doms is doms and one._receipt == (0, 0):
                with suppress(ShmDomainsError):
                    outcomes.append(one._key[:2])
                    outcomes.append(one.try_lock())
                done.set()

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(DEADLINE)
    gc.collect()
    for _ in range(3):
        doms.get(name="b").unlock()
    before = signal.signal(signal.SIGALRM, look)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.03, 0.03)
        with doms.get(name="a", timeout=DEADLINE) as dom:
            assert dom.name == "a"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        done.set()
        holder.join(DEADLINE)
    assert outcomes and set(outcomes) == {(0, 0)}
    doms.get(name="b", timeout=0).unlock()


def test_what_the_collector_calls_may_look_up_while_a_handle_is_made() -> None:
    doms = filled("a", "b")
    handles: list[Domain] = []
    calls = 0

    def look(phase: str, info: dict[str, int]) -> None:
        nonlocal calls
        calls += 1
        with suppress(ShmDomainsError):  # what it interrupted may hold a domain
            unlocked(doms)
            weakref.WeakSet([unlocked(doms), unlocked(doms)])

    thresholds = gc.get_threshold()
    gc.callbacks.append(look)
    gc.set_threshold(1)
    try:
        for _ in range(500):
            with doms.get(name="b", timeout=0) as dom:
                assert dom.name == "b"
            handles = [*handles[-30:], dom]
            assert len({id(one) for one in handles}) == len(handles)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(look)
    assert calls > 0 and all(gc.is_tracked(one) for one in handles)


def test_a_definition_that_goes_with_a_rollback_may_change_the_domain() -> None:
    last: list[Callable[[], None]] = []

    class Ends(DomainDef):
        def __del__(self) -> None:
            if last:
                last.pop()()

    doms = filled("a")
    sample = doms.peek(name="a").definition
    with doms.get(name="a") as dom:
        dom.definition = Ends(**{name: getattr(sample, name) for name in sample.__struct_fields__})
        last.append(lambda: setattr(dom, "data", "new"))
        dom.rollback()
        assert not last and dom.data == "new"
    assert doms.peek(name="a").data == "new"


def test_a_class_of_ones_own_for_all_handles() -> None:
    code = """
import sys, weakref
from shmdomains import Domain, DomainList
from shmdomains.memory import domain_list

class Mine(Domain):
    __slots__ = ()

domain_list.Domain = Mine
doms = DomainList(max_domains=2)
doms.define(sys.argv[1])
before = sys.getrefcount(Mine)
for _ in range(100):
    with doms.get(name="a") as dom:
        assert type(dom) is Mine
    weak = weakref.ref(dom)  # such a one dies as Python does it
    del dom
    assert weak() is None
print(sys.getrefcount(Mine) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, XML.format("a")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
