"""What one worker of a stress run does, until it is told to stop or killed.

It picks operations and domains at random, half of the time among a few that all workers want, and
uses the public interface only, as a VM manager's worker would: no lock is held while it chooses,
every wait has a time-out. Before each change it writes its intent into its page of the journal and
after it the acknowledgement; see journal.py.

Every domain it looks at is checked as it passes: the parts of a record must agree, a domain that
was loaded must be there, and the worker's own count of changes must be what it acknowledged. The
first contradiction, and every exception that is not expected, ends the worker, with the reason in
its page.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import Busy, DomainRemoved, LockTimeout
from ..memory.domain import Domain
from ..rules.info import DomainInfo
from ..states import DomainState, PausedReason, RunningReason, ShutoffReason
from .cluster import OUTAGE, judge, on_its_host, patiently
from .journal import (
    OWN,
    Intent,
    Journal,
    Kind,
    Mark,
    Plan,
    Word,
    Wrong,
    description_of,
    next_description_of,
    settle,
    verify,
)

if TYPE_CHECKING:
    from ..opening import AnyDomainList

HOT = 8  # domains that everybody wants
SMALL = 2000  # a list of up to so many is looked at with all its definitions
RUNNING = (DomainState.RUNNING, RunningReason.BOOTED)
UNPAUSED = (DomainState.RUNNING, RunningReason.UNPAUSED)
PAUSED = (DomainState.PAUSED, PausedReason.USER)


FAILED = 1

_clock = time.perf_counter_ns


class _Undo(Exception):
    """Raised to leave a ``with`` block on purpose."""


def work(doms: AnyDomainList, journal: Journal, plan: Plan, number: int, seed: int) -> None:
    """The target of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends us in order
    page = journal.pages[number]
    try:
        Worker(on_its_host(doms, plan, number), journal, plan, number, seed).run()
    except (LockTimeout, Busy) as exc:
        page.text = f"stuck while it was about to {page.doing}: {exc}"
        raise SystemExit(FAILED) from None
    except Wrong as exc:
        page.text = str(exc)
        raise SystemExit(FAILED) from None
    except BaseException as exc:
        page.text = in_one_line(exc)
        raise SystemExit(FAILED) from None


def in_one_line(exc: BaseException) -> str:
    """An exception and where it came from.

    >>> try:
    ...     int("x")
    ... except ValueError as exc:
    ...     in_one_line(exc).startswith("ValueError: invalid literal for int")
    True
    """
    frames = traceback.extract_tb(exc.__traceback__)
    path = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text} (at {path})"


