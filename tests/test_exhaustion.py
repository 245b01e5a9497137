"""Nothing left: no memory, no descriptors, no address space, no slot, no heap, no room on disk.

Each of them is a plain error that names the thing, leaves the old state whole - segment and
directory, to the byte - and is over once there is room again: the same call then works. What could
crash a process (SIGBUS, a failed allocation) happens in one of its own. Mounting needs root; where
it is not permitted the tests that need it say so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import SOAK, Home, Party, Process, definition, xml

import shmdomains
from shmdomains import (
    ConfigError,
    Domain,
    DomainDef,
    DomainList,
    EventsMissed,
    LockTimeout,
    SegmentFull,
    ShmDomainsError,
)
from shmdomains.config import ConfigDirs
from shmdomains.config.parse import parse_file

pytestmark = pytest.mark.usefixtures("nothing_left")
MIB = 1 << 20


# --- a process that can be starved -------------------------------------------------------------


@pytest.fixture
def party(segment_dir: Path) -> Iterator[Party]:
    """A process of its own that knows this file as `tight`, and may be lost."""
    with stranger_in(segment_dir) as party:
        yield party


@contextlib.contextmanager
def stranger_in(folder: Path) -> Iterator[Party]:
    # What is freed goes back at once, so that a limit is felt however much was used before.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    process = Process(SHMDOMAINS_DIR=str(folder), **malloc)
    try:
        process.party.tell("import test_exhaustion as tight")
        yield process.party
    finally:
        process.kill()
        process.party.conn.close()


@contextlib.contextmanager
def descriptors(free: int) -> Iterator[None]:
    """Leave this process so many descriptors and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 64, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for _ in range(free):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def address_space(room: int) -> Iterator[None]:
    """Leave this process so many bytes more than it has mapped."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def state(doms: DomainList) -> list[Any]:
    """All that is committed, and whether it is sound. The directory may have been taken away."""
    assert [one for one in doms.check().problems if one[0] != "config"] == []
    return sorted(
        (
            info.name, info.uuid, info.id, info.pid, info.state, info.persistent, info.autostart,
            info.definition.to_xml(), info.data,
            info.next_definition and info.next_definition.to_xml(),
        )
        for info in doms
    )  # fmt: skip


def files(folder: Path) -> dict[str, str]:
    """What stands in a directory: every file to the letter, every link, no temporary."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.name == ".lock" or path.is_dir():
            continue
        key = str(path.relative_to(folder))
        found[key] = os.readlink(path) if path.is_symlink() else path.read_text()
    return found


def all_free(doms: DomainList) -> bool:
    """Whether nobody holds the list lock or a domain."""
    with doms.locked(0):
        pass
    for info in doms:
        doms.get(uuid=info.uuid, timeout=0).unlock()
    return True


# --- full file systems -------------------------------------------------------------------------


def fill(path: Path) -> None:
    """Take the last byte of a file system."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own."""
    command = ["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "shmdomains-test", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


@pytest.fixture
def small_tmpfs(segment_dir: Path) -> Iterator[Path]:
    """A tmpfs of 2 MiB, for segments."""
    with mounted(Path(tempfile.mkdtemp(dir=segment_dir)), "size=2m") as folder:
        yield folder


def test_a_full_file_system(small_tmpfs: Path) -> None:
    """Memory is committed before it is touched: an error, and no SIGBUS, in writers and readers."""
    process = Process(SHMDOMAINS_DIR=str(small_tmpfs))
    reader = Process(SHMDOMAINS_DIR=str(small_tmpfs))
    try:
        party = process.party
        party.tell("doms = DomainList.create('s', max_domains=100_000)")
        reader.party.tell("doms = DomainList.attach('s')")
        names = party.tell(
            "names = []\n"
            "try:\n"
            "    for number in range(3000):\n"
            "        doms.define(xml(f'vm{number}', description='x' * 3000))\n"
            "        names.append(f'vm{number}')\n"
            "except SegmentFull as exc: reason = str(exc)\n"
            "names"
        )
        assert 50 < len(names) < 1000
        assert "memory" in party.tell("reason")
        for other in (party, reader.party):
            assert other.tell("[info.name for info in doms]") == names
            assert other.tell("len(doms), doms.peek(name='vm3').definition.name") == (
                len(names), "vm3",
            )  # fmt: skip
            assert other.tell("doms.check().problems") == []
        with pytest.raises(SegmentFull):
            reader.party.tell("with doms.get(name='vm0') as dom: dom.data = b'x' * (2 << 20)")
        fill(small_tmpfs / "filler")
        with pytest.raises(SegmentFull):
            reader.party.tell("DomainList.create('second')")
        assert sorted(os.listdir(small_tmpfs)) == ["filler", "s.segment"]
        for other in (party, reader.party):
            assert len(other.tell("[info.definition.description for info in doms]")) == len(names)
        # What was committed is there to be used again.
        party.tell("doms.undefine(name='vm0'); doms.define(xml('new', description='x' * 3000))\n1")
        party.tell("with doms.get(name='vm1') as dom: number = dom.activate(); dom.pid = 7")
        assert reader.party.tell("doms.peek(name='vm1').pid") == 7
        # And when there is memory again, it goes on.
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_tmpfs)], check=True, timeout=20)
        assert (
            party.tell(
                "for number in range(300): doms.define(xml(f'more{number}'))\ndoms.check().problems"
            )
            == []
        )
        assert reader.party.tell("len(doms)") == len(names) + 300
    finally:
        for one in (process, reader):
            one.kill()
            one.party.conn.close()


def test_a_file_system_that_is_full_at_creation(small_tmpfs: Path) -> None:
    fill(small_tmpfs / "filler")
    os.truncate(small_tmpfs / "filler", (2 << 20) - (40 << 10))  # room for some of it
    process = Process(SHMDOMAINS_DIR=str(small_tmpfs))
    try:
        for _ in range(2):
            with pytest.raises(SegmentFull):
                process.party.tell("DomainList.create('s')")
        assert os.listdir(small_tmpfs) == ["filler"]
        os.unlink(small_tmpfs / "filler")
        process.party.tell("DomainList.create('s').define(xml('web1')).name")
    finally:
        process.kill()
        process.party.conn.close()


