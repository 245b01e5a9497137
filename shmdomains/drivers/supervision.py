"""Watching guests: what they do by themselves gets into the record, and is answered.

One worker of a host is elected (`Driver.supervise`) and runs a `Supervisor`. Its thread has an
asyncio loop with a task for each guest: that waits for the end of the guest's process (a pidfd) and
for what its hypervisor says (`Hooks.news`). Another thread learns from the list's events which
guests there are.

**Nothing is decided by what was heard.** A task that hears something calls `Guests.look`, which
looks at the guest with a job on its domain. So two supervisors, as there may be for a moment after
a network's failure, do no harm, nor does one that hears late, twice, or of a guest that another
worker is ending. What nobody heard, because the supervisor had died or events were missed, the next
look at all guests finds.

Hooks and locks may take long, so they are called in a few threads of the supervisor's, and the loop
stays free. One that fails is tried again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from .. import DomainInfo, EventsMissed, Job, ListClosed, ShmDomainsError
from .guests import is_same
from .hooks import News

if TYPE_CHECKING:
    from .guests import Guests

logger = logging.getLogger(__name__)

THREADS = 8
STOP = 0.1  # seconds between two looks whether the supervisor is to stop
SWEEP = 5.0  # seconds between two looks at everything
AGAIN = 1.0  # seconds until what failed is tried again
SLICE = 0.01  # seconds between two looks whether another worker is done with the domain
HEAR_AGAIN = 0.1  # seconds until a hypervisor that said all is asked again
LAST_WORDS = 0.5  # seconds that are given to what a guest whose process has ended had still said

_WORKED_ON, _THERE, _LET_GO = "worked on", "there", "let go"

_T = TypeVar("_T")


class Supervisor:
    """The job of the elected worker: `run`."""

    def __init__(self, driver: Guests) -> None:
        self._driver = driver

    def run(self, stop: threading.Event) -> None:
        """Watch the guests of this host until `stop` is set."""
        with suppress(ListClosed):
            asyncio.run(_Watch(self._driver).run(stop))


class _Watch:
    """One term of a supervisor."""

    def __init__(self, driver: Guests) -> None:
        self._driver, self._doms = driver, driver.doms
        self._tasks: dict[UUID, tuple[tuple[int, int | None], asyncio.Task[None]]] = {}
        """Of each domain: the id and the pid of its guest, and the task that watches it."""

    async def run(self, stop: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(THREADS, "shmdomains-supervisor")
        self._over = threading.Event()
        self._events = self._doms.watch(timeout=STOP)  # before the first look: nothing is missed
        reader = threading.Thread(target=self._read, name="shmdomains-supervisor", daemon=True)
        reader.start()
        try:
            while not stop.is_set():
                await self._tried(self._driver.settle_all)
                end = self._loop.time() + SWEEP
                while not stop.is_set() and self._loop.time() < end and reader.is_alive():
                    await asyncio.sleep(STOP)
                if not reader.is_alive():
                    return  # the list is closed
        finally:
            self._over.set()
            tasks = [task for _, task in self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._loop.run_in_executor(None, reader.join)
            await self._loop.run_in_executor(None, self._threads.shutdown)

    # --- which guests there are: a thread, so that what it says is in order ---

    def _read(self) -> None:
        """Tell the loop of each event, and now and then of all guests."""
        with suppress(ListClosed):
            while not self._over.is_set():
                try:
                    self._look_at_all()
                    self._read_events()
                except ListClosed:
                    raise
                except Exception as error:
                    _log(error)
                    self._over.wait(AGAIN)

    def _read_events(self) -> None:
        """For a while, or until some were missed."""
        end = time.monotonic() + SWEEP
        while not self._over.is_set() and time.monotonic() < end:
            for event in self._events:
                if isinstance(event, EventsMissed):
                    return
                info = self._doms.peek(event.uuid, definitions=True)
                self._loop.call_soon_threadsafe(self._look_at, event.uuid, info)
                if self._over.is_set() or time.monotonic() >= end:
                    break

    def _look_at_all(self) -> None:
        active = self._doms.list(active=True)
        self._loop.call_soon_threadsafe(self._look_at_these, active)

    # --- in the loop ---

    def _look_at_these(self, active: Sequence[DomainInfo]) -> None:
        infos = {info.uuid: info for info in active}
        for uuid in self._tasks.keys() | infos.keys():
            self._look_at(uuid, infos.get(uuid))

    def _look_at(self, uuid: UUID, info: DomainInfo | None) -> None:
        """Begin to watch this domain's guest, or another one than before, or none any more."""
        guest = None
        if info is not None and self._driver._is_watchable(info):
            guest = info.id, info.pid
        watched, task = self._tasks.get(uuid, (None, None))
        if watched == guest:
            return
        if task is not None:
            task.cancel()
            del self._tasks[uuid]
        if info is not None and guest is not None:
            self._tasks[uuid] = guest, self._loop.create_task(self._follow(info))

    # --- one guest ---

    async def _follow(self, guest: DomainInfo) -> None:
        """Until this is cancelled, for the domain has another guest or none."""
        heard: asyncio.Queue[News | None] = asyncio.Queue()
        last = News()
        ear = _Ear(self._driver, guest, heard)
        listener = self._loop.create_task(ear.listen())
        pidfd = self._opened(guest.pid, heard)
        try:
            if pidfd is not None:
                self._loop.add_reader(pidfd, self._gone, pidfd, heard)
                # The number may have been another process's when it was opened.
                if not await self._tried(self._driver.alive, guest):
                    heard.put_nowait(None)
            while True:
                # Without a descriptor somebody has to look now and then.
                patience = SWEEP if pidfd is None and guest.pid is not None else None
                gone = False
                try:
                    news = await _within(patience, heard.get())
                    gone = news is None
                except TimeoutError:
                    news = last
                if news is None:  # what it said of its end may be on its way still
                    await ear.rest(LAST_WORDS)
                    while not heard.empty():
                        said = heard.get_nowait()
                        last = said if said is not None and said.reason is not None else last
                    news = last
                elif news.reason is not None:
                    last = news
                    if not news.by:
                        continue  # its process is about to end
                # More may be heard of one whose process is there.
                news = news._replace(over=gone or pidfd is None)
                await self._tell(guest, news, gone)
        finally:
            if pidfd is not None:
                self._loop.remove_reader(pidfd)
                os.close(pidfd)
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)

    def _opened(self, pid: int | None, heard: asyncio.Queue[News | None]) -> int | None:
        if pid is None:
            return None
        try:
            return os.pidfd_open(pid)
        except ProcessLookupError:
            heard.put_nowait(None)
        except OSError as error:  # no descriptor is left
            text = "process %d is looked at every %g s only: %s"
            logger.error(text, pid, SWEEP, error.strerror)
        return None

    def _gone(self, pidfd: int, heard: asyncio.Queue[News | None]) -> None:
        self._loop.remove_reader(pidfd)
        heard.put_nowait(None)

    async def _tell(self, guest: DomainInfo, news: News, gone: bool) -> None:
        """Look at the guest until that succeeds; at one whose process is `gone`, until its record
        does not have it any more. The driver may see that later than the kernel."""
        late = SLICE
        while True:
            done = await self._tried(self._look, guest, news)
            if done is None:
                await asyncio.sleep(AGAIN)
            elif done is _WORKED_ON:
                await asyncio.sleep(SLICE)
            elif gone and done is _THERE:
                await asyncio.sleep(late)
                late = min(2 * late, AGAIN)
            else:
                return

    def _look(self, guest: DomainInfo, news: News) -> str:
        """What has become of it. A worker that has a job on the domain may take long, and may be
        ending the guest: no thread waits for it."""
        now = self._doms.peek(guest.uuid, definitions=True)
        if now is not None and any(
            job.kind is not Job.ASYNC and job.holder.alive for job in now.jobs
        ):
            return _WORKED_ON
        self._driver.look(guest, news)
        now = self._doms.peek(guest.uuid, definitions=True)
        return _THERE if now is not None and is_same(now, guest) else _LET_GO

    # --- hooks and locks ---

    async def _tried(self, call: Callable[..., _T], *arguments: object) -> _T | None:
        """What `call` returns, in a thread; ``None``, and a line in the log, if it fails."""
        try:
            return await self._loop.run_in_executor(self._threads, call, *arguments)
        except ListClosed:
            raise
        except Exception as error:
            _log(error)
            return None


