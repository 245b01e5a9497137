"""Forked processes that a contestant's own process tells what to do.

They begin when they are told to, so all of them at the same moment, and end by `os._exit`, so that
nothing that was inherited is cleaned up twice.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any

from .contestants import Contestant

PATIENCE = 60  # seconds: a machine has other work, too


class Child:
    """A forked process that reports once, by pickle through a pipe, and then exits."""

    def __init__(self, do: Callable[[Child], Any]) -> None:
        self._results, results = os.pipe()
        self._ready, ready = os.pipe()
        go, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid:
            for end in (results, ready, go):
                os.close(end)
            return
        try:
            os.close(self._go)
            self._tell_ready, self._wait_go = ready, go
            report = (True, do(self))
        except BaseException:
            report = (False, traceback.format_exc())
        try:
            os.write(results, pickle.dumps(report))
        finally:
            os._exit(0)

    def begin(self) -> None:
        """In the child: ready; go on when told to."""
        self.ready()
        os.read(self._wait_go, 1)

    def ready(self) -> None:
        os.write(self._tell_ready, b"r")

    def told_to_stop(self) -> bool:
        """In the child: whether `go` came; does not wait."""
        return bool(select.select([self._wait_go], [], [], 0)[0])

    def wait_ready(self) -> None:
        if not select.select([self._ready], [], [], PATIENCE)[0]:
            self.kill()
            raise RuntimeError("a worker did not begin")
        if os.read(self._ready, 1) != b"r":
            self.result()
            raise RuntimeError("a worker ended before its time")

    def go(self) -> None:
        os.write(self._go, b"g")  # closing it would say nothing: later children inherited it

    def result(self) -> Any:
        parts = []
        while part := os.read(self._results, 1 << 16):
            parts.append(part)
        self.end()
        if not parts:
            raise RuntimeError("a worker has died")
        well, report = pickle.loads(b"".join(parts))
        if not well:
            raise RuntimeError(f"a worker failed: {report}")
        return report

    def result_within(self, seconds: float) -> Any:
        """``None`` if there is none by then; the child is killed."""
        if not select.select([self._results], [], [], seconds)[0]:
            self.kill()
            return None
        return self.result()

    def end(self) -> None:
        os.waitpid(self.pid, 0)
        for end in (self._results, self._ready, self._go):
            os.close(end)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.end()


class Changer:
    """A process that was forked early, has attached, and replaces definitions when it is told to.

    (One that is forked for each change would leave whoever reads next with pages to copy.)
    """

    def __init__(self, contestant: Contestant) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        if os.fork():
            theirs.close()
            return
        try:
            self._pipe.close()
            contestant.attach()
            while True:
                contestant.replace(theirs.recv())
                theirs.send(None)
        finally:
            os._exit(0)

    def replace(self, changes: Any) -> None:
        """Returns when it is done."""
        self._pipe.send(changes)
        if not self._pipe.poll(PATIENCE):
            raise RuntimeError("the other process did not answer")
        self._pipe.recv()
