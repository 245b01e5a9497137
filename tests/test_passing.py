"""Lists, handles and named locks on their way to other processes: as arguments when a process
begins, and in the tasks and results of pools.

Each of the ways is tried in a program of its own (`passing_driver.py`), which has to end in time:
what is wrong here shows as a pool that waits for ever.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Home, Party, environment, xml
from other_user import PR_SET_DUMPABLE

from shmdomains import DomainList, SegmentNotFound, SegmentRefused
from shmdomains.memory.passing import NotArrived

pytestmark = pytest.mark.usefixtures("nothing_left")

STARTS = ["fork", "spawn", "forkserver"]
WAYS = [(start, kind) for kind in ("Pool", "Executor") for start in STARTS]
WAYS += [("spawn", "loky"), ("spawn", "joblib")]
DEADLINE = 60


def run(folder: Path, *arguments: str) -> list[str]:
    """What the program prints. If it hangs, it is ended with its children."""
    command = [sys.executable, "-m", "passing_driver", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(SHMDOMAINS_DIR=str(folder)),
        start_new_session=True,
    ) as program:
        try:
            out, errors = program.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)
            out, errors = program.communicate()
            pytest.fail(f"it hangs: {out}{errors}")
    assert (errors, program.returncode) == ("", 0)
    return out.splitlines()


# What cannot arrive says so where it is used: in the caller, through the task's error. With
# multiprocessing locks it arrives as a list that a stranger attached.
IN_TASKS = ["list: 20", "handle: 20", "mutex: 20", *["True True"] * 6, "20", "[['web1']]", "True"]
GIVEN = ["initargs: 20", "and in tasks: 20"]


@pytest.mark.parametrize(("start", "kind"), WAYS)
def test_it_arrives(segment_dir: Path, start: str, kind: str) -> None:
    given = [] if kind == "joblib" else GIVEN  # which has no initialisers
    assert run(segment_dir, start, kind) == [*IN_TASKS, *given, "[]"]


@pytest.mark.parametrize("start", STARTS)
def test_it_arrives_by_name(segment_dir: Path, start: str) -> None:
    assert run(segment_dir, start, "Pool", "named") == [*IN_TASKS, *GIVEN, "[]"]
    assert os.listdir(segment_dir) == []


def test_nothing_is_left(segment_dir: Path) -> None:
    """No descriptor, thread, process or file, of 1,000 pickles; and each can be told apart from
    none: they are the same bytes."""
    assert run(segment_dir) == ["True 1", "0 True", "2000 1"]


# --- what is in the way --------------------------------------------------------------------------


@pytest.fixture
def doms() -> Iterator[DomainList]:
    with DomainList(max_domains=8) as doms:
        doms.define(xml("web1"))
        yield doms


@pytest.fixture
def blob(doms: DomainList) -> bytes:
    return pickle.dumps(doms)


def words(party: Party, blob: bytes) -> str:
    """What another process says of a list that did not arrive."""
    party.tell(f"found = pickle.loads({blob!r})")
    with pytest.raises((SegmentNotFound, SegmentRefused)) as caught:
        party.tell("found.get('web1')")
    assert party.tell("str(found)") == f"<not arrived: {caught.value}>"
    assert f"process {os.getpid()}, " in str(caught.value) and "initargs" in str(caught.value)
    return str(caught.value)


def test_a_stranger_gets_it(doms: DomainList, blob: bytes, stranger: Party) -> None:
    """Who has nothing in common with this process but its user."""
    stranger.tell(f"found = pickle.loads({blob!r})\nwith found.get('web1') as dom: dom.pid = 5")
    info = doms.peek("web1")
    assert info and info.pid == 5
    assert stranger.tell(f"pickle.loads({blob!r}) is found")  # once more
    doms.close()
    passed_on = stranger.tell("pickle.dumps(found)")
    with pickle.loads(passed_on) as again:  # and back, while the stranger has it
        assert [one.name for one in again] == ["web1"]
    stranger.tell("found.close(); del dom")


def test_another_user(blob: bytes, as_user: Callable[..., Party]) -> None:
    assert "may not look into" in words(as_user(12345), blob)


def test_a_process_that_changed_its_user(blob: bytes, as_user: Callable[..., Party]) -> None:
    """It lets nobody into its descriptors, its own user neither."""
    one, two = as_user(12345), as_user(12345)
    one.tell("doms = DomainList(max_domains=4)")
    pickled = one.tell("pickle.dumps(doms)")
    assert two.tell(f"len(pickle.loads({pickled!r}))") == 0
    one.tell(f"import ctypes; ctypes.CDLL(None).prctl({PR_SET_DUMPABLE}, 0, 0, 0, 0)")
    two.tell("gc.collect()")
    with pytest.raises(SegmentRefused, match="may not look into"):
        two.tell(f"len(pickle.loads({pickled!r}))")


def test_the_number_is_another_files(
    doms: DomainList, blob: bytes, stranger: Party, tmp_path: Path
) -> None:
    """Which is not opened: of a pipe with nobody at its other end that would wait."""
    os.mkfifo(tmp_path / "fifo")
    number = doms.fileno()
    doms.close()
    gc.collect()
    fifo = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    os.dup2(fifo, number) if fifo != number else None
    assert "closed it" in words(stranger, blob)
    os.close(number), fifo == number or os.close(fifo)


def test_the_descriptor_was_closed(doms: DomainList, stranger: Party) -> None:
    os.close(doms.fileno())
    blob = pickle.dumps(doms)
    assert pickle.loads(blob) is doms
    assert "had closed its descriptor" in words(stranger, blob)


def test_without_proc(blob: bytes, start: Callable[..., Any], tmp_path: Path) -> None:
    child = start(in_a_chroot, str(tmp_path), blob)
    if os.getuid() == 0:
        assert "cannot be seen without /proc" in child.hear()
    child.join()


def in_a_chroot(pipe: Any, folder: str, blob: bytes) -> None:
    import shmdomains

    shmdomains.preload()
    if os.getuid() == 0:
        os.chroot(folder)
        pipe.say(repr(pickle.loads(blob)))


def test_no_descriptor_is_left_for_it(blob: bytes, stranger: Party) -> None:
    """The error is the moment's: the same pickle arrives when there is one."""
    stranger.tell(
        "import resource\nsoft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "free = os.open('/dev/null', os.O_RDONLY); os.close(free)\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))\nfound = pickle.loads({blob!r})"
    )
    with pytest.raises(OSError, match="Too many open files"):
        stranger.tell("len(found)")
    stranger.tell("resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))")
    assert stranger.tell("len(pickle.loads(pickle.dumps(found)))") == 1


