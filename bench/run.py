"""Who is measured on what, in which order: the contestants in turn, round after round.

A run has stages by number of domains. In each, every contestant that can stand that many has a host
with a list of its own; a work is then done by one after the other, several times. What one of them
cannot do is left out; one that fails is dropped, and the results say so.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from . import awake, limits, loading, results, starting, waking
from .contestants import ALL, Contestant, NotOfferedError
from .contestants.base import MEMORY, memory_folder
from .host import FailedError, Host
from .results import Results
from .work import SINGLE


class Plan(msgspec.Struct, frozen=True):
    """How much of it."""

    sizes: tuple[int, ...]
    full: bool  # every contestant at every size that it can stand
    rounds: int
    aim: float  # seconds of a timed run
    contend: float  # seconds of a contention run
    crowds: int  # rounds of those
    workers: tuple[int, ...]
    killed: int  # rounds
    files: int
    limit_rounds: int
    wakes: tuple[tuple[int, int], ...]  # waiters, and how often they are woken


QUICK = Plan(
    *((1_000, 100_000), False, 5, 0.01, 0.15, 2, (1, 2, 4), 7, 1_000, 500_000),
    ((1, 300), (1_000, 5)),
)
FULL = Plan(
    *((1_000, 100_000, 1_000_000), True, 9, 0.03, 0.5, 3, (1, 2, 4, 8), 30, 10_000, 5_000_000),
    ((1, 2_000), (1_000, 20)),
)
TINY = Plan((30,), True, 1, 0.0005, 0.02, 1, (1, 2), 1, 12, 1_000, ((1, 3), (6, 2)))


class Runner:
    def __init__(
        self, plan: Plan, console: Console, contestants: Iterable[type[Contestant]] = ALL
    ) -> None:
        self._plan, self._console = plan, console
        self._here: list[type[Contestant]] = []
        skipped: dict[str, str] = {}
        versions: dict[str, str] = {}
        for contestant in contestants:
            why = contestant.missing()
            if why is None:
                self._here.append(contestant)
                versions.update(contestant.versions())
            else:
                skipped[contestant.name] = why
                console.print(f"skipped: {contestant.name}: {why}", highlight=False)
        self._hosts: list[Host] = []
        self._began = time.monotonic()
        self.results: Results = results.begin(versions)
        self.results.skipped = skipped

    def run(self) -> Results:
        self._limits()
        self._starting()
        self._loading()
        self._waking()
        for domains in self._plan.sizes:
            self._stage(domains)
        return self.results

    # --- parts ---

    def _limits(self) -> None:
        self._say("limits")
        try:
            program = limits.Limits()
        except FileNotFoundError:
            self.results.skipped["limits"] = "there is no C compiler: apt install gcc"
            return
        except subprocess.CalledProcessError:
            self.results.skipped["limits"] = "Python's headers are missing: apt install python3-dev"
            return
        runs = [program.measure(self._plan.limit_rounds) for _ in range(5)]
        for name, title in limits.NAMES.items():
            self.results.add(name, title, 0, [run[name] for run in runs])
        program.close()

    def _starting(self) -> None:
        self._say("starting")
        for name, seconds in starting.measure(self._plan.rounds).items():
            self.results.add("start", name, 0, seconds)

    def _loading(self) -> None:
        count = self._plan.files
        self._say(f"loading {count:,} config files")
        with tempfile.TemporaryDirectory(dir=memory_folder()) as place:
            folder = Path(place)
            loading.make(folder, count)
            works = loading.works(folder)
            taken: dict[tuple[str, int], list[float]] = {key: [] for key in works}
            for _ in range(min(self._plan.rounds, 5) // 2 + 1):
                for key, work in works.items():
                    taken[key].append(loading.measure(work, count))
        folder.parent.rmdir()
        for (name, workers), seconds in taken.items():
            self.results.add("load", name, count, seconds, workers=workers)

    def _waking(self) -> None:
        for kind in waking.WAYS:
            why = kind.missing()
            if why is not None:
                self.results.skipped[f"n, {kind.name}"] = why
                continue
            for waiters, wakes in self._plan.wakes:
                self._say(f"{kind.name}: waking {waiters:,}")
                seconds = sorted(waking.measure(kind, waiters, wakes))
                self.results.add("wake", kind.name, 1, seconds, workers=waiters)
                slow = seconds[len(seconds) * 99 // 100]
                self.results.add("wake: p99", kind.name, 1, [slow], workers=waiters)

    def _stage(self, domains: int) -> None:
        stands = [
            one for one in self._here if domains <= (one.most if self._plan.full else one.quick)
        ]
        try:
            for contestant in stands:
                self._say(f"{domains:,} domains: filling {contestant.name}")
                self._fill(contestant, domains)
                self._touch()
            self._single(domains)
            self._room(domains)
            if domains <= 100_000:
                self._listing(domains)
            if domains == self._plan.sizes[0]:
                self._contention(domains)
                self._watching(domains)
                self._killing(domains)
        finally:
            for host in self._hosts:
                host.close()
            self._hosts = []

    def _fill(self, contestant: type[Contestant], domains: int) -> None:
        host = Host(contestant, domains)
        self._hosts.append(host)
        try:
            host.answer()
        except (FailedError, TimeoutError) as error:
            self._drop(host, error)

    def _single(self, domains: int) -> None:
        """A work's rounds lie far apart: what is slow for some seconds spoils one of each, not one
        work's median."""
        walls: dict[tuple[str, str], list[float]] = {}
        cpus: dict[tuple[str, str], list[float]] = {}
        for seed in range(self._plan.rounds):
            self._say(f"{domains:,} domains: round {seed + 1} of {self._plan.rounds}")
            self._touch()
            for work in SINGLE:
                for host, timings in self._all("measure", work, self._plan.aim, seed):
                    for timing in timings:
                        key = (timing.work, host.contestant.name)
                        walls.setdefault(key, []).append(timing.wall)
                        cpus.setdefault(key, []).append(timing.cpu)
        for key, seconds in walls.items():
            self.results.add(*key, domains, seconds, cpus[key])

    def _room(self, domains: int) -> None:
        self._say(f"{domains:,} domains: room")
        self._touch()
        for host, bytes_ in self._all("footprint"):
            self._add("bytes per domain", host, domains, [bytes_ / domains])
        for host, seconds in self._all("create"):
            self._add("create", host, domains, [seconds])
        rooms: dict[Host, list[Any]] = {}
        for seed in range(3):
            for host, room in self._all("room", seed):
                rooms.setdefault(host, []).append(room)
        for host, taken in rooms.items():
            for field in ("attach", "fork", "private"):
                self._add(field, host, domains, [getattr(one, field) for one in taken])

    def _listing(self, domains: int) -> None:
        self._say(f"{domains:,} domains: writing while listed")
        self._touch()
        rates = self._rounds(3, "write_while_listed")
        for host, taken in rates.items():
            self._add("writing, alone", host, domains, [one.alone for one in taken])
            self._add("writing, listed", host, domains, [one.listed for one in taken])
            self._add("kept while listed", host, domains, [one.listed / one.alone for one in taken])

    def _contention(self, domains: int) -> None:
        ways = [("random", n) for n in self._plan.workers] + [
            ("one", n) for n in self._plan.workers
        ]
        for where, workers in ways:
            self._say(f"{domains:,} domains: {workers} workers, {where}")
            runs = self._rounds(self._plan.crowds, "contend", workers, where, self._plan.contend)
            self._contended(runs, where, domains, workers)
        ours = [host for host in self._hosts if host.contestant is ALL[0]]
        self._say(f"{domains:,} domains: 2 workers, each on a list of its own")
        own: dict[Host, list[Any]] = {}
        beside: dict[Host, list[float]] = {}
        for seed in range(self._plan.rounds):
            together = self._each(ours, "contend", 2, "random", self._plan.contend, seed)
            alone = self._each(ours, "contend", 2, "own", self._plan.contend, seed)
            for (host, shared), (_, value) in zip(together, alone, strict=False):
                own.setdefault(host, []).append(value)
                beside.setdefault(host, []).append(shared.rate / value.rate)
        self._contended(own, "own", domains, 2)
        for host, ratios in beside.items():
            self._add("count random, of own", host, domains, ratios, workers=2)

    def _contended(
        self, runs: dict[Host, list[Any]], where: str, domains: int, workers: int
    ) -> None:
        for host, taken in runs.items():
            name, rates = f"count {where}", [one.rate for one in taken]
            self._add(name, host, domains, rates, [one.cpu for one in taken], workers)
            least, most = [one.least for one in taken], [one.most for one in taken]
            self._add(f"{name}: least share", host, domains, least, workers=workers)
            self._add(f"{name}: largest share", host, domains, most, workers=workers)
            longest = [one.longest for one in taken]
            self._add(f"{name}: longest", host, domains, longest, workers=workers)
            lost = sum(one.lost for one in taken)
            if lost:
                who = host.contestant.name
                self.results.failed.append(f"{who}: {lost} increments lost ({where})")

    def _watching(self, domains: int) -> None:
        self._say(f"{domains:,} domains: reading what is being written")
        for host, taken in self._rounds(self._plan.rounds, "read_while_written").items():
            self._add("peek, quiet", host, domains, [one.quiet for one in taken])
            self._add("peek, written", host, domains, [one.written for one in taken])
            ratios = [one.written / one.quiet for one in taken]
            self._add("slower while written", host, domains, ratios)

    def _killing(self, domains: int) -> None:
        self._say(f"{domains:,} domains: killed holders")
        told: set[Host] = set()
        taken: dict[tuple[Host, str], list[float]] = {}
        for seed in range(self._plan.killed):
            for host in [host for host in self._hosts if host not in told]:
                for _, killed in self._each([host], "killed_holder", seed):
                    if killed.is_slow:
                        told.add(host)
                    for way in ("waiting", "later"):
                        seconds = getattr(killed, way)
                        value = float("inf") if seconds is None else seconds
                        taken.setdefault((host, way), []).append(value)
        for (host, way), values in taken.items():
            if float("inf") in values:
                # JSON has no infinity: never is -1.
                values = [-1.0]
            self._add(f"killed, {way}", host, domains, values)
        for host, blocked in self._all("blocks_others"):
            self._add("blocks others", host, domains, [float(blocked)])

    # --- the hosts ---

    def _rounds(self, rounds: int, function: str, *arguments: Any) -> dict[Host, list[Any]]:
        """All in turn, so many times; the last argument is the number of the round."""
        taken: dict[Host, list[Any]] = {}
        for seed in range(min(rounds, self._plan.rounds)):
            for host, value in self._all(function, *arguments, seed):
                taken.setdefault(host, []).append(value)
        return taken

    def _all(self, function: str, *arguments: Any) -> list[tuple[Host, Any]]:
        return self._each(list(self._hosts), function, *arguments)

    def _each(self, hosts: list[Host], function: str, *arguments: Any) -> list[tuple[Host, Any]]:
        answers = []
        for host in hosts:
            try:
                answers.append((host, host.call(function, *arguments)))
            except NotOfferedError:
                continue
            except (FailedError, TimeoutError, OSError) as error:
                self._drop(host, error)
        return answers

    def _touch(self) -> None:
        awake.touch(MEMORY, [host.pid for host in self._hosts])

    def _drop(self, host: Host, error: Exception) -> None:
        lines = str(error).strip().splitlines() or [repr(error)]
        self.results.failed.append(f"{host.contestant.name}, {host.domains:,} domains: {lines[-1]}")
        self._console.print(f"failed: {host.contestant.name}\n{error}", highlight=False)
        self._hosts.remove(host)
        host.close()

    def _add(
        self,
        work: str,
        host: Host,
        domains: int,
        values: Iterable[float],
        cpu: Iterable[float] | None = None,
        workers: int = 1,
    ) -> None:
        self.results.add(work, host.contestant.name, domains, values, cpu, workers)

    def _say(self, what: str) -> None:
        elapsed = time.monotonic() - self._began
        self._console.print(f"[dim]{elapsed:5.0f} s  {what}[/dim]", highlight=False)
