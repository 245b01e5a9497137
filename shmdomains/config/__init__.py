"""The config and autostart directories: one libvirt domain XML file per persistent domain.

`change` writes, `parse` reads, `load` fills a list, `report` is the result of loading. This folder
imports `xml` and the vocabulary, and no store. It promises that a config file is whole, old or new,
whenever a process is killed, and that one bad file never stops the others.
"""

from .change import LOCK_NAME, Commit, ConfigDirs
from .load import load_all
from .parse import BATCH, MAX_FILE_BYTES, scan
from .report import LoadFailure, LoadReport

__all__ = [
    "BATCH",
    "LOCK_NAME",
    "MAX_FILE_BYTES",
    "Commit",
    "ConfigDirs",
    "LoadFailure",
    "LoadReport",
    "load_all",
    "scan",
]
