"""Config directories and the list together: what is loaded, and what reaches the disk.

The rules of files alone are in test_config_files.py; here stands what a `DomainList` makes of them,
for both kinds of lock.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import EVERY_STORE, problems

from shmdomains import DomainDef, DomainList, DomainState
from shmdomains.config import BATCH, ConfigDirs
from shmdomains.errors import (
    ConfigError,
    ContractError,
    DomainExists,
    DomainNotLocked,
    LockOrder,
)


def ident(name: str) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_DNS, name)


def domain_xml(name: str, note: str = "", number: uuid.UUID | None = None) -> str:
    return (
        f"<domain type='kvm'>\n  <name>{name}</name>\n  <uuid>{number or ident(name)}</uuid>\n"
        f"  <description>{note}</description>\n  <memory>1024</memory>\n"
        "  <os><type>hvm</type></os>\n</domain>\n"
    )


@pytest.fixture
def dirs(tmp_path: Path) -> ConfigDirs:
    (tmp_path / "vm").mkdir()
    return ConfigDirs(tmp_path / "vm", tmp_path / "vm" / "autostart")


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def doms(request: pytest.FixtureRequest) -> Iterator[DomainList]:
    with request.param.make(room=1000) as doms:
        yield doms
        assert problems(doms, request) == []


def fill(dirs: ConfigDirs, *names: str, note: str = "") -> None:
    for name in names:
        dirs.config_file(name).write_text(domain_xml(name, note))


def load(doms: DomainList, dirs: ConfigDirs, **kwargs: Any) -> Any:
    return doms.load_all_configs(dirs.config_dir, dirs.autostart_dir, **kwargs)


def saved(dirs: ConfigDirs, name: str) -> str | None:
    """The description in the domain's config file; None if there is no file."""
    path = dirs.config_file(name)
    return DomainDef.from_xml(path.read_bytes()).description or "" if path.exists() else None


def files(dirs: ConfigDirs) -> list[str]:
    return sorted(path.name for path in dirs.config_dir.glob("[!.]*.xml"))


def rename(doms: DomainList, old: str, new: str) -> None:
    with doms.locked():
        dom = doms.find_by_name(old)
        assert dom is not None
        with dom:
            doms.rename(dom, new)


# --- which directories ------------------------------------------------------------------------


def test_the_autostart_directory_is_libvirts_unless_it_is_said(
    doms: DomainList, dirs: ConfigDirs
) -> None:
    fill(dirs, "a")
    doms.load_all_configs(dirs.config_dir)
    assert doms.info.autostart_dir == str(dirs.config_dir / "autostart")
    assert not (dirs.config_dir / "autostart").exists()
    doms.set_autostart("a", True)
    assert dirs.is_autostart("a")
    doms.load_all_configs(dirs.config_dir)
    assert doms.peek(name="a").autostart


@pytest.mark.parametrize("what", ["a file", "workers"])
def test_a_load_that_fails_leaves_what_was_remembered(
    doms: DomainList, dirs: ConfigDirs, tmp_path: Path, what: str
) -> None:
    fill(dirs, "a")
    load(doms, dirs)
    (tmp_path / "other").write_text("")
    with pytest.raises((ConfigError, ValueError)):
        if what == "a file":
            doms.load_all_configs(tmp_path / "other")
        else:
            doms.load_all_configs(tmp_path / "none", workers=-1)
    assert doms.info.config_dir == str(dirs.config_dir)
    doms.undefine("a")
    assert files(dirs) == []


def test_forgotten_directories_are_not_reached(doms: DomainList, dirs: ConfigDirs) -> None:
    fill(dirs, "a")
    load(doms, dirs)
    doms.forget_configs()
    doms.undefine("a")
    doms.define(domain_xml("b"))
    assert files(dirs) == ["a.xml"]
    with doms.locked():
        doms.forget_configs()  # whoever holds the list lock need not let it go


