"""Writing the config and autostart directories: one libvirt domain XML file per persistent domain.

Each change of `ConfigDirs` is atomic (temporary file or link, fsync, rename, fsync of the
directory) and is made under the directory's filelock. If a step fails, the whole change is undone:
an error always means "as it was before". Loading ignores temporary files, and a later save removes
those of dead processes. A process killed at any instruction leaves every config file whole, old or
new. If it is killed while renaming, both names' files may remain: `ConfigDirs.settle` makes them
what the domain's record says.

A file need not be named after its domain. The first change of such a domain moves its file to
NAME.xml, then goes on as usual. If another domain has its file in that place, that file moves to
its own name first, or is left alone if it cannot. Such a move is one rename, so a process killed
before or after it leaves the domain in one file: it is neither lost nor loaded twice. The autostart
link cannot move in the same instant. The link of the new name is made first, and dangles until the
file is there; the old link is removed last. So at each instant one of them leads to the file. A
process killed just before the end leaves a dangling link, and the next load warns of it.

Semantics are libvirt's: virDomainDefSave, virDomainDeleteConfig, qemuDomainSetAutostart,
qemuDomainRenameCallback. Lock order: list, domain, the filelock here.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from ..deadline import Deadline, check_timeout
from ..errors import AlreadyLocked, ConfigError, LockTimeout
from ..files import (
    TEMPORARY,
    discard,
    flock_holder,
    reported,
    sync_directory,
    temporary_name,
)
from ..lazy import LazyModule
from ..names import SUFFIX, check_name
from ..text import shown_path
from ..xml.definition import DomainDef

if TYPE_CHECKING:
    import filelock
else:
    filelock = LazyModule("filelock")

logger = logging.getLogger(__package__)

LOCK_NAME = ".lock"


# --- one atomic change ----------------------------------------------------------------------


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


def _make_directory(path: Path) -> None:
    os.makedirs(path, mode=0o700, exist_ok=True)
    os.chmod(path, 0o700)  # whatever the umask took away
    sync_directory(path.parent)


_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Commit(Protocol):
    """The commit that a change of files belongs to. It is called once they are in place.

    If it raises, `happened` decides whether they stay: a signal handler may raise after the commit.
    """

    def __call__(self) -> None: ...
    def happened(self) -> bool: ...
    def not_undone(self) -> None:
        """Called when the change failed and some of the files could not be restored."""


class Other(NamedTuple):
    """Another domain whose file is in this one's place."""

    name: str
    may_move: bool
    """Whether the next load would use the file for that domain if it had that domain's name."""


class Owner(Protocol):
    """Tells which domain a file belongs to. Called with the filelock held."""

    def find(self) -> Path | None:
        """The domain's file, if it is not named after the domain; else ``None``."""
        ...

    def holds(self, path: Path) -> bool:
        """Whether the file holds the domain, by its uuid."""
        ...

    def other(self, path: Path) -> Other | None:
        """The other domain that the file in this place belongs to; ``None``: it may be replaced."""
        ...


