"""What was peeked at is of one moment, its definition too, whenever that is asked for.

In a list of more domains than the cache has places for it may be read only when it is asked for.
Whatever happened meanwhile, the answer is the definition of then or, there, `Busy`: never a later
one, never another domain's. What is small is read at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from helpers import definition
from killing import Nursery, Pipe, Planted, driver

from shmdomains import Busy, DomainList, SegmentCorrupt

ONE, TWO = UUID(int=1), UUID(int=2)
PLACES = 4096  # for definitions, in the cache of a list
FIRST = definition("web1", ONE, memory=1000)


@pytest.fixture(params=["few", "many"])
def many(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "many")


@pytest.fixture
def doms(segment_dir: Path, many: bool) -> Iterator[DomainList]:
    """The domain that is tested; or it shares its place in the cache with another one."""
    with DomainList.create("list", max_domains=PLACES + 4) as doms:
        if many:
            crowd = [definition(f"vm{n}", UUID(int=n + 10)) for n in range(PLACES)]
            for n in range(0, PLACES, 512):
                doms.assign_defs(crowd[n : n + 512])
        doms.define(FIRST)
        yield doms
        assert doms.closed or doms.check().counts["garbage"] == 0


@pytest.fixture
def other(doms: DomainList) -> Iterator[DomainList]:
    """The same list, which has seen no definition."""
    with DomainList.attach("list") as other:
        yield other


def peek(doms: DomainList, **how: Any) -> Any:
    """At web1; if there is one, that other domain has the place in the cache."""
    doms.peek("vm0")
    info = doms.peek("web1", **how)
    assert info is not None
    return info


def redefine(doms: DomainList, times: int) -> None:
    """Each as large as the first one, so that its place is soon used again."""
    for number in range(times):
        doms.define(definition("web1", ONE, memory=2000 + number))


def test_of_the_same_version(doms: DomainList, other: DomainList) -> None:
    info = peek(other)
    with doms.get("web1") as dom:
        dom.autostart = True
        dom.data = "x" * 500
    assert info.definition == FIRST and info.definition is info.definition
    later = other["web1"]
    assert later.definition is info.definition and later == other["web1"]
    assert (info.autostart, info.data) == (False, None)


def test_replaced_once(doms: DomainList, other: DomainList) -> None:
    """Nothing lies there yet that is another's."""
    info = peek(other)
    redefine(doms, 1)
    now = other["web1"]
    assert now.definition.memory == 2000
    assert info.definition == FIRST and info != now


CHANGES: dict[str, Callable[[DomainList], object]] = {
    "replaced": lambda doms: redefine(doms, 30),
    "removed": lambda doms: refill(doms, TWO, "web1"),
    "removed, and defined anew": lambda doms: refill(doms, ONE, "web1"),
}


def refill(doms: DomainList, uuid: UUID, name: str) -> None:
    """The slot of web1, over and over."""
    doms.undefine("web1")
    for number in range(20):
        doms.define(definition(name, uuid, memory=3000 + number, title="t" * number))
        doms.define(definition(name, uuid, memory=4000 + number))
        doms.undefine(name)
    doms.define(definition(name, uuid, memory=5000))


@pytest.mark.parametrize("change", CHANGES)
def test_of_what_is_gone(doms: DomainList, other: DomainList, many: bool, change: str) -> None:
    info, whole, bare = peek(other), peek(other, definitions=True), peek(other, definitions=False)
    CHANGES[change](doms)
    for _ in range(2):
        if not many:
            assert info.definition == FIRST
            continue
        with pytest.raises(Busy, match=rf"{ONE} was replaced .* peek\(\.\.\., definitions=True\)"):
            _ = info.definition
    assert (info.name, info.uuid, info.data, info.next_definition) == ("web1", ONE, None, None)
    assert whole.definition == FIRST
    assert (bare.name, bare.uuid) == ("web1", ONE)
    assert peek(other).definition.memory >= 2000


