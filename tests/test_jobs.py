"""Jobs: what may run beside what, who waits for whom, and what is left of the dead.

First what one thread can see, on every store; then two parties, whatever they have in common; then
bytes that are damaged, and segments that are full. Deaths stand in test_job_deaths.py.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import threading
import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any
from uuid import UUID

import pytest
from helpers import DEADLINE, EVERY_STORE, Home, Party, Store, definition, xml
from killing import until
from test_conformance import IN_ONE_PROCESS, WAYS, Pair, way_name

import shmdomains
from shmdomains import (
    AlreadyLocked,
    DomainBusy,
    DomainInfo,
    DomainNotFound,
    DomainRemoved,
    DomainStateError,
    Job,
    JobTimeout,
    LockOrder,
    NotOwner,
    SegmentCorrupt,
    SegmentFull,
    UncommittedChanges,
)
from shmdomains.job import ALLOWED, kinds_of, mask_of
from shmdomains.rules.jobs import MAX_PROGRESS
from shmdomains.rules.work import Begun, Caller, Work

pytestmark = pytest.mark.usefixtures("nothing_left")

A, B = (UUID(int=number) for number in (10, 11))
NORMAL = sorted(set(Job) - {Job.ASYNC, Job.ASYNC_NESTED})


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def doms(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A list with the domains ``a`` and ``b``."""
    store: Store = request.param
    doms = store.make()
    doms.define(xml("a", A))
    doms.define(xml("b", B))
    yield doms
    if not doms.closed:
        assert [job for info in doms for job in info.jobs] == []
        assert doms.check().problems == []
        doms.close()


@pytest.fixture
def dom(doms: Any) -> Any:
    """A handle to ``a``, unlocked."""
    dom = doms.get("a")
    dom.unlock()
    return dom


# --- one thread: what a job is ------------------------------------------------------------------


def test_a_job_is_seen_while_its_block_lasts(doms: Any, dom: Any) -> None:
    with dom.job("backup", Job.MODIFY, why="nightly") as job:
        assert not dom.is_locked
        [seen] = doms.peek("a").jobs
        assert (seen.operation, seen.kind, seen.why) == ("backup", Job.MODIFY, "nightly")
        assert (seen.allow, seen.progress, seen.abort_requested) == (None, None, False)
        assert (seen.holder.pid, seen.holder.alive) == (os.getpid(), True)
        assert seen.holder.tid == threading.get_native_id()
        assert seen.holder.command
        assert seen.since == job.since
        assert (job.operation, job.kind, job.replaced) == ("backup", Job.MODIFY, ())
        assert job.previous_owner_died is None
        assert doms.peek("b").jobs == ()
        assert [one.operation for one in dom.jobs] == ["backup"]
        with dom:
            assert [one.operation for one in dom.jobs] == ["backup"]
    assert doms.peek("a").jobs == dom.jobs == ()
    assert "over" in repr(job)


def test_the_end_of_the_block_ends_it_whatever_happened(doms: Any, dom: Any) -> None:
    with pytest.raises(OSError, match="no such disk"), dom.job("backup"):
        raise OSError("no such disk")
    assert dom.jobs == ()
    with dom.job("backup") as job:
        job.end()
        assert dom.jobs == ()
        with pytest.raises(NotOwner, match="is over"):
            job.progress(1)
    with pytest.raises(AlreadyLocked, match="ask for another one"), job:
        pass


def test_a_job_by_key(doms: Any) -> None:
    for key in ("a", A, str(A), doms.peek("a")):
        with doms.job(key, "backup"):
            assert [job.operation for job in doms.peek("a").jobs] == ["backup"]
    with pytest.raises(DomainNotFound):
        doms.job("no such", "backup")


def test_progress_is_committed_at_once_and_nothing_else(doms: Any, dom: Any) -> None:
    with dom.job("backup") as job:
        job.progress({"done": 1, "of": [1, 2]})
        [seen] = doms.peek("a").jobs
        assert dict(seen.progress) == {"done": 1, "of": (1, 2)}
        with dom:
            dom.data = "waits"
            job.progress({"done": 2})
            assert doms.peek("a").data is None
            assert doms.peek("a").jobs[0].progress["done"] == 2
            assert dom.changed and dom.data == "waits"
        assert doms.peek("a").data == "waits"
        assert doms.peek("a").jobs[0].progress["done"] == 2


