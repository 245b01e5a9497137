"""The contract between two parties, whatever they have in common.

Each test runs for every store and, within it, for every way in which two parties come to share a
list: tasks of one event loop, threads, fork, spawn, forkserver, and a stranger who attaches by
name. `one` is a process of its own (see helpers.Home) in which the list was made, or a task there;
`two` is the other party. What a store of another kind has to do to pass is to be entered in
`helpers.STORES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers import EVERY_STORE, Home, Party, Store, definition, xml

from shmdomains import (
    DomainExists,
    DomainNotFound,
    DomainNotLocked,
    DomainRemoved,
    ListNotLocked,
    LockTimeout,
    NotOwner,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

WAYS = [(store, start) for store in EVERY_STORE for start in store.starts]
IN_ONE_PROCESS = {"thread", "task"}
BETWEEN_PROCESSES = [(store, start) for store, start in WAYS if store.processes]


def way_name(way: tuple[Store, str]) -> str:
    return f"{way[0].name}-{way[1]}"


class Pair:
    """Two parties that share the list `doms`; `one` made it."""

    def __init__(self, home: Home, stranger: Party, store: Store, start: str, name: str) -> None:
        self.home, self.stranger, self.start = home, stranger, start
        self.one = home.party
        self._guests: list[Party] = []
        self._name, self._store = name, store
        given = "None" if start in {*IN_ONE_PROCESS, "stranger"} else repr(start)
        self.one.tell(f"context = multiprocessing.get_context({given}); name = {name!r}")
        self.one.tell("room = 64; size = None")
        made = store.publish if start == "stranger" else store.create
        self.one.tell(f"doms = {made}")
        if start == "task":
            self.one = home.begin(start, doms="doms")
            home.party.tell("forget")
        self.two = self.join()

    def join(self, *names: str) -> Party:
        """The second party, or one more of its kind, with some of the first one's `names`."""
        if self.start != "stranger":
            given = {name: name for name in ("doms", *names)}
            guest = self.home.begin(self.start, self.one, **given)
            self._guests.append(guest)
            return guest
        self.stranger.tell(f"name = {self._name!r}; doms = {self._store.attach}")
        for name in names:
            pickled = self.one.tell(f"pickle.dumps({name})")
            self.stranger.tell(f"{name} = pickle.loads({pickled!r})")
        return self.stranger

    def end(self) -> None:
        if self.start == "stranger":
            self.stranger.tell("doms.close()")
            self.stranger.tell("forget")  # handles keep the mapping, and so the segment in use
        for guest in self._guests:
            guest.leave()
        problems = self.one.tell("[] if doms.closed else doms.check().problems")
        self.one.tell("None if doms.closed else (doms.unlink(), doms.close())")
        if self.start == "task":
            self.one.leave()
        assert problems == []


@pytest.fixture(params=WAYS, ids=way_name)
def pair(
    request: pytest.FixtureRequest, home: Home, stranger: Party, segment_name: str
) -> Iterator[Pair]:
    pair = Pair(home, stranger, *request.param, segment_name)
    yield pair
    pair.end()


@pytest.fixture
def one(pair: Pair) -> Party:
    return pair.one


@pytest.fixture
def two(pair: Pair) -> Party:
    return pair.two


def define(party: Party, *names: str, **more: Any) -> None:
    for name in names:
        party.tell(f"doms.define({xml(name, **more)!r}).name")


def held_by(party: Party, error: LockTimeout) -> None:
    """The time-out names the party, its thread and its command, and says that it lives."""
    holder = error.holder
    assert holder is not None
    assert (holder.pid, holder.tid, holder.alive) == (party.pid, party.tid, True)
    assert holder.command and holder.held_for is not None and holder.held_for >= 0
    assert f"{party.pid}" in str(error) and holder.command[:20] in str(error)


# --- finding and locking -----------------------------------------------------------------------


