"""The garbage in FREE slots, and who repairs the list lock (tidy_free_slots in locks.c).

Claims, in every state, besides those of `heap` (what is used is named, nothing is named twice, the
map says so while nobody has the heap lock):
- A remover or an inserter whose slot is FREE and names something holds the list lock, too: it
  leaves no garbage in a FREE slot without leaving the list lock dead.
- While the list lock is free, a FREE slot names nothing, unless somebody has its lock, or it is
  dirty (the heap lock was busy), or a look-up that came too late was killed with its lock, or a
  repair found the heap lock busy.
- At its end a repair of the list lock leaves nothing in any FREE slot but those whose lock was
  held and those from the first one on for which the heap lock was busy.
- Nobody waits for ever: a slot's lock is only tried, since who has it may be stopped. The model's
  stopped one waits for the list lock with the slot's lock in its hand; the library refuses that.

Remove, list and slot lock held: `life`, `dirty` 1, under the heap lock the descriptors and the map,
`dirty` 0, slot unlocked, list unlocked. A repair, for each FREE slot that names something: its lock
tried, after a death as in `slots`, then `life` again and as above. What a repair makes of the
indexes is the business of `index`.
"""

from __future__ import annotations

from typing import Any

from . import heap
from .explorer import BUSY, DEAD, DIED, FREE, Memory, Model, Routine, Steps, Word
from .heap import HEAP, Heap
from .operations import after_all, attempt, call, consistent, fail, load, lock, store, unlock
from .subject import process

RULES = {
    "tidied": "who repairs the list lock frees what FREE slots name",
    "tidied before consistent": "the list lock is consistent and free after that, not before",
    "every slot": "a slot whose lock is held does not end the search",
    "tried": "the repair does not wait for a slot's lock",
    "freed with the list": "a remover frees its blobs before it unlocks the list",
    "at once": "a descriptor is cleared and its cells are freed in one hold of the heap lock",
    "a lock": "a FREE slot is tidied under its own lock or the list's",
    "life stands": "`life` is looked at under a lock that is held until the slot is tidied",
}

UNNEEDED = {
    "slot lock": "a FREE slot is tidied under its own lock",
    "life again": "`life` is looked at again under the slot's lock",
    "clear, then map": "a descriptor is cleared before the map says that its cells are free",
}
"""What the code keeps although the claims hold without. The first two: the repair has the list
lock, so nobody makes a FREE slot live meanwhile or allocates for it. Had it let go of that lock
before, each of them would matter (`a lock`, `life stands`). The third: see `heap`."""

LIST = "list lock"
WITHOUT_LIST = ("a lock", "life stands")
"""Rules that are dropped together with the list lock."""


