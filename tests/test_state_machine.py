"""The list against a dict, driven by hypothesis.

Two processes use one list: the home that made it, and a child of it. Or two tasks of one event
loop do, or, of a store that has no other processes, two threads. Each is told what to do through
its socket and answers before the next step, so the model knows at every moment who holds what, what
is committed and what only its holder sees. Every wait has time-out 0: it either succeeds at once or
says who is in the way, and which of the two it is the model knows too.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from helpers import EVERY_STORE, STORES, Home, Party, Store, xml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_conformance import IN_ONE_PROCESS, way_name

from shmdomains import (
    AlreadyLocked,
    DomainActive,
    DomainExists,
    DomainInactive,
    DomainLocked,
    DomainNotFound,
    DomainNotLocked,
    DomainRemoved,
    InvalidName,
    ListNotLocked,
    LockOrder,
    LockTimeout,
    NotOwner,
    ShmDomainsError,
    UncommittedChanges,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

NAMES = ["a", "b", "c", "d"]
UUIDS = [f"0000000{number}-0000-4000-8000-000000000000" for number in range(1, 5)]
ROOM = 6

names = st.sampled_from(NAMES)
who = st.integers(0, 1)
sizes = st.sampled_from([0, 1, 50, 100, 117, 118, 119, 120, 200, 4100])
"""Of data in the record, and in the heap."""
pick = st.integers(0, 10**6)
"""Chooses one of what is there at the moment."""


@dataclass(frozen=True)
class Fields:
    """What a commit makes visible at once."""

    name: str
    memory: int
    next_memory: int | None = None
    id: int = -1
    state: int = 5
    reason: int = 0
    pid: int | None = None
    persistent: bool = False
    autostart: bool = False
    data: Any = None


@dataclass(eq=False)
class Model:
    """One domain, until it is removed."""

    handle: str  # what its handles are called, in both processes
    uuid: str
    committed: Fields
    pending: Fields | None = None  # as its holder sees it
    touched: bool = False
    holder: int | None = None
    known_to: set[int] = field(default_factory=set)  # who has a handle


LOOK = """
def look(info):
    nxt, data = info.next_definition, info.data
    data = data if data is None or isinstance(data, str) else dict(data)
    return (info.name, info.definition.memory, None if nxt is None else nxt.memory, info.id,
            int(info.state), int(info.reason), info.pid, info.persistent, info.autostart, data)
