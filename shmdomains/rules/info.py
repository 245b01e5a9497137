"""`DomainInfo`: the committed state of one domain at one moment, as a value.

Shared memory has a native class of its own, for lists of a million. Every other store, and
unpickling, makes this one. Both compare, hash and print alike, and ``isinstance(info, DomainInfo)``
holds for both.
"""

from __future__ import annotations

import enum
from abc import ABCMeta
from collections.abc import Callable
from typing import Any
from uuid import UUID

import msgspec

from ..errors import DefinitionError
from ..holder import LockHolder
from ..job import JobInfo
from ..packing import pack
from ..states import REASONS, DomainState
from ..xml.definition import DomainDef
from .values import decode_data, encode_data
from .work import Caller, Work, job_info

Describe = Callable[[Caller], LockHolder]

_FIELDS = ("id", "name", "uuid", "state", "reason", "persistent", "autostart", "pid")


class DomainInfo(metaclass=ABCMeta):
    """The committed state of one domain at one moment. Immutable; reading it takes no lock.

    Comes from `DomainList.peek`, `snapshot`, `list` and iteration. Each is consistent in itself;
    those of one listing may be of different moments. Compared by content, and picklable.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> info.name, info.state.words, info.is_active, info.to_dict()["id"]
    ('web1', 'shut off', False, None)
    """

    __slots__ = ("_blobs", "_describe", "_started", "_work", "host", *_FIELDS)

    id: int
    """The id of the running domain, -1 when it is inactive."""
    name: str
    uuid: UUID
    state: DomainState
    reason: int
    """Why it is in this state: a member of the state's reason enumeration, or a driver's own."""
    persistent: bool
    """Whether the domain outlives its deactivation."""
    autostart: bool
    """Whether the domain starts with the host."""
    pid: int | None
    """The hypervisor's process id."""
    host: str | None
    """The host where the domain runs, None if it is inactive; in shared memory always this host.
    Not compared: it changes with the id only."""
    _blobs: tuple[DomainDef, DomainDef | None, Any] | None
    _work: Work | None
    _describe: Describe | None
    _started: int

    def __init__(
        self,
        *,
        id: int,
        name: str,
        uuid: UUID,
        state: DomainState,
        reason: int,
        persistent: bool,
        autostart: bool,
        pid: int | None,
        blobs: tuple[DomainDef, DomainDef | None, Any] | None,
        work: Work | None = None,
        started: int = 0,
        describe: Describe | None = None,
        host: str | None = None,
    ) -> None:
        """`blobs`: definition, next definition and data, or ``None`` if taken without them. Of
        `work` only the jobs are part of the value, and `describe` says who holds them; the rest and
        `started` (of the process) are for a store's rules."""
        values = (id, name, uuid, state, reason_of(state, reason), persistent, autostart, pid)
        for field, value in zip(_FIELDS, values, strict=True):
            object.__setattr__(self, field, value)
        object.__setattr__(self, "_blobs", blobs)
        object.__setattr__(self, "_work", work)
        object.__setattr__(self, "_started", started)
        object.__setattr__(self, "_describe", describe)
        object.__setattr__(self, "host", host)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a DomainInfo cannot be changed: it is what was committed then")

    __delattr__ = None  # type: ignore[assignment]

    @property
    def is_active(self) -> bool:
        """Whether it runs (``id != -1``; libvirt's virDomainObjIsActive)."""
        return self.id != -1

    @property
    def definition(self) -> DomainDef:
        """The live definition."""
        return self._taken()[0]

    @property
    def next_definition(self) -> DomainDef | None:
        """The definition from the next start on (libvirt's newDef), or None."""
        return self._taken()[1]

    @property
    def data(self) -> Any:
        """The driver's own data, or None."""
        return self._taken()[2]

    @property
    def jobs(self) -> tuple[JobInfo, ...]:
        """The jobs on the domain: one async job and one other at most. Whether their holders live
        is looked up now; of an unpickled info, it is what was found when it was pickled."""
        self._taken()
        return jobs_of(self._work, self._describe)

    def _taken(self) -> tuple[DomainDef, DomainDef | None, Any]:
        if self._blobs is None:
            raise AttributeError(TAKEN_WITHOUT)
        return self._blobs

    def _without_blobs(self) -> DomainInfo:
        values = {field: getattr(self, field) for field in _FIELDS}
        return DomainInfo(**values, host=self.host, blobs=None)

    def __eq__(self, other: object) -> Any:
        return equal(self, other)

    def __hash__(self) -> int:
        return hash_of(self)

    def __reduce__(self) -> tuple[Callable[..., DomainInfo], tuple[Any, ...]]:
        return reduced(self)

    def __repr__(self) -> str:
        return shown(self)

    def to_dict(self) -> dict[str, Any]:
        """See `to_dict` of this module."""
        return to_dict(self)


TAKEN_WITHOUT = "this DomainInfo was taken with definitions=False; take it with definitions=True"


def reason_of(state: DomainState, reason: int) -> int:
    """Return the member of the state's reason enumeration, or a driver's own number as it is.

    >>> reason_of(DomainState.RUNNING, 1), reason_of(DomainState.RUNNING, 900)
    (<RunningReason.BOOTED: 1>, 900)
    """
    try:
        return REASONS[state](reason)
    except ValueError:
        return reason


# --- what both classes share ----------------------------------------------------------------


