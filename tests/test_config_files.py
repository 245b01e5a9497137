"""Config directories without a segment: writing, reading, and what `load_all` asks of its store.

What is promised: after an error everything is as it was before, after a kill every file is whole,
no file's fault stops another file, and nothing is lost in silence. Processes meet at pipes, never
by sleeping.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from shmdomains import config, files
from shmdomains.config import BATCH, ConfigDirs, LoadFailure, LoadReport, change, load_all, scan
from shmdomains.config import parse as parsing
from shmdomains.config.parse import ParsedFile, parse_file, parse_files
from shmdomains.errors import (
    AlreadyLocked,
    ConfigError,
    DomainExists,
    InvalidName,
    ListClosed,
    ListNotLocked,
    LockTimeout,
    SegmentFull,
)
from shmdomains.xml.definition import DomainDef, EncodedDef


def parse(path: Path) -> DomainDef | LoadFailure:
    return decoded(parse_file(str(path)))


def parse_all(
    paths: Iterable[Path], workers: int | None = None
) -> Iterator[tuple[Path, DomainDef | LoadFailure]]:
    with closing(parse_files([str(path) for path in paths], workers)) as items:
        for item in items:
            yield Path(item.path), decoded(item)


def decoded(item: ParsedFile) -> DomainDef | LoadFailure:
    return item.result.decoded() if isinstance(item.result, EncodedDef) else item.result


def domain_xml(name: str, note: str = "", number: int | None = None) -> str:
    ident = uuid.uuid5(uuid.NAMESPACE_DNS, name) if number is None else uuid.UUID(int=number)
    return (
        f"<domain type='kvm'>\n  <name>{name}</name>\n  <uuid>{ident}</uuid>\n"
        f"  <description>{note}</description>\n  <memory>1024</memory>\n"
        "  <os><type>hvm</type></os>\n</domain>\n"
    )


def domain(name: str, note: str = "") -> DomainDef:
    return DomainDef.from_xml(domain_xml(name, note))


@pytest.fixture
def dirs(tmp_path: Path) -> ConfigDirs:
    return ConfigDirs(tmp_path / "vm", tmp_path / "vm" / "autostart")


def fill(dirs: ConfigDirs, *names: str) -> None:
    dirs.config_dir.mkdir(exist_ok=True)
    for name in names:
        dirs.config_file(name).write_text(domain_xml(name))


def state(directory: Path) -> dict[str, str]:
    """Every entry that is no dot-file: its text, or where it leads."""
    entries = {}
    for path in sorted(directory.rglob("*")):
        key = str(path.relative_to(directory))
        if path.name.startswith("."):
            continue
        if path.is_symlink():
            entries[key] = os.readlink(path)
        elif path.is_file():
            entries[key] = path.read_text()
    return entries


def temporaries(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob(".tmp-*")]


def run(code: str, *args: str | Path, **kwargs: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=30)
    return process.returncode


# --- ConfigDirs -----------------------------------------------------------------------------


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dirs = ConfigDirs(Path("vm"), Path("auto"))
    assert dirs.config_file("a") == tmp_path / "vm" / "a.xml"
    assert dirs.autostart_link("a") == tmp_path / "auto" / "a.xml"
    assert ConfigDirs(Path("vm")).autostart_link("a") is None
    assert dirs == ConfigDirs(tmp_path / "vm", tmp_path / "auto")
    with pytest.raises(AttributeError):
        dirs.config_dir = Path("other")  # type: ignore[misc]


def test_autostart_directory_must_be_another(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        ConfigDirs(tmp_path / "vm", tmp_path / "x" / ".." / "vm")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError):
        ConfigDirs(tmp_path, tmp_path / "link")


@pytest.mark.parametrize("name", ["a/b", "..", "", "x" * 252, "a\nb"])
def test_no_path_leaves_the_directory(dirs: ConfigDirs, name: str) -> None:
    for call in (dirs.config_file, dirs.autostart_link, dirs.is_autostart, dirs.delete):
        with pytest.raises(InvalidName):
            call(name)
    with pytest.raises(InvalidName):
        dirs.set_autostart(name, True)


# --- save -----------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_save_has_mode_0600_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    dirs = ConfigDirs(tmp_path)
    old = os.umask(umask)
    try:
        dirs.save(domain("web1"))
    finally:
        os.umask(old)
    for name in ("web1.xml", ".lock"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_save_replaces_and_leaves_nothing_behind(dirs: ConfigDirs) -> None:
    for note in ("old", "new"):
        dirs.save(domain("web1", note))
        assert dirs.config_file("web1").read_text() == domain("web1", note).to_xml()
        assert parse(dirs.config_file("web1")) == domain("web1", note)
    assert sorted(os.listdir(dirs.config_dir)) == [".lock", "web1.xml"]
    dirs.config_file("web1").chmod(0o644)
    dirs.save(domain("web1"))
    assert stat.S_IMODE(dirs.config_file("web1").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "name", ["x" * 251, "ü" * 125 + "x", "東" * 83, "büro srv", " a ", "-rf", "a.xml", "\U0001f427"]
)
def test_save_any_name(dirs: ConfigDirs, name: str) -> None:
    dirs.save(domain(name))
    dirs.set_autostart(name, True)
    (path,) = scan(dirs.config_dir)
    assert path.name == name + ".xml"
    assert len(os.fsencode(path.name)) <= 255
    loaded = parse(path)
    assert isinstance(loaded, DomainDef) and loaded.name == name
    assert dirs.is_autostart(name)
    dirs.delete(name)
    assert state(dirs.config_dir) == {}


def test_save_refuses_what_loading_would_skip(dirs: ConfigDirs) -> None:
    with pytest.raises(ConfigError, match=r"begins with '\.'.*\.hidden\.xml"):
        dirs.save(domain(".hidden"))
    dirs.save(domain("web1"))
    with pytest.raises(ConfigError):
        dirs.rename("web1", domain(".hidden"))
    assert list(state(dirs.config_dir)) == ["web1.xml"]


def test_save_replaces_a_link_not_what_it_leads_to(dirs: ConfigDirs, tmp_path: Path) -> None:
    dirs.config_dir.mkdir()
    (tmp_path / "elsewhere.xml").write_text("theirs")
    dirs.config_file("web1").symlink_to(tmp_path / "elsewhere.xml")
    dirs.save(domain("web1"))
    assert not dirs.config_file("web1").is_symlink()
    assert (tmp_path / "elsewhere.xml").read_text() == "theirs"


@pytest.mark.parametrize("call", ["save", "rename"])
def test_a_directory_in_the_files_place(dirs: ConfigDirs, call: str) -> None:
    fill(dirs, "old")
    (dirs.config_dir / "web1.xml").mkdir()
    with pytest.raises(ConfigError) as info:
        dirs.save(domain("web1")) if call == "save" else dirs.rename("old", domain("web1"))
    assert info.value.filename == str(dirs.config_file("web1"))
    assert info.value.errno == errno.EISDIR
    assert list(state(dirs.config_dir)) == ["old.xml"]
    assert temporaries(dirs.config_dir) == []


def test_config_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "vm").write_text("")
    dirs = ConfigDirs(tmp_path / "vm", tmp_path / "auto")
    for call in (
        lambda: dirs.save(domain("web1")),
        lambda: dirs.delete("web1"),
        lambda: dirs.rename("web1", domain("web2")),
        lambda: dirs.set_autostart("web1", True),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.errno == errno.ENOTDIR
        assert caught.value.filename == str(tmp_path / "vm")
    assert not dirs.is_autostart("web1")


# --- failure at every step ------------------------------------------------------------------

CALLS = ["open", "fchmod", "write", "fsync", "link", "rename", "unlink", "symlink", "close"]


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, call: str, nth: int, error: BaseException
) -> Iterator[list[int]]:
    """Let the n-th `os.<call>` of this thread fail; yields how many there were."""
    real: Callable[..., Any] = getattr(os, call)
    seen = [0]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] != nth:
            return real(*args, **kwargs)
        if call == "close":
            real(*args, **kwargs)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, wrapper)
        yield seen


OPERATIONS: dict[str, Callable[[ConfigDirs], None]] = {
    "create": lambda dirs: dirs.save(domain("new", "new")),
    "replace": lambda dirs: dirs.save(domain("web1", "changed")),
    "delete": lambda dirs: dirs.delete("web1"),
    "rename": lambda dirs: dirs.rename("web1", domain("web2", "changed")),
    "rename over a stale file": lambda dirs: dirs.rename("web1", domain("stale", "changed")),
    "rename without a link": lambda dirs: dirs.rename("plain", domain("stale", "changed")),
    "enable": lambda dirs: dirs.set_autostart("plain", True),
    "repair": lambda dirs: dirs.set_autostart("stale", True),
    "disable": lambda dirs: dirs.set_autostart("web1", False),
}


def prepared(directory: Path) -> ConfigDirs:
    dirs = ConfigDirs(directory, directory / "autostart")
    for name in ("web1", "plain", "stale"):
        dirs.save(domain(name, "old"))
    dirs.set_autostart("web1", True)
    os.symlink("/elsewhere/stale.xml", directory / "autostart" / "stale.xml")
    return dirs


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("call", CALLS)
def test_a_failing_step_undoes_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, call: str
) -> None:
    done = prepared(tmp_path / "done")
    OPERATIONS[operation](done)
    succeeded = {
        key: value.replace(str(tmp_path / "done"), "DIR")
        for key, value in state(done.config_dir).items()
    }
    for nth in range(1, 100):
        directory = tmp_path / str(nth)
        dirs = prepared(directory)
        before = state(directory)
        error: OSError | None = None
        with failing(monkeypatch, call, nth, OSError(errno.EIO, "injected")) as seen:
            try:
                OPERATIONS[operation](dirs)
            except ConfigError as exc:
                error = exc
        after = state(directory)
        if error is not None:
            assert (error.errno, error.strerror) == (errno.EIO, "injected")
            assert error.filename is not None and error.filename.startswith(str(directory))
            assert after == before
        else:
            named = {key: value.replace(str(directory), "DIR") for key, value in after.items()}
            assert named == succeeded
        # The clean-up itself may have been what failed.
        assert call == "unlink" or temporaries(directory) == []
        if seen[0] < nth:
            assert error is None
            return
    pytest.fail("never ran to its end")


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("operation", ["create", "replace", "rename"])
def test_everything_of_one_kind_fails(
    dirs: ConfigDirs,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    operation: str,
    call: str,
) -> None:
    prepared(dirs.config_dir)
    before = state(dirs.config_dir)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        if call == "rename":
            patch.setattr(os, "replace", fail)
        with pytest.raises(ConfigError, match="No space left on device"):
            OPERATIONS[operation](dirs)
    assert state(dirs.config_dir) == before
    assert temporaries(dirs.config_dir) == []
    assert caplog.text == ""


def test_short_writes_are_continued(dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
        dirs.save(domain("web1"))
    assert dirs.config_file("web1").read_text() == domain("web1").to_xml()


def test_ctrl_c_while_saving(dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(dirs.config_dir)
    before = state(dirs.config_dir)
    for nth in (1, 2):
        with (
            failing(monkeypatch, "fsync", nth, KeyboardInterrupt()),
            pytest.raises(KeyboardInterrupt),
        ):
            dirs.save(domain("web1", "new"))
        assert state(dirs.config_dir) == before
        assert temporaries(dirs.config_dir) == []
    dirs.save(domain("web1", "new"), timeout=0)


def test_no_hard_links_is_no_obstacle(dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for note in ("old", "new"):
        dirs.save(domain("web1", note))
    assert dirs.config_file("web1").read_text() == domain("web1", "new").to_xml()
    dirs.rename("web1", domain("web2"))
    dirs.delete("web2")
    assert state(dirs.config_dir) == {}


def test_what_can_not_be_restored_is_kept_and_named(
    dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dirs.save(domain("web1", "old"))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    commit = Commit(ZeroDivisionError())
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(os, "replace", refuse)
        dirs.save(domain("web1", "new"), commit=commit)
    assert not commit.undone
    (kept,) = temporaries(dirs.config_dir)
    assert kept in caplog.text and "web1.xml cannot be restored" in caplog.text
    assert (dirs.config_dir / kept).read_text() == domain("web1", "old").to_xml()


class Commit:
    """A commit that does something, then raises; it may have happened all the same."""

    def __init__(
        self,
        error: Exception | None = None,
        before: Callable[[], object] = lambda: None,
        happened: bool = False,
    ) -> None:
        self.error, self.before, self.did = error, before, happened
        self.undone = True

    def __call__(self) -> None:
        self.before()
        if self.error is not None:
            raise self.error

    def happened(self) -> bool:
        return self.did

    def not_undone(self) -> None:
        self.undone = False


# --- kill -9, and several processes ---------------------------------------------------------

STOP_AT = """
    import os, sys
    from pathlib import Path
    from shmdomains.config import ConfigDirs
    from shmdomains.xml.definition import DomainDef

    call, nth = sys.argv[1], int(sys.argv[2])
    real, seen = getattr(os, call), 0
    def stop(*args, **kwargs):
        global seen
        seen += 1
        if seen == nth:
            print("stopped", flush=True)
            sys.stdin.read()
        return real(*args, **kwargs)
    setattr(os, call, stop)
    dirs = ConfigDirs(Path(sys.argv[3]), Path(sys.argv[4]))
    xml = Path(sys.argv[5]).read_text()
    if sys.argv[6] == "save":
        dirs.save(DomainDef.from_xml(xml))
    else:
        dirs.rename(sys.argv[6], DomainDef.from_xml(xml))
    print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("call", "nth", "expected"),
    [
        ("fchmod", 1, "old"),
        ("fsync", 1, "old"),
        ("link", 1, "old"),
        ("rename", 1, "old"),
        ("fsync", 2, "new"),
        ("unlink", 1, "new"),
    ],
)
def test_kill_while_saving(
    dirs: ConfigDirs, tmp_path: Path, call: str, nth: int, expected: str
) -> None:
    dirs.save(domain("web1", "old"))
    (tmp_path / "new.xml").write_text(domain_xml("web1", "new"))
    saver = run(
        STOP_AT, call, str(nth), dirs.config_dir, tmp_path / "a", tmp_path / "new.xml", "save"
    )
    assert line_of(saver) == "stopped"
    if call != "unlink":
        # A reader needs no lock, and never meets the temporary file.
        assert [p.name for p in scan(dirs.config_dir)] == ["web1.xml"]
    saver.kill()
    assert end(saver) == -signal.SIGKILL
    assert dirs.config_file("web1").read_text() == domain("web1", expected).to_xml()
    assert temporaries(dirs.config_dir) != []
    assert [p.name for p in scan(dirs.config_dir)] == ["web1.xml"]
    dirs.save(domain("other"), timeout=5)
    assert temporaries(dirs.config_dir) == []
    assert dirs.config_file("web1").read_text() == domain("web1", expected).to_xml()


