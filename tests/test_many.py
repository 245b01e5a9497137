"""Whole pieces of work in one call: counters, many domains at once, tables. For every store."""

from __future__ import annotations

import ctypes
import os
import signal
from array import array
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
from helpers import EVERY_STORE, STORES, Party, Store, definition, thread_party, xml

from shmdomains import (
    AlreadyLocked,
    DomainActive,
    DomainBusy,
    DomainDef,
    DomainExists,
    DomainList,
    DomainLocked,
    DomainNotFound,
    DomainNotLocked,
    DomainState,
    ListNotLocked,
    LockOrder,
    LockTimeout,
    PausedReason,
    SegmentFull,
    TooManyLocks,
    WrongList,
)
from shmdomains.table import Table, Texts
from shmdomains.xml.definition import EncodedDef

A, B, C, D = (UUID(int=number) for number in (10, 11, 12, 13))

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.filterwarnings("error::ResourceWarning"),  # a handle that was left locked
]


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    store: Store = request.param
    return store.make


@pytest.fixture
def doms(make: Callable[[], Any]) -> Iterator[Any]:
    """A list with the domains ``a`` and ``b``."""
    doms = make()
    doms.define(xml("a", A))
    doms.define(xml("b", B))
    yield doms
    assert doms.check().problems == []
    doms.close()


@pytest.fixture
def other(doms: Any) -> Iterator[Party]:
    """Another thread that knows `doms`."""
    with thread_party(doms=doms) as party:
        yield party


# --- counters ----------------------------------------------------------------------------------


def test_a_counter_begins_at_0(doms: Any) -> None:
    with doms.get("a") as dom:
        assert dom.data is None
        assert (dom.add("requests"), dom.add("requests", 41), dom.add("bytes", -7)) == (1, 42, -7)
        assert doms.peek("a").data is None
    assert doms.peek("a").data == {"requests": 42, "bytes": -7}


def test_a_counter_is_part_of_the_transaction(doms: Any) -> None:
    doms.add("a", "requests", 5)
    with pytest.raises(ZeroDivisionError), doms.get("a") as dom:
        assert dom.add("requests") == 6
        raise ZeroDivisionError
    assert doms.peek("a").data == {"requests": 5}
    with doms.get("a") as dom:
        dom.data = {"requests": 100}
        assert dom.add("requests") == 101
        dom.rollback()
        assert dom.add("requests") == 6


def test_a_counter_leaves_the_other_data_as_it_is(doms: Any) -> None:
    rest = {"name": "ü", "raw": b"\0\xff", "half": 0.5, "none": None, "flag": True, 7: "seven"}
    rest["deep"] = {"list": [1, {"two": 2}], "tuple": (3,)}
    with doms.get("a") as dom:
        dom.data = {**rest, "requests": 1}
    before = dict(doms.peek("a").data)
    assert doms.add("a", "requests") == 2
    assert dict(doms.peek("a").data) == {**before, "requests": 2}
    assert list(doms.peek("a").data) == list(before)


@pytest.mark.parametrize("key", ["position", "uuid", "name", "id", "info", "handle"])
def test_add_takes_a_key_as_get_does(doms: Any, key: str) -> None:
    with doms.get("a") as dom:
        number = dom.activate()
    by_position = {"position": "a", "info": doms.peek("a"), "handle": dom}
    if key in by_position:
        assert doms.add(by_position[key], "requests") == 1
    else:
        named = {key: {"uuid": A, "name": "a", "id": number}[key]}
        assert doms.add(**named, field="requests", by=1) == 1
    assert (doms.peek("a").data, doms.peek("b").data) == ({"requests": 1}, None)


MIN, MAX = -(1 << 63), (1 << 64) - 1


@pytest.mark.parametrize("before, by", [(MAX - 1, 1), (MIN + 1, -1), (MIN, MAX), (MAX, MIN)])
def test_a_counter_holds_what_messagepack_can(doms: Any, before: int, by: int) -> None:
    with doms.get("a") as dom:
        dom.data = {"count": before}
    assert doms.add("a", "count", by) == before + by
    assert doms.peek("a").data == {"count": before + by}


