"""Checksums and seals: damage is told from what is only being written (fields.c, layout.h).

Claims, with nobody damaging anything:
- A reader without a lock (sd_view_begin), if it finds `life` and `cur` as before, has read what
  they committed, and all its sums are right.
- Who looks without the slot's lock at what `cur` chooses, until it stands still (sd_values_settled,
  for the repairs), finds the sum right; under the list lock the name's as well.
- A look-up that passes a slot on its way and finds no sound name there (sd_find) has a sequence
  that moved, or the slot is FREE.
- The next holder of a slot's lock finds every sum right and what was committed last, however its
  predecessor ended.

The sum of a field copy is of its words and of the `cur` that lets it count; `cur` is one word with
a seal of its own; the sum of a name is of name and UUID and stands in its last word. A commit:
the spare copy (ids, status with the sum, version), `cur`. A rename: the spare name with its sum,
sequence odd, commit, sequence even. An insert: the spare name, UUID, commit, sequence odd, `life`,
the entry, sequence even. A sum is here what it is of, so that two never agree by chance.
"""

from __future__ import annotations

from typing import Any

from .explorer import Memory, Model, Steps, Word
from .operations import after_all, call, fail, load, store, unlock
from .subject import Subject, process

RULES = {
    "sum, then flip": "the sum of a field copy is stored before `cur` lets it count",
    "sum of the next": "it is of the `cur` that will let the copy count",
    "sealed at once": "`cur` and its seal are one word",
    "spare copy": "fields are written into the copy that does not count",
    "spare name": "a name and its sum are written where they do not count, before the flip",
    "sum of what counts": "the sum of a name is of the name that is about to count",
    "sum of the new UUID": "the sum of an inserted name is of the UUID that comes with it",
    "cur again": "a reader looks at `cur` again before it says what it found",
    "life again": "and at `life`: an insert writes the UUID before its flip",
    "whole": "and compares the whole of `cur`",
    "settled": "who reads beside a holder looks until `cur` stands still",
    "doubt": "a name without its sum counts as damage only if the sequence stands still",
    "list lock": "names and UUIDs change under the list lock",
}

LIST, SLOT = "list lock", "slot lock"
Identity = tuple[str, str]  # a name and a UUID, each in two words that say the same
FIRST: Identity = ("a", "A")


def sum_of(*what: object) -> object:
    return ("sum", *what)


