"""Third-party and slow modules, imported when first used.

The modules for XML, config files and error messages take longer to import than everything else. A
worker that finds a domain, and ``shmdomains list``, should not wait for them. `if TYPE_CHECKING`
beside each use keeps the types.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

# A child forked while another thread imports a module would wait for ever for that thread. So the
# fork waits until the import is done.
_importing = threading.RLock()
_PATIENCE = 10.0  # seconds; the import itself may be waiting for the thread that forks
_held_for_fork = False


def _before_fork() -> None:
    global _held_for_fork
    _held_for_fork = _importing.acquire(timeout=_PATIENCE)


def _after_fork_in_parent() -> None:
    if _held_for_fork:
        _importing.release()


def _after_fork_in_child() -> None:
    global _importing
    _importing = threading.RLock()  # its holder is a thread that the child does not have


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)

_all: list[LazyModule] = []
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Block signals: a handler that uses the list would see a half-imported module."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
    try:
        with _importing:
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def preload() -> None:
    """Import now the modules for XML, config files and messages that are imported when first used.

    For a process that will lose access to Python's modules (another user, a chroot) or run out of
    descriptors.
    """
    for module in _all:
        module._load()


class LazyModule:
    """Stands for a module and imports it when first used.

    >>> json = LazyModule("json")
    >>> json.loads("[1]")
    [1]
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: ModuleType | None = None
        _all.append(self)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._module or self._load(), attribute)

    def _load(self) -> ModuleType:
        with _undisturbed():
            try:
                self._module = import_module(self._name)
            except ImportError as exc:
                # It is installed; a descriptor, memory or permission is missing.
                what = f"{self._name} cannot be imported now: {exc}"
                raise OSError(errno.ELIBACC, what) from exc
        return self._module
