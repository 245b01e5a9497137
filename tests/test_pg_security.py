"""Who may do what to lists on PostgreSQL, and what never gets out or into a statement.

A role that may use one list only meets row security in every table, by hand and through our
functions. Each promise is made to fail once: by switching row security off in that table.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import psutil
import pytest
from helpers import xml
from pg_servers import Server, need
from shell import WEB1, failure, invoke, out

from shmdomains import DomainExists, SegmentNotFound, SegmentRefused, Unavailable

need()

import psycopg  # noqa: E402
from psycopg import sql  # noqa: E402

from shmdomains.postgres import PostgresDomainList, rights, url  # noqa: E402
from shmdomains.postgres import statements as ask  # noqa: E402
from shmdomains.postgres.session import Refused  # noqa: E402

TABLES = {
    "lists": "list",
    "counters": "list",
    "directories": "list",
    "processes": "list",
    "domains": "list",
    "removed": "list",
    "mutexes": "list",
    "events": "list",
    "users": "list",
    "sessions": "(SELECT list FROM processes WHERE processes.process = t.process)",
    "definitions": "(SELECT list FROM domains WHERE domains.record = t.record)",
}
"""Each table, and to which list a row of it belongs."""

NAMES = [
    "vm'; DROP TABLE domains; --",
    'a"b\\c',
    "%s %(x)s",
    "$1 $2",
    "E'\\000'",
    "ü ☕ \U0001f600",
]


class Place:
    """A server with two lists, ``blue`` and ``green``, and a role for each."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.admin = f"host={server.folder} port={server.port} user=postgres dbname=shmdomains"
        for role in ("anna", "bert", "vms"):
            server.psql(f"CREATE ROLE {role} LOGIN PASSWORD 'pw-of-{role}'")
        rights.install(self.admin, "anna", "blue")
        rights.install(self.admin, "bert", "green")
        rights.install(self.admin, "vms")
        self.green = int(self.one("SELECT list FROM lists WHERE name = 'green'"))

    def url(self, role: str, list: str) -> str:
        place = quote(os.fspath(self.server.folder), safe="")
        return f"postgresql://{role}@{place}:{self.server.port}/shmdomains?list={list}"

    def list_of(self, role: str, list: str, **more: Any) -> PostgresDomainList:
        return PostgresDomainList.attach(self.url(role, list), **more)

    def as_role(self, role: str) -> psycopg.Connection[Any]:
        text = self.admin.replace("user=postgres", f"user={role}")
        return psycopg.connect(text, autocommit=True, options="-c search_path=shmdomains")

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """As the superuser, who sees everything."""
        with self.as_role("postgres") as conn:
            return conn.execute(query.encode(), values).fetchall()

    def one(self, query: str, *values: object) -> Any:
        [[value]] = self.rows(query, *values)
        return value

    def all_of(self, list: int) -> dict[str, list[tuple[Any, ...]]]:
        return {
            table: sorted(self.rows(f"SELECT t::text FROM {table} t WHERE {of} = %s", list))
            for table, of in TABLES.items()
        }


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with Server() as server:
        yield Place(server)


@pytest.fixture
def green(place: Place, tmp_path: Path) -> Iterator[PostgresDomainList]:
    """The list ``green`` with something in every table, used by its own role."""
    with place.list_of("bert", "green") as doms:
        doms.load_all_configs(tmp_path)
        if "web1" not in doms:
            doms.define(xml("web1", WEB1))
            doms.define(xml("gone"))
            doms.undefine("gone")
        with doms.mutex("nightly"):
            pass
        list(doms.watch(since=0, timeout=0))
        yield doms
        if not doms.closed:
            doms.forget_configs()


# --- row security ---------------------------------------------------------------------------------


def seen(place: Place, role: str, list: int) -> set[str]:
    """The tables in which a role sees rows of a list. Rows are named by the superuser: what a
    role does not see it cannot tell the list of."""
    found = set()
    for table, of in TABLES.items():
        places = [row[0] for row in place.rows(f"SELECT ctid FROM {table} t WHERE {of} = %s", list)]
        assert places, f"{table} has no row to be seen"
        with place.as_role(role) as conn:
            text = f"SELECT count(*) FROM {table} WHERE ctid = ANY (%s::tid[])"
            [number] = conn.execute(text.encode(), [places]).fetchone() or [0]
        if number:
            found.add(table)
    return found


