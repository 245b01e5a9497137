"""Export and import: everything comes along, and damage is an error."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import Child, Planted, hold_mutex

from shmdomains import DefinitionError, DomainDef, DomainList, DomainState
from shmdomains.config import ConfigDirs, load_all
from shmdomains.transfer import export_domains, import_domains

XML = """<domain type='kvm'><name>{}</name><memory>1024</memory><os><type>hvm</type></os>
<description>{}</description></domain>"""


@pytest.fixture
def exported() -> bytes:
    doms = DomainList(max_domains=10)
    for name in ("web1", "web2", "größe"):
        doms.define(XML.format(name, "live"))
    with doms.get(name="web2") as dom:
        dom.activate(pid=77)
        dom.set_state(DomainState.PAUSED, 1)
        dom.next_definition = dom.definition.replace(description="next")
        dom.data = {"disks": ["vda", "vdb"], 7: b"\0"}
        dom.autostart = True
    stream = io.BytesIO()
    assert export_domains(doms, stream) == 3
    return stream.getvalue()


def test_everything_comes_along(exported: bytes) -> None:
    doms = DomainList(max_domains=10)
    report = import_domains(doms, io.BytesIO(exported))
    assert sorted(report.imported) == ["größe", "web1", "web2"] and not report.failures
    info = doms.peek(name="web2")
    assert info is not None and info.is_active and info.pid == 77 and info.autostart
    assert (info.state, info.reason) == (DomainState.PAUSED, 1)
    assert info.next_definition is not None and info.next_definition.description == "next"
    assert info.data == {"disks": ("vda", "vdb"), 7: b"\0"}
    other = doms.peek(name="web1")
    assert other is not None and not other.is_active and other.persistent and other.data is None


def test_a_clash_is_reported_and_the_rest_goes_on(exported: bytes) -> None:
    doms = DomainList(max_domains=10)
    doms.define(XML.format("web1", "another uuid"))
    report = import_domains(doms, io.BytesIO(exported))
    assert [name for name, _ in report.failures] == ["web1"]
    assert "already exists with uuid" in report.failures[0][1]
    assert len(doms) == 3


def test_an_active_domain_is_left_alone(exported: bytes) -> None:
    doms = DomainList(max_domains=10)
    import_domains(doms, io.BytesIO(exported))
    report = import_domains(doms, io.BytesIO(exported))
    assert [name for name, _ in report.failures] == ["web2"]
    info = doms.peek(name="web2")
    assert info is not None and info.pid == 77


@pytest.mark.parametrize("cut", range(60))
def test_every_truncation_is_noticed(exported: bytes, cut: int) -> None:
    end = len(exported) * cut // 60
    with pytest.raises(DefinitionError):
        import_domains(DomainList(max_domains=10), io.BytesIO(exported[:end]))


@pytest.mark.parametrize("junk", [b"", b"\xc1", b"{}", b"\x01\x02", b"\x80", b"<domain/>"])
def test_junk_is_no_export(junk: bytes) -> None:
    with pytest.raises(DefinitionError):
        import_domains(DomainList(max_domains=10), io.BytesIO(junk))


def test_a_full_list_is_that_domains_failure(exported: bytes) -> None:
    doms = DomainList(max_domains=2)
    report = import_domains(doms, io.BytesIO(exported))
    assert len(report.imported) == 2 and len(report.failures) == 1
    assert "full" in report.failures[0][1]
    assert doms.check()


def test_definition_in_the_list_is_the_exported_one(exported: bytes) -> None:
    doms = DomainList(max_domains=10)
    import_domains(doms, io.BytesIO(exported))
    info = doms.peek(name="größe")
    assert info is not None
    assert info.definition == DomainDef.from_xml(XML.format("größe", "live")).replace(
        uuid=info.uuid
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("lock", ["heap", "id"])
def test_no_wait_of_an_import_or_a_load_is_without_end(
    start: Callable[..., Child], tmp_path: Path, lock: str
) -> None:
    """The domains are in the list already, so the first that needs a short lock is their commit, or
    the new id of one that was active."""
    path = tmp_path / "segment"
    with DomainList(max_domains=10) as source:
        uuid = source.define(XML.format("web1", "new")).uuid
        with source.get("web1") as dom:
            if lock == "id":
                dom.activate(pid=77)
        stream = io.BytesIO()
        export_domains(source, stream)
        stream.seek(0)
    document = XML.format("web1", "old").replace("<memory>", f"<uuid>{uuid}</uuid><memory>")
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "web1.xml").write_text(document.replace("old", "new"))
    with DomainList.create(path=path, max_domains=10) as doms, Planted(path) as planted:
        doms.define(document)
        holder = start(hold_mutex, str(path), planted.header(f"{lock}_mutex"))
        assert holder.hear() == 0
        failures = import_domains(doms, stream, timeout=0.05).failures
        assert [name for name, _ in failures] == ["web1"]
        if lock == "heap":
            not_loaded = load_all(doms, ConfigDirs(tmp_path / "vm"), timeout=0.05).failures
            assert [failure.path.name for failure in not_loaded] == ["web1.xml"]
        info = doms["web1"]
        assert info.definition.description == "old" and not info.is_active
        with doms.get("web1", timeout=0):
            pass
        holder.tell()
        assert holder.hear() == 0
        doms.unlink(force=True)
