"""The cache lines in bench/README.md ("Wide machines, on paper") are those that are counted, and
the model there does what it says.

Counted by valgrind's lackey, so no clock is looked at and no second processor is needed. A line
more than the table says is a change of the core that many processors will feel: `python -m
bench.lines --write` puts the new counts there, which belongs into the commit that changes them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from bench import instructions, lines, wide

needs_valgrind = pytest.mark.skipif(
    instructions.missing() is not None, reason=str(instructions.missing())
)

SEGMENT, SHADOW, LOCK = 0x40000, 0x80000, 0x40040
LIES = f"""
region constants {SEGMENT} 64 0
region list_lock {LOCK} 64 0
region slot {SEGMENT + 128} 768 6
segment {SEGMENT} 4096 {SHADOW}
operation first
operation second
"""


@pytest.fixture(scope="module")
def counts() -> Iterator[dict[str, lines.Counted]]:
    tracer = lines.Tracer()
    yield lines.count(*tracer.trace())
    tracer.close()


@needs_valgrind
def test_the_table_says_what_is_counted(
    counts: dict[str, lines.Counted], tried: Callable[[str, int], None]
) -> None:
    known = lines.written_in(lines.README.read_text(encoding="utf-8"))
    assert lines.table(counts).splitlines() == known.splitlines()
    tried("operations whose cache lines were counted", len(counts))


@needs_valgrind
def test_a_find_stores_into_no_line_that_all_share(counts: dict[str, lines.Counted]) -> None:
    """What makes finds of different domains independent of each other on any number of
    processors."""
    mine = ("slot", "counters")
    for name in ("get", "get_by_name", "change_untold"):
        assert {place.partition(" ")[0] for place in counts[name].written} <= {*mine}, name
    assert counts["peek"].written == {}
    patch = {place for place in counts["patch"].written if place.partition(" ")[0] not in mine}
    assert patch == {"list_lock"}


def traced(*text: str) -> tuple[lines.Map, dict[str, list[lines.Touched]]]:
    return lines.read_trace((f"{one}\n" for one in text), lambda: lines.Map(LIES.split("\n")[1:-1]))


def test_what_is_read_off_a_trace() -> None:
    """Loads, stores, both at once, across the end of a line, beside the segment, prefetched."""
    lies, found = traced(
        " S 00040080,8",  # before the first mark
        " S 200000000,8",
        "I  00401000,3",
        " L 00040000,8",
        " M 000400c0,8",
        " S 0004013c,8",
        " S 00900000,8",
        " L 00080100,1",
        " S 00080140,1",
        " S 200000010,8",
        " L 00040000,8",  # after the last
    )
    (one,) = found["second"]
    assert one.instructions == 1
    assert {lies.place(line) for line in one.read} == {"constants", "slot 1"}
    assert {lies.place(line) for line in one.written} == {"slot 1", "slot 2", "slot 3"}
    assert {lies.place(line) for line in one.asked} == {"slot 2"}
    assert {lies.place(line) for line in one.claimed} == {"slot 3"}


def test_a_lock_is_held_from_one_store_to_its_word_to_the_next() -> None:
    lies, found = traced(
        " S 200000000,8",
        " M 00040080,8",  # there already when the lock is taken
        " L 00040040,4",
        " M 00040040,4",
        "I  00401000,3",
        " M 00040080,8",
        " M 000400c0,8",
        " S 00040040,4",
        "I  00401000,3",
        " M 00040100,8",
        " S 200000008,8",
    )
    counted = lines.count(lies, found)["first"]
    assert counted.holds == {"list_lock": lines.Held(1, 2)}  # the lock's own line, and slot 1
    assert counted.fetches == 4


def test_lines_that_are_asked_for_come_together() -> None:
    assert lines.fetches({1, 2, 3}, {1, 2, 3, 4}, set()) == 3
    assert lines.fetches({1, 2, 3}, {1, 2, 3, 4}, {1, 2}) == 2
    assert lines.fetches({1, 2, 3}, {3}, {1, 2}) == 1


def test_the_model() -> None:
    """One worker fetches nothing; many do at most as much as the lock that is held longest lets
    them; where there is no such lock each does what it can."""
    line = 100e-9
    free = wide.Work(1e-6, 2, {})
    walled = wide.Work(1e-6, 2, {"event_lock": (0.1e-6, 1), "heap_lock": (0.05e-6, 3)})
    assert free.rate(1, line) == walled.rate(1, line) == pytest.approx(1e6)
    assert free.rate(64, line) == pytest.approx(64 / (1e-6 + 2 * line * 63 / 64))
    assert walled.rate(2, line) == free.rate(2, line)
    assert walled.wall(1, line) == ("event_lock", pytest.approx(0.1e-6))
    assert walled.wall(64, line) == ("heap_lock", pytest.approx(0.05e-6 + 3 * line * 63 / 64))
    assert (free.crowd(line), walled.crowd(line)) == (0, 5)
    assert walled.rate(4, line) == free.rate(4, line)
    assert walled.rate(5, line) < free.rate(5, line)
    assert walled.rate(64, line) == pytest.approx(1 / walled.wall(64, line)[1])
