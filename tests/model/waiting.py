"""Waiting for a commit without a lock: on one record's `cur`, and on the list's `any_seq`
(waiting.c).

Claims, in every state:
- Nobody sleeps on a `cur` or an `any_seq` that has gone on, on a record that was removed, or while
  the list has what it waits for, unless a writer has still to wake it, or one was killed between
  its commit and its wake. So whoever sleeps while no such writer died is woken, however many others
  were killed, waiters and writers; only after such a death does the end of a slice wake it.
- Where nobody waits no writer makes a system call; what one waiter has raised costs two at most,
  whether it was killed or not.

Wait: `cur`, life and fields, `cur` again; if that is not what is waited for, `waiting` raised to
that `cur`, `cur` again, and FUTEX_WAIT, which compares with that `cur`. Commit: flip; if `waiting`
has reached the old `cur`, wake all. Remove: life, `cur` + 2 (the same copy), the same look. Insert:
flip of the FREE slot, life. After each of them: if `any_waiting` is above `any_seq`, `any_seq` + 1
by exchange, wake all. Wait for any: `any_seq`, `any_waiting` raised above it, all records, and
FUTEX_WAIT with that `any_seq`. What is raised is never lowered: not by a waiter, and a writer that
has woken all lowers only what is damaged, which is more than `any_seq` + 1. It looks at
`any_waiting` first, for it may be slow, and others may have gone on.
"""

from __future__ import annotations

from typing import Any

from .explorer import NOBODY_SLEEPS, OVER, Memory, Model, Steps, Word
from .operations import after_all, call, exchange, load, sleep, store, unlock, woken
from .subject import Subject, process

RULES = {
    "compared": "the kernel compares with the `cur` of what was looked at, not a later one",
    "raised": "`waiting` is raised before the sleep",
    "by exchange": "`waiting` is raised, not stored: a slow waiter never lowers it",
    "flip, then look": "a writer looks at `waiting` after its flip",
    "old value": "a writer compares `waiting` with the `cur` before its flip",
    "only for waiters": "a writer wakes only if `waiting` says so",
    "all": "a writer wakes all",
    "not cleared": "`waiting` is left as it is after a wake",
    "remove changes cur": "a removal changes `cur`, for who is about to sleep on it",
    "life, then cur": "it does so after `life`, not before",
    "remove wakes": "a removal wakes who sleeps",
    "any: compared": "the kernel compares with the `any_seq` from before the scan",
    "any: raised, then scanned": "`any_waiting` is raised before the scan",
    "any: raised above": "`any_waiting` is raised above `any_seq`",
    "any: commit, then look": "a writer looks at `any_waiting` after its commit",
    "any: life, then look": "an insert does so after `life`, not after the flip in the FREE slot",
    "any: remove": "a removal does so, too",
    "any: by exchange": "`any_seq` goes on from what was seen, it is not set",
    "any: bump, then wake": "`any_seq` goes on before the wake",
    "any: above any_seq": "what is lowered is above the `any_seq` of now, not of its own bump",
    "any: any_seq last": "that is looked at after `any_waiting`",
}
UNNEEDED = {
    "cur again": "`cur` is looked at again after `waiting` was raised",
    "wakes under the lock": "a writer wakes before it unlocks the slot",
}
"""The first saves a system call: the kernel compares again. The second lets the holder know that a
slot which it unlocked owes nobody anything."""

LIST, ANY = "list lock", "any"
SLOT = 0
ENDED, BOTH, ONLY_ANY = 0, 2, 1
"""What a writer owes."""
TURNS = 4
Early = tuple[int | None, tuple[int | None] | None]


