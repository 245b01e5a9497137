"""The group of commands: finds a command by its name, reports a user's errors in one line, runs
several that stand in one argument.

A mistyped name must not lead to a command that changes something, so only reading commands are
suggested. For a virsh command that does not exist here, the error says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from typing import Any

import click

from ..errors import INTERRUPTED, ShmDomainsError
from .script import Unreadable, in_order, is_script, split
from .tables import BLANK, JSON, QUIET, Failure, UsageFailure, describe, is_broken_pipe
from .types import Target

EXIT_STATUS = """\b
Exit status:
  0    done
  1    failed, wholly or in part: a line on standard error says what and why
  2    the command line is wrong; with a driver 1, as virsh has it
  3    `check`: no problem was found, but not everything could be told
  130  interrupted with Ctrl-C

With --format json each line on standard error is a JSON object: of an error its class as "error",
its "message" and, where known, "path", "element", "line" and "holder"; or a "warning".
"""

_OTHER_NAMES = {"domrename": "rename", "event": "events"}  # virsh's; not listed by --help

_HARMLESS = (
    *("list", "dominfo", "domstate", "domid", "domname", "domuuid", "dumpxml"),
    *(
        "domjobinfo",
        "nodeinfo",
        "vcpucount",
        "domstats",
        "wait",
        "events",
        "segments",
        "locks",
        "metrics",
        "check",
    ),
)

# virsh's commands about domains (libvirt 9.0.0) that do not exist here.
_A_DRIVERS = """
attach-device attach-disk attach-interface backup-begin blkdeviotune blkiotune blockcommit
blockcopy blockjob blockpull blockresize change-media cpu-stats detach-device
detach-device-alias detach-disk detach-interface domblkerror domblkinfo domblklist domblkstat
domblkthreshold domcontrol domdirtyrate-calc domdisplay domdisplay-reload domfsfreeze domfsinfo
domfsthaw domfstrim domhostname domif-getlink domif-setlink domifaddr domiflist domifstat
domiftune domlaunchsecinfo dommemstat dompmsuspend dompmwakeup domsetlaunchsecstate
domtime domxml-from-native domxml-to-native dump get-user-sshkeys guest-agent-timeout guestinfo
guestvcpus inject-nmi iothreadadd iothreaddel iothreadinfo iothreadpin iothreadset managedsave
managedsave-define managedsave-dumpxml managedsave-edit managedsave-remove memtune metadata
migrate migrate-compcache migrate-getmaxdowntime migrate-getspeed migrate-postcopy
migrate-setmaxdowntime migrate-setspeed numatune perf qemu-agent-command qemu-attach
qemu-monitor-event restore save save-image-define save-image-dumpxml
save-image-edit schedinfo screenshot send-key send-process-signal set-lifecycle-action
set-user-password set-user-sshkeys setvcpu ttyconsole update-device update-memory-device
vcpuinfo vcpupin vncdisplay
"""
_WHAT_A_DRIVER_DOES = frozenset(_A_DRIVERS.split())


_OURS = {
    *("load", "segments", "locks", "check", "recover", "export", "import", "unlink", "wait"),
    *("postgres", "stress", "completion", "reconcile", "supervise", "driver", "top", "trace"),
}
"""Behind the others, which are virsh's, a blank line follows as in virsh."""


_DRIVER = "shmdomains.driver"
_ASKS_NO_DRIVER = _OURS - {"reconcile", "supervise"}


def driver_of(ctx: click.Context) -> str | None:
    """The driver that was named, or that the list remembers. It is asked once."""
    if ctx.params.get("driver"):
        return str(ctx.params["driver"])
    if "segment" not in ctx.params or ctx.invoked_subcommand in _ASKS_NO_DRIVER:
        return None
    if _DRIVER not in ctx.meta:
        ctx.meta[_DRIVER] = Target.of(ctx.params["segment"]).remembered_driver()
    found: str | None = ctx.meta[_DRIVER]
    return found


