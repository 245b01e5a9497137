"""What a machine with many processors would do, from the lines that were counted.

``python -m bench.wide`` counts them (lines.py), takes the time of each operation by one worker,
here and now, and prints what the model in bench/README.md ("Wide machines, on paper") makes of 1,
8 and 64 workers. ``--two`` has two workers do it as well, beside what the model says of two: that
needs two processors that do nothing else.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from shmdomains import DomainDef, DomainList, DomainState

from . import counted, limits, lines
from .instructions import missing

DOMAINS, ROUNDS, SECONDS = 256, 15, 0.3
WORKERS = (1, 8, 64)
FAR = 100e-9  # assumed: a line's way between sockets
TOLD = ("change", "replace", "define", "remove")  # of these an event looks at the clock

Loop = Callable[[list[bytes]], None]


@dataclass(frozen=True)
class Work:
    """An operation: its own time in seconds, and how often it waits for a line of another
    processor; the same while it holds each of the locks that all share."""

    own: float
    fetches: float
    walls: dict[str, tuple[float, float]]

    def time(self, workers: int, line: float) -> float:
        """Of one operation. The last one there was another worker, unless it was this one."""
        return self.own + self.fetches * line * (workers - 1) / workers

    def wall(self, workers: int, line: float) -> tuple[str, float]:
        """The lock that is held longest, and how long in each operation."""
        far = line * (workers - 1) / workers
        held = {name: own + fetches * far for name, (own, fetches) in self.walls.items()}
        name = max(held, key=lambda one: held[one], default="")
        return name, held.get(name, 0.0)

    def rate(self, workers: int, line: float) -> float:
        """Operations a second by all. An upper bound: nobody queues before a lock is held all the
        time, and nobody who waits looks at the line meanwhile."""
        most = workers / self.time(workers, line)
        _, held = self.wall(workers, line)
        return min(most, 1 / held) if held else most

    def crowd(self, line: float) -> int:
        """How many workers reach the wall; 0: there is none."""
        if not self.walls:
            return 0
        workers = 1
        while workers * self.wall(workers, line)[1] < self.time(workers, line):
            workers += 1
        return workers


# --- times of one worker --------------------------------------------------------------------------


def loops(doms: DomainList, number: int) -> dict[str, Loop]:
    """Each is one pass over these keys; `number` is the worker's."""
    model = DomainDef.from_xml(counted.XML.format("y" * 1700))
    added = model.replace(name=f"added{number}", uuid=UUID(int=number + 2))
    changed = {}
    for info in doms.snapshot():
        changed[info.uuid.bytes] = model.replace(name=info.name, uuid=info.uuid)
        with doms.get(uuid=info.uuid) as dom:
            _ = dom.definition  # decoded, and so known from now on
    states = [DomainState.PAUSED, DomainState.RUNNING]

    def get(keys: list[bytes]) -> None:
        for key in keys:
            with doms.get(uuid=key) as dom:
                _ = dom.state

    def patch(keys: list[bytes]) -> None:
        for key in keys:
            doms.lock()
            dom = doms.find_by_uuid(key)
            doms.unlock()
            assert dom is not None
            _ = dom.state
            dom.unlock()

    def peek(keys: list[bytes]) -> None:
        for key in keys:
            info = doms.peek(uuid=key)
            assert info is not None
            _ = info.state

    def change(keys: list[bytes]) -> None:
        for key in keys:
            with doms.get(uuid=key) as dom:
                dom.state = states[dom.state != DomainState.RUNNING]

    def replace(keys: list[bytes]) -> None:
        for key in keys:
            with doms.get(uuid=key) as dom:
                dom.definition = changed[key]

    def define_remove(keys: list[bytes]) -> None:
        for _ in keys:
            doms.lock()
            dom = doms.assign_def(added, True)
            doms.unlock()
            dom.unlock()
            doms.lock()
            doms.remove_inactive(dom)
            doms.unlock()

    def data(keys: list[bytes]) -> None:
        for key in keys:
            with doms.get(uuid=key) as dom:
                dom.data = {"requests": (dom.data or {"requests": 0})["requests"] + 1}

    every = [get, patch, peek, change, replace, define_remove, data]  # data last: see lines.c
    return {one.__name__: one for one in every}


def least(run: Loop, keys: list[bytes]) -> float:
    """Seconds of one, undisturbed."""
    took = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run(keys)
        took.append(time.perf_counter() - began)
    return min(took) / len(keys)


def under_the_list_lock(doms: DomainList, keys: list[bytes]) -> float:
    """From the moment when the patch's form has the list lock to that when it has not."""

    def list_alone(keys: list[bytes]) -> None:
        for _ in keys:
            doms.lock()
            doms.unlock()

    def finds(keys: list[bytes]) -> None:
        doms.lock()
        for key in keys:
            dom = doms.find_by_uuid(key)
            assert dom is not None
            dom.unlock()
        doms.unlock()

    with doms.get(uuid=keys[0]) as dom:
        handle = dom

    def domain_alone(keys: list[bytes]) -> None:
        for _ in keys:
            handle.lock()
            handle.unlock()

    half = (least(list_alone, keys) - least(domain_alone, keys)) / 2
    return least(finds, keys) + half


