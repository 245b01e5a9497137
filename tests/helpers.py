"""Other parties for the tests: threads, children of every start method, strangers.

A `Party` is somebody else who does what a test tells it: code goes to it through a socket, the
value of the last expression (or the exception) comes back. Every answer has a deadline, so a hang
is a failure and not a stuck test run; nothing here sleeps to synchronise.

Forking is done in a `Home`: a process of its own that never had a thread or a lock before, since
pytest may have both. This file is also that process's program (``python helpers.py ADDRESS``), and
a stranger's, who has nothing in common with anybody but the name of a segment.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import CodeType
from typing import Any
from xml.sax.saxutils import escape

import pg_servers
from dict_store import DictDomainList
from task_party import begin_task, serve_as_task

import shmdomains
from shmdomains import DomainDef, DomainList

DEADLINE = 20.0
"""Seconds after which a missing answer is a failure. Far beyond what a loaded machine needs."""

A_MOMENT = 0.05
"""Seconds for which somebody who ought to wait must not answer: only ever too kind, never flaky."""

SOAK = os.environ.get("SHMDOMAINS_SOAK") == "1"
"""``make soak``: what is marked ``soak`` takes its larger sizes."""

_PATHS = [str(Path(shmdomains.__file__).parent.parent), str(Path(__file__).parent)]


def environment(**more: str) -> dict[str, str]:
    """The environment of a fresh interpreter that imports the package and this file from here."""
    paths = os.pathsep.join([*_PATHS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": paths, **more}


# --- definitions -------------------------------------------------------------------------------


def xml(
    name: str = "web1",
    uuid: Any = None,
    *,
    memory: int = 1024,
    vcpus: int = 1,
    title: str | None = None,
    description: str | None = None,
    type: str = "kvm",
    extra: str = "",
) -> str:
    """Domain XML; `memory` in KiB, `extra` is put in as it is."""
    lines = [f"<domain type='{type}'>", f"  <name>{escape(name)}</name>"]
    if uuid is not None:
        lines.append(f"  <uuid>{uuid}</uuid>")
    if title is not None:
        lines.append(f"  <title>{escape(title)}</title>")
    if description is not None:
        lines.append(f"  <description>{escape(description)}</description>")
    lines += [
        f"  <memory unit='KiB'>{memory}</memory>",
        f"  <vcpu>{vcpus}</vcpu>",
        "  <os><type>hvm</type></os>",
        extra,
        "</domain>",
    ]
    return "\n".join(lines) + "\n"


def definition(name: str = "web1", uuid: Any = None, **more: Any) -> DomainDef:
    return DomainDef.from_xml(xml(name, uuid, **more))


# --- the store under test ----------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """A place where domains live, as the conformance tests see it.

    `create` is an expression for a new, empty list, in which `room` is the number of domains,
    `size` the bytes or ``None``, `context` the multiprocessing context of the parties to come.
    `publish` is one for a list with the name `name`, and `attach` what a stranger does with that
    name; both ``None`` if strangers may not write. `processes` is false for a store that threads of
    one process share and nobody else, so that nobody can be killed in it.
    """

    name: str
    create: str
    publish: str | None
    attach: str | None
    processes: bool = True
    tasks: bool = True

    def make(self, *, room: int = 64, size: int | None = None, context: Any = None) -> Any:
        names = {**stores(), "room": room, "size": size, "context": context}
        return eval(self.create, names)

    @property
    def starts(self) -> list[str]:
        if not self.processes:
            return ["thread"]
        ways = ["fork", "spawn", "forkserver", "thread"]
        if self.tasks:
            ways.append("task")
        return ways if self.publish is None else [*ways, "stranger"]


STORES = [
    Store(
        "robust",
        create="DomainList(max_domains=room, max_bytes=size)",
        publish="DomainList.create(name, max_domains=room, max_bytes=size)",
        attach="DomainList.attach(name)",
    ),
    Store(
        "multiprocessing",
        create=(
            "DomainList(max_domains=room, max_bytes=size, lock='multiprocessing', context=context)"
        ),
        publish=None,
        attach=None,
    ),
]
"""What has every property that is promised; most tests run on each."""

DICT = Store("dict", "DictDomainList(room)", None, None, processes=False)
POSTGRES = Store(
    "postgres",
    create="PostgresDomainList.create(list_url())",
    publish="PostgresDomainList.create(list_url(name))",
    attach="PostgresDomainList.attach(list_url(name))",
)
EVERY_STORE = [*STORES, *([POSTGRES] if pg_servers.missing() is None else []), DICT]
"""With others, behind the same rules: for the tests of the rules and of their seam."""

_lists = itertools.count()


def begin_server() -> None:
    """Begin the server of this session of tests; conftest.py says how."""
    raise NotImplementedError


def list_url(name: str | None = None) -> str:
    """A list on the server of this session of tests; a new one, unless it has a name."""
    name = name or f"{os.getpid()}-{next(_lists)}"
    if "SHMDOMAINS_TEST_SERVER" not in os.environ:
        begin_server()
    return f"{os.environ['SHMDOMAINS_TEST_SERVER']}&list={name}"


def stores() -> dict[str, Any]:
    """What the expressions of a `Store` name."""
    names: dict[str, Any] = {"DomainList": DomainList, "DictDomainList": DictDomainList}
    if pg_servers.missing() is None:
        from shmdomains.postgres import PostgresDomainList

        names |= {"PostgresDomainList": PostgresDomainList, "list_url": list_url}
    return names


def with_events(doms: Any, events: int) -> Any:
    """Another list of this kind, which keeps so many events."""
    if hasattr(doms, "host"):
        return type(doms).create(list_url(), events=events)
    return type(doms)(events=events)


FEW_MUTEXES = "if hasattr(doms, 'host'): doms._store.most_mutexes = 64"
"""On PostgreSQL a list may have more than those."""


def problems(doms: Any, request: Any) -> list[tuple[str, str]]:
    """What `check` finds at the end of a test, but for what a test marked ``differs`` wants."""
    wanted = request.node.get_closest_marker("differs") is not None
    return [one for one in doms.check().problems if not (wanted and one[0] == "config")]


# --- the party's side --------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _compiled(source: str) -> tuple[CodeType, CodeType | None]:
    tree = ast.parse(textwrap.dedent(source))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = compile(tree, "<party>", "exec")
    value = None if last is None else compile(ast.Expression(last.value), "<party>", "eval")
    return body, value


def _run(source: str, names: dict[str, Any]) -> Any:
    body, value = _compiled(source)
    exec(body, names)
    return None if value is None else eval(value, names)


def _vocabulary() -> dict[str, Any]:
    names: dict[str, Any] = {"xml": xml, "definition": definition, "begin": begin, "reap": reap}
    names |= stores()
    exec(
        "import gc, multiprocessing, os, pickle, signal, sys, threading, time, uuid\n"
        "from uuid import UUID\n"
        "import shmdomains\n"
        "from shmdomains import *",
        names,
    )
    return names


def serve(conn: Connection, given: dict[str, Any]) -> None:
    """Do what comes through the socket until it ends."""
    names = {**_vocabulary(), **given}
    conn.send((os.getpid(), threading.get_native_id()))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (source := conn.recv()) is not None:
            try:
                if source == "forget":
                    names = _vocabulary()
                    reply = ("value", None)
                else:
                    reply = ("value", _run(source, names))
            except BaseException as exc:
                reply = ("raised", exc.with_traceback(None))
            _send(conn, reply)
            del reply
    names.clear()
    conn.close()


def _send(conn: Connection, reply: tuple[str, Any]) -> None:
    try:
        conn.send(reply)
    except (TypeError, AttributeError) as exc:
        conn.send(("raised", TypeError(f"{reply[1]!r} cannot be sent: {exc}")))


def party_main(address: str, given: dict[str, Any]) -> None:
    """The whole life of a party that was begun in a child or a thread."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address)
        conn = Connection(sock.detach())
    serve(conn, given)


