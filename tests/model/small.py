"""Small data in the spare name buffer, which a rename needs as well (I7; record.c, fields.c).

Claims, in every state:
- The name of a living domain lies whole in the buffer that counts, and is what was committed last.
- So does its data, in a half of the other buffer or in the heap.
- A reader without a lock, if life and `cur` are as before after it has read the name, has read one
  name, whole; and if life and the data's version are as before after it has read the data, has read
  the data of that version, whole.

A name fills a buffer, small data a half of it, data in the heap a cell of its own. A field copy
says which buffer has the name, which half or cell is chosen, where the data is, and its version. A
commit of data writes what is not chosen, the spare copy, `cur`. A rename moves small data to the
heap by such a commit, then writes the buffer that has not the name, the spare copy, `cur`. Remove
counts `cur` by two; an insert writes the first buffer of the free slot, the spare copy, `cur`, and
`life`.

That extents are free when they are needed is the business of `heap`, who may rename that of
`index`.
"""

from __future__ import annotations

from typing import Any

from .explorer import Memory, Model, Steps, Word
from .operations import after_all, call, fail, load, store, unlock
from .subject import Subject, process

RULES = {
    "make way": "small data is in the heap, by a commit, before a name is written over it",
    "new version": "data that makes way is a new version",
    "other half": "small data is written into the half that does not count",
    "fill, then flip": "data is written before `cur` lets it count",
    "look again": "a reader looks at life and `cur` again after it has read the name",
    "version again": "a reader looks at the version again after it has read the data",
    "life again": "a reader looks at life again after it has read the data",
}
SMALL, HEAP, NONE = "small", "heap", "none"
BUFFER, HALF = 4, 2  # words
LOCK = ("slot lock", 0)
CUR, LIFE = ("cur", 0), ("life", 0)

Fields = tuple[int, int, str, int]  # which buffer, which half or cell, where, version
Places = list[Word]


