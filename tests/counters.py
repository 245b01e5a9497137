"""A few domains whose data is a number, for the servers of test_servers.py to count with."""

from __future__ import annotations

from killing import xml

from shmdomains import DomainList

NAMES = [f"vm{number}" for number in range(4)]

PATIENCE = 20.0
"""Seconds a request waits for its domain: far beyond what a loaded machine needs."""


def fill(doms: DomainList) -> None:
    """One of each name, at zero."""
    for name in NAMES:
        doms.define(xml(name))
        with doms.get(name) as dom:
            dom.data = 0


def read(doms: DomainList) -> dict[str, int]:
    """What each one stands at. None may be locked, and the list must be sound."""
    found = {}
    for name in NAMES:
        with doms.get(name, timeout=0) as dom:
            found[name] = dom.data
    assert doms.check().problems == []
    return found
