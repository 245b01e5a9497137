"""The test build of the core, with a hook in front of each store, and the programs that run on it.

That it cannot be built is a failure. `driving` starts crash_driver.py or trace_driver.py as a
clean process that has this build first on its path, and ends it with all that it started.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

TESTS = Path(__file__).resolve().parent


def build() -> Path:
    """The folder with the package whose core has crash points, up to date."""
    folder = TESTS.parent / "build" / "crash-points"
    core = f"core{sysconfig.get_config_var('EXT_SUFFIX')}"
    # Of the `make` that runs the tests, if one does, only the compiler and its flags matter.
    mine = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "VENV"}
    done = subprocess.run(
        ["make", f"build/crash-points/shmdomains/memory/_core/{core}", f"py={sys.executable}"],
        cwd=TESTS.parent,
        env={key: value for key, value in os.environ.items() if key not in mine},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"the core with crash points cannot be built:\n{done.stdout}"
    return folder


class Driver:
    """A clean process that does an operation, and kills who does it, as it is told to."""

    def __init__(self, program: str, package: Path, folder: str, patience: float) -> None:
        self._patience = patience
        self._process = subprocess.Popen(
            [sys.executable, TESTS / program, folder],
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

    def ask(self, name: str, lock: str, how: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps([name, lock, how]), file=self._process.stdin, flush=True)
        answer = self._answers.get(timeout=self._patience)
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


@contextmanager
def driving(program: str, patience: float) -> Iterator[Driver]:
    """A driver, and a folder on tmpfs for it; an answer may take it `patience` seconds."""
    package = build()
    folder = tempfile.mkdtemp(prefix=f"shmdomains-test-{os.getpid()}-", dir="/dev/shm")
    driver = Driver(program, package, folder, patience)
    try:
        yield driver
    finally:
        driver.end()
        shutil.rmtree(folder)
