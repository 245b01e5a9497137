"""A driver whose guests are processes that sleep: what the drivers promise is tried on them.

A guest is found without a pid, as `Hooks.launch` wants it: its process has the domain's UUID in its
environment, and from before it is forked a lock on the domain's file, which the kernel frees when
the last process that inherited it is gone.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

from killing import until

from shmdomains import AnyDomainList, DomainInfo, DriverError
from shmdomains.drivers import Driver, Launched, Orphan

DEADLINE = 10.0


class SleepDriver(Driver):
    """Guests are `sleep`s; a paused one is stopped."""

    name: ClassVar[str] = "sleep"

    def __init__(self, doms: AnyDomainList, place: Path, timeout: float | None = DEADLINE) -> None:
        super().__init__(doms, timeout)
        self.place = place

    def launch(self, info: DomainInfo) -> Launched:
        lock = os.open(self.place / str(info.uuid), os.O_CREAT | os.O_RDWR)
        try:
            # Whoever asks whether a guest lives has it for a moment; a guest would keep it.
            until(lambda: _taken(lock, fcntl.LOCK_EX), "the end of the guest before", DEADLINE)
            guest = subprocess.Popen(
                ["sleep", "1000"],
                env={**os.environ, "GUEST": f"{self.place}:{info.uuid}"},
                pass_fds=[lock],
                start_new_session=True,
            )
        finally:
            os.close(lock)
        guest.send_signal(signal.SIGSTOP)
        # It stops when its `exec` is over: before that its environment is not to be seen.
        until(lambda: state(guest.pid) in ("T", "Z", ""), "the guest")
        guest.returncode = 0  # others may wait for it
        return Launched(guest.pid, data={"of": info.id})

    def go(self, info: DomainInfo) -> None:
        self._signal(info, signal.SIGCONT)

    def pause(self, info: DomainInfo) -> None:
        self._signal(info, signal.SIGSTOP)

    def unpause(self, info: DomainInfo) -> None:
        self._signal(info, signal.SIGCONT)

    def kill(self, info: DomainInfo, graceful: bool = False) -> None:
        self.end(info.uuid)

    def end(self, uuid: UUID) -> None:
        """When this returns, the domain has no process any more."""
        end = time.monotonic() + DEADLINE
        while self.lives(uuid):
            for pid, _ in self.guests(uuid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > end:
                raise DriverError(f"the guest of domain {uuid} does not end")

    def alive(self, info: DomainInfo) -> bool:
        return self.lives(info.uuid)

    def lives(self, uuid: UUID) -> bool:
        try:
            with (self.place / str(uuid)).open("r+") as lock:
                return not _taken(lock.fileno(), fcntl.LOCK_SH)  # two who ask do not meet
        except FileNotFoundError:
            return False

    def orphans(self) -> list[Orphan]:
        return [Orphan(pid, uuid) for pid, uuid in self.guests()]

    def end_orphan(self, orphan: Orphan) -> None:
        assert orphan.uuid is not None
        self.end(orphan.uuid)

    # --- for the tests ---

    def guests(self, uuid: UUID | None = None) -> list[tuple[int, UUID]]:
        """The processes, and of which domains they are."""
        found = []
        mark = f"GUEST={self.place}:".encode()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError), open(f"/proc/{pid}/comm") as name:
                if name.read() != "sleep\n":
                    continue
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                own = [word.removeprefix(mark) for word in words if word.startswith(mark)]
                found += [(int(pid), UUID(one.decode())) for one in own]
        return [one for one in found if uuid in (None, one[1])]

    def disagreements(self) -> list[str]:
        """What record and guest do not say alike."""
        said = []
        guests = self.guests()
        for info in self.doms:
            mine = [pid for pid, uuid in guests if uuid == info.uuid]
            if len(mine) != info.is_active:
                said.append(f"{info!r} has guests {mine}")
            elif info.is_active and (mine[0] != info.pid or stopped(mine[0]) != paused(info)):
                said.append(f"{info!r} of pid {info.pid} has guest {mine[0]}")
            if not info.is_active and not info.persistent:
                said.append(f"{info!r} is transient and does not run")
        known = {info.uuid for info in self.doms}
        said += [f"guest {pid} has no record" for pid, uuid in guests if uuid not in known]
        return said

    def _signal(self, info: DomainInfo, number: int) -> None:
        if not self.alive(info) or info.pid is None:
            raise DriverError(f"domain '{info.name}' has no guest")
        os.kill(info.pid, number)
        # The kernel is done with it only later, on a busy machine.
        wanted = number == signal.SIGSTOP
        until(lambda: not self.alive(info) or stopped(info.pid) == wanted, "the signal's effect")


def _taken(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def paused(info: DomainInfo) -> bool:
    return info.state.words == "paused"


def stopped(pid: int) -> bool:
    """Whether the process was stopped; False if it is gone."""
    return state(pid) == "T"


def state(pid: int) -> str:
    """The kernel's letter; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@contextmanager
def sleep_driver(doms: Any, place: Path) -> Iterator[SleepDriver]:
    """A driver none of whose guests outlives the block."""
    driver = SleepDriver(doms, place)
    try:
        yield driver
    finally:
        for orphan in driver.orphans():
            driver.end_orphan(orphan)