def test_a_role_sees_its_own_list_only(place: Place, green: PostgresDomainList) -> None:
    assert seen(place, "bert", place.green) == set(TABLES)
    assert seen(place, "anna", place.green) == set()
    assert seen(place, "vms", place.green) == set(TABLES) - {"users"}
    for table in TABLES:
        place.server.psql(f"ALTER TABLE shmdomains.{table} DISABLE ROW LEVEL SECURITY")
        try:
            assert table in seen(place, "anna", place.green)
        finally:
            place.server.psql(f"ALTER TABLE shmdomains.{table} ENABLE ROW LEVEL SECURITY")


def test_every_table_is_looked_at(place: Place) -> None:
    kinds = "SELECT relname FROM pg_class WHERE relnamespace = 'shmdomains'::regnamespace "
    tables = {row[0] for row in place.rows(kinds + "AND relkind = 'r' AND relrowsecurity")}
    assert tables == set(TABLES)
    others = {row[0] for row in place.rows(kinds + "AND relkind = 'r' AND NOT relrowsecurity")}
    assert others == {"migrations", "lives", "life"}  # which no role but the owner writes


def test_a_role_changes_its_own_list_only(place: Place, green: PostgresDomainList) -> None:
    own = set(TABLES) - {"lists", "users"}
    with place.as_role("anna") as conn:
        for table in sorted(own):
            for what in (f"UPDATE {table} SET {_column(table)} = {_column(table)}", "DELETE"):
                text = what if what != "DELETE" else f"DELETE FROM {table}"
                places = [
                    row[0]
                    for row in place.rows(
                        f"SELECT ctid FROM {table} t WHERE {TABLES[table]} = %s", place.green
                    )
                ]
                done = conn.execute(f"{text} WHERE ctid = ANY (%s::tid[])".encode(), [places])
                assert places and done.rowcount == 0, table
        for table in sorted(own):
            names = [
                row[0]
                for row in place.rows(
                    "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 "
                    "AND NOT attisdropped AND attidentity = ''",
                    f"shmdomains.{table}",
                )
            ]
            columns = ", ".join(names)
            [row] = place.rows(
                f"SELECT {columns} FROM {table} t WHERE {TABLES[table]} = %s LIMIT 1", place.green
            )
            marks = ", ".join(["%s"] * len(row))
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
                conn.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})".encode(), row)


def _column(table: str) -> str:
    columns = {"sessions": "tid", "definitions": "xml", "counters": "id"}
    return columns.get(table, "list")


def test_our_functions_lock_and_change_nothing_of_another_list(
    place: Place, green: PostgresDomainList
) -> None:
    list = place.green
    record, version = place.rows("SELECT record, version FROM domains WHERE list = %s", list)[0]
    [mutex] = place.rows("SELECT mutex FROM mutexes WHERE list = %s", list)[0]
    [process] = place.rows("SELECT process FROM processes WHERE list = %s", list)[0]
    commit = "commit_domain(%s, %s, 1, %s, %s, 'x', -1, 5::smallint, 0, true, true, 0, 0, 'x', "
    commit += "true, 'x', true, 'x', true, 'x', 'x', true, 'x', 'x', 9, '[]', false)"
    lock = "lock_domain(%s, %s, 0, "
    insert = (
        "insert_domain(%s, %s, 1, 0, gen_random_uuid(), 'x', 5::smallint, true, 'x', 'x', NULL, "
    )
    insert += "9, NULL)"
    with place.list_of("anna", "blue") as blue, place.as_role("anna") as conn:
        assert len(blue) == 0
        me = place.one("SELECT max(session) FROM sessions JOIN processes USING (process) "
                       "WHERE list <> %s", list)  # fmt: skip
        green.close()  # so that nothing changes by itself
        before = place.all_of(list)
        tried: dict[str, Any] = {}
        for text, values in {
            "lock_list(%s, %s, 0)": (list, me),
            f"{lock}NULL, %s, NULL, NULL, NULL, NULL, 0)": (list, me, record),
            f"{lock}NULL, NULL, %s, NULL, NULL, NULL, 0)": (list, me, UUID(WEB1)),
            f"{lock}NULL, NULL, NULL, 'web1', NULL, NULL, 0)": (list, me),
            f"{lock}%s, NULL, NULL, 'web1', NULL, NULL, 0)": (list, me, record),
            "commit_state(%s, %s, 1, %s, %s, 5::smallint, 0, true, 'x', 9, '[]', false)": (
                *(list, me, record, version),
            ),
            "lock_mutex(%s, %s, %s, NULL, 0)": (list, me, mutex),
            commit: (list, me, record, version),
            insert: (list, me),
            "remove_domain(%s, %s, 1, %s, %s, 9, NULL)": (list, me, record, version),
            "next_id(%s)": (list,),
            "publish(%s, 9)": (list,),
            "sweep(%s, 9)": (list,),
            "enter_session(%s, 1, 1)": (process,),
            "unlock_domain(%s, %s, false)": (record, me),
            "unlock_mutex(%s, %s, false)": (mutex, me),
        }.items():
            try:
                tried[text] = conn.execute(f"SELECT {text}".encode(), values).fetchone()
            except psycopg.errors.InsufficientPrivilege as exc:
                tried[text] = exc
            held = place.rows(
                "SELECT classid, objid FROM pg_locks WHERE locktype = 'advisory' AND pid = %s",
                conn.info.backend_pid,
            )
            assert held == [], text
        assert isinstance(tried["lock_list(%s, %s, 0)"], psycopg.Error)
        assert isinstance(tried[insert], psycopg.Error)
        assert place.all_of(list) == before


