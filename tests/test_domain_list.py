"""Every method and every error of `DomainList`, for every store.

What two parties see of each other is in test_conformance.py; here one thread uses the list, and
`other`, a second thread, stands by to hold what the first one wants.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import pickle
import signal
import time
import uuid as uuid_module
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from helpers import Party, Store, definition, thread_party, xml

import shmdomains
from shmdomains import (
    AlreadyLocked,
    ContractError,
    DefinitionError,
    Domain,
    DomainActive,
    DomainDef,
    DomainExists,
    DomainInfo,
    DomainList,
    DomainLocked,
    DomainNotFound,
    DomainNotLocked,
    DomainRemoved,
    DomainState,
    DomainTransient,
    InvalidName,
    ListClosed,
    ListNotLocked,
    LockedDomains,
    LockOrder,
    LockTimeout,
    NotOwner,
    PausedReason,
    SegmentFull,
    ShmDomainsError,
    ShutoffReason,
    TooManyLocks,
    UncommittedChanges,
    WrongList,
)
from shmdomains.memory._core import core
from shmdomains.xml.definition import EncodedDef

pytestmark = pytest.mark.usefixtures("nothing_left")

WEB1 = UUID("11111111-2222-4333-8444-555555555555")
WEB2 = UUID("66666666-7777-4888-8999-aaaaaaaaaaaa")


@pytest.fixture
def web1(doms: DomainList) -> DomainInfo:
    """A persistent, inactive domain with uuid WEB1."""
    return doms.define(xml("web1", WEB1))


def names(infos: Any) -> list[str]:
    return sorted(info.name for info in infos)


def handle(doms: DomainList, name: str = "web1") -> Domain:
    """An unlocked handle."""
    dom = doms.get(name=name)
    dom.unlock()
    return dom


# --- the list lock -----------------------------------------------------------------------------


def test_the_list_lock(doms: DomainList) -> None:
    assert not doms.is_locked
    doms.lock()
    assert doms.is_locked
    doms.unlock()
    assert not doms.is_locked


def test_the_list_lock_is_not_recursive(doms: DomainList) -> None:
    with doms.locked():
        for again in (doms.lock, doms.acquire, lambda: doms.lock(0), lambda: doms.lock(1)):
            with pytest.raises(AlreadyLocked):
                again()
        assert doms.is_locked
    assert not doms.is_locked


def test_unlocking_a_list_that_is_not_locked(doms: DomainList) -> None:
    for release in (doms.unlock, doms.release):
        with pytest.raises(ListNotLocked):
            release()


def test_another_thread_may_not_unlock_the_list(doms: DomainList, other: Party) -> None:
    other.tell("doms.lock()")
    for release in (doms.unlock, doms.release):
        with pytest.raises(NotOwner):
            release()
    assert other.tell("doms.is_locked") and not doms.is_locked
    other.tell("doms.unlock()")
    with pytest.raises(ListNotLocked):
        doms.unlock()


def test_locked_is_a_context_manager(doms: DomainList) -> None:
    with doms.locked() as same:
        assert same is doms and doms.is_locked
    with pytest.raises(KeyError), doms.locked(timeout=1):
        raise KeyError
    assert not doms.is_locked
    with doms.locked():
        doms.unlock()  # earlier than the end of the block
    assert not doms.is_locked


def test_a_hold_that_never_came_to_its_block_frees_the_list(doms: DomainList, other: Party) -> None:
    """CPython 3.14 may raise what a signal handler raises between ``__enter__`` and the block, and
    then drops the hold (gh-148874)."""
    hold = doms.locked()
    hold.__enter__()
    assert doms.is_locked
    with pytest.warns(ResourceWarning, match="locked"):
        del hold
    assert not doms.is_locked
    other.tell("doms.lock(0)")
    hold = doms.locked()
    with pytest.raises(LockTimeout):
        doms.locked(0).__enter__()
    other.tell("doms.unlock()")
    with hold:
        doms.unlock()
        doms.lock()
    with hold:
        pass
    doms.lock()
    del hold  # whose block is over: it has nothing to do with this lock
    assert doms.is_locked
    doms.unlock()


def test_the_list_answers_like_a_multiprocessing_lock(doms: DomainList, other: Party) -> None:
    assert doms.acquire() is True
    assert other.tell("doms.acquire(False)") is False
    assert other.tell("doms.acquire(block=True, timeout=0.01)") is False
    assert other.tell("doms.acquire(True, -1)") is False  # as there: negative is no time at all
    assert doms.release() is None
    assert other.tell("doms.acquire(True, 5)") is True
    other.tell("doms.release()")


def test_no_list_lock_while_a_domain_is_held(doms: DomainList, web1: DomainInfo) -> None:
    with doms.get(name="web1"):
        for take in (
            doms.lock,
            lambda: doms.lock(0),
            doms.acquire,
            doms.locked().__enter__,
            lambda: doms.define(xml("web2")),
            lambda: doms.undefine(name="web1"),
            lambda: doms.lock_many([WEB1]),
        ):
            with pytest.raises(LockOrder):
                take()
        assert not doms.is_locked
    with doms.locked():
        pass


def test_another_lists_domain_is_no_hindrance(
    doms: DomainList, web1: DomainInfo, store: Store
) -> None:
    second = store.make(room=4)
    with doms.get(name="web1"):
        second.define(xml("web1"))
        with second.locked(), second.get(name="web1") as dom:
            assert dom.name == "web1"
    second.close()


CHANGES: dict[str, Callable[[DomainList, Domain], Any]] = {
    "rename": lambda doms, dom: doms.rename(dom, "web9"),
    "save_config": lambda doms, dom: doms.save_config(dom),
    "delete_config": lambda doms, dom: doms.delete_config(dom),
    "set_autostart": lambda doms, dom: doms.set_autostart(dom, True),
    "_rename": lambda doms, dom: doms._rename(dom, "web9", dom.definition.encode(), None),
    "_remove": lambda doms, dom: doms._remove(dom),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_lists_domain_is_not_changed_here(
    doms: DomainList, web1: DomainInfo, store: Store, change: str
) -> None:
    """Its slot's number is that of some other domain here, which others may have locked."""
    second = store.make(room=4)
    second.define(xml("web2"))
    with second.get(name="web2") as dom, doms.locked(), pytest.raises(WrongList) as caught:
        CHANGES[change](doms, dom)
    assert str(dom.uuid) in str(caught.value)
    assert names(doms) == ["web1"] and names(second) == ["web2"]
    second.close()


def test_another_lists_domain_is_neither_removed_nor_locked_here(
    doms: DomainList, web1: DomainInfo, store: Store
) -> None:
    second = store.make(room=4)
    second.define(xml("web2"))
    dom = handle(second, "web2")
    with pytest.raises(WrongList), doms.locked():
        doms.remove_inactive(dom)
    with pytest.raises(WrongList):
        doms.lock_many([WEB1, dom])
    assert names(doms) == ["web1"] and names(second) == ["web2"]
    with doms.get(name="web1"), second.get(name="web2"):
        pass
    second.close()


# --- time-outs ---------------------------------------------------------------------------------

WAITS: dict[str, Callable[[DomainList, Any], Any]] = {
    "lock": lambda doms, t: doms.lock(t),
    "locked": lambda doms, t: doms.locked(t).__enter__(),
    "get": lambda doms, t: doms.get(name="web1", timeout=t),
    "lookup": lambda doms, t: doms.lookup(uuid=WEB1, timeout=t),
    "lock_many": lambda doms, t: doms.lock_many([WEB1], timeout=t),
    "get_many": lambda doms, t: doms.get_many([WEB1], timeout=t),
    "assign_defs": lambda doms, t: doms.assign_defs([definition("web1", WEB1)], timeout=t),
    "update_many": lambda doms, t: doms.update_many({WEB1: {"data": 1}}, timeout=t),
    "remove_many": lambda doms, t: doms.remove_many([WEB1], timeout=t),
    "add": lambda doms, t: doms.add(WEB1, "requests", timeout=t),
    "define": lambda doms, t: doms.define(xml("web1", WEB1), timeout=t),
    "undefine": lambda doms, t: doms.undefine(name="web1", timeout=t),
    "find_by_name": lambda doms, t: with_list(doms, lambda: doms.find_by_name("web1", t)),
    "find_by_uuid": lambda doms, t: with_list(doms, lambda: doms.find_by_uuid(WEB1, t)),
    "find_by_id": lambda doms, t: with_list(doms, lambda: doms.find_by_id(1, t)),
    "assign_def": lambda doms, t: with_list(
        doms, lambda: doms.assign_def(definition("web1", WEB1), timeout=t)
    ),
    "remove_inactive": lambda doms, t: with_list(
        doms, lambda: doms.remove_inactive(pickle.loads(pickle.dumps(STALE[0])), t)
    ),
    "free": lambda doms, t: with_list(doms, lambda: doms.free(t)),
    "Domain.lock": lambda doms, t: STALE[0].lock(t),
    "Domain.acquire": lambda doms, t: acquired(STALE[0], t),
    "acquire": lambda doms, t: acquired(doms, t),
}
STALE: list[Domain] = []  # the handle that the table above uses


def with_list(doms: DomainList, what: Callable[[], Any]) -> Any:
    with doms.locked():
        return what()


def acquired(lock: Any, timeout: Any) -> None:
    """`acquire` says False where others raise."""
    if not lock.acquire(timeout=timeout):
        raise LockTimeout("not acquired")