def test_a_new_domain_takes_no_former_ones_autostart_link(
    doms: DomainList, dirs: ConfigDirs
) -> None:
    fill(dirs, "a")
    load(doms, dirs)
    doms.set_autostart("a", True)
    dirs.config_file("a").unlink()
    doms.undefine("a")
    assert dirs.autostart_dir is not None
    (dirs.autostart_dir / "a.xml").symlink_to(dirs.config_file("a"))
    doms.define(domain_xml("a"))
    assert not doms.peek(name="a").autostart and not dirs.is_autostart("a")
    doms.set_autostart("a", True)
    doms.define(domain_xml("a", "changed"))
    assert dirs.is_autostart("a")  # a domain that is redefined keeps its own
    load(doms, dirs)
    assert doms.peek(name="a").autostart


def test_a_definition_of_a_new_domain_only(doms: DomainList, dirs: ConfigDirs) -> None:
    load(doms, dirs)
    doms.define(domain_xml("a", "first"), new=True)
    anonymous = domain_xml("a", "second").replace(f"<uuid>{ident('a')}</uuid>", "")
    for again in (domain_xml("a", "second"), anonymous):
        with pytest.raises(DomainExists, match="already exists with uuid"):
            doms.define(again, new=True)
    assert doms.peek(name="a").definition.description == saved(dirs, "a") == "first"
    doms.define(anonymous)
    assert doms.peek(name="a").uuid == ident("a") and saved(dirs, "a") == "second"
    with doms.get(name="a", timeout=0):
        pass


# --- loading --------------------------------------------------------------------------------


def test_load(doms: DomainList, dirs: ConfigDirs, caplog: pytest.LogCaptureFixture) -> None:
    fill(dirs, "a", "b", "c", note="from disk")
    dirs.set_autostart("b", True)
    dirs.config_file("bad").write_text("<domain>\n  <oops")
    report = load(doms, dirs)
    assert report.loaded == ["a", "b", "c"]
    assert [failure.path for failure in report.failures] == [dirs.config_file("bad")]
    assert str(dirs.config_file("bad")) in caplog.text
    infos = {info.name: info for info in doms}
    assert sorted(infos) == ["a", "b", "c"]
    for name, info in infos.items():
        assert info.uuid == ident(name)
        assert info.persistent and not info.is_active and info.id == -1
        assert info.state == DomainState.SHUTOFF
        assert info.autostart is (name == "b")
        assert info.definition == DomainDef.from_xml(dirs.config_file(name).read_bytes())
        assert info.next_definition is None
    assert (Path(doms.info.config_dir), Path(doms.info.autostart_dir)) == (
        dirs.config_dir,
        dirs.autostart_dir,
    )
    assert not doms.is_locked


def test_load_a_missing_directory(doms: DomainList, tmp_path: Path) -> None:
    report = doms.load_all_configs(tmp_path / "none")
    assert (report.loaded, report.failures, len(doms)) == ([], [], 0)


@pytest.mark.parametrize("workers", [None, 2])
def test_load_many(doms: DomainList, dirs: ConfigDirs, workers: int | None) -> None:
    names = [f"web{n:03}" for n in range(2 * BATCH + 9)]
    fill(dirs, *names)
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        assert not doms.is_locked
        assert len(doms) == done
        calls.append((done, total))

    report = load(doms, dirs, progress=progress, workers=workers)
    assert (report.loaded, report.failures) == (names, [])
    assert calls[0] == (0, len(names)) and calls[-1] == (len(names), len(names))
    assert len(doms) == len(names)


@pytest.mark.differs
def test_load_again_replaces_and_keeps_the_record(doms: DomainList, dirs: ConfigDirs) -> None:
    fill(dirs, "a", "b", note="old")
    load(doms, dirs)
    fill(dirs, "a", note="new")
    dirs.set_autostart("a", True)
    dirs.delete("b")
    load(doms, dirs)
    info = doms.peek(name="a")
    assert info is not None and info.definition.description == "new" and info.autostart
    # A file that is gone is no order to remove the domain, as in libvirt.
    assert ident("b") in doms and len(doms) == 2


def test_load_gives_an_active_domain_its_next_definition(
    doms: DomainList, dirs: ConfigDirs
) -> None:
    fill(dirs, "a", note="old")
    load(doms, dirs)
    with doms.get(name="a") as dom:
        dom.activate(pid=os.getpid())
    fill(dirs, "a", note="new")
    assert load(doms, dirs).loaded == ["a"]
    with doms.get(name="a") as dom:
        assert dom.is_active
        assert dom.definition.description == "old"
        assert dom.next_definition.description == "new"
        dom.deactivate()
        assert dom.definition.description == "new"
        assert dom.next_definition is None