def test_what_one_defines_the_other_finds_by_every_key(one: Party, two: Party) -> None:
    define(one, "web1", "web2")
    uuid = one.tell("doms.peek(name='web2').uuid")
    number = one.tell(
        "with doms.get(name='web2') as dom: dom.activate(pid=7)\ndoms.peek(name='web2').id"
    )
    two.tell("doms.lock()")
    for find in (f"uuid(UUID('{uuid}'))", f"id({number})", "name('web2')"):
        assert two.tell(
            f"dom = doms.find_by_{find}\n"
            "seen = (dom.is_locked, dom.name, dom.uuid, dom.id, dom.pid)\n"
            "dom.unlock()\nseen"
        ) == (True, "web2", uuid, number, 7)
    two.tell("doms.unlock()")
    for key in (f"uuid='{uuid}'", f"id={number}", "name='web2'"):
        assert two.tell(f"with doms.get({key}) as dom: seen = dom.name\nseen") == "web2"
        assert two.tell(f"doms.peek({key}).name") == "web2"


def test_a_locked_domain_is_the_holders_alone(one: Party, two: Party) -> None:
    define(one, "web1")
    two.tell("dom = doms.get(name='web1')")
    for attempt in (
        "doms.get(name='web1', timeout=0)",
        "doms.lookup(name='web1', timeout=0.02)",
        "with doms.locked(): doms.find_by_name('web1', timeout=0)",
        "doms.lock_many([doms.peek(name='web1')], timeout=0.02)",
        "doms.get_many(['web1'], timeout=0.02)",
        "doms.assign_defs([definition('new'), definition('web1')], timeout=0.02)",
        "doms.update_many({'web1': {'data': 1}}, timeout=0)",
        "doms.remove_many(['web1'], timeout=0.02)",
        "doms.add('web1', 'requests', timeout=0.02)",
        "with doms.locked(): doms.assign_def(definition('web1'), timeout=0)",
        f"doms.define({xml('web1')!r}, timeout=0)",
        "doms.undefine(name='web1', timeout=0.02)",
        "with doms.locked(): doms.free(timeout=0)",
    ):
        with pytest.raises(LockTimeout) as caught:
            one.tell(attempt)
        held_by(two, caught.value)
        assert "web1" in str(caught.value)
        assert not one.tell("doms.is_locked"), attempt
    two.tell("dom.unlock()")
    assert one.tell("with doms.get(name='web1', timeout=0) as dom: seen = dom.name\nseen") == "web1"


def test_a_waiter_gets_the_domain_when_it_is_unlocked(one: Party, two: Party) -> None:
    define(one, "web1")
    two.tell("dom = doms.get(name='web1'); dom.pid = 4711")
    one.start("with doms.get(name='web1') as dom: seen = dom.pid\nseen")
    assert one.is_waiting()
    two.tell("dom.unlock()")
    assert one.answer() == 4711


def test_a_handle_waits_for_its_domain_too(one: Party, two: Party) -> None:
    define(one, "web1")
    one.tell("dom = doms.get(name='web1'); dom.unlock()")
    two.tell("dom = doms.get(name='web1')")
    assert one.tell("dom.try_lock(), dom.acquire(False), dom.acquire(timeout=0.01)") == (
        False,
        False,
        False,
    )
    with pytest.raises(LockTimeout) as caught:
        one.tell("dom.lock(0.02)")
    held_by(two, caught.value)
    one.start("dom.lock(30); dom.is_locked")
    assert one.is_waiting()
    two.tell("dom.release()")
    assert one.answer() is True
    one.tell("dom.unlock()")


