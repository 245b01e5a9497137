"""Whole pieces of work in one call: a counter, and many domains at once.

What the single calls do, said once for all of them. Each method is the rule, written against
the seam and the rules about one domain; a native store may do the same in fewer steps.
"""

from __future__ import annotations

from ..names import Uuid
from .domain_list import DomainListRules
from .info import DomainInfo
from .store import D, Deadline
from .values import one_key


class ManyRules(DomainListRules[D]):
    """The rules with these, to be combined with a store."""

    def add(
        self,
        key: D | DomainInfo | Uuid | int | None = None,
        /,
        field: str | None = None,
        by: int = 1,
        timeout: float | None = None,
        *,
        uuid: Uuid | None = None,
        name: str | None = None,
        id: int | None = None,
    ) -> int:
        """Add to a named integer of a domain's data and commit it; returns the sum.

        Exactly one key, by position as `get` takes it or by keyword. The domain is locked, changed
        and unlocked in this call. Raises what `get` and `Domain.add` raise: `AlreadyLocked` if this
        thread holds the domain, which has `add`, too.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> info = doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                    "<os><type>hvm</type></os></domain>")
        >>> doms.add("web1", "requests"), doms.add(name="web1", field="requests", by=2)
        (1, 3)
        """
        deadline = self._deadline(timeout)
        if field is None:
            raise TypeError("say which integer of the data: doms.add('web1', 'requests')")
        dom = self.get(**one_key(key, uuid, name, id), timeout=deadline.left())
        try:
            value = dom.add(field, by)
            _end(dom, deadline)
        finally:
            dom._release_unseen()
        return value


def _end(dom: D, deadline: Deadline) -> None:
    """Commit and unlock, in one step if the store has one. A death that the domain tells of is kept
    for the next holder: nobody saw it here."""
    if dom.previous_owner_died is None:
        dom.unlock(deadline.left())
    else:
        dom.commit(deadline.left())
