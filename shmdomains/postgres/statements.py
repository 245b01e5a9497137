"""What the store asks the server: the statements, by what they are for.

Values stand for ``$1`` to ``$n`` and never become part of a text. What the functions do stands in
``migrations/0001.sql``.
"""

from __future__ import annotations

from functools import lru_cache

from .records import COLUMNS
from .session import Statement, number, truth

DOMAIN, LIST = 1, 2
"""Kinds of locks, in their keys; the third one are mutexes."""

# The locks answer with one composite value (`session.fields`), which the server makes in less time
# than a row from a function.
LOCK_LIST = Statement("SELECT lock_list($1, $2, $3)", "bigint", "bigint", "int")
UNLOCK_LIST = Statement("SELECT unlock_list($1)", "bigint")
LOCK = Statement(
    "SELECT lock_domain($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
    *("bigint", "bigint", "bigint", "bigint", "bigint", "uuid", "text", "int", "bigint[]", "int"),
)
UNLOCK = Statement("SELECT unlock_domain($1, $2, $3)", "bigint", "bigint", "bool")
COMMIT = Statement(
    f"SELECT commit_domain({', '.join(f'${place}' for place in range(1, 28))})",
    *("bigint", "bigint", "bigint", "bigint", "bigint"),
    *("text", "int", "smallint", "int", "bool", "bool", "int", "bigint", "text"),
    *("bool", "bytea", "bool", "bytea", "bool", "bytea", "text", "bool", "bytea", "text"),
    *("int", "jsonb", "bool"),
)
COMMIT_STATE = Statement(
    f"SELECT commit_state({', '.join(f'${place}' for place in range(1, 13))})",
    *("bigint", "bigint", "bigint", "bigint", "bigint", "smallint", "int", "bool", "bytea"),
    *("int", "jsonb", "bool"),
)
INSERT = Statement(
    f"SELECT * FROM insert_domain({', '.join(f'${place}' for place in range(1, 14))})",
    *(
        "bigint",
        "bigint",
        "bigint",
        "bigint",
        "uuid",
        "text",
        "smallint",
        "bool",
        "bytea",
        "text",
        "bytea",
    ),
    *("int", "jsonb"),
)
REMOVE = Statement(
    "SELECT remove_domain($1, $2, $3, $4, $5, $6, $7)",
    *("bigint", "bigint", "bigint", "bigint", "bigint", "int", "jsonb"),
)
NEXT_ID = Statement("SELECT next_id($1)", "bigint")
HELD = Statement(
    "SELECT ((classid::bigint & 65535) << 32) | objid::bigint, (classid::bigint >> 16) - 23808 "
    "FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND granted "
    "AND pid = pg_backend_pid() AND (classid::bigint >> 16) - 23808 BETWEEN 1 AND 3"
)

NAME_MUTEX = Statement(
    "INSERT INTO mutexes (list, name) SELECT $1, $2 "
    "WHERE (SELECT count(*) FROM mutexes WHERE list = $1) < $3 "
    "ON CONFLICT (list, name) DO NOTHING",
    *("bigint", "text", "int"),
)
MUTEX = Statement("SELECT mutex FROM mutexes WHERE list = $1 AND name = $2", "bigint", "text")
LOCK_MUTEX = Statement(
    "SELECT lock_mutex($1, $2, $3, $4, $5)",
    *("bigint", "bigint", "bigint", "bigint[]", "int"),
)
UNLOCK_MUTEX = Statement("SELECT unlock_mutex($1, $2, $3)", "bigint", "bigint", "bool")


def unlock(kind: int, which: int, session: int) -> tuple[Statement, list[bytes | None]]:
    """What frees a lock of this session that `HELD` names; nobody was told of a death."""
    if kind == LIST:
        return UNLOCK_LIST, [number(which)]
    statement = UNLOCK if kind == DOMAIN else UNLOCK_MUTEX
    return statement, [number(which), number(session), truth(False)]


ROWS = (
    f"SELECT ROW({COLUMNS}, f.typed, f.next_typed) FROM domains d JOIN definitions f USING (record)"
)
BARE = f"SELECT ROW({COLUMNS}) FROM domains d"
BY = {
    "record": Statement(f"{ROWS} WHERE d.list = $1 AND record = $2", "bigint", "bigint"),
    "uuid": Statement(f"{ROWS} WHERE d.list = $1 AND d.uuid = $2", "bigint", "uuid"),
    "name": Statement(f"{ROWS} WHERE d.list = $1 AND d.name = $2", "bigint", "text"),
    "id": Statement(f"{ROWS} WHERE d.list = $1 AND d.id = $2 AND d.id <> -1", "bigint", "int"),
}
IDENTITY = Statement(
    f"{BARE} WHERE d.list = $1 AND (d.uuid = $2 OR d.name = $3) "
    "ORDER BY d.uuid = $2 DESC NULLS LAST LIMIT 1",
    *("bigint", "uuid", "text"),
)
SOME = Statement(f"{ROWS} WHERE d.list = $1 AND record = ANY ($2)", "bigint", "bigint[]")
VERSION = Statement("SELECT version FROM domains WHERE list = $1 AND record = $2", *("bigint",) * 2)
TYPED = Statement("SELECT typed, next_typed FROM definitions WHERE record = $1", "bigint")

# About a whole list, or much of it: see `whole`.
SCAN = f"{BARE} WHERE d.list = <list>"
SCAN_ALL = f"{ROWS} WHERE d.list = <list>"
COUNT = "SELECT count(*) FROM domains d WHERE d.list = <list>"
VERSIONS = "SELECT record, version FROM domains WHERE list = <list>"
RECORDS = "SELECT record, uuid FROM domains WHERE list = <list> ORDER BY record"
WITH_WORK = f"{BARE} WHERE d.list = <list> AND d.work IS NOT NULL"


@lru_cache(maxsize=1024)
def whole(text: str, list: int, *types: str) -> Statement:
    """A statement whose text has the number of the list. One plan is kept whatever the values are,
    and that for a list of 100,000 reads all of them to find the three of another."""
    return Statement(text.replace("<list>", str(list)), *types)


EVENT_COUNT = Statement("SELECT publish($1, $2)", "bigint", "int")
EVENTS = Statement(
    "SELECT number, extract(epoch FROM at)::float8, type, detail, uuid, name, id, who "
    "FROM events "
    "WHERE list = $1 AND number >= $2 ORDER BY number LIMIT $3",
    *("bigint", "bigint", "int"),
)
DIRS = Statement(
    "SELECT config_dir, autostart_dir, driver FROM directories WHERE list = $1 AND host = $2",
    *("bigint", "text"),
)
SET_DIRS = Statement(
    "INSERT INTO directories (list, host, config_dir, autostart_dir) VALUES ($1, $2, $3, $4) "
    "ON CONFLICT (list, host) DO UPDATE SET config_dir = $3, autostart_dir = $4",
    *("bigint", "text", "bytea", "bytea"),
)
SET_DRIVER = Statement(
    "INSERT INTO directories (list, host, driver) VALUES ($1, $2, $3) "
    "ON CONFLICT (list, host) DO UPDATE SET driver = $3",
    *("bigint", "text", "text"),
)

BEHIND = Statement(
    "SELECT CASE WHEN pg_is_in_recovery() THEN coalesce("
    "extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()), 0) "
    "ELSE 0 END::float8"
)
