"""UUIDs, names and the free list under the list lock, and look-ups without it (I1, I5).

Claims, in every state:
- Living slots have different UUIDs and different names, and no name is torn.
- While nobody holds the list lock (and nobody died with it), both indexes, the number of domains
  and the free list are what the slots say, and the sequence is even.
- A look-up without the list lock says "not there" only if that was so at some moment of it; what it
  hands out, under the slot's lock, has that name and lives.

Insert, list and slot lock held, the slot FREE: the name buffer that does not count, UUID, spare
field copy (it chooses that buffer), `cur`; then sequence odd, life, free list, UUID index, name
index, number, sequence even. Rename: spare name buffer, sequence odd, spare field copy, `cur`, old
entry out, new entry in, sequence even. Remove: sequence odd, life, UUID index, name index, number,
next_free, free list, sequence even. A repair: sequence | 1, tables emptied, slots from the last to
the first entered or put on the free list, its head, number, sequence + 1.

A name is a pair of halves, stored one after the other, so that it can be seen torn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .explorer import (
    DIED,
    FREE,
    Memory,
    Model,
    Steps,
    after_all,
    call,
    consistent,
    fail,
    load,
    lock,
    store,
    unlock,
)

RULES = {
    "spare buffer": "a name is written where it does not count, and `cur` chooses it",
    "name, then life": "name, UUID and fields are stored before life commits an insert",
    "odd first": "the sequence is odd before the first store that commits an identity",
    "even last": "the sequence is even after the last index store",
    "odd or 1": "a repair sets the lowest bit of the sequence; adding 1 may make it even",
    "repair is odd": "the sequence is odd while a repair empties and fills the tables",
    "doubt": "a miss counts only if the sequence was even and unchanged",
    "verified": "a hit is verified under the slot's lock",
    "whole records": "a scan looks at life and `cur` again after it has read a record",
    "all records": "a scan looks at every record before it says that there is none",
    "list lock": "a doubtful miss looks again under the list lock",
    "free list rebuilt": "a repair makes the free list anew",
    "number rebuilt": "a repair counts the domains anew",
    "entries rebuilt": "a repair enters what is committed, and nothing else stays",
}
LIST = "list lock"
NAMES, UUIDS = ("a", "b", "c"), ("A", "B", "C")
NOTHING = ("", "")


class Index:
    """Two slots: slot 0 is domain a (UUID A), slot 1 is FREE."""

    def __init__(self, slots: int = 2, names: int = 3, dropped: str = ""):
        assert not dropped or dropped in RULES, dropped
        self.slots, self.dropped = slots, dropped
        self.keys = (*NAMES[:names], *UUIDS[:names])
        self.sought: set[str] = set()

    def follows(self, rule: str) -> bool:
        assert rule in RULES, rule
        return rule != self.dropped

    def words(self) -> dict[object, object]:
        """`absent` and `present` are facts: whether nobody, or somebody, had the name at a moment
        of the look-up."""
        words: dict[object, object] = {"sequence": 0, "number": 1}
        words["head"] = 2 if self.slots > 1 else 0
        words.update({("entry", key): None for key in self.keys})
        words.update({("entry", "a"): 0, ("entry", "A"): 0})
        words.update({(fact, name): 0 for fact in ("absent", "present") for name in self.sought})
        for slot in range(self.slots):
            words.update({("life", slot): int(not slot), ("cur", slot): 0, ("uuid", slot): ""})
            words.update({("choice", slot, 0): 0, ("choice", slot, 1): 0})
            words.update({("name", slot, 0): NOTHING, ("name", slot, 1): NOTHING})
            words["next", slot] = slot + 2 if 0 < slot < self.slots - 1 else 0
        words.update({("uuid", 0): "A", ("name", 0, 0): ("a", "a")})
        return words

    def observe(self, memory: Memory) -> None:
        names = [self.name_of(memory, slot) for slot in self.living(memory)]
        for name in self.sought:
            memory["absent" if (name, name) not in names else "present", name] = 1

    def living(self, memory: Memory) -> list[int]:
        return [slot for slot in range(self.slots) if memory["life", slot] & 1]

    def name_of(self, memory: Memory, slot: int) -> tuple[str, str]:
        name: tuple[str, str] = memory[
            "name", slot, memory["choice", slot, memory["cur", slot] & 1]
        ]
        return name

    # --- locks and repair ---

    def lock_list(self) -> Steps:
        if (yield lock(LIST)) == DIED:
            yield call(self.rebuild)
            yield consistent(LIST)

    def lock_slot(self, slot: int) -> Steps:
        if (yield lock(("slot lock", slot))) == DIED:
            yield consistent(("slot lock", slot))

    def rebuild(self) -> Steps:
        """sd_rebuild_list."""
        was = yield load("sequence")
        odd = was | 1 if self.follows("odd or 1") else was + 1
        yield store("sequence", odd if self.follows("repair is odd") else odd + 1)
        if self.follows("entries rebuilt"):
            yield call(self.clear)
        head = number = 0
        for slot in reversed(range(self.slots)):
            lives = yield call(self.enter_slot, slot, head)
            number, head = (number + 1, head) if lives else (number, slot + 1)
        if self.follows("free list rebuilt"):
            yield store("head", head)
        if self.follows("number rebuilt"):
            yield store("number", number)
        yield store("sequence", odd + 1)

    def clear(self) -> Steps:
        for key in self.keys:
            if (yield load(("entry", key))) is not None:
                yield store(("entry", key), None)

    def enter_slot(self, slot: int, head: int) -> Steps:
        if (yield load(("life", slot))) & 1:
            uuid = yield load(("uuid", slot))
            name = yield call(self.settled_name, slot)
            yield call(self.enter, slot, uuid, name[0])
            return True
        if self.follows("free list rebuilt"):
            yield store(("next", slot), head)
        return False

    def settled_name(self, slot: int) -> Steps:
        """sd_values_settled, then sd_name_get: two loads, as the halves are two words."""
        while True:
            cur = yield load(("cur", slot))
            choice = yield load(("choice", slot, cur & 1))
            if (yield load(("cur", slot))) == cur:
                break
        first = (yield load(("name", slot, choice)))[0]
        return first, (yield load(("name", slot, choice)))[1]

    # --- changes ---

    def enter(self, slot: int, uuid: str, name: str) -> Steps:
        yield store(("entry", uuid), slot)
        yield store(("entry", name), slot)

    def begin(self) -> Steps:
        was = yield load("sequence")
        yield store("sequence", was | 1)

    def end(self) -> Steps:
        was = yield load("sequence")
        yield store("sequence", was + 1)

    def count(self, by: int) -> Steps:
        number = yield load("number")
        yield store("number", number + by)

    def write_name(self, slot: int, which: int, name: str) -> Steps:
        old = yield load(("name", slot, which))
        yield store(("name", slot, which), (name, old[1]))
        yield store(("name", slot, which), (name, name))

    def flip(self, slot: int, choice: int) -> Steps:
        cur = yield load(("cur", slot))
        yield store(("choice", slot, 1 - (cur & 1)), choice)
        yield store(("cur", slot), cur + 1)

    def choice(self, slot: int) -> Steps:
        cur = yield load(("cur", slot))
        return (yield load(("choice", slot, cur & 1)))

    # --- processes ---

    def insert(self, name: str, uuid: str) -> Callable[[], Steps]:
        def process() -> Steps:
            yield call(self.lock_list)
            slot = yield call(self.room_for, name, uuid)
            if slot is None:
                yield unlock(LIST)
                return
            yield call(self.lock_slot, slot)
            yield call(self.fill, slot, name, uuid)
            yield unlock(LIST)
            yield unlock(("slot lock", slot))

        return process

    def room_for(self, name: str, uuid: str) -> Steps:
        """The first FREE slot, unless the list has that name or UUID."""
        for key in (name, uuid):
            if (yield load(("entry", key))) is not None:
                return None
        head = yield load("head")
        return head - 1 if head else None

    def fill(self, slot: int, name: str, uuid: str) -> Steps:
        """sd_insert."""
        steps = [(self.prepare, (slot, name, uuid)), (self.begin, ()), (self.live, (slot,))]
        if not self.follows("odd first"):
            steps = [steps[0], steps[2], steps[1]]
        elif not self.follows("name, then life"):
            steps = [steps[1], steps[2], steps[0]]
        for step, arguments in steps:
            yield call(step, *arguments)
        yield call(self.take_off, slot)
        if not self.follows("even last"):
            yield call(self.end)
        yield call(self.enter, slot, uuid, name)
        yield call(self.count, 1)
        if self.follows("even last"):
            yield call(self.end)

    def prepare(self, slot: int, name: str, uuid: str) -> Steps:
        spare = 1 - (yield call(self.choice, slot))
        yield call(self.write_name, slot, spare, name)
        yield store(("uuid", slot), uuid)
        yield call(self.flip, slot, spare)

    def live(self, slot: int) -> Steps:
        life = yield load(("life", slot))
        yield store(("life", slot), life | 1)

    def take_off(self, slot: int) -> Steps:
        following = yield load(("next", slot))
        yield store("head", following)

    def rename(self, old: str, new: str) -> Callable[[], Steps]:
        def process() -> Steps:
            yield call(self.lock_list)
            slot = yield load(("entry", old))
            if slot is not None and (yield load(("entry", new))) is None:
                yield call(self.lock_slot, slot)
                yield call(self.change_name, slot, old, new)
                yield unlock(("slot lock", slot))
            yield unlock(LIST)

        return process

    def change_name(self, slot: int, old: str, new: str) -> Steps:
        """sd_commit with a name."""
        choice = yield call(self.choice, slot)
        spare = 1 - choice if self.follows("spare buffer") else choice
        steps = [(self.begin, ()), (self.flip, (slot, spare))]
        if not self.follows("odd first"):
            steps.reverse()
        yield call(self.write_name, slot, spare, new)
        for step, arguments in steps:
            yield call(step, *arguments)
        if not self.follows("even last"):
            yield call(self.end)
        yield store(("entry", old), None)
        yield store(("entry", new), slot)
        if self.follows("even last"):
            yield call(self.end)

    def remove(self, name: str) -> Callable[[], Steps]:
        def process() -> Steps:
            yield call(self.lock_list)
            slot = yield load(("entry", name))
            if slot is not None:
                yield call(self.lock_slot, slot)
                yield call(self.take_out, slot, name)
                yield unlock(("slot lock", slot))
            yield unlock(LIST)

        return process

    def take_out(self, slot: int, name: str) -> Steps:
        """sd_remove."""
        life = yield load(("life", slot))
        uuid = yield load(("uuid", slot))
        if self.follows("odd first"):
            yield call(self.begin)
        yield store(("life", slot), (life | 1) + 1)
        if not self.follows("odd first"):
            yield call(self.begin)
        yield store(("entry", uuid), None)
        yield store(("entry", name), None)
        yield call(self.count, -1)
        head = yield load("head")
        yield store(("next", slot), head)
        yield store("head", slot + 1)
        yield call(self.end)

    def commit(self, slot: int) -> Callable[[], Steps]:
        """By a holder of the slot's lock alone, in the middle of whatever others do to the list."""

        def process() -> Steps:
            yield call(self.lock_slot, slot)
            choice = yield call(self.choice, slot)
            yield call(self.flip, slot, choice)
            yield unlock(("slot lock", slot))

        return process

    def get(self, name: str) -> Callable[[], Steps]:
        """`DomainList.get(name=...)`; a hit that is another domain by then: once more."""
        self.sought.add(name)

        def process() -> Steps:
            yield store(("absent", name), 0)
            again = yield call(self.look_up, name)
            if again:
                yield call(self.look_up, name)

        return process

    def look_up(self, name: str) -> Steps:
        slot, sure = yield call(self.find, name)
        if slot is None and not sure:
            slot = yield call(self.find_for_sure, name)
        if slot is not None:
            return (yield call(self.take, slot, name))
        if not (yield load(("absent", name))):
            yield fail(f"does not find {name}, which was there all the time")
        return False

    def take(self, slot: int, name: str) -> Steps:
        """Lock what was found. True: it is another domain, look again."""
        yield call(self.lock_slot, slot)
        matches = yield call(self.matches, slot, name)
        if not matches and not self.follows("verified"):
            yield fail(f"hands out slot {slot}, which is not domain {name}")
        yield unlock(("slot lock", slot))
        return not matches

    def find(self, name: str) -> Steps:
        """sd_find: (slot or None, whether a miss counts)."""
        before = yield load("sequence")
        slot = yield load(("entry", name))
        if slot is not None and (yield call(self.matches, slot, name)):
            return slot, True
        after = yield load("sequence")
        return None, not self.follows("doubt") or (not before & 1 and before == after)

    def matches(self, slot: int, name: str) -> Steps:
        if not (yield load(("life", slot))) & 1:
            return False
        return (yield call(self.settled_name, slot)) == (name, name)

    def find_for_sure(self, name: str) -> Steps:
        if not self.follows("list lock"):
            return (yield call(self.find, name))[0]
        yield call(self.lock_list)
        slot = (yield call(self.find, name))[0]
        yield unlock(LIST)
        return slot

    def peek(self, name: str) -> Callable[[], Steps]:
        """Reads without a lock; a doubtful miss asks the records. Nobody is waited for."""
        self.sought.add(name)

        def process() -> Steps:
            yield store(("absent", name), 0, (("present", name), 0))
            slot, sure = yield call(self.find, name)
            if slot is None and not sure:
                slot = yield call(self.scan, name)
                if slot is not None and not (yield load(("present", name))):
                    yield fail(f"sees {name}, which was never there")
            if slot is None and not (yield load(("absent", name))):
                yield fail(f"does not see {name}, which was there all the time")

        return process

    def scan(self, name: str) -> Steps:
        """sd_scan."""
        for slot in range(self.slots if self.follows("all records") else 1):
            if (yield call(self.view, slot)) == (name, name):
                return slot
        return None

    def view(self, slot: int) -> Steps:
        """sd_view_begin, until it is whole: the name, or None."""
        while True:
            life, cur = (yield load(("life", slot))), (yield load(("cur", slot)))
            if not life & 1:
                return None
            choice = yield load(("choice", slot, cur & 1))
            first = (yield load(("name", slot, choice)))[0]
            name = first, (yield load(("name", slot, choice)))[1]
            if not self.follows("whole records"):
                return name
            if (yield load(("life", slot))) == life and (yield load(("cur", slot))) == cur:
                return name

    def audit(self) -> Steps:
        yield after_all()
        yield call(self.lock_list)
        yield unlock(LIST)

    # --- what must hold ---

    def claim(self, memory: Memory) -> str | None:
        living = self.living(memory)
        names = [self.name_of(memory, slot) for slot in living]
        uuids = [memory["uuid", slot] for slot in living]
        for first, second in names:
            if first != second or not first:
                return f"a living slot has the name {first}|{second}"
        if len(set(names)) < len(names) or len(set(uuids)) < len(uuids):
            return f"a name or UUID is there twice: {names} {uuids}"
        if memory[LIST] != FREE:
            return None
        keys = [*(name[0] for name in names), *uuids]
        return self.list_claim(memory, dict(zip(keys, living * 2, strict=True)), living)

    def list_claim(self, memory: Memory, truth: dict[str, int], living: list[int]) -> str | None:
        if memory["sequence"] & 1:
            return "the list lock is free and the sequence odd"
        for key in self.keys:
            if memory["entry", key] != truth.get(key):
                return f"the index leads from {key} to {memory['entry', key]}, not {truth.get(key)}"
        if memory["number"] != len(living):
            return f"{memory['number']} domains are counted, they are {len(living)}"
        free = self.free_list(memory)
        if sorted([*free, *living]) != list(range(self.slots)):
            return f"the free list is {free}, and {living} live"
        return None

    def free_list(self, memory: Memory) -> list[int]:
        free: list[int] = []
        at = memory["head"]
        while at and len(free) <= self.slots:
            free.append(at - 1)
            at = memory["next", at - 1]
        return free