class Waiting(Subject):
    """Records that live, but the last of `free`. Process n owes a wake while ("owes", n).

    Who waits on a record waits for a value there, or for its end; on the list, for a value
    anywhere, or, with None, for the end of the first record."""

    rules = RULES | UNNEEDED

    def __init__(self, slots: int = 1, free: int = 0, most: int | None = None, dropped: str = ""):
        super().__init__(dropped)
        self.slots, self.free, self.most = slots, free, most
        self.parties = 0
        self.sought: dict[int, int | None] = {}

    def locks(self) -> list[Word]:
        return [LIST, *self.slot_locks()]

    def words(self) -> dict[Word, Any]:
        """Facts: `owes`; `slice`: a writer died who owed one; `wakes`; `over`: of the model."""
        words: dict[Word, Any] = {"any seq": 0, "any waiting": 0, ("asleep", ANY): NOBODY_SLEEPS}
        words.update({("slice", "slot"): 0, ("slice", ANY): 0, "over": 0, "wakes": 0})
        words.update({("owes", me): ENDED for me in range(self.parties)})
        for slot in range(self.slots):
            words.update({("life", slot): int(slot < self.slots - self.free), ("cur", slot): 1})
            words.update({("value", slot, which): 0 for which in (0, 1)})
            words.update({("waiting", slot): 0, ("asleep", slot): NOBODY_SLEEPS})
        return words

    def bury(self, memory: Memory, process: int) -> None:
        if memory["owes", process] == BOTH:
            memory["slice", "slot"] = 1
        if memory["owes", process]:
            memory["slice", ANY] = 1
        memory["owes", process] = ENDED

    # --- waiters ---

    def raise_to(self, word: Word, value: int) -> Steps:
        seen = yield load(word)
        if not self.follows("by exchange"):
            yield store(word, value)
            return
        while seen < value:
            found = yield exchange(word, {seen: value})
            if found == seen:
                return
            seen = found

    def looked(self, slot: int) -> Steps:
        """(`cur`, life, value) of one moment."""
        while True:
            cur = yield load(("cur", slot))
            life = yield load(("life", slot))
            value = yield load(("value", slot, cur & 1))
            if (yield load(("cur", slot))) == cur:
                return cur, life, value

    def turn(self, slot: int, sought: int) -> Steps:
        """Looks, and sleeps if that is not it. True: it is not to look again."""
        cur, life, value = yield call(self.looked, slot)
        if life != 1 or value >= sought:
            return True
        if self.follows("raised"):
            yield call(self.raise_to, ("waiting", slot), cur)
        if self.follows("cur again") and (yield load(("cur", slot))) != cur:
            return False
        if not self.follows("compared"):
            cur = yield load(("cur", slot))
        return (yield call(self.slept, ("cur", slot), cur, slot, "slot"))

    def slept(self, word: Word, value: int, queue: Word, kind: str) -> Steps:
        """True: its last slice has ended, and the model with it."""
        if not (yield sleep(word, value, ("asleep", queue))):
            return False
        if (yield woken(("asleep", queue), ("slice", kind))) == OVER:
            return True
        return bool((yield load("over")))

    def turn_any(self, sought: int | None) -> Steps:
        seq = yield load("any seq")
        above = seq + 1 if self.follows("any: raised above") else seq
        if self.follows("any: raised, then scanned"):
            yield call(self.raise_to, "any waiting", above)
        if (yield call(self.scanned, sought)):
            return True
        if not self.follows("any: raised, then scanned"):
            yield call(self.raise_to, "any waiting", above)
        if not self.follows("any: compared"):
            seq = yield load("any seq")
        return (yield call(self.slept, "any seq", seq, ANY, ANY))

    def scanned(self, sought: int | None) -> Steps:
        for slot in range(self.slots):
            _, life, value = yield call(self.looked, slot)
            if self.is_sought(slot, life, value, sought):
                return True
        return False

    def is_sought(self, slot: int, life: int, value: int, sought: int | None) -> bool:
        if sought is None:
            return slot == SLOT and life != 1
        return bool(life & 1) and value >= sought

    # --- writers ---

    def commit(self, me: int, slot: int) -> Steps:
        """The slot's lock is held."""
        cur = yield load(("cur", slot))
        value = yield load(("value", slot, cur & 1))
        yield store(("value", slot, 1 - (cur & 1)), value + 1)
        early = yield call(self.looks, slot)
        yield store(("cur", slot), cur + 1, (("owes", me), BOTH))
        return cur, early

    def looks(self, slot: int) -> Steps:
        """What a writer sees who looks before its commit, if it does."""
        waiting = (yield load(("waiting", slot))) if not self.follows("flip, then look") else None
        if self.follows("any: commit, then look"):
            return waiting, None
        return waiting, ((yield call(self.bump_needed)),)

    def bump_needed(self) -> Steps:
        """`any_seq`, or None if nobody waits."""
        waiting = yield load("any waiting")
        seq = yield load("any seq")
        return seq if waiting > seq else None

    def wake(self, me: int, slot: int, cur: int, early: int | None) -> Steps:
        waiting = (yield load(("waiting", slot))) if early is None else early
        reached = waiting >= (cur if self.follows("old value") else cur + 1)
        if reached or not self.follows("only for waiters"):
            yield call(self.wake_queue, me, slot, ONLY_ANY)
            if not self.follows("not cleared"):
                yield store(("waiting", slot), 0)
        else:
            yield store(("owes", me), ONLY_ANY)

    def wake_queue(self, me: int, queue: Word, owes: int) -> Steps:
        wakes, asleep = (yield load("wakes")), NOBODY_SLEEPS
        if not self.follows("all"):
            asleep = frozenset(sorted((yield load(("asleep", queue))))[1:])
        counted = wakes + 1 if self.most is not None else 0
        yield store(("asleep", queue), asleep, (("owes", me), owes), ("wakes", counted))

    def wake_any(self, me: int, early: tuple[int | None] | None) -> Steps:
        (seq,) = early or ((yield call(self.bump_needed)),)
        if seq is None:
            yield store(("owes", me), ENDED)
            return
        if not self.follows("any: bump, then wake"):
            yield call(self.wake_queue, me, ANY, ONLY_ANY)
        if not self.follows("any: by exchange"):
            yield store("any seq", seq + 1)
        elif (yield exchange("any seq", {seq: seq + 1})) != seq:
            yield store(("owes", me), ENDED)
            return
        if self.follows("any: bump, then wake"):
            yield call(self.wake_queue, me, ANY, ENDED)
            yield call(self.lower_damaged, seq + 1)
        else:
            yield store(("owes", me), ENDED)

    def lower_damaged(self, mine: int) -> Steps:
        seq = mine
        if not self.follows("any: any_seq last"):
            seq = yield load("any seq")
        raised = yield load("any waiting")
        if self.follows("any: any_seq last") and self.follows("any: above any_seq"):
            seq = yield load("any seq")
        if raised > seq + 1:
            yield exchange("any waiting", {raised: seq + 1})

    def leave(self, me: int, slot: int, cur: int, early: Early, removed: bool) -> Steps:
        """Wake and unlock."""
        if not self.follows("wakes under the lock"):
            yield unlock(("slot lock", slot))
        if self.follows("remove wakes") or not removed:
            yield call(self.wake, me, slot, cur, early[0])
        else:
            yield store(("owes", me), ONLY_ANY)
        if self.follows("any: remove") or not removed:
            yield call(self.wake_any, me, early[1])
        else:
            yield store(("owes", me), ENDED)
        if self.follows("wakes under the lock"):
            yield unlock(("slot lock", slot))

    # --- processes ---

    @process
    def waiter(self, slot: int, sought: int, turns: int = TURNS) -> Steps:
        for _ in range(turns):
            if (yield call(self.turn, slot, sought)):
                return

    def any_waiter(self, me: int, sought: int | None) -> Any:
        self.sought[me] = sought

        def process() -> Steps:
            for _ in range(TURNS):
                if (yield call(self.turn_any, sought)):
                    return

        return process

    @process
    def writer(self, me: int, slot: int, times: int = 1) -> Steps:
        for _ in range(times):
            yield call(self.change, me, slot)

    def change(self, me: int, slot: int) -> Steps:
        yield call(self.lock_slot, slot)
        if not (yield load(("life", slot))) & 1:
            yield unlock(("slot lock", slot))
            return
        cur, early = yield call(self.commit, me, slot)
        yield call(self.leave, me, slot, cur, early, False)

    @process
    def remover(self, me: int, slot: int, then_insert: int = 0) -> Steps:
        """Removes the record; then maybe inserts another with this value into its slot."""
        yield call(self.remove, me, slot)
        if then_insert:
            yield call(self.insert, me, slot, then_insert)

    def remove(self, me: int, slot: int) -> Steps:
        yield from self.enter(LIST)
        yield call(self.lock_slot, slot)
        if (yield load(("life", slot))) & 1:
            yield call(self.end_life, me, slot)
        else:
            yield unlock(("slot lock", slot))
        yield unlock(LIST)

    def end_life(self, me: int, slot: int) -> Steps:
        cur = yield load(("cur", slot))
        life = yield load(("life", slot))
        early = yield call(self.looks, slot)
        if not self.follows("life, then cur"):
            yield store(("cur", slot), cur + 2, (("owes", me), BOTH))
        yield store(("life", slot), life + 1, (("owes", me), BOTH))
        if self.follows("remove changes cur") and self.follows("life, then cur"):
            yield store(("cur", slot), cur + 2)
        yield call(self.leave, me, slot, cur, early, True)

    @process
    def inserter(self, me: int, slot: int, value: int) -> Steps:
        yield call(self.insert, me, slot, value)

    def insert(self, me: int, slot: int, value: int) -> Steps:
        yield from self.enter(LIST)
        yield call(self.lock_slot, slot)
        life = yield load(("life", slot))
        if not life & 1:
            cur = yield load(("cur", slot))
            yield store(("value", slot, 1 - (cur & 1)), value)
            yield store(("cur", slot), cur + 1)
            if not self.follows("any: life, then look"):
                yield call(self.wake_any, me, None)
                yield store(("life", slot), life + 1)
            else:
                yield store(("life", slot), life + 1, (("owes", me), ONLY_ANY))
                yield call(self.wake_any, me, None)
        yield unlock(("slot lock", slot))
        yield unlock(LIST)

    def audit(self) -> Steps:
        """Whoever still sleeps then waits for what does not come: it is sent home."""
        yield after_all()
        yield store("over", 1, *((("asleep", q), NOBODY_SLEEPS) for q in self.queues()))
        yield after_all()

    def queues(self) -> list[Word]:
        return [ANY, *range(self.slots)]

    def model(self, *processes: Any, kills: int) -> Model:
        self.parties = len(processes)
        return super().model(*processes, kills=kills)

    # --- what must hold ---

    def claim(self, memory: Memory) -> str | None:
        if self.most is not None and memory["wakes"] > self.most:
            return f"{memory['wakes']} system calls to wake, {self.most} were to be expected"
        owed = max((memory["owes", me] for me in range(self.parties)), default=ENDED)
        wrong = None
        if owed < BOTH and not memory["slice", "slot"]:
            wrong = self.slot_claim(memory)
        if wrong is None and not owed and not memory["slice", ANY]:
            wrong = self.any_claim(memory)
        return wrong

    def slot_claim(self, memory: Memory) -> str | None:
        for slot in range(self.slots):
            for sleeper, cur in memory["asleep", slot]:
                if cur != memory["cur", slot] or memory["life", slot] != 1:
                    return f"{sleeper} sleeps on slot {slot}, and nobody will wake it"
        return None

    def any_claim(self, memory: Memory) -> str | None:
        for sleeper, seq in memory["asleep", ANY]:
            if seq != memory["any seq"]:
                return f"{sleeper} sleeps on the list, which has gone on"
            for slot in range(self.slots):
                value = memory["value", slot, memory["cur", slot] & 1]
                if self.is_sought(slot, memory["life", slot], value, self.sought[sleeper]):
                    return f"{sleeper} sleeps on the list, and there is what it waits for"
        return None