def test_load_makes_a_transient_domain_persistent(doms: DomainList, dirs: ConfigDirs) -> None:
    with doms.locked():
        doms.assign_def(DomainDef.from_xml(domain_xml("a")), persistent=False).unlock()
    fill(dirs, "a")
    load(doms, dirs)
    info = doms.peek(name="a")
    assert info is not None and info.persistent


def test_load_a_file_without_uuid(doms: DomainList, dirs: ConfigDirs) -> None:
    text = domain_xml("a").replace(f"<uuid>{ident('a')}</uuid>", "")
    dirs.config_file("a").write_text(text)
    load(doms, dirs)
    info = doms.peek(name="a")
    assert info is not None and info.definition.uuid == info.uuid
    assert load(doms, dirs).loaded == ["a"]
    again = doms.peek(name="a")
    assert again is not None and again.uuid == info.uuid


@pytest.mark.differs
def test_load_by_workers_is_no_different(doms: DomainList, dirs: ConfigDirs) -> None:
    """They hand on definitions that stay encoded unless a domain has one already."""
    fill(dirs, "a", "active", "b", "other", note="old")
    text = domain_xml("c").replace(f"<uuid>{ident('c')}</uuid>", "")
    dirs.config_file("c").write_text(text)
    assert load(doms, dirs, workers=2).loaded == ["a", "active", "b", "c", "other"]
    before = {info.name: info for info in doms}
    for name, info in before.items():
        definition = info.definition
        assert (definition.name, definition.uuid) == (name, info.uuid)
        assert info.persistent
    assert before["a"].definition.description == "old" and before["a"].uuid == ident("a")
    with doms.get(name="active") as dom:
        dom.activate(pid=os.getpid())
    fill(dirs, "a", "active", note="new")
    dirs.config_file("other").write_text(domain_xml("other", number=ident("another")))
    report = load(doms, dirs, workers=2)
    assert report.loaded == ["a", "active", "b", "c"]
    assert [failure.reason for failure in report.failures] == [
        f"domain 'other' already exists with uuid {ident('other')}"
    ]
    after = {info.name: info for info in doms}
    assert after["a"].definition.description == "new"
    assert after["active"].definition.description == "old"
    assert after["active"].next_definition.description == "new"
    assert {name: info.uuid for name, info in after.items()} == {
        name: info.uuid for name, info in before.items()
    }


@pytest.mark.differs
def test_load_reports_clashes_in_libvirts_words(doms: DomainList, dirs: ConfigDirs) -> None:
    other = uuid.uuid4()
    with doms.locked():
        doms.assign_def(DomainDef.from_xml(domain_xml("a", number=other))).unlock()
        doms.assign_def(DomainDef.from_xml(domain_xml("x", number=ident("b")))).unlock()
    fill(dirs, "a", "b", "c")
    report = load(doms, dirs)
    assert report.loaded == ["c"]
    assert [(failure.path.stem, failure.reason) for failure in report.failures] == [
        ("a", f"domain 'a' already exists with uuid {other}"),
        ("b", f"domain 'x' is already defined with uuid {ident('b')}"),
    ]
    assert sorted(info.name for info in doms) == ["a", "c", "x"]


@pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
def test_load_more_than_there_is_room_for(dirs: ConfigDirs, lock: str) -> None:
    fill(dirs, "a", "b", "c", "d", "e", note="old")
    with DomainList(max_domains=3, lock=lock) as doms:
        report = load(doms, dirs)
        assert report.loaded == ["a", "b", "c"]
        assert [failure.path.stem for failure in report.failures] == ["d", "e"]
        assert sorted(info.name for info in doms) == ["a", "b", "c"]
        fill(dirs, "a", "b", "c", note="new")
        assert load(doms, dirs).loaded == ["a", "b", "c"]
        assert {info.definition.description for info in doms} == {"new"}
        assert doms.check().problems == []


