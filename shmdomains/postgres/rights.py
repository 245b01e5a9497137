"""Who may use which lists: what an administrator grants to a role.

Every table has row security (the end of ``migrations/0001.sql``). Its owner passes by. A role that
may use all lists has a policy that is true, so it pays nothing either. A role that may use some has
a row in ``users`` for each, and sees and changes what belongs to those lists only; the functions
run with the rights of whoever calls them.

Advisory locks have no owner: whoever may connect to the database may take any.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..memory.domain_list import DEFAULT_EVENTS
from . import schema
from .pool import place_of
from .url import this_host

if TYPE_CHECKING:
    import psycopg

_OF_LISTS = (
    *("counters", "directories", "processes", "sessions", "domains", "definitions"),
    *("removed", "mutexes", "events"),
)
_READ = ("migrations", "lives", "life", "users")
_TRIES = 20


def grant(conn: psycopg.Connection[Any], role: str, list: str | None) -> None:
    """Let a role use all lists, or one more. A role that may use all is limited to `list`."""
    import psycopg

    for left in reversed(range(_TRIES)):
        try:
            with conn.transaction():
                _grant(conn, role, list)
            return
        except psycopg.errors.LockNotAvailable:
            if not left:
                raise
            time.sleep(0.5)  # let those pass who queue behind it


def _grant(conn: psycopg.Connection[Any], role: str, list: str | None) -> None:
    from psycopg import sql

    # A change of policies needs the table for itself, and everybody else queues behind it.
    conn.execute("SET LOCAL lock_timeout = '1s'")
    conn.execute(f"SET LOCAL search_path = {schema.SCHEMA}, pg_catalog")

    def run(text: str, table: str = "", name: str = "") -> None:
        names = {"table": table, "policy": name, "role": role}
        given = {key: sql.Identifier(value) for key, value in names.items() if value}
        conn.execute(sql.SQL(text).format(**given))

    run(f"GRANT USAGE ON SCHEMA {schema.SCHEMA} TO {{role}}")
    run(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema.SCHEMA} TO {{role}}")
    for table in _READ:
        run("GRANT SELECT ON {table} TO {role}", table)
    for table in _OF_LISTS:
        run("GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {role}", table)
    run("GRANT SELECT ON lists TO {role}")
    rights = (
        "REVOKE INSERT, UPDATE, DELETE ON lists FROM"
        if list
        else "GRANT INSERT, DELETE ON lists TO"
    )
    run(f"{rights} {{role}}")

    [oid] = conn.execute("SELECT oid FROM pg_roles WHERE rolname = %s", [role]).fetchone() or [0]
    conn.execute("DELETE FROM users WHERE role = %s AND oid <> %s", [role, oid])
    policy = f"all_{oid}"
    there = conn.execute(
        "SELECT tablename FROM pg_policies WHERE schemaname = %s AND policyname = %s",
        [schema.SCHEMA, policy],
    ).fetchall()
    if list is None:
        for table in sorted({"lists", *_OF_LISTS} - {table for (table,) in there}):
            run("CREATE POLICY {policy} ON {table} TO {role} USING (true)", table, policy)
        return
    for (table,) in there:
        run("DROP POLICY {policy} ON {table}", table, policy)
    host = this_host(None)
    schema.make_list(conn, list, DEFAULT_EVENTS, host, place_of(host))
    conn.execute(
        "INSERT INTO users (role, oid, list) SELECT %s, %s, list FROM lists WHERE name = %s "
        "ON CONFLICT DO NOTHING",
        [role, oid, list],
    )


def install(conninfo: str, role: str | None = None, list: str | None = None) -> None:
    """Make or upgrade the schema as an administrator, and let `role` use it, with no more rights
    than that takes: all lists, or, of those that are named one by one, `list` too. Such a role can
    make no list, so this one is made if need be. Raises what psycopg raises."""
    import psycopg

    with psycopg.connect(conninfo, autocommit=True) as conn:
        schema.upgrade(conn)
        if role is not None:
            grant(conn, role, list)
