"""Workers that do everything that can be done with a few domains, at random and on record, and a
director who kills some of them.

`direct` runs in a nursery's child. It makes the list, forks the workers, and kills one whenever its
record has grown by a random amount; another one takes its place. When all are done it looks at
everything once more, on record as well. What the record means stands in history.py.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from history import Record, Recorder, number_of, record_of
from killing import DEADLINE, Child, Pipe, fork, until, xml
from planted_bugs import plant

from shmdomains import (
    Busy,
    Domain,
    DomainActive,
    DomainDef,
    DomainExists,
    DomainInfo,
    DomainList,
    DomainNotFound,
    DomainRemoved,
    DomainState,
    DomainTransient,
    LockTimeout,
)

STATES = [DomainState.RUNNING, DomainState.PAUSED, DomainState.SHUTDOWN, DomainState.CRASHED]
ONE = DomainDef.from_xml(xml("web0", UUID(int=1)))


@dataclass(frozen=True)
class Plan:
    """One run. `calls` are made by each worker that lives to make them; `bug` is one of
    `planted_bugs.BUGS`."""

    folder: Path
    seed: int
    workers: int
    domains: int
    calls: int
    deaths: int = 0
    lock: Literal["robust", "multiprocessing", "postgres"] = "robust"
    url: str = ""  # of a list on PostgreSQL
    bug: str | None = None


class RolledBack(Exception):
    """Ends a `with` block without a commit."""


OUTCOMES: dict[type[Exception], str] = {
    DomainNotFound: "missing",
    DomainExists: "exists",
    DomainActive: "active",
    DomainTransient: "transient",
    DomainRemoved: "removed",
    RolledBack: "rolled back",
}


@dataclass
class Call:
    """What is being recorded."""

    log: Recorder
    outcome: str = "done"
    seen: list[tuple[int, Record]] = field(default_factory=list)
    more: dict[str, int] = field(default_factory=dict)

    def saw(self, dom: Domain | DomainInfo | None) -> None:
        if dom is None:
            raise DomainNotFound
        self.seen.append((number_of(dom), record_of(dom)))

    def will(self, wrote: Record) -> None:
        self.log.will(seen=self.seen, wrote=wrote)


class Worker:
    def __init__(self, doms: DomainList, plan: Plan, who: str) -> None:
        self.doms, self.who, self.domains = doms, who, plan.domains
        self.log = Recorder(plan.folder, who)
        self.chance = random.Random(f"{plan.seed} {who}")
        self.marks = 0
        self.ids: deque[tuple[int, int]] = deque(maxlen=4)  # with whose they are
        self.kept: tuple[Domain, int, int] | None = None  # a handle, of whom, since when
        self.patience = DEADLINE

    def work(self, calls: int) -> None:
        doings, weights = zip(*DOINGS.items(), strict=True)
        for do in self.chance.choices(doings, weights, k=calls):
            self.patience = self.chance.choice([0, 0.001]) if self.rarely() else DEADLINE
            do(self)

    @contextmanager
    def record(self, do: str, how: str, **what: Any) -> Iterator[Call]:
        """Record what the block does and how it ends; no error comes out of it."""
        call = Call(self.log)
        self.log.call(do=do, how=how, **what)
        try:
            yield call
        except Exception as exc:
            late = isinstance(exc, (LockTimeout, Busy)) and self.patience < DEADLINE
            unknown = f"raised {type(exc).__name__}: {exc}"
            call.outcome = "late" if late else OUTCOMES.get(type(exc), unknown)
        self.log.done(outcome=call.outcome, seen=call.seen, **call.more)
        self.ids.extend((record.id, number) for number, record in call.seen if record.id >= 0)

    # --- at random ---

    def rarely(self) -> bool:
        return self.chance.random() < 0.1

    def perhaps(self) -> bool:
        return self.chance.random() < 0.5

    def mark(self) -> str:
        self.marks += 1
        return f"{self.who}.{self.marks}"

    def any_number(self) -> int:
        return self.chance.randrange(self.domains)

    def any_name(self) -> str:
        return f"web{self.chance.randrange(self.domains + 1)}"

    def any_key(self) -> dict[str, Any]:
        """By what, which one, and whose it is if that is known."""
        by = self.chance.choice(["uuid", "name", "id"] if self.ids else ["uuid", "name"])
        if by == "id":
            id, number = self.chance.choice(self.ids)
            return {"by": by, "key": id, "number": number}
        return uuid_key(self.any_number()) if by == "uuid" else name_key(self.any_name())

    # --- what is done ---

    def look(self) -> None:
        key = self.any_key()
        with self.record("look", "peek", **key) as call:
            call.saw(self.doms.peek(**argument(key), timeout=self.patience))

    def look_at_all(self) -> None:
        self.patience = 1.0  # that is what it gives itself
        with self.record("snapshot", "snapshot", number=self.domains) as call:
            for info in self.doms.snapshot():
                call.saw(info)

    def look_under_lock(self) -> None:
        key, how, since = self.any_key(), self.any_way(), time.monotonic_ns()
        with self.record("look", how, **key) as call, self.find(how, key) as dom:
            call.saw(dom)
            self.kept = dom, number_of(dom), since

    def change(self) -> None:
        key, how = self.any_key(), self.any_way()
        with self.record("change", how, **key) as call, self.find(how, key) as dom:
            self.transaction(call, dom)

    def change_twice(self) -> None:
        """A point of no return part-way: what is seen after it is what was committed by it."""
        key, how, self.patience = self.any_key(), self.any_way(), DEADLINE
        with self.record("change", how, **key) as call:
            dom = self.find(how, key)
            call.saw(dom)
            self.alter(dom)
            call.will(record_of(dom))
            dom.commit(DEADLINE)
        if call.outcome != "done":
            return
        with self.record("change", "go on", **uuid_key(number_of(dom))) as call, dom:
            self.transaction(call, dom)

    def change_kept(self) -> None:
        """Through a handle that was got a while ago."""
        if self.kept is None:
            return
        dom, number, since = self.kept
        with self.record("change", "lock", **uuid_key(number)) as call:
            try:
                dom.lock(self.patience)
            except DomainRemoved:
                call.more["since"] = since
                raise
            with dom:
                self.transaction(call, dom)

    def define(self) -> None:
        number, version = self.any_number(), self.mark()
        name = f"web{number}" if self.perhaps() else self.any_name()
        definition = ONE.replace(name=name, uuid=UUID(int=number + 1), title=version)
        what = {"number": number, "name": name, "version": version}
        if self.perhaps():
            with self.record("define", "define", persistent=True, **what) as call:
                call.saw(self.doms.define(definition, self.patience))
            return
        persistent = self.chance.choice([None, False, True])
        with (
            self.doms.locked(DEADLINE),
            self.record("define", "assign_def", persistent=persistent, **what) as call,
            self.doms.assign_def(definition, persistent, self.patience) as dom,
        ):
            call.saw(dom)

    def undefine(self) -> None:
        key = self.any_key()
        if key["by"] != "name":
            with self.record("undefine", "undefine", **key):
                self.doms.undefine(**argument(key), timeout=self.patience)
            return
        # It does not say whom it found; while the list is held, that is who has the name.
        with self.doms.locked(DEADLINE):
            with self.record("look", "peek", **key) as call:
                call.saw(self.doms.peek(**argument(key), timeout=self.patience))
            key["number"] = call.seen[0][0] if call.seen else None
            with self.record("undefine", "undefine", **key):
                self.doms.undefine(**argument(key), timeout=self.patience)

    def remove(self) -> None:
        key = self.any_key()
        with self.doms.locked(DEADLINE):
            with self.record("look", "find", **key) as call, self.find("find", key) as dom:
                call.saw(dom)
            if call.outcome != "done":
                return
            with self.record("remove", "remove_inactive", **uuid_key(number_of(dom))):
                self.doms.remove_inactive(dom, self.patience)

    def rename(self) -> None:
        key, name = self.any_key(), self.any_name()
        with (
            self.doms.locked(DEADLINE),
            self.record("rename", "rename", **key, name=name) as call,
            self.find("find", key) as dom,
        ):
            call.saw(dom)
            if dom.name == name:
                raise RolledBack
            call.will(record_of(dom)._replace(name=name))
            self.doms.rename(dom, name, self.patience)

    # --- parts of it ---

    def any_way(self) -> str:
        return self.chance.choice(["get", "lookup", "lock the list and find"])

    def find(self, how: str, key: dict[str, Any]) -> Domain:
        """Look a domain up, and lock it."""
        dom: Domain | None
        if how == "get":
            return self.doms.get(**argument(key), timeout=self.patience)
        if how == "lookup":
            dom = self.doms.lookup(**argument(key), timeout=self.patience)
        elif how == "find":
            find = getattr(self.doms, f"find_by_{key['by']}")
            dom = find(*argument(key).values(), self.patience)
        else:
            with self.doms.locked(self.patience):
                return self.find("find", key)
        if dom is None:
            raise DomainNotFound
        return dom

    def transaction(self, call: Call, dom: Domain) -> None:
        """In a ``with`` block: see, change, and commit at its end, or raise."""
        call.saw(dom)
        self.alter(dom)
        if self.perhaps():
            os.sched_yield()  # somebody may come in between now, if somebody can
        if self.rarely():
            raise RolledBack
        call.will(record_of(dom))

    def alter(self, dom: Domain) -> None:
        size = 9 if self.perhaps() else 60  # in the record, or most often in the heap
        dom.data = [self.mark()] * self.chance.randint(1, size)
        if self.rarely():
            dom.persistent = not dom.persistent
        if self.perhaps():
            return
        if not dom.is_active:
            dom.activate(pid=os.getpid(), timeout=DEADLINE)
        elif self.perhaps():
            dom.deactivate()
        else:
            dom.set_state(self.chance.choice(STATES))


DOINGS: dict[Callable[[Worker], None], int] = {
    Worker.look: 25,
    Worker.look_at_all: 4,
    Worker.look_under_lock: 10,
    Worker.change: 30,
    Worker.change_twice: 5,
    Worker.change_kept: 5,
    Worker.define: 14,
    Worker.undefine: 4,
    Worker.remove: 4,
    Worker.rename: 8,
}


def uuid_key(number: int) -> dict[str, Any]:
    return {"by": "uuid", "key": number, "number": number}


def name_key(name: str) -> dict[str, Any]:
    return {"by": "name", "key": name, "number": None}


def argument(key: dict[str, Any]) -> dict[str, Any]:
    return {key["by"]: UUID(int=key["key"] + 1) if key["by"] == "uuid" else key["key"]}


def work(pipe: Pipe, doms: DomainList, plan: Plan, who: str) -> None:
    Worker(doms, plan, who).work(plan.calls)
    pipe.say("done")


# --- the director ---------------------------------------------------------------------------------


def direct(pipe: Pipe, plan: Plan) -> None:
    """Says when whom died, and what is wrong with the list in the end."""
    if plan.bug is not None:
        plant(plan.bug)
    doms: Any
    if plan.lock == "postgres":
        from shmdomains.postgres import PostgresDomainList

        doms = PostgresDomainList.create(plan.url)
    else:
        doms = DomainList(max_domains=16, lock=plan.lock)
    company = _Company(doms, plan)
    deaths = dict(company.kill_one() for _ in range(plan.deaths))
    company.finish()
    await_end(doms)
    _look_at_the_end(doms, plan)
    pipe.say((deaths, doms.check().problems))


def await_end(doms: Any, pid: int | None = None) -> None:
    """A server may still do what somebody who is dead has sent: until it has seen the end."""
    if isinstance(doms, DomainList):
        return
    until(
        lambda: not [one for one in doms._others() if pid in (None, one.pid)],
        "the server sees the end",
    )


class _Company:
    """The workers that are there."""

    def __init__(self, doms: DomainList, plan: Plan) -> None:
        self._doms, self._plan = doms, plan
        self._chance = random.Random(plan.seed)
        self._hired = 0
        self._workers: dict[str, Child] = {}
        for _ in range(plan.workers):
            self._hire()

    def _hire(self) -> None:
        self._hired += 1
        who = f"w{self._hired}"
        self._workers[who] = fork(work, self._doms, self._plan, who)

    def kill_one(self) -> tuple[str, int]:
        """Whom, and when it was dead. Who is done by then is let go, and others come."""
        while True:
            who = self._chance.choice(list(self._workers))
            worker = self._workers.pop(who)
            done = self._wait_for_record(who, worker, self._chance.randint(1, 4000))
            self._hire()
            if done:
                _part(worker)
                continue
            worker.kill()
            await_end(self._doms, worker.pid)
            died = time.monotonic_ns()
            worker.close()
            return who, died

    def _wait_for_record(self, who: str, worker: Child, more: int) -> bool:
        """Until it has written so many bytes, or has done all: true."""
        file = self._plan.folder / who
        goal = (file.stat().st_size if file.exists() else 0) + more
        until(
            lambda: worker.conn.poll(0) or (file.exists() and file.stat().st_size >= goal),
            f"{who} goes on",
        )
        return worker.conn.poll(0)

    def finish(self) -> None:
        for worker in self._workers.values():
            _part(worker)


def _part(worker: Child) -> None:
    assert worker.hear(10 * DEADLINE) == "done"
    worker.join()
    worker.close()


def _look_at_the_end(doms: DomainList, plan: Plan) -> None:
    last = Worker(doms, plan, "end")
    keys = [uuid_key(number) for number in range(plan.domains)]
    keys += [name_key(f"web{number}") for number in range(plan.domains + 1)]
    for key in keys:
        with last.record("look", "peek", **key) as call:
            call.saw(doms.peek(**argument(key)))
        with last.record("look", "get", **key) as call, doms.get(**argument(key), timeout=0) as dom:
            call.saw(dom)
    last.look_at_all()
