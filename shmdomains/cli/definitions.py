"""The commands that change what a domain is: ``define``, ``undefine``, ``rename``, ``autostart``.

A change waits for the domain with a time-out, and reaches the config directory that the list was
loaded from. With a driver it is the driver's operation, and words and refusals are virsh's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..config import MAX_FILE_BYTES
from ..deadline import Deadline
from ..errors import DefinitionError, SegmentError, ShmDomainsError, Unavailable
from ..opening import AnyDomainList
from ..xml import document
from ..xml.definition import DomainDef
from .driving import driven, driver_of, in_libvirts_words
from .tables import (
    Failure,
    describe,
    end_with_failure,
    print_error,
    printable,
    wants_json,
)
from .types import (
    Target,
    domain_argument,
    flag,
    found_domain,
    source_text,
    timeout_option,
    to_read,
)


@click.command()
@click.argument("files", metavar="[FILE]...", nargs=-1, type=click.Path(allow_dash=True))
@click.option("--new", is_flag=True, help="Refuse a domain that is there; redefine none.")
@flag("validate", "First by libvirt's own schema, which is in Debian's package libvirt0.")
@timeout_option
@click.pass_obj
def define(
    target: Target, files: tuple[str, ...], new: bool, validate: bool, timeout: float | None
) -> None:
    """Define persistent domains from XML, or redefine them.

    Makes the list if need be. FILE may be - for standard input, which is also read if there is
    no FILE and it is not a terminal. An active domain changes at its next start. The rest is
    defined if one FILE is wrong; the exit status is then 1.
    """
    if not files and sys.stdin is not None and sys.stdin.isatty():
        raise click.UsageError("Missing argument 'FILE'.")
    if new and target.driver:
        raise click.UsageError("--new is for lists without a driver.")
    schema = Schema() if validate else None
    with target.open() as doms:
        outcomes = [
            _define_one(target, doms, file, new, schema, timeout) for file in files or ("-",)
        ]
    end_with_failure(not all(outcomes))


class Schema:
    """libvirt's schema of a domain, where libvirt is installed."""

    PLACE = Path("/usr/share/libvirt/schemas/domain.rng")

    def __init__(self) -> None:
        from lxml import etree

        try:
            self._schema = etree.RelaxNG(etree.parse(str(self.PLACE)))
        except (OSError, etree.XMLSyntaxError, etree.RelaxNGParseError) as exc:
            text = f"{self.PLACE} cannot be read ({exc}); Debian has it in the package libvirt0"
            raise Failure(text, exc) from None

    def check(self, text: bytes) -> None:
        """Raises `DefinitionError` with what the schema says first (virXMLValidatorValidate)."""
        root, _ = document.parse(text)
        if self._schema.validate(root):
            return
        error = self._schema.error_log[0]
        raise DefinitionError(
            "XML document failed to validate against schema: Unable to validate doc against "
            f"{self.PLACE}: {error.message} (line {error.line})"
        )


def _define_one(
    target: Target,
    doms: AnyDomainList,
    file: str,
    new: bool,
    schema: Schema | None,
    timeout: float | None,
) -> bool:
    source = source_text(file)
    driver = target.driver and driver_of(target, doms, timeout)
    text = b""
    try:
        text = read_xml(target, file)
        definition = DomainDef.from_xml(text)
        if schema is not None:
            schema.check(text)
        info = driver.define(definition) if driver else doms.define(definition, timeout, new=new)
    except Failure as exc:
        exc.show()
        return False
    except (ShmDomainsError, OSError) as exc:
        print_error(f"Failed to define domain from {source}")
        if isinstance(exc, (SegmentError, Unavailable)):
            raise  # the other files would fail in the same way
        print_refusal(target, exc, text)
        return False
    later = "; it is running, the change is for its next start"
    later = later if info.is_active and not driver else ""
    click.echo(printable(f"Domain '{info.name}' defined from {source}{later}"))
    return True


