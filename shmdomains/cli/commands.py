"""The commands: ``shmdomains load``, ``list``, ``define`` and so on.

Promises. An error that a user can cause is one line on stderr and an exit status that `--help`
names, never a traceback. Results go to stdout, everything else to stderr. Reading takes no lock and
blocks nobody. A change waits at most `--timeout` seconds for a lock, then names its holder. Names,
flags, order and words are virsh's if virsh has the command.
"""

from __future__ import annotations

import io
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from .. import __version__
from ..config import LoadFailure
from ..memory import segment_file
from . import definitions as definition_commands
from . import domains as domain_commands
from . import events as event_commands
from . import jobs as job_commands
from . import lifecycle as lifecycle_commands
from . import locks as lock_commands
from . import postgres as postgres_commands
from . import segments as segment_commands
from . import settings as setting_commands
from .driving import DRIVER_VARIABLE, DRIVERS
from .group import EXIT_STATUS, Commands
from .node import nodeinfo
from .tables import is_terminal, print_warning
from .types import COMPLETE_VARIABLE, SEGMENT_VARIABLE, Target, complete_segment, flag

PROGRAM = "shmdomains"
_PIPE_WIDTH = 160


class _WarningsToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # `load` reports these itself, sorted, once its progress bar is done.
        if isinstance(record.args, tuple) and any(
            isinstance(arg, LoadFailure) for arg in record.args
        ):
            return
        print_warning(record.getMessage())


