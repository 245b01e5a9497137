"""A domain's file that is not named after it: the first change of the domain gives it its name.

Each rule is killed before each call that changes a directory. Wherever that is, a load finds the
domain once, as it was or as it was to be, and with its autostart; when the rule is called again it
ends as if nobody had died, but for a link of the former name that leads nowhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from helpers import EVERY_STORE, problems
from killing import Child, Pipe, xml

from shmdomains import ConfigError, DomainDef, DomainList
from shmdomains.config import parse

WEB1 = UUID(int=1)
A, B = UUID(int=10), UUID(int=11)
STEPS = ["open", "mkdir", "rename", "link", "unlink", "symlink"]

RULES: dict[str, Callable[[Any], object]] = {
    "define": lambda doms: doms.define(xml("web1", WEB1, memory=2048)),
    "save": lambda doms: doms.save_config("web1"),
    "rename": lambda doms: doms.rename("web1", "web2"),
    "undefine": lambda doms: doms.undefine("web1"),
    "delete": lambda doms: doms.delete_config("web1"),
    "autostart": lambda doms: doms.set_autostart("web1", True),
    "no autostart": lambda doms: doms.set_autostart("web1", False),
}
LEFT: dict[str, tuple[list[str], bool]] = {
    "define": (["web1.xml"], True),
    "save": (["web1.xml"], True),
    "rename": (["web2.xml"], True),
    "undefine": ([], False),
    "delete": ([], False),
    "autostart": (["web1.xml"], True),
    "no autostart": (["web1.xml"], False),
}
"""The files that are there afterwards, and whether their domain starts with the host."""


def fill(folder: Path) -> None:
    (folder / "autostart").mkdir(parents=True)
    (folder / "guest.xml").write_text(xml("web1", WEB1))
    (folder / "autostart" / "guest.xml").symlink_to(folder / "guest.xml")
    (folder / "other.xml").write_text(xml("other", UUID(int=2)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*.xml"))


def check_left(folder: Path, rule: str) -> None:
    expected, autostart = LEFT[rule]
    assert names(folder) == sorted([*expected, "other.xml"])
    links = {path.name for path in (folder / "autostart").glob("*.xml") if path.exists()}
    assert links == set(expected if autostart else [])


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def doms(request: pytest.FixtureRequest) -> Iterator[Any]:
    with request.param.make() as doms:
        yield doms
        assert problems(doms, request) == []


@pytest.mark.differs
@pytest.mark.parametrize("rule", RULES)
def test_a_change_replaces_the_file(doms: Any, tmp_path: Path, rule: str) -> None:
    folder = tmp_path / "vm"
    fill(folder)
    report = doms.load_all_configs(folder)
    assert report.loaded == ["web1", "other"] and doms.peek(name="web1").autostart
    RULES[rule](doms)
    check_left(folder, rule)
    assert not (folder / "autostart" / "guest.xml").is_symlink()
    with DomainList() as later:
        report = later.load_all_configs(folder)
        assert report.failures == []
        found = [name.removesuffix(".xml") for name in LEFT[rule][0]]
        assert sorted(report.loaded) == sorted([*found, "other"])


@pytest.mark.parametrize("rule", RULES)
def test_a_change_that_fails_leaves_the_file(
    doms: Any, tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vm"
    fill(folder)
    doms.load_all_configs(folder)
    monkeypatch.setattr("shmdomains.config.change.sync_directory", _fail)
    with pytest.raises(OSError, match="made to fail"):
        RULES[rule](doms)
    assert names(folder) == ["guest.xml", "other.xml"]
    assert names(folder / "autostart") == ["guest.xml"]
    assert (folder / "guest.xml").read_text() == xml("web1", WEB1)
    info = doms.peek(name="web1")
    assert info.persistent and info.autostart and info.definition.memory == 1024


def _fail(*_: object) -> None:
    raise OSError(5, "made to fail")


def test_only_files_of_nobody_are_read(
    doms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large directory nearly all files are named after their domains."""
    folder = tmp_path / "vm"
    fill(folder)
    for number in range(40):
        (folder / f"vm{number}.xml").write_text(xml(f"vm{number}"))
    doms.load_all_configs(folder)
    read: list[str] = []
    real = parse.parse_file
    monkeypatch.setattr(
        parse, "parse_file", lambda path: read.append(Path(path).name) or real(path)
    )
    doms.undefine("vm7")
    doms.define(xml("new"))
    assert read == []
    doms.undefine("web1")
    assert read == ["guest.xml"]


def test_a_file_of_another_domain_of_that_name_stays(doms: Any, tmp_path: Path) -> None:
    folder = tmp_path / "vm"
    folder.mkdir()
    doms.load_all_configs(folder)
    doms.define(xml("web1", WEB1))
    (folder / "web1.xml").rename(folder / "kept.xml")
    (folder / "kept.xml").write_text(xml("web1", UUID(int=9)))
    doms.undefine("web1")
    assert names(folder) == ["kept.xml"]


