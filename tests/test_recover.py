"""`DomainList.recover` repairs at once what the next holders would, and says what it was; a segment
whose repair failed says which one, where, and who found it; and what can be read of it is exported.

The repairs themselves are tested in test_kill.py and test_crash_points.py.
"""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from killing import DEADLINE, Child, Pipe, Planted, hold, hold_mutex, soon, xml

from shmdomains import (
    DomainDef,
    DomainList,
    HeldLock,
    LockKindMismatch,
    LockOrder,
    RecoverReport,
    Repair,
    SegmentCorrupt,
    SegmentPoisoned,
)
from shmdomains.transfer import export_domains, export_xml, import_domains

NAMES = ["a", "b", "c"]
NOTHING = RecoverReport([], [], 0)


@pytest.fixture
def doms(path: str) -> Iterator[DomainList]:
    with DomainList.create(path=path, max_domains=1000) as doms:
        for name in NAMES:
            doms.define(xml(name))
        yield doms


def killed(start: Callable[..., Child], path: str, *steps: str) -> int:
    """A process that took what the steps say, and died."""
    child = start(hold, path, *steps)
    pid: int = child.hear()
    child.kill()
    return pid


def whose(repairs: list[Repair]) -> list[tuple[str, str | None, int | None]]:
    return [(one.lock, one.name, one.died and one.died.pid) for one in repairs]


# --- what is repaired, and what is said of it -----------------------------------------------------


def test_nothing_to_recover(doms: DomainList) -> None:
    assert doms.recover() == NOTHING
    with doms.locked():
        assert doms.recover() == NOTHING
        assert doms.is_locked
    assert doms.recover(timeout=0) == NOTHING
    with pytest.raises(ValueError):
        doms.recover(timeout=-1)


def test_what_a_dead_holder_left(start: Callable[..., Child], doms: DomainList, path: str) -> None:
    """The list, two domains, and one that was on its way; told once, and again to who is next."""
    pid = killed(start, path, "list", "a", "c", "new=d", "change=1", "commit", "change=2")
    report = doms.recover()
    assert whose(report.repairs) == [("list", None, pid)] + [("domain", n, pid) for n in "acd"]
    assert all(one.died is not None and not one.died.alive for one in report.repairs)
    assert report.held == []
    assert str(pid) in str(report.repairs[0]) and "rebuilt" in report.repairs[0].what
    assert doms.recover() == NOTHING
    assert doms.check()
    for name in "acd":
        with doms.get(name=name, timeout=0) as dom:
            assert dom.data == 1
            assert dom.previous_owner_died is not None and dom.previous_owner_died.pid == pid


@pytest.mark.parametrize("which", ["id", "heap"])
def test_the_cores_own_locks(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str, which: str
) -> None:
    child = start(hold_mutex, path, planted.header(f"{which}_mutex"))
    child.hear()
    used = planted.header("active" if which == "id" else "heap_used")
    before = planted.read(used)
    planted.write(used, before + 7)
    child.kill()
    [repair] = doms.recover().repairs
    assert (repair.lock, repair.name) == (which, None)
    assert repair.died is not None and repair.died.tid == child.pid  # nobody signed for it
    assert planted.read(used) == before and doms.check()
    assert doms.recover() == NOTHING


def test_names_of_every_length_are_entered_again(
    start: Callable[..., Child], doms: DomainList, path: str
) -> None:
    """From both name buffers: some were renamed. And a uuid keeps its checksum through a death."""
    uuids = {}
    for length in (1, 3, 4, 5, 11, 12, 250, 251):
        for letter, renamed in (("n", False), ("r", True)):
            name = letter * length
            made = DomainDef.from_xml(xml("first")).replace(name="first" if renamed else name)
            uuids[name] = doms.define(made).uuid
            if renamed:
                with doms.locked(), doms.find_by_name("first") as dom:
                    doms.rename(dom, name)
    held = "r" * 4
    with doms.get(name=held) as dom:
        number = dom.activate()
    pid = killed(start, path, "list", held)
    assert whose(doms.recover().repairs) == [("list", None, pid), ("domain", held, pid)]
    assert doms.check()
    for name, uuid in uuids.items():
        with doms.get(name=name, timeout=0) as dom:
            assert (dom.name, dom.uuid) == (name, uuid)
    with doms.get(id=number, timeout=0) as dom:
        assert dom.uuid == uuids[held]


