"""What a list remembers of who runs its domains, beside where their files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import EVERY_STORE, Party

from shmdomains import InvalidName, SegmentCorrupt
from shmdomains.memory import settings


@pytest.fixture(params=EVERY_STORE, ids=lambda store: store.name)
def store(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_it_is_remembered_beside_the_directories(doms: Any, other: Party, tmp_path: Path) -> None:
    assert doms.driver is None
    doms.driver = "qemu"
    assert other.tell("doms.driver") == "qemu" and doms.info.config_dir is None
    doms.load_all_configs(tmp_path)
    assert (doms.driver, doms.info.config_dir) == ("qemu", str(tmp_path))
    other.do("doms.driver = 'cloud-hypervisor'")
    assert (doms.driver, doms.info.config_dir) == ("cloud-hypervisor", str(tmp_path))
    doms.forget_configs()
    assert (doms.driver, doms.info.config_dir) == ("cloud-hypervisor", None)
    doms.driver = None
    assert doms.driver is None


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a" * 64, "ä", "a\n"])
def test_what_is_no_name_of_a_driver(doms: Any, name: str) -> None:
    with pytest.raises(InvalidName, match="a name has letters, digits and '-', up to 63"):
        doms.driver = name


def test_what_a_list_of_before_remembers() -> None:
    """Two words and no driver; nothing at all."""
    dirs = settings.ConfigDirs(Path("/etc/a"), None)
    blob = settings.encode(settings.Settings(dirs))
    assert settings.decode(blob) == (dirs, None) and settings.decode(b"") == (None, None)
    assert blob[4] == 0x92  # as they were written before: an array of two


def test_a_flipped_bit_is_no_other_driver() -> None:
    blob = settings.encode(settings.Settings(None, "qemu"))
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SegmentCorrupt):
            settings.decode(bytes(damaged))
