"""The config and autostart directories: one libvirt domain XML file per persistent domain.

`ConfigDirs` writes: each change is atomic (temporary file or link, fsync, rename, fsync of the
directory), is made under the directory's filelock, and is undone as a whole when a step fails, so
that an error always means "as it was before". The temporary names are ``.tmp-PID-N``, short because
a domain's name may fill a file name by itself; loading ignores them and a later save removes those
of dead processes. A process killed at any instruction leaves every config file whole, old or new;
killed while renaming, it may leave both names' files, and the next load reports one of them.

`scan`, `parse`, `parse_all` and `load_all` read: they take no filelock (a rename never shows half a
file), and whatever is wrong with one file becomes a `LoadFailure` and never stops the others. The
module knows nothing of where records live: `load_all` needs two methods of its store.

Semantics are libvirt's: virDomainDefSave, virDomainDeleteConfig, virDomainObjListLoadAllConfigs,
qemuDomainSetAutostart, qemuDomainRenameCallback. Lock order: list, domain, the filelock here.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import re
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, Protocol

import filelock
import msgspec
import psutil

from .definition import DomainDef, EncodedDef
from .errors import (
    AlreadyLocked,
    ConfigError,
    ContractError,
    DefinitionError,
    LockTimeout,
    SegmentError,
    SegmentFull,
    ShmDomainsError,
)
from .names import check_name

logger = logging.getLogger(__name__)

SUFFIX = ".xml"
LOCK_NAME = ".lock"
MAX_FILE_BYTES = 16 << 20  # as a definition in the segment
BATCH = 64  # files per hold of the list lock, and at most per message to a parsing worker
REPARSES = 3  # of a file that is replaced again and again while it is being loaded

Progress = Callable[[int, int], object]


# --- what loading reports -------------------------------------------------------------------


class LoadFailure(msgspec.Struct, frozen=True):
    """One config file that was not loaded: its path, the line if known, and why.

    >>> print(LoadFailure(Path("/etc/vm/web1.xml"), 3, "missing domain type"))
    /etc/vm/web1.xml:3: missing domain type
    """

    path: Path
    line: int | None
    reason: str

    def __str__(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        return f"{_printable(self.path)}{line}: {self.reason}"


class LoadReport(msgspec.Struct, frozen=True):
    """What `load_all` did: names of the domains loaded, in order, and one failure per other file.

    >>> print(LoadReport(["web1"], [LoadFailure(Path("db.xml"), None, "Permission denied")]))
    1 domain loaded, 1 file failed
      db.xml: Permission denied
    """

    loaded: list[str]
    failures: list[LoadFailure]

    def __str__(self) -> str:
        head = f"{_count(len(self.loaded), 'domain')} loaded"
        if not self.failures:
            return head
        head += f", {_count(len(self.failures), 'file')} failed"
        return "\n".join([head, *(f"  {failure}" for failure in self.failures)])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _printable(path: str | Path) -> str:
    # A file name may hold any byte but two; none of them may break a line of a log or a terminal.
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- one atomic change ----------------------------------------------------------------------


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn a plain OSError into a `ConfigError` that names `path`."""
    try:
        yield
    except ShmDomainsError:
        raise
    except OSError as exc:
        raise ConfigError(exc.errno, exc.strerror or str(exc), os.fspath(path)) from exc


_numbers = itertools.count()


def _temporary(directory: Path) -> Path:
    while True:
        path = directory / f".tmp-{os.getpid()}-{next(_numbers)}"
        # A dead process that had our pid may have left one.
        if not os.path.lexists(path):
            return path


def _discard(path: Path) -> None:
    with suppress(OSError):
        os.unlink(path)


