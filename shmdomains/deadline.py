"""One time-out for all waits of a call."""

from __future__ import annotations

import time


def check_timeout(timeout: float | None) -> None:
    """Raise `ValueError` for a negative time-out or NaN.

    >>> check_timeout(-1)
    Traceback (most recent call last):
    ...
    ValueError: timeout is -1; None waits for ever, 0 tries, else seconds
    """
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout is {timeout!r}; None waits for ever, 0 tries, else seconds")


class Deadline:
    """When a call has to be done. `timeout` in seconds: ``None`` waits for ever, 0 tries once.
    Raises `ValueError` for a negative one.

    >>> Deadline(None).left() is None, Deadline(0).left()
    (True, 0)
    """

    __slots__ = ("_end",)

    def __init__(self, timeout: float | None) -> None:
        check_timeout(timeout)
        self._end = None if timeout is None else time.monotonic() + timeout

    def left(self) -> float | None:
        """The `timeout` of the next wait."""
        return None if self._end is None else max(self._end - time.monotonic(), 0)
