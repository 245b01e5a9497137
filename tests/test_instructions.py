"""The hot paths take no more instructions than were recorded for this kind of machine, and in a
long list as many as in a short one.

Counted by callgrind, so no clock is looked at. `make instructions` records new counts, which belong
into the commit that changes them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import SOAK

sys.path.append(str(Path(__file__).parents[1]))
from bench import instructions

pytestmark = pytest.mark.skipif(
    instructions.missing() is not None, reason=str(instructions.missing())
)


@pytest.fixture(scope="module")
def counter() -> Iterator[instructions.Counter]:
    counter = instructions.Counter()
    yield counter
    counter.close()


@pytest.fixture(scope="module")
def counts(counter: instructions.Counter) -> dict[str, float]:
    found: dict[str, float] = instructions.count(counter)
    return found


def test_every_hot_path_is_counted(
    counts: dict[str, float], tried: Callable[[str, int], None]
) -> None:
    python = {"get_state", "patch_state", "change_state", "definition", "by_id", "miss", "peek"}
    python |= {"replace", "define_remove", "read_data", "change_data", "large_data", "add"}
    python |= {"get_many", "update_many"}
    assert counts.keys() == {*python, "rows", "core_get", "core_change", "core_miss"}
    assert all(count > 20 for count in counts.values())
    tried("hot paths whose instructions were counted", len(counts))


def test_the_counts_are_those_that_were_recorded(counts: dict[str, float]) -> None:
    key = instructions.key()
    known = instructions.recorded().get(key)
    if known is None:
        lines = ", ".join(f"{name} {count:.0f}" for name, count in counts.items())
        warnings.warn(f"no instruction counts are recorded for {key}: {lines}", stacklevel=1)
        pytest.skip(f"no instruction counts are recorded for {key}: make instructions")
    assert instructions.differences(counts, known) == []


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="128,000 domains are made under valgrind: make soak")
def test_a_long_list_takes_as_many_instructions_as_a_short_one(
    counter: instructions.Counter,
) -> None:
    """The algorithm is flat; what a long list costs more is the machine's caches."""
    for name, counted in instructions.flatness(counter, instructions.FLAT[:2]).items():
        assert max(counted) <= 1.1 * min(counted), name


def test_a_difference_is_told_apart_from_noise() -> None:
    known = {"a": 100.0, "b": 100.0, "c": 100.0}
    counts = {"a": 114.0, "b": 116.0, "d": 1.0}
    said = instructions.differences(counts, known)
    assert [line.partition(":")[0] for line in said] == ["b", "c", "d"]
