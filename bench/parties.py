"""The works of several processes: contention, killed holders, reading what is being written, room.

All of it is done in the process of the contestant, which forks workers, holders and writers.
"""

from __future__ import annotations

import random
import resource
import signal
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from . import fresh, world
from .children import Child
from .contestants import Contestant, NotOfferedError
from .contestants.ours import Robust
from .fresh import Room
from .work import Works

CHUNK = 50  # operations between two looks at the clock
CAP = 1.5  # seconds after which a killed holder's domain counts as never free again


class Party(Protocol):
    """What contention and killed holders ask of whoever is measured. Keys are its own."""

    def attach(self) -> None: ...
    def read_state(self, _keys: Sequence[Any], /) -> int: ...
    def increment(self, _keys: Sequence[Any], /) -> None: ...
    def count(self, _key: Any, /) -> int: ...
    def hold(self, _key: Any, /) -> None: ...
    def take(self, _key: Any, /) -> None: ...


class Shared(Protocol):
    @property
    def contestant(self) -> Party: ...
    @property
    def keys(self) -> Sequence[Any]: ...


# --- f: contention -----------------------------------------------------------------------------


class Contention(NamedTuple):
    rate: float  # operations per second, all workers together
    least: float  # share of the unluckiest worker, 1 is the mean
    most: float
    longest: float  # seconds that one operation took at most
    cpu: float  # seconds of CPU per operation
    lost: int


def contend(works: Shared, workers: int, where: str, seconds: float, seed: int) -> Contention:
    """Increments of a number in the data by so many workers: on ``random`` domains, all on
    ``one``, or each on a list of its ``own``, which is what they would reach if they had nothing in
    common."""
    contestant, keys = works.contestant, works.keys
    _must_offer(contestant, "increment")
    targets = keys[:1] if where == "one" else keys
    if isinstance(contestant, Contestant):
        if not contestant.shared:
            raise NotOfferedError("no other process can count in it")
        contestant.change_data(targets, world.SMALL[0])
    before = sum(contestant.count(key) for key in targets)
    children = [
        Child(partial(_worker, works=works, where=where, seconds=seconds, seed=seed + number))
        for number in range(workers)
    ]
    for child in children:
        child.wait_ready()
    for child in children:
        child.go()
    done = [child.result() for child in children]
    total = sum(count for count, _time, _longest, _cpu in done)
    after = sum(contestant.count(key) for key in targets)
    lost = 0 if where == "own" else before + total - after
    shares = [count * workers / total for count, *_ in done]
    return Contention(
        rate=sum(count / took for count, took, *_ in done),
        least=min(shares),
        most=max(shares),
        longest=max(longest for _, _, longest, _ in done),
        cpu=sum(cpu for *_, cpu in done) / total,
        lost=lost,
    )


