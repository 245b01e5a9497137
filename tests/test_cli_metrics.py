"""``shmdomains metrics``: served, printed once, and what it says when it cannot."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from helpers import xml
from shell import DEADLINE, environment, failure, invoke, out

import shmdomains
from shmdomains import DomainList


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return str(answer.read().decode())


def test_it_is_served_until_it_is_interrupted(segment_dir: Path) -> None:
    with DomainList.create(max_domains=8) as doms:
        doms.define(xml("web1"))
        with subprocess.Popen(
            [sys.executable, "-m", "shmdomains", "metrics", "--listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(PYTHONUNBUFFERED="1"),
            text=True,
        ) as server:
            try:
                assert server.stdout is not None
                said = server.stdout.readline()
                match = re.fullmatch(r"Metrics of segment 'default' at (http://\S+)\n", said)
                assert match is not None, said
                assert 'libvirt_domain_info_vstate{domain="web1"} 5\n' in get(match[1])
                assert "process_cpu_seconds_total" in get(match[1])
                doms.unlink(force=True)
                assert "libvirt_up 0\n" in get(match[1])
                with DomainList.create(max_domains=8) as another:
                    another.define(xml("web2"))
                    text = get(match[1])
                    assert "libvirt_up 1\n" in text and '{domain="web2"} 5\n' in text
                server.send_signal(signal.SIGINT)
                assert server.wait(DEADLINE) == 130
            finally:
                server.kill()


def test_once(segment_dir: Path) -> None:
    assert "no such segment" in failure("metrics", "--once")
    out("create")
    assert "libvirt_domains 0" in out("metrics", "--once")


def test_where_it_cannot_listen(segment_dir: Path) -> None:
    out("create")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        said = failure("metrics", "--listen", where)
    assert said.startswith(f"cannot listen at {where}: ")
    assert "is no ADDRESS:PORT" in invoke("metrics", "--listen", "nowhere", status=2).stderr
    assert "one at a time" in invoke("metrics", "--once", "--alerts", status=2).stderr


def test_without_the_extra(segment_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out("create")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    said = failure("metrics", "--once")
    assert said.startswith("metrics need prometheus_client (")
    assert said.endswith("pip install 'shmdomains[metrics]'")
    assert shmdomains.metrics.alerts() == "\n".join(out("metrics", "--alerts")) + "\n"  # type: ignore[attr-defined]
