"""The segment's descriptor, closed by others: a process that becomes a daemon closes all it knows
nothing of, and the file that it opens next gets the number.

Each process here does that to itself. The list goes on and grows; the file that has the number now
keeps its bytes, its size and its descriptor; what cannot be done without a descriptor is a plain
error. Sandboxed, a process sees a kernel from before Linux 5.14, which commits memory through a
descriptor only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import selectors
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import DEADLINE, Party, Process, environment, xml
from test_exhaustion import fill, mounted

import shmdomains
from shmdomains import DescriptorLost, DomainList, SegmentFull, SegmentInUse, SegmentNotFound

pytestmark = pytest.mark.usefixtures("nothing_left")

MAKE = {
    "memfd": "DomainList(max_domains=5000)",
    "named": "DomainList.create('s', max_domains=5000)",
}
BYTES = b"what the user wrote\n"


# --- what the processes do to themselves ---------------------------------------------------------


def lose(doms: DomainList, path: str | None) -> int:
    """Close the descriptor; a file opened at `path` gets the number, or nothing does."""
    number = doms.fileno()
    os.close(number)
    if path is not None:
        with open(path, "wb") as file:
            file.write(BYTES)
            file.flush()
            os.dup2(file.fileno(), number)
    return number


def is_open(number: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


def grow(doms: DomainList, count: int) -> None:
    """More slots and names, wider indexes (the ids' too), more heap."""
    for number in range(count):
        doms.define(xml(f"vm{number}"))
        with doms.get(name=f"vm{number}") as dom:
            dom.activate()
            dom.data = b"x" * 2000
    assert len(doms) == doms.count(active=True) == count
    assert all(info.data == b"x" * 2000 for info in doms)
    assert doms.check().problems == []


def refuse_populate() -> None:
    """Have madvise(MADV_POPULATE_WRITE) fail as on a kernel that does not know it."""
    machine, madvise = {
        "x86_64": (0xC000003E, 28),
        "aarch64": (0xC00000B7, 233),
    }[platform.machine()]
    load, equal, answer, allow = 0x20, 0x15, 0x06, 0x7FFF0000
    program = [
        (load, 0, 0, 4), (equal, 0, 5, machine),
        (load, 0, 0, 0), (equal, 0, 3, madvise),
        (load, 0, 0, 32), (equal, 0, 1, 23),
        (answer, 0, 0, 0x00050000 | 22),  # EINVAL
        (answer, 0, 0, allow),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    filter = struct.pack("@HP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    if libc.prctl(22, 2, filter, 0, 0):  # PR_SET_SECCOMP
        raise OSError(ctypes.get_errno(), "no seccomp filter")


@pytest.fixture
def party(segment_dir: Path) -> Iterator[Party]:
    """A process of its own that knows this file as `own`, and may be lost."""
    process = Process(SHMDOMAINS_DIR=str(segment_dir))
    try:
        process.party.tell("import test_descriptors as own")
        yield process.party
        assert process.is_well
    finally:
        process.kill()
        process.party.conn.close()


@pytest.fixture(params=["reused", "closed"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | None]:
    """The user's file that gets the number, if one does. It stays as it was."""
    path = tmp_path / "log"
    yield path if request.param == "reused" else None
    if request.param == "reused":
        assert path.read_bytes() == BYTES
        assert path.stat().st_blocks <= 8
    else:
        assert not path.exists()


@pytest.fixture(params=MAKE)
def lost(request: pytest.FixtureRequest, party: Party, file: Path | None) -> Party:
    """A process whose list `doms` has lost its descriptor, `number`."""
    where = None if file is None else str(file)
    party.do(f"doms = {MAKE[request.param]}\nnumber = own.lose(doms, {where!r})")
    return party


# --- it goes on ----------------------------------------------------------------------------------


def test_the_list_grows(lost: Party) -> None:
    before = lost.tell("doms.info.bytes_committed")
    lost.do("own.grow(doms, 1500)")
    assert lost.tell("doms.info.bytes_committed") > before + (4 << 20)


def test_close_leaves_the_number_alone(lost: Party, file: Path | None) -> None:
    lost.do("doms.close(); del doms; gc.collect()")
    assert lost.tell("own.is_open(number)") == (file is not None)
    if file is not None:
        assert lost.tell("os.readlink(f'/proc/self/fd/{number}')") == str(file)


def test_the_bytes_are_known_without_it(party: Party) -> None:
    """To the byte what the kernel counts, where nobody died."""
    party.do("doms = DomainList(max_domains=5000)")
    for more in ("0", "own.grow(doms, 600)"):
        party.do(more)
        exact, counted = party.tell(
            "kept = os.dup(doms.fileno())\n"
            "exact = doms.info.bytes_committed\n"
            "os.close(doms.fileno())\n"
            "counted = doms.info.bytes_committed\n"
            "os.dup2(kept, number := max(map(int, os.listdir('/proc/self/fd'))) + 1)\n"
            "exact, counted"
        )
        assert exact == counted
        party.do("doms = DomainList(max_domains=5000)")


def test_a_thing_that_needs_it_says_so(lost: Party) -> None:
    with pytest.raises(DescriptorLost, match=r"number \d+.*files_preserve=\[doms\]"):
        lost.tell("doms.fileno()")
    lost.do(
        "child = multiprocessing.get_context('spawn').Process(target=len, args=(doms,))\n"
        "try: child.start()\n"
        "except DescriptorLost as exc: said = exc"
    )
    assert "files_preserve" in lost.tell("str(said)")
    assert lost.tell("multiprocessing.active_children()") == []


# --- an old kernel -------------------------------------------------------------------------------


def test_an_old_kernel_needs_the_descriptor(lost: Party) -> None:
    lost.do("own.refuse_populate()")
    with pytest.raises(DescriptorLost, match=r"Linux 5\.14"):
        lost.tell("own.grow(doms, 1)")
    assert lost.tell("len(doms), doms.check().problems") == (0, [])


def test_an_old_kernel_with_the_descriptor(party: Party) -> None:
    party.do("own.refuse_populate()\ndoms = DomainList(max_domains=5000)\nown.grow(doms, 600)")


# --- a named segment -----------------------------------------------------------------------------


def lose_named(party: Party, file: Path | None) -> None:
    where = None if file is None else str(file)
    party.do(f"doms = {MAKE['named']}\nnumber = own.lose(doms, {where!r})")


def test_attaching_anew_gives_one_back(party: Party, file: Path | None, segment_dir: Path) -> None:
    lose_named(party, file)
    party.do("again = DomainList.attach('s'); again.close(); own.grow(doms, 300)")
    assert party.tell("os.fstat(doms.fileno()).st_size == doms.info.bytes_max")
    if file is not None:
        assert party.tell("os.readlink(f'/proc/self/fd/{number}')") == str(file)
    with pytest.raises(SegmentInUse):
        shmdomains.unlink("s")
    party.do("doms.close(); del doms, again; gc.collect()")
    shmdomains.unlink("s")


def test_attaching_through_the_lost_number(party: Party, segment_dir: Path) -> None:
    """The caller closes it again: it is no descriptor for the segment to keep."""
    lose_named(party, None)
    party.do(
        f"file = os.open({str(segment_dir / 's.segment')!r}, os.O_RDWR)\n"
        "if file != number: os.dup2(file, number); os.close(file)\n"
        "again = DomainList.__new__(DomainList)\n"
        "again._begin(number)\n"
        "os.close(number)"
    )
    assert party.tell("os.fstat(doms.fileno()).st_size == doms.info.bytes_max")


def test_the_same_inode_number_elsewhere(tmp_path: Path) -> None:
    """Each file system counts from one."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    with mounted(here, "size=8m"), mounted(there, "size=8m"):
        process = Process(SHMDOMAINS_DIR=str(here))
        party = process.party
        try:
            party.do("import test_descriptors as own\ndoms = DomainList.create(max_domains=5000)")
            inode = party.tell("os.fstat(doms.fileno()).st_ino")
            for number in range(inode):
                path = there / str(number)
                path.touch()
                if path.stat().st_ino == inode:
                    break
            else:
                pytest.skip("this kernel does not count inodes by file system")
            party.do(f"own.lose(doms, {str(path)!r})\nown.grow(doms, 300)")
            with pytest.raises(DescriptorLost):
                party.tell("doms.fileno()")
            assert path.read_bytes() == BYTES
        finally:
            process.kill()
            party.conn.close()


def test_unlink_without_it(party: Party, file: Path | None, segment_dir: Path) -> None:
    lose_named(party, file)
    with DomainList.attach("s"), pytest.raises(SegmentInUse):
        party.tell("doms.unlink()")
    party.do("doms.unlink()")
    assert os.listdir(segment_dir) == []
    with pytest.raises(SegmentNotFound):
        party.tell("doms.unlink()")
    with DomainList.create("s", max_domains=8) as second:
        with pytest.raises(SegmentNotFound, match="not this segment's"):
            party.tell("doms.unlink(force=True)")
        second.unlink()
    # What has the number is not locked either, nor was it ever.
    if file is not None:
        party.do(
            "import fcntl\n"
            f"with open({str(file)!r}) as own_file:\n"
            "    fcntl.flock(own_file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
        )


def test_others_do_not_see_who_lost_it(party: Party, file: Path | None, segment_dir: Path) -> None:
    """That is what the README says is lost."""
    lose_named(party, file)
    shmdomains.unlink("s")
    party.do("own.grow(doms, 300)")


@pytest.mark.parametrize("how", ["kept", "closed", "reused"])
def test_a_full_file_system(tmp_path: Path, how: str) -> None:
    """`SegmentFull`, never SIGBUS, and on it goes when there is room."""
    folder, log = tmp_path / "small", tmp_path / "log"
    folder.mkdir()
    with mounted(folder, "size=3m"):
        process = Process(SHMDOMAINS_DIR=str(folder))
        party = process.party
        try:
            party.do("import test_descriptors as own\ndoms = DomainList.create(max_domains=5000)")
            if how != "kept":
                party.do(f"own.lose(doms, {str(log) if how == 'reused' else None!r})")
            fill(folder / "filler")
            for room in (0, 1):
                with pytest.raises(SegmentFull, match="No space left on device"):
                    party.tell("own.grow(doms, 5000)")
                names = party.tell("[info.name for info in doms]")
                assert len(names) > 100 if room else names == []
                assert party.tell("doms.check().problems") == []
                if not room:
                    os.unlink(folder / "filler")
            party.do("with doms.get(name='vm0') as dom: dom.deactivate()")
            party.do("doms.undefine(name='vm0'); doms.define(xml('new'))")
            assert process.is_well
        finally:
            process.kill()
            party.conn.close()
    assert not log.exists() or log.read_bytes() == BYTES


# --- python-daemon -------------------------------------------------------------------------------

DAEMON = """
import json, multiprocessing, os, sys, traceback
import daemon
import test_descriptors as own
from shmdomains import DomainList

def live(keeps):
    with open(log, "a", buffering=1) as first:
        files = [first]
        while not keeps and files[-1].fileno() < number:
            files.append(open(log, "a", buffering=1))
        print("begun", file=files[-1])
        own.grow(doms, 1500)
        print("grown", file=files[-1])
        child = multiprocessing.get_context("spawn").Process(target=own.use, args=(doms,))
        try:
            child.start()
            child.join(20)
        except Exception as exc:
            spawned = type(exc).__name__
        else:
            spawned = child.exitcode, doms.peek(name="vm7").data
        doms.close()
        print("ended", file=files[-1])
        return files[-1].fileno() == number, spawned

if __name__ == "__main__":
    report, log, keeps = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
    doms = DomainList(max_domains=5000)
    number = doms.fileno()
    with daemon.DaemonContext(files_preserve=[report, doms] if keeps else [report]):
        with open(report, "w", buffering=1) as out:
            print(os.getpid(), file=out)
            try:
                said = live(keeps)
            except BaseException:
                said = traceback.format_exc()
            print(json.dumps(said), file=out)
"""


def use(doms: DomainList) -> None:
    """In a spawned child."""
    assert doms.count(active=True) == 1500
    with doms.get(name="vm7") as dom:
        dom.data = "seen"


def answers(fd: int) -> Iterator[str]:
    """The lines of a process that is no child of ours."""
    with open(fd) as lines, selectors.DefaultSelector() as ready:
        ready.register(lines, selectors.EVENT_READ)
        while ready.select(3 * DEADLINE) and (line := lines.readline()):
            yield line


@pytest.mark.parametrize("keeps", [True, False])
def test_a_daemon(tmp_path: Path, keeps: bool) -> None:
    """A log file that python-daemon let have the number holds what the daemon wrote."""
    script, log = tmp_path / "daemon_of_test.py", tmp_path / "log"
    script.write_text(DAEMON)
    ours, theirs = os.pipe()
    try:
        command = [sys.executable, str(script), str(theirs), str(log), str(keeps)]
        subprocess.run(
            command, env=environment(), pass_fds=[theirs], check=True, timeout=3 * DEADLINE
        )
    finally:
        os.close(theirs)
    lines = answers(ours)
    pid = int(next(lines))
    try:
        said = json.loads(next(lines))
        assert next(lines, None) is None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert said == ([False, [0, "seen"]] if keeps else [True, "DescriptorLost"])
    assert log.read_text() == "begun\ngrown\nended\n"
