"""What nobody can be faster than: steps in C that every contestant takes, in the same run."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.c")
NAMES = {
    "lock": "limit: robust lock and unlock, in C",
    "hand-over": "limit: hand-over to a sleeping process, in C",
    "memcpy": "limit: copy of a definition, in C",
}


class Limits:
    """The compiled program. Raises `FileNotFoundError` where there is no compiler."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="shmdomains-bench-")
        self._program = f"{self._folder.name}/limits"
        compiler = os.environ.get("CC", "cc")
        options = ["-std=c11", "-O2", "-pthread", "-o", self._program]
        subprocess.run([compiler, *options, str(SOURCE)], check=True)

    def measure(self, rounds: int) -> dict[str, float]:
        """Seconds by the names of `NAMES`."""
        done = subprocess.run(
            [self._program, str(rounds)], capture_output=True, text=True, check=True, timeout=300
        )
        pairs = (line.split() for line in done.stdout.splitlines())
        return {name: float(nanoseconds) / 1e9 for name, nanoseconds in pairs}

    def close(self) -> None:
        self._folder.cleanup()
