"""A guest's process: started so that it outlives its worker, found again, and ended.

Each guest has a directory, ``ID-LIFE-UUID`` in the root. A domain's id is never used again in the
list's life, and a list that is made again has another life: no start meets what an earlier one
left. In it are the sockets, the file with the pid, and ``lock``,
which is only locked (flock). The lock's descriptor is inherited by QEMU, so the kernel keeps it
locked as long as the launching worker is at it or QEMU lives, whoever is killed when:

* locked, and no worker is at it: there is a guest, or will be in a moment;
* free: there is none, and none will come.

QEMU makes a daemon of itself (``-daemonize``): its first process ends when the guest is made and
its sockets are there, so the worker waits for that one and has no zombie; the guest belongs to
init. A process is known by its pid, its start time and the directory on its command line: a pid
alone may be somebody else's by now. It is signalled and waited for through a pidfd.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from ...deadline import Deadline
from ...errors import DriverError
from ...text import shown_path

_SLICE = 0.005  # seconds between two looks for a process that is about to show itself
_LOCK = "lock"
_NAME = re.compile("([0-9]{1,10})-[0-9a-f]{4}-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")

_locks: set[int] = set()
"""The locks of this process's launches. A fork closes its copies, for they would keep the lock; and
it waits until none is just being taken or tried."""
_guard = threading.Lock()


def _close_in_child() -> None:
    global _guard
    _guard = threading.Lock()
    for lock in _locks:
        os.close(lock)
    _locks.clear()


os.register_at_fork(
    before=lambda: _guard.acquire() and None,
    after_in_parent=lambda: _guard.release(),
    after_in_child=_close_in_child,
)


class Guest(NamedTuple):
    """A QEMU of ours: `started` is its start time, in clock ticks since boot."""

    pid: int
    started: int
    id: int
    uuid: UUID
    directory: Path


def directory_of(root: Path, id: int, uuid: UUID, life: str) -> Path:
    """Where this guest's files are; `life` has four hexadecimal digits."""
    return root / f"{id}-{life}-{uuid}"


def start_of(directory: Path) -> tuple[int, UUID] | None:
    """The id and uuid of a guest's directory, or ``None`` if it is none."""
    found = _NAME.fullmatch(directory.name)
    return (int(found[1]), UUID(found[2])) if found else None


# --- launching ------------------------------------------------------------------------------


def launch(directory: Path, words: Sequence[str], timeout: float = 60.0) -> Guest:
    """Start QEMU; returns when the guest is made, with its sockets there, and stopped.

    Raises `DriverError` with what QEMU said if it does not start, in `timeout` seconds. Then, and
    after any other exception, there is no guest and no directory.
    """
    start = start_of(directory)
    if start is None:
        raise ValueError(f"{directory} is no start's directory")
    deadline = Deadline(timeout)
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700)
    except OSError as error:
        text = f"cannot make {shown_path(directory)}: {error.strerror or error}"
        raise DriverError(text) from None
    try:
        with _locked(directory) as lock:
            _spawn(directory, words, lock, deadline)
        return Guest(*_daemon(directory), *start, directory)
    except BaseException:
        clear(directory, 10.0)
        raise


@contextmanager
def _locked(directory: Path) -> Iterator[int]:
    with _guard:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _locks.add(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # `is_locked` may be trying it
        yield lock
    finally:
        with _guard:
            _locks.discard(lock)
            os.close(lock)


def _spawn(directory: Path, words: Sequence[str], lock: int, deadline: Deadline) -> None:
    log = directory / "log"
    with open(log, "wb") as said:
        try:
            first = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[lock],
                env=_environment(),
                start_new_session=True,  # Ctrl-C in the worker's terminal is not for guests
                cwd="/",
            )
        except OSError as error:
            text = f"cannot execute {shown_path(words[0])}: {error.strerror or error}"
            raise DriverError(text) from None
    try:
        status = first.wait(deadline.left())
    except BaseException as error:
        first.kill()
        first.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise DriverError(f"QEMU did not start in time: {_last(log)}") from None
        raise
    if status:
        raise DriverError(f"QEMU ended with status {status} when it was started: {_last(log)}")


