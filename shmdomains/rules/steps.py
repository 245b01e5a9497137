"""A rule that changes a record and its files finishes, or vanishes, wherever its process is killed.

Record and directory are two places, so such a rule is more than one step. It first commits what it
is about to do, a `Step`, into the record. Then it changes the files, and its commit of the record
ends the step. So whoever locks a domain and meets a step knows that the rule's process died, or
could not undo its work: a living rule keeps the domain locked until its step has ended.

The record is the truth, and the rule's commit decides: before it the files go back, after it there
is no step any more. `settle` makes the files what the record says:

- persistent: NAME.xml holds its next definition, else its definition; the autostart link is there
  if the record says so; the step's other names have no file of this domain and no link to it.
- transient: none of the step's names has a file of this domain or a link to it.
- A new domain is inserted transient, with its step. It cannot be removed here: that takes the list
  lock, which comes first. So it is finished: the file is written, then the record is persistent.

Settling writes first and removes then, so a process killed while it settles leaves the rest to the
next one. What cannot be settled (no such directory, a full disk) is logged, the step stays, and the
domain is handed out all the same: nothing blocks a domain.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import UUID

from ..config.change import ConfigDirs
from ..deadline import Deadline as PlainDeadline
from ..errors import DomainRemoved, LockTimeout, SegmentFull, ShmDomainsError
from ..text import shown_path
from .owner import Owner
from .store import Deadline, DomainBase, ListBase
from .work import Step, Work, replaced

logger = logging.getLogger(__name__)

SLICE = 0.05  # seconds: one lock slice, the least that taking something back may take


class Commit:
    """The commit of one record, which ends the step that was begun; see `config.change.Commit`.

    `make` is given what is under way in the domain once it is committed, and commits that, too.
    """

    def __init__(self, dom: DomainBase, make: Callable[[Work | None], object]) -> None:
        self._dom = dom
        self._make = make
        self._before = dom._receipt
        self._verdict: bool | None = None
        self._step: Step | None = None
        self._former: Step | None = None
        self._files_stay = False

    def __call__(self) -> None:
        work = self._dom._work
        if self._step is not None:
            work = replaced(work, step=self._former)
        self._make(work)

    def happened(self) -> bool:
        if self._verdict is not None:
            return self._verdict
        return bool(self._dom._receipt != self._before)

    def not_undone(self) -> None:
        self._files_stay = True

    def run(
        self,
        doms: ListBase[Any],
        step: Step,
        deadline: Deadline,
        change: Callable[[], object],
        needs_room: bool = True,
    ) -> None:
        """Commit the step, then `change` the files, which calls this commit.

        If it fails, the step ends with a commit of its own, which needs no room in the segment; if
        files could not be put back, it stays for whoever locks the domain next. A rule that never
        `needs_room` goes on without a step when the segment is full.
        """
        try:
            try:
                self._begin(doms, step, deadline)
            except SegmentFull:
                if needs_room:
                    raise
            change()
        except BaseException:
            self._verdict = self.happened()
            # If a signal handler forked, the child does not hold the domain: that is its parent's.
            if not self._verdict and not self._files_stay and self._dom.is_locked:
                with suppress(ShmDomainsError):  # then the next holder settles it
                    self._end(deadline.left())
            raise

    def _begin(self, doms: ListBase[Any], step: Step, deadline: Deadline) -> None:
        work = self._dom._work
        if work is not None and work.step is not None and work.step != step:
            # It could not be settled when the domain was locked.
            if not self._dom.changed:
                settle(doms, self._dom, deadline.left())
                work = self._dom._work
            self._former = None if work is None else work.step
            step = _joined(step, self._former)
        self._step = step
        if work is None or work.step != step:
            self._dom._commit_work(replaced(work, step=step), deadline.left())
            self._before = self._dom._receipt

    def _end(self, left: float | None) -> None:
        dom, step = self._dom, self._step
        work = dom._work
        if step is not None and work is not None and work.step == step:
            left = None if left is None else max(left, SLICE)
            dom._commit_work(replaced(work, step=self._former), left)


def _joined(step: Step, former: Step | None) -> Step:
    """The step with the names of the former one, if that is in the same directories."""
    if former is None or former.dirs != step.dirs:
        return step
    names = dict.fromkeys(step.names + former.names)
    return Step.of(step.rule, step.dirs, *names, defines=step.defines or former.defines)


def names_of(dom: DomainBase, dirs: ConfigDirs, owner: Owner) -> Iterator[str]:
    """The domain's name, and that of its file if it is not named after it."""
    name = dom.name
    yield name
    if not os.path.lexists(dirs.config_file(name)):
        found = owner.find()
        if found is not None:
            yield found.stem