def test_the_list_lock_excludes(one: Party, two: Party) -> None:
    two.tell("doms.lock()")
    assert one.tell("doms.acquire(False), doms.acquire(True, 0.01), doms.is_locked") == (
        False,
        False,
        False,
    )
    for attempt in (
        "doms.lock(0)",
        "doms.lock(0.02)",
        "with doms.locked(timeout=0): pass",
        f"doms.define({xml('web1')!r}, timeout=0.02)",
        "doms.undefine(name='web1', timeout=0)",
        "doms.lock_many([], timeout=0)",
        "doms.get_many([], timeout=0)",
        "doms.assign_defs([], timeout=0.02)",
        "doms.remove_many([], timeout=0.02)",
    ):
        with pytest.raises(LockTimeout) as caught:
            one.tell(attempt)
        held_by(two, caught.value)
    one.start("doms.lock(); doms.is_locked")
    assert one.is_waiting()
    two.tell("doms.unlock()")
    assert one.answer() is True
    assert two.tell("doms.acquire(timeout=0)") is False
    one.tell("doms.unlock()")
    assert two.tell("doms.acquire(timeout=0), doms.release()") == (True, None)


def test_a_hit_does_not_wait_for_an_unrelated_domain(one: Party, two: Party) -> None:
    define(one, "stuck", "free")
    two.tell("dom = doms.get(name='stuck')")
    assert one.tell("with doms.get(name='free', timeout=0) as dom: seen = dom.name\nseen") == "free"
    one.tell("doms.lock(0); dom = doms.find_by_name('free', timeout=0); doms.unlock()")
    one.tell("dom.unlock()")
    assert one.tell("[info.name for info in doms]") == ["stuck", "free"]
    two.tell("dom.unlock()")


def test_get_does_not_hold_the_list_while_it_waits(one: Party, two: Party) -> None:
    define(one, "web1")
    two.tell("dom = doms.get(name='web1')")
    one.start("with doms.get(name='web1') as dom: pass")
    assert one.is_waiting()
    assert (
        two.tell("dom.commit(), dom.unlock(), doms.acquire(timeout=5), doms.release()")[2] is True
    )
    one.answer()


def test_find_may_drop_the_list_lock_and_keep_the_domain(one: Party, two: Party) -> None:
    define(one, "web1")
    one.tell("doms.lock(); dom = doms.find_by_name('web1'); doms.unlock()")
    assert two.tell("doms.acquire(timeout=0), doms.release()") == (True, None)
    with pytest.raises(LockTimeout) as caught:
        two.tell("doms.get(name='web1', timeout=0)")
    held_by(one, caught.value)
    one.tell("dom.unlock()")


def test_lock_many_is_all_or_nothing(one: Party, two: Party) -> None:
    define(one, "a", "b", "c")
    two.tell("dom = doms.get(name='b')")
    with pytest.raises(LockTimeout) as caught:
        one.tell("doms.lock_many(doms.snapshot(), timeout=0.02)")
    held_by(two, caught.value)
    two.tell("dom.unlock()")
    for name in "abc":
        assert two.tell(f"with doms.get(name={name!r}, timeout=0): pass") is None
    one.start(
        "with doms.lock_many(doms.snapshot()) as many: seen = [dom.name for dom in many]\nseen"
    )
    assert one.answer() == ["a", "b", "c"]


def test_definitions_that_are_entered_at_once(one: Party, two: Party) -> None:
    define(one, "a", "b")
    one.tell(
        "wanted = [definition('c'), definition('b', title='new'), definition('d')]\n"
        "with doms.assign_defs(wanted, persistent=True) as many:\n"
        "    for dom in many: dom.data = dom.name"
    )
    assert two.tell(
        "[(info.name, info.data, info.definition.title, info.persistent) for info in doms.list()]"
    ) == [
        ("a", None, None, True),
        ("b", "b", "new", True),
        ("c", "c", None, True),
        ("d", "d", None, True),
    ]
    two.tell("dom = doms.get('d')")
    with pytest.raises(LockTimeout):
        one.tell("doms.assign_defs([definition('e'), definition('d')], timeout=0.02)")
    two.tell("dom.unlock()")
    assert two.tell("[info.name for info in doms.list()]") == ["a", "b", "c", "d"]
    one.start("doms.remove_many(['a', 'b', 'd'])")
    assert one.answer() == 3
    assert two.tell("list(doms.table(('name', 'persistent')))") == [("c", 1)]


