"""The commands on a list on PostgreSQL, and ``shmdomains postgres init``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pg_servers
import pytest
from helpers import xml
from shell import WEB1, failure, invoke, out, program, read_json

from shmdomains import DomainList, SegmentNotFound, opening
from shmdomains.holder import this_host

pg_servers.need()
pytestmark = pytest.mark.usefixtures("nothing_left")

SAMPLES = Path(__file__).parent / "data" / "domains"


@pytest.fixture(scope="module")
def server() -> Iterator[pg_servers.Server]:
    with pg_servers.Server() as server:
        yield server


@pytest.fixture
def url(server: pg_servers.Server, request: pytest.FixtureRequest) -> Iterator[str]:
    url = server.url(request.node.name, by="socket")
    yield url
    with suppress(SegmentNotFound):
        opening.unlink(url)


@pytest.fixture
def named(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The list that commands take, with ``web1``."""
    monkeypatch.setenv("SHMDOMAINS_SEGMENT", url)
    invoke("define", "-", input=xml("web1", WEB1))
    return url


def test_a_list_from_its_creation_to_its_end(url: str, server: pg_servers.Server) -> None:
    [created] = out("create", url)
    assert re.fullmatch(r"List 'postgresql://shmdomains@/shmdomains\?list=[^']+' created", created)
    assert server.password not in created
    assert failure("create", url).endswith("exists already")
    assert out("-s", url, "list", "--all", "--name") == []
    assert out("unlink", url) == [created.replace("created", "removed")]
    said = failure("-s", url, "list")
    assert said.startswith("there is no list ") and server.password not in said


def test_one_domain(named: str) -> None:
    assert out("domuuid", "web1") == [WEB1] and out("domstate", "web1") == ["shut off"]
    with opening.attach(named) as doms, doms.get("web1") as dom:
        id = dom.activate(4711, host="there.example")
    assert out("list") == [
        " Id   Name   State     Host",
        "-" * 38,
        f" {id}    web1   running   there.example",
    ]
    assert out("list", "--host", this_host()) == out("list", "--host", "nowhere")
    assert read_json("dominfo", "web1")["host"] == "there.example"
    assert out("wait", "web1", "--state", "running") == ["running"]
    assert "<name>web1</name>" in "".join(out("dumpxml", "web1"))
    assert out("undefine", "web1") == ["Domain 'web1' has been undefined"]  # it is transient now
    said = out("events", "--since", 0, "--loop", "--timeout", 0)
    assert "event 'lifecycle' for domain 'web1': Started Booted" in said


def test_rename_and_autostart(named: str) -> None:
    out("rename", "web1", "web2")
    out("autostart", "web2")
    assert read_json("list", "--all")[0]["name"] == "web2"
    assert out("list", "--all", "--autostart", "--name") == ["web2"]


def test_the_whole_list(named: str, config_dir: Path) -> None:
    with opening.attach(named) as doms:
        doms.undefine("web1")
    assert out("load", config_dir)[-1].startswith("4 domains loaded into list 'postgresql://")
    assert out("check")[-1].endswith(": no problem (4 domains)")
    assert read_json("check")["invariants"]["config"] == "ok"
    assert out("recover")[-1].endswith(": 0 repairs")


def test_who_holds_what(named: str) -> None:
    with opening.attach(named) as doms, doms.get("web1"):
        [lock] = read_json("locks")
        said = failure("undefine", "web1", "--timeout", "0.1")
    assert (lock["lock"], lock["domain"]) == ("domain", "web1")
    assert lock["holder"]["host"] == this_host() and this_host() in said


def test_a_list_moves_in_and_out(named: str, segment_dir: Path, tmp_path: Path) -> None:
    with opening.attach(named) as doms, doms.get("web1") as dom:
        dom.activate(7)
        dom.data = {"disks": ["vda"]}
    assert invoke("export", tmp_path / "export").stderr == "1 domain exported\n"
    out("-s", "default", "import", tmp_path / "export", "--max-domains", 10)
    with DomainList.attach() as segment:
        info = segment["web1"]
        assert (info.pid, info.data, info.host) == (7, {"disks": ("vda",)}, this_host())
    out("unlink", named, "--force")
    invoke("-s", "default", "export", tmp_path / "export")
    assert out("import", tmp_path / "export")[0].startswith("1 domain imported into list ")
    with opening.attach(named) as doms:
        assert (doms["web1"].host, doms["web1"].data) == (this_host(), {"disks": ("vda",)})


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_stress(url: str, start: str, server: pg_servers.Server) -> None:
    with opening.create(url):
        done = program(
            *("-s", url, "stress", SAMPLES, "--seconds", "2", "--workers", "3", "--kill"),
            *("--start", start),
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every acknowledged change is there" in done.stdout
    assert server.password not in done.stdout + done.stderr
    assert server.psql("SELECT name FROM shmdomains.lists WHERE name LIKE 'stress-%'") == ""


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    said = failure("-s", f"postgresql://anna:secret@/vms?host={tmp_path}", "list")
    assert str(tmp_path) in said and "secret" not in said


# --- init ---------------------------------------------------------------------------------------


def test_init_for_a_role_that_may_not(server: pg_servers.Server) -> None:
    server.psql(
        "CREATE DATABASE plain OWNER shmdomains; CREATE ROLE worker LOGIN PASSWORD 'secret'"
    )
    owner = server.url("a", by="socket").replace("/shmdomains?", "/plain?")
    worker = owner.replace(f"shmdomains:{server.password}@", "worker:secret@")
    said = failure("create", worker)
    assert "shmdomains postgres init --role worker URL" in said and "secret" not in said
    assert out("postgres", "init", owner, "--role", "worker") == [
        "Schema for lists made in 'postgresql://shmdomains@/plain?list=a', and role 'worker' may "
        "use it"
    ]
    out("-s", worker, "define", "-", input=xml("web1"))
    assert out("-s", worker, "list", "--all", "--name") == ["web1"]
    assert out("-s", owner, "list", "--all", "--name") == ["web1"]
    out("unlink", worker)
    out("postgres", "init", owner)  # once more: nothing to do


def test_init_says_what_the_server_says(server: pg_servers.Server, tmp_path: Path) -> None:
    said = failure("postgres", "init", server.url(by="socket"), "--role", "no such role")
    assert 'role "no such role" does not exist' in said and server.password not in said
    said = failure("postgres", "init", f"postgresql://anna:secret@/vms?host={tmp_path}")
    assert str(tmp_path) in said and "secret" not in said


def test_init_of_an_embedded_server(tmp_path: Path) -> None:
    said = invoke("postgres", "init", f"postgresql+embedded://{tmp_path}", status=2).stderr
    assert "belongs to whoever started it" in said


def test_an_embedded_server_serves_commands(tmp_path: Path) -> None:
    url = f"postgresql+embedded://{tmp_path}/pg?list=blue"
    assert program("create", url).stdout == f"List '{url}' created\n"
    assert program("-s", url, "define", "-", input=xml("web1")).returncode == 0
    done = program("-s", url, "list", "--all", "--name")  # the server ended, and is started again
    assert (done.stdout, done.stderr) == ("web1\n", "")
