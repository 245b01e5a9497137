"""Kill storms that end quietly: the survivors finish, and nothing that was acknowledged is lost.

storm.py says what a storm is, and what is proven after it. The last test is the negative control:
the same storms with an untimed lock in the place of the core's timed one (untimed_lock.c) have to
hang, or they would not show a lost wake-up.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from crash_build import build
from helpers import SOAK
from killing import TESTS, Child, Nursery
from storm import Tally, prove_storms, watch_storms
from storm_worker import Shape

ROUNDS = 25  # in one test
PATIENCE = 60.0  # seconds for a round; each wait inside of it has a deadline of its own
CONTROLS = 300 if SOAK else 100

Tried = Callable[[str, int], None]


def rounds(storms: Child, shapes: list[Shape], tried: Tried) -> Tally:
    total = Tally()
    for shape in shapes:
        try:
            total += storms.ask(shape, PATIENCE)
        except AssertionError as exc:
            raise AssertionError(f"{shape}: {exc}") from None
    tried("storms that ended quietly", len(shapes))
    tried("workers killed in storms", total.kills)
    tried("workers stopped in storms", total.stops)
    tried("changes acknowledged in storms", total.changes)
    # Else it is no storm.
    assert total.kills > 3 * len(shapes)
    assert total.changes > 25 * len(shapes)
    return total


def seeds(part: int) -> range:
    return range(part * ROUNDS, (part + 1) * ROUNDS)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(18 if SOAK else 3))
@pytest.mark.parametrize("shape", [Shape.few, Shape.many], ids=["few", "many"])
def test_the_survivors_finish_and_nothing_is_lost(
    start: Callable[..., Child], path: str, tried: Tried, shape: Callable[[int], Shape], part: int
) -> None:
    total = rounds(start(prove_storms, path), [shape(seed) for seed in seeds(part)], tried)
    assert total.stops > ROUNDS


@pytest.mark.soak
@pytest.mark.parametrize("part", range(2 if SOAK else 1))
@pytest.mark.parametrize("shape", [Shape.few, Shape.many], ids=["few", "many"])
def test_multiprocessing_locks(
    start: Callable[..., Child],
    path: str,
    tried: Tried,
    shape: Callable[[int, str], Shape],
    part: int,
) -> None:
    shapes = [shape(seed, "multiprocessing") for seed in seeds(part)]
    rounds(start(prove_storms, path), shapes, tried)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(9 if SOAK else 1))
@pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
@pytest.mark.parametrize("shape", [Shape.few, Shape.many], ids=["few", "many"])
def test_tasks(
    start: Callable[..., Child],
    path: str,
    tried: Tried,
    shape: Callable[[int, str], Shape],
    lock: str,
    part: int,
) -> None:
    """Each process has three workers in one event loop, and takes them with it when it dies."""
    shapes = [replace(shape(seed, lock), tasks=3) for seed in seeds(part)]
    total = rounds(start(prove_storms, path), shapes, tried)
    tried("of those storms of tasks", len(shapes))
    tried("changes acknowledged by tasks", total.changes)


@pytest.fixture(scope="module")
def mined() -> Iterator[Nursery]:
    """Its children have the core with crash points."""
    with Nursery(build()) as nursery:
        yield nursery


@pytest.mark.soak
@pytest.mark.parametrize("part", range(4 if SOAK else 1))
@pytest.mark.parametrize("shape", [Shape.few, Shape.many], ids=["few", "many"])
def test_killed_at_a_store_among_others(
    mined: Nursery, path: str, tried: Tried, shape: Callable[[int], Shape], part: int
) -> None:
    """A signal seldom meets a change half-way; here each does."""
    shapes = [replace(shape(seed), fused=True) for seed in seeds(part)]
    total = rounds(mined.start(prove_storms, path), shapes, tried)
    tried("of those workers killed at a store", total.kills)
    mined.clear()


@pytest.mark.soak
@pytest.mark.parametrize("part", range(4 if SOAK else 1))
@pytest.mark.parametrize("shape", [Shape.few, Shape.many], ids=["few", "many"])
def test_tasks_killed_at_a_store(
    mined: Nursery, path: str, tried: Tried, shape: Callable[[int], Shape], part: int
) -> None:
    shapes = [replace(shape(seed), fused=True, tasks=3) for seed in seeds(part)]
    total = rounds(mined.start(prove_storms, path), shapes, tried)
    tried("of those workers killed at a store", total.kills)
    mined.clear()


def hang(nursery: Nursery, path: str, seeds: range) -> list[bool]:
    """Of each storm whether its survivors hang. One that does is enough, but for the soak."""
    storms = nursery.start(watch_storms, path)
    hung: list[bool] = []
    for seed in seeds:
        # All on one CPU, so that it takes long until whoever is woken runs. One wave, since those
        # who hang would also hinder the next.
        hung.append(
            storms.ask(replace(Shape.few(seed), crowded=True, aimed=True, waves=1), PATIENCE)
        )
        if hung[-1] and not SOAK:
            break
    return hung


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_same_storms_hang_with_an_untimed_lock(
    nursery: Nursery, path: str, tmp_path: Path, tried: Tried
) -> None:
    """About one in five does; that none of 100 does is less than one in a million."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "no C compiler, so there is nothing to compare with"
    library = tmp_path / "untimed_lock.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-o", library, TESTS / "untimed_lock.c"], check=True
    )
    with Nursery(LD_PRELOAD=str(library)) as untimed:
        hung = hang(untimed, path, range(CONTROLS))
    tried("storms with an untimed lock", len(hung))
    tried("of them hung", sum(hung))
    timed = hang(nursery, path, range(len(hung)))
    tried("the same storms with the core's own lock", len(timed))
    tried("of those hung", sum(timed))
    assert any(hung), "these storms do not show a lost wake-up"
    assert not any(timed)
