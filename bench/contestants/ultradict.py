"""UltraDict: dicts that every process has in full, kept equal by a stream of pickled changes.

With `shared_lock=True`, as it asks of unrelated processes. There is no lock per key: a change takes
the dict's. States, the driver's data, definitions and the indexes are dicts of their own, so that a
change of one streams little; the stream's buffers are large enough that full dumps are rare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..world import RUNNING, Made
from .base import Contestant, Row, lacks

BUFFER = 32_000_000


class Ultradict(Contestant):
    name = "UltraDict"
    most = 10_000
    packages = ("ultradict", "atomics")

    @classmethod
    def missing(cls) -> str | None:
        return lacks("ultradict", "UltraDict") or lacks("atomics", "atomics")

    def fill(self, domains: Iterable[Made], count: int) -> None:
        states: dict[bytes, Any] = {}
        definitions: dict[bytes, Any] = {}
        keys: dict[Any, bytes] = {}
        for id, made in enumerate(domains, self.first_id):
            states[made.uuid] = (RUNNING, id, made.name)
            definitions[made.uuid] = self.prepare(made.definition)
            keys[made.name] = keys[id] = made.uuid
        self.states = self._make(states)
        self.data = self._make({})
        self.definitions = self._make(definitions)
        self.keys = self._make(keys)

    @staticmethod
    def _make(values: dict[Any, Any]) -> Any:
        from UltraDict import UltraDict

        made = UltraDict(shared_lock=True, buffer_size=BUFFER)
        made.update(values)
        made.dump()
        return made

    def attach(self) -> None:
        from UltraDict import UltraDict

        # The inherited ones must not unlink anything when they go.
        self.inherited = (self.states, self.data, self.definitions, self.keys)
        self.states, self.data, self.definitions, self.keys = (
            UltraDict(name=one.name, shared_lock=True, buffer_size=BUFFER, auto_unlink=False)
            for one in self.inherited
        )

    def close(self) -> None:
        for one in (self.states, self.data, self.definitions, self.keys):
            one.close(unlink=True)

    def read_state(self, uuids: Sequence[bytes]) -> int:
        states = self.states
        for uuid in uuids:
            with states.lock:
                state: int = states[uuid][0]
        return state

    def peek(self, uuids: Sequence[bytes]) -> int:
        states = self.states
        for uuid in uuids:
            state: int = states[uuid][0]
        return state

    def read_definition(self, names: Sequence[str]) -> Any:
        keys, definitions = self.keys, self.definitions
        for name in names:
            with definitions.lock:
                definition = definitions[keys[name]]
        return definition

    def change_state(self, uuids: Sequence[bytes], state: int) -> None:
        states = self.states
        for uuid in uuids:
            with states.lock:
                states[uuid] = (state, *states[uuid][1:])

    def replace(self, changes: Sequence[tuple[bytes, Any]]) -> None:
        definitions = self.definitions
        for uuid, definition in changes:
            with definitions.lock:
                definitions[uuid] = definition

    def define(self, added: Sequence[tuple[bytes, str, Any]]) -> None:
        states, definitions, keys = self.states, self.definitions, self.keys
        for uuid, name, definition in added:
            with states.lock:
                if uuid in states or name in keys:
                    raise ValueError("exists")
                definitions[uuid] = definition
                keys[name] = uuid
                states[uuid] = (5, -1, name)

    def remove(self, uuids: Sequence[bytes]) -> None:
        states, definitions, keys = self.states, self.definitions, self.keys
        for uuid in uuids:
            with states.lock:
                del keys[states[uuid][2]]
                del states[uuid]
                del definitions[uuid]
                if uuid in self.data:
                    del self.data[uuid]

    def by_id(self, ids: Sequence[int]) -> int:
        states, keys = self.states, self.keys
        for id in ids:
            with states.lock:
                state: int = states[keys[id]][0]
        return state

    def miss(self, uuids: Sequence[bytes]) -> None:
        states = self.states
        for uuid in uuids:
            with states.lock:
                assert uuid not in states

    def rows(self) -> list[Row]:
        with self.states.lock:
            return [(id, name, state) for state, id, name in self.states.values()]

    def read_data(self, uuids: Sequence[bytes]) -> Any:
        data = self.data
        for uuid in uuids:
            with data.lock:
                value = data[uuid]
        return value

    def change_data(self, uuids: Sequence[bytes], value: Any) -> None:
        data = self.data
        for uuid in uuids:
            with data.lock:
                data[uuid] = value

    def increment(self, uuids: Sequence[bytes]) -> None:
        data = self.data
        for uuid in uuids:
            with data.lock:
                value = data[uuid]
                data[uuid] = {**value, "requests": value["requests"] + 1}

    def hold(self, uuid: bytes) -> None:
        self.states.lock.acquire()

    def take(self, uuid: bytes) -> None:
        with self.states.lock(timeout=1, steal_after_timeout=True):
            pass