def test_kill_while_renaming_keeps_one_of_the_names(dirs: ConfigDirs, tmp_path: Path) -> None:
    (tmp_path / "new.xml").write_text(domain_xml("web2", "new"))
    for call, nth in [("rename", 1), ("fsync", 1), ("rename", 2), ("unlink", 1), ("unlink", 2)]:
        shutil.rmtree(dirs.config_dir, ignore_errors=True)
        dirs.save(domain("web1", "old"))
        dirs.set_autostart("web1", True)
        assert dirs.autostart_dir is not None
        process = run(
            STOP_AT, call, str(nth), dirs.config_dir, dirs.autostart_dir,
            tmp_path / "new.xml", "web1",
        )  # fmt: skip
        assert line_of(process) == "stopped"
        process.kill()
        end(process)
        whole = {"web1": domain("web1", "old"), "web2": domain("web2", "new")}
        found = scan(dirs.config_dir)
        assert found
        for path in found:
            assert parse(path) == whole[path.stem]
        # Whichever name it has, it starts by itself.
        assert any(dirs.is_autostart(path.stem) for path in found)


def test_two_processes_save_the_same_name(dirs: ConfigDirs, tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from shmdomains.config import ConfigDirs
        from shmdomains.xml.definition import DomainDef
        dirs = ConfigDirs(Path(sys.argv[1]))
        definition = DomainDef.from_xml(Path(sys.argv[2]).read_text())
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(100):
            dirs.save(definition)
    """
    contents = {}
    for note in ("a" * 20_000, "b"):
        (tmp_path / note[0]).write_text(domain_xml("web1", note))
        contents[note[0]] = domain("web1", note)
    dirs.save(contents["b"])
    savers = [run(code, dirs.config_dir, tmp_path / key) for key in contents]
    for saver in savers:
        assert line_of(saver) == "ready"
    for saver in savers:
        assert saver.stdin is not None
        saver.stdin.write("\n")
        saver.stdin.flush()
    while any(saver.poll() is None for saver in savers):
        assert parse(dirs.config_file("web1")) in contents.values()
    assert [end(saver) for saver in savers] == [0, 0]
    assert parse(dirs.config_file("web1")) in contents.values()
    assert temporaries(dirs.config_dir) == []


def test_threads_save_different_names(dirs: ConfigDirs) -> None:
    errors: list[Exception] = []

    def saver(number: int) -> None:
        try:
            for round_ in range(20):
                dirs.save(domain(f"web{number}", str(round_)))
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=saver, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert state(dirs.config_dir) == {
        f"web{n}.xml": domain(f"web{n}", "19").to_xml() for n in range(4)
    }


def test_lock_timeout_names_the_holder(dirs: ConfigDirs, tmp_path: Path) -> None:
    dirs.save(domain("web1", "old"))
    (tmp_path / "new.xml").write_text(domain_xml("web1", "new"))
    holder = run(
        STOP_AT, "rename", "1", dirs.config_dir, tmp_path / "a", tmp_path / "new.xml", "save"
    )
    assert line_of(holder) == "stopped"
    calls: list[Callable[[float], None]] = [
        lambda timeout: dirs.save(domain("web1"), timeout),
        lambda timeout: dirs.delete("web1", timeout),
        lambda timeout: dirs.rename("web1", domain("web2"), timeout),
        lambda timeout: dirs.set_autostart("web1", True, timeout),
    ]
    for call in calls:
        for timeout in (0, 0.05):
            with pytest.raises(LockTimeout) as info:
                call(timeout)
            assert str(dirs.config_dir) in str(info.value)
            assert f"pid {holder.pid} (" in str(info.value) or "not known" in str(info.value)
        with pytest.raises(ValueError, match="timeout"):
            call(-1)
    assert dirs.config_file("web1").read_text() == domain("web1", "old").to_xml()
    # Reading asks for no lock.
    assert [path.name for path, _ in parse_all(scan(dirs.config_dir))] == ["web1.xml"]
    end(holder)
    dirs.delete("web1", timeout=5)


def test_a_thread_does_not_wait_for_itself(dirs: ConfigDirs) -> None:
    with pytest.raises(AlreadyLocked):
        dirs.save(domain("web1"), commit=Commit(before=lambda: dirs.save(domain("web2"))))
    assert state(dirs.config_dir) == {}


# --- leftovers ------------------------------------------------------------------------------


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead_are_swept(dirs: ConfigDirs) -> None:
    fill(dirs, "web1")
    assert dirs.autostart_dir is not None
    dirs.autostart_dir.mkdir()
    dead = [f".tmp-{dead_pid()}-0", f".tmp-{2**70}-3"]
    kept = [f".tmp-{os.getppid()}-0", ".tmp-0-0", ".tmp-x-0", f".tmp-{dead_pid()}", "tmp-1-1"]
    for directory in (dirs.config_dir, dirs.autostart_dir):
        for name in dead + kept:
            (directory / name).write_text(domain_xml("web1", "torn")[:40])
    assert [path.name for path in scan(dirs.config_dir)] == ["web1.xml"]
    dirs.save(domain("web2"))
    for directory in (dirs.config_dir, dirs.autostart_dir):
        left = {name for name in os.listdir(directory) if "tmp-" in name}
        assert left == set(kept)


def test_a_leftover_of_our_own_pid_is_stepped_over(dirs: ConfigDirs) -> None:
    dirs.config_dir.mkdir()
    following = next(files._numbers) + 1
    for number in range(following, following + 5):
        (dirs.config_dir / f".tmp-{os.getpid()}-{number}").write_text("from a former process")
    dirs.save(domain("web1"))
    assert dirs.config_file("web1").read_text() == domain("web1").to_xml()


def test_sweeping_a_huge_directory_is_rationed(
    dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    listed = []
    real = os.listdir

    def slow(path: Path) -> list[str]:
        nonlocal now
        now += 0.5
        listed.append(path)
        return real(path)

    dirs = ConfigDirs(dirs.config_dir)
    dirs.config_dir.mkdir()
    monkeypatch.setattr(change.time, "monotonic", lambda: now)
    monkeypatch.setattr(change.os, "listdir", slow)
    for expected, later in [(1, 0.0), (1, 9.9), (2, 0.2), (2, 1.0)]:
        now += later
        with monkeypatch.context() as patch:
            # Only the sweep reads the clock that stands still.
            patch.setattr(change, "_DirectoryLock", Mock())
            dirs.save(domain("web1"))
        assert len(listed) == expected


# --- autostart ------------------------------------------------------------------------------


def test_autostart_link(dirs: ConfigDirs) -> None:
    link = dirs.autostart_link("web1")
    assert link is not None
    with pytest.raises(ConfigError) as info:
        dirs.set_autostart("web1", True)
    assert info.value.errno == errno.ENOENT
    dirs.save(domain("web1"))
    assert not dirs.is_autostart("web1")
    dirs.set_autostart("web1", False)
    for _ in range(2):
        dirs.set_autostart("web1", True)
        assert os.readlink(link) == str(dirs.config_file("web1"))
        assert dirs.is_autostart("web1")
    dirs.save(domain("web1", "changed"))
    assert dirs.is_autostart("web1")
    for _ in range(2):
        dirs.set_autostart("web1", False)
        assert not os.path.lexists(link)
        assert not dirs.is_autostart("web1")
    assert dirs.config_file("web1").exists()
    assert temporaries(dirs.config_dir) == []


def test_what_counts_as_autostart(dirs: ConfigDirs, tmp_path: Path) -> None:
    fill(dirs, "web1", "web2")
    link = dirs.autostart_link("web1")
    assert link is not None
    link.parent.mkdir()
    link.symlink_to(dirs.config_file("web2"))
    assert not dirs.is_autostart("web1")
    link.unlink()
    link.write_text(domain_xml("web1"))
    assert not dirs.is_autostart("web1")
    link.unlink()
    link.symlink_to("../web1.xml")
    assert dirs.is_autostart("web1")
    link.unlink()
    link.symlink_to(link)
    assert not dirs.is_autostart("web1")
    dirs.set_autostart("web1", True)
    assert dirs.is_autostart("web1")
    dirs.config_file("web1").unlink()
    assert not dirs.is_autostart("web1")
    link.unlink()
    fill(dirs, "web1")
    os.link(dirs.config_file("web1"), link)
    assert dirs.is_autostart("web1")  # as virFileLinkPointsTo: the same inode


def test_without_an_autostart_directory(tmp_path: Path) -> None:
    dirs = ConfigDirs(tmp_path)
    dirs.save(domain("web1"))
    assert not dirs.is_autostart("web1")
    dirs.set_autostart("web1", False)
    with pytest.raises(ConfigError, match="no autostart directory"):
        dirs.set_autostart("web1", True)
    dirs.rename("web1", domain("web2"))
    dirs.delete("web2")
    assert state(tmp_path) == {}


def test_a_link_that_leads_to_no_file_is_warned_of(
    dirs: ConfigDirs, caplog: pytest.LogCaptureFixture
) -> None:
    dirs.save(domain("web1"))
    dirs.save(domain("gone"))
    for name in ("web1", "gone"):
        dirs.set_autostart(name, True)
    dirs.config_file("gone").unlink()
    load_all(FakeStore(), dirs)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and f"{dirs.autostart_link('gone')} leads to no file" in said[0]


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_filesystem_that_cannot_lock(
    dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """No lock of another kind takes the flock's place: a file that lies there would be one."""
    dirs.save(domain("web1"))

    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match="cannot lock") as caught:
        dirs.save(domain("web1", "changed"), timeout=5)
    assert caught.value.filename == str(dirs.config_dir)
    assert dirs.config_file("web1").read_text() == domain("web1").to_xml()


