"""``import --from`` and ``export --to`` a libvirt: its own test driver, in this process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import DEADLINE, environment, xml
from shell import invoke, ran

from shmdomains import DomainList, DriverError
from shmdomains.libvirts import from_libvirt, to_libvirt

libvirt = pytest.importorskip(
    "libvirt", reason="no libvirt-python: pip install 'shmdomains[libvirt]' (needs libvirt-dev)"
)

NODE = """<node xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>
  <domain type='test'><name>web1</name><uuid>11111111-2222-3333-4444-555555555555</uuid>
    <memory>1024</memory><vcpu>2</vcpu><os><type>hvm</type></os></domain>
  <domain type='test'><name>db1</name><memory>2048</memory><os><type>hvm</type></os>
    <test:runstate>5</test:runstate><test:hasmanagedsave>1</test:hasmanagedsave></domain>
  <domain type='test'><name>tr1</name><memory>1024</memory><os><type>hvm</type></os>
    <test:transient>1</test:transient></domain>
</node>"""


@pytest.fixture
def uri(tmp_path: Path) -> str:
    place = tmp_path / "node.xml"
    place.write_text(NODE)
    return f"test://{place}"


def test_what_is_defined_there_is_defined_here(uri: str, tmp_path: Path) -> None:
    with DomainList(max_domains=8) as doms:
        doms.load_all_configs(tmp_path / "etc")
        carried = from_libvirt(doms, uri)
        assert carried.names == ["db1", "web1"]
        assert carried.left == [
            ("db1", "the memory that was saved of it"),
            ("web1", "it runs there, and is shut off here"),
        ]
        assert [name for name, _ in carried.failures] == ["tr1"]
        assert "it is transient" in carried.failures[0][1]
        web1 = doms.peek(name="web1")
        assert str(web1.uuid).startswith("11111111") and web1.definition.vcpus == 2
        assert web1.persistent and not web1.is_active
        assert (tmp_path / "etc" / "web1.xml").exists()
        # Once more: nothing is overwritten.
        with doms.get("web1") as dom:
            dom.data = "ours"
        again = from_libvirt(doms, uri)
        assert again.names == [] and len(again.failures) == 3
        assert "the list has a domain 'web1' (11111111" in dict(again.failures)["web1"]
        assert doms["web1"].data == "ours" and doms.check().problems == []


def test_there_and_back() -> None:
    """What libvirt says of it is the same definition, and so is its autostart."""
    with DomainList(max_domains=8) as doms, DomainList(max_domains=8) as other:
        doms.define(xml("a", type="test", memory=4096, title="the first"))
        doms.define(xml("b", type="test"))
        with doms.get("b") as dom:
            doms.set_autostart(dom, True)
            dom.activate()
            dom.data = {"vnc": 5900}
        with doms.locked():
            doms.assign_def(doms["a"].definition.replace(name="c", uuid=None)).unlock()
        connection = libvirt.open("test:///default")  # in this process it is one node for all
        try:
            carried = to_libvirt(doms, "test:///default")
            assert carried.names == ["a", "b"] and carried.left == [
                ("b", "it runs here, and is shut off there"),
                ("b", "its driver's data"),
            ]
            assert "transient" in dict(carried.failures)["c"]
            again = dict(to_libvirt(doms, "test:///default").failures)
            assert again["a"] == "test:///default has a domain 'a' already"
            from_libvirt(other, "test:///default")
        finally:
            for name in ("a", "b"):
                connection.lookupByName(name).undefine()
            connection.close()
        for name in ("a", "b"):
            mine, theirs = doms[name], other[name]
            assert (mine.uuid, mine.autostart) == (theirs.uuid, theirs.autostart)
            for field in ("memory", "vcpus", "title", "description", "type"):
                assert getattr(mine.definition, field) == getattr(theirs.definition, field)


def test_refusals_are_libvirts_words(capfd: pytest.CaptureFixture[str]) -> None:
    with DomainList(max_domains=8) as doms:
        doms.define(xml("a", extra="<devices><controller type='nonsense'/></devices>"))
        [(name, why)] = to_libvirt(doms, "test:///default").failures
        assert name == "a" and "nonsense" in why
        with pytest.raises(DriverError, match="nonsense:///"):
            from_libvirt(doms, "nonsense:///")
    assert capfd.readouterr().err == ""  # libvirt prints nothing by itself


def test_the_commands(segment_dir: Path, uri: str) -> None:
    done = invoke("import", "--from", uri, status=1)
    assert done.stdout == "2 domains imported into segment 'default'\n"
    assert done.stderr.splitlines() == [
        "warning: domain 'db1', not carried over: the memory that was saved of it",
        "warning: domain 'web1', not carried over: it runs there, and is shut off here",
        "error: domain 'tr1': it is transient: when it stops there, nothing is left to define",
    ]
    done = invoke("export", "--to", uri, status=1)
    assert "has a domain 'web1' already" in done.stderr and "0 domains defined" in done.stderr
    assert "nonsense" in ran("import", "--from", "nonsense:///").stderr
    for words in (
        ["import"],
        ["import", "x", "--from", uri],
        ["export"],
        ["export", "x", "--to", uri],
    ):
        assert "one of them" in invoke(*words, status=2).stderr


def test_without_the_extra(segment_dir: Path) -> None:
    code = "import sys; sys.modules['libvirt'] = None; from shmdomains.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "import", "--from", "test:///default"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=environment(),
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install 'shmdomains[libvirt]'" in done.stderr
