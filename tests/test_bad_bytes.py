"""Bad bytes: whatever is wrong with a segment's file, an error of ours or a right answer.

Each damage is done to a copy of one segment before anybody attaches; then everything is used, with
short time-outs, and every answer is judged (bad_bytes.py). That happens in a child: its death is a
crash, its silence a hang, and the damage that it named last is to blame. `make soak` takes every
bit of the first pages and of the slots, and thousands of all the rest.

Damage may hide a domain (a bit of an index, or whether a slot is in use): nobody is given a wrong
domain for it, and `DomainList.check`, asked each time, says that the segment is damaged.
"""

from __future__ import annotations

import gc
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bad_bytes
import pytest
from bad_bytes import Damage
from helpers import SOAK
from killing import Child, ChildDied, Nursery, Planted, driver

from shmdomains import DomainList
from shmdomains.memory._core import core

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(900 if SOAK else 120)]

Tried = Callable[[str, int], None]
ENOUGH = 40  # failures after which it is clear


@dataclass
class Specimen:
    """A segment that nobody is attached to, and where its parts lie."""

    path: str
    folder: str
    parts: dict[str, tuple[int, int]]
    hints: int  # where the header's hints begin, which end it
    lives: list[int]  # the slots' words that say whether a domain lives there
    count: int  # how many slots there are
    dirty: list[int]  # words that put off a repair
    choice: int  # which settings count

    @classmethod
    def make(cls, folder: Path, **options: Any) -> Specimen:
        path = str(folder / "list.segment")
        bad_bytes.fill(path, **options)
        gc.collect()
        assert driver() is not None, (
            "no C compiler, so nobody says where the words of a segment lie"
        )
        with Planted(path) as planted:
            at = planted.at
            planted.write(at["attached"], 77 << 22 | 1)  # somebody who is dead
            pid, tid, start = core.caller()
            planted.leave_waiter(0, tid | start << 22, pid, 0)
            slots = planted.watermark(planted.header("slots_committed"))
            blocks = planted.watermark(planted.header("counters_committed"))
            waiters = planted.watermark(planted.header("waiters_committed"))
            cells = planted.watermark(planted.header("heap_committed"))
            sizes = {
                "header": at["attached"],
                "attached": at["settings"] - at["attached"],
                "settings": at["named"] - at["settings"],
                "named": 64 * at["named.size"],
                **{f"table.{index}.0": 8192 for index in range(3)},
                "slots": slots * at["slot.size"],
                "names": slots * at["names.size"],
                "ring": planted.watermark(planted.header("ring_committed")) * at["entry.size"],
                "counters": blocks * at["counters.size"],
                "waiters": waiters * at["waiter.size"],
                "map": -(-cells // 8),
                "heap": cells * 64,
            }
            starts = {**at, "header": 0}
            parts = {part: (starts[part], starts[part] + size) for part, size in sizes.items()}
            hints, choice = planted.header("heap_hint"), planted.header("settings_choice")
            lives = [
                planted.slot(i, "life") for i in range(planted.read(planted.header("live")) + 1)
            ]
            dirty = [planted.header(f"{lock}_dirty") for lock in ("list", "id", "event", "heap")]
            count = planted.header("slot_count")
            return cls(path, str(folder), parts, hints, lives, count, dirty, choice)

    @property
    def size(self) -> int:
        return os.stat(self.path).st_size

    def used(self, part: str) -> list[int]:
        """The bytes of the words of a part that are not zero."""
        start, end = self.parts[part]
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), end - start, start)
        words = (at for at in range(0, len(data), 8) if any(data[at : at + 8]))
        return [start + at + i for at in words for i in range(8)]


@pytest.fixture
def specimen(segment_dir: Path) -> Specimen:
    return Specimen.make(segment_dir)


@pytest.fixture
def nursery(segment_dir: Path) -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def bits(places: Iterable[int]) -> list[Damage]:
    return [(at, bit) for at in places for bit in range(8)]


def some(damages: Sequence[Damage], most: int) -> list[Damage]:
    return random.Random(20081023).sample(damages, min(len(damages), most))


