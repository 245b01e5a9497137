"""A rule that changes a record and its files finishes or vanishes, wherever its process is killed.

steps_driver.py has the deaths and the storms. Here is also what happens when a step cannot be
settled, and what a user intends (`Domain.intend`).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from helpers import EVERY_STORE, SOAK, problems, thread_party, xml
from killing import Child, Planted
from steps_driver import RULES, prove, prove_settling, storm, watch

from shmdomains import ConfigError, DomainDef, DomainList, LockTimeout, SegmentCorrupt, SegmentFull
from shmdomains.config import ConfigDirs, change
from shmdomains.rules import compare
from shmdomains.rules.work import Step, Work

Tried = Callable[[str, int], None]
PATIENCE = 600.0
SOME = ["define", "redefine elsewhere", "undefine", "rename with autostart"]

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.soak
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize(
    ("rule", "lock"),
    [
        *((rule, "robust") for rule in RULES),
        *((rule, "multiprocessing") for rule in (RULES if SOAK else SOME)),
    ],
)
def test_killed_at_each_call(
    start: Callable[..., Child], segment_dir: Path, rule: str, lock: str, tried: Tried
) -> None:
    everyone = SOAK and lock == "robust"
    deaths = start(prove, segment_dir / "vm", rule, lock, everyone).hear(PATIENCE)
    assert deaths > 20
    tried(f"deaths in '{rule}'", deaths)


@pytest.mark.soak
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("rule", SOME)
def test_killed_while_settling(
    start: Callable[..., Child], segment_dir: Path, rule: str, tried: Tried
) -> None:
    deaths = start(prove_settling, segment_dir / "vm", rule, 3 if SOAK else 19).hear(PATIENCE)
    assert deaths > 20
    tried("deaths of those who settle", deaths)


@pytest.mark.soak
@pytest.mark.timeout(PATIENCE)
def test_storms_end_with_the_files_that_the_records_say(
    start: Callable[..., Child], segment_dir: Path, tried: Tried
) -> None:
    storms = range(200 if SOAK else 25)
    killed = start(storm, segment_dir / "vm", storms).hear(PATIENCE)
    assert killed > 2 * len(storms)
    tried("storms of rules that change files", len(storms))
    tried("workers killed in them", killed)


@pytest.mark.timeout(PATIENCE)
def test_nobody_sees_a_persistent_domain_without_its_file(
    start: Callable[..., Child], segment_dir: Path, tried: Tried
) -> None:
    rounds = 100 if SOAK else 20
    seen = start(watch, segment_dir / "vm", rounds).hear(PATIENCE)
    assert seen > 100
    tried("looks at a persistent domain and its file", seen)


# --- when it cannot be settled ------------------------------------------------------------------

WEB1 = UUID(int=1)


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def doms(request: pytest.FixtureRequest) -> Iterator[Any]:
    with request.param.make() as doms:
        yield doms
        assert problems(doms, request) == []


@pytest.fixture
def folder(doms: Any, tmp_path: Path) -> Path:
    """Where the domain web1 is saved."""
    folder = tmp_path / "vm"
    folder.mkdir()
    doms.load_all_configs(folder)
    doms.define(xml("web1", WEB1))
    return folder


def begin(doms: Any, folder: Path, rule: str = "rename", *names: str) -> Step:
    """As a rule that was killed: the record says that it was begun."""
    step = Step.of(rule, ConfigDirs(folder, folder / "autostart"), *(names or ("web1", "web2")))
    with doms.get(WEB1) as dom:
        dom._commit_work(Work(step))
    return step


def half_renamed(doms: Any, folder: Path) -> None:
    begin(doms, folder)
    (folder / "web2.xml").write_text(xml("web2", WEB1))
    (folder / "web1.xml").unlink()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*.xml"))


def test_whoever_locks_the_domain_settles_it(doms: Any, folder: Path) -> None:
    ways: list[Callable[[], Any]] = [
        lambda: doms.get("web1"),
        lambda: doms.lookup(uuid=WEB1),
        lambda: doms.lock_many([WEB1])[0],
    ]
    dom = doms.get("web1")
    dom.unlock()

    def lock() -> Any:
        dom.lock()
        return dom

    def try_lock() -> Any:
        assert dom.try_lock()
        return dom

    def find() -> Any:
        with doms.locked():
            return doms.find_by_name("web1")

    for way in (*ways, lock, try_lock, find):
        half_renamed(doms, folder)
        assert len(doms._unfinished()) == 1
        found = way()
        assert files(folder) == ["web1.xml"] and not found.changed
        found.unlock()
        assert doms._unfinished() == []


def test_a_directory_that_is_gone_blocks_no_domain(
    doms: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half_renamed(doms, folder)
    folder.rename(folder.with_name("away"))
    for _ in range(3):
        with doms.get("web1") as dom:
            dom.data = "used all the same"
    assert caplog.text.count("the rename that was begun is not settled") == 1
    assert "domain 'web1'" in caplog.text and str(folder) in caplog.text
    assert doms.peek("web1").data == "used all the same"
    assert not folder.exists() and len(doms._unfinished()) == 1
    folder.with_name("away").rename(folder)
    doms.get("web1").unlock()
    assert files(folder) == ["web1.xml"] and doms._unfinished() == []


def test_a_new_domain_makes_the_directory(doms: Any, tmp_path: Path) -> None:
    folder = tmp_path / "none" / "yet"
    step = Step.of("define", ConfigDirs(folder, folder / "autostart"), "web1", defines=True)
    with doms.locked():
        made = doms._make(DomainDef.from_xml(xml("web1", WEB1)), False, None, step)
    made.unlock()
    doms.load_all_configs(folder)
    assert doms.peek("web1").persistent and files(folder) == ["web1.xml"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_file_that_cannot_be_written(
    doms: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    half_renamed(doms, folder)

    def fail(path: Path, data: bytes) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(change, "_write_file", fail)
        with doms.get("web1") as dom:
            assert not dom.changed
            assert files(folder) == ["web2.xml"]  # as it was
        assert os.strerror(number) in caplog.text
        # The next rule of the domain fails as well, and the step is still there.
        with pytest.raises(ConfigError):
            doms.define(xml("web1", WEB1, memory=2048))
        assert len(doms._unfinished()) == 1 and doms.peek("web1").definition.memory == 1024
    doms.define(xml("web1", WEB1, memory=4096))
    assert files(folder) == ["web1.xml"] and "4096" in (folder / "web1.xml").read_text()


def test_a_rule_after_what_could_not_be_settled_leaves_it_to_the_next(
    doms: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own change is made, and what was left before is settled later."""
    half_renamed(doms, folder)
    with monkeypatch.context() as patch:
        patch.setattr(ConfigDirs, "settle", _refuse)
        dom = doms.get("web1")
        dom.definition = dom.definition.replace(memory=2048)
        doms.save_config(dom)
    assert files(folder) == ["web1.xml", "web2.xml"]
    dom.unlock()
    assert len(doms._unfinished()) == 1
    doms.get("web1").unlock()
    assert files(folder) == ["web1.xml"] and "2048" in (folder / "web1.xml").read_text()
    assert doms._unfinished() == []


