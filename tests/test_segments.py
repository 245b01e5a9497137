"""Named segments: who creates, attaches and unlinks them, and what may lie in their place.

Everything here is a plain error or works: no crash, no hang, nothing half made, nothing left. What
could crash the interpreter (a damaged segment, a full file system) is done by a process of its own.
Every segment lies in `segment_dir`, a folder on tmpfs of the test's own.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import pickle
import shutil
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from helpers import Home, Party, Process, environment, thread_party, xml
from killing import Planted, sealed

import shmdomains
from shmdomains import (
    AlreadyLocked,
    DomainList,
    DomainRemoved,
    ListNotLocked,
    LockKindMismatch,
    LockTimeout,
    SegmentCorrupt,
    SegmentError,
    SegmentExists,
    SegmentFull,
    SegmentInUse,
    SegmentMismatch,
    SegmentNotFound,
    SegmentPoisoned,
    SegmentRefused,
)
from shmdomains.memory import segment_file

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.usefixtures("segment_dir")]

# Where words of the header lie (layout.h).
MAGIC, LAYOUT, SIGNATURE, BOOT, PID_NAMESPACE, KIND, TOTAL, MAX_SLOTS, HEAP_CELLS = (
    0, 8, 16, 24, 40, 48, 56, 64, 72,
)  # fmt: skip
POISONED, LIST_SEQUENCE = 192, 384

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")


@pytest.fixture
def place(segment_dir: Path) -> Path:
    """Where the segment named ``s`` lies."""
    return segment_dir / "s.segment"


@pytest.fixture
def party(segment_dir: Path) -> Iterator[Party]:
    """A process of its own that sees the same folder and may be lost."""
    process = Process(SHMDOMAINS_DIR=str(segment_dir))
    yield process.party
    process.kill()
    process.party.conn.close()


def let_go(doms: DomainList) -> None:
    """Close a list that nothing else refers to; the mapping goes with the caller's reference."""
    doms.close()
    gc.collect()


def made(name: str = "s", **options: Any) -> None:
    """Leave a segment that nobody is attached to."""
    doms = DomainList.create(name, **{"max_domains": 16, **options})
    doms.define(xml("web1"))
    let_go(doms)


def word(path: Path, offset: int) -> int:
    with open(path, "rb") as file:
        return struct.unpack("<Q", os.pread(file.fileno(), 8, offset))[0]


def put_word(path: Path, offset: int, value: int) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), struct.pack("<Q", value), offset)


# --- create, attach, open ----------------------------------------------------------------------


def test_create_and_attach(segment_dir: Path, place: Path, party: Party) -> None:
    doms = DomainList.create("s", max_domains=16)
    doms.define(xml("web1"))
    assert (doms.info.name, doms.info.path, doms.info.max_domains) == ("s", str(place), 16)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert os.listdir(segment_dir) == ["s.segment"]
    party.tell("doms = DomainList.attach('s')")
    assert party.tell("[info.name for info in doms], doms.info.name, doms.info.max_domains") == (
        ["web1"], "s", 16,
    )  # fmt: skip
    party.tell("with doms.get(name='web1') as dom: dom.pid = 7")
    assert doms.peek(name="web1").pid == 7
    assert {process.pid for process in doms.info.attached} == {os.getpid(), party.pid}
    assert doms.info.creator.pid == os.getpid()
    assert str(place) in repr(doms)
    doms.close()


def test_a_segment_outlives_its_processes(place: Path) -> None:
    made()
    with DomainList.attach("s") as doms:
        assert [info.name for info in doms] == ["web1"]
        assert [process.pid for process in doms.info.attached] == [os.getpid()]


def test_create_twice(place: Path) -> None:
    with DomainList.create("s") as doms:
        doms.define(xml("web1"))
        with pytest.raises(SegmentExists) as caught:
            DomainList.create("s", max_domains=4)
        assert isinstance(caught.value, FileExistsError) and str(place) in str(caught.value)
        assert len(doms) == 1


def test_attach_to_nothing(place: Path) -> None:
    for call in (
        lambda: DomainList.attach("s"),
        lambda: DomainList.attach(path=place),
        lambda: DomainList.attach(path=place / "deeper" / "x"),
        lambda: shmdomains.unlink("s"),
        lambda: shmdomains.unlink(path=place, force=True),
    ):
        with pytest.raises(SegmentNotFound) as caught:
            call()
        assert isinstance(caught.value, FileNotFoundError) and str(place) in str(caught.value)


ALICE, BOB, STAFF = 54321, 54322, 54399
"""Users and a group that nobody has; a number is all that the kernel wants."""


def test_open_creates_or_attaches(place: Path) -> None:
    with (
        DomainList.open("s", max_domains=5) as first,
        DomainList.open("s") as second,
    ):
        assert second.info.max_domains == 5
        first.define(xml("web1"))
        assert len(second) == 1


OPTIONS: dict[str, tuple[Any, Any]] = {
    "max_domains": (8, 99),
    "max_bytes": (5_000_001, 6_000_000),
    "lock": ("robust", "multiprocessing"),
    "mode": (0o600, 0o660),
    "group": (os.getegid(), ALICE),
}
"""What a segment is made with, and what it is not."""


@pytest.mark.parametrize("option", OPTIONS)
def test_open_says_what_is_not_as_asked(place: Path, option: str) -> None:
    made, other = {key: value for key, (value, _) in OPTIONS.items()}, OPTIONS[option][1]
    with DomainList.open("s", **made) as doms:
        with DomainList.open("s", **made) as same, DomainList.open("s") as any_will_do:
            assert same.info.max_domains == any_will_do.info.max_domains == 8
        with pytest.raises(SegmentMismatch) as caught:
            DomainList.open("s", **{option: other})
        shown = f"{other:#o}" if option == "mode" else repr(other)
        assert f"{option}={shown} is asked for" in str(caught.value)
        assert f"is there with {option}=" in str(caught.value) and str(place) in str(caught.value)
        assert [one.pid for one in doms.info.attached] == [os.getpid()]  # and is not attached to
        with pytest.raises(SegmentMismatch, match="max_domains=7, lock='multiprocessing' is asked"):
            DomainList.open("s", max_domains=7, lock="multiprocessing", mode=0o600)
    gc.collect()
    shmdomains.unlink("s")


