"""What the tests of `shmdomains.green` share.

gevent stays in processes of their own: `play` starts one that makes a list and calls a function of
a test module with it, patched by gevent or by `green.patch`, and then looks that nothing is held.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from killing import DEADLINE, Pipe, xml
from tasks import Start, new_list

from shmdomains import DomainDef, DomainList, green
from shmdomains.memory.rooms import hub_of

LEAVES_NOTHING = pytest.mark.usefixtures("nothing_left")
HOWS = ["patched", "green"]
LONG = 1000.0  # seconds; nobody waits that long
LOCKS: dict[str, Callable[[DomainList], Any]] = {
    "get": lambda doms: doms.get("a"),
    "lookup": lambda doms: doms.lookup("a"),
    "handle": lambda doms: handle(doms, "a"),
    "locked": lambda doms: doms.locked(),
    "lock_many": lambda doms: doms.lock_many(["b", "a"]),
    "assign_defs": lambda doms: doms.assign_defs(
        [DomainDef.from_xml(xml("b")), DomainDef.from_xml(xml("a"))]
    ),
    "mutex": lambda doms: doms.mutex("m"),
    "job": lambda doms: doms.job("a", "backup"),
}


def handle(doms: DomainList, name: str) -> Any:
    """Unlocked."""
    dom = doms.get(name)
    dom.unlock()
    return dom


def begin(how: str) -> None:
    if how == "patched":
        from gevent import monkey

        monkey.patch_all(ssl=False)  # which asyncio has imported
    else:
        import gevent  # noqa: F401

        green.patch()


def play_child(pipe: Pipe, path: str, how: str, body: Callable[..., Any], *args: Any) -> None:
    begin(how)
    with new_list(path) as doms:
        said = body(doms.plain, *args)
        gc.collect()
    pipe.say(said)


def play(start: Start, path: str, how: str, body: Callable[..., Any], *args: Any) -> Any:
    """What `body` returns, called with a list and `args` in a process with greenlets."""
    return start(play_child, path, how, body, *args).hear(3 * DEADLINE)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Each in a greenlet of its own; what they return."""
    import gevent

    greenlets = [gevent.spawn(call) for call in calls]
    gevent.joinall(greenlets, raise_error=True)
    return [one.value for one in greenlets]


def queued(number: int) -> None:
    """Until so many greenlets of this hub stand in a queue or sleep until something changes."""
    import gevent

    with gevent.Timeout(DEADLINE):
        while True:
            hub = hub_of(gevent.get_hub())
            if hub is not None:
                turns = [turn for room in hub.rooms.values() for turn in room.turns]
                if len(turns) + len(hub._sleeps) == number:
                    return
            gevent.sleep(0)


class Ticks:
    """A greenlet that goes on all the time."""

    def __init__(self) -> None:
        import gevent

        self.count = 0
        self._greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        import gevent

        while True:
            self.count += 1
            gevent.sleep(0)

    def more(self, number: int = 20) -> None:
        """Until it went on so many times."""
        import gevent

        before = self.count
        with gevent.Timeout(DEADLINE):
            while self.count < before + number:
                gevent.sleep(0.001)

    def stop(self) -> None:
        self._greenlet.kill()


def keep(doms: DomainList, what: str, leave: Any) -> Any:
    """A greenlet that holds it until `leave` is set, once it does."""
    import gevent
    from gevent.event import Event

    inside = Event()

    def run() -> None:
        with LOCKS[what](doms):
            inside.set()
            leave.wait()

    holder = gevent.spawn(run)
    assert inside.wait(DEADLINE)
    return holder


def exclude(doms: DomainList, what: str) -> None:
    inside = 0
    ticks = Ticks()

    def use() -> None:
        nonlocal inside
        with LOCKS[what](doms):
            inside += 1
            assert inside == 1
            ticks.more()
            assert inside == 1
            inside -= 1

    together(use, use, use)
    ticks.stop()


def keep_later(doms: DomainList, what: str) -> Any:
    import gevent

    def run() -> None:
        with LOCKS[what](doms):
            pass

    return gevent.spawn(run)
