"""Work j: a config directory of real-looking XML files, loaded, and loaded again unchanged; and
lxml alone on the same files.

Each run is a process of its own, forked from one that has seen none of the files.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from lxml import etree

from shmdomains import DefinitionError, DomainDef, DomainList
from shmdomains.config.remembered import NAME as MEMORY

from . import world
from .children import Child

LIMIT = "limit: lxml, read and parse"
MINIMUM = "lxml, parse and extract a minimum"
OURS = "shmdomains"
AGAIN = "shmdomains, load again"

Work = Callable[[], Callable[[], int]]
"""Prepares a run, and returns what is measured: it says how many files it was."""


def make(folder: Path, count: int) -> None:
    """So many files, made from the samples that are valid and of ordinary size."""
    samples = []
    for path in sorted(world.DOCUMENTS.iterdir()):
        if path.suffix == ".xml" and 500 < path.stat().st_size < 7000:
            try:
                samples.append(DomainDef.from_xml(path.read_bytes()))
            except DefinitionError:
                continue
    for number, (key, sample) in enumerate(zip(world.uuids(count), itertools.cycle(samples))):
        name = f"vm{number}"
        text = sample.replace(name=name, uuid=UUID(bytes=key)).to_xml()
        (folder / f"{name}.xml").write_text(text, encoding="utf-8")


def _parser() -> etree.XMLParser:
    return etree.XMLParser(resolve_entities=False, no_network=True)


def _parse(folder: Path) -> int:
    parser, done = _parser(), 0
    for path in folder.iterdir():
        if path.name != MEMORY:
            etree.fromstring(path.read_bytes(), parser)
            done += 1
    return done


def _extract(folder: Path) -> int:
    parser, found = _parser(), []
    for path in folder.iterdir():
        if path.name == MEMORY:
            continue
        root = etree.fromstring(path.read_bytes(), parser)
        found.append(
            (
                root.get("type"),
                root.findtext("name"),
                root.findtext("uuid"),
                root.findtext("memory"),
                root.findtext("vcpu"),
                root.findtext("os/type"),
                [disk.get("type") for disk in root.iterfind("devices/disk")],
                [interface.get("type") for interface in root.iterfind("devices/interface")],
            )
        )
    return len(found)


def _load(folder: Path, workers: int) -> int:
    with DomainList(max_domains=20_000) as doms:
        return len(doms.load_all_configs(folder, workers=workers).loaded)


def _load_again(folder: Path) -> Callable[[], int]:
    doms = DomainList(max_domains=20_000)
    doms.load_all_configs(folder, workers=1)
    return lambda: len(doms.load_all_configs(folder, workers=1).loaded)


def works(folder: Path) -> dict[tuple[str, int], Work]:
    """By contestant and workers."""
    return {
        (LIMIT, 1): lambda: lambda: _parse(folder),
        (MINIMUM, 1): lambda: lambda: _extract(folder),
        (OURS, 1): lambda: lambda: _load(folder, 1),
        (OURS, 2): lambda: lambda: _load(folder, 2),
        (AGAIN, 1): lambda: _load_again(folder),
    }


def measure(work: Work, count: int) -> float:
    """Seconds a file."""

    def timed(_me: Child) -> float:
        run = work()
        begin = time.perf_counter()
        done = run()
        took = time.perf_counter() - begin
        if done != count:
            raise RuntimeError(f"{done} of {count} files were loaded")
        return took / count

    seconds: float = Child(timed).result()
    return seconds
