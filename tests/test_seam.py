"""What each store owes the rules, natively or in Python: the seam, seen from one thread.

The conformance suite has two parties; here stands what one is enough for: who must hold what,
lock order, whose definition it is, nested blocks, filters, the words of errors. Each store does
this in a way of its own (`rules/store.py` names it), so each is asked.
"""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from helpers import EVERY_STORE, Store, definition, environment, xml

import shmdomains
from shmdomains import (
    AlreadyLocked,
    DefinitionError,
    DomainDef,
    DomainInfo,
    DomainLocked,
    DomainNotFound,
    DomainNotLocked,
    DomainRemoved,
    DomainState,
    DomainStateError,
    ListNotLocked,
    LockOrder,
    UncommittedChanges,
    WrongList,
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


# --- whose definition it is --------------------------------------------------------------------


@pytest.mark.parametrize("field", ["definition", "next_definition"])
@pytest.mark.parametrize(
    "other", [definition("zzz", A), definition("a", B), definition("zzz", UUID(int=1))]
)
def test_a_domain_takes_no_other_ones_definition(doms: Any, field: str, other: Any) -> None:
    with doms.get(name="a") as dom:
        before = dom.definition
        with pytest.raises(DefinitionError, match="the record of domain 'a'"):
            setattr(dom, field, other)
        assert not dom.changed
        assert (dom.definition, dom.next_definition) == (before, None)
    assert doms.peek(name="zzz") is None


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("definition", "<domain/>", TypeError),
        ("next_definition", 7, TypeError),
        ("state", 99, ValueError),
        ("reason", -1, ValueError),
        ("reason", 1 << 16, ValueError),
        ("pid", 0, ValueError),
        ("pid", 1 << 31, ValueError),
        ("data", object(), TypeError),
        ("data", 1 << 64, TypeError),
        ("data", "\ud800", ValueError),
    ],
)
def test_a_value_that_is_refused_changes_nothing(
    doms: Any, field: str, value: Any, error: type[Exception]
) -> None:
    with doms.get(name="a") as dom:
        with pytest.raises(error):
            setattr(dom, field, value)
        assert not dom.changed


# --- who must hold what ------------------------------------------------------------------------


def test_the_list_lock_is_needed(doms: Any) -> None:
    dom = doms.get(name="a")
    for call in (
        lambda: doms.find_by_name("a"),
        lambda: doms.find_by_uuid(A),
        lambda: doms.find_by_id(1),
        lambda: doms.assign_def(definition("c")),
        lambda: doms.remove_inactive(dom),
        lambda: doms.rename(dom, "c"),
        lambda: doms.free(),
    ):
        with pytest.raises(ListNotLocked):
            call()
    dom.unlock()


def test_the_domain_lock_is_needed(doms: Any) -> None:
    dom = doms.get(name="a")
    dom.unlock()
    for field in ("name", "state", "definition", "data", "changed", "previous_owner_died"):
        with pytest.raises(DomainNotLocked):
            getattr(dom, field)
    for field in ("state", "pid", "data", "definition", "persistent"):
        with pytest.raises(DomainNotLocked):
            setattr(dom, field, None)
    for call in (dom.commit, dom.rollback, dom.unlock, dom.activate, lambda: doms.save_config(dom)):
        with pytest.raises(DomainNotLocked):
            call()
    assert dom.uuid == A and not dom.is_locked


def test_lock_order(doms: Any) -> None:
    with doms.get(name="a") as a:
        for call in (
            lambda: doms.get(name="b"),
            lambda: doms.lookup(uuid=B, timeout=5),
            doms.lock,
            lambda: doms.define(xml("c")),
            lambda: doms.undefine(name="b"),
            lambda: doms.lock_many([B]),
        ):
            with pytest.raises(LockOrder):
                call()
        for call in (lambda: doms.get(name="a"), a.lock, lambda: doms.get(uuid=A, timeout=0)):
            with pytest.raises(AlreadyLocked):
                call()
        with doms.get(name="b", timeout=0):  # a try is always allowed
            pass
    with doms.locked():
        with pytest.raises(AlreadyLocked):
            doms.lock()
        a, b = doms.find_by_name("a"), doms.find_by_name("b")
        with pytest.raises(DomainLocked):
            doms.remove_inactive(a)
        with pytest.raises(DomainLocked):
            doms.free()
        a.unlock(), b.unlock()
    assert len(doms) == 2 and not doms.is_locked


def test_a_handle_of_another_list(doms: Any, make: Callable[[], Any]) -> None:
    other = make()
    other.define(xml("a", A))
    with other.get(name="a") as dom, doms.locked():
        for call in (
            lambda: doms.rename(dom, "c"),
            lambda: doms.remove_inactive(dom),
            lambda: doms.lock_many([dom]),
            lambda: doms.save_config(dom),
            lambda: doms.set_autostart(dom, True),
        ):
            with pytest.raises(WrongList):
                call()
    other.close()


def test_a_handle_that_outlived_its_domain(doms: Any) -> None:
    with doms.get(name="a") as dom:
        pass
    doms.undefine(name="a")
    doms.define(xml("a", A))
    for call in (dom.lock, dom.try_lock, dom.__enter__, lambda: doms.lock_many([dom])):
        with pytest.raises(DomainRemoved):
            call()


