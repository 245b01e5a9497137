"""The holder of a job dies, forks or becomes another program: who has the job then, and who waits.

What a death leaves at each store of a job's beginning, progress and end, test_crash_points.py shows
("a job", "an async job"). Here are living and dead holders together: a waiter goes on within one
slice, a storm of jobs with kills never has two jobs at once that exclude each other, and in the end
everything is free.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import SOAK, environment
from killing import DEADLINE, Child, Pipe, fork, xml

from shmdomains import DomainBusy, DomainList, Job, JobInfo, JobTimeout, NotOwner, preload

pytestmark = pytest.mark.usefixtures("nothing_left")

KINDS = pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
NAMES = ["a", "b", "c"]
KILLS = 400 if SOAK else 40
WORKERS = 4


def make(lock: Any) -> DomainList:
    doms = DomainList(max_domains=8, lock=lock)
    for name in NAMES:
        doms.define(xml(name))
    return doms


def alone(start: Callable[..., Child], function: Callable[..., Any], *arguments: Any) -> Any:
    """What it says, in a process of its own that may fork."""
    return start(function, *arguments).hear(12 * DEADLINE)


# --- a death ------------------------------------------------------------------------------------


def hold(pipe: Pipe, doms: DomainList, kind: Job) -> None:
    with doms.job("a", "long work", kind) as job:
        job.progress({"step": 3})
        pipe.say("begun")
        pipe.rest()


def wait_for_job(pipe: Pipe, doms: DomainList, kind: Job) -> None:
    """Begin a job, and tell when each sleep of the wait began."""
    began: list[float] = []

    class Counted(type(doms)):  # type: ignore[misc]
        def _sleep(self, *arguments: Any) -> bool:
            began.append(time.monotonic())
            if len(began) == 1:
                pipe.say("waits")
            return bool(super()._sleep(*arguments))

    doms.__class__ = Counted
    with doms.job("a", "next", kind, timeout=DEADLINE) as job:
        pipe.say((began[-1], job.previous_owner_died, len(job.replaced)))


def death(pipe: Pipe, lock: str, held: Job, wanted: Job) -> None:
    doms = make(lock)
    holder = fork(hold, doms, held)
    assert holder.hear() == "begun"
    waiter = fork(wait_for_job, doms, wanted)
    assert waiter.hear() == "waits"
    holder.kill()
    dead = time.monotonic()
    last, died, count = waiter.hear()
    waiter.join()
    left = doms.peek("a")
    assert left is not None
    pipe.say((dead - last, died, count, left.jobs))
    holder.close(), waiter.close()


@KINDS
@pytest.mark.parametrize(
    ("held", "wanted"),
    [(Job.MODIFY, Job.QUERY), (Job.QUERY, Job.ASYNC), (Job.ASYNC, Job.MODIFY)],
)
def test_a_waiter_goes_on_within_one_slice(
    start: Callable[..., Child], lock: str, held: Job, wanted: Job
) -> None:
    """No sleep begins after the death: the one that it fell into was the last, and a sleep is a
    slice at most."""
    before, died, count, left = alone(start, death, lock, held, wanted)
    assert before >= 0
    assert isinstance(died, JobInfo) and count == 1
    assert (died.operation, died.kind, dict(died.progress)) == ("long work", held, {"step": 3})
    assert not died.holder.alive and died.holder.command
    assert left == ()


def two_deaths(pipe: Pipe, lock: str) -> None:
    """An async job and one beside it; then whoever came to clean up."""
    doms = make(lock)
    holders = [fork(hold, doms, kind) for kind in (Job.ASYNC,)]
    assert holders[0].hear() == "begun"
    holders.append(fork(hold, doms, Job.QUERY))
    assert holders[1].hear() == "begun"
    for holder in holders:
        holder.kill()
    told = []
    with doms.job("a", "look", Job.QUERY, timeout=0) as job:
        # The async job's death is not this one's to clean up: it would have run beside it.
        told.append([one.kind for one in job.replaced])
        info = doms.peek("a")
        assert info is not None
        told.append([(one.operation, one.holder.alive) for one in info.jobs])
    cleaner = fork(hold, doms, Job.MODIFY)
    assert cleaner.hear() == "begun"
    cleaner.kill()
    with doms.job("a", "clean", Job.MODIFY, timeout=0) as job:
        told.append([one.kind for one in job.replaced])
    with doms.job("a", "go on", Job.MODIFY, timeout=0) as job:
        told.append([one.kind for one in job.replaced])
    pipe.say(told)
    for one in (*holders, cleaner):
        one.close()


@KINDS
def test_a_death_is_told_until_somebody_has_cleaned_up(
    start: Callable[..., Child], lock: str
) -> None:
    assert alone(start, two_deaths, lock) == [
        [Job.QUERY],
        [("long work", False), ("look", True)],
        [Job.MODIFY, Job.ASYNC],
        [],
    ]


def many_deaths(pipe: Pipe, lock: str) -> None:
    doms = make(lock)
    for _ in range(6):
        child = fork(hold, doms, Job.MODIFY)
        assert child.hear() == "begun"
        child.kill()
        child.close()
    info = doms.peek("a")
    assert info is not None
    with doms.job("a", "clean", timeout=0) as job:
        pipe.say((len(info.jobs), len(job.replaced)))


@KINDS
def test_what_is_told_of_the_dead_is_bounded(start: Callable[..., Child], lock: str) -> None:
    assert alone(start, many_deaths, lock) == (1, 4)


def rules_after_a_death(pipe: Pipe, lock: str) -> None:
    doms = make(lock)
    child = fork(hold, doms, Job.MODIFY)
    assert child.hear() == "begun"
    try:
        doms.undefine("a", timeout=0)
    except DomainBusy:
        pipe.say("busy")
    child.kill()
    doms.rename("a", "d", timeout=0)
    doms.define(xml("d", memory=4096), timeout=0)
    doms.undefine("d", timeout=0)
    pipe.say(len(doms))
    child.close()


@KINDS
def test_a_dead_holders_job_excludes_no_rule(start: Callable[..., Child], lock: str) -> None:
    child = start(rules_after_a_death, lock)
    assert child.hear() == "busy"
    assert child.hear() == len(NAMES) - 1


# --- fork, exec ---------------------------------------------------------------------------------


def fork_in_a_job(pipe: Pipe, lock: str) -> None:
    doms = make(lock)
    dom = doms.get("a")
    dom.unlock()
    with dom.job("the parent's") as job:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                with suppress(NotOwner):
                    job.progress(1)
                    os._exit(2)
                with suppress(NotOwner):
                    job.end()
                    os._exit(3)
                job.__exit__(None, None, None)  # as the child's own end of the block does
                job.__del__()
                with suppress(JobTimeout), dom.job("the child's", timeout=0):
                    os._exit(4)
                with doms.job("b", "the child's"):  # it holds no other job, so it may wait
                    status = 0
            finally:
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        pipe.say((code, [one.operation for one in dom.jobs], dom.jobs[0].holder.alive))


@KINDS
def test_a_forked_child_holds_none_of_its_parents_jobs(
    start: Callable[..., Child], lock: str
) -> None:
    assert alone(start, fork_in_a_job, lock) == (0, ["the parent's"], True)


AFTER_EXEC = """
import sys
from shmdomains import DomainList
doms = DomainList.attach(path=sys.argv[1])
with doms.job("a", "next", timeout=0) as job:
    print(job.previous_owner_died.operation, job.previous_owner_died.holder.pid)
