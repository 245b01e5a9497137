"""What a hypervisor's driver fills in.

Each hook is called with no lock held, inside a job, so nobody else works on the domain and the hook
may take its time. It gets the committed state as a `DomainInfo`. It raises `DriverError` if the
hypervisor cannot do it; then nothing is committed.

A worker may be killed inside each of them. Whoever works on the domain next calls hooks again until
the guest is what the record says. So all but `launch` have to be harmless when they have nothing
to do: to pause a paused guest, to kill one that is gone or that never came to be.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, ClassVar, NamedTuple
from uuid import UUID

from .. import DomainDef, DomainInfo, DomainState, ShutoffReason


class Launched(NamedTuple):
    """A guest that was made: its process, if it has one, when that started (clock ticks since boot,
    if the driver knows), and what the driver wants to find again in `DomainInfo.data`.

    >>> Launched(pid=4711, data={"vnc": 5900}).started is None
    True
    """

    pid: int | None = None
    started: int | None = None
    data: Any = None


class Orphan(NamedTuple):
    """A guest that was found running: its process, which domain it says it is, and what to show.

    >>> Orphan(4711, name="web1").name
    'web1'
    """

    pid: int
    uuid: UUID | None = None
    name: str | None = None
    what: str = ""


class News(NamedTuple):
    """What a guest did by itself.

    `reason`: it has ended, and how; without one, look at it: it may have stopped or gone on. `by`
    is what the definition has an answer to, ``"on_poweroff"``, ``"on_reboot"`` or ``"on_crash"``;
    empty: to nothing, its process is about to go. `over`: nothing more will be heard, if its
    process is gone.
    """

    reason: ShutoffReason | None = None
    by: str = ""
    over: bool = False


class Hooks:
    """The hooks; the defaults are those of a hypervisor whose guests are nothing but records."""

    name: ClassVar[str] = "none"
    """What the driver is called: ``--driver NAME``."""

    def check(self, definition: DomainDef) -> None:
        """Refuse what the hypervisor cannot do: `DefinitionError`, with element and line. Called
        for each definition before it gets into the list."""

    def launch(self, info: DomainInfo) -> Launched:
        """Make a guest that does not run yet (paused). If it fails it may leave parts: `kill` is
        called. See to it that `kill` finds the guest by `info.uuid` and `info.id` alone before
        there is one: a worker that is killed here has told nobody its pid."""
        return Launched()

    def go(self, info: DomainInfo) -> None:
        """Let a launched guest run."""

    def pause(self, info: DomainInfo) -> None:
        """Stop its processors."""

    def unpause(self, info: DomainInfo) -> None:
        """Let them go on."""

    def ask_shutdown(self, info: DomainInfo) -> bool:
        """Ask the guest to power off. True: it is off already. Else `Driver.stopped` is to be
        called when it is."""
        return True

    def ask_reboot(self, info: DomainInfo) -> bool:
        """Ask the guest to reboot. True: it has done so, as far as `on_reboot` lets it."""
        return True

    def reset_guest(self, info: DomainInfo) -> None:
        """Press its reset button."""

    def kill(self, info: DomainInfo, graceful: bool = False) -> None:
        """End the guest and clean up after it; when this returns, there is none. `info.pid` is
        ``None`` if the worker that launched it died too early to say. `graceful`: give up with an
        error rather than use force."""

    def alive(self, info: DomainInfo) -> bool:
        """Whether there is a guest, running or not."""
        return True

    def ended(self, info: DomainInfo) -> ShutoffReason | None:
        """How the guest ended by itself; ``None``: it has not. One that cannot be found has
        crashed."""
        return None if self.alive(info) else ShutoffReason.CRASHED

    def seen(self, info: DomainInfo) -> tuple[DomainState, int] | None:
        """Whether the guest runs or is paused, and why; ``None``: nobody can tell, so it is as its
        record says."""
        return None

    def finish_reboot(self, info: DomainInfo) -> bool:
        """The guest has powered off: if that was `ask_reboot`'s doing, let it begin anew. Whether
        it was."""
        return False

    def news(self, info: DomainInfo) -> AsyncIterator[News] | None:
        """What the guest does by itself, as it happens: asked of by whoever supervises it, on an
        asyncio loop. First of all it says what happened before it was asked. It ends when there is
        nothing more to be heard, also because the guest is gone; while the domain has this guest
        it is called again then. ``None``: there is nothing but the end of its process, which is
        seen without."""
        return None

    def set_guest_memory(self, info: DomainInfo, kib: int) -> None:
        """Give the guest so much of its memory."""

    def set_guest_vcpus(self, info: DomainInfo, count: int) -> None:
        """Give the guest so many of its processors."""

    def guest_vcpus(self, info: DomainInfo) -> int | None:
        """How many it has; ``None``: as many as its record says."""
        return None

    def orphans(self) -> list[Orphan]:
        """The guests of this driver that run on this host and may have no record; `reconcile`
        leaves out those that have."""
        return []

    def end_orphan(self, orphan: Orphan) -> None:
        """End one of them."""
