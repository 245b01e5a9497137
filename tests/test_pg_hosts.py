"""Two hosts, each in a network namespace of its own, whose cable to the server is cut and mended.

Nothing tells a host that is cut off: no packet comes back, and its sockets stay open. Its locks are
free after a lease all the same, by the server's own clock.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pg_servers
import pytest
from helpers import Process, xml

from shmdomains import LockLost, LockTimeout, Unavailable

pg_servers.need()

from shmdomains.postgres import PostgresDomainList  # noqa: E402

LEASE = 2
NET = f"10.231.{os.getpid() % 200}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Why there can be no namespaces here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces take root and iproute2"
    name = f"shmdomains-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except subprocess.CalledProcessError as exc:
        return f"no network namespaces: {exc.stderr.strip()}"
    return None


class Host:
    """A process in a network namespace with one cable to the server's."""

    def __init__(self, number: int) -> None:
        self.name = f"shmd{os.getpid()}-{number}"
        self.cable = f"sd{os.getpid() % 10_000_000}{number}"
        self.server, self.address = (f"{NET}.{number * 4 + at}" for at in (1, 2))
        ip("netns", "add", self.name)
        far = f"{self.cable}p"
        ip("link", "add", self.cable, "type", "veth", "peer", "name", far, "netns", self.name)
        ip("address", "add", f"{self.server}/30", "dev", self.cable)
        ip("link", "set", self.cable, "up")
        ip("-n", self.name, "address", "add", f"{self.address}/30", "dev", far)
        ip("-n", self.name, "link", "set", far, "up")
        self.process = Process(SHMDOMAINS_HOST=f"host{number}")
        self.party = self.process.party
        self.party.tell(
            f"import ctypes\nnet = os.open('/run/netns/{self.name}', os.O_RDONLY)\n"
            "assert ctypes.CDLL(None, use_errno=True).setns(net, 0x40000000) == 0, "
            "ctypes.get_errno()\nos.close(net)"
        )

    def attach(self, server: pg_servers.Server) -> None:
        url = server.url("two-hosts", lease=LEASE).replace("127.0.0.1", self.server)
        self.party.tell(f"doms = PostgresDomainList.attach({url!r})")

    def cut(self) -> None:
        ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        ip("link", "set", self.cable, "up")

    def end(self) -> None:
        self.process.kill()
        for words in (("link", "delete", self.cable), ("netns", "delete", self.name)):
            with suppress(subprocess.CalledProcessError):
                ip(*words)


@pytest.fixture
def hosts() -> Iterator[tuple[pg_servers.Server, Host, Host]]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    made: list[Any] = []
    try:
        made += [Host(1)]
        made += [Host(2)]
        addresses = ",".join(["127.0.0.1", *(host.server for host in made)])
        server = pg_servers.Server(listen_addresses=addresses)
        with server:
            with (server.data / "pg_hba.conf").open("a") as rules:
                rules.write(f"host all all {NET}.0/24 scram-sha-256\n")
            server.psql("SELECT pg_reload_conf()")
            with PostgresDomainList.create(server.url("two-hosts")) as doms:
                doms.define(xml("web1"))
            for host in made:
                host.attach(server)
            yield (server, *made)
    finally:
        for host in made:
            host.end()


def test_a_host_that_is_cut_off_has_lost_its_locks(
    hosts: tuple[pg_servers.Server, Host, Host],
) -> None:
    _, one, two = hosts
    one.party.tell("dom = doms.get('web1'); first = dom.token; dom.data = 'of host1'")
    with pytest.raises(LockTimeout, match="on host1"):
        two.party.tell("doms.get('web1', timeout=0)")
    one.cut()
    two.party.start("dom = doms.get('web1', timeout=60)\ndom.token, dom.previous_owner_died")
    token, died = two.party.answer(90)
    assert died.host == "host1"
    assert two.party.tell("dom.data") is None
    assert one.party.tell("first") < token
    # A host that is cut off is told so, and after it is mended that its lock is lost.
    with pytest.raises(Unavailable):
        one.party.start("doms.peek('web1')")
        one.party.answer(90)
    one.mend()
    with pytest.raises(LockLost):
        one.party.start("dom.unlock()")
        one.party.answer(60)
    two.party.tell("dom.data = 'of host2'; dom.unlock()")
    one.party.start("with doms.get('web1', timeout=60) as dom: seen = dom.data, dom.token\nseen")
    data, last = one.party.answer(90)
    assert data == "of host2" and last > token