class Small(Subject):
    """One slot, whose domain was renamed once, with small data where the first name was."""

    rules = RULES

    def locks(self) -> list[Word]:
        return [LOCK]

    def words(self) -> dict[Word, Any]:
        """`name` and `data` are facts: what was committed last."""
        fields = (1, 0, SMALL, 0)
        words: dict[Word, Any] = {LIFE: 1, CUR: 0, "name": "first", "data": "one"}
        words.update({("copy", 0, i): fields for i in (0, 1)})
        words.update({("buffer", 1, w): "first" for w in range(BUFFER)})
        words.update({("buffer", 0, w): (0, "one") if w < HALF else None for w in range(BUFFER)})
        words.update({("cell", i, w): None for i in (0, 1) for w in range(HALF)})
        return words

    def places(self, fields: Fields) -> Places:
        """Where the data lies."""
        named, chosen, where, _ = fields
        if where == HEAP:
            return [("cell", chosen, w) for w in range(HALF)]
        return [("buffer", 1 - named, chosen * HALF + w) for w in range(HALF)]

    # --- a holder ---

    def current(self) -> Steps:
        cur = yield load(CUR)
        return cur, (yield load(("copy", 0, cur & 1)))

    def flip(self, fields: Fields, *facts: tuple[Word, Any]) -> Steps:
        cur = yield load(CUR)
        yield store(("copy", 0, cur + 1 & 1), fields)
        yield store(CUR, cur + 1, *facts)

    def fill(self, fields: Fields, data: str) -> Steps:
        if fields[2] != NONE:
            for place in self.places(fields):
                yield store(place, (fields[3], data))

    def spell(self, buffer: int, name: str) -> Steps:
        for w in range(BUFFER):
            yield store(("buffer", buffer, w), name)

    def changed(self, fields: Fields, where: str, version: int) -> Fields:
        named, chosen, *_ = fields
        stays = where == NONE or not self.follows("other half")
        return named, chosen if stays else 1 - chosen, where, version

    def change(self, where: str, data: str) -> Steps:
        cur, fields = yield call(self.current)
        new = self.changed(fields, where, cur + 1)
        if self.follows("fill, then flip"):
            yield call(self.fill, new, data)
            yield call(self.flip, new, ("data", data))
        else:
            yield call(self.flip, new, ("data", data))
            yield call(self.fill, new, data)

    @process
    def commit(self, *changes: tuple[str, str]) -> Steps:
        """Change the data, in one hold, to be there, and this."""
        yield from self.enter(LOCK)
        if (yield load(LIFE)) & 1:
            for where, data in changes:
                yield call(self.change, where, data)
        yield unlock(LOCK)

    def moved(self) -> Steps:
        """The fields with the data in the heap, where it is written; and whether it had to be."""
        cur, fields = yield call(self.current)
        named, chosen, where, version = fields
        if where != SMALL:
            return fields, False
        _, data = yield load(self.places(fields)[0])
        version = cur + 1 if self.follows("new version") else version
        new = (named, 1 - chosen, HEAP, version)
        yield call(self.fill, new, data)
        return new, True

    @process
    def rename(self, name: str) -> Steps:
        yield from self.enter(LOCK)
        if (yield load(LIFE)) & 1:
            fields, had_to = yield call(self.moved)
            if had_to and self.follows("make way"):
                yield call(self.flip, fields)
            named, *rest = fields
            yield call(self.spell, 1 - named, name)
            yield call(self.flip, (1 - named, *rest), ("name", name))
        yield unlock(LOCK)

    @process
    def replace(self, name: str, *changes: tuple[str, str]) -> Steps:
        """Remove the domain, and insert another one, which gets data."""
        yield from self.enter(LOCK)
        life = yield load(LIFE)
        if life & 1:
            yield store(LIFE, life + 1)
            cur = yield load(CUR)
            yield store(CUR, cur + 2)
        yield call(self.insert, name)
        for where, data in changes:
            yield call(self.change, where, data)
        yield unlock(LOCK)

    def insert(self, name: str) -> Steps:
        life = yield load(LIFE)
        cur, (_, chosen, *_) = yield call(self.current)
        yield call(self.spell, 0, name)
        yield call(self.flip, (0, chosen, NONE, cur + 1), ("name", name))
        yield store(LIFE, life | 1)

    # --- a reader ---

    def read(self) -> Steps:
        """sd_view_begin, the data's bytes, sd_view_blobs_check."""
        life = yield load(LIFE)
        cur, fields = yield call(self.current)
        if not life & 1:
            return
        name = yield call(self.gather, tuple(("buffer", fields[0], w) for w in range(BUFFER)))
        if self.follows("look again"):
            if (yield load(LIFE)) != life:
                return
            if (yield load(CUR)) != cur:
                return
        if len(set(name)) > 1 or not isinstance(name[0], str):
            yield fail(f"reads the name {name}")
        if fields[2] == NONE:
            return
        data = yield call(self.gather, tuple(self.places(fields)))
        if self.follows("version again") and ((yield from self.settled("copy", 0))[3] != fields[3]):
            return
        if self.follows("life again") and (yield load(LIFE)) != life:
            return
        if len(set(data)) > 1 or data[0][0] != fields[3]:
            yield fail(f"reads the data {data} of {fields}")

    def gather(self, places: tuple[Word, ...]) -> Steps:
        found = []
        for place in places:
            found.append((yield load(place)))
        return tuple(found)

    def audit(self) -> Steps:
        yield after_all()
        yield from self.enter(LOCK)
        yield unlock(LOCK)

    # --- what must hold ---

    def claim(self, memory: Memory) -> str | None:
        if not memory[LIFE] & 1:
            return None
        fields: Fields = memory["copy", 0, memory[CUR] & 1]
        name = [memory["buffer", fields[0], w] for w in range(BUFFER)]
        if set(name) != {memory["name"]}:
            return f"the name is {name} instead of {memory['name']}"
        if fields[2] == NONE:
            return None
        data = [memory[place] for place in self.places(fields)]
        if set(data) != {(fields[3], memory["data"])}:
            return f"the data is {data} instead of {memory['data']} of version {fields[3]}"
        return None


def renamed(kills: int = 1, **how: Any) -> Model:
    """While others change the data, and look."""
    small = Small(**how)
    return small.model(
        small.rename("second"), small.commit((SMALL, "two")), small.read, kills=kills
    )


def twice(kills: int = 2, **how: Any) -> Model:
    """Small data comes to lie where the name was."""
    small = Small(**how)
    return small.model(
        small.rename("second"), small.commit((SMALL, "two")), small.rename("third"), kills=kills
    )


def sizes(kills: int = 1, **how: Any) -> Model:
    small = Small(**how)
    return small.model(
        small.commit((SMALL, "two"), (HEAP, "three"), (SMALL, "four")),
        small.commit((NONE, ""), (SMALL, "five")),
        small.read,
        kills=kills,
    )


def reused(kills: int = 1, **how: Any) -> Model:
    """The slot becomes another domain's."""
    small = Small(**how)
    return small.model(
        small.replace("second", (SMALL, "two"), (SMALL, "three")), small.read, kills=kills
    )


def crowd(kills: int = 2, **how: Any) -> Model:
    small = Small(**how)
    return small.model(
        small.rename("second"),
        small.replace("third", (SMALL, "two")),
        small.read,
        kills=kills,
    )


MODELS = {"renamed": renamed, "twice": twice, "sizes": sizes, "reused": reused}
SOAK = {"crowd": crowd}
CONTROLS = {
    "make way": twice,
    "new version": renamed,
    "other half": sizes,
    "fill, then flip": sizes,
    "look again": renamed,
    "version again": sizes,
    "life again": reused,
}
