"""Where a process lives: another time namespace, no /proc, memory dumped or locked as a whole.

What is not permitted here is skipped, and the skip says what.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import DEADLINE, Child, Pipe, fork, xml

from shmdomains import DomainList, SegmentMismatch

pytestmark = pytest.mark.usefixtures("nothing_left")

libc = ctypes.CDLL(None, use_errno=True)
NEW_TIME = 0x80  # CLONE_NEWTIME
MCL_FUTURE = 2


# --- another time namespace ---------------------------------------------------------------------


def unshare_time() -> str | None:
    """For the children of this process, an hour later; why not, if not."""
    if libc.unshare(NEW_TIME):
        return f"no new time namespace here: {os.strerror(ctypes.get_errno())}"
    try:
        Path("/proc/self/timens_offsets").write_text("boottime 3600 0\n")
    except OSError as exc:
        return f"a time namespace whose time is the same: {exc.strerror}"
    return None


def fork_into_time(pipe: Pipe, path: str, kind: str, inherits: bool) -> None:
    doms = DomainList.create(path=path, max_domains=8, lock=kind)
    doms.define(xml("a"))
    dom = doms.get(name="a")
    refused = unshare_time()
    if refused:
        pipe.say(refused)
        return
    said = fork(use_elsewhere, doms if inherits else None, path).hear()
    dom.unlock()
    assert dom.previous_owner_died is None if dom.is_locked else True
    doms.unlink(force=True)
    doms.close()
    pipe.say(("told", said))


def use_elsewhere(pipe: Pipe, doms: DomainList | None, path: str) -> None:
    try:
        with (doms or DomainList.attach(path=path)).get(name="a", timeout=0.3):
            pipe.say("got it, beside the holder")
    except SegmentMismatch as exc:
        pipe.say(str(exc))
    pipe.rest()


@pytest.mark.parametrize("kind", ["robust", "multiprocessing"])
@pytest.mark.parametrize("inherits", [True, False], ids=["inherited", "attached"])
def test_another_time_namespace_is_refused(
    start: Callable[..., Child], path: str, kind: str, inherits: bool
) -> None:
    said = start(fork_into_time, path, kind, inherits).hear(3 * DEADLINE)
    if isinstance(said, str):
        pytest.skip(said)
    assert "time namespace" in said[1]


# --- no /proc -----------------------------------------------------------------------------------


def fork_without_proc(pipe: Pipe, folder: str) -> None:
    doms = DomainList(max_domains=8)
    doms.define(xml("a"))
    with doms.get(name="a", timeout=0.2):
        pass  # what is imported at first use is there
    try:
        os.chroot(folder)
    except PermissionError:
        pipe.say("chroot is not permitted here")
        return
    doms.peek(name="a")
    pipe.say(("told", fork(use_in_child, doms).hear()))


def use_in_child(pipe: Pipe, doms: DomainList) -> None:
    try:
        with doms.get(name="a", timeout=0.2):
            pipe.say("got it")
    except SegmentMismatch as exc:
        pipe.say(str(exc))
    pipe.rest()


def test_a_fork_in_a_chroot_without_proc_says_so(
    start: Callable[..., Child], tmp_path: Path
) -> None:
    said = start(fork_without_proc, str(tmp_path)).hear(3 * DEADLINE)
    if isinstance(said, str):
        pytest.skip(said)
    assert "cannot read /proc/self/ns/pid" in said[1]
    assert os.strerror(errno.ENOENT) in said[1]
    assert "another" not in said[1]


# --- memory that is read as a whole -------------------------------------------------------------


def flags_of(doms: DomainList) -> list[str]:
    """What the kernel has for the segment's mapping."""
    inode = str(os.fstat(doms.fileno()).st_ino)
    mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if words[0] == "VmFlags:" and mine:
            return words[1:]
        if not words[0].endswith(":"):
            mine = len(words) > 4 and words[4] == inode
    raise AssertionError("it is not mapped")


def test_a_core_dump_leaves_the_segment_out() -> None:
    with DomainList() as doms:
        assert "dd" in flags_of(doms)


DUMP = """
import os, resource, sys
from shmdomains import DomainList
doms = DomainList.create(path=sys.argv[1])
resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
os.abort()
"""


def test_a_core_dump_fills_nothing(tmp_path: Path, path: str) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith(("|", "/")):
        pytest.skip(f"core dumps go to {pattern}")
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("core dumps are not permitted here (RLIMIT_CORE)")
    done = subprocess.run([sys.executable, "-c", DUMP, path], cwd=tmp_path)
    assert done.returncode < 0
    assert [file for file in tmp_path.iterdir() if file.name.startswith(pattern[:4])], "no dump"
    assert os.stat(path).st_blocks * 512 < 4 << 20


def lock_what_comes(pipe: Pipe) -> None:
    """mlockall(MCL_FUTURE), then a list."""
    if libc.mlockall(MCL_FUTURE):
        pipe.say(f"memory cannot be locked here: {os.strerror(ctypes.get_errno())}")
        return
    try:
        doms = DomainList()
    except OSError as exc:  # RLIMIT_MEMLOCK
        pipe.say(f"so much memory cannot be locked here: {exc}")
        return
    assert "lo" in flags_of(doms)
    doms.define(xml("a"))
    committed = os.fstat(doms.fileno()).st_blocks * 512
    libc.munlockall()
    doms.close()
    pipe.say(committed)


def test_locked_memory_has_no_holes_filled(start: Callable[..., Child]) -> None:
    committed = start(lock_what_comes).hear(3 * DEADLINE)
    if isinstance(committed, str):
        pytest.skip(committed)
    assert committed < 4 << 20
