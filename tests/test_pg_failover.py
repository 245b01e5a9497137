"""A standby takes over while workers on several hosts change domains: nothing that was acknowledged
is lost, nothing is done twice, and no token is given twice.

Each worker counts in the data of random domains, under the domains' locks, by the URL that names
both servers. What it was told is added up and compared with what the new primary has.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest
from helpers import SOAK
from killing import Child, Pipe, until, xml
from pg_servers import PATIENCE, Server, Standby, need, urls

need()

from shmdomains import InDoubt, Job, JobTimeout, LockLost, LockTimeout, Unavailable  # noqa: E402
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


def test_a_receipt_that_the_standby_does_not_have(tried: Callable[[str, int], None]) -> None:
    """A commit waits for the standby, and its session is ended meanwhile. Then the primary shows
    it, and a failover would lose it: nobody is told that it is applied."""
    with (
        Server() as primary,
        Standby(primary) as standby,
        PostgresDomainList.create(primary.url("receipt", lease=1)) as doms,
    ):
        doms.define(xml("a"))
        told: list[Any] = []

        def commit() -> None:
            with doms.get("a") as dom:
                spare = threading.Thread(target=lambda: doms.peek("a"))
                spare.start()
                spare.join(PATIENCE)  # there is an idle session by now
                dom.data = "new"
                standby.freeze()
                try:
                    dom.commit(1)
                except InDoubt as exc:
                    told.append(exc)

        thread = threading.Thread(target=commit)
        thread.start()
        look = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        until(lambda: primary.psql(look), "a commit that waits for the standby", PATIENCE)
        primary.psql(f"SELECT pg_terminate_backend(pid) FROM ({look}) AS a")
        thread.join(PATIENCE)
        assert primary.psql("SELECT data IS NOT NULL FROM shmdomains.domains") == "t"
        assert told
        primary.kill()
        standby.thaw()


def test_a_standby_that_does_not_answer_costs_nobody_a_lock() -> None:
    """Only commits wait for it. What keeps up the sessions that hold locks does not, nor does who
    takes over the session of another thread, or begins one."""
    with (
        Server() as primary,
        Standby(primary) as standby,
        PostgresDomainList.create(primary.url("quiet", lease=1)) as doms,
    ):
        for name in "abc":
            doms.define(xml(name))
        with doms.get("a") as dom:
            doms.peek("a")
            spare = threading.Thread(target=lambda: doms.get("b").unlock())
            spare.start()
            spare.join(PATIENCE)  # there is an idle session of this thread by now
            standby.freeze()
            try:
                took: list[bool] = []

                def lock(name: str) -> None:
                    with doms.get(name, timeout=PATIENCE):
                        took.append(True)
                        until(lambda: len(took) == 2, "both locks", PATIENCE)

                threads = [threading.Thread(target=lock, args=(name,)) for name in "bc"]
                for thread in threads:
                    thread.start()
                listener, end = doms._pool.listener, time.monotonic() + 3 * doms._pool.patience
                until(lambda: listener.answered > end, "the server is heard of", PATIENCE)
                for thread in threads:
                    thread.join(PATIENCE)
                assert len(took) == 2
            finally:
                standby.thaw()
            dom.data = "new"
        assert doms.get("a").data == "new"


def test_a_lock_whose_event_waits_for_a_commit_is_given_up() -> None:
    """Telling of a death waits for every commit that tells, and that for the standby."""
    with (
        Server() as primary,
        Standby(primary) as standby,
        PostgresDomainList.create(primary.url("told", lease=1)) as doms,
        PostgresDomainList.attach(primary.url("told", lease=1), host="other") as other,
    ):
        for name in "ab":
            doms.define(xml(name))
        other._pool.listener.listen()

        def commit() -> None:
            with suppress(InDoubt), doms.get("a") as dom:
                dom.data = "new"
                standby.freeze()

        dead = other.get("b")
        other._pool.mine().session.end("its host is cut off")
        thread = threading.Thread(target=commit)
        thread.start()
        look = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        until(lambda: primary.psql(look) != "0", "a commit that waits for the standby", PATIENCE)
        try:
            with pytest.raises(LockLost):
                dead.unlock()
            with pytest.raises((Unavailable, LockTimeout)):
                other.get("b", timeout=1)
        finally:
            standby.thaw()
        thread.join(PATIENCE)
        other.get("b", timeout=PATIENCE).unlock()


def test_whoever_begins_to_listen_while_a_commit_waits_loses_no_lock() -> None:
    """His listener waits for that commit, and goes on to keep up what he holds."""
    with (
        Server() as primary,
        Standby(primary) as standby,
        PostgresDomainList.create(primary.url("gate", lease=1)) as doms,
        PostgresDomainList.attach(primary.url("gate", lease=1), host="other") as other,
    ):
        for name in "ab":
            doms.define(xml(name))

        def commit() -> None:
            with suppress(InDoubt), doms.get("a") as dom:
                dom.data = "new"
                standby.freeze()

        with other.get("b") as dom:
            thread = threading.Thread(target=commit)
            thread.start()
            look = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            until(
                lambda: primary.psql(look) != "0", "a commit that waits for the standby", PATIENCE
            )
            try:
                with pytest.raises(Unavailable):
                    other._pool.listener.listen()
                end = time.monotonic() + 2 * other._pool.patience
                until(lambda: other._pool.listener.answered > end, "it is heard of", PATIENCE)
            finally:
                standby.thaw()
            thread.join(PATIENCE)
            dom.data = "new"


def test_a_definition_that_a_failover_lost_is_read_no_more() -> None:
    """With an asynchronous standby the last commits may be gone. Another one has the same version
    of the same domain then, and whoever read the lost one remembers it."""
    with Server() as primary, Standby(primary, synchronous=False) as standby:
        url = urls(primary, standby, list="lost", lease=2)
        with PostgresDomainList.create(url) as doms:
            doms.define(xml("a", UUID(int=1), title="first"))
            at = primary.psql("SELECT pg_current_wal_lsn()")
            there = f"SELECT pg_last_wal_replay_lsn() >= '{at}'"
            until(lambda: standby.psql(there) == "t", "the standby has it", PATIENCE)
            standby.psql("ALTER SYSTEM SET primary_conninfo = ''")
            standby.psql("SELECT pg_reload_conf()")
            follows = "SELECT count(*) FROM pg_stat_replication"
            until(lambda: primary.psql(follows) == "0", "nobody follows", PATIENCE)
            doms.define(xml("a", UUID(int=1), title="lost"))
            lost = doms.peek("a")
            primary.kill()
            standby.promote()
            with PostgresDomainList.attach(url, host="other", timeout=PATIENCE) as other:
                other.define(xml("a", UUID(int=1), title="second"))
            with doms.get("a", timeout=PATIENCE) as dom:
                assert dom.definition.title == "second"
            assert lost is not None and lost.definition.title == "lost"
            assert [info.definition.title for info in doms.list()] == ["second"]


# --- clocks ---------------------------------------------------------------------------------------


def shift(hours: float) -> None:
    """Set this process's clocks, all that Python code reads of them."""
    for name in ("time", "monotonic"):
        clock = getattr(time, name)
        setattr(time, name, lambda clock=clock: clock() + hours * 3600)


