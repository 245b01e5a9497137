"""`shmdomains events`: virsh's lines, one JSON object a line, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killing import Child, Pipe
from shell import failure, invoke, on_terminal, out, process

from shmdomains import DomainList, DomainState, EventType, Job, PausedReason, ShutoffReason

XML = "<domain type='kvm'><name>{}</name><memory>1024</memory><os><type>hvm</type></os></domain>"

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def doms(segment_dir: Path) -> Any:
    """A short life of web1, of web2 only its definition."""
    with DomainList.create("default", max_domains=100, events=64) as doms:
        doms.define(XML.format("web1"))
        doms.set_autostart("web1", True)
        with doms.get("web1") as dom:
            dom.activate()
            dom.commit()
            dom.set_state(DomainState.PAUSED, PausedReason.IOERROR)
            dom.commit()
            dom._note(EventType.JOB_STARTED, Job.MODIFY)
            dom.commit()
            dom.deactivate(ShutoffReason.DESTROYED)
        doms.define(XML.format("web2"))
        yield doms


LINES = [
    "event 'lifecycle' for domain 'web1': Defined Added",
    "event 'autostart' for domain 'web1': Enabled",
    "event 'lifecycle' for domain 'web1': Started Booted",
    "event 'lifecycle' for domain 'web1': Suspended I/O Error",
    "event 'job' for domain 'web1': Started modify",
    "event 'lifecycle' for domain 'web1': Stopped Destroyed",
    "event 'lifecycle' for domain 'web2': Defined Added",
]
KEPT = ("events", "--since", 0, "--loop", "--timeout", 0)


def test_the_lines_are_virshs(doms: DomainList) -> None:
    assert out(*KEPT) == [*LINES, "event loop timed out", "events received: 7"]
    assert out(*KEPT, "--event", "lifecycle")[:-2] == [one for one in LINES if "lifecycle" in one]
    assert out(*KEPT, "--event", "job")[:-2] == [LINES[4]]
    assert out(*KEPT, "web2")[:-2] == [LINES[6]]
    assert out(*KEPT, doms["web2"].uuid)[:-2] == [LINES[6]]
    assert out("events", "--since", 5) == [LINES[5], "events received: 1"]
    assert out("event", "--since", 5)[0] == LINES[5]  # virsh's name


def test_a_timestamp_is_the_events(doms: DomainList) -> None:
    (first, *_) = doms.watch(since=0, timeout=0)
    line = out(*KEPT, "--timestamp")[0]
    stamp, text = line.split(": ", 1)
    assert text == LINES[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\+0000", stamp)
    assert stamp[20:23] == f"{int(first.time * 1000) % 1000:03}"


def test_json_is_one_object_a_line(doms: DomainList) -> None:
    lines = out(*KEPT, "--format", "json")
    expected = [event.to_dict() for event in doms.watch(since=0, timeout=0)]
    assert [json.loads(line) for line in lines] == expected
    assert expected[0]["type"] == "defined"


def test_what_is_missed_is_said(doms: DomainList) -> None:
    for number in range(60):
        doms.define(XML.format("web2").replace("1024", str(2000 + number)))
    result = invoke(*KEPT)
    assert result.stderr == "warning: 3 events came faster than they were read\n"
    assert result.stdout.splitlines()[0] == LINES[3]
    assert json.loads(out(*KEPT, "--format", "json")[0]) == {"missed": 3, "number": 3}


def test_the_list_of_events(segment_dir: Path) -> None:
    assert out("events", "--list") == ["lifecycle", "holder-died", "autostart", "job"]
    both = invoke("events", "--list", "--event", "job", status=2)
    assert "exclude each other" in both.stderr


def test_errors(segment_dir: Path) -> None:
    assert "no such segment" in failure("events", "--timeout", 0)
    with DomainList.create("default", max_domains=10, events=0):
        assert "keeps no events" in failure("events", "--timeout", 0)
    out("create", "other")
    assert "failed to get domain 'web1'" in failure("-s", "other", "events", "web1")
    assert "last event is number 0" in failure("-s", "other", "events", "--since", 7)
    nothing = invoke("-s", "other", "events", "--timeout", 0, status=1)
    assert nothing.stdout == "event loop timed out\nevents received: 0\n"
    out("unlink", "other")


def following(*args: object) -> subprocess.Popen[bytes]:
    return process("-m", "shmdomains", "events", *args, stdout=subprocess.PIPE)


def lines_of(program: subprocess.Popen[bytes], count: int) -> list[str]:
    assert program.stdout is not None
    return [program.stdout.readline().decode().rstrip("\n") for _ in range(count)]


def test_it_follows_until_ctrl_c(doms: DomainList) -> None:
    """Each line comes at once, also into a pipe."""
    with process(
        "-m", "shmdomains", "events", "--loop", "--since", 6, stdout=subprocess.PIPE
    ) as program:
        assert lines_of(program, 1) == [LINES[6]]
        doms.undefine("web2")
        assert lines_of(program, 1) == ["event 'lifecycle' for domain 'web2': Undefined Removed"]
        program.send_signal(signal.SIGINT)
        assert lines_of(program, 2) == ["event loop interrupted", "events received: 2"]
        assert program.wait(20) == 130


def test_one_event_is_enough(doms: DomainList) -> None:
    with process(
        "-m", "shmdomains", "events", "--since", 7, "--format=json", stdout=subprocess.PIPE
    ) as program:
        doms.undefine("web2")
        (line,) = lines_of(program, 1)
        assert json.loads(line)["detail"] == "removed"
        assert program.wait(20) == 0


def hold(pipe: Pipe, path: str) -> None:
    with DomainList.attach(path=path) as doms:
        held = doms.get("web1")
        pipe.say(held.name)
        pipe.rest()


def test_who_died(doms: DomainList, start: Callable[..., Child]) -> None:
    holder = start(hold, doms.info.path)
    assert holder.hear() == "web1"
    holder.kill()
    doms.get("web1").unlock()
    (line, _) = out("events", "--since", 7)
    assert line == f"event 'holder-died' for domain 'web1': process {holder.pid}"
    (line,) = out("events", "--since", 7, "--format", "json")
    assert json.loads(line)["holder"]["pid"] == holder.pid


def test_a_name_cannot_control_the_terminal(segment_dir: Path) -> None:
    with DomainList.create("default", max_domains=10) as doms:
        doms.define(XML.format("a\x9bb"))
        assert "'a\\x9bb': Defined" in out(*KEPT)[0]
        assert "\x9b" not in on_terminal(*KEPT)
