"""The README's pictures of `shmdomains top` and of a trace, made anew of a list in use.

``python -m bench.pictures [FOLDER]``. Three workers lock domains, hold some for a while, and have
jobs; a domain's guest is a process that computes now and then.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shmdomains import DomainList, Job, ShmDomainsError
from shmdomains.look.picture import Looker
from shmdomains.look.screen import Top
from shmdomains.look.trace import Tracer

from .plot import COLOURS, STYLE

NAMES = (*(f"web{number}" for number in range(1, 9)), "db1", "db2", "mail", "build")
XML = (
    "<domain type='kvm'><name>{}</name><memory unit='GiB'>2</memory>"
    "<os><type>hvm</type></os></domain>"
)
SIZE = (120, 32)
LOOKS = 4
SECONDS = 0.25


def guest(load: float) -> None:
    """A guest: it computes for some of its time."""
    while True:
        end = time.monotonic() + load / 50
        while time.monotonic() < end:
            pass
        time.sleep((1 - load) / 50)


def work(doms: DomainList, seed: int) -> None:
    chance = random.Random(seed)
    while True:
        name = chance.choice(NAMES)
        with suppress(ShmDomainsError):
            if chance.random() < 0.1:
                with doms.job(name, "backup", Job.ASYNC, timeout=1) as job:
                    for percent in range(0, 101, 20):
                        job.progress({"percent": percent})
                        time.sleep(0.02)
            else:
                with doms.get(name, timeout=5, why="snapshot") as dom:
                    dom.data = (dom.data or 0) + 1
                    time.sleep(chance.choice((0.0005, 0.002, 0.01)))


@contextmanager
def in_use() -> Iterator[DomainList]:
    """A list with workers at work and guests that run."""
    fork = multiprocessing.get_context("fork")
    with DomainList(max_domains=64) as doms:
        guests = [fork.Process(target=guest, args=(0.02 * one,), daemon=True) for one in range(9)]
        workers = [fork.Process(target=work, args=(doms, seed), daemon=True) for seed in range(3)]
        for process in guests:
            process.start()
        for number, name in enumerate(NAMES):
            doms.define(XML.format(name))
            if number < len(guests):
                with doms.get(name) as dom:
                    dom.activate(pid=guests[number].pid)
        for process in workers:
            process.start()
        try:
            yield doms
        finally:
            for process in (*workers, *guests):
                process.kill()
                process.join()


async def top(doms: DomainList, place: Path) -> None:
    app = Top(Looker(doms, "agent"), interval=1000)
    async with app.run_test(size=SIZE) as pilot:
        for _ in range(LOOKS):
            await pilot.pause(0.5)
            app.look()
        await pilot.pause(0.5)
        place.write_text(app.export_screenshot(title="shmdomains top"))


def trace(doms: DomainList, place: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    tracer = Tracer(doms)
    tracer.run(SECONDS)
    spans = [event for event in tracer.events() if event["ph"] == "X"]
    lanes = sorted({(span["pid"], span["cat"] == "job") for span in spans})
    workers = {pid: number for number, pid in enumerate(sorted({pid for pid, _ in lanes}), 1)}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 0.5 * len(lanes) + 1))
        for span in spans:
            _draw(axes, span, lanes.index((span["pid"], span["cat"] == "job")))
        labels = [f"worker {workers[pid]}, {'jobs' if job else 'locks'}" for pid, job in lanes]
        axes.set_yticks(range(len(lanes)), labels)
        axes.set_xlim(0, SECONDS * 1000)
        axes.set_xlabel("ms")
        figure.tight_layout()
        figure.savefig(place, transparent=True, metadata={"Date": None})


def _draw(axes: Any, span: dict[str, Any], lane: int) -> None:
    begin, length = span["ts"] / 1000, max(span["dur"] / 1000, 0.5)
    name = span["name"].rpartition(" ")[2]
    colour = COLOURS[(*NAMES, name).index(name) % len(COLOURS)]
    axes.broken_barh([(begin, length)], (lane - 0.4, 0.8), facecolor=colour, alpha=0.8)
    if length > SECONDS * 1000 / 25:
        middle = (max(begin, 0) + begin + length) / 2
        axes.text(middle, lane, name, ha="center", va="center", fontsize=7, clip_on=True)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results")
    with in_use() as doms:
        time.sleep(0.5)
        trace(doms, folder / "trace.svg")
        asyncio.run(top(doms, folder / "top.svg"))


if __name__ == "__main__":
    main()
