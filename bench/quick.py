"""A first look at speed: the operations of one process, and the hand-over from a killed holder.

Prints medians of several repetitions. No comparison with anything else is made here.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from shmdomains import DomainDef, DomainList, DomainState

XML = """<domain type='kvm'><name>template</name><memory>1048576</memory><vcpu>2</vcpu>
<os><type arch='x86_64'>hvm</type></os><description>{}</description></domain>"""
REPEATS = 5


def fill(count: int) -> tuple[DomainList, list[bytes]]:
    doms = DomainList(max_domains=count + 100)
    template = DomainDef.from_xml(XML.format("x" * 1700))
    keys = []
    with doms.locked():
        for number in range(count):
            key = uuid.uuid4()
            doms.assign_def(template.replace(name=f"vm{number}", uuid=key), True).unlock()
            keys.append(key.bytes)
    return doms, keys


def per_operation(run: Callable[[int], None], count: int) -> float:
    """Median seconds per operation."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run(count)
        times.append((time.perf_counter() - begin) / count)
    return statistics.median(times)


def operations(doms: DomainList, keys: list[bytes]) -> Iterator[tuple[str, Callable[[int], None]]]:
    drawn = random.Random(1).choices(keys, k=20_000)
    names = [f"vm{random.Random(i).randrange(len(keys))}" for i in range(20_000)]
    template = DomainDef.from_xml(XML.format("y" * 1700))

    def get_state(count: int) -> None:
        for key in drawn[:count]:
            with doms.get(uuid=key) as dom:
                _ = dom.state

    def find_state(count: int) -> None:
        for key in drawn[:count]:
            doms.lock()
            dom = doms.find_by_uuid(key)
            doms.unlock()
            assert dom is not None
            _ = dom.state
            dom.unlock()

    def get_definition(count: int) -> None:
        for name in names[:count]:
            with doms.get(name=name) as dom:
                _ = dom.definition

    def set_state(count: int) -> None:
        for key in drawn[:count]:
            with doms.get(uuid=key) as dom:
                dom.state = DomainState.PAUSED

    def set_definition(count: int) -> None:
        for key in drawn[: count // 10]:
            with doms.get(uuid=key) as dom:
                dom.definition = template.replace(name=dom.name, uuid=dom.uuid)

    def define_remove(count: int) -> None:
        for number in range(count // 10):
            fresh = template.replace(name=f"new{number}", uuid=uuid.uuid4())
            with doms.locked():
                dom = doms.assign_def(fresh)
                dom.unlock()
                doms.remove_inactive(dom)

    def peek(count: int) -> None:
        for key in drawn[:count]:
            doms.peek(uuid=key)

    yield "get + state", get_state
    yield "list lock + find", find_state
    yield "get by name + definition", get_definition
    yield "set state", set_state
    yield "set definition (a tenth)", set_definition
    yield "define + remove (a tenth)", define_remove
    yield "peek", peek


def killed_holder(doms: DomainList, key: bytes, waiting: bool) -> float:
    """Seconds until the domain of a killed holder is had."""
    told, tell = os.pipe()
    holder = os.fork()
    if not holder:
        with doms.get(uuid=key):
            os.write(tell, b"x")
            signal.pause()
        os._exit(1)
    os.read(told, 1)
    if waiting:
        killer = os.fork()
        if not killer:
            time.sleep(0.02)  # let the waiter go to sleep: that is what is measured
            os.write(tell, time.monotonic_ns().to_bytes(8, "big"))
            os.kill(holder, signal.SIGKILL)
            os._exit(0)
        doms.get(uuid=key).unlock()
        end = time.monotonic_ns()
        begin = int.from_bytes(os.read(told, 8), "big")
        os.waitpid(killer, 0)
        os.waitpid(holder, 0)
    else:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        begin = time.monotonic_ns()
        doms.get(uuid=key).unlock()
        end = time.monotonic_ns()
    os.close(told)
    os.close(tell)
    return (end - begin) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", type=int, default=1000)
    parser.add_argument("--count", type=int, default=20_000, help="operations per repetition")
    parser.add_argument("--rounds", type=int, default=50, help="killed holders")
    arguments = parser.parse_args()
    doms, keys = fill(arguments.domains)
    table = Table(
        "operation",
        "µs",
        title=f"{arguments.domains} domains, {platform.machine()}, Python {sys.version.split()[0]}",
    )
    for name, run in operations(doms, keys):
        scale = 10 if "tenth" in name else 1
        table.add_row(name, f"{per_operation(run, arguments.count) * scale * 1e6:.2f}")
    begin = time.perf_counter()
    rows = [(info.id, info.name, info.state) for info in doms.list(definitions=False)]
    table.add_row("list all (ms)", f"{(time.perf_counter() - begin) * 1e3:.2f}")
    assert len(rows) == arguments.domains
    for name, waiting in (("waiting", True), ("coming later", False)):
        times = sorted(killed_holder(doms, keys[0], waiting) for _ in range(arguments.rounds))
        table.add_row(
            f"killed holder, {name}",
            f"{statistics.median(times) * 1e6:.0f} (max {times[-1] * 1e6:.0f})",
        )
    Console().print(table)
    return 0 if doms.check() else 1


if __name__ == "__main__":
    sys.exit(main())