@pytest.mark.parametrize("there", [False, True])
def test_an_option_that_there_is_not_is_refused(place: Path, there: bool) -> None:
    if there:
        made()
    for wrong in ({"max_domain": 3}, {"locks": "robust"}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(wrong))}'"):
            DomainList.open("s", **wrong)  # type: ignore[arg-type]
    for wrong in ({"max_domains": 0}, {"lock": "none"}, {"mode": 0o777}, {"timeout": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
            DomainList.open("s", **wrong)  # type: ignore[arg-type]
    assert place.exists() == there


def test_a_name_where_none_can_be_says_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"DomainList\.open\('web'\)"):
        DomainList("web")  # type: ignore[arg-type]
    for call in (DomainList.open, DomainList.create, DomainList.attach, shmdomains.unlink):
        with pytest.raises(
            TypeError, match=r"a segment's name is a str, not .*Path; a file is path="
        ):
            call(Path("/tmp/s"))  # type: ignore[operator]


def test_who_made_it_is_told(segment_dir: Path, stranger: Party, home: Home) -> None:
    with DomainList() as memfd:
        assert memfd.created
    with DomainList.open("s", max_domains=8) as first, DomainList.open("s") as second:
        assert first.created and not second.created
        path = first.info.path
        assert stranger.tell(f"doms = DomainList.open(path={path!r}); doms.created") is False
        stranger.do("doms.close()")
    child = home.begin("fork", doms="DomainList(max_domains=8)")
    assert child.tell("doms.created") is False  # its parent did
    child.leave()
    shmdomains.unlink("s")
    with DomainList.create("s", max_domains=8) as doms:
        assert doms.created
        doms.unlink()


STOPPED = """
import fcntl, os, signal
fd = os.open({path!r}, os.O_RDONLY)
fcntl.flock(fd, fcntl.LOCK_EX)
"""


@pytest.mark.timeout(60)
def test_a_stopped_unlink_is_not_waited_for_without_end(place: Path, stranger: Party) -> None:
    made()
    stranger.do(STOPPED.format(path=str(place)))
    for call in (DomainList.attach, DomainList.open):
        for timeout in (0, 0.05):
            with pytest.raises(LockTimeout, match=f"{place} is kept locked.*pid {stranger.pid} "):
                call("s", timeout=timeout)
    stranger.do("os.close(fd)")
    stranger.do(STOPPED.format(path=str(place.parent)))
    for call in (
        lambda: shmdomains.unlink("s", timeout=0.05),
        lambda: DomainList.open("t", max_domains=8, timeout=0.05),
        lambda: DomainList.create("t", max_domains=8, timeout=0),
    ):
        with pytest.raises(LockTimeout, match=f"{place.parent}, .*pid {stranger.pid} "):
            call()
    with DomainList.attach("s") as doms, pytest.raises(LockTimeout):
        doms.unlink(timeout=0)
    stranger.do("os.close(fd)")
    gc.collect()
    shmdomains.unlink("s", timeout=0)


@pytest.mark.timeout(60)
def test_an_unlink_that_is_refused_does_not_wait_for_its_own_lock(
    place: Path, stranger: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask for the exclusive lock gives up the shared one, and then somebody else may have it."""
    made()

    def another_one_is_faster(path: Path, fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)
        stranger.do(STOPPED.format(path=str(path)))
        raise SegmentInUse("made to fail")

    with DomainList.attach("s") as doms, monkeypatch.context() as patch:
        patch.setattr(segment_file, "_lock_exclusively", another_one_is_faster)
        with pytest.raises(LockTimeout, match=f"{place} is kept locked.*pid {stranger.pid} "):
            doms.unlink(timeout=0.05)
        stranger.do("os.close(fd)")
    gc.collect()
    shmdomains.unlink("s", timeout=0)


OTHER_CONTEXT = """
import multiprocessing
from shmdomains import DomainList, LockKindMismatch
fork, spawn = (multiprocessing.get_context(way) for way in ("fork", "spawn"))
with DomainList(max_domains=2, lock="multiprocessing", context=fork) as doms:
    try:
        spawn.Process(target=len, args=(doms,)).start()
    except LockKindMismatch as exc:
        print(exc)
with DomainList(max_domains=2, lock="multiprocessing", context=spawn) as doms:
    process = spawn.Process(target=len, args=(doms,))
    process.start()
    process.join()
    print(process.exitcode)
"""


def test_locks_of_another_context_are_refused_in_our_words() -> None:
    """`multiprocessing` itself does not say what to write. In a process of its own, since it starts
    one that stays."""
    done = subprocess.run(
        [sys.executable, "-c", OTHER_CONTEXT],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert done.stderr == "" and done.returncode == 0
    refused, exit_code = done.stdout.splitlines()
    assert "context=multiprocessing.get_context('spawn')" in refused and exit_code == "0"


def test_the_default_name(segment_dir: Path) -> None:
    with DomainList.create() as doms:
        assert doms.info.name == "default" and os.listdir(segment_dir) == ["default.segment"]
        with DomainList.open() as same, DomainList.attach() as again:
            assert same.info.path == again.info.path == doms.info.path
    shmdomains.unlink(force=True)
    assert os.listdir(segment_dir) == []


@pytest.mark.parametrize("name", ["a", "x" * 200, "grüße", "with space", "a.b", "-", "~"])
def test_names_of_segments(segment_dir: Path, name: str) -> None:
    with DomainList.create(name, max_domains=4) as doms:
        assert doms.info.name == name
        assert [(one.name, one.path) for one in shmdomains.segments()] == [
            (name, segment_dir / f"{name}.segment")
        ]
        DomainList.attach(name).close()
        doms.unlink()
    assert shmdomains.segments() == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".x",
        "a/b",
        "/etc/x",
        "../x",
        "a\0b",
        "x" * 201,
        "a\n",
        "a\tb",
        "\x7f",
        "\u202egpj",
        "\ud800",
    ],
)
def test_what_is_no_name(segment_dir: Path, name: str) -> None:
    for call in (DomainList.create, DomainList.attach, DomainList.open, shmdomains.unlink):
        with pytest.raises(SegmentRefused):
            call(name)
    assert os.listdir(segment_dir) == []


def test_a_name_or_a_path(place: Path) -> None:
    for call in (DomainList.create, DomainList.attach, DomainList.open, shmdomains.unlink):
        with pytest.raises(TypeError):
            call("s", path=place)


def test_a_path_of_ones_own(segment_dir: Path, tmp_path: Path) -> None:
    path = segment_dir / "deeper" / "any name"
    with DomainList.create(path=path, max_domains=4) as doms:
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert (doms.info.name, doms.info.path) == (None, str(path))
        with DomainList.attach(path=str(path)) as same:
            assert same.info.path == str(path)
        assert shmdomains.segments() == []
        doms.unlink()
        assert not path.exists()


def test_the_folder_is_made_for_us_alone(
    segment_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMDOMAINS_DIR", str(segment_dir / "new"))
    assert shmdomains.segments() == []
    with DomainList.create("s"):
        assert stat.S_IMODE((segment_dir / "new").stat().st_mode) == 0o700


@pytest.mark.parametrize("blocked", ["a file's child", "no parent"])
def test_where_no_folder_can_be_made(segment_dir: Path, blocked: str) -> None:
    (segment_dir / "file").write_text("")
    parent = "file/sub" if blocked == "a file's child" else "no/such/folder"
    for call in (DomainList.create, DomainList.open):
        with pytest.raises(SegmentError):
            call(path=segment_dir / parent / "s")
    with pytest.raises(SegmentError):
        DomainList.create(path=segment_dir / "file" / "s")


def test_segments_lists_what_is_there(segment_dir: Path) -> None:
    for name in ("b", "a"):
        made(name)
    (segment_dir / "other.txt").write_text("")
    found = shmdomains.segments()
    assert [one.name for one in found] == ["a", "b"]
    for one in found:
        assert (one.uid, one.mode) == (os.getuid(), 0o600)
        assert 0 < one.bytes < 2 << 20


def test_bad_modes() -> None:
    for mode in (0o666, 0o644, 0o400, 0, 0o640, 0o777):
        with pytest.raises(ValueError):
            DomainList.create("s", mode=mode)
    assert shmdomains.segments() == []


def test_an_unknown_group() -> None:
    with pytest.raises(SegmentRefused, match="no group"):
        DomainList.create("s", mode=0o660, group="no such group, surely")
    assert shmdomains.segments() == []


def test_a_creation_that_fails_leaves_nothing(segment_dir: Path, place: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    for bad in ({"max_domains": 0}, {"max_bytes": 1}, {"lock": "none"}, {"mode": 0o777}):
        with pytest.raises(ValueError):
            DomainList.create("s", **bad)

    def fails(fd: int) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        segment_file.create(place, 0o600, None, fails)
    assert os.listdir(segment_dir) == [] and len(os.listdir("/proc/self/fd")) == fds


def test_a_killed_creator_leaves_nothing(segment_dir: Path, party: Party) -> None:
    party.start(
        "from pathlib import Path\n"
        "def die(fd): os.ftruncate(fd, 1 << 20); os.kill(os.getpid(), signal.SIGKILL)\n"
        "from shmdomains.memory import segment_file\n"
        f"segment_file.create(Path({str(segment_dir / 's.segment')!r}), 384, None, die)"
    )
    with pytest.raises((EOFError, ConnectionResetError)):
        party.answer()
    assert os.listdir(segment_dir) == []
    made()


# --- two attachments in one process ------------------------------------------------------------


def test_two_attachments_are_one_segment() -> None:
    first = DomainList.create("s", max_domains=16)
    second = DomainList.attach("s")
    first.define(xml("web1"))
    with first.get(name="web1") as dom:
        twin = pickle.loads(pickle.dumps(dom))
        assert dom == twin and twin.is_locked
        with pytest.raises(AlreadyLocked):
            second.get(name="web1", timeout=0)
        dom.pid = 7
    with second.get(name="web1") as dom:
        assert dom.pid == 7
    with first.locked():
        assert second.is_locked  # by this thread, whichever attachment it was
        with pytest.raises(AlreadyLocked):
            second.lock(0)
    first.close()
    assert [info.name for info in second] == ["web1"]
    with second.get(name="web1") as dom:
        dom.pid = 8
    second.close()


@pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
def test_closing_one_attachment_leaves_the_others_lock(lock: Any) -> None:
    first = DomainList.create("s", max_domains=16, lock=lock)
    second = DomainList.attach("s")
    first.lock()
    second.close()
    assert second.closed and first.is_locked
    first.unlock()
    first.close()


# --- races -------------------------------------------------------------------------------------

RACE = """
context = multiprocessing.get_context("fork")

def race(work, runners=6):
    barrier, results = context.Barrier(runners), context.SimpleQueue()
    def run(number):
        try:
            barrier.wait(20)
            results.put(("done", work(number)))
        except BaseException as exc:
            results.put((type(exc).__name__, str(exc)))
    runs = [context.Process(target=run, args=(number,)) for number in range(runners)]
    for one in runs: one.start()
    got = [results.get() for _ in runs]
    for one in runs: one.join(20)
    return got
"""


def test_a_race_to_open(home: Home, segment_name: str) -> None:
    """Whoever comes first creates it; all are in the same one."""
    home.party.tell(RACE)
    for _ in range(10):
        got = home.party.tell(
            "def work(number):\n"
            f"    doms = DomainList.open({segment_name!r}, max_domains=64)\n"
            "    doms.define(xml(f'vm{number}'))\n"
            "    return doms._identity\n"
            "race(work)"
        )
        assert [how for how, _ in got] == ["done"] * 6, got
        assert len({identity for _, identity in got}) == 1
        names = home.party.tell(
            f"doms = DomainList.attach({segment_name!r})\n"
            "names = sorted(info.name for info in doms)\n"
            "doms.unlink(); doms.close(); del doms\nnames"
        )
        assert names == [f"vm{number}" for number in range(6)]


def test_a_race_to_create(home: Home, segment_name: str) -> None:
    home.party.tell(RACE)
    for _ in range(10):
        got = home.party.tell(f"race(lambda _: len(DomainList.create({segment_name!r})))")
        assert sorted(how for how, _ in got) == ["SegmentExists"] * 5 + ["done"], got
        home.party.tell(f"unlink({segment_name!r})")


def test_a_race_of_openers_and_unlinkers(home: Home, segment_name: str) -> None:
    """Nobody ever sees half a segment, or is in one and told that it is another."""
    home.party.tell(RACE)
    got = home.party.tell(
        "def work(number):\n"
        "    for turn in range(30):\n"
        f"        with DomainList.open({segment_name!r}, max_domains=256) as doms:\n"
        "            name = f'vm{number}-{turn}'\n"
        "            doms.define(xml(name))\n"
        "            assert doms.peek(name=name).name == name\n"
        "            if number % 2:\n"
        "                try: doms.unlink(force=True)\n"
        "                except SegmentNotFound: pass\n"
        "            elif turn % 3 == 0:\n"
        f"                try: unlink({segment_name!r})\n"
        "                except (SegmentNotFound, SegmentInUse): pass\n"
        "race(work)"
    )
    assert got == [("done", None)] * 6
    home.party.tell(f"try: unlink({segment_name!r})\nexcept SegmentNotFound: pass")


def test_unlinking_without_force_splits_nobody(home: Home, segment_name: str) -> None:
    """Who is attached is in the segment that the name leads to, until somebody forces it."""
    home.party.tell(RACE)
    got = home.party.tell(
        "def work(number):\n"
        "    split = 0\n"
        "    for turn in range(150):\n"
        f"        with DomainList.open({segment_name!r}, max_domains=8) as doms:\n"
        "            if number % 2:\n"
        "                try: doms.unlink()\n"
        "                except (SegmentNotFound, SegmentInUse): pass\n"
        "                continue\n"
        "            try:\n"
        f"                with DomainList.attach({segment_name!r}) as same:\n"
        "                    split += same._identity != doms._identity\n"
        "            except SegmentNotFound: split += 1\n"
        "    return split\n"
        "race(work, 4)"
    )
    home.party.tell(f"try: unlink({segment_name!r})\nexcept SegmentNotFound: pass")
    assert got == [("done", 0)] * 4


def test_who_attaches_while_another_unlinks(
    place: Path, party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either it is attached and nothing is unlinked, or it finds nothing to attach to."""
    doms = DomainList.create("s", max_domains=8)
    honest = segment_file.is_same_file

    def somebody_attaches(path: Path, fd: int) -> bool:
        monkeypatch.setattr(segment_file, "is_same_file", honest)
        same = honest(path, fd)
        party.start("doms = DomainList.attach('s')")
        party.is_waiting()
        return same

    monkeypatch.setattr(segment_file, "is_same_file", somebody_attaches)
    with contextlib.suppress(SegmentInUse):
        doms.unlink()
    try:
        party.answer()
    except SegmentNotFound:
        assert not place.exists()
    else:
        assert place.exists(), "it is attached to a segment that has no name"
    let_go(doms)


# --- unlink ------------------------------------------------------------------------------------


def test_unlink(segment_dir: Path) -> None:
    doms = DomainList.create("s", max_domains=16)
    doms.unlink()  # we alone are attached, and keep it
    assert os.listdir(segment_dir) == []
    doms.define(xml("web1"))
    assert [info.name for info in doms] == ["web1"]
    with pytest.raises(SegmentNotFound):
        doms.unlink()
    with DomainList.create("s", max_domains=16) as second:
        assert len(second) == 0
        with pytest.raises(SegmentNotFound):
            doms.unlink(force=True)  # the name is another segment's
        assert os.listdir(segment_dir) == ["s.segment"]
    let_go(doms)


def test_a_list_without_a_name_has_nothing_to_unlink() -> None:
    with DomainList() as doms:
        doms.unlink()
        doms.unlink(force=True)


def test_unlink_while_others_are_attached(segment_dir: Path, party: Party) -> None:
    doms = DomainList.create("s", max_domains=16)
    party.tell("doms = DomainList.attach('s')")
    for call in (doms.unlink, lambda: shmdomains.unlink("s")):
        with pytest.raises(SegmentInUse) as caught:
            call()
        assert "force" in str(caught.value)
    assert os.listdir(segment_dir) == ["s.segment"]
    with pytest.raises(SegmentInUse, match=str(party.pid)):
        doms.unlink()
    doms.unlink(force=True)
    assert os.listdir(segment_dir) == []
    # Both keep it, and share it.
    party.tell("doms.define(xml('web1')).name")
    assert [info.name for info in doms] == ["web1"]
    with DomainList.open("s") as second:
        assert len(second) == 0
    let_go(doms)


def test_unlink_after_the_others_left(segment_dir: Path, party: Party) -> None:
    doms = DomainList.create("s", max_domains=16)
    party.tell("doms = DomainList.attach('s')")
    with pytest.raises(SegmentInUse):
        doms.unlink()
    party.tell("doms.close(); del doms; gc.collect()")
    assert [process.pid for process in doms.info.attached] == [os.getpid()]
    doms.unlink()
    let_go(doms)


def test_a_handle_that_is_kept_keeps_the_segment_in_use(party: Party) -> None:
    """It might be locked; so the mapping stays until the last handle is gone, closed or not."""
    doms = DomainList.create("s", max_domains=16)
    doms.define(xml("web1"))
    party.tell("doms = DomainList.attach('s'); dom = doms.get(name='web1'); doms.close()")
    with pytest.raises(SegmentInUse, match=str(party.pid)):
        doms.unlink()
    with pytest.raises(shmdomains.LockTimeout):
        doms.get(name="web1", timeout=0)
    party.tell("dom.pid = 7; dom.unlock(); del dom, doms; gc.collect()")
    assert doms.peek(name="web1").pid == 7
    assert [process.pid for process in doms.info.attached] == [os.getpid()]
    doms.unlink()
    let_go(doms)


def test_a_dead_process_does_not_keep_it(segment_dir: Path) -> None:
    doms = DomainList.create("s", max_domains=16)
    process = Process(SHMDOMAINS_DIR=str(segment_dir))
    process.party.tell("doms = DomainList.attach('s'); doms.lock()")
    assert len(doms.info.attached) == 2
    process.kill()
    process.party.conn.close()
    assert [one.pid for one in doms.info.attached] == [os.getpid()]
    doms.lock(timeout=10)
    doms.unlock()
    doms.unlink()
    let_go(doms)


def test_a_forked_child_is_attached(home: Home, stranger: Party, segment_name: str) -> None:
    home.party.tell(f"doms = DomainList.create({segment_name!r}, max_domains=8)")
    child = home.begin("fork", doms="doms")
    # It inherited the descriptor and has not used the list yet: a stranger sees it in use.
    home.party.tell("doms.close(); del doms; gc.collect()")
    with pytest.raises(SegmentInUse):
        stranger.tell(f"unlink({segment_name!r})")
    child.tell("len(doms)")
    stranger.tell(f"doms = DomainList.attach({segment_name!r})")
    assert child.pid in stranger.tell("[process.pid for process in doms.info.attached]")
    with pytest.raises(SegmentInUse, match=str(child.pid)):
        stranger.tell("doms.unlink()")
    child.leave()
    home.party.tell("reap()")
    stranger.tell("doms.unlink(); doms.close()")


def test_a_forked_child_that_has_not_used_it_has_it_in_use(home: Home, segment_name: str) -> None:
    home.party.tell(f"doms = DomainList.create({segment_name!r}, max_domains=8)")
    child = home.begin("fork", doms="doms")
    with pytest.raises(SegmentInUse, match=str(child.pid)):
        home.party.tell("doms.unlink()")
    child.tell("with doms.locked(): pass")  # it still has a name
    child.leave()
    home.party.tell("reap()\ndoms.unlink(); doms.close(); del doms")


def test_a_killed_child_that_nobody_waited_for_has_nothing_in_use(
    home: Home, segment_name: str
) -> None:
    home.party.tell(f"doms = DomainList.create({segment_name!r}, max_domains=8)")
    pid = home.party.tell(
        "told, tell = os.pipe()\n"
        "pid = os.fork()\n"
        "if not pid: len(doms); os.write(tell, b'.'); signal.pause()\n"
        "os.read(told, 1)\n"
        "assert pid in [one.pid for one in doms.info.attached]\n"
        "os.kill(pid, signal.SIGKILL)\n"
        "os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)\n"
        "pid"
    )
    assert Path(f"/proc/{pid}").exists()
    home.party.tell(
        "assert pid not in [one.pid for one in doms.info.attached]\n"
        "doms.unlink(); doms.close(); del doms; os.waitpid(pid, 0); os.close(told); os.close(tell)"
    )


def test_a_pickle_of_a_segment_that_was_made_anew(party: Party) -> None:
    doms = DomainList.create("s", max_domains=16)
    doms.define(xml("web1"))
    dom = doms.get(name="web1")
    dom.unlock()
    pickled = pickle.dumps(doms), pickle.dumps(dom)
    assert party.tell(f"len(pickle.loads({pickled[0]!r}))") == 1  # a stranger finds it by name
    party.tell(f"with pickle.loads({pickled[1]!r}) as dom: dom.pid = 9")
    assert doms.peek(name="web1").pid == 9
    party.tell("del dom; gc.collect()")
    doms.unlink()
    for pid in (1, 2):  # who pickled it has it still
        party.tell(f"with pickle.loads({pickled[1]!r}) as dom: dom.pid = {pid}")
        assert doms.peek(name="web1").pid == pid
        party.tell("del dom; gc.collect()")
        if pid == 1:
            anew = DomainList.create("s", max_domains=16)
    assert len(anew) == 0
    del dom
    let_go(doms)
    for blob in pickled:
        with pytest.raises(SegmentMismatch, match="anew"):
            party.tell(f"pickle.loads({blob!r}).lock()")
    anew.unlink()
    let_go(anew)
    for blob in pickled:
        with pytest.raises(SegmentNotFound, match="no such segment"):
            party.tell(f"pickle.loads({blob!r}).lock()")


# --- what does not fit -------------------------------------------------------------------------

MISFITS: dict[str, tuple[int, type[SegmentError], str]] = {
    "magic": (MAGIC, SegmentMismatch, "no shmdomains segment"),
    "layout": (LAYOUT, SegmentMismatch, "layout version"),
    "signature": (SIGNATURE, SegmentMismatch, "sizes"),
    "boot": (BOOT, SegmentMismatch, "boot"),
    "boot, second half": (BOOT + 8, SegmentMismatch, "boot"),
    "pid namespace": (PID_NAMESPACE, SegmentMismatch, "PID namespace"),
    "kind of lock": (KIND, SegmentCorrupt, "kind of lock"),
    "size": (TOTAL, SegmentCorrupt, "limits"),
    "slots": (MAX_SLOTS, SegmentCorrupt, "limits"),
    "heap": (HEAP_CELLS, SegmentCorrupt, "limits"),
}


@pytest.mark.parametrize("what", MISFITS)
@pytest.mark.parametrize("change", [1, 1 << 40, (1 << 64) - 1], ids=hex)
def test_a_misfit_is_named(place: Path, what: str, change: int) -> None:
    offset, error, words = MISFITS[what]
    made()
    put_word(place, offset, word(place, offset) ^ change)
    before = place.read_bytes()
    for call in (DomainList.attach, DomainList.open):
        with pytest.raises(error) as caught:
            call("s")
        assert words in str(caught.value) and str(place) in str(caught.value)
    if what == "layout":
        assert "export" in str(caught.value) and "import" in str(caught.value)
    assert place.read_bytes() == before
    put_word(place, offset, word(place, offset) ^ change)
    with DomainList.attach("s") as doms:  # nothing was harmed
        assert len(doms) == 1 and doms.check()
    gc.collect()
    shmdomains.unlink("s")


def test_a_misfit_can_be_unlinked(segment_dir: Path, place: Path) -> None:
    made()
    put_word(place, LAYOUT, 99)
    shmdomains.unlink("s")
    assert os.listdir(segment_dir) == []


def test_what_is_no_segment_at_all(place: Path) -> None:
    for content in (b"", b"hello", b"\0" * (1 << 20), os.urandom(1 << 20)):
        place.write_bytes(content)
        place.chmod(0o600)
        with pytest.raises(SegmentMismatch):
            DomainList.attach("s")
        with pytest.raises(SegmentExists):
            DomainList.create("s")
        assert place.read_bytes() == content


def put_symlink(place: Path) -> None:
    made("real")
    place.symlink_to("real.segment")


def put_dangling_symlink(place: Path) -> None:
    place.symlink_to("nowhere")


def put_fifo(place: Path) -> None:
    os.mkfifo(place, 0o600)


def put_socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place))


