"""What a segment remembers for its users, as one value: where the files are, who runs the domains.

The core keeps it as bytes, double-buffered (layout.h, ``settings_choice``): a dead writer leaves
the old value or the new one. A checksum comes first: with a flipped bit it would be another path,
and files would be written there.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..config import ConfigDirs
from ..errors import SegmentCorrupt
from ..packing import pack


class Settings(NamedTuple):
    """The config directories, and the name of the driver; either may be ``None``."""

    dirs: ConfigDirs | None = None
    driver: str | None = None


def encode(settings: Settings) -> bytes:
    """Nothing is no bytes.

    >>> decode(encode(Settings(driver="qemu")))
    Settings(dirs=None, driver='qemu')
    """
    if settings == Settings():
        return b""
    dirs, driver = settings
    paths = (None, None) if dirs is None else (dirs.config_dir, dirs.autostart_dir)
    words: list[bytes | None] = [None if path is None else os.fsencode(path) for path in paths]
    blob = pack([*words, *([] if driver is None else [driver.encode()])])
    return zlib.crc32(blob).to_bytes(4, "big") + blob


def decode(blob: bytes) -> Settings:
    """Raises `SegmentCorrupt`."""
    if not blob:
        return Settings()
    if zlib.crc32(blob[4:]).to_bytes(4, "big") != blob[:4]:
        raise SegmentCorrupt("the config directory that the segment remembers is damaged")
    try:
        words = msgspec.msgpack.decode(blob[4:], type=list[bytes | None])
        config_dir, autostart_dir, driver = (*words, None) if len(words) == 2 else words
        name = None if driver is None else driver.decode()
    except (msgspec.MsgspecError, ValueError) as exc:
        raise SegmentCorrupt(f"the segment remembers no config directory: {exc}") from None
    dirs = None
    if config_dir is not None:
        autostart = None if autostart_dir is None else Path(os.fsdecode(autostart_dir))
        dirs = ConfigDirs(Path(os.fsdecode(config_dir)), autostart)
    return Settings(dirs, name)
