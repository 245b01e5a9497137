"""Kill storms on PostgreSQL: those of test_storms.py, and what only this store can show.

storm.py says what a storm is, and what is proven after it.
"""

from __future__ import annotations

from collections.abc import Callable

import pg_servers
import pytest
from helpers import SOAK, list_url
from killing import Child
from storm import prove_storms
from storm_worker import Shape
from test_storms import rounds

pg_servers.need()

Tried = Callable[[str, int], None]
ROUNDS = 25 if SOAK else 6


@pytest.mark.soak
@pytest.mark.parametrize("part", range(8 if SOAK else 1))
@pytest.mark.parametrize("shape", [Shape.few, Shape.many], ids=["few", "many"])
def test_postgres_survivors_finish_and_nothing_is_lost(
    start: Callable[..., Child],
    tried: Tried,
    shape: Callable[[int, str], Shape],
    part: int,
) -> None:
    seeds = range(part * ROUNDS, (part + 1) * ROUNDS)
    total = rounds(
        start(prove_storms, list_url()), [shape(seed, "postgres") for seed in seeds], tried
    )
    tried("of those storms on PostgreSQL", ROUNDS)
    tried("changes acknowledged on PostgreSQL", total.changes)
    tried("events of storms on PostgreSQL, in one row", total.events)
