"""Look at what SIGKILL would leave after every single instruction of an operation.

``trace_driver.py FOLDER``, run by test_every_store.py in the way of crash_driver.py, whose
operations these are. every_store.c stops the victim before and after each instruction that stores
into the segment, whoever wrote that instruction, and says which locks the kernel would mark if the
victim died there. Bytes and marks together are an image. The victim goes on to its end; when it is
gone, each image that differs from all others is written to a file, opened, recovered and judged as
if the victim had died there (`Trial.survive`), by a process that knows nothing of it.

What else must hold:

- The stores outside mutexes are the numbered crash points, one for one: a store without a point
  bypasses the inlines of layout.h, and no test that counts points sees a death there. Only what a
  process counts has none, and nothing depends on it.
- Stores into a mutex (the header's four, one a slot: `pthread_mutex_t` and nothing beside it) come
  from the C library, never from the core.
- Nothing but these stores changes the segment: not a system call, not another mapping.
- No image leaves a lock in the victim's name without the kernel's mark.

Requests say how: "judge" does the above. "steps" goes the whole way in single steps, and must see
just what was seen from store to store. "kernel" does kill the victim at each stop, and compares
what the kernel made of the file with what every_store.c said it would.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crash_driver import (
    OPERATIONS,
    Found,
    Image,
    Operation,
    Place,
    Trial,
    few,
    hook,
    in_parallel,
    repair,
    serve,
)

from shmdomains import DomainList
from shmdomains.memory._core import core

PAGE = 4096
NEVER = 1 << 40  # a point that is not reached
PATIENCE = 300  # seconds for a victim in single steps
REFUSED = 77  # the exit code of a victim that may not be traced
MOST_FAILURES = 3  # that are told, of one trace or one worker
FOUND, BEFORE, STORE, STEP, END = range(5)

tool = ctypes.PyDLL(core.__file__)


class Event(ctypes.Structure):
    """sd_trace_event of every_store.c."""

    _fields_ = (
        ("kind", ctypes.c_uint64),
        ("points", ctypes.c_uint64),
        ("place", ctypes.c_uint64),
        ("instruction", ctypes.c_uint64),
        ("in_mutex", ctypes.c_uint64),
        ("is_time", ctypes.c_uint64),
        ("is_counter", ctypes.c_uint64),
        ("lost", ctypes.c_uint64),
        ("words", ctypes.c_uint64),
        ("deaths", ctypes.c_uint64),
        ("word", ctypes.c_uint64 * 2 * 64),
        ("death", ctypes.c_uint64 * 2 * 64),
        ("status", ctypes.c_uint64),
    )


class Refused(Exception):
    """The victim may not be traced."""


@dataclass(frozen=True)
class Step:
    """From one image to the next: words that changed, and 32-bit words the kernel would write."""

    what: str
    made: int  # stores outside mutexes so far
    is_time: bool  # nothing but the time since when a lock is held, or what was counted
    changed: tuple[tuple[int, int], ...]
    deaths: tuple[tuple[int, int], ...]


@dataclass
class Seen(Found):
    """What came of it; `cases` are images that were judged."""

    stores: int = 0  # outside mutexes
    mutex_stores: int = 0
    steps: int = 0  # single steps
    images: int = 0  # that differ in more than the time
    refused: str = ""


# --- the bytes ------------------------------------------------------------------------------------


def pages_of(image: Image) -> dict[int, bytearray]:
    """Those that are not all zeros, by their number."""
    pages = {}
    for at, part in image.parts:
        assert at % PAGE == len(part) % PAGE == 0
        for i in range(0, len(part), PAGE):
            if any(page := part[i : i + PAGE]):
                pages[(at + i) // PAGE] = bytearray(page)
    return pages


def get(pages: dict[int, bytearray], at: int) -> int:
    page = pages.get(at // PAGE, bytes(PAGE))
    return int.from_bytes(page[at % PAGE : at % PAGE + 8], "little")


def put(pages: dict[int, bytearray], at: int, value: int, size: int) -> None:
    page = pages.setdefault(at // PAGE, bytearray(PAGE))
    page[at % PAGE : at % PAGE + size] = value.to_bytes(size, "little")


def with_deaths(pages: dict[int, bytearray], step: Step) -> dict[int, bytearray]:
    """A copy in which the kernel has marked the locks."""
    touched = {at // PAGE for at, _ in step.deaths}
    pages = {n: bytearray(page) if n in touched else page for n, page in pages.items()}
    for at, value in step.deaths:
        put(pages, at, value, 4)
    return pages


def image_of(size: int, pages: dict[int, bytearray]) -> Image:
    return Image(size, tuple((n * PAGE, bytes(page)) for n, page in sorted(pages.items())))


def digest(kind: str, at: int, value: int) -> int:
    text = f"{kind} {at} {value}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


# --- one operation --------------------------------------------------------------------------------


class Trace(Trial):
    """One operation, followed from store to store."""

    def __init__(self, what: Operation, place: Place, image: Image | None) -> None:
        super().__init__(what, place, image)
        self.found: Seen = Seen()
        self.base: Image | None = None
        self.steps: list[Step] = []
        self.stop = NEVER  # the number of the step at which the victim is killed

    # The victim

    def follow_it(self, every: bool = False) -> int:
        """From its beginning to its end, or until it is killed."""
        self.base, self.steps = None, []
        hook("sd_trace_every").value, hook("sd_trace_steps").value = every, 0
        self.place.write(self.image)
        code = self.perform(self.what.run, NEVER, leave, offer, self.follow)
        self.found.steps += hook("sd_trace_steps").value
        return code

    def follow(self, pid: int) -> int:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            code = os.waitstatus_to_exitcode(status)
            if code > REFUSED:
                raise Refused(os.strerror(code - REFUSED))
            return code
        tool.sd_trace_begin(pid, os.fsencode(self.place.path))
        self.made, self.before = 0, Event()
        while True:
            event = Event()
            tool.sd_trace_next(ctypes.byref(event))
            if event.kind == END:
                self.nothing_else(event)
                return os.waitstatus_to_exitcode(event.status)
            self.take(event)
            if len(self.steps) > self.stop:
                tool.sd_trace_kill()
                return -signal.SIGKILL

    def take(self, event: Event) -> None:
        """An event becomes a step, and is looked at by itself."""
        place = f"offset {event.place:#x}, instruction {event.instruction:#x} of the core"
        if event.kind == FOUND:
            self.base, self.made = self.place.read(), event.points
            what = "at first"
        elif event.kind == BEFORE:
            self.nothing_else(event)
            self.before = event
            what = f"before a store to {place}"
        elif event.kind == STORE:
            what = f"after a store to offset {event.place:#x}"
            self.expect_point(event, what)
        else:
            what = "after a step in the C library"
        if event.lost:
            self.fail(f"{what}: the kernel would leave the lock at {event.lost:#x} taken")
        changed = tuple((at, value) for at, value in event.word[: event.words])
        deaths = tuple((at, value) for at, value in event.death[: event.deaths])
        self.steps.append(Step(what, self.made, bool(event.is_time), changed, deaths))

    def nothing_else(self, event: Event) -> None:
        for at, _ in event.word[: event.words]:
            self.fail(f"the word at {at:#x} was changed by no store of the victim's code")

    def expect_point(self, event: Event, what: str) -> None:
        by = self.before.instruction
        if event.in_mutex:
            self.found.mutex_stores += 1
            if by:
                self.fail(f"{what}: the core's instruction {by:#x} stores into a mutex")
            return
        if event.is_counter:
            if event.points != self.made:
                self.fail(f"{what}: a crash point precedes a store that has none")
            return
        self.found.stores += 1
        if event.points != self.made + 1:
            self.fail(
                f"{what}, by {f'instruction {by:#x} of the core' if by else 'other code'}: "
                f"{event.points - self.made} crash points precede it instead of one"
            )
        self.made = event.points

    def fail(self, what: str) -> None:
        if len(self.found.failures) < MOST_FAILURES:
            self.found.failures.append(what)

    # The images

    def contents(self, timeless: bool = False) -> Iterator[int]:
        """A hash of each image: the sum, without carries, of those of the words that have changed
        since the first one, and of the kernel's marks. `timeless`: as if clocks stood still."""
        assert self.base is not None
        first = pages_of(self.base)
        words: dict[int, int] = {}
        key = 0
        for step in self.steps:
            for at, value in () if timeless and step.is_time else step.changed:
                key ^= words.get(at, 0)
                words[at] = digest("word", at, value) if value != get(first, at) else 0
                key ^= words[at]
            whole = key
            for at, value in step.deaths:
                whole ^= digest("mark", at, value)
            yield whole

    def images(self) -> dict[int, tuple[int, set[int]]]:
        """By content: the first step that shows it, and how many changes were acknowledged."""
        distinct: dict[int, tuple[int, set[int]]] = {}
        for number, (step, content) in enumerate(zip(self.steps, self.contents(), strict=True)):
            done = sum(mark <= step.made for mark in self.marks)
            distinct.setdefault(content, (number, set()))[1].add(done)
        return distinct

    def replay(self) -> Iterator[tuple[Step, dict[int, bytearray]]]:
        """Each step with the pages as they are after it, without marks."""
        assert self.base is not None
        pages = pages_of(self.base)
        for step in self.steps:
            for at, value in step.changed:
                put(pages, at, value, 8)
            yield step, pages

    def judge(self, workers: int, number: int) -> Seen:
        """One worker's share of the images."""
        assert self.base is not None
        wanted = dict(list(self.images().values())[number::workers])
        self.found = Seen()
        for i, (step, pages) in enumerate(self.replay()):
            if i not in wanted:
                continue
            self.found.cases += 1
            signal.alarm(60)
            try:
                self.place.write(image_of(self.base.size, with_deaths(pages, step)))
                self.survive(self.allowed(wanted[i]))
            except Exception:
                self.fail(f"killed {step.what}, {i}:\n{traceback.format_exc(limit=-3)}")
                if len(self.found.failures) == MOST_FAILURES:
                    break
        return self.found

    def allowed(self, dones: set[int]) -> list[Any]:
        if self.what.like:
            return self.states
        return [s for s in self.states if all(s in self.states[d : d + 2] for d in dones)]


