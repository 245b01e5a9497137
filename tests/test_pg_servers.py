"""What the tests of the store on PostgreSQL stand on: servers that die, freeze and come back, a
standby that takes over, and a network that fails at a chosen place.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from killing import Child, Pipe, until
from pg_proxy import Proxy
from pg_servers import PATIENCE, Server, Standby, need, urls

from shmdomains.postgres import embedded

need()

import psycopg  # noqa: E402


@pytest.fixture
def proxy(pg_server: Server) -> Iterator[Proxy]:
    with Proxy(pg_server) as proxy:
        yield proxy


@pytest.fixture
def table(pg_server: Server) -> Iterator[Callable[[], list[int]]]:
    """A table of numbers, read past the proxy."""
    pg_server.psql("CREATE TABLE numbers (n int); GRANT ALL ON numbers TO shmdomains")
    yield lambda: [int(one) for one in pg_server.psql("TABLE numbers").split()]
    pg_server.psql("DROP TABLE numbers")


def connect(url: str, **more: Any) -> psycopg.Connection[Any]:
    return psycopg.connect(url, autocommit=True, **more)


def insert(connection: psycopg.Connection[Any], number: int) -> None:
    connection.execute("INSERT INTO numbers VALUES (%s)", [number])


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


# --- the server -----------------------------------------------------------------------------------


def test_by_tcp_and_by_socket(pg_server: Server) -> None:
    for by in ("tcp", "socket"):
        with connect(pg_server.url(by=by)) as connection:
            assert connection.execute("SELECT current_user").fetchone() == ("shmdomains",)
    assert pg_server.psql("SELECT current_user, 1") == "postgres|1"


def test_each_test_has_a_list_of_its_own(pg_server: Server, pg_url: str) -> None:
    assert pg_url.startswith(pg_server.url("test-"))


def test_a_password_is_asked_for(pg_server: Server) -> None:
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        connect(pg_server.url().replace(f":{pg_server.password}", ""))
    assert pg_server.folder.stat().st_mode & 0o777 == 0o700


def test_stopped_killed_and_started_again(nothing_left: None) -> None:
    with Server() as server:
        server.psql("CREATE TABLE kept AS SELECT 1")
        port = server.port
        ends: list[Callable[[], None]] = [
            server.stop,
            lambda: server.stop("immediate"),
            server.kill,
            server.kill_postmaster,
        ]
        for end in ends:
            connection = connect(server.url())
            processes = server.processes()
            end()
            # They close their files, so the server's, just before they are gone.
            until(lambda them=processes: not any(map(lives, them)), "the end of all processes")
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
            with pytest.raises(psycopg.OperationalError):
                connect(server.url())
            connection.close()
            server.start(work_mem="5MB")
            assert server.psql("TABLE kept") == "1" and server.port == port
            assert server.psql("SHOW work_mem") == "5MB"
        server.kill()
        segment = (server.data / "postmaster.pid").read_text().split()[7]
        assert segment in Path("/proc/sysvipc/shm").read_text()
    assert segment not in Path("/proc/sysvipc/shm").read_text().split()
    assert not server.folder.exists()


def test_frozen_and_thawed() -> None:
    with Server() as server, connect(server.url()) as connection:
        server.freeze()
        states = {process.status() for process in server.processes()}
        assert states == {psutil.STATUS_STOPPED}
        done = threading.Event()
        thread = threading.Thread(target=lambda: (connection.execute("SELECT 1"), done.set()))
        thread.start()
        with pytest.raises(psycopg.OperationalError, match="timeout"):
            connect(server.url(connect_timeout=1))
        assert not done.is_set()
        server.thaw()
        thread.join(PATIENCE)
        assert done.is_set()


def test_a_frozen_server_can_be_killed() -> None:
    with Server() as server:
        server.freeze()


def keep_one(pipe: Pipe) -> None:
    server = Server().start()
    pipe.say((server.folder, server.process.pid))
    pipe.rest()


def test_it_dies_with_its_test(start: Callable[..., Child]) -> None:
    child = start(keep_one)
    folder, pid = child.hear(PATIENCE)
    child.kill()
    until(lambda: embedded._is_free(folder / "server"), "the end of the server", PATIENCE)
    assert f"[{pid}] LOG:  received fast shutdown" in (folder / "log").read_text()
    shutil.rmtree(folder)


# --- the standby ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_promoted_standby_has_all_that_was_committed(nothing_left: None) -> None:
    with Server() as server, Standby(server) as standby:
        both = urls(server, standby)
        server.psql("CREATE TABLE numbers (n int); GRANT ALL ON numbers TO shmdomains")
        with connect(both) as connection:
            for number in range(100):
                insert(connection, number)
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), connect(standby.url()) as reader:
            insert(reader, 0)
        server.kill()
        standby.promote()
        with connect(both) as connection:
            insert(connection, 100)
            assert connection.execute("SELECT count(*) FROM numbers").fetchone() == (101,)


@pytest.mark.slow
def test_a_commit_waits_for_a_synchronous_standby_only() -> None:
    with Server() as server:
        server.psql("CREATE TABLE numbers (n int); GRANT ALL ON numbers TO shmdomains")
        with Standby(server, synchronous=False) as standby, connect(server.url()) as connection:
            standby.freeze()
            insert(connection, 1)
        with Standby(server) as standby, connect(server.url()) as connection:
            standby.freeze()
            thread = threading.Thread(target=insert, args=(connection, 2))
            thread.start()
            until(
                lambda: "SyncRep" in server.psql("SELECT wait_event FROM pg_stat_activity"),
                "the wait",
            )
            standby.thaw()
            thread.join(PATIENCE)
            assert not thread.is_alive()


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("where", ["before", "passed", "answered", "partial"])
def test_cut_at_a_request(
    proxy: Proxy, table: Callable[[], list[int]], where: str, number: int
) -> None:
    connection = connect(proxy.url())
    fault = proxy.fail(where, number)
    with pytest.raises(psycopg.OperationalError):
        for one in range(1, 9):
            insert(connection, one)
    fault.wait()
    assert one == number
    connection.close()
    done, seen = list(range(1, number)), table()
    if where == "before":
        assert seen == done
    elif where == "passed":
        assert seen in (done, [*done, number])
    else:
        assert seen == [*done, number]
    with connect(proxy.url()) as again:
        insert(again, 100)
    assert 100 in table()


@pytest.mark.parametrize("where", ["stall", "mute"])
def test_stalled_at_a_request(proxy: Proxy, table: Callable[[], list[int]], where: str) -> None:
    with connect(proxy.url()) as connection:
        fault = proxy.fail(where, words="INSERT")
        connection.execute("SELECT 1")
        thread = threading.Thread(target=insert, args=(connection, 1))
        thread.start()
        fault.wait()
        if where == "mute":
            until(lambda: table() == [1], "the request at the server")
        else:
            assert table() == []
        assert thread.is_alive()
        with connect(proxy.url()) as other:
            insert(other, 2)
        fault.release()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert sorted(table()) == [1, 2]


def test_a_stalled_client_that_dies_is_not_missed(
    proxy: Proxy, pg_server: Server, table: Callable[[], list[int]]
) -> None:
    """Its session lives on, as that of a host that is cut off does."""
    connection = connect(proxy.url(application_name="cut-off"))
    look = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cut-off'"
    proxy.partition()
    connection.close()
    assert pg_server.psql(look) == "1"
    proxy.heal()
    until(lambda: pg_server.psql(look) == "0", "the end of the session")


def test_parted_and_healed(proxy: Proxy, table: Callable[[], list[int]]) -> None:
    with connect(proxy.url()) as connection:
        proxy.partition()
        thread = threading.Thread(target=insert, args=(connection, 1))
        thread.start()
        with pytest.raises(psycopg.OperationalError, match="timeout"):
            connect(proxy.url(connect_timeout=1))
        assert table() == [] and thread.is_alive()
        proxy.heal()
        thread.join(PATIENCE)
        assert table() == [1]


def test_refused_and_healed(proxy: Proxy) -> None:
    connection = connect(proxy.url())
    proxy.refuse()
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="closed the connection"):
        connect(proxy.url())
    connection.close()
    proxy.heal()
    connect(proxy.url()).close()


def test_requests_are_counted_as_the_server_answers_them(proxy: Proxy) -> None:
    with connect(proxy.url()) as connection:
        before = proxy.requests
        for _ in range(10):
            connection.execute("SELECT %s", [1])  # prepared after the fifth
        connection.execute("SELECT 1; SELECT 2")
        assert proxy.requests - before == 11 + 1  # PREPARE is one of its own
        before = proxy.requests
        with connection.pipeline():
            for _ in range(10):
                connection.execute("SELECT 1")
        assert proxy.requests - before == 1
        with connection.cursor().copy("COPY (SELECT 1) TO STDOUT") as copy:
            assert b"".join(copy) == b"1\n"


def test_a_wait_can_be_cancelled_through_it(proxy: Proxy, pg_server: Server) -> None:
    with connect(proxy.url(application_name="sleeper")) as connection:
        thread_raised = []

        def sleep() -> None:
            with pytest.raises(psycopg.errors.QueryCanceled):
                connection.execute("SELECT pg_sleep(60)")
            thread_raised.append(True)

        thread = threading.Thread(target=sleep)
        thread.start()
        look = "SELECT wait_event FROM pg_stat_activity WHERE application_name = 'sleeper'"
        until(lambda: pg_server.psql(look) == "PgSleep", "a session that sleeps")
        connection.cancel_safe(timeout=PATIENCE)
        thread.join(PATIENCE)
        assert thread_raised


def test_what_the_server_says_unasked_passes(proxy: Proxy) -> None:
    with connect(proxy.url()) as one, connect(proxy.url()) as other:
        one.execute("LISTEN news")
        fault = proxy.fail("mute", words="pg_sleep")
        other.execute("NOTIFY news, 'hello'")
        assert [note.payload for note in one.notifies(timeout=PATIENCE, stop_after=1)] == ["hello"]
        assert not fault.reached.is_set()
