"""Jobs on domains: long work that excludes other long work, and holds no lock (libvirt's
virDomainObjBeginJob).

A job stands in the record, in `Work`, and changes with commits only; its holder is a thread, named
by its number and its start. So it is there exactly as long as the record says and its holder lives:
nothing has to be cleared after a death. A job that ends is taken out by its holder. A dead holder's
job excludes nobody. It stays, for everybody to see, until a job that it would have excluded comes
in its place; that one keeps what it needs to know of it (`Begun.replaced`).

Whoever begins a job looks under the domain's lock and commits it there, so two that exclude each
other cannot both begin. Whoever waits holds no lock. It sleeps until the record changes, a slice at
most, then looks whether the holder still lives. So after a death it waits one slice at most.

(No generator is left before its end here: a Ctrl-C that comes as it is closed would be lost.)

Which owner, a thread or a task, holds what in this process is known here, too (`_held`). The record
names the thread. A job in it that has this thread's name and that is not known here is of before an
`exec`, or of a former thread of this number: its holder is dead. A forked child knows its parent's
jobs, but has another pid.
"""

from __future__ import annotations

import _thread
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ReferenceType, ref

import msgspec

from ..errors import (
    AlreadyLocked,
    DomainRemoved,
    DomainStateError,
    JobTimeout,
    LockOrder,
    LockTimeout,
    NotOwner,
    SegmentFull,
    ShmDomainsError,
    UncommittedChanges,
)
from ..job import Job, JobInfo, kinds_of, mask_of
from .steps import SLICE
from .store import Deadline, DomainBase, ListBase
from .tasks import ask
from .values import encode_data
from .work import Begun, Caller, Work, job_info, replaced

if TYPE_CHECKING:
    from typing_extensions import Self

E = TypeVar("E", bound=JobTimeout)

MAX_PROGRESS = 4096
MAX_TEXT = 255
MAX_REPLACED = 4

_STARTED, _ENDED = 102, 103  # events


def end_begun(dom: DomainBase, begun: Begun, timeout: float | None) -> None:
    """Take a job out of its record."""
    deadline, was_locked = dom._doms._deadline(timeout), dom.is_locked
    try:
        if not was_locked:
            dom.lock(deadline.left())
        work = dom._work
        jobs = tuple(job for job in _jobs(work) if not job.is_same(begun))
        if jobs != _jobs(work):
            event = _ENDED, int(begun.kind)
            dom._commit_work(replaced(work, jobs=jobs), deadline.left(), (event,))
    except DomainRemoved:
        pass  # it ended with its domain
    finally:
        if not was_locked:
            dom._release_unseen()


# --- jobs whose end failed, and that nobody has a handle to ---------------------------------

# Their thread lives, so they would exclude everybody for as long as it does. A thread of this
# process ends them; it is started for the first one, and ends with the last.
_owed: list[tuple[DomainBase, Begun]] = []
_paying = threading.Lock()
_RETRY = 0.5
"""Seconds, for a lock or for room in the segment."""


def _owe_nothing() -> None:
    """In a forked child: the jobs are its parent's, and so is the thread that may have the lock."""
    global _paying
    _owed.clear()
    _paying = threading.Lock()


os.register_at_fork(after_in_child=_owe_nothing)


def owe(dom: DomainBase, begun: Begun) -> None:
    """Have a job ended once its domain is free. Waits for nothing, not even for the thread to run:
    the hub of greenlets may be what dropped the job."""
    with suppress(RuntimeError):  # no thread to be had: then with the next one that is owed
        _owed.append((dom, begun))
        _thread.start_new_thread(_pay, ())


def _pay() -> None:
    paying = _paying
    while _owed and paying.acquire(False):  # or whoever has it pays this one, too
        try:
            _pay_all()
        finally:
            paying.release()


def _pay_all() -> None:
    while _owed:
        dom, begun = _owed[0]
        try:
            end_begun(dom, begun, _RETRY)
        except (LockTimeout, SegmentFull) as exc:
            if isinstance(exc, SegmentFull):
                threading.Event().wait(_RETRY)
            _owed.append(_owed.pop(0))
            continue
        except ShmDomainsError:
            pass  # the list was closed, or is damaged
        del _owed[0], dom, begun


# Owner -> its jobs, and after a fork those of the parent's owners. Only their block keeps them, so
# that one that is dropped ends. Each list is replaced, never changed: other threads read it.
_held: dict[int, list[ReferenceType[DomainJob]]] = {}


