"""A real PgBouncer in front of the server: one that gives each transaction another session is
refused, one that gives each client its own is used."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pg_servers
import pytest
from helpers import xml
from killing import until

pg_servers.need()

from shmdomains import SegmentRefused  # noqa: E402
from shmdomains.postgres import PostgresDomainList, embedded  # noqa: E402

PROGRAM = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"


@pytest.fixture(autouse=True)
def installed() -> None:
    if not os.access(PROGRAM, os.X_OK):
        pytest.skip("pgbouncer is not installed: apt install pgbouncer")


@contextmanager
def pooled(server: pg_servers.Server, mode: str) -> Iterator[str]:
    """The URL of a list that is reached through PgBouncer."""
    folder = Path(tempfile.mkdtemp(prefix=f"shmdomains-test-{os.getpid()}-"))
    os.chown(folder, embedded.server_user(), -1)
    port = pg_servers.free_port()
    (folder / "users").write_text(f'"shmdomains" "{server.password}"\n')
    (folder / "ini").write_text(
        "[databases]\n"
        f"shmdomains = host=127.0.0.1 port={server.port} user=shmdomains "
        f"password={server.password}\n"
        "[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = plain\nauth_file = {folder}/users\npool_mode = {mode}\n"
        "ignore_startup_parameters = extra_float_digits\n"
    )
    pooler = subprocess.Popen(
        embedded.as_server_user(PROGRAM, str(folder / "ini")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        until(lambda: _answers(port) or pooler.poll() is not None, "PgBouncer, or its end")
        assert pooler.poll() is None, pooler.stderr and pooler.stderr.read()
        yield f"postgresql://shmdomains:{server.password}@127.0.0.1:{port}/shmdomains?list={mode}"
    finally:
        with suppress(ProcessLookupError):
            pooler.send_signal(signal.SIGINT)
        pooler.wait(pg_servers.PATIENCE)
        if pooler.stderr:
            pooler.stderr.close()
        shutil.rmtree(folder)


def _answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_sessions_that_are_shared_by_transactions_are_refused(
    pg_server: pg_servers.Server,
) -> None:
    with (
        pooled(pg_server, "transaction") as url,
        pytest.raises(SegmentRefused, match=r"pooler .* in transaction mode"),
    ):
        PostgresDomainList.open(url)


def test_sessions_of_one_client_are_used(pg_server: pg_servers.Server) -> None:
    with pooled(pg_server, "session") as url, PostgresDomainList.open(url) as doms:
        doms.define(xml("web1"))
        with doms.get("web1") as dom:
            dom.data = 1
            [lock] = doms.locks()
            assert lock.name == "web1" and lock.holder is not None
        info = doms.peek("web1")
        assert info is not None and info.data == 1
        doms.unlink()
