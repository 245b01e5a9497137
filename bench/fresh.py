"""A process that has nothing in common with a list but its file: what does attaching cost it?

``python -m bench.fresh FILE UUID…`` prints seconds to attach and read the first of these domains,
seconds to fork, and the bytes of its own that reading all of them took.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from shmdomains import DomainList


class Room(NamedTuple):
    attach: float
    fork: float
    private: float


def private_bytes() -> int:
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith("Private_"))


def fork_seconds() -> float:
    forks = []
    for _ in range(9):
        begin = time.perf_counter()
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        forks.append(time.perf_counter() - begin)
    return statistics.median(forks)


def look(path: str, uuids: list[bytes]) -> Room:
    """In a new process."""
    command = [sys.executable, "-m", "bench.fresh", path, *(uuid.hex() for uuid in uuids)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return Room(*map(float, done.stdout.split()))


def _main(path: str, *texts: str) -> None:
    uuids = [bytes.fromhex(text) for text in texts]
    before = private_bytes()
    begin = time.perf_counter()
    doms = DomainList.attach(path=path)
    with doms.get(uuid=uuids[0]) as dom:
        _ = dom.state
    took = time.perf_counter() - begin
    for uuid in uuids:
        with doms.get(uuid=uuid) as dom:
            _ = dom.state
    print(took, fork_seconds(), private_bytes() - before)
    doms.close()


if __name__ == "__main__":
    _main(*sys.argv[1:])
