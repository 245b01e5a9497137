"""A command line as virsh reads it, where click would read it in another way.

Several commands may stand in one argument: ``shmdomains "start web1; list"`` (as in
vshCommandStringParse blanks part words, ``;`` or the end of a line parts commands, ``#`` begins a
comment where a word would, quotes and backslashes are a shell's). Arguments may go by their names:
``setmem web1 512``, ``setmem --domain web1 --size 512`` and ``setmem --size 512 web1`` are the
same. And ``setmem web1 -5`` has a number in it, no option.
"""

from __future__ import annotations

import re

import click

from .tables import BLANK, printable

_ENDS = ";\n"


class Unreadable(ValueError):
    """A quote is open at the end, or a backslash stands there."""


def is_script(word: str) -> bool:
    """Whether the word is more than a command's name.

    >>> is_script("list --all"), is_script("list;"), is_script("list")
    (True, True, False)
    """
    return any(character.isspace() or character == ";" for character in word)


def split(text: str) -> list[list[str]]:
    r"""The words of each command. Raises `Unreadable`.

    >>> split("define 'a b.xml'; list --all # both\ndomid a\\ b;")
    [['define', 'a b.xml'], ['list', '--all'], ['domid', 'a b']]
    """
    commands: list[list[str]] = [[]]
    at = 0
    while at < len(text):
        character = text[at]
        if character in _ENDS:
            commands.append([])
            at += 1
        elif character.isspace():
            at += 1
        elif character == "#":
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
        else:
            word, at = _word(text, at)
            commands[-1].append(word)
    return [words for words in commands if words]


def _word(text: str, at: int) -> tuple[str, int]:
    """The word that begins here, and where it ends."""
    word, quote = "", ""
    while at < len(text):
        character = text[at]
        if not quote and (character.isspace() or character in _ENDS):
            break
        at += 1
        if character == quote:
            quote = ""
        elif character in "'\"" and not quote:
            quote = character
        elif character == "\\" and quote != "'":
            if at == len(text):
                raise Unreadable("dangling \\")
            word += text[at]
            at += 1
        else:
            word += character
    if quote == '"':  # an open ' is closed by the end, in virsh
        raise Unreadable('missing "')
    return word, at


def say(text: str) -> None:
    """Print what virsh ends no line after, for the blank line behind each command does."""
    text = "\n".join(map(printable, text.split("\n")))
    click.echo(text, nl=not click.get_current_context().meta.get(BLANK))


# --- arguments by their names, and negative numbers ----------------------------------------------

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
