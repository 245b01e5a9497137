"""What a process of a model yields: see `explorer`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from .explorer import Operation, Routine, Value, Word


def load(word: Word) -> Operation:
    return "load", word


def store(word: Word, value: Value, *also: tuple[Word, Value]) -> Operation:
    return "store", word, value, also


def exchange(word: Word, table: Mapping[Value, Value]) -> Operation:
    return "exchange", word, tuple(table.items())


def lock(word: Word) -> Operation:
    return "lock", word


def attempt(word: Word) -> Operation:
    return "attempt", word


def consistent(word: Word) -> Operation:
    return "consistent", word


def unlock(word: Word) -> Operation:
    return "unlock", word


def sleep(word: Word, value: Value, queue: Word) -> Operation:
    return "sleep", word, value, queue


def woken(queue: Word, unless: Word) -> Operation:
    return "woken", queue, unless


def call(routine: Routine, *arguments: Hashable) -> Operation:
    return "call", routine, arguments


def after_all() -> Operation:
    return "after all", None


def fail(text: str) -> Operation:
    return "fail", text
