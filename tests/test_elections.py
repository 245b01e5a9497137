"""Elections: one leader at a time, the next one when it ends, however it ends."""

from __future__ import annotations

import gc
import itertools
import logging
import mmap
import os
import random
import signal
import statistics
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import EVERY_STORE, FEW_MUTEXES, SOAK, Store, environment
from killing import DEADLINE, Child, Pipe, until

import shmdomains
from shmdomains import DomainList, LockTimeout, TooManyMutexes

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def doms(request: pytest.FixtureRequest) -> Iterator[Any]:
    store: Store = request.param
    doms = store.make()
    yield doms
    if not doms.closed:
        assert doms.check().problems == []
        doms.close()


class Job:
    """Notes that it began, and goes on until it is told to stop."""

    def __init__(self) -> None:
        self.began, self.ended = threading.Event(), threading.Event()

    def __call__(self, stop: threading.Event) -> None:
        self.began.set()
        stop.wait()
        self.ended.set()


# --- one process -------------------------------------------------------------------------------


def test_there_is_one_leader_and_the_next_one_follows(doms: Any) -> None:
    jobs = [Job(), Job(), Job()]
    first = doms.elect("scheduler", jobs[0])
    assert jobs[0].began.wait(DEADLINE)
    others = [doms.elect("scheduler", job) for job in jobs[1:]]
    assert first.leader and first.running and first.name == "scheduler"
    assert [one.leader for one in others] == [False, False]
    with pytest.raises(LockTimeout):
        doms.mutex("scheduler").lock(0.05)  # and nobody begins meanwhile
    assert not any(job.began.is_set() for job in jobs[1:])
    first.stop()
    assert jobs[0].ended.is_set() and not first.leader and not first.running
    until(lambda: any(one.leader for one in others), "another one leads")
    assert sum(one.leader for one in others) == 1
    for one in others:
        one.stop()
    assert doms.mutex("scheduler").try_lock()
    assert repr(first) == "<Election 'scheduler' over>"


def test_a_block(doms: Any) -> None:
    job = Job()
    with doms.elect("a", job) as election:
        assert job.began.wait(DEADLINE)
        assert repr(election) == "<Election 'a' leads>"
    assert job.ended.is_set() and not election.running


def test_who_waits_can_be_stopped(doms: Any) -> None:
    mutex = doms.mutex("a")
    with mutex:
        job = Job()
        election = doms.elect("a", job)
        assert repr(election) == "<Election 'a' waits>"
        election.stop(DEADLINE)
        assert not election.running
    assert not job.began.is_set()


def test_run_returns_and_others_go_on(doms: Any) -> None:
    calls = []
    first = doms.elect("a", calls.append)
    until(lambda: not first.running, "it is over")
    assert len(calls) == 1 and not calls[0].is_set()
    with doms.elect("a", job := Job()):
        assert job.began.wait(DEADLINE)
    assert len(calls) == 1


def test_run_raises_and_others_come_first(doms: Any, caplog: pytest.LogCaptureFixture) -> None:
    failed = threading.Event()
    times: list[float] = []

    def fail(stop: threading.Event) -> None:
        times.append(time.monotonic())
        failed.set()
        raise RuntimeError("the scheduler is broken")

    with caplog.at_level(logging.ERROR):
        election = doms.elect("a", fail, retry_after=0.2)
        assert failed.wait(DEADLINE)
        until(lambda: "the scheduler is broken" in caplog.text, "it is logged")
        assert "leader of election 'a' failed" in caplog.text
        assert election.running
        job = Job()
        with doms.elect("a", job):
            assert job.began.wait(DEADLINE)
        until(lambda: len(times) >= 4, "it is tried again, and again")
        election.stop()
    pauses = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert pauses[0] >= 0.2 and pauses[1] >= 0.4 and pauses[2] >= 0.8  # no busy loop


def test_a_closed_list_tells_run_to_stop(doms: Any) -> None:
    job, other = Job(), Job()
    first = doms.elect("a", job)
    assert job.began.wait(DEADLINE)
    second = doms.elect("a", other)
    doms.close()
    assert job.ended.wait(DEADLINE)
    for one in (first, second):
        one.stop(DEADLINE)
    assert not other.began.is_set()