@contextmanager
def _logging() -> Iterator[None]:
    logger = logging.getLogger("shmdomains")
    handler = _WarningsToStderr(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@click.group(
    name=PROGRAM,
    cls=Commands,
    epilog=EXIT_STATUS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--segment",
    "-s",
    metavar="NAME|URL",
    envvar=SEGMENT_VARIABLE,
    default=segment_file.DEFAULT_NAME,
    show_default=True,
    show_envvar=True,
    shell_complete=complete_segment,
    help="The list: a segment's name, its file if there is a / in it, or a URL, as of a list on "
    "PostgreSQL: postgresql://HOST/DATABASE?list=NAME.",
)
@click.option(
    "--driver",
    type=click.Choice(list(DRIVERS)),
    envvar=DRIVER_VARIABLE,
    show_envvar=True,
    help="What runs the domains; the commands are then virsh's in every word.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, segment: str, driver: str | None) -> None:
    """The list of domains that a VM manager's processes share, in shared memory or on PostgreSQL.

    A DOMAIN is an id, a UUID or a name. Several commands in one argument are parted by ``;``:
    "suspend web1; domstate web1".
    """
    ctx.obj = Target.of(segment)._replace(driver=driver)
    ctx.with_resource(_logging())


for _command in (
    segment_commands.create,
    segment_commands.load,
    domain_commands.list_domains,
    domain_commands.dominfo,
    domain_commands.domstate,
    domain_commands.domid,
    domain_commands.domname,
    domain_commands.domuuid,
    domain_commands.dumpxml,
    domain_commands.wait,
    definition_commands.define,
    definition_commands.undefine,
    definition_commands.rename,
    definition_commands.autostart,
    lifecycle_commands.start,
    lifecycle_commands.shutdown,
    lifecycle_commands.reboot,
    lifecycle_commands.suspend,
    lifecycle_commands.resume,
    lifecycle_commands.reset,
    lifecycle_commands.destroy,
    lifecycle_commands.reconcile,
    lifecycle_commands.supervise,
    setting_commands.setmem,
    setting_commands.setmaxmem,
    setting_commands.setvcpus,
    setting_commands.desc,
    setting_commands.title,
    setting_commands.edit,
    nodeinfo,
    event_commands.events,
    job_commands.domjobinfo,
    job_commands.domjobabort,
    segment_commands.segments,
    lock_commands.locks,
    lock_commands.metrics,
    segment_commands.check,
    segment_commands.recover,
    segment_commands.export_command,
    segment_commands.import_command,
    segment_commands.unlink_segment,
    postgres_commands.postgres,
):
    cli.add_command(_command)
cli.with_driver["create"] = lifecycle_commands.create_domain


# --- stress, completion ---------------------------------------------------------------------


@cli.command()
@click.argument(
    "config_dir",
    metavar="CONFIG_DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Processes."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    help="How long.",
)
@flag("kill", "Kill workers at random moments (SIGKILL) and replace them.")
@click.option(
    "--start",
    type=click.Choice(["fork", "spawn", "forkserver"]),
    default="fork",
    show_default=True,
    help="How workers are started.",
)
@click.option(
    "--lock",
    type=click.Choice(["robust", "multiprocessing"]),
    default="robust",
    show_default=True,
    help="The kind of locks.",
)
@click.option(
    "--domains", type=click.IntRange(min=1), metavar="N", help="Clone the domains up to N."
)
@click.option(
    "--hosts",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Hosts that the workers are on, by their names.",
)
@flag("kill-server", "Kill the server, too, and start it again.")
@click.pass_context
def stress(
    ctx: click.Context,
    config_dir: Path,
    workers: int,
    seconds: float,
    kill: bool,
    start: str,
    lock: str,
    domains: int | None,
    hosts: int,
    kill_server: bool,
) -> None:
    """Prove that nothing is lost under load.

    Workers find, lock, change, define and remove the domains of a directory, in a list of its own:
    nothing in CONFIG_DIR and no other list is changed. If the list that is named is on PostgreSQL,
    so is this one, under a name of its own, and it is removed at the end. If none is, several hosts
    and a server that is killed take an embedded PostgreSQL of their own.
    """
    target: Target = ctx.obj
    if lock != "robust" and not target.in_shared_memory:
        raise click.UsageError(f"--lock is for shared memory, not for {target.what}.")
    if kill_server and not target.in_shared_memory:
        raise click.UsageError(
            f"--kill-server kills a server of its own, not that of {target.what}."
        )
    if lock != "robust" and (hosts > 1 or kill_server):
        raise click.UsageError("--lock is for shared memory, not for several hosts or a server.")
    if not math.isfinite(seconds):
        raise click.UsageError(f"--seconds is {seconds}; it has to end.")
    from rich.console import Console

    from ..stress import storm

    status = storm.run(
        config_dir,
        workers=workers,
        seconds=seconds,
        kill=kill,
        start=start,
        lock=lock,
        domains=domains,
        url=None if target.in_shared_memory else target.url,
        hosts=hosts,
        kill_server=kill_server,
        # Piped output should not be wrapped to an invented width.
        console=Console(width=None if is_terminal() else _PIPE_WIDTH),
    )
    ctx.exit(status)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  eval "$(shmdomains completion bash)"      in ~/.bashrc
    zsh:   eval "$(shmdomains completion zsh)"       in ~/.zshrc
    fish:  shmdomains completion fish | source       in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None  # the choices above are click's own
    click.echo(kind(cli, {}, PROGRAM, COMPLETE_VARIABLE).source())


def main() -> None:
    """Run the command line; the console script's entry."""
    _prepare_output()
    try:
        cli(prog_name=PROGRAM)
    finally:
        _drop_what_was_refused()


def _prepare_output() -> None:
    # A name that the terminal cannot show should not end the command.
    if sys.stderr is not None:
        sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if sys.stdout is None:
        return
    if not isinstance(sys.stdout.buffer, io.RawIOBase):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        return
    # Unbuffered ($PYTHONUNBUFFERED, usual in containers) Python drops, without an error, what a
    # write to a disk that gets full leaves over.
    sys.stdout = os.fdopen(
        sys.stdout.fileno(),
        "w",
        encoding=sys.stdout.encoding,
        errors="backslashreplace",
        closefd=False,
    )


def _drop_what_was_refused() -> None:
    """Drop output that could not be written and was reported: at exit Python would complain
    again."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
