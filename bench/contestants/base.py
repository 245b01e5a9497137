"""What is asked of everything that is measured.

Each operation is given many keys and is done for each of them, in a loop of the contestant's own:
so no call of the bench's own stands between two operations. It returns what it read for the last
key, by which tests see that it does what it says.

A contestant lives in a process of its own (`host.py`) that has no threads; the workers, holders and
writers of the works with several processes are forked from it and call `attach` first.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any, ClassVar

import msgpack

from shmdomains import DomainDef

from ..world import Made, plain

Row = tuple[int, str, int]  # id, name, state


class NotOfferedError(Exception):
    """This contestant has nothing that does this; the message says what is missing."""


class Contestant(ABC):
    """See the module. Keys are UUIDs (bytes), names or ids as the parameter says."""

    name: ClassVar[str]
    shared: ClassVar[bool] = True  # between processes
    most: ClassVar[int] = 1_000_000  # domains that are asked of it in a full run
    quick: ClassVar[int] = 1_000  # domains that it is given in a quick run
    first_id: ClassVar[int] = 1
    packages: ClassVar[tuple[str, ...]] = ()  # whose versions belong to the figures

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot take part here, in one plain line, or ``None``."""
        return None

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {package: metadata.version(package) for package in cls.packages}

    def prepare(self, definition: DomainDef) -> Any:
        """A definition in the form that this contestant is given and gives; not timed."""
        return plain(definition)

    def facts(self, definition: Any) -> tuple[str, str]:
        """Name and title out of a definition in that form: by them tests know it again."""
        return definition["name"], definition["title"]

    @abstractmethod
    def fill(self, domains: Iterable[Made], count: int) -> None:
        """Make the list and put these domains into it, all running."""

    def attach(self) -> None:  # noqa: B027 - most have something to do here, some have not
        """Begin in a forked process."""

    @abstractmethod
    def close(self) -> None: ...

    # --- one process -------------------------------------------------------------------------

    @abstractmethod
    def read_state(self, uuids: Sequence[bytes]) -> int:
        """Find, locked where there are locks; read the state; unlock."""

    def read_state_patch(self, uuids: Sequence[bytes]) -> int:
        """The same in the patch's form: list lock, find, drop the list lock."""
        raise NotOfferedError("it has one form only")

    @abstractmethod
    def read_definition(self, names: Sequence[str]) -> Any:
        """Find by name; the whole definition, decoded."""

    @abstractmethod
    def change_state(self, uuids: Sequence[bytes], state: int) -> None: ...

    @abstractmethod
    def replace(self, changes: Sequence[tuple[bytes, Any]]) -> None:
        """Find by UUID, replace the definition; encoding is part of it."""

    @abstractmethod
    def define(self, added: Sequence[tuple[bytes, str, Any]]) -> None:
        """A new domain, inactive."""

    @abstractmethod
    def remove(self, uuids: Sequence[bytes]) -> None: ...

    @abstractmethod
    def by_id(self, ids: Sequence[int]) -> int:
        """Find by id; the state."""

    @abstractmethod
    def miss(self, uuids: Sequence[bytes]) -> None:
        """Look for what is not there."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """Id, name and state of all."""

    def peek(self, uuids: Sequence[bytes]) -> int:
        """The state without waiting for a holder, where that is possible."""
        return self.read_state(uuids)

    # --- the driver's own data: none until it is changed for the first time -------------------

    @abstractmethod
    def read_data(self, uuids: Sequence[bytes]) -> Any:
        """Find, locked where there are locks; the value, decoded; unlock."""

    @abstractmethod
    def change_data(self, uuids: Sequence[bytes], value: Any) -> None:
        """Find, replace the whole value, unlock; encoding is part of it."""

    def increment(self, uuids: Sequence[bytes]) -> None:
        """Find, read the data, write it with one more of ``requests``, unlock: nothing may be
        lost."""
        raise NotOfferedError("nothing keeps two from writing the same count")

    def count(self, uuid: bytes) -> int:
        """The ``requests`` of the data."""
        return int(self.read_data((uuid,))["requests"])

    # --- several processes -------------------------------------------------------------------

    def hold(self, uuid: bytes) -> None:
        """Take the domain's lock, or whatever keeps others from changing it, and keep it."""
        raise NotOfferedError("it has no lock that a process can hold")

    def take(self, uuid: bytes) -> None:
        """Wait for what `hold` takes, for ever if need be, then let go of it."""
        raise NotOfferedError("it has no lock that a process can hold")

    # --- room --------------------------------------------------------------------------------

    def footprint(self) -> int | None:
        """Bytes of memory shared by all, or ``None``: what this process has grown by."""
        return None


# `msgpack.packb` makes an encoder for each value, which takes longer than to encode a small one.
pack_data: Callable[[Any], bytes] = msgpack.Packer().pack
unpack_data: Callable[[Any], Any] = msgpack.unpackb

MEMORY = "/dev/shm"


def memory_folder() -> str:
    """A folder on tmpfs, as for whatever need not survive the host."""
    return tempfile.mkdtemp(prefix="shmdomains-bench-", dir=MEMORY)


def drop(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def lacks(package: str, module: str) -> str | None:
    """One plain line if a package from PyPI is not there."""
    try:
        __import__(module)
    except ImportError as error:
        return f"{package} is not installed ({error}): pip install '.[bench]'"
    return None
