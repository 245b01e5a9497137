"""The driver's data: whatever way a value goes in and out, it is the same bytes and the same value.

Flat values are encoded by the core, plain ones by msgspec, the rest by msgpack; up to 120 bytes lie
in the record, more in the heap; what was committed is kept decoded. Nobody can tell which it was.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgpack
import pytest
from helpers import SOAK, xml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from killing import Nursery, Pipe, Planted, driver

from shmdomains import (
    AlreadyLocked,
    DomainList,
    DomainNotFound,
    DomainNotLocked,
    LockTimeout,
    SegmentCorrupt,
    SegmentFull,
    UncommittedChanges,
)
from shmdomains.rules.values import decode_data, encode_data

SMALL = 120  # bytes that lie in the record
CELL, SUM = 64, 8  # of the heap, and the checksum in front of what is there
DATA = 2  # its number among the blobs
UUID = "00000001-0000-4000-8000-000000000000"

often = settings(
    max_examples=2000 if SOAK else 300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

edges = st.sampled_from(
    [
        *(0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1),
        *(-1, -32, -33, -128, -129, -32768, -32769, -(2**31), -(2**31) - 1, -(2**63)),
    ]
)
numbers = edges | st.integers(-(2**63), 2**64 - 1)
texts = st.text(max_size=40) | st.text("ab", min_size=28, max_size=130)
scalars: st.SearchStrategy[Any]
scalars = (
    st.binary(max_size=130)
    | st.none()
    | st.booleans()
    | numbers
    | st.floats(allow_nan=False)
    | texts
)
flat = scalars | st.dictionaries(texts, scalars, max_size=20)
keys = texts | st.integers(-5, 5)
values = flat | st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=18)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=18)
        | st.dictionaries(texts, inner, max_size=3).map(MappingProxyType)
    ),
    max_leaves=40,
)


@pytest.fixture
def doms(segment_dir: Path) -> Iterator[Any]:
    """With one domain."""
    with DomainList.create("list", max_domains=64) as doms:
        doms.define(xml("web1", UUID))
        yield doms
        assert doms.check()


@pytest.fixture
def other(doms: Any) -> Iterator[Any]:
    """The same list, and nothing that `doms` has decoded."""
    with DomainList.attach("list") as other:
        yield other


def stored(doms: Any) -> bytes | None:
    """The bytes as they are in the segment."""
    _, blobs, damaged = doms._salvage(0)
    assert not any(damaged)
    found: bytes | None = blobs[DATA]
    return found


def of_bytes(size: int, fill: str = "x") -> Any:
    """A value of so many bytes; where a string cannot be, a map of one."""
    if size == 1:
        return ord(fill)
    head = 1 if size < 33 else 2 if size < 258 else 3
    text = fill * (size - head)
    return text if len(encode_data(text)) == size else {"": text[1:]}


def same(one: Any, other: Any) -> bool:
    """Equal to the types: 1 is not 1.0 nor True, 0.0 not -0.0."""
    if isinstance(one, Mapping):
        return (
            type(one) is type(other)
            and list(one) == list(other)
            and [type(key) for key in one] == [type(key) for key in other]
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, tuple):
        return type(other) is tuple and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


def plainly(value: Any) -> Any:
    """Of mappings dicts, of sequences lists."""
    if isinstance(value, Mapping):
        return {key: plainly(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [plainly(one) for one in value]
    return value


# --- the same bytes and values --------------------------------------------------------------------


@often
@given(value=values)
@example(value={str(n): n for n in range(15)})
@example(value={str(n): n for n in range(16)})
@example(value={"nested": {"a": [1, (2, {})]}})
@example(value={"é": "ü", "\0": "\x7f\x80"})
@example(value=[True, 1, 1.0, 0.0, -0.0, None, b"", ""])
@example(value=2**63)
@example(value={"": 2**64 - 1, "a": -(2**63)})
def test_each_way_gives_the_bytes_and_values_of_msgpack(doms: Any, other: Any, value: Any) -> None:
    expected = msgpack.packb(plainly(value))
    with doms.get("web1") as dom:
        dom.data = value
        pending = dom.data
        dom.commit()
        committed = dom.data
    assert stored(doms) == (None if value is None else expected)
    read = decode_data(expected)
    found = [pending, committed, doms["web1"].data, doms.snapshot()[0].data, other["web1"].data]
    with doms.get("web1") as dom:
        found.append(dom.data)
    for one in found:
        assert same(one, read), f"{one!r} instead of {read!r}"
    assert encode_data(value) == expected


@often
@given(value=values)
def test_a_holder_decodes_what_others_wrote(doms: Any, other: Any, value: Any) -> None:
    with doms.get("web1") as dom:
        dom.data = value
    with other.get("web1") as dom:
        assert same(dom.data, decode_data(encode_data(value)))


@pytest.mark.parametrize("size", [*range(1, 131), 4095, 4096, 4097])
def test_every_size_about_the_largest_small_one(doms: Any, other: Any, size: int) -> None:
    """And what of it is in the heap."""
    empty = doms.info.heap_free
    for letter in "xyz":
        value = of_bytes(size, letter)
        with doms.get("web1") as dom:
            dom.data = value
        blob = stored(doms)
        assert blob is not None and len(blob) == size
        assert doms["web1"].data == other["web1"].data == value
        with other.get("web1") as dom:
            assert dom.data == value
        used = empty - doms.info.heap_free
        assert used == (0 if size <= SMALL else -(-(size + SUM) // CELL) * CELL)


@often
@given(sizes=st.lists(st.sampled_from([0, 1, 60, 119, 120, 121, 130, 500]), max_size=12))
def test_from_size_to_size(doms: Any, other: Any, sizes: list[int]) -> None:
    """0: none. In one transaction or each in its own, with a rename in between."""
    names = ["web1", "web2"]
    for number, size in enumerate(sizes):
        value = of_bytes(size) if size else None
        with doms.locked(), doms.get(uuid=UUID) as dom:
            dom.data = value
            if number % 3 == 0:
                dom.commit()
                doms.rename(dom, names[dom.name == names[0]])
                assert dom.data == value
        info = other[UUID]
        assert info.data == doms[UUID].data == value
        assert info.definition.name == info.name
    assert doms.check().counts["garbage"] == 0
    if doms[UUID].name != "web1":
        with doms.locked(), doms.get(uuid=UUID) as dom:
            doms.rename(dom, "web1")


# --- read-only, and its own -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 200])
@pytest.mark.parametrize("commits", [False, True])
def test_what_was_assigned_may_change_afterwards(doms: Any, size: int, commits: bool) -> None:
    mine: dict[str, Any] = {"text": "x" * size}
    deep = {"list": [1, 2], "more": {"a": mine}}
    with doms.get("web1") as dom:
        for value in (mine, deep, MappingProxyType(mine)):
            dom.data = value
            if commits:
                dom.commit()
            before = plainly(dom.data)
            mine["text"] = mine["text"].replace("x", "y")
            mine["new"] = 1
            deep["list"].append(3)  # type: ignore[attr-defined]
            assert plainly(dom.data) == before
            dom.commit()
            assert plainly(dom.data) == plainly(doms["web1"].data) == before
            del mine["new"]


@often
@given(value=values)
def test_all_of_it_is_read_only(doms: Any, other: Any, value: Any) -> None:
    with doms.get("web1") as dom:
        dom.data = value
        assert_read_only(dom.data)
    assert_read_only(doms["web1"].data)
    assert_read_only(other["web1"].data)


def assert_read_only(value: Any) -> None:
    assert not isinstance(value, (dict, list, bytearray))
    if isinstance(value, Mapping):
        assert type(value) is MappingProxyType
        value = tuple(value.values())
    for one in value if isinstance(value, tuple) else ():
        assert_read_only(one)


@pytest.mark.parametrize("value", [{"vnc": 5901}, {"a": "x" * 300}, {"deep": [1, {"a": 2}]}])
def test_what_does_not_change_is_decoded_once(doms: Any, other: Any, value: Any) -> None:
    with doms.get("web1") as dom:
        dom.data = value
    with doms.get("web1") as dom:
        first = dom.data
        assert dom.data is first
        dom.autostart = True
    assert doms["web1"].data is first and doms.snapshot()[0].data is first
    info = other["web1"]
    assert info.data is info.data is other["web1"].data
    with doms.get("web1") as dom:
        dom.data = value
    assert doms["web1"].data is not first and doms["web1"].data == first == info.data


def test_a_slot_that_is_used_again_has_nothing_of_the_data_before(doms: Any, other: Any) -> None:
    for size in (10, 300, 10):
        with doms.get("web1") as dom:
            dom.data = value = of_bytes(size)
        was = other["web1"]
        assert doms["web1"].data == was.data == value
        doms.undefine("web1")
        doms.define(xml("web1", UUID))
        assert doms["web1"].data is other["web1"].data is None
        assert was.data == value
        with other.get("web1") as dom:
            assert dom.data is None
            dom.data = {"new": size}
        assert doms["web1"].data == {"new": size}


@pytest.mark.parametrize("size", [10, 300])
def test_a_rename_leaves_the_data(doms: Any, other: Any, size: int) -> None:
    """An info of before goes on being of before."""
    with doms.get("web1") as dom:
        dom.data = value = {"text": of_bytes(size)}
    before = other["web1"]
    with doms.locked(), doms.get("web1") as dom:
        dom.autostart = True
        with pytest.raises(UncommittedChanges):
            doms.rename(dom, "web2")
        dom.rollback()
        doms.rename(dom, "w" * 251)
        assert dom.data == value
        dom.data = {"text": "other"}
        dom.commit()
        assert dom.data == {"text": "other"} and dom.name == "w" * 251
        doms.rename(dom, "web3")
        assert dom.data == {"text": "other"}
    assert (before.name, before.data) == ("web1", value)
    assert (other["web3"].data, other["web3"].name) == ({"text": "other"}, "web3")
    assert doms.check().counts["garbage"] == 0


def test_what_is_rolled_back_was_never_there(doms: Any) -> None:
    with doms.get("web1") as dom:
        dom.data = {"count": 1}
    for size in (1, 300):
        with pytest.raises(InterruptedError), doms.get("web1") as dom:
            dom.data = of_bytes(size)
            raise InterruptedError
        assert doms["web1"].data == {"count": 1}
        with doms.get("web1") as dom:
            dom.data = "never"
            dom.rollback()
            assert dom.data == {"count": 1}


def test_small_data_needs_no_room_in_the_heap(segment_dir: Path) -> None:
    with DomainList.create("full", max_domains=16, max_bytes=2 << 20) as doms:
        for name in ("web1", *map(str, range(8))):
            doms.define(xml(name))
        size = doms.info.heap_free
        for name in map(str, range(8)):
            while size > SMALL:
                try:
                    with doms.get(name=name) as dom:
                        dom.data = b"x" * size
                    break
                except SegmentFull:
                    size = size * 9 // 10
        with pytest.raises(SegmentFull), doms.get("web1") as dom:
            dom.data = b"x" * 500
        with doms.get("web1") as dom:
            for number in range(5):
                dom.data = {"count": number}
                dom.commit()
        assert doms["web1"].data == {"count": 4}
        assert doms.check()


def test_a_rename_that_finds_no_room_leaves_record_and_file(
    segment_dir: Path, tmp_path: Path
) -> None:
    """The data could make way, and the definition not: of that nothing may be seen."""
    names = [f"full{number}" for number in range(60)]
    with DomainList.create("full", max_domains=100, max_bytes=3 << 20) as doms:
        doms.load_all_configs(tmp_path, tmp_path / "autostart")
        doms.define(xml("web1", UUID, description="x" * 1000))
        for name in names:
            doms.define(xml(name))
        with doms.get("web1") as dom:
            dom.data = {"count": 1}
        for name in names[:30]:
            with doms.get(name) as dom:
                dom.data = b"x" * 150
        size, left = 1 << 20, names[30:]
        while size > 140:
            try:
                with doms.get(left[0]) as dom:
                    dom.data = b"x" * size
                left.pop(0)
            except SegmentFull:
                size = size * 9 // 10
        for name in names[:12:2]:  # holes, each for small data and no more
            with doms.get(name) as dom:
                dom.data = None
        with doms.locked(), doms.get("web1") as dom:
            with pytest.raises(SegmentFull):
                doms.rename(dom, "web2")
            assert (dom.name, dom.data, dom._work) == ("web1", {"count": 1}, None)
        assert doms.peek("web2") is None and doms[UUID].data == {"count": 1}
        assert (tmp_path / "web1.xml").exists() and not (tmp_path / "web2.xml").exists()
        assert doms.check()


def test_the_half_that_does_not_count_is_nobodys_business(doms: Any, segment_dir: Path) -> None:
    """What counts is refused if it is damaged, also as what a rename moves and an `add` adds to."""
    assert driver() is not None, "no C compiler, so nobody says where the words of a segment lie"
    with doms.get("web1") as dom:
        dom.data = {"a": 1}
    with Planted(str(segment_dir / "list.segment")) as planted:
        where = planted.small(0)
        for at in range(where - 128, where, 8):
            planted.write(at, planted.read(at) ^ 1 << at % 61)
        assert doms["web1"].data == {"a": 1} and doms.check()
        for bit in (0, 63, 64, 95):
            at = where + bit // 64 * 8
            with (
                planted.changed(at, planted.read(at) ^ 1 << bit % 64),
                DomainList.attach("list") as other,
            ):
                assert not other.check()
                for call in (data_of, add_held, add_to, rename_held):
                    with pytest.raises(SegmentCorrupt):
                        call(other)
                assert not other.is_locked and other["web1"].name == "web1"
        assert doms.add("web1", "a") == 2
        with doms.locked(), doms.get("web1") as dom:
            doms.rename(dom, "web2")
        assert doms["web2"].data == {"a": 2}


def data_of(doms: Any) -> Any:
    with doms.get("web1", timeout=0) as dom:
        return dom.data


def add_to(doms: Any) -> None:
    doms.add("web1", "a")


def rename_held(doms: Any) -> None:
    with doms.locked(), doms.get("web1", timeout=0) as dom:
        doms.rename(dom, "web2")


# --- counting -------------------------------------------------------------------------------------

names = st.sampled_from(["", "a", "requests", "é", "x" * 31, "x" * 32, "x" * 255, "x" * 256])
steps = edges | st.integers(-(2**63), 2**63 - 1) | st.integers(-(2**64), 2**65)
counters = st.dictionaries(names, edges | st.integers(-9, 9), max_size=4) | st.dictionaries(
    texts, scalars | st.lists(scalars, max_size=3), max_size=18
)


@often
@given(before=counters | st.none(), name=names, by=steps, waits=st.booleans())
@example(before={"a": -(2**63)}, name="a", by=-1, waits=False)
@example(before={"a": 2**64 - 1}, name="a", by=1, waits=False)
@example(before={str(n): n for n in range(14)}, name="new", by=1, waits=False)
@example(before={str(n): n for n in range(15)}, name="new", by=1, waits=False)
@example(before={str(n): n for n in range(16)}, name="15", by=2**63 - 1, waits=True)
@example(before={"b": {"a": 7}, "c": [1, "a", {"a": 1}], "a": 2}, name="a", by=-3, waits=False)
def test_add_is_a_value_read_and_assigned(
    doms: Any, other: Any, before: Any, name: str, by: int, waits: bool
) -> None:
    """`waits`: what it is added to has not been committed yet."""
    with doms.get("web1") as dom:
        dom.data = before
        if not waits:
            dom.commit()
        known = dict(dom.data or {})
        was = known.get(name, 0)
        if type(was) is not int:
            with pytest.raises(TypeError, match="no int"):
                dom.add(name, by)
            assert plainly(dom.data) == plainly(before)
            return
        if not -(2**63) <= was + by < 2**64:
            with pytest.raises(OverflowError, match="data holds"):
                dom.add(name, by)
            assert plainly(dom.data) == plainly(before)
            return
        known[name] = was + by
        assert dom.add(name, by) == was + by
        assert same(dom.data, decode_data(encode_data(known)))
    assert stored(doms) == encode_data(known)
    assert same(other["web1"].data, decode_data(encode_data(known)))


@pytest.mark.parametrize("data", ["text", 7, [1], b"a", True, 1.5, 2**64 - 1, "x" * 300])
def test_nothing_can_be_counted_in_what_is_no_mapping(doms: Any, data: Any) -> None:
    with doms.get("web1") as dom:
        dom.data = data
    for call in (lambda: doms.add("web1", "a"), lambda: add_held(doms)):
        with pytest.raises(TypeError, match="no mapping"):
            call()
    assert doms["web1"].data == decode_data(encode_data(data))
    with doms.get("web1", timeout=0):
        pass


def add_held(doms: Any) -> None:
    with doms.get("web1", timeout=0) as dom:
        dom.add("a")


def test_add_in_one_call(doms: Any, other: Any) -> None:
    assert [doms.add("web1", "a"), doms.add(UUID, "a", 5), other.add("web1", "a", by=-6)] == [
        1,
        6,
        0,
    ]
    with doms.get("web1") as dom:
        id = dom.activate()
    assert other.add(id, "b" * 200, 2**40) == 2**40
    assert doms.add("web1", "b" * 200, timeout=0) == 2**40 + 1
    assert doms["web1"].data == other["web1"].data == {"a": 0, "b" * 200: 2**40 + 1}


def test_what_add_refuses_changes_nothing(doms: Any, other: Any) -> None:
    doms.add("web1", "a", 3)
    with pytest.raises(DomainNotFound):
        doms.add("web2", "a")
    with pytest.raises(DomainNotFound):
        doms.add("x/y", "a")
    for field, by, error in (
        (b"a", 1, TypeError),
        (None, 1, TypeError),
        ("a", 1.5, TypeError),
        ("a", "1", TypeError),
        ("a", True, TypeError),
        ("a", 2**64, OverflowError),
        ("a", -(2**63) - 4, OverflowError),
        ("\ud800", 1, ValueError),
    ):
        with pytest.raises(error):
            doms.add("web1", field, by)
        with doms.get("web1", timeout=0) as dom, pytest.raises(error):
            dom.add(field, by)
    with doms.get("web1") as dom:
        with pytest.raises(AlreadyLocked):
            doms.add("web1", "a")
        refused: list[Exception | None] = []

        def add() -> None:
            try:
                other.add("web1", "a", timeout=0)
            except LockTimeout as exc:
                refused.append(exc)

        thread = threading.Thread(target=add)
        thread.start()
        thread.join()
        assert len(refused) == 1
        dom.add("a")
        dom.rollback()
    with pytest.raises(DomainNotLocked):
        dom.add("a")
    assert doms["web1"].data == other["web1"].data == {"a": 3}


def test_what_add_asks_may_do_anything(doms: Any) -> None:
    """`by` unlocks the domain, while the number is asked for."""

    class Ends:
        def __index__(self) -> int:
            dom.unlock()
            return 1

    dom = doms.get("web1")
    with pytest.raises(DomainNotLocked):
        dom.add("a", Ends())
    assert doms["web1"].data is None


def test_nothing_is_lost_of_what_many_add(doms: Any, nursery: Nursery, segment_dir: Path) -> None:
    """In several processes, with a rename and a larger value now and then."""
    path = str(segment_dir / "list.segment")
    children = [nursery.start(add_many, path, 200) for _ in range(3)]
    names = ["web1", "web2"]
    for number in range(40):
        with doms.locked(), doms.get(uuid=UUID) as dom:
            doms.rename(dom, names[dom.name == names[0]])
            if number % 4 == 0:
                dom.data = {**(dom.data or {}), "padding": "x" * (number % 8 * 30)}
    for child in children:
        assert child.hear() == 200
        child.close()
    counted = {name: count for name, count in doms[UUID].data.items() if name != "padding"}
    assert sum(counted.values()) == 600


def add_many(pipe: Pipe, path: str, times: int) -> None:
    with DomainList.attach(path=path) as doms:
        other: Any = doms
        for number in range(times):
            other.add(UUID, "even" if number % 2 else "odd")
        pipe.say(times)
        pipe.rest()
