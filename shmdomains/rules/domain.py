"""One domain: libvirt's rules about it, whatever store holds its record (virDomainObj).

`DomainRules` are activation and the two definitions, written against `DomainBase`. Each store
mixes them into its own handles.
"""

from __future__ import annotations

from ..errors import DomainActive, DomainInactive
from ..states import DomainState, RunningReason, ShutoffReason
from .store import DomainBase
from .values import checked_pid, checked_reason, checked_state


class DomainRules(DomainBase):
    """Operations on a locked domain. Every method needs the domain's lock."""

    __slots__ = ()

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
        timeout: float | None = None,
    ) -> int:
        """Make the domain active; returns its id, which is never used for another domain.

        `pid` is the hypervisor's process, if there is one. Commit `activate` first, then start the
        process, then set `pid`: otherwise a worker that is killed in between leaves a process that
        no record mentions. Part of the transaction: others see it after `commit()` or `unlock()`;
        a rollback wastes the id. Raises `DomainActive`, `DomainNotLocked`, `SegmentFull` when the
        ids are used up, and `LockTimeout` when the id lock was not free within `timeout` seconds.

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
        id = self._take_id(timeout)
        self.pid = pid
        self.set_state(state, reason)
        return id

    def deactivate(self, reason: int = ShutoffReason.UNKNOWN) -> None:
        """Make the domain inactive: id -1, no pid, state SHUTOFF; `next_definition` becomes live.

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
