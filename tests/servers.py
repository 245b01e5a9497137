"""A real server for the test, and the clients that hammer it.

`serving` starts a server on 127.0.0.1, at a port that the kernel chooses, and ends it. `hammer` has
six clients send requests (server_wsgi.py has what they ask for) while workers are killed: some at
random, some by the very client whose request they hold a domain for. `Tally` is what the clients
saw, and what must hold of it.

This file is also the program that becomes the server: it has itself ended with the test.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from counters import NAMES
from helpers import environment
from killing import libc, until
from server_gunicorn import workers

PATIENCE = 40.0
"""Seconds until a client gives up, which fails the test: longer than any wait in the server."""

CLIENTS = 6
PR_SET_PDEATHSIG = 1
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


@dataclass
class Server:
    """One that runs."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int = 0

    def workers(self) -> dict[int, psutil.Process]:
        """The children of the master; one that serves no requests may be among them."""
        return {child.pid: child for child in psutil.Process(self.process.pid).children()}

    def settle(self) -> None:
        """Wait until all workers are there to stay. One that is told to end while it boots hears
        it late or not at all."""

        def stays(pid: int) -> bool:
            said = [line for line in self.words().splitlines() if f"[{pid}]" in line]
            ready = any("Ready" in line or "Started server process" in line for line in said)
            return ready and not any("Autorestarting" in line for line in said)

        def settled() -> bool:
            return sum(map(stays, self.workers())) == workers

        until(settled, "a server whose workers are all ready", PATIENCE)

    def words(self) -> str:
        return self.log.read_text(errors="replace")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def ask(self, path: str) -> bytes:
        connection = self.connect()
        try:
            connection.request("GET", path, headers={"Connection": "close"})
            response = connection.getresponse()
            assert response.status == 200, response.status
            return response.read()
        finally:
            connection.close()

    def _find(self) -> bool:
        assert self.process.poll() is None, f"the server ended: {self.words()}"
        if not self.port and (found := _ADDRESS.search(self.words())):
            self.port = int(found[1])
        if not self.port:
            return False
        connection = self.connect()
        try:
            connection.connect()  # may be listed before it listens
        except ConnectionRefusedError:
            return False
        finally:
            connection.close()
        return True


@contextmanager
def serving(*command: str, **more: str) -> Iterator[Server]:
    """``python -m COMMAND``, with `more` in its environment; all of it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="shmdomains-test-") as home:
        log = Path(home) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, __file__, str(os.getpid()), *command],
                env=environment(HOME=home, XDG_RUNTIME_DIR=home, **more),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        server = Server(process, log)
        try:
            until(server._find, "a server that answers", PATIENCE)
            yield server
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(server.words())  # pytest shows it if the test fails


@dataclass(frozen=True)
class Failure:
    """A request without its last line, when it was under way and, if it got so far, in which
    worker."""

    name: str
    worker: int | None
    began: float
    ended: float
    error: str


@dataclass
class Tally:
    """What the clients saw."""

    requests: int
    acknowledged: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    workers: set[int] = field(default_factory=set)
    """Those that began a request."""
    kills: dict[int, float] = field(default_factory=dict)
    """When which worker was killed."""
    killed_holders: Counter[str] = field(default_factory=Counter)
    told: int = 0
    """Requests that learnt of a dead owner."""
    raised: list[BaseException] = field(default_factory=list)
    """By a client that could not go on."""

    def unexplained(self) -> list[Failure]:
        """The failures of requests that were in no worker when it was killed."""
        return [
            one
            for one in self.failures
            if not (
                one.worker in self.kills
                if one.worker is not None
                else any(one.began <= at <= one.ended for at in self.kills.values())
            )
        ]

    def prove(self, counters: dict[str, int]) -> None:
        """No request failed but by its worker's death, and no acknowledged increment is lost.

        Of a request that failed nobody knows whether its increment was committed, but of one whose
        holder was killed in the middle: it was not.
        """
        assert not self.raised, self.raised
        assert not self.unexplained(), self.unexplained()
        failed = Counter(one.name for one in self.failures)
        for name in NAMES:
            most = self.acknowledged[name] + failed[name] - self.killed_holders[name]
            least, found = self.acknowledged[name], counters[name]
            assert least <= found <= most, f"{name} is at {found}, not from {least} to {most}"
        assert self.told or not self.killed_holders.total(), "nobody learnt of the dead owners"


def hammer(server: Server, requests: int, hold: float, kills: int, seed: int = 0) -> Tally:
    """Six clients, one connection a request; `kills` workers die at random, as many as holders."""
    dice = random.Random(seed)
    victims = dice.sample(range(requests // 10, requests * 9 // 10), 2 * kills)
    tally = Tally(requests)
    numbers = iter(range(requests))
    guard = threading.Lock()

    def kill(pid: int | None) -> None:
        with guard:
            children = server.workers()
            if pid is None:
                # One that served already is a worker, and no helper of the master.
                pid = dice.choice(sorted(children.keys() & tally.workers) or [0])
            if pid not in children or pid in tally.kills:
                return
            tally.kills[pid] = time.monotonic()
            with suppress(psutil.NoSuchProcess):  # it served its last request
                children[pid].kill()
        children[pid].wait(PATIENCE)  # until its master knows

    def request(number: int, name: str) -> None:
        dies = number in victims[:kills]
        worker, began = None, time.monotonic()
        connection = server.connect()
        try:
            query = f"/add?name={name}&hold={2 * PATIENCE if dies else hold}"
            connection.request("GET", query, headers={"Connection": "close"})
            response = connection.getresponse()
            assert response.status == 200, response.status
            worker = int(response.readline())
            with guard:
                tally.workers.add(worker)
            if response.readline() != b"held\n":
                raise http.client.IncompleteRead(b"")
            if dies:
                kill(worker)
            done = response.readline().split()
            if not done:
                raise http.client.IncompleteRead(b"")
            assert not dies, "a holder that was killed went on"
            with guard:
                tally.acknowledged[name] += 1
                tally.told += int(done[1])
            if response.read():
                raise http.client.HTTPException("more than was asked for")
        except (OSError, http.client.HTTPException, ValueError) as exc:
            with guard:
                tally.killed_holders[name] += dies
                tally.failures.append(
                    Failure(name, worker, began, time.monotonic(), f"{type(exc).__name__}: {exc}")
                )
        finally:
            connection.close()

    def client(own: random.Random) -> None:
        try:
            while True:
                with guard:
                    number = next(numbers, None)
                if number is None:
                    return
                request(number, own.choice(NAMES))
                if number in victims[kills:]:
                    kill(None)
        except BaseException as exc:
            tally.raised.append(exc)

    clients = [
        threading.Thread(target=client, args=(random.Random(f"{seed} {number}"),), daemon=True)
        for number in range(CLIENTS)
    ]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(2 * PATIENCE)
        assert not thread.is_alive(), "a client has no answer"
    return tally


if __name__ == "__main__":
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # kept across exec
    if os.getppid() == int(sys.argv[1]):
        os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