# --- transactions ------------------------------------------------------------------------------


def test_of_nested_blocks_the_outermost_ends_the_transaction(doms: Any) -> None:
    with doms.get(name="a") as dom:
        dom.pid = 1
        with dom:
            dom.pid = 2
        assert dom.is_locked and doms.peek(name="a").pid is None
    assert not dom.is_locked and doms.peek(name="a").pid == 2
    with dom:
        dom.pid = 3
        with pytest.raises(KeyError), dom:
            raise KeyError
        assert dom.is_locked and dom.pid == 2  # all of it was rolled back
    assert doms.peek(name="a").pid == 2


def test_handles_of_one_domain_share_its_changes(doms: Any) -> None:
    with doms.get(name="a") as stale:
        pass
    with doms.get(name="a") as dom:
        stale.pid = 5
        assert (dom.pid, dom.changed, stale == dom, hash(stale) == hash(dom)) == (
            5,
            True,
            True,
            True,
        )
        assert doms.peek(name="a").pid is None
    assert doms.peek(name="a").pid == 5


def test_a_handle_that_is_dropped_rolls_back_and_unlocks(doms: Any) -> None:
    dom = doms.get(name="a")
    dom.pid = 5
    with pytest.warns(ResourceWarning, match="still locked was dropped"):
        del dom
    with doms.get(name="a", timeout=0) as dom:
        assert dom.pid is None


def test_rename_needs_nothing_uncommitted_and_is_one_commit(doms: Any) -> None:
    with doms.locked():
        dom = doms.find_by_name("a")
        dom.pid = 1
        with pytest.raises(UncommittedChanges):
            doms.rename(dom, "c")
        dom.rollback()
        doms.rename(dom, "c")
        assert (dom.name, dom.definition.name) == ("c", "c")
        dom.unlock()
    assert doms.peek(name="a") is None
    assert doms.peek(name="c").definition.name == "c"


def test_a_receipt_tells_of_commits_and_removes_and_of_nothing_else(doms: Any) -> None:
    with doms.get(name="a") as dom:
        receipts = [dom._receipt]
        dom.pid = 1
        dom.rollback()
        dom.commit()
        assert dom._receipt == receipts[0]
        for pid in (1, 1):
            dom.pid = pid
            dom.commit()
            receipts.append(dom._receipt)
    with doms.locked():
        doms.remove_inactive(dom)
    receipts.append(dom._receipt)
    assert len(set(receipts)) == len(receipts) == 4


# --- reading -----------------------------------------------------------------------------------


def test_a_new_domain_is_off_and_whose_it_is(doms: Any) -> None:
    with doms.locked():
        doms.assign_def(definition("c")).unlock()
    info = doms.peek(name="c")
    assert (info.state, info.reason, info.id, info.pid) == (DomainState.SHUTOFF, 0, -1, None)
    assert (info.persistent, info.autostart, info.is_active, info.data) == (False,) * 3 + (None,)
    assert info.definition == definition("c").replace(uuid=info.uuid)
    assert isinstance(info, DomainInfo)


def test_filters_are_libvirts(doms: Any) -> None:
    with doms.get(name="a") as a:
        a.activate(pid=7)
        a.autostart = True
    with doms.get(name="b") as b:
        b.persistent = False

    def named(**wanted: Any) -> str:
        assert doms.count(**wanted) == len(doms.list(**wanted))
        return "".join(info.name for info in doms.list(**wanted))

    assert [named(active=value) for value in (None, True, False)] == ["ab", "a", "b"]
    assert [named(persistent=value) for value in (True, False)] == ["a", "b"]
    assert [named(autostart=value) for value in (True, False)] == ["a", "b"]
    assert named(state=DomainState.RUNNING) == named(state=[1, 3]) == "a"
    assert named(state=[DomainState.RUNNING, DomainState.SHUTOFF]) == "ab"
    assert named(active=True, autostart=False) == named(state=[]) == ""


@pytest.mark.parametrize(
    "key, words",
    [
        ({"name": "x"}, "no domain with matching name 'x'"),
        ({"id": 7}, "no domain with matching id 7"),
        ({"uuid": UUID(int=1)}, f"no domain with matching uuid '{UUID(int=1)}'"),
        ({"uuid": UUID(int=1).bytes}, f"no domain with matching uuid '{UUID(int=1)}'"),
    ],
)
def test_what_is_missing_is_said_in_libvirts_words(doms: Any, key: Any, words: str) -> None:
    with pytest.raises(DomainNotFound) as caught:
        doms.get(**key)
    assert str(caught.value) == words
    assert doms.lookup(**key) is None and doms.peek(**key) is None


