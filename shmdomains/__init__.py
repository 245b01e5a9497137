"""shmdomains: one list of domains for all worker processes of a VM manager.

The list lives in shared memory and follows libvirt's `virDomainObjList`; each domain has its own
lock. It survives the death of any worker at any instruction.

    from shmdomains import DomainList

    doms = DomainList.open("agent")          # create, or attach if it exists
    doms.define(xml)
    with doms.get("web1", timeout=5) as dom:  # locked, and committed at the end of the block
        dom.data = {"vnc": 5901}
    doms.peek("web1").state                   # reading takes no lock

Where to look: `help(shmdomains.DomainList)` has every operation, `help(shmdomains.Domain)` what a
locked domain can do, `shmdomains.errors` what is raised. `shmdomains.open` takes a URL, also of a
list on PostgreSQL (and stands in no ``import *``: it would hide Python's own). `shmdomains.drivers`
run virtual machines; `shmdomains.aio` and `shmdomains.green` are for tasks, `shmdomains.metrics`
for Prometheus, `shmdomains.table` for columns, `shmdomains.libvirts` for a libvirt. On the command
line: ``shmdomains --help``.
"""

import sys as _sys

if not _sys.platform.startswith("linux"):
    raise ImportError("shmdomains runs on Linux with the GNU C library only")

from .config import LoadFailure, LoadReport
from .errors import (
    AlreadyLocked,
    Busy,
    ConfigError,
    ContractError,
    DefinitionError,
    DescriptorLost,
    DomainActive,
    DomainBusy,
    DomainExists,
    DomainInactive,
    DomainLocked,
    DomainNotFound,
    DomainNotLocked,
    DomainRemoved,
    DomainStateError,
    DomainTransient,
    DriverError,
    InDoubt,
    InvalidName,
    JobTimeout,
    ListClosed,
    ListNotLocked,
    LockKindMismatch,
    LockLost,
    LockOrder,
    LockTimeout,
    MutexNotLocked,
    NoEvents,
    NotOwner,
    SegmentCorrupt,
    SegmentError,
    SegmentExists,
    SegmentFull,
    SegmentInUse,
    SegmentMismatch,
    SegmentNotFound,
    SegmentPoisoned,
    SegmentRefused,
    ShmDomainsError,
    TooManyLocks,
    TooManyMutexes,
    Unavailable,
    UncommittedChanges,
    WaitTimeout,
    WrongList,
)
from .events import (
    AutostartDetail,
    CrashedDetail,
    DefinedDetail,
    DomainEvent,
    EventsMissed,
    EventType,
    PMSuspendedDetail,
    ResumedDetail,
    ShutdownDetail,
    StartedDetail,
    StoppedDetail,
    SuspendedDetail,
    UndefinedDetail,
)
from .holder import LockHolder
from .job import Job, JobInfo
from .lazy import preload
from .memory.domain import Domain
from .memory.domain_list import (
    AttachedProcess,
    DomainList,
    ListInfo,
    LockedDomains,
    Mutex,
    unlink,
)
from .memory.held import LockInfo, Statistics
from .memory.invariants import INVARIANTS, CheckReport, HeldLock, RecoverReport, Repair
from .memory.segment_file import SegmentFile, segments
from .opening import AnyDomainList
from .opening import open as open
from .rules.elect import Election
from .rules.info import DomainInfo
from .rules.jobs import DomainJob
from .rules.watch import Watch
from .rules.work import Unfinished
from .states import (
    BlockedReason,
    CrashedReason,
    DomainState,
    NostateReason,
    PausedReason,
    PMSuspendedReason,
    RunningReason,
    ShutdownReason,
    ShutoffReason,
)
from .xml.definition import DomainDef, OSDef
from .xml.devices import ConsoleDef, DiskDef, GraphicsDef, HostdevDef, InterfaceDef

if not getattr(_sys, "_is_gil_enabled", lambda: True)():
    # Importing the core turns the GIL on, unless it was forced off.
    raise ImportError(
        "shmdomains needs the global interpreter lock, which guards what the core keeps of this "
        "process: run Python without -X gil=0 and without PYTHON_GIL=0"
    )

__version__ = "0.1.0"

__all__ = [
    "INVARIANTS",
    "AlreadyLocked",
    "AnyDomainList",
    "AttachedProcess",
    "AutostartDetail",
    "BlockedReason",
    "Busy",
    "CheckReport",
    "ConfigError",
    "ConsoleDef",
    "ContractError",
    "CrashedDetail",
    "CrashedReason",
    "DefinedDetail",
    "DefinitionError",
    "DescriptorLost",
    "DiskDef",
    "Domain",
    "DomainActive",
    "DomainBusy",
    "DomainDef",
    "DomainEvent",
    "DomainExists",
    "DomainInactive",
    "DomainInfo",
    "DomainJob",
    "DomainList",
    "DomainLocked",
    "DomainNotFound",
    "DomainNotLocked",
    "DomainRemoved",
    "DomainState",
    "DomainStateError",
    "DomainTransient",
    "DriverError",
    "Election",
    "EventType",
    "EventsMissed",
    "GraphicsDef",
    "HeldLock",
    "HostdevDef",
    "InDoubt",
    "InterfaceDef",
    "InvalidName",
    "Job",
    "JobInfo",
    "JobTimeout",
    "ListClosed",
    "ListInfo",
    "ListNotLocked",
    "LoadFailure",
    "LoadReport",
    "LockHolder",
    "LockInfo",
    "LockKindMismatch",
    "LockLost",
    "LockOrder",
    "LockTimeout",
    "LockedDomains",
    "Mutex",
    "MutexNotLocked",
    "NoEvents",
    "NostateReason",
    "NotOwner",
    "OSDef",
    "PMSuspendedDetail",
    "PMSuspendedReason",
    "PausedReason",
    "RecoverReport",
    "Repair",
    "ResumedDetail",
    "RunningReason",
    "SegmentCorrupt",
    "SegmentError",
    "SegmentExists",
    "SegmentFile",
    "SegmentFull",
    "SegmentInUse",
    "SegmentMismatch",
    "SegmentNotFound",
    "SegmentPoisoned",
    "SegmentRefused",
    "ShmDomainsError",
    "ShutdownDetail",
    "ShutdownReason",
    "ShutoffReason",
    "StartedDetail",
    "Statistics",
    "StoppedDetail",
    "SuspendedDetail",
    "TooManyLocks",
    "TooManyMutexes",
    "Unavailable",
    "UncommittedChanges",
    "UndefinedDetail",
    "Unfinished",
    "WaitTimeout",
    "Watch",
    "WrongList",
    "preload",
    "segments",
    "unlink",
]