class FreeSlots(Heap):
    """Slots with one blob each under a list lock; a process's number says what it may be blamed
    for: `changers` insert and remove, `finders` have a slot's lock without the list's."""

    rules = heap.RULES | heap.UNNEEDED | RULES | UNNEEDED
    changers: range
    finders: range

    def __init__(self, slots: int = 1, cells: int = 3, free: int = 0, dropped: str = ""):
        super().__init__(slots, cells, free=free, dropped=dropped)

    def words(self) -> dict[Word, Any]:
        """Facts: `stale`, a finder was killed with the slot's lock; `put off`, a repair ended
        early."""
        words = super().words()
        words["put off"] = 0
        words.update({("stale", slot): 0 for slot in range(self.slots)})
        return words

    def locks(self) -> list[Word]:
        return [LIST, *super().locks()]

    def bury(self, memory: Memory, process: int) -> None:
        for slot in range(self.slots):
            if process in self.finders and memory["slot lock", slot] == DEAD:
                memory["stale", slot] = 1

    # --- the list lock and its repair ---

    def lock_list(self) -> Steps:
        if (yield lock(LIST)) != DIED:
            return
        if not self.follows("tidied before consistent"):
            yield consistent(LIST)
            yield unlock(LIST)
            yield call(self.tidy_free_slots)
            yield call(self.lock_list)
            return
        yield call(self.tidy_free_slots)
        yield consistent(LIST)

    def tidy_free_slots(self) -> Steps:
        """sd_tidy_free_slots, and whether it did what it promises."""
        left: set[int] = set()
        for slot in range(self.slots) if self.follows("tidied") else ():
            if not (yield call(self.holds_garbage, slot)):
                continue
            outcome = yield call(self.tidy_free_slot, slot)
            if outcome == "put off":
                yield store("put off", 1)
                left.update(range(slot, self.slots))
                break
            if outcome == "held":
                left.add(slot)
                if not self.follows("every slot"):
                    break
        yield call(self.check, frozenset(left))

    def check(self, left: frozenset[int]) -> Steps:
        for slot in range(self.slots) if self.dropped not in WITHOUT_LIST else ():
            if slot not in left and (yield call(self.holds_garbage, slot)):
                yield fail(f"has repaired the list and leaves garbage in the FREE slot {slot}")

    def holds_garbage(self, slot: int) -> Steps:
        named = yield call(self.named, slot)
        return any(named) and not (yield load(("life", slot)))

    def named(self, slot: int) -> Steps:
        first = yield load(("extent", slot, 0))
        return first, (yield load(("extent", slot, 1)))

    def tidy_free_slot(self, slot: int) -> Steps:
        if self.dropped in WITHOUT_LIST:
            yield consistent(LIST)
            yield unlock(LIST)
        outcome = yield call(self.tidy_locked, slot)
        if self.dropped in WITHOUT_LIST and (yield lock(LIST)) == DIED:
            yield consistent(LIST)
        return outcome

    def tidy_locked(self, slot: int) -> Steps:
        locked = self.follows("slot lock") and self.follows("a lock")
        take = self.try_slot if self.follows("tried") else self.lock_slot
        if locked and (yield call(take, slot)) == BUSY:
            return "held"
        if self.follows("life again") and self.follows("life stands"):
            yield call(self.tidy, slot)
        else:
            yield call(self.tidy_as_free, slot)
        put_off = yield load(("dirty", slot))
        if locked:
            yield unlock(("slot lock", slot))
        return "put off" if put_off else "done"

    def try_slot(self, slot: int) -> Steps:
        outcome = yield attempt(("slot lock", slot))
        if outcome == DIED:
            yield call(self.tidy, slot)
            yield consistent(("slot lock", slot))
        return outcome

    def tidy(self, slot: int) -> Steps:
        if self.follows("at once"):
            yield from super().tidy(slot)
            return
        yield store(("dirty", slot), 1)
        if (yield call(self.try_heap)) == BUSY:
            return
        uncounted = yield call(self.uncounted, slot)
        for _, extent in uncounted:
            yield call(self.mark, extent, False)
            yield call(self.add, "used", -extent[1])
        yield unlock(HEAP)
        for which, _ in uncounted:
            yield store(("extent", slot, which), None)
        yield store(("dirty", slot), 0)

    def uncounted(self, slot: int) -> Steps:
        life = yield load(("life", slot))
        counts = (yield call(self.counting, slot))[0]
        named = yield call(self.named, slot)
        return tuple((w, e) for w, e in enumerate(named) if e and not (life and w == counts))

    def tidy_as_free(self, slot: int) -> Steps:
        """Like `tidy`, by somebody who does not look at `life`."""
        yield store(("dirty", slot), 1)
        if (yield call(self.try_heap)) == BUSY:
            return
        for which in (0, 1):
            yield call(self.free, slot, which)
        yield store(("dirty", slot), 0)
        yield unlock(HEAP)

    def try_heap(self) -> Steps:
        outcome = yield attempt(HEAP)
        yield from self.entered(outcome)
        return outcome

    # --- processes ---

    @process
    def removal(self, slot: int) -> Steps:
        yield call(self.lock_list)
        yield call(self.lock_slot, slot)
        if (yield load(("life", slot))):
            yield store(("life", slot), 0)
            if not self.follows("freed with the list"):
                yield unlock(LIST)
            yield call(self.tidy, slot)
            if not self.follows("freed with the list"):
                yield call(self.lock_list)
        yield unlock(("slot lock", slot))
        yield unlock(LIST)

    @process
    def insertion(self, slot: int, size: int) -> Steps:
        """Into this slot, if its lock is to be had at once (the code would try another slot)."""
        yield call(self.lock_list)
        free = not (yield load(("life", slot)))
        if free and (yield call(self.try_slot, slot)) != BUSY:
            yield call(self.insert_blob, slot, size)
            yield unlock(("slot lock", slot))
        yield unlock(LIST)

    def repair(self) -> Steps:
        """Anybody who takes the list lock."""
        yield call(self.lock_list)
        yield unlock(LIST)

    @process
    def finder(self, slot: int) -> Steps:
        """Locks what it found, sees that it is gone, lets go. (Not `lock_slot`: a process is not
        killed before its own first step, and so never without the lock.)"""
        if (yield lock(("slot lock", slot))) == DIED:
            yield call(self.tidy, slot)
            yield consistent(("slot lock", slot))
        yield unlock(("slot lock", slot))

    @process
    def stopped(self, slot: int) -> Steps:
        """The same, stopped when it has the lock of a FREE slot, until it gets the list lock."""
        if (yield lock(("slot lock", slot))) == DIED:
            yield call(self.tidy, slot)
            yield consistent(("slot lock", slot))
        if not (yield load(("life", slot))):
            yield call(self.repair)
        yield unlock(("slot lock", slot))

    def audit(self) -> Steps:
        yield after_all()
        yield call(self.repair)
        yield call(super().audit)

    def walked(
        self, changers: list[Routine], finders: list[Routine], *others: Routine, kills: int
    ) -> Model:
        self.changers = range(len(changers))
        self.finders = range(len(changers), len(changers) + len(finders))
        return self.model(*changers, *finders, *others, kills=kills)

    # --- what must hold ---

    def claim(self, memory: Memory) -> str | None:
        for slot in range(self.slots):
            named = memory["extent", slot, 0] or memory["extent", slot, 1]
            wrong = self.garbage_claim(memory, slot) if named and not memory["life", slot] else None
            if wrong:
                return f"slot {slot}: {wrong}"
        return super().claim(memory)

    def garbage_claim(self, memory: Memory, slot: int) -> str | None:
        if self.dropped in WITHOUT_LIST:
            return None
        holder = memory.holder(("slot lock", slot))
        if holder in self.changers and memory.holder(LIST) != holder:
            return f"it is FREE, and {holder} has its garbage and not the list lock"
        excused = holder is not None or memory["dirty", slot] or memory["stale", slot]
        if memory[LIST] == FREE and not excused and not memory["put off"]:
            return "it is FREE and has garbage, and the list lock is free"
        return None


