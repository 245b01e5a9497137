"""Other people's modules, imported when they are first used.

What only XML, config files or error messages need takes longer to import than everything else; a
worker that finds a domain, and ``shmdomains list``, shall not wait for it. `if TYPE_CHECKING`
beside each keeps the types.
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

# A child that is forked while another thread imports would wait for ever for that thread to finish
# the module. So a fork waits for it instead.
_importing = threading.RLock()
_PATIENCE = 10.0  # seconds; for whoever forks in the middle of what the import itself waits for
_held_for_fork = False


def _before_fork() -> None:
    global _held_for_fork
    _held_for_fork = _importing.acquire(timeout=_PATIENCE)


def _after_fork_in_parent() -> None:
    if _held_for_fork:
        _importing.release()


def _after_fork_in_child() -> None:
    global _importing
    _importing = threading.RLock()  # whoever else held it is not here


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)

_all: list[LazyModule] = []
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without signals: a handler that uses the list would meet a module that is half imported."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
    try:
        with _importing:
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def preload() -> None:
    """Import now what is imported when it is first needed, for XML, config files and messages.

    For a process that is going to have no access to Python's modules any more (another user, a
    chroot), or no descriptor left.
    """
    for module in _all:
        module._load()


class LazyModule:
    """Stands for a module.

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
                # It is installed: what is missing is a descriptor, memory, or permission.
                what = f"{self._name} cannot be imported now: {exc}"
                raise OSError(errno.ELIBACC, what) from exc
        return self._module
