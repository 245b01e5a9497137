"""The agent of `shmdomains.examples`, hammered while its workers are killed.

Each client has domains of its own, so it knows what they must be. What was answered is so; of what
was not answered, one of two things is so; nothing else. Whoever follows the events misses none and
is told none twice, over the deaths of those who told them.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import qemu_guests
from helpers import DEADLINE, SOAK, xml
from killing import until
from servers import PATIENCE, Server, serving

from shmdomains import DomainList
from shmdomains.drivers import Driver, TestDriver

pytestmark = pytest.mark.usefixtures("nothing_left")

WORKERS = 4
CLIENTS = 4
README = Path(__file__).resolve().parents[1] / "README.md"
REQUESTS = {"test": 4000 if SOAK else 400, "qemu": 600 if SOAK else 100}
"""Of each client."""
BETWEEN = {"test": 50, "qemu": 12}
"""Requests from one kill to the next."""

BROKEN = (OSError, http.client.HTTPException)
OFF, RUNS, PAUSED, GONE = "shut off", "running", "paused", "not defined"
MOVES: dict[str, dict[str, str]] = {
    GONE: {"define": OFF},
    OFF: {"define": OFF, "start": RUNS, "undefine": GONE},
    RUNS: {"define": RUNS, "suspend": PAUSED, "reset": RUNS, "destroy": OFF},
    PAUSED: {"resume": RUNS, "destroy": OFF},
}
"""What a client does in a state, and the state afterwards."""


class Asked:
    """The requests, and whoever kills a worker after some of them."""

    def __init__(self, server: Server, between: int) -> None:
        self.server, self.between = server, between
        self.done = self.broken = self.kills = 0
        self.guard = threading.Lock()
        self.chance = random.Random(15)

    def ask(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        connection = self.server.connect()
        try:
            connection.request(method, path, body, {"Connection": "close"})
            self._kill_sometimes()
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def surely(self, method: str, path: str) -> tuple[int, Any]:
        """Asked again until it is answered."""
        while True:
            try:
                return self.ask(method, path)
            except BROKEN:
                self.broken += 1

    def _kill_sometimes(self) -> None:
        with self.guard:
            self.done += 1
            if self.done % self.between:
                return
            workers = [one for one in self.server.workers().values() if _serves(one)]
            if workers:
                victim = self.chance.choice(workers)
                victim.kill()
                victim.wait(DEADLINE)
                self.kills += 1


def _serves(process: psutil.Process) -> bool:
    return process.status() != psutil.STATUS_ZOMBIE and process.num_threads() > 1


class Client(threading.Thread):
    """One, with its domains."""

    def __init__(self, asked: Asked, number: int, requests: int, definition: Any) -> None:
        super().__init__(daemon=True)
        self.asked, self.requests, self.definition = asked, requests, definition
        self.chance = random.Random(number)
        self.states = {f"client{number}-{one}": GONE for one in "abc"}
        self.raised: BaseException | None = None

    def run(self) -> None:
        try:
            for _ in range(self.requests):
                self.step(self.chance.choice(list(self.states)))
        except BaseException as error:
            self.raised = error

    def step(self, name: str) -> None:
        before = self.states[name]
        operation, after = self.chance.choice(list(MOVES[before].items()))
        try:
            status, answer = self.operate(name, operation)
        except BROKEN:
            self.asked.broken += 1
            self.states[name] = self.found(name, before, after)
            return
        assert status == (201 if operation == "define" else 200), (operation, before, answer)
        if operation != "undefine":
            assert answer["state"] == after, (operation, before, answer)
        self.states[name] = after

    def operate(self, name: str, operation: str) -> tuple[int, Any]:
        if operation == "define":
            return self.asked.ask("POST", "/domains", self.definition(name))
        if operation == "undefine":
            return self.asked.ask("DELETE", f"/domains/{name}")
        return self.asked.ask("POST", f"/domains/{name}/{operation}")

    def found(self, name: str, before: str, after: str) -> str:
        """Nobody knows how far the worker got. Whoever is next to work on the domain settles it:
        an operation that the dead one had not begun, or had finished, leaves it so."""
        self.asked.surely("POST", f"/domains/{name}/destroy")
        status, answer = self.asked.surely("GET", f"/domains/{name}")
        assert status == 200 or GONE in (before, after), (name, before, after, answer)
        assert status == 404 or after != GONE or before != GONE, (name, before, after, answer)
        if status == 404:
            return GONE
        assert answer["state"] == OFF, answer
        return OFF


class Follower(threading.Thread):
    """Follows the events, over the ends of connections."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.numbers: list[int] = []
        self.connections = 0
        self.enough = threading.Event()

    def run(self) -> None:
        while not self.enough.is_set():
            connection = self.server.connect()
            try:
                self.connections += 1
                last = str(self.numbers[-1] if self.numbers else 0)
                connection.request("GET", "/events", headers={"Last-Event-ID": last})
                response = connection.getresponse()
                while (line := response.readline()) and not self.enough.is_set():
                    # The answer may break off in the middle of a line.
                    if line.startswith(b"data: ") and line.endswith(b"}\n"):
                        self.numbers.append(json.loads(line[6:])["number"])
            except BROKEN:
                pass
            finally:
                connection.close()


