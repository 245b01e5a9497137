"""How a task of an event loop waits. `shmdomains.aio` says it when it is imported; nothing below
that knows asyncio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

Ask = Callable[..., Awaitable[Any]]

_ask: Ask | None = None


def wait_by(ask: Ask) -> None:
    """``ask(function, *args)`` calls a function that must not block until it comes to its end."""
    global _ask
    _ask = ask


def ask() -> Ask:
    """What `wait_by` was told. Raises `RuntimeError`."""
    if _ask is None:
        raise RuntimeError("'async with' needs shmdomains.aio: doms = shmdomains.aio.wrap(doms)")
    return _ask
