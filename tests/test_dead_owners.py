"""A dead owner is told from a living one where the kernel does not say so.

Its number belongs to another thread by now; nobody has waited for it yet (a zombie); the kernel
walked no robust list, as in some sandboxes; or the lock is `multiprocessing`'s, of which the kernel
knows nothing. What such a death leaves in the segment is written there by hand, but for the kernel
without robust futexes, which a seccomp filter makes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from killing import DEADLINE, Child, Pipe, Planted, fork, soon, until, xml

from shmdomains import DomainList, LockTimeout, NotOwner
from shmdomains.memory._core import core

pytestmark = pytest.mark.usefixtures("nothing_left")

INCONSISTENT = 0x7FFFFFFF
"""What glibc has for its copy of the owner from a death until `pthread_mutex_consistent`."""


@pytest.fixture
def kind() -> str:
    return "robust"


@pytest.fixture
def doms(path: str, kind: str) -> Iterator[DomainList]:
    with DomainList.create(path=path, max_domains=8, lock=kind) as doms:
        doms.define(xml("a"))
        yield doms


def stay(pipe: Pipe) -> None:
    pipe.say("there")
    pipe.rest()


@pytest.fixture
def bystander(start: Callable[..., Child]) -> Child:
    """A living process, whose number the dead owner had."""
    child = start(stay)
    assert child.hear() == "there"
    return child


def identity(tid: int, later: int = 0) -> int:
    return tid | (core.process_start(tid) + later) << 22


def plant(planted: Planted, which: str, tid: int, who: int, copy: int | None = None) -> None:
    """A lock of thread `tid`, signed by `who`; of a robust one also what glibc has of its owner."""
    mutex = planted.header("list_mutex") if which == "list" else planted.slot(0, "mutex")
    owner = planted.header("list_owner") if which == "list" else planted.slot(0, "owner")
    planted.write(owner + planted.at["owner.pid"], tid | (who & 0xFFFFFFFF) << 32)
    planted.write(owner + planted.at["owner.who"], who)
    if copy is not None:
        planted.write(mutex + planted.at["mutex.__data.__owner"], copy, 4)
        planted.write(mutex + planted.at["mutex.__data.__lock"], tid, 4)


def use(doms: DomainList, which: str, timeout: float) -> None:
    if which == "list":
        with doms.locked(timeout=timeout):
            return
    with doms.get(name="a", timeout=timeout):
        return


WHICH = pytest.mark.parametrize("which", ["list", "a"])
TIMEOUT = pytest.mark.parametrize("timeout", [0, DEADLINE], ids=["try", "timed"])
MULTIPROCESSING = pytest.mark.parametrize("kind", ["multiprocessing"])


# --- its number is another thread's -------------------------------------------------------------


@WHICH
@TIMEOUT
def test_the_number_of_a_dead_holder_was_given_out_again(
    doms: DomainList, planted: Planted, bystander: Child, which: str, timeout: float
) -> None:
    plant(planted, which, bystander.pid, identity(bystander.pid, later=-1), copy=bystander.pid)
    with soon("the burial"):
        use(doms, which, timeout)
    assert doms.check().problems == []


@WHICH
def test_a_living_holder_is_left_alone(
    doms: DomainList, planted: Planted, bystander: Child, which: str
) -> None:
    """Who holds it; who has not signed; who has not repaired yet what its namesake left."""
    pid = bystander.pid
    for who, copy in (
        (identity(pid), pid),
        (0, pid),
        (identity(pid, later=-1), INCONSISTENT),
        (identity(os.getppid()), pid),
    ):
        plant(planted, which, pid, who, copy)
        with pytest.raises(LockTimeout) as failed:
            use(doms, which, 0.2)
        assert failed.value.holder
        if who in (0, identity(pid)):
            assert failed.value.holder.pid == pid
            assert failed.value.holder.alive
        plant(planted, which, 0, 0, 0)


@WHICH
@MULTIPROCESSING
def test_the_number_of_a_dead_holders_thread_was_given_out_again(
    doms: DomainList, planted: Planted, which: str
) -> None:
    """Within this process, where the start of the process tells nothing."""
    over = threading.Event()
    # Its start must differ from the process's, which the kernel counts in hundredths of a second.
    began = core.process_start(os.getpid())
    until(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) * 100 > began + 2, "a later tick")
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        tid = thread.native_id
        assert tid
        assert core.process_start(tid) > began
        plant(planted, which, tid, identity(tid, later=-1))
        with soon("the take-over"):
            use(doms, which, DEADLINE)
        plant(planted, which, tid, identity(tid))
        with pytest.raises(LockTimeout):
            use(doms, which, 0.2)
        plant(planted, which, 0, 0)
    finally:
        over.set()
        thread.join()


# --- nobody has waited for it -------------------------------------------------------------------


@WHICH
@TIMEOUT
@pytest.mark.parametrize("kind", ["robust", "multiprocessing"])
def test_a_zombie_is_dead(
    doms: DomainList, planted: Planted, which: str, timeout: float, kind: str
) -> None:
    with subprocess.Popen(["sleep", "600"]) as holder:
        who = identity(holder.pid)
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        plant(planted, which, holder.pid, who, holder.pid if kind == "robust" else None)
        with soon("the burial"):
            use(doms, which, timeout)
        assert Path(f"/proc/{holder.pid}/stat").exists(), "somebody waited for it"
    assert doms.check().problems == []


def forbid(*calls: int) -> None:
    """Have these system calls fail as on a kernel that does not know them."""
    machine = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
    load, equal, answer = 0x20, 0x15, 0x06
    program = [(load, 0, 0, 4), (equal, 0, len(calls) + 1, machine), (load, 0, 0, 0)]
    program += [(equal, len(calls) - at, 0, call) for at, call in enumerate(calls)]
    program += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050000 | 38)]  # ENOSYS
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    filter = struct.pack("@HP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    if libc.prctl(22, 2, filter, 0, 0):  # PR_SET_SECCOMP
        raise OSError(ctypes.get_errno(), "no seccomp filter")


def forbid_robust_lists() -> None:
    forbid(*{"x86_64": (273, 274), "aarch64": (99, 100)}[platform.machine()])


def under_an_old_kernel(source: str, path: str) -> subprocess.Popen[str]:
    """Run it in a process whose kernel knows no robust futexes, from its first instruction."""
    boot = (
        "import os, sys\nfrom test_dead_owners import forbid_robust_lists\nforbid_robust_lists()\n"
        "os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", boot, source, path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


HOLD = """
import sys, time
from shmdomains import DomainList
doms = DomainList.attach(path=sys.argv[1])
dom = doms.get(name="a")
print("holding", flush=True)
time.sleep(600)
"""


def test_a_zombie_where_the_kernel_walks_no_list(doms: DomainList, path: str) -> None:
    with under_an_old_kernel(HOLD, path) as holder:
        try:
            assert holder.stdout
            assert holder.stdout.readline() == "holding\n"
            with pytest.raises(LockTimeout):
                doms.get(name="a", timeout=0.2)
        finally:
            holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        with soon("the burial"), doms.get(name="a", timeout=DEADLINE) as dom:
            assert dom.previous_owner_died
            assert dom.previous_owner_died.pid == holder.pid


def spin(pipe: Pipe, path: str) -> None:
    """Hold a domain on the last processor, which has no time for our end (`hog`)."""
    doms = DomainList.attach(path=path)
    dom = doms.get(name="a")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    pipe.say("holding")
    while dom:
        pass


def hog(pipe: Pipe) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    except OSError as exc:
        pipe.say(f"no real-time processes here: {exc.strerror}")
        pipe.rest()
    pipe.say("running")
    end = time.monotonic() + 0.4
    while time.monotonic() < end:
        pass
    pipe.rest()


def test_whose_memory_was_taken_before_it_ended(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    """process_mrelease() takes the robust list, too, so the kernel marks nothing."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor: the holder ends before its memory is taken")
    release = 448
    libc = ctypes.CDLL(None, use_errno=True)
    holder = start(spin, path)
    assert holder.hear() == "holding"
    said = start(hog).hear()
    if said != "running":
        pytest.skip(said)
    holder.signal(signal.SIGKILL)
    if libc.syscall(release, holder.pidfd, 0):
        pytest.skip(f"process_mrelease: {os.strerror(ctypes.get_errno())}")
    holder.join()
    at = planted.slot(0, "mutex") + planted.at["mutex.__data.__lock"]
    assert planted.read(at, 4) == holder.pid, "the kernel has marked it"
    with soon("the burial"), doms.get(name="a", timeout=DEADLINE) as dom:
        assert dom.previous_owner_died
        assert dom.previous_owner_died.pid == holder.pid


