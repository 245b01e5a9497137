"""Who is measured where the list is for more than one host: ours, by hand with psycopg, etcd.

All have the same domains and are asked by name. A process has one connection; a forked one calls
`attach` first. What each does is in a loop of its own.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import msgpack
import psycopg

from shmdomains import DomainState

from . import world
from .children import PATIENCE

Row = tuple[int, str, int]  # id, name, state


def threads(pid: int) -> list[int]:
    return [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]


class Side(ABC):
    """The operations take names; what they read last is returned, by which a test knows it."""

    name: ClassVar[str]
    kills: ClassVar[int] = 1_000_000  # a limit for those whose lock takes long to come free
    cap: ClassVar[float] = 1.5  # seconds after which a killed holder's domain counts as never free

    @abstractmethod
    def attach(self) -> None:
        """Begin in this process."""

    @abstractmethod
    def read_state(self, names: Sequence[str]) -> int:
        """Find and lock, read the state, unlock."""

    @abstractmethod
    def change_state(self, names: Sequence[str], state: int) -> None: ...

    @abstractmethod
    def rows(self) -> list[Row]:
        """Id, name and state of all."""

    @abstractmethod
    def increment(self, names: Sequence[str]) -> None:
        """Find, read a number of the domain, write one more, unlock: nothing may be lost."""

    @abstractmethod
    def count(self, name: str) -> int:
        """That number, when nobody changes it."""

    @abstractmethod
    def hold(self, name: str) -> None:
        """Take the domain's lock and keep it."""

    @abstractmethod
    def take(self, name: str) -> None:
        """Wait for what `hold` takes, then let go of it."""

    def served_by(self) -> list[int]:
        """Threads and processes of a server of its own, beside PostgreSQL's."""
        return []

    @abstractmethod
    def close(self) -> None:
        """All of it is gone."""


class ByHand(Side):
    """As a good engineer writes it: a table, one row a domain, `SELECT … FOR UPDATE`, prepared
    statements, room in the pages for new versions of rows.

    The definition is ``xml`` where the server knows that type (an embedded one has no libxml).
    """

    name = "psycopg by hand"

    def __init__(self, uri: str, count: int) -> None:
        self._uri, self._table = uri, f"by_hand.domains_{count}"
        with psycopg.connect(uri, autocommit=True) as session:
            session.execute("CREATE SCHEMA IF NOT EXISTS by_hand")
            session.execute(f"DROP TABLE IF EXISTS {self._table}")
            session.execute(
                f"CREATE TABLE {self._table} (id integer PRIMARY KEY, uuid uuid UNIQUE NOT NULL,"
                " name text UNIQUE NOT NULL, state smallint NOT NULL, data bytea,"
                f" definition {_xml_type(session)} NOT NULL) WITH (fillfactor = 70)"
            )
            session.execute(
                f"INSERT INTO {self._table} SELECT i, gen_random_uuid(), 'vm' || i, 1, %s, %s"
                " FROM generate_series(1, %s) AS i",
                (msgpack.packb(0), world.template().to_xml(), count),
            )
            session.execute(f"VACUUM ANALYZE {self._table}")
        where = f"FROM {self._table} WHERE name = %s FOR UPDATE"
        self._find_state = f"SELECT id, uuid, state {where}"
        self._find_data = f"SELECT id, uuid, data {where}"
        self._set_state = f"UPDATE {self._table} SET state = %s WHERE id = %s"
        self._set_data = f"UPDATE {self._table} SET data = %s WHERE id = %s"
        self.attach()

    def attach(self) -> None:
        self._session = psycopg.connect(self._uri, prepare_threshold=0)

    def read_state(self, names: Sequence[str]) -> int:
        execute, commit, find = self._session.execute, self._session.commit, self._find_state
        for name in names:
            _id, _uuid, state = _one(execute(find, (name,)))
            commit()
        return int(state)

    def change_state(self, names: Sequence[str], state: int) -> None:
        execute, commit = self._session.execute, self._session.commit
        for name in names:
            id, _uuid, _state = _one(execute(self._find_state, (name,)))
            execute(self._set_state, (state, id))
            commit()

    def rows(self) -> list[Row]:
        rows: list[Row] = self._session.execute(
            f"SELECT id, name, state FROM {self._table}"
        ).fetchall()
        self._session.commit()
        return rows

    def increment(self, names: Sequence[str]) -> None:
        execute, commit = self._session.execute, self._session.commit
        for name in names:
            id, _uuid, data = _one(execute(self._find_data, (name,)))
            execute(self._set_data, (msgpack.packb(msgpack.unpackb(data) + 1), id))
            commit()

    def count(self, name: str) -> int:
        (data,) = _one(
            self._session.execute(f"SELECT data FROM {self._table} WHERE name = %s", (name,))
        )
        self._session.commit()
        return int(msgpack.unpackb(data))

    def hold(self, name: str) -> None:
        self._session.execute(self._find_state, (name,))

    def take(self, name: str) -> None:
        self.read_state([name])

    def close(self) -> None:
        with self._session as session:
            session.execute(f"DROP TABLE {self._table}")


