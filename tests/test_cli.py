"""The commands, as a user meets them: what they print, where, and how they end.

Most run through click's runner, where anything that would be a traceback fails the test; what a
runner cannot show - pipes, terminals, signals, shells - runs as a process of its own.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import thread_party, xml
from killing import Planted, until
from lxml import etree
from shell import (
    DEADLINE,
    WEB1,
    activate,
    define_failure,
    environment,
    failure,
    invoke,
    on_terminal,
    out,
    process,
    program,
    read_json,
)

import shmdomains
from shmdomains import DomainList, DomainState, PausedReason
from shmdomains.cli import cli, tables, types
from shmdomains.holder import this_host

SAMPLES = Path(__file__).parent / "data" / "domains"


# --- load -----------------------------------------------------------------------------------


def test_load_makes_the_segment(segment_dir: Path, config_dir: Path) -> None:
    assert out("load", config_dir, "--max-domains", 10, "--workers", 2) == [
        "4 domains loaded into segment 'default'"
    ]
    with DomainList.attach() as doms:
        assert len(doms) == 4
        assert doms.info.max_domains == 10
        assert doms.info.config_dir == str(config_dir)
        assert doms.info.autostart_dir == str(config_dir / "autostart")


def test_load_takes_the_usual_autostart_dir(loaded: DomainList, config_dir: Path) -> None:
    assert loaded.info.autostart_dir == str(config_dir / "autostart")


def test_load_takes_the_autostart_dir_that_is_named(
    segment_dir: Path, config_dir: Path, tmp_path: Path
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / "db1.xml").symlink_to(config_dir / "db1.xml")
    out("load", config_dir, "--autostart-dir", links)
    assert out("list", "--all", "--autostart", "--name") == ["db1"]


def test_load_reports_each_failure_once_and_loads_the_rest(
    segment_dir: Path, config_dir: Path
) -> None:
    (config_dir / "bad.xml").write_text("<domain type='kvm'>\n<name>a/b</name></domain>")
    (config_dir / "worse\n.xml").write_text("x")
    result = invoke("load", config_dir, status=1)
    first, second = result.stderr.splitlines()
    assert first.startswith(f"error: {config_dir}/bad.xml:2: name a/b cannot contain '/'")
    assert second.startswith(f"error: {config_dir}/worse\\n.xml:1: ")
    assert result.stdout == "4 domains loaded into segment 'default', 2 files failed\n"
    assert len(out("list", "--all", "--name")) == 4


def test_load_passes_on_warnings(segment_dir: Path, config_dir: Path) -> None:
    (config_dir / "autostart").mkdir()
    (config_dir / "autostart" / "gone.xml").symlink_to(config_dir / "gone.xml")
    result = invoke("load", config_dir)
    assert result.stderr.startswith("warning: autostart link ")
    assert "gone.xml leads to no file" in result.stderr
    assert result.stderr.count("\n") == 1


def test_load_as_json(segment_dir: Path, config_dir: Path) -> None:
    (config_dir / os.fsdecode(b"bad\xff.xml")).write_text("x")
    report = read_json("load", config_dir, status=1)
    assert sorted(report["loaded"]) == ["Web2", "café ☕", "db1", "web1"]
    (bad,) = report["failures"]
    assert bad["path"] == f"{config_dir}/bad\\xff.xml"
    assert bad["line"] == 1 and "Start tag" in bad["reason"]


def test_load_refuses_other_limits_than_those_there_are(
    segment_dir: Path, config_dir: Path
) -> None:
    program("load", config_dir)  # another process, as it is in life
    said = failure("load", config_dir, "--max-domains", 10)
    assert "is there with max_domains=65536, and max_domains=10 is asked for" in said
    assert out("load", config_dir, "--max-domains", 65536) == [
        "4 domains loaded into segment 'default'"
    ]


def test_load_when_the_segment_is_full(segment_dir: Path, config_dir: Path) -> None:
    result = invoke("load", config_dir, "--max-domains", 3, status=1)
    assert "the segment is full" in result.stderr
    assert result.stdout == "3 domains loaded into segment 'default', 1 file failed\n"


@pytest.mark.parametrize(
    "options",
    [
        ["--max-domains", "0"],
        ["--max-bytes", "1M"],
        ["--max-bytes", "4X"],
        ["--workers", "-1"],
        ["--format", "xml"],
    ],
)
def test_load_refuses_wrong_options(
    segment_dir: Path, config_dir: Path, options: list[str]
) -> None:
    assert "Error: " in invoke("load", config_dir, *options, status=2).stderr
    assert list(segment_dir.iterdir()) == []


def test_load_refuses_a_directory_that_is_not_there(segment_dir: Path, tmp_path: Path) -> None:
    assert "does not exist" in invoke("load", tmp_path / "typo", status=2).stderr


# --- list -----------------------------------------------------------------------------------


def test_list_is_laid_out_as_virsh_does(loaded: DomainList) -> None:
    activate(loaded, "web1")
    activate(loaded, "café ☕", DomainState.PAUSED)
    assert invoke("list", "--all").stdout == (
        " Id   Name      State\n"
        "--------------------------\n"
        " 1    web1      running\n"
        " 2    café ☕   paused\n"
        " -    db1       shut off\n"
        " -    Web2      shut off\n"
    )
    assert out("list") == [
        " Id   Name      State",
        "-------------------------",
        " 1    web1      running",
        " 2    café ☕   paused",
    ]


def test_list_of_nothing(loaded: DomainList) -> None:
    assert out("list") == [" Id   Name   State", "--------------------"]
    assert out("list", "--name") == []
    assert read_json("list") == []


def test_list_orders_active_by_id_and_inactive_by_name(segment_dir: Path) -> None:
    with DomainList.create(max_domains=20) as doms:
        for name in ("b", "_", "A", "a", "É", "c", "é", "z"):
            doms.define(xml(name))
        for name in ("z", "c"):
            activate(doms, name)
        # ASCII letters only are folded; the others go by their bytes.
        assert out("list", "--all", "--name") == ["z", "c", "_", "A", "a", "b", "É", "é"]


@pytest.fixture
def mixed(loaded: DomainList) -> DomainList:
    """web1: running; db1: paused, transient; Web2: crashed; café: shut off, autostart."""
    activate(loaded, "web1")
    activate(loaded, "db1", DomainState.PAUSED)
    activate(loaded, "Web2", DomainState.CRASHED)
    loaded.undefine(name="db1")
    with loaded.get(name="café ☕") as dom:
        loaded.set_autostart(dom, True)
    return loaded


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", "web1 db1 Web2"),
        ("--all", "web1 db1 Web2 café"),
        ("--inactive", "café"),
        ("--all --inactive", "web1 db1 Web2 café"),
        ("--persistent", "web1 Web2"),
        ("--transient", "db1"),
        ("--persistent --transient", "web1 db1 Web2"),
        ("--all --persistent", "web1 Web2 café"),
        ("--autostart", ""),
        ("--all --autostart", "café"),
        ("--all --no-autostart", "web1 db1 Web2"),
        ("--state-running", "web1"),
        ("--state-paused", "db1"),
        ("--state-running --state-paused", "web1 db1"),
        ("--state-shutoff", "café"),
        ("--all --state-shutoff --state-other", "Web2 café"),
        ("--state-other", "Web2"),
        ("--state-running --transient", ""),
    ],
)
def test_list_filters(mixed: DomainList, flags: str, names: str) -> None:
    assert [line.split()[0] for line in out("list", "--name", *flags.split())] == names.split()


def test_list_prints_bare_columns(mixed: DomainList) -> None:
    assert out("list", "--uuid", "--state-running") == [WEB1]
    assert out("list", "--all", "--id") == ["1", "2", "3"]  # as virsh: an inactive one has none
    assert out("list", "--all", "--id", "--name") == ["1 web1", "2 db1", "3 Web2", "- café ☕"]
    assert out("list", "--name", "--uuid", "--id", "--state-running") == [f"{WEB1} 1 web1"]


def test_list_with_titles(mixed: DomainList) -> None:
    assert out("list", "--title", "--state-running") == [
        " Id   Name   State     Title",
        "----------------------------------",
        " 1    web1   running   Front end",
    ]


def test_list_as_json(mixed: DomainList) -> None:
    first, *_others, last = read_json("list", "--all", "--title")
    assert first == {
        "id": 1,
        "name": "web1",
        "uuid": WEB1,
        "state": "running",
        "reason": "unknown",
        "persistent": True,
        "autostart": False,
        "pid": 4711,
        "host": this_host(),
        "title": "Front end",
    }
    assert (last["id"], last["pid"], last["name"]) == (None, None, "café ☕")
    assert read_json("list", "--state-running", "--id", "--name") == [{"id": 1, "name": "web1"}]
    lines = out("list", "--all", "--format", "json")
    assert len(lines) == 2 + 4
    assert json.loads(lines[1].rstrip(","))["name"] == "web1"


def test_a_name_can_not_break_a_line_of_a_table(loaded: DomainList) -> None:
    loaded.define(xml("tab\tbell\x9b"))
    assert " -    tab\\tbell\\x9b   shut off" in out("list", "--all")
    assert "tab\tbell\x9b" in invoke("list", "--all", "--name").stdout  # scripts get the name
    assert invoke("domname", "tab\tbell\x9b").stdout == "tab\tbell\x9b\n"


# --- one domain -----------------------------------------------------------------------------


def test_dominfo(loaded: DomainList) -> None:
    activate(loaded, "web1")
    loaded.define(xml("web1", WEB1, memory=4096))
    assert out("dominfo", "web1") == [
        "Id:             1",
        "Name:           web1",
        f"UUID:           {WEB1}",
        "OS Type:        hvm",
        "State:          running",
        "CPU(s):         2",
        "Max memory:     2048 KiB",
        "Used memory:    2048 KiB",
        "Persistent:     yes",
        "Autostart:      disable",
        "Reason:         unknown",
        "PID:            4711",
        "Title:          Front end",
        "Updated:        yes, from the next start on",
    ]


def test_dominfo_as_json(loaded: DomainList) -> None:
    assert read_json("dominfo", "web1") == {
        "id": None,
        "name": "web1",
        "uuid": WEB1,
        "state": "shut off",
        "reason": "unknown",
        "persistent": True,
        "autostart": False,
        "pid": None,
        "host": this_host(),
        "title": "Front end",
        "type": "kvm",
        "os_type": "hvm",
        "vcpus": 2,
        "max_vcpus": 2,
        "memory_kib": 2048,
        "max_memory_kib": 2048,
        "updated": False,
    }


def test_a_domain_is_named_in_virsh_order(loaded: DomainList) -> None:
    assert activate(loaded, "web1") == 1
    for name in ("1", "2", WEB1):
        loaded.define(xml(name))

    def name_of(key: str) -> str:
        return read_json("dominfo", key)["name"]

    assert name_of("1") == "web1"  # the id before the name
    assert name_of("+1") == name_of(" 01") == "web1"
    assert name_of("2") == "2"  # no such id
    assert name_of(WEB1) == "web1"  # the uuid before the name
    assert name_of(WEB1.upper().replace("A", "a")) == "web1"
    assert failure("dominfo", WEB1.replace("-", "")) == (  # 32 characters are no uuid
        f"failed to get domain '{WEB1.replace('-', '')}'"
    )
    with loaded.get(name="web1") as dom:
        dom.deactivate()
    assert name_of("1") == "1"


@pytest.mark.parametrize(
    "key", ["nope", "", "-5", "9" * 12, "9" * 9000, "x" * 36, "a/b", "\udcff", "٣"]
)
@pytest.mark.parametrize("command", ["dominfo", "dumpxml", "undefine", "autostart"])
def test_a_domain_that_is_not_there(loaded: DomainList, command: str, key: str) -> None:
    shown = "\\xff" if key == "\udcff" else key
    assert failure(command, "--", key) == f"failed to get domain '{shown}'"


def test_dumpxml(loaded: DomainList) -> None:
    activate(loaded, "web1")
    loaded.define(xml("web1", WEB1, title="Grüße"))
    assert "<title>Front end</title>" in invoke("dumpxml", "web1").stdout
    later = invoke("dumpxml", "web1", "--inactive")
    assert later.stdout == xml("web1", WEB1, title="Grüße")
    assert later.stdout_bytes == xml("web1", WEB1, title="Grüße").encode()
    assert invoke("dumpxml", "db1", "--inactive").stdout == invoke("dumpxml", "db1").stdout


def test_dumpxml_of_an_active_domain_has_its_id(loaded: DomainList) -> None:
    document = xml("brought", WEB1.replace("1", "6"), extra="<!-- <domain id='5'> -->")
    loaded.define(document.replace("<domain ", "<domain id='7' ", 1))  # of where it came from
    plain = xml("plain", WEB1.replace("1", "7"))
    loaded.define(plain)
    assert invoke("dumpxml", "plain").stdout == plain
    assert etree.fromstring(invoke("dumpxml", "brought").stdout).get("id") is None
    activate(loaded, "db1")
    assert activate(loaded, "brought") == 2
    root = etree.fromstring(invoke("dumpxml", "brought").stdout)
    assert (root.get("id"), root.get("type"), root.findtext("name")) == ("2", "kvm", "brought")
    assert "<!-- <domain id='5'> -->" in invoke("dumpxml", "brought").stdout
    assert etree.fromstring(invoke("dumpxml", "brought", "--inactive").stdout).get("id") is None
    out("define", "-", input=invoke("dumpxml", "brought").stdout)  # it is ignored there


def test_the_words_of_one_domain(loaded: DomainList) -> None:
    assert activate(loaded, "web1") == 1
    assert out("domid", "web1") == ["1"] and out("domid", "db1") == ["-"]
    assert out("domname", "1") == out("domname", WEB1) == ["web1"]
    assert out("domuuid", "1") == [WEB1]
    assert out("domstate", "web1") == ["running"] and out("domstate", "db1") == ["shut off"]
    with loaded.get(name="web1") as dom:
        dom.set_state(DomainState.PAUSED, PausedReason.USER)
    assert out("domstate", "web1", "--reason") == ["paused (user)"]
    for command in ("domid", "domname", "domuuid", "domstate"):
        assert failure(command, "nope") == "failed to get domain 'nope'"


def test_waiting_for_a_state(loaded: DomainList) -> None:
    assert out("wait", "db1", "--state", "shut off") == ["shut off"]
    assert out("wait", "db1", "--state", "paused", "--state", "SHUTOFF", "--timeout", 0) == [
        "shut off"
    ]
    with process(
        *("-m", "shmdomains", "wait", "web1", "--state", "running", "--format", "json"),
        stdout=subprocess.PIPE,
    ) as waiting:
        with Planted(loaded.info.path) as planted:
            slot = next(at for at in range(4) if loaded._handles()[at].uuid == loaded["web1"].uuid)
            until(lambda: planted.read(planted.slot(slot, "waiting")), "it waits", DEADLINE)
        assert activate(loaded, "web1") == 1
        printed, _ = waiting.communicate(timeout=DEADLINE)
    record = json.loads(printed)
    assert (waiting.returncode, record["name"], record["state"]) == (0, "web1", "running")
    in_vain = "waited 0.01 s in vain for domain 'db1', which is shut off"
    assert failure("wait", "db1", "--state", "running", "--timeout", 0.01) == in_vain
    assert failure("wait", "nope", "--state", "running") == "failed to get domain 'nope'"
    for wrong in (["--state", "off"], [], ["--state", "running", "--timeout", "-1"]):
        assert invoke("wait", "db1", *wrong, status=2).stdout == ""


def test_define_from_files_and_standard_input(
    loaded: DomainList, config_dir: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(xml(name))
    assert out("define", tmp_path / "one", "-", tmp_path / "two", input=xml("three")) == [
        f"Domain 'one' defined from {tmp_path}/one",
        "Domain 'three' defined from standard input",
        f"Domain 'two' defined from {tmp_path}/two",
    ]
    assert out("define", input=xml("four", title="ü").encode("utf-16")) == [
        "Domain 'four' defined from standard input"
    ]
    for name in ("one", "two", "three", "four"):
        assert (config_dir / f"{name}.xml").exists()
        assert loaded.peek(name=name).persistent


def test_define_new_redefines_nothing(loaded: DomainList, tmp_path: Path) -> None:
    before = loaded.peek("web1")
    (tmp_path / "again").write_text(xml("web1", memory=4096))
    refused = invoke("define", "--new", tmp_path / "again", status=1)
    assert "domain 'web1' already exists" in refused.stderr and refused.stdout == ""
    assert loaded.peek("web1") == before
    (tmp_path / "fresh").write_text(xml("fresh"))
    assert out("define", "--new", tmp_path / "fresh") == [
        f"Domain 'fresh' defined from {tmp_path}/fresh"
    ]


def test_define_goes_on_after_a_wrong_file(loaded: DomainList, tmp_path: Path) -> None:
    (tmp_path / "good").write_text(xml("good"))
    (tmp_path / "clash").write_text(xml("web1", "0f" * 16))
    (tmp_path / "wrong").write_text(
        "<domain type='kvm'>\n<name>a</name><memory>0</memory></domain>"
    )
    paths = [tmp_path / name for name in ("nope", "clash", "wrong", ".", "good")]
    result = invoke("define", *paths, status=1)
    assert result.stdout == f"Domain 'good' defined from {tmp_path}/good\n"
    lines = result.stderr.splitlines()
    files, (nope, clash, wrong, directory) = lines[::2], lines[1::2]
    # Each as virsh names it: the file first, then what is wrong with it.
    assert files == [f"error: Failed to define domain from {path}" for path in paths[:-1]]
    assert nope == f"error: {tmp_path}/nope: No such file or directory"
    assert clash == f"error: domain 'web1' already exists with uuid {WEB1}"
    assert wrong.startswith("error: ") and "line 2" in wrong
    assert directory == f"error: {tmp_path}: Is a directory"


def test_define_stops_at_what_the_other_files_would_meet_too(
    segment_dir: Path, tmp_path: Path
) -> None:
    out("create", "--max-domains", 1)
    for name in ("one", "two", "three"):
        (tmp_path / name).write_text(xml(name))
    result = invoke("define", *(tmp_path / name for name in ("one", "two", "three")), status=1)
    assert result.stdout == f"Domain 'one' defined from {tmp_path}/one\n"
    first, second = result.stderr.splitlines()
    assert first == f"error: Failed to define domain from {tmp_path}/two"
    assert second.startswith("error: define a domain: the segment is full")


def test_define_reads_no_more_than_a_definition_may_have(loaded: DomainList) -> None:
    assert "more than 16777216" in define_failure(file="/dev/zero")


def test_define_of_an_active_domain_is_for_later(loaded: DomainList) -> None:
    activate(loaded, "web1")
    (line,) = out("define", input=xml("web1", WEB1, memory=9))
    assert line.endswith("; it is running, the change is for its next start")
    info = loaded.peek(name="web1")
    assert (info.definition.memory, info.next_definition.memory) == (2048, 9)


def test_undefine(loaded: DomainList, config_dir: Path) -> None:
    activate(loaded, "db1")
    assert out("undefine", WEB1) == ["Domain 'web1' has been undefined"]
    assert loaded.peek(name="web1") is None
    assert not (config_dir / "web1.xml").exists()
    assert out("undefine", "1") == ["Domain 'db1' has been undefined"]
    assert loaded.peek(name="db1").persistent is False
    assert failure("undefine", "db1") == "domain 'db1' is transient: cannot undefine it"


def test_what_has_no_next_start_is_not_updated(loaded: DomainList) -> None:
    activate(loaded, "web1")
    loaded.define(xml("web1", WEB1, memory=4096))
    assert read_json("dominfo", "web1")["updated"] is True
    out("undefine", "web1")
    assert loaded.peek(name="web1").next_definition is not None
    assert read_json("dominfo", "web1")["updated"] is False
    assert "Updated" not in invoke("dominfo", "web1").stdout


def test_rename(loaded: DomainList, config_dir: Path) -> None:
    assert out("rename", WEB1, "web9") == ["Domain 'web1' renamed to 'web9'"]
    assert loaded.peek(name="web9").definition.name == "web9"
    assert (config_dir / "web9.xml").exists() and not (config_dir / "web1.xml").exists()
    assert failure("rename", "web9", "web9") == "Can't rename domain 'web9' to itself"
    assert failure("rename", "web9", "db1") == "domain with name 'db1' already exists"
    assert failure("rename", "web9", "a/b") == "name a/b cannot contain '/'"
    assert failure("rename", "web9", "a\nb").startswith("invalid char in name: ")
    activate(loaded, "web9")
    assert failure("rename", "web9", "web10") == "cannot rename active domain 'web9'"


def test_autostart(loaded: DomainList, config_dir: Path) -> None:
    link = config_dir / "autostart" / "web1.xml"
    assert out("autostart", "web1") == ["Domain 'web1' marked as autostarted"]
    assert link.is_symlink() and loaded.peek(name="web1").autostart
    assert out("autostart", "web1", "--disable") == ["Domain 'web1' unmarked as autostarted"]
    assert not link.is_symlink() and not loaded.peek(name="web1").autostart
    activate(loaded, "db1")
    out("undefine", "db1")
    assert "transient" in failure("autostart", "db1")


def test_autostart_makes_the_usual_directory(segment_dir: Path, config_dir: Path) -> None:
    out("load", config_dir)
    out("autostart", "web1")
    link = config_dir / "autostart" / "web1.xml"
    assert link.is_symlink() and link.resolve() == (config_dir / "web1.xml").resolve()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_config_directory_that_can_not_be_written(loaded: DomainList, config_dir: Path) -> None:
    config_dir.chmod(0o500)
    try:
        assert "Permission denied" in failure("undefine", "web1")
    finally:
        config_dir.chmod(0o700)
    assert loaded.peek(name="web1") is not None


@pytest.mark.parametrize(
    "command",
    [
        ["define"],
        ["undefine", "web1"],
        ["rename", "web1", "web9"],
        ["autostart", "web1"],
    ],
    ids=lambda command: command[0],
)
def test_a_locked_domain_names_its_holder(loaded: DomainList, command: list[str]) -> None:
    name, *args = command
    fail = define_failure if name == "define" else partial(failure, name)
    with thread_party(doms=loaded) as other:
        other.tell("dom = doms.get(name='web1')")
        before = time.monotonic()
        for timeout in ("0", "0.05"):
            line = fail(*args, "--timeout", timeout, input=xml("web1", WEB1))
            assert f"held by process {os.getpid()}" in line
        assert time.monotonic() - before < 5
        assert out("dominfo", "web1") and out("check") and out("list", "--all")  # wait for nobody
        other.tell("dom.unlock()")


def test_a_locked_list_names_its_holder(loaded: DomainList) -> None:
    with thread_party(doms=loaded) as other:
        other.tell("doms.lock()")
        line = failure("rename", "db1", "db2", "--timeout", "0.05")
        assert f"held by process {os.getpid()}" in line
        other.tell("doms.unlock()")


def test_a_locked_domain_is_one_failure_of_a_load(loaded: DomainList, config_dir: Path) -> None:
    with thread_party(doms=loaded) as other:
        other.tell("dom = doms.get(name='web1')")
        result = invoke("load", config_dir, "--timeout", "0", status=1)
        assert result.stderr.startswith(f"error: {config_dir}/web1.xml: domain 'web1' is locked; ")
        assert f"held by process {os.getpid()}" in result.stderr
        assert result.stdout == "3 domains loaded into segment 'default', 1 file failed\n"
        other.tell("dom.unlock()")


@pytest.mark.parametrize("command", [["undefine"], ["rename", "web9"], ["autostart"]])
def test_a_domain_that_goes_between_look_and_lock(
    loaded: DomainList, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    look = types.find_domain

    def find_domain(doms: DomainList, key: str, not_by: str | None) -> shmdomains.DomainInfo:
        info = look(doms, key, not_by)
        loaded.undefine(uuid=info.uuid)
        return info

    monkeypatch.setattr(types, "find_domain", find_domain)
    name, *rest = command
    assert failure(name, "web1", *rest) == "failed to get domain 'web1': it was removed just now"


@pytest.mark.parametrize("timeout", ["-1", "nan", "soon", ""])
def test_a_timeout_is_not_negative(loaded: DomainList, timeout: str) -> None:
    assert "--timeout" in invoke("undefine", "web1", "--timeout", timeout, status=2).stderr
    assert loaded.peek(name="web1") is not None


def test_a_timeout_may_be_for_ever(loaded: DomainList) -> None:
    assert out("undefine", "web1", "--timeout", "inf")


# --- segments -------------------------------------------------------------------------------


def test_a_segment_that_is_not_there(segment_dir: Path) -> None:
    for command in (
        ["list"],
        ["dominfo", "web1"],
        ["dumpxml", "web1"],
        ["domstate", "web1"],
        ["wait", "web1", "--state", "running"],
        ["undefine", "web1"],
        ["rename", "a", "b"],
        ["autostart", "web1"],
        ["check"],
        ["unlink"],
        ["export", "-"],
    ):
        assert failure(*command) == (
            f"{segment_dir}/default.segment: no such segment; create it, or load a directory"
        )


def test_the_segment_is_named_by_option_or_variable(
    segment_dir: Path, config_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out("--segment", "one", "load", config_dir)
    monkeypatch.setenv("SHMDOMAINS_SEGMENT", "one")
    assert len(out("list", "--all", "--name")) == 4
    assert "two.segment: no such segment" in failure("-s", "two", "list")
    assert len(out("-s", segment_dir / "one.segment", "list", "--all", "--name")) == 4
    assert "cannot be a segment's name" in failure("-s", ".x", "list")


def test_segments_shows_who_is_attached(loaded: DomainList, segment_dir: Path) -> None:
    code = (
        "import sys, shmdomains\n"
        "doms = shmdomains.DomainList.attach()\n"
        "print('attached', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with process("-c", code, "a worker", stdin=subprocess.PIPE) as worker:
        assert worker.stdout.readline() == b"attached\n"
        head, rule, row, *more = out("segments")
        assert head.split() == ["Name", "Domains", "Active", "Room", "Memory", "Attached"]
        assert set(rule) == {"-"}
        assert row.split()[:4] == ["default", "4", "0", "65536"]
        assert f"   {worker.pid} " in "\n".join([row, *more])
        (record,) = read_json("segments")
        (attached,) = [one for one in record["attached"] if one["pid"] == worker.pid]
        assert attached["command"].startswith(sys.executable) and attached["started"] > 0
        assert record["path"] == str(segment_dir / "default.segment")
        assert (record["domains"], record["mode"], record["lock"]) == (4, "0600", "robust")
        loaded.close()
        assert "is in use" in failure("unlink")
        assert out("unlink", "--force") == ["Segment 'default' removed"]
        worker.stdin.close()
        assert worker.wait(DEADLINE) == 0
    assert out("segments")[2:] == []


def test_segments_shows_what_is_wrong_with_one(loaded: DomainList, segment_dir: Path) -> None:
    junk = segment_dir / "junk.segment"
    junk.write_bytes(b"junk" * 5000)
    junk.chmod(0o600)
    (segment_dir / "short.segment").touch(0o600)
    rows = {line.split()[0]: line for line in out("segments")[2:]}
    assert list(rows) == ["default", "junk", "short"]
    assert "error: " in rows["junk"] and "the file is no shmdomains segment" in rows["junk"]
    assert "error: " in rows["short"]
    assert "error" not in rows["default"]
    assert "is no shmdomains segment" in read_json("segments")[1]["error"]
    for name in ("junk", "short"):
        assert failure("-s", name, "list")
        assert out("-s", name, "unlink")


def test_a_refused_file(loaded: DomainList, segment_dir: Path) -> None:
    (segment_dir / "link.segment").symlink_to("default.segment")
    (segment_dir / "open.segment").touch(0o644)
    (segment_dir / "open.segment").chmod(0o644)
    assert "it is a symbolic link" in failure("-s", "link", "list")
    assert "has mode 0644" in failure("-s", "open", "list")


def test_a_segment_directory_that_can_not_be_used(
    config_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMDOMAINS_DIR", str(tmp_path / "no" / "where"))
    assert failure("load", config_dir) == (
        f"{tmp_path}/no/where: cannot make the segment directory: No such file or directory"
    )
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHMDOMAINS_DIR", str(tmp_path / "file"))
    assert "is no directory" in failure("load", config_dir)
    assert out("segments")[2:] == []


def test_check(loaded: DomainList) -> None:
    head, rule, *rows, line = out("check")
    assert head.split() == ["Invariant", "Result", "Reason"] and set(rule) == {"-"}
    assert [row.rsplit("   ", 1)[0].strip() for row in rows] == list(shmdomains.INVARIANTS)
    assert all(row.endswith("   ok") for row in rows)
    assert line.startswith("Segment 'default': no problem (4 domains, 0 active, ")
    report = read_json("check")
    assert report["problems"] == [] and report["not_settled"] == []
    assert report["invariants"] == dict.fromkeys(shmdomains.INVARIANTS, "ok")
    assert report["counts"]["domains"] == 4


def test_check_reports_problems(loaded: DomainList, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ("I5 index", "name index does not\nlead to slot 3")
    report = shmdomains.CheckReport([problem], {"domains": 4})
    with monkeypatch.context() as patch:
        patch.setattr(DomainList, "check", lambda self, timeout: report)
        lines = out("check", status=1)
        assert " I5 index      problem   name index does not\\nlead to slot 3" in lines
        assert lines[-1] == "Segment 'default': 1 problem (4 domains)"
        assert sum(line.endswith("   ok") for line in lines) == len(shmdomains.INVARIANTS) - 1
        found = read_json("check", status=1)
        assert found["problems"] == [{"invariant": problem[0], "problem": problem[1]}]
        assert found["invariants"]["I5 index"] == "problem"


def test_check_says_what_it_could_not_settle(
    loaded: DomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = shmdomains.CheckReport([], {"domains": 4}, [("counts", "writers are at work")])
    with monkeypatch.context() as patch:
        patch.setattr(DomainList, "check", lambda self, timeout: report)
        lines = out("check", status=3)
        assert " counts        not settled   writers are at work" in lines
        assert lines[-1] == "Segment 'default': no problem (4 domains)"
        found = read_json("check", status=3)
        assert found["invariants"]["counts"] == "not settled"
        assert found["not_settled"] == [{"invariant": "counts", "reason": "writers are at work"}]


def test_recover(loaded: DomainList, segment_dir: Path) -> None:
    (*_, line) = out("recover")
    assert line == "Segment 'default': 0 repairs"
    code = (
        "import sys, os, signal, shmdomains\n"
        "doms = shmdomains.DomainList.attach()\n"
        "doms.lock(); dom = doms.find_by_name('web1'); other = doms.find_by_name('db1')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with process("-c", code) as worker:
        worker.wait(DEADLINE)
    with thread_party(doms=loaded) as other:
        other.tell("dom = doms.get(name='Web2')")
        head, _rule, *rows, line = out("recover")
        assert head.split("   ")[0] == " Lock"
        text = "\n".join(rows)
        assert f" list lock       process {worker.pid}, dead   UUID and name index" in text
        assert f" domain 'web1'   process {worker.pid}, dead   " in text
        assert f"nothing: held by process {os.getpid()}" in text
        assert line == "Segment 'default': 3 repairs, 1 lock held by others"
        report = read_json("recover")
        assert report["repairs"] == []
        [held] = report["held"]
        assert (held["domain"], held["pid"]) == ("Web2", os.getpid())
        other.tell("dom.unlock()")
    assert out("check")


def poison(segment_dir: Path) -> None:
    with Planted(segment_dir / "default.segment") as planted:
        planted.write(planted.header("poisoned"), 3)


def test_a_poisoned_segment(loaded: DomainList, segment_dir: Path, tmp_path: Path) -> None:
    poison(segment_dir)
    why = "a repair failed: of the map of used space (heap lock)"
    assert why in failure("recover") and why in failure("undefine", "web1")
    lines = out("check", status=1)
    assert f" poisoned      problem   {why}" in lines
    assert lines[-1].startswith("Segment 'default': 1 problem (4 domains")
    assert f"poisoned: {why}" in "\n".join(out("segments"))
    assert read_json("segments")[0]["poisoned"] == why
    assert len(out("list", "--all", "--name")) == 4
    assert invoke("export", f"{tmp_path}/saved/").stderr == "4 definitions exported\n"
    assert len(out("-s", "new", "load", tmp_path / "saved")) == 1
    assert out("-s", "new", "list", "--all", "--name") == out("list", "--all", "--name")
    loaded.close()


def test_export_of_xml(loaded: DomainList, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    assert invoke("export", folder).stderr == "4 definitions exported\n"  # no / needed: it exists
    assert sorted(os.listdir(folder)) == ["Web2.xml", "café ☕.xml", "db1.xml", "web1.xml"]
    result = invoke("export", folder, status=1)
    assert f"error: domain 'web1': {folder}/web1.xml exists already" in result.stderr
    assert result.stderr.endswith("0 definitions exported, 4 with an error\n")
    assert invoke("export", "--force", folder).stderr == "4 definitions exported\n"
    assert failure("export", "/proc/nowhere/") == "/proc/nowhere: No such file or directory"


def test_export_and_import(loaded: DomainList, tmp_path: Path) -> None:
    activate(loaded, "web1")
    file = tmp_path / "domains.bin"
    assert invoke("export", file).stderr == "4 domains exported\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert invoke("export", "-").stdout_bytes == file.read_bytes()
    assert out("-s", "new", "import", file, "--max-domains", 10) == [
        "4 domains imported into segment 'new'"
    ]
    assert out("-s", "newer", "import", "-", input=file.read_bytes())
    for name in ("new", "newer"):
        assert out("-s", name, "list", "--all", "--uuid", "--name") == out(
            "list", "--all", "--uuid", "--name"
        )
        assert out("-s", name, "list", "--name") == ["web1"]


def test_import_reports_what_it_could_not_enter(loaded: DomainList, tmp_path: Path) -> None:
    file = tmp_path / "domains.bin"
    invoke("export", file)
    out("undefine", "web1")
    out("define", "-", input=xml("web1"))  # another uuid
    result = invoke("import", file, status=1)
    assert result.stderr.startswith("error: domain 'web1': domain 'web1' already exists with uuid")
    assert result.stdout == "3 domains imported into segment 'default'\n"


def test_import_of_what_is_no_export(segment_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\x93junk")
    assert failure("import", file).startswith(f"{file}: ")
    assert failure("import", "-", input=b"").startswith("standard input: ")
    assert failure("import", tmp_path / "nope") == f"{tmp_path}/nope: No such file or directory"


# --- the program ----------------------------------------------------------------------------


def test_the_program(segment_dir: Path, config_dir: Path) -> None:
    done = program("load", config_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "4 domains loaded into segment 'default'\n"
    assert "\x1b" not in program("list", "--all").stdout
    assert program("nonsense").returncode == 2
    assert program("--version").stdout == f"shmdomains {shmdomains.__version__}\n"
    done = program("dominfo", "nope")
    assert (done.returncode, done.stderr) == (1, "error: failed to get domain 'nope'\n")


def test_every_command_has_help(segment_dir: Path) -> None:
    listing = invoke("--help").stdout
    for name, command in cli.commands.items():
        assert f"  {name} " in listing
        assert command.help and "..." not in command.get_short_help_str(60)
        assert "Usage: shmdomains" in invoke(name, "--help").stdout


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def either_output(request: pytest.FixtureRequest) -> dict[str, str]:
    """An environment. Unbuffered, Python does not notice that a write was cut short."""
    return environment(PYTHONUNBUFFERED=request.param)


@pytest.mark.parametrize(
    "command",
    [["list", "--all", "--format", "json"], ["dumpxml", "big"], ["export", "-"]],
    ids=lambda command: command[0],
)
def test_a_reader_that_goes_away(
    segment_dir: Path, command: list[str], either_output: dict[str, str]
) -> None:
    # More than a pipe holds, so that the writer meets the closed end.
    with DomainList.create() as doms:
        doms.define(xml("big", extra=f"<!-- {'x' * 200_000} -->"))
        for number in range(1000):
            doms.define(xml(f"vm-{number}"))
    with process("-m", "shmdomains", *command, stderr=subprocess.PIPE, env=either_output) as writer:
        assert writer.stdout.read(1)
        writer.stdout.close()
        assert writer.stderr.read() == b""
        assert writer.wait(DEADLINE) == 1


def test_a_full_disk(loaded: DomainList, either_output: dict[str, str]) -> None:
    for command in (["list", "--all"], ["dumpxml", "web1"], ["export", "-"]):
        with open("/dev/full", "wb") as full:
            done = program(*command, stdout=full, env=either_output)
        assert done.returncode == 1
        assert done.stderr == f"error: {os.strerror(errno.ENOSPC)}\n"
    assert failure("export", "/dev/full") == os.strerror(errno.ENOSPC)


def test_a_file_that_can_not_hold_it_all(
    loaded: DomainList, tmp_path: Path, either_output: dict[str, str]
) -> None:
    loaded.define(xml("big", extra=f"<!-- {'x' * 200_000} -->"))
    script = 'ulimit -f 64; exec "$0" -m shmdomains dumpxml big > "$1"'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, tmp_path / "file"],
        env=either_output,
        capture_output=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr) == (1, b"error: File too large\n")


def test_streams_that_are_closed(loaded: DomainList) -> None:
    def run(shell: str) -> int:
        command = [sys.executable, "-m", "shmdomains"]
        return subprocess.run(
            ["sh", "-c", f'"$@" {shell}', "sh", *command], env=environment(), timeout=DEADLINE
        ).returncode

    assert run("list >&-") == 0
    assert run("dominfo nope 2>&-") == 1
    assert run("define <&- 2>&-") == 1


@pytest.mark.parametrize(
    "command",
    [["undefine", "web1"], ["define", "-"], ["wait", "web1", "--state", "crashed"]],
    ids=lambda c: c[0],
)
def test_ctrl_c(loaded: DomainList, command: list[str]) -> None:
    with thread_party(doms=loaded) as other:
        other.tell("dom = doms.get(name='web1')")
        with process(
            "-m", "shmdomains", *command, stdin=subprocess.PIPE, stderr=subprocess.PIPE
        ) as waiting:
            end = time.monotonic() + DEADLINE
            while waiting.pid not in [one.pid for one in loaded.info.attached]:
                assert time.monotonic() < end and waiting.poll() is None
            waiting.send_signal(signal.SIGINT)
            assert waiting.wait(DEADLINE) == 130
            assert waiting.stderr.read() == b""
        other.tell("dom.unlock()")
    assert loaded.peek(name="web1") is not None


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_a_terminal_that_can_not_show_a_name(loaded: DomainList, encoding: str) -> None:
    speaks = environment(PYTHONIOENCODING=encoding)
    name = "café ☕".encode(encoding, "backslashreplace").decode(encoding)
    done = program("list", "--all", "--name", env=speaks)
    assert os.fsencode(done.stdout.splitlines()[0]) == name.encode(encoding)
    records = json.loads(program("list", "--all", "--format", "json", env=speaks).stdout)
    assert records[0]["name"] == "café ☕"
    document = program("dumpxml", "café ☕", env=speaks).stdout
    assert "<name>café ☕</name>" in document  # XML without a declaration is UTF-8


# --- on a terminal --------------------------------------------------------------------------


def test_colours_are_for_terminals(mixed: DomainList) -> None:
    seen = on_terminal("list", "--all")
    assert "\x1b[32mrunning" in seen and "\x1b[33mpaused" in seen and "\x1b[31mcrashed" in seen
    plain = invoke("list", "--all").stdout
    assert on_terminal("list", "--all", NO_COLOR="1") == plain
    assert on_terminal("list", "--all", TERM="dumb") == plain


def test_a_progress_bar_is_for_terminals(segment_dir: Path, config_dir: Path) -> None:
    assert "Loading" in on_terminal("load", config_dir)
    assert "Loading" not in program("load", config_dir).stderr


def test_what_makes_no_sense_on_a_terminal(loaded: DomainList) -> None:
    assert "Missing argument 'FILE'" in on_terminal("define")
    assert "An export is binary" in on_terminal("export", "-")


# --- completion -----------------------------------------------------------------------------


def completions(shell: str, *words: str) -> list[str]:
    typed = {
        "_SHMDOMAINS_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": ("\n" if shell == "bash" else " ").join(["shmdomains", *words]),
        "COMP_CWORD": words[-1] if shell == "fish" else str(len(words)),
    }
    done = program(env=environment(**typed))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


def test_completion_offers_commands_domains_and_segments(loaded: DomainList) -> None:
    assert completions("bash", "unde") == ["plain,undefine"]
    assert completions("bash", "dominfo", "w") == ["plain,web1"]
    assert completions("bash", "rename", "d") == ["plain,db1"]
    assert completions("zsh", "dumpxml", "caf") == ["plain", "café ☕", "_"]
    assert completions("fish", "dumpxml", "W") == ["plain,Web2"]
    assert completions("bash", "-s", "d") == ["plain,default"]
    assert completions("bash", "--segment", "default", "dominfo", "db") == ["plain,db1"]


def test_completion_is_quiet_when_there_is_nothing(segment_dir: Path) -> None:
    assert completions("bash", "dominfo", "w") == []
    assert completions("bash", "-s", "../x", "dominfo", "w") == []
    (segment_dir / "default.segment").write_bytes(b"junk")
    assert completions("bash", "dominfo", "w") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    script = invoke("completion", shell).stdout
    assert f"_SHMDOMAINS_COMPLETE={shell}_complete" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("web", "web1"),
        ("Win", r"Windows\ \(old\)\ \&\ \$HOME"),
        (r"Windows\ \(", r"Windows\ \(old\)\ \&\ \$HOME"),
        ("caf", r"café\ ☕"),
    ],
)
def test_completion_in_bash(loaded: DomainList, tmp_path: Path, typed: str, completed: str) -> None:
    loaded.define(xml("Windows (old) & $HOME"))
    shim = tmp_path / "bin" / "shmdomains"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m shmdomains "$@"\n')
    shim.chmod(0o755)
    script = """
        eval "$(shmdomains completion bash)"
        COMP_WORDS=(shmdomains dominfo "$1") COMP_CWORD=2
        _shmdomains_completion shmdomains dominfo "$1"
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    path = os.pathsep.join([str(shim.parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", typed],
        env=environment(PATH=path, LC_ALL="C.UTF-8"),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.stdout, done.stderr) == (completed + "\n", "")
    # What bash then reads is the name.
    words = subprocess.run(["bash", "-c", f"printf %s {completed}"], capture_output=True, text=True)
    assert loaded.peek(name=words.stdout) is not None


# --- stress ---------------------------------------------------------------------------------


def test_stress_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(config_dir: Path, *, console: object, **options: Any) -> int:
        seen.update(config_dir=config_dir, **options)
        return 1

    from shmdomains.stress import storm

    monkeypatch.setattr(storm, "run", run)
    invoke("stress", SAMPLES, status=1)
    assert seen == {
        "config_dir": SAMPLES, "workers": 4, "seconds": 5.0, "kill": False, "start": "fork",
        "lock": "robust", "domains": None, "url": None, "hosts": 1, "kill_server": False,
    }  # fmt: skip
    invoke(
        "stress", SAMPLES, "--workers", 2, "--seconds", "0.5", "--kill", "--start", "spawn",
        "--lock", "multiprocessing", "--domains", 99, status=1,
    )  # fmt: skip
    assert seen == {
        "config_dir": SAMPLES, "workers": 2, "seconds": 0.5, "kill": True, "start": "spawn",
        "lock": "multiprocessing", "domains": 99, "url": None, "hosts": 1, "kill_server": False,
    }  # fmt: skip
    for wrong in (["--workers", "0"], ["--seconds", "nan"], ["--seconds", "0"], ["--lock", "x"]):
        invoke("stress", SAMPLES, *wrong, status=2)


# --- the parts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("4096", 4096), ("5b", 5), ("2k", 2048), ("2 KiB", 2048), ("2KB", 2000),
     ("3m", 3 << 20), ("1GiB", 1 << 30), ("1tb", 10**12)],
)  # fmt: skip
def test_sizes_are_read_as_libvirt_does(text: str, number: int) -> None:
    assert types.size(text) == number


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü ☕ データ", "plain ü ☕ データ"),
        ("a\nb\r\x1b[31m", "a\\nb\\r\\x1b[31m"),
        ("\x9b\u2028\u202e", "\\x9b\\u2028\\u202e"),
        ("\udcff\udcc3", "\\xff\\xc3"),
        ("\ud800", "\\ud800"),
    ],
)
def test_control_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert tables.printable(text) == shown


def test_errors_are_one_line(segment_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables.Failure("first\nsecond").show()
    assert capsys.readouterr().err == "error: first\\nsecond\n"


def test_errors_are_described_without_numbers() -> None:
    describe: Callable[[BaseException], str] = tables.describe
    assert describe(OSError(2, "No such file", "/x")) == "/x: No such file"
    assert describe(OSError(28, "No space left")) == "No space left"
    assert describe(OSError("just text")) == "just text"
    assert describe(ValueError()) == "ValueError"