class _Change:
    """A change of several directory entries, to be undone as a whole (`undo`) or kept (`forget`).

    The former file of each entry is kept under a temporary name: an entry to be removed is moved
    there, one to be replaced gets a hard link, which costs no data blocks. On a filesystem without
    hard links a replaced file cannot be restored: a failure after the rename leaves the new, whole
    file.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._undo: list[tuple[Path, Path | None]] = []
        self._moved: set[Path] = set()
        self._directories: dict[Path, Path] = {}

    def put(self, path: Path, make: Callable[[Path], None]) -> None:
        with reported(path):
            temporary = temporary_name(path.parent)
            try:
                make(temporary)
                self._set_aside(path)
                self._directories.setdefault(path.parent, path)
                os.rename(temporary, path)
            except BaseException:
                discard(temporary)
                raise

    def remove(self, path: Path) -> None:
        with reported(path):
            former = temporary_name(path.parent)
            # libvirt ignores these two as well: there is nothing to remove.
            with suppress(FileNotFoundError, NotADirectoryError):
                if stat.S_ISDIR(os.lstat(path).st_mode):
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                self._directories.setdefault(path.parent, path)
                # Note it first: a signal handler may raise between the two.
                self._undo.append((path, former))
                # Works on a full filesystem, and at no moment do both names exist.
                os.rename(path, former)

    def move(self, old: Path, new: Path) -> None:
        """Rename the entry to a free name."""
        with reported(old):
            self._directories.setdefault(new.parent, new)
            self._undo.append((old, new))
            self._moved.add(new)
            os.rename(old, new)

    def settle(self) -> None:
        """Make the change survive a power failure."""
        for directory, path in self._directories.items():
            with reported(path):
                sync_directory(directory)

    def undo(self) -> bool:
        """Whether everything is restored."""
        done = True
        if self._process != os.getpid():
            return done  # a signal handler forked: the change is our parent's
        for path, former in reversed(self._undo):
            try:
                self._restore(path, former)
            except OSError as exc:
                done = False
                logger.error(
                    "%s cannot be restored (%s)%s",
                    shown_path(path),
                    exc.strerror,
                    "" if former is None else f"; what it held is in {former.name}",
                )
        for directory in self._directories:
            with suppress(OSError):
                sync_directory(directory)
        return done

    def forget(self) -> None:
        if self._process != os.getpid():
            return
        for _, former in self._undo:
            if former is not None and former not in self._moved:
                discard(former)

    def _set_aside(self, path: Path) -> None:
        former = temporary_name(path.parent)
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
            return  # the rename was never reached
        # Renaming one link of a file to another does nothing, and reports success.
        if not _same_entry(path, former):
            os.replace(former, path)
        discard(former)


def _same_entry(a: Path, b: Path) -> bool:
    try:
        return os.path.samestat(os.lstat(a), os.lstat(b))
    except FileNotFoundError:
        return False


# --- leftovers of dead processes ------------------------------------------------------------


_next_sweep: dict[tuple[int, int], float] = {}


def _sweep(directory: Path) -> None:
    """Remove temporary files of dead processes; the caller holds the directory's filelock.

    Listing a directory of a million files takes half a second. So if it takes over 1 ms, the next
    one waits 20 times as long: it uses at most one part in 21 of the time.
    """
    with suppress(OSError):
        status = os.stat(directory)
        key = (status.st_dev, status.st_ino)
        start = time.monotonic()
        if start < _next_sweep.get(key, start):
            return
        for name in os.listdir(directory):
            match = TEMPORARY.fullmatch(name)
            if match is not None and not _is_alive(int(match[1])):
                discard(directory / name)
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


_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


LOOK = 0.05
"""Seconds between two calls of `between_looks`."""


def _nobody_asks() -> bool:
    return False


between_looks: Callable[[], bool] = _nobody_asks
"""Called before a directory's filelock is waited for, and if true again and again meanwhile: it may
raise. `shmdomains.aio` sets it."""


class _DirectoryLock:
    """The filelock of a config directory. The object is made before the lock is acquired, so that a
    caller interrupted in `acquire` can release it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / LOCK_NAME
        _check_lock_file(self._path)
        # Where flock fails, some releases of filelock fall back to a soft lock, a file that nobody
        # removes when its holder dies. Older ones have no option to prevent that.
        try:
            self._lock = filelock.FileLock(self._path, mode=0o600, fallback_to_soft=False)
        except TypeError:
            self._lock = filelock.FileLock(self._path, mode=0o600)

    def acquire(self, timeout: float | None) -> None:
        deadline = Deadline(timeout)
        try:
            if not between_looks():
                limit = -1.0 if timeout is None else timeout
                self._lock.acquire(timeout=limit, poll_interval=0.01)
                return
            while not self._acquired(deadline.left()):
                between_looks()
        except filelock.Timeout as exc:
            raise LockTimeout(
                f"config directory {shown_path(self._directory)}: its lock was not free within "
                f"{timeout:g} s; {self._holder()}"
            ) from exc
        except (NotImplementedError, OSError) as exc:
            if getattr(exc, "errno", errno.ENOSYS) not in _NO_LOCKS:
                raise
            reason = "this filesystem cannot lock files; use a directory of one that can"
            raise ConfigError(errno.ENOLCK, reason, str(self._directory)) from exc
        except RuntimeError as exc:  # from filelock: the thread would wait for itself
            raise AlreadyLocked(
                f"this thread is changing {shown_path(self._directory)} already; finish that first"
            ) from exc

    def _acquired(self, left: float | None) -> bool:
        try:
            self._lock.acquire(LOOK if left is None else min(left, LOOK), poll_interval=0.01)
        except filelock.Timeout:
            if left is not None and left <= LOOK:
                raise
            return False
        return True

    def release(self) -> None:
        self._lock.release(force=True)

    def _holder(self) -> str:
        try:
            return flock_holder(os.stat(self._path))
        except OSError:
            return "its holder is not known"


