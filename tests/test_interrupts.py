"""Ctrl-C between any two steps of the rules that are written in Python.

A signal handler that raises does so where the interpreter looks at signals: as a Python function
begins, and as a call into C returns - after it did its work, before its value is kept. A profile
function is called at just these points and may raise there, so each of them is tried: the caller,
who still has the traceback, must find nothing locked, memory and files both as before or both as
they should become, and nothing may change once the traceback is dropped.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import filelock
import pytest
from helpers import SOAK, Store, xml

import shmdomains
from shmdomains import DomainDef, DomainList, WaitTimeout
from shmdomains.config import LOCK_NAME

pytestmark = pytest.mark.usefixtures("nothing_left")

PACKAGE = os.path.dirname(shmdomains.__file__)
A, B, C = (f"00000000-0000-0000-0000-00000000000{digit}" for digit in "abc")
DEEDS = {"_insert", "_remove", "_rename", "commit", "rename", "link", "symlink", "get", "__exit__"}
"""C functions after which more is done than before; these points are tried in every run."""


class CtrlC(KeyboardInterrupt):
    """Ours, and nobody else's."""


class Points:
    """Counts the points, and raises at one of them (0: at none)."""

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self.seen: list[str] = []

    def __call__(self, frame: FrameType, event: str, what: Any) -> None:
        if event not in ("call", "c_return") or what is sys.setprofile or not ours(frame):
            return
        self.seen.append(getattr(what, "__name__", frame.f_code.co_name))
        if len(self.seen) == self.at:
            raise CtrlC


def ours(frame: FrameType) -> bool:
    """In the package, or in what it called; not in what the end of an object calls: nothing gets
    out of there."""
    if frame.f_code.co_name == "__del__" or frame.f_code.co_filename == weakref.__file__:
        return False
    return any(
        at is not None and at.f_code.co_filename.startswith(PACKAGE) for at in (frame, frame.f_back)
    )


class World:
    """A list and its directories: `a` starts with the host, `b` does not."""

    def __init__(self, store: Store, directory: Path) -> None:
        self.config, self.autostart = directory / "config", directory / "autostart"
        self.doms: DomainList = store.make(room=8)
        self.load()
        self.doms.define(xml("a", A))
        self.doms.define(xml("b", B))
        with self.doms.get(name="a") as dom:
            self.doms.set_autostart(dom, True)

    def load(self) -> None:
        self.doms.load_all_configs(self.config, self.autostart)

    def state(self) -> tuple[Any, ...]:
        domains = {
            info.name: (
                *(info.definition.memory, info.persistent, info.autostart, info.is_active),
                info.data,
                *(job.operation for job in info.jobs),
            )
            for info in self.doms.snapshot()
        }
        files = {path.name: path.read_text() for path in self.config.glob("*.xml")}
        return domains, files, sorted(path.name for path in self.autostart.glob("*.xml"))

    def locked(self) -> list[str]:
        """What this thread has left locked, as another one finds it."""
        found = ["list"] if self.doms.is_locked else []

        def look() -> None:
            for info in self.doms.snapshot(definitions=False):
                dom = self.doms.get(name=info.name, timeout=0)
                dom.unlock()
            with self.doms.locked(0), filelock.FileLock(self.config / LOCK_NAME, 0):
                pass

        def note() -> None:
            try:
                look()
            except Exception as exc:
                found.append(str(exc))

        other = threading.Thread(target=note)
        other.start()
        other.join()
        return found


def rename(world: World) -> None:
    with world.doms.locked(), world.doms.get(name="a") as dom:
        world.doms.rename(dom, "z")


def set_autostart(world: World, name: str, enabled: bool) -> None:
    with world.doms.get(name=name) as dom:
        world.doms.set_autostart(dom, enabled)


def undefine_active(world: World) -> None:
    world.doms.undefine(name="b")


def lock_many(world: World) -> None:
    with world.doms.lock_many([A, B]):
        pass


def assign_many(world: World) -> None:
    wanted = [xml("c", C), xml("b", B), xml("d")]
    with world.doms.assign_defs(DomainDef.from_xml(one) for one in wanted):
        pass


def remove(world: World) -> None:
    dom = world.doms.get(name="b")
    dom.unlock()
    with world.doms.locked():
        world.doms.remove_inactive(dom)