def model(index: Index, name: str, *processes: Callable[[], Steps], kills: int) -> Model:
    return Model(
        name=f"index, {name}",
        words=index.words(),
        locks=[LIST, *(("slot lock", slot) for slot in range(index.slots))],
        processes=[*processes, index.audit],
        claim=index.claim,
        observe=index.observe if index.sought else None,
        kills=kills,
        audited=True,
    )


def renamed(kills: int = 1, **how: Any) -> Model:
    index = Index(names=2, **how)
    return model(index, "renamed", index.rename("a", "b"), index.get("b"), kills=kills)


def rename_insert(kills: int = 2, **how: Any) -> Model:
    """Somebody takes the name that another one gives up."""
    index = Index(names=2, **how)
    return model(
        index, "rename and insert", index.rename("a", "b"), index.insert("a", "B"), kills=kills
    )


def remove_insert(kills: int = 2, **how: Any) -> Model:
    index = Index(names=2, **how)
    return model(
        index,
        "remove and insert",
        index.remove("a"),
        index.insert("a", "B"),
        index.insert("b", "A"),
        kills=kills,
    )


def rename_commit(kills: int = 2, **how: Any) -> Model:
    """A holder of the slot commits while the list is repaired."""
    index = Index(names=3, **how)
    return model(
        index,
        "rename and commit",
        index.rename("a", "b"),
        index.commit(0),
        index.insert("c", "C"),
        kills=kills,
    )


