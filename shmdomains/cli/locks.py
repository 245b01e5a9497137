"""The command ``shmdomains locks``: who holds which lock, what for, and who waits.

It takes no lock, so it answers when everything is stuck.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import asdict

from ..memory.held import LockInfo
from ..memory.invariants import lock_text
from .tables import (
    Column,
    is_terminal,
    print_line,
    print_records,
    print_table,
)
from .types import Target, format_option, seconds

if TYPE_CHECKING:
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
