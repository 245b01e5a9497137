"""The commands about a whole list: ``load``, ``export``, ``segments``, ``check`` and so on.

`create`, `load` and `import` make the list; the latter two enter what they can and report the
rest. The others block nobody. Of these `unlink` removes the name and `recover` repairs; the rest
change nothing.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ..config import LoadFailure, LoadReport
from ..errors import DefinitionError, ShmDomainsError
from ..holder import LockHolder
from ..memory import segment_file
from ..memory.domain_list import AttachedProcess, DomainList, ListInfo
from ..memory.invariants import (
    CheckReport,
    HeldLock,
    RecoverReport,
    Repair,
    lock_text,
)
from ..transfer import export_domains, export_xml, import_domains, new_file
from .tables import (
    Column,
    Failure,
    count_text,
    describe,
    end_with_failure,
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
from .types import (
    Target,
    file_mode,
    flag,
    format_option,
    limit_options,
    plainly,
    segment_argument,
    source_text,
    timeout_option,
    to_read,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..libvirts import Carried


# --- create ---------------------------------------------------------------------------------


@click.command()
@segment_argument
@limit_options
@click.option(
    "--mode", type=file_mode, help="Of a segment: 600, or 660 for a group.  [default: 600]"
)
@click.option("--group", help="The group that may use a segment, too: name or number.")
@click.pass_obj
def create(
    target: Target,
    max_domains: int | None,
    max_bytes: int | None,
    mode: int | None,
    group: str | None,
) -> None:
    """Make an empty list.

    NAME is a segment's, `default` if it is left out, or the URL of a list on PostgreSQL. `load`,
    `define` and `import` make a list, too, if there is none. A segment's locks are robust ones:
    those of multiprocessing are for the children of the program that made them.
    """
    if target.shown.endswith(".xml"):
        raise click.UsageError("This makes a segment, not a domain; for that there is `define`.")
    number = int(group) if group and group.isdecimal() else group
    with target.create(
        max_domains=max_domains, max_bytes=max_bytes, mode=mode, group=number
    ) as doms:
        room = f", with {_room(doms.info)}" if target.in_shared_memory else ""
        click.echo(printable(f"{_capital(target.what)} created{room}"))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _room(info: ListInfo) -> str:
    return f"room for {count_text(info.max_domains, 'domain')} and {size_text(info.bytes_max)}"


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
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    help="Processes that parse the files, this one among them.",
)
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
    """Load a config directory; makes the list if need be.

    Every *.xml in DIR becomes a persistent domain. A file that is wrong is reported and skipped;
    the exit status is then 1. What is defined, renamed or undefined later is saved in DIR.
    """
    with (
        target.open(max_domains=max_domains, max_bytes=max_bytes) as doms,
        _progress() as progress,
    ):
        report = doms.load_all_configs(directory, autostart_dir, progress, workers, timeout)
    _print_load_report(target, report, form)
    end_with_failure(report.failures)


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
    # Imported here, because that takes longer than `list` takes to run.
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
                "segment": target.shown,
                "loaded": report.loaded,
                "failures": [_failure_record(failure) for failure in report.failures],
            }
        )
        return
    for failure in report.failures:
        print_error(str(failure))
    text = f"{count_text(len(report.loaded), 'domain')} loaded into {target.what}"
    if report.failures:
        text += f", {count_text(len(report.failures), 'file')} failed"
    click.echo(printable(text))


def _failure_record(failure: LoadFailure) -> dict[str, Any]:
    return {"path": path_text(failure.path), "line": failure.line, "reason": failure.reason}


# --- export, import -------------------------------------------------------------------------


@click.command("export")
@click.argument("file", metavar="FILE|DIR/", required=False, type=click.Path(allow_dash=True))
@click.option("--to", metavar="URI", help="Define them in a libvirt: qemu:///system.")
@flag("force", "Replace XML files that are there.")
@click.pass_obj
def export_command(target: Target, file: str | None, to: str | None, force: bool) -> None:
    """Write all domains to a file, or their XML to a directory.

    With --to they are defined in a libvirt. FILE is for `import`: the way to another layout version
    of the segment, and to another host; - is standard output. A DIR that exists or ends in / gets
    NAME.xml for each domain, and next/NAME.xml where there is a next definition. No lock is taken,
    and a poisoned or damaged segment gives what can be read of it; what cannot be is named, and the
    exit status is then 1.
    """
    if (file is None) == (to is None):
        raise click.UsageError("Say FILE, DIR/ or --to URI, one of them.")
    if to is not None:
        from ..libvirts import to_libvirt

        with target.attach() as doms, plainly():
            _print_carried(to_libvirt(doms, to), f"defined in {to}", err=True)
        return
    assert file is not None
    failures: list[str] = []

    def failed(name: str, exc: ShmDomainsError) -> None:
        failures.append(name)
        print_error(f"domain '{name}': {exc}", exc)

    if file == "-" and is_terminal():
        raise click.UsageError("An export is binary; send it to a file or a pipe.")
    with target.attach() as doms:
        if file.endswith("/") or os.path.isdir(file):
            count = export_xml(doms, file, overwrite=force, failed=failed)
            text = f"{count_text(count, 'definition')} exported"
        else:
            with _to_write(file) as stream:
                count = export_domains(doms, stream, failed)
            text = f"{count_text(count, 'domain')} exported"
    text += f", {len(failures)} with an error" if failures else ""
    click.echo(text, err=True)
    end_with_failure(failures)


def _print_carried(carried: Carried, what: str, err: bool = False) -> None:
    """Say what came over, what did not, and why."""
    for name, left in carried.left:
        print_warning(f"domain '{name}', not carried over: {left}")
    for name, reason in carried.failures:
        print_error(f"domain '{name}': {reason}")
    click.echo(printable(f"{count_text(len(carried.names), 'domain')} {what}"), err=err)
    end_with_failure(carried.failures)


@contextmanager
def _to_write(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        if sys.stdout is None:
            raise OSError(errno.EBADF, "standard output is closed")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    elif _is_special(file):
        with open(os.open(file, os.O_WRONLY), "wb") as stream:
            yield stream
    else:
        with new_file(Path(file)) as stream:
            yield stream


def _is_special(file: str) -> bool:
    """Whether to write into the file itself: a device or pipe, which must be ours or the
    system's."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return False
    if stat.S_ISREG(status.st_mode):
        return False
    if status.st_uid not in (0, os.getuid()):
        raise PermissionError(errno.EPERM, f"it belongs to uid {status.st_uid}", file)
    return True


