"""Jobs on a domain of a `PostgresDomainList`: those of every list, and for a task of an event loop
in another thread (`tasks`)."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import LockTimeout, ShmDomainsError
from ..lazy import LazyModule
from ..memory._core import core
from ..rules.jobs import DomainJob
from ..rules.tasks import ask

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..memory import asking
else:
    asking = LazyModule("shmdomains.memory.asking")


class PostgresJob(DomainJob):
    """A job, for one ``with`` or ``async with`` block: `PostgresDomain.job`."""

    __slots__ = ()

    async def __aenter__(self) -> Self:
        ask()
        return await asking.work_or_undo(self.__enter__, lambda job: job.__exit__(None, None, None))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        if kind is GeneratorExit:  # its coroutine was closed, and may not wait
            if self._owner == core.owner():
                self.__exit__(kind, value, traceback)
            return
        try:
            await asking.work(self._finish)
        except BaseException:
            with suppress(ShmDomainsError):
                await asking.finish(self._take_back)
            raise

    def _end(self, timeout: float | None) -> None:
        if timeout == 0 and asyncio._get_running_loop() is not None:
            raise LockTimeout("an event loop does not wait for it")  # then it is owed (`_give_up`)
        super()._end(timeout)
