"""Walks through every interleaving of a few processes, with kills, and looks at every state.

A process is a generator. It yields one operation on shared memory at a time and is sent its result;
between two operations anybody else may take any number of steps (sequential consistency: stores are
seen in the order in which they are made). While kills are left a process may also end right before
any store, lock or unlock; the locks that it held are then dead, and the next to lock one is told
so, as by a robust mutex. A death before a load is one before what follows it: nobody sees a load.

    value = yield load(word)
    yield store(word, value)             the same step may note facts for the claim in other words
    found = yield exchange(word, {old: new, ...})   in one step; another value stays
    died = yield lock(word)              waits; OK or DIED
    outcome = yield attempt(word)        does not wait; OK, DIED or BUSY
    yield consistent(word)               what DIED asks for before the unlock
    yield unlock(word)
    slept = yield sleep(word, value, queue)   FUTEX_WAIT: compares and joins the queue in one step
    told = yield woken(queue, unless)    waits until it is out of the queue; OVER: `unless` is true
    result = yield call(routine, ...)    another generator; what it read is forgotten at its end
    yield after_all()                    waits until every other process has ended or sleeps
    yield fail(text)                     the claim does not hold

What a generator does next may depend on its arguments and on what it was sent, on nothing else:
then a process is where its open calls and what they were sent say, and two histories that lead to
the same place and the same memory are one state. `call` is what keeps the number of states small.

A queue is a word that holds who sleeps, as (process, value it slept on); storing `NOBODY_SLEEPS`
is FUTEX_WAKE. A death in the sleep is one before it: nobody sees a sleeper.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Word = Hashable
Value = Hashable
Operation = tuple[Any, ...]
Routine = Callable[..., Generator[Operation, Any, Any]]
Steps = Generator[Operation, Any, Any]

OK, DIED, BUSY = "ok", "died", "busy"
OVER = "over"
"""What `woken` is sent when its slice has ended."""
NOBODY_SLEEPS: frozenset[tuple[int, Value]] = frozenset()

FREE, DEAD = -1, -2
"""What a lock holds besides its holder's number."""
REPAIRING = 64
"""Added to the holder's number from DIED until `consistent`."""


class Memory:
    """The words by name, for claims and observers."""

    def __init__(self, places: Mapping[Word, int], values: Sequence[Value]):
        self._places = places
        self._values: Any = values

    def __getitem__(self, word: Word) -> Any:
        return self._values[self._places[word]]

    def __setitem__(self, word: Word, value: Value) -> None:
        self._values[self._places[word]] = value

    def holder(self, word: Word) -> int | None:
        """The process that holds this lock."""
        value = self[word]
        return None if value < 0 else value % REPAIRING


@dataclass
class Model:
    """Words and locks, who works on them, and what must hold in every state.

    `claim` says what is wrong with a state, or None. `observe` is called after each step that
    changed memory and may note facts in it; `bury` likewise, with the number of the process, after
    a kill. The last of `processes` is the auditor if `audited`: it is not killed."""

    words: Mapping[Word, Value]
    locks: Sequence[Word]
    processes: Sequence[Routine]
    claim: Callable[[Memory], str | None]
    kills: int = 1
    observe: Callable[[Memory], None] | None = None
    bury: Callable[[Memory, int], None] | None = None
    audited: bool = False


@dataclass
class Outcome:
    """What a walk found. `schedule` leads to the violation, step by step."""

    states: int = 0
    ends: int = 0
    seconds: float = 0.0
    truncated: bool = False
    violation: str | None = None
    schedule: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        found = "holds" if self.violation is None else f"violated: {self.violation}"
        if self.truncated:
            found = "cut off before its end"
        return f"{self.states:,} states, {self.seconds:.1f} s, {found}"


class Violation(Exception):
    """A step that may not happen."""


class Place:
    """Where a process is: an open call, what it was sent, and who called it."""

    __slots__ = ("arguments", "caller", "following", "mortal", "operation", "routine", "sent")

    def __init__(self, routine: Any, arguments: Any, sent: Any, caller: Place | None):
        self.routine, self.arguments, self.sent, self.caller = routine, arguments, sent, caller
        self.following: dict[Value, Place] = {}
        self.operation: Operation = ("ended",)
        self.mortal = False


DEATH = Place(None, (), (), None)
END = Place(None, (), (), None)
VISIBLE = ("store", "exchange", "lock", "attempt", "consistent", "unlock", "sleep")
State = tuple[tuple[Value, ...], tuple[Place, ...], int]


