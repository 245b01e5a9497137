"""More commands that read: ``vcpucount`` and ``domstats``.

Options, order and words are virsh's. They need no driver; what only a running guest's process can
tell comes from the process.
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from ..errors import DomainInactive, DomainTransient
from ..holder import this_host
from ..rules.info import DomainInfo
from ..xml.definition import DomainDef
from .tables import Failure, print_lines, printable
from .types import Target, domain_argument, flag, found_domain

_NOT_RUNNING = "Requested operation is not valid: domain is not running"
_NO_CONFIG = "Requested operation is not valid: transient domains do not have any persistent config"


def _definition(info: DomainInfo, live: bool) -> DomainDef:
    """The one in use, or that of the next start."""
    if live and not info.is_active:
        raise Failure(_NOT_RUNNING, DomainInactive(_NOT_RUNNING))
    if not live and not info.persistent:
        raise Failure(_NO_CONFIG, DomainTransient(_NO_CONFIG))
    return info.definition if live else info.next_definition or info.definition


@click.command()
@domain_argument
@flag("maximum", "How many it may have.")
@flag("active", "How many it has.")
@flag("live", "Of the running domain.")
@flag("config", "From its next start on.")
@flag("current", "Whichever of the two it is now.")
@click.pass_obj
def vcpucount(
    target: Target,
    domain: str,
    maximum: bool,
    active: bool,
    live: bool,
    config: bool,
    current: bool,
) -> None:
    """Print how many virtual CPUs a domain has, or may have.

    Without options, all of it."""
    for one, other, given in (
        ("--live", "--config", live and config),
        ("--active", "--maximum", active and maximum),
    ):
        if given:
            raise Failure(f"Options {one} and {other} are mutually exclusive")
    with found_domain(target, domain) as (_, info):
        if not (maximum or active or live or config or current):
            print_lines(_all_counts(info))
            return
        of_live = live or (not config and info.is_active)
        definition = _definition(info, of_live)
        click.echo(definition.vcpus if maximum else definition.current_vcpus)


def _all_counts(info: DomainInfo) -> Iterator[str]:
    kinds = [
        kind for kind, there in (("config", info.persistent), ("live", info.is_active)) if there
    ]
    for what in ("maximum", "current"):
        for kind in kinds:
            definition = _definition(info, kind == "live")
            count = definition.vcpus if what == "maximum" else definition.current_vcpus
            yield f"{what:<12} {kind:<12} {count:>3}"


_GROUPS = ("state", "cpu-total", "balloon", "vcpu")


@click.command()
@click.argument("domains", metavar="[DOMAIN]...", nargs=-1)
@flag("state", "State and reason, by libvirt's numbers.")
@flag("cpu-total", "CPU time of the guest's process, in ns.")
@flag("balloon", "Memory, in KiB.")
@flag("vcpu", "Virtual CPUs.")
@flag("list-active", "Active domains.")
@flag("list-inactive", "Inactive domains.")
@flag("raw", "For virsh's sake: without it numbers are the same.")
@flag("enforce", "For virsh's sake: what is asked for is always there.")
@click.pass_obj
def domstats(target: Target, /, domains: tuple[str, ...], **flags: bool) -> None:
    """Print what is known of domains, as fields for programs.

    Without options, all of it."""
    groups = [one for one in _GROUPS if flags[one.replace("-", "_")]] or list(_GROUPS)
    infos = []
    for domain in domains:
        with found_domain(target, domain) as (_, info):
            infos.append(info)
    if not domains:
        active = None if flags["list_active"] == flags["list_inactive"] else flags["list_active"]
        with target.attach() as doms:
            infos = sorted(
                doms.list(active=active),
                key=lambda info: (not info.is_active, info.id if info.is_active else 0),
            )
    for number, info in enumerate(infos):
        if number:
            click.echo()
        print_lines([f"Domain: '{printable(info.name)}'", *_fields(info, groups)])


def _fields(info: DomainInfo, groups: list[str]) -> Iterator[str]:
    definition = info.definition
    if "state" in groups:
        yield f"  state.state={int(info.state)}"
        yield f"  state.reason={int(info.reason)}"
    use = _use_of(info) if info.is_active else None
    if "cpu-total" in groups and use is not None:
        yield from (f"  cpu.{name}={value}" for name, value in zip(_TIMES, use[:3], strict=True))
    if "balloon" in groups:
        if info.is_active:
            yield f"  balloon.current={definition.current_memory}"
        yield f"  balloon.maximum={definition.memory}"
        if use is not None:
            yield f"  balloon.rss={use[3] >> 10}"
    if "vcpu" in groups:
        yield f"  vcpu.current={definition.current_vcpus}"
        yield f"  vcpu.maximum={definition.vcpus}"


_TIMES = ("time", "user", "system")


def _use_of(info: DomainInfo) -> tuple[int, int, int, int] | None:
    """CPU time, that in user mode and in the kernel, in ns, and resident bytes of the guest's
    process; ``None`` if it is not here."""
    if info.pid is None or info.host != this_host():
        return None
    import psutil

    try:
        process = psutil.Process(info.pid)
        with process.oneshot():
            times, memory = process.cpu_times(), process.memory_info()
    except (OSError, psutil.Error):
        return None
    user, system = int(times.user * 1e9), int(times.system * 1e9)
    return user + system, user, system, int(memory.rss)