def repair_seen(kills: int = 1, **how: Any) -> Model:
    """A look-up while somebody dies in a rename or an insert, and another one repairs."""
    index = Index(names=3, **how)
    return model(
        index,
        "repair seen",
        index.rename("a", "b"),
        index.insert("c", "C"),
        index.get("b"),
        kills=kills,
    )


def reused(kills: int = 1, **how: Any) -> Model:
    """A look-up of a name that leaves one slot and comes back in it."""
    index = Index(slots=1, names=2, **how)
    return model(
        index, "reused", index.remove("a"), index.insert("a", "B"), index.get("a"), kills=kills
    )


def crowd(kills: int = 2, **how: Any) -> Model:
    index = Index(names=3, **how)
    return model(
        index,
        "crowd",
        index.rename("a", "b"),
        index.remove("a"),
        index.insert("c", "C"),
        index.get("b"),
        kills=kills,
    )


def scanned(kills: int = 1, **how: Any) -> Model:
    """A reader while a domain is renamed and another one comes into the index."""
    index = Index(names=3, **how)
    return model(
        index,
        "scanned",
        index.rename("a", "b"),
        index.insert("c", "C"),
        index.peek("c"),
        kills=kills,
    )


def scanned_reused(kills: int = 1, **how: Any) -> Model:
    """A reader while a slot is used again, for a name that may never get there."""
    index = Index(slots=1, names=2, **how)
    return model(
        index,
        "scanned, reused",
        index.remove("a"),
        index.insert("b", "B"),
        index.commit(0),
        index.peek("b"),
        kills=kills,
    )


MODELS = {
    "scanned": scanned,
    "scanned, reused": scanned_reused,
    "renamed": renamed,
    "rename and insert": rename_insert,
    "remove and insert": remove_insert,
    "rename and commit": rename_commit,
    "repair seen": repair_seen,
    "reused": reused,
}
SOAK = {
    "repair seen, two kills": lambda: repair_seen(kills=2),
    "reused, two kills": lambda: reused(kills=2),
    "remove and insert, three kills": lambda: remove_insert(kills=3),
    "crowd": crowd,
}
CONTROLS = {
    "spare buffer": renamed,
    "name, then life": remove_insert,
    "odd first": renamed,
    "even last": renamed,
    "odd or 1": repair_seen,
    "repair is odd": repair_seen,
    "doubt": renamed,
    "verified": reused,
    "whole records": scanned_reused,
    "all records": scanned,
    "list lock": repair_seen,
    "free list rebuilt": remove_insert,
    "number rebuilt": remove_insert,
    "entries rebuilt": remove_insert,
}
