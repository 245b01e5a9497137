"""Work n: from a change to the return of whoever waits for it, one waiter and a thousand.

The value is the time of just before the change, so the change itself is part of what is measured.
Waiters are threads of a few processes. The next change comes when all have returned and had time to
fall asleep again.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shmdomains import DomainList

from . import world
from .children import PATIENCE, Child
from .contestants.base import drop, lacks, memory_folder
from .contestants.redis import Redis

PROCESSES = 4
PAUSE = 0.002  # seconds, and a tenth of that for each waiter: time to fall asleep again
LAST = 1e18  # later than any time: the end
CHANNEL = "changes"


class Way(ABC):
    """A way to wait for a number that another process changes."""

    name: str

    @staticmethod
    def missing() -> str | None:
        return None

    @abstractmethod
    def waiter(self) -> Callable[[float], float]:
        """For one thread: a function that waits until the number is larger than its argument, and
        returns it."""

    @abstractmethod
    def tell(self, value: float) -> None:
        """Change the number."""

    @abstractmethod
    def close(self) -> None: ...


class Ours(Way):
    name = "shmdomains"

    def __init__(self) -> None:
        self.doms = DomainList(max_domains=8)
        self.doms.define(world.template().replace(name="vm", uuid=None))
        self.tell(0)

    def waiter(self) -> Callable[[float], float]:
        def wait(after: float) -> float:
            info = self.doms.wait("vm", until=lambda info: info is None or info.data > after)
            assert info is not None
            value: float = info.data
            return value

        return wait

    def tell(self, value: float) -> None:
        with self.doms.get("vm") as dom:
            dom.data = value

    def close(self) -> None:
        self.doms.close()


class Condition(Way):
    name = "multiprocessing.Condition"

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.changed, self.value = context.Condition(), context.RawValue("d", 0)

    def waiter(self) -> Callable[[float], float]:
        def wait(after: float) -> float:
            with self.changed:
                while self.value.value <= after:
                    self.changed.wait()
                return float(self.value.value)

        return wait

    def tell(self, value: float) -> None:
        with self.changed:
            self.value.value = value
            self.changed.notify_all()

    def close(self) -> None:
        pass


class PubSub(Way):
    """Redis: publish, and a connection a waiter that has subscribed."""

    name = Redis.name
    missing = Redis.missing

    def __init__(self) -> None:
        self.redis = Redis()
        self.redis.fill((), 0)

    def waiter(self) -> Callable[[float], float]:
        import redis

        client = redis.Redis(unix_socket_path=f"{self.redis.folder}/socket")
        messages = client.pubsub(ignore_subscribe_messages=True)
        messages.subscribe(CHANNEL)
        messages.get_message(timeout=PATIENCE)

        def wait(after: float) -> float:
            for message in messages.listen():
                if float(message["data"]) > after:
                    return float(message["data"])
            raise RuntimeError("the server has gone")

        return wait

    def tell(self, value: float) -> None:
        self.redis.client.publish(CHANNEL, repr(value))

    def close(self) -> None:
        self.redis.close()


class Listen(Way):
    """PostgreSQL: NOTIFY, and a session a waiter that listens."""

    name = "PostgreSQL"

    @staticmethod
    def missing() -> str | None:
        if _postgres("initdb") is None:
            return "PostgreSQL is not installed: apt install postgresql"
        return lacks("psycopg", "psycopg")

    def __init__(self) -> None:
        self.folder = memory_folder()
        # It refuses to be root's.
        user: dict[str, Any] = {"user": "nobody"} if os.getuid() == 0 else {}
        if user:
            shutil.chown(self.folder, "nobody")
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        data = f"{self.folder}/data"
        initdb, server = _postgres("initdb"), _postgres("postgres")
        assert initdb is not None and server is not None
        make = [initdb, "-D", data, "-U", "bench", "-A", "trust", "--no-sync"]
        subprocess.run(make, check=True, cwd=self.folder, **user, **quiet)
        place = f"unix_socket_directories={self.folder}"
        settings = ("listen_addresses=", place, "fsync=off", "max_connections=1100")
        options = [word for setting in settings for word in ("-c", setting)]
        self.server = subprocess.Popen(
            [server, "-D", data, *options], cwd=self.folder, **user, **quiet
        )
        self.session: Any = None
        self._connect().close()  # it is there before anybody is forked

    def _connect(self) -> Any:
        import psycopg

        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return psycopg.connect(
                    f"host={self.folder} user=bench dbname=postgres", autocommit=True
                )
            except psycopg.OperationalError:
                if time.monotonic() > deadline or self.server.poll() is not None:
                    raise
                time.sleep(0.01)

    def waiter(self) -> Callable[[float], float]:
        session = self._connect()
        session.execute(f"LISTEN {CHANNEL}")

        def wait(after: float) -> float:
            while True:
                for message in session.notifies(stop_after=1):
                    if float(message.payload) > after:
                        return float(message.payload)

        return wait

    def tell(self, value: float) -> None:
        if self.session is None:  # not one that the waiters inherited
            self.session = self._connect()
        self.session.execute(f"NOTIFY {CHANNEL}, '{value!r}'")

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
        self.server.terminate()
        self.server.wait()
        drop(self.folder)


def _postgres(program: str) -> str | None:
    """The newest one; Debian has them in a folder for each version."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    return str(places[-1]) if places else shutil.which(program)


WAYS: tuple[type[Way], ...] = (Ours, Condition, PubSub, Listen)


def measure(kind: type[Way], waiters: int, wakes: int) -> list[float]:
    """Seconds of each waiter's return, of so many changes."""
    way = kind()
    processes = min(PROCESSES, waiters)
    shares = [waiters // processes + (at < waiters % processes) for at in range(processes)]
    seen = mmap.mmap(-1, 8 * waiters)
    counts = memoryview(seen).cast("Q")
    try:
        crowds = [
            Child(lambda me, at=at: _wait(me, way, counts[sum(shares[:at]) :], shares[at]))  # type: ignore[misc]
            for at in range(processes)
        ]
        for crowd in crowds:
            crowd.wait_ready()
        for number in range(1, wakes + 1):
            time.sleep(PAUSE + waiters * PAUSE / 10)
            way.tell(time.perf_counter())
            deadline = time.monotonic() + PATIENCE
            while min(counts) < number:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{kind.name}: a waiter was not woken")
                time.sleep(PAUSE / 10)
        way.tell(LAST)
        return [seconds for crowd in crowds for seconds in crowd.result()]
    finally:
        way.close()


def _wait(me: Child, way: Way, counts: memoryview, waiters: int) -> list[float]:
    taken: list[float] = []
    listening = threading.Barrier(waiters + 1)

    def stay(at: int) -> None:
        wait, value = way.waiter(), 0.0
        listening.wait(PATIENCE)
        while True:
            value = wait(value)
            now = time.perf_counter()
            if value == LAST:
                return
            taken.append(now - value)
            counts[at] += 1

    threads = [threading.Thread(target=stay, args=(at,)) for at in range(waiters)]
    for thread in threads:
        thread.start()
    listening.wait(PATIENCE)
    me.ready()
    for thread in threads:
        thread.join()
    return taken
