"""QEMU's monitor (QMP), a conversation at a time: it is opened when something is to be said and
closed when that is done, so any worker may operate any guest, and none keeps the monitor to itself.

`qemu.qmp` speaks the protocol, on an asyncio loop that each conversation makes for itself: the
callers are plain threads. Everything has a deadline, the wait for another worker's conversation
included: QEMU talks to one at a time.

No connection is shared across a fork. A child that was forked meanwhile has a copy of the socket,
which would keep QEMU from noticing that the conversation is over: the child closes it, and the end
of a conversation shuts the connection down, whoever has copies.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError

from ...deadline import Deadline
from ...errors import DriverError

TIMEOUT = 10.0  # seconds for a conversation
_GREETINGS = 5

_T = TypeVar("_T")
Say = Callable[..., Awaitable[Any]]
"""``await say("balloon", value=1 << 30)`` gives what QEMU returns."""

_open: set[socket.socket] = set()


def _close_in_child() -> None:
    for connection in list(_open):
        connection.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)


class Client(QMPClient):
    """QEMU's own, which would log each guest's end as an error of its connection."""

    def __init__(self) -> None:
        super().__init__()
        self.logger = _quiet  # each client's own: it hides the class's

    async def connect(self, address: Any, ssl: Any = None) -> None:
        try:
            await super().connect(address, ssl)
        except AssertionError:  # it has a check for that
            raise QMPError("it hung up after its greeting") from None


_quiet = logging.getLogger("shmdomains.qmp")
_quiet.setLevel(logging.CRITICAL + 1)


class MonitorError(DriverError):
    """QEMU refused the command, or did not answer in time; `refused` tells which."""

    refused = False


def execute(path: str, command: str, timeout: float = TIMEOUT, **arguments: Any) -> Any:
    """Say one command to the monitor at `path`; returns what QEMU returns.

    Raises `MonitorError`.
    """
    return talk(path, lambda say: say(command, **arguments), timeout)


def talk(path: str, conversation: Callable[[Say], Awaitable[_T]], timeout: float = TIMEOUT) -> _T:
    """Connect to the monitor at `path`, and return what `conversation` returns, which may say any
    number of commands. `timeout` (seconds) is for all of it.

    Raises `MonitorError`, and whatever else the conversation raises.
    """
    deadline = Deadline(timeout)
    return _run(lambda: _talk(path, conversation, timeout, deadline))


def _run(begin: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """The coroutine's result, from a thread of its own if this one runs a loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run_here(begin)
    with ThreadPoolExecutor(1, "shmdomains-qmp") as thread:
        return thread.submit(_run_here, begin).result()


def _run_here(begin: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(begin())
    finally:
        loop.close()


async def _talk(
    path: str,
    conversation: Callable[[Say], Awaitable[_T]],
    timeout: float,
    deadline: Deadline,
) -> _T:
    client, connection = await _greeted(path, timeout, deadline)
    doing = "the greeting"

    async def say(command: str, **arguments: Any) -> Any:
        nonlocal doing
        doing = command
        try:
            return await client.execute(command, arguments or None)
        except ExecuteError as error:
            refusal = MonitorError(f"unable to execute QEMU command '{command}': {error}")
            refusal.refused = True
            raise refusal from None

    try:
        return await asyncio.wait_for(conversation(say), deadline.left())
    except asyncio.TimeoutError:
        text = f"QEMU's monitor {path} did not answer within {timeout:g} s ({doing})"
        raise MonitorError(text) from None
    except (QMPError, ExecInterruptedError, OSError, EOFError) as error:
        raise MonitorError(f"QEMU's monitor {path} broke off at {doing}: {error}") from None
    finally:
        await _end(client, connection)


async def _end(client: Client, connection: socket.socket) -> None:
    hang_up(connection)
    with suppress(QMPError, OSError, EOFError):  # QEMU may have ended
        await client.disconnect()
    connection.close()


async def _greeted(path: str, timeout: float, deadline: Deadline) -> tuple[Client, socket.socket]:
    """A conversation that has begun. What QEMU tells at the moment at which somebody connects, as
    that the guest powers off, gets among its greeting, which then cannot be understood. Nothing has
    been said by then, so it is asked anew."""
    left = _GREETINGS
    while True:
        left -= 1
        client, connection = Client(), _connected(path, deadline)
        try:
            await asyncio.wait_for(client.connect(connection), deadline.left())
            return client, connection
        except asyncio.TimeoutError:
            await _end(client, connection)
            text = f"QEMU's monitor {path} did not answer within {timeout:g} s (the greeting)"
            raise MonitorError(text) from None
        except (QMPError, OSError, EOFError) as error:
            await _end(client, connection)
            if not left:
                text = f"QEMU's monitor {path} broke off at the greeting: {error}"
                raise MonitorError(text) from None
        except BaseException:
            await _end(client, connection)
            raise


def _connected(path: str, deadline: Deadline) -> socket.socket:
    """While another talks, the kernel queues the next one, and lets others wait in `connect`; a
    socket that never blocks would be turned away."""
    connection = opened()
    try:
        connection.setblocking(True)
        left = max(deadline.left() or 0.0, 0.001)
        wait = struct.pack("ll", int(left), int(left % 1 * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        connection.connect(path)
        connection.setblocking(False)
    except OSError as error:
        hang_up(connection)
        connection.close()
        text = f"QEMU's monitor {path} cannot be reached: {error.strerror or error}"
        raise MonitorError(text) from None
    return connection


def opened() -> socket.socket:
    """A socket that does not block, for a conversation or an ear; a fork's copy of it is closed."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.setblocking(False)
    _open.add(connection)
    return connection


def hang_up(connection: socket.socket) -> None:
    """End a conversation, also for whoever has a copy of the socket."""
    _open.discard(connection)
    with suppress(OSError):  # QEMU may have hung up first
        connection.shutdown(socket.SHUT_RDWR)
