"""The commands that only lists on PostgreSQL need: ``postgres init``.

An administrator runs it once, where whoever uses the lists may not make a schema. Everything else
is done by the commands for any list.
"""

from __future__ import annotations

import click

from .tables import Failure, printable
from .types import Target, plainly, segment_argument


@click.group()
def postgres() -> None:
    """Prepare a PostgreSQL database."""


@postgres.command()
@segment_argument
@click.option("--role", metavar="NAME", help="A role that is to use the lists.")
@click.pass_obj
def init(target: Target, role: str | None) -> None:
    """Make the schema of the lists, or upgrade it.

    For an administrator: whoever may make a schema needs no such step. NAME is the URL of a list in
    the database; --role lets a role use the lists with no more rights than that takes.
    """
    if target.in_shared_memory:
        raise click.UsageError(f"{target.what} is not on PostgreSQL.")
    with plainly():
        from ..postgres.schema import install
        from ..postgres.url import parse, without_password

        address = parse(target.url)
    if address.embedded is not None:
        raise click.UsageError("An embedded server belongs to whoever started it: use it.")
    import psycopg

    try:
        install(address.conninfo, role)
    except psycopg.Error as exc:
        why = without_password(" ".join(str(exc).split()))
        raise Failure(f"{target.shown}: {why}", exc) from None
    granted = "" if role is None else f", and role '{role}' may use it"
    click.echo(printable(f"Schema for lists made in '{target.shown}'{granted}"))
