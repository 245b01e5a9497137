"""Helpers for replacing a file atomically, and for finding out who has a file's lock.

A writer killed at any instruction leaves a whole file, old or new. Temporary names are
``.tmp-PID-N``: short, because a domain's name may fill a file name by itself, and with a pid, so
that those of a dead process can be removed.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError, ShmDomainsError
from .lazy import LazyModule

if TYPE_CHECKING:
    import psutil
else:
    psutil = LazyModule("psutil")

TEMPORARY = re.compile(r"\.tmp-([1-9][0-9]*)-[0-9]+")
"""A temporary name; the group is its maker's pid."""

_numbers = itertools.count()


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn a plain OSError into a `ConfigError` that names `path`."""
    try:
        yield
    except ShmDomainsError:
        raise
    except OSError as exc:
        raise ConfigError(exc.errno, exc.strerror or str(exc), os.fspath(path)) from exc


def temporary_name(directory: Path) -> Path:
    """Return a free name in the directory that no other call returns."""
    while True:
        path = directory / f".tmp-{os.getpid()}-{next(_numbers)}"
        # A dead process with our pid may have left one.
        if not os.path.lexists(path):
            return path


def discard(path: Path) -> None:
    """Remove the file, ignoring errors."""
    with suppress(OSError):
        os.unlink(path)


def sync_directory(path: Path) -> None:
    """Make the directory's entries survive a power failure."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # the filesystem cannot sync directories
            raise
    finally:
        os.close(fd)


def flock_holder(status: os.stat_result) -> str:
    """Say who has the flock on a file, if the kernel tells."""
    try:
        major, minor = os.major(status.st_dev), os.minor(status.st_dev)
        entry = f"{major:02x}:{minor:02x}:{status.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == entry:
                pid = int(fields[4])
                return f"pid {pid} ({' '.join(psutil.Process(pid).cmdline())}) holds it"
    except (OSError, ValueError, IndexError):  # before psutil.Error: psutil may fail to import
        pass
    except psutil.Error:
        pass
    return "its holder is not known"
