"""What a million changes leave in the server's tables: the rows that every lock writes are updated
in place (HOT), and their tables do not grow."""

from __future__ import annotations

import random
from collections.abc import Callable

import pg_servers
import pytest
from helpers import SOAK, xml

pg_servers.need()

from shmdomains.postgres import PostgresDomainList  # noqa: E402

CHANGES = 2_000_000 if SOAK else 2_000
DOMAINS = 50
HOT = ("domains", "sessions")


@pytest.mark.soak
@pytest.mark.parametrize("size", [0, 700, 5000], ids=["small", "of 700 bytes", "of 5000 bytes"])
def test_hot_rows_stay_where_they_are(size: int, tried: Callable[[str, int], None]) -> None:
    """Whatever the size of the driver's data, which the row of a domain has."""
    with (
        pg_servers.Server(autovacuum_naptime="5s", synchronous_commit="off") as server,
        PostgresDomainList.open(server.url("rows", by="socket")) as doms,
    ):
        chance = random.Random(1)
        names = [f"web{number}" for number in range(DOMAINS)]
        for name in names:
            doms.define(xml(name))
            with doms.get(name) as dom:
                dom.data = {"n": 0, "more": chance.randbytes(size)}
        before = _sizes(server)
        for _ in range(CHANGES):
            with doms.get(chance.choice(names)) as dom:
                dom.data = {**dom.data, "n": dom.data["n"] + 1}
        assert sum(info.data["n"] for info in doms.list()) == CHANGES
        with doms._pool.connect() as conn:  # the counts are told when a session is idle or ends
            conn.execute("SELECT pg_stat_force_next_flush()")
        doms.close()
        for table in HOT:
            updates, hot = map(int, server.psql(_UPDATES.format(table)).split("|"))
            least = CHANGES * (2 if table == "domains" else 1)  # locked, and changed
            assert updates >= least and hot >= 0.98 * updates, (table, updates, hot)
        grown = {table: size - before[table] for table, size in _sizes(server).items()}
        assert max(grown.values()) <= 1 << 20, grown
    tried("changes whose rows stayed where they are", CHANGES)


_UPDATES = (
    "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables "
    "WHERE schemaname = 'shmdomains' AND relname = '{}'"
)


def _sizes(server: pg_servers.Server) -> dict[str, int]:
    """Bytes of the tables that changes write, without their indexes."""
    return {table: int(server.psql(_SIZE.format(table))) for table in HOT}


_SIZE = "SELECT pg_relation_size('shmdomains.{}')"
