"""Named segments: where their files lie, and who may create, attach and unlink them.

A segment is created in an unnamed file of its directory, filled, locked and only then linked to its
name, so nobody ever opens half a segment, a killed creator leaves nothing and the loser of a race
sees that the name is taken. Every attached process holds a shared `flock`; whoever wants to unlink
asks for an exclusive one on a descriptor of its own (a descriptor inherited over fork shares the
lock of its parent, and would say yes). Names are made and removed under a `flock` of the directory.

Directories belong to us (or root) and nobody else may write there, so a name can neither be
squatted nor be made to lead elsewhere; links are refused all the same. Another's directory (a
group's, mode 2750) is used only when it was asked for, by path or $SHMDOMAINS_DIR: the one that is
ours by default, `/dev/shm/shmdomains-UID`, could be made by anybody before us. In a directory where
others may write (sticky, as /dev/shm itself) only our own files are segments. A directory is opened
once, judged by its descriptor, and all of it happens through that: it may be replaced meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..deadline import Deadline
from ..errors import (
    LockTimeout,
    SegmentExists,
    SegmentFull,
    SegmentInUse,
    SegmentNotFound,
    SegmentRefused,
    ShmDomainsError,
)
from ..files import flock_holder
from ..lazy import LazyModule

if TYPE_CHECKING:
    import psutil
else:
    psutil = LazyModule("psutil")

SUFFIX = ".segment"
DEFAULT_NAME = "default"
_MODES = (0o600, 0o660)
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # this process, or the whole machine
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
PATIENCE = 10.0
"""Seconds for locks of files and directories, which are held for microseconds."""


class SegmentFile(msgspec.Struct, frozen=True):
    """A named segment's file: name, path, owner, mode, and the memory it uses (bytes).

    >>> import os
    >>> from shmdomains import DomainList, segments
    >>> with DomainList.create(f"example-{os.getpid()}") as doms:
    ...     [oct(file.mode) for file in segments() if file.name == doms.info.name]
    ...     doms.unlink()
    ['0o600']
    """

    name: str
    path: Path
    uid: int
    mode: int
    bytes: int


# --- directories ------------------------------------------------------------------------------


def candidates() -> list[Path]:
    """Return the directories where named segments may lie, the preferred one first."""
    override = os.environ.get("SHMDOMAINS_DIR")
    if override:
        return [Path(override)]
    found = [Path("/dev/shm") / f"shmdomains-{os.getuid()}"]
    if os.environ.get("XDG_RUNTIME_DIR"):
        found.insert(0, Path(os.environ["XDG_RUNTIME_DIR"]) / "shmdomains")
    if os.getuid() == 0:
        found.insert(0, Path("/run/shmdomains"))
    return found


def directory() -> Path:
    """Return the directory for new segments: the first candidate that lies on tmpfs."""
    choices = candidates()
    if len(choices) == 1:
        return choices[0]
    for choice in choices:
        if _is_on_tmpfs(choice.parent):
            return choice
    raise SegmentRefused(
        f"none of {', '.join(map(str, choices))} lies on tmpfs; name a directory in $SHMDOMAINS_DIR"
    )


def _is_on_tmpfs(path: Path) -> bool:
    if not path.is_dir():
        return False
    place = path.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    for parent in (place, *place.parents):
        if parent in mounts:
            return mounts[parent] == "tmpfs"
    return False


def path_of(name: str | None, path: str | os.PathLike[str] | None) -> Path:
    """Return the file of a segment that is given by name or by path; it need not exist."""
    if path is not None:
        if name is not None:
            raise TypeError("give a name or a path, not both")
        return Path(os.path.abspath(path))
    name = DEFAULT_NAME if name is None else name
    if not isinstance(name, str):
        raise TypeError(f"a segment's name is a str, not {type(name).__name__}; a file is path=")
    # Printable has a UTF-8 form: lone surrogates are not.
    if not (name.isprintable() and 1 <= len(name.encode()) <= 200) or "/" in name or name[0] == ".":
        raise SegmentRefused(
            f"{name!r} cannot be a segment's name: 1 to 200 bytes of printable characters, no "
            "'/', no leading '.'"
        )
    for choice in candidates():
        if os.path.lexists(choice / (name + SUFFIX)):
            return choice / (name + SUFFIX)
    return directory() / (name + SUFFIX)


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    """Open a directory for segments without following a link; refuse it if others have a say.

    The descriptor is good for names in it, and for nothing else (O_PATH): to search is enough.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        os.lstat(path)  # raises if it is a part of the path that is none
        raise SegmentRefused(f"the segment directory {path} is no directory") from None
    try:
        _check_directory(path, os.fstat(fd))
        yield fd
    finally:
        os.close(fd)


