"""What operators look at: ``shmdomains locks``, who holds which lock, what for, and who waits; and
``shmdomains metrics``, which serves the same and more to Prometheus.

They take no lock, so they answer when everything is stuck. What `metrics` needs is imported when it
runs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from msgspec.structs import asdict

from ..memory.held import LockInfo
from ..memory.invariants import lock_text
from .tables import (
    Column,
    Failure,
    describe,
    is_terminal,
    print_line,
    print_records,
    print_table,
)
from .types import Target, flag, format_option, plainly, seconds, segment_argument

if TYPE_CHECKING:
    from ..metrics.server import Scrapes
    from ..opening import AnyDomainList

_EVERY = "2"
_SHORTEST = 0.05

_COLUMNS = [
    Column("Lock"),
    Column("Held by", colour=lambda cell: "red" if cell.endswith("dead") else None),
    Column("Held for", right=True),
    Column("Doing"),
    Column("Waiting", right=True),
    Column("Longest", right=True),
    Column("Command"),
]


@click.command()
@click.option(
    "--watch",
    is_flag=False,
    flag_value=_EVERY,
    default=None,
    type=seconds,
    metavar="[SECONDS]",
    help=f"Again every so many seconds ({_EVERY}), until Ctrl-C.",
)
@format_option
@click.pass_obj
def locks(target: Target, watch: float | None, form: str) -> None:
    """List the locks that are held or waited for.

    By whom, for how long, for what if the holder said it, how many wait, and how long the first of
    them has waited. Nobody is stopped. With --watch and --format json each look is one line.
    """
    with target.attach() as doms:
        if watch is None:
            _print(doms.locks(), form)
            return
        while True:
            _print_again(doms, form)
            time.sleep(max(watch, _SHORTEST))


def _print(found: list[LockInfo], form: str) -> None:
    if form == "json":
        print_records([_record(lock) for lock in found])
    else:
        print_table(_COLUMNS, _rows(found))


def _print_again(doms: AnyDomainList, form: str) -> None:
    if form == "json":
        print_line({"time": time.time(), "locks": [_record(lock) for lock in doms.locks()]})
        return
    found = doms.locks()
    if is_terminal():
        click.clear()
    print_table(_COLUMNS, _rows(found))
    if not is_terminal():
        click.echo()


def _rows(found: list[LockInfo]) -> Iterator[list[str]]:
    for lock in found:
        holder = lock.holder
        cells = ["-", "-", "-", "-"]
        if holder is not None:
            cells = [
                holder.who if holder.alive else f"{holder.who}, dead",
                _time_text(holder.held_for),
                holder.operation or "-",
                holder.command or "-",
            ]
        who, held_for, doing, command = cells
        longest = _time_text(lock.longest_wait) if lock.waiting else "-"
        waiting = str(lock.waiting)
        yield [lock_text(lock.kind, lock.name), who, held_for, doing, waiting, longest, command]


def _time_text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def _record(lock: LockInfo) -> dict[str, Any]:
    return {
        "lock": lock.kind,
        "domain": lock.name,
        "uuid": None if lock.uuid is None else str(lock.uuid),
        "holder": None if lock.holder is None else asdict(lock.holder),
        "waiting": lock.waiting,
        "longest_wait": lock.longest_wait,
    }


# --- metrics ----------------------------------------------------------------------------------

_LISTEN = "127.0.0.1:9177"


class _Address(NamedTuple):
    host: str
    port: int


def _address(value: str) -> _Address:
    """Read where to listen.

    >>> _address("[::1]:9177"), _address(":9177").host
    (_Address(host='::1', port=9177), '')
    """
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]*):([0-9]{1,5})", value)
    if match is None or int(match[2]) > 65535:
        raise click.BadParameter(f"{value!r} is no ADDRESS:PORT.")
    return _Address(match[1].strip("[]"), int(match[2]))


@click.command()
@segment_argument
@click.option(
    "--listen",
    metavar="ADDRESS:PORT",
    type=_address,
    default=_LISTEN,
    show_default=True,
    help="Where to serve; port 0 takes a free one.",
)
@flag("once", "Print the metrics once, and serve nothing.")
@flag("alerts", "Print an example of alerts: Prometheus rules, YAML.")
@flag("dashboard", "Print an example of a Grafana dashboard: JSON.")
@click.pass_obj
def metrics(target: Target, listen: _Address, once: bool, alerts: bool, dashboard: bool) -> None:
    """Serve the list's metrics to Prometheus, until Ctrl-C.

    Domains by the names of the libvirt exporter, and locks, waits, repairs and jobs. No lock is
    taken. Whoever reaches the address may read: by default only this host.
    """
    if once + alerts + dashboard > 1:
        raise click.UsageError("--once, --alerts and --dashboard are one at a time.")
    with plainly():
        from .. import metrics as package
        from ..metrics.server import Scrapes
    if alerts or dashboard:
        click.echo(package.alerts() if alerts else package.dashboard(), nl=False)
        return
    with plainly():
        scrapes = Scrapes(target.attach)
    try:
        if once:
            click.echo(scrapes.text().decode(), nl=False)
        else:
            _serve(target, listen, scrapes)
    finally:
        scrapes.close()


def _serve(target: Target, listen: _Address, scrapes: Scrapes) -> None:
    from ..metrics.server import Server

    scrapes.text()  # the first one decodes every definition
    try:
        server = Server(*listen, scrapes)
    except OSError as exc:
        where = f"[{listen.host}]" if ":" in listen.host else listen.host
        raise Failure(f"cannot listen at {where}:{listen.port}: {describe(exc)}", exc) from None
    with server:
        click.echo(f"Metrics of {target.what} at {server.url}")
        server.serve_forever()