def test_a_repair_that_was_put_off(doms: DomainList, planted: Planted) -> None:
    planted.write(planted.header("list_dirty"), 1)
    planted.write(planted.header("live"), 77)
    [repair] = doms.recover().repairs
    assert repair == Repair("list", None, None) and "put off" in str(repair)
    assert len(doms) == 3 and doms.recover() == NOTHING


@pytest.mark.parametrize("dead", [True, False], ids=["dead holder", "put off"])
def test_garbage_is_freed_and_measured(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str, dead: bool
) -> None:
    used = doms.info.heap_used
    child = start(hold, path, "b")
    child.hear()
    planted.leave_garbage(1)
    if dead:
        child.kill()
    else:
        child.ask()
        planted.write(planted.slot(1, "dirty"), 1)
    assert doms.check().counts["garbage"] == 1
    report = doms.recover()
    assert report.freed == 3 * 64
    assert whose(report.repairs) == ([("domain", "b", child.pid)] if dead else [])
    assert doms.info.heap_used == used and doms.check().counts["garbage"] == 0


def test_a_slot_without_a_domain(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    doms.undefine(name="b")
    child = start(hold_mutex, path, planted.slot(1, "mutex"))
    child.hear()
    [held] = doms.recover().held
    assert held.name is None and held.holder is not None and held.holder.tid == child.pid
    child.kill()
    [repair] = doms.recover().repairs
    assert (repair.lock, repair.name) == ("domain", None) and "without a domain" in str(repair)
    doms.define(xml("new"))
    assert doms.check()


# --- who lives is left alone ----------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_living_holder_is_named_and_not_waited_for(
    start: Callable[..., Child], doms: DomainList, path: str, stopped: bool
) -> None:
    holder = start(hold, path, "b", "change=1")
    pid = holder.hear()
    dead = killed(start, path, "c")
    if stopped:
        holder.signal(signal.SIGSTOP)
    with soon("recover"):
        report = doms.recover(timeout=None)
    assert whose(report.repairs) == [("domain", "c", dead)]
    [held] = report.held
    assert (held.lock, held.name) == ("domain", "b")
    assert held.holder is not None and held.holder.pid == pid and str(pid) in str(held)
    holder.signal(signal.SIGCONT)
    assert holder.ask() == "free"
    assert doms.peek(name="b").data == 1


@pytest.mark.parametrize("which", ["list", "id", "heap"])
def test_a_lock_that_is_not_free_in_time_is_named(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str, which: str
) -> None:
    """And what the others need is done all the same."""
    child = (
        start(hold, path, "list")
        if which == "list"
        else start(hold_mutex, path, planted.header(f"{which}_mutex"))
    )
    child.hear()
    dead = killed(start, path, "c")
    with soon("recover"):
        report = doms.recover(timeout=0.1)
    assert whose(report.repairs) == [("domain", "c", dead)]
    [held] = report.held
    assert (held.lock, held.name) == (which, None)
    assert held.holder is not None and held.holder.tid == child.pid
    assert isinstance(held, HeldLock) and f"{which} lock" in str(held)
    child.ask()


def test_what_this_thread_holds_is_its_own(doms: DomainList) -> None:
    with doms.get(name="a"), pytest.raises(LockOrder):
        doms.recover()
    with doms.locked():
        dom = doms.find_by_name("a")
        assert doms.recover() == NOTHING
        dom.unlock()


# --- multiprocessing locks ------------------------------------------------------------------------


def recover_of_both_kinds(pipe: Pipe) -> None:
    """Runs in a process that may fork."""
    from killing import fork

    doms = DomainList(max_domains=10, lock="multiprocessing")
    for name in NAMES:
        doms.define(xml(name))

    def victim(pipe: Pipe) -> None:
        with doms.locked():
            dom = doms.find_by_name("b")
            pipe.say(dom and os.getpid())
            pipe.rest()

    child = fork(victim)
    pid = child.hear()
    assert [held.lock for held in doms.recover(timeout=0).held] == ["list", "domain"]
    child.kill()
    report = doms.recover()
    assert doms.recover() == NOTHING and doms.check()
    pipe.say((pid, whose(report.repairs)))


def test_multiprocessing_locks(start: Callable[..., Child]) -> None:
    pid, repairs = start(recover_of_both_kinds).hear()
    assert repairs == [("list", None, pid), ("domain", "b", pid)]