def _check_directory(path: Path, status: os.stat_result) -> None:
    where = f"the segment directory {path}"
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid in (0, os.getuid()):
        if mode & 0o022 and not mode & stat.S_ISVTX:
            raise SegmentRefused(f"{where} is writable for others (mode {mode:o}); make it 0700")
        return
    if not os.environ.get("SHMDOMAINS_DIR") and path in candidates():
        raise SegmentRefused(f"{where} belongs to uid {status.st_uid}, who made it before us")
    if mode != 0o2750 or status.st_gid not in _groups():
        raise SegmentRefused(
            f"{where} belongs to uid {status.st_uid}; it must be ours, or a group's with mode 2750"
        )


def _groups() -> set[int]:
    return {os.getegid(), *os.getgroups()}


# --- create, attach, unlink ---------------------------------------------------------------------


def check_mode(mode: int) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode is 0o600, or 0o660 for a group, not {mode:#o}")


def create(
    path: Path,
    mode: int,
    group: int | str | None,
    fill: Callable[[int], None],
    timeout: float | None = PATIENCE,
) -> int:
    """Create the file, let `fill` make it a segment, give it its name; returns the descriptor.

    Raises `SegmentExists`, `SegmentRefused`, `SegmentFull` when the filesystem has no room for
    another file, `OSError` when this process has no descriptor or memory left; what `fill` raises
    leaves nothing behind. `timeout` in seconds is for the directory's lock: `LockTimeout`.
    """
    deadline = Deadline(timeout)
    check_mode(mode)
    _make_directory(path.parent, group)
    with _directory(path.parent) as place:
        fd = _open_unnamed(place, path.parent)
        try:
            if group is not None:
                _give_to_group(fd, path, group)
            os.fchmod(fd, mode)
            fill(fd)
            fcntl.flock(fd, fcntl.LOCK_SH)  # nobody else knows the file
            with _names_locked(place, path.parent, deadline):
                # Through /proc: linking a descriptor directly needs a capability.
                os.link(
                    f"/proc/self/fd/{fd}",
                    path.name,
                    src_dir_fd=place,
                    dst_dir_fd=place,
                    follow_symlinks=True,
                )
        except BaseException as exc:
            os.close(fd)
            if isinstance(exc, FileExistsError):
                raise SegmentExists(f"a segment {path} exists already; attach to it") from None
            if isinstance(exc, OSError) and exc.errno in _NO_ROOM:
                raise _full(path.parent, exc) from None
            raise
    return fd


def _make_directory(path: Path, group: int | str | None) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except OSError as exc:
        raise SegmentRefused(
            exc.errno, f"cannot make the segment directory: {exc.strerror}", str(path)
        ) from exc
    try:
        if group is not None:
            _give_to_group(path, path, group)
        os.chmod(path, 0o700 if group is None else 0o2750)  # whatever the umask took away
    except BaseException:
        os.rmdir(path)
        raise


def _give_to_group(file: int | Path, path: Path, group: int | str) -> None:
    gid = gid_of(group)
    try:
        os.chown(file, -1, gid)
    except PermissionError as exc:
        raise SegmentRefused(
            exc.errno, f"cannot be given to group {gid}, of which we are no member", str(path)
        ) from exc


def _open_unnamed(place: int, path: Path) -> int:
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=place)
    except OSError as exc:
        if exc.errno in _EXHAUSTED:
            raise OSError(exc.errno, exc.strerror, str(path)) from None
        if exc.errno in _NO_ROOM:
            raise _full(path, exc) from None
        raise SegmentRefused(f"cannot create a segment in {path}: {exc.strerror}") from exc


