"""What ``help()`` shows: each public method has a readable signature, and says what it does."""

from __future__ import annotations

import importlib
import inspect

import pytest

from shmdomains import Domain, DomainInfo, DomainList, LockedDomains
from shmdomains.memory._core import core
from shmdomains.table import Table, Texts

CLASSES = [DomainList, Domain, DomainInfo, core.DomainInfo, LockedDomains, Table, Texts]
OWN = [
    pytest.param(one, name, id=f"{one.__module__.rpartition('.')[2]}.{one.__name__}.{name}")
    for one in CLASSES
    for name in dir(one)
    if not name.startswith("_") and not hasattr(list, name)
]


@pytest.mark.parametrize(("owner", "name"), OWN)
def test_a_public_name_explains_itself(owner: type, name: str) -> None:
    found = inspect.getattr_static(owner, name)
    if inspect.ismemberdescriptor(found) or name == "closed":
        return  # a plain value: its class says what it is
    assert (inspect.getdoc(getattr(owner, name)) or "").strip()
    if callable(getattr(owner, name)):
        kinds = [one.kind for one in inspect.signature(getattr(owner, name)).parameters.values()]
        assert inspect.Parameter.VAR_POSITIONAL not in kinds
        assert inspect.Parameter.VAR_KEYWORD not in kinds


@pytest.mark.parametrize("name", ["get", "lookup", "peek", "undefine"])
def test_a_key_goes_by_position_or_by_keyword(name: str) -> None:
    parameters = inspect.signature(getattr(DomainList, name)).parameters
    assert list(parameters)[:5] == ["self", "key", "uuid", "name", "id"]
    assert parameters["key"].kind is inspect.Parameter.POSITIONAL_ONLY
    assert parameters["uuid"].kind is inspect.Parameter.KEYWORD_ONLY


# --- examples -------------------------------------------------------------------------------------

MODULES = [
    "shmdomains",
    "shmdomains.drivers",
    "shmdomains.metrics",
    "shmdomains.aio",
    "shmdomains.table",
]
WITHOUT = {
    "AnyDomainList",  # for type hints
    "HeldLock",  # only while another process lives and holds
    "COLUMNS",
    "INVARIANTS",
    "FAMILIES",
    "Family",
    "call",
    "wait_until",
    "preload",
    # What another process, another kernel, damage or a full disk has to bring about.
    *("NotOwner", "TooManyLocks", "JobTimeout", "DomainBusy", "Busy", "DomainTransient"),
    *("ConfigError", "SegmentError", "SegmentExists", "SegmentInUse", "SegmentMismatch"),
    *("SegmentRefused", "SegmentCorrupt", "SegmentPoisoned", "TooManyMutexes"),
    *("DescriptorLost", "LockKindMismatch", "LockLost", "InDoubt", "Unavailable"),
}
"""Public names whose page has no example."""


def examples_are_missing() -> set[str]:
    found = set()
    for name in MODULES:
        module = importlib.import_module(name)
        for public in module.__all__:
            if ">>>" not in (inspect.getdoc(getattr(module, public)) or ""):
                found.add(public)
    return found


def test_a_public_name_has_an_example() -> None:
    """Which the doctests run."""
    assert examples_are_missing() == WITHOUT