class Worker:
    """One incarnation of worker `number`."""

    def __init__(
        self, doms: AnyDomainList, journal: Journal, plan: Plan, number: int, seed: int
    ) -> None:
        self._doms = doms
        self._journal = journal
        self._plan = plan
        self._number = number
        self._page = journal.pages[number]
        self._random = random.Random(seed)
        self._parent = os.getppid()
        self._timeout = plan.lock_timeout
        self._loaded = {uuid: target for target, (uuid, _) in enumerate(plan.loaded)}
        self._waited = 0
        self._ids: list[int] = []  # some that were seen on active domains
        self._room_for_ids = True
        self._kept: Domain | None = None  # a handle from an earlier visit, perhaps stale
        # A million domains take about a second; a new worker has better things to begin with.
        self._snapshot_after = _clock() + int(self._random.random() * plan.domains * 20_000)
        weights: list[tuple[int, Callable[[], None]]] = [
            (12, lambda: self._get(Kind.GET_UUID)),
            (12, lambda: self._get(Kind.GET_NAME)),
            (8, lambda: self._get(Kind.GET_ID)),
            (6, lambda: self._find(Kind.FIND_UUID)),
            (6, lambda: self._find(Kind.FIND_NAME)),
            (4, lambda: self._find(Kind.FIND_ID)),
            (12, self._power),
            (5, self._assign),
            (5, self._roll_back),
            (4, self._define),
            (3, self._remove),
            (3, self._rename),
            (4, self._visit),
            (14, self._peek),
            (2, self._snapshot),
        ]
        self._operations = [operation for _, operation in weights]
        self._weights = list(accumulate(weight for weight, _ in weights))

    # --- the loop ---

    def run(self) -> None:
        patiently(self._plan, self._prepare_work)
        self._page.add(Word.READY)
        while not self._journal.stopped and os.getppid() == self._parent:
            try:
                self.step()
            except OUTAGE as exc:
                if not self._plan.server_dies:
                    raise
                judge(self._doms, self._journal, self._plan, self._number, exc)

    def _prepare_work(self) -> None:
        settle(self._doms, self._journal, self._plan, self._number, self._timeout)
        self._templates = [
            self._info_of(self._plan.uuid_of(target)).definition
            for target in range(min(HOT, self._plan.domains))
        ]

    def step(self) -> None:
        """One operation, chosen at random."""
        (operation,) = self._random.choices(self._operations, cum_weights=self._weights)
        operation()
        self._page.add(Word.STEPS)
        self._page.words[Word.DOING] = 0

    def _begin(self, kind: Kind) -> int:
        self._waited = 0
        self._page.words[Word.DOING] = kind + 1
        return _clock()

    def _end(self, kind: Kind, began: int) -> None:
        self._page.note(kind, _clock() - began, self._waited)

    # --- choosing ---

    def _some_domain(self) -> int:
        domains = self._plan.domains
        hot = min(HOT, domains)
        chance = self._random.random() * 2
        return int(chance * hot) if chance < 1 else int((chance - 1) * domains)

    def _own_place(self, used: bool) -> int | None:
        """A place in the table of own domains, with or without one in it."""
        places = [n for n in range(OWN) if bool(self._page.own(n)[0]) == used]
        return self._random.choice(places) if places else None

    def _uuid_of(self, target: int) -> bytes:
        if target < self._plan.domains:
            return self._plan.uuid_of(target)
        return self._plan.own_uuid(self._number, self._page.own(target - self._plan.domains)[0])

    def _name_of(self, target: int) -> str:
        if target < self._plan.domains:
            return self._plan.name_of(target)
        return self._plan.own_name(self._number, *self._page.own(target - self._plan.domains))

    def _target_of(self, uuid: bytes) -> int | None:
        """The number of a domain that was met by its id; ``None``: it is another worker's own."""
        known = self._loaded.get(uuid)
        if known is None:
            known = self._plan.number_of(uuid)
        if known is not None:
            return known
        serials = [self._page.own(place)[0] for place in range(OWN)]
        mine = [place for place, serial in enumerate(serials) if serial]
        for place in mine:
            if self._plan.own_uuid(self._number, serials[place]) == uuid:
                return self._plan.domains + place
        return None

    # --- finding ---

    def _key(self, kind: Kind) -> tuple[int | None, str, Any] | None:
        """(target, by what, key); the target behind an id is not known beforehand."""
        if kind in (Kind.GET_ID, Kind.FIND_ID):
            return (None, "id", self._random.choice(self._ids)) if self._ids else None
        target = self._some_domain()
        if kind in (Kind.GET_UUID, Kind.FIND_UUID):
            return target, "uuid", self._uuid_of(target)
        return target, "name", self._name_of(target)

    def _get(self, kind: Kind) -> None:
        key = self._key(kind)
        if key is None:
            return
        target, by, value = key
        began = self._begin(kind)
        by_what: dict[str, Any] = {by: value}
        dom = self._doms.lookup(timeout=self._timeout, **by_what)
        self._waited = _clock() - began
        self._change_found(kind, began, dom, target, value)

    def _find(self, kind: Kind) -> None:
        """The patch's way: under the list lock, which goes once the domain is ours."""
        key = self._key(kind)
        if key is None:
            return
        target, by, value = key
        find = getattr(self._doms, f"find_by_{by}")
        began = self._begin(kind)
        with self._doms.locked(self._timeout):
            dom = find(value, self._timeout)
        self._waited = _clock() - began
        self._change_found(kind, began, dom, target, value)

    def _change_found(
        self, kind: Kind, began: int, dom: Domain | None, target: int | None, value: Any
    ) -> None:
        if dom is None:
            self._missed(target, value)
            return
        with dom:
            if target is None:
                if dom.id != value:
                    raise Wrong(f"torn: found {dom.name!r} with id {dom.id} by id {value}")
                target = self._target_of(dom.uuid.bytes)
            if target is None:
                self._look_at(dom)
            else:
                self._change(dom, target)
        self._end(kind, began)

    def _missed(self, target: int | None, value: Any) -> None:
        if target is not None:
            raise Wrong(f"lost: domain {self._name_of(target)!r} was not found by {value!r}")
        self._page.add(Word.MISSES)
        with suppress(ValueError):
            self._ids.remove(value)

    def _got(self, target: int, began: int) -> Domain:
        """The domain, locked; it has to be there."""
        key = self._uuid_of(target)
        dom: Domain | None = self._doms.lookup(uuid=key, timeout=self._timeout)
        self._waited = _clock() - began
        if dom is None:
            raise Wrong(f"lost: domain {self._name_of(target)!r}")
        return dom

    def _info_of(self, uuid: bytes) -> DomainInfo:
        info = self._doms.peek(uuid=uuid, definitions=True)
        if info is None:
            raise Wrong(f"lost: a domain that was loaded, {uuid.hex()}")
        return info

    # --- changing ---

    def _look_at(self, record: Domain | DomainInfo) -> Mark:
        mark = verify(record, self._plan.workers)
        self._page.add(Word.READS)
        if mark.id != -1:
            self._remember_id(mark.id)
        return mark

    def _remember_id(self, id: int) -> None:
        if len(self._ids) < 32:
            self._ids.append(id)
        else:
            self._ids[self._random.randrange(32)] = id

    def _change(
        self, dom: Domain, target: int, how: Callable[[Domain, Mark], Mark] | None = None
    ) -> None:
        """One change of a locked domain, committed and acknowledged. The domain is unlocked."""
        self._prepare(dom, dom, target, how or self._touch)
        dom.unlock()
        self._acknowledge(target)

    def _prepare(
        self,
        dom: Domain,
        committed: Domain | DomainInfo,
        target: int,
        how: Callable[[Domain, Mark], Mark],
    ) -> None:
        """Enter one change of a locked domain into its transaction, and the intent of it."""
        if dom.previous_owner_died is not None:
            self._page.add(Word.RECOVERIES)
        mark = self._look_at(committed)
        acknowledged = self._page.acked[target]
        if mark.by[self._number] != acknowledged:
            raise Wrong(
                f"lost: domain {dom.name!r} has {mark.by[self._number]} changes by worker "
                f"{self._number}, which had {acknowledged} acknowledged"
            )
        by = list(mark.by)
        by[self._number] += 1
        mark = msgspec.structs.replace(mark, count=mark.count + 1, by=tuple(by))
        self._page.intend(Intent.CHANGE, target, acknowledged + 1)
        mark = how(dom, mark)
        dom.definition = dom.definition.replace(description=description_of(mark.count))
        dom.data = msgspec.structs.astuple(mark)

    def _acknowledge(self, target: int) -> None:
        self._page.acked[target] += 1
        self._page.forget_intent()

    def _touch(self, dom: Domain, mark: Mark) -> Mark:
        if not dom.is_active:
            return mark
        return self._enter(dom, mark, UNPAUSED if dom.state == DomainState.PAUSED else PAUSED)

    def _enter(self, dom: Domain, mark: Mark, state: tuple[DomainState, int]) -> Mark:
        dom.set_state(*state)
        return msgspec.structs.replace(mark, state=int(state[0]), reason=int(state[1]))

    def _activate(self, dom: Domain, mark: Mark) -> Mark:
        id = dom.activate(os.getpid(), state=RUNNING[0], reason=RUNNING[1])
        self._room_for_ids = self._page.log_id(id)
        self._remember_id(id)
        return msgspec.structs.replace(mark, id=id, state=int(RUNNING[0]), reason=int(RUNNING[1]))

    def _deactivate(self, dom: Domain, mark: Mark) -> Mark:
        dom.deactivate(ShutoffReason.DESTROYED)
        state, reason = int(DomainState.SHUTOFF), int(ShutoffReason.DESTROYED)
        return msgspec.structs.replace(mark, id=-1, next=0, state=state, reason=reason)

    # --- operations ---

    def _power(self) -> None:
        """Activate a domain, or deactivate it; now and then one of one's own."""
        place = self._own_place(True) if self._random.random() < 0.2 else None
        target = self._some_domain() if place is None else self._plan.domains + place
        began = self._begin(Kind.ACTIVATE)
        self._switch(self._got(target, began), target, began)

    def _switch(self, dom: Domain, target: int, began: int) -> None:
        with dom:
            if dom.is_active:
                self._change(dom, target, self._deactivate)
                self._end(Kind.DEACTIVATE, began)
            elif self._room_for_ids:
                self._change(dom, target, self._activate)
                self._end(Kind.ACTIVATE, began)

    def _assign(self) -> None:
        """Give a domain that exists another definition; an active one's is for its next start."""
        target = self._some_domain()
        uuid = self._uuid_of(target)
        definition = self._info_of(uuid).definition.replace(description="assigned")
        began = self._begin(Kind.ASSIGN)
        with self._doms.locked(self._timeout):
            dom = self._doms.assign_def(definition, None, self._timeout)
        self._waited = _clock() - began
        with dom:
            # assign_def() began a transaction; what is committed can only be seen from outside.
            self._prepare(dom, self._info_of(uuid), target, self._assigned)
            dom.unlock()
            self._acknowledge(target)
        self._end(Kind.ASSIGN, began)

    def _assigned(self, dom: Domain, mark: Mark) -> Mark:
        assigned = dom.next_definition if dom.is_active else dom.definition
        if assigned is None or assigned.description != "assigned":
            raise Wrong(f"lost: the definition that was assigned to {dom.name!r}")
        if not dom.is_active:
            return mark
        dom.next_definition = assigned.replace(description=next_description_of(mark.count))
        return msgspec.structs.replace(mark, next=mark.count)

    def _roll_back(self) -> None:
        """Change a domain in every way and take it back; half of the time after a commit."""
        target = self._some_domain()
        began = self._begin(Kind.ROLL_BACK)
        with suppress(_Undo), self._got(target, began) as dom:
            if self._random.random() < 0.5:
                self._prepare(dom, dom, target, self._touch)
                dom.commit()
                self._acknowledge(target)
            self._spoil(dom)
            raise _Undo
        self._end(Kind.ROLL_BACK, began)

    def _spoil(self, dom: Domain) -> None:
        if dom.is_active:
            dom.deactivate()
        elif self._room_for_ids:
            id = dom.activate()
            # See `_settle_change`: this id is not used.
            self._room_for_ids = self._plan.server_dies or self._page.log_id(id)
        dom.data = "this was rolled back"
        dom.next_definition = dom.definition
        dom.definition = dom.definition.replace(description="this was rolled back")

    def _define(self) -> None:
        place = self._own_place(False)
        if place is None:
            return
        page = self._page
        serial = page.words[Word.SERIAL] = page.words[Word.SERIAL] + 1
        definition = self._random.choice(self._templates).replace(
            uuid=self._plan.own_uuid(self._number, serial),
            name=self._plan.own_name(self._number, serial, 0),
        )
        page.acked[self._plan.domains + place] = 0
        page.intend(Intent.DEFINE, place, serial)
        began = self._begin(Kind.DEFINE)
        if serial % 2:
            self._doms.define(definition, self._timeout)
        else:
            with self._doms.locked(self._timeout):
                dom = self._doms.assign_def(definition, False, self._timeout)
            dom.unlock()
        self._waited = _clock() - began  # all of it: the waiting was inside
        page.set_own(place, serial, 0)
        page.forget_intent()
        self._end(Kind.DEFINE, began)

    def _remove(self) -> None:
        """Remove one of one's own, if it is inactive; else see to that first."""
        place = self._own_place(True)
        if place is None:
            return
        target = self._plan.domains + place
        uuid = self._uuid_of(target)
        if self._info_of(uuid).is_active:
            began = self._begin(Kind.DEACTIVATE)
            self._switch(self._got(target, began), target, began)
            return
        self._page.intend(Intent.REMOVE, place)
        began = self._begin(Kind.REMOVE)
        if self._random.random() < 0.5:
            self._doms.undefine(uuid=uuid, timeout=self._timeout)
        else:
            self._remove_inactive(uuid)
        self._waited = _clock() - began
        self._page.set_own(place, 0, 0)
        self._page.forget_intent()
        self._end(Kind.REMOVE, began)

    def _remove_inactive(self, uuid: bytes) -> None:
        with self._doms.locked(self._timeout):
            dom = self._doms.find_by_uuid(uuid, self._timeout)
            if dom is None:
                raise Wrong(f"lost: own domain {uuid.hex()}")
            dom.unlock()
            self._doms.remove_inactive(dom, self._timeout)

    def _rename(self) -> None:
        place = self._own_place(True)
        if place is None:
            return
        serial, renames = self._page.own(place)
        began = self._begin(Kind.RENAME)
        with self._doms.locked(self._timeout):
            name = self._plan.own_name(self._number, serial, renames)
            dom = self._doms.find_by_name(name, self._timeout)
            self._waited = _clock() - began
            if dom is None:
                raise Wrong(f"lost: own domain {name!r}")
            with dom:
                if dom.is_active:
                    return
                self._page.intend(Intent.RENAME, place, renames + 1)
                self._doms.rename(dom, self._plan.own_name(self._number, serial, renames + 1))
        self._page.set_own(place, serial, renames + 1)
        self._page.forget_intent()
        self._end(Kind.RENAME, began)

    def _visit(self) -> None:
        """Look at what another worker may be defining, renaming or removing right now."""
        began = self._begin(Kind.VISIT)
        dom = self._kept if self._random.random() < 0.3 else None
        self._kept = None
        if dom is not None:
            try:
                dom.lock(self._timeout)
            except DomainRemoved:
                dom = None
        else:
            dom = self._somebody_elses()
        self._waited = _clock() - began
        if dom is None:
            self._page.add(Word.MISSES)
            return
        with dom:
            if dom.previous_owner_died is not None:
                self._page.add(Word.RECOVERIES)
            self._look_at(dom)
        self._kept = dom
        self._end(Kind.VISIT, began)

    def _somebody_elses(self) -> Domain | None:
        other = self._random.randrange(self._plan.workers)
        serial, renames = self._journal.pages[other].own(self._random.randrange(OWN))
        if not serial:
            return None
        if self._random.random() < 0.5:
            key: dict[str, Any] = {"uuid": self._plan.own_uuid(other, serial)}
        else:
            key = {"name": self._plan.own_name(other, serial, renames)}
        dom: Domain | None = self._doms.lookup(**key, timeout=self._timeout)
        return dom

    def _peek(self) -> None:
        way = self._random.randrange(3)
        target = self._some_domain()
        began = self._begin(Kind.PEEK)
        if way == 0 and self._ids:
            id = self._random.choice(self._ids)
            info = self._doms.peek(id=id, definitions=True)
            if info is not None and info.id != id:
                raise Wrong(f"torn: peek at id {id} found id {info.id}")
        elif way == 1:
            info = self._doms.peek(name=self._name_of(target), definitions=True)
        else:
            info = self._doms.peek(uuid=self._uuid_of(target), definitions=True)
        self._end(Kind.PEEK, began)
        if info is not None:
            self._look_at(info)
        elif way != 0:
            raise Wrong(f"lost: peek did not find domain {self._name_of(target)!r}")

    def _snapshot(self) -> None:
        """All domains, or all that run; of a large list only so often that others get done too."""
        began = self._begin(Kind.SNAPSHOT)
        if began < self._snapshot_after:
            return
        small = self._plan.domains <= SMALL
        if self._random.random() < 0.5:
            infos = self._doms.list(active=True, definitions=small)
            complete = all(info.is_active for info in infos)
        else:
            infos = self._doms.snapshot(small)
            complete = len(infos) >= self._plan.domains
        self._end(Kind.SNAPSHOT, began)
        self._snapshot_after = _clock() + 20 * (_clock() - began)
        if not complete:
            raise Wrong(f"lost: a snapshot shows {len(infos)} of {self._plan.domains} domains")
        if small and infos:
            for info in self._random.choices(infos, k=8):
                self._look_at(info)
