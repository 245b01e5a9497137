"""A mutex is taken off the robust list of a thread that may use other ones (unlock_for.c).

Claims:
- In every state - SIGKILL may come anywhere, and the kernel goes by `next` - the list is whole, and
  has what its thread holds, but for the mutex that is taken off.
- In the end that one is in it, or is not, as whoever took it off believes, and `prev` of each is
  right. The links of the one that is free belong to others then: nobody stores into them.

The owner's own operations are glibc's, each between its load of the head and its last store inside
the lock OPERATION; whoever takes off waits for the end of one by taking that lock and leaving it
again. That is less than the core waits for: there an operation says so from before it begins.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from .explorer import Memory, Model, Steps
from .operations import after_all, call, exchange, fail, load, lock, store, unlock

RULES = {
    "foreign is left": "where another one than ours is in the list nothing is done",
    "head by exchange": "the head is changed if it is as it was seen, not whatever it is",
    "settled": "what was under way has ended before it is judged",
    "looks at prev": "ours is back if somebody has stored its `prev`",
    "looks at the head": "ours is back if it is the first",
    "0, again": "`prev` that is the head says nothing: 0, and another look",
    "prev by exchange": "the next one's `prev` changes if nobody has put anything before it",
}

HEAD, OURS, OPERATION = "head", "ours", "operation"
FOREIGN = ("x", "y")
TRIES = 9


class List:
    """The list of one thread; the facts `held` and `freed`."""

    def __init__(self, listed: tuple[str, ...], dropped: str = ""):
        assert not dropped or dropped in RULES, dropped
        self.listed, self.dropped = listed, dropped

    def follows(self, rule: str) -> bool:
        assert rule in RULES, rule
        return rule != self.dropped

    def words(self) -> dict[object, object]:
        words: dict[object, object] = {}
        for name in (*self.listed, *FOREIGN, HEAD):
            words["next", name] = words["prev", name] = None
        ring = (HEAD, *self.listed, HEAD)
        for before, after in pairwise(ring):
            words["next", before], words["prev", after] = after, before
        held = frozenset(self.listed) - {OURS}
        return {**words, "held": held, "freed": "not yet"}

    def claim(self, memory: Memory) -> str | None:
        at, found = memory["next", HEAD], set()
        while at != HEAD:
            if at is None or at in found:
                return f"the list is cut off behind {sorted(found)}"
            found.add(at)
            at = memory["next", at]
        if not memory["held"] <= found:
            return f"the thread holds {sorted(memory['held'])}, in its list are {sorted(found)}"
        if memory["freed"] != "not yet" and (memory["freed"] == "no") != (OURS in found):
            return f"was it freed? {memory['freed']}; in the list are {sorted(found)}"
        return None

    # --- the owner, in code that is not ours ---

    def enqueue(self, name: str) -> Steps:
        yield lock(OPERATION)
        first = yield load(("next", HEAD))
        yield store(("prev", first), name)
        yield store(("next", name), first)
        yield store(("prev", name), HEAD)
        held = yield load("held")
        yield store(("next", HEAD), name, ("held", held | {name}))
        yield unlock(OPERATION)

    def dequeue(self, name: str) -> Steps:
        yield lock(OPERATION)
        following = yield load(("next", name))
        before = yield load(("prev", name))
        yield store(("prev", following), before)
        held = yield load("held")
        yield store(("next", before), following, ("held", held - {name}))
        yield store(("prev", name), None)
        yield store(("next", name), None)
        yield unlock(OPERATION)

    def owner(self, operations: tuple[str, ...]) -> Callable[[], Steps]:
        def process() -> Steps:
            for operation in operations:
                work = self.enqueue if operation[0] == "+" else self.dequeue
                yield call(work, operation[1:])

        return process

    # --- whoever takes ours off ---

    def settle(self) -> Steps:
        if self.follows("settled"):
            yield lock(OPERATION)
            yield unlock(OPERATION)

    def before_ours(self) -> Steps:
        at, found = HEAD, None
        while (following := (yield load(("next", at)))) != HEAD:
            if following is None or (following in FOREIGN and self.follows("foreign is left")):
                return None
            found = at if following == OURS else found
            at = following
        return found

    def judge(self) -> Steps:
        """True: it is off. False: it is back. None: look again."""
        yield call(self.settle)
        first = yield load(("next", HEAD))
        prev = yield load(("prev", OURS))
        if first == OURS and self.follows("looks at the head"):
            yield exchange(("prev", OURS), {None: HEAD})
            return False
        if prev is None:
            return True
        if prev != HEAD:
            return not self.follows("looks at prev")
        if not self.follows("0, again"):
            return True
        yield exchange(("prev", OURS), {HEAD: None})
        return None

    def take_first(self, after: str) -> Steps:
        if self.follows("head by exchange"):
            if (yield exchange(("next", HEAD), {OURS: after})) != OURS:
                return False
        else:
            yield store(("next", HEAD), after)
        for _ in range(TRIES):
            off = yield call(self.judge)
            if off is None:
                continue
            if off and self.follows("prev by exchange"):
                yield exchange(("prev", after), {OURS: HEAD})
            elif off:
                yield store(("prev", after), HEAD)
            return off
        yield fail("it looks again and again")

    def take_off(self) -> Steps:
        before = yield call(self.before_ours)
        if before is None or (yield load(("prev", OURS))) != before:
            return False
        after = yield load(("next", OURS))
        if (yield load(("prev", after))) != OURS:
            return False
        if before == HEAD:
            return (yield call(self.take_first, after))
        yield store(("prev", after), before)
        yield store(("next", before), after)
        yield store(("prev", OURS), None)
        return True

    def dropper(self) -> Steps:
        off = yield call(self.take_off)
        if off:
            yield store(("next", OURS), None)
        yield store("freed", "yes" if off else "no")

    def audit(self) -> Steps:
        yield after_all()
        at = HEAD
        while True:
            following = yield load(("next", at))
            if (yield load(("prev", following))) != at:
                yield fail(f"{following} is behind {at} and does not know it")
            at = following
            if at == HEAD:
                break
        links = (yield load(("next", OURS))), (yield load(("prev", OURS)))
        if (yield load("freed")) == "yes" and links != (None, None):
            yield fail(f"it is free, and its links are {links}")


def model(listed: tuple[str, ...], operations: tuple[str, ...], **how: Any) -> Model:
    it = List(listed, **how)
    return Model(
        words=it.words(),
        locks=[OPERATION],
        processes=[it.owner(operations), it.dropper, it.audit],
        claim=it.claim,
        kills=0,
        audited=True,
    )


AGAIN = ("+x", "-x", "+x", "-x", "+x")
NESTED = ("+x", "+y", "-y", "-x", "+y")
CROSSED = ("+x", "+y", "-x", "+x", "-y")


def first(**how: Any) -> Model:
    return model((OURS, "other"), AGAIN, **how)


def first_nested(**how: Any) -> Model:
    return model((OURS, "other"), NESTED, **how)


def only(**how: Any) -> Model:
    return model((OURS,), AGAIN, **how)


MODELS = {
    "first": first,
    "first, nested": first_nested,
    "first, crossed": lambda **how: model((OURS, "other"), CROSSED, **how),
    "only": only,
    "only, nested": lambda **how: model((OURS,), NESTED, **how),
    "middle": lambda **how: model(("later", OURS, "other"), AGAIN, **how),
    "last": lambda **how: model(("later", OURS), CROSSED, **how),
}
SOAK: dict[str, Callable[..., Model]] = {
    "first, for longer": lambda: model((OURS, "other"), (*NESTED, "-y", *AGAIN)),
}
CONTROLS: dict[str, Callable[..., Model]] = dict.fromkeys(RULES, first)