def jobs_of_owner(owner: int) -> list[DomainJob]:
    """The jobs that a thread or a task holds."""
    if not _held:
        return []
    pid = os.getpid()
    jobs = (known() for known in _held.get(owner, ()))
    return [job for job in jobs if job is not None and job._pid == pid]


def held_jobs(doms: ListBase[Any]) -> list[DomainJob]:
    """The jobs that the caller holds."""
    return jobs_of_owner(doms._owner)


def end_jobs(owner: int) -> None:
    """A task is over, and will not end its jobs: have them ended."""
    for job in jobs_of_owner(owner):
        job._give_up()


def _remember(job: DomainJob) -> None:
    kept = [known for known in _held.get(job._owner, ()) if known() is not None]
    _held[job._owner] = [*kept, ref(job)]


def _forget(job: DomainJob) -> None:
    kept = [known for known in _held.get(job._owner, ()) if known() not in (None, job)]
    if kept:
        _held[job._owner] = kept
    else:
        _held.pop(job._owner, None)


# --- what may run beside what ---------------------------------------------------------------


def _excludes(begun: Begun, kind: Job) -> bool:
    if begun.kind is not Job.ASYNC:
        return True
    if kind is Job.ASYNC or kind is Job.ASYNC_NESTED:
        return kind is Job.ASYNC
    return not begun.allow >> (kind - 1) & 1


def is_mine(dom: DomainBase, begun: Begun) -> bool:
    return bool([job for job in held_jobs(dom._doms) if job._is(begun)])


def _lives(dom: DomainBase, begun: Begun, me: Caller) -> bool:
    if begun.caller != me:
        return dom._runs(begun.caller)
    return bool([job for owner in list(_held) for job in jobs_of_owner(owner) if job._is(begun)])


def _jobs(work: Work | None) -> tuple[Begun, ...]:
    return () if work is None else work.jobs


def blocking(dom: DomainBase, work: Work | None, kind: Job, me: Caller) -> list[Begun]:
    """The living jobs that exclude one of this kind."""
    return [job for job in _jobs(work) if _excludes(job, kind) and _lives(dom, job, me)]


def wait_while(
    doms: ListBase[Any],
    dom: DomainBase,
    deadline: Deadline,
    in_the_way: Callable[[Work | None], list[Begun]],
    error: Callable[[str, Begun], ShmDomainsError],
) -> None:
    """Wait until no job is `in_the_way`, or the domain is removed. Raises `error` at the
    deadline."""

    def look() -> object | None:
        """The stamp, if there is something to wait for."""
        info, stamp = doms._look(dom)
        found = [] if info is None else in_the_way(info._work)
        if info is None or not found:
            return None
        left = deadline.left()
        if left is not None and left <= 0:
            raise error(info.name, max(found, key=lambda job: job.kind is Job.ASYNC))
        return stamp

    stamp = look()
    if stamp is None:
        return
    with doms._job_wait(dom):
        while stamp is not None:
            doms._sleep(dom, stamp, deadline.left())
            stamp = look()


def timed_out(kind: type[E], dom: DomainBase, name: str, begun: Begun, then: str = "") -> E:
    """The error for a wait for this job that was too long."""
    job = job_info(begun, dom._describe)
    return kind(
        f"cannot acquire state change lock (held by monitor={job.operation}): domain '{name}' has "
        f"the {job.kind.words} job '{job.operation}' of {job.holder}{then}",
        job.holder,
        job,
    )


# --- one job --------------------------------------------------------------------------------


