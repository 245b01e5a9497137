"""What half a million changes leave in the server's tables: the rows that every lock writes are
updated in place (HOT), and their tables do not grow. And how many rows are read for an answer."""

from __future__ import annotations

import random
from collections.abc import Callable

import pg_servers
import pytest
from helpers import SOAK, xml
from killing import until

pg_servers.need()

from shmdomains.postgres import PostgresDomainList  # noqa: E402

CHANGES = 500_000 if SOAK else 2_000
DOMAINS = 50
HOT = ("domains", "sessions")


@pytest.mark.soak
@pytest.mark.timeout(3600 if SOAK else 120)
@pytest.mark.parametrize("size", [0, 700, 1800, 5000])
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


def test_no_more_rows_are_read_than_are_asked_for() -> None:
    """A plan is kept whatever the values are, and lists differ in size."""
    with pg_servers.Server(autovacuum="off") as server:
        with (
            PostgresDomainList.open(server.url("large", by="socket")) as large,
            PostgresDomainList.open(server.url("small", by="socket")) as small,
        ):
            large.define(xml("first"))
            small.define(xml("web1"))
            server.psql(_MANY.format(large._pool.list))
            server.psql("ANALYZE")
        answers: dict[str, Callable[[PostgresDomainList], object]] = {
            "small": lambda doms: doms.list(),
            "small without definitions": lambda doms: doms.list(definitions=False),
            "small, how many": len,
            "small, what is under way": lambda doms: doms.recover(),
            "small, whether it is sound": lambda doms: doms.check(),
            "small, handles": lambda doms: doms._handles(),
            "large, active": lambda doms: doms.list(active=True),
            "large, active, how many": lambda doms: doms.count(active=True),
            "large, of a host": lambda doms: doms.list(host="host1"),
        }
        read: dict[str, int] = {}
        for what, answer in answers.items():
            before = int(server.psql(_READ))
            with PostgresDomainList.attach(server.url(what[:5], by="socket")) as doms:
                answer(doms)
                doms.get("web1" if what[:5] == "small" else "first").unlock()
            until(lambda: int(server.psql(_READ)) > before, "the session's counts")  # noqa: B023
            read[what] = int(server.psql(_READ)) - before
        assert max(read.values()) < 500, read


_MANY = (
    "INSERT INTO shmdomains.domains (list, uuid, id, state, persistent, name, host) "
    "SELECT {0}, gen_random_uuid(), CASE WHEN n % 100 = 0 THEN n ELSE -1 END, 5, true, 'd' || n, "
    "CASE WHEN n % 100 = 0 THEN 'host' || n / 100 END FROM generate_series(1, 10000) AS n; "
    "INSERT INTO shmdomains.definitions (record, typed, xml) SELECT d.record, f.typed, f.xml "
    "FROM shmdomains.domains d, (SELECT * FROM shmdomains.definitions LIMIT 1) AS f "
    "ON CONFLICT DO NOTHING"
)
_READ = (
    "SELECT sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_user_tables "
    "WHERE schemaname = 'shmdomains' AND relname IN ('domains', 'definitions')"
)
_UPDATES = (
    "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables "
    "WHERE schemaname = 'shmdomains' AND relname = '{}'"
)


def _sizes(server: pg_servers.Server) -> dict[str, int]:
    """Bytes of the tables that changes write, without their indexes."""
    return {table: int(server.psql(_SIZE.format(table))) for table in HOT}


_SIZE = "SELECT pg_relation_size('shmdomains.{}')"