def test_a_progress_has_a_limit(doms: Any, dom: Any) -> None:
    with dom.job("backup") as job:
        job.progress(b"x" * (MAX_PROGRESS - 3))
        with pytest.raises(ValueError, match="4097 bytes; the limit is 4096"):
            job.progress(b"x" * (MAX_PROGRESS - 2))
        with pytest.raises(TypeError):
            job.progress(object())
        assert len(dom.jobs[0].progress) == MAX_PROGRESS - 3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"operation": ""}, ValueError),
        ({"operation": "é" * 128}, ValueError),
        ({"operation": 7}, TypeError),
        ({"why": ""}, ValueError),
        ({"kind": 77}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"allow": [Job.QUERY]}, ValueError),
        ({"kind": Job.ASYNC, "allow": [Job.ASYNC]}, ValueError),
        ({"kind": Job.ASYNC, "allow": [99]}, ValueError),
    ],
)
def test_what_is_no_job(dom: Any, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        dom.job(**{"operation": "backup", **arguments})
    assert dom.jobs == ()


def test_jobs_are_part_of_an_info(doms: Any, dom: Any) -> None:
    without = doms.peek("a")
    with dom.job("backup", Job.ASYNC, allow=[Job.QUERY]) as job:
        job.progress({"done": 1})
        info, again = doms.peek("a"), doms.peek("a")
        assert info == again != without
        twin = pickle.loads(pickle.dumps(info))
        assert isinstance(twin, DomainInfo) and twin == info
        assert twin.jobs[0].operation == "backup"
        assert twin.jobs[0].holder.pid == os.getpid()
        assert twin.jobs[0].allow == {Job.QUERY, Job.DESTROY}
        assert pickle.loads(pickle.dumps(twin)) == info
        [one] = twin.jobs
        assert pickle.loads(pickle.dumps(one)) == one
        [found] = json.loads(json.dumps(info.to_dict()))["jobs"]
        assert found["operation"] == "backup" and found["kind"] == "async"
        assert found["allow"] == ["query", "destroy"] and found["progress"] == {"done": 1}
        assert found["holder"]["pid"] == os.getpid()
        job.progress({"done": 2})
        assert doms.peek("a") != info
        with pytest.raises(AttributeError, match="definitions=True"):
            doms.list(definitions=False)[0].jobs  # noqa: B018
    assert doms.peek("a") == without
    assert doms.peek("a").to_dict()["jobs"] == []


def test_a_blob_of_before_there_were_jobs() -> None:
    assert Work.decode(b"\x92\xc0\xc0") == Work()
    with pytest.raises(ValueError):
        Work.decode(b"\x93\xc0\xc0\x07")
    with pytest.raises(ValueError):
        Work.decode(Work(jobs=(Begun("x", 77, 0, Caller(1, 1, 1), None, 0.0),)).encode())  # type: ignore[arg-type]


# --- one thread: the lock -----------------------------------------------------------------------


def test_the_lock_is_put_down_and_taken_up_again(doms: Any) -> None:
    with doms.get("a") as dom:
        dom.data = 1
        with pytest.raises(UncommittedChanges), dom.job("backup"):
            pass
        assert dom.is_locked and dom.data == 1
        dom.commit()
        with dom, dom:
            with dom.job("backup"):
                assert not dom.is_locked
                with doms.get("a") as other:
                    other.data = 2
            assert dom.is_locked and dom.data == 2
            dom.data = 3
        assert dom.is_locked and dom.data == 3  # the inner blocks did not unlock it
        dom.commit()
        with pytest.raises(OSError), dom.job("backup"):
            raise OSError
        assert dom.is_locked
    assert not dom.is_locked and doms.peek("a").data == 3


def test_the_lock_goes_on_through_the_handle_that_had_it(doms: Any, dom: Any) -> None:
    """A job by key has a handle of its own, which is dropped with the job."""
    with doms.get("a") as holder:
        with doms.job("a", "backup") as job:
            pass
        holder.data = 1
        del job
        gc.collect()
        assert holder.is_locked and holder.changed
    assert doms["a"].data == 1
    with dom:
        with doms.job(dom, "backup"), dom:
            pass
        assert dom.is_locked


def test_what_stays_unfinished_in_a_job_is_not_the_holders(doms: Any) -> None:
    with doms.get("a") as dom:
        dom.intend("migrate")
        with dom.job("migrate"):
            try:
                with dom:
                    dom.intend("attach a disk")
                    raise OSError
            except OSError:
                pass
        assert dom.unfinished.name == "attach a disk"
    with doms.get("a") as dom:
        assert dom.unfinished.name == "attach a disk"
        dom.intend(None)


def test_what_was_intended_stays_over_a_job(doms: Any) -> None:
    with doms.get("a") as dom:
        dom.intend("start")
        with dom.job("start"), dom:
            assert dom.unfinished.name == "start" and dom.unfinished.holder.alive
        assert dom.unfinished is None
    with dom:
        assert dom.unfinished is None


def test_a_domain_that_the_block_left_locked(doms: Any, dom: Any) -> None:
    with dom.job("backup"):
        dom.lock()
        dom.data = 1
    assert dom.jobs == () and dom.is_locked and dom.changed
    dom.unlock()
    assert doms.peek("a").data == 1


def test_another_domain_is_not_held_at_the_end(doms: Any, dom: Any) -> None:
    job = dom.job("backup")
    with pytest.raises(LockOrder), job:
        other = doms.get("b")
    assert dom.jobs[0].operation == "backup"
    with pytest.raises(LockOrder):
        job.progress(1)
    other.unlock()
    job.progress(1)
    job.end()
    assert dom.jobs == ()


def test_no_other_lock_is_held_at_the_beginning(doms: Any, dom: Any) -> None:
    with doms.locked(), pytest.raises(LockOrder, match="list lock"), dom.job("backup"):
        pass
    with doms.get("b"), pytest.raises(LockOrder, match="another domain"), dom.job("backup"):
        pass
    with doms.lock_many(["a", "b"]) as many:
        with pytest.raises(LockOrder, match="another domain"), many[0].job("backup"):
            pass
        assert many[0].is_locked and many[1].is_locked


def test_a_domain_that_ends_with_its_job(doms: Any, dom: Any) -> None:
    with dom.job("destroy", Job.DESTROY) as job:
        doms.undefine("a")
        with pytest.raises(DomainRemoved):
            job.progress(1)
        with pytest.raises(DomainRemoved):
            job.abort_requested  # noqa: B018
        with pytest.raises(DomainRemoved):
            dom.jobs  # noqa: B018
    with pytest.raises(DomainRemoved), dom.job("backup"):
        pass
    with doms.get("b") as other, other.job("destroy"):
        doms.undefine("b")
    assert not other.is_locked and len(doms) == 0


def test_a_job_that_is_dropped_ends(doms: Any, dom: Any) -> None:
    job = dom.job("backup")
    job.__enter__()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del job
        gc.collect()
    assert [str(one.message) for one in caught if "job 'backup'" in str(one.message)]
    assert dom.jobs == ()


# --- one thread: order --------------------------------------------------------------------------


def test_a_thread_does_not_wait_for_itself(doms: Any, dom: Any) -> None:
    with dom.job("backup"):
        with (
            pytest.raises(AlreadyLocked, match="would wait for itself"),
            dom.job("more", timeout=1),
        ):
            pass
        with pytest.raises(LockOrder, match="give a timeout"), doms.job("b", "more"):
            pass
        with doms.job("b", "more", timeout=1):
            pass
    with dom.job("migrate", Job.ASYNC):
        with pytest.raises(AlreadyLocked), dom.job("save", Job.ASYNC, timeout=1):
            pass
        with pytest.raises(AlreadyLocked), dom.job("change", Job.MODIFY, timeout=1):
            pass
        with dom.job("look", Job.QUERY, timeout=1):
            pass


def test_nested_jobs_are_of_an_async_jobs_holder(doms: Any, dom: Any) -> None:
    with pytest.raises(NotOwner, match="nested"), dom.job("step", Job.ASYNC_NESTED):
        pass
    with dom.job("migrate", Job.ASYNC, allow=[]) as outer:
        with dom.job("step", Job.ASYNC_NESTED) as inner:
            assert [one.operation for one in dom.jobs] == ["migrate", "step"]
            inner.progress(1)
            outer.progress(2)
            assert [one.progress for one in dom.jobs] == [2, 1]
        assert [one.operation for one in dom.jobs] == ["migrate"]


# --- one thread: the rules of the list ----------------------------------------------------------


def test_ones_own_job_excludes_nothing(doms: Any, dom: Any) -> None:
    with dom.job("all of it", Job.ASYNC, allow=[]):
        doms.define(xml("a", A, memory=2048))
        doms.rename("a", "c", timeout=1)
        doms.undefine("c")
    with doms.job("b", "go"), doms.locked():
        doms.remove_inactive("b")
    assert len(doms) == 0


# --- events -------------------------------------------------------------------------------------

STARTED, ENDED = 102, 103


@pytest.mark.parametrize("store", EVERY_STORE, ids=lambda store: store.name)
def test_each_beginning_and_end_is_an_event_of_its_commit(store: Store) -> None:
    doms = store.make()
    doms.define(xml("a", A))

    def events(since: int) -> list[tuple[int, int]]:
        found = [doms._event(number) for number in range(since + 1, doms._event_count + 1)]
        assert {event.uuid for event in found} <= {A}
        return [(event.type, event.detail) for event in found]

    count = doms._event_count
    with doms.job("a", "migrate", Job.ASYNC) as job:
        assert events(count) == [(STARTED, Job.ASYNC)]
        job.progress(1)
        doms.get("a").unlock()
        assert len(events(count)) == 1
        with doms.get("a") as dom:
            dom.autostart = True
            with pytest.raises(UncommittedChanges), dom.job("x", Job.ASYNC_NESTED):
                pass
            job.end()  # not with the changes that wait, and not a second time with their commit
            assert events(count) == [(STARTED, Job.ASYNC), (ENDED, Job.ASYNC)]
        assert [kind for kind, _ in events(count)] == [STARTED, ENDED, 101]
    count = doms._event_count
    left = doms.job("a", "left", Job.MODIFY)
    thread = threading.Thread(target=left.__enter__)
    thread.start()
    thread.join(DEADLINE)
    until(lambda: not doms["a"].jobs[0].holder.alive, "the kernel's thread has ended, too")
    with doms.job("a", "next", Job.QUERY, timeout=DEADLINE):
        told = [(STARTED, Job.MODIFY), (ENDED, Job.MODIFY), (STARTED, Job.QUERY)]
        assert events(count) == told
    with pytest.warns(ResourceWarning):
        del left
    assert doms.check().problems == []
    doms.close()


# --- masks --------------------------------------------------------------------------------------


def test_masks() -> None:
    assert {Job.QUERY, Job.DESTROY, Job.ABORT} == ALLOWED
    assert kinds_of(mask_of(NORMAL)) == set(NORMAL)
    assert [kind.value for kind in Job] == list(range(1, 10))


# --- two parties --------------------------------------------------------------------------------


@pytest.fixture(params=WAYS, ids=way_name)
def pair(
    request: pytest.FixtureRequest, home: Home, stranger: Party, segment_name: str
) -> Iterator[Pair]:
    pair = Pair(home, stranger, *request.param, segment_name)
    pair.one.tell(f"doms.define({xml('a', A)!r}); doms.define({xml('b', B)!r}); None")
    for party in (pair.one, pair.two):
        party.tell("dom = doms.get('a'); dom.unlock()")
    yield pair
    pair.end()


def begin(party: Party, kind: Job, name: str = "job", more: str = "timeout=0") -> None:
    party.tell(f"{name} = dom.job('{name} of {party.pid}', Job({int(kind)}), {more})")
    party.tell(f"{name}.__enter__(); None")


def end(party: Party, name: str = "job") -> None:
    party.tell(f"{name}.__exit__(None, None, None)")


def test_what_runs_beside_what(pair: Pair) -> None:
    """virDomainNestedJobAllowed and virDomainObjCanSetJob, each pair of kinds, each mask of one."""
    one, two = pair.one, pair.two
    for held, wanted in product([*NORMAL, Job.ASYNC], [*NORMAL, Job.ASYNC]):
        begin(one, held)
        if held is Job.ASYNC and wanted in ALLOWED:
            begin(two, wanted)
            end(two)
        else:
            with pytest.raises(JobTimeout):
                begin(two, wanted)
        end(one)
    for kind, wanted in product(NORMAL, NORMAL):
        begin(one, Job.ASYNC, more=f"timeout=0, allow=[Job({int(kind)})]")
        if wanted in (kind, Job.DESTROY):
            begin(two, wanted)
            end(two)
        else:
            with pytest.raises(JobTimeout):
                begin(two, wanted)
        end(one)


def test_beside_an_async_job_there_is_one_normal_job(pair: Pair) -> None:
    one, two = pair.one, pair.two
    begin(one, Job.ASYNC)
    begin(two, Job.QUERY)
    with pytest.raises(JobTimeout, match=f"monitor=job of {two.pid}"):
        begin(one, Job.ASYNC_NESTED, "step", "timeout=0.02")
    with pytest.raises(NotOwner, match="nested in an async job"):
        begin(two, Job.ASYNC_NESTED, "step")
    end(two)
    begin(one, Job.ASYNC_NESTED, "step")
    with pytest.raises(JobTimeout, match=f"monitor=step of {one.pid}"):
        begin(two, Job.QUERY)
    with pytest.raises(JobTimeout, match=f"monitor=job of {one.pid}"):
        begin(two, Job.MODIFY)
    end(one, "step")
    end(one)


def test_a_time_out_names_the_holder_and_what_it_does(pair: Pair) -> None:
    one, two = pair.one, pair.two
    begin(one, Job.MODIFY)
    one.tell("job.progress({'done': 7})")
    with pytest.raises(JobTimeout) as failed:
        begin(two, Job.MODIFY, more="timeout=0.02")
    error = failed.value
    assert f"cannot acquire state change lock (held by monitor=job of {one.pid})" in str(error)
    assert "domain 'a'" in str(error) and f"process {one.pid}" in str(error)
    assert error.holder and error.job
    assert (error.holder.pid, error.holder.tid, error.holder.alive) == (one.pid, one.tid, True)
    assert error.holder.command and error.holder.command in str(error)
    assert error.job.operation == f"job of {one.pid}" and error.job.progress["done"] == 7
    assert two.tell("[job.holder.pid for job in dom.jobs]") == [one.pid]
    end(one)


def test_whoever_waits_goes_on_when_the_job_ends(pair: Pair) -> None:
    one, two = pair.one, pair.two
    begin(one, Job.MODIFY)
    two.start("with dom.job('next', timeout=60) as job: seen = job.previous_owner_died\nseen")
    assert two.is_waiting()
    one.tell("with dom: dom.data = 1")  # the waiter holds no lock, and is not confused
    one.tell("job.progress(1)")
    assert two.is_waiting()
    end(one)
    assert two.answer() is None
    assert one.tell("dom.jobs") == ()


def test_a_waiter_that_had_the_domain_locked(pair: Pair) -> None:
    one, two = pair.one, pair.two
    begin(one, Job.MODIFY)
    two.tell("dom.lock()")
    with pytest.raises(JobTimeout):
        begin(two, Job.MODIFY, more="timeout=0.02")
    assert two.tell("dom.is_locked")
    two.start("with dom.job('next', timeout=60): seen = dom.is_locked\nseen, dom.is_locked")
    assert two.is_waiting()
    end(one)
    assert two.answer() == (False, True)
    two.tell("dom.unlock()")


def test_a_job_is_its_threads(pair: Pair) -> None:
    if pair.start not in IN_ONE_PROCESS:
        pytest.skip("a job is not passed on to other processes")
    one = pair.one
    begin(one, Job.MODIFY)
    two = pair.join("job")
    for call in ("job.progress(1)", "job.end()", "job.__exit__(None, None, None)"):
        with pytest.raises(NotOwner, match="another thread's"):
            two.tell(call)
    assert two.tell("job.abort_requested") is False
    end(one)


def test_a_job_is_aborted_by_request(pair: Pair) -> None:
    one, two = pair.one, pair.two
    with pytest.raises(DomainStateError, match="no job is active on domain 'a'"):
        two.tell("dom.abort_job()")
    begin(one, Job.ASYNC)
    begin(one, Job.ASYNC_NESTED, "step")
    assert one.tell("(job.abort_requested, step.abort_requested)") == (False, False)
    two.tell("dom.abort_job(timeout=5)")
    assert one.tell("(job.abort_requested, step.abort_requested)") == (True, True)
    assert two.tell("[job.abort_requested for job in dom.jobs]") == [True, False]
    end(one, "step")
    end(one)
    begin(one, Job.ASYNC, more="timeout=0, allow=[]")
    with pytest.raises(DomainStateError, match="does not allow to abort"):
        two.tell("dom.abort_job()")
    end(one)
    begin(one, Job.MODIFY)
    two.tell("with dom: dom.abort_job()")
    assert one.tell("job.abort_requested") is True
    end(one)


RULES = {
    "undefine": "doms.undefine('a', timeout={})",
    "rename": "doms.rename('a', 'c', timeout={})",
    "define": f"doms.define({xml('a', A, memory=4096)!r}, timeout={{}}); None",
    "remove_inactive": "with doms.locked(): doms.remove_inactive('a', timeout={})",
    "free": "with doms.locked(): doms.free(timeout={})",
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_waits_for_a_job_that_excludes_it(pair: Pair, rule: str) -> None:
    one, two = pair.one, pair.two
    begin(one, Job.MODIFY)
    before = one.tell("doms.peek('a')")
    with pytest.raises(DomainBusy, match=f"monitor=job of {one.pid}.*process {one.pid}") as failed:
        two.tell(RULES[rule].format(0.05))
    assert failed.value.job and failed.value.holder and failed.value.holder.pid == one.pid
    assert one.tell("doms.peek('a')") == before
    assert one.tell("with doms.locked(1), dom: seen = 1\nseen") == 1  # nothing stayed locked
    two.start(RULES[rule].format(60))
    assert two.is_waiting()
    end(one)
    two.answer()
    after = one.tell("doms.peek('a')")
    if rule == "define":
        assert after.definition.memory == 4096
        one.tell("doms.undefine('a')")
    else:
        assert after is None


@pytest.mark.parametrize("rule", RULES)
def test_a_job_that_allows_changes_excludes_no_rule(pair: Pair, rule: str) -> None:
    one, two = pair.one, pair.two
    begin(one, Job.ASYNC, more="allow=[Job.MODIFY]")
    two.tell(RULES[rule].format(0))
    end(one)


def test_the_list_lock_is_not_held_in_a_wait_for_a_job(pair: Pair) -> None:
    """Whoever ends its job may need it."""
    one, two = pair.one, pair.two
    begin(one, Job.MODIFY)
    two.start("doms.undefine('a', timeout=60)")
    assert two.is_waiting()
    one.tell(f"doms.define({xml('c')!r}, timeout=5); doms.rename('a', 'd', timeout=5)")
    end(one)
    with pytest.raises(DomainNotFound):
        two.answer()
    assert one.tell("doms.peek('d') is not None")


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ("with doms.locked(), dom: doms.rename(dom, 'c', timeout=60)", "with the domain locked"),
        ("with doms.locked(): doms.remove_inactive(dom)", "only with a timeout"),
        ("with doms.locked(): doms.undefine('a')", "only with a timeout"),
        ("with doms.locked(): doms.free()", "only with a timeout"),
    ],
)
def test_no_wait_that_could_be_for_ever(pair: Pair, call: str, why: str) -> None:
    begin(pair.one, Job.MODIFY)
    with pytest.raises(DomainBusy, match=why):
        pair.two.tell(call)
    pair.two.tell("mine = doms.job('b', 'mine'); mine.__enter__(); None")
    with pytest.raises(LockOrder, match="give a timeout"):
        pair.two.tell("doms.undefine('a')")
    end(pair.two, "mine")
    end(pair.one)