def test_no_addition_is_lost(one: Party, two: Party) -> None:
    define(one, "web1")
    work = "for _ in range(300): last = doms.add('web1', 'requests', timeout=20)\nlast"
    one.start(work)
    two.start(work)
    assert max(one.answer(), two.answer()) == 600
    assert one.tell("doms.peek(name='web1').data['requests']") == 600


def test_every_acknowledged_change_counts(one: Party, two: Party) -> None:
    define(one, "web1")
    work = (
        "for _ in range(300):\n"
        "    with doms.get(name='web1', timeout=20) as dom: dom.data = (dom.data or 0) + 1\n"
    )
    one.start(work)
    two.start(work)
    one.answer(), two.answer()
    assert one.tell("doms.peek(name='web1').data") == 600


# --- transactions ------------------------------------------------------------------------------


def test_changes_are_seen_at_commit_and_not_before(one: Party, two: Party) -> None:
    define(one, "web1", memory=1024)
    two.tell(
        "dom = doms.get(name='web1')\n"
        "dom.set_state(DomainState.PAUSED, PausedReason.USER)\n"
        "dom.definition = dom.definition.replace(memory=2048)\n"
        "dom.data = {'jobs': [1, 2]}; dom.autostart = True; number = dom.activate(pid=99)"
    )
    look = (
        "info = doms.peek(name='web1')\n"
        "(info.state.name, info.definition.memory, None if info.data is None else "
        "info.data['jobs'], info.autostart, info.pid, info.is_active)"
    )
    before = ("SHUTOFF", 1024, None, False, None, False)
    after = ("RUNNING", 2048, (1, 2), True, 99, True)
    assert two.tell("dom.definition.memory, dom.pid, dom.is_active, dom.changed") == (
        2048,
        99,
        True,
        True,
    )
    assert one.tell(look) == before and two.tell(look) == before
    number = two.tell("number")
    assert one.tell(f"doms.peek(id={number})") is None
    two.tell("dom.commit()")
    assert one.tell(look) == after
    assert one.tell(f"doms.peek(id={number}).name") == "web1"
    two.tell("dom.deactivate(ShutoffReason.DESTROYED); dom.data = None")
    assert one.tell(look) == after
    two.tell("dom.unlock()")
    assert one.tell(
        "info = doms.peek(name='web1'); info.state.name, info.reason.name, info.data"
    ) == ("SHUTOFF", "DESTROYED", None)
    assert one.tell(f"doms.lookup(id={number})") is None


def test_an_exception_in_the_block_rolls_back(one: Party, two: Party) -> None:
    define(one, "web1")
    with pytest.raises(ZeroDivisionError):
        two.tell(
            "with doms.get(name='web1') as dom:\n"
            "    dom.pid = 1; dom.commit(); dom.pid = 2; dom.data = 'x'; dom.activate(); 1 / 0"
        )
    assert one.tell(
        "with doms.get(name='web1', timeout=0) as dom:\n"
        "    seen = (dom.pid, dom.data, dom.is_active)\nseen"
    ) == (1, None, False)


def test_a_new_definition_is_decoded_by_whoever_looks_next(one: Party, two: Party) -> None:
    define(one, "web1", title="old")
    for party in (one, two):
        assert party.tell("doms.peek(name='web1').definition.title") == "old"
    two.tell(
        "with doms.get(name='web1') as dom: dom.definition = dom.definition.replace(title='new')"
    )
    for party in (one, two):
        assert party.tell("doms.peek(name='web1').definition.title") == "new"
        assert party.tell("with doms.get(name='web1') as dom: t = dom.definition.title\nt") == "new"


