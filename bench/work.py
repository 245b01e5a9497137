"""The works of one process: what is timed, on which keys.

A work is a preparation, which is not timed, and a run, which is. `Works.measure` calibrates how
often an operation is repeated so that a run lasts about as long as asked for, whoever is measured.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from uuid import UUID

from . import world
from .children import Changer
from .contestants import Contestant, NotOfferedError

Run = tuple[str, int, Callable[[], Any]]  # name of the figure, operations, what is timed

MOST_KEYS = 50_000
MOST_DEFINITIONS = 2_000


class Timing(NamedTuple):
    """Seconds per operation, by the wall's clock and by this process's CPU time."""

    work: str
    wall: float
    cpu: float


class Works:
    """A contestant that was filled with `count` domains, and what it can be asked to do."""

    def __init__(self, contestant: Contestant, keys: list[bytes]) -> None:
        self.contestant, self.keys = contestant, keys
        self._per_operation: dict[str, float] = {}
        self._changer: Changer | None = None

    # --- preparations: each yields what is timed, in order -----------------------------------

    def _drawn(self, count: int, seed: int, most: int = MOST_KEYS) -> tuple[list[int], int]:
        """Numbers of domains, and how often to go over them for `count` operations."""
        count = max(count, 1)
        numbers = world.draw(min(count, most), len(self.keys), seed)
        return numbers, max(1, round(count / len(numbers)))

    def _uuids(self, numbers: list[int]) -> list[bytes]:
        return [world.fresh(self.keys[number]) for number in numbers]

    def _reading(self, name: str, keys: list[Any], passes: int) -> Run:
        operation = getattr(self.contestant, name)

        def run() -> None:
            for _ in range(passes):
                operation(keys)

        return name, passes * len(keys), run

    def read_state(self, count: int, seed: int) -> Iterator[Run]:
        numbers, passes = self._drawn(count, seed)
        yield self._reading("read_state", self._uuids(numbers), passes)

    def read_state_patch(self, count: int, seed: int) -> Iterator[Run]:
        numbers, passes = self._drawn(count, seed)
        yield self._reading("read_state_patch", self._uuids(numbers), passes)

    def peek(self, count: int, seed: int) -> Iterator[Run]:
        numbers, passes = self._drawn(count, seed)
        yield self._reading("peek", self._uuids(numbers), passes)

    def read_definition(self, count: int, seed: int) -> Iterator[Run]:
        """Of domains that this process has seen since they changed."""
        # More would fall out of whatever remembers definitions, here and elsewhere.
        numbers, passes = self._drawn(count, seed, 500)
        names = [world.fresh(f"vm{number}") for number in numbers]
        self.contestant.read_definition(names)
        yield self._reading("read_definition", names, passes)

    def read_changed(self, count: int, seed: int) -> Iterator[Run]:
        """Of domains that another process has changed since."""
        if not self.contestant.shared:
            raise NotOfferedError("no other process can change it")
        if self._changer is None:
            self._changer = Changer(self.contestant)
        numbers, _ = self._drawn(min(count, 500), seed)
        names = [world.fresh(f"vm{number}") for number in numbers]
        self.contestant.read_definition(names)
        self._changer.replace(self._changes(numbers, seed))
        _, operations, run = self._reading("read_definition", names, 1)
        yield "read_changed", operations, run

    def change_state(self, count: int, seed: int) -> Iterator[Run]:
        """There and back, so that every change is one; each domain at most once on the way."""
        numbers, passes = self._drawn(count // 2, seed)
        uuids = self._uuids(numbers)
        change = self.contestant.change_state

        def run() -> None:
            for _ in range(passes):
                change(uuids, world.PAUSED)
                change(uuids, world.RUNNING)

        yield "change_state", 2 * passes * len(uuids), run

    def _changes(self, numbers: list[int], seed: int) -> list[tuple[bytes, Any]]:
        made = [self.keys[number] for number in numbers]
        prepare = self.contestant.prepare
        named = zip(numbers, made, strict=True)
        model = world.template()
        return [
            (
                world.fresh(key),
                prepare(
                    world.changed(
                        model.replace(name=f"vm{number}", uuid=UUID(bytes=key)), seed % 1000
                    )
                ),
            )
            for number, key in named
        ]

    def replace(self, count: int, seed: int) -> Iterator[Run]:
        numbers, _ = self._drawn(min(count, MOST_DEFINITIONS), seed)
        changes = self._changes(numbers, seed)
        yield "replace", len(changes), lambda: self.contestant.replace(changes)

    def define(self, count: int, seed: int) -> Iterator[Run]:
        """And remove, in another order."""
        count = min(max(count, 1), MOST_DEFINITIONS)
        made = list(world.domains(world.uuids(count, seed + 1), f"new{seed}-"))
        added = [(one.uuid, one.name, self.contestant.prepare(one.definition)) for one in made]
        yield "define", count, lambda: self.contestant.define(added)
        order = world.draw(count, count, seed)
        uuids = [world.fresh(made[number].uuid) for number in order]
        yield "remove", count, lambda: self.contestant.remove(uuids)

    def _with_data(self, count: int, seed: int, value: Any) -> tuple[list[bytes], int]:
        """Domains whose data is this: nothing may depend on which work was there before."""
        numbers, passes = self._drawn(count, seed)
        uuids = self._uuids(numbers)
        self.contestant.change_data(uuids, value)
        return uuids, passes

    def read_data(self, count: int, seed: int) -> Iterator[Run]:
        yield self._reading("read_data", *self._with_data(count, seed, world.SMALL[0]))

    def read_data_large(self, count: int, seed: int) -> Iterator[Run]:
        uuids, passes = self._with_data(count, seed, world.LARGE[0])
        _, operations, run = self._reading("read_data", uuids, passes)
        yield "read_data_large", operations, run
        self.contestant.change_data(uuids, world.SMALL[0])  # as little room as before

    def _changing(self, name: str, count: int, seed: int, values: tuple[Any, ...]) -> Iterator[Run]:
        """There and back, as with states."""
        uuids, passes = self._with_data(count // 2, seed, values[0])
        change = self.contestant.change_data

        def run() -> None:
            for _ in range(passes):
                change(uuids, values[1])
                change(uuids, values[0])

        yield name, 2 * passes * len(uuids), run
        change(uuids, world.SMALL[0])

    def change_data(self, count: int, seed: int) -> Iterator[Run]:
        return self._changing("change_data", count, seed, world.SMALL)

    def change_data_large(self, count: int, seed: int) -> Iterator[Run]:
        return self._changing("change_data_large", count, seed, world.LARGE)

    def increment(self, count: int, seed: int) -> Iterator[Run]:
        """Of a small value."""
        uuids, passes = self._with_data(count, seed, world.SMALL[0])
        first = world.SMALL[0]["requests"]
        yield self._reading("increment", uuids, passes)
        counted = sum(self.contestant.count(uuid) - first for uuid in uuids)
        if counted != passes * len(uuids):
            raise RuntimeError(f"{passes * len(uuids)} increments were made, {counted} are there")

    def by_id(self, count: int, seed: int) -> Iterator[Run]:
        numbers, passes = self._drawn(count, seed)
        first = self.contestant.first_id
        yield self._reading("by_id", [world.fresh(first + number) for number in numbers], passes)

    def miss(self, count: int, seed: int) -> Iterator[Run]:
        keys = world.uuids(min(max(count, 1), MOST_KEYS), seed + 2)
        yield self._reading("miss", keys, max(1, round(count / len(keys))))

    def rows(self, count: int, seed: int) -> Iterator[Run]:
        yield "rows", 1, self.contestant.rows

    # --- timing ------------------------------------------------------------------------------

    def measure(self, work: str, aim: float, seed: int) -> list[Timing]:
        """One run of about `aim` seconds. Raises `NotOfferedError`."""
        if work not in self._per_operation:
            self._time(work, 10, seed)  # warms, and is a first guess
        return self._time(work, max(int(aim / self._per_operation[work]), 10), seed)

    def _time(self, work: str, count: int, seed: int) -> list[Timing]:
        timings = []
        for name, operations, run in getattr(self, work)(count, seed):
            gc.collect()
            gc.disable()
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            gc.enable()
            timings.append(Timing(name, wall / operations, cpu / operations))
        self._per_operation[work] = max(sum(timing.wall for timing in timings), 1e-8)
        return timings


SINGLE = (
    "read_state",
    "read_state_patch",
    "read_definition",
    "read_changed",
    "change_state",
    "replace",
    "define",
    "read_data",
    "read_data_large",
    "change_data",
    "change_data_large",
    "increment",
    "by_id",
    "miss",
    "peek",
    "rows",
)
