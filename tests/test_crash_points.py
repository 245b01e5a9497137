"""A worker is killed at every store that an operation makes, and who comes next has all of it or
none; then the recoverer is killed at every store, too.

What is done, and what must hold afterwards, stands in crash_driver.py. It runs in a process of its
own, on a second build of the core that has a hook in front of each store into a segment. That it
can not be built is a failure. ``SHMDOMAINS_SOAK=1`` takes every point of every recovery, and every
point of the large operations, of which there is a selection otherwise.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from crash_driver import OPERATIONS, UNSIGNED
from helpers import SOAK

TESTS = Path(__file__).resolve().parent
PATIENCE = 3600 if SOAK else 60  # seconds for one operation
RECOVERIES = 1547  # deaths in recoveries that are known, all cases together

CASES = [pytest.param(name, "robust", id=name) for name in OPERATIONS] + [
    pytest.param(name, "multiprocessing", id=f"{name}, multiprocessing")
    for name, what in OPERATIONS.items()
    if what.locks is not None
]


def build() -> Path:
    """The folder with the package whose core has crash points, up to date."""
    folder = TESTS.parent / "build" / "crash-points"
    core = f"core{sysconfig.get_config_var('EXT_SUFFIX')}"
    # Of the `make` that runs the tests, if one does, only the compiler and its flags matter.
    mine = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "VENV"}
    done = subprocess.run(
        ["make", f"build/crash-points/shmdomains/_core/{core}", f"py={sys.executable}"],
        cwd=TESTS.parent,
        env={key: value for key, value in os.environ.items() if key not in mine},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"the core with crash points can not be built:\n{done.stdout}"
    return folder


class Driver:
    """A clean process that does an operation, and kills who does it, as it is told to."""

    def __init__(self, package: Path, folder: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, TESTS / "crash_driver.py", folder],
            env={**os.environ, "PYTHONPATH": str(package)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=[self._process.stdout], daemon=True).start()

    def _read(self, answers: IO[str]) -> None:
        for line in answers:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, name: str, lock: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps([name, lock, SOAK]), file=self._process.stdin, flush=True)
        answer = self._answers.get(timeout=PATIENCE)
        assert answer, "the driver died"
        found: dict[str, Any] = json.loads(answer)
        return found

    def end(self) -> None:
        """With all that it started, if it does not end by itself."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()


@pytest.fixture(scope="module")
def package() -> Path:
    return build()


@pytest.fixture(scope="module")
def driver(package: Path) -> Iterator[Driver]:
    folder = tempfile.mkdtemp(prefix=f"shmdomains-test-{os.getpid()}-", dir="/dev/shm")
    driver = Driver(package, folder)
    yield driver
    driver.end()
    shutil.rmtree(folder)


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
    found = driver.ask(name, lock)
    assert found["failures"] == [], "\n".join(found["failures"])
    points = found["points"]
    print(f"{name}, {lock}: {points} points, {found['recoveries']} of recoveries")
    assert points >= what.points, f"{what.points} points are known, {points} were found"
    assert points == 0 or what.points, "what only reads has begun to store"
    assert found["cases"] == points or (what.large and not SOAK)
    # What is not covered is no wider than it is said to be.
    assert found["unsigned"] == (UNSIGNED * (what.locks or 0) if lock != "robust" else 0)
    covered["operations"] += 1
    covered["cases"] += found["cases"]
    covered["recoveries"] += found["recoveries"]


def test_how_many_points(covered: dict[str, int], tried: Callable[[str, int], None]) -> None:
    if covered["operations"] == len(CASES):
        assert covered["recoveries"] >= RECOVERIES
    tried("kills at a store of an operation", covered["cases"])
    tried("kills at a store of its recovery", covered["recoveries"])
