"""The workers of a storm as tasks: several in each process, in one event loop (storm_worker.py has
what they do, and storm.py the storms)."""

from __future__ import annotations

import asyncio
import inspect
import random
from contextlib import suppress
from typing import Any

from killing import Pipe, xml
from storm_worker import (
    QUIET_TURNS,
    Ledger,
    RolledBack,
    Shape,
    Worker,
    own_memory,
    own_name,
    own_uuid,
    shared_name,
    shared_uuid,
)

from shmdomains import DomainList, LockTimeout, aio


class TaskWorker(Worker):
    """The same by `shmdomains.aio`. Now and then it is cancelled while it waits."""

    def __init__(
        self, doms: DomainList, shape: Shape, ledger: Ledger, process: int, task: int
    ) -> None:
        super().__init__(doms, shape, ledger, process * shape.tasks + task)
        self.process, self.tasks = process, aio.wrap(doms)
        self.operations = [getattr(self, one.__name__) for one in self.operations]

    async def work(self) -> None:  # type: ignore[override]
        left = QUIET_TURNS
        while left:
            left -= self.ledger.quiet
            self.turn += 1
            self.light(self.process)
            [operation] = self.chance.choices(self.operations, cum_weights=self.weights)
            if self.chance.random() < 0.1:
                await self.be_cancelled_soon()
            done: Any = operation()
            if inspect.isawaitable(done):
                await done
            await asyncio.sleep(0)

    async def be_cancelled_soon(self) -> None:
        """Wherever it waits then: it holds nothing, and the next one goes on."""
        operation = self.chance.choice([self.count_one, self.count_two, self.change_and_roll_back])
        task = asyncio.ensure_future(operation())
        for _ in range(self.chance.randrange(4)):
            await asyncio.sleep(0)
        if self.chance.random() < 0.5:
            await asyncio.sleep(self.chance.random() * 0.002)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    # Shared domains

    def block(self, domain: int, timeout: float) -> Any:
        if self.chance.random() < 0.5:
            return self.tasks.get(name=shared_name(domain), timeout=timeout)
        return self.tasks.get(uuid=shared_uuid(domain), timeout=timeout)

    async def pause(self) -> None:
        """With a lock held."""
        if self.chance.random() < 0.2:
            await asyncio.sleep(0)

    async def count_one(self) -> None:  # type: ignore[override]
        domain = self.choose()
        async with self.block(domain, self.patience) as dom:
            cell = self.ask_for_one(dom, domain)
        self.ledger.acknowledge(cell)

    async def count_under_the_list_lock(self) -> None:  # type: ignore[override]
        domain = self.choose()
        async with self.tasks.locked(self.patience):
            dom = await self.tasks.find_by_name(shared_name(domain), self.patience)
            await self.pause()
        assert dom is not None, f"lost: {shared_name(domain)}"
        async with dom:
            await self.pause()
            cell = self.ask_for_one(dom, domain)
        self.ledger.acknowledge(cell)

    async def count_two(self) -> None:  # type: ignore[override]
        both = list({self.choose(), self.choose()})
        block = self.tasks.lock_many([shared_uuid(one) for one in both], self.patience)
        async with block as locked:
            cells = [self.ask_for_one(*pair) for pair in zip(locked, both, strict=True)]
        for cell in cells:
            self.ledger.acknowledge(cell)

    async def count_and_commit_part_way(self) -> None:  # type: ignore[override]
        domain = self.choose()
        async with self.block(domain, self.patience) as dom:
            for _ in range(2):
                await self.pause()
                cell = self.ask_for_one(dom, domain)
                dom.commit(self.patience)
                self.ledger.acknowledge(cell)

    async def change_and_roll_back(self) -> None:  # type: ignore[override]
        domain = self.choose()
        with suppress(RolledBack):
            async with self.block(domain, self.patience) as dom:
                self.add_one(dom, domain)
                await self.pause()
                raise RolledBack

    async def give_up_soon(self) -> None:  # type: ignore[override]
        domain = self.choose()
        try:
            async with self.block(domain, self.chance.random() * 0.001) as dom:
                cell = self.ask_for_one(dom, domain)
        except LockTimeout:
            return
        self.ledger.acknowledge(cell)

    # Domains of one's own

    async def change_own(self) -> None:  # type: ignore[override]
        with self.change_of_own() as (key, before, after):
            await self.apply(key, before, after)

    async def apply(self, key: int, before: int, after: int) -> None:  # type: ignore[override]
        which, name = own_uuid(self.number, key), own_name(self.number, key, after)
        if not after:
            await self.tasks.undefine(uuid=which, timeout=self.patience)
        elif not before or before >> 32 == after >> 32:
            await self.tasks.define(xml(name, which, own_memory(after)), self.patience)
        else:
            async with self.tasks.locked(self.patience):
                dom = await self.tasks.find_by_uuid(which, self.patience)
                assert dom is not None, f"lost: {own_name(self.number, key, before)}"
                async with dom:
                    await self.tasks.rename(dom, name, self.patience)


def work_in_tasks(pipe: Pipe, doms: DomainList, shape: Shape, ledger: Ledger, number: int) -> None:
    """The life of a process of workers."""
    random.seed(f"{shape.seed} {number}")

    async def all_of_them() -> None:
        workers = [TaskWorker(doms, shape, ledger, number, task) for task in range(shape.tasks)]
        pipe.say("ready")
        await asyncio.gather(*(worker.work() for worker in workers))

    asyncio.run(all_of_them())
    pipe.say("done")
    pipe.rest()
