"""`shmdomains.green`: the plain API in the greenlets of gevent.

A greenlet holds what it locked, as a thread does elsewhere, and one that waits lets its hub run the
others. Nothing else changes: `DomainList` and `Domain` are used as ever.

Where gevent has patched `threading` (``gevent.monkey.patch_all()``, ``gunicorn -k gevent``) this is
found out when a list is attached, or first used in a forked child: greenlets are the threads of such
a process, and whoever asked for that wants nothing to block. A process that uses gevent without
patching says so with `patch`; so does one that patches after it has attached.
"""

from __future__ import annotations

from .memory import greenlets

__all__ = ["patch"]


def patch() -> None:
    """From here on greenlets of this process wait without stopping their hub. May be called more
    than once. Raises `ImportError` if gevent is not there: ``pip install shmdomains[gevent]``.

    >>> from shmdomains import green
    >>> green.patch()
    """
    try:
        greenlets.begin()
    except ImportError as exc:
        raise ImportError(
            f"shmdomains.green needs gevent ({exc}): pip install 'shmdomains[gevent]'"
        ) from exc