# --- delete and rename ----------------------------------------------------------------------


def test_delete(dirs: ConfigDirs) -> None:
    dirs.delete("web1")
    assert not dirs.config_dir.exists()
    fill(dirs, "web1", "web2")
    dirs.set_autostart("web1", True)
    dirs.delete("web1")
    assert list(state(dirs.config_dir)) == ["web2.xml"]
    dirs.delete("web1")


def test_rename(dirs: ConfigDirs) -> None:
    fill(dirs, "web1")
    dirs.set_autostart("web1", True)
    dirs.rename("web1", domain("web2"))
    assert state(dirs.config_dir) == {
        "web2.xml": domain("web2").to_xml(),
        "autostart/web2.xml": str(dirs.config_file("web2")),
    }
    dirs.rename("web2", domain("web2", "same name"))
    assert state(dirs.config_dir)["web2.xml"] == domain("web2", "same name").to_xml()
    assert dirs.is_autostart("web2")
    dirs.rename("never saved", domain("web3"))
    assert not dirs.is_autostart("web3")
    # What a former domain of the new name had does not start this one.
    dirs.rename("web3", domain("web2"))
    assert list(state(dirs.config_dir)) == ["web2.xml"]


def test_rename_writes_the_new_file_before_it_removes_the_old(
    dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(dirs, "web1")
    real = os.unlink
    seen = []

    def unlink(path: Any, **kwargs: Any) -> None:
        seen.append(dirs.config_file("web2").exists())
        real(path, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink)
    dirs.rename("web1", domain("web2"))
    assert seen and all(seen)


@pytest.mark.parametrize("error", [ZeroDivisionError(), SegmentFull("full"), OSError(5, "theirs")])
@pytest.mark.parametrize("happened", [False, True])
@pytest.mark.parametrize("what", ["save", "create", "delete", "rename", "set_autostart"])
def test_what_the_commit_raises_undoes_it_unless_it_happened(
    tmp_path: Path, what: str, error: Exception, happened: bool
) -> None:
    dirs = prepared(tmp_path)
    before = state(tmp_path)
    there: list[Any] = []
    commit = Commit(error, lambda: there.append(state(tmp_path)), happened)
    changes: dict[str, Callable[[], None]] = {
        "save": lambda: dirs.save(domain("web1", "new"), commit=commit),
        "create": lambda: dirs.save(domain("new"), commit=commit),
        "delete": lambda: dirs.delete("web1", commit=commit),
        "rename": lambda: dirs.rename("web1", domain("stale"), commit=commit),
        "set_autostart": lambda: dirs.set_autostart("web1", False, commit=commit),
    }
    with pytest.raises(type(error)) as info:
        changes[what]()
    assert info.value is error
    assert there != [before]
    assert [state(tmp_path)] == (there if happened else [before])
    assert temporaries(tmp_path) == []


# --- scan and parse -------------------------------------------------------------------------


def test_scan(tmp_path: Path) -> None:
    assert scan(tmp_path / "none") == []
    skipped = [".hidden.xml", ".xml", "a.xml~", "a.XML", "xml"]
    for name in ["b.xml", "a.xml", "B.xml", "ü.xml", *skipped]:
        (tmp_path / name).write_text("")
    (tmp_path / "dir.xml").mkdir()
    found = scan(str(tmp_path))
    assert [p.name for p in found] == ["B.xml", "a.xml", "b.xml", "dir.xml", "ü.xml"]
    with pytest.raises(ConfigError) as info:
        scan(tmp_path / "a.xml")
    assert info.value.errno == errno.ENOTDIR
    assert info.value.filename == str(tmp_path / "a.xml")


def failure(path: Path) -> LoadFailure:
    result = parse(path)
    assert isinstance(result, LoadFailure)
    assert result.path == path
    return result


def test_parse_reports_the_line(tmp_path: Path) -> None:
    path = tmp_path / "web1.xml"
    path.write_text("<domain type='kvm'>\n  <name>web1</name>\n  <oops>\n</domain>\n")
    bad = failure(path)
    assert bad.line == 4
    assert str(bad).startswith(f"{path}:4: ")
    assert bad.reason
    for text in (b"", b"\0", b"\xff\xfe", b"<domain/>", b"<network><name>web1</name></network>"):
        path.write_bytes(text)
        assert failure(path).reason


@pytest.mark.timeout(20)
def test_parse_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.xml")
    (tmp_path / "directory.xml").mkdir()
    (tmp_path / "zero.xml").symlink_to("/dev/zero")
    (tmp_path / "tty.xml").symlink_to("/dev/tty")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.xml"))
    paths = scan(tmp_path)
    assert len(paths) == 5
    for path in paths:
        assert failure(path).reason == "not a regular file"


@pytest.mark.timeout(20)
def test_a_fifo_that_takes_the_files_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "web1.xml"
    path.write_text(domain_xml("web1"))
    real = os.open

    def swap(name: Any, *args: Any, **kwargs: Any) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", swap)
    assert failure(path).reason == "not a regular file"


def test_parse_follows_links_and_reports_broken_ones(tmp_path: Path) -> None:
    (tmp_path / "real").write_text(domain_xml("web1"))
    (tmp_path / "web1.xml").symlink_to(tmp_path / "real")
    assert parse(tmp_path / "web1.xml") == domain("web1")
    (tmp_path / "dangling.xml").symlink_to(tmp_path / "nowhere")
    assert failure(tmp_path / "dangling.xml").reason == os.strerror(errno.ENOENT)
    (tmp_path / "loop.xml").symlink_to(tmp_path / "loop.xml")
    assert failure(tmp_path / "loop.xml").reason == os.strerror(errno.ELOOP)


def test_parse_refuses_the_unreadable(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "web1.xml"
    path.write_text(domain_xml("web1"))
    path.chmod(0)
    assert failure(path).reason == os.strerror(errno.EACCES)


def test_parse_refuses_the_huge(tmp_path: Path) -> None:
    path = tmp_path / "web1.xml"
    path.write_text(domain_xml("web1"))
    os.truncate(path, 1 << 40)  # a hole: takes no space, and must take no memory
    assert failure(path).reason == "more than 16 MiB"


def test_the_whole_of_a_file_is_read_whatever_size_it_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path("/proc/self/cmdline")
    assert source.stat().st_size == 0
    assert parsing._read(str(source))[1] == source.read_bytes() != b""
    path = tmp_path / "web1.xml"
    path.write_text(domain_xml("web1") + " " * 100_000)
    real = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: real(fd, min(size, 7)))
    assert parsing._read(str(path))[1] == path.read_bytes()


def test_a_fault_of_the_parser_is_one_files_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "web1.xml"
    path.write_text(domain_xml("web1"))

    def broken(text: bytes) -> DomainDef:
        raise RecursionError("too deep")

    monkeypatch.setattr(parsing.DomainDef, "from_xml", broken)
    assert "RecursionError: too deep" in failure(path).reason
    assert "Traceback" in caplog.text


def test_file_names_of_any_bytes(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/\xff\x1b[2J\n.xml"
    with open(raw, "w") as file:
        file.write("<oops")
    (path,) = scan(tmp_path)
    text = str(failure(path))
    assert text.isprintable()
    assert "\\xff\\x1b[2J\\n.xml" in text
    text.encode()


# --- parsing in other processes -------------------------------------------------------------


def many(dirs: ConfigDirs, count: int) -> dict[Path, DomainDef | LoadFailure]:
    fill(dirs, *(f"web{n:03}" for n in range(count)))
    dirs.config_file("web001").write_text("<oops")
    return {path: parse(path) for path in scan(dirs.config_dir)}


@pytest.mark.parametrize("workers", [None, 0, 1, 2, 3])
def test_parsing_keeps_the_order(dirs: ConfigDirs, workers: int | None) -> None:
    expected = many(dirs, 150)
    shuffled = sorted(expected, key=lambda path: path.name[::-1])
    assert list(parse_all(shuffled, workers)) == [(path, expected[path]) for path in shuffled]
    assert list(parse_all([], workers)) == []


def test_parsing_refuses_negative_workers() -> None:
    with pytest.raises(ValueError, match="workers"):
        parse_files([], -1)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are ready, or gone, before the first file is parsed: else this process may be done
    with all of them by then."""
    start = parsing._Worker.__init__

    def wait_too(worker: parsing._Worker) -> None:
        start(worker)
        if worker._process is not None:
            assert worker._answers.poll(60)

    monkeypatch.setattr(parsing._Worker, "__init__", wait_too)


@pytest.mark.usefixtures("started")
def test_workers_do_the_parsing(dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes two lists of 64; with nothing left to give out this process waits for them."""
    expected = many(dirs, 6 * BATCH)
    parsed_here: list[str] = []
    parse_here = parsing.parse_file

    def note(path: str) -> ParsedFile:
        parsed_here.append(path)
        return parse_here(path)

    monkeypatch.setattr(parsing, "parse_file", note)
    assert dict(parse_all(list(expected)[: 2 * BATCH + 3], 2)) | expected == expected
    assert parsed_here == [str(path) for path in list(expected)[2 * BATCH : 2 * BATCH + 3]]
    parsed_here.clear()
    assert dict(parse_all(expected, 4)) == expected
    assert parsed_here == []


@pytest.mark.usefixtures("started")
def test_paths_that_are_longer_than_a_pipe(dirs: ConfigDirs) -> None:
    """While this process writes one list of them the worker may not be writing an answer."""
    place = dirs.config_dir
    while len(str(place)) < 3600:
        place /= "d" * 200
    place.mkdir(parents=True)
    deep = ConfigDirs(place, None)
    text = f"</name><description>{'x' * 20_000}</description>"
    for number in range(4 * BATCH):
        name = f"web{number:03}"
        deep.config_file(name).write_text(domain_xml(name).replace("</name>", text))
    expected = {path: parse(path) for path in scan(place)}
    assert dict(parse_all(expected, 2)) == expected


def test_nobody_waits_for_a_worker_that_starts(
    dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parsing, "_WORKER_CODE", "import time; time.sleep(3600)")
    expected = many(dirs, 300)
    before = children()
    assert dict(parse_all(expected, 3)) == expected
    assert children() == before


def children() -> list[psutil.Process]:
    return psutil.Process().children()


@pytest.mark.usefixtures("started")
def test_a_killed_worker_loses_nothing(
    dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed with what it was given, before it can answer."""
    expected = many(dirs, 300)
    before = children()
    take = parsing._Worker.take

    def take_and_die(worker: parsing._Worker, number: int, paths: list[str]) -> None:
        assert worker._process is not None
        if number == 2:
            process = psutil.Process(worker._process.pid)
            process.suspend()
            while process.status() != psutil.STATUS_STOPPED:
                pass
        take(worker, number, paths)
        if number == 2:
            worker._process.kill()

    monkeypatch.setattr(parsing._Worker, "take", take_and_die)
    assert list(parse_all(expected, 3)) == list(expected.items())
    assert caplog.text.count("is lost") == 1
    assert children() == before


READY = """
import os
from multiprocessing.connection import Connection
requests, answers = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
requests.recv()
answers.send([])
"""


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(3)",
        "import os; os.write(1, b'not a pickle')",
        READY + "requests.recv(); answers.send_bytes(b'no pickle')",
        READY + "requests.recv(); answers.send([(None, b'x')] * 50)",
        READY + "answers.send([]); requests.recv()",  # to what it was not asked
        READY + "requests.recv(); os.write(answers.fileno(), b'\\0\\0\\1\\0' + b'.' * 100)",
    ],
)
@pytest.mark.usefixtures("started")
def test_workers_that_fail(
    dirs: ConfigDirs,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: str,
) -> None:
    expected = many(dirs, 150)
    monkeypatch.setattr(parsing, "_WORKER_CODE", code)
    assert dict(parse_all(expected, 2)) == expected
    assert "parsed in this process" in caplog.text


def test_workers_that_can_not_start(
    dirs: ConfigDirs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = many(dirs, 150)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert dict(parse_all(expected, 2)) == expected
    assert "is lost" in caplog.text


def test_an_abandoned_iterator_leaves_no_process(dirs: ConfigDirs) -> None:
    before = children()
    items = parse_files([str(path) for path in many(dirs, 300)], 3)
    next(items)
    assert len(children()) == len(before) + 2
    del items
    assert children() == before


def test_workers_from_threads_daemons_and_plain_scripts(dirs: ConfigDirs) -> None:
    many(dirs, 150)
    # No `if __name__ == "__main__"`, and a daemonic process: both stop multiprocessing's own pools.
    code = """
        import multiprocessing, sys, threading
        from pathlib import Path
        from shmdomains.config.parse import parse_files, scan_paths
        def work():
            print(len(list(parse_files(scan_paths(Path(sys.argv[1])), 2))), flush=True)
        print("start", flush=True)
        thread = threading.Thread(target=work); thread.start(); thread.join()
        process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
        process.start(); process.join()
    """
    process = run(code, dirs.config_dir)
    out, _ = process.communicate(timeout=60)
    assert out.split() == ["start", "150", "150"]


def test_ctrl_c_reaches_the_parent_only(dirs: ConfigDirs) -> None:
    many(dirs, 300)
    code = """
        import sys
        from pathlib import Path
        from shmdomains.config.parse import parse_files, scan_paths
        items = parse_files(scan_paths(Path(sys.argv[1])), 3)
        next(items)
        try:
            print("running", flush=True)
            sys.stdin.read()
        except KeyboardInterrupt:
            print(1 + len(list(items)), flush=True)
    """
    parent = run(code, dirs.config_dir, start_new_session=True, stderr=subprocess.PIPE)
    assert line_of(parent) == "running"
    os.killpg(parent.pid, signal.SIGINT)
    # A worker that was interrupted would say so, and its loss be logged.
    assert parent.communicate(timeout=60) == ("300\n", "")


def test_workers_die_with_a_killed_parent(dirs: ConfigDirs) -> None:
    many(dirs, 300)
    code = """
        import sys
        from pathlib import Path
        from shmdomains.config.parse import parse_files, scan_paths
        items = parse_files(scan_paths(Path(sys.argv[1])), 3)
        next(items)
        print("running", flush=True)
        sys.stdin.read()
    """
    parent = run(code, dirs.config_dir)
    assert line_of(parent) == "running"
    workers = psutil.Process(parent.pid).children()
    assert len(workers) == 2
    parent.kill()
    end(parent)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []


# --- load_all, with a store of dictionaries -------------------------------------------------


class FakeDomain:
    def __init__(self, store: FakeStore, definition: DomainDef, replaces: bool) -> None:
        self.store = store
        self.definition = definition
        self.autostart = False
        self.changed = replaces
        self.persistent: bool | None = None

    def rollback(self) -> None:
        self.changed = False

    def commit(self, timeout: float | None = None) -> None:
        if self.changed or self.definition.name not in self.store.domains:
            self.store.domains[self.definition.name] = self

    def _release_unseen(self) -> None:
        pass


class FakeStore:
    """Does what `Store` asks for, notes holds of the list lock, and fails as told."""

    def __init__(self) -> None:
        self.domains: dict[str, FakeDomain] = {}
        self.errors: dict[str, Exception] = {}
        self.hooks: dict[str, Callable[[], object]] = {}
        self.is_locked = False
        self.timeouts: set[float | None] = set()
        self.holds: list[list[str]] = []

    @contextmanager
    def locked(self, timeout: float | None = None) -> Iterator[None]:
        assert not self.is_locked
        self.is_locked = True
        self.timeouts.add(timeout)
        self.holds.append([])
        try:
            yield
        finally:
            self.is_locked = False

    def assign_def(
        self, definition: DomainDef, persistent: bool | None = None, timeout: float | None = None
    ) -> FakeDomain:
        assert self.is_locked
        self.timeouts.add(timeout)
        name = definition.name
        self.holds[-1].append(name)
        if name in self.hooks:
            self.hooks.pop(name)()
        if name in self.errors:
            raise self.errors[name]
        dom = FakeDomain(self, definition, name in self.domains)
        dom.persistent = persistent
        return dom

    def note(self, name: str) -> str:
        return self.domains[name].definition.to_xml()


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.mark.parametrize("workers", [None, 2])
def test_load_all(
    dirs: ConfigDirs, store: FakeStore, caplog: pytest.LogCaptureFixture, workers: int | None
) -> None:
    count = 2 * BATCH + 10
    names = [f"web{n:03}" for n in range(count)]
    fill(dirs, *names)
    dirs.set_autostart("web002", True)
    dirs.config_file("web001").write_text("<domain>\n<oops")
    (dirs.config_dir / ".hidden.xml").write_text("<oops")
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        assert not store.is_locked
        calls.append((done, total))

    report = load_all(store, dirs, progress, workers)
    names.remove("web001")
    assert report.loaded == names
    assert [(f.path, f.line) for f in report.failures] == [(dirs.config_file("web001"), 2)]
    head = f"{count - 1} domains loaded, 1 file failed, 1 file skipped"
    assert str(report).splitlines()[0] == head
    assert ".hidden.xml: its name begins with '.'" in str(report)
    assert str(report.failures[0]) in str(report) and str(report.failures[0]) in caplog.text
    assert report.skipped == [dirs.config_dir / ".hidden.xml"]
    said = [r.getMessage() for r in caplog.records if r.name == config.__name__]
    assert [line for line in said if "web001.xml" not in line] == [
        f"skipped: {dirs.config_dir / '.hidden.xml'}: its name begins with '.'"
    ]
    assert len(said) == 2
    assert sorted(store.domains) == names
    assert all(dom.persistent is True for dom in store.domains.values())
    assert [name for name, dom in store.domains.items() if dom.autostart] == ["web002"]
    assert [len(hold) for hold in store.holds] == [BATCH - 1, BATCH, 10]
    assert calls == [(0, count), (BATCH, count), (2 * BATCH, count), (count, count)]
    assert store.timeouts == {None}


def test_load_nothing(dirs: ConfigDirs, store: FakeStore, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[int, int]] = []
    report = load_all(store, dirs, lambda done, total: calls.append((done, total)))
    assert report == LoadReport([], [])
    assert str(report) == "0 domains loaded"
    assert calls == [(0, 0)] and caplog.text == "" and store.holds == []
    assert not dirs.config_dir.exists()


def test_load_takes_no_filelock(dirs: ConfigDirs, store: FakeStore) -> None:
    fill(dirs, "web1")
    load_all(store, dirs)
    assert not (dirs.config_dir / ".lock").exists()


def test_load_without_an_autostart_directory_leaves_autostart(
    dirs: ConfigDirs, store: FakeStore
) -> None:
    fill(dirs, "web1")
    store.hooks["web1"] = lambda: None
    real = store.assign_def

    def started(*args: Any, **kwargs: Any) -> FakeDomain:
        dom = real(*args, **kwargs)
        dom.autostart = True
        return dom

    store.assign_def = started  # type: ignore[method-assign]
    load_all(store, ConfigDirs(dirs.config_dir))
    assert store.domains["web1"].autostart
    load_all(store, dirs)
    assert not store.domains["web1"].autostart


@pytest.mark.parametrize(
    "error",
    [
        DomainExists("domain 'b' already exists with uuid 0"),
        SegmentFull("no room for another domain"),
        LockTimeout("domain 'b' is locked"),
    ],
)
def test_load_goes_on_after_one_files_error(
    dirs: ConfigDirs, store: FakeStore, error: Exception
) -> None:
    fill(dirs, "a", "b", "c")
    store.errors["b"] = error
    report = load_all(store, dirs, timeout=3.0)
    assert report.loaded == ["a", "c"] == sorted(store.domains)
    assert report.failures == [LoadFailure(dirs.config_file("b"), None, str(error))]
    assert store.timeouts == {3.0}


@pytest.mark.parametrize("error", [ListNotLocked("…"), ListClosed("…"), ZeroDivisionError()])
def test_load_stops_at_what_no_file_can_help(
    dirs: ConfigDirs, store: FakeStore, error: Exception
) -> None:
    fill(dirs, "a", "b", "c")
    store.errors["b"] = error
    before = children()
    with pytest.raises(type(error)):
        load_all(store, dirs, workers=2)
    assert children() == before
    assert not store.is_locked


def test_load_refuses_a_negative_timeout(dirs: ConfigDirs, store: FakeStore) -> None:
    with pytest.raises(ValueError, match="timeout"):
        load_all(store, dirs, timeout=-1)


def test_what_was_saved_meanwhile_is_not_overwritten(dirs: ConfigDirs, store: FakeStore) -> None:
    """Between the parsing and the lock others save, delete and spoil files."""
    fill(dirs, "a", "b", "c", "d")
    real = store.locked

    @contextmanager
    def late(timeout: float | None = None) -> Iterator[None]:
        if not store.holds:
            dirs.save(domain("b", "saved meanwhile"))
            dirs.delete("c")
            dirs.config_file("d").write_text("<oops")
        with real(timeout):
            yield

    store.locked = late  # type: ignore[method-assign]
    report = load_all(store, dirs)
    assert report.loaded == ["a", "b"] == sorted(store.domains)
    assert store.note("b") == domain("b", "saved meanwhile").to_xml()
    assert [f.path.stem for f in report.failures] == ["c", "d"]
    assert report.failures[0].reason == os.strerror(errno.ENOENT)
    assert store.holds == [["a"], ["b"]]


def test_what_was_saved_while_we_waited_for_the_domain(dirs: ConfigDirs, store: FakeStore) -> None:
    dirs.save(domain("a", "old"))
    load_all(store, dirs)
    store.hooks["a"] = lambda: dirs.save(domain("a", "saved by its holder"))
    assert load_all(store, dirs).loaded == ["a"]
    assert store.note("a") == domain("a", "saved by its holder").to_xml()
    assert store.holds == [["a"], ["a"], ["a"]]


def test_a_file_that_never_rests_is_given_up(dirs: ConfigDirs, store: FakeStore) -> None:
    fill(dirs, "a", "b")
    real = store.locked

    @contextmanager
    def busy(timeout: float | None = None) -> Iterator[None]:
        dirs.save(domain("a", "again"))
        with real(timeout):
            yield

    store.locked = busy  # type: ignore[method-assign]
    report = load_all(store, dirs)
    assert report.loaded == ["b"]
    (bad,) = report.failures
    assert bad.path == dirs.config_file("a") and "again and again" in bad.reason


def test_files_of_other_names_load_as_in_libvirt(
    dirs: ConfigDirs, store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    dirs.config_dir.mkdir()
    assert dirs.autostart_dir is not None
    dirs.autostart_dir.mkdir()
    path = dirs.config_dir / "QEMUGuest.xml"
    path.write_text(domain_xml("web1"))
    (dirs.autostart_dir / "QEMUGuest.xml").symlink_to(path)
    with caplog.at_level(logging.INFO):
        report = load_all(store, dirs)
    assert report == LoadReport(["web1"], [])
    assert store.domains["web1"].autostart
    assert "QEMUGuest.xml holds 'web1'" in caplog.text


def test_two_files_of_one_domain(dirs: ConfigDirs, store: FakeStore) -> None:
    """A copy never wins over the domain's own file, and never disappears in silence."""
    fill(dirs, "web1")
    dirs.config_file("web1").write_text(domain_xml("web1", "own"))
    for name in ("web1-backup", "web1_old"):
        (dirs.config_dir / f"{name}.xml").write_text(domain_xml("web1", "copy", number=7))
    for name in ("x", "y"):
        (dirs.config_dir / f"{name}.xml").write_text(domain_xml("z", name))
    report = load_all(store, dirs)
    assert report.loaded == ["web1", "z"]
    assert store.note("web1") == domain("web1", "own").to_xml()
    assert store.note("z") == domain("z", "x").to_xml()
    assert [f.path.stem for f in report.failures] == ["web1-backup", "web1_old", "y"]
    assert "a file of its own, web1.xml" in report.failures[0].reason
    assert f"was loaded from {dirs.config_dir / 'x.xml'}" in report.failures[2].reason


def test_a_copy_does_not_stand_in_for_a_broken_file(dirs: ConfigDirs, store: FakeStore) -> None:
    fill(dirs, "web1")
    dirs.config_file("web1").write_text("<oops")
    (dirs.config_dir / "web1-backup.xml").write_text(domain_xml("web1"))
    report = load_all(store, dirs)
    assert report.loaded == []
    assert [f.path.stem for f in report.failures] == ["web1-backup", "web1"]
