"""One domain: libvirt's rules about it, whatever store holds its record (virDomainObj).

`DomainRules` are activation and the two definitions, written against `DomainBase`, beside
`DomainWaitRules`. Each store mixes them into its own handles.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import DomainActive, DomainInactive
from ..job import Job, JobInfo
from ..states import DomainState, RunningReason, ShutoffReason
from . import jobs
from .tasks import ask
from .values import (
    added,
    checked_host,
    checked_pid,
    checked_reason,
    checked_state,
    decode_data,
    encode_data,
)
from .wait import DomainWaitRules
from .work import Intended, Unfinished, replaced

if TYPE_CHECKING:
    from typing_extensions import Self


class DomainRules(DomainWaitRules):
    """Operations on a locked domain. Every method needs the domain's lock, except those about
    jobs."""

    __slots__ = ()

    async def __aenter__(self) -> Self:
        """As ``with``, in a task: waits for the lock without blocking (`shmdomains.aio`)."""
        if not self.is_locked:
            await ask()(self.lock)
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        self.__exit__(kind, value, traceback)

    def set_state(self, state: DomainState, reason: int = 0) -> None:
        """Set state and reason together; part of the transaction.

        Raises `DomainNotLocked`. Source: virDomainObjSetState.
        """
        state, reason = checked_state(state), checked_reason(reason)
        self.state = state
        self.reason = reason

    def activate(
        self,
        pid: int | None = None,
        *,
        state: DomainState = DomainState.RUNNING,
        reason: int = RunningReason.BOOTED,
        host: str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Make the domain active; returns its id, which is never used for another domain.

        `pid` is the hypervisor's process, if there is one; `host` is where it runs, this machine if
        it is left out: a list in shared memory has no other. Commit `activate` first, then start
        the process, then set `pid`: otherwise a worker that is killed in between leaves a process
        that no record mentions. `intend` tells the next holder what was under way. Part of the
        transaction: others see it after `commit()` or `unlock()`; a rollback wastes the id. Raises
        `DomainActive`, `DomainNotLocked`, `ValueError` for a value that the list cannot have,
        `SegmentFull` when the ids are used up, and `LockTimeout` when the id lock was not free
        within `timeout` seconds.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> info = doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                    "<os><type>hvm</type></os></domain>")
        >>> with doms.get(name="web1") as dom:
        ...     id = dom.activate(pid=4711)
        >>> doms.peek(id=id).name
        'web1'
        """
        if self.is_active:
            raise DomainActive(f"domain '{self.name}' is already running with id {self.id}")
        # Check everything before changing anything.
        state, reason, pid = checked_state(state), checked_reason(reason), checked_pid(pid)
        id = self._take_id(timeout, checked_host(host))
        self.pid = pid
        self.set_state(state, reason)
        return id

    def deactivate(self, reason: int = ShutoffReason.UNKNOWN) -> None:
        """Make the domain inactive: id -1, no pid or host, state SHUTOFF; `next_definition` becomes
        live.

        Part of the transaction. A transient domain stays until the driver removes it
        (`DomainList.remove_inactive`), as in the patch. Raises `DomainInactive`, `DomainNotLocked`.
        """
        if not self.is_active:
            raise DomainInactive(f"domain '{self.name}' is not running")
        reason = checked_reason(reason)
        self._drop_id()
        self.pid = None
        self.set_state(DomainState.SHUTOFF, reason)
        successor = self.next_definition
        if successor is not None:
            self.definition = successor
            self.next_definition = None

    def add(self, field: str, by: int = 1) -> int:
        """Add to a named integer of `data`, which is a mapping; returns the sum. Part of the
        transaction. `DomainList.add` does it in one call.

        No data, or no such entry, counts as 0. Raises `DomainNotLocked`; `TypeError` if the data is
        no mapping or the entry no integer (a bool is none); `OverflowError` for a sum outside of
        -2^63 to 2^64 - 1. After an error the data is as it was.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> info = doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                    "<os><type>hvm</type></os></domain>")
        >>> with doms.get("web1") as dom:
        ...     dom.add("requests"), dom.add("requests", 41), dict(dom.data)
        (1, 42, {'requests': 42})
        """
        data, value = added(self.data, field, by)
        self.data = data
        return value

    def intend(self, name: str | None, data: Any = None, timeout: float | None = None) -> None:
        """Say what you are about to do, so that whoever gets the domain after your death knows it.

        Committed at once, and so is every other change that waits. It stays over `commit()`, and
        ends with the clean `unlock()` or end of the ``with`` block, in the same commit as the last
        changes, or with ``intend(None)``. A death leaves it, and so does an exception in the
        ``with`` block or a failing commit: then it is `unfinished` for whoever locks the domain
        next. A domain has one; another one replaces it. `data` is MessagePack, as `Domain.data`.

        Raises `DomainNotLocked`, `SegmentFull`, `LockTimeout`, and what `Domain.data` raises for a
        value that cannot be packed.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> info = doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                    "<os><type>hvm</type></os></domain>")
        >>> with doms.get("web1") as dom:
        ...     dom.intend("start", {"socket": "/run/web1.sock"})
        ...     raise OSError("cannot start it")
        Traceback (most recent call last):
            ...
        OSError: cannot start it
        >>> with doms.get("web1") as dom:
        ...     dom.unfinished.name, dom.unfinished.data["socket"]
        ...     dom.intend(None)
        ...     dom.unfinished is None
        ('start', '/run/web1.sock')
        True
        """
        work = self._work
        intended = None
        if name is not None:
            if not isinstance(name, str) or not name:
                raise TypeError(f"an intention is named by a str, not {name!r}")
            intended = Intended(name, encode_data(data), self._caller(), time.time())
        self._work = replaced(work, intended=intended)
        self.commit(timeout)
        self._intends = name is not None

    @property
    def unfinished(self) -> Unfinished | None:
        """What an earlier holder said it was going to do (`intend`) and did not end, or None.

        It stays until a holder ends it with ``intend(None)`` or replaces it with an intention of
        its own. What the present holder intends is not unfinished. Raises `DomainNotLocked`.
        """
        work = self._work
        intended = None if work is None else work.intended
        if intended is None or self._intends:
            return None
        return Unfinished(
            intended.name,
            decode_data(intended.data),
            self._describe(intended.caller),
            intended.since,
        )

    def job(
        self,
        operation: str,
        kind: Job = Job.MODIFY,
        timeout: float | None = None,
        *,
        allow: Iterable[Job] | None = None,
        why: str | None = None,
    ) -> jobs.DomainJob:
        """A job, for a ``with`` block: long work that excludes other long work, without a lock
        (virDomainObjBeginJob).

        It begins with the block, once no job of another thread excludes it (`shmdomains.job` says
        what may run beside what), and ends with the block or with this thread. `operation` says
        what is done, `why` is for people. `allow`, for an async job only: the normal kinds that may
        run beside it; default query, destroy and abort; destroy always may.

        Works with any handle. If this thread has the domain locked, its lock is put down for the
        block and the wait, and taken up again afterwards, also if the job did not begin; others may
        change the domain meanwhile. In the block, lock the domain to change it: ``with dom: ...``.
        Hold no other domain when the block ends: the end needs this one's lock.

        Whoever waits sleeps until the domain changes; after the death of a job's holder it goes on
        within a slice (50 ms), and `DomainJob.previous_owner_died` says what is to be cleaned up.

        Raises, when the block begins: `JobTimeout`, which names the job that was in the way and its
        holder; `AlreadyLocked` (this thread's own job is), `LockOrder` (this thread holds the list
        lock, another domain, or another job and gives no timeout), `UncommittedChanges`, `NotOwner`
        (nested in no async job of this thread), `DomainRemoved`, `SegmentFull`, and `LockTimeout`
        if the domain's lock was not free in time.

        >>> from shmdomains import DomainList, Job
        >>> doms = DomainList()
        >>> info = doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                    "<os><type>hvm</type></os></domain>")
        >>> with doms.get("web1") as dom:
        ...     with dom.job("backup", Job.ASYNC, timeout=30) as job:
        ...         job.progress({"data_processed": 1 << 20})
        ...         dom.is_locked, doms.peek("web1").jobs[0].progress["data_processed"]
        ...     dom.is_locked, dom.jobs
        (False, 1048576)
        (True, ())
        """
        return jobs.DomainJob(self, operation, kind, timeout, allow, why)

    @property
    def jobs(self) -> tuple[JobInfo, ...]:
        """The jobs on the domain: one async job and one other at most, also those of dead holders
        that no other job has replaced. Needs no lock. Raises `DomainRemoved`."""
        return jobs.jobs_on(self)

    def abort_job(self, timeout: float | None = None) -> None:
        """Ask the holder of the async job, or else of the other one, to end it
        (virDomainAbortJob): `DomainJob.abort_requested` tells it.

        Locks the domain for a moment, unless this thread has it locked. Raises `DomainStateError`
        if there is no job of a living holder, or an async job that does not allow `Job.ABORT`;
        `DomainRemoved`, `LockTimeout`.
        """
        jobs.abort(self, timeout)
