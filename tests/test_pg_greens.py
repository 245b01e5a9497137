"""Owners that are greenlets of gevent, for a list on PostgreSQL: whoever waits for the server lets
its hub run the others, patched by gevent or by `green.patch`."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pg_servers
import pytest
from greens import HOWS, LOCKS, Ticks, begin, together
from killing import DEADLINE, Pipe, until, xml
from tasks import Start

pg_servers.need()
pytest.importorskip("gevent")

from shmdomains import LockTimeout  # noqa: E402
from shmdomains.postgres import PostgresDomainList  # noqa: E402

pytestmark = pytest.mark.usefixtures("nothing_left")
MANY = 50


@pytest.fixture(scope="module")
def server() -> Iterator[pg_servers.Server]:
    with pg_servers.Server(max_connections=str(2 * MANY + 50)) as one:
        yield one


@pytest.fixture
def url(server: pg_servers.Server, request: pytest.FixtureRequest) -> str:
    return server.url(request.node.name, by="socket", lease=5)


def play_child(pipe: Pipe, url: str, how: str, body: Callable[..., Any]) -> None:
    begin(how)
    with PostgresDomainList.create(url) as doms:
        for name in "abcd":
            doms.define(xml(name))
        said = body(doms)
        gc.collect()
        until_free(doms)
    pipe.say(said)


def play(start: Start, url: str, how: str, body: Callable[..., Any]) -> Any:
    return start(play_child, url, how, body).hear(3 * DEADLINE)


def until_free(doms: PostgresDomainList) -> None:
    """Nobody holds anything."""
    until(lambda: not doms.locks(), "all is free")


def exclude(doms: PostgresDomainList) -> None:
    for what in LOCKS:
        inside, ticks = [0], Ticks()

        def use(what: str = what, inside: list[int] = inside, ticks: Ticks = ticks) -> None:
            with LOCKS[what](doms):  # type: ignore[arg-type]
                inside[0] += 1
                assert inside == [1]
                ticks.more()
                assert inside == [1]
                inside[0] -= 1

        together(use, use, use)
        ticks.stop()


@pytest.mark.parametrize("how", HOWS)
def test_greenlets_exclude_each_other_and_the_hub_goes_on(start: Start, url: str, how: str) -> None:
    play(start, url, how, exclude)


def wait_long(doms: PostgresDomainList) -> int:
    """The hub goes on while somebody waits at the server."""
    import gevent

    ticks = Ticks()
    with doms.get("a"):
        waiting = gevent.spawn(lambda: doms.get("a", timeout=DEADLINE).unlock())
        ticks.more(50)
        assert not waiting.ready()
        stopped = gevent.spawn(lambda: doms.get("a"))
        ticks.more(50)
        before = time.monotonic()
        stopped.kill()
        assert time.monotonic() - before < 1
        with pytest.raises(LockTimeout, match="held by"):
            gevent.spawn(lambda: doms.get("a", timeout=0.05)).get()
    waiting.get()
    ticks.stop()
    return ticks.count


@pytest.mark.parametrize("how", HOWS)
def test_the_hub_goes_on_and_a_killed_wait_ends(start: Start, url: str, how: str) -> None:
    assert play(start, url, how, wait_long) > 100


def sleep_long(doms: PostgresDomainList) -> tuple[str, str]:
    import gevent

    events = doms.watch(timeout=DEADLINE)
    waiting = gevent.spawn(doms.wait, "a", until=lambda info: info.autostart, timeout=DEADLINE)
    watching = gevent.spawn(next, events)
    ticks = Ticks()
    ticks.more(50)
    assert not waiting.ready()
    with doms.get("a") as dom:
        dom.autostart = True
        dom.activate()
    ticks.stop()
    return waiting.get().name, watching.get().words


@pytest.mark.parametrize("how", HOWS)
def test_waits_for_changes(start: Start, url: str, how: str) -> None:
    assert play(start, url, how, sleep_long) == ("a", "Started Booted")


def end_inside(doms: PostgresDomainList) -> None:
    import gevent

    kept = []

    def hold() -> None:
        kept.append(doms.get("a"))
        kept[0].autostart = True

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gevent.spawn(hold).join()
        gevent.sleep(0)
        doms.get("a", timeout=DEADLINE).unlock()
    assert "a task ended while it held locks" in str(told[0].message)
    peeked = doms.peek("a")
    assert peeked is not None and not peeked.autostart


@pytest.mark.parametrize("how", HOWS)
def test_a_greenlet_that_ends_while_it_holds(start: Start, url: str, how: str) -> None:
    play(start, url, how, end_inside)


def count_up(doms: PostgresDomainList) -> Any:
    def add() -> None:
        with doms.get("a", timeout=DEADLINE) as dom:
            dom.data = (dom.data or 0) + 1

    together(*[add] * MANY)
    found = doms.peek("a")
    return None if found is None else found.data


@pytest.mark.parametrize("how", HOWS)
def test_many_greenlets(start: Start, url: str, how: str) -> None:
    assert play(start, url, how, count_up) == MANY
