"""Lists on PostgreSQL: a worker dies, or loses its session, at each of its requests.

pg_victim.py has a worker that stops at each moment of each request of an operation. First one that
nobody harms is followed: what the list is after each request, and who holds what. Then one for each
moment is killed there; it has its session ended by the server there; it has its connection cut off
there. A killed one leaves exactly what its last request that was done left, and whoever has next
what it held is told of it. One that lives either goes on as if nothing had been, or is told that
its locks are lost: then it is as if it had been killed, but for what it is told was applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pg_servers
import pytest
from helpers import SOAK, list_url
from killing import DEADLINE, Child, soon, until

pg_servers.need()

from pg_victim import MOMENTS, OPERATIONS, be_a_victim, begin, lay_out  # noqa: E402

from shmdomains import Job  # noqa: E402
from shmdomains.postgres import PostgresDomainList  # noqa: E402

Start = Callable[..., Child]
Tried = Callable[[str, int], None]
SPARE = "spare"


# --- what can be seen of a list -------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """All domains as committed, and the events since a moment."""

    domains: tuple[tuple[Any, ...], ...]
    events: tuple[tuple[Any, ...], ...]


def view(doms: PostgresDomainList, since: int) -> View:
    """Whatever ids there are: only whether there is one."""
    domains = []
    for info in sorted(doms.snapshot(), key=lambda info: info.uuid.int):
        if info.name == SPARE:
            continue
        assert info.definition.name == info.name, "torn"
        successor = info.next_definition
        domains.append(
            (
                *(info.uuid.int, info.name, info.is_active, info.state, info.reason),
                *(info.persistent, info.autostart, info.data, info.pid, info.host),
                info.definition.memory,
                None if successor is None else successor.memory,
                tuple((job.operation, job.progress) for job in info.jobs),
                info._work is not None and info._work.intended is not None,
                info._work is not None and info._work.step is not None,
            )
        )
    events = list(doms.watch(since=since, timeout=0))
    assert [event.number - since for event in events] == list(range(1, len(events) + 1))
    return View(
        tuple(domains),
        tuple(
            (event.type, event.detail, event.uuid.int, event.name, event.id != -1)
            for event in events
            if event.name != SPARE and event.holder is None  # of whose death another test asks
        ),
    )


Held = frozenset[tuple[str, Any]]
LIST = ("list", None)


def held(doms: PostgresDomainList) -> Held:
    """The locks that somebody holds: kind, and which."""
    return frozenset(
        (lock.kind, lock.uuid if lock.kind == "domain" else lock.name)
        for lock in doms.locks()
        if lock.kind != "job"
    )


def told(doms: PostgresDomainList, whom: int | None) -> Held:
    """Take every lock, and with it what is told of a death. `whom`: the pid that died."""
    found = set()
    with doms.mutex("m", DEADLINE) as mutex:
        if mutex.previous_owner_died is not None:
            found.add(("mutex", "m"))
            assert whom in (None, mutex.previous_owner_died.pid)
    with doms.locked(DEADLINE):
        pass
    for info in doms.snapshot():
        with doms.get(uuid=info.uuid, timeout=DEADLINE) as dom:
            died = dom.previous_owner_died
        if died is not None:
            assert whom in (None, died.pid)
            found.add(("domain", info.uuid))
    return frozenset(found)


# --- one that nobody harms ------------------------------------------------------------------------


@dataclass
class Trace:
    """After each request, the first being none: what is there, and what is held."""

    views: list[View]
    held: list[Held]

    @property
    def requests(self) -> int:
        return len(self.views) - 1


class Stage:
    """A list on which one victim after the other does an operation. A warm one has done it before,
    so it has a session, and knows what it needs to ask only once."""

    def __init__(self, start: Start, folder: Path, operation: str, warm: bool) -> None:
        self._start, self.operation, self._warm = start, operation, warm
        self.kind = OPERATIONS[operation]
        self.url = list_url()
        self.doms = begin(self.url, folder if self.kind.files else None)
        self.since = 0
        self.whole = self._whole()

    def victim(self) -> Child:
        """One that has come."""
        victim = self._start(be_a_victim, self.url, self.operation)
        assert victim.hear() == "here"
        if self._warm:
            with self.act(victim, (0, "never")):
                assert victim.hear()[2] == "done"
                assert victim.ask() == (None, True)
        return victim

    @contextmanager
    def act(self, victim: Child, stop: tuple[int, str] | None) -> Iterator[None]:
        """It begins, and stops there, or everywhere."""
        lay_out(self.doms, self.operation)
        self.since = self.doms._event_count
        try:
            victim.tell(stop)
            yield
            until(lambda: not held(self.doms), "nobody holds anything")
            assert self.doms.check().problems == []
        except AssertionError as exc:
            raise AssertionError(f"{stop}: {exc}") from exc

    def view(self) -> View:
        return view(self.doms, self.since)

    def _whole(self) -> Trace:
        known = _traces.get((self.operation, self._warm))
        if known is not None:
            return known
        victim = self.victim()
        with self.act(victim, None):
            found = Trace([self.view()], [held(self.doms)])
            while (word := victim.hear())[0] == "at":
                if word[2] == "read":
                    assert word[1] == len(found.views)
                    found.views.append(self.view())
                    found.held.append(held(self.doms))
                victim.tell("go")
            assert word[:3] == ("ended", found.requests, "done"), word
            assert found.held[-1] == frozenset()
            assert told(self.doms, None) == frozenset()
        victim.close()
        await_end(self.doms)
        _traces[self.operation, self._warm] = found
        return found


_traces: dict[tuple[str, bool], Trace] = {}


@pytest.fixture
def stage(start: Start, tmp_path: Path, operation: str, warm: bool) -> Iterator[Stage]:
    stage = Stage(start, tmp_path, operation, warm)
    with stage.doms as doms:
        yield stage
        doms.unlink(force=True)


def await_end(doms: PostgresDomainList) -> None:
    """Until the server has seen the end of the victim, and is done with what it had sent."""
    until(lambda: not doms._others(), "the end of its sessions")
    until(lambda: not held(doms), "the end of its locks")


# --- one that is killed ---------------------------------------------------------------------------


def cases(requests: int, moments: list[str], files: bool) -> Iterator[tuple[int, str]]:
    """Between the reading of an answer and the next request only files change."""
    for request in range(1, requests + 1):
        for moment in moments:
            if moment != "read" or files or request == requests:
                yield request, moment


def done_by_then(request: int, moment: str) -> list[int]:
    """How many requests the server can have done."""
    return {
        "before": [request - 1],
        "sent": [request - 1, request],
        "arrived": [request],
        "read": [request],
    }[moment]


@pytest.mark.soak
@pytest.mark.parametrize("warm", [False, True] if SOAK else [False])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_each_request_of_postgres(stage: Stage, tried: Tried) -> None:
    # Before a request nothing differs from after the one before it, but for files.
    moments = MOMENTS if SOAK else ["before", "arrived"] if stage.kind.files else ["arrived"]
    for stop in cases(stage.whole.requests, moments, stage.kind.files):
        victim = stage.victim()
        with stage.act(victim, stop):
            assert victim.hear()[:3] == ("at", *stop)
            victim.close()
            await_end(stage.doms)
            judge_what_is_left(stage, done_by_then(*stop), victim.pid)
        tried("workers killed at a request to PostgreSQL", 1)


def judge_what_is_left(stage: Stage, done: list[int], pid: int | None) -> None:
    """Of one that lost all it held when so many requests were done."""
    doms, whole, kind = stage.doms, stage.whole, stage.kind
    found, deaths = stage.view(), told(doms, pid)
    can_be = [(whole.views[at], whole.held[at] - {LIST}) for at in done]
    assert (found, deaths) in can_be
    assert not deaths or told(doms, None) == frozenset(), "a death is told twice"
    after = stage.view()
    if kind.files:  # whoever locked it settled them
        assert after.domains in (whole.views[0].domains, whole.views[-1].domains)
    else:
        assert after == found
    if not (kind.steps or kind.files):
        assert after in (whole.views[0], whole.views[-1])
    assert held(doms) == frozenset()
    if doms.peek(name="one") is not None:
        with soon("a job after a dead one's"), doms.job("one", "next", Job.ASYNC, DEADLINE):
            pass


# --- one that loses its session -------------------------------------------------------------------


def terminate(doms: PostgresDomainList, backend: int, wait: bool) -> None:
    with doms._pool.connect() as conn:
        conn.execute("SELECT pg_terminate_backend(%s, %s)", [backend, 10_000 if wait else 0])


@pytest.mark.soak
@pytest.mark.parametrize("how", ["ended", "cut"])
@pytest.mark.parametrize("warm", [True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_session_is_lost_at_each_request_of_postgres(
    stage: Stage, tried: Tried, how: str
) -> None:
    # An answer that has arrived is read, whatever becomes of the session then.
    if how == "ended":
        moments = ["before", "sent", "read"] if SOAK else ["before"]
    else:
        moments = MOMENTS if SOAK else ["arrived"]
    victim = stage.victim()
    for stop in cases(stage.whole.requests, moments, stage.kind.files):
        with stage.act(victim, stop):
            word = victim.hear()
            assert word[:3] == ("at", *stop)
            if how == "ended":
                terminate(stage.doms, word[3], wait=stop[1] != "sent")
            victim.tell("cut" if how == "cut" else "go")
            _, _, outcome, message, acknowledged = victim.hear()
            judge_the_survivor(stage, stop, outcome, message, acknowledged)
            assert victim.ask() == (None, True)
        tried("sessions with PostgreSQL lost at a request", 1)
        tried(f"of those: {outcome}", 1)


def judge_the_survivor(
    stage: Stage, stop: tuple[int, str], outcome: str, message: str, acknowledged: bool
) -> None:
    whole, kind, done = stage.whole, stage.kind, done_by_then(*stop)
    until(lambda: not held(stage.doms), "it holds nothing")
    found = stage.view()
    if outcome == "done":
        assert found == whole.views[-1]
        # A rule that has done all it should says nothing of a lock that was lost before it was
        # freed; but it was.
        deaths = told(stage.doms, None)
        assert not deaths or deaths in [whole.held[at] - {LIST} for at in done]
        return
    assert outcome == "LockLost", message
    if acknowledged:
        assert found == whole.views[-1]
    elif not (kind.steps or kind.files) and whole.views[0] != whole.views[-1]:
        says = "is applied" in message or "all the same" in message
        assert says == (found == whole.views[-1]), message
    judge_what_is_left(stage, done, None)
