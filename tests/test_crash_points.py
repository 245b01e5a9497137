"""A worker is killed at every store that an operation makes, and who comes next has all of it or
none; then the recoverer is killed at every store, too.

What is done, and what must hold afterwards, stands in crash_driver.py. It runs in a process of its
own, on a second build of the core that has a hook in front of each store into a segment. That it
cannot be built is a failure. ``SHMDOMAINS_SOAK=1`` takes every point of every recovery, and every
point of the large operations, of which there is a selection otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from crash_build import Driver, driving
from crash_driver import OPERATIONS
from helpers import SOAK

PATIENCE = 3600 if SOAK else 60  # seconds for one operation
RECOVERIES = 3400  # deaths in recoveries that are known, all cases together

CASES = [pytest.param(name, "robust", id=name) for name in OPERATIONS] + [
    pytest.param(name, "multiprocessing", id=f"{name}, multiprocessing")
    for name, what in OPERATIONS.items()
    if what.locks is not None
]


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with driving("crash_driver.py", PATIENCE) as driver:
        yield driver


@pytest.fixture(scope="module")
def covered() -> dict[str, int]:
    return {"operations": 0, "cases": 0, "recoveries": 0}


@pytest.mark.soak
@pytest.mark.timeout(PATIENCE + 60)
@pytest.mark.parametrize(("name", "lock"), CASES)
def test_killed_at_every_store(
    driver: Driver, covered: dict[str, int], name: str, lock: str
) -> None:
    what = OPERATIONS[name]
    found = driver.ask(name, lock, SOAK)
    assert found["failures"] == [], "\n".join(found["failures"])
    points = found["points"]
    print(f"{name}, {lock}: {points} points, {found['recoveries']} of recoveries")
    assert points >= what.points, f"{what.points} points are known, {points} were found"
    assert points == 0 or what.points, "what only reads has begun to store"
    assert found["cases"] == points or (what.large and not SOAK)
    covered["operations"] += 1
    covered["cases"] += found["cases"]
    covered["recoveries"] += found["recoveries"]


@pytest.mark.soak
def test_how_many_points(covered: dict[str, int], tried: Callable[[str, int], None]) -> None:
    if covered["operations"] != len(CASES):
        pytest.skip(f"{covered['operations']} of {len(CASES)} operations ran: nothing to compare")
    assert covered["recoveries"] >= RECOVERIES
    tried("kills at a store of an operation", covered["cases"])
    tried("kills at a store of its recovery", covered["recoveries"])
