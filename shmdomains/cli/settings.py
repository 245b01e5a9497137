"""The commands that set something of a domain: ``setmem``, ``setvcpus``, ``desc`` and so on.

Names, flags, words and refusals are virsh's. They work through a driver (``--driver``), but what
only reads needs none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..errors import DefinitionError
from ..names import parse_number
from ..rules.info import DomainInfo
from ..xml.definition import DomainDef, parse_memory
from .definitions import read_edited
from .domains import next_xml
from .driving import driven, driver_of
from .script import say
from .tables import Failure, print_error, printable
from .types import Target, domain_argument, flag, found_domain, timeout_option

Command = TypeVar("Command", bound=Callable[..., Any])

_MEMORY = re.compile(r"\s*([0-9]+)\s*([A-Za-z]*)")


def _kibibytes(text: str) -> int:
    """Memory in KiB, or with a unit (vshCommandOptScaledInt).

    >>> _kibibytes("1G"), _kibibytes("64")
    (1048576, 64)
    """
    match = _MEMORY.fullmatch(text)
    bad = f"Scaled numeric value '{text.strip()}' for <size> option is malformed or out of range"
    if match is None:
        raise Failure(bad)
    try:
        return parse_memory(match[1], match[2] or None)
    except DefinitionError as exc:
        raise Failure(f"{bad}: {exc}") from None


def _count(text: str) -> int:
    text = text.strip()
    count = parse_number(text, 2**31 - 1)
    if count is None:
        raise Failure(f"Numeric value '{text}' for <count> option is malformed or out of range")
    if count == 0:
        raise Failure("Can't set 0 processors for a VM")
    return count


def _impact_options(command: Command) -> Command:
    for name, help in (
        ("current", "Whichever of the two it is now."),
        ("live", "Of the running domain."),
        ("config", "From its next start on."),
    ):
        command = flag(name, help)(command)
    return command


def _impact(config: bool, live: bool, current: bool, otherwise: bool | None) -> dict[str, Any]:
    """What a driver is told; `otherwise` is `live` where none of the three is given."""
    for name, given in (("live", live), ("config", config)):
        if current and given:
            raise Failure(f"Options --current and --{name} are mutually exclusive")
    if not (config or live or current):
        return {"live": otherwise, "config": None}
    return {"live": live or None, "config": config or None}


@click.command()
@domain_argument
@click.argument("size")
@_impact_options
@timeout_option
@click.pass_obj
def setmem(
    target: Target,
    domain: str,
    size: str,
    config: bool,
    live: bool,
    current: bool,
    timeout: float | None,
) -> None:
    """Change how much memory a domain has: KiB, or 512M, 4G. Without options, the running one."""
    impact = _impact(config, live, current, True)
    with driven(target, domain, None, timeout) as (driver, info):
        driver.set_memory(info.uuid, _kibibytes(size), **impact)


@click.command()
@domain_argument
@click.argument("size")
@_impact_options
@timeout_option
@click.pass_obj
def setmaxmem(
    target: Target,
    domain: str,
    size: str,
    config: bool,
    live: bool,
    current: bool,
    timeout: float | None,
) -> None:
    """Change how much memory a domain may have."""
    impact = _impact(config, live, current, None)
    with driven(target, domain, "Unable to change MaxMemorySize", timeout) as (driver, info):
        driver.set_max_memory(info.uuid, _kibibytes(size), **impact)


@click.command()
@domain_argument
@click.argument("count")
@flag("maximum", "How many it may have; with --config.")
@_impact_options
@timeout_option
@click.pass_obj
def setvcpus(
    target: Target,
    domain: str,
    count: str,
    maximum: bool,
    config: bool,
    live: bool,
    current: bool,
    timeout: float | None,
) -> None:
    """Change how many virtual CPUs a domain has. Without options, the running one."""
    impact = _impact(config, live, current, True)
    if maximum and not config:
        raise Failure("Option --config is required by option --maximum")
    with driven(target, domain, None, timeout) as (driver, info):
        driver.set_vcpus(info.uuid, _count(count), maximum=maximum, **impact)


# --- description and title --------------------------------------------------------------------


@click.command()
@domain_argument
@click.argument("new", metavar="[NEW-DESC]...", nargs=-1)
@flag("title", "The title instead.")
@flag("edit", "In $EDITOR.")
@_impact_options
@timeout_option
@click.pass_obj
def desc(
    target: Target,
    domain: str,
    new: tuple[str, ...],
    title: bool,
    edit: bool,
    config: bool,
    live: bool,
    current: bool,
    timeout: float | None,
) -> None:
    """Show a domain's description, or set it."""
    _describe(target, domain, new, title, edit, _impact(config, live, current, None), timeout)


@click.command()
@domain_argument
@click.argument("new", metavar="[NEW-TITLE]...", nargs=-1)
@flag("edit", "In $EDITOR.")
@_impact_options
@timeout_option
@click.pass_obj
def title(
    target: Target,
    domain: str,
    new: tuple[str, ...],
    edit: bool,
    config: bool,
    live: bool,
    current: bool,
    timeout: float | None,
) -> None:
    """Show a domain's title, or set it; virsh's `desc --title`."""
    _describe(target, domain, new, True, edit, _impact(config, live, current, None), timeout)


def _describe(
    target: Target,
    domain: str,
    new: tuple[str, ...],
    title: bool,
    edit: bool,
    impact: dict[str, Any],
    timeout: float | None,
) -> None:
    what = "title" if title else "description"
    if not new and not edit:
        with found_domain(target, domain) as (_, info):
            found = getattr(_definition(info, impact), what)
            say(found or f"No {what} for domain: {info.name}")
        return
    failed = f"Failed to set new domain {what}"
    with driven(target, domain, failed, timeout) as (driver, info):
        text = " ".join(new)
        if edit:
            before = text or getattr(_definition(info, impact), what) or ""
            text = read_edited(before, ".txt")
            if text == before:
                say(f"Domain {what} not changed")
                return
        if title and "\n" in text:
            print_error(failed)
            raise Failure("metadata title can't contain newlines")
        (driver.set_title if title else driver.set_description)(info.uuid, text, **impact)
    say(f"Domain {what} updated successfully")


def _definition(info: DomainInfo, impact: dict[str, Any]) -> DomainDef:
    later = info.next_definition if impact["config"] else None
    return later or info.definition


# --- edit -------------------------------------------------------------------------------------


@click.command()
@domain_argument
@timeout_option
@click.pass_obj
def edit(target: Target, domain: str, timeout: float | None) -> None:
    """Edit a domain's definition in $EDITOR.

    An active one changes at its next start."""
    with found_domain(target, domain) as (doms, info):
        before = next_xml(info)
        text = read_edited(before, ".xml")
        if text == before:
            click.echo(printable(f"Domain '{info.name}' XML configuration not changed."))
            return
        now = doms.peek(uuid=info.uuid, definitions=True)
        if now is None or next_xml(now) != before:
            raise Failure("The XML configuration was changed by another user.")
        definition = DomainDef.from_xml(text)
        if target.driver:
            driver_of(target, doms, timeout).define(definition)
        else:
            doms.define(definition, timeout)
    click.echo(printable(f"Domain '{info.name}' XML configuration edited."))
