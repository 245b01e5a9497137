"""What happens to domains, as values: `DomainEvent`, its types and their details.

Types and details are libvirt's (``virDomainEventType`` and the ``virDomainEvent*DetailType`` enums
of ``libvirt-domain.h``), and ours from 100 on. The numbers are stored in shared memory: a number
never changes its meaning. The words are those of ``virsh event``.
"""

from __future__ import annotations

import enum
from typing import Any
from uuid import UUID

import msgspec

from .holder import LockHolder
from .job import Job


class EventType(enum.IntEnum):
    """What happened (``virDomainEventType``; ours from 100 on).

    >>> EventType.PMSUSPENDED.value, EventType.PMSUSPENDED.words, EventType.PMSUSPENDED.event
    (7, 'PMSuspended', 'lifecycle')
    """

    DEFINED = 0
    UNDEFINED = 1
    STARTED = 2
    SUSPENDED = 3
    RESUMED = 4
    STOPPED = 5
    SHUTDOWN = 6
    PMSUSPENDED = 7
    CRASHED = 8
    HOLDER_DIED = 100
    """Whoever held the domain's lock died; what it had not committed is rolled back."""
    AUTOSTART = 101
    JOB_STARTED = 102
    JOB_ENDED = 103

    @property
    def words(self) -> str:
        """As ``virsh event`` shows it: ``Started``, ``PMSuspended``..."""
        return "PMSuspended" if self is EventType.PMSUSPENDED else _words(self.name)

    @property
    def event(self) -> str:
        """The name for ``shmdomains events --event``: ``lifecycle`` for all of libvirt's."""
        return _NAMES.get(self, "lifecycle")


_NAMES = {
    EventType.HOLDER_DIED: "holder-died",
    EventType.AUTOSTART: "autostart",
    EventType.JOB_STARTED: "job",
    EventType.JOB_ENDED: "job",
}

EVENT_NAMES = ("lifecycle", *dict.fromkeys(_NAMES.values()))
"""All that `EventType.event` can be."""


def _words(name: str) -> str:
    return name.capitalize().replace("_", " ")


class Detail(enum.IntEnum):
    """Base of the details; each type of event has its own, which start at 0."""

    @property
    def words(self) -> str:
        """As ``virsh event`` shows it: ``Booted``, ``I/O Error``..."""
        return _DETAIL_WORDS.get((type(self), int(self)), _words(self.name))


class DefinedDetail(Detail):
    """How a definition came (``virDomainEventDefinedDetailType``).

    >>> DefinedDetail.RENAMED.words
    'Renamed'
    """

    ADDED = 0
    UPDATED = 1
    RENAMED = 2
    FROM_SNAPSHOT = 3


class UndefinedDetail(Detail):
    """How it went (``virDomainEventUndefinedDetailType``). A renamed domain has this event with its
    old name, and then `DefinedDetail.RENAMED` with the new one.

    >>> UndefinedDetail.REMOVED.words
    'Removed'
    """

    REMOVED = 0
    RENAMED = 1


class StartedDetail(Detail):
    """How a domain was started (``virDomainEventStartedDetailType``).

    >>> StartedDetail.BOOTED.words
    'Booted'
    """

    BOOTED = 0
    MIGRATED = 1
    RESTORED = 2
    FROM_SNAPSHOT = 3
    WAKEUP = 4
    RECREATED = 5


class SuspendedDetail(Detail):
    """Why it was paused (``virDomainEventSuspendedDetailType``).

    >>> SuspendedDetail.IOERROR.words
    'I/O Error'
    """

    PAUSED = 0
    MIGRATED = 1
    IOERROR = 2
    WATCHDOG = 3
    RESTORED = 4
    FROM_SNAPSHOT = 5
    API_ERROR = 6
    POSTCOPY = 7
    POSTCOPY_FAILED = 8


class ResumedDetail(Detail):
    """Why it goes on (``virDomainEventResumedDetailType``).

    >>> ResumedDetail.UNPAUSED.words
    'Unpaused'
    """

    UNPAUSED = 0
    MIGRATED = 1
    FROM_SNAPSHOT = 2
    POSTCOPY = 3
    POSTCOPY_FAILED = 4


class StoppedDetail(Detail):
    """Why it ended (``virDomainEventStoppedDetailType``).

    >>> StoppedDetail.FROM_SNAPSHOT.words
    'Snapshot'
    """

    SHUTDOWN = 0
    DESTROYED = 1
    CRASHED = 2
    MIGRATED = 3
    SAVED = 4
    FAILED = 5
    FROM_SNAPSHOT = 6
    RECREATED = 7


class ShutdownDetail(Detail):
    """Who had it shut down (``virDomainEventShutdownDetailType``).

    >>> ShutdownDetail.FINISHED.words
    'Finished'
    """

    FINISHED = 0
    GUEST = 1
    HOST = 2


class PMSuspendedDetail(Detail):
    """Where its guest was suspended to (``virDomainEventPMSuspendedDetailType``).

    >>> PMSuspendedDetail.MEMORY.words
    'Memory'
    """

    MEMORY = 0
    DISK = 1


class CrashedDetail(Detail):
    """How it crashed (``virDomainEventCrashedDetailType``).

    >>> CrashedDetail.PANICKED.words
    'Panicked'
    """

    PANICKED = 0
    CRASHLOADED = 1


class AutostartDetail(Detail):
    """Whether the domain starts with the host from now on.

    >>> AutostartDetail.ENABLED.words
    'Enabled'
    """

    DISABLED = 0
    ENABLED = 1


