"""A slot's lock: its owner record, the record of a death, and the garbage (locks.c).

Claims, in every state:
- Who may go on with a lock reads in its owner record its own name or nothing; a lock that nobody
  holds has an empty one. An older owner is never named.
- Who gets the domain after a death finds a death recorded, and if the dead one had signed, its name
  and pid and nobody else's, however many recoverers died in between or passed it on without being
  given the domain.
- A recorded name is a dead one's, and its pid belongs to it.
- While the lock is free and `dirty` is 0, there is no garbage.

Lock: after a death `died_pid` (half a word in the core), `died_who` (left alone where the owner
record is empty and a death is recorded), `dirty` 1, garbage freed if the heap lock is to be had,
owner empty, consistent; only then the signature: pid, then who. Unlock: `died_who` cleared by a
holder who was given the domain, owner empty, unlock.
"""

from __future__ import annotations

from typing import Any

from .explorer import BUSY, DEAD, DIED, FREE, REPAIRING, Memory, Model, Routine, Steps, Word
from .operations import after_all, attempt, call, consistent, fail, load, lock, store, unlock
from .subject import Subject, process

RULES = {
    "recorded": "a death is recorded in the slot, not only told to who locks next",
    "record, then empty": "the dead one's name is recorded before the owner record is emptied",
    "record, then sign": "a recoverer signs after it has recorded the death",
    "empty, then sign": "the owner record is emptied before the lock is consistent and signed",
    "pid first": "the pid is stored before the name that it belongs to, in both records",
    "first death stays": "a recoverer who finds no owner leaves a recorded name alone",
    "unknown is recorded": "a death without a signature is recorded as of somebody unknown",
    "cleared by who was given it": "who only passes the lock on leaves the record alone",
    "cleared at unlock": "the record is cleared at the unlock, not when it is read",
    "cleared under the lock": "the record is cleared before the lock is free",
    "owner cleared": "the owner record is emptied at unlock",
    "consistent": "the mutex is made consistent before it is unlocked",
    "before consistent": "record and owner are in order before the lock is consistent",
    "marked dirty": "who may not get the heap lock marks the slot dirty first",
}

UNNEEDED = {
    "garbage, then dirty 0": "`dirty` is 0 again after the last garbage is freed, not before",
}
"""Orders that the code keeps although the claims hold without: a death between the two stores
leaves the lock dead, and the next one tidies again."""

SLOT, HEAP = "slot lock", "heap lock"
UNKNOWN = "somebody"
NOBODY = None


