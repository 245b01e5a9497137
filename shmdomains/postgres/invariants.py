"""What `PostgresDomainList` says of itself: counts, who is attached, and what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config.change import ConfigDirs
from ..memory import holder
from ..memory._core import core
from ..memory.domain_list import AttachedProcess, ListInfo
from ..xml.definition import DomainDef
from .session import Row, Statement, big, double, integer, number, text
from .statements import whole

if TYPE_CHECKING:
    from .pool import Pool
    from .store import PostgresStore

_INFO = Statement(
    "SELECT l.name, l.events_max, extract(epoch FROM l.created)::float8, "
    "(SELECT count(*) FROM domains d WHERE d.list = l.list), "
    "(SELECT count(*) FROM domains d WHERE d.list = l.list AND d.id <> -1), "
    "pg_database_size(current_database()), l.pid, l.start, l.place, l.host "
    "FROM lists l WHERE l.list = $1",
    "bigint",
)
_ATTACHED = Statement(
    "SELECT p.pid, p.start, p.place, p.host, p.command FROM processes p WHERE p.list = $1 "
    "AND EXISTS (SELECT FROM pg_locks k WHERE k.locktype = 'advisory' AND k.objsubid = 1 "
    "AND k.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND k.classid = (lock_key(7, p.process) >> 32)::int::oid "
    "AND k.objid = (lock_key(7, p.process) & 4294967295)::bigint::oid) ORDER BY p.process",
    "bigint",
)
_DEFINITIONS = (
    "SELECT d.name, d.uuid, f.typed, f.next_typed FROM domains d "
    "LEFT JOIN definitions f USING (record) WHERE d.list = <list>"
)


def list_info(pool: Pool, store: PostgresStore, dirs: ConfigDirs | None) -> ListInfo:
    """`PostgresDomainList.info`."""
    [row] = pool.ask(_INFO, [number(pool.list)])
    attached = [_process(one, pool) for one in pool.ask(_ATTACHED, [number(pool.list)])]
    size = big(row[5])
    return ListInfo(
        name=text(row[0]),
        path=pool.address.shown,
        lock="postgresql",
        domains=big(row[3]),
        active=big(row[4]),
        max_domains=2**31 - 1,
        bytes_max=0,
        bytes_committed=size,
        events_max=store.events_max,
        heap_used=0,
        heap_free=0,
        created=double(row[2]),
        creator=_process((*row[6:], None), pool),
        attached=[one for one in attached if one.alive],
        config_dir=None if dirs is None else str(dirs.config_dir),
        autostart_dir=None
        if dirs is None or dirs.autostart_dir is None
        else str(dirs.autostart_dir),
        poisoned=None,
    )


def _process(row: Row, pool: Pool) -> AttachedProcess:
    pid, start, here = integer(row[0]), big(row[1]), text(row[2]) == pool.place
    if here:
        alive = core.process_runs(pid, start)
        command = holder.command_of(pid) if alive else None
        return AttachedProcess(pid, holder.process_started(start), alive, command)
    command = None if row[4] is None else row[4].decode()
    return AttachedProcess(pid, None, command is not None, f"{command or ''} on {text(row[3])}")


def check(pool: Pool) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Problems, and how much was tested."""
    problems, count = [], 0
    for name, uuid, typed, successor in pool.ask(whole(_DEFINITIONS, pool.list), []):
        count += 1
        shown = text(name)
        if typed is None:
            problems.append(("I3 fields", f"domain '{shown}' has no definition"))
        for blob in (typed, successor):
            if blob is None:
                continue
            try:
                found = DomainDef.decode(blob)
            except ValueError as exc:
                problems.append(("I3 fields", f"domain '{shown}': {exc}"))
                continue
            if found.name != shown or found.uuid is None or found.uuid.bytes != uuid:
                problems.append(("I1 identity", f"'{shown}' has another one's definition"))
    return problems, {"domains": count}
