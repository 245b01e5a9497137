"""`QemuDriver`: the hooks of `Driver`, with a QEMU per domain.

A guest is made stopped, its record gets pid, start time and monitor, and only then may it run. The
driver keeps nothing: where a guest's files are follows from the list, the domain's id and its uuid,
so any worker finds the guest of any domain, also one whose worker died before it could say its pid.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

from ... import (
    AnyDomainList,
    DomainDef,
    DomainInfo,
    DomainState,
    DriverError,
    PausedReason,
    RunningReason,
    ShutoffReason,
)
from ...text import shown_path
from ..base import Driver
from ..hooks import Launched, News, Orphan
from . import events, process
from .command import command
from .monitor import MonitorError, Say, execute, talk
from .process import Guest
from .words import Place

PATIENCE = 10.0  # seconds that QEMU gets to end by itself, as in libvirt
_UNPLUG = 5.0  # seconds that a guest gets to give up a vCPU, as in libvirt
_DYING = 1.0  # seconds that a process which was killed has to go
_SLICE = 0.02  # seconds between two looks at what QEMU or the guest is about to do
_OFF = events.STOPPED
_SEEN: dict[str, tuple[DomainState, int]] = {
    "running": (DomainState.RUNNING, RunningReason.UNPAUSED),
    "paused": (DomainState.PAUSED, PausedReason.UNKNOWN),
    "io-error": (DomainState.PAUSED, PausedReason.IOERROR),
    "watchdog": (DomainState.PAUSED, PausedReason.WATCHDOG),
    "internal-error": (DomainState.PAUSED, PausedReason.UNKNOWN),
}
"""What `query-status` says of one that has not, as the record does."""
_NOWHERE = UUID(int=0)
_REBOOT = "reboot"  # the file that says that the guest is to begin anew when it has powered off


class QemuDriver(Driver):
    """A driver whose guests are QEMUs, of the processes' own user.

    `directory` is where the guests' sockets are, and belongs to this list alone; without it, it is
    made from the list's name, in ``shmdomains-qemu`` in ``/run`` (root) or ``$XDG_RUNTIME_DIR``.
    `timeout` as in `Driver`. `qmp_timeout`: the seconds that QEMU gets to answer.

    >>> from shmdomains import DomainList
    >>> driver = QemuDriver(DomainList(), directory="/run/agent/guests")
    >>> driver.define("<domain type='kvm'><name>a</name><memory>1024</memory>"
    ...               "<os><type arch='s390x'>hvm</type></os></domain>")
    Traceback (most recent call last):
    ...
    shmdomains.errors.DefinitionError: the QEMU driver does not know arch='s390x'; ...
    """

    name: ClassVar[str] = "qemu"

    def __init__(
        self,
        doms: AnyDomainList,
        timeout: float | None = 30.0,
        *,
        directory: str | os.PathLike[str] | None = None,
        qmp_timeout: float = 10.0,
    ) -> None:
        super().__init__(doms, timeout)
        self.directory = default_directory(doms) if directory is None else Path(directory)
        self.qmp_timeout = qmp_timeout
        self._life = hashlib.sha256(repr(doms.info.created).encode()).hexdigest()[:4]
        if not self.directory.is_absolute():
            raise ValueError(
                f"{shown_path(self.directory)} is not absolute; any worker must find it"
            )

    # --- where a guest is -----------------------------------------------------------------

    def place(self, info: DomainInfo) -> Place:
        """Where the sockets of the domain's guest are."""
        return Place(str(self._directory(info)), kvm_is_usable())

    def qmp(self, info: DomainInfo, command: str, **arguments: Any) -> Any:
        """Say one command to the guest's monitor (virsh's qemu-monitor-command). Raises
        `DriverError`."""
        return execute(self.place(info).monitor, command, self.qmp_timeout, **arguments)

    def status(self, info: DomainInfo) -> str:
        """QEMU's word for the guest's state (``query-status``): ``running``, ``paused``,
        ``shutdown``, ..."""
        return str(self.qmp(info, "query-status")["status"])

    def _directory(self, info: DomainInfo) -> Path:
        """As the record says, which may come from another list (`import`); before it says so, what
        follows from the list and the domain."""
        said = info.data.get("monitor") if hasattr(info.data, "get") else None
        if info.pid is not None and isinstance(said, str):
            return Path(said).parent
        return process.directory_of(self.directory, info.id, info.uuid, self._life)

    def _guest(self, info: DomainInfo) -> Guest | None:
        """The guest of the record; ``None`` if the record has none, or not the start time."""
        data = info.data
        started = data.get("started") if hasattr(data, "get") else None
        if info.pid is None or not isinstance(started, int):
            return None
        return Guest(info.pid, started, info.id, info.uuid, self._directory(info))

    # --- hooks ----------------------------------------------------------------------------

    def check(self, definition: DomainDef) -> None:
        command(definition, definition.uuid or _NOWHERE, Place("/", kvm_is_usable()))

    def launch(self, info: DomainInfo) -> Launched:
        definition, place = info.definition, self.place(info)
        words = command(definition, info.uuid, place)
        guest = process.launch(Path(place.directory), words)
        shown = talk(place.monitor, lambda say: _prepare(say, definition), self.qmp_timeout)
        data = {"monitor": place.monitor, "started": guest.started, **shown}
        return Launched(guest.pid, guest.started, data)

    def go(self, info: DomainInfo) -> None:
        self.qmp(info, "cont")

    def pause(self, info: DomainInfo) -> None:
        self.qmp(info, "stop")

    def unpause(self, info: DomainInfo) -> None:
        async def unless_off(say: Say) -> None:
            if (await say("query-status"))["status"] not in _OFF:
                await say("cont")

        talk(self.place(info).monitor, unless_off, self.qmp_timeout)

    def ask_shutdown(self, info: DomainInfo) -> bool:
        Path(self.place(info).directory, _REBOOT).unlink(missing_ok=True)
        self.qmp(info, "system_powerdown")
        return False

    def ask_reboot(self, info: DomainInfo) -> bool:
        """As libvirt does it: the guest is asked to power off, and then begins anew
        (`finish_reboot`); no machine has a button for that."""
        asked = Path(self.place(info).directory, _REBOOT)
        if (info.definition.on_reboot or "restart").endswith("restart"):
            asked.touch()
        else:
            asked.unlink(missing_ok=True)
        self.qmp(info, "system_powerdown")
        return False

    def finish_reboot(self, info: DomainInfo) -> bool:
        """For whoever sees that the guest has powered off: whether that was `reboot`'s doing, and
        it has begun anew."""
        asked = Path(self.place(info).directory, _REBOOT)
        if not asked.exists():
            return False

        async def again(say: Say) -> None:
            await say("system_reset")
            while (await say("query-status"))["status"] in _OFF:
                await asyncio.sleep(_SLICE)  # QEMU resets when its main loop comes to it
            await say("cont")

        talk(self.place(info).monitor, again, self.qmp_timeout)
        asked.unlink(missing_ok=True)
        return True

    def reset_guest(self, info: DomainInfo) -> None:
        self.qmp(info, "system_reset")

    def kill(self, info: DomainInfo, graceful: bool = False) -> None:
        guest = self._guest(info)
        if guest is not None and not process.end(guest, PATIENCE, force=not graceful):
            number = "SIGTERM" if graceful else "SIGKILL"
            text = f"Failed to terminate process {guest.pid} with {number}: Device or resource busy"
            raise DriverError(text)
        process.clear(self._directory(info))

    def alive(self, info: DomainInfo) -> bool:
        guest = self._guest(info)
        if guest is None:
            return process.is_locked(self._directory(info))
        return process.runs(guest.pid, guest.started, guest.directory)

    def ended(self, info: DomainInfo) -> ShutoffReason | None:
        """How the guest ended by itself, or ``None`` if it has not: one that powered off is still
        there until it is killed (``-no-shutdown``), and one that is not there crashed."""
        if not self.alive(info):
            return ShutoffReason.CRASHED
        try:
            return _OFF.get(self.status(info))
        except MonitorError:
            # The kernel closes what a killed process had open a moment before it is gone.
            guest = self._guest(info)
            if self.alive(info) and (guest is None or not process.ends_soon(guest, _DYING)):
                raise
            return ShutoffReason.CRASHED

    def seen(self, info: DomainInfo) -> tuple[DomainState, int] | None:
        return _SEEN.get(self.status(info))

    def news(self, info: DomainInfo) -> AsyncIterator[News]:
        return events.follow(self.place(info).events)

    def set_guest_memory(self, info: DomainInfo, kib: int) -> None:
        async def balloon(say: Say) -> None:
            try:
                actual = (await say("query-balloon"))["actual"]
            except MonitorError as error:
                if not error.refused or kib != info.definition.memory:
                    raise
                return  # no balloon, and all of the memory
            if actual != kib << 10:
                await say("balloon", value=kib << 10)

        talk(self.place(info).monitor, balloon, self.qmp_timeout)

    def set_guest_vcpus(self, info: DomainInfo, count: int) -> None:
        talk(self.place(info).monitor, lambda say: _plug(say, count), self.qmp_timeout + _UNPLUG)

    def guest_vcpus(self, info: DomainInfo) -> int | None:
        return sum("qom-path" in place for place in self.qmp(info, "query-hotpluggable-cpus"))

    def orphans(self) -> list[Orphan]:
        found = []
        for guest in process.scan(self.directory):
            what = f"QEMU of a domain with id {guest.id}, in {shown_path(guest.directory)}"
            found.append(Orphan(guest.pid, guest.uuid, what=what))
        return found

    def end_orphan(self, orphan: Orphan) -> None:
        for guest in process.scan(self.directory):
            if (guest.pid, guest.uuid) == (orphan.pid, orphan.uuid):
                process.clear(guest.directory)


