"""What a real virsh said, said by this one: a transcript of libvirt 9.0.0 on its test driver.

``commands.txt`` has a run's commands, ``out.txt`` what they printed to both streams in order. The
same commands on our test driver print the same bytes but for what this file names: what libvirt's
test driver makes up, what we say more of, and where we refuse what its QEMU driver refuses, too.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from lxml import etree
from shell import invoke, program, ran

TRANSCRIPT = Path(__file__).parent / "data" / "virsh"
TEST = (
    "<domain type='test'><name>test</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>"
    "<memory>8388608</memory><vcpu>2</vcpu><os><type>hvm</type></os></domain>"
)
"""The domain that runs in libvirt's test driver from the beginning."""

TRANSIENT = (
    "error: Failed to mark domain 'web1' as autostarted\n"
    "error: Requested operation is not valid: cannot set autostart for transient domain\n"
)
"""The words of libvirt's QEMU driver; its test driver lets it pass."""

_ITS_OWN = ("CPU time", "Managed save", "Security model", "Security DOI", "Security label")
_OURS = ("Reason", "PID", "Title", "Updated")
_DOCUMENT = r"^<domain (?:(?!^<domain ).)*?</domain>$(?!\n-)"
"""Not the line that is shown of what is no XML, with a pointer below."""

_MADE_UP = ("os/boot", "clock", "on_poweroff", "on_reboot", "on_crash", "devices")


def commands() -> list[str]:
    """Without the last one, ``save``, which does not exist here."""
    lines = (TRANSCRIPT / "commands.txt").read_text().splitlines()
    assert lines.pop() == "save db2 s.img"
    return lines


def said_by_virsh() -> str:
    said = (TRANSCRIPT / "out.txt").read_text()
    return said.removesuffix("error: failed to get domain 'db2'\n\n")


def alike(said: str, ours: bool) -> str:
    """What is to be the same."""
    named = _OURS if ours else _ITS_OWN
    said = re.sub(rf"^({'|'.join(map(re.escape, named))}): .*\n", "", said, flags=re.MULTILINE)
    said = re.sub(r"^(OS Type: +)\w+$", r"\1hvm", said, flags=re.MULTILINE)
    said = re.sub(_DOCUMENT, _canonical, said, flags=re.MULTILINE | re.DOTALL)
    if not ours:
        # The second one; the first is of a persistent domain.
        before, line, after = said.rpartition("Domain 'web1' marked as autostarted\n")
        assert line
        said = before + TRANSIENT + after
    return said


def _canonical(found: re.Match[str]) -> str:
    """A definition, one element a line, without what libvirt adds to it: the layout is no
    promise."""
    root = etree.fromstring(found[0])
    for path in _MADE_UP:
        for element in root.findall(path):
            parent = element.getparent()
            assert parent is not None
            parent.remove(element)
    for element in root.iter("type", "vcpu"):
        for name in ("arch", "placement"):
            element.attrib.pop(name, None)
    lines = [
        f"{element.tag} {dict(sorted(element.attrib.items()))} {(element.text or '').strip()}"
        for element in root.iter()
    ]
    return "\n".join(lines)


@pytest.fixture
def with_test(segment_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list as libvirt's test driver begins, in a folder with the transcript's files."""
    (tmp_path / "test.xml").write_text(TEST)
    monkeypatch.setenv("SHMDOMAINS_DRIVER", "test")
    monkeypatch.chdir(TRANSCRIPT)
    invoke(f"define {tmp_path}/test.xml; start test")


def test_the_transcript(with_test: None) -> None:
    done = program("\n".join(commands()), stderr=subprocess.STDOUT)
    assert alike(done.stdout, True).splitlines() == alike(said_by_virsh(), False).splitlines()
    assert done.returncode == 1


def test_the_streams_and_statuses(with_test: None) -> None:
    """What begins with ``error:`` is on standard error, and nothing else but the position in XML;
    the exit status says whether there was one."""
    for command in commands():
        done = ran(*command.split())
        assert done.exit_code == (1 if done.stderr else 0), (command, done.output)
        assert "error" not in done.stdout and done.stdout.endswith("\n"), (command, done.output)
        lines = [line for line in done.stderr.splitlines() if not line.startswith(("<", "-"))]
        assert all(line.startswith("error: ") for line in lines), (command, done.output)


# --- what virsh reads, and options -------------------------------------------------------------


def more() -> list[str]:
    return (TRANSCRIPT / "more.txt").read_text().splitlines()


def test_more_of_it(with_test: None) -> None:
    done = program("\n".join(more()), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    wanted = (TRANSCRIPT / "more_out.txt").read_text()
    assert alike(done.stdout, True).splitlines() == _plain(wanted).splitlines()


def _plain(said: str) -> str:
    """As `alike`, without the exception for the first transcript."""
    return re.sub(_DOCUMENT, _canonical, said, flags=re.MULTILINE | re.DOTALL)


WRONG = {
    "vcpucount": "error: command 'vcpucount' requires <domain> option",
    "domstate --domain": "error: expected syntax: --domain <string>",
    "qemu-monitor-command test": "error: command 'qemu-monitor-command' requires <cmd> option",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_line(with_test: None, command: str) -> None:
    assert invoke(*command.split(), status=1).stderr == WRONG[command] + "\n"


def test_quietly(with_test: None) -> None:
    assert invoke("-q", "domstate", "test").stdout == "running\n"
    assert invoke("-q", "list", "--all").stdout == " 1    test   running\n"
    assert invoke("-q", "domstate test; domid test").stdout == "running\n1\n"
