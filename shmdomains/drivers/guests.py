"""A guest's begin and end, and what is done about a worker that died in between.

**Intention, deed, record.** A record says that a guest is about to be (paused, starting up) before
there is one, and that it is gone only after it is. So a guest is always in the record, whoever is
killed when.

**The record decides.** Each operation is a job. A job that finds the job of a dead worker, or a
start that nobody goes on with, settles that first: a guest that was not started to the end is
ended, one that is gone is taken out of the record, any other is made what the record says. What
the dead worker had acknowledged is in the record; of the rest nobody was told.

**No lock is held while a hypervisor works.** A job keeps other workers out. The domain is locked
for a moment to look and to commit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .. import (
    AnyDomainList,
    DomainInactive,
    DomainInfo,
    DomainNotFound,
    DomainRemoved,
    DomainState,
    DomainStateError,
    DriverError,
    Job,
    JobInfo,
    PausedReason,
    RunningReason,
    ShmDomainsError,
    ShutoffReason,
)
from .hooks import Hooks, Launched, News, Orphan

logger = logging.getLogger(__name__)

_STARTING = DomainState.PAUSED, PausedReason.STARTING_UP
_ENDS = {ShutoffReason.SHUTDOWN: "powered off", ShutoffReason.CRASHED: "crashed"}
"""The jobs of whoever takes a guest that ended by itself out of the record."""
_REASONS = {
    "destroy": ShutoffReason.DESTROYED,
    "shutdown": ShutoffReason.SHUTDOWN,
    **{job: reason for reason, job in _ENDS.items()},
}
"""Why a guest is gone whose end a dead worker was about to commit, by its job."""
_USUAL = {"on_poweroff": "destroy", "on_reboot": "restart", "on_crash": "destroy"}
_ANSWERS = {ShutoffReason.SHUTDOWN: "on_poweroff", ShutoffReason.CRASHED: "on_crash"}
"""What of a definition says what is done about an end, unless more is known of it."""

_ALL_IS_SAID = News(over=True)


class Reconciled(NamedTuple):
    """What `Driver.reconcile` found: guests that run, domains whose guest was gone, those on which
    a dead worker had been at work, and guests without a record.

    >>> from shmdomains import DomainList
    >>> from shmdomains.drivers import TestDriver
    >>> TestDriver(DomainList()).reconcile()
    Reconciled(running=0, ended=[], settled=[], orphans=[])
    """

    running: int
    ended: list[DomainInfo]
    settled: list[DomainInfo]
    orphans: list[Orphan]


class Guests(Hooks):
    """What the operations are made of."""

    def __init__(self, doms: AnyDomainList, timeout: float | None = 30.0) -> None:
        """`timeout`: how many seconds an operation waits for others' jobs and locks, each time.

        Raises `ValueError` if `doms` reads from a standby, whose answers may be old.
        """
        if getattr(doms, "read", "primary") == "standby":
            text = "a driver needs what is so now: open the list without read='standby'"
            raise ValueError(text)
        self.doms = doms
        self.timeout = timeout

    # --- jobs ---

    @contextmanager
    def _job(self, key: Any, operation: str, kind: Job = Job.MODIFY) -> Iterator[Any]:
        """Find a domain of this host and have a job on it, with everything settled."""
        try:
            with self.doms.get(key, timeout=self.timeout) as dom:
                self._need_here(dom)
                with dom.job(operation, kind, timeout=self.timeout) as job:
                    self._settle(dom, job.replaced)
                    with self._or_settled(dom):
                        yield dom
        except DomainRemoved as error:  # while this waited for another one's job
            raise DomainNotFound(str(error)) from None

    @contextmanager
    def _or_settled(self, dom: Any) -> Iterator[None]:
        """What Ctrl-C or a hook's mistake leaves is settled as if this worker had died."""
        try:
            yield
        except ShmDomainsError:
            raise
        except BaseException:
            with suppress(ShmDomainsError):
                self._settle(dom, dom.jobs)
            raise

    def _is_here(self, domain: Any) -> bool:
        return not domain.is_active or getattr(self.doms, "host", domain.host) == domain.host

    def _is_watchable(self, info: DomainInfo) -> bool:
        """Whether there is a guest here by now."""
        if info.pid is None and (info.state, info.reason) == _STARTING:
            return False
        return info.is_active and self._is_here(info)

    def _need_here(self, domain: Any) -> None:
        """Of an info, or of a domain that is locked."""
        if not self._is_here(domain):
            text = f"domain '{domain.name}' runs on host '{domain.host}'; ask there"
            raise DomainStateError(text)

    @contextmanager
    def _running(self, dom: Any, info: DomainInfo) -> Iterator[None]:
        """Lock the domain for a moment, to commit something about this guest. Whoever takes no jobs
        may have ended it meanwhile."""
        with dom:
            if dom.id != info.id:
                raise DomainInactive(f"domain '{info.name}' was stopped meanwhile")
            yield

    # --- begin and end ---

    def _boot(self, dom: Any, paused: bool = False, id: int | None = None) -> DomainInfo:
        """Make a guest for a domain that is starting up, with this id. If that fails, the domain is
        off again."""
        info = self.doms[dom]
        if id not in (None, info.id):
            raise DomainInactive(f"domain '{info.name}' was stopped meanwhile")
        try:
            launched = self.launch(info)
            with self._running(dom, info):
                _keep(dom, launched)
            if not paused:
                self.go(self.doms[dom])
            with self._running(dom, info):
                if paused:
                    dom.set_state(DomainState.PAUSED, PausedReason.USER)
                else:
                    dom.set_state(DomainState.RUNNING, RunningReason.BOOTED)
        except BaseException:
            self._undo(dom, info)
            raise
        return self.doms[dom]

    def _undo(self, dom: Any, info: DomainInfo) -> None:
        """End a guest that was not started to the end. If even that fails, it stays as one that is
        starting up, and the next job ends it."""
        try:
            now = self.doms.peek(dom, definitions=True)  # another host may have it by now
            self.kill(now if now is not None and now.id == info.id else info)
            self._off(dom, info, ShutoffReason.FAILED)
        except ShmDomainsError as error:
            logger.error("domain '%s' was not started, nor is it off: %s", info.name, error)

    def _end(
        self, dom: Any, info: DomainInfo, reason: ShutoffReason, graceful: bool = False
    ) -> DomainInfo:
        """End the guest, then its domain."""
        if graceful:
            self.kill(info, graceful=True)
        else:
            self.kill(info)
        return self._off(dom, info, reason)

    def _off(self, dom: Any, info: DomainInfo, reason: ShutoffReason) -> DomainInfo:
        """There is no guest any more: the domain is off, and a transient one is gone."""
        with self.doms.locked(self.timeout):
            with dom:
                if dom.is_active and dom.id == info.id:
                    dom.deactivate(reason)
            return self._sweep(dom)

    def _sweep(self, dom: Any) -> DomainInfo:
        """Remove a transient domain that does not run. List lock held; the last that it was."""
        info = self.doms[dom]
        if not info.persistent and not info.is_active:
            self.doms.remove_inactive(dom, timeout=self.timeout)
        return info

    # --- after a death ---

    def _is_settled(self, info: DomainInfo) -> bool:
        """Whether no dead worker left anything to do. A dead one's async job is no operation of
        ours."""
        if any(job.kind is not Job.ASYNC and not job.holder.alive for job in info.jobs):
            return False
        if info.is_active:
            return (info.state, info.reason) != _STARTING or _is_worked_on(info)
        return info.persistent or _is_worked_on(info)

    def _settle(self, dom: Any, died: tuple[JobInfo, ...]) -> None:
        """Finish or undo what a dead worker began. `DomainNotFound` if nothing is left then."""
        info = self.doms[dom]
        self._need_here(info)
        if not info.is_active:
            if not info.persistent:
                info = self._off(dom, info, ShutoffReason.FAILED)
        elif (info.state, info.reason) == _STARTING:
            info = self._end(dom, info, ShutoffReason.FAILED)
        elif not died:
            return
        elif not self.alive(info):
            info = self._end(dom, info, _REASONS.get(died[0].operation, ShutoffReason.CRASHED))
        else:
            self._restore(dom, info)
        if not info.is_active and not info.persistent:
            raise DomainNotFound(f"no domain with matching name '{info.name}'")

    def _restore(self, dom: Any, info: DomainInfo) -> None:
        """Make the guest what its record says, but for vCPUs that a dead worker had plugged in: a
        guest may not give them up, so the record gets them. What cannot be is logged: the domain
        can be destroyed all the same."""
        try:
            if info.state is DomainState.RUNNING:
                self.unpause(info)
            elif info.state is DomainState.PAUSED:
                self.pause(info)
            self.set_guest_memory(info, info.definition.current_memory)
            plugged = self.guest_vcpus(info)
            if plugged is not None and plugged > info.definition.current_vcpus:
                self._take_vcpus(dom, info, plugged)
            else:
                self.set_guest_vcpus(info, info.definition.current_vcpus)
        except DriverError as error:
            logger.error("the guest of '%s' is not what its record says: %s", info.name, error)

    def _take_vcpus(self, dom: Any, info: DomainInfo, count: int) -> None:
        with self._running(dom, info):
            stored = dom.next_definition or dom.definition
            dom.definition = dom.definition.replace(current_vcpus=count)
            if info.persistent:
                dom.next_definition = stored

    def reconcile(self, kill_orphans: bool = False) -> Reconciled:
        """Compare the records with the guests of this host: after a restart of everything, or at
        any time.

        What a dead worker began is finished or undone. A guest that ended while nobody watched is
        treated as `on_poweroff` or `on_crash` says; one whose process is gone, nobody knows how,
        has crashed, and is off whatever `on_crash` says. A domain that a living worker is at work
        on is left to that. Guests without a record are listed and, with `kill_orphans`, ended.
        """
        found = Reconciled(0, [], self.settle_all(), [])
        settled = {info.uuid: at for at, info in enumerate(found.settled)}
        running = 0
        for info in self.doms.list(active=True):
            if not self._is_here(info):
                continue
            if not _is_worked_on(info):
                now = self._reconcile_one(info)
                if info.uuid in settled:
                    found.settled[settled[info.uuid]] = now
                elif not now.is_active:
                    found.ended.append(now)
                running += now.is_active
            else:
                running += 1
        for orphan in self.orphans():
            if not self._is_recorded(orphan):
                found.orphans.append(orphan)
                if kill_orphans:
                    self.end_orphan(orphan)
        return found._replace(running=running)

    def settle_all(self) -> list[DomainInfo]:
        """Finish or undo what dead workers began; the domains that were so. Part of `reconcile`."""
        here = (info for info in self.doms.list() if self._is_here(info))
        return [self._settle_one(info) for info in here if not self._is_settled(info)]

    def _settle_one(self, info: DomainInfo) -> DomainInfo:
        try:
            with self._job(info, "settle", Job.DESTROY) as dom:
                return self.doms[dom]
        except DomainNotFound:
            return info

    def _reconcile_one(self, info: DomainInfo) -> DomainInfo:
        try:
            return self.look(info)
        except DriverError as error:
            logger.error("nobody knows how the guest of '%s' is: %s", info.name, error)
            return info

    # --- what a guest does by itself ---

    def look(self, guest: DomainInfo, news: News = _ALL_IS_SAID) -> DomainInfo:
        """Make the record say what this guest did by itself, and do what its definition wants then.
        `news` is what is known of it already. If more may be heard of it, and nothing was of its
        end, a process that is gone is left to who hears that.

        The guest is looked at again with a job on the domain, so it does no harm to call this at
        any time. Returns the domain, inactive if this guest has ended and no other one begun; as it
        was told if it is gone.
        """
        try:
            now = self.doms[guest.uuid]
            if not is_same(now, guest):
                return now
            try:
                how = self.ended(guest)
            except DriverError:  # another worker may be ending it: asked again with a job
                how = ShutoffReason.UNKNOWN
            if how is not None:
                return self._found_ended(guest, how, news)
            return self._found_otherwise(guest)
        except DomainNotFound:
            return guest  # another worker was faster, and it was transient

    def _found_ended(self, guest: DomainInfo, how: ShutoffReason, news: News) -> DomainInfo:
        operation = _ENDS.get(news.reason or how, "ended")
        with self._job(guest, operation, Job.DESTROY) as dom:
            info = self.doms[dom]
            if not is_same(info, guest):
                return info
            if info.state is DomainState.CRASHED and self.alive(info):
                return info  # preserved, to be looked at
            now = self.ended(info)
            if now is None:
                return info
            reason = news.reason or now
            by = news.by or _ANSWERS.get(reason, "")
            if not self.alive(info):
                is_said = news.over or news.reason is not None
                return self._end(dom, info, reason) if is_said else info
            if by == "on_poweroff" and self.finish_reboot(info):
                with self._running(dom, info):
                    dom.set_state(DomainState.RUNNING, RunningReason.BOOTED)
                return self.doms[dom]
            return self._obey(dom, info, by, reason)

    def _found_otherwise(self, guest: DomainInfo) -> DomainInfo:
        """The guest lives. It may have stopped, or gone on, without anybody of ours."""
        if not self._differs(guest):
            return guest
        with self._job(guest, "look") as dom:
            info = self.doms[dom]
            seen = self._differs(info) if is_same(info, guest) else None
            if seen:
                with self._running(dom, info):
                    dom.set_state(*seen)
            return self.doms[dom]

    def _differs(self, guest: DomainInfo) -> tuple[DomainState, int] | None:
        """The state that the guest is in, if the record has another one."""
        info = self.doms.peek(guest.uuid, definitions=True)
        if info is None or not is_same(info, guest) or not _may_differ(info):
            return None
        seen = self.seen(info)
        return None if seen is None or seen[0] is info.state else seen

    def _obey(self, dom: Any, info: DomainInfo, event: str, reason: ShutoffReason) -> DomainInfo:
        """The guest is off: do what the definition wants then."""
        if restarts(info, event):
            return self._restart(dom, info)
        if event == "on_crash" and info.definition.on_crash == "preserve":
            with self._running(dom, info):
                dom.state = DomainState.CRASHED
            return self.doms[dom]
        return self._end(dom, info, reason)

    def _restart(self, dom: Any, info: DomainInfo) -> DomainInfo:
        """A new guest for the same domain, which keeps its id."""
        self.kill(info)
        with self._running(dom, info):
            dom.pid = None
            dom.set_state(DomainState.PAUSED, PausedReason.STARTING_UP)
        return self._boot(dom)

    def bury(self, host: str) -> list[DomainInfo]:
        """Say that a host is dead: its domains are off, and may start elsewhere. For lists of
        several hosts.

        Nobody can see from here whether a host is dead or only silent. Fence it first: guests that
        it still runs would run twice. Should it come back, its workers have lost their locks, and
        its `reconcile` finds the guests without a record. One lock is held for the decision and the
        commit, and its token is logged: what comes with a lower one to storage or network is late.
        """
        if host == getattr(self.doms, "host", host):
            raise DriverError(f"host '{host}' is this one, and lives")
        buried = []
        for info in self.doms.list(active=True, host=host):
            with (
                suppress(DomainNotFound, DomainRemoved),
                self.doms.get(info, timeout=self.timeout) as dom,
                dom.job("bury", Job.DESTROY, timeout=self.timeout),
                self.doms.locked(self.timeout),
            ):
                with dom:
                    if not dom.is_active or (dom.id, dom.host) != (info.id, host):
                        continue  # it had ended, and may have begun anew elsewhere
                    token = dom.token
                    dom.deactivate(ShutoffReason.FAILED)
                buried.append(self._sweep(dom))
                text = "domain '%s' of host '%s' is off, by token %d"
                logger.info(text, info.name, host, token)
        return buried

    def _is_recorded(self, orphan: Orphan) -> bool:
        info = None if orphan.uuid is None else self.doms.peek(orphan.uuid, definitions=True)
        return info is not None and info.is_active and info.pid in (None, orphan.pid)


def is_same(info: DomainInfo, guest: DomainInfo) -> bool:
    """Whether it has this guest still: a domain that began anew may have kept its id."""
    return info.is_active and (info.id, info.pid) == (guest.id, guest.pid)


def _may_differ(info: DomainInfo) -> bool:
    state = info.state, info.reason
    return state != _STARTING and info.state in (DomainState.RUNNING, DomainState.PAUSED)


def restarts(info: DomainInfo, event: str) -> bool:
    """Whether the guest begins anew: also ``rename-restart`` and ``coredump-restart``."""
    action = getattr(info.definition, event, None) or _USUAL.get(event, "destroy")
    return bool(action.endswith("restart"))


def _is_worked_on(info: DomainInfo) -> bool:
    """Whether a worker may be about to begin or end the guest."""
    return any(job.kind is not Job.ASYNC for job in info.jobs)


def _keep(dom: Any, launched: Launched) -> None:
    dom.data = launched.data
    dom.pid = launched.pid
    if launched.started not in (None, launched.pid and _started(launched.pid)):
        raise DriverError(f"process {launched.pid} of domain '{dom.name}' has ended already")


def _started(pid: int) -> int | None:
    """When a process started; the kernel may have given its number to another one."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None
