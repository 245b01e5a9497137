"""The domains that every contestant is given, and the keys that it is asked for.

All contestants get the same domains: definitions of about 2 KB made from one real-looking document,
with random UUIDs. Keys are drawn at random, each once in a draw, and are fresh objects, as they
would be out of a request: nobody profits from a hash that was computed before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from shmdomains import DomainDef

DOCUMENTS = Path(__file__).parents[1] / "tests" / "data" / "domains"
RUNNING, PAUSED = 1, 3

# The driver's own data, and what each is changed into: small, and 2 KB with a command line in it.
SMALL = ({"vnc": 5901, "requests": 7}, {"vnc": 5902, "requests": 8})
LARGE = tuple(
    {
        **small,
        "command": [f"-device virtio-blk-pci,id=virtio-disk{n},bus=pci.{n}" for n in range(40)],
    }
    for small in SMALL
)


class Made(NamedTuple):
    """A domain to be known: all of them run, and their ids follow their order."""

    uuid: bytes
    name: str
    definition: DomainDef


def template() -> DomainDef:
    return DomainDef.from_xml((DOCUMENTS / "web1.xml").read_bytes())


def uuids(count: int, seed: int = 0) -> list[bytes]:
    source = random.Random(seed)
    return [UUID(bytes=source.randbytes(16), version=4).bytes for _ in range(count)]


def domains(keys: list[bytes], prefix: str = "vm") -> Iterator[Made]:
    """One by one: a million of them at once would fill the memory of the machine."""
    model = template()
    for number, key in enumerate(keys):
        name = f"{prefix}{number}"
        yield Made(key, name, model.replace(name=name, uuid=UUID(bytes=key)))


def changed(definition: DomainDef, step: int) -> DomainDef:
    return definition.replace(title=f"changed {step}", memory=2_097_152 + 1024 * step)


def plain(definition: DomainDef) -> dict[str, Any]:
    """A definition as the nested dicts that somebody without typed definitions would store: the
    same fields, document included."""

    def value(of: Any) -> Any:
        if isinstance(of, msgspec.Struct):
            return {field: value(getattr(of, field)) for field in of.__struct_fields__}
        if isinstance(of, list | tuple):
            return [value(one) for one in of]
        return str(of) if isinstance(of, UUID) else of

    made: dict[str, Any] = value(definition)
    return made


def draw(count: int, among: int, seed: int) -> list[int]:
    """Numbers of domains, each at most once."""
    return random.Random(seed).sample(range(among), min(count, among))


def fresh(key: Any) -> Any:
    """An equal key that nobody has seen."""
    if isinstance(key, bytes):
        return bytes(bytearray(key))
    return (key + " ")[:-1] if isinstance(key, str) else int(str(key))
