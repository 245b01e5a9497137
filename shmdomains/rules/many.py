"""Whole pieces of work in one call: a counter, and many domains at once.

What the single calls do, said once for all of them. Each method is the rule, written against
the seam and the rules about one domain; a native store may do the same in fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic
from uuid import UUID

from ..errors import DomainExists, DomainLocked, TooManyLocks
from ..lazy import LazyModule
from ..names import Uuid, parse_uuid
from ..states import DomainState
from ..xml.definition import DomainDef, EncodedDef
from .domain_list import DomainListRules, as_new, replace_definition
from .info import DomainInfo
from .store import D, Deadline, Filter, Identity, LockedDomains
from .values import checked_pid, checked_reason, checked_state, key_of, not_found, one_key

if TYPE_CHECKING:
    from .. import table as tables
    from ..table import Table
else:
    tables = LazyModule("shmdomains.table")

MAX_HELD = 1_000
"""Domains that one owner may hold; see `TooManyLocks`."""

Definition = DomainDef | EncodedDef


class ManyRules(DomainListRules[D]):
    """The rules with these, to be combined with a store."""

    def get_many(
        self, keys: Iterable[D | DomainInfo | Uuid | int], timeout: float | None = None
    ) -> LockedDomains[D]:
        """`get` for several keys: their domains, locked, in the order of the keys.

        All or nothing, and the list lock is held meanwhile, as in `lock_many`, which also takes
        handles as they are: here they stand for their uuids. Raises what `lock_many` raises.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...        "<os><type>hvm</type></os></domain>")
        >>> infos = [doms.define(xml), doms.define(xml.replace("web1", "web2"))]
        >>> with doms.get_many(["web2", infos[0].uuid]) as (second, first):
        ...     second.name, first.name
        ('web2', 'web1')
        """
        deadline = self._deadline(timeout)
        return self._locked_together(list(keys), deadline, self._get_all)

    def _get_all(
        self,
        keys: list[D | DomainInfo | Uuid | int],
        taken: LockedDomains[D],
        deadline: Deadline,
    ) -> None:
        for key in keys:
            self._lock_one(key.uuid if isinstance(key, self._handle_type) else key, taken, deadline)

    def assign_defs(
        self,
        definitions: Iterable[Definition],
        persistent: bool | None = None,
        timeout: float | None = None,
    ) -> LockedDomains[D]:
        """`assign_def` for several definitions: their domains, locked, in the order given.

        The list lock is taken, unless the caller holds it. All or nothing: an error removes the
        domains that are new and rolls the others back. If the worker is killed in this call, or
        loses its locks, the new domains that were entered by then stay. The end of the ``with``
        block commits what was replaced, or rolls it back; new domains are committed before it
        begins.

        Raises what `assign_def` raises, and before anything is changed `DomainExists`, also for two
        definitions with one name or uuid, and `TooManyLocks` for more than 1,000: enter those in
        batches.

        >>> from shmdomains import DomainDef, DomainList
        >>> doms = DomainList()
        >>> web1 = DomainDef.from_xml("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                           "<os><type>hvm</type></os></domain>")
        >>> with doms.assign_defs([web1, web1.replace(name="web2")], persistent=True) as new:
        ...     [dom.name for dom in new]
        ['web1', 'web2']
        >>> doms.count(persistent=True)
        2
        """
        deadline = self._deadline(timeout)
        wanted = list(definitions)
        if len(wanted) > MAX_HELD:
            raise TooManyLocks(
                f"{len(wanted)} definitions at once: {self._this} may hold {MAX_HELD} domains; "
                "work in batches"
            )
        batch = _Batch(self, len(wanted), deadline)
        try:
            with self._list_held(deadline.left()):
                try:
                    return batch.enter(wanted, persistent)
                except BaseException:
                    batch.undo()  # while nobody else can find them
                    raise
        except BaseException:
            batch.undo()  # a signal handler may raise as the list lock is released
            raise

    def _assign_all(
        self,
        definitions: list[Definition],
        persistent: bool | None,
        deadline: Deadline,
        places: list[list[D | None]],
    ) -> bool:
        """A native store's short way for domains that are all new."""
        return False

    def update_many(
        self,
        changes: Mapping[Any, Mapping[str, Any]] | Iterable[tuple[Any, Mapping[str, Any]]],
        timeout: float | None = None,
    ) -> int:
        """Assign fields of several domains; returns of how many.

        `changes` says for each key, as `get` takes it, the new values of ``state``, ``reason``,
        ``pid``, ``persistent``, ``autostart`` and ``data``: a mapping, or pairs. Each domain is
        locked, changed, committed and unlocked by itself, in the order given: not all or nothing.
        `Domain` says what assigning does; a new state has reason 0 unless one is given. The
        autostart links of config directories are `set_autostart`'s.

        A field that there is not, or a number that a field cannot have, is refused before anything
        is changed. After any other error the domains before it are changed; a note on the error
        says how many. Raises what `get`, assigning and `Domain.commit` raise. `timeout` is for all
        of them together.

        >>> from shmdomains import DomainList, DomainState
        >>> doms = DomainList()
        >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...        "<os><type>hvm</type></os></domain>")
        >>> infos = [doms.define(xml), doms.define(xml.replace("web1", "web2"))]
        >>> doms.update_many({"web1": {"state": DomainState.PAUSED}, "web2": {"data": "mine"}})
        2
        >>> doms["web1"].state.name, doms["web2"].data
        ('PAUSED', 'mine')
        """
        pairs = changes.items() if isinstance(changes, Mapping) else changes
        return self._update_all(pairs, self._deadline(timeout), _checked, _note)

    def _update_all(
        self,
        pairs: Iterable[tuple[Any, Mapping[str, Any]]],
        deadline: Deadline,
        checked: Callable[[object, Mapping[str, Any]], dict[str, Any]],
        note: Callable[[BaseException, str], None],
    ) -> int:
        wanted = [(key_of(key), checked(key, fields)) for key, fields in pairs]
        done = 0
        try:
            for key, fields in wanted:
                self._update(key, fields, deadline)
                done += 1
        except BaseException as exc:
            note(exc, f"{done} of {len(wanted)} domains were changed before")
            raise
        return done

    def _update(self, key: dict[str, Any], fields: dict[str, Any], deadline: Deadline) -> None:
        dom = self.get(**key, timeout=deadline.left())
        try:
            for field, value in fields.items():
                setattr(dom, field, value)
            _end(dom, deadline)
        finally:
            dom._release_unseen()

    def remove_many(
        self, domains: Iterable[D | DomainInfo | Uuid | int], timeout: float | None = None
    ) -> int:
        """`remove_inactive` for several domains, in the order given; returns how many were removed.

        The list lock is taken, unless the caller holds it. A handle that this thread has locked
        (`DomainLocked`) or of another list (`WrongList`) is refused before anything is removed.
        After any other error the domains before it are gone; a note on the error says how many.
        Raises what `remove_inactive` raises.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> xml = ("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...        "<os><type>hvm</type></os></domain>")
        >>> infos = [doms.define(xml), doms.define(xml.replace("web1", "web2"))]
        >>> doms.remove_many(infos), len(doms)
        (2, 0)
        """
        deadline = self._deadline(timeout)
        with self._list_held(deadline.left()):
            return self._remove_all(list(domains), deadline, _note)

    def _remove_all(
        self,
        wanted: list[D | DomainInfo | Uuid | int],
        deadline: Deadline,
        note: Callable[[BaseException, str], None],
    ) -> int:
        for one in wanted:
            if not isinstance(one, self._handle_type):
                key_of(one)  # the error for what is no key
                continue
            self._need_ours(one)
            if one.is_locked:
                raise DomainLocked(f"{self._this} holds domain {one.uuid}; unlock it first")
        done = 0
        try:
            for one in wanted:
                self.remove_inactive(one, deadline.left())
                done += 1
        except BaseException as exc:
            note(exc, f"{done} of {len(wanted)} domains were removed before")
            raise
        return done

    def table(
        self,
        columns: Iterable[str] = (
            "id",
            "name",
            "uuid",
            "state",
            "reason",
            "persistent",
            "autostart",
            "pid",
        ),
        *,
        active: bool | None = None,
        persistent: bool | None = None,
        autostart: bool | None = None,
        state: int | str | Iterable[int | str] | None = None,
        host: str | None = None,
    ) -> Table:
        """`list` by columns, for NumPy, Arrow and whoever looks at very many domains; takes no
        lock.

        There is one more column, ``active``. Filters are those of `list`. Each row is one moment's,
        as each info of a list is. `Table` says what a column is. Raises `ValueError` for a column
        that there is not.

        >>> from shmdomains import DomainList
        >>> doms = DomainList()
        >>> info = doms.define("<domain type='kvm'><name>web1</name><memory>1024</memory>"
        ...                    "<os><type>hvm</type></os></domain>")
        >>> for name, state in doms.table(("name", "state"), active=False):
        ...     print(name, state)
        web1 5
        """
        wanted = Filter.of(active, persistent, autostart, state, host)
        return self._table(tables.checked_columns(columns), wanted)

    def _table(self, columns: tuple[str, ...], wanted: Filter) -> Table:
        return tables.of_infos(columns, self._scan(wanted, False))

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


_FIELDS: dict[str, Callable[[Any], object]] = {
    "state": checked_state,  # first: it sets the reason
    "reason": checked_reason,
    "pid": checked_pid,
    "persistent": bool,
    "autostart": bool,
    "data": lambda data: data,  # encoded once, when it is assigned
}
"""The fields of `update_many` in the order of their assignment, and what refuses a value."""


def _checked(key: object, fields: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [field for field in fields if field not in _FIELDS]
    if unknown:
        raise ValueError(
            f"domain {_shown(key)} has no field {unknown[0]!r} to change; there are "
            f"{', '.join(_FIELDS)}"
        )
    return {field: check(fields[field]) for field, check in _FIELDS.items() if field in fields}


def _shown(key: object) -> str:
    return repr(key) if isinstance(key, (str, int)) else str(getattr(key, "uuid", key))


def _note(error: BaseException, note: str) -> None:
    """Add a note to an error; before Python 3.11 to its message."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]} ({note})", *error.args[1:])


class _Batch(Generic[D]):
    """Domains that are entered together. At each place is its handle once it is locked."""

    def __init__(self, doms: ManyRules[D], count: int, deadline: Deadline) -> None:
        self._doms, self._deadline = doms, deadline
        self._places: list[list[D | None]] = [[None] for _ in range(count)]
        self._known: list[Identity | None] = []

    def enter(self, wanted: list[Definition], persistent: bool | None) -> LockedDomains[D]:
        doms = self._doms
        self._known = [None] * len(wanted)
        if not doms._assign_all(wanted, persistent, self._deadline, self._places):
            self._enter_each(wanted, persistent)
        entered = doms._empty()
        for [dom] in self._places:
            assert dom is not None
            entered.append(dom)
        return entered

    def _enter_each(self, wanted: list[Definition], persistent: bool | None) -> None:
        doms, left = self._doms, self._deadline.left
        self._known = [doms._known(definition) for definition in wanted]
        _need_different(wanted, self._known)
        # Those that others may hold come first: a wait in vain leaves no event of a new domain.
        for definition, known, place in zip(wanted, self._known, self._places, strict=True):
            if known is None:
                continue
            place[0] = found = doms.find_by_uuid(known.uuid, left())
            if found is None:  # a signal handler of this thread removed it
                raise not_found(uuid=known.uuid)
            replace_definition(found, definition, persistent)
        new = [
            (as_new(definition), place)
            for definition, known, place in zip(wanted, self._known, self._places, strict=True)
            if known is None
        ]
        for (uuid, name, blob), place in new:
            doms._insert(uuid, name, blob, DomainState.SHUTOFF, persistent or False, left(), place)

    def undo(self) -> None:
        """Unlock all of them and leave nothing; once more is harmless. In a child that a signal
        handler forked nothing is locked: that is its parent's."""
        doms, new = self._doms, []
        for [dom], known in zip(self._places, self._known, strict=False):
            if dom is None or not dom.is_locked:
                continue
            if known is None:
                new.append((dom, dom._receipt))
            if known is not None or not doms.is_locked:
                dom._release_unseen()
        for dom, made in new:
            doms._take_back(dom, made, self._deadline.left())


def _need_different(wanted: list[Definition], known: list[Identity | None]) -> None:
    """`DomainExists` for two definitions of one domain."""
    names: set[str] = set()
    uuids: dict[UUID, str] = {}
    for definition, there in zip(wanted, known, strict=True):
        name = definition.name
        if name in names:
            raise DomainExists(f"domain '{name}' is to be entered twice at once")
        names.add(name)
        given = definition.uuid if there is None else there.uuid
        if given is None:
            continue
        uuid = parse_uuid(given)
        if uuid in uuids:
            raise DomainExists(
                f"domains '{uuids[uuid]}' and '{name}' are to be entered with one uuid {uuid}"
            )
        uuids[uuid] = name


def _end(dom: D, deadline: Deadline) -> None:
    """Commit and unlock, in one step if the store has one. A death that the domain tells of is kept
    for the next holder: nobody saw it here."""
    if dom.previous_owner_died is None:
        dom.unlock(deadline.left())
    else:
        dom.commit(deadline.left())
