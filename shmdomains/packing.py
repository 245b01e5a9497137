"""MessagePack by msgspec, for values that may be large.

Promises. `pack` is `msgspec.msgpack.encode` that raises `MemoryError` when memory runs out. The
original (seen in version 0.22) crashes when it cannot grow its result; growing a buffer of ours
does not crash.
"""

from __future__ import annotations

from typing import Any

import msgspec

ENCODER = msgspec.msgpack.Encoder()
"""For whoever has a buffer of his own."""

# Unused buffers: making one takes as long as filling it. There are never more than there were calls
# of `pack` at once, by threads and by signal handlers in the middle of one.
_SPARE: list[bytearray] = []
_KEPT = 1 << 16


def pack(value: Any) -> bytes:
    """Return the value as MessagePack.

    >>> pack([1, None])
    b'\\x92\\x01\\xc0'
    """
    try:
        buffer = _SPARE.pop()
    except IndexError:
        buffer = bytearray(4096)  # most definitions fit; growing takes longer than zeroing
    ENCODER.encode_into(value, buffer)
    packed = bytes(buffer)
    if len(packed) <= _KEPT:
        _SPARE.append(buffer)
    return packed
