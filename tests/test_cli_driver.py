"""The commands that work through a driver, on libvirt's test driver made anew: each one's words,
options and refusals. The transcript of a real virsh has a test of its own.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest
from helpers import thread_party, xml
from shell import WEB1, failure, invoke, on_terminal, out, ran, read_json

from shmdomains import (
    DomainInfo,
    DomainList,
    DomainNotFound,
    DomainState,
    DriverError,
    PausedReason,
    ShutoffReason,
)
from shmdomains.cli import cli
from shmdomains.cli.script import Unreadable, split
from shmdomains.drivers import TestDriver

NEED_A_DRIVER = ["start", "shutdown", "reboot", "reset", "suspend", "resume", "destroy"]


@pytest.fixture
def doms(segment_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DomainList:
    """``web1`` is off, ``db1`` runs; the commands have the test driver."""
    monkeypatch.setenv("SHMDOMAINS_DRIVER", "test")
    monkeypatch.chdir(tmp_path)
    doms = DomainList.open()
    driver = TestDriver(doms)
    driver.define(xml("web1", WEB1))
    driver.define(xml("db1"))
    driver.start("db1")
    return doms


def said(*args: object) -> str:
    """What a command prints that succeeds, without the blank line behind it."""
    result = invoke(*args)
    assert result.stderr == "" and result.stdout.endswith("\n")
    return result.stdout[:-1]


def refusal(*args: object) -> list[str]:
    """The lines of an error."""
    result = invoke(*args, status=1)
    assert result.stdout in ("", "\n")
    return [line.removeprefix("error: ") for line in result.stderr.splitlines()]


def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Let $EDITOR be ``sed`` with this command."""
    program = tmp_path / "editor"
    program.write_text(f"#!/bin/sh\nexec sed -i '{command}' \"$1\"\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("EDITOR", str(program))
    monkeypatch.delenv("VISUAL", raising=False)


# --- which driver -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", NEED_A_DRIVER)
def test_a_command_says_that_it_needs_a_driver(
    doms: DomainList, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = doms.snapshot()
    monkeypatch.delenv("SHMDOMAINS_DRIVER")
    stderr = invoke(command, "db1", status=2).stderr
    assert f"'{command}' needs a driver, which runs the domains: --driver test or qemu" in stderr
    assert doms.snapshot() == before


def test_the_option_names_it_too(doms: DomainList, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHMDOMAINS_DRIVER")
    assert out("--driver", "test", "suspend", "db1") == ["Domain 'db1' suspended", ""]
    assert doms.driver == "test"  # from now on, without being told
    assert out("domstate", "db1") == ["paused", ""]
    doms.driver = None
    assert out("domstate", "db1") == ["paused"]  # as ever: no blank line
    assert "'xen' is not one of" in invoke("--driver", "xen", "list", status=2).stderr


def test_what_a_driver_needs_and_is_not_there_is_a_line(
    doms: DomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError("the driver needs qemu.qmp: pip install 'shmdomains[qemu]'")

    monkeypatch.setattr("shmdomains.cli.driving.import_module", missing)
    assert failure("start", "web1") == "the driver needs qemu.qmp: pip install 'shmdomains[qemu]'"


def test_create_is_virshs_with_a_driver_only(
    doms: DomainList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tr1.xml").write_text(xml("tr1"))
    assert said("create", "tr1.xml", "--paused") == "Domain 'tr1' created from tr1.xml\n"
    assert doms["tr1"].state is DomainState.PAUSED and not doms["tr1"].persistent
    assert "Usage: shmdomains create" in invoke("create", "--help").stdout
    monkeypatch.delenv("SHMDOMAINS_DRIVER")
    doms.driver = None
    assert "This makes a segment" in invoke("create", "tr1.xml", status=2).stderr


# --- the lifecycle ----------------------------------------------------------------------------


def test_a_domains_life(doms: DomainList) -> None:
    assert said("start", "web1", "--paused") == "Domain 'web1' started\n"
    assert doms["web1"].reason is PausedReason.USER
    for command, line in (
        ("resume", "Domain 'web1' resumed"),
        ("reset", "Domain 'web1' was reset"),
        ("reboot", "Domain 'web1' is being rebooted"),
        ("suspend", "Domain 'web1' suspended"),
        ("shutdown", "Domain 'web1' is being shutdown"),
    ):
        assert said(command, "web1") == line + "\n"
    assert doms["web1"].reason is ShutoffReason.SHUTDOWN


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("destroy", "Requested operation is not valid: domain is not running"),
        ("reboot", "Requested operation is not valid: domain is not running"),
        ("reset", "Requested operation is not valid: domain is not running"),
        ("shutdown", "internal error: domain 'web1' not running"),
        ("suspend", "internal error: domain 'web1' not running"),
        ("resume", "internal error: domain 'web1' not paused"),
    ],
)
def test_what_takes_an_active_domain(doms: DomainList, command: str, why: str) -> None:
    assert refusal(command, "web1") == [f"Failed to {command} domain 'web1'", why]


def test_destroy_may_be_graceful(doms: DomainList, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def kill(driver: TestDriver, info: DomainInfo, graceful: bool = False) -> None:
        asked.append(graceful)

    monkeypatch.setattr(TestDriver, "kill", kill)
    assert said("destroy", "db1", "--graceful") == "Domain 'db1' destroyed\n"
    said("start", "db1")
    said("destroy", "db1")
    assert asked == [True, False]


def test_what_the_hypervisor_refuses(doms: DomainList, monkeypatch: pytest.MonkeyPatch) -> None:
    def pause(driver: TestDriver, info: DomainInfo) -> None:
        raise DriverError("the monitor does not answer")

    monkeypatch.setattr(TestDriver, "pause", pause)
    assert refusal("suspend", "db1") == [
        "Failed to suspend domain 'db1'",
        "internal error: the monitor does not answer",
    ]


def test_a_domain_that_goes_meanwhile(doms: DomainList, monkeypatch: pytest.MonkeyPatch) -> None:
    def suspend(driver: TestDriver, key: object) -> None:
        raise DomainNotFound("no domain with matching uuid")

    monkeypatch.setattr(TestDriver, "suspend", suspend)
    assert refusal("suspend", "db1") == ["failed to get domain 'db1': it was removed just now"]


def test_start_of_an_active_domain(doms: DomainList) -> None:
    assert refusal("start", "db1") == ["Domain is already active"]


@pytest.mark.parametrize("command", [*NEED_A_DRIVER, "undefine", "autostart", "desc", "edit"])
def test_a_domain_that_is_not_there(doms: DomainList, command: str) -> None:
    result = invoke(command, "nosuch", status=1)
    assert (result.stdout, result.stderr) == ("\n", "error: failed to get domain 'nosuch'\n")


def test_a_job_that_is_in_the_way(doms: DomainList) -> None:
    with thread_party(doms=doms) as other:
        other.tell("job = doms.job('db1', 'backup'); held = job.__enter__()")
        first, second = refusal("shutdown", "db1", "--timeout", "0")
        other.tell("job.__exit__(None, None, None)")
    assert first == "Failed to shutdown domain 'db1'"
    assert second.startswith("Timed out during operation: ") and "backup" in second


def test_a_transient_domain_is_gone_when_it_stops(doms: DomainList) -> None:
    assert said("undefine", "db1") == "Domain 'db1' has been undefined\n"
    assert refusal("undefine", "db1")[0] == "Failed to undefine domain 'db1'"
    assert refusal("autostart", "db1")[0] == "Failed to mark domain 'db1' as autostarted"
    assert refusal("autostart", "db1", "--disable")[0].startswith("Failed to unmark domain 'db1'")
    said("destroy", "db1")
    assert "db1" not in doms


# --- definitions ------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "verb"), [("define", "define"), ("create", "create")])
def test_a_file_that_is_refused(doms: DomainList, tmp_path: Path, command: str, verb: str) -> None:
    (tmp_path / "bad.xml").write_text("<domain>\n\t<name>é<x</name>\n</domain>\n")
    assert refusal(command, "bad.xml") == [
        f"Failed to {verb} domain from bad.xml",
        "(domain_definition):2: error parsing attribute name",
        "\t<name>é<x</name>",
        "\t---------^",
    ]
    assert refusal(command, "nosuch.xml") == [
        "Failed to open file 'nosuch.xml': No such file or directory"
    ]
    (tmp_path / "dup.xml").write_text(xml("other", WEB1))
    assert refusal(command, "dup.xml")[1] == (
        f"operation failed: domain 'web1' is already defined with uuid {WEB1}"
    )
    (tmp_path / "odd.xml").write_text("<domain type='test'><name>a/b</name></domain>")
    assert refusal(command, "odd.xml")[1].startswith("XML error: ")


def test_what_a_refused_file_holds_cannot_control_the_terminal(
    doms: DomainList, tmp_path: Path
) -> None:
    (tmp_path / "bad.xml").write_bytes(b"<domain><x\x07</domain>")
    assert refusal("define", "bad.xml")[2] == "<domain><x\\x07</domain>"


def test_define_over_an_active_domain_prints_virshs_words(doms: DomainList, tmp_path: Path) -> None:
    (tmp_path / "db1.xml").write_text(xml("db1", str(doms["db1"].uuid)))
    assert said("define", "db1.xml") == "Domain 'db1' defined from db1.xml\n"
    assert "--new is for lists without" in invoke("define", "db1.xml", "--new", status=2).stderr


def test_rename(doms: DomainList) -> None:
    assert said("domrename", "web1", "web2") == "Domain successfully renamed\n"
    assert refusal("domrename", "web2", "db1") == [
        "Requested operation is not valid: domain with name 'db1' already exists"
    ]


def test_lookups_are_by_virshs_keys(doms: DomainList) -> None:
    assert said("domname", WEB1) == "web1\n" and said("domid", WEB1) == "-\n"
    assert said("domuuid", "web1") == WEB1 + "\n"
    for command, key in (("domname", "web1"), ("domid", "1"), ("domuuid", WEB1)):
        assert refusal(command, key) == [f"failed to get domain '{key}'"]


@pytest.mark.parametrize("driver", ["test", None])
def test_edit(
    doms: DomainList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str | None
) -> None:
    if driver is None:
        monkeypatch.delenv("SHMDOMAINS_DRIVER")
    editor(tmp_path, monkeypatch, "s/<name>/<title>new<\\/title>&/")
    assert "Domain 'db1' XML configuration edited." in invoke("edit", "db1").stdout
    assert doms["db1"].definition.title is None
    assert doms["db1"].next_definition.title == "new"
    editor(tmp_path, monkeypatch, "")
    assert "XML configuration not changed." in invoke("edit", "db1").stdout


def test_edit_of_what_changes_meanwhile(doms: DomainList, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(text: str, extension: str) -> str:
        TestDriver(doms).set_title("web1", "theirs")
        return text.replace("<name>", "<title>ours</title><name>")

    monkeypatch.setattr("click.edit", meanwhile)
    assert refusal("edit", "web1") == ["The XML configuration was changed by another user."]
    assert doms["web1"].definition.title == "theirs"


# --- settings ---------------------------------------------------------------------------------


def test_setmem(doms: DomainList) -> None:
    half = doms["db1"].definition.memory // 2
    assert said("setmem", "db1", half) == ""
    assert doms["db1"].definition.current_memory == half
    said("setmem", "db1", "1023b", "--config")
    assert doms["db1"].next_definition.current_memory == 1
    said("setmem", "db1", "512KiB", "--live", "--config")
    assert doms["db1"].next_definition.current_memory == 512
    said("setmem", "web1", "256K", "--current")
    assert doms["web1"].definition.current_memory == 256


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ("web1 1", "Requested operation is not valid: domain is not running"),
        ("web1 1 --live", "Requested operation is not valid: domain is not running"),
        ("db1 99G", "invalid argument: cannot set memory higher than max memory"),
        ("db1 0", "memory in virDomainSetMemoryFlags must not be zero"),
        ("db1 1 --live --current", "Options --current and --live are mutually exclusive"),
        ("db1 1 --config --current", "Options --current and --config are mutually exclusive"),
        ("db1 x", "Scaled numeric value 'x' for <size> option is malformed or out of range"),
    ],
)
def test_setmem_refuses(doms: DomainList, args: str, why: str) -> None:
    assert refusal("setmem", *args.split()) == [why]
    assert doms["db1"].next_definition in (None, doms["db1"].definition)


def test_setmaxmem(doms: DomainList) -> None:
    said("setmaxmem", "web1", "100", "--config")
    assert (doms["web1"].definition.memory, doms["web1"].definition.current_memory) == (100, 100)
    assert refusal("setmaxmem", "db1", "1G") == [
        "Unable to change MaxMemorySize",
        "Requested operation is not valid: cannot resize the maximum memory on an active domain",
    ]


def test_setvcpus(doms: DomainList) -> None:
    said("setvcpus", "web1", "4", "--maximum", "--config")
    definition = doms["web1"].definition
    assert (definition.vcpus, definition.current_vcpus) == (4, 1)
    said("setvcpus", "web1", "3", "--config")
    assert doms["web1"].definition.current_vcpus == 3


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ("db1 9", "invalid argument: requested cpu amount exceeds maximum (9 > 1)"),
        ("db1 0", "Can't set 0 processors for a VM"),
        ("db1 x", "Numeric value 'x' for <count> option is malformed or out of range"),
        ("db1 3 --maximum", "Option --config is required by option --maximum"),
        ("web1 1", "Requested operation is not valid: domain is not running"),
    ],
)
def test_setvcpus_refuses(doms: DomainList, args: str, why: str) -> None:
    assert refusal("setvcpus", *args.split()) == [why]


def test_desc_and_title(doms: DomainList) -> None:
    assert said("desc", "web1") == "No description for domain: web1"
    assert said("desc", "web1", "two", "words") == "Domain description updated successfully"
    assert said("desc", "web1") == "two words"
    assert said("title", "db1", "later", "--config") == "Domain title updated successfully"
    assert said("desc", "db1", "--title") == "No title for domain: db1"
    assert said("desc", "db1", "--title", "--config") == "later"
    assert said("desc", "web1", "") == "Domain description updated successfully"
    assert doms["web1"].definition.description is None
    assert refusal("desc", "web1", "--live", "x") == [
        "Failed to set new domain description",
        "Requested operation is not valid: domain is not running",
    ]
    assert refusal("title", "web1", "a\nb") == [
        "Failed to set new domain title",
        "metadata title can't contain newlines",
    ]


def test_desc_in_an_editor(
    doms: DomainList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor(tmp_path, monkeypatch, "s/old/new/")
    assert said("desc", "web1", "--edit", "old text").startswith("Domain description updated")
    assert doms["web1"].definition.description == "new text"
    assert said("desc", "web1", "--edit") == "Domain description not changed"


def test_desc_reads_without_a_driver(doms: DomainList, monkeypatch: pytest.MonkeyPatch) -> None:
    said("desc", "web1", "first\nsecond")
    monkeypatch.delenv("SHMDOMAINS_DRIVER")
    doms.driver = None
    assert out("desc", "web1") == ["first", "second"]
    assert "'desc' needs a driver" in invoke("desc", "web1", "x", status=2).stderr


def test_nodeinfo(segment_dir: Path) -> None:
    pairs = dict(line.split(":", 1) for line in out("nodeinfo"))
    assert list(pairs) == [
        *("CPU model", "CPU(s)", "CPU frequency", "CPU socket(s)", "Core(s) per socket"),
        *("Thread(s) per core", "NUMA cell(s)", "Memory size"),
    ]
    assert pairs["CPU model"].strip() == os.uname().machine
    assert int(pairs["CPU(s)"]) >= 1 and int(pairs["Memory size"].split()[0]) > 1024
    assert all(len(line) > 21 and line[20] == " " for line in out("nodeinfo"))


# --- several commands -------------------------------------------------------------------------


def test_several_commands(doms: DomainList) -> None:
    result = ran("domid db1; domid nosuch # it goes on\nlist --all --name;")
    assert (result.stdout, result.exit_code) == ("1\n\n\ndb1\nweb1\n\n", 0)
    assert result.stderr == "error: failed to get domain 'nosuch'\n"
    assert ran("domid nosuch; domid db1").exit_code == 0
    assert ran("domid db1; domid nosuch").exit_code == 1


def test_several_commands_without_a_driver(
    doms: DomainList, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHMDOMAINS_DRIVER")
    assert out("domid db1; domuuid 'web1'") == ["1", "", WEB1, ""]
    assert "No such command 'nosuch'" in invoke("undefine web1; nosuch", status=2).stderr
    assert "web1" in doms


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nosuch", "unknown command: 'nosuch'"),
        ("domid", "command 'domid' requires <domain> option"),
        ("domid db1 extra more", "unexpected data 'extra'"),
        ("domid --nosuch db1", "command 'domid' doesn't support option --nosuch"),
        ('domid \'db1" ; domid "', None),
        ('domid "db1', 'missing "'),
    ],
)
def test_none_runs_if_one_cannot_be_read(doms: DomainList, text: str, why: str | None) -> None:
    result = ran(f"destroy db1; {text}")
    if why is None:  # an open ' ends with the text
        assert result.stdout.startswith("Domain 'db1' destroyed")
        return
    assert (result.stdout, result.stderr, result.exit_code) == ("", f"error: {why}\n", 1)
    assert doms["db1"].is_active


def test_json_gets_no_blank_line(doms: DomainList) -> None:
    assert [one["name"] for one in read_json("list", "--all")] == ["db1", "web1"]
    assert invoke("list", "--format", "json").stdout.endswith("]\n")
    both = ran("list --format json; domid nosuch")
    assert both.stderr == "error: failed to get domain 'nosuch'\n"


def test_ours_get_no_blank_line(doms: DomainList) -> None:
    assert not invoke("check").stdout.endswith("\n\n")
    exported = invoke("export", "-").stdout_bytes
    assert exported and not exported.endswith(b"\n")


@pytest.mark.parametrize("text", ['a "b', "a \\"])
def test_what_is_left_open(text: str) -> None:
    with pytest.raises(Unreadable):
        split(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" ;; \n", []),
        ("a b;c", [["a", "b"], ["c"]]),
        ("a 'b;c' \"d # e\"", [["a", "b;c", "d # e"]]),
        ("a b#c", [["a", "b#c"]]),
        ('a\\;b \'\\\' "\\""', [["a;b", "\\", '"']]),
        ("a '' ", [["a", ""]]),
        ("# all of it; x\na", [["a"]]),
    ],
)
def test_words(text: str, words: list[list[str]]) -> None:
    assert split(text) == words


