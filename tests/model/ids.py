"""The id index, its sequence and `next_id`, under a lock of their own (I4, I5; record.c,
rebuild.c).

Claims, in every state:
- No two living domains have the same committed id, and no id is given out twice.
- While nobody holds the id lock (and nobody died with it) the index is what is committed, its
  sequence is even, and the number of active domains is right.
- A look-up by id without a lock says "not there" only if that was so at some moment of it; what it
  finds, under the slot's lock, has that id.

Activate: slot lock; id lock, `next_id` + 1, id lock freed; later, to commit: id lock, sequence odd,
new entry, count, spare field copy, `cur`, old entry, count, sequence even, id lock freed. Remove:
id lock, sequence odd, life, entry, count, sequence even. An insert goes without the id lock: it
flips a FREE slot to "no id", then stores life. A repair: sequence | 1, table emptied, entries of
living slots from committed copies whose `cur` stood still, count, sequence + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .explorer import FREE, Memory, Model, Steps, Word
from .operations import after_all, call, fail, load, store, unlock
from .subject import Subject, process

RULES = {
    "held from the entry on": "the id lock is not let go between the new entry and the flip",
    "held from the flip on": "the id lock is not taken only after the flip, to enter the id",
    "odd": "the sequence is odd while index and committed ids differ (an entry may come late)",
    "odd or 1": "a repair sets the lowest bit of the sequence; adding 1 may make it even",
    "even last": "a repair makes the sequence even after its last store",
    "next_id first": "`next_id` is stored before the id is used",
    "doubt": "a miss counts only if the sequence was even and unchanged",
    "id lock": "a doubtful miss takes the id lock, not another one",
    "verified": "a hit is verified under the slot's lock",
    "living only": "a repair enters ids of living slots only",
    "count rebuilt": "a repair counts the active domains anew",
    "remove takes the id": "the removal of an active domain holds the id lock",
}
UNNEEDED = {"entered first": "a new entry is stored before `cur` commits the id"}
"""Kept although the claims hold without: inside of the id lock, with an odd sequence, nobody
believes a miss; a hit is not believed unverified."""

IDS, LIST = "id lock", "list lock"


class Ids(Subject):
    """Two slots that live; if `active`, slot 0 has id 1 already, else both are inactive."""

    rules = RULES | UNNEEDED
    slots = 2

    def __init__(self, ids: int = 3, active: bool = False, dropped: str = ""):
        super().__init__(dropped)
        self.ids, self.active = range(1, ids + 1), int(active)
        self.sought: set[int] = set()

    def locks(self) -> list[Word]:
        return [IDS, LIST, *self.slot_locks()]

    def words(self) -> dict[Word, Any]:
        """`absent` are facts: whether the id was nobody's at some moment of the look-up."""
        words: dict[Word, Any] = {"next": 1 + self.active, "sequence": 0, "active": self.active}
        words.update({("entry", i): 0 if i <= self.active else None for i in self.ids})
        words.update({("absent", i): 0 for i in self.sought})
        for slot in range(self.slots):
            words.update({("life", slot): 1, ("cur", slot): 0})
            words["copy", slot, 0] = 1 if slot < self.active else None
            words["copy", slot, 1] = None
        return words

    def observe(self, memory: Memory) -> None:
        committed = self.committed(memory)
        for i in self.sought:
            if i not in committed:
                memory["absent", i] = 1

    def committed(self, memory: Memory) -> list[int]:
        """The committed id of each living slot that has one."""
        return [i for i in (self.id_of(memory, slot) for slot in range(self.slots)) if i]

    def id_of(self, memory: Memory, slot: int) -> int | None:
        return memory["copy", slot, memory["cur", slot] & 1] if memory["life", slot] else None

    # --- locks and repair ---

    def lock_ids(self) -> Steps:
        yield from self.enter(IDS, self.rebuild)

    def rebuild(self) -> Steps:
        """sd_rebuild_ids."""
        was = yield load("sequence")
        odd = was | 1 if self.follows("odd or 1") else was + 1
        yield store("sequence", odd if self.follows("even last") else odd + 1)
        yield call(self.clear)
        active = 0
        for slot in range(self.slots):
            i = yield call(self.enter_committed, slot)
            active += i is not None
        if self.follows("count rebuilt"):
            yield store("active", active)
        yield store("sequence", odd + 1)

    def clear(self) -> Steps:
        for i in self.ids:
            if (yield load(("entry", i))) is not None:
                yield store(("entry", i), None)

    def enter_committed(self, slot: int) -> Steps:
        if self.follows("living only") and not (yield load(("life", slot))):
            return None
        i = yield call(self.settled, "copy", slot)
        if i:
            yield store(("entry", i), slot)
        return i

    # --- changes ---

    def begin(self) -> Steps:
        if self.follows("odd"):
            yield from super().begin()

    def end(self) -> Steps:
        yield from self.add("sequence", 1 if self.follows("odd") else 2)

    def take_id(self) -> Steps:
        """sd_take_id."""
        yield call(self.lock_ids)
        i = yield load("next")
        if i in self.ids and self.follows("next_id first"):
            yield store("next", i + 1)
        yield unlock(IDS)
        return i if i in self.ids else None

    def used(self, i: int | None) -> Steps:
        if i and not self.follows("next_id first"):
            yield call(self.lock_ids)
            yield store("next", i + 1)
            yield unlock(IDS)

    def change(self, slot: int, new: int | None) -> Steps:
        """sd_commit of another id; slot lock held."""
        cur = yield load(("cur", slot))
        old = yield load(("copy", slot, cur & 1))
        if not self.follows("held from the entry on"):
            yield call(self.enter_alone, slot, old, new)
            yield call(self.flip, slot, cur, new)
            return
        if not self.follows("held from the flip on"):
            yield call(self.flip, slot, cur, new)
            yield call(self.enter_alone, slot, old, new)
            return
        yield call(self.lock_ids)
        yield call(self.begin)
        if self.follows("entered first") and self.follows("odd"):
            yield call(self.enter_id, new, slot)
            yield call(self.flip, slot, cur, new)
        else:
            yield call(self.flip, slot, cur, new)
            yield call(self.enter_id, new, slot)
        yield call(self.leave_id, old)
        yield call(self.end)
        yield unlock(IDS)

    def enter_alone(self, slot: int, old: int | None, new: int | None) -> Steps:
        yield call(self.lock_ids)
        yield call(self.begin)
        yield call(self.enter_id, new, slot)
        yield call(self.leave_id, old)
        yield call(self.end)
        yield unlock(IDS)

    def enter_id(self, i: int | None, slot: int) -> Steps:
        if i:
            yield store(("entry", i), slot)
            yield call(self.add, "active", 1)

    def leave_id(self, i: int | None) -> Steps:
        if i:
            yield store(("entry", i), None)
            yield call(self.add, "active", -1)

    def flip(self, slot: int, cur: int, i: int | None) -> Steps:
        yield store(("copy", slot, 1 - (cur & 1)), i)
        yield store(("cur", slot), cur + 1)

    # --- processes ---

    @process
    def activate(self, slot: int, then_stop: bool = False) -> Steps:
        yield call(self.lock_slot, slot)
        yield call(self.start, slot)
        if then_stop:
            yield call(self.change, slot, None)
        yield unlock(("slot lock", slot))

    def start(self, slot: int) -> Steps:
        cur = yield load(("cur", slot))
        if not (yield load(("life", slot))) or (yield load(("copy", slot, cur & 1))):
            return
        i = yield call(self.take_id)
        if i:
            yield call(self.change, slot, i)
            yield call(self.used, i)

    @process
    def give_up(self, slot: int) -> Steps:
        """Takes an id and rolls back."""
        yield call(self.lock_slot, slot)
        yield call(self.take_id)
        yield unlock(("slot lock", slot))

    @process
    def replace(self, slot: int) -> Steps:
        """Remove the domain, active or not, and insert another into its slot."""
        yield call(self.lock_slot, slot)
        if (yield load(("life", slot))):
            yield call(self.remove, slot)
        cur = yield load(("cur", slot))
        yield call(self.flip, slot, cur, None)
        yield store(("life", slot), 1)
        yield unlock(("slot lock", slot))

    def remove(self, slot: int) -> Steps:
        cur = yield load(("cur", slot))
        i = yield load(("copy", slot, cur & 1))
        if not i or not self.follows("remove takes the id"):
            yield store(("life", slot), 0)
            return
        yield call(self.lock_ids)
        yield call(self.begin)
        yield store(("life", slot), 0)
        yield call(self.leave_id, i)
        yield call(self.end)
        yield unlock(IDS)

    def get(self, i: int) -> Callable[[], Steps]:
        self.sought.add(i)

        def process() -> Steps:
            yield store(("absent", i), 0)
            slot, sure = yield call(self.find, i)
            if slot is None and not sure:
                slot = yield call(self.find_for_sure, i)
            if slot is None:
                if not (yield load(("absent", i))):
                    yield fail(f"does not find id {i}, which was there all the time")
                return
            yield call(self.lock_slot, slot)
            matches = yield call(self.matches, slot, i)
            if not self.follows("verified") and not matches:
                yield fail(f"takes slot {slot} for the domain with id {i}")
            yield unlock(("slot lock", slot))

        return process

    def find(self, i: int) -> Steps:
        """sd_find: (slot or None, whether a miss counts)."""
        before = yield load("sequence")
        slot = yield load(("entry", i))
        if slot is not None and (yield call(self.matches, slot, i)):
            return slot, True
        after = yield load("sequence")
        return None, not self.follows("doubt") or (not before & 1 and before == after)

    def matches(self, slot: int, i: int) -> Steps:
        if not (yield load(("life", slot))):
            return False
        return (yield call(self.settled, "copy", slot)) == i

    def find_for_sure(self, i: int) -> Steps:
        if self.follows("id lock"):
            yield call(self.lock_ids)
        else:
            yield from self.enter(LIST)
        slot = (yield call(self.find, i))[0]
        yield unlock(IDS if self.follows("id lock") else LIST)
        return slot

    def audit(self) -> Steps:
        yield after_all()
        yield call(self.lock_ids)
        yield unlock(IDS)

    # --- what must hold ---

    def claim(self, memory: Memory) -> str | None:
        committed = self.committed(memory)
        if len(set(committed)) != len(committed):
            return f"one id is two domains': {committed}"
        return self.index_claim(memory, committed) if memory[IDS] == FREE else None

    def index_claim(self, memory: Memory, committed: list[int]) -> str | None:
        if memory["sequence"] & 1:
            return "the id lock is free and the sequence odd"
        if memory["active"] != len(committed):
            return f"{memory['active']} active domains are counted, they are {len(committed)}"
        truth = {self.id_of(memory, slot): slot for slot in range(self.slots)}
        for i in self.ids:
            if memory["entry", i] != truth.get(i):
                return f"the index leads from id {i} to {memory['entry', i]}, not {truth.get(i)}"
        return None