def read_everything(name: str) -> tuple[int, int]:
    """All that reads, on a segment that this process never saw; how many domains, ids, found."""
    with DomainList.attach(name) as doms:
        found = [(info.name, info.uuid, info.id, info.data, info.definition) for info in doms]
        for name, uuid, id, _, _ in found:
            info = doms.peek(name=name)
            assert info is not None and info.uuid == uuid and uuid in doms
            assert id == -1 or doms.peek(id=id).name == name
            with doms.get(uuid=uuid, timeout=5) as dom:
                assert dom.definition.name == name
                dom.pid = dom.pid  # a commit that needs no room
        assert doms.peek(name="nobody") is None and doms.peek(id=77_777) is None
        assert doms.lookup(name="nobody") is None and doms.lookup(id=77_777) is None
        with doms.locked(5):
            assert doms.find_by_name("nobody") is None and doms.find_by_id(77_777) is None
        assert len(doms.list(active=True)) == doms.count(active=True)
        assert doms.check().problems == [] and doms.info.domains == len(doms) == len(found)
        return len(found), doms.count(active=True)


def test_no_memory_for_events(small_tmpfs: Path) -> None:
    """Commits go on, and their events are missed; where there is memory again, they are kept."""
    with stranger_in(small_tmpfs) as party:
        party.tell("doms = DomainList.create('s', max_domains=100, events=1024)")
        party.tell(f"doms.define({xml('a')!r}).name; dom = doms.get('a')")
        turn = "dom.activate(); dom.commit(); dom.deactivate(); dom.commit()"
        party.tell(f"watch = doms.watch(since=0, timeout=0); {turn}")
        assert party.tell("[event.number for event in watch]") == [1, 2, 3]
        fill(small_tmpfs / "filler")
        party.tell(f"for _ in range(200): {turn}")
        kept = party.tell("list(watch)")
        assert [event.number for event in kept[:-1]] == list(range(4, 256))
        assert kept[-1] == EventsMissed(403 - 255, 403)
        assert party.tell("(dom.id, doms.check().problems)") == (-1, [])
        (small_tmpfs / "filler").unlink()
        party.tell(turn)
        assert [event.number for event in party.tell("list(watch)")] == [404, 405]
        party.tell(f"for _ in range(1024): {turn}")
        missed, *kept = party.tell("list(watch)")
        assert missed.count + len(kept) == 2 * 1024 and len(kept) == 1024
        party.tell("dom.unlock(); doms.unlink(); doms.close()")


def resize(folder: Path, size: str) -> None:
    command = ["mount", "-o", f"remount,size={size}", str(folder)]
    subprocess.run(command, check=True, timeout=20)


def test_reading_while_the_memory_is_full(small_tmpfs: Path) -> None:
    """A hole of a full tmpfs is a SIGBUS to read, too: nothing reads past what is committed. The
    numbers are around what is committed at once."""
    with stranger_in(small_tmpfs) as writer, stranger_in(small_tmpfs) as reader:
        for domains in (0, 1, 255, 256, 257):
            name = f"s{domains}"
            writer.tell(
                f"doms = DomainList.create({name!r}, max_domains=100_000)\n"
                f"for number in range({domains}): doms.define(xml(f'vm{{number}}'))\n"
                f"if {domains}:\n"
                "    with doms.get(name='vm0') as dom: number = dom.activate()"
            )
            fill(small_tmpfs / "filler")
            for _ in range(2):
                assert reader.tell(f"tight.read_everything({name!r})") == (domains, domains > 0)
            for other in (writer, reader):
                with pytest.raises(SegmentFull, match="memory"):
                    other.tell(
                        f"with DomainList.attach({name!r}) as again:\n"
                        "    for number in range(300):\n"
                        "        again.define(xml(f'more{number}', description='x' * 20_000))"
                    )
            assert reader.tell(f"tight.read_everything({name!r})")[0] >= domains
            resize(small_tmpfs, "8m")
            writer.tell("doms.define(xml('last', description='x' * 20_000)).name")
            assert writer.tell("tight.all_free(doms) and doms.check().problems") == []
            reader.tell("again = None; gc.collect()")
            writer.tell("doms.unlink(); doms = dom = again = None; gc.collect()")
            (small_tmpfs / "filler").unlink()
            resize(small_tmpfs, "2m")


def test_a_file_system_without_room_for_another_file(segment_dir: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=segment_dir))
    with mounted(folder, "size=4m,nr_inodes=3"), stranger_in(folder) as party:
        for _ in range(2):
            party.tell("doms = DomainList.create('one', max_domains=4); doms.unlink()")
            party.tell("doms.close(); del doms; gc.collect()")
        (folder / "a").write_text("")
        (folder / "b").write_text("")
        for call in ("DomainList.create('two')", "DomainList.open('two')"):
            with pytest.raises(SegmentFull, match=r"no room for a segment in .*make its"):
                party.tell(call)
        assert sorted(os.listdir(folder)) == ["a", "b"]
        (folder / "a").unlink()
        (folder / "b").unlink()
        party.tell("DomainList.create('two', max_domains=4).define(xml('web1')).name")


# --- a full list, a full heap ------------------------------------------------------------------


def test_a_full_heap(segment_dir: Path) -> None:
    doms = DomainList.create("s", max_domains=64, max_bytes=2 << 20)
    made_of = definition("vm", description="x" * 100_000)
    names = []
    with pytest.raises(SegmentFull) as caught:
        for number in range(64):
            doms.define(made_of.replace(name=f"vm{number}"))
            names.append(f"vm{number}")
    assert isinstance(caught.value, MemoryError) and "max_bytes" in str(caught.value)
    assert 3 < len(names) < 64
    assert [info.name for info in doms] == names and len(doms) == len(names)
    assert all(len(info.definition.description) == 100_000 for info in doms)
    assert not doms.is_locked and doms.check()
    with doms.get(name="vm0") as dom:
        dom.data = b"x" * 300_000
        with pytest.raises(SegmentFull):
            dom.commit()
        assert dom.data is None
        dom.pid = 7  # what needs no room goes on
    doms.undefine(name="vm1")
    doms.define(made_of.replace(name="vm99"))
    assert doms.peek(name="vm0").pid == 7 and doms.check()
    assert (segment_dir / "s.segment").stat().st_blocks * 512 <= 2 << 20
    doms.close()