CREATE = """
import sys, logging
logging.basicConfig(format="%(name)s %(levelname)s %(message)s")
from shmdomains import DomainList
for name in "xy":
    DomainList.create(path=sys.argv[1] + name, max_domains=4).close()
DomainList(max_domains=4).close()
"""


def test_create_says_once_that_the_kernel_walks_no_list(tmp_path: Path) -> None:
    with under_an_old_kernel(CREATE, str(tmp_path / "s")) as creator:
        said = creator.communicate(timeout=3 * DEADLINE)[1]
    assert creator.returncode == 0, said
    [line] = said.splitlines()
    assert "WARNING" in line
    assert "robust" in line
    quiet = subprocess.run(
        [sys.executable, "-c", CREATE, str(tmp_path / "t")], capture_output=True, text=True
    )
    assert (quiet.returncode, quiet.stderr) == (0, "")


# --- lock="multiprocessing" -----------------------------------------------------------------------


@WHICH
@TIMEOUT
@MULTIPROCESSING
def test_a_death_beside_the_semaphore(doms: DomainList, which: str, timeout: float) -> None:
    """After the owner was cleared and before the post; or before the owner was entered."""
    list_lock, slot_locks = doms._locks
    semaphore = list_lock if which == "list" else slot_locks[0]
    for _ in range(2):
        assert semaphore.acquire(False)
        use(doms, which, timeout)
    assert semaphore.acquire(False), "the unlock did not wake anybody"
    semaphore.release()