def _full(directory: Path, exc: OSError) -> SegmentFull:
    return SegmentFull(
        f"no room for a segment in {directory} ({exc.strerror}); remove files there, or make its "
        "filesystem larger"
    )


def gid_of(group: int | str) -> int:
    if isinstance(group, int):
        return group
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise SegmentRefused(f"there is no group {group!r}") from None


def attach(path: Path, timeout: float | None = PATIENCE) -> int:
    """Open the segment for life, with its shared `flock`; returns the descriptor.

    Raises `SegmentNotFound`, `SegmentRefused` for a file that is not ours, a link, or of another
    mode, `LockTimeout` where an unlink was stopped in the middle, and `OSError` when this process
    has no descriptor or memory left.
    """
    deadline = Deadline(timeout)
    with _existing(path) as place:
        while True:
            fd = _open_checked(place, path)
            try:
                _flock(fd, fcntl.LOCK_SH, f"segment {path}", deadline)
            except BaseException:
                os.close(fd)
                raise
            if _is_named(path.name, fd, place):
                return fd
            os.close(fd)  # unlinked between open and flock; perhaps created anew since


@contextmanager
def _existing(path: Path) -> Iterator[int]:
    """The directory of a segment that should be there."""
    try:
        with _directory(path.parent) as place:
            yield place
    except (FileNotFoundError, NotADirectoryError) as exc:
        if isinstance(exc, ShmDomainsError):
            raise
        raise SegmentNotFound(
            errno.ENOENT, "no such segment; create it, or load a directory", str(path)
        ) from None
    except ShmDomainsError:
        raise
    except OSError as exc:
        if exc.errno in _EXHAUSTED:
            raise OSError(exc.errno, exc.strerror, str(path)) from None
        what = "it is a symbolic link" if exc.errno == errno.ELOOP else exc.strerror
        raise SegmentRefused(exc.errno, f"refused: {what}", str(path)) from exc


def _open_checked(place: int, path: Path) -> int:
    fd = os.open(path.name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=place)
    try:
        _check_file(path, os.fstat(fd), os.fstat(place))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_file(path: Path, status: os.stat_result, directory: os.stat_result) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        raise SegmentRefused(f"{path} is no regular file")
    ours = status.st_uid in (0, os.getuid())
    shared = mode == 0o660 and status.st_gid in _groups() and not directory.st_mode & 0o022
    if not ours and not shared:
        raise SegmentRefused(f"{path} belongs to uid {status.st_uid}, not to us")
    if mode not in _MODES:
        raise SegmentRefused(f"{path} has mode {mode:04o}; a segment has 0600 or 0660")
    if status.st_nlink > 1:
        raise SegmentRefused(f"{path} has another name (a hard link), which may be the right one")


def is_same_file(path: Path, fd: int) -> bool:
    """Whether the name still leads to the file that was opened."""
    return _is_named(path, fd, None)


def _is_named(name: str | Path, fd: int, place: int | None) -> bool:
    try:
        there, here = os.stat(name, dir_fd=place, follow_symlinks=False), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def unlink(
    path: Path,
    force: bool = False,
    inode: tuple[int, int] | None = None,
    timeout: float | None = PATIENCE,
) -> None:
    """Remove the segment's name; whoever is attached keeps it. `SegmentInUse` unless `force`.

    `inode`: device and number of the one that is meant; `SegmentNotFound` if it is another.
    `timeout` in seconds is for the directory's lock: `LockTimeout`.
    """
    deadline = Deadline(timeout)
    with _existing(path) as place, _names_locked(place, path.parent, deadline):
        fd = _open_checked(place, path)
        try:
            status = os.fstat(fd)
            if inode is not None and inode != (status.st_dev, status.st_ino):
                raise _another(path)
            if not force:
                _lock_exclusively(path, fd)
            os.unlink(path.name, dir_fd=place)
        finally:
            _unlock_and_close(fd)


