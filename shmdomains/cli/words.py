"""Words of a command line that virsh reads in another way than click: arguments by their names, and
negative numbers.

``setmem web1 512``, ``setmem --domain web1 --size 512`` and ``setmem --size 512 web1`` are the same
to virsh, and ``setmem web1 -5`` has a number in it, no option.
"""

from __future__ import annotations

import re

import click

_NAMES = {"files": "file", "new_name": "new-name", "domains": "domain"}
"""virsh's names of arguments that are called otherwise here."""
_NEGATIVE = re.compile("-[0-9]+[A-Za-z]*")


class _Word(str):
    """A word that is known again by its identity."""


def in_order(command: click.Command, ctx: click.Context, words: list[str]) -> list[str]:
    """The words with arguments in the order that click wants, and none by name.

    >>> @click.command()
    ... @click.argument("domain")
    ... @click.argument("size")
    ... @click.option("--live", is_flag=True)
    ... def setmem(): pass
    >>> in_order(setmem, click.Context(setmem), ["--size", "-5", "--live", "--domain=web1"])
    ['--live', '--', 'web1', ' -5']
    """
    taken = {option for one in command.params for option in one.opts if option.startswith("-")}
    arguments = {
        f"--{_NAMES.get(str(one.name), one.name)}": str(one.name)
        for one in command.params
        if isinstance(one, click.Argument)
    }
    arguments = {option: name for option, name in arguments.items() if option not in taken}
    named: dict[str, str] = {}
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            rest += [word, *left]
            break
        option, _, value = word.partition("=")
        if option in arguments:
            if "=" not in word:
                value = next(left, "")
                if not value:
                    raise click.UsageError(f"expected syntax: {option} <string>", ctx)
            named[arguments[option]] = _positive(value)
        else:
            rest.append(_positive(word) if arguments else word)
    return _joined(command, ctx, named, rest) if named else rest


def _positive(word: str) -> str:
    """A negative number that is no option to click; the blank is taken away by who reads it."""
    return f" {word}" if _NEGATIVE.fullmatch(word) else word


def _joined(
    command: click.Command, ctx: click.Context, named: dict[str, str], rest: list[str]
) -> list[str]:
    marked = [_Word(word) for word in rest]
    inner = click.Context(command, parent=ctx)
    found, _, _ = command.make_parser(inner).parse_args(list(marked))
    places: list[str] = []
    for one in command.params:
        if isinstance(one, click.Argument):
            value = found.get(str(one.name))
            values = value if isinstance(value, tuple) else (value,)
            places += [word for word in values if isinstance(word, str)]  # not: there is none
    at = {id(word) for word in places}
    options = [word for word in marked if id(word) not in at and word != "--"]
    unnamed = iter(places)
    ordered = []
    for one in command.params:
        if isinstance(one, click.Argument):
            ordered.append(named.get(str(one.name)) or next(unnamed, None))
    words = [word for word in [*ordered, *unnamed] if word is not None]
    return [*map(str, options), "--", *map(str, words)]