REFUSED = [
    pytest.param({"count": MAX}, 1, OverflowError, "'count' would be 18446744073709551616", id="<"),
    pytest.param(
        {"count": MIN}, -1, OverflowError, "'count' would be -9223372036854775809", id=">"
    ),
    pytest.param({}, 1 << 64, OverflowError, "would be", id="0"),
    pytest.param({"count": "7"}, 1, TypeError, "'count' of the data is no int, but str", id="str"),
    pytest.param({"count": 7.0}, 1, TypeError, "no int, but float", id="float"),
    pytest.param({"count": True}, 1, TypeError, "no int, but bool", id="bool"),
    pytest.param({"count": None}, 1, TypeError, "no int, but NoneType", id="None"),
    pytest.param({"count": {"x": 1}}, 1, TypeError, "no int", id="mapping"),
    pytest.param([1], 1, TypeError, "no mapping, but tuple", id="list"),
    pytest.param(7, 1, TypeError, "no mapping, but int", id="int"),
    pytest.param("count", 1, TypeError, "no mapping, but str", id="text"),
    pytest.param({"count": 7}, True, TypeError, "True cannot be added", id="by bool"),
    pytest.param({"count": 7}, 1.0, TypeError, "float", id="by float"),
    pytest.param({"count": 7}, "1", TypeError, "str", id="by str"),
]


@pytest.mark.parametrize("data, by, error, words", REFUSED)
def test_what_cannot_be_counted_stays_as_it_is(
    doms: Any, data: Any, by: Any, error: type[Exception], words: str
) -> None:
    with doms.get("a") as dom:
        dom.data = data
        dom.commit()
        before = dom.data
        with pytest.raises(error, match=words):
            dom.add("count", by)
        assert not dom.changed and dom.data == before
    with pytest.raises(error, match=words):
        doms.add("a", "count", by)
    assert doms.peek("a").data == before
    with doms.get("a", timeout=0):
        pass


def test_add_says_what_is_missing(doms: Any) -> None:
    with pytest.raises(TypeError, match="which integer of the data"):
        doms.add("a")
    with pytest.raises(TypeError, match="exactly one key"):
        doms.add(None, "requests")
    with pytest.raises(TypeError, match="named by a str, not int"):
        doms.add("a", 7)
    with pytest.raises(DomainNotFound, match="'nobody'"):
        doms.add("nobody", "requests")
    with pytest.raises(ValueError):
        doms.add("a", "requests", 1, -1)
    assert doms.peek("a").data is None


def test_who_must_hold_what_to_add(doms: Any, other: Party) -> None:
    with doms.get("a") as dom:
        with pytest.raises(AlreadyLocked):
            doms.add("a", "requests")
        with pytest.raises(LockOrder):
            doms.add("b", "requests")
        assert doms.add("b", "requests", timeout=0) == 1
    with pytest.raises(DomainNotLocked):
        dom.add("requests")
    other.tell("dom = doms.get('a')")
    with pytest.raises(LockTimeout, match="'a'"):
        doms.add("a", "requests", timeout=0.02)
    other.tell("dom.unlock()")
    assert doms.add("a", "requests", timeout=5) == 1


def test_no_addition_is_lost(doms: Any, other: Party) -> None:
    call = "[doms.add('a', 'requests') for _ in range(50)][-1]"
    other.start(call)
    for _ in range(50):
        doms.add("a", "requests")
    assert other.answer() >= 50
    assert doms.peek("a").data == {"requests": 100}


# --- get_many ----------------------------------------------------------------------------------


