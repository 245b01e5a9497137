"""The commands that read domains: ``list``, ``dominfo``, ``dumpxml`` and so on.

Names, flags, order and words are virsh's. Reading takes no lock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import click

from ..job import JobInfo
from ..rules.info import DomainInfo, job_to_dict
from ..states import DomainState
from ..xml import document
from ..xml.definition import DomainDef
from .tables import (
    Column,
    Failure,
    print_names,
    print_pairs,
    print_record,
    print_records,
    print_table,
    print_xml,
)
from .types import (
    Target,
    complete_state,
    domain_argument,
    flag,
    format_option,
    found_domain,
    seconds,
    state,
)

# --- list -----------------------------------------------------------------------------------

_STATES = {
    "running": {DomainState.RUNNING},
    "paused": {DomainState.PAUSED},
    "shutoff": {DomainState.SHUTOFF},
    "other": set(DomainState) - {DomainState.RUNNING, DomainState.PAUSED, DomainState.SHUTOFF},
}

_STATE_COLOURS = {
    "running": "green",
    "idle": "green",
    "paused": "yellow",
    "pmsuspended": "yellow",
    "in shutdown": "yellow",
    "crashed": "red",
}


@click.command("list")
@flag("all", "Active and inactive domains.")
@flag("inactive", "Inactive domains.")
@flag("persistent", "Persistent domains.")
@flag("transient", "Transient domains.")
@flag("autostart", "Domains that start with the host.")
@flag("no-autostart", "Domains that do not.")
@flag("state-running", "Running domains.")
@flag("state-paused", "Paused domains.")
@flag("state-shutoff", "Domains that are shut off; implies --inactive.")
@flag("state-other", "Domains in other states.")
@flag("name", "Print names only.")
@flag("uuid", "Print UUIDs only.")
@flag("id", "Print ids only.")
@flag("title", "Print titles as well.")
@flag("table", "Print a table: as without options.")
@flag("with-job", "Domains with a job, and what it does.")
@click.option("--host", metavar="HOST", help="Domains that run there.")
@format_option
@click.pass_obj
def list_domains(target: Target, /, form: str, host: str | None, **flags: bool) -> None:
    """List domains; without options the active ones.

    Active domains come first, by id, then the inactive ones, by name. Options of one kind add up
    (--state-running --state-paused), options of different kinds must all apply.
    """
    for other in ("name", "uuid", "id"):
        if flags["table"] and flags[other]:
            raise Failure(f"Options --table and --{other} are mutually exclusive")
    with target.attach() as doms:
        infos = doms.list(
            active=_active_filter(flags),
            persistent=_either(flags["persistent"], flags["transient"]),
            autostart=_either(flags["autostart"], flags["no_autostart"]),
            state=_state_filter(flags),
            definitions=flags["title"] or flags["with_job"],
            host=host,
        )
        if flags["with_job"]:
            infos = [info for info in infos if info.jobs]
        infos = sorted(infos, key=_virsh_order)
        if form == "json":
            print_records([_list_record(info, flags) for info in infos])
        elif flags["name"] or flags["uuid"] or flags["id"]:
            print_names(_bare_lines(infos, flags))
        else:
            _print_domains(infos, flags, not target.in_shared_memory)


def _active_filter(flags: dict[str, bool]) -> bool | None:
    if flags["all"]:
        return None
    return not (flags["inactive"] or flags["state_shutoff"])


def _either(yes: bool, no: bool) -> bool | None:
    return None if yes == no else yes


def _state_filter(flags: dict[str, bool]) -> set[DomainState] | None:
    chosen = [states for word, states in _STATES.items() if flags[f"state_{word}"]]
    return set().union(*chosen) if chosen else None


def _virsh_order(info: DomainInfo) -> tuple[bool, int, bytes, str]:
    # vshDomainSorter: vshStrcasecmp folds ASCII letters only and compares the others as bytes.
    if info.is_active:
        return False, info.id, b"", ""
    return True, 0, info.name.encode().lower(), info.name


def _id_text(info: DomainInfo) -> str:
    return str(info.id) if info.is_active else "-"


def _bare_lines(infos: Sequence[DomainInfo], flags: dict[str, bool]) -> Iterator[str]:
    only_id = flags["id"] and not flags["name"] and not flags["uuid"]
    for info in infos:
        if only_id and not info.is_active:
            continue  # as virsh: an inactive domain has none
        words = [
            str(info.uuid) if flags["uuid"] else None,
            _id_text(info) if flags["id"] else None,
            info.name if flags["name"] else None,
        ]
        yield " ".join(word for word in words if word is not None)


def _print_domains(infos: Sequence[DomainInfo], flags: dict[str, bool], hosts: bool) -> None:
    columns = [Column("Id"), Column("Name"), Column("State", colour=_STATE_COLOURS.get)]
    rows = [[_id_text(info), info.name, info.state.words] for info in infos]
    if hosts:
        columns.append(Column("Host"))
        rows = [[*row, info.host or "-"] for row, info in zip(rows, infos, strict=True)]
    if flags["title"]:
        columns.append(Column("Title"))
        rows = [[*row, info.definition.title or ""] for row, info in zip(rows, infos, strict=True)]
    if flags["with_job"]:
        columns.append(Column("Job"))
        rows = [[*row, _job_text(info)] for row, info in zip(rows, infos, strict=True)]
    print_table(columns, rows, gaps=True)


def _job_text(info: DomainInfo) -> str:
    return ", ".join(
        job.operation if job.holder.alive else f"{job.operation} (its holder is dead)"
        for job in info.jobs
    )


def _list_record(info: DomainInfo, flags: dict[str, bool]) -> dict[str, Any]:
    chosen = [key for key in ("id", "name", "uuid", "title") if flags[key]]
    record = _info_record(info)
    if flags["title"]:
        record["title"] = info.definition.title
    if flags["with_job"]:
        record["jobs"] = [job_record(job) for job in info.jobs]
        chosen += ["jobs"] if chosen and chosen != ["title"] else []
    if chosen and chosen != ["title"]:
        return {key: record[key] for key in chosen}
    return record


def job_record(job: JobInfo) -> dict[str, Any]:
    """A job for JSON; a progress that JSON cannot express is shown as text."""
    record = job_to_dict(job)
    try:
        json.dumps(record["progress"], allow_nan=False)
    except (TypeError, ValueError):
        record["progress"] = str(record["progress"])
    return record


def _info_record(info: DomainInfo) -> dict[str, Any]:
    return {
        "id": info.id if info.is_active else None,
        "name": info.name,
        "uuid": str(info.uuid),
        "state": info.state.words,
        "reason": _reason_words(info),
        "persistent": info.persistent,
        "autostart": info.autostart,
        "pid": info.pid,
        "host": info.host,
    }


def _reason_words(info: DomainInfo) -> str:
    reason = info.reason
    return reason.name.lower().replace("_", " ") if hasattr(reason, "name") else str(reason)


# --- one domain -------------------------------------------------------------------------------


@click.command()
@domain_argument
@format_option
@click.pass_obj
def dominfo(target: Target, domain: str, form: str) -> None:
    """Show what a domain is and does."""
    with found_domain(target, domain) as (_, info):
        if form == "json":
            print_record(_dominfo_record(info))
        else:
            print_pairs(_dominfo_pairs(info, not target.in_shared_memory))


@click.command()
@domain_argument
@flag("reason", "And why it is in that state.")
@click.pass_obj
def domstate(target: Target, domain: str, reason: bool) -> None:
    """Print a domain's state."""
    with found_domain(target, domain) as (_, info):
        click.echo(f"{info.state.words} ({_reason_words(info)})" if reason else info.state.words)


