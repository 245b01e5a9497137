"""The tree of exceptions: one ``except`` catches all, and each is what Python calls its like."""

from __future__ import annotations

import pickle

import pytest

import shmdomains
from shmdomains import errors

CLASSES = [
    one
    for one in vars(errors).values()
    if isinstance(one, type)
    and issubclass(one, BaseException)
    and one.__module__ == errors.__name__
]


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_error_is_in_the_tree_and_public(error: type[Exception]) -> None:
    assert issubclass(error, shmdomains.ShmDomainsError)
    assert getattr(shmdomains, error.__name__) is error
    assert error.__name__ in shmdomains.__all__
    assert error.__doc__


@pytest.mark.parametrize(
    ("error", "like"),
    [
        (errors.LockTimeout, TimeoutError),
        (errors.Busy, TimeoutError),
        (errors.DomainNotFound, KeyError),
        (errors.DomainRemoved, LookupError),
        (errors.DefinitionError, ValueError),
        (errors.InvalidName, errors.DefinitionError),
        (errors.ConfigError, OSError),
        (errors.SegmentNotFound, FileNotFoundError),
        (errors.SegmentExists, FileExistsError),
        (errors.SegmentRefused, PermissionError),
        (errors.SegmentFull, MemoryError),
    ],
    ids=lambda error: error.__name__,
)
def test_an_error_is_what_python_calls_its_like(
    error: type[Exception], like: type[Exception]
) -> None:
    assert issubclass(error, like)


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_an_error_crosses_processes_with_its_words(error: type[Exception]) -> None:
    """A pool pickles what its worker raises."""
    twin = pickle.loads(pickle.dumps(error("what happened")))
    assert type(twin) is error and str(twin) == "what happened"