@pytest.mark.parametrize("how", ["defined", "renamed"])
def test_a_new_name_takes_no_other_ones_file(doms: Any, tmp_path: Path, how: str) -> None:
    """web1's file has the name of a domain that is to come; neither loses its own."""
    folder = tmp_path / "vm"
    fill(folder)
    doms.load_all_configs(folder)
    if how == "defined":
        doms.define(xml("guest"))
    else:
        doms.rename("other", "guest")
    left = [] if how == "renamed" else ["other.xml"]
    assert names(folder) == ["guest.xml", *left, "web1.xml"]
    assert names(folder / "autostart") == ["web1.xml"]
    with DomainList() as later:
        assert sorted(later.load_all_configs(folder).loaded) == [
            name.removesuffix(".xml") for name in names(folder)
        ]
        assert later.peek("web1").autostart and not later.peek("guest").autostart
    doms.undefine("guest")
    assert names(folder) == [*left, "web1.xml"]


def test_undefine_takes_no_other_ones_file(doms: Any, tmp_path: Path) -> None:
    folder = tmp_path / "vm"
    fill(folder)
    doms.define(xml("guest"))  # in memory alone
    doms.load_all_configs(folder)
    doms.undefine("guest")
    assert names(folder) == ["other.xml", "web1.xml"]


CHANGES: dict[str, Callable[[Any], object]] = {
    "redefine": lambda doms: doms.define(xml("b", B)),
    "save": lambda doms: doms.save_config("b"),
    "undefine": lambda doms: doms.undefine("b"),
    "delete": lambda doms: doms.delete_config("b"),
    "rename": lambda doms: doms.rename("b", "c"),
    "autostart": lambda doms: doms.set_autostart("b", True),
    "no autostart": lambda doms: doms.set_autostart("b", False),
}
"""Of a domain b, whose place another domain's file has."""


def without_a_file(doms: Any, folder: Path, *, autostart: bool) -> None:
    """b.xml holds a, and b is persistent and has no file: `assign_def` makes none."""
    (folder / "autostart").mkdir(parents=True)
    (folder / "b.xml").write_text(xml("a", A))
    if autostart:
        (folder / "autostart" / "b.xml").symlink_to(folder / "b.xml")
    doms.load_all_configs(folder)
    with doms.locked():
        dom = doms.assign_def(DomainDef.from_xml(xml("b", B)), persistent=True)
    dom.unlock()


def loaded_with_autostart(folder: Path) -> dict[str, bool]:
    with DomainList() as later:
        later.load_all_configs(folder)
        return {info.name: info.autostart for info in later}