# --- parts ----------------------------------------------------------------------------------


def default_directory(doms: AnyDomainList) -> Path:
    """Where the guests of a list are, for one with a name. Two lists never share it."""
    info = doms.info
    if info.path is None:
        raise ValueError("this list has no name: say directory=, one that no other list has")
    base = Path("/run") if os.getuid() == 0 else Path(os.environ.get("XDG_RUNTIME_DIR") or "")
    if not base.is_absolute():
        raise ValueError("$XDG_RUNTIME_DIR names no directory: say directory=")
    # The same for all workers, however they spell the server, and also for a segment that is made
    # again after its end. It is short, for a socket's name has 107 bytes.
    made = info.path if info.path.startswith("/") else repr(info.created)
    name = re.sub(r"[^A-Za-z0-9.]", "_", info.name or Path(info.path).name)[:12]
    return base / "shmdomains-qemu" / f"{name}-{hashlib.sha256(made.encode()).hexdigest()[:8]}"


def kvm_is_usable() -> bool:
    """Whether this user may use ``/dev/kvm``, and there is one."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


async def _prepare(say: Say, definition: DomainDef) -> dict[str, Any]:
    """What has to be done before the guest runs, and what its record keeps for its users."""
    if definition.current_memory != definition.memory:
        await say("balloon", value=definition.current_memory << 10)
    found: dict[str, Any] = {"kvm": (await say("query-kvm"))["enabled"]}
    if any(graphics.type == "vnc" for graphics in definition.graphics):
        servers = [server for one in await say("query-vnc-servers") for server in one["server"]]
        found["vnc"] = [":".join(filter(None, (one["host"], one["service"]))) for one in servers]
    serials = [one for one in await say("query-chardev") if one["label"].startswith("serial")]
    if serials:
        found["serial"] = {one["label"]: _device_of(one["filename"]) for one in serials}
    return found


def _device_of(filename: str) -> str:
    """``pty:/dev/pts/3`` and ``disconnected:unix:/srv/s,server=on`` without QEMU's words."""
    for word in ("disconnected:", "pty:", "unix:"):
        filename = filename.removeprefix(word)
    return filename.removesuffix(",server=on")


