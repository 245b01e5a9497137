"""Redis, or Valkey, on a unix socket, without persistence; a server of the bench's own.

A hash per domain, one hash from names and one from ids to UUIDs. Reading and changing is a Lua
script in the server, which is how its documentation makes a change that depends on what is there:
one round trip. A lock that outlives a request is redis-py's, a lease of ten seconds.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgpack

from ..world import RUNNING, Made
from .base import Contestant, Row, drop, lacks, memory_folder, pack_data, unpack_data

LEASE = 10.0
STATE = "return redis.call('HGET', KEYS[1], 'state')"
BY_ID = """local uuid = redis.call('HGET', 'ids', ARGV[1])
return redis.call('HGET', 'domain:' .. uuid, 'state')"""
DEFINITION = """local uuid = redis.call('HGET', 'names', ARGV[1])
return redis.call('HGET', 'domain:' .. uuid, 'definition')"""
SET = """if redis.call('EXISTS', KEYS[1]) == 0 then return redis.error_reply('gone') end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])"""
DEFINE = """if redis.call('EXISTS', KEYS[1]) == 1 or redis.call('HSETNX', 'names', ARGV[2], ARGV[1])
    == 0 then return redis.error_reply('exists') end
redis.call('HSET', KEYS[1], 'name', ARGV[2], 'id', -1, 'state', 5, 'definition', ARGV[3])"""
REMOVE = """redis.call('HDEL', 'names', redis.call('HGET', KEYS[1], 'name'))
redis.call('DEL', KEYS[1])"""
INCREMENT = """local data = cmsgpack.unpack(redis.call('HGET', KEYS[1], 'data'))
data.requests = data.requests + 1
redis.call('HSET', KEYS[1], 'data', cmsgpack.pack(data))"""


def _server() -> str | None:
    return shutil.which("valkey-server") or shutil.which("redis-server")


class Redis(Contestant):
    name = "Redis"
    most = 100_000
    packages = ("redis", "hiredis")

    @classmethod
    def missing(cls) -> str | None:
        if _server() is None:
            return "neither redis-server nor valkey-server is installed: apt install redis-server"
        return lacks("redis", "redis") or lacks("hiredis", "hiredis")

    @classmethod
    def versions(cls) -> dict[str, str]:
        server = _server()
        assert server is not None
        says = subprocess.run([server, "--version"], capture_output=True, text=True).stdout
        number = next((word[2:] for word in says.split() if word.startswith("v=")), "?")
        return {**super().versions(), server.rpartition("/")[2]: number}

    def fill(self, domains: Iterable[Made], count: int) -> None:
        server = _server()
        assert server is not None
        self.folder = memory_folder()
        self.server = subprocess.Popen(
            [
                *(server, "--port", "0", "--unixsocket", f"{self.folder}/socket"),
                *("--save", "", "--appendonly", "no", "--dir", self.folder),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait()
        self.empty = int(self.client.info("memory")["used_memory"])
        pipe = self.client.pipeline(transaction=False)
        for id, made in enumerate(domains, self.first_id):
            fields = {
                "name": made.name,
                "id": id,
                "state": RUNNING,
                "definition": msgpack.packb(self.prepare(made.definition)),
            }
            pipe.hset(b"domain:" + made.uuid, mapping=fields)
            pipe.hset("names", made.name, made.uuid)
            pipe.hset("ids", str(id), made.uuid)
            if id % 1000 == 0:
                pipe.execute()
        pipe.execute()

    def _wait(self) -> None:
        import redis

        deadline = time.monotonic() + 20
        while True:
            try:
                self.attach()
                self.client.ping()
                return
            except (redis.ConnectionError, FileNotFoundError):
                if time.monotonic() > deadline or self.server.poll() is not None:
                    raise
                time.sleep(0.01)

    def attach(self) -> None:
        import redis

        # One connection, kept: the pool would look at it before each command.
        self.client = redis.Redis(
            unix_socket_path=f"{self.folder}/socket", single_connection_client=True
        )
        register = self.client.register_script
        self._state, self._by_id, self._definition = map(register, (STATE, BY_ID, DEFINITION))
        self._set, self._define, self._remove = map(register, (SET, DEFINE, REMOVE))
        self._increment = register(INCREMENT)

    def close(self) -> None:
        self.client.close()
        self.server.terminate()
        self.server.wait()
        drop(self.folder)

    def read_state(self, uuids: Sequence[bytes]) -> int:
        get = self.client.hget  # one command is as atomic as a script
        for uuid in uuids:
            state = int(get(b"domain:" + uuid, "state"))
        return state

    def read_definition(self, names: Sequence[str]) -> Any:
        script, unpack = self._definition, msgpack.unpackb
        for name in names:
            definition = unpack(script(args=(name,)))
        return definition

    def change_state(self, uuids: Sequence[bytes], state: int) -> None:
        script = self._set
        for uuid in uuids:
            script(keys=(b"domain:" + uuid,), args=("state", state))

    def replace(self, changes: Sequence[tuple[bytes, Any]]) -> None:
        script, pack = self._set, msgpack.packb
        for uuid, definition in changes:
            script(keys=(b"domain:" + uuid,), args=("definition", pack(definition)))

    def define(self, added: Sequence[tuple[bytes, str, Any]]) -> None:
        script, pack = self._define, msgpack.packb
        for uuid, name, definition in added:
            script(keys=(b"domain:" + uuid,), args=(uuid, name, pack(definition)))

    def remove(self, uuids: Sequence[bytes]) -> None:
        script = self._remove
        for uuid in uuids:
            script(keys=(b"domain:" + uuid,))

    def by_id(self, ids: Sequence[int]) -> int:
        script = self._by_id
        for id in ids:
            state = int(script(args=(id,)))
        return state

    def miss(self, uuids: Sequence[bytes]) -> None:
        get = self.client.hget
        for uuid in uuids:
            assert get(b"domain:" + uuid, "state") is None

    def rows(self) -> list[Row]:
        uuids = self.client.hvals("names")
        found = []
        for begin in range(0, len(uuids), 1000):
            pipe = self.client.pipeline(transaction=False)
            for uuid in uuids[begin : begin + 1000]:
                pipe.hmget(b"domain:" + uuid, ("id", "name", "state"))
            for id, name, state in pipe.execute():
                found.append((int(id), name.decode(), int(state)))
        return found

    def read_data(self, uuids: Sequence[bytes]) -> Any:
        get, unpack = self.client.hget, unpack_data
        for uuid in uuids:
            value = unpack(get(b"domain:" + uuid, "data"))
        return value

    def change_data(self, uuids: Sequence[bytes], value: Any) -> None:
        script, pack = self._set, pack_data
        for uuid in uuids:
            script(keys=(b"domain:" + uuid,), args=("data", pack(value)))

    def increment(self, uuids: Sequence[bytes]) -> None:
        script = self._increment
        for uuid in uuids:
            script(keys=(b"domain:" + uuid,))

    def hold(self, uuid: bytes) -> None:
        self.held = self.client.lock(b"lock:" + uuid, timeout=LEASE)
        self.held.acquire()

    def take(self, uuid: bytes) -> None:
        with self.client.lock(b"lock:" + uuid, timeout=LEASE):
            pass

    def footprint(self) -> int:
        return int(self.client.info("memory")["used_memory"]) - self.empty
