"""The bench of the list on PostgreSQL does what it says: each side gives the right answers, a tiny
run measures all of it, and its figures become targets. No clock is looked at.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("psycopg", reason="psycopg is not installed: pip install '.[bench]'")
sys.path.append(str(Path(__file__).parents[1]))
from bench import cluster, parties, world
from bench.results import Results
from bench.sides import ByHand, Etcd, Ours, Side

COUNT = 12


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    if (why := cluster.missing()) is not None:
        pytest.skip(why)
    with cluster.embedded() as uri:
        yield uri


MAKERS: dict[type[Side], Callable[[str], Side]] = {
    ByHand: lambda uri: ByHand(uri, COUNT),
    Ours: lambda uri: Ours(uri, COUNT),
    Etcd: lambda _uri: Etcd(COUNT),
}


@pytest.fixture(params=MAKERS, ids=lambda kind: kind.__name__)
def side(request: pytest.FixtureRequest, uri: str) -> Iterator[Side]:
    kind: type[Side] = request.param
    if kind is Etcd and (why := Etcd.missing()) is not None:
        pytest.skip(why)
    made = MAKERS[kind](uri)
    try:
        yield made
    finally:
        made.close()


def test_a_side_gives_the_right_answers(side: Side) -> None:
    every = {(number, f"vm{number}", world.RUNNING) for number in range(1, COUNT + 1)}
    assert set(side.rows()) == every
    side.change_state(["vm2", "vm3"], world.PAUSED)
    assert side.read_state(["vm1"]) == world.RUNNING
    assert side.read_state(["vm1", "vm3"]) == world.PAUSED
    side.increment(["vm4", "vm5", "vm4"])
    assert [side.count(f"vm{number}") for number in (4, 5, 6)] == [2, 1, 0]
    assert side.read_state(["vm4"]) == world.RUNNING


def test_who_waits_has_the_domain_when_its_holder_is_killed(side: Side) -> None:
    names = [f"vm{number}" for number in range(1, COUNT + 1)]
    killed = parties.killed_holder(cluster.Filled(side, names), 0, side.cap)
    assert killed.waiting is not None and killed.later is not None
    assert killed.waiting > 0, "the waiter did not wait for the holder"


@pytest.fixture(scope="module")
def told() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def found(uri: str, told: io.StringIO) -> Results:
    return cluster.Runner(cluster.TINY, Console(file=told, width=200), uri).run()


def test_a_run_measures_every_work(found: Results, told: io.StringIO) -> None:
    assert found.failed == []
    places = ("unbound",) if "placed" in found.skipped else cluster.PLACES
    measured = {figure.work for figure in found.figures if figure.contestant == Ours.name}
    for work in ("read", "change", "list"):
        for place in places:
            assert {f"{work}, {place}", f"{work}: times by hand, {place}"} <= measured
    assert {
        "contend random",
        "contend one",
        "killed",
        "killed: p90",
        "killed: times by hand",
    } <= measured
    assert ("etcd" in found.skipped) == (Etcd.missing() is not None)
    assert all(why in told.getvalue() for why in found.skipped.values())
    assert all(target.met is not None for target in cluster.evaluate(found))


def test_figures_are_kept_without_a_place(found: Results, tmp_path: Path) -> None:
    found.save(tmp_path / "cluster.json")
    assert Results.load(tmp_path / "cluster.json") == found
    assert not re.search(r"/tmp|/home|/dev/shm", (tmp_path / "cluster.json").read_text())


def test_targets_are_ratios_of_the_run() -> None:
    found = Results(made="", machine={}, versions={})
    for work, reached in (("read", 0.81), ("change", 1.09)):
        found.add(f"{work}, unbound", Ours.name, 1_000, [1e-4])
        found.add(f"{work}: times by hand, unbound", Ours.name, 1_000, [reached])
    found.add("killed: p90", Ours.name, 1_000, [0.004])
    for where, reached in (("random", 0.99), ("one", 1.01)):
        found.add(f"contend {where}: times by hand", Ours.name, 1_000, [reached], workers=4)
    found.add("list, unbound", Ours.name, 10_000, [0.061])
    met = {target.what: target.met for target in cluster.evaluate(found) if target.work != "change"}
    assert met == {
        "unbound, 1,000: by hand": False,
        "unbound, 10,000": False,
        "holder -> waiter, p90": True,
        "4 on random: by hand": False,
        "4 on one: by hand": True,
    }
    out = io.StringIO()
    cluster.show(found, Console(file=out, width=200))
    assert "0.81x" in out.getvalue() and "4.00 ms" in out.getvalue()