def test_stop_does_not_wait_for_ever(doms: Any) -> None:
    job, go = threading.Event(), threading.Event()

    def stubborn(stop: threading.Event) -> None:
        job.set()
        assert go.wait(DEADLINE)

    election = doms.elect("a", stubborn)
    assert job.wait(DEADLINE)
    with pytest.raises(LockTimeout, match="run\\(\\) was told to stop"):
        election.stop(0.05)
    assert election.leader and not doms.mutex("a").try_lock()
    go.set()
    election.stop(DEADLINE)
    assert not election.leader


def test_run_may_stop_its_own_election(doms: Any) -> None:
    box: list[Any] = []
    there = threading.Event()

    def run(stop: threading.Event) -> None:
        assert there.wait(DEADLINE)
        box[0].stop()
        assert stop.is_set()

    box.append(doms.elect("a", run))
    there.set()
    box[0].stop(DEADLINE)
    assert not box[0].running


def test_what_is_wrong_is_said_at_once(doms: Any) -> None:
    with pytest.raises(ValueError):
        doms.elect("", Job())
    for bad in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="retry_after"):
            doms.elect("a", Job(), retry_after=bad)
    exec(FEW_MUTEXES)
    for i in range(63):
        doms.mutex(f"lock {i}")
    with pytest.raises(TooManyMutexes):
        doms.elect("one more", Job())


class CtrlC(KeyboardInterrupt):
    """Ours, and nobody else's."""


def test_ctrl_c_as_it_begins_leaves_no_candidate(doms: Any, request: pytest.FixtureRequest) -> None:
    """Wherever the interpreter looks at signals in our own code, or as what this calls returns;
    `threading` itself is not proof against it everywhere."""
    package = os.path.dirname(shmdomains.__file__)

    def ours(frame: Any) -> bool:
        if frame is None or not str(frame.f_code.co_filename).startswith(package):
            return False
        return frame.f_code.co_name != "__del__"  # nothing gets out of there

    gc.collect()  # what other tests left ends in code of ours, too
    gc.disable()
    request.addfinalizer(gc.enable)
    for at in range(1, 100):
        seen = 0

        def point(frame: Any, event: str, what: Any, at: int = at) -> None:
            nonlocal seen
            inside = event in ("call", "c_return") and ours(frame)
            if inside or (event == "return" and not ours(frame) and ours(frame.f_back)):
                seen += 1
                if seen == at:
                    raise CtrlC

        election = None
        try:
            sys.setprofile(point)
            election = doms.elect("a", Job())
        except CtrlC:
            pass
        finally:
            sys.setprofile(None)
        if election is not None:
            break
        until(lambda: not candidates(), "nobody takes part")
    assert election is not None and at > 5
    election.stop()
    assert not candidates()


def candidates() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("shmdomains-elect")]


# --- processes ---------------------------------------------------------------------------------


@pytest.fixture
def segment(segment_dir: Path) -> Iterator[str]:
    path = str(segment_dir / "list.segment")
    with DomainList.create(path=path, max_domains=8) as doms:
        yield path
        assert doms.check().problems == []


def candidate(pipe: Pipe, path: str) -> None:
    """Says when it leads, until it is killed, or asked who died before it led. Where it may, it
    takes precedence over whatever else is at work on this machine."""
    doms = DomainList.attach(path=path)
    hurries = False
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        hurries = True
    ready = threading.Event()

    def run(stop: threading.Event) -> None:
        began = time.monotonic()
        ready.wait()
        pipe.say(began)
        stop.wait()

    election = doms.elect("scheduler", run)
    pipe.say(hurries)
    ready.set()
    pipe.listen()
    died = election.previous_owner_died
    election.stop()
    pipe.say(None if died is None else died.pid)
    pipe.rest()


def test_a_fork_takes_no_part(segment: str) -> None:
    doms = DomainList.attach(path=segment)
    job = Job()
    with doms.elect("a", job) as election:
        assert job.began.wait(DEADLINE)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                assert not election.leader and not election.running
                election.stop()  # neither waits nor stops the parent's
                doms.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert election.leader and not job.ended.is_set()
    doms.close()


