"""A stress run on several hosts whose server is killed: it holds, and its proofs can fail."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import SOAK
from pg_servers import Server, need
from rich.console import Console
from shell import invoke

from shmdomains import InDoubt, LockLost, Unavailable
from shmdomains.stress import cluster, storm
from shmdomains.stress.worker import Worker

need()

SAMPLES = Path(__file__).parent / "data" / "domains"


def run(seconds: float, **options: Any) -> tuple[int, str]:
    """(exit status, all that was printed, in one line)."""
    console = Console(file=io.StringIO(), width=200)
    status = storm.run(SAMPLES, seconds=seconds, console=console, **options)
    assert isinstance(console.file, io.StringIO)
    return status, " ".join(console.file.getvalue().split())


def count(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    assert found, text
    return 1 if found[-1] == "once" else int(found[-1].replace(",", "").removesuffix(" times"))


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("shmdomains-stress-*"))


@pytest.fixture
def lent(pg_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that the storm takes for its own, and does not kill."""

    class Lent:
        url = pg_server.url()
        kills = 0

        def spare(self) -> None: ...
        def choose_end(self) -> None: ...
        def look(self, _context: Any) -> None: ...
        def end(self) -> None: ...

    monkeypatch.setattr(cluster, "Server", Lent)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.soak)])
def test_nothing_is_lost(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "MEAN_LIFE", 0.3)
    before = folders()
    seconds = 60 if SOAK else 3
    status, text = run(seconds, hosts=2, kill=True, kill_server=True, start=start)
    assert status == 0, text
    assert text.count("✓") == 8 and "✗" not in text
    assert count(r"server killed (once|[\d,]+ times):", text) >= 1
    assert count(r"host1 ([\d,]+)", text) > 0 and count(r"host2 ([\d,]+)", text) > 0
    assert count(r"no other: ([\d,]+) changes", text) > 0
    assert folders() == before


def test_a_server_that_forgets_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    from shmdomains.postgres import embedded

    made = cluster.Server.__init__

    def forgetful(self: cluster.Server) -> None:
        made(self)
        with psycopg.connect(embedded.server(self._path), autocommit=True) as conn:
            conn.execute("ALTER ROLE CURRENT_USER SET synchronous_commit = off")

    monkeypatch.setattr(cluster.Server, "__init__", forgetful)
    monkeypatch.setattr(cluster, "MEAN_LIFE", 0.3)
    status, text = run(6, kill_server=True)
    assert status == 1, text
    assert re.search(r"lost: domain .* had \d+ acknowledged|which acknowledged", text), text


@pytest.mark.parametrize("error", [LockLost, Unavailable, InDoubt])
def test_each_error_is_taken_at_its_word(
    error: Callable[[str], Exception], lent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change is there, and its worker is told this."""
    acknowledge = Worker._acknowledge

    def lie(self: Worker, target: int) -> None:
        if self._random.random() < 0.2:
            raise error("planted")
        acknowledge(self, target)

    monkeypatch.setattr(Worker, "_acknowledge", lie)
    status, text = run(1, workers=2, kill_server=True)
    if error is InDoubt:
        assert status == 0, text
        assert count(r"([\d,]+) were in doubt", text) > 0
    else:
        assert status == 1, text
        assert "was told that its change was not applied, and it is there" in text


def test_an_error_that_no_kill_explains_is_a_failure(
    pg_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(self: Worker, target: int) -> None:
        raise LockLost("planted")

    monkeypatch.setattr(Worker, "_acknowledge", lose)
    status, text = run(1, workers=2, hosts=2, url=pg_url)
    assert status == 1 and "LockLost: planted" in text


def test_what_cannot_be(pg_url: str) -> None:
    with pytest.raises(ValueError, match="not killed"):
        run(1, url=pg_url, kill_server=True)
    with pytest.raises(ValueError, match="hosts"):
        run(1, hosts=0)
    for words in (["--kill-server"], ["--hosts", "2", "--lock", "multiprocessing"]):
        where = ["-s", pg_url] if words[0] == "--kill-server" else []
        result = invoke(*where, "stress", SAMPLES, *words, status=2)
        assert "server" in result.stderr
