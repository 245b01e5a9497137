"""``shmdomains top`` and ``trace``: what a look sees, the screen shows, a trace says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers import DEADLINE, EVERY_STORE, Party, environment, xml
from killing import Child, Pipe, fork
from shell import failure, invoke, out
from textual.widgets import DataTable, Static

from shmdomains import DomainList, Job
from shmdomains.drivers import Launched, TestDriver
from shmdomains.look import guests as guests_module
from shmdomains.look.lines import SORTS, cells, chosen, head, report
from shmdomains.look.picture import Looker
from shmdomains.look.screen import Top
from shmdomains.look.trace import Tracer


@pytest.fixture(params=[one for one in EVERY_STORE if one.name != "dict"], ids=lambda one: one.name)
def store(request: pytest.FixtureRequest) -> Any:
    return request.param


class Own(TestDriver):
    """The guest is the test's own process."""

    def launch(self, info: Any) -> Launched:
        return Launched(os.getpid())


def test_a_look(doms: Any, other: Party) -> None:
    looker = Looker(doms, "default")
    driver = Own(doms)
    driver.define(xml("web1"))
    driver.define(xml("web2"))
    first = looker.look()
    assert first.rates == {} and first.states == {"shut off": 2}
    assert [row.cpu for row in first.rows] == [None, None]
    driver.start("web1")
    other.do("dom = doms.get('web2')")
    with doms.get("web1") as dom, dom.job("backup", Job.ASYNC) as job:
        job.progress({"percent": 40})
        second = looker.look()
    other.do("dom.unlock()")
    assert second.states == {"shut off": 1, "running": 1}
    rows = {row.name: row for row in second.rows}
    assert rows["web1"].memory > 1 << 20 and rows["web1"].job == "backup 40%"
    assert rows["web2"].holder.startswith("process ") and rows["web2"].memory is None
    assert rows["web1"].events > 0 and rows["web1"].cpu is None  # seen once
    assert second.rates["commits"] > 0 and second.rates["events"] > 0
    assert second.events[0].endswith("web1: Job started async")
    assert {lock.kind for lock in second.locks} == {"domain", "job"}
    third = looker.look()
    cpu = {row.name: row.cpu for row in third.rows}["web1"]
    assert cpu is not None and cpu >= 0 and third.locks == []


