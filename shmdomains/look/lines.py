"""A picture of a list in words: cells of a table, lines of a report; sorted and chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..memory.held import LockInfo
from ..memory.invariants import lock_text
from ..text import one_line
from .picture import Picture, Row


class Column(NamedTuple):
    """Of the domains' table. `key` sorts: what is large or busy comes first, names from a to z."""

    title: str
    cell: Callable[[Row], str]
    key: Callable[[Row], tuple[float, str]]


def _size(value: int | None) -> str:
    """
    >>> _size(None), _size(1 << 30), _size(5 << 20)
    ('-', '1.0G', '5.0M')
    """
    if value is None:
        return "-"
    for unit, size in (("G", 1 << 30), ("M", 1 << 20)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value >> 10}K"


def _by(value: Callable[[Row], float | None]) -> Callable[[Row], tuple[float, str]]:
    return lambda row: (-(value(row) or 0.0), row.name)


COLUMNS = (
    Column("name", lambda row: one_line(row.name), lambda row: (0.0, row.name)),
    Column("id", lambda row: "-" if row.id is None else str(row.id), _by(lambda row: row.id)),
    Column("state", lambda row: row.state, lambda row: (0.0, row.state + row.name)),
    Column("cpu%", lambda row: _number(row.cpu), _by(lambda row: row.cpu)),
    Column("memory", lambda row: _size(row.memory), _by(lambda row: row.memory)),
    Column("ev/s", lambda row: _number(row.events), _by(lambda row: row.events)),
    Column("wait", lambda row: str(row.waiting or "-"), _by(lambda row: row.waiting)),
    Column("job", lambda row: one_line(row.job) or "-", lambda row: (not row.job, row.name)),
    Column("held by", lambda row: row.holder or "-", lambda row: (not row.holder, row.name)),
)
SORTS = ("ev/s", "wait", "cpu%", "memory", "name", "id", "state", "job", "held by")
"""The columns to sort by, the busiest first."""
_KEYS = {column.title: column.key for column in COLUMNS}


def _number(value: float | None) -> str:
    return "-" if not value else f"{value:.1f}"


def cells(row: Row) -> list[str]:
    """What the table has of a domain."""
    return [column.cell(row) for column in COLUMNS]


def chosen(
    picture: Picture, sort: str, reverse: bool = False, words: str = "", active: bool = False
) -> list[Row]:
    """The rows to show: whose name, state or job has `words`; only active ones; sorted by a column,
    the busiest or largest first."""
    found = [
        row
        for row in picture.rows
        if (row.id is not None or not active)
        and words.lower() in f"{row.name} {row.state} {row.job}".lower()
    ]
    return sorted(found, key=_KEYS[sort], reverse=reverse)


def head(picture: Picture) -> list[str]:
    """Two lines: how many domains in which state, and how busy the list is."""
    states = ", ".join(f"{count} {state}" for state, count in sorted(picture.states.items()))
    rates = ", ".join(f"{rate:,.0f} {name}/s" for name, rate in picture.rates.items())
    first = f"{one_line(picture.shown)}: {len(picture.rows):,} domains ({states or 'none'})"
    deaths = f", {picture.deaths} deaths" if picture.deaths else ""
    second = f"{picture.processes} processes{deaths}; {rates or 'no rates yet'}"
    return [first, f"{second}; a look takes {picture.took * 1000:.0f} ms"]


def lock_lines(picture: Picture) -> list[str]:
    """A line for each lock and job, the most contended first."""
    return [_lock_line(lock) for lock in picture.locks] or ["none is held"]


def _lock_line(lock: LockInfo) -> str:
    """
    >>> _lock_line(LockInfo("mutex", "nightly", None, None, waiting=2))
    "mutex 'nightly': nobody; 2 wait"
    """
    words = [lock_text(lock.kind, lock.name)]
    holder = lock.holder
    if holder is None:
        words.append(": nobody")
    else:
        words += [f": {holder.who}", f", {holder.operation!r}" if holder.operation else ""]
        words += [f", {holder.held_for:.1f} s" if holder.held_for is not None else ""]
        words += [] if holder.alive else [", dead"]
    return "".join(words) + (f"; {lock.waiting} wait" if lock.waiting else "")


def event_lines(picture: Picture) -> list[str]:
    """The last events, the newest first."""
    missed = [f"{picture.missed} were missed"] if picture.missed else []
    return [*missed, *picture.events]


def report(picture: Picture, most: int = 40) -> list[str]:
    """All of it, for a pipe."""
    rows = [[column.title for column in COLUMNS], *map(cells, chosen(picture, "ev/s")[:most])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    more = len(picture.rows) - most
    return [
        *head(picture),
        "",
        *table,
        *([f"... and {more:,} more"] if more > 0 else []),
        "",
        *map(one_line, lock_lines(picture)),
        "",
        *map(one_line, event_lines(picture)[:most]),
    ]