def test_load_with_locks_held_is_refused(doms: DomainList, dirs: ConfigDirs) -> None:
    fill(dirs, "a", "b")
    with doms.locked(), pytest.raises(ContractError):
        load(doms, dirs)
    assert len(doms) == 0
    load(doms, dirs)
    with doms.get(name="a"), pytest.raises(LockOrder):
        load(doms, dirs)
    assert not doms.is_locked


def test_load_waits_for_a_domain_and_takes_what_its_holder_saved(
    doms: DomainList, dirs: ConfigDirs
) -> None:
    fill(dirs, "a", note="old")
    load(doms, dirs)
    dom = doms.get(name="a")
    waiting = threading.Event()

    def progress(done: int, total: int) -> None:
        waiting.set()

    loader = threading.Thread(target=load, args=(doms, dirs), kwargs={"progress": progress})
    loader.start()
    assert waiting.wait(10)
    dom.definition = DomainDef.from_xml(domain_xml("a", "saved by the holder"))
    doms.save_config(dom)
    dom.unlock()
    loader.join(20)
    assert not loader.is_alive()
    info = doms.peek(name="a")
    assert info is not None and info.definition.description == "saved by the holder"


# --- what reaches the disk ------------------------------------------------------------------


def test_define_and_undefine(doms: DomainList, dirs: ConfigDirs) -> None:
    load(doms, dirs)
    doms.define(domain_xml("a", "one"))
    assert saved(dirs, "a") == "one"
    doms.define(domain_xml("a", "two"))
    assert saved(dirs, "a") == "two"
    with doms.get(name="a") as dom:
        doms.set_autostart(dom, True)
    assert dirs.is_autostart("a")
    doms.undefine(name="a")
    assert saved(dirs, "a") is None and ident("a") not in doms
    link = dirs.autostart_link("a")
    assert link is not None and not os.path.lexists(link)


def test_define_an_active_domain_saves_the_next_definition(
    doms: DomainList, dirs: ConfigDirs
) -> None:
    load(doms, dirs)
    doms.define(domain_xml("a", "live"))
    with doms.get(name="a") as dom:
        dom.activate(pid=os.getpid())
    doms.define(domain_xml("a", "next"))
    assert saved(dirs, "a") == "next"
    with doms.get(name="a") as dom:
        assert dom.definition.description == "live"
        doms.save_config(dom)
    assert saved(dirs, "a") == "next"
    doms.undefine(name="a")
    assert saved(dirs, "a") is None
    info = doms.peek(name="a")
    assert info is not None and info.is_active and not info.persistent


def test_save_and_delete_config(doms: DomainList, dirs: ConfigDirs) -> None:
    load(doms, dirs)
    doms.define(domain_xml("a", "one"))
    dom = doms.get(name="a")
    dom.unlock()
    for call in (doms.save_config, doms.delete_config):
        with pytest.raises(DomainNotLocked):
            call(dom)
    with dom:
        doms.delete_config(dom)
        assert saved(dirs, "a") is None
        doms.save_config(dom)
        assert saved(dirs, "a") == "one"


def test_set_autostart(doms: DomainList, dirs: ConfigDirs) -> None:
    fill(dirs, "a")
    load(doms, dirs)
    for enabled in (True, False):
        with doms.get(name="a") as dom:
            doms.set_autostart(dom, enabled)
        info = doms.peek(name="a")
        assert info is not None and info.autostart is enabled
        assert dirs.is_autostart("a") is enabled


def test_rename(doms: DomainList, dirs: ConfigDirs) -> None:
    fill(dirs, "a", "b")
    dirs.set_autostart("a", True)
    load(doms, dirs)
    rename(doms, "a", "z")
    assert files(dirs) == ["b.xml", "z.xml"]
    assert dirs.is_autostart("z")
    with DomainList() as other:
        load(other, dirs)
        info = other.peek(uuid=ident("a"))
        assert info is not None and info.name == info.definition.name == "z" and info.autostart
    with pytest.raises(DomainExists):
        rename(doms, "z", "b")
    assert files(dirs) == ["b.xml", "z.xml"]


def test_a_rename_makes_the_link_that_the_record_tells_of(
    doms: DomainList, dirs: ConfigDirs
) -> None:
    fill(dirs, "a")
    load(doms, dirs)
    with doms.get(name="a") as dom:
        dom.autostart = True  # as after a death in a rename: the old link went, the record stayed
    rename(doms, "a", "b")
    assert doms.peek(name="b").autostart and dirs.is_autostart("b")


