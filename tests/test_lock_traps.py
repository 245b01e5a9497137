"""What bites with robust, process-shared locks (section 4 of the design): each trap has its test.

Others hold, wait, are killed, stopped, forked and interrupted in processes of their own; every wait
has a deadline, so what would hang fails. The traps, in this order: dangling pending entry, PID
namespace, mapping, ENOTRECOVERABLE, the end of a thread and exec, fork, ownership, too many locks,
flipped bits; then Ctrl-C and signal handlers. The first of the design's, the lost wake-up, has
test_storms.py.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from killing import (
    DEADLINE,
    OWNER_DIED,
    WAITERS,
    Child,
    Pipe,
    Planted,
    fork,
    hold,
    hold_mutex,
    libc,
    list_op_pending,
    soon,
    until,
    xml,
)

from shmdomains import (
    AlreadyLocked,
    Domain,
    DomainDef,
    DomainList,
    DomainLocked,
    DomainNotLocked,
    DomainRemoved,
    ListClosed,
    ListNotLocked,
    LockOrder,
    LockTimeout,
    NotOwner,
    SegmentCorrupt,
    SegmentMismatch,
    SegmentPoisoned,
    TooManyLocks,
)

NAMES = ["a", "b", "c"]
NO_SUCH_TID = 0x3FFFFFF0  # above every pid_max

LARGE = "x" * 200  # data that lies in the heap


@pytest.fixture
def doms(path: str) -> Iterator[DomainList]:
    with DomainList.create(path=path, max_domains=3000) as doms:
        for name in NAMES:
            doms.define(xml(name))
        yield doms


def mutex_of(planted: Planted, which: str) -> int:
    """The place of a mutex: ``list``, ``id``, ``heap``, or a domain by name."""
    if which in NAMES:
        return planted.slot(NAMES.index(which), "mutex")
    return planted.header(f"{which}_mutex")


def usable(doms: DomainList) -> None:
    """Every lock can be had by this thread, nothing is wrong, and nothing is held in the end."""
    with doms.locked(timeout=DEADLINE):
        for name in NAMES:
            doms.find_by_name(name, timeout=DEADLINE).unlock()
    report = doms.check()
    assert report, report.problems


def in_thread(function: Callable[[], object]) -> object:
    """Run it in a thread that ends; what it raises is raised here."""
    outcome: list[object] = []

    def body() -> None:
        try:
            outcome.append(function())
        except BaseException as exc:
            outcome.append(exc)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(2 * DEADLINE)
    assert not thread.is_alive(), "the thread hangs"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def can_take(pipe: Pipe, path: str, name: str) -> None:
    """A child that says who holds the domain: None if it could lock it."""
    try:
        DomainList.attach(path=path).get(name=name, timeout=0).unlock()
    except LockTimeout as exc:
        pipe.say((exc.holder and exc.holder.pid, exc.holder and exc.holder.alive))
    else:
        pipe.say(None)


# --- 2. the dangling list_op_pending --------------------------------------------------------------


def time_out_domain(doms: DomainList, timeout: float) -> None:
    doms.get(name="a", timeout=timeout)


def time_out_list(doms: DomainList, timeout: float) -> None:
    doms.lock(timeout)


@pytest.mark.parametrize("timeout", [0, 0.01, 0.12])
@pytest.mark.parametrize(
    ("held", "wait"), [("a", time_out_domain), ("list", time_out_list)], ids=["domain", "list"]
)
def test_a_wait_that_timed_out_leaves_no_pending_entry(
    start: Callable[..., Child],
    doms: DomainList,
    path: str,
    held: str,
    wait: Callable[[DomainList, float], None],
    timeout: float,
) -> None:
    holder = start(hold, path, held)
    pid = holder.hear()

    def try_it() -> None:
        with pytest.raises(LockTimeout) as failed:
            wait(doms, timeout)
        assert list_op_pending() is None
        assert failed.value.holder.pid == pid
        assert failed.value.holder.alive

    try_it()
    in_thread(try_it)
    assert holder.ask() == "free"
    usable(doms)


@pytest.mark.parametrize("which", ["id", "heap"])
def test_a_commit_that_timed_out_leaves_no_pending_entry(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str, which: str
) -> None:
    with doms.get(name="a") as dom:
        dom.activate()
        dom.data = LARGE
        holder = start(hold_mutex, path, mutex_of(planted, which))
        assert holder.hear() == 0
        with soon("the time-out", 3), pytest.raises(LockTimeout):
            dom.commit(timeout=0.12)
        assert list_op_pending() is None
        assert not dom.changed
        assert not dom.is_active
        assert holder.ask() == 0
        dom.data = "y"
        dom.commit(timeout=DEADLINE)
    assert doms.peek(name="a").data == "y"
    usable(doms)


def wait_after_fork(pipe: Pipe, path: str) -> None:
    """The mutex that clears the pending entry is the thread's: it must be made anew in a child."""
    doms = DomainList.attach(path=path)
    for _ in range(2):
        with suppress(LockTimeout):
            doms.get(name="a", timeout=0.01)
    child = fork(wait_in_child, doms)
    pipe.say(child.hear())


def wait_in_child(pipe: Pipe, doms: DomainList) -> None:
    with suppress(LockTimeout):
        doms.get(name="a", timeout=0.01)
    pipe.say(list_op_pending())


def test_a_wait_that_timed_out_after_fork_leaves_no_pending_entry(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    holder = start(hold, path, "a")
    holder.hear()
    assert start(wait_after_fork, path).hear() is None


# --- 3. PID namespaces ----------------------------------------------------------------------------

ATTACH = """
import sys, shmdomains
try:
    shmdomains.DomainList.attach(path=sys.argv[1])
except shmdomains.SegmentMismatch as exc:
    print("refused:", exc)
else:
    print("attached")
"""


def unshare(*options: str) -> list[str] | None:
    """A command that runs another in a new PID namespace, if that is permitted here."""
    if shutil.which("unshare") is None:
        return None
    for more in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *more, "--pid", "--fork", *options]
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return None


