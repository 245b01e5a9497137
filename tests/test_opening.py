"""`shmdomains.open`: a list by its URL."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dict_store import DictDomainList
from helpers import xml

import shmdomains
from shmdomains import (
    AnyDomainList,
    DomainList,
    SegmentExists,
    SegmentNotFound,
    SegmentRefused,
    opening,
)


def names(doms: AnyDomainList) -> list[str]:
    """What is written for any list takes each."""
    return sorted(info.name for info in doms.list(definitions=False))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, DictDomainList]]:
    """The lists of a store that a scheme of its own leads to."""
    lists: dict[str, DictDomainList] = {}

    class Kept(DictDomainList):
        @classmethod
        def open(cls, url: str, **options: Any) -> Kept:
            assert not options
            return lists.setdefault(url, cls())  # type: ignore[return-value]

    monkeypatch.setitem(opening.STORES, "dict", lambda: Kept)
    yield lists
    for doms in lists.values():
        doms.close()


def test_a_name_in_shared_memory(segment_dir: Path) -> None:
    with shmdomains.open("shm:blue", max_domains=10) as doms:
        assert isinstance(doms, DomainList) and doms.info.max_domains == 10
        doms.define(xml("web1"))
    with DomainList.attach("blue") as there:
        assert names(there) == ["web1"]
    with shmdomains.open("shm:blue") as again:
        assert names(again) == ["web1"]


def test_a_file_in_shared_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.segment"
    with shmdomains.open(f"shm:{file}", max_domains=10) as doms:
        assert doms.info.path == str(file)
    with DomainList.attach(path=file) as there:
        assert names(there) == []


def test_attach_create_and_unlink(segment_dir: Path) -> None:
    with pytest.raises(SegmentNotFound):
        opening.attach("shm:blue")
    with opening.create("shm:blue", max_domains=10):
        with pytest.raises(SegmentExists):
            opening.create("shm:blue", max_domains=10)
        with opening.attach("shm:blue") as doms:
            assert doms.info.max_domains == 10
    opening.unlink("shm:blue")
    with pytest.raises(SegmentNotFound):
        opening.unlink("shm:blue")


def test_another_store_gets_the_whole_url(kept: dict[str, DictDomainList]) -> None:
    with shmdomains.open("dict://here?list=blue") as doms:
        doms.define(xml("web1"))
        assert names(doms) == ["web1"] and list(kept) == ["dict://here?list=blue"]


@pytest.mark.parametrize(
    ("url", "begin"),
    [
        ("default", "a name alone "),
        ("", "a name alone "),
        ("/run/x", "a name alone "),
        ("mysql://anna:secret@db1/vms", "'mysql:' "),
        ("anna:secret", "'anna:' "),
        ("shm:", "'shm:' "),
        ("postgresql:secret", "'postgresql:' "),
        ("SHM:x", "'SHM:' "),
    ],
)
def test_anything_else_is_told_what_is_accepted(url: str, begin: str) -> None:
    with pytest.raises(ValueError) as raised:
        shmdomains.open(url)
    text = str(raised.value)
    assert text.startswith(begin + "is not where a list can be: shm:NAME, ")
    assert "postgresql://" in text and "postgresql+embedded:///" in text and "secret" not in text


def test_a_name_that_no_segment_can_have(segment_dir: Path) -> None:
    with pytest.raises(SegmentRefused):
        shmdomains.open("shm:.hidden")


def test_an_import_of_everything_leaves_the_builtin() -> None:
    taken: dict[str, Any] = {}
    exec("from shmdomains import *", taken)
    assert taken.get("open", builtins.open) is builtins.open
    assert shmdomains.open is not builtins.open


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://db1/vms", "postgresql://db1/vms"),
        ("postgresql://anna@db1:5432,db2/vms", "postgresql://anna@db1:5432,db2/vms"),
        ("postgresql://anna:s:e@c:r@db1/vms", "postgresql://anna@db1/vms"),
        ("postgresql://:secret@db1/vms", "postgresql://@db1/vms"),
        ("postgresql:///vms?host=/run&password=secret&list=a", "postgresql:///vms?list=a"),
        ("postgresql+embedded:///srv/vms?list=a", "postgresql+embedded:///srv/vms?list=a"),
        ("shm:default", "shm:default"),
    ],
)
def test_a_url_is_shown_without_a_password(url: str, shown: str) -> None:
    assert opening.shown(url) == shown


def test_a_list_beside_another() -> None:
    beside = opening.beside("postgresql://a:b@db1/vms?list=blue&lease=5&list=red", "x y")
    assert beside == "postgresql://a:b@db1/vms?lease=5&list=x%20y"
    assert opening.beside("postgresql://db1/vms", "a") == "postgresql://db1/vms?list=a"