INTRUDERS: dict[str, Callable[[Path], None]] = {
    "symlink": put_symlink,
    "dangling symlink": put_dangling_symlink,
    "fifo": put_fifo,
    "socket": put_socket,
    "directory": lambda place: place.mkdir(mode=0o700),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", INTRUDERS)
def test_something_else_in_its_place(segment_dir: Path, place: Path, what: str) -> None:
    INTRUDERS[what](place)
    before = sorted(os.listdir(segment_dir)), place.lstat().st_ino
    for call in (
        lambda: DomainList.attach("s"),
        lambda: DomainList.open("s"),
        lambda: shmdomains.unlink("s"),
        lambda: shmdomains.unlink("s", force=True),
    ):
        with pytest.raises(SegmentRefused) as caught:
            call()
        assert isinstance(caught.value, PermissionError) and str(place) in str(caught.value)
    with pytest.raises(SegmentExists):
        DomainList.create("s")
    assert (sorted(os.listdir(segment_dir)), place.lstat().st_ino) == before


@pytest.mark.parametrize("mode", [0o666, 0o644, 0o640, 0o400, 0o700, 0o606, 0o4600], ids=oct)
def test_a_wrong_mode(place: Path, mode: int) -> None:
    made()
    place.chmod(mode)
    for call in (DomainList.attach, DomainList.open):
        with pytest.raises(SegmentRefused, match=f"{mode:04o}" if os.getuid() == 0 else ""):
            call("s")
    assert stat.S_IMODE(place.stat().st_mode) == mode
    place.chmod(0o600)
    DomainList.attach("s").close()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702], ids=oct)
