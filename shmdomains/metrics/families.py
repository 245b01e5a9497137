"""The names of the metrics, and how a scrape is written.

A scrape is a list of families with their rows, a row being labels and a value. The labels of a
domain are made once and kept, their text with them, so that ten thousand domains are written in a
few milliseconds; what the client library does for each sample takes ten times that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Family(NamedTuple):
    """A metric: the name of its samples, ``gauge``, ``counter`` or ``histogram``, what it says, and
    the names of its labels."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """The name without what its kind adds to it.

        >>> COMMITS.base, WAITS.base, UP.base
        ('shmdomains_commits', 'shmdomains_lock_wait_seconds', 'libvirt_up')
        """
        ending = {"counter": "_total", "histogram": "_bucket"}.get(self.kind, "")
        return self.name.removesuffix(ending)

    @property
    def head(self) -> str:
        """The two lines before its samples."""
        name = self.base if self.kind == "histogram" else self.name
        return f"# HELP {name} {self.help}\n# TYPE {name} {self.kind}\n"


class Labels:
    """Labels and their values, and how they are written."""

    __slots__ = ("text", "values")

    def __init__(self, **values: str) -> None:
        self.values = values
        shown = [f'{name}="{_escaped(value)}"' for name, value in values.items()]
        self.text = "{" + ",".join(shown) + "}" if shown else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


Rows = tuple[Sequence[Labels], Sequence[float]]
"""The labels and the values of a family's samples, side by side. No pairs: ten thousand tuples
would be work for the collector of garbage, at each scrape."""

NONE = Labels()


def rows(pairs: Iterable[tuple[Labels, float]]) -> Rows:
    """The rows of a small family."""
    both = [*pairs]
    return [labels for labels, _ in both], [value for _, value in both]


def one(value: float) -> Rows:
    """The row of a family without labels."""
    return [NONE], [value]


def written(found: Iterable[tuple[Family, Rows]]) -> bytes:
    """A scrape in Prometheus' text format, version 0.0.4.

    >>> print(written([(PER_STATE, ([Labels(state="shut off")], [3]))]).decode(), end="")
    # HELP shmdomains_domains Domains in each state.
    # TYPE shmdomains_domains gauge
    shmdomains_domains{state="shut off"} 3
    """
    text: list[str] = []
    for family, (labels, values) in found:
        text.append(family.head)
        name = family.name
        text += [f"{name}{of.text} {value}\n" for of, value in zip(labels, values, strict=True)]
    return "".join(text).encode()


# --- a domain's, by the names of the libvirt exporter ----------------------------------------

_DOMAIN = ("domain",)

UP = Family("libvirt_up", "gauge", "Whether the list of domains could be read.")
DOMAINS = Family("libvirt_domains", "gauge", "Domains in the list.")
META = Family(
    "libvirt_domain_info_meta",
    "gauge",
    "A domain's UUID, and the host where it runs; always 1.",
    ("domain", "uuid", "host"),
)
STATE = Family(
    "libvirt_domain_info_vstate",
    "gauge",
    "State: 0 none, 1 running, 2 idle, 3 paused, 4 in shutdown, 5 shut off, 6 crashed, "
    "7 suspended by its guest.",
    _DOMAIN,
)
MAXIMUM = Family(
    "libvirt_domain_info_maximum_memory_bytes", "gauge", "Memory it may have.", _DOMAIN
)
USAGE = Family(
    "libvirt_domain_info_memory_usage_bytes", "gauge", "Memory it is given now.", _DOMAIN
)
VCPUS = Family("libvirt_domain_info_virtual_cpus", "gauge", "Virtual CPUs it has now.", _DOMAIN)
CPU_TIME = Family(
    "libvirt_domain_info_cpu_time_seconds_total",
    "counter",
    "CPU time of its process, if that runs on this host.",
    _DOMAIN,
)
RSS = Family(
    "libvirt_domain_memory_stats_rss_bytes",
    "gauge",
    "Resident memory of its process, if that runs on this host.",
    _DOMAIN,
)

# --- ours: domains and the list ----------------------------------------------------------------

_KIND = ("kind",)
_OPERATION = ("operation",)

PER_STATE = Family("shmdomains_domains", "gauge", "Domains in each state.", ("state",))
AUTOSTART = Family(
    "shmdomains_domain_autostart", "gauge", "1 for each domain that starts with the host.", _DOMAIN
)
DAMAGED = Family("shmdomains_damaged_domains", "gauge", "Domains whose record is damaged.")
DOMAINS_MAX = Family("shmdomains_domains_max", "gauge", "Domains that the list has room for.")
HEAP_USED = Family("shmdomains_heap_used_bytes", "gauge", "Of definitions and data, in memory.")
HEAP_FREE = Family("shmdomains_heap_free_bytes", "gauge", "What is left of that room.")
BYTES = Family("shmdomains_committed_bytes", "gauge", "Memory or disk that the list takes.")
POISONED = Family("shmdomains_poisoned", "gauge", "1 if a repair failed: it can only be read.")
ATTACHED = Family("shmdomains_attached_processes", "gauge", "Living processes that use the list.")

# --- ours: locks and jobs ----------------------------------------------------------------------

ACQUISITIONS = Family("shmdomains_lock_acquisitions_total", "counter", "Locks taken.")
WAITS = Family(
    "shmdomains_lock_wait_seconds_bucket",
    "histogram",
    "Waits for a lock that slept, whether or not they got it.",
    ("le",),
)
COMMITS = Family("shmdomains_commits_total", "counter", "Changes, new domains and removals.")
RECOVERIES = Family("shmdomains_recoveries_total", "counter", "Repairs after a death.")
DEATHS = Family("shmdomains_dead_holders_total", "counter", "Locks whose holder was found dead.")
UNLISTED = Family(
    "shmdomains_unlisted_waits_total", "counter", "Waits that found no room in the table of waits."
)
HELD = Family("shmdomains_locks_held", "gauge", "Locks that are held.", _KIND)
HELD_BY_DEAD = Family(
    "shmdomains_locks_held_by_dead",
    "gauge",
    "Those whose holder died; the next one repairs.",
    _KIND,
)
WAITING = Family("shmdomains_lock_waiting", "gauge", "Threads that wait for a lock.", _KIND)
LONGEST_WAIT = Family(
    "shmdomains_lock_longest_wait_seconds", "gauge", "How long the first of them has waited.", _KIND
)
LONGEST_HELD = Family(
    "shmdomains_lock_longest_held_seconds", "gauge", "How long the oldest has been held.", _KIND
)
JOBS = Family("shmdomains_jobs", "gauge", "Jobs of living holders, by what is done.", _OPERATION)
OLDEST_JOB = Family(
    "shmdomains_job_oldest_seconds", "gauge", "How long the oldest of them has run.", _OPERATION
)
SECONDS = Family("shmdomains_scrape_seconds", "gauge", "How long it took to read all this.")

FAMILIES = (
    *(UP, DOMAINS, META, STATE, MAXIMUM, USAGE, VCPUS, CPU_TIME, RSS),
    *(PER_STATE, AUTOSTART, DAMAGED, DOMAINS_MAX, HEAP_USED, HEAP_FREE, BYTES, POISONED, ATTACHED),
    *(ACQUISITIONS, WAITS, COMMITS, RECOVERIES, DEATHS, UNLISTED),
    *(HELD, HELD_BY_DEAD, WAITING, LONGEST_WAIT, LONGEST_HELD, JOBS, OLDEST_JOB, SECONDS),
)
"""In the order in which they are written."""
