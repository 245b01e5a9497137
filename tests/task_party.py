"""Parties that are tasks of one event loop, so that a suite written for parties takes the owner as
a parameter.

A task party is told what every party is told: plain code with the plain list. Where that code may
have to wait the task awaits what `shmdomains.aio` has in its place (`Awaiting`), so its loop, in
which the other parties run, goes on.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import textwrap
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from types import CodeType
from typing import Any

from shmdomains import LockTimeout, aio
from shmdomains.memory import asking

WAITS = {
    *("get", "lookup", "find_by_id", "find_by_uuid", "find_by_name", "lock_many", "locked"),
    *("assign_def", "remove_inactive", "rename", "define", "undefine", "load_all_configs"),
    *("save_config", "delete_config", "set_autostart", "forget_configs", "free", "wait"),
    *(
        "wait_any",
        "lock",
        "acquire",
        "get_many",
        "assign_defs",
        "update_many",
        "remove_many",
        "add",
    ),
}
ENTERED = {*WAITS, "mutex"}


def through_aio(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a task calls in place of this method: something to await or to enter."""
    whose, name = getattr(method, "__self__", None), method.__name__
    if name in ("lock_many", "get_many") and kwargs.get("timeout") == 0:
        return method(*args, **kwargs)  # it waits for nobody, and needs no block
    elsewhere = type(whose).__module__.startswith("shmdomains.postgres.")
    is_list = hasattr(whose, "assign_def")
    if is_list and hasattr(aio.AsyncDomainList, name):
        return getattr(aio.wrap(whose), name)(*args, **kwargs)
    if elsewhere and name in ("lock", "acquire"):
        return asking.work(method, *args, **kwargs)
    if name == "wait" and not is_list:
        return aio.wait_until(whose, *args, **kwargs)
    if name == "acquire":
        return acquire(whose, *args, **kwargs)
    if name == "lock":
        timeout = kwargs.get("timeout", args[0] if args else None)
        return asking.ask(method, *args, within=timeout, **kwargs)
    return method(*args, **kwargs)


async def acquire(whose: Any, block: bool = True, timeout: float | None = None) -> bool:
    try:
        await asking.ask(whose.lock, timeout if block else 0, within=timeout if block else 0)
    except LockTimeout:
        return False
    return True


async def finished(value: Any) -> Any:
    """Of what was called in a task's code: the result."""
    if inspect.isawaitable(value):
        return await value
    return await value.__aenter__() if isinstance(value, aio._LockMany) else value


class Awaiting(ast.NodeTransformer):
    """Plain code, for a task: ``with`` becomes ``async with``, and what may wait is awaited."""

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        call = self._call(node, WAITS)
        if call is node:
            return node
        return ast.Await(ast.Call(ast.Name("finished", ast.Load()), [call], []))

    def visit_With(self, node: ast.With) -> ast.AST:
        for item in node.items:
            if isinstance(item.context_expr, ast.Call):
                item.context_expr = self._call(item.context_expr, ENTERED)
        body = [self.visit(one) for one in node.body]
        return ast.AsyncWith(node.items, body)

    def _call(self, node: ast.Call, names: set[str]) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in names:
            return ast.Call(
                ast.Name("through_aio", ast.Load()), [node.func, *node.args], node.keywords
            )
        return node


@lru_cache(maxsize=4096)
def _compiled(source: str) -> CodeType:
    tree = ast.parse(textwrap.dedent(source))
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        tree.body[-1] = ast.Assign([ast.Name("_value", ast.Store())], tree.body[-1].value, lineno=0)
    tree = ast.fix_missing_locations(Awaiting().visit(tree))
    return compile(tree, "<task party>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


async def run_in_task(source: str, names: dict[str, Any]) -> Any:
    """The value of the last expression."""
    names |= {"through_aio": through_aio, "finished": finished, "_value": None}
    running = eval(_compiled(source), names)
    if inspect.iscoroutine(running):
        await running
    return names.pop("_value")


async def listen(conn: Connection) -> Any:
    """What comes through the socket next; meanwhile the loop runs."""
    loop, there = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(conn.fileno(), there.set)
    try:
        await there.wait()
    finally:
        loop.remove_reader(conn.fileno())
    return conn.recv()


async def serve_as_task(
    conn: Connection, names: dict[str, Any], send: Callable[[Connection, Any], None]
) -> None:
    """Do what comes through the socket until it ends; see `helpers.serve`."""
    conn.send((os.getpid(), threading.get_native_id()))
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (source := await listen(conn)) is not None:
            try:
                reply = ("value", await run_in_task(source, names))
            except BaseException as exc:
                reply = ("raised", exc.with_traceback(None))
            send(conn, reply)
            del reply
    names.clear()
    conn.close()


_parties: set[asyncio.Task[None]] = set()


def begin_task(serve: Callable[[], Any]) -> None:
    """Begin a party as a task: of this loop, or of a loop in a thread of its own, which runs until
    the last of its parties left."""
    try:
        task = asyncio.get_running_loop().create_task(serve())
    except RuntimeError:
        threading.Thread(target=asyncio.run, args=(_all_of(serve),), daemon=True).start()
    else:
        _parties.add(task)
        task.add_done_callback(_parties.discard)


async def _all_of(serve: Callable[[], Any]) -> None:
    await serve()
    while _parties:
        await asyncio.wait(set(_parties))
