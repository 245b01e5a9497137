"""Who takes part, in the order of the tables. Each file says how it is driven and why so."""

from __future__ import annotations

from .base import Contestant, NotOfferedError
from .disk_cache import DiskCache
from .hand_made import HandMade
from .in_process import InProcess
from .libvirt import LibvirtDaemon, LibvirtInProcess
from .lmdb import Lmdb
from .manager import Manager
from .ours import Multiprocessing, Robust
from .redis import Redis
from .sqlite import Sqlite
from .ultradict import Ultradict

__all__ = ["ALL", "Contestant", "NotOfferedError"]

ALL: tuple[type[Contestant], ...] = (
    Robust,
    Multiprocessing,
    InProcess,
    HandMade,
    Lmdb,
    Sqlite,
    Ultradict,
    DiskCache,
    Manager,
    Redis,
    LibvirtInProcess,
    LibvirtDaemon,
)
