"""A process that stops at every request that it makes of the server, so that a test may do it harm.

A request has moments, and at each the victim says where it is and waits for a word:

    before   nothing of it is sent
    sent     it is on its way; nobody knows how far
    arrived  the server has done it, and its answer is unread
    read     its answer was read

The word is ``go``, or ``cut``: then its connection is cut off as it stands, so what is unread is
lost. The test may also kill it, or end its session. `OPERATIONS` are what victims do.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from killing import DEADLINE, Pipe, xml

from shmdomains import DomainDef, Job
from shmdomains.postgres import PostgresDomainList
from shmdomains.postgres.session import Row, Session, Statement

HOST = "here"
ONE, TWO, NEW = UUID(int=1), UUID(int=2), UUID(int=3)
MOMENTS = ["before", "sent", "arrived", "read"]


# --- stopping -------------------------------------------------------------------------------------


class Stops:
    """Where this process stops: at each moment, or only at one of one request."""

    def __init__(self, pipe: Pipe, only: tuple[int, str] | None) -> None:
        self._pipe, self._only = pipe, only
        self.count = 0
        self._asking = False
        self._thread = threading.get_ident()

    def at(self, moment: str, session: Session) -> None:
        if self._only is not None and (self.count, moment) != self._only:
            return
        if moment == "arrived":
            select.select([session._pg.socket], [], [], DEADLINE)
        self._pipe.say(("at", self.count, moment, session._pg.backend_pid))
        if self._pipe.listen() == "cut":
            cut(session)

    @contextmanager
    def here(self) -> Iterator[None]:
        """While the block runs."""
        ask, answer = Session._ask, Session._answer

        def asks(session: Session, statement: Statement, values: Any, waits: bool) -> list[Row]:
            if threading.get_ident() != self._thread:
                return ask(session, statement, values, waits)
            self.count += 1
            self.at("before", session)
            self._asking = statement.name in session._prepared
            return ask(session, statement, values, waits)

        def answers(session: Session, waits: bool) -> list[Row]:
            if threading.get_ident() != self._thread:
                return answer(session, waits)
            if not self._asking:  # of what prepares the statement
                self._asking = True
                return answer(session, waits)
            session._pg.flush()
            self.at("sent", session)
            self.at("arrived", session)
            rows = answer(session, waits)
            self.at("read", session)
            return rows

        Session._ask, Session._answer = asks, answers  # type: ignore[method-assign]
        try:
            yield
        finally:
            Session._ask, Session._answer = ask, answer  # type: ignore[method-assign]


def cut(session: Session) -> None:
    """Put a connection whose other end is gone in the place of the session's."""
    ours, theirs = socket.socketpair()
    theirs.close()
    os.dup2(ours.fileno(), session._pg.socket, inheritable=False)
    ours.close()


def be_a_victim(pipe: Pipe, url: str, operation: str) -> None:
    """Do the operation whenever the test says where to stop in it, and say how it ended; then show
    that a domain can be changed."""
    doms = PostgresDomainList.attach(url, host=HOST)
    pipe.say("here")
    while True:
        stops = Stops(pipe, pipe.listen())
        outcome, acknowledged[:] = ("done", ""), []
        with stops.here():
            try:
                OPERATIONS[operation].do(doms)
            except Exception as exc:
                outcome = (type(exc).__name__, str(exc))
        pipe.say(("ended", stops.count, *outcome, bool(acknowledged)))
        pipe.listen()
        with doms.get(name="spare", timeout=DEADLINE) as dom:
            died, data = dom.previous_owner_died, (dom.data or 0) + 1
            dom.data = data
        pipe.say((died, doms.peek(name="spare").data == data))


# --- what victims do ------------------------------------------------------------------------------

acknowledged: list[bool] = []
"""Whether the call that made the change has returned; what is left is to unlock."""


def acknowledge() -> None:
    acknowledged.append(True)


@dataclass(frozen=True)
class Operation:
    """`steps`: it has more than one point of no return, so what is between may be seen. `files`: it
    changes files as well, so that whoever comes next has to settle them first."""

    do: Callable[[PostgresDomainList], None]
    steps: bool = False
    files: bool = False
    active: bool = False  # the domain ``one`` runs


def _define(doms: PostgresDomainList) -> None:
    doms.define(xml("new", NEW), DEADLINE)


def _redefine(doms: PostgresDomainList) -> None:
    doms.define(xml("one", ONE, 2048), DEADLINE)


def _undefine(doms: PostgresDomainList) -> None:
    doms.undefine(name="one", timeout=DEADLINE)


def _rename(doms: PostgresDomainList) -> None:
    with doms.locked(DEADLINE):
        dom = doms.find_by_name("one", DEADLINE)
        assert dom is not None
        with dom:
            doms.rename(dom, "renamed", DEADLINE)
            acknowledge()


def _commit(doms: PostgresDomainList) -> None:
    with doms.get(name="one", timeout=DEADLINE) as dom:
        dom.data = dom.data + 1


def _commit_and_unlock(doms: PostgresDomainList) -> None:
    dom = doms.get(name="one", timeout=DEADLINE)
    dom.data = dom.data + 1
    dom.commit(DEADLINE)
    acknowledge()
    dom.unlock()