def test_without_directories_nothing_is_written(
    doms: DomainList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    doms.define(domain_xml("a"))
    rename(doms, "a", "b")
    doms.undefine(name="b")
    assert os.listdir(tmp_path) == []


# --- failures -------------------------------------------------------------------------------


def refuse(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_restores_what_was_there(
    doms: DomainList, dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt of 2008 deleted the domain."""
    fill(dirs, "a", note="old")
    load(doms, dirs)
    for name in ("a", "new"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(ConfigError, match=f"No space left on device.*{name}.xml"):
                doms.define(domain_xml(name, "new"))
    assert files(dirs) == ["a.xml"] and saved(dirs, "a") == "old"
    info = doms.peek(name="a")
    assert info is not None and info.definition.description == "old"
    assert len(doms) == 1 and doms.peek(name="new") is None


def test_a_failed_rename_changes_nothing(
    doms: DomainList, dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(dirs, "a")
    load(doms, dirs)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(ConfigError):
            rename(doms, "a", "b")
    assert files(dirs) == ["a.xml"]
    assert [info.name for info in doms] == ["a"]
    assert doms.peek(name="b") is None
    rename(doms, "a", "b")


def test_a_failed_undefine_keeps_the_domain(
    doms: DomainList, dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(dirs, "a")
    load(doms, dirs)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(ConfigError):
            doms.undefine(name="a")
    assert files(dirs) == ["a.xml"]
    assert ident("a") in doms
    doms.undefine(name="a")


def test_a_name_that_would_not_be_loaded_again(doms: DomainList, dirs: ConfigDirs) -> None:
    load(doms, dirs)
    with pytest.raises(ConfigError, match="begins with"):
        doms.define(domain_xml(".hidden"))
    assert len(doms) == 0 and files(dirs) == []


# --- several processes ----------------------------------------------------------------------


def run(code: str, *args: str | Path, cwd: str | Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def test_a_stranger_reaches_the_remembered_directories(
    dirs: ConfigDirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
        import sys
        from shmdomains import DomainList
        with DomainList.attach(path=sys.argv[1]) as doms:
            doms.define(sys.argv[2])
            with doms.get(name="a") as dom:
                doms.set_autostart(dom, True)
            with doms.locked():
                with doms.find_by_name("b") as dom:
                    doms.rename(dom, "c")
            doms.undefine(name="d")
    """
    fill(dirs, "b", "d")
    monkeypatch.chdir(dirs.config_dir.parent)
    with DomainList.create(path=tmp_path / "segment") as doms:
        doms.load_all_configs("vm", "vm/autostart")
        stranger = run(code, tmp_path / "segment", domain_xml("a", "theirs"), cwd="/")
        stranger.communicate(timeout=60)
        assert stranger.returncode == 0
        assert files(dirs) == ["a.xml", "c.xml"]
        assert saved(dirs, "a") == "theirs" and dirs.is_autostart("a")
        doms.unlink(force=True)


def test_two_processes_load_the_same_directory(dirs: ConfigDirs, tmp_path: Path) -> None:
    names = [f"web{n:03}" for n in range(3 * BATCH)]
    fill(dirs, *names)
    code = """
        import sys
        from shmdomains import DomainList
        with DomainList.attach(path=sys.argv[1]) as doms:
            print("ready", flush=True)
            sys.stdin.readline()
            report = doms.load_all_configs(sys.argv[2])
            print(len(report.loaded), len(report.failures), flush=True)
    """
    with DomainList.create(path=tmp_path / "segment", max_domains=len(names)) as doms:
        loaders = [run(code, tmp_path / "segment", dirs.config_dir) for _ in range(2)]
        for loader in loaders:
            assert loader.stdout is not None and loader.stdout.readline() == "ready\n"
        for loader in loaders:
            assert loader.stdin is not None
            loader.stdin.write("\n")
            loader.stdin.flush()
        for loader in loaders:
            out, _ = loader.communicate(timeout=60)
            assert out == f"{len(names)} 0\n"
        assert sorted(info.name for info in doms) == names
        assert doms.check().problems == []
        doms.unlink(force=True)
