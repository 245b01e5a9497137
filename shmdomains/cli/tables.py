"""The output of the commands: tables in the layout of virsh, pairs, JSON, and errors in one line.

Promises. Output into a pipe or a file is plain: no colours, nothing cut off, nothing that depends
on a terminal's width. A name, path or title cannot break a line or control the terminal: control
characters are shown as escapes. The layout is virsh's (vshTablePrint), for scripts that read its
tables; wide and combining characters count as they are displayed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import click
from msgspec.structs import asdict

from ..errors import DefinitionError, LockTimeout

# Control characters, line and paragraph separators, direction marks, and the surrogates that stand
# for bytes that are not UTF-8.
_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Those of them that JSON and XML may hold unescaped.
_LEFT_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_LINES_AT_ONCE = 1000


def printable(text: str) -> str:
    r"""Return `text` on one line, with control characters as escapes.

    >>> print(printable("Café ☕\n"))
    Café ☕\n
    """
    return _UNSAFE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def path_text(path: Path) -> str:
    r"""Return a path as text, with bytes that are not UTF-8 as escapes.

    >>> path_text(Path("/etc/vm/\udcff.xml"))
    '/etc/vm/\\xff.xml'
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# --- errors ---------------------------------------------------------------------------------


JSON = "shmdomains.json"
QUIET = "shmdomains.quiet"
"""In a context's `meta`: no headers, no blank lines (virsh's ``--quiet``)."""
"""The key in click's `Context.meta`: whether the user asked for JSON."""


BLANK = "shmdomains.blank"
"""Another: whether a blank line follows the command, as behind each of virsh's."""


class Failure(click.ClickException):
    """An error for the user: one line on stderr (see `print_error`), and the exit status."""

    def __init__(self, message: str, cause: BaseException | None = None) -> None:
        super().__init__(message)
        # Made now: click shows it after it has left the command's context.
        self._line = _error_line(message, cause)

    def show(self, file: Any = None) -> None:
        click.echo(self._line, err=True)


class UsageFailure(Failure):
    """An error in the command line, shown without click's usage text."""

    exit_code = 2


def print_error(message: str, cause: BaseException | None = None) -> None:
    """Print ``error: ...`` on one line or, if JSON was asked for, as an object with details."""
    click.echo(_error_line(message, cause), err=True)


def print_warning(message: str) -> None:
    if wants_json():
        click.echo(_json({"warning": message}, sys.stderr), err=True)
    else:
        click.echo(f"warning: {printable(message)}", err=True)


