"""The bench runs; its figures are nobody's business here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

QUICK = Path(__file__).parents[1] / "bench" / "quick.py"


def test_quick_runs_and_reports_every_operation() -> None:
    arguments = ["--domains", "20", "--count", "50", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, str(QUICK), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for row in ("get + state", "list lock + find", "define + remove", "peek", "killed holder"):
        assert row in done.stdout
