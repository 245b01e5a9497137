"""What is under way in a domain: a rule's step, a user's intention, jobs.

`Work` is one value of the record, beside the definition and the driver's data, and changes with
commits only. So what a worker was doing is there exactly as long as it is true: its last commit
says it, and no death can leave half of it.
"""

from __future__ import annotations

import msgspec

from ..packing import pack


class Caller(msgspec.Struct, frozen=True, array_like=True):
    """A thread that may outlive nobody's memory of it: numbers are reused, so `start` tells it from
    later ones. In clock ticks since boot; 0: not known."""

    pid: int
    tid: int
    start: int


class Step(msgspec.Struct, frozen=True, array_like=True):
    """What a rule has begun with the record and the files of these directories (`steps`)."""

    rule: str
    config_dir: bytes
    autostart_dir: bytes | None
    names: tuple[str, ...]
    """The names whose files it may have changed."""
    defines: bool
    """Whether the domain becomes persistent once its file is there."""


class Intended(msgspec.Struct, frozen=True, array_like=True):
    """What a user said it was going to do (`Domain.intend`)."""

    name: str
    data: bytes
    """MessagePack."""
    caller: Caller
    since: float
    """Seconds since the epoch."""


class Work(msgspec.Struct, frozen=True, array_like=True):
    """All that is under way in one domain."""

    step: Step | None = None
    intended: Intended | None = None

    def encode(self) -> bytes:
        """As MessagePack."""
        return pack(self)

    @classmethod
    def decode(cls, blob: bytes) -> Work:
        """What `encode` made. Raises `ValueError` for anything else.

        >>> Work.decode(Work().encode())
        Work(step=None, intended=None)
        """
        return msgspec.msgpack.decode(blob, type=cls)
