"""The group of commands: finds a command by its name, reports a user's errors in one line.

A mistyped name must not lead to a command that changes something, so only reading commands are
suggested. For a virsh command that does not exist here, the error says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import click

from ..errors import INTERRUPTED, ShmDomainsError
from .tables import JSON, Failure, UsageFailure, describe, is_broken_pipe

EXIT_STATUS = """\b
Exit status:
  0    done
  1    failed, wholly or in part: a line on standard error says what and why
  2    the command line is wrong
  3    `check`: no problem was found, but not everything could be told
  130  interrupted with Ctrl-C

With --format json each line on standard error is a JSON object: of an error its class as "error",
its "message" and, where known, "path", "element", "line" and "holder"; or a "warning".
"""

_OTHER_NAMES = {"domrename": "rename", "event": "events"}  # virsh's; not listed by --help

_HARMLESS = (
    *("list", "dominfo", "domstate", "domid", "domname", "domuuid", "dumpxml"),
    *("domjobinfo", "wait", "events", "segments", "locks", "metrics", "check"),
)

# virsh's commands about domains (libvirt 9.0.0) that do not exist here.
_A_DRIVERS = """
attach-device attach-disk attach-interface backup-begin blkdeviotune blkiotune blockcommit
blockcopy blockjob blockpull blockresize change-media console cpu-stats desc destroy
detach-device detach-device-alias detach-disk detach-interface domblkerror domblkinfo domblklist
domblkstat domblkthreshold domcontrol domdirtyrate-calc domdisplay domdisplay-reload domfsfreeze
domfsinfo domfsthaw domfstrim domhostname domif-getlink domif-setlink domifaddr domiflist
domifstat domiftune domlaunchsecinfo dommemstat dompmsuspend dompmwakeup
domsetlaunchsecstate domstats domtime domxml-from-native domxml-to-native dump edit
get-user-sshkeys guest-agent-timeout guestinfo guestvcpus inject-nmi iothreadadd iothreaddel
iothreadinfo iothreadpin iothreadset managedsave managedsave-define managedsave-dumpxml
managedsave-edit managedsave-remove memtune metadata migrate migrate-compcache
migrate-getmaxdowntime migrate-getspeed migrate-postcopy migrate-setmaxdowntime migrate-setspeed
numatune perf qemu-agent-command qemu-attach qemu-monitor-command qemu-monitor-event reboot
reset restore resume save save-image-define save-image-dumpxml save-image-edit schedinfo
screenshot send-key send-process-signal set-lifecycle-action set-user-password set-user-sshkeys
setmaxmem setmem setvcpu setvcpus shutdown start suspend ttyconsole update-device
update-memory-device vcpucount vcpuinfo vcpupin vncdisplay
"""
_WHAT_A_DRIVER_DOES = frozenset(_A_DRIVERS.split())


class Commands(click.Group):
    """Lists the commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, _OTHER_NAMES.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = str(args[0])
        if self.get_command(ctx, name) or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        raise click.UsageError(_unknown(name), ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[JSON] = _asks_for_json(args)
        with _failures(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _failures(ctx):
            return super().invoke(ctx)


def _unknown(name: str) -> str:
    if name in _WHAT_A_DRIVER_DOES:
        return (
            f"shmdomains has no '{name}': it keeps the list of domains; what runs and changes them "
            "is a hypervisor's driver."
        )
    from difflib import get_close_matches

    near = get_close_matches(name, _HARMLESS, cutoff=0.7)
    text = f"No such command '{name}'."
    return f"{text} Did you mean {' or '.join(near)}?" if near else text


def _asks_for_json(args: list[str]) -> bool:
    # Before click parses them, so that errors in other options are JSON too.
    return "--format=json" in args or ("--format", "json") in pairwise(args)


@contextmanager
def _failures(ctx: click.Context) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)
    except click.UsageError as exc:
        if not ctx.meta[JSON]:
            raise  # click shows how the command is used
        raise UsageFailure(exc.format_message(), exc) from None
    except ShmDomainsError as exc:
        raise Failure(describe(exc), exc) from None
    except OSError as exc:
        if is_broken_pipe(exc):
            raise
        raise Failure(describe(exc), exc) from None
