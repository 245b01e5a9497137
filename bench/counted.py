"""The hot paths, each as a loop, run under callgrind by `instructions.py`; no clock is looked at.

``python counted.py MARK DOMAINS LISTED``: MARK is the compiled mark.c. Each loop is counted at two
lengths, so that what it takes to begin one cancels out. The list is the same in every run.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from uuid import UUID

from shmdomains import DomainDef, DomainList, DomainState

XML = """<domain type='kvm'><name>vm</name><memory>1048576</memory><vcpu>2</vcpu>
<os><type arch='x86_64'>hvm</type></os><description>{}</description></domain>"""
SHORT, LONG = 50, 250


def fill(count: int) -> tuple[DomainList, list[bytes]]:
    doms = DomainList(max_domains=count + 10)
    model = DomainDef.from_xml(XML.format("x" * 1700))
    keys = []
    for number in range(count):
        key = UUID(int=(number + 1) * 0x9E3779B97F4A7C15F39CC0605CEDC834 % 2**128)
        keys.append(key.bytes)
        with doms.locked():
            dom = doms.assign_def(model.replace(name=f"vm{number}", uuid=key), True)
        dom.activate()
        dom.data = {"vnc": 5901, "requests": number}
        dom.unlock()
    return doms, keys


def loops(doms: DomainList, keys: list[bytes], listed: int) -> dict[str, Callable[[int], None]]:
    # Spread over the whole list, a power of two of them so that an index is cheap.
    chosen = [keys[number * len(keys) // 64] for number in range(64)]
    names = [f"vm{number * len(keys) // 64}" for number in range(64)]
    ids = [number * len(keys) // 64 + 1 for number in range(64)]
    # A miss ends at the first hole, and where that is differs from key to key: as many as counted.
    absent = [UUID(int=(number + 1) * 0xD1342543DE82EF95).bytes for number in range(LONG)]
    model = DomainDef.from_xml(XML.format("y" * 1700))
    changed = [
        model.replace(name=name, uuid=UUID(bytes=key))
        for name, key in zip(names, chosen, strict=True)
    ]
    text = "x" * 2000
    added = model.replace(name="added", uuid=UUID(int=2))
    paused = DomainState.PAUSED

    def get_state(count: int) -> None:
        for at in range(count):
            with doms.get(uuid=chosen[at & 63]) as dom:
                _ = dom.state

    def patch_state(count: int) -> None:
        for at in range(count):
            doms.lock()
            dom = doms.find_by_uuid(chosen[at & 63])
            doms.unlock()
            assert dom is not None
            _ = dom.state
            dom.unlock()

    def change_state(count: int) -> None:
        for at in range(count):
            with doms.get(uuid=chosen[at & 63]) as dom:
                dom.state = paused

    def read_data(count: int) -> None:
        for at in range(count):
            with doms.get(uuid=chosen[at & 63]) as dom:
                _ = dom.data

    def change_data(count: int) -> None:
        for at in range(count):
            with doms.get(uuid=chosen[at & 63]) as dom:
                dom.data = {"vnc": 5901, "requests": dom.data["requests"] + 1}

    def add(count: int) -> None:
        for at in range(count):
            doms.add(chosen[at & 63], "requests")

    def get_many(count: int) -> None:
        for _ in range(count // SHORT):
            with doms.get_many(chosen[:SHORT]):
                pass

    def update_many(count: int) -> None:
        for _ in range(count // SHORT):
            doms.update_many([(key, {"state": paused}) for key in chosen[:SHORT]])

    def large_data(count: int) -> None:
        for at in range(count):
            with doms.get(uuid=keys[1 + at % 8]) as dom:
                dom.data = {"text": text, "requests": at}

    def definition(count: int) -> None:
        for at in range(count):
            with doms.get(name=names[at & 63]) as dom:
                _ = dom.definition

    def replace(count: int) -> None:
        for at in range(count):
            with doms.get(uuid=chosen[at & 63]) as dom:
                dom.definition = changed[at & 63]

    def define_remove(count: int) -> None:
        for _ in range(count):
            doms.lock()
            dom = doms.assign_def(added, True)
            doms.unlock()
            dom.unlock()
            doms.lock()
            doms.remove_inactive(dom)
            doms.unlock()

    def by_id(count: int) -> None:
        for at in range(count):
            with doms.get(id=ids[at & 63]) as dom:
                _ = dom.state

    def miss(count: int) -> None:
        for at in range(count):
            doms.lookup(uuid=absent[at])

    def peek(count: int) -> None:
        for at in range(count):
            doms.peek(uuid=chosen[at & 63])

    def rows(count: int) -> None:
        for _ in range(count // SHORT):
            _ = [(info.id, info.name, info.state) for info in doms.list(definitions=False)]

    every = [get_state, patch_state, change_state, read_data, change_data, add, large_data]
    every += [get_many, update_many]
    every += [definition, by_id, miss, peek, replace, define_remove]
    if listed:
        every.append(rows)
    return {one.__name__: one for one in every}


def main(mark_file: str, domains: str, listed: str) -> None:
    mark = ctypes.CDLL(mark_file)
    doms, keys = fill(int(domains))
    every = loops(doms, keys, int(listed))
    gc.disable()
    for run in every.values():
        run(2 * SHORT)  # warm: bytecode specialised, definitions decoded
    for name, run in every.items():
        for length in (SHORT, LONG):
            mark.mark_begin()
            run(length)
            mark.mark_end(f"{name} {length}".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
