"""Whatever workers do at the same time, and whoever of them is killed: there is an order of their
operations, one after another, in which each has the result that it had.

The workers of history_driver.py do everything at random and on record, linear.py looks for the
order. That it would not find one if the core were wrong is shown on a build of the core with bugs
in it (planted_bugs.py): each is caught.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pg_servers
import planted_bugs
import pytest
from helpers import SOAK, list_url
from history import Entry, History, Record, Recorder, objects, read
from history_driver import Plan, direct
from killing import DEADLINE, Child, Nursery, Pipe
from linear import Contradiction, Operation, contradiction

Tried = Callable[[str, int], None]
Start = Callable[..., Child]

CALLS = 1000 if SOAK else 300
DEATHS = 40 if SOAK else 15
BOUND = 20  # runs in which a planted bug must show


def run(start: Start, plan: Plan) -> tuple[list[Entry], list[tuple[str, str]]]:
    """What was recorded, and what is wrong with the list."""
    plan.folder.mkdir(exist_ok=True)
    director = start(direct, plan)
    deaths, problems = director.hear(20 * DEADLINE)
    director.close()
    return read(plan.folder, deaths), problems


def first_contradiction(histories: list[History]) -> tuple[str, Contradiction] | None:
    for what, operations, initial in histories:
        found = contradiction(operations, initial)
        if found is not None:
            return what, found
    return None


def assert_explained(entries: list[Entry], domains: int) -> None:
    found = first_contradiction(objects(entries, domains))
    assert found is None, f"{found[0]}: {found[1]}"


def together(operations: list[Operation]) -> int:
    """How many of them began while another one was under way."""
    end, count = 0, 0
    for op in sorted(operations, key=lambda op: op.start):
        count += op.start < end
        end = max(end, op.end)
    return count


# --- the real core --------------------------------------------------------------------------------


CASES = [
    *((seed, "robust") for seed in range(50 if SOAK else 5)),
    *((seed, "multiprocessing") for seed in range(20 if SOAK else 3)),
    *((seed, "postgres") for seed in range(30 if SOAK else 2) if pg_servers.missing() is None),
]


@pytest.fixture(scope="module")
def done() -> Counter[str]:
    """What was done and what came of it, in all cases together."""
    return Counter()


@pytest.mark.soak
@pytest.mark.parametrize(("seed", "lock"), CASES)
def test_there_is_an_order(
    start: Start,
    tmp_path: Path,
    done: Counter[str],
    seed: int,
    lock: Literal["robust", "multiprocessing", "postgres"],
) -> None:
    """Nobody is killed where locks are multiprocessing's: there that is best effort."""
    plan = Plan(
        tmp_path / "run",
        seed,
        workers=3 + seed % 4,
        domains=1 + seed % 6,
        calls=CALLS,
        deaths=0 if lock == "multiprocessing" else DEATHS,
        lock=lock,
        url=list_url() if lock == "postgres" else "",
    )
    entries, problems = run(start, plan)
    assert problems == []
    assert_explained(entries, plan.domains)
    done.update(entry.outcome or "killed" for entry in entries)
    done.update(entry.how for entry in entries)
    histories = objects(entries, plan.domains)[: plan.domains]
    done.update({"cases": 1, "workers killed": plan.deaths, "operations": len(entries)})
    done.update({"together": sum(together(history.operations) for history in histories)})


@pytest.mark.soak
def test_all_of_it_was_done(done: Counter[str], tried: Tried) -> None:
    """With every result that it may have, and not one after another."""
    print(dict(done))
    tried("operations in recorded histories that were explained", done["operations"])
    tried("began while another one of the same domain was under way", done["together"])
    tried("workers killed in recorded histories", done["workers killed"])
    if done["cases"] == len(CASES):
        assert [what for what in [*WAYS, *RESULTS] if not done[what]] == []
        assert done["together"] > done["operations"] / 100


