"""What events on PostgreSQL have beside those of every list."""

from __future__ import annotations

import pg_servers
from helpers import Home, xml

from shmdomains import EventType

pg_servers.need()

from shmdomains.postgres import PostgresDomainList  # noqa: E402


def test_a_death_is_an_event_and_one_only(pg_url: str, home: Home) -> None:
    """Of whoever locks next; it names who died. Nobody's clean end is one."""
    with PostgresDomainList.open(pg_url) as doms:
        uuid = doms.define(xml("web1")).uuid
        watch = doms.watch(timeout=0)
        victim = home.begin("spawn", url=repr(pg_url))
        victim.tell("doms = PostgresDomainList.attach(url)\nwith doms.get('web1'): pass")
        victim.tell("dom = doms.get('web1')")
        assert list(watch) == []
        victim.start("os.kill(os.getpid(), 9)")
        assert home.party.tell("reap()") == [-9]
        victim.conn.close()
        for _ in range(2):
            with doms.get("web1") as dom:
                died = dom.previous_owner_died
                assert died is not None and died.pid == victim.pid
                dom._release_unseen()  # the next one is told of it, too
        [event] = watch
        assert (event.type, event.uuid, event.name) == (EventType.HOLDER_DIED, uuid, "web1")
        assert event.holder is not None and event.holder.pid == victim.pid
        with doms.get("web1"):
            pass
        with doms.get("web1") as dom:
            assert dom.previous_owner_died is None
        assert list(watch) == []
