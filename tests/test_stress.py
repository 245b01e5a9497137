"""The stress run itself: it succeeds with every start method and lock kind, and it can fail.

A proof that never fails proves nothing, so each finding is made to fail: by workers that cheat
(patched before they are forked), or by tampering with the list between the storm and the proof.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import popen_fork, popen_spawn_posix
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from helpers import SOAK
from rich.console import Console

from shmdomains import CheckReport, Domain, DomainDef, DomainList
from shmdomains.stress import proof as stress_proof
from shmdomains.stress import storm as stress
from shmdomains.stress.journal import (
    Intent,
    Journal,
    Kind,
    Mark,
    Plan,
    Word,
    Wrong,
    bucket_of,
    description_of,
    duration_of,
    separator_for,
    settle,
    verify,
)
from shmdomains.stress.worker import Worker

SAMPLES = Path(__file__).parent / "data" / "domains"
XML = """<domain type='kvm'><name>{}</name><uuid>{}</uuid><memory>1024</memory>
<os><type>hvm</type></os></domain>"""


def run(directory: Path = SAMPLES, seconds: float = 0.15, **options: Any) -> tuple[int, str]:
    """(exit status, all that was printed, in one line)."""
    console = Console(file=io.StringIO(), width=200)
    options.setdefault("workers", 3)
    status = stress.run(directory, seconds=seconds, console=console, **options)
    assert isinstance(console.file, io.StringIO)
    return status, " ".join(console.file.getvalue().split())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"vm{number}.xml").write_text(XML.format(f"vm{number}", UUID(int=number + 1)))
    return tmp_path


# --- it succeeds ----------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [False, True], ids=["quiet", "kill"])
@pytest.mark.parametrize("lock", ["robust", "multiprocessing"])
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_everything_holds(start: str, lock: str, kill: bool) -> None:
    status, text = run(seconds=1, start=start, lock=lock, kill=kill)
    assert status == 0, text
    assert "✗" not in text
    assert text.count("✓") + text.count("~") == 8
    (changes,) = re.findall(r"no other: ([\d,]+) changes", text)
    assert int(changes.replace(",", "")) > 0
    if kill:
        assert int(re.findall(r"([\d,]+) kills, [\d,]+ recoveries", text)[-1]) >= 2


def test_clones_fill_the_list_up() -> None:
    status, text = run(domains=2500)
    assert status == 0, text
    loaded = len(list(SAMPLES.glob("*.xml")))
    assert f"{loaded} loaded, {2500 - loaded:,} cloned" in text


def test_one_worker_and_one_domain(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(XML.format("a", UUID(int=1)))
    status, text = run(tmp_path, workers=1, kill=True)
    assert status == 0, text


def test_the_directory_is_only_read(directory: Path) -> None:
    (directory / "autostart").mkdir()
    (directory / "autostart" / "vm1.xml").symlink_to(directory / "vm1.xml")

    def state() -> list[tuple[str, int, bytes]]:
        return [
            (str(path), path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in sorted([directory, *directory.rglob("*")])
        ]

    before = state()
    status, text = run(directory, kill=True)
    assert status == 0, text
    assert state() == before


def test_nothing_is_left() -> None:
    run(seconds=0.1)
    gc.collect()
    files, children = os.listdir("/proc/self/fd"), psutil.Process().children()
    run(seconds=0.1, kill=True)
    run(seconds=0.1, lock="multiprocessing")
    gc.collect()
    assert os.listdir("/proc/self/fd") == files
    assert psutil.Process().children() == children


def test_bad_files_are_named_and_do_not_stop_it(directory: Path) -> None:
    (directory / "bad.xml").write_text("<domain type='kvm'><name>bad</name>")
    status, text = run(directory)
    assert status == 0, text
    assert "not loaded:" in text and "bad.xml" in text


def test_nothing_to_load(tmp_path: Path) -> None:
    status, text = run(tmp_path)
    assert status == 1 and "no *.xml file" in text
    (tmp_path / "bad.xml").write_text("<network/>")
    status, text = run(tmp_path)
    assert status == 1 and "could be loaded" in text


def test_more_locks_than_a_process_can_map() -> None:
    status, text = run(lock="multiprocessing", domains=200_000)
    assert status == 1 and "max_map_count" in text


@pytest.mark.parametrize("options", [{"workers": 0}, {"seconds": 0}, {"domains": -1}])
def test_bad_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        run(**options)


# --- it fails: the list was tampered with ---------------------------------------------------


Tamper = Callable[[DomainList, Journal, Plan], None]


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tamper], None]:
    """Have something done between the storm and the proof."""

    def patch(tamper: Tamper) -> None:
        prove = stress_proof.prove

        def proving(doms: DomainList, journal: Journal, plan: Plan, *args: Any) -> Any:
            tamper(doms, journal, plan)
            return prove(doms, journal, plan, *args)

        monkeypatch.setattr(stress_proof, "prove", proving)

    return patch


def failing(text: str) -> list[str]:
    return re.findall(r"✗ ([a-z ,]+)", text)


def rewrite(dom: Domain, change: int) -> None:
    """Take back what worker 0 did to a domain, consistently."""
    count, following, state, reason, id, by = dom.data
    count += change
    dom.data = [count, following, state, reason, id, [by[0] + change, *by[1:]]]
    dom.definition = dom.definition.replace(description=description_of(count))


@pytest.mark.parametrize("change", [-1, 1], ids=["lost", "too many"])
def test_a_lost_change(directory: Path, tampered: Any, change: int) -> None:
    def tamper(doms: DomainList, journal: Journal, plan: Plan) -> None:
        with doms.get(uuid=plan.uuid_of(1)) as dom:
            rewrite(dom, change)

    tampered(tamper)
    status, text = run(directory)
    assert status == 1
    assert [claim.strip() for claim in failing(text)] == [
        "every acknowledged change is there, and no other"
    ]
    assert "'vm1' has" in text


@pytest.mark.parametrize("what", ["data", "definition", "state", "next_definition"])
def test_a_torn_record(directory: Path, tampered: Any, what: str) -> None:
    def tamper(doms: DomainList, journal: Journal, plan: Plan) -> None:
        with doms.get(uuid=plan.uuid_of(1)) as dom:
            if what == "data":
                count, *rest = dom.data
                dom.data = [count + 1, *rest]
            elif what == "definition":
                dom.definition = dom.definition.replace(description=description_of(1_000_000))
            elif what == "state":
                dom.set_state(6)
            else:
                dom.next_definition = dom.definition.replace(description="a stranger's")

    tampered(tamper)
    status, text = run(directory)
    assert status == 1
    assert [claim.strip() for claim in failing(text)] == ["no record is torn"]
    assert "torn: domain 'vm1'" in text


def test_a_missing_domain(directory: Path, tampered: Any) -> None:
    def tamper(doms: DomainList, journal: Journal, plan: Plan) -> None:
        with doms.locked():
            dom = doms.find_by_uuid(plan.uuid_of(1))
            doms._remove(dom)

    tampered(tamper)
    status, text = run(directory)
    assert status == 1
    assert [claim.strip() for claim in failing(text)] == ["exactly the domains exist that should"]
    assert "'vm1' 00000000-0000-0000-0000-000000000002 is missing" in text


def test_a_stranger_and_a_wrong_name(directory: Path, tampered: Any) -> None:
    def tamper(doms: DomainList, journal: Journal, plan: Plan) -> None:
        doms.define(XML.format("stranger", UUID(int=99)))
        with doms.locked(), doms.find_by_uuid(plan.uuid_of(1)) as dom:
            doms._rename(dom, "other", dom.definition.replace(name="other").encode(), None)

    tampered(tamper)
    status, text = run(directory)
    assert status == 1
    assert "'stranger' 00000000-0000-0000-0000-000000000063 should not exist" in text
    assert "'vm1' 00000000-0000-0000-0000-000000000002 is called 'other'" in text


def test_an_index_that_leads_nowhere(
    directory: Path, tampered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tamper(doms: DomainList, journal: Journal, plan: Plan) -> None:
        peek = DomainList.peek

        def peeking(self: DomainList, **key: Any) -> Any:
            return None if key.get("name") == "vm1" else peek(self, **key)

        monkeypatch.setattr(DomainList, "peek", peeking, raising=False)

    tampered(tamper)
    status, text = run(directory)
    assert status == 1
    assert [c.strip() for c in failing(text)] == ["names, uuids and ids lead to the same domains"]


def test_an_id_given_out_twice(directory: Path, tampered: Any) -> None:
    def tamper(doms: DomainList, journal: Journal, plan: Plan) -> None:
        page = next(page for page in journal.pages if page.words[Word.IDS])
        page.log_id(page.ids[0])

    tampered(tamper)
    status, text = run(directory)
    assert status == 1
    assert [claim.strip() for claim in failing(text)] == ["no id was given out twice"]


def test_an_invariant_that_does_not_hold(
    directory: Path, tampered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tamper(doms: DomainList, journal: Journal, plan: Plan) -> None:
        report = CheckReport([("I2", "two extents overlap")], {})
        monkeypatch.setattr(DomainList, "check", lambda *args: report)

    tampered(tamper)
    status, text = run(directory)
    assert status == 1 and "I2: two extents overlap" in text


@contextmanager
def held_elsewhere(take: Callable[[], Any]) -> Iterator[None]:
    """Another thread of this process holds something for the length of the block."""
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with take():
            taken.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(30)
    yield
    done.set()
    thread.join()


@pytest.mark.parametrize("what", ["domain", "list"])
def test_a_lock_that_stays(directory: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    prove = stress_proof.prove

    def proving(doms: DomainList, journal: Journal, plan: Plan, *args: Any) -> Any:
        take: Callable[[], Any] = doms.locked
        if what == "domain":
            take = lambda: doms.get(uuid=plan.uuid_of(1))  # noqa: E731
        with held_elsewhere(take):
            return prove(doms, journal, plan, *args)

    monkeypatch.setattr(stress_proof, "prove", proving)
    monkeypatch.setattr(stress, "PROOF_TIMEOUT", 0.1)
    status, text = run(directory)
    assert status == 1
    assert "nothing stays locked" in failing(text)[0]
    assert f"held by process {os.getpid()}" in text


@pytest.mark.parametrize("which", ["domain", "list"])
def test_what_a_death_beside_a_semaphore_leaves_holds_nobody_up(
    directory: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    gather = stress._Storm._gather

    def gathering(storm: stress._Storm) -> None:
        gather(storm)
        list_lock, slot_locks = storm._doms._locks
        (list_lock if which == "list" else slot_locks[0]).acquire()

    monkeypatch.setattr(stress._Storm, "_gather", gathering)
    status, text = run(directory, lock="multiprocessing", kill=True, seconds=1)
    assert status == 0, text
    assert "✓ nothing stays locked" in text


# --- it fails: workers cheat, fail or hang ---------------------------------------------------


def test_a_worker_that_loses_a_change(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(self: Worker, dom: Domain, target: int, how: Any = None) -> None:
        self._prepare(dom, dom, target, how or self._touch)
        if self._random.random() < 0.1:
            dom.rollback()
        dom.unlock()
        self._acknowledge(target)

    monkeypatch.setattr(Worker, "_change", change)
    status, text = run(directory)
    assert status == 1
    assert re.search(r"lost: domain '.*' has \d+ changes by worker \d, which had \d+ ack", text)


def test_a_worker_that_tears_a_record(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(self: Worker, dom: Domain, mark: Mark) -> Mark:
        dom.set_state(6)
        return mark

    monkeypatch.setattr(Worker, "_touch", touch)
    status, text = run(directory)
    assert status == 1 and "torn: domain" in text


def test_a_define_that_was_acknowledged_and_not_done(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = multiprocessing.get_context("fork").Event()
    monkeypatch.setattr(DomainList, "define", lambda *args: asked.set())
    blow = stress._Storm._blow

    def blow_until_asked(storm: stress._Storm, seconds: float, show: Any) -> None:
        while not asked.is_set():
            blow(storm, seconds, show)
            seconds += 0.15

    monkeypatch.setattr(stress._Storm, "_blow", blow_until_asked)
    status, text = run(directory)
    assert status == 1
    assert "is missing" in text or "lost: " in text


def test_an_exception_is_told_in_one_line(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(self: Worker, dom: Domain, mark: Mark) -> Mark:
        raise RuntimeError("the roof\nis on fire")

    monkeypatch.setattr(Worker, "_touch", touch)
    status, text = run(directory)
    assert status == 1
    assert re.search(
        r"worker \d \(process \d+\): RuntimeError: the roof is on fire "
        r"\(at test_stress.py:\d+ touch < worker.py:\d+ _prepare",
        text,
    )
    assert "✓ every acknowledged change" in text  # it failed in order: nothing was lost


def test_a_worker_that_dies_of_something_else(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(self: Worker, dom: Domain, mark: Mark) -> Mark:
        os.kill(os.getpid(), signal.SIGTERM)
        return mark

    monkeypatch.setattr(Worker, "_touch", touch)
    status, text = run(directory)
    assert status == 1
    assert re.search(r"died of SIGTERM; it was at: (get|list|change)", text)


@pytest.mark.parametrize("when", ["while it runs", "at its end"])
def test_a_worker_that_hangs(directory: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def hang(self: Worker) -> None:
        with self._doms.locked():
            self._begin(Kind.PEEK)
            signal.pause()

    def run_and_hang(self: Worker) -> None:
        run_worker(self)
        hang(self)

    run_worker = Worker.run
    if when == "at its end":
        monkeypatch.setattr(Worker, "run", run_and_hang)
    else:
        monkeypatch.setattr(Worker, "_peek", hang)
    monkeypatch.setattr(stress, "STALL", 0.5)
    status, text = run(directory, seconds=0.1 if when == "at its end" else 10)
    assert status == 1
    assert re.search(
        r"worker \d \(process \d+\) has been busy to \w+.* for [01] s; "
        r"the list lock is locked; held by process \d+",
        text,
    )


def test_stuck_workers_name_the_holder(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blow = stress._Storm._blow

    def blowing(storm: stress._Storm, *args: Any) -> None:
        with storm._doms.get(uuid=storm._plan.uuid_of(1)):
            blow(storm, *args)

    monkeypatch.setattr(stress._Storm, "_blow", blowing)
    monkeypatch.setattr(stress, "LOCK_TIMEOUT", 0.2)
    # More of them would also wait for each other, and the first who is stuck ends the storm.
    status, text = run(directory, seconds=10, workers=1)
    assert status == 1
    assert re.search(
        rf"stuck while .* domain 'vm1' was not free within 0.2 s; held by process {os.getpid()} ",
        text,
    )


# --- Ctrl-C ---------------------------------------------------------------------------------


def processes_of_session(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and os.getsid(process.pid) == session:
                found.append(process)
    return found


PROGRAM = f"""
import faulthandler, os, signal, sys
faulthandler.dump_traceback_later(60, exit=True)  # a hang says where
from multiprocessing import util
from pathlib import Path
from rich.console import Console
from shmdomains.stress import storm as stress

