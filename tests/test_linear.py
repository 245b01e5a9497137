"""The checker of histories: what has an order is accepted, what has none is not, and is cut down
to what matters.

It is compared with a search through every order of small histories, so it is right in both
directions; and it accepts whatever a single worker at a time could have done.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
from helpers import SOAK
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import Operation, State, contradiction

# --- one word that is read, written, and compared and swapped -------------------------------------


def reads(who: str, start: int, end: int, value: State) -> Operation:
    text = f"read {value}"
    return Operation(who, start, end, lambda s: (s,) if s == value else (), text, reads=True)


def writes(who: str, start: int, end: int, value: State, maybe: bool = False) -> Operation:
    return Operation(who, start, end, lambda s: (value,), f"write {value}", maybe=maybe)


def swaps(who: str, start: int, end: int, old: State, new: State, maybe: bool = False) -> Operation:
    def step(state: State) -> tuple[State, ...]:
        return (new,) if state == old else ()

    return Operation(who, start, end, step, f"{old} to {new}", maybe=maybe)


def told(history: list[Operation]) -> list[str]:
    """The contradiction's operations, as short as can be; empty: there is an order."""
    found = contradiction(history, 0)
    return [] if found is None else [f"{op.who}: {op.text}" for op in found.operations]


GOOD: dict[str, list[Operation]] = {
    "nothing": [],
    "one after another": [writes("a", 0, 1, 1), reads("b", 2, 3, 1)],
    "a read of either, meanwhile": [
        writes("a", 0, 10, 1),
        reads("b", 1, 2, 0),
        reads("c", 3, 4, 1),
    ],
    "the later start takes effect first": [
        writes("a", 0, 10, 1),
        writes("b", 5, 9, 2),
        reads("c", 11, 12, 1),
    ],
    "at the same moment": [writes("a", 0, 5, 1), reads("b", 5, 6, 0)],
    "a chain in the only order": [
        swaps("a", 0, 10, 2, 3),
        swaps("b", 0, 10, 0, 1),
        swaps("c", 0, 10, 1, 2),
        reads("d", 11, 12, 3),
    ],
    "killed, and it happened": [writes("a", 0, 9, 1, maybe=True), reads("b", 20, 21, 1)],
    "killed, and it did not": [writes("a", 0, 9, 1, maybe=True), reads("b", 20, 21, 0)],
    "killed before it could": [swaps("a", 0, 9, 7, 8, maybe=True), reads("b", 20, 21, 0)],
    "killed, and it happened late": [
        writes("a", 0, 9, 1, maybe=True),
        reads("b", 1, 2, 0),
        reads("b", 3, 4, 1),
        reads("b", 20, 21, 1),
    ],
}

