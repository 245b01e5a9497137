"""A party that is another user, without an exec.

That user may not be able to run this Python, or to read this package. So whatever may be imported
later is imported with this module, by doing a bit of everything: once, in the nursery that forks
the parties.
"""

from __future__ import annotations

import ctypes
import grp  # noqa: F401
import os

from click.testing import CliRunner
from helpers import serve, xml
from killing import Pipe

import shmdomains
from shmdomains import DomainList
from shmdomains.cli import cli

PR_SET_DUMPABLE = 4


def _import_what_may_be_needed() -> None:
    shmdomains.preload()
    with DomainList() as doms:
        doms.define(xml("web1"))
        with doms.get(name="web1") as dom:
            dom.activate()
        doms.snapshot(), doms.info, doms.check(), doms.recover(), shmdomains.segments()
    for command in ("--help", "-s /nowhere/s check", "-s /nowhere/s export x"):
        CliRunner().invoke(cli, command.split())


_import_what_may_be_needed()


def act_as(pipe: Pipe, user: int, groups: list[int], umask: int, more: dict[str, str]) -> None:
    """Be a party as another user; runs in a nursery's child."""
    os.setgroups(groups)
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    os.umask(umask)
    # As after an exec: it may look into its own /proc/self/fd, and so may others of its user.
    assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
    os.environ.update(more)
    serve(pipe.conn, {})