class DomainJob:
    """A job on a domain, for one ``with`` block: `Domain.job`.

    It is its thread's, or its task's. Others, and a forked child, get `NotOwner`.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> info = doms.define(xml)
    >>> with doms.job("web1", "backup") as job:
    ...     job.progress("half of it")
    ...     doms["web1"].jobs[0].progress
    'half of it'
    """

    __slots__ = (
        "__weakref__",
        "_allow",
        "_begun",
        "_block",
        "_dom",
        "_is_over",
        "_kind",
        "_operation",
        "_owner",
        "_pid",
        "_timeout",
        "_was_locked",
        "_why",
    )

    def __init__(
        self,
        dom: DomainBase,
        operation: str,
        kind: Job,
        timeout: float | None,
        allow: Iterable[Job] | None,
        why: str | None,
    ) -> None:
        self._begun: Begun | None = None
        self._is_over = False
        self._pid = self._owner = 0
        self._dom = dom
        self._operation = _checked_text(operation, "operation")
        self._kind = Job(kind)
        self._why = None if why is None else _checked_text(why, "reason")
        self._timeout = timeout
        if self._kind is Job.ASYNC:
            self._allow = mask_of(allow)
        elif allow is not None:
            raise ValueError(f"only an async job allows others, not a {self._kind.words} job")
        else:
            self._allow = 0
        self._was_locked = False
        self._block: Any = None
        dom._doms._deadline(timeout)  # a wrong one is an error here

    # --- what it is ---

    @property
    def operation(self) -> str:
        """What is done."""
        return self._operation

    @property
    def kind(self) -> Job:
        """What kind of job it is."""
        return self._kind

    @property
    def since(self) -> float:
        """When it began, in seconds since the epoch. Raises `NotOwner` before that."""
        return self._need_begun().since

    @property
    def previous_owner_died(self) -> JobInfo | None:
        """The job of a dead holder in whose place this one came, or None: what it did and how far
        it was, so that you can clean up."""
        found = self.replaced
        return found[0] if found else None

    @property
    def replaced(self) -> tuple[JobInfo, ...]:
        """All jobs of dead holders that nobody has cleaned up after, the last one first, at most 4.

        They are two if an async job and another one died, and more if those who came to clean up
        died, too. The end of this job ends them.
        """
        describe = self._dom._describe
        return tuple(job_info(one, describe) for one in self._need_begun().replaced)

    @property
    def abort_requested(self) -> bool:
        """Whether somebody asks to end it (`Domain.abort_job`), or the async job that it is nested
        in. Takes no lock. Raises `DomainRemoved`."""
        mine = self._need_begun()
        info, _ = self._dom._doms._look(self._dom)
        if info is None:
            raise _removed(self._dom)
        asked = [job for job in _jobs(info._work) if job.abort]
        return bool([job for job in asked if job.is_same(mine) or self._is_inside(job)])

    def _is_inside(self, job: Begun) -> bool:
        mine = self._need_begun()
        nested = mine.kind is Job.ASYNC_NESTED
        return nested and job.kind is Job.ASYNC and job.caller == mine.caller

    def _is(self, begun: Begun) -> bool:
        return self._begun is not None and self._begun.is_same(begun)

    def _need_begun(self) -> Begun:
        if self._begun is None:
            raise NotOwner(f"job '{self._operation}' has not begun: with dom.job(...) as job: ...")
        return self._begun

    def _need_held(self) -> Begun:
        begun = self._need_begun()
        if self._is_over:
            raise NotOwner(f"job '{self._operation}' is over; begin another one")
        if not [job for job in held_jobs(self._dom._doms) if job is self]:
            raise NotOwner(
                f"job '{self._operation}' is another thread's or task's, or of before a fork; only "
                "whoever began it can change or end it"
            )
        return begun

    # --- its block ---

    def __enter__(self) -> Self:
        deadline = self._prepare()
        try:
            self._begin(deadline)
        except BaseException:
            with suppress(ShmDomainsError):
                self._take_back()
            with suppress(ShmDomainsError):
                self._take_up(self._at_least_a_slice(deadline))
            raise
        return self

    async def __aenter__(self) -> Self:
        wait = ask()
        deadline = self._prepare()
        try:
            await wait(self._begin, deadline, within=deadline.left())
        except BaseException:
            with suppress(ShmDomainsError):
                await wait(self._take_back, within=SLICE)
            with suppress(ShmDomainsError):
                left = self._at_least_a_slice(deadline)
                await wait(self._take_up, left, within=left)
            raise
        return self

    @staticmethod
    def _at_least_a_slice(deadline: Deadline) -> float | None:
        left = deadline.left()
        return None if left is None else max(left, SLICE)

    def _prepare(self) -> Deadline:
        """Before it begins."""
        dom = self._dom
        if self._begun is not None:
            raise AlreadyLocked(f"job '{self._operation}' was begun before; ask for another one")
        deadline = dom._doms._deadline(self._timeout)
        self._need_order()
        self._was_locked = dom.is_locked
        if self._was_locked:
            if dom.changed:
                raise UncommittedChanges(
                    f"commit or roll back domain '{dom.name}' before a job, which puts its lock "
                    "down"
                )
            # The lock goes on through the handle that has it: ours may be dropped with the job.
            dom = self._dom = dom._holding
            self._block = dom._block
        return deadline

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        try:
            self._finish()
        except BaseException:
            with suppress(ShmDomainsError):
                self._take_back()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        if kind is GeneratorExit and self._owner != self._dom._doms._owner:
            return  # its task was dropped, and so the job is (`end_jobs`)
        wait = ask()
        try:
            await wait(self._finish)
        except BaseException:
            with suppress(ShmDomainsError):
                await wait(self._take_back, within=SLICE)
            raise

    def _finish(self) -> None:
        if self._pid != os.getpid():
            return  # a child that was forked in the block: the job is its parent's
        with suppress(DomainRemoved):  # then the job ended with its domain
            self._take_up(None)
        if not self._is_over:
            self.end()

    def __del__(self) -> None:
        if getattr(self, "_begun", None) is None or self._is_over or self._pid != os.getpid():
            return  # perhaps a signal handler raised before it was made
        if sys.is_finalizing():
            return  # it ends with the process
        self._give_up()

    def _give_up(self) -> None:
        """End it for its holder, who cannot any more."""
        with suppress(Exception):
            if not self._dom.is_locked:
                self._end(0)
        if not self._is_over:
            owe(self._dom, self._need_begun())
            self._forget()
        warnings.warn(
            f"job '{self._operation}' was dropped while it was held: use 'with'",
            ResourceWarning,
            stacklevel=1,
        )

    def _need_order(self) -> None:
        doms = self._dom._doms
        if doms.is_locked or doms._holds_other(self._dom):
            held = "the list lock" if doms.is_locked else "another domain"
            raise LockOrder(
                f"{doms._this} holds {held}, and a job may take minutes: unlock it first"
            )
        others = held_jobs(doms)
        if self._kind is Job.ASYNC_NESTED and len(others) == 1 and others[0]._kind is Job.ASYNC:
            return  # whoever has the other job here, and waits, has a timeout
        if others and self._timeout is None:
            raise LockOrder(
                f"{doms._this} holds job '{others[-1]._operation}' and would wait for another "
                "without an end; give a timeout"
            )

    def _begin(self, deadline: Deadline) -> None:
        dom, kind = self._dom, self._kind
        me = dom._caller()

        def error(name: str, begun: Begun) -> JobTimeout:
            return timed_out(JobTimeout, dom, name, begun)

        while True:
            try:
                if not dom.is_locked:
                    dom.lock(deadline.left())
                if self._try(me, deadline):
                    return
            finally:
                dom._release_unseen()
            wait_while(dom._doms, dom, deadline, lambda work: blocking(dom, work, kind, me), error)

    def _try(self, me: Caller, deadline: Deadline) -> bool:
        """Begin it if nobody excludes it. Domain locked."""
        dom, kind = self._dom, self._kind
        work = dom._work
        jobs = _jobs(work)
        if kind is Job.ASYNC_NESTED:
            self._need_async(jobs)
        living = blocking(dom, work, kind, me)
        mine = [job for job in living if is_mine(dom, job)]
        if mine:
            raise AlreadyLocked(
                f"{dom._doms._this} holds job '{mine[0].operation}' on domain '{dom.name}' and "
                "would wait for itself"
            )
        if living:
            return False
        gone = sorted(
            (job for job in jobs if _excludes(job, kind)), key=lambda job: job.kind, reverse=True
        )
        former = [msgspec.structs.replace(job, replaced=()) for job in gone]
        former += [one for job in gone for one in job.replaced]
        begun = Begun(
            self._operation,
            kind,
            self._allow,
            me,
            _command(dom, me),
            time.time(),
            self._why,
            replaced=tuple(former[:MAX_REPLACED]),
        )
        # Known before it is committed: a signal handler may raise at once afterwards.
        self._begun, self._pid, self._owner = begun, os.getpid(), dom._doms._owner
        _remember(self)
        kept = tuple(job for job in jobs if job not in gone)
        dom._commit_work(
            replaced(work, jobs=(*kept, begun)),
            deadline.left(),
            (*((_ENDED, int(job.kind)) for job in gone), (_STARTED, int(kind))),
        )
        return True

    def _need_async(self, jobs: tuple[Begun, ...]) -> None:
        if not [job for job in jobs if job.kind is Job.ASYNC and is_mine(self._dom, job)]:
            raise NotOwner(
                f"job '{self._operation}' is to be nested in an async job, which "
                f"{self._dom._doms._this} does not have on domain '{self._dom.name}'"
            )

    def _take_up(self, timeout: float | None) -> None:
        """Lock the domain again, as it was before the block."""
        dom = self._dom
        if not self._was_locked or dom.is_locked:
            return
        dom._lock_again(self._block, timeout)

    # --- its record ---

    def progress(self, value: Any, timeout: float | None = None) -> None:
        """Say how far it is: any MessagePack value of at most 4 KiB, in place of the last one.

        Committed at once; `Domain.jobs`, `DomainInfo.jobs` and ``domjobinfo`` show it. Locks the
        domain for a moment, unless this thread has it locked. Raises `ValueError` for a larger one,
        `NotOwner`, `DomainRemoved`, `LockTimeout`, `SegmentFull` and, if this thread holds another
        domain, `LockOrder`.
        """
        self._need_held()
        packed = encode_data(value)
        if len(packed) > MAX_PROGRESS:
            raise ValueError(f"a progress of {len(packed)} bytes; the limit is {MAX_PROGRESS}")
        dom = self._dom
        deadline, was_locked = dom._doms._deadline(timeout), dom.is_locked
        try:
            if not was_locked:
                dom.lock(deadline.left())
            begun, work = self._need_held(), dom._work
            jobs = tuple(
                msgspec.structs.replace(job, progress=packed) if job.is_same(begun) else job
                for job in _jobs(work)
            )
            dom._commit_work(replaced(work, jobs=jobs), deadline.left())
        finally:
            if not was_locked:
                dom._release_unseen()

    def end(self, timeout: float | None = None) -> None:
        """End it before its block does, or again after the end of the block failed.

        Locks the domain for a moment, unless this thread has it locked. Raises `NotOwner`,
        `LockTimeout`, `SegmentFull` (there is other work under way, and no room to note it anew)
        and, if this thread holds another domain, `LockOrder`; then the job is still held.
        """
        self._need_held()
        self._end(timeout)

    def _end(self, timeout: float | None) -> None:
        end_begun(self._dom, self._need_begun(), timeout)
        self._forget()

    def _take_back(self) -> None:
        """End it if it began. After an error, so it does not wait long."""
        if self._begun is not None and not self._is_over and self._pid == os.getpid():
            self._end(SLICE)

    def _forget(self) -> None:
        self._is_over = True
        _forget(self)

    def __reduce__(self) -> Any:
        raise TypeError("a job is its thread's, and cannot be passed on or copied")

    def __repr__(self) -> str:
        state = "over" if self._is_over else "not begun" if self._begun is None else "held"
        return f"<DomainJob {self._operation!r} {self._kind.words} {state}>"


