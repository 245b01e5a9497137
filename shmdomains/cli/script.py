"""Several commands in one argument, as virsh takes them: ``shmdomains "start web1; list"``.

Read as virsh reads it (vshCommandStringParse): blanks part words, ``;`` or the end of a line parts
commands, ``#`` begins a comment where a word would, quotes and backslashes are a shell's.
"""

from __future__ import annotations

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