class Slot(Subject):
    """One slot; process `n` is thread n + 1 of process n + 1 (0 is nobody)."""

    rules = RULES | UNNEEDED

    def locks(self) -> list[Word]:
        return [SLOT, HEAP]

    def words(self) -> dict[Word, Any]:
        """Facts: `dead`; `died`: one of them with the lock; `victim`: it had signed, too."""
        words: dict[Word, Any] = {"who": NOBODY, "pid": NOBODY}
        words.update({"died_who": NOBODY, "died_pid": NOBODY, "dirty": 0, "garbage": 0})
        words.update({"victim": NOBODY, "died": 0, "dead": frozenset()})
        return words

    def bury(self, memory: Memory, process: int) -> None:
        memory["dead"] = memory["dead"] | {process}
        if memory[SLOT] == DEAD:
            memory["died"] = 1
            if memory["who"] == process:
                memory["victim"] = process

    # --- lock and unlock ---

    def lock_and_sign(self, me: int) -> Steps:
        if (yield lock(SLOT)) == DIED:
            yield call(self.recover, me)
        yield call(self.sign, me)

    def recover(self, me: int) -> Steps:
        steps = [self.record, self.tidy, self.empty_owner]
        if not self.follows("record, then empty"):
            steps = [self.empty_owner, self.record, self.tidy]
        if not self.follows("record, then sign"):
            yield call(self.sign, me)
        if not self.follows("before consistent"):
            yield consistent(SLOT)
        who, pid = yield call(self.owner)
        for step in steps:
            yield call(step, who, pid)
        if self.follows("consistent") and self.follows("before consistent"):
            yield consistent(SLOT)

    def owner(self) -> Steps:
        who = yield load("who")
        return who, (yield load("pid"))

    def record(self, who: int | None, pid: int | None) -> Steps:
        """The first half of sd_recover_slot."""
        if not self.follows("recorded"):
            return
        if who is NOBODY and not self.follows("unknown is recorded"):
            return
        known = yield load("died_who")
        if who is NOBODY and known is not NOBODY and self.follows("first death stays"):
            return
        name = UNKNOWN if who is NOBODY else who
        yield call(self.write, "died_", name, pid if who is not NOBODY else NOBODY)

    def write(self, record: str, who: object, pid: object) -> Steps:
        pairs = [(record + "pid", pid), (record + "who", who)]
        for word, value in pairs if self.follows("pid first") else reversed(pairs):
            yield store(word, value)

    def empty_owner(self, *_: object) -> Steps:
        if self.follows("empty, then sign"):
            yield store("who", NOBODY)

    def sign(self, me: int) -> Steps:
        yield call(self.write, "", me, me)

    def leave(self, given: bool) -> Steps:
        known: tuple[tuple[str, object], ...] = (("victim", NOBODY), ("died", 0)) if given else ()
        under = self.follows("cleared under the lock")
        if under:
            yield call(self.forget_death, given, known)
        if self.follows("owner cleared"):
            yield store("who", NOBODY, *(() if under else known))
        yield unlock(SLOT)
        if not under:
            yield call(self.forget_death, given, ())

    def forget_death(self, given: bool, known: tuple[tuple[str, object], ...]) -> Steps:
        if not self.follows("cleared at unlock"):
            return
        if not given and self.follows("cleared by who was given it"):
            return
        if (yield load("died_who")) is not NOBODY:
            yield store("died_who", NOBODY, *known)

    # --- garbage ---

    def lock_heap(self) -> Steps:
        yield from self.enter(HEAP)

    def free_garbage(self) -> Steps:
        first, last = ("garbage", "dirty")
        if not self.follows("garbage, then dirty 0"):
            first, last = last, first
        yield store(first, 0)
        yield store(last, 0)

    def tidy(self, *_: object) -> Steps:
        if self.follows("marked dirty"):
            yield store("dirty", 1)
        outcome = yield attempt(HEAP)
        if outcome == BUSY:
            return
        if outcome == DIED:
            yield consistent(HEAP)
        yield call(self.free_garbage)
        yield unlock(HEAP)

    def change(self) -> Steps:
        """Of a commit, what makes garbage: the new extent until `cur` flips, the old one after."""
        yield call(self.lock_heap)
        yield call(self.free_garbage)
        yield store("garbage", 1)
        yield unlock(HEAP)
        yield call(self.tidy)

    # --- processes ---

    @process
    def holder(self, me: int) -> Steps:
        """Is given the domain, looks who died, changes it."""
        yield call(self.lock_and_sign, me)
        yield call(self.look, me)
        yield call(self.change)
        yield call(self.leave, True)

    @process
    def passer(self, me: int) -> Steps:
        """Locks, finds that it is another domain than it meant, and lets go."""
        yield call(self.lock_and_sign, me)
        yield call(self.leave, False)

    def neighbour(self) -> Steps:
        """Has the heap lock for a while."""
        yield call(self.lock_heap)
        yield unlock(HEAP)

    def look(self, me: int) -> Steps:
        """`Domain.died`, by who was given the domain."""
        who, pid = (yield load("died_who")), (yield load("died_pid"))
        victim = yield load("victim")
        if victim is not NOBODY and (who, pid) != (victim, victim):
            yield fail(f"is told that {who} (pid {pid}) died with the lock; it was {victim}")
        if who is NOBODY and (yield load("died")):
            yield fail("is not told that somebody died with the lock")
        if who is not NOBODY and not self.follows("cleared at unlock"):
            yield store("died_who", NOBODY)

    def audit(self) -> Steps:
        yield after_all()
        yield call(self.lock_heap)
        yield unlock(HEAP)
        yield call(self.lock_and_sign, self.auditor)
        yield call(self.look, self.auditor)
        if (yield load("dirty")):
            yield call(self.tidy)
        yield call(self.leave, True)

    def model(self, *processes: Routine, kills: int) -> Model:
        self.auditor = len(processes)
        return super().model(*processes, kills=kills)

    # --- what must hold ---

    def claim(self, memory: Memory) -> str | None:
        wrong = self.owner_claim(memory) or self.death_claim(memory)
        if wrong or memory[SLOT] != FREE or memory["dirty"] or not memory["garbage"]:
            return wrong
        return "the lock is free, the slot is not dirty, and there is garbage"

    def owner_claim(self, memory: Memory) -> str | None:
        holder, who = memory[SLOT], memory["who"]
        if who is NOBODY:
            return None
        if holder == FREE:
            return f"nobody has the lock, and {who} is said to"
        if 0 <= holder < REPAIRING and holder != who:
            return f"{holder} has the lock, and {who} is said to"
        return None if memory["pid"] == who else f"{who} is said to be of process {memory['pid']}"

    def death_claim(self, memory: Memory) -> str | None:
        who = memory["died_who"]
        if who not in (NOBODY, UNKNOWN, *memory["dead"]):
            return f"{who} is recorded as dead and lives"
        if who is UNKNOWN and not memory["dead"]:
            return "a death is recorded and nobody died"
        if memory[SLOT] != FREE:
            return None
        if who not in (NOBODY, UNKNOWN) and memory["died_pid"] != who:
            return f"{who} is recorded with the pid of {memory['died_pid']}"
        if memory["victim"] not in (NOBODY, who):
            return f"{memory['victim']} died with the lock, {who} is recorded"
        return None


def hand_over(kills: int = 2, **how: Any) -> Model:
    """From a dead one, by way of one who passes it on, to one who is given it."""
    slot = Slot(**how)
    return slot.model(slot.holder(0), slot.passer(1), slot.holder(2), kills=kills)


def busy_heap(kills: int = 2, **how: Any) -> Model:
    slot = Slot(**how)
    return slot.model(slot.holder(0), slot.holder(1), slot.neighbour, kills=kills)


def four(kills: int = 3, **how: Any) -> Model:
    slot = Slot(**how)
    return slot.model(slot.holder(0), slot.passer(1), slot.holder(2), slot.neighbour, kills=kills)


MODELS = {
    "hand-over": hand_over,
    "busy heap": busy_heap,
    "unneeded: garbage, then dirty 0": lambda: busy_heap(dropped="garbage, then dirty 0"),
}
SOAK = {"hand-over, three kills": lambda: hand_over(kills=3), "four": four}
CONTROLS = {rule: busy_heap if rule == "marked dirty" else hand_over for rule in RULES}
