"""Reads that go to a standby: what is read there, how old it is, and what never is."""

from __future__ import annotations

from collections.abc import Iterator

import pg_servers
import pytest
from helpers import xml
from killing import until

pg_servers.need()

from shmdomains.postgres import PostgresDomainList  # noqa: E402
from shmdomains.postgres.session import Statement  # noqa: E402


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[pg_servers.Server, pg_servers.Standby]]:
    with (
        pg_servers.Server() as primary,
        pg_servers.Standby(primary, synchronous=False) as standby,
    ):
        yield primary, standby


def test_reads_go_to_the_standby(pair: tuple[pg_servers.Server, pg_servers.Standby]) -> None:
    url = pg_servers.urls(*pair, list="reads")
    with PostgresDomainList.open(url + "&read=standby") as doms:
        doms.define(xml("web1"))

        def reads_there() -> bool:
            """While the standby has no schema yet, the primary is read."""
            return doms.peek("web1") is not None and bool(doms._pool._readers)

        until(reads_there, "the standby to have it")
        assert len(doms) == 1 and [info.name for info in doms.list()] == ["web1"]
        [reader] = doms._pool._readers
        assert reader.call(Statement("SELECT pg_is_in_recovery()")) == [(b"\1",)]
        with doms.get("web1") as dom:
            assert dom.name == "web1"
        assert doms.behind > 0


def test_a_holder_reads_what_is_true(pair: tuple[pg_servers.Server, pg_servers.Standby]) -> None:
    """Its own commits included, which the standby may not have."""
    _, standby = pair
    url = pg_servers.urls(*pair, list="holder")
    with PostgresDomainList.open(url + "&read=standby") as doms:
        standby.freeze()
        try:
            with doms.locked():
                for number in range(5):
                    doms.define(xml(f"web{number}"))
                    assert len(doms) == number + 1
        finally:
            standby.thaw()
        until(lambda: len(doms) == 5, "the standby to have them")


def test_without_a_standby(pg_url: str) -> None:
    with PostgresDomainList.open(pg_url, read="standby") as doms:
        doms.define(xml("web1"))
        assert doms.peek("web1") is not None
        assert doms.behind == 0