def read_xml(target: Target, file: str) -> bytes:
    """A user's file, or standard input."""
    text = bytearray()
    try:
        with to_read(file) as stream:
            # Piece by piece: one large read would not notice Ctrl-C while it allocates. More bytes
            # than a definition may have are read, so that the parser reports the error.
            while len(text) <= MAX_FILE_BYTES and (piece := stream.read(1 << 16)):
                text += piece
    except OSError as exc:
        if target.driver is None:
            raise
        raise Failure(f"Failed to open file '{file}': {exc.strerror}", exc) from None
    return bytes(text)


def read_edited(text: str, extension: str) -> str:
    """The text as the user's editor leaves it; as it was, if it is not saved."""
    edited = click.edit(text, extension=extension)
    return text if edited is None else edited.removesuffix("\n" if text[-1:] != "\n" else "")


def print_refusal(target: Target, exc: BaseException, text: bytes) -> None:
    """Say why a definition is refused; with a driver, what is no XML as libvirt shows it: the line
    (virXMLParseHelper), and where in it."""
    wrong = document.syntax_error(text) if target.driver and not wants_json() else None
    if wrong is None or not isinstance(exc, DefinitionError):
        print_error(in_libvirts_words(exc) if target.driver else describe(exc), exc)
        return
    message, line, column = wrong
    print_error(f"(domain_definition):{line}: {message}")
    shown = text.split(b"\n")[line - 1].decode(errors="replace")
    pointer = "".join(one if one == "\t" else "-" for one in shown[: column - 1])
    for part in (shown, pointer + "^"):
        click.echo("\t".join(map(printable, part.split("\t"))), err=True)


@click.command()
@domain_argument
@timeout_option
@click.pass_obj
def undefine(target: Target, domain: str, timeout: float | None) -> None:
    """Undefine a domain.

    Its config file and autostart link are removed. An active domain becomes transient."""
    if target.driver:
        with driven(target, domain, "Failed to undefine domain '{name}'", timeout) as (it, info):
            it.undefine(info.uuid)
    else:
        with found_domain(target, domain) as (doms, info):
            doms.undefine(uuid=info.uuid, timeout=timeout)
    click.echo(printable(f"Domain '{info.name}' has been undefined"))


@click.command()
@domain_argument
@click.argument("new_name", metavar="NEW-NAME")
@timeout_option
@click.pass_obj
def rename(target: Target, domain: str, new_name: str, timeout: float | None) -> None:
    """Rename an inactive domain."""
    if target.driver:
        with driven(target, domain, None, timeout) as (driver, info):
            driver.rename(info.uuid, new_name)
        click.echo("Domain successfully renamed")
        return
    deadline = Deadline(timeout)
    with (
        found_domain(target, domain) as (doms, info),
        doms.locked(deadline.left()),
        doms.get(uuid=info.uuid, timeout=deadline.left()) as dom,
    ):
        old_name = dom.name
        doms.rename(dom, new_name)
    click.echo(printable(f"Domain '{old_name}' renamed to '{new_name}'"))


@click.command()
@domain_argument
@flag("disable", "Do not start it with the host.")
@timeout_option
@click.pass_obj
def autostart(target: Target, domain: str, disable: bool, timeout: float | None) -> None:
    """Start a domain with the host, or not."""
    if target.driver:
        failed = f"Failed to {'un' if disable else ''}mark domain '{{name}}' as autostarted"
        with driven(target, domain, failed, timeout) as (driver, info):
            driver.set_autostart(info.uuid, not disable)
    else:
        with (
            found_domain(target, domain) as (doms, info),
            doms.get(uuid=info.uuid, timeout=timeout) as dom,
        ):
            doms.set_autostart(dom, not disable)
    done = "unmarked" if disable else "marked"
    click.echo(printable(f"Domain '{info.name}' {done} as autostarted"))
