"""Real servers, hammered by six clients while their workers are killed: no request fails but in a
killed worker, every increment that was acknowledged is there, and nothing is left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import counters
import pytest
from helpers import DEADLINE, SOAK
from killing import soon
from server_gunicorn import workers
from servers import Server, Tally, hammer, serving

from shmdomains import DomainList

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("nothing_left")]

Tried = Callable[[str, int], None]

REQUESTS = 3000 if SOAK else 300
KILLS = 20 if SOAK else 3  # at random, and as many that hold a domain
HOLD = 0.005

TASK_REQUESTS = 3000 if SOAK else 600
TASK_HOLD = 0.02  # so that the requests of one thread overlap

GUNICORN = ["gunicorn", "--config=python:server_gunicorn"]

UVICORN = ["uvicorn", "--host=127.0.0.1", "--port=0", f"--workers={workers}"]
UVICORN += ["--timeout-worker-healthcheck=20", "--lifespan=on", "server_asgi:application"]


@pytest.fixture
def listed(segment_dir: Path, segment_name: str) -> Iterator[DomainList]:
    """The list that the server's workers attach to."""
    with DomainList.create(segment_name, max_domains=8) as doms:
        counters.fill(doms)
        yield doms
        assert [process.pid for process in doms.info.attached] == [os.getpid()]
        doms.unlink()


def stop(server: Server) -> None:
    """The master ends in order, and its workers with it."""
    server.settle()
    with soon("the end of the server"):
        server.process.terminate()
        server.process.wait(DEADLINE)
    assert server.process.returncode == 0


def judge(server: Server, tally: Tally, found: dict[str, int], tried: Tried) -> None:
    tally.prove(found)
    assert "Traceback" not in server.words()
    assert "event loop" not in server.words()  # of a wait that stops it
    assert len(tally.kills) >= KILLS  # who holds a domain is there to be killed
    tried("requests to real servers", tally.requests)
    tried("of them failed, each in a worker that was killed", len(tally.failures))
    tried("workers of real servers killed", len(tally.kills))


OPTIONS = {
    "sync": ["--worker-class=sync"],
    "gthread": ["--worker-class=gthread", "--threads=4"],
    "max-requests": ["--max-requests=20", "--max-requests-jitter=5", "--preload"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_workers_that_attach(listed: DomainList, tried: Tried, options: list[str]) -> None:
    with serving(*GUNICORN, *options, COUNTERS=str(listed.info.name)) as server:
        tally = hammer(server, REQUESTS, HOLD, KILLS)
        stop(server)
        judge(server, tally, counters.read(listed), tried)
    if "--max-requests=20" in options:
        assert len(tally.workers) > workers + len(tally.kills)  # some ended by themselves


@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent"])
def test_a_list_that_is_made_before_the_fork(tried: Tried, worker: str) -> None:
    """Of a list without a name only those know who were forked with it. gevent patches what there
    is after the fork only."""
    with serving(*GUNICORN, "--preload", "--worker-class", worker) as server:
        tally = hammer(server, REQUESTS, HOLD, KILLS)
        state = json.loads(server.ask("/state"))
        assert set(state["attached"]) <= {server.process.pid, *server.workers()}
        stop(server)
        judge(server, tally, state["counters"], tried)


TASKS = {"gevent": [*GUNICORN, "--worker-class=gevent"], "uvicorn": UVICORN}


@pytest.mark.parametrize("command", TASKS.values(), ids=TASKS)
def test_many_requests_on_one_thread(listed: DomainList, tried: Tried, command: list[str]) -> None:
    with serving(*command, COUNTERS=str(listed.info.name)) as server:
        tally = hammer(server, TASK_REQUESTS, TASK_HOLD, KILLS)
        stop(server)
        judge(server, tally, counters.read(listed), tried)
