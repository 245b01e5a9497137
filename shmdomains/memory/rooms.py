"""Rooms: where the tasks of one thread wait, each for its lock, and nobody blocks the thread.

For each lock that tasks of a thread wait for there is a room, a queue: they get the lock in the
order in which they came. Only the first one tries. It is woken

- when another task of the thread frees the lock: the core tells (`freed`);
- when another thread or process may have freed it: a watch on the mutex tells, through the inbox's
  descriptor, which is in the event loop (``_core/observe.h``);
- after each slice, since nobody tells of a process that was killed at the wrong moment.

Between threads and processes nobody hands a lock over: whoever comes first has it. The tasks of one
thread would pass it among themselves for ever and let no stranger in, so after `STREAK` the first
one lets the strangers go first, if there are some: it watches for the next time that the lock is
freed, and tries again after `GRACE` in any case. That works because whoever had to wait for a mutex
leaves the mark in it that there may be more who wait, so freeing it wakes them
(`Blocked.keep_waiters`).

`Sleep` is for a change instead of a lock; there is no queue for that. Whoever sleeps asks again
after a slice, too: that the holder of a job died, or a writer between its commit and the news of
it, is no change of the word that is watched. A few of them in each round, so with many this takes
longer.

A hub belongs to an event loop, and to the thread that runs it. All of it is used in that thread
only. A thread may run several loops in turn.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar
from weakref import ReferenceType, ref

from ._core import core

SLICE = 0.05
"""Seconds after which whoever waits looks, whatever was told."""
STREAK = 0.001
GRACE = 0.002
_LOOKS = 8  # in one round: who is woken asks again, and all of them before the loop goes on
_CHECKS = 500  # in one round: whether what is slept for came
_ROUND = SLICE / 8  # seconds between rounds that are not enough for all


T = TypeVar("T", bound="Room | Sleep")


class Timer(Protocol):
    """What an event loop returns for a later call."""

    def cancel(self) -> object: ...


class Hub:
    """The rooms of one event loop. `later` calls a function after so many seconds, in its thread;
    `runs` says whether the loop runs now."""

    def __init__(
        self,
        of: object,
        later: Callable[[float, Callable[[], None]], Timer],
        runs: Callable[[], bool],
    ) -> None:
        self.of = of
        self.runs = runs
        self.inbox = core.Inbox()
        self.rooms: dict[tuple[int, int, int], Room] = {}
        self.trying: Turn | None = None
        self.later = later
        self._sleeps: dict[Sleep, None] = {}
        self._rooms_left: list[Room] = []  # of this turn of looks
        self._sleeps_left: list[Sleep] = []
        self._to_check: list[Sleep] = []
        self._timer: Timer | None = None

    def enter(self, blocked: core.Blocked, wake: Callable[[], None]) -> Turn:
        """Stand in the queue of a lock. Raises `ListClosed`."""
        wait = core.TaskWait(blocked)
        room = self.rooms.get(blocked.key)
        if room is None:
            room = Room(self, blocked)
        turn = Turn(room, wait, wake)
        try:
            room.turns.append(turn)
            if room.turns[0] is turn:
                room.begin()
            self._tick_later()
        except BaseException:
            turn.leave()  # whoever stays there, and never asks, keeps out the others
            raise
        return turn

    def sleep(self, blocked: core.Blocked, wake: Callable[[], None]) -> Sleep:
        """Have `wake` called when what is slept for came."""
        sleep = Sleep(self, blocked, wake)
        self._sleeps[sleep] = None
        self._tick_later()
        return sleep

    def read(self) -> None:
        """The inbox's descriptor is readable."""
        while (watch := self.inbox.take()) is not None:
            watch.fired()

    def _tick_later(self, seconds: float = SLICE) -> None:
        if self._timer is None:
            self._timer = self.later(seconds, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if not self.rooms and not self._sleeps:
            self._rooms_left, self._sleeps_left, self._to_check = [], [], []
            return
        if not self._to_check:
            self._to_check = list(self._sleeps)
        if not self._sleeps_left:
            self._sleeps_left = list(self._sleeps)
        if not self._rooms_left:
            self._rooms_left = list(self.rooms.values())
        checked, self._to_check = self._to_check[:_CHECKS], self._to_check[_CHECKS:]
        looked: list[Room | Sleep] = [*_due(self._rooms_left), *_due(self._sleeps_left)]
        more = self._to_check or self._sleeps_left or self._rooms_left
        self._tick_later(_ROUND if more else SLICE)
        for sleep in checked:
            if sleep in self._sleeps and sleep.blocked.changed:
                sleep.wake()
        for one in looked:
            one.after_slice()

    def close(self) -> None:
        """The event loop is closed: nobody waits any more, and nobody can be woken."""
        if self._timer is not None:
            self._timer.cancel()
        for sleep in list(self._sleeps):
            sleep.end()
        for room in list(self.rooms.values()):
            room.close()
        _forget_hub(self)


def _due(left: list[T]) -> list[T]:
    """A few that were not looked at for a slice. All get their turn before one does again."""
    due = time.monotonic() - SLICE / 2
    found: list[T] = []
    while left and len(found) < _LOOKS:
        one = left.pop()
        if one.looked < due and one.waits:
            found.append(one)
    return found


class Room:
    """Those of one thread who wait for one lock."""

    __slots__ = (
        "_armed",
        "_holder",
        "_hub",
        "_told",
        "_watch",
        "blocked",
        "looked",
        "streak",
        "turns",
    )

    def __init__(self, hub: Hub, blocked: core.Blocked) -> None:
        self._hub = hub
        self._watch = core.Watch(hub.inbox, self._fired)
        self._armed = False
        self._told = False  # it was the watch that woke the first one
        self._holder = 0  # a slice ago
        self.blocked = blocked
        self.turns: deque[Turn] = deque()
        self.looked = time.monotonic()
        self.streak = 0.0  # since when tasks of this thread pass the lock on

    @property
    def waits(self) -> bool:
        return bool(self.turns)

    def begin(self) -> None:
        self._hub.rooms[self.blocked.key] = self
        core.rooms_here(1)
        self.look_out()

    def look_out(self) -> None:
        """The first one waits: be told when the lock is free."""
        if not self._armed and not self.blocked.beside:
            self._armed = self._watch.begin(self.blocked)

    def _fired(self) -> None:
        self._armed = False
        self.streak = 0.0  # strangers had it
        self._wake_first()
        self._told = True

    def _wake_first(self) -> None:
        self._told = False
        self.looked = time.monotonic()
        if self.turns:
            self.turns[0].wake()

    def freed(self, strangers: bool) -> None:
        """A task of this thread, or the thread itself, is about to free the lock. So strangers who
        wait for it come before the watch of `strangers`' turn."""
        now = time.monotonic()
        self.streak = self.streak or now
        if strangers and now - self.streak > STREAK and not self._armed:
            self._armed = self._watch.begin(self.blocked, True)
            if self._armed:
                self._hub.later(GRACE, self._end_of_grace)
                return
        self._wake_first()

    def _end_of_grace(self) -> None:
        self.streak = 0.0
        if not self.blocked.beside:
            self._wake_first()

    def after_slice(self) -> None:
        self.looked = time.monotonic()
        if not self.turns[0].wait.look():  # whose wait is the longest
            for turn in self.turns:
                turn.wake()  # the list is closed
            return
        if self.blocked.beside:
            return
        former, self._holder = self._holder, self.blocked.holder
        if self._armed and self._holder and self._holder != former:
            return  # it changes hands
        self.blocked.look()
        self._wake_first()

    def close(self) -> None:
        while self.turns:
            self.turns.pop().end()
        self._end()

    def leave(self, turn: Turn) -> None:
        """Again where a signal handler raised in the middle."""
        first = bool(self.turns) and self.turns[0] is turn
        with suppress(ValueError):
            self.turns.remove(turn)
        if self._hub.trying is turn:
            self._hub.trying = None
        if first and self._told and self.blocked.beside:
            self.blocked.keep_waiters()  # strangers may have let it go first
        if not self.turns:
            self._end()
        elif first and not self.blocked.beside:
            self._wake_first()

    def _end(self) -> None:
        self._watch.cancel()
        if self._hub.rooms.get(self.blocked.key) is self:
            del self._hub.rooms[self.blocked.key]
            core.rooms_here(-1)


class Turn:
    """A place in the queue of a room."""

    __slots__ = ("_room", "wait", "wake")

    def __init__(self, room: Room, wait: core.TaskWait, wake: Callable[[], None]) -> None:
        self._room: Room | None = room
        self.wait = wait
        self.wake = wake

    def is_for(self, blocked: core.Blocked) -> bool:
        """Whether it is the queue for this."""
        return self._room is not None and self._room.blocked.key == blocked.key

    def stay(self) -> None:
        """It was this one's turn, and the lock was not free."""
        if self._room is not None:
            self._room.look_out()

    def leave(self) -> None:
        """Whether it has the lock or not."""
        room = self._room
        if room is not None:
            room.leave(self)
            self.end()

    def end(self) -> None:
        self._room = None
        self.wait.end()


class Sleep:
    """One who waits for a change."""

    __slots__ = ("_hub", "_watch", "blocked", "looked", "wake")

    def __init__(self, hub: Hub, blocked: core.Blocked, wake: Callable[[], None]) -> None:
        self.looked = time.monotonic()
        self._hub = hub
        self._watch = core.Watch(hub.inbox, wake)
        self.blocked = blocked
        self.wake = wake
        self._watch.begin(blocked)

    @property
    def waits(self) -> bool:
        return self in self._hub._sleeps

    def after_slice(self) -> None:
        self.looked = time.monotonic()
        self.wake()

    def end(self) -> None:
        self._watch.cancel()
        self._hub._sleeps.pop(self, None)


# The hubs of each thread, by the core's number for it, which no other thread and no child gets.
# Only its loop keeps a hub.
_hubs: dict[int, list[ReferenceType[Hub]]] = {}
# A child may go on with the loop; what the parent's inboxes would tell goes to the parent.
os.register_at_fork(after_in_child=_hubs.clear)


def _hubs_here() -> list[Hub]:
    return [hub for known in _hubs.get(core.thread(), ()) if (hub := known()) is not None]


def hub_of(loop: object) -> Hub | None:
    """The hub of this event loop, which this thread runs."""
    for hub in _hubs_here():
        if hub.of is loop:
            return hub
    for known in [known for hubs in list(_hubs.values()) for known in hubs]:
        moved = known()
        if moved is not None and moved.of is loop:  # another thread ran it before
            _forget_hub(moved)
            add_hub(moved)
            core.rooms_here(len(moved.rooms))
            return moved
    return None


def add_hub(hub: Hub) -> None:
    """From here on it is one of this thread's."""
    _hubs.setdefault(core.thread(), []).append(ref(hub))


def _forget_hub(hub: Hub) -> None:
    for thread, hubs in list(_hubs.items()):
        kept = [known for known in hubs if known() not in (None, hub)]
        if kept:
            _hubs[thread] = kept
        else:
            del _hubs[thread]


def begin() -> None:
    """From here on the core asks for the running task, and tells what its thread frees."""
    core.tasks_with(freed=freed, may_try=may_try)


def freed(segment: int, kind: int, number: int, strangers: bool) -> None:
    """A lock is about to be freed in this thread; `strangers` wait for it, too."""
    for hub in _hubs_here():
        room = hub.rooms.get((segment, kind, number))
        if room is not None:
            room.freed(strangers)


def may_try(segment: int, kind: int, number: int) -> bool:
    """Whether whoever asks may try a lock: nobody of this thread came before."""
    hubs = _hubs_here()
    for hub in hubs:
        if len(hubs) == 1 or hub.runs():
            room = hub.rooms.get((segment, kind, number))
            return room is None or room.turns[0] is hub.trying
    return True
