"""A domain's states, and the reasons for them.

The numbers are libvirt's (``virDomainState`` and the ``virDomain*Reason`` enums of
``libvirt-domain.h``), so that a driver can pass them through. They are stored in shared memory: a
number never changes its meaning.
"""

from __future__ import annotations

import enum


class DomainState(enum.IntEnum):
    """What a domain is doing (``virDomainState``).

    >>> DomainState.SHUTOFF.value, DomainState.SHUTOFF.words
    (5, 'shut off')
    """

    NOSTATE = 0
    RUNNING = 1
    BLOCKED = 2
    PAUSED = 3
    SHUTDOWN = 4
    SHUTOFF = 5
    CRASHED = 6
    PMSUSPENDED = 7

    @property
    def words(self) -> str:
        """The state as ``virsh list`` shows it: ``running``, ``idle``, ``in shutdown``..."""
        return _WORDS[self]

    @classmethod
    def parse(cls, text: str) -> DomainState:
        """Return the state with these words or this name, in any case; else `ValueError`.

        >>> DomainState.parse("Shut off") is DomainState.parse("SHUTOFF") is DomainState.SHUTOFF
        True
        """
        wanted = text.strip().casefold()
        for state in cls:
            if wanted in (state.words, state.name.casefold()):
                return state
        known = ", ".join(repr(state.words) for state in cls)
        raise ValueError(f"{text!r} is no state of a domain: {known}")


_WORDS = (
    "no state",
    "running",
    "idle",
    "paused",
    "in shutdown",
    "shut off",
    "crashed",
    "pmsuspended",
)


class NostateReason(enum.IntEnum):
    """Why a domain has no state (``virDomainNostateReason``).

    >>> NostateReason.UNKNOWN.value
    0
    """

    UNKNOWN = 0


class RunningReason(enum.IntEnum):
    """Why a domain is running (``virDomainRunningReason``).

    >>> RunningReason.BOOTED
    <RunningReason.BOOTED: 1>
    """

    UNKNOWN = 0
    BOOTED = 1
    MIGRATED = 2
    RESTORED = 3
    FROM_SNAPSHOT = 4
    UNPAUSED = 5
    MIGRATION_CANCELED = 6
    SAVE_CANCELED = 7
    WAKEUP = 8
    CRASHED = 9
    POSTCOPY = 10
    POSTCOPY_FAILED = 11


class BlockedReason(enum.IntEnum):
    """Why a domain is blocked (``virDomainBlockedReason``).

    >>> BlockedReason.UNKNOWN.value
    0
    """

    UNKNOWN = 0


class PausedReason(enum.IntEnum):
    """Why a domain is paused (``virDomainPausedReason``).

    >>> PausedReason(5)
    <PausedReason.IOERROR: 5>
    """

    UNKNOWN = 0
    USER = 1
    MIGRATION = 2
    SAVE = 3
    DUMP = 4
    IOERROR = 5
    WATCHDOG = 6
    FROM_SNAPSHOT = 7
    SHUTTING_DOWN = 8
    SNAPSHOT = 9
    CRASHED = 10
    STARTING_UP = 11
    POSTCOPY = 12
    POSTCOPY_FAILED = 13
    API_ERROR = 14


class ShutdownReason(enum.IntEnum):
    """Why a domain is being shut down (``virDomainShutdownReason``).

    >>> ShutdownReason(1)
    <ShutdownReason.USER: 1>
    """

    UNKNOWN = 0
    USER = 1


class ShutoffReason(enum.IntEnum):
    """Why a domain is off (``virDomainShutoffReason``).

    >>> ShutoffReason(2)
    <ShutoffReason.DESTROYED: 2>
    """

    UNKNOWN = 0
    SHUTDOWN = 1
    DESTROYED = 2
    CRASHED = 3
    MIGRATED = 4
    SAVED = 5
    FAILED = 6
    FROM_SNAPSHOT = 7
    DAEMON = 8


class CrashedReason(enum.IntEnum):
    """Why a domain has crashed (``virDomainCrashedReason``).

    >>> CrashedReason(1)
    <CrashedReason.PANICKED: 1>
    """

    UNKNOWN = 0
    PANICKED = 1


class PMSuspendedReason(enum.IntEnum):
    """Why a domain is suspended by its guest (``virDomainPMSuspendedReason``).

    >>> PMSuspendedReason.UNKNOWN.value
    0
    """

    UNKNOWN = 0


REASONS: tuple[type[enum.IntEnum], ...] = (
    NostateReason,
    RunningReason,
    BlockedReason,
    PausedReason,
    ShutdownReason,
    ShutoffReason,
    CrashedReason,
    PMSuspendedReason,
)
"""The enum of reasons for each state, by the state's number."""