def test_what_this_process_has_seen_is_never_busy(doms: DomainList, other: DomainList) -> None:
    assert other["web1"].definition == FIRST
    info = other.peek("web1")
    assert info is not None
    redefine(doms, 30)
    assert info.definition == FIRST


def test_in_another_process(
    doms: DomainList, many: bool, nursery: Nursery, segment_dir: Path
) -> None:
    child = nursery.start(peek_and_ask, str(segment_dir / "list.segment"))
    assert child.hear() == "web1"
    redefine(doms, 30)
    assert child.ask() == ("Busy" if many else 1000)
    assert child.ask() == 2029
    child.close()


def peek_and_ask(pipe: Pipe, path: str) -> None:
    with DomainList.attach(path=path) as doms:
        info = peek(doms)
        pipe.say(info.name)
        pipe.listen()
        try:
            pipe.say(info.definition.memory)
        except Busy:
            pipe.say("Busy")
        pipe.listen()
        pipe.say(doms["web1"].definition.memory)
        pipe.rest()


def test_data_and_next_definition_are_read_at_once(doms: DomainList, other: DomainList) -> None:
    second = definition("web1", ONE, memory=2)
    for data in ("small", "x" * 300):
        with doms.get("web1") as dom:
            dom.activate()
            dom.data = data
        doms.define(second)
        info = peek(other)
        for number in range(30):
            with doms.get("web1") as dom:
                dom.data = data[:-1] + "y" * number
            doms.define(definition("web1", ONE, memory=50 + number))
        assert info.data == data and info.next_definition == second
        assert info.definition == FIRST
        doms.undefine("web1")
        with doms.get("web1") as dom:
            dom.deactivate()
        doms.define(FIRST)


def test_of_one_that_was_stopped(doms: DomainList, other: DomainList) -> None:
    """The next definition becomes the definition where it lies."""
    with doms.get("web1") as dom:
        dom.activate()
    doms.define(definition("web1", ONE, memory=2))
    info = peek(other)
    with doms.get("web1") as dom:
        dom.deactivate()
    stopped = peek(other)
    assert (info.definition, info.is_active) == (FIRST, True)
    assert (stopped.definition.memory, stopped.next_definition) == (2, None)


def test_of_a_list_that_was_closed(doms: DomainList, many: bool) -> None:
    infos = []
    for _ in range(2):
        with DomainList.attach("list") as other:
            infos.append(peek(other))
    del other
    seen, unseen = infos
    assert seen.definition == FIRST
    redefine(doms, 30)
    for _ in range(2):
        assert seen.definition == FIRST
        if many:
            with pytest.raises(Busy):
                _ = unseen.definition
        else:
            assert unseen.definition == FIRST
        doms.close()


def test_without_definitions(doms: DomainList, other: DomainList) -> None:
    info = peek(other, definitions=False)
    assert info.state == other["web1"].state
    for blob in ("definition", "next_definition", "data"):
        with pytest.raises(AttributeError, match="definitions=False"):
            getattr(info, blob)
    for how in ({}, {"definitions": False}, {"definitions": True}):
        assert other.peek("web2", **how) is None


def test_of_a_damaged_one(
    doms: DomainList, other: DomainList, many: bool, segment_dir: Path
) -> None:
    """That is no reason to come again."""
    assert driver() is not None, "no C compiler, so nobody says where the words of a segment lie"
    before = peek(other)
    with Planted(str(segment_dir / "list.segment")) as planted:
        extent = planted.read(planted.extent(PLACES if many else 0, 0))
        where = planted.at["heap"] + (extent >> 25) * 64 + 16
        with planted.changed(where, planted.read(where) ^ 1 << 9):
            with DomainList.attach("list") as fresh:
                info = before if many else peek(fresh)
            for _ in range(2):
                with pytest.raises(SegmentCorrupt, match="checksum does not fit"):
                    _ = info.definition
    assert peek(other).definition == FIRST