def test_ids_are_nobodys_twice(one: Party, two: Party) -> None:
    define(one, "a", "b")
    turn = (
        "got = []\n"
        "for _ in range(40):\n"
        "    with doms.get(name={!r}) as dom:\n"
        "        got.append(dom.activate()); dom.commit(); dom.deactivate()\n"
        "got"
    )
    one.start(turn.format("a"))
    two.start(turn.format("b"))
    ids = one.answer() + two.answer()
    assert len(set(ids)) == 80 and min(ids) >= 0


def test_reading_waits_for_nobody(one: Party, two: Party) -> None:
    define(one, "web1")
    two.tell("doms.lock(); dom = doms.find_by_name('web1'); dom.pid = 5")
    assert one.tell(
        "uuid = doms.peek(name='web1', timeout=0).uuid\n"
        "(len(doms), uuid in doms, [info.name for info in doms], len(doms.snapshot()),\n"
        " len(doms.list(active=False)), doms.count(), doms.info.domains, doms.peek(uuid=uuid).pid)"
    ) == (1, True, ["web1"], 1, 1, 1, 1, None)
    two.tell("dom.unlock(); doms.unlock()")


# --- the list changes --------------------------------------------------------------------------


def test_define_and_undefine_are_seen(one: Party, two: Party) -> None:
    define(two, "web1")
    assert one.tell("dom = doms.get(name='web1'); dom.unlock(); len(doms)") == 1
    assert one.tell("doms.peek(name='web1').persistent") is True
    two.tell("doms.undefine(name='web1')")
    assert one.tell(
        "len(doms), doms.lookup(name='web1'), doms.peek(name='web1'), dom.uuid in doms"
    ) == (0, None, None, False)
    with pytest.raises(DomainNotFound):
        one.tell("doms.get(name='web1')")
    with pytest.raises(DomainRemoved):
        one.tell("dom.lock()")


def test_a_stale_handle_does_not_reach_the_slots_next_domain(one: Party, two: Party) -> None:
    define(one, "old")
    two.tell("stale = doms.get(name='old'); stale.unlock()")
    one.tell("doms.undefine(name='old')")
    define(one, "new")
    for attempt in ("stale.lock()", "stale.try_lock()", "stale.acquire()", "with stale: pass"):
        with pytest.raises(DomainRemoved):
            two.tell(attempt)
    with pytest.raises(DomainRemoved):
        two.tell("with doms.locked(): doms.remove_inactive(stale)")
    with pytest.raises(DomainRemoved):
        two.tell("doms.lock_many([stale])")
    assert one.tell("[info.name for info in doms]") == ["new"]


def test_duplicates_are_refused_whoever_defined_them(one: Party, two: Party) -> None:
    define(one, "web1")
    uuid = one.tell("doms.peek(name='web1').uuid")
    stranger_uuid = "00000000-0000-4000-8000-000000000001"
    with pytest.raises(DomainExists) as caught:
        two.tell(f"doms.define({xml('web1', stranger_uuid)!r})")
    assert str(caught.value) == f"domain 'web1' already exists with uuid {uuid}"
    with pytest.raises(DomainExists) as caught:
        two.tell(f"doms.define({xml('web2', uuid)!r})")
    assert str(caught.value) == f"domain 'web1' is already defined with uuid {uuid}"
    assert one.tell("len(doms)") == 1


def test_remove_waits_for_the_holder(one: Party, two: Party) -> None:
    define(one, "web1")
    one.tell("dom = doms.get(name='web1'); dom.unlock()")
    two.tell("dom = doms.get(name='web1'); dom.pid = 3")
    for timeout in (0, 0.02):
        with pytest.raises(LockTimeout) as caught:
            one.tell(f"with doms.locked(): doms.remove_inactive(dom, timeout={timeout})")
        held_by(two, caught.value)
    one.start("with doms.locked(): doms.remove_inactive(dom)")
    assert one.is_waiting()
    assert two.tell("dom.is_locked, dom.pid, len(doms)") == (True, 3, 1)
    two.tell("dom.unlock()")
    one.answer()
    assert two.tell("len(doms)") == 0
    with pytest.raises(DomainRemoved):
        two.tell("dom.lock()")