# --- settling -------------------------------------------------------------------------------


def settle(doms: ListBase[Any], dom: DomainBase, timeout: float | None) -> None:
    """Make the files what the record says, and end its step. The store calls this with the domain
    just locked, before it hands it out.

    Raises `LockTimeout` if the directory's lock was not free within `timeout` seconds. Whatever
    else prevents it is logged, and the step stays.
    """
    deadline = PlainDeadline(timeout)
    step = None
    try:
        work = dom._work
        step = None if work is None else work.step
        if step is not None:
            _settle(doms, dom, step, deadline)
    except LockTimeout:
        raise
    except (ShmDomainsError, OSError) as exc:
        dom.rollback()
        _warn(dom, step, exc)


def _settle(doms: ListBase[Any], dom: DomainBase, step: Step, deadline: Deadline) -> None:
    dirs = step.dirs
    owner = Owner(doms, dom, dirs)
    persistent = dom.persistent or step.defines

    def make(work: Work | None) -> None:
        if dom.persistent != persistent:
            dom.persistent = persistent
        dom._work = replaced(work, step=None)
        dom.commit(deadline.left())

    dirs.settle(
        dom.name,
        (dom.next_definition or dom.definition) if persistent else None,
        step.names,
        deadline.left(),
        Commit(dom, make),
        autostart=dom.autostart,
        create=step.defines,
        owner=owner,
    )


_warned: dict[UUID, Step | None] = {}


def _warn(dom: DomainBase, step: Step | None, exc: Exception) -> None:
    """Once for each step: everybody who locks the domain tries again."""
    uuid = dom.uuid
    if uuid in _warned and _warned[uuid] == step:
        return
    if len(_warned) == 1000:
        _warned.clear()
    _warned[uuid] = step
    begun = "what was begun with it" if step is None else f"the {step.rule} that was begun"
    place = "" if step is None else f" in {shown_path(step.dirs.config_dir)}"
    logger.warning(
        "domain '%s': %s is not settled%s, and is tried again whenever the domain is locked: %s",
        dom.name,
        begun,
        place,
        exc,
    )


class Settled(NamedTuple):
    """A domain that had a step; `left`: why it still has one."""

    name: str
    left: LockTimeout | None


def settle_all(doms: ListBase[Any], timeout: float | None) -> list[Settled]:
    """Lock every domain with a step, so that it is settled.

    `timeout` in seconds is for each of them; one that was not free in time is left to its holder.
    """
    found = []
    for dom in doms._unfinished():
        info = doms.peek(uuid=dom.uuid)
        if info is None or dom.is_locked:
            continue
        try:
            dom.lock(timeout)
            work = dom._work
            if work is None or work.step is None:
                found.append(Settled(dom.name, None))
        except LockTimeout as exc:
            # Its traceback leads back here, and so to the list.
            found.append(Settled(info.name, exc.with_traceback(None)))
        except DomainRemoved:
            pass
        finally:
            dom._release_unseen()
    return found


def make_way(doms: ListBase[Any], dirs: ConfigDirs, name: str) -> None:
    """Before a domain gets a name that no other one has: if there is a file of this name, a process
    may have died renaming a domain to it, so settle what is not held by anybody."""
    if os.path.lexists(dirs.config_file(name)):
        settle_all(doms, 0)