WAYS = {
    "peek",
    "snapshot",
    "get",
    "lookup",
    "find",
    "lock the list and find",
    "lock",
    "go on",
    "define",
    "assign_def",
    "undefine",
    "remove_inactive",
    "rename",
}
RESULTS = {
    "done",
    "missing",
    "exists",
    "active",
    "transient",
    "removed",
    "rolled back",
    "late",
    "killed",
}


# --- bugs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bugged() -> Iterator[Nursery]:
    """Its children have the core with bugs, none of them on yet."""
    with Nursery(planted_bugs.build()) as nursery:
        yield nursery


# A repair needs somebody who died; a miss that is wrong needs many who look at one name.
OTHERWISE: dict[str, dict[str, int]] = {
    "undoes a commit when it repairs": {"deaths": 15},
    "misses without looking at the sequence": {"workers": 6, "domains": 1},
}


def plan_with(folder: Path, seed: int, bug: str) -> Plan:
    sizes = {"workers": 4, "domains": 2, "calls": CALLS, **OTHERWISE.get(bug, {})}
    return Plan(folder / str(seed), seed, bug=bug, **sizes)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", list(planted_bugs.BUGS)[1:])
def test_a_planted_bug_is_caught(bugged: Nursery, tmp_path: Path, tried: Tried, bug: str) -> None:
    for seed in range(BOUND):
        plan = plan_with(tmp_path, seed, bug)
        entries, _ = run(bugged.start, plan)
        tried("operations in histories with a planted bug", len(entries))
        found = first_contradiction(objects(entries, plan.domains))
        if found is not None:
            print(f"{bug}, run {seed + 1}, {found[0]}: {found[1]}")
            assert len(found[1].operations) <= 4
            return
    pytest.fail(f"the core {bug}, and {BOUND} runs had an order")


@pytest.mark.timeout(300)
def test_without_a_bug_that_build_is_right(bugged: Nursery, tmp_path: Path) -> None:
    for seed in range(2):
        plan = plan_with(tmp_path, seed, "none")
        entries, problems = run(bugged.start, plan)
        assert problems == []
        assert_explained(entries, plan.domains)


def test_a_bug_that_finds_no_place_is_not_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planted_bugs.PLANTED, "record.c", [("no such text", "")])
    with pytest.raises(AssertionError, match=r"record\.c has it 0 times"):
        planted_bugs.build()


def test_the_real_core_has_no_bug_to_turn_on() -> None:
    with pytest.raises(ValueError, match="undefined symbol: sd_planted"):
        planted_bugs.plant("unlocks before the commit")


# --- false results in a right history -------------------------------------------------------------


@pytest.mark.soak
def test_a_false_result_has_no_order(start: Start, tmp_path: Path, tried: Tried) -> None:
    """One result of a real history is exchanged for another one that was there as well. Some of
    them could have been; most could not."""
    plan = Plan(tmp_path / "run", seed=1, workers=3, domains=1, calls=150)
    entries, _ = run(start, plan)
    assert_explained(entries, 1)
    chance = random.Random(5)
    seen = [i for i, entry in enumerate(entries) if entry.outcome == "done" and entry.seen]
    count = 500 if SOAK else 50
    rejected = sum(
        first_contradiction(objects(_with_a_false_result(entries, chance, seen), 1)) is not None
        for _ in range(count)
    )
    print(f"{rejected} of {count} false results have no order")
    tried("false results in a history", count)
    tried("of them without an order", rejected)
    assert rejected > count * 0.8


def _with_a_false_result(
    entries: list[Entry], chance: random.Random, seen: list[int]
) -> list[Entry]:
    at = chance.choice(seen)
    entry = entries[at]
    others = [entries[i].seen for i in seen if entries[i].seen != entry.seen]
    return [*entries[:at], replace(entry, seen=chance.choice(others)), *entries[at + 1 :]]


# --- what is recorded, and what it means ----------------------------------------------------------

OLD = Record("web0", -1, "SHUTOFF", None, "v1", None, True)
NEW = OLD._replace(data="new")


