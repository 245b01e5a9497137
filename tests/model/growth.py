"""New slots beside a repair (record.c: add_slots; rebuild.c; segment.h: sd_slot_count).

A new slot is counted by the holder of the list lock alone; the repairs of the id index and of the
heap's map, which have other locks, read the count meanwhile and compare it with the watermark of
committed memory, for damage. A repair that looks at the count again may see the next one: to take
that for damage poisons a sound segment.

Claims: a segment of which no word was damaged is never poisoned; a slot is counted after its mutex
is initialised and its memory committed; a repair misses no slot that has an entry or an extent.

add_slots: watermark (if it has to rise), mutex, next_free, count, head of the free list.
"""

from __future__ import annotations

from typing import Any

from .explorer import FREE, Memory, Model, Steps, Word
from .operations import after_all, call, load, store, unlock
from .subject import Subject

RULES = {
    "one look": "a repair compares the watermark with the count that it read, not a later one",
    "count, then watermark": "the count is read before the watermark: it is never ahead of it",
    "watermark first": "the watermark rises before the count passes it",
    "mutex first": "a slot is counted after its mutex is initialised",
    "count, then head": "a slot is counted before the free list leads to it",
    "use after count": "a slot is used after it was counted",
}
LIST, OTHER = "list lock", "id or heap lock"


class Growth(Subject):
    """One slot that is in use, and room for more. `used` holds the slots that a repair must see."""

    rules = RULES

    def locks(self) -> list[Word]:
        return [LIST, OTHER]

    def words(self) -> dict[Word, Any]:
        words: dict[Word, Any] = {"count": 1, "watermark": 1, "head": 0, "poisoned": 0}
        words.update({"mutexes": frozenset({0}), "used": frozenset({0}), "table": frozenset({0})})
        return words

    # --- the other lock ---

    def lock_other(self) -> Steps:
        yield from self.enter(OTHER, self.rebuild)

    def slot_count(self) -> Steps:
        """sd_slot_count: (count or 0, count as read)."""
        if self.follows("count, then watermark"):
            count = yield load("count")
            watermark = yield load("watermark")
        else:
            watermark = yield load("watermark")
            count = yield load("count")
        return count if count <= watermark else 0, count

    def rebuild(self) -> Steps:
        checked, read = yield call(self.slot_count)
        if checked != (read if self.follows("one look") else (yield load("count"))):
            yield store("poisoned", 1)
            return
        yield store("table", frozenset())
        used = yield load("used")
        for slot in range(checked):
            if slot in used:
                table = yield load("table")
                yield store("table", table | {slot})

    # --- processes ---

    def insert(self) -> Steps:
        """A new slot, then an entry or extent of its own."""
        yield from self.enter(LIST, self.rebuild_list)
        slot = yield call(self.free_slot)
        yield call(self.use, slot)
        yield unlock(LIST)

    def rebuild_list(self) -> Steps:
        """sd_rebuild_list, as far as the free list goes."""
        count = yield load("count")
        used = yield load("used")
        free = [slot for slot in range(count) if slot not in used]
        yield store("head", free[0] + 1 if free else 0)

    def free_slot(self) -> Steps:
        head = yield load("head")
        if not head:
            head = yield call(self.add_slot)
        yield store("head", 0)
        return head - 1

    def add_slot(self) -> Steps:
        slot = yield load("count")
        steps = [self.raise_watermark, self.make_mutex, self.count, self.lead]
        if not self.follows("watermark first"):
            steps = [self.make_mutex, self.count, self.raise_watermark, self.lead]
        elif not self.follows("mutex first"):
            steps = [self.raise_watermark, self.count, self.make_mutex, self.lead]
        elif not self.follows("count, then head"):
            steps = [self.raise_watermark, self.make_mutex, self.lead, self.count]
        elif not self.follows("use after count"):
            steps = [self.raise_watermark, self.make_mutex, self.use, self.count, self.lead]
        for step in steps:
            yield call(step, slot)
        return slot + 1

    def raise_watermark(self, slot: int) -> Steps:
        if (yield load("watermark")) == slot:
            yield store("watermark", slot + 1)

    def make_mutex(self, slot: int) -> Steps:
        made = yield load("mutexes")
        yield store("mutexes", made | {slot})

    def count(self, slot: int) -> Steps:
        yield store("count", slot + 1)

    def lead(self, slot: int) -> Steps:
        yield store("head", slot + 1)

    def use(self, slot: int) -> Steps:
        """What an activation or a new extent of this slot enters, both in one step here."""
        yield call(self.lock_other)
        used, table = (yield load("used")), (yield load("table"))
        yield store("used", used | {slot}, ("table", table | {slot}))
        yield unlock(OTHER)

    def holder(self) -> Steps:
        yield call(self.lock_other)
        table = yield load("table")
        yield store("table", table)
        yield unlock(OTHER)

    def audit(self) -> Steps:
        yield after_all()
        yield from self.enter(LIST, self.rebuild_list)
        yield unlock(LIST)
        yield call(self.lock_other)
        yield unlock(OTHER)

    # --- what must hold ---

    def claim(self, memory: Memory) -> str | None:
        count = memory["count"]
        if memory["poisoned"]:
            return "the segment is poisoned, and nothing was damaged"
        if not set(range(count)) <= memory["mutexes"]:
            return "a slot is counted and has no mutex"
        if count > memory["watermark"]:
            return "a slot is counted and has no memory"
        if memory["head"] > count:
            return "the free list leads to a slot that is not counted"
        if memory[OTHER] == FREE and memory["table"] != memory["used"]:
            return f"{sorted(memory['used'])} are in use, {sorted(memory['table'])} are entered"
        return None


def one_grows(kills: int = 2, **how: Any) -> Model:
    growth = Growth(**how)
    return growth.model(growth.insert, growth.holder, growth.holder, kills=kills)


def two_grow(kills: int = 2, **how: Any) -> Model:
    growth = Growth(**how)
    return growth.model(growth.insert, growth.insert, growth.holder, growth.holder, kills=kills)


MODELS = {"one grows": one_grows, "two grow": two_grow}
SOAK = {"two grow, four kills": lambda: two_grow(kills=4)}
CONTROLS = dict.fromkeys(RULES, one_grows)
