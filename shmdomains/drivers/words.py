"""The kinds of libvirt's errors, where an operation has another one than its class."""

from __future__ import annotations

from typing import TypeVar

from .. import ShmDomainsError

E = TypeVar("E", bound=ShmDomainsError)

INTERNAL = "internal error"
INVALID_ARGUMENT = "invalid argument"
INVALID_OPERATION = "Requested operation is not valid"


def as_kind(kind: str, error: E) -> E:
    """The error with this kind: what virsh writes before its message.

    >>> from shmdomains import DomainInactive
    >>> as_kind(INTERNAL, DomainInactive("domain 'web1' not running")).kind
    'internal error'
    """
    error.kind = kind
    return error