def name(damage: Damage) -> str:
    if isinstance(damage, int):
        return f"cut to {damage} bytes"
    return "no damage" if damage is None else f"bit {damage[1]} of byte {damage[0]}"


def watch(child: Child, damages: list[Damage], failures: list[str], met: Counter[str]) -> int:
    """Follow one child; returns how many damages it is through with."""
    number = 0
    try:
        while True:
            said = child.hear()
            if isinstance(said, int):
                number = said
            elif isinstance(said, list):
                failures.append("\n    ".join([f"{name(damages[number])}:", *said]))
            else:
                counts, mappings = said
                met.update(counts)
                if mappings:
                    failures.append(
                        f"{mappings} copies stayed mapped: a lock of them is still held"
                    )
                return len(damages)
    except ChildDied:
        failures.append(f"{name(damages[number])}: it crashed")
    except AssertionError as exc:
        failures.append(f"{name(damages[number])}: {exc}")
    finally:
        child.close()
    return number + 1


AT_ONCE = 10_000  # what fits into one message
IDLE = 5  # the slot of the domain whose data was written three times


def try_all(
    nursery: Nursery, specimen: Specimen, damages: list[Damage], dirty: Sequence[int] = ()
) -> Counter[str]:
    """Do every damage; fails with a list of those that did harm. Returns the errors met."""
    failures: list[str] = []
    met: Counter[str] = Counter()
    left = damages
    committed = sorted(specimen.parts.values())
    while left and len(failures) < ENOUGH:
        Path(specimen.folder, "damaged").unlink(missing_ok=True)
        now = left[:AT_ONCE]
        child = nursery.start(
            bad_bytes.try_all, specimen.path, specimen.folder, committed, now, dirty
        )
        left = left[watch(child, left, failures, met) :]
    assert not failures, f"{len(failures)} of {len(damages)}:\n" + "\n".join(failures)
    return met


def test_no_damage(nursery: Nursery, specimen: Specimen) -> None:
    """Every call succeeds (a stale handle and an id that is gone are expected), and the judge is
    content: what it says of damage is the damage's doing."""
    assert try_all(nursery, specimen, [None]) == {"DomainNotFound": 1, "DomainRemoved": 1}


@pytest.mark.soak
@pytest.mark.timeout(1200)  # each flip has a deadline of its own
def test_every_bit_of_the_first_pages(nursery: Nursery, specimen: Specimen, tried: Tried) -> None:
    """Without ``SHMDOMAINS_SOAK``: but for hints that are not used, and the rest of the pages."""
    used = {*range(specimen.hints), *specimen.used("header")}
    damages = bits(range(*specimen.parts["header"]) if SOAK else sorted(used))
    met = try_all(nursery, specimen, damages)
    assert {"SegmentCorrupt at attach", "SegmentMismatch at attach", "LockTimeout"} <= set(met)
    tried("bits of the first pages flipped before attaching", len(damages))


PARTS = [
    "attached",
    "table.0.0",
    "table.1.0",
    "table.2.0",
    "slots",
    "names",
    "ring",
    "counters",
    "waiters",
    "map",
    "heap",
]


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", PARTS)
def test_bits_of_what_is_used(
    nursery: Nursery, specimen: Specimen, part: str, tried: Tried
) -> None:
    damages = some(bits(specimen.used(part)), 12_000 if SOAK else 150)
    try_all(nursery, specimen, damages)
    tried("bits of what is used flipped before attaching", len(damages))


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_bits_of_small_data(nursery: Nursery, specimen: Specimen, tried: Tried) -> None:
    """Of both halves of a name buffer that has it, what is not in use included."""
    start, _ = specimen.parts["names"]
    damages = some(
        bits(range(start + 512 * IDLE, start + 512 * (IDLE + 1))), 10_000 if SOAK else 400
    )
    met = try_all(nursery, specimen, damages)
    assert met["SegmentCorrupt"]
    tried("bits of small data flipped before attaching", len(damages))


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_bits_of_named_locks(nursery: Nursery, specimen: Specimen, tried: Tried) -> None:
    """Of places that have a name, and of those that the next names get, what is 0 included."""
    start, _ = specimen.parts["named"]
    damages = some(bits(range(start, start + 5 * 384)), 10_000_000 if SOAK else 400)
    met = try_all(nursery, specimen, damages)
    assert met["SegmentCorrupt"] and met["LockTimeout"]
    tried("bits of named locks flipped before attaching", len(damages))


