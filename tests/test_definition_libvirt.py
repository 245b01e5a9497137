"""libvirt's own test files: agree with what libvirt 9.0.0 answered for each of them.

The files are not the project's; they are looked for in ``$SHMDOMAINS_LIBVIRT_XML`` or beside the
checkout (``../shared/libvirt-xml``). Where they are not, one skip says so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from shmdomains.errors import DefinitionError
from shmdomains.xml.definition import DomainDef

PLACE = os.environ.get("SHMDOMAINS_LIBVIRT_XML")
FOLDER = (
    Path(PLACE) if PLACE else Path(__file__).resolve().parents[1].parent / "shared" / "libvirt-xml"
)
ANSWERS: dict[str, dict[str, Any]] = (
    json.loads((FOLDER / "expected.json").read_text())
    if (FOLDER / "expected.json").is_file()
    else {}
)
pytestmark = pytest.mark.skipif(
    not ANSWERS, reason=f"libvirt's files are not in {FOLDER} (or set SHMDOMAINS_LIBVIRT_XML)"
)

# What is wrong with the document itself. Its other refusals hang on the hypervisor.
OURS = {
    "genericxml2xmlindata--name-slash-fail.xml": ("name", "cannot contain '/'"),
    "test--testnode.xml": ("node", "expecting root element of 'domain', not 'node'"),
    "test--testnodeinline.xml": ("node", "expecting root element of 'domain', not 'node'"),
}
# libvirt drops part of this one's metadata, and so do we.
CHANGED = {"qemuxmlconfdata--metadata-duplicate.xml"}
DOCUMENTS = sorted(set(ANSWERS) - set(OURS))


def canonical(text: str | bytes) -> bytes:
    return bytes(etree.tostring(etree.fromstring(text), method="c14n"))


def test_the_folder_is_the_whole_one() -> None:
    assert len(ANSWERS) == 259
    assert sum(not answer["ok"] for answer in ANSWERS.values()) == 41


@pytest.mark.parametrize("file", sorted(OURS))
def test_what_is_wrong_with_the_document_is_refused(file: str) -> None:
    element, words = OURS[file]
    with pytest.raises(DefinitionError) as caught:
        DomainDef.from_xml((FOLDER / file).read_bytes())
    assert words in str(caught.value)
    assert words in ANSWERS[file]["error"]
    assert caught.value.element == element
    assert caught.value.line
    assert str(caught.value).endswith(f"(<{element}>, line {caught.value.line})")


@pytest.mark.parametrize("file", DOCUMENTS)
def test_everything_else_is_read_as_libvirt_reads_it(file: str) -> None:
    text = (FOLDER / file).read_bytes()
    definition = DomainDef.from_xml(text)
    answer = ANSWERS[file]
    if answer["ok"]:
        assert {
            "name": definition.name,
            "uuid": str(definition.uuid) if definition.uuid else None,
            "max_kib": definition.memory,
            "cur_kib": definition.current_memory,
            "max_vcpus": definition.vcpus,
            "cur_vcpus": definition.current_vcpus,
            "title": definition.title,
            "desc": definition.description,
        } == {key: answer[key] for key in answer if key != "ok"}
    assert (canonical(definition.to_xml()) == canonical(text)) is (file not in CHANGED)


@pytest.mark.parametrize("file", DOCUMENTS)
def test_blob_and_rewriting_keep_it(file: str) -> None:
    definition = DomainDef.from_xml((FOLDER / file).read_bytes())
    again = DomainDef.decode(definition.encode())
    assert again == definition and again.to_xml() == definition.to_xml()
    there = definition.replace(
        name="other", memory=definition.memory + 1, vcpus=definition.vcpus + 1, title="t",
        description="d", uuid="0" * 32, on_crash="destroy", emulator="/bin/true",
    )  # fmt: skip
    reread = DomainDef.from_xml(there.to_xml())
    assert reread == there != definition
    back = {field: getattr(definition, field) for field in DomainDef.__struct_fields__[:-1]}
    if "<vcpus>" in definition.to_xml():
        return  # which vCPUs are enabled is given up for the counts
    assert there.replace(**back) == definition
    assert DomainDef.from_xml(there.replace(**back).to_xml()) == definition