DETAILS: dict[EventType, type[enum.IntEnum]] = {
    EventType.DEFINED: DefinedDetail,
    EventType.UNDEFINED: UndefinedDetail,
    EventType.STARTED: StartedDetail,
    EventType.SUSPENDED: SuspendedDetail,
    EventType.RESUMED: ResumedDetail,
    EventType.STOPPED: StoppedDetail,
    EventType.SHUTDOWN: ShutdownDetail,
    EventType.PMSUSPENDED: PMSuspendedDetail,
    EventType.CRASHED: CrashedDetail,
    EventType.AUTOSTART: AutostartDetail,
    EventType.JOB_STARTED: Job,
    EventType.JOB_ENDED: Job,
}
"""The enum of details for each type that has any."""

_DETAIL_WORDS: dict[tuple[type, int], str] = {
    (DefinedDetail, DefinedDetail.FROM_SNAPSHOT): "Snapshot",
    (StartedDetail, StartedDetail.FROM_SNAPSHOT): "Snapshot",
    (StartedDetail, StartedDetail.WAKEUP): "Event wakeup",
    (StartedDetail, StartedDetail.RECREATED): "Recreation",
    (SuspendedDetail, SuspendedDetail.IOERROR): "I/O Error",
    (SuspendedDetail, SuspendedDetail.FROM_SNAPSHOT): "Snapshot",
    (SuspendedDetail, SuspendedDetail.API_ERROR): "API error",
    (SuspendedDetail, SuspendedDetail.POSTCOPY): "Post-copy",
    (SuspendedDetail, SuspendedDetail.POSTCOPY_FAILED): "Post-copy Error",
    (ResumedDetail, ResumedDetail.FROM_SNAPSHOT): "Snapshot",
    (ResumedDetail, ResumedDetail.POSTCOPY): "Post-copy",
    (ResumedDetail, ResumedDetail.POSTCOPY_FAILED): "Post-copy Error",
    (StoppedDetail, StoppedDetail.FROM_SNAPSHOT): "Snapshot",
    (StoppedDetail, StoppedDetail.RECREATED): "Recreation",
    (ShutdownDetail, ShutdownDetail.GUEST): "Finished after guest request",
    (ShutdownDetail, ShutdownDetail.HOST): "Finished after host request",
}


def detail_of(type: EventType, detail: int) -> int:
    """Return the member of the type's enum of details, or an unknown number as it is.

    >>> detail_of(EventType.STOPPED, 1), detail_of(EventType.STOPPED, 900)
    (<StoppedDetail.DESTROYED: 1>, 900)
    """
    details = DETAILS.get(type)
    if details is None:
        return detail
    try:
        return details(detail)
    except ValueError:
        return detail


class DomainEvent(msgspec.Struct, frozen=True):
    """Something that happened to a domain: the commit that did it is done.

    `number` counts the events of the list from 1 on; ``watch(since=number)`` goes on after it.
    `time`: seconds since the epoch. `detail`: a member of the type's enum (`DETAILS`). `name`: of
    the moment right after it, except for `UndefinedDetail.RENAMED`. `id`: the one that the domain
    got, has, or, if this ended it, had; -1 if it is inactive. `holder`: who died, of
    `EventType.HOLDER_DIED` only.

    >>> DomainEvent(7, 0.0, EventType.STARTED, StartedDetail.BOOTED, UUID(int=1), "web1", 3).words
    'Started Booted'
    """

    number: int
    time: float
    type: EventType
    detail: int
    uuid: UUID
    name: str
    id: int
    holder: LockHolder | None = None

    @property
    def words(self) -> str:
        """Type and detail as ``virsh event`` shows them."""
        if self.holder is not None:
            return f"{self.type.words} {self.holder.who}"
        return f"{self.type.words} {self.detail_words}".rstrip()

    @property
    def detail_words(self) -> str:
        """The detail alone; empty if this type has none."""
        if self.type not in DETAILS:
            return ""
        return getattr(self.detail, "words", "unknown")

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for ``json.dumps``; `id` ``None`` if inactive.

        >>> saved = (EventType.STOPPED, StoppedDetail.SAVED)
        >>> event = DomainEvent(7, 0.5, *saved, UUID(int=1), "web1", 3)
        >>> event.to_dict()["type"], event.to_dict()["detail"]
        ('stopped', 'saved')
        """
        found: dict[str, Any] = {
            "number": self.number,
            "time": self.time,
            "event": self.type.event,
            "type": _plain(self.type),
            "detail": _plain(self.detail) if self.type in DETAILS else None,
            "uuid": str(self.uuid),
            "name": self.name,
            "id": None if self.id == -1 else self.id,
        }
        if self.holder is not None:
            found["holder"] = msgspec.structs.asdict(self.holder)
        return found


def _plain(value: int) -> str | int:
    return value.name.lower().replace("_", " ") if isinstance(value, enum.Enum) else value


class EventsMissed(msgspec.Struct, frozen=True):
    """`count` events are lost to this reader: it was too slow, or there was no memory for them.
    `number` is that of the last one; ``watch(since=number)`` goes on after it.

    >>> EventsMissed(count=3, number=10).number
    10
    """

    count: int
    number: int

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for ``json.dumps``.

        >>> EventsMissed(3, 10).to_dict()
        {'missed': 3, 'number': 10}
        """
        return {"missed": self.count, "number": self.number}
