"""MessagePack by msgspec, for what may be large.

Promises. `pack` is `msgspec.msgpack.encode`, but a process without memory gets a `MemoryError`: the
original (seen in version 0.22) crashes when it can not grow its result, growing a buffer of ours
does not.
"""

from __future__ import annotations

from typing import Any

import msgspec

_ENCODER = msgspec.msgpack.Encoder()


def pack(value: Any) -> bytes:
    """Return the value as MessagePack.

    >>> pack([1, None])
    b'\\x92\\x01\\xc0'
    """
    buffer = bytearray(4096)  # what most definitions fit into: growing takes longer than zeros
    _ENCODER.encode_into(value, buffer)
    return bytes(buffer)
