"""The files of the core build on each other in one direction: none needs what comes after it.

The order is that of the headers in core.h. What calls up all the same goes through a pointer that
the one above sets or hands in, and each of these is named in `HOOKS`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from killing import CORE

# Who waits with other threads running, and who is told of a fault, is known to the binding alone.
HOOKS = {"sd_wait_hook", "sd_slice_hook", "sd_report"}

ORDER = re.findall(r'^#include "(\w+)\.h"', (CORE / "core.h").read_text(), re.M)
SOURCES = [name for name in ORDER if (CORE / f"{name}.c").exists()]

compiled = pytest.mark.skipif(
    not (shutil.which("cc") and shutil.which("nm")), reason="there is no cc, or no nm"
)


def includes(text: str) -> list[str]:
    return re.findall(r'^#include "(\w+)\.h"', text, re.M)


def up(name: str, needed: Sequence[str]) -> list[str]:
    """What stands after `name` in the order, or nowhere in it."""
    below = ORDER[: ORDER.index(name) + 1]
    return [other for other in needed if other not in below]


def symbols(folder: Path, sources: Sequence[Path]) -> dict[str, tuple[set[str], set[str]]]:
    """What each object defines, and what it needs of others."""
    found = {}
    for source in sources:
        made = folder / f"{source.stem}.o"
        command = ["cc", "-std=c11", "-O0", f"-I{CORE}", "-pthread", "-c", "-o", made, source]
        subprocess.run(command, check=True)
        lines = subprocess.run(
            ["nm", "-g", "-P", made], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        kinds = [line.split()[:2] for line in lines if line.startswith("sd_")]
        found[source.stem] = (
            {symbol for symbol, kind in kinds if kind != "U"},
            {symbol for symbol, kind in kinds if kind == "U"},
        )
    return found


def calls_up(found: dict[str, tuple[set[str], set[str]]]) -> list[str]:
    home = {symbol: name for name, (defined, _) in found.items() for symbol in defined}
    said = []
    for name, (_, needed) in found.items():
        assert needed <= home.keys(), f"nobody has what {name}.c needs: {needed - home.keys()}"
        above = [symbol for symbol in sorted(needed) if up(name, [home[symbol]])]
        said += [f"{name}.c needs {symbol} of {home[symbol]}.c" for symbol in above]
    return said


def test_every_file_has_its_place_in_the_order() -> None:
    # core.h lists them; handle.h is the binding's.
    there = {path.stem for path in CORE.glob("*.[ch]")} - {"core", "handle"}
    assert there == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", ORDER)
def test_a_file_includes_only_what_stands_before_it(name: str) -> None:
    files = [CORE / f"{name}.h", *([CORE / f"{name}.c"] if name in SOURCES else [])]
    needed = [one for file in files for one in includes(file.read_text())]
    assert up(name, needed) == []
    assert name in SOURCES or needed in ([], ["layout"])  # inlines and numbers


@compiled
def test_a_file_needs_only_symbols_of_those_before_it(tmp_path: Path) -> None:
    found = symbols(tmp_path, [CORE / f"{name}.c" for name in SOURCES])
    assert sum(len(needed) for _, needed in found.values()) > 50
    assert calls_up(found) == []


@compiled
def test_a_call_up_is_seen(tmp_path: Path) -> None:
    """Also one that declares what it calls by itself, which no list of headers shows."""
    text = (CORE / "heap.c").read_text()
    planted = tmp_path / "heap.c"
    planted.write_text(
        f"{text}\nvoid sd_tidy(sd_segment *segment, uint32_t slot);\n"
        "void sd_planted_call(sd_segment *segment);\n"
        "void sd_planted_call(sd_segment *segment) { sd_tidy(segment, 0); }\n"
    )
    sources = [planted if name == "heap" else CORE / f"{name}.c" for name in SOURCES]
    assert calls_up(symbols(tmp_path, sources)) == ["heap.c needs sd_tidy of locks.c"]
    assert up("heap", includes('#include "heap.h"\n#include "locks.h"\n')) == ["locks"]


def test_the_hooks_are_those_that_are_written_down() -> None:
    headers = [(CORE / f"{name}.h").read_text() for name in ORDER]
    assert {hook for text in headers for hook in re.findall(r"\(\*(sd_\w+)\)", text)} == HOOKS
