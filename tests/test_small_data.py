"""Small data lies in the record: what comes in between, a collector, a rename that fails, a key
twice.

Kills at every store of these commits are in crash_driver.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from killing import Planted, xml

from shmdomains import DomainDef, DomainExists, DomainList, DomainNotLocked, SegmentFull

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "list.segment"


# --- the collector --------------------------------------------------------------------------------


class Garbage:
    """A cycle, which the collector ends by a call."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call, self.cycle = call, self

    def __del__(self) -> None:
        self.call()


def collecting(number: int, call: Callable[[], object], run: Callable[[], object]) -> None:
    """Run it, and have the collector call `call` when it makes its object `number`."""
    gc.collect()
    gc.disable()
    before = gc.get_threshold()
    try:
        Garbage(call)
        kept: list[object] = [[[] for _ in range(300)], [{} for _ in range(300)]]  # no spare ones
        gc.set_threshold(gc.get_count()[0] + number)
        gc.enable()
        run()
        del kept
    finally:
        gc.disable()
        gc.set_threshold(*before)
        gc.collect()
        gc.enable()


@pytest.mark.parametrize("number", range(6))
def test_the_collector_unlocks_while_data_is_assigned(path: Path, number: int) -> None:
    """Whoever assigns without the lock is told."""
    with DomainList.open(path=path) as doms:
        doms.define(xml("a"))
        dom = doms.get("a")
        told: list[bool] = []
        value = {"n": 7}

        def assign() -> None:
            try:
                dom.data = value
            except DomainNotLocked:
                told.append(True)
            else:
                told.append(not dom.is_locked)

        ended: list[bool] = []

        def unlock() -> None:
            if dom.is_locked and not told:
                ended.append(True)
                dom.unlock()

        collecting(number, unlock, assign)
        info = doms.peek("a")
        assert info is not None
        if ended:  # before the change was complete: then it is none; or after: then it is there
            assert info.data == {"n": 7} or told == [True]
            if info.data is None:
                with pytest.raises(DomainNotLocked):
                    dom.unlock()
        else:
            dom.rollback()
            dom.unlock()


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("name", ["a", "b"])
def test_the_collector_defines_a_domain_while_it_is_assigned(
    path: Path, name: str, number: int
) -> None:
    """Or one with its uuid. It is there once, and whoever comes second is told, or redefines it."""
    uuid = UUID(int=1)
    with DomainList.open(path=path) as doms, doms.locked():
        wanted = DomainDef.from_xml(xml("a", uuid, memory=1000))
        other = DomainDef.from_xml(xml(name, uuid, memory=2000))
        done: list[str] = []

        def assign(definition: DomainDef) -> None:
            try:
                doms.assign_def(definition).unlock()
            except DomainExists:
                done.append("refused")
            else:
                done.append(definition.name)

        collecting(number, lambda: not done and assign(other), lambda: assign(wanted))
        assert doms.check().problems == [] and len(doms) == 1
        [info] = doms.list()
        assert info.uuid == uuid and info.name in done
        assert name == "a" or "refused" in done or len(done) == 1


@pytest.mark.parametrize("number", range(6))
def test_the_collector_changes_the_domain_while_data_is_added_to(path: Path, number: int) -> None:
    """Both changes are there, and no other one."""
    with DomainList.open(path=path) as doms:
        doms.define(xml("a", memory=1000))
        with doms.get("a") as dom:
            dom.data = {"n": 0}
            larger = dom.definition.replace(memory=2000)
        held = [doms.get("a")]  # one that has changed nothing yet
        done: list[int] = []

        def change() -> None:
            if held and held[0].is_locked:
                held[0].definition = larger
                done.append(held[0].add("n", 10))

        collecting(number, change, lambda: done.append(held[0].add("n", 1)))
        held.pop().unlock()
        info = doms.peek("a", definitions=True)
        assert info is not None and info.data == {"n": sum({1, *(10 for _ in done[1:])})}
        if len(done) == 2:
            assert info.definition == larger


@pytest.mark.parametrize("number", range(6))
def test_the_collector_changes_a_value_that_is_assigned(path: Path, number: int) -> None:
    """What this process remembers is what the others read."""
    with DomainList.open(path=path) as doms, DomainList.open(path=path) as others:
        doms.define(xml("a"))
        value: dict[str, Any] = {"n": 1, **dict.fromkeys("abcdefghi", 0)}
        for key in "abcdefghi":  # a dict with gaps is copied one by one
            del value[key]
        with doms.get("a") as dom:
            collecting(number, lambda: value.update(n=2), lambda: setattr(dom, "data", value))
        here, there = doms.peek("a"), others.peek("a")
        assert here is not None and there is not None and here.data == there.data