def test_get_many_takes_keys_as_get_does(doms: Any) -> None:
    doms.define(xml("c", C))
    doms.define(xml("d", D))
    with doms.get("d") as handle:
        number = handle.activate()
    keys = [str(C), "b", number, doms.peek("a")]
    with doms.get_many(iter(keys)) as many:
        assert [dom.name for dom in many] == ["c", "b", "d", "a"]
        assert all(dom.is_locked for dom in many) and len(many) == 4
        many[1].data = "changed"
    assert doms.peek("b").data == "changed"
    with doms.get_many([handle]) as (dom,):
        assert dom.name == "d" and dom is not handle
    with doms.get_many([]) as none:
        assert list(none) == []
    doms.undefine("c")
    with doms.locked(), pytest.raises(DomainNotFound):
        doms.get_many([C])


def test_get_many_is_all_or_nothing(doms: Any, other: Party) -> None:
    other.tell("dom = doms.get('b')")
    for keys, error in ((["a", "b"], LockTimeout), (["a", "nobody"], DomainNotFound)):
        with pytest.raises(error):
            doms.get_many(keys, timeout=0.02)
        with doms.get("a", timeout=0):
            pass
    with pytest.raises(AlreadyLocked):
        doms.get_many(["a", "a"])
    with pytest.raises(ValueError):
        doms.get_many([], timeout=-1)
    other.tell("dom.unlock()")
    with pytest.raises(ZeroDivisionError), doms.get_many(["a", "b"]) as many:
        for dom in many:
            dom.data = "not this"
        raise ZeroDivisionError
    assert [doms.peek(name).data for name in "ab"] == [None, None]
    with doms.get("a"), pytest.raises(LockOrder):
        doms.get_many(["b"])


# --- assign_defs -------------------------------------------------------------------------------


def everything(doms: Any) -> list[tuple[Any, ...]]:
    return sorted(
        (info.name, info.uuid, info.persistent, info.definition.title, info.next_definition)
        for info in doms.snapshot()
    )


def test_definitions_are_entered_in_their_order(doms: Any) -> None:
    wanted = [
        definition("d", D, title="d"),
        definition("b", B, title="b"),
        definition("e", title="e"),
        definition("a", title="a"),
        definition("c", C, title="c"),
    ]
    with doms.assign_defs(iter(wanted)) as many:
        assert [dom.name for dom in many] == ["d", "b", "e", "a", "c"]
        assert all(dom.is_locked for dom in many) and not doms.is_locked
        assert [dom.definition.title for dom in many] == ["d", "b", "e", "a", "c"]
        assert [dom.persistent for dom in many] == [False, True, False, True, False]
        # New ones are there, what was replaced is not yet.
        assert {info.name: info.definition.title for info in doms.snapshot()} == {
            "a": None,
            "b": None,
            "c": "c",
            "d": "d",
            "e": "e",
        }
    assert [doms.peek(name).definition.title for name in "abcde"] == list("abcde")
    assert (doms.peek("a").uuid, doms.peek("c").uuid) == (A, C)
    assert doms.peek("e").definition.uuid == doms.peek("e").uuid


def test_an_active_domain_gets_its_next_definition(doms: Any) -> None:
    with doms.get("a") as dom:
        dom.activate()
    with doms.assign_defs([definition("a", A, title="next"), definition("c")], persistent=False):
        pass
    info = doms.peek("a")
    assert (info.definition.title, info.next_definition.title) == (None, "next")
    assert [doms.peek(name).persistent for name in "abc"] == [False, True, False]
    with doms.assign_defs([definition("a", A), definition("c")], persistent=True):
        pass
    assert [doms.peek(name).persistent for name in "abc"] == [True, True, True]


def test_encoded_definitions_are_entered_as_they_are(doms: Any) -> None:
    wanted = [definition("c", C, title="new"), definition("a", A, title="old"), definition("d")]
    with doms.assign_defs(EncodedDef.of(one) for one in wanted) as many:
        assert [dom.definition.title for dom in many] == ["new", "old", None]


def test_a_block_that_fails_rolls_back_what_was_replaced(doms: Any) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        doms.assign_defs([definition("a", A, title="not this"), definition("c", C)]),
    ):
        raise ZeroDivisionError
    assert doms.peek("a").definition.title is None
    assert doms.peek("c").uuid == C  # as after assign_def


