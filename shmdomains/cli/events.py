"""The command ``events``: what happens to domains, as it happens.

Flags and lines are those of ``virsh event``, but that without ``--event`` all are shown, and that a
time is the event's own.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ..deadline import Deadline
from ..errors import INTERRUPTED
from ..events import EVENT_NAMES, DomainEvent, EventsMissed, EventType
from .tables import Failure, count_text, end_with_failure, print_line, print_warning, printable
from .types import Target, complete_domain, find_domain, flag, format_option, seconds

if TYPE_CHECKING:
    from ..opening import AnyDomainList


@click.command()
@click.argument("domain", required=False, shell_complete=complete_domain)
@click.option("--event", type=click.Choice(EVENT_NAMES), help="Only these.  [default: all]")
@flag("loop", "Go on until the time is over or Ctrl-C; else one event is enough.")
@click.option("--timeout", type=seconds, metavar="SECONDS", help="End after so many seconds.")
@click.option(
    "--since",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    help="Begin with what happened after this event; 0: with all that are kept.",
)
@click.option("--list", "only_list", is_flag=True, help="List what --event takes.")
@flag("timestamp", "Show when it happened.")
@format_option
@click.pass_context
def events(
    ctx: click.Context,
    /,
    domain: str | None,
    event: str | None,
    loop: bool,
    timeout: float | None,
    since: int | None,
    only_list: bool,
    timestamp: bool,
    form: str,
) -> None:
    """Wait for events, of DOMAIN or of any.

    Takes no lock. With --format json one object a line: an event with its number and time, or how
    many were missed. The exit status is 1 if none came.
    """
    if only_list:
        if event is not None:
            raise click.UsageError("--list and --event exclude each other.")
        for name in EVENT_NAMES:
            click.echo(name)
        return
    target: Target = ctx.obj
    with target.attach() as doms:
        shown = _Shown(doms, domain, event, timestamp, form)
        try:
            ended = shown.follow(since, timeout, loop)
        except KeyboardInterrupt:
            shown.say("event loop interrupted")
            shown.say(f"events received: {shown.count}")
            ctx.exit(INTERRUPTED)
        if not ended:
            shown.say("event loop timed out")
        shown.say(f"events received: {shown.count}")
    end_with_failure(not shown.count)


class _Shown:
    """The events that a user asked for, printed."""

    def __init__(
        self,
        doms: AnyDomainList,
        domain: str | None,
        event: str | None,
        timestamp: bool,
        form: str,
    ) -> None:
        self._doms = doms
        self._uuid = None if domain is None else find_domain(doms, domain).uuid
        self._event, self._timestamp, self._json = event, timestamp, form == "json"
        self.count = 0

    def follow(self, since: int | None, timeout: float | None, loop: bool) -> bool:
        """Whether the event came that was enough; else the time is over."""
        deadline = Deadline(timeout)
        try:
            watch = self._doms.watch(since)
        except ValueError as exc:  # the number is of another list
            raise Failure(str(exc), exc) from None
        while True:
            watch.timeout = deadline.left()
            found = next(watch, None)
            if found is None:
                return False
            if isinstance(found, EventsMissed):
                self._missed(found)
            elif self._wants(found):
                self._show(found)
                if not loop:
                    return True

    def _wants(self, event: DomainEvent) -> bool:
        return self._event in (None, event.type.event) and self._uuid in (None, event.uuid)

    def _show(self, event: DomainEvent) -> None:
        self.count += 1
        if self._json:
            print_line(event.to_dict())
            return
        when = f"{_timestamp(event.time)}: " if self._timestamp else ""
        line = f"event '{event.type.event}' for domain '{event.name}': {_what(event)}"
        click.echo(printable(when + line))

    def _missed(self, missed: EventsMissed) -> None:
        if self._json:
            print_line(missed.to_dict())
        else:
            print_warning(f"{count_text(missed.count, 'event')} came faster than they were read")

    def say(self, line: str) -> None:
        if not self._json:
            click.echo(line)


def _what(event: DomainEvent) -> str:
    if event.type.event == "lifecycle":
        return event.words
    if event.holder is not None:
        return event.holder.who
    if event.type in (EventType.JOB_STARTED, EventType.JOB_ENDED):
        words = "Started" if event.type is EventType.JOB_STARTED else "Ended"
        return f"{words} {event.detail_words}".rstrip()
    return event.detail_words


def _timestamp(when: float) -> str:
    """As virTimeStringNow: UTC, milliseconds.

    >>> _timestamp(1796018365.2971)
    '2026-11-30 05:59:25.297+0000'
    """
    milliseconds = int(when * 1000)
    seconds = time.gmtime(milliseconds // 1000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', seconds)}.{milliseconds % 1000:03}+0000"
