"""What a scrape says of each domain.

All of it comes from one listing. A domain is looked at when it has changed since the last scrape,
its definition when that has: marks, which come with the listing and cost nothing, tell it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ..errors import DefinitionError, SegmentCorrupt
from ..holder import this_host
from ..look.guests import Guests
from ..rules.info import DomainInfo
from ..states import DomainState
from ..xml.definition import DomainDef
from . import families as f
from .families import Family, Labels, Rows

_FEW = 64
"""So many changed definitions are read one by one, more of them with a listing."""

_STATES = {state.value: Labels(state=state.words) for state in DomainState}


class _Sizes(NamedTuple):
    """What a definition says."""

    mark: object
    maximum: int
    usage: int
    vcpus: int


class _Known:
    """What is said of a domain until it changes."""

    __slots__ = (
        "autostart",
        "guest",
        "labels",
        "maximum",
        "meta",
        "sizes",
        "state",
        "usage",
        "vcpus",
    )

    def __init__(self, info: DomainInfo, sizes: _Sizes, started: int) -> None:
        self.sizes = sizes
        self.labels = Labels(domain=info.name)
        self.meta = Labels(domain=info.name, uuid=str(info.uuid), host=info.host or "")
        self.state = info.state.value
        self.autostart = info.autostart
        _, self.maximum, self.usage, self.vcpus = sizes
        self.guest: tuple[Labels, int, int] | None = None
        if info.pid is not None and started and info.host == this_host():
            self.guest = self.labels, info.pid, started


class Domains:
    """The domains as they were scraped last, by their marks."""

    def __init__(self, doms: Any) -> None:
        self._doms = doms
        self._known: dict[bytes, _Known] = {}
        self._guests: Guests[Labels] = Guests()

    def read(self) -> Iterator[tuple[Family, Rows]]:
        """Their families."""
        infos: Sequence[DomainInfo]
        marks: Sequence[bytes]
        infos, marks, damaged = self._doms._marked()
        known = [*map(self._known.get, marks)]
        changed = [place for place, one in enumerate(known) if one is None]
        if changed:
            damaged += self._learn(infos, marks, changed, known)
        self._known = {mark: one for mark, one in zip(marks, known, strict=True) if one is not None}
        now = [*self._known.values()]
        labels = [one.labels for one in now]
        states = [one.state for one in now]
        yield f.DOMAINS, f.one(len(now))
        yield f.META, ([one.meta for one in now], [1] * len(now))
        yield f.STATE, (labels, states)
        yield f.MAXIMUM, (labels, [one.maximum for one in now])
        yield f.USAGE, (labels, [one.usage for one in now])
        yield f.VCPUS, (labels, [one.vcpus for one in now])
        guests = [one.guest for one in now if one.guest is not None]
        running, seconds, resident = self._guests.read(guests)
        yield f.CPU_TIME, (running, seconds)
        yield f.RSS, (running, resident)
        many = Counter(states)
        yield f.PER_STATE, f.rows((of, many[state]) for state, of in _STATES.items())
        autostart = [one.labels for one in now if one.autostart]
        yield f.AUTOSTART, (autostart, [1] * len(autostart))
        yield f.DAMAGED, f.one(damaged)

    def _learn(
        self,
        infos: Sequence[DomainInfo],
        marks: Sequence[bytes],
        changed: list[int],
        known: list[_Known | None],
    ) -> int:
        """Put into `known` those that have changed, and return how many of them are damaged. A
        definition newer than its mark does no harm: the next scrape sees another mark."""
        sizes = {one.sizes.mark: one.sizes for one in self._known.values()}
        about = {place: self._doms._about(infos[place], marks[place]) for place in changed}
        unread = {infos[place].name for place, (mark, _) in about.items() if mark not in sizes}
        definitions = dict(self._read(unread))
        damaged = 0
        for place, (mark, started) in about.items():
            info = infos[place]
            if mark not in sizes:
                definition = definitions.get(info.name)
                if definition is None:  # it is gone by now, or damaged
                    damaged += info.name in definitions
                    continue
                sizes[mark] = _Sizes(
                    mark,
                    definition.memory * 1024,
                    definition.current_memory * 1024,
                    definition.current_vcpus,
                )
            try:
                known[place] = _Known(info, sizes[mark], started)
            except SegmentCorrupt:  # a state that nobody knows
                damaged += 1
        return damaged

    def _read(self, names: set[str]) -> Iterator[tuple[str, DomainDef | None]]:
        """The definitions of those with these names; ``None`` for a damaged one."""
        if len(names) > _FEW:
            with suppress(SegmentCorrupt):  # one damaged domain ends a listing: then one by one
                yield from (_named(info) for info in self._doms.snapshot() if _name(info) in names)
                return
        for name in names:
            try:
                info = self._doms.peek(name=name, definitions=True)
            except SegmentCorrupt:
                yield name, None
            else:
                if info is not None:
                    yield _named(info)


def _name(info: DomainInfo) -> str | None:
    """``None`` for one that `_marked` has counted as damaged."""
    try:
        return info.name
    except SegmentCorrupt:
        return None


def _named(info: DomainInfo) -> tuple[str, DomainDef | None]:
    try:
        return info.name, info.definition
    except (SegmentCorrupt, DefinitionError):
        return info.name, None