@pytest.mark.differs
@pytest.mark.parametrize("autostart", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_takes_another_ones_file(
    doms: Any, tmp_path: Path, change: str, autostart: bool
) -> None:
    folder = tmp_path / "vm"
    without_a_file(doms, folder, autostart=autostart)
    if change == "autostart":
        with pytest.raises(ConfigError, match="no config file to link to"):
            CHANGES[change](doms)
        assert not doms["b"].autostart
    else:
        CHANGES[change](doms)
    written = {"redefine": {"b": False}, "save": {"b": False}, "rename": {"c": False}}
    assert loaded_with_autostart(folder) == {"a": autostart, **written.get(change, {})}


@pytest.mark.differs
@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_move_stays_and_is_not_written_over(
    doms: Any, tmp_path: Path, change: str
) -> None:
    """a has a file of its own name as well, which another program put there."""
    folder = tmp_path / "vm"
    without_a_file(doms, folder, autostart=True)
    (folder / "a.xml").write_text(xml("a", A, memory=2048))
    if change in ("redefine", "save", "autostart"):
        with pytest.raises(ConfigError, match=r"it holds domain 'a'.*b\.xml"):
            CHANGES[change](doms)
        assert not doms["b"].autostart and doms["b"].definition.memory == 1024
    else:
        CHANGES[change](doms)
    assert (folder / "b.xml").read_text() == xml("a", A)
    assert (folder / "a.xml").read_text() == xml("a", A, memory=2048)
    assert names(folder / "autostart") == ["b.xml"]


def test_a_copy_does_not_move_to_the_place_of_a_domains_file(doms: Any, tmp_path: Path) -> None:
    """A load took aa.xml for a, and goes on to do so."""
    folder = tmp_path / "vm"
    folder.mkdir()
    (folder / "aa.xml").write_text(xml("a", A))
    (folder / "b.xml").write_text(xml("a", A, memory=2048))
    doms.load_all_configs(folder)
    with pytest.raises(ConfigError, match="it holds domain 'a'"):
        doms.define(xml("b", B))
    assert names(folder) == ["aa.xml", "b.xml"] and "b" not in doms


def test_what_a_killed_rename_left_is_no_other_ones_file(doms: Any, tmp_path: Path) -> None:
    """It was killed with both names' files there: the new name is free, and so is its file. With
    the new one's alone it is the only file of a domain that has its old name."""
    folder = tmp_path / "vm"
    folder.mkdir()
    (folder / "a.xml").write_text(xml("a", A))
    doms.load_all_configs(folder)
    (folder / "b.xml").write_text(xml("b", A))
    (folder / "a.xml").rename(tmp_path / "a.xml")
    with pytest.raises(ConfigError, match="it holds domain 'a'"):
        doms.define(xml("b", B))
    assert "b" not in doms
    (tmp_path / "a.xml").rename(folder / "a.xml")
    doms.define(xml("b", B))
    assert loaded_with_autostart(folder) == {"a": False, "b": False}


def test_a_file_that_cannot_be_parsed_is_whose_name_it_has(doms: Any, tmp_path: Path) -> None:
    folder = tmp_path / "vm"
    folder.mkdir()
    (folder / "b.xml").write_text("<domain>")
    doms.load_all_configs(folder)
    doms.define(xml("b", B))
    assert loaded_with_autostart(folder) == {"b": False}


@pytest.mark.parametrize("how", ["save", "define"])
def test_a_first_file_is_not_armed_by_a_former_ones_link(
    doms: Any, tmp_path: Path, how: str
) -> None:
    folder = tmp_path / "vm"
    (folder / "autostart").mkdir(parents=True)
    (folder / "autostart" / "b.xml").symlink_to(folder / "b.xml")
    doms.load_all_configs(folder)
    with doms.locked():
        dom = doms.assign_def(DomainDef.from_xml(xml("b", B)), persistent=True)
    with dom:
        if how == "save":
            doms.save_config(dom)
    if how == "define":
        doms.define(xml("b", B))
    assert loaded_with_autostart(folder) == {"b": False}


def test_a_rename_takes_along_what_a_killed_define_left(doms: Any, tmp_path: Path) -> None:
    """A define killed between file and commit leaves a file of a record that is not persistent."""
    folder = tmp_path / "vm"
    folder.mkdir()
    doms.load_all_configs(folder)
    for name, uuid in (("a", A), ("b", B)):
        with doms.locked():
            doms.assign_def(DomainDef.from_xml(xml(name, uuid))).unlock()
    (folder / "a.xml").write_text(xml("a", A))
    (folder / "b.xml").write_text(xml("b", WEB1))
    doms.rename("a", "c")
    doms.rename("b", "d")
    assert names(folder) == ["b.xml"]  # which holds another one
    doms.define(xml("c", A))
    assert loaded_with_autostart(folder) == {"b": False, "c": False}


# --- killed ------------------------------------------------------------------------------------


def die_at(pipe: Pipe, path: str, rule: str, nth: int) -> None:
    """Call a rule, and die as by SIGKILL before the n-th call that makes or removes an entry."""
    doms = DomainList.attach(path=path)
    seen = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == nth:
                os._exit(9)
            return real(*args, **kwargs)

        return call

    for step in STEPS:
        setattr(os, step, counted(getattr(os, step)))
    RULES[rule](doms)
    pipe.say(seen)


@pytest.mark.parametrize("rule", RULES)
def test_killed_at_each_step(
    start: Callable[..., Child],
    tmp_path: Path,
    rule: str,
    tried: Callable[[str, int], None],
) -> None:
    nth, done = 0, False
    while not done:
        nth += 1
        assert nth < 60
        folder = tmp_path / f"vm{nth}"
        fill(folder)
        with DomainList.create(path=tmp_path / f"{nth}.segment", max_domains=20) as doms:
            doms.load_all_configs(folder)
            child = start(die_at, str(tmp_path / f"{nth}.segment"), rule, nth)
            try:
                child.hear()
                done = True
            except AssertionError as exc:
                assert re.search("died$", str(exc))
                child.join()
            look_after_a_death(folder, rule)
            # Whoever comes next does it again.
            if doms.peek(name="web1") is not None:
                RULES[rule](doms)
            check_left(folder, rule)
            doms.unlink(force=True)
    tried(f"deaths in '{rule}' of a file with another name", nth - 1)


def look_after_a_death(folder: Path, rule: str) -> None:
    gone = rule in ("undefine", "delete")
    with DomainList(max_domains=20) as later:
        report = later.load_all_configs(folder)
        later.forget_configs()
        loaded = [name for name in report.loaded if name != "other"]
        if rule == "rename":
            # Both names' files may be there; the next load takes one and reports the other.
            assert loaded in (["web1"], ["web2"]) and len(report.failures) <= 1
        else:
            assert report.failures == []
            assert loaded == ["web1"] or (gone and loaded == [])
        if loaded and rule not in ("no autostart", "undefine", "delete", "rename"):
            assert later.peek(name=loaded[0]).autostart
