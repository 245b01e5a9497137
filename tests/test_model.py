"""The protocol's models: every interleaving of a few processes, with kills, the repairs included.

What holds must hold in every state, and each rule must be seen to matter: a model in which it is
dropped must break. The larger ones run in `make soak`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import SOAK
from model import (
    events,
    free_slots,
    growth,
    heap,
    ids,
    index,
    places,
    semaphore,
    slots,
    small,
    sums,
    unlock_for,
    waiting,
)
from model.explorer import DIED, NOBODY_SLEEPS, Explorer, Memory, Model, Outcome, Steps
from model.operations import after_all, call, consistent, load, lock, sleep, store, unlock, woken

SUBJECTS = {
    "heap": heap,
    "free slots": free_slots,
    "sums": sums,
    "index": index,
    "ids": ids,
    "slots": slots,
    "growth": growth,
    "places": places,
    "small": small,
    "semaphore": semaphore,
    "unlock for": unlock_for,
    "waiting": waiting,
    "events": events,
}
LIMIT = 20_000_000 if SOAK else 400_000

FEWEST = {
    "heap: two holders": 17_200,
    "heap: two holders, straddling map words": 18_700,
    "heap: hand-over": 60_300,
    "heap: remove and insert": 15_000,
    "heap: reader": 379_000,
    "heap: reader of a reused slot": 4_120,
    "heap: full": 31_900,
    "heap: repair beside": 25_500,
    "heap: two inserts": 28_000,
    "heap: unneeded: descriptor, then map": 17_100,
    "heap: unneeded: clear, then map": 17_300,
    "heap: three holders": 350_200,
    "heap: hand-over, three kills": 79_800,
    "heap: remove and insert, two kills": 33_400,
    "heap: reader, a kill": 1_069_000,
    "heap: reader of a quick writer": 1_774_000,
    "free slots: removed": 2_860,
    "free slots: two repair": 2_080,
    "free slots: reused": 18_300,
    "free slots: two inserts": 11_600,
    "free slots: stopped": 2_730,
    "free slots: beside": 32_800,
    "free slots: put off": 27_700,
    "free slots: two free": 15_300,
    "free slots: unneeded: slot lock": 27_700,
    "free slots: unneeded: life again": 18_100,
    "free slots: unneeded: clear, then map": 16_500,
    "free slots: two free, three kills": 77_700,
    "free slots: reused, four kills": 24_600,
    "free slots: crowd": 1_920_900,
    "sums: read": 19_900,
    "sums: read, replaced": 27_600,
    "sums: handed on": 41_300,
    "sums: repaired": 18_100,
    "sums: ids repaired": 26_800,
    "sums: passed": 81_300,
    "sums: handed on, three kills": 65_500,
    "sums: repaired, three kills": 40_600,
    "sums: passed, two kills": 102_300,
    "sums: crowd": 1_196_400,
    "index: scanned": 50_500,
    "index: scanned, reused": 71_000,
    "index: renamed": 1_370,
    "index: rename and insert": 2_900,
    "index: remove and insert": 12_900,
    "index: rename and commit": 26_100,
    "index: repair seen": 35_700,
    "index: reused": 16_100,
    "index: repair seen, two kills": 65_200,
    "index: reused, two kills": 24_300,
    "index: remove and insert, three kills": 18_400,
    "index: crowd": 578_200,
    "ids: start, stop": 140_100,
    "ids: repair seen": 12_500,
    "ids: rolled back": 14_300,
    "ids: replaced": 15_100,
    "ids: three": 29_600,
    "ids: unneeded: entered first": 11_400,
    "ids: start, stop, two kills": 180_700,
    "ids: rolled back, two kills": 35_100,
    "ids: replaced, two kills": 31_500,
    "ids: three, two kills": 64_500,
    "ids: looked up": 1_168_100,
    "slots: hand-over": 5_880,
    "slots: busy heap": 4_230,
    "slots: unneeded: garbage, then dirty 0": 4_090,
    "slots: hand-over, three kills": 7_330,
    "slots: four": 30_100,
    "places: stopped": 4_700,
    "places: at once": 5_270,
    "places: crowd": 103_500,
    "small: renamed": 15_400,
    "small: twice": 4_800,
    "small: sizes": 88_600,
    "small: reused": 7_870,
    "small: crowd": 135_200,
    "growth: one grows": 1_570,
    "growth: two grow": 14_900,
    "growth: two grow, four kills": 17_800,
    "semaphore: two": 2_500,
    "semaphore: three": 10_000,
    "semaphore: three, three kills": 10_100,
    "unlock for: first": 1_540,
    "unlock for: first, nested": 1_360,
    "unlock for: first, crossed": 1_220,
    "unlock for: only": 1_490,
    "unlock for: only, nested": 1_320,
    "unlock for: middle": 657,
    "unlock for: last": 610,
    "unlock for: first, for longer": 4_490,
    "waiting: one": 12_500,
    "waiting: two": 97_500,
    "waiting: removed": 12_200,
    "waiting: reused": 55_700,
    "waiting: nobody": 4_770,
    "waiting: stale": 103_000,
    "waiting: anywhere": 20_500,
    "waiting: overtaken": 74_400,
    "waiting: inserted": 776,
    "waiting: removed, for the list": 60_300,
    "waiting: unneeded: cur again": 91_300,
    "waiting: unneeded: wakes under the lock": 24_500,
    "waiting: reused, two kills": 66_200,
    "waiting: overtaken, a kill": 89_400,
    "waiting: two anywhere": 709_000,
    "waiting: four": 583_000,
    "events: changed": 11_300,
    "events: at once": 11_800,
    "events: removed": 5_760,
    "events: reused": 14_400,
    "events: inserted": 5_890,
    "events: silent": 9_610,
    "events: dropped twice": 20_800,
    "events: given up": 3_860,
    "events: read": 47_100,
    "events: read at once": 79_000,
    "events: watched": 2_920,
    "events: two watch": 59_800,
    "events: unneeded: repaired, then consistent": 21_400,
    "events: unneeded: life, too": 14_400,
    "events: unneeded: settled": 8_490,
    "events: unneeded: only its own numbers": 11_400,
    "events: at once, three kills": 14_300,
    "events: reused, three kills": 19_200,
    "events: dropped twice, four kills": 21_800,
    "events: crowd": 353_000,
    "events: read, two kills": 342_000,
    "events: read at once, three kills": 94_900,
    "events: two watch, two kills": 682_000,
}
"""States that each model had when it was written. Fewer: something is left out by now."""


def cases(kind: str) -> list[tuple[str, str]]:
    return [(name, case) for name, subject in SUBJECTS.items() for case in getattr(subject, kind)]


def walk(name: str, model: Model, say: Callable[[str], None]) -> Outcome:
    outcome = Explorer(model).walk(LIMIT)
    say(f"{name}: {outcome}")
    return outcome


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    def aloud(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", end=" ")

    return aloud


def holds(subject: str, case: str, model: Model, say: Callable[[str], None]) -> None:
    name = f"{subject}: {case}"
    outcome = walk(name, model, say)
    assert outcome.violation is None, "\n".join([outcome.violation or "", *outcome.schedule])
    assert not outcome.truncated
    assert outcome.ends
    assert outcome.states >= FEWEST[name]


@pytest.mark.parametrize(("subject", "case"), cases("MODELS"))
def test_the_protocol_holds(subject: str, case: str, say: Callable[[str], None]) -> None:
    holds(subject, case, SUBJECTS[subject].MODELS[case](), say)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not SOAK, reason="`make soak` walks through the larger models")
@pytest.mark.parametrize(("subject", "case"), cases("SOAK"))
def test_the_protocol_holds_for_more(subject: str, case: str, say: Callable[[str], None]) -> None:
    holds(subject, case, SUBJECTS[subject].SOAK[case](), say)


@pytest.mark.parametrize(("subject", "rule"), cases("CONTROLS"))
def test_a_dropped_rule_is_noticed(subject: str, rule: str, say: Callable[[str], None]) -> None:
    model = SUBJECTS[subject].CONTROLS[rule](dropped=rule)
    outcome = walk(f"{subject} without '{rule}'", model, say)
    assert outcome.violation
    assert outcome.schedule


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_rule_has_its_control(subject: str) -> None:
    assert SUBJECTS[subject].CONTROLS.keys() == SUBJECTS[subject].RULES.keys()


# --- the explorer itself -------------------------------------------------------------------------


def counting(kills: int = 0, locked: bool = True, repaired: bool = True) -> Model:
    """Two count to 2, then the third says that all have ended."""

    def add() -> Steps:
        if locked and (yield lock("lock")) == DIED and repaired:
            yield consistent("lock")
        count = yield load("count")
        yield store("count", count + 1)
        if locked:
            yield unlock("lock")

    def process() -> Steps:
        yield store("begun", 1)
        yield call(add)

    def last() -> Steps:
        yield after_all()
        yield store("ended", 1)

    def claim(memory: Memory) -> str | None:
        return "one was lost" if memory["ended"] and memory["count"] < 2 and not kills else None

    words = {"count": 0, "begun": 0, "ended": 0}
    return Model(words, ["lock"], [process, process, last], claim, kills, audited=True)


def test_the_explorer_finds_the_schedule_of_a_lost_update() -> None:
    outcome = Explorer(counting(locked=False)).walk()
    assert outcome.violation == "one was lost"
    stores = [line for line in outcome.schedule if "store count = 1" in line]
    assert [line[:9] for line in stores] in (["process 0", "process 1"], ["process 1", "process 0"])
    assert Explorer(counting()).walk().violation is None


def test_the_explorer_kills_and_hands_on() -> None:
    outcome = Explorer(counting(kills=2)).walk()
    assert outcome.violation is None
    assert outcome.states > Explorer(counting()).walk().states
    lost = Explorer(counting(kills=1, repaired=False)).walk()
    assert "nobody can ever take again" in str(lost.violation)
    assert any("is killed before it would store count" in line for line in lost.schedule)


def test_the_explorer_notices_who_waits_for_ever() -> None:
    def grab(first: str, second: str) -> Callable[[], Steps]:
        def process() -> Steps:
            for word in (first, second):
                yield lock(word)
            for word in (second, first):
                yield unlock(word)

        return process

    processes = [grab("a", "b"), grab("b", "a")]
    crossed = Model({}, ["a", "b"], processes, lambda memory: None, kills=0)
    assert Explorer(crossed).walk().violation == "nobody can go on"


def sleeping(wakes: bool = True, ends: int = 0) -> Model:
    """One sleeps until another has counted; its slice ends if `ends`."""

    def sleeper() -> Steps:
        if (yield sleep("count", 0, "queue")):
            yield woken("queue", "ends")

    def counter() -> Steps:
        yield store("count", 1)
        if wakes:
            yield store("queue", NOBODY_SLEEPS)

    words = {"count": 0, "queue": NOBODY_SLEEPS, "ends": ends}
    return Model(words, [], [sleeper, counter], lambda memory: None, kills=0)


def test_the_explorer_puts_to_sleep_and_wakes() -> None:
    assert Explorer(sleeping()).walk().violation is None
    assert Explorer(sleeping(wakes=False, ends=1)).walk().violation is None
    lost = Explorer(sleeping(wakes=False)).walk()
    assert lost.violation == "nobody can go on"
    assert lost.schedule.index("process 0 in sleeper: sleep count = 0 -> True") < (
        lost.schedule.index("process 1 in counter: store count = 1")
    )


def test_the_explorer_says_when_it_did_not_get_to_the_end() -> None:
    outcome = Explorer(counting()).walk(limit=10)
    assert outcome.truncated
    assert "cut off" in str(outcome)