def refill(doms: DomainList, most: int) -> list[str]:
    """Define until nothing more goes in; the names, and every error was the one it should be."""
    names = []
    made_of = definition("vm", description="x" * 40_000)
    with pytest.raises(SegmentFull, match="max_domains or max_bytes"):
        for number in range(most + 1):
            doms.define(made_of.replace(name=f"vm{number}"))
            names.append(f"vm{number}")
    return names


@pytest.mark.parametrize("what", ["list", "heap"])
def test_what_is_full_leaves_segment_and_directory_as_they_were(tmp_path: Path, what: str) -> None:
    limits = {"max_domains": 6} if what == "list" else {"max_domains": 64, "max_bytes": 2 * MIB}
    config = tmp_path / "vm"
    with DomainList(**limits) as doms:
        doms.load_all_configs(config, config / "autostart")
        names = refill(doms, 64)
        assert set(files(config)) == {f"{name}.xml" for name in names}
        before = state(doms), files(config)
        larger = definition("x", description="y" * 400_000)
        calls: list[Callable[[], Any]] = [lambda: doms.define(xml("new", description="z" * 40_000))]
        if what == "heap":
            uuid = doms.peek(name="vm0").uuid
            bigger = larger.replace(name="vm0", uuid=uuid)
            calls += [
                lambda: doms.define(bigger),
                lambda: change(doms, "vm0", data=b"x" * 400_000),
                lambda: change(doms, "vm0", definition=bigger, pid=7),
                lambda: change(doms, "vm0", next_definition=bigger, autostart=True),
            ]
        for call in calls:
            with pytest.raises(SegmentFull, match="max_bytes"):
                call()
            assert all_free(doms) and (state(doms), files(config)) == before
        # Room for one is room for one.
        for turn in range(3):
            doms.undefine(name=names[turn])
            doms.define(definition(f"more{turn}", description="x" * 40_000))
            if what == "list":
                with pytest.raises(SegmentFull):
                    doms.define(xml("another"))
        assert all_free(doms) and len(doms) == len(names) == len(files(config))
        assert doms.check().problems == []


def change(doms: DomainList, name: str, **fields: Any) -> None:
    with doms.get(name=name) as dom:
        for field, value in fields.items():
            setattr(dom, field, value)