@pytest.fixture
def waiting(doms: DomainList, web1: DomainInfo) -> Iterator[DomainList]:
    """A list with an active web1 and a handle for the table."""
    with doms.get(name="web1") as dom:
        assert dom.activate() == 1
    STALE.append(dom)
    yield doms
    STALE.clear()


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("bad", [-1, -0.001, math.nan, -math.inf], ids=str)
def test_bad_timeouts_are_refused(waiting: DomainList, wait: str, bad: float) -> None:
    if wait.endswith("acquire") and bad < 0:
        pytest.skip("acquire takes a negative time-out for 0, as multiprocessing.Lock does")
    with pytest.raises(ValueError):
        WAITS[wait](waiting, bad)
    assert not waiting.is_locked
    with waiting.get(name="web1", timeout=0) as dom:
        assert dom.is_active


NEVER_WAIT: dict[str, Callable[[DomainList, Any], Any]] = {
    "get": lambda doms, t: doms.get(name="nobody", timeout=t),
    "lookup": lambda doms, t: doms.lookup(name="nobody", timeout=t),
    "lookup id=-1": lambda doms, t: doms.lookup(id=-1, timeout=t),
    "lookup name=''": lambda doms, t: doms.lookup(name="", timeout=t),
    "get name=''": lambda doms, t: doms.get(name="", timeout=t),
    "peek": lambda doms, t: doms.peek(name="nobody", timeout=t),
    "peek id=-1": lambda doms, t: doms.peek(id=-1, timeout=t),
    "lock_many []": lambda doms, t: doms.lock_many([], timeout=t),
    "get_many []": lambda doms, t: doms.get_many([], timeout=t),
    "assign_defs": lambda doms, t: doms.assign_defs([definition("new")], timeout=t),
    "assign_defs []": lambda doms, t: doms.assign_defs([], timeout=t),
    "update_many {}": lambda doms, t: doms.update_many({}, timeout=t),
    "remove_many []": lambda doms, t: doms.remove_many([], timeout=t),
    "add": lambda doms, t: doms.add("nobody", "requests", timeout=t),
    "undefine": lambda doms, t: doms.undefine(name="nobody", timeout=t),
    "find_by_name": lambda doms, t: with_list(doms, lambda: doms.find_by_name("nobody", t)),
    "find_by_id": lambda doms, t: with_list(doms, lambda: doms.find_by_id(-1, t)),
    "assign_def": lambda doms, t: with_list(
        doms, lambda: doms.assign_def(definition("new"), timeout=t)
    ),
    "free": lambda doms, t: with_list(doms, lambda: doms.free(t)),
    "define": lambda doms, t: doms.define(xml("new"), timeout=t),
}


@pytest.mark.parametrize("bad", [-1, math.nan], ids=str)
@pytest.mark.parametrize("call", NEVER_WAIT)
def test_bad_timeouts_are_refused_where_nothing_would_wait(
    doms: DomainList, call: str, bad: float
) -> None:
    """A mistake shows at once, and not on the day when somebody holds the lock."""
    with pytest.raises(ValueError):
        NEVER_WAIT[call](doms, bad)
    assert len(doms) == 0 and not doms.is_locked


NOT_THE_LISTS = [wait for wait in WAITS if wait not in ("lock", "locked", "acquire")]


@pytest.mark.parametrize("timeout", [0, 0.0, 0.03], ids=str)
@pytest.mark.parametrize("wait", NOT_THE_LISTS)
def test_waiting_for_a_domain_ends(
    waiting: DomainList, other: Party, wait: str, timeout: float
) -> None:
    other.tell("dom = doms.get(name='web1')")
    begun = time.monotonic()
    with pytest.raises(LockTimeout) as caught:
        WAITS[wait](waiting, timeout)
    assert time.monotonic() - begun >= timeout
    assert isinstance(caught.value, TimeoutError) and isinstance(caught.value, ShmDomainsError)
    if not wait.endswith("acquire"):
        holder = caught.value.holder
        assert holder is not None and (holder.pid, holder.tid) == (other.pid, other.tid)
        assert holder.alive and holder.command and "web1" in str(caught.value)
    assert not waiting.is_locked and len(waiting) == 1
    other.tell("dom.unlock()")


NEED_THE_LIST = [
    *("lock", "locked", "acquire", "lock_many", "define", "undefine"),
    *("get_many", "assign_defs", "remove_many"),
]


@pytest.mark.parametrize("timeout", [0, 0.03], ids=str)
@pytest.mark.parametrize("wait", NEED_THE_LIST)
def test_waiting_for_the_list_ends(
    waiting: DomainList, other: Party, wait: str, timeout: float
) -> None:
    other.tell("doms.lock()")
    begun = time.monotonic()
    with pytest.raises(LockTimeout) as caught:
        WAITS[wait](waiting, timeout)
    assert time.monotonic() - begun >= timeout
    if wait != "acquire":
        holder = caught.value.holder
        assert holder is not None and (holder.pid, holder.tid) == (other.pid, other.tid)
    other.tell("doms.unlock()")


@pytest.mark.parametrize("timeout", [0, 0.0, 5, None, math.inf, True], ids=str)
@pytest.mark.parametrize(
    "wait", ["get", "lookup", "lock_many", "get_many", "assign_defs", "Domain.lock"]
)
def test_what_is_free_is_had_at_once(waiting: DomainList, wait: str, timeout: Any) -> None:
    got = WAITS[wait](waiting, timeout) or STALE[0]
    for dom in got if isinstance(got, list) else [got]:
        assert dom.is_locked
        dom.unlock()


def test_a_timeout_is_a_number(doms: DomainList) -> None:
    for wait in (lambda: doms.lock("soon"), lambda: doms.get(name="a", timeout="1")):
        with pytest.raises(TypeError):
            wait()
    assert not doms.is_locked


OVER_SEVERAL_WAITS: dict[str, Callable[[DomainList, Any], Any]] = {
    "lock_many": lambda doms, t: doms.lock_many([WEB1], timeout=t),
    "define": lambda doms, t: doms.define(xml("new"), timeout=t),
    "undefine": lambda doms, t: doms.undefine(name="web1", timeout=t),
    "remove_inactive": lambda doms, t: with_list(
        doms, lambda: doms.remove_inactive(handle(doms), timeout=t)
    ),
    "free": lambda doms, t: with_list(doms, lambda: doms.free(timeout=t)),
    "rename": lambda doms, t: with_list(
        doms, lambda: use(doms.find_by_name("web1"), lambda dom: doms.rename(dom, "new", timeout=t))
    ),
}


def use(dom: Domain, what: Callable[[Domain], Any]) -> None:
    with dom:
        what(dom)


@pytest.mark.parametrize(
    "bad", [-1, math.nan, -math.inf, "1", [1], 10**400], ids=lambda bad: repr(bad)[:9]
)
@pytest.mark.parametrize("call", OVER_SEVERAL_WAITS)
def test_a_bad_timeout_over_several_waits(
    doms: DomainList, web1: DomainInfo, call: str, bad: Any
) -> None:
    number = isinstance(bad, float) or bad == -1
    expected = ValueError if number else OverflowError if isinstance(bad, int) else TypeError
    with pytest.raises(expected):
        OVER_SEVERAL_WAITS[call](doms, bad)
    assert names(doms) == ["web1"] and not doms.is_locked
    handle(doms)


@pytest.mark.parametrize("timeout", [None, 0, 0.0, False, 1e-12, 1, 1e12, math.inf], ids=repr)
@pytest.mark.parametrize("call", OVER_SEVERAL_WAITS)
def test_a_timeout_over_several_waits_that_need_not_wait(
    doms: DomainList, web1: DomainInfo, call: str, timeout: Any
) -> None:
    """One that is over already finds what is free, as 0 does."""
    OVER_SEVERAL_WAITS[call](doms, timeout)
    assert not doms.is_locked
    for name in names(doms):
        doms.get(name=name, timeout=0).unlock()


def test_a_deadline_is_what_is_left_of_a_timeout() -> None:
    for forever in (None, math.inf, 1e12):
        assert core.Deadline(forever).left() is None
    for over in (0, 0.0, 1e-12):
        assert core.Deadline(over).left() == 0
    later = core.Deadline(1000)
    first, second = later.left(), later.left()
    assert first is not None and second is not None and 1000 >= first >= second > 0


def test_a_holder_that_left_is_not_named(doms: DomainList, other: Party) -> None:
    """Empty means unknown, never an older owner."""
    other.tell("doms.lock(); doms.unlock()")
    doms.lock()
    with pytest.raises(LockTimeout) as caught:
        other.tell("doms.lock(0)")
    assert caught.value.holder is not None and caught.value.holder.tid != other.tid
    doms.unlock()


# --- keys --------------------------------------------------------------------------------------


def test_exactly_one_key(doms: DomainList, web1: DomainInfo) -> None:
    for call in (doms.get, doms.lookup, doms.peek, doms.undefine):
        for keys in (
            {},
            {"name": "web1", "uuid": WEB1},
            {"name": "web1", "id": 1},
            {"uuid": WEB1, "id": 1},
            {"name": "web1", "uuid": WEB1, "id": 1},
        ):
            with pytest.raises(TypeError, match="exactly one"):
                call(**keys)
    for call in (doms.get, doms.lookup, doms.peek):
        with pytest.raises(TypeError, match="exactly one key"):
            call("web1", name="web1")
    assert not doms.is_locked
    handle(doms).lock(0)


