"""What ``shmdomains metrics`` serves: a list's metrics, over HTTP.

The list is found again if it was removed and made anew, or if its server was away: an exporter runs
for months. While it cannot be read, a scrape succeeds and says ``libvirt_up 0``.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..errors import ShmDomainsError
from ..memory.domain_list import DomainList
from ..opening import AnyDomainList
from . import families as f
from .collector import DomainCollector
from .families import one, written

PATH = "/metrics"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PATIENCE = 30.0
"""Seconds in which a client has to say what it wants."""
_PAGE = b'<html><title>shmdomains</title><a href="/metrics">metrics</a></html>\n'


class Scrapes:
    """The metrics of a list, and of this process, at any time."""

    def __init__(self, attach: Callable[[], AnyDomainList]) -> None:
        """Raises what `attach` does, and `ImportError` if `prometheus_client` is not there."""
        self._attach = attach
        self._doms = attach()
        try:
            self._collector = DomainCollector(self._doms)
        except ImportError:
            self._doms.close()
            raise
        from prometheus_client import CollectorRegistry, ProcessCollector

        self._own = CollectorRegistry()
        ProcessCollector(registry=self._own)
        self._lock = threading.Lock()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        from prometheus_client import generate_latest

        with self._lock:
            try:
                if self._collector.up is False or _is_replaced(self._doms):
                    self.close()
                    self._doms = self._attach()
                    self._collector = DomainCollector(self._doms)
                found = self._collector.exposition()
            except (ShmDomainsError, OSError):
                found = written([(f.UP, one(0))])
        return found + generate_latest(self._own)

    def close(self) -> None:
        """Leave the list."""
        with suppress(ShmDomainsError, OSError):
            self._doms.close()


def _is_replaced(doms: AnyDomainList) -> bool:
    """Whether the list was closed, or a segment's name is gone or another segment's."""
    if doms.closed:
        return True
    if not isinstance(doms, DomainList):
        return False
    path = doms.info.path
    if path is None:
        return False
    try:
        there, ours = os.stat(path), os.fstat(doms.fileno())
    except FileNotFoundError:
        return True
    return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)


class Server(ThreadingHTTPServer):
    """Serves `Scrapes` until it is interrupted."""

    daemon_threads = True

    def __init__(self, address: str, port: int, scrapes: Scrapes) -> None:
        """Raises `OSError` if it cannot listen there."""
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, *_, place = found[0]
        self.scrapes = scrapes
        super().__init__(place[:2], _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Without looking the own name up, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    @property
    def url(self) -> str:
        """Where it serves."""
        host, port = self.server_address[:2]
        shown = f"[{host!s}]" if self.address_family is socket.AF_INET6 else host
        return f"http://{shown!s}:{port}{PATH}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _PATIENCE

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == PATH:
            self._send(self.server.scrapes.text(), CONTENT_TYPE)
        elif path == "/":
            self._send(_PAGE, "text/html; charset=utf-8")
        else:
            self.send_error(404)

    def _send(self, body: bytes, kind: str) -> None:
        with suppress(ConnectionError):  # it did not wait for the answer
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is nothing to tell of."""
