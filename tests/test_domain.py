"""Every method and every error of `Domain`, for every store: lock, fields, transactions.

`web1` is a locked domain's handle; `other` is a second thread. Committed state is read with `peek`,
which takes no lock.
"""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
from helpers import Party, Store, definition, environment, xml

from shmdomains import (
    AlreadyLocked,
    ContractError,
    DefinitionError,
    Domain,
    DomainActive,
    DomainInactive,
    DomainInfo,
    DomainList,
    DomainNotLocked,
    DomainRemoved,
    DomainState,
    LockTimeout,
    NotOwner,
    PausedReason,
    RunningReason,
    SegmentFull,
    ShmDomainsError,
    ShutoffReason,
)
from shmdomains.states import REASONS

pytestmark = pytest.mark.usefixtures("nothing_left")

WEB1 = UUID("11111111-2222-4333-8444-555555555555")


@pytest.fixture
def web1(doms: DomainList) -> Iterator[Domain]:
    """A locked handle to a persistent, inactive domain; unlocked at the end if need be."""
    doms.define(xml("web1", WEB1))
    dom = doms.get(name="web1")
    yield dom
    if dom.is_locked:
        dom.unlock()


def seen(doms: DomainList) -> DomainInfo:
    """What everybody sees."""
    info = doms.peek(uuid=WEB1)
    assert info is not None
    return info


# --- the lock ----------------------------------------------------------------------------------


def test_lock_and_unlock(web1: Domain) -> None:
    assert web1.is_locked
    assert web1.unlock() is None
    assert not web1.is_locked
    assert web1.lock() is None
    assert web1.is_locked
    web1.unlock()
    assert web1.try_lock() is True and web1.is_locked


def test_a_domain_answers_like_a_multiprocessing_lock(web1: Domain, other: Party) -> None:
    assert web1.release() is None
    assert web1.acquire() is True
    other.tell(f"twin = pickle.loads({pickle.dumps(web1)!r})")
    assert other.tell("twin.acquire(False)") is False
    assert other.tell("twin.acquire(block=True, timeout=0.01)") is False
    assert other.tell("twin.acquire(True, -1)") is False
    web1.pid = 1
    web1.release()  # commits, like unlock
    assert other.tell("twin.acquire(True, 5), twin.pid, twin.release()") == (True, 1, None)


def test_unlock_needs_the_lock(web1: Domain) -> None:
    web1.unlock()
    for call in (web1.unlock, web1.release, web1.commit, web1.rollback):
        with pytest.raises(DomainNotLocked) as caught:
            call()
        assert isinstance(caught.value, ContractError) and str(WEB1) in str(caught.value)


def test_another_thread_may_not_unlock(web1: Domain, doms: DomainList, other: Party) -> None:
    web1.pid = 3
    errors: list[type] = []

    def meddle() -> None:
        for call in (web1.unlock, web1.release, web1.commit, web1.rollback, lambda: web1.pid):
            try:
                call()
            except ContractError as exc:
                errors.append(type(exc))
        errors.append(web1.is_locked)  # type: ignore[arg-type]
        try:
            web1.lock(0)
        except LockTimeout as exc:
            errors.append(type(exc))

    thread = threading.Thread(target=meddle)
    thread.start()
    thread.join(20)
    refused = [NotOwner, NotOwner, DomainNotLocked, DomainNotLocked, DomainNotLocked]
    assert errors == [*refused, False, LockTimeout]
    assert web1.is_locked and web1.pid == 3 and web1.changed


