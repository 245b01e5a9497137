"""The bench does what it says: every contestant that is installed gives the right answers, what is
missing is named in a line, and figures become tables, targets and plots.

Its figures are nobody's business here, and no clock is looked at.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1]))
from bench import awake, host, limits, plot, run, starting, tables, targets, waking, work, world
from bench.contestants import ALL, Contestant
from bench.contestants.base import MEMORY
from bench.contestants.in_process import InProcess
from bench.contestants.ours import Robust
from bench.results import Results

COUNT = 30


class Conversation:
    """The contestant of a host, asked one operation after the other in that process."""

    def __init__(self, told: host.Host) -> None:
        self._host = told

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        return lambda *arguments: self._host.call("ask", operation, *arguments)


@pytest.fixture(params=ALL, ids=lambda contestant: contestant.__name__)
def kind(request: pytest.FixtureRequest) -> type[Contestant]:
    contestant: type[Contestant] = request.param
    why = contestant.missing()
    if why is not None:
        pytest.skip(f"{contestant.name}: {why}")
    return contestant


@pytest.fixture
def hosted(kind: type[Contestant]) -> Iterator[host.Host]:
    told = host.Host(kind, COUNT, patience=60)
    try:
        told.answer()
        yield told
    finally:
        told.close()


def test_a_contestant_gives_the_answers_of_a_dict(
    kind: type[Contestant], hosted: host.Host, tried: Callable[[str, int], None]
) -> None:
    keys = world.uuids(COUNT)
    made = {one.uuid: one for one in world.domains(keys)}
    states = dict.fromkeys(keys, world.RUNNING)
    asked = Conversation(hosted)
    prepare, facts = kind().prepare, kind().facts

    def rows() -> list[tuple[int, str, int]]:
        first = kind.first_id
        return sorted((first + at, f"vm{at}", states[key]) for at, key in enumerate(keys))

    assert sorted(asked.rows()) == rows()
    for at, key in enumerate(keys):
        assert asked.read_state([key]) == asked.by_id([kind.first_id + at]) == states[key]
        assert facts(asked.read_definition([f"vm{at}"])) == facts(prepare(made[key].definition))
    asked.change_state(keys[:5], world.PAUSED)
    states.update(dict.fromkeys(keys[:5], world.PAUSED))
    assert sorted(asked.rows()) == rows()
    assert asked.read_state(keys[:5]) == asked.peek(keys[:5]) == world.PAUSED
    new = world.changed(made[keys[7]].definition, 1)
    asked.replace([(keys[7], prepare(new))])
    assert facts(asked.read_definition(["vm7"])) == ("vm7", new.title)
    more = list(world.domains(world.uuids(3, seed=1), "new"))
    asked.miss([one.uuid for one in more])
    asked.define([(one.uuid, one.name, prepare(one.definition)) for one in more])
    assert asked.read_state([more[1].uuid]) == 5
    assert facts(asked.read_definition(["new2"])) == facts(prepare(more[2].definition))
    assert len(asked.rows()) == COUNT + 3
    for value in (world.SMALL[0], world.LARGE[1], world.SMALL[1], {"é": [1.5, None, {}]}):
        asked.change_data([more[0].uuid, keys[2]], value)
        assert told_data(hosted, more[0].uuid) == told_data(hosted, keys[2]) == value
    asked.change_data([keys[3]], world.SMALL[0])
    assert told_data(hosted, keys[2]) == value, "a value is one domain's"
    assert asked.read_state([keys[2]]) == world.PAUSED
    asked.remove([one.uuid for one in more])
    asked.miss([one.uuid for one in more])
    asked.define([(one.uuid, one.name, prepare(one.definition)) for one in more])
    left = [one.name for one in more if not has_no_data(hosted, one.uuid)]
    assert not left, "data of domains that were removed"
    asked.remove([one.uuid for one in more])
    assert sorted(asked.rows()) == rows()
    tried("contestants of the bench compared with a dict", 1)


def told_data(hosted: host.Host, uuid: bytes) -> Any:
    return msgpack.unpackb(hosted.call("data", uuid))


def has_no_data(hosted: host.Host, uuid: bytes) -> bool:
    """Who has none may say so, or fail: no work reads what was never written."""
    try:
        return told_data(hosted, uuid) is None
    except host.FailedError:
        return True


def test_increments_leave_the_rest_of_the_data(kind: type[Contestant], hosted: host.Host) -> None:
    if kind.increment is Contestant.increment:
        pytest.skip(f"{kind.name} cannot count")
    keys = world.uuids(COUNT)
    asked = Conversation(hosted)
    for value in (world.SMALL[0], world.LARGE[0]):
        asked.change_data(keys[:3], value)
        asked.increment([keys[0], keys[1], keys[0]])
        for key, made in zip(keys, (2, 1, 0), strict=False):
            count = value["requests"] + made
            assert asked.count(key) == count
            assert told_data(hosted, key) == {**value, "requests": count}


def test_data_is_as_large_as_it_says() -> None:
    assert all(len(msgpack.packb(value)) <= 48 for value in world.SMALL)
    assert all(2_000 <= len(msgpack.packb(value)) <= 2_100 for value in world.LARGE)


def test_increments_that_are_lost_are_told_of() -> None:
    class Forgetful(InProcess):
        def increment(self, uuids: Sequence[bytes]) -> None:
            super().increment(uuids[1:])

    keys = world.uuids(COUNT)
    contestant = Forgetful()
    contestant.fill(world.domains(keys), COUNT)
    with pytest.raises(RuntimeError, match="10 increments were made, 9 are there"):
        work.Works(contestant, keys).measure("increment", 0.001, 1)


def test_no_increment_of_two_workers_is_lost(kind: type[Contestant], hosted: host.Host) -> None:
    if kind.increment is Contestant.increment or not kind.shared:
        pytest.skip(f"no two processes can count in {kind.name}")
    for where in ("random", "one"):
        contention = hosted.call("contend", 2, where, 0.05, 1)
        assert contention.lost == 0
        assert contention.least > 0


@pytest.mark.parametrize("name", work.SINGLE)
def test_every_work_is_timed(name: str) -> None:
    keys = world.uuids(COUNT)
    contestant = InProcess()
    contestant.fill(world.domains(keys), COUNT)
    works = work.Works(contestant, keys)
    if name == "read_changed":
        with pytest.raises(work.NotOfferedError, match="no other process"):
            works.measure(name, 0.001, 1)
        return
    timings = works.measure(name, 0.001, 1)
    expected = {"define": ["define", "remove"]}.get(name, [name])
    assert [timing.work for timing in timings] == expected
    assert all(timing.wall > 0 for timing in timings)


@pytest.mark.parametrize("kind", waking.WAYS, ids=lambda kind: kind.name)
def test_every_waiter_is_woken_by_every_change(kind: type[waking.Way]) -> None:
    why = kind.missing()
    if why is not None:
        pytest.skip(f"{kind.name}: {why}")
    seconds = waking.measure(kind, 6, 3)
    assert len(seconds) == 18 and min(seconds) > 0


def test_what_a_killed_holder_had_is_had_again_and_others_are_not_blocked() -> None:
    told = host.Host(Robust, COUNT, patience=60)
    try:
        told.answer()
        killed = told.call("killed_holder", 1)
        assert None not in killed
        assert told.call("blocks_others") is False
    finally:
        told.close()


def test_memory_is_touched_and_holes_stay_holes() -> None:
    pages = 3000  # more than two calls' worth
    code = (
        "import mmap, tempfile\n"
        f"memory = mmap.mmap(-1, {pages} * 4096, mmap.MAP_PRIVATE)\n"
        "for at in range(0, len(memory), 4096): memory[at] = 1\n"
        f"file = tempfile.TemporaryFile(dir={MEMORY!r}); file.truncate(1 << 30)\n"
        "mapping = mmap.mmap(file.fileno(), 1 << 30)\n"  # without a name, as segments begin
        "print(flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None and child.stdout is not None
    child.stdout.readline()

    def referenced() -> int:
        rollup = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
        found = re.search(r"^Referenced: +(\d+) kB$", rollup, re.MULTILINE)
        assert found is not None
        return int(found[1]) // 4

    Path(f"/proc/{child.pid}/clear_refs").write_text("1")
    assert referenced() < pages
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, open(f"{folder}/file", "wb+") as file:
        os.pwrite(file.fileno(), b"data", 1 << 20)
        os.truncate(file.fileno(), 1 << 40)  # to read all of this would take minutes
        blocks = os.fstat(file.fileno()).st_blocks
        awake.touch(folder, [child.pid, 1 << 22])
        assert os.fstat(file.fileno()).st_blocks == blocks
    for file_of in Path(f"/proc/{child.pid}/fd").iterdir():
        assert not file_of.is_file() or file_of.stat().st_blocks == 0
    assert referenced() >= pages
    child.communicate(b"\n")


def test_keys_are_drawn_once_and_fresh() -> None:
    drawn = world.draw(20, 30, seed=1)
    assert len(set(drawn)) == 20
    assert world.draw(99, 30, seed=1) != world.draw(99, 30, seed=2)
    for key in (b"x" * 16, "vm1", 1_000_000):
        assert world.fresh(key) == key
        assert world.fresh(key) is not key


# --- a whole run, of three contestants and one that is missing -----------------------------------


class Missing(InProcess):
    name = "something else"

    @classmethod
    def missing(cls) -> str | None:
        return "it is not installed: apt install something-else"


class Broken(InProcess):
    name = "something broken"

    def by_id(self, ids: Any) -> int:
        raise RuntimeError("this is broken")


@pytest.fixture(scope="module")
def told() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def results(told: io.StringIO) -> Results:
    console = Console(file=told, width=160)
    return run.Runner(run.TINY, console, (Robust, InProcess, Missing, Broken)).run()


def test_a_missing_contestant_is_named_in_a_line_and_a_broken_one_dropped(
    results: Results, told: io.StringIO
) -> None:
    line = "skipped: something else: it is not installed: apt install something-else\n"
    assert line in told.getvalue()
    skipped = {kind.missing() for kind in waking.WAYS} - {None}
    skipped.add("it is not installed: apt install something-else")
    assert {*results.skipped.values()} == skipped
    assert [line for line in results.failed if "this is broken" not in line] == []
    assert len(results.failed) == 1


def test_a_run_measures_every_work(results: Results) -> None:
    measured = {figure.work for figure in results.figures if figure.contestant == Robust.name}
    singles = {*work.SINGLE, "remove"}
    parties = {"count random", "count one", "count own", "killed, waiting", "killed, later"}
    room = {"bytes per domain", "create", "attach", "fork", "private"}
    others = {
        "wake",
        "wake: p99",
        "load",
        "kept while listed",
        "slower while written",
        "blocks others",
    }
    assert measured >= singles | parties | room | others
    alone = {figure.work for figure in results.figures if figure.domains == 0}
    assert alone == {*limits.NAMES, "start"}


def test_results_are_kept_without_a_place_or_a_name(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "run.json")
    assert Results.load(tmp_path / "run.json") == results
    kept = (tmp_path / "run.json").read_text()
    assert os.uname().nodename not in re.sub(r'"(work|contestant)": "[^"]*"', "", kept)
    assert str(Path.home()) not in kept and "/dev/shm" not in kept


def test_tables_show_what_was_measured(results: Results) -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    for table in (*tables.tables(results), targets.table(results)):
        console.print(table)
    for text in (
        "a get",
        Robust.name,
        InProcess.name,
        "2 workers",
        "lock and unlock",
        "not blocked",
        "shmdomains list",
    ):
        assert text in out.getvalue()


def test_targets_are_ratios_of_the_run() -> None:
    results = Results(made="", machine={}, versions={})
    for name, seconds in (
        (Robust.name, 1e-6),
        ("LMDB", 5e-6),
        ("shared_memory by hand", 7e-6),
        ("dict + threading.Lock", 0.7e-6),
    ):
        results.add("read_state", name, 1_000, [seconds])
    found = {target.what: target for target in targets.evaluate(results)}
    lmdb, hand = found["get, state, 1,000: LMDB"], found["get, state, 1,000: shared_memory by hand"]
    assert (lmdb.wanted, lmdb.reached, lmdb.met) == ("≥ 5x", "5.00x", True)
    assert (hand.wanted, hand.reached, hand.met) == ("≥ 8x", "7.00x", False)
    assert found["get, state, 1,000: dict + threading.Lock"].met is True  # a tie
    assert found["find by id, 1,000: LMDB"].met is None
    results.add("miss", Robust.name, 1_000, [1e-6])
    results.add("miss", "dict + threading.Lock", 1_000, [0.6e-6])
    found = {target.what: target for target in targets.evaluate(results)}
    assert found["miss, 1,000: dict + threading.Lock"].met is False


def test_the_data_has_its_targets() -> None:
    results = Results(made="", machine={}, versions={})
    for name, seconds, rate in (
        (Robust.name, 1e-6, 6e5),
        ("LMDB", 2.6e-6, 1e5),
        ("shared_memory by hand", 1.9e-6, 1.5e5),
        ("dict + threading.Lock", 0.1e-6, 9e9),  # is nobody's peer with several processes
    ):
        for name_of in ("read_state", "increment", "change_data_large"):
            results.add(name_of, name, 1_000, [seconds])
        results.add("count random", name, 1_000, [rate], workers=4)
    found = {target.what: target for target in targets.evaluate(results)}
    lmdb, hand = (
        found[f"increment in the data, 1,000: {peer}"] for peer in (targets.LMDB, targets.HAND)
    )
    assert (lmdb.wanted, lmdb.reached, lmdb.met) == ("≥ 2.5x", "2.60x", True)
    assert (hand.wanted, hand.reached, hand.met) == ("≥ 2x", "1.90x", False)
    assert found["change data of 2 KB, 1,000: LMDB"].met is True
    assert found["read the data, 1,000: LMDB"].met is None
    four = found["4 workers, random: the best peer"]
    assert (four.wanted, four.reached, four.met) == ("≥ 5x", "4.00x", False)


def test_a_start_has_its_targets() -> None:
    results = Results(made="", machine={}, versions={})
    for name, seconds in ((starting.BARE, 0.02), (starting.IMPORT, 0.07), (starting.LIST, 0.13)):
        results.add("start", name, 0, [seconds])
    found = {target.what: target for target in targets.evaluate(results)}
    imported = found["import shmdomains, beyond bare Python"]
    assert (imported.wanted, imported.reached, imported.met) == ("≤ 60 ms", "50 ms", True)
    assert found["shmdomains list"].met is False


def test_plots_are_drawn_from_a_file_for_light_and_dark(results: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[bench]'")
    drawn = plot.draw(results, tmp_path)
    assert [path.name for path in drawn] == ["operations.svg", "scaling.svg"]
    for path in drawn:
        text = path.read_text()
        assert ElementTree.fromstring(text).tag.endswith("svg")
        assert Robust.name in text
        assert "fill: #ffffff" not in text, "a white background would blind those who read at night"
    again = [path.read_text() for path in plot.draw(results, tmp_path)]
    assert again == [path.read_text() for path in drawn]