def take_it(pipe: Pipe, doms: DomainList) -> None:
    with doms.get(name="a", timeout=DEADLINE) as dom:
        dom.data = "theirs"
        pipe.say("taken")
        pipe.listen()
    pipe.say("free")
    pipe.rest()


def lose_it(pipe: Pipe, path: str) -> None:
    doms = DomainList.create(path=path, max_domains=8, lock="multiprocessing")
    doms.define(xml("a"))
    planted = Planted(path)
    dom = doms.get(name="a")
    plant(planted, "a", os.getpid(), identity(os.getpid(), later=-1))
    taker = fork(take_it, doms)
    assert taker.hear() == "taken"
    try:
        dom.unlock()
    except NotOwner as exc:
        assert "took over" in str(exc)
    else:
        raise AssertionError("nobody is told that the lock was another's")
    try:
        doms.get(name="a", timeout=0.2)
    except LockTimeout as exc:
        assert exc.holder and exc.holder.pid == taker.pid
    else:
        raise AssertionError("its unlock freed the other's lock")
    assert taker.ask() == "free"
    with doms.get(name="a", timeout=DEADLINE) as dom:
        assert dom.data == "theirs"
    taker.signal(signal.SIGKILL)
    doms.close()
    pipe.say("fine")


def test_the_unlock_of_who_was_taken_for_dead(start: Callable[..., Child], path: str) -> None:
    assert start(lose_it, path).hear(3 * DEADLINE) == "fine"