_children: list[Any] = []


def task_main(address: str, given: dict[str, Any]) -> Coroutine[Any, Any, None]:
    """The whole life of a party that is a task."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address)
        conn = Connection(sock.detach())
    return serve_as_task(conn, {**_vocabulary(), **given}, _send)


def begin(start: str, address: str, given: dict[str, Any]) -> None:
    """Begin a party in a task, thread or child of this process; runs in the home."""
    if start == "task":
        begin_task(partial(task_main, address, given))
        return
    if start == "thread":
        threading.Thread(target=party_main, args=(address, given), daemon=True).start()
        return
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(["helpers"])
    child = context.Process(target=party_main, args=(address, given))
    child.start()
    _children.append(child)


def reap(deadline: float = DEADLINE) -> list[int | None]:
    """Wait for the children that were begun here; the exit codes, ``None`` for one that stayed."""
    codes = []
    while _children:
        child = _children.pop()
        child.join(deadline)
        codes.append(child.exitcode)
        if child.exitcode is None:
            child.kill()
            child.join()
    return codes


# --- the test's side ---------------------------------------------------------------------------


class Stuck(AssertionError):
    """A party did not answer before the deadline."""


class Party:
    """The test's end of the socket to somebody else."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        self._asked = "its arrival"
        if not conn.poll(DEADLINE):
            raise Stuck("a party never arrived")
        self.pid, self.tid = conn.recv()

    def start(self, source: str) -> None:
        """Tell it something without waiting for the answer."""
        self._asked = source
        self.conn.send(source)

    def is_waiting(self) -> bool:
        """Whether it has not answered after a moment."""
        return not self.conn.poll(A_MOMENT)

    def answer(self, deadline: float = DEADLINE) -> Any:
        """The value, or the exception, of what it was told."""
        if not self.conn.poll(deadline):
            raise Stuck(f"no answer within {deadline} s to: {self._asked}")
        how, value = self.conn.recv()
        if how == "raised":
            raise value
        return value

    def tell(self, source: str) -> Any:
        self.start(source)
        return self.answer()

    def do(self, source: str) -> None:
        """`tell` for what has no value that may come back: a list that another user got hold of
        would be attached to once more here, by us, and be refused here."""
        self.tell(f"{source}\nNone")

    def leave(self) -> None:
        """End it in order; whatever happens, the socket is closed."""
        try:
            with contextlib.suppress(OSError):
                self.conn.send(None)
                while self.conn.poll(DEADLINE):
                    self.conn.recv()  # late answers, then the end
                else:
                    raise Stuck(f"a party did not leave; it was told: {self._asked}")
        except EOFError:
            pass
        finally:
            self.conn.close()


