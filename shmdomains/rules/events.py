"""Which events a commit makes, from what was committed before and what it changes.

For stores without a core: the core says the same natively (``_core/news.pxi``), because every
commit asks, and the conformance suite compares the two. Details follow libvirt's QEMU driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..events import (
    AutostartDetail,
    CrashedDetail,
    DefinedDetail,
    EventType,
    PMSuspendedDetail,
    ResumedDetail,
    ShutdownDetail,
    StartedDetail,
    StoppedDetail,
    SuspendedDetail,
    UndefinedDetail,
)
from ..states import DomainState, PausedReason, RunningReason, ShutoffReason
from .info import DomainInfo
from .store import Changes, News

_STARTED = {
    RunningReason.MIGRATED: StartedDetail.MIGRATED,
    RunningReason.RESTORED: StartedDetail.RESTORED,
    RunningReason.FROM_SNAPSHOT: StartedDetail.FROM_SNAPSHOT,
    RunningReason.WAKEUP: StartedDetail.WAKEUP,
}
_STARTED_PAUSED = {
    PausedReason.MIGRATION: StartedDetail.MIGRATED,
    PausedReason.FROM_SNAPSHOT: StartedDetail.FROM_SNAPSHOT,
}
_SUSPENDED = {
    PausedReason.MIGRATION: SuspendedDetail.MIGRATED,
    PausedReason.IOERROR: SuspendedDetail.IOERROR,
    PausedReason.WATCHDOG: SuspendedDetail.WATCHDOG,
    PausedReason.FROM_SNAPSHOT: SuspendedDetail.FROM_SNAPSHOT,
    PausedReason.POSTCOPY: SuspendedDetail.POSTCOPY,
    PausedReason.POSTCOPY_FAILED: SuspendedDetail.POSTCOPY_FAILED,
    PausedReason.API_ERROR: SuspendedDetail.API_ERROR,
}
_RESUMED = {
    RunningReason.MIGRATED: ResumedDetail.MIGRATED,
    RunningReason.RESTORED: ResumedDetail.FROM_SNAPSHOT,
    RunningReason.FROM_SNAPSHOT: ResumedDetail.FROM_SNAPSHOT,
    RunningReason.MIGRATION_CANCELED: ResumedDetail.MIGRATED,
    RunningReason.POSTCOPY: ResumedDetail.POSTCOPY,
    RunningReason.POSTCOPY_FAILED: ResumedDetail.POSTCOPY_FAILED,
}
_STOPPED = {
    ShutoffReason.DESTROYED: StoppedDetail.DESTROYED,
    ShutoffReason.CRASHED: StoppedDetail.CRASHED,
    ShutoffReason.MIGRATED: StoppedDetail.MIGRATED,
    ShutoffReason.SAVED: StoppedDetail.SAVED,
    ShutoffReason.FAILED: StoppedDetail.FAILED,
    ShutoffReason.FROM_SNAPSHOT: StoppedDetail.FROM_SNAPSHOT,
    ShutoffReason.DAEMON: StoppedDetail.FAILED,
}
_WORKING = frozenset({DomainState.NOSTATE, DomainState.RUNNING, DomainState.BLOCKED})


def news_of_new(name: str, persistent: bool) -> list[News]:
    """Of an insert: a transient domain is none before it is started, as in libvirt."""
    return [News(EventType.DEFINED, DefinedDetail.ADDED, -1, name)] if persistent else []


def news_of_end(info: DomainInfo) -> list[News]:
    """Of a removal; `info`: what is committed."""
    found = []
    if info.is_active:
        found.append(News(EventType.STOPPED, StoppedDetail.SHUTDOWN, info.id, info.name))
    if info.persistent:
        found.append(News(EventType.UNDEFINED, UndefinedDetail.REMOVED, info.id, info.name))
    return found


def news_of_change(info: DomainInfo, changes: Changes) -> list[News]:
    """Of a commit; `info`: what is committed."""
    return list(_news_of_change(info, changes))


def _news_of_change(info: DomainInfo, changes: Changes) -> Iterator[News]:
    id = changes.get("id", info.id)
    name = changes.get("name", info.name)
    persistent = changes.get("persistent", info.persistent)
    stopped = info.is_active and id != info.id
    if name != info.name:
        if persistent:
            yield News(EventType.UNDEFINED, UndefinedDetail.RENAMED, id, info.name)
            yield News(EventType.DEFINED, DefinedDetail.RENAMED, id, name)
        return
    if persistent and not info.persistent:
        yield News(EventType.DEFINED, DefinedDetail.ADDED, id, name)
    elif persistent and not stopped and _is_redefined(changes):
        yield News(EventType.DEFINED, DefinedDetail.UPDATED, id, name)
    for type, detail, whose in _news_of_state(info, changes, id):
        yield News(type, detail, whose, name)
    if info.persistent and not persistent:
        yield News(EventType.UNDEFINED, UndefinedDetail.REMOVED, id, name)
    autostart = changes.get("autostart", info.autostart)
    if autostart != info.autostart:
        yield News(EventType.AUTOSTART, AutostartDetail(autostart), id, name)


def _is_redefined(changes: Changes) -> bool:
    return "definition" in changes or changes.get("next_definition") is not None


def _news_of_state(
    info: DomainInfo, changes: Changes, id: int
) -> Iterator[tuple[EventType, int, int]]:
    reason: Any = changes.get("reason", info.reason)
    before = _told(info.state, info.reason)
    state = _told(DomainState(changes.get("state", info.state)), reason)
    if info.id != id:
        if info.is_active:
            yield from _ended(info, state if id == -1 else None, reason)
        if id != -1:
            yield from _started(state, reason, id)
    elif info.is_active and state != before:
        yield from _changed(before, state, reason, id)


def _told(state: DomainState, reason: int) -> DomainState:
    """A domain that is paused only because it is starting up was not suspended by anybody, so that
    nobody is told: not of the pause, and not of its end. But one that was suspended, shutting down,
    crashed or pmsuspended, and starts up anew with its id, is told as resumed or woken as the pause
    begins."""
    starting = state is DomainState.PAUSED and reason == PausedReason.STARTING_UP
    return DomainState.NOSTATE if starting else state


def _ended(
    info: DomainInfo, state: DomainState | None, reason: Any
) -> Iterator[tuple[EventType, int, int]]:
    """`state` ``None``: it has another id by now, and nobody knows why the one of before ended."""
    detail = StoppedDetail.SHUTDOWN
    if state is DomainState.CRASHED:
        if info.state is not DomainState.CRASHED:
            yield EventType.CRASHED, CrashedDetail.PANICKED, info.id
        detail = StoppedDetail.CRASHED
    elif state is not None:
        detail = _STOPPED.get(reason, detail)
    yield EventType.STOPPED, detail, info.id


def _started(state: DomainState, reason: Any, id: int) -> Iterator[tuple[EventType, int, int]]:
    if state is DomainState.PAUSED:
        yield EventType.STARTED, _STARTED_PAUSED.get(reason, StartedDetail.BOOTED), id
        yield EventType.SUSPENDED, _SUSPENDED.get(reason, SuspendedDetail.PAUSED), id
    elif state is DomainState.RUNNING:
        yield EventType.STARTED, _STARTED.get(reason, StartedDetail.BOOTED), id
    else:
        yield EventType.STARTED, StartedDetail.BOOTED, id


def _changed(
    old: DomainState, new: DomainState, reason: Any, id: int
) -> Iterator[tuple[EventType, int, int]]:
    if new is DomainState.PAUSED:
        yield EventType.SUSPENDED, _SUSPENDED.get(reason, SuspendedDetail.PAUSED), id
    elif new in _WORKING and old is DomainState.PMSUSPENDED:
        yield EventType.STARTED, StartedDetail.WAKEUP, id
    elif new in _WORKING and old not in _WORKING:
        running = new is DomainState.RUNNING
        detail = _RESUMED.get(reason, ResumedDetail.UNPAUSED) if running else ResumedDetail.UNPAUSED
        yield EventType.RESUMED, detail, id
    elif new is DomainState.SHUTDOWN:
        yield EventType.SHUTDOWN, ShutdownDetail.FINISHED, id
    elif new is DomainState.CRASHED:
        yield EventType.CRASHED, CrashedDetail.PANICKED, id
    elif new is DomainState.PMSUSPENDED:
        yield EventType.PMSUSPENDED, PMSuspendedDetail.MEMORY, id