@click.command("import")
@click.argument("file", required=False, type=click.Path(allow_dash=True))
@click.option("--from", "source", metavar="URI", help="Of a libvirt: qemu:///system.")
@limit_options
@timeout_option
@click.pass_obj
def import_command(
    target: Target,
    file: str | None,
    source: str | None,
    max_domains: int | None,
    max_bytes: int | None,
    timeout: float | None,
) -> None:
    """Enter the domains of an export, or those of a libvirt.

    Makes the list if need be. Active domains stay active and get new ids. A domain that cannot
    be entered is reported; the exit status is then 1. FILE may be - for standard input.

    Of a libvirt persistent domains come in as they are defined, and are shut off. What cannot be
    carried over is said.
    """
    if (file is None) == (source is None):
        raise click.UsageError("Say FILE or --from URI, one of them.")
    if source is not None:
        from ..libvirts import from_libvirt

        with target.open(max_domains=max_domains, max_bytes=max_bytes) as doms, plainly():
            carried = from_libvirt(doms, source, timeout)
            _print_carried(carried, f"imported into {target.what}")
        return
    assert file is not None
    with (
        to_read(file) as stream,
        target.open(max_domains=max_domains, max_bytes=max_bytes) as doms,
    ):
        try:
            report = import_domains(doms, stream, timeout)
        except DefinitionError as exc:
            raise Failure(f"{source_text(file)}: {exc}", exc) from None
    for name, reason in report.failures:
        print_error(f"domain '{name}': {reason}")
    imported = count_text(len(report.imported), "domain")
    click.echo(printable(f"{imported} imported into {target.what}"))
    end_with_failure(report.failures)


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
    for more in attached[1:] + ([f"poisoned: {info.poisoned}"] if info.poisoned else []):
        yield ["", "", "", "", "", more]


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
        "poisoned": info.poisoned,
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
@segment_argument
@flag("force", "Even if processes are attached; they keep it, others will not find it.")
@click.pass_obj
def unlink_segment(target: Target, force: bool) -> None:
    """Remove a list.

    A segment's memory is freed when the last process that is attached detaches."""
    target.unlink(force)
    click.echo(printable(f"{_capital(target.what)} removed"))