def _removed(dom: DomainBase) -> DomainRemoved:
    return DomainRemoved(f"domain {dom.uuid} was removed; this handle outlived it")


def _checked_text(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"the {what} of a job is a str, not {type(text).__name__}")
    if not 0 < len(text.encode()) <= MAX_TEXT:
        raise ValueError(f"the {what} of a job has 1 to {MAX_TEXT} bytes, not {len(text.encode())}")
    return text


_commands: dict[int, str | None] = {}


def _command(dom: DomainBase, me: Caller) -> str | None:
    """This process's command line, looked up once."""
    if me.pid not in _commands:
        _commands.clear()  # a parent's
        _commands[me.pid] = dom._describe(me).command
    return _commands.get(me.pid)


# --- for people -----------------------------------------------------------------------------


def jobs_on(dom: DomainBase) -> tuple[JobInfo, ...]:
    """`Domain.jobs`."""
    if dom.is_locked:
        work = dom._work
    else:
        info, _ = dom._doms._look(dom)
        if info is None:
            raise _removed(dom)
        work = info._work
    return tuple(job_info(job, dom._describe) for job in _jobs(work))


def abort(dom: DomainBase, timeout: float | None) -> None:
    """`Domain.abort_job`."""
    deadline, was_locked = dom._doms._deadline(timeout), dom.is_locked
    try:
        if not was_locked:
            dom.lock(deadline.left())
        work = dom._work
        asked = _to_abort(dom, work)
        jobs = tuple(
            msgspec.structs.replace(job, abort=True) if job is asked else job for job in _jobs(work)
        )
        dom._commit_work(replaced(work, jobs=jobs), deadline.left())
    finally:
        if not was_locked:
            dom._release_unseen()


def _to_abort(dom: DomainBase, work: Work | None) -> Begun:
    me, name = dom._caller(), dom.name
    living = [job for job in _jobs(work) if _lives(dom, job, me)]
    if not living:
        raise DomainStateError(f"no job is active on domain '{name}'")
    found = max(living, key=lambda job: job.kind is Job.ASYNC)
    if found.kind is Job.ASYNC and Job.ABORT not in kinds_of(found.allow):
        raise DomainStateError(
            f"job '{found.operation}' on domain '{name}' does not allow to abort it"
        )
    return found