def test_a_key_by_position_is_read_in_virshs_order(doms: DomainList, web1: DomainInfo) -> None:
    twin = "c7a5fdbdedaf9455926ad65c16db1809"  # a name that looks like a uuid
    doms.define(xml(twin))
    with doms.get("web1") as dom:
        number = dom.activate()
    keys = [number, WEB1, WEB1.bytes, str(WEB1), WEB1.hex, f" {WEB1}", "web1", dom, web1]
    for key in keys:
        with doms.get(key) as found:
            assert found.uuid == WEB1
        with doms.lookup(key) as found:
            assert found.uuid == WEB1
        assert doms.peek(key).uuid == doms[key].uuid == WEB1
        assert key in doms
    assert doms.peek(twin) is None and doms.peek(name=twin) is not None
    for key in (number + 1, -1, 1 << 40, WEB2, str(WEB2), "", "web2", "\ud800", "x" * 300, "7"):
        assert key not in doms and doms.lookup(key) is None and doms.peek(key) is None
        for find in (doms.get, doms.__getitem__):
            with pytest.raises(DomainNotFound) as caught:
                find(key)
            assert isinstance(caught.value, KeyError)
            assert "no domain with matching" in str(caught.value).partition("'")[0]
    for key in (1.5, [], b"short", object()):
        for find in (doms.get, doms.lookup, doms.peek, doms.__contains__, doms.__getitem__):
            with pytest.raises((TypeError, DefinitionError)):
                find(key)


def test_an_info_is_a_value(doms: DomainList, web1: DomainInfo) -> None:
    again = doms.peek("web1")
    assert again == web1 and again is not web1 and {again: 1}[web1] == 1
    assert web1 != "web1" and web1 != doms.peek("web1").definition
    assert doms.snapshot(definitions=False)[0] != web1  # one has definitions, the other has not
    with doms.get("web1") as dom:
        dom.data = {"ports": [1, 2], "name": "x"}
    changed = doms.peek("web1")
    assert changed != web1
    assert changed.to_dict()["data"] == {"ports": [1, 2], "name": "x"}
    said = json.loads(json.dumps(changed.to_dict()))
    assert said["id"] is None and said["state"] == "shut off" and said["uuid"] == str(WEB1)
    assert DomainDef.from_xml(said["definition"]) == web1.definition


SPELLINGS: list[Any] = [
    WEB1,
    WEB1.bytes,
    str(WEB1),
    str(WEB1).upper(),
    WEB1.hex,
    WEB1.hex.upper(),
    f"  {WEB1}\n",
    "11 11-11 11 2222--4333 8444 55 55 55 55 55-55",
]


def test_uuids_that_are_handed_out_are_made_like_any(doms: DomainList, web1: DomainInfo) -> None:
    """The core makes them without `UUID.__init__`."""
    ours, known = web1.uuid, UUID(bytes=WEB1.bytes)
    assert ours == known and hash(ours) == hash(known) and repr(ours) == repr(known)
    assert ours.is_safe is known.is_safe
    assert pickle.loads(pickle.dumps(ours)) == known
    with pytest.raises(TypeError):
        ours.int = 1


@pytest.mark.parametrize("spelling", SPELLINGS, ids=repr)
def test_a_uuid_in_every_spelling(doms: DomainList, web1: DomainInfo, spelling: Any) -> None:
    assert spelling in doms
    assert doms.peek(uuid=spelling).name == "web1"
    for find in (doms.get, doms.lookup):
        with find(uuid=spelling) as dom:
            assert dom.uuid == WEB1 and isinstance(dom.uuid, UUID)
    with doms.locked(), doms.find_by_uuid(spelling) as dom:
        assert dom.name == "web1"
    with doms.lock_many([spelling]) as many:
        assert [dom.uuid for dom in many] == [WEB1]
    doms.undefine(uuid=spelling)
    assert spelling not in doms


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "web1",
        "{" + str(WEB1) + "}",
        f"urn:uuid:{WEB1}",
        str(WEB1)[:-1],
        str(WEB1)[:-1] + "g",
        str(WEB1)[:-1] + "é",
        str(WEB1).replace("-", "_"),
        b"short",
        7,
        1.5,
    ],
    ids=repr,
)
def test_what_is_no_uuid(doms: DomainList, bad: Any) -> None:
    for find in (
        lambda: doms.get(uuid=bad),
        lambda: doms.lookup(uuid=bad),
        lambda: doms.peek(uuid=bad),
        lambda: doms.undefine(uuid=bad),
        lambda: with_list(doms, lambda: doms.find_by_uuid(bad)),
    ):
        with pytest.raises(DefinitionError) as caught:
            find()
        assert isinstance(caught.value, ValueError) and "uuid" in str(caught.value)
    assert not doms.is_locked


def test_what_is_no_name(doms: DomainList, web1: DomainInfo) -> None:
    for name in ("", "x" * 252, "\ud800", "web1\0", "WEB1", " web1", "web1 ", "web"):
        assert doms.lookup(name=name) is None
        assert doms.peek(name=name) is None
        with pytest.raises(DomainNotFound):
            doms.get(name=name)
    for wrong in (b"web1", 1, WEB1):
        with pytest.raises(TypeError):
            doms.get(name=wrong)
        with pytest.raises(TypeError), doms.locked():
            doms.find_by_name(wrong)
    assert not doms.is_locked


def test_what_is_no_id(doms: DomainList, web1: DomainInfo) -> None:
    for number in (-1, -2, 0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**64, -(2**63)):
        assert doms.lookup(id=number) is None, number
        assert doms.peek(id=number) is None
        with pytest.raises(DomainNotFound):
            doms.get(id=number)
    for wrong in ("1", 1.0, b"1"):
        with pytest.raises(TypeError):
            doms.get(id=wrong)


def test_a_missing_domain_is_named(doms: DomainList) -> None:
    for keys in ({"name": "nobody"}, {"uuid": WEB1}, {"uuid": WEB1.bytes}, {"id": 4711}):
        (key,) = keys.values()
        shown = str(WEB1) if key == WEB1.bytes else str(key)
        for call in (doms.get, doms.undefine):
            with pytest.raises(DomainNotFound) as caught:
                call(**keys)
            assert isinstance(caught.value, LookupError) and shown in str(caught.value)
        assert doms.lookup(**keys) is None and doms.peek(**keys) is None
    with doms.locked():
        assert doms.find_by_name("nobody") is None
        assert doms.find_by_uuid(WEB1) is None
        assert doms.find_by_id(4711) is None


LONGEST = ["x" * 251, "ä" * 125 + "x", "𝕧" * 62 + "xyz"]


@pytest.mark.parametrize("name", [*LONGEST, "x", " x ", "ĝ ü-1", "a\tb"], ids=lambda name: name[:4])
def test_names_are_found_whatever_they_are(doms: DomainList, name: str) -> None:
    doms.define(xml("other"))
    info = doms.define(definition("x").replace(name=name))
    assert info.name == name and doms.peek(name=name).uuid == info.uuid
    with doms.get(name=name) as dom:
        assert dom.name == dom.definition.name == name
    doms.undefine(name=name)
    assert names(doms) == ["other"]


# On both sides of each word that a name in the segment begins or fills.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 250, 251)


def test_names_of_every_length_are_kept(doms: DomainList) -> None:
    uuids = {}
    for length in LENGTHS:
        name = "abcdefghij"[length % 10] * length
        uuids[name] = doms.define(definition("x").replace(name=name)).uuid
    assert {info.name: info.uuid for info in doms.snapshot()} == uuids
    assert names(doms) == names(doms.list(persistent=True)) == sorted(uuids)
    for name, uuid in uuids.items():
        with doms.get(name=name) as dom:
            assert (dom.name, dom.uuid, dom.definition.name) == (name, uuid, name)
            number = dom.activate()
        assert doms.peek(id=number).name == doms.peek(uuid=uuid).name == name
        assert doms.lookup(name=name[1:] + "?") is None and doms.lookup(name=name + "?") is None


@pytest.mark.parametrize("old", LENGTHS)
def test_a_name_of_every_length_becomes_one_of_every_other(doms: DomainList, old: int) -> None:
    """Each is written over the one before the last: nothing of that is left in it."""
    before = "o" * old
    uuid = doms.define(definition("x").replace(name=before)).uuid
    for length in LENGTHS:
        for letter in "pq":
            name = letter * length
            with doms.locked(), doms.find_by_name(before) as dom:
                doms.rename(dom, name)
                assert dom.name == dom.definition.name == name
            assert doms.peek(name=before) is None
            assert doms.peek(name=name).uuid == uuid and names(doms) == [name]
            with doms.get(uuid=uuid) as dom:
                assert dom.name == name
            before = name


# --- find: the list lock is the caller's -------------------------------------------------------


def test_find_needs_the_list_lock(doms: DomainList, web1: DomainInfo, other: Party) -> None:
    other.tell("doms.lock()")  # somebody else's does not count
    dom = handle(doms)
    for call in (
        lambda: doms.find_by_name("web1"),
        lambda: doms.find_by_uuid(WEB1),
        lambda: doms.find_by_id(1),
        lambda: doms.find_by_id(-1),
        lambda: doms.assign_def(definition("web2")),
        lambda: doms.remove_inactive(dom),
        lambda: doms.free(),
        lambda: doms.rename(dom, "web2"),
    ):
        with pytest.raises(ListNotLocked) as caught:
            call()
        assert isinstance(caught.value, ContractError) and "locked()" in str(caught.value)
    other.tell("doms.unlock()")
    assert names(doms) == ["web1"]


