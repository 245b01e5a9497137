"""Elections whose leader can lose the lock without dying."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pg_servers
import pytest

pg_servers.need()

from shmdomains.postgres import PostgresDomainList  # noqa: E402

DEADLINE = 30.0


@pytest.fixture
def server() -> Iterator[pg_servers.Server]:
    with pg_servers.Server() as server:
        yield server


class Leader:
    """What it was told of: each time that it began, and why it ended."""

    def __init__(self, said: queue.Queue[str] | None = None) -> None:
        self.said = said or queue.Queue()

    def __call__(self, stop: threading.Event) -> None:
        self.said.put("leads")
        assert stop.wait(DEADLINE)
        assert stop.is_set()
        self.said.put("told")

    def next(self) -> str:
        return self.said.get(timeout=DEADLINE)


def test_a_leader_whose_session_ends_is_told_and_leads_again(pg_url: str) -> None:
    leader = Leader()
    with PostgresDomainList.open(pg_url) as doms:
        with doms.elect("a", leader, retry_after=0.01) as election:
            assert leader.next() == "leads"
            [lock] = [one for one in doms.locks() if one.kind == "mutex"]
            assert lock.holder is not None and election.leader
            [state] = doms._pool.states.values()
            assert state.session is not None
            backend = state.session.conn.info.backend_pid
            with doms._pool.connect() as other:
                other.execute("SELECT pg_terminate_backend(%s)", [backend])
            assert [leader.next(), leader.next()] == ["told", "leads"]
        assert leader.next() == "told"
        assert not election.running


def test_an_election_outlives_the_server(server: pg_servers.Server) -> None:
    one = Leader()
    two = Leader(one.said)
    with (
        PostgresDomainList.open(server.url("a"), lease=1) as doms,
        doms.elect("a", one, retry_after=0.01) as first,
    ):
        assert one.next() == "leads"
        with doms.elect("a", two, retry_after=0.01) as second:
            server.kill()
            assert one.next() == "told"
            server.start()
            assert one.next() == "leads"
            assert first.running and second.running
            assert first.leader != second.leader


def test_a_list_that_is_closed_ends_its_election(pg_url: str) -> None:
    leader = Leader()
    doms = PostgresDomainList.open(pg_url)
    election = doms.elect("a", leader)
    assert leader.next() == "leads"
    doms.close()
    assert leader.next() == "told"
    election._thread.join(DEADLINE)
    assert not election.running