@pytest.mark.parametrize("options", [[], ["--mount-proc"]], ids=["host-proc", "own-proc"])
def test_another_pid_namespace_is_refused(doms: DomainList, path: str, options: list[str]) -> None:
    command = unshare(*options)
    if command is None:
        pytest.skip("no new PID namespaces here")
    done = subprocess.run(
        [*command, sys.executable, "-c", ATTACH, path],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "refused:" in done.stdout, done.stdout + done.stderr
    assert "PID namespace" in done.stdout
    assert path in done.stdout
    usable(doms)


def fork_into_namespace(pipe: Pipe, path: str) -> None:
    doms = DomainList.attach(path=path)
    handle = doms.get(name="a")
    handle.unlock()
    if libc.unshare(0x20000000):  # CLONE_NEWPID: for children
        pipe.say("not permitted")
        return
    pipe.say(fork(use_in_namespace, doms, handle).hear())


def use_in_namespace(pipe: Pipe, doms: DomainList, handle: Domain) -> None:
    uses = {
        "get": lambda: doms.get(name="b", timeout=0),
        "lock the list": lambda: doms.lock(timeout=0),
        "lock a handle": lambda: handle.lock(timeout=0),
    }
    outcome = {}
    for name, use in uses.items():
        try:
            use()
        except SegmentMismatch as exc:
            outcome[name] = str(exc)
        else:
            outcome[name] = "done"
    pipe.say(outcome)


def test_a_child_forked_into_another_pid_namespace_is_refused(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    """It has the mapping from its parent; the number of its thread means another thread to us."""
    outcome = start(fork_into_namespace, path).hear()
    if outcome == "not permitted":
        pytest.skip("no new PID namespaces here")
    for use, what in outcome.items():
        assert "PID namespace" in what, f"{use}: {what}"
    usable(doms)


# --- 4. mapped once, unmapped late ----------------------------------------------------------------


def mappings(path: str) -> int:
    """How often this process has the file mapped; it was created without a name, so by number."""
    gc.collect()
    inode = str(os.stat(path).st_ino)
    with open("/proc/self/maps") as maps:
        return sum(line.split()[4] == inode for line in maps)


def test_a_process_maps_a_segment_once(doms: DomainList, path: str) -> None:
    others = [DomainList.attach(path=path) for _ in range(3)]
    assert mappings(path) == 1
    with doms.get(name="a") as dom:
        for other in others:
            with pytest.raises(AlreadyLocked):
                other.get(name="a", timeout=0)
        dom.data = 1
    others[0].lock()
    assert doms.is_locked
    doms.unlock()
    for other in others:
        other.close()
    others.clear()
    del other
    assert mappings(path) == 1
    usable(doms)


def test_the_last_user_unmaps(path: str) -> None:
    doms = DomainList.create(path=path)
    doms.define(xml("a"))
    handle = doms.get(name="a")
    handle.unlock()
    doms.close()
    del doms
    assert mappings(path) == 1, "a handle refers to it"
    del handle
    assert mappings(path) == 0


def test_a_locked_handle_outlives_close(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    dom = DomainList.attach(path=path).get(name="a")
    other = DomainList.attach(path=path)
    held = other.get(name="b", timeout=0)
    other.close()
    with pytest.raises(ListClosed):
        other.get(name="c")
    doms.close()
    dom.data, held.data = 1, 2
    dom.unlock()
    held.unlock()
    with pytest.raises(ListClosed):
        held.lock(timeout=0)
    assert start(can_take, path, "b").hear() is None
    again = DomainList.attach(path=path)
    assert (again.peek(name="a").data, again.peek(name="b").data) == (1, 2)


def test_close_releases_the_list_lock(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    other = DomainList.attach(path=path)
    other.lock()
    other.close()
    holder = start(hold, path, "list")
    holder.hear()
    assert holder.ask() == "free"


def test_a_list_dropped_with_its_lock_held_lets_go_of_it(path: str) -> None:
    doms = DomainList.create(path=path)
    doms.lock()
    with pytest.warns(ResourceWarning, match="held its lock"):
        del doms
    assert mappings(path) == 0
    again = DomainList.attach(path=path)
    assert not again.is_locked
    again.lock(timeout=0)
    again.unlock()


def test_a_list_dropped_by_another_thread_than_its_locks_stays_mapped(path: str) -> None:
    box = [DomainList.create(path=path)]
    box[0].lock()
    in_thread(box.clear)
    assert mappings(path) == 1, "the kernel looks at a held mutex when its thread dies"
    again = DomainList.attach(path=path)
    assert again.is_locked
    again.unlock()


@contextmanager
def another_robust_mutex() -> Iterator[None]:
    """This thread holds one that is not of ours, so it alone may change the list of what it has."""
    mutex, robust = (ctypes.c_uint64 * 8)(), (ctypes.c_uint64 * 8)()
    libc.pthread_mutexattr_init(robust)
    libc.pthread_mutexattr_setrobust(robust, 1)
    assert not libc.pthread_mutex_init(mutex, robust) and not libc.pthread_mutex_lock(mutex)
    yield
    assert not libc.pthread_mutex_unlock(mutex)


def test_a_handle_dropped_by_another_thread_that_its_own_has_to_free(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    """Until it does, or ends, the segment has to stay mapped."""
    box: list[Domain] = []
    dropped, more = threading.Event(), threading.Event()
    outcome: list[object] = []

    def owner() -> None:
        with another_robust_mutex():
            use()

    def use() -> None:
        other = DomainList.attach(path=path)
        box.append(other.get(name="a"))
        del other
        more.set()
        assert dropped.wait(DEADLINE)
        mine = DomainList.attach(path=path)
        mine.get(name="b", timeout=DEADLINE).unlock()
        outcome.append("unlocked")

    thread = threading.Thread(target=owner)
    thread.start()
    assert more.wait(DEADLINE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        box.clear()
        gc.collect()
    assert [one.category for one in said] == [ResourceWarning]
    assert start(can_take, path, "a").hear() == (os.getpid(), True)
    dropped.set()
    thread.join(DEADLINE)
    assert outcome == ["unlocked"]
    assert start(can_take, path, "a").hear() is None
    usable(doms)


def test_the_end_of_a_thread_frees_what_another_dropped(
    start: Callable[..., Child], path: str
) -> None:
    DomainList.create(path=path).define(xml("a"))
    box: list[Domain] = []
    taken, end = threading.Event(), threading.Event()

    def owner() -> None:
        with another_robust_mutex():
            box.append(DomainList.attach(path=path).get(name="a"))
            taken.set()
            end.wait(DEADLINE)

    thread = threading.Thread(target=owner)
    thread.start()
    assert taken.wait(DEADLINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        box.clear()
    assert mappings(path) == 1, "its thread lives and holds it"
    end.set()
    thread.join(DEADLINE)
    child = start(hold, path, "a")
    child.hear()
    assert child.ask() == "free"


# --- 5. never ENOTRECOVERABLE ---------------------------------------------------------------------


def use_list(doms: DomainList, dom: Domain | None) -> None:
    doms.lock(timeout=DEADLINE)


def use_heap(doms: DomainList, dom: Domain | None) -> None:
    if dom is None:
        dom = doms.get(name="a", timeout=DEADLINE)
    dom.data = LARGE
    dom.commit(timeout=DEADLINE)


def use_ids(doms: DomainList, dom: Domain | None) -> None:
    if dom is None:
        dom = doms.get(name="a", timeout=DEADLINE)
    dom._take_id(DEADLINE)


def poison_outcomes(pipe: Pipe, path: str, use: str) -> None:
    doms = DomainList.attach(path=path)
    outcome = []
    for _ in range(2):
        try:
            globals()[use](doms, None)
        except Exception as exc:
            outcome.append(type(exc).__name__)
        else:
            outcome.append("done")
    pipe.say(outcome)


@pytest.mark.parametrize(
    ("held", "use", "damage"),
    [
        ("list", use_list, lambda at: at.write(at.header("list_level"), 40)),
        ("list", use_list, lambda at: at.write(at.header("list_level") + 8, 1 << 60)),
        ("list", use_list, lambda at: at.write(at.name(2, 0), 0, 1)),
        ("id", use_ids, lambda at: at.write(at.header("id_level"), 40)),
        ("heap", use_heap, lambda at: at.write(at.slot(1, "extent") + 16, 1 << 62 | 64)),
        ("heap", use_heap, lambda at: at.write(at.slot(2, "extent") + 24, 64 << 25)),
    ],
    ids=["uuid-level", "name-level", "empty-name", "id-level", "extent-far", "extent-empty"],
)
def test_a_repair_that_fails_poisons_and_never_wedges(
    start: Callable[..., Child],
    doms: DomainList,
    planted: Planted,
    path: str,
    held: str,
    use: Callable[..., None],
    damage: Callable[[Planted], None],
) -> None:
    with doms.get(name="b") as keep:
        keep.data = "kept"
    handle = doms.get(name="b")
    handle.unlock()
    before = [info.definition for info in doms.snapshot()]
    # The first name buffer is the one that counts in a new slot; say so if that ever changes.
    assert planted.read(planted.name(2, 0), 1) == 1
    child = (
        start(hold, path, "list")
        if held == "list"
        else start(hold_mutex, path, mutex_of(planted, held))
    )
    child.hear()
    dom = None if held == "list" else doms.get(name="a")
    damage(planted)
    child.kill()
    # Neither wedged nor mended for the next one, be it one that was at work already.
    for _ in range(3):
        with soon("the failing repair", 2), pytest.raises(SegmentPoisoned):
            use(doms, dom)
    if dom is not None:
        assert not dom.changed
        dom.unlock()
    for _ in range(2):
        with pytest.raises(SegmentPoisoned):
            use(doms, None)
        with pytest.raises(SegmentPoisoned):
            doms.lock(timeout=1)
        with pytest.raises(SegmentPoisoned):
            handle.lock(timeout=1)
    assert start(poison_outcomes, path, use.__name__).hear() == ["SegmentPoisoned"] * 2
    assert not doms.is_locked
    # It can be read out, by those who come later too.
    for reader in (doms, DomainList.attach(path=path)):
        infos = reader.snapshot()
        assert [info.definition for info in infos] == before
        assert infos[1].data == "kept"


def test_poison_while_a_domain_is_held_lets_its_holder_go(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    holder = start(hold, path, "list")
    holder.hear()
    dom = doms.get(name="a")
    dom.data = 1
    dom.commit()
    planted.write(planted.header("list_level"), 40)
    holder.kill()
    with pytest.raises(SegmentPoisoned):
        in_thread(lambda: doms.lock(timeout=DEADLINE))
    dom.unlock()
    assert not dom.is_locked
    assert {info.name: info.data for info in doms.snapshot()}["a"] == 1


# --- 6. the end of a thread, exec -----------------------------------------------------------------


def test_a_thread_that_ends_while_holding_a_domain(doms: DomainList) -> None:
    kept: list[Domain] = []

    def take() -> int:
        dom = doms.get(name="a")
        kept.append(dom)
        dom.data = "uncommitted"
        return threading.get_native_id()

    tid = in_thread(take)
    with soon("the hand-over"):
        dom = doms.get(name="a", timeout=DEADLINE)
    died = dom.previous_owner_died
    assert (died.pid, died.tid, died.alive) == (os.getpid(), tid, False)
    assert dom.data is None
    with pytest.raises(AlreadyLocked):
        kept[0].lock(timeout=0)
    dom.unlock()
    assert not kept[0].is_locked
    with kept[0] as dom:
        assert dom.previous_owner_died is None
    kept.clear()
    usable(doms)


def test_a_thread_that_ends_while_holding_the_list(doms: DomainList) -> None:
    in_thread(doms.lock)
    assert not doms.is_locked
    with pytest.raises(ListNotLocked):
        doms.find_by_name("a")
    with soon("the hand-over"):
        doms.lock(timeout=DEADLINE)
    doms.unlock()
    usable(doms)


def exec_while_holding(pipe: Pipe, path: str, held: list[str], in_a_thread: bool) -> None:
    ours, theirs = os.pipe()
    os.set_inheritable(ours, True)
    os.set_inheritable(pipe.conn.fileno(), True)
    command = [sys.executable, "-c", f"import os; os.read({ours}, 1)"]

    def replace() -> None:
        doms = DomainList.attach(path=path)
        kept = []
        for name in held:
            if name == "list":
                doms.lock()
            else:
                kept.append(doms.get(name=name, timeout=0))
                kept[-1].data = "uncommitted"
        os.set_inheritable(theirs, True)  # so that the new program waits until it is killed
        pipe.say(os.getpid())
        os.execv(command[0], command)

    if in_a_thread:
        thread = threading.Thread(target=replace)
        thread.start()
        thread.join()
    replace()


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        # While a thread that is not the leader takes the process's number over there is no such
        # entry for a moment, or one to be opened and not read; a process that is really gone never
        # becomes another.
        return b""


@pytest.mark.parametrize("in_a_thread", [False, True], ids=["main-thread", "other-thread"])
@pytest.mark.parametrize("held", [["list"], ["a"], ["list", "a", "b"]], ids="+".join)
def test_exec_while_holding(
    start: Callable[..., Child],
    doms: DomainList,
    path: str,
    held: list[str],
    in_a_thread: bool,
) -> None:
    """The process lives on under its number, and holds nothing."""
    child = start(exec_while_holding, path, held, in_a_thread)
    pid = child.hear()
    until(lambda: b"os.read" in command_line(pid), "it became another")
    with soon("the hand-over"), doms.locked(timeout=DEADLINE):
        for name in held:
            if name != "list":
                dom = doms.find_by_name(name, timeout=DEADLINE)
                assert dom.previous_owner_died.pid == pid
                assert dom.data is None
                dom.unlock()
    assert child.is_alive()
    usable(doms)


# --- 7. fork --------------------------------------------------------------------------------------


def expect(error: type[Exception], use: Callable[[], object]) -> None:
    try:
        use()
    except error as exc:
        assert type(exc) is error, repr(exc)
        return
    raise AssertionError(f"{error.__name__} was not raised")


def foreign(doms: DomainList, dom: Domain) -> None:
    """In a child: what the parent holds is not ours."""
    assert not dom.is_locked
    expect(DomainNotLocked, lambda: dom.name)
    expect(DomainNotLocked, lambda: dom.data)
    expect(DomainNotLocked, lambda: setattr(dom, "data", 1))
    expect(DomainNotLocked, dom.commit)
    expect(DomainNotLocked, dom.rollback)
    expect(DomainNotLocked, dom.unlock)
    expect(DomainNotLocked, dom.release)
    assert not dom.try_lock()
    expect(LockTimeout, lambda: dom.lock(timeout=0.06))
    expect(LockTimeout, lambda: doms.get(name="a", timeout=0))
    assert "locked" not in repr(dom)


def foreign_list(doms: DomainList) -> None:
    assert not doms.is_locked
    expect(ListNotLocked, lambda: doms.find_by_name("b"))
    expect(ListNotLocked, doms.unlock)
    expect(ListNotLocked, doms.release)
    expect(LockTimeout, lambda: doms.lock(timeout=0.06))


def child_that_looks(pipe: Pipe, doms: DomainList, box: list[Domain]) -> None:
    if not box:
        foreign_list(doms)
    for dom in box:
        foreign(doms, dom)
    with doms.get(name="c", timeout=DEADLINE) as own:  # nothing of its parent's weighs on it
        own.data = "child"
    pipe.say("fine")


def child_that_drops(pipe: Pipe, doms: DomainList, box: list[Domain]) -> None:
    """The first thing that it does is to forget the handle."""
    box.clear()
    gc.collect()
    with suppress(LockTimeout):
        doms.get(name="a", timeout=0).unlock()
    with doms.get(name="c", timeout=DEADLINE):
        pass
    pipe.say("fine")


def child_that_closes(pipe: Pipe, doms: DomainList, box: list[Domain]) -> None:
    doms.close()
    box.clear()
    del doms
    gc.collect()
    pipe.say("fine")


def child_that_dies(pipe: Pipe, doms: DomainList, box: list[Domain]) -> None:
    with suppress(LockTimeout):
        doms.get(name="a", timeout=0.06)
    pipe.say("fine")
    os.kill(os.getpid(), signal.SIGKILL)


CHILDREN = [child_that_looks, child_that_drops, child_that_closes, child_that_dies]


def fork_while_holding(
    pipe: Pipe, path: str | None, kind: str, what: str, where: str, child: str
) -> None:
    """Hold a domain or the list, in this thread or in another one, fork, and see what is left."""
    doms = (
        DomainList(max_domains=10, lock="multiprocessing")
        if path is None
        else DomainList.attach(path=path)
    )
    if path is None:
        for name in NAMES:
            doms.define(xml(name))
    box: list[Domain] = []
    release, taken = threading.Event(), threading.Event()

    def take() -> None:
        if what == "list":
            doms.lock()
        else:
            box.append(doms.get(name="a"))
            box[0].data = "parent"
        taken.set()

    def let_go() -> None:
        if what == "list":
            doms.unlock()
        else:
            box[0].unlock()

    def stay() -> None:
        take()
        release.wait(2 * DEADLINE)
        let_go()

    thread = threading.Thread(target=stay)
    if where == "here":
        take()
    else:
        thread.start()
        assert taken.wait(DEADLINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of threads; that is what is tested
        born = fork(globals()[child], doms, box)
    assert born.hear() == "fine"
    born.join()
    # The parent has what it had.
    if what == "list":
        assert doms.is_locked == (where == "here")
    else:
        assert box[0].is_locked == (where == "here")
    looker = fork(who_holds, doms, "list" if what == "list" else "a")
    assert looker.hear() == os.getpid(), "the lock was freed, or nobody knows whose it is"
    looker.join()
    if where == "here":
        let_go()
    else:
        release.set()
        thread.join(DEADLINE)
    if what != "list":
        assert doms.peek(name="a").data == "parent"
        with doms.get(name="a", timeout=DEADLINE) as dom:
            assert dom.previous_owner_died is None
    usable(doms)
    pipe.say("fine")


def who_holds(pipe: Pipe, doms: DomainList, what: str) -> None:
    """Of the list or of a domain."""
    try:
        if what == "list":
            doms.lock(timeout=0)
        else:
            doms.get(name=what, timeout=0)
    except LockTimeout as exc:
        pipe.say(exc.holder and exc.holder.pid)
    else:
        pipe.say("nobody")


@pytest.mark.parametrize("kind", ["robust", "multiprocessing"])
@pytest.mark.parametrize("where", ["here", "in another thread"])
@pytest.mark.parametrize("what", ["domain", "list"])
@pytest.mark.parametrize("child", CHILDREN, ids=lambda child: child.__name__)
def test_fork_while_holding(
    start: Callable[..., Child],
    doms: DomainList,
    path: str,
    kind: str,
    what: str,
    where: str,
    child: Callable[..., None],
) -> None:
    """The child owns nothing of its parent's, and takes nothing from it, whatever it does."""
    home = path if kind == "robust" else None
    child_of_it = start(fork_while_holding, home, kind, what, where, child.__name__)
    assert child_of_it.hear(3 * DEADLINE) == "fine"
    usable(doms)


def fork_at_the_limit(pipe: Pipe, path: str) -> None:
    doms = DomainList.attach(path=path)
    held: list[Domain] = []
    with suppress(TooManyLocks), doms.locked():
        for i in range(1000):
            held.append(doms.find_by_name(f"x{i}"))
    child = fork(lock_in_child, doms)
    pipe.say((len(held) > 900, child.hear()))


def lock_in_child(pipe: Pipe, doms: DomainList) -> None:
    with doms.get(name="a", timeout=0):
        pipe.say("fine")


def test_a_child_starts_with_no_locks_counted(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    many(doms, 1000)
    assert start(fork_at_the_limit, path).hear() == (True, "fine")


# --- 8. ownership ---------------------------------------------------------------------------------


def test_another_thread_is_told_who_owns_the_lock(doms: DomainList) -> None:
    with doms.get(name="a") as dom:
        dom.data = 1

        def look() -> None:
            assert not dom.is_locked
            for use in (dom.unlock, dom.release):
                with pytest.raises(NotOwner):
                    use()
            for use in (dom.commit, dom.rollback, lambda: dom.data, lambda: dom.changed):
                with pytest.raises(DomainNotLocked):
                    use()
            with pytest.raises(LockTimeout) as failed:
                dom.lock(timeout=0)
            assert failed.value.holder.pid == os.getpid()

        in_thread(look)
        assert dom.data == 1
    with doms.locked():

        def look_at_list() -> None:
            assert not doms.is_locked
            for use in (doms.unlock, doms.release):
                with pytest.raises(NotOwner):
                    use()
            with pytest.raises(ListNotLocked):
                doms.find_by_name("a")

        in_thread(look_at_list)
    usable(doms)


def test_a_thread_with_the_number_of_an_ended_owner_owns_nothing(doms: DomainList) -> None:
    """Idents are used again; the lock of the thread that had this one before is not ours."""
    kept: list[Domain] = []

    def take() -> int:
        kept.append(doms.get(name="a"))
        return threading.get_ident()

    def look() -> bool:
        if threading.get_ident() != ident:
            return False
        dom = kept[0]
        assert not dom.is_locked
        with pytest.raises(DomainNotLocked):
            dom.unlock()
        with pytest.raises(DomainNotLocked):
            dom.data  # noqa: B018
        assert not doms.is_locked
        with pytest.raises(ListNotLocked):
            doms.find_by_name("b")
        return True

    ident = in_thread(take)
    in_thread(lambda: in_thread(lambda: None))
    if not any(in_thread(look) for _ in range(100)):
        pytest.skip("idents are not used again here")
    usable(doms)


def try_old(doms: DomainList, old: Domain) -> None:
    expect(DomainRemoved, old.try_lock)


def lock_old(doms: DomainList, old: Domain) -> None:
    expect(DomainRemoved, lambda: old.lock(timeout=0))


def lock_old_with_list(doms: DomainList, old: Domain) -> None:
    """With the list lock held it may wait for another domain."""
    expect(DomainRemoved, lambda: old.lock(timeout=1))


def remove_old(doms: DomainList, old: Domain) -> None:
    try:
        doms.remove_inactive(old, timeout=1)
    except (DomainRemoved, DomainLocked):
        return
    raise AssertionError("it was removed twice")


def use_stale_handle(pipe: Pipe, path: str | None, use: str) -> None:
    """In a process of its own: a mutex that is twice in a thread's robust list ends in SIGSEGV."""
    if path is None:
        doms = DomainList(max_domains=10, lock="multiprocessing")
        doms.define(xml("c"))
    else:
        doms = DomainList.attach(path=path)
    old = doms.get(name="c")
    old.unlock()
    with doms.locked():
        doms.remove_inactive(old)
        new = doms.assign_def(DomainDef.from_xml(xml("c")))
        new.data = 1
        if use in ("lock_old_with_list", "remove_old"):
            globals()[use](doms, old)
    if use in ("try_old", "lock_old"):
        globals()[use](doms, old)
    assert new.is_locked
    looker = fork(who_holds, doms, "c")
    assert looker.hear() == os.getpid(), "the lock that this thread holds was freed"
    assert new.previous_owner_died is None
    new.unlock()
    assert doms.peek(name="c").data == 1
    with doms.get(name="c", timeout=1) as dom:
        assert dom.previous_owner_died is None
    pipe.say("fine")


@pytest.mark.parametrize("kind", ["robust", "multiprocessing"])
@pytest.mark.parametrize("use", ["try_old", "lock_old", "lock_old_with_list", "remove_old"])
def test_a_stale_handle_does_not_steal_its_own_threads_lock(
    start: Callable[..., Child], doms: DomainList, path: str, use: str, kind: str
) -> None:
    """Its slot is another domain's now, which this very thread holds."""
    home = path if kind == "robust" else None
    assert start(use_stale_handle, home, use).hear(2 * DEADLINE) == "fine"
    usable(doms)


# --- 9. many locks --------------------------------------------------------------------------------


def many(doms: DomainList, count: int) -> list[str]:
    names = [f"x{i}" for i in range(count)]
    for name in names:
        doms.define(xml(name))
    return names


def test_more_than_a_thousand_locks_are_refused(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    names = many(doms, 1100)
    with doms.locked():
        # The list lock may be counted as one of them.
        held = [doms.find_by_name(name, timeout=0) for name in names[:999]]
        with suppress(TooManyLocks):
            held.append(doms.find_by_name(names[999], timeout=0))
        for use in (
            lambda: doms.find_by_name(names[1000]),
            lambda: doms.get(name=names[1000], timeout=0),
            lambda: doms.assign_def(DomainDef.from_xml(xml("new"))),
        ):
            with pytest.raises(TooManyLocks):
                use()
    # It is a thread's limit.
    in_thread(lambda: doms.get(name=names[1000], timeout=0).unlock())
    held.pop().unlock()
    held.append(doms.get(name=names[1000], timeout=0))
    while len(held) < 1000:
        held.append(doms.get(name=names[len(held)], timeout=0))
    with pytest.raises(TooManyLocks):
        doms.get(name=names[1001], timeout=0)
    for dom in held:
        dom.unlock()
    infos = doms.snapshot(definitions=False)
    with pytest.raises(TooManyLocks):
        doms.lock_many(infos, timeout=DEADLINE)
    assert not doms.is_locked
    assert start(can_take, path, names[0]).hear() is None
    usable(doms)


def test_free_works_in_batches(doms: DomainList) -> None:
    many(doms, 2500)
    with doms.locked():
        doms.free(timeout=DEADLINE)
    assert len(doms) == 0
    report = doms.check()
    assert report, report.problems
    assert doms.info.heap_used == 0


def hold_many(pipe: Pipe, path: str, names: list[str]) -> None:
    doms = DomainList.attach(path=path)
    with doms.locked():
        held = [doms.find_by_name(name) for name in names]
        for dom in held[::2]:
            dom.data = "uncommitted"
    pipe.say(os.getpid())
    pipe.rest()


def test_nine_hundred_locks_of_one_dead_holder(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    names = many(doms, 900)
    holder = start(hold_many, path, names)
    pid = holder.hear()
    holder.kill()
    with soon("900 hand-overs"):
        for name in names:
            with doms.get(name=name, timeout=0) as dom:  # the kernel has seen to all of them
                assert dom.previous_owner_died.pid == pid
                assert dom.data is None
    usable(doms)


# --- 10. flipped bits -----------------------------------------------------------------------------


def take_list(doms: DomainList, timeout: float) -> None:
    doms.lock(timeout)
    doms.unlock()


def take_domain(doms: DomainList, timeout: float) -> None:
    dom = doms.get(name="a", timeout=timeout)
    dom.unlock()


def commit_blob(doms: DomainList, timeout: float) -> None:
    with doms.get(name="a", timeout=0) as dom:
        dom.data = LARGE
        dom.commit(timeout or 1)


def commit_id(doms: DomainList, timeout: float) -> None:
    with doms.get(name="a", timeout=0) as dom:
        dom._take_id(timeout or 1)
        dom.commit(timeout or 1)


USES = {"list": take_list, "a": take_domain, "heap": commit_blob, "id": commit_id}


def exists(tid: int) -> bool:
    try:
        os.kill(tid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.parametrize("timeout", [0, 2.0], ids=["try", "timed"])
@pytest.mark.parametrize("which", list(USES))
def test_a_flipped_bit_in_a_free_lock_is_treated_as_a_death(
    doms: DomainList, planted: Planted, which: str, timeout: float
) -> None:
    at = mutex_of(planted, which) + planted.at["mutex.__data.__lock"]
    bits = range(32) if timeout == 0 else (14, 23, 29, 30, 31)
    for bit in bits:
        if bit < 30 and exists(1 << bit):
            continue
        planted.flip(at, bit)
        with soon(f"bit {bit}", 2):
            USES[which](doms, timeout)
        assert planted.read(at, 4) & 0x3FFFFFFF == 0, f"bit {bit}: it is held by nobody for ever"
    usable(doms)


@pytest.mark.parametrize("which", list(USES))
def test_a_lock_whose_owner_does_not_exist(doms: DomainList, planted: Planted, which: str) -> None:
    at = mutex_of(planted, which) + planted.at["mutex.__data.__lock"]
    for word in (NO_SUCH_TID, NO_SUCH_TID | WAITERS, OWNER_DIED, OWNER_DIED | WAITERS):
        planted.write(at, word, 4)
        with soon(f"word {word:#x}", 2):
            USES[which](doms, 2.0)
    usable(doms)


def test_a_domain_whose_owner_does_not_exist_says_that_somebody_died(
    doms: DomainList, planted: Planted
) -> None:
    at = mutex_of(planted, "a") + planted.at["mutex.__data.__lock"]
    planted.write(at, NO_SUCH_TID, 4)
    with doms.get(name="a", timeout=2) as dom:
        assert dom.previous_owner_died is not None
        assert dom.previous_owner_died.pid is None
    with doms.get(name="a", timeout=0) as dom:
        assert dom.previous_owner_died is None


@pytest.mark.parametrize("which", list(USES))
def test_a_flipped_bit_in_the_kind_of_a_lock_is_corruption(
    doms: DomainList, planted: Planted, which: str
) -> None:
    at = mutex_of(planted, which) + planted.at["mutex.__data.__kind"]
    for bit in range(32):
        planted.flip(at, bit)
        with soon(f"bit {bit}", 2), pytest.raises(SegmentCorrupt):
            USES[which](doms, 0.2)
        planted.flip(at, bit)
    assert not doms.is_locked
    assert not doms.peek(name="a").is_active
    usable(doms)


@pytest.mark.parametrize("which", list(USES))
def test_a_lock_that_says_not_recoverable_does_not_stay_so(
    doms: DomainList, planted: Planted, which: str
) -> None:
    """glibc's own mark, which no path of ours leaves behind: an error at most, and never a hang."""
    at = mutex_of(planted, which)
    planted.write(at + planted.at["mutex.__data.__owner"], 0x7FFFFFFE, 4)
    for _ in range(3):
        with soon("the error", 2), suppress(SegmentCorrupt):
            USES[which](doms, 1.0)
    planted.write(at + planted.at["mutex.__data.__owner"], 0, 4)
    usable(doms)


def test_a_holder_whose_lock_was_damaged_does_not_free_the_next_ones(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    holder = start(hold, path, "a")
    pid = holder.hear()
    planted.flip(mutex_of(planted, "a") + planted.at["mutex.__data.__lock"], 28)
    with doms.get(name="a", timeout=2) as dom:
        assert dom.previous_owner_died.pid == pid
        assert holder.ask() == "free"
        assert start(can_take, path, "a").hear() is not None
    assert start(can_take, path, "a").hear() is None
    usable(doms)


# --- Ctrl-C ---------------------------------------------------------------------------------------


def get_a(doms: DomainList) -> None:
    doms.get(name="a")


def lock_a(doms: DomainList) -> None:
    dom = doms._handles()[0]
    dom.lock()


def find_a(doms: DomainList) -> None:
    with doms.locked():
        doms.find_by_name("a")


def remove_a(doms: DomainList) -> None:
    with doms.locked():
        doms.remove_inactive(doms._handles()[0])


def assign_a(doms: DomainList) -> None:
    with doms.locked():
        doms.assign_def(DomainDef.from_xml(xml("a")))


def define_a(doms: DomainList) -> None:
    doms.define(xml("a", memory=2048))


def undefine_a(doms: DomainList) -> None:
    doms.undefine(name="a")


def free_all(doms: DomainList) -> None:
    with doms.locked():
        doms.free()


def lock_several(doms: DomainList) -> None:
    doms.lock_many([info.uuid for info in reversed(doms.snapshot())])


def lock_list(doms: DomainList) -> None:
    doms.lock()


def enter_list(doms: DomainList) -> None:
    with doms.locked():
        pass


def define_new(doms: DomainList) -> None:
    doms.define(xml("new"))


def commit_it(doms: DomainList) -> None:
    with doms.get(name="b", timeout=0) as dom:
        dom.data = LARGE
        try:
            dom.commit()
        except KeyboardInterrupt:
            assert dom.is_locked
            assert not dom.changed
            assert dom.data is None
            raise


def unlock_it(doms: DomainList) -> None:
    dom = doms.get(name="b", timeout=0)
    dom.data = LARGE
    try:
        dom.unlock()
    except KeyboardInterrupt:
        assert not dom.is_locked
        raise


def activate_it(doms: DomainList) -> None:
    with doms.get(name="b", timeout=0) as dom:
        dom.activate()


WAITS: list[tuple[str, Callable[[DomainList], None]]] = [
    *(("a", wait) for wait in (get_a, lock_a, find_a, remove_a, assign_a, define_a, undefine_a)),
    *(("a", wait) for wait in (free_all, lock_several)),
    *(("list", wait) for wait in (lock_list, enter_list, define_new, undefine_a)),
    *(("heap", wait) for wait in (commit_it, unlock_it, define_new)),
    ("id", activate_it),
]


def wait_for_it(pipe: Pipe, path: str, wait: str) -> None:
    doms = DomainList.attach(path=path)
    pipe.say("waiting")
    try:
        globals()[wait](doms)
    except KeyboardInterrupt:
        pipe.say(("interrupted", list_op_pending(), doms.is_locked))
    else:
        pipe.say("went on")
    pipe.listen()
    usable(doms)
    pipe.say("fine")
    pipe.rest()


@pytest.mark.parametrize(("held", "wait"), WAITS, ids=[f"{h}-{w.__name__}" for h, w in WAITS])
def test_ctrl_c_while_waiting(
    start: Callable[..., Child],
    doms: DomainList,
    planted: Planted,
    path: str,
    held: str,
    wait: Callable[[DomainList], None],
) -> None:
    """It gets through, takes nothing along, and leaves everything as it was."""
    before = [(info.uuid, info.name, info.id, info.data) for info in doms.snapshot()]
    if held in ("id", "heap"):
        holder = start(hold_mutex, path, mutex_of(planted, held))
    else:
        holder = start(hold, path, held)
    holder.hear()
    waiter = start(wait_for_it, path, wait.__name__)
    assert waiter.hear() == "waiting"
    planted.await_waiter(mutex_of(planted, held) + planted.at["mutex.__data.__lock"])
    waiter.signal(signal.SIGINT)
    with soon("Ctrl-C", 2):
        assert waiter.hear() == ("interrupted", None, False)
    holder.ask()
    assert waiter.ask() == "fine"
    for name in NAMES:
        with doms.get(name=name, timeout=DEADLINE) as dom:
            assert dom.previous_owner_died is None
            assert dom.data is None
    if wait is not free_all:  # what it removed before it came to the one that is held is gone
        assert [(info.uuid, info.name, info.id, info.data) for info in doms.snapshot()] == before
    usable(doms)


def interrupted_multiprocessing(pipe: Pipe, wait: str, rounds: int) -> None:
    """Ctrl-C at many moments of the wait: also where it does not cut short a system call."""
    doms = DomainList(max_domains=10, lock="multiprocessing")
    for name in NAMES:
        doms.define(xml(name))
    chance = random.Random(2)
    taken = doms.get(name="a") if wait == "get_a" else doms.lock()
    for _ in range(rounds):
        waiter = fork(wait_inherited, doms, wait)
        assert waiter.hear() == "waiting"
        waiter.conn.poll(chance.random() * 0.0005)
        waiter.signal(signal.SIGINT)
        assert waiter.hear(2) == "interrupted", "Ctrl-C got lost"
        waiter.close()
    (doms if taken is None else taken).unlock()
    usable(doms)
    pipe.say("fine")


def wait_inherited(pipe: Pipe, doms: DomainList, wait: str) -> None:
    try:
        pipe.say("waiting")
        globals()[wait](doms)
    except KeyboardInterrupt:
        assert not doms.is_locked
        pipe.say("interrupted")
    pipe.rest()


@pytest.mark.parametrize("wait", ["get_a", "lock_list"])
def test_ctrl_c_while_waiting_for_a_multiprocessing_lock(
    start: Callable[..., Child], wait: str
) -> None:
    assert start(interrupted_multiprocessing, wait, 60).hear(3 * DEADLINE) == "fine"


# --- signal handlers that use the list ------------------------------------------------------------


@contextmanager
def handler(number: int, function: Callable[[], object]) -> Iterator[None]:
    before = signal.signal(number, lambda *_: function())
    try:
        yield
    finally:
        signal.signal(number, before)


def busy_with_handler(pipe: Pipe, path: str, turns: int) -> None:
    """Count in one domain, while a handler counts in another, wherever it comes."""
    doms = DomainList.attach(path=path)
    counted = {"a": 0, "b": 0, "refused": 0}

    def count(name: str) -> None:
        with doms.get(name=name, timeout=None if name == "a" else 0) as dom:
            dom.data = (dom.data or 0) + 1
        counted[name] += 1

    def interrupt() -> None:
        try:
            count("b")
            doms.peek(name="a")
            len(doms.snapshot())
            with doms.locked(timeout=0), doms.find_by_name("b", timeout=0) as dom:
                dom.activate() if not dom.is_active else dom.deactivate()
        except (LockOrder, LockTimeout, AlreadyLocked, ListNotLocked):
            counted["refused"] += 1

    pipe.say("ready")
    pipe.listen()
    with handler(signal.SIGALRM, interrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        for turn in range(turns):
            count("a")
            if turn % 20 == 0:
                doms.define(xml(f"own-{os.getpid()}"))
                doms.undefine(name=f"own-{os.getpid()}")
        signal.setitimer(signal.ITIMER_REAL, 0)
    pipe.say(counted)
    pipe.rest()


def test_a_handler_may_use_the_list_wherever_it_comes(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    children = [start(busy_with_handler, path, 4000) for _ in range(3)]
    for child in children:
        child.hear()
    for child in children:
        child.tell()
    counted = [child.hear(30) for child in children]
    assert sum(one["b"] for one in counted) > 20, "the handler hardly ran"
    for name in ("a", "b"):
        assert doms.peek(name=name).data == sum(one[name] for one in counted)
    assert len(doms) == len(NAMES)
    usable(doms)


def wait_with_handler(pipe: Pipe, path: str, what: str) -> None:
    doms = DomainList.attach(path=path)
    said: list[object] = []
    kept: list[Domain] = []

    def use() -> None:
        if said:
            return
        said.append("ran")
        if what == "other":
            with doms.get(name="b", timeout=0) as dom:
                dom.data = "handler"
        elif what == "same":
            assert doms.lookup(name="a", timeout=0) is None
        elif what == "keep":
            # The holder lets go now, and the handler has it before the wait goes on.
            pipe.say("inside")
            kept.append(doms.get(name="a", timeout=DEADLINE))

    with handler(signal.SIGUSR1, lambda: guarded(said, use)):
        pipe.say("waiting")
        try:
            dom = doms.get(name="a", timeout=DEADLINE)
        except Exception as exc:
            pipe.say((type(exc).__name__, said, [one.is_locked for one in kept]))
        else:
            pipe.say(("got it", said, [one.is_locked for one in kept]))
            dom.unlock()
        for one in kept:
            if one.is_locked:
                one.unlock()
    usable(doms)
    pipe.say("fine")
    pipe.rest()


def guarded(said: list[object], use: Callable[[], object]) -> None:
    try:
        use()
    except Exception as exc:
        said.append(type(exc).__name__)


@pytest.mark.parametrize(
    ("what", "expected"), [("other", ["ran"]), ("same", ["ran", "LockTimeout"])]
)
def test_a_handler_runs_in_the_middle_of_a_wait(
    start: Callable[..., Child],
    doms: DomainList,
    planted: Planted,
    path: str,
    what: str,
    expected: list[str],
) -> None:
    holder = start(hold, path, "a")
    holder.hear()
    waiter = start(wait_with_handler, path, what)
    assert waiter.hear() == "waiting"
    planted.await_waiter(mutex_of(planted, "a") + planted.at["mutex.__data.__lock"])
    waiter.signal(signal.SIGUSR1)
    if what == "other":
        until(lambda: doms.peek(name="b").data == "handler", "the handler's change")
    else:
        waiter.conn.poll(0.2)  # several slices: it must not end the wait
    assert holder.ask() == "free"
    assert waiter.hear() == ("got it", expected, [])
    assert waiter.hear() == "fine"
    usable(doms)


def test_a_handler_that_keeps_the_domain_that_is_waited_for(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    """The wait must not take the lock from its own thread's handler: two owners in one thread."""
    holder = start(hold, path, "a")
    holder.hear()
    waiter = start(wait_with_handler, path, "keep")
    assert waiter.hear() == "waiting"
    planted.await_waiter(mutex_of(planted, "a") + planted.at["mutex.__data.__lock"])
    waiter.signal(signal.SIGUSR1)
    assert waiter.hear() == "inside"
    assert holder.ask() == "free"
    outcome, _, kept = waiter.hear(2 * DEADLINE)
    assert outcome != "got it", "the thread was given the domain twice"
    assert kept == [True]
    assert waiter.hear() == "fine"
    usable(doms)