def test_removing_what_another_waits_for(one: Party, two: Party) -> None:
    """Whichever of them is first, both come to an end, and the domain is gone."""
    define(one, "web1")
    two.tell("doms.lock(); dom = doms.find_by_name('web1')")
    one.start("dom = doms.lookup(name='web1')\nif dom is not None: dom.unlock()")
    assert one.is_waiting()
    two.tell("dom.unlock(); doms.remove_inactive(dom); doms.unlock()")
    one.answer()
    assert one.tell("doms.lookup(name='web1'), len(doms)") == (None, 0)


def test_a_domain_renamed_while_one_waits_for_it_is_a_miss(one: Party, two: Party) -> None:
    define(one, "web1")
    two.tell("doms.lock(); dom = doms.find_by_name('web1'); doms.rename(dom, 'web2')")
    one.start("doms.get(name='web2', timeout=20).unlock()")
    two.tell("doms.unlock(); dom.unlock()")
    one.answer()
    with pytest.raises(DomainNotFound):
        one.tell("doms.get(name='web1')")
    two.tell("doms.lock(); dom = doms.find_by_name('web2')")
    one.start("doms.lookup(name='web2')")
    assert one.is_waiting()
    two.tell("doms.rename(dom, 'web3'); doms.unlock(); dom.unlock()")
    assert one.answer() is None
    assert one.tell("doms.peek(name='web3').definition.name") == "web3"


def test_rename_is_seen_as_one_change(one: Party, two: Party) -> None:
    define(one, "old")
    uuid = one.tell("doms.peek(name='old').uuid")
    one.tell("with doms.locked():\n    with doms.get(name='old') as dom: doms.rename(dom, 'new')")
    assert two.tell("doms.peek(name='old')") is None
    assert two.tell("info = doms.peek(name='new'); info.uuid, info.name, info.definition.name") == (
        uuid,
        "new",
        "new",
    )
    define(two, "old")
    assert one.tell("doms.peek(name='old').uuid") != uuid


def test_assign_def_of_an_active_domain_is_for_its_next_start(one: Party, two: Party) -> None:
    define(one, "web1", memory=1024)
    one.tell("with doms.get(name='web1') as dom: dom.activate()")
    two.tell(
        "with doms.locked(): dom = doms.assign_def(definition('web1', memory=2048))\ndom.unlock()"
    )
    look = (
        "info = doms.peek(name='web1'); nxt = info.next_definition\n"
        "(info.definition.memory, nxt and nxt.memory)"
    )
    assert one.tell(look) == (1024, 2048)
    one.tell("with doms.get(name='web1') as dom: dom.deactivate()")
    assert two.tell(look) == (2048, None)


def test_free_takes_every_lock_and_leaves_nothing(one: Party, two: Party) -> None:
    define(one, *"abc")
    two.tell("dom = doms.get(name='b'); dom.activate()")
    one.start("with doms.locked(): doms.free()")
    assert one.is_waiting()
    two.tell("dom.unlock()")
    one.answer()
    assert two.tell("len(doms), doms.snapshot(), doms.info.active") == (0, [], 0)
    with pytest.raises(DomainRemoved):
        two.tell("dom.lock()")
    define(two, "a")
    assert one.tell("[info.name for info in doms]") == ["a"]


def test_config_directories_are_everybodys(one: Party, two: Party, tmp_path: Any) -> None:
    (tmp_path / "web1.xml").write_text(xml("web1"))
    assert one.tell(f"doms.load_all_configs({str(tmp_path)!r}).loaded") == ["web1"]
    define(two, "web2")
    two.tell("doms.undefine(name='web1')")
    assert sorted(path.name for path in tmp_path.glob("*.xml")) == ["web2.xml"]
    assert one.tell("doms.info.config_dir") == two.tell("doms.info.config_dir") == str(tmp_path)


