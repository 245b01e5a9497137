"""The result of loading: the loaded domains, and why other files were not loaded."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..text import counted, shown_path


class LoadFailure(msgspec.Struct, frozen=True):
    """A config file that was not loaded: its path, the line if known, and the reason.

    >>> print(LoadFailure(Path("/etc/vm/web1.xml"), 3, "missing domain type"))
    /etc/vm/web1.xml:3: missing domain type
    """

    path: Path
    line: int | None
    reason: str

    def __str__(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        return f"{shown_path(self.path)}{line}: {self.reason}"


class LoadReport(msgspec.Struct, frozen=True):
    """What `load_all` did: the names of the loaded domains, in order, one failure per other file,
    and the skipped files, whose names begin with a dot.

    >>> print(LoadReport(["web1"], [LoadFailure(Path("db.xml"), None, "Permission denied")]))
    1 domain loaded, 1 file failed
      db.xml: Permission denied
    """

    loaded: list[str]
    failures: list[LoadFailure]
    skipped: list[Path] = []

    def __str__(self) -> str:
        head = f"{counted(len(self.loaded), 'domain')} loaded"
        lines = [f"  {failure}" for failure in self.failures]
        if self.failures:
            head += f", {counted(len(self.failures), 'file')} failed"
        if self.skipped:
            head += f", {counted(len(self.skipped), 'file')} skipped"
            lines += [f"  {shown_path(path)}: its name begins with '.'" for path in self.skipped]
        return "\n".join([head, *lines])