# --- the model's numbers --------------------------------------------------------------------------


def _in_core(
    name: str, one: lines.Counted, took: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """How long each lock is held: its share of the instructions, at the pace of the core's whole
    operation, and the clock, which is looked at under the event lock."""
    clock = took["clock"] if name in TOLD else 0.0
    pace = (took[name] - clock) / one.instructions
    held = {}
    for lock, hold in one.holds.items():
        extra = clock if lock == "event_lock" else 0.0
        held[lock] = ((hold.instructions * pace + extra) / 1e9, hold.fetches)
    return held


def works(
    every: dict[str, lines.Counted],
    in_core: dict[str, float],
    own: dict[str, float],
    list_held: float,
) -> dict[str, Work]:
    found = {}
    for name in ("get", "peek", "change", "data", "replace"):
        one = every[name]
        found[name] = Work(own[name], one.fetches, _in_core(name, one, in_core))
    patch = every["patch"]
    walls = {"list_lock": (list_held, patch.holds["list_lock"].fetches)}
    found["patch"] = Work(own["patch"], patch.fetches, walls)
    # Nearly all of both is done under the list lock.
    fetches = every["define"].fetches + every["remove"].fetches
    walls = {"list_lock": (own["define_remove"], fetches)}
    found["define_remove"] = Work(own["define_remove"], fetches, walls)
    return found


# --- two workers ----------------------------------------------------------------------------------


def together(doms: DomainList, keys: list[bytes], name: str, workers: int) -> float:
    """Operations a second by so many processes, each on all domains in an order of its own."""
    begin = time.monotonic() + 0.2
    pipes = []
    for number in range(workers):
        reader, writer = os.pipe()
        if not os.fork():
            try:
                run = loops(doms, number)[name]
                mine = random.Random(number).sample(keys, len(keys))
                passes = 0
                while time.monotonic() < begin:
                    pass
                while time.monotonic() < begin + SECONDS:
                    run(mine[:64])
                    mine = mine[64:] + mine[:64]
                    passes += 1
                os.write(writer, str(passes * 64).encode())
            finally:
                os._exit(0)
        os.close(writer)
        pipes.append(reader)
    done = 0
    for reader in pipes:
        with open(reader) as told:
            done += int(told.read() or 0)
        os.wait()
    return done / SECONDS


def line_here() -> float:
    """The least of many: whoever loses its processor meanwhile counts that."""
    machine = limits.Limits()
    try:
        return min(machine.measure(200_000)["line"] for _ in range(20))
    finally:
        machine.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.wide", description=__doc__)
    parser.add_argument("--line", type=float, metavar="NS", help="a line's way; else measured")
    parser.add_argument("--two", action="store_true", help="two workers do it as well")
    arguments = parser.parse_args()
    why = missing()
    if why is not None:
        print(why)
        return 1
    tracer = lines.Tracer()
    doms, keys = counted.fill(DOMAINS)
    try:
        every = lines.count(*tracer.trace())
        in_core = tracer.times()
        line = line_here() if arguments.line is None else arguments.line / 1e9
        gc.disable()
        list_held = under_the_list_lock(doms, keys)
        own = {name: least(run, keys) for name, run in loops(doms, 0).items()}
        found = works(every, in_core, own, list_held)
        print(f"a line's way: {line * 1e9:.0f} ns, far: {FAR * 1e9:.0f}; millions a second")
        print("| | own time, µs | fetches | wall | held, µs | reached by | 1 | 8 | 64 | 64, far |")
        print("|---|---:|---:|---|---:|---:|---:|---:|---:|---:|")
        for name, work in found.items():
            wall, held = work.wall(64, line)
            held_far = work.wall(64, FAR)[1]
            shown = f"{held * 1e6:.2f}, {held_far * 1e6:.2f}" if wall else ""
            cells = [f"{work.own * 1e6:.2f}", f"{work.fetches:.0f}", wall, shown]
            cells.append(str(work.crowd(line) or ""))
            rates = [work.rate(workers, line) for workers in WORKERS] + [work.rate(64, FAR)]
            print(f"| {name} | {' | '.join(cells + [f'{rate / 1e6:.2f}' for rate in rates])} |")
        for name, work in found.items() if arguments.two else ():
            pairs = [[together(doms, keys, name, count) for count in (1, 2)] for _ in range(5)]
            ratio = statistics.median(two / one for one, two in pairs)
            wanted = work.rate(2, line) / work.rate(1, line)
            print(f"{name}: two workers {ratio:.2f} times one, {wanted:.2f} by the model")
    finally:
        doms.close()
        tracer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