def test_a_role_can_make_nothing(place: Place, green: PostgresDomainList) -> None:
    with place.as_role("anna") as conn:
        for text in (
            "CREATE TABLE shmdomains.mine (n int)",
            "CREATE SCHEMA mine",
            "CREATE FUNCTION shmdomains.mine() RETURNS int LANGUAGE sql RETURN 1",
            "INSERT INTO lists (name, events_max, host, place, pid, start) "
            "VALUES ('x', 1, 'x', 'x', 1, 1)",
            "UPDATE lists SET name = 'x'",
            "DELETE FROM lists",
            "TRUNCATE domains CASCADE",
            "INSERT INTO lives DEFAULT VALUES",
            "UPDATE life SET life = 0",
            "DELETE FROM life",
            f"INSERT INTO users VALUES ('anna', {place.green}, 0)",
            "INSERT INTO migrations VALUES (99)",
            "ALTER TABLE domains DISABLE ROW LEVEL SECURITY",
            "CREATE POLICY mine ON domains USING (true)",
            "DROP POLICY own ON domains",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(text.encode())
        conn.execute("SET row_security = off")
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
            conn.execute("SELECT * FROM domains")
    with pytest.raises(SegmentNotFound):
        place.list_of("anna", "green")
    with pytest.raises(SegmentRefused, match="init --role anna --list green URL"):
        PostgresDomainList.open(place.url("anna", "green"))
    with place.list_of("anna", "blue") as doms, pytest.raises(SegmentRefused, match="denied"):
        doms.unlink(force=True)


def test_two_roles_side_by_side(place: Place) -> None:
    with place.list_of("anna", "blue") as blue, place.list_of("bert", "green") as green:
        for doms in (blue, green):
            if "web1" not in doms:
                doms.define(xml("web1", WEB1))
        with blue.get("web1") as one, green.get("web1", timeout=0) as other:
            id = one.activate(1)
            one.data = "anna's"
            other.data = "bert's"
            assert [lock.name for lock in blue.locks()] == ["web1"]
            holder = blue.locks()[0].holder
            assert holder is not None and holder.pid == os.getpid()
        assert (blue["web1"].data, green["web1"].data) == ("anna's", "bert's")
        assert blue["web1"].id == id
        with blue.locked(1), green.locked(1):
            pass
        seen_by = blue._store.event_count
        watch = blue.watch(timeout=5)
        with green.get("web1") as dom:
            dom.deactivate() if dom.is_active else dom.activate(2)
        with blue.get("web1") as dom:
            dom.deactivate()
        assert [event.type.name for event in blue.watch(watch.since, timeout=0)] == ["STOPPED"]
        assert next(watch).type.name == "STOPPED"
        assert blue._store.event_count > seen_by
        with blue.mutex("nightly", timeout=0), green.mutex("nightly", timeout=0):
            pass
        with blue.job("web1", "modify", timeout=1):
            assert [lock.kind for lock in blue.locks()] == ["job"]
        led = threading.Event()
        with blue.elect("leader", lambda stop: led.set() or stop.wait()):
            assert led.wait(30)
        assert blue.check().problems == [] and green.check().problems == []
        assert blue.recover().repairs == []
        assert {one.pid for one in blue.info.attached} == {os.getpid()}
        with pytest.raises(DomainExists):
            blue.define(xml("web1"), new=True)
        blue.undefine("web1")
        assert "web1" in green


def test_a_role_gets_one_list_more_or_all_of_them(place: Place) -> None:
    server = place.server
    server.psql("CREATE ROLE carl LOGIN")
    rights.install(place.admin, "carl", "red")
    rights.install(place.admin, "carl", "gold")
    names = "SELECT array_agg(name::text ORDER BY name) FROM lists"
    with place.as_role("carl") as conn:
        assert conn.execute(names).fetchone() == (["gold", "red"],)
        rights.install(place.admin, "carl")
        everything = place.one(names)
        assert conn.execute(names).fetchone() == (everything,) and len(everything) >= 4
        rights.install(place.admin, "carl", "red")
        assert conn.execute(names).fetchone() == (["gold", "red"],)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("DELETE FROM lists")
    server.psql("DROP OWNED BY carl; DROP ROLE carl; CREATE ROLE carl LOGIN")
    rights.install(place.admin, "carl", "blue")
    with place.as_role("carl") as conn:
        assert conn.execute(names).fetchone() == (["blue"],)


def test_init_by_the_command(place: Place) -> None:
    place.server.psql('CREATE ROLE "o\'Brien ""$1" LOGIN')
    admin = place.url("postgres", "any")
    role, list = "o'Brien \"$1", "blue '\"\\ $1 %s"
    [said] = out("postgres", "init", admin, "--role", role, "--list", list)
    assert said.endswith(f"and role '{role}' may use list '{list}'")
    with place.list_of(quote(role, safe=""), quote(list, safe="")) as doms:
        doms.define(xml("web1"))
        assert [info.name for info in doms] == ["web1"]
    assert "--role" in invoke("postgres", "init", admin, "--list", "blue", status=2).stderr
    invoke("postgres", "init", admin, "--role", "anna", "--list", "a\nb", status=2)


# --- what never becomes part of a statement -------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names(place: Place, name: str) -> None:
    address = place.url("vms", quote(name, safe=""))
    with PostgresDomainList.open(address, host=f"host {name}") as doms:
        assert doms.info.name == name
        doms.define(xml("web1", WEB1))
        with doms.locked(1):
            dom = doms.find_by_uuid(WEB1)
            assert dom is not None
            doms.rename(dom, name)
            dom.unlock()
        with doms.get(name) as dom:
            dom.activate(7)
            dom.data = {"a": name, "b\0": "\0"}
            assert [lock.holder.host for lock in doms.locks() if lock.holder] == [f"host {name}"]
        info = doms.peek(name)
        assert info is not None and info.host == f"host {name}" and info.data["b\0"] == "\0"
        assert [one.name for one in doms.list(host=f"host {name}")] == [name]
        with doms.mutex(name, timeout=1):
            pass
        with doms.get(name) as dom:
            dom.definition = dom.definition.replace(title=name, description=f"<b>{name}</b>")
            dom.deactivate()
        assert doms[name].definition.title == name
        assert doms.peek(f"{name} not there") is None
        assert name in [event.name for event in doms.watch(since=0, timeout=0)]
        assert doms.check().problems == []
        doms.unlink(force=True)
    assert place.one("SELECT count(*) FROM lists WHERE name = 'blue'") == 1


@pytest.mark.parametrize("name", ["a\0b", "a\nb", ""])
def test_names_that_are_refused(place: Place, name: str) -> None:
    with pytest.raises(ValueError, match=r"a list's name|cannot be read"):
        PostgresDomainList.open(place.url("vms", quote(name, safe="")))
    if name:
        with pytest.raises(ValueError, match="a host's name"):
            PostgresDomainList.open(place.url("vms", "blue"), host=name)


def test_a_name_goes_on_after_a_nul(place: Place) -> None:
    with place.list_of("vms", "blue") as doms:
        doms.define(xml("a"))
        for name in ("a\0", "a\0b", "a\ud800"):
            assert doms.peek(name) is None and doms.lookup(name) is None
            assert doms.list(host="a\0b") == []
            with pytest.raises(ValueError, match=r"keeps no name|surrogates"):
                doms.mutex(name)
        with doms.get("a") as dom, pytest.raises(ValueError, match="no name of a host"):
            dom.activate(1, host="a\0b")
        with pytest.raises(Refused, match="0x00"):  # whatever comes that far is not cut short
            doms._pool.ask(ask.BY["name"], [b"%d" % doms._pool.list, b"a\0b"])
        doms.undefine("a")


def test_anybody_may_notify_and_it_does_no_harm(place: Place, caplog: Any) -> None:
    with place.list_of("vms", "blue") as doms, place.as_role("anna") as conn:
        before = doms._pool.listener.listen()
        for text in ("", "x", "-1", "1; DROP TABLE", "9" * 40, "²"):
            conn.execute("SELECT pg_notify(%s, %s)", [f"shmdomains_{doms._pool.list}", text])
        assert doms._pool.listener.sleep(before, None, 5)
        assert doms._pool.listener._listens
    assert caplog.records == []


# --- passwords ------------------------------------------------------------------------------------


def test_a_password_from_a_file_is_nowhere(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret, server = "pw-of-vms", place.server
    file = tmp_path / "pgpass"
    file.write_text(f"127.0.0.1:{server.port}:*:vms:{secret}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", os.fspath(file))
    address = f"postgresql://vms@127.0.0.1:{server.port}/shmdomains?list=blue"
    texts = []
    with PostgresDomainList.open(address) as doms:
        doms.define(xml("pw"))
        texts += [repr(doms), doms.info.path, repr(doms._pool.address), str(doms.info)]
        texts += [pickle.dumps(doms).decode("latin1"), repr(doms.locks())]
        texts += [one.cmdline().__repr__() for one in server.processes()]
        texts += [repr(place.rows("SELECT application_name, query FROM pg_stat_activity"))]
        assert "pw" in pickle.loads(pickle.dumps(doms))
        with pytest.raises(DomainExists) as refused:
            doms.define(xml("pw", UUID(int=5)), new=True)
        texts.append(str(refused.value))
        doms.undefine("pw")
    monkeypatch.delenv("PGPASSFILE")
    texts += [repr(psutil.Process().cmdline()), caplog.text, server.log()]
    for text in texts:
        assert secret not in text
    assert any("vms@127.0.0.1" in text for text in texts)


@pytest.mark.parametrize("secret", ["hunter2secret", "a'b\\c d", "p@ss:w/o?r#d%", 'q"u=o&te'])
def test_a_password_of_a_url_is_in_no_message(
    place: Place, secret: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    port, quoted = place.server.port, quote(secret, safe="")
    texts = []
    for address in (
        f"postgresql://vms:{quoted}@127.0.0.1:{port}/shmdomains",
        f"postgresql://vms@127.0.0.1:{port}/shmdomains?password={quoted}",
        f"postgresql://vms:{quoted}@127.0.0.1:1/shmdomains",
        f"postgresql://vms:{quoted}@127.0.0.1:{port}/shmdomains?sslmode=verify-full",
        f"postgresql://vms:{quoted}@127.0.0.1:{port}/shmdomains?nonsense=1",
    ):
        with pytest.raises(Unavailable) as away:
            PostgresDomainList.open(address)
        texts += [str(away.value), repr(url.parse(address)), failure("-s", address, "list")]
    texts.append(caplog.text)
    for text in texts:
        assert secret not in text and quoted not in text


@pytest.mark.parametrize(
    "secret", ["p@ssword", "pass/word", "pass?word", "pass#word", "pass%zzword"]
)
def test_a_password_that_is_not_quoted(place: Place, secret: str) -> None:
    address = f"postgresql://vms:{secret}@127.0.0.1:{place.server.port}/shmdomains"
    with pytest.raises(ValueError, match="%40") as refused:
        PostgresDomainList.open(address)
    said = str(refused.value) + invoke("-s", address, "list", status=2).stderr
    said = said.replace("a password", "")
    assert "pass" not in said and "word" not in said


def test_names_of_roles_in_a_grant(place: Place) -> None:
    for role in ("nobody'; DROP SCHEMA shmdomains CASCADE; --", 'x" TO PUBLIC; --'):
        with pytest.raises(psycopg.errors.UndefinedObject):
            rights.install(place.admin, role, "blue")
    assert sql.Identifier("x").as_string() == '"x"'
    assert place.one("SELECT count(*) FROM users WHERE role = 'anna'") == 1