class Record(Subject):
    """One slot; at first domain a (UUID A), committed by `cur` 0 with the tag "first"."""

    rules = RULES

    def locks(self) -> list[Word]:
        return [LIST, SLOT]

    def words(self) -> dict[Word, Any]:
        """`committed` is a fact: every (life, cur, name, UUID, tag) that ever counted."""
        name, uuid = FIRST
        words: dict[Word, Any] = {"life": 1, "cur": (0, 0), "sequence": 0, "entry": True}
        words.update({("uuid", half): uuid for half in (0, 1)})
        for which in (0, 1):
            words.update({("ids", which): "", ("version", which): ""})
            words.update({("status", which): ("", 0, None)})
            words.update({("name", which, 0): "", ("name", which, 1): ("", None)})
        words.update({("ids", 0): "first", ("version", 0): "first"})
        words["status", 0] = ("first", 0, sum_of(0, "first", 0, "first", "first"))
        words.update({("name", 0, 0): name, ("name", 0, 1): (name, sum_of(name, name, uuid, uuid))})
        words["committed"] = frozenset({(1, 0, name, uuid, "first")})
        return words

    def observe(self, memory: Memory) -> None:
        """Note what counts from now on, be it by a store of `cur` or of `life`."""
        life, (cur, seal) = memory["life"], memory["cur"]
        if not life & 1 or cur != seal:
            return
        tag, choice, _ = memory["status", cur & 1]
        name, uuid = memory["name", choice, 0], memory["uuid", 0]
        if all(cur != then or life != lived for lived, then, *_ in memory["committed"]):
            memory["committed"] = memory["committed"] | {(life, cur, name, uuid, tag)}

    # --- reading ---

    def read_fields(self, word: tuple[int, int]) -> Steps:
        """(sound, tag, choice)"""
        cur, seal = word
        ids = yield load(("ids", cur & 1))
        tag, choice, found = yield load(("status", cur & 1))
        version = yield load(("version", cur & 1))
        return found == sum_of(cur, ids, choice, tag, version) and cur == seal, tag, choice

    def read_name(self, choice: int) -> Steps:
        """(sound, name, UUID): sd_name_get."""
        uuid = (yield load(("uuid", 0))), (yield load(("uuid", 1)))
        first = yield load(("name", choice, 0))
        last, found = yield load(("name", choice, 1))
        return found == sum_of(first, last, *uuid), first, uuid[0]

    def settle(self) -> Steps:
        """(sound, choice): sd_values_settled."""
        while True:
            sound, choice, moved = yield call(self.settle_once)
            if not moved:
                return sound, choice

    def settle_once(self) -> Steps:
        cur = yield load("cur")
        sound, _, choice = yield call(self.read_fields, cur)
        if not self.follows("settled"):
            return sound, choice, False
        return sound, choice, (yield load("cur")) != cur

    def check_identity(self, who: str) -> Steps:
        """Of a living slot, while its name stays as it is."""
        sound, choice = yield call(self.settle)
        if not sound or not (yield call(self.read_name, choice))[0]:
            yield fail(f"{who} calls a sound record damaged")

    # --- locks ---

    def lock_list(self) -> Steps:
        if self.follows("list lock"):
            yield from self.enter(LIST, self.repair)

    def unlock_list(self) -> Steps:
        if self.follows("list lock"):
            yield unlock(LIST)

    def repair(self) -> Steps:
        """sd_rebuild_list."""
        was = yield load("sequence")
        yield store("sequence", was | 1)
        yield store("entry", False)
        if (yield load("life")) & 1:
            yield call(self.check_identity, "a repair of the list")
            yield store("entry", True)
        yield store("sequence", (was | 1) + 1)

    def lock_record(self) -> Steps:
        yield from self.enter(SLOT)
        yield call(self.check)

    def check(self) -> Steps:
        """What the next holder reads (sd_values_get, sd_name_get) is sound and committed."""
        life, cur = (yield load("life")), (yield load("cur"))
        if not life & 1:
            if cur[0] != cur[1]:
                yield fail("the next holder finds `cur` damaged")
            return
        sound, tag, choice = yield call(self.read_fields, cur)
        name_sound, name, uuid = yield call(self.read_name, choice)
        if not sound or not name_sound:
            yield fail("the next holder calls a sound record damaged")
        elif (life, cur[0], name, uuid, tag) not in (yield load("committed")):
            yield fail(f"the next holder reads {name, uuid, tag}, which was never committed")

    # --- writing ---

    def flip(self, tag: str, choice: int) -> Steps:
        """write_fields into the spare copy, then `cur`."""
        cur = (yield load("cur"))[0]
        to = (cur + 1) & 1 if self.follows("spare copy") else cur & 1
        total = sum_of(cur + self.follows("sum of the next"), tag, choice, tag, tag)
        early = total if self.follows("sum, then flip") else None
        yield store(("ids", to), tag)
        yield store(("status", to), (tag, choice, early))
        yield store(("version", to), tag)
        if not self.follows("sealed at once"):
            yield store("cur", (cur + 1, cur))
        yield store("cur", (cur + 1, cur + 1))
        if not self.follows("sum, then flip"):
            yield store(("status", to), (tag, choice, total))

    def choice(self) -> Steps:
        cur = (yield load("cur"))[0]
        return (yield load(("status", cur & 1)))[1]

    def write_name(self, which: int, name: str, uuid: str) -> Steps:
        yield store(("name", which, 0), name)
        halves = (name, name)
        if not self.follows("sum of what counts"):
            halves = (yield load(("name", 1 - which, 0))), (yield load(("name", 1 - which, 1)))[0]
        yield store(("name", which, 1), (name, sum_of(*halves, uuid, uuid)))

    # --- processes ---

    @process
    def commit(self, *tags: str) -> Steps:
        """All in one hold."""
        yield call(self.lock_record)
        for tag in tags if (yield load("life")) & 1 else ():
            choice = yield call(self.choice)
            yield call(self.flip, tag, choice)
        yield unlock(SLOT)

    @process
    def rename(self, *names: str) -> Steps:
        yield call(self.lock_list)
        yield call(self.lock_record)
        for name in names if (yield load("life")) & 1 else ():
            yield call(self.change_name, name)
        yield unlock(SLOT)
        yield call(self.unlock_list)

    def change_name(self, name: str) -> Steps:
        uuid = yield load(("uuid", 0))
        choice = yield call(self.choice)
        spare = 1 - choice if self.follows("spare name") else choice
        yield call(self.write_name, spare, name, uuid)
        yield call(self.begin)
        yield call(self.flip, name, spare)
        yield call(self.end)

    @process
    def replace(self, name: str, uuid: str) -> Steps:
        """Remove what is there, then insert into the slot."""
        yield call(self.lock_list)
        yield call(self.lock_record)
        if (yield load("life")) & 1:
            yield call(self.remove)
        yield call(self.insert, name, uuid)
        yield unlock(SLOT)
        yield call(self.unlock_list)

    def remove(self) -> Steps:
        life = yield load("life")
        yield call(self.begin)
        yield store("life", life + 1)
        yield store("entry", False)
        yield call(self.end)

    def insert(self, name: str, uuid: str) -> Steps:
        spare = 1 - (yield call(self.choice))
        known = uuid if self.follows("sum of the new UUID") else (yield load(("uuid", 0)))
        yield call(self.write_name, spare, name, known)
        yield store(("uuid", 0), uuid)
        yield store(("uuid", 1), uuid)
        yield call(self.flip, name, spare)
        yield call(self.begin)
        life = yield load("life")
        yield store("life", life | 1)
        yield store("entry", True)
        yield call(self.end)

    def view(self) -> Steps:
        """sd_view_begin, once: what moved meanwhile is read again, as another reader would."""
        life, cur = (yield load("life")), (yield load("cur"))
        if not life & 1:
            return
        sound, tag, choice = yield call(self.read_fields, cur)
        name_sound, name, uuid = yield call(self.read_name, choice)
        if self.follows("life again") and (yield load("life")) != life:
            return
        if self.follows("cur again") and self.moved(cur, (yield load("cur"))):
            return
        if not sound or not name_sound:
            yield fail("a reader calls a sound record damaged")
        elif (life, cur[0], name, uuid, tag) not in (yield load("committed")):
            yield fail(f"a reader accepts {name, uuid, tag}, which was never committed")

    def moved(self, before: tuple[int, int], after: tuple[int, int]) -> bool:
        return before != after if self.follows("whole") else (before[0] ^ after[0]) & 1 != 0

    def pass_by(self) -> Steps:
        """sd_find on its way to another domain: an entry leads here, is it damaged?"""
        before = yield load("sequence")
        if not (yield load("entry")) or not (yield load("life")) & 1:
            return
        sound, choice = yield call(self.settle)
        sound = sound and (yield call(self.read_name, choice))[0]
        after = yield load("sequence")
        stands = (before & 1 == 0 and before == after) or not self.follows("doubt")
        if not sound and stands:
            yield fail("a look-up calls a sound record damaged")

    def beside(self) -> Steps:
        """sd_rebuild_ids, which has no other lock than its own."""
        if (yield load("life")) & 1 and not (yield call(self.settle))[0]:
            yield fail("a repair of the ids calls a sound record damaged")

    def repair_list(self) -> Steps:
        """As after a repair that was put off."""
        yield call(self.lock_list)
        yield call(self.repair)
        yield call(self.unlock_list)

    def audit(self) -> Steps:
        yield after_all()
        yield call(self.lock_list)
        yield call(self.lock_record)
        yield unlock(SLOT)
        yield call(self.unlock_list)


