"""What a storm on several hosts adds: their names, a server that is killed, what becomes of work.

A server that is killed takes all locks with it. Workers get one of three errors, and each is judged
by what it promises: after `LockLost` on leaving a domain, and after `Unavailable`, nothing of the
change may be there; after `InDoubt` it may be, and `settle` finds out which way it went.

The server is the storm's own, in a folder of its own: killing it hurts nobody else.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import opening
from ..errors import InDoubt, LockLost, ShmDomainsError, Unavailable
from .journal import Intent, Journal, Kind, Plan, Word, Wrong, settle

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import BaseContext
    from multiprocessing.process import BaseProcess

    from ..opening import AnyDomainList

OUTAGE = (LockLost, InDoubt, Unavailable)
"""What only a list on a server raises."""

_COUNTED = {LockLost: Word.LOST, InDoubt: Word.DOUBTED, Unavailable: Word.AWAY}
MEAN_LIFE = 1.0
"""Seconds that the server runs until it is killed, on average, beside `_LEAST_LIFE`."""
_LEAST_LIFE = 0.5


def host_of(worker: int, hosts: int) -> str:
    """The host that a worker is on.

    >>> [host_of(worker, 2) for worker in range(4)]
    ['host1', 'host2', 'host1', 'host2']
    """
    return f"host{worker % hosts + 1}"


def on_its_host(doms: AnyDomainList, plan: Plan, worker: int) -> AnyDomainList:
    """The list as a worker of another host opens it."""
    if plan.hosts < 2:
        return doms
    os.environ["SHMDOMAINS_HOST"] = host_of(worker, plan.hosts)
    found: AnyDomainList = patiently(
        plan, lambda: opening.attach(plan.url, timeout=plan.lock_timeout)
    )
    return found


def patiently(plan: Plan, what: Callable[[], Any]) -> Any:
    """Do it, as often as the server is killed meanwhile; not for ever."""
    end = time.monotonic() + plan.lock_timeout
    while True:
        try:
            return what()
        except OUTAGE:
            if not plan.server_dies or time.monotonic() > end:
                raise


def judge(
    doms: AnyDomainList, journal: Journal, plan: Plan, worker: int, error: ShmDomainsError
) -> None:
    """After an operation that a killed server cut short: find out what it did, and raise `Wrong` if
    that is not what the error promises."""
    page = journal.pages[worker]
    page.add(_COUNTED[type(error)])
    intent, target, value = page.words[: Word.VALUE + 1]
    if intent == Intent.NOTHING:
        return
    # A commit in the midst of a transaction may be there although the lock is lost.
    may_be = isinstance(error, InDoubt) or page.words[Word.DOING] == Kind.ROLL_BACK + 1
    patiently(plan, lambda: settle(doms, journal, plan, worker, plan.lock_timeout))
    if intent == Intent.CHANGE and not may_be and page.acked[target] == value:
        raise Wrong(
            f"lost: worker {worker} was told that its change was not applied, and it is there: "
            f"{type(error).__name__}: {error}"
        )


class Server:
    """The server of one storm, in a temporary folder; `end` removes it."""

    def __init__(self) -> None:
        from ..postgres import embedded

        self._embedded = embedded
        self._folder = Path(tempfile.mkdtemp(prefix="shmdomains-stress-"))
        self._path = self._folder / "server"
        self.url = f"postgresql+embedded://{self._path}"
        self.kills = 0
        self._kill_at = float("inf")
        self._starter: BaseProcess | None = None

    def choose_end(self) -> None:
        """From now on it is killed at random moments."""
        self._kill_at = time.monotonic() + _LEAST_LIFE + random.expovariate(1 / MEAN_LIFE)

    def spare(self) -> None:
        """Kill it no more; returns when it runs."""
        self._kill_at = float("inf")
        if self._starter is not None:
            self._starter.join()
            self._look_at_starter()

    def look(self, context: BaseContext) -> None:
        """Kill it if its time has come; another process starts it again, so that workers meet
        a server that is away."""
        self._look_at_starter()
        if self._starter is None and time.monotonic() > self._kill_at:
            self._kill()
            starter = context.Process(  # type: ignore[attr-defined]
                target=_start, args=(self._path,), daemon=True
            )
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                starter.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._starter = starter

    def _look_at_starter(self) -> None:
        if self._starter is not None and self._starter.exitcode is not None:
            self._starter.join()
            self._starter.close()
            self._starter = None
            if self._kill_at != float("inf"):
                self.choose_end()

    def _kill(self) -> None:
        """SIGKILL for all its processes at one moment. The first is stopped before, so that it
        starts no other meanwhile."""
        import psutil

        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(int((self._path / "server").read_text().split()[0]))
            main.suspend()
            for one in [*main.children(recursive=True), main]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            self.kills += 1

    def end(self) -> None:
        self._embedded.stop(self._path)
        shutil.rmtree(self._folder)


def _start(path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the storm's
    from ..postgres import embedded

    embedded.server(path)