def test_at_the_end_of_the_interpreter(segment: str) -> None:
    """The lock is left in order, so nobody is told of a death."""
    program = f"""
        import threading
        from shmdomains import DomainList
        doms = DomainList.attach(path={segment!r})
        began = threading.Event()
        def run(stop):
            began.set()
            stop.wait()
        doms.elect("a", run)
        waits = doms.elect("a", run)
        began.wait()
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment(),
        check=True,
        timeout=DEADLINE,
    )
    with DomainList.attach(path=segment) as doms, doms.mutex("a", 0) as held:
        assert held.previous_owner_died is None


MOVES = 200 if SOAK else 40


@pytest.mark.soak
def test_it_moves_when_the_leader_is_killed(
    segment: str, start: Callable[..., Child], tried: Callable[[str, int], None]
) -> None:

    hurry: set[bool] = set()

    def one_more() -> Child:
        child = start(candidate, segment)
        hurry.add(child.hear())
        return child

    waiting = [one_more() for _ in range(3)]
    took = []

    def leads() -> tuple[Child, float]:
        """Whoever says so next."""
        said: list[tuple[Child, float]] = []

        def heard() -> bool:
            said.extend((one, one.hear()) for one in waiting if one.conn.poll())
            return bool(said)

        until(heard, "somebody leads")
        assert len(said) == 1, "two of them lead"
        return said[0]

    leader, _ = leads()
    for _ in range(MOVES):
        waiting.remove(leader)
        waiting.append(one_more())
        killed = time.monotonic()
        leader.signal(signal.SIGKILL)
        pid = leader.pid
        after = leader
        leader, began = leads()
        took.append(began - killed)
        after.close()
    assert leader.ask() == pid  # it was told who died
    for one in waiting:
        one.close()
    took.sort()
    tried("leaders that were killed, and followed", MOVES)
    median, worst = statistics.median(took) * 1000, took[-1] * 1000
    tried("microseconds until the next one led, at the median", round(median * 1000))
    print(f"the next leader: {median:.3f} ms at the median, {worst:.3f} ms at most")
    assert median < (1 if hurry == {True} else 1000 * DEADLINE)


TERM = 0


def term(pipe: Pipe, path: str, counts: str, seed: int) -> None:
    """Whoever leads counts its term, and looks again and again that no other one began."""
    doms = DomainList.attach(path=path)
    rng = random.Random(seed)
    with open(counts, "r+b") as file:
        # Not struct.pack_into: it clears the bytes first, and a kill may come in between.
        memory = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")

    def run(stop: threading.Event) -> None:
        mine = memory[TERM] + 1
        memory[TERM] = mine
        for _ in range(rng.randrange(1, 3000)):
            if memory[TERM] != mine:
                pipe.say("two leaders at once")
        if rng.random() < 0.3:
            raise RuntimeError("a bad term")
        if rng.random() < 0.5:
            stop.wait(0.02)
        if rng.random() < 0.3:
            stop.wait()

    logging.disable()
    pipe.say("ready")
    while True:
        with doms.elect("scheduler", run, retry_after=0.001) as election:
            if pipe.conn.poll(rng.random() * 0.02):
                break
        assert not election.running
    last = threading.Event()
    with doms.elect("scheduler", lambda stop: last.set()):
        assert last.wait(DEADLINE)
    pipe.say("done")
    pipe.rest()


@pytest.mark.soak
def test_never_two_leaders(
    segment: str, tmp_path: Path, start: Callable[..., Child], tried: Callable[[str, int], None]
) -> None:
    """Candidates come, go, fail and are killed; the survivors each lead once more."""
    counts = tmp_path / "counts"
    counts.write_bytes(bytes(16))
    rng = random.Random(12)
    terms = 0
    for turn in range(20 if SOAK else 4):
        workers = [start(term, segment, str(counts), 100 * turn + i) for i in range(6)]
        for worker in workers:
            assert worker.hear() == "ready"
        for victim in workers[:4]:
            time.sleep(rng.random() * 0.1)  # when the kill comes
            victim.kill()
        for survivor in workers[4:]:
            survivor.tell()
        for survivor in workers[4:]:
            assert survivor.hear() == "done"
            assert not survivor.conn.poll()
        for victim in workers[:4]:
            assert not victim.conn.poll() or "two" not in str(_last_word(victim))
        for worker in workers:
            worker.close()
        terms = struct.unpack("QQ", counts.read_bytes())[0]
    assert terms > 10
    tried("terms of leaders, never two at once", terms)


def _last_word(child: Child) -> object:
    try:
        return child.hear()
    except AssertionError:  # it died
        return None
