"""Watching a list: its events, one after the other, and a descriptor for event loops.

No lock is taken. A reader holds nothing that a writer could wait for, so one that is slow loses
events, and is told how many.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..deadline import check_timeout
from ..errors import NoEvents, ShmDomainsError
from ..events import DomainEvent, EventsMissed
from .store import D, ListBase

if TYPE_CHECKING:
    from typing_extensions import Self


class Watch(Iterator[DomainEvent | EventsMissed]):
    """What `DomainList.watch` returns: an iterator over events.

    When it has ended because of its `timeout`, which may be changed, it may be iterated again, and
    goes on where it stopped. One thread at a time uses it.

    >>> from shmdomains import DomainList
    >>> doms = DomainList()
    >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
    ...        "<os><type>hvm</type></os></domain>")
    >>> watch = doms.watch(timeout=0)
    >>> info = doms.define(xml)
    >>> [event.words for event in watch], watch.since
    (['Defined Added'], 1)
    """

    def __init__(self, doms: ListBase[Any], since: int, timeout: float | None) -> None:
        self._doms = doms
        self.timeout = timeout
        self._since = since
        self._next: DomainEvent | None = None

    @property
    def since(self) -> int:
        """The number of the last event that was given out: where another watch can go on."""
        return self._since

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> DomainEvent | EventsMissed:
        deadline = self._doms._deadline(self.timeout)
        while True:
            found = self._take()
            if found is not None:
                return found
            left = deadline.left()
            if not self._doms._sleep_on_events(self._since, left) and left == 0:
                raise StopIteration

    def _take(self) -> DomainEvent | EventsMissed | None:
        event, self._next = self._next, None
        if event is None:
            count = self._doms._event_count
            if count <= self._since:
                return None
            number = max(self._since + 1, count - self._doms._events_max + 1)
            while number <= count and event is None:
                event = self._doms._event(number)
                number += 1
            last = count if event is None else event.number - 1
            if last > self._since:
                # Made first: a signal handler may raise as it returns, and then nothing was lost.
                missed = EventsMissed(last - self._since, last)
                # The event is taken out now: the next round may overwrite it.
                self._next, self._since = event, last
                return missed
        assert event is not None
        self._since = event.number
        return event

    def __repr__(self) -> str:
        return f"<Watch since={self._since}>"


class EventDescriptor:
    """An eventfd, and the thread of this process that counts it up when there are events."""

    def __init__(self, doms: ListBase[Any]) -> None:
        self.pid = os.getpid()
        self.number = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.RLock()  # a signal handler may close the list in `stop`
        self._open = True
        # It must not keep the list alive, and the list's end ends it.
        weakref.finalize(doms, self.stop).atexit = False
        self._thread = threading.Thread(
            target=self._follow,
            args=(weakref.ref(doms), doms._event_count),
            name="shmdomains-events",
            daemon=True,
        )
        try:
            self._thread.start()
        except BaseException:
            self.stop()
            raise

    def _follow(self, list_of: weakref.ref[ListBase[Any]], count: int) -> None:
        with suppress(ShmDomainsError):  # the list was closed, or cannot be read any more
            while self._open:
                doms = list_of()
                if doms is None:
                    break
                if doms._sleep_on_events(count):
                    count = doms._event_count
                    self._tell()
                del doms
        self._tell()  # who waits for it looks, and gets the error

    def _tell(self) -> None:
        with self._lock:
            if self._open and is_eventfd(self.number):
                with suppress(BlockingIOError):  # it is as readable as can be
                    os.eventfd_write(self.number, 1)

    def stop(self) -> None:
        if self.pid != os.getpid():
            return  # a fork of the process that has the thread
        with self._lock:
            if self._open and is_eventfd(self.number):
                os.close(self.number)
            self._open = False

    def join(self) -> None:
        """After `stop`: wait for the thread, a slice of its sleep at most."""
        if self.pid == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join()


def is_eventfd(number: int) -> bool:
    """Whether it is one still: its number may be another file's since somebody closed it."""
    try:
        return "eventfd" in os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return False


class WatchRules(ListBase[D]):
    """Events, to be combined with a store."""

    _event_descriptor: EventDescriptor | None = None

    def watch(self, since: int | None = None, timeout: float | None = None) -> Watch:
        """Iterate over the list's events: of every domain, by any process. Takes no lock.

        `since` ``None``: what happens after this call, even before the first event is asked for.
        Else the events with larger numbers, as far as they are kept; 0: all of them. Numbers are
        the list's, so a watch may go on in another process where one ended (`Watch.since`).
        `timeout` in seconds is for each event: the iteration ends when none came for so long.
        ``None`` waits for ever, 0 takes what is there.

        Each event comes once, in the order of the commits. A reader that was too slow gets one
        `EventsMissed`, and goes on with the oldest event that is kept.

        Raises `ValueError` if no event has the number `since` yet, as in a list that was made anew,
        and `NoEvents`.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> events = doms.watch(timeout=0)
        >>> info = doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                    "<os><type>hvm</type></os></domain>")
        >>> with doms.get("web1") as dom:
        ...     id = dom.activate()
        >>> [(event.number, event.name, event.words) for event in events]
        [(1, 'web1', 'Defined Added'), (2, 'web1', 'Started Booted')]
        >>> [event.words for event in doms.watch(since=1, timeout=0)]
        ['Started Booted']
        """
        check_timeout(timeout)
        newest = self._need_events()
        if since is None:
            since = newest
        elif since < 0:
            raise ValueError(f"since is {since!r}, and events are counted from 1 on")
        elif since > newest:
            raise ValueError(
                f"since is {since}, and the list's last event is number {newest}: it is another "
                "list than the one that this number came from"
            )
        return Watch(self, since, timeout)

    def event_fd(self) -> int:
        """A descriptor that becomes readable when there are events after this call; for `select`,
        `selectors` and event loops.

        It is an eventfd of the list's, one for each process, and closed with the list: do not close
        it. It says only that there is something: read 8 bytes from it, and then take what a watch
        has. A forked child gets one of its own when it asks. A thread of this process waits for the
        events. Raises `NoEvents`.

        >>> import os, select
        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> events, fd = doms.watch(timeout=0), doms.event_fd()
        >>> info = doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                    "<os><type>hvm</type></os></domain>")
        >>> ready, _, _ = select.select([fd], [], [])
        >>> drained = os.read(fd, 8)
        >>> [event.words for event in events]
        ['Defined Added']
        """
        self._need_events()
        known = self._event_descriptor
        if known is None or known.pid != os.getpid() or not is_eventfd(known.number):
            made = EventDescriptor(self)
            if self._event_descriptor is known:  # no bytecode that switches threads in between
                self._event_descriptor = known = made
            else:
                made.stop()  # another thread was faster
                made.join()
                known = self._event_descriptor
        assert known is not None
        return known.number

    def _need_events(self) -> int:
        if not self._events_max:
            raise NoEvents("this list keeps no events: it was created with events=0")
        return self._event_count

    def _stop_events(self) -> None:
        """Before the list is closed."""
        if self._event_descriptor is not None:
            self._event_descriptor.stop()
            self._event_descriptor.join()
