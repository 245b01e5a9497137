"""What was measured, as it is kept: one JSON file of plain figures, in seconds, bytes and counts.

Nothing in it says where or on whose machine it was taken, only on what kind of one.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec


class Figure(msgspec.Struct, frozen=True, omit_defaults=True):
    """The median of several runs of a work, with the lowest and highest of them."""

    work: str
    contestant: str
    domains: int
    median: float
    low: float
    high: float
    cpu: float | None = None  # seconds of the measured process's CPU time
    workers: int = 1


class Results(msgspec.Struct):
    made: str
    machine: dict[str, Any]
    versions: dict[str, str]
    skipped: dict[str, str] = {}
    failed: list[str] = []
    figures: list[Figure] = []

    def add(
        self,
        work: str,
        contestant: str,
        domains: int,
        values: Iterable[float],
        cpu: Iterable[float] | None = None,
        workers: int = 1,
    ) -> None:
        every = sorted(values)
        self.figures.append(
            Figure(
                work,
                contestant,
                domains,
                statistics.median(every),
                every[0],
                every[-1],
                None if cpu is None else statistics.median(cpu),
                workers,
            )
        )

    def get(self, work: str, contestant: str, domains: int, workers: int = 1) -> float | None:
        """The median, or ``None`` if that was not measured."""
        for figure in self.figures:
            asked = (work, contestant, domains, workers)
            if (figure.work, figure.contestant, figure.domains, figure.workers) == asked:
                return figure.median
        return None

    def save(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        return msgspec.json.decode(path.read_bytes(), type=cls)


def begin(versions: dict[str, str]) -> Results:
    """No figures yet, made here and today."""
    compiler = os.environ.get("CC", "cc")
    found = shutil.which(compiler)
    says = (
        subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        if found
        else "no compiler"
    )
    with open("/proc/cpuinfo") as file:
        model = re.search(r"^model name\s*: (.*)$", file.read(), re.MULTILINE)
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Results(
        made=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        machine={
            "architecture": platform.machine(),
            "processor": model[1] if model else "unknown",
            "cores": len(os.sched_getaffinity(0)),
            "memory_GiB": round(pages * size / 2**30),
            "kernel": platform.release().split("-")[0],
            "libc": "-".join(platform.libc_ver()),
            "python": sys.version.split()[0],
            "compiler": says.splitlines()[0] if says else "unknown",
        },
        versions=versions,
    )