# --- damage, and no room ------------------------------------------------------------------------


@pytest.fixture
def small() -> Iterator[Any]:
    with shmdomains.DomainList(max_domains=200, max_bytes=4 << 20) as doms:
        doms.define(xml("a", A))
        yield doms
        assert doms.check().problems == []


def fill(doms: Any) -> list[str]:
    """Until there is not room for the smallest definition; the names, the smallest last."""
    names: list[str] = []
    size = 1 << 20
    while size:
        try:
            name = f"f{len(names)}"
            doms.define(definition(name, description="x" * size))
            names.append(name)
        except SegmentFull:
            size //= 2
    return names


def test_a_full_segment_is_a_plain_error(small: Any) -> None:
    dom = small.get("a")
    dom.unlock()
    long = "y" * 255
    with dom.job(long, why=long) as job:
        job.progress(b"x" * 100)
        names = fill(small)
        with pytest.raises(SegmentFull):
            job.progress(b"x" * 4000)
        assert dom.jobs[0].progress == b"x" * 100
        with pytest.raises(SegmentFull):
            dom.abort_job()
        assert not job.abort_requested
    assert dom.jobs == ()  # the end frees, and needs no room
    with pytest.raises(SegmentFull):  # the room that is free now is filled, too
        while True:
            names.append(f"f{len(names)}")
            small.define(definition(names[-1]))
    with pytest.raises(SegmentFull), dom.job(long, why=long):
        pass
    assert dom.jobs == ()
    small.undefine("f0")
    with dom.job(long, why=long):
        assert [one.operation for one in dom.jobs] == [long]
    assert dom.jobs == ()


