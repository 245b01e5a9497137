"""The ring of events: written under a lock of its own, read without one (events.c).

Claims, in every state:
- What is published are the events of the commits that happened, each once, in the order of the
  commits; while nobody has the event lock (and nobody died with it) all of them are, wherever
  writers and repairers were killed. Who recovers a slot does nothing for it: commits without events
  by others leave the verdict on a dead writer's as it was.
- A reader takes no entry for an event that it is not, and misses one only if it is overwritten or
  a writer may be overwriting it.
- Who sleeps on `event_count` is woken unless the writer was killed between its commit and its
  wake; then the end of one slice is enough, though nobody else ever takes the event lock.

Commit with k events, slot lock held (list lock, too, to insert and remove, which take the event
lock even without events): event lock; k entries, each its number 0, words, number; in the spare
copy `event`, the last number (an insert without events: 0); the commit, `cur` or `life`; the
count; event lock freed; wake as in `waiting`. Without events: `event` is copied along. Repair: is
the entry after the count whole, the record says whether it was committed: by its `life` (insert,
remove), by `event` of the committed copy (change). If so: the count, wake. If not, or when a writer
gives up: the numbers of that commit 0, the last one first. Read: count, number, words, number. Who
has slept a slice in vain and finds an entry after the count tries the event lock.
"""

from __future__ import annotations

from typing import Any

from .explorer import BUSY, DIED, FREE, NOBODY_SLEEPS, OVER, Memory, Model, Steps, Word
from .operations import (
    after_all,
    attempt,
    call,
    consistent,
    exchange,
    fail,
    load,
    lock,
    sleep,
    store,
    unlock,
    woken,
)
from .subject import Subject, process

RULES = {
    "entry, then commit": "the entries are whole before the commit",
    "commit, then publish": "the count is stored after the commit",
    "number 0 first": "an entry's number is 0 before its first word changes",
    "number last": "it is stored after the last one",
    "published": "a repair publishes what was committed",
    "asked": "a repair asks the record before it publishes",
    "by event": "it asks for `event`, not whether `cur` has gone on",
    "copied along": "a commit without events copies `event` along",
    "insert sets event": "an insert without events sets `event` to 0",
    "insert locks": "an insert takes the event lock, with events or without",
    "remove locks": "a removal does, too",
    "number from under the lock": "the count is loaded under the event lock",
    "held over the commit": "the event lock is held from the first entry to the count",
    "repaired under the lock": "the event lock is not let go before its repair",
    "dropped": "what was not committed gets the number 0",
    "dropped to its last": "so do all entries of that commit",
    "last one first": "the last of them first",
    "given up": "a writer that gives up after its entries drops them, too",
    "number again": "a reader looks at the number again after the words",
    "repair wakes": "a repair that publishes wakes",
    "slept in vain": "who has slept a slice in vain looks whether the event lock's holder died",
}
UNNEEDED = {
    "repaired, then consistent": "the event lock is consistent after its repair, not before",
    "life, too": "the verdict on a change asks for `life`, too",
    "settled": "the verdict is from a copy whose `cur` stood still",
    "only its own numbers": "a drop leaves a place alone in which there is another number",
}
"""Kept although the claims hold without. A death with a consistent lock is told, too. Nobody ends a
life or writes another `event` without the event lock, which the repair has. A drop that empties a
place which the dead one did not reach loses an old event, which the dead one might have lost."""

EVENTS, LIST, COUNT = "event lock", "list lock", "count"
RING = 2
CHANGE, INSERT, REMOVE = "change", "insert", "remove"
LIVE = 1
UNPUBLISHED, FOR_EVER = 1, 2
"""Why slices end: till a repair publishes; a writer died after it published."""


