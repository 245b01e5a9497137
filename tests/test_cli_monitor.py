"""``qemu-monitor-command``, ``console``, ``domstats``, ``define --validate``; some with a QEMU."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import qemu_guests
from helpers import DEADLINE, environment, xml
from shell import failure, invoke, out

from shmdomains import DomainList
from shmdomains.cli.definitions import Schema
from shmdomains.drivers import TestDriver

ECHO = bytes.fromhex("bafd03 ec a801 74f8 baf803 ec ee ebf1")
"""What comes over the serial line goes back."""


@pytest.fixture
def guest(segment_dir: Path) -> Iterator[str]:
    """The name of a list whose `web1` is a QEMU with a console."""
    if (missing := qemu_guests.missing()) is not None:
        pytest.skip(missing)
    with DomainList.create(max_domains=8) as doms, qemu_guests.qemu_driver(doms) as driver:
        doms.driver = "qemu"
        driver.define(qemu_guests.xml(driver, ECHO, more='<serial type="pty"/>'))
        driver.start("web1")
        yield "web1"


def test_the_monitor(guest: str) -> None:
    asked = '{"execute": "query-status"}'
    answer = json.loads(invoke("qemu-monitor-command", guest, asked).stdout)
    assert answer["return"]["status"] == "running"
    pretty = invoke("qemu-monitor-command", guest, "--pretty", asked).stdout
    assert '\n  "return": {' in pretty and json.loads(pretty) == answer
    said = invoke("qemu-monitor-command", guest, "--hmp", "info", "status").stdout
    assert said == "VM status: running\n\n"
    assert "mutually exclusive" in failure("qemu-monitor-command", guest, "--hmp", "--pretty", "x")
    assert "cannot parse json x" in failure("qemu-monitor-command", guest, "x")
    assert "nonsense" in failure("qemu-monitor-command", guest, '{"execute": "nonsense"}')
    fields = dict(line.split("=") for line in out("domstats", guest)[1:] if "=" in line)
    assert int(fields["  cpu.time"]) > 0 and int(fields["  balloon.rss"]) > 1024
    assert fields["  state.state"] == "1"


def test_the_console(guest: str) -> None:
    """What is typed gets to the guest, and its answer back; ^] ends it, the terminal as before."""
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-m", "shmdomains", "console", guest]
    process = subprocess.Popen(
        command, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs
    )
    try:
        said = b""
        end = time.monotonic() + DEADLINE
        typed = False
        os.set_blocking(ours, False)
        while b"ping" not in said:
            assert time.monotonic() < end, said
            try:
                said += os.read(ours, 4096)
            except BlockingIOError:
                time.sleep(0.001)
            # The terminal is raw by then: what is typed is not echoed by it.
            if b"Escape character" in said and not typed:
                typed = not termios.tcgetattr(theirs)[3] & termios.ECHO
                if typed:
                    os.write(ours, b"ping")
        assert b"Connected to domain 'web1'" in said
        os.write(ours, b"\x1d")
        assert process.wait(DEADLINE) == 0
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def test_what_has_no_console(segment_dir: Path) -> None:
    with DomainList.create(max_domains=8) as doms:
        TestDriver(doms).create(xml("web1"))
        doms.driver = "test"
        assert "without a controlling TTY" in failure("console", "web1")
        said = failure("qemu-monitor-command", "web1", "x")
        assert "not supported by the connection driver" in said


def test_domstats_without_a_driver(segment_dir: Path) -> None:
    with DomainList.create(max_domains=8) as doms:
        doms.define(xml("web1", memory=2048, vcpus=4))
        assert out("domstats") == [
            "Domain: 'web1'",
            *("  state.state=5", "  state.reason=0", "  balloon.maximum=2048"),
            *("  vcpu.current=4", "  vcpu.maximum=4"),
        ]
        assert out("domstats", "--vcpu", "web1")[1:] == ["  vcpu.current=4", "  vcpu.maximum=4"]
        assert out("domstats", "--list-active") == []


def test_validate(segment_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a schema of the test's own; libvirt's, where there is one, says yes to a plain domain."""
    place = tmp_path / "domain.rng"
    place.write_text(
        "<element name='domain' xmlns='http://relaxng.org/ns/structure/1.0'>"
        "<zeroOrMore><choice><attribute name='type'/><element name='name'><text/></element>"
        "<element name='memory'><text/></element><element name='os'><element name='type'><text/>"
        "</element></element></choice></zeroOrMore></element>"
    )
    plain = (
        "<domain type='kvm'><name>a</name><memory>1024</memory><os><type>hvm</type></os></domain>"
    )
    (tmp_path / "a.xml").write_text(plain)
    (tmp_path / "b.xml").write_text(plain.replace("<os>", "<nonsense/><os>"))
    libvirts = Schema.PLACE
    monkeypatch.setattr(Schema, "PLACE", place)
    invoke("define", "--validate", tmp_path / "a.xml")
    done = invoke("define", "--validate", tmp_path / "b.xml", status=1)
    assert "XML document failed to validate against schema" in done.stderr
    assert "nonsense" in done.stderr and out("list", "--all", "--name") == ["a"]
    monkeypatch.setattr(Schema, "PLACE", tmp_path / "nowhere.rng")
    done = invoke("define", "--validate", tmp_path / "a.xml", status=1)
    assert "Debian has it in the package libvirt0" in done.stderr
    if libvirts.exists():
        monkeypatch.setattr(Schema, "PLACE", libvirts)
        invoke("define", "--validate", tmp_path / "a.xml")


def test_xpath(segment_dir: Path) -> None:
    with DomainList.create(max_domains=8) as doms:
        doms.define(xml("web1"))
        assert out("dumpxml", "web1", "--xpath", "//name") == ["<name>web1</name>"]
        assert failure("dumpxml", "web1", "--xpath", "//[") == "XPath error : Invalid expression"