class Explorer:
    """One walk through one model."""

    def __init__(self, model: Model):
        self.model = model
        self.places = {word: i for i, word in enumerate((*model.locks, *model.words))}
        self.locks = len(model.locks)
        self.auditor = len(model.processes) - 1 if model.audited else -1
        self._interned: dict[Any, Place] = {}
        self._sound: dict[tuple[Value, ...], tuple[Value, ...]] = {}
        self._came_from: dict[State, State | None] = {}

    def walk(self, limit: int = 3_000_000) -> Outcome:
        """Look at every state that can be reached, at most `limit` of them."""
        outcome, began = Outcome(), time.monotonic()
        state = self._first()
        self._came_from[state] = None
        waiting = [state]
        try:
            while waiting and not outcome.truncated:
                state = waiting.pop()
                outcome.ends += self._look(state, waiting)
                outcome.truncated = len(self._came_from) > limit
        except Violation as violation:
            outcome.violation = violation.args[0]
            outcome.schedule = self._schedule(violation.args[1])
        outcome.states = len(self._came_from)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _first(self) -> State:
        memory = [*(FREE for _ in self.model.locks), *self.model.words.values()]
        if self.model.observe:
            self.model.observe(Memory(self.places, memory))
        places = tuple(self._enter(routine, (), None) for routine in self.model.processes)
        return tuple(memory), places, self.model.kills

    def _look(self, state: State, waiting: list[State]) -> bool:
        """Take every step that is possible here. True: everybody has ended."""
        memory, places, kills = state
        moved, ended = False, True
        for process, place in enumerate(places):
            kind = place.operation[0]
            if kind == "ended":
                continue
            ended = False
            if kind == "after all" and not self._alone(process, memory, places):
                continue
            try:
                step = self._step(memory, process, place.operation)
            except Violation as violation:
                raise Violation(f"process {process} {violation.args[0]}", state) from None
            if step is not None:
                moved = True
                self._reach(state, process, step[0], self._follow(place, step[1]), kills, waiting)
            if kills and place.mortal and process != self.auditor:
                self._reach(state, process, self._bury(memory, process), DEATH, kills - 1, waiting)
        if not ended and not moved:
            raise Violation("nobody can go on", state)
        return ended

    def _alone(self, process: int, memory: tuple[Value, ...], places: tuple[Place, ...]) -> bool:
        others = [(i, p.operation) for i, p in enumerate(places) if i != process]
        return all(
            kind[0] == "ended" or (kind[0] == "woken" and self._step(memory, i, kind) is None)
            for i, kind in others
        )

    def _reach(
        self,
        state: State,
        process: int,
        memory: tuple[Value, ...],
        place: Place,
        kills: int,
        waiting: list[State],
    ) -> None:
        """Note the state that this step leads to, and look at it if it is new."""
        places = state[1]
        fresh = memory is not state[0]
        if fresh:
            memory = self._sound.get(memory, memory)
        after = (memory, (*places[:process], place, *places[process + 1 :]), kills)
        if after in self._came_from:
            return
        self._came_from[after] = state
        if fresh and memory not in self._sound:
            self._sound[memory] = memory
            wrong = self.model.claim(Memory(self.places, memory))
            if wrong:
                raise Violation(wrong, after)
        waiting.append(after)

    def _step(
        self, memory: tuple[Value, ...], process: int, operation: Operation
    ) -> tuple[tuple[Value, ...], Value] | None:
        """Memory and result after the operation. None: it waits."""
        kind, at = operation[0], operation[1]
        if kind == "load":
            return memory, memory[at]
        if kind == "store":
            changed = list(memory)
            changed[at] = operation[2]
            for word, value in operation[3]:
                changed[word] = value
            return self._observed(changed), None
        if kind == "exchange":
            table = dict(operation[2])
            if memory[at] not in table:
                return memory, memory[at]
            changed = list(memory)
            changed[at] = table[memory[at]]
            return self._observed(changed), memory[at]
        if kind in ("sleep", "woken"):
            return self._sleep(memory, process, operation)
        if kind in ("lock", "attempt"):
            return self._take(memory, process, at, kind == "attempt")
        if kind == "after all":
            return memory, None
        if kind == "fail":
            raise Violation(at)
        return self._leave(memory, process, at, kind), None

    def _sleep(
        self, memory: tuple[Value, ...], process: int, operation: Operation
    ) -> tuple[tuple[Value, ...], Value] | None:
        """sleep, woken."""
        changed: list[Any] = list(memory)
        if operation[0] == "sleep":
            _, at, value, queue = operation
            if memory[at] != value:
                return memory, False
            changed[queue] |= {(process, value)}
            return tuple(changed), True
        _, queue, unless = operation
        asleep = {sleeper for sleeper in changed[queue] if sleeper[0] == process}
        if not asleep:
            return memory, OK
        if not memory[unless]:
            return None
        changed[queue] -= asleep
        return tuple(changed), OVER

    def _take(
        self, memory: tuple[Value, ...], process: int, at: int, try_only: bool
    ) -> tuple[tuple[Value, ...], Value] | None:
        word: Any = memory[at]
        if word >= 0:
            return (memory, BUSY) if try_only else None
        changed = list(memory)
        changed[at] = process if word == FREE else process + REPAIRING
        return tuple(changed), OK if word == FREE else DIED

    def _leave(
        self, memory: tuple[Value, ...], process: int, at: int, kind: str
    ) -> tuple[Value, ...]:
        """consistent, unlock."""
        repaired = memory[at] == process
        if not repaired and memory[at] != process + REPAIRING:
            raise Violation(f"would {kind} what it does not hold")
        changed = list(memory)
        if kind == "unlock" and not repaired:
            raise Violation("leaves a lock that nobody can ever take again")
        changed[at] = process if kind == "consistent" else FREE
        return tuple(changed)

    def _observed(self, memory: list[Value]) -> tuple[Value, ...]:
        if self.model.observe:
            self.model.observe(Memory(self.places, memory))
        return tuple(memory)

    def _bury(self, memory: tuple[Value, ...], process: int) -> tuple[Value, ...]:
        """What the kernel does, and what the model notes, when a process is killed."""
        changed = list(memory)
        for at in range(self.locks):
            if changed[at] in (process, process + REPAIRING):
                changed[at] = DEAD
        if self.model.bury:
            self.model.bury(Memory(self.places, changed), process)
        return tuple(changed)

    # --- where a process is ---

    def _enter(self, routine: Any, arguments: Any, caller: Place | None) -> Place:
        return self._place(routine, arguments, (), caller)

    def _follow(self, place: Place, result: Value) -> Place:
        """The place after the operation at `place` had this result."""
        following = place.following.get(result)
        if following is None:
            sent = (*place.sent, result)
            following = self._place(place.routine, place.arguments, sent, place.caller)
            place.following[result] = following
        return following

    def _place(self, routine: Any, arguments: Any, sent: Any, caller: Place | None) -> Place:
        """The place with this history, once: further in when it calls, further out at its end."""
        key = (routine, arguments, sent, caller)
        known = self._interned.get(key)
        if known is not None:
            return known
        place = Place(routine, arguments, sent, caller)
        operation, result = self._replay(place)
        if operation is None:
            place = END if caller is None else self._follow(caller, result)
        elif operation[0] == "call":
            place = self._enter(operation[1], operation[2], place)
        else:
            place.mortal = operation[0] in VISIBLE and not (caller is None and not sent)
            place.operation = self._compiled(operation)
        self._interned[key] = place
        return place

    def _replay(self, place: Place) -> tuple[Operation | None, Value]:
        """What the generator yields after that history; (None, result) when it has returned."""
        generator = place.routine(*place.arguments)
        try:
            operation = next(generator)
            for result in place.sent:
                operation = generator.send(result)
        except StopIteration as end:
            return None, end.value
        return operation, None

    def _compiled(self, operation: Operation) -> Operation:
        """The same with places for words."""
        kind, word = operation[:2]
        if kind in ("fail", "after all"):
            return operation
        if kind == "exchange":
            return kind, self.places[word], operation[2]
        if kind == "sleep":
            return kind, self.places[word], operation[2], self.places[operation[3]]
        if kind == "woken":
            return kind, self.places[word], self.places[operation[2]]
        if kind != "store":
            return kind, self.places[word]
        also = tuple((self.places[other], value) for other, value in operation[3])
        return kind, self.places[word], operation[2], also

    # --- what to tell about a violation ---

    def _schedule(self, last: State) -> list[str]:
        path = [last]
        while (before := self._came_from[path[-1]]) is not None:
            path.append(before)
        path.reverse()
        return [self._told(*pair) for pair in pairwise(path)]

    def _told(self, before: State, after: State) -> str:
        process = next(i for i, p in enumerate(before[1]) if p is not after[1][i])
        place = before[1][process]
        what = self._words_of(place.operation)
        if after[1][process] is DEATH:
            return f"process {process} is killed before it would {what}"
        result = "" if len(place.following) < 2 else self._result(place, after[1][process])
        return f"process {process} in {place.routine.__name__}: {what}{result}"

    def _words_of(self, operation: Operation) -> str:
        names = list(self.places)
        kind, at = operation[:2]
        if kind in ("fail", "after all"):
            return kind
        return f"{kind} {names[at]}" + (
            f" = {operation[2]}" if kind in ("store", "exchange", "sleep") else ""
        )

    def _result(self, place: Place, after: Place) -> str:
        return "".join(f" -> {value}" for value, there in place.following.items() if there is after)
