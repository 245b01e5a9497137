"""`DomainList.check` finds damage of every invariant, and names it; and the core's own unit tests.

Each kind of damage is planted alone into a sound segment through its file, found under its name by
this process and by one that attaches later, and gone from the report once it is mended. The parts
of the core that have edge cases of their own - index, heap, lock-free reading - run against
reference models in a small C program, under the sanitizers where they are installed.
"""

from __future__ import annotations

import itertools
import random
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from helpers import SOAK
from killing import (
    CORE,
    DEADLINE,
    Child,
    Nursery,
    Pipe,
    Planted,
    counted,
    driver,
    hold,
    listed,
    sealed,
    soon,
    xml,
)

from shmdomains import (
    INVARIANTS,
    DomainDef,
    DomainExists,
    DomainList,
    DomainRemoved,
    SegmentCorrupt,
)

UUIDS, NAMES, IDS = 0, 1, 2
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
    return word(lambda at: at.entry(index, number), lambda old: listed(change(old)))


def field(number: int, name: str, change: Callable[[int], int], offset: int = 0) -> Plant:
    return word(lambda at: at.copy(number, name) + offset, change)


def event(number: int, field: str, change: Callable[[int], int]) -> Plant:
    return word(lambda at: at.event(number, field), change)


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
    """Of the second cell: with a used one on each side nothing that takes two of them fits in."""
    cell = (at.read(at.extent(number, DEFINITION)) >> 25) + 1
    where = at.at["map"] + cell // 64 * 8
    return where, at.read(where) ^ 1 << cell % 64


def stray_entry(at: Planted) -> Damage:
    """A second entry of d0, in an empty place of the index of names."""
    table = at.at["table.1.0"]
    empty = next(where for where in range(table, table + 8192, 8) if not at.read(where))
    return empty, at.read(at.entry(NAMES, 0))