def test_a_full_heap_while_renaming(tmp_path: Path) -> None:
    config = tmp_path / "vm"
    with DomainList(max_domains=8, max_bytes=2 * MIB + MIB // 2, events=0) as doms:
        doms.load_all_configs(config, config / "autostart")
        doms.define(definition("web1", description="x" * 600_000))
        with doms.get(name="web1") as dom:
            doms.set_autostart(dom, True)
        before = state(doms), files(config)

        def rename() -> None:
            with doms.locked(), doms.find_by_name("web1") as dom:
                doms.rename(dom, "web2")

        for _ in range(2):
            with pytest.raises(SegmentFull, match=r"web2.*max_bytes"):
                rename()
            assert all_free(doms) and (state(doms), files(config)) == before
        doms.define(definition("web1", doms.peek(name="web1").uuid, description="x" * 100_000))
        rename()
        assert set(files(config)) == {"web2.xml", "autostart/web2.xml"}
        assert [info.name for info in doms] == ["web2"] and doms.check().problems == []


@pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
def test_a_restart_in_a_full_list(lock: Any) -> None:
    """With 512 domains the id index is as full as it may get; one id takes another one's place."""
    with DomainList(max_domains=512, lock=lock) as doms:
        made_of = definition("vm")
        for number in range(512):
            doms.define(made_of.replace(name=f"vm{number}", uuid=None))
            with doms.get(name=f"vm{number}") as dom:
                dom.activate()
        for name in ("vm0", "vm511", "vm0"):
            with doms.get(name=name) as dom:
                before = dom.id
                dom.deactivate()
                after = dom.activate(pid=7)
            assert doms.peek(id=before) is None and doms.peek(id=after).name == name
        assert doms.check().problems == [] and doms.count(active=True) == 512


@pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
def test_a_domain_is_stopped_in_a_full_heap(lock: Any) -> None:
    """Its next definition becomes live where it lies."""
    with DomainList(max_domains=64, max_bytes=2 * MIB, lock=lock) as doms:
        doms.define(definition("web1"))
        uuid = doms.peek(name="web1").uuid
        with doms.get(name="web1") as dom:
            dom.activate(pid=7)
        doms.define(definition("web1", uuid, description="y" * 40_000))
        names = refill(doms, 64)
        for size in (1 << n for n in range(15, 0, -1)):  # to the last cell
            with contextlib.suppress(SegmentFull):
                while True:
                    doms.define(definition(f"fill{len(doms)}", description="z" * size))
        with doms.get(name=names[0]) as dom:
            dom.data = b"x" * 130
            with pytest.raises(SegmentFull):
                dom.commit()
        info = doms.peek(name="web1")
        live, following = info.definition, info.next_definition
        with doms.get(name="web1") as dom:
            dom.deactivate()
            with pytest.raises(SegmentFull):
                dom.next_definition = live.replace(description="w" * 80_000)
                dom.commit()
            dom.deactivate()
            dom.commit()
            assert dom.definition == following and dom.next_definition is None
        info = doms.peek(name="web1")
        assert info.definition == following != live and info.next_definition is None
        assert doms.check().problems == []
        # There and back: each place holds either kind.
        doms.undefine(name=names[0])
        for turn in range(4):
            with doms.get(name="web1") as dom:
                dom.activate()
                dom.next_definition = live.replace(description=f"turn {turn}")
            with doms.get(name="web1") as dom:
                dom.deactivate()
                dom.next_definition = live.replace(description=f"after {turn}")
            info = doms.peek(name="web1")
            assert info.definition.description == f"turn {turn}"
            assert info.next_definition.description == f"after {turn}"
            assert doms.check().problems == []


# --- descriptors -------------------------------------------------------------------------------


def starved(
    work: Callable[[], Any], after: Callable[[], Any], most: int = 12
) -> list[tuple[int, str]]:
    """Do the work with 0, 1, 2, ... free descriptors until it succeeds; after each failure `after`
    says whether all is as it was. What it raised; the number of descriptors that it took."""
    raised = []
    for free in range(most):
        with descriptors(free):
            try:
                work()
            except (OSError, ShmDomainsError) as exc:
                error = exc
            else:
                return raised
        text = f"{type(error).__name__}: {error}"
        assert "Too many open files" in text, text
        assert error.errno in (errno.EMFILE, None)
        raised.append((free, text))
        del error  # and what its frames refer to
        after()
    raise AssertionError(f"it never worked: {raised}")


def starve_a_creator(folder: Path, how: str) -> list[tuple[int, str]]:
    makers: dict[str, Callable[[], DomainList]] = {
        "create": lambda: DomainList.create("s", max_domains=4),
        "open": lambda: DomainList.open("s", max_domains=4),
        "unnamed": lambda: DomainList(max_domains=4),
    }
    made: list[DomainList] = []

    def nothing_is_left() -> None:
        assert os.listdir(folder) == []

    raised = starved(lambda: made.append(makers[how]()), nothing_is_left)
    with made.pop() as doms:
        doms.define(xml("web1"))
        assert doms.check().problems == [] and doms.count() == 1
        doms.unlink()
    return raised


@pytest.mark.parametrize("how", ["create", "open", "unnamed"])
def test_a_creator_without_descriptors(segment_dir: Path, party: Party, how: str) -> None:
    """It used to publish a segment with the boot id of no boot, which nobody could attach to."""
    folder = segment_dir / "own"
    folder.mkdir(mode=0o700)
    party.tell(f"os.environ['SHMDOMAINS_DIR'] = {str(folder)!r}")
    raised = party.tell(f"tight.starve_a_creator(tight.Path({str(folder)!r}), {how!r})")
    assert 2 <= len(raised) <= 6


def test_attaching_without_descriptors(segment_dir: Path, party: Party) -> None:
    doms = DomainList.create("s", max_domains=4)
    doms.define(xml("web1"))
    for call in ("DomainList.attach('s').close()", "DomainList.open('s').close()"):
        raised = party.tell(f"tight.starved(lambda: {call}, lambda: gc.collect())")
        assert 2 <= len(raised) <= 6
        assert all(str(segment_dir) in text for _, text in raised)
    # Nothing of the failed ones is left over: the flock is free.
    party.tell("gc.collect()")
    assert [one.pid for one in doms.info.attached] == [os.getpid()]
    doms.unlink()
    doms.close()


def work_without_descriptors(name: str) -> None:
    """What needs none, once a process is attached and has imported all that it may need."""
    shmdomains.preload()
    with DomainList.attach(name) as doms, descriptors(0):
        info = doms.define(xml("web2", description="x" * 2000))
        with doms.get(name="web2", timeout=1) as dom:
            number = dom.activate(pid=7)
            dom.data = {"a": 1}
        assert doms.peek(id=number).data == {"a": 1} and info.uuid in doms
        assert [one.name for one in doms.list(active=True)] == ["web2"]
        with doms.locked(1), doms.find_by_name("web2") as dom:
            dom.deactivate()
        doms.undefine(name="web2")
        assert len(doms) == 1 and doms.check().problems == []
        assert [one.pid for one in doms.info.attached].count(os.getpid()) == 1


def test_working_without_descriptors(party: Party) -> None:
    with DomainList.create("s", max_domains=4) as doms:
        doms.define(xml("web1"))
        party.tell("tight.work_without_descriptors('s')")
        assert [info.name for info in doms] == ["web1"]


def starve_configs(folder: Path) -> dict[str, int]:
    """Every operation that reaches the directory, with too few descriptors at each step."""
    config = folder / "vm"
    with DomainList(max_domains=8) as doms:
        doms.load_all_configs(config, config / "autostart")
        doms.define(xml("web1"))

        def rename() -> None:
            with doms.locked(), doms.find_by_name("web2") as dom:
                doms.rename(dom, "web3")

        def autostart(enabled: bool) -> None:
            with doms.get(name="web1") as dom:
                doms.set_autostart(dom, enabled)

        operations: dict[str, Callable[[], Any]] = {
            "define": lambda: doms.define(xml("web2", description="new")),
            "redefine": lambda: doms.define(
                xml("web1", doms.peek(name="web1").uuid, description="changed")
            ),
            "enable": lambda: autostart(True),
            "rename": rename,
            "load": lambda: doms.load_all_configs(config, config / "autostart"),
            "disable": lambda: autostart(False),
            "undefine": lambda: doms.undefine(name="web3"),
        }
        needed = {}
        for what, work in operations.items():
            before = state(doms), files(config)

            def as_it_was(before: Any = before) -> None:
                assert all_free(doms) and (state(doms), files(config)) == before

            needed[what] = len(starved(work, as_it_was))
        assert set(files(config)) == {"web1.xml"} and len(doms) == 1
        assert not list(config.rglob(".tmp-*"))
        return needed


def test_config_directories_without_descriptors(tmp_path: Path, party: Party) -> None:
    needed = party.tell(f"tight.starve_configs(tight.Path({str(tmp_path)!r}))")
    assert all(1 <= count <= 4 for count in needed.values()), needed


def fork_without_descriptors(name: str, kind: str) -> None:
    """A child's first use of the list, in which it looks up who it is."""
    doms = DomainList.attach(name) if kind == "robust" else KEPT[name]
    with descriptors(0):
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(BaseException):
                with doms.get(name="web1", timeout=5) as dom:
                    dom.pid = os.getpid()
                assert doms.check().problems == []
                code = 0
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
    assert doms.peek(name="web1").pid == child and all_free(doms)


KEPT: dict[str, DomainList] = {}


@pytest.mark.parametrize("kind", ["robust", "multiprocessing"])
def test_a_fork_without_descriptors(home: Home, segment_name: str, kind: str) -> None:
    home.party.tell(
        "import test_exhaustion as tight\n"
        f"doms = tight.KEPT[{segment_name!r}] = DomainList.create({segment_name!r}, max_domains=4, "
        f"lock={kind!r}, context=multiprocessing.get_context('fork'))\n"
        "doms.define(xml('web1')).name"
    )
    try:
        home.party.tell(f"tight.fork_without_descriptors({segment_name!r}, {kind!r})")
    finally:
        home.party.tell("doms.unlink(); tight.KEPT.clear(); doms.close(); del doms; gc.collect()")


def timed_out(doms: DomainList, free: int) -> str:
    """What a waiter who may not look into /proc is told."""
    with descriptors(free):
        try:
            doms.get(name="web1", timeout=0.15).unlock()
        except LockTimeout as exc:
            assert exc.holder is not None
            return f"{exc.holder.alive} {exc.holder.pid} {exc}"
    return "got it"


@pytest.mark.parametrize("kind", ["robust", "multiprocessing"])
def test_waiting_without_descriptors(home: Home, segment_name: str, kind: str) -> None:
    """A living holder is neither called dead nor robbed; a dead one is found out."""
    home.party.tell(
        "import test_exhaustion as tight\n"
        f"doms = DomainList.create({segment_name!r}, max_domains=4, lock={kind!r}, "
        "context=multiprocessing.get_context('fork'))\n"
        "doms.define(xml('web1')).name"
    )
    holder = home.begin("fork", doms="doms")
    try:
        holder.tell("dom = doms.get(name='web1'); dom.pid = 5")
        for free in range(6):
            told = home.party.tell(f"tight.timed_out(doms, {free})")
            assert told.startswith(f"True {holder.pid} ") and "dead" not in told
        holder.start(f"os.kill({holder.pid}, signal.SIGKILL)")
        with pytest.raises((EOFError, ConnectionResetError)):
            holder.answer()
        home.party.tell("reap()")
        assert home.party.tell("tight.timed_out(doms, 0)") == "got it"
        assert home.party.tell("dom = doms.get(name='web1', timeout=10); dom.pid") is None
    finally:
        holder.conn.close()
        home.party.tell("dom = None; doms.unlink(); doms.close(); del doms; gc.collect()")


def hold_from_the_dark(doms: DomainList, pipes: tuple[int, int, int, int]) -> int:
    """Fork a child that takes a domain before it could ever look up when it started itself."""
    ready, tell_ready, gone, _ = pipes
    with descriptors(0):
        child = os.fork()
        if not child:
            try:
                with doms.get(name="web1", timeout=5) as dom:
                    dom.pid = 5
                    os.write(tell_ready, b"x")
                    os.read(gone, 1)
            finally:
                os._exit(0)
    assert os.read(ready, 1) == b"x"
    return child


@pytest.mark.parametrize("kind", ["robust", "multiprocessing"])
def test_a_holder_who_could_not_say_when_it_started(
    home: Home, segment_name: str, kind: str
) -> None:
    """It signed with a start of 0, was dead for everybody, and lost its lock to the next waiter."""
    home.party.tell(
        "import test_exhaustion as tight\n"
        f"doms = DomainList.create({segment_name!r}, max_domains=4, lock={kind!r}, "
        "context=multiprocessing.get_context('fork'))\n"
        "doms.define(xml('web1')).name\n"
        "pipes = (*os.pipe(), *os.pipe())\n"
        "child = tight.hold_from_the_dark(doms, pipes)"
    )
    try:
        told = home.party.tell("tight.timed_out(doms, 8)")
        assert told.startswith(f"True {home.party.tell('child')} ") and "dead" not in told
        home.party.tell("os.kill(child, signal.SIGKILL); os.waitpid(child, 0)[1]")
        assert home.party.tell("dom = doms.get(name='web1', timeout=10); dom.pid") is None
        assert home.party.tell("dom.previous_owner_died.alive") is False
    finally:
        home.party.tell(
            "for fd in pipes: os.close(fd)\n"
            "dom = None; doms.unlink(); doms.close(); del doms; gc.collect()"
        )


# --- address space -----------------------------------------------------------------------------


def what_is_free() -> list[bytes]:
    """All that the allocators would hand out without asking the kernel, so that it is not free."""
    taken: list[bytes] = []
    with address_space(0):
        for size in (1 << 20, 1 << 16, 1 << 12, 400, 48):
            with contextlib.suppress(MemoryError):
                while True:
                    taken.append(bytes(size))
    return taken


def squeezed(work: Callable[[], Any], after: Callable[[], Any]) -> tuple[int, Any]:
    """Do the work with ever more address space until it succeeds; failures, and the value.

    What earlier work freed is taken first: it may be room enough, and then nothing fails.
    """
    failures = 0
    taken = what_is_free()
    room = 0
    while room < 64 << 30:
        try:
            with address_space(room):
                value = work()
        except (MemoryError, OSError) as exc:
            assert isinstance(exc, MemoryError) or exc.errno == errno.ENOMEM, exc
            failures += 1
        else:
            del taken
            return failures, value
        after()
        room = max(room + room // 2, 256 << 10)
    raise AssertionError("it never worked")


def test_creating_and_attaching_without_address_space(segment_dir: Path, party: Party) -> None:
    """The mapping is as large as the list may ever be; a failed creator leaves no name."""
    folder = segment_dir / "own"
    folder.mkdir(mode=0o700)
    party.tell(f"os.environ['SHMDOMAINS_DIR'] = {str(folder)!r}")
    for call in ("DomainList.create('s')", "DomainList.open('s')", "DomainList()"):
        failures = party.tell(
            f"def nothing_is_left():\n"
            f"    gc.collect(); left = os.listdir({str(folder)!r}); assert left == [], left\n"
            f"failures, doms = tight.squeezed(lambda: {call}, nothing_is_left)\n"
            "doms.define(xml('web1')); doms.unlink(); doms.close(); doms = None; gc.collect()\n"
            "failures"
        )
        assert failures >= 3
    with DomainList.create(path=folder / "t.segment") as doms:
        doms.define(xml("web1"))
        with pytest.raises(OSError, match=r"not attached: Cannot allocate memory.*t\.segment"):
            party.tell("with tight.address_space(1 << 20): DomainList.attach('t')")
        failures = party.tell("tight.squeezed(lambda: DomainList.attach('t').close(), int)[0]")
        assert failures >= 3
        assert [one.pid for one in doms.info.attached] == [os.getpid()]


def squeeze_reading(domains: int) -> dict[str, int]:
    with DomainList(max_domains=domains) as doms:
        made_of = definition("vm", description="x" * 500)
        for number in range(domains):
            doms.define(made_of.replace(name=f"vm{number}"))

        def all_is_well() -> None:
            assert len(doms) == domains and not doms.is_locked

        works: dict[str, Callable[[], int]] = {
            "snapshot": lambda: len(doms.snapshot()),
            "list": lambda: len(doms.list(persistent=True)),
            "definitions": lambda: len([info.definition for info in doms.snapshot()]),
        }
        failures = {}
        for what, work in works.items():
            failures[what], found = squeezed(work, all_is_well)
            assert found == domains
        with address_space(64 << 10):
            assert doms.count(active=False) == domains  # takes nothing
        assert doms.check().problems == []
        return failures


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_listing_without_memory(party: Party, tried: Callable[[str, int], None]) -> None:
    domains = 100_000 if SOAK else 4_000
    party.start(f"tight.squeeze_reading({domains})")
    failures = party.answer(deadline=200 if SOAK else 20)
    assert all(count >= 1 for count in failures.values()), failures
    tried("domains listed in too little memory", domains)


def squeeze_changing() -> dict[str, int]:
    """Large values at every size of what is left: all or nothing, and the lock is free."""
    with DomainList(max_domains=16, max_bytes=128 * MIB) as doms:
        doms.define(xml("web1"))
        large = definition("web1", doms.peek(name="web1").uuid, description="x" * (6 * MIB))
        text = xml("web2", description="y" * (6 * MIB))
        value = b"z" * (8 * MIB)

        def both() -> None:
            with doms.get(name="web1", timeout=0) as dom:
                dom.pid = 7
                dom.definition = large
                dom.data = value

        works: dict[str, Callable[[], Any]] = {
            # First: what others leave in malloc's hands would be enough for it.
            "define": lambda: doms.define(text),
            "data": lambda: change(doms, "web1", data=value),
            "several": both,
            "undefine": lambda: doms.undefine(name="web2"),
        }
        failures = {}
        for what, work in works.items():
            before = state(doms)

            def as_it_was(before: Any = before) -> None:
                assert all_free(doms) and state(doms) == before

            failures[what], _ = squeezed(work, as_it_was)
            assert state(doms) != before
        return failures


def test_changing_without_memory(party: Party) -> None:
    party.start("tight.squeeze_changing()")
    failures = party.answer(deadline=60)
    assert failures["data"] >= 2 and failures["several"] >= 2 and failures["define"] >= 2


def test_a_document_without_memory(party: Party) -> None:
    """It is not the document's fault, and no file's failure."""
    party.tell("text = xml(extra='<a>xx</a>' * 200_000)")
    for source in ("text", "text + '<'"):
        with pytest.raises(MemoryError):
            party.tell(f"with tight.address_space(8 << 20): DomainDef.from_xml({source})")
    assert party.tell("DomainDef.from_xml(text).name") == "web1"
    with pytest.raises(shmdomains.DefinitionError):
        party.tell("DomainDef.from_xml(text + '<')")


def fail_each_allocation(work: Callable[[], Any], after: Callable[[], Any]) -> int:
    """Do the work with its first allocation failing, its second, ...; how many there are."""
    import _testcapi

    for number in range(5000):
        with contextlib.suppress(MemoryError), warnings.catch_warnings():
            # A handle that the error took along is unlocked with its last frame, which says so.
            warnings.simplefilter("ignore", ResourceWarning)
            _testcapi.set_nomemory(number, number + 1)
            try:
                work()
            finally:
                _testcapi.remove_mem_hooks()
            return number
        after()
    raise AssertionError("it never worked")


def each_allocation_of_a_commit() -> dict[str, int]:
    with DomainList(max_domains=16) as doms:
        doms.define(xml("web1"))
        doms.define(xml("web2"))
        infos = doms.snapshot()
        value = {"a": [1, 2, 3] * 50}
        another = definition("web3", "c7a5fdbd-edaf-9455-926a-d65c16db1809")
        blob = another.encode()

        def both() -> None:
            with doms.get(name="web1") as dom:
                dom.pid, dom.data = 7, value

        def step_by_step() -> None:
            dom = doms.get(name="web2", timeout=1)
            try:
                dom.data = value
                dom.commit()
                dom.rollback()
                dom.activate(pid=9)
            finally:
                dom.unlock()

        works: dict[str, Callable[[], Any]] = {
            "commit": both,
            "lock": lambda: doms.lock_many(infos).__exit__(None, None, None),
            "list": lambda: counted(doms),
            "peek": lambda: doms.peek(name="web1"),
            "find": find_and_unlock(doms),
            "define": lambda: doms.define(another),
            "undefine": lambda: doms.undefine(name="web3"),
            "encode": another.encode,
            "decode": lambda: DomainDef.decode(blob),
            "replace": lambda: another.replace(title="t"),
        }
        needed = {}
        for what, work in works.items():
            before = state(doms)

            def as_it_was(before: Any = before, what: str = what) -> None:
                assert all_free(doms)
                # What failed came after the commit, or after the removal.
                if what == "define" and doms.peek(name="web3") is not None:
                    doms.undefine(name="web3")
                if what == "undefine" and doms.peek(name="web3") is None:
                    doms.define(another)
                assert state(doms) == before

            needed[what] = fail_each_allocation(work, as_it_was)
        fail_each_allocation(step_by_step, lambda: all_free(doms) and reset(doms))
        assert doms.check().problems == [] and len(doms) == 2
        return needed


def counted(doms: DomainList) -> None:
    """A list with a domain missing would be worse than an error."""
    assert len(doms.list(active=False)) == doms.count(active=False) == 2


def find_and_unlock(doms: DomainList) -> Callable[[], None]:
    def find() -> None:
        with doms.locked(1), doms.find_by_name("web2", 1):
            pass

    return find


def reset(doms: DomainList) -> None:
    """Of several commits each may have been done or not, and no half of one."""
    with doms.get(name="web2", timeout=0) as dom:
        assert dom.pid in (None, 9) and dom.is_active == (dom.pid == 9)
        assert dom.data is None or len(dom.data["a"]) == 150
        dom.data = None
        if dom.is_active:
            dom.deactivate()


def test_every_allocation_that_fails(party: Party, tried: Callable[[str, int], None]) -> None:
    """A commit without memory rolls back and unlocks."""
    pytest.importorskip("_testcapi", reason="this Python has no hook for allocations")
    needed = party.tell("tight.each_allocation_of_a_commit()")
    assert needed["commit"] > 5 and needed["lock"] > 3
    tried("failed allocations", sum(needed.values()))


# --- the config directory ----------------------------------------------------------------------

WEB1 = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
LARGE = "y" * 60_000


def renamed(doms: DomainList) -> None:
    with doms.locked(), doms.find_by_name("web1") as dom:
        doms.rename(dom, "web3")


def autostarted(doms: DomainList, name: str, enabled: bool) -> None:
    with doms.get(name=name) as dom:
        doms.set_autostart(dom, enabled)


OPERATIONS: dict[str, Callable[[DomainList], Any]] = {
    "define": lambda doms: doms.define(xml("new", description=LARGE)),
    "redefine": lambda doms: doms.define(xml("web1", WEB1, description=LARGE)),
    "rename": renamed,
    "undefine": lambda doms: doms.undefine(name="web1"),
    "enable": lambda doms: autostarted(doms, "web2", True),
    "disable": lambda doms: autostarted(doms, "web1", False),
}
WORKS_WHEN_FULL = {"undefine", "disable"}
"""What makes room takes none."""


@contextlib.contextmanager
def configured(config: Path) -> Iterator[DomainList]:
    """A list whose domains stand in a directory: web1, which is started with the host, and web2."""
    with DomainList(max_domains=8) as doms:
        doms.load_all_configs(config, config / "autostart")
        doms.define(xml("web1", WEB1))
        doms.define(xml("web2"))
        autostarted(doms, "web1", True)
        yield doms


def refused(doms: DomainList, config: Path, what: str, numbers: set[int]) -> None:
    """The operation fails with one of these numbers; all stays as it was, in both places."""
    before = state(doms), files(config)
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            OPERATIONS[what](doms)
        assert caught.value.errno in numbers, caught.value
        assert str(config) in str(caught.value.filename)
        assert all_free(doms) and (state(doms), files(config)) == before
    assert temporaries(config) == []


def temporaries(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".tmp-*")]


def works(doms: DomainList, config: Path, what: str) -> None:
    before = state(doms), files(config)
    OPERATIONS[what](doms)
    now = state(doms), files(config)
    assert now[0] != before[0] and now[1] != before[1]
    assert all_free(doms) and temporaries(config) == []
    with DomainList(max_domains=8) as again:  # the two say the same
        assert not again.load_all_configs(config, config / "autostart").failures
        for info in doms:
            other = again.peek(uuid=info.uuid)
            assert (other.name, other.autostart) == (info.name, info.autostart)
            assert other.definition == info.definition
        assert len(again) == len(doms)


@pytest.mark.parametrize("what", OPERATIONS)
def test_no_space_for_configs(tmp_path: Path, what: str) -> None:
    with mounted(tmp_path, "size=64k"), configured(tmp_path / "vm") as doms:
        if what in ("rename", "enable"):  # small things: not a page may be left
            doms.define(xml("web1", WEB1, description="z" * 5000))
        fill(tmp_path / "filler")
        if what in WORKS_WHEN_FULL:
            works(doms, tmp_path / "vm", what)
            return
        if what == "enable":  # a link takes no data blocks
            works(doms, tmp_path / "vm", what)
            return
        refused(doms, tmp_path / "vm", what, {errno.ENOSPC})
        (tmp_path / "filler").unlink()
        resize(tmp_path, "1m")
        works(doms, tmp_path / "vm", what)


def take_every_entry(directory: Path) -> list[Path]:
    taken = []
    with contextlib.suppress(OSError):
        for number in range(100):
            taken.append(directory / f"filler{number}")
            taken[-1].touch()
    return taken[:-1]


@pytest.mark.parametrize("what", OPERATIONS)
def test_no_room_for_another_entry(tmp_path: Path, what: str) -> None:
    """The inodes run out: at nothing left, at room for the new file alone, and so on."""
    with mounted(tmp_path, "size=4m,nr_inodes=60"), configured(tmp_path / "vm") as doms:
        taken = take_every_entry(tmp_path)
        while what not in WORKS_WHEN_FULL:
            before = state(doms), files(tmp_path / "vm")
            try:
                OPERATIONS[what](doms)
            except ConfigError as exc:
                assert exc.errno == errno.ENOSPC
                assert all_free(doms) and (state(doms), files(tmp_path / "vm")) == before
                assert temporaries(tmp_path / "vm") == []
                taken.pop().unlink()
            else:
                assert len(taken) >= 40
                return
        works(doms, tmp_path / "vm", what)


@pytest.mark.parametrize("what", ["redefine", "rename", "undefine"])
def test_a_commit_that_fails_at_the_last_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The file is the old one again, although no entry is left to set it aside: such a save is not
    begun."""
    config = tmp_path / "vm"
    with mounted(tmp_path, "size=4m,nr_inodes=60"), configured(config) as doms:
        taken = take_every_entry(tmp_path)
        before = state(doms), files(config)
        for _ in range(4):
            taken.pop().unlink()

            def fail(*arguments: Any) -> None:
                raise SegmentFull("no room, says the test")

            with monkeypatch.context() as patch:
                for step in ("commit", "_remove", "_rename"):
                    owner = Domain if step == "commit" else DomainList
                    patch.setattr(owner, step, fail, raising=False)
                with pytest.raises((ConfigError, SegmentFull)):
                    OPERATIONS[what](doms)
            assert (state(doms), files(config)) == before and all_free(doms)
            assert temporaries(config) == []


def read_only(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True, timeout=20)


@pytest.mark.parametrize("what", OPERATIONS)
def test_a_read_only_config_directory(tmp_path: Path, what: str) -> None:
    with mounted(tmp_path, "size=1m"), configured(tmp_path / "vm") as doms:
        read_only(tmp_path, "ro")
        refused(doms, tmp_path / "vm", what, {errno.EROFS})
        assert doms.load_all_configs(tmp_path / "vm", tmp_path / "vm" / "autostart").loaded
        read_only(tmp_path, "rw")
        works(doms, tmp_path / "vm", what)


def in_the_way(config: Path, how: str) -> Callable[[], None]:
    """Put something else in the directory's place; how to put it back."""
    aside = config.with_name("aside")
    config.rename(aside)
    if how == "file":
        config.write_text("no directory")
    else:
        config.symlink_to("nowhere")

    def put_back() -> None:
        config.unlink()
        aside.rename(config)

    return put_back


@pytest.mark.parametrize("how", ["file", "dangling link"])
@pytest.mark.parametrize("what", ["define", "redefine", "rename", "enable"])
def test_something_else_in_the_directorys_place(tmp_path: Path, what: str, how: str) -> None:
    config = tmp_path / "vm"
    with configured(config) as doms:
        put_back = in_the_way(config, how)
        before = state(doms)
        for _ in range(2):
            with pytest.raises(ConfigError) as caught:
                OPERATIONS[what](doms)
            assert str(config) in str(caught.value.filename)
            assert caught.value.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST)
            assert all_free(doms) and state(doms) == before
        assert config.is_symlink() or config.read_text() == "no directory"
        put_back()
        works(doms, config, what)


