"""The command line as a whole: names of commands, exit statuses, errors as JSON, what a terminal
gets to see, and what the README says of it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click import Context
from helpers import thread_party, xml
from shell import WEB1, environment, failure, invoke, on_terminal, out, program, read_json

import shmdomains
from shmdomains import DomainList
from shmdomains.cli import cli

README = Path(__file__).resolve().parents[1] / "README.md"
SAMPLES = Path(__file__).parent / "data" / "domains"
CHANGES = {
    *("create", "load", "define", "undefine", "rename", "domrename", "autostart", "recover"),
    *("import", "unlink", "stress", "postgres", "start", "shutdown", "reboot", "suspend", "resume"),
    *("reset", "destroy", "setmem", "setmaxmem", "setvcpus", "desc", "title", "edit"),
    *("reconcile", "supervise"),
}

# --- create, unlink -------------------------------------------------------------------------


def test_create(segment_dir: Path) -> None:
    (line,) = out("create", "--max-domains", 10, "--max-bytes", "4M")
    assert line == "Segment 'default' created, with room for 10 domains and 4.0 MiB"
    with DomainList.attach() as doms:
        assert (len(doms), doms.info.max_domains, doms.info.lock) == (0, 10, "robust")
    assert failure("create") == (
        f"a segment {segment_dir}/default.segment exists already; attach to it"
    )


@pytest.mark.parametrize(
    "args", [["create", "one"], ["-s", "one", "create"]], ids=["behind", "option"]
)
def test_a_segment_is_named_before_or_behind_the_command(
    segment_dir: Path, args: list[str]
) -> None:
    out(*args)
    assert [file.name for file in shmdomains.segments()] == ["one"]
    assert out("-s", "one", "list") and "no such segment" in failure("list")
    out("create", segment_dir / "two")
    assert (segment_dir / "two").exists()
    assert out("unlink", segment_dir / "two") == [f"Segment '{segment_dir}/two' removed"]
    assert out("unlink", "one") == ["Segment 'one' removed"]
    assert shmdomains.segments() == []


def test_the_variable_gives_way_to_a_name_and_an_option_does_not(
    segment_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMDOMAINS_SEGMENT", "three")
    out("create", "one")
    out("create")
    assert [file.name for file in shmdomains.segments()] == ["one", "three"]
    assert "named twice" in invoke("-s", "one", "unlink", "one", status=2).stderr
    assert len(shmdomains.segments()) == 2


def test_create_for_a_group(segment_dir: Path) -> None:
    out("create", "--mode", 660, "--group", os.getgid())
    (file,) = shmdomains.segments()
    status = file.path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, os.getgid())
    assert "there is no group 'nobody here'" in failure("create", "b", "--group", "nobody here")


@pytest.mark.parametrize(
    "args",
    [
        ["--mode", "644"],
        ["--mode", "rw"],
        ["--max-domains", "0"],
        ["--max-bytes", "1"],
        ["web1.xml"],  # virsh's `create` starts a domain
    ],
)
def test_create_refuses_what_is_no_segment(segment_dir: Path, args: list[str]) -> None:
    assert "Error: " in invoke("create", *args, status=2).stderr
    assert shmdomains.segments() == []


def test_define_makes_the_segment(segment_dir: Path) -> None:
    assert out("define", "-", input=xml("web1")) == ["Domain 'web1' defined from standard input"]
    assert out("list", "--all", "--name") == ["web1"]


# --- names of commands ----------------------------------------------------------------------


def test_virshs_name_is_a_name_too_and_clutters_no_help(loaded: DomainList) -> None:
    assert out("domrename", "web1", "web9") == ["Domain 'web1' renamed to 'web9'"]
    assert "shmdomains domrename" in invoke("domrename", "--help").stdout
    assert "domrename" not in invoke("--help").stdout


@pytest.mark.parametrize("name", ["migrate", "save", "console", "vncdisplay"])
def test_what_only_a_hypervisor_does_is_said(name: str) -> None:
    result = invoke(name, "web1", status=2)
    assert f"shmdomains has no '{name}': " in result.stderr and "hypervisor" in result.stderr
    assert "mean" not in result.stderr


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("lsit", "list"), ("dominf", "dominfo"), ("dump-xml", "dumpxml"), ("chekc", "check")],
)
def test_a_near_name_is_suggested(typed: str, meant: str) -> None:
    assert f"Did you mean {meant}" in invoke(typed, status=2).stderr


@pytest.mark.parametrize("command", sorted(CHANGES))
def test_nothing_is_suggested_that_changes_something(command: str) -> None:
    for typed in (command[:-1], command + "e", command[1:], "dom" + command, command.upper()):
        if cli.get_command(Context(cli), typed):
            continue
        stderr = invoke(typed, status=2).stderr
        assert f"No such command '{typed}'" in stderr or "has no" in stderr
        suggested = stderr.partition("Did you mean")[2]
        assert not CHANGES & set(re.findall(r"[a-z]+", suggested)), stderr


# --- how it ends ----------------------------------------------------------------------------


def test_exit_statuses_are_documented() -> None:
    said = invoke("--help").stdout.partition("Exit status:")[2]
    readme = README.read_text()
    for status in (0, 1, 2, 3, 130):
        assert re.search(rf"^ *{status} +\S", said, re.MULTILINE)
        assert re.search(rf"\b{status}\s+\w+", readme.partition("Exit status: ")[2][:400])


# --- JSON -----------------------------------------------------------------------------------


def error(*args: object, status: int = 1, **more: Any) -> dict[str, Any]:
    """The one object on stderr of a command that fails with ``--format json``."""
    result = invoke(*args, "--format", "json", status=status, **more)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    record = json.loads(line)
    assert isinstance(record, dict)
    return record


def test_errors_are_json_where_results_are(loaded: DomainList, segment_dir: Path) -> None:
    assert error("dominfo", "nope\x9b") == {
        "error": "DomainNotFound",
        "message": "failed to get domain 'nope\x9b'",
    }
    assert "\x9b" not in invoke("dominfo", "nope\x9b", "--format=json", status=1).stderr
    missing = error("-s", "two", "list")
    assert missing["error"] == "SegmentNotFound"
    assert missing["path"] == f"{segment_dir}/two.segment"
    assert "no such segment" in missing["message"]


def test_json_names_the_holder(loaded: DomainList, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    with thread_party(doms=loaded) as other:
        other.tell("doms.lock()")
        record = error("load", tmp_path / "more", "--timeout", 0)
        assert record["error"] == "LockTimeout"
        holder = record["holder"]
        assert holder["pid"] == os.getpid() and holder["alive"] and holder["command"]
        other.tell("doms.unlock()")


@pytest.mark.parametrize(
    "args", [["check", "--timeout", "soon"], ["nonsense"], ["list", "--nosuch"], ["dominfo"]]
)
def test_json_of_a_wrong_command_line(segment_dir: Path, args: list[str]) -> None:
    record = error(*args, status=2)
    assert record["error"] and record["message"]


def test_warnings_are_json_too(segment_dir: Path, config_dir: Path) -> None:
    (config_dir / "autostart").mkdir()
    (config_dir / "autostart" / "gone.xml").symlink_to(config_dir / "gone.xml")
    result = invoke("load", config_dir, "--format", "json")
    (line,) = result.stderr.splitlines()
    assert json.loads(line)["warning"].startswith("autostart link ")
    assert len(json.loads(result.stdout)["loaded"]) == 4


# --- on a terminal --------------------------------------------------------------------------

HOSTILE = "a\x9b31mb\u202ec"


def test_a_name_does_not_command_a_terminal(loaded: DomainList) -> None:
    loaded.define(xml(HOSTILE, title=HOSTILE))
    for command in (
        ["list", "--all", "--name"],
        ["list", "--all", "--name", "--uuid"],
        ["list", "--all", "--format", "json"],
        ["dominfo", HOSTILE, "--format", "json"],
        ["domname", HOSTILE],
        ["dumpxml", HOSTILE],
    ):
        seen = on_terminal(*command)
        assert "\x9b" not in seen and "\u202e" not in seen, command
        assert "31mb" in seen, command
    assert "a\\x9b31mb\\u202ec\n" in on_terminal("list", "--all", "--name")
    assert "<name>a&#x9b;31mb&#x202e;c</name>" in on_terminal("dumpxml", HOSTILE)


def test_a_pipe_gets_the_name_as_it_is(loaded: DomainList) -> None:
    loaded.define(xml(HOSTILE, title=HOSTILE))
    assert HOSTILE in program("list", "--all", "--name").stdout.splitlines()
    assert program("domname", HOSTILE).stdout == HOSTILE + "\n"
    assert f"<name>{HOSTILE}</name>" in program("dumpxml", HOSTILE).stdout
    assert HOSTILE in [record["name"] for record in read_json("list", "--all")]


# --- the README -----------------------------------------------------------------------------


def commands_of_the_readme() -> Iterator[tuple[str, dict[str, str]]]:
    """Each with what is exported before it in the same block."""
    for block in re.findall(
        r"^```console\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL
    ):
        exported: dict[str, str] = {}
        for line in re.findall(r"^\$ (.*?)(?: +#.*)?$", block, re.MULTILINE):
            if line.startswith("export "):
                name, _, value = line.removeprefix("export ").partition("=")
                exported[name] = value
            elif line.startswith("shmdomains "):
                yield line, dict(exported)


@contextmanager
def what_is_there(command: str) -> Iterator[None]:
    """What the reader has running, and a command is about."""
    with ExitStack() as there:
        if command in ("domjobabort", "wait"):
            doms = there.enter_context(DomainList.attach())
        if command == "domjobabort":
            there.enter_context(doms.job("web1", "backup"))
        if command == "wait":
            with doms.get("web1") as dom:
                dom.activate()
        yield
        if command == "wait":
            with dom:
                dom.deactivate()


def test_the_commands_of_the_readme_run(
    segment_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "qemu"
    config.mkdir()
    for name in ("web1", "db1"):
        (config / f"{name}.xml").write_text(xml(name, WEB1 if name == "web1" else None))
    (config / "autostart").mkdir()
    for name in ("web1", "web2", "batch1"):
        (tmp_path / f"{name}.xml").write_text(xml(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDITOR", "true")
    ran = set()
    for line, exported in commands_of_the_readme():
        if "postgresql://" in line:  # test_cli_postgres.py has a server
            continue
        line = line.replace("/etc/libvirt/qemu", str(config)).replace(
            "tests/data/domains", str(SAMPLES)
        )
        args = shlex.split(line)[1:]
        if args[0] == "stress":
            args += ["--seconds", "0.3", "--workers", "2"]
        if args[-1] == "supervise":  # it goes on: test_cli_supervise.py ends it
            ran.add("supervise")
            continue
        if "--listen" in args:  # it goes on: test_cli_metrics.py asks it
            args[-1:] = ["127.0.0.1:0", "--once"]
        with what_is_there(args[0]):
            done = program(*args, env=environment(**exported))
        assert (done.returncode, done.stderr if exported else "") == (0, ""), (line, done)
        ran.add((args[2] if args[0] == "-s" else args[0]).split()[0])
    assert ran == set(cli.commands) - {"completion", "postgres"}