async def _plug(say: Say, count: int) -> None:
    """Plug vCPUs in, or ask the guest to give them up; those that it began with stay."""
    places = await say("query-hotpluggable-cpus")
    used = [place for place in places if "qom-path" in place]
    free = sorted((one for one in places if "qom-path" not in one), key=_order)
    for place in free[: max(count - len(used), 0)]:
        id = "vcpu-" + "-".join(str(number) for number in _order(place))
        await say("device_add", driver=place["type"], id=id, **place["props"])
    plugged = [one for one in used if "/peripheral/" in one["qom-path"]]
    surplus = sorted(plugged, key=_order)[len(plugged) - max(len(used) - count, 0) :]
    if len(used) - count > len(plugged):
        raise MonitorError(f"a guest keeps the {len(used) - len(plugged)} vCPUs it began with")
    for place in surplus:
        await say("device_del", id=place["qom-path"].rpartition("/")[2])
    for _ in range(int(_UNPLUG / _SLICE) if surplus else 0):
        now = await say("query-hotpluggable-cpus")
        if sum("qom-path" in place for place in now) <= count:
            return
        await asyncio.sleep(_SLICE)
    if surplus:
        raise MonitorError(
            "vcpu unplug request timed out. Unplug result must be manually inspected in the domain"
        )


def _order(place: dict[str, Any]) -> tuple[int, ...]:
    return tuple(place["props"][name] for name in sorted(place["props"], reverse=True))
