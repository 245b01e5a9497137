"""`DomainList.check` finds damage of every invariant, and names it; and the core's own unit tests.

Each kind of damage is planted alone into a sound segment through its file, found under its name by
this process and by one that attaches later, and gone from the report once it is mended. The parts
of the core that have edge cases of their own - index, heap, lock-free reading - run against
reference models in a small C program, under the sanitizers where they are installed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest
from killing import Planted, driver, xml

from shmdomains import INVARIANTS, DomainList, SegmentCorrupt

UUID, NAME, ID = 0, 1, 2
DEFINITION, NEXT, DATA = 0, 1, 2


@pytest.fixture
def doms(path: str) -> Iterator[DomainList]:
    """Six domains, of which one is gone again, two are active and three have data."""
    with DomainList.create(path=path, max_domains=1000) as doms:
        for i in range(6):
            doms.define(xml(f"d{i}"))
        for i in (1, 3):
            with doms.get(name=f"d{i}") as dom:
                dom.activate()
                dom.data = f"data of d{i}" * 20
        with doms.get(name="d2") as dom:
            dom.data = 2
        doms.undefine(name="d4")
        yield doms


Damage = tuple[int, int]  # where, and the value of the word there
Plant = Callable[[Planted], Damage]


def word(place: Callable[[Planted], int], change: Callable[[int], int]) -> Plant:
    def plant(at: Planted) -> Damage:
        where = place(at)
        return where, change(at.read(where)) & (1 << 64) - 1

    return plant


def header(field: str, change: Callable[[int], int], offset: int = 0) -> Plant:
    return word(lambda at: at.header(field) + offset, change)


def slot(number: int, field: str, change: Callable[[int], int], offset: int = 0) -> Plant:
    return word(lambda at: at.slot(number, field) + offset, change)


def entry(index: int, number: int, change: Callable[[int], int]) -> Plant:
    return word(lambda at: at.entry(index, number), change)


def field(number: int, name: str, change: Callable[[int], int], offset: int = 0) -> Plant:
    return word(lambda at: at.copy(number, name) + offset, change)


def extent(number: int, blob: int, change: Callable[[int], int]) -> Plant:
    return word(lambda at: at.extent(number, blob), change)


def twice(at: Planted) -> Damage:
    """The data of d1 named by a second descriptor, one of d5 that does not count."""
    return at.slot(5, "extent") + 8 * 2 * DATA, at.read(at.extent(1, DATA))


def overlapping(at: Planted) -> Damage:
    """The definition of d0 reaches into what comes behind it."""
    where = at.extent(0, DEFINITION)
    return where, at.read(where) + 64


def map_bit_of(at: Planted, number: int) -> Damage:
    cell = at.read(at.extent(number, DEFINITION)) >> 25
    where = at.at["map"] + cell // 64 * 8
    return where, at.read(where) ^ 1 << cell % 64


def stray_entry(at: Planted) -> Damage:
    """A second entry of d0, in an empty place of the index of names."""
    table = at.at["table.1.0"]
    empty = next(where for where in range(table, table + 8192, 8) if not at.read(where))
    return empty, at.read(at.entry(NAME, 0))


FREE_SLOT = 4
DAMAGE: dict[str, tuple[Plant, str, str]] = {
    # I1: identity
    "a name of no bytes": (
        word(lambda at: at.name(0, 1), lambda old: old & ~0xFF),
        "I1 identity",
        "slot 0 has a name of 0 bytes",
    ),
    "a name of too many bytes": (
        word(lambda at: at.name(0, 1), lambda old: old | 0xFF),
        "I1 identity",
        "slot 0 has a name of",
    ),
    "another uuid": (slot(0, "uuid", lambda old: old ^ 1), "I5 index", "UUID index"),
    "another name": (
        word(lambda at: at.name(0, 1), lambda old: old ^ 1 << 16),
        "I5 index",
        "name index",
    ),
    "the uuid of another": (
        lambda at: (at.slot(0, "uuid"), at.read(at.slot(1, "uuid"))),
        "I5 index",
        "UUID index",
    ),
    "a dead domain comes back": (
        slot(FREE_SLOT, "life", lambda old: old | 1),
        "I5 index",
        "does not lead to slot 4",
    ),
    "a domain is gone": (slot(0, "life", lambda old: old + 1), "I5 index", "UUID index has 5"),
    # I2: extents and the map
    "an extent named twice": (twice, "I2 extents", "named twice"),
    "an extent that overlaps": (overlapping, "I2 extents", "named twice"),
    "an extent outside of the heap": (
        extent(1, DATA, lambda old: old | 1 << 62),
        "I2 extents",
        "slot 1 names cells outside",
    ),
    "an extent of no bytes": (
        extent(1, DATA, lambda old: old & ~0x1FFFFFF),
        "I2 extents",
        "slot 1 names cells outside",
    ),
    "data that has no extent": (
        extent(1, DATA, lambda old: 0),
        "I2 extents",
        "slot 1: blob 2 counts and has no",
    ),
    "a map bit cleared": (lambda at: map_bit_of(at, 1), "I2 map", "1 cells are in use and not"),
    "a map bit set": (
        word(lambda at: at.at["map"], lambda old: old | 1 << 63),
        "I2 map",
        "1 cells are marked and nobody's",
    ),
    "the count of used cells": (
        header("heap_used", lambda old: old + 1),
        "I2 map",
        "count of used cells",
    ),
    "the heap's watermark": (header("heap_committed", lambda old: 1 << 40), "heap", "watermark"),
    # I3: fields
    "a blob newer than its record": (
        field(1, "version", lambda old: old + 1000, 8 * DATA),
        "I3 fields",
        "blob 2 is newer",
    ),
    "no definition": (
        field(0, "status", lambda old: old & ~(1 << 48)),
        "I3 fields",
        "slot 0 has no definition",
    ),
    "a state that does not exist": (
        field(1, "status", lambda old: old & ~0xFFFF | 8),
        "I3 fields",
        "slot 1 has the unknown state 8",
    ),
    "the other copy counts": (slot(1, "cur", lambda old: old + 1), "", ""),
    # I4: ids
    "an id that was not given out": (
        field(1, "ids", lambda old: old + 1000),
        "I4 ids",
        "slot 1 has id 1001",
    ),
    "the next id goes back": (header("next_id", lambda old: 1), "I4 ids", "not given out"),
    "an id that nobody leads to": (
        field(0, "ids", lambda old: old & ~0xFFFFFFFF),
        "I5 index",
        "id index does not lead to slot 0",
    ),
    "the id of another": (
        lambda at: (at.copy(3, "ids"), at.read(at.copy(1, "ids"))),
        "I5 index",
        "id index",
    ),
    "an active domain says that it is not": (
        field(1, "ids", lambda old: old | 0xFFFFFFFF),
        "I5 index",
        "id index has 2 entries for 1",
    ),
    # I5: indexes and sequences
    "the UUID index without an entry": (
        entry(UUID, 0, lambda old: 0),
        "I5 index",
        "UUID index does not lead to slot 0",
    ),
    "the name index without an entry": (
        entry(NAME, 3, lambda old: 0),
        "I5 index",
        "name index does not lead to slot 3",
    ),
    "the id index without an entry": (
        entry(ID, 1, lambda old: 0),
        "I5 index",
        "id index does not lead to slot 1",
    ),
    "the UUID index leads to another slot": (
        entry(UUID, 0, lambda old: old + 1),
        "I5 index",
        "UUID index does not lead to slot 0",
    ),
    "the name index leads to another slot": (
        entry(NAME, 0, lambda old: old + 1),
        "I5 index",
        "name index does not lead to slot 0",
    ),
    "the id index leads to another slot": (
        entry(ID, 1, lambda old: old + 1),
        "I5 index",
        "id index does not lead to slot 1",
    ),
    "the index leads behind the last slot": (
        entry(NAME, 0, lambda old: old | 0xFFFFFF),
        "I5 index",
        "name index does not lead",
    ),
    "an entry under another hash": (
        entry(NAME, 0, lambda old: old ^ 1 << 63),
        "I5 index",
        "name index does not lead",
    ),
    "an entry twice": (stray_entry, "I5 index", "name index has 6 entries for 5 domains"),
    "a level that can not be": (
        header("list_level", lambda old: 99),
        "I5 index",
        "UUID index has an impossible level",
    ),
    "a level of ids that can not be": (
        header("id_level", lambda old: 99),
        "I5 index",
        "id index has an impossible level",
    ),
    "the list's sequence is odd": (
        header("list_seq", lambda old: old | 1),
        "I5 sequence",
        "the list's sequence is odd",
    ),
    "the ids' sequence is odd": (
        header("id_seq", lambda old: old | 1),
        "I5 sequence",
        "the ids' sequence is odd",
    ),
    # the rest
    "the count of domains": (
        header("live", lambda old: old + 1),
        "counts",
        "6 domains are counted",
    ),
    "the count of active domains": (
        header("active", lambda old: old - 1),
        "counts",
        "1 active domains are counted",
    ),
    "the free list is cut": (header("free_head", lambda old: 0), "free list", "0 free slots"),
    "the free list leads to a live domain": (
        header("free_head", lambda old: 1),
        "free list",
        "slot 0 is on it and lives",
    ),
    "the free list runs in a circle": (
        slot(FREE_SLOT, "next_free", lambda old: FREE_SLOT + 1),
        "free list",
        "circle",
    ),
    "the free list leads nowhere": (
        header("free_head", lambda old: 1 << 50),
        "free list",
        "leads nowhere",
    ),
    "a slot that was never made": (
        header("slot_count", lambda old: old + 1),
        "free list",
        "in 7 slots",
    ),
    "poison": (header("poisoned", lambda old: 2), "poisoned", "a repair failed"),
}
DAMAGE.pop("the other copy counts")  # has a test of its own


@pytest.mark.parametrize(("plant", "invariant", "words"), list(DAMAGE.values()), ids=list(DAMAGE))
def test_planted_damage_is_found_by_name(
    doms: DomainList, planted: Planted, path: str, plant: Plant, invariant: str, words: str
) -> None:
    assert doms.check()
    where, value = plant(planted)
    assert value != planted.read(where), "that would change nothing"
    with planted.changed(where, value):
        for reader in (doms, DomainList.attach(path=path)):
            report = reader.check(timeout=5)
            assert report.unsettled == []
            found = report.problems
            assert any(name == invariant and words in text for name, text in found), found
            assert {name for name, _ in found} <= set(INVARIANTS)
    report = doms.check()
    assert report, report.problems
    assert report.counts["domains"] == 5
    assert report.counts["active"] == 2


@pytest.mark.parametrize(
    "damage",
    [
        "the UUID index without an entry",
        "a map bit set",
        "an extent named twice",
        "the list's sequence is odd",
        "the count of domains",
    ],
)
def test_check_reports_what_stays_wrong_with_the_locks_held(
    doms: DomainList, planted: Planted, damage: str
) -> None:
    plant, invariant, words = DAMAGE[damage]
    with planted.changed(*plant(planted)):
        for hold in (False, True):
            if hold:
                doms.lock()
            report = doms.check(timeout=5)
            assert not report
            assert any(name == invariant and words in text for name, text in report.problems)
            if hold:
                doms.unlock()
    assert not doms.is_locked
    assert doms.check()
    doms.define(xml("new"))
    assert doms.check()


def test_a_copy_of_another_time_that_counts_is_found(doms: DomainList, planted: Planted) -> None:
    """An inactive copy of an active domain, by one flipped bit."""
    where = planted.slot(1, "cur")
    with planted.changed(where, planted.read(where) + 1):
        assert not doms.check()
    assert doms.check()


def test_check_counts_what_is_there(doms: DomainList) -> None:
    counts = doms.check().counts
    assert (counts["domains"], counts["active"], counts["slots"]) == (5, 2, 6)
    assert counts["extents"] == 8
    assert counts["garbage"] == 0
    assert counts["cells"] * 64 == doms.info.heap_used


@pytest.mark.parametrize("size", [0, 252, 255])
def test_a_name_of_an_impossible_length_is_never_handed_out(
    doms: DomainList, planted: Planted, size: int
) -> None:
    """Nor is anything read behind its buffer; what can not be told is empty, or an error."""
    where = planted.name(0, 1)
    uses: list[Callable[[], str]] = [
        lambda: doms.peek(uuid=target).name,
        lambda: doms.snapshot()[0].name,
        lambda: doms.list(persistent=True)[0].name,
    ]
    target = doms.peek(name="d0").uuid
    with planted.changed(where, size, 1):
        for use in uses:
            try:
                name = use()
            except SegmentCorrupt:
                continue
            assert name == ""
        try:
            with doms.get(uuid=target) as dom:
                assert dom.name == ""
        except SegmentCorrupt:
            pass
    assert doms.check()


# --- the core's unit tests ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("part", ["index", "heap", "views", "stores"])
def test_core(part: str, seed: int) -> None:
    program = driver(sanitize=True)
    if program is None:
        pytest.fail("no C compiler: the unit tests of the core can not be built")
    done = subprocess.run([program, part, str(seed)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("which", ["list", "id", "heap", "slot"])
def test_the_damaged_kind_of_a_lock_is_found(
    doms: DomainList, planted: Planted, which: str
) -> None:
    place = planted.slot(1, "mutex") if which == "slot" else planted.header(f"{which}_mutex")
    planted.flip(place + planted.at["mutex.__data.__kind"], 3)
    problems = doms.check().problems
    planted.flip(place + planted.at["mutex.__data.__kind"], 3)
    assert [name for name, _ in problems] == ["locks"]
    assert doms.check()


def test_the_free_end_of_the_heap_joins_what_is_committed_next() -> None:
    """One MiB is committed and nearly free; a blob needs it together with all that is not yet."""
    doms = DomainList(max_domains=4, max_bytes=4 << 20)
    doms.define(xml("a"))
    room = doms.info.heap_free
    assert room > 2 << 20
    with doms.get(name="a") as dom:
        dom.data = b"y" * (room - 1024)
    assert doms.check()
    assert len(doms.peek(name="a").data) == room - 1024