def job(world: World) -> None:
    with world.doms.job("b", "backup") as job:
        job.progress(1)


def job_of_a_locked_domain(world: World) -> None:
    with world.doms.get("b") as dom, dom.job("backup") as job:
        job.progress(1)


def wait(world: World) -> None:
    with suppress(WaitTimeout):
        world.doms.wait("a", until=lambda info: False, timeout=0.001)


def wait_any(world: World) -> None:
    with suppress(WaitTimeout):
        world.doms.wait_any(until=lambda info: False, timeout=0.001)


def wait_locked(world: World) -> None:
    with world.doms.get("a") as dom, suppress(WaitTimeout):
        dom.wait(lambda dom: dom.name == "z", timeout=0.001)


RULES: dict[str, Callable[[World], Any]] = {
    "define": lambda world: world.doms.define(xml("c", C)),
    "define without a UUID": lambda world: world.doms.define(xml("c")),
    "redefine": lambda world: world.doms.define(xml("a", A, memory=2048)),
    "undefine": lambda world: world.doms.undefine(name="a"),
    "undefine an active one": undefine_active,
    "rename": rename,
    "set autostart": lambda world: set_autostart(world, "b", True),
    "unset autostart": lambda world: set_autostart(world, "a", False),
    "lock many": lock_many,
    "assign many": assign_many,
    "add": lambda world: world.doms.add("b", "requests"),
    "remove": remove,
    "load": World.load,
    "job": job,
    "job of a locked domain": job_of_a_locked_domain,
    "wait": wait,
    "wait any": wait_any,
    "wait, locked": wait_locked,
}


@pytest.fixture
def worlds(store: Store, segment_dir: Path) -> Iterator[Callable[[str], World]]:
    made: list[World] = []

    def make(rule: str) -> World:
        while made:
            made.pop().doms.close()
        world = World(store, segment_dir / str(len(list(segment_dir.iterdir()))))
        made.append(world)
        if RULES[rule] is undefine_active:
            with world.doms.get(name="b") as dom:
                dom.activate()
        return world

    yield make
    for world in made:
        world.doms.close()


def run(world: World, rule: str, points: Points) -> BaseException | None:
    """What the rule raised."""
    gc.disable()  # what its destructors call comes at other points each time
    try:
        sys.setprofile(points)
        RULES[rule](world)
    except CtrlC as exc:
        return exc
    finally:
        sys.setprofile(None)
        gc.enable()
    return None


def without_uuids(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """The files by their names: a UUID may be a random one."""
    domains, files, links = state
    return domains, {name: text.split("<uuid>")[0] for name, text in files.items()}, links


@pytest.mark.soak
@pytest.mark.parametrize("rule", RULES)
def test_ctrl_c_leaves_nothing_locked_or_half_done(
    worlds: Callable[[str], World], rule: str, tried: Callable[[str, int], None]
) -> None:
    world = worlds(rule)
    before = without_uuids(world.state())
    points = Points()
    assert run(world, rule, points) is None
    after = without_uuids(world.state())
    count = len(points.seen)
    chosen = [
        at
        for at in range(1, count + 1)
        if SOAK or points.seen[at - 1] in DEEDS or at % 17 == len(rule)
    ]
    found = after
    for at in chosen:
        if found != before:  # else it goes on in a world that was disturbed before
            world = worlds(rule)
        points = Points(at)
        with warnings.catch_warnings():
            # A handle that was on its way to the rule is dropped, which frees it and says so.
            warnings.simplefilter("ignore", ResourceWarning)
            raised = run(world, rule, points)
            found, locked = without_uuids(world.state()), world.locked()
            last = points.seen[at - 1] if len(points.seen) >= at else "past the end"
            where = f"at {at} of {count}, {last}"
            assert raised is not None or len(points.seen) < at, where
            assert locked == [], where
            if last == "__exit__" and "job" in rule:
                found = before  # a job whose end has not begun ends with its handle
            assert found in (before, after), where
            del raised
            gc.collect()
            assert without_uuids(world.state()) == found, where
        assert world.doms.check().problems == [], where
    tried("Ctrl-C between two steps of a rule", len(chosen))
