"""The ASGI application that test_servers.py has uvicorn run: server_wsgi.py in asyncio.

Each worker attaches to the list that ``COUNTERS`` names when it starts, and leaves it when it ends.
While a request holds its domain the others of the worker go on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import counters

from shmdomains import DomainList, aio

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

doms: Any = None


async def _lifespan(receive: Receive, send: Send) -> None:
    global doms
    assert (await receive())["type"] == "lifespan.startup"
    doms = aio.wrap(DomainList.attach(os.environ["COUNTERS"]))
    await send({"type": "lifespan.startup.complete"})
    assert (await receive())["type"] == "lifespan.shutdown"
    doms.plain.close()
    await send({"type": "lifespan.shutdown.complete"})


async def _add(name: str, hold: float) -> AsyncIterator[bytes]:
    yield b"%d\n" % os.getpid()
    async with doms.get(name, timeout=counters.PATIENCE, why="a request") as dom:
        before = dom.data
        yield b"held\n"
        await asyncio.sleep(hold)
        dom.data = before + 1
        died = dom.previous_owner_died is not None
    yield b"done %d\n" % died


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        return await _lifespan(receive, send)
    asked = {key: value for key, [value] in parse_qs(scope["query_string"].decode()).items()}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    async for line in _add(asked["name"], float(asked["hold"])):
        await send({"type": "http.response.body", "body": line, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