BAD: dict[str, tuple[list[Operation], list[str]]] = {
    "a stale read": (
        [reads("z", 0, 1, 0), writes("a", 2, 3, 1), writes("c", 2, 9, 2), reads("b", 10, 11, 0)],
        ["c: write 2", "b: read 0"],
    ),
    "a lost update": (
        [
            swaps("a", 0, 1, 0, 1),
            reads("d", 0, 30, 1),
            swaps("b", 10, 20, 1, 2),
            swaps("c", 11, 21, 1, 3),
            reads("d", 40, 41, 3),
        ],
        ["b: 1 to 2", "c: 1 to 3"],
    ),
    "a value from nowhere": ([writes("a", 0, 1, 1), reads("b", 0, 1, "torn")], ["b: read torn"]),
    "the new one, then the old one": (
        [writes("a", 0, 20, 1), reads("b", 1, 2, 1), reads("c", 3, 4, 0)],
        ["b: read 1", "c: read 0"],
    ),
    "killed, seen, and gone again": (
        [writes("a", 0, 9, 1, maybe=True), reads("b", 10, 11, 1), reads("c", 12, 13, 0)],
        ["b: read 1", "c: read 0"],
    ),
    "dead, and it changes something": (
        [writes("a", 0, 9, 1, maybe=True), reads("b", 10, 11, 0), reads("c", 12, 13, 1)],
        ["b: read 0", "c: read 1"],
    ),
    "each alone is fine": (
        [
            *(writes(f"w{i}", 0, 100, i) for i in range(1, 4)),
            reads("a", 1, 2, 1),
            reads("a", 3, 4, 2),
            reads("b", 5, 6, 3),
            reads("c", 7, 8, 1),
        ],
        ["a: read 1", "b: read 3", "c: read 1"],
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_has_an_order(name: str) -> None:
    assert told(GOOD[name]) == []


@pytest.mark.parametrize("name", BAD)
def test_what_has_none(name: str) -> None:
    history, expected = BAD[name]
    for seed in range(5):
        shuffled = random.Random(seed).sample(history, len(history))
        assert told(shuffled) == expected


def test_a_contradiction_of_more_than_is_tried_out() -> None:
    """Each of the five reads is needed: of four there is an order."""
    history = [writes(f"w{i}", 0, 100, i % 2) for i in range(4)]
    history += [reads("r", 10 * i, 10 * i + 1, i % 2) for i in range(1, 6)]
    history += [reads("s", 10 * i, 10 * i + 1, i % 2) for i in range(1, 6)]
    assert sorted(text[3:] for text in told(history)) == ["read 0"] * 2 + ["read 1"] * 3


def test_what_it_says() -> None:
    history = [
        swaps("a", 1_000, 2_000, 0, 1),
        swaps("b", 10_000, 12_500, 1, 2),
        swaps("c", 11_000, 13_500, 1, 3),
        reads("d", 13_000, 15_000, 3),
    ]
    assert str(contradiction(history, 0)).splitlines() == [
        "no order explains 2 of the operations:",
        "         0.0 to        2.5 us     b  1 to 2",
        "         1.0 to        3.5 us     c  1 to 3",
        "what could be 64 operations before:",
        "  0",
        "under way meanwhile:",
        "         0.0 to        2.5 us     b  1 to 2",
        "         3.0 to        5.0 us     d  read 3",
    ]


# --- against every order --------------------------------------------------------------------------


def has_order(history: list[Operation], state: State) -> bool:
    """By trying all of them, with and without each operation that may not have happened."""
    required, maybe = ([op for op in history if op.maybe is which] for which in (False, True))
    return any(
        _has_order([*required, *some], state)
        for count in range(len(maybe) + 1)
        for some in combinations(maybe, count)
    )


def _has_order(rest: list[Operation], state: State) -> bool:
    if not rest:
        return True
    first_end = min(op.end for op in rest)
    return any(
        _has_order([*rest[:i], *rest[i + 1 :]], after)
        for i, op in enumerate(rest)
        if op.start <= first_end
        for after in op.step(state)
    )


MOMENTS = st.integers(0, 12)
VALUES = st.integers(0, 2)


LENGTHS = st.integers(0, 6)


@st.composite
def operations(draw: Callable[[st.SearchStrategy[int]], int]) -> Operation:
    start, first, second = draw(MOMENTS), draw(VALUES), draw(VALUES)
    end, kind = start + draw(LENGTHS), draw(st.integers(0, 4))
    if kind == 0:
        return reads("r", start, end, first)
    if kind <= 2:
        return writes("w", start, end, first, maybe=kind == 2)
    return swaps("s", start, end, first, second, maybe=kind == 4)


@pytest.mark.soak
@settings(max_examples=5000 if SOAK else 600, deadline=None)
@given(st.lists(operations(), max_size=6))
def test_against_every_order(history: list[Operation]) -> None:
    found = contradiction(history, 0)
    assert (found is None) == has_order(history, 0)
    if found is None:
        return
    # Its operations have no order even if nothing is demanded of the others, and one less has one.
    for left_out in [None, *found.operations]:
        strict = [op for op in found.operations if op is not left_out]
        others = [op if op in strict else replace(op, maybe=True) for op in history]
        assert has_order(others, 0) == (left_out is not None)


# --- longer ones ----------------------------------------------------------------------------------


@st.composite
def sequential(draw: Callable[[st.SearchStrategy[int]], int]) -> list[Operation]:
    """What happens at moments 0, 10, 20, ... one after another, from some time before that moment
    to some time after it. No two writes are of the same value."""
    value, history = 0, []
    for i in range(1, draw(st.integers(1, 60))):
        start, end = (draw(st.integers(0, 35)) for _ in range(2))
        who, when = f"w{i}", (10 * i - start, 10 * i + end)
        kind = draw(st.integers(0, 3))
        if kind == 0:
            history.append(reads(who, *when, value))
        elif kind == 1:
            history.append(writes(who, *when, i))
            value = i
        elif kind == 2:
            history.append(swaps(who, *when, value, i))
            value = i
        else:
            happened = draw(st.booleans())
            history.append(swaps(who, *when, value, i, maybe=True))
            value = i if happened else value
    return history


@pytest.mark.soak
@settings(max_examples=1000 if SOAK else 150, deadline=None)
@given(sequential(), st.randoms(use_true_random=False))
def test_what_one_after_another_did_is_accepted(
    history: list[Operation], chance: random.Random
) -> None:
    chance.shuffle(history)
    assert contradiction(history, 0) is None


@pytest.mark.soak
@settings(max_examples=500 if SOAK else 80, deadline=None)
@given(sequential(), st.integers(0, 1000))
def test_a_result_that_is_false_is_not(history: list[Operation], at: int) -> None:
    """What nobody wrote cannot be read; neither can what was overwritten long ago."""
    end = max((op.end for op in history), default=0) + 1
    false = reads("false", at, at + 5, "torn")
    assert told([*history, false]) == ["false: read torn"]
    late = [writes("x", end, end + 1, "x"), reads("late", end + 2, end + 3, 0)]
    assert told([*history, *late]) == ["x: write x", "late: read 0"]