IN_VAIN: dict[str, tuple[list[DomainDef], type[Exception], str]] = {
    "a name twice": ([definition("c", C), definition("c", D)], DomainExists, "'c'"),
    "a name twice, without uuids": ([definition("c"), definition("c")], DomainExists, "'c'"),
    "one that is there twice": ([definition("a"), definition("a", A)], DomainExists, "'a'"),
    "a uuid twice": ([definition("c", C), definition("d", C)], DomainExists, "'c' and 'd'"),
    "another uuid": ([definition("c"), definition("a", C)], DomainExists, str(A)),
    "another name": ([definition("c"), definition("d", A)], DomainExists, "'a'"),
    "one that is locked": (
        [definition("c"), definition("a", A, title="x"), definition("b", B), definition("d")],
        LockTimeout,
        "'b'",
    ),
}


@pytest.mark.parametrize("held", [False, True], ids=["", "list held"])
@pytest.mark.parametrize("why", IN_VAIN)
def test_all_definitions_or_none(doms: Any, other: Party, why: str, held: bool) -> None:
    wanted, error, words = IN_VAIN[why]
    before, events = everything(doms), doms._event_count
    other.tell("dom = doms.get('b')")
    if held:
        doms.lock()
    with pytest.raises(error, match=words):
        doms.assign_defs(wanted, persistent=True, timeout=0.02)
    assert doms.is_locked == held
    if held:
        doms.unlock()
    other.tell("dom.unlock()")
    assert everything(doms) == before
    assert doms._event_count == events  # nobody heard of it
    with doms.get_many(["a", "b"], timeout=0):
        pass