def interrupt(*processes):
    if processes and not interrupted:
        interrupted.extend(processes)
        for pid in processes:
            os.kill(pid, signal.SIGINT)

interrupted = []

{{moment}}

if __name__ == "__main__":
    stress.View.PLAIN_INTERVAL = 0.2
    sys.exit(stress.run(Path({str(SAMPLES)!r}), seconds={{seconds}}, kill=True, start={{start!r}},
                        workers=2, console=Console(width=200)))
"""


def begin_storm(start: str, moment: str = "", seconds: float = 60) -> subprocess.Popen[str]:
    """A storm in a session of its own; `moment`: Python that calls `interrupt` with the processes
    that get SIGINT, when the moment has come."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM.format(start=start, moment=moment, seconds=seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended_in_order(process: subprocess.Popen[str], text: str, *, interrupted: bool = True) -> None:
    assert process.wait(30) == (130 if interrupted else 0), text
    assert "Traceback" not in text and text.count("✓") == 8, text
    assert ("interrupted; this is what was proven so far" in text) == interrupted
    left = processes_of_session(process.pid)
    assert not psutil.wait_procs(left, 10)[1]  # multiprocessing's own end a moment after us


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_ctrl_c_ends_it_in_order(start: str) -> None:
    with begin_storm(start) as process:
        assert process.stdout is not None
        lines = iter(process.stdout)
        text = next(line for line in lines if line.startswith("storm:"))
        os.killpg(process.pid, signal.SIGINT)
        text += "".join(lines)
        ended_in_order(process, text)