def test_rules_take_a_key_where_they_take_a_domain(doms: Any) -> None:
    doms.rename("a", "c")
    doms.set_autostart(str(A), True)
    doms.save_config(A)
    doms.delete_config("c")
    with doms.lock_many(["c", B, doms.peek(name="b")][:2]) as many:
        assert [dom.name for dom in many] == ["c", "b"]
    with doms.locked():
        doms.remove_inactive("b")
    info = doms.peek(name="c")
    assert (info.uuid, info.autostart, len(doms)) == (A, True, 1)
    for call in (lambda: doms.rename("b", "d"), lambda: doms.set_autostart("b", True)):
        with pytest.raises(DomainNotFound):
            call()


@pytest.mark.parametrize("key", ["a", A, A.bytes, str(A), "handle", "info", 1])
def test_undefine_takes_a_key_by_position(doms: Any, key: Any) -> None:
    with doms.get(name="a") as dom:
        assert dom.activate() == 1
    doms.undefine({"handle": dom, "info": doms.peek(name="a")}.get(key, key))
    assert not doms.peek(name="a").persistent
    for given in ((("a",), {"name": "b"}), ((), {}), ((), {"name": "b", "uuid": B})):
        with pytest.raises(TypeError, match="exactly one"):
            doms.undefine(*given[0], **given[1])
    with pytest.raises(TypeError, match="a domain is named by"):
        doms.undefine(1.5)
    assert doms.peek(name="b").persistent


def test_finding_and_reading_take_a_key_by_position(doms: Any) -> None:
    for key in ("a", A, A.bytes, str(A), doms.peek(name="a")):
        assert doms.peek(key).name == doms[key].name == "a" and key in doms
        with doms.get(key) as dom:
            assert dom.uuid == A
        with doms.lookup(key) as dom:
            assert dom.uuid == A
    assert doms.lookup("c") is None is doms.peek(7) and "c" not in doms
    with pytest.raises(DomainNotFound, match="no domain with matching name 'c'"):
        doms.get("c")
    for call in (doms.get, doms.lookup, doms.peek):
        with pytest.raises(TypeError, match="exactly one"):
            call()


def test_states_in_libvirts_words(doms: Any) -> None:
    with doms.get(name="a") as a:
        a.activate()
    assert [info.name for info in doms.list(state="shut off")] == ["b"]
    assert [info.name for info in doms.list(state=["Running", DomainState.PAUSED])] == ["a"]
    assert doms.count(state="SHUTOFF") == doms.count(state=("running", "paused")) == 1
    for call in (doms.list, doms.count):
        with pytest.raises(ValueError, match="'off' is no state of a domain: 'no state', 'runn"):
            call(state="off")
    for state in DomainState:
        for text in (state.words, state.words.upper(), state.name, state.name.lower()):
            assert DomainState.parse(text) is state


def test_errors_about_state_have_one_base(doms: Any) -> None:
    with doms.get(name="a") as a:
        with pytest.raises(DomainStateError):
            a.deactivate()
        a.persistent = False
        a.activate()
        with pytest.raises(DomainStateError):
            a.activate()
        a.commit()
        with pytest.raises(DomainStateError):
            doms.set_autostart(a, True)


# --- the rules stand alone ---------------------------------------------------------------------


def test_the_rules_import_without_the_core() -> None:
    """In a process where the core cannot be imported."""
    program = (
        "import sys, types\n"
        "package = types.ModuleType('shmdomains')\n"  # its __init__ imports every store
        f"package.__path__ = [{str(Path(shmdomains.__file__).parent)!r}]\n"
        "sys.modules['shmdomains'] = package\n"
        "sys.modules['shmdomains.memory'] = None\n"
        "import shmdomains.rules.plain\n"
        "print(sorted(name for name in sys.modules if name.startswith('shmdomains.')))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
        timeout=60,
    )
    loaded = ast.literal_eval(found.stdout)
    assert "shmdomains.rules.domain_list" in loaded
    assert [name for name in loaded if ".memory." in name] == []


# --- what runs in the middle of a setter -------------------------------------------------------


class Unlocks:
    """A number whose look-up unlocks the domain that it is to be assigned to."""

    def __init__(self, dom: Any) -> None:
        self._dom = dom

    def __index__(self) -> int:
        self._dom.unlock()
        return 1


@pytest.mark.parametrize("field", ["pid", "state", "reason"])
def test_a_value_that_unlocks_the_domain_changes_nothing(doms: Any, field: str) -> None:
    dom = doms.get(name="a")
    before = doms.peek(name="a")
    with pytest.raises(DomainNotLocked):
        setattr(dom, field, Unlocks(dom))
    assert not dom.is_locked and doms.peek(name="a") == before


def test_a_definition_that_goes_may_unlock(doms: Any) -> None:
    """The end of the pending definition that is replaced runs after the change is whole."""
    ended = []

    class Last(DomainDef):
        def __del__(self) -> None:
            if armed:
                armed.clear()
                dom.unlock()
                ended.append(doms.peek(name="a").definition.memory)

    armed: list[bool] = []
    dom = doms.get(name="a")
    dom.definition = Last.from_xml(xml("a", A, memory=2048))
    armed.append(True)
    dom.definition = dom.definition.replace(memory=4096)
    gc.collect()
    assert not armed
    if dom.is_locked:  # it went later: with the commit
        dom.unlock()
    assert doms.peek(name="a").definition.memory == 4096
    assert set(ended) <= {4096}