def test_a_folder_where_others_may_write(segment_dir: Path, mode: int) -> None:
    made()
    segment_dir.chmod(mode)
    for call in (DomainList.attach, DomainList.open, DomainList.create):
        with pytest.raises(SegmentRefused, match="writable"):
            call("s")
    segment_dir.chmod(0o1777)  # sticky, like /tmp
    DomainList.attach("s").close()


# --- other users -------------------------------------------------------------------------------


def test_a_foreign_users_segment(
    segment_dir: Path, place: Path, as_user: Callable[..., Party]
) -> None:
    made()
    alice = as_user(ALICE)
    for call in ("DomainList.attach('s')", "DomainList.open('s')", "unlink('s')"):
        with pytest.raises(SegmentRefused):
            alice.do(call)
    with pytest.raises(SegmentRefused):  # nor can she make one where she may not write
        alice.do("DomainList.create('mine')")
    os.chown(place, ALICE, ALICE)
    for call in (DomainList.attach, DomainList.open, shmdomains.unlink):  # root looks too
        with pytest.raises(SegmentRefused, match=str(ALICE)):
            call("s")
    with pytest.raises(SegmentRefused):
        as_user(BOB).do("DomainList.attach('s')")
    assert place.exists()


def test_a_user_and_her_own_segment(segment_dir: Path, as_user: Callable[..., Party]) -> None:
    own = segment_dir / "alice"
    own.mkdir(mode=0o755)
    os.chown(own, ALICE, ALICE)
    alice = as_user(ALICE, SHMDOMAINS_DIR=str(own))
    alice.tell("doms = DomainList.create('s'); doms.define(xml('web1')).name")
    assert alice.tell("[(one.uid, one.mode) for one in segments()]") == [(ALICE, 0o600)]
    with pytest.raises(SegmentRefused):
        as_user(BOB, SHMDOMAINS_DIR=str(own)).do("DomainList.attach('s')")
    second = as_user(ALICE, SHMDOMAINS_DIR=str(own))
    assert second.tell("doms = DomainList.attach('s'); [info.name for info in doms]") == ["web1"]
    second.tell("dom = doms.get(name='web1')")
    with pytest.raises(shmdomains.LockTimeout) as caught:
        alice.tell("doms.get(name='web1', timeout=0)")
    assert caught.value.holder is not None and caught.value.holder.pid == second.pid


