"""Work m: how long it takes until there is something to work with: the import, and a command.

Each run is a Python of its own, beside one that does nothing. What a run compiles is kept for the
next, as after an installation; so the first one of each is not counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shmdomains import DomainList

from . import world
from .contestants.base import memory_folder

BARE = "bare Python"
IMPORT = "import shmdomains"
LIST = "shmdomains list"

_CODE = {
    BARE: "pass",
    IMPORT: "import shmdomains",
    LIST: "import sys; from shmdomains.cli import main; sys.argv = ['shmdomains', 'list']; main()",
}
_DOMAINS = 100


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each run; the programs take turns."""
    taken: dict[str, list[float]] = {name: [] for name in _CODE}
    with _segment() as environment:
        for number in range(rounds + 1):
            for name, code in _CODE.items():
                seconds = _run(code, environment)
                if number:
                    taken[name].append(seconds)
    return taken


@contextmanager
def _segment() -> Iterator[dict[str, str]]:
    """An environment in which the default segment is one of ours, with active domains."""
    with tempfile.TemporaryDirectory(dir=memory_folder()) as place:
        file = Path(place) / "default.segment"
        with DomainList.create(path=file, max_domains=_DOMAINS) as doms:
            for number in range(_DOMAINS):
                info = doms.define(world.template().replace(name=f"vm{number}", uuid=None))
                with doms.get(uuid=info.uuid) as dom:
                    dom.activate()
        environment = {**os.environ, "SHMDOMAINS_DIR": place}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        yield environment
    Path(place).parent.rmdir()


def _run(code: str, environment: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - began