def test_find_returns_it_locked_and_the_list_may_be_dropped(doms: DomainList) -> None:
    doms.define(xml("web1", WEB1))
    doms.lock()
    dom = doms.find_by_uuid(WEB1)
    doms.unlock()
    assert isinstance(dom, Domain) and dom.is_locked and dom.name == "web1"
    dom.unlock()


def test_find_by_id_finds_active_domains_only(doms: DomainList, web1: DomainInfo) -> None:
    with doms.get(name="web1") as dom:
        number = dom.activate()
    with doms.locked(), doms.find_by_id(number) as dom:
        assert (dom.uuid, dom.id) == (WEB1, number)
        dom.deactivate()
        dom.commit()
        assert doms.peek(id=number) is None
    with doms.locked():
        assert doms.find_by_id(number) is None and doms.find_by_id(-1) is None


def test_an_id_counts_when_it_is_committed(
    doms: DomainList, web1: DomainInfo, other: Party
) -> None:
    with doms.get(name="web1") as dom:
        number = dom.activate()
        assert other.tell(f"doms.lookup(id={number}, timeout=0)") is None
        dom.rollback()
        assert dom.id == -1
    assert doms.lookup(id=number) is None
    with doms.get(name="web1") as dom:
        assert dom.activate() > number


def test_several_domains_under_the_list_lock(doms: DomainList) -> None:
    for name in "abc":
        doms.define(xml(name))
    with doms.locked():
        held = [doms.find_by_name(name) for name in "abc"]
    assert all(dom.is_locked for dom in held)
    held[0].unlock()
    with pytest.raises(LockOrder):  # two are held still, the list is not
        doms.get(name="a")
    with doms.get(name="a", timeout=0) as again:  # a try waits for nobody
        assert again.is_locked
    for dom in held[1:]:
        dom.unlock()


def test_waiting_for_a_second_domain_is_refused(doms: DomainList) -> None:
    doms.define(xml("a"))
    doms.define(xml("b"))
    b = handle(doms, "b")
    with doms.get(name="a"):
        for call in (
            lambda: doms.get(name="b"),
            lambda: doms.get(name="b", timeout=1),
            lambda: doms.lookup(name="b"),
            lambda: b.lock(),
            lambda: b.lock(0.1),
            lambda: b.acquire(),
            lambda: b.__enter__(),
        ):
            with pytest.raises(LockOrder) as caught:
                call()
            assert "lock_many" in str(caught.value)
        assert not b.is_locked
        assert b.try_lock() is True
        b.unlock()
        assert b.acquire(False) is True
        b.unlock()
        b.lock(0)
        b.unlock()
    with b:
        pass


def test_a_domain_is_not_locked_twice(doms: DomainList, web1: DomainInfo) -> None:
    dom = doms.get(name="web1")
    twin = pickle.loads(pickle.dumps(dom))
    assert twin is not dom and twin == dom
    for again in (
        lambda: dom.lock(),
        lambda: dom.lock(0),
        lambda: dom.try_lock(),
        lambda: dom.acquire(False),
        lambda: twin.lock(0),
        lambda: twin.try_lock(),
        lambda: doms.get(name="web1", timeout=0),
        lambda: doms.lookup(uuid=WEB1, timeout=0),
    ):
        with pytest.raises(AlreadyLocked):
            again()
    dom.unlock()
    with doms.locked(), doms.find_by_name("web1") as dom:
        for again in (
            lambda: doms.find_by_name("web1"),
            lambda: doms.find_by_uuid(WEB1),
            lambda: doms.assign_def(definition("web1")),
            lambda: doms.lock_many([WEB1]),
        ):
            with pytest.raises(AlreadyLocked):
                again()
        assert dom.is_locked


# --- lock_many ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [-1, -(1 << 128), (1 << 128) + WEB1.int, 1 << 200])
def test_a_uuid_whose_number_was_tampered_with(doms: DomainList, number: int) -> None:
    """Not the domain that the lower 128 bits name."""
    doms.define(xml("lowest", UUID(int=0)))
    doms.define(xml("highest", UUID(int=(1 << 128) - 1)))
    doms.define(xml("web1", WEB1))
    bad = UUID(int=1)
    object.__setattr__(bad, "int", number)
    for look in (doms.get, doms.lookup, doms.peek):
        with pytest.raises(OverflowError):
            look(uuid=bad)


def test_lock_many_takes_handles_infos_and_uuids(doms: DomainList) -> None:
    infos = {name: doms.define(xml(name)) for name in "abcd"}
    wanted = [infos["c"], handle(doms, "a"), infos["d"].uuid, str(infos["b"].uuid)]
    many = doms.lock_many(iter(wanted))
    assert isinstance(many, LockedDomains) and isinstance(many, list)
    assert [dom.name for dom in many] == ["c", "a", "d", "b"]
    assert all(dom.is_locked for dom in many) and not doms.is_locked
    with many as same:
        assert same is many
        for dom in many:
            dom.data = dom.name
    assert not any(dom.is_locked for dom in many)
    assert [doms.peek(name=name).data for name in "abcd"] == list("abcd")


def test_lock_many_of_nothing(doms: DomainList) -> None:
    with doms.lock_many([]) as many:
        assert many == []


def test_lock_many_rolls_back_all_of_them(doms: DomainList) -> None:
    infos = [doms.define(xml(name)) for name in "ab"]
    with pytest.raises(KeyError), doms.lock_many(infos) as many:
        for dom in many:
            dom.pid = 1
        raise KeyError
    assert [info.pid for info in doms] == [None, None]
    assert all(dom.try_lock() for dom in many)
    for dom in many:
        dom.unlock()


def test_lock_many_in_a_list_that_is_locked_already(doms: DomainList) -> None:
    infos = [doms.define(xml(name)) for name in "ab"]
    with doms.locked():
        with doms.lock_many(infos) as many:
            assert len(many) == 2
        assert doms.is_locked


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ("handle_a b removed_info", DomainNotFound),
        ("handle_a b removed_handle", DomainRemoved),
        ("handle_a b unknown_uuid", DomainNotFound),
        ("handle_a b unknown_name", DomainNotFound),
        ("handle_a b malformed_uuid", DefinitionError),
        ("handle_a b a", AlreadyLocked),
        ("b a handle_a", AlreadyLocked),
        ("handle_a other_handle_a", AlreadyLocked),
    ],
)
def test_lock_many_is_all_or_nothing(
    doms: DomainList, other: Party, wanted: str, error: type[Exception]
) -> None:
    a, b, c = (doms.define(xml(name)) for name in "abc")
    known: dict[str, Any] = {
        "a": a,
        "b": b,
        "handle_a": handle(doms, "a"),
        "other_handle_a": handle(doms, "a"),
        "removed_info": c,
        "removed_handle": handle(doms, "c"),
        "unknown_uuid": uuid_module.uuid4(),
        "unknown_name": "no such domain",
        "malformed_uuid": b"short",
    }
    doms.undefine(name="c")
    with pytest.raises(error):
        doms.lock_many([known[one] for one in wanted.split()])
    assert not doms.is_locked and not known["handle_a"].is_locked
    assert other.tell("doms.acquire(timeout=0), doms.release()")[0]
    for name in "ab":
        other.tell(f"doms.get(name={name!r}, timeout=0).unlock()")


def test_an_error_in_the_iterable_locks_nothing(doms: DomainList, web1: DomainInfo) -> None:
    def wanted() -> Iterator[Any]:
        yield web1
        raise KeyError

    with pytest.raises(KeyError):
        doms.lock_many(wanted())
    assert not doms.is_locked
    handle(doms)


def test_no_more_than_a_thousand_locks(
    store: Store, other_of: Callable[[DomainList], Party]
) -> None:
    doms = store.make(room=1010)
    with doms.locked():
        for number in range(1002):
            doms.assign_def(definition("vm").replace(name=f"vm{number}")).unlock()
    infos = doms.snapshot(definitions=False)
    with pytest.raises(TooManyLocks):
        doms.lock_many(infos)
    assert not doms.is_locked
    extra = handle(doms, "vm1000")
    with doms.lock_many(infos[:1000]) as many:
        assert len(many) == 1000
        for call in (lambda: doms.get(name="vm1001", timeout=0), lambda: extra.lock(0)):
            with pytest.raises(TooManyLocks) as caught:
                call()
            assert isinstance(caught.value, ContractError)
        many[0].unlock()
        with doms.get(name="vm1001", timeout=0) as dom:
            assert dom.name == "vm1001"
        party = other_of(doms)  # the limit is the thread's
        party.tell("doms.get(name='vm1001', timeout=0).unlock()")
    with doms.locked():
        doms.free()  # in batches, as many as there are
    assert len(doms) == 0 and doms.check()
    doms.close()


@pytest.fixture
def other_of() -> Iterator[Callable[[DomainList], Party]]:
    """Make a party for a list that is not the fixture's."""
    with ExitStack() as stack:
        yield lambda doms: stack.enter_context(thread_party(doms=doms))


# --- assign_def --------------------------------------------------------------------------------


