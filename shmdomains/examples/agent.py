"""A control plane for the virtual machines of one host: gunicorn's workers, and one list.

    python -m shmdomains.examples.agent --driver qemu --bind 127.0.0.1:8080 --workers 4

    GET    /domains                  all domains
    POST   /domains                  define the one of the XML in the body; again: redefine it
    GET    /domains/NAME             one of them; a UUID will do
    DELETE /domains/NAME             undefine it
    POST   /domains/NAME/OPERATION   start, shutdown, reboot, reset, destroy, suspend, resume
    GET    /events                   what happens, as server-sent events

Any worker may be killed at any time: guests go on, what was answered with 2xx stays, and what the
dead one was at is finished or undone by whoever works on the domain next. Needs the extra
``agent``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import shmdomains
from shmdomains import ShmDomainsError
from shmdomains.drivers import Driver, TestDriver

try:
    from gunicorn.app.base import BaseApplication
except ImportError:
    sys.exit("agent: gunicorn is missing: pip install 'shmdomains[agent]'")

OPERATIONS = ("start", "shutdown", "reboot", "reset", "destroy", "suspend", "resume")
STATUS: dict[type[ShmDomainsError], str] = {
    shmdomains.DomainNotFound: "404 Not Found",
    shmdomains.DefinitionError: "400 Bad Request",
    shmdomains.DomainExists: "409 Conflict",
    shmdomains.DomainStateError: "409 Conflict",
    shmdomains.LockTimeout: "503 Service Unavailable",  # another one's job takes its time
    shmdomains.DriverError: "502 Bad Gateway",
}
LONGEST_BODY = 1 << 20
QUIET = 1.0  # seconds without an event after which a stream looks whether it is to end

Start = Callable[[str, list[tuple[str, str]]], object]


class Agent:
    """The WSGI application of one worker, which ends when `ends` says so."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.ends: Callable[[], bool] = lambda: False

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"].strip("/").split("/")
        if (method, path) == ("GET", ["events"]):
            start("200 OK", [("Content-Type", "text/event-stream")])
            return self.events(environ.get("HTTP_LAST_EVENT_ID", ""))
        try:
            status, answer = self.answer(method, path, environ)
        except ShmDomainsError as error:
            fitting = (STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
            status = next(fitting, "500 Internal Server Error")
            answer = {"error": type(error).__name__, "message": str(error)}
        start(status, [("Content-Type", "application/json")])
        return [json.dumps(answer).encode() + b"\n"]

    def answer(self, method: str, path: list[str], environ: dict[str, Any]) -> tuple[str, Any]:
        match method, path:
            case "GET", ["domains"]:
                return "200 OK", [info.to_dict() for info in self.driver.list()]
            case "POST", ["domains"]:
                length = int(environ.get("CONTENT_LENGTH") or 0)
                if length > LONGEST_BODY:
                    return "413 Content Too Large", {"error": "TooLarge", "message": f"{length}"}
                info = self.driver.define(environ["wsgi.input"].read(length))
                return "201 Created", info.to_dict()
            case "GET", ["domains", key]:
                return "200 OK", self.driver.get(key).to_dict()
            case "DELETE", ["domains", key]:
                self.driver.undefine(key)
                return "200 OK", {}
            case "POST", ["domains", key, operation] if operation in OPERATIONS:
                return "200 OK", getattr(self.driver, operation)(key).to_dict()
        message = f"there is no {method} /{'/'.join(path)}"
        return "404 Not Found", {"error": "NotFound", "message": message}

    def events(self, last: str) -> Iterator[bytes]:
        """From now on, or on from the last event that the client has seen, of whichever worker."""
        doms = self.driver.doms
        since = int(last) if last.isdigit() else None
        try:
            watch = doms.watch(since, timeout=QUIET)
        except ValueError:  # of the list that was here before the host was started again
            watch = doms.watch(0, timeout=QUIET)
        while not self.ends():
            yield b":\n\n"  # a comment: one who has gone is noticed
            for event in watch:
                yield f"id: {event.number}\ndata: {json.dumps(event.to_dict())}\n\n".encode()
                if self.ends():
                    break


class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn. The list is made before the workers are, and is theirs by the fork."""

    def __init__(self, driver: Driver, bind: str, workers: int) -> None:
        self.driver = driver
        self.settings = {
            "bind": bind,
            "workers": workers,
            "worker_class": "gthread",
            "threads": 32,  # each stream of events takes one
            "post_worker_init": self.begin,
        }
        super().__init__()

    def load_config(self) -> None:
        for name, value in self.settings.items():
            self.cfg.set(name, value)

    def load(self) -> Agent:
        return Agent(self.driver)

    def begin(self, worker: Any) -> None:
        worker.wsgi.ends = lambda: not worker.alive
        # One of the workers watches the guests.
        worker.supervision = self.driver.supervise()


def driver_of(said: argparse.Namespace) -> Driver:
    """The driver of the list, with everything in it and what is to start with the host started."""
    doms = shmdomains.open(said.list)
    if said.configs:
        doms.load_all_configs(said.configs)  # of a list that was there, domains stay as they are
    driver: Driver = TestDriver(doms)
    if said.driver == "qemu":
        from shmdomains.drivers.qemu import QemuDriver

        driver = QemuDriver(doms, directory=said.directory)
    doms.driver = driver.name  # for `shmdomains -s agent list --all` and the like
    if doms.created:
        driver.autostart_all()
    return driver


def main() -> None:
    parser = argparse.ArgumentParser(prog="shmdomains.examples.agent")
    parser.add_argument("--list", default="shm:agent", help="the list's URL")
    parser.add_argument("--configs", help="the directory that keeps definitions")
    parser.add_argument("--driver", choices=("test", "qemu"), default="test")
    parser.add_argument("--directory", help="the guests' sockets; without it, one in /run")
    parser.add_argument("--bind", default="127.0.0.1:8080")
    parser.add_argument("--workers", type=int, default=4)
    said = parser.parse_args()
    try:
        driver = driver_of(said)
    except (ShmDomainsError, ImportError, ValueError) as error:
        sys.exit(f"agent: {error}")
    Server(driver, said.bind, said.workers).run()


if __name__ == "__main__":
    main()
