"""`shmdomains.metrics`: a list of domains as Prometheus sees it.

`DomainCollector` goes into one's own registry; ``shmdomains metrics`` serves one. `alerts` and
`dashboard` are an example of each, to begin with. The names of a domain's metrics are those of the
well-known libvirt exporter, so its dashboards go on; what only this library has begins with
``shmdomains_``: `FAMILIES` lists them all. Needs the extra ``shmdomains[metrics]``.
"""

from __future__ import annotations

from pathlib import Path

from .collector import DomainCollector
from .families import FAMILIES, Family

__all__ = ["FAMILIES", "DomainCollector", "Family", "alerts", "dashboard"]

_HERE = Path(__file__).parent


def alerts() -> str:
    """An example of alerts: a file of Prometheus rules, YAML.

    >>> alerts().splitlines()[0]
    'groups:'
    """
    return (_HERE / "alerts.yml").read_text()


def dashboard() -> str:
    """An example of a Grafana dashboard: JSON, to be imported.

    >>> import json
    >>> json.loads(dashboard())["uid"]
    'shmdomains'
    """
    return (_HERE / "dashboard.json").read_text()
