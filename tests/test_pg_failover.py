"""A standby takes over while workers on several hosts change domains: nothing that was acknowledged
is lost, nothing is done twice, and no token is given twice.

Each worker counts in the data of random domains, under the domains' locks, by the URL that names
both servers. What it was told is added up and compared with what the new primary has.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from helpers import SOAK
from killing import Child, Pipe, until, xml
from pg_servers import PATIENCE, Server, Standby, need, urls

need()

from shmdomains import InDoubt, Job, JobTimeout, LockLost, Unavailable  # noqa: E402
from shmdomains.postgres import PostgresDomainList  # noqa: E402

WORKERS = 4
NAMES = [f"dom{number}" for number in range(6)]

Start = Callable[..., Child]


def increment(doms: PostgresDomainList, me: str, name: str, told: Counter[Any]) -> int | None:
    """Count up in a domain; returns the token, if the domain was locked."""
    try:
        dom = doms.get(name, timeout=PATIENCE)
    except Unavailable:
        told["unavailable"] += 1
        return None
    token = dom.token
    try:
        with dom:
            data = dom.data or {"all": 0}
            dom.data = {**data, "all": data["all"] + 1, me: data.get(me, 0) + 1}
    except InDoubt:
        told["doubtful", name] += 1
    except LockLost as exc:
        told["applied" if "is applied" in str(exc) else "lost", name] += 1
    else:
        told["applied", name] += 1
    return token


def work(pipe: Pipe, url: str, number: int) -> None:
    """Count until told to end; says how far it is, and what it was told in the end."""
    chance, me = random.Random(number), str(number)
    told: Counter[Any] = Counter()
    tokens: list[tuple[str, int | None]] = []
    with PostgresDomainList.attach(url, host=f"host{number}") as doms:
        pipe.say(0)
        while not pipe.conn.poll():
            name = chance.choice(NAMES)
            tokens.append((name, increment(doms, me, name, told)))
            if len(tokens) % 5 == 0:
                pipe.say(sum(told["applied", one] for one in NAMES))
    pipe.say((told, tokens))


def reach(children: list[Child], more: int) -> None:
    """Until each of them did so many more."""
    for child in children:
        first = last = child.hear(PATIENCE)
        while last < first + more:
            last = child.hear(PATIENCE)


def rest(child: Child) -> Any:
    while isinstance(said := child.hear(PATIENCE), int):
        pass
    return said


@pytest.mark.soak
@pytest.mark.parametrize("number", range(100 if SOAK else 1))
def test_a_standby_takes_over(start: Start, number: int, tried: Callable[[str, int], None]) -> None:
    chance = random.Random(number)
    with Server() as primary, Standby(primary) as standby:
        url = urls(primary, standby, list="failover", lease=2)
        with PostgresDomainList.create(url) as doms:
            for name in NAMES:
                doms.define(xml(name))
            children = [start(work, url, one) for one in range(WORKERS)]
            reach(children, chance.randrange(5, 40))
            end = chance.choice([primary.kill, lambda: primary.stop("immediate")])
            end()
            standby.promote()
            # Commits would wait for a standby that is not there.
            standby.psql("ALTER SYSTEM RESET synchronous_standby_names")
            standby.psql("SELECT pg_reload_conf()")
            reach(children, 20)
            for child in children:
                child.tell("end")
            told = [rest(child) for child in children]
            found = {name: doms.peek(name).data or {} for name in NAMES}
            assert doms.check().problems == []
    compare(found, told)
    tried("increments across a failover", sum(data.get("all", 0) for data in found.values()))
    tried("failovers", 1)
    doubtful = sum(one["doubtful", name] for one, _ in told for name in NAMES)
    tried("increments in doubt", doubtful)


def compare(found: dict[str, Any], told: list[Any]) -> None:
    """Each worker's count in each domain, and all tokens."""
    for name, data in found.items():
        ours = {key: count for key, count in data.items() if key != "all"}
        assert sum(ours.values()) == data.get("all", 0), (name, data)
        for number, (counts, _) in enumerate(told):
            count = ours.get(str(number), 0)
            least = counts["applied", name]
            assert least <= count <= least + counts["doubtful", name], (name, number, data, counts)
    tokens = Counter(one for _, some in told for one in some if one[1] is not None)
    assert [one for one, times in tokens.items() if times > 1] == []
    for _, some in told:  # each worker saw them rise
        for name in NAMES:
            rising = [token for one, token in some if one == name and token is not None]
            assert rising == sorted(rising), name