def test_a_stranger_to_multiprocessing_locks(path: str) -> None:
    with (
        DomainList.create(path=path, max_domains=10, lock="multiprocessing"),
        DomainList.attach(path=path) as stranger,
        pytest.raises(LockKindMismatch, match="inherited"),
    ):
        stranger.recover()


# --- poison ---------------------------------------------------------------------------------------

Damage = Callable[[Planted], None]


@pytest.mark.parametrize(
    ("held", "damage", "words"),
    [
        ("list", lambda at: at.write(at.header("list_level"), 40), "UUID and the name index"),
        ("list", lambda at: at.write(at.name(2, 0), 0, 1), "(list lock), at slot 2, found"),
        (
            "list",
            lambda at: at.flip(at.slot(1, "life"), 0),
            "(list lock), at slot 1, found",
        ),
        (
            "id",
            lambda at: at.flip(at.slot(1, "life"), 0),
            "(id lock), at slot 1, found",
        ),
        ("id", lambda at: at.write(at.header("id_level"), 40), "of the id index (id lock), found"),
        (
            "id",
            lambda at: at.flip(at.copy(1, "status"), 0),
            "of the id index (id lock), at slot 1, found",
        ),
        (
            "heap",
            lambda at: at.write(at.slot(1, "extent") + 16, 1 << 62 | 64),
            "of the map of used space (heap lock), at slot 1, found",
        ),
    ],
    ids=["level", "name", "life", "life of an id", "id level", "fields", "extent"],
)
def test_a_poisoned_segment_says_why(
    start: Callable[..., Child],
    doms: DomainList,
    planted: Planted,
    path: str,
    held: str,
    damage: Damage,
    words: str,
) -> None:
    child = (
        start(hold, path, "list")
        if held == "list"
        else start(hold_mutex, path, planted.header(f"{held}_mutex"))
    )
    child.hear()
    assert doms.info.poisoned is None
    damage(planted)
    child.kill()
    for _ in range(2):  # who fails, and who comes later
        with pytest.raises(SegmentPoisoned) as caught:
            doms.recover(timeout=DEADLINE)
        text = str(caught.value)
        assert words in text and f"found by process {os.getpid()}" in text
        assert "export" in text and "can still be read" in text
    for reader in (doms, DomainList.attach(path=path)):
        why = reader.info.poisoned
        assert why is not None and words in why and why.startswith("a repair failed")
        assert time.strftime("%Y-") in why
        report = reader.check(timeout=0)
        assert ("poisoned", why) in report.problems
        assert report.unsettled == []  # nobody gets the locks: all of it can be told
        with pytest.raises(SegmentPoisoned, match=str(os.getpid())):
            reader.get(name="a", timeout=0)


@pytest.mark.parametrize("when", [0, 1, 1 << 63, (1 << 64) - 1])
def test_words_about_poison_that_are_damaged_themselves(
    doms: DomainList, planted: Planted, when: int
) -> None:
    planted.write(planted.header("poisoned"), 99)
    for field in ("at", "who", "pid"):
        planted.write(planted.header(f"poisoned_{field}"), (1 << 64) - 1)
    planted.write(planted.header("poisoned_when"), when)
    why = doms.info.poisoned
    assert why is not None and why.startswith("a repair failed: an unknown one")
    with pytest.raises(SegmentPoisoned, match="an unknown one"):
        doms.lock()


# --- what can still be read -----------------------------------------------------------------------


@pytest.fixture
def rich(doms: DomainList) -> DomainList:
    """a has a next definition, b data."""
    with doms.get(name="a") as dom:
        dom.activate()
        dom.next_definition = dom.definition.replace(title="next")
    with doms.get(name="b") as dom:
        dom.data = {"port": 5901, "note": "x" * 120}  # in the heap
    return doms


def files(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): DomainDef.from_xml(file.read_text()).title or ""
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


WHOLE = {"a.xml": "", "b.xml": "", "c.xml": "", "next/a.xml": "next"}


def test_definitions_become_files(rich: DomainList, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert export_xml(rich, folder) == 4
    assert files(folder) == WHOLE
    assert {file.stat().st_mode & 0o777 for file in folder.rglob("*.xml")} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "b.xml").write_text("mine")
    failures: list[str] = []
    assert export_xml(rich, folder, failed=lambda name, exc: failures.append(name)) == 0
    assert sorted(failures) == ["a", "a", "b", "c"]
    assert (folder / "b.xml").read_text() == "mine"
    assert export_xml(rich, folder, overwrite=True) == 4
    assert files(folder) == WHOLE
    with DomainList(max_domains=10) as other:
        report = other.load_all_configs(folder)
        assert sorted(report.loaded) == NAMES and report.failures == []