FREE_SLOT = 4
DAMAGE: dict[str, tuple[Plant, str, str]] = {
    # I1: identity
    "a name of no bytes": (
        word(lambda at: at.name(0, 0), lambda old: old & ~0xFF),
        "I1 identity",
        "slot 0 has a name of 0 bytes",
    ),
    "a name of too many bytes": (
        word(lambda at: at.name(0, 0), lambda old: old | 0xFF),
        "I1 identity",
        "slot 0 has a name of",
    ),
    "another uuid": (slot(0, "uuid", lambda old: old ^ 1), "I5 index", "UUID index"),
    "another name": (
        word(lambda at: at.name(0, 0), lambda old: old ^ 1 << 16),
        "I5 index",
        "name index",
    ),
    "another uuid, of which its checksum tells": (
        slot(3, "uuid", lambda old: old ^ 1 << 40, 8),
        "I1 identity",
        "slot 3 has a uuid that does not fit its checksum",
    ),
    "the checksum of a uuid": (
        slot(3, "sum_and_pid", lambda old: old ^ 1 << 63),
        "I1 identity",
        "slot 3 has a uuid that does not fit its checksum",
    ),
    "the uuid of another": (
        lambda at: (at.slot(0, "uuid"), at.read(at.slot(1, "uuid"))),
        "I5 index",
        "UUID index",
    ),
    "a dead domain comes back": (
        slot(FREE_SLOT, "life", lambda old: counted(old | 1)),
        "I5 index",
        "does not lead to slot 4",
    ),
    "a domain is gone": (
        slot(0, "life", lambda old: counted(old + 1)),
        "I5 index",
        "UUID index has an entry of slot 0",
    ),
    "a flipped bit makes a domain free": (
        slot(0, "life", lambda old: old ^ 1),
        "I1 identity",
        "slot 0: whether a domain lives in it, and which, is damaged",
    ),
    "a flipped bit makes a free slot live": (
        slot(FREE_SLOT, "life", lambda old: old ^ 1),
        "I1 identity",
        "slot 4: whether a domain lives in it, and which, is damaged",
    ),
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
    "small data": (
        word(lambda at: at.small(2) + 8, lambda old: old ^ 1 << 3),
        "I2 extents",
        "slot 2: blob 2 does not fit its checksum",
    ),
    "the checksum of small data": (
        word(lambda at: at.small(2), lambda old: old ^ 1),
        "I2 extents",
        "slot 2: blob 2 does not fit its checksum",
    ),
    "a blob newer than its record": (
        field(1, "version", lambda old: old + 1000, 8 * DATA),
        "I3 fields",
        "blob 2 is newer",
    ),
    "no definition": (
        field(0, "status", lambda old: old & ~(1 << 44)),
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
        "id index has an entry of slot 1",
    ),
    # I5: indexes and sequences
    "the UUID index without an entry": (
        entry(UUIDS, 0, lambda old: 0),
        "I5 index",
        "UUID index does not lead to slot 0",
    ),
    "the name index without an entry": (
        entry(NAMES, 3, lambda old: 0),
        "I5 index",
        "name index does not lead to slot 3",
    ),
    "the id index without an entry": (
        entry(IDS, 1, lambda old: 0),
        "I5 index",
        "id index does not lead to slot 1",
    ),
    "the UUID index leads to another slot": (
        entry(UUIDS, 0, lambda old: old + 1),
        "I5 index",
        "UUID index does not lead to slot 0",
    ),
    "the name index leads to another slot": (
        entry(NAMES, 0, lambda old: old + 1),
        "I5 index",
        "name index does not lead to slot 0",
    ),
    "the id index leads to another slot": (
        entry(IDS, 1, lambda old: old + 1),
        "I5 index",
        "id index does not lead to slot 1",
    ),
    "the index leads behind the last slot": (
        entry(NAMES, 0, lambda old: old | 0xFFFFFF),
        "I5 index",
        "name index does not lead",
    ),
    "an entry under another hash": (
        entry(NAMES, 0, lambda old: old ^ 1 << 55),
        "I5 index",
        "name index does not lead",
    ),
    "a flipped bit in an entry": (
        word(lambda at: at.entry(NAMES, 0), lambda old: old ^ 1 << 40),
        "I5 index",
        "name index has a damaged entry",
    ),
    "a flipped bit in an empty place": (
        lambda at: (stray_entry(at)[0], 1 << 30),
        "I5 index",
        "name index has a damaged entry",
    ),
    "an entry twice": (stray_entry, "I5 index", "name index has 6 entries for 5 domains"),
    "a level that cannot be": (
        header("list_level", lambda old: 99),
        "I5 index",
        "UUID index has an impossible level",
    ),
    "a level of ids that cannot be": (
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
    # E1: events
    "an event of another type": (
        event(2, "kind", lambda old: old ^ 1),
        "E1 events",
        "event 2 does not fit its checksum",
    ),
    "an event of another domain": (
        event(2, "name", lambda old: old ^ 1 << 9),
        "E1 events",
        "event 2 does not fit its checksum",
    ),
    "an event with another number": (
        event(2, "number", lambda old: sealed(3)),
        "E1 events",
        "place 2 of the ring has a damaged number",
    ),
    "an event with a flipped bit in its number": (
        event(2, "number", lambda old: old ^ 1 << 14),
        "E1 events",
        "place 2 of the ring has a damaged number",
    ),
    "an event that has not happened": (
        event(2, "number", lambda old: sealed(2 + (1 << 14))),
        "E1 events",
        "event 16386 is in the ring and has not happened",
    ),
    "the number of events": (
        header("event_count", lambda old: old ^ 1),
        "E1 events",
        "the number of events is damaged",
    ),
    "the number of events goes back": (
        header("event_count", lambda old: sealed(1)),
        "E1 events",
        "which has not happened",
    ),
    "the ring's watermark": (
        header("ring_committed", lambda old: old ^ 1 << 8),
        "E1 events",
        "the ring's watermark is damaged",
    ),
    "a domain's last event": (
        field(1, "event", lambda old: old + 1000),
        "E1 events",
        "slot 1 names event",
    ),
    "the events' lock": (
        header("event_mutex", lambda old: old ^ 1 << 4, 16),
        "locks",
        "the events' lock is damaged",
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
        header("slot_count", lambda old: sealed((old & (1 << 36) - 1) + 1)),
        "free list",
        "in 7 slots",
    ),
    "the number of slots": (
        header("slot_count", lambda old: old ^ 1 << 1),
        "counts",
        "the number of slots",
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


def test_a_flipped_bit_makes_no_handle_one_of_another_domain(
    doms: DomainList, planted: Planted
) -> None:
    """Nor one that outlived its domain: lives are numbered, and one bit apart when they follow."""
    with doms.get(name="d0") as gone:
        pass
    doms.undefine(name="d0")
    doms.define(xml("next"))
    with doms.get(name="next") as handle:
        assert handle != gone
    where = planted.slot(0, "life")
    for bit in range(64):
        with planted.changed(where, planted.read(where) ^ 1 << bit):
            for dom in (gone, handle):
                with pytest.raises(SegmentCorrupt):
                    dom.lock(timeout=0)
            assert not doms.check()
    with pytest.raises(DomainRemoved):
        gone.lock()
    assert doms.check()


ABOUT = ("id", "name", "uuid", "state", "reason", "persistent", "autostart", "is_active", "pid")
BLOBS = ("definition", "next_definition", "data")


@pytest.mark.parametrize(
    ("plant", "readable"),
    [
        (field(1, "status", lambda old: old ^ 1), ()),
        (slot(1, "cur", lambda old: old ^ 1), ()),
        (slot(1, "life", lambda old: old ^ 1 << 20), ()),
        (slot(1, "uuid", lambda old: old ^ 1), ("next_definition",)),  # there is none
        (word(lambda at: at.name(1, 0), lambda old: old ^ 1 << 8), BLOBS),
    ],
    ids=["fields", "which fields", "whether it is there", "uuid", "name"],
)
def test_what_an_info_shows_of_a_damaged_record(
    doms: DomainList, planted: Planted, path: str, plant: Plant, readable: tuple[str, ...]
) -> None:
    """Nothing but blobs, which name the uuid in a checksum of their own; and never a crash."""
    whole = doms.peek(name="d1")
    with planted.changed(*plant(planted)), DomainList.attach(path=path) as reader:
        for definitions in (True, False):
            for infos in (reader.snapshot(definitions), reader.list(definitions=definitions)):
                [info] = [one for one in infos if "damaged" in repr(one)]
                for what in ABOUT:
                    with pytest.raises(SegmentCorrupt):
                        getattr(info, what)
                for what in BLOBS:
                    if what in readable and definitions:
                        assert getattr(info, what) == getattr(whole, what)
                        continue
                    with pytest.raises(
                        AttributeError if readable and not definitions else SegmentCorrupt
                    ):
                        getattr(info, what)


@pytest.mark.parametrize(
    ("field", "offset", "bits"),
    [
        ("uuid", 0, range(64)),
        ("uuid", 8, range(64)),
        ("sum_and_pid", 0, range(32, 64)),
    ],
    ids=["uuid, first half", "uuid, second half", "its checksum"],
)
def test_an_id_leads_to_no_handle_with_another_uuid(
    doms: DomainList, planted: Planted, field: str, offset: int, bits: range
) -> None:
    """Of a key that is no part of the identity, one flipped bit could make one of anybody."""
    where = planted.slot(1, field) + offset
    for bit in bits:
        with planted.changed(where, planted.read(where) ^ 1 << bit):
            for call in (
                lambda: doms.get(id=1, timeout=0),
                lambda: doms.lookup(id=1, timeout=0),
                lambda: doms.find_by_id(1, 0),
            ):
                with doms.locked(), pytest.raises(SegmentCorrupt):
                    call()
            assert not doms.is_locked
    with doms.get(id=1, timeout=0) as dom:  # and nothing stayed locked
        assert dom.name == "d1"
    assert doms.check()


@pytest.mark.parametrize("uuid", [None, UUID(int=77)])
@pytest.mark.parametrize("index", [0, 1], ids=["of uuids", "of names"])
def test_nothing_is_defined_where_an_index_is_damaged(
    doms: DomainList, planted: Planted, index: int, uuid: UUID | None
) -> None:
    new = DomainDef.from_xml(xml("new", uuid))
    where = planted.header("list_level") + 8 * index
    with planted.changed(where, 99), doms.locked(), pytest.raises(SegmentCorrupt):
        doms.assign_def(new, timeout=0)
    assert doms.peek(name="new") is None and doms.check()


@pytest.mark.parametrize("index", [UUIDS, NAMES, IDS], ids=["uuids", "names", "ids"])
def test_a_flipped_bit_in_an_entry_hides_nobody(
    doms: DomainList, planted: Planted, index: int
) -> None:
    """Whoever misses past a damaged entry asks the records; nothing is defined a second time."""
    infos = [info for info in doms if index != IDS or info.id >= 0]
    for info in infos:
        [number] = [n for n in range(6) if n != FREE_SLOT and info.name == f"d{n}"]
        where = planted.entry(index, number)
        key: dict[str, Any] = [{"uuid": info.uuid}, {"name": info.name}, {"id": info.id}][index]
        for bit in range(64):
            with planted.changed(where, planted.read(where) ^ 1 << bit):
                assert doms.peek(**key).uuid == info.uuid and info.uuid in doms
                with doms.get(**key, timeout=0) as dom:
                    assert dom.name == info.name
                for name, uuid in (("another", info.uuid), (info.name, UUID(int=77))):
                    with pytest.raises(DomainExists):
                        doms.define(xml(name, uuid), timeout=0)
                assert not doms.check()
        assert doms.check()


@pytest.mark.parametrize("index", [UUIDS, NAMES])
def test_a_define_makes_a_damaged_index_anew(
    doms: DomainList, planted: Planted, index: int
) -> None:
    table = planted.at[f"table.{index}.0"]
    for where in range(table, table + 8192, 8):
        if not planted.read(where):
            planted.write(where, 1 << 30)
    assert doms.peek(name="new") is None and UUID(int=77) not in doms
    assert doms.lookup(name="new", timeout=0) is None
    doms.define(xml("new", UUID(int=77)), timeout=0)
    assert doms.peek(name="new").uuid == UUID(int=77) and doms.check()


@pytest.mark.parametrize("index", [UUIDS, NAMES, IDS], ids=["uuids", "names", "ids"])
def test_a_damaged_index_that_grows_is_made_anew(
    doms: DomainList, planted: Planted, index: int
) -> None:
    """With 512 entries a table is half full."""
    for number in range(6, 512):
        doms.define(xml(f"d{number}"))
        if index == IDS:
            with doms.get(name=f"d{number}") as dom:
                dom.activate()
    missing = 512 - (doms.count(active=True) if index == IDS else len(doms))
    for number in range(missing + 1):
        if number == missing:
            where = planted.entry(index, 1)
            planted.write(where, planted.read(where) ^ 1 << 45)
        doms.define(xml(f"e{number}"), timeout=1)
        if index == IDS:
            with doms.get(name=f"e{number}") as dom:
                dom.activate()
    assert doms.peek(name="d1") and doms.peek(id=1) and doms.check()


@pytest.mark.parametrize("index", [UUIDS, NAMES, IDS], ids=["uuids", "names", "ids"])
def test_two_damages_do_not_poison_the_list(doms: DomainList, planted: Planted, index: int) -> None:
    """An index cannot be made anew where a record is damaged; the change of another domain stands
    all the same, and who misses past the damaged entry asks the records."""
    fields = planted.slot(3, "copy0"), planted.slot(3, "copy1")
    for where in fields:
        planted.write(where, planted.read(where) ^ 1 << 3)
    where = planted.entry(index, 1)
    planted.write(where, planted.read(where) ^ 1 << 45)
    with doms.locked():
        dom = doms.find_by_id(1, 0)
        dom.deactivate()
        dom.commit(0)
        doms.rename(dom, "renamed", 0)
        dom.unlock()
        assert doms.find_by_name("renamed", 0) is not None
    assert doms.info.poisoned is None
    assert doms.peek(name="renamed").id == -1
    doms.undefine(name="renamed", timeout=1)
    assert doms.info.poisoned is None and len(doms) == 4


def test_the_pid_of_a_dead_holder_says_nothing_of_a_uuid(
    doms: DomainList, planted: Planted
) -> None:
    where = planted.slot(1, "sum_and_pid")
    uuid = doms.peek(name="d1").uuid
    for bit in range(32):
        with planted.changed(where, planted.read(where) ^ 1 << bit):
            with doms.get(id=1, timeout=0) as dom:
                assert (dom.uuid, dom.previous_owner_died) == (uuid, None)
            assert doms.peek(id=1).uuid == uuid and doms.check()


def test_check_counts_what_is_there(doms: DomainList) -> None:
    counts = doms.check().counts
    assert (counts["domains"], counts["active"], counts["slots"]) == (5, 2, 6)
    assert counts["extents"] == 7  # the data of d2 is none
    assert counts["garbage"] == 0
    assert counts["cells"] * 64 == doms.info.heap_used


@pytest.mark.parametrize("size", [0, 252, 255])
def test_a_name_of_an_impossible_length_is_never_handed_out(
    doms: DomainList, planted: Planted, size: int
) -> None:
    """Nor is anything read behind its buffer; what cannot be told is empty, or an error."""
    where = planted.name(0, 0)
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


# --- while writers are at work --------------------------------------------------------------------


def churn(pipe: Pipe, path: str, seed: int) -> None:
    """Define, change, start, stop, rename and remove domains of one's own, without a rest."""
    doms = DomainList.attach(path=path)
    dice = random.Random(seed)
    for turn in itertools.count():
        name = f"own-{seed}-{turn}"
        doms.define(xml(name))
        with doms.get(name=name) as dom:
            for _ in range(3):
                dom.data = "x" * dice.randrange(100, 2000)  # two cells at the least
                dom.commit()
                dom.activate()
                dom.commit()
                dom.deactivate()
        with doms.locked():
            dom = doms.find_by_name(name)
            with dom:
                doms.rename(dom, f"{name}-renamed")
        doms.undefine(name=f"{name}-renamed")
        if turn == 5:
            pipe.say("at work")


UNDER_WORK: dict[str, list[tuple[str, str]]] = {
    "nothing": [],
    "the name index without an entry": [
        ("I5 index", "name index does not lead to slot 3"),
        ("I5 index", "name index has "),
    ],
    "an entry twice": [("I5 index", "name index has ")],
    "an active domain says that it is not": [
        ("I3 fields", "slot 1: its fields do not fit their checksum"),
        ("I5 index", "name index does not lead to slot 1"),
        ("I5 index", "id index has an entry of slot 1"),
    ],
    "a map bit set": [
        ("I2 map", "1 cells are marked and nobody's"),
        ("I2 map", "the count of used cells"),
    ],
    "a map bit cleared": [
        ("I2 map", "1 cells are in use and not marked (slot 1)"),
        ("I2 map", "the count of used cells"),
    ],
    "an extent named twice": [("I2 extents", "named twice")],
    "the count of used cells": [("I2 map", "the count of used cells")],
    "the count of domains": [("counts", "domains are counted"), ("free list", "free slots and")],
    "the count of active domains": [("counts", "active domains are counted")],
    "an id that was not given out": [
        ("I3 fields", "slot 1: its fields do not fit their checksum"),
        ("I5 index", "name index does not lead to slot 1"),
        ("I4 ids", "slot 1 has id"),
        ("I5 index", "id index does not lead to slot 1"),
    ],
    "a state that does not exist": [
        ("I3 fields", "slot 1: its fields do not fit their checksum"),
        ("I5 index", "name index does not lead to slot 1"),
        ("I3 fields", "unknown state 8"),
        ("I5 index", "id index does not lead to slot 1"),
    ],
}


@pytest.mark.parametrize("what", UNDER_WORK)
def test_check_tells_damage_from_work(
    nursery: Nursery,
    start: Callable[..., Child],
    doms: DomainList,
    planted: Planted,
    path: str,
    tried: Callable[[str, int], None],
    what: str,
) -> None:
    """All that is wrong, nothing that only moves, and a verdict on everything."""
    if what != "nothing":
        plant = DAMAGE[what][0]
        if what == "a map bit set":
            # Near the end of what is committed, where nobody allocates so soon.
            end = planted.watermark(planted.header("heap_committed"))
            plant = word(lambda at: at.at["map"] + end // 8 - 8, lambda old: old | 1 << 63)
        if what == "an id that was not given out":
            plant = field(1, "ids", lambda old: old | 1 << 30)
        planted.write(*plant(planted))
    workers = [start(churn, path, seed) for seed in range(2)]
    for worker in workers:
        worker.hear()
    expected = UNDER_WORK[what]
    rounds = 100 if SOAK else 5
    for _ in range(rounds):
        report = doms.check(timeout=DEADLINE)
        assert report.unsettled == []
        found = report.problems
        assert all(any(n == name and w in text for n, text in found) for name, w in expected), found
        assert all(any(n == name and w in text for name, w in expected) for n, text in found), found
    assert all(worker.is_alive() for worker in workers)
    tried("checks of a list while writers were at work", rounds)


def test_a_check_waits_for_no_stopped_holder(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    """What its lock is needed for stands among what is not settled, and the rest is told."""
    child = start(hold, path, "list", "d0")
    child.hear()
    child.signal(signal.SIGSTOP)
    with soon("a check that needs no lock"):
        assert doms.check(timeout=None).unsettled == []
    with planted.changed(*DAMAGE["a map bit set"][0](planted)):
        planted.write(planted.header("list_seq"), planted.read(planted.header("list_seq")) | 1)
        with soon("a check that needs the list lock"):
            report = doms.check(timeout=0.1)
    assert [name for name, _ in report.problems] == ["I2 map", "I2 map"]
    assert [name for name, _ in report.unsettled] == [
        "I5 index",
        "I5 sequence",
        "counts",
        "free list",
    ]
    assert all(f"process {child.pid}" in why for _, why in report.unsettled)
    planted.write(planted.header("list_seq"), planted.read(planted.header("list_seq")) + 1)


def test_a_check_by_who_holds_a_domain_waits_for_nobody(
    start: Callable[..., Child], doms: DomainList, planted: Planted, path: str
) -> None:
    """The holder of the list may be waiting for that very domain."""
    child = start(hold, path, "list")
    child.hear()
    sequence = planted.header("list_seq")
    with (
        doms.get(name="d0", timeout=0),
        planted.changed(sequence, planted.read(sequence) | 1),
        soon("the check"),
    ):
        assert doms.check(timeout=None).unsettled


def test_other_threads_run_during_a_check(doms: DomainList) -> None:
    """It gives way every few milliseconds."""
    seen: list[bool] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append(doms.peek(name="d0") is not None)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(20):
        assert doms.check()
    done.set()
    thread.join(DEADLINE)
    assert seen and all(seen)


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="a million domains take 2 GB and a minute: make soak")
@pytest.mark.timeout(600)
def test_a_million_domains_are_checked_while_writers_are_at_work(
    start: Callable[..., Child], segment_dir: Path, tried: Callable[[str, int], None]
) -> None:
    path = str(segment_dir / "million.segment")
    million = 1_000_000
    with DomainList.create(path=path, max_domains=million + 1000) as doms:
        blob = DomainDef.from_xml(xml("any")).encode()
        for first in range(0, million, 1000):
            with doms.locked():
                for number in range(first, first + 1000):
                    doms._insert(
                        UUID(int=number + 1), f"d{number}", blob, 5, True, None, [None]
                    ).unlock()
        workers = [start(churn, path, seed) for seed in range(2)]
        for worker in workers:
            worker.hear()
        for _ in range(5):
            report = doms.check(timeout=DEADLINE)
            assert report.problems == [] and report.unsettled == []
            assert report.counts["domains"] >= million
            print(f"longest hold of a lock: {report.longest_hold * 1000:.1f} ms")
            tried("domains checked while writers were at work", million)
        assert all(worker.is_alive() for worker in workers)
        for worker in workers:
            worker.kill()
        assert doms.check()
        doms.unlink(force=True)


def test_every_invariant_is_named_in_one_place() -> None:
    documented = DomainList.check.__doc__ or ""
    sources = "".join(path.read_text() for path in CORE.glob("check*.c"))
    reported = set(re.findall(r'fault\(check,\s*"([^"]+)"', sources))
    assert reported | {"settings", "config"} == set(INVARIANTS)
    assert [name for name in INVARIANTS if not re.search(rf"^ *{name}$", documented, re.M)] == []


# --- the core's unit tests ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("part", ["index", "heap", "views", "stores", "check", "threads"])
def test_core(part: str, seed: int) -> None:
    program = driver(sanitize=True)
    if program is None:
        pytest.fail("no C compiler: the unit tests of the core cannot be built")
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