def one(kills: int = 1, **how: Any) -> Model:
    it = Waiting(**how)
    return it.model(it.waiter(0, 2), it.writer(1, 0), it.writer(2, 0), kills=kills)


def two(kills: int = 1, **how: Any) -> Model:
    """One waits for the first commit, one for the second."""
    it = Waiting(**how)
    return it.model(it.waiter(0, 1), it.waiter(0, 2), it.writer(2, 0, 2), kills=kills)


def four(kills: int = 2, **how: Any) -> Model:
    it = Waiting(**how)
    waiters = it.waiter(0, 1), it.waiter(0, 2)
    return it.model(*waiters, it.writer(2, 0), it.writer(3, 0), kills=kills)


def removed(kills: int = 1, **how: Any) -> Model:
    it = Waiting(**how)
    return it.model(it.waiter(0, 3), it.remover(1, 0), it.writer(2, 0), kills=kills)


def reused(kills: int = 1, **how: Any) -> Model:
    it = Waiting(**how)
    return it.model(it.waiter(0, 3), it.remover(1, 0, 9), it.writer(2, 0), kills=kills)


def nobody(kills: int = 1, **how: Any) -> Model:
    """No waiter, no system call."""
    it = Waiting(most=0, **how)
    return it.model(it.writer(0, 0), it.writer(1, 0), it.remover(2, 0, 5), kills=kills)


