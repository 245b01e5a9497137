"""The commands that talk to a guest's QEMU: ``qemu-monitor-command`` and ``console``."""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import stat
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from .driving import driven
from .tables import Failure, print_lines
from .types import Target, domain_argument, flag, timeout_option

_ESCAPE = b"\x1d"  # Ctrl-]
_NO_MONITOR = "this function is not supported by the connection driver: virDomainQemuMonitorCommand"


@click.command("qemu-monitor-command")
@domain_argument
@click.argument("cmd", nargs=-1, required=True)
@flag("hmp", "The command is of QEMU's monitor for people.")
@flag("pretty", "Lay out the answer.")
@timeout_option
@click.pass_obj
def qemu_monitor_command(
    target: Target,
    domain: str,
    cmd: tuple[str, ...],
    hmp: bool,
    pretty: bool,
    timeout: float | None,
) -> None:
    """Say a command to a guest's QEMU.

    It is JSON, or with --hmp as QEMU's monitor for people takes it. Several words are put together.
    What it changes, the record does not know."""
    if hmp and pretty:
        raise Failure("Options --hmp and --pretty are mutually exclusive")
    text = " ".join(cmd)
    with driven(target, domain, None, timeout) as (driver, info):
        qmp = getattr(driver, "qmp", None)
        if qmp is None:
            raise Failure(_NO_MONITOR)
        if not info.is_active:
            raise Failure("Requested operation is not valid: domain is not running")
        if hmp:
            said = qmp(info, "human-monitor-command", **{"command-line": text})
            click.echo(str(said).replace("\r\n", "\n"), nl=not str(said).endswith("\n"))
            return
        try:
            asked = json.loads(text)
            execute, arguments = asked["execute"], asked.get("arguments") or {}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise Failure(
                f"internal error: cannot parse json {text}: it is no "
                '{"execute": NAME, "arguments": {...}}'
            ) from None
        answer = {"return": qmp(info, execute, **arguments)}
    print_lines([json.dumps(answer, indent=2 if pretty else None)])


@click.command()
@domain_argument
@click.option("--devname", metavar="ALIAS", default="serial0", help="Which: serial0 is the first.")
@timeout_option
@click.pass_obj
def console(target: Target, domain: str, devname: str, timeout: float | None) -> None:
    """Connect to a guest's serial console; Ctrl-] ends it."""
    with driven(target, domain, None, timeout) as (_, info):
        if not info.is_active:
            raise Failure("The domain is not running")
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise Failure("Cannot run interactive console without a controlling TTY")
        serial = info.data.get("serial") if hasattr(info.data, "get") else None
        place = (serial or {}).get(devname)
        if place is None:
            raise Failure(f"internal error: cannot find character device {devname}")
        name = info.name
    with _opened(place) as line:
        click.echo(f"Connected to domain '{name}'")
        click.echo("Escape character is ^] (Ctrl + ])")
        _talk(line)
    click.echo()


@contextmanager
def _opened(place: str) -> Iterator[int]:
    """A pty, or a socket that QEMU listens on."""
    try:
        if stat.S_ISSOCK(os.stat(place).st_mode):
            connection = socket.socket(socket.AF_UNIX)
            with connection:
                connection.connect(place)
                yield connection.fileno()
            return
        line = os.open(place, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise Failure(f"Unable to open console {place}: {error.strerror}", error) from None
    try:
        # Two who read one console would each get a part.
        fcntl.flock(line, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield line
    except BlockingIOError as error:
        text = "operation failed: Active console session exists for this domain"
        raise Failure(text, error) from None
    finally:
        os.close(line)


def _talk(line: int) -> None:
    """Between the terminal and the guest, until Ctrl-] or the guest's end. The terminal is as it
    was afterwards, however this ends."""
    keys, screen = sys.stdin.fileno(), sys.stdout.fileno()
    before = termios.tcgetattr(keys)
    try:
        tty.setraw(keys)
        while True:
            ready: list[Any] = select.select([keys, line], [], [])[0]
            if line in ready and not _pass(line, screen):
                return
            if keys in ready and not _pass(keys, line, _ESCAPE):
                return
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, before)


def _pass(source: int, to: int, escape: bytes = b"") -> bool:
    """Pass on what has come; false at its end, or at the escape character."""
    try:
        text = os.read(source, 4096)
    except BlockingIOError:
        return True
    except OSError:  # of a pty whose other end is closed
        return False
    before, found, _ = text.partition(escape) if escape else (text, b"", b"")
    while before:
        try:
            before = before[os.write(to, before) :]
        except BlockingIOError:
            select.select([], [to], [])
    return bool(text) and not found