def test_a_handle_that_the_collector_freed_is_one_as_any_other(path: Path) -> None:
    """It empties the list in which the handle kept its changes, and the handle is used again."""
    with DomainList.open(path=path) as doms:
        doms.define(xml("a"))
        for _ in range(3):
            with doms.get("a") as dom:
                dom.data = 1
            cycle: list[Any] = [dom]
            cycle.append(cycle)
            del cycle, dom
            gc.collect()
            with doms.get("a") as dom:
                dom.data = {"n": 2}
            assert doms["a"].data == {"n": 2}


# --- counting -------------------------------------------------------------------------------------


def test_adding_to_a_key_that_is_there_twice(path: Path) -> None:
    """The one that is read counts. No dict has such keys, but one with keys of a class of its own
    becomes such a map."""

    class Odd(str):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    with DomainList.open(path=path) as doms:
        doms.define(xml("a"))
        with doms.get("a") as dom:
            dom.data = {Odd("n"): 1, Odd("n"): 5}
            assert dom.data == {"n": 5} and dom.add("n") == 6 and dom.data == {"n": 6}


# --- a rename that fails --------------------------------------------------------------------------


def test_a_rename_that_fails_has_changed_nothing(path: Path) -> None:
    """There is room for the data, which goes to the heap, and none for the definition. Whoever
    waits for the next commit waits on."""
    with DomainList.create(path=path, max_domains=64, max_bytes=8 << 20) as doms:
        doms.define(xml("a", title="x" * 500))
        with doms.get("a") as dom:
            dom.data = {"n": 1}
        fill(doms)
        with Planted(path) as planted:
            seen = planted.read(planted.slot(0, "cur"))
            with doms.locked(), doms.find_by_name("a") as dom:
                with pytest.raises(SegmentFull):
                    doms.rename(dom, "b")
                assert dom.data == {"n": 1} and not dom.changed
            assert planted.read(planted.slot(0, "cur")) == seen
        assert doms.check().counts["garbage"] == 0


def fill(doms: DomainList) -> None:
    """Leave three cells of the heap: room for small data, and for no definition."""
    names = [f"f{number}" for number in range(60)]
    for name in names:
        doms.define(xml(name))
    last = ""
    for size in (1 << 20, 1 << 18, 1 << 16, 1 << 14, 1 << 12, 2000, 1000, 500, 250, 150):
        while names:
            try:
                with doms.get(names[-1]) as dom:
                    dom.data = "z" * size
            except SegmentFull:
                break
            last = names.pop()
    assert names and size == 150
    with doms.get(last) as dom:
        dom.data = None


def test_data_comes_back_after_a_rename(path: Path) -> None:
    """It is in the heap then, and the next change of it brings it back: no cell is left over."""
    with DomainList.open(path=path) as doms:
        doms.define(xml("a"))
        with doms.get("a") as dom:
            dom.data = {"n": 1}
        before = doms.check().counts["extents"]
        with doms.locked(), doms.find_by_name("a") as dom:
            doms.rename(dom, "b" * 200)
            assert dom.data == {"n": 1}
            assert doms.check().counts["extents"] == before + 1
        assert doms.add("b" * 200, "n") == 2
        assert doms.check().counts["extents"] == before


def test_what_was_added_is_read_before_the_commit(path: Path) -> None:
    """And added to once more after that."""
    with DomainList.open(path=path) as doms:
        doms.define(xml("a"))
        with doms.get("a") as dom:
            dom.add("n", 3)
            assert dom.data == {"n": 3}
            dom.add("n", -3)
            assert dom.data == {"n": 0}
        info = doms.peek("a")
        assert info is not None and info.data == {"n": 0}


def test_what_define_returns_is_what_was_defined(path: Path) -> None:
    """Its definition was read with the domain locked, so nobody has replaced it."""
    with DomainList.open(path=path) as doms, DomainList.open(path=path) as others:
        info = doms.define(xml("a", memory=1000))
        others.undefine("a")
        others.define(xml("a", memory=2000))
        assert info.definition.name == "a" and "1000" in info.definition.to_xml()