def hammered(server: Server, kind: str, definition: Callable[[str], str]) -> Asked:
    asked = Asked(server, BETWEEN[kind])
    clients = [Client(asked, one, REQUESTS[kind], definition) for one in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(PATIENCE * 10)
        assert not client.is_alive(), "a client has no answer"
        if client.raised is not None:
            raise client.raised
    for client in clients:
        for name, state in client.states.items():
            status, answer = asked.surely("GET", f"/domains/{name}")
            assert (answer["state"] if status == 200 else GONE) == state, (name, answer)
    return asked


def proven(
    driver: Driver, server: Server, kind: str, definition: Any, tried: Callable[[str, int], None]
) -> None:
    follower = Follower(server)
    follower.start()
    asked = hammered(server, kind, definition)
    last = [event.number for event in driver.doms.watch(since=0, timeout=0)]
    until(lambda: follower.numbers[-1:] == last[-1:], "the last event", DEADLINE)
    follower.enough.set()
    follower.join(DEADLINE)
    assert follower.numbers == list(range(1, last[-1] + 1)), "an event was missed, or told twice"
    assert asked.kills >= 3 and "Traceback" not in server.words()
    tried("requests to the agent", asked.done)
    tried("of them broken off", asked.broken)
    tried("workers of the agent killed", asked.kills)
    tried("events followed", len(follower.numbers))


@pytest.fixture
def doms(segment_dir: Path, segment_name: str) -> Iterator[DomainList]:
    """The agent's list; it is attached to this one."""
    with DomainList.create(segment_name, max_domains=64) as doms:
        yield doms
        assert doms.check().problems == []
        doms.unlink()


@contextmanager
def agent(doms: DomainList, *more: str) -> Iterator[Server]:
    """It ends in order, so nobody is attached to the list any more."""
    command = ["shmdomains.examples.agent", "--bind=127.0.0.1:0", f"--workers={WORKERS}"]
    with serving(*command, f"--list=shm:{doms.info.name}", *more) as server:
        yield server
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0


def test_hammered(doms: DomainList, tried: Callable[[str, int], None]) -> None:
    with agent(doms) as server:
        proven(TestDriver(doms), server, "test", xml, tried)


@pytest.mark.timeout(600)
def test_hammered_with_real_guests(doms: DomainList, tried: Callable[[str, int], None]) -> None:
    if (missing := qemu_guests.missing()) is not None:
        pytest.skip(missing)
    with qemu_guests.qemu_driver(doms) as driver:
        with agent(doms, "--driver=qemu", f"--directory={driver.directory}") as server:
            proven(driver, server, "qemu", lambda name: qemu_guests.xml(driver, name=name), tried)
        driver.reconcile()
        assert qemu_guests.disagreements(driver) == []
        for info in driver.list(active=True):
            driver.destroy(info)
        assert qemu_guests.guests(driver) == qemu_guests.files(driver) == []


def test_the_readme(doms: DomainList, tmp_path: Path) -> None:
    """Its commands, one after the other."""
    if (missing := qemu_guests.missing()) is not None:
        pytest.skip(missing)
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed: apt install curl")
    section = README.read_text().split("\n### A service to start from\n")[1]
    serve, *asks = re.findall(r"^\$ (.*)$", section.split("```")[1], re.MULTILINE)
    with qemu_guests.qemu_driver(doms) as driver:
        (tmp_path / "web1.xml").write_text(qemu_guests.xml(driver))
        words = shlex.split(serve.replace("/etc/agent", str(tmp_path / "etc")))
        assert words[:2] == ["python", "-m"]
        command = [word.replace(":8080", ":0") for word in words[2:]]
        assert command.pop(0) == "shmdomains.examples.agent"
        with agent(doms, *command, f"--directory={driver.directory}") as server:
            said = []
            for ask in asks:
                words = shlex.split(ask.replace(":8080", f":{server.port}"))
                with subprocess.Popen(
                    [*words, "--silent"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
                ) as asked:
                    assert asked.stdout is not None
                    for line in asked.stdout:
                        said += [line] if line.strip() else []
                        if '"type": "started"' in line:
                            asked.terminate()
        assert [json.loads(line)["state"] for line in said[:2]] == ["shut off", "running"]
        assert any('"type": "started"' in line for line in said[2:])
        assert driver.list()[0].is_active, "guests go on"
        assert (tmp_path / "etc" / "web1.xml").exists()
        driver.destroy("web1")


def test_what_is_wrong_is_one_line(segment_dir: Path) -> None:
    command = [sys.executable, "-m", "shmdomains.examples.agent", "--list"]
    for url, said in {"nonsense": "shm:NAME", "shm:/no/such/place/x": "/no/such"}.items():
        done = subprocess.run([*command, url], capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1


ANSWERS = [
    ("POST", "/domains", "<domain", 400, "DefinitionError"),
    ("POST", "/domains", "x" * (2 << 20), 413, "TooLarge"),
    ("GET", "/domains/nix", None, 404, "DomainNotFound"),
    ("POST", "/domains/nix/start", None, 404, "DomainNotFound"),
    ("POST", "/domains/web1/explode", None, 404, "NotFound"),
    ("POST", "/domains/web1/resume", None, 409, "DomainInactive"),
    ("PUT", "/domains", None, 404, "NotFound"),
]


def test_what_cannot_be_is_said(doms: DomainList) -> None:
    doms.define(xml("web1"))
    with agent(doms) as server:
        asked = Asked(server, 1000)
        for method, path, body, status, error in ANSWERS:
            assert [status, error] == [(got := asked.ask(method, path, body))[0], got[1]["error"]]
        assert [one["name"] for one in asked.ask("GET", "/domains")[1]] == ["web1"]


def test_events_of_a_list_that_was_here_before(doms: DomainList) -> None:
    """A number that this list has not reached: the host was started again meanwhile."""
    doms.define(xml("web1"))
    with agent(doms) as server:
        connection = server.connect()
        connection.request("GET", "/events", headers={"Last-Event-ID": "1000000"})
        response = connection.getresponse()
        while not (line := response.readline()).startswith(b"data"):
            assert line
        assert json.loads(line[6:])["type"] == "defined"
        connection.close()