def test_a_file_of_an_export_is_whole_and_follows_no_link(rich: DomainList, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / "a.xml").symlink_to(victim)
    (folder / "b.xml").symlink_to("nowhere")
    os.link(victim, folder / "c.xml")
    failures: list[str] = []
    assert export_xml(rich, folder, failed=lambda name, exc: failures.append(name)) == 1
    assert sorted(failures) == NAMES
    assert export_xml(rich, folder, overwrite=True) == 4
    assert victim.read_text() == "precious" and victim.stat().st_nlink == 1
    assert files(folder) == WHOLE
    assert not [name for name in os.listdir(folder) if name.startswith(".tmp")]


RESCUES: dict[str, tuple[Damage, set[str], list[tuple[str, str]]]] = {
    # what is damaged: the files that are missing, and what is said of whom
    "poison": (lambda at: at.write(at.header("poisoned"), 1), set(), []),
    "every index": (
        lambda at: [at.write(at.header(f), 40) for f in ("list_level", "id_level")] and None,
        set(),
        [],
    ),
    "the number of slots": (lambda at: at.write(at.header("slot_count"), 1 << 40), set(), []),
    "a definition's place": (
        lambda at: at.write(at.extent(1, 0), 1 << 62 | 64),
        {"b.xml"},
        [("b", "not in the heap")],
    ),
    "a definition": (
        lambda at: at.write(at.at["heap"] + (at.read(at.extent(1, 0)) >> 25) * 64, (1 << 64) - 1),
        {"b.xml"},
        [("b", "the definition is damaged")],
    ),
    "a next definition": (
        lambda at: at.write(at.extent(0, 1), 1 << 62 | 64),
        {"next/a.xml"},
        [("a", "next definition")],
    ),
    "a name": (
        lambda at: at.write(at.name(2, 0), 0, 1),
        set(),
        [("slot 2", "another name than its definition; it is in c.xml")],
    ),
}


@pytest.mark.parametrize("what", RESCUES)
def test_what_can_be_read_is_exported(
    rich: DomainList, planted: Planted, path: str, tmp_path: Path, what: str
) -> None:
    damage, missing, told = RESCUES[what]
    damage(planted)
    said: list[tuple[str, str]] = []
    for number, reader in enumerate((rich, DomainList.attach(path=path))):
        said.clear()
        folder = tmp_path / f"new{number}"
        count = export_xml(reader, folder, failed=lambda n, exc: said.append((n, str(exc))))
        assert set(files(folder)) == set(WHOLE) - missing and count == len(WHOLE) - len(missing)
        assert [name for name, _ in said] == [name for name, _ in told]
        assert all(words in text for (_, text), (_, words) in zip(said, told, strict=True)), said
        if told:
            with pytest.raises(SegmentCorrupt):
                export_xml(reader, tmp_path / f"again{number}")


def test_the_definition_of_another_is_not_exported(
    rich: DomainList, planted: Planted, tmp_path: Path
) -> None:
    planted.write(planted.extent(1, 0), planted.read(planted.extent(0, 0)))
    said: list[str] = []
    count = export_xml(rich, tmp_path / "new", failed=lambda n, exc: said.append(f"{n}: {exc}"))
    assert count == 3 and set(files(tmp_path / "new")) == set(WHOLE) - {"b.xml"}
    assert len(said) == 1 and "b: the definition is damaged" in said[0]


def test_a_stream_leaves_out_only_what_is_damaged(rich: DomainList, planted: Planted) -> None:
    planted.write(planted.extent(1, 2), 1 << 62 | 64)
    status = planted.copy(2, "status")
    planted.write(status, planted.read(status) & ~0xFFFF | 99)
    planted.write(planted.extent(0, 0), 0)
    said: list[str] = []
    stream = io.BytesIO()
    assert export_domains(rich, stream, lambda name, exc: said.append(f"{name}: {exc}")) == 2
    assert len(said) == 3
    assert "a: the definition is damaged" in said[0] and "data is damaged" in said[1]
    assert "slot 2: " in said[2] and "cannot be right" in said[2]
    with DomainList(max_domains=10) as other:
        stream.seek(0)
        assert sorted(import_domains(other, stream).imported) == ["b", "c"]
        assert other.peek(name="b").data is None