FIELDS = [
    "id", "name", "state", "reason", "persistent", "autostart", "pid", "is_active", "definition",
    "next_definition", "data", "changed", "previous_owner_died",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_reading_a_field_needs_the_lock(web1: Domain, field: str) -> None:
    getattr(web1, field)
    web1.unlock()
    with pytest.raises(DomainNotLocked) as caught:
        getattr(web1, field)
    assert "with" in str(caught.value)


CHANGES: dict[str, Any] = {
    "state": DomainState.RUNNING,
    "reason": 1,
    "persistent": False,
    "autostart": True,
    "pid": 7,
    "definition": definition("web1", WEB1, memory=7),
    "next_definition": definition("web1", WEB1, memory=8),
    "data": {"x": 1},
}


@pytest.mark.parametrize("field", CHANGES)
def test_changing_a_field_needs_the_lock(web1: Domain, doms: DomainList, field: str) -> None:
    before = getattr(web1, field)
    web1.unlock()
    with pytest.raises(DomainNotLocked):
        setattr(web1, field, CHANGES[field])
    with web1:
        assert getattr(web1, field) == before and not web1.changed


def test_methods_need_the_lock(web1: Domain, doms: DomainList) -> None:
    web1.unlock()
    for call in (
        lambda: web1.set_state(DomainState.RUNNING),
        lambda: web1.activate(),
        lambda: web1.deactivate(),
        lambda: doms.save_config(web1),
        lambda: doms.delete_config(web1),
        lambda: doms.set_autostart(web1, True),
    ):
        with pytest.raises(DomainNotLocked):
            call()
    assert not seen(doms).is_active


def test_uuid_and_is_locked_need_no_lock(web1: Domain, other: Party) -> None:
    web1.unlock()
    assert web1.uuid == WEB1 and isinstance(web1.uuid, UUID) and web1.is_locked is False
    other.tell("dom = doms.get(name='web1')")
    assert web1.uuid == WEB1 and web1.is_locked is False  # by this thread
    other.tell("dom.unlock()")


def test_what_can_not_be_assigned(web1: Domain) -> None:
    for field in ("id", "name", "uuid", "is_active", "is_locked", "changed", "previous_owner_died"):
        with pytest.raises(AttributeError):
            setattr(web1, field, getattr(web1, field))
    with pytest.raises(AttributeError):
        web1.sttae = DomainState.RUNNING  # type: ignore[attr-defined]


def test_the_holder_is_named(web1: Domain, other: Party) -> None:
    with pytest.raises(LockTimeout) as caught:
        other.tell("doms.get(name='web1', timeout=0)")
    holder = caught.value.holder
    assert holder is not None and holder.tid == threading.get_native_id()
    assert "web1" in str(caught.value) and f"process {holder.pid}" in str(caught.value)


def test_a_dropped_handle_gives_its_lock_back(doms: DomainList, other: Party) -> None:
    doms.define(xml("web1", WEB1))
    dom = doms.get(name="web1")
    dom.pid = 3
    with pytest.warns(ResourceWarning, match="still locked"):
        del dom
        gc.collect()
    assert other.tell("with doms.get(name='web1', timeout=0) as dom: seen = dom.pid\nseen") is None
    with doms.locked():  # the thread holds nothing
        pass


def test_a_handle_dropped_where_warnings_are_errors(
    doms: DomainList, other: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    doms.define(xml("web1", WEB1))
    dom = doms.get(name="web1")
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda hint: ignored.append(hint.exc_type))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del dom
        gc.collect()
    assert ignored in ([], [ResourceWarning])
    other.tell("doms.get(name='web1', timeout=0).unlock()")


def test_a_handle_that_another_thread_drops(doms: DomainList, other: Party) -> None:
    """tests/test_dropped.py has more of it."""
    doms.define(xml("web1", WEB1))
    doms.define(xml("web2"))
    box = [doms.get(name="web1")]
    box[0].pid = 3
    me = threading.get_native_id()
    with pytest.warns(ResourceWarning, match="still locked") as warned:
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join(20)
    if doms._kind == "robust":
        assert f"thread {me}; its changes are rolled back, and the lock is freed" in str(
            warned[0].message
        )
    assert other.tell("with doms.get(name='web1', timeout=0) as dom: seen = dom.pid\nseen") is None
    with doms.get(name="web1", timeout=0) as dom:
        assert dom.pid is None and dom.previous_owner_died is None
    with doms.locked():
        pass


def test_who_drops_others_handles_may_lock_as_many_as_ever(doms: DomainList) -> None:
    """The count of locks held is that of the thread that locked."""
    infos = [doms.define(xml(name)) for name in "abcdef"]
    with doms.locked():
        box = [doms.find_by_name(name) for name in "abc"]
    got: list[Any] = []

    def drop_and_lock() -> None:
        box.clear()
        try:
            with doms.lock_many(infos[3:], timeout=5) as many:
                got.extend(dom.name for dom in many)
        except Exception as exc:
            got.append(exc)

    with pytest.warns(ResourceWarning, match="still locked"):
        thread = threading.Thread(target=drop_and_lock)
        thread.start()
        thread.join(20)
    assert got == ["d", "e", "f"]
    with doms.lock_many(infos, timeout=5) as many:
        assert len(many) == 6


# --- handles -----------------------------------------------------------------------------------


def test_handles_are_equal_when_their_domain_is(doms: DomainList, web1: Domain) -> None:
    web1.unlock()
    second = doms.get(name="web1")
    second.unlock()
    pickled = pickle.loads(pickle.dumps(web1))
    assert web1 is not second and web1 == second == pickled
    assert len({web1, second, pickled}) == 1
    assert (web1 != second) is False
    doms.define(xml("web2"))
    with doms.get(name="web2") as web2:
        assert web1 != web2 and len({web1, web2}) == 2
    assert web1 != WEB1 and web1 != "web1" and web1 is not None
    doms.undefine(name="web1")
    doms.define(xml("web1", WEB1))
    with doms.get(name="web1") as later:
        assert later != web1  # another life
    assert web1 == second


def test_every_handle_leads_to_the_same_hold(web1: Domain, doms: DomainList) -> None:
    twin = pickle.loads(pickle.dumps(web1))
    assert twin is not web1 and twin.is_locked
    web1.pid = 5
    assert twin.pid == 5 and twin.changed
    twin.data = "through the twin"
    twin.definition = twin.definition.replace(title="t")
    assert web1.data == "through the twin" and web1.definition.title == "t"
    twin.activate()
    assert web1.is_active and web1.id == twin.id
    twin.rollback()
    assert web1.data is None and web1.pid is None and not web1.is_active
    web1.pid = 6
    with twin:  # holds it already
        assert twin.pid == 6
    assert not web1.is_locked and not twin.is_locked
    assert seen(doms).pid == 6


def test_the_hold_outlives_nothing_but_its_handle(web1: Domain, doms: DomainList) -> None:
    """A second handle that goes takes nothing with it."""
    twin = pickle.loads(pickle.dumps(web1))
    web1.pid = 5
    del twin
    gc.collect()
    assert web1.is_locked and web1.pid == 5


# --- what is freed is the next handle ---


def test_a_handle_has_nothing_of_an_earlier_one(doms: DomainList, other: Party) -> None:
    doms.define(xml("web1", WEB1))
    doms.define(xml("web2"))
    for _ in range(40):  # more than are kept
        with doms.get(name="web1") as dom, pytest.raises(ZeroDivisionError), dom:
            dom.pid, dom.data = 5, {"of": "web1"}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                thrown = doms.get(name="web2", timeout=0)
                thrown.pid = 7
                del thrown  # locked, and changed
            raise ZeroDivisionError
        del dom
        dom = doms.get(name="web2")
        assert not dom.changed and dom.pid is None and dom.data is None
        assert dom.name == "web2" and dom.uuid != WEB1 and dom.previous_owner_died is None
        dom.unlock()
        assert not dom.is_locked
        with pytest.raises(DomainNotLocked):
            _ = dom.pid
    other.tell("[doms.get(name=name, timeout=0).unlock() for name in ('web1', 'web2')]")


def test_many_handles_at_once_and_again(doms: DomainList) -> None:
    names = [f"vm{number}" for number in range(50)]
    for name in names:
        doms.define(xml(name))
    for _ in range(3):
        with doms.lock_many([info.uuid for info in doms.snapshot()]) as held:
            assert sorted(dom.name for dom in held) == sorted(names)
            assert all(gc.is_tracked(dom) for dom in held)
            assert len({id(dom) for dom in held}) == len(names)
        del held


def test_a_handle_that_never_led_anywhere_was_one_that_did(store: Store) -> None:
    """The mapping goes with the last handle: none may be counted off that was not counted."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:shmdomains")

    gc.collect()
    before = mapped()
    doms = store.make(room=4)
    doms.define(xml("web1", WEB1))
    doms.define(xml("web2"))
    failed: list[LockTimeout] = []

    def want_what_is_held(doms: DomainList) -> None:
        doms.get(name="web2").unlock()
        for _ in range(3):  # a handle is made before the lock is asked for
            try:
                doms.get(name="web1", timeout=0)
            except LockTimeout as exc:
                failed.append(exc.with_traceback(None))

    with doms.get(name="web1"):
        waiter = threading.Thread(target=want_what_is_held, args=[doms])
        waiter.start()
        waiter.join()
    assert len(failed) == 3
    dom = doms.get(name="web2")
    doms.close()
    del doms
    assert mapped() == before + 1 and dom.name == "web2"
    dom.unlock()
    del dom
    gc.collect()
    assert mapped() == before


def test_a_weak_reference_is_to_one_handle(doms: DomainList) -> None:
    doms.define(xml("web1", WEB1))
    for _ in range(20):
        dom = doms.get(name="web1")
        gone: list[Any] = []
        weak = weakref.ref(dom, gone.append)
        dom.unlock()
        del dom
        assert weak() is None and gone == [weak]
        again = doms.get(name="web1")
        assert weak() is None and weakref.getweakrefcount(again) == 0
        again.unlock()


def test_a_locked_handle_that_goes_is_not_found_by_what_hears_of_it(doms: DomainList) -> None:
    """A weak reference's callback runs while the handle has no references and the lock is held."""
    doms.define(xml("web1", WEB1))
    doms.define(xml("web2"))
    heard: list[Any] = []

    def hear(_: Any) -> None:
        doms.get(name="web2", timeout=0).unlock()
        heard.append(twin.is_locked)
        for ask in (lambda: doms.get(name="web1", timeout=0), twin.unlock, twin.try_lock):
            try:
                heard.append(ask())
            except ShmDomainsError as exc:
                heard.append(type(exc))

    for _ in range(3):
        dom = doms.get(name="web1")
        twin = pickle.loads(pickle.dumps(dom))
        weak = weakref.ref(dom, hear)
        with pytest.warns(ResourceWarning, match="still locked") as warned:
            del dom
        assert weak() is None and len(warned) == 1
        assert heard == [False, AlreadyLocked, DomainNotLocked, AlreadyLocked]
        heard.clear()
    handles = [twin, *doms.lock_many([info.uuid for info in doms.snapshot()])]
    assert len({id(dom) for dom in handles}) == 3
    for dom in handles[1:]:
        dom.unlock()


def test_a_finalizer_that_is_given_to_domains_runs_for_each(
    doms: DomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector's mark that it ran is not the next handle's."""
    ended: list[str] = []
    doms.define(xml("web1", WEB1))
    monkeypatch.setattr(Domain, "__del__", lambda dom: ended.append("once"), raising=False)
    for _ in range(40):
        doms.get(name="web1").unlock()
    assert len(ended) == 40


def test_the_collector_finds_a_list_that_keeps_a_handle(store: Store) -> None:
    """Through a handle that was another one before, too."""

    class Keeping(DomainList):
        kept: Domain

    def once() -> weakref.ref[DomainList]:
        doms = Keeping(max_domains=2) if store.name == "robust" else store.make(room=2)
        doms.define(xml("web1", WEB1))
        dom = doms.get(name="web1")
        dom.unlock()
        doms.kept = dom  # type: ignore[attr-defined]
        return weakref.ref(doms)

    for _ in range(20):
        weak = once()
        gc.collect()
        assert weak() is None


def test_a_removed_domain(web1: Domain, doms: DomainList) -> None:
    web1.unlock()
    doms.undefine(name="web1")
    for call in (
        lambda: web1.lock(),
        lambda: web1.lock(0),
        lambda: web1.try_lock(),
        lambda: web1.acquire(),
        lambda: web1.acquire(False),
        lambda: web1.__enter__(),
    ):
        with pytest.raises(DomainRemoved):
            call()
    assert not web1.is_locked
    with pytest.raises(DomainNotLocked):
        web1.name  # noqa: B018
    with doms.locked():  # nothing stayed locked
        doms.free(timeout=0)


def test_a_stale_handle_of_a_slot_that_this_thread_holds(doms: DomainList, other: Party) -> None:
    """The slot has a new domain, held here: the stale handle is stale, and the hold stands."""
    doms.define(xml("old"))
    stale = doms.get(name="old")
    stale.unlock()
    doms.undefine(name="old")
    doms.define(xml("web1", WEB1))
    with doms.get(name="web1") as dom:
        dom.pid = 1
        for call in (stale.try_lock, stale.acquire, lambda: stale.lock(0), lambda: stale.lock(5)):
            with pytest.raises(DomainRemoved):
                call()
            assert dom.is_locked and dom.pid == 1 and dom.previous_owner_died is None
            with pytest.raises(LockTimeout):
                other.tell("doms.get(name='web1', timeout=0)")
        with pytest.raises(DomainRemoved):
            stale.__enter__()
    assert seen(doms).pid == 1 and doms.check()


def test_a_stale_handle_does_not_wait_for_the_slots_next_domain(
    doms: DomainList, other: Party
) -> None:
    """It is told at once: that domain is none of its business, and its holder might be stuck."""
    doms.define(xml("old"))
    stale = doms.get(name="old")
    stale.unlock()
    doms.undefine(name="old")
    doms.define(xml("web1", WEB1))
    other.tell("dom = doms.get(name='web1')")
    for call in (stale.try_lock, lambda: stale.lock(0), lambda: stale.lock(0.05), stale.acquire):
        with pytest.raises(DomainRemoved):
            call() if call != stale.acquire else stale.acquire(timeout=0.05)
    with pytest.raises(DomainRemoved), doms.locked():
        doms.remove_inactive(stale, timeout=0.05)
    other.tell("dom.unlock()")


# --- with --------------------------------------------------------------------------------------


def test_with_locks_and_commits(web1: Domain, doms: DomainList) -> None:
    web1.unlock()
    with web1 as same:
        assert same is web1 and web1.is_locked
        web1.pid = 1
        assert seen(doms).pid is None
    assert not web1.is_locked and seen(doms).pid == 1


def test_with_takes_over_a_lock_that_is_held(web1: Domain, doms: DomainList) -> None:
    web1.pid = 1
    with web1:
        assert web1.pid == 1
        web1.autostart = True
    assert not web1.is_locked
    assert (seen(doms).pid, seen(doms).autostart) == (1, True)


def test_an_exception_in_the_block_rolls_back_and_unlocks(web1: Domain, doms: DomainList) -> None:
    web1.unlock()
    for error in (KeyError, KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error), web1:
            web1.pid = 1
            web1.data = {"lost": True}
            web1.definition = web1.definition.replace(title="lost")
            web1.activate()
            raise error
        assert not web1.is_locked
        info = seen(doms)
        assert (info.pid, info.data, info.is_active) == (None, None, False)
        assert info.definition.title is None and info.state is DomainState.SHUTOFF


def test_unlocking_inside_the_block(web1: Domain, doms: DomainList, other: Party) -> None:
    with web1:
        web1.pid = 1
        web1.unlock()
        other.tell("doms.get(name='web1', timeout=0).unlock()")
    assert seen(doms).pid == 1
    with pytest.raises(KeyError), web1:
        web1.pid = 2
        web1.unlock()
        raise KeyError  # too late for this one
    assert seen(doms).pid == 2


def test_nested_with(web1: Domain, doms: DomainList, other: Party) -> None:
    """The outermost block ends the hold, and commits; an unlock inside ends it at once."""
    with web1:
        web1.pid = 1
        with web1:
            web1.autostart = True
        assert web1.is_locked and web1.changed
        assert seen(doms).pid is None
        web1.pid = 2
    assert not web1.is_locked
    other.tell("doms.get(name='web1', timeout=0).unlock()")
    assert (seen(doms).pid, seen(doms).autostart) == (2, True)
    with web1:
        with web1:
            web1.unlock()
        assert not web1.is_locked
        with pytest.raises(DomainNotLocked):
            web1.pid = 2


def test_nested_with_and_an_exception(web1: Domain, doms: DomainList) -> None:
    with pytest.raises(KeyError), web1:
        web1.pid = 1
        with web1:
            raise KeyError
    assert not web1.is_locked and seen(doms).pid is None


# --- transactions ------------------------------------------------------------------------------


@pytest.mark.parametrize("field", CHANGES)
def test_a_change_is_ones_own_until_it_is_committed(
    web1: Domain, doms: DomainList, other: Party, field: str
) -> None:
    before, value = getattr(web1, field), CHANGES[field]
    assert value != before and not web1.changed
    setattr(web1, field, value)
    assert getattr(web1, field) == value and web1.changed
    assert getattr(seen(doms), field) == before
    assert other.tell(f"doms.peek(name='web1').{field}") == before
    web1.rollback()
    assert getattr(web1, field) == before and not web1.changed
    setattr(web1, field, value)
    web1.commit()
    assert getattr(web1, field) == value and not web1.changed and web1.is_locked
    assert getattr(seen(doms), field) == value
    web1.rollback()  # what is committed stays
    assert getattr(web1, field) == value
    setattr(web1, field, before)
    web1.unlock()
    assert getattr(seen(doms), field) == before


def test_commit_is_a_point_of_no_return(web1: Domain, doms: DomainList) -> None:
    with pytest.raises(KeyError), web1:
        web1.pid = 1
        web1.data = "first"
        web1.commit()
        web1.pid = 2
        web1.data = "second"
        raise KeyError
    assert (seen(doms).pid, seen(doms).data) == (1, "first")


def test_commit_and_rollback_of_nothing(web1: Domain, doms: DomainList) -> None:
    before, receipt = doms.peek("web1"), web1._receipt
    for call in (web1.commit, web1.rollback, web1.commit):
        assert call() is None
        assert web1.is_locked and not web1.changed
        assert web1._receipt == receipt  # nothing was stored
    assert doms.peek("web1") == before


def test_many_commits_in_one_hold(web1: Domain, doms: DomainList) -> None:
    for number in range(50):
        web1.data = {"n": number, "filler": "x" * (number * 37)}
        web1.pid = number + 1
        web1.commit()
        info = seen(doms)
        assert (info.data["n"], info.pid) == (number, number + 1)
    web1.data = None
    web1.unlock()
    assert doms.check()


def test_a_bad_timeout_of_a_commit(web1: Domain, doms: DomainList) -> None:
    web1.pid = 1
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError):
            web1.commit(bad)
        assert web1.is_locked and web1.pid == 1 and seen(doms).pid is None
    web1.commit(timeout=0)
    assert seen(doms).pid == 1


def test_unlock_with_a_bad_timeout_is_refused_whether_or_not_it_would_matter(web1: Domain) -> None:
    with pytest.raises(ValueError):
        web1.unlock(timeout=-1)


def test_a_failed_unlock_rolls_back_and_unlocks(store: Store) -> None:
    """No room for the blob: nothing is committed, the lock is free, the error is raised."""
    doms = store.make(room=4, size=4 << 20)
    doms.define(xml("web1", WEB1))
    dom = doms.get(name="web1")
    too_much = b"\0" * doms.info.heap_free
    for give_up in (dom.commit, dom.unlock):
        dom.pid, dom.data = 7, too_much
        number = dom.activate()
        with pytest.raises(SegmentFull):
            give_up()
        info = seen(doms)
        assert (info.pid, info.data, info.id) == (None, None, -1)
        assert doms.peek(id=number) is None
        if give_up == dom.commit:
            assert dom.is_locked and not dom.changed
            assert (dom.pid, dom.data, dom.is_active) == (None, None, False)
    assert not dom.is_locked
    with pytest.raises(SegmentFull), dom:
        dom.data = too_much
    with dom:
        dom.pid, dom.data = 8, b"\0" * (doms.info.heap_free // 3)
    assert seen(doms).pid == 8 and len(seen(doms).data) > 100_000
    assert doms.check()
    doms.close()


def test_blobs_up_to_16_mib(doms: DomainList, web1: Domain) -> None:
    largest = b"\x01" * ((16 << 20) - 5)  # 5 bytes of MessagePack header
    web1.data = largest
    web1.commit()
    assert seen(doms).data == largest
    web1.data = None
    web1.commit()
    with pytest.raises((SegmentFull, ValueError), match="16 MiB"):
        web1.data = largest + b"\x01"
    assert not web1.changed
    with pytest.raises(DefinitionError):
        web1.definition = web1.definition.replace(description="x" * (17 << 20))
    assert not web1.changed and doms.info.heap_used < 1 << 16


# --- fields ------------------------------------------------------------------------------------


def test_state_and_reason(web1: Domain, doms: DomainList) -> None:
    assert (web1.state, web1.reason) == (DomainState.SHUTOFF, ShutoffReason.UNKNOWN)
    web1.set_state(DomainState.PAUSED, PausedReason.IOERROR)
    assert web1.state is DomainState.PAUSED and web1.reason is PausedReason.IOERROR
    web1.state = DomainState.RUNNING
    assert web1.reason is RunningReason.UNKNOWN  # a reason belongs to its state
    web1.reason = RunningReason.WAKEUP
    web1.commit()
    info = seen(doms)
    assert info.state is DomainState.RUNNING and info.reason is RunningReason.WAKEUP
    web1.set_state(3)  # type: ignore[arg-type]
    assert web1.state is DomainState.PAUSED
    web1.reason = 4711  # newer than we know
    assert web1.reason == 4711


def test_every_state_and_reason(web1: Domain, doms: DomainList) -> None:
    for state in DomainState:
        for reason in REASONS[state]:
            web1.set_state(state, reason)
            web1.commit()
            info = seen(doms)
            assert (info.state, info.reason) == (web1.state, web1.reason) == (state, reason)
            assert type(info.state) is DomainState and type(info.reason) is REASONS[state]


@pytest.mark.parametrize("bad", [8, -1, 99, 2**40, "running", None, 1.5], ids=repr)
def test_bad_states(web1: Domain, doms: DomainList, bad: Any) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError)):
        web1.state = bad
    assert web1.state is DomainState.SHUTOFF and not web1.changed


@pytest.mark.parametrize("bad", [-1, 65536, 2**40, "booted", None], ids=repr)
def test_bad_reasons(web1: Domain, doms: DomainList, bad: Any) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError)):
        web1.reason = bad
    with pytest.raises((ValueError, TypeError, OverflowError)):
        web1.set_state(DomainState.RUNNING, bad)
    # what raised has changed nothing
    assert (web1.state, web1.reason, web1.changed) == (DomainState.SHUTOFF, 0, False)


def test_pid(web1: Domain, doms: DomainList) -> None:
    for pid in (1, 4711, 2**22, 2**31 - 1, None):
        web1.pid = pid
        assert web1.pid == pid
        web1.commit()
        assert seen(doms).pid == pid
    for bad in (0, -1, 2**31, "1", 1.5):
        with pytest.raises((ValueError, TypeError)):
            web1.pid = bad  # type: ignore[assignment]
        assert web1.pid is None and not web1.changed


def test_flags(web1: Domain, doms: DomainList) -> None:
    for persistent in (False, True):
        for autostart in (False, True):
            web1.persistent, web1.autostart = persistent, autostart
            web1.commit()
            info = seen(doms)
            assert (info.persistent, info.autostart) == (persistent, autostart)
            assert (web1.persistent, web1.autostart) == (persistent, autostart)


# --- data --------------------------------------------------------------------------------------


VALUES: list[Any] = [
    0, -1, 2**63, -(2**63), 1.5, True, False, "", "grüße 🐧", b"", b"\0\xff", (), (1, (2, 3)),
    {}, {"a": None}, {1: 2, "b": b"c"}, {"deep": ({"er": (1,)},)}, "x" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_data_is_any_messagepack_value(web1: Domain, doms: DomainList, value: Any) -> None:
    web1.data = value
    assert web1.data == value and type(web1.data) is type(seen_data(value))
    web1.commit()
    assert web1.data == value and seen(doms).data == value
    web1.unlock()
    with web1:
        assert web1.data == value


def seen_data(value: Any) -> Any:
    return MappingProxyType(value) if isinstance(value, dict) else value


def test_data_is_read_only(web1: Domain, doms: DomainList) -> None:
    given = {"jobs": [1, 2, {"x": [3]}]}
    web1.data = given
    for data in (web1.data, committed(web1), seen(doms).data):
        assert isinstance(data, Mapping) and data == {"jobs": (1, 2, {"x": (3,)})}
        with pytest.raises(TypeError):
            data["jobs"] = 1
        with pytest.raises(TypeError):
            data["jobs"][0] = 1
        with pytest.raises(TypeError):
            data["jobs"][2]["x"] = 1
        with pytest.raises(AttributeError):
            data["jobs"].append(1)
    given["jobs"].append("later")  # what was given is not what is kept
    assert web1.data["jobs"] == (1, 2, {"x": (3,)})
    web1.data = {**web1.data, "more": 1}  # how it is changed
    web1.commit()
    assert seen(doms).data["more"] == 1 and len(seen(doms).data["jobs"]) == 3


def committed(dom: Domain) -> Any:
    dom.commit()
    return dom.data


@pytest.mark.parametrize("bad", [object(), {1, 2}, 1j, 2**64, lambda: 1, {"x": object()}], ids=repr)
def test_what_data_can_not_be(web1: Domain, bad: Any) -> None:
    web1.data = "before"
    web1.commit()
    with pytest.raises((TypeError, ValueError, OverflowError)):
        web1.data = bad
    assert web1.data == "before" and not web1.changed


def test_data_none_is_none(web1: Domain, doms: DomainList) -> None:
    web1.data = {"a": 1}
    web1.commit()
    web1.data = None
    assert web1.data is None
    web1.commit()
    assert web1.data is None and seen(doms).data is None


# --- definitions -------------------------------------------------------------------------------


def test_the_definition_is_the_same_object_while_it_does_not_change(
    web1: Domain, doms: DomainList
) -> None:
    first = web1.definition
    assert web1.definition is first
    web1.pid = 1
    web1.commit()
    assert web1.definition is first
    web1.unlock()
    assert seen(doms).definition is first
    with doms.get(name="web1") as again:
        assert again.definition is first
        new = first.replace(title="new")
        again.definition = new
        assert again.definition is new and seen(doms).definition is first
        again.rollback()
        assert again.definition is first
        again.definition = new
        again.commit()
        assert again.definition is seen(doms).definition is new
    assert seen(doms).definition is new


def test_an_uncommitted_definition_is_not_cached(
    web1: Domain, doms: DomainList, other: Party
) -> None:
    lost = web1.definition.replace(title="lost")
    web1.definition = lost
    web1.rollback()
    web1.definition = web1.definition.replace(title="kept")
    web1.unlock()
    assert other.tell("doms.peek(name='web1').definition.title") == "kept"
    assert seen(doms).definition.title == "kept"


def test_a_definition_is_of_its_record(web1: Domain, doms: DomainList) -> None:
    for bad in (
        definition("web2", WEB1),
        definition("web1"),  # another uuid: none
        definition("web1", UUID(int=1)),
    ):
        for field in ("definition", "next_definition"):
            with pytest.raises(DefinitionError) as caught:
                setattr(web1, field, bad)
            assert "rename" in str(caught.value)
    for wrong in (xml("web1", WEB1), b"", 7, {}):
        for field in ("definition", "next_definition"):
            with pytest.raises(TypeError):
                setattr(web1, field, wrong)
    with pytest.raises((TypeError, DefinitionError)):
        web1.definition = None  # type: ignore[assignment]
    assert not web1.changed


def test_the_life_of_a_next_definition(web1: Domain, doms: DomainList) -> None:
    old = web1.definition
    new = old.replace(memory=2048)
    web1.activate()
    web1.next_definition = new
    assert (web1.definition, web1.next_definition) == (old, new)
    web1.commit()
    assert (seen(doms).definition, seen(doms).next_definition) == (old, new)
    web1.next_definition = None
    assert web1.next_definition is None
    web1.rollback()
    web1.deactivate()
    assert (web1.definition, web1.next_definition) == (new, None)
    assert (seen(doms).definition, seen(doms).next_definition) == (old, new)
    web1.rollback()  # all of it at once
    assert web1.is_active and (web1.definition, web1.next_definition) == (old, new)
    web1.deactivate()
    web1.commit()
    assert (seen(doms).definition, seen(doms).next_definition) == (new, None)
    web1.activate()
    web1.deactivate()  # nothing was waiting: it stays
    web1.commit()
    assert (web1.definition, web1.next_definition) == (new, None)


def test_the_new_definition_is_live_after_deactivation_in_later_holds(
    web1: Domain, doms: DomainList
) -> None:
    web1.activate()
    web1.unlock()
    doms.define(xml("web1", WEB1, memory=4096))
    with web1:
        assert web1.next_definition.memory == 4096
        web1.deactivate()
    with web1:
        assert web1.definition.memory == 4096 and web1.next_definition is None
    assert doms.check()


# --- active and inactive -----------------------------------------------------------------------


def test_activate_and_deactivate(web1: Domain, doms: DomainList) -> None:
    assert (web1.id, web1.is_active) == (-1, False)
    number = web1.activate(pid=4711)
    assert number >= 0 and (web1.id, web1.pid, web1.is_active) == (number, 4711, True)
    assert (web1.state, web1.reason) == (DomainState.RUNNING, RunningReason.BOOTED)
    assert seen(doms).id == -1 and doms.peek(id=number) is None
    web1.commit()
    assert seen(doms).id == number and doms.peek(id=number).uuid == WEB1
    assert doms.count(active=True) == doms.info.active == 1
    web1.deactivate(ShutoffReason.CRASHED)
    assert (web1.id, web1.pid, web1.is_active) == (-1, None, False)
    assert (web1.state, web1.reason) == (DomainState.SHUTOFF, ShutoffReason.CRASHED)
    assert doms.peek(id=number).is_active
    web1.commit()
    assert doms.peek(id=number) is None and doms.info.active == 0
    web1.activate(state=DomainState.PAUSED, reason=PausedReason.STARTING_UP)
    assert (web1.state, web1.reason) == (DomainState.PAUSED, PausedReason.STARTING_UP)
    assert web1.pid is None
    web1.deactivate()
    assert web1.reason is ShutoffReason.UNKNOWN


def test_active_twice_inactive_twice(web1: Domain, doms: DomainList) -> None:
    with pytest.raises(DomainInactive, match="web1"):
        web1.deactivate()
    number = web1.activate(pid=5)
    with pytest.raises(DomainActive, match=f"already running with id {number}"):
        web1.activate(pid=6)
    assert (web1.id, web1.pid) == (number, 5)
    web1.commit()
    with pytest.raises(DomainActive):
        web1.activate()


def test_an_activation_that_raises_changes_nothing(web1: Domain, doms: DomainList) -> None:
    for bad in (
        {"pid": 0},
        {"pid": -1},
        {"pid": "7"},
        {"state": 99},
        {"state": None},
        {"reason": -1},
        {"reason": "booted"},
    ):
        with pytest.raises((ValueError, TypeError)):
            web1.activate(**bad)
        assert (web1.id, web1.is_active, web1.pid) == (-1, False, None), bad
        assert (web1.state, web1.reason) == (DomainState.SHUTOFF, 0), bad
        assert not web1.changed, bad


def test_a_deactivation_that_raises_changes_nothing(web1: Domain, doms: DomainList) -> None:
    number = web1.activate(pid=7)
    web1.next_definition = web1.definition.replace(memory=7)
    web1.commit()
    for bad in (-1, "crashed", 70_000):
        with pytest.raises((ValueError, TypeError)):
            web1.deactivate(bad)  # type: ignore[arg-type]
        assert (web1.id, web1.pid, web1.state) == (number, 7, DomainState.RUNNING)
        assert web1.definition.memory == 1024 and not web1.changed


def test_ids_are_never_used_again(doms: DomainList, web1: Domain) -> None:
    last = -1
    for turn in range(21):
        number = web1.activate()
        assert number > last
        last = number
        if turn % 3 == 0:
            web1.rollback()  # wastes it
        if turn % 3 == 1:
            web1.commit()
        if turn % 3 != 0:
            web1.deactivate()
            web1.commit()
    web1.unlock()
    doms.undefine(name="web1")
    doms.define(xml("web2"))
    with doms.get(name="web2") as web2:
        assert web2.activate() > last


def test_off_and_on_again_in_one_transaction(web1: Domain, doms: DomainList) -> None:
    first = web1.activate()
    web1.commit()
    web1.deactivate()
    second = web1.activate()
    assert second != first and doms.peek(id=first).uuid == WEB1
    web1.commit()
    assert doms.peek(id=first) is None and doms.peek(id=second).uuid == WEB1
    assert doms.info.active == 1 and doms.check()


def test_on_and_off_again_in_one_transaction(web1: Domain, doms: DomainList) -> None:
    number = web1.activate()
    web1.deactivate()
    web1.commit()
    assert doms.peek(id=number) is None and doms.info.active == 0 and doms.check()


# --- the public classes ------------------------------------------------------------------------


MADE_BY_HAND = {
    "Domain()": "lock() try_lock() unlock() is_locked uuid name state data __enter__() __repr__() "
    "__reduce__() commit() activate() __eq__(Domain()) __hash__()",
    "DomainInfo()": "name uuid id state reason definition next_definition data __repr__()",
}

TRY_EACH = """
import os, sys
from shmdomains import *

for use in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        try:
            eval(use)
        except (ShmDomainsError, TypeError, AttributeError, ValueError):
            pass
        os._exit(0)
    if os.waitpid(pid, 0)[1] != 0:
        print(use)
"""


def test_made_by_hand_they_lead_nowhere_but_do_not_crash() -> None:
    """Handles and infos come from a list. Whatever is done with another one is an exception."""
    uses = [f"{made}.{use}" for made, uses in MADE_BY_HAND.items() for use in uses.split()]
    done = subprocess.run(
        [sys.executable, "-c", TRY_EACH, *uses],
        env=environment(), stdout=subprocess.PIPE, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.decode().split("\n") == [""], "these crashed"