def work_at(pipe: Pipe, url: str, hours: float) -> None:
    """Work by a clock that is wrong by so much."""
    shift(hours)
    told: Counter[Any] = Counter()
    with PostgresDomainList.attach(url, host=f"at {hours:+}") as doms:
        pipe.say(time.time())
        with doms.job("dom0", f"job at {hours:+}", Job.MODIFY) as job:
            pipe.say(job.previous_owner_died)
            pipe.listen()
        tokens = [increment(doms, str(hours), "dom1", told) for _ in range(50)]
        with doms.get("dom2", timeout=PATIENCE):
            pipe.say((dict(told), tokens))
            pipe.listen()
    pipe.say("over")


def test_clocks_an_hour_apart(start: Start, pg_server: Server, pg_url: str) -> None:
    """No decision compares two machines' clocks: not who lives, nor who may, nor whose turn it is.
    The server's is in the midst of the two."""
    url = f"{pg_url}&lease=1"
    with PostgresDomainList.create(url) as doms:
        for name in NAMES:
            doms.define(xml(name))
        children = []
        for hours in (-1.0, 1.0):
            child = start(work_at, url, hours)
            assert abs(child.hear(PATIENCE) - time.time() - hours * 3600) < 60
            children.append(child)
        first = children[0].hear(PATIENCE)
        assert first is None
        # The other one's job waits for the first one's, whose holder is not taken for dead.
        listener, end = doms._pool.listener, time.monotonic() + 2
        doms.get("dom3").unlock()
        until(lambda: listener.answered > end, "two leases", PATIENCE)
        [job] = doms.peek("dom0").jobs
        assert (job.operation, job.holder.alive) == ("job at -1.0", True)
        with pytest.raises(JobTimeout), doms.job("dom0", "mine", Job.MODIFY, 0):
            pass
        assert not children[1].conn.poll()
        children[0].tell()
        assert children[1].hear(PATIENCE) is None  # nobody died
        told, tokens = children[0].hear(PATIENCE)
        children[1].tell()
        assert told == {("applied", "dom1"): 50}
        [held] = [one for one in doms.locks() if one.name == "dom2" and one.holder]
        assert held.holder.held_for is not None and 0 <= held.holder.held_for < 60
        with pytest.raises(LockTimeout):
            doms.get("dom2", timeout=0.1)
        children[0].tell()
        assert children[0].hear(PATIENCE) == "over"
        told, more = children[1].hear(PATIENCE)
        assert told == {("applied", "dom1"): 50}
        children[1].tell()
        assert children[1].hear(PATIENCE) == "over"
        assert doms.peek("dom1").data == {"all": 100, "-1.0": 50, "1.0": 50}
        assert len({*tokens, *more}) == 100
