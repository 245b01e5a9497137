"""What nobody can be faster than: steps that every contestant takes, in the same run.

Those of the machine are timed in C (limits.c). Those of the interpreter are the statements of a
find on objects that do nothing (bare.c): a call with a keyword, a ``with`` block, an attribute.
"""

from __future__ import annotations

import gc
import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import world

HERE = Path(__file__).parent
NAMES = {
    "statements": "limit: the statements of a find, on what does nothing",
    "lock": "limit: robust lock and unlock, in C",
    "line": "limit: a cache line to another process, in C",
    "hand-over": "limit: hand-over to a sleeping process, in C",
    "memcpy": "limit: copy of a definition, in C",
}


class Limits:
    """The compiled programs. Raises `FileNotFoundError` where there is no compiler, and
    `CalledProcessError` where Python's headers are missing."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="shmdomains-bench-")
        self._program = f"{self._folder.name}/limits"
        self._compile("limits.c", "-std=c11", "-pthread", "-o", self._program)
        library = f"{self._folder.name}/bare.so"
        include = f"-I{sysconfig.get_path('include')}"
        self._compile("bare.c", "-std=c11", "-shared", "-fPIC", include, "-o", library)
        loader = importlib.machinery.ExtensionFileLoader("bare", library)
        spec = importlib.util.spec_from_loader("bare", loader)
        assert spec is not None
        module: Any = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        self._bare = module.Bare()
        self._keys = world.uuids(1_000)

    @staticmethod
    def _compile(source: str, *options: str) -> None:
        compiler = os.environ.get("CC", "cc")
        command = [compiler, "-O2", *options, str(HERE / source)]
        subprocess.run(command, check=True, capture_output=True)

    def measure(self, rounds: int) -> dict[str, float]:
        """Seconds by the names of `NAMES`."""
        done = subprocess.run(
            [self._program, str(rounds)], capture_output=True, text=True, check=True, timeout=300
        )
        pairs = (line.split() for line in done.stdout.splitlines())
        taken = {name: float(nanoseconds) / 1e9 for name, nanoseconds in pairs}
        taken["statements"] = self._statements(max(rounds // 5_000, 1))
        return taken

    def _statements(self, passes: int) -> float:
        keys = [world.fresh(key) for key in self._keys]
        gc.collect()
        gc.disable()
        began = time.perf_counter()
        for _ in range(passes):
            _find(self._bare, keys)
        took = time.perf_counter() - began
        gc.enable()
        return took / (passes * len(keys))

    def close(self) -> None:
        self._folder.cleanup()


def _find(doms: Any, uuids: Sequence[bytes]) -> Any:
    get = doms.get
    for uuid in uuids:
        with get(uuid=uuid) as dom:
            state = dom.state
    return state
