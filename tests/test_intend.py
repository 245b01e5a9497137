"""What a user intends with a domain (`Domain.intend`), and whether its process still runs."""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import EVERY_STORE, Store, thread_party, xml
from killing import Child, Pipe

from shmdomains import (
    DomainDef,
    DomainList,
    DomainNotLocked,
    ListNotLocked,
    LockHolder,
    LockTimeout,
    SegmentFull,
    Unfinished,
)
from shmdomains.rules import work

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def doms(request: pytest.FixtureRequest) -> Iterator[Any]:
    with request.param.make() as doms:
        doms.define(xml("web1"))
        yield doms
        assert doms.check().problems == []


def unfinished(doms: Any) -> Unfinished | None:
    with doms.get("web1") as dom:
        found: Unfinished | None = dom.unfinished
        return found


def commits(dom: Any) -> int:
    """How many there were of this domain."""
    receipt = dom._receipt
    return int(receipt) if isinstance(receipt, int) else receipt[1] & (1 << 48) - 1


def leave(doms: Any, name: str = "start", data: Any = None) -> None:
    """Intend something, and fail."""
    with pytest.raises(ZeroDivisionError), doms.get("web1") as dom:
        dom.intend(name, data)
        raise ZeroDivisionError


def test_a_clean_end_leaves_nothing(doms: Any) -> None:
    with doms.get("web1") as dom:
        dom.intend("start", {"port": 1})
        assert dom.unfinished is None  # it is what its holder is doing now
        dom.commit()
        assert not dom.changed
    assert unfinished(doms) is None
    dom.lock()
    dom.intend("stop")
    dom.unlock()
    assert unfinished(doms) is None


def test_it_ends_in_the_commit_of_the_last_changes(doms: Any) -> None:
    with doms.get("web1") as dom:
        dom.intend("start")
        before = commits(dom)
        dom.data = "started"
    assert commits(dom) == before + 1
    assert doms.peek("web1").data == "started" and unfinished(doms) is None


def test_an_exception_leaves_it(doms: Any) -> None:
    before = time.time()
    leave(doms, "start", {"sockets": ["a", "b"]})
    found = unfinished(doms)
    assert found is not None
    assert (found.name, dict(found.data)) == ("start", {"sockets": ("a", "b")})
    assert before <= found.since <= time.time()
    assert (found.holder.pid, found.holder.alive) == (os.getpid(), True)
    # And so it stays until somebody ends it.
    assert unfinished(doms) == found
    with doms.get("web1") as dom:
        dom.data = 1
    assert unfinished(doms) == found
    with doms.get("web1") as dom:
        dom.intend(None)
        assert dom.unfinished is None
    assert unfinished(doms) is None


def test_what_waits_is_committed_with_it(doms: Any) -> None:
    with pytest.raises(ZeroDivisionError), doms.get("web1") as dom:
        dom.activate(pid=os.getpid())
        dom.data = "starting"
        dom.intend("start")
        assert not dom.changed
        assert doms.peek("web1").is_active and doms.peek("web1").data == "starting"
        dom.data = "started"
        raise ZeroDivisionError
    assert doms.peek("web1").is_active and doms.peek("web1").data == "starting"
    with doms.get("web1") as dom:
        dom.intend(None)
        dom.deactivate()


def test_another_intention_takes_its_place(doms: Any) -> None:
    leave(doms, "start")
    with doms.get("web1") as dom:
        assert dom.unfinished.name == "start"
        dom.intend("clean up")
        assert dom.unfinished is None
    assert unfinished(doms) is None


def test_an_inner_block_that_fails_leaves_it(doms: Any) -> None:
    with doms.get("web1") as dom:
        dom.intend("start")
        with pytest.raises(ZeroDivisionError), dom:
            raise ZeroDivisionError
        assert dom.unfinished.name == "start"
    assert unfinished(doms).name == "start"  # type: ignore[union-attr]
    with doms.get("web1") as dom:
        with dom:
            dom.intend("stop")
        assert dom.unfinished is None  # the outer block goes on
    assert unfinished(doms) is None


def test_a_rollback_leaves_it_to_its_holder(doms: Any) -> None:
    with doms.get("web1") as dom:
        dom.intend("start")
        dom.data = 1
        dom.rollback()
        assert dom.unfinished is None
    assert unfinished(doms) is None and doms.peek("web1").data is None