def test_assign_def_makes_a_domain(doms: DomainList) -> None:
    with doms.locked():
        dom = doms.assign_def(definition("web1", WEB1))
        assert isinstance(dom, Domain) and dom.is_locked
        # committed before it is returned
        info = doms.peek(uuid=WEB1)
        assert info is not None and info.name == "web1" and not info.persistent
    assert not dom.changed
    assert (dom.name, dom.uuid, dom.id, dom.pid) == ("web1", WEB1, -1, None)
    assert (dom.state, dom.reason) == (DomainState.SHUTOFF, ShutoffReason.UNKNOWN)
    assert (dom.persistent, dom.autostart, dom.is_active) == (False, False, False)
    assert (dom.next_definition, dom.data, dom.previous_owner_died) == (None, None, None)
    assert dom.definition == definition("web1", WEB1)
    dom.unlock()


def test_persistence_is_committed_with_a_new_domain(doms: DomainList) -> None:
    for number, persistent in enumerate((True, False, None)):
        with doms.locked():
            dom = doms.assign_def(definition(f"web{number}"), persistent=persistent)
            assert doms.peek(name=f"web{number}").persistent is bool(persistent)
            dom.rollback()  # nothing of it is in the transaction
            assert dom.persistent is bool(persistent)
            dom.unlock()


def test_assign_def_gives_a_uuid(doms: DomainList) -> None:
    with (
        doms.locked(),
        doms.assign_def(definition("a")) as a,
        doms.assign_def(definition("b")) as b,
    ):
        assert a.uuid != b.uuid
        for dom in (a, b):
            assert isinstance(dom.uuid, UUID) and dom.uuid.version == 4
            assert dom.definition.uuid == dom.uuid
            assert str(dom.uuid) in dom.definition.to_xml()


@pytest.mark.parametrize(("name", "uuid"), [("web1", WEB1), ("web1", WEB2), ("web2", WEB1)])
def test_what_a_signal_handler_defines_in_the_middle_of_assign_def_stays(
    doms: DomainList, monkeypatch: pytest.MonkeyPatch, name: str, uuid: UUID
) -> None:
    encode = EncodedDef.encode

    def interrupted(given: EncodedDef) -> bytes:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGUSR1)
        return encode(given)

    def handler(*_: object) -> None:
        doms.assign_def(definition(name, uuid)).unlock()

    before = signal.signal(signal.SIGUSR1, handler)
    monkeypatch.setattr(EncodedDef, "encode", interrupted)
    try:
        with doms.locked(), pytest.raises(DomainExists, match="by a signal handler"):
            doms.assign_def(EncodedDef.of(definition("web1", WEB1)))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [(info.name, info.uuid) for info in doms] == [(name, uuid)]
    assert doms.check().problems == []


def test_assign_def_replaces_an_inactive_domains_definition(
    doms: DomainList, web1: DomainInfo
) -> None:
    with doms.locked():
        dom = doms.assign_def(definition("web1", WEB1, memory=2048))
    assert dom.definition.memory == 2048 and dom.next_definition is None
    assert dom.persistent is True  # None asks for no change
    assert doms.peek(name="web1").definition.memory == 1024  # part of the transaction
    dom.rollback()
    assert dom.definition.memory == 1024
    dom.unlock()
    with doms.locked():
        doms.assign_def(definition("web1", memory=4096), persistent=False).unlock()
    info = doms.peek(name="web1")
    assert (info.uuid, info.definition.uuid) == (WEB1, WEB1)  # no uuid given: the name decides
    assert (info.definition.memory, info.persistent) == (4096, False)


def test_assign_def_to_an_active_domain_is_for_its_next_start(
    doms: DomainList, web1: DomainInfo
) -> None:
    with doms.get(name="web1") as dom:
        dom.activate()
    with doms.locked(), doms.assign_def(definition("web1", WEB1, memory=2048)) as dom:
        assert dom.definition.memory == 1024 and dom.next_definition.memory == 2048
    info = doms.peek(name="web1")
    assert (info.definition.memory, info.next_definition.memory) == (1024, 2048)


def test_duplicates_in_libvirts_words(doms: DomainList, web1: DomainInfo) -> None:
    with doms.locked():
        with pytest.raises(DomainExists) as caught:
            doms.assign_def(definition("web1", WEB2))
        assert str(caught.value) == f"domain 'web1' already exists with uuid {WEB1}"
        with pytest.raises(DomainExists) as caught:
            doms.assign_def(definition("web2", WEB1))
        assert str(caught.value) == f"domain 'web1' is already defined with uuid {WEB1}"
    for text in (xml("web1", WEB2), xml("web2", WEB1)):
        with pytest.raises(DomainExists):
            doms.define(text)
    assert names(doms) == ["web1"] and not doms.is_locked
    handle(doms).lock(0)


def test_a_duplicate_does_not_wait_for_the_domain(
    doms: DomainList, web1: DomainInfo, other: Party
) -> None:
    other.tell("dom = doms.get(name='web1')")
    for text in (xml("web1", WEB2), xml("web2", WEB1)):
        with pytest.raises(DomainExists):
            doms.define(text, timeout=0)
    other.tell("dom.unlock()")


def test_a_uuid_and_a_name_of_two_domains(doms: DomainList, web1: DomainInfo) -> None:
    doms.define(xml("web2", WEB2))
    with pytest.raises(DomainExists) as caught:
        doms.define(xml("web2", WEB1))
    assert str(caught.value) == f"domain 'web1' is already defined with uuid {WEB1}"


NO_NAME = "x" * 252
UUID_NAME_FORM = [
    (uuid, name, form)
    for uuid in (None, WEB1, WEB2, UUID(int=9))
    for name in ("web1", "web2", "new", NO_NAME)
    for form in (DomainDef, EncodedDef)
    # The blob of an encoded one may be anything; of all others the name was looked at.
    if name != NO_NAME or (uuid and form is EncodedDef)
]


@pytest.mark.parametrize(("uuid", "name", "form"), UUID_NAME_FORM)
def test_what_becomes_of_each_uuid_and_name(
    doms: DomainList, web1: DomainInfo, other: Party, uuid: UUID | None, name: str, form: type
) -> None:
    """A uuid that is known decides, then a name that is; nothing stays locked that was refused."""
    doms.define(xml("web2", WEB2))
    owners, words = {"web1": WEB1, "web2": WEB2}, {WEB1: "web1", WEB2: "web2"}
    given: Any = definition("x" if name == NO_NAME else name, uuid, memory=4096)
    if form is EncodedDef:
        given = EncodedDef.of(given)._replace(name=name)

    refused: tuple[type[ShmDomainsError], str] | None = None
    if uuid in words and name != words[uuid]:
        refused = DomainExists, f"domain '{words[uuid]}' is already defined with uuid {uuid}"
    elif uuid not in words and uuid is not None and name in owners:
        refused = DomainExists, f"domain '{name}' already exists with uuid {owners[name]}"
    elif name == NO_NAME:
        refused = InvalidName, f"{name!r} cannot be a domain's name"

    with doms.locked():
        if refused is None:
            with doms.assign_def(given, timeout=0) as dom:
                assert dom.name == dom.definition.name == name
                assert dom.uuid == dom.definition.uuid == (uuid or owners.get(name, dom.uuid))
                assert dom.definition.memory == 4096
        else:
            with pytest.raises(refused[0]) as caught:
                doms.assign_def(given, timeout=0)
            assert str(caught.value) == refused[1]
    assert not doms.is_locked
    made = refused is None and name == "new"
    assert names(doms) == (["new"] if made else []) + ["web1", "web2"]
    for known in names(doms):
        other.tell(f"dom = doms.get(name={known!r}, timeout=0); dom.unlock()")
    if made:
        doms.undefine(name="new")
    for known, owner in owners.items():
        replaced = refused is None and known == name
        assert doms.peek(name=known).uuid == owner
        assert doms.peek(uuid=owner).definition.memory == (4096 if replaced else 1024)


# --- remove, free ------------------------------------------------------------------------------


def test_remove_inactive(doms: DomainList, web1: DomainInfo) -> None:
    doms.define(xml("web2"))
    dom = handle(doms)
    with doms.locked():
        assert doms.remove_inactive(dom) is None
        assert not dom.is_locked
    assert names(doms) == ["web2"] and len(doms) == 1 and WEB1 not in doms
    with pytest.raises(DomainRemoved) as caught:
        dom.lock()
    assert isinstance(caught.value, LookupError) and str(WEB1) in str(caught.value)
    with pytest.raises(DomainRemoved), doms.locked():
        doms.remove_inactive(dom)
    assert dom.uuid == WEB1  # needs no lock


def test_remove_inactive_refuses_an_active_domain(doms: DomainList, web1: DomainInfo) -> None:
    with doms.get(name="web1") as dom:
        number = dom.activate()
    with pytest.raises(DomainActive) as caught, doms.locked():
        doms.remove_inactive(dom)
    assert "web1" in str(caught.value)
    assert doms.peek(id=number).name == "web1" and not dom.is_locked
    assert dom.try_lock()
    dom.unlock()


def test_remove_inactive_refuses_a_domain_that_the_caller_holds(
    doms: DomainList, web1: DomainInfo
) -> None:
    twin = handle(doms)
    with doms.locked(), doms.find_by_name("web1") as dom:
        dom.pid = 1
        for one in (dom, twin):
            with pytest.raises(DomainLocked) as caught:
                doms.remove_inactive(one)
            assert isinstance(caught.value, ContractError) and "unlock" in str(caught.value)
        assert dom.is_locked and dom.pid == 1
    assert doms.peek(name="web1").pid == 1


