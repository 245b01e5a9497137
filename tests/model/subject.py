"""What every model has: rules, of which one may be dropped, locks with repairs, a walk's setup.

What stands here is the same in all of them. A step that only looks alike (a rebuild, a look-up)
stands in its own module, so that it can be read beside the code that it models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

from .explorer import DIED, Memory, Model, Routine, Steps, Word
from .operations import call, consistent, load, lock, store

S = TypeVar("S")
P = ParamSpec("P")


def process(
    steps: Callable[Concatenate[S, P], Steps],
) -> Callable[Concatenate[S, P], Callable[[], Steps]]:
    """Make of a method one that returns a process, which takes these steps."""

    def prepared(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], Steps]:
        def process() -> Steps:
            return steps(self, *args, **kwargs)

        return process

    return prepared


class Subject:
    """What is modelled. `dropped` names the rule that is not followed."""

    rules: ClassVar[Collection[str]]
    slots: int = 1

    def __init__(self, dropped: str = ""):
        assert not dropped or dropped in self.rules, dropped
        self.dropped = dropped

    def follows(self, rule: str) -> bool:
        assert rule in self.rules, rule
        return rule != self.dropped

    # --- steps; `yield from` keeps them part of their caller, as if they stood there ---

    def enter(self, word: Word, repair: Routine | None = None) -> Steps:
        """Lock; after a death repair first."""
        if (yield lock(word)) == DIED:
            if repair:
                yield call(repair)
            yield consistent(word)

    def lock_slot(self, slot: int) -> Steps:
        yield from self.enter(("slot lock", slot))

    def add(self, word: Word, by: int) -> Steps:
        was = yield load(word)
        yield store(word, was + by)

    def begin(self) -> Steps:
        was = yield load("sequence")
        yield store("sequence", was | 1)

    def end(self) -> Steps:
        yield from self.add("sequence", 1)

    def settled(self, word: str, slot: int) -> Steps:
        """sd_values_settled: what a `cur` chose that stood still."""
        while True:
            cur = yield load(("cur", slot))
            chosen = yield load((word, slot, cur & 1))
            if (yield load(("cur", slot))) == cur:
                return chosen

    # --- the walk ---

    def words(self) -> dict[Word, Any]:
        raise NotImplementedError

    def locks(self) -> Sequence[Word]:
        raise NotImplementedError

    def slot_locks(self) -> list[Word]:
        return [("slot lock", slot) for slot in range(self.slots)]

    def audit(self) -> Steps:
        """After everybody: take each lock once. Then the claims about free locks are about all."""
        raise NotImplementedError

    def claim(self, memory: Memory) -> str | None:
        """What is wrong with this state, besides what the processes notice themselves."""
        return None

    def observe(self, memory: Memory) -> None: ...

    def bury(self, memory: Memory, process: int) -> None: ...

    def model(self, *processes: Routine, kills: int) -> Model:
        return Model(
            words=self.words(),
            locks=self.locks(),
            processes=[*processes, self.audit],
            claim=self.claim,
            observe=self.observe,
            bury=self.bury,
            kills=kills,
            audited=True,
        )