def test_roots_folder_is_trusted(segment_dir: Path, as_user: Callable[..., Party]) -> None:
    """What root made for a group, a member uses; a stranger to the group does not."""
    shared = segment_dir / "shared"
    doms = DomainList.create(path=shared / "s", max_domains=16, mode=0o660, group=STAFF)
    folder, file = shared.stat(), (shared / "s").stat()
    assert (stat.S_IMODE(folder.st_mode), folder.st_gid) == (0o2750, STAFF)
    assert (stat.S_IMODE(file.st_mode), file.st_gid) == (0o660, STAFF)
    doms.define(xml("web1"))
    member = as_user(ALICE, STAFF)
    member.tell(f"doms = DomainList.attach(path={str(shared / 's')!r})")
    member.tell("doms.define(xml('web2')); dom = doms.get(name='web1'); dom.pid = 5")
    with pytest.raises(shmdomains.LockTimeout) as caught:
        doms.get(name="web1", timeout=0)
    assert caught.value.holder is not None and caught.value.holder.pid == member.pid
    member.tell("dom.unlock()")
    assert doms.peek(name="web1").pid == 5 and len(doms) == 2
    with pytest.raises(SegmentRefused):
        as_user(BOB).do(f"DomainList.attach(path={str(shared / 's')!r})")
    with pytest.raises((SegmentInUse, SegmentRefused)):
        member.tell("doms.unlink()")
    let_go(doms)


