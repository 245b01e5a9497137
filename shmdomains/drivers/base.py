"""`Driver`: libvirt's operations, once, for every hypervisor.

In the patch's pattern: define, undefine, create and destroy change the list, so they hold its lock
throughout each change of theirs; the others drop it after the find. Their words are libvirt's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from .. import (
    DomainActive,
    DomainDef,
    DomainExists,
    DomainInactive,
    DomainInfo,
    DomainState,
    DomainTransient,
    Election,
    InvalidName,
    Job,
    PausedReason,
    RunningReason,
    ShmDomainsError,
    ShutoffReason,
)
from .changes import Changes
from .guests import restarts
from .words import INTERNAL, INVALID_OPERATION, as_kind

logger = logging.getLogger(__name__)


class Driver(Changes):
    """libvirt's operations over a list of domains; a hypervisor's driver fills in the hooks.

    A domain is named by any key that `DomainList.get` takes. What an operation returns is the state
    that it committed, when its job was still on the domain; of a transient domain that stopped, its
    last one. Errors have libvirt's words, and its kind of error in `ShmDomainsError.kind`. A driver
    keeps nothing but its list, and any thread of any worker may use it.

    >>> from shmdomains import DomainList
    >>> driver = Driver(DomainList())
    >>> xml = ("<domain type='test'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> driver.create(xml).state.words
    'running'
    >>> driver.start("web1")
    Traceback (most recent call last):
    ...
    shmdomains.errors.DomainActive: Domain is already active
    >>> driver.destroy("web1").reason.name, len(driver.doms)
    ('DESTROYED', 0)
    """

    # --- define, undefine ---

    def define(self, xml: DomainDef | str | bytes) -> DomainInfo:
        """Define a persistent domain, or redefine one; an active one gets it with its next start
        (virDomainDefineXML)."""
        return self.doms.define(self._accepted(xml), timeout=self.timeout)

    def undefine(self, key: Any) -> None:
        """Undefine a domain. An active one goes on and is transient: it is gone when it stops
        (virDomainUndefine)."""
        with self._job(key, "undefine") as dom:
            if not self.doms[dom].persistent:
                raise DomainTransient("cannot undefine transient domain")
            self.doms.undefine(dom, timeout=self.timeout)

    def rename(self, key: Any, new_name: str) -> DomainInfo:
        """Rename an inactive domain (virDomainRename)."""
        with self._job(key, "rename") as dom:
            info = self.doms[dom]
            if info.is_active:
                raise DomainActive("cannot rename active domain")
            if info.name == new_name:
                text = "Can't rename domain to itself"
                raise as_kind(INVALID_OPERATION, InvalidName(text))
            try:
                self.doms.rename(info, new_name, timeout=self.timeout)
            except DomainExists as error:
                raise as_kind(INVALID_OPERATION, error) from None
            return self.doms[dom]

    def set_autostart(self, key: Any, on: bool = True) -> DomainInfo:
        """Set whether the domain starts with the host (virDomainSetAutostart)."""
        with self._job(key, "set_autostart") as dom:
            if not self.doms[dom].persistent:
                raise DomainTransient("cannot set autostart for transient domain")
            with dom:
                self.doms.set_autostart(dom, on, timeout=self.timeout)
            return self.doms[dom]

    # --- begin ---

    def create(self, xml: DomainDef | str | bytes, paused: bool = False) -> DomainInfo:
        """Start a domain that is not defined: it is gone when it stops. An inactive persistent
        domain runs with this definition, once (virDomainCreateXML)."""
        definition = self._accepted(xml)
        self._settle_namesake(definition)
        dom, id = self._entered(definition)
        with dom, dom.job("create", timeout=self.timeout):
            # While this waited for another one's job, that may have ended it.
            return self._boot(dom, paused, id)

    def _entered(self, definition: DomainDef) -> tuple[Any, int]:
        """The domain of this definition, starting up, and still locked; and its id."""
        with self.doms.locked(self.timeout):
            dom = self.doms.assign_def(definition, timeout=self.timeout)
            try:
                before = self.doms[dom]
                if before.is_active:
                    raise DomainActive(f"domain '{before.name}' is already active")
                if before.persistent:
                    dom.next_definition = before.definition
                dom.activate(state=DomainState.PAUSED, reason=PausedReason.STARTING_UP)
                dom.commit()
            except BaseException:
                dom.rollback()
                dom.unlock()
                self._sweep(dom)
                raise
        return dom, dom.id

    def start(self, key: Any, paused: bool = False) -> DomainInfo:
        """Start a domain (virDomainCreateWithFlags)."""
        with self._job(key, "start") as dom:
            with dom:
                if dom.is_active:
                    raise as_kind("", DomainActive("Domain is already active"))
                dom.activate(state=DomainState.PAUSED, reason=PausedReason.STARTING_UP)
            return self._boot(dom, paused)

    def autostart_all(self) -> list[DomainInfo]:
        """Start every inactive domain that is to start with the host; returns those that it
        started. What cannot be started is logged."""
        started = []
        for info in self.doms.list(active=False, autostart=True):
            try:
                started.append(self.start(info))
            except DomainActive:
                pass  # another worker was faster
            except ShmDomainsError as error:
                logger.error("failed to autostart domain '%s': %s", info.name, error)
        return started

    # --- pause ---

    def suspend(self, key: Any) -> DomainInfo:
        """Stop a running domain's processors (virDomainSuspend)."""
        with self._job(key, "suspend", Job.SUSPEND) as dom:
            info = self.doms[dom]
            if info.state is not DomainState.RUNNING:
                text = f"domain '{info.name}' not running"
                raise as_kind(INTERNAL, DomainInactive(text))
            self.pause(info)
            with self._running(dom, info):
                dom.set_state(DomainState.PAUSED, PausedReason.USER)
            return self.doms[dom]

    def resume(self, key: Any) -> DomainInfo:
        """Let a paused domain go on (virDomainResume)."""
        with self._job(key, "resume", Job.SUSPEND) as dom:
            info = self.doms[dom]
            if info.state is not DomainState.PAUSED:
                raise as_kind(INTERNAL, DomainInactive(f"domain '{info.name}' not paused"))
            self.unpause(info)
            with self._running(dom, info):
                dom.set_state(DomainState.RUNNING, RunningReason.UNPAUSED)
            return self.doms[dom]

    # --- end ---

    def shutdown(self, key: Any) -> DomainInfo:
        """Ask the guest to power off (virDomainShutdown). When it has, `on_poweroff` is obeyed."""
        with self._job(key, "shutdown") as dom:
            info = self.doms[dom]
            if not info.is_active:
                text = f"domain '{info.name}' not running"
                raise as_kind(INTERNAL, DomainInactive(text))
            if self.ask_shutdown(info):
                return self._obey(dom, info, "on_poweroff", ShutoffReason.SHUTDOWN)
            return self.doms[dom]

    def reboot(self, key: Any) -> DomainInfo:
        """Ask the guest to reboot (virDomainReboot). When it does, `on_reboot` is obeyed."""
        with self._job(key, "reboot") as dom:
            info = self._active(dom)
            if not self.ask_reboot(info):
                return self.doms[dom]
            if not restarts(info, "on_reboot"):
                return self._end(dom, info, ShutoffReason.SHUTDOWN)
            with self._running(dom, info):
                dom.set_state(DomainState.RUNNING, RunningReason.BOOTED)
            return self.doms[dom]

    def reset(self, key: Any) -> DomainInfo:
        """Press the guest's reset button (virDomainReset)."""
        with self._job(key, "reset") as dom:
            info = self._active(dom)
            self.reset_guest(info)
            return self.doms[dom]

    def destroy(self, key: Any, graceful: bool = False) -> DomainInfo:
        """End the guest by force, or with `graceful` only if it lets itself be ended
        (virDomainDestroyFlags)."""
        with self._job(key, "destroy", Job.DESTROY) as dom:
            info = self._active(dom)
            return self._end(dom, info, ShutoffReason.DESTROYED, graceful)

    def stopped(
        self, key: Any, reason: ShutoffReason = ShutoffReason.SHUTDOWN, id: int | None = None
    ) -> DomainInfo:
        """A guest ended by itself, or crashed and waits for its end: obey `on_poweroff` or, with
        `ShutoffReason.CRASHED`, `on_crash`. For whoever supervises guests.

        With `id` only if the domain has it still; does nothing for an inactive domain. Raises
        `DomainNotFound` if another worker was faster, and the domain was transient.
        """
        event = {ShutoffReason.SHUTDOWN: "on_poweroff", ShutoffReason.CRASHED: "on_crash"}
        with self._job(key, "stopped", Job.DESTROY) as dom:
            info = self.doms[dom]
            if not info.is_active or id not in (None, info.id):
                return info
            return self._obey(dom, info, event.get(reason, ""), reason)

    # --- parts ---

    def _accepted(self, xml: DomainDef | str | bytes) -> DomainDef:
        definition = xml if isinstance(xml, DomainDef) else DomainDef.from_xml(xml)
        self.check(definition)
        return definition

    def _active(self, dom: Any) -> DomainInfo:
        info = self.doms[dom]
        if not info.is_active:
            raise DomainInactive("domain is not running")
        return info

    def _settle_namesake(self, definition: DomainDef) -> None:
        """Settle what a dead worker left of the domain that this definition is of."""
        uuid = definition.uuid
        key: dict[str, Any] = {"uuid": uuid} if uuid else {"name": definition.name}
        info = self.doms.peek(**key, definitions=True)
        if info is not None and not self._is_settled(info):
            self._settle_one(info)

    # --- watch ---

    def supervise(self) -> Election:
        """Take part in watching the guests of this host: of all workers that call this, after they
        were forked, one does, and another one goes on when it dies.

        A guest that ends by itself is off within milliseconds, by its reason, or begins anew, as
        its definition wants; one that stops is paused; what a dead worker began is finished or
        undone. Lasts until `Election.stop`, the end of its ``with`` block, or of the list. Raises
        `NoEvents`.

        >>> from shmdomains import DomainList
        >>> with Driver(DomainList()).supervise() as election:
        ...     election.running
        True
        """
        from .supervision import Supervisor

        self.doms.watch(timeout=0)  # raises at once if there are no events
        host = getattr(self.doms, "host", "")
        return self.doms.elect(_place_of(host), Supervisor(self).run)

    # --- look ---

    def get(self, key: Any) -> DomainInfo:
        """The domain with this key. Raises `DomainNotFound`."""
        return self.doms[key]

    def list(self, **filters: Any) -> Sequence[DomainInfo]:
        """The domains that match, by the filters of `DomainList.list`."""
        return self.doms.list(**filters)


def _place_of(host: str) -> str:
    """The named lock of whoever watches the guests of a host; 63 bytes at most."""
    name = f"guests of {host}" if host else "guests"
    return (
        name if len(name.encode()) <= 63 else f"guests of {sha256(host.encode()).hexdigest()[:32]}"
    )