def read(kills: int = 1, **how: Any) -> Model:
    record = Record(**how)
    return record.model(record.commit("x", "y"), record.rename("b"), record.view, kills=kills)


def read_replaced(kills: int = 2, **how: Any) -> Model:
    record = Record(**how)
    return record.model(record.replace("b", "B"), record.rename("c"), record.view, kills=kills)


def handed_on(kills: int = 3, **how: Any) -> Model:
    record = Record(**how)
    return record.model(
        record.commit("x", "y"), record.rename("b"), record.replace("c", "C"), kills=kills
    )


def repaired(kills: int = 1, **how: Any) -> Model:
    """The list is repaired beside who holds the slot."""
    record = Record(**how)
    return record.model(
        record.commit("x"), record.rename("b", "c"), record.repair_list, kills=kills
    )


def ids_repaired(kills: int = 1, **how: Any) -> Model:
    record = Record(**how)
    return record.model(
        record.commit("x", "y"), record.replace("b", "B"), record.beside, kills=kills
    )


def passed(kills: int = 1, **how: Any) -> Model:
    record = Record(**how)
    return record.model(record.rename("b"), record.replace("c", "C"), record.pass_by, kills=kills)


def crowd(kills: int = 2, **how: Any) -> Model:
    record = Record(**how)
    return record.model(
        record.commit("x", "y"),
        record.rename("b"),
        record.replace("c", "C"),
        record.view,
        kills=kills,
    )


MODELS = {
    "read": read,
    "read, replaced": lambda: read_replaced(kills=1),
    "handed on": lambda: handed_on(kills=2),
    "repaired": repaired,
    "ids repaired": ids_repaired,
    "passed": passed,
}
SOAK = {
    "handed on, three kills": handed_on,
    "repaired, three kills": lambda: repaired(kills=3),
    "passed, two kills": lambda: passed(kills=2),
    "crowd": crowd,
}
CONTROLS = {
    "sum, then flip": read,
    "sum of the next": handed_on,
    "sealed at once": ids_repaired,
    "spare copy": read,
    "spare name": read,
    "sum of what counts": handed_on,
    "sum of the new UUID": read_replaced,
    "cur again": read,
    "life again": read_replaced,
    "whole": read,
    "settled": ids_repaired,
    "doubt": passed,
    "list lock": repaired,
}