# --- handles and lists on their way ------------------------------------------------------------


def test_a_pickled_handle_leads_to_the_same_domain(one: Party, two: Party) -> None:
    define(one, "web1")
    pickled = two.tell("dom = doms.get(name='web1'); dom.unlock(); pickle.dumps(dom)")
    one.tell(f"dom = pickle.loads({pickled!r})\nmine = doms.get(name='web1'); mine.unlock()")
    assert one.tell("dom == mine, hash(dom) == hash(mine), dom.uuid == mine.uuid") == (
        True,
        True,
        True,
    )
    one.tell("dom.lock()")
    assert two.tell("dom.try_lock()") is False
    one.tell("dom.unlock()")
    assert two.tell("dom.try_lock(), dom.unlock()") == (True, None)


def test_a_pickled_handle_may_be_stale(one: Party, two: Party) -> None:
    define(one, "web1")
    pickled = two.tell("dom = doms.get(name='web1'); dom.unlock(); pickle.dumps(dom)")
    one.tell("doms.undefine(name='web1')")
    one.tell(f"dom = pickle.loads({pickled!r})")
    with pytest.raises(DomainRemoved):
        one.tell("dom.lock()")


def test_a_pickled_list_is_the_same_list(one: Party, two: Party) -> None:
    define(one, "web1")
    pickled = one.tell("pickle.dumps(doms)")
    assert two.tell(f"same = pickle.loads({pickled!r}); [info.name for info in same]") == ["web1"]
    assert two.tell("same is doms") is True


def test_what_one_holds_is_foreign_to_who_comes_later(pair: Pair) -> None:
    define(pair.one, "web1")
    pair.one.tell("doms.lock(); dom = doms.find_by_name('web1'); dom.pid = 1")
    late = pair.join("dom")
    assert late.tell("dom.is_locked, doms.is_locked, dom.uuid == doms.peek(name='web1').uuid") == (
        False,
        False,
        True,
    )
    for field in ("name", "id", "state", "definition", "data", "pid", "previous_owner_died"):
        with pytest.raises(DomainNotLocked):
            late.tell(f"dom.{field}")
    for change in ("dom.pid = 2", "dom.commit()", "dom.rollback()", "dom.activate()"):
        with pytest.raises(DomainNotLocked):
            late.tell(change)
    foreign_domain, foreign_list = (
        (NotOwner, NotOwner) if pair.start in IN_ONE_PROCESS else (DomainNotLocked, ListNotLocked)
    )
    with pytest.raises(foreign_domain):
        late.tell("dom.unlock()")
    with pytest.raises(foreign_list):
        late.tell("doms.unlock()")
    assert late.tell("dom.try_lock(), doms.acquire(False)") == (False, False)
    with pytest.raises(LockTimeout) as caught:
        late.tell("dom.lock(0.02)")
    held_by(pair.one, caught.value)
    # Nothing of that has moved the holder.
    assert pair.one.tell("dom.is_locked, doms.is_locked, dom.pid, dom.changed") == (
        True,
        True,
        1,
        True,
    )
    pair.one.tell("dom.unlock(); doms.unlock()")
    assert late.tell("with dom: seen = dom.pid\nseen") == 1


def test_the_end_of_a_party_does_not_free_what_others_hold(pair: Pair) -> None:
    define(pair.one, "web1")
    pair.one.tell("doms.lock(); dom = doms.find_by_name('web1'); dom.pid = 1")
    late = pair.join("dom")
    if pair.start == "stranger":
        late.tell("del dom, doms; gc.collect()")
        late.tell(f"name = {pair._name!r}; doms = {pair._store.attach}")
    else:
        pair._guests.remove(late)
        late.leave()
    assert pair.two.tell("doms.acquire(False), doms.peek(name='web1').pid") == (False, None)
    with pytest.raises(LockTimeout):
        pair.two.tell("doms.get(name='web1', timeout=0)")
    pair.one.tell("dom.unlock(); doms.unlock()")
    assert pair.two.tell("doms.peek(name='web1').pid") == 1


