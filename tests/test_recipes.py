"""The recipes of the README: each file that it shows is written out and run as it stands."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import environment, xml
from killing import until

from shmdomains import DomainList

pytestmark = pytest.mark.usefixtures("nothing_left")

README = Path(__file__).resolve().parents[1] / "README.md"
PATIENCE = 60


def recipes() -> dict[str, str]:
    """The files in the README's section, by the name in their first line."""
    section = README.read_text().split("\n## Recipes\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return {re.match(r"# ([\w.]+)", block)[1]: block for block in blocks}  # type: ignore[index]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With all of them in it."""
    for name, text in recipes().items():
        (tmp_path / name).write_text(text)
    return tmp_path


@contextmanager
def shared(name: str) -> Iterator[DomainList]:
    """The list that the recipe opens, with a domain in it."""
    with DomainList.create(name, max_domains=16) as doms:
        doms.define(xml("web1"))
        yield doms
        doms.unlink(force=True)


@contextmanager
def program(folder: Path, *arguments: object, keep: int = 0) -> Iterator[subprocess.Popen[str]]:
    """``python -m …`` in the folder; it is asked to end, and has to. What it says is shown by
    pytest if the test fails. `keep`: a descriptor that it gets."""
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=folder, env=environment(), text=True, pass_fds=[keep] if keep else []
    ) as running:
        try:
            yield running
        finally:
            running.send_signal(signal.SIGTERM)
            try:
                running.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                running.kill()
                raise


class Port:
    """On 127.0.0.1, listening before the server is there: nobody has to wait for it."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))

    def ask(self, method: str, path: str) -> str:
        connection = http.client.HTTPConnection(*self.socket.getsockname(), timeout=PATIENCE)
        connection.request(method, path, headers={"Connection": "close"})
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        assert answer.status == 200, body
        return body


@pytest.fixture
def port() -> Iterator[Port]:
    port = Port()
    with port.socket:
        yield port


@contextmanager
def gunicorn(folder: Path, port: Port, *arguments: str) -> Iterator[None]:
    number = port.socket.fileno()
    bind = ["--bind", f"fd://{number}", "--workers", "2"]
    with program(folder, "-m", "gunicorn", *bind, *arguments, "hits:app", keep=number):
        yield


def test_gunicorn(folder: Path, port: Port, segment_dir: Path) -> None:
    (folder / "gunicorn.conf.py").unlink()
    with shared("hits") as doms, gunicorn(folder, port):
        answers = [int(port.ask("GET", "/")) for _ in range(20)]
        assert answers == list(range(1, 21))
        info = doms.peek("web1")
        assert info and info.data == 20


PID_IN_THE_ANSWER = ("str(answer)", "f'{answer} {__import__(\"os\").getpid()}'")


def without_a_name(folder: Path) -> None:
    (folder / "etc").mkdir()
    (folder / "etc" / "web1.xml").write_text(xml("web1"))
    text = (folder / "hits.py").read_text()
    for old, new in (
        ('DomainList.open("hits")', "DomainList(max_domains=16)"),
        ("/etc/libvirt/qemu", str(folder / "etc")),
        PID_IN_THE_ANSWER,
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "hits.py").write_text(text)
    (folder / "gunicorn.conf.py").unlink()


def answers_of_both(port: Port) -> list[tuple[int, str]]:
    """The counts and the workers' numbers, until each worker has answered."""
    found: list[tuple[int, str]] = []

    def more() -> bool:
        count, pid = port.ask("GET", "/").split()
        found.append((int(count), pid))
        return len({pid for _, pid in found}) == 2

    until(more, "answers of two workers")
    return found


def test_gunicorn_preloaded(folder: Path, port: Port) -> None:
    without_a_name(folder)
    with gunicorn(folder, port, "--preload"):
        found = answers_of_both(port)
    assert [count for count, _ in found] == list(range(1, len(found) + 1))


def test_gunicorn_without_a_name(folder: Path, port: Port) -> None:
    """What the README warns of is so: each worker counts for itself."""
    without_a_name(folder)
    with gunicorn(folder, port):
        found = answers_of_both(port)
    for worker in {pid for _, pid in found}:
        counts = [count for count, pid in found if pid == worker]
        assert counts == list(range(1, len(counts) + 1))


def test_one_scheduler_among_the_workers(folder: Path, port: Port, segment_dir: Path) -> None:
    with shared("hits") as doms:
        with doms.get("web1") as dom:
            dom.data = 5
        with gunicorn(folder, port):
            info = doms.wait("web1", until=lambda info: info and info.data == 0, timeout=PATIENCE)
            assert info
            assert [lock.name for lock in doms.locks() if lock.kind == "mutex"] == ["scheduler"]
            assert port.ask("GET", "/") == "1"
        assert doms.locks() == []


def test_fastapi(folder: Path, port: Port, segment_dir: Path) -> None:
    number = port.socket.fileno()
    server = ("-m", "uvicorn", "--workers", 2, "--fd", number, "api:app")
    with shared("api") as doms, program(folder, *server, keep=number):
        counts = [port.ask("POST", "/domains/web1/count") for _ in range(10)]
        assert counts == [str(count) for count in range(1, 11)]
        assert port.ask("GET", "/domains") == '["web1"]'
        info = doms.peek("web1")
        assert info and info.data == 10


@pytest.mark.parametrize(("file", "count"), [("pools.py", 200), ("jobs.py", 100)])
def test_pools(folder: Path, file: str, count: int) -> None:
    done = subprocess.run(
        [sys.executable, file],
        cwd=folder,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert (done.stdout, done.stderr) == (f"{count}\n", "")


def test_celery(folder: Path, segment_dir: Path) -> None:
    (folder / "messages").mkdir()
    (folder / "celeryconfig.py").write_text(
        "broker_url = 'filesystem://'\n"
        "broker_transport_options = dict(data_folder_in='messages', data_folder_out='messages',"
        " control_folder='control')\n"
    )
    worker = ("-m", "celery", "--app", "tasks", "worker", "--concurrency", 2)
    with shared("tasks") as doms, program(folder, *worker):
        send = "import tasks\nfor _ in range(10): tasks.count.delay('web1')"
        subprocess.run(
            [sys.executable, "-c", send],
            cwd=folder,
            env=environment(),
            check=True,
            timeout=PATIENCE,
        )
        assert doms.wait("web1", until=lambda info: info and info.data == 10, timeout=PATIENCE)
