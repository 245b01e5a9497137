"""What the list's rules do about jobs: whatever excludes a job that modifies a domain also excludes
removing, renaming or redefining it.

A rule takes no job itself. It looks with the domain locked (`check`), so none begins before it is
done. If a job of another thread is in the way, the rule gives up what it locked, waits (`wait`) and
begins again.
"""

from __future__ import annotations

from typing import Any

from ..errors import DomainBusy, LockOrder
from ..job import Job
from .jobs import blocking, held_jobs, is_mine, timed_out, wait_while
from .store import Deadline, DomainBase, ListBase
from .work import Begun, Caller, Work


class Excluded(Exception):
    """A job of another thread excludes what a rule is about to do; never leaves the rules."""

    def __init__(self, dom: DomainBase) -> None:
        self.dom = dom


def _excluding(dom: DomainBase, work: Work | None, me: Caller) -> list[Begun]:
    return [job for job in blocking(dom, work, Job.MODIFY, me) if not is_mine(dom, job)]


def check(dom: DomainBase) -> None:
    """Raise `Excluded` if a living job of another thread excludes a change such as removing the
    domain. Domain locked, so none begins meanwhile."""
    work = dom._work
    if work is not None and work.jobs and _excluding(dom, work, dom._caller()):
        raise Excluded(dom)


def wait(doms: ListBase[Any], excluded: Excluded, deadline: Deadline) -> None:
    """Wait until no job excludes the rule any more. `DomainBusy` at the deadline.

    What the rule locked it has unlocked when it raises `Excluded`. What the caller had locked stays
    so in the wait. The job's holder needs the domain to end the job, so there is no wait if the
    caller has it locked; and none without an end if the caller holds the list lock, which others
    need.
    """
    dom = excluded.dom
    me = dom._caller()
    endless = deadline.left() is None
    mine = held_jobs(doms) if endless and not dom.is_locked else ()
    if mine:
        raise LockOrder(
            f"{doms._this} holds job '{mine[-1]._operation}' and would wait for another "
            "without an end; give a timeout"
        ) from None
    then = ""
    if dom.is_locked:
        then = "; it is not waited for with the domain locked"
    elif endless and doms.is_locked:
        then = "; with the list locked it is waited for only with a timeout"

    def error(name: str, begun: Begun) -> DomainBusy:
        busy = timed_out(DomainBusy, dom, name, begun, then)
        busy.__suppress_context__ = True  # `Excluded` is nobody's business
        return busy

    at_once = doms._deadline(0) if then else deadline
    wait_while(doms, dom, at_once, lambda work: _excluding(dom, work, me), error)
