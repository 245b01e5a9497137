"""The WSGI application that test_servers.py has real servers run.

``/add?name=…&hold=…`` adds one to a domain's number and holds the domain between reading it and
writing it, so that an increment is lost wherever two requests are let in at once. The answer has
three lines, each sent when it is so: ``PID``, ``held``, ``done …``, the last with whether the
previous owner had died. A client whose server is killed thus knows how far its request got.

Where ``COUNTERS`` names a list each worker attaches to it. Else the list has no name and is made at
import: with gunicorn's ``--preload``, before the fork. ``/state`` tells what is in it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs

import counters

from shmdomains import DomainList


def _find() -> DomainList:
    if name := os.environ.get("COUNTERS"):
        return DomainList.attach(name)
    doms = DomainList(max_domains=8)
    counters.fill(doms)
    return doms


doms = _find()


def _add(name: str, hold: float) -> Iterator[bytes]:
    yield b"%d\n" % os.getpid()
    with doms.get(name, timeout=counters.PATIENCE, why="a request") as dom:
        before = dom.data
        yield b"held\n"
        time.sleep(hold)
        dom.data = before + 1
        died = dom.previous_owner_died is not None
    yield b"done %d\n" % died


def _state() -> Iterator[bytes]:
    attached = [process.pid for process in doms.info.attached]
    yield json.dumps({"counters": counters.read(doms), "attached": attached}).encode()


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    asked = {key: value for key, [value] in parse_qs(environ["QUERY_STRING"]).items()}
    if environ["PATH_INFO"] == "/add":
        return _add(asked["name"], float(asked["hold"]))
    return _state()
