"""The command line: ``shmdomains load``, ``list``, ``define`` and so on.

`commands` is the program, `group` finds a command and reports errors, `domains` and `segments` are
the commands, `types` their arguments, `tables` their output. This folder may import everything, and
nothing imports it. It promises that an error which a user can cause is one line on stderr, never a
traceback.
"""

from .commands import cli, main

__all__ = ["cli", "main"]