def offer() -> None:
    """The victim stops, to be traced."""
    signal.alarm(PATIENCE)
    refusal = tool.sd_trace_me()
    if refusal:
        os._exit(REFUSED + refusal)


def leave(*_: object) -> None:
    """The victim has done it; what the interpreter stores at its end is no part of it."""
    os._exit(0)


# --- what is asked for ----------------------------------------------------------------------------


def judge(trace: Trace, folder: Path) -> Seen:
    """Every image is judged."""
    trace.rehearse()
    assert trace.follow_it() == 0, "the operation failed"
    seen = trace.found
    seen.images = len(set(trace.contents(timeless=True)))
    if seen.failures:
        return seen

    def share(workers: int, number: int) -> Seen:
        trace.place = Place(folder / str(number), "robust")
        return trace.judge(workers, number)

    seen.add(in_parallel(share))
    return seen


def shape(steps: list[Step]) -> list[tuple[Any, ...]]:
    """What is the same in every run: where the stores go, how many, and which locks are marked."""
    return [(step.what, step.made, [at for at, _ in step.deaths]) for step in steps]


def step_by_step(trace: Trace, folder: Path) -> Seen:
    """In single steps nothing comes to light that was not seen from store to store."""
    assert trace.follow_it() == 0, "the operation failed"
    known = shape(trace.steps)
    trace.found = Seen()
    assert trace.follow_it(every=True) == 0, "the operation failed"
    for i, (old, new) in enumerate(itertools.zip_longest(known, shape(trace.steps))):
        if old != new:
            trace.fail(f"step {i} is {new} instead of {old}")
            break
    return trace.found


