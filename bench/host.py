"""A process for each contestant, so that none shares a heap, a cache or a crash with others.

The host owns a contestant that it fills, and does what it is told through a pipe. All hosts wait
while one works, so that whoever measures can go round: contestants are interleaved.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import msgpack

from . import parties, world
from .contestants import Contestant, NotOfferedError
from .work import Works


class FailedError(Exception):
    """What a contestant raised, with its traceback."""


class Host:
    """Start it, `call` it, `close` it."""

    def __init__(self, contestant: type[Contestant], domains: int, patience: float = 600) -> None:
        self.contestant, self.domains, self._patience = contestant, domains, patience
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_serve, args=(theirs, contestant, domains))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def call(self, function: str, *arguments: Any) -> Any:
        """Raises `NotOfferedError`, `FailedError`, `TimeoutError`."""
        self._pipe.send((function, arguments))
        return self.answer()

    def answer(self) -> Any:
        if not self._pipe.poll(self._patience):
            raise TimeoutError(f"{self.contestant.name} did not answer")
        try:
            error, value = self._pipe.recv()
        except EOFError:
            raise FailedError(f"{self.contestant.name} has died") from None
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        try:
            self._pipe.send(None)
            self._process.join(20)
        except OSError:
            pass
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


class _Filled:
    """What a host can be told."""

    def __init__(self, contestant: type[Contestant]) -> None:
        self.contestant = contestant()

    def fill(self, domains: int) -> None:
        keys = world.uuids(domains)
        gc.freeze()
        before = parties.resident_bytes()
        self.contestant.fill(world.domains(keys), domains)
        gc.collect()
        grown = parties.resident_bytes() - before
        footprint = self.contestant.footprint()
        self.bytes = grown if footprint is None else footprint
        gc.freeze()  # what is there stays; collections need not look at it
        self.works = Works(self.contestant, keys)

    def footprint(self) -> int:
        return self.bytes

    def measure(self, *arguments: Any) -> Any:
        return self.works.measure(*arguments)

    def ask(self, operation: str, *arguments: Any) -> Any:
        """One of the contestant's own operations."""
        return getattr(self.contestant, operation)(*arguments)

    def data(self, uuid: bytes) -> bytes:
        """As MessagePack: a read-only view does not go through a pipe."""
        packed: bytes = msgpack.packb(self.contestant.read_data([uuid]), default=dict)
        return packed

    def create(self) -> float:
        """Seconds to make an empty list with as much room."""
        begin = time.perf_counter()
        empty = type(self.contestant)()
        empty.fill(iter(()), len(self.works.keys))
        took = time.perf_counter() - begin
        empty.close()
        return took

    def __getattr__(self, name: str) -> Any:
        function = getattr(parties, name)
        return lambda *arguments: function(self.works, *arguments)


def _serve(pipe: Connection, contestant: type[Contestant], domains: int) -> None:
    filled = _Filled(contestant)
    try:
        filled.fill(domains)
        pipe.send((None, "filled"))
        while (told := pipe.recv()) is not None:
            function, arguments = told
            try:
                pipe.send((None, getattr(filled, function)(*arguments)))
            except NotOfferedError as error:
                pipe.send((error, None))
            except Exception:
                pipe.send((FailedError(traceback.format_exc()), None))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception:
        pipe.send((FailedError(traceback.format_exc()), None))
    finally:
        with suppress(Exception):  # it may not have come far
            filled.contestant.close()
        os._exit(0)
