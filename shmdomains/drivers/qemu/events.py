"""What a QEMU says by itself, over its second monitor, which is for whoever supervises it.

QEMU talks to one client at a time there. While an older supervisor still has the connection, or
QEMU is stopped, this waits: the guest's process is watched without it. When a connection begins,
the guest is asked how it is, so nothing that happened before is missed.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from qemu.qmp import ExecuteError, QMPError

from ... import ShutoffReason
from ..hooks import News
from .monitor import Client, hang_up, opened

STOPPED = {"shutdown": ShutoffReason.SHUTDOWN, "guest-panicked": ShutoffReason.CRASHED}
"""What `query-status` says of a guest that has ended, and how it did."""
_LOOK = News()
_OFF = News(ShutoffReason.SHUTDOWN, "on_poweroff")
_RESET = News(ShutoffReason.SHUTDOWN, "on_reboot")
_PANICKED = News(ShutoffReason.CRASHED, "on_crash")
_ENDED_FROM_OUTSIDE = News(ShutoffReason.SHUTDOWN)
"""By a signal or `quit`; its process is about to go."""
_OF_A_STATUS = {"shutdown": _OFF, "guest-panicked": _PANICKED}
_LOOKS = ("STOP", "RESUME", "SUSPEND", "WAKEUP")


async def follow(path: str) -> AsyncIterator[News]:
    """What the guest whose events are at `path` does, until QEMU hangs up."""
    with suppress(QMPError, ExecuteError, OSError, EOFError):
        connection = opened()
        client = Client()
        try:
            connection.connect(path)  # it does not block; if it would it fails
            await client.connect(connection)
            async for news in _told(client):
                yield news
        finally:
            await _close(client, connection)


async def _told(client: Client) -> AsyncIterator[News]:
    try:
        now: Any = await client.execute("query-status")
        yield _OF_A_STATUS.get(now["status"], _LOOK)
    except QMPError:  # it has hung up meanwhile, and may have said why
        pass
    ended = asyncio.ensure_future(client.runstate_changed())
    try:
        while True:
            event = asyncio.ensure_future(client.events.get())
            try:
                await asyncio.wait((event, ended), return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not event.done():
                    event.cancel()
            if event.cancelled() or not event.done():
                return
            news = of_event(event.result())
            if news is not None:
                yield news
    finally:
        ended.cancel()


def of_event(event: Any) -> News | None:
    """What an event of QEMU's says of the guest; ``None``: nothing that the record has.

    >>> of_event({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}}).by
    'on_reboot'
    """
    name, data = event["event"], event.get("data") or {}
    if name == "SHUTDOWN":
        if str(data.get("reason", "")).endswith(("-reset", "-system-reset")):
            return _RESET  # -action reboot=shutdown
        return _OFF if data.get("guest") else _ENDED_FROM_OUTSIDE
    if name == "GUEST_PANICKED":
        return _PANICKED
    return _LOOK if name in _LOOKS else None


async def _close(client: Client, connection: socket.socket) -> None:
    hang_up(connection)
    ending = asyncio.ensure_future(_disconnect(client))
    try:
        await asyncio.shield(ending)
    except (
        asyncio.CancelledError
    ):  # in the middle it would leave tasks behind that nobody waits for
        await ending
        raise
    finally:
        connection.close()


async def _disconnect(client: Client) -> None:
    with suppress(QMPError, OSError, EOFError):  # QEMU may have ended
        await client.disconnect()