# Where Ctrl-C did harm: within a statement of multiprocessing, whose next one takes note of what
# was done, and in a worker that could not ignore it yet.
MOMENTS = {
    "the storm begins": """
begin = stress._CtrlC.__enter__
def enter(ctrl_c):
    interrupt(os.getpid())
    return begin(ctrl_c)
stress._CtrlC.__enter__ = enter
""",
    "the storm is over": """
whole = stress._Storm._run
def end(storm, seconds):
    whole(storm, 0.2)
    interrupt(os.getpid())
stress._Storm._run = end
""",
    "a worker was reaped": """
waitpid = os.waitpid
def reap(*how):
    found = waitpid(*how)
    interrupt(*[os.getpid()] * bool(found[0]))
    return found
os.waitpid = reap
""",
    "a worker was forked": """
fork = os.fork
def begin():
    pid = fork()
    interrupt(*[pid, os.getpid()] * bool(pid))
    return pid
os.fork = begin
""",
    "a worker was spawned": """
spawn = util.spawnv_passfds
def begin(program, arguments, fds):
    pid = spawn(program, arguments, fds)
    if "--multiprocessing-fork" in arguments:
        if interrupted:  # the first worker was; by the second one it is our turn
            os.kill(os.getpid(), signal.SIGINT)
        interrupt(pid)
    return pid
util.spawnv_passfds = begin
""",
}