# --- check, recover ---------------------------------------------------------------------------

_NOT_SETTLED = 3


@click.command()
@timeout_option
@format_option
@click.pass_obj
def check(target: Target, timeout: float | None, form: str) -> None:
    """Check every invariant of a list.

    Nobody is stopped for longer than a moment. The exit status is 0 if every invariant holds, 1 if
    something is wrong, and 3 if nothing is, as far as could be told: processes were at work, or a
    lock was not free in time.
    """
    with target.attach() as doms:
        report, names = doms.check(timeout), doms._invariants
    if form == "json":
        print_record(_check_record(target, report, names))
    else:
        columns = [Column("Invariant"), Column("Result", colour=_result_colour), Column("Reason")]
        print_table(columns, _check_rows(report, names))
        looked_at = ", ".join(f"{number} {what}" for what, number in report.counts.items())
        count = len(report.problems)
        found = count_text(count, "problem") if count else "no problem"
        click.echo(printable(f"{_capital(target.what)}: {found} ({looked_at})"))
    end_with_failure(report.problems)
    if report.unsettled:
        click.get_current_context().exit(_NOT_SETTLED)


def _result_colour(cell: str) -> str | None:
    return {"ok": "green", "problem": "red", "not settled": "yellow"}.get(cell)


def _check_rows(report: CheckReport, names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    for name in names:
        wrong = [(name, "problem", text) for known, text in report.problems if known == name]
        open = [(name, "not settled", why) for known, why in report.unsettled if known == name]
        yield from wrong + open or [(name, "ok", "")]


def _check_record(target: Target, report: CheckReport, names: Sequence[str]) -> dict[str, Any]:
    return {
        "segment": target.shown,
        "problems": [{"invariant": name, "problem": text} for name, text in report.problems],
        "not_settled": [{"invariant": name, "reason": why} for name, why in report.unsettled],
        "invariants": {name: _result(report, name) for name in names},
        "counts": report.counts,
        "longest_hold": report.longest_hold,
    }


def _result(report: CheckReport, name: str) -> str:
    if any(known == name for known, _ in report.problems):
        return "problem"
    return "not settled" if any(known == name for known, _ in report.unsettled) else "ok"


@click.command()
@timeout_option
@format_option
@click.pass_obj
def recover(target: Target, timeout: float | None, form: str) -> None:
    """Repair now what dead processes left.

    Nothing needs this: whoever takes a lock next repairs what its dead holder left. It shows what
    there was to repair. A lock whose holder lives is left alone and shown. The exit status is 1 if
    a repair failed.
    """
    with target.attach() as doms:
        report = doms.recover(timeout)
    if form == "json":
        print_record(_recover_record(target, report))
        return
    columns = [Column("Lock"), Column("Left by"), Column("Repaired")]
    print_table(columns, _recover_rows(report))
    repaired = count_text(len(report.repairs), "repair")
    freed = f", {size_text(report.freed)} of garbage freed" if report.freed else ""
    held = f", {count_text(len(report.held), 'lock')} held by others" if report.held else ""
    click.echo(printable(f"{_capital(target.what)}: {repaired}{freed}{held}"))


def _recover_rows(report: RecoverReport) -> Iterator[tuple[str, str, str]]:
    for repair in report.repairs:
        died = "a rule that was begun" if repair.lock == "files" else "an earlier repair"
        died = died if repair.died is None else f"{repair.died.who}, dead"
        yield lock_text(repair.lock, repair.name), died, repair.what
    for lock in report.held:
        holder = str(lock.holder or "an unknown process")
        yield lock_text(lock.lock, lock.name), "-", f"nothing: held by {holder}"


def _recover_record(target: Target, report: RecoverReport) -> dict[str, Any]:
    return {
        "segment": target.shown,
        "repairs": [
            {**_lock_record(one, one.died), "repaired": one.what} for one in report.repairs
        ],
        "held": [_lock_record(one, one.holder) for one in report.held],
        "freed": report.freed,
    }


def _lock_record(lock: Repair | HeldLock, holder: LockHolder | None) -> dict[str, Any]:
    return {
        "lock": lock.lock,
        "domain": lock.name,
        "pid": holder and holder.pid,
        "tid": holder and holder.tid,
        "command": holder and holder.command,
    }