def _one(cursor: psycopg.Cursor[Any]) -> Any:
    row = cursor.fetchone()
    assert row is not None
    return row


def _xml_type(session: psycopg.Connection[Any]) -> str:
    try:
        session.execute("SELECT '<a/>'::xml")
    except psycopg.errors.FeatureNotSupported:
        return "text"
    return "xml"


class Ours(Side):
    """The list on PostgreSQL, by its public methods."""

    name = "shmdomains"

    def __init__(self, uri: str, count: int) -> None:
        from shmdomains.postgres import PostgresDomainList

        separator = "&" if "?" in uri else "?"
        url = f"{uri}{separator}list=bench{count}"
        self.doms = PostgresDomainList.create(url)
        with self.doms.locked():
            dom = self.doms.assign_def(world.template().replace(name="vm1", uuid=None), True)
        dom.activate()
        dom.data = 0
        dom.unlock()
        _multiply(uri, f"bench{count}", count)

    def attach(self) -> None:
        pass  # it knows a fork by itself

    def read_state(self, names: Sequence[str]) -> int:
        get = self.doms.get
        for name in names:
            with get(name=name) as dom:
                state: int = dom.state
        return state

    def change_state(self, names: Sequence[str], state: int) -> None:
        get, new = self.doms.get, DomainState(state)
        for name in names:
            with get(name=name) as dom:
                dom.state = new

    def rows(self) -> list[Row]:
        return [(info.id, info.name, info.state) for info in self.doms.list(definitions=False)]

    def increment(self, names: Sequence[str]) -> None:
        get = self.doms.get
        for name in names:
            with get(name=name) as dom:
                dom.data += 1

    def count(self, name: str) -> int:
        info = self.doms.peek(name=name)
        assert info is not None
        return int(info.data)

    def hold(self, name: str) -> None:
        self.held = self.doms.get(name=name)

    def take(self, name: str) -> None:
        self.doms.get(name=name).unlock()

    def close(self) -> None:
        self.doms.unlink(force=True)
        self.doms.close()


def _multiply(uri: str, name: str, count: int) -> None:
    """As many domains as the list's only one: a million by the API would take half an hour."""
    with psycopg.connect(uri) as session:
        list_, first = _one(
            session.execute(
                "SELECT list, record FROM shmdomains.domains JOIN shmdomains.lists USING (list)"
                " WHERE lists.name = %s",
                (name,),
            )
        )
        session.execute("SELECT setval(pg_get_serial_sequence('shmdomains.domains', 'record'), %s)",
                        (first + count,))  # fmt: skip
        own = {"record": "%(first)s + i", "uuid": "gen_random_uuid()", "name": "'vm' || i + 1",
               "id": "id + i"}  # fmt: skip
        for table in ("domains", "definitions"):
            columns = [
                column
                for (column,) in session.execute(
                    "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass"
                    " AND attnum > 0 AND NOT attisdropped AND attgenerated = ''",
                    (f"shmdomains.{table}",),
                )
            ]
            values = ", ".join(own.get(column, f"of_one.{column}") for column in columns)
            session.execute(
                f"INSERT INTO shmdomains.{table} ({', '.join(columns)}) OVERRIDING SYSTEM VALUE"
                f" SELECT {values} FROM shmdomains.{table} AS of_one,"
                " generate_series(1, %(more)s) AS i WHERE record = %(first)s",
                {"first": first, "more": count - 1},
            )
        session.execute(
            "UPDATE shmdomains.counters SET id = id + %s WHERE list = %s", (count - 1, list_)
        )
    with psycopg.connect(uri, autocommit=True) as session:
        for table in ("domains", "definitions"):
            session.execute(f"VACUUM ANALYZE shmdomains.{table}")


