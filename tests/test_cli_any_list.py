"""The commands on a list that is not in shared memory, named by a URL.

A store of plain dicts stands for it, under a scheme of its own: so what a command takes for granted
shows without a server.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dict_store import DictDomainList
from helpers import xml
from rich.console import Console
from shell import WEB1, failure, invoke, out, read_json

from shmdomains import CheckReport, DomainList, RecoverReport, SegmentExists, SegmentNotFound
from shmdomains import opening as places
from shmdomains.cli import cli
from shmdomains.cli.types import Target
from shmdomains.holder import this_host
from shmdomains.stress import storm

URL = "dict://anna:secret@here/vms?list=blue&lease=5"
SHOWN = "dict://anna@here/vms?list=blue"
SAMPLES = Path(__file__).parent / "data" / "domains"
THERE = "there.example"

_kept: dict[str, KeptList] = {}


class KeptList(DictDomainList):
    """A list that is found by its URL until it is unlinked."""

    _invariants = ("rows",)
    url = ""

    @classmethod
    def open(cls, url: str, **options: Any) -> KeptList:
        return cls.attach(url) if url in _kept else cls.create(url, **options)

    @classmethod
    def attach(cls, url: str, **options: Any) -> KeptList:
        if url not in _kept:
            raise SegmentNotFound(f"there is no list at {places.shown(url)}")
        return _kept[url]

    @classmethod
    def create(cls, url: str) -> KeptList:
        if url in _kept:
            raise SegmentExists(f"there is a list at {places.shown(url)}")
        _kept[url] = made = cls()
        made.url = url
        return made

    def close(self) -> None:
        """It goes on: who attaches next finds it."""

    def unlink(self, force: bool = False) -> None:
        del _kept[self.url]

    def check(self, timeout: float | None = 10.0) -> Any:
        return CheckReport([], {"domains": len(self)}, [], 0.0)

    def recover(self, timeout: float | None = 10.0) -> RecoverReport:
        return RecoverReport([], [], 0)

    def locks(self) -> list[Any]:
        return []


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(places.STORES, "dict", lambda: KeptList)
    yield
    _kept.clear()


@pytest.fixture
def doms(store: None, monkeypatch: pytest.MonkeyPatch) -> KeptList:
    """``web1`` runs here, ``db1`` there; it is the list that commands take."""
    monkeypatch.setenv("SHMDOMAINS_SEGMENT", URL)
    doms = KeptList.create(URL)
    doms.define(xml("web1", WEB1))
    doms.define(xml("db1"))
    for name, host in (("web1", None), ("db1", THERE)):
        with doms.get(name) as dom:
            dom.activate(4711, reason=0, host=host)
    doms.define(xml("mail"))
    return doms


# --- which list -------------------------------------------------------------------------------


def test_a_list_is_made_and_removed(store: None) -> None:
    assert out("-s", URL, "create") == [f"List '{SHOWN}' created"]
    assert out("create", "dict://other") == ["List 'dict://other' created"]
    assert failure("-s", URL, "create") == f"there is a list at {SHOWN}"
    assert out("unlink", URL) == [f"List '{SHOWN}' removed"]
    assert failure("unlink", URL) == f"there is no list at {SHOWN}"
    assert list(_kept) == ["dict://other"]


@pytest.mark.parametrize("name", ["blue", "shm:blue"])
def test_a_segment_by_name_or_url(segment_dir: Path, name: str) -> None:
    out("create", name, "--max-domains", 10)
    assert out("-s", "blue", "list", "--all", "--name") == []
    assert out("-s", "shm:blue", "list", "--all", "--name") == []
    assert out("unlink", name) == [f"Segment '{name}' removed"]


def test_a_segment_by_the_url_of_its_file(tmp_path: Path) -> None:
    url = f"shm:{tmp_path}/a.segment"
    out("create", url, "--max-domains", 10, "--mode", "600")
    with DomainList.attach(path=tmp_path / "a.segment") as there:
        assert there.info.max_domains == 10
    out("unlink", url)


@pytest.mark.parametrize("url", ["mysql://anna:secret@db1/vms", "postgresql:vms", "shm:"])
def test_what_is_no_such_url(url: str) -> None:
    for args in (("-s", url, "list"), ("unlink", url)):
        said = invoke(*args, status=2).stderr
        assert "is not where a list can be: shm:NAME" in said and "secret" not in said


def test_what_is_wrong_in_a_url_is_a_line(store: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> Any:
        raise ValueError("a lease has 1 to 3600 seconds, not 'x'")

    monkeypatch.setattr(KeptList, "attach", refuse)
    assert "Error: a lease has 1 to 3600 seconds" in invoke("-s", URL, "list", status=2).stderr


def test_a_store_that_is_not_installed_is_a_line(
    store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise ImportError("a list on PostgreSQL needs psycopg: pip install 'shmdomains[postgres]'")

    monkeypatch.setitem(places.STORES, "dict", missing)
    assert "pip install" in failure("-s", URL, "list")


@pytest.mark.parametrize(
    ("args", "flags"),
    [
        (["create", "--max-bytes", "1G", "--mode", "600"], "--max-bytes, --mode"),
        (["create", "--group", "0"], "--group"),
        (["load", str(SAMPLES), "--max-domains", "9"], "--max-domains"),
        (
            ["import", "/dev/null", "--max-domains", "9", "--max-bytes", "1G"],
            "--max-domains, --max",
        ),
    ],
)
def test_what_only_segments_have_is_refused_in_a_line(
    store: None, args: list[str], flags: str
) -> None:
    said = invoke("-s", URL, *args, status=2).stderr
    assert said.startswith(f"error: {flags}") and said.count("\n") == 1
    assert said.endswith(f": only for a segment in shared memory, not for list '{SHOWN}'\n")
    assert not _kept


def test_no_command_shows_the_password(doms: KeptList, config_dir: Path, tmp_path: Path) -> None:
    json = ["--format", "json"]
    for args in (
        ["load", config_dir],
        ["load", config_dir, *json],
        *([command, *more] for command in ("check", "recover", "locks") for more in ([], json)),
        ["export", tmp_path / "export"],
        ["unlink"],
        ["import", tmp_path / "export"],
    ):
        said = invoke(*args)
        assert "secret" not in said.stdout + said.stderr


def test_completion_takes_a_url(doms: KeptList) -> None:
    context = cli.make_context("shmdomains", ["-s", URL, "list"])
    found = cli.commands["domname"].params[0].shell_complete(context, "w")
    assert [item.value for item in found] == ["web1"]


def test_completion_starts_no_server(doms: KeptList, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(places.STORES, "dict+embedded", lambda: KeptList)
    KeptList.create("dict+embedded:///srv").define(xml("web1"))
    context = cli.make_context("shmdomains", ["-s", "dict+embedded:///srv", "list"])
    assert cli.commands["domname"].params[0].shell_complete(context, "w") == []


# --- the commands -----------------------------------------------------------------------------


def test_list_shows_hosts_where_there_are_several(doms: KeptList) -> None:
    assert out("list", "--all") == [
        " Id   Name   State      Host",
        "-" * (5 + 7 + 11 + len(THERE) + 3),
        f" 1    web1   running    {this_host()}",
        f" 2    db1    running    {THERE}",
        " -    mail   shut off   -",
    ]
    assert out("list", "--host", THERE, "--name") == ["db1"]
    assert out("list", "--host", this_host(), "--name") == ["web1"]
    assert [one["host"] for one in read_json("list", "--all")] == [this_host(), THERE, None]


def test_a_segment_has_no_such_column(segment_dir: Path) -> None:
    with DomainList.create(max_domains=10) as segment:
        segment.define(xml("web1"))
        assert out("list", "--all")[0] == " Id   Name   State"
        assert out("list", "--all", "--host", this_host(), "--name") == ["web1"]
        assert out("list", "--all", "--host", THERE, "--name") == []
        assert not any(line.startswith("Host") for line in out("dominfo", "web1"))


def test_dominfo_shows_the_host(doms: KeptList) -> None:
    assert f"Host:           {THERE}" in out("dominfo", "db1")
    assert not any(line.startswith("Host") for line in out("dominfo", "mail"))
    assert read_json("dominfo", "db1")["host"] == THERE


def test_one_domain(doms: KeptList, tmp_path: Path) -> None:
    (tmp_path / "new.xml").write_text(xml("new"))
    assert "Domain 'new' defined" in out("define", tmp_path / "new.xml")[0]
    assert out("rename", "new", "newer") == ["Domain 'new' renamed to 'newer'"]
    assert out("autostart", "newer") == ["Domain 'newer' marked as autostarted"]
    assert out("domstate", "newer") == ["shut off"] and out("domid", "web1") == ["1"]
    assert out("wait", "newer", "--state", "shutoff") == ["shut off"]
    assert "<name>newer</name>" in "".join(out("dumpxml", "newer"))
    assert read_json("domjobinfo", "newer") == {"jobs": []}
    assert out("undefine", "newer") == ["Domain 'newer' has been undefined"]
    said = out("events", "--since", 0, "--loop", "--timeout", 0)
    assert "event 'lifecycle' for domain 'newer': Undefined Removed" in said


def test_the_whole_list(doms: KeptList) -> None:
    assert out("check")[2:] == [
        " rows        ok",
        f"List '{SHOWN}': no problem (3 domains)",
    ]
    assert read_json("check")["invariants"] == {"rows": "ok"}
    assert out("recover")[-1] == f"List '{SHOWN}': 0 repairs"
    assert read_json("recover")["segment"] == SHOWN
    assert read_json("locks") == []


def test_load_and_forget(doms: KeptList, config_dir: Path) -> None:
    assert out("load", config_dir)[-1].endswith(f"4 domains loaded into list '{SHOWN}'")


# --- export and import --------------------------------------------------------------------------


def test_an_export_keeps_the_hosts(doms: KeptList, tmp_path: Path) -> None:
    with doms.get("mail") as dom:
        dom.data = {"disks": ["vda"]}
        dom.next_definition = dom.definition.replace(description="next")
    assert invoke("export", tmp_path / "export").stderr == "3 domains exported\n"
    said = out("-s", "dict://other", "import", tmp_path / "export")
    assert said == ["3 domains imported into list 'dict://other'"]
    other = _kept["dict://other"]
    assert [other[name].host for name in ("web1", "db1", "mail")] == [this_host(), THERE, None]
    mail = other["mail"]
    assert mail.data == {"disks": ("vda",)} and mail.next_definition.description == "next"


def test_shared_memory_takes_its_own_hosts(
    doms: KeptList, segment_dir: Path, tmp_path: Path
) -> None:
    invoke("export", tmp_path / "export")
    done = invoke("-s", "default", "import", tmp_path / "export", status=1)
    assert done.stdout == "2 domains imported into segment 'default'\n"
    assert f"domain 'db1': domain 'db1' cannot run on host '{THERE}'" in done.stderr
    with DomainList.attach() as segment:
        assert segment["web1"].is_active and "db1" not in segment


def test_an_export_of_shared_memory_runs_where_it_is_imported(
    store: None, segment_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DomainList.create(max_domains=10) as segment:
        segment.define(xml("web1"))
        with segment.get("web1") as dom:
            dom.activate()
    invoke("export", tmp_path / "export")
    monkeypatch.setattr(KeptList, "_this_host", lambda doms: THERE)
    out("-s", URL, "import", tmp_path / "export")
    assert _kept[URL]["web1"].host == THERE


def test_an_export_of_xml(doms: KeptList, tmp_path: Path) -> None:
    assert invoke("export", f"{tmp_path}/xml/").stderr == "3 definitions exported\n"
    assert sorted(path.name for path in (tmp_path / "xml").iterdir()) == [
        "db1.xml",
        "mail.xml",
        "web1.xml",
    ]


# --- stress -----------------------------------------------------------------------------------


class StormList(DomainList):
    """A list in a memfd, so that workers have it, that stands for one of another store."""

    made: list[str] = []  # noqa: RUF012
    removed = 0

    @classmethod
    def create(cls, url: str) -> StormList:  # type: ignore[override]
        cls.made.append(url)
        return cls(max_domains=400)

    def unlink(self, force: bool = False, timeout: float | None = 0) -> None:
        type(self).removed += force


@pytest.mark.parametrize("args", [[], ["--kill"]])
def test_stress_makes_a_list_of_its_own_and_removes_it(
    monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    monkeypatch.setitem(places.STORES, "storm", lambda: StormList)
    monkeypatch.setattr(StormList, "made", [])
    monkeypatch.setattr(StormList, "removed", 0)
    url = "storm://anna:secret@here/vms?list=blue"
    said = invoke("-s", url, "stress", SAMPLES, "--seconds", "0.2", *args)
    [made] = StormList.made
    assert made.startswith("storm://anna:secret@here/vms?list=stress-")
    assert StormList.removed == 1
    assert "storm://anna@here/vms?list=blue" in said.stdout and "secret" not in said.stdout


def test_stress_removes_what_it_could_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(places.STORES, "storm", lambda: StormList)
    monkeypatch.setattr(StormList, "removed", 0)
    (tmp_path / "bad.xml").write_text("<domain>")
    console = Console(file=io.StringIO())
    assert storm.run(tmp_path, url="storm://here", seconds=1, console=console) == 1
    assert StormList.removed == 1


def test_stress_takes_no_other_locks_there(store: None) -> None:
    said = invoke("-s", URL, "stress", SAMPLES, "--lock", "multiprocessing", status=2).stderr
    assert f"--lock is for shared memory, not for list '{SHOWN}'" in said


# --- the parts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url", "shared"),
    [
        ("default", "shm:default", True),
        ("a:b", "shm:a:b", True),
        ("/run/a://b", "shm:/run/a://b", True),
        ("./x.segment", "shm:./x.segment", True),
        ("shm:x", "shm:x", True),
        ("postgres://db1/vms", "postgres://db1/vms", False),
        ("postgresql+embedded:///srv", "postgresql+embedded:///srv", False),
    ],
)
def test_a_list_is_named_by_name_file_or_url(text: str, url: str, shared: bool) -> None:
    target = Target.of(text)
    assert (target.url, target.shown, target.in_shared_memory) == (url, text, shared)


def test_postgres_init_is_for_postgresql(segment_dir: Path) -> None:
    said = invoke("postgres", "init", "blue", status=2).stderr
    assert "segment 'blue' is not on PostgreSQL" in said
