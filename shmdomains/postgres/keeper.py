"""The process that keeps an embedded server: it starts PostgreSQL and ends it with its last user.

It is a program, run by its path without the site's packages, so it starts in a few milliseconds and
imports nothing of ours. `embedded.py` says what the files are that it gets.

    keeper.py run UID PROGRAM ARGUMENT…            become that user, and the program
    keeper.py keep UID USERS SERVER POSTGRES …     keep a server; returns when that is locked

PostgreSQL does not run as root. Root's servers run as the user ``nobody``, with the one capability
to walk into folders that root alone may enter (CAP_DAC_OVERRIDE): so its data, its socket and the
wheel can stay where nobody else gets in. Other processes of ``nobody`` have less than it, so the
kernel lets none of them trace it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import struct
import sys
import threading
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
CAP_DAC_OVERRIDE = 1
CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def _prctl(option: int, *arguments: int) -> None:
    filled = [ctypes.c_ulong(one) for one in (*arguments, 0, 0, 0, 0)[:4]]
    _check(_libc.prctl(option, *filled), f"prctl {option}")


def become(uid: int) -> None:
    """Give up root for the user `uid`, except that folders and files stay open to us."""
    if uid == os.geteuid():
        return
    _prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    bit = 1 << CAP_DAC_OVERRIDE
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    sets = struct.pack("6I", bit, bit, bit, 0, 0, 0)  # effective, permitted, inheritable
    _check(_libc.capset(header, sets), "capset")
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE)


def started(pid: int) -> str:
    """When the process began, which tells it from a later one of the same number."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def _serve(uid: int, command: list[str], server: int, keeper: int) -> NoReturn:
    become(uid)
    # After `become`, which clears it. A server whose keeper is killed has nobody who ends it.
    _prctl(PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != keeper:
        os._exit(1)
    os.set_inheritable(server, True)
    os.execv(command[0], command)


def keep(uid: int, users_path: str, server_path: str, command: list[str]) -> None:
    server = os.open(server_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(server, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if os.fork():
        os._exit(0)  # the keeper is nobody's child
    users = os.open(users_path, os.O_RDONLY | os.O_CLOEXEC)
    keeper = os.getpid()
    postmaster = os.fork()
    if postmaster == 0:
        try:
            _serve(uid, command, server, keeper)
        except BaseException as exc:
            print(f"keeper: {command[0]}: {exc}", file=sys.stderr, flush=True)
            os._exit(1)
    pidfd = os.pidfd_open(postmaster)
    os.ftruncate(server, 0)
    os.pwrite(server, f"{postmaster} {started(postmaster)}\n".encode(), 0)

    def end_with_the_last_user() -> None:
        fcntl.flock(users, fcntl.LOCK_EX)
        signal.pidfd_send_signal(pidfd, signal.SIGINT)  # a fast shutdown

    threading.Thread(target=end_with_the_last_user, daemon=True).start()
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        become(int(sys.argv[2]))
        os.execv(sys.argv[3], sys.argv[3:])
    keep(int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