class Events(Subject):
    """Records with nothing but `event`, of which the last `free` are FREE. Process n owes a wake
    while ("owes", n). An event is (slot, life, process, which of that process's)."""

    rules = RULES | UNNEEDED

    def __init__(self, slots: int = 1, free: int = 0, watched: bool = False, dropped: str = ""):
        super().__init__(dropped)
        self.slots, self.free, self.watched = slots, free, watched
        self.parties, self.most = 0, 1

    def locks(self) -> list[Word]:
        return [LIST, EVENTS, *self.slot_locks()]

    def words(self) -> dict[Word, Any]:
        """Facts: `truth`, the events of all commits; `owes`, `slice`; `over`: of the model."""
        words: dict[Word, Any] = {COUNT: 0, "truth": (), "waiting": -1, "asleep": NOBODY_SLEEPS}
        words.update({"slice": 0, "over": 0})
        words.update({("owes", me): 0 for me in range(self.parties)})
        for place in range(RING):
            words.update({("number", place): 0, ("what", place): None, ("text", place): None})
        for slot in range(self.slots):
            words.update({("life", slot): int(slot < self.slots - self.free), ("cur", slot): 0})
            words.update({("event", slot, which): 0 for which in (0, 1)})
        return words

    def bury(self, memory: Memory, process: int) -> None:
        if memory["owes", process]:
            published = memory[COUNT] == len(memory["truth"])
            memory["slice"] = max(memory["slice"], FOR_EVER if published else UNPUBLISHED)
            memory["owes", process] = 0

    # --- the event lock and its repair ---

    def lock_events(self, me: int) -> Steps:
        if (yield lock(EVENTS)) != DIED:
            return
        if self.follows("repaired under the lock"):
            yield call(self.recover, me)
            return
        yield consistent(EVENTS)
        yield unlock(EVENTS)
        yield call(self.repair, me)
        yield call(self.lock_events, me)

    def recover(self, me: int) -> Steps:
        if not self.follows("repaired, then consistent"):
            yield consistent(EVENTS)
        yield call(self.repair, me)
        if self.follows("repaired, then consistent"):
            yield consistent(EVENTS)

    def repair(self, me: int) -> Steps:
        count = yield load(COUNT)
        place = (count + 1) % RING
        if (yield load(("number", place))) != count + 1:
            return
        what = yield load(("what", place))
        if what is None:
            yield fail("finds the number of an entry that was never written")
        if not (yield call(self.committed, *what)):
            yield call(self.drop, count, what[3])
        elif self.follows("published"):
            excuse = yield load("slice")
            now = 0 if excuse == UNPUBLISHED else excuse
            yield store(COUNT, what[3], (("owes", me), 1), ("slice", now))
            if self.follows("repair wakes"):
                yield call(self.wake, me, count)
            else:
                yield store(("owes", me), 0)

    def committed(self, kind: str, slot: int, life: int, last: int, cur: int) -> Steps:
        if not self.follows("asked"):
            return True
        if kind != CHANGE or self.follows("life, too"):
            same = (yield load(("life", slot))) == life
            if kind != CHANGE or not same:
                return same
        if not self.follows("by event"):
            return (yield load(("cur", slot))) >= cur
        if self.follows("settled"):
            return (yield call(self.settled, "event", slot)) == last
        cur = yield load(("cur", slot))
        return (yield load(("event", slot, cur & 1))) == last

    def drop(self, count: int, last: int) -> Steps:
        numbers = list(range(last, count, -1))
        if not self.follows("last one first"):
            numbers.reverse()
        if not self.follows("dropped to its last"):
            numbers = [count + 1]
        for number in numbers if self.follows("dropped") else ():
            place = ("number", number % RING)
            if not self.follows("only its own numbers") or (yield load(place)) == number:
                yield store(place, 0)

    def wake(self, me: int, count: int) -> Steps:
        """`count` is the one before."""
        if self.watched and (yield load("waiting")) >= count:
            yield store("asleep", NOBODY_SLEEPS, (("owes", me), 0))
        else:
            yield store(("owes", me), 0)

    # --- writers ---

    def write(self, number: int, what: tuple[Any, ...], text: Any) -> Steps:
        place = number % RING
        if self.follows("number 0 first"):
            yield store(("number", place), 0)
        if not self.follows("number last"):
            yield store(("number", place), number)
        yield store(("what", place), what)
        yield store(("text", place), text)
        if self.follows("number last"):
            yield store(("number", place), number)

    def entries(self, n: int, what: tuple[Any, ...], news: tuple[Any, ...]) -> Steps:
        for i, text in enumerate(news, 1):
            yield call(self.write, n + i, what, text)

    def with_events(self, me: int, kind: str, slot: int, news: tuple[Any, ...]) -> Steps:
        """The commit, from the event lock to the wake; the slot's lock is held."""
        early = (yield load(COUNT)) if not self.follows("number from under the lock") else None
        yield call(self.lock_events, me)
        n = (yield load(COUNT)) if early is None else early
        last = n + len(news)
        life, cur = (yield load(("life", slot))), (yield load(("cur", slot)))
        begun = cur + 1 if not self.follows("by event") else 0
        what = kind, slot, life + (kind != CHANGE), last, begun
        if self.follows("entry, then commit"):
            yield call(self.entries, n, what, news)
        if not self.follows("held over the commit"):
            yield unlock(EVENTS)
        if not self.follows("commit, then publish"):
            yield store(COUNT, last)
        truth = yield load("truth")
        yield call(self.commit, kind, slot, last if news else 0, (me, (*truth, *news)))
        if not self.follows("entry, then commit"):
            yield call(self.entries, n, what, news)
        if not self.follows("held over the commit"):
            yield call(self.lock_events, me)
        if news and self.follows("commit, then publish"):
            yield store(COUNT, last)
        yield unlock(EVENTS)
        if news:
            yield call(self.wake, me, n)

    def commit(self, kind: str, slot: int, event: int, facts: tuple[int, Any] | None) -> Steps:
        also: Any = ()
        if facts:
            also = ("truth", facts[1]), (("owes", facts[0]), int(event > 0))
        cur, life = (yield load(("cur", slot))), (yield load(("life", slot)))
        if kind == REMOVE:
            yield store(("life", slot), life + 1, *also)
            yield store(("cur", slot), cur + 2)
            return
        if event or (kind == INSERT and self.follows("insert sets event")):
            new = event
        else:
            new = (yield load(("event", slot, cur & 1))) if self.follows("copied along") else 0
        yield store(("event", slot, 1 - (cur & 1)), new)
        if kind == CHANGE:
            yield store(("cur", slot), cur + 1, *also)
            return
        yield store(("cur", slot), cur + 1)
        yield store(("life", slot), life + 1, *also)

    def news(self, me: int, kind: str, slot: int, events: int) -> Steps:
        """The events of this commit."""
        life = yield load(("life", slot))
        return tuple((slot, life + (kind != CHANGE), me, i) for i in range(events))

    def do(self, me: int, kind: str, slot: int, events: int) -> Steps:
        """If the record is there (to insert: not there); the locks but the event lock are held."""
        if (yield load(("life", slot))) % 2 != (kind != INSERT):
            return
        news = yield call(self.news, me, kind, slot, events)
        locks = kind != CHANGE and self.follows(f"{kind} locks")
        if events or locks:
            yield call(self.with_events, me, kind, slot, news)
        else:
            yield call(self.commit, kind, slot, 0, None)

    def locked(self, me: int, kind: str, slot: int, events: int) -> Steps:
        if kind != CHANGE:
            yield from self.enter(LIST)
        yield call(self.lock_slot, slot)
        yield call(self.do, me, kind, slot, events)
        yield unlock(("slot lock", slot))
        if kind != CHANGE:
            yield unlock(LIST)

    # --- processes ---

    def writer(self, me: int, *work: tuple[str, int, int]) -> Any:
        """Each of these: what, in which slot, with how many events."""
        self.most = max(self.most, *(events for _, _, events in work))

        def process() -> Steps:
            for kind, slot, events in work:
                yield call(self.locked, me, kind, slot, events)

        return process

    @process
    def quitter(self, me: int, slot: int, events: int) -> Steps:
        """Would insert, and gives up when it has written its entries."""
        yield from self.enter(LIST)
        yield call(self.lock_slot, slot)
        if not (yield load(("life", slot))) & 1:
            yield call(self.give_up, me, slot, events)
        yield unlock(("slot lock", slot))
        yield unlock(LIST)

    def give_up(self, me: int, slot: int, events: int) -> Steps:
        yield call(self.lock_events, me)
        n, life = (yield load(COUNT)), (yield load(("life", slot)))
        news = yield call(self.news, me, INSERT, slot, events)
        yield call(self.entries, n, (INSERT, slot, life + 1, n + events, 0), news)
        if self.follows("given up"):
            yield call(self.drop, n, n + events)
        yield unlock(EVENTS)

    @process
    def visitor(self, me: int) -> Steps:
        """Has the event lock, and writes nothing."""
        yield call(self.lock_events, me)
        yield unlock(EVENTS)

    @process
    def reader(self, times: int = 2) -> Steps:
        seen = 0
        for _ in range(times):
            seen = yield call(self.read, seen)

    def read(self, seen: int) -> Steps:
        """What came after that number; the last one of it."""
        count = yield load(COUNT)
        for number in range(max(seen, count - RING) + 1, count + 1):
            yield call(self.read_entry, number)
        return count

    def read_entry(self, number: int) -> Steps:
        place = number % RING
        if (yield load(("number", place))) != number:
            yield call(self.missed, number)
            return
        what, text = (yield load(("what", place))), (yield load(("text", place)))
        if self.follows("number again") and (yield load(("number", place))) != number:
            yield call(self.missed, number)
            return
        truth = yield load("truth")
        if text != truth[number - 1] or what[1:3] != text[:2]:
            yield fail(f"reads {what}, {text} as event {number}")

    def missed(self, number: int) -> Steps:
        count = yield load(COUNT)
        if number > count + self.most - RING:
            yield fail(f"misses event {number}, which nobody overwrites")

    @process
    def watcher(self, me: int) -> Steps:
        """Waits for the first event."""
        for _ in range(3):
            if (yield call(self.watch, me)):
                return

    def watch(self, me: int) -> Steps:
        """True: there is one, or it will not come."""
        count = yield load(COUNT)
        if count:
            yield call(self.read, 0)
            return True
        yield call(self.raise_to, count)
        if not (yield sleep(COUNT, count, "asleep")):
            return False
        if (yield woken("asleep", "slice")) != OVER:
            return bool((yield load("over")))
        yield call(self.wake_up, me, count)
        return False

    def raise_to(self, count: int) -> Steps:
        seen = yield load("waiting")
        while seen < count:
            found = yield exchange("waiting", {seen: count})
            seen = count if found == seen else found

    def wake_up(self, me: int, count: int) -> Steps:
        """After a slice that ended."""
        truth = yield load("truth")
        begun = yield load(("number", (count + 1) % RING))
        if self.follows("slept in vain") and begun == count + 1:
            outcome = yield attempt(EVENTS)
            if outcome == BUSY:
                return
            if outcome == DIED:
                yield call(self.recover, me)
            yield unlock(EVENTS)
        if (yield load(COUNT)) == count < len(truth):
            yield fail("has slept a slice, and does not learn of an event")

    def audit(self) -> Steps:
        """Who still sleeps then waits for what does not come; all locks are taken once."""
        yield after_all()
        yield store("over", 1, ("asleep", NOBODY_SLEEPS))
        yield after_all()
        yield call(self.lock_events, self.parties - 1)
        yield unlock(EVENTS)

    def model(self, *processes: Any, kills: int) -> Model:
        self.parties = len(processes) + 1
        return super().model(*processes, kills=kills)

    # --- what must hold ---

    def claim(self, memory: Memory) -> str | None:
        truth, count = memory["truth"], memory[COUNT]
        if count > len(truth):
            return f"{count} events are published, {len(truth)} happened"
        if memory[EVENTS] == FREE and count != len(truth):
            return f"the event lock is free, {len(truth)} events happened, {count} are published"
        for number in range(max(0, count - RING) + 1, count + 1):
            place = number % RING
            text = memory["text", place]
            if memory["number", place] == number and text != truth[number - 1]:
                return f"event {number} is {text}, and was {truth[number - 1]}"
        return self.sleep_claim(memory)

    def sleep_claim(self, memory: Memory) -> str | None:
        if memory["slice"] or any(memory["owes", me] for me in range(self.parties)):
            return None
        for sleeper, count in memory["asleep"]:
            if count < len(memory["truth"]):
                return f"{sleeper} sleeps on {count}, and nobody will wake it"
        return None