@pytest.mark.parametrize("what", OPERATIONS)
def test_the_config_directory_is_gone(tmp_path: Path, what: str) -> None:
    """A save makes it anew; what there is nothing to remove of is removed."""
    config = tmp_path / "vm"
    with configured(config) as doms:
        shutil.rmtree(config)
        if what == "enable":  # a link to a file that is not there would be forgotten
            refused(doms, config, what, {errno.ENOENT})
            return
        before = state(doms)
        OPERATIONS[what](doms)
        assert state(doms) != before and all_free(doms)
        written = {"define": {"new.xml"}, "redefine": {"web1.xml"}}
        written["rename"] = {"web3.xml", "autostart/web3.xml"}  # the record says autostart
        assert set(files(config)) == written.get(what, set())


@pytest.mark.parametrize("how", ["a file", "dangling link", "read-only"])
def test_an_autostart_link_that_fails(tmp_path: Path, how: str) -> None:
    """Record and link go together, and the config file is none of it."""
    config = tmp_path / "vm"
    autostart = config / "autostart"
    with configured(config) as doms, contextlib.ExitStack() as stack:
        if how == "read-only":
            shutil.rmtree(autostart)
            autostart.mkdir()
            stack.enter_context(mounted(autostart, "size=1m"))
            (autostart / "web1.xml").symlink_to(config / "web1.xml")
            read_only(autostart, "ro")
        else:
            aside = autostart.rename(tmp_path / "aside")
            in_its_place = autostart.write_text if how == "a file" else autostart.symlink_to
            in_its_place("nowhere")
        before = state(doms), files(config)
        for enabled, name in ((True, "web2"), (False, "web1")):
            if how == "read-only" or enabled:
                with pytest.raises(ConfigError) as caught:
                    autostarted(doms, name, enabled)
                assert "autostart" in str(caught.value.filename)
            assert (state(doms), files(config)) == before and all_free(doms)
        if how == "read-only":
            read_only(autostart, "rw")
        else:
            autostart.unlink()
            aside.rename(autostart)
        autostarted(doms, "web2", True)
        assert {"autostart/web1.xml", "autostart/web2.xml"} < set(files(config))
        works(doms, config, "disable")