@pytest.mark.parametrize("held", [False, True], ids=["", "list held"])
def test_an_error_among_the_new_ones_takes_them_back(
    doms: Any, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    before, insert = everything(doms), type(doms)._insert

    def full(self: Any, uuid: Any, name: str, *rest: Any) -> Any:
        dom = insert(self, uuid, name, *rest)
        if name == "d":
            raise SegmentFull("no room for d")
        return dom

    took_back, with_list = type(doms)._take_back, list[bool]()

    def take_back(self: Any, *args: Any) -> None:
        with_list.append(self.is_locked)
        took_back(self, *args)

    monkeypatch.setattr(type(doms), "_insert", full)
    monkeypatch.setattr(type(doms), "_take_back", take_back)
    wanted = [definition("c"), definition("a", A, title="x"), definition("d"), definition("e")]
    if held:
        doms.lock()
    with pytest.raises(SegmentFull):
        doms.assign_defs(wanted)
    assert doms.is_locked == held
    assert with_list == [True, True]  # nobody else could have had them
    if held:
        doms.unlock()
    assert everything(doms) == before
    monkeypatch.undo()
    with doms.assign_defs(wanted) as many:
        assert len(many) == 4


def test_an_error_after_the_list_lock_takes_all_back(
    doms: Any, other: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a signal handler does: by then others may have what is new, and change it."""
    before = everything(doms)

    class Interrupted:
        def __enter__(self) -> None:
            doms.lock()

        def __exit__(self, *exc: object) -> None:
            doms.unlock()
            raise KeyboardInterrupt

    monkeypatch.setattr(type(doms), "_list_held", lambda doms, timeout: Interrupted())
    took_back = type(doms)._take_back

    def take_back(self: Any, dom: Any, *rest: Any) -> None:
        monkeypatch.undo()
        if doms.peek("d") is not None and doms.peek("d").data is None:
            other.tell("with doms.get('d', timeout=5) as dom: dom.data = 'mine'")
        took_back(self, dom, *rest)

    monkeypatch.setattr(type(doms), "_take_back", take_back)
    with pytest.raises(KeyboardInterrupt):
        doms.assign_defs([definition("c"), definition("a", A, title="x"), definition("d", D)])
    assert doms.peek("d").data == "mine"
    remove(doms, "d")
    assert everything(doms) == before
    with doms.get_many(["a", "b"], timeout=0):
        pass


def remove(doms: Any, name: str) -> None:
    with doms.locked():
        doms.remove_inactive(name)


def test_who_must_hold_what_to_assign(doms: Any) -> None:
    with doms.get("a"), pytest.raises(LockOrder):
        doms.assign_defs([definition("c")])
    with doms.locked(), doms.get("a"):
        with pytest.raises(AlreadyLocked):
            doms.assign_defs([definition("c"), definition("a")])
        with doms.assign_defs([definition("d")]) as (dom,):
            assert dom.name == "d"
    with pytest.raises(ValueError):
        doms.assign_defs([], timeout=-1)
    with doms.assign_defs([]) as none:
        assert len(none) == 0
    assert [info.name for info in doms.list()] == ["a", "b", "d"]
    with pytest.raises(ListNotLocked):
        doms.assign_def(definition("c"))


def test_more_than_can_be_held_are_refused_at_once(doms: Any) -> None:
    before = everything(doms)
    with pytest.raises(TooManyLocks, match=r"1001 definitions at once: .* work in batches"):
        doms.assign_defs(definition(f"d{number}") for number in range(1001))
    assert everything(doms) == before


# --- update_many -------------------------------------------------------------------------------


def notes(error: BaseException) -> str:
    """What a note says; before Python 3.11 the message does."""
    return " ".join(getattr(error, "__notes__", [str(error)]))


def test_each_domain_gets_its_fields(doms: Any) -> None:
    doms.define(xml("c", C))
    for name in "ac":
        with doms.get(name) as dom:
            dom.activate(pid=7)
    assert (
        doms.update_many(
            {
                "c": {"data": {"n": [1]}, "autostart": True, "pid": 4711},
                A: {"reason": PausedReason.USER, "state": DomainState.PAUSED, "persistent": False},
                doms.peek("b"): {},
            }
        )
        == 3
    )
    a, c = doms.peek("a"), doms.peek("c")
    assert (a.state, a.reason, a.persistent) == (DomainState.PAUSED, PausedReason.USER, False)
    assert (a.pid, a.autostart, a.data) == (7, False, None)
    assert (c.pid, c.autostart, c.persistent, c.data["n"]) == (4711, True, True, (1,))
    assert c.state == DomainState.RUNNING
    pairs = [("a", {"state": 1}), ("a", {"pid": None}), ("b", {"data": "x"}), ("b", {"data": None})]
    assert doms.update_many(iter(pairs), timeout=5) == 4
    assert (doms.peek("a").state, doms.peek("a").reason, doms.peek("a").pid) == (1, 0, None)
    assert doms.peek("b").data is None
    assert doms.update_many({}) == doms.update_many([]) == 0


def test_each_change_is_a_commit_of_its_own_in_the_order_given(doms: Any) -> None:
    for name in "ab":
        with doms.get(name) as dom:
            dom.activate()
    watch = doms.watch(timeout=0)
    doms.update_many([("b", {"state": 3}), ("a", {"state": 3}), ("b", {"state": 1})])
    assert [(event.name, event.words) for event in watch] == [
        ("b", "Suspended Paused"),
        ("a", "Suspended Paused"),
        ("b", "Resumed Unpaused"),
    ]


SEEN_BEFORE: dict[str, tuple[Any, type[Exception], str]] = {
    "an unknown field": ({"b": {"title": "x"}}, ValueError, "'b' has no field 'title'.* state, re"),
    "id": ({B: {"id": 7}}, ValueError, "no field 'id'"),
    "a state": ({"b": {"state": 99}}, ValueError, "99"),
    "a reason": ({"b": {"reason": -1}}, ValueError, "0 to 65535"),
    "a pid": ({"b": {"pid": 0}}, ValueError, "no process id"),
    "no key": ({2.5: {}}, TypeError, "not float"),
}


@pytest.mark.parametrize("why", SEEN_BEFORE)
def test_what_can_be_seen_before_is_refused_before(doms: Any, why: str) -> None:
    changes, error, words = SEEN_BEFORE[why]
    with pytest.raises(error, match=words):
        doms.update_many([("a", {"data": "not this"}), *changes.items()])
    assert doms.peek("a").data is None


@pytest.mark.parametrize("why", ["missing", "locked", "value"])
def test_an_error_in_the_middle_keeps_what_was_done(doms: Any, other: Party, why: str) -> None:
    doms.define(xml("c", C))
    other.tell("dom = doms.get('b')" if why == "locked" else "dom = None")
    bad, error = {
        "missing": (("nobody", {"data": 1}), DomainNotFound),
        "locked": (("b", {"data": 1}), LockTimeout),
        "value": (("b", {"pid": 7, "data": object()}), TypeError),
    }[why]
    with pytest.raises(error) as caught:
        doms.update_many([("a", {"data": 1}), bad, ("c", {"data": 1})], timeout=0.05)
    assert "1 of 3 domains were changed before" in notes(caught.value)
    other.tell("dom and dom.unlock()")
    assert [(doms.peek(name).data, doms.peek(name).pid) for name in "abc"] == [
        (1, None),
        (None, None),
        (None, None),
    ]
    with doms.get_many("abc", timeout=0):
        pass


def test_who_must_hold_what_to_update(doms: Any) -> None:
    with doms.get("a"):
        with pytest.raises(AlreadyLocked):
            doms.update_many({"a": {"data": 1}})
        with pytest.raises(LockOrder):
            doms.update_many({"b": {"data": 1}})
    with pytest.raises(ValueError):
        doms.update_many({}, timeout=-1)
    with doms.locked():
        assert doms.update_many({"b": {"data": 1}}) == 1


# --- remove_many -------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True], ids=["", "list held"])
def test_many_are_removed(doms: Any, held: bool) -> None:
    doms.define(xml("c", C))
    doms.define(xml("d", D))
    with doms.get("d") as handle:
        pass
    if held:
        doms.lock()
    assert doms.remove_many(iter(["b", str(C), handle])) == 3
    assert doms.is_locked == held
    assert [info.name for info in doms.list()] == ["a"]
    assert doms.remove_many([]) == 0
    if held:
        doms.unlock()


def test_an_error_in_the_middle_keeps_what_was_removed(doms: Any) -> None:
    doms.define(xml("c", C))
    with doms.get("b") as dom:
        dom.activate()
    with pytest.raises(DomainActive, match="'b'") as caught:
        doms.remove_many(["a", "b", "c"])
    assert "1 of 3 domains were removed before" in notes(caught.value)
    assert [info.name for info in doms.list()] == ["b", "c"] and not doms.is_locked
    with doms.locked(), pytest.raises(DomainNotFound) as caught:
        doms.remove_many(["c", "c"])
    assert "1 of 2" in notes(caught.value)


def test_what_is_held_is_not_removed(doms: Any, other: Party, make: Callable[[], Any]) -> None:
    with doms.get("b") as dom, pytest.raises(LockOrder):
        doms.remove_many(["a"])
    with (
        doms.locked(),
        doms.get("b") as dom,
        pytest.raises(DomainLocked, match="unlock it first"),
    ):
        doms.remove_many(["a", dom])
    another = make()
    another.define(xml("x"))
    with another.get("x") as foreign:
        pass
    with pytest.raises(WrongList):
        doms.remove_many(["a", foreign])
    another.close()
    with pytest.raises(TypeError, match="not float"):
        doms.remove_many(["a", 2.5])
    with pytest.raises(ValueError):
        doms.remove_many([], timeout=-1)
    assert len(doms) == 2
    other.tell("dom = doms.get('a')")
    with pytest.raises(LockTimeout, match="'a'"):
        doms.remove_many(["b", "a"], timeout=0.05)
    other.tell("dom.unlock()")
    assert [info.name for info in doms.list()] == ["a"]


def test_a_job_excludes_the_removal(doms: Any, other: Party) -> None:
    other.tell("job = doms.job('b', 'backup'); job.__enter__() and None")
    with pytest.raises(DomainBusy) as caught:
        doms.remove_many(["a", "b"], timeout=0.05)
    assert "1 of 2" in notes(caught.value)
    other.tell("job.__exit__(None, None, None)")
    assert doms.remove_many(["b"]) == 1


# --- table -------------------------------------------------------------------------------------

DEFAULT = ("id", "name", "uuid", "state", "reason", "persistent", "autostart", "pid")


@pytest.fixture
def various(doms: Any) -> Any:
    """`doms` with domains that differ in every column, and names that are not ASCII."""
    with doms.assign_defs([definition("grün", C), definition("北京", D)]) as (green, beijing):
        green.activate(pid=4711, state=DomainState.PAUSED, reason=PausedReason.USER)
        green.autostart = True
        beijing.activate(reason=900)
    return doms


def as_rows(doms: Any, columns: tuple[str, ...]) -> list[tuple[Any, ...]]:
    def value(info: Any, column: str) -> Any:
        if column == "active":
            return int(info.is_active)
        found = getattr(info, column)
        if column == "uuid":
            return found.bytes
        if column == "name":
            return found
        return -1 if found is None else int(found)

    return [tuple(value(info, column) for column in columns) for info in doms.list()]


def test_a_table_says_what_a_list_says(various: Any) -> None:
    table = various.table()
    assert isinstance(table, Table) and table.columns == DEFAULT and len(table) == 4
    assert list(table) == list(table.rows()) == as_rows(various, DEFAULT)
    columns = (*reversed(DEFAULT), "active")
    assert various.table(columns).columns == columns
    assert list(various.table(iter(columns))) == as_rows(various, columns)
    rows = {row[0]: row[1:] for row in various.table(("name", "id", "pid", "reason", "active"))}
    assert rows["a"] == (-1, -1, 0, 0)
    assert rows["grün"][1:] == (4711, int(PausedReason.USER), 1) and rows["grün"][0] > 0
    assert rows["北京"][1:] == (-1, 900, 1)


def test_the_columns_are_buffers(various: Any) -> None:
    table = various.table((*DEFAULT, "active"))
    for name in ("id", "pid", "state", "reason"):
        assert type(table[name]) is array and table[name].typecode == "i"
    for name in ("persistent", "autostart", "active"):
        assert type(table[name]) is array and table[name].typecode == "B"
    for name in table.columns:
        assert len(table[name]) == 4
    uuids = memoryview(table["uuid"])
    assert (uuids.shape, uuids.format, uuids.c_contiguous) == ((4, 16), "B", True)
    assert uuids.tobytes() == b"".join(info.uuid.bytes for info in various.list())
    names = table["name"]
    assert isinstance(names, Texts)
    assert (type(names.offsets), names.offsets.typecode, len(names.offsets)) == (array, "i", 5)
    assert names.offsets.itemsize == ctypes.sizeof(ctypes.c_int32)  # what Arrow wants
    assert type(names.data) is bytes
    bounds = zip(names.offsets, names.offsets[1:], strict=False)
    assert [names.data[start:end].decode() for start, end in bounds] == [
        info.name for info in various.list()
    ]


@pytest.mark.parametrize(
    "filters",
    [
        {"active": True},
        {"active": False},
        {"persistent": True},
        {"autostart": True},
        {"state": "paused"},
        {"state": [DomainState.RUNNING, "shut off"], "persistent": False},
        {"host": "elsewhere"},
        {"active": True, "active_too": True},
    ],
    ids=str,
)
def test_a_table_has_the_filters_of_list(various: Any, filters: dict[str, Any]) -> None:
    if filters.pop("active_too", False):
        with pytest.raises(TypeError):
            various.table(("name",), True)
        return
    table = various.table(("name",), **filters)
    expected = [info.name for info in various.list(**filters)]
    assert list(table["name"]) == expected and len(table) == len(expected)


def test_a_table_of_nothing(doms: Any) -> None:
    table = doms.table((*DEFAULT, "active"), active=True)
    assert len(table) == 0 and list(table) == []
    assert memoryview(table["uuid"]).shape == (0, 16)
    assert (list(table["name"]), table["name"].data, table["id"]) == ([], b"", array("i"))
    assert table["name"].offsets == array("i", [0])
    without = doms.table(())
    assert (len(without), without.columns, list(without)) == (2, (), [(), ()])


def test_a_column_that_there_is_not(doms: Any) -> None:
    with pytest.raises(ValueError, match=r"no column 'memory'; there are id, name, uuid, .*active"):
        doms.table(("id", "memory"))
    with pytest.raises(ValueError, match="'id' is asked for twice"):
        doms.table(("id", "name", "id"))
    with pytest.raises(TypeError, match="several names"):
        doms.table("id")
    with pytest.raises(KeyError, match="'name' in this table, which has id, pid"):
        doms.table(("id", "pid"))["name"]


def test_a_table_takes_no_lock(doms: Any, other: Party) -> None:
    other.tell("doms.lock(); dom = doms.find_by_name('a'); dom.data = 'not yet'; dom.activate()")
    with doms.get("b", timeout=5) as dom:
        dom.activate()
        assert list(doms.table(("name", "active"))) == [("a", 0), ("b", 0)]
    other.tell("dom.unlock(); doms.unlock()")
    assert list(doms.table(("name", "active"))) == [("a", 1), ("b", 1)]


def test_texts_are_a_sequence() -> None:
    for words in (["web1", "", "db"], ["grün", "", "北京", "\U0001f600"], []):
        texts = Texts.of(words)
        assert (list(texts), len(texts)) == (words, len(words))
        assert [texts[at] for at in range(len(words))] == words
        assert [texts[at - len(words)] for at in range(len(words))] == words
        assert (texts[1:], texts[::-1]) == (words[1:], words[::-1])
        assert texts == Texts.of(words) and texts != Texts.of([*words, "more"])
        with pytest.raises(IndexError):
            texts[len(words)]
    assert "db" in Texts.of(["db"]) and Texts.of(["ab", "c"]) != Texts.of(["a", "bc"])


# --- deaths ------------------------------------------------------------------------------------


def die_holding(doms: DomainList, work: str) -> int:
    """Have a child killed that holds what this work locked; its process id."""
    names = {"doms": doms, "definition": definition}
    child = os.fork()
    if child == 0:
        try:
            exec(work, names)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0) == (child, signal.SIGKILL)
    return child


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.name)
def test_a_death_is_told_to_who_looks_for_it(store: Store) -> None:
    """A call that changes a domain by itself shows its handle to nobody."""
    with store.make(room=8) as doms:
        doms.define(xml("a", A))
        killed = die_holding(doms, "held = doms.get('a'); held.data = 'not this'")
        assert doms.add("a", "requests") == 1
        assert doms.update_many({"a": {"pid": 7}}) == 1
        with doms.get("a") as dom:
            assert dom.previous_owner_died is not None and dom.previous_owner_died.pid == killed
            assert (dom.data, dom.pid) == ({"requests": 1}, 7)
        doms.add("a", "requests")
        with doms.get("a") as dom:
            assert dom.previous_owner_died is None
        assert doms.check().problems == []


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.name)
def test_a_death_leaves_what_is_new_and_not_what_was_replaced(store: Store) -> None:
    with store.make(room=8) as doms:
        doms.define(xml("a", A))
        die_holding(
            doms,
            "held = doms.assign_defs([definition('c'), definition('a', title='not this')])\n"
            "for dom in held: dom.data = 'not this'",
        )
        with doms.get_many(["a", "c"], timeout=5) as many:
            assert [(dom.name, dom.data, dom.definition.title) for dom in many] == [
                ("a", None, None),
                ("c", None, None),
            ]
        assert doms.check().problems == []
