"""What `list` and `snapshot` return in shared memory: a sequence that makes infos when they are
looked at and does not change; and that `table` says the same of every domain."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers import xml
from killing import Planted

from shmdomains import DomainList, DomainState, SegmentCorrupt
from shmdomains.table import COLUMNS


@pytest.fixture
def doms(tmp_path: Path) -> Iterator[DomainList]:
    with DomainList.create(path=tmp_path / "list", max_domains=100) as doms:
        for number in range(5):
            doms.define(xml(f"vm{number}"))
        doms.define(xml("ünïcode"))
        for name in ("vm1", "vm3"):
            with doms.get(name) as dom:
                dom.activate(pid=7)
                dom.data = {"of": name}
        doms.undefine(name="vm2")
        yield doms
        doms.unlink(force=True)


@pytest.mark.parametrize("definitions", [True, False])
def test_a_listing_is_a_sequence(doms: DomainList, definitions: bool) -> None:
    listed = doms.list(definitions=definitions)
    assert isinstance(listed, Sequence) and len(listed) == 5
    every = list(listed)
    names = [info.name for info in every]
    assert sorted(names) == ["vm0", "vm1", "vm3", "vm4", "ünïcode"]
    assert [listed[at].name for at in range(-5, 5)] == names + names
    assert [info.name for info in listed[1:4:2]] == names[1:4:2]
    assert [info.name for info in reversed(listed)] == names[::-1]
    assert listed == every and every == listed and listed == doms.list(definitions=definitions)
    assert listed != every[1:] and listed != doms.list(definitions=definitions, active=True)
    assert every[2] in listed and listed.index(every[2]) == 2 and listed.count(every[2]) == 1
    assert list(listed) + every == [*listed, *listed]
    assert pickle.loads(pickle.dumps(listed)) == every
    assert repr(listed) == repr(every)
    for at in (5, -6):
        with pytest.raises(IndexError, match="5 domains"):
            listed[at]
    with pytest.raises(TypeError):
        hash(listed)
    with pytest.raises(TypeError, match="from a DomainList"):
        type(listed)()


def test_a_listing_does_not_change(doms: DomainList) -> None:
    listed, bare = doms.list(), doms.snapshot(definitions=False)
    before = [(info.name, info.id, info.state, info.data, info.definition) for info in listed]
    for info in listed:
        with doms.get(info) as dom:
            dom.data = "other"
            dom.state = DomainState.CRASHED
    with doms.locked():
        doms.free()
    doms.define(xml("new"))
    after = [(info.name, info.id, info.state, info.data, info.definition) for info in listed]
    assert after == before
    assert [(info.name, info.id, info.state) for info in bare] == [one[:3] for one in before]


def test_a_table_says_what_the_infos_say(doms: DomainList) -> None:
    for filters in ({}, {"active": True}, {"active": False}, {"state": "running"}):
        infos = doms.list(definitions=False, **filters)
        rows = list(doms.table(COLUMNS, **filters))
        assert rows == [
            (
                info.id,
                info.name,
                info.uuid.bytes,
                info.state,
                info.reason,
                info.persistent,
                info.autostart,
                -1 if info.pid is None else info.pid,
                info.is_active,
            )
            for info in infos
        ]
        assert len(rows) == doms.count(**filters)


def test_a_table_of_a_damaged_record_is_none(doms: DomainList, tmp_path: Path) -> None:
    with Planted(str(tmp_path / "list")) as planted:
        where = planted.name(0, 0)
        planted.flip(where, 8, 8)
        with pytest.raises(SegmentCorrupt):
            doms.table(("name",))
        assert len(doms.table(("id", "state"))) == 5  # the fields are sound
        planted.flip(where, 8, 8)
        status = planted.copy(0, "status")
        planted.flip(status, 40, 8)
        with pytest.raises(SegmentCorrupt):
            doms.table(("id",))
        planted.flip(status, 40, 8)
        assert len(doms.table()) == 5