@pytest.mark.parametrize(
    "pair", [way for way in WAYS if way[1] not in IN_ONE_PROCESS], ids=way_name, indirect=True
)
def test_closing_is_each_partys_own(pair: Pair) -> None:
    define(pair.one, "web1")
    late = pair.join()
    late.tell("doms.close()")
    assert late.tell("doms.closed") is True
    assert pair.one.tell("with doms.get(name='web1') as dom: seen = dom.name\nseen") == "web1"
    if pair.start == "stranger":
        pair.join()


@pytest.mark.parametrize("pair", BETWEEN_PROCESSES, ids=way_name, indirect=True)
def test_info_knows_who_is_attached(one: Party, two: Party) -> None:
    two.tell("len(doms)")  # a forked child is entered at its first use
    info = (
        "info = doms.info\n"
        "({process.pid for process in info.attached if process.alive}, info.creator.pid)"
    )
    attached, creator = one.tell(info)
    assert {one.pid, two.pid} <= attached
    assert creator == one.pid
    assert two.tell(info)[1] == one.pid


def test_definitions_travel(one: Party, two: Party) -> None:
    """What one party builds is what the other reads, field by field and as XML."""
    made = definition(
        "web1", memory=4096, title="a title", extra="<!-- kept --><x:y xmlns:x='u:x'/>"
    )
    made = made.replace(uuid="0f" * 16)
    one.tell(f"doms.define(DomainDef.decode({made.encode()!r})).name")
    assert two.tell("doms.peek(name='web1').definition") == made
    assert two.tell("doms.peek(name='web1').definition.to_xml()") == made.to_xml()


# --- waiting -----------------------------------------------------------------------------------

CHANGES = {
    "commit": ("with doms.get('web1') as dom: dom.data = 7", "info.data == 7"),
    "activation": ("with doms.get('web1') as dom: dom.activate()", "info.is_active"),
    "rename": (
        "with doms.locked(), doms.get('web1') as dom: doms.rename(dom, 'web2')",
        "info.name == 'web2'",
    ),
    "removal": ("doms.undefine('web1')", "info is None"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_ends_the_wait_of_the_other(one: Party, two: Party, what: str) -> None:
    change, condition = CHANGES[what]
    define(one, "web1")
    one.start(f"doms.wait('web1', until=lambda info: {condition}, timeout=20)")
    assert one.is_waiting()
    two.do(change)
    found = one.answer()
    assert found == two.tell("doms.peek(name='web2') or doms.peek(name='web1')")


def test_any_domain_may_end_a_wait(one: Party, two: Party) -> None:
    define(one, "web1")
    one.start("doms.wait_any(until=lambda info: info.name == 'web2', timeout=20).name")
    assert one.is_waiting()
    two.do("doms.undefine('web1')")
    assert one.is_waiting()
    define(two, "web2")
    assert one.answer() == "web2"


def test_a_holder_who_waits_lets_the_other_in(one: Party, two: Party) -> None:
    define(one, "web1")
    one.start(
        "with doms.get('web1') as dom:\n"
        "    dom.wait(lambda dom: dom.data == 1, timeout=20)\n"
        "    dom.data = 2\n"
        "    seen = dom.is_locked\n"
        "seen"
    )
    assert one.is_waiting()
    two.do("with doms.get('web1', timeout=20) as dom: dom.data = 1")
    assert one.answer() is True
    assert two.tell("doms.peek('web1').data") == 2
    one.start("with doms.get('web1') as dom: dom.wait(lambda dom: False, timeout=20)")
    assert one.is_waiting()
    two.do("doms.undefine('web1', timeout=20)")
    with pytest.raises(DomainRemoved):
        one.answer()
    assert two.tell("doms.acquire(False), doms.release()") == (True, None)
