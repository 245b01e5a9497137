"""The examples of alerts and of a dashboard: each query names metrics and labels that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import yaml
from shell import out

from shmdomains.metrics import FAMILIES, alerts, dashboard

LABELS = {family.name: {*family.labels, "instance", "le"} for family in FAMILIES}


def expressions() -> Iterator[str]:
    for group in yaml.safe_load(alerts())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for panel in json.loads(dashboard())["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def faults(expression: str) -> list[str]:
    """Metrics that do not exist, and labels that none of the metrics has."""
    named = re.findall(r"\b(?:libvirt|shmdomains)_\w+", expression)
    known = set().union(*(LABELS.get(name, set()) for name in named))
    labels = set(re.findall(r"(\w+) *(?:=~|!=|=(?!=))", expression))
    for words in re.findall(r"\b(?:by|on) *\(([^)]*)\)", expression):
        labels |= {word.strip() for word in words.split(",")}
    return (
        [one for one in named if one not in LABELS] + sorted(labels - known) + ["none"][: not named]
    )


def test_a_query_that_names_what_is_not_there_is_noticed() -> None:
    assert faults("sum by (state) (shmdomains_domains)") == []
    assert faults("shmdomains_domain > 1") == ["shmdomains_domain"]
    assert faults('libvirt_up{state="x"}') == ["state"]
    assert faults("sum by (kind) (libvirt_up)") == ["kind"]


def test_every_query_names_what_is_there() -> None:
    found = [*expressions()]
    assert len(found) > 30
    assert {one: faults(one) for one in found if faults(one)} == {}


def test_the_commands_print_them() -> None:
    assert "\n".join(out("metrics", "--alerts")) + "\n" == alerts()
    assert json.loads("\n".join(out("metrics", "--dashboard"))) == json.loads(dashboard())