def _environment() -> dict[str, str]:
    """As libvirt's: what a worker was told in secret is no business of its guests, and errors are
    in English."""
    kept = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR")
    return {"LC_ALL": "C", **{name: os.environ[name] for name in kept if name in os.environ}}


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return "; ".join(lines[-3:]) or "it said nothing"


def _daemon(directory: Path) -> tuple[int, int]:
    pid = int((directory / "pid").read_text())
    started = _identity(pid, directory)
    if started is None:
        raise DriverError(f"QEMU ended when it was made: {_last(directory / 'log')}")
    with suppress(ProcessLookupError):
        _reap(os.getsid(pid))  # the process between the first and the guest
    return pid, started


def _reap(pid: int) -> None:
    """An orphan's zombie is ours if this process is init, as in a container, or a subreaper."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


# --- who is there ---------------------------------------------------------------------------


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; ``None``: there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def runs(pid: int, started: int, directory: Path) -> bool:
    """Whether this very guest runs."""
    return _identity(pid, directory) == started


def _identity(pid: int, directory: Path) -> int | None:
    """The start time of the process if it is the guest of this start."""
    started = start_time(pid)
    if started is None or _directory_of_process(pid) != directory:
        return None
    return started if start_time(pid) == started else None


def _directory_of_process(pid: int) -> Path | None:
    """What its command line says; ``None`` for whatever is no QEMU of ours."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    try:
        return Path(os.fsdecode(words[words.index(b"-pidfile") + 1])).parent
    except (ValueError, IndexError):
        return None


def scan(root: Path) -> list[Guest]:
    """All guests whose directory is in `root`, from the processes of this host. One that is being
    started may have two processes for a moment; both are told."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        directory = _directory_of_process(int(entry))
        if directory is None or directory.parent != root:
            continue
        start, started = start_of(directory), _identity(int(entry), directory)
        if start is not None and started is not None:
            found.append(Guest(int(entry), started, *start, directory))
    return found


def is_locked(directory: Path) -> bool:
    """Whether somebody is launching this guest, or it lives. False: there is none, and none will
    come."""
    with _guard:
        try:
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            # Shared: two that try it at once do not meet.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(lock)


# --- ending ---------------------------------------------------------------------------------


def end(guest: Guest, patience: float, force: bool = True) -> bool:
    """Ask the guest's process to end (SIGTERM: QEMU flushes its images), and kill it after
    `patience` seconds, unless `force` is false. False: it still runs.
    """
    with _opened(guest) as pidfd:
        if pidfd is None:
            return True
        for number in (signal.SIGTERM, signal.SIGKILL) if force else (signal.SIGTERM,):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            if _ends(pidfd, patience if number == signal.SIGTERM else 10.0):
                _reap(guest.pid)
                return True
    return False


def ends_soon(guest: Guest, seconds: float) -> bool:
    """Whether this very guest has ended, or does so within some seconds."""
    with _opened(guest) as pidfd:
        return pidfd is None or _ends(pidfd, seconds)


@contextmanager
def _opened(guest: Guest) -> Iterator[int | None]:
    """A pidfd of this very guest, or ``None`` if it has ended."""
    try:
        pidfd = os.pidfd_open(guest.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        # Looked at after it was opened: from now on it cannot be another one's.
        yield pidfd if runs(guest.pid, guest.started, guest.directory) else None
    finally:
        os.close(pidfd)


def _ends(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(int(seconds * 1000)))


def _end_all(directory: Path) -> None:
    for guest in scan(directory.parent):
        if guest.directory == directory:
            end(guest, 0.0)


def clear(directory: Path, timeout: float = 10.0) -> None:
    """End at once whatever there is of this start, also what a dead worker is still starting, and
    remove its directory. Raises `DriverError` if that does not end in time.
    """
    deadline = Deadline(timeout)
    if not (directory / _LOCK).exists():
        _end_all(directory)  # it may have been removed from outside
    while is_locked(directory):
        _end_all(directory)
        if is_locked(directory):
            # Between a worker's fork and QEMU's exec there is no QEMU to be seen.
            if deadline.left() == 0:
                place = shown_path(directory / _LOCK)
                text = f"{place} is locked and no QEMU is there; `fuser` says by whom"
                raise DriverError(text)
            time.sleep(_SLICE)
    shutil.rmtree(directory, ignore_errors=True)
