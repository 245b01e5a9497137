"""Waiting until a domain, or any domain, is what the caller waits for (virDomainObjWait).

Nobody polls. A look at a domain comes with a stamp, and a sleep ends as soon as the stamp is old,
so a commit between the look and the sleep is not missed. Whoever commits makes a system call only
if somebody sleeps. A sleep is cut into slices: after each of them signal handlers run, and what a
dead writer committed and did not tell is seen.

`WaitRules` waits without any lock. `DomainWaitRules.wait` is for the domain's holder: it releases
the lock while it sleeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import (
    DomainLocked,
    DomainRemoved,
    LockOrder,
    LockTimeout,
    UncommittedChanges,
    WaitTimeout,
)
from ..names import Uuid
from .info import DomainInfo
from .store import D, Deadline, DomainBase, Filter, ListBase
from .values import not_found, one_key

if TYPE_CHECKING:
    from typing_extensions import Self


class WaitRules(ListBase[D]):
    """Waiting without a lock."""

    def wait(
        self,
        key: D | DomainInfo | Uuid | int | None = None,
        /,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
        until: Callable[[DomainInfo | None], object] | None = None,
        timeout: float | None = None,
    ) -> DomainInfo | None:
        """Wait until a domain is what `until` says; returns its `DomainInfo`. Takes no lock.

        One key, as for `get`. The domain is followed, not the key: renaming it does not end the
        wait. ``until(info)`` is asked for the committed state, at first and after each change; of
        changes that follow fast upon each other it sees the last one. Once the domain is removed,
        ``until(None)`` is asked: if that is true, ``None`` is returned. Without `until` the wait
        ends with the next change. `timeout` in seconds; 0 asks once and waits for nothing.

        Raises `DomainNotFound` (no domain has this key now), `DomainRemoved` (it was removed, and
        what is waited for cannot come any more), `WaitTimeout` (it says what the domain is now),
        and what `until` raises. A caller who holds this domain gets `DomainLocked`: `Domain.wait`
        is for him; one who holds another lock of the list gets `LockOrder`, unless `timeout` is 0.

        >>> import threading
        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> info = doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                    "<os><type>hvm</type></os></domain>")
        >>> def start():
        ...     with doms.get("web1") as dom:
        ...         dom.activate()
        >>> threading.Timer(0.01, start).start()
        >>> doms.wait("web1", until=lambda info: info and info.is_active, timeout=10).state.words
        'running'
        >>> doms.wait("web1", until=lambda info: info is None, timeout=0)
        Traceback (most recent call last):
            ...
        shmdomains.errors.WaitTimeout: waited 0 s in vain for domain 'web1', which is running
        """
        deadline = self._deadline(timeout)
        dom = self._handle_of(key, uuid=uuid, name=name, id=id)
        if dom is None:
            raise not_found(**one_key(key, uuid, name, id))
        if timeout != 0:
            self._need_no_lock(dom)
        info, stamp = self._look(dom)
        if until is None:
            until = any_change
            if info is not None:
                info, stamp = self._next(dom, info, stamp, deadline, timeout)
        while not until(info):
            if info is None:
                raise removed(dom)
            info, stamp = self._next(dom, info, stamp, deadline, timeout)
        return info

    def _next(
        self, dom: D, info: DomainInfo, stamp: object, deadline: Deadline, timeout: float | None
    ) -> tuple[DomainInfo | None, object]:
        """The domain after its next change, and the stamp; ``None`` if that was its end."""
        while True:
            left = deadline.left()
            if left == 0:
                raise in_vain(f"domain '{info.name}', which is {info.state.words}", timeout)
            if self._sleep(dom, stamp, left):
                found, now = self._look(dom)
                if found is None or now != stamp:
                    return found, now

    def wait_any(
        self, *, until: Callable[[DomainInfo], object], timeout: float | None = None
    ) -> DomainInfo:
        """Wait until some domain is what `until` says, one that does not exist yet included;
        returns its `DomainInfo`. Takes no lock.

        ``until(info)`` is asked for each domain once, and again whenever it has changed; never for
        one that was removed. `timeout` in seconds; 0 asks once for each. Raises `WaitTimeout`, what
        `until` raises, and `LockOrder` if the caller holds a lock of the list, unless `timeout`
        is 0. After each change of the list all records are looked at for what changed, which takes
        about 10 ns a domain.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> info = doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                    "<os><type>hvm</type></os></domain>")
        >>> doms.wait_any(until=lambda info: not info.is_active).name
        'web1'
        """
        deadline = self._deadline(timeout)
        if timeout != 0:
            self._need_no_lock(None)
        marks = self._marks()
        while True:
            stamp, left = self._list_stamp(), deadline.left()
            for info in self._changed(marks):
                if until(info):
                    return info
            if left == 0:
                raise in_vain(f"any of {self._count(Filter())} domains", timeout)
            # After a slice in which nothing was told, too: a writer may have died before it told.
            self._sleep_on_list(stamp, left)

    def _need_no_lock(self, dom: D | None) -> None:
        if dom is not None and dom.is_locked:
            raise DomainLocked(
                f"{self._this} holds domain {dom.uuid}, so nobody can change it: use dom.wait(), "
                "which releases it meanwhile"
            )
        need_no_other_lock(self, None)


class DomainWaitRules(DomainBase):
    """Waiting for a domain that the caller has locked."""

    __slots__ = ()

    def wait(self, until: Callable[[Self], object], timeout: float | None = None) -> None:
        """Wait, with the domain locked, until ``until(dom)`` is true; then it is locked
        (virDomainObjWait).

        `until` is asked with the lock held, at first and after each change. In between the lock is
        free, and others change the domain: whatever was read before may be old. Of that no trace is
        left in ``with`` blocks, which go on. What the caller intends (`intend`) stays, and is
        `unfinished` for others meanwhile.

        With the domain still locked it raises `UncommittedChanges` (others could not see them;
        commit or roll back first), `LockOrder` (the caller holds the list lock, or another domain,
        and somebody may need that), and what `until` raises. `DomainRemoved` leaves nothing locked,
        and so does an error while it sleeps or locks again, such as Ctrl-C. `WaitTimeout` comes
        after `timeout` seconds, with the domain locked, unless somebody else keeps it for more than
        a moment: `is_locked` tells. A ``with`` block ends in order in each case.

        >>> import threading
        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> info = doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                    "<os><type>hvm</type></os></domain>")
        >>> def answer():
        ...     with doms.get("web1") as dom:
        ...         dom.data = "the guest is up"
        >>> with doms.get("web1") as dom:
        ...     threading.Timer(0.01, answer).start()
        ...     dom.wait(lambda dom: dom.data is not None, timeout=10)
        ...     dom.data
        'the guest is up'
        """
        deadline = self._doms._deadline(timeout)
        while True:
            if self.changed:
                raise UncommittedChanges(
                    f"domain '{self.name}' has changes that nobody would see while this waits: "
                    "commit() or rollback() first"
                )
            need_no_other_lock(self._doms, self)
            if until(self):
                return
            left = deadline.left()
            if left == 0:
                raise in_vain(f"domain '{self.name}', which is {self.state.words}", timeout)
            try:
                self._wait_for_change(left)
            except LockTimeout as exc:
                raise self._in_vain_and_unlocked(timeout, exc) from exc

    def _in_vain_and_unlocked(self, timeout: float | None, why: LockTimeout) -> Exception:
        info, _ = self._doms._look(self)
        if info is None:
            return DomainRemoved(f"domain {self.uuid} was removed while this waited for it")
        what = f"domain '{info.name}', which is {info.state.words} and not locked any more ({why})"
        return in_vain(what, timeout)


def need_no_other_lock(doms: ListBase[Any], dom: DomainBase | None) -> None:
    """Raise `LockOrder` if this thread holds a lock of the list other than this domain's: whoever
    could end the sleep may wait for it."""
    if not doms.is_locked and not doms._holds_other(dom):
        return
    held = "the list lock" if doms.is_locked else "another domain" if dom else "a domain"
    raise LockOrder(
        f"{doms._this} holds {held} and would sleep until somebody changes something, who may need "
        "it: unlock it first"
    )


def removed(dom: DomainBase) -> DomainRemoved:
    """The error of a wait for a domain that is gone."""
    return DomainRemoved(f"domain {dom.uuid} was removed; what was waited for cannot come any more")


def any_change(_info: DomainInfo | None) -> bool:
    """What a wait without `until` waits for."""
    return True


def in_vain(what: str, timeout: float | None) -> WaitTimeout:
    """The error of a wait that was too long."""
    return WaitTimeout(f"waited {timeout or 0:g} s in vain for {what}")