def _worker(
    me: Child, works: Shared, where: str, seconds: float, seed: int
) -> tuple[int, float, float, float]:
    contestant, keys = works.contestant, works.keys
    own: Contestant | None = None
    if where == "own":
        assert isinstance(contestant, Contestant)
        keys = list(keys[:1000])
        contestant = own = type(contestant)()
        own.fill(world.domains(keys), len(keys))
        own.change_data(keys, world.SMALL[0])
    else:
        contestant.attach()
    source = random.Random(seed)
    chunks = [
        [world.fresh(keys[0] if where == "one" else source.choice(keys)) for _ in range(CHUNK)]
        for _ in range(200)
    ]
    increment, clock = contestant.increment, time.perf_counter
    increment(chunks[0][:1])
    me.begin()
    done, longest = 1, 0.0
    cpu, begin = time.process_time(), clock()
    end = begin + seconds
    at = begin
    while at < end:
        chunk = chunks[done // CHUNK % len(chunks)]
        increment(chunk[:-1])
        one = clock()
        increment(chunk[-1:])  # one in fifty is timed alone
        at = clock()
        longest = max(longest, at - one)
        done += CHUNK
    took, cpu = at - begin, time.process_time() - cpu
    if own is not None:
        own.close()
    return done, took, longest, cpu


# --- h: killed holders -------------------------------------------------------------------------


class Killed(NamedTuple):
    """Seconds until somebody else has the domain; ``None``: not within `CAP`."""

    waiting: float | None
    later: float | None

    @property
    def is_slow(self) -> bool:
        """Once says as much as many times."""
        return any(seconds is None or seconds > 0.2 for seconds in self)


def _hold(contestant: Party, key: Any) -> Child:
    def do(me: Child) -> None:
        contestant.attach()
        contestant.hold(key)
        me.ready()
        signal.pause()

    child = Child(do)
    child.wait_ready()
    return child


def _take(contestant: Party, key: Any, other: Any) -> Child:
    """Somebody who takes the domain when told to, and says when that began and when it ended."""

    def do(me: Child) -> tuple[float, float]:
        contestant.attach()
        contestant.read_state([other])
        me.begin()
        begin = time.monotonic()
        contestant.take(key)
        return begin, time.monotonic()

    child = Child(do)
    child.wait_ready()
    return child


def _asleep(pid: int) -> None:
    """Until the process sleeps (or, one that polls, has had the time to)."""
    deadline = time.monotonic() + 0.05
    while time.monotonic() < deadline:
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "S":
                time.sleep(0.005)
                return


def _must_offer(contestant: Party, operation: str) -> None:
    if getattr(type(contestant), operation) is getattr(Contestant, operation):
        raise NotOfferedError(f"it has no {operation}")


def killed_holder(works: Shared, seed: int, cap: float = CAP) -> Killed:
    contestant = works.contestant
    _must_offer(contestant, "hold")
    # Domains of its own for each round: where a holder was killed, some stay locked for ever.
    uuid, second, other = works.keys[3 * seed + 3 : 3 * seed + 6]

    waiter = _take(contestant, uuid, other)
    holder = _hold(contestant, uuid)
    waiter.go()
    _asleep(waiter.pid)
    begin = time.monotonic()
    holder.kill()
    got = waiter.result_within(cap)
    waiting = None if got is None else got[1] - begin

    comer = _take(contestant, second, other)
    _hold(contestant, second).kill()
    comer.go()
    got = comer.result_within(cap)
    return Killed(waiting, None if got is None else got[1] - got[0])


def blocks_others(works: Works) -> bool:
    """Whether a holder of one domain keeps others from another one."""
    _must_offer(works.contestant, "hold")
    holder = _hold(works.contestant, works.keys[0])
    try:
        return _take_now(works.contestant, works.keys[1]).result_within(0.5) is None
    finally:
        holder.kill()


def _take_now(contestant: Contestant, uuid: bytes) -> Child:
    def do(me: Child) -> bool:
        contestant.attach()
        contestant.take(uuid)
        return True

    return Child(do)


# --- l and g: while somebody writes --------------------------------------------------------------


def _writer(works: Works, keys: list[bytes]) -> Child:
    """Somebody who keeps changing states until told to stop; reports how many a second."""

    def do(me: Child) -> float:
        contestant = works.contestant
        contestant.attach()
        contestant.change_state(keys[:1], world.PAUSED)
        contestant.change_state(keys[:1], world.RUNNING)
        me.ready()
        done, begin = 0, time.perf_counter()
        while not me.told_to_stop():
            for key in keys:
                contestant.change_state([key], world.PAUSED)
                contestant.change_state([key], world.RUNNING)
            done += 2 * len(keys)
        return done / (time.perf_counter() - begin)

    child = Child(do)
    child.wait_ready()
    return child


class Watched(NamedTuple):
    quiet: float  # seconds of a read
    written: float  # the same while somebody keeps writing that record


def read_while_written(works: Works, seed: int, seconds: float = 0.05) -> Watched:
    contestant = works.contestant
    if not contestant.shared:
        raise NotOfferedError("no other process can write it")
    key = works.keys[world.draw(1, len(works.keys), seed)[0]]
    keys = [world.fresh(key) for _ in range(200)]

    def one_read() -> float:
        # The mean: a median would be of the moments in which the writer did not run.
        count, begin = 0, time.perf_counter()
        while (at := time.perf_counter()) < begin + seconds:
            contestant.peek(keys)
            count += len(keys)
        return (at - begin) / count

    quiet = one_read()
    writer = _writer(works, [key] * 20)
    written = one_read()
    writer.go()
    writer.result()
    return Watched(quiet, written)


class Listed(NamedTuple):
    alone: float  # changes per second of a writer
    listed: float  # the same while somebody else keeps listing all


def write_while_listed(works: Works, seed: int, seconds: float = 0.2) -> Listed:
    if not works.contestant.shared:
        raise NotOfferedError("no other process can write it")
    keys = [works.keys[number] for number in world.draw(20, len(works.keys), seed)]
    rates = []
    for rows in (lambda: 0, works.contestant.rows):
        writer = _writer(works, keys)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            rows()
        writer.go()
        rates.append(writer.result())
    return Listed(*rates)


# --- i: room -------------------------------------------------------------------------------------


def room(works: Works, seed: int) -> Room:
    """For a list of ours as a stranger has it; for others in a forked worker."""
    contestant = works.contestant
    uuids = [works.keys[number] for number in world.draw(1000, len(works.keys), seed)]
    if isinstance(contestant, Robust) and contestant.lock == "robust":
        return fresh.look(contestant.path, uuids)
    if not contestant.shared:
        return Room(0.0, fresh.fork_seconds(), 0)

    def attach(_me: Child) -> tuple[float, int]:
        before = fresh.private_bytes()
        begin = time.perf_counter()
        contestant.attach()
        contestant.read_state(uuids[:1])
        took = time.perf_counter() - begin
        contestant.read_state(uuids)
        return took, fresh.private_bytes() - before

    took, private = Child(attach).result()
    return Room(took, fresh.fork_seconds(), private)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