# --- the same, seen by the directories alone ---------------------------------------------------


def domain(name: str, note: str = "") -> DomainDef:
    return definition(name, WEB1, description=note)


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 KiB, for config files."""
    point = tmp_path / "mnt"
    point.mkdir()
    with mounted(point, "size=64k"):
        yield point


def test_full_filesystem(small_filesystem: Path) -> None:
    dirs = ConfigDirs(small_filesystem / "vm", small_filesystem / "auto")
    dirs.save(domain("web1", "old"))
    (small_filesystem / "ballast").write_bytes(b"x" * 40_000)
    with pytest.raises(ConfigError) as info:
        dirs.save(domain("web1", "y" * 60_000))
    assert info.value.errno == errno.ENOSPC
    assert str(info.value) == f"[Errno 28] No space left on device: '{dirs.config_file('web1')}'"
    with pytest.raises(ConfigError):
        dirs.save(domain("web2", "y" * 60_000))
    assert files(dirs.config_dir) == {"web1.xml": domain("web1", "old").to_xml()}
    assert temporaries(dirs.config_dir) == []
    (small_filesystem / "ballast").unlink()
    dirs.save(domain("web1", "y" * 10_000))


def test_read_only_filesystem(small_filesystem: Path) -> None:
    dirs = ConfigDirs(small_filesystem / "vm", small_filesystem / "auto")
    dirs.save(domain("web1"))
    dirs.set_autostart("web1", True)
    before = files(small_filesystem)
    subprocess.run(["mount", "-o", "remount,ro", str(small_filesystem)], check=True)
    calls: list[Callable[[], None]] = [
        lambda: dirs.save(domain("web1")),
        lambda: dirs.save(domain("web2")),
        lambda: dirs.delete("web1"),
        lambda: dirs.rename("web1", domain("web2")),
        lambda: dirs.set_autostart("web1", False),
        lambda: ConfigDirs(small_filesystem / "other").save(domain("web1")),
    ]
    for call in calls:
        with pytest.raises(ConfigError) as info:
            call()
        assert info.value.errno == errno.EROFS
        assert str(small_filesystem) in str(info.value.filename)
    assert files(small_filesystem) == before
    assert isinstance(parse_file(str(dirs.config_file("web1"))).result, DomainDef)


def refuse_to_write(config: Path) -> None:
    with DomainList(max_domains=8) as doms:
        assert doms.load_all_configs(config, config / "autostart").loaded == ["web1", "web2"]
        for what in OPERATIONS:
            refused(doms, config, what, {errno.EACCES})


def test_a_directory_without_write_permission(segment_dir: Path, party: Party) -> None:
    """By somebody who is not root, whom no mode keeps from writing."""
    nobody = 54321 if os.getuid() == 0 else os.getuid()
    config = segment_dir / "vm"
    with configured(config):
        pass
    segment_dir.chmod(0o755)
    for path in (config, *config.rglob("*")):
        os.chown(path, nobody, -1, follow_symlinks=False)
    for folder in (config / "autostart", config):
        folder.chmod(0o500)
    try:
        # It has what it imports before it gives up being root, who alone may be able to read it.
        if os.getuid() == 0:
            party.tell("tight.shmdomains.preload()")
            party.tell(f"os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})")
        party.tell(f"tight.refuse_to_write(tight.Path({str(config)!r}))")
    finally:
        for folder in (config, config / "autostart"):
            folder.chmod(0o700)
    with configured(config) as doms:
        works(doms, config, "undefine")


@pytest.mark.parametrize("moment", ["fsync", "link", "rename"])
def test_directory_removed_while_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    dirs = ConfigDirs(tmp_path / "vm", tmp_path / "vm" / "autostart")
    dirs.save(domain("web1"))
    real: Callable[..., Any] = getattr(os, moment)

    def remove_first(*args: Any, **kwargs: Any) -> Any:
        if dirs.config_dir.exists():
            shutil.rmtree(dirs.config_dir)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, remove_first)
        with pytest.raises(ConfigError) as info:
            dirs.save(domain("web1"))
    assert info.value.errno == errno.ENOENT
    dirs.save(domain("web1"))
    assert list(files(dirs.config_dir)) == ["web1.xml"]