def test_a_removed_name_and_uuid_may_be_used_again(doms: DomainList, web1: DomainInfo) -> None:
    stale = handle(doms)
    doms.undefine(name="web1")
    doms.define(xml("web1", WEB1, memory=4096))
    with pytest.raises(DomainRemoved):
        stale.lock()
    fresh = handle(doms)
    assert fresh != stale and fresh.uuid == stale.uuid
    with fresh:
        assert fresh.definition.memory == 4096
        assert not stale.is_locked
        with pytest.raises(DomainNotLocked):
            stale.definition  # noqa: B018


def test_a_new_domain_knows_nothing_of_the_slots_last_one(doms: DomainList) -> None:
    for _ in range(3):
        with doms.locked(), doms.assign_def(definition("old"), persistent=True) as dom:
            dom.data, dom.pid, dom.autostart = {"secret": 1}, 7, True
            dom.set_state(DomainState.PAUSED, PausedReason.USER)
            dom.next_definition = dom.definition.replace(memory=7)
        doms.undefine(name="old")
        info = doms.define(xml("new"))
        assert (info.pid, info.autostart) == (None, False)
        assert (info.state, info.reason) == (DomainState.SHUTOFF, ShutoffReason.UNKNOWN)
        info = doms.peek(name="new")
        assert (info.data, info.next_definition) == (None, None)
        doms.undefine(name="new")


def test_free(doms: DomainList) -> None:
    for name in "abc":
        doms.define(xml(name))
    with doms.get(name="b") as b:
        number = b.activate()
    with doms.locked():
        doms.free()
        assert doms.is_locked and len(doms) == 0
        doms.free()
    assert doms.snapshot() == [] and doms.lookup(id=number) is None
    assert doms.info.active == 0
    with pytest.raises(DomainRemoved):
        b.lock()
    doms.define(xml("b"))


def test_free_refuses_before_anything_is_gone(doms: DomainList) -> None:
    for name in "abc":
        doms.define(xml(name))
    with doms.locked(), doms.find_by_name("c"):
        with pytest.raises(DomainLocked):
            doms.free()
        assert len(doms) == 3


def test_free_that_times_out_is_no_harm(doms: DomainList, other: Party) -> None:
    for name in "abc":
        doms.define(xml(name))
    other.tell("dom = doms.get(name='b')")
    with pytest.raises(LockTimeout), doms.locked():
        doms.free(timeout=0.01)
    assert "b" in names(doms) and not doms.is_locked
    other.tell("dom.unlock()")
    with doms.locked():
        doms.free()
    assert len(doms) == 0


# --- rename ------------------------------------------------------------------------------------


def rename(doms: DomainList, old: str, new: Any) -> None:
    with doms.locked(), doms.find_by_name(old) as dom:
        doms.rename(dom, new)


def test_rename(doms: DomainList, web1: DomainInfo) -> None:
    with doms.get(name="web1") as dom:
        dom.data = "kept"
        dom.autostart = True
    with doms.locked(), doms.find_by_name("web1") as dom:
        assert doms.rename(dom, "db 1") is None
        assert dom.is_locked and not dom.changed
        assert dom.name == dom.definition.name == "db 1"
        assert doms.peek(name="db 1").uuid == WEB1  # committed
        assert doms.peek(name="web1") is None
        dom.rollback()
        assert dom.name == "db 1"
    info = doms.peek(uuid=WEB1)
    assert info.name == info.definition.name == "db 1" and "<name>db 1<" in info.definition.to_xml()
    assert (info.data, info.autostart, info.persistent) == ("kept", True, True)
    assert doms.lookup(name="web1") is None
    rename(doms, "db 1", "web1")  # and back, into the other buffer
    assert names(doms) == ["web1"]
    doms.define(xml("db 1"))


def test_rename_takes_the_next_definition_along(doms: DomainList, web1: DomainInfo) -> None:
    with doms.get(name="web1") as dom:
        dom.next_definition = dom.definition.replace(memory=2048)
    rename(doms, "web1", "web2")
    info = doms.peek(name="web2")
    assert (info.next_definition.name, info.next_definition.memory) == ("web2", 2048)


@pytest.mark.parametrize("new", ["", "a/b", "a\nb", ".", "..", "x" * 252, "ä" * 126, "\0", "a\x07"])
def test_rename_to_what_is_no_name(doms: DomainList, web1: DomainInfo, new: str) -> None:
    with pytest.raises(InvalidName) as caught:
        rename(doms, "web1", new)
    assert isinstance(caught.value, DefinitionError)
    assert names(doms) == ["web1"]


def test_rename_errors(doms: DomainList, web1: DomainInfo) -> None:
    doms.define(xml("web2"))
    with pytest.raises(InvalidName, match="to itself"):
        rename(doms, "web1", "web1")
    with pytest.raises(DomainExists, match="domain with name 'web2' already exists"):
        rename(doms, "web1", "web2")
    with pytest.raises((TypeError, InvalidName)):
        rename(doms, "web1", None)
    with doms.locked(), pytest.raises(DomainNotLocked):
        doms.rename(handle_in(doms, "web1"), "web3")
    with doms.get(name="web1") as dom, pytest.raises(ListNotLocked):
        doms.rename(dom, "web3")
    with doms.locked(), doms.find_by_name("web1") as dom:
        dom.pid = 1
        with pytest.raises(UncommittedChanges):
            doms.rename(dom, "web3")
        assert dom.pid == 1 and dom.changed
        dom.commit()
        doms.rename(dom, "web3")
        dom.activate()
        dom.commit()
        with pytest.raises(DomainActive, match="cannot rename active domain"):
            doms.rename(dom, "web4")
    assert names(doms) == ["web2", "web3"]


def handle_in(doms: DomainList, name: str) -> Domain:
    dom = doms.find_by_name(name)
    dom.unlock()
    return dom


def test_rename_of_a_removed_domain(doms: DomainList, web1: DomainInfo) -> None:
    dom = handle(doms)
    doms.undefine(name="web1")
    with doms.locked(), pytest.raises(ContractError):
        doms.rename(dom, "web2")


# --- define, undefine --------------------------------------------------------------------------


def test_define_takes_xml_and_definitions(doms: DomainList) -> None:
    for number, given in enumerate(
        (xml("a0"), xml("a1").encode(), definition("a2"), definition("a3", WEB1))
    ):
        info = doms.define(given)
        assert isinstance(info, DomainInfo) and info.name == f"a{number}"
        assert info.persistent and info.state is DomainState.SHUTOFF and not info.is_active
        assert doms.peek(name=info.name).definition.uuid == info.uuid
    assert not doms.is_locked and len(doms) == 4


def test_defines_info_is_complete(doms: DomainList) -> None:
    info = doms.define(xml("web1", WEB1, title="t"))
    assert (info.uuid, info.definition.title, info.next_definition, info.data) == (
        WEB1,
        "t",
        None,
        None,
    )


def test_define_again(doms: DomainList, web1: DomainInfo) -> None:
    dom = handle(doms)
    assert doms.define(xml("web1", memory=2048)).uuid == WEB1
    assert len(doms) == 1 and doms.peek(name="web1").definition.memory == 2048
    with dom:  # the same domain still
        dom.activate()
        dom.persistent = False
    info = doms.define(xml("web1", memory=4096))
    assert info.persistent  # a transient domain becomes persistent
    info = doms.peek(name="web1")
    assert (info.definition.memory, info.next_definition.memory) == (2048, 4096)
    with dom:
        dom.deactivate()
    info = doms.peek(name="web1")
    assert (info.definition.memory, info.next_definition) == (4096, None)


def test_define_what_is_no_definition(doms: DomainList) -> None:
    for bad in ("", "no xml", "<network/>", xml("a/b"), b"\xff\xfe", xml("a").replace("hvm", "")):
        with pytest.raises(DefinitionError):
            doms.define(bad)
    for wrong in (None, 7, {"name": "x"}):
        with pytest.raises((TypeError, DefinitionError)):
            doms.define(wrong)
    assert len(doms) == 0 and not doms.is_locked


def test_define_while_the_list_is_locked_by_the_caller(doms: DomainList) -> None:
    with doms.locked():
        doms.define(xml("web1"))
        assert doms.is_locked
        doms.undefine(name="web1")
        assert doms.is_locked
    assert len(doms) == 0


def test_undefine(doms: DomainList) -> None:
    for number, keys in enumerate(({"name": "a0"}, {"uuid": WEB1}, {"uuid": str(WEB2)})):
        doms.define(xml(f"a{number}", [None, WEB1, WEB2][number]))
        assert doms.undefine(**keys) is None
        assert len(doms) == 0 and not doms.is_locked


def test_undefine_an_active_domain_makes_it_transient(doms: DomainList, web1: DomainInfo) -> None:
    with doms.get(name="web1") as dom:
        number = dom.activate()
        dom.autostart = True
    doms.undefine(id=number)
    info = doms.peek(uuid=WEB1)
    assert (info.persistent, info.autostart, info.id) == (False, False, number)
    with pytest.raises(DomainTransient, match="transient"):
        doms.undefine(id=number)
    assert not doms.is_locked
    # Removing it once it is inactive is the driver's step.
    with doms.locked():
        with doms.find_by_id(number) as dom:
            dom.deactivate()
        doms.remove_inactive(dom)
    assert len(doms) == 0


def test_undefine_a_transient_inactive_domain(doms: DomainList) -> None:
    with doms.locked():
        doms.assign_def(definition("web1")).unlock()
    doms.undefine(name="web1")
    assert len(doms) == 0


