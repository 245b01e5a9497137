"""Every page that a contestant has, touched: what lies idle may have been taken away.

Under a hypervisor, memory that nobody has touched for a while may be given to others. Measured in
such a machine, 2026-11-26: the first access to a random page took 0.6 µs when it was just written,
20 µs at the 90th percentile after 30 s, 63 µs after 400 s (7 µs the median). A million domains are
filled in minutes, so whoever was filled first would be measured by its host's disk.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

CHUNK = 1024  # pages a call, as many as IOV_MAX
PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_ulong) * 2,
    ctypes.c_ulong,
]


def touch(folder: str, pids: Iterable[int]) -> None:
    """Read what is in the files of this folder on tmpfs, and a byte of each page that these
    processes and their children have for themselves. Who is gone meanwhile is left out."""
    for path in Path(folder).rglob("*"):
        with suppress(OSError):
            _read(path)
    for pid in pids:
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            for one in (process, *process.children(recursive=True)):
                for begin, end in _private(one.pid):
                    _touch_pages(one.pid, begin, end)


def _read(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        return
    with path.open("rb", buffering=0) as file:
        buffer, size, at = bytearray(1 << 20), path.stat().st_size, 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)  # a hole would be long
            except OSError:
                return
            hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            while at < hole:
                at += os.preadv(file.fileno(), [memoryview(buffer)[: hole - at]], at)


def _private(pid: int) -> Iterator[tuple[int, int]]:
    """Where a process has memory of its own. What is shared is in files, and reading a mapping of
    one of those would fill its holes."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, mode, _, _, inode, *_ = line.split(maxsplit=5)
        if mode == "rw-p" and inode == "0":
            begin, end = (int(text, 16) for text in place.split("-"))
            yield begin, end


def _touch_pages(pid: int, begin: int, end: int) -> None:
    ours = ctypes.create_string_buffer(CHUNK)
    here = array("L", (ctypes.addressof(ours), CHUNK))
    for at in range(begin, end, CHUNK * PAGE):
        pages = min(CHUNK, (end - at) // PAGE)
        there = array("L", bytes(16 * pages))
        there[0::2] = array("L", range(at, at + pages * PAGE, PAGE))
        there[1::2] = array("L", [1]) * pages
        _libc.process_vm_readv(pid, here.buffer_info()[0], 1, there.buffer_info()[0], pages, 0)
