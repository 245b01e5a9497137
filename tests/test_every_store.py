"""A worker may be killed at any instruction: each image that SIGKILL could leave is recovered from.

test_crash_points.py kills at the stores that go through the inlines of layout.h. Here ptrace finds
every instruction that stores into the segment, the C library's in its mutexes included, whatever it
goes through; so this also shows that the numbered points are all there are. What is an image, and
what must hold, stands in trace_driver.py. Where ptrace is refused these tests are skipped and say
why. `make test` takes the operations in `SHORT`; ``SHMDOMAINS_SOAK=1`` takes all of them, and the
repair after a death in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from crash_build import Driver, driving
from helpers import SOAK

PATIENCE = 900 if SOAK else 60  # seconds for one operation

IMAGES = {
    "create": 2,
    "attach and close": 2,
    "first use after a fork": 2,
    "snapshot": 1,
    "settings": 29,
    "list lock": 12,
    "domain lock": 12,
    "named lock": 13,
    "named lock with a reason": 18,
    "name a lock": 19,
    "find under the list lock": 57,
    "lock many": 55,
    "assign new": 159,
    "assign new and change": 95,
    "assign the first": 98,
    "assign with slot growth": 96,
    "assign with index growth": 1670,
    "define": 61,
    "assign over inactive": 71,
    "assign over inactive larger": 619,
    "assign over active": 119,
    "change fields": 16,
    "change a blob to a larger one": 152,
    "change a blob to a smaller one": 52,
    "change a blob to one of equal size": 78,
    "change small data": 43,
    "change small data to large": 233,
    "give small data": 38,
    "count in the data": 84,
    "rename with small data": 419,
    "swap with small data": 129,
    "remove with small data": 212,
    "clear a blob": 34,
    "change everything": 120,
    "commit mid way": 89,
    "roll back": 12,
    "set autostart": 16,
    "rename": 197,
    "activate": 42,
    "deactivate": 51,
    "restart": 64,
    "deactivate and back": 108,
    "remove inactive": 68,
    "undefine active": 32,
    "free": 218,
    "a job": 240,
    "an async job": 650,
    "a job in a dead holders place": 145,
}
"""Images that are known of each operation; fewer mean that something is not seen any more."""

REPAIRS = {
    "create": 38,
    "attach and close": 83,
    "first use after a fork": 83,
    "snapshot": 83,
    "settings": 102,
    "list lock": 102,
    "domain lock": 98,
    "named lock": 107,
    "named lock with a reason": 110,
    "name a lock": 99,
    "find under the list lock": 148,
    "lock many": 152,
    "assign new": 160,
    "assign new and change": 158,
    "assign the first": 85,
    "define": 158,
    "assign over inactive": 113,
    "assign over inactive larger": 116,
    "assign over active": 114,
    "change fields": 98,
    "change a blob to a larger one": 114,
    "change a blob to a smaller one": 115,
    "change a blob to one of equal size": 115,
    "rename with small data": 157,
    "remove with small data": 130,
    "clear a blob": 113,
    "change everything": 114,
    "commit mid way": 115,
    "roll back": 98,
    "set autostart": 98,
    "rename": 131,
    "activate": 107,
    "deactivate": 113,
    "restart": 113,
    "deactivate and back": 125,
    "remove inactive": 124,
    "undefine active": 115,
    "free": 71,
}
"""And of the repair after a death in it. Those of large segments take too long."""

SHORT = ["create", "attach and close", "first use after a fork", "list lock", "domain lock"]
SHORT += [
    "name a lock",
    "named lock with a reason",
    "settings",
    "change fields",
    "change small data",
    "change small data to large",
    "give small data",
    "count in the data",
    "clear a blob",
    "activate",
    "rename",
    "rename with small data",
    "swap with small data",
    "remove with small data",
    "remove inactive",
]

TRACED = list(IMAGES) if SOAK else SHORT
REPAIRED = list(REPAIRS) if SOAK else ["activate"]
STEPPED = ["domain lock", "change fields"]
KILLED = ["domain lock"]
if SOAK:
    # Most of the instructions of the others parse XML, the same ones each time, or only read.
    STEPPED = [name for name in IMAGES if not name.startswith(("assign", "snapshot"))]
    KILLED += ["find under the list lock", "activate", "rename", "remove inactive"]

pytestmark = pytest.mark.soak
Ask = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with driving("trace_driver.py", PATIENCE) as driver:
        yield driver


@pytest.fixture
def ask(driver: Driver) -> Ask:
    """``ask(operation, how)``: what was found."""

    def ask(name: str, how: str) -> dict[str, Any]:
        found = driver.ask(name, "robust", how)
        if found.get("refused"):
            pytest.skip(found["refused"])
        return found

    return ask


@pytest.fixture
def count(tried: Callable[[str, int], None]) -> Callable[[dict[str, Any]], None]:
    """Nothing was wrong; it goes into the figures."""

    def count(found: dict[str, Any]) -> None:
        assert found["failures"] == [], "\n".join(found["failures"])
        tried("operations and repairs that ptrace followed", 1)
        tried("stores into a segment that ptrace stopped at", found["stores"])
        tried("stores into a mutex that ptrace stopped at", found["mutex_stores"])
        tried("images of a death between two instructions", found["cases"])
        tried("instructions in single steps", found["steps"])

    return count


Count = Callable[[dict[str, Any]], None]


@pytest.mark.timeout(PATIENCE + 60)
@pytest.mark.parametrize("name", TRACED)
def test_killed_at_every_instruction(ask: Ask, count: Count, name: str) -> None:
    found = ask(name, "judge")
    count(found)
    assert found["images"] >= IMAGES[name]
    assert found["cases"] >= found["images"], "not every image was judged"
    assert name == "create" or found["stores"] == found["points"]


@pytest.mark.timeout(PATIENCE + 60)
@pytest.mark.parametrize("name", REPAIRED)
def test_killed_at_every_instruction_of_a_repair(ask: Ask, count: Count, name: str) -> None:
    found = ask(name, "recovery")
    count(found)
    assert found["images"] >= REPAIRS[name]
    assert found["stores"] == found["points"]


@pytest.mark.timeout(PATIENCE + 60)
@pytest.mark.parametrize("name", STEPPED)
def test_in_single_steps_no_more_is_seen(ask: Ask, count: Count, name: str) -> None:
    found = ask(name, "steps")
    count(found)
    assert found["steps"] > 1000, "that were no single steps"


@pytest.mark.timeout(PATIENCE + 60)
@pytest.mark.parametrize("name", KILLED)
def test_the_kernel_leaves_what_is_said(ask: Ask, count: Count, name: str) -> None:
    """A real SIGKILL at each stop, byte by byte."""
    found = ask(name, "kernel")
    count(found)
    assert found["cases"] > IMAGES[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bypass", "0 crash points precede it"),
        ("write to the file", "changed by no store of the victim's code"),
        ("change in two commits", "is none of"),
        ("forget the robust list", "the kernel would leave the lock"),
    ],
)
def test_what_is_wrong_is_caught(ask: Ask, name: str, said: str) -> None:
    found = ask(name, "judge")
    assert any(said in one for one in found["failures"]), found["failures"]