def test_a_flipped_bit_is_an_error_and_no_other_job(tmp_path: Any) -> None:
    """Each bit of the blob, as it is read without a lock and with one."""
    path = tmp_path / "list.segment"
    with shmdomains.DomainList.create(path=path, max_domains=4) as doms:
        doms.define(xml("a", A))
        dom = doms.get("a")
        dom.unlock()
        with dom.job("the operation", Job.ASYNC, why="because") as job:
            job.progress({"done": 1})
            blob = Work.decode(_committed(doms)).encode()
            content = path.read_bytes()
            assert content.count(blob) == 1
            at = content.index(blob)
            tried = 0
            with open(path, "r+b", buffering=0) as file:
                for number in range(8 * len(blob)):
                    place, bit = at + number // 8, 1 << number % 8
                    os.pwrite(file.fileno(), bytes([content[place] ^ bit]), place)
                    for look in (
                        lambda: doms.peek("a").jobs,
                        lambda: dom.jobs,
                        lambda: _locked(dom),
                    ):
                        with pytest.raises(SegmentCorrupt, match="work under way"):
                            look()
                    os.pwrite(file.fileno(), content[place : place + 1], place)
                    tried += 1
            assert tried == 8 * len(blob)
            assert doms.peek("a").jobs[0].operation == "the operation"