@pytest.mark.parametrize(
    ("start", "moment"),
    [
        ("fork", "the storm begins"),
        ("fork", "the storm is over"),
        ("fork", "a worker was reaped"),
        ("spawn", "a worker was reaped"),
        ("fork", "a worker was forked"),
        ("spawn", "a worker was spawned"),
    ],
)
@pytest.mark.timeout(100)
def test_ctrl_c_at_the_moment_when(start: str, moment: str) -> None:
    with begin_storm(start, MOMENTS[moment]) as process:
        assert process.stdout is not None
        ended_in_order(process, process.stdout.read())


AT_A_LINE = """
file, line, me = {file!r}, {line}, os.getpid()

def trace(frame, event, argument):
    if frame.f_code.co_filename != file or os.getpid() != me:
        return None
    if event == "line" and frame.f_lineno == line:
        interrupt(me)
    return trace

def run(storm, seconds):
    sys.settrace(trace)
    whole(storm, seconds)

whole, stress._Storm.run = stress._Storm.run, run
"""


def lines_of(function: Callable[..., Any]) -> list[tuple[str, int]]:
    code = function.__code__
    return sorted({(code.co_filename, line) for *_, line in code.co_lines() if line})[1:]


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.skipif(not SOAK, reason="`make soak` goes through the lines that see to the workers")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_ctrl_c_at_every_line_that_sees_to_workers(
    start: str, tried: Callable[[str, int], None]
) -> None:
    """Those of the storm, and of what it calls of multiprocessing. No storm comes to all."""
    storm = stress._Storm
    functions = [storm._start, storm._reap, storm._kill_worker, storm._end]
    functions += [BaseProcess.start, BaseProcess.close]
    functions += [popen_fork.Popen.poll]
    functions += [popen_spawn_posix.Popen._launch] if start == "spawn" else []
    places = sorted({place for function in functions for place in lines_of(function)})
    came = 0
    for file, line in places:
        with begin_storm(start, AT_A_LINE.format(file=file, line=line), 0.5) as begun:
            assert begun.stdout is not None
            text = begun.stdout.read()
            ended_in_order(begun, text, interrupted="interrupted" in text)
            came += "interrupted" in text
    assert came > len(places) / 3
    tried(f"lines at which Ctrl-C came ({start})", came)


