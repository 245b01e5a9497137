"""Watches (observe.c): a descriptor that tells when a word of shared memory changed.

The parts of observe_test.c, each once as the kernel lets us and once with a thread for each watch.
Its part ``speed`` is for people.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import CORE, TESTS

NEEDED = [CORE / f"{name}.c" for name in ("observe", "mutex", "thread")]
PARTS = ["inbox", "words", "unlock", "death", "chain", "both", "turn", "queue", "turns", "fork"]
CHECKED = ["cancel", "close"]  # under ASan, whose own locks do not outlive a fork among threads


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """``program(checked)``: compiled, and with `checked` under ASan and UBSan where they are."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("observe")
    plain = [compiler, "-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{CORE}"]

    def compiled(name: str, options: list[str]) -> Path | None:
        made = folder / name
        if not made.exists():
            command = [*plain, "-pthread", *options, "-o", made, TESTS / "observe_test.c", *NEEDED]
            if subprocess.run(command, capture_output=True).returncode:
                return None
        return made

    def program(checked: bool) -> Path:
        checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        made = compiled("checked", checks) if checked else None
        made = made or compiled("plain", [])
        assert made, "observe_test.c does not compile"
        return made

    return program


@pytest.mark.timeout(90)
@pytest.mark.parametrize("ways", [[], ["one"]], ids=["many", "one"])
@pytest.mark.parametrize("part", [*PARTS, *CHECKED])
def test_watches(program: Callable[[bool], Path], part: str, ways: list[str]) -> None:
    command = [program(part in CHECKED), *ways, part]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"{part}: signal {-done.returncode}"