"""


def exec_in_a_job(pipe: Pipe, path: str, output: int) -> None:
    with DomainList.attach(path=path) as doms, doms.job("a", "before"):
        os.dup2(output, 1)
        os.execve(sys.executable, [sys.executable, "-c", AFTER_EXEC, path], environment())


def run_exec(pipe: Pipe, path: str) -> None:
    ours, theirs = os.pipe()
    child = fork(exec_in_a_job, path, theirs)
    os.close(theirs)
    with open(ours) as said:
        pipe.say((said.read().split(), child.pid))
    child.join()
    child.close()


def test_a_program_has_none_of_the_former_programs_jobs(
    start: Callable[..., Child], path: str
) -> None:
    """Same process, same thread, same start; it knows nothing of the job."""
    with DomainList.create(path=path, max_domains=8) as doms:
        doms.define(xml("a"))
        said, pid = alone(start, run_exec, path)
        assert said == ["before", str(pid)]
        assert doms["a"].jobs == ()


# --- a storm ------------------------------------------------------------------------------------


class Violation(AssertionError):
    """Two jobs at once that exclude each other."""


@contextmanager
def exclusive(folder: Path, *names: str) -> Iterator[None]:
    """Locks that the kernel frees with the process: whoever has the job finds them free."""
    files = []
    try:
        for name in names:
            files.append(os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600))
            try:
                fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Violation(f"somebody else is in {name}") from None
        yield
    finally:
        for file in files:
            os.close(file)


class Counts:
    """Jobs done and deaths seen, which outlive the worker of each place."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)

    def add(self, at: int, *more: int) -> None:
        sums = (old + new for old, new in zip(self.of(at), more, strict=True))
        self._shared[16 * at : 16 * at + 16] = struct.pack("2Q", *sums)

    def of(self, at: int) -> tuple[int, ...]:
        return struct.unpack_from("2Q", self._shared, 16 * at)


