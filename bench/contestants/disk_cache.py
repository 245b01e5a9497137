"""diskcache on tmpfs: a dict in SQLite files, with transactions and locks that expire.

Small fields, the driver's data and definitions are entries of their own; a change is a transaction,
as the documentation shows, of which there is one at a time for all domains. A lock that outlives a
transaction is its `Lock` recipe with an expiry of ten seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgpack

from ..world import RUNNING, Made
from .base import Contestant, Row, drop, lacks, memory_folder, pack_data, unpack_data

EXPIRY = 10.0


class DiskCache(Contestant):
    name = "diskcache"
    most = 10_000
    packages = ("diskcache",)

    @classmethod
    def missing(cls) -> str | None:
        return lacks("diskcache", "diskcache")

    def fill(self, domains: Iterable[Made], count: int) -> None:
        self.folder = memory_folder()
        self.attach()
        with self.cache.transact():
            for id, made in enumerate(domains, self.first_id):
                self._put(made.uuid, made.name, id, RUNNING, self.prepare(made.definition))

    def attach(self) -> None:
        import diskcache

        self.cache = diskcache.Cache(
            self.folder,
            eviction_policy="none",
            cull_limit=0,
            size_limit=1 << 40,
            sqlite_synchronous=0,
        )

    def close(self) -> None:
        self.cache.close()
        drop(self.folder)

    def _put(self, uuid: bytes, name: str, id: int, state: int, definition: Any) -> None:
        if not self.cache.add(uuid, (state, id, name)) or not self.cache.add(name, uuid):
            raise ValueError("exists")
        self.cache[b"definition:" + uuid] = msgpack.packb(definition)
        if id >= 0:
            self.cache[id] = uuid

    def read_state(self, uuids: Sequence[bytes]) -> int:
        cache = self.cache
        for uuid in uuids:
            state: int = cache[uuid][0]
        return state

    def read_definition(self, names: Sequence[str]) -> Any:
        cache, unpack = self.cache, msgpack.unpackb
        for name in names:
            definition = unpack(cache[b"definition:" + cache[name]])
        return definition

    def change_state(self, uuids: Sequence[bytes], state: int) -> None:
        cache = self.cache
        for uuid in uuids:
            with cache.transact():
                cache[uuid] = (state, *cache[uuid][1:])

    def replace(self, changes: Sequence[tuple[bytes, Any]]) -> None:
        cache, pack = self.cache, msgpack.packb
        for uuid, definition in changes:
            cache[b"definition:" + uuid] = pack(definition)

    def define(self, added: Sequence[tuple[bytes, str, Any]]) -> None:
        for uuid, name, definition in added:
            with self.cache.transact():
                self._put(uuid, name, -1, 5, definition)

    def remove(self, uuids: Sequence[bytes]) -> None:
        cache = self.cache
        for uuid in uuids:
            with cache.transact():
                del cache[cache[uuid][2]]
                del cache[uuid]
                del cache[b"definition:" + uuid]
                cache.delete(b"data:" + uuid)

    def by_id(self, ids: Sequence[int]) -> int:
        cache = self.cache
        for id in ids:
            state: int = cache[cache[id]][0]
        return state

    def miss(self, uuids: Sequence[bytes]) -> None:
        cache = self.cache
        for uuid in uuids:
            assert cache.get(uuid) is None

    def rows(self) -> list[Row]:
        found = []
        for key in self.cache:
            if isinstance(key, bytes) and len(key) == 16:
                state, id, name = self.cache[key]
                found.append((id, name, state))
        return found

    def read_data(self, uuids: Sequence[bytes]) -> Any:
        cache, unpack = self.cache, unpack_data
        for uuid in uuids:
            value = unpack(cache[b"data:" + uuid])
        return value

    def change_data(self, uuids: Sequence[bytes], value: Any) -> None:
        cache, pack = self.cache, pack_data
        for uuid in uuids:
            cache[b"data:" + uuid] = pack(value)

    def increment(self, uuids: Sequence[bytes]) -> None:
        cache, pack, unpack = self.cache, pack_data, unpack_data
        for uuid in uuids:
            key = b"data:" + uuid
            with cache.transact():
                value = unpack(cache[key])
                value["requests"] += 1
                cache[key] = pack(value)

    def hold(self, uuid: bytes) -> None:
        import diskcache

        diskcache.Lock(self.cache, b"lock:" + uuid, expire=EXPIRY).acquire()

    def take(self, uuid: bytes) -> None:
        import diskcache

        with diskcache.Lock(self.cache, b"lock:" + uuid, expire=EXPIRY):
            pass

    def footprint(self) -> int:
        return int(self.cache.volume())
