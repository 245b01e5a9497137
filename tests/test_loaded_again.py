"""A list loads a file again only if the file or its domain changed since it loaded it.

Whatever is remembered must never hide a change: each way to change a file, a link or a domain is
made here, by this process and by another one, and the next load has to see it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import problems

from shmdomains import DomainDef, DomainList, LoadReport
from shmdomains.config import ConfigDirs, parse, remembered
from shmdomains.config import load as load_module

COUNT = remembered.WORTH
NAMES = [f"web{n:03}" for n in range(COUNT)]
ONE = NAMES[5]


def domain_xml(name: str, note: str = "old") -> str:
    return (
        f"<domain type='kvm'><name>{name}</name><uuid>{ident(name)}</uuid>"
        f"<description>{note}</description><memory>1024</memory><os><type>hvm</type></os></domain>"
    )


def ident(name: str) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_DNS, name)


@pytest.fixture
def dirs(tmp_path: Path) -> ConfigDirs:
    (tmp_path / "vm").mkdir()
    dirs = ConfigDirs(tmp_path / "vm", tmp_path / "vm" / "autostart")
    for name in NAMES:
        dirs.config_file(name).write_text(domain_xml(name))
    tick(dirs)
    return dirs


@pytest.fixture(params=["robust", "multiprocessing"])
def doms(request: pytest.FixtureRequest) -> Iterator[DomainList]:
    with DomainList(max_domains=200, lock=request.param) as doms:
        yield doms
        assert problems(doms, request) == []


def tick(dirs: ConfigDirs) -> None:
    """Return once the filesystem's clock is past the last change of every file."""
    last = max(path.stat().st_ctime_ns for path in dirs.config_dir.iterdir())
    probe, end = dirs.config_dir / "probe", time.monotonic() + 10
    while time.monotonic() < end:
        probe.write_text("")
        if probe.stat().st_mtime_ns > last:
            break
        probe.unlink()
    probe.unlink()