def stale(kills: int = 1, **how: Any) -> Model:
    """What one waiter costs who looks once, and may be killed."""
    it = Waiting(most=2, **how)
    return it.model(it.waiter(0, 9, 1), it.writer(1, 0, 2), it.writer(2, 0, 2), kills=kills)


def anywhere(kills: int = 1, **how: Any) -> Model:
    it = Waiting(2, **how)
    return it.model(it.any_waiter(0, 1), it.writer(1, 0), it.writer(2, 1), kills=kills)


def two_anywhere(kills: int = 1, **how: Any) -> Model:
    it = Waiting(1, **how)
    waiters = it.any_waiter(0, 1), it.any_waiter(1, 2)
    return it.model(*waiters, it.writer(2, 0), it.writer(3, 0), kills=kills)


def overtaken(kills: int = 0, **how: Any) -> Model:
    """A writer that is slow to count `any_seq` on, while another counts twice."""
    it = Waiting(2, **how)
    return it.model(it.any_waiter(0, 2), it.writer(1, 0, 2), it.writer(2, 1), kills=kills)


def inserted(kills: int = 1, **how: Any) -> Model:
    it = Waiting(1, free=1, **how)
    return it.model(it.any_waiter(0, 5), it.inserter(1, 0, 5), kills=kills)


