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
@click.option("--list", "only", metavar="LIST", help="The one list that it is to use.")
@click.pass_obj
def init(target: Target, role: str | None, only: str | None) -> None:
    """Make the schema of the lists, or upgrade it.

    For an administrator: whoever may make a schema needs no such step. NAME is the URL of a list in
    the database; --role lets a role use the lists with no more rights than that takes. With --list
    it sees and changes that list only, which is made if need be; call it again for one more.
    """
    if target.in_shared_memory:
        raise click.UsageError(f"{target.what} is not on PostgreSQL.")
    if only is not None and role is None:
        raise click.UsageError("--list takes --role: who is to use it.")
    with plainly():
        from ..postgres.rights import install
        from ..postgres.url import checked_name, parse, without_password

        address = parse(target.url)
        if only is not None:
            checked_name(only)
    if address.embedded is not None:
        raise click.UsageError("An embedded server belongs to whoever started it: use it.")
    import psycopg

    try:
        install(address.conninfo, role, only)
    except psycopg.Error as exc:
        why = without_password(" ".join(str(exc).split()))
        raise Failure(f"{target.shown}: {why}", exc) from None
    what = "it" if only is None else f"list '{only}'"
    granted = "" if role is None else f", and role '{role}' may use {what}"
    click.echo(printable(f"Schema for lists made in '{target.shown}'{granted}"))