@click.command()
@domain_argument
@click.pass_obj
def domid(target: Target, domain: str) -> None:
    """Print a domain's id; - if it is inactive."""
    with found_domain(target, domain, target.driver and "id") as (_, info):
        click.echo(_id_text(info))


@click.command()
@domain_argument
@click.pass_obj
def domname(target: Target, domain: str) -> None:
    """Print a domain's name."""
    with found_domain(target, domain, target.driver and "name") as (_, info):
        print_names([info.name])


@click.command()
@domain_argument
@click.pass_obj
def domuuid(target: Target, domain: str) -> None:
    """Print a domain's UUID."""
    with found_domain(target, domain, target.driver and "uuid") as (_, info):
        click.echo(info.uuid)


@click.command()
@domain_argument
@click.option(
    "--state",
    "states",
    metavar="STATE",
    type=state,
    multiple=True,
    required=True,
    shell_complete=complete_state,
    help="In virsh's words; one of several, if it is given several times.",
)
@click.option(
    "--timeout",
    type=seconds,
    default="inf",
    show_default=True,
    help="Seconds after which it fails; 0 looks once.",
)
@format_option
@click.pass_obj
def wait(
    target: Target, domain: str, states: tuple[DomainState, ...], timeout: float | None, form: str
) -> None:
    """Wait until a domain is in a state, and print that.

    It takes no lock and does not poll. If the domain is removed meanwhile it fails."""

    def reached(info: DomainInfo | None) -> bool:
        return info is not None and info.state in states

    with found_domain(target, domain) as (doms, info):
        found = doms.wait(uuid=info.uuid, until=reached, timeout=timeout)
        assert found is not None
        if form == "json":
            print_record(_info_record(found))
        else:
            click.echo(found.state.words)