def removed(kills: int = 2, **how: Any) -> Model:
    """A remover, who repairs after it, a look-up that comes too late."""
    slots = FreeSlots(**how)
    return slots.walked([slots.removal(0)], [slots.finder(0)], slots.repair, kills=kills)


def two_repair(kills: int = 3, **how: Any) -> Model:
    """A repair of the repair."""
    slots = FreeSlots(**how)
    return slots.walked([slots.removal(0)], [], slots.repair, slots.repair, kills=kills)


def reused(kills: int = 2, **how: Any) -> Model:
    slots = FreeSlots(**how)
    return slots.walked(
        [slots.removal(0), slots.insertion(0, 1)], [slots.finder(0)], slots.repair, kills=kills
    )


def two_inserts(kills: int = 2, **how: Any) -> Model:
    slots = FreeSlots(free=1, **how)
    return slots.walked(
        [slots.insertion(0, 1), slots.insertion(0, 1)], [slots.finder(0)], kills=kills
    )


def stopped(kills: int = 1, **how: Any) -> Model:
    """Who has the slot's lock goes on only when the list has been repaired."""
    slots = FreeSlots(**how)
    return slots.walked([slots.removal(0)], [slots.stopped(0)], slots.repair, kills=kills)


def beside(kills: int = 2, **how: Any) -> Model:
    """The heap lock is busy or dead: a neighbour commits."""
    slots = FreeSlots(2, 4, **how)
    return slots.walked([slots.removal(0)], [], slots.commit(1, 1), slots.repair, kills=kills)


def put_off(kills: int = 1, **how: Any) -> Model:
    """A remover does not get the heap lock; its slot is used again, garbage and all."""
    slots = FreeSlots(2, 4, **how)
    return slots.walked(
        [slots.removal(0), slots.insertion(0, 1)], [], slots.commit(1, 1), kills=kills
    )


def two_free(kills: int = 2, **how: Any) -> Model:
    slots = FreeSlots(2, 3, **how)
    return slots.walked(
        [slots.removal(0), slots.removal(1)], [slots.finder(0)], slots.repair, kills=kills
    )


def crowd(kills: int = 2, **how: Any) -> Model:
    slots = FreeSlots(2, 4, **how)
    return slots.walked(
        [slots.removal(0), slots.insertion(0, 1)],
        [slots.finder(0)],
        slots.commit(1, 1),
        slots.repair,
        kills=kills,
    )


MODELS = {
    "removed": lambda: removed(kills=3),
    "two repair": two_repair,
    "reused": reused,
    "two inserts": two_inserts,
    "stopped": lambda: stopped(kills=2),
    "beside": beside,
    "put off": put_off,
    "two free": lambda: two_free(kills=1),
    "unneeded: slot lock": lambda: reused(dropped="slot lock"),
    "unneeded: life again": lambda: reused(dropped="life again"),
    "unneeded: clear, then map": lambda: beside(kills=1, dropped="clear, then map"),
}
SOAK = {
    "two free, three kills": lambda: two_free(kills=3),
    "reused, four kills": lambda: reused(kills=4),
    "crowd": crowd,
}
CONTROLS = {
    "tidied": removed,
    "tidied before consistent": two_repair,
    "every slot": two_free,
    "tried": stopped,
    "freed with the list": removed,
    "at once": beside,
    "a lock": reused,
    "life stands": reused,
}