def test_undefine_of_a_domain_that_the_caller_holds(doms: DomainList, web1: DomainInfo) -> None:
    with doms.locked(), doms.find_by_name("web1") as dom:
        with pytest.raises(ContractError):
            doms.undefine(name="web1")
        with pytest.raises(ContractError):
            doms.define(xml("web1"))
        assert dom.is_locked and doms.is_locked
    assert names(doms) == ["web1"]


def test_set_autostart(doms: DomainList, web1: DomainInfo) -> None:
    with doms.get(name="web1") as dom:
        doms.set_autostart(dom, True)
        assert dom.autostart and not dom.changed
        assert doms.peek(name="web1").autostart is True
        dom.pid = 1
        with pytest.raises(UncommittedChanges):
            doms.set_autostart(dom, False)
        dom.rollback()
        doms.set_autostart(dom, False)
        dom.persistent = False
        dom.commit()
        with pytest.raises(DomainTransient):
            doms.set_autostart(dom, True)
    assert doms.peek(name="web1").autostart is False
    with pytest.raises(DomainNotLocked):
        doms.set_autostart(dom, True)


# --- reading without a lock --------------------------------------------------------------------


def test_peek_is_committed_state(doms: DomainList, web1: DomainInfo) -> None:
    with doms.get(name="web1") as dom:
        dom.set_state(DomainState.PAUSED, PausedReason.IOERROR)
        dom.pid, dom.data = 12, {"a": [1]}
        info = doms.peek(uuid=WEB1)
        assert isinstance(info, DomainInfo)
        assert (info.state, info.pid, info.data) == (DomainState.SHUTOFF, None, None)
        dom.commit()
        later = doms.peek(uuid=WEB1)
    assert (info.state, info.pid, info.data) == (DomainState.SHUTOFF, None, None)  # a moment's
    assert (later.state, later.reason) == (DomainState.PAUSED, PausedReason.IOERROR)
    assert isinstance(later.reason, PausedReason)
    assert (later.pid, later.data["a"]) == (12, (1,))


def test_infos_outlive_their_domain(doms: DomainList, web1: DomainInfo) -> None:
    info = doms.peek(name="web1")
    doms.undefine(name="web1")
    doms.define(xml("other", memory=7))
    assert (info.name, info.uuid, info.definition.memory) == ("web1", WEB1, 1024)


def test_infos_are_immutable(doms: DomainList, web1: DomainInfo) -> None:
    info = doms.peek(name="web1")
    for field in (
        "id",
        "name",
        "uuid",
        "state",
        "reason",
        "persistent",
        "autostart",
        "pid",
        "is_active",
        "definition",
        "next_definition",
        "data",
    ):
        value = getattr(info, field)
        with pytest.raises(AttributeError):
            setattr(info, field, value)
    with pytest.raises(AttributeError):
        info.anything = 1
    assert "web1" in repr(info) and str(WEB1) in repr(info)


