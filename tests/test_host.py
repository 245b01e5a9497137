"""`host`: where a domain runs. Shared memory is of one host; any other store may span several."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import EVERY_STORE, STORES, Store, environment, xml

from shmdomains import DomainInfo, DomainNotLocked
from shmdomains.holder import this_host
from shmdomains.rules.values import MAX_HOST

HERE, THERE = socket.gethostname(), "there.example"


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def doms(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A list with the domains ``a``, which runs here, and ``b``, which does not run."""
    store: Store = request.param
    doms = store.make()
    doms.define(xml("a"))
    doms.define(xml("b"))
    with doms.get("a") as dom:
        dom.activate()
    yield doms
    assert doms.check().problems == []
    doms.close()


@pytest.fixture(params=EVERY_STORE[len(STORES) :], ids=lambda store: store.name)
def spanning(request: pytest.FixtureRequest) -> Iterator[Any]:
    """``a`` runs here, ``b`` there, ``c`` nowhere."""
    store: Store = request.param
    doms = store.make()
    for name, host in (("a", None), ("b", THERE), ("c", None)):
        doms.define(xml(name))
        if name != "c":
            with doms.get(name) as dom:
                dom.activate(host=host)
    yield doms
    doms.close()


def names(infos: list[Any]) -> list[str]:
    return sorted(info.name for info in infos)


def test_an_active_domain_runs_on_this_host(doms: Any) -> None:
    assert doms["a"].host == HERE == this_host()
    with doms.get("a") as dom:
        assert dom.host == HERE


def test_this_host_may_be_named(doms: Any) -> None:
    with doms.get("b") as dom:
        dom.activate(host=HERE)
    assert doms["b"].host == HERE


def test_the_host_of_a_domain_needs_its_lock(doms: Any) -> None:
    dom = doms.get("a")
    dom.unlock()
    with pytest.raises(DomainNotLocked):
        _ = dom.host


def test_what_is_here_is_listed_and_counted(doms: Any) -> None:
    assert names(doms.list(active=True, host=HERE)) == ["a"]
    assert doms.count(active=True, host=HERE) == 1
    assert doms.list(host=THERE) == [] and doms.count(host=THERE) == 0


@pytest.mark.parametrize(
    ("host", "error"),
    [("", ValueError), ("a\n", ValueError), ("h" * (MAX_HOST + 1), ValueError), (7, TypeError)],
)
def test_a_host_that_is_refused_changes_nothing(doms: Any, host: Any, error: type) -> None:
    with doms.get("b") as dom:
        with pytest.raises(error):
            dom.activate(host=host)
        assert not dom.changed and not dom.is_active


def test_an_info_takes_its_host_along(doms: Any) -> None:
    info = doms["a"]
    twin = pickle.loads(pickle.dumps(info))
    assert isinstance(twin, DomainInfo) and twin == info and twin.host == HERE
    [bare] = doms.list(active=True, definitions=False)
    assert bare.host == HERE and pickle.loads(pickle.dumps(bare)).host == HERE
    assert json.loads(json.dumps(info.to_dict()))["host"] == HERE


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.name)
def test_shared_memory_is_of_one_host(store: Store) -> None:
    with store.make() as doms:
        doms.define(xml("a"))
        assert doms["a"].host == HERE  # inactive, and here all the same
        assert names(doms.list(host=HERE)) == ["a"] and doms.count(host=HERE) == 1
        with doms.get("a") as dom:
            with pytest.raises(ValueError, match=rf"cannot run on host '{THERE}'.*{HERE!r}"):
                dom.activate(host=THERE)
            assert not dom.changed


def test_another_store_may_span_hosts(spanning: Any) -> None:
    assert [spanning[name].host for name in "abc"] == [HERE, THERE, None]
    assert names(spanning.list(host=HERE)) == ["a"]
    assert names(spanning.list(host=THERE)) == ["b"] and spanning.count(host=THERE) == 1


def test_a_domain_that_ends_is_on_no_host(spanning: Any) -> None:
    with spanning.get("b") as dom:
        dom.deactivate()
        assert dom.host is None and spanning["b"].host == THERE  # not yet committed
    assert spanning["b"].host is None


def test_a_rollback_leaves_the_host(spanning: Any) -> None:
    with spanning.get("b") as dom:
        dom.deactivate()
        dom.rollback()
        assert dom.host == THERE
    assert spanning["b"].host == THERE


SAY = "import os; from shmdomains.holder import this_host; print(this_host())"
SAY_IN_A_CHILD = """
import os
from shmdomains.holder import this_host
this_host()
os.environ["SHMDOMAINS_HOST"] = "other"
assert this_host() != "other"
child = os.fork()
if child == 0:
    print(this_host(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.parametrize(
    ("code", "given", "said"), [(SAY, "", HERE), (SAY, "hv7", "hv7"), (SAY_IN_A_CHILD, "", "other")]
)
def test_the_name_is_the_machines_unless_it_is_given(code: str, given: str, said: str) -> None:
    env = {**environment(), "SHMDOMAINS_HOST": given}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert done.stdout.decode() == said + os.linesep, done.stderr
