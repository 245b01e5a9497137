"""What is to be reached, as ratios within one run, and what was.

A figure that a run did not take leaves its target open; a target that is missed is worth a profile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich.table import Table

from . import loading, starting, world
from .results import Results

OURS, DICT, HAND, LMDB = "shmdomains", "dict + threading.Lock", "shared_memory by hand", "LMDB"
TIE = 1.5  # what differs by less is not different on a machine that is shared
SHARED_PEERS = (HAND, LMDB, "SQLite", "UltraDict", "diskcache", "multiprocessing.Manager", "Redis")


class Target(NamedTuple):
    work: str  # the letter of the work
    what: str
    wanted: str
    reached: str
    met: bool | None


def at_least(work: str, what: str, factor: float, reached: float | None) -> Target:
    wanted = f"≥ {factor:g}x"
    if reached is None:
        return Target(work, what, wanted, "not measured", None)
    return Target(work, what, wanted, f"{reached:.2f}x", reached >= factor)


def _no_slower(work: str, what: str, reached: float | None) -> Target:
    target = at_least(work, what, 1, reached)
    met = None if reached is None else reached >= 1 / TIE
    return target._replace(wanted=f"≥ 1x, tie from {1 / TIE:.2f}x", met=met)


def at_most(
    work: str, what: str, limit: float, reached: float | None, scale: float = 1, unit: str = ""
) -> Target:
    wanted = f"≤ {limit * scale:g} {unit}".rstrip()
    if reached is None:
        return Target(work, what, wanted, "not measured", None)
    says = f"{reached * scale:.3g} {unit}".rstrip()
    return Target(work, what, wanted, says, reached <= limit)


def ratio(upper: float | None, lower: float | None) -> float | None:
    return None if upper is None or not lower else upper / lower


def _faster(results: Results, work: str, theirs: str, peer: str, domains: int) -> float | None:
    return ratio(results.get(theirs, peer, domains), results.get(work, OURS, domains))


HOT = (
    ("a", "get, state", "read_state", "read_state", "read_state"),
    ("a", "patch's form", "read_state_patch", "read_state", "read_state_patch"),
    ("c", "change state", "change_state", "change_state", "change_state"),
    ("k", "find by id", "by_id", "by_id", "by_id"),
    ("k", "miss", "miss", "miss", "miss"),
)
WANTED = {1_000: (5, 8), 100_000: (3, 7)}  # times LMDB, times by hand


def _hot(results: Results) -> Iterator[Target]:
    for domains, (lmdb, hand) in WANTED.items():
        for letter, title, ours, theirs, in_process in HOT:
            for peer, factor in ((LMDB, lmdb), (HAND, hand)):
                reached = _faster(results, ours, theirs, peer, domains)
                yield at_least(letter, f"{title}, {domains:,}: {peer}", factor, reached)
            reached = _faster(results, ours, in_process, DICT, domains)
            yield _no_slower(letter, f"{title}, {domains:,}: {DICT}", reached)


def _definitions(results: Results) -> Iterator[Target]:
    for domains in WANTED:
        for letter, title, work, peer, factor in (
            ("b", "definition, unchanged", "read_definition", LMDB, 5),
            ("b", "definition, changed", "read_changed", LMDB, 1.5),
            ("d", "replace the definition", "replace", LMDB, 2),
            ("e", "define", "define", LMDB, 3),
            ("e", "define", "define", HAND, 3),
            ("e", "remove", "remove", LMDB, 3),
            ("e", "remove", "remove", HAND, 3),
        ):
            reached = _faster(results, work, work, peer, domains)
            yield at_least(letter, f"{title}, {domains:,}: {peer}", factor, reached)


def _data(results: Results, domains: int) -> Iterator[Target]:
    for title, work, peer, factor in (
        ("read the data", "read_data", LMDB, 3),
        ("increment in the data", "increment", LMDB, 2.5),
        ("increment in the data", "increment", HAND, 2),
        ("read data of 2 KB", "read_data_large", LMDB, 1.5),
        ("change data of 2 KB", "change_data_large", LMDB, 1.5),
    ):
        reached = _faster(results, work, work, peer, domains)
        yield at_least("o", f"{title}, {domains:,}: {peer}", factor, reached)


def _best_peer(results: Results, domains: int, workers: int) -> float | None:
    rates = [results.get("count random", peer, domains, workers) for peer in SHARED_PEERS]
    return max((rate for rate in rates if rate is not None), default=None)


def _contention(results: Results, domains: int) -> Iterator[Target]:
    beside = results.get("count random, of own", OURS, domains, 2)
    yield at_least("f", "2 workers, random: each on its own list", 0.9, beside)
    for workers, factor in ((2, 8), (4, 5)):
        ours = results.get("count random", OURS, domains, workers)
        best = _best_peer(results, domains, workers)
        what = f"{workers} workers, random: the best peer"
        yield at_least("f", what, factor, ratio(ours, best))
    four = results.get("count one", OURS, domains, 4)
    single = results.get("count one", OURS, domains, 1)
    yield at_least("f", "4 workers on one: uncontended", 0.5, ratio(four, single))
    least = results.get("count one: least share", OURS, domains, 4)
    yield at_least("f", "4 workers on one: the unluckiest, of the mean", 0.5, least)
    longest = results.get("count one: longest", OURS, domains, 4)
    says = "not measured" if longest is None else f"{longest * 1e3:.2f} ms"
    yield Target("f", "4 workers on one: the longest wait", "reported", says, None)


def _flat(results: Results, largest: int) -> Iterator[Target]:
    for letter, title, work, *_ in HOT:
        reached = ratio(results.get(work, OURS, largest), results.get(work, OURS, 1_000))
        what = f"{title}: {largest:,} against 1,000 domains"
        yield at_most(letter, what, 5, reached, unit="x")
    created = results.get("create", OURS, largest)
    yield at_most("i", f"create a list for {largest:,}", 0.05, created, 1e3, "ms")
    attached = results.get("attach", OURS, largest)
    yield at_most("i", f"attach and first read, {largest:,}", 0.001, attached, 1e3, "ms")
    forked, before = (results.get("fork", OURS, n) for n in (largest, 1_000))
    grown = ratio(forked, before)
    yield at_most("i", f"fork: {largest:,} against 1,000 domains", 1.5, grown, unit="x")


def _room(results: Results, largest: int) -> Iterator[Target]:
    blob = len(world.template().replace(name="vm100000").encode())
    total = results.get("bytes per domain", OURS, largest)
    besides = None if total is None else total - blob
    yield at_most("i", f"bytes a domain besides its blobs, {largest:,}", 1024, besides, unit="B")
    many, few = (results.get("private", OURS, n) for n in (largest, 1_000))
    private = None if many is None or few is None else (many - few) / (largest - 1_000)
    yield at_most("i", "private bytes a domain in a process", 1, private, unit="B")


def _rest(results: Results, domains: int) -> Iterator[Target]:
    listed = results.get("rows", OURS, 100_000)
    yield at_most("g", "list 100,000", 0.05, listed, 1e3, "ms")
    for peer in (DICT, LMDB):
        reached = _faster(results, "rows", "rows", peer, 100_000)
        yield _no_slower("g", f"list 100,000: {peer}", reached)
    kept = results.get("kept while listed", OURS, 100_000)
    yield at_least("g", "a writer's rate while all is listed", 0.9, kept)
    for way, limit in (("waiting", 0.0005), ("later", 0.0001)):
        taken = results.get(f"killed, {way}", OURS, domains)
        taken = None if taken is None or taken < 0 else taken
        yield at_most("h", f"killed holder, {way}", limit, taken, 1e6, "µs")
    blocked = results.get("blocks others", OURS, domains)
    says = "not measured" if blocked is None else "blocked" if blocked else "not blocked"
    met = None if blocked is None else not blocked
    yield Target("h", "other domains while one is held", "not blocked", says, met)
    slower = results.get("slower while written", OURS, domains)
    yield at_most("l", "peek while that record is written", 1.3, slower, unit="x")


def _loading(results: Results) -> Iterator[Target]:
    files = next((figure.domains for figure in results.figures if figure.work == "load"), 0)
    alone = results.get("load", loading.LIMIT, files)
    one, two = (results.get("load", OURS, files, workers) for workers in (1, 2))
    yield at_most("j", f"load {files:,} files: lxml alone", 2.5, ratio(one, alone), unit="x")
    again = results.get("load", loading.AGAIN, files)
    yield at_most("j", "load them again, unchanged", 5e-6, again, 1e6, "µs a file")
    start = 0.1 / files if files else 0
    aside = None if two is None or two <= start else two - start
    yield at_least("j", "2 workers, their start aside: one", 1.7, ratio(one, aside))


def _starting(results: Results) -> Iterator[Target]:
    bare, imported, listed = (
        results.get("start", name, 0) for name in (starting.BARE, starting.IMPORT, starting.LIST)
    )
    beyond = None if imported is None or bare is None else imported - bare
    yield at_most("m", "import shmdomains, beyond bare Python", 0.06, beyond, 1e3, "ms")
    yield at_most("m", "shmdomains list", 0.12, listed, 1e3, "ms")


def _waking(results: Results) -> Iterator[Target]:
    for waiters in (1, 1_000):
        for what, work, limit in (("median", "wake", 0.0002), ("p99", "wake: p99", 0.001)):
            reached = results.get(work, OURS, 1, waiters)
            yield at_most("n", f"{waiters:,} waiting, {what}", limit, reached, 1e3, "ms")


def evaluate(results: Results) -> list[Target]:
    sizes = sorted({figure.domains for figure in results.figures if figure.work == "read_state"})
    first, largest = (sizes[0], sizes[-1]) if sizes else (1_000, 1_000_000)
    if largest == first:
        largest = 1_000_000
    return [
        *_hot(results),
        *_definitions(results),
        *_data(results, first),
        *_contention(results, first),
        *_flat(results, largest),
        *_rest(results, first),
        *_room(results, largest),
        *_loading(results),
        *_starting(results),
        *_waking(results),
    ]


def table(results: Results) -> Table:
    return drawn(evaluate(results))


def drawn(evaluated: Iterable[Target]) -> Table:
    made = Table("", "work: beside what", "wanted", "reached", "", title="targets")
    for target in evaluated:
        mark = {True: "[green]met[/]", False: "[red]not met[/]", None: "open"}[target.met]
        made.add_row(target.work, target.what, target.wanted, target.reached, mark)
    return made