def record_and_be_killed(pipe: Pipe, folder: Path) -> None:
    log = Recorder(folder, "victim")
    log.call(do="define", how="define", number=0, name="web0", version="v1", persistent=True)
    log.done(outcome="done", seen=[(0, OLD)])
    log.call(do="change", how="get", by="uuid", key=0, number=0)
    log.will(seen=[(0, OLD)], wrote=NEW)
    os.write(log._fd, b"\x82\xa3end")  # cut short
    pipe.say()
    pipe.rest()


def test_what_a_killed_worker_has_recorded(start: Start, tmp_path: Path) -> None:
    victim = start(record_and_be_killed, tmp_path)
    victim.hear()
    victim.kill()
    first, last = read(tmp_path, {"victim": 1 << 62})
    assert (first.outcome, first.seen, first.wrote) == ("done", [(0, OLD)], None)
    assert first.start <= first.end < last.start
    assert (last.outcome, last.seen, last.wrote) == (None, [(0, OLD)], NEW)
    assert last.end == 1 << 62


def test_who_lives_has_recorded_how_it_ended(tmp_path: Path) -> None:
    Recorder(tmp_path, "a").call(do="look", how="peek", key=0, number=0)
    with pytest.raises(AssertionError, match="a did not record how"):
        read(tmp_path, {})


def entry(at: int, do: str, outcome: str | None = "done", **what: Any) -> Entry:
    """Done from `at` to `at` + 1."""
    return Entry("w", at, do, **{"how": do, "end": at + 1, "outcome": outcome, **what})


def define(at: int, number: int, name: str, outcome: str | None = "done") -> Entry:
    what = {"number": number, "name": name, "version": "v1", "persistent": True}
    return entry(at, "define", outcome, **what)


def change(at: int, old: Record, new: Record, outcome: str | None = "done", **what: Any) -> Entry:
    seen = [(0, old)]
    return entry(
        at, "change", outcome, **{"key": 0, "number": 0, "seen": seen, "wrote": new, **what}
    )


def look(at: int, record: Record | None, **key: Any) -> Entry:
    seen = [] if record is None else [(0, record)]
    what = {"key": 0, "number": 0, "seen": seen, **key}
    return entry(at, "look", "done" if seen else "missing", **what)


BY_NAME = {"by": "name", "key": "web0", "number": None}
ACTIVE = OLD._replace(id=7, state="RUNNING")
RENAMED = OLD._replace(name="web1")
RENAME = {"do": "rename", "how": "rename", "name": "web1"}

GOOD = {
    "define, look, undefine": [
        define(0, 0, "web0"),
        look(2, OLD, **BY_NAME),
        entry(4, "undefine", key=0, number=0),
        look(6, None, **BY_NAME),
        look(8, None),
    ],
    "who is active stays when it is undefined": [
        define(0, 0, "web0"),
        change(2, OLD, ACTIVE),
        entry(4, "undefine", by="id", key=7, number=0),
        entry(6, "undefine", "transient", key=0, number=0),
        entry(8, "remove", "active", number=0),
        look(10, ACTIVE._replace(persistent=False), by="id", key=7),
        look(12, None, by="id", key=6),
    ],
    "a name that is free again": [
        define(0, 0, "web0"),
        define(2, 1, "web0", "exists"),
        replace(change(4, OLD, RENAMED), **RENAME),
        define(6, 1, "web0"),
        define(8, 1, "web2", "exists"),
    ],
    "killed before the commit": [define(0, 0, "web0"), change(2, OLD, NEW, None), look(4, OLD)],
    "killed after it": [define(0, 0, "web0"), change(2, OLD, NEW, None), look(4, NEW)],
    "late, and nothing happened": [define(0, 0, "web0", "late"), look(2, None)],
    "a handle that outlived its domain": [
        define(0, 0, "web0"),
        entry(3, "remove", number=0),
        define(5, 0, "web0"),
        entry(7, "change", "removed", key=0, number=0, since=1),
    ],
    "a snapshot meets a domain twice": [
        define(0, 0, "web0"),
        entry(1, "snapshot", end=9, number=2, seen=[(0, OLD), (0, RENAMED)]),
        replace(change(3, OLD, RENAMED), **RENAME),
    ],
}