def changed(kills: int = 2, **how: Any) -> Model:
    """With events and without, in one slot."""
    it = Events(**how)
    return it.model(
        it.writer(0, (CHANGE, 0, 1)),
        it.writer(1, (CHANGE, 0, 0), (CHANGE, 0, 0)),
        it.writer(2, (CHANGE, 0, 1)),
        kills=kills,
    )


def at_once(kills: int = 2, **how: Any) -> Model:
    """Two events in one commit; one beside it; one who has the lock and writes nothing."""
    it = Events(2, **how)
    return it.model(
        it.writer(0, (CHANGE, 0, 2)),
        it.writer(1, (CHANGE, 0, 0), (CHANGE, 1, 1)),
        it.visitor(2),
        kills=kills,
    )


def removed(kills: int = 2, **how: Any) -> Model:
    """A record that a dead one changed is removed and its slot used again."""
    it = Events(**how)
    return it.model(
        it.writer(0, (CHANGE, 0, 1)),
        it.writer(1, (REMOVE, 0, 0), (INSERT, 0, 1)),
        it.visitor(2),
        kills=kills,
    )


def reused(kills: int = 2, **how: Any) -> Model:
    """The slot of a record whose remover died."""
    it = Events(**how)
    return it.model(
        it.writer(0, (REMOVE, 0, 2)),
        it.writer(1, (REMOVE, 0, 1), (INSERT, 0, 0)),
        it.writer(2, (CHANGE, 0, 1)),
        kills=kills,
    )