# --- the journal ----------------------------------------------------------------------------


def test_buckets_are_fine_enough() -> None:
    for ns in [*range(100), 12_345, 999_999, 10**9, 3 * 10**10]:
        assert duration_of(bucket_of(ns)) == pytest.approx(ns, rel=0.07)
    buckets = [bucket_of(ns) for ns in range(100_000)]
    assert buckets == sorted(buckets)


def test_clones_have_names_and_uuids_of_their_own() -> None:
    names = ["a", "a~3", "ü" * 125, "ü" * 125 + "x"]
    loaded = [(UUID(int=n).bytes, name) for n, name in enumerate(names)]
    plan = Plan(b"abcdef", loaded, 5000, 2, separator_for(names), 1.0)
    every = [plan.name_of(target) for target in range(plan.domains)]
    assert len(set(every)) == plan.domains
    assert max(len(name.encode()) for name in every) <= 251
    uuids = [plan.uuid_of(target) for target in range(plan.domains)]
    own = [plan.own_uuid(w, serial) for w in range(2) for serial in range(100)]
    assert len({*uuids, *own}) == plan.domains + 200
    assert [plan.number_of(uuid) for uuid in uuids[4:]] == list(range(4, plan.domains))
    assert all(plan.number_of(uuid) is None for uuid in own)


