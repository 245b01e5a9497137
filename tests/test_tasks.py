"""Tasks and greenlets of one thread, with the plain list, whose waits block: each is an owner, and
one that would wait for another of its thread is refused, since that wait could not end.
"""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from killing import Child, Pipe, xml

from shmdomains import AlreadyLocked, Domain, DomainList, DomainNotLocked

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def doms() -> Iterator[DomainList]:
    with DomainList(max_domains=8) as doms:
        for name in "ab":
            doms.define(xml(name))
        yield doms


@pytest.fixture
def dom(doms: DomainList) -> Domain:
    """Unlocked."""
    dom = doms.get(name="a")
    dom.unlock()
    return dom


async def count(dom: Domain) -> None:
    with dom:
        before = dom.data or 0
        await asyncio.sleep(0)
        dom.data = before + 1


def test_no_update_is_lost_between_tasks(doms: DomainList, dom: Domain) -> None:
    async def five() -> list[Any]:
        return await asyncio.gather(*(count(dom) for _ in range(5)), return_exceptions=True)

    refused = asyncio.run(five())
    assert refused[0] is None
    assert [type(one) for one in refused[1:]] == [AlreadyLocked] * 4
    assert "another task" in str(refused[1])
    info = doms.peek(name="a")
    assert info and info.data == 1
    assert not dom.is_locked


def test_another_handle_of_the_same_domain(doms: DomainList, dom: Domain) -> None:
    other = next(one for one in doms._handles() if one == dom)

    async def two() -> list[Any]:
        return await asyncio.gather(count(dom), count(other), return_exceptions=True)

    assert [type(one) for one in asyncio.run(two())] == [type(None), AlreadyLocked]


def test_a_block_that_ended_well_stays(doms: DomainList, dom: Domain) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        with dom:
            raise RuntimeError("it was let in")

    async def two() -> list[Any]:
        return await asyncio.gather(count(dom), fail(), return_exceptions=True)

    assert [type(one) for one in asyncio.run(two())] == [type(None), RuntimeError]
    info = doms.peek(name="a")
    assert info and info.data == 1  # the second came when the first had left


def test_blocks_within_blocks_of_one_task(dom: Domain) -> None:
    async def nested() -> None:
        with dom:
            await asyncio.sleep(0)
            with dom:
                contextvars.copy_context().run(inner)
                await asyncio.sleep(0)
            dom.data = 1

    def inner() -> None:
        with dom:
            dom.pid = 5

    asyncio.run(nested())
    with dom:
        assert (dom.data, dom.pid) == (1, 5)


def test_a_callback_of_the_loop_is_no_part_of_the_task(dom: Domain) -> None:
    found: list[type[BaseException]] = []

    def callback() -> None:
        try:
            with dom:
                pass
        except AlreadyLocked as exc:
            found.append(type(exc))

    async def task() -> None:
        with dom:
            asyncio.get_running_loop().call_soon(callback)
            await asyncio.sleep(0.01)

    asyncio.run(task())
    assert found == [AlreadyLocked]


def test_what_the_thread_holds_is_not_its_tasks(dom: Domain) -> None:
    async def read() -> int:
        return dom.pid or 0

    with dom:
        for one in (count(dom), read()):
            with pytest.raises((AlreadyLocked, DomainNotLocked), match="outside of its tasks"):
                asyncio.run(one)
        dom.data = 1
    with decimal.localcontext(), dom, dom:  # a context, and no task
        assert dom.data == 1


def use_greenlets(pipe: Pipe) -> None:
    class Greenlet:
        parent = object()

    greenlets = [Greenlet(), Greenlet()]
    running = greenlets[0]
    sys.modules["greenlet"] = SimpleNamespace(getcurrent=lambda: running)  # type: ignore[assignment]
    with DomainList(max_domains=8) as doms:
        doms.define(xml("a"))
        with doms.get(name="a") as dom:
            with dom:
                pass
            running = greenlets[1]
            with pytest.raises(AlreadyLocked), dom:
                pass
            running = greenlets[0]
            with dom:
                pass
    pipe.say("done")


def test_greenlets(start: Callable[..., Child]) -> None:
    """As far as the list asks: which one runs. A process of its own, since it goes on asking."""
    assert start(use_greenlets).hear() == "done"