@pytest.mark.parametrize("definitions", [True, False], ids=["whole", "without definitions"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_carries_the_content_and_no_memory(
    doms: DomainList, web1: DomainInfo, definitions: bool, protocol: int
) -> None:
    """Nobody but a list makes what leads into a segment, or nowhere."""
    [info] = doms.snapshot(definitions=definitions)
    assert not hasattr(info, "__setstate__")
    for twin in (pickle.loads(pickle.dumps(info, protocol)), copy.copy(info), copy.deepcopy(info)):
        assert twin == info and hash(twin) == hash(info) and repr(twin) == repr(info)
        assert type(twin).__name__ == "DomainInfo" and isinstance(twin, DomainInfo)
        assert twin.to_dict() == info.to_dict()
        if definitions:
            assert twin.definition == info.definition
        else:
            with pytest.raises(AttributeError, match="definitions=True"):
                _ = twin.definition


def test_an_info_is_no_larger_than_a_cache_line() -> None:
    """But for what an object of this Python begins with, where that is more than two words."""
    assert core.DomainInfo.__basicsize__ - object.__basicsize__ <= 48


def test_snapshot_and_iteration(doms: DomainList) -> None:
    assert doms.snapshot() == [] == list(doms)
    for name in "cab":
        doms.define(xml(name))
    for infos in (doms.snapshot(), list(doms), doms.list(), doms.snapshot(definitions=False)):
        assert names(infos) == ["a", "b", "c"]
        assert all(isinstance(info, DomainInfo) for info in infos)
    for info in doms:  # what is being walked may change
        doms.undefine(uuid=info.uuid)
    assert len(doms) == 0


def test_a_snapshot_without_definitions_says_so(doms: DomainList) -> None:
    doms.define(xml("web1"))
    for infos in (doms.snapshot(definitions=False), doms.list(definitions=False)):
        for field in ("next_definition", "data"):
            with pytest.raises(AttributeError, match="definitions=True"):
                getattr(infos[0], field)


def test_contains_and_len(doms: DomainList) -> None:
    assert len(doms) == 0 and WEB1 not in doms
    doms.define(xml("web1", WEB1))
    assert len(doms) == 1 and WEB1 in doms and WEB2 not in doms
    assert doms.info.domains == 1
    doms.undefine(uuid=WEB1)
    assert len(doms) == 0 and WEB1 not in doms


@pytest.fixture
def zoo(doms: DomainList) -> DomainList:
    """Domains of each sort: p persistent, a active, s autostart; and some states."""
    for name in ("", "p", "a", "ap", "ps", "aps"):
        with doms.locked():
            dom = doms.assign_def(definition(f"vm-{name}"), persistent="p" in name)
        with dom:
            dom.autostart = "s" in name
            if "a" in name:
                dom.activate()
            if name == "ap":
                dom.set_state(DomainState.PAUSED)
            if name == "p":
                dom.set_state(DomainState.CRASHED)
    return doms


FILTERS: list[tuple[dict[str, Any], str]] = [
    ({}, ",p,a,ap,ps,aps"),
    ({"active": True}, "a,ap,aps"),
    ({"active": False}, ",p,ps"),
    ({"persistent": True}, "p,ap,ps,aps"),
    ({"persistent": False}, ",a"),
    ({"autostart": True}, "ps,aps"),
    ({"autostart": False}, ",p,a,ap"),
    ({"active": True, "persistent": False}, "a"),
    ({"active": True, "persistent": True, "autostart": False}, "ap"),
    ({"state": DomainState.RUNNING}, "a,aps"),
    ({"state": 3}, "ap"),
    ({"state": [DomainState.RUNNING, DomainState.PAUSED]}, "a,ap,aps"),
    ({"state": {DomainState.SHUTOFF}}, ",ps"),
    ({"state": (DomainState.SHUTOFF, DomainState.CRASHED)}, ",p,ps"),
    ({"state": [1, 1, 1]}, "a,aps"),
    ({"state": []}, None),
    ({"state": DomainState.NOSTATE}, None),
    ({"state": [1, 3], "persistent": True, "active": True}, "ap,aps"),
    ({"state": DomainState.SHUTOFF, "autostart": True}, "ps"),
    ({"active": True, "state": DomainState.SHUTOFF}, None),
]


@pytest.mark.parametrize("asked, expected", FILTERS, ids=lambda value: str(value)[:60])
def test_filters(zoo: DomainList, asked: dict[str, Any], expected: str | None) -> None:
    wanted = sorted([] if expected is None else [f"vm-{name}" for name in expected.split(",")])
    assert names(zoo.list(**asked)) == wanted
    assert names(zoo.list(**asked, definitions=False)) == wanted
    assert zoo.count(**asked) == len(wanted)


def test_filters_take_any_iterable_and_refuse_unknown_states(zoo: DomainList) -> None:
    assert zoo.count(state=(state for state in (1, 3))) == 3
    for bad in (8, -1, [1, 99], "walking", ["running", "walking"], 1.5):
        with pytest.raises((ValueError, TypeError)):
            zoo.list(state=bad)
        with pytest.raises((ValueError, TypeError)):
            zoo.count(state=bad)


def test_reading_needs_no_lock_at_all(zoo: DomainList, other: Party) -> None:
    other.tell("doms.lock(); held = [doms.find_by_name(info.name) for info in doms]")
    assert len(zoo.snapshot()) == len(zoo) == zoo.count() == zoo.info.domains == 6
    assert zoo.peek(name="vm-p", timeout=0).definition.name == "vm-p"
    assert zoo.peek(uuid=zoo.peek(name="vm-a").uuid).name == "vm-a"
    assert zoo.peek(id=zoo.peek(name="vm-a").id).name == "vm-a"
    assert zoo.peek(name="nobody") is None
    assert zoo.check()
    other.tell("[dom.unlock() for dom in held]; doms.unlock()")


# --- info, check, repr -------------------------------------------------------------------------


def test_info(doms: DomainList, store: Store) -> None:
    info = doms.info
    assert (info.domains, info.active, info.max_domains) == (0, 0, 64)
    assert (info.name, info.path, info.config_dir, info.autostart_dir) == (None,) * 4
    assert info.lock == store.name
    assert 0 < info.bytes_committed < info.bytes_max
    assert info.heap_used == 0 < info.heap_free
    assert info.creator.pid == os.getpid() and info.creator.alive and info.creator.command
    assert abs(info.created - time.time()) < 60
    assert os.getpid() in [process.pid for process in info.attached]
    doms.define(xml("a", description="x" * 10_000))
    with doms.get(name="a") as dom:
        dom.activate()
    later = doms.info
    assert (later.domains, later.active) == (1, 1)
    assert 10_000 <= later.heap_used < 40_000
    assert later.heap_used + later.heap_free == info.heap_free
    assert later.bytes_committed > info.bytes_committed
    with doms.locked():
        doms.free()
    assert (doms.info.heap_used, doms.info.active) == (0, 0)
    with pytest.raises(AttributeError):
        doms.info.domains = 7


def test_check(doms: DomainList) -> None:
    for name in "abc":
        doms.define(xml(name))
    report = doms.check()
    assert report and report.problems == [] and report.counts["domains"] == 3
    with doms.locked():
        assert doms.check()
        assert doms.is_locked
    assert not doms.is_locked


def test_repr(doms: DomainList, web1: DomainInfo) -> None:
    assert "domains=1" in repr(doms)
    dom = doms.get(name="web1")
    assert "web1" in repr(dom) and str(WEB1) in repr(dom) and "locked" in repr(dom)
    dom.unlock()
    assert str(WEB1) in repr(dom) and "locked" not in repr(dom)
    doms.close()
    assert "closed" in repr(doms)


# --- close -------------------------------------------------------------------------------------


CLOSED: dict[str, Callable[[DomainList, Domain], Any]] = {
    "lock": lambda doms, dom: doms.lock(),
    "unlock": lambda doms, dom: doms.unlock(),
    "acquire": lambda doms, dom: doms.acquire(),
    "release": lambda doms, dom: doms.release(),
    "locked": lambda doms, dom: doms.locked().__enter__(),
    "get": lambda doms, dom: doms.get(name="web1"),
    "lookup": lambda doms, dom: doms.lookup(name="web1"),
    "peek": lambda doms, dom: doms.peek(name="web1"),
    "find_by_name": lambda doms, dom: doms.find_by_name("web1"),
    "find_by_uuid": lambda doms, dom: doms.find_by_uuid(WEB1),
    "find_by_id": lambda doms, dom: doms.find_by_id(1),
    "lock_many": lambda doms, dom: doms.lock_many([]),
    "assign_def": lambda doms, dom: doms.assign_def(definition("web2")),
    "remove_inactive": lambda doms, dom: doms.remove_inactive(dom),
    "free": lambda doms, dom: doms.free(),
    "rename": lambda doms, dom: doms.rename(dom, "x"),
    "define": lambda doms, dom: doms.define(xml("web2")),
    "undefine": lambda doms, dom: doms.undefine(name="web1"),
    "load_all_configs": lambda doms, dom: doms.load_all_configs("/nonexistent"),
    "save_config": lambda doms, dom: doms.save_config(dom),
    "delete_config": lambda doms, dom: doms.delete_config(dom),
    "snapshot": lambda doms, dom: doms.snapshot(),
    "list": lambda doms, dom: doms.list(),
    "count": lambda doms, dom: doms.count(),
    "iter": lambda doms, dom: list(doms),
    "len": lambda doms, dom: len(doms),
    "in": lambda doms, dom: WEB1 in doms,
    "info": lambda doms, dom: doms.info,
    "check": lambda doms, dom: doms.check(),
    "Domain.lock": lambda doms, dom: dom.lock(),
    "Domain.try_lock": lambda doms, dom: dom.try_lock(),
    "Domain.acquire": lambda doms, dom: dom.acquire(),
    "with Domain": lambda doms, dom: dom.__enter__(),
}


@pytest.mark.parametrize("call", CLOSED)
def test_everything_on_a_closed_list_says_so(doms: DomainList, web1: DomainInfo, call: str) -> None:
    dom = handle(doms)
    doms.close()
    with pytest.raises(ListClosed):
        CLOSED[call](doms, dom)


def test_closing_twice_is_no_error(doms: DomainList, web1: DomainInfo) -> None:
    dom = handle(doms)
    doms.close()
    doms.close()
    assert doms.closed and not doms.is_locked and not dom.is_locked
    assert dom.uuid == WEB1


def test_close_gives_the_list_lock_back(store: Store) -> None:
    doms = store.make()
    with thread_party(doms=doms) as other:
        doms.lock()
        other.start("doms.lock(); seen = doms.is_locked; doms.unlock(); seen")
        assert other.is_waiting()
        # One attachment is closed for everybody in the process; who is inside comes out in order.
        twin = pickle.loads(pickle.dumps(doms))
        assert twin is doms
        doms.unlock()
        assert other.answer() is True
        other.tell("doms.lock(); doms.close()")
        assert other.tell("doms.closed, doms.is_locked") == (True, False)


def test_a_domain_that_is_locked_at_close_can_be_unlocked(
    doms: DomainList, web1: DomainInfo
) -> None:
    dom = doms.get(name="web1")
    dom.pid = 5
    doms.close()
    assert dom.is_locked and dom.pid == 5
    dom.unlock()
    assert not dom.is_locked


def test_a_list_is_a_context_manager(store: Store) -> None:
    with store.make() as doms:
        doms.define(xml("web1"))
    assert doms.closed
    with pytest.raises(ListClosed):
        len(doms)


def test_what_nobody_refers_to_is_gone(store: Store) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:shmdomains")

    gc.collect()  # of earlier tests
    fds, mapped = len(os.listdir("/proc/self/fd")), maps()
    for _ in range(3):
        doms = store.make(room=8)
        doms.define(xml("web1"))
        dom = handle(doms)
        assert maps() > mapped
        doms.close()
        del doms, dom
        gc.collect()
    assert (len(os.listdir("/proc/self/fd")), maps()) == (fds, mapped)


# --- limits, creation --------------------------------------------------------------------------


def test_a_full_list(store: Store) -> None:
    doms = store.make(room=3)
    for name in "abc":
        doms.define(xml(name))
    with pytest.raises(SegmentFull) as caught:
        doms.define(xml("d"))
    assert isinstance(caught.value, MemoryError) and "max_domains" in str(caught.value)
    with pytest.raises(SegmentFull), doms.locked():
        doms.assign_def(definition("d"))
    assert names(doms) == ["a", "b", "c"] and not doms.is_locked
    assert doms.define(xml("a", memory=7)).name == "a"  # not a new one
    doms.undefine(name="b")
    doms.define(xml("d"))
    assert names(doms) == ["a", "c", "d"] and doms.check()
    doms.close()


def test_slots_are_used_again(store: Store) -> None:
    doms = store.make(room=2)
    for number in range(100):
        doms.define(xml(f"vm{number}"))
        doms.undefine(name=f"vm{number}")
    assert doms.info.heap_used == 0 and doms.check()
    doms.close()


def test_bad_limits() -> None:
    for bad in (0, -1, 2**24, 2**40):
        with pytest.raises(ValueError):
            DomainList(max_domains=bad)
    for lock in ("", "Robust", None, 1):
        with pytest.raises(ValueError):
            DomainList(lock=lock)
    with pytest.raises(ValueError):
        DomainList(max_domains=10, max_bytes=4096)
    with pytest.raises(TypeError):
        DomainList("a name")


def test_lists_are_separate(store: Store) -> None:
    first, second = store.make(), store.make()
    first.define(xml("web1", WEB1))
    assert len(second) == 0
    second.define(xml("web1", WEB1))
    assert handle(first) != handle(second)
    with first.get(name="web1"), second.get(name="web1"):
        pass
    first.close()
    assert names(second) == ["web1"]
    second.close()


def test_many_domains_and_growing_indexes(store: Store) -> None:
    """Past the first tables of 1,024 entries, up and down, by every key."""
    room = 3000 if store.name == "robust" else 1000
    doms = store.make(room=room)
    made = definition("vm")
    with doms.locked():
        for number in range(room):
            with doms.assign_def(made.replace(name=f"vm{number}"), persistent=True) as dom:
                assert dom.activate() == number + 1
    assert len(doms) == doms.count(active=True) == room
    for number in range(0, room, 7):
        info = doms.peek(id=number + 1)
        assert info.name == f"vm{number}" and doms.peek(name=info.name).uuid == info.uuid
        assert info.uuid in doms
    with doms.locked():
        for number in range(0, room, 2):
            with doms.find_by_name(f"vm{number}") as dom:
                dom.deactivate()
            doms.remove_inactive(dom)
    assert len(doms) == room // 2
    for number in range(room):
        assert (doms.peek(name=f"vm{number}") is None) == (number % 2 == 0)
        assert (doms.peek(id=number + 1) is None) == (number % 2 == 0)
    assert doms.check()
    doms.close()


# --- pickles -----------------------------------------------------------------------------------


def test_a_memfd_list_that_is_gone_says_so_when_it_is_used(store: Store) -> None:
    doms = store.make()
    doms.define(xml("web1"))
    pickled = pickle.dumps(doms), pickle.dumps(handle(doms))
    assert pickle.loads(pickled[0]) is doms
    doms.close()
    del doms
    gc.collect()
    for blob in pickled:
        with pytest.raises(ShmDomainsError, match=f"process {os.getpid()}, .*initargs"):
            pickle.loads(blob).lock()


# --- the public names --------------------------------------------------------------------------


def test_one_tree_of_errors() -> None:
    for name in shmdomains.__all__:
        found = getattr(shmdomains, name)
        if isinstance(found, type) and issubclass(found, Exception):
            assert issubclass(found, ShmDomainsError), name
    for name in ("LockLost", "InDoubt", "Unavailable"):
        assert issubclass(getattr(shmdomains, name), ShmDomainsError)
    assert issubclass(LockTimeout, TimeoutError) and issubclass(DomainNotFound, LookupError)
    assert issubclass(DefinitionError, ValueError)
    assert isinstance(DomainDef, type)
