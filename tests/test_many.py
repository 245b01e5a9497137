"""Whole pieces of work in one call: counters, many domains at once, tables. For every store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
from helpers import EVERY_STORE, Party, Store, thread_party, xml

from shmdomains import (
    AlreadyLocked,
    DomainNotFound,
    DomainNotLocked,
    LockOrder,
    LockTimeout,
)

A, B = (UUID(int=number) for number in (10, 11))

pytestmark = pytest.mark.usefixtures("nothing_left")


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