def _dominfo_record(info: DomainInfo) -> dict[str, Any]:
    definition = info.definition
    return {
        **_info_record(info),
        "title": definition.title,
        "type": definition.type,
        "os_type": definition.os.type,
        "vcpus": definition.current_vcpus,
        "max_vcpus": definition.vcpus,
        "memory_kib": definition.current_memory,
        "max_memory_kib": definition.memory,
        "updated": _is_updated(info),
    }


def _dominfo_pairs(info: DomainInfo, hosts: bool) -> Iterator[tuple[str, str]]:
    definition = info.definition
    yield "Id", _id_text(info)
    yield "Name", info.name
    yield "UUID", str(info.uuid)
    yield "OS Type", definition.os.type
    yield "State", info.state.words
    yield "CPU(s)", str(definition.current_vcpus)
    yield "Max memory", f"{definition.memory} KiB"
    yield "Used memory", f"{definition.current_memory} KiB"
    yield "Persistent", "yes" if info.persistent else "no"
    yield "Autostart", "enable" if info.autostart else "disable"
    yield "Reason", _reason_words(info)
    if info.pid is not None:
        yield "PID", str(info.pid)
    if hosts and info.host is not None:
        yield "Host", info.host
    if definition.title is not None:
        yield "Title", definition.title
    if _is_updated(info):
        yield "Updated", "yes, from the next start on"


def _is_updated(info: DomainInfo) -> bool:
    """Whether the next start brings another definition; a transient domain has no next start."""
    return info.persistent and info.next_definition is not None


@click.command()
@domain_argument
@flag("inactive", "What the domain will be after its next start.")
@click.option("--xpath", metavar="XPATH", help="Only the nodes that it finds.")
@flag("wrap", "Put them into one element.")
@click.pass_obj
def dumpxml(target: Target, domain: str, inactive: bool, xpath: str | None, wrap: bool) -> None:
    """Print a domain's definition; of an active one with its id."""
    with found_domain(target, domain) as (_, info):
        if inactive:
            text = next_xml(info)
        else:
            text = _with_id(info.definition, info.id if info.is_active else None)
    if xpath is None:
        print_xml(text)
        return
    found = [node for node in _found(text, xpath) if node]
    if wrap:
        found = ["<nodes>", *(f"  {node}" for node in found), "</nodes>"]
    if found:
        print_xml("\n".join(found))


def _found(text: str, xpath: str) -> list[str]:
    """Each node that an XPath finds, as it is written."""
    from lxml import etree

    root, _ = document.parse(text)
    try:
        nodes = root.xpath(xpath)
    except etree.XPathError as exc:
        raise Failure(f"XPath error : {exc}", exc) from None
    if not isinstance(nodes, list):
        raise Failure(f"internal error: Incorrect xpath '{xpath}'")
    return [_written(node) for node in nodes]


def _written(node: Any) -> str:
    if isinstance(node, str):
        name = getattr(node, "attrname", None)
        return f' {name}="{node}"' if name else str(node)
    from lxml import etree

    return etree.tostring(node, encoding="unicode", with_tail=False)


def next_xml(info: DomainInfo) -> str:
    """The definition from the next start on."""
    return _with_id(info.next_definition or info.definition, None)


def _with_id(definition: DomainDef, id: int | None) -> str:
    """The document with the domain's id here, not the id from where the document came from."""
    root, text = document.parse(definition.to_xml())
    wanted = None if id is None else str(id)
    if root.get("id") == wanted:
        return text
    document.set_attribute(root, "id", wanted)
    return document.serialise(root)