class Loads:
    """Loads a directory into a list, and tells which files were parsed for it."""

    def __init__(self, dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dirs = dirs
        self.parsed: list[str] = []
        parse_file = parse.parse_file

        def noted(path: str) -> parse.ParsedFile:
            self.parsed.append(Path(path).stem)
            return parse_file(path)

        monkeypatch.setattr(parse, "parse_file", noted)
        monkeypatch.setattr(load_module, "parse_file", noted)

    def __call__(self, doms: DomainList, **kwargs: Any) -> LoadReport:
        self.parsed.clear()
        return doms.load_all_configs(self.dirs.config_dir, self.dirs.autostart_dir, **kwargs)


@pytest.fixture
def load(dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(dirs, monkeypatch)


@pytest.fixture
def loaded(doms: DomainList, load: Loads) -> DomainList:
    load(doms)
    assert load.parsed == NAMES
    return doms


def test_what_did_not_change_is_not_loaded_again(loaded: DomainList, load: Loads) -> None:
    events, calls = loaded._event_count, []
    report = load(loaded, progress=lambda done, total: calls.append((done, total)))
    assert (report.loaded, report.failures, load.parsed) == (NAMES, [], [])
    assert calls == [(0, COUNT), (COUNT, COUNT)]
    assert loaded._event_count == events
    load(loaded, workers=2)
    assert load.parsed == []


def test_another_process_of_the_list_remembers_too(loaded: DomainList, load: Loads) -> None:
    process = os.fork()
    if process == 0:
        load(loaded)
        os._exit(len(load.parsed))
    assert os.waitpid(process, 0)[1] == 0


def test_a_new_list_remembers_nothing(loaded: DomainList, load: Loads) -> None:
    with DomainList(max_domains=200) as other:
        assert load(other).loaded == NAMES
        assert load.parsed == NAMES and len(other) == COUNT
    load(loaded)  # what is remembered is the other list's now
    assert load.parsed == NAMES


# --- changes of the file ----------------------------------------------------------------------


def rewritten(path: Path) -> None:
    """The same size, inode and time of change: only ctime tells."""
    status = path.stat()
    path.write_text(domain_xml(ONE, "new"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert path.stat().st_size == status.st_size


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_text(domain_xml(ONE, "new"))
    os.rename(other, path)


def touched_as_long_ago(path: Path) -> None:
    path.write_text(domain_xml(ONE, "new"))
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("change", [rewritten, replaced, touched_as_long_ago])
def test_a_changed_file_is_loaded(
    loaded: DomainList, load: Loads, change: Callable[[Path], None]
) -> None:
    change(load.dirs.config_file(ONE))
    assert load(loaded).loaded == NAMES
    assert load.parsed == [ONE]
    assert loaded[ONE].definition.description == "new"
    tick(load.dirs)
    load(loaded)  # it was changed just now; the one after this knows it
    load(loaded)
    assert load.parsed == []


def test_a_file_that_changes_while_it_is_loaded_is_not_remembered(
    doms: DomainList, load: Loads
) -> None:
    """A later change in the same tick of the clock would leave the same times."""

    def progress(done: int, total: int) -> None:
        if done == 0:
            load.dirs.config_file(ONE).write_text(domain_xml(ONE, "two"))

    load(doms, progress=progress)
    assert doms[ONE].definition.description == "two"
    load(doms)
    assert load.parsed == [ONE]


@pytest.mark.differs
def test_a_bad_file_fails_again_and_a_removed_one_is_not_loaded(
    loaded: DomainList, load: Loads
) -> None:
    load.dirs.config_file(ONE).write_text("<oops")
    load.dirs.config_file(NAMES[6]).unlink()
    for _ in range(2):
        report = load(loaded)
        assert [failure.path.stem for failure in report.failures] == [ONE]
        assert report.loaded == [name for name in NAMES if name not in (ONE, NAMES[6])]


def test_a_file_that_gets_a_rival_named_after_the_domain(loaded: DomainList, load: Loads) -> None:
    odd = load.dirs.config_dir / "aaa.xml"
    os.rename(load.dirs.config_file(ONE), odd)
    tick(load.dirs)
    load(loaded)
    load(loaded)
    assert load.parsed == []
    load.dirs.config_file(ONE).write_text(domain_xml(ONE, "new"))
    report = load(loaded)
    assert [failure.path for failure in report.failures] == [odd]
    assert loaded[ONE].definition.description == "new"


# --- changes of the domain --------------------------------------------------------------------


def changed(doms: DomainList) -> None:
    with doms.get(ONE) as dom:
        dom.definition = dom.definition.replace(description="in memory")


def changed_elsewhere(doms: DomainList) -> None:
    process = os.fork()
    if process == 0:
        changed(doms)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0


def undefined(doms: DomainList) -> None:
    doms.forget_configs()
    doms.undefine(ONE)


def undefined_and_redefined(doms: DomainList) -> None:
    undefined(doms)
    doms.define(domain_xml(ONE, "in memory"))


def made_transient(doms: DomainList) -> None:
    with doms.get(ONE) as dom:
        dom.persistent = False


def told_to_start(doms: DomainList) -> None:
    with doms.get(ONE) as dom:
        dom.autostart = True


@pytest.mark.parametrize(
    "change",
    [
        changed,
        changed_elsewhere,
        undefined,
        undefined_and_redefined,
        made_transient,
        told_to_start,
    ],
)
def test_the_file_of_a_changed_domain_is_loaded(
    loaded: DomainList, load: Loads, change: Callable[[DomainList], None]
) -> None:
    before = loaded[ONE].to_dict()
    change(loaded)
    assert load(loaded).loaded == NAMES
    assert load.parsed == [ONE]
    assert loaded[ONE].to_dict() == before
    load(loaded)
    assert load.parsed == []


def test_an_active_domain_gets_its_next_definition(loaded: DomainList, load: Loads) -> None:
    with loaded.get(ONE) as dom:
        dom.activate()
        dom.definition = dom.definition.replace(description="live")
    load(loaded)
    info = loaded[ONE]
    assert info.definition.description == "live"
    assert info.next_definition is not None and info.next_definition.description == "old"
    load(loaded)
    assert load.parsed == []


@pytest.mark.differs
def test_a_renamed_domain_clashes_with_its_old_file(loaded: DomainList, load: Loads) -> None:
    loaded.forget_configs()
    loaded.rename(ONE, "other")
    report = load(loaded)
    assert [failure.reason for failure in report.failures] == [
        f"domain 'other' is already defined with uuid {ident(ONE)}"
    ]


def test_what_a_rename_and_a_save_leave_is_loaded_once(loaded: DomainList, load: Loads) -> None:
    loaded.rename(ONE, "zebra")
    loaded.define(domain_xml(NAMES[6], "saved"))
    tick(load.dirs)
    load(loaded)
    assert load.parsed == [NAMES[6], "zebra"]
    assert loaded[NAMES[6]].definition.description == "saved"
    load(loaded)
    assert load.parsed == []


# --- autostart --------------------------------------------------------------------------------


def test_links_are_read_each_time(loaded: DomainList, load: Loads) -> None:
    directory = load.dirs.autostart_dir
    assert directory is not None
    directory.mkdir()
    link = directory / f"{ONE}.xml"
    link.symlink_to(load.dirs.config_file(ONE))
    load(loaded)
    assert loaded[ONE].autostart
    load(loaded)
    assert load.parsed == [] and loaded[ONE].autostart
    link.unlink()
    link.symlink_to(load.dirs.config_file(NAMES[6]))
    load(loaded)
    assert not loaded[ONE].autostart
    loaded.set_autostart(ONE, True)
    load(loaded)
    assert loaded[ONE].autostart


# --- what is remembered -----------------------------------------------------------------------


def test_few_files_are_not_remembered(doms: DomainList, load: Loads) -> None:
    load.dirs.config_file(ONE).unlink()
    before = sorted(os.listdir(load.dirs.config_dir))
    load(doms)
    assert sorted(os.listdir(load.dirs.config_dir)) == before


def test_the_memory_is_its_owners(loaded: DomainList, load: Loads) -> None:
    path = load.dirs.config_dir / remembered.NAME
    assert path.stat().st_mode & 0o777 == 0o600
    assert not [name for name in os.listdir(load.dirs.config_dir) if name.startswith(".tmp")]


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(1000))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link(path: Path) -> None:
    os.rename(path, path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [garbage, cut_off, a_pipe, a_link, a_directory])
def test_a_damaged_memory_is_none(
    loaded: DomainList, load: Loads, damage: Callable[[Path], None]
) -> None:
    damage(load.dirs.config_dir / remembered.NAME)
    assert load(loaded).loaded == NAMES
    assert load.parsed == NAMES


def test_another_parser_parses_anew(
    loaded: DomainList, load: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_parser", lambda: [(1, 2)])
    load(loaded)
    assert load.parsed == NAMES


def test_nothing_is_remembered_where_nothing_can_be_written(
    doms: DomainList, load: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(directory: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(remembered, "temporary_name", refused)
    assert load(doms).loaded == NAMES
    assert load(doms).loaded == NAMES
    assert load.parsed == NAMES


KILLED = """
import os, signal, sys
from shmdomains import DomainList
doms = DomainList.attach(path=sys.argv[1])
def progress(done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
doms.load_all_configs(sys.argv[2], progress=progress)
"""


@pytest.mark.parametrize("at", [0, COUNT])
def test_a_load_that_is_killed_hides_nothing(tmp_path: Path, load: Loads, at: int) -> None:
    with DomainList.create(path=tmp_path / "segment", max_domains=200) as doms:
        load(doms)
        load.dirs.config_file(ONE).write_text(domain_xml(ONE, "new"))
        changed_elsewhere(doms)
        places = [tmp_path / "segment", load.dirs.config_dir]
        command = [sys.executable, "-c", KILLED, *places, str(at)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert load(doms).loaded == NAMES
        assert load.parsed == [ONE]
        assert doms[ONE].definition.description == "new"
        doms.unlink()


def test_a_file_name_that_is_no_utf8(doms: DomainList, load: Loads) -> None:
    odd = os.fsdecode(b"\xff.xml")
    os.rename(load.dirs.config_file(ONE), load.dirs.config_dir / odd)
    tick(load.dirs)
    for parsed in (COUNT, 1):
        report = load(doms)
        assert (len(report.loaded), report.failures, len(load.parsed)) == (COUNT, [], parsed)
    os.rename(load.dirs.config_dir / odd, load.dirs.config_file(ONE))


def test_a_definition_without_uuid_keeps_the_one_that_it_got(doms: DomainList, load: Loads) -> None:
    text = domain_xml(ONE).replace(f"<uuid>{ident(ONE)}</uuid>", "")
    load.dirs.config_file(ONE).write_text(text)
    tick(load.dirs)
    load(doms)
    number = doms[ONE].uuid
    load(doms)
    assert load.parsed == [] and doms[ONE].uuid == number
    with doms.get(ONE) as dom:
        dom.definition = DomainDef.from_xml(text).replace(uuid=number, description="in memory")
    load(doms)
    assert doms[ONE].definition.description == "old" and doms[ONE].uuid == number