def as_the_kernel(trace: Trace, folder: Path) -> Seen:
    """Killed at each stop: the file is what it was said to be."""
    assert trace.follow_it() == 0, "the operation failed"
    count = len(trace.steps)
    trace.found = Seen()
    for trace.stop in range(count):
        code = trace.follow_it()
        assert code == -signal.SIGKILL, f"it ended with {code} instead of a SIGKILL"
        assert len(trace.steps) == trace.stop + 1
        *_, (step, pages) = trace.replay()
        said = {n: page for n, page in with_deaths(pages, step).items() if any(page)}
        found = pages_of(trace.place.read())
        trace.found.cases += 1
        if said != found:
            wrong = [hex(n * PAGE) for n in {*said, *found} if said.get(n) != found.get(n)]
            trace.fail(f"killed {step.what}: the pages at {wrong} are not as they were said to be")
    return trace.found


def recovery(trace: Trace, folder: Path) -> Seen:
    """Killed where it holds the most locks; then every image of the repair is judged."""
    assert trace.follow_it() == 0, "the operation failed"
    most = max(len(step.deaths) for step in trace.steps)
    worst = max(i for i, step in enumerate(trace.steps) if len(step.deaths) == most)
    assert trace.base is not None
    step, pages = next(itertools.islice(trace.replay(), worst, None))
    image = image_of(trace.base.size, with_deaths(pages, step))
    what = Operation(take_all, 0, trace.what.on, "attached", None, None, False)
    return judge(Trace(what, Place(folder / "repaired", "robust"), image), folder)