def work(pipe: Pipe, doms: DomainList, folder: Path, counts: Counts, at: int, seed: float) -> None:
    """Jobs of all kinds on all domains until told to stop."""
    rng = random.Random(seed)
    done = 0
    while not pipe.conn.poll():
        name = rng.choice(NAMES)
        kind = rng.choice([Job.MODIFY, Job.MODIFY, Job.QUERY, Job.ASYNC])
        with doms.job(name, f"{kind.words} {done}", kind, timeout=6 * DEADLINE) as job:
            counts.add(at, 0, len(job.replaced))
            if kind is Job.ASYNC:
                with exclusive(folder, f"{name}-async", f"{name}-change"):
                    job.progress({"done": done})
                    with (
                        doms.job(name, "step", Job.ASYNC_NESTED, timeout=6 * DEADLINE),
                        exclusive(folder, f"{name}-normal"),
                        doms.get(name) as dom,
                    ):
                        dom.data = done
            else:
                beside = [f"{name}-change"] if kind is Job.MODIFY else []
                with exclusive(folder, f"{name}-normal", *beside):
                    job.progress({"done": done})
                    with doms.get(name) as dom:
                        dom.data = done
        done += 1
        counts.add(at, 1, 0)
    pipe.say("done")


def storm(pipe: Pipe, lock: str, folder: str, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    doms = make(lock)
    counts = Counts()
    preload()  # once for all workers, which would be killed in their imports

    def begin(at: int) -> Child:
        return fork(work, doms, Path(folder), counts, at, rng.random())

    workers = [begin(at) for at in range(WORKERS)]
    for _ in range(kills):
        time.sleep(rng.random() * 0.02)  # when the kill comes; nothing depends on it
        at = rng.randrange(WORKERS)
        assert workers[at].is_alive(), workers[at].hear()
        workers[at].kill()
        workers[at].close()
        workers[at] = begin(at)
    # It ends quietly: half of them are killed at once, the others have to finish what they do.
    for worker in workers[: WORKERS // 2]:
        worker.signal(signal.SIGKILL)
    for worker in workers[WORKERS // 2 :]:
        assert worker.ask(timeout=6 * DEADLINE) == "done"
    for worker in workers:
        worker.join()
        worker.close()
    for name in NAMES:
        with doms.job(name, "all of it", Job.ASYNC, timeout=0, allow=[]) as job:
            counts.add(WORKERS, 0, len(job.replaced))
    done, deaths = map(sum, zip(*map(counts.of, range(WORKERS + 1)), strict=True))
    problems = doms.check().problems
    left = [info.jobs for info in doms]
    pipe.say((done, deaths, problems, left))


@pytest.mark.soak
@KINDS
@pytest.mark.timeout(600)
def test_a_storm_of_jobs_with_kills(
    start: Callable[..., Child], tmp_path: Path, lock: str, tried: Callable[[str, int], None]
) -> None:
    child = start(storm, lock, str(tmp_path), KILLS, 7)
    done, deaths, problems, left = child.hear(60 * DEADLINE)
    print(f"{lock}: {KILLS} kills, {done} jobs, {deaths} deaths seen")
    assert problems == [] and left == [()] * len(NAMES)
    assert done > KILLS and deaths > 0
    tried("workers killed in a storm of jobs", KILLS + WORKERS // 2)