def _check_lock_file(path: Path) -> None:
    """Refuse a lock file that is a link: some releases of filelock truncate what it leads to, and
    in a directory that others may write it may be a trap."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ConfigError(errno.EPERM, "it is no regular file; remove it", str(path))


# --- writing --------------------------------------------------------------------------------


class ConfigDirs(msgspec.Struct, frozen=True):
    """A config directory and, if there is one, its autostart directory.

    Paths are made absolute, since processes with other working directories use the same value.
    Every `timeout` is in seconds and is for the directory's filelock: ``None`` waits for ever, 0
    tries once, a negative one is a `ValueError`. `LockTimeout` when it has passed; `AlreadyLocked`
    inside the commit of this thread's own change. Other errors: `ConfigError` (an `OSError`: errno,
    strerror, filename) with both directories as they were before, and `InvalidName` for an invalid
    name. A name that begins with ``.`` cannot be saved: dot-files are not loaded.

    A `commit` is called with the files in place and the filelock held. If it happened the files
    stay, otherwise they are restored, whatever was raised. If there is no NAME.xml, the file that
    the `owner` finds is renamed to it. If another domain's file is in that place, that file is
    renamed to its own name; if it cannot be, it is left alone, and writing there is a
    `ConfigError`.

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
        return self.points_to(self.config_file(name))

    def save(
        self,
        definition: DomainDef,
        timeout: float | None = None,
        commit: Commit | None = None,
        *,
        new: bool = False,
        keep_link: bool = True,
        owner: Owner | None = None,
    ) -> None:
        """Write the definition to NAME.xml, mode 0600, making the directory if need be.

        It is durably on disk when this returns (virDomainDefSave). Call it with the domain locked.
        An autostart link of a `new` domain's name belonged to a former domain and is removed;
        without `keep_link` so is a link that led to no file.

        >>> from tempfile import TemporaryDirectory
        >>> xml = "<name>web1</name><memory>1</memory><os><type>hvm</type></os>"
        >>> web1 = DomainDef.from_xml(f"<domain type='kvm'>{xml}</domain>")
        >>> with TemporaryDirectory() as directory:
        ...     ConfigDirs(Path(directory)).save(web1)
        ...     [path.name for path in Path(directory).glob("*.xml")]
        ['web1.xml']
        """
        path = self._file_to_write(definition.name)
        data = definition.to_xml().encode()

        def make(change: _Change) -> None:
            self._need_room(change, definition.name, owner)
            if not new:
                self._adopt(change, definition.name, owner)
            link = self.autostart_link(definition.name)
            if link is not None and (new or not (keep_link or os.path.lexists(path))):
                change.remove(link)
            change.put(path, lambda temporary: _write_file(temporary, data))

        self._change(path, timeout, make, commit, create=True)

    def delete(
        self,
        name: str,
        timeout: float | None = None,
        commit: Commit | None = None,
        *,
        owner: Owner | None = None,
        others: Iterable[str] = (),
    ) -> None:
        """Remove the domain's config file and autostart link; a missing one is no error.

        A file there that holds another domain stays, and so does its link. Files of `others`, names
        that the domain had for a moment, are removed if they hold it. Source:
        virDomainDeleteConfig, which goes on if the link cannot be removed. The link would then
        start the next domain of this name, so here that is an error.
        """

        def make(change: _Change) -> None:
            if self._make_room(change, name, owner) is None:
                self._adopt(change, name, owner)
                self._remove(change, name)
            for other in others:
                if owner is not None and other != name:
                    self._drop(change, other, owner)

        self._change(self.config_file(name), timeout, make, commit)

    def rename(
        self,
        old_name: str,
        new_definition: DomainDef,
        timeout: float | None = None,
        commit: Commit | None = None,
        *,
        autostart: bool = False,
        owner: Owner | None = None,
    ) -> None:
        """Write the new definition under its name, then remove the old name's file and link.

        An autostart link moves along; a stale one of the new name is removed. With `autostart` the
        link is made in any case: a process may have died renaming, after it removed the old one.
        Source: qemuDomainRenameCallback.
        """
        path = self._file_to_write(new_definition.name)
        data = new_definition.to_xml().encode()
        if self.config_file(old_name) == path:
            self.save(new_definition, timeout, commit, owner=owner)
            return

        def make(change: _Change) -> None:
            has_place = self._make_room(change, old_name, owner) is None
            if has_place:
                self._adopt(change, old_name, owner)
            self._need_room(change, new_definition.name, owner)
            moves = autostart or (has_place and self.is_autostart(old_name))
            change.put(path, lambda temporary: _write_file(temporary, data))
            link = self.autostart_link(new_definition.name)
            if link is not None and moves:
                self._put_link(change, link, path)
            elif link is not None:
                change.remove(link)
            if has_place:
                self._remove(change, old_name)

        self._change(path, timeout, make, commit, create=True)

    def set_autostart(
        self,
        name: str,
        enabled: bool,
        timeout: float | None = None,
        commit: Commit | None = None,
        *,
        owner: Owner | None = None,
    ) -> None:
        """Make the autostart link, or remove it (virDomainSetAutostart).

        Needs the config file (else ENOENT: the next load would ignore a dangling link) and makes
        the autostart directory. If `autostart_dir` is ``None`` there is nothing to disable, and
        enabling is a `ConfigError`.
        """
        link, target = self.autostart_link(name), self.config_file(name)
        if link is None:
            if enabled:
                raise ConfigError(errno.ENOENT, "there is no autostart directory", str(target))
            if commit is not None:
                commit()
            return

        def make(change: _Change) -> None:
            other = self._make_room(change, name, owner)
            if other is not None:
                if enabled:
                    raise _held(target, other)
                return
            self._adopt(change, name, owner)
            if not enabled:
                change.remove(link)
            elif not target.is_file():
                raise ConfigError(errno.ENOENT, "no config file to link to; save it", str(target))
            else:
                self._put_link(change, link, target)

        self._change(link, timeout, make, commit)

    def settle(
        self,
        name: str,
        definition: DomainDef | None,
        names: Iterable[str],
        timeout: float | None = None,
        commit: Commit | None = None,
        *,
        autostart: bool,
        create: bool,
        owner: Owner,
    ) -> None:
        """Make the files what the domain's record says, after a change that nobody ended.

        With a definition NAME.xml holds it, and its autostart link is there or not; without one the
        domain has no file. The files of `names` that hold this domain and are not NAME.xml are
        removed, each after the link to it, and so are links of these names that lead to no file.
        What is new is written first, so a process killed at any instruction leaves the domain in a
        file. `create` makes the directory if need be.
        """
        path = self.config_file(name) if definition is None else self._file_to_write(name)
        data = b"" if definition is None else definition.to_xml().encode()
        link = self.autostart_link(name)

        def make(change: _Change) -> None:
            if definition is not None:
                self._need_room(change, name, owner)
                self._adopt(change, name, owner)
                change.put(path, lambda temporary: _write_file(temporary, data))
                if link is not None and autostart:
                    self._put_link(change, link, path)
                elif link is not None:
                    change.remove(link)
            for other in names:
                if definition is None or other != name:
                    self._drop(change, other, owner)

        self._change(path, timeout, make, commit, create)

    def _drop(self, change: _Change, name: str, owner: Owner) -> None:
        path, link = self.config_file(name), self.autostart_link(name)
        if owner.holds(path):
            self._remove(change, name)
        elif link is not None and os.path.lexists(link) and not os.path.exists(link):
            change.remove(link)

    def _put_link(self, change: _Change, link: Path, target: Path) -> None:
        with reported(link):
            if not _is_directory(link.parent):
                _make_directory(link.parent)
        change.put(link, lambda temporary: os.symlink(target, temporary))

    def _file_to_write(self, name: str) -> Path:
        path = self.config_file(name)
        if name.startswith("."):
            # Loading skips dot-files, so the domain would be gone after the next start.
            raise ConfigError(errno.EINVAL, "a name that begins with '.' is not loaded", str(path))
        return path

    def _adopt(self, change: _Change, name: str, owner: Owner | None) -> None:
        """Move the domain's file to NAME.xml if it has another name; see the head of this file."""
        own = self.config_file(name)
        found = None if owner is None or os.path.lexists(own) else owner.find()
        if found is not None:
            self._move(change, found, own)

    def _make_room(self, change: _Change, name: str, owner: Owner | None) -> Other | None:
        """If this domain's place has another domain's file, move that to its own name; returns the
        other domain if its file has to stay."""
        own = self.config_file(name)
        other = None if owner is None or not os.path.lexists(own) else owner.other(own)
        if other is None or not other.may_move:
            return other
        others = self.config_file(other.name)
        if os.path.lexists(others):
            return other
        self._move(change, own, others)
        return None

    def _need_room(self, change: _Change, name: str, owner: Owner | None) -> None:
        other = self._make_room(change, name, owner)
        if other is not None:
            raise _held(self.config_file(name), other)

    def _move(self, change: _Change, found: Path, own: Path) -> None:
        link = None if self.autostart_dir is None else self.autostart_dir / own.name
        autostart = link is not None and self.points_to(found)
        if link is not None and autostart:
            change.put(link, lambda temporary: os.symlink(own, temporary))
        elif link is not None:
            change.remove(link)  # after the move it would lead to the file
        change.move(found, own)
        if link is not None and autostart:
            change.remove(link.with_name(found.name))

    def _remove(self, change: _Change, name: str) -> None:
        link = self.autostart_link(name)
        if link is not None:
            change.remove(link)
        change.remove(self.config_file(name))

    def links(self) -> set[str]:
        """The names in the autostart directory; which of them lead where, `points_to` says."""
        if self.autostart_dir is None:
            return set()
        try:
            return set(os.listdir(self.autostart_dir))
        except OSError:
            return set()

    def points_to(self, config_file: Path) -> bool:
        """Whether the autostart link of the file's name leads to this file."""
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
        """Make a change under the filelock, then call its commit; undo the change unless the commit
        happened.

        One function with one ``try``, no context manager: if a signal handler raised while one is
        being entered or left, the filelock would stay locked until the traceback is dropped.
        """
        check_timeout(timeout)
        change = _Change()
        lock, kept = None, False
        try:
            with reported(subject):
                if create and not _is_directory(self.config_dir):
                    _make_directory(self.config_dir)
                # Without a config directory there is nowhere to lock, and nothing to protect.
                if _is_directory(self.config_dir):
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
            elif not change.undo() and commit is not None:
                commit.not_undone()
            raise
        finally:
            if lock is not None:
                try:
                    lock.release()
                except BaseException:  # a signal handler raised before it was released
                    lock.release()
                    raise


def _held(path: Path, other: Other) -> ConfigError:
    what = f"it holds domain {other.name!r}; save that domain, then move the file away"
    return ConfigError(errno.EEXIST, what, str(path))


def _is_directory(path: Path) -> bool:
    """Whether the directory exists; `ConfigError` if something else has its name."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISDIR(mode):
        raise ConfigError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return True


def _is_same_directory(a: Path, b: Path) -> bool:
    if a == b:
        return True
    with suppress(OSError):
        return os.path.samefile(a, b)
    return False