"""

FORMS = {
    "uuid": "uuid={0.uuid!r}",
    "name": "name={0.committed.name!r}",
    "id": "id={0.committed.id}",
}


class Machine(RuleBasedStateMachine):
    """The rules; `home`, `store` and `start` are set by the test. Each example has a list and a
    child of its own, so that what one breaks does not show in the next."""

    home: Home
    store: Store
    start: str

    def __init__(self) -> None:
        super().__init__()
        self.parties: tuple[Party, ...] = ()
        self.last_id = -1
        self.live: list[Model] = []
        self.gone: list[Model] = []
        self.list_holder: int | None = None
        self.numbers = itertools.count()

    # --- help ---

    def do(self, party: int, source: str) -> Any:
        return self.parties[party].tell(source)

    def refused(self, party: int, source: str, error: type[Exception]) -> None:
        try:
            got = self.do(party, source)
        except ShmDomainsError as exc:
            assert type(exc) is error, f"{exc!r} instead of {error.__name__}"
        else:
            raise AssertionError(f"{source} gave {got!r} instead of {error.__name__}")

    def held(self, party: int) -> list[Model]:
        return [model for model in self.live if model.holder == party]

    def chosen(self, models: list[Model], number: int) -> Model | None:
        return models[number % len(models)] if models else None

    def by_name(self, name: str) -> Model | None:
        return next((one for one in self.live if one.committed.name == name), None)

    def took(self, party: int, model: Model) -> None:
        model.holder, model.pending, model.touched = party, model.committed, False
        model.known_to.add(party)

    def free(self, model: Model) -> None:
        model.holder, model.pending, model.touched = None, None, False

    def commit(self, model: Model) -> None:
        assert model.pending is not None
        model.committed, model.touched = model.pending, False

    def change(self, model: Model, **fields: Any) -> None:
        assert model.pending is not None
        model.pending, model.touched = replace(model.pending, **fields), True

    def try_error(self, party: int, model: Model) -> type[Exception] | None:
        """What a try for the domain's lock meets."""
        if model.holder == party:
            return AlreadyLocked
        return None if model.holder is None else LockTimeout

    def list_error(self, party: int) -> type[Exception] | None:
        """What a try for the list lock meets."""
        if self.list_holder == party:
            return AlreadyLocked
        if self.held(party):
            return LockOrder
        return None if self.list_holder is None else LockTimeout

    # --- begin and end ---

    @initialize()
    def begin(self) -> None:
        home = self.home.party
        home.tell(f"context = None; room = {ROOM}; size = None; doms = {self.store.create}")
        one = self.home.begin(self.start, doms="doms") if self.start == "task" else home
        self.parties = one, self.home.begin(self.start, one, doms="doms")
        for party in (0, 1):
            self.do(party, LOOK + "handles = {}")

    def teardown(self) -> None:
        if not self.parties:
            return
        try:
            for model in self.live:
                if model.holder is not None:
                    self.do(model.holder, f"handles[{model.handle!r}].unlock()")
            if self.list_holder is not None:
                self.do(self.list_holder, "doms.unlock()")
            left = self.do(
                0,
                "with doms.locked(): doms.free(timeout=0)\n"
                "doms.info.heap_used, doms.info.active, len(doms), doms.check().problems",
            )
            assert left == (0, 0, 0, [])
        finally:
            self.parties[1].leave()
            codes = self.do(0, "handles.clear(); doms.close(); del doms; reap()")
            if self.start == "task":
                self.parties[0].leave()
                self.home.party.tell("del doms")
        assert codes == ([] if self.start in IN_ONE_PROCESS else [0])

    # --- the list lock ---

    @rule(party=who)
    def lock_list(self, party: int) -> None:
        error = self.list_error(party)
        if error is not None:
            self.refused(party, "doms.lock(0)", error)
            return
        self.do(party, "doms.lock(0)")
        self.list_holder = party

    @rule(party=who)
    def unlock_list(self, party: int) -> None:
        if self.list_holder == party:
            self.do(party, "doms.unlock()")
            self.list_holder = None
        else:
            held_here = self.list_holder is not None and self.start in IN_ONE_PROCESS
            self.refused(party, "doms.unlock()", NotOwner if held_here else ListNotLocked)

    # --- domains come ---

    @rule(party=who, name=names, number=pick, memory=st.integers(1, 99), define=st.booleans(),
          uuid=st.one_of(st.none(), st.sampled_from(UUIDS)))  # fmt: skip
    def assign(
        self, party: int, name: str, number: int, memory: int, define: bool, uuid: str | None
    ) -> None:
        """`define`, or `assign_def` with the list lock."""
        text = xml(name, uuid, memory=memory)
        handle = f"h{next(self.numbers)}"
        by_uuid = next((one for one in self.live if one.uuid == uuid), None)
        by_name = self.by_name(name)
        known = by_uuid or by_name
        call = (
            f"str(doms.define({text!r}, timeout=0).uuid)"
            if define
            else f"handles[{handle!r}] = doms.assign_def(DomainDef.from_xml({text!r}), timeout=0)\n"
            f"str(handles[{handle!r}].uuid)"
        )
        error = self.assign_error(party, define, name, uuid, known, by_uuid)
        if error is not None:
            self.refused(party, call, error)
            return
        got = self.do(party, call)
        if known is None:
            model = Model(handle, got, Fields(name, memory, persistent=define))
            assert uuid is None or got == uuid
            self.live.append(model)
        else:
            model = known
            assert got == known.uuid
        if define:
            if known is not None:
                model.committed = self.assigned(model.committed, memory, persistent=True)
            return
        if known is not None:
            self.do(party, f"handles[{known.handle!r}] = handles.pop({handle!r})")
        self.took(party, model)
        if known is not None:
            self.change(model, **self.assignment(model.committed, memory))

    def assign_error(
        self,
        party: int,
        define: bool,
        name: str,
        uuid: str | None,
        known: Model | None,
        by_uuid: Model | None,
    ) -> type[Exception] | None:
        if define:
            error = self.list_error(party)
            if error not in (None, AlreadyLocked):  # it may hold the list already
                return error
        elif self.list_holder != party:
            return ListNotLocked
        if by_uuid is not None and by_uuid.committed.name != name:
            return DomainExists
        if by_uuid is None and known is not None and uuid is not None:
            return DomainExists
        return None if known is None else self.try_error(party, known)

    def assignment(self, old: Fields, memory: int) -> dict[str, Any]:
        return {"next_memory" if old.id != -1 else "memory": memory}

    def assigned(self, old: Fields, memory: int, **more: Any) -> Fields:
        return replace(old, **self.assignment(old, memory), **more)

    # --- finding and locking ---

    @precondition(lambda self: self.live)
    @rule(party=who, number=pick, form=st.sampled_from(list(FORMS)), find=st.booleans())
    def find(self, party: int, number: int, form: str, find: bool) -> None:
        model = self.chosen(self.live, number)
        assert model is not None
        if form == "id" and model.committed.id == -1:
            form = "name"
        key = FORMS[form].format(model)
        call = f"doms.get({key}, timeout=0)"
        if find:
            call = f"doms.find_by_{form}({key.partition('=')[2]}, timeout=0)"
        error = self.try_error(party, model)
        if find and self.list_holder != party:
            error = ListNotLocked
        if error is not None:
            self.refused(party, call, error)
            return
        self.do(party, f"handles[{model.handle!r}] = {call}")
        self.took(party, model)

    @rule(party=who, name=names, number=st.integers(0, 60))
    def find_what_is_not_there(self, party: int, name: str, number: int) -> None:
        if self.by_name(name) is None:
            self.refused(party, f"doms.get(name={name!r}, timeout=0)", DomainNotFound)
            assert self.do(
                party, f"doms.lookup(name={name!r}, timeout=0), doms.peek(name={name!r})"
            ) == (None, None)
        if number not in [model.committed.id for model in self.live]:
            assert self.do(
                party, f"doms.lookup(id={number}, timeout=0), doms.peek(id={number})"
            ) == (None, None)

    @precondition(lambda self: self.live)
    @rule(party=who, number=pick, way=st.sampled_from(["lock(0)", "try_lock()", "acquire(False)"]))
    def lock_by_handle(self, party: int, number: int, way: str) -> None:
        model = self.chosen([one for one in self.live if party in one.known_to], number)
        if model is None:
            return
        call = f"handles[{model.handle!r}].{way}"
        error = self.try_error(party, model)
        if error is LockTimeout and way != "lock(0)":
            assert self.do(party, call) is False
        elif error is not None:
            self.refused(party, call, error)
        else:
            assert self.do(party, call) in (None, True)
            self.took(party, model)

    @rule(party=who)
    def lock_all(self, party: int) -> None:
        """All or nothing."""
        call = "many = doms.lock_many(doms.snapshot(definitions=False), timeout=0)"
        error = self.list_error(party)
        if error in (None, AlreadyLocked):
            error = next((e for one in self.live if (e := self.try_error(party, one))), None)
            if error is not None and any(one.holder is not None for one in self.live):
                # which of them is met first is the order of the slots
                error = None
                try:
                    self.do(party, call)
                except (LockTimeout, AlreadyLocked):
                    return
                raise AssertionError("locked all, though some were held")
        if error is not None:
            self.refused(party, call, error)
            return
        self.do(party, call)
        by_uuid = {model.uuid: model for model in self.live}
        for at, uuid in enumerate(self.do(party, "[str(dom.uuid) for dom in many]")):
            self.do(party, f"handles[{by_uuid[uuid].handle!r}] = many[{at}]")
            self.took(party, by_uuid.pop(uuid))
        assert not by_uuid
        self.do(party, "del many")

    @precondition(lambda self: self.gone)
    @rule(party=who, number=pick)
    def a_stale_handle(self, party: int, number: int) -> None:
        model = self.chosen([one for one in self.gone if party in one.known_to], number)
        if model is not None:
            self.refused(party, f"handles[{model.handle!r}].try_lock()", DomainRemoved)
            self.refused(party, f"handles[{model.handle!r}].name", DomainNotLocked)

    @precondition(lambda self: self.live)
    @rule(party=who, number=pick)
    def hand_over_a_handle(self, party: int, number: int) -> None:
        """Pickled by one, used by the other."""
        model = self.chosen([one for one in self.live if party in one.known_to], number)
        if model is None or 1 - party in model.known_to:
            return
        pickled = self.do(party, f"pickle.dumps(handles[{model.handle!r}])")
        locked = self.do(
            1 - party,
            f"handles[{model.handle!r}] = pickle.loads({pickled!r})\n"
            f"handles[{model.handle!r}].is_locked",
        )
        assert locked is (model.holder == 1 - party)
        model.known_to.add(1 - party)

    # --- what a holder does ---

    @rule(party=who, number=pick, change=st.sampled_from(["memory", "next", "pid", "state",
          "persistent", "autostart", "data", "add"]), value=st.integers(1, 300),
          size=sizes)  # fmt: skip
    def alter(self, party: int, number: int, change: str, value: int, size: int) -> None:
        model = self.chosen(self.held(party), number)
        if model is None:
            return
        assert model.pending is not None
        dom = f"handles[{model.handle!r}]"
        flag = value % 2 == 0
        if change == "memory":
            self.do(party, f"{dom}.definition = {dom}.definition.replace(memory={value})")
            self.change(model, memory=value)
        elif change == "next" and flag:
            self.do(party, f"{dom}.next_definition = {dom}.definition.replace(memory={value})")
            self.change(model, next_memory=value)
        elif change == "next":
            self.do(party, f"{dom}.next_definition = None")
            self.change(model, next_memory=None)
        elif change == "pid":
            self.do(party, f"{dom}.pid = {value}")
            self.change(model, pid=value)
        elif change == "state":
            self.do(party, f"{dom}.set_state({value % 8}, {value % 3})")
            self.change(model, state=value % 8, reason=value % 3)
        elif change == "data":
            data = (None, {"a": 0}, "x" * size, {"a": value, "b": "x" * size})[value % 4]
            self.do(party, f"{dom}.data = {data!r}")
            self.change(model, data=data)
        elif change == "add":
            self.add(party, model, value)
        else:
            self.do(party, f"{dom}.{change} = {flag}")
            self.change(model, **{change: flag})

    def add(self, party: int, model: Model, by: int) -> None:
        assert model.pending is not None
        dom, data = f"handles[{model.handle!r}]", model.pending.data or {}
        call = f"{dom}.add('a', {by})"
        if isinstance(data, str):
            with pytest.raises(TypeError, match="no mapping"):
                self.do(party, call)
            return
        total = data.get("a", 0) + by
        assert self.do(party, call) == total
        self.change(model, data={**data, "a": total})

    @precondition(lambda self: self.live)
    @rule(party=who, number=pick, form=st.sampled_from(list(FORMS)), by=st.integers(-300, 300))
    def add_in_one_call(self, party: int, number: int, form: str, by: int) -> None:
        model = self.chosen(self.live, number)
        assert model is not None
        form = "name" if form == "id" and model.committed.id == -1 else form
        key = FORMS[form].format(model).partition("=")[2]
        call = f"doms.add({key}, 'a', {by}, timeout=0)"
        error = self.try_error(party, model)
        data = model.committed.data or {}
        if error is not None:
            self.refused(party, call, error)
        elif isinstance(data, str):
            with pytest.raises(TypeError, match="no mapping"):
                self.do(party, call)
        else:
            total = data.get("a", 0) + by
            assert self.do(party, call) == total
            model.committed = replace(model.committed, data={**data, "a": total})

    @rule(party=who, number=pick)
    def activate(self, party: int, number: int) -> None:
        model = self.chosen(self.held(party), number)
        if model is None:
            return
        assert model.pending is not None
        call = f"handles[{model.handle!r}].activate(pid=7)"
        if model.pending.id != -1:
            self.refused(party, call, DomainActive)
            return
        got = self.do(party, call)
        assert got > self.last_id, "an id was given twice"
        self.last_id = got
        self.change(model, id=got, pid=7, state=1, reason=1)

    @rule(party=who, number=pick)
    def deactivate(self, party: int, number: int) -> None:
        model = self.chosen(self.held(party), number)
        if model is None:
            return
        assert model.pending is not None
        call = f"handles[{model.handle!r}].deactivate(2)"
        if model.pending.id == -1:
            self.refused(party, call, DomainInactive)
            return
        self.do(party, call)
        self.change(model, id=-1, pid=None, state=5, reason=2)
        if model.pending.next_memory is not None:
            self.change(model, memory=model.pending.next_memory, next_memory=None)

    @rule(party=who, number=pick, ending=st.sampled_from(["unlock", "commit", "rollback", "raise"]))
    def end_a_transaction(self, party: int, number: int, ending: str) -> None:
        model = self.chosen(self.held(party), number)
        if model is None:
            return
        dom = f"handles[{model.handle!r}]"
        assert self.do(party, f"{dom}.changed") is model.touched
        if ending == "raise":
            with pytest.raises(KeyError):
                self.do(party, f"with {dom}: raise KeyError")
        else:
            self.do(party, f"{dom}.{ending}()")
        if ending in ("unlock", "commit"):
            self.commit(model)
        else:
            model.pending, model.touched = model.committed, False
        if ending in ("unlock", "raise"):
            self.free(model)

    @precondition(lambda self: self.live)
    @rule(party=who, number=pick)
    def the_other_may_not(self, party: int, number: int) -> None:
        """Of a domain that somebody else holds, or nobody, nothing can be read or changed."""
        model = self.chosen(
            [one for one in self.live if party in one.known_to and one.holder != party], number
        )
        if model is not None:
            in_one = self.start in IN_ONE_PROCESS and self.store not in STORES
            held_here = model.holder is not None and in_one
            error = NotOwner if held_here else DomainNotLocked
            self.refused(party, f"handles[{model.handle!r}].unlock()", error)
            for use in ("state", "commit()", "activate()", "definition"):
                self.refused(party, f"handles[{model.handle!r}].{use}", DomainNotLocked)

    # --- domains change their names and go ---

    @precondition(lambda self: self.live)
    @rule(party=who, number=pick, new=st.sampled_from([*NAMES, "x/y"]))
    def rename(self, party: int, number: int, new: str) -> None:
        model = self.chosen(self.held(party), number)
        if model is None:
            return
        assert model.pending is not None
        error: type[Exception] | None = None
        if self.list_holder != party:
            error = ListNotLocked
        elif model.pending.id != -1:
            error = DomainActive
        elif model.touched:
            error = UncommittedChanges
        elif new in (model.committed.name, "x/y"):
            error = InvalidName
        elif self.by_name(new) is not None:
            error = DomainExists
        call = f"doms.rename(handles[{model.handle!r}], {new!r})"
        if error is not None:
            self.refused(party, call, error)
            return
        self.do(party, call)
        self.change(model, name=new)
        self.commit(model)

    @precondition(lambda self: self.live)
    @rule(party=who, number=pick)
    def remove(self, party: int, number: int) -> None:
        model = self.chosen([one for one in self.live if party in one.known_to], number)
        if model is None:
            return
        call = f"doms.remove_inactive(handles[{model.handle!r}], timeout=0)"
        error: type[Exception] | None = None
        if self.list_holder != party:
            error = ListNotLocked
        elif model.holder == party:
            error = DomainLocked
        elif model.holder is not None:
            error = LockTimeout
        elif model.committed.id != -1:
            error = DomainActive
        if error is not None:
            self.refused(party, call, error)
            return
        self.do(party, call)
        self.went(model)

    @precondition(lambda self: self.live)
    @rule(party=who, number=pick)
    def undefine(self, party: int, number: int) -> None:
        model = self.chosen(self.live, number)
        assert model is not None
        call = f"doms.undefine(uuid={model.uuid!r}, timeout=0)"
        error = self.list_error(party)
        if error in (None, AlreadyLocked):
            error = self.try_error(party, model)
        if error is not None:
            self.refused(party, call, error)
            return
        if model.committed.id == -1:
            self.do(party, call)
            self.went(model)
        elif model.committed.persistent:
            self.do(party, call)
            model.committed = replace(model.committed, persistent=False, autostart=False)
        else:
            with pytest.raises(ShmDomainsError, match="transient"):
                self.do(party, call)

    def went(self, model: Model) -> None:
        self.live.remove(model)
        self.gone.append(model)

    # --- what is always so ---

    @invariant()
    def both_see_what_is_committed_and_holders_their_changes(self) -> None:
        committed = {model.uuid: shown(model.committed) for model in self.live}
        active = sum(model.committed.id != -1 for model in self.live)
        for party in (0, 1):
            pending = {model.handle: shown(model.pending) for model in self.held(party)}
            is_locked = self.list_holder == party
            assert self.do(
                party,
                "committed = {str(info.uuid): look(info) for info in doms}\n"
                f"pending = {{name: look(handles[name]) for name in {list(pending)}}}\n"
                "committed, pending, len(doms), doms.count(active=True), doms.is_locked",
            ) == (committed, pending, len(committed), active, is_locked)

    @invariant()
    def every_key_leads_to_its_domain(self) -> None:
        keys = [
            key.format(model)
            for model in self.live
            for form, key in FORMS.items()
            if form != "id" or model.committed.id != -1
        ]
        calls = ", ".join(f"str(doms.peek({key}).uuid)" for key in keys)
        expected = [
            model.uuid for model in self.live for _ in range(2 + (model.committed.id != -1))
        ]
        assert self.do(len(self.gone) % 2, f"[{calls}]") == expected


def shown(fields: Fields | None) -> tuple[Any, ...]:
    assert fields is not None
    return tuple(getattr(fields, name) for name in Fields.__dataclass_fields__)


OWNERS = [(store, store.starts[0]) for store in EVERY_STORE]
OWNERS += [(store, "task") for store in EVERY_STORE if "task" in store.starts]


@pytest.mark.parametrize(("store", "start"), OWNERS, ids=[way_name(one) for one in OWNERS])
def test_two_owners_against_a_dict(home: Home, store: Store, start: str) -> None:
    class Bound(Machine):
        pass

    Bound.home, Bound.store, Bound.start = home, store, start
    run_state_machine_as_test(
        Bound,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
