"""Rows of sessions and processes that are over: removed by whoever opens the list, and only those
that nobody can ask for any more. They are aged by SQL."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from helpers import xml
from killing import Nursery, Pipe
from pg_servers import Server, need

need()

import psycopg  # noqa: E402

from shmdomains.postgres import PostgresDomainList, beginning  # noqa: E402


class Rows:
    """The rows of one list, and their ages."""

    def __init__(self, server: Server, url: str) -> None:
        self.url = url
        self.conn = psycopg.connect(
            server.url(by="socket"), autocommit=True, options="-c search_path=shmdomains"
        )
        with PostgresDomainList.open(url) as doms:
            for name in ("web1", "web2"):
                doms.define(xml(name))
            self.list = doms._pool.list
        self.forget()

    def column(self, query: str) -> list[Any]:
        found = self.conn.execute(query.encode(), {"list": self.list}).fetchall()
        return [row[0] for row in found]

    @property
    def sessions(self) -> list[int]:
        return self.column(
            "SELECT session FROM sessions JOIN processes USING (process) WHERE list = %(list)s"
        )

    @property
    def processes(self) -> list[int]:
        return self.column("SELECT process FROM processes WHERE list = %(list)s")

    def age(self, hours: float) -> None:
        """So much time passes."""
        by = f"interval '{hours} hours'"
        mine = "WHERE process IN (SELECT process FROM processes WHERE list = %(list)s)"
        for text in (
            f"UPDATE processes SET seen = seen - {by} WHERE list = %(list)s",
            f"UPDATE sessions SET over = over - {by} {mine}",
            f"UPDATE counters SET swept = swept - {by} WHERE list = %(list)s",
        ):
            self.conn.execute(text.encode(), {"list": self.list})

    def open(self) -> None:
        """Somebody opens the list, and ends."""
        with PostgresDomainList.attach(self.url):
            pass

    def forget(self) -> None:
        self.conn.execute("DELETE FROM processes WHERE list = %s", [self.list])


@pytest.fixture
def rows(pg_server: Server, pg_url: str) -> Iterator[Rows]:
    rows = Rows(pg_server, pg_url)
    yield rows
    rows.conn.close()


def test_they_go_a_day_after_their_end(rows: Rows) -> None:
    rows.open()
    [first], [process] = rows.sessions, rows.processes
    rows.age(47)
    rows.open()  # finds that it is over, however long it has been
    assert first in rows.sessions and process in rows.processes
    rows.age(23)
    rows.open()
    assert first in rows.sessions and process in rows.processes
    rows.age(2)
    rows.open()
    assert first not in rows.sessions and process not in rows.processes
    assert rows.sessions  # those of the others, who were there within the day


def test_now_and_then_only(rows: Rows) -> None:
    rows.open()
    rows.open()
    over = "SELECT count(over) FROM sessions JOIN processes USING (process) WHERE list = %(list)s"
    assert rows.column(over) == [0]
    rows.age(beginning.SWEEP_EVERY / 3600 * 1.01)
    rows.open()
    assert rows.column(over) == [2]


def test_not_those_that_go_on(rows: Rows) -> None:
    with PostgresDomainList.attach(rows.url) as doms, doms.get("web1") as dom:
        [session], [process] = rows.sessions, rows.processes
        for _ in range(3):
            rows.age(48)
            rows.open()
        assert session in rows.sessions and process in rows.processes
        dom.data = 1
    assert doms._pool.process == process


def test_a_process_that_was_forgotten_goes_on(rows: Rows) -> None:
    """It was quiet for more than a day, without a connection."""
    with PostgresDomainList.attach(rows.url) as doms:
        process = doms._pool.process
        while doms._pool._idle:
            doms._pool._idle.pop().end("it was idle")
        for _ in range(3):
            rows.age(48)
            rows.open()
        assert process not in rows.processes
        with doms.get("web1") as dom:
            dom.data = 1
        assert doms._pool.process in rows.processes


def die_with_locks(pipe: Pipe, url: str) -> None:
    doms = PostgresDomainList.attach(url)
    mutex = doms.mutex("nightly")
    with mutex, doms.get("web1"):
        pipe.say()
        pipe.listen()


def test_not_those_that_say_who_died(rows: Rows, nursery: Nursery) -> None:
    worker = nursery.start(die_with_locks, rows.url)
    worker.hear()
    pid = worker.pid
    worker.kill()
    for _ in range(3):
        rows.open()
        rows.age(48)
    with PostgresDomainList.attach(rows.url) as doms:
        with doms.mutex("nightly") as mutex, doms.get("web1") as dom:
            for died in (mutex.previous_owner_died, dom.previous_owner_died):
                assert died is not None and died.pid == pid and died.host == doms.host
        [told] = [one for one in doms.watch(since=0, timeout=0) if one.type.name == "HOLDER_DIED"]
        assert told.name == "web1"
    for _ in range(3):
        rows.age(48)
        rows.open()
    with PostgresDomainList.attach(rows.url) as doms:  # the event still names it
        [told] = [one for one in doms.watch(since=0, timeout=0) if one.type.name == "HOLDER_DIED"]
        assert told.holder is not None and told.holder.pid == pid


def test_so_many_at_once(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(8):
        rows.open()
    old = set(rows.sessions)
    monkeypatch.setattr(beginning, "SWEEP_AT_ONCE", 100)
    rows.age(1)
    rows.open()
    monkeypatch.setattr(beginning, "SWEEP_AT_ONCE", 3)
    left = [len(old)]
    while left[-1]:
        rows.age(48)
        rows.open()
        left.append(len(old & set(rows.sessions)))
    steps = [before - after for before, after in pairwise(left)]
    assert max(steps) == 3 and len(steps) < 8