def test_a_members_segment_is_the_groups(segment_dir: Path, as_user: Callable[..., Party]) -> None:
    """The owner need not be us if mode and group match."""
    room = segment_dir / "room"
    room.mkdir()
    os.chown(room, ALICE, STAFF)
    room.chmod(0o2750)
    path = str(room / "s")
    alice = as_user(ALICE, STAFF)
    alice.tell(f"doms = DomainList.create(path={path!r}, mode=0o660, group={STAFF})")
    alice.tell("doms.define(xml('web1')).name")
    bob = as_user(BOB, STAFF)
    assert bob.tell(f"doms = DomainList.attach(path={path!r}); len(doms)") == 1
    bob.tell("with doms.get(name='web1') as dom: dom.pid = 6")
    assert alice.tell("doms.peek(name='web1').pid") == 6
    os.chmod(path, 0o600)  # the group was taken off
    with pytest.raises(SegmentRefused):
        as_user(BOB, STAFF).do(f"DomainList.attach(path={path!r})")
    os.chmod(path, 0o660)
    room.chmod(0o2770)  # anybody of the group might have put it there
    with pytest.raises(SegmentRefused):
        as_user(BOB, STAFF).do(f"DomainList.attach(path={path!r})")


@needs_root
def test_a_service_that_dropped_root_creates_a_segment(segment_dir: Path, party: Party) -> None:
    """Without exec after setuid a process may not look into its own /proc/self/fd."""
    own = segment_dir / "service"
    own.mkdir(mode=0o700)
    os.chown(own, ALICE, ALICE)
    segment_dir.chmod(0o755)
    party.tell("shmdomains.preload()")  # root alone may be able to read it
    party.tell(f"os.setgroups([]); os.setgid({ALICE}); os.setuid({ALICE})")
    party.tell(
        f"os.environ['SHMDOMAINS_DIR'] = {str(own)!r}\n"
        "doms = DomainList.create('s', max_domains=8); doms.define(xml('web1')).name"
    )
    assert party.tell("[info.name for info in DomainList.attach('s')]") == ["web1"]