def _committed(doms: Any) -> bytes:
    return bytes(doms.peek("a")._work.encode())


def _locked(dom: Any) -> Any:
    with dom:
        return dom.jobs


def test_threads_take_turns(doms: Any, dom: Any) -> None:
    """Several threads and domains: one excluding job at a time, and nobody starves."""
    running: list[int] = []
    most: list[int] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                with doms.job("a", "turn", timeout=DEADLINE):
                    running.append(1)
                    most.append(len(running))
                    running.pop()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE)
    assert failures == []
    assert len(most) == 80 and set(most) == {1}


def test_the_end_of_a_thread_frees_its_job(doms: Any, dom: Any) -> None:
    kept: list[Any] = []

    def work() -> None:
        job = dom.job("left behind")
        job.__enter__()
        job.progress({"at": 3})
        kept.append(job)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(DEADLINE)
    until(lambda: not dom.jobs[0].holder.alive, "the kernel's thread has ended, too")
    [left] = dom.jobs
    assert left.operation == "left behind"
    with pytest.raises(DomainStateError, match="no job is active"):
        dom.abort_job()
    with dom.job("next", timeout=DEADLINE) as job:
        died = job.previous_owner_died
        assert died and (died.operation, died.progress["at"]) == ("left behind", 3)
        assert not died.holder.alive
        with pytest.raises(NotOwner):
            kept[0].end()
        assert [one.operation for one in dom.jobs] == ["next"]
    with pytest.warns(ResourceWarning, match="'left behind' was dropped"):
        kept.clear()
    with dom.job("after that", timeout=0) as job:
        assert job.previous_owner_died is None


def test_a_job_whose_end_failed_is_ended_later(doms: Any, dom: Any) -> None:
    """Its thread lives on, so nobody else could end it."""
    taken, free = threading.Event(), threading.Event()

    def hold() -> None:
        with doms.get("a"):
            taken.set()
            free.wait(DEADLINE)

    thread = threading.Thread(target=hold)
    job = doms.job("a", "migrate")
    job.__enter__()
    thread.start()
    taken.wait(DEADLINE)
    with pytest.warns(ResourceWarning, match="was dropped while it was held"):
        del job
        gc.collect()
    assert [one.operation for one in doms["a"].jobs] == ["migrate"]
    free.set()
    thread.join()
    until(lambda: doms["a"].jobs == (), "it was ended")
