"""A rule that changes a record and its files finishes or vanishes, wherever its process is killed.

steps_driver.py has the deaths and the storms. Here is also what happens when a step cannot be
settled, and what a user intends (`Domain.intend`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import SOAK
from killing import Child
from steps_driver import RULES, prove, prove_settling, storm, watch

Tried = Callable[[str, int], None]
PATIENCE = 300.0

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.soak
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
@pytest.mark.parametrize("rule", RULES)
def test_killed_at_each_call(
    start: Callable[..., Child], segment_dir: Path, rule: str, lock: str, tried: Tried
) -> None:
    deaths = start(prove, segment_dir / "vm", rule, lock, SOAK).hear(PATIENCE)
    assert deaths > 20
    tried(f"deaths in '{rule}'", deaths)


@pytest.mark.soak
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize(
    "rule", ["define", "redefine elsewhere", "undefine", "rename with autostart"]
)
def test_killed_while_settling(
    start: Callable[..., Child], segment_dir: Path, rule: str, tried: Tried
) -> None:
    deaths = start(prove_settling, segment_dir / "vm", rule, 1 if SOAK else 17).hear(PATIENCE)
    assert deaths > 50
    tried("deaths of those who settle", deaths)


@pytest.mark.soak
@pytest.mark.timeout(PATIENCE)
def test_storms_end_with_the_files_that_the_records_say(
    start: Callable[..., Child], segment_dir: Path, tried: Tried
) -> None:
    storms = range(200 if SOAK else 25)
    killed = start(storm, segment_dir / "vm", storms).hear(PATIENCE)
    assert killed > 2 * len(storms)
    tried("storms of rules that change files", len(storms))
    tried("workers killed in them", killed)


@pytest.mark.timeout(PATIENCE)
def test_nobody_sees_a_persistent_domain_without_its_file(
    start: Callable[..., Child], segment_dir: Path, tried: Tried
) -> None:
    rounds = 100 if SOAK else 20
    seen = start(watch, segment_dir / "vm", rounds).hear(PATIENCE)
    assert seen > 100
    tried("looks at a persistent domain and its file", seen)
