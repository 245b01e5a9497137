"""Kill storms that end quietly: the survivors finish, and nothing that was acknowledged is lost.

storm.py says what a storm is, and what is proven after it. The last test is the negative control:
the same storms with an untimed lock in the place of the core's timed one (untimed_lock.c) have to
hang, or they would not show a lost wake-up.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import SOAK
from killing import TESTS, Child, Nursery
from storm import Tally, prove_storms, watch_storms
from storm_worker import Shape

ROUND = 60.0  # seconds after which a round hangs; each wait inside of it has a deadline of its own

Tried = Callable[[str, int], None]


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("shape", "lock", "rounds"),
    [
        pytest.param(Shape.few, "robust", 500 if SOAK else 60, id="few"),
        pytest.param(Shape.many, "robust", 300 if SOAK else 40, id="many"),
        pytest.param(Shape.few, "multiprocessing", 120 if SOAK else 15, id="few-multiprocessing"),
        pytest.param(Shape.many, "multiprocessing", 80 if SOAK else 10, id="many-multiprocessing"),
    ],
)
def test_the_survivors_finish_and_nothing_is_lost(
    start: Callable[..., Child],
    path: str,
    tried: Tried,
    shape: Callable[[int, str], Shape],
    lock: str,
    rounds: int,
) -> None:
    storms = start(prove_storms, path)
    total = Tally()
    for seed in range(rounds):
        try:
            total += storms.ask(shape(seed, lock), ROUND)
        except AssertionError as exc:
            raise AssertionError(f"{shape(seed, lock)}: {exc}") from None
    tried(f"storms that ended quietly, {lock} locks", rounds)
    tried("workers killed in storms", total.kills)
    tried("workers stopped in storms", total.stops)
    tried("changes acknowledged in storms", total.changes)
    # Else it is no storm.
    assert total.kills > 4 * rounds
    assert total.stops > rounds
    assert total.changes > 50 * rounds
    if lock == "multiprocessing":
        tried(
            "multiprocessing locks that stayed locked: the instant that is not covered", total.stuck
        )
        assert total.stuck < rounds / 4, "that instant is short"


def hang(nursery: Nursery, path: str, seeds: range) -> list[bool]:
    """Of each storm whether its survivors hang. One that does is enough, but for the soak."""
    storms = nursery.start(watch_storms, path)
    hung: list[bool] = []
    for seed in seeds:
        # All on one CPU, so that it takes long until whoever is woken runs. One wave, since those
        # who hang would also hinder the next.
        hung.append(storms.ask(replace(Shape.few(seed), crowded=True, waves=1), ROUND))
        if hung[-1] and not SOAK:
            break
    return hung


CONTROLS = 300 if SOAK else 100


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