def inserted(kills: int = 2, **how: Any) -> Model:
    """Two insert into one slot; then one who has the event lock and writes nothing."""
    it = Events(free=1, **how)
    return it.model(
        it.writer(0, (INSERT, 0, 2)), it.writer(1, (INSERT, 0, 1)), it.visitor(2), kills=kills
    )


def silent(kills: int = 2, **how: Any) -> Model:
    """One of two who insert makes no event; then a change with as many as the other."""
    it = Events(free=1, **how)
    return it.model(
        it.writer(0, (INSERT, 0, 2)),
        it.writer(1, (INSERT, 0, 0)),
        it.writer(2, (CHANGE, 0, 2)),
        kills=kills,
    )


def dropped_twice(kills: int = 3, **how: Any) -> Model:
    """Who drops dies, too."""
    it = Events(free=1, **how)
    return it.model(
        it.writer(0, (INSERT, 0, 2)),
        it.writer(1, (INSERT, 0, 1)),
        it.visitor(2),
        it.visitor(3),
        kills=kills,
    )


def given_up(kills: int = 2, **how: Any) -> Model:
    it = Events(free=1, **how)
    return it.model(it.quitter(0, 0, 2), it.writer(1, (INSERT, 0, 1)), it.visitor(2), kills=kills)


def crowd(kills: int = 3, **how: Any) -> Model:
    """What a dead one's event goes through before it is published."""
    it = Events(2, **how)
    return it.model(
        it.writer(0, (CHANGE, 0, 2)),
        it.writer(1, (CHANGE, 0, 0), (REMOVE, 0, 1), (INSERT, 0, 0)),
        it.writer(2, (CHANGE, 1, 1), (CHANGE, 0, 0)),
        it.visitor(3),
        kills=kills,
    )