def any_removed(kills: int = 1, **how: Any) -> Model:
    """Who waits on the list for a domain's end, while its slot is used again."""
    it = Waiting(**how)
    return it.model(it.any_waiter(0, None), it.remover(1, 0, 3), it.writer(2, 0), kills=kills)


MODELS = {
    "one": lambda: one(kills=2),
    "two": two,
    "removed": lambda: removed(kills=2),
    "reused": reused,
    "nobody": lambda: nobody(kills=2),
    "stale": stale,
    "anywhere": lambda: anywhere(kills=2),
    "overtaken": overtaken,
    "inserted": lambda: inserted(kills=2),
    "removed, for the list": any_removed,
    "unneeded: cur again": lambda: two(dropped="cur again"),
    "unneeded: wakes under the lock": lambda: one(dropped="wakes under the lock"),
}
SOAK = {
    "reused, two kills": lambda: reused(kills=2),
    "overtaken, a kill": lambda: overtaken(kills=1),
    "two anywhere": two_anywhere,
    "four": four,
}
CONTROLS = {
    "compared": one,
    "raised": one,
    "by exchange": two,
    "flip, then look": one,
    "old value": one,
    "only for waiters": nobody,
    "all": two,
    "not cleared": two,
    "remove changes cur": removed,
    "life, then cur": removed,
    "remove wakes": removed,
    "any: compared": anywhere,
    "any: raised, then scanned": anywhere,
    "any: raised above": anywhere,
    "any: commit, then look": anywhere,
    "any: life, then look": inserted,
    "any: remove": any_removed,
    "any: by exchange": overtaken,
    "any: bump, then wake": anywhere,
    "any: above any_seq": overtaken,
    "any: any_seq last": overtaken,
}