def _commit_twice(doms: PostgresDomainList) -> None:
    with doms.get(name="one", timeout=DEADLINE) as dom:
        dom.data = dom.data + 1
        dom.commit(DEADLINE)
        dom.data = dom.data + 10


def _roll_back(doms: PostgresDomainList) -> None:
    dom = doms.get(name="one", timeout=DEADLINE)
    dom.data = 99
    dom.rollback()
    dom.unlock()


def _two(doms: PostgresDomainList) -> None:
    with doms.lock_many([ONE, TWO], DEADLINE) as locked:
        for dom in locked:
            dom.data = dom.data + 1


def _activate(doms: PostgresDomainList) -> None:
    with doms.get(name="one", timeout=DEADLINE) as dom:
        dom.activate(pid=1, timeout=DEADLINE)


def _deactivate(doms: PostgresDomainList) -> None:
    with doms.get(name="one", timeout=DEADLINE) as dom:
        dom.deactivate()


def _assign_new(doms: PostgresDomainList) -> None:
    definition = DomainDef.from_xml(xml("new", NEW))
    with doms.locked(DEADLINE):
        dom = doms.assign_def(definition, True, DEADLINE)
    with dom:
        dom.data = 1


def _assign_old(doms: PostgresDomainList) -> None:
    definition = DomainDef.from_xml(xml("one", ONE, 2048))
    with doms.locked(DEADLINE), doms.assign_def(definition, None, DEADLINE) as dom:
        dom.data = dom.data + 1
        dom.commit(DEADLINE)
        acknowledge()


def _remove(doms: PostgresDomainList) -> None:
    with doms.locked(DEADLINE):
        dom = doms.find_by_name("one", DEADLINE)
        assert dom is not None
        dom.unlock()
        doms.remove_inactive(dom, DEADLINE)
        acknowledge()


def _mutex(doms: PostgresDomainList) -> None:
    with doms.mutex("m", DEADLINE), doms.get(name="one", timeout=DEADLINE) as dom:
        dom.data = dom.data + 1
        dom.commit(DEADLINE)
        acknowledge()


def _job(doms: PostgresDomainList) -> None:
    with doms.job("one", "backup", Job.ASYNC, DEADLINE) as job:
        job.progress(1)
        with doms.get(name="one", timeout=DEADLINE) as dom:
            dom.data = dom.data + 1


def _intend(doms: PostgresDomainList) -> None:
    with doms.get(name="one", timeout=DEADLINE) as dom:
        dom.intend("start", timeout=DEADLINE)
        dom.activate(pid=1, timeout=DEADLINE)


def _autostart(doms: PostgresDomainList) -> None:
    doms.set_autostart(ONE, True, DEADLINE)


OPERATIONS = {
    "define": Operation(_define),
    "redefine": Operation(_redefine),
    "undefine": Operation(_undefine),
    "undefine what runs": Operation(_undefine, active=True),
    "rename": Operation(_rename),
    "commit": Operation(_commit),
    "commit, then unlock": Operation(_commit_and_unlock),
    "commit twice": Operation(_commit_twice, steps=True),
    "roll back": Operation(_roll_back),
    "two": Operation(_two, steps=True),
    "activate": Operation(_activate),
    "deactivate": Operation(_deactivate, active=True),
    "assign_def, new": Operation(_assign_new, steps=True),
    "assign_def": Operation(_assign_old),
    "remove_inactive": Operation(_remove),
    "mutex": Operation(_mutex),
    "job": Operation(_job, steps=True),
    "intend": Operation(_intend, steps=True),
    "define, file": Operation(_define, files=True),
    "redefine, file": Operation(_redefine, files=True),
    "undefine, file": Operation(_undefine, files=True),
    "rename, file": Operation(_rename, files=True),
    "autostart": Operation(_autostart, files=True),
}


def begin(url: str, folder: Path | None) -> PostgresDomainList:
    """A list for victims; with a folder, its files are there."""
    doms = PostgresDomainList.create(url, host=HOST)
    if folder is not None:
        folder.mkdir(exist_ok=True)
        doms.load_all_configs(folder, folder / "autostart")
    doms.define(xml("spare", UUID(int=4)), DEADLINE)
    with doms.mutex("m", DEADLINE):
        pass
    return doms


def lay_out(doms: PostgresDomainList, operation: str) -> None:
    """What a victim finds, whatever the one before it left."""
    for info in doms.snapshot():
        found = info.name, info.data, info.next_definition, info._work
        if info.uuid.int == 4 or found == ("two", 0, None, None):
            continue
        if info.is_active:
            with doms.get(uuid=info.uuid, timeout=DEADLINE) as dom:
                dom.deactivate()
        if info.persistent:
            doms.undefine(uuid=info.uuid, timeout=DEADLINE)
        else:
            with doms.locked(DEADLINE):
                dom = doms.find_by_uuid(info.uuid, DEADLINE)
                dom.unlock()
                doms.remove_inactive(dom, DEADLINE)
    for name, uuid in (("one", ONE), ("two", TWO)):
        if doms.peek(uuid=uuid) is not None:
            continue
        doms.define(xml(name, uuid), DEADLINE)
        with doms.get(name=name, timeout=DEADLINE) as dom:
            dom.data = 0
            if OPERATIONS[operation].active and name == "one":
                dom.activate(pid=1, timeout=DEADLINE)