def take_all(doms: DomainList) -> Iterator[None]:
    repair(doms)
    yield


MODES = {"judge": judge, "steps": step_by_step, "kernel": as_the_kernel, "recovery": recovery}


def answer(folder: Path, what: Operation, image: Image | None, lock: str, how: str) -> Seen:
    trace = Trace(what, Place(folder / "victim", lock), image)
    try:
        return MODES[how](trace, folder)
    except Refused as refusal:
        return Seen(refused=f"ptrace is refused here: {refusal}")


# --- operations that must be caught ---------------------------------------------------------------

UNUSED = 2 * PAGE - 8  # a word of the header that nobody reads
SET_ROBUST_LIST = 273


def segment_of_ours() -> tuple[int, str]:
    """Where it is mapped in this process, and its path."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    [line] = [one for one in lines if one.endswith("/list.segment")]
    return int(line.partition("-")[0], 16), line.split()[-1]


def bypass(doms: DomainList) -> Iterator[None]:
    """A store that no crash point precedes."""
    with doms.locked():
        ctypes.memset(segment_of_ours()[0] + UNUSED, 1, 1)
    yield


def write_to_the_file(doms: DomainList) -> Iterator[None]:
    """A change by a system call."""
    with doms.locked():
        file = os.open(segment_of_ours()[1], os.O_RDWR)
        os.pwrite(file, b"x", UNUSED)
    yield


def change_in_two_commits(doms: DomainList) -> Iterator[None]:
    """One change, of which a half can be seen."""
    with doms.get(name="vm0") as dom:
        dom.autostart = True
        dom.commit()
        dom.data = "second"
    yield


def forget_the_robust_list(doms: DomainList) -> Iterator[None]:
    """The kernel would not find the lock that is held."""
    head = (ctypes.c_uint64 * 3)()
    head[0] = ctypes.addressof(head)
    with doms.get(name="vm0"):
        ctypes.CDLL(None).syscall(SET_ROBUST_LIST, head, ctypes.sizeof(head))
        yield


CONTROLS = {
    run.__name__.replace("_", " "): Operation(run, 0, few, "attached", None, None, False)
    for run in (
        bypass,
        write_to_the_file,
        change_in_two_commits,
        forget_the_robust_list,
    )
}


if __name__ == "__main__":
    serve({**OPERATIONS, **CONTROLS}, answer)
