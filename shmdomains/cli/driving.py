"""The driver that a command works through: which one, and what is said when it fails.

``--driver`` or ``$SHMDOMAINS_DRIVER`` names it. A list has no place to remember it in. Without one
the commands change the list only, and what starts and stops domains says that it needs one.
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
from .types import Target, found_domain, plainly

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
    """The driver, over an attached list. What it needs is imported now."""
    assert target.driver is not None
    with plainly():
        made: Any = getattr(
            import_module(f"shmdomains.drivers.{target.driver}"), DRIVERS[target.driver]
        )
    found: Driver = made(doms, timeout=timeout)
    return found


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