def test_undefine_takes_what_could_not_be_settled(
    doms: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: nothing can be written, but removed. Else the next load brought it back."""
    half_renamed(doms, folder)
    monkeypatch.setattr(ConfigDirs, "settle", _refuse)
    doms.undefine("web1")
    assert files(folder) == [] and len(doms) == 0


def _refuse(*args: object, **kwargs: object) -> None:
    raise ConfigError(errno.EIO, os.strerror(errno.EIO), "here")


def test_the_directorys_lock_is_waited_for_in_time(doms: Any, folder: Path) -> None:
    half_renamed(doms, folder)
    lock = os.open(folder / ".lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for timeout in (0, 0.1):
            with pytest.raises(LockTimeout, match="config directory"):
                doms.get("web1", timeout=timeout)
        dom = doms._unfinished()[0]
        assert not dom.try_lock() and not dom.is_locked
    finally:
        os.close(lock)
    dom.lock(0)
    assert files(folder) == ["web1.xml"]
    dom.unlock()


def test_ctrl_c_while_settling_leaves_nothing_locked(
    doms: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, what in ((change, "_write_file"), (change, "sync_directory"), (os, "link")):
        half_renamed(doms, folder)
        with monkeypatch.context() as patch:
            patch.setattr(place, what, _interrupt)
            with pytest.raises(KeyboardInterrupt):
                doms.get("web1")
        dom = doms._unfinished()[0]
        assert not dom.is_locked and not doms.is_locked
        with thread_party(doms=doms) as other:
            assert other.tell(
                "dom = doms.get('web1', timeout=5); name = dom.name; dom.unlock(); name"
            )
        assert files(folder) == ["web1.xml"] and doms._unfinished() == []


def _interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_a_step_is_settled_in_its_own_directory(doms: Any, folder: Path, tmp_path: Path) -> None:
    half_renamed(doms, folder)
    (tmp_path / "other").mkdir()
    doms.load_all_configs(tmp_path / "other")  # settles it first
    assert files(folder) == ["web1.xml"] and files(tmp_path / "other") == []
    doms.save_config("web1")
    assert files(tmp_path / "other") == ["web1.xml"]


def test_a_living_rule_that_fails_ends_its_step(
    doms: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doms.set_autostart("web1", True)
    with monkeypatch.context() as patch:
        patch.setattr(change, "sync_directory", _refuse)
        for call in (
            lambda: doms.define(xml("new")),
            lambda: doms.define(xml("web1", WEB1, memory=2048)),
            lambda: doms.save_config("web1"),
            lambda: doms.rename("web1", "web2"),
            lambda: doms.set_autostart("web1", False),
            lambda: doms.delete_config("web1"),
            lambda: doms.undefine("web1"),
        ):
            with pytest.raises(ConfigError):
                call()
            assert doms._unfinished() == []
    assert [(info.name, info.definition.memory, info.autostart) for info in doms] == [
        ("web1", 1024, True)
    ]


def test_what_could_not_be_undone_is_settled_by_the_next_holder(
    doms: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(change, "sync_directory", _refuse)
        patch.setattr(os, "replace", _refuse)
        with pytest.raises(ConfigError):
            doms.define(xml("web1", WEB1, memory=2048))
    assert "cannot be restored" in caplog.text
    assert "2048" in (folder / "web1.xml").read_text()
    doms.get("web1").unlock()
    assert "1024" in (folder / "web1.xml").read_text() and doms._unfinished() == []


def test_a_full_segment_hinders_no_undefine(
    doms: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be no room to note a step, but undefine is what makes room."""

    def full(*args: object, **kwargs: object) -> None:
        raise SegmentFull("made to be full")

    monkeypatch.setattr(doms._handle_type, "_commit_work", full)
    doms.set_autostart("web1", True)
    with pytest.raises(SegmentFull):
        doms.define(xml("web1", WEB1, memory=2048))
    doms.undefine("web1")
    assert len(doms) == 0 and files(folder) == []


def test_undefine_in_a_list_without_any_room(tmp_path: Path) -> None:
    with DomainList(max_domains=100, max_bytes=3 << 20) as doms:
        doms.load_all_configs(tmp_path)
        for number in range(5):
            doms.define(xml(f"vm{number}"))
        with doms.locked():
            for number in range(60):
                doms.assign_def(DomainDef.from_xml(xml(f"filler{number}"))).unlock()
        size = 1 << 20
        for info in doms.list(persistent=False):
            while size and doms[info.uuid].data is None:
                try:
                    with doms.get(info.uuid) as dom:
                        dom.data = b"x" * size
                except SegmentFull:
                    size //= 2
        with doms.get("vm0") as dom, pytest.raises(SegmentFull):
            dom.intend("start")
        doms.set_autostart("vm0", True)
        for info in doms.list(persistent=True):
            doms.undefine(info.uuid)
        assert files(tmp_path) == [] and doms.check().problems == []


# --- check and recover --------------------------------------------------------------------------


def config_problems(doms: Any) -> list[str]:
    return [text for name, text in doms.check().problems if name == "config"]


@pytest.mark.differs
def test_check_compares_records_and_files(doms: Any, folder: Path) -> None:
    assert config_problems(doms) == []
    (folder / "web1.xml").rename(folder / "elsewhere.xml")
    assert config_problems(doms) == []  # it is its file, by its uuid
    text = (folder / "elsewhere.xml").read_text()
    (folder / "elsewhere.xml").unlink()
    assert config_problems(doms) == [f"domain 'web1' is persistent, and has no file in {folder}"]
    (folder / "web1.xml").write_text(text)
    (folder / "web2.xml").write_text(text.replace("web1", "web2"))
    assert config_problems(doms) == [f"{folder / 'web2.xml'} holds domain 'web1' a second time"]
    (folder / "web2.xml").write_text(text)  # a forgotten copy, which a load reports
    assert config_problems(doms) == []
    (folder / "web2.xml").unlink()
    (folder / "autostart").mkdir()
    (folder / "autostart" / "web1.xml").symlink_to(folder / "web1.xml")
    assert config_problems(doms) == [
        f"domain 'web1' is not set to autostart, and an autostart link leads to "
        f"{folder / 'web1.xml'}"
    ]
    with doms.get("web1") as dom:
        dom.autostart = True
    assert config_problems(doms) == []
    (folder / "autostart" / "web1.xml").unlink()
    assert config_problems(doms) == [
        f"domain 'web1' is set to autostart, and no autostart link leads to {folder / 'web1.xml'}"
    ]
    with doms.get("web1") as dom:
        dom.autostart = dom.persistent = False
    assert config_problems(doms) == [
        f"domain 'web1' is not persistent, and {folder / 'web1.xml'} holds it"
    ]
    with doms.get("web1"):
        assert config_problems(doms) == []  # its holder may be in the middle of something
    with thread_party(doms=doms) as other:
        other.do("dom = doms.get('web1')")
        assert config_problems(doms) == []
        other.do("dom.unlock()")
    assert len(config_problems(doms)) == 1
    doms.forget_configs()
    assert config_problems(doms) == []


def test_check_settles_what_a_killed_rule_left(doms: Any, folder: Path) -> None:
    half_renamed(doms, folder)
    assert config_problems(doms) == []
    assert files(folder) == ["web1.xml"]


def test_check_has_no_verdict_where_it_cannot_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vm"
    with DomainList(max_domains=30) as doms:
        doms.load_all_configs(folder)
        for number in range(30):
            doms.define(xml(f"vm{number}"))
        with monkeypatch.context() as patch:
            patch.setattr(compare, "SLICE", 0)
            report = doms.check(0)
        assert report and ("config", "there was no time to read every file") in report.unsettled
        assert doms.check().unsettled == []
        for path in folder.glob("*.xml"):
            path.unlink()
        found = config_problems(doms)
        assert len(found) == 21 and found[-1] == "10 more domains differ from their files"
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        folder.write_text("")
        report = doms.check()
        assert report and [name for name, _ in report.unsettled] == ["config"]
        assert str(folder) in report.unsettled[0][1]
        doms.forget_configs()


def test_recover_settles_and_says_so(tmp_path: Path) -> None:
    with DomainList(max_domains=10) as doms:
        doms.load_all_configs(tmp_path)
        doms.define(xml("web1", WEB1))
        half_renamed(doms, tmp_path)
        lock = os.open(tmp_path / ".lock", os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = doms.recover()
        os.close(lock)
        assert [(one.lock, one.name) for one in report.held] == [("files", "web1")]
        (repair,) = doms.recover().repairs
        assert (repair.lock, repair.name, repair.died) == ("files", "web1", None)
        assert str(repair) == (
            "files of domain 'web1': a rule that was killed had begun to change them; they are "
            "what its record says"
        )
        assert files(tmp_path) == ["web1.xml"]
        assert doms.recover().repairs == []


# --- damage -------------------------------------------------------------------------------------

WORK = 3  # the number of the blob


def test_a_flipped_bit_in_what_is_under_way_is_an_error(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, tried: Tried
) -> None:
    """Never another directory or another name: the domain is handed out, and its files stay."""
    flipped = 0
    with DomainList.create(path=path, max_domains=10) as doms, Planted(path) as planted:
        doms.load_all_configs(tmp_path)
        doms.define(xml("web1", WEB1))
        work = Work(begin(doms, tmp_path))
        size = 8 + len(work.encode())
        (tmp_path / "web2.xml").write_text(xml("web2", WEB1))
        place = planted.at["heap"] + (planted.read(planted.extent(0, WORK)) >> 25) * 64
        for at in range(place, place + size):
            for bit in range(0, 8, 1 if SOAK else 3):
                planted.flip(at, bit, 1)
                with doms.get("web1") as dom, pytest.raises(SegmentCorrupt):
                    assert dom.unfinished is None
                with pytest.raises(SegmentCorrupt):
                    doms.save_config("web1")
                assert files(tmp_path) == ["web1.xml", "web2.xml"]
                planted.flip(at, bit, 1)
                flipped += 1
        assert "what was begun with it is not settled" in caplog.text
        doms.get("web1").unlock()
        assert files(tmp_path) == ["web1.xml"] and doms.check().problems == []
        doms.unlink(force=True)
    tried("bits flipped in what is under way", flipped)
