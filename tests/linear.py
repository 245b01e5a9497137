"""Is there an order in which a recorded history makes sense?

A history is linearisable if every operation can be given one moment between its start and its end
so that, done one after another at these moments, all of them have the results they had (Herlihy and
Wing). The search is Lowe's just-in-time variant of Wing and Gong's: go through starts and ends by
time and keep every *configuration* that is possible so far - the state, and which of the operations
under way have not taken effect. An operation takes effect no sooner than somebody's end demands it.
Configurations are remembered in a set, so an order that leads where another one led costs nothing.

The checker knows nothing of domains: an operation says which states may follow a state (none: it
cannot have had its result there). Split a history by object before you check it (see history.py):
it is linearisable if each object's is, and the search stays small.

A history that cannot be explained is cut down to the fewest operations that cannot be, whatever
became of all the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from itertools import combinations

State = Hashable
Config = tuple[State, frozenset[int]]
Event = tuple[int, bool, int]  # when, is it the end, of which operation

WINDOW = 64  # operations among which the fewest are looked for
EXHAUSTIVE = 3  # up to so many, no smaller choice is left untried
LINES = 20  # of what was under way meanwhile


@dataclass(frozen=True)
class Operation:
    """`step(state)` gives the states that may follow; `reads` promises none but the same state.

    `maybe`: it took effect or it did not, like the last one of a worker that was killed.
    """

    who: str
    start: int
    end: int
    step: Callable[[State], Collection[State]]
    text: str
    reads: bool = False
    maybe: bool = False


@dataclass(frozen=True)
class Contradiction:
    """`operations` have no order from any of the states in `before`, whichever of the others that
    followed took effect. Some of these were under way together with the last one: `meanwhile`."""

    operations: list[Operation]
    before: set[State]
    meanwhile: list[Operation]

    def __str__(self) -> str:
        zero = self.operations[0].start

        def line(op: Operation) -> str:
            start, end = (f"{(time - zero) / 1000:,.1f}" for time in (op.start, op.end))
            return f"  {start:>10} to {end:>10} us  {op.who:>4}  {op.text}"

        return "\n".join(
            [
                f"no order explains {len(self.operations)} of the operations:",
                *map(line, self.operations),
                f"what could be {WINDOW} operations before:",
                *sorted(f"  {state}" for state in self.before),
                "under way meanwhile:",
                *map(line, self.meanwhile[:LINES]),
            ]
        )


def contradiction(history: list[Operation], initial: State) -> Contradiction | None:
    """What cannot be explained if `initial` was the state before all of it; None: there is an
    order."""
    history = _by_time(history)
    events = _events(history)
    trail: list[set[Config]] = [{(initial, frozenset())}]
    required = {i for i, op in enumerate(history) if not op.maybe}
    last = _sweep(history, events, required, trail)
    if last is None:
        return None
    return _smallest(history, events[: len(trail)], required, last, trail)


def _events(history: list[Operation]) -> list[Event]:
    """In order of time; of what happens at the same moment, starts first: it overlaps."""
    starts = [(op.start, False, i) for i, op in enumerate(history)]
    return sorted(starts + [(op.end, True, i) for i, op in enumerate(history)])


def _sweep(
    history: list[Operation],
    events: Iterable[Event],
    required: Collection[int],
    trail: list[set[Config]],
) -> int | None:
    """Follow the events from the last configurations of `trail`, to which those after each event
    are added. Returns the operation at whose end none is left."""
    for _, is_end, i in events:
        configs = trail[-1]
        if is_end:
            after = _done(history, configs, i)
            if i not in required:
                after |= {(state, waiting - {i}) for state, waiting in configs}
        else:
            after = {_settled(history, state, waiting | {i}) for state, waiting in configs}
        if not after:
            return i
        trail.append(after)
    return None


def _done(history: list[Operation], configs: set[Config], i: int) -> set[Config]:
    """The configurations in which `i` has taken effect, reached by no more than it needs."""
    found: set[Config] = set()
    seen: set[Config] = set()
    todo = list(configs)
    while todo:
        config = todo.pop()
        if config in seen:
            continue
        seen.add(config)
        state, waiting = config
        if i not in waiting:
            found.add(config)
            continue
        for j in waiting:
            if not history[j].reads:
                rest = waiting - {j}
                todo += [_settled(history, after, rest) for after in history[j].step(state)]
    return found


def _settled(history: list[Operation], state: State, waiting: frozenset[int]) -> Config:
    """Reads that fit a state take effect at once: it costs no other operation anything."""
    fit = [i for i in waiting if history[i].reads and len(history[i].step(state))]
    return state, waiting.difference(fit)


def _smallest(
    history: list[Operation],
    events: list[Event],
    required: set[int],
    last: int,
    trail: list[set[Config]],
) -> Contradiction:
    """The fewest of the operations up to the end of `last` that exclude each other.

    All that came before is explained, so `last` is one of them. All the others may have happened or
    not. Looked for among the last `WINDOW`; what was possible before these is known.
    """
    begin = _window(events)
    before, events = trail[begin], events[begin:]
    candidates = sorted({i for _, _, i in events} & required - {last}, reverse=True)

    def excluded(kept: Collection[int]) -> bool:
        return _sweep(history, events, {last, *kept}, [before]) is not None

    def story(kept: Collection[int]) -> Contradiction:
        final = history[last]
        together = [op for op in history if op.end >= final.start and op.start <= final.end]
        return Contradiction(
            _by_time(history[i] for i in {last, *kept}),
            {state for state, _ in before},
            _by_time(op for op in together if op is not final),
        )

    for size in range(EXHAUSTIVE):
        for kept in combinations(candidates, size):
            if excluded(kept):
                return story(kept)
    kept = set(candidates)
    for i in sorted(candidates):
        if excluded(kept - {i}):
            kept.remove(i)
    return story(kept)


def _by_time(operations: Iterable[Operation]) -> list[Operation]:
    return sorted(operations, key=lambda op: (op.start, op.end, op.who))


def _window(events: list[Event]) -> int:
    """Where the last events of `WINDOW` operations begin."""
    seen: set[int] = set()
    for begin in range(len(events) - 1, -1, -1):
        seen.add(events[begin][2])
        if len(seen) == WINDOW:
            return begin
    return 0
