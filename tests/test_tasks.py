"""Tasks and greenlets of one thread: a domain's lock is the thread's, so a `with` block tells them
apart. Where it could not, two of them would change one domain at once and lose an update.
"""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from killing import xml

from shmdomains import AlreadyLocked, Domain, DomainList

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


def test_a_loop_inside_a_block_is_part_of_it(dom: Domain) -> None:
    """Who began it waits for its end."""
    with dom:
        asyncio.run(count(dom))
        assert dom.data == 1
    with decimal.localcontext(), dom, dom:  # a context, and no task
        pass


def test_greenlets(doms: DomainList, dom: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the list asks: which one runs. They may be imported before the list is attached."""
    greenlets = [object(), object()]
    running = greenlets[0]
    monkeypatch.setitem(sys.modules, "greenlet", SimpleNamespace(getcurrent=lambda: running))
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
    monkeypatch.delitem(sys.modules, "greenlet")
    DomainList(max_domains=8).close()


def test_what_is_raised_while_a_block_is_entered_leaves_nothing_locked(
    dom: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the question which task this is, where that is asked in Python."""

    def interrupted(loop: object = None) -> None:
        raise KeyboardInterrupt

    async def enter() -> None:
        monkeypatch.setattr(asyncio.tasks, "current_task", interrupted)
        try:
            with pytest.raises(KeyboardInterrupt), dom:
                pass
        finally:
            monkeypatch.undo()
        assert not dom.is_locked

    asyncio.run(enter())