def test_a_fork_finds_it_without_a_descriptor(home: Home) -> None:
    home.party.tell("doms = DomainList(max_domains=4)")
    child = home.begin("fork", doms="doms")
    home.party.tell("os.close(doms.fileno())")
    pickled = home.party.tell("pickle.dumps(doms)")
    assert child.tell(f"pickle.loads({pickled!r}) is doms")
    child.leave()


# --- what stands for it --------------------------------------------------------------------------


def use_in_with(found: Any) -> None:
    with found:
        pass


def set_attribute(found: Any) -> None:
    found.slow_after = 1


USES: list[Callable[[Any], Any]] = [
    lambda found: found.get("web1"),
    lambda found: found.data,
    len,
    bool,
    list,
    lambda found: "web1" in found,
    lambda found: found["web1"],
    use_in_with,
    set_attribute,
    lambda found: delattr(found, "data"),
]


@pytest.mark.parametrize("part", ["list", "handle", "mutex"])
def test_every_use_raises(doms: DomainList, part: str) -> None:
    dom = doms.get("web1")
    dom.unlock()
    blob = pickle.dumps({"list": doms, "handle": dom, "mutex": doms.mutex("m")}[part])
    doms.close()
    del doms, dom
    gc.collect()
    found = pickle.loads(blob)
    if not isinstance(found, NotArrived):  # a fixture has the list still
        pytest.fail("it arrived")
    raised: list[SegmentNotFound] = []
    for use in USES:
        with pytest.raises(SegmentNotFound, match="closed it") as caught:
            use(found)
        assert caught.value not in raised  # else it would keep all who tried
        raised.append(caught.value)
    assert repr(found) == f"<not arrived: {caught.value}>" == repr(copy.copy(found))
    assert not hasattr(found, "__array__")  # protocols ask for such, and take it for a no


def test_copies_are_the_list(doms: DomainList) -> None:
    assert copy.copy(doms) is doms and copy.deepcopy(doms) is doms
    with doms.get("web1") as dom:
        twins = copy.copy(dom), copy.deepcopy(dom)
        assert all(twin == dom and twin is not dom and twin.is_locked for twin in twins)
    assert copy.deepcopy({"doms": doms}) == {"doms": doms}
    with copy.deepcopy(doms.mutex("m", 5, why="a copy")) as mutex:
        assert repr(mutex) == "<Mutex 'm' locked>"
        assert [(lock.name, lock.holder.operation) for lock in doms.locks()] == [("m", "a copy")]


def test_pickles_of_every_protocol(doms: DomainList) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(doms, protocol)) is doms
