"""A lock of `lock="multiprocessing"`: its owner's name, and the semaphore to sleep on (locks.c).

Claims, in every state:
- Of those who live, at most one is inside.
- Whoever comes when all others have ended gets the lock, wherever they were killed.
- Where nobody was killed, the semaphore of a lock that nobody has is not 0: who sleeps is woken,
  and need not wait for the end of a slice.

Lock: wait for the semaphore, a slice at most; whether it was had or not, the name from nobody to
mine; if the name is a dead one's, from his to mine. Unlock: the name from mine to nobody, then post
unless the semaphore is above 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .explorer import Memory, Model, Steps
from .operations import after_all, call, exchange, fail, load, store

RULES = {
    "name without semaphore": "who has waited takes an empty name, woken or not",
    "name by exchange": "a name is put in place of the one that was seen, not of whatever is there",
    "alive is asked": "the place of a living owner is never taken",
    "taken over": "the place of a dead owner is",
    "name, then post": "the name is empty before the semaphore is posted",
    "posted": "each unlock sees to it that the semaphore is above 0",
    "name decides": "who was woken and finds a name goes back to wait",
}

NOBODY, NAME, TOKENS = None, "who", "semaphore"
TRIES = 2


class Lock:
    """One lock. Fact: `inside`, who believes to have it; `dead`."""

    def __init__(self, dropped: str = ""):
        assert not dropped or dropped in RULES, dropped
        self.dropped, self.parties = dropped, 0

    def follows(self, rule: str) -> bool:
        assert rule in RULES, rule
        return rule != self.dropped

    def words(self, processes: int) -> dict[object, object]:
        self.parties = processes
        words: dict[object, object] = {NAME: NOBODY, TOKENS: 1, "dead": frozenset()}
        return {**words, **{("inside", me): 0 for me in range(processes)}}

    def bury(self, memory: Memory, process: int) -> None:
        memory["dead"] = memory["dead"] | {process}
        memory["inside", process] = 0

    def claim(self, memory: Memory) -> str | None:
        inside = [me for me in range(self.parties) if memory["inside", me]]
        return f"{inside} are inside together" if len(inside) > 1 else None

    # --- steps ---

    def rename(self, seen: object, new: object) -> Steps:
        if self.follows("name by exchange"):
            return (yield exchange(NAME, {seen: new})) == seen
        if (yield load(NAME)) != seen:
            return False
        yield store(NAME, new)
        return True

    def turn(self, me: int) -> Steps:
        """One slice. True: it has the lock."""
        woken = (yield exchange(TOKENS, {n: n - 1 for n in (1, 2, 3)})) > 0
        if not self.follows("name decides") and woken:
            yield store(NAME, me)
            return True
        if (woken or self.follows("name without semaphore")) and (
            yield call(self.rename, NOBODY, me)
        ):
            return True
        who = yield load(NAME)
        if who is NOBODY or not self.follows("taken over"):
            return False
        if self.follows("alive is asked") and who not in (yield load("dead")):
            return False
        return (yield call(self.rename, who, me))

    def post(self) -> Steps:
        if self.follows("posted") and (yield load(TOKENS)) <= 0:
            yield exchange(TOKENS, {n: n + 1 for n in (0, 1, 2)})

    def leave(self, me: int) -> Steps:
        if not self.follows("name, then post"):
            yield call(self.post)
        yield call(self.rename, me, NOBODY)
        if self.follows("name, then post"):
            yield call(self.post)

    def hold(self, me: int) -> Steps:
        for _ in range(TRIES):
            if (yield call(self.turn, me)):
                yield store(("inside", me), 1)
                yield store(("inside", me), 0)
                yield call(self.leave, me)
                return True
        return False

    # --- processes ---

    def user(self, me: int, times: int) -> Callable[[], Steps]:
        def process() -> Steps:
            for _ in range(times):
                yield call(self.hold, me)

        return process

    def audit(self, me: int) -> Callable[[], Steps]:
        def process() -> Steps:
            yield after_all()
            if not (yield load("dead")) and (yield load(TOKENS)) < 1:
                yield fail("nobody has the lock, nobody died, and nobody would be woken")
            if not (yield call(self.hold, me)):
                yield fail("cannot have a lock that nobody alive has")

        return process


def model(users: int, times: int, kills: int, **how: Any) -> Model:
    it = Lock(**how)
    return Model(
        words=it.words(users + 1),
        locks=[],
        processes=[*(it.user(me, times) for me in range(users)), it.audit(users)],
        claim=it.claim,
        bury=it.bury,
        kills=kills,
        audited=True,
    )


def two(kills: int = 2, **how: Any) -> Model:
    return model(2, 2, kills, **how)


def three(kills: int = 2, **how: Any) -> Model:
    return model(3, 1, kills, **how)


MODELS = {"two": two, "three": three}
SOAK = {"three, three kills": lambda: three(kills=3)}
CONTROLS = dict.fromkeys(RULES, three)
