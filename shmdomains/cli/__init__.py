"""The command line: ``shmdomains load``, ``list``, ``define`` and so on.

`commands` is the program and `group` how it finds a command and ends, `domains` and `segments` are
its commands, `types` is what they are given and `tables` what they print. This folder may import
everything, and nothing imports it. It promises one line on stderr, never a traceback, for whatever
a user can cause.
"""

from .commands import cli, main

__all__ = ["cli", "main"]
