"""The beginning of a list in a process: its number, and what is swept up then."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import psycopg

from ..errors import (
    SegmentNotFound,
    SegmentRefused,
)
from ..lazy import LazyModule
from ..memory.domain_list import DEFAULT_EVENTS
from . import schema
from .pool import place_of
from .url import Address

if TYPE_CHECKING:
    from ..memory import asking
else:
    asking = LazyModule("shmdomains.memory.asking")


SWEEP_EVERY = 600.0
"""Seconds; see ``sweep`` in ``migrations/0001.sql``."""
SWEEP_AT_ONCE = 5000


def enter(
    conn: psycopg.Connection[Any], address: Address, host: str, events: int | None, may_make: bool
) -> tuple[int, int, bool]:
    """The number of the list, how many events it keeps, and whether it was made now."""
    made, row = False, _list_of(conn, address)
    if row is None and may_make:
        wanted = DEFAULT_EVENTS if events is None else events
        try:
            made = schema.make_list(conn, address.list, wanted, host, place_of(host))
        except psycopg.errors.InsufficientPrivilege as exc:
            raise SegmentRefused(
                f"{address.shown}: {exc.diag.message_primary}. There is no such list that this "
                "role may use. An administrator makes it: shmdomains postgres init --role "
                f"{conn.info.user} --list {shlex.quote(address.list)} URL"
            ) from None
        row = _list_of(conn, address)
    if row is None:
        raise SegmentNotFound(f"there is no list {address.shown}")
    return int(row[0]), int(row[1]), made


def sweep(conn: psycopg.Connection[Any], list_number: int) -> None:
    """Now and then, remove what sessions and processes left that are over."""
    due = conn.execute(
        "UPDATE counters SET swept = clock_timestamp() WHERE list = %s "
        "AND swept < clock_timestamp() - make_interval(secs => %s)",
        [list_number, SWEEP_EVERY],
    )
    if due.rowcount:
        conn.execute("SELECT sweep(%s, %s)", [list_number, SWEEP_AT_ONCE])


def _list_of(conn: psycopg.Connection[Any], address: Address) -> tuple[Any, ...] | None:
    try:
        found: tuple[Any, ...] | None = conn.execute(
            "SELECT list, events_max FROM lists WHERE name = %s", [address.list]
        ).fetchone()
    except psycopg.errors.UndefinedTable:
        return None
    return found