def wants_json() -> bool:
    """Whether the user asked for JSON."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(JSON))


def _error_line(message: str, cause: BaseException | None) -> str:
    if not wants_json():
        return f"error: {printable(message)}"
    record = {"error": type(cause).__name__, "message": message}
    return _json({**record, **dict(_known_of(cause))}, sys.stderr)


def _known_of(cause: BaseException | None) -> Iterator[tuple[str, Any]]:
    if isinstance(cause, OSError) and cause.filename is not None:
        yield "path", path_text(Path(os.fsdecode(cause.filename)))
    if isinstance(cause, DefinitionError):
        yield "element", cause.element
        yield "line", cause.line
    if isinstance(cause, LockTimeout):
        yield "holder", None if cause.holder is None else asdict(cause.holder)


def describe(exc: BaseException) -> str:
    """Return an exception's message; for an OSError the file and the reason, without the number.

    >>> describe(FileNotFoundError(2, "No such file or directory", "web1.xml"))
    'web1.xml: No such file or directory'
    """
    if not isinstance(exc, OSError) or exc.strerror is None:
        return str(exc) or type(exc).__name__
    if exc.filename is None:
        return exc.strerror
    return f"{os.fsdecode(exc.filename)}: {exc.strerror}"


def is_broken_pipe(exc: OSError) -> bool:
    """Whether the reader of our output has gone, which is not an error."""
    return exc.errno == errno.EPIPE


# --- tables ---------------------------------------------------------------------------------


class Column(NamedTuple):
    """One column: its head, whether it holds numbers, and the colour of a cell on a terminal."""

    title: str
    right: bool = False
    colour: Callable[[str], str | None] | None = None


def print_table(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], gaps: bool = False
) -> None:
    """Print a table as virsh does, on a terminal with colours. `gaps`: leave those before an empty
    last cell, as virsh does, too."""
    cells = [[printable(cell) for cell in row] for row in rows]
    lines = _table_lines(columns, cells)
    context = click.get_current_context(silent=True)
    if context is not None and context.meta.get(QUIET):
        lines = islice(lines, 2, None)  # without the head
    print_lines(lines if gaps else map(str.rstrip, lines))


def _table_lines(columns: Sequence[Column], rows: list[list[str]]) -> Iterator[str]:
    heads = [column.title for column in columns]
    widths = [max(map(_width, cells)) for cells in zip(heads, *rows, strict=True)]
    rule = sum(width + 3 for width in widths)
    colours = _shows_colours()
    yield _line(columns, heads, widths, _bold if colours else None)
    yield "-" * (min(rule, _terminal_width()) if is_terminal() else rule)
    for row in rows:
        yield _line(columns, row, widths, _coloured if colours else None)


def _terminal_width() -> int:
    import shutil  # brings four compressors

    return shutil.get_terminal_size().columns


def _width(cell: str) -> int:
    """The width on a terminal: some characters take two columns, some none."""
    if cell.isascii():
        return len(cell)
    from rich.cells import cell_len

    return cell_len(cell)


def _line(
    columns: Sequence[Column],
    cells: Sequence[str],
    widths: Sequence[int],
    paint: Callable[[Column, str], str] | None,
) -> str:
    parts = []
    last = len(cells) - 1
    for number, (column, cell, width) in enumerate(zip(columns, cells, widths, strict=True)):
        # Behind the last cell there is nothing, but before an empty one there is its gap.
        gap = "" if number == last and not column.right else " " * (width - _width(cell))
        text = paint(column, cell) if paint else cell
        parts.append(gap + text if column.right else text + gap)
    return " " + "   ".join(parts)


def _bold(_column: Column, cell: str) -> str:
    return click.style(cell, bold=True)


def _coloured(column: Column, cell: str) -> str:
    colour = column.colour(cell) if column.colour else None
    return click.style(cell, fg=colour) if colour else cell


def end_with_failure(failed: object) -> None:
    """End the command with status 1 if anything failed; the errors were printed."""
    if failed:
        click.get_current_context().exit(1)


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print ``Label:   value`` lines in virsh's column."""
    print_lines(f"{label + ':':<15} {printable(value)}".rstrip() for label, value in pairs)


def is_terminal() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def _shows_colours() -> bool:
    return is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_lines(lines: Iterable[str]) -> None:
    """Print many lines with few writes."""
    iterator = iter(lines)
    while block := list(islice(iterator, _LINES_AT_ONCE)):
        click.echo("\n".join(block))


def print_names(lines: Iterable[str]) -> None:
    """Print names for a program: unchanged to a pipe, `printable` to a terminal."""
    print_lines(map(printable, lines) if is_terminal() else lines)


def print_xml(text: str) -> None:
    """Print a document in UTF-8, whatever the locale: it has no declaration.

    On a terminal, characters that would control it become character references: the same document.
    """
    if is_terminal():
        text = _LEFT_UNSAFE.sub(lambda match: f"&#x{ord(match[0]):x};", text)
    click.echo(text.rstrip("\n").encode())


# --- JSON -----------------------------------------------------------------------------------


def print_records(records: Sequence[dict[str, Any]]) -> None:
    """Print a JSON array with one record per line, so that line tools can read it too."""
    if not records:
        click.echo("[]")
        return
    last = len(records) - 1
    click.echo("[")
    print_lines(
        f"  {_json(record, sys.stdout)}{'' if number == last else ','}"
        for number, record in enumerate(records)
    )
    click.echo("]")


def print_record(record: dict[str, Any]) -> None:
    """Print one JSON object."""
    click.echo(_json(record, sys.stdout, indent=2))


def print_line(record: dict[str, Any]) -> None:
    """Print one JSON object on a line of its own, at once."""
    click.echo(_json(record, sys.stdout))


def _json(value: Any, stream: TextIO | None, indent: int | None = None) -> str:
    encoding = (getattr(stream, "encoding", None) or "ascii").lower()
    text = json.dumps(value, indent=indent, ensure_ascii=encoding not in ("utf-8", "utf8"))
    # JSON leaves some characters unescaped that control a terminal.
    return _LEFT_UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


# --- quantities -----------------------------------------------------------------------------


def size_text(size: int) -> str:
    """Return bytes in the largest binary unit that leaves at least one.

    >>> size_text(1335296), size_text(100)
    ('1.3 MiB', '100 B')
    """
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def count_text(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> count_text(1, "domain"), count_text(2, "domain")
    ('1 domain', '2 domains')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