def test_the_folder_without_an_override(
    segment_dir: Path, tmp_path: Path, as_user: Callable[..., Party]
) -> None:
    """$XDG_RUNTIME_DIR if it is on tmpfs, else a folder of one's own in /dev/shm."""
    runtime = segment_dir / "runtime"
    runtime.mkdir(mode=0o700)
    os.chown(runtime, ALICE, ALICE)
    alice = as_user(ALICE, SHMDOMAINS_DIR="", XDG_RUNTIME_DIR=str(runtime))
    alice.tell("doms = DomainList.create('s')")
    assert (runtime / "shmdomains" / "s.segment").is_file()
    assert alice.tell("[one.name for one in segments()]") == ["s"]
    alice.tell("doms.unlink()")
    fallback = Path(f"/dev/shm/shmdomains-{ALICE}")
    alice = as_user(ALICE, SHMDOMAINS_DIR="", XDG_RUNTIME_DIR="/proc")
    try:
        alice.tell("doms = DomainList.create('s')")
        assert (fallback / "s.segment").is_file()
        assert stat.S_IMODE(fallback.stat().st_mode) == 0o700
        alice.tell("doms.unlink()")
    finally:
        shutil.rmtree(fallback, ignore_errors=True)


# --- large -------------------------------------------------------------------------------------


def test_room_for_a_million_domains(place: Path) -> None:
    """Memory is committed as it is used: an empty list of a million is a small one."""
    for doms in (DomainList(max_domains=1_000_000), DomainList.create("s", max_domains=1_000_000)):
        assert doms.info.max_domains == 1_000_000
        assert doms.info.bytes_committed < 1 << 20
        assert doms.info.bytes_max > 1 << 30
        doms.define(xml("web1"))
        assert doms.peek(name="web1").name == "web1" and doms.check()
        assert doms.info.bytes_committed < 2 << 20
        doms.close()
    assert place.stat().st_blocks * 512 < 2 << 20


def test_the_limit_of_the_format(place: Path) -> None:
    with DomainList.create("s", max_domains=(1 << 24) - 2) as doms:
        doms.define(xml("web1"))
        assert doms.info.bytes_committed < 4 << 20 and doms.check()
        doms.unlink()


def test_more_multiprocessing_locks_than_a_process_can_map(segment_dir: Path) -> None:
    def maps() -> int:
        with open("/proc/self/maps") as file:
            return sum(1 for _ in file)

    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    before = maps()
    for call in (
        lambda: DomainList(max_domains=limit, lock="multiprocessing"),
        lambda: DomainList.create("s", max_domains=1_000_000, lock="multiprocessing"),
    ):
        if limit > 900_000:
            pytest.skip(f"vm.max_map_count is {limit} here")
        with pytest.raises(SegmentFull) as caught:
            call()
        assert "max_map_count" in str(caught.value) and "robust" in str(caught.value)
    assert maps() <= before + 10 and os.listdir(segment_dir) == []


def test_ids_come_to_an_end(place: Path) -> None:
    """2^31-1 is the last; after it an error, and no id twice."""
    doms = DomainList.create("s", max_domains=16)
    doms.define(xml("web1"))
    header = place.read_bytes()[:8192]
    with doms.get(name="web1") as dom:
        assert dom.activate() == 1
        dom.rollback()  # only the next id moved
    moved = [
        at
        for at in range(0, 8192, 8)
        if struct.unpack_from("<Q", header, at) == (sealed(1),) and word(place, at) == sealed(2)
    ]
    assert len(moved) == 1, "found by its change from 1 to 2"
    put_word(place, moved[0], sealed(2**31 - 1))
    with doms.get(name="web1") as dom:
        assert dom.activate() == 2**31 - 1
        dom.commit()
        assert doms.peek(id=2**31 - 1).name == "web1" and doms.check()
        dom.deactivate()
        dom.commit()
        for _ in range(2):
            with pytest.raises(SegmentFull, match="2147483647"):
                dom.activate(pid=7)
            assert (dom.id, dom.pid, dom.changed) == (-1, None, False)
    with doms.get(name="web1") as dom:
        assert not dom.is_active
    doms.close()


# --- strangers and multiprocessing locks -------------------------------------------------------


@pytest.fixture
def inherited(segment_dir: Path) -> Iterator[DomainList]:
    """A named list with multiprocessing locks, which `party` did not inherit."""
    doms = DomainList.create("s", max_domains=16, lock="multiprocessing")
    doms.define(xml("web1"))
    doms.define(xml("web2"))
    with doms.get(name="web2") as dom:
        dom.activate(pid=7)
        dom.data = {"a": 1}
    yield doms
    assert not doms.is_locked
    doms.close()


def test_a_stranger_may_read(inherited: DomainList, party: Party) -> None:
    party.tell("doms = DomainList.attach('s')")
    number = inherited.peek(name="web2").id
    with inherited.locked(), inherited.find_by_name("web1"):  # whoever holds what
        assert party.tell("[info.name for info in doms]") == ["web1", "web2"]
        assert party.tell("[info.name for info in doms.list(active=True)]") == ["web2"]
        assert party.tell("doms.count(), len(doms), doms.info.domains, doms.info.lock") == (
            2, 2, 2, "multiprocessing",
        )  # fmt: skip
        assert party.tell(f"doms.peek(id={number}).name, doms.peek(name='x')") == ("web2", None)
        assert party.tell("info = doms.peek(name='web2'); info.data['a'], info.uuid in doms") == (
            1, True,
        )  # fmt: skip
        assert party.tell("info.definition.name, doms.check().problems") == ("web2", [])
        assert party.tell("doms.lookup(name='nobody')") is None
    inherited.define(xml("web3"))
    assert party.tell("len(doms)") == 3
    party.tell("doms.close()")