@pytest.mark.soak
def test_bits_anywhere(nursery: Nursery, specimen: Specimen, tried: Tried) -> None:
    places = [at for start, end in specimen.parts.values() for at in range(start, end)]
    dice = random.Random(1)
    damages: list[Damage] = [
        (dice.choice(places), dice.randrange(8)) for _ in range(10_000 if SOAK else 200)
    ]
    try_all(nursery, specimen, damages)
    tried("bits anywhere flipped before attaching", len(damages))


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_bits_before_a_repair(nursery: Nursery, specimen: Specimen, tried: Tried) -> None:
    """A repair that believed a flipped bit would make it final: a domain whose slot is given to the
    next, or one that is not in the rebuilt index, and nothing would tell of it any more."""
    assert not try_all(nursery, specimen, [None], specimen.dirty)
    first, _ = specimen.parts["slots"]
    locks = {first + 384 * slot + at for slot in range(len(specimen.lives)) for at in range(40)}
    used = [at for part in ("slots", "names") for at in specimen.used(part) if at not in locks]
    damages = [
        *bits(at + i for at in [*specimen.lives, specimen.count] for i in range(8)),
        *some(bits(range(specimen.hints)), 20_000 if SOAK else 150),
        *some(bits(used), 10_000 if SOAK else 150),
    ]
    met = try_all(nursery, specimen, damages, specimen.dirty)
    assert met["SegmentPoisoned"] and met["SegmentCorrupt"]
    tried("bits flipped before a repair", len(damages))


@pytest.mark.soak
def test_bits_of_the_config_directory(
    nursery: Nursery, segment_dir: Path, tmp_path: Path, tried: Tried
) -> None:
    """Which directory is remembered: that one, or an error; never another, and never none."""
    specimen = Specimen.make(segment_dir, config=str(tmp_path))
    places = [*specimen.used("settings"), *range(specimen.choice, specimen.choice + 8)]
    damages = some(bits(places), 5_000 if SOAK else 80)
    met = try_all(nursery, specimen, damages)
    assert met["SegmentCorrupt"]
    tried("bits of the remembered directories flipped before attaching", len(damages))


@pytest.mark.soak
def test_bits_for_a_stranger_to_multiprocessing_locks(
    nursery: Nursery, segment_dir: Path, tried: Tried
) -> None:
    """Who may only read."""
    specimen = Specimen.make(segment_dir, lock="multiprocessing")
    places = [*range(specimen.hints), *specimen.used("slots")]
    damages = some(bits(places), 10_000 if SOAK else 300)
    met = try_all(nursery, specimen, damages)
    assert met["LockKindMismatch"]
    tried("bits of a list of the other kind flipped before attaching", len(damages))


def test_cut_at_every_page(nursery: Nursery, specimen: Specimen, tried: Tried) -> None:
    sizes = {*range(0, specimen.size, 4096), 1, 8, 100, 8191, specimen.size - 1, specimen.size + 1}
    met = try_all(nursery, specimen, sorted(sizes))
    assert set(met) == {"SegmentCorrupt at attach", "SegmentMismatch at attach"}
    assert met.total() == len(sizes)
    tried("sizes to which a segment was cut", len(sizes))


def test_a_list_without_a_name_can_not_be_cut() -> None:
    """With a name, who may write the file may cut it, and is trusted not to: there is no error that
    the others could be given, only SIGBUS."""
    with DomainList() as doms:
        for size in (0, os.fstat(doms._fd).st_size + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(doms._fd, size)
        assert doms.check()
