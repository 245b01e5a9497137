"""The commands ``top`` and ``trace``: to look at a list instead of reading about it."""

from __future__ import annotations

import signal
import sys
import threading

import click

from .tables import Failure, is_terminal, print_lines, printable
from .types import Target, flag, plainly, seconds


@click.command()
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@flag("once", "Print two looks' difference as text, and end; so does a pipe.")
@click.pass_obj
def top(target: Target, interval: float, once: bool) -> None:
    """Watch a list, live.

    Domains, rates, locks, jobs, events, the guests' CPU and memory. Takes no lock. Needs the extra
    `top`; without it, --once works."""
    import time

    from ..look.lines import report
    from ..look.picture import Looker

    with target.attach() as doms:
        looker = Looker(doms, target.shown)
        if once or not is_terminal():
            looker.look()
            time.sleep(interval)
            print_lines(report(looker.look()))
            return
        with plainly():
            from ..look.screen import run
        ended = run(looker, interval)
    if ended is not None:
        raise Failure(ended)


@click.command()
@click.argument("duration", metavar="SECONDS", type=seconds)
@click.option("-o", "--output", metavar="FILE", default="trace.json", show_default=True)
@click.option(
    "--interval",
    type=click.FloatRange(min=0.0001),
    default=0.001,
    show_default=True,
    help="Seconds between two looks.",
)
@click.pass_obj
def trace(target: Target, duration: float | None, output: str, interval: float) -> None:
    """Record who holds which lock and job, and when.

    The file is for https://ui.perfetto.dev. Locks are sampled, so that nobody pays for it: what is
    held for less than the interval is seen by chance. Where a job begins, and events, are exact.
    Ctrl-C ends it, and writes what there is."""
    from ..look.trace import Tracer

    with target.attach() as doms:
        tracer = Tracer(doms, interval)
        # Ctrl-C is heard between two looks: in the middle of one it would lose what is open.
        stop = threading.Event()
        before = signal.signal(signal.SIGINT, lambda *_: stop.set())
        try:
            click.echo(f"Tracing {printable(target.shown)}; Ctrl-C ends it", err=True)
            tracer.run(float(threading.TIMEOUT_MAX) if duration is None else duration, stop)
        finally:
            signal.signal(signal.SIGINT, before)
        if output == "-":
            tracer.write(sys.stdout, target.shown)
            return
        with open(output, "w", encoding="utf-8") as stream:
            count = tracer.write(stream, target.shown)
    click.echo(f"{count:,} events written to {output}", err=True)