def test_a_dropped_handle_leaves_it(doms: Any) -> None:
    dom = doms.get("web1")
    dom.intend("start")
    with pytest.warns(ResourceWarning):
        del dom
        gc.collect()
    assert unfinished(doms).name == "start"  # type: ignore[union-attr]


def test_rules_leave_it(doms: Any, tmp_path: Path) -> None:
    leave(doms)
    doms.load_all_configs(tmp_path)
    for change in (
        lambda: doms.save_config("web1"),
        lambda: doms.define(xml("web1", memory=2048)),
        lambda: doms.set_autostart("web1", True),
        lambda: doms.rename("web1", "web2"),
        lambda: doms.rename("web2", "web1"),
    ):
        change()
        info = next(iter(doms))
        with doms.get(info.uuid) as dom:
            assert dom.unfinished.name == "start"
    with doms.get("web1") as dom:
        dom.activate()
    doms.undefine("web1")
    assert unfinished(doms).name == "start"  # type: ignore[union-attr]
    with doms.get("web1") as dom:
        dom.deactivate()
    doms.undefine("web1")
    doms.define(xml("web1"))
    assert unfinished(doms) is None


def test_bad_input_changes_nothing(doms: Any) -> None:
    with doms.get("web1") as dom:
        for name, data in (("", None), (7, None), (b"start", None), ("start", object())):
            with pytest.raises(TypeError):
                dom.intend(name, data)
        assert not dom.changed and dom._work is None
    for call in (lambda: dom.intend("start"), lambda: dom.unfinished, lambda: dom.process_alive):
        with pytest.raises(DomainNotLocked):
            call()


def test_a_commit_that_fails_leaves_it() -> None:
    with DomainList(max_domains=2, max_bytes=2 << 20) as doms:
        doms.define(xml("web1"))
        dom = doms.get("web1")
        dom.intend("start")
        dom.data = b"x" * (2 << 20)
        with pytest.raises(SegmentFull):
            dom.unlock()
        assert not dom.is_locked
        assert unfinished(doms).name == "start"  # type: ignore[union-attr]
        # Nor does an intention for which there is no room change anything.
        with doms.get("web1") as dom:
            with pytest.raises(SegmentFull):
                dom.intend("stop", b"x" * (2 << 20))
            assert dom.unfinished.name == "start"


def intend_and_die(pipe: Pipe, path: str) -> None:
    doms = DomainList.attach(path=path)
    dom = doms.get("web1")
    dom.intend("start", {"step": 1})
    dom.data = "committed"
    dom.commit()
    dom.data = "lost"
    pipe.say(os.getpid())
    pipe.rest()


def test_a_death_leaves_it(start: Callable[..., Child], path: str) -> None:
    with DomainList.create(path=path, max_domains=10) as doms:
        doms.define(xml("web1"))
        child = start(intend_and_die, path)
        pid = child.hear()
        child.kill()
        with doms.get("web1") as dom:
            found = dom.unfinished
            assert found.name == "start" and found.data["step"] == 1
            assert isinstance(found.holder, LockHolder)
            assert (found.holder.pid, found.holder.alive) == (pid, False)
            assert dom.previous_owner_died.pid == pid
            assert dom.data == "committed"
        assert unfinished(doms) == found
        doms.unlink(force=True)


# --- what runs while it is encoded --------------------------------------------------------------


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """``encoding(deed)``: the next encoding of what is under way does it, as a signal handler may
    that runs there."""

    def arrange(deed: Callable[[], Any]) -> None:
        def pack(value: Any) -> bytes:
            monkeypatch.setattr(work, "pack", packed)
            deed()
            return packed(value)

        packed = work.pack
        monkeypatch.setattr(work, "pack", pack)

    return arrange


Encoding = Callable[[Callable[[], Any]], None]
LOCKED = "doms.get('web1')"