def test_an_unknown_command_of_libvirts_says_why(doms: DomainList) -> None:
    assert "what it does not say of a domain" in failure("migrate", "db1")


def test_colours_and_gaps_on_a_terminal(doms: DomainList) -> None:
    shown = on_terminal("list", "--title", TERM="dumb")
    assert " 1    db1    running   \n" in shown


def test_the_help_lists_them(segment_dir: Path) -> None:
    assert {*NEED_A_DRIVER, "setmem", "nodeinfo"} <= cli.commands.keys()


# --- the list remembers it ------------------------------------------------------------------------


def test_the_first_command_with_a_driver_is_remembered(segment_dir: Path) -> None:
    with DomainList.create(max_domains=8) as doms:
        doms.define(xml("web1"))
        assert invoke("driver").stdout == "-\n"
        assert "needs a driver" in invoke("start", "web1", status=2).stderr
        invoke("--driver", "test", "start", "web1")
        assert doms.driver == "test" and invoke("driver").stdout == "test\n"
        # From now on all words are virsh's: a blank line follows, and status 1 is a wrong line.
        assert invoke("destroy", "web1").stdout == "Domain 'web1' destroyed\n\n"
        assert "requires <domain> option" in invoke("start", status=1).stderr


def test_another_driver_is_refused(segment_dir: Path) -> None:
    with DomainList.create(max_domains=8) as doms:
        doms.define(xml("web1"))
        doms.driver = "qemu"
        said = invoke("--driver", "test", "start", "web1", status=1).stderr
        assert "are run by driver 'qemu', not 'test'; `shmdomains driver test` changes" in said
        with doms.get("web1") as dom:
            dom.activate()
        for words in (["driver", "test"], ["driver", "--forget"]):
            assert "1 of the domains" in invoke(*words, status=1).stderr
        with doms.get("web1") as dom:
            dom.deactivate()
        invoke("driver", "test")
        assert doms.driver == "test"
        invoke("driver", "--forget")
        assert doms.driver is None
        doms.driver = "cloud-hypervisor"
        said = invoke("start", "web1", status=1).stderr
        assert "'cloud-hypervisor' is none of these commands'" in said


def test_to_remember_it_waits_no_longer_than_it_was_told(segment_dir: Path) -> None:
    with DomainList.create(max_domains=8) as doms, thread_party(doms=doms) as other:
        TestDriver(doms).define(xml("web1"))
        other.do("doms.lock()")
        said = failure("--driver", "test", "start", "web1", "--timeout", "0.1")
        assert "list lock" in said and f"process {os.getpid()}" in said
        other.do("doms.unlock()")
        assert doms.driver is None and not doms["web1"].is_active


def test_what_cannot_be_had_is_not_remembered(
    segment_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shmdomains.drivers.qemu", None)
    with DomainList.create(max_domains=8) as doms:
        doms.define(xml("web1"))
        failure("--driver", "qemu", "start", "web1")
        assert doms.driver is None
