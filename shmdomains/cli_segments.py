"""The commands about segments: ``load``, ``export``, ``import``, ``segments``, ``check`` and so on.

`load` and `import` make the segment if there is none; both enter what they can and report the rest.
The others stop nobody and change nothing but, for `unlink`, the name.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from . import segment_file
from .cli_tables import (
    Column,
    Failure,
    count_text,
    describe,
    is_terminal,
    path_text,
    print_error,
    print_record,
    print_records,
    print_table,
    print_warning,
    printable,
    size_text,
)
from .cli_types import (
    Target,
    flag,
    format_option,
    limit_options,
    source_text,
    timeout_option,
    to_read,
)
from .config import LoadFailure, LoadReport
from .domain_list import AttachedProcess, DomainList, ListInfo
from .errors import DefinitionError, ShmDomainsError
from .transfer import export_domains, import_domains

if TYPE_CHECKING:
    from rich.progress import Progress


# --- load -----------------------------------------------------------------------------------


@click.command()
@click.argument(
    "directory", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option(
    "--autostart-dir",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the autostart links are.  [default: DIR/autostart if there is one]",
)
@click.option("--workers", type=click.IntRange(min=0), help="Processes that parse the files.")
@limit_options
@timeout_option
@format_option
@click.pass_obj
def load(
    target: Target,
    directory: Path,
    autostart_dir: Path | None,
    workers: int | None,
    max_domains: int | None,
    max_bytes: int | None,
    timeout: float | None,
    form: str,
) -> None:
    """Load a config directory; makes the segment if need be.

    Every *.xml in DIR becomes a persistent domain. A file that is wrong is reported and skipped;
    the exit status is then 1. What is defined, renamed or undefined later is saved in DIR.
    """
    autostart_dir = autostart_dir or _usual_autostart_dir(directory)
    with _open(target, max_domains, max_bytes) as doms, _progress() as progress:
        report = doms.load_all_configs(directory, autostart_dir, progress, workers, timeout)
    _print_load_report(target, report, form)
    if report.failures:
        click.get_current_context().exit(1)


def _usual_autostart_dir(directory: Path) -> Path | None:
    usual = directory / "autostart"
    return usual if usual.is_dir() else None


def _open(target: Target, max_domains: int | None, max_bytes: int | None) -> DomainList:
    try:
        doms = target.open(max_domains=max_domains, max_bytes=max_bytes)
    except ValueError as exc:
        if isinstance(exc, ShmDomainsError):
            raise
        raise click.UsageError(str(exc)) from None
    info = doms.info
    if info.creator.pid != os.getpid() and (max_domains or max_bytes):
        print_warning(
            f"segment '{target.text}' exists already, with room for "
            f"{count_text(info.max_domains, 'domain')} and {size_text(info.bytes_max)}"
        )
    return doms


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on a terminal, nothing elsewhere."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    with _bar() as bar:
        task = bar.add_task("Loading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar() -> Progress:
    # Only here: it takes longer to import than `list` takes to run.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _print_load_report(target: Target, report: LoadReport, form: str) -> None:
    if form == "json":
        print_record(
            {
                "segment": target.text,
                "loaded": report.loaded,
                "failures": [_failure_record(failure) for failure in report.failures],
            }
        )
        return
    for failure in report.failures:
        print_error(str(failure))
    text = f"{count_text(len(report.loaded), 'domain')} loaded into segment '{target.text}'"
    if report.failures:
        text += f", {count_text(len(report.failures), 'file')} failed"
    click.echo(printable(text))


def _failure_record(failure: LoadFailure) -> dict[str, Any]:
    return {"path": path_text(failure.path), "line": failure.line, "reason": failure.reason}


# --- export, import -------------------------------------------------------------------------


@click.command("export")
@click.argument("file", type=click.Path(allow_dash=True, dir_okay=False))
@click.pass_obj
def export_command(target: Target, file: str) -> None:
    """Write all domains to FILE, for `import`.

    The way to another layout version of the segment, and to another host. FILE may be - for
    standard output. No lock is taken.
    """
    if file == "-" and is_terminal():
        raise click.UsageError("An export is binary; send it to a file or a pipe.")
    with target.attach() as doms, _to_write(file) as stream:
        count = export_domains(doms, stream)
    click.echo(f"{count_text(count, 'domain')} exported", err=True)


@contextmanager
def _to_write(file: str) -> Iterator[BinaryIO]:
    if file != "-":
        # For us alone: definitions hold passwords.
        with open(file, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            yield stream
        return
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed")
    yield sys.stdout.buffer
    sys.stdout.buffer.flush()


@click.command("import")
@click.argument("file", type=click.Path(allow_dash=True))
@limit_options
@timeout_option
@click.pass_obj
def import_command(
    target: Target,
    file: str,
    max_domains: int | None,
    max_bytes: int | None,
    timeout: float | None,
) -> None:
    """Enter the domains of an export.

    Makes the segment if need be. Active domains stay active and get new ids. A domain that can not
    be entered is reported; the exit status is then 1. FILE may be - for standard input.
    """
    with to_read(file) as stream, _open(target, max_domains, max_bytes) as doms:
        try:
            report = import_domains(doms, stream, timeout)
        except DefinitionError as exc:
            raise Failure(f"{source_text(file)}: {exc}") from None
    for name, reason in report.failures:
        print_error(f"domain '{name}': {reason}")
    imported = count_text(len(report.imported), "domain")
    click.echo(printable(f"{imported} imported into segment '{target.text}'"))
    if report.failures:
        click.get_current_context().exit(1)


# --- segments -------------------------------------------------------------------------------


@click.command()
@format_option
def segments(form: str) -> None:
    """List segments and who is attached."""
    found = [(file, *_look_into(file)) for file in segment_file.segments()]
    if form == "json":
        print_records([_segment_record(*one) for one in found])
        return
    columns = [
        Column("Name"),
        Column("Domains", right=True),
        Column("Active", right=True),
        Column("Room", right=True),
        Column("Memory", right=True),
        Column("Attached"),
    ]
    print_table(columns, [row for one in found for row in _segment_rows(*one)])


def _look_into(file: segment_file.SegmentFile) -> tuple[ListInfo | None, str]:
    """Return a segment's info, or why there is none."""
    try:
        with DomainList.attach(path=file.path) as doms:
            return doms.info, ""
    except (ShmDomainsError, OSError) as exc:
        return None, describe(exc)


