"""Runs the commands, as a user meets them: in this process, in one of its own, on a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

import shmdomains
from shmdomains import DomainList, DomainState
from shmdomains.cli import cli, types

DEADLINE = 30
WEB1 = "11111111-2222-3333-4444-555555555555"


def _runner() -> CliRunner:
    try:
        return CliRunner(mix_stderr=False)  # type: ignore[call-arg]  # click before 8.2
    except TypeError:
        return CliRunner()


def ran(*args: object, input: str | bytes | None = None) -> Result:
    """Run a command, whatever it comes to; fails on whatever would be a traceback."""
    return _runner().invoke(cli, [str(arg) for arg in args], input=input, catch_exceptions=False)


def invoke(*args: object, status: int = 0, input: str | bytes | None = None) -> Result:
    """Run a command; fails on another exit status and on whatever would be a traceback."""
    result = ran(*args, input=input)
    assert result.exit_code == status, result.stdout + result.stderr
    return result


def out(*args: object, **more: Any) -> list[str]:
    """The lines of a command that prints nothing on stderr."""
    result = invoke(*args, **more)
    assert result.stderr == ""
    return result.stdout.splitlines()


def failure(*args: object, **more: Any) -> str:
    """The one line that a failing command prints on stderr."""
    result = invoke(*args, status=1, **more)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    return result.stderr.removeprefix("error: ").rstrip("\n")


def define_failure(*args: object, file: str = "-", **more: Any) -> str:
    """Why a `define` failed; it says first which file."""
    result = invoke("define", file, *args, status=1, **more)
    where, why = result.stderr.splitlines()
    assert where == f"error: Failed to define domain from {types.source_text(file)}"
    return why.removeprefix("error: ")


def read_json(*args: object, **more: Any) -> Any:
    return json.loads(invoke(*args, "--format", "json", **more).stdout)


def activate(doms: DomainList, name: str, state: DomainState = DomainState.RUNNING) -> int:
    with doms.get(name=name) as dom:
        return dom.activate(pid=4711, state=state, reason=0)


# --- as a process -----------------------------------------------------------------------------

ROOT = Path(shmdomains.__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    unset = ("NO_COLOR", "COLUMNS", "PYTHONUNBUFFERED")
    plain = {name: value for name, value in os.environ.items() if name not in unset}
    return {**plain, "PYTHONPATH": path, "TERM": "xterm", **more}


def process(*args: object, **more: Any) -> subprocess.Popen[bytes]:
    more.setdefault("stdout", subprocess.PIPE)
    more.setdefault("env", environment())
    return subprocess.Popen([sys.executable, *map(str, args)], **more)


def program(*args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -m shmdomains``."""
    more.setdefault("stdout", subprocess.PIPE)
    more.setdefault("stderr", subprocess.PIPE)
    more.setdefault("env", environment())
    return subprocess.run(
        [sys.executable, "-m", "shmdomains", *map(str, args)],
        encoding="utf-8",
        errors="surrogateescape",
        timeout=DEADLINE,
        **more,
    )


def on_terminal(*args: object, **more: str) -> str:
    """What a terminal of 80 columns gets to see, on either stream."""
    ours, theirs = pty.openpty()
    with process(
        "-m", "shmdomains", *args, stdin=theirs, stdout=theirs, stderr=theirs,
        env=environment(**more), start_new_session=True,
    ) as shown:  # fmt: skip
        os.close(theirs)
        seen = b""
        while block := _read_terminal(ours):
            seen += block
        shown.wait(DEADLINE)
    os.close(ours)
    return seen.decode().replace("\r\n", "\n")


def _read_terminal(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # how Linux says that the other side is closed
        return b""