def read(kills: int = 1, more: int = 1, **how: Any) -> Model:
    """The ring goes round while it is read."""
    it = Events(2, **how)
    return it.model(
        it.writer(0, (CHANGE, 0, 1), (CHANGE, 0, 1)),
        it.writer(1, *[(CHANGE, 1, 1)] * more),
        it.reader(),
        kills=kills,
    )


def read_at_once(kills: int = 2, **how: Any) -> Model:
    it = Events(2, **how)
    return it.model(
        it.writer(0, (CHANGE, 0, 2)),
        it.writer(1, (CHANGE, 1, 1), (CHANGE, 1, 1)),
        it.reader(),
        kills=kills,
    )


def watched(kills: int = 1, **how: Any) -> Model:
    it = Events(watched=True, **how)
    return it.model(it.watcher(0), it.writer(1, (CHANGE, 0, 1)), it.visitor(2), kills=kills)


def two_watch(kills: int = 2, **how: Any) -> Model:
    it = Events(watched=True, **how)
    return it.model(
        it.watcher(0),
        it.watcher(1),
        it.writer(2, (CHANGE, 0, 1)),
        it.writer(3, (CHANGE, 0, 1)),
        kills=kills,
    )


MODELS = {
    "changed": lambda: changed(kills=3),
    "at once": at_once,
    "removed": removed,
    "reused": reused,
    "inserted": lambda: inserted(kills=3),
    "silent": lambda: silent(kills=3),
    "dropped twice": dropped_twice,
    "given up": given_up,
    "read": read,
    "read at once": lambda: read_at_once(kills=1),
    "watched": lambda: watched(kills=2),
    "two watch": lambda: two_watch(kills=0),
    "unneeded: repaired, then consistent": lambda: dropped_twice(
        dropped="repaired, then consistent"
    ),
    "unneeded: life, too": lambda: reused(dropped="life, too"),
    "unneeded: settled": lambda: changed(dropped="settled"),
    "unneeded: only its own numbers": lambda: at_once(dropped="only its own numbers"),
}
SOAK = {
    "at once, three kills": lambda: at_once(kills=3),
    "reused, three kills": lambda: reused(kills=3),
    "dropped twice, four kills": lambda: dropped_twice(kills=4),
    "crowd": crowd,
    "read, two kills": lambda: read(kills=2, more=2),
    "read at once, three kills": lambda: read_at_once(kills=3),
    "two watch, two kills": two_watch,
}
CONTROLS = {
    "entry, then commit": changed,
    "commit, then publish": changed,
    "number 0 first": read,
    "number last": read,
    "published": changed,
    "asked": changed,
    "by event": changed,
    "copied along": changed,
    "insert sets event": silent,
    "insert locks": reused,
    "remove locks": removed,
    "number from under the lock": changed,
    "held over the commit": changed,
    "repaired under the lock": changed,
    "dropped": inserted,
    "dropped to its last": inserted,
    "last one first": dropped_twice,
    "given up": given_up,
    "number again": read,
    "repair wakes": watched,
    "slept in vain": watched,
}
