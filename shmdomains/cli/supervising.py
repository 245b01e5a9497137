"""What ``reconcile`` and ``supervise`` do, which `lifecycle` loads when they are called."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from .driving import driver_of
from .tables import (
    Column,
    Failure,
    UsageFailure,
    count_text,
    print_record,
    print_table,
    printable,
)
from .types import Target

if TYPE_CHECKING:
    from ..drivers import Driver, Reconciled
    from ..drivers.hooks import Orphan
    from ..rules.info import DomainInfo

_LOOK = 0.2  # seconds between two looks whether the supervision is over


def reconciled(
    target: Target, kill_orphans: bool, host: str | None, timeout: float | None, form: str
) -> None:
    with target.attach() as doms:
        driver = driver_of(target, doms, timeout)
        if host is None:
            _print(driver.reconcile(kill_orphans), kill_orphans, form)
        elif not hasattr(doms, "host"):
            raise UsageFailure(f"{target.what} has one host, this one; --host is for lists of more")
        else:
            _print_buried(host, driver.bury(host), form)


def _print(found: Reconciled, killed: bool, form: str) -> None:
    if form == "json":
        print_record(
            {
                "running": found.running,
                "ended": [_record(info) for info in found.ended],
                "settled": [_record(info) for info in found.settled],
                "orphans": [{**_orphan(orphan), "killed": killed} for orphan in found.orphans],
            }
        )
        return
    rows = [
        *((info.name, "its guest had ended", _state(info)) for info in found.ended),
        *((info.name, "left by a dead worker", _state(info)) for info in found.settled),
        *(
            (one.name or str(one.uuid or "-"), _without(one), "killed" if killed else "left")
            for one in found.orphans
        ),
    ]
    if rows:
        print_table([Column("Name"), Column("Found"), Column("Now")], rows)
    click.echo(f"{count_text(found.running, 'guest')} running")


def _print_buried(host: str, buried: list[DomainInfo], form: str) -> None:
    if form == "json":
        print_record({"host": host, "buried": [_record(info) for info in buried]})
        return
    for info in buried:
        click.echo(printable(f"Domain '{info.name}' ran on '{host}': {_state(info)}"))
    click.echo(printable(f"{count_text(len(buried), 'domain')} of host '{host}' marked"))


def _without(orphan: Orphan) -> str:
    what = f" ({orphan.what})" if orphan.what else ""
    return f"process {orphan.pid} without a record{what}"


def _orphan(orphan: Orphan) -> dict[str, Any]:
    uuid = None if orphan.uuid is None else str(orphan.uuid)
    return {"pid": orphan.pid, "uuid": uuid, "name": orphan.name, "what": orphan.what}


def _record(info: DomainInfo) -> dict[str, Any]:
    return {"name": info.name, "uuid": str(info.uuid), "state": info.state.words} | (
        {"reason": reason} if (reason := _reason(info)) else {}
    )


def _state(info: DomainInfo) -> str:
    reason = _reason(info)
    return f"{info.state.words} ({reason})" if reason else info.state.words


def _reason(info: DomainInfo) -> str:
    return info.reason.name.lower().replace("_", " ") if hasattr(info.reason, "name") else ""


# --- supervise ------------------------------------------------------------------------------


def supervised(target: Target, timeout: float | None) -> None:
    _let_many_files_be_open()
    with target.attach() as doms, _terminated() as stop:
        driver: Driver = driver_of(target, doms, timeout)
        with driver.supervise() as election:
            leads = False
            click.echo(printable(f"Supervising the guests of {target.what}"))
            while election.running and not stop.wait(_LOOK):
                if election.leader and not leads:
                    leads = True
                    click.echo("This process watches them")
            if not stop.is_set():
                raise Failure("the supervision is over: the list is closed, or its lock is gone")


@contextmanager
def _terminated() -> Iterator[threading.Event]:
    """Set by SIGTERM."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _let_many_files_be_open() -> None:
    """Two for each guest; a shell's limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