def unlink_attached(
    path: Path, fd: int, force: bool = False, timeout: float | None = PATIENCE
) -> None:
    """`unlink` by a process that is attached through `fd` itself, and stays so.

    Children that inherited `fd` share its `flock`, so for them we look who has the file mapped.
    """
    deadline = Deadline(timeout)
    with _existing(path) as place, _names_locked(place, path.parent, deadline):
        if not is_same_file(path, fd):
            raise _another(path)
        unlinked = False
        try:
            if not force:
                _lock_exclusively(path, fd)
                _need_no_heirs(path, fd)
            os.unlink(path.name, dir_fd=place)
            unlinked = True
        finally:
            # Asking for the exclusive lock gave up the shared one, whatever the answer was. Where
            # somebody else keeps it locked the shared one stays lost: then others see by the list
            # of the attached alone that this process is here. Without a name nobody asks.
            try:
                _flock(fd, fcntl.LOCK_SH, f"segment {path}", deadline)
            except LockTimeout:
                if not unlinked:
                    raise


def _another(path: Path) -> SegmentNotFound:
    return SegmentNotFound(errno.ENOENT, "the name is not this segment's", str(path))


@contextmanager
def _names_locked(place: int, path: Path, deadline: Deadline) -> Iterator[None]:
    """Names come and go under the directory's lock, so in here each keeps its file."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place)
    try:
        what = f"directory {path}, in which names of segments are made and removed,"
        _flock(fd, fcntl.LOCK_EX, what, deadline)
        yield
    finally:
        _unlock_and_close(fd)


def _unlock_and_close(fd: int) -> None:
    # Closing alone would leave the lock with a child that was forked meanwhile.
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _flock(fd: int, how: int, what: str, deadline: Deadline) -> None:
    while True:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            left = deadline.left()
            if left is not None and left <= 0:
                raise LockTimeout(
                    f"{what} is kept locked by another process, which may be stopped; "
                    f"{flock_holder(os.fstat(fd))}"
                ) from None
            time.sleep(0.005 if left is None else min(left, 0.005))


def _lock_exclusively(path: Path, fd: int) -> None:
    # An attacher that is still looking at the file lets go at once; the others stay.
    for attempt in range(3):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == 2:
                raise SegmentInUse(
                    f"segment {path} is in use; its processes are shown by 'shmdomains segments'; "
                    "force unlinks it all the same"
                ) from None
            time.sleep(0.01)


def _need_no_heirs(path: Path, fd: int) -> None:
    # Whoever is forked to run another program lets go at once; the others stay.
    for attempt in range(3):
        if attempt:
            time.sleep(0.01)
        heirs = _heirs(fd)
        if not heirs:
            return
    raise SegmentInUse(
        f"segment {path} is in use by process {', '.join(map(str, heirs))}, forked from one that "
        "was attached; force unlinks it all the same"
    )


def _heirs(fd: int) -> list[int]:
    """The other processes that have the file mapped, as far as /proc shows them to us."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    mapped = f" {device} {status.st_ino} ".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        # OSError: it ended, or is another user's, who has a `flock` of his own.
        with suppress(OSError), open(f"/proc/{entry}/maps", "rb") as maps:
            if any(mapped in line for line in maps):
                found.append(int(entry))
    return sorted(found)


def segments() -> list[SegmentFile]:
    """Return the named segments that this user may see, by name.

    >>> isinstance(segments(), list)
    True
    """
    return sorted(_scan(), key=lambda found: found.name)


def _scan() -> Iterator[SegmentFile]:
    for choice in candidates():
        try:
            entries = sorted(choice.iterdir())
        except OSError:
            continue
        for entry in entries:
            if entry.suffix != SUFFIX or entry.name.startswith("."):
                continue
            with suppress(OSError):
                status = entry.lstat()
                if not stat.S_ISREG(status.st_mode):
                    continue
                yield SegmentFile(
                    name=entry.name[: -len(SUFFIX)],
                    path=entry,
                    uid=status.st_uid,
                    mode=stat.S_IMODE(status.st_mode),
                    bytes=status.st_blocks * 512,
                )