def _write_file(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        os.fchmod(fd, 0o600)  # whatever the umask took away
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # a filesystem that can not sync directories says this
            raise
    finally:
        os.close(fd)


def _make_directory(path: Path) -> None:
    if path.is_dir():
        return
    os.makedirs(path, mode=0o700, exist_ok=True)
    os.chmod(path, 0o700)  # whatever the umask took away
    _sync_directory(path.parent)


_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Commit(Protocol):
    """What a change of files belongs to: made when they are in place, and they stay if it was.

    `happened` is asked when it raised, for a signal handler may raise after the deed.
    """

    def __call__(self) -> None: ...
    def happened(self) -> bool: ...


class _Change:
    """A change of several directory entries that is undone as a whole unless `forget` is reached.

    What an entry held before waits under a temporary name of its own: it is moved there where the
    entry goes, else it is a hard link, which costs no data blocks. On a filesystem without hard
    links there is nothing to restore a replaced file from: there a failure after the rename leaves
    the new, whole file.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._undo: list[tuple[Path, Path | None]] = []
        self._directories: dict[Path, Path] = {}

    def put(self, path: Path, make: Callable[[Path], None]) -> None:
        with _reported(path):
            temporary = _temporary(path.parent)
            try:
                make(temporary)
                self._set_aside(path)
                self._directories.setdefault(path.parent, path)
                os.rename(temporary, path)
            except BaseException:
                _discard(temporary)
                raise

    def remove(self, path: Path) -> None:
        with _reported(path):
            former = _temporary(path.parent)
            # libvirt ignores these two as well: what is not there need not be removed.
            with suppress(FileNotFoundError, NotADirectoryError):
                if stat.S_ISDIR(os.lstat(path).st_mode):
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                self._directories.setdefault(path.parent, path)
                # Noted first: a signal handler may raise between the two.
                self._undo.append((path, former))
                # Takes nothing of a filesystem that is full, and leaves no moment with both names.
                os.rename(path, former)

    def settle(self) -> None:
        """Make it last through a power failure."""
        for directory, path in self._directories.items():
            with _reported(path):
                _sync_directory(directory)

    def undo(self) -> None:
        if self._process != os.getpid():
            return  # a signal handler forked: it is our parent's
        for path, former in reversed(self._undo):
            try:
                self._restore(path, former)
            except OSError as exc:
                logger.error(
                    "%s can not be restored (%s)%s",
                    _printable(path),
                    exc.strerror,
                    "" if former is None else f"; what it held is in {former.name}",
                )
        for directory in self._directories:
            with suppress(OSError):
                _sync_directory(directory)

    def forget(self) -> None:
        if self._process != os.getpid():
            return
        for _, former in self._undo:
            if former is not None:
                _discard(former)

    def _set_aside(self, path: Path) -> None:
        former = _temporary(path.parent)
        try:
            os.link(path, former, follow_symlinks=False)
        except FileNotFoundError:
            self._undo.append((path, None))
        except OSError as exc:
            if exc.errno not in _NO_HARD_LINKS:
                raise
        else:
            self._undo.append((path, former))

    @staticmethod
    def _restore(path: Path, former: Path | None) -> None:
        if former is None:
            with suppress(FileNotFoundError):
                os.unlink(path)
            return
        if not os.path.lexists(former) and os.path.lexists(path):
            return  # it did not come to the rename
        # Between two links to one file rename does nothing, and says that it did.
        if not _same_entry(path, former):
            os.replace(former, path)
        _discard(former)


def _same_entry(a: Path, b: Path) -> bool:
    try:
        return os.path.samestat(os.lstat(a), os.lstat(b))
    except FileNotFoundError:
        return False


# --- leftovers of dead processes ------------------------------------------------------------

_TEMPORARY = re.compile(r"\.tmp-([1-9][0-9]*)-[0-9]+")
_next_sweep: dict[tuple[int, int], float] = {}


def _sweep(directory: Path) -> None:
    """Remove temporary files of dead processes; the caller holds the directory's filelock.

    Listing a directory of a million files takes half a second, so where it takes over 1 ms it may
    use one part in 21 of the time.
    """
    with suppress(OSError):
        status = os.stat(directory)
        key = (status.st_dev, status.st_ino)
        start = time.monotonic()
        if start < _next_sweep.get(key, start):
            return
        for name in os.listdir(directory):
            match = _TEMPORARY.fullmatch(name)
            if match is not None and not _is_alive(int(match[1])):
                _discard(directory / name)
        end = time.monotonic()
        took = end - start
        _next_sweep[key] = end if took < 0.001 else end + 20 * took


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# --- the directory's lock -------------------------------------------------------------------


class _DirectoryLock:
    """The filelock of a config directory. It exists before it is acquired, so that who was
    interrupted while acquiring it can release it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / LOCK_NAME
        _check_lock_file(self._path)
        self._lock = filelock.FileLock(self._path, mode=0o600)

    def acquire(self, timeout: float | None) -> None:
        limit = -1.0 if timeout is None else timeout
        try:
            self._lock.acquire(timeout=limit, poll_interval=0.01)
        except filelock.Timeout as exc:
            raise LockTimeout(
                f"config directory {_printable(self._directory)}: its lock was not free within "
                f"{timeout:g} s; {_lock_holder(self._path)}"
            ) from exc
        except NotImplementedError as exc:
            reason = "no file locks on this filesystem"
            raise ConfigError(errno.ENOLCK, reason, str(self._path)) from exc
        except RuntimeError as exc:  # what filelock raises where a thread would wait for itself
            raise AlreadyLocked(
                f"this thread is changing {_printable(self._directory)} already; finish that first"
            ) from exc

    def release(self) -> None:
        self._lock.release(force=True)


def _check_lock_file(path: Path) -> None:
    """Where others may write it may be a trap: some releases of filelock truncate what a link leads
    to."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ConfigError(errno.EPERM, "it is no regular file; remove it", str(path))


def _lock_holder(path: Path) -> str:
    """Say who has the flock on `path`, as far as the kernel tells."""
    try:
        status = os.stat(path)
        major, minor = os.major(status.st_dev), os.minor(status.st_dev)
        entry = f"{major:02x}:{minor:02x}:{status.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == entry:
                pid = int(fields[4])
                return f"pid {pid} ({' '.join(psutil.Process(pid).cmdline())}) holds it"
    except (OSError, ValueError, IndexError, psutil.Error):
        pass
    return "its holder is not known"


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout must be None or at least 0 seconds, not {timeout!r}")


# --- writing --------------------------------------------------------------------------------


class ConfigDirs(msgspec.Struct, frozen=True):
    """A config directory and, if there is one, the autostart directory that belongs to it.

    Paths are made absolute, since processes with other working directories use the same value.
    Every `timeout` is in seconds and is for the directory's filelock: ``None`` for ever, 0 try,
    negative is a `ValueError`; `LockTimeout` when it has passed, `AlreadyLocked` inside the commit
    of this thread's own change. Other errors: `ConfigError` (an `OSError`: errno, strerror,
    filename) with both directories as they were before, and `InvalidName` for a name that is no
    domain's. A name that begins with ``.`` can not be saved: dot-files are not loaded.

    A `commit` is called with the files in place and the filelock held; they stay if it happened,
    else they are as they were before, whatever was raised.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as directory:
    ...     dirs = ConfigDirs(Path(directory), Path(directory) / "autostart")
    ...     dirs.config_file("web1").name
    'web1.xml'
    """

    config_dir: Path
    autostart_dir: Path | None = None

    def __post_init__(self) -> None:
        config_dir = Path(os.path.abspath(self.config_dir))
        msgspec.structs.force_setattr(self, "config_dir", config_dir)
        if self.autostart_dir is None:
            return
        autostart_dir = Path(os.path.abspath(self.autostart_dir))
        msgspec.structs.force_setattr(self, "autostart_dir", autostart_dir)
        if _is_same_directory(config_dir, autostart_dir):
            # A link NAME.xml would take the place of the config file that it is to point to.
            raise ConfigError(
                errno.EINVAL, "the autostart directory is the config directory", str(config_dir)
            )

    def config_file(self, name: str) -> Path:
        """Return the path of the domain's config file (virDomainConfigFile).

        >>> ConfigDirs(Path("/etc/vm")).config_file("web1")
        PosixPath('/etc/vm/web1.xml')
        """
        return self.config_dir / (check_name(name) + SUFFIX)

    def autostart_link(self, name: str) -> Path | None:
        """Return the path of the domain's autostart link, ``None`` without an autostart directory.

        >>> ConfigDirs(Path("/etc/vm"), Path("/etc/vm/autostart")).autostart_link("web1")
        PosixPath('/etc/vm/autostart/web1.xml')
        """
        file_name = self.config_file(name).name
        return None if self.autostart_dir is None else self.autostart_dir / file_name

    def is_autostart(self, name: str) -> bool:
        """Whether the autostart link leads to the config file (virFileLinkPointsTo: same inode).

        >>> ConfigDirs(Path("/nowhere"), Path("/nowhere/autostart")).is_autostart("web1")
        False
        """
        return self._points_to(self.config_file(name))

    def save(
        self, definition: DomainDef, timeout: float | None = None, commit: Commit | None = None
    ) -> None:
        """Write the definition to NAME.xml, mode 0600, making the directory if need be.

        It is on disk for good when this returns (virDomainDefSave). Call it with the domain locked.

        >>> from tempfile import TemporaryDirectory
        >>> xml = "<name>web1</name><memory>1</memory><os><type>hvm</type></os>"
        >>> web1 = DomainDef.from_xml(f"<domain type='kvm'>{xml}</domain>")
        >>> with TemporaryDirectory() as directory:
        ...     ConfigDirs(Path(directory)).save(web1)
        ...     [path.name for path in scan(directory)]
        ['web1.xml']
        """
        path = self._file_to_write(definition.name)
        data = definition.to_xml().encode()

        def make(change: _Change) -> None:
            change.put(path, lambda temporary: _write_file(temporary, data))

        self._change(path, timeout, make, commit, create=True)

    def delete(self, name: str, timeout: float | None = None, commit: Commit | None = None) -> None:
        """Remove the domain's config file and autostart link; a missing one is no error.

        Source: virDomainDeleteConfig, which would go on if the link can not be removed; the link
        would then start the next domain of this name, so here that is an error.
        """
        path = self.config_file(name)
        self._change(path, timeout, lambda change: self._remove(change, name), commit)

    def rename(
        self,
        old_name: str,
        new_definition: DomainDef,
        timeout: float | None = None,
        commit: Commit | None = None,
    ) -> None:
        """Write the new definition under its name, then remove the old name's file and link.

        An autostart link moves along; a stale one of the new name goes. Source:
        qemuDomainRenameCallback.
        """
        path = self._file_to_write(new_definition.name)
        data = new_definition.to_xml().encode()
        if self.config_file(old_name) == path:
            self.save(new_definition, timeout, commit)
            return

        def make(change: _Change) -> None:
            autostart = self.is_autostart(old_name)
            change.put(path, lambda temporary: _write_file(temporary, data))
            link = self.autostart_link(new_definition.name)
            if link is not None and autostart:
                change.put(link, lambda temporary: os.symlink(path, temporary))
            elif link is not None:
                change.remove(link)
            self._remove(change, old_name)

        self._change(path, timeout, make, commit, create=True)

    def set_autostart(
        self,
        name: str,
        enabled: bool,
        timeout: float | None = None,
        commit: Commit | None = None,
    ) -> None:
        """Make the autostart link, or remove it (virDomainSetAutostart).

        Needs the config file (else ENOENT: a link to nothing would be forgotten by the next load)
        and makes the autostart directory. Without an autostart directory there is nothing to
        disable, and enabling is a `ConfigError`.
        """
        link, target = self.autostart_link(name), self.config_file(name)
        if link is None:
            if enabled:
                raise ConfigError(errno.ENOENT, "there is no autostart directory", str(target))
            if commit is not None:
                commit()
            return

        def make(change: _Change) -> None:
            if not enabled:
                change.remove(link)
            elif not target.is_file():
                raise ConfigError(errno.ENOENT, "no config file to link to; save it", str(target))
            else:
                with _reported(link):
                    _make_directory(link.parent)
                change.put(link, lambda temporary: os.symlink(target, temporary))

        self._change(link, timeout, make, commit)

    def _file_to_write(self, name: str) -> Path:
        path = self.config_file(name)
        if name.startswith("."):
            # Loading skips dot-files, so what is saved here would be gone after the next start.
            raise ConfigError(errno.EINVAL, "a name that begins with '.' is not loaded", str(path))
        return path

    def _remove(self, change: _Change, name: str) -> None:
        link = self.autostart_link(name)
        if link is not None:
            change.remove(link)
        change.remove(self.config_file(name))

    def _points_to(self, config_file: Path) -> bool:
        if self.autostart_dir is None:
            return False
        with suppress(OSError):
            return os.path.samefile(self.autostart_dir / config_file.name, config_file)
        return False

    def _change(
        self,
        subject: Path,
        timeout: float | None,
        make: Callable[[_Change], None],
        commit: Commit | None,
        create: bool = False,
    ) -> None:
        """Make a change under the filelock, then its commit; undo it unless that happened.

        One function with one ``try``, no context manager: a signal handler that raises while one is
        being entered or left would leave it, and the filelock, to whoever drops the traceback.
        """
        _check_timeout(timeout)
        change = _Change()
        lock, kept = None, False
        try:
            with _reported(subject):
                if create:
                    _make_directory(self.config_dir)
                # Without a config directory there is no place for a lock, and nothing to protect.
                if self.config_dir.is_dir():
                    lock = _DirectoryLock(self.config_dir)
                    lock.acquire(timeout)
            _sweep(self.config_dir)
            if self.autostart_dir is not None:
                _sweep(self.autostart_dir)
            make(change)
            change.settle()
            if commit is not None:
                commit()
            kept = True
            change.forget()
        except BaseException:
            if kept or (commit is not None and commit.happened()):
                change.forget()
            else:
                change.undo()
            raise
        finally:
            if lock is not None:
                try:
                    lock.release()
                except BaseException:  # a signal handler raised before it did
                    lock.release()
                    raise


def _is_same_directory(a: Path, b: Path) -> bool:
    if a == b:
        return True
    with suppress(OSError):
        return os.path.samefile(a, b)
    return False


# --- reading --------------------------------------------------------------------------------


_Stamp = tuple[int, int, int, int, int]
"""Tells one content of a file from another: device, inode, size, times of the last changes."""


def _stamp(status: os.stat_result) -> _Stamp:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


class _Parsed(NamedTuple):
    path: str  # making a Path takes as long as reading the file
    stamp: _Stamp | None
    result: DomainDef | EncodedDef | LoadFailure  # encoded if another process parsed it

    def is_stale(self) -> bool:
        """Whether the file was replaced, changed or removed since it was read."""
        try:
            return self.stamp != _stamp(os.stat(self.path))
        except OSError:
            return True


def scan(config_dir: str | os.PathLike[str]) -> list[Path]:
    """Return every ``*.xml`` of the directory but dot-files, sorted; none if it does not exist.

    `ConfigError` if it can not be read, or is no directory (virDomainObjListLoadAllConfigs).

    >>> scan("/no/such/directory")
    []
    """
    return [Path(path) for path in _scan(Path(config_dir))]


def _scan(directory: Path) -> list[str]:
    with _reported(directory):
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return []
    inside = os.path.join(directory, "")
    return [inside + n for n in sorted(names) if n.endswith(SUFFIX) and not n.startswith(".")]


def parse(path: str | os.PathLike[str]) -> DomainDef | LoadFailure:
    """Read one config file; whatever is wrong with it comes back as a `LoadFailure`.

    Only a regular file (or a link to one) of at most 16 MiB is read, so a FIFO, a device or a
    directory can not hang or flood the caller.

    >>> print(parse("/no/such/file.xml"))
    /no/such/file.xml: No such file or directory
    """
    return _decoded(_parse(os.fspath(Path(path))).result)


def parse_all(
    paths: Iterable[str | os.PathLike[str]],
    workers: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Path, DomainDef | LoadFailure]]:
    """Yield (path, definition or failure) for each path, in sorted order.

    With `workers` of 2 or more that many processes parse ahead, this one among them. The others are
    new interpreters, not forks (a fork of a process with threads may hang), and do not import
    ``__main__``. The files of a worker that dies are parsed here instead, which is logged.
    `progress` is called with (done, total) after each file. Negative `workers` is a `ValueError`.

    >>> [str(failure) for path, failure in parse_all(["/no/b.xml", "/no/a.xml"])]
    ['/no/a.xml: No such file or directory', '/no/b.xml: No such file or directory']
    """
    ordered = sorted(os.fspath(Path(path)) for path in paths)
    return _report_progress(_parsed(ordered, workers), len(ordered), progress)


def _report_progress(
    items: _Items, total: int, progress: Progress | None
) -> Iterator[tuple[Path, DomainDef | LoadFailure]]:
    with closing(items):
        for done, item in enumerate(items, 1):
            yield Path(item.path), _decoded(item.result)
            if progress is not None:
                progress(done, total)


def _decoded(result: DomainDef | EncodedDef | LoadFailure) -> DomainDef | LoadFailure:
    return result.decoded() if isinstance(result, EncodedDef) else result


def _parse(path: str) -> _Parsed:
    stamp = None
    try:
        stamp, data = _read(path)
        return _Parsed(path, stamp, DomainDef.from_xml(data))
    except DefinitionError as exc:
        failure = LoadFailure(Path(path), exc.line, str(exc))
    except OSError as exc:
        failure = LoadFailure(Path(path), None, exc.strerror or str(exc))
    except Exception as exc:  # one file never stops the others, whatever is wrong with our parser
        logger.exception("%s: the parser failed", _printable(path))
        failure = LoadFailure(Path(path), None, f"the parser failed: {type(exc).__name__}: {exc}")
    return _Parsed(path, stamp, failure)


_TO_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def _read(path: str) -> tuple[_Stamp, bytes]:
    # Opening a device can do things by itself, so look before; a FIFO may take the place of a file
    # between look and open, so do not block, and look again.
    _check_regular(os.stat(path))
    fd = os.open(path, _TO_READ)
    try:
        status = os.fstat(fd)
        _check_regular(status)
        data = os.read(fd, min(status.st_size, MAX_FILE_BYTES) + 1)
        if len(data) != status.st_size:  # it is just being written, or is of those without a size
            with open(fd, "rb", closefd=False) as file:
                data += file.read(MAX_FILE_BYTES + 1 - len(data))
    finally:
        os.close(fd)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(errno.EFBIG, f"more than {MAX_FILE_BYTES >> 20} MiB")
    return _stamp(status), data


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(errno.EINVAL, "not a regular file")


# --- parsing in other processes -------------------------------------------------------------

# Not multiprocessing's own: spawn and forkserver run the caller's main module again, daemonic
# processes may not start others, and its workers outlive a parent that is killed. These end with
# their input. What anything prints must not get between the answers: it goes to standard error.
_WORKER_CODE = """\
import os, sys
from multiprocessing.connection import Connection
requests = Connection(os.dup(0), writable=False)
answers = Connection(os.dup(1), readable=False)
os.dup2(2, 1)
sys.path[:] = requests.recv()
from shmdomains.config import _serve
_serve(requests, answers)
"""

# What crosses the pipe for one file: plain tuples, strings and the encoded definition, since a
# pickled Path, UUID, named tuple or definition costs the parent more than the parsing is worth.
_Answer = tuple[_Stamp | None, tuple[str, bytes | None, bytes] | LoadFailure]
_READY: list[_Answer] = []


def _serve(requests: Connection, answers: Connection) -> None:
    """Run in a worker: say that it is ready, then parse lists of paths until the parent closes the
    pipe or is gone."""
    with suppress(EOFError, BrokenPipeError):
        answers.send(_READY)
        while True:
            paths: list[str] = requests.recv()
            answers.send([_answer(_parse(path)) for path in paths])


def _answer(item: _Parsed) -> _Answer:
    result = _decoded(item.result)
    if isinstance(result, LoadFailure):
        return item.stamp, result
    try:
        encoded = EncodedDef.of(result)
        return item.stamp, (encoded.name, encoded.uuid, encoded.blob)
    except DefinitionError as exc:
        return item.stamp, LoadFailure(Path(item.path), exc.line, str(exc))


def _answered(path: str, answer: _Answer) -> _Parsed:
    stamp, result = answer
    return _Parsed(path, stamp, result if isinstance(result, LoadFailure) else EncodedDef(*result))


class _Worker:
    """Another process that parses, once it has said that it is ready; until then nobody waits for
    it. What a dead one was to parse is parsed here."""

    _AHEAD = 2  # lists of paths, so that it has one while its answer to another is not read yet

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._given: deque[tuple[int, list[str]]] = deque()
        self._pipes = ExitStack()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER_CODE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for the parent, which stops its workers
            )
            stdin, stdout = self._process.stdin, self._process.stdout
            assert stdin is not None and stdout is not None
            with stdin, stdout:
                self._requests = self._pipe(os.dup(stdin.fileno()), readable=False)
                self._answers = self._pipe(os.dup(stdout.fileno()), writable=False)
            with suppress(OSError):  # who has many pipes may not have large ones
                fcntl.fcntl(self._answers.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)
            # Two requests that fit in are written without waiting for who may wait for us.
            self._most = fcntl.fcntl(self._requests.fileno(), fcntl.F_GETPIPE_SZ) // 2
            self._requests.send(sys.path)
        except OSError as exc:
            self._give_up(exc)

    def _pipe(self, fd: int, *, readable: bool = True, writable: bool = True) -> Connection:
        return self._pipes.enter_context(Connection(fd, readable, writable))

    def has(self, number: int) -> bool:
        return any(given == number for given, _ in self._given)

    def may_take(self, paths: list[str]) -> bool:
        if self._process is None or not self._ready or len(self._given) == self._AHEAD:
            return False
        return not self._given or sum(len(path) + 32 for path in paths) * 2 < self._most

    def take(self, number: int, paths: list[str]) -> None:
        self._given.append((number, paths))
        try:
            self._requests.send(paths)
        except OSError as exc:
            self._give_up(exc)

    def collect(self, wait: bool) -> dict[int, list[_Parsed]]:
        """What it has parsed, by number; at least one answer if there is to be a `wait`."""
        found: dict[int, list[_Parsed]] = {}
        try:
            while self._process is not None and (self._answers.poll(0) or (wait and not found)):
                answers: list[_Answer] = self._answers.recv()
                if not self._ready:
                    self._ready = True
                    continue
                number, paths = self._given[0]
                pairs = zip(paths, answers, strict=True)
                found[number] = [_answered(path, answer) for path, answer in pairs]
                self._given.popleft()
        except Exception as exc:  # whatever comes out of that pipe: no file is lost for it
            self._give_up(exc)
        if self._process is None:
            for number, paths in self._given:
                found[number] = [_parse(path) for path in paths]
            self._given.clear()
        return found

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        self._pipes.close()
        process.wait()

    def _give_up(self, exc: Exception) -> None:
        pid = None if self._process is None else self._process.pid
        logger.warning(
            "parsing worker %s is lost (%s): its files are parsed in this process", pid, exc
        )
        self.stop()


_Items = Generator[_Parsed, None, None]


def _parsed(paths: list[str], workers: int | None) -> _Items:
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be None or at least 0, not {workers}")
    if not workers or workers == 1 or len(paths) < 2:
        return (_parse(path) for path in paths)
    return _parsed_by_workers(paths, workers)


def _parsed_by_workers(paths: list[str], count: int) -> _Items:
    """In order, by this process and as many others as `count` leaves.

    Whoever is free takes the next list of paths, so nobody waits for a worker that starts or is
    slow; but not without end, for what is parsed ahead is kept in memory.
    """
    size = max(1, min(BATCH, len(paths) // count))
    chunks = [paths[at : at + size] for at in range(0, len(paths), size)]
    parsed: dict[int, list[_Parsed]] = {}
    following = 0
    pool: list[_Worker] = []
    try:
        while len(pool) < min(count, len(chunks)) - 1:
            pool.append(_Worker())
        for number in range(len(chunks)):
            while number not in parsed:
                for worker in pool:
                    parsed.update(worker.collect(wait=False))
                    while following < len(chunks) and worker.may_take(chunks[following]):
                        worker.take(following, chunks[following])
                        following += 1
                if following < len(chunks) and len(parsed) < 8 * count:
                    following += 1
                    parsed[following - 1] = [_parse(path) for path in chunks[following - 1]]
                elif number not in parsed:
                    owner = next(worker for worker in pool if worker.has(number))
                    parsed.update(owner.collect(wait=True))
            yield from parsed.pop(number)
    finally:
        for worker in pool:
            worker.stop()


# --- loading --------------------------------------------------------------------------------


class _LockedDomain(Protocol):
    autostart: bool

    @property
    def changed(self) -> bool: ...
    def commit(self, timeout: float | None = None) -> None: ...
    def _pass_on(self) -> None: ...


class Store(Protocol):
    """What `load_all` needs of a list of domains; `DomainList` has it."""

    def locked(self, timeout: float | None = None) -> AbstractContextManager[object]: ...

    def assign_def(
        self,
        definition: DomainDef | EncodedDef,
        persistent: bool | None = None,
        timeout: float | None = None,
    ) -> _LockedDomain: ...


def load_all(
    store: Store,
    dirs: ConfigDirs,
    progress: Progress | None = None,
    workers: int | None = None,
    timeout: float | None = None,
) -> LoadReport:
    """Load every config file as a persistent domain (virDomainObjListLoadAllConfigs).

    The caller holds no lock. Files are parsed, by this process and by others up to `workers` in
    all, before the list lock is taken, which is held for 64 files at a time, in sorted order. A
    file that was replaced since it was parsed is parsed again, so another process' `save` is never
    overwritten by what stood there before. Each domain takes `autostart` from its link where there
    is an autostart directory. `progress` is called with (done, total), without a lock, first
    with 0.

    What is wrong with one file is logged as a warning and reported; the others are loaded.
    `timeout` in seconds is for each wait: for a domain it is that file's failure, for the list
    lock it is `LockTimeout`. A mistake in the use of locks (`ContractError`) or a segment that is
    closed or damaged is raised.

    As in libvirt a file need not be named after its domain; but the file that is goes before
    others of the same domain (a forgotten ``web1-backup.xml``), else the first in order, and the
    others are failures.
    """
    _check_timeout(timeout)
    paths = _scan(dirs.config_dir)
    with closing(_parsed(paths, workers)) as items:
        return _Loader(store, dirs, paths, timeout).load(items, progress)


class _Loader:
    def __init__(
        self, store: Store, dirs: ConfigDirs, paths: list[str], timeout: float | None
    ) -> None:
        self._store = store
        self._dirs = dirs
        self._timeout = timeout
        self._paths = set(paths)
        self._inside = os.path.join(dirs.config_dir, "")
        self._loaded: dict[str, str] = {}
        self._failures: list[LoadFailure] = []

    def load(self, items: Iterator[_Parsed], progress: Progress | None) -> LoadReport:
        done = 0
        if progress is not None:
            progress(done, len(self._paths))
        while batch := list(itertools.islice(items, BATCH)):
            self._load_batch(batch)
            done += len(batch)
            if progress is not None:
                progress(done, len(self._paths))
        self._warn_of_other_names()
        return LoadReport(list(self._loaded), sorted(self._failures, key=lambda f: f.path))

    def _load_batch(self, batch: list[_Parsed]) -> None:
        for _ in range(1 + REPARSES):
            with self._store.locked(self._timeout):
                stale = [item.path for item in batch if not self._load_item(item)]
            if not stale:
                return
            batch = [_parse(path) for path in stale]
        for path in stale:
            self._fail(LoadFailure(Path(path), None, "the file is being replaced again and again"))

    def _load_item(self, item: _Parsed) -> bool:
        """Assign one definition, list lock held; False if the file is to be parsed again."""
        if isinstance(item.result, LoadFailure):
            self._fail(item.result)
            return True
        reason = self._conflict(item.path, item.result.name)
        if reason is not None:
            self._fail(LoadFailure(Path(item.path), None, reason))
            return True
        if item.is_stale():
            return False
        try:
            if not self._assign(item, item.result):
                return False
        except ContractError:
            raise
        except ShmDomainsError as exc:
            if isinstance(exc, SegmentError) and not isinstance(exc, SegmentFull):
                raise
            self._fail(LoadFailure(Path(item.path), getattr(exc, "line", None), str(exc)))
            return True
        self._loaded[item.result.name] = item.path
        return True

    def _assign(self, item: _Parsed, definition: DomainDef | EncodedDef) -> bool:
        dom = self._store.assign_def(definition, persistent=True, timeout=self._timeout)
        try:
            # Who had the domain while we waited for it may have saved another definition.
            if dom.changed and item.is_stale():
                return False
            if self._dirs.autostart_dir is not None:
                autostart = self._dirs._points_to(Path(item.path))
                if dom.autostart != autostart:
                    dom.autostart = autostart
            dom.commit()
        finally:
            dom._pass_on()
        return True

    def _conflict(self, path: str, name: str) -> str | None:
        own = self._own_path(name)
        if path != own and own in self._paths:
            return f"domain '{name}' has a file of its own, {name + SUFFIX}"
        if name in self._loaded:
            return f"domain '{name}' was loaded from {_printable(self._loaded[name])}"
        return None

    def _own_path(self, name: str) -> str:
        return self._inside + name + SUFFIX

    def _fail(self, failure: LoadFailure) -> None:
        logger.warning("not loaded: %s", failure)
        self._failures.append(failure)

    def _warn_of_other_names(self) -> None:
        # Saves go to NAME.xml and deletes remove that, so such a file survives its domain.
        others = [(p, name) for name, p in self._loaded.items() if p != self._own_path(name)]
        if others:
            path, name = others[0]
            logger.warning(
                "%s not named after the domain (%s holds '%s'): undefine will not remove it",
                "1 file is" if len(others) == 1 else f"{len(others)} files are",
                _printable(path),
                name,
            )
