"""The two definitions of a slot, which change places when the domain is stopped (I6; record.c).

Claims, in every state:
- The definition that counts, and the next one if there is one, lie whole where their descriptors
  lead, and no cell is named twice.
- One version is one definition for ever, since decoded ones are kept by it.
- A reader without a lock, if the versions are as before after it has read, has read whole blobs
  of one commit.

Descriptors lie in two places of two each. A field copy says whether the places are swapped, which
descriptor of each kind counts, each kind's version, whether there is a next one. A commit frees
what does not count, names a free cell in the spare descriptor of each new blob, fills it, writes
the spare copy, stores `cur`, and frees again. To stop a domain writes nothing but the copy: swapped
the other way, the choices swapped, the definition's version the next one's.

A cell holds (version, what it is); the heap's own rules are in `heap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .explorer import Memory, Model, Steps, Word
from .operations import after_all, call, fail, load, store, unlock
from .subject import Subject

RULES = {
    "born next": "a version says whether its blob came in as the next definition",
    "in the copy": "whether the places are swapped stands in the field copies",
    "choices swapped": "which descriptor counts goes along with its place",
    "keeps its version": "the blob that changes places keeps the version it was written with",
    "flip, then free": "the old definition is freed after the store of `cur`",
}
LOCK = "slot lock"
DEFINITION, NEXT = 0, 1
PLACES = [(place, i) for place in (0, 1) for i in (0, 1)]
CELLS = range(4)
BORN_NEXT = 100
MOST = 8  # commits

Fields = tuple[int, tuple[int, int], tuple[int, int | None]]  # swapped, choices, versions


class Places(Subject):
    """A slot with a definition and, in the other place, a next one."""

    rules = RULES

    def locks(self) -> list[Word]:
        return [LOCK]

    def words(self) -> dict[object, object]:
        """`known` are facts: what each version was when it first counted as the definition."""
        fields = (0, (0, 0), (0, BORN_NEXT))
        words: dict[object, object] = {"cur": 0, "swapped": 0, ("copy", 0): fields}
        words["copy", 1] = fields
        words.update({("extent", *at): None for at in PLACES})
        words.update({("extent", 0, 0): 0, ("extent", 1, 0): 1})
        words.update({("cell", cell): None for cell in CELLS})
        words.update({("cell", 0): (0, "first"), ("cell", 1): (BORN_NEXT, "second")})
        words.update({("known", v + tag): None for v in range(MOST) for tag in (0, BORN_NEXT)})
        words["known", 0] = "first"
        words["twice"] = None
        return words

    def place(self, kind: int, fields: Fields) -> tuple[int, int]:
        return kind ^ fields[0], fields[1][kind]

    def version(self, kind: int, cur: int) -> int:
        return cur + (BORN_NEXT if kind == NEXT and self.follows("born next") else 0)

    # --- a holder ---

    def hold(self) -> Steps:
        yield from self.enter(LOCK, self.free)

    def current(self) -> Steps:
        cur = yield load("cur")
        fields = yield load(("copy", cur & 1))
        if not self.follows("in the copy"):
            fields = ((yield load("swapped")), *fields[1:])
        return cur, fields

    def free(self) -> Steps:
        _, fields = yield call(self.current)
        kept = [self.place(kind, fields) for kind in (DEFINITION, NEXT)
                if fields[2][kind] is not None]  # fmt: skip
        for at in PLACES:
            if at not in kept and (yield load(("extent", *at))) is not None:
                yield store(("extent", *at), None)

    def write(self, at: tuple[int, int], version: int, what: str) -> Steps:
        named = set()
        for other in PLACES:
            named.add((yield load(("extent", *other))))
        cell = min(cell for cell in CELLS if cell not in named)
        yield store(("extent", *at), cell)
        yield store(("cell", cell), (version, what))

    def commit(self, stops: bool, new: dict[int, str]) -> Callable[[], Steps]:
        """Stop the domain if there is a next definition; and set what is in `new`, by kind."""

        def process() -> Steps:
            yield call(self.hold)
            yield call(self.free)
            cur, fields = yield call(self.current)
            moves = stops and fields[2][NEXT] is not None
            changed = yield call(self.prepare, moves, tuple(new.items()), cur + 1, fields)
            if not self.follows("flip, then free") and moves:
                yield store(("extent", *self.place(DEFINITION, fields)), None)
            if not self.follows("in the copy") and changed[0] != fields[0]:
                yield store("swapped", changed[0])
            yield store(("copy", cur + 1 & 1), changed)
            yield store("cur", cur + 1)
            yield call(self.free)
            yield unlock(LOCK)

        return process

    def prepare(
        self, moves: bool, new: tuple[tuple[int, str], ...], cur: int, fields: Fields
    ) -> Steps:
        """The fields of the commit, its blobs written."""
        swapped, choice, versions = fields
        if moves:
            swapped ^= 1
            choice = (choice[1], choice[0]) if self.follows("choices swapped") else choice
            moved = versions[NEXT] if self.follows("keeps its version") else cur
            versions = (moved if moved is not None else cur, None)
        for kind, what in new:
            spare = 1 - choice[kind]
            version = self.version(kind, cur)
            choice = (spare, choice[1]) if kind == DEFINITION else (choice[0], spare)
            versions = (version, versions[1]) if kind == DEFINITION else (versions[0], version)
            yield call(self.write, (kind ^ swapped, spare), version, what)
        return swapped, choice, versions

    # --- a reader ---

    def read(self) -> Steps:
        cur, fields = yield call(self.current)
        if (yield load("cur")) != cur:
            return
        found = []
        for kind in (DEFINITION, NEXT):
            if fields[2][kind] is not None:
                cell = yield load(("extent", *self.place(kind, fields)))
                blob = None if cell is None else (yield load(("cell", cell)))
                found.append(blob and blob[0])
        now = (yield call(self.current))[1]
        if now[2] == fields[2] and found != [v for v in fields[2] if v is not None]:
            yield fail(f"reads the blobs {found} for {fields[2]}")

    def audit(self) -> Steps:
        yield after_all()
        yield call(self.hold)
        yield unlock(LOCK)

    # --- what must hold ---

    def fields(self, memory: Memory) -> Fields:
        fields: Fields = memory["copy", memory["cur"] & 1]
        return fields if self.follows("in the copy") else (memory["swapped"], *fields[1:])

    def cell(self, memory: Memory, at: tuple[int, int]) -> int | None:
        cell: int | None = memory["extent", at[0], at[1]]
        return cell

    def observe(self, memory: Memory) -> None:
        fields = self.fields(memory)
        cell = self.cell(memory, self.place(DEFINITION, fields))
        what = None if cell is None else memory["cell", cell][1]
        known = memory["known", fields[2][DEFINITION]]
        if known is None:
            memory["known", fields[2][DEFINITION]] = what
        elif known != what:
            memory["twice"] = f"version {fields[2][DEFINITION]} is {known} and {what}"

    def claim(self, memory: Memory) -> str | None:
        fields = self.fields(memory)
        for kind in (DEFINITION, NEXT):
            version = fields[2][kind]
            if version is None:
                continue
            cell = self.cell(memory, self.place(kind, fields))
            if cell is None or memory["cell", cell] is None or memory["cell", cell][0] != version:
                return f"blob {kind} of version {version} is not in cell {cell}"
        named = [cell for at in PLACES if (cell := self.cell(memory, at)) is not None]
        if len(set(named)) < len(named):
            return f"a cell is named twice: {named}"
        twice: str | None = memory["twice"]
        return twice


def stopped(kills: int = 1, **how: Any) -> Model:
    """Stopped while others read, and given a next definition again."""
    places = Places(**how)
    return places.model(
        places.commit(True, {}),
        places.commit(False, {NEXT: "third"}),
        places.read,
        kills=kills,
    )


def at_once(kills: int = 2, **how: Any) -> Model:
    """Both definitions in one commit; stopped and given a next one in one commit."""
    places = Places(**how)
    return places.model(
        places.commit(False, {DEFINITION: "third", NEXT: "fourth"}),
        places.commit(True, {NEXT: "fifth"}),
        places.commit(True, {}),
        kills=kills,
    )


def crowd(kills: int = 2, **how: Any) -> Model:
    places = Places(**how)
    return places.model(
        places.commit(True, {NEXT: "third"}),
        places.commit(True, {}),
        places.commit(False, {DEFINITION: "fourth", NEXT: "fifth"}),
        places.read,
        kills=kills,
    )


MODELS = {"stopped": stopped, "at once": at_once}
SOAK = {"crowd": crowd}
CONTROLS = {
    "born next": at_once,
    "in the copy": stopped,
    "choices swapped": at_once,
    "keeps its version": stopped,
    "flip, then free": stopped,
}
