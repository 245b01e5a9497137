"""Lists that are closed, dropped or shared while somebody is in the middle of something."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import environment
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
    "os.abort": ("take(); os.abort()", -signal.SIGABRT, None, None, ".*"),
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
