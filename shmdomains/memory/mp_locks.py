"""The locks of a list with ``lock="multiprocessing"``: one for the list, one for each domain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LockKindMismatch, SegmentFull
from ..lazy import LazyModule

if TYPE_CHECKING:
    import multiprocessing
    from multiprocessing import context as mp_context
else:
    multiprocessing = LazyModule("multiprocessing")


def make(lock: str, count: int, context: mp_context.BaseContext | None) -> tuple[Any, Any]:
    """Return the list's lock and the domains'; ``None`` twice for the robust kind."""
    if lock == "robust":
        return None, None
    room = _room_for_locks()
    if count + 1 > room:
        raise SegmentFull(
            f"max_domains={count} with lock='multiprocessing' needs {count + 1} locks, each of "
            f"which maps a page, and this process can map {room} more (vm.max_map_count); use "
            "fewer domains or lock='robust'"
        )
    lock_of = (context or multiprocessing.get_context()).Lock
    return lock_of(), [lock_of() for _ in range(count)]


def need_to_be_passed_on(list_lock: Any) -> None:
    """Raise `LockKindMismatch` for locks made for forked children: they have no name to open."""
    if list_lock is not None and list_lock._semlock.name is None:
        raise LockKindMismatch(
            "the locks of this list were made for forked children and cannot be given to a spawned "
            "one; make the list with the context that starts the process: "
            "DomainList(lock='multiprocessing', context=multiprocessing.get_context('spawn'))"
        )


def _room_for_locks() -> int:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    with open("/proc/self/maps") as maps:
        used = sum(1 for _ in maps)
    return max(limit - used - 1000, 0)  # the program needs some for itself