_addresses = itertools.count()


@contextlib.contextmanager
def door() -> Iterator[tuple[str, socket.socket]]:
    """An address at which one party will knock. Abstract: no file is left of it."""
    address = f"\0shmdomains-test-{os.getpid()}-{next(_addresses)}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        listener.settimeout(DEADLINE)
        yield address, listener


def admit(listener: socket.socket) -> Party:
    try:
        sock, _ = listener.accept()
    except TimeoutError:
        raise Stuck("a party never arrived") from None
    sock.settimeout(None)
    return Party(Connection(sock.detach()))


class Process:
    """A fresh interpreter with nothing in it but this file's program.

    `more` is put into its environment, `options` are Popen's.
    """

    def __init__(self, *, options: dict[str, Any] | None = None, **more: str) -> None:
        with door() as (address, listener):
            self.process = subprocess.Popen(
                [sys.executable, __file__, address[1:]],
                env=environment(**more),
                start_new_session=True,  # so that all that it began can be ended with it
                **(options or {}),
            )
            try:
                self.party = admit(listener)
            except BaseException:
                self.kill()
                raise

    @property
    def is_well(self) -> bool:
        """Whether it runs and has nothing to say that nobody asked for."""
        return self.process.poll() is None and not wait([self.party.conn], 0)

    def end(self) -> None:
        try:
            self.party.leave()
            self.process.wait(DEADLINE)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill it and all that it began, which share its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Home(Process):
    """A clean process to fork from."""

    def begin(self, start: str, by: Party | None = None, **given: str) -> Party:
        """Begin a party; `given`: the names it gets, and what they are in the home, or to the party
        that begins it."""
        items = ", ".join(f"{name!r}: ({source})" for name, source in given.items())
        with door() as (address, listener):
            (by or self.party).tell(f"begin({start!r}, {address!r}, {{{items}}})")
            return admit(listener)


@contextlib.contextmanager
def thread_party(**given: Any) -> Iterator[Party]:
    """A party in another thread of this process."""
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=(theirs, given), daemon=True)
    thread.start()
    party = Party(ours)
    try:
        yield party
    finally:
        party.leave()
        thread.join(DEADLINE)
        assert not thread.is_alive()


if __name__ == "__main__":
    # Under its own name: what it pickles is looked up there by children and by the test.
    import helpers

    helpers.party_main("\0" + sys.argv[1], {})
