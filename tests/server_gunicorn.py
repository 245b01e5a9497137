"""gunicorn's configuration in test_servers.py; what differs between its tests stands there."""

from __future__ import annotations

from typing import Any

bind = "127.0.0.1:0"
workers = 3
wsgi_app = "server_wsgi"


def post_worker_init(worker: Any) -> None:
    """From now on it minds its signals: one that is told to end while it boots does not hear it."""
    worker.log.info("Ready")