@pytest.fixture
def dead() -> tuple[DomainList, Journal, Plan]:
    """A list of one domain, and the journal of a worker that did nothing so far."""
    doms = DomainList(max_domains=10)
    doms.define(XML.format("vm", UUID(int=1)))
    plan = Plan(b"abcdef", [(UUID(int=1).bytes, "vm")], 1, 1, "~", 1.0)
    return doms, Journal(1, 1, 1), plan


def changed(doms: DomainList, count: int) -> None:
    with doms.get(name="vm") as dom:
        dom.definition = dom.definition.replace(description=description_of(count))
        dom.data = [count, 0, 5, 0, -1, [count]]


@pytest.mark.parametrize(("acknowledged", "found", "kept"), [(0, 0, 0), (0, 1, 1), (1, 1, 0)])
def test_a_change_in_flight_is_settled(
    dead: tuple[DomainList, Journal, Plan], acknowledged: int, found: int, kept: int
) -> None:
    doms, journal, plan = dead
    (page,) = journal.pages
    if found:
        changed(doms, found)
    page.intend(Intent.CHANGE, 0, 1)
    page.acked[0] = acknowledged
    settle(doms, journal, plan, 0, 1.0)
    assert (page.acked[0], page.words[Word.KEPT], page.words[Word.INTENT]) == (found, kept, 0)


@pytest.mark.parametrize(("acknowledged", "found"), [(0, 2), (1, 0)])
def test_a_change_that_was_lost_or_doubled_is_not(
    dead: tuple[DomainList, Journal, Plan], acknowledged: int, found: int
) -> None:
    doms, journal, plan = dead
    (page,) = journal.pages
    changed(doms, found)
    page.intend(Intent.CHANGE, 0, 1)
    page.acked[0] = acknowledged
    with pytest.raises(Wrong, match="lost"):
        settle(doms, journal, plan, 0, 1.0)


def test_definitions_in_flight_are_settled(dead: tuple[DomainList, Journal, Plan]) -> None:
    doms, journal, plan = dead
    (page,) = journal.pages
    page.intend(Intent.DEFINE, 2, 7)
    settle(doms, journal, plan, 0, 1.0)
    assert page.own(2) == (0, 0)

    own = DomainDef.from_xml(XML.format(plan.own_name(0, 7, 0), UUID(bytes=plan.own_uuid(0, 7))))
    doms.define(own)
    page.intend(Intent.DEFINE, 2, 7)
    settle(doms, journal, plan, 0, 1.0)
    assert page.own(2) == (7, 0)

    page.intend(Intent.RENAME, 2, 1)
    settle(doms, journal, plan, 0, 1.0)
    assert page.own(2) == (7, 0)
    with doms.locked(), doms.find_by_uuid(plan.own_uuid(0, 7)) as dom:
        doms.rename(dom, plan.own_name(0, 7, 1))
    page.intend(Intent.RENAME, 2, 1)
    settle(doms, journal, plan, 0, 1.0)
    assert page.own(2) == (7, 1)

    page.intend(Intent.REMOVE, 2)
    settle(doms, journal, plan, 0, 1.0)
    assert page.own(2) == (7, 1)
    doms.undefine(uuid=plan.own_uuid(0, 7))
    page.intend(Intent.REMOVE, 2)
    settle(doms, journal, plan, 0, 1.0)
    assert page.own(2) == (0, 0)


def test_verify_names_what_contradicts(dead: tuple[DomainList, Journal, Plan]) -> None:
    doms, _, _ = dead
    changed(doms, 3)
    info = doms.peek(name="vm")
    assert info is not None and verify(info, 1).by == (3,)
    with pytest.raises(Wrong, match="torn"):
        verify(info, 2)