@pytest.mark.parametrize("what", ["commit", "rename"])
def test_a_handler_that_unlocks_while_it_is_encoded(
    store: Store, encoding: Encoding, what: str
) -> None:
    """Somebody else has the domain by then: it is not changed without its lock."""
    with store.make() as doms, thread_party(doms=doms) as other:
        uuid = doms.define(xml("web1")).uuid
        doms.lock()
        dom = doms.get("web1")
        dom.data = "committed by the handler"
        # Whoever holds the list lock waits for no domain.
        encoding(lambda: (dom.unlock(), doms.unlock(), other.tell(f"dom = {LOCKED}")))
        with pytest.raises(DomainNotLocked):
            if what == "commit":
                dom._commit_work(work.Work())
            else:
                new = DomainDef.from_xml(xml("web2", uuid)).encode()
                doms._rename(dom, "web2", new, None, None, work.Work())
        assert not dom.is_locked
        before = doms.peek("web1")
        assert before.data == "committed by the handler" and before._work is None
        with pytest.raises(LockTimeout):
            doms.get("web1", timeout=0)
        other.tell("dom.unlock()")
        assert doms.peek("web1") == before


def test_a_handler_that_unlocks_as_an_intention_ends(store: Store, encoding: Encoding) -> None:
    """The lock that somebody else has got meanwhile is not released."""
    with store.make() as doms, thread_party(doms=doms) as other:
        doms.define(xml("web1"))
        with doms.job("web1", "backup"):  # so that there is more under way
            dom = doms.get("web1")
            dom.intend("start")
            dom.data = 1
            encoding(lambda: (dom.unlock(), other.tell(f"dom = {LOCKED}\ndom.data = 2")))
            with pytest.raises(DomainNotLocked):
                dom.unlock()
            assert not dom.is_locked and doms.peek("web1").data == 1
            with pytest.raises(LockTimeout):
                doms.get("web1", timeout=0)
            other.tell("dom.unlock()")
        assert doms.peek("web1").data == 2 and unfinished(doms) is None


def test_a_handler_that_unlocks_the_list_while_it_is_encoded(
    store: Store, encoding: Encoding
) -> None:
    with store.make() as doms:
        new = DomainDef.from_xml(xml("web1"))
        uuid = doms.define(new).uuid
        doms.undefine("web1")
        doms.lock()
        encoding(doms.unlock)
        with pytest.raises(ListNotLocked):
            doms._insert(uuid, "web1", new.encode(), 5, False, None, [None], work.Work())
        assert len(doms) == 0
        with doms.locked(0):
            pass


# --- the hypervisor's process -------------------------------------------------------------------


def alive(doms: Any) -> bool:
    with doms.get("web1") as dom:
        return bool(dom.process_alive)


def test_whether_the_process_runs(doms: Any) -> None:
    assert not alive(doms)
    with doms.get("web1") as dom:
        dom.pid = os.getpid()
        assert dom.process_alive  # not committed yet
        dom.rollback()
        assert not dom.process_alive
        dom.pid = os.getpid()
    assert alive(doms)
    with doms.get("web1") as dom:
        dom.pid = None
        assert not dom.process_alive
    assert not alive(doms)


def test_a_process_that_ended_is_not_alive(doms: Any) -> None:
    hypervisor = subprocess.Popen(["sleep", "60"])
    with doms.get("web1") as dom:
        dom.activate(pid=hypervisor.pid)
    assert alive(doms)
    hypervisor.kill()
    os.waitid(os.P_PID, hypervisor.pid, os.WEXITED | os.WNOWAIT)
    assert not alive(doms)  # a zombie
    hypervisor.wait()
    assert not alive(doms)
    with doms.get("web1") as dom:
        dom.pid = hypervisor.pid  # there was none when it was assigned
        assert not dom.process_alive
        dom.deactivate()


def test_a_number_that_was_used_again_is_nobody(doms: Any) -> None:
    last = Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(last, os.W_OK):
        pytest.skip("only root says which number the next process gets")
    first = subprocess.Popen(["sleep", "60"])
    with doms.get("web1") as dom:
        dom.pid = first.pid
    assert alive(doms)
    first.kill()
    first.wait()
    time.sleep(0.02)  # more than a clock tick, by which start times are told apart
    for _ in range(100):
        try:
            last.write_text(str(first.pid - 1))
        except OSError as exc:
            pytest.skip(f"nobody says here which number the next process gets: {exc.strerror}")
        again = subprocess.Popen(["sleep", "60"])
        try:
            if again.pid == first.pid:
                assert not alive(doms)
                return
        finally:
            again.kill()
            again.wait()
    pytest.skip("others took the number each time")