class _Ear:
    """What the hypervisor says of one guest, again and again."""

    def __init__(
        self, driver: Guests, guest: DomainInfo, heard: asyncio.Queue[News | None]
    ) -> None:
        self._driver, self._guest, self._heard = driver, guest, heard
        self._deaf = asyncio.Event()

    async def listen(self) -> None:
        while True:
            try:
                told = self._driver.news(self._guest)
                if told is None:
                    return
                self._deaf.clear()
                async for news in told:
                    self._heard.put_nowait(news)
                pause = HEAR_AGAIN
            except Exception as error:
                _log(error)
                pause = AGAIN
            finally:
                self._deaf.set()
            await asyncio.sleep(pause)

    async def rest(self, seconds: float) -> None:
        """Until it has said all, or nothing more is to be heard."""
        with suppress(TimeoutError):
            await _within(seconds, self._deaf.wait())


async def _within(seconds: float | None, doing: Coroutine[Any, Any, _T]) -> _T:
    """Its result, or `TimeoutError`. (`asyncio.wait_for` may swallow a cancellation.)"""
    task = asyncio.ensure_future(doing)
    try:
        await asyncio.wait((task,), timeout=seconds)
        if not task.done():
            raise TimeoutError
        return task.result()
    finally:
        task.cancel()


def _log(error: Exception) -> None:
    mistake = None if isinstance(error, ShmDomainsError) else error
    text = "supervision: %s; it will be tried again"
    logger.warning(text, str(error) or repr(error), exc_info=mistake)
