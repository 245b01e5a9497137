"""The commands about guests that nobody is at work on: ``reconcile`` and ``supervise``.

They are ours, not virsh's: libvirt's daemon does both by itself.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from ..rules.info import DomainInfo
from .driving import driver_of, need_driver
from .tables import Failure, UsageFailure, print_lines, print_record, printable
from .types import Target, flag, format_option, timeout_option

if TYPE_CHECKING:
    from ..drivers import Driver

LOOK = 0.5  # seconds between two looks whether the list is gone


@click.command()
@flag("kill-orphans", "End the guests that have no record.")
@click.option("--host", metavar="NAME", help="Another host, which is dead.")
@flag("host-is-dead", "It is: it was fenced, or its power is off. Else its guests run twice.")
@format_option
@timeout_option
@click.pass_obj
def reconcile(
    target: Target,
    kill_orphans: bool,
    host: str | None,
    host_is_dead: bool,
    form: str,
    timeout: float | None,
) -> None:
    """Make the records say which guests there are.

    What killed workers began is finished or undone, guests that ended are off. Guests without a
    record are listed. With --host NAME --host-is-dead the domains of another host are off, and may
    start elsewhere."""
    need_driver(target)
    if (host is None) == host_is_dead:
        raise UsageFailure("--host and --host-is-dead belong together: nobody sees that from here")
    with target.attach() as doms:
        driver = driver_of(target, doms, timeout)
        if host is None:
            record = _reconciled(driver, kill_orphans)
        elif getattr(doms, "host", None) is None:
            raise UsageFailure(f"--host is for a list of several hosts, not for {target.what}")
        else:
            record = {"off": [_shown(info) for info in driver.bury(host)]}
    if form == "json":
        print_record(record)
    else:
        print_lines(printable(line) for line in _lines(record))


def _reconciled(driver: Driver, kill_orphans: bool) -> dict[str, Any]:
    found = driver.reconcile(kill_orphans=kill_orphans)
    orphans = [{"pid": one.pid, "uuid": one.uuid and str(one.uuid)} for one in found.orphans]
    return {
        "running": found.running,
        "settled": [_shown(info) for info in found.settled],
        "off": [_shown(info) for info in found.ended],
        "killed" if kill_orphans else "orphans": orphans,
    }


def _shown(info: DomainInfo) -> dict[str, Any]:
    record = info.to_dict()
    return {name: record[name] for name in ("name", "uuid", "state", "reason")}


_WORDS = {
    "settled": "a killed worker had been at it",
    "off": "its guest was gone",
    "orphans": "a guest without a record",
    "killed": "a guest without a record, ended",
}


def _lines(record: dict[str, Any]) -> list[str]:
    lines = [f"{record['running']} running"] if "running" in record else []
    for kind, words in _WORDS.items():
        for one in record.get(kind, ()):
            if "name" in one:
                lines.append(f"'{one['name']}' {one['state']} ({one['reason']}): {words}")
            else:
                lines.append(f"process {one['pid']} of domain {one['uuid']}: {words}")
    return lines


@click.command()
@timeout_option
@click.pass_obj
def supervise(target: Target, timeout: float | None) -> None:
    """Watch the guests of this host, until it is told to end.

    Guests that end by themselves become shut off, or begin anew, as their definitions say. Of all
    who do this one is elected, and another one goes on when it dies."""
    need_driver(target)
    _let_many_files_be_open()
    with target.attach() as doms, _told_to_end() as end:
        driver = driver_of(target, doms, timeout)
        with driver.supervise() as election:
            click.echo(f"Supervising {printable(target.shown)}; end with Ctrl-C", err=True)
            while election.running and not end.wait(LOOK):
                pass
            if not end.is_set():
                raise Failure("the supervision is over: the list was closed or removed")


@contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    """Set by SIGTERM."""
    end = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: end.set())
    try:
        yield end
    finally:
        signal.signal(signal.SIGTERM, before)


def _let_many_files_be_open() -> None:
    """Two for each guest; a shell's limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
