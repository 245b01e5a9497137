"""A network between a client and a PostgreSQL server that fails where a test wants it to.

It knows the boundaries of the protocol (version 3). A *request* is what the server answers as one:
a simple query, or all messages up to a Sync. Its *answer* ends with ReadyForQuery. The messages of
the start of a session count as none. `Proxy.fail` says at which request what happens:

==========  =====================================================================================
where       what happens
==========  =====================================================================================
"before"    the connection is cut, and nothing of the request was passed on
"passed"    it is cut as soon as the request was passed on: nobody knows how far the server is
"answered"  it is cut when the server has answered, and nothing of the answer was passed on
"partial"   the same after the first half of the answer's first message
"stall"     nothing of the request is passed on until `Fault.release`
"mute"      the request is passed on, and nothing of the answer until `Fault.release`
==========  =====================================================================================

`partition` lets nothing through any more, in either direction, and closes nothing: not even the end
of a client reaches the server. `refuse` cuts all connections and those that come. `heal` ends both.

A session that asks for TLS is told that there is none, so the proxy can read it. It runs in threads
of the test: whoever waits for the server and keeps the GIL, as psycopg's ``cancel()`` does, hangs;
``cancel_safe()`` does not.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

from pg_servers import Server

WHERE = ("before", "passed", "answered", "partial", "stall", "mute")
PATIENCE = 60.0

SSL_REQUEST, GSS_REQUEST, CANCEL_REQUEST = 80877103, 80877104, 80877102
ENDS_A_REQUEST = b"QSF"  # Query, Sync, FunctionCall
NO_REQUEST = b"pX"  # a password, Terminate


@dataclass(eq=False)
class Fault:
    """What is to happen at one request."""

    where: str
    number: int
    """Of the request, counted since `Proxy.fail`."""
    words: re.Pattern[bytes]
    reached: threading.Event = field(default_factory=threading.Event)
    """The request came, and all that happens before a release has happened."""
    released: bool = False
    _proxy: Proxy | None = None

    def wait(self, timeout: float = PATIENCE) -> None:
        assert self.reached.wait(timeout), f"no request was there to fail: {self}"

    def release(self) -> None:
        """Let a request or an answer that stalls go on."""
        assert self._proxy is not None
        with self._proxy._changed:
            self.released = True
            self._proxy._changed.notify_all()


class Cut(Exception):
    """The connection is to end."""


class _Stream:
    """The bytes from one side, in messages."""

    def __init__(self, end: socket.socket) -> None:
        self._end, self._read = end, b""

    def take(self, size: int) -> bytes:
        while len(self._read) < size:
            more = self._end.recv(1 << 16)
            if not more:
                raise Cut
            self._read += more
        taken, self._read = self._read[:size], self._read[size:]
        return taken

    def untyped(self) -> bytes:
        head = self.take(4)
        return head + self.take(struct.unpack("!I", head)[0] - 4)

    def message(self) -> bytes:
        head = self.take(5)
        return head + self.take(struct.unpack("!xI", head)[0] - 4)


class _Link:
    """One client's connection and its other half; a thread for each direction."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self.proxy, self.client, self.server = proxy, client, server
        self.is_cut = False
        self._waiting: deque[Fault | None] = deque([None])  # of whose answers: first the session's
        self._left = 2
        for direction in (self._requests, self._answers):
            threading.Thread(target=self._run, args=(direction,), daemon=True).start()

    def cut(self) -> None:
        """The kernel delivers to both what it has of them, then the end."""
        with self.proxy._changed:
            self.is_cut = True
            self.proxy._changed.notify_all()
        for end in (self.client, self.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _run(self, direction: object) -> None:
        with suppress(OSError, Cut):
            direction()  # type: ignore[operator]
        self.proxy._pass(self)  # the end of a connection crosses no partition either
        self.cut()
        with self.proxy._changed:
            self._left -= 1
            if self._left == 0:
                self.client.close()
                self.server.close()
                self.proxy._links.discard(self)
                self.proxy._changed.notify_all()

    def _send(self, end: socket.socket, data: bytes) -> None:
        self.proxy._pass(self)
        if self.is_cut:
            raise Cut
        end.sendall(data)

    def _stall(self, fault: Fault) -> None:
        with self.proxy._changed:
            fault.reached.set()
            self.proxy._changed.wait_for(lambda: fault.released or self.is_cut)

    def _requests(self) -> None:
        stream = _Stream(self.client)
        while True:
            hello = stream.untyped()
            (kind,) = struct.unpack_from("!I", hello, 4)
            if kind not in (SSL_REQUEST, GSS_REQUEST):
                break
            self._send(self.client, b"N")
        self._send(self.server, hello)
        if kind == CANCEL_REQUEST:
            stream.take(1)  # nothing comes but the end
        held: list[bytes] = []
        while True:
            message = stream.message()
            if message[:1] in NO_REQUEST:
                self._send(self.server, message)
                continue
            held.append(message)
            if message[:1] == b"H":  # Flush: the answer comes before the Sync
                for one in held:
                    self._send(self.server, one)
                held = []
            elif message[:1] in ENDS_A_REQUEST:
                self._request(held)
                held = []

    def _request(self, messages: list[bytes]) -> None:
        fault = self.proxy._count(b"".join(messages))
        where = fault.where if fault else ""
        if fault and where == "before":
            self.cut()
            fault.reached.set()
            raise Cut
        if fault and where == "stall":
            self._stall(fault)
        self._waiting.append(fault)
        self._send(self.server, b"".join(messages))
        if fault and where == "passed":
            self.cut()
            fault.reached.set()
            raise Cut

    def _answers(self) -> None:
        stream, is_first = _Stream(self.server), True
        while True:
            message = stream.message()
            fault = self._waiting[0] if self._waiting else None
            where = fault.where if fault else ""
            is_last = message[:1] == b"Z"
            if fault and where == "mute":
                self._stall(fault)
            if where == "partial" and is_first:
                self._send(self.client, message[: len(message) // 2])
            elif where not in ("answered", "partial"):
                self._send(self.client, message)
            is_first = is_last
            if is_last:
                if fault and where in ("answered", "partial"):
                    self.cut()
                    fault.reached.set()
                    raise Cut
                if self._waiting:
                    self._waiting.popleft()


class Proxy:
    """Listens on a port of 127.0.0.1 and passes on to `server`, wherever that listens by then."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.requests = 0
        """How many came until now."""
        self._faults: list[Fault] = []
        self._links: set[_Link] = set()
        self._changed = threading.Condition()
        self._is_parted = self._refuses = self._is_closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def fail(self, where: str, number: int = 1, words: str | re.Pattern[bytes] = "") -> Fault:
        """At the `number`-th request from now that has these words in it, on any connection."""
        assert where in WHERE, where
        wanted = re.compile(re.escape(words.encode())) if isinstance(words, str) else words
        fault = Fault(where, number, wanted, _proxy=self)
        with self._changed:
            self._faults.append(fault)
        return fault

    def partition(self) -> None:
        """Nothing passes until `heal`; nobody is told."""
        with self._changed:
            self._is_parted = True

    def refuse(self) -> None:
        """Cut all connections, and each new one, until `heal`."""
        with self._changed:
            self._refuses = True
        self.cut()

    def forget(self, fault: Fault) -> bool:
        """It is not to happen any more; False if its request has come."""
        with self._changed:
            if fault in self._faults:
                self._faults.remove(fault)
                return True
        return False

    def heal(self) -> None:
        """What was held back by `partition` goes on its way, as TCP does it."""
        with self._changed:
            self._is_parted = self._refuses = False
            self._changed.notify_all()

    def cut(self) -> None:
        """Cut the connections that are there."""
        with self._changed:
            links = list(self._links)
        for link in links:
            link.cut()

    def url(self, list: str | None = None, **more: object) -> str:
        """As `Server.url`, through here."""
        query = {**({} if list is None else {"list": list}), **more}
        words = f"?{urlencode(query, quote_via=quote)}" if query else ""
        place = f"127.0.0.1:{self.port}"
        return f"postgresql://shmdomains:{self.server.password}@{place}/shmdomains{words}"

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(PATIENCE)
        self._listener.close()
        self.cut()
        with self._changed:
            assert self._changed.wait_for(lambda: not self._links, PATIENCE), "a thread is left"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._refuses:
                    raise ConnectionRefusedError
                server = socket.create_connection(("127.0.0.1", self.server.port))
            except OSError:
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._changed:
                self._links.add(_Link(self, client, server))

    def _pass(self, link: _Link) -> None:
        """Wait while there is a partition."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_parted or self._is_closed or link.is_cut)

    def _count(self, request: bytes) -> Fault | None:
        with self._changed:
            self.requests += 1
            for fault in [one for one in self._faults if one.words.search(request)]:
                fault.number -= 1
                if fault.number == 0:
                    self._faults.remove(fault)
                    return fault
        return None