def test_a_number_that_is_another_process_by_now(
    doms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Own(doms)
    driver.create(xml("web1"))
    monkeypatch.setattr(guests_module, "is_running", lambda pid, started: False)
    [row] = Looker(doms).look().rows
    assert row.memory is None and row.cpu is None


def test_rows_are_sorted_and_chosen(doms: Any) -> None:
    driver = TestDriver(doms)
    looker = Looker(doms)
    for name in ("b", "a", "c"):
        driver.define(xml(name))
    looker.look()
    driver.start("b")
    driver.start("c")
    driver.suspend("c")
    picture = looker.look()

    def names(*args: Any) -> str:
        return "".join(row.name for row in chosen(picture, *args))

    assert names("name") == "abc" and names("name", True) == "cba"
    assert names("ev/s") == "cba" and names("id") == "cba"
    assert names("name", False, "PAUSED") == "c" and names("name", False, "", True) == "bc"
    for sort in SORTS:
        assert sorted(names(sort)) == ["a", "b", "c"]
    assert [len(cells(row)) for row in picture.rows] == [9, 9, 9]
    assert "3 domains (1 paused, 1 running, 1 shut off)" in head(picture)[0]
    assert any(line.startswith("c ") and "paused" in line for line in report(picture))


def test_a_process_that_ends_lowers_no_rate(start: Callable[..., Child]) -> None:
    assert start(an_end).hear() == [True, True]


def commit(pipe: Pipe, doms: DomainList) -> None:
    for _ in range(100):
        with doms.get("web1") as dom:
            dom.data = None if dom.data else 1
    pipe.say("done")
    pipe.rest()


def an_end(pipe: Pipe) -> None:
    doms = DomainList(max_domains=4)
    doms.define(xml("web1"))
    child = fork(commit, doms)
    assert child.hear() == "done"
    looker = Looker(doms)
    looker.look()
    child.close()
    with doms.get("web1") as dom:
        dom.data = "ours"
    rates = looker.look().rates
    pipe.say([rates["commits"] > 0, rates["locks"] > 0])


def test_a_process_that_began_anew_lowers_no_rate(doms: Any) -> None:
    """It closed the list and has it again: its counts are smaller than they were."""
    doms.define(xml("web1"))
    looker = Looker(doms)
    looker.look()
    more = {
        who: msgspec.structs.replace(one, commits=10**6, acquisitions=10**6)
        for who, one in looker._counted.items()
    }
    looker._counted = more
    rates = looker.look().rates
    assert rates["commits"] >= 0 and rates["locks"] >= 0


# --- the screen -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(80, 24), (200, 50)], ids=["80", "200"])
def test_the_screen(size: tuple[int, int]) -> None:
    with DomainList(max_domains=8) as doms:
        driver = TestDriver(doms)
        for name in ("web1", "web2", "db1"):
            driver.define(xml(name))
        driver.start("db1")
        asyncio.run(_screen(doms, driver, size))


async def _screen(doms: DomainList, driver: TestDriver, size: tuple[int, int]) -> None:
    app = Top(Looker(doms, "default"), interval=1000)
    async with app.run_test(size=size) as pilot:

        def names() -> list[str]:
            table = app.query_one(DataTable)
            return [str(table.get_row_at(row)[0]) for row in range(table.row_count)]

        def text(name: str) -> str:
            return str(app.query_one(name, Static).render())

        async def until_shown(condition: Callable[[], bool]) -> None:
            end = time.monotonic() + DEADLINE
            while not condition():
                assert time.monotonic() < end, (text("#locks"), text("#events"))
                await pilot.pause(0.01)

        await until_shown(lambda: len(names()) == 3)
        assert "3 domains" in text("#head") and "by ev/s" in text("#head")
        assert app.has_class("narrow") == (size[0] < 100)
        assert app.query_one("#events").display == (size[0] >= 100)
        for _ in range(SORTS.index("name")):
            await pilot.press("s")
        assert names() == ["db1", "web1", "web2"] and "by name" in text("#head")
        await pilot.press("r")
        assert names() == ["web2", "web1", "db1"]
        await pilot.press("a")
        assert names() == ["db1"]
        await pilot.press("a", "slash", "w", "e", "b", "2", "enter")
        assert names() == ["web2"]
        await pilot.press("space")
        assert "PAUSED" in text("#head")
        driver.start("web2")
        app.look()
        await until_shown(lambda: "web2: Started Booted" in text("#events"))
        with doms.locked():
            app.look()
            await until_shown(lambda: f"list lock: process {os.getpid()}" in text("#locks"))
        doms.close()
        app.look()
        await until_shown(lambda: app.return_value is not None)
    assert app.return_value is not None and "closed" in app.return_value


def test_a_pipe_gets_text(segment_dir: Path) -> None:
    with DomainList.create(max_domains=8) as doms:
        doms.define(xml("web1"))
        lines = out("top", "--interval", "0.1")
        assert lines[0] == "default: 1 domains (1 shut off)"
        assert [line.split() for line in lines if line.startswith("web1")] == [
            ["web1", "-", "shut", "off", "-", "-", "-", "-", "-", "-"]
        ]
    assert "nowhere" in failure("-s", "nowhere", "top")


# --- traces ---------------------------------------------------------------------------------------


def spans(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            found.setdefault(event["name"], []).append(event)
    return found


def test_a_trace(doms: Any, other: Party) -> None:
    """What is held over some looks is one span, also by another process or thread."""
    doms.define(xml("web1"))
    tracer = Tracer(doms)
    tracer.look()
    other.do("dom = doms.get('web1')")
    for _ in range(3):
        tracer.look()
    other.do("dom.unlock()")
    tracer.look()
    with doms.job("web1", "backup"):
        tracer.look()
        tracer.look()
    other.do("dom = doms.get('web1')")
    tracer.look()
    other.do("dom.unlock()")
    found = spans(tracer.events())
    assert sorted(found) == ["domain web1", "job backup on web1"]
    first, second = found["domain web1"]
    assert first["ts"] > 0 and first["dur"] > 0 and second["dur"] == 0
    assert first["pid"] == os.getpid() and first["tid"] != os.getpid()  # a thread of ours
    [job] = found["job backup on web1"]
    assert first["ts"] + first["dur"] < job["ts"] + job["dur"] < second["ts"]
    events = [event["name"] for event in tracer.events() if event["ph"] == "i"]
    assert events == ["web1: Job started modify", "web1: Job ended modify"]


def test_the_file_is_a_trace(segment_dir: Path, tmp_path: Path) -> None:
    """Each event has what the format wants of its phase; Ctrl-C writes what there is."""
    with DomainList.create(max_domains=8) as doms:
        doms.define(xml("web1"))
        place = tmp_path / "trace.json"
        command = [sys.executable, "-m", "shmdomains", "trace", "inf", "-o", str(place)]
        with (
            doms.get("web1", why="a long one"),
            subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE) as process,
        ):
            assert process.stderr is not None
            assert process.stderr.readline() == b"Tracing default; Ctrl-C ends it\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE) == 0
        found = json.loads(place.read_text())
        assert found["otherData"]["looks"] >= 1 and found["otherData"]["events missed"] == 0
        for event in found["traceEvents"]:
            assert event["ph"] in "XMi" and isinstance(event["pid"], int) and event["name"]
            assert event["ph"] != "X" or event["dur"] >= 0
        [span] = spans(found["traceEvents"])["domain web1"]
        assert span["pid"] == os.getpid() and span["args"]["operation"] == "a long one"
        times = [event["ts"] for event in found["traceEvents"] if event["ph"] != "M"]
        assert times == sorted(times)
        written = json.loads(invoke("trace", "0.05", "-o", "-").stdout)
        assert spans(written["traceEvents"]) == {}