class Commands(click.Group):
    """Lists the commands in the order in which they were added."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.with_driver: dict[str, click.Command] = {}
        """What names mean that are virsh's for something else, when there is a driver."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.with_driver and driver_of(ctx):
            return self.with_driver[cmd_name]
        name = _OTHER_NAMES.get(cmd_name, cmd_name)
        found = super().get_command(ctx, name)
        if isinstance(found, _Later):
            found = self.commands[name] = found.imported()
        return found

    def add_later(self, name: str, module: str) -> None:
        """Add the command `name` of a module beside this one, which is imported when it is used:
        commands that few use cost the others nothing."""
        self.add_command(_Later(name, module))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        if len(args) == 1 and is_script(args[0]):
            try:
                return "", _Several(self, split(args[0])), []
            except Unreadable as exc:
                if driver_of(ctx):
                    raise Failure(str(exc), exc) from None
                raise click.UsageError(f"{exc}.", ctx) from None
        if not args[0].startswith("-") and args[0] not in _OURS and driver_of(ctx):
            return "", _Several(self, [args]), []
        return self.resolve_one(ctx, args)

    def resolve_one(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of these words."""
        name = str(args[0])
        if self.get_command(ctx, name) or name.startswith("-"):
            found, command, rest = super().resolve_command(ctx, args)
            return found, command, rest if command is None else in_order(command, ctx, rest)
        raise click.UsageError(_unknown(name, bool(driver_of(ctx))), ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[JSON] = _asks_for_json(args)
        with _failures(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _failures(ctx):
            return super().invoke(ctx)


class _Later(click.Command):
    """Stands for a command whose module is not imported yet."""

    def __init__(self, name: str, module: str) -> None:
        super().__init__(name)
        self._module = module

    def imported(self) -> click.Command:
        module = import_module(f"..{self._module}", __name__)
        found: click.Command = getattr(module, str(self.name).replace("-", "_"))
        return found


class _Several(click.Command):
    """Commands one after the other, each as virsh runs it: whatever it comes to, the next one
    follows, and the last one's exit status is the whole's. None runs if one cannot be parsed."""

    def __init__(self, group: Commands, commands: list[list[str]]) -> None:
        super().__init__(None, add_help_option=False)
        self._group, self._commands = group, commands

    def invoke(self, ctx: click.Context) -> None:
        assert ctx.parent is not None
        ctx.meta[BLANK] = True
        parsed = [self._parsed(ctx.parent, words) for words in self._commands]
        status = 0
        for words, command in zip(self._commands, parsed, strict=True):
            ctx.meta[JSON] = _asks_for_json(words)
            quiet = ctx.meta.get(QUIET, False)
            ctx.meta[BLANK] = not (quiet or ctx.meta[JSON] or words[0] in _OURS)
            status = _status(command)
            if ctx.meta[BLANK]:
                click.echo()
            if status == INTERRUPTED:
                break
        ctx.exit(status)

    def _parsed(self, parent: click.Context, words: list[str]) -> click.Context:
        parent.meta[JSON] = _asks_for_json(words)
        try:
            name, command, args = self._group.resolve_one(parent, words)
            assert command is not None
            return command.make_context(name, args, parent=parent)
        except click.UsageError as exc:
            if driver_of(parent):
                raise Failure(_in_virshs_words(exc, words[0]), exc) from None
            raise


def _in_virshs_words(exc: click.UsageError, command: str) -> str:
    """What is wrong with a command line, as vshCommandParse says it; its exit status is 1."""
    if isinstance(exc, click.MissingParameter) and exc.param is not None:
        return f"command '{command}' requires <{exc.param.name}> option"
    if isinstance(exc, click.NoSuchOption):
        return f"command '{command}' doesn't support option {exc.option_name}"
    message = exc.format_message()
    extra = re.match(r"Got unexpected extra arguments? \((.*?)[ )]", message)
    if extra:
        return f"unexpected data '{extra[1]}'"
    return message


def _status(ctx: click.Context) -> int:
    """Run a command whose context is made; its errors are shown."""
    try:
        with _failures(ctx), ctx:
            ctx.command.invoke(ctx)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    return 0


def _unknown(name: str, driver: bool) -> str:
    if name in _WHAT_A_DRIVER_DOES:
        return f"shmdomains has no '{name}': what it does not say of a domain, its hypervisor does."
    if driver:
        return f"unknown command: '{name}'"
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
