"""The figures of a run, for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.table import Table

from .contestants import ALL
from .results import Results

NAMES = [contestant.name for contestant in ALL]


def _us(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _ms(seconds: float) -> str:
    return "never" if seconds < 0 else f"{seconds * 1e3:.2f}"


def _thousands(rate: float) -> str:
    return f"{rate / 1e3:,.1f}"


Column = tuple[str, str, int, Callable[[float], str]]  # title, work, workers, format

OPERATIONS: list[Column] = [
    ("a get", "read_state", 1, _us),
    ("a patch", "read_state_patch", 1, _us),
    ("b same", "read_definition", 1, _us),
    ("b new", "read_changed", 1, _us),
    ("c state", "change_state", 1, _us),
    ("d replace", "replace", 1, _us),
    ("e define", "define", 1, _us),
    ("e remove", "remove", 1, _us),
    ("k id", "by_id", 1, _us),
    ("k miss", "miss", 1, _us),
    ("peek", "peek", 1, _us),
    ("g list ms", "rows", 1, _ms),
]
DATA: list[Column] = [
    ("o read", "read_data", 1, _us),
    ("o change", "change_data", 1, _us),
    ("o increment", "increment", 1, _us),
    ("o read 2 KB", "read_data_large", 1, _us),
    ("o change 2 KB", "change_data_large", 1, _us),
]
CROWDS: list[Column] = [
    ("f random 1", "count random", 1, _thousands),
    ("f random 2", "count random", 2, _thousands),
    ("f random 4", "count random", 4, _thousands),
    ("f one 1", "count one", 1, _thousands),
    ("f one 2", "count one", 2, _thousands),
    ("f one 4", "count one", 4, _thousands),
    ("f least", "count one: least share", 4, "{:.2f}".format),
]
PARTIES: list[Column] = [
    ("g kept", "kept while listed", 1, "{:.2f}".format),
    ("h waits ms", "killed, waiting", 1, _ms),
    ("h later ms", "killed, later", 1, _ms),
    ("h others", "blocks others", 1, lambda value: "blocked" if value else "free"),
    ("l slower", "slower while written", 1, "{:.2f}".format),
]
ROOM: list[Column] = [
    ("i bytes", "bytes per domain", 1, "{:,.0f}".format),
    ("i create ms", "create", 1, _ms),
    ("i attach ms", "attach", 1, _ms),
    ("i fork ms", "fork", 1, _ms),
    ("i private KB", "private", 1, lambda value: f"{value / 1e3:,.0f}"),
]


def _table(results: Results, title: str, domains: int, columns: list[Column]) -> Table | None:
    made = Table("", *(column[0] for column in columns), title=title)
    rows = 0
    for name in NAMES:
        cells = [
            "" if (value := results.get(work, name, domains, workers)) is None else form(value)
            for _title, work, workers, form in columns
        ]
        if any(cells):
            made.add_row(name, *cells)
            rows += 1
    return made if rows else None


def _woken(results: Results) -> Table:
    made = Table("", "waiters", "median", "p99", title="n: µs until who waits is awake")
    for figure in results.figures:
        if figure.work == "wake":
            name, waiters = figure.contestant, figure.workers
            slow = results.get("wake: p99", name, 1, waiters) or 0
            made.add_row(name, f"{waiters:,}", _us(figure.median), _us(slow))
    return made


def tables(results: Results) -> Iterator[Table]:
    sizes = sorted({figure.domains for figure in results.figures if figure.work == "read_state"})
    for domains in sizes:
        for title, columns in (
            ("µs per operation", OPERATIONS),
            ("the driver's own data, µs per operation", DATA),
            ("increments in the data by several workers, thousands a second", CROWDS),
            ("several processes", PARTIES),
            ("room", ROOM),
        ):
            made = _table(results, f"{domains:,} domains: {title}", domains, columns)
            if made is not None:
                yield made
    yield _woken(results)
    others = Table("", "µs", title="limits, m: a start, and j: µs a file")
    for figure in results.figures:
        if figure.domains == 0 or figure.work == "load":
            workers = "" if figure.workers == 1 else f", {figure.workers} workers"
            others.add_row(figure.contestant + workers, _us(figure.median))
    yield others
