"""What is under way in a domain: a rule's step, a user's intention, jobs.

`Work` is one value of the record, beside the definition and the driver's data, and changes with
commits only. So what a worker was doing is there exactly as long as it is true: its last commit
says it, and no death can leave half of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ..config.change import ConfigDirs
from ..holder import LockHolder
from ..job import Job, JobInfo, kinds_of
from ..packing import pack
from .values import decode_data


class Caller(msgspec.Struct, frozen=True, array_like=True):
    """A thread that may outlive nobody's memory of it: numbers are reused, so `start` tells it from
    later ones. In clock ticks since boot; 0: not known."""

    pid: int
    tid: int
    start: int


class Step(msgspec.Struct, frozen=True, array_like=True):
    """What a rule has begun with the record and the files of these directories (`steps`)."""

    rule: str
    config_dir: bytes
    autostart_dir: bytes | None
    names: tuple[str, ...]
    """The names whose files it may have changed."""
    defines: bool
    """Whether the domain becomes persistent once its file is there."""

    @classmethod
    def of(cls, rule: str, dirs: ConfigDirs, *names: str, defines: bool = False) -> Step:
        """A step in these directories.

        >>> Step.of("rename", ConfigDirs(Path("/etc/vm")), "old", "new").names
        ('old', 'new')
        """
        config_dir, autostart_dir = dirs.config_dir, dirs.autostart_dir
        return cls(
            rule,
            os.fsencode(config_dir),
            None if autostart_dir is None else os.fsencode(autostart_dir),
            names,
            defines,
        )

    @property
    def dirs(self) -> ConfigDirs:
        """The directories."""
        autostart_dir = self.autostart_dir
        return ConfigDirs(
            Path(os.fsdecode(self.config_dir)),
            None if autostart_dir is None else Path(os.fsdecode(autostart_dir)),
        )


class Intended(msgspec.Struct, frozen=True, array_like=True):
    """What a user said it was going to do (`Domain.intend`)."""

    name: str
    data: bytes
    """MessagePack."""
    caller: Caller
    since: float
    """Seconds since the epoch."""


class Begun(msgspec.Struct, frozen=True, array_like=True):
    """A job that somebody began (`jobs`)."""

    operation: str
    kind: Job
    allow: int
    """`job.mask_of`; 0 for all but an async job."""
    caller: Caller
    command: str | None
    """The process's command line."""
    since: float
    """Seconds since the epoch."""
    why: str | None = None
    progress: bytes | None = None
    """MessagePack."""
    abort: bool = False
    """Somebody asks the holder to end it."""
    replaced: tuple[Begun, ...] = ()
    """Jobs of dead holders in whose place it came, the last one first; those have none."""

    def is_same(self, other: Begun) -> bool:
        """Whether it is the same job, however far it is."""
        mine = self.caller, self.kind, self.since
        return mine == (other.caller, other.kind, other.since)


class Work(msgspec.Struct, frozen=True, array_like=True):
    """All that is under way in one domain."""

    step: Step | None = None
    intended: Intended | None = None
    jobs: tuple[Begun, ...] = ()

    def encode(self) -> bytes:
        """As MessagePack."""
        return pack(self)

    def without_intention(self) -> Work | None:
        """What is under way once the user's intention is done."""
        return replaced(self, intended=None)

    @classmethod
    def decode(cls, blob: bytes) -> Work:
        """What `encode` made. Raises `ValueError` for anything else.

        >>> Work.decode(Work().encode())
        Work(step=None, intended=None, jobs=())
        """
        try:
            return msgspec.msgpack.decode(blob, type=cls)
        except msgspec.MsgspecError as exc:
            raise ValueError(f"not what is under way: {exc}") from None


def replaced(work: Work | None, **parts: Any) -> Work | None:
    """`work` with other parts; ``None`` if nothing is under way then.

    >>> replaced(Work(), step=None) is None
    True
    """
    changed = msgspec.structs.replace(work or Work(), **parts)
    return None if changed == Work() else changed


def job_info(begun: Begun, describe: Callable[[Caller], LockHolder]) -> JobInfo:
    """The job as its public value; `describe` looks up who holds it."""
    holder = describe(begun.caller)
    holder = msgspec.structs.replace(
        holder,
        held_for=max(time.time() - begun.since, 0.0),
        command=holder.command or begun.command,
    )
    return JobInfo(
        operation=begun.operation,
        kind=begun.kind,
        why=begun.why,
        allow=kinds_of(begun.allow) if begun.kind is Job.ASYNC else None,
        holder=holder,
        since=begun.since,
        progress=None if begun.progress is None else decode_data(begun.progress),
        abort_requested=begun.abort,
    )


class Unfinished(msgspec.Struct, frozen=True):
    """What somebody said it was going to do with a domain and did not end: its name, its data, who,
    and since when (seconds since the epoch). See `Domain.unfinished`.

    `holder.alive` tells a worker that died from one whose ``with`` block ended with an exception.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.get("web1") as dom:
    ...     dom.intend("start", {"id": 1})
    ...     raise RuntimeError("the hypervisor did not answer")
    Traceback (most recent call last):
        ...
    RuntimeError: the hypervisor did not answer
    >>> with doms.get("web1") as dom:
    ...     dom.unfinished.name, dict(dom.unfinished.data)
    ('start', {'id': 1})
    """

    name: str
    data: Any
    holder: LockHolder
    since: float