def start_stop(kills: int = 1, **how: Any) -> Model:
    ids = Ids(**how)
    return ids.model(ids.activate(0, True), ids.activate(1), ids.get(1), kills=kills)


def rolled_back(kills: int = 1, **how: Any) -> Model:
    ids = Ids(**how)
    return ids.model(ids.give_up(0), ids.activate(0), ids.activate(1), kills=kills)


def replaced(kills: int = 1, **how: Any) -> Model:
    """A slot that is removed and reused while another's death has the index rebuilt."""
    ids = Ids(ids=2, **how)
    return ids.model(ids.activate(0), ids.replace(0), ids.activate(1), kills=kills)


def three(kills: int = 2, **how: Any) -> Model:
    ids = Ids(**how)
    return ids.model(ids.activate(0), ids.activate(1, True), ids.activate(1), kills=kills)


def repair_seen(kills: int = 1, **how: Any) -> Model:
    """A look-up while the index is repaired."""
    ids = Ids(active=True, **how)
    return ids.model(ids.activate(1), ids.activate(1), ids.get(1), kills=kills)


def looked_up(kills: int = 2, **how: Any) -> Model:
    ids = Ids(**how)
    return ids.model(ids.activate(0), ids.activate(1), ids.activate(1), ids.get(1), kills=kills)


MODELS = {
    "start, stop": start_stop,
    "repair seen": repair_seen,
    "rolled back": rolled_back,
    "replaced": replaced,
    "three": lambda: three(kills=1),
    "unneeded: entered first": lambda: repair_seen(dropped="entered first"),
}
SOAK = {
    "start, stop, two kills": lambda: start_stop(kills=2),
    "rolled back, two kills": lambda: rolled_back(kills=2),
    "replaced, two kills": lambda: replaced(kills=2),
    "three, two kills": three,
    "looked up": looked_up,
}
CONTROLS = {
    "held from the entry on": three,
    "held from the flip on": three,
    "odd": start_stop,
    "odd or 1": repair_seen,
    "even last": repair_seen,
    "next_id first": three,
    "doubt": start_stop,
    "id lock": repair_seen,
    "verified": start_stop,
    "living only": replaced,
    "count rebuilt": three,
    "remove takes the id": replaced,
}
