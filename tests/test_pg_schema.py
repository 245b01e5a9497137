"""What a list on PostgreSQL needs of a server: a real one, whose sessions are not pooled, and its
schema, which any number of processes make at once and a role with few rights can use.
"""

from __future__ import annotations

import itertools
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest
from killing import Child, Pipe, xml
from pg_proxy import ENDS_A_REQUEST, Cut, _Stream
from pg_servers import PATIENCE, Server, need

need()

import psycopg  # noqa: E402

from shmdomains import (  # noqa: E402
    DomainState,
    EventType,
    Job,
    SegmentMismatch,
    SegmentNotFound,
    SegmentRefused,
)
from shmdomains.postgres import PostgresDomainList, rights, schema  # noqa: E402

_numbers = itertools.count()

Start = Callable[..., Child]


@pytest.fixture
def database(pg_server: Server) -> Iterator[str]:
    """An empty one of its own, which belongs to the role ``shmdomains``."""
    name = f"empty{next(_numbers)}"
    pg_server.psql(f"CREATE DATABASE {name} OWNER shmdomains")
    yield name
    pg_server.psql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def url(pg_server: Server, database: str) -> str:
    return in_database(pg_server, database)


@pytest.fixture
def role(pg_server: Server) -> Iterator[tuple[str, str]]:
    """A role that may connect, and nothing more; its name and password."""
    name, password = f"worker {next(_numbers)}", secrets.token_hex(8)
    pg_server.psql(f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{password}'")
    yield name, password
    for one in pg_server.psql("SELECT datname FROM pg_database WHERE datallowconn").split():
        pg_server.psql(f'DROP OWNED BY "{name}"', one)
    pg_server.psql(f'DROP ROLE "{name}"')


def in_database(server: Server, database: str, role: tuple[str, str] | None = None) -> str:
    name, password = role or ("shmdomains", server.password)
    place = f"127.0.0.1:{server.port}"
    return f"postgresql://{name.replace(' ', '%20')}:{password}@{place}/{database}"


# --- servers that cannot carry a list -------------------------------------------------------------


class Pooler:
    """Stands before a server as PgBouncer does in transaction mode: each transaction gets one of a
    few sessions, the last one used or (`in_turns`) the one that was not used for longest."""

    def __init__(self, server: Server, sessions: int, in_turns: bool, version: str = "") -> None:
        self._server, self._in_turns = server, in_turns
        self._hello = b""
        self._free = [self._connect() for _ in range(sessions)]
        if version:
            self._hello = self._with_version(version)
        self._changed = threading.Condition()
        self._ends: list[socket.socket] = [stream._end for stream in self._free]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        port = self._listener.getsockname()[1]
        self.url = f"postgresql://shmdomains@127.0.0.1:{port}/shmdomains"

    def _connect(self) -> _Stream:
        end = socket.socket(socket.AF_UNIX)
        end.connect(str(self._server.folder / f".s.PGSQL.{self._server.port}"))
        words = b"user\0shmdomains\0database\0shmdomains\0\0"
        end.sendall(struct.pack("!II", 8 + len(words), 196608) + words)
        stream, hello = _Stream(end), b""
        while (message := stream.message())[:1] != b"Z":
            hello += message
        self._hello = hello + message
        return stream

    def _with_version(self, version: str) -> bytes:
        words = b"server_version\0" + version.encode() + b"\0"
        said = b"S" + struct.pack("!I", 4 + len(words)) + words
        return self._hello[:-6] + said + self._hello[-6:]  # before ReadyForQuery

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._ends.append(client)
            self._threads.append(threading.Thread(target=self._serve, args=(client,)))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        stream = _Stream(client)
        with suppress(OSError, Cut), closing(client):
            while struct.unpack_from("!I", stream.untyped(), 4)[0] != 196608:
                client.sendall(b"N")
            client.sendall(self._hello)
            session, request = None, b""
            while (message := stream.message())[:1] != b"X":
                request += message
                if message[:1] not in ENDS_A_REQUEST:
                    continue
                session = session or self._take()
                session._end.sendall(request)
                request = b""
                while (answer := session.message())[:1] != b"Z":
                    client.sendall(answer)
                if answer[5:] == b"I":
                    self._give(session)
                    session = None
                client.sendall(answer)

    def _take(self) -> _Stream:
        with self._changed:
            assert self._changed.wait_for(lambda: self._free, PATIENCE)
            return self._free.pop(0 if self._in_turns else -1)

    def _give(self, session: _Stream) -> None:
        with self._changed:
            self._free.append(session)
            self._changed.notify_all()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(PATIENCE)
        self._listener.close()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.mark.parametrize("in_turns", [False, True], ids=["the last one", "in turns"])
@pytest.mark.parametrize("sessions", [1, 2, 3])
def test_a_pooler_of_transactions_is_refused(
    pg_server: Server, sessions: int, in_turns: bool
) -> None:
    with closing(Pooler(pg_server, sessions, in_turns)) as pooler:
        for begin in (PostgresDomainList.open, PostgresDomainList.attach):
            with pytest.raises(SegmentRefused, match=r"pooler .* in transaction mode"):
                begin(pooler.url)
    assert pg_server.psql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == "0"


def test_an_old_server_is_refused(pg_server: Server) -> None:
    with (
        closing(Pooler(pg_server, 2, False, "13.14")) as old,
        pytest.raises(SegmentRefused, match=r"is PostgreSQL 13; it takes 14 or later"),
    ):
        PostgresDomainList.open(old.url)


STUBS = """
CREATE SCHEMA {0};
CREATE FUNCTION {0}.pg_advisory_lock(bigint) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION {0}.pg_try_advisory_lock(bigint) RETURNS boolean LANGUAGE sql RETURN true;
CREATE FUNCTION {0}.pg_advisory_unlock(bigint) RETURNS boolean LANGUAGE sql RETURN true;
CREATE FUNCTION {0}.version() RETURNS text LANGUAGE sql RETURN 'LookalikeDB 1.0';
"""


def test_locks_that_are_stubs_are_refused(pg_server: Server, database: str, url: str) -> None:
    pg_server.psql(STUBS.format("shmdomains"), database)
    pg_server.psql("GRANT USAGE ON SCHEMA shmdomains TO shmdomains", database)
    with pytest.raises(SegmentRefused, match=r"lock nothing \(LookalikeDB 1\.0\)"):
        PostgresDomainList.open(url)


def test_a_roles_own_functions_are_not_ours(
    pg_server: Server, database: str, role: tuple[str, str]
) -> None:
    """Whatever comes first in its search path."""
    pg_server.psql(STUBS.format("mine"), database)
    pg_server.psql(f'GRANT USAGE ON SCHEMA mine TO "{role[0]}"', database)
    pg_server.psql(f'ALTER ROLE "{role[0]}" SET search_path = mine, pg_catalog', database)
    rights.install(in_database(pg_server, database), role[0])
    with PostgresDomainList.open(in_database(pg_server, database, role)) as doms:
        doms.define(xml("a"))
        with doms.get("a"):
            count = "SELECT count(*) FROM pg_locks WHERE (classid::bigint >> 16) - 23808 = 1"
            assert pg_server.psql(count, database) == "1"


# --- the schema -----------------------------------------------------------------------------------


def open_it(pipe: Pipe, url: str) -> None:
    pipe.say()
    pipe.listen()
    with PostgresDomainList.open(url) as doms:
        pipe.say(doms.created)
        pipe.listen()


def test_many_make_it_at_once(start: Start, pg_server: Server, database: str, url: str) -> None:
    children = [start(open_it, url) for _ in range(4)]
    for child in children:
        child.hear(PATIENCE)
    for child in children:
        child.tell()
    assert sorted(child.hear(PATIENCE) for child in children) == [False] * 3 + [True]
    rows = pg_server.psql("SELECT number FROM shmdomains.migrations ORDER BY number", database)
    assert rows.split() == [str(number) for number, _ in schema.steps()]


def test_a_role_that_may_not_create_is_told_the_command(
    pg_server: Server, database: str, role: tuple[str, str]
) -> None:
    theirs = in_database(pg_server, database, role)
    with pytest.raises(SegmentRefused, match="shmdomains postgres init --role") as info:
        PostgresDomainList.open(theirs)
    assert repr(role[0]) in str(info.value) and role[1] not in str(info.value)
    with pytest.raises(SegmentNotFound, match="there is no list"):
        PostgresDomainList.attach(theirs)


def test_few_rights_are_enough(pg_server: Server, database: str, role: tuple[str, str]) -> None:
    """All that a worker does, as a role that may change nothing of the schema."""
    rights.install(in_database(pg_server, database), role[0])
    theirs = in_database(pg_server, database, role)
    with PostgresDomainList.open(theirs) as doms, PostgresDomainList.attach(theirs) as other:
        work(doms, other)
        doms.unlink(force=True)
    with psycopg.connect(theirs, autocommit=True) as conn:
        for text in (
            "CREATE TABLE shmdomains.more (n int)",
            "DROP TABLE shmdomains.domains",
            "ALTER TABLE shmdomains.domains ADD n int",
            "TRUNCATE shmdomains.events",
            "INSERT INTO shmdomains.migrations (number) VALUES (99)",
            "CREATE OR REPLACE FUNCTION shmdomains.next_id(bigint) RETURNS int "
            "LANGUAGE sql RETURN 1",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(text)


def work(doms: PostgresDomainList, other: PostgresDomainList) -> None:
    info = doms.define(xml("a"))
    events = other.watch(timeout=PATIENCE)
    with doms.get("a", timeout=PATIENCE) as dom:
        dom.intend("start")
        id = dom.activate(pid=1)
        dom.data = {"n": 1}
        dom.commit()
        dom.set_state(DomainState.PAUSED)
    assert [next(events).type for _ in range(2)] == [EventType.STARTED, EventType.SUSPENDED]
    assert other.wait("a", until=lambda info: info and info.data, timeout=PATIENCE).id == id
    assert other.peek(id=id).data == {"n": 1}
    with other.get("a", timeout=PATIENCE) as dom:
        assert dom.previous_owner_died is None
        dom.deactivate()
    with doms.job("a", "backup", Job.MODIFY, PATIENCE) as job:
        job.progress(1)
        assert [one.operation for one in other.peek("a").jobs] == ["backup"]
    with doms.mutex("m", PATIENCE), doms.locked(PATIENCE):
        assert {one.kind for one in other.locks()} == {"list", "mutex"}
    led = threading.Event()
    with doms.elect("leader", lambda stop: (led.set(), stop.wait(PATIENCE))):
        assert led.wait(PATIENCE)
    doms.rename("a", "b")
    assert [one.name for one in other.list()] == ["b"] and other.count() == 1
    assert other.check().problems == [] and other.recover().repairs == []
    assert info.uuid == other.peek("b").uuid
    lose_a_session(doms, other)
    doms.undefine("b")
    assert list(other.snapshot()) == []


def lose_a_session(doms: PostgresDomainList, other: PostgresDomainList) -> None:
    """A holder's session is ended, and the next one is told."""
    ready, go = threading.Event(), threading.Event()

    def hold() -> None:
        dom = doms.get("b")
        state = doms._pool.mine()
        assert state is not None and state.session is not None
        ready.set()
        assert go.wait(PATIENCE)
        state.session.end("for the test")
        dom.rollback()
        go.clear()

    thread = threading.Thread(target=hold)
    thread.start()
    assert ready.wait(PATIENCE)
    go.set()
    thread.join(PATIENCE)
    with other.get("b", timeout=PATIENCE) as dom:
        assert dom.previous_owner_died is not None


def test_a_newer_schema_is_refused(pg_server: Server, database: str, url: str) -> None:
    with PostgresDomainList.open(url):
        pg_server.psql("INSERT INTO shmdomains.migrations (number) VALUES (4711)", database)
        for begin in (PostgresDomainList.open, PostgresDomainList.attach):
            with pytest.raises(SegmentMismatch, match=r"has version 4711 .* upgrade the program"):
                begin(url)


def test_lists_of_one_database_do_not_see_each_other(url: str) -> None:
    one, two = (PostgresDomainList.create(f"{url}?list={name}") for name in ("one", "two"))
    with one, two:
        for doms, memory in ((one, 1024), (two, 2048)):
            doms.define(xml("a", memory=memory))
            doms.define(xml(f"only{memory}"))
        uuid = one.peek("a").uuid
        events = one.watch(timeout=PATIENCE)
        with two.get("a") as dom:
            id = dom.activate()
        assert one.peek(id=id) is None
        with one.get("a") as dom:
            assert dom.activate() == id  # each has ids of its own
            dom.data = "mine"
        assert (next(events).type, events.since) == (EventType.STARTED, 3)
        assert one.peek("a").definition.memory * 2 == two.peek("a").definition.memory
        assert two.peek("a").data is None and two.peek(uuid=uuid) is None
        assert [one.name for one in two.list()] == ["a", "only2048"]
        with one.mutex("m", 0), one.locked(), one.get("a", timeout=0):
            assert two.locks() == [] and len(one.locks()) == 3
            with two.mutex("m", 0), two.locked(0), two.get("a", timeout=0):
                assert len(two.locks()) == 3
        one.unlink()
        assert two.peek("a") is not None


def test_a_schema_of_before_is_upgraded(
    pg_server: Server, database: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a list remembered before there was a driver is there afterwards."""
    everything = schema.steps()
    with monkeypatch.context() as before:
        before.setattr(schema, "steps", lambda: everything[:1])
        with PostgresDomainList.create(url, host="here"):
            pg_server.psql(
                "INSERT INTO shmdomains.directories (list, host, config_dir) "
                "SELECT list, 'here', '/etc/agent' FROM shmdomains.lists",
                database,
            )
    with PostgresDomainList.attach(url, host="here") as doms:
        assert doms.driver is None and doms.info.config_dir == "/etc/agent"
        doms.driver = "qemu"
        doms.forget_configs()
        assert doms.driver == "qemu" and doms.info.config_dir is None
        assert doms.check().problems == []
    with PostgresDomainList.attach(url, host="there") as doms:
        assert doms.driver is None  # each host has its own
    rows = pg_server.psql("SELECT number FROM shmdomains.migrations ORDER BY number", database)
    assert rows.split() == [str(number) for number, _ in everything]
