"""The driver that a command works through: which one, and what is said when it fails.

``--driver`` or ``$SHMDOMAINS_DRIVER`` names it, and a list that has none remembers it with the
first command that works through it (`DomainList.driver`). Without one the commands change the list
only, and what starts and stops domains says that it needs one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from ..errors import DomainNotFound, ShmDomainsError
from ..rules.info import DomainInfo
from .tables import Failure, describe, print_error
from .types import Target, flag, found_domain, plainly, timeout_option

if TYPE_CHECKING:
    from ..drivers import Driver
    from ..opening import AnyDomainList

DRIVER_VARIABLE = "SHMDOMAINS_DRIVER"
DRIVERS = {"test": "TestDriver", "qemu": "QemuDriver"}
"""Their classes, each in the module of the driver's name."""


def need_driver(target: Target) -> None:
    """Refuse a command that takes a driver before it looks for anything."""
    if target.driver is None:
        command = click.get_current_context().info_name
        raise click.UsageError(
            f"'{command}' needs a driver, which runs the domains: --driver "
            f"{' or '.join(DRIVERS)}, or ${DRIVER_VARIABLE}."
        )


def driver_of(target: Target, doms: AnyDomainList, timeout: float | None) -> Driver:
    """The driver, over an attached list. What it needs is imported now. The list's is another one:
    two drivers would each take the other's guests for gone."""
    assert target.driver is not None
    known = doms.driver
    if known not in (None, target.driver):
        raise Failure(
            f"the domains of {target.what} are run by driver '{known}', not '{target.driver}'; "
            f"`shmdomains driver {target.driver}` changes that while none is active"
        )
    if target.driver not in DRIVERS:
        raise Failure(
            f"driver '{target.driver}' is none of these commands', which have "
            f"{' and '.join(DRIVERS)}; whoever runs the domains has to be asked"
        )
    with plainly():
        made: Any = getattr(
            import_module(f"shmdomains.drivers.{target.driver}"), DRIVERS[target.driver]
        )
        found: Driver = made(doms, timeout=timeout)
    if known is None:
        remember(doms, target.driver, timeout)
    return found


def remember(doms: AnyDomainList, name: str | None, timeout: float | None) -> None:
    """As `doms.driver = name`, but no longer than that for the list lock."""
    with doms.locked(timeout):
        doms._set_driver(name)


def in_libvirts_words(exc: BaseException) -> str:
    """An error of a driver's as virsh prints it: behind its kind."""
    kind = exc.kind if isinstance(exc, ShmDomainsError) else ""
    return f"{kind}: {describe(exc)}" if kind else describe(exc)


@contextmanager
def _failing(line: str | None) -> Iterator[None]:
    """Say first what failed, as virsh does, and then why."""
    try:
        yield
    except DomainNotFound:
        raise  # it is not there any more; what looked for it says so
    except (ShmDomainsError, OSError) as exc:
        if line is not None:
            print_error(line)
        raise Failure(in_libvirts_words(exc), exc) from None


@contextmanager
def driven(
    target: Target, key: str, failed: str | None, timeout: float | None
) -> Iterator[tuple[Driver, DomainInfo]]:
    """The driver, and the domain that `key` names. `failed` is said of an error in the block; it
    may have ``{name}`` in it."""
    need_driver(target)
    with found_domain(target, key) as (doms, info):
        driver = driver_of(target, doms, timeout)
        with _failing(failed and failed.format(name=info.name)):
            yield driver, info


@click.command()
@click.argument("name", required=False, type=click.Choice(list(DRIVERS)))
@flag("forget", "Remember none.")
@timeout_option
@click.pass_obj
def driver(target: Target, name: str | None, forget: bool, timeout: float | None) -> None:
    """Show which driver runs the domains of a list, or say so.

    The list remembers it, and commands need no --driver. It cannot change while domains are
    active."""
    if name is not None and forget:
        raise click.UsageError("NAME or --forget, not both.")
    with target.attach() as doms:
        if name is None and not forget:
            click.echo(doms.driver or "-")
            return
        if doms.driver not in (None, name) and (active := doms.count(active=True)):
            raise Failure(
                f"{active} of the domains of {target.what} are active, and run by driver "
                f"'{doms.driver}'"
            )
        remember(doms, name, timeout)