def equal(info: DomainInfo, other: object) -> Any:
    """Whether all values are equal; `NotImplemented` for anything but a `DomainInfo`."""
    if not isinstance(other, DomainInfo):
        return NotImplemented
    if _plain(info) != _plain(other) or _blobs(info) != _blobs(other):
        return False
    return _begun(info) == _begun(other)


def _plain(info: DomainInfo) -> tuple[Any, ...]:
    return tuple(getattr(info, field) for field in _FIELDS)


def _blobs(info: DomainInfo) -> tuple[DomainDef, DomainDef | None, Any] | None:
    try:
        return info.definition, info.next_definition, info.data
    except AttributeError:
        return None


def _begun(info: DomainInfo) -> tuple[Any, ...]:
    """The jobs as they are in the record."""
    try:
        work = info._work
    except AttributeError:
        return ()
    return () if work is None else work.jobs


def jobs_of(work: Work | None, describe: Describe | None) -> tuple[JobInfo, ...]:
    """`DomainInfo.jobs`."""
    if work is None or describe is None:
        return ()
    return tuple(job_info(job, describe) for job in work.jobs)


def hash_of(info: DomainInfo) -> int:
    """Leaves out definitions and data: data may be unhashable."""
    return hash(_plain(info))


def shown(info: DomainInfo) -> str:
    """The info's `repr`."""
    return f"<DomainInfo {info.name!r} uuid={info.uuid} id={info.id} state={info.state.name}>"


def to_dict(info: DomainInfo) -> dict[str, Any]:
    """Return a dict for ``json.dumps``: state and reason in words, `id` None if inactive.

    Definitions are XML; they, `data` and `jobs` are there if the info was taken with them.
    ``json.dumps`` fails if `data` or the progress of a job holds what JSON cannot express:
    MessagePack has bytes, JSON does not.
    """
    reason = info.reason
    why = reason.name.lower().replace("_", " ") if isinstance(reason, enum.Enum) else reason
    found: dict[str, Any] = {
        "id": info.id if info.is_active else None,
        "name": info.name,
        "uuid": str(info.uuid),
        "state": info.state.words,
        "reason": why,
        "persistent": info.persistent,
        "autostart": info.autostart,
        "pid": info.pid,
        "host": info.host,
    }
    blobs = _blobs(info)
    if blobs is not None:
        definition, successor, data = blobs
        found["definition"] = definition.to_xml()
        found["next_definition"] = None if successor is None else successor.to_xml()
        found["data"] = _json_value(data)
        found["jobs"] = [job_to_dict(job) for job in info.jobs]
    return found


def job_to_dict(job: JobInfo) -> dict[str, Any]:
    """A job as ``json.dumps`` takes it: kinds in words.

    >>> from shmdomains import Job
    >>> holder = LockHolder(7, 7, None, 2.5, True, "backup-agent")
    >>> info = JobInfo("backup", Job.MODIFY, None, None, holder, 1.5e9, {"percent": 5}, False)
    >>> found = job_to_dict(info)
    >>> found["kind"], found["progress"], found["holder"]["command"]
    ('modify', {'percent': 5}, 'backup-agent')
    """
    return {
        "operation": job.operation,
        "kind": job.kind.words,
        "why": job.why,
        "allow": None if job.allow is None else [kind.words for kind in sorted(job.allow)],
        "holder": msgspec.structs.asdict(job.holder),
        "since": job.since,
        "progress": _json_value(job.progress),
        "abort_requested": job.abort_requested,
    }


def _json_value(value: Any) -> Any:
    if hasattr(value, "items"):
        return {key: _json_value(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return [_json_value(one) for one in value]
    return value


def reduced(info: DomainInfo) -> tuple[Callable[..., DomainInfo], tuple[Any, ...]]:
    """The pickled form: plain values, each validated when it is read."""
    blobs = _blobs(info)
    if blobs is not None:
        definition, successor, data = blobs
        packed = (
            definition.encode(),
            None if successor is None else successor.encode(),
            None if data is None else encode_data(data),
        )
    id, name, uuid, state, reason, *rest = _plain(info)
    plain = (id, name, uuid.bytes, int(state), int(reason), *rest)
    begun = _begun(info)
    jobs = (Work(jobs=begun).encode(), pack([job.holder for job in info.jobs])) if begun else None
    return _restored, (plain, None if blobs is None else packed, jobs, info.host)


def _restored(
    plain: tuple[Any, ...],
    blobs: tuple[Any, ...] | None,
    jobs: tuple[bytes, bytes] | None = None,
    host: str | None = None,
) -> DomainInfo:
    try:
        id, name, uuid, state, reason, persistent, autostart, pid = plain
        taken = None
        if blobs is not None:
            definition, successor, data = blobs
            taken = (
                DomainDef.decode(definition),
                None if successor is None else DomainDef.decode(successor),
                None if data is None else decode_data(data),
            )
        work = describe = None
        if jobs is not None:
            work = Work.decode(jobs[0])
            holders = msgspec.msgpack.decode(jobs[1], type=list[LockHolder])
            known = {job.caller: holder for job, holder in zip(work.jobs, holders, strict=True)}
            describe = known.__getitem__
        return DomainInfo(
            id=int(id),
            name=str(name),
            uuid=UUID(bytes=uuid),
            state=DomainState(state),
            reason=int(reason),
            persistent=bool(persistent),
            autostart=bool(autostart),
            pid=None if pid is None else int(pid),
            blobs=taken,
            work=work,
            describe=describe,
            host=None if host is None else str(host),
        )
    except (TypeError, ValueError, msgspec.MsgspecError) as exc:
        raise DefinitionError(f"this is no pickled DomainInfo: {exc}") from None