class Etcd(Side):
    """A key a domain and a key a lock that hangs on the process's lease: locked and read in one
    transaction, written and unlocked in another. By the JSON gateway, one kept connection."""

    name = "etcd"
    kills = 3
    cap = 15.0
    LEASE = 2  # seconds; the shortest that it grants

    @staticmethod
    def missing() -> str | None:
        if shutil.which("etcd") is None:
            return "etcd is not installed: apt install etcd-server"
        return None

    def __init__(self, count: int) -> None:
        self.folder = tempfile.mkdtemp(prefix="shmdomains-bench-")
        with (
            socket.create_server(("127.0.0.1", 0)) as one,
            socket.create_server(("127.0.0.1", 0)) as two,
        ):
            self._port, peers = one.getsockname()[1], two.getsockname()[1]
        clients, members = (f"http://127.0.0.1:{port}" for port in (self._port, peers))
        self._server = subprocess.Popen(
            ["etcd", "--data-dir", f"{self.folder}/data", "--name", "bench",
             "--listen-client-urls", clients, "--advertise-client-urls", clients,
             "--listen-peer-urls", members, "--initial-advertise-peer-urls", members,
             "--initial-cluster", f"bench={members}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            self._wait()
            self.attach()
            document = world.template().to_xml()
            for at in range(1, count + 1, 50):  # a transaction has at most 128 parts
                puts = [
                    part
                    for number in range(at, min(at + 50, count + 1))
                    for part in (
                        self._put(f"d/vm{number}", _domain(number, 1, 0)),
                        self._put(f"x/vm{number}", document),
                    )
                ]
                self._ask("kv/txn", {"success": puts})
        except BaseException:
            self.close()
            raise

    def served_by(self) -> list[int]:
        return threads(self._server.pid)

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._http = http.client.HTTPConnection("127.0.0.1", self._port)
                self._ask("maintenance/status", {})
                return
            except (OSError, RuntimeError):
                if time.monotonic() > deadline or self._server.poll() is not None:
                    raise
                time.sleep(0.05)

    def attach(self) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", self._port)
        self._http.connect()
        assert self._http.sock is not None
        self._http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._grant()

    def _grant(self) -> None:
        # Long for whoever works, so that nobody has to keep it alive; `hold` takes a short one.
        self._lease = self._ask("lease/grant", {"TTL": 600})["ID"]

    def _ask(self, what: str, body: dict[str, Any]) -> Any:
        self._http.request("POST", f"/v3/{what}", json.dumps(body))
        response = self._http.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"etcd: {what}: {answer!r}")
        return json.loads(answer)

    def _put(self, key: str, value: str, lease: str | None = None) -> dict[str, Any]:
        put = {"key": _encoded(key), "value": _encoded(value)}
        return {"requestPut": put if lease is None else {**put, "lease": lease}}

    def _locked(self, name: str) -> Any:
        lock = f"l/{name}"
        absent = {"key": _encoded(lock), "target": "CREATE", "createRevision": "0"}
        ask = {
            "compare": [absent],
            "success": [
                self._put(lock, "held", self._lease),
                {"requestRange": {"key": _encoded(f"d/{name}")}},
            ],
        }
        while True:
            answer = self._ask("kv/txn", ask)
            if answer.get("succeeded"):
                found = answer["responses"][1]["response_range"]["kvs"][0]["value"]
                return json.loads(base64.b64decode(found))
            self._until_deleted(lock, int(answer["header"]["revision"]) + 1)

    def _until_deleted(self, key: str, revision: int) -> None:
        watching = http.client.HTTPConnection("127.0.0.1", self._port)
        create = {"key": _encoded(key), "start_revision": str(revision)}
        watching.request("POST", "/v3/watch", json.dumps({"create_request": create}))
        with watching.getresponse() as response:
            # It may have gone between the transaction and the watch, or come again since.
            while line := response.readline():
                events = json.loads(line)["result"].get("events", ())
                if any(event.get("type") == "DELETE" for event in events):
                    break
        watching.close()

    def _unlocked(self, name: str, *puts: dict[str, Any]) -> None:
        """What is put is put only if the lock is still this lease's."""
        mine = {"key": _encoded(f"l/{name}"), "target": "LEASE", "lease": self._lease}
        delete = {"requestDeleteRange": {"key": _encoded(f"l/{name}")}}
        answer = self._ask("kv/txn", {"compare": [mine], "success": [*puts, delete]})
        if not answer.get("succeeded"):
            raise RuntimeError("the lock is not this process's any more")

    def read_state(self, names: Sequence[str]) -> int:
        for name in names:
            domain = self._locked(name)
            self._unlocked(name)
        return int(domain["state"])

    def change_state(self, names: Sequence[str], state: int) -> None:
        for name in names:
            domain = self._locked(name)
            domain["state"] = state
            self._unlocked(name, self._put(f"d/{name}", json.dumps(domain)))

    def rows(self) -> list[Row]:
        ask = {"key": _encoded("d/"), "range_end": _encoded("d0")}
        found = [
            json.loads(base64.b64decode(kv["value"])) for kv in self._ask("kv/range", ask)["kvs"]
        ]
        return [(domain["id"], f"vm{domain['id']}", domain["state"]) for domain in found]

    def increment(self, names: Sequence[str]) -> None:
        for name in names:
            domain = self._locked(name)
            domain["data"] += 1
            self._unlocked(name, self._put(f"d/{name}", json.dumps(domain)))

    def count(self, name: str) -> int:
        (found,) = self._ask("kv/range", {"key": _encoded(f"d/{name}")})["kvs"]
        return int(json.loads(base64.b64decode(found["value"]))["data"])

    def hold(self, name: str) -> None:
        self._lease = self._ask("lease/grant", {"TTL": self.LEASE})["ID"]
        self._locked(name)

    def take(self, name: str) -> None:
        self.read_state([name])

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _domain(number: int, state: int, data: int) -> str:
    return json.dumps({"id": number, "state": state, "data": data})