BAD = {
    "two have one name": [define(0, 0, "web0"), define(2, 1, "web0")],
    "refused without a reason": [define(0, 0, "web0"), define(2, 1, "web1", "exists")],
    "it has the name, and is not found by it": [define(0, 0, "web0"), look(2, None, **BY_NAME)],
    "renamed, and found by the old name": [
        define(0, 0, "web0"),
        replace(change(2, OLD, RENAMED), **RENAME),
        look(4, RENAMED, **BY_NAME),
    ],
    "it has the id, and is not found by it": [
        define(0, 0, "web0"),
        change(2, OLD, ACTIVE),
        look(4, None, by="id", key=7),
    ],
    "found by a name that it does not have": [
        define(0, 0, "web0"),
        look(2, OLD, by="name", key="web1"),
    ],
    "defined as something else": [replace(define(0, 0, "web0"), seen=[(0, NEW)])],
    "not transient, and refused for that": [
        define(0, 0, "web0"),
        entry(2, "undefine", "transient", key=0, number=0),
    ],
    "not renamed without a reason": [
        define(0, 0, "web0"),
        replace(change(2, OLD, RENAMED, "exists"), **RENAME),
    ],
    "renamed to a name that another one has": [
        define(0, 0, "web0"),
        define(2, 1, "web1"),
        replace(change(4, OLD, RENAMED), **RENAME),
    ],
    "seen under its new name, and then not found by it": [
        define(0, 0, "web0"),
        replace(change(2, OLD, RENAMED), **RENAME, end=20),
        look(4, RENAMED),
        look(6, None, by="name", key="web1"),
    ],
    "active, and removed": [
        define(0, 0, "web0"),
        change(2, OLD, ACTIVE),
        entry(4, "remove", number=0),
    ],
    "active, and renamed": [
        define(0, 0, "web0"),
        change(2, OLD, ACTIVE),
        replace(change(4, ACTIVE, ACTIVE._replace(name="web1")), **RENAME),
    ],
    "undefined, and as persistent as before": [
        define(0, 0, "web0"),
        change(2, OLD, ACTIVE),
        entry(4, "undefine", key=0, number=0),
        look(6, ACTIVE),
    ],
    "an id that was given before": [
        define(0, 0, "web0"),
        change(2, OLD, ACTIVE),
        change(4, ACTIVE, NEW),
        change(6, NEW, NEW._replace(id=7)),
    ],
    "half of a change": [
        define(0, 0, "web0"),
        change(2, OLD, NEW._replace(state="CRASHED")),
        look(2, NEW),
    ],
    "rolled back, and seen": [
        define(0, 0, "web0"),
        entry(2, "change", "rolled back", key=0, number=0, seen=[(0, OLD)]),
        look(4, NEW),
    ],
    "killed, and undone after it was seen": [
        define(0, 0, "web0"),
        change(2, OLD, NEW, None),
        look(4, NEW),
        look(6, OLD),
    ],
    "an update that is lost": [
        define(0, 0, "web0"),
        change(2, OLD, NEW),
        change(2, OLD, OLD._replace(data="other")),
    ],
    "removed, they say, and it was there all the time": [
        define(0, 0, "web0"),
        entry(7, "change", "removed", key=0, number=0, since=2),
    ],
    "not in the snapshot": [define(0, 0, "web0"), entry(2, "snapshot", number=1)],
    "an error": [define(0, 0, "web0"), entry(2, "look", "raised OSError: no", key=0, number=0)],
}


@pytest.mark.parametrize("name", GOOD)
def test_what_can_have_been(name: str) -> None:
    assert_explained(GOOD[name], 2)


@pytest.mark.parametrize("name", BAD)
def test_what_can_not_have_been(name: str) -> None:
    assert first_contradiction(objects(BAD[name], 2)) is not None
    assert_explained(BAD[name][:-1], 2)
