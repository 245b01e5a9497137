"""Which cache lines of the segment an operation touches: counted, as instructions are.

``python -m bench.lines`` prints the table that bench/README.md keeps; ``--write`` puts it there.

valgrind's lackey writes every load and store of lines.c down. A line that is stored to has to be
this processor's alone, so it is what moves; lines that nobody stores to lie in every cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .instructions import CORE, HERE, compiler, missing

README = HERE / "README.md"
BEGIN, END = "<!-- bench.lines: begin -->\n", "<!-- bench.lines: end -->\n"
LINE = 64
MARKS = 0x200000000  # as in lines.c
LOCKS = ("list_lock", "id_lock", "event_lock", "heap_lock")
DOMAINS = ("slot", "names", "heap")
# What undoes an operation is done by others as often, and its stores move lines as well.
TOGETHER = {"define": "define", "remove": "define"}
SAID = {
    "get": "find by UUID, read the state, unlock",
    "get_by_name": "the same by name",
    "patch": "the patch's form: list lock, find, drop, read, unlock",
    "peek": "`peek`, its definition known",
    "change_untold": "find, change the reason (no event), unlock",
    "change_awaited": "the same, while somebody waits for any change",
    "change": "find, change the state (an event), unlock",
    "start": "find, activate (an id, an event), unlock",
    "data": "find, read and change the data, unlock",
    "replace": "find, replace the definition (an event), unlock",
    "define": "define (an event)",
    "remove": "remove (an event)",
}


class Region(NamedTuple):
    name: str
    begin: int
    end: int
    lines: int  # of one item, where they differ in what they hold


@dataclass
class Touched:
    """What one operation did to each line, and while it held each lock."""

    read: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)  # prefetched, to be read
    claimed: set[int] = field(default_factory=set)  # prefetched, to be written
    holds: list[Hold] = field(default_factory=list)
    instructions: int = 0

    def every(self) -> set[int]:
        return self.read | self.written | self.asked | self.claimed


@dataclass
class Hold:
    lock: str
    line: int
    before: set[int]  # lines that were here when it began
    began: int  # instructions
    ended: int = -1
    within: set[int] = field(default_factory=set)


class Held(NamedTuple):
    """Of one operation: instructions while a lock is held, and fetches meanwhile."""

    instructions: float
    fetches: float


@dataclass(frozen=True)
class Counted:
    """Of one operation, the mean of many: lines by the place that they lie in."""

    read: dict[str, float]  # and not written
    written: dict[str, float]
    claimed: dict[str, float]  # prefetched to be written, and then not written
    fetches: float  # lines from another processor one after the other; see `fetches`
    holds: dict[str, Held]
    instructions: float


class Map:
    """Where everything lies, as lines.c says."""

    def __init__(self, said: Iterable[str]) -> None:
        self.regions: list[Region] = []
        self.operations: list[str] = []
        for line in said:
            what, *rest = line.split()
            if what == "region":
                begin, size, lines = (int(number) for number in rest[1:])
                self.regions.append(Region(rest[0], begin, begin + size, lines))
            elif what == "segment":
                self.begin, self.size, self.shadow = (int(number) for number in rest)
            else:
                self.operations.append(rest[0])
        self.locks = {one.begin: one.name for one in self.regions if one.name in LOCKS}

    def place(self, line: int) -> str:
        for region in self.regions:
            if region.begin <= line * LINE < region.end:
                if not region.lines:
                    return region.name
                return f"{region.name} {(line - region.begin // LINE) % region.lines}"
        raise LookupError(f"nothing lies at line {line:#x}")


class Tracer:
    """The program that is traced, built once."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="shmdomains-bench-")
        self._program = f"{self._folder.name}/lines"
        sources = [str(path) for path in sorted(CORE.glob("*.c")) if path.name != "core.c"]
        options = ["-std=c11", "-O2", "-fvisibility=hidden", "-pthread", "-D_GNU_SOURCE="]
        options += [f"-I{CORE}", "-include", str(HERE / "lines.h"), "-o", self._program]
        command = [compiler(), *options, str(HERE / "lines.c"), *sources]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)

    def trace(self) -> tuple[Map, dict[str, list[Touched]]]:
        """Where everything lies, and every occurrence of every operation."""
        reader, writer = os.pipe()
        options = ["--tool=lackey", "--trace-mem=yes", f"--log-fd={writer}"]
        command = ["valgrind", *options, self._program, "trace"]
        with (
            open(reader, encoding="ascii") as log,
            tempfile.TemporaryFile("w+", encoding="ascii") as said,
            subprocess.Popen(command, stdout=said, pass_fds=[writer]) as process,
        ):
            os.close(writer)
            found = read_trace(
                log, lambda: Map(os.pread(said.fileno(), 1 << 20, 0).decode().splitlines())
            )
            if process.wait():
                raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}")
        return found

    def times(self) -> dict[str, float]:
        """Nanoseconds of each operation in C, and of a look at the clock."""
        command = [self._program, "time"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        pairs = (line.split() for line in done.stdout.splitlines())
        return {name: float(nanoseconds) for name, nanoseconds in pairs}

    def close(self) -> None:
        self._folder.cleanup()


# --- counting -------------------------------------------------------------------------------------


def _lines(address: int, size: int) -> range:
    return range(address // LINE, (address + size - 1) // LINE + 1)


def _touch(lies: Map, now: Touched, kind: str, address: int, size: int) -> None:
    if lies.shadow <= address < lies.shadow + lies.size:
        line = (address - lies.shadow + lies.begin) // LINE
        (now.asked if kind == "L" else now.claimed).add(line)
        touched = [line]
    elif lies.begin <= address < lies.begin + lies.size:
        touched = list(_lines(address, size))
        if kind != "L" and address in lies.locks:
            _take_or_drop(now, lies.locks[address], touched[0], address)
        if kind != "S":
            now.read.update(touched)
        if kind != "L":
            now.written.update(touched)
    else:
        return
    for hold in now.holds:
        if hold.ended < 0:
            hold.within.update(line for line in touched if line not in hold.before)


def _take_or_drop(now: Touched, lock: str, line: int, address: int) -> None:
    """The word of a mutex is stored to as it is taken, and as it is dropped."""
    for hold in now.holds:
        if hold.lock == lock and hold.ended < 0:
            hold.ended = now.instructions
            return
    now.holds.append(Hold(lock, line, now.every() - {line}, now.instructions))


def read_trace(
    log: Iterable[str], where: Callable[[], Map]
) -> tuple[Map, dict[str, list[Touched]]]:
    """`where` is asked at the first mark: the program has said by then where everything lies."""
    found: dict[str, list[Touched]] = defaultdict(list)
    lies: Map | None = None
    now: Touched | None = None
    begins = f" S {MARKS:08x},8\n"
    for text in log:
        if now is None:
            if text == begins:
                lies = lies or where()
                now = Touched()
            continue
        if text[0] == "I":
            now.instructions += 1
            continue
        at, _, size = text[3:].partition(",")
        address = int(at, 16)
        number = (address - MARKS) // 8
        if lies is not None and 0 < number <= len(lies.operations):
            found[lies.operations[number - 1]].append(now)
            now = None
        elif lies is not None:
            _touch(lies, now, text[1], address, int(size))
    if lies is None:
        raise RuntimeError("the trace has no marks")
    return lies, found


def _mean(lies: Map, every: list[set[int]]) -> dict[str, float]:
    total: dict[str, int] = defaultdict(int)
    for lines in every:
        for line in lines:
            total[lies.place(line)] += 1
    return {name: round(total[name] / len(every), 2) for name in sorted(total)}


def fetches(lines: set[int], moving: set[int], asked: set[int]) -> int:
    """How often an operation waits for another processor's lines: those that it has asked for
    before it needs them come together, each other one by itself."""
    coming = lines & moving
    return len(coming - asked) + bool(coming & asked)


def count(lies: Map, traced: dict[str, list[Touched]]) -> dict[str, Counted]:
    moving: dict[str, set[int]] = defaultdict(set)
    for name, every in traced.items():
        for one in every:
            moving[TOGETHER.get(name, name)] |= one.written | one.claimed
    counted = {}
    for name, every in traced.items():
        moves = {line for line in moving[TOGETHER.get(name, name)] if not _is_own(lies, line)}
        waits = [fetches(one.every(), moves, one.asked | one.claimed) for one in every]
        counted[name] = Counted(
            _mean(lies, [one.read - one.written for one in every]),
            _mean(lies, [one.written for one in every]),
            _mean(lies, [one.claimed - one.written for one in every]),
            round(sum(waits) / len(every), 2),
            {lock: _held(every, lock, moves) for lock in LOCKS if _holds(every, lock)},
            round(sum(one.instructions for one in every) / len(every), 1),
        )
    return counted


def _is_own(lies: Map, line: int) -> bool:
    return lies.place(line) == "counters"


def _holds(every: list[Touched], lock: str) -> bool:
    return any(hold.lock == lock for one in every for hold in one.holds)


def _held(every: list[Touched], lock: str, moves: set[int]) -> Held:
    instructions = waits = 0
    for one in every:
        for hold in one.holds:
            if hold.lock == lock:
                instructions += hold.ended - hold.began
                within = hold.within | {hold.line}
                waits += fetches(within, moves, one.asked | one.claimed)
    return Held(round(instructions / len(every), 1), round(waits / len(every), 2))


# --- the table ------------------------------------------------------------------------------------


def _sum(places: dict[str, float], wanted: Callable[[str], bool]) -> str:
    total = sum(lines for place, lines in places.items() if wanted(place))
    return f"{total:.1f}".removesuffix(".0")


def _of_domain(place: str) -> bool:
    return place.partition(" ")[0] in DOMAINS


def _of_index(place: str) -> bool:
    return place.endswith("_index")


def _of_all(place: str) -> bool:
    return not _of_domain(place) and not _of_index(place) and place != "counters"


def table(counted: dict[str, Counted]) -> str:
    rows = [
        "| | the domain's: read | written | claimed | index: read | written "
        "| everybody's: read | written | which |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, said in SAID.items():
        one = counted[name]
        cells = [
            _sum(places, wanted)
            for wanted, kinds in (
                (_of_domain, (one.read, one.written, one.claimed)),
                (_of_index, (one.read, one.written)),
                (_of_all, (one.read, one.written)),
            )
            for places in kinds
        ]
        which = ", ".join(
            f"`{place}`" + ("" if lines == 1 else f" {lines:.1f}".removesuffix(".0"))
            for place, lines in one.written.items()
            if _of_all(place)
        )
        rows.append(f"| {said} | {' | '.join(cells)} | {which} |")
    return "\n".join(rows) + "\n"


def written_in(text: str) -> str:
    """The table between the marks of a README."""
    _, _, rest = text.partition(BEGIN)
    found, _, _ = rest.partition(END)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.lines", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into bench/README.md")
    arguments = parser.parse_args()
    why = missing()
    if why is not None:
        print(why)
        return 1
    tracer = Tracer()
    try:
        found = table(count(*tracer.trace()))
    finally:
        tracer.close()
    print(found, end="")
    if arguments.write:
        text = README.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        README.write_text(before + BEGIN + found + END + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