NEED_A_LOCK = [
    "doms.lock()",
    "doms.lock(0)",
    "doms.acquire(False)",
    "doms.locked().__enter__()",
    "doms.get(name='web1')",
    "doms.get(name='web1', timeout=0)",
    "doms.lookup(name='web1')",
    "doms.lock_many([])",
    "doms.lock_many(doms.snapshot())",
    "doms.define(xml('web9'))",
    "doms.undefine(name='web1')",
    "doms.load_all_configs('/nonexistent')",
    "dom.lock()",
    "dom.lock(0)",
    "dom.try_lock()",
    "dom.acquire(False)",
    "dom.__enter__()",
]


def test_a_stranger_may_not_lock(inherited: DomainList, party: Party) -> None:
    with inherited.get(name="web1") as dom:
        pickled = pickle.dumps(dom)
    party.tell(f"doms = DomainList.attach('s'); dom = pickle.loads({pickled!r})")
    for call in NEED_A_LOCK:
        with pytest.raises(LockKindMismatch) as caught:
            party.tell(call)
        assert isinstance(caught.value, SegmentError) and "inherited" in str(caught.value), call
    for call in ("doms.find_by_name('web1')", "doms.free()"):
        with pytest.raises(ListNotLocked):
            party.tell(call)
    assert len(inherited) == 2 and inherited.check()
    party.tell("del dom; doms.close()")


def test_a_named_list_of_the_multiprocessing_kind_is_inherited(
    home: Home, segment_name: str
) -> None:
    for start in ("fork", "spawn", "forkserver"):
        home.party.tell(
            f"doms = DomainList.create({segment_name!r}, max_domains=8, lock='multiprocessing',"
            f" context=multiprocessing.get_context({start!r}))\n"
            "doms.define(xml('web1')).name"
        )
        child = home.begin(start, doms="doms")
        child.tell("dom = doms.get(name='web1'); dom.pid = 5")
        assert home.party.tell("doms.lookup(name='web2')") is None
        with pytest.raises(shmdomains.LockTimeout):
            home.party.tell("doms.get(name='web1', timeout=0)")
        child.tell("dom.unlock()")
        assert home.party.tell("doms.peek(name='web1').pid") == 5
        child.leave()
        home.party.tell("reap(); doms.unlink(); doms.close(); del doms; gc.collect()")


# --- damage ------------------------------------------------------------------------------------


def test_a_poisoned_segment_is_read_by_key_though_its_index_is_half_made(path: Path) -> None:
    """The repair gave up in the middle: the records are read instead."""
    with DomainList.create(path=path, max_domains=16) as doms, Planted(path) as planted:
        doms.define(xml("web1"))
        sequence = planted.header("list_seq")
        planted.write(sequence, planted.read(sequence) | 1)
        planted.write(planted.header("poisoned"), 1)
        assert doms.peek("web1").name == "web1" and "web1" in doms
        assert doms.peek("web2") is None


def test_a_damaged_number_of_domains_does_not_grow_the_indexes(path: Path) -> None:
    """As many domains as there are no slots for: the number is made anew, not believed."""
    with DomainList.create(path=path, max_domains=600) as doms, Planted(path) as planted:
        for number in range(200):
            doms.define(xml(f"vm{number}"))
        level = planted.read(planted.header("list_level"))
        live = planted.header("live")
        planted.write(live, planted.read(live) | 1 << 40)
        for number in range(200, 300):
            doms.define(xml(f"vm{number}"))
        assert planted.read(planted.header("list_level")) == level
        assert len(doms) == 300 and doms.check().problems == []


def test_a_poisoned_segment_can_be_read(place: Path) -> None:
    """As after a repair that failed."""
    doms = DomainList.create("s", max_domains=16)
    doms.define(xml("web1"))
    dom = doms.get(name="web1")
    dom.unlock()
    put_word(place, POISONED, 1)
    for call in (
        lambda: doms.lock(),
        lambda: doms.acquire(False),
        lambda: doms.get(name="web1"),
        lambda: doms.lookup(name="web1"),
        lambda: doms.define(xml("web2")),
        lambda: doms.undefine(name="web1"),
        lambda: dom.lock(),
        lambda: dom.try_lock(),
    ):
        with pytest.raises(SegmentPoisoned) as caught:
            call()
        assert isinstance(caught.value, SegmentError) and "export" in str(caught.value)
    assert [info.name for info in doms] == ["web1"] and len(doms) == 1
    assert doms.peek(name="web1").definition.name == "web1"
    assert not doms.is_locked and not dom.is_locked
    put_word(place, POISONED, 0)
    with dom, pytest.raises(shmdomains.LockOrder):  # nothing stayed locked
        doms.lock()
    doms.close()


@pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
def test_a_reader_passes_by_an_index_that_is_being_changed(place: Path, lock: Any) -> None:
    """A miss counts only when no writer was at work; one that never ends is simulated."""
    doms = DomainList.create("s", max_domains=16, lock=lock)
    doms.define(xml("web1"))
    doms.define(xml("web2"))
    doms.undefine(name="web2")
    uuid = doms.peek(name="web1").uuid
    even = word(place, LIST_SEQUENCE)
    assert even > 0 and even % 2 == 0
    with thread_party(doms=doms) as writer:
        writer.tell("doms.lock()")
        put_word(place, LIST_SEQUENCE, even + 1)
        for timeout in (0, 0.02, None):
            assert doms.peek(name="nobody", timeout=timeout) is None
            assert doms.peek(name="web2", timeout=timeout) is None
            assert doms.peek(name="web1", timeout=timeout).uuid == uuid
        assert uuid in doms and UUID(int=7) not in doms
        with pytest.raises(shmdomains.LockTimeout):
            doms.lookup(name="nobody", timeout=0.02)
        put_word(place, LIST_SEQUENCE, even)
        assert doms.peek(name="nobody", timeout=0) is None
        writer.tell("doms.unlock()")
    assert doms.check()
    doms.close()


def test_stale_handles_of_another_segment(place: Path) -> None:
    """A handle knows its segment, not its name."""
    doms = DomainList.create("s", max_domains=16)
    doms.define(xml("web1"))
    dom = doms.get(name="web1")
    dom.unlock()
    doms.unlink()
    with DomainList.create("s", max_domains=16) as second:
        second.define(xml("web1"))
        with second.get(name="web1") as other:
            assert other != dom
            with dom:  # lives on in the old one
                assert dom.uuid != other.uuid
    with doms.locked():
        doms.free()
    with pytest.raises(DomainRemoved):
        dom.lock()
    doms.close()