def _others(info: ListInfo) -> list[AttachedProcess]:
    return [one for one in info.attached if one.pid != os.getpid()]


def _segment_rows(
    file: segment_file.SegmentFile, info: ListInfo | None, error: str
) -> Iterator[list[str]]:
    if info is None:
        yield [file.name, "-", "-", "-", size_text(file.bytes), f"error: {error}"]
        return
    attached = [f"{one.pid} {one.command or ''}" for one in _others(info)]
    numbers = [str(info.domains), str(info.active), str(info.max_domains)]
    yield [file.name, *numbers, size_text(info.bytes_committed), *(attached[:1] or ["-"])]
    for process in attached[1:]:
        yield ["", "", "", "", "", process]


def _segment_record(
    file: segment_file.SegmentFile, info: ListInfo | None, error: str
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": file.name,
        "path": path_text(file.path),
        "uid": file.uid,
        "mode": f"{file.mode:04o}",
        "bytes": file.bytes,
    }
    if info is None:
        return {**record, "error": error}
    return {
        **record,
        "lock": info.lock,
        "domains": info.domains,
        "active": info.active,
        "max_domains": info.max_domains,
        "max_bytes": info.bytes_max,
        "heap_used": info.heap_used,
        "heap_free": info.heap_free,
        "created": info.created,
        "config_dir": None if info.config_dir is None else path_text(Path(info.config_dir)),
        "autostart_dir": None
        if info.autostart_dir is None
        else path_text(Path(info.autostart_dir)),
        "attached": [
            {"pid": one.pid, "started": one.started, "command": one.command}
            for one in _others(info)
        ],
    }


@click.command("unlink")
@flag("force", "Even if processes are attached; they keep it, others will not find it.")
@click.pass_obj
def unlink_segment(target: Target, force: bool) -> None:
    """Remove a segment.

    Its memory is freed when the last process that is attached detaches."""
    target.unlink(force)
    click.echo(printable(f"Segment '{target.text}' removed"))


@click.command()
@timeout_option
@format_option
@click.pass_obj
def check(target: Target, timeout: float | None, form: str) -> None:
    """Check every invariant of a segment.

    Nobody is stopped. The exit status is 1 if something is wrong.
    """
    with target.attach() as doms:
        report = doms.check(timeout)
    problems = report.problems
    if form == "json":
        print_record(
            {
                "segment": target.text,
                "problems": [{"invariant": name, "problem": text} for name, text in problems],
                "counts": report.counts,
            }
        )
    else:
        if problems:
            print_table([Column("Invariant"), Column("Problem")], problems)
        looked_at = ", ".join(f"{number} {what}" for what, number in report.counts.items())
        found = count_text(len(problems), "problem") if problems else "no problem"
        click.echo(printable(f"Segment '{target.text}': {found} ({looked_at})"))
    if problems:
        click.get_current_context().exit(1)
