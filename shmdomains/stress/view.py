"""What a stress run shows: progress while it goes on, at the end the table and the findings.

On a terminal progress is live, elsewhere a line now and then. It is refreshed by whoever makes
progress and never by a thread, for this process forks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from . import proof
from .journal import Journal, Kind, duration_of


class View:
    """Everything that is printed."""

    PLAIN_INTERVAL = 2.0
    LIVE_INTERVAL = 0.1

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._next = 0.0
        self._state = (0, 0)
        self.note = ""

    def say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style))

    @contextmanager
    def progress(self, label: str) -> Iterator[proof.Progress]:
        """Show a function `(done, total)` at work. Refreshed by who calls it: no thread."""
        self._label, self.note, self._state = label, "", (0, 0)
        now = time.monotonic()
        if not self._console.is_terminal:
            self._next = now + self.PLAIN_INTERVAL
            yield self._advance
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        with Progress(
            *columns,
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as self._live:
            self._task = self._live.add_task(self._label, total=None, note="")
            self._live.refresh()
            try:
                yield self._advance
            finally:
                self._live = None

    def _advance(self, done: int, total: int) -> None:
        self._state = done, total
        self.refresh()

    def refresh(self) -> None:
        """Bring what is shown up to date, unless that was done a moment ago."""
        now = time.monotonic()
        if now < self._next:
            return
        done, total = self._state
        if self._live is not None and self._task is not None:
            self._next = now + self.LIVE_INTERVAL
            note = self.note or (f"{done:,} of {total:,}" if total else "")
            self._live.update(self._task, completed=done, total=total or None, note=note)
            self._live.refresh()
        elif not self._console.is_terminal and total:
            self._next = now + self.PLAIN_INTERVAL
            note = self.note and f" {self.note}"
            self.say(f"{self._label}: {100 * done // total} %{note}")

    def table(self, journal: Journal, elapsed: float) -> None:
        """Rates, latencies and waits of each kind of operation."""
        table = Table(title=f"{elapsed:.1f} s", title_justify="left")
        table.add_column("operation")
        for heading in ("per second", "p50", "p99", "waits > 1 ms", "longest wait"):
            table.add_column(heading, justify="right")
        total = 0
        for kind in Kind:
            counts = [
                sum(at) for at in zip(*(p.histogram(kind) for p in journal.pages), strict=True)
            ]
            number = sum(counts)
            waits = [page.waits(kind) for page in journal.pages]
            total += number
            table.add_row(
                kind.label,
                _rate(number / elapsed),
                _duration(_percentile(counts, 0.5)),
                _duration(_percentile(counts, 0.99)),
                f"{sum(many for many, _ in waits):,}",
                _duration(max(longest for _, longest in waits)),
            )
        table.add_section()
        table.add_row("all", _rate(total / elapsed), "", "", "", "")
        self._console.print(table)

    def finding(self, finding: proof.Finding) -> None:
        if not finding.complete and not finding.problems:
            self.say(f"- {finding.claim}: not looked at to the end", "yellow")
            return
        mark, style = ("✓", "green") if finding.holds else ("✗", "bold red")
        detail = f": {finding.detail}" if finding.detail else ""
        self.say(f"{mark} {finding.claim}{detail}", style)
        self._problems(finding.problems, style)

    def failures(self, failures: list[str]) -> None:
        if not failures:
            self.say("✓ no worker failed", "green")
            return
        self.say("✗ no worker failed: some did", "bold red")
        self._problems(failures, "bold red")

    def _problems(self, problems: list[str], style: str) -> None:
        for problem in problems[: proof.EXAMPLES]:
            self.say(f"    {problem}", style)
        if len(problems) > proof.EXAMPLES:
            self.say(f"    and {len(problems) - proof.EXAMPLES:,} more", style)


def _percentile(counts: list[int], part: float) -> float:
    """Nanoseconds that this part of all operations did not exceed; 0: there are no operations."""
    left = part * sum(counts)
    for bucket, count in enumerate(counts):
        left -= count
        if count and left <= 0:
            return duration_of(bucket)
    return 0.0


def _rate(number: float) -> str:
    """
    >>> _rate(0.25), _rate(12345.6)
    ('0.2', '12,346')
    """
    return f"{number:,.1f}" if number < 10 else f"{number:,.0f}"


def _duration(ns: float) -> str:
    """
    >>> _duration(0), _duration(1500), _duration(2_000_000), _duration(3e9)
    ('-', '1.5 µs', '2.0 ms', '3.0 s')
    """
    if not ns:
        return "-"
    for unit, size in (("s", 1e9), ("ms", 1e6)):
        if ns >= size:
            return f"{ns / size:.1f} {unit}"
    return f"{ns / 1e3:.1f} µs"
