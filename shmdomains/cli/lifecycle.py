"""The commands that run domains: ``start``, ``create``, ``suspend``, ``destroy`` and so on.

Names, flags, words and refusals are virsh's. They work through a driver (``--driver``).
"""

from __future__ import annotations

import click

from ..errors import ShmDomainsError
from ..xml.definition import DomainDef
from .definitions import print_refusal, read_xml
from .driving import driven, driver_of, need_driver
from .tables import Failure, UsageFailure, print_error, printable
from .types import Target, domain_argument, flag, format_option, source_text, timeout_option


@click.command()
@domain_argument
@flag("paused", "Leave it paused.")
@timeout_option
@click.pass_obj
def start(target: Target, domain: str, paused: bool, timeout: float | None) -> None:
    """Start a domain that is defined and inactive."""
    with driven(target, domain, "Failed to start domain '{name}'", timeout) as (driver, info):
        if info.is_active:
            raise Failure("Domain is already active")
        driver.start(info.uuid, paused=paused)
    click.echo(printable(f"Domain '{info.name}' started"))


@click.command("create")
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
@flag("paused", "Leave it paused.")
@timeout_option
@click.pass_obj
def create_domain(target: Target, file: str, paused: bool, timeout: float | None) -> None:
    """Start a domain from XML; it is gone when it stops.

    A persistent domain of the same name and UUID that is inactive runs with this definition once.
    Without a driver `create` makes an empty list."""
    need_driver(target)
    text = read_xml(target, file)
    with target.open() as doms:
        driver = driver_of(target, doms, timeout)
        try:
            info = driver.create(DomainDef.from_xml(text), paused=paused)
        except ShmDomainsError as exc:
            print_error(f"Failed to create domain from {source_text(file)}")
            print_refusal(target, exc, text)
            raise click.exceptions.Exit(1) from None
    click.echo(printable(f"Domain '{info.name}' created from {source_text(file)}"))


@click.command()
@domain_argument
@flag("graceful", "Do not kill a guest that does not go.")
@timeout_option
@click.pass_obj
def destroy(target: Target, domain: str, graceful: bool, timeout: float | None) -> None:
    """Stop a domain at once, as if its power were cut.

    Its definition stays."""
    with driven(target, domain, "Failed to destroy domain '{name}'", timeout) as (driver, info):
        driver.destroy(info.uuid, graceful=graceful)
    click.echo(printable(f"Domain '{info.name}' destroyed"))


@click.command()
@domain_argument
@timeout_option
@click.pass_obj
def shutdown(target: Target, domain: str, timeout: float | None) -> None:
    """Ask a domain's guest to shut down."""
    with driven(target, domain, "Failed to shutdown domain '{name}'", timeout) as (driver, info):
        driver.shutdown(info.uuid)
    click.echo(printable(f"Domain '{info.name}' is being shutdown"))


@click.command()
@domain_argument
@timeout_option
@click.pass_obj
def reboot(target: Target, domain: str, timeout: float | None) -> None:
    """Ask a domain's guest to reboot."""
    with driven(target, domain, "Failed to reboot domain '{name}'", timeout) as (driver, info):
        driver.reboot(info.uuid)
    click.echo(printable(f"Domain '{info.name}' is being rebooted"))


@click.command()
@domain_argument
@timeout_option
@click.pass_obj
def reset(target: Target, domain: str, timeout: float | None) -> None:
    """Reset a domain as if by its button."""
    with driven(target, domain, "Failed to reset domain '{name}'", timeout) as (driver, info):
        driver.reset(info.uuid)
    click.echo(printable(f"Domain '{info.name}' was reset"))


@click.command()
@domain_argument
@timeout_option
@click.pass_obj
def suspend(target: Target, domain: str, timeout: float | None) -> None:
    """Suspend a running domain; it stays in memory."""
    with driven(target, domain, "Failed to suspend domain '{name}'", timeout) as (driver, info):
        driver.suspend(info.uuid)
    click.echo(printable(f"Domain '{info.name}' suspended"))


@click.command()
@domain_argument
@timeout_option
@click.pass_obj
def resume(target: Target, domain: str, timeout: float | None) -> None:
    """Let a suspended domain run again."""
    with driven(target, domain, "Failed to resume domain '{name}'", timeout) as (driver, info):
        driver.resume(info.uuid)
    click.echo(printable(f"Domain '{info.name}' resumed"))


@click.command()
@flag("kill-orphans", "End the guests that have no record.")
@click.option("--host", metavar="NAME", help="Another host, whose domains are to be off.")
@flag("host-is-dead", "You know that it is dead; else its guests would run twice.")
@timeout_option
@format_option
@click.pass_obj
def reconcile(
    target: Target,
    kill_orphans: bool,
    host: str | None,
    host_is_dead: bool,
    timeout: float | None,
    form: str,
) -> None:
    """Compare the records with the guests of this host, and mend what differs.

    What dead workers began is finished or undone; a guest that ended is treated as its definition
    says. Guests without a record are shown and, with --kill-orphans, ended.

    With --host NAME --host-is-dead the domains of that host are off, and may start elsewhere. For
    lists of several hosts.
    """
    need_driver(target)
    if (host is not None) != host_is_dead:
        raise UsageFailure("--host and --host-is-dead go together: only you can know that it is")
    if host is not None and kill_orphans:
        raise UsageFailure("--kill-orphans ends guests of this host; --host is another one")
    from .supervising import reconciled

    reconciled(target, kill_orphans, host, timeout, form)


@click.command()
@timeout_option
@click.pass_obj
def supervise(target: Target, timeout: float | None) -> None:
    """Watch the guests of this host until Ctrl-C or SIGTERM.

    What they do by themselves gets into the record within milliseconds, and is answered as their
    definitions say. Of all that supervise one does the work; another one goes on when it dies.
    """
    need_driver(target)
    from .supervising import supervised

    supervised(target, timeout)
