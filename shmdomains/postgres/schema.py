"""The schema of the second store: made and upgraded by itself, in order, under a lock.

Each file in ``migrations`` is one step; its number stands in ``shmdomains.migrations`` once it is
done. Steps only add, so that programs of an older version go on while a newer one upgrades. A role
that may not create a schema is told the one command that an administrator runs.
"""

from __future__ import annotations

import os
from importlib import resources
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..errors import SegmentMismatch, SegmentRefused
from ..memory._core import core

if TYPE_CHECKING:
    import psycopg

SCHEMA = "shmdomains"
_LOCK = (23808 + 8) << 48
"""The advisory lock of whoever changes the schema; see ``migrations/0001.sql``."""


def steps() -> list[tuple[int, str]]:
    """The migrations, by number.

    >>> [number for number, _ in steps()][0]
    1
    """
    folder = resources.files(__package__) / "migrations"
    files = [file for file in folder.iterdir() if file.name.endswith(".sql")]
    return sorted((int(file.name[:-4]), file.read_text(encoding="utf-8")) for file in files)


def version_of(conn: psycopg.Connection[Any]) -> int:
    """The number of the last step that was done; 0: none."""
    row = conn.execute("SELECT to_regclass('shmdomains.migrations') IS NOT NULL").fetchone()
    if row is None or not row[0]:
        return 0
    found = conn.execute("SELECT max(number) FROM shmdomains.migrations").fetchone()
    return 0 if found is None or found[0] is None else int(found[0])


def ensure(conn: psycopg.Connection[Any], shown: str) -> None:
    """Make or upgrade the schema if need be.

    Raises `SegmentRefused` if this role may not, and `SegmentMismatch` if the schema is of a newer
    version than this one can use.
    """
    import psycopg

    wanted = steps()[-1][0]
    try:
        there = version_of(conn)
        if there < wanted:
            upgrade(conn)
            there = version_of(conn)
    except psycopg.errors.InsufficientPrivilege as exc:
        what = str(exc.diag.message_primary or exc)
        raise SegmentRefused(
            f"{shown}: {what}. The schema '{SCHEMA}' is made once by an administrator: "
            f"shmdomains postgres init --role {quote(conn.info.user)} URL"
        ) from None
    if there > wanted:
        raise SegmentMismatch(
            f"{shown} has version {there} of the schema '{SCHEMA}', and this program knows "
            f"{wanted}: upgrade the program"
        )


def upgrade(conn: psycopg.Connection[Any]) -> None:
    """Do the steps that are left, each in a transaction, one process at a time."""
    conn.execute("SELECT pg_advisory_lock(%s)", [_LOCK])
    try:
        there = version_of(conn)
        for number, text in steps():
            if number > there:
                _step(conn, number, text)
    finally:
        conn.execute("SELECT pg_advisory_unlock(%s)", [_LOCK])


def _step(conn: psycopg.Connection[Any], number: int, text: str) -> None:
    with conn.transaction():
        conn.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        conn.execute(f"SET LOCAL search_path = {SCHEMA}, pg_catalog")
        conn.execute(
            "CREATE TABLE IF NOT EXISTS migrations "
            "(number integer PRIMARY KEY, at timestamptz NOT NULL DEFAULT now())"
        )
        conn.execute(text.encode(), prepare=False)
        conn.execute("INSERT INTO migrations (number) VALUES (%s)", [number])


def make_list(conn: psycopg.Connection[Any], name: str, events: int, host: str, place: str) -> bool:
    """Make a list, unless it is there; returns whether it was made."""
    pid = os.getpid()
    row = conn.execute(
        "WITH made AS (INSERT INTO shmdomains.lists (name, events_max, host, place, pid, start) "
        "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (name) DO NOTHING RETURNING list) "
        "INSERT INTO shmdomains.counters (list) SELECT list FROM made RETURNING list",
        [name, events, host, place, pid, core.process_start(pid)],
    ).fetchone()
    return row is not None
