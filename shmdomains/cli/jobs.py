"""The commands about jobs: ``domjobinfo`` and ``domjobabort``.

Labels, order and units are virsh's. A progress is its holder's own; what has the name of a typed
parameter of libvirt's (``VIR_DOMAIN_JOB_DATA_TOTAL``: ``data_total``) is shown as virsh shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from ..job import Job, JobInfo
from ..rules.info import DomainInfo
from .domains import job_record
from .tables import print_lines, print_record, printable
from .types import Target, domain_argument, format_option, found_domain, timeout_option

_SIZES = [
    f"{what}_{part}"
    for what in ("data", "memory", "disk")
    for part in ("processed", "remaining", "total")
]
_LABELS = {"disk": "File"}  # where virsh has another word


def principal(info: DomainInfo) -> JobInfo | None:
    """The job that is shown if only one is: the async one, else the other one."""
    return max(info.jobs, key=lambda job: job.kind is Job.ASYNC, default=None)


@click.command()
@domain_argument
@format_option
@click.pass_obj
def domjobinfo(target: Target, domain: str, form: str) -> None:
    """Show a domain's job.

    The async one, or else the other one; as JSON both. A job of type Failed is a dead holder's: it
    is in nobody's way."""
    with found_domain(target, domain) as (_, info):
        if form == "json":
            print_record({"jobs": [job_record(job) for job in info.jobs]})
        else:
            _print_pairs(_pairs(principal(info)))


@click.command()
@domain_argument
@timeout_option
@click.pass_obj
def domjobabort(target: Target, domain: str, timeout: float | None) -> None:
    """Ask the holder of a domain's job to end it."""
    with (
        found_domain(target, domain) as (doms, info),
        doms.get(uuid=info.uuid, timeout=timeout) as dom,
    ):
        dom.abort_job(timeout)


def _print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    print_lines(f"{label + ':':<17} {printable(value)}".rstrip() for label, value in pairs)


def _pairs(job: JobInfo | None) -> Iterator[tuple[str, str]]:
    if job is None:
        yield "Job type", "None"
        return
    progress = dict(job.progress) if isinstance(job.progress, Mapping) else {}
    remaining = _number(progress.pop("time_remaining", None))
    yield "Job type", _type(job, remaining)
    yield "Operation", job.operation
    yield "Time elapsed", f"{int((job.holder.held_for or 0) * 1000):<12} ms"
    if remaining is not None:
        yield "Time remaining", f"{remaining:<12} ms"
    for name in _SIZES:
        number = _number(progress.get(name))
        if number is not None:
            del progress[name]
            what, part = name.split("_")
            yield f"{_LABELS.get(what, what.capitalize())} {part}", _capacity(number)
    for name, value in progress.items():
        yield str(name), str(value)
    if job.progress is not None and not isinstance(job.progress, Mapping):
        yield "Progress", str(job.progress)
    yield "Kind", job.kind.words
    if job.why is not None:
        yield "Why", job.why
    yield "Holder", str(job.holder)
    if job.abort_requested:
        yield "Abort", "requested"


def _type(job: JobInfo, remaining: int | None) -> str:
    if not job.holder.alive:
        return "Failed"
    return "Unbounded" if remaining is None else "Bounded"


def _number(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _capacity(size: int) -> str:
    """Bytes as virsh shows them here (vshPrettyCapacity).

    >>> _capacity(1 << 20), _capacity(100)
    ('1.000 MiB', '100.000 B')
    """
    value, units = float(size), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    for larger in units:
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.3f} {unit}"
